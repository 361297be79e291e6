"""Images, texts and templates of the types that users have, as lists of checked items."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sail_align.extract.data import UnreadableImageError
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.sources import class_names
from sail_align.extract.sources.images import read_image, upright_rgb

SingleImage = Image.Image | str | os.PathLike[str] | NDArray[Any] | Tensor
ImageInput = SingleImage | Iterable[SingleImage]
TextInput = str | Iterable[str] | Tensor
Templates = str | Sequence[str] | None
Features = NDArray[Any] | Tensor

_IMAGES = "a PIL image, a path, a NumPy array (H, W, 3), or a tensor (3, H, W)"
_NOTHING = "There is nothing to embed. Pass at least one {}."
_CHANNELS = {1, 3, 4}


def list_images(images: Any) -> list[Any]:
    """Return one or many images as a list, after checking all types. Files are not opened yet.

    Arrays and tensors with four dimensions are batches. The other types are documented by `encode_image`.

    Raises:
        TypeError: An item is not an image.
        ValueError: There are no images, a file does not exist, or an array has a shape or values of no image.
    """
    if isinstance(images, np.ndarray | Tensor):
        images = list(images) if images.ndim in (1, 4) or images.shape[:1] == (0,) else [images]
    elif isinstance(images, Image.Image | str | os.PathLike):
        images = [images]
    listed = _listed(images, "image", _IMAGES)
    for position, image in enumerate(listed):
        if isinstance(image, str | os.PathLike):
            _require_file(os.fspath(image), position)
        elif isinstance(image, np.ndarray | Tensor):
            _require_layout(image, position)
        elif not isinstance(image, Image.Image):
            raise TypeError(f"Image {position} is invalid: got {_shown(image)}, expected {_IMAGES}.")
        elif not image.width or not image.height:
            raise ValueError(f"Image {position} is invalid: got {image.width} × {image.height} pixels, expected some.")
    return listed


def load_pixels(image: SingleImage, position: int, encoder: VisionEncoder) -> Tensor:
    """Return the pixels (size, size, 3) uint8 of one image of `list_images`, ready for the encoder.

    Raises:
        ValueError: The image cannot be read, or its values have no defined black and white.
    """
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape == encoder.pixel_shape:
        return image.cpu()  # from `preprocess`
    return encoder.preprocess(read_picture(image, position, least=encoder.min_jpeg_side))


def read_picture(image: SingleImage, position: int, *, least: int = 0) -> Image.Image:
    """Return one image of `list_images` as upright RGB. `least` is that of `read_image`.

    Raises:
        ValueError: The image cannot be read, or its values have no defined black and white.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return read_image(Path(image).expanduser(), least=least)
        return upright_rgb(image if isinstance(image, Image.Image) else _as_picture(image))
    except (UnreadableImageError, OSError, ValueError) as problem:  # OSError: Pillow reads files lazily
        raise ValueError(f"Image {position} cannot be used: {str(problem).rstrip('.')}.") from problem


def list_texts(texts: Any, what: str = "text") -> list[str]:
    """Return one or many strings as a list.

    Raises:
        TypeError: An item is not a string.
        ValueError: There are none, or one is not Unicode.
    """
    listed = _listed([texts] if isinstance(texts, str) else texts, what, "strings")
    for position, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"{what.capitalize()} {position} is invalid: got {_shown(text)}, expected a string.")
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ValueError(
                f"{what.capitalize()} {position} is invalid: got half of a surrogate pair, which UTF-8 does not have. "
                "Replace it."
            ) from problem
    return listed


def list_labels(labels: Any) -> list[str]:
    """Return class names as a list. Raises `TypeError` for a single string, in which case every image would be it."""
    if isinstance(labels, str):
        raise TypeError(f"labels is invalid: got the string {labels!r}, expected a list such as ['a cat', 'a dog'].")
    return list_texts(labels, "label")


def list_templates(templates: Any) -> list[str]:
    """Return prompt templates, each with `{}` for the class name.

    Args:
        templates: One template, several, the name of a published list such as `open_clip:imagenet-80`, or None, which
            stands for the class name alone.

    Raises:
        TypeError: An item is not a string.
        ValueError: A template has no `{}`.
        UserError: The published list does not exist, or its library is not installed.
    """
    if templates is None:
        return ["{}"]
    if isinstance(templates, str) and templates.startswith(class_names.LIBRARIES):
        return class_names.templates(templates)
    listed = list_texts(templates, "template")
    for template in listed:
        if "{}" not in template:
            raise ValueError(
                f"Template {template!r} is invalid: expected {{}} for the class name, as in 'a photo of a {{}}'."
            )
    return listed


def list_tokens(tokens_BT: Tensor) -> Tensor:
    """Return tokens (B, T) of at least one text.

    Raises:
        TypeError: The tensor holds no integers.
        ValueError: There are none, or they have another shape.
    """
    if not len(tokens_BT):
        raise ValueError(_NOTHING.format("text"))
    if tokens_BT.is_floating_point() or tokens_BT.is_complex() or tokens_BT.dtype == torch.bool:
        raise TypeError(f"Tokens are invalid: got dtype {tokens_BT.dtype}, expected int64 from `tokenizer`.")
    if tokens_BT.ndim != 2:
        raise ValueError(f"Tokens are invalid: got shape {tuple(tokens_BT.shape)}, expected (B, T) from `tokenizer`.")
    return tokens_BT


def list_features(features: Any, dim: int) -> Features:
    """Return features (…, D) as rows (N, D).

    Raises:
        TypeError: They are not floats in an array or a tensor.
        ValueError: There are none, or not D per row.
    """
    is_array = isinstance(features, np.ndarray) and features.dtype.kind == "f"
    if not (is_array or (isinstance(features, Tensor) and features.is_floating_point())):
        raise TypeError(f"Features are invalid: got {_shown(features)}, expected floats in an array or a tensor.")
    if not features.ndim or features.shape[-1] != dim:
        raise ValueError(
            f"Features are invalid: got shape {tuple(features.shape)}, expected (…, {dim}). Pass features of the "
            "encoder that the heads were trained with."
        )
    rows_ND: Features = features.reshape(-1, dim)
    if not len(rows_ND):
        raise ValueError(_NOTHING.format("row of features"))
    return rows_ND


def check_batch_size(batch_size: int | None) -> int | None:
    """Return a batch size. Raises `ValueError` unless it is None or at least 1."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size is invalid: got {batch_size!r}, expected a whole number from 1 on, or None.")
    return batch_size


def _listed(items: Any, what: str, expected: str) -> list[Any]:
    if isinstance(items, Mapping | bytes) or not isinstance(items, Iterable) or getattr(items, "ndim", 1) == 0:
        raise TypeError(f"{what.capitalize()}s are invalid: got {_shown(items)}, expected {expected}, or a list.")
    listed = list(items)
    if not listed:
        raise ValueError(_NOTHING.format(what))
    return listed


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:79] + '…'} of type {type(value).__name__}"


def _require_file(path: str | bytes, position: int) -> None:
    if isinstance(path, bytes):
        raise TypeError(f"Image {position} is invalid: got a path of bytes, expected {_IMAGES}.")
    if path.startswith(("http://", "https://")):
        raise ValueError(f"Image {position} is invalid: got the URL {path!r}, expected {_IMAGES}. Download it first.")
    if "\0" in path or not (file := Path(path).expanduser()).is_file():
        why = "It is a folder. Pass its files" if "\0" not in path and file.is_dir() else "There is no such file"
        raise ValueError(f"Image {position} is invalid: got {path!r}, expected {_IMAGES}. {why}.")


def _require_layout(image: NDArray[Any] | Tensor, position: int) -> None:
    """Raise `TypeError` or `ValueError` unless an array or a tensor has the shape and the type of an image."""
    kind = str(image.dtype).removeprefix("torch.")
    where = f"Image {position} is invalid: got shape {tuple(image.shape)} and dtype {kind}"
    floating = image.is_floating_point() if isinstance(image, Tensor) else image.dtype.kind == "f"
    if kind != "uint8" and not floating:
        raise TypeError(f"{where}, expected uint8, or floats in [0, 1].")
    if image.ndim == 2 and min(image.shape):
        return
    if image.ndim != 3 or not min(image.shape) or not (image.shape[0] in _CHANNELS or image.shape[2] in _CHANNELS):
        raise ValueError(f"{where}, expected (H, W, 3) or (3, H, W).")
    if isinstance(image, Tensor) and image.shape[0] in _CHANNELS and image.shape[2] in _CHANNELS:
        raise ValueError(f"{where}, which may be (H, W, 3) or (3, H, W). Pass a NumPy array (H, W, 3).")


def _as_picture(image: NDArray[Any] | Tensor) -> Image.Image:
    """Return an array as a picture. Floats are scaled from [0, 1] and rounded.

    Raises:
        ValueError: A float is outside [0, 1], such as after a normalisation.
    """
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        array = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    else:
        array = image
    if array.ndim == 3 and array.shape[2] not in _CHANNELS:
        array = np.moveaxis(array, 0, 2)
    if array.dtype != np.uint8:
        if not (array.min() >= 0 and array.max() <= 1):  # also true for NaN
            raise ValueError(
                f"its floats range from {array.min():.4g} to {array.max():.4g}, expected [0, 1]. Pass images that are "
                "not normalised."
            )
        array = np.rint(array * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array))
