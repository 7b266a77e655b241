"""Step 3: the knockoff phase; scores for every channel that can be pruned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scop import distributed
from scop.artifacts import load_model, save_history, save_settings
from scop.checkpoints import termination
from scop.config import KnockoffSection
from scop.data import load_dataset
from scop.knockoff import train_knockoffs
from scop.manifest import write_manifest
from scop.parsing import Section
from scop.plots import score_histograms
from scop.steps.common import training_batches
from scop.steps.record import StepResult
from scop.steps.runtime import Context


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
    with termination() as stopping:
        scores = train_knockoffs(
            model,
            training_batches(dataset, section, device, distributed.share()),
            section,
            device=device,
            on_epoch=context.on_epoch,
            checkpoints=context.checkpoints,
            stopping=stopping,
        )
    scores.save(outputs.scores / "scores.safetensors")
    save_history(scores.history, outputs.scores)
    save_settings(outputs.scores, knockoff=section.model_dump(mode="json"))
    layers = {layer: {"gate": _rounded(scores.gates[layer]), "score": _rounded(scores[layer])} for layer in scores}
    (outputs.scores / "scores.json").write_text(json.dumps(layers, indent=1) + "\n")
    score_histograms({layer: scores[layer].tolist() for layer in scores}, outputs.scores / "scores.png")
    write_manifest(outputs.scores, kind="scores")
    for name in ("scores.json", "scores.png"):
        context.tracker.log_file(outputs.scores / name)
    return StepResult(
        {
            "gated_layers": float(len(scores)),
            "mean_gate": float(sum(g.sum() for g in scores.gates.values()) / sum(map(len, scores.gates.values()))),
        }
    )


def _rounded(values) -> list[float]:  # type: ignore[no-untyped-def]
    return [round(value, 6) for value in values.tolist()]
