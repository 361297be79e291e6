"""Text encoders: their interface, and those of transformers."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from sail_align.extract.encoders.after_pooling import AfterPooling
from sail_align.extract.encoders.catalogue import TransformersText
from sail_align.extract.encoders.identity import GOLDEN_TEXTS, LAST_LAYER
from sail_align.extract.encoders.layers import OUTPUT, TransformersLayers, require_depth
from sail_align.extract.encoders.pooling import pool_tokens
from sail_align.extract.encoders.runtime import FrozenEncoder, Runtime, in_own_precision
from sail_align.extract.encoders.tokenizer import load_tokenizer_files
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

TEXTS_PER_BLOCK = 4_096
"""Texts that are tokenized at once."""
CPU_TOKENS, GPU_TOKENS = 2_048, 262_144
"""Tokens per batch on a CPU, where 8,192 exceed the caches (MiniLM is 12 % slower); and at most on a GPU."""
TRIED_TOKENS = 1_024
"""Longest text with which batch sizes are tried. Captions are shorter."""
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
    """A `TextEncoder`: a tokenizer, a transformers model, and a pooling of its last token states.

    Args:
        id: Name for the spec.
        files: Files of the model and its tokenizer.
        model: The network.
        entry: What is around the network. It has a pooling.
        runtime: Device and precision.
        after: Modules after the pooling of a repository of sentence-transformers.
        modules: Names of all modules of that repository, for the spec.
        layers: Layers to pool, counted from the end. Of several, the features are concatenated. The modules after the
            pooling are for the output alone.
    """

    def __init__(
        self,
        id: str,
        files: EncoderFiles,
        model: nn.Module,
        entry: TransformersText,
        runtime: Runtime,
        after: AfterPooling | None = None,
        modules: Sequence[str] = (),
        layers: tuple[int, ...] = OUTPUT,
    ):
        super().__init__(model, runtime)
        self._layers = layers
        self._inner: TransformersLayers | None = None
        if layers != OUTPUT:
            tokens_BT = torch.zeros(1, 4, dtype=torch.long, device=self.device)
            self._inner = TransformersLayers(model, id, input_ids=tokens_BT)
            require_depth(layers, self._inner.depth, id)
        self._pooling = entry.pooling or "mean"
        self._prefix = entry.prefix
        self._after = runtime.freeze(after) if after else None
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self.tokenizer = load_tokenizer_files(files.path, end=entry.end, lowercase=entry.lowercase)
        limit = self.tokenizer.model_max_length
        self._token_limit = entry.token_limit if entry.exact_limit else min(entry.token_limit, limit)
        self._not_pooled = 0 if entry.pools_prefix or not entry.prefix else self._count_prefix()
        golden_GD = torch.cat([self._encode_batch(self._tokenize([text])) for text in GOLDEN_TEXTS])
        self.identity = files.identify_layers(
            layers,
            torch.split(golden_GD, self._widths, dim=1),
            ["torch", "transformers", "tokenizers"],
            id=id,
            modality="text",
            preprocessing=preprocessing_facts(entry, self._token_limit, modules),
            pooling=self._pooling,
            precision=runtime.precision,
        )

    @cached_property
    def token_budget(self) -> int:
        """Number of tokens per batch on this device, including padding."""
        length = min(self._token_limit, TRIED_TOKENS)
        longest = [self.tokenizer.pad_token_id or 0] * length

        def encode(tokens: int) -> None:
            self._encode_batch({"input_ids": [longest[:tokens]] * max(tokens // length, 1)})

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
            return self._tokenize([texts[row] for row in block])

        with ThreadPoolExecutor(1) as worker:
            next_tokens = worker.submit(tokenize, blocks[0])
            for block, following in zip_longest(blocks, blocks[1:]):
                tokens = next_tokens.result()
                if following:
                    next_tokens = worker.submit(tokenize, following)
                yield block, tokens

    def _tokenize(self, texts: Sequence[str]) -> Tokens:
        prefixed = [self._prefix + text for text in texts]
        return dict(self.tokenizer(prefixed, truncation=True, max_length=self._token_limit))

    def _count_prefix(self) -> int:
        """Return the number of tokens of the prefix with those before it, as sentence-transformers counts them."""
        ids = self.tokenizer(self._prefix)["input_ids"]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def pool(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the features of token states, (B, D).

        Args:
            hidden_BTD: The token states.
            mask_BT: 1 for tokens of the text, 0 for padding on either side.
        """
        features_BD = pool_tokens(hidden_BTD, mask_BT, self._pooling, self._not_pooled)
        return self._after(features_BD) if self._after else features_BD

    @in_own_precision
    def _encode_batch(self, tokens: Tokens) -> Tensor:
        """Return the features of one batch, padded to its longest text. They are NaN for a text without tokens."""
        padded = self.tokenizer.pad(tokens, return_tensors="pt").to(self.device)
        mask_BT = padded["attention_mask"]
        inputs = {name: each for name, each in padded.items() if name != "token_type_ids" or name in self._accepted}
        if self._inner is None:
            pooled = [self.pool(token_states(self.network(**inputs)), mask_BT)]
        else:
            states = zip(self._layers, self._inner.states(self._layers, **inputs), strict=True)
            pooled = [
                self.pool(hidden_BTD, mask_BT)
                if layer == LAST_LAYER
                else pool_tokens(hidden_BTD, mask_BT, self._pooling, self._not_pooled)
                for layer, hidden_BTD in states
            ]
        self._widths = [each.shape[1] for each in pooled]
        features_BD = torch.cat([each.float() for each in pooled], dim=1)
        return features_BD.masked_fill(mask_BT.sum(dim=1, keepdim=True) == 0, float("nan")).cpu()


def preprocessing_facts(entry: TransformersText, token_limit: int, modules: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is recorded of how texts are prepared. Facts of recent versions are left out where they are defaults.

    Args:
        entry: What is around the network.
        token_limit: Limit on the tokens of a text.
        modules: Names of the modules of a repository of sentence-transformers that is used as it is.
    """
    recent = {
        "end": entry.end,
        "bidirectional": entry.bidirectional,
        "lowercase": entry.lowercase,
        "pools_prefix": entry.pools_prefix,
        "modules": list(modules),
    }
    default = {"end": "", "bidirectional": False, "lowercase": False, "pools_prefix": True, "modules": []}
    facts = {"prefix": entry.prefix, "token_limit": token_limit}
    return facts | {name: value for name, value in recent.items() if value != default[name]}


def token_states(output: Any) -> Tensor:
    """Return the token states in the output of a network, (B, T, D).

    Raises:
        UserError: It has none. Code of a repository may return anything.
    """
    if (hidden_BTD := getattr(output, "last_hidden_state", None)) is None:
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        hidden_BTD = next((each for each in values if isinstance(each, Tensor) and each.ndim == 3), None)
    if hidden_BTD is None:
        raise UserError(f"The network is invalid: it returns {type(output).__name__} without token states (B, T, D).")
    states_BTD: Tensor = hidden_BTD
    return states_BTD


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
