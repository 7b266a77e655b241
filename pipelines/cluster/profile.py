"""Cluster profiles: the settings of the cluster that a pipeline runs on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scop.config import PositiveInt
from scop.config.parsing import Section, override, parse, read_yaml
from scop.runtime.registry import STEPS, TRAINING_STEPS

# Kubernetes quantities (k8s.io/apimachinery, resource.Quantity) in the forms that KFP accepts: 500m, 2, 1.5; 8Gi.
Cores = Annotated[str, Field(pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$", coerce_numbers_to_str=True)]
Bytes = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(K|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", coerce_numbers_to_str=True)]
Duration = Annotated[str, Field(pattern=r"^[0-9]+(s|m|h)$")]
# Names of Kubernetes objects and of environment variables.
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


_FACTORS = {"m": 1e-3} | {prefix: 1000.0**n for n, prefix in enumerate("KMGTP", 1)}
_FACTORS |= {f"{prefix}i": 1024.0**n for n, prefix in enumerate("KMGTP", 1)}


def quantity(text: str) -> float:
    """Convert `Cores` to a number of cores, or `Bytes` to a number of bytes."""
    number = text.rstrip("mKMGTPi")
    return float(number) * _FACTORS.get(text[len(number) :], 1.0)


class Resources(Section):
    """CPU and memory.

    Attributes:
        cpu: number of cores, such as 2 or 500m.
        memory: bytes, such as 8Gi.
    """

    cpu: Cores
    memory: Bytes


class Accelerator(Section):
    """GPUs of a step.

    Attributes:
        resource: resource name that the cluster's device plugin provides.
        count: number of GPUs per pod; training runs one process per GPU.
    """

    resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = "nvidia.com/gpu"
    count: PositiveInt = 1


class Toleration(Section):
    """A toleration of the step's pod, with the fields of a Kubernetes toleration.

    Attributes:
        key, operator, value, effect: the taint to tolerate.
        toleration_seconds: how long a NoExecute taint is tolerated, in seconds.
    """

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None

    @model_validator(mode="after")
    def _means_something(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a toleration with operator Exists takes no value; remove it")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration without a key requires operator: Exists")
        return self


class Affinity(Section):
    """One match expression of Kubernetes' node affinity, required or preferred.

    Attributes:
        key, operator, values: condition on a node's labels.
        weight: 1 to 100 makes the condition a preference; without a weight it is required.
    """

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: list[str] = []
    weight: Annotated[int, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _has_values(self) -> Affinity:
        if (self.operator in ("Exists", "DoesNotExist")) == bool(self.values):
            raise ValueError(f"operator {self.operator} {'takes no' if self.values else 'requires'} values")
        return self


class Retries(Section):
    """Retries after a pod fails or is preempted; training resumes from its checkpoint.

    Attributes:
        count: maximum number of retries.
        backoff: wait before the first retry.
        factor: factor by which the wait grows after each retry.
        max_backoff: maximum wait.
    """

    count: Annotated[int, Field(ge=0, le=20)] = 3
    backoff: Duration = "30s"
    factor: Annotated[float, Field(ge=1, le=10)] = 2.0
    max_backoff: Duration = "10m"


class StepClass(Section):
    """Resources, node selection and retries of a class of steps.

    Attributes:
        requests: resource requests.
        limits: resource limits; default: the requests.
        accelerator: GPUs; default: none.
        node_selector: labels that a node must have.
        tolerations: taints that the pods tolerate.
        affinity: further conditions on nodes.
        shared_memory: size of /dev/shm, which the processes on several GPUs use to communicate; default: Kubernetes'
            64 MiB.
        timeout: time limit of a pod, in seconds.
        retries: retries after failure or preemption.
        nodes: number of pods that train together, as a TrainJob of Kubeflow Trainer; class gpu only.
    """

    requests: Resources
    limits: Resources | None = None
    accelerator: Accelerator | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    affinity: list[Affinity] = []
    shared_memory: Bytes | None = None
    timeout: PositiveInt | None = None
    retries: Retries = Retries()
    nodes: PositiveInt = 1

    @model_validator(mode="after")
    def _limits_fit(self) -> StepClass:
        if self.limits is None:
            return self
        for key in ("cpu", "memory"):
            request, limit = getattr(self.requests, key), getattr(self.limits, key)
            if quantity(limit) < quantity(request):
                raise ValueError(f"limits.{key} {limit} is below requests.{key} {request}")
        return self

    def __str__(self) -> str:
        """Describe the requested device, for the error of a step that does not find it."""
        wanted = f"{self.accelerator.resource} x{self.accelerator.count}" if self.accelerator else "no accelerator"
        labels = ", ".join(f"{key}={value}" for key, value in self.node_selector.items()) or "none"
        return f"resource {wanted}, node selector {labels}"


class Classes(Section):
    """The two classes of steps.

    Attributes:
        cpu: all steps except training.
        gpu: the training steps train_dense, train_knockoff and finetune.
    """

    cpu: StepClass
    gpu: StepClass

    @model_validator(mode="after")
    def _only_training_has_nodes(self) -> Classes:
        if self.cpu.nodes > 1:
            raise ValueError(f"cpu.nodes is {self.cpu.nodes} but must be 1; only class gpu supports several nodes")
        if self.gpu.nodes > 1 and self.gpu.limits:
            raise ValueError("remove gpu.limits: with gpu.nodes > 1, a TrainJob uses its requests as limits")
        return self


class SecurityContext(Section):
    """Security context of the containers; the image works with any user ID in group 0.

    Attributes:
        run_as_user, run_as_group, run_as_non_root: the fields of a Kubernetes security context.
    """

    run_as_user: Annotated[int, Field(ge=0)] | None = 10001
    run_as_group: Annotated[int, Field(ge=0)] | None = 0
    run_as_non_root: bool | None = True


class ClusterProfile(Section):
    """A cluster profile.

    Attributes:
        image: image of all steps, by digest: REGISTRY/NAME@sha256:...
        require_digest: reject an image that is named by a tag, because tags can move.
        pipeline_root: s3:// URI below which KFP stores the artifacts of runs.
        checkpoints: s3:// URI for checkpoints; default: checkpoints/ below the pipeline root.
        host: URL of KFP's API; default: KF_PIPELINES_ENDPOINT, or what KFP's client finds.
        namespace: namespace of the runs, on a multi-user installation.
        experiment: experiment in KFP; default: `run.experiment` of the configuration.
        parallelism: maximum number of variants that run at the same time.
        evaluate_on: class of the step evaluate, which measures latency; it uses at most one GPU and one node.
        training_runtime: training runtime of Kubeflow Trainer, used if `nodes` is above 1.
        classes: the two classes of steps.
        secrets: environment variables from Secrets, as NAME: {KEY: VARIABLE}. Variables that begin with SCOP_ or KFP_
            are reserved.
        config_maps: environment variables from ConfigMaps, in the same form.
        image_pull_secrets: names of the Secrets for pulling the image.
        security_context: security context of the containers.
    """

    image: str
    require_digest: bool = False
    pipeline_root: Annotated[str, Field(pattern=r"^s3://[^/]+")]
    checkpoints: Annotated[str, Field(pattern=r"^s3://[^/]+")] | None = None
    host: Annotated[str, Field(pattern=r"^https?://")] | None = None
    namespace: ObjectName | None = None
    experiment: str | None = None
    parallelism: PositiveInt = 1
    evaluate_on: Literal["cpu", "gpu"] = "cpu"
    training_runtime: ObjectName = "torch-distributed"
    classes: Classes
    secrets: dict[ObjectName, dict[str, Variable]] = {}
    config_maps: dict[ObjectName, dict[str, Variable]] = {}
    image_pull_secrets: list[ObjectName] = []
    security_context: SecurityContext = SecurityContext()

    @field_validator("image")
    @classmethod
    def _is_an_image(cls, image: str) -> str:
        if not re.fullmatch(r"[a-z0-9][\w./:-]*(@sha256:[0-9a-f]{64})?", image):
            raise ValueError("not a valid image name; write REGISTRY/NAME@sha256:DIGEST")
        return image

    @model_validator(mode="after")
    def _image_stays_the_same(self) -> ClusterProfile:
        if self.require_digest and not self.has_digest:
            raise ValueError(
                f"image {self.image!r} has no digest, but require_digest is true; write "
                "NAME@sha256:DIGEST (docker inspect --format '{{index .RepoDigests 0}}' IMAGE)"
            )
        return self

    @model_validator(mode="after")
    def _variables_are_free(self) -> ClusterProfile:
        given: dict[str, str] = {}
        for kind, objects in (("secrets", self.secrets), ("config_maps", self.config_maps)):
            for name, keys in objects.items():
                for variable in keys.values():
                    where = f"{kind}.{name}"
                    if variable.startswith(("SCOP_", "KFP_")):
                        raise ValueError(f"{where} sets {variable}, but SCOP_* and KFP_* are reserved; rename it")
                    if variable in given:
                        raise ValueError(
                            f"{where} sets {variable}, but {given[variable]} sets it, too; remove one of them"
                        )
                    given[variable] = where
        return self

    @property
    def has_digest(self) -> bool:
        """Whether the image is named by digest."""
        return "@sha256:" in self.image

    @property
    def checkpoint_root(self) -> str:
        """The s3:// URI below which checkpoints are stored."""
        return self.checkpoints or f"{self.pipeline_root.rstrip('/')}/checkpoints"

    def class_of(self, step: str) -> tuple[Literal["cpu", "gpu"], StepClass]:
        """Return the name and the settings of a step's class."""
        assert step in STEPS
        if step in TRAINING_STEPS:
            return "gpu", self.classes.gpu
        if step == "evaluate" and self.evaluate_on == "gpu":
            gpu = self.classes.gpu
            one = gpu.accelerator and gpu.accelerator.model_copy(update={"count": 1})
            return "gpu", gpu.model_copy(update={"accelerator": one, "nodes": 1})
        return "cpu", self.classes.cpu


def load_profile(path: Path, overrides: list[str] | None = None) -> ClusterProfile:
    """Read a cluster profile.

    Args:
        path: the YAML file.
        overrides: changes as KEY=VALUE, with dots in KEY for nested keys.

    Raises:
        UserError: the file is missing or not YAML, or a value is invalid.
    """
    values: dict[str, Any] = read_yaml(path)
    for change in overrides or []:
        override(values, change)
    return parse(ClusterProfile, values, what=f"cluster profile {path.name}:")
