"""Files at local paths and at ``s3://bucket/key`` URIs.

In this package, a `uri` is a path or an ``s3://`` URI. `scop.storage.fetch` downloads files and trees,
`scop.storage.folders` artifact folders.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from scop.errors import UserError
from scop.storage.s3 import SCHEME as S3_SCHEME
from scop.storage.s3 import Location, delete_objects, list_objects, object_exists, read_object, write_object
from scop.storage.s3 import is_s3 as is_s3

__all__ = [
    "S3_SCHEME",
    "delete_files",
    "file_exists",
    "is_s3",
    "join_uri",
    "list_files",
    "read_bytes",
    "read_if_exists",
    "write_bytes",
]


def join_uri(uri: str | Path, *names: str) -> str:
    """Join names to a path or URI with slashes."""
    return "/".join((str(uri).rstrip("/"), *names))


def read_bytes(uri: str) -> bytes:
    """Read a file; raise UserError if it does not exist or cannot be read."""
    content = read_if_exists(uri)
    if content is None:
        raise UserError(f"{uri} does not exist")
    return content


def read_if_exists(uri: str) -> bytes | None:
    """Read a file, or return None if there is none; raise UserError if it cannot be read."""
    if is_s3(uri):
        return read_object(Location.parse(uri))
    try:
        return Path(uri).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {uri}: {error.strerror}") from error


def file_exists(folder: str, name: str) -> bool:
    """Whether a folder or prefix contains a file with this name."""
    return object_exists(Location.parse(folder) / name) if is_s3(folder) else (Path(folder) / name).exists()


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one. Raises UserError if that fails."""
    if is_s3(uri):
        write_object(Location.parse(uri), content)
        return
    path = Path(uri)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {uri}: {error.strerror}") from error


def list_files(folder: str) -> list[str]:
    """List all files below a folder or prefix, by relative name, sorted."""
    if is_s3(folder):
        return sorted(list_objects(Location.parse(folder)))
    root = Path(folder)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def delete_files(folder: str, names: list[str]) -> None:
    """Delete files by name below a folder or prefix; missing files are ignored."""
    if is_s3(folder):
        delete_objects(Location.parse(folder), set(names))
        return
    root = Path(folder)
    for name in names:
        (root / name).unlink(missing_ok=True)
    folders = {root, *(root / parent for name in names for parent in Path(name).parents)}
    for empty in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):  # remove empty folders, since empty prefixes do not exist in S3
            empty.rmdir()
