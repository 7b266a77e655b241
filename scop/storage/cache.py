"""What was fetched from S3, kept by its content so that a dataset travels once; may be removed at any time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scop.errors import UserError
from scop.storage.manifest import read_folder

CACHE_VARIABLE = "SCOP_CACHE"
CACHE_PARTS = ("artifacts", "objects", "trees")
"""The folders in the cache: whole artifacts, single objects, and all that is below a prefix."""


def cache_folder() -> Path:
    """Where fetched artifacts are kept: SCOP_CACHE, or scop in the user's cache folder; may be removed at any time."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scop"


def is_cached(folder: Path) -> bool:
    """Whether the cache has it, and as it came; what somebody changed is removed."""
    if folder.exists():
        with contextlib.suppress(UserError):
            read_folder(folder)
            return True
        shutil.rmtree(folder)
    return False


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is full; another process may have been quicker."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cache {folder.parent} cannot be written ({error.strerror}); set {CACHE_VARIABLE}") from error
    try:
        yield staging
        staging.chmod(0o755)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
