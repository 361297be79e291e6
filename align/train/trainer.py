"""The training loop. It can be stopped at any moment, and resumes to the same weights."""

import math
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from sail_align.align.data.loader import BUFFER_ROWS, Batch, Source, Stream
from sail_align.align.data.pairs import not_finite, read_rows
from sail_align.align.data.sampler import ALL_ROWS, StreamState
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.loss import Loss, LossValue
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.claim import hold_run
from sail_align.align.runs.folder import differences, run_digest
from sail_align.align.settings import CacheChoice, FitOptions, OnCollapse
from sail_align.align.stats.metrics import caption_ranks, effective_rank, mean_reciprocal_rank, recalls
from sail_align.align.train.bank import BankBuilder
from sail_align.align.train.collapse import Watch
from sail_align.align.train.distributed import ALONE, World
from sail_align.align.train.initial import build_model, start_model
from sail_align.align.train.placement import place_features
from sail_align.align.train.plan import Plan
from sail_align.align.train.step import Stepper, make_optimizer, seed_torch
from sail_align.align.train.transfer import Transfer
from sail_align.align.train.writer import SAVE_SECONDS, RunWriter, close_finished
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.errors import UserError
from sail_align.extract.system.signals import StoppedError, defer_signals

LOGGED = ("loss", "t", "b", *LossValue._fields[1:])
"""Numbers of a step in the log, besides the learning rate."""

SCORINGS = 20
"""Number of times that a run is scored."""


def fit(
    plan: Plan,
    run: Path,
    *,
    device: torch.device,
    world: World = ALONE,
    quiet: bool = False,
    keep: int = FitOptions.keep,
    save_seconds: float = SAVE_SECONDS,
    cache: CacheChoice = FitOptions.cache,
    on_collapse: OnCollapse = FitOptions.on_collapse,
    track: Sequence[str] = (),
) -> dict[str, float]:
    """Train the model of a plan, or compute it in closed form, into a run's folder; return the last held-out scores.

    An unfinished run is resumed. Each step has its own random seed, and each batch depends only on its number, so on a
    CPU the weights and the log are bitwise those of a run that was never stopped. SIGTERM and Ctrl-C let the current
    step finish, and save it. All processes of a run call this function, but only the leader writes and scores.

    Raises:
        UserError: The loss is not finite, training collapsed, the checkpoint is damaged, or another process trains the
            run.
        StoppedError: A signal stopped the training.
        WorkersFailedError: Another process of the run died.
    """
    with ExitStack() as stack:
        confirm: list[Callable[[], None]] = []  # in the leader only

        def open_run() -> tuple[Checkpoint | None, str]:
            confirm.append(stack.enter_context(hold_run(run, plan.digest)))
            saved = Checkpoint.read(run)
            if saved and run_digest(saved.record["settings"]) != plan.digest:
                differing = "; ".join(differences(saved.record["settings"], plan.record()))
                raise UserError(
                    f"{saved.folder} has other settings than {run / 'settings.json'} ({differing}). Pass another --out."
                )
            if saved and saved.finished:
                if on_collapse == "stop" and (message := Watch.replay(run, plan.settings.lr)):
                    raise UserError(message)
                close_finished(run, saved, keep)
            return saved, plan.digest

        saved, digest = world.first(open_run)
        if saved and saved.finished:
            return dict(saved.record["scores"])
        training = Training(plan, device, world)
        stack.enter_context(training.stream)
        stack.enter_context(training.begin(saved, digest, cache, quiet=quiet))

        def open_writer() -> None:
            training.writer = RunWriter(
                plan,
                run,
                training.source,
                device,
                bank=BankBuilder(plan, training.held_out, device),
                confirm=confirm[0],
                done=saved.step if saved else None,
                keep=keep,
                save_seconds=save_seconds,
                on_collapse=on_collapse,
                track=track,
                quiet=quiet,
            )
            stack.callback(training.writer.close)

        world.first(open_writer)
        return training.run(saved)


class Training:
    """The training of a run in one process. Only the leader has a writer."""

    model: AlignmentModel
    stepper: Stepper
    held_out: Batch

    def __init__(self, plan: Plan, device: torch.device, world: World):
        self.plan, self.device, self.world = plan, device, world
        self.writer: RunWriter | None = None
        self.scores: dict[str, float] = {}
        self.stream = Stream(
            plan.pairs,
            plan.training,
            batch_size=plan.settings.batch_size,
            seed=plan.settings.seed,
            buffer_rows=ALL_ROWS if plan.settings.order == "permuted" else BUFFER_ROWS,
            policy=plan.policy,
            rank=world.rank,
            world=world.size,
            pin=device.type == "cuda",
        )
        self.source: Source = self.stream
        self.behind = int(device.type == "cuda")
        """Steps whose numbers are not waited for, so that a GPU always has work."""
        self.unlogged: deque[tuple[int, Transfer]] = deque()
        self.batch: Batch | None = None

    def begin(self, saved: Checkpoint | None, digest: str, cache: CacheChoice, *, quiet: bool) -> Source:
        """Build the initial model or restore a saved one, and load the features; return the source of the batches.

        Raises:
            UserError: As for `build` and `place_features`.
        """
        settings, world = self.plan.settings, self.world
        world.every(lambda: self.build(saved, digest))
        if settings.steps:
            permuted = settings.order == "permuted"
            self.source = place_features(cache, self.stream, self.stepper, permuted=permuted, quiet=quiet)
        if saved is None:
            rows = self.source if world.size == 1 else self.stream  # of several processes, each caches a part
            world.first(lambda: start_model(self.model, self.plan, rows, self.device, quiet=quiet))
        world.broadcast(*(parameter.data for parameter in self.model.parameters()))
        return self.source

    def build(self, saved: Checkpoint | None, digest: str) -> None:
        """Build a model, or restore a saved one.

        Raises:
            UserError: This process reads other stores or checkpoints than the leader, or they are damaged.
        """
        plan, settings, world = self.plan, self.plan.settings, self.world
        if run_digest(plan.record()) != digest:
            raise UserError(f"Process {world.rank} reads other stores than process 0. Give all machines the same ones.")
        if saved and not saved.folder.exists():
            raise UserError(f"Process {world.rank} does not find {saved.folder}. Use a folder that all machines share.")
        self.model = build_model(plan, self.device)
        self.stepper = Stepper(
            self.model,
            plan.loss(world.log_sum_exp),
            make_optimizer(self.model, settings),
            self.device,
            in_parts=settings.loss == "sigmoid",
            precision=settings.precision,
            world=world,
        )
        self.held_out = Batch(*map(torch.from_numpy, read_rows(plan.scored, plan.held_out)))
        if saved:
            saved.restore(self.model, self.stepper.optimizer)

    def run(self, saved: Checkpoint | None) -> dict[str, float]:
        """Train to the end; return the last held-out scores."""
        steps, writer = self.plan.settings.steps, self.writer
        interval = math.ceil(steps / SCORINGS)
        done, state = (saved.step, StreamState(*saved.record["stream"])) if saved else (0, StreamState())
        collapse: str | None = None
        with defer_signals() as stopped:
            if saved is None:
                self.score(0)
            batches = self.source.batches_on(self.device, state)
            for step, (batch, state) in zip(range(done + 1, steps + 1), batches, strict=False):
                self.train(step, batch)
                if step % interval == 0 or step == steps:
                    self.score(step)
                mine = (writer.collapse, writer.out_of_patience, writer.save_is_due) if writer else (None, False, False)
                seen = self.world.collect((*mine, stopped() is not None))
                (collapse, ended, due, _), stop = seen[0], any(asked for *_, asked in seen)
                done = step
                if step == steps or ended:
                    break
                if due or collapse or stop:
                    self.log()
                    if writer:
                        writer.save(step, state, self.model, self.stepper.optimizer)
                if collapse:
                    raise UserError(collapse)
                if stop:
                    raise stopped() or StoppedError(signal.SIGTERM)
            self.log()
            collapse = self.world.collect(writer.collapse if writer else None)[0]
            if writer:
                self.scores = writer.save(done, state, self.model, None)
            if collapse:
                raise UserError(collapse)
        return self.scores

    def train(self, step: int, batch: Batch) -> None:
        """Take step 1, 2, … and log it or, on a GPU, the one before: this step's numbers do not exist yet.

        Raises:
            UserError: The loss is not finite.
        """
        settings = self.plan.settings
        seed_torch(settings.seed, step - 1)
        total, *health = self.stepper.step(batch, settings.learning_rate(step - 1))
        t, b = self.model.log_scale.detach().exp(), self.model.bias.detach()
        # When a GPU's numbers arrive, the batch is gone. The sum of its features is NaN or infinite if one of them is.
        sums = _sums(batch) if self.behind else []
        self.batch = None if sums else batch
        self.unlogged.append((step, Transfer.begin(torch.stack([total, t, b, *health, *sums]))))
        self.log(self.behind)

    def log(self, behind: int = 0) -> None:
        """Log all steps but the last few.

        Raises:
            UserError: The loss is not finite.
        """
        settings = self.plan.settings
        while len(self.unlogged) > behind:
            step, transfer = self.unlogged.popleft()
            numbers = transfer.wait()
            values = dict(zip(LOGGED, numbers, strict=False))
            if not math.isfinite(values["loss"]):
                sums = list(map(float, _sums(self.batch))) if self.batch else numbers[len(LOGGED) :]
                if not all(self.world.collect(all(map(math.isfinite, sums)))):
                    raise not_finite([pairs.store for pairs in self.plan.pairs])
                raise UserError(f"The loss is {values['loss']} after {step} steps. Lower --lr (now {settings.lr:g}).")
            if self.writer:
                self.writer.log_step(step, {"lr": settings.learning_rate(step - 1), **values})

    def score(self, step: int) -> None:
        """Score the model on held-out pairs in the leader, and log the scores."""
        if len(self.held_out.images):
            self.log()
            self.scores = self.world.first(lambda: score(self.model, self.plan.loss(), self.held_out, self.device))
            if self.writer:
                self.writer.log_scores(step, self.scores, self.model)


def _sums(batch: Batch) -> list[Tensor]:
    return [part.sum(dtype=torch.float32) for part in batch]


@torch.no_grad()
@tf32_products()
def score(model: AlignmentModel, loss_of: Loss, batch: Batch, device: torch.device) -> dict[str, float]:
    """Score a model on held-out pairs.

    Returns:
        `loss`, over all pairs as one batch: not comparable with a training batch of another size, in which the share of
        positives differs. `t2i_r1` … `i2t_r10`: R@1/5/10 in both directions in percent. `r1`: mean of both R@1.
        `chance`: its chance level. `mrr`: mean reciprocal rank of both directions in percent. `image_rank` and
        `text_rank`: effective ranks of the embeddings.
    """
    model.eval()
    compared = model(*batch.to(device))
    scores = {"loss": loss_of(*compared, model.log_scale, model.bias).total.item()}
    image_BE, text_CBE = (each[..., : model.image_head.out.out_features] for each in compared)  # no item biases
    images, texts = image_BE.cpu().numpy(), text_CBE.cpu().numpy()
    both = caption_ranks(images, texts)
    scores |= {**recalls(*both), "chance": 100 / len(images), "mrr": mean_reciprocal_rank(*both)}
    text_rank = effective_rank(texts.reshape(-1, texts.shape[-1]))
    return scores | {"image_rank": effective_rank(images), "text_rank": text_rank}
