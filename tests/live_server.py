"""The search page served on the loopback interface, in a thread of the tests."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import uvicorn

from sail_align.align.search.index import SearchIndex
from sail_align.align.serve.app import SearchServer


@dataclass(frozen=True)
class Live:
    """A running server, and requests to it."""

    server: SearchServer
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> HTTPResponse:
        """Send a request. Underscores in the names of headers stand for hyphens. The answer's body is in `content`."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.content = response.read()
        connection.close()
        return response

    def json(self, path: str, **options: Any) -> Any:
        """Return the JSON at a path."""
        return json.loads(self.ask(path, accept="application/json", **options).content)


@contextmanager
def serving(indexes: Sequence[SearchIndex], *, token: str = "", prepare: bool = True) -> Iterator[Live]:
    """Serve indexes during the block, with everything embedded unless `prepare` is false."""
    server = SearchServer(indexes)
    if prepare:
        server.preparation.start()
        server.preparation.wait()
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(server.app(token), log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield Live(server, listening.getsockname()[1])
    finally:
        running.should_exit = True
        thread.join()
