"""sail-extract import and export: features that were computed elsewhere, and features for other programs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sail_align.extract.cli.options import StorePath, next_command
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import Device, Quiet, Result, with_json
from sail_align.extract.system.files import as_path, require_store
from sail_align.extract.system.folders import require_new

if TYPE_CHECKING:
    from sail_align.extract.exchange.importing import Import
    from sail_align.extract.store.store import Store

FORMATS = ("npy", "parquet", "safetensors", "webdataset")

_data = partial(typer.Option, rich_help_panel="Data")
_encoder = partial(typer.Option, rich_help_panel="Encoders")
_FILES = "file, folder of parts, or quoted pattern of .npy, .parquet, .pt, .safetensors or .h5"
_KEYS = "Table (.txt, .csv, .parquet, .npy …) with the keys of the {side} features"

To = Annotated[str, typer.Option("--to", metavar="|".join(FORMATS), help="Format.")]
CaptionNames = Annotated[
    str | None, typer.Option("--captions", help="Captions to write, such as raw,long.  [default: all]")
]


@with_json
def import_features(
    image_features: Annotated[
        Path, _data(metavar="PATH", help=f"Image features: {_FILES}. Or clip-retrieval's folder.", show_default=False)
    ],
    text_features: Annotated[
        list[str] | None,
        _data(metavar="[CAPTION=]PATH", help="Text features. Repeat with names for several captions."),
    ] = None,
    image_keys: Annotated[
        Path | None, _data(metavar="FILE", help=f"{_KEYS.format(side='image')}, if they are not in the same files.")
    ] = None,
    text_keys: Annotated[
        list[str] | None, _data(metavar="[CAPTION=]FILE", help=f"{_KEYS.format(side='text')}. Can be repeated.")
    ] = None,
    key_column: Annotated[
        str | None, _data(help="Column to join by.  [default: key, id or image_path if all have it]")
    ] = None,
    by_position: Annotated[bool, _data("--by-position", help="Join row i with row i instead of by key.")] = False,
    image_vector: Annotated[
        str | None, _data(metavar="NAME", help="Column, tensor or data set to read, if there are several.")
    ] = None,
    text_vector: Annotated[
        list[str] | None, _data(metavar="[CAPTION=]NAME", help="The same for text features. Can be repeated.")
    ] = None,
    captions: Annotated[
        list[str] | None,
        _data(metavar="[CAPTION=]COLUMN", help="Column with the texts themselves.  [default: caption if there is one]"),
    ] = None,
    images: Annotated[Path | None, _data(metavar="DIR", help="Folder of the images, to compare encoders.")] = None,
    image_column: Annotated[
        str | None,
        _data(
            metavar="COLUMN", help="Column with the images' paths.  [default: image_path, image, file_name or the key]"
        ),
    ] = None,
    name: Annotated[str | None, _data(help="Name of the data set.  [default: from the path of the features]")] = None,
    out: Annotated[
        Path | None, _data(metavar="STORE", help="Path of the store.  [default: features/<name>.zarr]", parser=as_path)
    ] = None,
    image_encoder: Annotated[
        str | None, _encoder(help="The encoder that made the image features: a name, or hf:REPOSITORY.")
    ] = None,
    image_pooling: Annotated[
        str | None, _encoder(help="cls, mean, cls+mean, pooler or pooler+mean.  [default: the encoder's own]")
    ] = None,
    text_encoder: Annotated[
        str | None, _encoder(help="The encoder that made the text features: a name, or hf:REPOSITORY.")
    ] = None,
    text_pooling: Annotated[str | None, _encoder(help="cls, mean or last.  [default: the encoder's own]")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> Result:
    """Make a store of features that were computed elsewhere. Rerun the same command to resume."""
    by_caption = {
        option: _by_caption(option, given or ())
        for option, given in (
            ("--text-features", text_features),
            ("--text-keys", text_keys),
            ("--text-vector", text_vector),
            ("--captions", captions),
        )
    }

    from sail_align.extract.exchange.import_features import prepare_import

    made = prepare_import(
        image_features,
        by_caption["--text-features"],
        image_keys=image_keys,
        text_keys=by_caption["--text-keys"],
        key_column=key_column,
        by_position=by_position,
        image_vector=image_vector,
        text_vector=by_caption["--text-vector"],
        captions=by_caption["--captions"],
        images=images,
        image_column=image_column,
        name=name,
        image_encoder=image_encoder,
        image_pooling=image_pooling,
        text_encoder=text_encoder,
        text_pooling=text_pooling,
        device=device,
    )
    for line in made.joined.lines(made.sides):
        typer.echo(line)
    store = made.run(out or made.default_path, device, quiet=quiet)
    return {**store.to_dict(), **_report(made, store)}


@with_json
def export_features(
    store: StorePath,
    to: To = FORMATS[0],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder.  [default: exports/<store>-<format>]")
    ] = None,
    captions: CaptionNames = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="Image encoder to use if the store has more than one.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Text encoder to use if the store has more than one.")
    ] = None,
    quiet: Quiet = False,
) -> Result:
    """Write the features of a store, with keys and captions, for other programs."""
    folder = check_export(store, to, out)

    from sail_align.extract.exchange.writing import open_arrays, write_vectors
    from sail_align.extract.store.store import Store

    opened = Store.open(store)
    arrays = open_arrays(opened, split_captions(captions), image_encoder, text_encoder)
    return report_written(folder, *write_vectors(opened, arrays, to, folder, quiet=quiet), opened.dataset)


def check_export(store: Path, to: str, out: Path | None, suffix: str = "") -> Path:
    """Return the folder to write to. Raises `UserError` unless store, format and folder can be used."""
    if to not in FORMATS:
        raise UserError(f"--to is invalid: got {to!r}, expected {', '.join(FORMATS)}.")
    require_store(store)
    folder = out or Path("exports") / f"{store.stem}{suffix}-{to}"
    require_new(folder)
    return folder


def split_captions(given: str | None) -> list[str] | None:
    """Return the names of captions in an option; None if it is not given."""
    return [name.strip() for name in given.split(",")] if given else None


def report_written(folder: Path, rows: int, left_out: int, dataset: str) -> Result:
    """Print how many rows of a store were written and left out. Return that, ready for JSON."""
    if left_out:
        typer.echo(
            f"note: {left_out:,} rows of {dataset} are left out, because not all of these features exist. Choose fewer "
            "with --captions, or see `sail-extract status --failed`."
        )
    typer.echo(f"wrote {folder}: {rows:,} rows")
    return {"data_set": dataset, "wrote": str(folder), "rows": rows, "left_out": left_out}


def _by_caption(option: str, given: Sequence[str]) -> dict[str, str]:
    """Split `[CAPTION=]VALUE`; a value without a caption is that of the only one."""
    from sail_align.extract.exchange.import_features import DEFAULT_CAPTION
    from sail_align.extract.store.store import CAPTION_NAME

    named: dict[str, str] = {}
    for text in given:
        caption, separator, value = text.partition("=")
        if not separator or not CAPTION_NAME.fullmatch(caption) or Path(text).exists():
            caption, value = DEFAULT_CAPTION, text
        if caption in named:
            raise UserError(f"{option} is invalid: got two for caption {caption!r}. Name each: {option} NAME=…")
        named[caption] = value
    return named


def _report(made: "Import", store: "Store") -> dict[str, Any]:
    """Print what a store contains, how its features agree with encoders, and the next command; return the same."""
    from sail_align.extract.exchange.identify import LEAST_COSINE, UNIT
    from sail_align.extract.exchange.importing import agreements
    from sail_align.extract.quality.doctor import diagnose
    from sail_align.extract.quality.pairing import Verdict

    for label, counts in made.counts.items():
        if counts.overflown:
            typer.echo(
                f"warning: {counts.overflown:,} rows of {label} exceed float16's 65,504 and have the status "
                "non-finite. Scale the features and import them again."
            )
        if counts.zero:
            typer.echo(f"warning: {counts.zero:,} rows of {label} are all zeros, as some programs write for failures.")
    compared = agreements(store)
    for side, agreement in compared.items():
        if agreement is None:
            missing = "--images" if side == "image" else "--captions"
            typer.echo(f"note: the {side} features were not compared with their encoder. Pass {missing} to do that.")
            continue
        typer.echo(
            f"{side} features agree with their encoder: mean cosine {agreement.cosine:.4f} with {agreement.rows} "
            f"{side}s encoded again (at least {LEAST_COSINE} is needed), {agreement.norms}."
        )
        if agreement.norms == UNIT:
            typer.echo(
                f"note: the {side} features are L2-normalised. The heads begin with a LayerNorm, which undoes this "
                "up to about 1 %."
            )
    for array in store.arrays():
        typer.echo(f"  {array.describe()}")
    diagnosis = diagnose(store) if made.captions else None
    broken = diagnosis is not None and diagnosis.verdict is Verdict.BROKEN
    if diagnosis:
        typer.echo(f"{'warning: ' if broken else ''}pairing check: {diagnosis.summary}")
    typer.echo(f"wrote {store.path}: {store.rows:,} rows")
    following = command("sail-extract", "doctor", store.path) if broken else next_command(store)
    typer.echo(f"Next: {following}")
    return {
        "joined": made.joined.to_dict(made.sides),
        "encoders": compared,
        "converted": made.counts,
        "pairing": diagnosis.to_dict() if diagnosis else None,
        "next": following,
    }
