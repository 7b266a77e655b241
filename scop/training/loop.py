"""One training loop for the dense network, the knockoff gates and fine-tuning.

What is trained, and on which loss, is an `Objective`; the loop does epochs, the learning rate, checks, progress and
checkpoints. Randomness depends on seed and epoch alone: a run that was killed and resumed ends as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scop.compute import distributed
from scop.errors import Stopped, UserError
from scop.models.history import EpochRecord
from scop.system.progress import progress
from scop.training.learning_rate import LearningRate

# Looking at the loss makes a GPU wait, so not at every step.
_STEPS_BETWEEN_CHECKS = 20
# Epochs of a small network take less than a second: a log need not tell of each.
_SECONDS_BETWEEN_LINES = 3.0


class Objective(Protocol):
    """What a training run minimises."""

    @property
    def state(self) -> nn.Module:
        """The module whose state dict is the result; checkpoints hold it."""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(loss, logits) of a batch: scalar and (B, classes), both float32; None where nothing is classified."""

    def start_epoch(self, epoch: int) -> None:
        """Bring modules into training mode for an epoch, counted from 0."""

    def after_step(self) -> None:
        """Called when the optimizer has moved the parameters."""


class TrainingBatches(Protocol):
    """What the loop iterates over, once per epoch: (images, labels)."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class CheckpointStore(Protocol):
    """Where a training run keeps its states; see `scop.storage.checkpoints.Checkpoints`."""

    @property
    def place(self) -> str: ...

    def part(self, name: str) -> CheckpointStore: ...

    def save(self, state: dict[str, Any], epochs: int, steps: int = 0) -> None: ...

    def load(self) -> dict[str, Any] | None: ...


class Step:
    """One step of training: the loss, its gradients, and the parameters moved by them.

    Args:
        objective: what is minimised.
        optimizer: over its parameters.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(loss, logits) before the step, as `Objective.loss` gives them, without a graph of gradients."""
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
    *,
    epochs: int,
    label: str,
    seed: int = 0,
    schedule: str = "constant",
    warmup_epochs: float = 0.0,
    keep: str = "last",
    validate: Callable[[], tuple[float, float]] | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpoints: CheckpointStore | None = None,
    stopping: Callable[[], bool] = lambda: False,
    step: type[Step] = Step,
) -> list[EpochRecord]:
    """Train, in place.

    Args:
        objective: what is minimised.
        batches: one iteration is an epoch; its ``set_epoch`` is called where it has one. Where several processes
            train, this one's share of them.
        optimizer: over the objective's parameters, at its peak learning rate.
        epochs: passes over the batches.
        label: names the work in the progress display.
        seed: of randomness inside the network, such as dropout.
        schedule, warmup_epochs: see `lr_factor`.
        keep: last, or best: the weights of the epoch that was best on the validation split.
        validate: gives (loss, top-1) on the validation split; called after every epoch.
        on_epoch: told of every epoch that was trained here.
        checkpoints: one is written after every epoch; training goes on from the newest.
        stopping: asked after every step; once it says yes, a checkpoint is written and `Stopped` raised.
        step: how one is taken.

    Returns:
        The records of all epochs, those before a resumption included.

    Raises:
        UserError: the loss stopped being finite, or `keep` asks for what cannot be known.
        Stopped: `stopping` said so.
    """
    if keep == "best" and validate is None:
        raise UserError("keep: best needs a validation split; set data.validation above 0 or keep: last")
    rate = LearningRate(optimizer, schedule, total_steps=epochs * len(batches), warmup=warmup_epochs / max(1, epochs))
    history: list[EpochRecord] = []
    best: dict[str, Tensor] | None = None
    begun: dict[str, Any] | None = None
    if checkpoints and (saved := checkpoints.load()):
        objective.state.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history, best, begun = [EpochRecord(**record) for record in saved["history"]], saved["best"], saved["begun"]
        within = f" and {begun['steps']} steps" if begun else ""
        print(f"{label}: resumes after epoch {len(history)}{within} of {epochs}, {checkpoints.place}", flush=True)

    def save(begun: dict[str, Any] | None = None) -> None:
        """Raises UserError where it cannot be done."""
        if checkpoints:
            state: dict[str, Any] = {"model": objective.state.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"best": best, "history": [asdict(record) for record in history], "begun": begun}
            checkpoints.save(state, len(history), begun["steps"] if begun else 0)

    stopping = distributed.agreed(stopping)
    take = step(objective, optimizer)
    said = -math.inf
    for epoch in range(len(history), epochs):
        torch.manual_seed(seed * 1_000_003 + epoch + 0x9E37_79B9 * distributed.rank())
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        work = _Epoch(epoch, len(batches), f"{label} {epoch + 1}/{epochs}", begun)
        begun = None
        if not work.train(take, batches, rate, stopping):
            try:
                save(work.state())
            except UserError as error:
                raise Stopped(f"{label}: stopped as asked, and no checkpoint could be written: {error}") from error
            raise Stopped(f"{label}: stopped as asked in epoch {epoch + 1} of {epochs}")
        record = work.record()
        if validate is not None:
            loss, top1 = validate()
            record = replace(record, validation_loss=loss, validation_top1=top1)
            if keep == "best" and top1 >= max((r.validation_top1 or 0 for r in history), default=0):
                best = {key: value.detach().clone() for key, value in objective.state.state_dict().items()}
        history.append(record)
        on_epoch(record)
        if epoch + 1 == epochs or time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(_line(label, record, epochs), flush=True)
        try:
            save()
        except UserError as error:  # hours of training are worth more than the checkpoint
            print(f"warning: {label}: no checkpoint after epoch {epoch + 1}: {error}", flush=True)
    if best is not None:
        objective.state.load_state_dict(best)
    return history


class _Epoch:
    """One pass over the batches, which may be broken off and taken up again.

    Args:
        epoch: counted from 0.
        length: batches in it.
        label: names it in the progress display.
        begun: what `state` gave when it was broken off.
    """

    def __init__(self, epoch: int, length: int, label: str, begun: dict[str, Any] | None) -> None:
        self.epoch, self.length, self.label = epoch, length, label
        self.steps, self.seconds = 0, 0.0
        self.tally = _Tally(first_step=epoch * length)
        self._random: list[list[Tensor]] = []
        if begun:
            self.steps, self.seconds, self._random = begun["steps"], begun["seconds"], begun["random"]
            self.tally.restore(begun["tally"])

    def train(self, take: Step, batches: TrainingBatches, rate: LearningRate, stopping: Callable[[], bool]) -> bool:
        """Go through the batches that are left; False if stopped. Raises UserError at a loss that is not finite."""
        started, before = time.perf_counter(), self.seconds
        take.objective.start_epoch(self.epoch)
        with progress(self.length, self.label) as bar:
            # What was trained on already is made again and left out, so that augmentation goes on as it would have.
            rest = islice(batches, self.steps, None)
            bar.update(self.steps)
            images_and_labels = next(rest, None)
            if distributed.rank() < len(self._random):
                _set_random_state(self._random[distributed.rank()])
            while images_and_labels is not None:
                images, labels = images_and_labels
                step = self.tally.first_step + self.steps
                lr = rate.set(step)
                loss, logits = take(images, labels)
                self.tally.add(loss, logits, labels, lr)
                self.steps += 1
                bar.update(1)
                if step % _STEPS_BETWEEN_CHECKS == 0:
                    bar.set_postfix(loss=f"{self.tally.check():.4f}")
                if stopping():
                    break
                images_and_labels = next(rest, None)
        self.tally.check()
        self.seconds = before + time.perf_counter() - started
        return images_and_labels is None

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "tally": self.tally.state(),
            "random": distributed.gathered(_random_state()),
        }

    def record(self) -> EpochRecord:
        loss, top1 = distributed.mean(self.tally.mean_loss, self.tally.top1)  # NaN where nothing is classified
        return EpochRecord(
            epoch=self.epoch + 1,
            lr=self.tally.rates[-1],
            loss=loss,
            top1=None if math.isnan(top1) else top1,
            seconds=round(self.seconds, 3),
        )


def _random_state() -> list[Tensor]:
    """Of the CPU's generator and, where one is in use, of the GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if _on_gpu() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:] and _on_gpu():
        torch.cuda.set_rng_state(state[1])


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _line(label: str, record: EpochRecord, epochs: int) -> str:
    line = f"{label}: epoch {record.epoch}/{epochs}, loss {record.loss:.4f}"
    if record.top1 is not None:
        line += f", top-1 {record.top1:.2%}"
    if record.validation_top1 is not None:
        line += f", validation {record.validation_top1:.2%}"
    return f"{line}, {record.seconds:.1f} s"


class _Tally:
    """Losses and hits of an epoch, kept on the device so that adding to them waits for nothing."""

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
        """The latest loss; raises UserError at the first one that is not finite."""
        fresh = torch.stack(self.losses[self.checked :]).cpu() if self.checked < len(self.losses) else torch.zeros(0)
        for place, value in enumerate(fresh.tolist(), start=self.checked):
            if not math.isfinite(value):
                raise UserError(
                    f"the loss is {value} at step {self.first_step + place}, learning rate {self.rates[place]:.3g}; "
                    "lower lr, or warm up for longer"
                )
        self.checked = len(self.losses)
        return float(self.losses[-1])

    @property
    def mean_loss(self) -> float:
        return float(torch.stack([loss.cpu() for loss in self.losses]).mean())

    @property
    def top1(self) -> float:
        return float(self.hits) / self.seen if self.seen else math.nan
