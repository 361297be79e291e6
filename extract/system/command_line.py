"""Common parts of the three commands' command lines."""

import functools
import inspect
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from sail_align.extract.errors import UserError, WorkersFailedError, printable
from sail_align.extract.system.usage import exceptions, unexpected_arguments, unknown_command, usage_error

Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1 …; auto uses a GPU if there is one.", rich_help_panel="Run"),
]
Devices = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1 …; auto uses a GPU if there is one, cuda:0,cuda:1 spreads an encoder over two.",
        rich_help_panel="Run",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.", rich_help_panel="Run")]
DataRoot = Annotated[
    str | None,
    typer.Option(
        help="Folder of the manifest's files.  [default: $SAIL_DATA_ROOT, else data/ or the .yaml's folder]",
        rich_help_panel="Data",
    ),
]

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and all else to stderr.", rich_help_panel="Run")
]
Result = dict[str, Any] | None
"""Result of a command, ready for JSON; None if another process prints it."""
Command = TypeVar("Command", bound=Callable[..., Result])

JSON_SCHEMA = 1

GROUPS = ("Arguments", "Data", "Encoders", "Heads", "Loss", "Optimiser", "Run", "Options")


def make_app(about: str | None) -> typer.Typer:
    """Return a program without commands. `about` is the text of its help."""
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}  # commands inherit them
    app = typer.Typer(
        cls=Program,
        help=about,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings=settings,
    )

    @app.callback()
    def options(
        show_version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    return app


def _print_version(context: typer.Context, show: bool) -> None:
    if show:
        typer.echo(f"{context.info_name} {version('sail-align')}")
        raise typer.Exit


def run_command(app: Callable[..., object]) -> None:
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
        code = app(prog_name=os.path.basename(sys.argv[0]), standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Abort:
        sys.exit(130)  # as shells report Ctrl-C
    except (UserError, WorkersFailedError) as problem:
        print(printable(f"error: {problem}"), file=sys.stderr)
        sys.exit(2 if isinstance(problem, UserError) else 1)
    except OSError as problem:
        if problem.filename is None or isinstance(problem, FileNotFoundError):
            raise
        print(printable(f"error: {problem.filename} cannot be used ({problem.strerror})."), file=sys.stderr)
        sys.exit(2)


class BadResult(typer.Exit):
    """A result for which a command exits with 1, such as a damaged store."""

    def __init__(self, result: Result):
        super().__init__(1)
        self.result = result


def with_json(command: Command) -> Command:
    """Add `--json` to a command. Its result is then printed as one JSON document, and its text goes to stderr."""

    @functools.wraps(command)
    def run(context: typer.Context, as_json: bool = False, **options: Any) -> None:
        if not as_json:
            command(**options)
            return
        with _text_to_stderr():
            try:
                result, end = command(**options), None
            except BadResult as bad:
                result, end = bad.result, bad
        if result is not None:
            document = {"schema": JSON_SCHEMA, "command": context.command_path, **result}
            print(json.dumps(jsonable(document), indent=1, allow_nan=False))
        if end:
            raise end

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *inspect.signature(command).parameters.values(),
        inspect.Parameter("as_json", keyword, default=False, annotation=Json),
    ]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    return run  # type: ignore[return-value]


def jsonable(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinity become null, paths, enums and other objects text."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    return jsonable(value.tolist()) if hasattr(value, "tolist") else str(value)


@contextmanager
def _text_to_stderr() -> Iterator[None]:
    """Send all that is printed to stderr, by libraries and child processes, too."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _plain(usage: str) -> str:
    """Return an option or argument with the kind of its values in plain words: <path> for <list[Path]>."""
    return re.sub(r"<(?:list\[)?(\w+)\]?(?: range)?>", lambda found: f"<{found[1].lower()}>", usage)


class Program(TyperGroup):
    """A program with commands. Mistakes raise `UserError`; without any word, it prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what precedes the command."""
        if not args:
            typer.echo(ctx.get_help())
            raise typer.Exit
        try:
            return super().parse_args(ctx, list(args))
        except exceptions.UsageError as problem:
            raise usage_error(ctx, problem, args) from problem

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command."""
        if self.get_command(ctx, args[0]) is None:
            raise unknown_command(ctx.info_name, args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


class GroupedCommand(TyperCommand):
    """A command whose `--help` lists its options under the names of their `rich_help_panel`, as plain text.

    Mistakes in its command line raise `UserError`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse options and arguments."""
        takes_more, ctx.allow_extra_args = ctx.allow_extra_args, True
        try:
            rest = super().parse_args(ctx, list(args))
        except exceptions.UsageError as problem:
            raise usage_error(ctx, problem, args) from problem
        if rest and not takes_more:
            raise unexpected_arguments(ctx, rest)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, group by group."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups[getattr(parameter, "rich_help_panel", None) or kind].append((_plain(record[0]), record[1]))
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
