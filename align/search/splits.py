"""The rows that a run was trained on and those that it held out, found again from its settings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sail_align.align.data.pairs import Rows, count_rows, held_out_pictures, open_pairs
from sail_align.align.runs.checkpoint import Run
from sail_align.align.train.plan import hold_out
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

Split = Literal["training", "held-out"]
SPLITS: tuple[Split, ...] = ("training", "held-out")


def split_rows(run: Run, stores: Sequence[Store], split: Split) -> list[Rows]:
    """Return the rows (N,) of each store that a run was trained on, or that it held out.

    A store that it was not trained on has none.

    Raises:
        UserError: The run's stores are not among these, or its rows cannot be found again.
    """
    settings = run.settings
    opened = {store.digest: store for store in stores}
    used = settings.get("store_digests", [])
    if not used or not set(used) <= opened.keys():
        raise _unknown(run, "it was trained on other stores")
    if "excluded_keys" in settings:
        raise _unknown(run, "it left out rows with --exclude, whose keys it does not record")
    first, positives = opened[used[0]], settings.get("positives")
    texts = (found for name in settings["captions"] if (found := first.of(run.text, name)))
    image, text = (array.node if array else None for array in (first.of(run.image), next(texts, None)))
    pairs = open_pairs(
        [opened[digest].path for digest in used],
        settings["captions"],
        positives=positives,
        image_encoder=image,
        text_encoder=text,
    )
    usable = [each.usable(positives) for each in pairs]
    chosen = held_out = hold_out(pairs, usable, positives, settings["held_out"])
    if split == "training":
        chosen = [rows & ~held for rows, held in zip(usable, held_out, strict=True)]
        if count_rows(chosen) != settings["training_rows"]:  # pictures of held-out rows were left out
            copies = held_out_pictures(pairs, chosen, held_out)
            chosen = [rows & ~copied for rows, copied in zip(chosen, copies, strict=True)]
    if count_rows(chosen) != settings[f"{split.replace('-', '_')}_rows"]:
        raise _unknown(run, "another version chose them")
    by_digest = dict(zip(used, chosen, strict=True))
    return [by_digest.get(digest, np.zeros(store.rows, np.bool_)) for digest, store in opened.items()]


def _unknown(run: Run, reason: str) -> UserError:
    return UserError(f"The training and held-out rows of {run.path} are unknown: {reason}. Leave the split out.")
