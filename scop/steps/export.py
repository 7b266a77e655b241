"""Step 7: write the deliverables, load each again, and compare it with the network it came from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from scop.config import ExportSection, VariantSection
from scop.config.parsing import Section
from scop.data.dataset import load_dataset
from scop.errors import UserError
from scop.models.artifacts import DESCRIPTION, WEIGHTS, load_model, load_surgery
from scop.models.export import export_onnx, export_pt2
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.steps.common import evaluation_batches
from scop.storage.manifest import TIMINGS, write_manifest

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
    # The same weights and description as the pruned model's, so that the folder is all that a user needs.
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(inputs.pruned / name, folder / name)
    surgery = load_surgery(inputs.pruned)
    differences = {
        "masked_pruned": surgery["masked_pruned"],
        "pruned_reloaded": surgery["pruned_reloaded"],
        "pruned_onnx": export_onnx(model, images, onnx),
        "pruned_pt2": export_pt2(model, images, folder / "model.pt2"),
    }
    for what, difference in differences.items():
        if not difference <= config.export.tolerance:
            raise UserError(
                f"{label}: {what.replace('_', ' and ')} differ by {difference:.3g} in their logits, more than "
                f"export.tolerance {config.export.tolerance:g}; if that is good enough, raise it: "
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
            print(f"{label}: registered as {registered}", flush=True)
    report = {"variant": label, "exactness": differences, "onnx_bytes": onnx.stat().st_size}
    (folder / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    write_manifest(folder, kind="model")
    largest = max(differences.values())
    print(f"{label}: masked = pruned = reloaded = ONNX = .pt2 within {largest:.1g}", flush=True)
    return StepResult({f"difference_{key}": value for key, value in differences.items()})
