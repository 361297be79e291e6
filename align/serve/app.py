"""The server of the search page: its routes, and the work that it starts with."""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from logging import getLogger
from typing import Any
from urllib.parse import parse_qs, parse_qsl

from jinja2 import Environment
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from sail_align.align.search.index import SearchIndex
from sail_align.align.search.splits import SPLITS
from sail_align.align.serve.answer import Answer, answer, named, picture_of, segmented
from sail_align.align.serve.asked import COUNTS, Asked
from sail_align.align.serve.guard import Guard
from sail_align.align.serve.pictures import MOST_UPLOADED, SIDES, Thumbnails, Uploads, jpeg
from sail_align.align.stats.pages import page_environment
from sail_align.extract.data import UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.system.command_line import jsonable

_log = getLogger(__name__)

FILES = {"page.css": "text/css", "page.js": "text/javascript", "missing.svg": "image/svg+xml"}
KEEP = {"cache-control": "private, max-age=600"}
NOT_KEPT = {"cache-control": "no-store"}
ASKED_AGAIN = {"cache-control": "private, no-cache"}
"""For what depends on the stores and the runs: after a restart, the same address may have others."""


class Preparation:
    """The work that a server starts with: embedding the images and loading the text encoder, in a thread of its own.

    Attributes:
        total: Number of images to embed, over all runs.
        done: Number of those that are embedded.
        error: Message if it failed.
        ready: Whether it has ended.
    """

    def __init__(self, indexes: Sequence[SearchIndex]):
        self._indexes = indexes
        self.total, self.done, self.error, self.ready = sum(map(len, indexes)), 0, "", False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopped = False

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def stop(self) -> None:
        """End it after the current step: the interpreter must not exit while a thread is in PyTorch."""
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            for index in self._indexes:
                before = self.done
                index.build(index.spaces[0], advance=self._advance)
                self.done = before + len(index)
                for shelf in index.shelves:
                    _ = shelf.pictures.problem  # opens its source
                index.warm_up()
        except (UserError, OSError) as problem:
            self.error = str(problem)
        except Exception as problem:  # noqa: BLE001 (the page must not wait for ever)
            _log.exception("The server cannot search.")
            self.error = f"{type(problem).__name__}: {problem}"
        self.ready = True

    def _advance(self, count: int) -> None:
        if self._stopped:
            raise UserError("The server is stopping.")
        self.done += count


class SearchServer:
    """The page and its parts. It reads; all that it keeps is in memory and bounded.

    Args:
        indexes: One index per run, of the same stores.
    """

    def __init__(self, indexes: Sequence[SearchIndex]):
        self.indexes = list(indexes)
        self.preparation = Preparation(self.indexes)
        self._uploads, self._thumbnails = Uploads(), Thumbnails()
        self._template = _environment().get_template("page.html.j2")

    def app(self, token: str = "") -> Callable[..., Any]:
        """Return the ASGI application. Clients need the token unless it is ""."""
        routes = [
            Route("/", self._page),
            Route("/progress", self._progress),
            Route("/rows/{store:int}/{row:int}", self._row),
            Route("/pictures", self._upload, methods=["POST"]),
            Route("/pictures/{name:str}", self._picture),
            Route("/overlay", self._overlay),
            Route("/{name:str}", self._file),
        ]
        return Guard(Starlette(routes=routes), token)

    def _page(self, request: Request) -> Response:
        given = parse_qs(request.url.query, keep_blank_values=True)
        as_json = _wants_json(request, given)
        try:
            asked = Asked.parse(given)
            problem = self.preparation.error
        except UserError as mistake:
            asked, problem = Asked(), str(mistake)
        if problem:
            found = Answer(asked, error=problem)
        elif not self.preparation.ready:
            if as_json:
                return JSONResponse({"progress": self._state()}, 503, {"retry-after": "1"})
            found = Answer(asked)
        else:
            found = answer(self.indexes, asked, self._uploads)
        status = 400 if found.failed else 200
        if as_json:
            return JSONResponse(jsonable(found.to_dict()), status, NOT_KEPT)
        return HTMLResponse(self._render(found), status, {**NOT_KEPT, "vary": "accept"})

    def _render(self, found: Answer) -> str:
        stores = [shelf.store for shelf in self.indexes[0].shelves]
        shelves = self.indexes[0].shelves if self.preparation.ready else []
        classes = [name for shelf in shelves for name in shelf.pictures.classes]
        return self._template.render(
            asked=found.asked,
            answer=found,
            runs=[name for name, _ in named(self.indexes)],
            stores=stores,
            images=len(self.indexes[0]),
            classes=list(dict.fromkeys(classes)),
            spaces=list(dict.fromkeys(space for index in self.indexes for space in index.spaces)),
            splits=SPLITS,
            counts=sorted({*COUNTS, found.asked.count}),
            progress=None if self.preparation.ready else self._state(),
            problems=[shelf.pictures.problem for shelf in shelves if shelf.pictures.problem],
        )

    def _state(self) -> dict[str, Any]:
        state = self.preparation
        return {"done": min(state.done, state.total), "total": state.total, "ready": state.ready, "error": state.error}

    def _progress(self, request: Request) -> Response:
        return JSONResponse(self._state(), headers=NOT_KEPT)

    def _row(self, request: Request) -> Response:
        number, row = request.path_params["store"], request.path_params["row"]
        shelves = self.indexes[0].shelves
        side = request.query_params.get("side", str(SIDES[0]))
        if number >= len(shelves) or row >= shelves[number].store.rows or side not in map(str, SIDES):
            return JSONResponse({"error": "There is no such picture."}, 404)
        shelf = shelves[number]
        location = shelf.reader.facts(row).image
        try:
            content = self._thumbnails.of_row((number, row), shelf.pictures, location, int(side))
        except UnreadableImageError:
            return _file("missing.svg", NOT_KEPT)
        return Response(content, media_type="image/jpeg", headers=ASKED_AGAIN)

    async def _upload(self, request: Request) -> Response:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MOST_UPLOADED:
                break
        try:
            name = await run_in_threadpool(self._uploads.add, bytes(content))
        except UserError as problem:
            return JSONResponse({"error": str(problem)}, 400)
        return JSONResponse({"picture": name})

    def _picture(self, request: Request) -> Response:
        try:
            image = self._uploads.open(request.path_params["name"])
        except UserError:
            return _file("missing.svg", NOT_KEPT)
        return Response(jpeg(image, SIDES[0]), media_type="image/jpeg", headers=KEEP)

    def _overlay(self, request: Request) -> Response:
        given = parse_qs(request.url.query)
        try:
            asked = Asked.parse(given)
            number = given.get("run", ["0"])[-1]
            term = picture_of(asked.terms(self._uploads))
            if term is None or not asked.label_names or number not in map(str, range(len(self.indexes))):
                raise UserError("An overlay needs a picture and labels.")
            content = segmented(self.indexes[int(number)], term, asked.label_names)
        except UserError as problem:
            return JSONResponse({"error": str(problem)}, 400)
        return Response(content, media_type="image/png", headers=ASKED_AGAIN)

    def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        return _file(name, KEEP) if name in FILES else JSONResponse({"error": "There is no such page."}, 404)


def _wants_json(request: Request, given: dict[str, list[str]]) -> bool:
    accepted = request.headers.get("accept", "")
    return given.get("format") == ["json"] or ("application/json" in accepted and "text/html" not in accepted)


def _file(name: str, headers: dict[str, str]) -> Response:
    return Response(_content(name), media_type=FILES[name], headers=headers)


@cache
def _content(name: str) -> str:
    if name == "page.css":
        return _environment().get_template(name).render()
    return resources.files("sail_align.align.serve").joinpath(name).read_text()


@cache
def _environment() -> Environment:
    environment = page_environment("sail_align.align.serve")
    environment.filters["fields"] = lambda url: parse_qsl(url.partition("?")[2])
    return environment
