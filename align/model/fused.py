"""Two linear maps of the heads, with backward passes that keep little and skip what nobody needs.

Each gives what autograd gives for the formula in its docstring; tests hold them to that in float64.
"""

import logging
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class Compiled(Generic[Arguments, Result]):
    """A function that can be called as it is, or compiled: many passes over its tensors are then one.

    `torch.compile` needs a C++ compiler on a CPU and Triton on a GPU, and takes some seconds at the first call. Where
    it fails the function is used as it is from then on: slower, and the same but for rounding.

    Attributes:
        failure: Why it could not be compiled, if that was tried and failed; it is logged too.
    """

    def __init__(self, function: Callable[Arguments, Result]):
        self._function = function
        self._compiled: Callable[Arguments, Result] | None = None
        self.failure: str | None = None

    def __call__(self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        """Call the function as it is."""
        return self._function(*arguments, **options)

    def quick(self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        """Call the function compiled, if it can be compiled."""
        if self.failure is not None:
            return self._function(*arguments, **options)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=True)
            return self._compiled(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError) as error:  # of the compiler: it fails before anything is computed
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            _logger.warning("not compiled, which is slower: %s", self.failure)
            return self._function(*arguments, **options)


MANY_UNITS = 1 << 23
"""From so many hidden units of a micro-batch on, seconds of compiling are soon won back."""


def normed_linear(
    x_BD: Tensor, gain_D: Tensor, offset_D: Tensor, weight_HD: Tensor, bias_H: Tensor, eps: float = 1e-5
) -> Tensor:
    """Return `W LayerNorm(x) + bias`, (B, H), for an x of any float type that needs no gradient; x alone is kept.

    The gradients of gain and offset, LayerNorm's, commonly come from that of the normalised features: a matrix product
    as large as the one of the weight's gradient. Both follow from the latter without a further product: of the features
    x' before gain and offset and with G = δᵀx' (H, D), the weight's gradient is G ⊙ gain + (Σδ) offsetᵀ and the gain's
    is the column sum of W ⊙ G.
    """
    out_BH: Tensor = _NormedLinear.apply(x_BD, gain_D, offset_D, weight_HD, bias_H, eps)
    return out_BH


def gated_linear(gate_BH: Tensor, value_BH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> Tensor:
    """Return `W (relu6(gate) ⊙ value) + bias`, (B, E); of the hidden units only gate and value are kept."""
    out_BE: Tensor = _GatedLinear.apply(gate_BH, value_BH, weight_EH, bias_E)
    return out_BE


def _chosen(function: Compiled[Any, Tensor], units_BH: Tensor) -> Callable[..., Tensor]:
    """Return a function as it is, or where there is enough to compute, compiled."""
    return function.quick if units_BH.numel() >= MANY_UNITS else function


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
        # Under autocast the gradient is in half precision, and so is the product.
        white_BD = F.layer_norm(x_BD.to(gain_D.dtype), gain_D.shape, eps=ctx.eps).to(grad_BH.dtype)
        product_HD = (grad_BH.T @ white_BD).to(weight_HD.dtype)
        gain = (weight_HD * product_HD).sum(dim=0)
        weight_grad_HD = product_HD.mul_(gain_D).addr_(bias_H, offset_D)
        return None, gain, bias_H @ weight_HD, weight_grad_HD, bias_H, None


class _GatedLinear(Function):
    @staticmethod
    def forward(ctx: Any, gate_BH: Tensor, value_BH: Tensor, weight_EH: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BH, value_BH, weight_EH)
        return F.linear(_chosen(_gated, gate_BH)(gate_BH, value_BH), weight_EH, bias_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad_BE,) = grads
        gate_BH, value_BH, weight_EH = ctx.saved_tensors
        weight_grad_EH = (grad_BE.T @ _chosen(_gated, gate_BH)(gate_BH, value_BH)).to(weight_EH.dtype)
        inner_BH = grad_BE @ weight_EH.to(grad_BE.dtype)
        value_grad_BH = _chosen(_gated_backward, gate_BH)(gate_BH, value_BH, inner_BH)
        return inner_BH, value_grad_BH, weight_grad_EH, grad_BE.sum(dim=0, dtype=weight_EH.dtype)


@Compiled
def _gated(gate_BH: Tensor, value_BH: Tensor) -> Tensor:
    return F.relu6(gate_BH).mul_(value_BH)


@Compiled
def _gated_backward(gate_BH: Tensor, value_BH: Tensor, inner_BH: Tensor) -> Tensor:
    """Turn the gradient of the gated units into that of the gate, where it lies; return that of the value."""
    value_grad_BH = F.relu6(gate_BH).mul_(inner_BH)
    inner_BH.mul_(value_BH)
    torch.ops.aten.hardtanh_backward(inner_BH, gate_BH, 0, 6, grad_input=inner_BH)
    return value_grad_BH
