"""sail-align serve: the search page."""

import secrets
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.cli.options import WhichCheckpoint
from sail_align.align.cli.search import Manifests, RemoteCode, RunReference, require_run
from sail_align.extract.errors import UserError, import_extra
from sail_align.extract.system.command_line import DataRoot, Device
from sail_align.extract.system.files import as_path, require_store

LOOPBACK = "127.0.0.1"
INSTALL = "`sail-align serve` needs two more packages. Run: pip install 'sail-align[serve]'."


def serve(
    run: RunReference,
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE…", help="Feature stores.", show_default=False, parser=as_path)
    ],
    compare: Annotated[
        str | None, typer.Option(metavar="RUN", help="Another run, whose results are shown beside.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port; 0 takes any that is free.", min=0, max=65_535)] = 8_000,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on for other machines, which need the printed token.  [default: this machine only]",
        ),
    ] = None,
    manifest: Manifests = None,
    data_root: DataRoot = None,
    checkpoint: WhichCheckpoint = None,
    allow_remote_code: RemoteCode = None,
    device: Device = "auto",
) -> None:
    """Search stores in the browser.

    The server only reads, fetches nothing, and answers this machine alone unless --host is given.
    """
    for reference in (run, *([compare] if compare else [])):
        require_run(reference)
    for store in stores:
        require_store(store)
    for name in ("starlette", "uvicorn"):
        import_extra(name, INSTALL)

    listening = _listen(host or LOOPBACK, port)

    import uvicorn

    from sail_align.align.hub.reference import read
    from sail_align.align.search.index import SearchIndex
    from sail_align.align.serve.app import SearchServer
    from sail_align.extract.store.store import Store

    weights: Any = checkpoint
    opened = [Store.open(store) for store in stores]
    indexes = [
        SearchIndex.open(
            each,
            opened,
            device=device,
            manifests=manifest or (),
            data_root=data_root,
            allow_remote_code=allow_remote_code or (),
        )
        for each in (read(run, checkpoint=weights), *([read(compare)] if compare else []))
    ]
    server = SearchServer(indexes)
    server.preparation.start()
    token = secrets.token_urlsafe(24) if host else ""
    address, taken = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    typer.echo(f"Open http://{shown}:{taken}/{f'?token={token}' if token else ''}    (Ctrl-C ends it)")
    config = uvicorn.Config(server.app(token), log_level="warning", server_header=False, proxy_headers=False)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        server.preparation.stop()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises `UserError` if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2_048)  # from now on, connections wait for the server
    except (OSError, UnicodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{host}:{port} cannot be listened on ({reason}). Pass another --port.") from problem
    return listening
