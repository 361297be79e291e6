"""The identity of an encoder: what determines its features, and how a changed encoder is detected."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from sail_align.extract.errors import UserError
from sail_align.extract.system.validation import shortened, validated

_SENTENCE = "Two brown dogs chase a red ball across the wet grass, and a child in a yellow coat watches them."
GOLDEN_TEXTS = (_SENTENCE, " ".join(f"In picture {number}, {_SENTENCE}" for number in range(1, 21)))
"""Inputs of the golden vectors of text encoders. The second has over 512 tokens: some errors grow with the position."""
GOLDEN_COSINE = 0.999
"""Lowest cosine of the golden vectors of one encoder on a CPU and a GPU, or in float32 and bfloat16."""
GOLDEN_LONG_COSINE = 0.99
"""The same for the long text: 0.9992 was measured in bfloat16, and 0.93 with rotary frequencies in bfloat16."""

JOINED = "joined"
"""Loader of several encoders whose features are concatenated."""

IMPORTED = "imported"
"""Loader of features that were computed elsewhere, by an encoder that nobody named. They have no golden vectors."""

LAST_LAYER = -1
"""Layer whose states are the output of a network."""

MOST_LAYERS = 1_000
MOST_DIM = 1 << 20
"""Limit on the number of features in a record, which may come from someone else."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that determines an encoder's output. Encoders with equal specs give equal features.

    Attributes:
        id: Name in the catalogue, or reference, without its revision.
        modality: What it encodes.
        source: Where the weights come from: loader, repository or package, revision.
        weights: SHA-256 of the weights.
        preprocessing: Steps before the network: size, crop and mean, or prefix and token limit.
        pooling: How token features become one vector.
        precision: Name of the dtype of weights and activations.
        dim: Number of features.
        layer: Layer whose states are pooled, counted from the end. −1 is the network's output.
    """

    id: str
    modality: Literal["image", "text"]
    source: dict[str, str]
    weights: str
    preprocessing: dict[str, Any]
    pooling: str
    precision: str
    dim: int
    layer: int = LAST_LAYER

    @classmethod
    def from_json(cls, record: Any) -> "EncoderSpec":
        """Read the fields of a spec. Raises `ValueError`, with the name of the field, if one is missing or invalid."""
        return cls(**validated(_SpecForm, record))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-able data. The last layer is left out, as in records of earlier versions."""
        record = asdict(self)
        if self.layer == LAST_LAYER:
            del record["layer"]
        return record

    @property
    def network_id(self) -> str:
        """The id without the layer."""
        return self.id if self.layer == LAST_LAYER else self.id.removesuffix(f"@{self.layer}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the spec. It does not cover library versions and golden vectors."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class EncoderChangedError(UserError):
    """An encoder differs from the one that a store or a run was made with."""


@with_config(ConfigDict(extra="forbid"))  # an unknown field would change the features
class _SpecForm(TypedDict):
    id: str
    modality: Literal["image", "text"]
    source: dict[str, str]
    weights: str
    preprocessing: dict[str, Any]
    pooling: str
    precision: str
    dim: Annotated[int, Field(ge=1, le=MOST_DIM)]
    layer: NotRequired[Annotated[int, Field(le=LAST_LAYER, ge=-MOST_LAYERS)]]


Golden = list[Annotated[float, Field(allow_inf_nan=False)]]


class _IdentityForm(TypedDict):
    spec: _SpecForm
    golden: Golden
    golden_long: NotRequired[Golden]
    versions: dict[str, str]
    location: str
    fingerprint: NotRequired[str]
    parts: NotRequired[list[dict[str, Any]]]


@dataclass(frozen=True)
class Identity:
    """A spec and what is recorded with it in a store's encoder node and in a run's checkpoint.

    Attributes:
        spec: What determines the output.
        golden: Features of a fixed input. They reveal changes that no field of the spec shows. Empty for features that
            were computed elsewhere by an unknown encoder.
        versions: Versions of the libraries, by package.
        location: Path of a local model folder, to find it again. Empty for all other encoders.
        golden_long: Features of a long text. Empty for image encoders, and in records of earlier versions.
        parts: The encoders whose features are concatenated, in order. Empty for a single encoder.
    """

    spec: EncoderSpec
    golden: list[float]
    versions: dict[str, str]
    location: str = ""
    golden_long: list[float] = field(default_factory=list)
    parts: tuple["Identity", ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-able data, including the fingerprint for readers."""
        record = {
            "spec": self.spec.to_json(),
            "golden": self.golden,
            "versions": self.versions,
            "location": self.location,
            "golden_long": self.golden_long,
            "parts": [part.to_json() for part in self.parts],
            "fingerprint": self.spec.fingerprint,
        }
        return {name: value for name, value in record.items() if value or name not in ("golden_long", "parts")}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Identity":
        """Read a record that `to_json` returned.

        Raises:
            ValueError: A field is missing or invalid. The message names it.
        """
        form = validated(_IdentityForm, record)
        spec, golden_long = EncoderSpec(**form["spec"]), form.get("golden_long", [])
        if parts := form.get("parts"):
            if len(parts) < 2 or any("parts" in part for part in parts):
                raise ValueError("parts is invalid: expected at least two single encoders")
            joined = cls.joined([cls.from_json(part) for part in parts])
            if joined.spec != spec:
                raise ValueError("parts is invalid: its encoders are not those of the spec")
            return joined
        if not form["golden"] and spec.source.get("loader") != IMPORTED:
            raise ValueError("golden is invalid: got no features, expected at least one")
        return cls(spec, form["golden"], form["versions"], form["location"], golden_long=golden_long)

    @classmethod
    def imported(cls, modality: Literal["image", "text"], digest: str, dtype: str, dim: int) -> "Identity":
        """Return the identity of features that were computed elsewhere by an unknown encoder.

        Args:
            modality: What was encoded.
            digest: Digest of the files of features, which stands for the weights.
            dtype: Type of the numbers in these files.
            dim: Number of features.
        """
        spec = EncoderSpec(
            f"{IMPORTED}-{digest[:8]}", modality, {"loader": IMPORTED}, digest, {}, "unknown", dtype, dim
        )
        return cls(spec, [], {})

    @classmethod
    def joined(cls, parts: Sequence["Identity"]) -> "Identity":
        """Return the identity of encoders whose features are concatenated; that of a single one is its own.

        Args:
            parts: At least one encoder, all of one modality, none of them joined.
        """
        if len(parts) == 1:
            return parts[0]
        specs = [part.spec for part in parts]
        digest = hashlib.sha256("".join(spec.fingerprint for spec in specs).encode()).hexdigest()
        spec = EncoderSpec(
            id="+".join(spec.id for spec in specs),
            modality=specs[0].modality,
            source={"loader": JOINED},
            weights=digest,
            preprocessing={},
            pooling="+".join(dict.fromkeys(spec.pooling for spec in specs)),
            precision="+".join(dict.fromkeys(spec.precision for spec in specs)),
            dim=sum(spec.dim for spec in specs),
        )
        versions = {name: version for part in parts for name, version in part.versions.items()}
        return cls(spec, [], versions, parts=tuple(parts))

    @property
    def singles(self) -> tuple["Identity", ...]:
        """The encoders that are joined, or this one."""
        return self.parts or (self,)

    @property
    def is_output(self) -> bool:
        """Whether this is the output of one network: neither joined nor an inner layer."""
        return not self.parts and self.spec.layer == LAST_LAYER

    def without_location(self) -> "Identity":
        """Return the identity without paths of local folders, for a record that leaves this machine."""
        parts = tuple(part.without_location() for part in self.parts)
        return replace(self, location="", parts=parts)

    @property
    def is_imported(self) -> bool:
        """Whether the features were computed elsewhere by an unknown encoder, which cannot be loaded."""
        return any(each.spec.source.get("loader") == IMPORTED for each in self.singles)

    def check_matches(self, recorded: "Identity", where: str) -> None:
        """Check that this is the encoder that `where` was made with.

        Raises:
            EncoderChangedError: A field of the spec differs, or the specs are equal and the golden vectors are not.
        """
        if self.parts or recorded.parts:
            if len(self.singles) != len(recorded.singles):
                raise EncoderChangedError(
                    f"Encoder {self.spec.id!r} is another than {recorded.spec.id!r}, which {where} was made with. Use "
                    "the same encoders."
                )
            for ours, theirs in zip(self.singles, recorded.singles, strict=True):
                ours.check_matches(theirs, where)
            return
        if self.is_imported or recorded.is_imported:
            if self.spec == recorded.spec:
                return
            raise EncoderChangedError(
                f"Encoders {self.spec.id!r} and {recorded.spec.id!r}, which {where} was made with, cannot be compared: "
                "features were imported without naming their encoder. Import them again with `sail-extract import … "
                f"--{self.spec.modality}-encoder NAME`."
            )
        found, expected = asdict(self.spec), asdict(recorded.spec)
        for name, value in expected.items():
            if found[name] != value:
                raise EncoderChangedError(
                    f"Encoder {recorded.spec.id!r} has changed: {where} was made with {name} {shortened(value)}, got "
                    f"{shortened(found[name])}. Use the same encoder, or another store."
                )
        pairs = [("a fixed input", GOLDEN_COSINE, self.golden, recorded.golden)]
        if self.golden_long and recorded.golden_long:
            pairs.append(("a fixed long text", GOLDEN_LONG_COSINE, self.golden_long, recorded.golden_long))
        for what, least, here, there in pairs:
            if len(here) != len(there):
                raise EncoderChangedError(
                    f"Encoder {recorded.spec.id!r} has changed: it has {len(here)} features of {what}, and {where} was "
                    f"made with {len(there)}. Use the same encoder, or another store."
                )
            cosine = torch.cosine_similarity(torch.tensor(here), torch.tensor(there), dim=0).item()
            if not cosine >= least:  # also true for NaN
                raise EncoderChangedError(
                    f"Encoder {recorded.spec.id!r} has changed: its features of {what} have a cosine of {cosine:.4f} "
                    f"with those that {where} was made with, expected at least {least}. Compare the library versions "
                    f"{self.versions} with {recorded.versions}."
                )


def require_known(*identities: Identity) -> None:
    """Raise `UserError` if features were computed elsewhere by an unknown encoder, so that nothing new can be encoded.

    Args:
        identities: The encoders that are needed.
    """
    if unknown := [identity.spec.modality for identity in identities if identity.is_imported]:
        made = "encoders that are" if len(unknown) > 1 else "an encoder that is"
        options = " ".join(f"--{modality}-encoder NAME" for modality in unknown)
        raise UserError(
            f"The {' and '.join(unknown)} features were computed elsewhere by {made} unknown, so nothing new can be "
            f"encoded. Import them again with `sail-extract import … {options}` and train on that store."
        )
