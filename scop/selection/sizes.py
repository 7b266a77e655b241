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
    """What pruned networks would have: counted without running any.

    Surgery changes the weights of convolutions and linear layers and not where they are applied: so the MACs are those
    of the dense network less, for each layer, the weights that it loses times the places that they are applied at.

    Args:
        model: the dense network.
        graph: its channels.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.model, self.graph = model, graph
        self._skeleton = copy.deepcopy(model).to("meta").eval()
        try:
            self._macs = count_macs(self._skeleton, graph.input_shape)
        except Exception:  # whatever a forward that looks at its numbers does where there are none
            self._skeleton = copy.deepcopy(model).cpu().eval()
            self._macs = count_macs(self._skeleton, graph.input_shape)
        self._places = self._count_places()

    def _count_places(self) -> dict[str, int]:
        """For each convolution and linear layer, how often one image has each of its weights multiplied."""
        places: dict[str, int] = {}

        def note(name: str, module: nn.Module, _: Any, output: torch.Tensor) -> None:
            channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            places[name] = places.get(name, 0) + output.numel() // channels

        layers = [(n, m) for n, m in self._skeleton.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        hooks = [module.register_forward_hook(partial(note, name)) for name, module in layers]
        with torch.no_grad():
            self._skeleton(torch.zeros(1, *self.graph.input_shape, device=next(self._skeleton.parameters()).device))
        for hook in hooks:
            hook.remove()
        return places

    def count(self, what: str, plan: ChannelPlan | None = None) -> int:
        """The params or macs of the network that a plan leaves, or of the whole one."""
        network = self._skeleton
        if plan is not None:
            network = apply_cuts(copy.deepcopy(self._skeleton), cuts_of(self.graph, plan))
        if what == "params":
            return count_parameters(network)
        lost = (places * (self._weights(name) - _weights_of(network, name)) for name, places in self._places.items())
        return self._macs - sum(lost)

    def by_layer(self, plan: ChannelPlan) -> dict[str, tuple[int, int]]:
        """The weights and MACs that the plan leaves of each convolution and linear layer."""
        network = apply_cuts(copy.deepcopy(self._skeleton), cuts_of(self.graph, plan))
        weights = {name: _weights_of(network, name) for name in self._places}
        return {name: (own, own * self._places[name]) for name, own in weights.items()}

    def _weights(self, name: str) -> int:
        return _weights_of(self._skeleton, name)


def _weights_of(network: nn.Module, name: str) -> int:
    return int(network.get_submodule(name).weight.numel())  # type: ignore[operator]
