"""The bank that `fit` keeps: training rows, a β chosen on held-out pairs, the same after every interruption."""

import json

import numpy as np
import pytest
import torch

from sail_align.align.fit import fit
from sail_align.align.hub.embeddings import write_embeddings
from sail_align.align.model.correction import Bank, Cosine
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.folder import RunFolder
from sail_align.align.train.bank import BETAS, choose_beta, spread_evenly
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

CCA = {"head": "cca", "dim": 4, "quiet": True}


def test_rows_are_spread_evenly():
    rows = [np.array([True, False, True, True, True]), np.array([True, True, False, True])]
    found = spread_evenly(rows, 3)
    assert [each.nonzero()[0].tolist() for each in found] == [[0, 3], [0]]
    assert [each.tolist() for each in spread_evenly(rows, 99)] == [each.tolist() for each in rows]
    assert sum(each.sum() for each in spread_evenly([np.ones(1_000, bool)], 64)) == 64


@pytest.mark.slow
def test_a_closed_form_has_a_bank(make_store, tmp_path):
    store = make_store("a", 400)
    result = fit(store, out=tmp_path / "run", bank=32, **CCA)
    run = load_run(result)
    assert run.architecture["bank_rows"] == 32
    assert result.metrics["hub_beta"] == run.model.correction.beta.item() in BETAS
    assert "corrected for hubs: R@1/5/10 text→image" in "\n".join(result.lines())
    again = fit(store, out=tmp_path / "again", bank=32, **CCA)
    for name in ("model.json", "model.safetensors"):
        one, other = ((RunFolder(each.run).last / name).read_bytes() for each in (result, again))
        assert one == other


@pytest.mark.slow
def test_the_bank_has_training_rows_with_their_captions_in_turn(make_store, tmp_path):
    store = make_store("a", 300, captions={"c0": (), "c1": ()})
    result = fit(store, out=tmp_path / "run", bank=20, **CCA)
    model = load_run(result).model
    plan, _ = make_plan([store], {"head": "cca", "dim": 4, "bank": 20})
    rows = np.flatnonzero(spread_evenly(plan.training, 20)[0])
    pairs = plan.pairs[0]
    images = model.encode_image(torch.from_numpy(pairs.image.read()[0][rows]))
    texts = [pairs.texts[place % 2].read()[0][row] for place, row in enumerate(rows)]
    with torch.no_grad():
        torch.testing.assert_close(model.correction.image_vectors.float(), images, atol=1e-3, rtol=0)
        embedded = model.encode_text(torch.from_numpy(np.stack(texts)))
        torch.testing.assert_close(model.correction.text_vectors.float(), embedded, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_without_a_bank_nothing_is_added(make_store, tmp_path):
    store = make_store("a", 300)
    plain = fit(store, out=tmp_path / "plain", bank=0, **CCA)
    with_bank = fit(store, out=tmp_path / "bank", **CCA)
    assert not [name for name in plain.metrics if name.startswith("hub")]
    model, other = (load_run(each).model for each in (plain, with_bank))
    assert model.correction is None
    weights = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    with pytest.raises(UserError, match="has no hub correction"):
        model.corrected_image(torch.ones(2, 8))


@pytest.mark.slow
def test_without_held_out_pairs_the_default_is_used(make_store, tmp_path):
    result = fit(make_store("a", 300), out=tmp_path / "run", held_out=0, **CCA)
    assert load_run(result).model.correction.beta.item() == Cosine.default_beta


@pytest.mark.slow
def test_last_and_best_checkpoints_have_a_bank(make_store, tmp_path):
    result = fit(make_store("a", 300), out=tmp_path / "run", steps=6, lr=0.01, quiet=True, batch_size=64)
    folders = [*RunFolder(result.run).checkpoints(), *RunFolder(result.run).checkpoints("best")]
    records = {folder.name: json.loads((folder / "model.json").read_bytes()) for folder in folders}
    kept = {name for name, record in records.items() if record["architecture"]["bank_rows"]}
    assert Checkpoint.best(result.run).folder.name in kept
    assert RunFolder(result.run).last.name in kept
    for name in kept:
        assert "hub_r1" in records[name]["scores"]


def test_beta_is_the_one_that_ranks_best():
    """One image is near all texts: without the correction it is first for most, with it never."""
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    texts = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator) + 4 * common, dim=1)
    images = texts + 0.3 * torch.randn(40, 16, generator=generator)
    images[0] = 9 * common
    bank = Bank(40, 16)
    bank.fill(images, texts, 1.0)
    beta = choose_beta(bank, images, texts[None])

    def cost(beta):
        bank.beta.fill_(beta)
        scores = (bank.extend(images, "image") @ bank.extend(texts, "text").T).double().numpy()
        right = np.diag(scores)
        ranks = [(scores >= right[:, None] - 1e-6).sum(1) - 1, (scores >= right - 1e-6).sum(0) - 1]
        return sum(np.log1p(each).mean() for each in ranks)

    assert cost(beta) == pytest.approx(min(map(cost, BETAS)), abs=1e-3)
    assert cost(beta) < cost(1e-3)


@pytest.mark.slow
def test_embeddings_of_a_store_can_be_corrected(make_store, tmp_path):
    store = make_store("a", 300)
    run = load_run(fit(store, out=tmp_path / "run", bank=16, **CCA))
    opened = Store.open(store)
    write_embeddings(run, opened, "npy", tmp_path / "corrected", corrected=True, quiet=True)
    image, text = (np.load(tmp_path / "corrected" / f"{side}_emb" / f"{side}_emb_0.npy") for side in ("img", "text"))
    assert image.shape == text.shape == (300, 4 + 2)
    np.testing.assert_array_equal(image[:, 5], 1)
    np.testing.assert_array_equal(text[:, 4], 1)
    with torch.no_grad():
        expected = run.model.corrected_image(torch.from_numpy(opened.image().read()[0])).numpy()
    np.testing.assert_array_equal(image, expected)
    run.model.correction = None
    with pytest.raises(UserError, match="has no hub correction"):
        write_embeddings(run, opened, "npy", tmp_path / "none", corrected=True, quiet=True)
    assert not (tmp_path / "none").exists()
