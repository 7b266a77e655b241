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
    of the convolution's batch norm. On real networks nearly all gates end at 1, so that it ranks like |gamma|: see
    docs/knockoffs.md.

Where the batch norms are **frozen** they use their running statistics. So they are affine, and an affine map commutes
with a mixture whose weights sum to 1: mixing before the batch norm, as the paper has it, equals mixing behind it, and
the batch norm can be folded into the convolution. The knockoff stream needs no gradient, the weights need none, and the
dense model is never touched, since all of this happens on a copy. A step costs about as much as a plain training step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scop import distributed
from scop.config import BatchNormMode, KnockoffSection, ScoreKind
from scop.device import autocast, autocast_dtype, pick_device, to_device
from scop.errors import UserError
from scop.folding import folded_copy
from scop.graph import ChannelGraph, out_channels
from scop.knockoff_sources import KnockoffSource, make_source
from scop.parsing import parse
from scop.sync_batch_norm import SynchronisedBatchNorms
from scop.training import CheckpointStore, EpochRecord, TrainingBatches, fit

IMAGES_FOR_FISHER = 10_240
"""So many give scores that differ by less than those of two seeds do, see docs/knockoffs.md."""

EPOCHS_AS_PUBLISHED = 20

INITIAL_GATE = 0.5
"""Of trained gates."""


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """The knockoff phase's result: layer -> scores, a float32 tensor (channels,), on the CPU; low ones go.

    Attributes:
        score: layer -> scores.
        error: layer -> their standard errors: over images; for trained gates the standard deviation from epoch to
            epoch, over the last half of them.
        signed: layer -> W, antisymmetric under swapping real and knockoff, as a knockoff filter needs it: by how many
            standard errors the loss falls when a gate opens; for trained gates the score itself.
        gate: layer -> s, in [0, 1].
        kind: fisher, whose scores are of one loss and can be compared between layers, or published.
        input_shape: (C, H, W) of the images.
        history: epoch by epoch.
    """

    score: dict[str, Tensor]
    error: dict[str, Tensor]
    signed: dict[str, Tensor]
    gate: dict[str, Tensor]
    kind: ScoreKind
    input_shape: tuple[int, int, int]
    history: list[EpochRecord] = field(default_factory=list)

    def __getitem__(self, layer: str) -> Tensor:
        return self.score[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.score)

    def __len__(self) -> int:
        return len(self.score)

    def save(self, path: Path) -> None:
        """Write all but the history to a safetensors file."""
        tensors = {f"{part}/{name}": tensor for part in _PARTS for name, tensor in getattr(self, part).items()}
        # One entry, for several come in any order, and the same scores must be the same bytes.
        save_file(tensors, path, metadata={"scores": f"{_FORMAT} {self.kind} {'x'.join(map(str, self.input_shape))}"})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote; the history is not part of it."""
        try:
            with safe_open(path, "pt") as file:
                version, _, described = (file.metadata() or {}).get("scores", "").partition(" ")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no scores of the knockoff phase: {error}") from error
        kind, _, shape = described.partition(" ")
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, tensor in tensors.items():
            part, _, layer = key.partition("/")
            parts.setdefault(part, {})[layer] = tensor
        same = all(part.keys() == parts["score"].keys() for part in parts.values())
        if version != _FORMAT or parts.keys() != set(_PARTS) or not same or kind not in get_args(ScoreKind):
            raise UserError(f"{path} holds scores of another version of scop; run the knockoff phase again")
        channels, height, width = map(int, shape.split("x"))
        return cls(**parts, kind=kind, input_shape=(channels, height, width))  # type: ignore[arg-type]


_FORMAT = "2"
_PARTS = ("score", "error", "signed", "gate")


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
        checkpoints, stopping: see `scop.training.fit`.

    Raises:
        UserError: no layer can be pruned, or a setting is bad.
    """
    if isinstance(source, str):
        source, settings = None, settings | {"source": source}
    section = parse(KnockoffSection, (section.model_dump() if section else {}) | settings, "knockoff")
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
    """
    gated = {conv for prunable in graph.survey("scatter")[0] for conv in prunable.convs}
    for prunable in graph.prunable("coupled"):
        if not gated.intersection(prunable.convs):
            gated.update(prunable.convs)
    return sorted(gated)


def _gamma(model: nn.Module, graph: ChannelGraph, layer: str) -> Tensor:
    """|gamma| of a convolution's batch norm, ones where it has none: (channels,)."""
    norm = graph.batch_norm(layer)
    weight = None if norm is None else model.get_submodule(norm).weight
    if weight is None:
        return torch.ones(out_channels(model.get_submodule(layer)))
    return weight.detach().abs().float().cpu()  # type: ignore[operator]


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
        section = parse(KnockoffSection, (section.model_dump() if section else {}) | settings, "knockoff")
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
            streams = _TwoStreams(network, self.gates, images, joint=section.batch_norm == "joint")
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


class Gates(nn.Module):
    """The gates, one of each channel, and what is found out about them.

    Args:
        gammas: layer -> |gamma| (channels,).
        value: of all gates.
    """

    def __init__(self, gammas: Mapping[str, Tensor], value: float) -> None:
        super().__init__()
        self.gammas = gammas
        # Parameter names may not hold dots, and layer names do.
        self._gates = nn.ParameterDict(
            {layer.replace(".", "/"): torch.full_like(gamma, value) for layer, gamma in gammas.items()}
        )

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Layers and their gates (channels,)."""
        for name, gate in self._gates.items():
            yield name.replace("/", "."), gate

    def values(self) -> dict[str, Tensor]:
        """Layer -> s, on the CPU."""
        return {layer: gate.detach().float().cpu() for layer, gate in self.named()}

    def opened(self, layer: str, images: int) -> Tensor:
        """A layer's gates as they meet its feature map: (channels,), or of each image its own (images, channels)."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called when the optimizer has moved them."""

    def after_epoch(self, epoch: int) -> None:
        """Called at the end of an epoch, counted from 1."""

    def scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Scores, their standard errors, and W; see `Scores`."""
        raise NotImplementedError

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """(all channels,) -> layer -> (channels,), float32 on the CPU."""
        parts = flat.float().cpu().split_with_sizes([len(gamma) for gamma in self.gammas.values()])
        return dict(zip(self.gammas, (part.clone() for part in parts), strict=True))


class HeldGates(Gates):
    """Gates that stay where they are, and the moments of the examples' derivatives by them.

    Scores come from one half of the images, at the mixing point; W from the other half, at 1/2: only there a mixture
    stays as it is when real and knockoff change places, so that the derivative of a channel whose knockoff is as good
    has the mean 0.

    Args:
        gammas: layer -> |gamma| (channels,).
        mixing: value of the gates.
        by_batch: the halves are every other batch, for networks in which images of a batch see each other, and not
            every other image.
    """

    sums: Tensor
    examples: Tensor
    distinct: Tensor

    def __init__(self, gammas: Mapping[str, Tensor], mixing: float, by_batch: bool = False) -> None:
        super().__init__(gammas, mixing)
        self._to_half, self._by_batch = 0.5 - mixing, by_batch
        # At the mixing point the derivative's square and fourth power, at 1/2 it and its square.
        self.register_buffer("sums", torch.zeros(4, sum(map(len, gammas.values())), dtype=torch.float64))
        self.register_buffer("examples", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("distinct", torch.zeros((), dtype=torch.float64))
        self._step: dict[str, Tensor] = {}
        self._at_half = torch.zeros(0, dtype=torch.bool)

    def opened(self, layer: str, images: int) -> Tensor:
        if self._by_batch:
            at_half = (self.examples[0] > self.examples[1]).expand(images)
        else:
            # Every other one, so that it is the same ones where several processes share the batch.
            at_half = torch.arange(images, device=self.sums.device) % 2 == 1
        self._at_half = at_half
        gate = self._gates[layer.replace(".", "/")] + self._to_half * at_half[:, None]
        gate.register_hook(partial(self._note, layer))
        return gate

    def _note(self, layer: str, gradient: Tensor) -> None:
        # The loss is the mean over the images, and these are the derivatives of each one's own.
        own = gradient.double() * len(gradient)
        at_mixing, at_half = own[~self._at_half], own[self._at_half]
        square = at_mixing.square()
        sums = (square, square.square(), at_half, at_half.square())
        self._step[layer] = torch.stack([part.sum(0) for part in sums])

    def after_step(self) -> None:
        at_half = self._at_half.sum()
        counts = torch.stack([len(self._at_half) - at_half, at_half]).double().repeat_interleave(2)
        total = distributed.summed(torch.cat([*(self._step[layer] for layer in self.gammas), counts[:, None]], 1))
        self.sums += total[:, :-1]
        self.examples += total[::2, -1]

    def after_epoch(self, epoch: int) -> None:
        if epoch == 1:
            self.distinct.copy_(self.examples.sum())

    def scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        square, fourth, mean_at_half, square_at_half = (
            self.sums / self.examples.clamp_min(1).repeat_interleave(2)[:, None]
        )
        # An image that is seen again is no new one, though its knockoff is.
        counts = torch.where(self.distinct > 0, self.examples.minimum(self.distinct), self.examples).clamp_min(1)
        root = square.sqrt()
        error_of_square = ((fourth - square**2).clamp_min(0) / counts[0]).sqrt()
        error = torch.where(root > 0, error_of_square / (2 * root), 0.0)
        error_of_mean = ((square_at_half - mean_at_half**2).clamp_min(0) / counts[1]).sqrt()
        # The loss falls where a gate opens: then the real feature helps more than its knockoff.
        signed = torch.where(error_of_mean > 0, -mean_at_half / error_of_mean, 0.0)
        return self._by_layer(root), self._by_layer(error), self._by_layer(signed)


class TrainedGates(Gates):
    """Gates in [0, 1] that are trained, and where they stood at the end of each epoch."""

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
        # The score is of the last epoch and no mean over epochs, and so is its error.
        spread = late.std(0) if len(late) > 1 else torch.full_like(late[0], math.nan)
        error = {layer: 2 * self.gammas[layer] * part for layer, part in self._by_layer(spread).items()}
        return score, error, {layer: own.clone() for layer, own in score.items()}  # files hold no tensor twice


class _TwoStreams(nn.Module):
    """The frozen network with the gates between its two streams.

    Args:
        network: without gradients.
        gates: of its layers.
        images: some of the right shape (B, C, H, W), to try it on.
        joint: both streams go through the network as one batch, so that batch norms see both.

    Shape:
        real images, knockoff images (B, C, H, W) -> logits of the real stream (B, classes).
    """

    def __init__(self, network: nn.Module, gates: Gates, images: Tensor, joint: bool = False) -> None:
        super().__init__()
        self.network, self.joint = network, joint
        self._gates = nn.ParameterList(gate for _, gate in gates.named())  # for those who ask what is trained
        self._features: dict[str, Tensor] = {}
        self._mixing: bool = False
        for layer, _ in gates.named():
            meet = self._meet_within if joint else self._meet
            network.get_submodule(layer).register_forward_hook(partial(meet, layer, gates))
        self._overwritten: set[str] = set()
        if not joint:
            self._overwritten = self._find_overwritten(images)

    def forward(self, images: Tensor, knockoffs: Tensor) -> Tensor:
        logits: Tensor
        if self.joint:
            logits = self.network(torch.cat([images, knockoffs]))
            return logits[: len(images)]
        self._mixing = False
        with torch.no_grad():
            self.network(knockoffs)
        self._mixing = True
        logits = self.network(images)
        return logits

    def _meet(self, layer: str, gates: Gates, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook: keep the knockoff stream's feature map; mix it into the real stream's."""
        if not self._mixing:
            self._features[layer] = output
            return output.clone() if layer in self._overwritten else output
        gate = gates.opened(layer, len(output))
        real, knockoff = _channels_second(module, output), _channels_second(module, self._features.pop(layer))
        mixed: Tensor = _Mix.apply(real, knockoff, gate)
        return _channels_back(module, mixed)

    def _meet_within(self, layer: str, gates: Gates, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The same where one half of the batch are knockoffs; the gradient goes on through them too."""
        real, knockoff = _channels_second(module, output).chunk(2)
        gate = gates.opened(layer, len(real))[..., None, None].to(output.dtype)
        mixed = torch.cat([torch.lerp(knockoff, real, gate.expand_as(real)), knockoff])
        return _channels_back(module, mixed)

    def _find_overwritten(self, images: Tensor) -> set[str]:
        """Layers whose output the network changes in place (by a functional ``relu_``, say) after it was kept."""
        self.network(images)
        kept, self._features = self._features, {}
        return {layer for layer, output in kept.items() if output._version > 0}


def _channels_second(module: nn.Module, features: Tensor) -> Tensor:
    """A feature map as (N, C, H, W), which a linear layer puts out as (N, H, W, C)."""
    return features.movedim(-1, 1) if isinstance(module, nn.Linear) else features


def _channels_back(module: nn.Module, features: Tensor) -> Tensor:
    return features.movedim(1, -1) if isinstance(module, nn.Linear) else features


class _Mix(torch.autograd.Function):
    """``s real + (1 - s) knockoff`` per channel, with gradients for the real stream and the gates.

    Written out because autograd would keep both streams and make the knockoff's gradient, which nobody needs.

    Shape:
        real, knockoff (N, C, H, W), gate (C,) or (N, C) -> (N, C, H, W).
    """

    @staticmethod
    def forward(ctx: Any, real: Tensor, knockoff: Tensor, gate: Tensor) -> Tensor:
        s = gate.to(real.dtype)[..., None, None]
        difference = real - knockoff
        ctx.of_each = gate.dim() == 2
        ctx.save_for_backward(difference, s)
        return torch.addcmul(knockoff, difference, s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor]:
        difference, s = ctx.saved_tensors
        (gradient,) = gradients
        to_real = gradient * s if ctx.needs_input_grad[0] else None
        to_gate = (gradient * difference).sum((2, 3) if ctx.of_each else (0, 2, 3), dtype=torch.float32)
        return to_real, None, to_gate


def frozen_copy(model: nn.Module, graph: ChannelGraph, dtype: torch.dtype, batch_norm: BatchNormMode) -> nn.Module:
    """A copy without gradients, whose batch norms use running statistics and are folded, or those of the batch."""
    if batch_norm == "frozen":
        return folded_copy(model, graph, dtype)
    live = copy.deepcopy(model).float().eval().requires_grad_(False)
    for module in live.modules():
        if isinstance(module, _BatchNorm):
            module.train()
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    return live
