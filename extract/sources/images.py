"""Decoding of images and masks."""

import errno
import os
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sail_align.extract.data import Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError

PIXEL_LIMIT = 100_000_000
"""Images with more pixels than this are rejected before they are decoded."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""Formats that are recognised by their bytes, whatever the file's ending. Pillow supports more, but starts an external
program for one of them (EPS)."""


_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors for a name without a file. Tables may contain any text as the name of an image."""


def read_image(file: Path | bytes, name: str = "", *, least: int = 0) -> Image.Image:
    """Decode an image as upright RGB.

    An animation gives its first frame. Transparent images are laid on white, as web pages show them and img2dataset
    saves them, because the colours of transparent pixels were never meant to be seen.

    Args:
        file: A file, or its content.
        name: Name in messages if `file` is bytes.
        least: If given, a JPEG is decoded at a half, a quarter or an eighth of its scale if both sides are divisible
            by that and keep at least this many pixels. Other sides would be rounded up, which shifts the image by a
            fraction of a pixel.

    Raises:
        UnreadableImageError: The file is missing, is not an image, is truncated, or has more than `PIXEL_LIMIT` pixels.
    """
    if isinstance(file, bytes):
        content, path = file, name
    else:
        content, path = _read_file(file), str(file)
    try:
        with Image.open(BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Image.DecompressionBombError(f"{image.width} × {image.height} pixels")
            if least and image.format == "JPEG":
                _reduce(image, least)
            return upright_rgb(image)
    except Image.DecompressionBombError as problem:
        raise UnreadableImageError(Status.TOO_LARGE, f"{path}: {problem}") from problem
    except MemoryError:
        raise
    # Damaged bytes make Pillow's decoders raise errors of any kind. None may end a run of days.
    except Exception as problem:
        raise UnreadableImageError(Status.UNDECODABLE, f"{path}: {problem}") from problem


class FolderSource(Source):
    """A source whose images are files under one folder, by their paths in it."""

    folder: Path

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image as upright RGB.

        Raises:
            UnreadableImageError: As `read_image`.
            UserError: The whole folder is missing or empty. An unmounted disk must not be recorded as missing images.
        """
        path = self.folder / location
        try:
            return read_image(path, least=least)
        except UnreadableImageError as problem:
            if problem.status is Status.MISSING and path.is_relative_to(self.folder) and _is_empty(self.folder):
                raise UserError(
                    f"{self.folder} is missing or empty. Restore it and rerun the same command."
                ) from problem
            raise

    @staticmethod
    def read_mask(path: Path) -> NDArray[np.uint8]:
        """Read a one-channel mask as it is stored, palette indices included, (H, W).

        Raises:
            UserError: The image has other channels. Converting them would invent class values.
        """
        with Image.open(path) as image:
            if image.mode not in {"L", "P"}:
                raise UserError(
                    f"Mask {path} is invalid: got mode {image.mode}, expected 8 bits with one channel or a palette."
                )
            return np.array(image, dtype=np.uint8)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image turned as its EXIF data say, in RGB, with transparent parts white.

    The given image is turned in place.
    """
    image.getexif()
    # Pillow has parsed the EXIF data now. It would write them again without the orientation, which fails for many
    # cameras.
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow's own conversion clips at 255 instead of scaling
        scaled = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _is_empty(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True


def _read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Other errors of the system (too many open files, a lost network disk) are raised as they are. They are not the
    image's fault and must not be recorded as such.
    """
    try:
        return path.read_bytes()
    except IsADirectoryError as problem:
        raise UnreadableImageError(Status.UNDECODABLE, f"{path}: a folder") from problem
    except OSError as problem:
        if problem.errno not in _NO_SUCH_FILE:
            raise
        raise UnreadableImageError(Status.MISSING, f"{path}: {problem.strerror}") from problem
    except ValueError as problem:  # a name with a null character
        raise UnreadableImageError(Status.MISSING, f"{str(path)!r} is not a valid file name: {problem}") from problem


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reduce(image: Image.Image, least: int) -> None:
    """Make libjpeg decode an image that is not loaded yet at a smaller scale, from fewer coefficients."""
    for scale in (8, 4, 2):
        width, height = image.width // scale, image.height // scale
        if (width * scale, height * scale) == image.size and min(width, height) >= least:
            image.draft("RGB", (width, height))
            return
