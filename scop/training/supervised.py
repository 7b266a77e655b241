"""Training on labels, of the dense network and of the pruned one, perhaps with a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scop.compute import distributed
from scop.compute.device import autocast, autocast_dtype, to_device
from scop.compute.narrow_batch_norm import NarrowBatchNorms
from scop.compute.strided_convolution import pick_pixels_first
from scop.compute.sync_batch_norm import SynchronisedBatchNorms
from scop.config import DistillationSection, TrainingSection
from scop.errors import UserError
from scop.training.distillation import Distillation, Watched
from scop.training.loop import TrainingBatches


class Supervised:
    """Cross-entropy of a network on its labels; as options a teacher's part, and a moving average of the weights.

    Args:
        model: the network, on the device.
        device: where to compute.
        section: the settings.
        teacher: in eval mode and without gradients, on the device.
        distillation: what is learned from it.

    Attributes:
        average: the network with the exponential moving average of all weights and batch norm statistics, if the
            settings ask for one.
        attentive: whether the teacher's attention is learned in this epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        section: TrainingSection,
        teacher: nn.Module | None = None,
        distillation: DistillationSection | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.dtype = autocast_dtype(device, section.precision)
        self.smoothing = section.label_smoothing
        self._compile, self._teacher, self._lesson = section.compile, teacher, distillation
        share = distillation.attention_until if distillation else 0.0
        self._attentive_epochs = math.ceil(share * section.epochs - 1e-9)  # 0.55 * 20 = 11.000000000000002 is 11
        self.attentive = True
        self._distillation: Distillation | None = None
        self._watched: Watched | None = None
        self._forward: Callable[[Tensor], tuple[Tensor, list[Tensor]]] | None = None
        self.average: MovingAverage | None = None
        if section.ema:
            self.average = MovingAverage(model, section.ema)
        synchronised = distributed.several() and section.sync_batch_norm
        if synchronised and section.compile:
            raise UserError("compile cannot synchronise batch norms; set sync_batch_norm: false, or compile: false")
        self._batch_norms: AbstractContextManager[Any] = nullcontext()
        if synchronised:
            self._batch_norms = SynchronisedBatchNorms()
        elif device.type == "cpu" and not section.compile:  # a compiler makes kernels of its own for every width
            self._batch_norms = NarrowBatchNorms()
        self._undo: Callable[[], None] = pick_pixels_first(model) if device.type == "cpu" else lambda: None

    @property
    def state(self) -> nn.Module:
        return self.model if self.average is None else nn.ModuleDict({"model": self.model, "average": self.average})

    @property
    def result(self) -> nn.Module:
        """The network that training is for: that which is trained, or the average."""
        return self.model if self.average is None else self.average.module

    def finish(self) -> None:
        """Have the trained network take the average's weights, where there is one, and let go of it."""
        self._undo()
        for watching in (self._distillation, self._watched):
            if watching is not None:
                watching.finish()
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def start_epoch(self, epoch: int) -> None:
        self.model.train()
        self.attentive = epoch < self._attentive_epochs

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = to_device(images, labels, self.device)
        if self._forward is None:
            self._forward = self._begin(images)
        with autocast(self.device, self.dtype), self._batch_norms:
            logits, maps = self._forward(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        if self._distillation is not None:
            loss = self._distillation.mixed(loss, images, logits, maps if self.attentive else [])
        return loss, logits

    def _begin(self, images: Tensor) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """The forward pass that is trained. Not before the first images, which show where the stages end."""
        stages: Sequence[str] = ()
        if self._teacher is not None and self._lesson is not None and (self._lesson.weight or self._lesson.attention):
            self._distillation = Distillation(self._teacher, self.model, self._lesson, self.dtype, images)
            stages = self._distillation.stages
        self._watched = Watched(self.model, stages)
        network = distributed.parallel(self._watched, self.device)
        return torch.compile(network) if self._compile else network

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.model)


class MovingAverage(AveragedModel):
    """``w <- d w + (1 - d) w'`` of all weights and batch norm statistics, from the first ones on.

    Without what a GPU waits for at every step: torch's own way looks at a counter and copies it to where the weights
    are. Nor does it have four kernels for each batch norm's counter.

    Args:
        model: whose average it is.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averaged, current = _values(self.module), _values(model)
        smooth = [bool(self.n_averaged) and value.is_floating_point() for value in averaged]
        if any(smooth):
            torch._foreach_lerp_(list(compress(averaged, smooth)), list(compress(current, smooth)), 1 - self.decay)
        if not all(smooth):
            rest = [not each for each in smooth]
            torch._foreach_copy_(list(compress(averaged, rest)), list(compress(current, rest)))
        self.n_averaged += 1


def _values(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def make_optimizer(model: nn.Module, section: TrainingSection) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; weight decay on weights of two and more dimensions only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=section.lr)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, nesterov=section.momentum > 0)


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: TrainingBatches, count: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Take the batch norms' running statistics anew, as plain means over `count` batches."""
    with autocast(device, dtype):
        torch.optim.swa_utils.update_bn(_first(batches, count), model)


def _first(batches: TrainingBatches, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(0)
    for batch, _ in zip(batches, range(count), strict=False):
        yield batch
