"""Tars of samples, as other programs write them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Members = list[tuple[str, bytes]]


def picture(number: int) -> bytes:
    """A JPEG of one grey, by which it can be told from others."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (number * 16 % 256,) * 3).save(file, "JPEG")
    return file.getvalue()


def grey(image: Image.Image) -> int:
    """The number that `picture` drew."""
    return round(float(np.asarray(image).mean()) / 16)


def write_tar(path: Path | io.BytesIO, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> None:
    target = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode="w", format=form, **target) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def img2dataset_members(numbers: Iterable[int]) -> Members:
    """Return the members that img2dataset writes for each image: .jpg, .json, .txt."""
    members = []
    for number in numbers:
        key, caption, url = f"{number:09d}", f"picture {number}", f"http://example.org/{number}.jpg"
        row = {"caption": caption, "url": url, "key": key, "status": "success", "error_message": None, "width": 20}
        members += [
            (f"{key}.jpg", picture(number)),
            (f"{key}.json", json.dumps(row).encode()),
            (f"{key}.txt", caption.encode()),
        ]
    return members
