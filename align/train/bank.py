"""The bank of a run against hubs: training pairs that are kept with the weights, and its sharpness β."""

from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sail_align.align.data.loader import Batch
from sail_align.align.data.pairs import Rows, read_rows
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.correction import Bank, Side, extended, log_mean_exp
from sail_align.align.runs.checkpoint import Tensors
from sail_align.align.stats.metrics import Ranks, caption_ranks, recalls
from sail_align.align.train.plan import Plan
from sail_align.extract.encoders.runtime import tf32_products

BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 18.0, 22.0, 27.0, 40.0)
"""Values of β to choose from. For cosines, the best was 6 to 18 on photos and on the demo's scenes.

Of several criteria to choose one on 100 pairs, the mean logarithm of the ranks lost least against the best β for the
other pairs: 0.5 points of R@1 on average, where R@1 itself lost 0.8. The default of cosines, 15, lost 0.3.
"""

CHOICE_ROWS = 500
"""Held-out pairs that β is chosen on."""

HEAD_ROWS = 4_096
"""Rows that pass through a head at a time."""


class BankBuilder:
    """Adds a bank to the weights that a run keeps, and scores them with it.

    The rows of the bank are spread evenly over the training rows, with one caption each, all captions in turn. They are
    read once.

    Args:
        plan: Plan of the run.
        held_out: Held-out pairs with the captions to score with.
        device: Device of the heads.
    """

    def __init__(self, plan: Plan, held_out: Batch, device: torch.device):
        self._plan, self._held_out, self._device = plan, held_out, device

    def complete(self, weights: Tensors) -> tuple[Tensors, dict[str, Any], dict[str, float]]:
        """Return weights with a bank, the record of their architecture, and corrected scores on held-out pairs.

        Nothing is added if the plan has no bank. There are no scores without a correction or without held-out pairs.
        """
        architecture = replace(self._plan.architecture, item_bias=False)  # these serve the training only
        weights = {name: tensor for name, tensor in weights.items() if ".item_bias." not in name}
        with torch.device("meta"):
            model = architecture.build()
        model.load_state_dict(weights, assign=True)
        model = model.to(self._device).eval().requires_grad_(False)
        if self._plan.settings.bank:
            image_MD, text_MD = self._items
            model.correction = bank = Bank(len(image_MD), architecture.dim, model.correction).to(self._device)
            bank.fill(_raw(model, "image", image_MD), _raw(model, "text", text_MD))
            architecture = replace(architecture, bank_rows=len(image_MD))
        scores = self._score(model) if model.correction and len(self._held_out.images) else {}
        return model.state_dict(), asdict(architecture), scores

    @cached_property
    def _items(self) -> tuple[Tensor, Tensor]:
        """The features of the bank's images (M, D_I) and texts (M, D_T)."""
        plan = self._plan
        usable = [rows & each.usable(1) for each, rows in zip(plan.scored, plan.training, strict=True)]
        chosen = spread_evenly(usable, plan.settings.bank)
        images, texts = read_rows(plan.scored, chosen)
        rows = np.arange(len(images))
        return torch.from_numpy(images), torch.from_numpy(texts[rows % len(texts), rows])

    @tf32_products()
    @torch.no_grad()
    def _score(self, model: AlignmentModel) -> dict[str, float]:
        """Choose the β of a bank on held-out pairs, and return the corrected scores."""
        correction = model.require_correction()
        image_NE, text_CNE = _raw(model, "image", self._held_out.images), _raw(model, "text", self._held_out.texts)
        chosen = {}
        if isinstance(correction, Bank):
            chosen["hub_beta"] = choose_beta(correction, image_NE[:CHOICE_ROWS], text_CNE[:, :CHOICE_ROWS])
            correction.beta.fill_(chosen["hub_beta"])
        both = _ranks(correction.extend(image_NE, "image"), correction.extend(text_CNE, "text"))
        return {f"hub_{name}": value for name, value in recalls(*both).items()} | chosen


@torch.no_grad()
def choose_beta(bank: Bank, image_NE: Tensor, text_CNE: Tensor) -> float:
    """Return the β of `BETAS` with the lowest mean of log(1 + rank) of the right items, ranks from 0, both ways.

    Args:
        bank: The bank, whose own β has no effect.
        image_NE: Outputs of the image head for held-out images.
        text_CNE: Outputs of the text head for their texts.
    """
    (image_NE, _), (text_CNE, _) = bank.base(image_NE, "image"), bank.base(text_CNE, "text")
    image_NM, text_XM = bank.compare(image_NE, "image"), bank.compare(text_CNE.flatten(0, 1), "text")
    costs = []
    for beta in BETAS:
        image_N, text_CN = -log_mean_exp(image_NM, beta), -log_mean_exp(text_XM, beta).reshape(text_CNE.shape[:2])
        ranked = _ranks(extended(image_NE, image_N, "image"), extended(text_CNE, text_CN, "text"))
        costs.append(sum(float(np.log1p(each).mean()) for each in ranked))
    return BETAS[int(np.argmin(costs))]


def spread_evenly(rows: list[Rows], count: int) -> list[Rows]:
    """Return `count` of the rows of each store, spread evenly over all of them; all if they are fewer."""
    places = np.flatnonzero(np.concatenate(rows))
    if len(places) > count:
        places = places[np.arange(count) * len(places) // count]
    chosen = np.zeros(sum(map(len, rows)), dtype=np.bool_)
    chosen[places] = True
    ends = np.cumsum([len(each) for each in rows]).tolist()
    return [chosen[end - len(each) : end] for each, end in zip(rows, ends, strict=True)]


@torch.no_grad()
@tf32_products()
def _raw(model: AlignmentModel, side: Side, features: Tensor) -> Tensor:
    """Return the outputs (…, E') of one head for features (…, D)."""
    head = model.image_head if side == "image" else model.text_head
    parts = torch.split(features.reshape(-1, features.shape[-1]), HEAD_ROWS)
    device = model.log_scale.device
    return torch.cat([head(part.to(device).float()) for part in parts]).reshape(*features.shape[:-1], -1)


def _ranks(image_NE: Tensor, text_CNE: Tensor) -> tuple[Ranks, Ranks]:
    """Return the ranks of images and of texts by dot products, as `caption_ranks`."""
    return caption_ranks(image_NE.cpu().numpy(), text_CNE.cpu().numpy(), image_NE.device)
