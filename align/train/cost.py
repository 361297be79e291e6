"""Floating-point operations of a step, counted from the shapes of its matrix products."""

from torch import nn

from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.heads import Head, LinearHead
from sail_align.align.settings import FitSettings


def step_flops(
    model: AlignmentModel, settings: FitSettings, captions: int, *, recomputed: tuple[int, int] = (0, 0)
) -> int:
    """Return the operations of a step, of all processes: heads and loss, forward and backward.

    Only matrix products count, each of (N, K) and (K, M) as 2 N K M. Everything else is less than a hundredth of them
    in the paper's heads.

    Args:
        model: A model in training. Its tensors may be on the meta device.
        settings: Its settings.
        captions: Texts of each image.
        recomputed: Images and texts whose activations do not fit, so that they pass through their head twice.
    """
    rows, head = settings.batch_size, model.image_head
    dim = head.out.out_features + 2 * (head.item_bias is not None)
    sides = ((model.image_head, rows, recomputed[0]), (model.text_head, captions * rows, recomputed[1]))
    heads = sum(number * head_flops(head) + again * _forward_flops(head) for head, number, again in sides)
    products = 4 if settings.loss == "infonce" else 3  # similarities, for InfoNCE twice, and two gradients
    return heads + products * 2 * captions * rows**2 * dim


def head_flops(head: Head) -> int:
    """Return the operations of a row that passes through a head and back."""
    inner = [] if isinstance(head, LinearHead) else [head.out]
    # Features need no gradient. With dropout autograd computes it nevertheless, for the gain and offset of LayerNorm.
    with_input = [layer for layer in _layers(head) if layer in inner or head.dropout.p]
    return 2 * _forward_flops(head) + sum(map(_product_flops, with_input))


def _forward_flops(head: Head) -> int:
    return sum(map(_product_flops, _layers(head)))


def _layers(head: Head) -> list[nn.Linear]:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)]


def _product_flops(layer: nn.Linear) -> int:
    return 2 * layer.in_features * layer.out_features


def describe_cost(steps: int, flops: int) -> str:
    """Return the cost of a run in words, given its steps and the operations of each."""
    plural = "" if steps == 1 else "s"
    return f"{steps:,} step{plural} × {format_flops(flops)} = {format_flops(steps * flops)}"


def format_flops(flops: float) -> str:
    """Return a number of operations with two digits: 28 TFLOP."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
    power = min(sum(flops >= 999.5 * 1000**n for n in range(5)), 5)
    value = flops / 1000**power
    return f"{value:,.0f} {units[power]}" if value >= 9.95 else f"{value:.1f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """Return a duration in words: 40 s, 11 min or 2.5 h."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * 60 else f"{seconds / 3600:.1f} h"
