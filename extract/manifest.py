"""A data set as a validated object: one YAML file in `data_manifests/`, or one of the user's own."""

import importlib
import os
import pkgutil
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from sail_align.extract import sources
from sail_align.extract.data import Source
from sail_align.extract.encoders.views import VIEWS
from sail_align.extract.errors import UserError, command
from sail_align.extract.sources.class_names import LIBRARIES
from sail_align.extract.sources.config import NonEmpty, SourceConfig, Strict
from sail_align.extract.sources.table_files import Recaptions, TextFormat
from sail_align.extract.system.validation import MOST_MISTAKES, describe_mistakes, shortened
from sail_align.extract.system.yaml_files import read_yaml

Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]
"""A prompt with exactly one `{}`, where the class name goes."""


MOST_NAME = 100
"""Characters of a manifest's name, which becomes the name of a folder."""


class TaskSettings(Strict):
    """The task that an evaluation set is made for, and the settings of its protocol.

    `sail-eval` has the kinds of tasks and rejects fields that the kind ignores.

    Attributes:
        kind: Name of the task.
        templates: Prompts with one `{}` for the class name, a single one, or the name of a published list
            (`open_clip:imagenet-80`).
        captions: Names of the captions to use. Default: all.
        prompt: Text with one `{}` that each caption is put into.
        split: Split of the data set that the files belong to, if the source does not name it.
        variants: Departures from the task's own protocol, by name.
        views: Views of each image that embeddings are averaged over (see `encoders.views`). Default: the encoder's own.
        background: Probability below which a pixel belongs to the class "background".
    """

    kind: NonEmpty
    templates: Annotated[list[Template], Field(min_length=1)] | NonEmpty = Field(default=["a photo of a {}."])
    captions: list[str] | None = None
    prompt: Template = "{}"
    split: NonEmpty | None = None
    variants: list[NonEmpty] = Field(default=[])
    views: NonEmpty | None = None
    background: Annotated[float, Field(gt=0, lt=1)] | None = None

    @field_validator("templates", mode="before")
    @classmethod
    def _list_single_template(cls, templates: Any) -> Any:
        if isinstance(templates, str) and not templates.startswith(LIBRARIES):
            if "{" not in templates:
                lists = " or ".join(f"{library}…" for library in LIBRARIES)
                raise ValueError(f"Write a prompt with {{}} for the class name, several, or a published list ({lists})")
            return [templates]
        return templates

    @field_validator("views")
    @classmethod
    def _require_known_views(cls, views: str | None) -> str | None:
        if views and views not in VIEWS:
            raise ValueError(f"Expected {' or '.join(VIEWS)}")
        return views

    @model_validator(mode="after")
    def _captions_differ(self) -> "TaskSettings":
        if self.captions and len(set(self.captions)) < len(self.captions):
            raise ValueError(f"'captions' names one twice: {', '.join(self.captions)}")
        return self


class Encoders(Strict):
    """Defaults of `sail-extract run`: the paper's pair of encoders at their own image size, and all captions."""

    image: str = "dinov2-large"
    image_size: int | None = Field(default=None, ge=1)
    text: str = "gte-large"
    captions: Annotated[list[str], Field(min_length=1)] | None = None


class Download(TextFormat):
    """Settings of `sail-extract download`. Paths are under the data root.

    Attributes:
        table: Table with the addresses of the images.
        url: Column of the addresses.
        caption: Column of the captions.
        folder: Folder for the downloaded tars.
        image_size: Largest short side of the saved JPEGs, in pixels.
        repository: Data set on the Hugging Face hub that has the table, under the same file name.
    """

    table: NonEmpty
    url: NonEmpty
    caption: NonEmpty
    folder: NonEmpty
    image_size: int = Field(default=256, ge=32)
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None


def _source_configs() -> list[type[SourceConfig]]:
    """Return the description of each kind of source, from all modules of `sources`."""
    for module in pkgutil.iter_modules(sources.__path__, f"{sources.__name__}."):
        importlib.import_module(f"{module.name}.source" if module.ispkg else module.name)
    subclasses = list(SourceConfig.__subclasses__())
    for subclass in subclasses:  # grows meanwhile
        subclasses += subclass.__subclasses__()
    return [each for each in subclasses if "kind" in each.model_fields]


if TYPE_CHECKING:
    AnySourceConfig = SourceConfig
else:
    AnySourceConfig = Annotated[Union[tuple(_source_configs())], Field(discriminator="kind")]  # noqa: UP007


def as_name(text: str) -> str:
    """Return a valid name of a manifest that is similar to a text."""
    return re.sub("[^a-z0-9._-]+", "-", text.lower()[:MOST_NAME]).lstrip("._-").rstrip("-") or "data"


class Manifest(Strict):
    """A data set: its purpose, its files, the expected counts, and how to get it.

    `title`, `licence` (also spelled `license`) and `get` are for people. `get` lists the commands that download the
    data set to the data root `data`. By default, `title` is the name, and `purpose` is `evaluate` if there is a task.
    """

    name: str
    purpose: Literal["train", "evaluate"]
    title: str = ""
    licence: str = ""
    get: str = ""
    source: AnySourceConfig
    recaptions: Recaptions | None = None
    task: TaskSettings | None = Field(default=None, validate_default=True)
    download: Download | None = None
    encoders: Encoders = Encoders()
    expected_rows: int | None = Field(default=None, gt=0)
    expected_captions: int | None = Field(default=None, gt=0)

    @field_validator("name")
    @classmethod
    def _require_file_name(cls, name: str) -> str:
        if not re.fullmatch("[a-z0-9][a-z0-9._-]*", name):
            raise ValueError(f"Expected lower-case letters, digits, '.', '_' and '-', such as {as_name(name)!r}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        content = dict(content)
        if "license" in content and "licence" not in content:
            content["licence"] = content.pop("license")
        if isinstance(content.get("name"), str):
            content.setdefault("title", content["name"])
        content.setdefault("purpose", "train" if content.get("task") is None else "evaluate")
        return content

    @field_validator("recaptions", "task")
    @classmethod
    def _require_fields_of_purpose(cls, value: Any, info: ValidationInfo) -> Any:
        purpose = info.data.get("purpose")  # None if it is invalid
        if info.field_name == "task" and purpose and (purpose == "evaluate") != (value is not None):
            raise ValueError("'task' belongs to, and only to, a manifest whose purpose is 'evaluate'")
        if info.field_name == "recaptions" and purpose == "evaluate" and value:
            raise ValueError("'recaptions' belongs to manifests whose purpose is 'train'")
        return value

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and validate a manifest.

        Raises:
            UserError: The file cannot be read as YAML, or a field is missing, unknown or invalid. The message names
                file, field and value.
        """
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} is invalid: got {shortened(content)}, expected a mapping of fields.")
        try:
            return cls.model_validate(content)
        except ValidationError as problem:
            raise UserError(_name_mistakes(path, describe_mistakes(problem, cls, content))) from problem

    def scored_as(self, kind: str) -> "Manifest":
        """Return an evaluation set under another kind of task."""
        return self.model_copy(
            update={"task": self.task and self.task.model_copy(update={"kind": kind, "views": None})}
        )

    @property
    def rows(self) -> dict[str, Any]:
        """The fields that decide the rows of a store. A store is only resumed with the same fields."""
        fields = {"name", "source"} | ({"recaptions"} if self.recaptions else set())
        return self.model_dump(mode="json", include=fields)

    def requirements(self, data_root: Path) -> dict[str, bool]:
        """Return the files, folders and packages that the data set needs, and whether each is present."""
        found = self.source.requirements(data_root)
        return found | (self.recaptions.requirements(data_root) if self.recaptions else {})

    def is_here(self, data_root: Path) -> bool:
        """Whether everything that the data set needs is present. No file is opened."""
        return all(self.requirements(data_root).values())

    def require_task(self) -> TaskSettings:
        """Return the task of an evaluation set. Raise `UserError` if the manifest is for training."""
        if self.task is None:
            raise UserError(
                f"Manifest {self.name!r} is for training. Give an evaluation set. To score on data of your own, add "
                "`task: {kind: retrieval}` (or another kind) to their manifest."
            )
        return self.task

    def require_here(self, data_root: Path, reference: str) -> None:
        """Raise `UserError` unless the data are here. `reference` is how the user named the manifest."""
        if not self.is_here(data_root):
            how = command("sail-extract", "check", reference)
            raise UserError(f"The data of {self.name!r} are not in {shown_root(data_root)}. See `{how}`.")

    def open_source(self, data_root: Path) -> Source:
        """Open the source, with the tables of further captions if there are any.

        Raises:
            UserError: Files are missing or do not match the description.
        """
        source = self.source.open(data_root)
        if self.recaptions:
            source.recaptions = self.recaptions.open(data_root)
            for name in self.recaptions.captions:
                if name in source.captions:
                    raise UserError(f"{self.name} already has a caption {name!r}. Rename it under 'recaptions'.")
        return source


def packaged_manifests() -> dict[str, Path]:
    """Return the manifests that come with the project, by name."""
    folder = resources.files("sail_align.data_manifests")
    paths = (Path(str(entry)) for entry in folder.iterdir())
    return {path.stem: path for path in sorted(paths) if path.suffix == ".yaml"}


def is_manifest(reference: str) -> bool:
    """Return whether a path is that of a manifest, by its ending."""
    return Path(reference).suffix in {".yaml", ".yml"}


def find_manifest(reference: str, data_root: str | Path | None = None) -> tuple[Manifest, Path]:
    """Read a manifest by its packaged name or its path, and find its data root.

    The data root is `data_root`, else `$SAIL_DATA_ROOT`, else `./data` for a packaged manifest and the folder of the
    file for any other.

    Raises:
        UserError: The manifest does not exist or is invalid.
    """
    path, packaged = Path(reference), packaged_manifests()
    if reference in packaged:
        path, default_root = packaged[reference], Path("data")
    elif is_manifest(reference) and path.is_file():
        default_root = path.parent
    elif is_manifest(reference):
        raise UserError(f"{reference} is missing. Give the path of a manifest, or the name of a packaged one.")
    elif path.exists():
        how = command("sail-extract", "init", reference)
        raise UserError(
            f"{reference} is not a manifest. Make one with `{how}`, or give its data to `sail-extract run`."
        )
    else:
        names = ", ".join(packaged)
        raise UserError(
            f"Manifest {reference!r} is unknown. Give a path to a .yaml file or to your data, or one of: {names}."
        )
    return Manifest.read(path), data_root_of(data_root, default_root)


def data_root_of(given: str | Path | None, default: Path) -> Path:
    """Return the data root: the given one, else `$SAIL_DATA_ROOT`, else a default."""
    return Path(given or os.environ.get("SAIL_DATA_ROOT") or default)


def shown_root(root: Path) -> str:
    """Return a data root for a message. The current folder is named by its path."""
    return str(root if root.parts else root.absolute())


def _name_mistakes(path: Path, mistakes: list[str]) -> str:
    """Return the message about a manifest's mistakes: one line if there is only one."""
    if len(mistakes) == 1:
        return f"{path}: {mistakes[0]}"
    shown = [f"\n  {mistake}" for mistake in mistakes[:MOST_MISTAKES]]
    more = f"\n  and {len(mistakes) - MOST_MISTAKES} more" if len(mistakes) > MOST_MISTAKES else ""
    return f"{path} has {len(mistakes)} mistakes:{''.join(shown)}{more}"
