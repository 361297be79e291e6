"""Compiled losses equal uncompiled ones, and a missing compiler is tolerated."""

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
def test_compiled_losses_agree_with_eager_ones(monkeypatch, loss, dtype):
    monkeypatch.setitem(blocks.BLOCK_SIZE, "cpu", 16)
    results = []
    for many in (1 << 24, 1):
        monkeypatch.setattr(blocks, "MANY_PAIRS", many)
        given = inputs(dtype)
        value = loss(*given)
        value.total.backward()
        results.append([*(each.detach() for each in value), *(each.grad for each in given)])
    if failure := losses._repel.failure or losses._softmax.failure:
        pytest.skip(f"no compiler: {failure}")
    for eager, compiled_ in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled_, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7)


class OutOfResourcesError(Exception):
    """As Triton raises it where a kernel does not fit the card: no `RuntimeError`."""


@pytest.fixture
def compile_with(monkeypatch):
    """Let `torch.compile` return this function."""
    return lambda function: monkeypatch.setattr(compiled.torch, "compile", lambda _function, dynamic: function)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("No working C++ compiler found\nmore"),
        FileNotFoundError("c++"),
        OutOfResourcesError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    ],
)
def test_failed_compiler_is_logged_and_not_tried_again(compile_with, caplog, error):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise error

    compile_with(fail)
    double = Compiled(lambda number: 2 * number)
    with caplog.at_level("WARNING"):
        assert [double.compiled(3), double.compiled(4), double(5)] == [6, 8, 10]
    assert calls == [(3,)]
    assert double.failure == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert double.failure in caplog.text


def test_uncompiled_function_gets_the_inputs_as_they_were(compile_with):
    def fail(values):
        values.zero_()
        raise OutOfResourcesError("at the launch of the second kernel")

    compile_with(fail)
    double = Compiled(lambda values: values.mul_(2))
    assert double.compiled(torch.arange(3.0)).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_failed_gpu_is_not_a_compiler_failure(compile_with, error):
    def fail(number):
        raise error

    compile_with(fail)
    double = Compiled(lambda number: 2 * number)
    with pytest.raises(type(error)):
        double.compiled(3)
    assert double.failure is None
