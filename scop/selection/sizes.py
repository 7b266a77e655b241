"""Parameters and MACs of pruned networks, counted without running them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from scop.models.evaluation import count_macs, count_parameters
from scop.pruning.cuts import apply_cuts, cuts_of
from scop.pruning.graph import ChannelGraph
from scop.pruning.plan import ChannelPlan


class Sizes:
    """Counts the parameters and MACs of pruned networks without running them.

    Surgery shrinks the weights of convolutions and linear layers, but does not change the positions at which they are
    applied. So the MACs are those of the dense network, minus for each layer its lost weights times its positions.

    Args:
        model: the dense network.
        graph: its channels.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.model, self.graph = model, graph
        self._skeleton = copy.deepcopy(model).to("meta").eval()
        try:
            self._macs = count_macs(self._skeleton, graph.input_shape)
        except Exception:  # meta tensors have no values: a forward that reads values may raise any exception
            self._skeleton = copy.deepcopy(model).cpu().eval()
            self._macs = count_macs(self._skeleton, graph.input_shape)
        self._positions = self._count_positions()

    def _count_positions(self) -> dict[str, int]:
        """Count how often each weight of each convolution and linear layer is multiplied for one image."""
        positions: dict[str, int] = {}

        def note(name: str, module: nn.Module, _: Any, output: torch.Tensor) -> None:
            channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            positions[name] = positions.get(name, 0) + output.numel() // channels

        layers = [(n, m) for n, m in self._skeleton.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        hooks = [module.register_forward_hook(partial(note, name)) for name, module in layers]
        with torch.no_grad():
            self._skeleton(torch.zeros(1, *self.graph.input_shape, device=next(self._skeleton.parameters()).device))
        for hook in hooks:
            hook.remove()
        return positions

    def count(self, what: str, plan: ChannelPlan | None = None) -> int:
        """Return the ``params`` or ``macs`` of the network pruned by a plan; without a plan, of the dense network."""
        network = self._skeleton
        if plan is not None:
            network = apply_cuts(copy.deepcopy(self._skeleton), cuts_of(self.graph, plan))
        if what == "params":
            return count_parameters(network)
        lost = (
            positions * (_weights_of(self._skeleton, name) - _weights_of(network, name))
            for name, positions in self._positions.items()
        )
        return self._macs - sum(lost)

    def by_layer(self, plan: ChannelPlan) -> dict[str, tuple[int, int]]:
        """Return the numbers of weights and MACs of each convolution and linear layer under a plan."""
        network = apply_cuts(copy.deepcopy(self._skeleton), cuts_of(self.graph, plan))
        weights = {name: _weights_of(network, name) for name in self._positions}
        return {name: (own, own * self._positions[name]) for name, own in weights.items()}


def _weights_of(network: nn.Module, name: str) -> int:
    return int(network.get_submodule(name).weight.numel())  # type: ignore[operator]
