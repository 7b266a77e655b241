"""A training step on several nodes: a TrainJob of Kubeflow Trainer, from the same image.

The step's own pod, started by KFP, needs no GPU: it creates the TrainJob, prints its log and waits until it ends. The
nodes fetch the inputs from S3; the first node writes the record, the MLflow run and the outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict

from scop.config.parsing import Section
from scop.environment import StepEnvironment, name_of
from scop.errors import Stopped, UserError, first_line
from scop.runtime.exit_codes import ExitCode, NoDeviceError, Status
from scop.runtime.record import read_record
from scop.runtime.result import StepResult
from scop.runtime.uris import Uris, flatten, map_values, shared_uri
from scop.storage.files import delete_files, is_s3
from scop.storage.folders import is_complete
from scop.storage.manifest import RECORD

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient

logger = logging.getLogger(__name__)

_PASSED_ON = ("kfp_run", "tracking_uri", "mlflow_run", "experiment")
"""Environment variables of the step's own pod that are passed to the nodes. They are visible in the TrainJob, so they
must not be secret."""
_CONTAINER = "node"  # Kubeflow Trainer's convention
_POLL_SECONDS = 5.0
_TOLERATED_FAILURES = 24
_POLLS_FOR_REMOVAL = 60


class TrainJobPlan(BaseModel):
    """The specification of a TrainJob; it contains only the names of secrets.

    Attributes:
        runtime: name of the training runtime.
        image: image of the nodes.
        nodes: number of nodes.
        processes: number of processes on each node.
        resources: resources of each node, by Kubernetes name.
        environment: additional environment variables.
        secrets: for each Secret, environment variables by key.
        config_maps: the same for ConfigMaps.
        pod: fields of the Kubernetes pod specification.
        shared_memory: size of /dev/shm.
        deadline: time limit of the job, in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    image: str
    nodes: int
    processes: int
    resources: dict[str, str]
    environment: dict[str, str] = {}
    secrets: dict[str, dict[str, str]] = {}
    config_maps: dict[str, dict[str, str]] = {}
    pod: dict[str, Any] = {}
    shared_memory: str | None = None
    deadline: int | None = None


def run(
    plan: TrainJobPlan,
    step: str,
    settings: Section,
    inputs: Uris,
    outputs: Mapping[str, str],
    environment: StepEnvironment,
) -> StepResult:
    """Run a step as a TrainJob and wait for it.

    If the job of an earlier attempt is still running, it is followed. If a signal stops this process, the job is
    deleted, and its pods write a checkpoint.

    Args:
        plan: specification of the job.
        step: name of the step.
        settings: configuration of the step.
        inputs, outputs: URIs by name.
        environment: variables set by the launcher for this pod.

    Raises:
        UserError: an input or output is not in S3, Kubernetes rejects the job, or the step reports a user's mistake.
        NoDeviceError: a node lacks a GPU.
        Stopped: the step was stopped.
        RuntimeError: the job failed.
    """
    sources = map_values(inputs, lambda _, uri: shared_uri(uri))
    targets = {name: shared_uri(uri) for name, uri in outputs.items()}
    for uri in [*flatten(sources), *targets.values()]:
        if not is_s3(uri):
            raise UserError(f"{uri} is a path of this pod; with several nodes, inputs and outputs must be in S3")
    command = _command(step, settings, sources, targets)
    passed = environment.model_copy(update={"kfp_root": None}).as_variables()
    names = {name_of(StepEnvironment, field) for field in _PASSED_ON}
    passed = {key: value for key, value in passed.items() if key in names and "@" not in value}
    name = _name(step, [*command, environment.kfp_run or ""])
    client = _client()
    if _status(client, name) == "Complete" and (result := _finished_result(targets)) is not None:
        logger.info("TrainJob %s has already finished", name)  # this step's pod was lost
        return result
    try:
        if not _is_running(client, name):
            # The record of an earlier attempt must not be mistaken for that of this one.
            delete_files(next(iter(targets.values())), [RECORD])
            _create(client, plan, name, command, passed)
        succeeded = _follow(client, name)
    except BaseException:
        with contextlib.suppress(Exception):
            client.delete_job(name)
        raise
    record = read_record(next(iter(targets.values())))
    if succeeded and record is not None and record.result is not None:
        return record.result
    if record is None or not record.error:
        raise RuntimeError(f"TrainJob {name} failed; see the logs of its pods")
    match record.exit_code:
        case ExitCode.USER_ERROR:
            raise UserError(record.error)
        case ExitCode.NO_DEVICE:
            raise NoDeviceError(record.error)
        case ExitCode.TERMINATED:
            raise Stopped(record.error)
    raise RuntimeError(f"TrainJob {name} failed: {record.error}")


def _finished_result(targets: Mapping[str, str]) -> StepResult | None:
    """Return the result of a finished job, or None if an output is incomplete."""
    try:
        record = read_record(next(iter(targets.values())))
    except UserError:
        return None
    done = record is not None and record.status is Status.DONE and all(map(is_complete, targets.values()))
    return record.result if record is not None and done else None


def _command(step: str, settings: Section, sources: Uris, targets: Mapping[str, str]) -> list[str]:
    """Return the `scop step` command line. Sections are YAML, since YAML parsers read JSON's 1e-05 as text."""
    sections = settings.model_dump(mode="json", exclude_none=True)
    if "variant" in sections:
        sections["variants"] = [sections.pop("variant")]
    command = ["scop", "step", step]
    for section, values in sections.items():
        command += ["--set", f"{section}={yaml.safe_dump(values, default_flow_style=True, width=math.inf).strip()}"]
    for key, value in sources.items():
        for uri in value if isinstance(value, list) else [value]:
            command += ["--input", f"{key}={uri}"]
    for key, uri in targets.items():
        command += ["--output", f"{key}={uri}"]
    return command


def _name(step: str, parts: list[str]) -> str:
    """Return the job's name, the same for each attempt of a step, so that a retry finds the first attempt's job."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"scop-{step.replace('_', '-')}-{digest[:12]}"


def _client() -> TrainerClient:
    from kubeflow.trainer import TrainerClient

    # The client warns that it cannot read Kubeflow Trainer's version: a step's service account may not.
    logging.getLogger("kubeflow").setLevel(logging.ERROR)
    try:
        return TrainerClient()
    except Exception as error:
        raise UserError(f"the Kubernetes API cannot be reached ({first_line(error)}); see docs/cluster.md") from error


def _is_running(client: TrainerClient, name: str) -> bool:
    """Whether the job of an earlier attempt is running; a finished one is deleted."""
    status = _status(client, name)
    if status not in (None, "Complete", "Failed"):
        logger.info("TrainJob %s is already running; following it", name)
        return True
    if status is not None:
        client.delete_job(name)
        for _ in islice(_polls(), _POLLS_FOR_REMOVAL):
            if _status(client, name) is None:
                break
    return False


def _create(client: TrainerClient, plan: TrainJobPlan, name: str, command: list[str], passed: dict[str, str]) -> None:
    from kubeflow.trainer import CustomTrainerContainer
    from kubeflow.trainer.options import ActiveDeadlineSeconds, Name, TrainerCommand

    environment = {**plan.environment, **passed, name_of(StepEnvironment, "processes"): str(plan.processes)}
    trainer = CustomTrainerContainer(
        image=plan.image, num_nodes=plan.nodes, resources_per_node=dict(plan.resources), env=environment
    )
    options = [Name(name), TrainerCommand(command), _patch(plan)]
    if plan.deadline:
        options.append(ActiveDeadlineSeconds(plan.deadline))
    try:
        client.train(runtime=plan.runtime, trainer=trainer, options=options)
    except Exception as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(
            f"TrainJob {name} cannot be created ({cause}); check that Kubeflow Trainer is installed with the runtime "
            f"{plan.runtime!r}, and that this pod's service account may create TrainJobs; see docs/cluster.md"
        ) from error
    processes = f", {plan.processes} processes each" if plan.processes > 1 else ""
    logger.info("TrainJob %s: %d nodes%s", name, plan.nodes, processes)


def _patch(plan: TrainJobPlan) -> Any:
    """Return the secrets, nodes and shared memory, for which CustomTrainerContainer has no fields."""
    from kubeflow.trainer.options import (
        ContainerPatch,
        JobSetSpecPatch,
        JobSetTemplatePatch,
        JobSpecPatch,
        JobTemplatePatch,
        PodSpecPatch,
        PodTemplatePatch,
        ReplicatedJobPatch,
        RuntimePatch,
        TrainingRuntimeSpecPatch,
    )

    variables = [
        {"name": variable, "valueFrom": {kind: {"name": name, "key": key}}}
        for kind, objects in (("secretKeyRef", plan.secrets), ("configMapKeyRef", plan.config_maps))
        for name, keys in objects.items()
        for key, variable in keys.items()
    ]
    mounts, volumes = None, None
    if plan.shared_memory:
        mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
        volumes = [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": plan.shared_memory}}]
    container = ContainerPatch(name=_CONTAINER, env=variables or None, volume_mounts=mounts)
    pod = PodSpecPatch(containers=[container], volumes=volumes, **plan.pod)
    job = JobTemplatePatch(spec=JobSpecPatch(template=PodTemplatePatch(spec=pod)))
    jobs = JobSetSpecPatch(replicated_jobs=[ReplicatedJobPatch(name=_CONTAINER, template=job)])
    return RuntimePatch(training_runtime_spec=TrainingRuntimeSpecPatch(template=JobSetTemplatePatch(spec=jobs)))


def _status(client: TrainerClient, name: str) -> str | None:
    """Return the job's state as Kubeflow Trainer reports it, or None if there is no such job."""
    try:
        return str(client.get_job(name).status)
    except RuntimeError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return None
        raise


def _follow(client: TrainerClient, name: str) -> bool:
    """Print the first node's log until the job ends; return whether it succeeded."""
    shown, failures = 0, 0
    for _ in _polls():
        try:
            # After a lost connection, the log starts from the beginning.
            for line in islice(client.get_job_logs(name, follow=True), shown, None):
                logger.info("%s", line)
                shown += 1
            if (status := _status(client, name)) in ("Complete", "Failed", None):
                return status == "Complete"
            failures = 0
        except (RuntimeError, TimeoutError, OSError) as error:
            failures += 1
            if failures > _TOLERATED_FAILURES:
                raise RuntimeError(f"TrainJob {name} can no longer be followed: {first_line(error)}") from error
    raise AssertionError("polling never ends")


def _polls() -> Iterator[None]:
    """Yield immediately, and then every few seconds."""
    while True:
        yield
        time.sleep(_POLL_SECONDS)
