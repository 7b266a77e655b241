"""Cuts: which channels each layer loses under a plan, and how the layers are shrunk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from scop.errors import UserError
from scop.pruning.graph import ChannelGraph, Prunable
from scop.pruning.plan import ChannelPlan
from scop.pruning.scatter import make_scattering
from scop.pruning.spec import LayerCut, spec_of

Cuts = Mapping[str, LayerCut]


def cuts_of(graph: ChannelGraph, plan: ChannelPlan) -> dict[str, LayerCut]:
    """Return the cut of every layer that the plan affects, by layer name.

    Raises:
        UserError: the plan does not match the graph.
    """
    out: dict[str, set[int]] = {}
    into: dict[str, set[int]] = {}
    scatter: set[str] = set()
    planned = set(plan.kept)
    for prunable in graph.prunable(plan.residual):
        removed = _agreed_removal(prunable, plan)
        planned.difference_update(prunable.convs)
        if not removed:
            continue
        if prunable.scatter:
            norm = graph.batch_norm(prunable.name)
            for layer in filter(None, (prunable.name, norm)):
                out.setdefault(layer, set()).update(removed)
            scatter.add(norm or prunable.name)
        else:
            for layer, side, indices in graph.reach(prunable.name, removed):
                (out if side == "out" else into).setdefault(layer, set()).update(indices)
    if planned:
        raise UserError(
            f"layer {min(planned)!r} is in the plan but cannot be pruned under residual rule {plan.residual!r}"
        )
    return {
        layer: LayerCut(out=sorted(out.get(layer, ())), into=sorted(into.get(layer, ())), scatter=layer in scatter)
        for layer in sorted(out.keys() | into.keys())
    }


def _agreed_removal(prunable: Prunable, plan: ChannelPlan) -> list[int]:
    present = [conv for conv in prunable.convs if conv in plan.kept]
    if not present:
        return []
    removals = {tuple(plan.removed(conv)) for conv in present}
    if len(removals) > 1 or len(present) < len(prunable.convs):
        raise UserError(
            f"layers {', '.join(map(repr, prunable.convs))} share their channels: keep the same channels in all of them"
        )
    removed = list(removals.pop())
    if removed and prunable.blocks > 1:
        block = prunable.channels // prunable.blocks
        counts = [sum(channel // block == b for channel in removed) for b in range(prunable.blocks)]
        if len(set(counts)) > 1:
            raise UserError(
                f"layer {prunable.name!r} has {prunable.blocks} groups: remove the same number of channels from each"
            )
    return removed


def apply_cuts(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Shrink the model's layers in place and return the model.

    Raises:
        UserError: a cut names a layer that is not in the model, or channels that the layer does not have.
    """
    for name, cut in cuts.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"layer {name!r} has a cut but is not in the model; was the cut made for another network?"
            ) from error
        width = layer_width(layer)
        frozen = [name for name, parameter in layer.named_parameters(recurse=False) if not parameter.requires_grad]
        try:
            if cut.into:
                _prune_inputs(layer, cut.into)
            if cut.out:
                _pruner(layer).prune_out_channels(layer, cut.out)
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"layer {name!r} does not match its cut ({error}); was the cut made for another network?"
            ) from error
        for parameter in frozen:  # Torch-Pruning creates new, trainable ones
            layer.get_parameter(parameter).requires_grad_(False)
        if cut.scatter:
            make_scattering(layer, cut.out, width)
    return model


@torch.no_grad()
def expand(pruned: nn.Module, dense: nn.Module) -> nn.Module:
    """Return a copy of the dense network with the pruned network's weights, and zeros for the removed channels.

    It computes the same function as the pruned network, so that its channels can be scored and pruned again.
    """
    spec = spec_of(pruned)
    assert spec is not None
    # Fill a copy of the dense network with each tensor's flat indices and cut it: the remaining indices are the
    # positions of the pruned network's weights, for any type of layer.
    numbered = copy.deepcopy(dense).cpu().double()
    for module in numbered.modules():
        for name, tensor in module.named_buffers(recurse=False):  # boolean and small integer types cannot hold them
            setattr(module, name, tensor.double())
    for tensor in numbered.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    positions, weights = apply_cuts(numbered, spec.cuts).state_dict(), pruned.state_dict()
    grown = copy.deepcopy(dense).cpu()
    for name, tensor in grown.state_dict().items():
        tensor.zero_().put_(positions[name].long(), weights[name].cpu())
    return grown


def _pruner(layer: nn.Module) -> Any:
    return tp.pruner.function.PrunerBox[tp.ops.module2type(layer)]


def layer_width(layer: nn.Module) -> int:
    """Return the number of output channels of a layer that Torch-Pruning can cut."""
    return int(_pruner(layer).get_out_channels(layer))


def _prune_inputs(layer: nn.Module, removed: list[int]) -> None:
    if not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        _pruner(layer).prune_in_channels(layer, removed)
        return
    # Each group of a grouped convolution keeps its own inputs; Torch-Pruning assumes the same inputs in all groups.
    removed_set = set(removed)
    width = layer.in_channels // layer.groups
    kept = [[c for c in range(width) if g * width + c not in removed_set] for g in range(layer.groups)]
    rows = layer.weight.detach().chunk(layer.groups, dim=0)
    slices = [weight[:, torch.tensor(index)] for weight, index in zip(rows, kept, strict=True)]
    layer.weight = nn.Parameter(torch.cat(slices), requires_grad=layer.weight.requires_grad)
    layer.in_channels -= len(removed_set)
