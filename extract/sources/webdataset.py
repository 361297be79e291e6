"""Source kind `webdataset`: tars of samples in the form of WebDataset and img2dataset."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field

from sail_align.extract.data import Part, Sample, Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError, listing
from sail_align.extract.sources.config import FilesConfig, NonEmpty, SourceConfig
from sail_align.extract.sources.file_set import RANGE, FileSet
from sail_align.extract.sources.images import read_image
from sail_align.extract.sources.labels import ClassList, read_class_list
from sail_align.extract.sources.tars import BLOCK, DamagedTarError, TarSamples, header_size
from sail_align.extract.sources.tars import members as tar_members

_log = logging.getLogger(__name__)

PROBED = 300
"""Number of members of the first tar among which texts are looked for, if the manifest names no captions."""

_LONGEST_LABEL = 20

Origin = Annotated[str, Field(pattern=r"^(json:.+|[^:.][^:]*)$")]
"""Origin of a value in a sample: `txt` is the member with that ending, `json:caption` a field of its json."""


class WebDatasetConfig(FilesConfig, SourceConfig):
    """Tars of samples. Members with the same key (`<key>.jpg`, `<key>.txt`, …) make up one sample.

    `files` are tars under `root`, absolute paths or URLs, given as names, globs or ranges (`{00000..00331}.tar`).
    `captions` maps a caption's name to its origin. With a single origin, each of its lines (or each text of a list in
    the json) is a caption: `c0`, `c1`, …. Without `captions`, the `.txt` is the caption `raw`, unless there are classes
    or recaptions. A field `json:…` comes from the `.parquet` beside a tar if a sample has no
    json. `classes` is a file under `root` (or a URL) with one class name per line, a published list
    (`open_clip:imagenet`), or the names themselves. `label` is then the origin of the class number, and `group` that of
    the sample's group. If a sample has several images, the first ending in `images` counts.
    """

    omitted: ClassVar[frozenset[str]] = frozenset({"group"})

    kind: Literal["webdataset"]
    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] = "*.tar"
    captions: Origin | dict[str, Origin] = Field(default={})
    url: Origin = "json:url"
    label: Origin = "cls"
    classes: ClassList | None = None
    group: Origin | None = None
    images: Annotated[list[NonEmpty], Field(min_length=1)] = Field(default=["jpg", "jpeg", "png", "webp"])

    @property
    def needs(self) -> list[str]:
        """The tars under `root`, and the list of class names if it is there too."""
        files = [self.files] if isinstance(self.files, str) else self.files
        needed = [RANGE.sub("*", file) for file in files]
        needed += [self.classes] if isinstance(self.classes, str) else []
        return [name for name in needed if ":" not in name and not name.startswith("/")]

    @property
    def urls(self) -> list[str]:
        """The URLs among the tars and the list of class names."""
        files = [self.files] if isinstance(self.files, str) else self.files
        return [name for name in (*files, self.classes) if isinstance(name, str) and "://" in name]

    def open(self, data_root: Path) -> "WebDatasetSource":
        """Open the source."""
        return WebDatasetSource(self, data_root)


class WebDatasetSource(Source):
    """Samples in tars, ordered by their first member.

    A key is `<tar without .tar>/<key in the tar>`, because many data sets number the samples of each tar from zero. An
    image's location is `<tar>:<offset>:<size>`. Damage to a tar is logged as a warning when the tar is read. Its intact
    samples are used.

    Raises:
        UserError: Tars or class names are missing, or the first tar with samples does not match the manifest.
    """

    def __init__(self, config: WebDatasetConfig, data_root: Path):
        self._config = config
        self._files = FileSet(data_root / config.root)
        self._tars = self._files.find(config.files)
        self.classes = read_class_list(config.classes, self._files) if config.classes else ()
        self.has_groups = config.group is not None

    @cached_property
    def caption_origins(self) -> str | dict[str, Origin]:  # type: ignore[override]  # looks into a tar when first used
        """The manifest's `captions`. If it has none, and neither classes nor recaptions, the texts of img2dataset."""
        config = self._config
        if "captions" in config.model_fields_set or self.classes or self.recaptions or not self._have_texts():
            return config.captions
        _log.warning(
            "The manifest names no captions. The .txt of each sample becomes its caption 'raw'. "
            "Write `captions: {}` for images only."
        )
        return {"raw": "txt"}

    def _have_texts(self) -> bool:
        """Return whether there is a .txt with content among the first members of the first tar that has any."""
        for tar in self._tars:
            sizes: dict[str, int] = {}
            with self._files.open(tar) as stream, suppress(DamagedTarError):
                for name, _, size in islice(tar_members(stream, tar), PROBED):
                    ending = name.rpartition("/")[2].partition(".")[2].lower()
                    sizes[ending] = max(size, sizes.get(ending, 0))
            if sizes:
                return sizes.get("txt", 0) > 0
        return False

    @cached_property
    def _origins(self) -> set[str]:
        captions = self.caption_origins
        origins = {captions} if isinstance(captions, str) else {*captions.values()}
        config = self._config
        return origins | {config.url, *([config.label] if self.classes else []), *filter(None, [config.group])}

    def parts(self) -> Sequence[Part]:
        """Return one part per tar, which is read from the tar and the table beside it."""
        return [Part(tar, partial(self._read, tar), self._local_files(tar)) for tar in self._tars]

    def _local_files(self, tar: str) -> tuple[Path, ...]:
        paths = [self._files.local(name) for name in (tar, TarSamples.table_beside(tar))]
        return tuple(path for path in paths if path is not None and path.is_file())

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Read an image from its tar.

        Raises:
            UnreadableImageError: The sample has no image, or it cannot be decoded.
            UserError: The tar is missing, or has changed since it was indexed.
        """
        if not location:
            raise UnreadableImageError(Status.MISSING, "the tar contains no image of this sample")
        tar, offset, size = location.rsplit(":", 2)
        start, stop = int(offset), int(offset) + int(size)
        content = self._files.read(tar, start - BLOCK, stop)
        if header_size(content[:BLOCK]) != int(size):
            raise UserError(f"{tar} has changed since it was indexed: no member of {size} bytes starts at {offset}.")
        if len(content) < BLOCK + int(size):
            raise UnreadableImageError(Status.UNDECODABLE, f"{location}: the tar is truncated")
        return read_image(content[BLOCK:], location, least=least)

    def _read(self, tar: str) -> Iterator[Sample]:
        found, samples = self._parse(tar)
        warnings = [*found.warnings]
        if unused := len(found.samples) - len(samples):
            warnings.append(f"has {unused:,} keys with neither image nor caption, left out")
        if not warnings and not samples:
            warnings.append("contains no samples")
        for warning in warnings:
            _log.warning("%s %s.", tar, warning)
        if tar == self._tars[0]:
            self._require_content(tar, found, samples)
        yield from samples

    def _parse(self, tar: str) -> tuple[TarSamples, list[Sample]]:
        found = TarSamples.read(self._files, tar, self._config.images, self._origins)
        samples = [self._sample(tar, key, members) for key, members in found.samples.items()]
        return found, [sample for sample in samples if sample.image or sample.captions or sample.label >= 0]

    def _sample(self, tar: str, key: str, members: Mapping[str, Any]) -> Sample:
        key = f"{tar.removesuffix('.tar')}/{key}"
        image = next((members[ending] for ending in self._config.images if ending in members), None)
        return Sample(
            key=key,
            image=f"{tar}:{image}" if image else "",
            captions=self._captions_of(key, members),
            label=self._label(key, members.get(self._config.label)) if self.classes else -1,
            url=_text(members.get(self._config.url), self._config.url, key),
            group=_text(members.get(self._config.group), self._config.group, key) if self._config.group else "",
        )

    def _captions_of(self, key: str, members: Mapping[str, Any]) -> dict[str, str]:
        captions = self.caption_origins
        if isinstance(captions, str):
            value = members.get(captions)
            several = value if isinstance(value, list) else _text(value, captions, key).split("\n")
            return self.numbered([text for each in several if (text := _text(each, captions, key))])
        for origin in captions.values():
            if isinstance(members.get(origin), list):
                raise UserError(f"{origin!r} of {key} is not text. If it is a list, write `captions: {origin}`.")
        texts = {name: _text(members.get(origin), origin, key) for name, origin in captions.items()}
        return {name: text for name, text in texts.items() if text}

    def _label(self, key: str, value: object) -> int:
        if value is None or value != value:
            return -1
        number = _text(value, self._config.label, key)
        if not number.isdecimal() or len(number) > _LONGEST_LABEL or int(number) >= len(self.classes):
            got = number[: 2 * _LONGEST_LABEL]
            raise UserError(f"Label of {key} is invalid: got {got!r}, expected 0 to {len(self.classes) - 1}.")
        return int(number)

    def _require_content(self, tar: str, found: TarSamples, samples: Sequence[Sample]) -> None:
        """Raise `UserError` if the description does not match, before millions of rows are indexed without captions.

        If the first tar is empty or damaged, the next one with samples is checked instead.
        """
        others = iter(self._tars[1:])
        while not samples:
            if (another := next(others, None)) is None:
                return
            tar, (found, samples) = another, self._parse(another)
        endings = f"Its members end in {listing(sorted(found.endings))}"
        if not any(sample.image for sample in samples):
            raise UserError(f"{tar} contains no {' or '.join(self._config.images)}. {endings}: correct source.images.")
        captions = self.caption_origins
        for name, origin in {"c0": captions}.items() if isinstance(captions, str) else captions.items():
            if not any(name in sample.captions for sample in samples):
                raise UserError(f"No sample of {tar} has a caption {origin!r}. {endings}: correct source.captions.")


def _text(value: object, origin: str, key: str) -> str:
    """Return a member or field of a sample as text, "" if there is none.

    JSON may contain halves of surrogate pairs, which no file can. They become U+FFFD, as invalid UTF-8 does.

    Raises:
        UserError: The value is neither text nor a number.
    """
    if value is None or value != value:  # NaN, as pandas writes a missing text
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list | dict | bool):
        raise UserError(
            f"{origin!r} of {key} is invalid: got {str(value)[:60]}, expected text. Correct it or the manifest."
        )
    return str(value).strip().encode("utf-8", "surrogatepass").decode("utf-8", "replace")
