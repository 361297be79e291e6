"""Download the images of a training set with img2dataset, from the URLs in its table of captions.

The table itself is not handed to img2dataset, which reads it whole and takes a line break inside a caption for the end
of a row: a list of only URLs and raw captions is made from it first.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Download, Manifest
from sail_align.extract.sources.tabular import read_batches
from sail_align.extract.system.progress import progress

SETTINGS = {
    "input_format": "parquet",
    "url_col": "url",
    "caption_col": "caption",
    "output_format": "webdataset",
    "resize_mode": "keep_ratio",
    "resize_only_if_bigger": True,
    "encode_quality": 95,
    "compute_hash": "sha256",
    "retries": 2,
    "timeout": 20,
    "incremental_mode": "incremental",
}
"""The tars hold JPEGs whose short side is `image_size` at most, each with its URL and the SHA-256 of the file as it was
on the web. Finished tars are kept by a later call, others are downloaded again."""


@dataclass(frozen=True)
class Downloaded:
    """URLs in the list, those of them in finished tars, and images that came (by the reports beside the tars)."""

    listed: int
    tried: int
    came: int

    def __str__(self) -> str:
        share = f" ({self.came / self.tried:.1%})" if self.tried else ""
        return f"{self.came:,} images came of {self.tried:,} URLs{share}; {self.listed - self.tried:,} are still to try"


def download_images(
    manifest: Manifest, data_root: Path, *, processes: int, threads: int, quiet: bool = False
) -> Downloaded:
    """Run img2dataset on the URLs of a manifest's table; call it again to go on after a stop.

    Args:
        manifest: It says under `download` where the URLs are and where the images go.
        data_root: What these paths lie under.
        processes: Of img2dataset.
        threads: Downloads at a time, a process.
        quiet: No progress bar over the table; img2dataset's own messages stay.

    Raises:
        UserError: The manifest has no `download`, the table is not there, or img2dataset is not installed or fails.
    """
    about = manifest.download
    if about is None:
        raise UserError(f"{manifest.name} does not come by img2dataset; `sail-extract check {manifest.name}` says how.")
    table, folder = data_root / about.table, data_root / about.folder
    if not table.is_file():
        raise UserError(f"{table} is not there; `sail-extract check {manifest.name}` says how to get it.")
    command = [_img2dataset(), str(_url_list(about, table, folder, quiet)), f"--output_folder={folder}"]
    command += [f"--image_size={about.image_size}", f"--processes_count={processes}", f"--thread_count={threads}"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    folder.mkdir(parents=True, exist_ok=True)
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"img2dataset ended with exit code {code}; its messages are above, the same command goes on.")
    return _tally(folder)


def tally(folder: Path) -> Downloaded | None:
    """Return how far the download into a folder is; None where none was begun."""
    return _tally(folder) if _list_beside(folder).exists() else None


def _tally(folder: Path) -> Downloaded:
    listed = pq.read_metadata(_list_beside(folder)).num_rows
    reports = [_report(path) for path in folder.glob("*_stats.json")]
    return Downloaded(listed, sum(tried for tried, _ in reports), sum(came for _, came in reports))


def _report(path: Path) -> tuple[int, int]:
    """Return how many URLs of a tar were tried, and how many images came."""
    try:
        report = json.loads(path.read_bytes())
        return int(report["count"]), int(report["successes"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{path} is no report of img2dataset's, unless it is being written; remove it, and the next `sail-extract "
            "download` gets its tar anew."
        ) from problem


def _list_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-urls.parquet")


def _url_list(about: Download, table: Path, folder: Path, quiet: bool) -> Path:
    """Write the list of URLs beside the folder of images, once: a list in another order would mix up finished tars."""
    path = _list_beside(folder)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(temporary, schema) as writer, progress(None, "URLs", unit="URL", quiet=quiet) as bar:
        for batch in read_batches(table, [about.url, about.caption]):
            writer.write_table(batch.select([about.url, about.caption]).rename_columns(["url", "caption"]).cast(schema))
            bar.update(len(batch))
    temporary.replace(path)
    return path


def _img2dataset() -> str:
    """Return the program, beside this Python or on the path: it may as well live in an environment of its own."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if program := shutil.which("img2dataset", path=places):
        return program
    raise UserError("img2dataset is not installed: pip install 'sail-align[download]'.")
