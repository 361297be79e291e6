"""Compiled losses are the same losses, and no compiler is no fault."""

import math

import pytest
import torch
import torch.nn.functional as F

from sail_align.align.model import fused as compiled
from sail_align.align.model import loss as losses
from sail_align.align.model import pair_blocks as blocks
from sail_align.align.model.fused import Compiled
from sail_align.align.model.loss import infonce_loss, sigmoid_loss


def inputs(dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    image_BE, *text_CBE = F.normalize(torch.randn(3, 41, 16, generator=made), dim=-1).to(dtype)
    return [
        each.requires_grad_()
        for each in (image_BE, torch.stack(text_CBE), torch.tensor(math.log(20)), torch.tensor(-5.0))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [sigmoid_loss, infonce_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_agree_with_eager_ones(monkeypatch, loss, dtype):
    monkeypatch.setitem(blocks.BLOCK, "cpu", 16)
    results = []
    for many in (1 << 24, 1):
        monkeypatch.setattr(blocks, "MANY_PAIRS", many)
        given = inputs(dtype)
        value = loss(*given)
        value.total.backward()
        results.append([*(each.detach() for each in value), *(each.grad for each in given)])
    if losses.compile_failure():
        pytest.skip(f"no compiler: {losses.compile_failure()}")
    for eager, quick in zip(*results, strict=True):
        torch.testing.assert_close(eager, quick, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize("error", [RuntimeError("No working C++ compiler found\nmore"), FileNotFoundError("c++")])
def test_a_compiler_that_fails_is_told_of_and_not_asked_again(monkeypatch, caplog, error):
    asked = []

    def fail(*arguments):
        asked.append(arguments)
        raise error

    monkeypatch.setattr(compiled.torch, "compile", lambda function, dynamic: fail)
    double = Compiled(lambda number: 2 * number)
    with caplog.at_level("WARNING"):
        assert [double.quick(3), double.quick(4), double(5)] == [6, 8, 10]
    assert asked == [(3,)]
    assert double.failure == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert double.failure in caplog.text


def test_memory_that_runs_out_is_no_failure_of_the_compiler(monkeypatch):
    def fail(number):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(compiled.torch, "compile", lambda function, dynamic: fail)
    double = Compiled(lambda number: 2 * number)
    with pytest.raises(torch.OutOfMemoryError):
        double.quick(3)
    assert double.failure is None
