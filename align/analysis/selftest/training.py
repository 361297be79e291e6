"""Checks of losses, heads, optimiser and steps on a device, against plain formulas in float64 on the CPU."""

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.analysis.selftest.lab import (
    Check,
    Difference,
    Lab,
    SkippedError,
    largest_difference,
    relative_norm,
)
from sail_align.align.data.loader import Batch
from sail_align.align.model import fused
from sail_align.align.model import loss as losses
from sail_align.align.model.alignment import AlignmentModel, Architecture
from sail_align.align.model.heads import HEADS
from sail_align.align.model.loss import Loss, infonce_loss, sigmoid_loss
from sail_align.align.model.pair_blocks import BLOCK_SIZE, OTHER_BLOCK_SIZE
from sail_align.align.settings import FitSettings, Precision
from sail_align.align.train.step import Stepper, make_optimizer

LOSSES: dict[str, Loss] = {"sigmoid": sigmoid_loss, "infonce": infonce_loss}
IMAGE_DIM, TEXT_DIM, DIM, CAPTIONS = 96, 64, 48, 2
STEP_ROWS = 400
CHUNK = 1_024
COMPILED_ROWS = 4_096
"""Rows from which the losses are compiled."""
COMPILED_DIM, COMPILED_EXPANSION, COMPILED_MICRO_BATCH = 64, 64, 2_048
"""A head whose activations are compiled."""
RATE = 1e-3


def checks() -> Iterator[Check]:
    """Yield the checks."""
    for name in LOSSES:
        yield Check(f"{name} loss and gradients, blockwise against the full matrix", 1e-4, 2, partial(_loss, name))
    for kind in HEADS:
        yield Check(f"{kind} head and gradients", 1e-4, 0.5, partial(_head, kind))
    yield Check("Lion, five updates", 1e-5, 0.5, _lion)
    yield Check("step in micro-batches, gradients", 1e-3, 0.5, partial(_step, "float32", largest_difference))
    yield Check("step in TF32, gradients", 0.02, 0.5, partial(_step, "tf32", relative_norm))
    yield Check("step in bfloat16, gradients", 0.1, 0.5, partial(_step, "bfloat16", relative_norm))
    yield Check("compiled losses against eager", 1e-4, 15, _compiled_losses)
    yield Check("compiled heads against eager", 1e-5, 8, _compiled_heads)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _embeddings(rows: int) -> list[Tensor]:
    """Return unit-norm images (M, E) and texts (C, M, E) that are alike, τ and b, in float32 on the CPU."""
    image_ME = _random(rows, DIM)
    text_CME = image_ME + 0.5 * _random(CAPTIONS, rows, DIM, seed=1)
    return [
        F.normalize(image_ME, dim=-1),
        F.normalize(text_CME, dim=-1),
        torch.tensor(math.log(15.0)),
        torch.tensor(-6.0),
    ]


def _with_gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    value.backward()  # type: ignore[no-untyped-call]
    return [value, *(torch.zeros_like(each) if each.grad is None else each.grad for each in inputs)]


def _leaves(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [each.to(device, dtype, copy=True).requires_grad_() for each in tensors]


def _loss(name: str, lab: Lab) -> float:
    block = BLOCK_SIZE.get(lab.device.type, OTHER_BLOCK_SIZE)
    given = _embeddings(block + block // 8)
    inputs = _leaves(given, lab.device, torch.float32)
    found = _with_gradients(LOSSES[name](*inputs).total, inputs)
    exact = exact_loss(name, _leaves(given, torch.device("cpu"), torch.float64))
    # InfoNCE does not depend on b, whose gradient is exactly 0.
    return largest_difference(*zip(*((a, b) for a, b in zip(found, exact, strict=True) if b.any()), strict=True))


def exact_loss(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Return a loss of float64 inputs and their gradients, by autograd of the formula over slices of the full matrix.

    Args:
        name: Key of `LOSSES`.
        inputs: Images (M, E), texts (C, M, E), τ and b.
    """
    image_ME, text_CME, log_scale, bias = inputs
    rows = len(image_ME)
    total = torch.zeros((), dtype=torch.float64)
    for number in range(len(text_CME)):
        for start in range(0, rows, CHUNK):
            part = torch.arange(start, min(start + CHUNK, rows))
            image_KM = log_scale.exp() * image_ME[part] @ text_CME[number].T
            if name == "sigmoid":
                sign_KM = torch.full_like(image_KM, -1.0)
                sign_KM[range(len(part)), part] = 1.0
                term = -F.logsigmoid(sign_KM * (image_KM + bias)).sum() / rows**2
            else:
                text_KM = log_scale.exp() * text_CME[number][part] @ image_ME.T
                both = F.cross_entropy(image_KM, part, reduction="sum"), F.cross_entropy(text_KM, part, reduction="sum")
                term = (both[0] + both[1]) / 2 / rows
            term.backward()  # type: ignore[no-untyped-call]
            total += term.detach()
    return [total, *(torch.zeros_like(each) if each.grad is None else each.grad for each in inputs)]


def _head(kind: str, lab: Lab) -> float:
    torch.manual_seed(0)
    more = {} if kind == "linear" else {"expansion": 2}
    head = HEADS[kind](IMAGE_DIM, DIM, 0.0, **more)  # type: ignore[index]
    exact = copy.deepcopy(head).double().eval()  # evaluation mode uses autograd of the plain layers
    head = head.to(lab.device).train()
    features_BD, gradient_BE = _random(STEP_ROWS, IMAGE_DIM).half(), _random(STEP_ROWS, DIM, seed=1)
    out_BE, exact_BE = head(features_BD.to(lab.device)), exact(features_BD)
    out_BE.backward(gradient_BE.to(lab.device))
    exact_BE.backward(gradient_BE.double())
    return largest_difference([out_BE, *_gradients(head)], [exact_BE, *_gradients(exact)])


def _gradients(module: torch.nn.Module) -> list[Tensor]:
    return [each.grad for each in module.parameters() if each.grad is not None]


def _model(device: torch.device, *, head: str = "glu") -> AlignmentModel:
    torch.manual_seed(0)
    return Architecture(head, IMAGE_DIM, TEXT_DIM, DIM, 2).build(scale=15.0, bias=-6.0).to(device)  # type: ignore[arg-type]


def _lion(lab: Lab) -> float:
    settings = FitSettings(steps=1, lr=RATE, weight_decay=0.1)
    model = _model(lab.device)
    optimizer = make_optimizer(model, settings)
    weights = [each.detach().double().cpu() for each in model.parameters()]
    momenta = [torch.zeros_like(each) for each in weights]
    for update in range(5):
        for number, parameter in enumerate(model.parameters()):
            gradient = _random(*parameter.shape, seed=100 * update + number)
            parameter.grad = gradient.to(lab.device)
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            direction = (0.9 * momenta[number] + 0.1 * gradient.double()).sign()
            weights[number] = weights[number] * (1 - RATE * decay) - RATE * direction
            momenta[number] = 0.99 * momenta[number] + 0.01 * gradient.double()
        optimizer.step()
    return largest_difference(model.parameters(), weights)


def _step(precision: Precision, difference: Difference, lab: Lab) -> float:
    """Compare the gradients of a step in small, recomputed parts with those of the whole batch."""
    if precision == "tf32" and not lab.on_gpu:
        raise SkippedError("only on a GPU")
    model = _model(lab.device)
    exact = _model(torch.device("cpu")).double().eval()
    image_BD = _random(STEP_ROWS, IMAGE_DIM).half()
    text_CBD = (image_BD[:, :TEXT_DIM] + 0.5 * _random(CAPTIONS, STEP_ROWS, TEXT_DIM, seed=1)).half()
    optimizer = make_optimizer(model, FitSettings(steps=1))
    stepper = Stepper(model, sigmoid_loss, optimizer, lab.device, True, 96, 0, precision)
    value = stepper.step(Batch(image_BD, text_CBD).to(lab.device), RATE)
    image_BE = F.normalize(exact.image_head(image_BD), dim=-1)
    text_CBE = F.normalize(exact.text_head(text_CBD), dim=-1)
    inputs = [each.detach().requires_grad_() for each in (image_BE, text_CBE, exact.log_scale, exact.bias)]
    total, *gradients = exact_loss("sigmoid", inputs)
    torch.autograd.backward([image_BE, text_CBE], gradients[:2])
    exact.log_scale.grad, exact.bias.grad = gradients[2:]
    return difference([value.total, *_gradients(model)], [total, *_gradients(exact)])


def _require_compiler() -> None:
    """Raise `SkippedError` if compiling has failed, which training tolerates."""
    for function in (losses._repel, losses._log_sum_exps, losses._softmax, fused._gated, fused._gated_backward):
        if function.failure:
            raise SkippedError(f"no compiler, training is slower: {function.failure}")


def _compiled_losses(lab: Lab) -> float:
    given = _embeddings(COMPILED_ROWS)
    worst = 0.0
    for loss_of in LOSSES.values():
        found = []
        for stance in ("default", "force_eager"):
            with torch.compiler.set_stance(stance):
                inputs = _leaves(given, lab.device, torch.float32)
                found.append(_with_gradients(loss_of(*inputs).total, inputs))
        _require_compiler()
        worst = max(worst, largest_difference(*found))
    return worst


def _compiled_heads(lab: Lab) -> float:
    torch.manual_seed(0)
    head = HEADS["glu"](COMPILED_DIM, DIM, 0.0, expansion=COMPILED_EXPANSION).to(lab.device).train()  # type: ignore[call-arg]
    features_BD = _random(COMPILED_MICRO_BATCH, COMPILED_DIM).half().to(lab.device)
    found = []
    for stance in ("default", "force_eager"):
        head.zero_grad()
        with torch.compiler.set_stance(stance):
            out_BE = head(features_BD)
            out_BE.square().sum().backward()
        found.append([out_BE, *_gradients(head)])
    _require_compiler()
    return largest_difference(*found)
