"""sail-align ladder, probe and measure: their options and their output."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.cli.options import Features, ImageEncoder, TextEncoder, with_settings
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import COMPARED, COMPARED_FEW, SETTINGS, check_options
from sail_align.extract.cli.options import next_command
from sail_align.extract.errors import UserError
from sail_align.extract.system.command_line import Device, Quiet, Result, with_json
from sail_align.extract.system.files import as_path, report_write_errors, require_store, write_atomically
from sail_align.extract.system.signals import report_stop

RESUME = "The same command resumes the runs under {}."
Seeds = Annotated[int, typer.Option(min=1, max=100, help="Runs per recipe, each with another seed.")]
DEFAULTS = {
    **{name: f"{SETTINGS[name].default:g}; for few pairs: {value:g}" for name, value in COMPARED_FEW.items()},
    "dim": str(SETTINGS["dim"].default),
    "held_out": str(COMPARED["held_out"]),
}
"""Defaults of the settings that these commands take, as their help texts show them."""

Encoders = Annotated[
    list[str] | None, typer.Option(help="Encoder, or several joined as A+B. Can be repeated.  [default: each]")
]
EachCaption = Annotated[str | None, typer.Option(help="Captions, each on its own: raw,long.  [default: all]")]


@with_json
@with_settings("lr", "weight_decay", "batch_size", "epochs", "steps", "optimizer", "dim", "held_out", defaults=DEFAULTS)
def ladder(
    features: Features,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for runs and results.  [default: runs/<store>-ladder]")
    ] = None,
    raw: Annotated[str, typer.Option(metavar="CAPTION", help="Name of the short captions.")] = "raw",
    long: Annotated[
        str | None,
        typer.Option(metavar="CAPTION", help="Name of the long captions.  [default: long, if there are any]"),
    ] = None,
    seeds: Seeds = 3,
    image_encoder: ImageEncoder = None,
    text_encoder: TextEncoder = None,
    device: Device = "auto",
    quiet: Quiet = False,
    **given: Any,
) -> Result:
    """Repeat the paper's ablation on stores: heads, losses, captions. Writes a table and a plot. Can be resumed."""
    options = _check(features, given)

    from sail_align.align.analysis.ablation import LONG, RAW, Ladder
    from sail_align.align.analysis.trials import TrialRunner
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.store.store import Store

    folder = out or RunFolder.default_path(features, "ladder")
    kinds = {RAW: raw}
    if long or Store.open(features[0]).texts(LONG):
        kinds[LONG] = long or LONG
    else:
        typer.echo(f"note: {features[0]} has no captions named {LONG!r}; skipping the recipes with long captions.")
    runner = TrialRunner(folder / "runs", seeds, Runtime.of(device, "float32").device, quiet)
    encoders = {"image_encoder": image_encoder, "text_encoder": text_encoder}
    with report_stop(lambda: RESUME.format(folder)), report_write_errors(folder, during_run=True):
        result = Ladder.run(features, options, runner, kinds=kinds, **encoders)
    text = f"{result.table()}\n\n{result.explanation()}\n"
    typer.echo(f"\n{text}", nl=False)
    record = result.record()
    as_json = json.dumps(record, indent=1, ensure_ascii=False)
    _write(folder, {"ladder.md": text, "ladder.json": as_json, "ladder.svg": result.chart()})
    return {"folder": str(folder), **record}


@with_json
@with_settings("lr", "batch_size", "epochs", "steps", "dim", "held_out", defaults=DEFAULTS)
def probe(
    features: Features,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for runs and results.  [default: runs/<store>-probe]")
    ] = None,
    image_encoder: Encoders = None,
    text_encoder: Encoders = None,
    captions: EachCaption = None,
    seeds: Seeds = 1,
    device: Device = "auto",
    quiet: Quiet = False,
    **given: Any,
) -> Result:
    """Rank encoders and captions by linear heads trained on each combination. Can be resumed."""
    options = _check(features, given)

    from sail_align.align.analysis.probe import Combination, Probe
    from sail_align.align.analysis.trials import TrialRunner
    from sail_align.extract.encoders.runtime import Runtime

    folder = out or RunFolder.default_path(features, "probe")
    combinations = Combination.select(features, image_encoder or [], text_encoder or [], _names(captions))
    runner = TrialRunner(folder / "runs", seeds, Runtime.of(device, "float32").device, quiet)
    with report_stop(lambda: RESUME.format(folder)), report_write_errors(folder, during_run=True):
        result = Probe.run(combinations, options, runner)
    spread = "± is the standard deviation over seeds, the" if seeds > 1 else "The"
    typer.echo(
        f"\n{result.table()}\n\nR@1 in % of linear heads on held-out pairs, ranked by the mean of both "
        f"directions. {spread} interval is over pairs. If intervals overlap widely, the encoders are "
        "indistinguishable."
    )
    record = result.record()
    _write(folder, {"probe.json": json.dumps(record, indent=1, ensure_ascii=False)})
    return {"folder": str(folder), **record}


@with_json
def measure(
    store: Annotated[
        Path | None, typer.Argument(metavar="STORE", help="Feature store.", show_default=False, parser=as_path)
    ] = None,
    features: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Feature store, as in the other commands.", parser=as_path)
    ] = None,
    rows: Annotated[
        int,
        typer.Option(min=100, max=100_000, help="Approximate number of rows to sample, in contiguous blocks of 256."),
    ] = 8_192,
    neighbours: Annotated[int, typer.Option(min=1, max=1_000, help="k of the mutual k-NN.")] = 10,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Fraction of the rows on which the closed form is scored.")
    ] = COMPARED["held_out"],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    image_encoder: Encoders = None,
    text_encoder: Encoders = None,
    captions: EachCaption = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the numbers as JSON.")] = None,
) -> Result:
    """Measure how alike image and text features are before training.

    By mutual k-NN, CKA, and the recall of a map in closed form.
    """
    if out and out.is_dir():
        raise UserError(f"--out is invalid: {out} is a folder. Name a file.")
    if store and features:
        raise UserError(f"{store} and --features {features} are two stores. Give one.")
    if (store := store or features) is None:
        raise UserError("The store is missing. Name one: sail-align measure features/demo.zarr.")
    require_store(store)

    from sail_align.align.analysis.measure import measure_store, measures_table
    from sail_align.extract.store.store import Store

    opened = Store.open(store)
    result = measure_store(
        opened,
        rows=rows,
        neighbours=neighbours,
        held_out=held_out,
        seed=seed,
        image_encoders=image_encoder or (),
        text_encoders=text_encoder or (),
        captions=_names(captions),
    )
    typer.echo(measures_table(result["measures"]))
    drawn, count = result["rows"], result["measures"][0]["held_out"]
    typer.echo(
        f"{drawn:,} of {opened.rows:,} rows, seed {seed}. Mutual k-NN: fraction of the {neighbours} nearest rows that "
        "image and text share. CKA: linear, unbiased HSIC; 0 is chance. Both use cosine similarity. CCA: closed form "
        f"of the other rows, R@1 in % on {count:,} held-out pairs, with a 95 % bootstrap interval."
    )
    if out:
        with report_write_errors(out):
            write_atomically(out, json.dumps(result, indent=1, ensure_ascii=False).encode())
        typer.echo(f"wrote {out}")
    best = max(result["measures"], key=lambda each: each["t2i_r1"] + each["i2t_r1"])
    following = next_command(opened, image=best["image"], text=best["text"])
    typer.echo(f"Next: {following}")
    return {**result, "next": following}


def _names(captions: str | None) -> list[str]:
    return [name.strip() for name in captions.split(",")] if captions else []


def _check(stores: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return valid options; called before torch is imported, which takes seconds."""
    options = check_options(given)
    if options.get("held_out") == 0:
        raise UserError("--held-out is invalid: got 0, which leaves no pairs to score. Give a fraction above 0.")
    for store in stores:
        require_store(store)
    return options


def _write(folder: Path, contents: Mapping[str, str]) -> None:
    with report_write_errors(folder):
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    typer.echo(f"wrote {', '.join(str(folder / name) for name in contents)}")
