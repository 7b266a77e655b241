"""The local cache of files fetched from S3, addressed by content, so that a dataset is downloaded once."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scop.errors import UserError
from scop.storage.manifest import read_folder

Part = Literal["artifacts", "objects", "trees"]
PARTS: tuple[Part, ...] = ("artifacts", "objects", "trees")
"""The cache's folders: artifacts, single objects, and all objects below a prefix."""


@dataclass(frozen=True)
class Cache:
    """A folder of fetched files. It may be deleted at any time, and processes may share it.

    Attributes:
        root: the folder, absolute.
    """

    root: Path

    def folder(self, part: Part, key: str) -> Path:
        """Return the folder of an entry, which may not exist yet."""
        return self.root / part / key

    def has(self, folder: Path) -> bool:
        """Whether an entry exists and is intact; a damaged one is removed."""
        if folder.exists():
            with contextlib.suppress(UserError):
                read_folder(folder)
                return True
            shutil.rmtree(folder)
        return False

    @contextlib.contextmanager
    def staged(self, folder: Path) -> Iterator[Path]:
        """Yield a temporary folder to fill, and move it to `folder` afterwards, unless another process was faster.

        Raises:
            UserError: the cache cannot be written.
        """
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"cache {folder.parent} cannot be written ({error.strerror}); set SCOP_CACHE to another folder"
            ) from error
        try:
            yield staging
            staging.chmod(0o755)
            try:
                staging.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
