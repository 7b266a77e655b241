"""`scop doctor`: is all there that a configuration needs? One line for each thing, and what to set where it is not."""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.cluster.profile import ClusterProfile
from pipelines.local.containers import image_label, require_image
from scop.config import Config
from scop.errors import UserError, first_line, shown
from scop.runtime.record import EXTERNAL_FILES
from scop.storage import files as storage
from scop.system.revision import git_revision
from scop.tracking.server import artifact_root, configure_mlflow, find_experiment


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        subject: what was looked at.
        state: ok, missing, or absent where it is not needed.
        text: what was found, and what to set.
    """

    subject: str
    state: str
    text: str

    def __str__(self) -> str:
        mark = {"ok": "ok     ", "missing": "MISSING", "absent": "-      "}[self.state]
        return f"{mark}  {self.subject:10}  {self.text}"


def examine(
    config: Config, out: str, image: str | None, host: str | None, profile: ClusterProfile | None = None
) -> Iterator[Finding]:
    """Look at everything that a configuration needs.

    Args:
        config: the configuration.
        out: where runs are to be kept.
        image: the image, where steps are to run in containers.
        host: of Kubeflow Pipelines, where runs are to be submitted.
        profile: of the cluster on which they are to run.
    """
    yield _python()
    yield from _files(config)
    yield from _storage(config, [out] if profile is None else [profile.pipeline_root, profile.checkpoint_root])
    yield _finding("MLflow", partial(_mlflow, config, out))
    yield _finding("docker", partial(_image, image)) if image is not None else _docker()
    yield _gpu(in_containers=image is not None)
    if profile is not None:
        yield _finding("KFP", partial(_cluster, profile, host))
    elif host:
        yield _finding("KFP", partial(_kfp, host))


def _finding(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, "ok", look())
    except UserError as error:
        return Finding(subject, "missing", str(error))


def _python() -> Finding:
    from importlib.metadata import version

    return Finding("Python", "ok", f"{platform.python_version()}, PyTorch {version('torch')}, commit {git_revision()}")


def _files(config: Config) -> Iterator[Finding]:
    for section, key in EXTERNAL_FILES:
        place = getattr(getattr(config, section), key)
        if place is not None:
            yield _finding("data" if section == "data" else "weights", partial(_file, f"{section}.{key}", place))


def _file(key: str, place: str) -> str:
    found = storage.exists(place) if storage.is_uri(place) else Path(place).expanduser().exists()
    if not found:
        raise UserError(f"{key} {place} does not exist; mend it with --set {key}=PLACE")
    return f"{key} {place}"


def _storage(config: Config, roots: list[str]) -> Iterator[Finding]:
    written = [place for place in (*roots, config.run.checkpoints, config.run.artifact_root) if place]
    folders = sorted({str(Path(place).expanduser().absolute()) for place in written if not storage.is_uri(place)})
    uris = sorted({place for place in written if storage.is_uri(place)})
    if not uris:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3")
        yield Finding("S3", "absent", f"nothing is kept there{f' (endpoint {endpoint})' if endpoint else ''}")
    for uri in uris:
        yield _finding("S3", partial(_probe, uri))
    for folder in folders:
        yield _finding("output", partial(_probe, folder))


def _probe(place: str) -> str:
    """Put, get, list and delete a probe."""
    name = f".scop-probe-{uuid.uuid4().hex}"
    content = name.encode()
    storage.write(storage.join(place, name), content)
    try:
        if storage.read(storage.join(place, name)) != content:
            raise UserError(f"{place} gives back other bytes than were put there; is a proxy in between?")
        if storage.is_uri(place) and name not in storage.names(place):
            raise UserError(f"{place} does not list what was put there; give these credentials s3:ListBucket")
    finally:
        storage.delete(place, [name])
    return f"{place}: put, got, listed and deleted a probe"


def _mlflow(config: Config, out: str) -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        where = "runs/mlflow.db" if storage.is_uri(out) else storage.join(out, "mlflow.db")
        return f"a SQLite file, {where}; set MLFLOW_TRACKING_URI for a server"
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    root = config.run.artifact_root or artifact_root()
    if root is None and storage.is_uri(out) and uri.startswith("sqlite:"):
        root = storage.join(out, "mlflow")  # as `scop run` has it
    try:
        client = MlflowClient(uri)
        run = client.create_run(
            find_experiment(client, config.run.experiment, root), run_name="scop doctor"
        ).info.run_id
        try:
            client.log_metric(run, "probe", 1.0)
            client.log_text(run, "probe", "probe.txt")
        finally:
            client.set_terminated(run)
            client.delete_run(run)
    except Exception as error:
        raise UserError(
            f"{shown(uri)} cannot be written ({first_line(error)}); check MLFLOW_TRACKING_URI and its credentials"
        ) from error
    return f"{shown(uri)}: wrote and deleted a run and a file in experiment {config.run.experiment!r}"


def _image(image: str) -> str:
    require_image(image)
    return f"image {image}, commit {image_label(image, 'org.opencontainers.image.revision') or 'unknown'}"


def _docker() -> Finding:
    if shutil.which("docker") is None:
        return Finding("docker", "absent", "not installed; only --docker needs it")
    if not (engine := _docker_info("{{.ServerVersion}}")):
        return Finding("docker", "absent", "no engine answers; only --docker needs it")
    return Finding("docker", "ok", f"engine {engine}; name an image with --docker IMAGE to check for it")


def _gpu(in_containers: bool) -> Finding:
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            return Finding("GPU", "missing", "there is one, but PyTorch cannot use it; bring its driver up to date")
        return Finding("GPU", "absent", "PyTorch sees none; training runs on the CPU")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if not in_containers:
        return Finding("GPU", "ok", names)
    if "nvidia" in _docker_info("{{.Runtimes}}"):
        return Finding("GPU", "ok", f"{names}, in containers too")
    remedy = "install the NVIDIA Container Toolkit, then: nvidia-ctk runtime configure --runtime=docker"
    return Finding("GPU", "missing", f"{names}, but not in containers: docker has no NVIDIA runtime; {remedy}")


def _docker_info(what: str) -> str:
    if shutil.which("docker") is None:
        return ""
    return subprocess.run(["docker", "info", "--format", what], capture_output=True, text=True).stdout.strip()


def _cluster(profile: ClusterProfile, host: str | None) -> str:
    from pipelines.cluster.server import Server

    server = Server(profile if profile.host or not host else profile.model_copy(update={"host": host}))
    server.check()
    return f"{server.host} answers, and lets these credentials list experiments"


def _kfp(host: str) -> str:
    url = f"{host.rstrip('/')}/apis/v2beta1/healthz"
    try:
        with urllib.request.urlopen(urllib.request.Request(url), timeout=10) as answer:
            return f"{host} answers ({answer.status})"
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise UserError(
            f"{host} does not answer ({error}); check the address, or port-forward to ml-pipeline"
        ) from error
