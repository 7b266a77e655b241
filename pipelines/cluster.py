"""A cluster profile applied to the pipeline's tasks: image, resources, nodes, secrets, retries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from pipelines.pipeline import compile_pipeline, make_pipeline
from pipelines.profile import Affinity, ClusterProfile, StepClass
from scop.config import RunSection
from scop.errors import UserError
from scop.mlflow_server import ARTIFACTS_VARIABLE, EXPERIMENT_VARIABLE
from scop.steps.record import IMAGE_VARIABLE
from scop.steps.runtime import CHECKPOINTS_VARIABLE, DEVICE_VARIABLE, KEEP_VARIABLE
from scop.tracking import KFP_RUN_VARIABLE

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
    compile_pipeline(str(path), make_pipeline(placed_by(profile, run, caching), profile.parallelism, defaults))
    if (size := path.stat().st_size) > SIZE_LIMIT:
        raise UserError(f"{path} has {size / 2**20:.0f} MiB; KFP takes pipelines up to {SIZE_LIMIT // 2**20} MiB")


def placed_by(profile: ClusterProfile, run: RunSection, caching: bool = True) -> Callable[[PipelineTask], None]:
    """What gives a task its place on the cluster."""

    def place(task: PipelineTask) -> None:
        name, kind = profile.class_of(task.name.replace("-", "_"))
        task.set_container_image(profile.image)
        if not caching:  # here, since KFP's client can change it for no version that is uploaded, nor within loops
            task.set_caching_options(False)
        _give_resources(task, kind)
        _choose_nodes(task, kind)
        _hand_in(task, profile)
        for variable, value in _variables(profile, run, name, kind).items():
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
    """What a step is told by its environment; nothing secret, for all of it is in the pipeline's file."""
    variables = {
        IMAGE_VARIABLE: profile.image,
        EXPERIMENT_VARIABLE: run.experiment,
        CHECKPOINTS_VARIABLE: run.checkpoints or profile.checkpoint_root,
        KEEP_VARIABLE: str(run.keep_checkpoints),
    }
    if run.artifact_root:
        variables[ARTIFACTS_VARIABLE] = run.artifact_root
    if kind.accelerator:
        variables[DEVICE_VARIABLE] = f"class {name}: {kind}"
    return variables


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
