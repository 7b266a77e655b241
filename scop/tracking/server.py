"""Configuration of the MLflow client, and lookup of experiments."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Give up on an unreachable server within seconds; MLflow's defaults wait for many minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def make_client(tracking_uri: str, timeout: int | None = None) -> Any:
    """Create an MLflow client that gives up on an unreachable server within seconds and sends no telemetry.

    MLflow reads these settings only from environment variables, which are set here unless the user has set them.

    Args:
        tracking_uri: URI of the server or database.
        timeout: timeout of a request, in seconds.
    """
    if timeout is not None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout))
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # logs every table that it creates
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri)


def artifact_root_for(tracking_uri: str) -> str | None:
    """Return the artifact root of a new experiment: beside a SQLite file, else None for the server's default."""
    scheme, separator, path = tracking_uri.partition(":///")
    return str(Path(path).parent / "mlflow-artifacts") if separator and scheme == "sqlite" else None


def find_or_create_experiment(client: Any, name: str, artifact_root: str | None = None) -> str:
    """Return the ID of an experiment, created if it does not exist.

    Args:
        client: an MLflow client.
        name: name of the experiment.
        artifact_root: artifact root of a new experiment; by default that of `artifact_root_for`.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifact_root or artifact_root_for(client.tracking_uri)
        try:
            return str(client.create_experiment(name, artifact_location=root))
        except MlflowException:  # another step was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)
