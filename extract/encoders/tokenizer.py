"""The tokenizer of a text encoder, with the changes that the encoder needs."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sail_align.extract.errors import UserError

_TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
_TEMPLATE["pair"] = [*_TEMPLATE["single"], {"Sequence": {"id": "B", "type_id": 1}}]


def load_tokenizer_files(path: Path, *, end: str = "", lowercase: bool = False) -> Any:
    """Load the tokenizer of a model. transformers returns an empty one if the files are missing.

    Args:
        path: The folder.
        end: Token that ends each text, within the limit on tokens. It is added if the tokenizer does not add it.
        lowercase: Convert texts to lower case.

    Raises:
        UserError: There is none, it has no vocabulary, or it cannot be changed as needed.
    """
    advice = "Save it with the model, with `tokenizer.save_pretrained`."
    try:
        tokenizer = _load(path)
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} has no tokenizer that can be loaded. {advice}") from problem
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"The tokenizer in {path} has no vocabulary. {advice}")
    if tokenizer.pad_token_id is None:  # any token does, because padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if (lowercase or end) and not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"The tokenizer in {path} is invalid: got one in plain Python. {advice}")
    if lowercase:
        _lowercase(tokenizer.backend_tokenizer)
    if end:
        _append(tokenizer, end, path)
    return tokenizer


def _load(path: Path) -> Any:
    """Load a tokenizer without running code of its repository, which transformers otherwise asks for on a terminal."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ValueError:  # the config or the tokenizer needs that code; tokenizer.json does not
        if not (path / "tokenizer.json").is_file():
            raise
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def _lowercase(backend: Any) -> None:
    """Convert texts to lower case before anything else."""
    rest = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])


def _append(tokenizer: Any, end: str, path: Path) -> None:
    """Let a token end each text.

    transformers 5 takes the post-processor of `tokenizer.json` as it is, where earlier versions added the token that
    `add_eos_token` in `tokenizer_config.json` asks for. The last token of a text is then another one, without an error.
    """
    number = tokenizer.convert_tokens_to_ids(end)
    if number is None or tokenizer.convert_ids_to_tokens(number) != end:
        raise UserError(f"The tokenizer in {path} is invalid: it has no token {end!r}, which must end each text.")
    if tokenizer("a")["input_ids"][-1] == number:
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    processor = state["post_processor"]
    parts = (
        processor["processors"] if processor and processor["type"] == "Sequence" else [processor] if processor else []
    )
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    if template is None:
        if any(part["type"] != "ByteLevel" for part in parts):
            raise UserError(
                f"The tokenizer in {path} is invalid: its {parts[0]['type']} cannot end texts with {end!r}."
            )
        parts.append(template := json.loads(json.dumps(_TEMPLATE)))
    template["single"].append({"SpecialToken": {"id": end, "type_id": 0}})
    template["special_tokens"][end] = {"id": end, "ids": [number], "tokens": [end]}
    state["post_processor"] = {"type": "Sequence", "processors": parts}
    tokenizer.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor
