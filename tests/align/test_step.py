"""A step by micro-batches is the step on the whole batch, and keeping less changes no bit of it."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from sail_align.align.data.loader import Batch
from sail_align.align.model import fused as functions
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import infonce_loss, sigmoid_loss
from sail_align.align.settings import FitSettings, choose_precision
from sail_align.align.train.step import Stepper, make_optimizer, seed_torch
from sail_align.align.train.trainer import score
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.errors import UserError

CPU = torch.device("cpu")
ROWS, CAPTIONS = 23, 2
EVERYTHING, NOTHING = 1 << 40, 0


def batch(rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(*shape, generator=generator) for shape in ((rows, 12), (CAPTIONS, rows, 8)))
    return Batch(images.half(), texts.half())


def stepper(
    micro_batch,
    keep_bytes,
    *,
    head="glu",
    loss=sigmoid_loss,
    optimizer="lion",
    in_parts=False,
    precision="float32",
    **changes,
):
    torch.manual_seed(0)
    model = Architecture(head, 12, 8, 6, expansion=2, **changes).build(scale=5.0, bias=-1.0)
    made = make_optimizer(model, FitSettings(steps=3, lr=1e-2, optimizer=optimizer))
    return Stepper(model, loss, made, CPU, in_parts, micro_batch, keep_bytes, precision)


def after_steps(used, steps=3):
    """Return every step's loss and last gradients and weights."""
    totals = []
    for step in range(steps):
        torch.manual_seed(step)
        totals.append(used.step(batch(seed=step), 1e-2).total)
    gradients = {f"{name}.grad": parameter.grad for name, parameter in used.model.named_parameters()}
    return {**used.model.state_dict(), **gradients, "totals": torch.stack(totals)}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "mlp", "glu"])
@pytest.mark.parametrize("micro_batch", [1, 5, ROWS, 1000])
@pytest.mark.parametrize("keep_bytes", [NOTHING, EVERYTHING])
@pytest.mark.parametrize(
    ("loss", "in_parts"),
    [
        (sigmoid_loss, True),
        (sigmoid_loss, False),
        (partial(sigmoid_loss, divisor="batch"), True),
        (infonce_loss, False),
    ],
)
def test_the_gradients_are_those_of_the_whole_batch(head, micro_batch, keep_bytes, loss, in_parts):
    used = stepper(micro_batch, keep_bytes, head=head, loss=loss, in_parts=in_parts)
    plain = stepper(1, NOTHING, head=head, loss=loss).model
    expected = loss(*plain(*batch()), plain.log_scale, plain.bias)
    expected.total.backward()
    value = used.step(batch(), 1e-9)
    torch.testing.assert_close(tuple(value), tuple(each.detach() for each in expected))
    for (name, ours), theirs in zip(used.model.named_parameters(), plain.parameters(), strict=True):
        whole = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, whole, msg=name, rtol=1e-4, atol=1e-5 * float(whole.abs().max()) + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "dropout", "optimizer", "in_parts"),
    [
        ("mlp", 0.0, "lion", False),
        ("glu", 0.4, "lion", False),
        ("glu", 0.0, "lion", True),
        ("glu", 0.0, "adamw", False),
        ("mlp", 0.4, "adamw", True),
    ],
)
def test_what_is_kept_changes_no_bit(head, dropout, optimizer, in_parts):
    changes = {"head": head, "optimizer": optimizer, "image_dropout": dropout, "text_dropout": dropout}
    changes["in_parts"] = in_parts
    whole = after_steps(stepper(5, EVERYTHING, **changes))
    one_kept = 5 * stepper(5, 0, **changes).model.image_head.kept_units * 4
    for keep_bytes in (NOTHING, one_kept, 3 * one_kept):
        for name, value in after_steps(stepper(5, keep_bytes, **changes)).items():
            assert torch.equal(value, whole[name]), (name, keep_bytes)


@pytest.mark.slow
def test_compiled_heads_change_no_bit_and_are_compiled_once_for_all_sizes(monkeypatch):
    changes = {"image_dropout": 0.4, "text_dropout": 0.4, "in_parts": True}
    graphs = [counters["stats"]["unique_graphs"]]
    for micro_batch in (5, 7, 10):
        eager = after_steps(stepper(micro_batch, NOTHING, **changes))
        with monkeypatch.context() as patch:
            patch.setattr(functions, "MANY_UNITS", 1)
            quick = after_steps(stepper(micro_batch, NOTHING, **changes))
        if failure := functions._gated.failure:
            pytest.skip(f"no compiler: {failure}")
        for name, value in eager.items():
            assert torch.equal(quick[name], value), name
        graphs.append(counters["stats"]["unique_graphs"])
    before, first, *later = graphs
    assert first - before == 3  # forward without gradients and with them, and backward
    assert later == [first, first]


@pytest.mark.slow
def test_the_heads_compiled_parts_are_the_same_to_the_bit_in_half_precision():
    gate_BH, value_BH, inner_BH = (4 * torch.randn(3, 33, 40)).bfloat16()
    inner = inner_BH.clone()
    assert torch.equal(functions._gated(gate_BH, value_BH), functions._gated.compiled(gate_BH, value_BH))
    backward = functions._gated_backward
    assert torch.equal(backward(gate_BH, value_BH, inner_BH), backward.compiled(gate_BH, value_BH, inner))
    assert torch.equal(inner, inner_BH)


def test_dropout_differs_between_micro_batches_and_steps():
    used = stepper(5, NOTHING, image_dropout=0.5, text_dropout=0.5)
    rows = batch(5)
    same = Batch(rows.images.repeat(2, 1), rows.texts.repeat(1, 2, 1))
    seen = []
    used.model.image_head.register_forward_hook(lambda _head, _features, out: seen.append(out.detach()))
    for _ in range(2):
        used.step(same, 1e-9)
    first, second, again, *_ = seen
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert not torch.equal(first, seen[4])


def test_a_seed_counts_with_all_its_bits():
    seen = []
    for numbers in ((1, 2), (2, 1), (1, 3), (1 + (1 << 40), 2)):
        seed_torch(*numbers)
        seen.append(float(torch.rand(())))
    assert len(set(seen)) == len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "mlp", "glu"])
@pytest.mark.parametrize("keep_bytes", [NOTHING, EVERYTHING])
def test_bfloat16_rounds_the_gradients_and_no_more(head, keep_bytes):
    exact, rounded = (
        stepper(50, keep_bytes, head=head, in_parts=True, precision=precision, image_dropout=0.3)
        for precision in ("float32", "bfloat16")
    )
    torch.manual_seed(0)
    expected = exact.step(batch(400), 1e-9)
    torch.manual_seed(0)
    torch.testing.assert_close(rounded.step(batch(400), 1e-9), expected, rtol=0.01, atol=0.01)
    for (name, ours), theirs in zip(rounded.model.named_parameters(), exact.model.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert 0 < (ours.grad - theirs.grad).norm() < 0.04 * theirs.grad.norm(), name


@pytest.mark.parametrize(
    ("name", "capability", "chosen", "why"),
    [
        ("NVIDIA H100", 9, "bfloat16", "Using --precision bfloat16, which NVIDIA H100 computes natively."),
        ("Tesla T4", 7, "float32", "Using --precision float32, because Tesla T4 only emulates bfloat16."),
    ],
)
def test_precision_suits_the_card_and_is_explained(use_card, name, capability, chosen, why):
    use_card(name, capability)
    assert choose_precision("auto", torch.device("cuda")) == (chosen, why)
    for asked in ("float32", "tf32", "bfloat16"):
        assert choose_precision(asked, torch.device("cuda")) == (asked, "")


def test_precision_on_a_cpu():
    assert choose_precision("auto", CPU) == ("float32", "")
    assert choose_precision("bfloat16", CPU) == ("bfloat16", "")
    with pytest.raises(UserError, match="--precision tf32 needs an NVIDIA GPU, got device cpu"):
        choose_precision("tf32", CPU)


def tf32():
    return torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_step_allows_tf32_only_if_asked_and_restores_the_flag(precision, before):
    seen = []

    def loss(*learned, first):
        seen.append(("loss", tf32()))
        learned[0].register_hook(lambda gradient: seen.append(("backward", tf32())))
        if len(seen) > 3:
            raise ZeroDivisionError
        return sigmoid_loss(*learned, first=first)

    used = stepper(ROWS, EVERYTHING, loss=loss, precision=precision)
    used.model.image_head.out.weight.register_hook(lambda gradient: seen.append(("head", tf32())))
    with tf32_products(before):
        used.step(batch(), 1e-9)
        assert seen == [(name, precision == "tf32") for name in ("loss", "backward", "head")]
        assert tf32() == before
        with pytest.raises(ZeroDivisionError):
            used.step(batch(), 1e-9)
        assert tf32() == before


def test_scores_are_computed_without_tf32():
    seen = []
    model = stepper(ROWS, EVERYTHING).model
    model.image_head.register_forward_hook(lambda *_: seen.append(tf32()))
    with tf32_products(True):
        score(model, sigmoid_loss, batch(), CPU)
        assert seen == [False]
        assert tf32()


def test_the_free_memory_decides_what_is_kept(monkeypatch):
    used = stepper(5, None)
    calls = []
    used.model.text_head.register_forward_hook(lambda _head, _features, out: calls.append(len(out)))
    for free, passes in ((EVERYTHING, 1), (NOTHING, 2)):
        monkeypatch.setattr("sail_align.align.train.step.free_memory", lambda free=free: free)
        calls.clear()
        used.step(batch(), 1e-9)
        assert sum(calls) == passes * CAPTIONS * ROWS
        assert max(calls) == 5
