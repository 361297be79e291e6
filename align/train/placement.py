"""Where the features are during training: on the GPU, in memory, or in their stores (`--cache`)."""

from typing import Literal

import torch

from sail_align.align.data.cache import Cache
from sail_align.align.data.loader import Source, Stream
from sail_align.align.settings import CacheChoice
from sail_align.align.train.step import Stepper
from sail_align.extract.errors import UserError, format_bytes
from sail_align.extract.system.memory import free_memory
from sail_align.extract.system.progress import note

Place = Literal["device", "host", "none"]

RESERVE = 1 << 30
"""Bytes of a GPU that are left for libraries and for gaps between tensors."""

BATCHES = 3
"""Batches on a GPU at a time: one in use, the next one, and rows of one that are passed on to other processes."""


def place_features(asked: CacheChoice, stream: Stream, stepper: Stepper, *, permuted: bool, quiet: bool) -> Source:
    """Return the source of the batches of a stream: the stream, or a cache that is loaded with its rows.

    All processes of a run get the same kind.

    Args:
        asked: Value of `--cache`. The choice for `auto` is printed.
        stream: The stream.
        stepper: The steps that will use the batches.
        permuted: Whether each epoch is a full permutation, which needs a cache.
        quiet: Print nothing, as in all processes but the leader.

    Raises:
        UserError: The features do not fit where they should be, or are damaged.
    """
    place, reason = choose_place(asked, stream, stepper, permuted=permuted)
    world = stepper.world
    if asked == "auto" and not quiet:
        note(f"Features: {reason}.")
    if place == "none":
        return stream
    device = stepper.device if place == "device" else None
    move = world.move if world.size > 1 else None

    def load() -> Cache:
        try:
            return Cache(stream, device, move, quiet=quiet)
        except torch.OutOfMemoryError as problem:
            size = format_bytes(Cache.bytes_of(stream))
            raise UserError(f"There was no room for {size} of features on the GPU. Use --cache host.") from problem

    return world.every(load)


def choose_place(asked: CacheChoice, stream: Stream, stepper: Stepper, *, permuted: bool) -> tuple[Place, str]:
    """Return where the features should be, and why, given the arguments of `place_features`."""
    always = any(pairs.verify == "always" for pairs in stream.pairs)
    _check(asked, always=always, permuted=permuted)
    if asked == "none":
        return "none", "read from the stores"
    if always:
        return "none", "read from the stores, to compare them with their checksums in every epoch"
    on_gpu = stepper.device.type == "cuda"
    fits, sizes = _fits(stream, stepper)
    places = {"device": "on the GPU" if on_gpu else "in memory", "host": "in memory"}
    if asked != "auto":
        if fits[asked]:
            return asked, f"{places[asked]} ({sizes[asked]})"
        raise UserError(f"The features do not fit {places[asked]} ({sizes[asked]}). Use --cache auto.")
    mapped = all(array.mapped for pairs in stream.pairs for array in pairs.parts)
    if on_gpu and fits["device"]:
        return "device", f"on the GPU ({sizes['device']})"
    if fits["host"] and on_gpu:
        return "host", f"in memory, as they do not fit on the GPU ({sizes['device']})"
    if fits["host"] and (permuted or not mapped):
        why = "--order permuted" if permuted else "the stores cannot be mapped"
        return "host", f"in memory ({sizes['host']}; {why})"
    if permuted:
        raise UserError(f"--order permuted needs the features in memory ({sizes['host']}). Use --order windows.")
    if fits["host"]:
        return "none", "read from the stores, whose files are mapped into memory"
    return "none", f"read from the stores, as they do not fit in memory ({sizes['host']})"


def _check(asked: CacheChoice, *, always: bool, permuted: bool) -> None:
    if always and (permuted or asked in ("device", "host")):
        other = "--order permuted" if permuted else f"--cache {asked}"
        raise UserError(
            f"--verify always has no effect with {other}: features in memory are compared with their checksums once. "
            "Leave one of them out."
        )
    if permuted and asked == "none":
        raise UserError("--order permuted needs the features in memory. Use --cache auto, host or device.")


def _fits(stream: Stream, stepper: Stepper) -> tuple[dict[str, bool], dict[str, str]]:
    """Return whether the features fit on the device and in memory, in all processes, and the sizes in words."""
    world = stepper.world
    features, memory = Cache.bytes_of(stream), free_memory() // world.local
    fits_in_memory = 2 * features <= memory
    each = " in each process" if world.size > 1 else ""
    in_memory = f"{format_bytes(features)}{each}, of {format_bytes(memory)} free, half of which may be used"
    fits_on_device, on_device = fits_in_memory, in_memory
    if stepper.device.type == "cuda":
        rows, free = stream.parts[0].stop, stepper.free()
        step = stepper.memory(rows, stream.policy.positives) + BATCHES * rows * stream.row_bytes + RESERVE
        fits_on_device = features + step <= free
        on_device = (
            f"{format_bytes(features)}{each}, beside {format_bytes(step)} for a step, of {format_bytes(free)} free"
        )
    seen = world.collect((fits_on_device, fits_in_memory))
    return (
        {"device": all(one for one, _ in seen), "host": all(one for _, one in seen)},
        {"device": on_device, "host": in_memory},
    )
