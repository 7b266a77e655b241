"""The tracking protocol, and the tracker that tracks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

UNSENT = "tracking-unsent.jsonl"
"""Name of the file, in a step's output, for tracking data that could not be sent."""


class Tracker(Protocol):
    """Receives a step's metrics while it runs.

    Attributes:
        run_id: MLflow ID of the step's run, or None if there is none.
    """

    run_id: str | None

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...

    def set_tags(self, tags: Mapping[str, str], of_the_run: bool = False) -> None:
        """Tag the step's run and, with `of_the_run`, its parent, the pipeline run."""
        ...

    def log_file(self, path: Path, folder: str | None = None) -> None: ...

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None: ...

    def log_configuration(self, sections: Mapping[str, Any], title: str) -> None:
        """Store a step's configuration with the pipeline run; only on a cluster, where nothing else stores it."""
        ...

    def watch_system(self) -> None:
        """Log the utilisation of CPUs, memory and GPUs until the step ends."""
        ...

    def register_onnx(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any = None, measured_by: str | None = None
    ) -> str | None: ...

    def close(self, succeeded: bool, error: str | None = None, last: Mapping[str, float] | None = None) -> None:
        """End the run; the last step passes `last`, the headline metrics of the pipeline run."""
        ...


class NoTracker:
    """Tracks nothing: the step's metrics are only in its outputs."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str], of_the_run: bool = False) -> None:
        pass

    def log_file(self, path: Path, folder: str | None = None) -> None:
        pass

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        pass

    def log_configuration(self, sections: Mapping[str, Any], title: str) -> None:
        pass

    def watch_system(self) -> None:
        pass

    def register_onnx(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any = None, measured_by: str | None = None
    ) -> str | None:
        return None

    def close(self, succeeded: bool, error: str | None = None, last: Mapping[str, float] | None = None) -> None:
        pass
