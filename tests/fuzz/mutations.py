"""Mutations of files: bytes of any file, and the structures of JSON, YAML, tables, tars, tensors and pictures.

Each takes the content of a file and a random generator, and returns another content.
"""

import csv
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save

Mutation = Callable[[bytes, Random], bytes]

EXTREMES = [0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, 2**64 - 1]
TEXTS = [
    "",
    " ",
    "x",
    "nan",
    "None",
    "../../x",
    "/dev/zero",
    "\x00",
    "\x1b[31m",
    "=1+1",
    "<b>&",
    "\ud800",
    "\ufffd",
    "\u202e",
    "ü" * 300,
    "x" * 100_000,
    "9" * 5_000,
    "-1",
    "1e999",
    "2024-99-99",
    "*" * 40,
    "**/**/**",
    "[",
    "{0..99999999}",
    "{5..1}",
    "~",
    "cls",
    "float99",
]
RAW = {
    "@huge@": "9" * 5_000,
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@exponent@": "1e999",
    "@list@": "[" * 20_000 + "]" * 20_000,
    "@object@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@long@": "[" + "1," * 200_000 + "1]",
    "@open@": "[",
    "@octal@": "017",
    "@same@": '{"a": 1, "a": 2}',
}
"""JSON that Python's writer cannot write, by its placeholder."""
RAW_YAML = {
    **{name: RAW[name] for name in ("@huge@", "@exponent@", "@open@", "@octal@", "@same@")},
    "@nan@": ".nan",
    "@date@": "2024-99-99",
    "@python@": "!!python/object/apply:os.system [x]",
    "@binary@": "!!binary '%%%'",
    "@float@": "!!float x",
    "@set@": "!!set {a, b}",
    "@alias@": "*nothing",
    "@loop@": "&a [*a]",
    "@merge@": "{<<: 3}",
    "@tag@": "!unknown x",
    "@list@": "[" * 3_000 + "]" * 3_000,
    "@bomb@": "[&a [1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], "
    "&d [*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d], [*e,*e,*e,*e,*e,*e,*e,*e,*e]]",
    "@hex@": "0x" + "f" * 5_000,
    "@sexagesimal@": "1:" + ":".join(["59"] * 3_000),
    "@key@": "{[1, 2]: 3}",
    "@complexkey@": "{? {a: b} : c}",
}


def flip(content: bytes, random: Random) -> bytes:
    """Change bytes anywhere: single bits, runs, integers; cut, repeat, insert, move."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        size = len(data)
        at = random.randrange(size) if size else 0
        length = random.choice([1, 2, 4, 8, 16, 64, 512])
        match random.randrange(9) if size else 6:
            case 0 | 1:
                data[at] ^= 1 << random.randrange(8)
            case 2:
                data[at : at + length] = bytes([random.choice([0, 255, 32, 34, 44, 48])]) * min(length, size - at)
            case 3:
                value = random.choice(EXTREMES)
                form = random.choice(["<I", ">I", "<Q", ">Q", "<H", ">H"])
                packed = struct.pack(form, value & (1 << 8 * struct.calcsize(form)) - 1)
                data[at : at + len(packed)] = packed
            case 4:
                del data[at:]
            case 5:
                del data[at : at + length]
            case 6:
                data[at:at] = random.randbytes(length)
            case 7:
                data[at:at] = data[at : at + length] * random.choice([1, 2, 50])
            case 8:
                other = random.randrange(size)
                data[at : at + length], data[other : other + length] = (
                    data[other : other + length],
                    data[at : at + length],
                )
    return bytes(data)


def value(random: Random, raw: dict[str, str] = RAW) -> Any:
    """Return a value that seldom belongs where it will stand."""
    match random.randrange(5):
        case 0:
            return random.choice(list(raw))
        case 1:
            return random.choice(TEXTS)
        case 2:
            return random.choice([*EXTREMES, 10**30, 0.5, -0.0, 1e300, 10**9])
        case 3:
            return random.choice([None, True, False])
        case _:
            return random.choice([[], {}, [None], [[]], {"": {}}, {"a": 1}, ["a"], [1, "a", None], ["x"] * 2_000])


def change_tree(tree: Any, random: Random, raw: dict[str, str] = RAW) -> Any:
    """Change one place of a JSON value."""
    places = list(_places(tree))
    if not places or random.random() < 0.02:
        return value(random, raw)
    parent, key = random.choice(places)
    match random.randrange(10):
        case 0 | 1 | 2 | 3:
            parent[key] = value(random, raw)
        case 4:
            del parent[key]
        case 5:
            other, place = random.choice(places)
            parent[key] = json.loads(json.dumps(other[place]))  # a copy: the other may contain this place
        case 6:
            parent[key] = [parent[key]]
        case 7 if isinstance(parent, dict):
            parent[random.choice(["", "x", f"{key} ", str(key).upper(), "__class__"])] = parent.pop(key)
        case 8 if isinstance(parent, dict):
            parent[random.choice(["x", "format", "label", "zarr_format"])] = value(random, raw)
        case _:
            parent[key] = _near(parent[key], random)
    return tree


def _near(old: Any, random: Random) -> Any:
    """Return a value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice([old + 1, old - 1, -old, old * 1000, 0])
    if isinstance(old, float):
        return random.choice([old + 1, -old, 0.0, old * 1e30])
    if isinstance(old, str):
        return random.choice([f"{old}x", old[:-1], old.upper(), old[::-1], f" {old}", old.replace("0", "1")])
    if isinstance(old, list):
        return random.choice([old + old, old[:-1], old[::-1], old * 100])
    return random.choice([{}, None])


def _places(tree: Any) -> Any:
    stack = [tree]
    while stack:
        parent = stack.pop()
        items = parent.items() if isinstance(parent, dict) else enumerate(parent) if isinstance(parent, list) else ()
        for key, child in list(items):
            yield parent, key
            stack.append(child)


def _written(tree: Any, raw: dict[str, str] = RAW) -> str:
    text = json.dumps(tree)
    for name, spelling in raw.items():
        text = text.replace(f'"{name}"', spelling)
    return text


def json_text(content: bytes, random: Random) -> bytes:
    """Change values, keys and the structure of a JSON file."""
    try:
        tree = json.loads(content)
    except ValueError:
        return flip(content, random)
    for _ in range(random.choice([1, 1, 2])):
        tree = change_tree(tree, random)
    return _written(tree).encode()


def yaml_text(content: bytes, random: Random) -> bytes:
    """Change values, keys and the structure of a YAML file, or its lines."""
    if random.random() < 0.2:
        return lines(content, random)
    tree = change_tree(yaml.safe_load(content), random, RAW_YAML)
    return _written(tree, RAW_YAML).encode()


def rename(name: str, random: Random) -> str:
    """Return another name of a file, in which some bytes are seldom in names."""
    odd = [
        b"\xff",
        b"\xc3",
        b"\n",
        b"\r",
        b"\t",
        b" ",
        b"\\",
        b'"',
        b"'",
        b",",
        b"*",
        b"[",
        b"{0..9}",
        b"\x1b[31m",
        b"%",
        b":",
    ]
    odd += ["\u202e".encode(), "ü".encode(), "u\u0308".encode(), b"-", b"~", b"#", b"?", b"&", b"x" * 150, b"\x80\x81"]
    content, at = os.fsencode(name), random.randrange(len(name) + 1)
    changed = content[:at] + random.choice(odd) + content[at:]
    if random.random() < 0.3:
        changed = changed.replace(b".", random.choice([b"", b"..", b".PNG.", b". "]))
    return os.fsdecode(changed)


def lines(content: bytes, random: Random) -> bytes:
    """Change, repeat, drop or join the lines of a text."""
    parts = content.split(b"\n")
    at = random.randrange(len(parts))
    match random.randrange(7):
        case 0:
            parts[at] = parts[at] * 2
        case 1:
            parts.insert(at, random.choice(parts))
        case 2:
            del parts[at]
        case 3:
            parts[at] = random.choice([b" ", b"\t", b"", b"\xff", b"- ", b"#", b"\xef\xbb\xbf"]) + parts[at]
        case 4:
            parts[at : at + 2] = [b"".join(parts[at : at + 2])]
        case 5:
            return random.choice([b"\r\n", b"\r", b"\n\n", b"\0", b"\x85"]).join(parts)
        case _:
            text = content.decode(errors="replace")
            return text.encode(random.choice(["utf-16", "utf-16-le", "utf-32", "cp037"]), "replace")
    return b"\n".join(parts)


def jsonl(content: bytes, random: Random) -> bytes:
    """Change one line of JSONL, or the lines."""
    if random.random() < 0.2:
        return lines(content, random)
    parts = content.rstrip(b"\n").split(b"\n")
    at = random.randrange(len(parts))
    parts[at] = json_text(parts[at], random)
    return b"\n".join(parts) + b"\n"


def table(content: bytes, random: Random) -> bytes:
    """Change fields, quotation marks, delimiters and rows of CSV or TSV."""
    text = content.decode(errors="replace")
    rows = list(csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text else ","))
    row = random.choice(rows)
    column = random.randrange(len(row))
    token = random.choice(['"', '""', "\\", '\\"', ",", "\t", ";", "\r", "\n", "\0", "'", '","', "\ufeff", "\x85"])
    places = [found.start() for found in re.finditer(r'[",\t\n]', text)] or [0]
    at = random.choice([random.randrange(len(text) + 1), random.choice(places)])
    match random.randrange(8):
        case 0 | 1 | 2:
            return (text[:at] + token + text[at:]).encode()
        case 3:
            return lines(content, random)
        case 4:
            row[column] = str(random.choice([*TEXTS, *EXTREMES])).encode(errors="replace").decode()
        case 5:
            row[column : column + 1] = random.choice([[], [row[column]] * 2, ["x"] * 200_000, [""] * 3_000])
        case 6:
            for each in rows:
                each[column : column + 1] = random.choice([[], [""], [each[min(column, len(each) - 1)]] * 2])
        case _:
            rows[0][column] = random.choice([rows[0][0], "", " ", "x" * 70_000, rows[0][column].upper()])
    written = io.StringIO()
    csv.writer(written, delimiter="\t" if "\t" in text else ",").writerows(rows)
    return written.getvalue().encode(errors="replace")


COLUMNS = [
    lambda n: pa.nulls(n),
    lambda n: pa.array([{"a": 1}] * n),
    lambda n: pa.array([b"\xff\xfe"] * n, pa.binary()),
    lambda n: pa.array([[["a"]]] * n),
    lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array([2**63 - 1] * n),
    lambda n: pa.array([True] * n),
    lambda n: pa.array([[1.5, None]] * n),
    lambda n: pa.array(["x"] * n).dictionary_encode(),
    lambda n: pa.array([0] * n, pa.timestamp("ns")),
    lambda n: pa.array([10**30] * n, pa.decimal128(38)),
    lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    lambda n: pa.array(["9" * 5_000] * n),
    lambda n: pa.array([""] * n, pa.large_string()),
    lambda n: pa.array([b"abc"] * n, pa.binary(3)),
    lambda n: pa.array([["x"]] * n, pa.list_(pa.string(), 1)),
    lambda n: pa.array([1] * n, pa.duration("s")),
    lambda n: pa.array(["x"] * n, pa.string_view()),
    lambda n: pa.array([-1] * n, pa.int32()),
]


def parquet(content: bytes, random: Random) -> bytes:
    """Change the columns of a parquet file, or the footer."""
    if random.random() < 0.4:
        at = random.randrange(max(len(content) // 2, 1), len(content))
        return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
    old = pq.read_table(io.BytesIO(content))
    at = random.randrange(old.num_columns)
    name = old.column_names[at]
    match random.randrange(6):
        case 0 | 1 | 2:
            new = old.set_column(at, name, random.choice(COLUMNS)(len(old)))
        case 3:
            new = old.remove_column(at)
        case 4:
            new = old.rename_columns(
                [random.choice(old.column_names) if i == at else n for i, n in enumerate(old.column_names)]
            )
        case _:
            new = random.choice(
                [old.slice(0, 0), pa.concat_tables([old] * 3), old.slice(1), old.select(old.column_names[::-1])]
            )
    written = io.BytesIO()
    pq.write_table(new, written, compression=random.choice(["zstd", "none", "gzip"]))
    return written.getvalue()


FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "time": (136, 12),
    "kind": (156, 1),
    "prefix": (345, 155),
}
RECORDS = [
    b"0 path=x\n",
    b"-5 path=x\n",
    b"99999999999999999999 path=x\n",
    b"12 path=abc\n",
    b"6 path=\n",
    b"14 size=99999\n",
    b"13 size=-100\n",
    b"25 size=9999999999999999\n",
    b"x\n",
    b"11 path=\xff\n",
    b"13 path=../a\n",
    b"22 GNU.sparse.major=1\n",
]


def tar(content: bytes, random: Random) -> bytes:
    """Change headers, sizes, kinds and extensions of the members of a tar."""
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = random.choice(headers)
    match random.randrange(7):
        case 0 | 1 | 2:
            start, length = FIELDS[random.choice(list(FIELDS))]
            new = random.choice(
                [
                    b"\x80" + random.randbytes(length),
                    b"\xff" * length,
                    b"7" * length,
                    b"0" * length,
                    b"\0" * length,
                    b"00000000017\0",
                    random.choice(b"0123456789LKxgSVXD").to_bytes(1, "big"),
                    random.randbytes(length),
                    b"\x80\0\0\0\0\0\0\1\0\0\0\0",
                ]
            )
            block = bytearray(content[at : at + 512])
            block[start : start + length] = new[:length].ljust(length, b"\0")
            return content[:at] + _sealed(block) + content[at + 512 :]
        case 3 | 4:
            record = random.choice(RECORDS) * random.choice([1, 1, 3, 1_000])
            block = bytearray(content[at : at + 512])
            block[156:157] = random.choice(b"xgLKX").to_bytes(1, "big")
            size = len(record) if random.random() < 0.7 else random.choice([0, 1, 2**20, 2**33 - 1])
            block[124:136] = f"{size:011o}".encode() + b"\0"
            padded = record + b"\0" * (-len(record) % 512)
            return content[:at] + _sealed(block) + padded + content[at:]
        case 5:
            other = random.choice(headers)
            return content[:at] + content[other : other + 1024] + content[at:]
        case _:
            cut = random.choice(headers) + random.choice([0, 1, 256, 511, 512, 600])
            return content[:cut] + random.choice([b"", b"\0" * 512, b"\0" * 1024, content[:512]])


def _sealed(block: bytearray) -> bytes:
    """Return a header with its checksum."""
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def safetensors(content: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file, or its tensors."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match random.randrange(4):
        case 0:
            changed = json_text(header, random)
            return len(changed).to_bytes(8, "little") + changed + data
        case 1:
            return struct.pack("<Q", random.choice(EXTREMES) & 2**64 - 1) + header + data
        case _:
            try:
                return save(tensors(load(content), random))
            except SafetensorError:
                return flip(content, random)


def tensors(state: dict[str, Any], random: Random) -> dict[str, Any]:
    """Change one of some named tensors."""
    name = random.choice(list(state))
    old = state[name]
    changed = dict(state)
    match random.randrange(12):
        case 0:
            del changed[name]
        case 1:
            changed[f"{name}.more"] = old.clone()
        case 2:
            changed[name] = torch.full_like(old, float("nan")) if old.is_floating_point() else old + 1
        case 3:
            changed[name] = torch.full_like(old, float("inf")) if old.is_floating_point() else old - 1
        case 4:
            changed[name] = torch.zeros(3, 5)
        case 5:
            changed[name] = old.to(
                random.choice([torch.float16, torch.float64, torch.int64, torch.bool, torch.bfloat16])
            )
        case 6:
            changed[name] = torch.zeros(0)
        case 7:
            changed[name] = old.reshape(-1).clone()
        case 8:
            changed[name] = old.t().contiguous() if old.dim() == 2 else old[None].clone()
        case 9:
            changed[name] = torch.zeros(4_000, 4_000, dtype=torch.float16)
        case 10:
            changed[name] = (old * 1e30).contiguous() if old.is_floating_point() else old * 2
        case _:
            changed[name] = (-old).contiguous() if old.dtype is not torch.bool else old
    return changed


ODD_TENSORS = [
    lambda: torch.zeros(1).expand(300_000, 300_000),
    lambda: torch.zeros(8, 8).to_sparse(),
    lambda: torch.zeros(8, 8, dtype=torch.complex64),
    lambda: torch.zeros(()),
    lambda: torch.empty(2**40, device="meta"),
    lambda: "text",
    lambda: 3,
    lambda: None,
    lambda: [torch.zeros(2)],
    lambda: torch.nn.Parameter(torch.zeros(2, 2)),
    lambda: {"a": torch.zeros(1)},
    lambda: torch.zeros(0, 5),
    lambda: torch.zeros(2, 2, 2, 2),
    lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
]


def torch_file(content: bytes, random: Random) -> bytes:
    """Change the tensors and other entries of a file of torch.save, or its zip."""
    match random.randrange(12):
        case 0:
            return _zipped_again(content)
        case 1 | 2:
            return flip(content, random)
        case _:
            saved = torch.load(io.BytesIO(content), weights_only=True)
            name = random.choice(list(saved["state_dict"]))
            match random.randrange(5):
                case 0:
                    saved["state_dict"][name] = random.choice(ODD_TENSORS)()
                case 1:
                    saved["state_dict"] = random.choice([None, [], {}, {1: torch.zeros(2)}, torch.zeros(2), "x"])
                case 2:
                    saved["epoch"] = random.choice(
                        [None, 2**70, float("nan"), "x" * 100_000, torch.zeros(3), [1], True]
                    )
                case 3:
                    saved["name"] = random.choice([None, "\x1b[31m", "x" * 100_000, "\ud800", torch.zeros(3), {}, 3])
                case _:
                    saved["state_dict"] = tensors(saved["state_dict"], random)
            written = io.BytesIO()
            torch.save(saved, written)
            return written.getvalue()


@cache
def _zipped_again(content: bytes) -> bytes:
    """Compress the zip, with a tensor's data made large: a file of kilobytes that takes gigabytes."""
    written = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for number, name in enumerate(old.namelist()):
            extra = bytes(600 << 20) if number == 1 else b""
            new.writestr(zipfile.ZipInfo(name), old.read(name) + extra, zipfile.ZIP_DEFLATED)
    return written.getvalue()


def picture(content: bytes, random: Random) -> bytes:
    """Change the chunks of a PNG with their checksums, or bytes near the start of any picture."""
    if content.startswith(b"\x89PNG") and random.random() < 0.7:
        return _png(content, random)
    at = random.randrange(min(len(content), 400))
    if random.random() < 0.5:
        form = random.choice(["<H", ">H", "<I", ">I"])
        number = random.choice([0, 1, 3, 10_000, 16_384, 30_000, 65_535, 2**31 - 1, 2**32 - 1])
        packed = struct.pack(form, number & (1 << 8 * struct.calcsize(form)) - 1)
        return content[:at] + packed + content[at + len(packed) :]
    return content[:at] + flip(content[at : at + 40], random) + content[at + 40 :]


@cache
def _bomb() -> bytes:
    return zlib.compress(bytes(1 << 26), 9)


def _png(content: bytes, random: Random) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    number = random.randrange(len(chunks))
    kind, data = chunks[number]
    bomb = _bomb()
    match random.randrange(6):
        case 0 if kind == b"IHDR" or random.random() < 0.5:
            sides = [random.choice([0, 1, 9, 9_999, 30_000, 2**31 - 1]) for _ in range(2)]
            chunks[0] = (b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:])
        case 1:
            chunks[0] = (b"IHDR", chunks[0][1][:8] + bytes(random.choice(b"\0\1\2\3\4\6\x08\x10") for _ in range(5)))
        case 2:
            new = random.choice(
                [
                    (b"zTXt", b"a\0\0" + bomb),
                    (b"iTXt", b"a\0\1\0\0\0" + bomb),
                    (b"iCCP", b"a\0\0" + bomb),
                    (b"iCCP", b"a\0\0" + zlib.compress(b"no profile")),
                    (b"tRNS", random.randbytes(random.choice([1, 2, 6, 300]))),
                    (b"PLTE", random.randbytes(random.choice([0, 3, 5, 900]))),
                    (b"eXIf", random.randbytes(40)),
                    (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
                    (b"gAMA", b""),
                    (b"pHYs", b"\0"),
                    (b"IDAT", bomb),
                    (b"tEXt", b"XML:com.adobe.xmp\0<x"),
                ]
            )
            chunks.insert(random.randrange(1, len(chunks)), new)
        case 3:
            del chunks[number]
        case 4:
            chunks.insert(random.randrange(len(chunks) + 1), chunks[number])
        case _:
            chunks[number] = (kind, flip(data, random))
    written = [content[:8]]
    for kind, data in chunks:
        written.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(written)


FORMATS: dict[str, Mutation] = {
    "json": json_text,
    "jsonl": jsonl,
    "yaml": yaml_text,
    "csv": table,
    "tsv": table,
    "parquet": parquet,
    "tar": tar,
    "safetensors": safetensors,
    "pt": torch_file,
    "txt": lines,
    **dict.fromkeys(["png", "jpg", "webp", "gif", "bmp", "tiff", "jp2", "avif", "ppm"], picture),
}
"""The mutation of a file's structure, by its ending. All other files are changed byte by byte."""


def mutate(name: str, content: bytes, random: Random) -> bytes:
    """Return a file changed in its structure or in its bytes."""
    structured = FORMATS.get(name.rpartition(".")[2].lower())
    if structured is None or not content or random.random() < 0.3:
        return flip(content, random)
    try:
        return structured(content, random)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        RuntimeError,
        zipfile.BadZipFile,
        pa.ArrowException,
    ):  # not possible here
        return flip(content, random)
