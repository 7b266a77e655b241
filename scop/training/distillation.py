"""Learning from a teacher: from its answers, and from where it looks.

Answers (Hinton et al., 2015, arXiv 1503.02531): ``T^2 KL(teacher / T || student / T)`` of the logits.
A teacher's mean answer to an image and its mirror image is a better one, and the student that learns it needs no second
look (Radosavovic et al., 2018, arXiv 1712.04440).

Attention (Zagoruyko and Komodakis, 2017, arXiv 1612.03928): at the end of each stage the mean over channels of the
squared features, one map for an image, brought to length 1; the squared distance between teacher and student. It does
not care how many channels each of them has, which is what pruning changes. It is a guide for the first part of a
training: a network that is too small to do both gives up some of the answers for the maps (docs/knockoffs.md).
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
    """A network that also gives the feature maps in which its stages end.

    Args:
        network: that is looked into by hooks.
        stages: names of modules.
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
        """(B, C, H, W) -> logits (B, classes), and a map (B, C', H', W') for each stage."""
        self._maps.clear()  # of passes that did not go through here, as a validation's
        logits = self.network(images)
        return logits, [self._maps.pop(stage) for stage in self.stages]

    def finish(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()


class Distillation:
    """The teacher's part of a loss.

    Args:
        teacher: in eval mode, without gradients, on the student's device, with modules of the same names.
        student: that is trained.
        section: weights and temperature.
        dtype: in which the teacher computes.
        images: some that the student is to see (B, C, H, W), by which the stages are found.

    Attributes:
        stages: those whose maps are compared.
        teacher: what is asked: a copy whose batch norms are folded away, where its channels can be followed.

    Raises:
        UserError: attention is asked for, and the networks have no feature maps of one size.
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
                "distillation.attention: no module gives maps of one height and width in both networks; set it to 0"
            )
        self.teacher = Watched(_folded(teacher, images, dtype), self.stages)

    def finish(self) -> None:
        """Let go of the teacher."""
        self.teacher.finish()

    def mixed(self, loss: Tensor, images: Tensor, logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """The loss on the labels with the teacher's part.

        Args:
            loss: scalar, float32.
            images: (B, C, H, W).
            logits: of the student (B, classes), float32.
            maps: of the student, one (B, C', H', W') for each stage; none where attention is not asked for.
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
    """A copy that computes the same with less, or the teacher itself where its channels cannot be followed."""
    try:
        folded = folded_copy(teacher, ChannelGraph(teacher, tuple(images.shape[1:])), dtype, in_place=True)
    except UserError:
        return teacher
    return folded.to(memory_format=torch.channels_last)


def answers(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(target / T || logits / T)``, the mean over images: (B, classes), (B, classes) -> scalar."""
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(target / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def attention(features: Tensor, target: Tensor) -> Tensor:
    """Squared distance of two attention maps, the mean over images: (B, C, H, W), (B, C', H, W) -> scalar."""
    maps = [F.normalize(_Energy.apply(part).flatten(1)) for part in (features, target)]
    return (maps[0] - maps[1]).square().sum(1).mean()


class _Energy(torch.autograd.Function):
    """The sum over channels of the squared features, in float32: (B, C, H, W) -> (B, H, W).

    Written out because autograd makes copies of all features in float32, there and back: twice as slow and more.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        # Spread over the channels first: a product that broadcasts over the innermost dimension takes four times as
        # long.
        return torch.empty_like(features).copy_((2 * gradients[0]).to(features.dtype)[:, None]).mul_(features)


def find_stages(teacher: nn.Module, student: nn.Module, images: Tensor) -> list[str]:
    """For each height and width of feature maps the module that is the last to give one, in the network's order.

    Both networks must give one there, of that size and of the images' proportions, which no map with its channels last
    has; a scattered branch is none. Where a block shrinks the maps in its middle (bottlenecks, inverted residuals),
    what it does before that is no stage's end: those modules count that lie in the fewest others whose own map has
    another size.
    """
    theirs, own = _map_sizes(teacher, images), _map_sizes(student, images)

    def strangers(name: str) -> int:
        outer = [name[:place] for place, letter in enumerate(name) if letter == "."]
        return sum(theirs.get(module, theirs[name]) != theirs[name] for module in outer)

    last: dict[tuple[int, int], str] = {}
    for name, size in theirs.items():
        if own.get(name) == size and (size not in last or strangers(name) <= strangers(last[size])):
            last.pop(size, None)
            last[size] = name
    return list(last.values())


def _map_sizes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, int]]:
    """Module -> (height, width) of its feature map, in the order in which they are made."""
    sizes: dict[str, tuple[int, int]] = {}
    whole = images.shape[2:]

    def note(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            height, width = output.shape[2:]
            # Of the images' proportions, but for the pixel by which halvings of odd sizes may be off.
            smaller = math.sqrt(whole.numel() / max(1, height * width))
            off = max(abs(height - whole[0] / smaller), abs(width - whole[1] / smaller))
            if min(height, width) > 1 and off <= 1:
                sizes[name] = (height, width)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules() if name]
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(images)  # or the student's batch norms would take note of these images
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return sizes
