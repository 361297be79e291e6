"""sail-align ladder and probe: their options, and what they print."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.settings import COMPARED_HELD_OUT, check_options
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import as_path, report_write_errors, require_store, write_atomically

Features = Annotated[
    list[Path],
    typer.Option(
        metavar="STORE", help="A feature store; may be given several times.", show_default=False, parser=as_path
    ),
]
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Runs of each.")]
Rate = Annotated[float | None, typer.Option(help="Highest rate, of a cosine.  [default: 1e-5; few pairs: 3e-4]")]
WeightDecay = Annotated[float | None, typer.Option(help="[default: 1e-7]")]
BatchSize = Annotated[int | None, typer.Option(help="[default: the paper's; few pairs: 256]")]
Epochs = Annotated[float | None, typer.Option(help="[default: 50; few pairs: 20]")]
Steps = Annotated[int | None, typer.Option(help="In place of epochs.")]
Optimizer = Annotated[str | None, typer.Option(help="lion or adamw.  [default: lion]")]
Dim = Annotated[int | None, typer.Option(help="Of the shared space.  [default: 1024]")]
HeldOut = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the pairs to score on; at least 100 (a fifth of few), at most 5,000.  [default: 0.2]"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def ladder(
    features: Features,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For runs and results.  [default: runs/<store>-ladder]")
    ] = None,
    raw: Annotated[str, typer.Option(metavar="CAPTION", help="Which of the captions are the short ones.")] = "raw",
    long: Annotated[
        str | None, typer.Option(metavar="CAPTION", help="Which are the long ones.  [default: long, if there are any]")
    ] = None,
    seeds: Seeds = 3,
    lr: Rate = None,
    weight_decay: WeightDecay = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    steps: Steps = None,
    optimizer: Optimizer = None,
    dim: Dim = None,
    held_out: HeldOut = None,
    image_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train the paper's ablation on stores: heads, losses, captions; a table and a plot. Goes on after a stop."""
    given = _given(
        features,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        optimizer=optimizer,
        dim=dim,
        held_out=held_out,
    )

    from sail_align.align.analysis.ablation import LONG, RAW, run_ladder
    from sail_align.align.runs.claim import default_path
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.store.store import Store

    folder = out or default_path(features, "ladder")
    kinds = {RAW: raw}
    if long or Store.open(features[0]).texts(LONG):
        kinds[LONG] = long or LONG
    else:
        typer.echo(f"note: {features[0]} has no long captions: the rungs with them are left out (--long names others).")
    with _stoppable(folder):
        result = run_ladder(
            features,
            folder / "runs",
            given,
            kinds=kinds,
            seeds=seeds,
            device=Runtime.of(device, "float32").device,
            echo=typer.echo,
            quiet=quiet,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
        )
    typer.echo(f"\n{result.table()}\n\n{result.explanation()}")
    contents = {
        "ladder.md": f"{result.table()}\n\n{result.explanation()}\n",
        "ladder.json": json.dumps(result.record(), indent=1, ensure_ascii=False),
        "ladder.svg": result.chart(),
    }
    with report_write_errors(folder):
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    typer.echo(f"wrote {', '.join(str(folder / name) for name in contents)}")


def probe(
    features: Features,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For runs and results.  [default: runs/<store>-probe]")
    ] = None,
    image_encoder: Annotated[
        list[str] | None, typer.Option(help="May be given several times.  [default: all in the store]")
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="May be given several times.  [default: all in the store]")
    ] = None,
    captions: Annotated[str | None, typer.Option(help="As in raw,long, each by itself.  [default: all]")] = None,
    seeds: Seeds = 1,
    lr: Rate = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    steps: Steps = None,
    dim: Dim = None,
    held_out: HeldOut = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train linear heads for every image encoder, text encoder and caption; rank them. Goes on after a stop."""
    given = _given(features, lr=lr, batch_size=batch_size, epochs=epochs, steps=steps, dim=dim, held_out=held_out)

    from sail_align.align.analysis.probe import Combination, run_probe
    from sail_align.align.runs.claim import default_path
    from sail_align.extract.encoders.runtime import Runtime

    folder = out or default_path(features, "probe")
    names = [name.strip() for name in captions.split(",")] if captions else []
    asked = Combination.select(features, image_encoder or [], text_encoder or [], names)
    where = Runtime.of(device, "float32").device
    with _stoppable(folder):
        result = run_probe(asked, folder / "runs", given, seeds=seeds, device=where, echo=typer.echo, quiet=quiet)
    typer.echo(
        f"\n{result.table()}\n\nR@1 in % of linear heads on held-out pairs, ranked by the mean of both ways; "
        "± is over the seeds, the interval over the pairs: encoders whose intervals overlap widely are not told apart."
    )
    content = json.dumps(result.record(), indent=1, ensure_ascii=False)
    with report_write_errors(folder):
        write_atomically(folder / "probe.json", content.encode())
    typer.echo(f"wrote {folder / 'probe.json'}")


def _given(stores: Sequence[Path], **options: Any) -> dict[str, Any]:
    """Return the options that were given; they and the stores are checked before torch is loaded."""
    given = {name: value for name, value in options.items() if value is not None}
    check_options(given)
    if given.get("held_out") == 0:
        raise UserError("--held-out 0 leaves nothing to score on; give a fraction above 0.")
    for store in stores:
        require_store(store)
    return given


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Say how to go on when a signal ends the work, and when the disk is full."""
    from sail_align.extract.system.progress import note
    from sail_align.extract.system.signals import StoppedError, raise_on_signals

    try:
        with raise_on_signals(), report_write_errors(folder, during_run=True):
            yield
    except StoppedError as stopped:
        note(f"Stopped by {stopped.name}; the same command goes on with the runs under {folder}.")
        raise


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

    from sail_align.align.analysis.measure import measure_store
    from sail_align.extract.store.store import Store

    opened = Store.open(store)
    result = measure_store(opened, rows=rows, neighbours=neighbours, held_out=held_out, seed=seed)
    typer.echo(result.table())
    drawn, count = result.pairs[0].drawn, result.pairs[0].held_out
    typer.echo(
        f"{drawn:,} of {opened.rows:,} rows, seed {seed}. Mutual k-NN: share of the {neighbours} "
        "nearest rows that image and text have in common. CKA: linear, unbiased HSIC; 0 is chance. Both by cosine. "
        f"CCA: closed form of the others, R@1 in % on {count:,} held-out pairs, with a 95 % bootstrap interval."
    )
    if out:
        content = result.record()
        with report_write_errors(out):
            write_atomically(out, json.dumps(content, indent=1, ensure_ascii=False).encode())
        typer.echo(f"wrote {out}")
    typer.echo(f"Next: sail-align fit --features {store}")
