"""The operations of a step, against those that torch counts while it runs."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sail_align.align.data.loader import Batch
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import infonce_loss, sigmoid_loss
from sail_align.align.settings import FitSettings
from sail_align.align.train.cost import describe_cost, format_seconds, step_flops
from sail_align.align.train.step import Stepper, make_optimizer

CPU = torch.device("cpu")
ROWS, CAPTIONS = 48, 2


def product_flops(left, right, **_options):
    """Count a product of matrices; one of a vector and a matrix is not counted."""
    return 2 * left[0] * left[1] * right[1] if left[0] > 1 else 0


# Without the second, torch does not count products that are added in place.
COUNTED = {torch.ops.aten.mm: product_flops, torch.ops.aten.addmm_: lambda _into, *each, **_: product_flops(*each)}


@pytest.mark.parametrize("keep_bytes", [1 << 40, 0])
@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize(
    "form",
    [
        {"head": "glu"},
        {"head": "glu", "linear_path": True},
        {"head": "glu", "image_dropout": 0.3, "image_power": 0.5},
        {"head": "mlp", "linear_path": True, "text_dropout": 0.1},
        {"head": "linear"},
        {"head": "linear", "image_dropout": 0.3},
    ],
    ids=str,
)
def test_step_has_the_operations_that_torch_counts(form, loss, keep_bytes):
    model = Architecture(image_dim=24, text_dim=16, dim=8, expansion=2, **form).build()
    settings = FitSettings(batch_size=ROWS, steps=1, loss=loss)
    loss_of = infonce_loss if loss == "infonce" else partial(sigmoid_loss, weights=None)
    options = {"in_parts": loss == "sigmoid", "micro_batch": 16, "keep_bytes": keep_bytes}
    stepper = Stepper(model, loss_of, make_optimizer(model, settings), CPU, **options)
    batch = Batch(torch.randn(ROWS, 24).half(), torch.randn(CAPTIONS, ROWS, 16).half())
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        stepper.step(batch, 1e-3)
    recomputed = (0, 0) if keep_bytes else (ROWS, CAPTIONS * ROWS)
    assert step_flops(model, settings, CAPTIONS, recomputed=recomputed) == counter.get_total_flops()


@pytest.mark.parametrize(("expansion", "captions", "tera"), [(4, 1, 17.3), (4, 2, 27.8), (8, 2, 39.0)])
def test_steps_of_the_paper(expansion, captions, tera):
    with torch.device("meta"):
        model = Architecture("glu", 2_048, 1_024, 1_024, expansion=expansion).build()
    flops = step_flops(model, FitSettings(steps=1), captions)
    assert flops / 1e12 == pytest.approx(tera, abs=0.05)


def test_cost_and_time_in_words():
    assert describe_cost(6_000, 28 * 10**12) == "6,000 steps × 28 TFLOP = 168 PFLOP"
    assert describe_cost(1, 1_234) == "1 step × 1.2 kFLOP = 1.2 kFLOP"
    assert [format_seconds(seconds) for seconds in (0.1, 59, 100, 660, 9_000)] == [
        "1 s",
        "59 s",
        "2 min",
        "11 min",
        "2.5 h",
    ]
