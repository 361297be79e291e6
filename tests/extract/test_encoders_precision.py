"""Half precision rounds weights, but no buffer whose rounding would change what a network computes."""

import pytest
import timm
import torch
from tiny_models import random_pixels, save_image_processor, save_randomised, save_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.runtime import Runtime, tf32_products


class Buffers(nn.Module):
    """A network with every kind of buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean += torch.tensor([0.1, 0.2, 0.3])
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones(2), torch.tensor([0.1, 0.2])))
        self.register_buffer("wide", torch.tensor([0.1], dtype=torch.float64))
        self.register_buffer("zeros", torch.zeros(3))
        self.register_buffer("positions", torch.arange(1_000))
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.norm(self.layer(x * self.inv_freq)) + self.zeros


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_only_weights_statistics_and_exact_buffers_are_cast(precision):
    plain = Buffers()
    runtime = Runtime.of("cpu", precision)
    frozen = runtime.freeze(Buffers())
    assert {parameter.dtype for parameter in frozen.parameters()} == {runtime.dtype}
    found = dict(frozen.named_buffers())
    for name in ("inv_freq", "turns", "positions"):
        assert torch.equal(found[name], getattr(plain, name))
        assert found[name].dtype == getattr(plain, name).dtype
    assert torch.equal(found["wide"], torch.tensor([0.1]))
    for name in ("zeros", "norm.running_mean", "norm.running_var"):
        assert found[name].dtype == runtime.dtype
    with torch.no_grad():
        assert frozen(torch.ones(4, 2, dtype=runtime.dtype)).dtype == runtime.dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinv2_cr_tiny_ns_224", "test_vit_relpos"])
def test_networks_that_pass_buffers_to_layers_run_in_half_precision(name):
    def build():
        torch.manual_seed(0)
        options = {"depths": (1, 1, 1, 1)} if name.startswith("swin") else {"depth": 1}
        return timm.create_model(name, pretrained=False, **options).eval()

    half = Runtime.of("cpu", "bfloat16").freeze(build())
    assert any(buffer.dtype == torch.float32 for buffer in half.buffers())
    model = build()
    size = model.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, found = model.forward_features(pixels), half.forward_features(pixels.bfloat16()).float()
    assert torch.cosine_similarity(full.flatten(), found.flatten(), dim=0) > 0.999


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=[(False, True), (True, True), (False, False), (True, False)])
def before(request):
    """Set the flags of products and convolutions; the first are PyTorch's defaults."""
    original = flags()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = original


@pytest.mark.parametrize("allowed", [False, True])
def test_flags_of_tf32_are_set_and_restored(before, allowed):
    with tf32_products(allowed):
        assert flags() == (allowed, allowed)
        with tf32_products(not allowed):
            assert flags() == (not allowed, not allowed)
        assert flags() == (allowed, allowed)
    assert flags() == before
    with pytest.raises(ZeroDivisionError), tf32_products(allowed):
        raise ZeroDivisionError
    assert flags() == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9")
def test_precision_that_a_program_set_by_its_newer_name_is_restored(monkeypatch):
    matmul = torch.backends.cuda.matmul
    original = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with tf32_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = original


TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_encoders_run_with_tf32_only_if_it_is_their_precision(tmp_path, before, precision):
    save_randomised(BertModel(BertConfig(**TINY, vocab_size=32)), tmp_path / "text")
    save_tokenizer(tmp_path / "text")
    save_randomised(ViTModel(ViTConfig(**TINY, image_size=56, patch_size=14)), tmp_path / "image")
    save_image_processor(tmp_path / "image")
    text = TextEncoderConfig(f"hf:{tmp_path / 'text'}", pooling="cls", precision=precision).load().to("cpu")
    image = ImageEncoderConfig(f"hf:{tmp_path / 'image'}", pooling="cls", precision=precision).load().to("cpu")
    assert text.identity.spec.precision == image.identity.spec.precision == precision
    assert text.dtype == image.dtype == torch.float32
    seen = []

    def observe(*_):
        seen.append(flags())
        if len(seen) == 3:
            raise ZeroDivisionError

    text.network.register_forward_hook(observe)
    image.network.register_forward_hook(observe)
    text.encode(["a dog"])
    image.encode_dense(random_pixels(1, 56, 56))
    with pytest.raises(ZeroDivisionError):
        image.encode(random_pixels(1, 56, 56))
    assert seen == [(precision == "tf32",) * 2] * 3
    assert flags() == before


@pytest.mark.parametrize(
    ("name", "capability", "precision", "said"),
    [
        (
            "NVIDIA A100",
            8,
            "float32",
            "Encoding in float32: exact. --precision bfloat16 is several times faster on NVI",
        ),
        ("NVIDIA A100", 8, "bfloat16", ""),
        ("Tesla T4", 7, "float32", "Encoding in float32: exact. --precision float16 is several times faster on Tesla"),
        ("Tesla T4", 7, "bfloat16", "Tesla T4 only emulates bfloat16. --precision float16 is faster."),
    ],
)
def test_precision_is_explained_on_a_gpu(use_card, name, capability, precision, said):
    use_card(name, capability)
    line = Runtime(torch.device("cuda"), precision).explain()
    assert line.startswith(said) if said else line == ""
    assert Runtime(torch.device("cpu"), precision).explain() == ""


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_layer_norms_take_float32_positions(precision):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.linspace(0, 1, 7 * 8).reshape(7, 8).sin())
            self.norm, self.bare = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)

        def forward(self, x_BLD):
            return self.norm(self.bare(x_BLD + self.table) + self.table)

    network, x_BLD = Positions(), torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    expected = network(x_BLD)
    runtime = Runtime.of("cpu", precision)
    found = runtime.freeze(network)(x_BLD.to(runtime.dtype))
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
