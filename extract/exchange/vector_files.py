"""Files of vectors in the formats of other programs, read a range of rows at a time.

- `.npy`: an array (N, D), mapped into memory.
- `.parquet`: a column of lists, decoded batch by batch.
- `.pt`, `.pth`: a tensor (N, D), a list of tensors, or a dict of one tensor per key, mapped into memory.
- `.safetensors`: a tensor (N, D), or one tensor (D,) per key.
- `.h5`, `.hdf5`: a data set (N, D), or one data set (D,) per key.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sail_align.extract.errors import UserError, import_extra, listing
from sail_align.extract.system.files import require_regular

BATCH_ROWS = 8_192
MOST_PER_BYTE = 1_000
"""Numbers that a byte of a file can stand for at most, compressed. A file that declares more does not store them."""
FLOATS = ("float16", "float32", "float64", "bfloat16")
KEY = "key"
"""Name of the column of keys in files whose vectors have names."""

Columns = Mapping[str, Callable[[], pa.ChunkedArray]]
"""Functions that read a column of texts, by its name."""


class Block(NamedTuple):
    """Vectors (n, D) in a type of NumPy, and which of them are missing (n,), which are NaN."""

    values: NDArray[np.floating[Any]]
    missing: NDArray[np.bool_]

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]]) -> "Block":
        """Return a block of which nothing is missing."""
        return cls(values, np.zeros(len(values), bool))


@dataclass(frozen=True)
class VectorFile:
    """One open file of vectors.

    Attributes:
        path: The file.
        rows: Number of vectors.
        dim: Length of each.
        dtype: Name of their type, one of `FLOATS`.
        read: Returns rows start … stop − 1.
        columns: Columns of texts in the same file, such as keys and captions.
        named: Whether the only column is the names of the vectors, which are their keys.
        sequential: Whether reading rows out of order is slow.
    """

    path: Path
    rows: int
    dim: int
    dtype: str
    read: Callable[[int, int], Block]
    columns: Columns = field(default_factory=dict)
    named: bool = False
    sequential: bool = False


Choose = Callable[[Path, Sequence[str]], str]
"""Chooses one of the names of vectors in a file."""


def open_vectors(path: Path, choose: Choose) -> VectorFile:
    """Open a file of vectors. Its content is checked as far as its header tells.

    Raises:
        UserError: The file cannot be read or is not a matrix of numbers, or `choose` finds no name.
    """
    with report_unreadable(path):
        require_regular(path)
        opened = FORMATS[path.suffix.lower()](path, choose)
    if opened.dtype not in FLOATS:
        raise UserError(f"{path} is invalid: got {opened.dtype}, expected {', '.join(FLOATS)}. Convert it.")
    if not opened.rows or not opened.dim:
        raise UserError(f"{path} is invalid: got the shape {(opened.rows, opened.dim)}, expected at least one vector.")
    size = path.stat().st_size
    if opened.rows * opened.dim > MOST_PER_BYTE * size and not opened.sequential:  # parquet counts its rows itself
        raise UserError(
            f"{path} is invalid: got the shape {(opened.rows, opened.dim)} in {size:,} bytes, in which it cannot be "
            "stored. Write the file again."
        )
    return opened


@contextmanager
def report_unreadable(path: Path) -> Iterator[None]:
    """Turn the errors that a library may raise on a file into a `UserError`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, MemoryError, OverflowError) as problem:
        raise _unreadable(path, problem) from problem
    except pickle.UnpicklingError as problem:
        raise UserError(
            f"{path} cannot be read: it contains more than tensors, lists, dicts and texts. Save it again with "
            "`torch.save` of a tensor, or as .npy or .safetensors."
        ) from problem
    except Exception as problem:
        if type(problem).__name__ != "SafetensorError":  # has no public base class
            raise
        raise _unreadable(path, problem) from problem


def _unreadable(path: Path, problem: BaseException) -> UserError:
    reason = next(iter(str(problem).splitlines()), "")
    if isinstance(problem, LookupError) or "allow_pickle" in reason:  # of no help to the user
        reason = "its content is of another kind"
    return UserError(f"{path} cannot be read as {path.suffix}: {reason.rstrip('.')[:300] or type(problem).__name__}.")


def _require_matrix(path: Path, shape: Sequence[int], name: str = "") -> tuple[int, int]:
    if len(shape) != 2:
        what = f"{name!r} of {path}" if name else str(path)
        raise UserError(f"{what} is invalid: got the shape {tuple(shape)}, expected (rows, dimensions).")
    return int(shape[0]), int(shape[1])


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the numbers whose upper 16 bits, as float32, are given."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _open_npy(path: Path, choose: Choose) -> VectorFile:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    rows, dim = _require_matrix(path, array.shape)
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how bfloat16 of ml_dtypes, such as JAX's, is saved
        return VectorFile(
            path, rows, dim, "bfloat16", lambda a, b: Block.of(_from_bfloat16(np.array(array[a:b]).view(np.uint16)))
        )
    return VectorFile(path, rows, dim, array.dtype.name, lambda a, b: Block.of(np.asarray(array[a:b])))


def _open_parquet(path: Path, choose: Choose) -> VectorFile:
    with pq.ParquetFile(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    vectors = [each.name for each in schema if _is_vectors(each.type)]
    name = choose(path, vectors)
    stream = _ParquetStream(path, name)
    dim = schema.field(name).type.list_size if pa.types.is_fixed_size_list(schema.field(name).type) else stream.dim()
    kind = {"halffloat": "float16", "float": "float32", "double": "float64"}[str(schema.field(name).type.value_type)]
    columns = {each.name: _column_of(path, each.name) for each in schema if is_text(each.type)}
    return VectorFile(path, rows, dim, kind, lambda a, b: stream.read(a, b, dim), columns, sequential=True)


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column may hold keys or captions: texts, or whole numbers."""
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer)
    return any(test(kind) for test in tests) or (types.is_dictionary(kind) and is_text(kind.value_type))


def _is_vectors(kind: pa.DataType) -> bool:
    types = pa.types
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(listed and types.is_floating(kind.value_type))


def _column_of(path: Path, name: str) -> Callable[[], pa.ChunkedArray]:
    def read() -> pa.ChunkedArray:
        with report_unreadable(path), pq.ParquetFile(path) as file:
            return as_texts(file.read([name])[name])

    return read


def as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as texts, of any total length."""
    return column.cast(pa.large_string())


class _ParquetStream:
    """Reader of a column of lists that decodes each batch once if it is read in order."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch = pa.chunked_array([], pa.null())
        self._start = self._stop = 0  # rows of `_batch`

    def dim(self) -> int:
        """Return the length of the first list."""
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=[self._name]):
                if len(lengths := pc.list_value_length(batch.column(0)).drop_null()):
                    return int(lengths[0].as_py())
        return 0

    def read(self, start: int, stop: int, dim: int) -> Block:
        """Return rows start … stop − 1."""
        parts = []
        with report_unreadable(self._path):
            group = int(np.searchsorted(self._starts, start, "right")) - 1
            if start < self._start or self._starts[group] > self._stop or self._stop == 0:
                self._seek(group)
            while start < stop:
                while self._stop <= start:
                    self._next()
                end = min(stop, self._stop)
                parts.append(self._block(self._batch.slice(start - self._start, end - start), start, dim))
                start = end
        return Block(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _seek(self, group: int) -> None:
        """Restart at a row group. Rows within one cannot be reached without those before them."""
        file = pq.ParquetFile(self._path, buffer_size=1 << 20)  # streams a column instead of reading a whole row group
        groups = range(group, len(self._starts) - 1)
        self._batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[self._name])
        self._start = self._stop = int(self._starts[group])

    def _next(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError(f"it ends after {self._stop:,} rows")
        self._batch = batch.column(0)
        self._start, self._stop = self._stop, self._stop + len(batch)

    def _block(self, column: pa.Array, first: int, dim: int) -> Block:
        missing = column.is_null().to_numpy(zero_copy_only=False)
        lists = column.drop_null()
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        if (lengths != dim).any():
            place = int(np.flatnonzero(~missing)[np.flatnonzero(lengths != dim)[0]])
            got = int(lengths[lengths != dim][0])
            raise UserError(
                f"Column {self._name!r} of {self._path} is invalid: got {got} numbers in row {first + place + 1}, "
                f"expected {dim} as in the first. Correct this row."
            )
        flat = lists.flatten().to_numpy(zero_copy_only=False)  # null becomes NaN
        values = np.full((len(column), dim), np.nan, flat.dtype)
        values[~missing] = flat.reshape(len(lists), dim)
        return Block(values, missing)


def _open_torch(path: Path, choose: Choose) -> VectorFile:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as problem:
        if "mmap" not in str(problem):
            raise
        content = torch.load(path, map_location="cpu", weights_only=True)  # a file of an old version of torch
    names: list[str] | None = None
    columns: Columns = {}
    if isinstance(content, dict):
        tensors = {str(name): each for name, each in content.items() if isinstance(each, torch.Tensor)}
        matrices = [name for name, each in tensors.items() if each.ndim == 2 and each.shape[0] != 1]
        if matrices:
            lists = {str(name): each for name, each in content.items() if isinstance(each, list)}
            content = tensors[choose(path, matrices)]
            columns = {
                name: _texts_of(each)
                for name, each in lists.items()
                if len(each) == len(content) and all(isinstance(text, str | int) for text in each)
            }
        else:
            if len(tensors) < sum(isinstance(each, torch.Tensor) for each in content.values()):
                raise ValueError("two of its names are the same text")
            names, content = list(tensors), list(tensors.values())
    if isinstance(content, torch.Tensor):
        tensors_of_rows = [content]
        _require_matrix(path, content.shape)
    elif isinstance(content, list | tuple) and content and all(isinstance(each, torch.Tensor) for each in content):
        tensors_of_rows = [each[None] if each.ndim == 1 else each for each in content]
    else:
        raise ValueError(f"got {type(content).__name__} without tensors, expected a tensor, a list or a dict of these")
    if any(each.layout != torch.strided or each.is_meta for each in tensors_of_rows):
        raise ValueError("its tensors are sparse or without values")
    kinds = {(str(each.dtype).removeprefix("torch."), tuple(each.shape[1:])) for each in tensors_of_rows}
    if len(kinds) > 1 or len(tensors_of_rows[0].shape) != 2:
        raise ValueError(f"its tensors differ or are not vectors: {listing(map(str, sorted(kinds)), 3)}")
    ((kind, (dim,)),) = kinds
    starts = np.cumsum([0, *map(len, tensors_of_rows)])

    def read(start: int, stop: int) -> Block:
        first, last = np.searchsorted(starts, [start, stop - 1], "right") - 1
        chosen = [
            each[max(start - at, 0) : stop - at]
            for at, each in zip(starts[first : last + 1].tolist(), tensors_of_rows[first : last + 1], strict=True)
        ]
        return Block.of(_to_numpy(torch.cat(chosen) if len(chosen) > 1 else chosen[0]))

    rows = int(starts[-1])
    if names is not None:
        columns = {KEY: _texts_of(names)}
    return VectorFile(path, rows, dim, kind, read, columns, named=names is not None)


def _to_numpy(tensor: Any) -> NDArray[np.floating[Any]]:
    """Return a tensor of torch as an array; of bfloat16, which NumPy does not have, as float32."""
    tensor = tensor.detach()  # a parameter requires gradients
    array: NDArray[np.floating[Any]] = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return array


def _texts_of(values: Sequence[Any]) -> Callable[[], pa.ChunkedArray]:
    return lambda: pa.chunked_array([pa.array(map(str, values), pa.large_string())])


def _open_safetensors(path: Path, choose: Choose) -> VectorFile:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")  # has no type hints
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    kinds = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
    matrices = [name for name, each in slices.items() if len(each.get_shape()) == 2]
    if matrices:
        name = choose(path, matrices)
        matrix = slices[name]
        rows, dim = _require_matrix(path, matrix.get_shape(), name)
        kind = kinds.get(matrix.get_dtype(), matrix.get_dtype())
        return VectorFile(path, rows, dim, kind, lambda a, b: Block.of(_to_numpy(matrix[a:b])))
    shapes = [(kinds.get(each.get_dtype(), each.get_dtype()), tuple(each.get_shape())) for each in slices.values()]
    return _named_vectors(path, list(slices), shapes, lambda name: _to_numpy(file.get_tensor(name)))


def _named_vectors(
    path: Path,
    names: list[str],
    kinds: Sequence[tuple[str, tuple[int, ...]]],
    vector: Callable[[str], NDArray[np.floating[Any]]],
) -> VectorFile:
    """Return a file in which each vector has its key for a name."""
    different = sorted(set(kinds))
    if len(different) != 1 or len(different[0][1]) != 1:
        found = listing((f"{kind} {shape}" for kind, shape in different), 3) or "none"
        raise ValueError(f"expected one tensor (rows, dimensions), or tensors of one length by key, got {found}")
    ((kind, (dim,)),) = different

    def read(start: int, stop: int) -> Block:
        return Block.of(np.stack([vector(name) for name in names[start:stop]]))

    return VectorFile(path, len(names), dim, kind, read, {KEY: _texts_of(names)}, named=True)


def _open_hdf5(path: Path, choose: Choose) -> VectorFile:
    h5py = import_extra("h5py", f"{path} cannot be read without h5py. Run: pip install 'sail-align[hdf5]'")
    file = h5py.File(path, "r")
    found: dict[str, Any] = {}

    def visit(name: str, each: Any) -> None:  # is not called for links, which may lead to other files
        if isinstance(each, h5py.Dataset):
            if each.external or each.is_virtual:
                raise UserError(f"{path} is invalid: {name!r} is stored in other files. Copy it into one file.")
            found[name] = each

    file.visititems(visit)
    matrices = [name for name, each in found.items() if each.ndim == 2 and each.dtype.kind == "f"]
    if not matrices:
        vectors = {name: each for name, each in found.items() if each.dtype.kind == "f"}
        kinds = [(each.dtype.name, each.shape) for each in vectors.values()]
        return _named_vectors(path, list(vectors), kinds, lambda name: np.asarray(vectors[name][()]))
    matrix = found[choose(path, matrices)]
    rows, dim = _require_matrix(path, matrix.shape)

    def texts(each: Any) -> Callable[[], pa.ChunkedArray]:
        def read() -> pa.ChunkedArray:
            with report_unreadable(path):
                values = each.asstr()[:] if h5py.check_string_dtype(each.dtype) else each[:].astype(str)
                return pa.chunked_array([pa.array(values, pa.large_string())])

        return read

    columns = {
        name: texts(each)
        for name, each in found.items()
        if each.shape == (rows,) and (each.dtype.kind in "iu" or h5py.check_string_dtype(each.dtype))
    }
    return VectorFile(path, rows, dim, matrix.dtype.name, lambda a, b: Block.of(matrix[a:b]), columns)


FORMATS: dict[str, Callable[[Path, Choose], VectorFile]] = {
    ".npy": _open_npy,
    ".parquet": _open_parquet,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".safetensors": _open_safetensors,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
}
"""Readers of files by their ending."""
