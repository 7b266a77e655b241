"""Step 4: decide which channels stay, in the first round where there are several."""

from __future__ import annotations

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
from scop.selection.scores import Scores
from scop.selection.select import select_channels
from scop.storage.manifest import write_manifest


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
        part=1 / config.variant.rounds,
    )
    plan.save(outputs.plan / "plan.json")
    kept_channels(plan, outputs.plan / "plan.png")
    save_settings(outputs.plan, inputs.scores, variant=config.variant.model_dump(mode="json"))
    write_manifest(outputs.plan, kind="plan")
    for name in ("plan.json", "plan.png"):
        context.tracker.log_file(outputs.plan / name)
    kept, channels = sum(map(len, plan.kept.values())), sum(plan.channels.values())
    print(f"{config.variant.label}: keeps {kept} of {channels} channels in {len(plan.kept)} layers", flush=True)
    budget = config.variant.budget if config.variant.rounds == 1 else None  # the first of several goes part of the way
    if (latency := describe_latency(plan, budget)) is not None:
        print(f"{config.variant.label}: takes {latency}", flush=True)
    for line in ChannelGraph(model, plan.input_shape).left_whole(plan.residual):
        print(f"{config.variant.label}: stays whole: {line}", flush=True)
    return StepResult(
        {
            "kept_channels": float(kept),
            "prunable_channels": float(channels),
            "unsure_channels": float(sum(map(len, plan.unsure.values()))),
        }
    )
