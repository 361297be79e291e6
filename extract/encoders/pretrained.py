"""Load a transformers model so that every one of its tensors comes from the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging

from sail_align.extract.encoders.checkpoint import Checkpoint
from sail_align.extract.encoders.gte import is_original_gte, native_gte_config
from sail_align.extract.errors import UserError


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
