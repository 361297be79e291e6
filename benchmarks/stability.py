r"""When does sigmoid training collapse? Batch size × initial temperature, on real features, three seeds per cell.

Grids, all with random initial weights, Lion and an equal number of steps:

- `batch`: batches of several sizes at b = −10, the paper's initial bias;
- `reach`: one batch size B, with b raised by ln(B'/B), so that negatives initially pull as hard as those of a batch B'
  at b = −10 would: B' · e^−10 = B · e^b. This covers batches larger than a small data set. One B' is small enough to be
  used directly, as a check of the substitute. `reach-all` is the same with all pairs;
- `balanced`: each t with the b that balances the initial gradient masses, so that only t differs.

Steps are equal, not epochs: an epoch of the largest batch is one step, and the question is about the gradient of a
batch, not about the number of batches. Finished fits are reused; rerun the command to resume. Writes stability.md,
stability.json and a plot per grid.

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

from sail_align.align.analysis.trials import Trial, TrialRunner
from sail_align.align.data.pairs import open_pairs, read_rows
from sail_align.align.stats.charts import line_chart
from sail_align.align.stats.tables import format_table, mean_std
from sail_align.align.train.plan import make_plan

BATCHES = (128, 512, 1_900)
REACH_BATCH = 512
REACHES = (1_900, 8_192, 36_864, 131_072, 524_288)
TEMPERATURES = (5.0, 10.0, 20.0, 40.0)
BIAS = -10.0


class Cell(NamedTuple):
    """Initial settings: a batch size and the one it stands for. `balanced` chooses b by the gradient masses."""

    batch: int
    stands_for: int
    temperature: float | str
    balanced: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Fit options of the cell."""
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
    """Run the missing fits, and write tables and plots."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--features", type=Path, required=True, help="store to train on")
    options.add_argument("--score", type=Path, required=True, help="store with the same captions to retrieve from")
    options.add_argument("--captions", required=True, help="caption for training and scoring")
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
    images, texts = read_rows(scored, [each.usable() for each in scored])
    chance = 100 / len(images)
    runner = TrialRunner(asked.out / "runs", asked.seeds, torch.device("cpu"), quiet=True)
    results: dict[str, list[tuple[Cell, list[dict[str, float]]]]] = {name: [] for name in asked.grids}
    for name in results:
        for cell in GRIDS[name]:
            plan, _ = make_plan([asked.features], {**recipe, **cell.options}, captions=[asked.captions])
            trial, seeds = Trial(name, plan), []
            for seed in range(asked.seeds):
                run, _ = runner.train(trial, seed)
                hits_2N = runner.retrieve(run, images, texts[0])
                seeds.append({"r1": 100 * float(hits_2N.mean()), **course(run.path)})
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
    """Return values from a run's log: ratio of positive to negative gradient mass at both ends, t, b and ranks."""
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
    """Return a grid as Markdown, one row per cell, with means over the seeds."""
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
    """Draw R@1 over t, one line per batch size; return the SVG."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for cell, seeds in found:
        if cell.temperature != "auto":
            point = float(cell.temperature), statistics.mean(each["r1"] for each in seeds)
            lines.setdefault(cell.stands_for, []).append(point)
    return line_chart({f"B = {size:,}": points for size, points in lines.items()}, "initial t", "R@1 (%)")


if __name__ == "__main__":
    main()
