"""A traced network: the data flow between its layers, found by running it on example images."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.utils import parametrize

from scop.errors import UserError
from scop.pruning.dependency_graph import trace

OP = tp.ops.OPTYPE
"""Torch-Pruning's types of operations."""


class TracedNetwork:
    """A copy of a network, with Torch-Pruning's dependency graph and the number of calls of each layer.

    Args:
        model: any network whose forward takes one image batch; it is not changed.
        input_shape: (C, H, W) of one image.

    Attributes:
        model: the copy, in float32 on the CPU and in eval mode.
        names: name of each module.
        parameter_names: name of each parameter.
        dependencies: Torch-Pruning's dependency graph.
        nodes: the graph's node of each module that ran.
        calls: number of times that each layer runs in one forward pass; a layer that runs twice cannot be pruned.
        tied: layers that share a parameter with another layer.

    Raises:
        UserError: the model does not run on such images, or its channels cannot be traced.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        # Trace a copy: tracing needs gradients and leaves the model in eval mode.
        self.model = copy.deepcopy(model).float().cpu().requires_grad_(True).eval()
        self.names = {module: name for name, module in self.model.named_modules()}
        self.parameter_names: dict[Any, str] = {p: name for name, p in self.model.named_parameters()}
        self.tied = _tied(self.model)
        self._pointwise: set[nn.Module] = set()
        # Two images, since some networks squeeze the batch dimension of a batch of one.
        example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
        self.calls = self._count_calls(example.clone())
        try:
            self.dependencies = trace(self.model, example)
        except Exception as error:
            raise UserError(f"the channels of {type(model).__name__} cannot be traced: {error}") from error
        self.nodes: dict[nn.Module, Any] = self.dependencies.module2node

    def _count_calls(self, example: torch.Tensor) -> dict[nn.Module, int]:
        calls: dict[nn.Module, int] = {}

        def count(module: nn.Module, _: Any, output: Any) -> None:
            calls[module] = calls.get(module, 0) + 1
            if isinstance(module, nn.Linear) and output.dim() == 4:
                self._pointwise.add(module)

        # A parametrised layer has children, which compute its weights.
        layers = (m for m in self.model.modules() if isinstance(m, nn.Conv2d | nn.Linear) or not list(m.children()))
        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            with torch.no_grad():
                self.model(example)
        except Exception as error:
            shape = "x".join(map(str, example.shape[1:]))
            raise UserError(f"the model does not run on {shape} images: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    @cached_property
    def idle(self) -> dict[str, set[int]]:
        """Convolutions that did not run on the example images, with their numbers of input and output channels.

        They may run on other images, if the forward depends on its input.
        """
        layers = (module for module in self.names if isinstance(module, nn.Conv2d) and module not in self.calls)
        return {self.names[layer]: {layer.in_channels, layer.out_channels} for layer in layers}

    def produces(self, module: nn.Module) -> bool:
        """Whether a layer has output channels of its own instead of those of its input."""
        return module in self._pointwise or (isinstance(module, nn.Conv2d) and not is_depthwise(module))

    def writes_channels(self, dep: Any) -> bool:
        """Whether a dependency concerns channels that its target writes, or the network's output."""
        return dep.target.type == OP.OUTPUT or self.removes_outputs(dep)

    def removes_outputs(self, dep: Any) -> bool:
        """Whether a dependency removes output channels of its target, not input channels."""
        return bool(self.dependencies.is_out_channel_pruning_fn(dep.handler))

    def batch_norm(self, conv: str) -> str | None:
        """Return the name of the batch norm that is the only reader of the convolution's output, or None."""
        node = self.nodes.get(self.model.get_submodule(conv))
        if node is None or len(node.outputs) != 1 or node.outputs[0].type != OP.BN:
            return None
        norm = node.outputs[0]
        alone = len(norm.inputs) == 1 and self.calls.get(norm.module) == 1 and self.calls.get(node.module) == 1
        return self.names[norm.module] if alone else None

    def ends_branch(self, conv: str) -> bool:
        """Whether the convolution, with its batch norm, ends the deeper of two branches that an addition joins."""
        last = self._node(self.batch_norm(conv) or conv)
        if len(last.outputs) != 1 or not is_addition(last.outputs[0]) or self.calls.get(last.module) != 1:
            return False
        others = [node for node in last.outputs[0].inputs if node is not last]
        own = {last.module, self.model.get_submodule(conv)}
        changeable = not own & self.tied and not any(map(parametrize.is_parametrized, own))
        return changeable and len(others) == 1 and self._depths[last] > self._depths[others[0]]

    def depth(self, name: str) -> int:
        """Return the number of convolutions on the longest path from the input to a layer, inclusive."""
        return self._depths[self._node(name)]

    @cached_property
    def _depths(self) -> dict[Any, int]:
        depths: dict[Any, int] = {}
        stack = list(self.nodes.values())
        entered: set[Any] = set()
        while stack:
            node = stack[-1]
            # A layer that runs twice is one node, so there can be cycles: do not wait for nodes entered before.
            waiting = [source for source in node.inputs if source not in depths and source not in entered]
            entered.add(node)
            if waiting:
                stack += waiting
                continue
            own = node.type in (OP.CONV, OP.DEPTHWISE_CONV)
            depths[node] = own + max((depths.get(source, 0) for source in node.inputs), default=0)
            stack.pop()
        return depths

    def _node(self, name: str) -> Any:
        return self.nodes[self.model.get_submodule(name)]


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution with one group per output channel."""
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.out_channels


def is_addition(node: Any) -> bool:
    """Whether the node adds two feature maps; an addition of a constant has one input."""
    return (
        node.type == OP.ELEMENTWISE
        and len(node.inputs) > 1
        and node.grad_fn is not None
        and node.grad_fn.name().startswith("AddBackward")
    )


def _tied(model: nn.Module) -> set[nn.Module]:
    """Return the layers that share a parameter with another layer; they cannot be cut independently."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}
