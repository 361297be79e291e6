"""One optimiser step: embed a batch, take its loss, move the weights, in memory that does not grow with the batch.

A loss over B × B pairs needs all embeddings at once, the heads do not. So a batch goes through the heads by
micro-batches, the loss gives its gradient with respect to the embeddings, and the micro-batches go backward one by one.
One whose activations were not kept runs forward once more before that (as in GradCache, Gao et al., 2021). How many are
kept is a matter of memory and time alone: both ways compute the same bits in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sail_align.align.device import free_bytes
from sail_align.align.distributed import ALONE, World
from sail_align.align.heads import Head
from sail_align.align.loss import Loss, LossValue
from sail_align.align.model import AlignmentModel
from sail_align.align.settings import FitSettings
from sail_align.align.stream import Batch

MICRO_BATCH = 2_048
"""Rows that go through a head at once."""


@dataclass(frozen=True)
class Stepper:
    """What takes the steps of a run.

    `keep_bytes` is the memory for activations that are kept for the backward pass; by default half of what is free when
    a step begins, the other half being for gradients, the loss and the stream.
    """

    model: AlignmentModel
    loss_of: Loss
    optimizer: Optimizer
    device: torch.device
    micro_batch: int = MICRO_BATCH
    keep_bytes: int | None = None
    world: World = ALONE


def train_step(stepper: Stepper, batch: Batch, rate: float) -> LossValue:
    """Take one step on a batch at a learning rate; return its loss, without gradients.

    Of several processes each has its part of the batch. All exchange their texts, so that every image meets every text
    of the whole batch, and add up their gradients. Dropout draws from torch's global random state as it is at the
    beginning.
    """
    model, optimizer, world = stepper.model, stepper.optimizer, stepper.world
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    model.train()
    images = _Side(model.encode_image, model.image_head, batch.images, stepper)
    texts = _Side(model.encode_text, model.text_head, batch.texts.flatten(0, 1), stepper)
    left = stepper.keep_bytes
    if left is None:
        left = free_bytes(stepper.device) // (2 * world.size_here)
    image_NE, left = images.embed(left)
    text_CNE, _ = texts.embed(left)
    spans = world.spans(len(image_NE))
    text_CME = world.gather(text_CNE.view(len(batch.texts), len(image_NE), -1), spans)
    values, image_gradient_NE, text_gradient_CME = _loss_gradients(stepper, image_NE, text_CME, spans[world.rank].start)
    del image_NE, text_CNE, text_CME
    # The texts first: when the larger gradients of the images' head come, their activations are gone.
    texts.backward(world.scatter_sum(text_gradient_CME, spans).flatten(0, 1))
    images.backward(image_gradient_NE)
    world.sum(values, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
    optimizer.step()
    model.clamp_scale()
    return LossValue(*values)


def _loss_gradients(stepper: Stepper, image_NE: Tensor, text_CME: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of `LossValue` (5,) and the gradients of both embeddings; set those of τ and b."""
    model, embedded = stepper.model, (image_NE.requires_grad_(), text_CME.requires_grad_())
    loss = stepper.loss_of(*embedded, model.log_scale, model.bias, first=first)
    model.log_scale.grad, model.bias.grad, image_gradient_NE, text_gradient_CME = torch.autograd.grad(
        loss.total, (model.log_scale, model.bias, *embedded), materialize_grads=True
    )
    return torch.stack([value.detach() for value in loss]), image_gradient_NE, text_gradient_CME


class _Side:
    """The images or the texts of a batch on their way through a head and back, by micro-batches."""

    def __init__(self, encode: Callable[[Tensor], Tensor], head: Head, features_ND: Tensor, stepper: Stepper):
        self._encode, self._features_ND, self._stepper = encode, features_ND, stepper
        self._rows = [
            slice(start, start + stepper.micro_batch) for start in range(0, len(features_ND), stepper.micro_batch)
        ]
        self._bytes = min(stepper.micro_batch, len(features_ND)) * head.kept_units * 4
        self._dim = head.out.out_features
        # Other masks in every process.
        self._seed = int(torch.randint(1 << 62, ())) + (stepper.world.rank << 40)
        self._kept: dict[int, Tensor] = {}

    def embed(self, keep_bytes: int) -> tuple[Tensor, int]:
        """Return all embeddings (N, E) without a graph, and how many of the bytes for activations are left."""
        embedded_NE = torch.empty(len(self._features_ND), self._dim, device=self._stepper.device)
        for number, rows in enumerate(self._rows):
            kept = self._bytes <= keep_bytes
            with torch.set_grad_enabled(kept):
                part_BE = self._forward(number)
            embedded_NE[rows] = part_BE.detach()
            if kept:
                self._kept[number] = part_BE
                keep_bytes -= self._bytes
        return embedded_NE, keep_bytes

    def backward(self, gradient_NE: Tensor) -> None:
        """Add to the head's gradients, given that of the loss with respect to the embeddings."""
        for number, rows in enumerate(self._rows):
            part_BE = self._kept.pop(number) if number in self._kept else self._forward(number)
            torch.autograd.backward(part_BE, gradient_NE[rows])

    def _forward(self, number: int) -> Tensor:
        torch.manual_seed(self._seed + number)  # the same dropout, should it run once more
        return self._encode(self._features_ND[self._rows[number]].to(self._stepper.device))


def make_optimizer(model: AlignmentModel, settings: FitSettings) -> Optimizer:
    """Return Lion or AdamW, with weight decay on the matrices alone: not on biases, norms, τ and b."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "lion":
        lion: Optimizer = Lion(groups, lr=settings.lr, betas=(0.9, 0.99))
        return lion
    return AdamW(groups, lr=settings.lr)


def embed(model: AlignmentModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch's images (B, E) and texts (C, B, E) in the shared space."""
    return model.encode_image(batch.images.to(device)), model.encode_text(batch.texts.to(device))


def batch_loss(model: AlignmentModel, loss_of: Loss, image_BE: Tensor, text_CBE: Tensor) -> LossValue:
    """Return the loss of embedded pairs at the model's t and b."""
    return loss_of(image_BE, text_CBE, model.log_scale, model.bias)
