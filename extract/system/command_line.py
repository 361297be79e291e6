"""Common parts of the three commands' command lines."""

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sail_align.extract.errors import UserError, WorkersFailedError, printable

Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 …; auto uses a GPU if there is one.", rich_help_panel="Run")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.", rich_help_panel="Run")]
DataRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder of the manifest's files.  [default: $SAIL_DATA_ROOT, else data/ or the .yaml's folder]",
        rich_help_panel="Data",
    ),
]

GROUPS = ("Arguments", "Data", "Encoders", "Heads", "Loss", "Optimiser", "Run", "Options")


def run_command(app: Callable[[], object]) -> None:
    """Run a console command, before torch is imported.

    A user's mistake prints one line to stderr and exits with code 2, failed workers with code 1.
    """
    # Let torch's threads sleep while they wait for each other. By default they spin for a while, on cores that image
    # decoders need, or the thread they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding has no →
    try:
        app()
    except (UserError, WorkersFailedError) as problem:
        print(printable(f"error: {problem}"), file=sys.stderr)
        sys.exit(2 if isinstance(problem, UserError) else 1)
    except OSError as problem:
        if problem.filename is None or isinstance(problem, FileNotFoundError):
            raise
        print(printable(f"error: {problem.filename} cannot be used ({problem.strerror})."), file=sys.stderr)
        sys.exit(2)


class GroupedCommand(TyperCommand):
    """A command whose `--help` lists its options under the names of their `rich_help_panel`, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, group by group."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups[getattr(parameter, "rich_help_panel", None) or kind].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
