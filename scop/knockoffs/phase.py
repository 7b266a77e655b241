"""The knockoff phase of SCOP (Tang et al., NeurIPS 2020, arXiv 2010.10732).

Every batch x gets a knockoff batch x~ that looks like it but carries no information about its labels. Both run through
the frozen network. After each scored convolution, channel j of the real stream becomes ``s_j real + (1 - s_j)
knockoff``, where s_j is its gate; the knockoff stream is not mixed. The loss is that of the real stream. There are two
scores.

``fisher``
    The gates are held at a mixing point s, such as 0.8. For each image, g is the derivative of its loss with respect to
    a gate. A channel's score is the root of the empirical Fisher information of its gate,

        sqrt(F_j), F_j = E[g_j^2]:

    how strongly, in either direction, the loss of an image depends on whether the feature is real. The score is in
    units of the loss, so it can be weighed against the cost of channels in different layers. (At a minimum of the loss,
    F is the curvature, and a step of the gate increases the loss by half of F times the squared step. A mixing point is
    not a minimum, so the score does not estimate a loss: it is a ranking, judged by what it selects.) It takes one pass
    over some thousand images and no training. At s = 1 it would measure what a channel is worth while all others are
    intact; at a mixing point the others are weakened too, as in the pruned network.

``published``
    The gates are trained within [0, 1], starting at 0.5, and the score is ``W_j = |gamma_j| (s_j - (1 - s_j))``, where
    gamma is the weight of the convolution's batch norm. On a real network most gates end near 1, so the ranking is
    close to that of |gamma|; see docs/experiments.md.

**Frozen** batch norms use their running statistics, so they are affine. An affine map commutes with a mixture whose
weights sum to 1: mixing before the batch norm, as in the paper, equals mixing after it, and the batch norm can be
folded into the convolution. Neither the knockoff stream nor the weights need gradients. The dense model is not changed,
since all of this runs on a copy. A step costs about as much as a plain training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.compute import distributed
from scop.compute.device import autocast, autocast_dtype, pick_device, to_device
from scop.compute.sync_batch_norm import SynchronisedBatchNorms
from scop.config import KnockoffSection
from scop.config.parsing import merged, parse
from scop.errors import UserError
from scop.knockoffs.gates import Gates, HeldGates, TrainedGates
from scop.knockoffs.sources import KnockoffSource, make_source
from scop.knockoffs.two_streams import TwoStreams, frozen_copy
from scop.models.history import EpochRecord
from scop.pruning.graph import ChannelGraph, gamma, out_channels
from scop.selection.scores import Scores
from scop.training.checkpointing import Checkpointing
from scop.training.learning_rate import Schedule
from scop.training.loop import TrainingBatches, fit

IMAGES_FOR_FISHER = 10_240
"""More images change the top-1 of a pruned network less than another seed does; see docs/experiments.md."""

EPOCHS_AS_PUBLISHED = 20


def train_knockoffs(
    model: nn.Module,
    batches: TrainingBatches,
    section: KnockoffSection | None = None,
    *,
    source: KnockoffSource | str | None = None,
    device: torch.device | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpointing: Checkpointing | None = None,
    **settings: Any,
) -> Scores:
    """Score every channel by comparing its real features with knockoff features.

    Args:
        model: the trained dense network; it is not changed.
        batches: (images, labels), one iteration per epoch; images normalised for the network.
        section: the settings; by default those of `KnockoffSection`.
        source: a function that returns knockoffs, or the name of a source; by default the configured one.
        device: where to compute.
        on_epoch: called after every epoch.
        checkpointing: see `scop.training.loop.fit`.
        settings: settings that override those of `section`, such as ``epochs=2, mixing=0.7``.

    Raises:
        UserError: no layer can be pruned, a setting is invalid, or all knockoffs equal their images.
    """
    if isinstance(source, str):
        source, settings = None, settings | {"source": source}
    section = parse(KnockoffSection, merged(section.model_dump() if section else {}, settings), "knockoff")
    device = device or pick_device()
    per_batch, channels, height, width = _batch_shape(batches)
    graph = ChannelGraph(model, (channels, height, width))
    source = source or make_source(section, batches, device, checkpointing)
    epochs, batches = _passes(section, batches, per_batch)
    competition = Competition(model, graph, source, device, section)

    def after_epoch(record: EpochRecord) -> None:
        competition.after_epoch(record)
        on_epoch(record)

    history = fit(
        competition,
        batches,
        competition.optimizer(),
        Schedule(epochs),
        label="knockoff",
        seed=section.seed,
        on_epoch=after_epoch,
        checkpointing=checkpointing,
    )
    score, error, signed = competition.gates.scores()
    if not any(values.any() for values in score.values()):
        raise UserError(
            "all scores are 0: no knockoff differs from its image; source shuffle needs several images per batch"
        )
    gates = competition.gates.values()
    return Scores(score, error, signed, gates, section.score, (channels, height, width), history)


def _passes(section: KnockoffSection, batches: TrainingBatches, per_batch: int) -> tuple[int, TrainingBatches]:
    """Return the number of epochs and the batches of each."""
    if section.epochs is not None:
        return section.epochs, batches
    if section.score == "published":
        return EPOCHS_AS_PUBLISHED, batches
    wanted = -(-IMAGES_FOR_FISHER // (per_batch * distributed.shard()[1]))
    if wanted < len(batches):
        return 1, _First(batches, wanted)
    return -(-wanted // len(batches)), batches


class _First:
    """The first batches of each epoch."""

    def __init__(self, batches: TrainingBatches, count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self._batches), self._count)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._batches, "set_epoch"):
            self._batches.set_epoch(epoch)


def _batch_shape(batches: TrainingBatches) -> tuple[int, ...]:
    if not isinstance(batches, Sized) or isinstance(batches, Iterator):
        raise UserError(
            f"batches must have a length and support repeated iteration, like a DataLoader or a list; a "
            f"{type(batches).__name__} does not"
        )
    first = next(iter(batches), None)
    if first is None:
        raise UserError("batches are empty: the knockoff phase needs at least one batch")
    return tuple(first[0].shape)


def gated_layers(graph: ChannelGraph) -> list[str]:
    """Return the names of the convolutions whose channels are scored, sorted.

    These are the convolutions that rule `scatter` prunes, as in the paper, and all members of coupled groups that
    contain none of them, so that scores exist under every rule.

    Raises:
        UserError: no rule prunes any convolution.
    """
    gated = {conv for prunable in graph.survey("scatter")[0] for conv in prunable.convs}
    for prunable in graph.survey("coupled")[0] if gated else graph.prunable("coupled"):
        if not gated.intersection(prunable.convs):
            gated.update(prunable.convs)
    return sorted(gated)


def _gamma(model: nn.Module, graph: ChannelGraph, layer: str) -> Tensor:
    """Return the absolute batch norm weights of a layer's channels (channels,), or ones if it has no batch norm."""
    found = gamma(model, graph, layer)
    return torch.ones(out_channels(model.get_submodule(layer))) if found is None else found


class Competition:
    """The objective of the knockoff phase: the loss of the real stream, into which the gates mix knockoffs.

    Args:
        model: the dense network; it is copied.
        graph: its channels.
        source: returns knockoffs.
        device: device to compute on.
        section: the settings; by default those of `KnockoffSection`.
        settings: settings that override those of `section`.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        source: KnockoffSource,
        device: torch.device,
        section: KnockoffSection | None = None,
        **settings: Any,
    ) -> None:
        section = parse(KnockoffSection, merged(section.model_dump() if section else {}, settings), "knockoff")
        self.source, self.device, self.section = source, device, section
        self.dtype = autocast_dtype(device, section.precision)
        self.trained = section.score == "published"
        self.gates = self.make_gates({layer: _gamma(model, graph, layer) for layer in gated_layers(graph)})
        self.gates.to(device)
        network = frozen_copy(model, graph, self.dtype, section.batch_norm)
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shared = distributed.is_distributed() and section.batch_norm != "frozen"
        self._batch_norms = SynchronisedBatchNorms() if shared else nullcontext()
        with torch.no_grad(), autocast(device, self.dtype):
            images = torch.zeros(2, *graph.input_shape, device=device)
            streams = TwoStreams(network, self.gates, images, joint=section.batch_norm == "joint")
        self._streams = distributed.parallel(streams, device)

    def make_gates(self, gammas: Mapping[str, Tensor]) -> Gates:
        """Return the gates for the configured score.

        Args:
            gammas: layer -> |gamma| (channels,).
        """
        section = self.section
        if self.trained:
            return TrainedGates(gammas, section.epochs or EPOCHS_AS_PUBLISHED)
        return HeldGates(gammas, section.mixing, by_batch=section.batch_norm != "frozen")

    @property
    def state(self) -> nn.Module:
        return self.gates

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam for trained gates; held gates get a learning rate of 0."""
        if self.trained:
            return torch.optim.Adam(self.gates.parameters(), lr=self.section.lr, betas=self.section.betas)
        return torch.optim.SGD(self.gates.parameters(), lr=0.0)

    def start_epoch(self, epoch: int) -> None:
        pass

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = to_device(images, labels, self.device)
        with autocast(self.device, self.dtype), self._batch_norms:
            logits = self._streams(images, self.source(images, labels)).float()
        return F.cross_entropy(logits, labels), logits

    def after_step(self) -> None:
        self.gates.after_step()

    def after_epoch(self, record: EpochRecord) -> None:
        """Update the gates' statistics; must be called before a checkpoint is written."""
        self.gates.after_epoch(record.epoch)
