"""The learning rate over a training run."""

from __future__ import annotations

import math

import torch


def lr_factor(schedule: str, done: float, warmup: float) -> float:
    """The learning rate as a fraction of its peak.

    Args:
        schedule: cosine, poly (power 0.9), step (a tenth from 1/2, a hundredth from 3/4), one_cycle or constant.
        done: how much of the training is done, in [0, 1].
        warmup: how much of it is warm-up, in [0, 1); for one_cycle 0 means 0.3, as in Smith and Topin, 2018.
    """
    if schedule == "one_cycle":
        warmup = warmup or 0.3
        if done < warmup:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / warmup)) / 2
        return 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2
    if done < warmup:
        return 0.01 + 0.99 * done / warmup
    rest = (done - warmup) / (1 - warmup)
    match schedule:
        case "cosine":
            return (1 + math.cos(math.pi * rest)) / 2
        case "poly":
            return (1 - rest) ** 0.9
        case "step":
            return 1.0 if rest < 0.5 else 0.1 if rest < 0.75 else 0.01
        case "constant":
            return 1.0
    raise ValueError(f"unknown schedule {schedule!r}")


class LearningRate:
    """Sets the rate of every parameter group to its peak times the schedule's factor."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: str, total_steps: int, warmup: float) -> None:
        self.optimizer, self.schedule, self.total_steps, self.warmup = optimizer, schedule, total_steps, warmup
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set it for a step, counted from 0; returns the first group's rate."""
        factor = lr_factor(self.schedule, step / max(1, self.total_steps), self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor
