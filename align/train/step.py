"""One optimiser step: embed a batch, compute its loss, update the weights, in memory that hardly grows with the batch.

A loss over B × B pairs needs all embeddings of one side at once, but the heads do not. So the images pass through their
head in micro-batches. Then each part of the texts passes through its head, meets all images in the loss, and is
backpropagated, so that only the activations of one part are in memory. Finally the images are backpropagated, one
micro-batch after the other. Micro-batches whose activations do not fit are recomputed (GradCache, Gao et al., 2021),
with bitwise equal results.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.optim import AdamW, Optimizer

from sail_align.align.data.loader import Batch
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.correction import Side
from sail_align.align.model.heads import Head
from sail_align.align.model.loss import Loss, LossValue
from sail_align.align.model.pair_blocks import OTHER_BLOCK_SIZE
from sail_align.align.settings import FitSettings, Precision
from sail_align.align.train.distributed import ALONE, World
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.system.memory import free_memory

MICRO_BATCH = 2_048
"""Rows that pass through a head at once."""

PARTS = 16
"""Maximum number of parts of the texts, as each computes a gradient for all images."""


@dataclass(frozen=True)
class Stepper:
    """Takes training steps.

    Attributes:
        model: The model.
        loss_of: Loss over a part of the texts and all images.
        optimizer: Optimiser of the model.
        device: Device of the model.
        in_parts: Whether the losses of parts of the texts add up to the batch's. This holds for the sigmoid loss, but
            not for a softmax over all texts, which must form one part.
        micro_batch: Rows that pass through a head at once.
        keep_bytes: Memory for activations kept for the backward pass. By default half of what is free when a step
            begins; the other half is for gradients, the loss and the stream.
        precision: Precision of matrix products.
        world: The processes that share each batch.
    """

    model: AlignmentModel
    loss_of: Loss
    optimizer: Optimizer
    device: torch.device
    in_parts: bool = False
    micro_batch: int = MICRO_BATCH
    keep_bytes: int | None = None
    precision: Precision = "float32"
    world: World = ALONE

    def step(self, batch: Batch, rate: float) -> LossValue:
        """Take one step on a batch with a learning rate; return its loss, without gradients.

        With several processes, each has a part of the batch. They exchange their images, so that every text meets every
        image of the whole batch, and add their gradients. Dropout uses torch's global random state and differs between
        processes.
        """
        with tf32_products(self.precision == "tf32"):
            return self._step(batch, rate)

    def _step(self, batch: Batch, rate: float) -> LossValue:
        model, optimizer, world = self.model, self.optimizer, self.world
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model.train()
        keep_bytes = self.free() // 2 if self.keep_bytes is None else self.keep_bytes
        rows = len(batch.images)
        parts, spans = self._parts(rows), world.spans(rows)
        seed = int(torch.randint(1 << 62, ()))

        images = _Pass(self, "image", batch.images, (seed, 0))
        image_NE, keep_bytes = images.embed(keep_bytes)
        image_ME = world.gather(image_NE, spans).requires_grad_()
        gradient_ME = torch.zeros_like(image_ME)
        sums = torch.zeros(len(LossValue._fields) + 2, device=self.device)
        for number, part in enumerate(parts, start=1):
            texts = _Pass(self, "text", batch.texts[:, part].flatten(0, 1), (seed, number))
            text_NE, _ = texts.embed(keep_bytes)
            text_CNE = text_NE.view(len(batch.texts), -1, text_NE.shape[1]).requires_grad_()
            learned = (image_ME, text_CNE, model.log_scale, model.bias)
            with self.products():
                loss = self.loss_of(*learned, first=spans[world.rank].start + part.start)
            image_gradient_ME, text_gradient_CNE, *others = torch.autograd.grad(
                loss.total, learned, materialize_grads=True
            )
            gradient_ME += image_gradient_ME
            del image_gradient_ME
            texts.backward(text_gradient_CNE.flatten(0, 1))
            sums += torch.stack([*map(Tensor.detach, loss), *others])
        images.backward(world.scatter_sum(gradient_ME, spans))
        world.sum(sums, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
        model.log_scale.grad, model.bias.grad = sums[-2:]
        optimizer.step()
        model.clamp_scale()
        return LossValue(*sums[:-2])

    def products(self) -> AbstractContextManager[object]:
        """Return a context of a forward pass that computes matrix products in bfloat16 if that is the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def free(self) -> int:
        """Return the bytes that this process can still allocate on its GPU, or its share of those of the machine."""
        if self.device.type == "cuda":
            held_back = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = int(torch.cuda.mem_get_info(self.device)[0]) + held_back
        else:
            free = free_memory()
        return free // self.world.sharing

    def memory(self, rows: int, captions: int) -> int:
        """Return the bytes that steps need to recompute nothing: free before the first one, beside weights and batches.

        This is an upper bound of the memory in use, as half of what is free is not used for activations.

        Args:
            rows: Rows of a batch, of this process.
            captions: Texts of each row.
        """
        model, sides = (
            self.model,
            ((self.model.image_head, rows), (self.model.text_head, captions * self._part_rows(rows))),
        )
        kept = sum(4 * head.kept_units * number for head, number in sides)
        micro = max(4 * head.kept_units * min(self.micro_batch, number) for head, number in sides)
        weights = 4 * sum(each.numel() for each in model.parameters())
        embeddings = 4 * rows * self.world.size * model.image_head.out.out_features
        block = 4 * min(rows * self.world.size, OTHER_BLOCK_SIZE) ** 2
        others = weights + 5 * embeddings + 2 * micro + 2 * block
        return weights * (2 if isinstance(self.optimizer, AdamW) else 1) + max(2 * kept, kept + others)

    def _parts(self, rows: int) -> list[slice]:
        """Return the parts into which this number of texts is split."""
        size = self._part_rows(rows)
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _part_rows(self, rows: int) -> int:
        return max(self.micro_batch // 2, -(-rows // PARTS)) if self.in_parts else rows


class _Pass:
    """Forward and backward pass of features (N, D) through a head to what the loss compares, in micro-batches.

    That is unit-norm embeddings (N, E), or with item biases the vectors (N, E + 2) of `extended`.
    """

    def __init__(self, stepper: Stepper, side: Side, features_ND: Tensor, seeds: tuple[int, ...]):
        self._stepper, self._features_ND = stepper, features_ND
        self._head: Head = getattr(stepper.model, f"{side}_head")
        self._seeds = (*seeds, stepper.world.rank)  # different dropout in each process
        size, dim = stepper.micro_batch, self._head.out.out_features
        self._rows = [slice(start, start + size) for start in range(0, len(features_ND), size)]
        self._bytes = min(size, len(features_ND)) * self._head.kept_units * 4
        self._biased = self._head.item_bias is not None
        self._compared_NX = torch.ones(len(features_ND), dim + 2 * self._biased, device=stepper.device)
        self._embedded_NE = self._compared_NX[:, :dim]
        self._place = dim if side == "image" else dim + 1
        """Column of the item biases, where there are any."""
        self._length_N1 = torch.empty(len(features_ND), 1, device=stepper.device)
        self._kept: dict[int, GradientEdge] = {}

    def embed(self, keep_bytes: int) -> tuple[Tensor, int]:
        """Return what the loss compares without a graph, and the bytes left for activations."""
        room = keep_bytes // self._bytes
        for number, rows in enumerate(self._rows):
            with torch.set_grad_enabled(number < room):
                out_BE = self._forward(number)
            if number < room:
                self._kept[number] = get_gradient_edge(out_BE)  # keeps the graph without the output
            out_BE = out_BE.detach().float()
            if self._biased:
                self._compared_NX[rows, self._place] = out_BE[:, -1]
                out_BE = out_BE[:, :-1]
            self._length_N1[rows] = out_BE.norm(dim=1, keepdim=True).clamp_(min=1e-12)
            torch.div(out_BE, self._length_N1[rows], out=self._embedded_NE[rows])
        return self._compared_NX.detach(), keep_bytes - len(self._kept) * self._bytes

    def backward(self, gradient_NX: Tensor) -> None:
        """Add to the head's gradients, given the gradient with respect to what the loss compares."""
        for number, rows in enumerate(self._rows):
            edge = self._kept.pop(number) if number in self._kept else get_gradient_edge(self._forward(number))
            # Embeddings have length 1, so the part of the gradient along them has no effect.
            embedded_BE, gradient_BE = self._embedded_NE[rows], gradient_NX[rows, : self._embedded_NE.shape[1]]
            along_B1 = (embedded_BE * gradient_BE).sum(1, keepdim=True)
            across_BE = torch.addcmul(gradient_BE, embedded_BE, along_B1, value=-1).div_(self._length_N1[rows])
            if self._biased:
                across_BE = torch.cat((across_BE, gradient_NX[rows, self._place, None]), dim=1)
            torch.autograd.backward(edge, across_BE)

    def _forward(self, number: int) -> Tensor:
        seed_torch(*self._seeds, number)  # the same dropout if it is recomputed
        with self._stepper.products():
            return self._head.with_item_bias(self._features_ND[self._rows[number]].to(self._stepper.device))


def seed_torch(*numbers: int) -> None:
    """Seed torch's global random state with several numbers, hashed into the 32 bits that a CPU's generator uses."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def make_optimizer(model: AlignmentModel, settings: FitSettings) -> Optimizer:
    """Return Lion or AdamW, with weight decay on matrices only: not on biases, norms, τ or b."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "lion":
        lion: Optimizer = Lion(groups, lr=settings.lr, betas=(0.9, 0.99))
        return lion
    return AdamW(groups, lr=settings.lr)
