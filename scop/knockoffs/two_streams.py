"""A frozen network that processes images and their knockoffs in two streams; see `scop.knockoffs.phase`."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scop.config import BatchNormMode
from scop.knockoffs.gates import Gates
from scop.models.folding import folded_copy
from scop.pruning.graph import ChannelGraph


class TwoStreams(nn.Module):
    """The frozen network, with gates that mix the knockoff stream into the real stream.

    Args:
        network: the network, without gradients; hooks are added to it.
        gates: gates of its layers.
        images: images of the right shape (B, C, H, W), for a trial run.
        joint: run both streams as one batch, so that batch norms see both.

    Shape:
        real images, knockoff images (B, C, H, W) -> logits of the real stream (B, classes).
    """

    def __init__(self, network: nn.Module, gates: Gates, images: Tensor, joint: bool = False) -> None:
        super().__init__()
        self.network, self.joint = network, joint
        self._gates = nn.ParameterList(gate for _, gate in gates.named())  # so that `parameters` lists them
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
        """Forward hook: keep the knockoff stream's feature map, and later mix it into the real stream's."""
        if not self._mixing:
            self._features[layer] = output
            return output.clone() if layer in self._overwritten else output
        gate = gates.opened(layer, len(output))
        real, knockoff = _channels_second(module, output), _channels_second(module, self._features.pop(layer))
        mixed: Tensor = _Mix.apply(real, knockoff, gate)
        return _channels_back(module, mixed)

    def _meet_within(self, layer: str, gates: Gates, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook for one batch of real images and knockoffs; gradients flow through the knockoffs too."""
        real, knockoff = _channels_second(module, output).chunk(2)
        gate = gates.opened(layer, len(real))[..., None, None].to(output.dtype)
        mixed = torch.cat([torch.lerp(knockoff, real, gate.expand_as(real)), knockoff])
        return _channels_back(module, mixed)

    def _find_overwritten(self, images: Tensor) -> set[str]:
        """Return the layers whose output the network later changes in place, for example by a functional ``relu_``."""
        self.network(images)
        kept, self._features = self._features, {}
        return {layer for layer, output in kept.items() if output._version > 0}


def _channels_second(module: nn.Module, features: Tensor) -> Tensor:
    """Return a feature map as (N, C, H, W); that of a linear layer is (N, H, W, C)."""
    return features.movedim(-1, 1) if isinstance(module, nn.Linear) else features


def _channels_back(module: nn.Module, features: Tensor) -> Tensor:
    return features.movedim(1, -1) if isinstance(module, nn.Linear) else features


class _Mix(torch.autograd.Function):
    """``s real + (1 - s) knockoff`` per channel, with gradients for the real stream and the gates.

    A custom function, because autograd would store both streams and compute the knockoff's unused gradient.

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
    """Return a copy without gradients; batch norms are folded if frozen, and use batch statistics otherwise."""
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
