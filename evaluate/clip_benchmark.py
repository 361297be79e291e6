"""LAION's clip-benchmark on a run: its own code, data sets and numbers, with our model in the place of an OpenCLIP one.

`load_sail` is a loader in its sense, and `register` puts it beside the others:

    clip_benchmark.models.load_clip("sail", "runs/demo-glu", "", None, "cpu") → (model, transform, tokenizer)
"""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sail_align.align.pretrained import PretrainedModel, load, read
from sail_align.extract.errors import UserError

MODEL_TYPE = "sail"

Loaded = tuple[PretrainedModel, Callable[[Image.Image], Tensor], Callable[[str | Sequence[str]], Tensor]]


def load_sail(
    model_name: str | Path, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> Loaded:
    """Return what clip-benchmark asks of a loader: model, transform and tokenizer.

    Args:
        model_name: What `load` takes: a run, an exported folder, or a repository of the hub.
        pretrained: Not used: it tells apart weights of one architecture, and here there is one.
        cache_dir: Not used: encoders lie in the caches of their libraries.
        device: Where the model computes.
    """
    model = load(model_name, device=str(device))
    return model, model.preprocess, model.tokenizer


def register() -> None:
    """Let clip-benchmark know the model type `sail`.

    Raises:
        UserError: It is not installed.
    """
    models = _clip_benchmark("models")
    models.TYPE2FUNC[MODEL_TYPE] = load_sail
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    # Version 1.6 calls float() on arrays of one number, which new NumPy refuses: its module gets one that takes them.
    vars(_clip_benchmark("metrics.zeroshot_classification"))["float"] = _number


def evaluate(reference: str, arguments: Sequence[str]) -> None:
    """Do what `clip_benchmark eval ARGUMENTS` does, with the model of a run.

    Its result files are named after the model, so they get a name without slashes.

    Raises:
        UserError: clip-benchmark is not installed, or an argument would choose another model.
    """
    for argument in arguments:
        option = argument.split("=")[0]  # or the beginning of one, which argparse takes for it
        if len(option) > 2 and any(name.startswith(option) for name in ("--model_type", "--pretrained_model")):
            raise UserError(f"{argument} chooses another model than {reference}; leave it out.")
    program = _clip_benchmark("cli")
    register()
    name, digest = _name(reference), read(reference).digest[:12]
    loaders = _clip_benchmark("models").TYPE2FUNC
    loaders[MODEL_TYPE] = lambda model_name, **where: load_sail(reference, **where)
    typed = sys.argv
    sys.argv = ["clip_benchmark", "eval", "--model_type", MODEL_TYPE, "--model", name, "--pretrained", digest]
    sys.argv += arguments
    try:
        program.main()
    finally:
        sys.argv, loaders[MODEL_TYPE] = typed, load_sail


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, np.ndarray) else value)


def _name(reference: str) -> str:
    path = Path(reference)
    return path.resolve().name if path.is_dir() else re.sub(r"[^\w.-]+", "-", reference)


def _clip_benchmark(module: str) -> Any:
    try:
        return importlib.import_module(f"clip_benchmark.{module}")
    except ImportError as problem:
        raise UserError(
            f"clip-benchmark cannot be used ({problem}); install it with: pip install 'sail-align[eval]'."
        ) from problem
