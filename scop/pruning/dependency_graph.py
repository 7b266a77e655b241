"""Torch-Pruning's dependency graph, without two of its bugs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import _helpers
from torch_pruning.dependency import Dependency, index_mapping

_OP = tp.ops.OPTYPE
_MOST_REPEATS = 4
"""How often each channel of a layer may appear before the traversal counts as endless.

For a layer that concatenates its inputs, twice is normal."""


class Affected(NamedTuple):
    """A layer or operation that a removal of channels affects.

    Attributes:
        dep: Torch-Pruning's dependency, which has the layer as ``dep.target``.
        indices: channels that it loses, in the order in which they were found.
    """

    dep: Any
    indices: list[int]


def trace(model: nn.Module, images: Tensor) -> DependencyGraph:
    """Build the dependency graph of a network by a forward pass with gradients.

    Raises:
        Exception: any exception of the network or of Torch-Pruning.
    """
    graph = DependencyGraph()
    with torch.enable_grad():
        graph.build_dependency(model, example_inputs=(images,), verbose=False)
    return graph


class DependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's dependency graph (for versions below 1.7), with two differences.

    Torch-Pruning divides by zero at some reshapes. Here such a reshape has no index mapping; none is needed, since
    `ChannelGraph` refuses every reshape but flattening.

    If a network concatenates a flattened and a pooled copy of the same channels, Torch-Pruning's traversal never ends
    and fills the memory. Here it raises a ValueError.
    """

    def build_dependency(self, *arguments: Any, **options: Any) -> DependencyGraph:
        with suppress(ZeroDivisionError):  # in its last stage, which `_map_indices` repeats
            super().build_dependency(*arguments, **options)
        self._map_indices()
        return self

    def affected(self, layer: nn.Module, channels: Sequence[int]) -> list[Affected]:
        """List everything that a removal of output channels affects, the layer itself first.

        Raises:
            ValueError: the traversal does not end.
        """
        prune = self.get_pruner_of_module(layer).prune_out_channels
        if isinstance(layer, tp.ops.TORCH_CONV) and layer.groups == layer.out_channels > 1:
            prune = tp.pruner.function.prune_depthwise_conv_out_channels
        self._map_indices()
        root = self.module2node[layer]
        start = (
            Dependency(prune, prune, source=root, target=root),
            [_helpers._HybridIndex(idx=index, root_idx=index) for index in channels],
        )
        found, stack, seen = [start], [start], {_key(*start)}
        while stack:
            dep, indices = stack.pop()
            for following in dep.target.dependencies:
                if not following.is_triggered_by(dep.handler):
                    continue
                mapped = _mapped(following, indices)
                if mapped and (key := _key(following, mapped)) not in seen:
                    _refuse_endless(following.target.module, len(mapped))
                    seen.add(key)
                    found.append((following, mapped))
                    stack.append((following, mapped))
        return _merged(found)

    def _map_indices(self) -> None:
        """Update the index mappings between layers, as ``index_mapping.update_index_mapping`` does."""
        for node in list(self.module2node.values()):
            if (update := _UPDATES.get(node.type)) is not None:
                with suppress(ZeroDivisionError):
                    update(self, node)


_UPDATES: dict[Any, Callable[[Any, Any], None]] = {
    _OP.CONCAT: index_mapping.update_concat_index_mapping,
    _OP.SPLIT: index_mapping.update_split_index_mapping,
    _OP.RESHAPE: index_mapping.update_reshape_index_mapping,
    _OP.UNBIND: index_mapping.update_unbind_index_mapping,
    _OP.EXPAND: index_mapping.update_expand_index_mapping,
    _OP.SLICE: index_mapping.update_slice_index_mapping,
}


def _mapped(dep: Any, indices: list[Any]) -> list[Any]:
    for mapping in dep.index_mapping:
        if mapping is not None:
            indices = mapping(indices)
    return indices


def _key(dep: Any, indices: list[Any]) -> tuple[int, Any, tuple[int, ...]]:
    return id(dep.target), dep.handler, tuple(index.idx for index in indices)


def _refuse_endless(layer: Any, count: int) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        outside, inside = layer.weight.shape[:2]
        if count > _MOST_REPEATS * max(outside, inside * getattr(layer, "groups", 1)):
            raise ValueError(f"{layer} does not have {count} channels")


def _merged(found: list[tuple[Any, list[Any]]]) -> list[Affected]:
    """Merge entries for the same layer and kind of pruning; list each channel once, in the order found."""
    merged: dict[tuple[int, Any], tuple[Any, dict[int, None]]] = {}
    for dep, indices in found:
        _, channels = merged.setdefault((id(dep.target), dep.handler), (dep, {}))
        channels.update(dict.fromkeys(index.idx for index in indices))
    return [Affected(dep, list(channels)) for dep, channels in merged.values()]
