"""Docker containers for steps: unprivileged user, read-only root, no capabilities, only mounted folders writable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.image import IMAGE as IMAGE
from scop.errors import UserError

_SHARED_MEMORY = "1g"
_SCRATCH = "rw,nosuid,nodev,size=4g,mode=1777"
_RUN_LABEL = "scop.run"


@dataclass(frozen=True)
class Sandbox:
    """Image, mounts and environment variables of a container.

    Attributes:
        image: name of the image.
        writable: writable folders, mounted at the same paths as on this machine.
        readable: read-only files and folders, mounted at the same paths as on this machine.
        environment: environment variables.
        passed_on: names of further variables, which may be secret: Docker reads their values from its own environment,
            so they are never on a command line.
        gpus: whether the container can use the GPUs.
        network: Docker network, none or host.
        run_id: ID of the pipeline run, used to find its containers.
    """

    image: str
    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    passed_on: Mapping[str, str] = field(default_factory=dict)
    gpus: bool = False
    network: str = "host"
    run_id: str = ""

    @property
    def user(self) -> str:
        """User and group: the caller, who then owns the files; for root, the image's user in root's group."""
        return f"{os.getuid() or 10001}:0"

    def open_to_user(self, others: Iterable[Path] = ()) -> None:
        """Give the container's user write access to the writable folders, and to other files and folders."""
        if os.getuid() == 0:  # any other user owns the folders
            for path in (*self.writable, *others):
                os.chown(path, -1, 0)
                path.chmod(path.stat().st_mode | (0o070 if path.is_dir() else 0o060))

    def for_kfp(self) -> dict[str, Any]:
        """Return the keyword arguments of `kfp.local.DockerRunner`."""
        from docker.types import DeviceRequest, Mount

        mounts = [Mount(str(p), str(p), type="bind", read_only=p in self.readable) for p in self._mounts()]
        return {
            "mounts": mounts,
            "environment": dict(self.passed_on) | dict(self.environment),
            "user": self.user,
            "network_mode": self.network,
            "read_only": True,
            "tmpfs": {"/tmp": _SCRATCH},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": _SHARED_MEMORY,
            "labels": {_RUN_LABEL: self.run_id},
            **({"device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])]} if self.gpus else {}),
        }

    def command(self, inside: list[str], interactive: bool = False) -> list[str]:
        """Return the `docker run` command line.

        Args:
            inside: command to run in the container.
            interactive: whether to attach standard input and the terminal.
        """
        options = ["--rm", "--init", "--user", self.user, "--network", self.network, "--read-only", "--tmpfs"]
        options += [f"/tmp:{_SCRATCH}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        options += ["--shm-size", _SHARED_MEMORY, *(["--gpus", "all"] if self.gpus else [])]
        options += ["--interactive", *(["--tty"] if sys.stdin.isatty() else [])] if interactive else []
        for path in self._mounts():
            options += ["--volume", f"{path}:{path}{':ro' if path in self.readable else ''}"]
        for name in self.passed_on:
            options += ["--env", name]
        for key, value in self.environment.items():
            options += ["--env", f"{key}={value}"]
        return ["docker", "run", *options, self.image, *inside]

    def _mounts(self) -> list[Path]:
        # Each path once, and folders before their contents, which may be mounted differently.
        return sorted({path for path in (*self.writable, *self.readable) if path.exists()})


def require_image(image: str) -> None:
    """Raise UserError if there is no Docker engine, or if it does not have the image."""
    if shutil.which("docker") is None:
        raise UserError("Docker is not installed; install it, or omit --docker")
    engine = _docker("version", "--format", "{{.Server.Version}}")
    if engine.returncode:
        reason = (engine.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"the Docker engine does not answer ({reason}); start it, or omit --docker")
    if _docker("image", "inspect", image).returncode:
        raise UserError(f"image {image!r} is not on this machine; docker pull {image}, or make image to build it")


def containers_of(run_id: str) -> list[str]:
    """Return the IDs of the containers that run steps of a run."""
    if shutil.which("docker") is None:
        return []
    return _docker("ps", "--quiet", "--filter", f"label={_RUN_LABEL}={run_id}").stdout.split()


def stop_containers(run_id: str) -> int:
    """Ask the steps in a run's containers to write a checkpoint and stop; return the number of containers."""
    found = containers_of(run_id)
    for container in found:
        # Not with `docker stop`: KFP starts a step in a shell, which is process 1 and ignores signals.
        _docker("exec", container, "sh", "-c", "kill -TERM -1")
    return len(found)


def image_id(image: str) -> str | None:
    """Return Docker's ID of an image, given its name or ID, or None if it is not on this machine."""
    found = _docker("image", "inspect", "--format", "{{.Id}}", image) if shutil.which("docker") else None
    return found.stdout.strip() or None if found and found.returncode == 0 else None


def image_label(image: str, label: str) -> str | None:
    """Return the value of an image's label, or None."""
    found = _docker("image", "inspect", "--format", f'{{{{index .Config.Labels "{label}"}}}}', image)
    return found.stdout.strip() or None if found.returncode == 0 else None


def existing(paths: Iterable[str | None]) -> tuple[Path, ...]:
    """Return the paths that exist, as absolute paths."""
    return tuple(Path(p).expanduser().absolute() for p in paths if p is not None and Path(p).expanduser().exists())


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True)
