"""How containers are run here: as an ordinary user, with nothing writable but what is mounted, and no capabilities."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scop
from scop.errors import UserError
from scop.runtime.record import RUN_VARIABLE
from scop.storage.s3 import as_variables

DEFAULT_IMAGE = f"scop-python:{scop.__version__}"
_SHARED_MEMORY = "1g"
_SCRATCH = "rw,nosuid,nodev,size=4g,mode=1777"
# What the steps go by, handed on where it is set.
_PREFIXES = ("AWS_", "MLFLOW_", "SCOP_", "OMP_", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_OF_THIS_MACHINE = {"AWS_CONFIG_FILE", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "SCOP_CACHE", "SCOP_TERMINAL"}
CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""Variables that name a file, by which servers are trusted."""


@dataclass(frozen=True)
class Sandbox:
    """A container's surroundings.

    Attributes:
        image: its name.
        writable: folders that it may write to, at the same paths as here.
        readable: files and folders that it may read, at the same paths as here.
        environment: variables that it gets.
        handed_on: further variables, perhaps secret: their values are never in a command line, but taken by docker from
            its own environment.
        gpus: whether it gets the GPUs.
        network: docker's, none or host.
    """

    image: str
    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    handed_on: Mapping[str, str] = field(default_factory=dict)
    gpus: bool = False
    network: str = "host"

    @property
    def user(self) -> str:
        """Whoever calls, so that the files are theirs; for root the image's own user, in root's group."""
        return f"{os.getuid() or 10001}:0"

    def open_to_user(self, others: Iterable[Path] = ()) -> None:
        """Let the container's user write into the writable folders, and to other files and folders."""
        if os.getuid() == 0:  # else the user is the folders' owner
            for path in (*self.writable, *others):
                os.chown(path, -1, 0)
                path.chmod(path.stat().st_mode | (0o070 if path.is_dir() else 0o060))

    def for_kfp(self) -> dict[str, Any]:
        """The keywords of `kfp.local.DockerRunner`."""
        from docker.types import DeviceRequest, Mount

        mounts = [Mount(str(p), str(p), type="bind", read_only=p in self.readable) for p in self._mounts()]
        return {
            "mounts": mounts,
            "environment": dict(self.handed_on) | dict(self.environment),
            "user": self.user,
            "network_mode": self.network,
            "read_only": True,
            "tmpfs": {"/tmp": _SCRATCH},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": _SHARED_MEMORY,
            "labels": {RUN_VARIABLE: os.environ.get(RUN_VARIABLE, "")},
            **({"device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])]} if self.gpus else {}),
        }

    def command(self, inside: list[str], interactive: bool = False) -> list[str]:
        """The `docker run` command line; docker takes what is handed on, which may be secret, from its environment."""
        options = ["--rm", "--init", "--user", self.user, "--network", self.network, "--read-only", "--tmpfs"]
        options += [f"/tmp:{_SCRATCH}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        options += ["--shm-size", _SHARED_MEMORY, *(["--gpus", "all"] if self.gpus else [])]
        options += ["--interactive", *(["--tty"] if sys.stdin.isatty() else [])] if interactive else []
        for path in self._mounts():
            options += ["--volume", f"{path}:{path}{':ro' if path in self.readable else ''}"]
        for name in self.handed_on:
            options += ["--env", name]
        for key, value in self.environment.items():
            options += ["--env", f"{key}={value}"]
        return ["docker", "run", *options, self.image, *inside]

    def _mounts(self) -> list[Path]:
        # Each once, a folder before what lies in it, which may be mounted in another way.
        return sorted({path for path in (*self.writable, *self.readable) if path.exists()})


def variables_of_steps(prefixes: tuple[str, ...] = _PREFIXES, with_s3: bool = False) -> dict[str, str]:
    """This process's variables that steps go by.

    Args:
        prefixes: of their names.
        with_s3: also what boto3 finds in files and roles of this machine, which a container does not have.
    """
    found = {k: v for k, v in os.environ.items() if k.startswith(prefixes) and k not in _OF_THIS_MACHINE}
    return (as_variables() if with_s3 else {}) | found


def certificates() -> tuple[Path, ...]:
    """The files by which this process trusts servers; a container needs them at the same paths."""
    return existing(os.environ.get(name) for name in CERTIFICATES)


def require_image(image: str) -> None:
    """Raises UserError where there is no engine, or it does not have the image."""
    if shutil.which("docker") is None:
        raise UserError("docker is not installed; install it, or leave --docker out")
    engine = _docker("version", "--format", "{{.Server.Version}}")
    if engine.returncode:
        reason = (engine.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"the docker engine does not answer ({reason}); start it, or leave --docker out")
    if _docker("image", "inspect", image).returncode:
        raise UserError(f"image {image!r} is not on this machine; docker pull {image}, or make image to build it")


def containers_of(run: str) -> list[str]:
    """The ids of the containers in which a run's steps run now."""
    if shutil.which("docker") is None:
        return []
    return _docker("ps", "--quiet", "--filter", f"label={RUN_VARIABLE}={run}").stdout.split()


def stop_containers(run: str) -> int:
    """Ask the steps in a run's containers to end, each of which writes a checkpoint first; gives how many there are."""
    found = containers_of(run)
    for container in found:
        # Not by `docker stop`: KFP starts a step by a shell, which is process 1 there and heeds no signal.
        _docker("exec", container, "sh", "-c", "kill -TERM -1")
    return len(found)


def image_id(image: str) -> str | None:
    """Docker's id of an image, by a name or the id; None where it is not on this machine."""
    found = _docker("image", "inspect", "--format", "{{.Id}}", image) if shutil.which("docker") else None
    return found.stdout.strip() or None if found and found.returncode == 0 else None


def image_label(image: str, label: str) -> str | None:
    """A label of an image, or None."""
    found = _docker("image", "inspect", "--format", f'{{{{index .Config.Labels "{label}"}}}}', image)
    return found.stdout.strip() or None if found.returncode == 0 else None


def existing(paths: Iterable[str | None]) -> tuple[Path, ...]:
    """Those of the paths that are there, absolute."""
    return tuple(Path(p).expanduser().absolute() for p in paths if p is not None and Path(p).expanduser().exists())


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True)
