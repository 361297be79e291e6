"""sail-align search: pictures of a store that fit a text or a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sail_align.align.cli.options import WhichCheckpoint
from sail_align.extract.cli.options import StorePath
from sail_align.extract.errors import UserError, printable
from sail_align.extract.system.command_line import DataRoot, Device, Quiet, Result, with_json
from sail_align.extract.system.files import require_store

if TYPE_CHECKING:
    from sail_align.align.search.results import Hit

SHOWN_CHARACTERS = 90

RunReference = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run, checkpoint, exported folder or owner/name on the hub.", show_default=False
    ),
]
Manifests = Annotated[
    list[str] | None,
    typer.Option(
        "--manifest",
        metavar="YAML",
        help="Manifest of a store, to find its pictures. Can be repeated.  [default: the one beside the store]",
        rich_help_panel="Data",
    ),
]
RemoteCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-remote-code",
        metavar="OWNER/NAME@COMMIT",
        help="Repository of an encoder whose own code may run.",
        rich_help_panel="Run",
    ),
]


@with_json
def search(
    run: RunReference,
    store: StorePath,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="QUERY", help="Text, or a sum such as 'horse + stripes - key:0041.jpg'.", show_default=False
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-k", help="Number of results.")] = 10,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Picture to search with, added to the text. Can be repeated."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="corrected|aligned|frozen",
            help="Compare by hub-corrected similarities, cosines of embeddings, or those of the frozen image encoder.  "
            "[default: corrected for texts if the run has a correction, else aligned]",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="NAME", help="Only rows of this class.")] = None,
    caption: Annotated[str | None, typer.Option(metavar="TEXT", help="Only rows with this text in a caption.")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="training|held-out", help="Only rows that the run was trained on, or held out."),
    ] = None,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Keep near-duplicates of better results.")] = False,
    paths: Annotated[bool, typer.Option("--paths", help="Print only the paths of the pictures, one per line.")] = False,
    manifest: Manifests = None,
    data_root: DataRoot = None,
    checkpoint: WhichCheckpoint = None,
    allow_remote_code: RemoteCode = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> Result:
    """Search the pictures of a store with a text, a picture, or sums of these. The search is exact.

    The images are embedded once, and kept in the folder of the run.
    """
    from sail_align.align.search.query import parse_query, require_terms

    terms = parse_query(query or "")
    pictures = [_read(file) for file in image or ()]
    if not pictures:
        require_terms(terms)
    if count < 1:
        raise UserError(f"--count is invalid: got {count}, expected at least 1.")
    require_run(run)
    require_store(store)

    from sail_align.align.hub.reference import read
    from sail_align.align.search.index import SearchIndex
    from sail_align.align.search.query import Term
    from sail_align.align.search.results import Where
    from sail_align.extract.store.store import Store

    index = SearchIndex.open(
        read(run, checkpoint=checkpoint),  # type: ignore[arg-type]  # it checks the name
        [Store.open(store)],
        device=device,
        manifests=manifest or (),
        data_root=data_root,
        allow_remote_code=allow_remote_code or (),
    )
    found = index.search(
        [*terms, *(Term(picture, "image") for picture in pictures)],
        count,
        space=space,
        where=Where(label, caption, split),
        collapse=not duplicates,
        quiet=quiet,
    )
    if paths:
        _print_paths(found.hits, index.shelves[0].pictures.problem)
    else:
        _print_hits(found.hits)
        what = "hub-corrected similarity" if found.space == "corrected" else f"cosine ({found.space})"
        left_out = sum(hit.copies for hit in found.hits)
        copies = f"; {left_out} near-duplicates left out" if left_out else ""
        typer.echo(f"{len(found.hits)} of {found.rows:,} images by {what}{copies}", err=True)
    return {
        "run": run,
        "store": str(store),
        "query": query or "",
        "images": list(map(str, image or ())),
        "space": found.space,
        "rows": found.rows,
        "hits": [hit.to_dict() for hit in found.hits],
    }


def require_run(reference: str) -> None:
    """Raise `UserError`, before torch is imported, if a path is not that of a run. `read` checks repositories."""
    from sail_align.align.runs.folder import RunFolder

    path = Path(reference)
    is_repository = reference.count("/") == 1 and not reference.startswith((".", "/", "~", "runs/"))
    if not RunFolder(path).is_export and (path.exists() or not is_repository):
        RunFolder(path).require()


def _read(file: Path) -> Any:
    from sail_align.extract.data import UnreadableImageError
    from sail_align.extract.sources.images import read_image

    try:
        return read_image(file)
    except UnreadableImageError as problem:
        raise UserError(f"--image {file} cannot be used: {problem}.") from problem


def _print_hits(hits: "list[Hit]") -> None:
    width = max((len(hit.facts.key) for hit in hits), default=0)
    for hit in hits:
        text = next(iter(hit.facts.captions.values()), hit.label)
        text = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
        line = f"{hit.score:7.3f}  {hit.facts.key.ljust(min(width, 60))}  {text}"
        typer.echo(printable(" ".join(line.split("\n")).rstrip()))


def _print_paths(hits: "list[Hit]", problem: str) -> None:
    if missing := [hit for hit in hits if hit.path is None]:
        why = problem or f"{missing[0].facts.image!r} is in an archive."
        raise UserError(f"The pictures have no paths: {why}")
    for hit in hits:
        typer.echo(str(hit.path))
