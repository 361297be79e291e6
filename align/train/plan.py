"""The plan of a fit: data, rows and settings, checked before anything is computed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from sail_align.align.data.captions import CaptionPolicy, parse_captions
from sail_align.align.data.pairs import (
    Exclusions,
    Pairs,
    Rows,
    count_rows,
    held_out_pictures,
    open_pairs,
    require_half,
    split_held_out,
    stored_captions,
)
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.heads import HeadKind
from sail_align.align.model.loss import LogSumExp, Loss, infonce_loss, sigmoid_loss
from sail_align.align.runs.folder import run_digest
from sail_align.align.settings import CLOSED_FORMS, FitOptions, FitSettings, check_options, choose_settings
from sail_align.align.train.cost import describe_cost, step_flops
from sail_align.extract.errors import UserError

MIN_ROWS = 2


def architecture_of(settings: FitSettings, image_dim: int, text_dim: int) -> Architecture:
    """Return the architecture that settings give for features of these dimensions."""
    return Architecture(
        head="linear" if settings.head in CLOSED_FORMS else cast(HeadKind, settings.head),
        image_dim=image_dim,
        text_dim=text_dim,
        dim=settings.dim,
        expansion=settings.expansion,
        image_dropout=settings.image_dropout,
        text_dropout=settings.text_dropout,
        linear_path=settings.start == "closed-form" and settings.head in ("mlp", "glu"),
        image_power=settings.image_power,
        patch_power=settings.patch_power,
        text_hidden=settings.text_hidden,
        correction="gaussian" if settings.head == "pcca" else "none",
        item_bias=settings.item_bias == "linear",
    )


@dataclass(frozen=True)
class Plan:
    """The data, the rows to train on and to hold out, and complete settings.

    A pickled plan holds the paths of its stores; the process that loads it opens them itself.
    """

    pairs: Sequence[Pairs]
    training: Sequence[Rows]
    held_out: Sequence[Rows]
    settings: FitSettings
    exclusions: Exclusions
    policy: CaptionPolicy
    budget: float | None = None
    """Seconds for which the number of steps was chosen."""

    @property
    def training_rows(self) -> int:
        """Number of pairs to train on."""
        return count_rows(self.training)

    @property
    def held_out_rows(self) -> int:
        """Number of pairs to score on."""
        return count_rows(self.held_out)

    @property
    def scored(self) -> list[Pairs]:
        """The data with the captions to score with."""
        return scored_pairs(self.pairs)

    @property
    def architecture(self) -> Architecture:
        """Architecture of the model."""
        return architecture_of(self.settings, self.pairs[0].image.dim, self.pairs[0].texts[0].dim)

    def loss(self, across: LogSumExp | None = None) -> Loss:
        """Return the loss; of a batch that is split across processes, `infonce_loss` needs `across`."""
        weights = self.policy.loss_weights
        if self.settings.loss == "infonce":
            return partial(infonce_loss, weights=weights, across=across)
        return partial(sigmoid_loss, divisor=self.settings.divisor, weights=weights)

    def cost(self) -> str:
        """Return the operations of all steps in words."""
        with torch.device("meta"):
            model = self.architecture.build()
        return describe_cost(self.settings.steps, step_flops(model, self.settings, self.policy.positives))

    def describe(self) -> str:
        """Return a one-line summary."""
        chosen = self.settings
        drawn = f"{self.policy.positives} of " if self.policy.drawn else ""
        data = f"{self.training_rows:,} pairs, {drawn}captions {self.policy.describe()}"
        if chosen.head in CLOSED_FORMS:
            name = "CCA" if chosen.head == "cca" else "Probabilistic CCA"
            return f"{name} of {data}, {chosen.dim} dimensions"
        begin = "" if chosen.start == "random" else f" with {chosen.start} initialisation"
        steps = "1 step" if chosen.steps == 1 else f"{chosen.steps:,} steps"
        return (
            f"{chosen.head} heads{begin} on {data}; {steps} of {chosen.batch_size:,}, "
            f"{chosen.loss} loss, {chosen.optimizer} at {chosen.lr:g}"
        )

    def record(self) -> dict[str, Any]:
        """Return everything that decides the weights, as JSON-able data: the content of settings.json.

        It also has the stores' paths and digests, for information; `digest` leaves them out.
        """
        settings = asdict(self.settings)
        for name in ("order", "text_hidden", "item_bias"):
            if settings[name] == getattr(FitSettings, name):
                del settings[name]  # as in records of earlier versions
        return {
            **settings,
            **({"budget": self.budget} if self.budget else {}),
            "captions": list(self.policy.weights),
            "caption_weights": list(self.policy.weights.values()),
            "image_encoder": self.pairs[0].image.identity.spec.fingerprint,
            "text_encoder": self.pairs[0].texts[0].identity.spec.fingerprint,
            **self._parts_record(),
            "stores": [str(each.store.path) for each in self.pairs],
            "store_digests": [each.store.digest for each in self.pairs],
            "features_digests": [each.digest for each in self.pairs],
            "training_rows": self.training_rows,
            "held_out_rows": self.held_out_rows,
            **self.exclusions.record(),
        }

    def _parts_record(self) -> dict[str, list[str]]:
        """Return the encoders that are joined; nothing for single ones, as in records of earlier versions."""
        sides = {"image_encoders": self.pairs[0].image, "text_encoders": self.pairs[0].texts[0]}
        return {
            name: [part.identity.spec.fingerprint for part in array.parts]
            for name, array in sides.items()
            if len(array.parts) > 1
        }

    @cached_property
    def digest(self) -> str:
        """Identity of the run: see `run_digest`."""
        return run_digest(self.record())

    def checkpoint_record(self) -> dict[str, Any]:
        """Return what a checkpoint records besides its weights: architecture, encoders and settings."""
        return {
            "architecture": asdict(self.architecture),
            "image": self.pairs[0].image.identity.to_json(),
            "text": self.pairs[0].texts[0].identity.to_json(),
            "settings": self.record(),
        }


def hold_out(pairs: Sequence[Pairs], usable: Sequence[Rows], positives: int | None, fraction: float) -> list[Rows]:
    """Return the held-out rows among the usable ones: a fraction of those that have captions to score with."""
    scorable = [
        rows & each.usable(1 if positives else None) for rows, each in zip(usable, scored_pairs(pairs), strict=True)
    ]
    return split_held_out(pairs, scorable, fraction)


def scored_pairs(pairs: Sequence[Pairs]) -> list[Pairs]:
    """Return the data with the captions to score with: those in all stores or, if there are none, the first of each."""
    shared = [name for name in pairs[0].captions if all(name in each.captions for each in pairs)]
    return [each.only(shared or each.captions[:1]) for each in pairs]


def make_plan(
    stores: Sequence[Path],
    options: Mapping[str, Any],
    *,
    captions: Sequence[str] = (),
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    exclude: Sequence[Path] = (),
    quiet: bool = True,
    known_copies: dict[str, list[Rows]] | None = None,
) -> tuple[Plan, list[str]]:
    """Open the stores, choose rows and settings; return the plan, and notes about what was chosen or changed.

    Args:
        stores: At least one.
        options: Settings given by the user, as for `check_options`.
        captions: Captions as for `parse_captions`; by default chosen by `open_pairs`.
        image_encoder: Image encoder to use if a store has more than one; `a+b` joins the features of two.
        text_encoder: Text encoder to use, likewise.
        exclude: Files with keys to leave out, as for `Exclusions.read`.
        quiet: Show no progress bar.
        known_copies: Copies of held-out pictures that earlier plans found, shared between the plans of one command.

    Raises:
        UserError: An option, a list or a store cannot be used, or too few rows are left.
    """
    options = check_options(options)
    exclusions = Exclusions.read(exclude)
    weights = parse_captions(captions)
    positives = options.get("positives")
    encoders = {"image_encoder": image_encoder, "text_encoder": text_encoder}
    verify = options.get("verify", FitOptions.verify)
    pairs = open_pairs(stores, list(weights), positives=positives, verify=verify, **encoders)
    usable = [each.usable(positives) for each in pairs]
    policy = _policy(pairs, weights, options)
    if not weights:
        require_half(pairs, usable)
    unusable = sum(each.store.rows for each in pairs) - count_rows(usable)
    excluded = [exclusions.rows(each.store) for each in pairs]
    usable = [rows & ~left_out for rows, left_out in zip(usable, excluded, strict=True)]
    held_out = hold_out(pairs, usable, positives, options.get("held_out", FitSettings.held_out))
    training = [rows & ~held for rows, held in zip(usable, held_out, strict=True)]
    leaks = held_out_pictures(pairs, training, held_out, quiet=quiet, known=known_copies)
    training = [rows & ~leaked for rows, leaked in zip(training, leaks, strict=True)]
    count = count_rows(training)
    if count < MIN_ROWS:
        raise UserError(
            f"{' with '.join(map(str, stores))} has {count} pair{'s' * (count != 1)} to train on, expected at least "
            f"{MIN_ROWS}. A pair has an image and the captions {', '.join(policy.weights)}"
            f"{', and is not excluded' if exclude else ''}; its picture is in no held-out pair. See "
            "`sail-extract status`."
        )
    dims = {"image_dim": pairs[0].image.dim, "text_dim": pairs[0].texts[0].dim}
    settings, notes = choose_settings(options, rows=count, **dims)
    notes[:0] = _caption_notes(pairs, policy, named=bool(weights))
    if exclude:
        notes.insert(0, exclusions.describe(excluded))
    if unusable:
        advice = _caption_advice(pairs, positives, can_sample=options.get("head") not in CLOSED_FORMS)
        notes.insert(0, f"Rows left out because an image or a caption is missing: {unusable:,}.{advice}")
    if leaked := count_rows(leaks):
        notes.append(f"Rows left out of training because their picture is also in a held-out pair: {leaked:,}.")
    notes += [each.unchecked for each in pairs if each.unchecked and verify != "off"]
    if not any(rows.any() for rows in held_out):
        if settings.patience:
            raise UserError("--patience has no effect without held-out pairs. Leave it out, or hold out more.")
        if settings.held_out > 0:
            notes.append(f"{count} pairs are too few to hold any out; the run will not be scored.")
    return Plan(pairs, training, held_out, settings, exclusions, policy), notes


def _caption_advice(pairs: Sequence[Pairs], positives: int | None, *, can_sample: bool) -> str:
    """Return how to keep rows that have only some of the captions; "" if there are none."""
    kept, missing = (count_rows([each.usable(count) for each in pairs]) for count in (1, positives))
    if kept == missing:
        return ""
    rows = Counter[str]()
    for each in pairs:
        for name, has_N in zip(each.captions, each.present(), strict=True):
            rows[name] += int(has_N.sum())
    counts = ", ".join(f"{name} in {count:,}" for name, count in rows.items())
    sample = "--positives 1, which samples from the captions that a row has, or " if can_sample else ""
    return (
        f" {kept - missing:,} of them have some captions ({counts} rows). To keep them, pass {sample}fewer --captions."
    )


def _policy(pairs: Sequence[Pairs], weights: Mapping[str, float], options: Mapping[str, Any]) -> CaptionPolicy:
    """Return how the captions are used; `weights` are empty if the captions were not named."""
    uniform = CaptionPolicy.uniform(chain.from_iterable(each.captions for each in pairs))
    positives = options.get("positives") or uniform.positives
    fewest = min(pairs, key=lambda each: len(each.captions))
    if positives > (most := len(fewest.captions)):
        raise UserError(
            f"--positives is invalid: got {positives}, but {fewest.store.path} has {most} captions "
            f"({', '.join(fewest.captions)}). Give at most {most}."
        )
    if len(set(weights.values())) > 1 and options.get("head") in CLOSED_FORMS:
        raise UserError(f"Caption weights have no effect with --head {options['head']}. Leave one of them out.")
    return CaptionPolicy(weights or uniform.weights, positives)


def _caption_notes(pairs: Sequence[Pairs], policy: CaptionPolicy, *, named: bool) -> list[str]:
    """Return notes about captions that only some of the stores have."""
    notes = []
    for each in pairs:
        unused = [name for name in stored_captions(each.store) if name not in policy.weights]
        if unused and not named:
            notes.append(
                f"Left out {', '.join(unused)} of {each.store.path}, which other stores lack. Use --positives 1 to "
                "sample from all captions of each store."
            )
        if lacking := [name for name in policy.weights if name not in each.captions]:
            notes.append(f"{each.store.path} has no {', '.join(lacking)}; sampling from {', '.join(each.captions)}.")
    return notes
