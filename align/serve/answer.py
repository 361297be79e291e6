"""The answer to a search: the same data for the page and for programs."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np

from sail_align.align.runs.folder import RunFolder
from sail_align.align.search.index import SearchIndex
from sail_align.align.search.query import Term
from sail_align.align.search.results import Found, Hit
from sail_align.align.serve.asked import Asked
from sail_align.align.serve.pictures import SIDES, Uploads
from sail_align.align.stats.overlay import PALETTE, REST, overlay
from sail_align.extract.data import UnreadableImageError
from sail_align.extract.errors import UserError


@dataclass(frozen=True)
class ZeroShot:
    """Probabilities of labels for the picture of a query, highest first, with their colours in the overlay.

    `problem` says why there is no overlay; "" if there is one.
    """

    rows: list[tuple[str, float, str]]
    problem: str = ""


@dataclass(frozen=True)
class OfRun:
    """The answer of one run: its results, or an error."""

    name: str
    index: SearchIndex
    found: Found | None = None
    zero_shot: ZeroShot | None = None
    error: str = ""


@dataclass(frozen=True)
class GivenRow:
    """A row that a query names: its store, its number, its key, and a caption."""

    store: int
    row: int
    key: str
    text: str


@dataclass(frozen=True)
class Answer:
    """The answers of all runs to what was asked."""

    asked: Asked
    runs: list[OfRun] = field(default_factory=list)
    rows: list[GivenRow] = field(default_factory=list)
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether no run has an answer."""
        return bool(self.error) or (bool(self.runs) and all(run.error for run in self.runs))

    def to_dict(self) -> dict[str, Any]:
        """Return the answer, ready for JSON."""
        if self.error:
            return {"error": self.error}
        return {"query": self.asked.q, "pictures": self.asked.picture, "runs": [_run_dict(run) for run in self.runs]}


def answer(indexes: Sequence[SearchIndex], asked: Asked, uploads: Uploads) -> Answer:
    """Search with each run."""
    if asked.is_empty:
        return Answer(asked, [OfRun(name, index) for name, index in named(indexes)])
    try:
        terms = asked.terms(uploads)
    except UserError as problem:
        return Answer(asked, error=str(problem))
    runs = []
    for name, index in named(indexes):
        try:
            found = index.search(
                terms,
                asked.count,
                space=asked.space or None,
                where=asked.where,
                collapse=not asked.duplicates,
            )
            shown = _zero_shot(index, terms, asked.label_names)
            runs.append(OfRun(name, index, found, shown))
        except UserError as problem:
            runs.append(OfRun(name, index, error=str(problem)))
    return Answer(asked, runs, _given_rows(indexes[0], terms))


def named(indexes: Sequence[SearchIndex]) -> list[tuple[str, SearchIndex]]:
    """Return the indexes with the names of their runs."""
    return [(RunFolder(index.run.path).name, index) for index in indexes]


def picture_of(terms: Sequence[Term]) -> Term | None:
    """Return the one picture or row that a query consists of, None for other queries."""
    return terms[0] if len(terms) == 1 and terms[0].kind != "text" and terms[0].sign == 1 else None


def segmented(index: SearchIndex, term: Term, labels: Sequence[str]) -> bytes:
    """Return the picture of a query with each pixel tinted by its label, as PNG.

    Raises:
        UserError: The picture cannot be opened, or the encoder's patches have no embeddings.
    """
    picture: Any = term.value
    if term.kind == "key":
        shelf, row = index.locate(index.find(term.value))
        try:
            picture = shelf.pictures.open(shelf.reader.facts(row).image)
        except UnreadableImageError as problem:
            raise UserError(f"The picture cannot be opened: {problem}.") from problem
    found = index.encoders.segment(picture, labels)
    step = -(-max(found.shape) // SIDES[1])
    content = BytesIO()
    overlay(picture, found[::step, ::step], dict(enumerate(PALETTE))).save(content, "PNG")
    return content.getvalue()


def _zero_shot(index: SearchIndex, terms: Sequence[Term], labels: Sequence[str]) -> ZeroShot | None:
    term = picture_of(terms)
    if term is None or not labels:
        return None
    values = index.probabilities(term, labels)
    colours = [f"rgb{PALETTE[place] if place < len(PALETTE) else REST}" for place in range(len(labels))]
    rows = [(labels[place], values[place], colours[place]) for place in np.argsort(-np.array(values), kind="stable")]
    try:
        index.encoders.image.require_patches()
    except UserError as problem:
        return ZeroShot(rows, str(problem))
    return ZeroShot(rows)


def _given_rows(index: SearchIndex, terms: Sequence[Term]) -> list[GivenRow]:
    rows = []
    for term in terms:
        with suppress(UserError):
            if term.kind == "key":
                shelf, row = index.locate(index.find(term.value))
                facts = shelf.reader.facts(row)
                text = next(iter(facts.captions.values()), facts.key)
                rows.append(GivenRow(index.shelves.index(shelf), row, facts.key, text))
    return rows


def _run_dict(run: OfRun) -> dict[str, Any]:
    if run.error or run.found is None:
        return {"run": run.name, "error": run.error or None, "hits": []}
    shown = run.zero_shot
    probabilities = {"labels": {label: value for label, value, _ in shown.rows}} if shown else {}
    hits = [_hit_dict(hit) for hit in run.found.hits]
    return {"run": run.name, "space": run.found.space, "rows": run.found.rows, **probabilities, "hits": hits}


def _hit_dict(hit: Hit) -> dict[str, Any]:
    """Return a result. Paths of this machine are left out."""
    content = {name: value for name, value in hit.to_dict().items() if name not in ("path", "image")}
    return {**content, "thumbnail": f"/rows/{hit.store}/{hit.facts.row}?side={SIDES[0]}"}
