"""Command-line options made from the declarations of settings, and options that several commands share."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sail_align.align.settings import SETTINGS
from sail_align.extract.system.files import as_path

Command = TypeVar("Command", bound=Callable[..., object])

Features = Annotated[
    list[Path],
    typer.Option(metavar="STORE", help="Feature store. Can be repeated.", rich_help_panel="Data", parser=as_path),
]
_ENCODER = "{} encoder to use if a store has more than one; A+B joins the features of two."
ImageEncoder = Annotated[str | None, typer.Option(help=_ENCODER.format("Image"), rich_help_panel="Data")]
TextEncoder = Annotated[str | None, typer.Option(help=_ENCODER.format("Text"), rich_help_panel="Data")]

WhichCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last",
        help="Which weights of the run: those with the best scores on held-out pairs, or the last.  [default: best]",
    ),
]

_METAVARS: dict[Any, str] = {int: "<int>", float: "<float>"}


def with_settings(*names: str, defaults: Mapping[str, str] | None = None) -> Callable[[Command], Command]:
    """Replace a command's `**given` by an option for each of these settings; None stands for one that is not given.

    Args:
        names: Names of settings; by default all.
        defaults: Texts of defaults that differ from those of `fit`.
    """

    def decorate(command: Command) -> Command:
        parameters = [
            each
            for each in inspect.signature(command).parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        for setting in (SETTINGS[name] for name in names or SETTINGS):
            paper, small = setting.defaults
            shown = (defaults or {}).get(setting.name) or (paper if small == paper else f"{paper}; small: {small}")
            words = (*setting.choices, *(("NUMBER",) if setting.number else ()))
            option = typer.Option(
                metavar="|".join(words) if setting.choices else _METAVARS.get(setting.number),
                help=f"{setting.help}  [default: {shown}]" if shown else setting.help,
                rich_help_panel=setting.group,
            )
            annotation = Annotated[str | None, option]  # `Setting.parse` converts it, with messages of its own
            parameters.append(
                inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        command.__dict__["__signature__"] = inspect.Signature(parameters)
        return command

    return decorate
