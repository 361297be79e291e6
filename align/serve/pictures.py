"""Pictures of the page: thumbnails of rows, and pictures that the user gives, both kept within bounds."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from io import BytesIO

from PIL import Image

from sail_align.align.search.pictures import Pictures
from sail_align.extract.data import UnreadableImageError
from sail_align.extract.errors import UserError, format_bytes
from sail_align.extract.sources.images import read_image

SIDES = (256, 1_024)
"""Longest sides of pictures that are sent."""
QUALITY = 85
KEPT_BYTES = 64 << 20
"""Bytes of thumbnails that are kept, and of pictures that the user gives."""
MOST_UPLOADED = 32 << 20
"""Bytes of one picture that the user gives."""


class Kept:
    """The latest values, up to a number of bytes. It may be used by several threads."""

    def __init__(self, most_bytes: int):
        self._most_bytes, self._bytes = most_bytes, 0
        self._values: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bytes | None:
        """Return a value, None if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: bytes) -> None:
        """Keep a value, and forget the oldest ones."""
        with self._lock:
            self._bytes += len(value) - len(self._values.pop(key, b""))
            self._values[key] = value
            while self._bytes > self._most_bytes:
                self._bytes -= len(self._values.popitem(last=False)[1])


class Thumbnails:
    """Small JPEGs of pictures. Only as many are decoded at a time as there are cores."""

    def __init__(self, most_bytes: int = KEPT_BYTES):
        self._kept = Kept(most_bytes)
        self._few = threading.BoundedSemaphore(os.cpu_count() or 1)

    def of_row(self, key: Hashable, pictures: Pictures, location: str, side: int) -> bytes:
        """Return a row's picture. Raises `UnreadableImageError` if it cannot be opened."""
        found = self._kept.get((key, side))
        if found is None:
            with self._few:
                found = jpeg(pictures.open(location, least=side), side)
            self._kept.put((key, side), found)
        return found


class Uploads:
    """Pictures that the user gives, in memory, by a part of their SHA-256."""

    def __init__(self, most_bytes: int = KEPT_BYTES):
        self._kept = Kept(most_bytes)

    def add(self, content: bytes) -> str:
        """Keep an encoded picture, and return its name.

        Raises:
            UserError: It is not a picture, or too large.
        """
        if len(content) > MOST_UPLOADED:
            raise UserError(f"The picture has more than {format_bytes(MOST_UPLOADED)}. Give a smaller one.")
        self._decode(content)
        name = hashlib.sha256(content).hexdigest()[:16]
        self._kept.put(name, content)
        return name

    def open(self, name: str) -> Image.Image:
        """Return a picture as upright RGB. Raises `UserError` if it is not kept."""
        content = self._kept.get(name)
        if content is None:
            raise UserError("A picture of this search is no longer here. Drop, paste or choose it again.")
        return self._decode(content)

    @staticmethod
    def _decode(content: bytes) -> Image.Image:
        try:
            return read_image(content, "the picture")
        except UnreadableImageError as problem:
            raise UserError(f"The picture cannot be used: {problem}.") from problem


def jpeg(image: Image.Image, side: int) -> bytes:
    """Return an image as JPEG, made smaller so that no side is longer than `side`."""
    image.thumbnail((side, side))
    content = BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
