"""Score runs zero-shot: the function that `sail-eval` calls."""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sail_align.align.runs.folder import RunFolder
from sail_align.align.stats.tables import format_interval, number, one_line
from sail_align.evaluate.results.scores import Record, unfinished
from sail_align.evaluate.tasks.task import EvaluationTask, all_tasks, find_task
from sail_align.extract import manifest as manifests
from sail_align.extract.errors import UserError, import_extra
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources.demo.source import DemoConfig
from sail_align.extract.system.progress import note
from sail_align.extract.system.python_calls import PathLike, as_paths, in_python, one_path

if TYPE_CHECKING:
    import pandas

    from sail_align.align.runs.checkpoint import Run

Sets = list[tuple[Manifest, Path]]
"""Evaluation sets, each with the data root of its files."""

NOTHING = "nothing to score: get one of these, or describe your own pictures (docs/data.md) for --manifest."


@dataclass(repr=False)
class Scores:
    """Scores of a run on evaluation sets. `print` shows a table, and a notebook a page's.

    Attributes:
        run: The run, checkpoint or export that was scored.
        records: One record per set and protocol, as in `scores.json`.
        notes: Messages about sets that were left out.
    """

    run: Path
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The values of all metrics, by set and name: `{"photos (retrieval)": {"t2i_r1": 31.5, …}}`."""
        return {
            record.name: {metric["name"]: metric["value"] for metric in record["metrics"]} for record in self.scored
        }

    @property
    def scored(self) -> list[Record]:
        """The records of the sets that were scored."""
        return [record for record in self.records if not record.error]

    @property
    def errors(self) -> dict[str, str]:
        """Why sets could not be scored, by set."""
        return {record.name: record.error for record in self.records if record.error}

    @property
    def file(self) -> Path:
        """The `scores.json` that has these scores, and those of earlier calls."""
        return RunFolder(self.run).scores / "scores.json"

    @property
    def report(self) -> Path:
        """The page with pictures."""
        return RunFolder(self.run).scores / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return {"run": str(self.run), "records": [dict(record) for record in self.records], "notes": self.notes}

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one row per metric.

        Its columns are dataset, task, protocol, items, metric, label, value, chance, low and high (the 95 % interval),
        and unit.

        Raises:
            UserError: pandas is not installed.
        """
        module = import_extra("pandas", "to_pandas needs pandas. Run pip install pandas.")
        rows = []
        for record in self.scored:
            about = {"dataset": record["dataset"], "task": record["task"], "protocol": record["protocol"]}
            for metric in record["metrics"]:
                low, high = metric.get("interval") or (None, None)
                rows.append(
                    {**about, "items": record["items"], "metric": metric["name"], "label": metric["label"]}
                    | {"value": metric["value"], "chance": metric["chance"], "low": low, "high": high}
                    | {"unit": metric["unit"]}
                )
        frame: pandas.DataFrame = module.DataFrame(rows)
        return frame

    def __repr__(self) -> str:
        from sail_align.evaluate.report.formats import score_table

        return score_table(self.records) if self.records else f"Scores: nothing was scored with {self.run}"

    def _repr_html_(self) -> str:
        cells = []
        for record in self.records:
            if record.error:
                cells.append((record.name, "", "error", record.error, "", ""))
            for metric in record.get("metrics", ()):
                value, chance = number(metric["value"]), number(metric["chance"])
                interval = format_interval(metric.get("interval"), metric["value"])
                cells.append((record.name, str(record["items"]), metric["label"], value, chance, interval))
        return html_table(("set", "n", "metric", "score", "chance", "95 % interval"), cells)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; all text is escaped."""

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(one_line(text))}</{tag}>" for text in texts) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def score(
    run: PathLike | None = None,
    sets: PathLike | Sequence[PathLike] | None = None,
    *,
    task: str | None = None,
    protocol: str | None = None,
    views: str | None = None,
    checkpoint: str | None = None,
    model: str | None = None,
    manifest: PathLike | Sequence[PathLike] | None = None,
    data_root: PathLike | None = None,
    features_dir: PathLike = "features",
    device: str = "auto",
    allow_remote_code: str | Sequence[str] = (),
    quiet: bool = False,
) -> Scores:
    """Score a run on evaluation sets, as `sail-eval` does. Scores and a report are also written into the run.

    Args:
        run: A run, one of its checkpoints, an exported folder, or the result of `fit`. Default: the newest in runs/.
        sets: Sets to score on: names of packaged ones such as "demo-retrieval", or paths of manifests (docs/data.md).
            Default: all packaged sets whose data are here, as with `sail-eval all`.
        task: Kind of task, such as "retrieval". Default: that of each set.
        protocol: Another protocol of the task than the set's.
        views: Average the embeddings of each image over views of it: "flip", "3-crop", "5-crop" or "10-crop". A
            protocol of its own. By default, sets without embeddings of images are left out.
        checkpoint: "best" for the weights with the best scores on held-out pairs, the default, or "last" for those
            after the last step. Without held-out pairs, both are the last.
        model: Instead of a run: a model of OpenCLIP to compare with, `open_clip:NAME@WEIGHTS`.
        manifest: Sets of your own to add to the packaged ones, if `sets` is not given.
        data_root: Folder of the sets' files. Default: $SAIL_DATA_ROOT, else data/ or the manifest's folder.
        features_dir: Folder of stores. Those of evaluation sets are in its eval/.
        device: cpu, cuda, cuda:1 …; auto uses a GPU if there is one.
        allow_remote_code: Repositories of the run's encoders that may run their own code, each as
            "owner/name@revision" with a full commit hash.
        quiet: Print nothing, and show no progress bars.

    Returns:
        The scores, each with its chance level and 95 % interval.

    Raises:
        UserError: An argument or a set is invalid, the run is damaged, or a set named in `sets` cannot be scored. By
            default, errors of sets are in the result.
    """
    job = prepare(
        None if run is None else one_path(run, "run"),
        None if sets is None else _references(sets, "sets"),
        task=task,
        protocol=protocol,
        views=views,
        checkpoint=checkpoint,
        model=model,
        manifest=_references(manifest, "manifest") if manifest else (),
        data_root=None if data_root is None else os.fspath(data_root),
        features_dir=one_path(features_dir, "features_dir"),
        device=device,
        allow_remote_code=allow_remote_code,
        quiet=quiet,
    )
    scores = Scores(job.run.path, notes=[in_python(line, ("manifest", "sets", "checkpoint")) for line in job.notes])
    if not quiet:
        for line in (*scores.notes, job.describe()):
            note(line)
    job.fill(scores)
    return scores


def _references(value: PathLike | Sequence[PathLike], name: str) -> list[str]:
    return [str(path) for path in as_paths(value, name)]


@dataclass(frozen=True)
class ScoringJob:
    """A run and the sets to score it on, checked.

    Attributes:
        run: What is scored.
        is_newest: Whether it is the default.
        sets: The sets.
        notes: Messages about sets that are left out.
        features_dir: Folder of stores.
        device: Device.
        allow_remote_code: Repositories that may run their own code.
        quiet: Show no progress bars.
        stop_at_fault: Raise an error of a set. Otherwise it is the set's record.
    """

    run: "Run"
    is_newest: bool
    sets: Sets
    notes: list[str]
    features_dir: Path
    device: str
    allow_remote_code: tuple[str, ...]
    quiet: bool
    stop_at_fault: bool

    def describe(self) -> str:
        """Return what will be scored on which sets."""
        if not self.sets:
            return NOTHING
        newest = " (the newest run)" if self.is_newest else ""
        progress = f", {unfinished(self.run)}" if unfinished(self.run) else ""
        names = dict.fromkeys(about.name for about, _ in self.sets)
        return f"scoring {self.run.path}{newest}{progress} on {', '.join(names)}"

    def fill(self, scores: Scores) -> None:
        """Score the sets one after the other, add their records, and write the report, even after an error.

        Raises:
            UserError: A set cannot be scored, and `stop_at_fault` is set.
        """
        if not self.sets:
            return

        from sail_align.evaluate.evaluator import evaluate_sets
        from sail_align.evaluate.report.page import write_report

        scored = evaluate_sets(
            self.run,
            self.sets,
            features=self.features_dir,
            device=self.device,
            allow_remote_code=self.allow_remote_code,
            quiet=self.quiet,
            stop_at_fault=self.stop_at_fault,
        )
        try:
            scores.records.extend(scored)
        finally:
            if scores.records:
                write_report(self.run.path)


def prepare(
    run: Path | None,
    sets: Sequence[str] | None,
    *,
    task: str | None = None,
    protocol: str | None = None,
    views: str | None = None,
    checkpoint: str | None = None,
    model: str | None = None,
    manifest: Sequence[str] = (),
    data_root: str | None = None,
    features_dir: Path = Path("features"),
    device: str = "auto",
    allow_remote_code: str | Sequence[str] = (),
    quiet: bool = False,
) -> ScoringJob:
    """Check the arguments of `score`, and load what is scored. Raises `UserError` as it does."""
    if sets is not None and manifest:
        raise UserError("--manifest adds to the packaged sets. Leave it out if you name sets.")
    chosen = find_task(task) if task else None
    if sets is None and (task or protocol):
        raise UserError(f"{'task' if task else 'protocol'} needs sets. Name those to score on.")
    found = find_sets(manifest if sets is None else sets, data_root, chosen)
    if protocol:
        found = [(find_task(about.task.kind).variant(about, protocol), root) for about, root in found if about.task]
    is_newest = not (run or model)
    if checkpoint:
        run = _choose_checkpoint(run, checkpoint, model)
    scored = load_scored(run, model, device)
    notes: list[str] = []
    if sets is None:
        found, notes = _sets_here(scored, found, data_root)
    if views:
        found, left_out = _with_views(found, views, is_chosen=sets is not None)
        notes += left_out
    if checkpoint is None:
        notes += _note_best(scored.path)
    code = (allow_remote_code,) if isinstance(allow_remote_code, str) else tuple(allow_remote_code)
    return ScoringJob(
        scored, is_newest, found, notes, features_dir, device, code, quiet, stop_at_fault=sets is not None
    )


def _with_views(found: Sets, views: str, *, is_chosen: bool) -> tuple[Sets, list[str]]:
    """Return sets under their protocols with views. Those without are left out with a note, or refused if chosen."""
    kept, left_out = [], []
    for about, root in found:
        task = find_task(about.require_task().kind)
        if is_chosen or task.takes_views:
            kept.append((task.with_views(about, views), root))
        else:
            left_out.append(f"{about.name} ({task.kind})")
    return kept, [f"skipped: {', '.join(left_out)}. They have no use for --views."] if left_out else []


def _choose_checkpoint(run: Path | None, checkpoint: str, model: str | None) -> Path:
    """Return the folder to score: that of the run, whose best checkpoint is meant, or of its last checkpoint.

    Raises:
        UserError: The choice is invalid or not there.
    """
    if model and checkpoint in ("best", "last"):
        raise UserError(f"--checkpoint {checkpoint} has no effect with --model. Leave one of them out.")

    from sail_align.align.runs.checkpoint import checkpoint_path

    return checkpoint_path(run or RunFolder.newest(), checkpoint)


def _note_best(path: Path) -> list[str]:
    """Return a note if the weights that a run stands for are not its last ones."""
    if not RunFolder(path).is_run or not RunFolder(path).checkpoints("best"):
        return []

    from sail_align.align.runs.checkpoint import Checkpoint

    best, last = Checkpoint.best(path), RunFolder(path).last
    if best is None or last is None or best.folder == last:
        return []
    recall = f", mean R@1 {best.scores['r1']:.1f}" if "r1" in best.scores else ""
    return [
        f"scoring step {best.step:,}, the best on held-out pairs{recall}. Pass --checkpoint last to score step "
        f"{RunFolder(last).step:,}."
    ]


def _sets_here(run: "Run", own: Sets, data_root: str | None) -> tuple[Sets, list[str]]:
    """Return all packaged sets whose data are here and one's own, under each task that scores them; and notes."""
    from sail_align.evaluate.models import trained_on_demo

    packaged = [manifests.find_manifest(name, data_root) for name in manifests.packaged_manifests()]
    packaged = [(about, root) for about, root in packaged if about.task]
    here = [(about, root) for about, root in packaged if about.is_here(root)]
    demo = [about.name for about, _ in here if isinstance(about.source, DemoConfig) and not trained_on_demo(run)]
    sets = [(about, root) for about, root in here if about.name not in demo] + own
    notes = []
    if missing := len(packaged) - len(here):
        notes.append(f"{missing} published sets are not here; `sail-extract check` lists them.")
    if demo:
        notes.append(
            f"skipped: {', '.join(demo)}. They are drawings, and this run does not seem to be trained on the demo. "
            "To score one anyway, name it, as in: sail-eval retrieval demo-retrieval"
        )
    for task in all_tasks().values():
        sets += [
            (about.scored_as(task.kind), root)
            for about, root in sets
            if about.task and about.task.kind in task.also_scores
        ]
    return sets, notes


def find_sets(references: Sequence[str], data_root: str | None, task: EvaluationTask | None = None) -> Sets:
    """Return manifests with their data roots.

    Raises:
        UserError: A manifest is invalid, is for another task, or its data are missing.
    """
    sets = []
    for reference in references:
        about, root = manifests.find_manifest(reference, data_root)
        kind = about.require_task().kind
        if task and kind in task.also_scores:
            kind, about = task.kind, about.scored_as(task.kind)
        find_task(kind).check_manifest(about)
        if task and kind != task.kind:
            raise UserError(f"Manifest {about.name!r} is for {kind}. Use `sail-eval {kind}`.")
        about.require_here(root, reference)
        sets.append((about, root))
    return sets


def load_scored(run: Path | None, model: str | None, device: str) -> "Run":
    """Load what is scored: a run, one of its checkpoints, an exported folder, or a model. Default: the newest run.

    Raises:
        UserError: Both are given, or what is given is none of these or is damaged.
    """
    if run and model:
        raise UserError(f"--run {run} and --model {model} exclude each other. Remove one.")
    if model:
        from sail_align.evaluate.models import load_open_clip

        return load_open_clip(model, device)
    if run and not RunFolder(run).is_export:
        RunFolder(run).require()  # before torch is imported
        if not RunFolder(run).run.is_run:
            raise UserError(f"{run} is a checkpoint outside its run. Move it back into that run's checkpoints/.")

    from sail_align.align.hub.folder import read_hub_folder
    from sail_align.align.runs.checkpoint import load_run
    from sail_align.extract.encoders.identity import require_known

    scored = read_hub_folder(run) if run and RunFolder(run).is_export else load_run(run or RunFolder.newest())
    require_known(scored.image, scored.text)
    return scored
