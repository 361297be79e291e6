r"""Compare recipes on one data set: heads, losses, captions and initial weights.

Unlike `sail-align ladder`, which follows the paper's ablation, this covers closed-form heads and starts, and scores on
an evaluation data set. Each recipe is one `sail-align fit` per seed, scored by `sail-eval retrieval`. Runs with scores
are reused. Prints a Markdown table of R@1, text → image and image → text, as mean ± standard deviation over the seeds.

    python benchmarks/compare_recipes.py --features features/flickr8k-train.zarr \
        --manifest flickr8k-test.yaml --one-caption c0
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sail_align.align.stats.tables import mean_std

BIN = Path(sys.executable).parent
RANDOM_START = ("--start", "random", "--optimizer", "adamw", "--steps", "200")
RATES = {"linear": "1e-3", "mlp": "3e-4", "glu": "3e-4"}
"""Learning rates for random initial weights, chosen among 3e-4 and 1e-3 on held-out training photos."""


def recipes(one_caption: str, seeds: int) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yield the name of each recipe and its options for each seed."""
    yield "CCA (closed form), all captions", [("--head", "cca")]
    yield "CCA, all captions, power 0.5", [("--head", "cca", "--image-power", "0.5")]
    for captions, chosen in (("one caption", ("--captions", one_caption)), ("all captions", ())):
        for loss in ("infonce", "sigmoid"):
            for head, rate in RATES.items():
                options = ("--head", head, "--loss", loss, "--lr", rate, *RANDOM_START, *chosen)
                yield f"{head}, {loss}, {captions}", [(*options, "--seed", str(seed)) for seed in range(seeds)]
    for suffix, power in (("", ()), (", power 0.5", ("--image-power", "0.5"))):
        for head in ("linear", "glu"):
            options = ("--preset", "small", "--head", head, *power)
            name = f"{head}, sigmoid, all captions, closed-form start{suffix}"
            yield name, [(*options, "--seed", str(seed)) for seed in range(seeds)]


def main() -> None:
    """Train, score and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--features", type=Path, required=True, help="store to train on")
    options.add_argument("--manifest", type=Path, required=True, help="retrieval manifest to score on")
    options.add_argument("--data-root", help="folder of the manifest's files")
    options.add_argument("--one-caption", default="raw", help="caption of the recipes with one caption")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--runs", type=Path, default=Path("runs/ladder"), help="folder for the runs")
    asked = options.parse_args()
    root = ("--data-root", asked.data_root) if asked.data_root else ()
    print("| recipe | T2I R@1 | I2T R@1 | mean R@1 |\n|---|---|---|---|")
    for name, options_by_seed in recipes(asked.one_caption, asked.seeds):
        scores = []
        for fit_options in options_by_seed:
            run = asked.runs / "".join(fit_options).replace("--", "-").strip("-")
            if not (run / "scores.json").exists():
                command("sail-align", "fit", "--quiet", "--features", asked.features, "--out", run, *fit_options)
                command("sail-eval", "retrieval", asked.manifest, "--quiet", "--run", run, *root)
            scores.append(recalls(run))
        ways = [[score[way] for score in scores] for way in ("t2i_r1", "i2t_r1")]
        means = [sum(pair) / 2 for pair in zip(*ways, strict=True)]
        print(f"| {name} | {' | '.join(map(mean_std, [*ways, means]))} |", flush=True)


def command(program: str, *arguments: object) -> None:
    """Run a sail-align or sail-eval command. Its output is shown only if it fails."""
    done = subprocess.run([BIN / program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{program} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def recalls(run: Path) -> dict[str, float]:
    """Return the metrics of the retrieval record in percent."""
    (record,) = json.loads((run / "scores.json").read_bytes())["records"]
    return {metric["name"]: metric["value"] for metric in record["metrics"]}


if __name__ == "__main__":
    main()
