"""Training on labels, for the dense and the pruned network, optionally with a teacher."""

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
    """The objective: cross-entropy on labels, optionally with distillation and a moving average of the weights.

    Args:
        model: the network, on the device.
        device: device to compute on.
        section: the settings.
        teacher: a network on the device, in eval mode and without gradients.
        distillation: settings of the distillation from the teacher.

    Attributes:
        average: the exponential moving average of all weights and batch norm statistics, or None.
        attentive: whether attention maps are distilled in this epoch.

    Raises:
        UserError: batch norms must be synchronised but the network is compiled.
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
        self._attentive_epochs = math.ceil(share * section.epochs - 1e-9)  # 0.55 * 20 = 11.000000000000002 must give 11
        self.attentive = True
        self._distillation: Distillation | None = None
        self._watched: Watched | None = None
        self._forward: Callable[[Tensor], tuple[Tensor, list[Tensor]]] | None = None
        self.average: MovingAverage | None = None
        if section.ema:
            self.average = MovingAverage(model, section.ema)
        synchronised = distributed.is_distributed() and section.sync_batch_norm
        if synchronised and section.compile:
            raise UserError("compile does not support sync_batch_norm; set sync_batch_norm: false or compile: false")
        self._batch_norms: AbstractContextManager[Any] = nullcontext()
        if synchronised:
            self._batch_norms = SynchronisedBatchNorms()
        elif device.type == "cpu" and not section.compile:  # torch.compile generates kernels for each width
            self._batch_norms = NarrowBatchNorms()
        self._undo: Callable[[], None] = pick_pixels_first(model) if device.type == "cpu" else lambda: None

    @property
    def state(self) -> nn.Module:
        return self.model if self.average is None else nn.ModuleDict({"model": self.model, "average": self.average})

    @property
    def result(self) -> nn.Module:
        """The network that training produces: the average if there is one, otherwise the model."""
        return self.model if self.average is None else self.average.module

    def finish(self) -> None:
        """Restore the model, remove hooks, and load the average's weights into the model if there is an average."""
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
        """Return the forward pass to train; the first images are needed to find the ends of the stages."""
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
    """``w <- d w + (1 - d) w'`` for all weights and batch norm statistics; the first update copies them.

    PyTorch's own update makes a GPU wait at every step, since it reads a counter and copies it to the weights' device,
    and it runs four kernels for each batch norm's counter. This one does neither.

    Args:
        model: the network to average.
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
    """Return SGD with Nesterov momentum, or AdamW; weight decay applies only to weights with two or more dimensions."""
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
    """Recompute the batch norms' running statistics, as plain means over the first `count` batches."""
    with autocast(device, dtype):
        torch.optim.swa_utils.update_bn(_first(batches, count), model)


def _first(batches: TrainingBatches, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(0)
    for batch, _ in zip(batches, range(count), strict=False):
        yield batch
