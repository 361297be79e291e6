"""sail-align fit: its options, and what it prints."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sail_align.align.data.captions import parse_captions
from sail_align.align.settings import CLOSED_FORM_DIM, PAPER_ROWS, PRESETS, FitSettings, check_options, number_or_auto
from sail_align.align.train.trackers import parse_trackers
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import as_path, require_store

if TYPE_CHECKING:
    from sail_align.align.train.journal import OnCollapse


def _default(name: str) -> str:
    """Return a setting's default in words, and the small preset's where it is another."""
    values = {preset: chosen.get(name, getattr(FitSettings, name, None)) for preset, chosen in PRESETS.items()}
    small = "" if values["small"] == values["paper"] else f"; small: {values['small']}"
    return f"[default: {values['paper']}{small}]"


def fit(
    features: Annotated[
        list[Path],
        typer.Option(metavar="STORE", help="A feature store; may be given several times.", parser=as_path),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The run's folder.  [default: runs/<store>-<head>; where that has other settings, -2, -3 … behind it]",
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            help="Captions to train on together, with weights if need be: raw,long:0.5.  [default: those that all "
            "stores have; with --positives, that any has]"
        ),
    ] = None,
    positives: Annotated[
        int | None,
        typer.Option(
            help="Captions of each image that are drawn for a step from those of its store, by weight.  [default: all "
            "of them]"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"paper or small: the defaults below.  [default: small below {PAPER_ROWS:,} pairs, else paper]"
        ),
    ] = None,
    head: Annotated[str, typer.Option(help="linear, mlp, glu; or cca, computed in closed form.")] = FitSettings.head,
    expansion: Annotated[
        int | None, typer.Option(help=f"Hidden units a feature dimension.  {_default('expansion')}")
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help=f"Of the shared space.  [default: {FitSettings.dim}; from a closed form: {CLOSED_FORM_DIM}]"),
    ] = None,
    image_dropout: Annotated[
        float | None, typer.Option(help=f"On the image head's inputs and hidden units.  {_default('image_dropout')}")
    ] = None,
    text_dropout: Annotated[
        float | None, typer.Option(help=f"On the text head's inputs and hidden units.  {_default('text_dropout')}")
    ] = None,
    image_power: Annotated[
        float | None,
        typer.Option(help=f"Image features are raised to it, signs kept.  {_default('image_power')}"),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help=f"random, or closed-form: a linear path begins as the CCA.  {_default('start')}"),
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help=f"Regularisation of the closed form.  {_default('ridge')}")
    ] = None,
    loss: Annotated[str | None, typer.Option(help=f"sigmoid or infonce.  {_default('loss')}")] = None,
    divisor: Annotated[
        str | None, typer.Option(help=f"Of the sigmoid loss: pairs (|B|²) or batch (|B|).  {_default('divisor')}")
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option(metavar="T|auto", help=f"What t starts from; auto: 2 ln |B|.  {_default('temperature')}"),
    ] = None,
    bias: Annotated[
        str | None,
        typer.Option(
            metavar="B|auto",
            help="What b starts from; auto: where positives and negatives balance, as --temperature auto has it.  "
            f"{_default('bias')}",
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"lion or adamw.  {_default('optimizer')}")] = None,
    lr: Annotated[float | None, typer.Option(help=f"Highest rate, of a cosine.  {_default('lr')}")] = None,
    weight_decay: Annotated[float | None, typer.Option(help=_default("weight_decay"))] = None,
    warmup: Annotated[float | None, typer.Option(help=f"Fraction of the steps.  {_default('warmup')}")] = None,
    batch_size: Annotated[int | None, typer.Option(help=_default("batch_size"))] = None,
    epochs: Annotated[float | None, typer.Option(help=_default("epochs"))] = None,
    steps: Annotated[int | None, typer.Option(help="In place of epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help=_default("seed"))] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the pairs to score on, not to train on; at least 100 (a fifth of few), at most 5,000.  "
            + _default("held_out")
        ),
    ] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Keys not to train on, one a line, as from `sail-extract overlap`; may be given several times.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of matrix products: float32, tf32, bfloat16.  [default: auto; bfloat16 on a GPU, else float32]"
        ),
    ] = None,
    keep: Annotated[
        int, typer.Option(min=1, help="Checkpoints to go on from that are kept, besides the best one.")
    ] = 2,
    on_collapse: Annotated[
        str, typer.Option(help="stop or warn, when the log shows that training has collapsed.")
    ] = "stop",
    track: Annotated[
        str | None, typer.Option(help="tensorboard, wandb or both, besides metrics.jsonl: 'sail-align[tracking]'.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train the heads on stores; typed again after a stop, it goes on. Defaults are the paper's, or small data's."""
    given = {
        "preset": preset,
        "head": head,
        "expansion": expansion,
        "dim": dim,
        "image_dropout": image_dropout,
        "text_dropout": text_dropout,
        "image_power": image_power,
        "start": start,
        "ridge": ridge,
        "positives": positives,
        "loss": loss,
        "divisor": divisor,
        "temperature": number_or_auto("temperature", temperature),
        "bias": number_or_auto("bias", bias),
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "held_out": held_out,
        "precision": precision,
    }
    options = {name: value for name, value in given.items() if value is not None}
    chosen = captions.split(",") if captions else []
    check_options(options)  # before the seconds that torch takes to load
    parse_captions(chosen)
    check_options({"on_collapse": on_collapse})
    trackers = parse_trackers(track)
    for store in features:
        require_store(store)

    from sail_align.align.runs.checkpoint import best_of, read_checkpoint
    from sail_align.align.runs.claim import claim_run, default_path
    from sail_align.align.runs.folder import decisive
    from sail_align.align.train.device import choose_precision
    from sail_align.align.train.distributed import joined
    from sail_align.align.train.plan import make_plan
    from sail_align.align.train.trainer import fit as train
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.system.files import report_write_errors
    from sail_align.extract.system.progress import note
    from sail_align.extract.system.signals import StoppedError, raise_on_signals

    with joined(device) as (world, own_device):
        say = typer.echo if world.leads else _silently
        where = world.agree(lambda: Runtime.of(own_device, "float32").device)
        if head != "cca":
            options["precision"] = world.agree(lambda: choose_precision(precision or "auto", where))
        plan, notes = world.agree(
            lambda: make_plan(
                features,
                options,
                captions=chosen,
                image_encoder=image_encoder,
                text_encoder=text_encoder,
                exclude=exclude or (),
            )
        )
        if not world.same(decisive(plan.record())):
            raise UserError("The processes see different stores or options; give all machines the same.")
        if 0 < plan.settings.batch_size < world.size and plan.settings.steps:
            raise UserError(f"A batch of {plan.settings.batch_size} does not go round {world.size} processes.")
        for sentence in notes:
            say(f"note: {sentence}")

        def claimed() -> tuple[str, bool]:
            claim = claim_run(out or default_path(features, head), plan.record(), numbered=out is None)
            if claim.other:
                say(f"note: {claim.other} has other settings ({', '.join(claim.differing)}): this is another run.")
            what = "going on with" if claim.begun else "writing"
            said = f"{claim.path} is finished" if claim.finished else f"{what} {claim.path}"
            say(f"{said}: {plan.describe()}{world.describe()}")
            return str(claim.path), claim.finished

        name, finished = world.decide(claimed)
        run = Path(name)
        started = time.monotonic()
        try:
            with raise_on_signals(), report_write_errors(run, during_run=True):
                scores = train(
                    plan,
                    run,
                    device=where,
                    world=world,
                    quiet=quiet or not world.leads,
                    keep=keep,
                    on_collapse=cast("OnCollapse", on_collapse),
                    track=trackers,
                )
        except StoppedError as stopped:
            if not world.leads:
                raise
            saved = read_checkpoint(run)
            place = f"goes on with {run} from step {saved.record['step']:,}" if saved else f"begins {run} again"
            note(f"Stopped by {stopped.name}; the same command {place}.")
            raise
        if not finished:
            say(f"wrote {run} in {time.monotonic() - started:.0f} s")
        if scores:
            recalls = {way: " / ".join(f"{scores[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("t2i", "i2t")}
            say(
                f"held out ({plan.held_out_rows:,} pairs): loss {scores['loss']:.4g}, "
                f"R@1/5/10 text→image {recalls['t2i']}, image→text {recalls['i2t']}; "
                f"chance of R@1 {scores['chance']:.2g}"
            )
            best = best_of(run)
            if best is not None and best.step < plan.settings.steps:
                say(f"best: mean R@1 {best.r1:.1f} after step {best.step:,}, kept in {best.folder}")
        if any(pairs.store.dataset == "demo" for pairs in plan.pairs):
            say(f"Next: sail-eval all --run {run}")
        else:
            say(
                f"Next: sail-eval retrieval TEST.yaml --run {run}     (pictures of yours: docs/data.md says how)\n"
                f"  or: sail-eval all --run {run}     (the published sets that are here)"
            )


def _silently(_: str) -> None:
    """Say nothing: another process speaks."""
