"""Step 4: select the channels to keep, for the first round if there are several."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from scop.config import VariantSection
from scop.config.parsing import Section
from scop.models.artifacts import load_model, save_settings
from scop.pruning.graph import ChannelGraph
from scop.pruning.spec import spec_of
from scop.report.plots import kept_channels
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.selection.latency import describe_latency
from scop.selection.rounds import Round
from scop.selection.scores import Scores
from scop.selection.select import select_channels
from scop.storage.manifest import write_manifest

logger = logging.getLogger(__name__)


class Config(Section):
    variant: VariantSection


@dataclass(frozen=True)
class Inputs:
    dense: Path
    scores: Path


@dataclass(frozen=True)
class Outputs:
    plan: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    model = load_model(inputs.dense)
    spec = spec_of(model)
    assert spec is not None
    scores = Scores.load(inputs.scores / "scores.safetensors")
    plan = select_channels(
        model,
        scores,
        input_shape=spec.input_shape,
        variant=config.variant,
        device=context.device,
        round=Round(1, config.variant.rounds),
    )
    plan.save(outputs.plan / "plan.json")
    kept_channels(plan, outputs.plan / "plan.png")
    save_settings(outputs.plan, inputs.scores, variant=config.variant.model_dump(mode="json"))
    write_manifest(outputs.plan, kind="plan")
    for name in ("plan.json", "plan.png"):
        context.tracker.log_file(outputs.plan / name)
    kept, channels = sum(map(len, plan.kept.values())), sum(plan.channels.values())
    label = config.variant.label
    logger.info("%s: keeps %d of %d channels in %d layers", label, kept, channels, len(plan.kept))
    budget = config.variant.budget if config.variant.rounds == 1 else None  # the last round reaches the budget
    if (latency := describe_latency(plan, budget)) is not None:
        logger.info("%s: latency %s", label, latency)
    for line in ChannelGraph(model, plan.input_shape).unpruned(plan.residual):
        logger.info("%s: not pruned: %s", label, line)
    return StepResult(
        {
            "kept_channels": float(kept),
            "prunable_channels": float(channels),
            "unsure_channels": float(sum(map(len, plan.unsure.values()))),
        }
    )
