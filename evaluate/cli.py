"""sail-eval: score a run zero-shot, with chance and a 95 % interval beside every number.

Evaluation sets are encoded once, with the run's own encoders, into features/eval/; scores go to RUN/scores.json, a page
with pictures to RUN/report.html; those of a named checkpoint to RUN/scores/, those of an exported folder to runs/.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.extract.errors import UserError, run_command
from sail_align.extract.system.memory import wait_without_spinning

if TYPE_CHECKING:
    from sail_align.align.runs.checkpoint import Run
    from sail_align.extract.manifest import Manifest
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sail_align.align.runs.folder import is_export, is_run, require_run, run_of

if TYPE_CHECKING:
    from sail_align.align.runs.checkpoint import Run

ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def clip_benchmark(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, an exported folder, or <owner>/<name>.", show_default=False)
    ],
) -> None:
    """Score a run with LAION's clip-benchmark. What follows RUN goes to `clip_benchmark eval` as it is."""
    _require_tars(context.args)

    from sail_align.evaluate.clip_benchmark import evaluate

    evaluate(model, context.args)


def _require_tars(arguments: Sequence[str]) -> None:
    """Refuse a folder of tars that is not there; folders of its other sets clip-benchmark makes itself.

    Raises:
        UserError: There is no such folder.
    """
    given = dict(pairwise(arguments))
    root = given.get("--dataset_root", "")
    of_tars = given.get("--dataset", "").startswith("wds/") and root and "://" not in root and "{" not in root
    if of_tars and not Path(root).is_dir():
        raise UserError(f"--dataset_root {root} is not there; name the folder of the set's tars.")


def chosen(run: Path | None, model: str | None, device: str) -> "Run":
    """Return what is to be scored: a run, one of its checkpoints, an export, or a model; by default the newest run.

    Raises:
        UserError: It is none of these, not one of them alone, or damaged.
    """
    if run and model:
        raise UserError(f"--run {run} and --model {model} are two things to score; leave one out.")
    if model:
        from sail_align.evaluate.models import comparison

        return comparison(model, device=device)
    if run and is_export(run):
        from sail_align.align.hub.folder import read_hub_folder

        return read_hub_folder(run)
    if run:
        require_run(run)
        if not is_run(run_of(run)):
            raise UserError(f"{run} is a checkpoint away from its run; put it back into that run's checkpoints/.")
    from sail_align.align.runs.checkpoint import load_run, newest_run

    return load_run(run or newest_run())


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

TASKS = {
    "classification": "Zero-shot classification. Top-1, top-5, mean per class.",
    "retrieval": "Retrieval between images and captions. Recall@1, 5 and 10 and ranks, both ways.",
    "representation": "Mutual k-NN and CKA of a retrieval set, before and behind the heads.",
    "winoground": "Pairs of images and captions. Text, image and group score.",
    "mmvp": "Pairs of images that look alike to CLIP. Share of pairs told apart.",
    "segmentation": "Zero-shot segmentation by patches. mIoU and pixel accuracy.",
}

VARIANTS = {
    "classification": ("openai-80", "openai-7", "class-name"),
    "segmentation": ("whole-image", "maskclip", "authors-normalisation"),
}
"""The protocols that `--protocol` knows, by task kind; what they are stands with the tasks."""

ENDINGS = (".html", ".md", ".tex", ".csv")
"""Of the files that `report --out` writes."""

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
        help="In place of a run: a model of OpenCLIP, SigLIP's among them, to compare with.",
    ),
]
DataRoot = Annotated[
    str | None,
    typer.Option(help="Where the manifests' files are.  [default: $SAIL_DATA_ROOT, else data/ or the .yaml's folder]"),
]
FeaturesDir = Annotated[Path, typer.Option(help="Folder of stores; the evaluation sets' go into its eval/.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


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
    """Score a run on all sets that are here. Those are the packaged ones with data, and what --manifest adds."""
    own = _required(manifest or [], data_root, kind=None)
    scored = chosen(run, model, device)

    from sail_align.evaluate.models import saw_the_demo
    from sail_align.extract.check import is_here
    from sail_align.extract.manifest import find_manifest, packaged_manifests
    from sail_align.extract.schema import DemoSource

    sets, missing, drawings = [], [], []
    for name in packaged_manifests():
        about, root = find_manifest(name, data_root)
        if about.task is None:
            continue
        if not is_here(about, root):
            missing.append(name)
        elif isinstance(about.source, DemoSource) and not saw_the_demo(scored):
            drawings.append(name)
        else:
            sets.append((about, root))
    if missing:
        typer.echo("not here; each command says what it is and how to get it:")
        for name in missing:
            typer.echo(f"  sail-extract check {name}")
    if drawings:
        typer.echo(
            f"left out: {', '.join(drawings)}. They are drawings, and nothing says that this run was trained on them; "
            "to score one all the same, name it, as in: sail-eval retrieval demo-retrieval"
        )
    if not sets + own:
        typer.echo("nothing to score: get one of these, or describe pictures of yours (docs/data.md) for --manifest.")
        return
    picked = _with_representation(sets + own)
    _evaluate(scored, not (run or model), picked, features_dir, device, quiet, stop_at_fault=False)


def _register(kind: str, summary: str) -> Callable[..., None]:
    """Add the command of one task kind."""

    @app.command(kind, help=summary)
    def evaluate_kind(
        manifests: Annotated[
            list[str], typer.Argument(metavar="MANIFEST", help="Packaged names or .yaml files.", show_default=False)
        ],
        run: RunPath = None,
        model: ModelName = None,
        data_root: DataRoot = None,
        features_dir: FeaturesDir = Path("features"),
        device: Device = "auto",
        quiet: Quiet = False,
        protocol: Annotated[
            str | None,
            typer.Option(
                help=f"Another than the manifest's: {', '.join(VARIANTS.get(kind, ()))}.", hidden=kind not in VARIANTS
            ),
        ] = None,
    ) -> None:
        sets = _required(manifests, data_root, kind)
        if protocol and protocol not in (known := VARIANTS.get(kind, ())):
            there = ", ".join(known) or "none"
            raise UserError(f"{sets[0][0].name} has no protocol {protocol!r} to be scored by; there are: {there}.")
        if protocol:
            from sail_align.evaluate.tasks import PROTOCOLS

            sets = [(PROTOCOLS[about.task.kind].variant(about, protocol), root) for about, root in sets if about.task]
        _evaluate(chosen(run, model, device), not (run or model), sets, features_dir, device, quiet, stop_at_fault=True)

    return evaluate_kind


for _kind, _summary in TASKS.items():
    _register(_kind, _summary)


app.command("clip-benchmark", context_settings=ANY_OPTION)(clip_benchmark)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Runs, or checkpoints of them, with scores.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write all runs into one file, by its ending: .html, .md, .tex, .csv.  [default: RUN/report.html]"
        ),
    ] = None,
) -> None:
    """Show runs side by side, and what the paper reports of the same protocols, from what evaluation left.

    A table's columns are of one protocol and one set of data each; what differs gets a column of its own.
    """
    if out and out.suffix not in ENDINGS:
        raise UserError(f"No report has the ending {out.suffix!r}; name a file that ends in {', '.join(ENDINGS)}.")

    from sail_align.evaluate.report.formats import score_table, text
    from sail_align.evaluate.report.overview import overview, read_runs
    from sail_align.evaluate.report.page import side_by_side, write_report
    from sail_align.extract.system.files import report_write_errors, write_atomically

    scored = read_runs(runs)
    if out:
        content = side_by_side(scored, out.suffix)
        with report_write_errors(out):
            write_atomically(out, content.encode())
        typer.echo(f"wrote {out}")
        return
    shown = overview(scored)
    if len(scored) == 1:
        typer.echo(score_table(scored[0].scores["records"]))
    if len(scored) > 1 or shown.with_reported:
        typer.echo(text(shown))
    for run in scored:
        typer.echo(f"wrote {write_report(run.path)}")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_A RUN_B…", help="Runs, or checkpoints of them, with scores.", show_default=False),
    ],
) -> None:
    """Compare runs with the first, item by item, where set and protocol are the same.

    Differences come with a 95 % paired bootstrap interval: both runs on the same draws of images or pairs. p is twice
    the smaller share of draws on either side of no difference.
    """
    from sail_align.evaluate.compare import compare_runs
    from sail_align.evaluate.report.formats import difference_table
    from sail_align.evaluate.results.scores import named, read_scores

    if len(runs) < 2:
        raise UserError(f"One run cannot be compared; name another beside {runs[0]}.")
    for comparison in compare_runs(runs):
        first, second = (named(str(run), read_scores(run)) for run in (runs[0], comparison.run))
        typer.echo(f"first: {first}, second: {second}\n{difference_table(comparison)}")


def _evaluate(
    run: "Run",
    newest: bool,
    sets: list[tuple["Manifest", Path]],
    features_dir: Path,
    device: str,
    quiet: bool,
    *,
    stop_at_fault: bool,
) -> None:
    """Score the sets, print the table, write the report, also of those before a fault; exit 1 if a set failed."""
    from sail_align.evaluate.evaluator import evaluate_sets
    from sail_align.evaluate.report.formats import score_table, text
    from sail_align.evaluate.report.overview import overview, read_runs
    from sail_align.evaluate.report.page import write_report
    from sail_align.evaluate.results.scores import Record, failed, scores_path, unfinished

    facts = [" (the newest run)" if newest else "", f", {unfinished(run)}" if unfinished(run) else ""]
    typer.echo(f"scoring {run.path}{''.join(facts)} on {', '.join(dict.fromkeys(about.name for about, _ in sets))}")
    scored = evaluate_sets(run, sets, features=features_dir, device=device, quiet=quiet, stop_at_fault=stop_at_fault)
    records: list[Record] = []
    try:
        records.extend(scored)
    finally:
        if records:
            typer.echo(score_table(records))
            if (shown := overview(read_runs([run.path]))).with_reported:
                typer.echo(f"\n{text(shown)}")
            typer.echo(f"wrote {scores_path(run.path)} and {write_report(run.path)}")
    if failed(records):
        raise typer.Exit(1)


def _with_representation(sets: list[tuple["Manifest", Path]]) -> list[tuple["Manifest", Path]]:
    """Return the sets, and each of retrieval a second time as one of representation."""
    retrieval = [(about, root) for about, root in sets if about.task and about.task.kind == "retrieval"]
    return sets + [(about.scored_as("representation"), root) for about, root in retrieval]


def _required(references: list[str], data_root: str | None, kind: str | None) -> list[tuple["Manifest", Path]]:
    """Return the manifests that were asked for, each with its data root; refuse those that cannot be scored."""
    from sail_align.extract.check import is_here
    from sail_align.extract.manifest import find_manifest

    found = [find_manifest(reference, data_root) for reference in references]
    if kind == "representation":
        found = [
            (about.scored_as("representation") if about.task and about.task.kind == "retrieval" else about, root)
            for about, root in found
        ]
    for reference, (about, root) in zip(references, found, strict=True):
        if about.task is None:
            raise UserError(f"Manifest {about.name!r} is for training; give one with purpose 'evaluate'.")
        if kind not in (None, about.task.kind):
            raise UserError(f"Manifest {about.name!r} is for {about.task.kind}; use `sail-eval {about.task.kind}`.")
        if not is_here(about, root):
            how = f"`sail-extract check {reference}` says how to get them."
            raise UserError(f"The data of {about.name!r} are not under {root}; {how}")
    return found


def main() -> None:
    """Entry point."""
    wait_without_spinning()
    run_command(app)
