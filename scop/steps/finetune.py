"""Step 5: take the channels out, prove that this was exact, and train the small network."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from scop.artifacts import SETTINGS, SURGERY, load_model, save_model, save_settings
from scop.config import FinetuneSection, VariantSection, finetune_for
from scop.data import load_dataset
from scop.device import autocast_dtype
from scop.evaluation import count_macs, count_parameters
from scop.export import logit_difference
from scop.parsing import Section
from scop.plan import ChannelPlan
from scop.spec import spec_of
from scop.steps.common import train_supervised, training_batches, validation_accuracy
from scop.steps.record import StepResult
from scop.steps.runtime import Context
from scop.supervised import recalibrate
from scop.surgery import prune_exactly
from scop.text import human


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
    section, label = finetune_for(config.finetune, config.variant), config.variant.label
    dataset, dense = load_dataset(inputs.dataset), load_model(inputs.dense)
    pruned, difference = prune_exactly(dense, ChannelPlan.load(inputs.plan / "plan.json"))

    torch.manual_seed(section.seed)
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

    teacher = _teacher(dense, section, context)
    history = train_supervised(pruned, dataset, section, context, label, teacher)
    figures = {"masked_pruned": difference, "pruned_reloaded": _reload_difference(pruned), **metrics}
    (outputs.model / SURGERY).write_text(json.dumps(figures, indent=1) + "\n")
    made_by = {"finetune": section.model_dump(mode="json"), "variant": config.variant.model_dump(mode="json")}
    save_settings(outputs.model, inputs.dense, inputs.plan, **made_by)
    save_model(pruned, outputs.model, history=history, others=[SURGERY, SETTINGS])
    if (after := validation_accuracy(pruned, dataset, context)) is not None:
        metrics |= {"validation_top1": after.top1, "validation_loss": after.loss}
    metrics |= {
        "params": float(count_parameters(pruned)),
        "macs": float(count_macs(pruned, dataset.info.shape)),
        "train_seconds": sum(record.seconds for record in history),
    }
    print(f"{label}: {_describe(metrics)}", flush=True)
    return StepResult(metrics)


def _describe(metrics: dict[str, float]) -> str:
    """The figures in words: sizes, and how accuracy on the validation split came back, where there is one."""
    text = f"{human(metrics['params'])} parameters, {human(metrics['macs'])} MACs"
    names = {"_pruned": "cut", "_recalibrated": "recalibrated", "": "fine-tuned"}
    course = [
        f"{word} {metrics[f'validation_top1{key}']:.2%}"
        for key, word in names.items()
        if f"validation_top1{key}" in metrics
    ]
    return f"{text}; validation top-1: {', '.join(course)}" if course else text


@torch.inference_mode()
def _reload_difference(model: nn.Module) -> float:
    """By how much the network's logits on random images change when it is saved and loaded; see `logit_difference`."""
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
    teacher = dense.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher.eval().requires_grad_(False)
