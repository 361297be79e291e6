"""Download the images of a training set with img2dataset, from the URLs in its table of captions.

img2dataset does not get the table itself, because it reads a table whole and mistakes a line break in a caption for the
end of a row. It gets a list of URLs and raw captions that is made from the table.
"""

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
from sail_align.extract.sources.table_files import read_batches
from sail_align.extract.system.files import open_atomically, read_json, report_write_errors
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
"""Options of img2dataset. The tars contain JPEGs whose short side is at most `image_size`, each with its URL and the
SHA-256 of the original file. A later call keeps finished tars and downloads the others again."""


@dataclass(frozen=True)
class Downloaded:
    """Progress of a download.

    Attributes:
        listed: Number of URLs in the list.
        tried: Number of URLs in finished tars, by the reports beside the tars.
        downloaded: Number of images in finished tars.
    """

    listed: int
    tried: int
    downloaded: int

    @classmethod
    def read(cls, folder: Path) -> "Downloaded":
        """Return the progress of the download into a folder; `listed` is 0 if it has not started."""
        url_list = _url_list(folder)
        if not url_list.exists():
            return cls(listed=0, tried=0, downloaded=0)
        tried = downloaded = 0
        for path in folder.glob("*_stats.json"):
            remedy = "unless it is being written, remove it, and the next `sail-extract download` repeats its tar"
            report = read_json(path, remedy)
            try:
                tried += int(report["count"])
                downloaded += int(report["successes"])
            except (ValueError, KeyError, TypeError) as problem:
                raise UserError(f"{path} is not a report of img2dataset; {remedy}.") from problem
        return cls(pq.read_metadata(url_list).num_rows, tried, downloaded)

    def __str__(self) -> str:
        share = f" ({self.downloaded / self.tried:.1%})" if self.tried else ""
        left = self.listed - self.tried
        return f"{self.downloaded:,} images from {self.tried:,} URLs{share}; {left:,} URLs left"


def download_images(
    manifest: Manifest, data_root: Path, *, processes: int, threads: int, quiet: bool = False
) -> Downloaded:
    """Run img2dataset on the URLs of a manifest's table. Another call resumes a stopped download.

    Args:
        manifest: A manifest with the field `download`.
        data_root: Folder that the paths in the manifest are relative to.
        processes: Number of processes of img2dataset.
        threads: Number of simultaneous downloads per process.
        quiet: Hide the progress bar over the table. The messages of img2dataset stay.

    Raises:
        UserError: The manifest has no `download`, the table is missing, or img2dataset is not installed or fails.
    """
    settings = manifest.download
    hint = f"`sail-extract check {manifest.name}` shows how to get it"
    if settings is None:
        raise UserError(f"{manifest.name} is not downloaded with img2dataset; {hint}.")
    table, folder = data_root / settings.table, data_root / settings.folder
    if not table.is_file():
        raise UserError(f"{table} is missing; {hint}.")
    # img2dataset may be installed in another environment than this one.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("img2dataset", path=search_path)
    if program is None:
        raise UserError("img2dataset is not installed: pip install 'sail-align[download]'.")
    _write_url_list(settings, table, folder, quiet)
    command = [program, str(_url_list(folder)), f"--output_folder={folder}", f"--image_size={settings.image_size}"]
    command += [f"--processes_count={processes}", f"--thread_count={threads}"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    with report_write_errors(folder, has_out=False):
        folder.mkdir(parents=True, exist_ok=True)
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"img2dataset failed with exit code {code}, see above. Rerun the same command to resume.")
    return Downloaded.read(folder)


def _url_list(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-urls.parquet")


def _write_url_list(settings: Download, table: Path, folder: Path, quiet: bool) -> None:
    """Write the list of URLs beside the folder of images, unless it exists: another order would mix finished tars."""
    path = _url_list(folder)
    if path.exists():
        return
    columns = [settings.url, settings.caption]
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with (
        report_write_errors(path.parent, during_run=True, has_out=False),
        open_atomically(path) as file,
        pq.ParquetWriter(file, schema) as writer,
        progress(None, "URLs", unit="URL", quiet=quiet) as bar,
    ):
        for batch in read_batches(table, columns, columns, settings.delimiter, settings.encoding):
            writer.write_table(batch.select(columns).rename_columns(schema.names).cast(schema))
            bar.update(len(batch))
