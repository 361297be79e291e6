"""Export modules as ONNX graphs, and compare these with PyTorch."""

import importlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sail_align.align.runs.checkpoint import Run
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError, import_extra

LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights above which they go into a second file, because a file of ONNX is limited to 2 GiB."""
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
FILES = r"[\w.-]+\.(onnx|onnx\.data|json|md)"
"""Regular expression of the names of the files of an export."""

Inputs = Mapping[str, Tensor]


def require_onnx() -> None:
    """Raise `UserError` if a library is missing."""
    for library in LIBRARIES:
        import_extra(library, f"--to onnx needs {library}. Install it with: pip install 'sail-align[onnx]'.")


def metadata_of(run: Run, identity: Identity) -> dict[str, str]:
    """Return the metadata of the graph of one side: the run, its encoder, and t and b of the loss."""
    return {
        "run_digest": run.digest,
        "encoder": identity.spec.id,
        "encoder_fingerprint": identity.spec.fingerprint,
        "logit_scale": str(run.model.log_scale.exp().item()),
        "logit_bias": str(run.model.bias.item()),
    }


def export_graph(
    module: nn.Module, example: Inputs, dynamic: Mapping[str, Mapping[int, Any]], about: Mapping[str, str]
) -> Any:
    """Return a module that returns embeddings as a model of onnx_ir.

    The exporter's notes, which contain local paths, are left out.

    Args:
        module: The module. Its parameters and the names of the graph's inputs are the keys of `example`.
        example: Inputs for tracing.
        dynamic: Dimensions of each input that may vary.
        about: Metadata of the graph.

    Raises:
        UserError: PyTorch cannot export the module.
    """
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            program: Any = torch.onnx.export(
                module.eval(),
                kwargs=dict(example),
                input_names=list(example),
                output_names=["embeddings"],
                dynamic_shapes=dict(dynamic),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as problem:
        reason = str(problem.__cause__ or problem).strip().partition("\n")[0][:200]
        raise UserError(
            f"PyTorch cannot export this model to ONNX ({reason}). Leave out --whole, or update torch."
        ) from problem
    finally:
        log.setLevel(level)
    graph = program.model.graph
    nodes = list(graph.all_nodes())
    outputs = (value for node in nodes for value in node.outputs)
    for part in (graph, *nodes, *graph.inputs, *graph.initializers.values(), *outputs):
        part.metadata_props.clear()
        part.doc_string = None
    program.model.metadata_props.clear()
    program.model.metadata_props.update(about)
    return program.model


def accept_float16(model: Any) -> None:
    """Change a graph of one float32 input into one that takes float16 and converts it."""
    ir: Any = importlib.import_module("onnx_ir")
    (given,) = model.graph.inputs
    given.dtype = ir.DataType.FLOAT16
    cast = ir.node("Cast", [given], attributes={"to": ir.DataType.FLOAT})
    converted = cast.outputs[0]
    converted.dtype, converted.shape = ir.DataType.FLOAT, given.shape
    given.replace_all_uses_with(converted)
    cast.replace_input_with(0, given)
    model.graph.insert_before(model.graph[0], cast)


def save_graph(model: Any, path: Path) -> None:
    """Write a graph. Weights beyond `LARGEST_FILE` go to a second file, with `.data` after its name."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    weights = f"{path.name}.data" if size > LARGEST_FILE else None
    importlib.import_module("onnx_ir").save(model, path, external_data=weights)


def largest_difference(path: Path, batches: Sequence[tuple[Inputs, Tensor]]) -> float:
    """Return the largest difference of ONNX Runtime's embeddings from those of PyTorch.

    Args:
        path: The graph.
        batches: Inputs and PyTorch's embeddings (B, E), of several sizes.
    """
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [
        session.run(["embeddings"], {name: each.numpy() for name, each in inputs.items()}) for inputs, _ in batches
    ]
    pairs = zip(found, batches, strict=True)
    return max(float(np.abs(theirs - ours.numpy()).max()) for (theirs,), (_, ours) in pairs)


def check_difference(difference: float, tolerance: float) -> None:
    """Raise `UserError` if a difference exceeds the tolerance, or is NaN."""
    if not difference < tolerance:
        raise UserError(
            f"ONNX Runtime's embeddings differ from PyTorch's by {difference:.2g}; expected at most {tolerance:g}. "
            f"Try other versions of {', '.join(LIBRARIES)}."
        )
