"""Step 1: read the images, cut off a validation split, pack them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scop.config import DataSection
from scop.config.parsing import Section
from scop.data.dataset import save_dataset
from scop.data.sources import load_source
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.storage.files import local


class Config(Section):
    data: DataSection


@dataclass(frozen=True)
class Inputs:
    pass


@dataclass(frozen=True)
class Outputs:
    dataset: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    path = config.data.path
    dataset = load_source(config.data.model_copy(update={"path": str(local(path))}) if path else config.data)
    save_dataset(dataset, outputs.dataset)
    info = dataset.info
    shape = "x".join(map(str, info.shape))
    print(f"{info.source}: {len(info.classes)} classes of {shape} images, {info.counts}", flush=True)
    context.tracker.set_tags({"scop.dataset": info.content}, of_the_run=True)
    context.tracker.log_file(outputs.dataset / "dataset.json")
    return StepResult({f"images_{split}": float(count) for split, count in info.counts.items()})
