"""Tracking a step in MLflow: a child run of the pipeline run."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scop.environment import StepEnvironment
from scop.tracking.outbox import Outbox
from scop.tracking.pipeline_run import end_parent, join_parent, log_cost, rejoin_parent
from scop.tracking.server import find_or_create_experiment, make_client
from scop.tracking.tags import CANDIDATE, ERROR_TAG, MODEL_TAG, NOT_OF_THE_RUN, PARENT_TAG, STEP_TAGS

_PARAMS_PER_REQUEST = 100  # MLflow's limit
_LONGEST_PARAM = 6000  # MLflow's limit, in characters


@dataclass(frozen=True)
class _Opened:
    """An open run.

    Attributes:
        run: ID of the run, or None if MLflow could not be reached.
        experiment: ID of its experiment.
        parent: ID of its parent, the pipeline run.
        kfp_run: ID of the KFP run, if steps open and close the pipeline run.
    """

    run: str | None
    experiment: str = ""
    parent: str | None = None
    kfp_run: str | None = None


class MlflowTracker:
    """Tracks a step; created by `start` or `join`.

    Args:
        client: an MLflow client.
        outbox: sends data, or stores data that cannot be sent.
        opened: the step's run.
    """

    def __init__(self, client: Any, outbox: Outbox, opened: _Opened) -> None:
        self._client, self._outbox, self._opened = client, outbox, opened
        self._parent = opened.parent
        self._monitor: Any = None
        self.run_id = opened.run

    @classmethod
    def start(cls, environment: StepEnvironment, run_name: str, tags: Mapping[str, str], unsent: Path) -> Self:
        """Open the step's run; if KFP has opened one for the step, use that.

        Args:
            environment: variables with the server, the experiment and the pipeline run.
            run_name: name of the run, such as ``scop-0.45 finetune``.
            tags: tags of the run.
            unsent: the file for data that could not be sent.

        Raises:
            UserError: the server refuses the credentials.
        """
        assert environment.tracking_uri is not None
        client, outbox = make_client(environment.tracking_uri), Outbox(environment.tracking_uri, unsent)

        def start() -> _Opened:
            if environment.mlflow_run:
                return _take_over(client, environment.mlflow_run, tags)
            return _open(client, environment, run_name, tags)

        opened = outbox.send("start", {"run_name": run_name}, start, at_start=True)
        return cls(client, outbox, opened or _Opened(None))

    @classmethod
    def join(cls, tracking_uri: str, run_id: str, unsent: Path) -> Self:
        """Track to a run that another process has opened and will close."""
        return cls(make_client(tracking_uri), Outbox(tracking_uri, unsent), _Opened(run_id))

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in params.items()]
        for start in range(0, len(entities), _PARAMS_PER_REQUEST):
            part = entities[start : start + _PARAMS_PER_REQUEST]
            self._log_batch("params", {entry.key: entry.value for entry in part}, params=part)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._log_batch("metrics", {"step": step, **metrics}, metrics=entities)

    def set_tags(self, tags: Mapping[str, str], of_the_run: bool = False) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in tags.items()]
        self._log_batch("tags", dict(tags), tags=entities)
        if of_the_run and (parent := self._parent):
            self._outbox.send("tags of the run", dict(tags), lambda: self._client.log_batch(parent, tags=entities))

    def _log_batch(self, what: str, content: Mapping[str, Any], **entities: Any) -> None:
        self._outbox.send(what, content, lambda: self._client.log_batch(self._run, **entities))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self._outbox.send("file", {"path": str(path)}, lambda: self._client.log_artifact(self._run, str(path), folder))

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Log a table for MLflow's pages and `mlflow.load_table`; `name` ends in .json."""
        data = {key: list(column) for key, column in columns.items()}

        def send() -> None:
            # MLflow would append the rows of a second attempt to those of the first.
            if name not in [entry.path for entry in self._client.list_artifacts(self._run)]:
                self._client.log_table(self._run, data, name)

        self._outbox.send("table", {"name": name, **data}, send)

    def log_configuration(self, sections: Mapping[str, Any], title: str) -> None:
        if (parent := self._parent) and self._opened.kfp_run and sections:
            file = f"configuration/{title}.yaml"
            self._outbox.send(
                "configuration", {title: sections}, lambda: self._client.log_dict(parent, dict(sections), file)
            )

    def watch_system(self) -> None:
        """Start MLflow's system metrics; if they fail, the step continues without them."""
        if not self._outbox.reachable:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitor = SystemMetricsMonitor(self._run, tracking_uri=self._client.tracking_uri)  # type: ignore[no-untyped-call]
        self._monitor.start()

    def register_onnx(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any = None, measured_by: str | None = None
    ) -> str | None:
        """Register a variant's ONNX model with the alias `candidate`.

        Each variant has its own registered model, EXPERIMENT-VARIANT: a control must not take the alias from the
        network that it controls.

        Args:
            path: the ONNX file.
            variant: label of the variant.
            tags: tags of the version.
            example: input images, a NumPy array, float32 (N, C, H, W).
            measured_by: MLflow ID of the run that measured the network, to which the model is linked.

        Returns:
            ``models:/NAME/VERSION``, or None if MLflow could not be reached.
        """
        content = {"path": str(path), "variant": variant}
        return self._outbox.send("model", content, lambda: self._register(path, variant, tags, example, measured_by))

    def _register(
        self, path: Path, variant: str, tags: Mapping[str, str], example: Any, measured_by: str | None
    ) -> str:
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
        mlflow.set_tracking_uri(self._client.tracking_uri)  # log_model has no such argument
        # MLflow prints to standard error; the step logs the result itself.
        silent = contextlib.redirect_stderr(io.StringIO())
        with silent, warnings.catch_warnings(), mlflow.start_run(run_id=self._run):
            warnings.simplefilter("ignore")
            logged = mlflow.onnx.log_model(
                model,
                name="model",
                registered_model_name=name,
                signature=ModelSignature(inputs=ends[0], outputs=ends[1]),
                input_example=example,
                # Given explicitly: by default, MLflow runs the model in a new process to find them.
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
        kfp_run, experiment = self._opened.kfp_run, self._opened.experiment

        def end() -> None:
            if kfp_run:
                self._parent = rejoin_parent(self._client, experiment, kfp_run, self._run)
            if error:
                for run in filter(None, (self._run, self._parent)):
                    self._client.set_tag(run, ERROR_TAG, error)
            self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")
            if kfp_run and self._parent:
                if last is not None or not succeeded:
                    end_parent(self._client, self._parent, succeeded, last or {}, [])
                else:  # no later step may log it
                    log_cost(self._client, experiment, self._parent)

        # Even if an earlier request failed: a run that is not closed would look as if it were running.
        if self.run_id is not None:
            self._outbox.retry()
        self._outbox.send("close", {"succeeded": succeeded}, end)

    @property
    def _run(self) -> str:
        assert self.run_id is not None
        return self.run_id


def _open(client: Any, environment: StepEnvironment, run_name: str, tags: Mapping[str, str]) -> _Opened:
    """Create the step's run as a child of the pipeline run, which is given, found by KFP's run ID, or absent."""
    parent, kfp_run = environment.parent_run, None
    if parent:
        experiment = client.get_run(parent).info.experiment_id
    else:
        experiment = find_or_create_experiment(client, environment.experiment, environment.artifact_root)
        if environment.kfp_run:
            kfp_run = environment.kfp_run
            of_the_run = {key: value for key, value in tags.items() if key not in NOT_OF_THE_RUN}
            parent = join_parent(client, experiment, kfp_run, of_the_run, run_name)
    if parent:  # versions, image and machine are tags of the pipeline run
        tags = {key: value for key, value in tags.items() if key in STEP_TAGS} | {PARENT_TAG: parent}
    run = client.create_run(experiment, run_name=run_name, tags=dict(tags))
    return _Opened(str(run.info.run_id), experiment, parent, kfp_run)


def _take_over(client: Any, run_id: str, tags: Mapping[str, str]) -> _Opened:
    """Use the run that KFP has opened for the step; KFP also closes its parent."""
    run = client.get_run(run_id)
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    return _Opened(run_id, run.info.experiment_id, run.data.tags.get(PARENT_TAG))
