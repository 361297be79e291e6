"""Measure the cost of the losses beyond the matrix products that any method needs: three per caption set.

1. Time of value and gradients / time of the products, in float32 (goal: at most 1.1) and under bfloat16 autocast (1.3).
   Also the dense form with autograd, and InfoNCE, which needs four products. All run in turn in one process.
2. Peak memory beyond the embeddings, including gradients, in a fresh process: at most 1.0 GB for the paper's batch.

Embeddings are random float32 of 1,024 dimensions, with two caption sets. The products are whole matrices of the given
precision, written to allocated memory. Prints medians over `--repeats` rounds.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.model import loss as losses
from sail_align.align.model.loss import Loss, infonce_loss, sigmoid_loss

DIM, CAPTIONS = 1_024, 2
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIME_GOALS = {"float32": 1.1, "bfloat16": 1.3}
MEMORY_GOAL = 1.0


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="*", default=[4_096, 8_192, 16_384], help="batch sizes to time")
    options.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    options.add_argument("--memory", type=int, nargs="*", default=[36_864], help="batch sizes to measure the memory of")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--no-dense", action="store_true", help="skip the dense form, which needs much memory")
    options.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    asked = options.parse_args()
    torch.manual_seed(0)
    if asked.peak_of:
        print(peak_gigabytes(asked.peak_of, asked.precisions[0]))
        return
    print("| batch | precision | products | sigmoid | goal | InfoNCE | dense sigmoid |\n|---|---|---|---|---|---|---|")
    for precision in asked.precisions:
        for size in asked.sizes:
            print(time_row(size, precision, asked.repeats, dense=not asked.no_dense), flush=True)
    failure = losses._repel.failure or losses._softmax.failure
    print(f"\nelementwise parts: {failure or 'compiled'}; {torch.get_num_threads()} threads")
    for size in asked.memory:
        for precision in asked.precisions:
            command = [sys.executable, __file__, "--peak-of", str(size), "--precisions", precision]
            gigabytes = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"peak memory at {size:,}, {precision}: {gigabytes:.2f} GB ({verdict(gigabytes, MEMORY_GOAL)})")


def time_row(size: int, precision: str, repeats: int, *, dense: bool) -> str:
    """Return a row of the table: seconds of the products, and the ratios of the others to them."""
    inputs = make_inputs(size)
    contenders: dict[str, Callable[[], None]] = {
        "products": products(inputs, PRECISIONS[precision]),
        "sigmoid": lambda: learn(sigmoid_loss, inputs, precision),
        "infonce": lambda: learn(infonce_loss, inputs, precision),
    }
    if dense:
        contenders["dense"] = lambda: learn(dense_sigmoid, inputs, precision)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(repeats):
        for name, contender in contenders.items():
            begin = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - begin)
    ratio = {
        name: statistics.median(own / base for own, base in zip(each, seconds["products"], strict=True))
        for name, each in seconds.items()
    }
    base = f"{statistics.median(seconds['products']):.2f} s"
    goal = verdict(ratio["sigmoid"], TIME_GOALS[precision])
    others = " | ".join(f"{ratio[name]:.2f}" if name in ratio else "" for name in ("infonce", "dense"))
    return f"| {size:,} | {precision} | {base} | {ratio['sigmoid']:.2f} | {goal} | {others} |"


def make_inputs(size: int) -> list[Tensor]:
    """Return images (B, E), texts (C, B, E), τ and b, all requiring gradients."""
    image_BE = F.normalize(torch.randn(size, DIM), dim=-1)
    text_CBE = F.normalize(torch.randn(CAPTIONS, size, DIM), dim=-1)
    return [each.requires_grad_() for each in (image_BE, text_CBE, torch.tensor(math.log(20)), torch.tensor(-10.0))]


def products(inputs: list[Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that computes the three products of each caption set in reused memory."""
    image_BE, text_CBE = (each.detach().to(dtype) for each in inputs[:2])
    logits_BB = image_BE.new_empty(len(image_BE), len(image_BE))
    gradient_BE = torch.empty_like(image_BE)

    def run() -> None:
        for text_BE in text_CBE:
            torch.mm(image_BE, text_BE.mT, out=logits_BB)
            torch.mm(logits_BB, text_BE, out=gradient_BE)
            torch.mm(logits_BB.mT, image_BE, out=gradient_BE)

    return run


def learn(loss: Loss | Callable[..., Tensor], inputs: list[Tensor], precision: str) -> None:
    """Compute a loss and its gradients."""
    for each in inputs:
        each.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        value = loss(*inputs)
    (value if isinstance(value, Tensor) else value.total).backward()


def dense_sigmoid(image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """Return the sigmoid loss in its usual form, with a matrix of logits and one of labels."""
    label_BB = 2 * torch.eye(len(image_BE)) - 1
    total = torch.zeros(())
    for text_BE in text_CBE:
        logit_BB = log_scale.exp() * image_BE @ text_BE.mT + bias
        total = total - F.logsigmoid(label_BB * logit_BB).sum() / len(image_BE) ** 2
    return total


def peak_gigabytes(size: int, precision: str) -> float:
    """Return the GB that a loss with its gradients adds to the peak resident memory of this process (Linux)."""
    learn(sigmoid_loss, make_inputs(4_096), precision)  # compiles, starts threads, allocates buffers of the products
    inputs = make_inputs(size)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmHWM")
    learn(sigmoid_loss, inputs, precision)
    return (memory("VmHWM") - before) / 1e9


def memory(field: str) -> int:
    """Return a memory field of this process's status in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1_024


def verdict(value: float, goal: float) -> str:
    """Return whether a goal is met, as text."""
    return f"≤ {goal}: {'met' if value <= goal else 'NOT met'}"


if __name__ == "__main__":
    main()
