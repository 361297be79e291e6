"""sail-align ladder and probe: their options, and what they print."""

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.settings import check_options
from sail_align.extract.errors import UserError
from sail_align.extract.files import as_path, full_disk_is_said, require_store, write_atomically

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

    from sail_align.align.charts import standalone
    from sail_align.align.ladder import LONG, RAW, climb
    from sail_align.align.runs import default_path
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.store import Store

    folder = out or default_path(features, "ladder")
    kinds = {RAW: raw}
    if long or Store.open(features[0]).texts(LONG):
        kinds[LONG] = long or LONG
    else:
        typer.echo(f"note: {features[0]} has no long captions: the rungs with them are left out (--long names others).")
    with _stoppable(folder):
        climbed = climb(
            features,
            folder / "runs",
            given,
            kinds=kinds,
            seeds=seeds,
            device=Runtime.of(device, "float32").device,
            say=typer.echo,
            quiet=quiet,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
        )
    typer.echo(f"\n{climbed.table()}\n\n{climbed.explanation()}")
    contents = {
        "ladder.md": f"{climbed.table()}\n\n{climbed.explanation()}\n",
        "ladder.json": json.dumps(climbed.record(), indent=1, ensure_ascii=False),
        "ladder.svg": standalone(climbed.chart(), ("text → image", "image → text")),
    }
    with full_disk_is_said(folder):
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

    from sail_align.align import probe as probing
    from sail_align.align.runs import default_path
    from sail_align.extract.encoders.runtime import Runtime

    folder = out or default_path(features, "probe")
    names = [name.strip() for name in captions.split(",")] if captions else []
    asked = probing.combinations(features, image_encoder or [], text_encoder or [], names)
    where = Runtime.of(device, "float32").device
    with _stoppable(folder):
        probed = probing.probe(asked, folder / "runs", given, seeds=seeds, device=where, say=typer.echo, quiet=quiet)
    typer.echo(
        f"\n{probing.table(probed)}\n\nR@1 in % of linear heads on held-out pairs, ranked by the mean of both ways; "
        "± is over the seeds, the interval over the pairs: encoders whose intervals overlap widely are not told apart."
    )
    content = json.dumps(probing.record(probed, given), indent=1, ensure_ascii=False)
    with full_disk_is_said(folder):
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
    from sail_align.extract.progress import note
    from sail_align.extract.stop import StoppedError, stopping_on

    try:
        with stopping_on(signal.SIGTERM, signal.SIGINT), full_disk_is_said(folder):
            yield
    except StoppedError as stopped:
        note(f"Stopped by {stopped.name}; the same command goes on with the runs under {folder}.")
        raise
