"""NV-Embed-v2 (Lee et al. 2024, arXiv 2405.17428): a Mistral with attention in both directions and latent attention.

It is published with code of its own, which does not run with transformers 5: it imports names that transformers has
removed. The layers below have the names and the computation of that code, so that the published weights load.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

_OF_THE_CODE = ("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "sliding_window")


def translate_nv_config(config: dict[str, Any]) -> MistralConfig:
    """Return the `config.json` of NV-Embed-v2 as the config of a Mistral with the sizes of the latent attention."""
    text = {name: value for name, value in config["text_config"].items() if name not in _OF_THE_CODE}
    translated = MistralConfig(**text, sliding_window=None)
    translated.is_causal = False
    latent = config.get("latent_attention_config") or {}
    translated.latent_attention = {name: latent[name] for name in _LATENT if name in latent}
    return translated


_LATENT = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "latent_dim": 4_096,
    "hidden_dim": 4_096,
    "cross_dim_head": 4_096,
}


class NVEmbedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The network up to its token states, which the pooling `mean` makes features of."""

    config_class = MistralConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: MistralConfig):
        super().__init__(config)
        self.embedding_model = MistralModel(config)
        self.latent_attention_model = _LatentAttention(**{**_LATENT, **getattr(config, "latent_attention", {})})
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Return the token states (B, T, D) of tokens (B, T), given 1 for tokens of a text and 0 for padding."""
        hidden_BTD = self.embedding_model(input_ids, attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.latent_attention_model(hidden_BTD))


class _LatentAttention(nn.Module):
    """Attention of token states to trained vectors, then a feed-forward layer, each with a residual path."""

    def __init__(
        self, num_latents_value: int, num_cross_heads: int, latent_dim: int, hidden_dim: int, cross_dim_head: int
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents_value, latent_dim))
        attention = _CrossAttention(latent_dim, hidden_dim, num_cross_heads, cross_dim_head)
        self.cross_attend_blocks = nn.ModuleList(
            [_Normed(attention, latent_dim, hidden_dim), _Normed(_GatedFeedForward(latent_dim), latent_dim)]
        )

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        attend, feed_forward = self.cross_attend_blocks
        hidden_BTD = attend(hidden_BTD, self.latents) + hidden_BTD
        out_BTD: Tensor = feed_forward(hidden_BTD) + hidden_BTD
        return out_BTD


class _Normed(nn.Module):
    def __init__(self, layer: nn.Module, width: int, context_width: int | None = None):
        super().__init__()
        self.fn, self.norm = layer, nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width) if context_width else None

    def forward(self, x_BTD: Tensor, context_ND: Tensor | None = None) -> Tensor:
        context = () if self.norm_context is None else (self.norm_context(context_ND),)
        out_BTD: Tensor = self.fn(self.norm(x_BTD), *context)
        return out_BTD


class _CrossAttention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(context_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor, context_ND: Tensor) -> Tensor:
        query_BHTE = self.to_q(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_HNE, value_HNE = (
            each.unflatten(-1, (self.heads, -1)).transpose(0, 1) for each in self.to_kv(context_ND).chunk(2, dim=-1)
        )
        shape = (len(x_BTD), -1, -1, -1)
        mixed_BHTE = nn.functional.scaled_dot_product_attention(
            query_BHTE, key_HNE.expand(shape), value_HNE.expand(shape)
        )
        out_BTD: Tensor = self.to_out(mixed_BHTE.transpose(1, 2).flatten(2))
        return out_BTD


class _GatedFeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8 * width), _GatedGelu(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.net(x_BTD)
        return out_BTD


class _GatedGelu(nn.Module):
    def forward(self, x_BTD: Tensor) -> Tensor:
        values_BTD, gates_BTD = x_BTD.chunk(2, dim=-1)
        return values_BTD * nn.functional.gelu(gates_BTD)
