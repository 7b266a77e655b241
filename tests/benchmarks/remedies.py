"""Remedies for published gates, most of which end near 1; none of them is in the product, see docs/experiments.md.

The gates are trained as published, but open from the start and under a pull: the mean gate of a layer is brought to the
share of its channels that is to stay, so that one gate is open at the cost of another.

penalty
    the loss and ``price mean(s)`` of each layer, at a fixed price;
dual variable
    the same, and a layer's price rises while its mean is above the target, and falls while it is below;
projection
    after each step the nearest gates of that mean, ``clamp(s - shift, 0, 1)``;
temperature
    ``s = sigmoid(theta / T)``, T falling from 1 to 0.1, with dual variables: gates end open or shut.

``path`` has no pull: the gates begin at 1/2 as published, and are scored by their means over all steps, so that what
opens first counts most.
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
"""What a rate of 0.45 leaves; the mean falls there from 1 in the first half of the steps, if something moves it."""
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
    """The published competition under a remedy.

    Args:
        remedy: one of `REMEDIES`.
        steps: of the whole training.
        given: see `Competition`.
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
        if self._remedy != "projection":  # which takes the gates as far out as they went
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
        """Layer -> ``|gamma| s`` (channels,), s being where the gates end, or the mean of where they were."""
        ends = self._path if self._remedy == "path" else self.gates.values()
        return {layer: self.gates.gammas[layer].cpu() * gate.cpu() for layer, gate in ends.items()}


class TemperedGates(TrainedGates):
    """Gates that are sigmoids of their parameters."""

    temperature = 1.0

    def opened(self, layer: str, images: int) -> Tensor:
        return torch.sigmoid(super().opened(layer, images) / self.temperature)

    def after_step(self) -> None:
        """They are within [0, 1] as they are."""

    def values(self) -> dict[str, Tensor]:
        return {layer: self.opened(layer, 1).detach().float().cpu() for layer, _ in self.named()}


def projected(gates: Tensor, mean: float) -> Tensor:
    """The nearest gates (channels,) in [0, 1] of at most this mean, by bisection of their shift."""
    low, high = 0.0, 1.0
    for _ in range(30):
        shift = (low + high) / 2
        low, high = (shift, high) if float((gates - shift).clamp(0, 1).mean()) > mean else (low, shift)
    return (gates - high).clamp(0, 1)


def ranking(
    remedy: str, model: nn.Module, batches: TrainingBatches, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Scores by layer, from as many steps as the published score has in the benchmark."""
    assert isinstance(batches, Sized)
    section = KnockoffSection(score="published", epochs=EPOCHS, lr=_LR, seed=seed)
    graph = ChannelGraph(model, (3, 32, 32))
    competition = Scarce(remedy, EPOCHS * len(batches), model, graph, shuffle, device, section)
    fit(competition, batches, competition.optimizer(), Schedule(EPOCHS), label=remedy, seed=seed)
    return competition.ranking()
