"""The products of a contrastive loss, block by block: similarities of images and texts, and gradients from them.

A loss of M images and N texts looks at M × N similarities a caption set. Only one block of them is in memory at a time:
the loss turns it into its gradient where it lies, that is multiplied into the gradients of the embeddings, and the next
block takes its place.

Row j of the texts belongs with row `first + j` of the images. These positive pairs are left out of the blocks and are
computed row by row in float32: there are few of them, they matter most, and half precision would round them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {"cpu": 2_048}
"""Most rows and columns of a block, by device: products of less than 1,024 are slow, and 2,048 still fit a cache."""
BLOCK_ELSEWHERE = 8_192
MANY_PAIRS = 1 << 24
"""From 4,096 images and texts on, seconds of compiling are soon won back; a smaller batch takes a fraction of one."""


class Block(NamedTuple):
    """R images (R, E) and K texts (K, E) of a caption set, and their similarities (R, K), which the loss overwrites."""

    pairs: Tensor
    images: Tensor
    texts: Tensor
    caption: int
    weight: float
    rows: slice
    columns: slice

    def of(self, image_CM: Tensor, text_CN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the views (R,) and (K,) of what belongs to this block's images and texts."""
        return image_CM[self.caption, self.rows], text_CN[self.caption, self.columns]


class PairBlocks:
    """The embeddings of images and texts, the blocks of their similarities, and the gradients that add up from them.

    Products are taken in autocast's type where it is on, else in the embeddings' own type. All else is float32, the
    gradients too; for float64 embeddings it is float64. Without a gradient to take, those products are not computed.

    Args:
        image_ME: (M, E) of any float type.
        text_CNE: (C, N, E) of the same type.
        log_scale: τ, scalar: the factor of all similarities is t = exp(τ).
        bias: b, scalar.
        first: Which image belongs with the first text.
        weights: One for each caption set, which multiplies its gradients; by default 1.

    Raises:
        ValueError: A text has no image, or a caption set no weight.
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
            raise ValueError(f"{texts} texts from row {first} on do not all have one of {images} images.")
        self._weights = [1.0] * captions if weights is None else list(weights)
        if len(self._weights) != captions:
            raise ValueError(f"{captions} caption sets have {len(self._weights)} weights.")
        self._inputs = (image_ME, text_CNE, log_scale, bias)
        self._image_ME, self._text_CNE = image_ME.detach(), text_CNE.detach()
        self._own = slice(first, first + texts)
        self.batch = images
        self.many = self.batch**2 >= MANY_PAIRS
        self.exact = torch.promote_types(image_ME.dtype, torch.float32)
        autocast = torch.is_autocast_enabled(device) and self.exact == torch.float32
        self._product = torch.get_autocast_dtype(device) if autocast else image_ME.dtype
        self.scale = log_scale.detach().to(self.exact).exp()
        self._most = BLOCK.get(device, BLOCK_ELSEWHERE)
        self._rows, self._columns = _slices(images, self._most), _slices(texts, self._most)
        self.learning = torch.is_grad_enabled() and any(each.requires_grad for each in self._inputs)
        if self.learning:
            self._image_gradient_ME = torch.zeros_like(self._image_ME, dtype=self.exact)
            self._text_gradient_CNE = torch.zeros_like(self._text_CNE, dtype=self.exact)

    @contextmanager
    def without_graph(self) -> Iterator[None]:
        """Compute as it stands here: no graph, and no other type by autocast."""
        with torch.no_grad(), torch.autocast(self._image_ME.device.type, enabled=False):
            yield

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks one after the other, each in the memory of the one before."""
        memory = self._image_ME.new_empty(_longest(self._rows) * _longest(self._columns), dtype=self._product)
        image_ME = self._image_ME.to(self._product)
        for caption, (exact_text_NE, weight) in enumerate(zip(self._text_CNE, self._weights, strict=True)):
            text_NE = exact_text_NE.to(self._product)
            for rows, columns in product(self._rows, self._columns):
                image_RE, text_KE = image_ME[rows], text_NE[columns]
                pairs_RK = memory[: len(image_RE) * len(text_KE)].view(len(image_RE), len(text_KE))
                torch.mm(image_RE, text_KE.mT, out=pairs_RK)
                # A pair at minus infinity adds nothing. Where a block has no positive pairs this diagonal is empty.
                pairs_RK.diagonal(rows.start - columns.start - self._own.start).fill_(-torch.inf)
                yield Block(pairs_RK, image_RE, text_KE, caption, weight, rows, columns)

    def positives(self) -> Tensor:
        """Return the similarities (C, N) of the pairs that belong together."""
        return torch.stack([self._dots(self._image_ME[self._own], text_NE) for text_NE in self._text_CNE])

    def sum(self) -> Tensor:
        """Return the sum of all C × M × N similarities, positives too: the product of the sums of the embeddings."""
        image_E = self._image_ME.sum(0, dtype=self.exact)
        text_E = self._text_CNE.sum(1, dtype=self.exact).sum(0)
        return (image_E.double() * text_E.double()).sum()

    def weighted(self, values_CN: Tensor) -> Tensor:
        """Return the sum of the positive pairs' values, each times its caption set's weight, in float64."""
        sums = [weight * values_N.double().sum() for values_N, weight in zip(values_CN, self._weights, strict=True)]
        return torch.stack(sums).sum()

    def push(self, block: Block) -> None:
        """Add the gradients of a block whose pairs have become ∂loss/∂logit."""
        if self.learning:
            gradient_KE = self._text_gradient_CNE[block.caption, block.columns]
            _add_product(self._image_gradient_ME[block.rows], block.pairs, block.texts, block.weight)
            _add_product(gradient_KE, block.pairs.mT, block.images, block.weight)

    def pull(self, pull_CN: Tensor) -> None:
        """Add the gradients of the positive pairs, given −∂loss/∂logit of each."""
        if self.learning:
            for caption, (pull_N, weight) in enumerate(zip(pull_CN, self._weights, strict=True)):
                image_NE, gradient_NE = (each[self._own] for each in (self._image_ME, self._image_gradient_ME))
                gradient_NE.addcmul_(pull_N[:, None], self._text_CNE[caption], value=-weight)
                self._text_gradient_CNE[caption].addcmul_(pull_N[:, None], image_NE, value=-weight)

    def differentiable(self, total: Tensor, factor: float, logit_sum: Tensor) -> Tensor:
        """Return the loss with the gradients that were added up, times a factor.

        Args:
            total: The loss.
            factor: What ∂loss/∂logit lacked.
            logit_sum: The sum of ∂loss/∂logit over all pairs, which is the bias's gradient.
        """
        if not self.learning:
            return total
        # Σ similarity · ∂loss/∂logit: what all texts move along themselves. No pass over the pairs is needed.
        along = self._dots(self._text_CNE.flatten(0, 1), self._text_gradient_CNE.flatten(0, 1)).double().sum()
        gradients = [self._image_gradient_ME, self._text_gradient_CNE, along, logit_sum / self.scale]
        with torch.enable_grad():
            result: Tensor = _WithGradients.apply(total, factor * self.scale, gradients, *self._inputs)
        return result

    def _dots(self, one_NE: Tensor, other_NE: Tensor) -> Tensor:
        """Return the products (N,) of corresponding rows."""
        parts = _slices(len(one_NE), self._most)
        return torch.cat([(one_NE[rows].to(self.exact) * other_NE[rows]).sum(1) for rows in parts])


class _WithGradients(torch.autograd.Function):
    """Hands a loss through that was computed without a graph; backward gives the gradients that came with it.

    They can be taken once, as they are then scaled where they lie. There are no second derivatives.
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
            raise RuntimeError("The gradients of this loss have been taken already; compute the loss again.")
        # Only here do 1/|B|² and a loss scaler's factor come in, in float32: half precision has no such small numbers.
        factor = ctx.factor * upstream
        scaled = [
            gradient.mul_(factor).to(dtype).reshape(shape)
            for gradient, (dtype, shape) in zip(gradients, ctx.kinds, strict=True)
        ]
        return None, None, None, *scaled


def _add_product(into: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    """Add `weight * left @ right` to a matrix, which may be of a wider type."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=weight)
    else:
        into.add_(left @ right, alpha=weight)


def _slices(length: int, most: int) -> list[slice]:
    """Return as few slices of `length` elements as hold at most so many each, nearly equal in size."""
    count = -(-length // most)
    ends = [length * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _longest(slices: Sequence[slice]) -> int:
    longest: int = max(each.stop - each.start for each in slices)
    return longest
