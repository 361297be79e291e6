"""Train the heads on feature stores: the function that `sail-align fit` calls."""

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from sail_align.align.data.captions import parse_captions
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import (
    CLOSED_FORMS,
    SETTINGS,
    CacheChoice,
    OnCollapse,
    Setting,
    check_options,
    choose_precision,
    parse_budget,
)
from sail_align.align.stats.tables import number
from sail_align.align.train.trackers import parse_trackers
from sail_align.extract.errors import UserError, did_you_mean
from sail_align.extract.system.files import report_write_errors, require_store
from sail_align.extract.system.progress import note
from sail_align.extract.system.python_calls import PathLike, as_paths, in_python, one_path
from sail_align.extract.system.signals import report_stop

if TYPE_CHECKING:
    from sail_align.align.pretrained import PretrainedModel
    from sail_align.align.train.distributed import World
    from sail_align.align.train.plan import Plan

K = (1, 5, 10)


class FitKeywords(TypedDict, total=False):
    """Types of the settings as keywords of `fit`, for type checkers. `settings.FitOptions` declares them."""

    head: Literal["linear", "mlp", "glu", "cca", "pcca"] | None
    expansion: int | None
    dim: int | None
    image_dropout: float | None
    text_dropout: float | None
    image_power: float | None
    patch_power: float | None
    text_hidden: int | None
    start: Literal["random", "closed-form"] | None
    ridge: float | Literal["auto"] | None
    bank: int | None
    positives: int | None
    loss: Literal["sigmoid", "infonce"] | None
    divisor: Literal["pairs", "batch"] | None
    temperature: float | Literal["auto"] | None
    bias: float | Literal["auto"] | None
    item_bias: Literal["none", "linear"] | None
    optimizer: Literal["lion", "adamw"] | None
    lr: float | None
    weight_decay: float | None
    warmup: float | None
    batch_size: int | None
    steps: int | None
    patience: int | None
    seed: int | None
    held_out: float | None
    precision: Literal["auto", "float32", "tf32", "bfloat16"] | None
    epochs: float | None
    preset: Literal["paper", "medium", "small"] | None
    keep: int | None
    verify: Literal["first-epoch", "always", "off"] | None
    order: Literal["windows", "permuted"] | None
    cache: CacheChoice | None
    on_collapse: OnCollapse | None


@dataclass(frozen=True, repr=False)
class FitResult(os.PathLike[str]):
    """A finished run. It can be passed wherever a run is expected, such as to `score` and `load`.

    Attributes:
        run: Folder of the run.
        metrics: Scores of the run's weights on held-out pairs: `loss`, `t2i_r1` … `i2t_r10` (R@1/5/10 in percent),
            `r1` (mean of both R@1), `chance` (its chance level), `mrr` (mean reciprocal rank), and the effective ranks
            of the embeddings. With a bank, `hub_t2i_r1` … `hub_r1` are corrected for hubs, with β = `hub_beta`. Empty
            if no pairs were held out.
        last_metrics: The same after the last step.
        steps: Number of steps that were trained.
        planned_steps: Number of steps of the settings, which is higher if training stopped early.
        best_step: Step with the best scores: the highest `mrr`, the mean reciprocal rank of both directions. Step 0 is
            the start of training. None if no pairs were held out.
        best_checkpoint: Folder of its checkpoint. Its weights are those that the run stands for: they are scored,
            loaded and exported by default. None if no pairs were held out: then these are the last weights.
        training_rows: Number of pairs to train on.
        held_out_rows: Number of held-out pairs.
        datasets: Names of the data sets.
        features_only: Whether an encoder is unknown, because features were imported. Nothing new can be encoded.
        notes: Messages about what was chosen or changed.
        seconds: Time that training took in this call.
        trained: Whether this call trained. It did not if the same run was finished before.
        leads: Whether this process leads those that torchrun started. The others should print nothing.
    """

    run: Path
    metrics: Mapping[str, float]
    last_metrics: Mapping[str, float]
    steps: int
    planned_steps: int
    best_step: int | None
    best_checkpoint: Path | None
    training_rows: int
    held_out_rows: int
    datasets: tuple[str, ...]
    features_only: bool = False
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    trained: bool = True
    leads: bool = True

    def load(self, checkpoint: Literal["best", "last"] = "best", *, device: str = "auto") -> "PretrainedModel":
        """Load the trained model with its encoders, as `sail_align.load` does.

        Args:
            checkpoint: The weights with the best scores on held-out pairs, or those after the last step. If no pairs
                were held out, both are the last.
            device: Device of heads and encoders; `auto` uses a GPU if there is one.

        Raises:
            UserError: The choice is invalid, or an encoder cannot be loaded.
        """
        from sail_align.align.pretrained import load

        return load(self.run, checkpoint=checkpoint, device=device)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        paths = {"run": str(self.run), "best_checkpoint": self.best_checkpoint and str(self.best_checkpoint)}
        scores = {"metrics": dict(self.metrics), "last_metrics": dict(self.last_metrics)}
        lists = {"datasets": list(self.datasets), "notes": list(self.notes)}
        return {**vars(self), **paths, **scores, **lists}

    def lines(self) -> list[str]:
        """Return the held-out scores in words, and how they differ between the best and the last weights."""
        if not self.metrics:
            return []
        scores = self.metrics

        def recalls(prefix: str = "") -> str:
            ways = (
                f"{label} " + " / ".join(f"{scores[f'{prefix}{way}_r{k}']:.1f}" for k in K)
                for label, way in (("text→image", "t2i"), ("image→text", "i2t"))
            )
            return "R@1/5/10 " + ", ".join(ways)

        lines = [
            f"held out ({self.held_out_rows:,} pairs): loss {scores['loss']:.4g}, {recalls()}; chance of R@1 "
            f"{number(scores['chance'])}"
        ]
        if "hub_r1" in scores:
            lines.append(f"corrected for hubs: {recalls('hub_')}")
        if self.best_step is not None and self.best_step < self.steps:
            best, last = scores["r1"], self.last_metrics["r1"]
            lines.append(
                f"best: step {self.best_step:,} with mean R@1 {best:.1f}; the last, step {self.steps:,}, has {last:.1f}"
            )
        if self.steps < self.planned_steps:
            lines.append(f"stopped early, after {self.steps:,} of {self.planned_steps:,} steps (--patience)")
        if self.best_step == 0 and self.steps:
            lines.append(
                "note: Training did not improve on its initial weights, which the run therefore keeps. Try a lower "
                "--lr or more pairs."
            )
        return lines

    def __fspath__(self) -> str:
        return str(self.run)

    def __repr__(self) -> str:
        head = f"{type(self).__name__}: {self.run}, {self.steps:,} steps on {self.training_rows:,} pairs"
        return "\n".join([head, *(f"  {line}" for line in self.lines())])


def fit(
    features: PathLike | Sequence[PathLike],
    *,
    captions: str | Sequence[str] | Mapping[str, float] | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    exclude: PathLike | Sequence[PathLike] | None = None,
    out: PathLike | None = None,
    device: str = "auto",
    budget: str | None = None,
    track: str | Sequence[str] | None = None,
    quiet: bool = False,
    **settings: Unpack[FitKeywords],
) -> FitResult:
    """Train the heads on feature stores, as `sail-align fit` does. Call it again to resume after a stop.

    A call with the settings of an existing run resumes that run, or returns its result if it is finished.

    Args:
        features: A store, or several: paths, URLs, or results of `open_store` and `build_store`.
        captions: Captions to train on together: names, as in "raw,long:0.5" or a list, or weights by name. Default:
            those in all stores; with `positives`, those in any.
        image_encoder: Image encoder to use if a store has more than one. "a+b" joins the features of two.
        text_encoder: Text encoder to use if a store has more than one, or several joined with +.
        exclude: Files with keys to leave out, one per line, as `sail-extract overlap` writes them.
        out: Folder of the run. Default: runs/<store>-<head>, with -2, -3 … added if that has other settings.
        device: cpu, cuda, cuda:1 …; auto uses a GPU if there is one.
        budget: Time for training, as in "30m". It is divided by the measured time of a step, and at most the epochs of
            the preset are trained.
        track: Also log to tensorboard, wandb or both.
        quiet: Print nothing, and show no progress bars.
        **settings: Any of the settings below. None stands for the default.

    Returns:
        The run's folder, its scores on held-out pairs, and its best step.

    Raises:
        UserError: An argument is invalid, a store cannot be used, or training failed.
        TypeError: A keyword is not the name of a setting.
        KeyboardInterrupt: Ctrl-C stopped the training, after its state was saved.
    """
    for name in settings:
        if name not in SETTINGS:
            guess = did_you_mean(name, inspect.signature(fit).parameters)
            raise TypeError(f"fit() got an unexpected keyword argument {name!r}.{guess}")

    def say(line: str) -> None:
        if not quiet:
            note(in_python(line, inspect.signature(fit).parameters))

    return fit_stores(
        as_paths(features, "features"),
        settings,
        captions=_caption_list(captions),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        exclude=as_paths(exclude, "exclude") if exclude else (),
        out=None if out is None else one_path(out, "out"),
        device=device,
        budget=budget,
        track=parse_trackers(track if track is None or isinstance(track, str) else ",".join(track)),
        quiet=quiet,
        say=say,
    )


def fit_stores(
    features: Sequence[Path],
    settings: Mapping[str, Any],
    *,
    captions: Sequence[str],
    image_encoder: str | None,
    text_encoder: str | None,
    exclude: Sequence[Path],
    out: Path | None,
    device: str,
    budget: str | None,
    track: Sequence[str],
    quiet: bool,
    say: Callable[[str], object],
) -> FitResult:
    """Train on stores. The arguments are those of `fit`, checked or parsed as far as their types show.

    Args:
        features: The stores.
        settings: Values by name. Numbers may be given as text.
        captions: Captions as for `parse_captions`.
        image_encoder: Image encoder.
        text_encoder: Text encoder.
        exclude: Files of keys.
        out: Folder of the run, or None for the default.
        device: Device.
        budget: Time for training, or None.
        track: Result of `parse_trackers`.
        quiet: Show no progress bars.
        say: Function that prints a note or what is being written.
    """
    options = check_options(settings)  # like all checks here, before the seconds that importing torch takes
    seconds = None if budget is None else parse_budget(budget, options)
    parse_captions(captions)
    for store in features:
        require_store(store)

    from sail_align.align.train.budget import within_budget
    from sail_align.align.train.distributed import joined
    from sail_align.align.train.plan import make_plan
    from sail_align.align.train.trainer import fit as train

    with joined(device) as (world, where):

        def prepare() -> tuple["Plan", tuple[str, ...]]:
            if options.get("head") not in CLOSED_FORMS:
                options["precision"], why = choose_precision(options.get("precision", "auto"), where)
                if why:
                    say(f"note: {why}")
            plan, notes = make_plan(
                features,
                options,
                captions=captions,
                image_encoder=image_encoder,
                text_encoder=text_encoder,
                exclude=exclude,
                quiet=quiet,
            )
            if 0 < plan.settings.batch_size < world.size and plan.settings.steps:
                raise UserError(
                    f"--batch-size is invalid: got {plan.settings.batch_size} for {world.size} processes. Give each "
                    "process at least one pair."
                )
            for each in notes:
                say(f"note: {each}")
            return replace(plan, budget=seconds), tuple(notes)

        plan, notes = world.first(prepare)
        if seconds is not None:
            path, cache = out or _default_path(plan, features), options.get("cache", "auto")
            plan, why = within_budget(plan, path, numbered=out is None, cache=cache, device=where, world=world)
            if world.leads:
                say(f"note: {why}")
        run, finished = world.first(lambda: _claim_run(plan, out, features, world.size, say))
        started = time.monotonic()
        chosen: dict[str, Any] = {name: options[name] for name in ("keep", "cache", "on_collapse") if name in options}
        chosen |= {"track": track, "quiet": quiet or not world.leads}
        how = partial(_how_to_resume, run) if world.leads else lambda: None
        with report_stop(how), report_write_errors(run, during_run=True):
            scores = train(plan, run, device=where, world=world, **chosen)
        took = 0.0 if finished else time.monotonic() - started
        return _result(plan, run, scores, world, notes=notes, seconds=took, trained=not finished)


def _default_path(plan: "Plan", stores: Sequence[Path]) -> Path:
    return RunFolder.default_path(stores, plan.settings.head)


def _claim_run(
    plan: "Plan", out: Path | None, stores: Sequence[Path], processes: int, say: Callable[[str], object]
) -> tuple[Path, bool]:
    """Choose the folder of a run and print it; return it, and whether the run is finished."""
    from sail_align.align.runs.claim import claim_run

    claim = claim_run(out or _default_path(plan, stores), plan.record(), numbered=out is None)
    if claim.other:
        say(f"note: {claim.other} has other settings ({'; '.join(claim.differing)}); this is a new run.")
    if claim.finished:
        state = f"{claim.path} is finished"
    else:
        state = f"{'resuming' if claim.begun else 'writing'} {claim.path}"
    say(f"{state}: {plan.describe()}" + (f"; {processes} processes" if processes > 1 else ""))
    if not claim.finished and plan.settings.steps:
        say(plan.cost())
    return claim.path, claim.finished


def _how_to_resume(run: Path) -> str:
    from sail_align.align.runs.checkpoint import Checkpoint

    saved = Checkpoint.read(run)
    if saved is None:
        return f"The same command starts {run} again: nothing was saved yet."
    return f"The same command resumes {run} from step {saved.step:,}."


def _result(plan: "Plan", run: Path, scores: Mapping[str, float], world: "World", **more: Any) -> FitResult:
    from sail_align.align.runs.checkpoint import Checkpoint

    best, last = world.first(lambda: (Checkpoint.best(run), Checkpoint.read(run)))
    return FitResult(
        run=run,
        metrics=best.scores if best else {},
        last_metrics=scores,
        steps=last.step if last else 0,
        planned_steps=plan.settings.steps,
        best_step=best.step if best else None,
        best_checkpoint=best.folder if best else None,
        training_rows=plan.training_rows,
        held_out_rows=plan.held_out_rows,
        datasets=tuple(dict.fromkeys(pairs.store.dataset for pairs in plan.pairs)),
        features_only=any(array.identity.is_imported for array in plan.pairs[0].arrays),
        leads=world.leads,
        **more,
    )


def _caption_list(captions: str | Sequence[str] | Mapping[str, float] | None) -> list[str]:
    """Return captions in the form that `parse_captions` takes."""
    if isinstance(captions, Mapping):
        return [f"{name}:{weight}" for name, weight in captions.items()]
    return captions.split(",") if isinstance(captions, str) and captions else list(map(str, captions or ()))


def _document_settings() -> None:
    """Give `fit` the settings as keywords of its signature, and their help in its docstring, from the declarations."""

    def describe(setting: Setting) -> str:
        paper, small = setting.defaults
        default = paper if small == paper else f"{paper}; small: {small}"
        choices = f" One of: {setting.values}." if setting.choices else ""
        text = f"{setting.name}: {setting.help}{choices}" + (f" Default: {default}." if default else "")
        return fill(in_python(text, names), 110, initial_indent="    ", subsequent_indent="        ")

    parameters = inspect.signature(fit).parameters
    names = {*parameters, *SETTINGS}
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in SETTINGS]
    named = [each for each in parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    fit.__dict__["__signature__"] = inspect.Signature([*named, *keywords], return_annotation=FitResult)
    lines = "\n".join(map(describe, SETTINGS.values()))
    fit.__doc__ = f"{inspect.getdoc(fit)}\n\nSettings:\n{lines}\n"


_document_settings()
