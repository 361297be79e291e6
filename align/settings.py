"""The settings of a fit: the paper's by default, others by a preset's name, chosen and checked before any computing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sail_align.extract.errors import UserError

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Everything besides the data that decides a run's weights. The defaults are the paper's.

    `head` "cca" is a linear head that is computed and not trained: its `steps` are 0. `expansion` and the dropouts
    are the heads', `dim` is the dimension of the shared space. Image features are raised to `image_power`, their signs
    kept. `ridge` belongs to a closed form, `divisor` to the sigmoid loss. `positives` captions of each image are drawn
    for a step, None takes all. `temperature` and `bias` are what t and b start from; "auto" is a t by the batch size,
    and the b at which the masses of positives and negatives are in balance. `warmup` is a fraction of the steps,
    `held_out` the fraction of the rows that is kept out of training and scored. Products are computed in `precision`,
    weights and all sums in float32.
    """

    head: Literal["linear", "mlp", "glu", "cca"] = "glu"
    expansion: int = 4
    dim: int = 1_024
    image_dropout: float = 0.0
    text_dropout: float = 0.0
    image_power: float = 1.0
    start: Literal["random", "closed-form"] = "random"
    ridge: float = 2.0
    positives: int | None = None
    loss: Literal["sigmoid", "infonce"] = "sigmoid"
    divisor: Literal["pairs", "batch"] = "pairs"
    temperature: float | Literal["auto"] = 20.0
    bias: float | Literal["auto"] = -10.0
    optimizer: Literal["lion", "adamw"] = "lion"
    lr: float = 1e-5
    weight_decay: float = 1e-7
    warmup: float = 0.0
    batch_size: int = 36_864
    steps: int
    seed: int = 0
    held_out: float = 0.05
    precision: Precision = "float32"

    @property
    def closed_form(self) -> bool:
        """Whether a closed-form map is computed."""
        return self.head == "cca" or self.start == "closed-form"


PRESETS: dict[str, dict[str, Any]] = {
    # The paper does not say how long: 50 epochs of its millions of pairs are the hours on one GPU that it reports.
    "paper": {"epochs": 50},
    # For thousands of pairs: they are soon known by heart, so start from the best linear maps, add little and drop out
    # some. Mean R@1 on 400 of 2,000 photos and on 600 of the demo's 3,000 scenes, kept out: closed form 30.2 and 55.2,
    # this 32.7 and 60.0; with dropout 0.7 and 0.3 it is 33.2 and 50.7. An image power of 0.5 gains one point on photos
    # and five on scenes, but loses three points of mIoU on patches: it is left to the user.
    "small": {
        "start": "closed-form",
        "expansion": 1,
        "image_dropout": 0.3,
        "text_dropout": 0.1,
        "temperature": 15.0,
        "bias": -8.0,
        "batch_size": 512,
        "epochs": 25,
    },
}
PAPER_ROWS = 100_000
"""From this many pairs on, the paper's settings are the default."""

CLOSED_FORM_DIM = 256

COMPARED_HELD_OUT = 0.2
"""Of the pairs, where recipes or encoders are compared: fit's 5 % of a small store tell little apart."""

CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "head": ("linear", "mlp", "glu", "cca"),
    "start": ("random", "closed-form"),
    "loss": ("sigmoid", "infonce"),
    "divisor": ("pairs", "batch"),
    "optimizer": ("lion", "adamw"),
    "precision": ("auto", "float32", "tf32", "bfloat16"),
    "on_collapse": ("stop", "warn"),
}
LIMITS: dict[str, tuple[float, float]] = {
    "expansion": (1, 64),
    "dim": (1, 65_536),
    "image_dropout": (0, 0.95),
    "text_dropout": (0, 0.95),
    "image_power": (0.1, 1),
    "positives": (1, 1_000),
    "ridge": (1e-6, 1e6),
    "temperature": (1, 100),
    "bias": (-100, 100),
    "lr": (1e-9, 1),
    "weight_decay": (0, 10),
    "warmup": (0, 1),
    "batch_size": (2, 1_000_000),
    "epochs": (0.01, 1_000_000),
    "steps": (1, 1_000_000_000),
    "seed": (0, 2**31 - 1),
    "held_out": (0, 0.5),
}
TRAINED = 5e-3
"""Rates that sum up to less leave a random start all but untrained: 200 steps at 1e-5 learn next to nothing."""


def check_options(options: Mapping[str, Any]) -> None:
    """Check what the user gave, by itself: fields of `FitSettings`, `epochs`, `preset`.

    Raises:
        UserError: A value is out of range, or would change nothing beside the others.
    """
    for name, value in options.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{_flag(name)} {value!r} is none of: {', '.join(CHOICES[name])}.")
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if name in LIMITS and value != "auto" and not low <= value <= high:
            raise UserError(f"{_flag(name)} {value:g} is out of range; give a number from {low:g} to {high:g}.")
    head, loss = options.get("head"), options.get("loss")
    trained = {field.name for field in fields(FitSettings)} | {"epochs", "preset"}
    idle = [
        (
            head == "cca",
            trained - {"head", "dim", "image_power", "ridge", "held_out"},
            "--head cca, which is computed and not trained",
        ),
        (head == "linear", {"expansion"}, "--head linear, which has no hidden units"),
        (loss == "infonce", {"divisor", "bias"}, "--loss infonce"),
        ("steps" in options, {"epochs"}, "--steps"),
    ]
    for applies, names, beside in idle:
        if applies and (useless := names.intersection(options)):
            raise UserError(f"{_flag(min(useless))} has no effect with {beside}; leave one of them out.")


def number_or_auto(name: str, text: str | None) -> float | Literal["auto"] | None:
    """Return what was typed for an option that takes a number or auto; None stays None.

    Raises:
        UserError: It is neither.
    """
    try:
        return None if text is None else "auto" if text == "auto" else float(text)
    except ValueError:
        raise UserError(f"{_flag(name)} {text!r} is neither a number nor auto.") from None


def choose_settings(
    options: Mapping[str, Any], *, rows: int, image_dim: int, text_dim: int
) -> tuple[FitSettings, list[str]]:
    """Return complete settings for `rows` pairs to train on, and sentences about what was chosen or changed.

    `options`, which have passed `check_options`, override the preset; where none is named, it goes by `rows`.

    Raises:
        UserError: An option does not go with the start or with the features' dimensions.
    """
    notes = []
    preset = options.get("preset") or ("paper" if rows >= PAPER_ROWS else "small")
    chosen = {**PRESETS[preset], **options}
    epochs = chosen.pop("epochs")
    chosen.pop("preset", None)
    if "preset" not in options and chosen.get("head") != "cca":
        other = "small" if preset == "paper" else "paper"
        notes.append(f"{rows:,} pairs: the settings are those of preset {preset!r} (--preset {other} for the others).")
    if chosen.get("temperature") == "auto":
        chosen["bias"] = options.get("bias", "auto")
    settings = FitSettings(**{"steps": 0, **chosen})
    if settings.loss == "infonce" and settings.bias == "auto":
        raise UserError("--temperature auto balances the sigmoid loss; give a number with --loss infonce.")
    if "ridge" in options and not settings.closed_form:
        raise UserError("--ridge has no effect with --start random; leave one of them out.")
    if settings.closed_form:
        chosen["dim"] = _closed_form_dim(chosen.get("dim"), image_dim, text_dim)
    chosen["batch_size"] = min(settings.batch_size, rows)
    if settings.head == "cca":
        return FitSettings(**{**chosen, "steps": 0}), notes
    if settings.batch_size > rows:
        notes.append(f"A batch of {settings.batch_size:,} is more than there are pairs: reduced to all {rows:,}.")
    chosen.setdefault("steps", max(1, round(epochs * rows / chosen["batch_size"])))
    reach = settings.lr * chosen["steps"] / 2
    if reach < TRAINED and not settings.closed_form:
        notes.append(
            f"{chosen['steps']} steps at a rate of {settings.lr:g} move no weight by more than {reach:.1g}: expect a "
            "run that has hardly learned; raise --lr or --steps."
        )
    return FitSettings(**chosen), notes


def _closed_form_dim(dim: int | None, image_dim: int, text_dim: int) -> int:
    most = min(image_dim, text_dim)
    if dim is not None and dim > most:
        raise UserError(
            f"--dim {dim} is more than a closed form of {image_dim} and {text_dim} dimensions has; give at most {most} "
            "or --start random."
        )
    return dim or min(CLOSED_FORM_DIM, most)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
