"""LAION's clip-benchmark on a run: its code, data sets and metrics, with our model instead of an OpenCLIP one.

`register` adds `load_sail` to its loaders:

    clip_benchmark.models.load_clip("sail", "runs/demo-linear", "", None, "cpu") → (model, transform, tokenizer)
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


def load_sail(
    model_name: str | Path, pretrained: str = "", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[PretrainedModel, Callable[[Image.Image], Tensor], Callable[[str | Sequence[str]], Tensor]]:
    """Return model, transform and tokenizer, with the signature of a clip-benchmark loader.

    Args:
        model_name: A run, an exported folder, or a repository of the hub, as for `load`.
        pretrained: Not used. Elsewhere it selects weights of an architecture.
        cache_dir: Not used. Encoders are in the caches of their libraries.
        device: Device of the model.
    """
    model = load(model_name, device=str(device))
    return model, model.preprocess, model.tokenizer


def register() -> None:
    """Add the model type `sail` to clip-benchmark.

    Raises:
        UserError: clip-benchmark is not installed.
    """
    models = _clip_benchmark("models")
    models.TYPE2FUNC[MODEL_TYPE] = load_sail
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    # Version 1.6 calls float() on arrays with one element, which new NumPy rejects. Give it one that accepts them.
    accuracy = vars(_clip_benchmark("metrics.zeroshot_classification"))
    accuracy["float"] = lambda value: float(value.item() if isinstance(value, np.ndarray) else value)


def evaluate(reference: str, arguments: Sequence[str]) -> None:
    """Run `clip_benchmark eval ARGUMENTS` with the model of a run.

    Its result files are named after the model, so the model gets a name without slashes.

    Raises:
        UserError: clip-benchmark is not installed, or an argument would choose another model.
    """
    for argument in arguments:
        option = argument.split("=")[0]  # argparse also accepts the beginning of an option
        if len(option) > 2 and any(name.startswith(option) for name in ("--model_type", "--pretrained_model")):
            raise UserError(f"{argument} chooses another model than {reference}. Remove it.")
    program = _clip_benchmark("cli")
    register()
    path = Path(reference)
    name = path.resolve().name if path.is_dir() else re.sub(r"[^\w.-]+", "-", reference)
    digest = read(reference).digest[:12]
    loaders = _clip_benchmark("models").TYPE2FUNC
    loaders[MODEL_TYPE] = lambda model_name, **where: load_sail(reference, **where)
    argv = sys.argv
    sys.argv = ["clip_benchmark", "eval", "--model_type", MODEL_TYPE, "--model", name, "--pretrained", digest]
    sys.argv += arguments
    try:
        program.main()
    finally:
        sys.argv, loaders[MODEL_TYPE] = argv, load_sail


def _clip_benchmark(module: str) -> Any:
    try:
        return importlib.import_module(f"clip_benchmark.{module}")
    except ImportError as problem:
        raise UserError(
            f"clip-benchmark cannot be used ({problem}). Install it with: pip install 'sail-align[eval]'."
        ) from problem
