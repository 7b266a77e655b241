"""Step 6: measure the dense and the pruned network on the test split."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scop.compute.device import describe_device
from scop.config import EvaluateSection, VariantSection
from scop.config.parsing import Section
from scop.data.dataset import load_dataset
from scop.models.artifacts import WEIGHTS, load_model, load_settings, load_surgery
from scop.models.evaluation import Accuracy, count_macs, count_parameters, measure_accuracy, measure_latency
from scop.models.history import load_history, trained_on
from scop.pruning.plan import ChannelPlan
from scop.pruning.spec import spec_of
from scop.report.correctness import packed
from scop.report.formatting import human
from scop.report.plots import confusion_matrix
from scop.report.results import Result, with_timings
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.steps.common import evaluation_batches
from scop.storage.manifest import TIMINGS, write_manifest
from scop.tracking.tags import DATASET_TAG, LONGEST_TAG, MEASURED_TAG, RIGHT_TAG

logger = logging.getLogger(__name__)


class Config(Section):
    evaluate: EvaluateSection
    variant: VariantSection


@dataclass(frozen=True)
class Inputs:
    dataset: Path
    dense: Path
    pruned: Path


@dataclass(frozen=True)
class Outputs:
    evaluation: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    section, variant = config.evaluate, config.variant
    surgery, dataset, device = load_surgery(inputs.pruned), load_dataset(inputs.dataset), context.device
    folders = {"dense": inputs.dense, "pruned": inputs.pruned}
    models = {name: load_model(folder) for name, folder in folders.items()}
    batches = evaluation_batches(dataset, "test", device)
    accuracies = {name: measure_accuracy(model.to(device), batches, device) for name, model in models.items()}
    figures = {
        name: _figures(models[name], accuracies[name], folders[name] / WEIGHTS, dataset.info.shape) for name in models
    }
    latencies: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for batch_size in section.batch_sizes:
        measured = measure_latency(
            models,
            dataset.info.shape,
            batch_size,
            device,
            section.repeats,
            section.threads if device.type == "cpu" else None,
        )
        for name, latency in measured.items():
            latencies[name][str(batch_size)] = {k: round(v, 4) for k, v in asdict(latency).items()}

    plan = _plan(models["pruned"])
    evaluation: dict[str, Any] = {
        "variant": variant.label,
        "method": variant.method,
        "prune_rate": plan.prune_rate,
        "residual": variant.residual,
        **figures,
        "device": describe_device(device, section.threads),
        "threads": section.threads or torch.get_num_threads(),
        "dataset": {
            "source": dataset.info.source,
            "content": dataset.info.content,
            "test": dataset.info.counts["test"],
        },
        "classes": dataset.info.classes,
        "confusion": accuracies["pruned"].confusion.tolist(),
        "kept": {layer: len(kept) for layer, kept in plan.kept.items()},
        "channels": plan.channels,
        "unsure": {layer: dict(zip(("kept", "removed"), plan.doubtful(layer), strict=True)) for layer in plan.unsure},
        "settings": load_settings(inputs.pruned),
        "surgery": surgery,
        "history": _curve(inputs.pruned),
        "dense_history": _curve(inputs.dense),
    }
    seconds = {name: round(sum(r.seconds for r in load_history(folder)), 3) for name, folder in folders.items()}
    timings = {
        "latency_ms": latencies,
        "train_seconds": seconds,
        "trained_on": trained_on(inputs.pruned),
        "device": evaluation["device"],
        "threads": evaluation["threads"],
        "run": context.tracker.run_id,
    }
    (outputs.evaluation / TIMINGS).write_text(json.dumps(timings, indent=1) + "\n")
    (outputs.evaluation / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    confusion_matrix(evaluation["confusion"], dataset.info.classes, outputs.evaluation / "confusion.png")
    write_manifest(outputs.evaluation, kind="evaluation")
    for name in ("evaluation.json", "confusion.png"):
        context.tracker.log_file(outputs.evaluation / name)
    result = Result.of(with_timings(evaluation, timings))
    context.tracker.log_params(result.params)
    context.tracker.set_tags({MEASURED_TAG: result.device})
    if result.right is not None and len(result.right) <= LONGEST_TAG:
        context.tracker.set_tags({RIGHT_TAG: result.right})
    context.tracker.set_tags({DATASET_TAG: result.dataset}, of_the_run=True)
    kept = [{"layer": layer, "channels": plan.channels[layer], "kept": len(k)} for layer, k in plan.kept.items()]
    context.tracker.log_table({key: [row[key] for row in kept] for key in kept[0]} if kept else {}, "layers.json")
    metrics = result.metrics
    logger.info(
        "%s: top-1 %s -> %s, MACs %s -> %s",
        variant.label,
        f"{metrics['dense_top1']:.2%}",
        f"{metrics['pruned_top1']:.2%}",
        human(metrics["dense_macs"]),
        human(metrics["pruned_macs"]),
    )
    return StepResult(dict(metrics), dataset.info.classes, evaluation["confusion"])


def _figures(model: nn.Module, accuracy: Accuracy, weights: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "loss": accuracy.loss,
        "right": packed(accuracy.right.numpy()),
        "params": count_parameters(model),
        "macs": count_macs(model, shape),
        "bytes": weights.stat().st_size,
    }


def _curve(folder: Path) -> list[dict[str, Any]]:
    """Return a model's learning curve without the duration of its epochs."""
    return [{key: value for key, value in asdict(r).items() if key != "seconds"} for r in load_history(folder)]


def _plan(model: nn.Module) -> ChannelPlan:
    spec = spec_of(model)
    assert spec is not None and spec.plan is not None
    return spec.plan
