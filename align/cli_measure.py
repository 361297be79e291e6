"""sail-align measure: its options, and what it prints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.settings import COMPARED_HELD_OUT
from sail_align.extract.errors import UserError
from sail_align.extract.files import as_path, require_store, write_atomically


def measure(
    store: Annotated[
        Path | None, typer.Argument(metavar="STORE", help="A feature store.", show_default=False, parser=as_path)
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="The same, as the other commands take it.", parser=as_path),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(min=100, max=100_000, help="Rows to look at, about: they are drawn in whole stretches of 256."),
    ] = 8_192,
    neighbours: Annotated[int, typer.Option(min=1, max=1_000, help="k of the mutual k-NN.")] = 10,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Fraction of the rows to score the closed form on.")
    ] = COMPARED_HELD_OUT,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers as JSON too.")] = None,
) -> None:
    """Say how alike image and text features are before any training: mutual k-NN, CKA, recall of the closed form."""
    if out and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file.")
    if store and features:
        raise UserError(f"{store} and --features {features} are two stores; give one.")
    if (store := store or features) is None:
        raise UserError("There is no store to measure; name one, as in: sail-align measure features/demo.zarr.")
    require_store(store)

    from sail_align.align import measure as measuring
    from sail_align.extract.store import Store

    opened = Store.open(store)
    asked: dict[str, Any] = {"neighbours": neighbours, "held_out": held_out, "seed": seed}
    measures = list(measuring.measure(opened, rows=rows, **asked))
    typer.echo(measuring.table(measures))
    drawn, count = measures[0].drawn, measures[0].held_out
    typer.echo(
        f"{drawn:,} of {opened.rows:,} rows, seed {seed}. Mutual k-NN: share of the {neighbours} "
        "nearest rows that image and text have in common. CKA: linear, unbiased HSIC; 0 is chance. Both by cosine. "
        f"CCA: closed form of the others, R@1 in % on {count:,} held-out pairs, with a 95 % bootstrap interval."
    )
    if out:
        content = measuring.report(opened, measures, rows=drawn, **asked)
        try:
            write_atomically(out, json.dumps(content, indent=1, ensure_ascii=False).encode())
        except OSError as problem:
            raise UserError(f"{out} cannot be written ({problem.strerror}); name another --out.") from problem
        typer.echo(f"wrote {out}")
    typer.echo(f"Next: sail-align fit --features {store}")
