"""The matrix products of a contrastive loss, block by block: similarities and the gradients of the embeddings.

A loss of M images and N texts has M × N similarities per caption set. Only one block of them is in memory at a time.
The loss turns the block into its gradient in place, which is multiplied into the gradients of the embeddings. The next
block reuses the memory.

Row j of the texts belongs to row `first + j` of the images. These positive pairs are left out of the blocks and
computed row by row in float32: they are few, they matter most, and half precision would round them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SIZE = {"cpu": 2_048}
"""Maximum rows and columns of a block, by device: products below 1,024 are slow, and 2,048 still fit the cache."""
OTHER_BLOCK_SIZE = 8_192
"""`BLOCK_SIZE` of other devices."""
MANY_PAIRS = 1 << 24
"""Pairs from which the seconds of compiling are soon recovered: 4,096 images and texts."""


class Block(NamedTuple):
    """Images (R, E) and texts (K, E) of a caption set, and their similarities (R, K), which the loss overwrites."""

    pairs: Tensor
    images: Tensor
    texts: Tensor
    caption: int
    weight: float
    rows: slice
    columns: slice

    def of(self, image_CM: Tensor, text_CN: Tensor) -> tuple[Tensor, Tensor]:
        """Return views (R,) and (K,) of the values of this block's images and texts."""
        return image_CM[self.caption, self.rows], text_CN[self.caption, self.columns]


class PairBlocks:
    """The embeddings of images and texts, an iterator of blocks of their similarities, and accumulated gradients.

    Products use the dtype of autocast if it is enabled, otherwise that of the embeddings. Everything else, including
    the gradients, is float32, or float64 for float64 embeddings. Gradients are only computed if an input requires them.

    Args:
        image_ME: Image embeddings (M, E) of any float type.
        text_CNE: Text embeddings (C, N, E) of the same type.
        log_scale: τ, scalar. The factor of all similarities is t = exp(τ).
        bias: b, scalar.
        first: Image that belongs to the first text.
        weights: Factors of the gradients, one for each caption set; 1 by default.

    Raises:
        ValueError: A text has no image, or a caption set has no weight.
    """

    def __init__(
        self,
        image_ME: Tensor,
        text_CNE: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        *,
        first: int,
        weights: Sequence[float] | None,
    ):
        images, (captions, texts, _), device = len(image_ME), text_CNE.shape, image_ME.device.type
        if not 0 <= first <= images - texts:
            raise ValueError(
                f"The texts need images {first} to {first + texts - 1}, but there are only {images} images."
            )
        self._weights = [1.0] * captions if weights is None else list(weights)
        if len(self._weights) != captions:
            raise ValueError(f"Got {len(self._weights)} weights for {captions} caption sets. Pass one weight for each.")
        self._inputs = (image_ME, text_CNE, log_scale, bias)
        self._image_ME, self._text_CNE = image_ME.detach(), text_CNE.detach()
        self._own = slice(first, first + texts)
        self.batch = images
        self.many = self.batch**2 >= MANY_PAIRS
        self.exact = torch.promote_types(image_ME.dtype, torch.float32)
        autocast = torch.is_autocast_enabled(device) and self.exact == torch.float32
        self._product = torch.get_autocast_dtype(device) if autocast else image_ME.dtype
        self.scale = log_scale.detach().to(self.exact).exp()
        self._most = BLOCK_SIZE.get(device, OTHER_BLOCK_SIZE)
        self._rows, self._columns = _slices(images, self._most), _slices(texts, self._most)
        self.learning = torch.is_grad_enabled() and any(each.requires_grad for each in self._inputs)
        if self.learning:
            self._image_gradient_ME = torch.zeros_like(self._image_ME, dtype=self.exact)
            self._text_gradient_CNE = torch.zeros_like(self._text_CNE, dtype=self.exact)

    @contextmanager
    def without_graph(self) -> Iterator[None]:
        """Record no graph and disable autocast, so that the code decides on the dtypes."""
        with torch.no_grad(), torch.autocast(self._image_ME.device.type, enabled=False):
            yield

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks; each reuses the memory of the previous one."""
        longest = [max(each.stop - each.start for each in slices) for slices in (self._rows, self._columns)]
        memory = self._image_ME.new_empty(longest[0] * longest[1], dtype=self._product)
        image_ME = self._image_ME.to(self._product)
        for caption, (exact_text_NE, weight) in enumerate(zip(self._text_CNE, self._weights, strict=True)):
            text_NE = exact_text_NE.to(self._product)
            for rows, columns in product(self._rows, self._columns):
                image_RE, text_KE = image_ME[rows], text_NE[columns]
                pairs_RK = memory[: len(image_RE) * len(text_KE)].view(len(image_RE), len(text_KE))
                torch.mm(image_RE, text_KE.mT, out=pairs_RK)
                # A pair at minus infinity adds nothing. The diagonal is empty in a block without positive pairs.
                pairs_RK.diagonal(rows.start - columns.start - self._own.start).fill_(-torch.inf)
                yield Block(pairs_RK, image_RE, text_KE, caption, weight, rows, columns)

    def positives(self) -> Tensor:
        """Return the similarities (C, N) of the positive pairs."""
        return torch.stack([self._dots(self._image_ME[self._own], text_NE) for text_NE in self._text_CNE])

    def sum(self) -> Tensor:
        """Return the sum of all C × M × N similarities, which is the product of the sums of the embeddings."""
        image_E = self._image_ME.sum(0, dtype=self.exact)
        text_E = self._text_CNE.sum(1, dtype=self.exact).sum(0)
        return (image_E.double() * text_E.double()).sum()

    def weighted(self, values_CN: Tensor) -> Tensor:
        """Return the float64 sum of the positive pairs' values, weighted by caption set."""
        sums = [weight * values_N.double().sum() for values_N, weight in zip(values_CN, self._weights, strict=True)]
        return torch.stack(sums).sum()

    def push(self, block: Block) -> None:
        """Accumulate the gradients of a block whose `pairs` hold ∂loss/∂logit."""
        if self.learning:
            gradient_KE = self._text_gradient_CNE[block.caption, block.columns]
            _add_product(self._image_gradient_ME[block.rows], block.pairs, block.texts, block.weight)
            _add_product(gradient_KE, block.pairs.mT, block.images, block.weight)

    def pull(self, pull_CN: Tensor) -> None:
        """Accumulate the gradients of the positive pairs, given −∂loss/∂logit of each."""
        if self.learning:
            for caption, (pull_N, weight) in enumerate(zip(pull_CN, self._weights, strict=True)):
                image_NE, gradient_NE = (each[self._own] for each in (self._image_ME, self._image_gradient_ME))
                gradient_NE.addcmul_(pull_N[:, None], self._text_CNE[caption], value=-weight)
                self._text_gradient_CNE[caption].addcmul_(pull_N[:, None], image_NE, value=-weight)

    def differentiable(self, total: Tensor, factor: float, logit_sum: Tensor) -> Tensor:
        """Attach the accumulated gradients, times a factor, to the loss.

        Args:
            total: The loss.
            factor: Scale that ∂loss/∂logit does not include yet.
            logit_sum: Sum of ∂loss/∂logit over all pairs, which is the gradient of the bias.
        """
        if not self.learning:
            return total
        # Σ similarity · ∂loss/∂logit is the dot product of texts and their gradients: no pass over the pairs is needed.
        along = self._dots(self._text_CNE.flatten(0, 1), self._text_gradient_CNE.flatten(0, 1)).double().sum()
        gradients = [self._image_gradient_ME, self._text_gradient_CNE, along, logit_sum / self.scale]
        with torch.enable_grad():
            result: Tensor = _WithGradients.apply(total, factor * self.scale, gradients, *self._inputs)
        return result

    def _dots(self, one_NE: Tensor, other_NE: Tensor) -> Tensor:
        """Return the dot products (N,) of corresponding rows."""
        parts = _slices(len(one_NE), self._most)
        return torch.cat([(one_NE[rows].to(self.exact) * other_NE[rows]).sum(1) for rows in parts])


class _WithGradients(torch.autograd.Function):
    """Attach precomputed gradients to a loss that was computed without a graph.

    Backward works once, since it scales the gradients in place. There are no second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, factor: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.factor, ctx.gradients, ctx.kinds = factor, gradients, [(each.dtype, each.shape) for each in inputs]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        if not gradients:
            raise RuntimeError("The gradients of this loss have been used already. Compute the loss again.")
        # 1/|B|² and a loss scaler's factor are applied only here, in float32: half precision has no such small numbers.
        factor = ctx.factor * upstream
        scaled = [
            gradient.mul_(factor).to(dtype).reshape(shape)
            for gradient, (dtype, shape) in zip(gradients, ctx.kinds, strict=True)
        ]
        return None, None, None, *scaled


def _add_product(into: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    """Add `weight * left @ right` to a matrix of the same or a wider dtype."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=weight)
    else:
        into.add_(left @ right, alpha=weight)


def _slices(length: int, most: int) -> list[slice]:
    """Divide `length` elements into the fewest slices of at most `most` elements, nearly equal in size."""
    count = -(-length // most)
    ends = [length * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
