"""Text encoders of transformers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from sail_align.extract.encoders.base import SENTENCE, EncoderSpec, Identity, golden_vector, versions
from sail_align.extract.encoders.pooling import pool_tokens
from sail_align.extract.encoders.runtime import Runtime, pack
from sail_align.extract.encoders.weights import Checkpoint
from sail_align.extract.errors import UserError

BLOCK = 4_096
"""Texts that are tokenized at once."""
CPU_TOKENS, GPU_TOKENS = 2_048, 262_144
"""Tokens at once on a CPU, whose caches more of them leave (MiniLM is 12 % slower with 8,192); and at most on a GPU."""


NO_TOKEN = -1
"""Fills a tensor of tokens: no vocabulary has it, where a padding token can be a word of the text too."""

Tokens = dict[str, list[list[int]]]
"""What a tokenizer makes of texts: `input_ids` and what else the model takes, a list of numbers a text."""


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

    @cached_property
    def token_budget(self) -> int:
        """How many tokens a batch has at its best on this device, padding included."""
        longest = [self._tokenizer.pad_token_id or 0] * self._token_limit

        def encode(tokens: int) -> None:
            self._encode({"input_ids": [longest[:tokens]] * max(tokens // self._token_limit, 1)})

        return self._runtime.batch_size(encode, on_cpu=CPU_TOKENS, at_most=GPU_TOKENS)

    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return pooled features, (B, D) float32 on the CPU. Texts beyond the limit are cut.

        Texts of like length are encoded together, as many as fill the budget. `advance` is told how many more are done.
        """
        return self._encode_all(self._tokenized(texts), advance)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts in one tensor, (B, token limit) int64; behind a text's end it is `NO_TOKEN`."""
        tokens_BT = torch.full((len(texts), self._token_limit), NO_TOKEN)
        for block, tokens in self._tokenized(texts):
            for row, ids in zip(block, tokens["input_ids"], strict=True):
                tokens_BT[row, : len(ids)] = torch.tensor(ids)
        return tokens_BT

    def encode_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Return the features of texts as `tokenize` gives them, (B, D) float32 on the CPU: those of `encode`."""
        ids = [row_T[row_T != NO_TOKEN].tolist() for row_T in tokens_BT.cpu()]
        return self._encode_all([(list(range(len(ids))), {"input_ids": ids})])

    def _encode_all(
        self, blocks: Iterable[tuple[list[int], Tokens]], advance: Callable[[int], object] = lambda done: None
    ) -> Tensor:
        rows: list[int] = []
        features: list[Tensor] = []
        for block, tokens in blocks:
            for batch in pack([len(ids) for ids in tokens["input_ids"]], self.token_budget):
                rows += [block[i] for i in batch]
                features.append(self._encode({name: [values[i] for i in batch] for name, values in tokens.items()}))
                advance(len(batch))
        features_BD = torch.cat(features)
        return torch.empty_like(features_BD).index_copy_(0, torch.tensor(rows), features_BD)

    def _tokenized(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tokens]]:
        """Yield the rows and tokens of blocks of like length; the next block is tokenized while one is encoded."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        blocks = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]

        def tokenize(block: list[int]) -> Tokens:
            prefixed = [self._prefix + texts[row] for row in block]
            return dict(self._tokenizer(prefixed, truncation=True, max_length=self._token_limit))

        with ThreadPoolExecutor(1) as worker:
            next_tokens = worker.submit(tokenize, blocks[0])
            for block, following in zip_longest(blocks, blocks[1:]):
                tokens = next_tokens.result()
                if following:
                    next_tokens = worker.submit(tokenize, following)
                yield block, tokens

    @torch.no_grad()
    def _encode(self, tokens: Tokens) -> Tensor:
        """Return the features of one batch, padded to its longest text."""
        padded = self._tokenizer.pad(tokens, return_tensors="pt").to(self._runtime.device)
        hidden_BTD = self._model(**padded).last_hidden_state
        return pool_tokens(hidden_BTD, padded["attention_mask"], self._pooling).float().cpu()


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
