"""sail-align tune: its options and its output."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.cli.options import ImageEncoder, TextEncoder, with_settings
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import COMPARED, check_options, parse_time
from sail_align.extract.errors import UserError
from sail_align.extract.system.command_line import Device, Quiet, Result, with_json
from sail_align.extract.system.files import as_path, report_write_errors, require_store, write_atomically
from sail_align.extract.system.signals import report_stop

BUDGET = "10m"
MOST = 1_000
GIVEN = (
    *("head", "expansion", "dim", "image_dropout", "text_dropout", "image_power", "text_hidden"),
    *("start", "ridge", "positives", "item_bias"),
    *("loss", "temperature", "bias", "optimizer", "lr", "weight_decay", "warmup", "batch_size", "steps", "epochs"),
    *("preset", "held_out"),
)
"""Settings that can be given; the search leaves them as they are."""

_STORE = typer.Argument(metavar="STORE", help="Feature store.", show_default=False, parser=as_path)
_FEATURES = typer.Option(metavar="STORE", help="Feature store. Can be repeated.", parser=as_path)


@with_json
@with_settings(*GIVEN, defaults={"held_out": str(COMPARED["held_out"])})
def tune(
    store: Annotated[Path | None, _STORE] = None,
    features: Annotated[list[Path] | None, _FEATURES] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the results.  [default: runs/<store>-tune]")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help=f"Time, as in 90s, 10m or 2h.  [default: {BUDGET}]")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Number of candidates, instead of --budget or beside it.")
    ] = None,
    captions: Annotated[str | None, typer.Option(help="Captions, as for `fit`.")] = None,
    image_encoder: ImageEncoder = None,
    text_encoder: TextEncoder = None,
    search_seed: Annotated[int, typer.Option(min=0, help="Seed of the sequence of candidates.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    **given: Any,
) -> Result:
    """Search for settings that beat the default, on held-out pairs. Can be resumed.

    Settings that are given stay as they are.
    """
    stores = [*([store] if store else []), *(features or [])]
    if not stores:
        raise UserError("The store is missing. Name one: sail-align tune features/demo.zarr.")
    seconds = parse_time(budget or BUDGET) if budget or trials is None else math.inf
    options = check_options(given)
    if options.get("held_out") == 0:
        raise UserError("--held-out is invalid: got 0, which leaves no pairs to score. Give a fraction above 0.")
    for path in stores:
        require_store(path)

    from sail_align.align.analysis.trials import TrialRunner
    from sail_align.align.analysis.tune import tune_stores
    from sail_align.extract.encoders.runtime import Runtime

    folder = out or RunFolder.default_path(stores, "tune")
    runner = TrialRunner(folder, 1, Runtime.of(device, "float32").device, quiet, checkpoint="best")
    stopped = f"The same command continues with the finished trials under {folder}."
    with report_stop(lambda: stopped), report_write_errors(folder, during_run=True):
        found = tune_stores(
            stores,
            options,
            runner,
            captions=captions.split(",") if captions else (),
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            seed=search_seed,
            trials=trials or MOST,
            budget=seconds,
        )
    typer.echo(f"\n{found.table()}\n\n{found.verdict()}")
    record = found.record()
    with report_write_errors(folder):
        write_atomically(folder / "tune.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    typer.echo(f"\nwrote {folder / 'tune.json'}")
    return {"folder": str(folder), **record, "next": found.fit_command()}
