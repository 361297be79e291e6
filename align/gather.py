"""Rows gathered out of chunks: by a loop in C, or by NumPy where the package was installed without a C compiler."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from sail_align.align._gather import gather
except ImportError:
    gather = None  # type: ignore[assignment]


def take_rows(
    chunks: Sequence[NDArray[Any]], of: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Copy row `rows[n]` of `chunks[of[n]]` to `out[n]`, for all n: chunks (·, …), `of` and `rows` (N,), out (N, …).

    Raises:
        IndexError: A chunk has no such row.
        ValueError: The rows of a chunk have another shape than those of `out`.
    """
    plain = out.flags.c_contiguous and all(
        each.flags.c_contiguous and each.dtype == out.dtype and each.shape[1:] == out.shape[1:] for each in chunks
    )
    if gather is not None and plain and len(out):
        gather(tuple(chunks), of, rows, out)
        return
    for number in np.unique(of).tolist():
        places = np.flatnonzero(of == number)
        out[places] = chunks[number][rows[places]]
