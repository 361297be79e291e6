"""Two linear maps of the heads, whose backward passes keep few activations and skip unneeded gradients.

Each equals autograd of the formula in its docstring, which the tests verify in float64.
"""

import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sail_align.extract.encoders.runtime import is_device_error

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class Compiled(Generic[Arguments, Result]):
    """A function that can also be called compiled, which fuses several passes over its tensors into one.

    `torch.compile` needs a C++ compiler on a CPU and Triton on a GPU, and takes some seconds at the first call. If it
    fails, the function is called uncompiled from then on. That is slower; the results differ only by rounding. A GPU
    that fails or runs out of memory is not the compiler's fault, so such errors are raised.

    Attributes:
        failure: The error of the compiler, if it failed. It is logged as well.
    """

    def __init__(self, function: Callable[Arguments, Result]):
        self._function = function
        self._compiled: Callable[Arguments, Result] | None = None
        self._works: set[tuple[torch.dtype, ...]] = set()
        self.failure: str | None = None

    def __call__(self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        """Call the function uncompiled."""
        return self._function(*arguments, **options)

    def compiled_if(self, large: bool) -> Callable[Arguments, Result]:
        """Return the compiled function for `large` inputs, where compiling pays off, or else the function itself."""
        return self.compiled if large else self

    def compiled(self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        """Call the function compiled, or uncompiled if compiling fails."""
        if self.failure is not None:
            return self._function(*arguments, **options)
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        kinds = tuple(each.dtype for each in tensors)
        # A kernel may fail at its first launch, after another one has overwritten an input.
        originals = [] if kinds in self._works else [each.clone() for each in tensors]
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=True)
            result = self._compiled(*arguments, **options)
        except Exception as error:  # compilers raise all kinds of errors
            if is_device_error(error):
                raise
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            self._works.add(kinds)
            return result
        _logger.warning("Compiling failed, training is slower: %s", self.failure)
        for tensor, original in zip(tensors, originals, strict=False):
            tensor.copy_(original)
        return self._function(*arguments, **options)


MANY_UNITS = 1 << 23
"""Hidden units of a micro-batch from which the seconds of compiling are soon recovered."""


def normed_linear(
    x_BD: Tensor, gain_D: Tensor, offset_D: Tensor, weight_HD: Tensor, bias_H: Tensor, eps: float = 1e-5
) -> Tensor:
    """Return `W LayerNorm(x) + bias`, (B, H), for an x of any float type that needs no gradient. Only x is kept.

    Usually the gradients of LayerNorm's gain and offset come from the gradient of the normalised features, a matrix
    product as large as the one for the weight's gradient. Here they follow from the latter without another product.
    With x' the features before gain and offset, and G = δᵀx' (H, D), the weight's gradient is G ⊙ gain + (Σδ) offsetᵀ
    and the gain's gradient is the column sum of W ⊙ G.
    """
    out_BH: Tensor = _NormedLinear.apply(x_BD, gain_D, offset_D, weight_HD, bias_H, eps)
    return out_BH


def gated_linear(gate_BH: Tensor, value_BH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> Tensor:
    """Return `W (relu6(gate) ⊙ value) + bias`, (B, E). Only gate and value are kept."""
    out_BE: Tensor = _GatedLinear.apply(gate_BH, value_BH, weight_EH, bias_E)
    return out_BE


class _NormedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, gain_D: Tensor, offset_D: Tensor, weight_HD: Tensor, bias_H: Tensor, eps: float
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x_BD, gain_D, offset_D, weight_HD)
        normed_BD = F.layer_norm(x_BD.to(gain_D.dtype), gain_D.shape, gain_D, offset_D, eps)
        return F.linear(normed_BD, weight_HD, bias_H)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BH,) = grads
        x_BD, gain_D, offset_D, weight_HD = ctx.saved_tensors
        bias_H = grad_BH.sum(dim=0, dtype=weight_HD.dtype)
        # Under autocast the gradient and the product are in half precision.
        white_BD = F.layer_norm(x_BD.to(gain_D.dtype), gain_D.shape, eps=ctx.eps).to(grad_BH.dtype)
        product_HD = (grad_BH.T @ white_BD).to(weight_HD.dtype)
        gain = (weight_HD * product_HD).sum(dim=0)
        weight_grad_HD = product_HD.mul_(gain_D).addr_(bias_H, offset_D)
        return None, gain, bias_H @ weight_HD, weight_grad_HD, bias_H, None


class _GatedLinear(Function):
    @staticmethod
    def forward(ctx: Any, gate_BH: Tensor, value_BH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BH, value_BH, weight_EH)
        return F.linear(_gated.compiled_if(gate_BH.numel() >= MANY_UNITS)(gate_BH, value_BH), weight_EH, bias_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad_BE,) = grads
        gate_BH, value_BH, weight_EH = ctx.saved_tensors
        weight_grad_EH = (grad_BE.T @ _gated.compiled_if(gate_BH.numel() >= MANY_UNITS)(gate_BH, value_BH)).to(
            weight_EH.dtype
        )
        inner_BH = grad_BE @ weight_EH.to(grad_BE.dtype)
        value_grad_BH = _gated_backward.compiled_if(gate_BH.numel() >= MANY_UNITS)(gate_BH, value_BH, inner_BH)
        return inner_BH, value_grad_BH, weight_grad_EH, grad_BE.sum(dim=0, dtype=weight_EH.dtype)


@Compiled
def _gated(gate_BH: Tensor, value_BH: Tensor) -> Tensor:
    return F.relu6(gate_BH).mul_(value_BH)


@Compiled
def _gated_backward(gate_BH: Tensor, value_BH: Tensor, inner_BH: Tensor) -> Tensor:
    """Turn the gradient of the gated units into that of the gate, in place; return that of the value."""
    value_grad_BH = F.relu6(gate_BH).mul_(inner_BH)
    inner_BH.mul_(value_BH)
    torch.ops.aten.hardtanh_backward(inner_BH, gate_BH, 0, 6, grad_input=inner_BH)
    return value_grad_BH
