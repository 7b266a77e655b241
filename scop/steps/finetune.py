"""Step 5: remove the channels, verify that the removal is exact, and fine-tune the pruned network.

A variant with several rounds does this in each round. Between rounds the network is expanded to the dense network's
shape, with zeros for removed channels, then scored again and pruned further.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from scop.compute import distributed
from scop.compute.device import autocast_dtype
from scop.config import FinetuneSection, KnockoffSection, VariantSection, finetune_for
from scop.config.parsing import Section, parse
from scop.data.dataset import Dataset, load_dataset
from scop.knockoffs.phase import train_knockoffs
from scop.models.artifacts import SETTINGS, SURGERY, load_model, load_settings, save_model, save_settings
from scop.models.evaluation import count_macs, count_parameters
from scop.models.export import logit_difference
from scop.models.factories import make_model
from scop.models.history import EpochRecord
from scop.pruning.cuts import expand
from scop.pruning.plan import ChannelPlan
from scop.pruning.spec import attach_spec, spec_of
from scop.pruning.surgery import prune_exactly
from scop.report.formatting import human
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.selection.rounds import Round
from scop.selection.scores import Scores
from scop.selection.select import select_channels
from scop.steps.common import train_supervised, training_batches, validation_accuracy
from scop.system.signals import deferred_stop
from scop.training.checkpointing import Checkpointing
from scop.training.supervised import recalibrate

logger = logging.getLogger(__name__)


class Config(Section):
    finetune: FinetuneSection
    variant: VariantSection


@dataclass(frozen=True)
class Inputs:
    dataset: Path
    dense: Path
    plan: Path


@dataclass(frozen=True)
class Outputs:
    model: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    section, variant = finetune_for(config.finetune, config.variant), config.variant
    dataset, dense = load_dataset(inputs.dataset), load_model(inputs.dense)
    teacher = _teacher(dense, section, context)
    plan = ChannelPlan.load(inputs.plan / "plan.json")
    pruned, difference = prune_exactly(
        dense if variant.method != "scratch" else _random_copy(dense, section.seed), plan
    )
    history: list[EpochRecord] = []
    torch.manual_seed(section.seed)
    for number in range(1, variant.rounds + 1):
        label, training, work = variant.label, section, context
        if variant.rounds > 1:
            label, work = f"{label}, round {number}", context.part(f"round{number}", len(history))
        if number < variant.rounds:
            training = _shortened(section)
        if number > 1:
            whole = expand(pruned, dense)
            scores = _scores(whole, dataset, inputs.plan, work) if variant.method == "scop" else None
            plan = _select(whole, scores, variant, Round(number, variant.rounds, plan), work)
            pruned, difference = prune_exactly(whole, plan)
        metrics = _recalibrate(pruned, dataset, training, work)
        epochs = train_supervised(pruned, dataset, training, work, label, teacher)
        history += [replace(record, epoch=work.epochs + record.epoch) for record in epochs]

    figures = {"masked_pruned": difference, "pruned_reloaded": _reload_difference(pruned), **metrics}
    (outputs.model / SURGERY).write_text(json.dumps(figures, indent=1) + "\n")
    settings = {"finetune": section.model_dump(mode="json"), "variant": variant.model_dump(mode="json")}
    save_settings(outputs.model, inputs.dense, inputs.plan, **settings)
    save_model(pruned, outputs.model, history=history, device=context.device, others=[SURGERY, SETTINGS])
    if (after := validation_accuracy(pruned, dataset, context)) is not None:
        metrics |= {"validation_top1": after.top1, "validation_loss": after.loss}
    metrics |= {
        "params": float(count_parameters(pruned)),
        "macs": float(count_macs(pruned, dataset.info.shape)),
        "train_seconds": sum(record.seconds for record in history),
    }
    logger.info("%s: %s", variant.label, _describe(metrics))
    return StepResult(metrics)


def _random_copy(dense: nn.Module, seed: int) -> nn.Module:
    """Return the dense network with random weights."""
    spec = spec_of(dense)
    assert spec is not None and spec.factory is not None
    torch.manual_seed(seed)
    return attach_spec(make_model(spec.factory, **spec.arguments), spec)


def _recalibrate(pruned: nn.Module, dataset: Dataset, section: FinetuneSection, context: Context) -> dict[str, float]:
    """Recompute the batch norms' statistics; return accuracies on the validation split before and after."""
    metrics: dict[str, float] = {}
    if (before := validation_accuracy(pruned, dataset, context)) is not None:
        metrics["validation_top1_pruned"] = before.top1
    if section.recalibration_batches:
        device = context.device
        dtype = autocast_dtype(device, section.precision)
        pruned.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        recalibrate(pruned, training_batches(dataset, section, device), section.recalibration_batches, device, dtype)
        if (recalibrated := validation_accuracy(pruned, dataset, context)) is not None:
            metrics["validation_top1_recalibrated"] = recalibrated.top1
    return metrics


def _shortened(section: FinetuneSection) -> FinetuneSection:
    """Return the settings of every round except the last; the learning rate follows the same curve in fewer epochs."""
    epochs = section.round_epochs
    warmup = section.warmup_epochs * epochs / max(1, section.epochs)
    return section.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})


def _scores(whole: nn.Module, dataset: Dataset, plan: Path, context: Context) -> Scores:
    """Score the remaining channels with the settings of the first scores."""
    section = parse(KnockoffSection, load_settings(plan).get("knockoff", {}), "knockoff")
    context = context.part("knockoff", 0)
    batches = training_batches(dataset, section, context.device, distributed.shard())
    with deferred_stop() as stop_requested:
        checkpointing = Checkpointing(context.checkpoints, stop_requested)
        return train_knockoffs(whole, batches, section, device=context.device, checkpointing=checkpointing)


def _select(
    whole: nn.Module, scores: Scores | None, variant: VariantSection, round: Round, context: Context
) -> ChannelPlan:
    """Return the plan of a later round, the same in all processes, even if their latency measurements differ."""
    assert round.previous is not None
    plan = select_channels(
        whole,
        scores,
        input_shape=round.previous.input_shape,
        variant=variant,
        device=context.device,
        round=round,
    )
    return ChannelPlan.model_validate_json(distributed.broadcast_text(plan.model_dump_json()))


def _describe(metrics: dict[str, float]) -> str:
    """Describe the sizes, and the accuracy on the validation split before, during and after fine-tuning."""
    text = f"{human(metrics['params'])} parameters, {human(metrics['macs'])} MACs"
    names = {"_pruned": "cut", "_recalibrated": "recalibrated", "": "fine-tuned"}
    accuracies = [
        f"{word} {metrics[f'validation_top1{key}']:.2%}"
        for key, word in names.items()
        if f"validation_top1{key}" in metrics
    ]
    return f"{text}; validation top-1: {', '.join(accuracies)}" if accuracies else text


@torch.inference_mode()
def _reload_difference(model: nn.Module) -> float:
    """Return the `logit_difference` of the network before and after it is saved and loaded, on random images."""
    spec = spec_of(model)
    assert spec is not None and spec.input_shape is not None
    images = torch.randn(4, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        again = load_model(folder)
    return float(logit_difference(model.eval()(images), again(images)))


def _teacher(dense: nn.Module, section: FinetuneSection, context: Context) -> nn.Module | None:
    if not (section.distillation.weight or section.distillation.attention):
        return None
    teacher = copy.deepcopy(dense).to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher.eval().requires_grad_(False)
