"""sail-align fit: its options and its output."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sail_align.align.cli.options import Device, Features, ImageEncoder, Quiet, TextEncoder, stoppable, with_settings
from sail_align.align.data.captions import parse_captions
from sail_align.align.settings import check_options
from sail_align.align.train.trackers import parse_trackers
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import require_store

if TYPE_CHECKING:
    from sail_align.align.train.plan import Plan


@with_settings()
def fit(
    features: Features,
    captions: Annotated[
        str | None,
        typer.Option(
            help="Captions to train on together, with optional weights: raw,long:0.5.  [default: those in all stores; "
            "with --positives, those in any]",
            rich_help_panel="Data",
        ),
    ] = None,
    image_encoder: ImageEncoder = None,
    text_encoder: TextEncoder = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Keys to leave out, one per line, as `sail-extract overlap` writes them. Can be repeated.",
            rich_help_panel="Data",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Folder of the run.  [default: runs/<store>-<head>, with -2, -3 … added if that has other settings]",
            rich_help_panel="Run",
        ),
    ] = None,
    device: Device = "auto",
    track: Annotated[
        str | None,
        typer.Option(
            help="Also log to tensorboard, wandb or both (separated by a comma); needs 'sail-align[tracking]'.",
            rich_help_panel="Run",
        ),
    ] = None,
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

    from sail_align.align.runs.checkpoint import read_checkpoint
    from sail_align.align.runs.claim import claim_run, default_path
    from sail_align.align.train.device import choose_precision
    from sail_align.align.train.distributed import joined
    from sail_align.align.train.plan import make_plan
    from sail_align.align.train.trainer import fit as train

    def resumed_from() -> str | None:
        if not world.leads:
            return None
        saved = read_checkpoint(run)
        if saved is None:
            return f"The same command starts {run} again: nothing was saved yet."
        return f"The same command resumes {run} from step {saved.step:,}."

    with joined(device) as (world, where):

        def prepare() -> "tuple[Plan, Path, bool]":
            if options.get("head") != "cca":
                options["precision"] = choose_precision(options.get("precision", "auto"), where)
            encoders = {"image_encoder": image_encoder, "text_encoder": text_encoder}
            plan, notes = make_plan(features, options, captions=names, exclude=exclude or (), **encoders)
            if 0 < plan.settings.batch_size < world.size and plan.settings.steps:
                raise UserError(
                    f"--batch-size is invalid: got {plan.settings.batch_size} for {world.size} processes. Give each "
                    "process at least one pair."
                )
            for note in notes:
                typer.echo(f"note: {note}")
            path = out or default_path(features, plan.settings.head)
            claim = claim_run(path, plan.record(), numbered=out is None)
            if claim.other:
                typer.echo(f"note: {claim.other} has other settings ({', '.join(claim.differing)}); this is a new run.")
            state = "is finished" if claim.finished else "resuming" if claim.begun else "writing"
            named = f"{claim.path} {state}" if claim.finished else f"{state} {claim.path}"
            processes = f"; {world.size} processes" if world.size > 1 else ""
            typer.echo(f"{named}: {plan.describe()}{processes}")
            return plan, claim.path, claim.finished

        plan, run, finished = world.first(prepare)
        started = time.monotonic()
        with stoppable(run, resumed_from):
            scores = train(
                plan,
                run,
                device=where,
                world=world,
                track=trackers,
                quiet=quiet or not world.leads,
                **{name: options[name] for name in ("keep", "on_collapse") if name in options},
            )
        if world.leads:
            if not finished:
                typer.echo(f"wrote {run} in {time.monotonic() - started:.0f} s")
            _print_results(run, plan, scores)


def _print_results(run: Path, plan: "Plan", scores: dict[str, float]) -> None:
    from sail_align.align.runs.checkpoint import best_checkpoint

    if scores:
        recalls = {way: " / ".join(f"{scores[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("t2i", "i2t")}
        typer.echo(
            f"held out ({plan.held_out_rows:,} pairs): loss {scores['loss']:.4g}, R@1/5/10 text→image "
            f"{recalls['t2i']}, image→text {recalls['i2t']}; chance of R@1 {scores['chance']:.2g}"
        )
        best = best_checkpoint(run)
        if best is not None and best.step < plan.settings.steps:
            typer.echo(f"best: mean R@1 {best.r1:.1f} after step {best.step:,}, kept in {best.folder}")
    if any(pairs.store.dataset == "demo" for pairs in plan.pairs):
        typer.echo(f"Next: sail-eval all --run {run}")
    else:
        typer.echo(
            f"Next: sail-eval retrieval TEST.yaml --run {run}     (your own images; see docs/data.md)\n"
            f"  or: sail-eval all --run {run}     (published sets found on this machine)"
        )
