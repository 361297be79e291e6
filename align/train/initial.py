"""What a fresh model starts from: the closed form's maps, and a temperature and bias whose masses are in balance."""

import math

import torch

from sail_align.align.data.loader import Stream
from sail_align.align.model.alignment import MAX_LOG_SCALE, AlignmentModel
from sail_align.align.model.closed_form import Moments
from sail_align.align.settings import FitSettings
from sail_align.align.train.plan import Plan
from sail_align.align.train.step import batch_loss, embed
from sail_align.extract.system.progress import note, progress

SAMPLE_ROWS = 1_024
"""Pairs that a bias is measured on: a million negatives, and positives enough for 3 %."""

HALVINGS = 20


def build_model(
    plan: Plan, stream: Stream, device: torch.device, *, fresh: bool, quiet: bool = False
) -> AlignmentModel:
    """Return a plan's model as its training starts, or if it is not to be `fresh`, one to load weights into."""
    settings = plan.settings
    torch.manual_seed(settings.seed)
    scale = _temperature(settings)
    bias = -scale / 2 if settings.bias == "auto" else settings.bias
    model = plan.architecture.build(scale=scale, bias=bias).to(device)
    if fresh and settings.closed_form:
        _start_from_closed_form(model, plan, stream, device, quiet)
    if fresh and settings.bias == "auto":
        model.bias.data.fill_(balanced_bias(model, plan, device))
        note(f"t starts at {scale:.4g} and b at {model.bias.item():.4g}.")
    return model


def _temperature(settings: FitSettings) -> float:
    """Return what t starts from; auto is 2 ln |B|: a positive of cosine 1/2 then has even odds against |B| negatives.

    A negative of cosine 0 has the probability 1/|B| where b = −ln |B|, so that |B| of them weigh as one positive. The
    logit t/2 − ln |B| of a pair is then 0 at t = 2 ln |B|. For the paper's |B| = 36,864 that is t = 21 and b = −10.5;
    its own 20 and −10 stand in the same ratio.
    """
    if settings.temperature != "auto":
        return settings.temperature
    return min(max(2 * math.log(settings.batch_size), 1.0), math.exp(MAX_LOG_SCALE))


@torch.no_grad()
def balanced_bias(model: AlignmentModel, plan: Plan, device: torch.device) -> float:
    """Return the b at which positives and negatives of a first batch have equal gradient mass, for the model as it is.

    Embeddings of a fresh head are far from independent: their cosines have a mean and a spread that no formula of B and
    E alone gives. So they are measured on a batch of at most 1,024 pairs, with dropout as in training; its negatives
    stand for the |B| − 1 of each pair. The ratio of the masses rises with b: bisection finds where it is 1.
    """
    settings = plan.settings
    rows = min(settings.batch_size, SAMPLE_ROWS)
    seed, policy = settings.seed, plan.policy
    with Stream(plan.pairs, plan.training, batch_size=rows, seed=seed, policy=policy) as sample:  # equal on all ranks
        batch, _ = next(sample.batches())
        image_BE, text_CBE = embed(model.train(), batch, device)
    low, high = -100.0, 100.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        model.bias.data.fill_(middle)
        loss = batch_loss(model, plan.loss, image_BE, text_CBE)
        negative = loss.negative_mass * (settings.batch_size - 1) / (rows - 1)
        low, high = (low, middle) if negative > loss.positive_mass else (middle, high)
    return (low + high) / 2


def _start_from_closed_form(
    model: AlignmentModel, plan: Plan, stream: Stream, device: torch.device, quiet: bool
) -> None:
    moments = Moments(plan.architecture.image_dim, plan.architecture.text_dim, device)
    with progress(stream.rows, "closed form", unit="pair", quiet=quiet) as bar:
        for block in stream.scan():
            images = model.image_head.apply_power(block.images.to(device).float())
            moments.add(images, block.texts.to(device))
            bar.update(len(block.images))
    image_map, text_map, _ = moments.cca(plan.settings.dim, plan.settings.ridge)
    image_map.copy_to(model.image_head)
    text_map.copy_to(model.text_head)
