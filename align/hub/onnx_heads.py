"""Export the heads of a run as ONNX graphs, for features that other programs compute."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sail_align.align.hub.onnx_graph import (
    FILES,
    accept_float16,
    check_difference,
    export_graph,
    largest_difference,
    metadata_of,
    require_onnx,
    save_graph,
)
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.runs.checkpoint import load_run
from sail_align.extract.system.folders import new_folder

TOLERANCE = 1e-5
"""Maximum difference between the coordinates of unit vectors from ONNX Runtime and PyTorch."""


def write_onnx(path: Path, folder: Path) -> float:
    """Write the heads as graphs to a new folder; return their maximum difference from PyTorch.

    `image_head.onnx` and `text_head.onnx` map `features` (B, D) float32, for any B, to unit-norm `embeddings` (B, E)
    float32. `image_head_float16.onnx` and `text_head_float16.onnx` take float16, the type of stores.

    Raises:
        UserError: A library is missing, `path` is not a run, the folder is not empty, or ONNX Runtime gives other
            embeddings.
    """
    require_onnx()
    run = load_run(path)
    with new_folder(folder, FILES) as new:
        differences = [
            _write_head(new, side, run.model, identity.spec.dim, metadata_of(run, identity))
            for side, identity in (("image", run.image), ("text", run.text))
        ]
        check_difference(max(differences), TOLERANCE)
    return max(differences)


class _Side(nn.Module):
    """One head, followed by normalisation."""

    def __init__(self, model: AlignmentModel, side: str):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, features: Tensor) -> Tensor:
        return self.model.encode_image(features) if self.side == "image" else self.model.encode_text(features)


def _write_head(folder: Path, side: str, model: AlignmentModel, dim: int, about: dict[str, str]) -> float:
    head = _Side(model, side)
    graph = export_graph(head, {"features": torch.ones(2, dim)}, {"features": {0: torch.export.Dim("batch")}}, about)
    save_graph(graph, folder / f"{side}_head.onnx")
    accept_float16(graph)
    save_graph(graph, folder / f"{side}_head_float16.onnx")
    generator, differences = torch.Generator().manual_seed(0), []
    for ending, dtype in (("", torch.float32), ("_float16", torch.float16)):
        batches = []
        for rows, size in ((1, 1.0), (2, 0.01), (33, 100.0)):
            features_BD = (size * torch.randn(rows, dim, generator=generator)).to(dtype)
            with torch.no_grad():
                batches.append(({"features": features_BD}, head(features_BD)))
        differences.append(largest_difference(folder / f"{side}_head{ending}.onnx", batches))
    return max(differences)
