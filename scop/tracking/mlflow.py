"""Tracking: what a step tells the outside while it works, behind a small protocol.

`MlflowTracker` writes to MLflow. A tracking server that dies must not cost hours of training: the first failure after
the start switches the tracker off for the rest of the step, says so once, and keeps what could not be sent in a local
file; what a server that is there does not take goes into that file alone. Wrong credentials, which show at the start,
are an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from scop.errors import UserError, first_line, shown
from scop.tracking.pipeline_run import end_parent, join_parent, log_cost, rejoin_parent
from scop.tracking.server import EXPERIMENT_VARIABLE, artifact_root, configure_mlflow, find_experiment
from scop.tracking.tags import CANDIDATE, ERROR_TAG, MODEL_TAG, NOT_OF_THE_RUN, PARENT_TAG, STEP_TAGS

PARENT_VARIABLE = "SCOP_PARENT_RUN_ID"
KFP_RUN_VARIABLE = "KFP_RUN_ID"
"""Set on a cluster, by the downward API: the run under which steps are tracked is found by it."""
_PARAMS_AT_ONCE = 100  # MLflow's limit
UNSENT = "tracking-unsent.jsonl"
T = TypeVar("T")


class MlflowTracker:
    """A child run of the pipeline's MLflow run; where KFP opened one for the step (MLFLOW_RUN_ID), that one.

    Args:
        run_name: what the run is called, such as ``scop-0.45 finetune``.
        tags: of the run.
        unsent: the file for what could not be sent.

    Raises:
        UserError: the server refuses the credentials.
    """

    def __init__(self, run_name: str, tags: Mapping[str, str], unsent: Path) -> None:
        self.run_id: str | None = None
        self._connect(unsent)
        self._parent = os.environ.get(PARENT_VARIABLE)
        self._kfp_run = None if self._parent else os.environ.get(KFP_RUN_VARIABLE)
        self._experiment = ""

        def start() -> str:
            if given := os.environ.pop("MLFLOW_RUN_ID", None):
                return self._resume(given, tags)
            if self._parent:
                self._experiment = self._client.get_run(self._parent).info.experiment_id
            else:
                name = os.environ.get(EXPERIMENT_VARIABLE, "scop")
                self._experiment = find_experiment(self._client, name, artifact_root())
                if self._kfp_run:
                    self._parent = join_parent(
                        self._client, self._experiment, self._kfp_run, _of_the_run(tags), run_name
                    )
            parent = {PARENT_TAG: self._parent} if self._parent else {}
            own = {**_of_the_step(tags), **parent} if self._parent else tags
            run = self._client.create_run(self._experiment, run_name=run_name, tags=dict(own))
            return str(run.info.run_id)

        self.run_id = self._send("start", {"run_name": run_name}, start, at_start=True)

    @classmethod
    def joining(cls, run_id: str, unsent: Path) -> MlflowTracker:
        """For a run that another process has opened and will close; arguments as the attributes."""
        tracker = cls.__new__(cls)
        tracker._connect(unsent)
        tracker.run_id, tracker._parent, tracker._kfp_run = run_id, None, None
        return tracker

    def _connect(self, unsent: Path) -> None:
        configure_mlflow()
        from mlflow.tracking import MlflowClient

        self._unsent, self._reachable, self._told = unsent, True, False
        self._monitor: Any = None
        self._client = MlflowClient()

    def _resume(self, run_id: str, tags: Mapping[str, str]) -> str:
        """The step's run that KFP opened: it closes the run above it as well."""
        run = self._client.get_run(run_id)
        self._experiment, self._parent, self._kfp_run = run.info.experiment_id, run.data.tags.get(PARENT_TAG), None
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)
        return run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(entities), _PARAMS_AT_ONCE):
            part = entities[start : start + _PARAMS_AT_ONCE]
            self._log_batch("params", {entry.key: entry.value for entry in part}, params=part)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._log_batch("metrics", {"step": step, **metrics}, metrics=entities)

    def set_tags(self, tags: Mapping[str, str], of_the_run: bool = False) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in tags.items()]
        self._log_batch("tags", dict(tags), tags=entities)
        if of_the_run and (parent := self._parent):
            self._send("tags of the run", dict(tags), lambda: self._client.log_batch(parent, tags=entities))

    def _log_batch(self, what: str, content: Mapping[str, Any], **entities: Any) -> None:
        self._send(what, content, lambda: self._client.log_batch(self._run, **entities))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self._send("file", {"path": str(path)}, lambda: self._client.log_artifact(self._run, str(path), folder))

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """A table that MLflow's pages show and `mlflow.load_table` reads; `name` ends in .json."""
        data = {key: list(column) for key, column in columns.items()}

        def send() -> None:
            # MLflow would put the rows of a second try behind those of the first.
            if name not in [entry.path for entry in self._client.list_artifacts(self._run)]:
                self._client.log_table(self._run, data, name)

        self._send("table", {"name": name, **data}, send)

    def log_configuration(self, sections: Mapping[str, Any], title: str) -> None:
        if (parent := self._parent) and self._kfp_run and sections:
            file = f"configuration/{title}.yaml"
            self._send("configuration", {title: sections}, lambda: self._client.log_dict(parent, dict(sections), file))

    def watch_system(self) -> None:
        """MLflow's own system metrics, every few seconds; where they fail the step goes on without them."""
        if not self._reachable:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitor = SystemMetricsMonitor(self._run, tracking_uri=self._client.tracking_uri)  # type: ignore[no-untyped-call]
        self._monitor.start()

    def register_onnx(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any = None, measured_by: str | None = None
    ) -> str | None:
        """Enter a variant's ONNX model into the registry, with the alias `candidate`.

        Every variant has a registered model of its own, EXPERIMENT-VARIANT: a control must not take the alias away
        from the network that it is a control for.

        Args:
            path: of the ONNX file.
            variant: its label.
            tags: of the version.
            example: images as NumPy has them, float32 (N, C, H, W), that the version shows as its input.
            measured_by: MLflow's id of the run that measured the network; the model is linked there.

        Returns:
            ``models:/NAME/VERSION``, or None where MLflow could not be reached.
        """
        content = {"path": str(path), "variant": variant}
        return self._send("model", content, lambda: self._register(path, variant, tags, example, measured_by))

    def _register(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any, measured_by: str | None
    ) -> str:
        import warnings
        from importlib.metadata import version

        import mlflow
        import numpy as np
        import onnx
        from mlflow.entities import LoggedModelOutput
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
                input_example=example,
                # Given, because MLflow would otherwise find them out by running the model in a new process.
                pip_requirements=[f"{package}=={version(package)}" for package in ("onnx", "onnxruntime", "numpy")],
            )
        number = str(logged.registered_model_version)
        for key, value in tags.items():
            self._client.set_model_version_tag(name, number, key, value)
        self._client.set_registered_model_alias(name, CANDIDATE, number)
        uri = f"models:/{name}/{number}"
        if measured_by is not None:
            self._client.set_tag(measured_by, MODEL_TAG, uri)
            self._client.log_outputs(measured_by, [LoggedModelOutput(logged.model_id, 0)])
        return uri

    def close(self, succeeded: bool, error: str | None = None, last: Mapping[str, float] | None = None) -> None:
        if self._monitor is not None:
            self._monitor.finish()

        def end() -> None:
            if self._kfp_run:
                self._parent = rejoin_parent(self._client, self._experiment, self._kfp_run, self._run)
            if error:
                for run in filter(None, (self._run, self._parent)):
                    self._client.set_tag(run, ERROR_TAG, error)
            self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")
            if self._kfp_run and self._parent:
                if last is not None or not succeeded:
                    end_parent(self._parent, succeeded, last or {}, [])
                else:  # no later step may come to tell it
                    log_cost(self._client, self._experiment, self._parent)

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
                        f"MLflow at {shown(self._client.tracking_uri)} refuses access ({first_line(error)}); "
                        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                    ) from error
                if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE" and not at_start:
                    self._say(f"MLflow refused {what}", error)
                else:
                    self._reachable = False
                    if not self._told:
                        self._say("MLflow failed", error)
                    self._told = True
        self._unsent.parent.mkdir(parents=True, exist_ok=True)
        with self._unsent.open("a") as file:
            file.write(json.dumps({"what": what, "content": content}, default=str) + "\n")
        return None

    def _say(self, what: str, error: Exception) -> None:
        print(f"tracking: {what} ({first_line(error)}); the step goes on, see {self._unsent}", flush=True)


def _is_refusal(error: Exception) -> bool:
    code = str(getattr(error, "error_code", ""))
    text = str(error)
    return code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in text or "error code 403" in text


def _of_the_run(tags: Mapping[str, str]) -> dict[str, str]:
    """Those of a step's tags that hold for the whole run."""
    return {key: value for key, value in tags.items() if key not in NOT_OF_THE_RUN}


def _of_the_step(tags: Mapping[str, str]) -> dict[str, str]:
    """Those that are not said of the run above it already: versions, image, machine."""
    return {key: value for key, value in tags.items() if key in STEP_TAGS}
