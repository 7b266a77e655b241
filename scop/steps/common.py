"""What the training steps share."""

from __future__ import annotations

import torch
from torch import nn

from scop.compute import distributed
from scop.compute.device import autocast_dtype
from scop.compute.distributed import WHOLE, Share
from scop.config import FinetuneSection, KnockoffSection, TrainingSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, SplitName
from scop.models.evaluation import Accuracy, measure_accuracy
from scop.models.history import EpochRecord
from scop.runtime.step import Context
from scop.system.signals import termination
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer

_EVALUATION_BATCH = 500


def evaluation_batches(dataset: Dataset, split: SplitName, device: torch.device, share: Share = WHOLE) -> Batches:
    """All images of a split, or a share of them, in their order, as they are."""
    return Batches(dataset[split], dataset.info, _EVALUATION_BATCH, device, share=share)


def training_batches(
    dataset: Dataset, section: TrainingSection | KnockoffSection, device: torch.device, share: Share = WHOLE
) -> Batches:
    """The training split, or a share of each of its batches, shuffled and augmented as the section says."""
    augmentation = Augmentation(crop_padding=section.crop_padding, flip=section.flip)
    batch_size, images = section.batch_size, len(dataset["train"])
    if isinstance(section, KnockoffSection) and batch_size > images:  # for scores it does not matter
        batch_size = max(1, images // share[1]) * share[1]
    return Batches(dataset["train"], dataset.info, batch_size, device, augmentation, section.seed, share)


def train_supervised(
    model: nn.Module,
    dataset: Dataset,
    section: TrainingSection,
    context: Context,
    label: str,
    teacher: nn.Module | None = None,
) -> list[EpochRecord]:
    """Train a network on its labels, in place, with checkpoints; it ends on the CPU.

    Where several processes train, all end with the same network.
    """
    device = context.device
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    share = distributed.share()
    batches = training_batches(dataset, section, device, share)
    validation = evaluation_batches(dataset, "validation", device, share)
    distillation = section.distillation if isinstance(section, FinetuneSection) else None
    objective = Supervised(model, device, section, teacher, distillation)

    def validate() -> tuple[float, float]:
        distributed.spread_buffers(objective.result)
        count = len(validation.labels)
        accuracy = measure_accuracy(objective.result, validation, device, objective.dtype)
        loss, top1, images = distributed.mean(accuracy.loss * count, accuracy.top1 * count, count)
        return loss / images, top1 / images

    with termination() as stopping:
        history = fit(
            objective,
            batches,
            make_optimizer(model, section),
            epochs=section.epochs,
            label=label,
            seed=section.seed,
            schedule=section.schedule,
            warmup_epochs=section.warmup_epochs,
            keep=section.keep,
            validate=validate if len(dataset["validation"]) >= share[1] else None,
            on_epoch=context.on_epoch,
            checkpoints=context.checkpoints,
            stopping=stopping,
        )
    objective.finish()
    distributed.spread_buffers(model)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return history


def validation_accuracy(model: nn.Module, dataset: Dataset, context: Context) -> Accuracy | None:
    """Accuracy on the validation split, or None where there is none; the test split is left alone."""
    if not len(dataset["validation"]):
        return None
    device = context.device
    model.to(device)
    accuracy = measure_accuracy(
        model, evaluation_batches(dataset, "validation", device), device, autocast_dtype(device, "auto")
    )
    model.to("cpu")
    return accuracy
