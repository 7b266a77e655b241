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

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from scop.config import ResidualRule
from scop.errors import UserError
from scop.pruning.dependency_graph import trace

RESIDUAL_RULES: tuple[ResidualRule, ...] = get_args(ResidualRule)

Side = Literal["out", "in"]
"""Whether a layer loses output or input channels. Layers with only one kind of channel, such as norms, use "out"."""

_OP = tp.ops.OPTYPE
# Types of nodes that a group may contain: Torch-Pruning can cut them, and loading a model can repeat the cut.
_SUPPORTED = {
    _OP.CONV,
    _OP.DEPTHWISE_CONV,
    _OP.BN,
    _OP.LINEAR,
    _OP.ELEMENTWISE,
    _OP.CONCAT,
    _OP.RESHAPE,
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
        # Trace a copy in float32 on the CPU: tracing needs gradients and leaves the model in eval mode.
        self._model = copy.deepcopy(model).float().cpu().requires_grad_(True).eval()
        self.input_shape = tuple(input_shape)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._parameter_names: dict[Any, str] = {p: name for name, p in self._model.named_parameters()}
        self._tied = _tied(self._model)
        self._pointwise: set[nn.Module] = set()
        self._calls = self._count_calls()
        try:
            self._dependencies = trace(self._model, self._example())
        except Exception as error:
            raise UserError(f"the channels of {type(model).__name__} cannot be traced: {error}") from error
        self._nodes: dict[nn.Module, Any] = self._dependencies.module2node

    def _example(self) -> torch.Tensor:
        # Two images, since some networks squeeze the batch dimension of a batch of one.
        return torch.randn(2, *self.input_shape, generator=torch.Generator().manual_seed(0))

    def _count_calls(self) -> dict[nn.Module, int]:
        """Count how often each layer runs in one forward pass; a layer that runs twice cannot be pruned."""
        calls: dict[nn.Module, int] = {}

        def count(module: nn.Module, _: Any, output: Any) -> None:
            calls[module] = calls.get(module, 0) + 1
            if isinstance(module, nn.Linear) and output.dim() == 4:
                self._pointwise.add(module)

        # A parametrised layer has children, which compute its weights.
        layers = (m for m in self._model.modules() if isinstance(m, nn.Conv2d | nn.Linear) or not list(m.children()))
        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            with torch.no_grad():
                self._model(self._example())
        except Exception as error:
            shape = "x".join(map(str, self.input_shape))
            raise UserError(f"the model does not run on {shape} images: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    @cached_property
    def _idle(self) -> dict[str, set[int]]:
        """Convolutions that did not run on the example images, with their numbers of input and output channels.

        They may run on other images, if the forward depends on its input.
        """
        layers = (module for module in self._names if isinstance(module, nn.Conv2d) and module not in self._calls)
        return {self._names[layer]: {layer.in_channels, layer.out_channels} for layer in layers}

    # -- groups ---------------------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """All channel groups, in model order."""
        order = {name: index for index, name in enumerate(self._names.values())}
        return tuple(sorted(self._find_groups(), key=lambda group: order[group.name]))

    def _find_groups(self) -> Iterator[ChannelGroup]:
        seen: set[nn.Module] = set()
        for module in self._nodes:
            if module in seen or not self._produces(module):
                continue
            channels = out_channels(module)
            try:
                items = self._dependencies.affected(module, range(channels))
            except (IndexError, KeyError, ValueError):  # Torch-Pruning cannot map the channels
                refusal = "its channels pass through a split, slice, shuffle or concatenation that cannot be traced"
                yield ChannelGroup((self._names[module],), channels, residual=False, refusal=refusal)
                continue
            seen.update(dep.target.module for dep, _ in items if self._writes(dep))
            if group := self._describe(items):
                yield group

    def _produces(self, module: nn.Module) -> bool:
        """Whether a layer has output channels of its own instead of those of its input."""
        return module in self._pointwise or (isinstance(module, nn.Conv2d) and not _is_depthwise(module))

    def _describe(self, items: Any) -> ChannelGroup | None:
        producers: list[nn.Conv2d | nn.Linear] = []
        blocks, refusal = 1, None
        for dep, indices in items:
            module, out = dep.target.module, self._dependencies.is_out_channel_pruning_fn(dep.handler)
            refusal = refusal or self._refusal(dep, indices)
            if out and self._produces(module) and module not in producers:
                producers.append(module)
            if isinstance(module, nn.Conv2d) and not _is_depthwise(module) and module.groups > 1:
                blocks = math.lcm(blocks, module.groups)
        if not producers:
            return None
        channels = out_channels(producers[0])
        for dep, indices in items:
            writes = dep.target.module in producers and self._dependencies.is_out_channel_pruning_fn(dep.handler)
            if writes and list(indices) != list(range(channels)):
                refusal = refusal or "its channels are combined with another layer's at different offsets"
        if idle := next((name for name, widths in self._idle.items() if channels in widths), None):
            refusal = refusal or f"{idle!r}, which may read or write its channels, did not run on the example images"
        names = sorted(self._names[p] for p in producers)
        ordered = tuple(name for name in self._names.values() if name in names)
        residual = any(_is_add(dep.target) for dep, _ in items) and len(producers) > 1
        return ChannelGroup(ordered, channels, residual, blocks, refusal)

    def _refusal(self, dep: Any, indices: list[int]) -> str | None:
        node, module = dep.target, dep.target.module
        name = self._names.get(module) or self._parameter_names.get(module)
        if node.type == _OP.OUTPUT or not node.outputs:
            # If the group writes to a layer without consumers, its channels are the network's output.
            return "its channels are the network's output" if self._writes(dep) else None
        convolution = isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d)
        if node.type not in _SUPPORTED or convolution:
            kind = node.type.name.lower()
            what = f"a {kind}" if name is None else f"{name!r} ({kind})"
            return f"its channels pass through {what}, which is not supported"
        if module in self._tied:
            return f"{name!r} shares parameters with another layer"
        if parametrize.is_parametrized(module):
            return f"{name!r} is parametrised"
        if prelu := next((out.module for out in node.outputs if out.type == _OP.PRELU), None):
            return f"its channels pass through {self._names[prelu]!r} (prelu), which is not supported"
        if node.type == _OP.RESHAPE and not _flattens(node):
            return "its channels pass through a reshape other than flattening"
        if self._calls.get(module, 1) > 1 and list(module.parameters(recurse=False)):
            return f"{name!r} runs more than once in a forward pass"
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            if _is_depthwise(module) and module.in_channels != module.out_channels:
                return f"{name!r} is a depthwise convolution with a channel multiplier"
            if not _is_depthwise(module) and list(indices) != list(range(len(indices))):
                return f"the grouped convolution {name!r} reads its channels at an offset"
        return None

    def _writes(self, dep: Any) -> bool:
        return dep.target.type == _OP.OUTPUT or self._dependencies.is_out_channel_pruning_fn(dep.handler)

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
            ends = [conv for conv in group.convs if self._ends_branch(conv)] if rule == "scatter" else []
            if group.residual and ends:
                found += [Prunable((conv,), self._width(conv), self._groups_of(conv), scatter=True) for conv in ends]
                others = (conv for conv in group.convs if conv not in ends)
                refusals += [f"{conv}: writes to a residual stream, which keeps its width" for conv in others]
            elif group.refusal:
                refusals.append(f"{group.name}: {group.refusal}")
            elif rule != "coupled" and streams and not group.residual and self._depth(self._node(group.name)) == 1:
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
        return out_channels(self._model.get_submodule(conv))

    def _groups_of(self, conv: str) -> int:
        return int(getattr(self._model.get_submodule(conv), "groups", 1))

    def batch_norm(self, conv: str) -> str | None:
        """Return the name of the batch norm that is the only reader of the convolution's output, or None."""
        node = self._nodes.get(self._model.get_submodule(conv))
        if node is None or len(node.outputs) != 1 or node.outputs[0].type != _OP.BN:
            return None
        norm = node.outputs[0]
        alone = len(norm.inputs) == 1 and self._calls.get(norm.module) == 1 and self._calls.get(node.module) == 1
        return self._names[norm.module] if alone else None

    def _ends_branch(self, conv: str) -> bool:
        """Whether the convolution, with its batch norm, ends the deeper of two branches that an addition joins."""
        last = self._node(self.batch_norm(conv) or conv)
        if len(last.outputs) != 1 or not _is_add(last.outputs[0]) or self._calls.get(last.module) != 1:
            return False
        others = [node for node in last.outputs[0].inputs if node is not last]
        own = {last.module, self._model.get_submodule(conv)}
        changeable = not own & self._tied and not any(map(parametrize.is_parametrized, own))
        return changeable and len(others) == 1 and self._depth(last) > self._depth(others[0])

    def _node(self, name: str) -> Any:
        return self._nodes[self._model.get_submodule(name)]

    def _depth(self, node: Any) -> int:
        """Return the number of convolutions on the longest path from the input to this node, inclusive."""
        return self._depths[node]

    @cached_property
    def _depths(self) -> dict[Any, int]:
        depths: dict[Any, int] = {}
        stack = list(self._nodes.values())
        entered: set[Any] = set()
        while stack:
            node = stack[-1]
            # A layer that runs twice is one node, so there can be cycles: do not wait for nodes entered before.
            waiting = [source for source in node.inputs if source not in depths and source not in entered]
            entered.add(node)
            if waiting:
                stack += waiting
                continue
            own = node.type in (_OP.CONV, _OP.DEPTHWISE_CONV)
            depths[node] = own + max((depths.get(source, 0) for source in node.inputs), default=0)
            stack.pop()
        return depths

    # -- affected layers ------------------------------------------------------------------------------------------

    def reach(self, conv: str, removed: list[int]) -> Iterator[tuple[str, Side, list[int]]]:
        """Yield every layer that changes when output channels of ``conv`` are removed, with the channels it loses.

        Yields:
            (layer name, side, channel indices in the unpruned layer).
        """
        module = self._model.get_submodule(conv)
        for dep, indices in self._dependencies.affected(module, removed):
            target = dep.target.module
            if target not in self._names:
                continue  # an operation without parameters
            two_sided = isinstance(target, nn.Conv2d | nn.Linear) and not _is_depthwise(target)
            into = two_sided and not self._dependencies.is_out_channel_pruning_fn(dep.handler)
            yield self._names[target], "in" if into else "out", sorted(set(indices))


def _tied(model: nn.Module) -> set[nn.Module]:
    """Return the layers that share a parameter with another layer; they cannot be cut independently."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def _listed(names: list[str]) -> str:
    few = names if len(names) <= 4 else names[:3]
    return ", ".join(few) + (f" and {len(names) - len(few)} others" if len(few) < len(names) else "")


def out_channels(layer: nn.Module) -> int:
    """Return the number of output channels of a convolution, or of a linear layer that acts as one."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features  # type: ignore[return-value]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.out_channels


def _is_add(node: Any) -> bool:
    """Whether the node adds two feature maps; an addition of a constant has one input."""
    return (
        node.type == _OP.ELEMENTWISE
        and len(node.inputs) > 1
        and node.grad_fn is not None
        and node.grad_fn.name().startswith("AddBackward")
    )


def _flattens(node: Any) -> bool:
    """Whether a reshape only flattens (N, C, H, W) to (N, C*H*W), or has no effect."""
    sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", None) or getattr(node.grad_fn, "_saved_self_sizes", None)
    return sizes is not None and len(sizes) in (2, 4) and all(_takes_flat(out) for out in node.outputs)


def _takes_flat(node: Any) -> bool:
    return node.type in (_OP.LINEAR, _OP.OUTPUT) or (
        node.type in (_OP.ELEMENTWISE, _OP.BN) and all(_takes_flat(out) for out in node.outputs)
    )


def gamma(model: nn.Module, graph: ChannelGraph, conv: str) -> Tensor | None:
    """Return |gamma| (channels,) of a layer's batch norm, on the CPU; None without batch norm or without gamma."""
    norm = graph.batch_norm(conv)
    weight = None if norm is None else model.get_submodule(norm).weight
    return None if weight is None else weight.detach().abs().float().cpu()  # type: ignore[operator]
