"""Disk space and time that a data set takes: computed from its manifest, as in the table of docs/cc12m.md."""

import shutil
from pathlib import Path

from sail_align.extract.encoders.catalogue import TEXT, VISION, describe
from sail_align.extract.manifest import Manifest

ALIVE = 0.63
"""Share of the URLs of CC12M whose images still exist; users have counted 62 to 64 %."""
TABLE_BYTES = 1_800
"""Size of a row in DreamLIP's tables."""
JPEG_BYTES = 46_000
"""Size of a photo whose short side is 256 pixels, at quality 95. It grows with the area."""
INDEX_BYTES = 130
"""Size of a caption in a store's index."""
JOIN_BYTES = 1_600
"""Size of a row in temporary files while captions are joined into the index."""
DOWNLOADS_PER_SECOND = 630
"""As the authors of img2dataset report for CC12M, with 16 cores and 2 Gbit/s."""
ENCODED_PER_SECOND = (500, 2_000)
"""Examples, not measurements."""
FEW_ROWS = 10_000
"""Features of fewer rows take at most some MB and minutes."""
GIGABYTE = 1e9


def describe_needs(manifest: Manifest, data_root: Path) -> list[str]:
    """Return lines on the disk space and the hours that a data set takes; none for small or unknown ones."""
    if not manifest.expected_rows or (manifest.expected_rows < FEW_ROWS and not manifest.download):
        return []
    rows, downloaded = manifest.expected_rows, manifest.download is not None
    images = round(ALIVE * rows) if downloaded else rows
    sizes = _sizes(manifest, rows, images)
    if not sizes:
        return []
    about = f"if {ALIVE:.0%} of {rows:,} URLs are alive" if downloaded else f"for {rows:,} rows"
    lines = [f"disk space, {about} (computed, not measured):"]
    lines += [f"  {_gigabytes(size):>8}  {what}" for what, size in sizes.items()]
    total = f"{_gigabytes(sum(sizes.values())):>8}  in total; " if downloaded else " " * 10
    lines.append(f"  {total}{_gigabytes(_free(data_root))} are free")
    slow, fast = (images / rate / 3600 for rate in ENCODED_PER_SECOND)
    hours = f"encoding {_hours(slow)} for the images at {ENCODED_PER_SECOND[0]:,} per second, {_hours(fast)} at "
    hours += f"{ENCODED_PER_SECOND[1]:,}, and as long for each caption"
    if downloaded:
        hours = f"downloading {_hours(rows / DOWNLOADS_PER_SECOND / 3600)} with 16 cores and 2 Gbit/s; {hours}"
    return [*lines, f"time: {hours}"]


def _sizes(manifest: Manifest, rows: int, images: int) -> dict[str, float]:
    """Return the bytes of what is downloaded and made, by name."""
    sizes: dict[str, float] = {}
    if manifest.download:
        area = (manifest.download.image_size / 256) ** 2
        sizes["table of captions and URLs"] = TABLE_BYTES * rows
        sizes["images, which may be deleted once the store is complete"] = JPEG_BYTES * area * images
    if manifest.recaptions:
        sizes["temporary files while captions are joined"] = JOIN_BYTES * images
    encoders = manifest.encoders
    captions = encoders.captions or list(manifest.recaptions.captions if manifest.recaptions else ())
    if encoders.image in VISION and encoders.text in TEXT:
        dims = [describe(VISION[encoders.image])["dim"], *[describe(TEXT[encoders.text])["dim"]] * len(captions)]
        what = ", ".join(["images", *captions])
        sizes[f"store with features of {what}"] = 2 * sum(dims) * images
    if manifest.recaptions:
        sizes["its index"] = INDEX_BYTES * len(manifest.recaptions.captions) * images
    return sizes


def _free(folder: Path) -> int:
    """Return the free bytes where a folder is or will be."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:,.{1 if size < 10 * GIGABYTE else 0}f} GB"


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 0.95 else f"{max(60 * hours, 1):.0f} min"
