"""The tracking protocol, and the tracker that tracks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where a step's figures go while it works.

    Attributes:
        run_id: MLflow's id of the step's run, or None where there is none.
    """

    run_id: str | None

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...

    def set_tags(self, tags: Mapping[str, str], of_the_run: bool = False) -> None:
        """Tag the step and, with `of_the_run`, the pipeline's run above it."""
        ...

    def log_file(self, path: Path, folder: str | None = None) -> None: ...

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None: ...

    def log_configuration(self, sections: Mapping[str, Any], title: str) -> None:
        """Keep a step's configuration with the pipeline's run, where nobody else does: on a cluster."""
        ...

    def watch_system(self) -> None:
        """Log what processors, memory and GPUs do, from now on until the step ends."""
        ...

    def register_onnx(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any = None, measured_by: str | None = None
    ) -> str | None: ...

    def close(self, succeeded: bool, error: str | None = None, last: Mapping[str, float] | None = None) -> None:
        """End; `last`, the headline figures of the whole run, comes from the step that ends it."""
        ...


class NoTracker:
    """Tracks nothing: a step that runs by itself keeps its figures in its outputs alone."""

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
