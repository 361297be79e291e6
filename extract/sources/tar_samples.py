"""The members of a tar, put together by sample, whatever order they come in."""

import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.sources.tar_members import DamagedTarError, members

_KEY_AND_ENDING = re.compile(r"(?:\./)?((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


@dataclass
class TarSamples:
    """What a tar holds of each sample.

    `samples` maps a key to what was found, by ending or `json:<field>`: of an image its `<offset>:<size>`, of other
    members the text, of a field its value. `endings` counts all members, also those not asked for. `notes` say what is
    wrong with the tar; they go on from its name.
    """

    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_tar(files: FileSet, tar: str, images: Collection[str], origins: Collection[str]) -> TarSamples:
    """Read where a tar's images are, and its texts and fields (`txt`, `json:url`); other members are skipped.

    A member's key is its path up to the first dot of its base name, its ending what follows. A key that has two members
    of one ending is left out: which text belongs to which image cannot be known. A sample without a json has the fields
    of its row in the table beside the tar, if there is one.
    """
    found = TarSamples()
    twice: dict[str, str] = {}
    unreadable = 0
    fields = [origin.removeprefix("json:") for origin in origins if origin.startswith("json:")]
    endings = {*origins, *(["json"] if fields else [])}
    with files.open(tar) as stream:
        try:
            for member in members(stream, tar):
                if not (match := _KEY_AND_ENDING.fullmatch(member.name)):
                    continue
                key, ending = match[1], match[2].lower()
                found.endings[ending] += 1
                sample = found.samples.setdefault(key, {})
                if ending in sample:
                    twice[key] = member.name
                elif ending in images:
                    sample[ending] = f"{member.offset}:{member.size}"
                elif ending in endings:
                    stream.seek(member.offset)
                    data = stream.read(member.size)
                    if len(data) < member.size:  # the tar is cut here, which `members` will say
                        continue
                    text = data.decode("utf-8", "replace")
                    sample[ending] = text if ending in origins else ""
                    if ending == "json" and fields:
                        row = _parse(text)
                        unreadable += row is None
                        sample |= {f"json:{name}": (row or {}).get(name) for name in fields}
        except DamagedTarError as problem:
            found.notes.append(f"{problem}; the samples behind that are lost" if found.samples else str(problem))
    for key in twice:
        del found.samples[key]
    if twice:
        first = next(iter(twice.values()))
        found.notes.append(f"holds two members of one name for {len(twice):,} keys, left out (the first: {first!r})")
    if unreadable:
        found.notes.append(f"holds {unreadable:,} members .json that are no mapping in JSON")
    if fields and any("json" not in sample for sample in found.samples.values()):
        _add_table(found, files, table_beside(tar), fields)
    return found


def table_beside(tar: str) -> str:
    """Return the name of the table that img2dataset writes for a tar."""
    return tar.removesuffix(".tar") + ".parquet"


def _parse(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _add_table(found: TarSamples, files: FileSet, table: str, fields: list[str]) -> None:
    """Give the samples without a json the fields of their rows in a table with a column `key`.

    A row is of the sample with that key, or with that base name. Where several rows or samples have one, none is taken.
    """
    if not files.exists(table):
        return
    try:
        with files.open(table) as stream:
            rows_of_tar = pq.ParquetFile(stream)
            columns = rows_of_tar.schema_arrow.names
            there = [column for column in fields if column in columns]
            rows = rows_of_tar.read(["key", *there]).to_pylist() if "key" in columns else []
    except (pa.ArrowException, OSError) as problem:
        found.notes.append(f"has a table {table} beside it that cannot be read: {' '.join(str(problem).split())}")
        return
    by_key = {str(row["key"]): row for row in rows}
    rows_of = Counter(str(row["key"]) for row in rows)
    samples_of = Counter(map(_base_name, found.samples))
    unclear = 0
    for key, sample in found.samples.items():
        name = key if key in by_key else _base_name(key)
        if "json" in sample or name not in by_key:
            continue
        if rows_of[name] > 1 or (name != key and samples_of[name] > 1):
            unclear += 1
        else:
            sample |= {f"json:{column}": by_key[name][column] for column in there}
    if unclear:
        found.notes.append(f"has {unclear:,} samples whose row in {table} is not clear, left without its fields")


def _base_name(key: str) -> str:
    return key.rpartition("/")[2]
