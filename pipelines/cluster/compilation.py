"""A cluster profile applied to the pipeline's tasks: image, resources, nodes, secrets, retries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from pipelines.cluster.profile import Affinity, ClusterProfile, Resources, StepClass, quantity
from pipelines.pipeline import compile_pipeline, make_pipeline
from scop.config import Config, RunSection, TrainingSection, finetune_for
from scop.errors import UserError
from scop.runtime.execution import DEVICE_VARIABLE
from scop.runtime.processes import PROCESSES_VARIABLE
from scop.runtime.record import EXTERNAL_FILES, IMAGE_VARIABLE
from scop.runtime.resume import CHECKPOINTS_VARIABLE, KEEP_VARIABLE
from scop.runtime.train_job import TRAIN_JOB_VARIABLE, TrainJobPlan
from scop.storage import files as storage
from scop.storage.manifest import write_atomically
from scop.tracking.mlflow import KFP_RUN_VARIABLE
from scop.tracking.server import ARTIFACTS_VARIABLE, EXPERIMENT_VARIABLE

THREADS_VARIABLE = "OMP_NUM_THREADS"
_WAITING = Resources(cpu="1", memory="2Gi")  # of a pod that makes a TrainJob and shows its log
SIZE_LIMIT = 32 * 2**20
"""Of a pipeline file, in bytes: what KFP's server accepts (apiserver/server/pipeline_upload_server.go)."""


def compile_for(
    profile: ClusterProfile,
    run: RunSection,
    path: Path,
    *,
    caching: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write the pipeline for a cluster as YAML of two documents: the pipeline, and its platform Kubernetes.

    Args:
        profile: of the cluster.
        run: the configuration's section, which is no parameter of the pipeline.
        path: of the file.
        caching: whether KFP may take a step's earlier result.
        defaults: of the parameters, by name.

    Raises:
        UserError: the file is larger than KFP accepts.
    """
    pipeline = make_pipeline(placed_by(profile, run, caching), profile.parallelism, defaults)
    with tempfile.TemporaryDirectory(prefix="scop-") as folder:
        file = Path(folder) / "pipeline.yaml"
        compile_pipeline(str(file), pipeline)
        if (size := file.stat().st_size) > SIZE_LIMIT:
            raise UserError(
                f"the pipeline would have {size / 2**20:.1f} MiB, and KFP takes pipelines up to "
                f"{SIZE_LIMIT / 2**20:.0f} MiB; compile it without -f, and give the configuration when it is run"
            )
        write_atomically(path, file.read_text(encoding="utf-8"))


def refuse_paths(config: Config) -> None:
    """Raise UserError where data or weights are named by a path of this machine, which no pod has."""
    for section, key in EXTERNAL_FILES:
        place = getattr(getattr(config, section), key)
        if place is not None and not storage.is_uri(place):
            raise UserError(
                f"{section}.{key} {place} is a path of this machine; put it into S3, and name its s3:// URI"
            )


def refuse_uneven_shares(config: Config, profile: ClusterProfile) -> None:
    """Raise UserError where the profile's GPUs cannot share a training as configured; a pod would find it out late."""
    kind = profile.classes.gpu
    count = kind.accelerator.count if kind.accelerator else 1
    if (processes := count * kind.nodes) == 1:
        return
    shared = f"classes.gpu of the cluster profile has {kind.nodes} x {count} processes"
    trainings: dict[str, TrainingSection] = {"dense": config.dense}
    for variant in config.variants:
        name = f"variants ({variant.label}).finetune" if variant.finetune else "finetune"
        trainings[name] = finetune_for(config.finetune, variant)
    sizes = {name: section.batch_size for name, section in trainings.items()} | {"knockoff": config.knockoff.batch_size}
    for name, size in sizes.items():
        if size % processes:
            raise UserError(
                f"{name}.batch_size {size} cannot be shared evenly: {shared}; take a multiple of {processes}"
            )
    for name, section in trainings.items():
        if section.compile and section.sync_batch_norm:
            raise UserError(
                f"{name}.compile cannot synchronise batch norms, and {shared}; set {name}.sync_batch_norm: false, or "
                "compile: false"
            )


def placed_by(profile: ClusterProfile, run: RunSection, caching: bool = True) -> Callable[[PipelineTask], None]:
    """What gives a task its place on the cluster."""

    def place(task: PipelineTask) -> None:
        name, kind = profile.class_of(task.name.replace("-", "_"))
        variables = _variables(profile, run, name, kind)
        if kind.nodes > 1:
            plan = train_job_plan(profile, kind, variables)
            # Its pod only makes the TrainJob, and waits; that is done by the job's deadline, or not at all.
            variables[TRAIN_JOB_VARIABLE] = plan.model_dump_json(exclude_defaults=True)
            del variables[THREADS_VARIABLE]
            variables.pop(DEVICE_VARIABLE, None)
            kind = profile.classes.cpu.model_copy(
                update={
                    "requests": _WAITING,
                    "limits": None,
                    "accelerator": None,
                    "shared_memory": None,
                    "timeout": None,
                    "retries": kind.retries,
                }
            )
        task.set_container_image(profile.image)
        if not caching:  # here, since KFP's client can change it for no version that is uploaded, nor within loops
            task.set_caching_options(False)
        _give_resources(task, kind)
        _choose_nodes(task, kind)
        _hand_in(task, profile)
        for variable, value in variables.items():
            task.set_env_variable(variable, value)
        # The run's id by the downward API: as a parameter it would be part of every cache key.
        kubernetes.use_field_path_as_env(task, KFP_RUN_VARIABLE, "metadata.labels['pipeline/runid']")
        retries = kind.retries
        if retries.count:
            task.set_retry(retries.count, retries.backoff, retries.factor, retries.max_backoff)
        if kind.timeout:
            kubernetes.set_timeout(task, kind.timeout)

    return place


def _variables(profile: ClusterProfile, run: RunSection, name: str, kind: StepClass) -> dict[str, str]:
    """What a step is told by its environment; nothing secret, for all of it is in the pipeline's file.

    Raises:
        UserError: the configuration names a folder, which a pod would lose.
    """
    if run.checkpoints is not None and not storage.is_uri(run.checkpoints):
        raise UserError(f"run.checkpoints {run.checkpoints} is no place that outlives a pod; name an s3:// URI")
    if run.artifact_root is not None and ":/" not in run.artifact_root:
        raise UserError(f"run.artifact_root {run.artifact_root} is a folder, which a pod does not keep; name a URI")
    variables = {
        IMAGE_VARIABLE: profile.image,
        EXPERIMENT_VARIABLE: run.experiment,
        CHECKPOINTS_VARIABLE: run.checkpoints or profile.checkpoint_root,
        KEEP_VARIABLE: str(run.keep_checkpoints),
        THREADS_VARIABLE: str(_threads(kind)),
    }
    if run.artifact_root:
        variables[ARTIFACTS_VARIABLE] = run.artifact_root
    if kind.accelerator:
        variables[DEVICE_VARIABLE] = f"class {name}: {kind}"
        if kind.accelerator.count > 1:
            variables[PROCESSES_VARIABLE] = str(kind.accelerator.count)
    return variables


def _threads(kind: StepClass) -> int:
    """For each process; PyTorch by itself would take all of the node's cores, whatever the pod may use of them."""
    cores = quantity((kind.limits or kind.requests).cpu)
    return max(1, int(cores) // (kind.accelerator.count if kind.accelerator else 1))


def train_job_plan(profile: ClusterProfile, kind: StepClass, variables: Mapping[str, str]) -> TrainJobPlan:
    """What the TrainJob of a training step on several nodes is made of.

    Args:
        profile: of the cluster.
        kind: the step's class.
        variables: of the step's environment.
    """
    accelerator = {kind.accelerator.resource: str(kind.accelerator.count)} if kind.accelerator else {}
    tolerations = [
        {"tolerationSeconds" if key == "toleration_seconds" else key: value for key, value in entry.items()}
        for entry in (toleration.model_dump(exclude_none=True) for toleration in kind.tolerations)
    ]
    context = profile.security_context
    user = {"runAsUser": context.run_as_user, "runAsGroup": context.run_as_group}
    user |= {"runAsNonRoot": context.run_as_non_root}
    pod = {
        "node_selector": kind.node_selector,
        "tolerations": tolerations,
        "affinity": _node_affinity(kind.affinity),
        "image_pull_secrets": [{"name": name} for name in profile.image_pull_secrets],
        "security_context": {key: value for key, value in user.items() if value is not None},
    }
    return TrainJobPlan(
        runtime=profile.training_runtime,
        image=profile.image,
        nodes=kind.nodes,
        processes=kind.accelerator.count if kind.accelerator else 1,
        resources={**kind.requests.model_dump(), **accelerator},
        environment=dict(variables),
        secrets=profile.secrets,
        config_maps=profile.config_maps,
        pod={key: value for key, value in pod.items() if value},
        shared_memory=kind.shared_memory,
        deadline=kind.timeout,
    )


def _node_affinity(entries: Sequence[Affinity]) -> dict[str, Any]:
    """In Kubernetes' own form: required expressions hold together, preferred ones have a weight each."""
    required = [_expression(entry) for entry in entries if entry.weight is None]
    preferred = [
        {"weight": entry.weight, "preference": {"matchExpressions": [_expression(entry)]}}
        for entry in entries
        if entry.weight is not None
    ]
    affinity: dict[str, Any] = {}
    if required:
        terms = {"nodeSelectorTerms": [{"matchExpressions": required}]}
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = terms
    if preferred:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return {"nodeAffinity": affinity} if affinity else {}


def _give_resources(task: PipelineTask, kind: StepClass) -> None:
    limits = kind.limits or kind.requests
    task.set_cpu_request(kind.requests.cpu).set_cpu_limit(limits.cpu)
    task.set_memory_request(kind.requests.memory).set_memory_limit(limits.memory)
    if kind.accelerator:
        task.set_accelerator_type(kind.accelerator.resource).set_accelerator_limit(kind.accelerator.count)
    if kind.shared_memory:
        kubernetes.empty_dir_mount(
            task, volume_name="shared-memory", mount_path="/dev/shm", medium="Memory", size_limit=kind.shared_memory
        )


def _choose_nodes(task: PipelineTask, kind: StepClass) -> None:
    for key, value in kind.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in kind.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for affinity in kind.affinity:
        kubernetes.add_node_affinity(task, match_expressions=[_expression(affinity)], weight=affinity.weight)


def _expression(affinity: Affinity) -> dict[str, Any]:
    return {"key": affinity.key, "operator": affinity.operator, "values": affinity.values}


def _hand_in(task: PipelineTask, profile: ClusterProfile) -> None:
    """Secrets and ConfigMaps by name: their content is never in the pipeline's file."""
    for name, variables in profile.secrets.items():
        kubernetes.use_secret_as_env(task, name, dict(variables))
    for name, variables in profile.config_maps.items():
        kubernetes.use_config_map_as_env(task, name, dict(variables))
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
    context = profile.security_context.model_dump(exclude_none=True)
    if context:
        kubernetes.set_security_context(task, **context)
