"""Decoding of images and masks."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from sail_align.extract.data import Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.sources.file_set import Fence
from sail_align.extract.system.files import open_regular

PIXEL_LIMIT = 100_000_000
"""Images with more pixels than this are rejected before they are decoded."""

LARGE = 1 << 25
"""Images with more pixels than this are decoded a few at a time, so that many threads do not need gigabytes."""
STRIP = 1 << 22
"""Pixels that are converted at a time. A decoded image has up to 400 MB, and intermediate results have more."""
_PILLOW_LIMIT = 1024 * 1024 * 1024 // 4 // 3
"""Pixels above which Pillow warns by default."""
_few_large = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) // 4))

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""Formats that are recognised by their bytes, whatever the file's ending. Pillow supports more, but starts an external
program for one of them (EPS)."""
MASK_FORMATS = ("PNG",)
"""Formats of masks. Lossy formats change class values."""

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
    content, path = (file, name) if isinstance(file, bytes) else (_read_file(file), str(file))
    with _open(content, path, FORMATS) as image:
        if least and image.format == "JPEG":
            _reduce(image, least)
        return upright_rgb(image, in_place=True)


def list_folder(folder: Path, texts: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Return the sorted names of the files in a folder: those that are images, and the others.

    A file is an image if its extension belongs to one of `FORMATS`. The first bytes of any other file decide, unless
    its name ends with one of `texts`. Folders and hidden files are not listed.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name[0] != "." and not is_folder(entry))
    endings = image_endings()
    others = [name for name in names if os.path.splitext(name)[1].lower() not in endings]
    if not others:
        return names, []
    no_images = {name for name in others if name.lower().endswith(texts) or not begins_like_image(folder / name)}
    return [name for name in names if name not in no_images], [name for name in others if name in no_images]


def folders_below(root: Path) -> Iterator[str]:
    """Yield the paths of a folder ("") and of its subfolders under it, each before its own subfolders, sorted.

    Hidden folders and stores are left out. A link to a folder is followed, unless it leads to a folder above.
    """

    def walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        path = root / folder
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above or (path / "zarr.json").exists():
            return
        yield folder
        with os.scandir(path) as entries:
            inner = sorted(entry.name for entry in entries if entry.name[0] != "." and is_folder(entry))
        for name in inner:
            yield from walk(os.path.join(folder, name), (*above, identity))

    parents = (path.stat() for path in root.resolve().parents)
    yield from walk("", tuple((status.st_dev, status.st_ino) for status in parents))


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a folder or a link to one. A link that leads nowhere or to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def ending_of(name: str) -> str:
    """Return the extension by which a file that is left out is counted: letters and digits that are safe to print."""
    ending = os.path.splitext(name)[1].lower()
    return ending if ending[1:].isalnum() else "of another extension" if ending[1:] else "without extension"


class FolderSource(Source):
    """A source whose images are files under one folder, by their paths in it; `fence` is the limit of these paths."""

    folder: Path
    fence: Fence

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image as upright RGB.

        Raises:
            UnreadableImageError: As `read_image`.
            UserError: The whole folder is missing or empty. An unmounted disk must not be recorded as missing images.
                Or the path leads out of the data root.
        """
        path = self.fence.path(self.folder, location)
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
            UnreadableImageError: The mask is missing, is not a PNG, or is damaged.
            UserError: The image has other channels. Converting them would invent class values.
        """
        with _open(_read_file(path), str(path), MASK_FORMATS) as image:
            stored = image.tile[0][3] if image.tile else ""
            if image.mode not in {"L", "P"}:
                raise UserError(
                    f"Mask {path} is invalid: got mode {image.mode}, expected 8 bits with one channel or a palette."
                )
            # Pillow stretches grey values of 2 and 4 bits to 0 … 255, but not palette indices.
            step = {"L;2": 85, "L;4": 17}.get(str(stored), 1)
            return np.asarray(np.array(image) // step, dtype=np.uint8)


def upright_rgb(image: Image.Image, *, in_place: bool = False) -> Image.Image:
    """Return an opened image turned as its EXIF data say, in RGB, with transparent parts white.

    Values of more than 8 bits are scaled as `_to_8_bits` describes.

    Args:
        image: An image of any mode.
        in_place: Whether the image may be changed, which saves a copy.

    Raises:
        ValueError: The range of the values from black to white is unknown.
    """
    range_ = _value_range(image)
    if not in_place:
        image = image.copy()
    image.getexif()
    # Pillow has parsed the EXIF data now. It would write them again without the orientation, which fails for many
    # cameras.
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)
    if range_:
        return _from_wide(image, *range_)
    if image.has_transparency_data:
        return _by_strips(image, _on_white)
    image.load()  # the file will be closed
    return image if in_place and image.mode == "RGB" else image.convert("RGB")


def _by_strips(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return an image as RGB, converted a strip at a time."""
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(to_rgb(strip), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(STRIP // max(image.width, 1), 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_wide(image: Image.Image, black: int, white: int) -> Image.Image:
    """Return an image of more than 8 bits as RGB.

    Raises:
        ValueError: A value is not between black and white.
    """
    ends = np.array([(values.min(), values.max()) for _, strip in _strips(image) for values in [np.asarray(strip)]])
    lowest, highest = ends[:, 0].min(), ends[:, 1].max()  # NaN if there is one
    if not (min(black, white) <= lowest and highest <= max(black, white)):
        raise ValueError(f"got values from {lowest:g} to {highest:g}, expected 0 to {max(black, white)}")

    def to_rgb(strip: Image.Image) -> Image.Image:
        return Image.fromarray(_to_8_bits(np.asarray(strip), black, white)).convert("RGB")

    return _by_strips(image, to_rgb)


def _value_range(image: Image.Image) -> tuple[int, int] | None:
    """Return the values that stand for black and white in an image of more than 8 bits, None for any other image.

    Pillow's own conversion clips such values at 255.

    Raises:
        ValueError: The values are integers that have no such range: of 32 bits, or signed.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    signed = 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ())
    if image.mode == "F":
        white = 1
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        (bits,) = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        white = 2**bits - 1
    elif image.mode.startswith("I") or signed:
        raise ValueError("signed values and integers of 32 bits have no defined black and white")
    else:
        return None
    return (white, 0) if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else (0, white)


def _to_8_bits(values: NDArray[Any], black: int, white: int) -> NDArray[np.uint8]:
    """Scale values from black to white to 0 … 255. Integers are rounded down, floating-point numbers to the nearest."""
    if values.dtype.kind == "f":
        scaled = np.rint(np.abs(values - black) * 255)
    else:
        scaled = np.abs(values.astype(np.int64) - black) * 255 // max(black, white)
    return np.asarray(scaled, dtype=np.uint8)


@contextmanager
def _open(file: Path | bytes, name: str, formats: tuple[str, ...]) -> Iterator[ImageFile.ImageFile]:
    """Open an encoded image, the only place where that happens. Errors of the block count as errors of the image.

    Raises:
        UnreadableImageError: The image cannot be decoded or has more than `PIXEL_LIMIT` pixels.
    """
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=_supported(formats)) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Image.DecompressionBombError(f"{image.width} × {image.height} pixels")
            with _few_large if image.width * image.height > LARGE else nullcontext():
                yield image
    except Image.DecompressionBombError as problem:
        raise UnreadableImageError(Status.TOO_LARGE, f"{name}: {problem}") from problem
    except UnidentifiedImageError as problem:
        reason = f"cannot identify image file, expected {', '.join(formats)}"
        raise UnreadableImageError(Status.UNDECODABLE, f"{name}: {reason}") from problem
    except (MemoryError, UserError):
        raise
    # Damaged bytes make Pillow's decoders raise errors of any kind. None may end a run of days.
    except Exception as problem:
        raise UnreadableImageError(Status.UNDECODABLE, f"{name}: {problem}") from problem


@cache
def image_endings() -> frozenset[str]:
    """Return the extensions of `FORMATS`, in lower case with their dots."""
    Image.init()
    return frozenset(ending for ending, format_ in Image.EXTENSION.items() if format_ in FORMATS)


def begins_like_image(file: Path | bytes) -> bool:
    """Return whether a file, or its content, begins like an image."""
    if isinstance(file, Path) and not file.is_file():
        return False
    try:
        with _open(file, "", FORMATS):
            return True
    except UnreadableImageError as problem:
        return problem.status is Status.TOO_LARGE


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
        with open_regular(path) as file:
            return file.read()
    except OSError as problem:
        if problem.errno in {errno.EISDIR, errno.EINVAL, errno.ENXIO}:  # a folder, a FIFO, a device, a socket
            raise UnreadableImageError(Status.UNDECODABLE, f"{path}: {problem.strerror}") from problem
        if problem.errno not in _NO_SUCH_FILE:
            raise
        raise UnreadableImageError(Status.MISSING, f"{path}: {problem.strerror}") from problem
    except ValueError as problem:  # a name with a null character
        raise UnreadableImageError(Status.MISSING, f"{str(path)!r} is not a valid file name: {problem}") from problem


@cache
def _supported(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Return the formats that this Pillow can read."""
    Image.init()
    if Image.MAX_IMAGE_PIXELS == _PILLOW_LIMIT:  # unless the user has changed it
        Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT  # Pillow would warn of images below our limit
    return tuple(name for name in formats if name in Image.OPEN)


def _reduce(image: Image.Image, least: int) -> None:
    """Make libjpeg decode an image that is not loaded yet at a smaller scale, from fewer coefficients."""
    for scale in (8, 4, 2):
        width, height = image.width // scale, image.height // scale
        if (width * scale, height * scale) == image.size and min(width, height) >= least:
            image.draft("RGB", (width, height))
            return
