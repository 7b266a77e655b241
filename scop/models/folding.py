"""Batch norms folded into the preceding convolutions: the same function in eval mode, with less computation."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scop.pruning.graph import ChannelGraph


def folded_copy(model: nn.Module, graph: ChannelGraph, dtype: torch.dtype, *, in_place: bool = False) -> nn.Module:
    """Return a frozen copy of the model in eval mode, with batch norms folded into the preceding convolutions.

    Args:
        model: the network; it is not changed.
        graph: its channels.
        dtype: type of the weights of convolutions and linear layers in the copy; all others are float32.
        in_place: keep in-place activations. This is faster, but overwrites the outputs of convolutions.
    """
    folded = copy.deepcopy(model).float().eval().requires_grad_(False)
    names: dict[nn.Module, list[str]] = {}
    for name, module in folded.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, (name, *others) in names.items():
        # A subclass or a parametrised convolution may compute with weights other than those it holds.
        held = not parametrize.is_parametrized(module) and not module._forward_pre_hooks
        if type(module) is nn.Conv2d and held and (norm := graph.batch_norm(name)) is not None:
            batch_norm = folded.get_submodule(norm)
            if not isinstance(batch_norm, _BatchNorm) or not batch_norm.track_running_stats:
                continue
            # Replace them under each of their names, since the forward may use any of these.
            fused, nothing = fuse_conv_bn_eval(module, batch_norm), nn.Identity()
            for alias in (name, *others):
                folded.set_submodule(alias, fused)
            for alias in names[batch_norm]:
                folded.set_submodule(alias, nothing)
        if not in_place and getattr(module, "inplace", False):
            module.inplace = False
    for module in folded.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    return folded.requires_grad_(False)
