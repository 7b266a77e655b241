"""One training loop for the dense network, the knockoff gates and fine-tuning.

An `Objective` defines what is trained and its loss; the loop handles epochs, the learning rate, checks, progress and
checkpoints. Random numbers depend only on seed and epoch, so a run that was killed and resumed gives the same result as
an uninterrupted one. The caller's random state is restored.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scop.compute import distributed
from scop.compute.random_state import private_random_state, seed_generators
from scop.errors import Stopped, UserError
from scop.models.history import EpochRecord
from scop.system.progress import progress
from scop.training.checkpointing import Checkpointing
from scop.training.learning_rate import LearningRate, Schedule

logger = logging.getLogger(__name__)

_STEPS_BETWEEN_CHECKS = 20
"""Reading the loss makes a GPU wait, so it is not read at every step."""
_SECONDS_BETWEEN_LINES = 3.0
"""Epochs of a small network take less than a second, so the log does not show all of them."""


class Objective(Protocol):
    """What a training run minimises."""

    @property
    def state(self) -> nn.Module:
        """The module whose state dict is the result; checkpoints hold it."""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the loss, a scalar, and the logits (B, classes) of a batch, both float32; None without logits."""

    def start_epoch(self, epoch: int) -> None:
        """Put modules into training mode for an epoch, counted from 0."""

    def after_step(self) -> None:
        """Called after the optimizer has updated the parameters."""


class TrainingBatches(Protocol):
    """What the loop iterates over, once per epoch: (images, labels)."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class Step:
    """One step of training: the loss, its gradients, and the update of the parameters.

    Args:
        objective: what is minimised.
        optimizer: over its parameters.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take the step; return the detached loss and logits from before the update, as `Objective.loss` does."""
        loss, logits = self.objective.loss(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.objective.after_step()
        return loss.detach(), None if logits is None else logits.detach()


def fit(
    objective: Objective,
    batches: TrainingBatches,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    label: str,
    seed: int = 0,
    validate: Callable[[], tuple[float, float]] | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpointing: Checkpointing | None = None,
) -> list[EpochRecord]:
    """Train, in place.

    Args:
        objective: what is minimised.
        batches: one iteration is an epoch; ``set_epoch`` is called if it exists. If several processes train, the shard
            of this process.
        optimizer: over the objective's parameters, at its peak learning rate.
        schedule: length and learning rate.
        label: name of the training in the log.
        seed: seed of randomness inside the network, such as dropout.
        validate: returns (loss, top-1) on the validation split; called after every epoch.
        on_epoch: called after every epoch trained by this call.
        checkpointing: how the run is interrupted and resumed; by default neither.

    Returns:
        The records of all epochs, including those before resuming.

    Raises:
        UserError: the loss is not finite, or the schedule keeps the best epoch without a validation split.
        Stopped: a stop was requested.
    """
    if schedule.keep == "best" and validate is None:
        raise UserError("keep: best needs a validation split; set data.validation above 0, or keep: last")
    checkpointing = checkpointing or Checkpointing()
    rate = LearningRate(optimizer, schedule, len(batches))  # before a checkpoint replaces the peak rates
    run = _Run(objective, optimizer, schedule, label, checkpointing)
    stop_requested = distributed.any_process(checkpointing.stop_requested)
    take = Step(objective, optimizer)
    reported = -math.inf
    with private_random_state():
        for epoch in range(len(run.history), schedule.epochs):
            seed_generators(seed * 1_000_003 + epoch + 0x9E37_79B9 * distributed.rank())
            if hasattr(batches, "set_epoch"):
                batches.set_epoch(epoch)
            work = _Epoch(epoch, len(batches), f"{label} {epoch + 1}/{schedule.epochs}", run.take_interrupted())
            if not work.train(take, batches, rate, stop_requested):
                run.stop(work)
            record = work.record()
            if validate is not None:
                loss, top1 = validate()
                record = replace(record, validation_loss=loss, validation_top1=top1)
            run.finish_epoch(record)
            on_epoch(record)
            if epoch + 1 == schedule.epochs or time.monotonic() - reported >= _SECONDS_BETWEEN_LINES:
                reported = time.monotonic()
                logger.info("%s", _describe(label, record, schedule.epochs))
            run.try_save()
    run.load_best()
    return run.history


class _Run:
    """The state of a training run, loaded from its newest checkpoint if there is one."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        label: str,
        checkpointing: Checkpointing,
    ) -> None:
        self._objective, self._optimizer, self._schedule = objective, optimizer, schedule
        self._label, self._store = label, checkpointing.store
        self.history: list[EpochRecord] = []
        self._best: dict[str, Tensor] | None = None
        self._interrupted: dict[str, Any] | None = None
        if self._store and (saved := self._store.load()):
            objective.state.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.history = [EpochRecord(**record) for record in saved["history"]]
            self._best, self._interrupted = saved["best"], saved["interrupted"]
            steps = f" and {self._interrupted['steps']} steps" if self._interrupted else ""
            logger.info(
                "%s: resumes after epoch %d%s of %d, from %s",
                label,
                len(self.history),
                steps,
                schedule.epochs,
                self._store.uri,
            )

    def take_interrupted(self) -> dict[str, Any] | None:
        """Return the state of the interrupted epoch, once."""
        state, self._interrupted = self._interrupted, None
        return state

    def finish_epoch(self, record: EpochRecord) -> None:
        """Record an epoch; copy the weights if it is the best one and `keep` is best."""
        top1 = record.validation_top1
        best = max((earlier.validation_top1 or 0 for earlier in self.history), default=0)
        if self._schedule.keep == "best" and top1 is not None and top1 >= best:
            state = self._objective.state.state_dict()
            self._best = {key: value.detach().clone() for key, value in state.items()}
        self.history.append(record)

    def try_save(self) -> None:
        """Write a checkpoint; if that fails, log a warning and continue the training."""
        try:
            self._save()
        except UserError as error:
            logger.warning("%s: no checkpoint after epoch %d: %s", self._label, len(self.history), error)

    def stop(self, epoch: _Epoch) -> None:
        """Write a checkpoint within an epoch and raise Stopped."""
        try:
            self._save(epoch.state())
        except UserError as error:
            raise Stopped(f"{self._label}: stopped, and no checkpoint could be written: {error}") from error
        raise Stopped(f"{self._label}: stopped in epoch {epoch.epoch + 1} of {self._schedule.epochs}")

    def load_best(self) -> None:
        """Load the weights of the best epoch, if they are kept."""
        if self._best is not None:
            self._objective.state.load_state_dict(self._best)

    def _save(self, interrupted: dict[str, Any] | None = None) -> None:
        if self._store:
            state: dict[str, Any] = {
                "model": self._objective.state.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "best": self._best,
                "history": [asdict(record) for record in self.history],
                "interrupted": interrupted,
            }
            self._store.save(state, len(self.history), interrupted["steps"] if interrupted else 0)


class _Epoch:
    """One pass over the batches, which can be interrupted and resumed.

    Args:
        epoch: counted from 0.
        length: number of batches.
        label: name in the progress display.
        interrupted: what `state` returned when the epoch was interrupted.
    """

    def __init__(self, epoch: int, length: int, label: str, interrupted: dict[str, Any] | None) -> None:
        self.epoch, self.length, self.label = epoch, length, label
        self.steps, self.seconds = 0, 0.0
        self.tally = _Tally(first_step=epoch * length)
        self._random: list[list[Tensor]] = []
        if interrupted:
            self.steps, self.seconds = interrupted["steps"], interrupted["seconds"]
            self._random = interrupted["random"]
            self.tally.restore(interrupted["tally"])

    def train(
        self, take: Step, batches: TrainingBatches, rate: LearningRate, stop_requested: Callable[[], bool]
    ) -> bool:
        """Train on the remaining batches; return False if stopped. Raises UserError if the loss is not finite."""
        started, before = time.perf_counter(), self.seconds
        take.objective.start_epoch(self.epoch)
        with progress(self.length, self.label) as bar:
            # Batches that were used before the interruption are drawn again and skipped, so that augmentation
            # continues as without the interruption.
            rest = islice(batches, self.steps, None)
            bar.update(self.steps)
            batch = next(rest, None)
            if distributed.rank() < len(self._random):
                _set_random_state(self._random[distributed.rank()])
            while batch is not None:
                images, labels = batch
                step = self.tally.first_step + self.steps
                lr = rate.set(step)
                loss, logits = take(images, labels)
                self.tally.add(loss, logits, labels, lr)
                self.steps += 1
                bar.update(1)
                if step % _STEPS_BETWEEN_CHECKS == 0:
                    bar.set_postfix(loss=f"{self.tally.check():.4f}")
                if stop_requested():
                    break
                batch = next(rest, None)
        self.tally.check()
        self.seconds = before + time.perf_counter() - started
        return batch is None

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "tally": self.tally.state(),
            "random": distributed.all_gather(_random_state()),
        }

    def record(self) -> EpochRecord:
        loss, top1 = distributed.all_reduce_mean(self.tally.mean_loss, self.tally.top1)  # NaN without logits
        return EpochRecord(
            epoch=self.epoch + 1,
            lr=self.tally.rates[-1],
            loss=loss,
            top1=None if math.isnan(top1) else top1,
            seconds=round(self.seconds, 3),
        )


def _random_state() -> list[Tensor]:
    """Return the random state of the CPU and, if a GPU is in use, of the current GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if _on_gpu() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:] and _on_gpu():
        torch.cuda.set_rng_state(state[1])


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _describe(label: str, record: EpochRecord, epochs: int) -> str:
    line = f"{label}: epoch {record.epoch}/{epochs}, loss {record.loss:.4f}"
    if record.top1 is not None:
        line += f", top-1 {record.top1:.2%}"
    if record.validation_top1 is not None:
        line += f", validation {record.validation_top1:.2%}"
    return f"{line}, {record.seconds:.1f} s"


class _Tally:
    """Losses and correct predictions of an epoch, kept on the device so that adding to them does not wait."""

    def __init__(self, first_step: int) -> None:
        self.first_step, self.seen, self.checked = first_step, 0, 0
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self.hits: Tensor | int = 0

    def add(self, loss: Tensor, logits: Tensor | None, labels: Tensor, lr: float) -> None:
        self.losses.append(loss)
        self.rates.append(lr)
        if logits is not None:
            self.hits = self.hits + (logits.argmax(1) == labels.to(logits.device)).sum()
            self.seen += len(labels)

    def state(self) -> dict[str, Any]:
        return {
            "losses": torch.stack(self.losses).cpu(),
            "rates": self.rates,
            "hits": int(self.hits),
            "seen": self.seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.losses, self.rates = list(state["losses"].unbind()), list(state["rates"])
        self.hits, self.seen, self.checked = state["hits"], state["seen"], len(state["rates"])

    def check(self) -> float:
        """Return the latest loss; raise UserError at the first one that is not finite."""
        fresh = torch.stack(self.losses[self.checked :]).cpu() if self.checked < len(self.losses) else torch.zeros(0)
        for index, value in enumerate(fresh.tolist(), start=self.checked):
            if not math.isfinite(value):
                raise UserError(
                    f"the loss is {value} at step {self.first_step + index}, learning rate {self.rates[index]:.3g}; "
                    "use a lower lr or a longer warm-up"
                )
        self.checked = len(self.losses)
        return float(self.losses[-1])

    @property
    def mean_loss(self) -> float:
        return float(torch.stack([loss.cpu() for loss in self.losses]).mean())

    @property
    def top1(self) -> float:
        return float(self.hits) / self.seen if self.seen else math.nan
