"""One optimiser step: embed a batch, take its loss, move the weights."""

from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sail_align.align.loss import Loss, LossValue
from sail_align.align.model import AlignmentModel
from sail_align.align.settings import FitSettings
from sail_align.align.stream import Batch


def train_step(
    model: AlignmentModel, loss_of: Loss, optimizer: Optimizer, batch: Batch, rate: float, device: torch.device
) -> LossValue:
    """Take one step on a batch at a learning rate; return its loss, without gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    loss = batch_loss(model, loss_of, *embed(model, batch, device))
    optimizer.zero_grad()
    loss.total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    model.clamp_scale()
    return LossValue(*(value.detach() for value in loss))


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
