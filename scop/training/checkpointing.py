"""Interruption of a training run: a store of checkpoints, and a function that requests a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class CheckpointStore(Protocol):
    """Stores the checkpoints of a training run; see `scop.storage.checkpoints.Checkpoints`."""

    @property
    def uri(self) -> str: ...

    def part(self, name: str) -> CheckpointStore: ...

    def save(self, state: dict[str, Any], epochs: int, steps: int = 0) -> None: ...

    def load(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Checkpointing:
    """How a training run is interrupted and resumed.

    Attributes:
        store: a checkpoint is written after every epoch, and training resumes from the newest; None stores nothing.
        stop_requested: called after every step; once it returns True, a checkpoint is written and training stops.
    """

    store: CheckpointStore | None = None
    stop_requested: Callable[[], bool] = lambda: False

    def part(self, name: str) -> Checkpointing:
        """Return the same for one training within the run, with its own checkpoints."""
        return Checkpointing(self.store and self.store.part(name), self.stop_requested)
