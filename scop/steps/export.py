"""Step 7: export the network, load each file again, and compare it with the network."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from scop.config import ExportSection, VariantSection
from scop.config.parsing import Section
from scop.data.dataset import load_dataset
from scop.errors import UserError
from scop.models.artifacts import DESCRIPTION, WEIGHTS, load_model, load_surgery
from scop.models.export import export_onnx, export_pt2, trace
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.steps.common import evaluation_batches
from scop.storage.manifest import TIMINGS, write_manifest

logger = logging.getLogger(__name__)

_IMAGES = 16


class Config(Section):
    export: ExportSection
    variant: VariantSection


@dataclass(frozen=True)
class Inputs:
    dataset: Path
    pruned: Path
    evaluation: Path


@dataclass(frozen=True)
class Outputs:
    exported: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    label, folder = config.variant.label, outputs.exported
    model = load_model(inputs.pruned)
    images, _ = next(iter(evaluation_batches(load_dataset(inputs.dataset), "test", torch.device("cpu"))))
    images = images[:_IMAGES].contiguous()
    onnx = folder / "model.onnx"
    # With the pruned model's weights and description, the folder is complete for its users.
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(inputs.pruned / name, folder / name)
    surgery, program = load_surgery(inputs.pruned), trace(model, images)
    differences = {
        "masked_pruned": surgery["masked_pruned"],
        "pruned_reloaded": surgery["pruned_reloaded"],
        "pruned_onnx": export_onnx(model, images, onnx, program),
        "pruned_pt2": export_pt2(model, images, folder / "model.pt2", program),
    }
    for what, difference in differences.items():
        if not difference <= config.export.tolerance:
            raise UserError(
                f"{label}: the logits of {what.replace('_', ' and ')} differ by {difference:.3g}, more than "
                f"export.tolerance {config.export.tolerance:g}; if that is acceptable, raise the tolerance: "
                "--set export.tolerance=..."
            )
    evaluation = json.loads((inputs.evaluation / "evaluation.json").read_text())
    if config.export.register_model:
        drop = evaluation["dense"]["top1"] - evaluation["pruned"]["top1"]
        tags = {
            "prune_rate": str(evaluation["prune_rate"]),
            "method": config.variant.method,
            "top1_drop": f"{drop:.6f}",
            "max_top1_drop": str(config.export.max_top1_drop),
            "difference": f"{max(differences.values()):.3g}",
            "tolerance": str(config.export.tolerance),
        }
        measured_by = json.loads((inputs.evaluation / TIMINGS).read_text()).get("run")
        if registered := context.tracker.register_onnx(onnx, label, tags, images[:2].numpy(), measured_by):
            logger.info("%s: registered as %s", label, registered)
    report = {"variant": label, "exactness": differences, "onnx_bytes": onnx.stat().st_size}
    (folder / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    write_manifest(folder, kind="model")
    largest = f"{max(differences.values()):.1g}"
    logger.info("%s: masked = pruned = reloaded = ONNX = .pt2 within %s", label, largest)
    return StepResult({f"difference_{key}": value for key, value in differences.items()})
