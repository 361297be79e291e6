"""What a fit will do, decided and checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from sail_align.align.data.captions import CaptionPolicy, parse_captions, shared_captions
from sail_align.align.data.pairs import (
    Exclusions,
    Pairs,
    Rows,
    open_pairs,
    require_half,
    split_held_out,
    stored_captions,
)
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import LogSumExp, Loss, infonce_loss, sigmoid_loss
from sail_align.align.settings import FitSettings, check_options, choose_settings
from sail_align.extract.errors import UserError

MIN_ROWS = 2


@dataclass(frozen=True)
class Plan:
    """The data, their rows to train on and to hold out, and complete settings."""

    pairs: Sequence[Pairs]
    training: Sequence[Rows]
    held_out: Sequence[Rows]
    settings: FitSettings
    exclusions: Exclusions
    policy: CaptionPolicy

    @property
    def training_rows(self) -> int:
        """Number of pairs to train on."""
        return sum(int(rows.sum()) for rows in self.training)

    @property
    def held_out_rows(self) -> int:
        """Number of pairs to score on."""
        return sum(int(rows.sum()) for rows in self.held_out)

    @property
    def scored(self) -> list[Pairs]:
        """The data with the captions to score with: those that all stores have, or where none is, each one's first."""
        shared = shared_captions([each.captions for each in self.pairs])
        return [each.only(shared or each.captions[:1]) for each in self.pairs]

    @property
    def architecture(self) -> Architecture:
        """The model's shape."""
        settings = self.settings
        return Architecture(
            head="linear" if settings.head == "cca" else settings.head,
            image_dim=self.pairs[0].image.dim,
            text_dim=self.pairs[0].texts[0].dim,
            dim=settings.dim,
            expansion=settings.expansion,
            image_dropout=settings.image_dropout,
            text_dropout=settings.text_dropout,
            linear_path=settings.start == "closed-form" and settings.head in ("mlp", "glu"),
            image_power=settings.image_power,
        )

    @property
    def loss(self) -> Loss:
        """The loss by its settings."""
        weights = self.policy.loss_weights
        if self.settings.loss == "infonce":
            return partial(infonce_loss, weights=weights)
        return partial(sigmoid_loss, divisor=self.settings.divisor, weights=weights)

    def loss_of_parts(self, across: LogSumExp) -> Loss:
        """The loss where a batch lies in several processes; `across` is `infonce_loss`'s."""
        if self.settings.loss == "infonce":
            return partial(infonce_loss, weights=self.policy.loss_weights, across=across)
        return self.loss

    def describe(self) -> str:
        """Say in a line what will be computed."""
        chosen = self.settings
        drawn = f"{self.policy.positives} of " if self.policy.drawn else ""
        data = f"{self.training_rows:,} pairs, {drawn}captions {self.policy.describe()}"
        if chosen.head == "cca":
            return f"CCA of {data}, {chosen.dim} dimensions"
        begin = "" if chosen.start == "random" else f" from a {chosen.start} start"
        steps = "1 step" if chosen.steps == 1 else f"{chosen.steps:,} steps"
        return (
            f"{chosen.head} heads{begin} on {data}; {steps} of {chosen.batch_size:,}, "
            f"{chosen.loss} loss, {chosen.optimizer} at {chosen.lr:g}"
        )

    def record(self) -> dict[str, Any]:
        """Return all that decides the weights, as JSON-able data: what settings.json holds.

        Where the stores lie and what they hold besides is there for readers alone: `decisive` leaves it out.
        """
        return {
            **asdict(self.settings),
            "captions": list(self.policy.weights),
            "caption_weights": list(self.policy.weights.values()),
            "image_encoder": self.pairs[0].image.identity.spec.fingerprint,
            "text_encoder": self.pairs[0].texts[0].identity.spec.fingerprint,
            "stores": [str(each.store.path) for each in self.pairs],
            "store_digests": [each.store.digest for each in self.pairs],
            "features_digests": [each.digest for each in self.pairs],
            "training_rows": self.training_rows,
            "held_out_rows": self.held_out_rows,
            **self.exclusions.record(),
        }

    def checkpoint_record(self) -> dict[str, Any]:
        """Return what a checkpoint says besides its weights: architecture, encoders, settings."""
        return {
            "architecture": asdict(self.architecture),
            "image": self.pairs[0].image.identity.to_json(),
            "text": self.pairs[0].texts[0].identity.to_json(),
            "settings": self.record(),
        }


def make_plan(
    stores: Sequence[Path],
    options: Mapping[str, Any],
    *,
    captions: Sequence[str] | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    exclude: Sequence[Path] = (),
) -> tuple[Plan, list[str]]:
    """Open the stores, choose rows and settings; return the plan, and sentences about what was chosen or changed.

    Args:
        stores: At least one.
        options: Settings that the user gave, as in `check_options`.
        captions: Names as in `parse_captions`; by default those that `open_pairs` takes.
        image_encoder: Which encoder's images, where a store holds several.
        text_encoder: The same for texts.
        exclude: Lists of keys whose rows are left out, as `Exclusions.read` takes them.

    Raises:
        UserError: An option, a list or a store cannot be used, or too few rows are left.
    """
    check_options(options)
    exclusions = Exclusions.read(exclude)
    names, weights = parse_captions(captions or ())
    positives = options.get("positives")
    pairs = open_pairs(stores, names, positives=positives, image_encoder=image_encoder, text_encoder=text_encoder)
    usable = [each.usable() for each in pairs]
    policy = _policy(pairs, dict(zip(names, weights, strict=True)), options)
    if not names:
        require_half(pairs, usable)
    unusable = sum(each.store.rows for each in pairs) - sum(int(rows.sum()) for rows in usable)
    excluded = [exclusions.rows(each.store) for each in pairs]
    usable = [rows & ~left_out for rows, left_out in zip(usable, excluded, strict=True)]
    held_out = split_held_out(pairs, usable, options.get("held_out", FitSettings.held_out))
    training = [rows & ~held for rows, held in zip(usable, held_out, strict=True)]
    count = sum(int(rows.sum()) for rows in training)
    if count < MIN_ROWS:
        raise UserError(
            f"{' with '.join(map(str, stores))} has {count} pair{'s' * (count != 1)} to train on, that is rows with an "
            f"image and the captions {', '.join(policy.weights)}{' that no list excludes' if exclude else ''}; "
            "see `sail-extract status`."
        )
    dims = {"image_dim": pairs[0].image.dim, "text_dim": pairs[0].texts[0].dim}
    settings, notes = choose_settings(options, rows=count, **dims)
    notes[:0] = _on_captions(pairs, policy, named=bool(names))
    if exclude:
        fewer = sum(int(left_out.sum()) for left_out in excluded)
        notes.insert(0, f"{fewer:,} rows are excluded by a list of {len(exclusions.keys):,} keys.")
    if unusable:
        notes.insert(0, f"{unusable:,} rows lack an image or a caption and are left out.")
    if settings.held_out > 0 and not any(rows.any() for rows in held_out):
        notes.append(f"{count} pairs are too few to hold some out: the run is not scored.")
    return Plan(pairs, training, held_out, settings, exclusions, policy), notes


def _policy(pairs: Sequence[Pairs], weights: Mapping[str, float], options: Mapping[str, Any]) -> CaptionPolicy:
    """Return what becomes of the stores' captions; there are no weights where the captions were not named."""
    uniform = CaptionPolicy.uniform(chain.from_iterable(each.captions for each in pairs))
    positives = options.get("positives") or uniform.positives
    fewest = min(pairs, key=lambda each: len(each.captions))
    if positives > (most := len(fewest.captions)):
        raise UserError(
            f"--positives {positives} is more than the captions of {fewest.store.path}: {', '.join(fewest.captions)}; "
            f"give at most {most}."
        )
    if len(set(weights.values())) > 1 and options.get("head") == "cca":
        raise UserError("Weights of captions have no effect with --head cca, which takes all alike; leave them out.")
    return CaptionPolicy(weights or uniform.weights, positives)


def _on_captions(pairs: Sequence[Pairs], policy: CaptionPolicy, *, named: bool) -> list[str]:
    """Return sentences about captions that only some of the stores have."""
    notes = []
    for each in pairs:
        unused = [name for name in stored_captions(each.store) if name not in policy.weights]
        if unused and not named:
            left = f"{each.store.path} has {', '.join(unused)} too, which not all stores have and which is left out"
            notes.append(f"{left}; --positives 1 draws from what each has.")
        if lacking := [name for name in policy.weights if name not in each.captions]:
            drawn = ", ".join(each.captions)
            notes.append(f"{each.store.path} has no {', '.join(lacking)}: captions of its rows are drawn from {drawn}.")
    return notes
