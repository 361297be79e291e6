"""Heads, losses and gradients agree with the authors' code on a small head in their released format."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.heads import GLUHead
from sail_align.align.model.loss import sigmoid_loss

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is missing")

RENAMED = {
    "mapping_network.f1": "gate",
    "mapping_network.f2": "value",
    "mapping_network.g": "out",
    "layer_norm": "norm",
}


def our_name(released: str) -> str:
    if released in {"logit_scale", "logit_bias"}:
        return {"logit_scale": "log_scale", "logit_bias": "bias"}[released]
    side, rest = released.split("_", 1)
    for theirs, ours in RENAMED.items():
        rest = rest.replace(theirs, ours)
    return f"{'image' if side == 'vision' else 'text'}_head.{rest}"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    with np.load(GOLDEN / "released_expected.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture
def model() -> AlignmentModel:
    released = torch.load(GOLDEN / "released_head.pt", weights_only=True)["state_dict"]
    model = AlignmentModel(GLUHead(48, 24, expansion=8), GLUHead(32, 24, expansion=8))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict({our_name(name): value.reshape(shapes[our_name(name)]) for name, value in released.items()})
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.detach() - theirs.reshape(ours.shape)).abs().max() <= 1e-5 * theirs.abs().max()


def loss_of(model, expected, *captions):
    text_CBE = torch.stack([model.encode_text(expected[name]) for name in captions])
    return sigmoid_loss(model.encode_image(expected["image"]), text_CBE, model.log_scale, model.bias).total


def test_outputs_agree(model, expected):
    outputs = {
        "image_out": model.encode_image(expected["image"]),
        "text_out": model.encode_text(expected["text"]),
        "extra_text_out": model.encode_text(expected["extra_text"]),
    }
    for name, ours in outputs.items():
        close(ours, torch.nn.functional.normalize(expected[name], dim=-1))


def test_losses_agree_up_to_the_factor_of_two_captions(model, expected):
    close(loss_of(model, expected, "text"), expected["loss_one"])
    close(loss_of(model, expected, "text", "extra_text") / 2, expected["loss_two"])


def test_gradients_agree(model, expected):
    (loss_of(model, expected, "text", "extra_text") / 2).backward()
    released = [name.removeprefix("grad.") for name in expected if name.startswith("grad.")]
    assert {our_name(name) for name in released} == {name for name, _ in model.named_parameters()}
    ours = dict(model.named_parameters())
    for name in released:
        close(ours[our_name(name)].grad, expected[f"grad.{name}"])
