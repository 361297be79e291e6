"""Files of safetensors whose bytes depend on their content alone."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as _numpy
from safetensors import torch as _torch
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file with these tensors, copied to the CPU if they are elsewhere."""
    return _with_sorted_header(_torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def save_arrays(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a file with these arrays and metadata."""
    contiguous = {name: np.asarray(values, order="C") for name, values in arrays.items()}
    return _with_sorted_header(_numpy.save(contiguous, dict(metadata) or None))


def _with_sorted_header(content: bytes) -> bytes:
    """Return a file with its header in a fixed order: metadata by name, then tensors as they follow in the file.

    safetensors keeps metadata in a hash table, whose order differs from process to process.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", None)
    tensors = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    fields = {name: {key: about[key] for key in ("dtype", "shape", "data_offsets")} for name, about in tensors}
    if metadata is not None:
        fields = {"__metadata__": dict(sorted(metadata.items())), **fields}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data stay aligned
    return len(text).to_bytes(8, "little") + text + content[start:]
