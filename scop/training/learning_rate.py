"""The length of a training run and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from scop.config import TrainingSection

Shape = Literal["cosine", "poly", "step", "one_cycle", "constant"]


@dataclass(frozen=True)
class Schedule:
    """The number of epochs and the learning rate of a training run.

    Attributes:
        epochs: passes over the batches.
        shape: see `lr_factor`.
        warmup_epochs: epochs of warm-up; may be a fraction.
        keep: which weights are the result: those of the last epoch, or of the best epoch on the validation split.
    """

    epochs: int
    shape: Shape = "constant"
    warmup_epochs: float = 0.0
    keep: Literal["last", "best"] = "last"

    @classmethod
    def of(cls, section: TrainingSection) -> Schedule:
        """Return the schedule of a configuration's section."""
        return cls(section.epochs, section.schedule, section.warmup_epochs, section.keep)

    @property
    def warmup(self) -> float:
        """The share of the training that is warm-up."""
        return self.warmup_epochs / max(1, self.epochs)


def lr_factor(shape: Shape, done: float, warmup: float) -> float:
    """Return the learning rate as a fraction of its peak.

    Args:
        shape: cosine, poly (power 0.9), step (1/10 from half, 1/100 from three quarters), one_cycle or constant.
        done: the finished share of the training, in [0, 1].
        warmup: the share that is warm-up, in [0, 1); for one_cycle 0 means 0.3, as in Smith and Topin, 2018.
    """
    if shape == "one_cycle":
        warmup = warmup or 0.3
        if done < warmup:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / warmup)) / 2
        return 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2
    if done < warmup:
        return 0.01 + 0.99 * done / warmup
    rest = (done - warmup) / (1 - warmup)
    match shape:
        case "cosine":
            return (1 + math.cos(math.pi * rest)) / 2
        case "poly":
            return (1 - rest) ** 0.9
        case "step":
            return 1.0 if rest < 0.5 else 0.1 if rest < 0.75 else 0.01
        case "constant":
            return 1.0
    raise ValueError(f"unknown schedule {shape!r}")


class LearningRate:
    """Sets the rate of every parameter group to its peak times the schedule's factor.

    Args:
        optimizer: optimizer whose groups have their peak rates.
        schedule: schedule of the training.
        steps_per_epoch: number of batches in an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, steps_per_epoch: int) -> None:
        self._optimizer, self._schedule = optimizer, schedule
        self._total_steps = schedule.epochs * steps_per_epoch
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rate for a step, counted from 0; return the first group's rate."""
        factor = lr_factor(self._schedule.shape, step / max(1, self._total_steps), self._schedule.warmup)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return self._peaks[0] * factor
