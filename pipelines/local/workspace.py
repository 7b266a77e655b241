"""The folder of a run, locked while a process works on the run, and the MLflow location of its metrics."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.local.job import KFP_FOLDER
from scop.config import Config
from scop.errors import UserError
from scop.storage.files import is_s3, join_uri

LOCK = "lock"
"""A file in `KFP_FOLDER`, locked while a process works on the run."""


@contextlib.contextmanager
def workspace(uri: str, exists: bool) -> Iterator[Path]:
    """Lock and yield the folder of a run; for a run in S3, yield a temporary folder.

    S3 has no locks.

    Args:
        uri: folder or ``s3://`` URI of the run.
        exists: whether the folder may exist already, because the run is resumed.

    Raises:
        UserError: the folder cannot be created, or another process works on the run.
    """
    if is_s3(uri):
        with tempfile.TemporaryDirectory(prefix="scop-run-") as name:
            (Path(name) / KFP_FOLDER).mkdir()
            yield Path(name)
        return
    folder = Path(uri)
    try:
        folder.mkdir(parents=True, exist_ok=exists)
        (folder / KFP_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be created: {error.strerror}") from error
    with (folder / KFP_FOLDER / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however this process ends
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"process {lock.read().strip()} is working on run {folder.name}; wait for it or stop it"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield folder


def tracking_of(config: Config, out: str, tracking_uri: str | None) -> tuple[str, str | None]:
    """Return MLflow's tracking URI and the artifact root of new experiments.

    Args:
        config: the configuration, which may set the artifact root.
        out: folder or ``s3://`` URI of all runs; a database is created there, or in ./runs for S3.
        tracking_uri: tracking URI set by the user, or None.

    Raises:
        UserError: the folder of the database cannot be created, or its path cannot be part of a URI.
    """
    if tracking_uri is None:
        base = Path("runs").absolute() if is_s3(out) else Path(out)
        if set("%?") & set(str(base)):
            raise UserError(
                f"MLflow's database cannot be in {base}: % and ? have another meaning in its URI; choose another "
                "folder, or set MLFLOW_TRACKING_URI to a server"
            )
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {base} cannot be created: {error.strerror}") from error
        tracking_uri = f"sqlite:///{base / 'mlflow.db'}"
    artifacts = config.run.artifact_root
    if artifacts is None and is_s3(out) and tracking_uri.startswith("sqlite:"):
        artifacts = join_uri(out, "mlflow")
    return tracking_uri, artifacts
