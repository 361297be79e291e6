"""sail-eval clip-benchmark and mteb: score a run with the code of others."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.errors import UserError, printable
from sail_align.extract.system.command_line import BadResult, Device, Quiet, Result, with_json

Model = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, an exported folder, or <owner>/<name>.", show_default=False)
]


def clip_benchmark(context: typer.Context, model: Model) -> None:
    """Score a run with LAION's clip-benchmark. All further options are passed to `clip_benchmark eval`."""
    options = dict(pairwise(context.args))
    root = options.get("--dataset_root", "")
    # clip-benchmark creates the folders of its other sets itself
    is_local_tars = options.get("--dataset", "").startswith("wds/") and root and "://" not in root and "{" not in root
    if is_local_tars and not Path(root).is_dir():
        raise UserError(f"--dataset_root {root} does not exist. Name the folder of the set's tars.")

    from sail_align.evaluate.clip_benchmark import evaluate

    evaluate(model, context.args)


@with_json
def mteb(
    model: Model,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAME,…", help="Names of mteb's tasks, such as CIFAR10ZeroShot.")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="All tasks of a benchmark, such as 'MIEB(lite)'.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of mteb's result files.")] = Path("mteb"),
    device: Device = "auto",
    quiet: Quiet = False,
) -> Result:
    """Score a run with mteb, which includes the image benchmark MIEB. Finished tasks of the same run are kept.

    mteb downloads the data of its tasks from the Hugging Face hub.
    """
    names = [name.strip() for given in tasks or [] for name in given.split(",") if name.strip()]
    if not names and not benchmark:
        raise UserError("No task is given. Pass --tasks NAME,… or --benchmark NAME.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Name a folder.")

    from sail_align.align.pretrained import read
    from sail_align.align.stats.tables import format_table
    from sail_align.evaluate.mteb_model import MtebModel, evaluate, find_tasks

    read(model)  # before mteb, which takes seconds to import
    chosen = find_tasks(names, benchmark or [])
    results = evaluate(MtebModel(model, device=device), chosen, out, progress=not quiet)
    for name, problem in results.failures.items():
        typer.echo(printable(f"error: {name} failed: {problem}"), err=True)
    if results.scores:
        rows = [(name, metric, f"{value:.4f}") for name, metric, value in results.scores]
        typer.echo(format_table(("task", "main score", "value"), rows, "ll", style="simple"))
        typer.echo(f"wrote {results.folder}")
    scored = [{"task": name, "metric": metric, "value": value} for name, metric, value in results.scores]
    failures = {name: str(problem) for name, problem in results.failures.items()}
    result = {"folder": str(results.folder), "scores": scored, "failures": failures}
    if failures:
        raise BadResult(result)
    return result
