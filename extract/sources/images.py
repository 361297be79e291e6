"""Bytes of a picture as upright RGB."""

import errno
import os
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sail_align.extract.data import Status, UnreadableImageError
from sail_align.extract.errors import UserError

PIXEL_LIMIT = 100_000_000
"""More pixels than this are refused before they are decoded."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""What is looked for in the bytes, whatever the file is called. Pillow knows more, and runs a program for one (EPS)."""


_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What the system says of names under which there is no file, whatever tables may call an image."""


def read_image(file: Path | bytes, name: str = "", *, least: int = 0) -> Image.Image:
    """Open a file, or the bytes of one that messages call `name`, as an upright RGB image.

    Of an animation this is the first frame. Transparent pictures are laid on white, as a web page shows them and as
    img2dataset saves them: the colours below transparent pixels were never meant to be seen.

    With `least`, a JPEG is decoded at a half, a quarter or an eighth of its scale where both sides divide by that and
    keep at least `least` pixels. Other sides would be rounded up, and the picture moved by a part of a pixel.

    Raises:
        UnreadableImageError: The file is missing, is no image, is cut short, or has more than `PIXEL_LIMIT` pixels.
    """
    if isinstance(file, bytes):
        content, path = file, name
    else:
        content, path = _content(file), str(file)
    try:
        with Image.open(BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Image.DecompressionBombError(f"{image.width} × {image.height} pixels")
            if least and image.format == "JPEG":
                _reduce(image, least)
            return _rgb(_upright(image))
    except Image.DecompressionBombError as problem:
        raise UnreadableImageError(Status.TOO_LARGE, f"{path}: {problem}") from problem
    except MemoryError:
        raise
    # Broken bytes make Pillow's decoders fail in whatever way; none of them may end a run of days.
    except Exception as problem:
        raise UnreadableImageError(Status.UNDECODABLE, f"{path}: {problem}") from problem


def read_image_in(folder: Path, location: str, *, least: int = 0) -> Image.Image:
    """Open an image by its path under a folder; the rest as `read_image`.

    Raises:
        UnreadableImageError: As `read_image`.
        UserError: The image is missing with all others: a disk that is gone must not be kept as missing images.
    """
    path = folder / location
    try:
        return read_image(path, least=least)
    except UnreadableImageError as problem:
        if problem.status is Status.MISSING and path.is_relative_to(folder) and _is_empty(folder):
            raise UserError(
                f"{folder} is not there any more, or empty; bring it back and run the same command again."
            ) from problem
        raise


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened picture as `read_image` would: turned as its EXIF data say, in RGB, transparent parts white."""
    return _rgb(_upright(image.copy()))


def _is_empty(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True


def read_mask(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Read a one-channel mask as it is stored, palette indices included, (H, W) uint8.

    Raises:
        UserError: The picture has other channels: converting them would invent class values.
    """
    with Image.open(path) as image:
        if image.mode not in {"L", "P"}:
            raise UserError(f"Mask {path} has mode {image.mode}; masks are 8-bit pictures of one channel or a palette.")
        return np.array(image, dtype=np.uint8)


def _content(path: Path) -> bytes:
    """Return a file's bytes.

    What the system reports otherwise (too many open files, a network disk that is gone) is no fault of the picture, and
    must not be kept as one.
    """
    try:
        return path.read_bytes()
    except IsADirectoryError as problem:
        raise UnreadableImageError(Status.UNDECODABLE, f"{path}: a folder") from problem
    except OSError as problem:
        if problem.errno not in _NOT_THERE:
            raise
        raise UnreadableImageError(Status.MISSING, f"{path}: {problem.strerror}") from problem
    except ValueError as problem:  # a name with a null character
        raise UnreadableImageError(Status.MISSING, f"{str(path)!r} can be no file: {problem}") from problem


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reduce(image: Image.Image, least: int) -> None:
    """Let libjpeg decode a picture that is not loaded yet from fewer coefficients, to one of fewer pixels."""
    for scale in (8, 4, 2):
        width, height = image.width // scale, image.height // scale
        if (width * scale, height * scale) == image.size and min(width, height) >= least:
            image.draft("RGB", (width, height))
            return


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture, in place, as its EXIF data say."""
    image.getexif()
    # Pillow has them parsed now. It would write them anew without the orientation, which fails for many a camera's.
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255 instead of scaling
        scaled = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
