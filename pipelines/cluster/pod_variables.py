"""The environment variables of pods: a step's own, and those from the profile's Secrets and ConfigMaps (``AWS_*``)."""

from __future__ import annotations

from collections.abc import Mapping

from kfp import kubernetes
from kfp.dsl import PipelineTask

from pipelines.cluster.profile import ClusterProfile, StepClass, quantity
from scop.config import RunSection
from scop.environment import THREADS_VARIABLE, StepEnvironment, name_of
from scop.errors import UserError
from scop.storage.files import is_s3


def set_variables(task: PipelineTask, profile: ClusterProfile, variables: Mapping[str, str]) -> None:
    """Set a task's variables, and those of Secrets and ConfigMaps, whose content is never in the pipeline file."""
    for name, keys in profile.secrets.items():
        kubernetes.use_secret_as_env(task, name, dict(keys))
    for name, keys in profile.config_maps.items():
        kubernetes.use_config_map_as_env(task, name, dict(keys))
    for variable, value in variables.items():
        task.set_env_variable(variable, value)
    # The run ID comes from the downward API: as a parameter, it would be part of every cache key.
    kubernetes.use_field_path_as_env(task, name_of(StepEnvironment, "kfp_run"), "metadata.labels['pipeline/runid']")


def step_variables(profile: ClusterProfile, run: RunSection, name: str, kind: StepClass) -> dict[str, str]:
    """Return a step's environment variables, none of which may be secret, since they are in the pipeline file.

    Raises:
        UserError: the configuration names a local folder, which would be lost with the pod.
    """
    if run.checkpoints is not None and not is_s3(run.checkpoints):
        raise UserError(f"run.checkpoints {run.checkpoints} is lost with the pod; give an s3:// URI")
    if run.artifact_root is not None and ":/" not in run.artifact_root:
        raise UserError(f"run.artifact_root {run.artifact_root} is a folder, which is lost with the pod; give a URI")
    environment = StepEnvironment(
        image=profile.image,
        experiment=run.experiment,
        checkpoints=run.checkpoints or profile.checkpoint_root,
        keep_checkpoints=run.keep_checkpoints,
        artifact_root=run.artifact_root,
        required_device=f"class {name}: {kind}" if kind.accelerator else None,
        processes=kind.accelerator.count if kind.accelerator else 1,
    )
    return environment.as_variables() | {THREADS_VARIABLE: str(_threads(kind))}


def _threads(kind: StepClass) -> int:
    """Return the number of threads of each process; by default PyTorch uses all of the node's cores, not the pod's."""
    cores = quantity((kind.limits or kind.requests).cpu)
    return max(1, int(cores) // (kind.accelerator.count if kind.accelerator else 1))
