"""Random kills of small jobs.

    make soak MINUTES=10 SEED=7

Each round begins a job anew, kills it up to four times at random moments, and lets the last run end. The folder must
then have the bytes of an undisturbed run. The seed of a round decides its job, the number of kills, and their moments;
a failure prints it. What a process does until such a moment depends on the machine, so a seed need not fail again.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.harness import Bench, Undisturbed, in_processes
from tests.faults.injections import prepare
from tests.faults.jobs import JOBS, Inputs

MOST_KILLS = 4


def play(seed: int, runs: Sequence[Undisturbed], inputs: Inputs, bench: Bench) -> dict[str, object]:
    """Play the round of a seed. Return its job, the number of kills, and what is wrong; "" if nothing."""
    choose = random.Random(seed)
    run = choose.choice(runs)
    bench.begin(run.base)
    kills, problem, output, committed = 0, "", "", set[str]()
    for _ in range(choose.randint(1, MOST_KILLS)):
        end = bench.run(lambda: run.job.run(inputs.folder), kill_after=choose.uniform(0, 1.2 * run.seconds))
        if end.code != -signal.SIGKILL:  # it ended before
            problem = problem or run.check_rerun(end, bench.files(), committed)
        kills += end.code == -signal.SIGKILL
        problem = problem or run.check_left(bench.files())
        output += f"--- ended with {end.code}\n{end.output}"
        committed = run.job.committed(bench.work)
    if not problem:
        end = bench.run(lambda: run.job.run(inputs.folder))
        problem = run.check_rerun(end, bench.files(), committed)
        output += f"--- ended with {end.code}\n{end.output}"
    return {"seed": seed, "job": run.name, "kills": kills, "problem": problem, "output": output if problem else ""}


def main() -> None:
    """Play rounds for some minutes; exit with 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="seed of the first round; default: from the clock")
    parser.add_argument("--jobs", default=",".join(JOBS), help="names of jobs, separated by commas")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    print(f"first seed: {first}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name).resolve()
        inputs, runs = prepare(options.jobs.split(","), folder)
        until = time.monotonic() + 60 * options.minutes

        def rounds(worker: int, bench: Bench):
            seed = first + worker
            while time.monotonic() < until:
                yield play(seed, runs, inputs, bench)
                seed += options.workers

        played = in_processes(options.workers, folder, rounds)
    failures = [each for each in played if each["problem"]]
    for each in failures:
        print(f"\nseed {each['seed']}, {each['job']}: {each['problem']}\n{each['output'].rstrip()}")
    print(f"\n{'job':16}  rounds   kills  failures")
    for job in [*(run.name for run in runs), "all"]:
        of_job = [each for each in played if job in (each["job"], "all")]
        kills = sum(each["kills"] for each in of_job)
        print(f"{job:16}  {len(of_job):6}  {kills:6}  {sum(bool(each['problem']) for each in of_job):8}")
    print(f"seeds {first} to {max((each['seed'] for each in played), default=first)}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
