"""Where a run on this machine lies, who works on it, and what its steps are told by their environment."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from scop.config import Config
from scop.errors import UserError
from scop.runtime.places import KFP_ROOT_VARIABLE, RUN_ROOT_VARIABLE, VARIANTS_VARIABLE
from scop.runtime.record import ATTEMPT_VARIABLE, RUN_VARIABLE
from scop.runtime.resume import CHECKPOINTS_VARIABLE, KEEP_VARIABLE, RESUME_VARIABLE
from scop.storage import files as storage
from scop.system.progress import TERMINAL_VARIABLE
from scop.tracking.server import ARTIFACTS_VARIABLE

KFP_FOLDER = ".kfp"
"""KFP's own files in a run's folder: what its launcher exchanges with the steps."""
LOCK = "lock"
"""A file in there, locked for as long as a process works on the run."""


@contextlib.contextmanager
def workspace(place: str, exists: bool) -> Iterator[Path]:
    """The run's folder, or a temporary one where the run lies in S3; nobody else works on the run meanwhile.

    In S3 there is nothing that could be locked.
    """
    if storage.is_uri(place):
        with tempfile.TemporaryDirectory(prefix="scop-run-") as name:
            (Path(name) / KFP_FOLDER).mkdir()
            yield Path(name)
        return
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=exists)
        (folder / KFP_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be made: {error.strerror}") from error
    with (folder / KFP_FOLDER / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it whatever ends this process
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run {folder.name} is still going, by process {lock.read().strip()}; wait for it, or end that"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield folder


def for_mlflow(config: Config, out: str) -> dict[str, str]:
    """Where MLflow and its artifacts are: as the environment says, or else with the runs."""
    variables = {}
    if not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        base = Path("runs").absolute() if storage.is_uri(out) else Path(out)
        if set("%?") & set(str(base)):
            raise UserError(
                f"MLflow's database cannot lie in {base}: % and ? mean something else in its address; take another "
                "folder, or name a server by MLFLOW_TRACKING_URI"
            )
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {base} cannot be made: {error.strerror}") from error
        uri = variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{base / 'mlflow.db'}"
    artifacts = config.run.artifact_root
    if artifacts is None and storage.is_uri(out) and uri.startswith("sqlite:"):
        artifacts = storage.join(out, "mlflow")
    if artifacts is not None:
        variables[ARTIFACTS_VARIABLE] = artifacts
    return variables


def for_steps(config: Config, out: str, place: str, folder: Path, resumed: bool) -> dict[str, str]:
    """What the steps are told by their environment."""
    return {
        RUN_VARIABLE: place.rpartition("/")[2],
        # Shared by all runs in `out`: one that was killed and is started again goes on where it was.
        CHECKPOINTS_VARIABLE: config.run.checkpoints or storage.join(out, "checkpoints"),
        KEEP_VARIABLE: str(config.run.keep_checkpoints),
        KFP_ROOT_VARIABLE: str(folder / KFP_FOLDER),
        RUN_ROOT_VARIABLE: place,
        VARIANTS_VARIABLE: json.dumps([variant.label for variant in config.variants]),
        RESUME_VARIABLE: "1" if resumed else "",
        ATTEMPT_VARIABLE: uuid.uuid4().hex,
    }


def terminal() -> dict[str, str]:
    """The terminal that somebody watches, for the steps' progress bars."""
    try:
        return {TERMINAL_VARIABLE: os.ttyname(sys.stderr.fileno())}
    except (OSError, io.UnsupportedOperation):
        return {}


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Within, the environment has these variables."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
