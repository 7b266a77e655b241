"""Tracking: what a step tells the outside while it works, behind a small protocol.

`MlflowTracker` writes to MLflow. A tracking server that dies must not cost hours of training: the first failure after
the start switches the tracker off for the rest of the step, says so once, and keeps what could not be sent in a local
file. Wrong credentials, which show at the start, are an error.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from scop.errors import UserError

PARENT_VARIABLE = "SCOP_PARENT_RUN_ID"
ARTIFACTS_VARIABLE = "SCOP_ARTIFACT_ROOT"
CANDIDATE = "candidate"
UNSENT = "tracking-unsent.jsonl"
T = TypeVar("T")


class Tracker(Protocol):
    """Where a step's figures go while it works."""

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_file(self, path: Path, folder: str | None = None) -> None: ...

    def register_onnx(self, path: Path, variant: str, tags: Mapping[str, str]) -> str | None: ...

    def close(self, succeeded: bool, error: str | None = None) -> None: ...


class NoTracker:
    """Tracks nothing: a step that runs by itself keeps its figures in its outputs alone."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_file(self, path: Path, folder: str | None = None) -> None:
        pass

    def register_onnx(self, path: Path, variant: str, tags: Mapping[str, str]) -> str | None:
        return None

    def close(self, succeeded: bool, error: str | None = None) -> None:
        pass


class MlflowTracker:
    """A child run of the pipeline's MLflow run.

    Args:
        run_name: what the run is called, such as ``scop-0.45 finetune``.
        tags: of the run.
        unsent: the file for what could not be sent.

    Raises:
        UserError: the server refuses the credentials.
    """

    def __init__(self, run_name: str, tags: Mapping[str, str], unsent: Path) -> None:
        self._unsent, self._reachable = unsent, True
        self.run_id: str | None = None
        configure_mlflow()
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        parent = os.environ.get(PARENT_VARIABLE)
        self._parent = parent

        def start() -> str:
            if parent:
                experiment = self._client.get_run(parent).info.experiment_id
                tags_of_run = {**tags, "mlflow.parentRunId": parent}
            else:
                experiment = find_experiment(self._client, "scop", artifact_root())
                tags_of_run = dict(tags)
            run_id: str = self._client.create_run(experiment, run_name=run_name, tags=tags_of_run).info.run_id
            return run_id

        self.run_id = self._send("start", {"run_name": run_name}, start, at_start=True)

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:6000]) for key, value in params.items()]
        self._send("params", dict(params), lambda: self._client.log_batch(self._run, params=entities))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._send("metrics", {"step": step, **metrics}, lambda: self._client.log_batch(self._run, metrics=entities))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in tags.items()]
        self._send("tags", dict(tags), lambda: self._client.log_batch(self._run, tags=entities))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self._send("file", {"path": str(path)}, lambda: self._client.log_artifact(self._run, str(path), folder))

    def register_onnx(self, path: Path, variant: str, tags: Mapping[str, str]) -> str | None:
        """Enter a variant's ONNX model into the registry, with the alias `candidate`.

        Every variant has a registered model of its own, EXPERIMENT-VARIANT: a control must not take the alias away
        from the network that it is a control for.

        Returns:
            ``models:/NAME/VERSION``, or None where MLflow could not be reached.
        """
        return self._send("model", {"path": str(path), "variant": variant}, lambda: self._register(path, variant, tags))

    def _register(self, path: Path, variant: str, tags: Mapping[str, str]) -> str:
        import warnings
        from importlib.metadata import version

        import mlflow
        import numpy as np
        import onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        experiment = self._client.get_experiment(self._client.get_run(self._run).info.experiment_id)
        name = f"{experiment.name}-{variant}"
        model = onnx.load(path)
        ends = []
        for value in (model.graph.input[0], model.graph.output[0]):
            shape = [-1, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:])]
            ends.append(Schema([TensorSpec(np.dtype(np.float32), tuple(shape), value.name)]))
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        with warnings.catch_warnings(), mlflow.start_run(run_id=self._run):
            warnings.simplefilter("ignore")
            logged = mlflow.onnx.log_model(
                model,
                name="model",
                registered_model_name=name,
                signature=ModelSignature(inputs=ends[0], outputs=ends[1]),
                # Given, because MLflow would otherwise find them out by running the model in a new process.
                pip_requirements=[f"{package}=={version(package)}" for package in ("onnx", "onnxruntime", "numpy")],
            )
        number = str(logged.registered_model_version)
        for key, value in tags.items():
            self._client.set_model_version_tag(name, number, key, value)
        self._client.set_registered_model_alias(name, CANDIDATE, number)
        return f"models:/{name}/{number}"

    def close(self, succeeded: bool, error: str | None = None) -> None:
        def end() -> None:
            if error:
                self._client.set_tag(self._run, "scop.error", error)
                if self._parent:
                    self._client.set_tag(self._parent, "scop.error", error)
            self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")

        # Even where something failed before: a run that is not closed looks as if it went on for ever.
        self._reachable = self.run_id is not None
        self._send("close", {"succeeded": succeeded}, end)

    @property
    def _run(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _send(self, what: str, content: Any, send: Callable[[], T], at_start: bool = False) -> T | None:
        if self._reachable:
            try:
                return send()
            except Exception as error:  # whatever a server or a network can do
                if at_start and _is_refusal(error):
                    raise UserError(
                        f"MLflow at {os.environ.get('MLFLOW_TRACKING_URI')} refuses access ({first_line(error)}); "
                        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                    ) from error
                self._reachable = False
                if not self._unsent.exists():
                    reason = first_line(error)
                    print(f"tracking: MLflow failed ({reason}); the step goes on, see {self._unsent}", flush=True)
        self._unsent.parent.mkdir(parents=True, exist_ok=True)
        with self._unsent.open("a") as file:
            file.write(json.dumps({"what": what, "content": content}, default=str) + "\n")
        return None


def configure_mlflow() -> None:
    """Have MLflow give up on a dead server within seconds, not its default of many minutes, and send no telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
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


def start_parent(experiment: str, run_name: str, tags: Mapping[str, str], resumed: bool = False) -> str:
    """Open the run under which a pipeline's steps are tracked, and return its id; `resumed`, the one of that name.

    Raises:
        UserError: MLflow cannot be reached or refuses access.
    """
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient()
        experiment_id = find_experiment(client, experiment, artifact_root())
        if resumed:
            earlier = client.search_runs([experiment_id], f"tags.`scop.run` = '{tags['scop.run']}'")
            for run in earlier:
                if "mlflow.parentRunId" not in run.data.tags:
                    client.update_run(run.info.run_id, status="RUNNING")
                    return str(run.info.run_id)
        return str(client.create_run(experiment_id, run_name=run_name, tags=dict(tags)).info.run_id)
    except Exception as error:
        raise UserError(
            f"MLflow at {os.environ.get('MLFLOW_TRACKING_URI')} cannot be used ({first_line(error)}); "
            "check MLFLOW_TRACKING_URI and its credentials, or unset it for a local database"
        ) from error


def end_parent(run_id: str, succeeded: bool, metrics: Mapping[str, float], files: list[Path]) -> None:
    """Close a pipeline's run; a server that fails now is only reported."""
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient()
        for key, value in metrics.items():
            client.log_metric(run_id, key, value)
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")
    except Exception as error:
        print(f"tracking: the run could not be closed in MLflow ({first_line(error)})", flush=True)


def shown(text: str) -> str:
    """A tracking URI, or a message that has it, as it may be printed: without user and password."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none; no user and password in it."""
    lines = shown(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _is_refusal(error: Exception) -> bool:
    code = str(getattr(error, "error_code", ""))
    text = str(error)
    return code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in text or "error code 403" in text
