"""Remedies for published gates, most of which end near 1. The product contains none of them; see docs/experiments.md.

The gates are trained as published, but start open and compete: the mean gate of a layer is pulled to the share of
channels to keep.

penalty
    adds ``price mean(s)`` of each layer to the loss, at a fixed price;
dual variable
    the same, but a layer's price rises while its mean is above the target and falls while it is below;
projection
    replaces the gates after each step by the nearest gates with at most the target mean, ``clamp(s - shift, 0, 1)``;
temperature
    ``s = sigmoid(theta / T)`` with dual variables; T falls from 1 to 0.1, so that gates end open or closed.

``path`` has no pull: the gates start at 1/2 as published and are scored by their means over all steps, so that gates
that open first score highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from scop.config import KnockoffSection
from scop.knockoffs.gates import Gates, TrainedGates
from scop.knockoffs.phase import Competition
from scop.knockoffs.sources import shuffle
from scop.pruning.graph import ChannelGraph
from scop.training.learning_rate import Schedule
from scop.training.loop import TrainingBatches, fit

REMEDIES = ("penalty", "dual variable", "projection", "temperature", "path")
EPOCHS = 4
TARGET = 0.55
"""Share of channels that a rate of 0.45 keeps. The target mean falls from 1 to it in the first half of the steps."""
_LR = 0.02
_PENALTY, _DUAL_RATE = 0.1, 0.05
_OPEN, _COLDEST = 3.0, 0.1
SETTINGS = {
    "epochs": EPOCHS,
    "target": TARGET,
    "lr": _LR,
    "penalty": _PENALTY,
    "dual rate": _DUAL_RATE,
    "temperatures": [_OPEN, _COLDEST],
}


class Scarce(Competition):
    """The published competition with a remedy.

    Args:
        remedy: one of `REMEDIES`.
        steps: number of steps of the whole training.
        given: arguments of `Competition`.
    """

    def __init__(self, remedy: str, steps: int, *given: Any) -> None:
        self._remedy, self._steps, self._step = remedy, steps, 0
        super().__init__(*given)
        self._parameters = dict(self.gates.named())
        self._path = {layer: torch.zeros_like(gate) for layer, gate in self._parameters.items()}
        self._prices = dict.fromkeys(self._parameters, _PENALTY if remedy == "penalty" else 0.0)
        with torch.no_grad():
            for gate in self._parameters.values():
                gate.fill_({"path": 0.5, "temperature": _OPEN}.get(remedy, 1.0))

    def make_gates(self, gammas: Mapping[str, Tensor]) -> Gates:
        return TemperedGates(gammas, EPOCHS) if self._remedy == "temperature" else super().make_gates(gammas)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(images, labels)
        pulls = [price * self.gates.opened(layer, 1).mean() for layer, price in self._prices.items()]
        return loss + torch.stack(pulls).sum(), logits

    @torch.no_grad()
    def after_step(self) -> None:
        if self._remedy != "projection":  # projection needs the unclamped gates
            super().after_step()
        self._step += 1
        done = self._step / self._steps
        target = 1 - (1 - TARGET) * min(1.0, 2 * done)
        if isinstance(self.gates, TemperedGates):
            self.gates.temperature = _COLDEST**done
        for layer, gate in self._parameters.items():
            if self._remedy == "projection":
                gate.copy_(projected(gate, target))
            if self._remedy in ("dual variable", "temperature"):
                excess = float(self.gates.opened(layer, 1).mean()) - target
                self._prices[layer] = max(0.0, self._prices[layer] + _DUAL_RATE * excess)
            self._path[layer] += gate / self._steps

    def ranking(self) -> dict[str, Tensor]:
        """Return layer -> ``|gamma| s`` (channels,); s is the final gate, or for `path` its mean over all steps."""
        ends = self._path if self._remedy == "path" else self.gates.values()
        return {layer: self.gates.gammas[layer].cpu() * gate.cpu() for layer, gate in ends.items()}


class TemperedGates(TrainedGates):
    """Gates that are sigmoids of their parameters divided by a temperature."""

    temperature = 1.0

    def opened(self, layer: str, images: int) -> Tensor:
        return torch.sigmoid(super().opened(layer, images) / self.temperature)

    def after_step(self) -> None:
        """Do nothing: sigmoids are within [0, 1]."""

    def values(self) -> dict[str, Tensor]:
        return {layer: self.opened(layer, 1).detach().float().cpu() for layer, _ in self.named()}


def projected(gates: Tensor, mean: float) -> Tensor:
    """Return the nearest gates (channels,) in [0, 1] with at most this mean, by bisection of the shift."""
    low, high = 0.0, 1.0
    for _ in range(30):
        shift = (low + high) / 2
        low, high = (shift, high) if float((gates - shift).clamp(0, 1).mean()) > mean else (low, shift)
    return (gates - high).clamp(0, 1)


def ranking(
    remedy: str, model: nn.Module, batches: TrainingBatches, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Return scores by layer, trained for as many steps as the published score in the benchmark."""
    assert isinstance(batches, Sized)
    section = KnockoffSection(score="published", epochs=EPOCHS, lr=_LR, seed=seed)
    graph = ChannelGraph(model, (3, 32, 32))
    competition = Scarce(remedy, EPOCHS * len(batches), model, graph, shuffle, device, section)
    fit(competition, batches, competition.optimizer(), Schedule(EPOCHS), label=remedy, seed=seed)
    return competition.ranking()
