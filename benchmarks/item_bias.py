r"""Compare biases per item that the sigmoid loss learns with those of a bank, on held-out training pairs.

The logit of a pair is t (x·y + u(x) + v(y)) + b. The kinds of u and v are in `KINDS`. Run r has split r, which holds
out a fifth of the images, and seed r. All kinds of a run see the same batches. The recipe is preset `small` with
linear heads and one random caption per image and step. Gains are paired; their intervals resample images.

Finished runs are reused; rerun the command to resume. Writes item_bias.md.

    python benchmarks/item_bias.py features/flickr8k-train.zarr --out runs/item-bias
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion
from numpy.typing import NDArray
from peer_recipes import Data
from peers import count_hits, hubness, read_data, split
from torch import Tensor, nn

from sail_align.align.model.alignment import AlignmentModel, Architecture
from sail_align.align.model.closed_form import Moments, normed
from sail_align.align.settings import PRESETS
from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.align.stats.tables import format_table

KINDS = {
    "start": "none; the closed form without training",
    "none": "none",
    "linear": "linear in the features, initially 0",
    "fast": "the same, at ten times the learning rate",
    "quadratic": "quadratic in the embedding, initially the bank's expansion to second order",
    "gaussian": "of raw outputs o: Σ g_k o_k², initially the log-likelihood ratio of probabilistic CCA",
    "batch": "hubness in the batch, without gradients",
}
BETA = 10.0
"""Sharpness of all banks on cosines."""
GAUSSIAN_BETA = 0.25
"""Sharpness of a bank on log-likelihood ratios, whose spread is that much larger."""
DIM, BATCH, EPOCHS, RATE = 256, 512, 25, 1e-5


@dataclass
class Fit:
    """Heads and the terms of images and texts."""

    model: AlignmentModel
    terms: "Terms"
    kind: str

    def embed(self, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return vectors (M, E) and (C, M, E), and the terms (M,) and (C, M) without those of the batch."""
        raw_ME, raw_CME = self.model.image_head(data.image), self.model.text_head(data.text)
        u_M, v_CM = self.terms(0, data.image, raw_ME), self.terms(1, data.text, raw_CME)
        if self.kind == "gaussian":
            return raw_ME, raw_CME, u_M, v_CM
        return F.normalize(raw_ME, dim=-1), F.normalize(raw_CME, dim=-1), u_M, v_CM


class Terms(nn.Module):
    """Parameters of both sides' terms."""

    def __init__(self, kind: str, dims: tuple[int, int]):
        super().__init__()
        self.kind = kind
        shapes = {"linear": dims, "fast": dims, "quadratic": (DIM, DIM), "gaussian": (DIM, DIM)}.get(kind, ())
        self.weights = nn.ParameterList(torch.zeros(size) for size in shapes)
        self.matrices = nn.ParameterList(torch.zeros(DIM, DIM) for _ in shapes if kind == "quadratic")

    def forward(self, side: int, features: Tensor, raw: Tensor) -> Tensor:
        """Return the terms (…,) of features (…, D) with outputs (…, E)."""
        if not self.weights:
            return torch.zeros(raw.shape[:-1])
        if self.kind == "gaussian":
            return raw.square() @ self.weights[side]
        if self.kind == "quadratic":
            unit = F.normalize(raw, dim=-1)
            matrix = (self.matrices[side] + self.matrices[side].T) / 2
            return unit @ self.weights[side] + ((unit @ matrix) * unit).sum(-1)
        return F.layer_norm(features, features.shape[-1:]) @ self.weights[side]


def start(data: Data, kind: str) -> Fit:
    """Return linear heads with closed-form weights, and the initial terms."""
    preset, dims = PRESETS["small"], (data.image.shape[1], data.text.shape[2])
    dropout = {name: preset[name] for name in ("image_dropout", "text_dropout")}
    model = Architecture("linear", *dims, DIM, **dropout).build(scale=preset["temperature"], bias=preset["bias"])
    moments = Moments(*dims)
    moments.add(normed(data.image), normed(data.text))
    *maps, correlations = moments.cca(DIM)
    for head, linear in zip((model.image_head, model.text_head), maps, strict=True):
        linear.copy_to(head)
    fit = Fit(model.eval(), Terms(kind, dims), kind)
    with torch.no_grad():
        if kind == "gaussian":
            _start_gaussian(fit, correlations)
        if kind == "quadratic":
            image_ME, text_CME, *_ = fit.embed(data)
            for side, bank_NE in enumerate((text_CME.flatten(0, 1), image_ME)):
                fit.terms.weights[side].copy_(-bank_NE.mean(0))
                fit.terms.matrices[side].copy_(-BETA / 2 * bank_NE.T.cov(correction=0))
    return fit


def _start_gaussian(fit: Fit, correlations_E: Tensor) -> None:
    """Scale the outputs, c ρ_k u_k with c² Σ ρ² = 1, to u_k √(ρ_k / (1 − ρ_k²)); b has the constant."""
    rho_E = correlations_E.clamp(1e-3, 1 - 1e-3)
    scale_E = (rho_E / (1 - rho_E.square())).sqrt() / (rho_E / rho_E.square().sum().sqrt())
    for head, weight_E in zip((fit.model.image_head, fit.model.text_head), fit.terms.weights, strict=True):
        head.out.weight.mul_(scale_E[:, None])
        head.out.bias.mul_(scale_E)
        weight_E.copy_(-rho_E / 2)
    fit.model.log_scale.zero_()
    fit.model.bias.fill_(-math.log(BATCH - 1) - float(torch.log1p(-rho_E.square()).sum()) / 2)


def train(data: Data, kind: str, seed: int) -> Fit:
    """Return trained heads and terms."""
    torch.manual_seed(seed)
    fit = start(data, kind)
    model, terms = fit.model.train(), list(fit.terms.parameters())
    groups = [{"params": list(model.parameters()), "speed": 1}, {"params": terms, "speed": 10 if kind == "fast" else 1}]
    optimizer = Lion([each for each in groups if each["params"]], lr=RATE, betas=(0.9, 0.99))
    generator, rows = np.random.default_rng(seed), len(data.image)
    steps = 0 if kind == "start" else round(EPOCHS * rows / BATCH)
    order = np.concatenate([generator.permutation(rows) for _ in range(EPOCHS + 1)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["speed"] * RATE * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.from_numpy(order[step * BATCH : (step + 1) * BATCH])
        captions = torch.from_numpy(generator.integers(len(data.text), size=BATCH))
        image_BE, text_CBE, u_B, v_CB = fit.embed(Data(data.image[chosen], data.text[captions, chosen][None]))
        similarity_BB, own_BB = image_BE @ text_CBE[0].T, torch.eye(BATCH, dtype=torch.bool)
        corrected_BB = similarity_BB + u_B[:, None] + v_CB[0]
        if kind == "batch":
            rivals_BB = similarity_BB.detach().masked_fill(own_BB, -torch.inf)
            corrected_BB = corrected_BB - hubness(rivals_BB, BETA)[:, None] - hubness(rivals_BB.T, BETA)
        logit_BB = model.log_scale.exp() * corrected_BB + model.bias
        optimizer.zero_grad()
        F.softplus(torch.where(own_BB, -logit_BB, logit_BB)).mean().backward()
        optimizer.step()
        model.clamp_scale()
    model.eval()
    return fit


@torch.no_grad()
def score(fit: Fit, train_data: Data, test: Data) -> dict[str, NDArray[np.float64]]:
    """Return the mean R@1 of each held-out image by way of scoring: cosine, bank, learned, and the bank on learned."""
    beta = GAUSSIAN_BETA if fit.kind == "gaussian" else BETA
    image_ME, text_CME, u_M, v_CM = fit.embed(test)
    bank_ME, bank_CME, bank_u, bank_v = fit.embed(train_data)
    to_texts, to_images = image_ME @ bank_CME.flatten(0, 1).T, text_CME @ bank_ME.T
    unit = [F.normalize(each, dim=-1) for each in (image_ME, text_CME)]
    found = {
        "cosine": count_hits(*unit),
        "bank": corrected(image_ME, text_CME, -hubness(to_texts, beta), -hubness(to_images, beta)),
    }
    if fit.terms.weights:
        found["learned"] = corrected(image_ME, text_CME, u_M, v_CM)
        hubs = hubness(to_texts + bank_v.flatten(), beta), hubness(to_images + bank_u, beta)
        found["learned + bank"] = corrected(image_ME, text_CME, -hubs[0], -hubs[1])
    return {way: 100 * hits.mean(1) for way, hits in found.items()}


def corrected(image_ME: Tensor, text_CME: Tensor, u_M: Tensor, v_CM: Tensor) -> NDArray[np.float64]:
    """Return the hits by x·y + u + v."""
    image = torch.cat((image_ME, u_M[:, None], torch.ones_like(u_M)[:, None]), -1)
    return count_hits(image, torch.cat((text_CME, torch.ones_like(v_CM)[..., None], v_CM[..., None]), -1))


def gain_interval(gain_N: NDArray[np.float64], image_N: NDArray[np.intp]) -> tuple[float, float]:
    """Return the interval of a mean gain; an image that several runs hold out is drawn with all of them."""
    return interval(bootstrap([lambda drawn: weighted_mean(gain_N, drawn)], len(gain_N), groups_N=image_N)[:, 0])


def report(out: Path, runs: int, images: int) -> str:
    """Return a table of the finished runs."""
    found = {(kind, run): out / f"{kind}.{run}.npz" for kind in KINDS for run in range(runs)}
    hits = {key: dict(np.load(path)) for key, path in found.items() if path.exists()}
    rows = []
    for kind, meaning in KINDS.items():
        done = [run for run in range(runs) if {(kind, run), ("none", run)} <= hits.keys()]
        if not done:
            continue
        base = np.concatenate([hits["none", run]["bank"] for run in done])
        for way in hits[kind, done[0]]:
            own = np.concatenate([hits[kind, run][way] for run in done])
            low, high = gain_interval(own - base, np.concatenate([np.flatnonzero(split(images, run)) for run in done]))
            gain = f"{(own - base).mean():+.2f} ({low:+.2f} to {high:+.2f})"
            rows.append((meaning, way, f"{own.mean():.2f}", gain, str(len(done))))
    return format_table(("terms in the loss", "scored by", "mean R@1", "gain over none, bank", "runs"), rows)


def main() -> None:
    """Train what is missing, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("store", type=Path)
    options.add_argument("--out", type=Path, default=Path("runs/item-bias"))
    options.add_argument("--runs", type=int, default=3, help="number of splits and seeds")
    options.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no further fit after this time")
    asked = options.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    data, began = read_data(asked.store).powered(0.5), time.monotonic()
    for run in range(asked.runs):
        held = torch.from_numpy(split(len(data.image), run))
        inner, outer = data.rows(~held), data.rows(held)
        for kind in asked.kinds:
            path = asked.out / f"{kind}.{run}.npz"
            if not path.exists() and time.monotonic() - began < 60 * asked.minutes:
                np.savez(path, **score(train(inner, kind, run), inner, outer))
                print(f"{path} after {time.monotonic() - began:.0f} s", flush=True)
    table = report(asked.out, asked.runs, len(data.image))
    (asked.out / "item_bias.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
