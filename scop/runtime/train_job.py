"""A training step on several nodes: a TrainJob of Kubeflow Trainer, from the same image and by the same command.

The step's own pod, which KFP started, needs no GPU: it makes the TrainJob, shows its log, and waits for its end. The
nodes fetch the inputs from S3 themselves; the first of them has the step's life (record, tracking run, outputs).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict

from scop.config.parsing import Section
from scop.errors import UserError, first_line
from scop.runtime.places import Places, each, exchanged
from scop.runtime.record import earlier_record
from scop.runtime.result import StepResult
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.storage.manifest import RECORD
from scop.tracking.mlflow import KFP_RUN_VARIABLE

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient

TRAIN_JOB_VARIABLE = "SCOP_TRAIN_JOB"
"""Set on a cluster for a step that several nodes share: a `TrainJobPlan` in JSON."""

# What the nodes are told of the environment of the step's own pod. All of it is readable in the TrainJob: no secret.
_HANDED_ON = (
    KFP_RUN_VARIABLE,
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
)
_CONTAINER = "node"  # by Kubeflow Trainer's convention
_SECONDS_BETWEEN_LOOKS = 5.0
_FAILURES_BORNE = 24
_LOOKS_FOR_REMOVAL = 60


class TrainJobPlan(BaseModel):
    """What a TrainJob is made of; secrets by name only.

    Attributes:
        runtime: the training runtime that it is based on.
        image: that the nodes run.
        nodes: so many.
        processes: on each.
        resources: of each node, by Kubernetes' names.
        environment: further variables.
        secrets, config_maps: which keys of which object become which environment variables.
        pod: entries of the pod's specification, in Kubernetes' form.
        shared_memory: size of /dev/shm.
        deadline: after so many seconds it is ended.
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


def planned() -> TrainJobPlan | None:
    """The plan that the environment holds, or None."""
    text = os.environ.get(TRAIN_JOB_VARIABLE)
    return TrainJobPlan.model_validate_json(text) if text else None


def run(plan: TrainJobPlan, step: str, settings: Section, inputs: Places, outputs: Mapping[str, str]) -> StepResult:
    """Have a TrainJob do a step, and wait for it.

    A job that an earlier try of this very step has left is gone on with, if it still runs. If this process is told to
    end, the job is removed: its pods then write a checkpoint, and nothing goes on unseen.

    Raises:
        UserError: an input or output is not in S3, Kubernetes refuses, or the step does.
        SystemExit: with the step's own code, where it lacked a device or was told to stop.
        RuntimeError: the job failed.
    """
    sources = each(inputs, lambda _, place: exchanged(place))
    targets = {name: exchanged(place) for name, place in outputs.items()}
    for place in [*(p for v in sources.values() for p in (v if isinstance(v, list) else [v])), *targets.values()]:
        if not storage.is_uri(place):
            raise UserError(f"{place} is a path of this pod; several nodes need inputs and outputs in S3")
    command = _command(step, settings, sources, targets)
    told = {key: os.environ[key] for key in _HANDED_ON if key in os.environ and "@" not in os.environ[key]}
    name = _name(step, [*command, told.get(KFP_RUN_VARIABLE, "")])
    client = _client()
    if _status(client, name) == "Complete" and (result := _made_already(targets)) is not None:
        print(f"TrainJob {name} has done it already", flush=True)  # while this step's pod was lost
        return result
    try:
        if not _runs_already(client, name):
            # An earlier try's record would pass for this one's.
            storage.delete(next(iter(targets.values())), [RECORD])
            _create(client, plan, name, command, told)
        succeeded = _follow(client, name)
    except BaseException:
        with contextlib.suppress(Exception):
            client.delete_job(name)
        raise
    record = earlier_record(next(iter(targets.values())))
    if succeeded and record is not None and record.result is not None:
        return record.result
    if record is None or not record.error:
        raise RuntimeError(f"TrainJob {name} failed; its pods' logs may tell why")
    if record.code == 2:
        raise UserError(record.error)
    if record.code not in (None, 1):  # no device, or told to stop
        print(f"scop: error: {step}: {record.error}", file=sys.stderr, flush=True)
        raise SystemExit(record.code)
    raise RuntimeError(f"TrainJob {name} failed: {record.error}")


def _made_already(targets: Mapping[str, str]) -> StepResult | None:
    """The result of a job that came to its end, where all that it made is there."""
    try:
        record = earlier_record(next(iter(targets.values())))
    except UserError:
        return None
    done = record is not None and record.status == "done" and all(remote.stands(place) for place in targets.values())
    return record.result if record is not None and done else None


def _command(step: str, settings: Section, sources: Places, targets: Mapping[str, str]) -> list[str]:
    """The step by the command line; a whole section is set in YAML, in which JSON's 1e-05 would be text."""
    sections = settings.model_dump(mode="json", exclude_none=True)
    if "variant" in sections:
        sections["variants"] = [sections.pop("variant")]
    command = ["scop", "step", step]
    for section, values in sections.items():
        command += ["--set", f"{section}={yaml.safe_dump(values, default_flow_style=True, width=math.inf).strip()}"]
    for key, value in sources.items():
        for place in value if isinstance(value, list) else [value]:
            command += ["--input", f"{key}={place}"]
    for key, place in targets.items():
        command += ["--output", f"{key}={place}"]
    return command


def _name(step: str, made_of: list[str]) -> str:
    """The same for each try of one step, so that a retry finds what the first one started."""
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    return f"scop-{step.replace('_', '-')}-{digest[:12]}"


def _client() -> TrainerClient:
    from kubeflow.trainer import TrainerClient

    # It warns where it may not read Kubeflow Trainer's version, for which a step's service account has no right.
    logging.getLogger("kubeflow").setLevel(logging.ERROR)
    try:
        return TrainerClient()
    except Exception as error:
        raise UserError(f"Kubernetes cannot be reached from here ({first_line(error)}); see docs/cluster.md") from error


def _runs_already(client: TrainerClient, name: str) -> bool:
    """Whether an earlier try's job still runs; one that ended is removed."""
    status = _status(client, name)
    if status not in (None, "Complete", "Failed"):
        print(f"TrainJob {name} runs already; going on with it", flush=True)
        return True
    if status is not None:
        client.delete_job(name)
        for _ in islice(_looks(), _LOOKS_FOR_REMOVAL):
            if _status(client, name) is None:
                break
    return False


def _create(client: TrainerClient, plan: TrainJobPlan, name: str, command: list[str], told: dict[str, str]) -> None:
    from kubeflow.trainer import CustomTrainerContainer
    from kubeflow.trainer.options import ActiveDeadlineSeconds, Name, TrainerCommand

    environment = {**plan.environment, **told, "SCOP_PROCESSES": str(plan.processes)}
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
            f"TrainJob {name} cannot be made ({cause}); is Kubeflow Trainer there with the runtime {plan.runtime!r}, "
            "and may this pod's service account make TrainJobs? see docs/cluster.md"
        ) from error
    processes = f", {plan.processes} processes on each" if plan.processes > 1 else ""
    print(f"TrainJob {name}: {plan.nodes} nodes{processes}", flush=True)


def _patch(plan: TrainJobPlan) -> Any:
    """Secrets, places and shared memory, which a trainer's own entries do not take."""
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
    """Kubeflow Trainer's word for the job's state, or None where there is no such job."""
    try:
        return str(client.get_job(name).status)
    except RuntimeError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return None
        raise


def _follow(client: TrainerClient, name: str) -> bool:
    """Show the first node's log until the job has ended; whether it succeeded."""
    shown, failures = 0, 0
    for _ in _looks():
        try:
            # A connection that breaks is made anew, and the log begins again.
            for line in islice(client.get_job_logs(name, follow=True), shown, None):
                print(line, flush=True)
                shown += 1
            if (status := _status(client, name)) in ("Complete", "Failed", None):
                return status == "Complete"
            failures = 0
        except (RuntimeError, TimeoutError, OSError) as error:
            failures += 1
            if failures > _FAILURES_BORNE:
                raise RuntimeError(f"TrainJob {name} cannot be watched any more: {first_line(error)}") from error
    raise AssertionError("there is always another look")


def _looks() -> Iterator[None]:
    """At once, and then every few seconds, for ever."""
    while True:
        yield
        time.sleep(_SECONDS_BETWEEN_LOOKS)
