"""The environment variables that scop reads and sets; each is defined once.

A launcher sets variables for the steps that it starts in other processes: a compiled pipeline for its pods, `scop run`
for KFP's local runner and for Docker, `scop rerun` for a container. `scop.runtime.execution.execute` and the command
line read them once. All other code takes arguments.

Variables of other programs that scop passes on without reading them (``AWS_*``, certificates) are not listed here: see
`pipelines.local.container_variables` and `pipelines.cluster.pod_variables`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from scop.errors import UserError


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


JsonList = Annotated[list[str], BeforeValidator(_from_json)]
JsonUris = Annotated[dict[str, str | list[str]], BeforeValidator(_from_json)]


class _Variables(BaseModel):
    """Variables by field; a field's alias is the variable's name. An empty variable counts as unset."""

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Self:
        """Read the variables; raise a UserError that names the variable if a value is invalid.

        Args:
            variables: values by name; by default those of this process.
        """
        variables = os.environ if variables is None else variables
        names = [name_of(cls, field) for field in cls.model_fields]
        try:
            return cls.model_validate({name: variables[name] for name in names if variables.get(name)})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"variable {first['loc'][0]} is {first['input']!r}: {first['msg']}") from error

    def as_variables(self) -> dict[str, str]:
        """Return the variables to set for another process; those at their default are left out."""
        values = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return {name: _as_text(value) for name, value in values.items() if value is not None}


def _as_text(value: Any) -> str:
    return "1" if value is True else value if isinstance(value, str) else json.dumps(value)


def name_of(kind: type[BaseModel], field: str) -> str:
    """Return the name of the variable of a field."""
    return str(kind.model_fields[field].alias)


class UserEnvironment(_Variables):
    """Set by the user.

    Attributes:
        tracking_uri: URI of the MLflow server or database; by default `scop run` uses a database beside the runs.
        device: the PyTorch device to compute on, such as cpu or cuda:1; by default a GPU if there is one.
        cache: folder for files fetched from S3; by default scop in the user's cache folder.
        processes: number of processes that train together on this machine or in this pod.
    """

    tracking_uri: str | None = Field(None, alias="MLFLOW_TRACKING_URI")
    device: str | None = Field(None, alias="SCOP_DEVICE")
    cache: Path | None = Field(None, alias="SCOP_CACHE")
    processes: int = Field(1, alias="SCOP_PROCESSES", ge=1)

    @property
    def cache_folder(self) -> Path:
        """The absolute path of the folder for files fetched from S3; it may be deleted at any time."""
        if self.cache is not None:
            return self.cache.expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scop"


class StepEnvironment(UserEnvironment):
    """Set by a launcher for a step.

    Attributes:
        run_id: ID of the pipeline run.
        attempt: ID of this start of the pipeline; a resumed run has a new one.
        image: name of the container image that the step runs in.
        image_id: Docker's ID of that image.
        revision: commit that the image was built from; set in the image.
        parent_run: MLflow ID of the run under which the step is tracked.
        kfp_run: ID of the KFP run, by which a step on a cluster finds its parent run.
        mlflow_run: MLflow ID of a run that KFP has opened for the step.
        experiment: name of the MLflow experiment.
        artifact_root: artifact root of a new MLflow experiment.
        checkpoints: folder or s3:// URI for checkpoints; by default beside the step's output.
        keep_checkpoints: number of checkpoints kept per training until it succeeds.
        resume: whether to keep a finished result whose inputs are unchanged.
        input_uris: for a rerun, the recorded URIs of the inputs, as JSON.
        required_device: description of the GPU that the step requires; without a GPU it fails.
        train_job: specification of the TrainJob that runs the step on several nodes, as JSON.
        terminal: device file of the terminal for progress bars.
        kfp_root: root folder of KFP's local runner; paths below it correspond to URIs in the run.
        run_root: folder or s3:// URI of that run.
        variants: names of the variants, in the order of the pipeline's loop, as JSON.
    """

    run_id: str | None = Field(None, alias="SCOP_RUN_ID")
    attempt: str | None = Field(None, alias="SCOP_ATTEMPT")
    image: str | None = Field(None, alias="SCOP_IMAGE")
    image_id: str | None = Field(None, alias="SCOP_IMAGE_ID")
    revision: str | None = Field(None, alias="SCOP_REVISION")
    parent_run: str | None = Field(None, alias="SCOP_PARENT_RUN_ID")
    kfp_run: str | None = Field(None, alias="KFP_RUN_ID")
    mlflow_run: str | None = Field(None, alias="MLFLOW_RUN_ID")
    experiment: str = Field("scop", alias="MLFLOW_EXPERIMENT_NAME")
    artifact_root: str | None = Field(None, alias="SCOP_ARTIFACT_ROOT")
    checkpoints: str | None = Field(None, alias="SCOP_CHECKPOINTS")
    keep_checkpoints: int = Field(2, alias="SCOP_KEEP_CHECKPOINTS", ge=1)
    resume: bool = Field(False, alias="SCOP_RESUME")
    input_uris: JsonUris = Field({}, alias="SCOP_INPUT_URIS")
    required_device: str | None = Field(None, alias="SCOP_REQUIRED_DEVICE")
    train_job: str | None = Field(None, alias="SCOP_TRAIN_JOB")
    terminal: str | None = Field(None, alias="SCOP_TERMINAL")
    kfp_root: str | None = Field(None, alias="SCOP_KFP_ROOT")
    run_root: str | None = Field(None, alias="SCOP_RUN_ROOT")
    variants: JsonList = Field([], alias="SCOP_VARIANTS")


class TorchrunEnvironment(_Variables):
    """Set by torchrun, or by Kubeflow Trainer for it.

    Attributes:
        nodes: number of pods that train together.
        node: index of this pod.
        master_address: host of the first pod.
        master_port: port of the first pod.
        world_size: number of processes; above 1 only in a process started by torchrun.
        rank: index of this process among all processes.
        local_rank: index of this process in its pod; selects its GPU.
    """

    nodes: int = Field(1, alias="PET_NNODES")
    node: int = Field(0, alias="PET_NODE_RANK")
    master_address: str | None = Field(None, alias="PET_MASTER_ADDR")
    master_port: int | None = Field(None, alias="PET_MASTER_PORT")
    world_size: int = Field(1, alias="WORLD_SIZE")
    rank: int = Field(0, alias="RANK")
    local_rank: int = Field(0, alias="LOCAL_RANK")


class ClusterEnvironment(_Variables):
    """Set by the user for `scop submit`, `watch` and `doctor`.

    Attributes:
        host: URL of the KFP API, if the cluster profile has none.
        token: bearer token for the KFP API.
        namespace: namespace of the runs, if the cluster profile has none.
    """

    host: str | None = Field(None, alias="KF_PIPELINES_ENDPOINT")
    token: str | None = Field(None, alias="KF_PIPELINES_TOKEN")
    namespace: str | None = Field(None, alias="KF_PIPELINES_NAMESPACE")


ALL: tuple[type[_Variables], ...] = (UserEnvironment, StepEnvironment, TorchrunEnvironment, ClusterEnvironment)
"""Every group of variables, for the documentation."""

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Number of CPU threads; PyTorch reads it when it is imported."""
