"""sail-eval all and one command per task: score a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.align.cli.options import WhichCheckpoint
from sail_align.evaluate.cli.options import VIEWS, VIEWS_HELP, AllowRemoteCode, FeaturesDir, ModelName, RunPath, Views
from sail_align.extract.system.command_line import BadResult, DataRoot, Device, Quiet, Result, with_json

if TYPE_CHECKING:
    from sail_align.evaluate.score import ScoringJob
    from sail_align.evaluate.tasks.task import EvaluationTask


@with_json
def evaluate_all(
    run: RunPath = None,
    checkpoint: WhichCheckpoint = None,
    model: ModelName = None,
    manifest: Annotated[
        list[str] | None, typer.Option(help="An evaluation set of your own, a .yaml file; repeatable.")
    ] = None,
    views: Views = None,
    data_root: DataRoot = None,
    features_dir: FeaturesDir = Path("features"),
    device: Device = "auto",
    allow_remote_code: AllowRemoteCode = None,
    quiet: Quiet = False,
) -> Result:
    """Score a run on all published sets that are here, and on your own."""
    from sail_align.evaluate.score import prepare

    return evaluate(
        prepare(
            run,
            None,
            views=views,
            checkpoint=checkpoint,
            model=model,
            manifest=manifest or (),
            data_root=data_root,
            features_dir=features_dir,
            device=device,
            allow_remote_code=allow_remote_code or (),
            quiet=quiet,
        )
    )


def task_command(task: "EvaluationTask") -> Callable[..., Result]:
    """Return the command of a task."""
    protocols = f"Another protocol than the manifest's: {', '.join(task.variants)}."

    @with_json
    def evaluate_task(
        manifests: Annotated[
            list[str], typer.Argument(metavar="MANIFEST", help="Packaged names or .yaml files.", show_default=False)
        ],
        run: RunPath = None,
        checkpoint: WhichCheckpoint = None,
        model: ModelName = None,
        data_root: DataRoot = None,
        features_dir: FeaturesDir = Path("features"),
        device: Device = "auto",
        allow_remote_code: AllowRemoteCode = None,
        quiet: Quiet = False,
        protocol: Annotated[str | None, typer.Option(help=protocols, hidden=not task.variants)] = None,
        views: Annotated[str | None, typer.Option(metavar=VIEWS, help=VIEWS_HELP, hidden=not task.takes_views)] = None,
    ) -> Result:
        from sail_align.evaluate.score import prepare

        return evaluate(
            prepare(
                run,
                manifests,
                task=task.kind,
                protocol=protocol,
                views=views,
                checkpoint=checkpoint,
                model=model,
                data_root=data_root,
                features_dir=features_dir,
                device=device,
                allow_remote_code=allow_remote_code or (),
                quiet=quiet,
            )
        )

    return evaluate_task


def evaluate(job: "ScoringJob") -> Result:
    """Score the sets and print the table, even after an error. Exit with 1 if a set failed."""
    from sail_align.evaluate.report.formats import text
    from sail_align.evaluate.report.overview import Overview
    from sail_align.evaluate.results.scores import RunScores
    from sail_align.evaluate.score import Scores

    for line in (*job.notes, job.describe()):
        typer.echo(line)
    scores = Scores(job.run.path, notes=job.notes)
    try:
        job.fill(scores)
    finally:
        if scores.records:
            typer.echo(scores)
            if (overview := Overview(RunScores.read_all([scores.run]))).with_reported:
                typer.echo(f"\n{text(overview)}")
            typer.echo(f"wrote {scores.file} and {scores.report}")
    result = {**scores.to_dict(), "report": scores.report if scores.records else None}
    if scores.errors:
        raise BadResult(result)
    return result
