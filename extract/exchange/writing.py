"""Features of a store, or embeddings made of them, written in the formats of other programs.

npy, safetensors   img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet: clip-retrieval's layout
parquet            part-0.parquet, with the columns image_embedding and text_embedding
webdataset         0.tar, with 000000000.image.npy, .text.npy, .txt and .json for each row
about.json         where they come from: digests of the store, of its encoders, and of the run if there is one

Rows are in the order of the store. A row is left out unless all arrays that are written have features of it, so that no
file contains NaN and row i is the same sample in every file. With several captions, the parts of a caption are in
text_emb_<caption>, and columns are named text_embedding_<caption> and caption_<caption>.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sail_align.extract.data import Status
from sail_align.extract.errors import UserError, listing
from sail_align.extract.exchange.features import FOLDERS, METADATA
from sail_align.extract.store.index import CAPTION
from sail_align.extract.store.joined import StoredFeatures
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import open_atomically, write_atomically
from sail_align.extract.system.folders import new_folder, require_new
from sail_align.extract.system.progress import progress

FORMAT = 1
ABOUT = "about.json"
PART_ROWS = 32_768
"""Rows of a store that go into one part, which is held in memory."""
NAMES = r"[A-Za-z0-9_-]+\.(npy|parquet|safetensors|tar|json)"

Vectors = NDArray[np.floating[Any]]
Convert = Callable[[str, NDArray[np.float16]], Vectors]
"""Turns features of the modality `image` or `text`, (n, D), into what is written, (n, E)."""


class Written(NamedTuple):
    """Number of rows that were written, and of those that were left out."""

    rows: int
    left_out: int


@dataclass(frozen=True)
class Part:
    """Consecutive rows, as they are written.

    Attributes:
        name: Its number, with zeros in front: the names of all parts have one length.
        first: Number of its first row among those that are written.
        vectors: Vectors by caption; "" for images.
        table: Texts: key, image_path, url, and the captions.
    """

    name: str
    first: int
    vectors: Mapping[str, Vectors]
    table: pa.Table

    def named(self, image: str, text: str) -> dict[str, Vectors]:
        """Return the vectors by a name for images, and one for texts, which has the caption's added if need be."""
        several = len(self.vectors) - ("" in self.vectors) > 1
        return {
            f"{text}_{caption}" if caption and several else text if caption else image: vectors
            for caption, vectors in self.vectors.items()
        }


def open_arrays(
    store: Store, captions: Sequence[str] | None, image_encoder: str | None = None, text_encoder: str | None = None
) -> dict[str, StoredFeatures]:
    """Return the arrays to write by caption, "" for images.

    Args:
        store: The store.
        captions: Names of captions. None takes all that have features.
        image_encoder: Image encoder to use if the store has more than one.
        text_encoder: Text encoder to use if the store has more than one.

    Raises:
        UserError: There is no such array, or the encoder is not chosen.
    """
    found = [name for name in store.captions if store.texts(name)]
    if unknown := [name for name in captions or () if name not in found]:
        raise UserError(
            f"--captions {unknown[0]!r} is invalid: {store.path} has text features of {listing(found) or 'no caption'}."
        )
    arrays = {"": store.image(image_encoder)} if store.images() or image_encoder else {}
    arrays |= {name: store.text(name, text_encoder) for name in (found if captions is None else captions)}
    if not arrays:
        raise UserError(f"{store.path} has no features. Make them with `sail-extract run`.")
    return arrays


def write_vectors(
    store: Store,
    arrays: Mapping[str, StoredFeatures],
    form: str,
    folder: Path,
    convert: Convert = lambda _, features: features,
    about: Mapping[str, Any] | None = None,
    *,
    quiet: bool = False,
) -> Written:
    """Write the features of a store to a new folder, completely or not at all, a part at a time.

    Args:
        store: The store.
        arrays: The arrays by caption, "" for images.
        form: One of `FORMATS`.
        folder: A folder that does not exist or is empty.
        convert: What is written of some features.
        about: More about them for about.json.
        quiet: Show no progress bar.

    Raises:
        UserError: The folder is not empty or cannot be written, the store is damaged, or no row has all features.
    """
    write = FORMATS[form]
    require_new(folder)
    with new_folder(folder, NAMES) as new, progress(store.rows, f"write {form}", quiet=quiet) as bar:
        rows = 0
        for part, read in _parts(store, arrays, convert):
            if part is not None:
                write(new, part)
                rows += len(part.table)
            bar.update(read)
        if not rows:
            raise UserError(f"{store.path} has no row with all of {', '.join(each.path for each in arrays.values())}.")
        record = {
            "format": FORMAT,
            "dataset": store.dataset,
            "store_digest": store.digest_of(list(arrays.values())),
            "arrays": {part.path: part.identity.spec.to_json() for each in arrays.values() for part in each.parts},
            "rows": rows,
            "left_out": store.rows - rows,
            **(about or {}),
        }
        write_atomically(new / ABOUT, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return Written(rows, store.rows - rows)


def _parts(store: Store, arrays: Mapping[str, StoredFeatures], convert: Convert) -> Iterator[tuple[Part | None, int]]:
    """Yield the parts, None for one without rows, with the number of rows that were read for it."""
    captions = [name for name in arrays if name]
    columns = ["key", "image", "url", *(CAPTION + name for name in captions)]
    names = ["key", "image_path", "url", *(f"caption_{name}" if len(captions) > 1 else "caption" for name in captions)]
    digits = len(str(-(-store.rows // PART_ROWS) - 1))
    number = before = 0
    for start in range(0, store.rows, PART_ROWS):
        stop = min(start + PART_ROWS, store.rows)
        ok = np.logical_and.reduce([array.read_status(start, stop) == Status.OK for array in arrays.values()])
        if not ok.any():
            yield None, stop - start
            continue
        vectors = {
            name: convert("text" if name else "image", array.read(start, stop)[0][ok]) for name, array in arrays.items()
        }
        table = store.index(columns, start, stop).rename_columns(names).filter(pa.array(ok))
        yield Part(f"{number:0{digits}d}", before, vectors, table), stop - start
        number, before = number + 1, before + len(table)


def _write_layout(folder: Path, part: Part, ending: str, write: Callable[[Any, str, Vectors], None]) -> None:
    """Write a part in clip-retrieval's layout, its vectors with `write(file, name, vectors)`."""
    for name, vectors in part.named(FOLDERS["image"], FOLDERS["text"]).items():
        with open_atomically(folder / name / f"{name}_{part.name}{ending}") as file:
            write(file, name, vectors)
    with open_atomically(folder / METADATA / f"{METADATA}_{part.name}.parquet") as file:
        pq.write_table(part.table, file)


def _write_npy(folder: Path, part: Part) -> None:
    _write_layout(folder, part, ".npy", lambda file, _, vectors: np.save(file, vectors, allow_pickle=False))


def _write_safetensors(folder: Path, part: Part) -> None:
    from safetensors.numpy import save

    _write_layout(folder, part, ".safetensors", lambda file, name, vectors: file.write(save({name: vectors})))


def _write_parquet(folder: Path, part: Part) -> None:
    """Write vectors as lists of float32, which all readers of parquet support; float16 fits into them exactly."""
    table = part.table
    for name, vectors in part.named("image_embedding", "text_embedding").items():
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
        table = table.append_column(name, pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    with open_atomically(folder / f"part-{part.name}.parquet") as file:
        pq.write_table(table, file, row_group_size=8_192)


def _write_webdataset(folder: Path, part: Part) -> None:
    captions = [name for name in part.table.column_names if name.startswith("caption")]
    members = part.named("image", "text")
    with open_atomically(folder / f"{part.name}.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for place, row in enumerate(part.table.to_pylist()):
            name = f"{part.first + place:09d}"
            for modality, vectors in members.items():
                content = io.BytesIO()
                np.save(content, vectors[place], allow_pickle=False)
                _add(tar, f"{name}.{modality}.npy", content.getvalue())
            if len(captions) == 1 and row[captions[0]] is not None:
                _add(tar, f"{name}.txt", row[captions[0]].encode())
            _add(tar, f"{name}.json", json.dumps(row, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


FORMATS: dict[str, Callable[[Path, Part], None]] = {
    "npy": _write_npy,
    "parquet": _write_parquet,
    "safetensors": _write_safetensors,
    "webdataset": _write_webdataset,
}
"""Writers of a part by the name of their format."""
