"""When does sigmoid training collapse? Batch size × starting temperature, on real features, three seeds a cell.

Grids, all from a random start with Lion and an equal number of steps:

- `batch`: batches of several sizes at b = −10, the paper's start;
- `reach`: one batch size B, with b raised by ln(B'/B), so that negatives pull as hard at the start as those of a batch
  B' at b = −10 would: B' · e^−10 = B · e^b. So batches that no small data set fills are looked at as well; one that it
  does fill is there to see whether the stand-in does as the batch itself. `reach-all` is the same from all pairs.
- `balanced`: each t with the b that balances the masses at the start, so that only t differs.

Steps are equal and not epochs: an epoch of the largest batch is one step, and what is asked is what a batch's gradient
does, not how many of them there are. Finished fits are reused; a stopped run of this script is gone on with by typing
it again. Writes stability.md, stability.json and a plot a grid.

    python benchmarks/stability.py --features features/flickr8k-train.zarr --score features/flickr8k-test.zarr \
        --captions c0 --out runs/stability
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sail_align.align.analysis.trials import Retrieved, Trial, read_scored
from sail_align.align.data.pairs import open_pairs
from sail_align.align.stats.charts import line_chart
from sail_align.align.stats.tables import format_table, mean_std
from sail_align.align.train.plan import make_plan

BATCHES = (128, 512, 1_900)
REACH_BATCH = 512
REACHES = (1_900, 8_192, 36_864, 131_072, 524_288)
TEMPERATURES = (5.0, 10.0, 20.0, 40.0)
BIAS = -10.0


class Cell(NamedTuple):
    """One start: of a batch size that is used, and the one that it stands for; `balanced` chooses b by the masses."""

    batch: int
    stands_for: int
    temperature: float | str
    balanced: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options of a fit that make this start."""
        if self.balanced:
            return {"batch_size": self.batch, "temperature": self.temperature, "bias": "auto"}
        bias = BIAS + math.log(self.stands_for / self.batch)
        return {"batch_size": self.batch, "temperature": self.temperature, "bias": bias}


GRIDS = {
    "batch": [Cell(batch, batch, t) for batch in BATCHES for t in TEMPERATURES],
    "reach": [Cell(REACH_BATCH, reach, t) for reach in REACHES for t in TEMPERATURES],
    "reach-all": [Cell(BATCHES[-1], reach, t) for reach in (36_864,) for t in TEMPERATURES],
    "balanced": [Cell(batch, batch, t, balanced=True) for batch in BATCHES for t in (*TEMPERATURES, "auto")],
}


def main() -> None:
    """Fit what is not there yet, and write tables and plots."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--features", type=Path, required=True, help="store to train on")
    options.add_argument("--score", type=Path, required=True, help="store with the same captions to retrieve from")
    options.add_argument("--captions", required=True, help="caption to train on and to score by")
    options.add_argument("--out", type=Path, default=Path("runs/stability"))
    options.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--head", default="linear")
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--dim", type=int, default=256)
    asked = options.parse_args()
    recipe = {"preset": "paper", "head": asked.head, "steps": asked.steps, "lr": asked.lr, "dim": asked.dim}
    scored = open_pairs([asked.score], [asked.captions])
    features = read_scored(scored, [each.usable() for each in scored])
    chance = 100 / len(features[0])
    results: dict[str, list[tuple[Cell, list[dict[str, float]]]]] = {name: [] for name in asked.grids}
    for name in results:
        for cell in GRIDS[name]:
            plan, _ = make_plan([asked.features], {**recipe, **cell.options}, captions=[asked.captions])
            trial, seeds = Trial(name, plan), []
            for seed in range(asked.seeds):
                run, _ = trial.run(asked.out / "runs", seed, device=torch.device("cpu"), quiet=True)
                found = Retrieved.by(run, *features, torch.device("cpu"))
                seeds.append({"r1": (found.t2i_r1 + found.i2t_r1) / 2, **course(run.path)})
            results[name].append((cell, seeds))
            print(f"{name} {cell}: R@1 {mean_std([each['r1'] for each in seeds])}", flush=True)
    text = "\n\n".join(table(name, found) for name, found in results.items())
    (asked.out / "stability.md").write_text(f"{text}\n\nMean R@1 of both ways in %, chance {chance:.1f}.\n")
    record = {
        "recipe": recipe,
        "chance": chance,
        **{name: [{**cell._asdict(), "seeds": seeds} for cell, seeds in found] for name, found in results.items()},
    }
    (asked.out / "stability.json").write_text(json.dumps(record, indent=1))
    for name, found in results.items():
        (asked.out / f"{name}.svg").write_text(chart(found))
    print(
        f"{text}\nwrote stability.md, stability.json and {', '.join(f'{name}.svg' for name in results)} in {asked.out}"
    )


def course(run: Path) -> dict[str, float]:
    """Return what a run's log says: gradient mass of positives over that of negatives at both ends, t, b and ranks."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "train"]
    last = [entry for entry in entries if entry["kind"] == "heldout"][-1]
    return {
        "mass_start": steps[0]["positive_mass"] / steps[0]["negative_mass"],
        "mass_end": steps[-1]["positive_mass"] / steps[-1]["negative_mass"],
        "t": steps[-1]["t"],
        "b": steps[-1]["b"],
        "image_rank": last["image_rank"],
        "text_rank": last["text_rank"],
    }


def table(name: str, found: Sequence[tuple[Cell, Sequence[dict[str, float]]]]) -> str:
    """Return a grid as Markdown, a line a cell, means over the seeds."""
    size = "stands for a batch of" if "reach" in name else "batch"
    header = (size, "t", "b", "R@1", "mass +/− at the start", "at the end", "rank, images", "rank, texts")
    rows = []
    for cell, seeds in found:
        mean = {key: statistics.mean(each[key] for each in seeds) for key in seeds[0]}
        rows.append(
            (
                f"{cell.stands_for:,}",
                f"{cell.temperature}" if cell.temperature == "auto" else f"{cell.temperature:g}",
                f"{mean['b']:.1f}",
                mean_std([each["r1"] for each in seeds]),
                f"{mean['mass_start']:.3g}",
                f"{mean['mass_end']:.3g}",
                f"{mean['image_rank']:.0f}",
                f"{mean['text_rank']:.0f}",
            )
        )
    return format_table(header, rows, "r")


def chart(found: Sequence[tuple[Cell, Sequence[dict[str, float]]]]) -> str:
    """Return R@1 over t, a line a batch."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for cell, seeds in found:
        if cell.temperature != "auto":
            point = float(cell.temperature), statistics.mean(each["r1"] for each in seeds)
            lines.setdefault(cell.stands_for, []).append(point)
    return line_chart({f"B = {size:,}": points for size, points in lines.items()}, "initial t", "R@1 (%)")


if __name__ == "__main__":
    main()
