"""Initial models: closed-form maps, and a temperature and bias that balance positives and negatives."""

import math

import torch

from sail_align.align.data.loader import Source, Stream
from sail_align.align.model.alignment import MAX_LOG_SCALE, AlignmentModel
from sail_align.align.model.closed_form import Moments
from sail_align.align.model.correction import Gaussian
from sail_align.align.settings import FitSettings
from sail_align.align.train.plan import Plan
from sail_align.align.train.ridge import FoldedMoments
from sail_align.extract.system.progress import note, progress

SAMPLE_ROWS = 1_024
"""Pairs on which the bias is measured: a million negatives, and enough positives for an accuracy of 3 %."""

BASIS_ROWS = 1_024
"""Pairs whose inputs of the closed form are in memory at a time, in float64."""

BISECTIONS = 20


def build_model(plan: Plan, device: torch.device) -> AlignmentModel:
    """Return the model of a plan with random weights. `start_model` computes those that depend on the pairs."""
    settings = plan.settings
    torch.manual_seed(settings.seed)
    scale = _temperature(settings)
    bias = -scale / 2 if settings.bias == "auto" else settings.bias
    return plan.architecture.build(scale=scale, bias=bias).to(device)


def start_model(model: AlignmentModel, plan: Plan, source: Source, device: torch.device, *, quiet: bool) -> None:
    """Compute the closed form and the bias of a new model. Call it right after `build_model`, whose seed it uses.

    Args:
        model: The model.
        plan: Plan of the run.
        source: All pairs, in their stores or in memory.
        device: Device of the model.
        quiet: Show no progress bar.
    """
    if plan.settings.closed_form:
        _start_from_closed_form(model, plan, source, device, quiet)
    if plan.settings.bias == "auto":
        model.bias.data.fill_(balanced_bias(model, plan, device))
        t = model.log_scale.exp().item()
        note(f"Initial t is {t:.4g}, initial b is {model.bias.item():.4g}.")


def _temperature(settings: FitSettings) -> float:
    """Return the initial t; `auto` is 2 ln |B|, for which a positive of cosine 1/2 has even odds against |B| negatives.

    With b = −ln |B|, a negative of cosine 0 has the probability 1/|B|, so that |B| of them weigh as much as one
    positive. The logit t/2 − ln |B| of a positive is then 0 at t = 2 ln |B|. For the paper's |B| = 36,864 this gives
    t = 21 and b = −10.5, which have the same ratio as the paper's 20 and −10.
    """
    if settings.temperature != "auto":
        return settings.temperature
    return min(max(2 * math.log(settings.batch_size), 1.0), math.exp(MAX_LOG_SCALE))


@torch.no_grad()
def balanced_bias(model: AlignmentModel, plan: Plan, device: torch.device) -> float:
    """Return the b at which positives and negatives of the first batch have equal gradient mass.

    The embeddings of a fresh head are correlated: no formula of B and E alone gives the mean and spread of their
    cosines. So they are measured on a batch of at most 1,024 pairs, with dropout as in training, whose negatives stand
    for the |B| − 1 of each pair. The ratio of the masses increases with b, so bisection finds where it is 1.
    """
    settings = plan.settings
    rows = min(settings.batch_size, SAMPLE_ROWS)
    seed, policy = settings.seed, plan.policy
    with Stream(plan.pairs, plan.training, batch_size=rows, seed=seed, policy=policy) as sample:
        batch, _ = next(sample.batches())
        image_BE, text_CBE = model.train()(*batch.to(device))
    loss_of, low, high = plan.loss(), -100.0, 100.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        model.bias.data.fill_(middle)
        loss = loss_of(image_BE, text_CBE, model.log_scale, model.bias)
        negative = loss.negative_mass * (settings.batch_size - 1) / (rows - 1)
        low, high = (low, middle) if negative > loss.positive_mass else (middle, high)
    return (low + high) / 2


@torch.no_grad()
def _start_from_closed_form(
    model: AlignmentModel, plan: Plan, source: Source, device: torch.device, quiet: bool
) -> None:
    settings = plan.settings
    gaussian = next((each for each in model.modules() if isinstance(each, Gaussian)), None)
    dims = model.image_head.basis_dim, model.text_head.basis_dim
    ridge = settings.ridge
    moments: Moments | FoldedMoments = (
        FoldedMoments(*dims, source.rows, device) if ridge == "auto" else Moments(*dims, device)
    )
    with progress(source.rows, "closed form", unit="pair", quiet=quiet) as bar:
        for block in source.scan():
            for start in range(0, len(block.images), BASIS_ROWS):
                part = slice(start, start + BASIS_ROWS)
                images, texts = block.images[part].to(device), block.texts[:, part].to(device)
                moments.add(model.image_head.basis(images), model.text_head.basis(texts))
            bar.update(len(block.images))
    if isinstance(moments, FoldedMoments):
        ridge = moments.choose_ridge(settings.dim, likelihood=gaussian is not None)
        note(f"Ridge of the closed form, cross-validated: {ridge:g}.")
        moments = moments.total()
    image_map, text_map, correlations_E = moments.cca(settings.dim, float(ridge), unit_norm=gaussian is None)
    if gaussian:
        gaussian.fill(correlations_E)
    image_map.copy_to(model.image_head)
    text_map.copy_to(model.text_head)
