"""Biases of single items in the sigmoid loss: values and gradients in float64. Runs are in test_trainer."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sail_align.align.model.alignment import Architecture
from tests.align.test_step import NOTHING, batch, stepper


def give_biases(model):
    """Give the item biases random weights; they begin at 0."""
    torch.manual_seed(7)
    for head in (model.image_head, model.text_head):
        torch.nn.init.normal_(head.item_bias.weight, std=0.3)
        torch.nn.init.normal_(head.item_bias.bias, std=0.3)


def dense_loss(model, data):
    """The loss of all pairs at once, from the formula alone."""
    model = copy.deepcopy(model).double()
    images, texts = data.images.double(), data.texts.double()
    (x, u), (y, v) = (
        (F.normalize(head(each), dim=-1), head.item_bias(head.norm(each)).squeeze(-1))
        for head, each in ((model.image_head, images), (model.text_head, texts))
    )
    total = 0.0
    for c in range(len(texts)):
        logit = model.log_scale.exp() * (x @ y[c].T + u[:, None] + v[c][None]) + model.bias
        sign = 2 * torch.eye(len(images), dtype=torch.float64) - 1
        total = total - F.logsigmoid(sign * logit).sum() / len(images) ** 2
    total.backward()
    return total.detach(), {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("head", ["linear", "glu"])
@pytest.mark.parametrize(("micro_batch", "in_parts"), [(5, True), (1000, False)])
def test_loss_and_gradients_are_those_of_the_formula(head, micro_batch, in_parts):
    used = stepper(micro_batch, NOTHING, head=head, in_parts=in_parts, item_bias=True)
    give_biases(used.model)
    loss, gradients = dense_loss(used.model, batch())
    value = used.step(batch(), 1e-9)
    torch.testing.assert_close(value.total.double(), loss, rtol=1e-5, atol=1e-9)
    assert gradients["image_head.item_bias.weight"].abs().max() > 1e-4
    for name, ours in used.model.named_parameters():
        largest = float(gradients[name].abs().max())
        torch.testing.assert_close(ours.grad.double(), gradients[name], msg=name, rtol=1e-4, atol=1e-5 * largest + 1e-9)


def test_the_forward_pass_gives_the_vectors_that_a_step_compares():
    model = Architecture("linear", 12, 8, 6, item_bias=True).build().eval()
    give_biases(model)
    images, texts = batch().images, batch().texts
    image_vectors, text_vectors = model(images, texts)
    u, v = (
        model.image_head.with_item_bias(images.float())[:, -1],
        model.text_head.with_item_bias(texts.float())[..., -1],
    )
    expected = model.encode_image(images) @ model.encode_text(texts[1]).T + u[:, None] + v[1]
    torch.testing.assert_close(image_vectors @ text_vectors[1].T, expected)


def test_without_them_the_model_has_no_such_weights():
    plain, biased = (Architecture("linear", 12, 8, 6, item_bias=each).build() for each in (False, True))
    added = biased.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"{side}_head.item_bias.{each}" for side in ("image", "text") for each in ("weight", "bias")}
    torch.testing.assert_close(plain.encode_text(batch().texts).norm(dim=-1), torch.ones(2, 23))
