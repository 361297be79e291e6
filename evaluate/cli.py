"""sail-eval: score a run zero-shot, with chance and a 95 % interval beside every number.

Evaluation sets are encoded once, with the run's own encoders, into features/eval/. Scores go to RUN/scores.json, a page
with pictures to RUN/report.html. Those of a named checkpoint go to RUN/scores/, those of an exported folder to runs/.
"""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.align.runs.folder import RunFolder
from sail_align.evaluate.tasks.task import EvaluationTask, all_tasks, find_task
from sail_align.extract.errors import UserError, printable
from sail_align.extract.system.command_line import DataRoot, Device, Quiet, run_command

if TYPE_CHECKING:
    from sail_align.align.runs.checkpoint import Run
    from sail_align.extract.manifest import Manifest

Sets = list[tuple["Manifest", Path]]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="A run of sail-align, RUN/checkpoints/STEP, or an exported folder.  [default: the newest in runs/]",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="open_clip:NAME@WEIGHTS",
        help="Instead of a run: a model of OpenCLIP, such as SigLIP, to compare with.",
    ),
]
FeaturesDir = Annotated[Path, typer.Option(help="Folder of stores. Those of evaluation sets are in its eval/.")]
ScoredRuns = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Runs, or checkpoints of them, with scores.", show_default=False)
]


@app.command("all")
def evaluate_all(
    run: RunPath = None,
    model: ModelName = None,
    manifest: Annotated[
        list[str] | None, typer.Option(help="An evaluation set of your own, a .yaml file; repeatable.")
    ] = None,
    data_root: DataRoot = None,
    features_dir: FeaturesDir = Path("features"),
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Score a run on all packaged sets whose data are here, and on those of --manifest."""
    own = _find_sets(manifest or [], data_root)
    scored = load_scored(run, model, device)

    from sail_align.evaluate.models import trained_on_demo
    from sail_align.extract.manifest import find_manifest, packaged_manifests
    from sail_align.extract.sources.demo.source import DemoConfig

    packaged = [find_manifest(name, data_root) for name in packaged_manifests()]
    packaged = [(about, root) for about, root in packaged if about.task]
    here = [(about, root) for about, root in packaged if about.is_here(root)]
    demo = [about.name for about, _ in here if isinstance(about.source, DemoConfig) and not trained_on_demo(scored)]
    sets = [(about, root) for about, root in here if about.name not in demo] + own
    if missing := [about.name for about, root in packaged if (about, root) not in here]:
        typer.echo(f"not here: {', '.join(missing)}. `sail-extract check NAME` shows what a set is and how to get it.")
    if demo:
        typer.echo(
            f"skipped: {', '.join(demo)}. They are drawings, and this run does not seem to be trained on the demo. "
            "To score one anyway, name it, as in: sail-eval retrieval demo-retrieval"
        )
    if not sets:
        typer.echo("nothing to score: get one of these, or describe your own pictures (docs/data.md) for --manifest.")
        return
    for task in all_tasks().values():
        sets += [
            (about.scored_as(task.kind), root)
            for about, root in sets
            if about.task and about.task.kind in task.also_scores
        ]
    _evaluate(scored, not (run or model), sets, features_dir, device, quiet, stop_at_fault=False)


def _add_command(task: EvaluationTask) -> None:
    protocols = f"Another protocol than the manifest's: {', '.join(task.variants)}."

    @app.command(task.kind, help=task.summary)
    def evaluate_task(
        manifests: Annotated[
            list[str], typer.Argument(metavar="MANIFEST", help="Packaged names or .yaml files.", show_default=False)
        ],
        run: RunPath = None,
        model: ModelName = None,
        data_root: DataRoot = None,
        features_dir: FeaturesDir = Path("features"),
        device: Device = "auto",
        quiet: Quiet = False,
        protocol: Annotated[str | None, typer.Option(help=protocols, hidden=not task.variants)] = None,
    ) -> None:
        sets = _find_sets(manifests, data_root, task)
        if protocol:
            sets = [(task.variant(about, protocol), root) for about, root in sets]
        scored = load_scored(run, model, device)
        _evaluate(scored, not (run or model), sets, features_dir, device, quiet, stop_at_fault=True)


for _task in all_tasks().values():
    _add_command(_task)


@app.command("clip-benchmark", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def clip_benchmark(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, an exported folder, or <owner>/<name>.", show_default=False)
    ],
) -> None:
    """Score a run with LAION's clip-benchmark. All further options are passed to `clip_benchmark eval`."""
    options = dict(pairwise(context.args))
    root = options.get("--dataset_root", "")
    # clip-benchmark creates the folders of its other sets itself
    is_local_tars = options.get("--dataset", "").startswith("wds/") and root and "://" not in root and "{" not in root
    if is_local_tars and not Path(root).is_dir():
        raise UserError(f"--dataset_root {root} does not exist. Name the folder of the set's tars.")

    from sail_align.evaluate.clip_benchmark import evaluate

    evaluate(model, context.args)


@app.command()
def report(
    runs: ScoredRuns,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write all runs into one file: .html, .md, .tex or .csv.  [default: RUN/report.html of each run]"
        ),
    ] = None,
) -> None:
    """Show the scores of runs side by side, and those that papers report by the same protocols.

    Each column of a table has one protocol and one set of data. Scores by another protocol or on other data get their
    own column.
    """
    from sail_align.evaluate.report.formats import score_table, text
    from sail_align.evaluate.report.overview import Overview
    from sail_align.evaluate.report.page import FORMATS, write_report
    from sail_align.evaluate.results.scores import RunScores
    from sail_align.extract.system.files import report_write_errors, write_atomically

    if out and out.suffix not in FORMATS:
        raise UserError(f"--out {out} is invalid: expected a file that ends in {', '.join(FORMATS)}.")
    scored = RunScores.read_all(runs)
    overview = Overview(scored)
    if out:
        with report_write_errors(out):
            write_atomically(out, FORMATS[out.suffix](overview).encode())
        typer.echo(f"wrote {out}")
        return
    if len(scored) == 1:
        typer.echo(score_table(overview.runs[0].records))
    if len(scored) > 1 or overview.with_reported:
        typer.echo(text(overview))
    for run in scored:
        typer.echo(f"wrote {write_report(run.path)}")


@app.command()
def compare(runs: ScoredRuns) -> None:
    """Compare runs with the first, item by item, on sets and protocols that they share.

    Differences have a 95 % paired bootstrap interval: both runs on the same draws of images or pairs. p is twice the
    smaller share of draws on either side of no difference.
    """
    from sail_align.align.stats.tables import one_line
    from sail_align.evaluate.compare import Comparison
    from sail_align.evaluate.results.scores import RunScores

    if len(runs) < 2:
        raise UserError(f"One run cannot be compared: got only {runs[0]}. Name another one.")
    first, *others = (RunScores.read(run, str(run)) for run in runs)
    for other in others:
        table = Comparison.between(first, other).table()
        typer.echo(f"{one_line(f'first: {first.label}, second: {other.label}')}\n{table}")


@app.command("trace")
def trace_scores(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run, a checkpoint or an exported folder with scores.", show_default=False
        ),
    ],
    manifest: Annotated[
        list[str] | None, typer.Option(help="Manifest of training or evaluation data of your own; repeatable.")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Check the chain from scores back to data. Exits with 1 if a link has changed.

    Each line is one link: what is recorded, and what is there now. Files that were moved or removed are named as not
    here. Packaged manifests are known by name. Features of training stores are hashed by `sail-extract verify`.
    """
    from sail_align.evaluate.trace import State, describe_chain, trace
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    named = [find_manifest(name, data_root) for name in (*packaged_manifests(), *(manifest or []))]
    links = []
    for link in trace(run, {about.name: (about, root) for about, root in named}):
        links.append(link)
        typer.echo(printable(str(link)))
    typer.echo(describe_chain(links))
    if any(link.state is State.CHANGED for link in links):
        raise typer.Exit(1)


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
    if run and RunFolder(run).is_export:
        from sail_align.align.hub.folder import read_hub_folder

        return read_hub_folder(run)
    if run:
        RunFolder(run).require()  # before torch is imported
        if not RunFolder(run).run.is_run:
            raise UserError(f"{run} is a checkpoint outside its run. Move it back into that run's checkpoints/.")

    from sail_align.align.runs.checkpoint import load_run

    return load_run(run or RunFolder.newest())


def _evaluate(
    run: "Run", is_newest: bool, sets: Sets, features_dir: Path, device: str, quiet: bool, *, stop_at_fault: bool
) -> None:
    """Score the sets, print the table and write the report, even after an error. Exit with 1 if a set failed."""
    from sail_align.evaluate.evaluator import evaluate_sets
    from sail_align.evaluate.report.formats import score_table, text
    from sail_align.evaluate.report.overview import Overview
    from sail_align.evaluate.report.page import write_report
    from sail_align.evaluate.results.scores import Record, RunScores, unfinished

    newest = " (the newest run)" if is_newest else ""
    progress = f", {unfinished(run)}" if unfinished(run) else ""
    typer.echo(f"scoring {run.path}{newest}{progress} on {', '.join(dict.fromkeys(about.name for about, _ in sets))}")
    scored = evaluate_sets(run, sets, features=features_dir, device=device, quiet=quiet, stop_at_fault=stop_at_fault)
    records: list[Record] = []
    try:
        records.extend(scored)
    finally:
        if records:
            typer.echo(score_table(records))
            if (overview := Overview(RunScores.read_all([run.path]))).with_reported:
                typer.echo(f"\n{text(overview)}")
            typer.echo(f"wrote {RunFolder(run.path).scores / 'scores.json'} and {write_report(run.path)}")
    if any(record.error for record in records):
        raise typer.Exit(1)


def _find_sets(references: list[str], data_root: str | None, task: EvaluationTask | None = None) -> Sets:
    """Return manifests with their data roots.

    Raises:
        UserError: A manifest is invalid, is for another task, or its data are missing.
    """
    from sail_align.extract.manifest import find_manifest

    sets = []
    for reference in references:
        about, root = find_manifest(reference, data_root)
        if about.task is None:
            raise UserError(f"Manifest {about.name!r} is for training. Give one with purpose 'evaluate'.")
        kind = about.task.kind
        if task and kind in task.also_scores:
            kind, about = task.kind, about.scored_as(task.kind)
        find_task(kind).check_manifest(about)
        if task and kind != task.kind:
            raise UserError(f"Manifest {about.name!r} is for {kind}. Use `sail-eval {kind}`.")
        about.require_here(root, reference)
        sets.append((about, root))
    return sets


def main() -> None:
    """Entry point."""
    run_command(app)
