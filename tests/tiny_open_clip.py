"""OpenCLIP models of at most a few megabytes with random weights, saved in the form of real ones."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tiny_models import save_tokenizer

TEXT = {"context_length": 16, "width": 16, "heads": 2, "layers": 2}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {**TEXT, "vocab_size": 49408},
}
SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {**TEXT, "vocab_size": 32, "hf_tokenizer_name": "here", "pool_type": "last", "no_causal_mask": True},
}
SIGLIP_PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"}


def save_open_clip(folder: Path, config: dict = CLIP, preprocessing: dict | None = None) -> torch.nn.Module:
    """Save a model with random parameters of realistic size, and return it in evaluation mode."""
    settings = {"model_cfg": config, "preprocess_cfg": preprocessing or {}}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    if config["text_cfg"].get("hf_tokenizer_name"):
        save_tokenizer(folder)
    torch.manual_seed(0)
    options = {name: value for name, value in config.items() if name != "custom_text"}
    model = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**options)
    with torch.no_grad():
        text = model.text if config.get("custom_text") else model.transformer
        for parameter in (*model.visual.parameters(), *text.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return model.eval()
