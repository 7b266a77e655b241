"""The pipeline compiled for a cluster: a profile's image, resources, nodes, secrets and retries on each task."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from pipelines.cluster.pod_variables import set_variables, step_variables
from pipelines.cluster.profile import Affinity, ClusterProfile, Resources, StepClass
from pipelines.pipeline import compile_pipeline, make_pipeline
from scop.config import Config, RunSection, TrainingSection, finetune_for
from scop.environment import THREADS_VARIABLE, StepEnvironment, name_of
from scop.errors import UserError
from scop.runtime.record import EXTERNAL_FILES
from scop.runtime.train_job import TrainJobPlan
from scop.storage.files import is_s3
from scop.storage.manifest import write_atomically

_WAITING_POD = Resources(cpu="1", memory="2Gi")
"""Resources of a pod that creates a TrainJob and shows its log."""
SIZE_LIMIT = 32 * 2**20
"""Maximum size of a pipeline file in bytes that KFP's server accepts (apiserver/server/pipeline_upload_server.go)."""


def compile_for(
    profile: ClusterProfile,
    run: RunSection,
    path: Path,
    *,
    caching: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write the pipeline for a cluster as two YAML documents: the pipeline, and its Kubernetes settings.

    Args:
        profile: cluster profile.
        run: the configuration's section `run`, which is not a parameter of the pipeline.
        path: path of the file.
        caching: whether KFP may use earlier results of steps.
        defaults: default values of the parameters, by name.

    Raises:
        UserError: the file is larger than KFP accepts.
    """
    configure = task_settings(profile, run, caching)
    pipeline = make_pipeline(profile.image, configure, profile.parallelism, defaults)
    with tempfile.TemporaryDirectory(prefix="scop-") as folder:
        file = Path(folder) / "pipeline.yaml"
        compile_pipeline(str(file), pipeline)
        if (size := file.stat().st_size) > SIZE_LIMIT:
            raise UserError(
                f"the pipeline has {size / 2**20:.1f} MiB, and KFP accepts up to {SIZE_LIMIT / 2**20:.0f} MiB; compile "
                "it without -f, and pass the configuration as parameters of the run"
            )
        write_atomically(path, file.read_text(encoding="utf-8"))


def refuse_paths(config: Config) -> None:
    """Raise UserError if data or weights are at a local path, which pods cannot read."""
    for section, key in EXTERNAL_FILES:
        uri = getattr(getattr(config, section), key)
        if uri is not None and not is_s3(uri):
            raise UserError(f"{section}.{key} {uri} is a path of this machine; upload it to S3, and give its s3:// URI")


def refuse_uneven_shares(config: Config, profile: ClusterProfile) -> None:
    """Raise UserError if a training cannot be divided among the profile's GPUs as configured."""
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
                f"{name}.batch_size {size} cannot be divided evenly: {shared}; use a multiple of {processes}"
            )
    for name, section in trainings.items():
        if section.compile and section.sync_batch_norm:
            raise UserError(
                f"{name}.compile does not support sync_batch_norm, and {shared}; set {name}.sync_batch_norm: false, or "
                "compile: false"
            )


def task_settings(profile: ClusterProfile, run: RunSection, caching: bool = True) -> Callable[[PipelineTask], None]:
    """Return a function that applies a profile to a task."""

    def configure(task: PipelineTask) -> None:
        name, kind = profile.class_of(task.name.replace("-", "_"))
        variables = step_variables(profile, run, name, kind)
        if kind.nodes > 1:
            plan = train_job_plan(profile, kind, variables)
            # The pod itself only creates the TrainJob and waits; the deadline is that of the job.
            variables[name_of(StepEnvironment, "train_job")] = plan.model_dump_json(exclude_defaults=True)
            del variables[THREADS_VARIABLE]
            variables.pop(name_of(StepEnvironment, "required_device"), None)
            kind = profile.classes.cpu.model_copy(
                update={
                    "requests": _WAITING_POD,
                    "limits": None,
                    "accelerator": None,
                    "shared_memory": None,
                    "timeout": None,
                    "retries": kind.retries,
                }
            )
        if not caching:  # KFP's client cannot change it for an uploaded version or within loops
            task.set_caching_options(False)
        _set_resources(task, kind)
        _select_nodes(task, kind)
        _set_security(task, profile)
        set_variables(task, profile, variables)
        retries = kind.retries
        if retries.count:
            task.set_retry(retries.count, retries.backoff, retries.factor, retries.max_backoff)
        if kind.timeout:
            kubernetes.set_timeout(task, kind.timeout)

    return configure


def train_job_plan(profile: ClusterProfile, kind: StepClass, variables: Mapping[str, str]) -> TrainJobPlan:
    """Return the specification of the TrainJob of a training step on several nodes.

    Args:
        profile: cluster profile.
        kind: class of the step.
        variables: environment variables of the step.
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
    """Return node affinity in Kubernetes' form: all required expressions must hold; preferred ones have weights."""
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


def _set_resources(task: PipelineTask, kind: StepClass) -> None:
    limits = kind.limits or kind.requests
    task.set_cpu_request(kind.requests.cpu).set_cpu_limit(limits.cpu)
    task.set_memory_request(kind.requests.memory).set_memory_limit(limits.memory)
    if kind.accelerator:
        task.set_accelerator_type(kind.accelerator.resource).set_accelerator_limit(kind.accelerator.count)
    if kind.shared_memory:
        kubernetes.empty_dir_mount(
            task, volume_name="shared-memory", mount_path="/dev/shm", medium="Memory", size_limit=kind.shared_memory
        )


def _select_nodes(task: PipelineTask, kind: StepClass) -> None:
    for key, value in kind.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in kind.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for affinity in kind.affinity:
        kubernetes.add_node_affinity(task, match_expressions=[_expression(affinity)], weight=affinity.weight)


def _expression(affinity: Affinity) -> dict[str, Any]:
    return {"key": affinity.key, "operator": affinity.operator, "values": affinity.values}


def _set_security(task: PipelineTask, profile: ClusterProfile) -> None:
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
    context = profile.security_context.model_dump(exclude_none=True)
    if context:
        kubernetes.set_security_context(task, **context)
