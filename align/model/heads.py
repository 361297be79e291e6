"""Heads: what maps a frozen encoder's features into the shared space.

Every head is power → LayerNorm → body (→ plus a linear path), and its output is not yet normalised.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sail_align.align.model.fused import gated_linear, normed_linear

HeadKind = Literal["linear", "mlp", "glu"]
OfInput = Callable[[nn.Linear], Tensor]
"""Applies a layer to the input of a head's body: the normalised features."""


class Head(nn.Module):
    """LayerNorm, dropout on the normalised features, then what a subclass does with them; hidden units drop out too.

    Features (…, input_dim) become (…, output_dim). Weights start Xavier-uniform, biases at zero. Where `power`
    is not 1, features go through `signed_power` before all else.
    """

    power = 1.0

    out: nn.Linear
    """The layer that writes the output: every subclass has one."""

    def __init__(self, input_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(input_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear_path: nn.Linear | None = None

    def body(self, of_input: OfInput) -> Tensor:
        """Map the normalised features, to which `of_input` applies a layer, to (…, output_dim)."""
        raise NotImplementedError

    @property
    def kept_units(self) -> int:
        """Number of activations of one row that its backward pass needs at most; two are LayerNorm's."""
        return 2 + self._kept_of(self.norm.normalized_shape[0])

    def _kept_of(self, units: int) -> int:
        """Return what is kept of a layer's units: what came in, what goes on, and what dropout drew between them."""
        return (3 if self.dropout.p else 2) * units

    def forward(self, features_BD: Tensor) -> Tensor:
        """Map features (…, input_dim) of any float type to (…, output_dim), not yet L2-normalised."""
        *leading, input_dim = features_BD.shape
        features_BD = features_BD.reshape(-1, input_dim)
        if self.power != 1:
            features_BD = signed_power(features_BD.to(self.norm.weight.dtype), self.power)
        of_input: OfInput
        if self.training and not self.dropout.p and not features_BD.requires_grad:
            of_input = partial(_normed_linear, features_BD, self.norm)
        else:
            normed_BD = self.dropout(self.norm(features_BD.to(self.norm.weight.dtype)))
            of_input = partial(_linear_of, normed_BD)
        out_BE = self.body(of_input)
        if self.linear_path is not None:
            out_BE = out_BE + of_input(self.linear_path)
        return out_BE.reshape(*leading, -1)

    def add_linear_path(self) -> nn.Linear:
        """Add a linear map beside the body, whose own output starts at zero; return the map.

        What the linear path starts from (a closed-form map) is then what the whole head starts from.
        """
        self.linear_path = nn.Linear(self.norm.normalized_shape[0], self.out.out_features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        return self.linear_path


class LinearHead(Head):
    """`W x`."""

    def __init__(self, input_dim: int, output_dim: int, dropout: float = 0.0):
        super().__init__(input_dim, dropout)
        self.out = _linear(input_dim, output_dim)

    def body(self, of_input: OfInput) -> Tensor:  # noqa: D102
        return of_input(self.out)


class MLPHead(Head):
    """`W_out relu6(W_a x)`, with `expansion` × input_dim hidden units."""

    def __init__(self, input_dim: int, output_dim: int, dropout: float = 0.0, expansion: int = 4):
        super().__init__(input_dim, dropout)
        self.hidden = _linear(input_dim, expansion * input_dim)
        self.out = _linear(expansion * input_dim, output_dim)

    @property
    def kept_units(self) -> int:  # noqa: D102
        return super().kept_units + self._kept_of(self.hidden.out_features)

    def body(self, of_input: OfInput) -> Tensor:  # noqa: D102
        out_BE: Tensor = self.out(self.dropout(F.relu6(of_input(self.hidden))))
        return out_BE


class GLUHead(Head):
    """`W_out (relu6(W_a x) ⊙ W_b x)`, with `expansion` × input_dim hidden units: the paper's head.

    The authors' program also clamps both branches to ±1000. LayerNorm bounds the input and relu6 one branch, so in
    float32 the clamp changes nothing within reach, and it is left out, as in the paper's formula.
    """

    def __init__(self, input_dim: int, output_dim: int, dropout: float = 0.0, expansion: int = 4):
        super().__init__(input_dim, dropout)
        self.gate = _linear(input_dim, expansion * input_dim)
        self.value = _linear(input_dim, expansion * input_dim)
        self.out = _linear(expansion * input_dim, output_dim)

    @property
    def kept_units(self) -> int:  # noqa: D102
        return super().kept_units + self._kept_of(self.gate.out_features)

    def body(self, of_input: OfInput) -> Tensor:  # noqa: D102
        gate_BH, value_BH = of_input(self.gate), self.dropout(of_input(self.value))
        if self.training:
            return gated_linear(gate_BH, value_BH, self.out.weight, self.out.bias)
        out_BE: Tensor = self.out(F.relu6(gate_BH) * value_BH)
        return out_BE


def signed_power(features_BD: Tensor, power: float) -> Tensor:
    """Return `sign(x) |x|^power` of each feature; the features themselves for 1.

    Below 1 it narrows the long tail of rectified features, in which a few large ones drown the others (the "power
    normalisation" of Perronnin et al., 2010, there with 0.5).
    """
    return features_BD if power == 1 else features_BD.sign() * features_BD.abs() ** power


def make_head(kind: HeadKind, input_dim: int, output_dim: int, *, expansion: int = 4, dropout: float = 0.0) -> Head:
    """Return a head by its kind; `expansion` is for those with hidden units."""
    if kind == "linear":
        return LinearHead(input_dim, output_dim, dropout)
    hidden_heads: dict[str, type[MLPHead | GLUHead]] = {"mlp": MLPHead, "glu": GLUHead}
    return hidden_heads[kind](input_dim, output_dim, dropout, expansion)


def _normed_linear(features_BD: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    return normed_linear(features_BD, norm.weight, norm.bias, layer.weight, layer.bias, norm.eps)


def _linear_of(normed_BD: Tensor, layer: nn.Linear) -> Tensor:
    out_BH: Tensor = layer(normed_BD)
    return out_BH


def _linear(input_dim: int, output_dim: int) -> nn.Linear:
    layer = nn.Linear(input_dim, output_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
