"""Bytes of a picture as upright RGB."""

import errno
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sail_align.extract.errors import UserError
from sail_align.extract.sources.base import UnreadableImageError
from sail_align.extract.status import Status

PIXEL_LIMIT = 100_000_000
"""More pixels than this are refused before they are decoded."""


def read_image(file: Path | bytes, name: str = "") -> Image.Image:
    """Open a file, or the bytes of one that messages call `name`, as an upright RGB image.

    Raises:
        UnreadableImageError: The file is missing, is no image, is cut short, or has more than `PIXEL_LIMIT` pixels.
    """
    path = name if isinstance(file, bytes) else file
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise UnreadableImageError(Status.TOO_LARGE, f"{path}: {image.width} × {image.height} pixels")
            return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as problem:
        raise UnreadableImageError(Status.MISSING, f"{path}: no such file") from problem
    except Image.DecompressionBombError as problem:
        raise UnreadableImageError(Status.TOO_LARGE, f"{path}: {problem}") from problem
    # Pillow's decoders report broken bytes in all these ways. What the system reports (too many open files, a network
    # disk that is gone) carries a number: it is no fault of the picture, and must not be kept as one.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, RuntimeError) as problem:
        if isinstance(problem, OSError) and problem.errno not in (None, errno.EISDIR):
            raise
        raise UnreadableImageError(Status.UNDECODABLE, f"{path}: {problem}") from problem


def read_mask(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Read a one-channel mask as it is stored, palette indices included, (H, W) uint8.

    Raises:
        UserError: The picture has other channels: converting them would invent class values.
    """
    with Image.open(path) as image:
        if image.mode not in {"L", "P"}:
            raise UserError(f"Mask {path} has mode {image.mode}; masks are 8-bit pictures of one channel or a palette.")
        return np.array(image, dtype=np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255 instead of scaling
        scaled = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
