"""The knockoff phase of SCOP (Tang et al., NeurIPS 2020, arXiv 2010.10732).

Every batch x gets a knockoff batch x~ that looks like it but says nothing about its labels. Both run through the frozen
network. Behind each convolution under test, channel j of the real stream becomes ``s_j real + (1 - s_j) knockoff``; the
knockoff stream stays pure. Only the gates s train, on the loss of the real stream, within [0, 1]. A channel's score is

    W_j = |gamma_j| (s_j - (1 - s_j)),

gamma the weight of the convolution's batch norm. Where W is low, the knockoff did as well as the real feature.

**The batch norms are frozen**: they use their running statistics. So they are affine, and an affine map commutes with
a mixture whose weights sum to 1: mixing before the batch norm, as the paper has it, equals mixing behind it, and the
batch norm can be folded into the convolution. The knockoff stream needs no gradient, the weights need none, and the
dense model is never touched, since all of this happens on a folded copy. A step costs about as much as a plain
training step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scop import distributed
from scop.config import KnockoffSection, Precision
from scop.device import autocast, autocast_dtype, pick_device, to_device
from scop.errors import UserError
from scop.graph import ChannelGraph
from scop.models import import_user_module
from scop.parsing import parse
from scop.training import CheckpointStore, EpochRecord, TrainingBatches, fit

KnockoffSource = Callable[[Tensor, Tensor], Tensor]
"""Makes knockoff images (B, C, H, W) of real ones (B, C, H, W) and their labels (B,)."""

INITIAL_GATE = 0.5


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """The knockoff phase's result: layer -> W, a float32 tensor (channels,), on the CPU.

    Attributes:
        gates: layer -> s, in [0, 1].
        gammas: layer -> |gamma|, the absolute weight of the layer's batch norm; ones where it has none.
        input_shape: (C, H, W) of the images.
        history: epoch by epoch.
    """

    gates: dict[str, Tensor]
    gammas: dict[str, Tensor]
    input_shape: tuple[int, int, int]
    history: list[EpochRecord] = field(default_factory=list)

    def __getitem__(self, layer: str) -> Tensor:
        return self.gammas[layer] * (2 * self.gates[layer] - 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)

    def save(self, path: Path) -> None:
        """Write gates and gammas to a safetensors file."""
        tensors = {f"gate/{name}": gate for name, gate in self.gates.items()}
        tensors |= {f"gamma/{name}": gamma for name, gamma in self.gammas.items()}
        save_file(tensors, path, metadata={"input_shape": "x".join(map(str, self.input_shape))})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote; the history is not part of it."""
        try:
            with safe_open(path, "pt") as file:
                channels, height, width = map(int, file.metadata()["input_shape"].split("x"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no scores of the knockoff phase: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {"gate": {}, "gamma": {}}
        for key, tensor in tensors.items():
            kind, _, layer = key.partition("/")
            parts[kind][layer] = tensor
        return cls(parts["gate"], parts["gamma"], (channels, height, width))


def shuffle(images: Tensor, labels: Tensor) -> Tensor:
    """The batch in another order: real images, but of other examples."""
    return images[torch.randperm(len(images), device=images.device)]


SOURCES: dict[str, KnockoffSource] = {"shuffle": shuffle}


def find_source(name: str) -> KnockoffSource:
    """The knockoff source of a name, or of ``package.module:function``; raises UserError where there is none."""
    if name in SOURCES:
        return SOURCES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"knockoff source {name!r} is unknown (known: {', '.join(SOURCES)}, or package.module:function)"
        )
    try:
        source: KnockoffSource = getattr(import_user_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"knockoff source {name!r} cannot be imported: {error}") from error
    return source


def train_knockoffs(
    model: nn.Module,
    batches: TrainingBatches,
    section: KnockoffSection | None = None,
    *,
    source: KnockoffSource | None = None,
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
        section: the settings, or give them one by one as keywords: ``epochs=2, lr=0.01``.
        source: makes knockoffs; that of the settings by default.
        device: where to compute.
        on_epoch: told of every epoch.
        checkpoints, stopping: see `scop.training.fit`.

    Raises:
        UserError: no layer can be pruned, or a setting is bad.
    """
    section = parse(KnockoffSection, (section.model_dump() if section else {}) | settings, "knockoff")
    device = device or pick_device()
    channels, height, width = _image_shape(batches)
    graph = ChannelGraph(model, (channels, height, width))
    competition = Competition(model, graph, source or find_source(section.source), device, section.precision)
    optimizer = torch.optim.Adam(competition.gates.parameters(), lr=section.lr, betas=section.betas)
    history = fit(
        competition,
        batches,
        optimizer,
        epochs=section.epochs,
        label="knockoff",
        seed=section.seed,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
        stopping=stopping,
    )
    gates = {layer: gate.detach().float().cpu() for layer, gate in competition.named_gates()}
    gammas = {layer: _gamma(model, graph, layer) for layer in gates}
    return Scores(gates, gammas, (channels, height, width), history)


def _image_shape(batches: TrainingBatches) -> tuple[int, int, int]:
    if not isinstance(batches, Sized) or isinstance(batches, Iterator):
        raise UserError(
            f"batches must have a length and start anew for each epoch, as a DataLoader or a list does, not a "
            f"{type(batches).__name__}"
        )
    first = next(iter(batches), None)
    if first is None:
        raise UserError("batches are empty: there is nothing to train the gates on")
    channels, height, width = first[0].shape[1:]
    return channels, height, width


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
    norm = graph.batch_norm(layer)
    weight = None if norm is None else model.get_submodule(norm).weight
    if weight is None:
        return torch.ones(model.get_submodule(layer).out_channels)  # type: ignore[call-overload]
    return weight.detach().abs().float().cpu()  # type: ignore[operator]


class Competition:
    """The objective of the knockoff phase: the loss of the real stream, into which the gates mix knockoffs."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        source: KnockoffSource,
        device: torch.device,
        precision: Precision = "auto",
    ) -> None:
        self.source, self.device = source, device
        self.dtype = autocast_dtype(device, precision)
        layers = gated_layers(graph)
        network = folded_copy(model, graph, self.dtype).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Parameter names may not hold dots, and layer names do.
        self.gates = nn.ParameterDict(
            {
                layer.replace(".", "/"): torch.full((int(model.get_submodule(layer).out_channels),), INITIAL_GATE)  # type: ignore[arg-type]
                for layer in layers
            }
        ).to(device)
        with torch.no_grad(), autocast(device, self.dtype):
            streams = _TwoStreams(network, dict(self.named_gates()), torch.zeros(2, *graph.input_shape, device=device))
        self._streams = distributed.parallel(streams, device)

    def named_gates(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, gate in self.gates.items():
            yield name.replace("/", "."), gate

    @property
    def state(self) -> nn.Module:
        return self.gates

    def start_epoch(self) -> None:
        pass

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = to_device(images, labels, self.device)
        with autocast(self.device, self.dtype):
            logits = self._streams(images, self.source(images, labels)).float()
        return F.cross_entropy(logits, labels), logits

    def after_step(self) -> None:
        with torch.no_grad():
            for gate in self.gates.values():
                gate.clamp_(0, 1)


class _TwoStreams(nn.Module):
    """The frozen network with the gates between its two streams.

    Args:
        network: without gradients.
        gates: by layer.
        images: some of the right shape (B, C, H, W), to try it on.

    Shape:
        real images, knockoff images (B, C, H, W) -> logits of the real stream (B, classes).
    """

    def __init__(self, network: nn.Module, gates: Mapping[str, nn.Parameter], images: Tensor) -> None:
        super().__init__()
        self.network, self.gates = network, nn.ParameterList(gates.values())
        self._features: dict[str, Tensor] = {}
        self._mixing = False
        for layer, gate in gates.items():
            network.get_submodule(layer).register_forward_hook(partial(self._meet, layer, gate))
        self._overwritten: set[str] = set()
        self._overwritten = self._find_overwritten(images)

    def forward(self, images: Tensor, knockoffs: Tensor) -> Tensor:
        self._mixing = False
        with torch.no_grad():
            self.network(knockoffs)
        self._mixing = True
        logits: Tensor = self.network(images)
        return logits

    def _meet(self, layer: str, gate: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook: keep the knockoff stream's feature map; mix it into the real stream's."""
        if self._mixing:
            mixed: Tensor = _Mix.apply(output, self._features.pop(layer), gate)
            return mixed
        self._features[layer] = output
        return output.clone() if layer in self._overwritten else output

    def _find_overwritten(self, images: Tensor) -> set[str]:
        """Layers whose output the network changes in place (by a functional ``relu_``, say) after it was kept."""
        self.network(images)
        kept, self._features = self._features, {}
        return {layer for layer, output in kept.items() if output._version > 0}


class _Mix(torch.autograd.Function):
    """``s real + (1 - s) knockoff`` per channel, with gradients for the real stream and the gates.

    Written out because autograd would keep both streams and make the knockoff's gradient, which nobody needs.

    Shape:
        real, knockoff (N, C, H, W), gate (C,) -> (N, C, H, W).
    """

    @staticmethod
    def forward(ctx: Any, real: Tensor, knockoff: Tensor, gate: Tensor) -> Tensor:
        s = gate.to(real.dtype).view(1, -1, *[1] * (real.dim() - 2))
        difference = real - knockoff
        ctx.save_for_backward(difference, s)
        return torch.addcmul(knockoff, difference, s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor]:
        difference, s = ctx.saved_tensors
        (gradient,) = gradients
        others = [0, *range(2, gradient.dim())]
        to_real = gradient * s if ctx.needs_input_grad[0] else None
        return to_real, None, (gradient * difference).sum(others, dtype=torch.float32)


def folded_copy(model: nn.Module, graph: ChannelGraph, dtype: torch.dtype) -> nn.Module:
    """A frozen copy of the model in eval mode, batch norms folded into the convolutions that they follow.

    Args:
        model: the network; not changed.
        graph: its channels.
        dtype: of the weights of convolutions and linear layers.
    """
    folded = copy.deepcopy(model).float().eval().requires_grad_(False)
    for name, module in list(folded.named_modules()):
        # A subclass or a parametrised convolution computes with other weights than those that it holds.
        plain = type(module) is nn.Conv2d and not parametrize.is_parametrized(module) and not module._forward_pre_hooks
        if plain and (norm := graph.batch_norm(name)) is not None:
            batch_norm = folded.get_submodule(norm)
            if not isinstance(batch_norm, _BatchNorm) or not batch_norm.track_running_stats:
                continue
            folded.set_submodule(name, fuse_conv_bn_eval(module, batch_norm))
            folded.set_submodule(norm, nn.Identity())
        if getattr(module, "inplace", False):
            module.inplace = False
    for module in folded.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    return folded.requires_grad_(False)
