"""Repositories of sentence-transformers: what surrounds the network, as their `modules.json` and configs say.

Everything that the library does to a text is honoured, or refused with a message. The library itself is not needed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sail_align.extract.encoders.after_pooling import AfterPooling, NotSupportedError, module_config, read_after
from sail_align.extract.encoders.catalogue import TransformersText
from sail_align.extract.encoders.pooling import TEXT_POOLINGS
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

MODULES = "modules.json"
LONGEST = 8_192
"""Limit on the tokens of a text if a repository sets none, or a higher one. Captions are far shorter."""
_TRANSFORMER_CONFIGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_DOCUMENTS = ("document", "passage", "corpus")
"""Names of prompts for documents, which captions are, in the order of the library's `encode_document`."""
_EARLIER_POOLINGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
_TEXT_MODE = {"method": "forward", "method_output_name": "last_hidden_state"}
_HARMLESS = {"max_seq_length", "do_lower_case", "unpad_inputs", "modality_config", "module_output_name"}
"""Settings of a Transformer that are honoured below, or that only change its speed."""


@dataclass(frozen=True)
class Repository:
    """The steps of a sentence-transformers repository before and after its network.

    Attributes:
        entry: The encoder with the repository's pooling, prompt, limit on tokens and case.
        modules: Names of its modules with their settings, for the spec.
        after: The modules after the pooling.
        files: Its files, identified together with the weights of these modules.
    """

    entry: TransformersText
    modules: list[str]
    after: AfterPooling
    files: EncoderFiles


def read_repository(files: EncoderFiles, entry: TransformersText) -> Repository | None:
    """Read the steps of a repository around its network. Return None if it is not one of sentence-transformers.

    Raises:
        UserError: It does something that has no counterpart here.
    """
    folder = files.path
    if not (folder / MODULES).is_file():
        return None
    listed = _read_modules(folder)
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or listed[0][1]:
        raise _refusal(folder, f"{MODULES} lists {', '.join(kinds)}", "Transformer in its root, then Pooling, first")
    files = files.with_parts([path for _, path in listed[1:] if path])
    pooling, pools_prefix = _read_pooling(files, listed[1][1])
    try:
        after = [read_after(kind, files, path) for kind, path in listed[2:]]
    except NotSupportedError as problem:
        raise _refusal(folder, *problem.args) from problem
    config, positions = _read_transformer(folder), files.config.get("max_position_embeddings", 0)
    limit = config.get("max_seq_length") or (positions if positions > 0 else LONGEST)
    changed = replace(
        entry,
        pooling=pooling,
        pools_prefix=pools_prefix,
        prefix=_document_prompt(folder),
        token_limit=min(limit, LONGEST),
        lowercase=bool(config.get("do_lower_case")),
        end=_end_token(folder),
        exact_limit=bool(config.get("max_seq_length")),
    )
    return Repository(
        changed, [*kinds[:2], *(name for _, name in after)], AfterPooling(*(each for each, _ in after)), files
    )


def _refusal(folder: Path, got: str, expected: str) -> UserError:
    return UserError(
        f"{folder} cannot be used as its authors use it: {got}, expected {expected}. Pass --text-pooling to take the "
        "token states of its network instead."
    )


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """Return the kinds and folders of the modules."""
    try:
        listed = json.loads((folder / MODULES).read_text())
        found = [(str(each["type"]), str(each.get("path", ""))) for each in listed]
    except (ValueError, TypeError, KeyError) as problem:
        raise UserError(f"{folder / MODULES} is invalid: expected a list of modules. Download it again.") from problem
    for kind, path in found:
        if not kind.startswith("sentence_transformers."):
            raise _refusal(folder, f"module {kind} is code of its own", "modules of sentence-transformers")
        if path and not re.fullmatch(r"\w[\w.-]*", path):
            raise UserError(f"{folder / MODULES} is invalid: got the path {path!r}, expected the name of a folder.")
    return [(kind.rpartition(".")[2], path) for kind, path in found]


def _read_transformer(folder: Path) -> dict[str, Any]:
    """Return the settings of the Transformer."""
    name = next((name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file()), None)
    config = EncoderFiles.read_json(folder, name) if name else {}
    modes = config.get("modality_config", {"text": _TEXT_MODE})
    if not isinstance(modes, Mapping) or dict(modes.get("text", {})) != _TEXT_MODE or "message" in modes:
        raise _refusal(folder, f"modality_config is {json.dumps(modes)}", "texts as they are, to last_hidden_state")
    if config.get("module_output_name", "token_embeddings") != "token_embeddings":
        raise _refusal(folder, f"module_output_name is {config['module_output_name']!r}", "token_embeddings")
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _refusal(folder, f"transformer_task is {config['transformer_task']!r}", "feature-extraction")
    for key in sorted(config.keys() - _HARMLESS - {"transformer_task"}):
        settings = config[key]
        if isinstance(settings, dict):  # arguments of from_pretrained; the precision is the user's
            settings = {name: value for name, value in settings.items() if name not in ("torch_dtype", "dtype")}
        if settings:
            raise _refusal(folder, f"{key} is {json.dumps(settings)}", "none")
    return config


def _read_pooling(files: EncoderFiles, path: str) -> tuple[str, bool]:
    """Return the pooling, and whether tokens of the prompt are pooled."""
    config = module_config(files, path)
    modes = config.get("pooling_mode")
    if modes is None:  # before version 6 of the library
        modes = [name for name, key in _EARLIER_POOLINGS.items() if config.get(f"pooling_mode_{key}")] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = ["last" if mode == "lasttoken" else mode for mode in modes]
    if unknown := [mode for mode in ours if mode not in TEXT_POOLINGS]:
        raise _refusal(files.path, f"its pooling is {unknown[0]!r}", f"one of {', '.join(TEXT_POOLINGS)}")
    return "+".join(ours), bool(config.get("include_prompt", True))


def _document_prompt(folder: Path) -> str:
    """Return the prompt that is put before captions: that for documents, or else the default one."""
    name = "config_sentence_transformers.json"
    config = EncoderFiles.read_json(folder, name) if (folder / name).is_file() else {}
    if (kind := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise _refusal(folder, f"its model_type is {kind!r}", "SentenceTransformer")
    prompts = config.get("prompts") or {}
    chosen = next((name for name in _DOCUMENTS if name in prompts), config.get("default_prompt_name"))
    if chosen is not None and chosen not in prompts:
        raise _refusal(folder, f"its default_prompt_name is {chosen!r}", f"one of {', '.join(prompts) or 'none'}")
    return str(prompts.get(chosen) or "")


def _end_token(folder: Path) -> str:
    """Return the token that must end each text, empty if the tokenizer decides."""
    name = "tokenizer_config.json"
    config = EncoderFiles.read_json(folder, name) if (folder / name).is_file() else {}
    token = config.get("eos_token") if config.get("add_eos_token") else None
    return str(token.get("content", "") if isinstance(token, dict) else token or "")
