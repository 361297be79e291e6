"""A data set as a validated object: one YAML file in `data_manifests/`, or one of the user's own."""

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from sail_align.extract.errors import UserError
from sail_align.extract.schema import NonEmpty, Recaptions, Source, Strict

Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]
"""A prompt with exactly one `{}`, where the class name goes."""


class TaskSettings(Strict):
    """The task that an evaluation set is made for, and the settings of its protocol.

    `sail-eval` has the kinds of tasks and rejects fields that the kind ignores.

    Attributes:
        kind: Name of the task.
        templates: Prompts with one `{}` for the class name, or the name of a published list (`open_clip:imagenet-80`).
        captions: Names of the captions to use. Default: all.
        prompt: Text with one `{}` that each caption is put into.
        split: Split of the data set that the files belong to, if the source does not name it.
        variants: Departures from the task's own protocol, by name.
        background: Probability below which a pixel belongs to the class "background".
    """

    kind: NonEmpty
    templates: Annotated[list[Template], Field(min_length=1)] | NonEmpty = Field(default=["a photo of a {}."])
    captions: list[str] | None = None
    prompt: Template = "{}"
    split: NonEmpty | None = None
    variants: list[NonEmpty] = Field(default=[])
    background: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _captions_differ(self) -> "TaskSettings":
        if self.captions and len(set(self.captions)) < len(self.captions):
            raise ValueError(f"'captions' names one twice: {', '.join(self.captions)}")
        return self


class Encoders(Strict):
    """What `sail-extract run` uses where the command names nothing else: the paper's pair, and all captions."""

    image: str = "dinov2-large"
    text: str = "gte-large"
    captions: Annotated[list[str], Field(min_length=1)] | None = None


class Download(Strict):
    """Where `sail-extract download` finds the images' URLs, and where it puts them; paths are under the data root.

    `url` and `caption` are columns of `table`. `folder` becomes one of tars, whose JPEGs have a short side of
    `image_size` pixels at most.
    """

    table: NonEmpty
    url: NonEmpty
    caption: NonEmpty
    folder: NonEmpty
    image_size: int = Field(default=256, ge=32)


class Manifest(Strict):
    """A data set: what it is for, where its files are, what to expect of it, and how to get it.

    `get` says it in commands, for a data root of `data`.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    purpose: Literal["train", "evaluate"]
    title: str
    licence: str
    get: str
    source: Source
    recaptions: Recaptions | None = None
    task: TaskSettings | None = None
    download: Download | None = None
    encoders: Encoders = Encoders()
    expected_rows: int | None = Field(default=None, gt=0)
    expected_captions: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fields_go_with_purpose(self) -> "Manifest":
        if (self.purpose == "evaluate") != (self.task is not None):
            raise ValueError("'task' belongs to, and only to, a manifest whose purpose is 'evaluate'")
        if self.purpose == "evaluate" and self.recaptions:
            raise ValueError("'recaptions' belongs to manifests whose purpose is 'train'")
        return self

    def scored_as(self, kind: str) -> "Manifest":
        """Return an evaluation set under another kind of task."""
        return self.model_copy(update={"task": self.task and self.task.model_copy(update={"kind": kind})})

    @property
    def rows(self) -> dict[str, Any]:
        """What decides the rows of a store: a store is made from this and goes on only with the same."""
        fields = {"name", "source"} | ({"recaptions"} if self.recaptions else set())
        return self.model_dump(mode="json", include=fields)


def packaged_manifests() -> dict[str, Path]:
    """Return the manifests that come with the project, by name."""
    folder = resources.files("sail_align.data_manifests")
    paths = (Path(str(entry)) for entry in folder.iterdir())
    return {path.stem: path for path in sorted(paths) if path.suffix == ".yaml"}


def find_manifest(reference: str, data_root: str | None = None) -> tuple[Manifest, Path]:
    """Return the manifest that a packaged name or a path means, and the data root that its files lie under.

    The data root is `data_root`, else `$SAIL_DATA_ROOT`, else `./data` for a packaged manifest and the manifest's own
    folder for a file of the user's.

    Raises:
        UserError: There is no such manifest, or it is not valid.
    """
    path = Path(reference)
    packaged = packaged_manifests()
    if reference in packaged:
        path, default_root = packaged[reference], Path("data")
    elif path.suffix in {".yaml", ".yml"} and path.is_file():
        default_root = path.parent
    elif path.suffix in {".yaml", ".yml"}:
        raise UserError(f"{reference} is not there; give the path of a manifest, or a packaged one's name.")
    else:
        raise UserError(f"No manifest {reference!r}; give a path to a .yaml file or one of: {', '.join(packaged)}.")
    root = data_root or os.environ.get("SAIL_DATA_ROOT")
    return read_manifest(path), Path(root) if root else default_root


def read_manifest(path: Path) -> Manifest:
    """Read and validate one manifest.

    Raises:
        UserError: The file is not YAML, or a field is missing, unknown or of the wrong form; the sentence names file,
            field and value.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}.") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r} where a mapping of fields is expected.")
    try:
        return Manifest.model_validate(content)
    except ValidationError as problem:
        raise UserError(f"{path}: {_first_problem(problem, content)}") from problem


def _first_problem(error: ValidationError, content: dict[str, Any]) -> str:
    """Say in a sentence what the first validation error is about, with a likely field name for a typing slip."""
    # A misspelt field is both unknown and missing: the unknown one says more.
    problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    field = ".".join(str(part) for part in problem["loc"]) or "the manifest"
    if problem["type"] == "extra_forbidden":
        return f"unknown field {field!r} with value {problem['input']!r}; remove or correct it."
    if problem["type"] == "missing":
        return f"field {field!r} is missing; add it."
    if problem["type"] == "union_tag_not_found":
        return f"field '{field}.kind' is missing; add it."
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        context = problem["ctx"]
        if "tag" in context:
            field, value, known = f"{field}.kind", context["tag"], context["expected_tags"]
        else:
            value, known = problem["input"], context["expected"]
        names = re.findall("'(.+?)'", known) or [known]
        near = difflib.get_close_matches(str(value), names, n=1)
        guess = f"did you mean {near[0]!r}? It" if near else "it"
        return f"field {field!r} is {value!r}; {guess} can be {', '.join(names)}."
    return f"field {field!r} is {problem['input']!r}: {problem['msg']}." if problem["loc"] else f"{problem['msg']}."
