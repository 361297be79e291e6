"""The search for settings by successive halving (Jamieson and Talwalkar 2016), on parts of a store's own pairs.

A fifth of the pairs takes no part in the search. Of the others, each fold holds out a fifth to choose on. All
candidates are trained on the first fold, the best third of them on a second one, the best third of these on two more.
The winner and the default are then compared once, on the pairs that took no part.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from sail_align.align.analysis.candidates import Fold, Options, Space, make_folds
from sail_align.align.analysis.trials import FORMAT, Trial, TrialRunner
from sail_align.align.data.pairs import Half, read_rows
from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import run_digest
from sail_align.align.settings import COMPARED, SETTINGS
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.tables import format_interval, format_table, number
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.files import write_atomically

RUNGS = ((1, 0.55), (2, 0.8), (4, 1.0))
"""Folds that a candidate has been trained on after each rung, and the share of the budget that is used by then."""
KEPT = 1 / 3
HEADER = ("options", "folds", "R@1 (95 % interval)", "difference to the default")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A candidate's R@1 by pair, the mean of both ways and of all captions, from 0 to 1.

    `chosen` is for the pairs of a fold to choose on, `final` for those that take no part in the search.
    """

    chosen: Values
    final: Values
    seconds: float

    @classmethod
    def read(cls, path: Path) -> "Score | None":
        """Read a saved score; None if there is none."""
        if not path.exists():
            return None
        try:
            saved = json.loads(path.read_text())
            return cls(np.array(saved["chosen"]), np.array(saved["final"]), float(saved["seconds"]))
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{path} is damaged. Delete it and rerun the command.") from problem

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Save the score with what it is about."""
        values = {"chosen": self.chosen.tolist(), "final": self.final.tolist(), "seconds": self.seconds}
        write_atomically(path, json.dumps({**about, **values}).encode())


@dataclass
class Candidate:
    """Options and their scores by fold. A candidate that could not be trained has `failed` with a message."""

    options: Options
    scores: list[Score] = field(default_factory=list)
    failed: str = ""

    @property
    def label(self) -> str:
        """The options as they are typed."""
        return " ".join(_typed(self.options)) or "default"

    def values(self, folds: int) -> Values:
        """Return R@1 by pair of the first folds, one after another."""
        return np.concatenate([each.chosen for each in self.scores[:folds]])

    def final(self, folds: int) -> Values:
        """Return R@1 by pair of those that take no part in the search, the mean of the models of the first folds."""
        mean_N: Values = np.mean([each.final for each in self.scores[:folds]], axis=0)
        return mean_N


@dataclass
class Search:
    """A search over the settings of a fit.

    Attributes:
        space: The candidates.
        folds: At least as many folds as the last rung needs.
        runner: Trains candidates; its folder also keeps the scores.
        seed: Seed of the sequence of candidates.
        trials: Number of candidates to begin with.
        budget: Seconds after which nothing is begun.
    """

    space: Space
    folds: Sequence[Fold]
    runner: TrialRunner
    seed: int
    trials: int
    budget: float = math.inf
    entered: list[Candidate] = field(default_factory=list)
    standing: list[Candidate] = field(default_factory=list)
    trained: int = 0
    reused: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        plan = self.space.plan
        self._since = time.monotonic()
        self._record = plan.record()
        self._final = read_rows(plan.scored, plan.held_out)
        self._chosen: dict[int, tuple[Half, Half]] = {}

    def run(self) -> None:
        """Train the candidates rung by rung. Saved scores are used again."""
        candidates = map(Candidate, self.space.candidates(self.folds[0], self.seed))
        self.entered = self._rung(list(islice(candidates, self.trials)), *RUNGS[0])
        self.standing = self._ranked(self.entered)
        for folds, share in RUNGS[1:]:
            others = [each for each in self.standing if each is not self.entered[0]]
            kept = others[: math.ceil(KEPT * len(others))]
            if len(done := self._rung([self.entered[0], *kept], folds, share)) > 1:
                self.standing = self._ranked(done)
        self.seconds = time.monotonic() - self._since

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return those that could be trained, the best first; of equals the one that came first."""
        trained = [each for each in candidates if not each.failed]
        return sorted(trained, key=lambda each: -float(each.values(len(each.scores)).mean()))

    def _rung(self, candidates: Sequence[Candidate], folds: int, share: float) -> list[Candidate]:
        """Train candidates until they have scores of so many folds; return those for which there was time."""
        done: list[Candidate] = []
        for each in candidates:
            missing = range(len(each.scores), folds)
            costs = [score.seconds for one in (self.entered or done) for score in one.scores]
            paths = [self._path(each, fold) for fold in missing]
            needed = sum(not path.exists() for path in paths) * float(np.mean(costs or [0.0]))
            if costs and time.monotonic() - self._since + needed > share * self.budget:
                break
            for fold in missing:
                self._train(each, fold)
                if each.failed:
                    break
            done.append(each)
        return done

    def _trial(self, candidate: Candidate, fold: int) -> Trial:
        return Trial("tune", self.space.planned(candidate.options, self.folds[fold], fold))

    def _path(self, candidate: Candidate, fold: int) -> Path:
        settings = self.space.planned(candidate.options, self.folds[fold], fold).settings
        digest = run_digest({**self._record, **asdict(settings), "fold": fold})
        return self.runner.folder / "trials" / f"{digest[:16]}.json"

    def _train(self, candidate: Candidate, fold: int) -> None:
        """Train and score a candidate on a fold, unless its score is saved, and print a line."""
        path, state = self._path(candidate, fold), "already finished"
        if (score := Score.read(path)) is None:
            try:
                score = self._measure(self._trial(candidate, fold), fold)
            except UserError as problem:
                if not candidate.options:
                    raise
                candidate.failed = str(problem)
                typer.echo(f"{candidate.label}: failed: {problem}")
                return
            score.write(path, {"options": candidate.options, "fold": fold})
            self.trained += 1
            state = f"{score.seconds:.1f} s"
        else:
            self.reused += 1
        candidate.scores.append(score)
        typer.echo(f"fold {fold + 1}: R@1 {100 * score.chosen.mean():.1f} ({state}) {candidate.label}")

    def _measure(self, trial: Trial, fold: int) -> Score:
        started = time.monotonic()
        if fold not in self._chosen:
            self._chosen[fold] = read_rows(self.space.plan.scored, self.folds[fold].chosen_on)
        run, _ = self.runner.train(trial, fold)
        chosen, final = self._recalled(run, *self._chosen[fold]), self._recalled(run, *self._final)
        shutil.rmtree(run.path)  # the scores are kept
        return Score(chosen, final, time.monotonic() - started)

    def _recalled(self, run: Run, image_ND: Half, text_CND: Half) -> Values:
        hits = [self.runner.retrieve(run, image_ND, text_ND) for text_ND in text_CND]
        mean_N: Values = np.mean(hits, axis=(0, 1))
        return mean_N


@dataclass(frozen=True)
class Tuned:
    """The result of a search. `words` are the words of the default's `fit` command."""

    search: Search
    words: tuple[str, ...]

    @property
    def default(self) -> Candidate:
        """The candidate without changes."""
        return self.search.entered[0]

    @property
    def best(self) -> Candidate:
        """The best candidate on the pairs to choose on."""
        return self.search.standing[0]

    def comparison(self) -> dict[str, Any]:
        """Return the R@1 of the best candidate and of the default in percent on pairs that took no part."""
        folds = min(len(self.best.scores), len(self.default.scores))
        best_N, default_N = 100 * self.best.final(folds), 100 * self.default.final(folds)
        low, high = mean_interval(best_N - default_N)
        return {
            "pairs": len(best_N),
            "models": folds,
            "best": float(best_N.mean()),
            "default": float(default_N.mean()),
            "difference": float((best_N - default_N).mean()),
            "interval": [low, high],
        }

    @property
    def better(self) -> bool:
        """Whether the best candidate beats the default beyond noise."""
        return self.best is not self.default and self.comparison()["interval"][0] > 0

    def table(self, most: int = 10) -> str:
        """Return the best candidates and the default as Markdown."""
        rows = []
        listed = self.search.standing[:most]
        for each in (*listed, *([] if self.default in listed else [self.default])):
            folds = min(len(each.scores), len(self.default.scores))
            values, usual = 100 * each.values(folds), 100 * self.default.values(folds)
            difference = values - usual
            shift = f"{number(difference.mean(), sign='+')} ({format_interval(mean_interval(difference), sign='+')})"
            mean = f"{number(values.mean())} ({format_interval(mean_interval(values))})"
            rows.append((each.label, str(folds), mean, "" if each is self.default else shift))
        return format_table(HEADER, rows, "l")

    def verdict(self) -> str:
        """Say in words what to use, and how much was tried."""
        search, found = self.search, self.comparison()
        tried = (
            f"Tried {len(search.entered)} candidates in {search.seconds:.0f} s: {search.trained} fits trained, "
            f"{search.reused} reused; at most {max(len(each.scores) for each in search.entered)} folds each."
        )
        if len(search.entered) == 1 < search.trials:
            return f"{tried}\nThe budget was enough for the default only, so nothing was compared. Raise --budget."
        if self.best is self.default:
            return f"{tried}\nNo candidate has a higher R@1 than the default. Keep the default:\n\n{self.fit_command()}"
        low, high = (number(bound, sign="+") for bound in found["interval"])
        compared = (
            f"On {found['pairs']:,} pairs that took no part in the search, {self.best.label} has R@1 "
            f"{number(found['best'])}, the default {number(found['default'])}: {number(found['difference'], sign='+')} "
            f"({low} to {high})."
        )
        advice = "Use the options found:" if self.better else "This is within noise. Keep the default:"
        return f"{tried}\n{compared}\n{advice}\n\n{self.fit_command()}"

    def fit_command(self) -> str:
        """Return the `fit` command of the recommended options."""
        options = self.best.options if self.better else {}
        return command(*self.words, *_typed(options))

    def record(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        search, plan = self.search, self.search.space.plan
        candidates = [
            {
                "options": each.options,
                "r1": [100 * float(score.chosen.mean()) for score in each.scores],
                "failed": each.failed or None,
            }
            for each in search.entered
        ]
        return {
            "format": FORMAT,
            "protocol": "tune-1",
            "stores": [str(each.store.path) for each in plan.pairs],
            "store_digests": [each.store.digest for each in plan.pairs],
            "features_digests": [each.digest for each in plan.pairs],
            "captions": list(plan.policy.weights),
            "preset": search.space.preset,
            "given": dict(search.space.given),
            "held_out": plan.settings.held_out,
            "seed": search.seed,
            "candidates": candidates,
            "best": self.best.options,
            "comparison": self.comparison(),
            "recommended": self.best.options if self.better else {},
            "command": self.fit_command(),
        }


def tune_stores(
    stores: Sequence[Path],
    given: Mapping[str, Any],
    runner: TrialRunner,
    *,
    captions: Sequence[str] = (),
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    seed: int = 0,
    trials: int,
    budget: float = math.inf,
) -> Tuned:
    """Search settings for stores. Finished trials under the runner's folder are used again.

    Args:
        stores: At least one.
        given: Fit options that all candidates share.
        runner: Trains and scores candidates, with their best weights.
        captions: Captions as for `make_plan`.
        image_encoder: Image encoder to use if a store has more than one.
        text_encoder: Text encoder to use if a store has more than one.
        seed: Seed of the sequence of candidates.
        trials: Number of candidates to begin with. The first is the default.
        budget: Seconds after which no fit is begun. The default is trained at any rate.

    Raises:
        UserError: An option or a store cannot be used.
    """
    encoders = {"image_encoder": image_encoder, "text_encoder": text_encoder}
    fixed = {name: value for name, value in given.items() if name != "held_out"}
    held_out = given.get("held_out", COMPARED["held_out"])
    plan, notes = make_plan(
        stores,
        {**fixed, "held_out": held_out},
        captions=captions,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
    )
    for note in notes:
        typer.echo(f"note: {note}")
    search = Search(Space(plan, fixed), make_folds(plan, RUNGS[-1][0]), runner, seed, trials, budget)
    search.run()
    words: list[object] = ["sail-align", "fit", *(word for path in stores for word in ("--features", path))]
    words += ["--captions", ",".join(captions)] if captions else []
    words += [word for name, value in encoders.items() if value for word in (f"--{name.replace('_', '-')}", value)]
    return Tuned(search, (*map(str, words), *_typed(fixed)))


def _typed(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [
        word
        for name, value in options.items()
        for word in (SETTINGS[name].flag, f"{value:g}" if isinstance(value, float) else str(value))
    ]
