"""The custom backward passes equal autograd in float64 and keep fewer activations."""

import pytest
import torch
import torch.nn.functional as F

from sail_align.align.model.fused import gated_linear, normed_linear
from sail_align.align.model.heads import HEADS


def arguments(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [(4 * torch.randn(*shape, generator=generator).double()).requires_grad_() for shape in shapes]


def plain_normed_linear(x, gain, offset, weight, bias):
    return F.linear(F.layer_norm(x, x.shape[1:], gain, offset), weight, bias)


def plain_gated_linear(gate, value, weight, bias):
    return F.linear(F.relu6(gate) * value, weight, bias)


CASES = {
    "normed": (normed_linear, plain_normed_linear, ((7, 5), (5,), (5,), (6, 5), (6,))),
    "gated": (gated_linear, plain_gated_linear, ((7, 5), (7, 5), (3, 5), (3,))),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_formula(case):
    function, formula, shapes = CASES[case]
    ours, theirs = arguments(*shapes), arguments(*shapes)
    if case == "normed":
        ours[0].requires_grad_(False)
    out, expected = function(*ours), formula(*theirs)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        if our.requires_grad:
            torch.testing.assert_close(our.grad, their.grad)
    assert torch.autograd.gradcheck(function, tuple(ours))


def kept_numbers(head, x):
    """Count the numbers that the backward pass of a head keeps besides its weights."""
    weights = {parameter.data_ptr() for parameter in head.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head(x)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["linear", "mlp", "glu"])
@pytest.mark.parametrize("dropout", [0, 0.5])
def test_heads_keep_at_most_kept_units(kind, dropout):
    rows, head = 16, HEADS[kind](32, 8, dropout=dropout)
    assert 0 < kept_numbers(head, torch.randn(rows, 32)) <= rows * head.kept_units


@pytest.mark.parametrize("kind", ["linear", "mlp", "glu"])
@pytest.mark.parametrize("linear_path", [False, True])
def test_training_gradients_equal_autograd(kind, linear_path):
    torch.manual_seed(0)
    head = HEADS[kind](6, 3).double()
    if linear_path:
        head.add_linear_path().double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 6).double()
    trained = head(x)
    trained.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    head.eval()  # layer by layer, by autograd
    torch.testing.assert_close(trained, head(x))
    head(x).square().sum().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
