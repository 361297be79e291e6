"""sail-align embed: embeddings of a store for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from sail_align.align.cli.options import WhichCheckpoint
from sail_align.align.runs.folder import RunFolder
from sail_align.extract.cli.exchange import FORMATS, CaptionNames, To, check_export, report_written, split_captions
from sail_align.extract.cli.options import StorePath
from sail_align.extract.system.command_line import Device, Quiet, Result, with_json


@with_json
def embed(
    store: StorePath,
    run: Annotated[
        Path, typer.Option(metavar="RUN", help="Run, checkpoint or exported folder with the heads.", show_default=False)
    ],
    to: To = FORMATS[0],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder.  [default: exports/<store>-<run>-<format>]")
    ] = None,
    captions: CaptionNames = None,
    corrected: Annotated[
        bool, typer.Option("--corrected", help="Write vectors of dot products that are corrected for hubs.")
    ] = False,
    checkpoint: WhichCheckpoint = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> Result:
    """Write the embeddings of a store by the heads of a run.

    They are unit-norm and float32, as `sail-eval` computes them. With --corrected they have two more dimensions and
    another length, and are to be compared by dot products.
    """
    folder = check_export(store, to, out, f"-{run.resolve().name}")
    if not RunFolder(run).is_export:
        RunFolder(run).require()

    from sail_align.align.hub.embeddings import write_embeddings
    from sail_align.align.hub.folder import read_hub_folder
    from sail_align.align.runs.checkpoint import checkpoint_path, load_run
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.store.store import Store

    run = checkpoint_path(run, checkpoint)
    where = str(Runtime.of(device, "float32").device)
    opened, heads = Store.open(store), (read_hub_folder if RunFolder(run).is_export else load_run)(run)
    names = split_captions(captions)
    written = write_embeddings(
        heads, opened, to, folder, captions=names, corrected=corrected, device=where, quiet=quiet
    )
    return report_written(folder, *written, opened.dataset)
