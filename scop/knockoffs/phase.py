"""The knockoff phase of SCOP (Tang et al., NeurIPS 2020, arXiv 2010.10732).

Every batch x gets a knockoff batch x~ that looks like it but says nothing about its labels. Both run through the frozen
network. Behind each convolution under test, channel j of the real stream becomes ``s_j real + (1 - s_j) knockoff``, s_j
its gate; the knockoff stream stays pure. The loss is that of the real stream. Two scores can be made of it.

``fisher``
    The gates stay at a mixing point s, 0.8 say, and for each example the derivative g of its loss by each gate is
    taken. A channel's score is the root of the empirical Fisher information of its gate,

        sqrt(F_j), F_j = E[g_j^2]:

    how much it matters to an image's loss, either way, whether the feature is the real one; in units of the loss, so
    that what channels of different layers cost can be held against it. (Where the gates are at a minimum of the loss,
    F is the curvature there, and half of it times the step's square is what the step costs. At a mixing point they are
    not, and this is no estimate of a loss but a ranking, which is judged by what it selects.) It wants one pass over
    some thousand examples and no training. At s = 1 it would ask what one channel is worth while all others are whole;
    at a mixing point it asks while the others are weakened too, as in the pruned network.

``published``
    The gates are trained within [0, 1], from 0.5, and scored by ``W_j = |gamma_j| (s_j - (1 - s_j))``, gamma the weight
    of the convolution's batch norm. On a real network most gates end near 1, so that it ranks much like |gamma|: see
    docs/knockoffs.md.

Where the batch norms are **frozen** they use their running statistics. So they are affine, and an affine map commutes
with a mixture whose weights sum to 1: mixing before the batch norm, as the paper has it, equals mixing behind it, and
the batch norm can be folded into the convolution. The knockoff stream needs no gradient, the weights need none, and the
dense model is never touched, since all of this happens on a copy. A step costs about as much as a plain training step.
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
from scop.training.loop import CheckpointStore, TrainingBatches, fit

IMAGES_FOR_FISHER = 10_240
"""So many give scores that differ by less than those of two seeds do, see docs/knockoffs.md."""

EPOCHS_AS_PUBLISHED = 20


def train_knockoffs(
    model: nn.Module,
    batches: TrainingBatches,
    section: KnockoffSection | None = None,
    *,
    source: KnockoffSource | str | None = None,
    device: torch.device | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpoints: CheckpointStore | None = None,
    stopping: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Scores:
    """Let every channel compete with its knockoff, and score it.

    Args:
        model: the trained dense network; it is left bit for bit as it was.
        batches: (images, labels), one iteration an epoch; images as the network takes them.
        section: the settings, or give them one by one as keywords: ``epochs=2, mixing=0.7``.
        source: makes knockoffs, or the name of what does; that of the settings by default.
        device: where to compute.
        on_epoch: told of every epoch.
        checkpoints, stopping: see `scop.training.loop.fit`.

    Raises:
        UserError: no layer can be pruned, a setting is bad, or the knockoffs are the images themselves.
    """
    if isinstance(source, str):
        source, settings = None, settings | {"source": source}
    section = parse(KnockoffSection, merged(section.model_dump() if section else {}, settings), "knockoff")
    device = device or pick_device()
    per_batch, channels, height, width = _batch_shape(batches)
    graph = ChannelGraph(model, (channels, height, width))
    source = source or make_source(section, batches, device, checkpoints, stopping)
    epochs, batches = _passes(section, batches, per_batch)
    competition = Competition(model, graph, source, device, section)

    def after_epoch(record: EpochRecord) -> None:
        competition.after_epoch(record)
        on_epoch(record)

    history = fit(
        competition,
        batches,
        competition.optimizer(),
        epochs=epochs,
        label="knockoff",
        seed=section.seed,
        on_epoch=after_epoch,
        checkpoints=checkpoints,
        stopping=stopping,
    )
    score, error, signed = competition.gates.scores()
    if not any(values.any() for values in score.values()):
        raise UserError(
            "all scores are 0: no knockoff differs from its image; a batch wants several images to be shuffled"
        )
    gates = competition.gates.values()
    return Scores(score, error, signed, gates, section.score, (channels, height, width), history)


def _passes(section: KnockoffSection, batches: TrainingBatches, per_batch: int) -> tuple[int, TrainingBatches]:
    """How many epochs there are, and of which batches."""
    if section.epochs is not None:
        return section.epochs, batches
    if section.score == "published":
        return EPOCHS_AS_PUBLISHED, batches
    wanted = -(-IMAGES_FOR_FISHER // (per_batch * distributed.share()[1]))
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
            f"batches must have a length and start anew for each epoch, as a DataLoader or a list does, not a "
            f"{type(batches).__name__}"
        )
    first = next(iter(batches), None)
    if first is None:
        raise UserError("batches are empty: there is nothing to train the gates on")
    return tuple(first[0].shape)


def gated_layers(graph: ChannelGraph) -> list[str]:
    """The convolutions whose channels compete.

    Those that `scatter` prunes, as in the paper, and every member of a coupled group that has none of these, so that
    each rule finds scores.

    Raises:
        UserError: no rule prunes any.
    """
    gated = {conv for prunable in graph.survey("scatter")[0] for conv in prunable.convs}
    for prunable in graph.survey("coupled")[0] if gated else graph.prunable("coupled"):
        if not gated.intersection(prunable.convs):
            gated.update(prunable.convs)
    return sorted(gated)


def _gamma(model: nn.Module, graph: ChannelGraph, layer: str) -> Tensor:
    """As `scop.selection.controls` has it, ones where there is none: (channels,)."""
    found = gamma(model, graph, layer)
    return torch.ones(out_channels(model.get_submodule(layer))) if found is None else found


class Competition:
    """The objective of the knockoff phase: the loss of the real stream, into which the gates mix knockoffs.

    Args:
        model: the dense network; a copy of it is looked at.
        graph: its channels.
        source: makes knockoffs.
        device: where to compute.
        section: the settings, or give them one by one as keywords.
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
        shared = distributed.several() and section.batch_norm != "frozen"
        self._batch_norms = SynchronisedBatchNorms() if shared else nullcontext()
        with torch.no_grad(), autocast(device, self.dtype):
            images = torch.zeros(2, *graph.input_shape, device=device)
            streams = TwoStreams(network, self.gates, images, joint=section.batch_norm == "joint")
        self._streams = distributed.parallel(streams, device)

    def make_gates(self, gammas: Mapping[str, Tensor]) -> Gates:
        """Gates for the settings' score: layer -> |gamma| (channels,)."""
        section = self.section
        if self.trained:
            return TrainedGates(gammas, section.epochs or EPOCHS_AS_PUBLISHED)
        return HeldGates(gammas, section.mixing, by_batch=section.batch_norm != "frozen")

    @property
    def state(self) -> nn.Module:
        return self.gates

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam for gates that are trained; the others stay where they are."""
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
        """To be called before a checkpoint is written."""
        self.gates.after_epoch(record.epoch)
