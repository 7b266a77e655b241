"""The checks of `scop doctor`: requirements of a configuration, with the remedy for each missing one."""

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
from scop.environment import ClusterEnvironment, UserEnvironment
from scop.errors import UserError, first_line, redact
from scop.runtime.record import EXTERNAL_FILES
from scop.storage.fetch import uri_exists
from scop.storage.files import delete_files, is_s3, join_uri, list_files, read_bytes, write_bytes
from scop.system.revision import git_revision
from scop.tracking.server import find_or_create_experiment, make_client


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked.
        state: ok, missing, or absent (not needed).
        text: what was found, with the remedy if it is missing.
    """

    subject: str
    state: str
    text: str

    def __str__(self) -> str:
        mark = {"ok": "ok     ", "missing": "MISSING", "absent": "-      "}[self.state]
        return f"{mark}  {self.subject:10}  {self.text}"


def examine(
    config: Config,
    out: str,
    image: str | None,
    access: ClusterEnvironment,
    profile: ClusterProfile | None,
    user: UserEnvironment,
) -> Iterator[Finding]:
    """Check everything that a configuration needs.

    Args:
        config: the configuration.
        out: folder or ``s3://`` URI for runs.
        image: container image, if steps will run in containers.
        access: host and credentials of Kubeflow Pipelines.
        profile: cluster profile, if runs will be submitted to a cluster.
        user: environment variables set by the user.
    """
    yield _python()
    yield from _files(config)
    yield from _storage(config, [out] if profile is None else [profile.pipeline_root, profile.checkpoint_root])
    yield _finding("MLflow", partial(_mlflow, config, out, user.tracking_uri))
    yield _finding("docker", partial(_image, image)) if image is not None else _docker()
    yield _gpu(in_containers=image is not None)
    if profile is not None:
        yield _finding("KFP", partial(_cluster, profile, access))
    elif access.host:
        yield _finding("KFP", partial(_kfp, access.host))


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
        uri = getattr(getattr(config, section), key)
        if uri is not None:
            yield _finding("data" if section == "data" else "weights", partial(_file, f"{section}.{key}", uri))


def _file(key: str, uri: str) -> str:
    found = uri_exists(uri) if is_s3(uri) else Path(uri).expanduser().exists()
    if not found:
        raise UserError(f"{key} {uri} does not exist; correct it with --set {key}=PATH")
    return f"{key} {uri}"


def _storage(config: Config, roots: list[str]) -> Iterator[Finding]:
    written = [uri for uri in (*roots, config.run.checkpoints, config.run.artifact_root) if uri]
    folders = sorted({str(Path(uri).expanduser().absolute()) for uri in written if not is_s3(uri)})
    uris = sorted({uri for uri in written if is_s3(uri)})
    if not uris:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3")
        yield Finding("S3", "absent", f"not used{f' (endpoint {endpoint})' if endpoint else ''}")
    for uri in uris:
        yield _finding("S3", partial(_probe, uri))
    for folder in folders:
        yield _finding("output", partial(_probe, folder))


def _probe(uri: str) -> str:
    """Write, read, list and delete a test file."""
    name = f".scop-probe-{uuid.uuid4().hex}"
    content = name.encode()
    write_bytes(join_uri(uri, name), content)
    try:
        if read_bytes(join_uri(uri, name)) != content:
            raise UserError(f"{uri} returns different bytes than were written; is there a proxy in between?")
        if is_s3(uri) and name not in list_files(uri):
            raise UserError(f"{uri} does not list the file that was written; grant these credentials s3:ListBucket")
    finally:
        delete_files(uri, [name])
    return f"{uri}: wrote, read, listed and deleted a test file"


def _mlflow(config: Config, out: str, uri: str | None) -> str:
    if not uri:
        where = "runs/mlflow.db" if is_s3(out) else join_uri(out, "mlflow.db")
        return f"a SQLite file, {where}; set MLFLOW_TRACKING_URI for a server"
    root = config.run.artifact_root
    if root is None and is_s3(out) and uri.startswith("sqlite:"):
        root = join_uri(out, "mlflow")  # as `scop run` does
    try:
        client = make_client(uri)
        run = client.create_run(
            find_or_create_experiment(client, config.run.experiment, root), run_name="scop doctor"
        ).info.run_id
        try:
            client.log_metric(run, "probe", 1.0)
            client.log_text(run, "probe", "probe.txt")
        finally:
            client.set_terminated(run)
            client.delete_run(run)
    except Exception as error:
        raise UserError(
            f"{redact(uri)} cannot be written to ({first_line(error)}); check MLFLOW_TRACKING_URI and its credentials"
        ) from error
    return f"{redact(uri)}: wrote and deleted a run and a file in experiment {config.run.experiment!r}"


def _image(image: str) -> str:
    require_image(image)
    return f"image {image}, commit {image_label(image, 'org.opencontainers.image.revision') or 'unknown'}"


def _docker() -> Finding:
    if shutil.which("docker") is None:
        return Finding("docker", "absent", "not installed; only --docker needs it")
    if not (engine := _docker_info("{{.ServerVersion}}")):
        return Finding("docker", "absent", "the Docker engine does not answer; only --docker needs it")
    return Finding("docker", "ok", f"engine {engine}; check an image with --docker IMAGE")


def _gpu(in_containers: bool) -> Finding:
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            return Finding("GPU", "missing", "there is one, but PyTorch cannot use it; update its driver")
        return Finding("GPU", "absent", "PyTorch finds none; training runs on the CPU")
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


def _cluster(profile: ClusterProfile, access: ClusterEnvironment) -> str:
    from pipelines.cluster.server import Server

    server = Server(profile, access)
    server.check()
    return f"{server.host} answers, and these credentials may list experiments"


def _kfp(host: str) -> str:
    url = f"{host.rstrip('/')}/apis/v2beta1/healthz"
    try:
        with urllib.request.urlopen(urllib.request.Request(url), timeout=10) as answer:
            return f"{host} answers ({answer.status})"
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise UserError(
            f"{host} does not answer ({error}); check the address, or port-forward to ml-pipeline"
        ) from error
