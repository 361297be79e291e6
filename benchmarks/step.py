"""Compare a training step of the paper's heads with its matrix products and with a plain dense step.

GLU heads, 2,048 and 1,024 → 1,024 dimensions, hidden units 4 × the input, two captions, sigmoid loss, Lion, random
features. Each candidate runs in processes of its own, in turn. Its time is the median over its steps, without the first
of each process. Its memory is the peak during the steps beyond features and weights.

    python benchmarks/step.py                                     # B = 8,192 with the goals
    python benchmarks/step.py --only ours --only eager            # the gain from compiling
    python benchmarks/step.py --batch 36864 --steps 1 --only ours # time and memory of the paper's batch
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

IMAGE_DIM, TEXT_DIM, DIM, EXPANSION, CAPTIONS = 2_048, 1_024, 1_024, 4, 2
PRODUCT_ROWS = 4_096
GOALS = {"time / products": 1.2, "time / dense": 0.85, "memory / dense": 0.35}


def ours(batch: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return the step of `sail-align fit`."""
    import torch

    from sail_align.align.data.loader import Batch
    from sail_align.align.model.alignment import Architecture
    from sail_align.align.model.loss import sigmoid_loss
    from sail_align.align.settings import FitSettings
    from sail_align.align.train.step import Stepper, make_optimizer

    model = Architecture("glu", IMAGE_DIM, TEXT_DIM, DIM, EXPANSION).build()
    optimizer = make_optimizer(model, FitSettings(steps=1))
    keep_bytes = None if options.keep is None else int(options.keep * 1e9)
    stepper = Stepper(model, sigmoid_loss, optimizer, torch.device("cpu"), True, options.micro_batch, keep_bytes)
    features = Batch(*features_at_random(batch))
    return lambda: stepper.step(features, 1e-5)


def eager(batch: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return the step of `sail-align fit` without compiling."""
    from sail_align.align.model import fused as functions

    functions.MANY_UNITS = sys.maxsize
    return ours(batch, options)


def dense(batch: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return a plain step: caption sets in turn, all logits and labels at once, Lion per parameter."""
    import torch
    import torch.nn.functional as F
    from lion_pytorch import Lion
    from torch import nn

    class Head(nn.Module):
        def __init__(self, dim: int):
            super().__init__()
            self.norm = nn.LayerNorm(dim)
            self.gate, self.value = (nn.Linear(dim, EXPANSION * dim) for _ in range(2))
            self.out = nn.Linear(EXPANSION * dim, DIM)

        def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
            x_BD = self.norm(x_BD)
            return F.normalize(self.out(F.relu6(self.gate(x_BD)) * self.value(x_BD)), dim=-1)

    image_head, text_head = Head(IMAGE_DIM), Head(TEXT_DIM)
    log_scale, bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-10.0))
    optimizer = Lion([*image_head.parameters(), *text_head.parameters(), log_scale, bias], lr=1e-5)
    images, texts = features_at_random(batch)

    def step() -> None:
        optimizer.zero_grad()
        image_BE = image_head(images.float())
        text_CBE = [text_head(text_BD.float()) for text_BD in texts]
        labels_BB = 2 * torch.eye(batch) - 1
        losses = [
            -F.logsigmoid(labels_BB * (log_scale.exp() * image_BE @ text_BE.T + bias)).sum() / batch**2
            for text_BE in text_CBE
        ]
        sum(losses[1:], losses[0]).backward()
        optimizer.step()

    return step


def products(batch: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return only the products: of the heads forward, for weights and hidden units, and three per caption set."""
    import torch

    def sides() -> list[tuple[int, int]]:
        return [(batch, IMAGE_DIM), (CAPTIONS * batch, TEXT_DIM)]

    block = min(PRODUCT_ROWS, batch)
    weights = {dim: torch.randn(EXPANSION * dim, dim) for _, dim in sides()}
    inputs = {dim: torch.randn(block, dim) for _, dim in sides()}
    hidden = {dim: torch.randn(block, EXPANSION * dim) for _, dim in sides()}
    out_weights = {dim: torch.randn(DIM, EXPANSION * dim) for _, dim in sides()}
    out, other, logits = torch.randn(block, DIM), torch.randn(batch, DIM), torch.randn(block, batch)

    def step() -> None:
        for rows, dim in sides():
            for start in range(0, rows, block):
                part = min(block, rows - start)
                x, h, y = inputs[dim][:part], hidden[dim][:part], out[:part]
                for _ in ("gate", "value"):
                    x @ weights[dim].T
                    h.T @ x
                h @ out_weights[dim].T
                y.T @ h
                y @ out_weights[dim]
        for _ in range(CAPTIONS):
            for start in range(0, batch, block):
                part = min(block, batch - start)
                out[:part] @ other.T
                logits[:part] @ other
                logits[:part].T @ out[:part]

    return step


CANDIDATES = {"ours": ours, "eager": eager, "dense": dense, "products": products}


def features_at_random(batch: int) -> tuple[Any, Any]:
    """Return random float16 images (B, D_I) and texts (C, B, D_T)."""
    import torch

    return torch.randn(batch, IMAGE_DIM).half(), torch.randn(CAPTIONS, batch, TEXT_DIM).half()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run steps in this process; return the seconds of each, and the peak bytes beyond the initial memory."""
    import torch

    torch.set_num_threads(options.threads)
    step = CANDIDATES[name](options.batch, options)
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "bytes": status("VmHWM") - before}


def status(field: str) -> int:
    """Return a memory field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8_192)
    parser.add_argument("--steps", type=int, default=3, help="steps per process; the first is timed only if alone")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2_048)
    parser.add_argument("--keep", type=float, help="GB of activations to keep; by default what fits")
    parser.add_argument("--only", choices=CANDIDATES, action="append", help="may be repeated")
    parser.add_argument("--measure", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    names = options.only or [name for name in CANDIDATES if name != "eager"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
    time_of = {
        name: median(second for run in taken for second in run["seconds"][1:] or run["seconds"])
        for name, taken in runs.items()
    }
    memory_of = {name: max(run["bytes"] for run in taken) for name, taken in runs.items()}
    print(f"B = {options.batch:,}, {options.threads} threads")
    for name in names:
        print(f"{name:<9} {time_of[name]:8.2f} s  {memory_of[name] / 1e9:6.2f} GB")
    ratios = {}
    if {"ours", "products"} <= {*names}:
        ratios["time / products"] = time_of["ours"] / time_of["products"]
    if {"ours", "dense"} <= {*names}:
        ratios["time / dense"] = time_of["ours"] / time_of["dense"]
        ratios["memory / dense"] = memory_of["ours"] / memory_of["dense"]
    for name, ratio in ratios.items():
        print(f"{name:<16} {ratio:5.2f}  goal ≤ {GOALS[name]}: {'met' if ratio <= GOALS[name] else 'MISSED'}")


if __name__ == "__main__":
    main()
