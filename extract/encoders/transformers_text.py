"""Text encoders of transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from sail_align.extract.encoders.base import EncoderSpec, Identity
from sail_align.extract.encoders.checkpoint import Checkpoint
from sail_align.extract.encoders.golden import SENTENCE, golden_vector, versions
from sail_align.extract.encoders.pooling import pool_tokens
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.errors import UserError


@dataclass(frozen=True)
class TextSettings:
    """`prefix` goes before each text, `token_limit` counts the special tokens too."""

    pooling: str
    prefix: str
    token_limit: int


class FrozenTextEncoder:
    """A `TextEncoder`: a tokenizer, a transformers model, a pooling of its last token states."""

    def __init__(self, id: str, checkpoint: Checkpoint, model: nn.Module, settings: TextSettings, runtime: Runtime):
        self._pooling = settings.pooling
        self._prefix = settings.prefix
        self._runtime = runtime
        self._tokenizer = _load_tokenizer(checkpoint.path)
        self._token_limit = min(settings.token_limit, self._tokenizer.model_max_length)
        self._model = runtime.freeze(model)
        golden = golden_vector(self.encode([SENTENCE]))
        spec = EncoderSpec(
            id=id,
            modality="text",
            source=checkpoint.source,
            weights=checkpoint.digest,
            preprocessing={"prefix": self._prefix, "token_limit": self._token_limit},
            pooling=self._pooling,
            precision=runtime.precision,
            dim=len(golden),
        )
        self.identity = Identity(spec, golden, versions("torch", "transformers", "tokenizers"), checkpoint.location)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Return pooled features of one padded batch, (B, D) float32 on the CPU. Texts beyond the limit are cut."""
        tokens = self._tokenizer(
            [self._prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self._token_limit,
            return_tensors="pt",
        ).to(self._runtime.device)
        hidden_BTD = self._model(**tokens).last_hidden_state
        return pool_tokens(hidden_BTD, tokens["attention_mask"], self._pooling).float().cpu()


def _load_tokenizer(path: Path) -> Any:
    """Load the tokenizer beside a model; transformers makes an empty one where the files are missing.

    Raises:
        UserError: It cannot be loaded, or knows no words.
    """
    advice = "save it beside the model with tokenizer.save_pretrained"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} has no tokenizer that loads; {advice}.") from problem
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"The tokenizer in {path} knows no words; {advice}.")
    return tokenizer
