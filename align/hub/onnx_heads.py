"""Export the heads of a run as ONNX graphs, for programs without PyTorch."""

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sail_align.align.hub.folder import write_folder
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.runs.checkpoint import load_run
from sail_align.extract.errors import UserError, import_extra

TOLERANCE = 1e-5
"""Maximum difference between the coordinates of unit vectors from ONNX Runtime and PyTorch."""
_LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


def write_onnx(path: Path, folder: Path) -> float:
    """Write `image_head.onnx` and `text_head.onnx` to a new folder; return their maximum difference from PyTorch.

    Each graph maps `features` (B, D) float32, for any B, to unit-norm `embeddings` (B, E) float32. The metadata names
    the run, the encoder of the features, and t and b of the loss.

    Raises:
        UserError: A library is missing, `path` is not a run, the folder is not empty, or ONNX Runtime gives other
            embeddings.
    """
    for library in _LIBRARIES:
        import_extra(library, f"--to onnx needs {library}. Install it with: pip install 'sail-align[onnx]'.")
    run = load_run(path)
    graphs, farthest = {}, 0.0
    for side, identity in (("image", run.image), ("text", run.text)):
        head = _Side(run.model, side).eval()
        graph = _graph(head, identity.spec.dim)
        for name, value in {
            "run_digest": run.digest,
            "encoder": identity.spec.id,
            "encoder_fingerprint": identity.spec.fingerprint,
            "logit_scale": str(run.model.log_scale.exp().item()),
            "logit_bias": str(run.model.bias.item()),
        }.items():
            graph.metadata_props.add(key=name, value=value)
        graphs[f"{side}_head.onnx"] = content = graph.SerializeToString()
        farthest = max(farthest, _difference(content, head, identity.spec.dim))
    if not farthest < TOLERANCE:
        raise UserError(
            f"ONNX Runtime's embeddings differ from PyTorch's by {farthest:.2g}; expected at most {TOLERANCE:g}. "
            f"Try other versions of {', '.join(_LIBRARIES)}."
        )
    write_folder(folder, graphs)
    return farthest


class _Side(nn.Module):
    """One head, followed by normalisation."""

    def __init__(self, model: AlignmentModel, side: str):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, features: Tensor) -> Tensor:
        return self.model.encode_image(features) if self.side == "image" else self.model.encode_text(features)


def _graph(head: nn.Module, dim: int) -> Any:
    """Return the graph as a `ModelProto`, without the exporter's notes, which contain local paths of the code."""
    batch = torch.export.Dim("batch")
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        program: Any = torch.onnx.export(
            head,
            (torch.ones(2, dim),),
            input_names=["features"],
            output_names=["embeddings"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
        )
    finally:
        log.setLevel(level)
    proto = program.model_proto
    for part in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        part.ClearField("metadata_props")
    return proto


@torch.no_grad()
def _difference(content: bytes, head: nn.Module, dim: int) -> float:
    """Return the largest difference over batches of several sizes, with small and large features."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator, differences = torch.Generator().manual_seed(0), [0.0]
    for batch, size in ((1, 1.0), (2, 0.01), (33, 100.0)):
        features_BD = size * torch.randn(batch, dim, generator=generator)
        (found,) = session.run(["embeddings"], {"features": features_BD.numpy()})
        differences.append(float((torch.from_numpy(found) - head(features_BD)).abs().max()))
    return max(differences)
