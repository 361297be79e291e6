"""Checks of whole fits on a small store: copies to the device, features in memory, resuming, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

from sail_align.align.analysis.selftest.lab import Check, Lab, SkippedError
from sail_align.align.data.cache import Cache
from sail_align.align.data.loader import Batch, Source, Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.model.heads import Head
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.claim import claim_run
from sail_align.align.settings import CacheChoice
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit
from sail_align.extract.data import Part, Sample
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.store.store import Store
from sail_align.extract.system.signals import StoppedError

ROWS, IMAGE_DIM, TEXT_DIM = 1_500, 96, 64
CAPTIONS = ("raw", "long")
BATCH, BATCHES = 200, 20
OPTIONS: dict[str, Any] = {
    "preset": "paper",
    "head": "glu",
    "expansion": 2,
    "dim": 32,
    "batch_size": BATCH,
    "steps": 8,
    "lr": 1e-3,
    "bank": 0,
    "optimizer": "adamw",
    "precision": "float32",
}
TRAINED = 60
"""Processes that take longer than this many seconds to train together have stopped."""


def checks() -> Iterator[Check]:
    """Yield the checks."""
    yield Check("batches copied to the device that differ", 0, 1, _copied_batches)
    yield Check("batches cached on the device that differ", 0, 1, partial(_cached_batches, True))
    yield Check("batches cached in memory that differ", 0, 1, partial(_cached_batches, False))
    yield Check("fits with features in the device or in memory, weights that differ", 0, 3, _cached_fits)
    yield Check("fit stopped and resumed, weights that differ", 0, 3, _resumed_fit)
    yield Check("loss with a process per card against one", 1e-3, 25, _processes)


def make_store(folder: Path, rows: int = ROWS, image_dim: int = IMAGE_DIM, text_dim: int = TEXT_DIM) -> Path:
    """Write a store of random images and of two captions that are like them, unless it is there; return its path."""
    path = folder / f"random-{rows}-{image_dim}-{text_dim}.zarr"
    if path.exists():
        return path
    samples = [Sample(f"{row:09d}", f"{row}.jpg", dict.fromkeys(CAPTIONS, "…")) for row in range(rows)]
    sizes: dict[str, Any] = (
        {"shard_rows": 65_536, "chunk_rows": 1_024} if rows > 65_536 else {"shard_rows": 256, "chunk_rows": 64}
    )
    store = Store.create(
        path, dataset="random", manifest={}, parts=[Part.of(samples)], captions=list(CAPTIONS), quiet=True, **sizes
    )
    random = np.random.default_rng(0)
    world = random.standard_normal((8, image_dim), np.float32)
    for name, dim in {"image": image_dim, **dict.fromkeys(CAPTIONS, text_dim)}.items():
        spec = EncoderSpec(
            f"random-{'image' if name == 'image' else 'text'}",
            "image" if name == "image" else "text",
            {},
            "",
            {},
            "none",
            "float32",
            dim,
        )
        array = store.add(Identity(spec, [1.0], {}), *(() if name == "image" else (name,)))
        for shard in array.shards:
            start, stop = array.span(shard)
            factors = np.random.default_rng(shard).standard_normal((stop - start, 8), np.float32)
            noise = random.standard_normal((stop - start, dim), np.float32)
            features = (factors @ world[:, :dim] + 0.5 * noise).astype(np.float16)
            array.write(shard, features, np.zeros(stop - start, np.uint8))
    return path


def _stream(lab: Lab) -> Stream:
    pairs = open_pairs([make_store(lab.folder)], list(CAPTIONS))
    return Stream(pairs, [each.usable() for each in pairs], batch_size=BATCH, seed=0, pin=lab.on_gpu)


def _differing(lab: Lab, source: Source) -> float:
    """Return how many batches on the device differ from those that a stream reads on the CPU."""
    busy = torch.ones(1_024, 1_024, device=lab.device) if lab.on_gpu else None
    differing = 0
    with _stream(lab) as plain:
        served, expected = source.batches_on(lab.device), plain.batches()
        for (batch, state), (exact, exact_state) in islice(zip(served, expected, strict=False), BATCHES):
            for _ in range(20 if busy is not None else 0):  # the device lags behind, so that a buffer may be reused
                busy = busy @ busy / 1_024 if busy is not None else None
            kept = Batch(*(part.clone() for part in batch))
            same = all(torch.equal(part.cpu(), other) for part, other in zip(kept, exact, strict=True))
            differing += state != exact_state or not same
    return differing


def _copied_batches(lab: Lab) -> float:
    with _stream(lab) as stream:
        return _differing(lab, stream)


def _cached_batches(on_device: bool, lab: Lab) -> float:
    with _stream(lab) as stream, Cache(stream, lab.device if on_device else None) as cache:
        return _differing(lab, cache)


def _fit(lab: Lab, name: str, cache: CacheChoice = "none", **more: Any) -> Path:
    """Train in a new run, or resume it; return its folder."""
    plan, _ = make_plan([make_store(lab.folder)], OPTIONS)
    run = claim_run(lab.folder / name, plan.record()).path
    fit(plan, run, device=lab.device, quiet=True, cache=cache, **more)
    return run


def _weights_that_differ(one: Path, other: Path) -> float:
    """Return how many tensors of the last weights of two runs are not equal in all bits."""
    found, exact = (_weights(run) for run in (one, other))
    return sum(not torch.equal(found[name], exact[name]) for name in exact) + abs(len(found) - len(exact))


def _weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    saved = Checkpoint.read(run)
    return load_file(saved.folder / "model.safetensors") if saved else {}


def _cached_fits(lab: Lab) -> float:
    whole = _fit(lab, "none")
    choices: tuple[CacheChoice, ...] = ("device", "host")
    return sum(_weights_that_differ(_fit(lab, cache, cache), whole) for cache in choices)


def _resumed_fit(lab: Lab) -> float:
    whole = _fit(lab, "none")
    seen = []

    def stop(module: torch.nn.Module, *_: object) -> None:
        seen.append(isinstance(module, Head) and module.training)
        if sum(seen) == 6:
            signal.raise_signal(signal.SIGTERM)

    hook = register_module_forward_hook(stop)
    try:
        run = _fit(lab, "resumed")
    except StoppedError:
        run = lab.folder / "resumed"
    finally:
        hook.remove()
    saved = Checkpoint.read(run)
    if saved is None or not 0 < saved.step < OPTIONS["steps"]:
        raise RuntimeError("The fit did not stop and save when it was asked to.")
    return _weights_that_differ(_fit(lab, "resumed"), whole)


def _processes(lab: Lab) -> float:
    count = torch.cuda.device_count() if lab.on_gpu else 2
    if count < 2:
        raise SkippedError("this machine has one GPU")
    program = Path(sys.executable).with_name("sail-align")
    if not program.exists() and not (found := shutil.which("sail-align")):
        raise SkippedError("the command sail-align is not beside this Python")
    program = program if program.exists() else Path(str(found))
    run, words = lab.folder / "processes", ["--features", make_store(lab.folder), "--cache", "none", "--quiet"]
    for name, value in OPTIONS.items():
        words += [f"--{name.replace('_', '-')}", value]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "--"]
    command = [*launcher, program, "fit", *words, "--device", lab.device.type, "--out", run]
    threads = {} if lab.on_gpu else {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=max(lab.seconds_left, TRAINED),
            env={**os.environ, **threads},
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"{count} processes did not end within {late.timeout:.0f} s.") from late
    if done.returncode:
        raise RuntimeError(f"torchrun failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    one, several = _losses(_fit(lab, "none")), _losses(run)
    if len(one) != len(several):
        raise RuntimeError(f"One process took {len(one)} steps, {count} took {len(several)}.")
    return max(abs(a - b) / abs(a) for a, b in zip(one, several, strict=True))


def _losses(run: Path) -> list[float]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if entry["kind"] == "train"]
