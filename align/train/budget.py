"""The number of steps that a fit can take in a given time (`--budget`)."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from sail_align.align.runs.claim import find_run
from sail_align.align.settings import CacheChoice
from sail_align.align.train.cost import format_seconds
from sail_align.align.train.distributed import World
from sail_align.align.train.plan import Plan
from sail_align.align.train.trainer import Training

WARM_UP, TIMED = 2, 10
"""Steps before the measurement, which compile and wait for the disk, and steps that are timed."""

TRIAL = 0.1
"""Part of the budget after which no further step is timed."""

MARGIN = 0.95
"""Part of the time that is left for steps. The rest is for scorings and saves."""


def within_budget(
    plan: Plan, path: Path, *, numbered: bool, cache: CacheChoice, device: torch.device, world: World
) -> tuple[Plan, str]:
    """Return a plan with as many of its steps as its budget allows, and a note that says how many.

    The learning rate follows from the number of steps, so it is chosen once, before the first one, and recorded: a run
    that was begun with this budget keeps it. All processes of a run call this function.

    Args:
        plan: Plan with a budget and the most steps to take.
        path: Folder of the run, as for `claim_run`.
        numbered: As for `claim_run`.
        cache: Where the features are during training.
        device: Device of the fit.
        world: Processes of the fit.
    """
    budget, most = plan.budget or 0.0, plan.settings.steps
    steps = world.first(lambda: find_run(path, plan.record(), but="steps", numbered=numbered))
    if steps is not None:
        why = "as when this run began"
    else:
        setup, seconds = _measure(plan, cache, device, world)
        steps = max(1, min(most, int((budget - setup) * MARGIN / seconds)))
        why = f"at {seconds:.2g} s each"
    share = f"all {most:,} steps" if steps == most else f"{steps:,} of {most:,} steps"
    fitted = replace(plan, settings=replace(plan.settings, steps=steps))
    return fitted, f"A budget of {format_seconds(budget)} allows {share}, {why}."


def _measure(plan: Plan, cache: CacheChoice, device: torch.device, world: World) -> tuple[float, float]:
    """Take some steps with a model that is then thrown away.

    Returns:
        The seconds before the first step, and of each step, as the leader measured them.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        training = Training(plan, device, world)
        stack.enter_context(training.stream)
        stack.enter_context(training.begin(None, plan.digest, cache, quiet=True))
        ready = began = time.monotonic()
        timed = 0
        for step, (batch, _) in enumerate(training.source.batches_on(device), start=1):
            training.train(step, batch)
            timed = step - WARM_UP
            if timed <= 0:
                began = time.monotonic()
            late = time.monotonic() - started > TRIAL * (plan.budget or 0.0)
            if timed == TIMED or world.collect(late)[0]:
                break
        now = time.monotonic()
        measured = (ready - started, (now - began) / timed if timed > 0 else (now - ready) / step)
        return world.collect(measured)[0]
