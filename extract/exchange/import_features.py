"""Make a store of features that were computed elsewhere, from Python as from the command line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sail_align.extract.errors import UserError, listing
from sail_align.extract.exchange.features import Features
from sail_align.extract.exchange.join import join
from sail_align.extract.manifest import as_name
from sail_align.extract.store.store import CAPTION_NAME, Store
from sail_align.extract.system.progress import note
from sail_align.extract.system.python_calls import PathLike, one_path

if TYPE_CHECKING:
    from sail_align.extract.exchange.importing import Import

DEFAULT_CAPTION = "raw"
CAPTION = "caption"


def import_features(
    image_features: PathLike,
    text_features: PathLike | Mapping[str, PathLike] | None = None,
    *,
    image_keys: PathLike | None = None,
    text_keys: PathLike | Mapping[str, PathLike] | None = None,
    key_column: str | None = None,
    by_position: bool = False,
    image_vector: str | None = None,
    text_vector: str | Mapping[str, str] | None = None,
    captions: str | Mapping[str, str] | None = None,
    images: PathLike | None = None,
    image_column: str | None = None,
    name: str | None = None,
    out: PathLike | None = None,
    image_encoder: str | None = None,
    image_pooling: str | None = None,
    text_encoder: str | None = None,
    text_pooling: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Store:
    """Make a store of features that were computed elsewhere, as `sail-extract import` does. Call it again to resume.

    Arguments about text features are values, or values by the caption's name if there are several captions.

    Args:
        image_features: A file, a folder of parts, or a pattern of .npy, .parquet, .pt, .safetensors or .h5; or
            clip-retrieval's folder.
        text_features: The same for the features of a caption, or paths by caption: `{"raw": …, "long": …}`.
        image_keys: Table (.txt, .csv, .parquet, .npy …) with the keys of the image features, if not in the same files.
        text_keys: The same for text features.
        key_column: Column to join by. Default: key, id or image_path if all have it.
        by_position: Join row i with row i instead of by key.
        image_vector: Column, tensor or data set to read, if there are several.
        text_vector: The same for text features.
        captions: Column with the texts themselves. Default: caption, if there is one.
        images: Folder of the images, to compare encoders.
        image_column: Column with the images' paths. Default: image_path, image, file_name or the key.
        name: Name of the data set. Default: from the path of the features.
        out: Path of the store. Default: features/<name>.zarr.
        image_encoder: The encoder that made the image features: a name, or hf:REPOSITORY. Without it, the store can be
            trained on, but new images cannot be encoded.
        image_pooling: cls, mean, cls+mean, pooler or pooler+mean. Default: the encoder's own.
        text_encoder: The encoder that made the text features.
        text_pooling: cls, mean or last. Default: the encoder's own.
        device: Device of the encoders, if they are compared.
        quiet: Print nothing, and show no progress bars.

    Returns:
        The opened store.

    Raises:
        UserError: An argument is invalid, a file cannot be read, the features cannot be joined, or the encoder did not
            make them.
    """
    made = prepare_import(
        one_path(image_features, "image_features"),
        _paths(text_features, "text_features"),
        image_keys=None if image_keys is None else one_path(image_keys, "image_keys"),
        text_keys=_paths(text_keys, "text_keys"),
        key_column=key_column,
        by_position=by_position,
        image_vector=image_vector,
        text_vector=_names(text_vector),
        captions=_names(captions),
        images=None if images is None else one_path(images, "images"),
        image_column=image_column,
        name=name,
        image_encoder=image_encoder,
        image_pooling=image_pooling,
        text_encoder=text_encoder,
        text_pooling=text_pooling,
        device=device,
    )
    for line in [] if quiet else made.joined.lines(made.sides):
        note(line)
    return made.run(made.default_path if out is None else one_path(out, "out"), device, quiet=quiet)


def prepare_import(
    image_features: Path,
    text_features: Mapping[str, str],
    *,
    image_keys: Path | None,
    text_keys: Mapping[str, str],
    key_column: str | None,
    by_position: bool,
    image_vector: str | None,
    text_vector: Mapping[str, str],
    captions: Mapping[str, str],
    images: Path | None,
    image_column: str | None,
    name: str | None,
    image_encoder: str | None,
    image_pooling: str | None,
    text_encoder: str | None,
    text_pooling: str | None,
    device: str,
) -> "Import":
    """Check the arguments of `import_features` and join the features. Values by caption are mappings.

    Raises:
        UserError: As `import_features` does.
    """
    for option, given in (("--text-keys", text_keys), ("--text-vector", text_vector), ("--captions", captions)):
        if unknown := [caption for caption in given if caption not in text_features]:
            raise UserError(
                f"{option} {unknown[0]}=… is invalid: --text-features has {listing(text_features) or 'no caption'}."
            )
    for caption in text_features:
        if not CAPTION_NAME.fullmatch(caption):
            raise UserError(f"Caption name {caption!r} is invalid: expected letters, digits, '_' and '-'. Rename it.")
    for option, value, needed, other in (
        ("--text-encoder", text_encoder, text_features, "--text-features"),
        ("--image-pooling", image_pooling, image_encoder, "--image-encoder"),
        ("--text-pooling", text_pooling, text_encoder, "--text-encoder"),
    ):
        if value and not needed:
            raise UserError(f"{option} has no effect without {other}. Add it or leave {option} out.")
    if name and not re.fullmatch(r"\w[\w.-]*", name):  # it becomes the name of a folder
        raise UserError(f"--name {name!r} is invalid: expected a name such as {as_name(name)!r}, not a path.")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images} is invalid: there is no such folder. Correct it or leave it out.")
    sides = [Features(image_features, "image", "", image_vector, image_keys)]
    for caption, path in text_features.items():
        keys = text_keys.get(caption)
        sides.append(Features(Path(path), "text", caption, text_vector.get(caption), Path(keys) if keys else None))
    joined = join(sides, key_column, by_position=by_position)

    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.exchange.importing import Import

    Runtime.of(device, "float32")  # raises if it is invalid
    image = ImageEncoderConfig(image_encoder, image_pooling) if image_encoder else None
    text = TextEncoderConfig(text_encoder, text_pooling) if text_encoder else None
    texts = _texts(sides[1:], captions)
    return Import(
        name or _default_name(image_features), sides, joined, texts, images, image_column, image=image, text=text
    )


def _paths(given: PathLike | Mapping[str, PathLike] | None, name: str) -> dict[str, str]:
    """Return paths by caption; one alone is that of the caption "raw"."""
    named = given if isinstance(given, Mapping) else {} if given is None else {DEFAULT_CAPTION: given}
    return {caption: str(one_path(path, name)) for caption, path in named.items()}


def _names(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """Return names by caption; one alone is that of the caption "raw"."""
    return dict(given) if isinstance(given, Mapping) else {DEFAULT_CAPTION: given} if given else {}


def _default_name(features: Path) -> str:
    path = features.resolve()
    if path.name in ("img_emb", "image") or "*" in path.name:
        path = path.parent
    return re.sub(r"[^\w.-]+", "-", path.stem if path.is_file() else path.name).lower() or "imported"


def _texts(sides: Sequence[Features], given: Mapping[str, str]) -> dict[str, str]:
    """Return the column of the text of each caption that has one."""
    texts = dict(given)
    for side in sides:
        usual = [f"{CAPTION}_{side.caption}", *([CAPTION] if len(sides) == 1 else [])]
        found = [column for column in usual if side.texts and column in side.texts.names]
        if found:
            texts.setdefault(side.caption, found[0])
    return texts
