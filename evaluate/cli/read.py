"""sail-eval report, compare and trace: read the scores of runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sail_align.evaluate.cli.options import ScoredRuns
from sail_align.extract.errors import UserError, printable
from sail_align.extract.system.command_line import BadResult, DataRoot, Result, with_json


@with_json
def report(
    runs: ScoredRuns,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write all runs into one file: .html, .md, .tex or .csv.  [default: RUN/report.html of each run]"
        ),
    ] = None,
) -> Result:
    """Show scores of runs side by side, with those of papers.

    Papers' scores are shown where the protocol is the same. Each column of a table has one protocol and one set of
    data. Scores by another protocol or on other data get their own column.
    """
    from sail_align.evaluate.report.formats import score_lines, score_table, text
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
        return {"scores": list(score_lines(overview)), "wrote": [str(out)]}
    if len(scored) == 1:
        typer.echo(score_table(overview.runs[0].records))
    if len(scored) > 1 or overview.with_reported:
        typer.echo(text(overview))
    written = [write_report(run.path) for run in scored]
    for path in written:
        typer.echo(f"wrote {path}")
    return {"scores": list(score_lines(overview)), "wrote": list(map(str, written))}


@with_json
def compare(runs: ScoredRuns) -> Result:
    """Compare runs with the first, item by item, on shared sets.

    Differences have a 95 % paired bootstrap interval: both runs on the same draws of images or pairs. p is twice the
    smaller share of draws on either side of no difference.
    """
    from sail_align.align.stats.tables import one_line
    from sail_align.evaluate.compare import Comparison
    from sail_align.evaluate.results.scores import RunScores

    if len(runs) < 2:
        raise UserError(f"One run cannot be compared: got only {runs[0]}. Name another one.")
    first, *others = (RunScores.read(run, str(run)) for run in runs)
    comparisons = []
    for other in others:
        found = Comparison.between(first, other)
        typer.echo(f"{one_line(f'first: {first.label}, second: {other.label}')}\n{found.table()}")
        comparisons.append({"first": str(first.path), "second": str(other.path), **asdict(found)})
    return {"comparisons": comparisons}


@with_json
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
) -> Result:
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
    counts = {state.value: sum(link.state is state for link in links) for state in State}
    result = {"run": str(run), "links": links, "counts": counts}
    if counts[State.CHANGED.value]:
        raise BadResult(result)
    return result
