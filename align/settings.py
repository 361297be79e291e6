"""Settings of a fit. Each is declared once, with its type, default per preset, bounds and help text.

Checks, command-line options, presets, the values that `tune` tries and the table in docs/training.md derive from the
declarations. To add a setting, add a field here and the code that uses it.
"""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, get_type_hints

from sail_align.extract.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "tf32", "bfloat16"]
OnCollapse = Literal["stop", "warn"]
CacheChoice = Literal["auto", "device", "host", "none"]

UNITS = {"s": 1, "m": 60, "h": 3_600}

SMALL_ROWS, PAPER_ROWS = 10_000, 100_000
"""The default preset is `small` below the first number of pairs, `medium` below the second, and `paper` from there."""

CLOSED_FORM_DIM = 256

HIDDEN_ROWS = 1_000
"""Hidden units of texts gained nothing with 500 pairs, and one to two points of corrected R@1 with 1,600 and more."""

CLOSED_FORMS = ("cca", "pcca")
"""Heads that are computed without training."""

MIN_REACH = 5e-3
"""Learning rates that add up to less leave a random start almost untrained: 200 steps at 1e-5 learn next to nothing."""

COMPARED: dict[str, Any] = {"preset": "paper", "held_out": 0.2, "warmup": 0.1, "bank": 0}
"""Options of fits that are compared. 5 % of a small store would separate them poorly. The warm-up is that of the script
by the paper's authors: a sudden start can collapse the sigmoid loss."""

COMPARED_FEW: dict[str, Any] = {"lr": 3e-4, "batch_size": 256, "epochs": 20}
"""Further options on stores of few pairs, where the paper's rate leaves a randomly initialised head untrained."""


_HEAD = (
    "Kind of both heads. `cca` is computed in closed form, without training; `pcca` adds its log-likelihood "
    "ratio as the corrected similarity."
)
_TEXT_HIDDEN = (
    "Hidden units beside the linear map of texts, with linear and closed-form heads; the closed form fits both. Below "
    "1,000 pairs the default is 0."
)
_RIDGE = "Regularisation of the closed form; `auto` cross-validates it."
_DIM = f"1024; with a closed form: {CLOSED_FORM_DIM}"
_BIAS = "Initial bias b; `auto` balances positives and negatives, and is the default with --temperature auto."
_BANK = "Training pairs kept with the heads to correct retrieval for hubs; 0 keeps none."
_ITEM_BIAS = (
    "Biases of single images and texts in the sigmoid loss, which absorb hubs; `linear` in the features. They are "
    "dropped after training."
)
_HELD_OUT = "Fraction of the pairs to score on: at least 100 pairs (a fifth, if there are few), at most 5,000."
_PATCH_POWER = "The same exponent for the patches of an image, as in segmentation. Training does not use it."
_PATIENCE = "Stop after this many scorings without better held-out scores; a run has 20 scorings."
_VERIFY = "When to compare features with their checksums: on their first use, in every epoch, or never."
_PRECISION = "auto: bfloat16 on a GPU that has it, else float32"
_ORDER = "Order of the pairs in an epoch: shuffled within windows of 131,072, or one permutation of all."
_CACHE = (
    "Memory that holds the features during training: the GPU's (`device`), the machine's (`host`), or `none`, which "
    "reads the stores. The weights are the same."
)


def declare(group: str, help: str, default: Any = MISSING, **more: Any) -> Any:
    """Declare a setting as a dataclass field; the keywords are attributes of `Setting`."""
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Everything except the data that decides a run's weights. The defaults are the paper's."""

    head: Literal["linear", "mlp", "glu", "cca", "pcca"] = declare(
        "Heads", _HEAD, "glu", small="linear", medium="glu", cca=True, search=("linear", "glu", "mlp", "cca")
    )
    expansion: int = declare(
        "Heads",
        "Hidden units per input dimension.",
        4,
        small=1,
        ge=1,
        le=64,
        unused_with=("--head linear",),
        search=(1, 2, 4),
    )
    dim: int = declare(
        "Heads",
        "Dimension of the shared space.",
        1_024,
        ge=1,
        le=65_536,
        shown=_DIM,
        cca=True,
        search=(128, 256, 384, 512, 1_024),
    )
    image_dropout: float = declare(
        "Heads",
        "Dropout on the image head's inputs and hidden units.",
        0.0,
        small=0.3,
        ge=0,
        le=0.95,
        search=(0.0, 0.1, 0.3, 0.5),
    )
    text_dropout: float = declare(
        "Heads",
        "Dropout on the text head's inputs and hidden units.",
        0.0,
        small=0.1,
        ge=0,
        le=0.95,
        search=(0.0, 0.1, 0.3),
    )
    image_power: float = declare(
        "Heads",
        "Exponent applied to image features, keeping their signs.",
        1.0,
        small=0.5,
        ge=0.1,
        le=1,
        cca=True,
        search=(0.3, 0.5, 0.7, 1.0),
    )
    patch_power: float | None = declare("Heads", _PATCH_POWER, None, ge=0.1, le=1, shown="--image-power", cca=True)
    text_hidden: int = declare(
        "Heads",
        _TEXT_HIDDEN,
        0,
        small=1_536,
        medium=0,
        ge=0,
        le=8_192,
        unused_with=("--head glu", "--head mlp", "--start random"),
        cca=True,
        search=(0, 512, 1_536),
    )
    start: Literal["random", "closed-form"] = declare(
        "Heads", "Initial weights; `closed-form` initialises a linear path with the CCA.", "random", small="closed-form"
    )
    ridge: float | Literal["auto"] = declare(
        "Heads", _RIDGE, "auto", ge=1e-6, le=1e6, cca=True, search=("auto", 0.5, 1.0, 2.0, 4.0)
    )
    bank: int = declare("Heads", _BANK, 4_096, ge=0, le=65_536, cca=True)
    positives: int | None = declare(
        "Data",
        "Captions sampled per image and step, in proportion to their weights.",
        None,
        ge=1,
        le=1_000,
        shown="all",
    )
    order: Literal["windows", "permuted"] = declare("Data", _ORDER, "windows")
    loss: Literal["sigmoid", "infonce"] = declare("Loss", "Kind of contrastive loss.", "sigmoid")
    divisor: Literal["pairs", "batch"] = declare(
        "Loss", "Divisor of the sigmoid loss: |B|² (pairs) or |B| (batch).", "pairs", unused_with=("--loss infonce",)
    )
    temperature: float | Literal["auto"] = declare(
        "Loss",
        "Initial temperature t; `auto` is 2 ln(batch size).",
        20.0,
        small=15.0,
        ge=1,
        le=100,
        search=(10.0, 15.0, 20.0),
    )
    bias: float | Literal["auto"] = declare(
        "Loss", _BIAS, -10.0, small=-8.0, ge=-100, le=100, unused_with=("--loss infonce",)
    )
    item_bias: Literal["none", "linear"] = declare(
        "Loss", _ITEM_BIAS, "none", unused_with=("--loss infonce",), search=("none", "linear")
    )
    optimizer: Literal["lion", "adamw"] = declare("Optimiser", "Kind of optimiser.", "lion")
    lr: float = declare(
        "Optimiser",
        "Peak learning rate of a cosine schedule.",
        1e-5,
        ge=1e-9,
        le=1,
        search=(3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    )
    weight_decay: float = declare("Optimiser", "Weight decay of the weight matrices.", 1e-7, ge=0, le=10)
    warmup: float = declare("Optimiser", "Fraction of the steps with a linear warm-up.", 0.1, small=0.0, ge=0, le=1)
    batch_size: int = declare("Optimiser", "Pairs per step, over all processes.", 36_864, small=512, ge=2, le=1_000_000)
    steps: int = declare("Optimiser", "Optimiser steps, instead of --epochs.", ge=1, le=1_000_000_000)
    patience: int | None = declare("Run", _PATIENCE, None, ge=1, le=1_000, shown="never")
    seed: int = declare("Run", "Seed of weights, batches and dropout.", 0, ge=0, le=2**31 - 1, cca=True)
    held_out: float = declare("Data", _HELD_OUT, 0.05, ge=0, le=0.5, cca=True)
    precision: Precision = declare(  # noqa: RUF009 (a field, not a value)
        "Run", "Precision of matrix products. Everything else is float32.", "float32", also=("auto",), shown=_PRECISION
    )

    @property
    def closed_form(self) -> bool:
        """Whether a closed-form map is computed."""
        return self.head in CLOSED_FORMS or self.start == "closed-form"

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step 0, 1, …: a linear warm-up, then half a cosine down to 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm))) / 2


@dataclass(frozen=True, kw_only=True)
class FitOptions(FitSettings):
    """Settings, and options that are not recorded with a run: they choose settings, or do not affect the weights."""

    # The paper reports its training time only. 100 epochs and the warm-up are those of its authors' script.
    epochs: float = declare(
        "Optimiser",
        "Passes over the pairs.",
        100,
        small=25,
        ge=0.01,
        le=1_000_000,
        unused_with=("--steps",),
        search=(12, 25, 50, 100),
    )
    preset: Literal["paper", "medium", "small"] | None = declare(
        "Run",
        "Defaults of the other settings.",
        None,
        shown=f"small below {SMALL_ROWS:,} pairs, medium below {PAPER_ROWS:,}, else paper",
    )
    keep: int = declare("Run", "Number of resumable checkpoints to keep, besides the best one.", 2, ge=1, cca=True)
    verify: Literal["first-epoch", "always", "off"] = declare("Data", _VERIFY, "first-epoch", cca=True)
    cache: CacheChoice = declare("Data", _CACHE, "auto")  # noqa: RUF009 (a field, not a value)
    on_collapse: OnCollapse = declare(  # noqa: RUF009 (a field, not a value)
        "Run", "Reaction to a collapse of training.", "stop", cca=True
    )


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    Attributes:
        name: Name of the field.
        hint: Its type.
        default: Value of preset `paper`.
        group: Heading of its option in `--help`.
        help: Help text.
        small: Value of preset `small`, if it differs.
        medium: Value of preset `medium`, if it differs from that of `small`.
        ge: Lowest number allowed.
        le: Highest number allowed.
        also: Choices of the option that are replaced before the setting is used.
        shown: Text of the default, where the value says too little.
        unused_with: Options beside which this one has no effect.
        cca: Whether the closed-form heads use it.
        search: Values that `sail-align tune` tries. Empty: it keeps the default.
    """

    name: str
    hint: Any
    default: Any
    group: str
    help: str
    small: Any = None
    medium: Any = None
    ge: float = -math.inf
    le: float = math.inf
    also: tuple[str, ...] = ()
    shown: str = ""
    unused_with: tuple[str, ...] = ()
    cca: bool = False
    search: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        """Name of the command-line option."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """Words that are valid values."""
        literals = [each for each in (self.hint, *get_args(self.hint)) if get_origin(each) is Literal]
        return self.also + tuple(word for each in literals for word in get_args(each))

    @property
    def number(self) -> type[int] | type[float] | None:
        """Type of the numbers that are valid values, if any."""
        return next((each for each in (self.hint, *get_args(self.hint)) if each in (int, float)), None)

    @property
    def values(self) -> str:
        """Valid values, in words."""
        if self.number is None:
            return ", ".join(self.choices)
        span = f"{self.ge:,} to {self.le:,}" if self.le < math.inf else f"{self.ge:,} or more"
        return ", ".join((*self.choices, span))

    @property
    def defaults(self) -> tuple[str, str]:
        """Defaults of the presets `paper` and `small`, in words."""
        paper = self.shown or ("" if self.default is MISSING else str(self.default))
        if self.small is None:
            return paper, paper
        return paper, str(self.small) + ("" if self.medium is None else f" (medium: {self.medium})")

    def parse(self, value: Any) -> Any:
        """Return a valid value; numbers may be given as text.

        Raises:
            UserError: The value is invalid.
        """
        parsed = value
        is_word = isinstance(value, str) and value in self.choices
        if self.number and not is_word and not isinstance(value, bool):
            with suppress(ValueError, TypeError, OverflowError):
                exact = isinstance(value, str) or self.number is float or value == int(value)
                parsed = self.number(value) if exact else value
        is_number = type(parsed) is self.number and self.ge <= parsed <= self.le
        if not (is_number or (isinstance(parsed, str) and parsed in self.choices)):
            is_short = isinstance(parsed, float) or (type(parsed) is int and abs(parsed) <= 10**15)
            got = f"{parsed:g}" if is_short else repr(str(parsed)[:100])  # `:g` cannot print an int of 400 digits
            raise UserError(f"{self.flag} is invalid: got {got}, expected {self.values}.")
        return parsed


SETTINGS = {
    each.name: Setting(each.name, get_type_hints(FitOptions)[each.name], each.default, **each.metadata)
    for each in fields(FitOptions)
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"epochs": FitOptions.epochs},
    # Thousands of pairs are soon memorised by hidden units: start from the best linear maps, and use dropout. Mean R@1
    # on 400 of 2,000 photos and on 600 of the demo's 3,000 scenes, held out, as cosine / corrected, two splits: GLU and
    # image power 1 (the former preset, but for its ridge) 31.3 / 34.0 and 61.3 / 66.9; GLU and power 0.5 32.4 / 33.6
    # and 65.8 / 71.2; linear and power 0.5 31.9 / 34.4 and 66.6 / 70.9, in a third of the time.
    "small": {name: each.small for name, each in SETTINGS.items() if each.small is not None},
    "medium": {
        name: each.small if each.medium is None else each.medium
        for name, each in SETTINGS.items()
        if each.small is not None
    },
}


def parse_time(text: str) -> float:
    """Return the seconds of a time such as 90s, 10m or 1.5h.

    Raises:
        UserError: The text is not a time above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--budget is invalid: got {text[:100]!r}, expected a time such as 90s, 10m or 2h.")
    return float(match[1]) * UNITS[match[2]]


def parse_budget(text: str, options: Mapping[str, Any]) -> float:
    """Return the seconds of `--budget`, beside options that were given.

    Raises:
        UserError: The text is not a time, or an option leaves the budget without effect.
    """
    others = [f"--{name}" for name in ("steps", "epochs") if name in options]
    others += [f"--head {each}" for each in CLOSED_FORMS if options.get("head") == each]
    if others:
        raise UserError(f"--budget has no effect with {others[0]}. Leave one of them out.")
    return parse_time(text)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given (not None), as valid values.

    Args:
        options: Fields of `FitOptions`. Numbers may be given as text.

    Raises:
        UserError: A value is invalid, or has no effect beside the others.
    """
    given = {name: SETTINGS[name].parse(value) for name, value in options.items() if value is not None}
    for name in sorted(given):
        if condition := unused_beside(name, given):
            raise UserError(f"{SETTINGS[name].flag} has no effect with {condition}. Leave one of them out.")
    return given


def unused_beside(name: str, given: Mapping[str, Any]) -> str | None:
    """Return the option, as typed, beside which a setting has no effect. None if it has one."""
    setting = SETTINGS[name]
    conditions: list[str] = [*setting.unused_with]
    if not setting.cca:
        conditions += (f"--head {each}" for each in CLOSED_FORMS)
    for condition in conditions:
        other, *values = condition.removeprefix("--").split()
        if other in given and (not values or given[other] in values):
            return condition
    return None


def default_preset(rows: int) -> str:
    """Return the preset of a fit of so many pairs."""
    return "small" if rows < SMALL_ROWS else "medium" if rows < PAPER_ROWS else "paper"


def choose_settings(
    options: Mapping[str, Any], *, rows: int, image_dim: int, text_dim: int, size: int | None = None
) -> tuple[FitSettings, list[str]]:
    """Return complete settings, and notes about what was chosen or changed.

    Args:
        options: Result of `check_options`; they override the preset, which depends on `rows` if none is named.
        rows: Number of pairs to train on.
        image_dim: Dimension of the image features.
        text_dim: Dimension of the text features.
        size: Number of pairs on which the defaults depend, if it is not `rows`.

    Raises:
        UserError: An option does not fit the other settings or the features' dimensions.
    """
    notes = []
    size = rows if size is None else size
    preset = options.get("preset") or default_preset(size)
    chosen = {**PRESETS[preset], **options}
    epochs = chosen["epochs"]
    recorded = {each.name for each in fields(FitSettings)}
    chosen = {name: value for name, value in chosen.items() if name in recorded}
    if "preset" not in options and chosen.get("head") not in CLOSED_FORMS:
        other = "small" if preset == "paper" else "paper"
        notes.append(f"Using --preset {preset} for {rows:,} pairs; pass --preset {other} for the other defaults.")
    if chosen.get("temperature") == "auto":
        chosen["bias"] = options.get("bias", "auto")
    settings = FitSettings(**{"steps": 0, **chosen})
    fits_hidden = settings.head not in ("glu", "mlp") and settings.closed_form
    if options.get("text_hidden") and not fits_hidden:
        raise UserError(
            f"--text-hidden has no effect with the defaults for {size:,} pairs. Add --head linear --start closed-form."
        )
    if not fits_hidden or (size < HIDDEN_ROWS and "text_hidden" not in options):
        chosen["text_hidden"] = 0
    if settings.loss == "infonce" and settings.bias == "auto":
        raise UserError("--temperature auto is for the sigmoid loss. Give a number with --loss infonce.")
    if "expansion" in options and settings.head == "linear":
        raise UserError(
            f"--expansion has no effect with --head linear, the default for {rows:,} pairs. Add --head glu."
        )
    if "ridge" in options and not settings.closed_form:
        raise UserError("--ridge has no effect with --start random. Leave one of them out.")
    if settings.closed_form:
        most = min(image_dim, text_dim + chosen.get("text_hidden", settings.text_hidden))
        chosen.setdefault("dim", min(CLOSED_FORM_DIM, most))
        if chosen["dim"] > most:
            raise UserError(
                f"--dim is invalid: got {chosen['dim']}, but a closed form of features with {image_dim} and {text_dim} "
                f"dimensions has at most {most}. Lower it, or use --start random."
            )
    chosen["batch_size"] = min(settings.batch_size, rows)
    if settings.head in CLOSED_FORMS:
        return FitSettings(**{**chosen, "steps": 0, "warmup": 0.0}), notes  # it has no schedule
    if settings.batch_size > rows:
        notes.append(f"Reduced the batch size from {settings.batch_size:,} to all {rows:,} pairs.")
    chosen.setdefault("steps", max(1, round(epochs * rows / chosen["batch_size"])))
    reach = settings.lr * chosen["steps"] / 2  # the mean rate of a cosine is half its peak; Lion moves by the rate
    if reach < MIN_REACH and not settings.closed_form:
        notes.append(
            f"{chosen['steps']} steps at a learning rate of {settings.lr:g} change no weight by more than {reach:.1g}. "
            "The run will hardly learn; raise --lr or --steps."
        )
    return FitSettings(**chosen), notes


def choose_precision(asked: str, device: "torch.device") -> tuple[Precision, str]:
    """Return the precision of matrix products, and a note on a choice; "" if there was none.

    `auto` is bfloat16 on a GPU that computes in it, and float32 elsewhere.

    Args:
        asked: Value of the option.
        device: Device of the fit.

    Raises:
        UserError: The device does not support it.
    """
    import torch

    from sail_align.extract.encoders.runtime import has_bfloat16, require_tf32

    if asked == "tf32":
        require_tf32(device.type)
    if asked != "auto" or device.type != "cuda":
        return cast(Precision, "float32" if asked == "auto" else asked), ""
    name = torch.cuda.get_device_name(device)
    if has_bfloat16(device):
        return "bfloat16", f"Using --precision bfloat16, which {name} computes natively."
    return "float32", f"Using --precision float32, because {name} only emulates bfloat16."


def settings_table() -> str:
    """Return all settings as a Markdown table."""
    rows = [("Group", "Option", "Default", "With `small`", "Values", "Meaning"), ("---",) * 6]
    for setting in sorted(SETTINGS.values(), key=lambda each: each.group):
        paper, small = setting.defaults
        rows.append(
            (setting.group, f"`{setting.flag}`", paper, "" if small == paper else small, setting.values, setting.help)
        )
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
