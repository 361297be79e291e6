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
from sail_align.align.heads import Head
from sail_align.align.loss import Loss, LossValue
from sail_align.align.model import AlignmentModel
from sail_align.align.settings import FitSettings
from sail_align.align.stream import Batch

MICRO_BATCH = 2_048
"""Rows that go through a head at once. Half as many cost time on a CPU already, more gain none."""


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


def train_step(stepper: Stepper, batch: Batch, rate: float) -> LossValue:
    """Take one step on a batch at a learning rate; return its loss, without gradients.

    Dropout draws from torch's global random state as it is when the step begins.
    """
    model, optimizer = stepper.model, stepper.optimizer
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    model.train()
    images = _Side(model.encode_image, model.image_head, batch.images, stepper)
    texts = _Side(model.encode_text, model.text_head, batch.texts.flatten(0, 1), stepper)
    left = free_bytes(stepper.device) // 2 if stepper.keep_bytes is None else stepper.keep_bytes
    image_BE, left = images.embed(left)
    text_NE, _ = texts.embed(left)
    text_CBE = text_NE.view(*batch.texts.shape[:2], -1)
    loss = batch_loss(model, stepper.loss_of, image_BE.requires_grad_(), text_CBE.requires_grad_())
    model.log_scale.grad, model.bias.grad, image_grad_BE, text_grad_CBE = torch.autograd.grad(
        loss.total, (model.log_scale, model.bias, image_BE, text_CBE), materialize_grads=True
    )
    images.backward(image_grad_BE)
    texts.backward(text_grad_CBE.flatten(0, 1))
    optimizer.step()
    model.clamp_scale()
    return LossValue(*(value.detach() for value in loss))


class _Side:
    """The images or the texts of a batch on their way through a head and back, by micro-batches."""

    def __init__(self, encode: Callable[[Tensor], Tensor], head: Head, features_ND: Tensor, stepper: Stepper):
        self._encode, self._features_ND, self._stepper = encode, features_ND, stepper
        self._rows = [
            slice(start, start + stepper.micro_batch) for start in range(0, len(features_ND), stepper.micro_batch)
        ]
        self._bytes = min(stepper.micro_batch, len(features_ND)) * head.kept_units * 4
        self._dim = head.out.out_features
        self._seed = int(torch.randint(1 << 62, ()))
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
