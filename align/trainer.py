"""The training loop: it can be stopped at any moment and goes on to the same weights."""

import math
import time
from pathlib import Path

import numpy as np
import torch

from sail_align.align.checkpoint import read_record, restore, save_checkpoint
from sail_align.align.closed_form import Moments, regularised_cca, start_from
from sail_align.align.data import read_rows
from sail_align.align.heads import signed_power
from sail_align.align.loss import Loss
from sail_align.align.metrics import ranks, recall_at
from sail_align.align.model import AlignmentModel
from sail_align.align.plan import Plan
from sail_align.align.runs import MetricsLog
from sail_align.align.settings import FitSettings
from sail_align.align.step import Stepper, batch_loss, embed, make_optimizer, train_step
from sail_align.align.stream import Batch, Stream
from sail_align.extract.errors import UserError
from sail_align.extract.progress import progress

SCORES = 20
"""How often a run is scored."""

SAVE_SECONDS = 60.0
"""A run is saved after the step at which so much time has passed: saving large heads takes longer than small steps."""


def fit(
    plan: Plan, run: Path, *, device: torch.device, quiet: bool = False, save_seconds: float = SAVE_SECONDS
) -> dict[str, float]:
    """Train a plan's model, or compute it, into a run's folder; return the last held-out scores.

    What the run has saved is gone on from. Every step draws from a seed of its own and every batch is known by its
    number, so that on a CPU the weights and the log are bitwise those of a run that was never stopped.

    Raises:
        UserError: The loss is no longer finite, or the run's checkpoint is damaged.
    """
    settings = plan.settings
    torch.manual_seed(settings.seed)
    model = plan.architecture.build(scale=settings.scale, bias=settings.bias).to(device)
    optimizer = make_optimizer(model, settings)
    stepper = Stepper(model, plan.loss, optimizer, device)
    stream = Stream(
        plan.pairs,
        plan.training,
        batch_size=settings.batch_size,
        seed=settings.seed,
        pin=device.type == "cuda",
    )
    held_out = Batch(*map(torch.from_numpy, read_rows(plan.pairs, plan.held_out)))
    about = plan.checkpoint_record()
    scores: dict[str, float] = {}

    saved = read_record(run)
    done: int | None = None
    if saved is not None:
        done = saved["step"]
        restore(run, model, optimizer)
    elif settings.closed_form:
        _start_from_closed_form(model, plan, stream, device, quiet)

    first = done or 0
    last_saved = time.monotonic()
    interval = math.ceil(settings.steps / SCORES)
    bar = progress(settings.steps, "fit", unit="steps", done=first, quiet=quiet or settings.steps == 0)
    with MetricsLog(run, done) as log, bar, stream:

        def score_held_out(step: int) -> None:
            if len(held_out.images):
                scores.update(score(model, plan.loss, held_out, device))
                log.write("heldout", step, **scores)

        if done is None:
            score_held_out(0)
        batches = stream.batches(stream.state_after(first))
        for step, (batch, _) in zip(range(first, settings.steps), batches, strict=False):
            torch.manual_seed(settings.seed + (step + 1 << 32))
            rate = learning_rate(settings, step)
            loss = train_step(stepper, batch, rate).total.item()
            if not math.isfinite(loss):
                raise UserError(f"The loss is {loss} after {step + 1} steps; lower --lr (now {settings.lr:g}).")
            t, b = model.log_scale.exp().item(), model.bias.item()
            log.write("train", step + 1, loss=loss, lr=rate, t=t, b=b)
            bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            bar.update()
            if (step + 1) % interval == 0 or step + 1 == settings.steps:
                score_held_out(step + 1)
            if time.monotonic() - last_saved >= save_seconds and step + 1 < settings.steps:
                save_checkpoint(run, model, about, step=step + 1, optimizer=optimizer)
                last_saved = time.monotonic()
    save_checkpoint(run, model, about, step=settings.steps, optimizer=None)
    return scores


@torch.no_grad()
def score(model: AlignmentModel, loss_of: Loss, batch: Batch, device: torch.device) -> dict[str, float]:
    """Score a model on pairs that it was not trained on: loss, and R@1/5/10 both ways in percent.

    The loss is over all of them as one batch. It is not comparable to that of a training batch of another size: the
    share of positives differs.
    """
    model.eval()
    image_BE, text_CBE = embed(model, batch, device)
    scores = {"loss": batch_loss(model, loss_of, image_BE, text_CBE).total.item()}
    captions, rows, _ = text_CBE.shape
    owner_M = np.tile(np.arange(rows), captions)
    image_ranks, text_ranks = ranks(image_BE.cpu().numpy(), text_CBE.flatten(0, 1).cpu().numpy(), owner_M)
    for way, ranks_Q in (("t2i", text_ranks), ("i2t", image_ranks)):
        scores |= {f"{way}_r{k}": recall for k, recall in recall_at(ranks_Q).items()}
    return scores


def learning_rate(settings: FitSettings, step: int) -> float:
    """Return the rate of step 0, 1, …: a linear warm-up, then half a cosine down to 0."""
    warm = round(settings.warmup * settings.steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * (1 + math.cos(math.pi * (step - warm) / (settings.steps - warm))) / 2


def _start_from_closed_form(
    model: AlignmentModel, plan: Plan, stream: Stream, device: torch.device, quiet: bool
) -> None:
    moments = Moments(plan.architecture.image_dim, plan.architecture.text_dim, device)
    with progress(stream.rows, "closed form", unit="pairs", quiet=quiet) as bar:
        for block in stream.blocks():
            images = signed_power(block.images.to(device).float(), plan.settings.image_power)
            moments.add(images, block.texts.to(device))
            bar.update(len(block.images))
    found = regularised_cca(moments, plan.settings.dim, plan.settings.ridge)
    start_from(model.image_head, found.image)
    start_from(model.text_head, found.text)
