"""Heads map the features of a frozen encoder into the shared space.

A head is power → LayerNorm → body, plus an optional linear path beside the body. Its output is not L2-normalised.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sail_align.align.model.fused import gated_linear, normed_linear

HeadKind = Literal["linear", "mlp", "glu"]
OfInput = Callable[[nn.Linear], Tensor]
"""Applies a layer to the normalised features, which are the input of a head's body."""


class Head(nn.Module, ABC):
    """Base class of heads: power, LayerNorm and dropout, then the body of a subclass. Hidden units drop out too.

    Maps features (…, input_dim) to (…, output_dim). Initial weights are Xavier-uniform and initial biases zero.
    `power` is the exponent of `apply_power`, and `patch_power` that for patches of an image.
    """

    power = 1.0
    patch_power: float | None = None
    """None takes `power`."""

    hidden_units = 0
    out: nn.Linear
    """The output layer, which each subclass has."""

    def __init__(self, input_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(input_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear_path: nn.Linear | None = None
        self.item_bias: nn.Linear | None = None

    @abstractmethod
    def body(self, of_input: OfInput) -> Tensor:
        """Return the output (…, output_dim); `of_input` applies a layer to the normalised features."""

    @property
    def basis_dim(self) -> int:
        """Number of inputs of a closed form."""
        return int(self.norm.normalized_shape[0])

    @property
    def kept_units(self) -> int:
        """Maximum number of activations per row that the backward pass needs, two of them for LayerNorm."""
        kept_of_unit = 3 if self.dropout.p else 2  # before and after, and the dropout mask if there is one
        return 2 + kept_of_unit * (self.norm.normalized_shape[0] + self.hidden_units)

    def of_patches(self, patches_BD: Tensor) -> Tensor:
        """Map features of patches (…, input_dim) as `forward` does, but with the power of patches."""
        out_BE: Tensor = self(patches_BD, self.patch_power)
        return out_BE

    def with_item_bias(self, features_BD: Tensor) -> Tensor:
        """Map features (…, input_dim) to (…, output_dim + 1): the output of `forward`, then the item's bias."""
        out_BE: Tensor = self(features_BD, item_bias=True)
        return out_BE

    def forward(self, features_BD: Tensor, power: float | None = None, *, item_bias: bool = False) -> Tensor:
        """Map features (…, input_dim) of any float type to (…, output_dim), not yet L2-normalised.

        Args:
            features_BD: The features.
            power: Exponent of `apply_power` instead of the head's own.
            item_bias: Append the bias of each item: see `add_item_bias`.
        """
        power = self.power if power is None else power
        *leading, input_dim = features_BD.shape
        features_BD = features_BD.reshape(-1, input_dim)
        if power != 1:
            features_BD = self.apply_power(features_BD.to(self.norm.weight.dtype), power)
        norm, fused = self.norm, self.training and not self.dropout.p and not features_BD.requires_grad
        input_BD = features_BD if fused else self.dropout(norm(features_BD.to(norm.weight.dtype)))

        def of_input(layer: nn.Linear) -> Tensor:
            if fused:
                return normed_linear(input_BD, norm.weight, norm.bias, layer.weight, layer.bias, norm.eps)
            out_BH: Tensor = layer(input_BD)
            return out_BH

        out_BE = self.body(of_input)
        if self.linear_path is not None:
            out_BE = out_BE + of_input(self.linear_path)
        if item_bias and self.item_bias is not None:
            out_BE = torch.cat((out_BE, of_input(self.item_bias)), dim=-1)
        return out_BE.reshape(*leading, -1)

    def apply_power(self, features_BD: Tensor, power: float | None = None) -> Tensor:
        """Return `sign(x) |x|^power` of each feature; by default with the head's own power.

        A power below 1 shortens the long tail of rectified features, in which a few large values dominate the others
        (the "power normalisation" of Perronnin et al., 2010, with a power of 0.5).
        """
        power = self.power if power is None else power
        return features_BD if power == 1 else features_BD.sign() * features_BD.abs() ** power

    @torch.no_grad()
    def basis(self, features_BD: Tensor) -> Tensor:
        """Return the inputs (…, X) of a new head's closed form in float64: its features after power and LayerNorm."""
        features_BD = self.apply_power(features_BD.to(self.norm.weight.dtype))
        return F.layer_norm(features_BD.double(), features_BD.shape[-1:])

    def add_linear_path(self) -> nn.Linear:
        """Add and return a linear map beside the body, whose initial output becomes zero.

        The whole head then starts as the linear path, such as a closed-form map.
        """
        self.linear_path = nn.Linear(self.norm.normalized_shape[0], self.out.out_features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        return self.linear_path

    def add_item_bias(self) -> None:
        """Add a number for each item beside the output, linear in the normalised features and initially 0."""
        on_meta = nn.Linear(self.norm.normalized_shape[0], 1, device="meta")  # draws no random numbers
        self.item_bias = on_meta.to_empty(device=self.norm.weight.device)
        nn.init.zeros_(self.item_bias.weight)
        nn.init.zeros_(self.item_bias.bias)


class LinearHead(Head):
    """`W x`."""

    def __init__(self, input_dim: int, output_dim: int, dropout: float = 0.0):
        super().__init__(input_dim, dropout)
        self.out = _linear(input_dim, output_dim)

    def body(self, of_input: OfInput) -> Tensor:  # noqa: D102
        return of_input(self.out)


class MLPHead(Head):
    """`W_out relu6(W_a x)`, with `expansion` × input_dim hidden units."""

    def __init__(
        self, input_dim: int, output_dim: int, dropout: float = 0.0, expansion: int = 4, hidden_units: int | None = None
    ):
        super().__init__(input_dim, dropout)
        self.hidden_units = hidden_units or expansion * input_dim
        self.hidden = _linear(input_dim, self.hidden_units)
        self.out = _linear(self.hidden_units, output_dim)

    def body(self, of_input: OfInput) -> Tensor:  # noqa: D102
        out_BE: Tensor = self.out(self.dropout(F.relu6(of_input(self.hidden))))
        return out_BE


class WideHead(MLPHead):
    """`W x + W_out relu6(W_a x)`, of which a closed form finds W and W_out together, given a random W_a.

    Hidden units with random weights are random features (Rahimi and Recht, 2007; arc-cosine kernels, Cho and Saul,
    2009): the closed form becomes an approximate kernel CCA on this side.
    """

    def __init__(self, input_dim: int, output_dim: int, dropout: float, hidden_units: int):
        super().__init__(input_dim, output_dim, dropout, hidden_units=hidden_units)
        self.add_linear_path()

    @property
    def basis_dim(self) -> int:  # noqa: D102
        return super().basis_dim + self.hidden_units

    @torch.no_grad()
    def basis(self, features_BD: Tensor) -> Tensor:
        """Return the inputs (…, D + hidden_units) of a new head's closed form in float64, hidden units last."""
        normed_BD = super().basis(features_BD)
        return torch.cat((normed_BD, F.relu6(normed_BD @ self.hidden.weight.double().T)), dim=-1)


class GLUHead(Head):
    """`W_out (relu6(W_a x) ⊙ W_b x)`, with `expansion` × input_dim hidden units: the paper's head.

    The authors' code also clamps both branches to ±1000. LayerNorm bounds the input and relu6 bounds one branch, so the
    clamp has no effect in practice. It is left out, as in the paper's formula.
    """

    def __init__(self, input_dim: int, output_dim: int, dropout: float = 0.0, expansion: int = 4):
        super().__init__(input_dim, dropout)
        self.hidden_units = expansion * input_dim
        self.gate = _linear(input_dim, self.hidden_units)
        self.value = _linear(input_dim, self.hidden_units)
        self.out = _linear(self.hidden_units, output_dim)

    @torch.no_grad()
    def value_bound(self) -> float:
        """Return an upper bound of the absolute values of the value branch, for any features.

        A vector after LayerNorm is γ ⊙ u + β with |u| ≤ √D, so unit j of `W x + b` is within
        √D · |W_j ⊙ γ| + |W_j · β + b_j|.
        """
        gamma_D, beta_D, weight_HD = self.norm.weight, self.norm.bias, self.value.weight
        swing_H = (weight_HD * gamma_D).norm(dim=1) * len(gamma_D) ** 0.5
        return float((swing_H + (weight_HD @ beta_D + self.value.bias).abs()).max())

    def body(self, of_input: OfInput) -> Tensor:  # noqa: D102
        gate_BH, value_BH = of_input(self.gate), self.dropout(of_input(self.value))
        if self.training:
            return gated_linear(gate_BH, value_BH, self.out.weight, self.out.bias)
        out_BE: Tensor = self.out(F.relu6(gate_BH) * value_BH)
        return out_BE


HEADS: dict[HeadKind, type[LinearHead | MLPHead | GLUHead]] = {"linear": LinearHead, "mlp": MLPHead, "glu": GLUHead}
"""Heads by their kind; those with hidden units also take `expansion`."""


def _linear(input_dim: int, output_dim: int) -> nn.Linear:
    layer = nn.Linear(input_dim, output_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
