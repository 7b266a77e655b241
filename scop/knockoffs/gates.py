"""The gates of the knockoff phase and their scores; see `scop.knockoffs.phase`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from scop.compute import distributed

INITIAL_GATE = 0.5
"""Initial value of trained gates."""


class Gates(nn.Module):
    """One gate per channel, with the statistics from which scores are computed.

    Args:
        gammas: layer -> |gamma| (channels,).
        value: initial value of all gates.
    """

    def __init__(self, gammas: Mapping[str, Tensor], value: float) -> None:
        super().__init__()
        self.gammas = gammas
        # Layer names contain dots, parameter names must not.
        self._gates = nn.ParameterDict(
            {layer.replace(".", "/"): torch.full_like(gamma, value) for layer, gamma in gammas.items()}
        )

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each layer with its gates (channels,)."""
        for name, gate in self._gates.items():
            yield name.replace("/", "."), gate

    def values(self) -> dict[str, Tensor]:
        """Return layer -> gates (channels,), float32 on the CPU."""
        return {layer: gate.detach().float().cpu() for layer, gate in self.named()}

    def opened(self, layer: str, images: int) -> Tensor:
        """Return the gates for a layer's feature map: (channels,), or different ones per image, (images, channels)."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after the optimizer has updated the gates."""

    def after_epoch(self, epoch: int) -> None:
        """Called at the end of an epoch, counted from 1."""

    def scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return scores, their standard errors and W, each by layer; see `Scores`."""
        raise NotImplementedError

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """Split (all channels,) into layer -> (channels,), float32 on the CPU."""
        parts = flat.float().cpu().split_with_sizes([len(gamma) for gamma in self.gammas.values()])
        return dict(zip(self.gammas, (part.clone() for part in parts), strict=True))


class HeldGates(Gates):
    """Gates with fixed values, and moments of the derivatives of each image's loss with respect to them.

    Half of the images, with gates at the mixing point, give the scores. The other half, with gates at 1/2, give W: only
    at 1/2 does swapping real and knockoff features leave the mixture unchanged, so that the derivative of a channel
    whose knockoff is as good as the real feature has mean 0.

    Args:
        gammas: layer -> |gamma| (channels,).
        mixing: value of the gates.
        by_batch: use every other batch for each half, not every other image; for networks in which the images of a
            batch depend on each other.
    """

    sums: Tensor
    examples: Tensor
    distinct: Tensor

    def __init__(self, gammas: Mapping[str, Tensor], mixing: float, by_batch: bool = False) -> None:
        super().__init__(gammas, mixing)
        self._to_half, self._by_batch = 0.5 - mixing, by_batch
        # Rows: square and fourth power of the derivative at the mixing point; the derivative and its square at 1/2.
        self.register_buffer("sums", torch.zeros(4, sum(map(len, gammas.values())), dtype=torch.float64))
        self.register_buffer("examples", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("distinct", torch.zeros((), dtype=torch.float64))
        self._step: dict[str, Tensor] = {}
        self._at_half = torch.zeros(0, dtype=torch.bool)

    def opened(self, layer: str, images: int) -> Tensor:
        if self._by_batch:
            at_half = (self.examples[0] > self.examples[1]).expand(images)
        else:
            # Alternating images, so that the halves do not depend on how many processes share the batch.
            at_half = torch.arange(images, device=self.sums.device) % 2 == 1
        self._at_half = at_half
        gate = self._gates[layer.replace(".", "/")] + self._to_half * at_half[:, None]
        gate.register_hook(partial(self._note, layer))
        return gate

    def _note(self, layer: str, gradient: Tensor) -> None:
        # The loss is a mean over images; the factor gives the derivatives of each image's own loss.
        own = gradient.double() * len(gradient)
        at_mixing, at_half = own[~self._at_half], own[self._at_half]
        square = at_mixing.square()
        sums = (square, square.square(), at_half, at_half.square())
        self._step[layer] = torch.stack([part.sum(0) for part in sums])

    def after_step(self) -> None:
        at_half = self._at_half.sum()
        counts = torch.stack([len(self._at_half) - at_half, at_half]).double().repeat_interleave(2)
        total = distributed.all_reduce_sum(
            torch.cat([*(self._step[layer] for layer in self.gammas), counts[:, None]], 1)
        )
        self.sums += total[:, :-1]
        self.examples += total[::2, -1]

    def after_epoch(self, epoch: int) -> None:
        if epoch == 1:
            self.distinct.copy_(self.examples.sum())

    def scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        square, fourth, mean_at_half, square_at_half = (
            self.sums / self.examples.clamp_min(1).repeat_interleave(2)[:, None]
        )
        # A repeated image is not a new sample, even though its knockoff is new.
        counts = torch.where(self.distinct > 0, self.examples.minimum(self.distinct), self.examples).clamp_min(1)
        root = square.sqrt()
        error_of_square = ((fourth - square**2).clamp_min(0) / counts[0]).sqrt()
        error = torch.where(root > 0, error_of_square / (2 * root), 0.0)
        error_of_mean = ((square_at_half - mean_at_half**2).clamp_min(0) / counts[1]).sqrt()
        # Positive if the loss falls when the gate opens: then the real feature helps more than its knockoff.
        signed = torch.where(error_of_mean > 0, -mean_at_half / error_of_mean, 0.0)
        return self._by_layer(root), self._by_layer(error), self._by_layer(signed)


class TrainedGates(Gates):
    """Trained gates in [0, 1], with their values at the end of each epoch.

    Args:
        gammas: layer -> |gamma| (channels,).
        epochs: number of epochs.
    """

    ends: Tensor

    def __init__(self, gammas: Mapping[str, Tensor], epochs: int) -> None:
        super().__init__(gammas, INITIAL_GATE)
        self.register_buffer("ends", torch.zeros(epochs, sum(map(len, gammas.values()))))

    def opened(self, layer: str, images: int) -> Tensor:
        gate: Tensor = self._gates[layer.replace(".", "/")]
        return gate

    def after_step(self) -> None:
        with torch.no_grad():
            for gate in self._gates.values():
                gate.clamp_(0, 1)

    def after_epoch(self, epoch: int) -> None:
        self.ends[epoch - 1] = torch.cat([gate.detach() for gate in self._gates.values()])

    def scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        score = {layer: self.gammas[layer] * (2 * gate - 1) for layer, gate in self.values().items()}
        late = self.ends[len(self.ends) // 2 :]
        # The score is that of the last epoch, so its error is the deviation of one epoch, not that of a mean.
        spread = late.std(0) if len(late) > 1 else torch.full_like(late[0], math.nan)
        error = {layer: 2 * self.gammas[layer] * part for layer, part in self._by_layer(spread).items()}
        return score, error, {layer: own.clone() for layer, own in score.items()}  # safetensors refuses shared tensors
