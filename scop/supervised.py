"""Training on labels, of the dense network and of the pruned one, perhaps with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop import distributed
from scop.config import DistillationSection, TrainingSection
from scop.device import autocast, autocast_dtype, to_device
from scop.errors import UserError
from scop.narrow import NarrowBatchNorms
from scop.sync_batch_norm import SynchronisedBatchNorms
from scop.training import TrainingBatches


class Supervised:
    """Cross-entropy of a network on its labels, with distillation from a teacher as an option.

    The distillation loss is ``T^2 KL(teacher / T || student / T)`` (Hinton et al., 2015).
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
        self.teacher, self.distillation = teacher, distillation or DistillationSection()
        synchronised = distributed.several() and section.sync_batch_norm
        if synchronised and section.compile:
            raise UserError("compile cannot synchronise batch norms; set sync_batch_norm: false, or compile: false")
        self._batch_norms: AbstractContextManager[Any] = nullcontext()
        if synchronised:
            self._batch_norms = SynchronisedBatchNorms()
        elif device.type == "cpu" and not section.compile:  # a compiler makes kernels of its own for every width
            self._batch_norms = NarrowBatchNorms()
        network = distributed.parallel(model, device)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(network) if section.compile else network

    @property
    def state(self) -> nn.Module:
        return self.model

    def start_epoch(self) -> None:
        self.model.train()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = to_device(images, labels, self.device)
        with autocast(self.device, self.dtype), self._batch_norms:
            logits = self._forward(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        if self.teacher is not None and self.distillation.weight:
            share, temperature = self.distillation.weight, self.distillation.temperature
            with torch.no_grad(), autocast(self.device, self.dtype):
                target = self.teacher(images)
            divergence = F.kl_div(
                F.log_softmax(logits / temperature, dim=1),
                F.log_softmax(target.float() / temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            loss = (1 - share) * loss + share * temperature**2 * divergence
        return loss, logits

    def after_step(self) -> None:
        pass


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
