"""sail-eval all and one command per task: score a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.evaluate.cli.options import FeaturesDir, ModelName, RunPath
from sail_align.extract.system.command_line import DataRoot, Device, Quiet

if TYPE_CHECKING:
    from sail_align.evaluate.score import ScoringJob
    from sail_align.evaluate.tasks.task import EvaluationTask


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
    from sail_align.evaluate.score import prepare

    _evaluate(
        prepare(
            run,
            None,
            model=model,
            manifest=manifest or (),
            data_root=data_root,
            features_dir=features_dir,
            device=device,
            quiet=quiet,
        )
    )


def task_command(task: "EvaluationTask") -> Callable[..., None]:
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
        from sail_align.evaluate.score import prepare

        _evaluate(
            prepare(
                run,
                manifests,
                task=task.kind,
                protocol=protocol,
                model=model,
                data_root=data_root,
                features_dir=features_dir,
                device=device,
                quiet=quiet,
            )
        )

    return evaluate_task


def _evaluate(job: "ScoringJob") -> None:
    """Score the sets and print the table, even after an error. Exit with 1 if a set failed."""
    from sail_align.evaluate.report.formats import text
    from sail_align.evaluate.report.overview import Overview
    from sail_align.evaluate.results.scores import RunScores
    from sail_align.evaluate.score import Scores

    for line in (*job.notes, job.describe()):
        typer.echo(line)
    scores = Scores(job.run.path)
    try:
        job.fill(scores)
    finally:
        if scores.records:
            typer.echo(scores)
            if (overview := Overview(RunScores.read_all([scores.run]))).with_reported:
                typer.echo(f"\n{text(overview)}")
            typer.echo(f"wrote {scores.file} and {scores.report}")
    if scores.errors:
        raise typer.Exit(1)
