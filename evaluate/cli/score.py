"""sail-eval all and one command per task: score a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.align.runs.folder import RunFolder
from sail_align.evaluate.cli.options import FeaturesDir, ModelName, RunPath
from sail_align.evaluate.tasks.task import EvaluationTask, all_tasks, find_task
from sail_align.extract.errors import UserError
from sail_align.extract.system.command_line import DataRoot, Device, Quiet

if TYPE_CHECKING:
    from sail_align.align.runs.checkpoint import Run
    from sail_align.extract.manifest import Manifest

Sets = list[tuple["Manifest", Path]]


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


def task_command(task: EvaluationTask) -> Callable[..., None]:
    """Return the command of a task."""
    protocols = f"Another protocol than the manifest's: {', '.join(task.variants)}."

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

    return evaluate_task


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
