"""Compare what two versions of the code write: the proof that a change alters no result.

    python benchmarks/equal_bytes.py run BEFORE      # in the checkout before: demo store, 20-step run, scores
    python benchmarks/equal_bytes.py run AFTER       # in the checkout after
    python benchmarks/equal_bytes.py diff BEFORE AFTER

`run` takes the commands of the interpreter that runs it. `diff` compares every file by its bytes, JSON files and the
headers of safetensors (which had no fixed order once) by their values without seconds and versions, and exits with 1 if
anything differs. Logs and reports are left out.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

COMMANDS = (
    ("sail-extract", "run", "demo"),
    ("sail-align", "fit", "--features", "features/demo.zarr", "--steps", "20", "--out", "runs/steps20"),
    ("sail-eval", "all"),
)
IGNORED_KEYS = {"seconds", "encoding_seconds", "sail_align", "versions", "version"}
IGNORED_FILES = {"features/demo.zarr.log.jsonl"}
IGNORED_SUFFIXES = {".html"}


def main() -> None:
    """Run the demo in a folder, or compare two folders."""
    match sys.argv[1:]:
        case ["run", folder]:
            Path(folder).mkdir(parents=True)
            for program, *arguments in COMMANDS:
                subprocess.run([Path(sys.executable).with_name(program), *arguments], cwd=folder, check=True)
        case ["diff", before, after]:
            different = sorted(differences(Path(before), Path(after)))
            print("\n".join(different) or "equal")
            sys.exit(bool(different))
        case _:
            sys.exit(__doc__)


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield a line for each file that is missing on one side or has another content."""
    names = {path.relative_to(root) for root in (before, after) for path in root.rglob("*") if path.is_file()}
    for name in tqdm(sorted(names), "files", disable=None):
        if str(name) in IGNORED_FILES or name.suffix in IGNORED_SUFFIXES:
            continue
        if missing := [str(root) for root in (before, after) if not (root / name).exists()]:
            yield f"{name}: missing in {missing[0]}"
            continue
        (old, old_rest), (new, new_rest) = (parse(root / name) for root in (before, after))
        yield from (f"{name}: {line}" for line in json_differences(old, new))
        if old_rest != new_rest:
            yield f"{name}: other bytes"


def parse(file: Path) -> tuple[Any, bytes]:
    """Return the JSON of a file or of the header of safetensors, if it has one, and all other bytes."""
    content = file.read_bytes()
    match file.suffix:
        case ".json":
            return json.loads(content), b""
        case ".safetensors":
            start = 8 + int.from_bytes(content[:8], "little")
            return json.loads(content[8:start]), content[start:]
    return None, content


def json_differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each value that differs between two parsed JSON files."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted((old.keys() | new.keys()) - IGNORED_KEYS):
            yield from json_differences(old.get(key), new.get(key), f"{path}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (each_old, each_new) in enumerate(zip(old, new, strict=True)):
            yield from json_differences(each_old, each_new, f"{path}/{number}")
    elif old != new:
        yield f"{path}: {str(old)[:80]!r} → {str(new)[:80]!r}"


if __name__ == "__main__":
    main()
