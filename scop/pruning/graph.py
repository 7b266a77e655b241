"""Which channels of a network can be removed, and which other layers that affects.

The network is traced with Torch-Pruning's dependency graph; layers are never identified by their names. Convolutions
whose output channels must be removed together form a `ChannelGroup`. A linear layer on a feature map (N, H, W, C), as
in ConvNeXt, is equivalent to a 1x1 convolution and counts as one. A residual rule selects which groups are pruned, and
how:

``scatter``
    Every group outside a residual stream, and the last convolution of each residual branch on its own. The stream
    keeps its width, and the branch's remaining channels are added to it at their original indices. Stems and shortcuts
    are not pruned. This is the paper's rule.
``inner``
    Only groups outside a residual stream, except the stem.
``coupled``
    Every group; all convolutions that write to one residual stream lose the same channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from scop.config import ResidualRule
from scop.errors import UserError
from scop.pruning.traced_network import OP, TracedNetwork, is_addition, is_depthwise

RESIDUAL_RULES: tuple[ResidualRule, ...] = get_args(ResidualRule)

Side = Literal["out", "in"]
"""Whether a layer loses output or input channels. Layers with only one kind of channel, such as norms, use "out"."""

# Types of nodes that a group may contain: Torch-Pruning can cut them, and loading a model can repeat the cut.
_SUPPORTED = {
    OP.CONV,
    OP.DEPTHWISE_CONV,
    OP.BN,
    OP.LINEAR,
    OP.ELEMENTWISE,
    OP.CONCAT,
    OP.RESHAPE,
}


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels that can only be removed together.

    Attributes:
        convs: the convolutions that produce the channels, in model order; the first one names the group.
        channels: number of output channels of each convolution.
        residual: whether the channels form a residual stream, that is, an addition joins several convolutions.
        blocks: number of equal blocks of channels (the groups of a grouped convolution) that must all keep the same
            number of channels; 1 if there are none.
        refusal: why the group cannot be pruned, or None.
    """

    convs: tuple[str, ...]
    channels: int
    residual: bool
    blocks: int = 1
    refusal: str | None = None

    @property
    def name(self) -> str:
        return self.convs[0]


@dataclass(frozen=True)
class Prunable:
    """Convolutions that lose the same channels: one decision of the selection.

    Attributes:
        convs: the convolutions, in model order; the first one names the decision.
        channels: number of output channels of each convolution.
        blocks: number of equal blocks of channels, as in `ChannelGroup`.
        scatter: whether the remaining channels are scattered into a residual stream, which keeps its width.
    """

    convs: tuple[str, ...]
    channels: int
    blocks: int
    scatter: bool

    @property
    def name(self) -> str:
        return self.convs[0]


class ChannelGraph:
    """The channels of a model and the layers that depend on them.

    Args:
        model: any network whose forward takes one image batch; it is not changed.
        input_shape: (C, H, W) of one image.

    Raises:
        UserError: the model does not run on such images, or its channels cannot be traced.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.input_shape = tuple(input_shape)
        self._network = TracedNetwork(model, self.input_shape)
        self._names = self._network.names

    # -- groups ---------------------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """All channel groups, in model order."""
        order = {name: index for index, name in enumerate(self._names.values())}
        return tuple(sorted(self._find_groups(), key=lambda group: order[group.name]))

    def _find_groups(self) -> Iterator[ChannelGroup]:
        seen: set[nn.Module] = set()
        for module in self._network.nodes:
            if module in seen or not self._network.produces(module):
                continue
            channels = out_channels(module)
            try:
                items = self._network.dependencies.affected(module, range(channels))
            except (IndexError, KeyError, ValueError):  # Torch-Pruning cannot map the channels
                refusal = "its channels pass through a split, slice, shuffle or concatenation that cannot be traced"
                yield ChannelGroup((self._names[module],), channels, residual=False, refusal=refusal)
                continue
            seen.update(dep.target.module for dep, _ in items if self._network.writes_channels(dep))
            if group := self._describe(items):
                yield group

    def _describe(self, items: Any) -> ChannelGroup | None:
        producers: list[nn.Conv2d | nn.Linear] = []
        blocks, refusal = 1, None
        for dep, indices in items:
            module, out = dep.target.module, self._network.removes_outputs(dep)
            refusal = refusal or self._refusal(dep, indices)
            if out and self._network.produces(module) and module not in producers:
                producers.append(module)
            if isinstance(module, nn.Conv2d) and not is_depthwise(module) and module.groups > 1:
                blocks = math.lcm(blocks, module.groups)
        if not producers:
            return None
        channels = out_channels(producers[0])
        for dep, indices in items:
            writes = dep.target.module in producers and self._network.removes_outputs(dep)
            if writes and list(indices) != list(range(channels)):
                refusal = refusal or "its channels are combined with another layer's at different offsets"
        if idle := next((name for name, widths in self._network.idle.items() if channels in widths), None):
            refusal = refusal or f"{idle!r}, which may read or write its channels, did not run on the example images"
        names = sorted(self._names[p] for p in producers)
        ordered = tuple(name for name in self._names.values() if name in names)
        residual = any(is_addition(dep.target) for dep, _ in items) and len(producers) > 1
        return ChannelGroup(ordered, channels, residual, blocks, refusal)

    def _refusal(self, dep: Any, indices: list[int]) -> str | None:
        node, module = dep.target, dep.target.module
        name = self._names.get(module) or self._network.parameter_names.get(module)
        if node.type == OP.OUTPUT or not node.outputs:
            # If the group writes to a layer without consumers, its channels are the network's output.
            return "its channels are the network's output" if self._network.writes_channels(dep) else None
        convolution = isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d)
        if node.type not in _SUPPORTED or convolution:
            kind = node.type.name.lower()
            what = f"a {kind}" if name is None else f"{name!r} ({kind})"
            return f"its channels pass through {what}, which is not supported"
        if module in self._network.tied:
            return f"{name!r} shares parameters with another layer"
        if parametrize.is_parametrized(module):
            return f"{name!r} is parametrised"
        if prelu := next((out.module for out in node.outputs if out.type == OP.PRELU), None):
            return f"its channels pass through {self._names[prelu]!r} (prelu), which is not supported"
        if node.type == OP.RESHAPE and not _flattens(node):
            return "its channels pass through a reshape other than flattening"
        if self._network.calls.get(module, 1) > 1 and list(module.parameters(recurse=False)):
            return f"{name!r} runs more than once in a forward pass"
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            if is_depthwise(module) and module.in_channels != module.out_channels:
                return f"{name!r} is a depthwise convolution with a channel multiplier"
            if not is_depthwise(module) and list(indices) != list(range(len(indices))):
                return f"the grouped convolution {name!r} reads its channels at an offset"
        return None

    # -- residual rules -------------------------------------------------------------------------------------------

    def prunable(self, rule: ResidualRule) -> tuple[Prunable, ...]:
        """Return the layers that can be pruned under a residual rule, in model order.

        Raises:
            UserError: there are none; the message gives the reasons.
        """
        found, refusals = self.survey(rule)
        if not found:
            reasons = "; ".join(refusals[:4]) or "the network has no convolution"
            other = "" if rule == "coupled" else "; try residual: coupled"
            raise UserError(f"no prunable layer under residual rule {rule!r} ({reasons}){other}")
        return found

    def survey(self, rule: ResidualRule) -> tuple[tuple[Prunable, ...], list[str]]:
        """Return what a rule can prune, in model order, and a line ``layer: reason`` for each unpruned group."""
        found: list[Prunable] = []
        refusals: list[str] = []
        streams = any(group.residual for group in self.groups)
        for group in self.groups:
            # The stream keeps its width, so a refusal of the whole group does not matter.
            ends = [conv for conv in group.convs if self._network.ends_branch(conv)] if rule == "scatter" else []
            if group.residual and ends:
                found += [Prunable((conv,), self._width(conv), self._groups_of(conv), scatter=True) for conv in ends]
                others = (conv for conv in group.convs if conv not in ends)
                refusals += [f"{conv}: writes to a residual stream, which keeps its width" for conv in others]
            elif group.refusal:
                refusals.append(f"{group.name}: {group.refusal}")
            elif rule != "coupled" and streams and not group.residual and self._network.depth(group.name) == 1:
                refusals.append(f"{group.name}: the stem of a residual network")
            elif not group.residual or rule == "coupled":
                found.append(Prunable(group.convs, group.channels, group.blocks, scatter=False))
            else:
                direct = " to which no branch is added directly" if rule == "scatter" else ""
                refusals.append(f"{group.name}: part of a residual stream{direct}")
        order = {name: index for index, name in enumerate(self._names.values())}
        return tuple(sorted(found, key=lambda p: order[p.name])), refusals

    def unpruned(self, rule: ResidualRule) -> list[str]:
        """Return what a rule does not prune, one line per reason: ``layer1.2.conv2 and 4 others: part of a ...``."""
        by_reason: dict[str, list[str]] = {}
        for refusal in self.survey(rule)[1]:
            name, _, reason = refusal.partition(": ")
            by_reason.setdefault(reason, []).append(name)
        return [f"{_listed(names)}: {reason}" for reason, names in by_reason.items()]

    def _width(self, conv: str) -> int:
        return out_channels(self._network.model.get_submodule(conv))

    def _groups_of(self, conv: str) -> int:
        return int(getattr(self._network.model.get_submodule(conv), "groups", 1))

    # -- affected layers ------------------------------------------------------------------------------------------

    def batch_norm(self, conv: str) -> str | None:
        """Return the name of the batch norm that is the only reader of the convolution's output, or None."""
        return self._network.batch_norm(conv)

    def reach(self, conv: str, removed: list[int]) -> Iterator[tuple[str, Side, list[int]]]:
        """Yield every layer that changes when output channels of ``conv`` are removed, with the channels it loses.

        Yields:
            (layer name, side, channel indices in the unpruned layer).
        """
        module = self._network.model.get_submodule(conv)
        for dep, indices in self._network.dependencies.affected(module, removed):
            target = dep.target.module
            if target not in self._names:
                continue  # an operation without parameters
            two_sided = isinstance(target, nn.Conv2d | nn.Linear) and not is_depthwise(target)
            into = two_sided and not self._network.removes_outputs(dep)
            yield self._names[target], "in" if into else "out", sorted(set(indices))


def _listed(names: list[str]) -> str:
    few = names if len(names) <= 4 else names[:3]
    return ", ".join(few) + (f" and {len(names) - len(few)} others" if len(few) < len(names) else "")


def out_channels(layer: nn.Module) -> int:
    """Return the number of output channels of a convolution, or of a linear layer that acts as one."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features  # type: ignore[return-value]


def _flattens(node: Any) -> bool:
    """Whether a reshape only flattens (N, C, H, W) to (N, C*H*W), or has no effect."""
    sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", None) or getattr(node.grad_fn, "_saved_self_sizes", None)
    return sizes is not None and len(sizes) in (2, 4) and all(_takes_flat(out) for out in node.outputs)


def _takes_flat(node: Any) -> bool:
    return node.type in (OP.LINEAR, OP.OUTPUT) or (
        node.type in (OP.ELEMENTWISE, OP.BN) and all(_takes_flat(out) for out in node.outputs)
    )


def gamma(model: nn.Module, graph: ChannelGraph, conv: str) -> Tensor | None:
    """Return |gamma| (channels,) of a layer's batch norm, on the CPU; None without batch norm or without gamma."""
    norm = graph.batch_norm(conv)
    weight = None if norm is None else model.get_submodule(norm).weight
    return None if weight is None else weight.detach().abs().float().cpu()  # type: ignore[operator]
