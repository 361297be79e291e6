"""Which shards of a store are still to be done, and doing them in this process."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from sail_align.extract.encoders.base import TextEncoder, VisionEncoder
from sail_align.extract.features import FeatureArray
from sail_align.extract.memory import keep_freed_memory
from sail_align.extract.pipeline import Advance, Rows, encode_images, encode_texts
from sail_align.extract.progress import progress
from sail_align.extract.sources.base import Source
from sail_align.extract.store import Store

EncodeRows = Callable[[int, int, Advance], Rows]
"""Encodes rows start … stop − 1."""


@dataclass(frozen=True)
class Summary:
    """How many rows a call encoded, and in how long."""

    encoded: int
    seconds: float


def extract(
    store: Store,
    source: Source,
    *,
    image: VisionEncoder | None,
    text: TextEncoder | None,
    captions: Sequence[str],
    quiet: bool = False,
) -> Summary:
    """Fill a store: the images by `image`, each of `captions` by `text`; an encoder that is None is left out.

    Only shards without a valid marker are done, so a call that was stopped is taken up by calling again.

    Raises:
        UserError: The store holds features of another encoder under the same name.
    """
    started = time.monotonic()
    keep_freed_memory()
    jobs: list[tuple[FeatureArray, EncodeRows]] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as decoders:
        if image is not None:
            jobs.append((store.add_image(image.identity), partial(_image_rows, store, source, image, decoders)))
        if text is not None:
            jobs += [(store.add_text(text.identity, name), partial(_text_rows, store, name, text)) for name in captions]
        encoded = sum(_fill(array, encode, f"{store.dataset} {array.path}", quiet) for array, encode in jobs)
    return Summary(encoded, time.monotonic() - started)


def _image_rows(
    store: Store,
    source: Source,
    encoder: VisionEncoder,
    decoders: ThreadPoolExecutor,
    start: int,
    stop: int,
    advance: Advance,
) -> Rows:
    return encode_images(store.samples(start, stop, captions=[]), source, encoder, decoders, advance)


def _text_rows(store: Store, caption: str, encoder: TextEncoder, start: int, stop: int, advance: Advance) -> Rows:
    column = f"caption.{caption}"
    return encode_texts(store.index([column], start, stop)[column].to_pylist(), encoder, advance)


def _fill(array: FeatureArray, encode: EncodeRows, label: str, quiet: bool) -> int:
    """Write every shard of an array that has no valid marker; return the number of rows encoded."""
    todo = [shard for shard in array.shards if shard not in array.markers]
    rows = sum(stop - start for start, stop in map(array.span, todo))
    with progress(array.rows, label, done=array.rows - rows, quiet=quiet) as bar:
        for shard in todo:
            array.write(shard, *encode(*array.span(shard), bar.update))
    return rows
