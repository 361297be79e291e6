"""GTE v1.5 as first published, for remote code (`model_type: "new"`), read as transformers' own `GteConfig`.

The weights need no help: transformers renames and splits their tensors when it loads them into a `GteModel`.
"""

from typing import Any

from transformers import GteConfig

from sail_align.extract.errors import UserError

# Fields that mean the same under the same name.
_SHARED = frozenset(
    {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "hidden_act",
        "hidden_dropout_prob",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "pad_token_id",
        "type_vocab_size",
        "vocab_size",
    }
)
# Fields that choose another architecture, with the one value that the native model has.
_FIXED = {
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
}
# Fields that say how the original program runs or what it was saved from, not what it computes.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
        "pack_qkv",
        "torch_dtype",
        "transformers_version",
        "unpad_inputs",
        "use_memory_efficient_attention",
    }
)
# What the original takes where its config is silent and GteConfig takes something else.
_DEFAULTS = {
    "vocab_size": 30528,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}


def is_original_gte(config: dict[str, Any]) -> bool:
    """Tell whether a `config.json` is of the original form."""
    return bool(config.get("model_type") == "new")


def native_gte_config(config: dict[str, Any]) -> GteConfig:
    """Translate an original config.

    Raises:
        UserError: It has a field that is not known here, or asks for something that the native model does not have.
    """
    unknown = sorted(config.keys() - _SHARED - _FIXED.keys() - _WITHOUT_EFFECT - {"rope_theta", "rope_scaling"})
    if unknown:
        field = unknown[0]
        raise UserError(
            f"The GTE config has the field {field!r} with value {config[field]!r}, which has no translation here; "
            f"use a checkpoint of the native form (model_type 'gte')."
        )
    for field, value in _FIXED.items():
        if config.get(field, value) != value:
            raise UserError(f"The GTE config has {field} {config[field]!r}; only {value!r} can be loaded.")
    shared = {field: config[field] for field in _SHARED & config.keys()}
    settings = {**_DEFAULTS, **shared}
    head_dim = settings.get("hidden_size", 768) // settings.get("num_attention_heads", 12)
    rope = _native_rope(config.get("rope_theta", 10_000.0), config.get("rope_scaling"), head_dim)
    return GteConfig(**settings, rope_parameters=rope)


def _native_rope(theta: float, scaling: dict[str, Any] | None, head_dim: int) -> dict[str, Any]:
    """Say the original's rotary frequencies in native words.

    Its fixed NTK scaling by f has the frequencies (θ·f)^(−2i/d) · f^(−2/d) for head size d: those of the base θ·f, all
    divided by f^(2/d).
    """
    if scaling is None:
        return {"rope_type": "default", "rope_theta": float(theta)}
    if scaling.keys() != {"type", "factor"} or scaling["type"] != "ntk":
        raise UserError(f"The GTE config has rope_scaling {scaling!r}; only type 'ntk' with a factor can be loaded.")
    factor = float(scaling["factor"])
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
