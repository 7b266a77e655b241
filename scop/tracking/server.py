"""How MLflow is reached: its settings, experiments, and what it says of its troubles."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

ARTIFACTS_VARIABLE = "SCOP_ARTIFACT_ROOT"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"


def configure_mlflow() -> None:
    """Have MLflow give up on a dead server within seconds, not its default of many minutes, and send no telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # It tells of every table that it creates.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


def artifact_root() -> str | None:
    """Where artifacts of new experiments go: as told, or beside MLflow's SQLite file, or as the server has it."""
    if told := os.environ.get(ARTIFACTS_VARIABLE):
        return told
    scheme, separator, path = os.environ.get("MLFLOW_TRACKING_URI", "").partition(":///")
    return str(Path(path).parent / "mlflow-artifacts") if separator and scheme == "sqlite" else None


def find_experiment(client: Any, name: str, artifact_location: str | None = None) -> str:
    """The id of an experiment, which is created where it does not exist."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException:  # another step was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)
