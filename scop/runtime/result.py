"""What a step returns beside its output folders."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StepResult:
    """What a step tells its caller beside its output folders.

    Attributes:
        metrics: headline figures by name.
        classes, confusion: class names, and counts with true labels in rows, where the step measured accuracy.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # JSON has no NaN, and a record that nobody can read is worse than a figure that is missing.
        finite = {key: value for key, value in self.metrics.items() if math.isfinite(value)}
        object.__setattr__(self, "metrics", finite)

    def save(self, path: str) -> None:
        """Write it as JSON: what has no file, KFP's local cache takes for lost, and its launcher warns of."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self)) + "\n")
