"""Heads by what the user calls them: a run, a checkpoint, an exported folder or a hub repository."""

import os
from pathlib import Path

from sail_align.align.hub.folder import CARD, WEIGHTS, read_hub_folder
from sail_align.align.runs.checkpoint import Choice, Run, checkpoint_path, load_run
from sail_align.align.runs.folder import CONFIG, RunFolder
from sail_align.extract.encoders.weights import download
from sail_align.extract.errors import UserError
from sail_align.extract.system.python_calls import PathLike


def read(reference: PathLike, revision: str | None = None, checkpoint: Choice | None = None) -> Run:
    """Read heads without their encoders. See `sail_align.load` for the arguments."""
    reference = os.fspath(reference)
    path = Path(reference)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{path} is a folder and has no revision {revision!r}. Leave the revision out.")
        folder = RunFolder(path)
        path = checkpoint_path(path, checkpoint)
        return load_run(path) if folder.is_run or folder.is_checkpoint else read_hub_folder(path)
    if checkpoint is not None:
        raise UserError(f"checkpoint is for runs, and {reference} is none. Leave it out.")
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise UserError(f"{reference} is neither a folder nor a repository. Pass a run, an export, or <owner>/<name>.")
    try:
        return read_hub_folder(download(reference, revision, [CONFIG, WEIGHTS, CARD]))
    except UserError as problem:
        raise UserError(f"{reference} is not a local folder. As a repository: {problem}") from problem
