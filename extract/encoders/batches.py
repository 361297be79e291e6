"""How much is encoded at once."""

from collections.abc import Callable, Sequence

import torch

from sail_align.extract.errors import UserError


def largest_batch(encode: Callable[[int], object], limit: int) -> int:
    """Return how many items a device's memory takes: 1, 2, 4 … are tried up to `limit`, itself a power of two.

    A quarter is left free where memory ran out, for what varies between batches.

    Raises:
        UserError: Not even one fits.
    """
    fits = 0
    while fits < limit:
        try:
            encode(fits * 2 or 1)
        except torch.OutOfMemoryError as problem:
            if not fits:
                raise UserError(
                    "The encoder does not fit into the device's memory; use --precision bfloat16."
                ) from problem
            torch.cuda.empty_cache()
            return max(fits * 3 // 4, 1)
        fits = fits * 2 or 1
    return fits


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items of like length together: the positions of each batch, shortest items first.

    A batch padded to its longest item has at most `budget` cells, unless one item alone has more.
    """
    batches: list[list[int]] = [[]]
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[position] > budget:
            batches.append([])
        batches[-1].append(position)
    return batches if lengths else []
