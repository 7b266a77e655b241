"""A step: a module of `scop.steps`, and what it receives while it runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from scop.config.parsing import Section
from scop.environment import StepEnvironment
from scop.errors import UserError
from scop.runtime.registry import STEPS
from scop.runtime.result import StepResult
from scop.runtime.uris import Uris
from scop.storage.cache import Cache
from scop.tracking.tracker import Tracker

if TYPE_CHECKING:
    import torch

    from scop.models.history import EpochRecord
    from scop.training.checkpointing import CheckpointStore


@dataclass(frozen=True)
class Context:
    """What a step receives besides its configuration, inputs and outputs.

    Attributes:
        tracker: receives metrics.
        checkpoints: store for checkpoints of the training.
        input_uris: absolute paths or ``s3://`` URIs of the inputs, by name.
        environment: variables set by the launcher.
        epochs: number of epochs already tracked by the step.
    """

    tracker: Tracker
    checkpoints: CheckpointStore
    input_uris: Uris
    environment: StepEnvironment
    epochs: int = 0

    @cached_property
    def device(self) -> torch.device:
        """The device to compute on; this process is tuned for it."""
        from scop.compute.device import pick_device, tune_process

        device = pick_device(self.environment.device)
        tune_process(device)
        return device

    @property
    def cache(self) -> Cache:
        """The local cache of files fetched from S3."""
        return Cache(self.environment.cache_folder)

    def on_epoch(self, record: EpochRecord) -> None:
        """Track an epoch."""
        self.tracker.log_metrics(record.metrics, step=self.epochs + record.epoch)

    def part(self, name: str, epochs: int) -> Context:
        """Return the context of one training run of the step, with its own checkpoints, after `epochs` epochs."""
        return replace(self, checkpoints=self.checkpoints.part(name), epochs=epochs)


class StepModule(Protocol):
    """The interface of a module of `scop.steps`."""

    Config: type[Section]
    Inputs: type[Any]
    Outputs: type[Any]

    @staticmethod
    def run(config: Any, inputs: Any, outputs: Any, context: Context) -> StepResult: ...


def find_step(name: str) -> StepModule:
    """Return the module of a step; raise UserError if the name is unknown.

    Steps are plug-ins, which the runtime imports by name. This is the only import from a higher layer.
    """
    if name not in STEPS:
        raise UserError(f"step {name!r} is unknown (known: {', '.join(STEPS)})")
    module: StepModule = importlib.import_module(f"scop.steps.{name}")  # type: ignore[assignment]
    return module
