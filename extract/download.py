"""Download the images of a training set with img2dataset, from the URLs in its table of captions.

img2dataset does not get the table itself, because it reads a table whole and mistakes a line break in a caption for the
end of a row. It gets a list of URLs and raw captions that is made from the table.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Download, Manifest
from sail_align.extract.sources.table_files import read_batches
from sail_align.extract.system.files import open_atomically, read_json, report_write_errors
from sail_align.extract.system.progress import note, progress
from sail_align.extract.system.signals import RERUN, StoppedError, report_stop

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


THREADS = 64
"""Simultaneous downloads per process, unless `--threads` is given."""
STOP_SECONDS = 5.0
"""Time that img2dataset has to end after a signal."""


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
    manifest: Manifest,
    data_root: Path,
    *,
    processes: int | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Downloaded:
    """Run img2dataset on the URLs of a manifest's table. Another call resumes a stopped download.

    Args:
        manifest: A manifest with the field `download`.
        data_root: Folder that the paths in the manifest are relative to.
        processes: Number of processes of img2dataset. Default: one per core.
        threads: Number of simultaneous downloads per process. Default: `THREADS`.
        quiet: Hide the progress bar over the table. The messages of img2dataset stay.

    Raises:
        UserError: The manifest has no `download`, the table is missing and not on the hub, or img2dataset is not
            installed or fails.
        StoppedError: SIGTERM or Ctrl-C.
    """
    settings = manifest.download
    hint = f"`sail-extract check {manifest.name}` shows how to get it"
    if settings is None:
        raise UserError(f"{manifest.name} is not downloaded with img2dataset; {hint}.")
    table, folder = data_root / settings.table, data_root / settings.folder
    if not table.is_file() and settings.repository is None:
        raise UserError(f"{table} is missing; {hint}.")
    # img2dataset may be installed in another environment than this one.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("img2dataset", path=search_path)
    if program is None:
        raise UserError("img2dataset is not installed: pip install 'sail-align[download]'.")
    if not table.is_file() and settings.repository:
        _fetch_table(settings.repository, table)
    _write_url_list(settings, table, folder, quiet)
    command = [program, str(_url_list(folder)), f"--output_folder={folder}", f"--image_size={settings.image_size}"]
    command += [f"--processes_count={processes or os.cpu_count() or 1}", f"--thread_count={threads or THREADS}"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    with report_write_errors(folder, has_out=False):
        folder.mkdir(parents=True, exist_ok=True)
    if code := _run(command):
        raise UserError(f"img2dataset failed with exit code {code}, see above. Rerun the same command to resume.")
    return Downloaded.read(folder)


def download_all(manifest: Manifest, data_root: Path, *, quiet: bool = False) -> None:
    """Download the images of a manifest, unless that is done. Another call resumes.

    Raises:
        UserError: The images cannot be downloaded, or URLs are left: img2dataset gave up on their tars.
        StoppedError: SIGTERM or Ctrl-C.
    """
    if manifest.download is None and manifest.is_here(data_root):
        return
    done = Downloaded.read(data_root / manifest.download.folder) if manifest.download else None
    if done is None or not done.listed or done.tried < done.listed:
        done = download_images(manifest, data_root, quiet=quiet)
        note(f"{manifest.name}: {done}")
    if done.tried < done.listed:
        raise UserError(
            f"{done.listed - done.tried:,} URLs of {manifest.name} were not tried. Rerun the same command to try them, "
            "or leave out --download to encode what is here."
        )


def _fetch_table(repository: str, table: Path) -> None:
    """Download a table from a data set on the hub. A stopped download is resumed."""
    from huggingface_hub import errors, hf_hub_download

    with report_stop(lambda: RERUN), report_write_errors(table.parent, has_out=False):
        table.parent.mkdir(parents=True, exist_ok=True)
        try:
            hf_hub_download(repository, table.name, repo_type="dataset", local_dir=table.parent)
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as problem:
            raise UserError(
                f"{table.name} cannot be downloaded from the data set {repository!r} on the hub. Check the connection, "
                f"or put the file into {table.parent}."
            ) from problem


def _run(command: list[str]) -> int:
    """Run a program in a group of processes, which a signal to this process ends. Return its exit code."""
    with report_stop(lambda: RERUN):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            return process.wait()
        except StoppedError:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            raise
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of the group


def _url_list(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-urls.parquet")


def _write_url_list(settings: Download, table: Path, folder: Path, quiet: bool) -> None:
    """Write the list of URLs beside the folder of images, unless it exists: another order would mix finished tars.

    Rows without an http or https URL are left out: img2dataset would also read files of this machine.
    """
    path = _url_list(folder)
    if path.exists():
        return
    columns, listed = [settings.url, settings.caption], 0
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with (
        report_write_errors(path.parent, during_run=True, has_out=False),
        open_atomically(path) as file,
        pq.ParquetWriter(file, schema) as writer,
        progress(None, "URLs", unit="URL", quiet=quiet) as bar,
    ):
        for batch in read_batches(table, columns, columns, settings.delimiter, settings.encoding):
            rows = batch.select(columns).rename_columns(schema.names).cast(schema)
            rows = rows.filter(pc.match_substring_regex(rows["url"], "(?i)^https?://"))
            listed += len(rows)
            writer.write_table(rows)
            bar.update(len(batch))
        if not listed:
            raise UserError(f"{table} has no http or https URL in column {settings.url!r}. Correct the table.")
