"""Recipes of other methods for aligning frozen encoders, written from their papers, for `peers.py`.

A recipe turns training data into a model that embeds features, given one tuned value (a learning rate, a ridge, a
number of components). All gradient recipes share one loop; they differ in heads, loss, augmentation and penalty.

Suffixes: N images, C captions of each image, B images of a batch, D features, E embedding dimensions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lion_pytorch import Lion
from torch import Tensor, nn

from sail_align.align.model.alignment import AlignmentModel, Architecture
from sail_align.align.model.closed_form import LinearMap, Moments, normed
from sail_align.align.model.loss import Loss, infonce_loss, sigmoid_loss

DIM = 256
RIDGE = 2.0


class Data(NamedTuple):
    """Image features (N, D_I) and text features (C, N, D_T), float32."""

    image: Tensor
    text: Tensor

    def rows(self, rows: Tensor) -> "Data":
        """Return some rows, given their mask or their numbers."""
        return Data(self.image[rows], self.text[:, rows])

    def powered(self, power: float) -> "Data":
        """Return the data with signed powers of the image features."""
        return Data(self.image.sign() * self.image.abs() ** power, self.text)


Embed = Callable[[Tensor], Tensor]


class Embedder(NamedTuple):
    """Functions from features (…, D) to embeddings (…, E). A score is the dot product of two embeddings."""

    encode_image: Embed
    encode_text: Embed


Watch = Callable[[int, AlignmentModel | Embedder], bool]
"""Is called with the number of finished steps and the model. Training ends when it returns True."""

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Penalty = Callable[[Data, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """A method.

    Attributes:
        name: Name in the tables.
        fit: Function of data, tuned value, seed and `Watch` that returns a model.
        grid: Values to tune among.
        power: Exponent of the image features.
        seeded: Whether the seed has an effect.
    """

    name: str
    fit: Callable[[Data, float, int, Watch], AlignmentModel | Embedder]
    grid: Sequence[float]
    power: float = 1.0
    seeded: bool = True

    def with_power(self, power: float = 0.5) -> "Recipe":
        """Return the recipe on signed powers of the image features (Perronnin et al., 2010)."""
        return replace(self, name=f"{self.name}, power {power:g}", power=power)


# --- closed forms ---


def cca(data: Data, ridge: float, dim: int = DIM) -> tuple[LinearMap, LinearMap, Tensor]:
    """Return the maps and correlations of the regularised CCA."""
    moments = Moments(data.image.shape[1], data.text.shape[2])
    moments.add(normed(data.image), normed(data.text))
    return moments.cca(min(dim, data.image.shape[1], data.text.shape[2]), ridge)


def fit_cca(data: Data, ridge: float, _seed: int, _watch: Watch) -> Embedder:
    """Fit a CCA whose variates are weighted by their correlations on both sides: the cosine of `--head cca`."""
    image_map, text_map, _ = cca(data, ridge)
    return Embedder(*(partial(_unit_map, each) for each in (image_map, text_map)))


def _unit_map(linear: LinearMap, features: Tensor) -> Tensor:
    return F.normalize(linear(normed(features)), dim=-1).float()


def fit_csa(data: Data, size: float, _seed: int, _watch: Watch) -> Embedder:
    """Fit canonical similarity analysis (Li et al., ICLR 2025): Σ_k ρ_k x_k y_k / (|x| |y|) over the best variates.

    The paper's CCA is not regularised, which fails with about as many pairs as features. Here it gets our ridge.
    """
    image_map, text_map, correlations_E = cca(data, RIDGE, int(size))

    def embed(linear: LinearMap, features: Tensor) -> Tensor:
        variates = linear(normed(features)) / correlations_E  # the maps are weighted by the correlations
        return (F.normalize(variates, dim=-1) * correlations_E.sqrt()).float()

    return Embedder(partial(embed, image_map), partial(embed, text_map))


def fit_asif(data: Data, exponent: float, _seed: int, _watch: Watch, keep: float = 0.1) -> Embedder:
    """Use no training (ASIF, Norelli et al., NeurIPS 2023): an item is its cosines with the training items of its kind.

    Only the largest `keep` of the cosines remain, raised to a power and scaled to unit norm. The text of a training
    image is the mean of its captions.
    """

    def relative(anchors: Tensor, features: Tensor) -> Tensor:
        cosines = F.normalize(features, dim=-1) @ anchors.T
        least = cosines.topk(max(1, round(keep * len(anchors)))).values[..., -1:]
        return F.normalize(cosines.clamp(min=0) ** exponent * (cosines >= least), dim=-1)

    anchors = (F.normalize(each, dim=-1) for each in (data.image, F.normalize(data.text, dim=-1).mean(0)))
    return Embedder(*(partial(relative, each) for each in anchors))


# --- the shared loop of the gradient recipes ---


@dataclass(frozen=True)
class Loop:
    """Settings of a gradient recipe.

    Attributes:
        build: Function that returns the initial model.
        loss: Loss of the embeddings.
        augment: Function that changes the features of a batch.
        penalty: Function of a batch and its embeddings that is added to the loss.
        optimizer: Class of the optimiser.
        weight_decay: Weight decay of matrices.
        batch: Images in a batch.
        epochs: Passes over the images.
        captions: Captions of each image in a batch, drawn at random. 0 stands for all.
    """

    build: Callable[[Data], AlignmentModel]
    loss: Loss = infonce_loss
    augment: Augment | None = None
    penalty: Penalty | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    weight_decay: float = 1e-2
    batch: int = 256
    epochs: int = 15
    captions: int = 0

    def fit(self, data: Data, lr: float, seed: int, watch: Watch) -> AlignmentModel:
        """Train with a cosine schedule."""
        torch.manual_seed(seed)
        model = self.build(data)
        matrices = [each for each in model.parameters() if each.requires_grad and each.ndim >= 2]
        others = [each for each in model.parameters() if each.requires_grad and each.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = self.optimizer(groups, lr=lr)
        batch, steps = min(self.batch, len(data.image)), self.steps(data)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        left = torch.empty(0, dtype=torch.int64)
        for step in range(1, steps + 1):
            if len(left) < batch:
                left = torch.cat((left, torch.randperm(len(data.image))))
            rows, left = left[:batch], left[batch:]
            model.train()
            image_BD, text_CBD = data.image[rows], self._texts(data.text, rows)
            if self.augment:
                image_BD, text_CBD = self.augment(image_BD, text_CBD)
            image_BE, text_CBE = model.encode_image(image_BD), model.encode_text(text_CBD)
            loss = self.loss(image_BE, text_CBE, model.log_scale, model.bias).total
            if self.penalty:
                loss = loss + self.penalty(Data(image_BD, text_CBD), image_BE, text_CBE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.clamp_scale()
            if watch(step, model.eval()):
                break
        return model.eval()

    def steps(self, data: Data) -> int:
        """Return the number of steps."""
        return self.epochs * len(data.image) // min(self.batch, len(data.image))

    def _texts(self, text_CND: Tensor, rows: Tensor) -> Tensor:
        if not self.captions:
            return text_CND[:, rows]
        drawn_cB = torch.rand(len(text_CND), len(rows)).argsort(0)[: self.captions]
        return text_CND[drawn_cB, rows]


# --- heads ---


def from_closed_form(data: Data, *, scale: float = 15.0, bias: float = -8.0, **form: Any) -> AlignmentModel:
    """Return our heads, which start as the CCA, with our default dropout. `form` are fields of `Architecture`."""
    head = "glu" if "expansion" in form else "linear"
    form = {"image_dropout": 0.3, "text_dropout": 0.1, **form}
    dim = min(DIM, data.image.shape[1], data.text.shape[2])
    shape = Architecture(head, data.image.shape[1], data.text.shape[2], dim, linear_path=head == "glu", **form)
    model = shape.build(scale=scale, bias=bias)
    image_map, text_map, _ = cca(data, RIDGE, dim)
    image_map.copy_to(model.image_head)
    text_map.copy_to(model.text_head)
    return model


def glu(data: Data, expansion: int, dim: int = DIM) -> AlignmentModel:
    """Return the heads of SAIL (Zhang et al., CVPR 2025) with its initial temperature and bias."""
    return Architecture("glu", data.image.shape[1], data.text.shape[2], dim, expansion).build()


def linear(data: Data, dim: int = DIM, scale: float = 14.3) -> AlignmentModel:
    """Return randomly initialised linear heads, as CLIP (Radford et al., 2021) has them, with its temperature 0.07."""
    return Architecture("linear", data.image.shape[1], data.text.shape[2], dim).build(scale=scale)


class Residual(nn.Module):
    """x + MLP(LayerNorm(x)) with a hidden layer of `expansion` × the width: an inverted bottleneck."""

    def __init__(self, width: int, expansion: int, dropout: float):
        super().__init__()
        hidden = expansion * width
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the block."""
        return features + self.layers(features)


class Components(nn.Module):
    """The leading principal components of features (N, D), each scaled to unit variance."""

    def __init__(self, features_ND: Tensor, size: int):
        super().__init__()
        mean_D = features_ND.mean(0)
        _, deviations, axes = torch.linalg.svd(features_ND - mean_D, full_matrices=False)
        self.register_buffer("mean", mean_D)
        scale = math.sqrt(len(features_ND)) / deviations[:size].clamp(min=1e-6)
        self.register_buffer("axes", axes[:size].T * scale)

    def forward(self, features: Tensor) -> Tensor:
        """Return the components (…, size)."""
        return (features - self.mean) @ self.axes


def fusemix_heads(
    data: Data, *, components: int = 0, depth: int = 1, expansion: int = 4, dropout: float = 0.6, dim: int = DIM
) -> AlignmentModel:
    """Return FuseMix's adapters: residual MLP blocks at the width of the features, LayerNorm, and a projection."""

    def adapter(features_ND: Tensor) -> nn.Module:
        width = features_ND.shape[1]
        first = Components(features_ND, min(components, width)) if components else nn.LayerNorm(width)
        width = min(components, width) if components else width
        blocks = [Residual(width, expansion, dropout) for _ in range(depth)]
        return nn.Sequential(first, *blocks, nn.LayerNorm(width), nn.Linear(width, dim))

    return AlignmentModel(adapter(data.image), adapter(data.text.flatten(0, 1)), scale=14.3)


def sharelock_heads(data: Data, *, hidden: int = 512, dropout: float = 0.2, dim: int = 0) -> AlignmentModel:
    """Return ShareLock's heads: the image features themselves, centred, and an MLP with four layers on the text.

    The text is mapped to as many dimensions as the image features have, or to `dim`.
    """
    widths = (data.text.shape[2], hidden, hidden, hidden)
    hidden_layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout))
    ]
    text_head = nn.Sequential(nn.LayerNorm(widths[0]), *hidden_layers, nn.Linear(hidden, dim or data.image.shape[1]))
    return AlignmentModel(Centred(data.image.mean(0)), text_head, scale=14.3)


class Centred(nn.Module):
    """Subtracts a mean."""

    def __init__(self, mean_D: Tensor):
        super().__init__()
        self.register_buffer("mean", mean_D)

    def forward(self, features: Tensor) -> Tensor:
        """Return centred features."""
        return features - self.mean


# --- augmentations and penalties ---


def mixup(image_BD: Tensor, text_CBD: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mix the features of random pairs, both sides with one coefficient (FuseMix, Vouitsis et al., CVPR 2024)."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other_B = torch.randperm(len(image_BD))
    return share * image_BD + (1 - share) * image_BD[other_B], share * text_CBD + (1 - share) * text_CBD[:, other_B]


def noise(image_BD: Tensor, text_CBD: Tensor, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """Add Gaussian noise, relative to the standard deviation of each feature."""
    noisy_image = image_BD + size * image_BD.std(0) * torch.randn_like(image_BD)
    return noisy_image, text_CBD + size * text_CBD.std((0, 1)) * torch.randn_like(text_CBD)


def structure(batch: Data, image_BE: Tensor, text_CBE: Tensor, weight: float = 10.0, tau: float = 0.05) -> Tensor:
    """Return the penalty of STRUCTURE (Gröger et al., NeurIPS 2025) with one level.

    It is the Jensen–Shannon divergence between the neighbourhoods of a batch before and after a head: softmaxes of the
    similarities of unit-norm, then centred vectors. The text side uses the first caption of each image.
    """
    sides = ((batch.image, image_BE), (batch.text[0], text_CBE[0]))
    return weight / 2 * sum(_divergence(*(_neighbours(each, tau) for each in side)) for side in sides)


def _neighbours(features_BD: Tensor, tau: float) -> Tensor:
    unit_BD = F.normalize(features_BD, dim=-1)
    unit_BD = unit_BD - unit_BD.mean(0)
    return (unit_BD @ unit_BD.T / tau).log_softmax(-1)


def _divergence(log_p_BB: Tensor, log_q_BB: Tensor) -> Tensor:
    log_m_BB = torch.logaddexp(log_p_BB, log_q_BB) - math.log(2)
    parts = (F.kl_div(log_m_BB, each, reduction="batchmean", log_target=True) for each in (log_p_BB, log_q_BB))
    return sum(parts) / 2


RATES = (5e-4, 2e-3)
LION = {"optimizer": partial(Lion, betas=(0.9, 0.99)), "weight_decay": 1e-7}


def trained(name: str, grid: Sequence[float] = RATES, **loop: Any) -> Recipe:
    """Return a gradient recipe, given fields of `Loop`."""
    return Recipe(name, Loop(**loop).fit, grid)


def _sail(expansion: int, grid: Sequence[float]) -> Recipe:
    heads = partial(glu, expansion=expansion)
    return trained(f"SAIL: GLU ×{expansion}, sigmoid", grid, build=heads, loss=sigmoid_loss, epochs=10, **LION)


def _fusemix(name: str, grid: Sequence[float], epochs: int, **heads: int) -> Recipe:
    adapters = partial(fusemix_heads, **heads)
    return trained(name, grid, build=adapters, augment=mixup, captions=1, epochs=epochs, weight_decay=0.1)


CLOSED_FORMS = (
    Recipe("CCA", fit_cca, (1.0, 2.0, 4.0, 8.0), seeded=False),
    Recipe("CSA", fit_csa, (50, 100, 200, 384), seeded=False),
    Recipe("ASIF", fit_asif, (2, 8), seeded=False),
)
MIXUP = trained("closed-form start, InfoNCE, mixup", (1e-4, 3e-4), build=from_closed_form, augment=mixup)
LINEAR = trained("linear, InfoNCE", (1e-3, 3e-3), build=linear)
PEERS = (
    *CLOSED_FORMS,
    LINEAR,
    MIXUP,
    trained("linear, InfoNCE, STRUCTURE", (1e-3, 3e-3), build=linear, penalty=structure),
    trained("ShareLock", build=sharelock_heads, captions=1, epochs=20, weight_decay=1e-4),
    _fusemix("FuseMix, 384 components", RATES, 20, components=384),
    _fusemix("FuseMix, all features", (3e-4,), 8),
    _sail(4, (1e-4, 3e-4)),
    _sail(8, (1e-4,)),
)
POWERED = tuple(each.with_power() for each in (*CLOSED_FORMS, MIXUP, LINEAR))
"""Recipes that also get signed powers of the image features."""
