"""Step 3: the knockoff phase, which scores every channel that can be pruned."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scop.compute import distributed
from scop.config import KnockoffSection, SensitivitySection
from scop.config.parsing import Section
from scop.data.batches import Batches
from scop.data.dataset import Dataset, Split, SplitName, load_dataset
from scop.knockoffs.phase import train_knockoffs
from scop.knockoffs.quality import measure_quality
from scop.knockoffs.sources import make_source
from scop.models.artifacts import load_model, save_settings
from scop.models.history import save_history
from scop.report.plots import knockoff_images, score_histograms, sensitivity_curves
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.selection.scores import Scores
from scop.selection.sensitivity import measure_sensitivity
from scop.steps.common import training_batches
from scop.storage.manifest import write_manifest
from scop.system.signals import deferred_stop
from scop.training.checkpointing import Checkpointing


class Config(Section):
    knockoff: KnockoffSection


@dataclass(frozen=True)
class Inputs:
    dataset: Path
    dense: Path


@dataclass(frozen=True)
class Outputs:
    scores: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    section, dataset, model = config.knockoff, load_dataset(inputs.dataset), load_model(inputs.dense)
    device = context.device
    batches = training_batches(dataset, section, device, distributed.shard())
    torch.manual_seed(section.seed)  # sources use the global generator
    with deferred_stop() as stop_requested:
        checkpointing = Checkpointing(context.checkpoints, stop_requested)
        source = make_source(section, batches, device, checkpointing)
        quality = measure_quality(source, model.to(device).eval(), batches, device, section.seed)
        images, labels = next(iter(batches))
        knockoff_images(images, source(images, labels), dataset.info, outputs.scores / "knockoffs.png")
        scores = train_knockoffs(
            model.cpu(),
            batches,
            section,
            source=source,
            device=device,
            on_epoch=context.on_epoch,
            checkpointing=checkpointing,
        )
    scores.save(outputs.scores / "scores.safetensors")
    save_history(scores.history, outputs.scores)
    save_settings(outputs.scores, knockoff=section.model_dump(mode="json"))
    parts = {"score": scores.score, "standard_error": scores.error, "statistic": scores.signed, "gate": scores.gate}
    layers = {layer: {name: _rounded(part[layer]) for name, part in parts.items()} for layer in scores}
    (outputs.scores / "scores.json").write_text(json.dumps(layers, indent=1) + "\n")
    (outputs.scores / "knockoffs.json").write_text(json.dumps(quality.as_dict(), indent=1) + "\n")
    score_histograms({layer: scores[layer].tolist() for layer in scores}, outputs.scores / "scores.png")
    files = ["scores.json", "scores.png", "knockoffs.json", "knockoffs.png"]
    if section.sensitivity.rates:
        files += _sensitivity(section.sensitivity, model, dataset, scores, outputs.scores, device)
    write_manifest(outputs.scores, kind="scores")
    for name in files:
        context.tracker.log_file(outputs.scores / name)
    return StepResult({"gated_layers": float(len(scores)), **quality.metrics()})


def _sensitivity(
    section: SensitivitySection,
    model: nn.Module,
    dataset: Dataset,
    scores: Scores,
    folder: Path,
    device: torch.device,
) -> list[str]:
    """Measure the sensitivity on a sample of images, write it as a table and a plot, and return their names."""
    split: SplitName = "validation" if len(dataset["validation"]) else "train"
    shuffled = torch.randperm(len(dataset[split]), generator=torch.Generator().manual_seed(0)).numpy()
    chosen = np.sort(shuffled[: section.images])  # images are sorted by class
    images = Split(dataset[split].images[chosen], dataset[split].labels[chosen])
    batches = list(Batches(images, dataset.info, 500, device))
    top1 = measure_sensitivity(model, scores, section.rates, batches, device, scores.input_shape)
    table = {"split": split, "images": len(chosen), "rates": section.rates, "top1": top1}
    (folder / "sensitivity.json").write_text(json.dumps(table, indent=1) + "\n")
    sensitivity_curves(top1, section.rates, folder / "sensitivity.png")
    return ["sensitivity.json", "sensitivity.png"]


def _rounded(values: Tensor) -> list[float | None]:
    """Round to six significant digits; None for values that are not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
