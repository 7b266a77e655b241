"""What a step is: a module of `scop.steps`, and what it is offered while it works."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from scop.config.parsing import Section
from scop.errors import UserError
from scop.runtime.places import Places
from scop.runtime.registry import STEPS
from scop.runtime.result import StepResult
from scop.tracking.tracker import Tracker

if TYPE_CHECKING:
    import torch

    from scop.models.history import EpochRecord
    from scop.training.loop import CheckpointStore


@dataclass(frozen=True)
class Context:
    """What the runtime offers to a step.

    Attributes:
        tracker: where figures go.
        checkpoints: where a training keeps its states.
        places: of the inputs: absolute paths or URIs, by name.
        epochs: that the step has tracked already.
    """

    tracker: Tracker
    checkpoints: CheckpointStore
    places: Places
    epochs: int = 0

    @cached_property
    def device(self) -> torch.device:
        """The device to compute on; see `scop.compute.device.pick_device`."""
        from scop.compute.device import pick_device

        return pick_device()

    def on_epoch(self, record: EpochRecord) -> None:
        """Track an epoch."""
        self.tracker.log_metrics(record.metrics, step=self.epochs + record.epoch)

    def part(self, name: str, epochs: int) -> Context:
        """For a training within the step, with checkpoints of its own, that follows others of so many epochs."""
        return replace(self, checkpoints=self.checkpoints.part(name), epochs=epochs)


class StepModule(Protocol):
    """What a module of `scop.steps` holds."""

    Config: type[Section]
    Inputs: type[Any]
    Outputs: type[Any]

    @staticmethod
    def run(config: Any, inputs: Any, outputs: Any, context: Context) -> StepResult: ...


def find_step(name: str) -> StepModule:
    """The module of a step, by its name; raises UserError where there is none."""
    if name not in STEPS:
        raise UserError(f"step {name!r} is unknown (known: {', '.join(STEPS)})")
    module: StepModule = importlib.import_module(f"scop.steps.{name}")  # type: ignore[assignment]
    return module
