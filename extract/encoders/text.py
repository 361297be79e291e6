"""Text encoders: their interface, and those of transformers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from sail_align.extract.encoders.catalogue import TransformersText
from sail_align.extract.encoders.identity import GOLDEN_TEXTS
from sail_align.extract.encoders.pooling import pool_tokens
from sail_align.extract.encoders.runtime import FrozenEncoder, Runtime, tf32_products
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

TEXTS_PER_BLOCK = 4_096
"""Texts that are tokenized at once."""
CPU_TOKENS, GPU_TOKENS = 2_048, 262_144
"""Tokens per batch on a CPU, where 8,192 exceed the caches (MiniLM is 12 % slower); and at most on a GPU."""
NO_TOKEN = -1
"""Fills tensors of tokens after the end of a text. A padding token would not do: it can also occur in a text."""

Tokens = dict[str, list[list[int]]]
"""The output of a tokenizer: `input_ids` and other inputs of the model, one list of numbers per text."""


class TextEncoder(FrozenEncoder, ABC):
    """A frozen text encoder."""

    @abstractmethod
    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = ...) -> Tensor:
        """Return pooled features, (B, D) float32 on the CPU. Texts are truncated to the token limit.

        Any number of texts is encoded, in batches that suit the device. Features depend on the other texts by no more
        than rounding.

        Args:
            texts: At least one text.
            advance: Called after each batch with the number of its texts.
        """

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts, (B, T) int64, in a form that only `encode_tokens` needs to understand."""

    @abstractmethod
    def encode_tokens(self, tokens_BT: Tensor, advance: Callable[[int], object] = ...) -> Tensor:
        """Return the same as `encode` for the texts with these tokens."""


class TransformersTextEncoder(TextEncoder):
    """A `TextEncoder`: a tokenizer, a transformers model, and a pooling of its last token states."""

    def __init__(
        self, id: str, files: EncoderFiles, model: nn.Module, entry: TransformersText, pooling: str, runtime: Runtime
    ):
        super().__init__(model, runtime)
        self._pooling = pooling
        self._prefix = entry.prefix
        self.tokenizer = load_tokenizer_files(files.path)
        self._token_limit = min(entry.token_limit, self.tokenizer.model_max_length)
        self.identity = files.identify(
            torch.cat([self.encode([text]) for text in GOLDEN_TEXTS]),
            ["torch", "transformers", "tokenizers"],
            id=id,
            modality="text",
            preprocessing={"prefix": entry.prefix, "token_limit": self._token_limit},
            pooling=pooling,
            precision=runtime.precision,
        )

    @cached_property
    def token_budget(self) -> int:
        """Number of tokens per batch on this device, including padding."""
        longest = [self.tokenizer.pad_token_id or 0] * self._token_limit

        def encode(tokens: int) -> None:
            self._encode_batch({"input_ids": [longest[:tokens]] * max(tokens // self._token_limit, 1)})

        return self._runtime.batch_size(encode, on_cpu=CPU_TOKENS, at_most=GPU_TOKENS)

    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return pooled features, (B, D) float32 on the CPU. Texts of similar length are encoded together."""
        return self._encode_blocks(self._tokenize_blocks(texts), advance)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts, (B, token limit) int64, with `NO_TOKEN` after the end of each text."""
        tokens_BT = torch.full((len(texts), self._token_limit), NO_TOKEN)
        for block, tokens in self._tokenize_blocks(texts):
            for row, ids in zip(block, tokens["input_ids"], strict=True):
                tokens_BT[row, : len(ids)] = torch.tensor(ids)
        return tokens_BT

    def encode_tokens(self, tokens_BT: Tensor, advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the features of texts from the output of `tokenize`, (B, D) float32 on the CPU."""
        ids = [row_T[row_T != NO_TOKEN].tolist() for row_T in tokens_BT.cpu()]
        return self._encode_blocks([(list(range(len(ids))), {"input_ids": ids})], advance)

    def _encode_blocks(
        self, blocks: Iterable[tuple[list[int], Tokens]], advance: Callable[[int], object] = lambda done: None
    ) -> Tensor:
        """Encode the rows of each block in batches of similar length; return the features in the order of the rows."""
        rows: list[int] = []
        features: list[Tensor] = []
        for block, tokens in blocks:
            for batch in pack([len(ids) for ids in tokens["input_ids"]], self.token_budget):
                rows += [block[i] for i in batch]
                batch_tokens = {name: [values[i] for i in batch] for name, values in tokens.items()}
                features.append(self._encode_batch(batch_tokens))
                advance(len(batch))
        features_BD = torch.cat(features)
        return torch.empty_like(features_BD).index_copy_(0, torch.tensor(rows), features_BD)

    def _tokenize_blocks(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tokens]]:
        """Yield rows and tokens of texts in order of length. The next block is tokenized while one is encoded."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        blocks = [order[start : start + TEXTS_PER_BLOCK] for start in range(0, len(order), TEXTS_PER_BLOCK)]

        def tokenize(block: list[int]) -> Tokens:
            prefixed = [self._prefix + texts[row] for row in block]
            return dict(self.tokenizer(prefixed, truncation=True, max_length=self._token_limit))

        with ThreadPoolExecutor(1) as worker:
            next_tokens = worker.submit(tokenize, blocks[0])
            for block, following in zip_longest(blocks, blocks[1:]):
                tokens = next_tokens.result()
                if following:
                    next_tokens = worker.submit(tokenize, following)
                yield block, tokens

    @torch.no_grad()
    @tf32_products()
    def _encode_batch(self, tokens: Tokens) -> Tensor:
        """Return the features of one batch, padded to its longest text."""
        padded = self.tokenizer.pad(tokens, return_tensors="pt").to(self.device)
        hidden_BTD = self.network(**padded).last_hidden_state
        return pool_tokens(hidden_BTD, padded["attention_mask"], self._pooling).float().cpu()


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group items of similar length into batches; return the positions of each, shortest items first.

    Padded to its longest item, a batch has at most `budget` cells, unless a single item has more.
    """
    batches: list[list[int]] = [[]]
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[position] > budget:
            batches.append([])
        batches[-1].append(position)
    return batches if lengths else []


def load_tokenizer_files(path: Path) -> Any:
    """Load the tokenizer of a model. transformers returns an empty one if the files are missing.

    Raises:
        UserError: There is none, or it has no vocabulary.
    """
    advice = "Save it with the model, with `tokenizer.save_pretrained`."
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} has no tokenizer that can be loaded. {advice}") from problem
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"The tokenizer in {path} has no vocabulary. {advice}")
    return tokenizer
