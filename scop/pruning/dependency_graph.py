"""Torch-Pruning's dependency graph, but that two things are mended which it does not get over."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping


def trace(model: nn.Module, images: Tensor) -> Any:
    """The dependency graph of a network, by a forward pass with gradients.

    Raises:
        Exception: whatever the network or Torch-Pruning raise.
    """
    with torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=(images,), verbose=False)


_follow_reshape = index_mapping.update_reshape_index_mapping


def _follow_known_reshape(graph: Any, node: Any) -> None:
    """It divides by zero at some reshapes, and gives up on the whole network; channels through any but a flattening
    one stay whole here anyway."""
    with suppress(ZeroDivisionError):
        _follow_reshape(graph, node)


index_mapping.update_reshape_index_mapping = _follow_known_reshape

_add_to_group = tp.dependency.Group.add_dep
_TOO_OFTEN = 4
"""Channels may come twice to a layer that joins them; so many times as often as it has any they never do."""


def _add_without_circles(group: Any, dep: Any, idxs: Any) -> None:
    """It walks in circles where the same channels are joined flattened and pooled: with each round its list of them is
    some times as long, until memory is full."""
    layer = dep.target.module
    if isinstance(layer, nn.Conv2d | nn.Linear):
        outside, inside = layer.weight.shape[:2]
        if len(idxs) > _TOO_OFTEN * max(outside, inside * getattr(layer, "groups", 1)):
            raise ValueError(f"{layer} has not so many channels")
    _add_to_group(group, dep, idxs)


tp.dependency.Group.add_dep = _add_without_circles
