"""sail-align fit: its options and its output."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sail_align.align.cli.options import Features, ImageEncoder, TextEncoder, with_settings
from sail_align.align.data.captions import parse_captions
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import check_options, choose_precision
from sail_align.align.train.trackers import parse_trackers
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import Device, Quiet
from sail_align.extract.system.files import report_write_errors, require_store
from sail_align.extract.system.signals import report_stop

if TYPE_CHECKING:
    from sail_align.align.train.plan import Plan

_CAPTIONS = """Captions to train on together, with optional weights: raw,long:0.5.  [default: those in all stores; with
--positives, those in any]"""
_EXCLUDE = "Keys to leave out, one per line, as `sail-extract overlap` writes them. Can be repeated."
_OUT = "Folder of the run.  [default: runs/<store>-<head>, with -2, -3 … added if that has other settings]"
_TRACK = "Also log to tensorboard, wandb or both (separated by a comma); each needs its extra: 'sail-align[wandb]'."


@with_settings()
def fit(
    features: Features,
    captions: Annotated[str | None, typer.Option(help=_CAPTIONS, rich_help_panel="Data")] = None,
    image_encoder: ImageEncoder = None,
    text_encoder: TextEncoder = None,
    exclude: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_EXCLUDE, rich_help_panel="Data")] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help=_OUT, rich_help_panel="Run")] = None,
    device: Device = "auto",
    track: Annotated[str | None, typer.Option(help=_TRACK, rich_help_panel="Run")] = None,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Train the heads on feature stores. Rerun the same command to resume after a stop."""
    options = check_options(given)  # like all checks here, before the seconds that importing torch takes
    names = captions.split(",") if captions else []
    parse_captions(names)
    trackers = parse_trackers(track)
    for store in features:
        require_store(store)

    from sail_align.align.train.distributed import joined
    from sail_align.align.train.plan import make_plan
    from sail_align.align.train.trainer import fit as train

    with joined(device) as (world, where):

        def prepare() -> "tuple[Plan, Path, bool]":
            if options.get("head") != "cca":
                options["precision"] = choose_precision(options.get("precision", "auto"), where.type)
            plan, notes = make_plan(
                features,
                options,
                captions=names,
                image_encoder=image_encoder,
                text_encoder=text_encoder,
                exclude=exclude or (),
                quiet=quiet,
            )
            if 0 < plan.settings.batch_size < world.size and plan.settings.steps:
                raise UserError(
                    f"--batch-size is invalid: got {plan.settings.batch_size} for {world.size} processes. Give each "
                    "process at least one pair."
                )
            for note in notes:
                typer.echo(f"note: {note}")
            return plan, *_claim_run(plan, out, features, world.size)

        plan, run, finished = world.first(prepare)
        started = time.monotonic()
        training: dict[str, Any] = {name: options[name] for name in ("keep", "on_collapse") if name in options}
        training |= {"track": trackers, "quiet": quiet or not world.leads}
        how = partial(_how_to_resume, run) if world.leads else lambda: None
        with report_stop(how), report_write_errors(run, during_run=True):
            scores = train(plan, run, device=where, world=world, **training)
        if world.leads:
            if not finished:
                typer.echo(f"wrote {run} in {time.monotonic() - started:.0f} s")
            _print_results(run, plan, scores)


def _claim_run(plan: "Plan", out: Path | None, stores: list[Path], processes: int) -> tuple[Path, bool]:
    """Choose the folder of a run and print it; return it, and whether the run is finished."""
    from sail_align.align.runs.claim import claim_run

    claim = claim_run(out or RunFolder.default_path(stores, plan.settings.head), plan.record(), numbered=out is None)
    if claim.other:
        typer.echo(f"note: {claim.other} has other settings ({'; '.join(claim.differing)}); this is a new run.")
    if claim.finished:
        state = f"{claim.path} is finished"
    else:
        state = f"{'resuming' if claim.begun else 'writing'} {claim.path}"
    typer.echo(f"{state}: {plan.describe()}" + (f"; {processes} processes" if processes > 1 else ""))
    return claim.path, claim.finished


def _how_to_resume(run: Path) -> str:
    from sail_align.align.runs.checkpoint import Checkpoint

    saved = Checkpoint.read(run)
    if saved is None:
        return f"The same command starts {run} again: nothing was saved yet."
    return f"The same command resumes {run} from step {saved.step:,}."


def _print_results(run: Path, plan: "Plan", scores: dict[str, float]) -> None:
    from sail_align.align.runs.checkpoint import Checkpoint
    from sail_align.align.stats.tables import number

    if scores:
        recalls = {way: " / ".join(f"{scores[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("t2i", "i2t")}
        typer.echo(
            f"held out ({plan.held_out_rows:,} pairs): loss {scores['loss']:.4g}, R@1/5/10 text→image "
            f"{recalls['t2i']}, image→text {recalls['i2t']}; chance of R@1 {number(scores['chance'])}"
        )
        best = Checkpoint.best(run)
        if best is not None and best.step < plan.settings.steps:
            typer.echo(f"best: mean R@1 {best.r1:.1f} after step {best.step:,}, kept in {best.folder}")
    score_all = command("sail-eval", "all", "--run", run)
    if any(pairs.store.dataset == "demo" for pairs in plan.pairs):
        typer.echo(f"Next: {score_all}")
    else:
        score_own = command("sail-eval", "retrieval", "TEST.yaml", "--run", run)
        typer.echo(
            f"Next: {score_own}     (your own images; see docs/data.md)\n"
            f"  or: {score_all}     (published sets found on this machine)"
        )
