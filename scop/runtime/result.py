"""The return value of a step, besides its output folders."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StepResult:
    """The return value of a step, besides its output folders.

    Attributes:
        metrics: headline metrics by name; values that are not finite are dropped.
        classes: class names, if the step measured accuracy.
        confusion: counts, true labels in rows and predictions in columns, if the step measured accuracy.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # JSON has no NaN: a record with one would be unreadable.
        finite = {key: value for key, value in self.metrics.items() if math.isfinite(value)}
        object.__setattr__(self, "metrics", finite)

    def save(self, path: str) -> None:
        """Write the result as JSON. KFP's local cache ignores an artifact without a file, and its launcher warns."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self)) + "\n")
