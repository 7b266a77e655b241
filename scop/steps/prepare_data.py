"""Step 1: read the images, split off validation and test data, and store them as a dataset."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from scop.config import DataSection
from scop.config.parsing import Section
from scop.data.dataset import save_dataset
from scop.data.sources import load_source
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.storage.fetch import local_path
from scop.tracking.tags import DATASET_TAG

logger = logging.getLogger(__name__)


class Config(Section):
    data: DataSection


@dataclass(frozen=True)
class Inputs:
    pass


@dataclass(frozen=True)
class Outputs:
    dataset: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    section = config.data
    if section.path is not None:
        section = section.model_copy(update={"path": str(local_path(section.path, context.cache))})
    dataset = load_source(section)
    save_dataset(dataset, outputs.dataset)
    info = dataset.info
    shape = "x".join(map(str, info.shape))
    logger.info("%s: %d classes of %s images, %s", info.source, len(info.classes), shape, info.counts)
    context.tracker.set_tags({DATASET_TAG: info.content}, of_the_run=True)
    context.tracker.log_file(outputs.dataset / "dataset.json")
    return StepResult({f"images_{split}": float(count) for split, count in info.counts.items()})
