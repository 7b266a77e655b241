"""Cluster profiles: all that a pipeline needs to know of the cluster it runs on, as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scop.config import PositiveInt
from scop.config.parsing import Section, override, parse, read_yaml
from scop.runtime.registry import STEPS, TRAINING_STEPS

FOLDER = Path(__file__).parent / "clusters"

# Kubernetes' quantities, see k8s.io/apimachinery, resource.Quantity, as far as KFP takes them: 500m, 2, 1.5; 8Gi.
Cores = Annotated[str, Field(pattern=r"^([0-9]+(\.[0-9]+)?|[0-9]+m)$", coerce_numbers_to_str=True)]
Bytes = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(K|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", coerce_numbers_to_str=True)]
Duration = Annotated[str, Field(pattern=r"^[0-9]+(s|m|h)$")]
# Names of Kubernetes objects, and of environment variables.
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


_FACTORS = {"m": 1e-3} | {prefix: 1000.0**n for n, prefix in enumerate("KMGTP", 1)}
_FACTORS |= {f"{prefix}i": 1024.0**n for n, prefix in enumerate("KMGTP", 1)}


def quantity(text: str) -> float:
    """What `Cores` or `Bytes` say, in cores or bytes."""
    number = text.rstrip("mKMGTPi")
    return float(number) * _FACTORS.get(text[len(number) :], 1.0)


class Resources(Section):
    """An amount of processors and memory.

    Attributes:
        cpu: cores, such as 2 or 500m.
        memory: such as 8Gi.
    """

    cpu: Cores
    memory: Bytes


class Accelerator(Section):
    """GPUs of a step.

    Attributes:
        resource: the name by which the cluster's device plugin offers them.
        count: so many for each pod; with more than one a training runs a process on each.
    """

    resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = "nvidia.com/gpu"
    count: PositiveInt = 1


class Toleration(Section):
    """A taint of nodes that the step's pod tolerates; the entries are Kubernetes'.

    Attributes:
        key, operator, value, effect: of the taint.
        toleration_seconds: how long a NoExecute taint is tolerated.
    """

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None

    @model_validator(mode="after")
    def _means_something(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a toleration with operator Exists has no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration without a key needs operator: Exists")
        return self


class Affinity(Section):
    """What nodes a pod must, or had better, run on: one expression of Kubernetes' node affinity.

    Attributes:
        key, operator, values: what a node's labels must fulfil.
        weight: 1 to 100 where it is only preferred; required without.
    """

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: list[str] = []
    weight: Annotated[int, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _has_values(self) -> Affinity:
        if (self.operator in ("Exists", "DoesNotExist")) == bool(self.values):
            raise ValueError(f"operator {self.operator} {'takes no' if self.values else 'needs'} values")
        return self


class Retries(Section):
    """What happens when a pod fails or is preempted: it is started again, and a training goes on from its checkpoint.

    Attributes:
        count: so many times.
        backoff: before the first one.
        factor: by which the wait grows each time.
        max_backoff: and no longer than this.
    """

    count: Annotated[int, Field(ge=0, le=20)] = 3
    backoff: Duration = "30s"
    factor: Annotated[float, Field(ge=1, le=10)] = 2.0
    max_backoff: Duration = "10m"


class StepClass(Section):
    """Where steps of a class run, and with what.

    Attributes:
        requests: what a node must have free.
        limits: what the step may use; the requests by default.
        accelerator: GPUs; none by default.
        node_selector: labels that a node must have.
        tolerations: taints that are tolerated.
        affinity: further conditions on nodes.
        shared_memory: size of /dev/shm, which processes on several GPUs talk through; Kubernetes' 64 MiB by default.
        timeout: after which a pod is ended, in seconds.
        retries: after failure and preemption.
        nodes: so many pods train together, as a TrainJob of Kubeflow Trainer; in class gpu.
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
        """The wish for a device, as a step that sees none tells it."""
        wanted = f"{self.accelerator.resource} x{self.accelerator.count}" if self.accelerator else "no accelerator"
        labels = ", ".join(f"{key}={value}" for key, value in self.node_selector.items()) or "none"
        return f"resource {wanted}, node selector {labels}"


class Classes(Section):
    """The two classes of steps.

    Attributes:
        cpu: all but training.
        gpu: train_dense, train_knockoff and finetune.
    """

    cpu: StepClass
    gpu: StepClass

    @model_validator(mode="after")
    def _only_training_has_nodes(self) -> Classes:
        if self.cpu.nodes > 1:
            raise ValueError(f"cpu.nodes is {self.cpu.nodes}; only training, class gpu, can have several nodes")
        if self.gpu.nodes > 1 and self.gpu.limits:
            raise ValueError("gpu.limits are not for several nodes: a TrainJob's are its requests; leave them out")
        return self


class SecurityContext(Section):
    """As whom a container runs; the image works with any user id in group 0.

    Attributes:
        run_as_user, run_as_group, run_as_non_root: Kubernetes' entries.
    """

    run_as_user: Annotated[int, Field(ge=0)] | None = 10001
    run_as_group: Annotated[int, Field(ge=0)] | None = 0
    run_as_non_root: bool | None = True


class ClusterProfile(Section):
    """A cluster.

    Attributes:
        image: that all steps run in, by digest: REGISTRY/NAME@sha256:...
        require_digest: refuse an image that is named by a tag, which may move.
        pipeline_root: the s3:// URI below which KFP keeps the runs' artifacts.
        checkpoints: the s3:// URI for checkpoints; below the pipeline root by default.
        host: of KFP's API; KF_PIPELINES_ENDPOINT, or what KFP's own client finds, by default.
        namespace: of KFP's runs, on an installation for several users.
        experiment: of KFP; the configuration's `run.experiment` by default.
        parallelism: so many variants run at once.
        evaluate_on: the class of the step evaluate, whose latencies are the result's; it has one GPU at most.
        training_runtime: of Kubeflow Trainer, for `nodes` above 1.
        classes: the classes of steps.
        secrets: which keys of which Secret become which environment variables: NAME: {KEY: VARIABLE}; those that begin
            with SCOP_ or KFP_ are the pipeline's own.
        config_maps: likewise of ConfigMaps.
        image_pull_secrets: names of Secrets by which the image is pulled.
        security_context: as whom containers run.
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
            raise ValueError("is no image's name; write REGISTRY/NAME@sha256:DIGEST")
        return image

    @model_validator(mode="after")
    def _image_stays_the_same(self) -> ClusterProfile:
        if self.require_digest and not self.has_digest:
            raise ValueError(
                f"image {self.image!r} is named by a tag, which may move, and require_digest is on; write "
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
                        raise ValueError(f"{where} sets {variable}, which is the pipeline's own; take another name")
                    if variable in given:
                        raise ValueError(
                            f"{where} sets {variable}, and so does {given[variable]}; leave one of them out"
                        )
                    given[variable] = where
        return self

    @property
    def has_digest(self) -> bool:
        """Whether the image's name says which bytes it is."""
        return "@sha256:" in self.image

    @property
    def checkpoint_root(self) -> str:
        """Where checkpoints go."""
        return self.checkpoints or f"{self.pipeline_root.rstrip('/')}/checkpoints"

    def class_of(self, step: str) -> tuple[Literal["cpu", "gpu"], StepClass]:
        """The class of a step, with its name."""
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

    Raises:
        UserError: the file is missing or no YAML, or an entry is bad.
    """
    values: dict[str, Any] = read_yaml(path)
    for change in overrides or []:
        override(values, change)
    return parse(ClusterProfile, values, what=f"cluster profile {path.name}:")
