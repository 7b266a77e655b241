"""Functions that several steps share: batches of a dataset, supervised training, validation accuracy."""

from __future__ import annotations

import torch
from torch import nn

from scop.compute import distributed
from scop.compute.device import autocast_dtype
from scop.compute.distributed import WHOLE, Shard
from scop.config import FinetuneSection, KnockoffSection, TrainingSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, SplitName
from scop.models.evaluation import Accuracy, measure_accuracy
from scop.models.history import EpochRecord
from scop.runtime.step import Context
from scop.system.signals import deferred_stop
from scop.training.checkpointing import Checkpointing
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer

_EVALUATION_BATCH = 500


def evaluation_batches(dataset: Dataset, split: SplitName, device: torch.device, shard: Shard = WHOLE) -> Batches:
    """Return all images of a split, or a shard of them, in order and without augmentation."""
    return Batches(dataset[split], dataset.info, _EVALUATION_BATCH, device, shard=shard)


def training_batches(
    dataset: Dataset, section: TrainingSection | KnockoffSection, device: torch.device, shard: Shard = WHOLE
) -> Batches:
    """Return the training split, shuffled and augmented as configured, or a shard of each batch."""
    augmentation = Augmentation(crop_padding=section.crop_padding, flip=section.flip)
    batch_size, images = section.batch_size, len(dataset["train"])
    if isinstance(section, KnockoffSection) and batch_size > images:  # the scores do not depend on it
        batch_size = max(1, images // shard[1]) * shard[1]
    return Batches(dataset["train"], dataset.info, batch_size, device, augmentation, section.seed, shard)


def train_supervised(
    model: nn.Module,
    dataset: Dataset,
    section: TrainingSection,
    context: Context,
    label: str,
    teacher: nn.Module | None = None,
) -> list[EpochRecord]:
    """Train a network on its labels, in place, with checkpoints.

    Afterwards the network is on the CPU and, if several processes train, the same in all of them.

    Args:
        model: the network.
        dataset: dataset with a training split and perhaps a validation split.
        section: the settings.
        context: context of the step.
        label: name of the training in the log.
        teacher: network for distillation, on the device and in eval mode.

    Returns:
        The records of all epochs.
    """
    device = context.device
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shard = distributed.shard()
    batches = training_batches(dataset, section, device, shard)
    validation = evaluation_batches(dataset, "validation", device, shard)
    distillation = section.distillation if isinstance(section, FinetuneSection) else None
    objective = Supervised(model, device, section, teacher, distillation)

    def validate() -> tuple[float, float]:
        distributed.broadcast_buffers(objective.result)
        count = len(validation.labels)
        accuracy = measure_accuracy(objective.result, validation, device, objective.dtype)
        loss, top1, images = distributed.all_reduce_mean(accuracy.loss * count, accuracy.top1 * count, count)
        return loss / images, top1 / images

    with deferred_stop() as stop_requested:
        history = fit(
            objective,
            batches,
            make_optimizer(model, section),
            Schedule.of(section),
            label=label,
            seed=section.seed,
            validate=validate if len(dataset["validation"]) >= shard[1] else None,
            on_epoch=context.on_epoch,
            checkpointing=Checkpointing(context.checkpoints, stop_requested),
        )
    objective.finish()
    distributed.broadcast_buffers(model)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return history


def validation_accuracy(model: nn.Module, dataset: Dataset, context: Context) -> Accuracy | None:
    """Return the accuracy on the validation split, or None if there is none; the test split is not used."""
    if not len(dataset["validation"]):
        return None
    device = context.device
    model.to(device)
    accuracy = measure_accuracy(
        model, evaluation_batches(dataset, "validation", device), device, autocast_dtype(device, "auto")
    )
    model.to("cpu")
    return accuracy
