"""Plan an extraction from CC3M to 12.8 billion pairs: GPU-hours, bytes, requests, cost, and hours on preemptible nodes.

A discrete-event simulation follows the shards of a run: workers start, take a shard, encode it at the speed of their
GPU or of the shared storage, and are preempted. A shard of a lost worker is tried again when no other is left. The
worker that tries it watches its lease until that expires. Shard size and leases are those of this package. Prices and
rates are assumptions (`Prices`, `ENCODERS`). docs/scale.md shows the tables; scale_check.py compares the simulation
with real runs.
"""

import argparse
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sail_align.extract.executor.worker import LONGEST_PAUSE
from sail_align.extract.store.store import SHARD_ROWS
from sail_align.extract.system.leases import TTL

SETS = {"CC3M": 2.2e6, "CC12M": 8.5e6, "400 M": 4e8, "2 billion": 2e9, "12.8 billion": 12.8e9}
PEAK, UTILISATION = {"A100": 312e12, "H100": 989e12}, 0.37
"""Dense bfloat16 FLOP/s of a card, and the part of it that an encoder reaches (an assumption)."""
IMAGE_BYTES, INDEX_BYTES = 46_000, 900
"""Per pair: a JPEG with shorter side 256, and its row in the index with seven captions (docs/cc12m.md)."""
LONG_TOKENS, SHORT_TOKENS = 130, 30
REQUESTS = {"write": (22.0, 3.0), "read": (16.0, 5.0)}
"""Object storage requests of a shard by price class: those of its own worker, and of each worker that shares the store.

Measured by s3_requests.py. Writes are PUT, POST and LIST, reads are GET and HEAD. Deletions are free.
"""
SHARING = 16
"""Workers that share the store in the table of costs."""


@dataclass(frozen=True)
class Prices:
    """Prices in US dollars: assumptions of December 2026, to be replaced by your own."""

    gpu_hour: float = 2.5
    spot_hour: float = 1.0
    gigabyte_month: float = 0.023
    writes_1000: float = 0.005
    reads_1000: float = 0.0004


@dataclass(frozen=True)
class Encoder:
    """An encoder: parameters that each token passes, tokens of an input, and dimensions of its features."""

    parameters: float
    tokens: float
    dim: int

    @property
    def flop(self) -> float:
        """FLOP of an input: two per parameter and token."""
        return 2 * self.parameters * self.tokens


ENCODERS = {
    "dinov2-base": Encoder(86e6, 257, 1_536),
    "dinov2-large": Encoder(304e6, 257, 2_048),
    "dinov2-giant": Encoder(1.14e9, 257, 3_072),
    "gte-large, short caption": Encoder(304e6, SHORT_TOKENS, 1_024),
    "gte-large, long caption": Encoder(304e6, LONG_TOKENS, 1_024),
    "NV-Embed-v2, long caption": Encoder(7.1e9, LONG_TOKENS, 4_096),
}
DEFAULT = ("dinov2-large", "gte-large, short caption", "gte-large, long caption")


@dataclass(frozen=True)
class Plan:
    """Parameters of a simulation. Times are in seconds.

    Attributes:
        shards: Number of shards to encode.
        seconds: Time of a worker for a shard.
        workers: Number of workers.
        starts: When each worker has loaded its encoders; the last entry stands for all further workers.
        restarts: Time from the loss of a worker until its replacement is ready; None: it is not replaced.
        kills: Times at which workers are lost, with the number of the worker.
        preemptions: Losses per worker and hour, at random, in addition to `kills`.
        takeover: Time for which an idle worker watches the lease of a lost one before it takes the shard, and by how
            much it varies.
        in_flight: Shards that a worker holds at a time. It encodes one.
        shard_bytes: Bytes that a worker reads for a shard.
        bandwidth: Bytes per second that storage delivers to all workers together.
    """

    shards: int
    seconds: float
    workers: int
    starts: Sequence[float] = (60.0,)
    restarts: float | None = 180.0
    kills: Sequence[tuple[float, int]] = ()
    preemptions: float = 0.0
    takeover: tuple[float, float] = (TTL, LONGEST_PAUSE)
    in_flight: int = 1
    shard_bytes: float = 0.0
    bandwidth: float = float("inf")


@dataclass
class Simulation:
    """One run of a plan: when it ends, how many workers were lost, and the worker time that was lost with them."""

    plan: Plan
    seed: int = 0
    now: float = 0.0
    lost: int = 0
    wasted: float = 0.0
    _events: list[tuple[float, int, str, int, int]] = field(default_factory=list)

    def run(self) -> "Simulation":
        """Simulate until all shards are encoded."""
        plan = self.plan
        self._random, self._order = np.random.default_rng(self.seed), itertools.count()
        self._left, self._done = plan.shards, 0
        self._unwatched = 0  # leases of lost workers that no other has seen yet
        self._held, self._life = [0] * plan.workers, [0] * plan.workers
        self._ready, self._began = [False] * plan.workers, [0.0] * plan.workers
        self._active = 0
        for worker in range(plan.workers):
            self._at(plan.starts[min(worker, len(plan.starts) - 1)], "ready", worker)
        for when, worker in plan.kills:
            self._at(when, "kill", worker, life=-1)
        handlers = {"ready": self._start, "done": self._finish, "kill": self._lose, "free": self._free}
        while self._done < plan.shards:
            if not self._events:
                raise ValueError(f"all {plan.workers} workers are lost and {plan.shards - self._done} shards are left")
            self.now, _, kind, worker, life = heapq.heappop(self._events)
            if life in (-1, self._life[worker]):  # otherwise the worker was lost before
                handlers[kind](worker)
        return self

    def _at(self, when: float, kind: str, worker: int, life: int | None = None) -> None:
        life = self._life[worker] if life is None else life
        heapq.heappush(self._events, (when, next(self._order), kind, worker, life))

    def _start(self, worker: int) -> None:
        self._ready[worker] = True
        if self.plan.preemptions:
            self._at(self.now + self._random.exponential(3_600 / self.plan.preemptions), "kill", worker)
        self._assign(worker)

    def _assign(self, worker: int) -> None:
        taken = min(self.plan.in_flight - self._held[worker], self._left)
        self._left -= taken
        self._held[worker] += taken
        if taken and taken == self._held[worker]:
            self._encode(worker)
        if not self._held[worker]:
            self._watch()

    def _watch(self) -> None:
        """Let an idle worker watch the leases of lost workers, at which none looks while other shards are left."""
        least, varies = self.plan.takeover
        for _ in range(self._unwatched):
            self._at(self.now + least + varies * self._random.random(), "free", 0, life=-1)
        self._unwatched = 0

    def _encode(self, worker: int) -> None:
        self._active += 1
        self._began[worker] = self.now
        reading = self.plan.shard_bytes * self._active / self.plan.bandwidth
        self._at(self.now + max(self.plan.seconds, reading), "done", worker)

    def _finish(self, worker: int) -> None:
        self._done += 1
        self._active -= 1
        self._held[worker] -= 1
        if self._held[worker]:
            self._encode(worker)
        self._assign(worker)

    def _lose(self, worker: int) -> None:
        if not self._ready[worker]:
            return
        self.lost += 1
        if self._held[worker]:
            self._active -= 1
            self.wasted += self.now - self._began[worker]
            self._unwatched += 1
            self._left += self._held[worker] - 1
        self._held[worker], self._ready[worker] = 0, False
        self._life[worker] += 1
        self._offer()
        if self.plan.restarts is not None:
            self._at(self.now + self.plan.restarts, "ready", worker)

    def _free(self, _: int) -> None:
        self._left += 1
        self._offer()

    def _offer(self) -> None:
        """Let all workers that have room take what is left."""
        for worker in np.flatnonzero(self._ready):
            self._assign(worker)


def gpu_hours(pairs: float, encoder: Encoder, card: str) -> float:
    """Return the hours of a card for an input of each pair."""
    return pairs * encoder.flop / (PEAK[card] * UTILISATION) / 3_600


def tables(prices: Prices) -> Iterator[str]:
    """Yield the lines of the tables of docs/scale.md."""
    yield f"| card-hours, A100 (H100) | {' | '.join(SETS)} |"
    yield f"|---|{'---|' * len(SETS)}"
    for name, encoder in ENCODERS.items():
        hours = [[gpu_hours(pairs, encoder, card) for card in PEAK] for pairs in SETS.values()]
        yield f"| {name} | {' | '.join(f'{a:,.3g} ({h:,.3g})' for a, h in hours)} |"
    yield ""
    columns = ("set", "shards per array", "images", "index", "features", "objects", "writes", "reads")
    yield f"| {' | '.join(columns)} | A100-hours | GPUs | storage a month | requests |"
    yield f"|{'---|' * 12}"
    chosen = [ENCODERS[name] for name in DEFAULT]
    for name, pairs in SETS.items():
        shards = -(-pairs // SHARD_ROWS)
        features = pairs * sum(2 * each.dim + 1 for each in chosen)
        stored = features + pairs * (IMAGE_BYTES + INDEX_BYTES)
        writes, reads = (shards * len(chosen) * (own + SHARING * each) for own, each in REQUESTS.values())
        cost = writes / 1_000 * prices.writes_1000 + reads / 1_000 * prices.reads_1000
        hours = sum(gpu_hours(pairs, each, "A100") for each in chosen)
        objects = shards * (3 * len(chosen) + 1)
        yield (
            f"| {name} | {shards:,.0f} | {size(pairs * IMAGE_BYTES)} | {size(pairs * INDEX_BYTES)} | {size(features)} "
            f"| {objects:,.0f} | {writes:,.0f} | {reads:,.0f} | {hours:,.0f} | ${hours * prices.gpu_hour:,.0f} "
            f"(spot ${hours * prices.spot_hour:,.0f}) | ${stored / 1e9 * prices.gigabyte_month:,.0f} "
            f"| ${cost:,.2f} |"
        )
    yield ""
    rates = (0.0, 0.05, 0.2, 1.0)
    losses = " | ".join(f"{rate:g} lost an hour" for rate in rates)
    yield f"| images of 400 M pairs, dinov2-large | {losses} | 10 GB/s, no losses |"
    yield f"|---|{'---|' * (len(rates) + 1)}"
    image = ENCODERS["dinov2-large"]
    seconds = SHARD_ROWS * image.flop / (PEAK["A100"] * UTILISATION)
    base = Plan(round(SETS["400 M"] / SHARD_ROWS), seconds, 1, shard_bytes=SHARD_ROWS * IMAGE_BYTES)
    for workers in (8, 32, 128, 512, 2_048):
        plan = replace(base, workers=workers)
        plans = [*(replace(plan, preemptions=rate) for rate in rates), replace(plan, bandwidth=10e9)]
        hours = [Simulation(each).run().now / 3_600 for each in plans]
        yield f"| {workers:,} A100 | {' | '.join(f'{each:.3g} h' for each in hours)} |"


def size(count: float) -> str:
    """Return bytes in the largest unit that leaves at least one."""
    unit = next((unit for unit, name in SIZES.items() if count >= unit), 1)
    return f"{count / unit:.3g} {SIZES.get(unit, 'B')}"


SIZES = {1e15: "PB", 1e12: "TB", 1e9: "GB", 1e6: "MB"}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in Prices.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Prices, name), metavar="DOLLARS")
    print("\n".join(tables(Prices(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
