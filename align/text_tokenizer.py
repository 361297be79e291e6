"""The tokenizer of a text encoder in the form of transformers."""

# mypy: disable-error-code="no-untyped-call,override"
# The base class has few type hints.

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from sail_align.extract.encoders.identity import EncoderSpec
from sail_align.extract.encoders.load import load_tokenizer
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically


class SailTokenizer(PreTrainedTokenizerBase):
    """The tokenizer of a text encoder, with the encoder's prefix and its limit on tokens, as in training.

    Args:
        encoder: The recorded spec of the text encoder.
        text_folder: Folder of the text encoder, if it is a local folder.
        **of_transformers: What transformers adds.
    """

    def __init__(self, encoder: dict[str, Any], text_folder: str | Path | None = None, **of_transformers: Any):
        try:
            self.spec = EncoderSpec.from_json(encoder)
            self._prefix, limit = str(self.spec.preprocessing["prefix"]), int(self.spec.preprocessing["token_limit"])
        except (ValueError, TypeError, KeyError) as problem:
            raise UserError(f"tokenizer_config.json is invalid: {problem}. Export the run again.") from problem
        if "config" in self.spec.source and text_folder is None:
            raise UserError(f"Encoder {self.spec.id!r} is a local folder. Pass its path with text_folder.")
        folder = str(Path(text_folder).resolve()) if text_folder else ""
        self.inner: Any = load_tokenizer(self.spec, folder)
        self.is_open_clip = not isinstance(self.inner, PreTrainedTokenizerBase)
        special = {} if self.is_open_clip else self.inner.special_tokens_map
        name = of_transformers.get("name_or_path", "")
        names = ["input_ids", "attention_mask"]
        super().__init__(name_or_path=name, model_max_length=limit, model_input_names=names, **special)

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """Return `input_ids` and `attention_mask` of one text or many.

        Args:
            text: Texts, without the encoder's prefix.
            padding: `longest` or True, `max_length`, or False. OpenCLIP's models pad to their context in any case.
            truncation: Texts are always truncated, as in training.
            max_length: Number of tokens, if it is less than the encoder's limit.
            return_tensors: `pt` or `np`. None returns lists.
            **options: Of the encoder's own tokenizer.

        Raises:
            ValueError: Truncation is False or None.
        """
        if truncation in (False, None):
            limit = self.model_max_length
            raise ValueError(f"truncation={truncation} is invalid: texts end after {limit} tokens, as in training.")
        texts = [text] if isinstance(text, str) else list(text)
        if self.is_open_clip:
            ids = self.inner(texts, context_length=self.model_max_length).tolist()
            encoded = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
            one = isinstance(text, str) and return_tensors is None
            return BatchEncoding({k: v[0] for k, v in encoded.items()} if one else encoded, tensor_type=return_tensors)
        prefixed = [self._prefix + each for each in texts]
        options = {"return_token_type_ids": False, **options}
        encoding: BatchEncoding = self.inner(
            prefixed[0] if isinstance(text, str) else prefixed,
            padding=padding,
            truncation=truncation,
            max_length=min(max_length or self.model_max_length, self.model_max_length),
            return_tensors=return_tensors,
            **options,
        )
        return encoding

    def __repr__(self) -> str:
        return f"SailTokenizer({self.spec.id!r}, model_max_length={self.model_max_length})"

    def __len__(self) -> int:
        return self.vocab_size if self.is_open_clip else len(self.inner)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added ones."""
        return int(self.inner.vocab_size)

    def get_vocab(self) -> dict[str, int]:
        """Return the number of each token."""
        vocabulary: dict[str, int] = self.inner.encoder if self.is_open_clip else self.inner.get_vocab()
        return vocabulary

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the numbers of tokens."""
        return self.inner.convert_tokens_to_ids(tokens)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return tokens by their numbers."""
        return self.inner.convert_ids_to_tokens(ids, skip_special_tokens)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """Return the text of tokens, with the encoder's prefix."""
        if self.is_open_clip:
            return self.inner.decode(torch.as_tensor(token_ids).tolist())
        return self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> tuple[str, ...]:
        """Write the tokenizer_config.json, which names the encoder whose tokenizer this is."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"tokenizer_class": type(self).__name__, "encoder": self.spec.to_json()}
        write_atomically(folder / TOKENIZER_CONFIG_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
        return (str(folder / TOKENIZER_CONFIG_FILE),)
