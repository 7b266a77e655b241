"""Distillation from a teacher: from its logits, and from its attention maps.

Logits (Hinton et al., 2015, arXiv 1503.02531): the loss is ``T^2 KL(teacher / T || student / T)``. The mean of the
teacher's logits over an image and its mirror image is a better target, and a student trained on it needs a single
forward pass (Radosavovic et al., 2018, arXiv 1712.04440).

Attention (Zagoruyko and Komodakis, 2017, arXiv 1612.03928): at the end of each stage, the squared features are averaged
over channels, which gives one map per image, and the map is normalised to length 1. The loss is the squared distance
between the teacher's and the student's maps. It does not depend on the numbers of channels, which pruning changes. It
helps only in the first part of the training: a network that is too small to match both logits and maps matches the
logits less well (docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.compute.device import autocast
from scop.config import DistillationSection
from scop.errors import UserError
from scop.models.folding import folded_copy
from scop.pruning.graph import ChannelGraph


class Watched(nn.Module):
    """A network that also returns the feature maps at the end of its stages.

    Args:
        network: the network; hooks are added to it.
        stages: names of the modules that end the stages.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str] = ()) -> None:
        super().__init__()
        self.network, self.stages = network, stages
        self._maps: dict[str, Tensor] = {}
        self._hooks = [
            network.get_submodule(stage).register_forward_hook(partial(self._keep, stage)) for stage in stages
        ]

    def _keep(self, stage: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self._maps[stage] = output

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> logits (B, classes) and a feature map (B, C', H', W') for each stage."""
        self._maps.clear()  # left by passes that bypassed this module, such as validation
        logits = self.network(images)
        return logits, [self._maps.pop(stage) for stage in self.stages]

    def finish(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


class Distillation:
    """The teacher's part of the loss.

    Args:
        teacher: in eval mode, without gradients, on the student's device, with modules of the same names.
        student: the network to train.
        section: weights and temperature.
        dtype: dtype in which the teacher computes.
        images: training images (B, C, H, W), used to find the stages.

    Attributes:
        stages: names of the modules whose maps are compared.
        teacher: the network that runs: a copy with folded batch norms, or the original if it cannot be traced.

    Raises:
        UserError: attention has a weight, but the networks have no feature maps of the same size.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        section: DistillationSection,
        dtype: torch.dtype,
        images: Tensor,
    ) -> None:
        self._section, self._dtype = section, dtype
        self.stages = find_stages(teacher, student, images[:2]) if section.attention else []
        if section.attention and not self.stages:
            raise UserError(
                "distillation.attention: no module has feature maps of the same size in both networks; set it to 0"
            )
        self.teacher = Watched(_folded(teacher, images, dtype), self.stages)

    def finish(self) -> None:
        """Remove the hooks from the teacher."""
        self.teacher.finish()

    def mixed(self, loss: Tensor, images: Tensor, logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Return the loss on the labels mixed with the teacher's part.

        Args:
            loss: loss on the labels, a float32 scalar.
            images: (B, C, H, W).
            logits: the student's logits (B, classes), float32.
            maps: the student's feature maps, (B, C', H', W') for each stage; empty to skip attention.
        """
        section = self._section
        with torch.no_grad(), autocast(images.device, self._dtype):
            target, targets = self.teacher(images)
            target = target.float()
            if section.mirror and section.weight:
                target = (target + self.teacher(images.flip(3))[0]) / 2
        if section.weight:
            loss = (1 - section.weight) * loss + section.weight * answers(logits, target, section.temperature)
        if maps:
            distances = [attention(own, theirs) for own, theirs in zip(maps, targets, strict=True)]
            loss = loss + section.attention * torch.stack(distances).mean()
        return loss


def _folded(teacher: nn.Module, images: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return an equivalent copy with folded batch norms, or the teacher itself if it cannot be traced."""
    try:
        folded = folded_copy(teacher, ChannelGraph(teacher, tuple(images.shape[1:])), dtype, in_place=True)
    except UserError:
        return teacher
    return folded.to(memory_format=torch.channels_last)


def answers(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(target / T || logits / T)``, the mean over images: (B, classes), (B, classes) -> scalar."""
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(target / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def attention(features: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of attention maps, the mean over images: (B, C, H, W), (B, C', H, W) -> scalar."""
    maps = [F.normalize(_Energy.apply(part).flatten(1)) for part in (features, target)]
    return (maps[0] - maps[1]).square().sum(1).mean()


class _Energy(torch.autograd.Function):
    """The sum over channels of the squared features, in float32: (B, C, H, W) -> (B, H, W).

    A custom function, because autograd copies all features to float32, forward and backward, which takes more than
    twice as long.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        # Copy to all channels first: a product that broadcasts over the innermost dimension takes four times as long.
        return torch.empty_like(features).copy_((2 * gradients[0]).to(features.dtype)[:, None]).mul_(features)


def find_stages(teacher: nn.Module, student: nn.Module, images: Tensor) -> list[str]:
    """Return, for each size of feature maps, the name of the last module with maps of this size, in execution order.

    The module must have maps of this size in both networks, which excludes scattered branches, with the images' aspect
    ratio, which excludes maps with channels last. Some blocks shrink their maps in the middle (bottlenecks, inverted
    residuals); their modules before that do not end a stage. So of the modules with maps of one size, only those count
    that are nested in the fewest modules with maps of another size.
    """
    theirs, own = _map_sizes(teacher, images), _map_sizes(student, images)

    def strangers(name: str) -> int:
        outer = [name[:index] for index, letter in enumerate(name) if letter == "."]
        return sum(theirs.get(module, theirs[name]) != theirs[name] for module in outer)

    last: dict[tuple[int, int], str] = {}
    for name, size in theirs.items():
        if own.get(name) == size and (size not in last or strangers(name) <= strangers(last[size])):
            last.pop(size, None)
            last[size] = name
    return list(last.values())


def _map_sizes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, int]]:
    """Return module name -> (height, width) of its feature map, in execution order."""
    sizes: dict[str, tuple[int, int]] = {}
    whole = images.shape[2:]

    def note(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            height, width = output.shape[2:]
            # Maps need the images' aspect ratio, within the pixel by which halved odd sizes may be off.
            smaller = math.sqrt(whole.numel() / max(1, height * width))
            off = max(abs(height - whole[0] / smaller), abs(width - whole[1] / smaller))
            if min(height, width) > 1 and off <= 1:
                sizes[name] = (height, width)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules() if name]
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(images)  # in training mode the batch norm statistics would change
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return sizes
