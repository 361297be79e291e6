"""The heads have the size, cost and output of the paper's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sail_align.align.model.alignment import Architecture
from sail_align.align.model.closed_form import LinearMap
from sail_align.align.model.heads import HEADS, GLUHead

IMAGE_DIM, TEXT_DIM, DIM = 2048, 1024, 1024
HEAD_KINDS = ["linear", "mlp", "glu"]


@pytest.mark.parametrize(
    ("kind", "millions", "megaflops"), [("linear", 3.15, 6.3), ("mlp", 33.57, 67.1), ("glu", 54.6, 109.1)]
)
def test_sizes_and_costs_equal_table_1(kind, millions, megaflops):
    with torch.device("meta"):
        heads = [HEADS[kind](dim, DIM) for dim in (IMAGE_DIM, TEXT_DIM)]
        norms = sum(p.numel() for head in heads for p in head.norm.parameters())
        parameters = sum(p.numel() for head in heads for p in head.parameters()) - norms
        with FlopCounterMode(display=False) as flops:
            for head, dim in zip(heads, (IMAGE_DIM, TEXT_DIM), strict=True):
                head(torch.zeros(1, dim))
    assert norms == 6144
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert flops.get_total_flops() / 1e6 == pytest.approx(megaflops, abs=0.06)


def test_glu_head_equals_its_formula():
    torch.manual_seed(0)
    head = GLUHead(6, 3, expansion=2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    w = {name: p.detach().double().numpy() for name, p in head.named_parameters()}
    x = np.random.default_rng(0).normal(size=(5, 6)) * 3
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    normed = normed * w["norm.weight"] + w["norm.bias"]
    gate = np.clip(normed @ w["gate.weight"].T + w["gate.bias"], 0, 6)
    value = normed @ w["value.weight"].T + w["value.bias"]
    expected = (gate * value) @ w["out.weight"].T + w["out.bias"]
    np.testing.assert_allclose(head(torch.tensor(x).float()).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_initial_weights_are_xavier_uniform_and_biases_zero(kind):
    torch.manual_seed(0)
    for name, parameter in HEADS[kind](64, 32).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif not name.startswith("norm"):
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_head_computes_a_copied_linear_map_and_can_learn(kind):
    torch.manual_seed(0)
    head = HEADS[kind](8, 4)
    given_map = LinearMap(torch.randn(4, 8).double(), torch.randn(4).double())
    given_map.copy_to(head)
    x = torch.randn(10, 8)
    normed = torch.nn.functional.layer_norm(x, (8,)).double()
    torch.testing.assert_close(head(x).double(), normed @ given_map.weight.T + given_map.bias, rtol=1e-5, atol=1e-5)
    head(x).square().sum().backward()
    assert head.out.weight.grad.any()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(HEAD_KINDS), st.floats(0.1, 100), st.floats(-10, 10))
def test_heads_ignore_scale_and_offset_of_features(kind, scale, offset):
    torch.manual_seed(0)
    head, x = HEADS[kind](8, 4), 10 * torch.randn(3, 8)
    torch.testing.assert_close(head(scale * x + offset), head(x), rtol=1e-3, atol=1e-3)


def test_power_applies_to_images_and_keeps_signs():
    architecture = Architecture("glu", image_dim=3, text_dim=3, dim=2, expansion=1)
    plain, bent = (replace(architecture, image_power=power).build() for power in (1.0, 0.5))
    bent.load_state_dict(plain.state_dict())
    x = torch.tensor([[-4.0, 0.0, 9.0]])
    torch.testing.assert_close(bent.encode_image(x), plain.encode_image(torch.tensor([[-2.0, 0.0, 3.0]])))
    assert torch.equal(bent.encode_text(x), plain.encode_text(x))


def test_dropout_acts_only_in_training():
    torch.manual_seed(0)
    head, x = GLUHead(8, 4, dropout=0.5), torch.randn(3, 8)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_patches_have_a_power_of_their_own():
    torch.manual_seed(0)
    architecture = Architecture("linear", image_dim=3, text_dim=3, dim=2, image_power=0.5)
    bent, flat = architecture.build(), replace(architecture, patch_power=1.0).build()
    flat.load_state_dict(bent.state_dict())
    plain = replace(architecture, image_power=1.0).build()
    plain.load_state_dict(bent.state_dict())
    x = torch.tensor([[-4.0, 0.0, 9.0]])
    assert torch.equal(flat.encode_image(x), bent.encode_image(x))
    assert torch.equal(bent.encode_patches(x), bent.encode_image(x))
    assert torch.equal(flat.encode_patches(x), plain.encode_image(x))
    assert not torch.equal(flat.encode_patches(x), bent.encode_patches(x))
