"""The recipes of benchmarks/peers.py run, and their closed formulas agree with NumPy in float64."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[SimpleNamespace]:
    """Import the scripts of the benchmark, which do not form a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import peer_ideas
        import peer_recipes
        import peers

        yield SimpleNamespace(recipes=peer_recipes, peers=peers, ideas=peer_ideas)


@pytest.fixture(scope="module")
def data(benchmark):
    """Features of 40 images with two captions, of which half the dimensions are shared."""
    generator = torch.Generator().manual_seed(0)
    image_ND = torch.randn(40, 24, generator=generator).relu()
    text_CND = image_ND[:, :16] + torch.randn(2, 40, 16, generator=generator)
    return benchmark.recipes.Data(image_ND, text_CND)


@pytest.mark.slow
def test_each_recipe_trains_and_is_scored(benchmark, data):
    """Two steps of each gradient recipe change its weights; a fit of each recipe can be scored."""
    recipes, ideas = benchmark.recipes, benchmark.ideas
    for recipe in (*recipes.PEERS, *recipes.POWERED, ideas.OURS_HERE, *ideas.IDEAS):
        model = recipe.fit(data, recipe.grid[-1], 0, lambda step, _: step == 2)
        with torch.no_grad():
            hits = benchmark.peers.score(model, data, data, [20.0])
        assert set(hits) == {"cosine", "20"}, recipe.name
        assert hits["20"].shape == (40, 2), recipe.name


def test_bank_scores_agree_with_their_formula(benchmark, data):
    """cos − h(x) − h(y) with h over the training items, computed densely in float64, gives the same hits."""
    model = benchmark.recipes.fit_cca(data, 2.0, 0, lambda *_: False)
    hits = benchmark.peers.score(model, data, data, [10.0])["10"]
    images, texts = model.encode_image(data.image).double().numpy(), model.encode_text(data.text).double().numpy()
    cosine_CNN = np.einsum("cte,ie->cti", texts, images)
    image_N = np.log(np.exp(10 * cosine_CNN).mean(axis=(0, 1))) / 10
    text_CN = np.log(np.exp(10 * cosine_CNN).mean(axis=2)) / 10
    scores_CNN = cosine_CNN - image_N - text_CN[..., None]
    t2i_N = (scores_CNN.argmax(axis=2) == np.arange(40)).mean(axis=0)
    i2t_N = scores_CNN.transpose(2, 0, 1).reshape(40, -1).argmax(axis=1) % 40 == np.arange(40)
    np.testing.assert_array_equal(hits, np.stack((t2i_N, i2t_N), axis=1))


def test_structure_penalty_agrees_with_its_formula(benchmark, data):
    """Jensen–Shannon divergence of the softmaxes of similarities, mean over rows, in float64 NumPy."""
    batch = benchmark.recipes.Data(data.image.double(), data.text.double())
    embedded = (data.image[:, :5].double() + 0.1, data.text[..., 3:9].double())

    def neighbours(features):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        unit = unit - unit.mean(axis=0)
        weights = np.exp(unit @ unit.T / 0.05)
        return weights / weights.sum(axis=1, keepdims=True)

    total = 0.0
    for before, after in ((batch.image, embedded[0]), (batch.text[0], embedded[1][0])):
        p, q = neighbours(before.numpy()), neighbours(after.numpy())
        middle = (p + q) / 2
        total += ((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2 / len(p)
    found = benchmark.recipes.structure(batch, *embedded, weight=3.0, tau=0.05)
    assert float(found) == pytest.approx(3.0 / 2 * total, rel=1e-9)


def test_label_smoothing_agrees_with_its_formula(benchmark):
    """−(1 − ε) log σ(l) − ε log σ(−l) for right pairs, −log σ(−l) for wrong ones."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (2, 6, 4)))
    image, text = (each / each.norm(dim=-1, keepdim=True) for each in (image, text))
    found = benchmark.ideas.smoothed_loss(image, text, torch.tensor(2.0).double(), torch.tensor(-3.0).double(), 0.2)
    logits = np.exp(2.0) * np.einsum("ie,cje->cij", image.numpy(), text.numpy()) - 3.0
    right = np.broadcast_to(np.eye(6, dtype=bool), logits.shape)
    target = np.where(right, 0.8, 0.0)
    expected = -(target * -np.log1p(np.exp(-logits)) + (1 - target) * -np.log1p(np.exp(logits))).sum() / 36
    assert float(found.total) == pytest.approx(expected, rel=1e-9)
