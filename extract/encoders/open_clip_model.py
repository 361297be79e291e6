"""Find and load a model of OpenCLIP, SigLIP's among them: one checkpoint with a tower for images and one for texts."""

import difflib
import hashlib
import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sail_align.extract.encoders.catalogue import Folder, OpenClip
from sail_align.extract.encoders.checkpoint import Checkpoint
from sail_align.extract.errors import UserError
from sail_align.extract.files import file_digest

CONFIG = "open_clip_config.json"


def load_open_clip(origin: OpenClip | Folder) -> tuple[Any, Any, Checkpoint]:
    """Return a model in float32 on the CPU, its tokenizer, and what of its origin belongs in a spec.

    Raises:
        UserError: open_clip is not installed or has no such model or weights, or they cannot be had or do not fit.
    """
    try:
        open_clip: Any = importlib.import_module("open_clip")
    except ImportError as problem:
        raise UserError(
            "OpenCLIP's models need open_clip, which is not installed: pip install 'sail-align[eval]'."
        ) from problem
    if isinstance(origin, Folder):
        checkpoint, name, pretrained = _in_folder(origin.path), f"local-dir:{origin.path}", None
    else:
        checkpoint, name, pretrained = _published(open_clip, origin), origin.model, origin.weights
    try:
        with _silent():
            model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(f"open_clip cannot load {name}: {' '.join(str(problem).split())[:300]}") from problem
    return model.eval(), tokenizer, checkpoint


def _published(open_clip: Any, origin: OpenClip) -> Checkpoint:
    known = open_clip.list_models()
    if origin.model not in known:
        near = " or ".join(difflib.get_close_matches(origin.model, known, n=3)) or "one of open_clip.list_models()"
        raise UserError(f"open_clip has no model {origin.model!r}; did you mean {near}?")
    tags = open_clip.list_pretrained_tags_by_model(origin.model)
    if origin.weights not in tags:
        there = ", ".join(tags) or "none"
        raise UserError(f"open_clip has no weights {origin.weights!r} of {origin.model}; there are: {there}.")
    published = open_clip.get_pretrained_cfg(origin.model, origin.weights)
    # Weights trained with the one activation give worse numbers with the other, and no error.
    if bool(published.get("quick_gelu")) != bool(open_clip.get_model_config(origin.model).get("quick_gelu")):
        other = origin.model.removesuffix("-quickgelu")
        other = f"{other}-quickgelu" if published.get("quick_gelu") else other
        raise UserError(
            f"The weights {origin.weights!r} were trained with another activation than {origin.model} has; write "
            f"open_clip:{other}@{origin.weights}."
        )
    try:
        with _silent():
            file = Path(open_clip.download_pretrained(published))
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(
            f"The weights {origin.weights!r} of {origin.model} cannot be had and are not in the local cache; check the "
            "connection."
        ) from problem
    source = {"loader": "open_clip", "model": origin.model, "weights": origin.weights}
    return Checkpoint(file, source, str(file_digest(file)))


def _in_folder(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG).is_file() or len(files) != 1:
        raise UserError(f"{folder} is no folder of an OpenCLIP model: it needs {CONFIG} and one file of safetensors.")
    try:
        config = json.dumps(json.loads((folder / CONFIG).read_bytes()), sort_keys=True)
    except ValueError as problem:
        raise UserError(f"{folder / CONFIG} is not valid JSON: {problem}.") from problem
    source = {"loader": "open_clip", "config": hashlib.sha256(config.encode()).hexdigest()}
    return Checkpoint(folder, source, str(file_digest(files[0])), str(folder.resolve()))


@contextmanager
def _silent() -> Iterator[None]:
    """Keep open_clip's log, which it writes to the root logger, out of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
