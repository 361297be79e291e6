"""The training loop: it can be stopped at any moment and goes on to the same weights."""

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from sail_align.align.data.loader import Batch, Stream, batches_on
from sail_align.align.data.pairs import not_finite, read_rows
from sail_align.align.data.sampler import StreamState
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.loss import Loss, LossValue
from sail_align.align.runs.checkpoint import KEEP, SAVE_SECONDS, read_checkpoint, restore
from sail_align.align.runs.claim import hold_run
from sail_align.align.runs.folder import decisive
from sail_align.align.settings import FitSettings
from sail_align.align.stats.metrics import effective_rank, ranks
from sail_align.align.train.collapse import collapse_of
from sail_align.align.train.distributed import ALONE, World
from sail_align.align.train.initial import build_model
from sail_align.align.train.journal import Journal, OnCollapse
from sail_align.align.train.plan import Plan
from sail_align.align.train.step import Stepper, batch_loss, embed, make_optimizer, seed_torch, train_step
from sail_align.extract.errors import UserError
from sail_align.extract.system.signals import StoppedError, defer_signals

SCORES = 20
"""How often a run is scored."""


def fit(
    plan: Plan,
    run: Path,
    *,
    device: torch.device,
    world: World = ALONE,
    quiet: bool = False,
    keep: int = KEEP,
    save_seconds: float = SAVE_SECONDS,
    on_collapse: OnCollapse = "stop",
    track: Sequence[str] = (),
) -> dict[str, float]:
    """Train a plan's model, or compute it, into a run's folder; return the last held-out scores.

    What the run has saved is gone on from. Every step draws from a seed of its own and every batch is known by its
    number, so that on a CPU the weights and the log are bitwise those of a run that was never stopped. SIGTERM and
    Ctrl-C let the step end and save it. Of several processes, all of which call this, only the one that leads writes
    and scores.

    Raises:
        UserError: The loss is no longer finite, training has collapsed, the run's checkpoint is damaged, or another
            command trains the run.
        StoppedError: A signal asked for it.
        WorkersFailedError: Another process of the run ended.
    """
    settings = plan.settings
    with ExitStack() as held, _stream(plan, device, world) as stream:
        confirm: list[Callable[[], None]] = []  # of the one that leads
        world.decide(lambda: confirm.append(held.enter_context(hold_run(run, plan.record()))))
        saved = world.agree(lambda: read_checkpoint(run))
        if not world.same(saved and saved.record["digest"]):
            raise UserError(f"The processes see different checkpoints of {run}; use a folder that all machines share.")
        if saved is not None and decisive(saved.record["settings"]) != decisive(plan.record()):
            raise UserError(
                f"{saved.folder} was saved with other settings than {run / 'settings.json'} says; name another --out."
            )
        if saved is not None and saved.record["finished"]:
            if on_collapse == "stop" and (sentence := world.decide(lambda: collapse_of(run, settings.lr))):
                raise UserError(sentence)
            return dict(saved.record["scores"])
        fresh = saved is None and world.leads
        model = world.agree(lambda: build_model(plan, stream, device, fresh=fresh, quiet=quiet))
        optimizer = make_optimizer(model, settings)
        stepper = Stepper(
            model,
            plan.loss_of_parts(world.log_sum_exp),
            optimizer,
            device,
            in_parts=settings.loss == "sigmoid",
            precision=settings.precision,
            world=world,
        )
        held_out = Batch(*map(torch.from_numpy, read_rows(plan.scored, plan.held_out)))
        scores: dict[str, float] = {}

        done, state = None, StreamState.start()
        if saved is not None:
            checkpoint, done, state = saved, saved.record["step"], StreamState(*saved.record["stream"])
            world.agree(lambda: restore(checkpoint, model, optimizer))
        world.spread(*(parameter.data for parameter in model.parameters()))

        def open_journal() -> Journal | None:
            if not world.leads:
                return None
            opened = Journal(
                plan,
                run,
                stream,
                device,
                confirm=confirm[0],
                done=done,
                keep=keep,
                save_seconds=save_seconds,
                on_collapse=on_collapse,
                track=track,
                quiet=quiet,
            )
            return held.enter_context(opened)

        def score_held_out(step: int) -> None:
            if len(held_out.images):
                scores.update(world.decide(lambda: score(model, plan.loss, held_out, device)))
                if journal:
                    journal.scored(step, model, scores)

        interval = math.ceil(settings.steps / SCORES)
        journal = world.agree(open_journal)
        collapse: str | None = None
        with defer_signals() as stopped:
            if done is None:
                score_held_out(0)
            batches = batches_on(device, stream.batches(state))
            for step, (batch, state) in zip(range(done or 0, settings.steps), batches, strict=False):
                seed_torch(settings.seed, step)
                rate = learning_rate(settings, step)
                health = health_of(model, train_step(stepper, batch, rate))
                if not math.isfinite(loss := health["loss"]):
                    if not all(world.collect(all(bool(part.isfinite().all()) for part in batch))):
                        raise not_finite([pairs.store for pairs in plan.pairs])
                    raise UserError(f"The loss is {loss} after {step + 1} steps; lower --lr (now {settings.lr:g}).")
                if journal:
                    journal.trained(step + 1, {"lr": rate, **health})
                if (step + 1) % interval == 0 or step + 1 == settings.steps:
                    score_held_out(step + 1)
                told = world.collect((journal.collapse if journal else None, stopped() is not None))
                collapse, stop = told[0][0], any(asked for _, asked in told)
                if step + 1 == settings.steps:
                    break
                if journal and (journal.save_is_due or collapse or stop):
                    journal.save(model, step + 1, state, optimizer)
                if collapse:
                    raise UserError(collapse)
                if stop:
                    raise stopped() or StoppedError(signal.SIGTERM)
            if journal:
                journal.save(model, settings.steps, state, None)
            if collapse:
                raise UserError(collapse)
    return scores


def _stream(plan: Plan, device: torch.device, world: World) -> Stream:
    return Stream(
        plan.pairs,
        plan.training,
        batch_size=plan.settings.batch_size,
        seed=plan.settings.seed,
        policy=plan.policy,
        rank=world.rank,
        world=world.size,
        pin=device.type == "cuda",
    )


def health_of(model: AlignmentModel, loss: LossValue) -> dict[str, float]:
    """Return what a step's log line says: loss, t, b, mean logits and gradient masses, in one transfer from a GPU."""
    values = {"t": model.log_scale.exp(), "b": model.bias, **loss._asdict()}
    numbers = torch.stack([value.detach() for value in values.values()]).tolist()
    named = dict(zip(values, numbers, strict=True))
    return {"loss": named.pop("total"), **named}


@torch.no_grad()
def score(model: AlignmentModel, loss_of: Loss, batch: Batch, device: torch.device) -> dict[str, float]:
    """Score a model on pairs that it was not trained on.

    `loss` is over all of them as one batch: not comparable to that of a training batch of another size, in which the
    share of positives differs. `t2i_r1` … `i2t_r10` are R@1/5/10 both ways in percent, `r1` is the mean of both R@1
    and `chance` what guessing would give for it. `image_rank` and `text_rank` are effective ranks.
    """
    model.eval()
    image_BE, text_CBE = embed(model, batch, device)
    scores = {"loss": batch_loss(model, loss_of, image_BE, text_CBE).total.item()}
    captions, rows, _ = text_CBE.shape
    owner_M = np.tile(np.arange(rows), captions)
    images, texts = image_BE.cpu().numpy(), text_CBE.flatten(0, 1).cpu().numpy()
    image_ranks, text_ranks = ranks(images, texts, owner_M)
    for way, ranks_Q in (("t2i", text_ranks), ("i2t", image_ranks)):
        scores |= {f"{way}_r{k}": 100 * float(np.mean(ranks_Q < k)) for k in (1, 5, 10)}
    scores |= {"r1": (scores["t2i_r1"] + scores["i2t_r1"]) / 2, "chance": 100 / rows}
    return scores | {"image_rank": effective_rank(images), "text_rank": effective_rank(texts)}


def learning_rate(settings: FitSettings, step: int) -> float:
    """Return the rate of step 0, 1, …: a linear warm-up, then half a cosine down to 0."""
    warm = round(settings.warmup * settings.steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * (1 + math.cos(math.pi * (step - warm) / (settings.steps - warm))) / 2
