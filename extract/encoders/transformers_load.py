"""Load a transformers model so that every one of its tensors comes from the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, GteConfig, PreTrainedConfig
from transformers.utils import logging

from sail_align.extract.encoders.weights import Checkpoint
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


def load_pretrained(checkpoint: Checkpoint, *, allow_code: bool) -> nn.Module:
    """Load the base model of a checkpoint in float32; its own code runs only if transformers lacks it and it may.

    Raises:
        UserError: The architecture is unknown here, or the checkpoint lacks tensors or holds ones of another shape:
            transformers would fill those with random numbers.
    """
    config = _native_config(checkpoint)
    remote = config is None
    if remote:
        config = _remote_config(checkpoint, allow_code)
    with _without_progress_bar():
        model, loading = AutoModel.from_pretrained(
            checkpoint.path,
            config=config,
            dtype="float32",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=remote,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one sentence
        )
    # The pooler is a layer of its own behind the token states; no pooling of ours uses it.
    lost = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    lost += sorted(str(key) for key, *_ in loading["mismatched_keys"])
    if lost:
        raise UserError(
            f"The weights in {checkpoint.path} are not those of its config: {len(lost)} tensors are missing or of "
            f"another shape, the first is {lost[0]}; use the folder that belongs to the weights."
        )
    network: nn.Module = model
    return network


def _native_config(checkpoint: Checkpoint) -> PreTrainedConfig | None:
    """Return the config in transformers' own terms, None if it has no such architecture."""
    if is_original_gte(checkpoint.config):
        return native_gte_config(checkpoint.config)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        return config
    except ValueError:
        return None


def _remote_config(checkpoint: Checkpoint, allow_code: bool) -> PreTrainedConfig:
    """Return the config as the repository's own code reads it."""
    kind, code = checkpoint.config.get("model_type"), checkpoint.config.get("auto_map", {})
    if not code:
        raise UserError(f"{checkpoint.path} has model_type {kind!r}, which this version of transformers lacks.")
    if not allow_code:
        raise UserError(
            f"{checkpoint.path} has model_type {kind!r}, which needs its own code to run; to trust it, say "
            f"--trust-remote-code and pin the commit: hf:<owner>/<name>@<40-digit commit>."
        )
    elsewhere = [reference for reference in code.values() if "--" in str(reference)]
    if elsewhere:
        raise UserError(f"The code {elsewhere[0]!r} lies in another repository, which no revision pins; copy it here.")
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=True
    )
    return config


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Silence transformers' bar over the tensors of a file: seconds at most, and noise in a log."""
    bars: Any = logging  # has no annotations
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
