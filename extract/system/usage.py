"""Messages on mistakes in a command line: unknown commands and options, missing ones, and values of the wrong type."""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, get_args, get_origin

import typer

from sail_align.extract.errors import UserError, command

exceptions: Any = sys.modules[typer.BadParameter.__module__]
"""Typer's own copy of click's exceptions, or click's: it depends on the version."""

COMMANDS = {
    "sail-extract run": "extract encode cache build features",
    "sail-extract init": "new create manifest",
    "sail-extract check": "datasets data sets list ls available",
    "sail-extract download": "get fetch",
    "sail-extract encoders": "models backbones towers",
    "sail-extract status": "info show inspect stat describe",
    "sail-extract verify": "validate fsck checksum",
    "sail-extract doctor": "diagnose pairing",
    "sail-extract overlap": "dedup deduplicate duplicates leakage contamination",
    "sail-align fit": "train training learn finetune pretrain start",
    "sail-align measure": "cka knn similarity",
    "sail-align probe": "rank linear-probe",
    "sail-align ladder": "ablation ablate ablations sweep",
    "sail-align search": "find query knn-search lookup",
    "sail-align serve": "browse ui web gui app",
    "sail-align embed": "predict infer inference transform",
    "sail-align export": "save convert push upload publish",
    "sail-align runs": "history experiments",
    "sail-eval all": "eval evaluate score scores test benchmark",
    "sail-eval classification": "zeroshot zero-shot classify imagenet",
    "sail-eval retrieval": "retrieve recall",
    "sail-eval segmentation": "segment",
    "sail-eval report": "table html results summary",
    "sail-eval compare": "diff",
    "sail-eval trace": "provenance chain",
}
"""Commands, and the words that users of other programs type for them."""

OPTIONS = {
    "lr": "learning-rate rate",
    "batch-size": "batch bs batchsize",
    "epochs": "epoch num-epochs num-train-epochs max-epochs",
    "steps": "max-steps num-steps iterations iters",
    "weight-decay": "wd decay",
    "warmup": "warmup-steps warmup-ratio",
    "optimizer": "optim opt optimiser",
    "dim": "embed-dim embedding-dim projection-dim output-dim",
    "expansion": "hidden hidden-dim width",
    "temperature": "logit-scale tau",
    "bias": "logit-bias",
    "held-out": "val-split validation val heldout test-size",
    "seed": "random-seed random-state",
    "features": "store stores train-data data dataset input train",
    "out": "output output-dir output-folder output-file out-dir save-dir save-path o",
    "image-encoder": "vision-encoder image-model vision-model vision-tower backbone image",
    "text-encoder": "language-encoder text-model language-model text",
    "device": "gpu gpus cuda",
    "precision": "fp16 bf16 amp dtype half",
    "workers": "num-workers n-workers jobs j nproc",
    "processes": "num-processes nproc jobs j",
    "data-root": "data-dir root data-path",
    "run": "model weights ckpt",
    "track": "wandb tensorboard report-to logger",
    "count": "top-k topk num-results limit n",
    "neighbours": "k neighbors n-neighbors",
    "quiet": "silent q no-progress",
    "licence": "license",
    "to": "format type",
    "json": "as-json output-format",
}
"""Options, and the words that users of other programs type for them."""

NOTES = {
    "resume": "Rerun the same command to resume.",
    "continue": "Rerun the same command to resume.",
    "overwrite": "A rerun never overwrites: it resumes. Pass another --out.",
    "force": "A rerun never overwrites: it resumes. Pass another --out.",
}
"""Options that other programs have and these do not need."""


def unknown_command(program: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown command, with the most similar one of this program or of the others."""
    known = list(known)
    own = [f"{program} {each}" for each in known]
    others = [each for each in _commands_of_all() if each not in own]
    meant = [each for each, words in COMMANDS.items() if name.lower() in words.split() and each in own + others]
    same = [each for each in others if each.split()[1] == name]
    near = get_close_matches(name, known, n=1)
    guesses = [
        *(each for each in meant if each in own),
        *(f"{program} {each}" for each in near),
        *same,
        *meant,
    ]
    guess = f" Did you mean `{guesses[0]}`?" if guesses else ""
    return UserError(f"Command {name!r} of {program} is unknown.{guess} Its commands are: {', '.join(known)}.")


def _commands_of_all() -> list[str]:
    """Return the commands of all three programs, as in `sail-align fit`."""
    programs = [each for each in entry_points(group="console_scripts") if each.value.startswith("sail_align.")]
    return [
        f"{program.name} {each.name}"
        for program in programs
        for each in import_module(program.module).app.registered_commands
    ]


def unknown_option(context: Any, name: str) -> UserError:
    """Return the error for an unknown option, with the one of this command that the user may have meant."""
    known = [option[2:] for each in context.command.params for option in each.opts if option.startswith("--")]
    words = {word: each for each in known for word in (each, *OPTIONS.get(each, "").split())}
    word = name.lstrip("-").replace("_", "-").lower()
    if commands := getattr(context.command, "commands", None):  # the option precedes the command
        having = [each for each, found in commands.items() if any(f"--{word}" in one.opts for one in found.params)]
        hint = f" It belongs after a command: `{context.command_path} {having[0]} --{word}`." if having else ""
    elif word in NOTES and word not in words:
        hint = f" {NOTES[word]}"
    else:
        near = get_close_matches(word, words, n=1)
        hint = f" Did you mean '--{words[near[0]]}'?" if near else ""
    return UserError(f"Option {name} of `{context.command_path}` is unknown.{hint} {_see_help(context)}")


def unexpected_arguments(context: Any, words: Sequence[str]) -> UserError:
    """Return the error for words that are neither options nor arguments of a command."""
    found = ", ".join(map(repr, words))
    return UserError(f"`{context.command_path}` does not take {found}. {_see_help(context)}")


def usage_error(context: Any, problem: Any, given: Sequence[str]) -> UserError:
    """Return the error for what click rejects in a command line.

    Args:
        context: Context of the command.
        problem: The `UsageError` of click.
        given: Words after the command's name.
    """
    if isinstance(problem, exceptions.NoSuchOption):
        return unknown_option(context, problem.option_name)
    if isinstance(problem, exceptions.MissingParameter):
        name, about = _name_of(problem.param), (problem.param.help or "").split(". ")[0].rstrip(".")
        stray = context.command.make_parser(context).parse_args(list(given))[1]
        if stray and name.startswith("--"):
            return UserError(f"{name} is missing. Did you mean `{name} {command(stray[0])}`? {_see_help(context)}")
        return UserError(f"{name} is missing{f' ({about})' if about else ''}. {_see_help(context)}")
    if isinstance(problem, exceptions.BadOptionUsage):
        if given and any(word.startswith(f"{problem.option_name}=") for word in given):
            return UserError(f"{problem.option_name} takes no value. Remove what follows the =.")
        return UserError(f"{problem.option_name} has no value. Give one after it. {_see_help(context)}")
    if isinstance(problem, exceptions.BadParameter) and problem.param is not None:
        value = context.command.make_parser(context).parse_args(list(given))[0].get(problem.param.name)
        expected = _expected(context.command.callback, problem.param.name)
        return UserError(f"{_name_of(problem.param)} is invalid: got {value!r}, expected {expected}.")
    return UserError(f"{problem.format_message().rstrip('.')}. {_see_help(context)}")


def _name_of(parameter: Any) -> str:
    """Return how a user writes a parameter: --processes, or STORE."""
    if parameter.param_type_name == "option":
        return str(parameter.opts[0])
    return str(parameter.metavar or parameter.name.upper())


def _expected(function: Callable[..., Any], name: str) -> str:
    """Return what a command's parameter takes, by its annotation."""
    hint = inspect.signature(function).parameters[name].annotation
    kind, details = (get_args(hint)[0], hint.__metadata__[0]) if get_origin(hint) is Annotated else (hint, None)
    kinds = get_args(kind) or (kind,)
    text = "a whole number" if int in kinds else "a number" if float in kinds else "another value"
    least, most = (getattr(details, bound, None) for bound in ("min", "max"))
    if least is not None and most is not None:
        return f"{text} from {least:,g} to {most:,g}"
    if least is not None or most is not None:
        return f"{text}, {f'{least:,g} or more' if most is None else f'{most:,g} or less'}"
    return text


def _see_help(context: Any) -> str:
    return f"See `{context.command_path} --help`."
