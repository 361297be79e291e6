"""Files of the form in which the paper's authors published their heads, small, and encoders that go with them."""

import math
from pathlib import Path

import torch
from tiny_models import save_image_processor, save_randomised, save_tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

IMAGE_DIM, TEXT_DIM, DIM = 48, 32, 24


def released_tensors(expansion: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under their names, with biases and norms that matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"logit_scale": torch.tensor([math.log(35)]), "logit_bias": torch.tensor([-9.0])}
    for side, width in (("vision", IMAGE_DIM), ("text", TEXT_DIM)):
        hidden = expansion * width
        shapes = {"f1": (hidden, width), "f2": (hidden, width), "g": (DIM, hidden)}
        for layer, shape in shapes.items():
            tensors[f"{side}_mapping_network.{layer}.weight"] = torch.randn(shape, generator=generator) * 0.2
            tensors[f"{side}_mapping_network.{layer}.bias"] = torch.randn(shape[:1], generator=generator) * 0.2
        tensors[f"{side}_layer_norm.weight"] = 1 + torch.randn(width, generator=generator) * 0.2
        tensors[f"{side}_layer_norm.bias"] = torch.randn(width, generator=generator) * 0.2
    return tensors


def save_released(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 30, "name": "synthetic", "state_dict": tensors, "optimizer": {"step": 1}}, path)
    return path


def their_forward(tensors: dict[str, Tensor], side: str, features_BD: Tensor) -> Tensor:
    """Their head written out in float64: LayerNorm, both branches clamped, relu6 on one, product, output."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = features_BD.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * w[f"{side}_layer_norm.weight"] + w[f"{side}_layer_norm.bias"]

    def layer(name, inputs):
        return inputs @ w[f"{side}_mapping_network.{name}.weight"].T + w[f"{side}_mapping_network.{name}.bias"]

    gate, value = (layer(name, x).clamp(-1000, 1000) for name in ("f1", "f2"))
    return layer("g", gate.clamp(0, 6) * value)


def save_encoders(folder: Path) -> tuple[Path, Path]:
    """Save a DINOv2 of 2 × 24 numbers and a BERT of 32, of random weights."""
    image, text = folder / "image", folder / "text"
    tiny = {"num_hidden_layers": 2, "num_attention_heads": 4}
    save_randomised(Dinov2Model(Dinov2Config(hidden_size=24, image_size=70, patch_size=14, **tiny)), image)
    save_image_processor(image)
    config = BertConfig(hidden_size=32, intermediate_size=48, vocab_size=32, max_position_embeddings=64, **tiny)
    save_randomised(BertModel(config), text)
    save_tokenizer(text)
    return image, text
