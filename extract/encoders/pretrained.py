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


def load_pretrained(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> nn.Module:
    """Load the base model of a checkpoint in float32, without remote code unless it is trusted.

    Raises:
        UserError: The architecture is unknown here, or the checkpoint lacks tensors or holds ones of another shape:
            transformers would fill those with random numbers.
    """
    config = _config(checkpoint, trust_remote_code)
    with _without_progress_bar():
        model, loading = AutoModel.from_pretrained(
            checkpoint.path,
            config=config,
            dtype="float32",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    # The pooler is a layer of its own behind the token states; no pooling of ours uses it.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    mismatched = sorted(str(key) for key in loading["mismatched_keys"])
    if missing or mismatched:
        raise UserError(
            f"The weights in {checkpoint.path} are not those of its config: {len(missing)} tensors are missing and "
            f"{len(mismatched)} of another shape, the first is {(missing + mismatched)[0]}; use the right folder."
        )
    return model  # type: ignore[no-any-return]


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedConfig:
    if is_original_gte(checkpoint.config) and not trust_remote_code:
        return native_gte_config(checkpoint.config)
    try:
        return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=trust_remote_code)
    except ValueError as problem:
        kind: Any = checkpoint.config.get("model_type")
        raise UserError(
            f"{checkpoint.path} has model_type {kind!r}, which transformers does not know without remote code; use "
            f"another encoder, or trust its code at one pinned revision."
        ) from problem


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Silence transformers' bar over the tensors of a file: seconds at most, and noise in a log."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
