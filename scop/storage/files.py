"""Files at paths and at ``s3://bucket/prefix`` URIs alike; for whole artifacts see `scop.storage.folders`."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scop.errors import UserError
from scop.storage.cache import cache_folder, is_cached, staged
from scop.storage.manifest import check_name, sha256_of, write_manifest
from scop.storage.s3 import SCHEME as SCHEME
from scop.storage.s3 import (
    Location,
    delete_objects,
    download,
    endpoint,
    listing,
    object_exists,
    read_object,
    write_object,
)
from scop.storage.s3 import is_uri as is_uri

# -- bytes, and names --------------------------------------------------------------------------------------------------


def join(place: str | Path, *names: str) -> str:
    """A place below a path or an URI."""
    return "/".join((str(place).rstrip("/"), *names))


def read(place: str, must_exist: bool = True) -> bytes | None:
    """The bytes at a path or URI; None, if it need not exist, where there is nothing."""
    if is_uri(place):
        return read_object(Location.parse(place), must_exist)
    try:
        return Path(place).read_bytes()
    except FileNotFoundError as error:
        if not must_exist:
            return None
        raise UserError(f"{place} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}") from error


def exists_at(place: str, name: str) -> bool:
    """Whether there is a file or object of this name below a path or URI."""
    return object_exists(Location.parse(place) / name) if is_uri(place) else (Path(place) / name).exists()


def write(place: str, content: bytes) -> None:
    """Put bytes at a path or URI, at once: a reader sees the old ones or the new ones."""
    if is_uri(place):
        write_object(Location.parse(place), content)
        return
    path = Path(place)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {place}: {error.strerror}") from error


def names(place: str) -> list[str]:
    """The names of all files or objects below a path or URI, relative to it, in order."""
    if is_uri(place):
        return sorted(listing(Location.parse(place)))
    root = Path(place)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def delete(place: str, which: list[str]) -> None:
    """Remove files or objects by their names below a path or URI; what is gone already is no error."""
    if is_uri(place):
        delete_objects(Location.parse(place), set(which))
        return
    root = Path(place)
    for name in which:
        (root / name).unlink(missing_ok=True)
    folders = {root, *(root / parent for name in which for parent in Path(name).parents)}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):  # where it is empty now, as prefixes in S3 vanish too
            folder.rmdir()


# -- files and trees of S3, here ---------------------------------------------------------------------------------------


def fetch_file(uri: str) -> Path:
    """One object, in the local cache, by its place and version; raises UserError where it cannot be had."""
    source = Location.parse(uri)
    found = _version(source)
    if found is None:
        raise UserError(f"{uri} does not exist")
    folder = cache_folder() / "objects" / _hash(endpoint(), str(source), *found)
    name = check_name(source.key.rpartition("/")[2])
    if not is_cached(folder):
        with staged(folder) as staging:
            parent = Location(source.bucket, source.key.rpartition("/")[0])
            list(download(parent, {name: staging / name}, {name: int(found[1])}))
            if _version(source) != found:
                raise UserError(f"{uri} changed while it was fetched; try again")
            write_manifest(staging, kind="object")
    return folder / name


def _version(source: Location) -> tuple[str, str] | None:
    """An object's ETag and size, or None where there is none. By a listing, whose errors say more than HEAD's."""
    found = listing(source, exactly=True).get("")
    return None if found is None else (found["ETag"], str(found["Size"]))


def fetch_tree(uri: str) -> Path:
    """All objects below a prefix, as a folder in the local cache; raises UserError where there are none.

    Names that would leave the folder are refused.
    """
    source = Location.parse(uri)
    title = check_name(source.key.rpartition("/")[2] or source.bucket)
    found = _objects(source)
    if not found:
        raise UserError(f"{uri} does not exist: there is neither an object nor a prefix of that name")
    for name in found:
        check_name(name)
    versions = _versions(found)
    folder = cache_folder() / "trees" / _hash(endpoint(), *versions)
    if not is_cached(folder):
        with staged(folder) as staging:
            sizes = {name: entry["Size"] for name, entry in found.items()}
            list(download(source, {name: staging / title / name for name in found}, sizes))
            if _versions(_objects(source)) != versions:
                raise UserError(f"{uri} changed while it was fetched; try again")
            write_manifest(staging, kind="tree")
    return folder / title


def _objects(source: Location) -> dict[str, Mapping[str, Any]]:
    """Those below a prefix that hold something, and do not stand for a folder."""
    return {name: entry for name, entry in listing(source).items() if name and not name.endswith("/")}


def _versions(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{name} {entry['ETag']} {entry['Size']}" for name, entry in sorted(found.items())]


def fetch_any(uri: str) -> Path:
    """An object, or else all objects below that prefix."""
    return fetch_file(uri) if not uri.endswith("/") and object_exists(Location.parse(uri)) else fetch_tree(uri)


def exists(uri: str) -> bool:
    """Whether there is an object of that name, or any below it; raises UserError where S3 does not tell."""
    source = Location.parse(uri)
    return (not uri.endswith("/") and object_exists(source)) or bool(listing(source))


def version_of(place: str) -> str | None:
    """What a file, folder, object or prefix holds, as a hash; None where there is nothing.

    A file's is its sha256; the others' goes over names, sizes, and times of change or ETags.
    """
    place = unpinned(place)
    if is_uri(place):
        source = Location.parse(place)
        if not place.endswith("/") and (found := _version(source)):
            return _hash(*found)
        listed = listing(source)
        return _hash(*(f"{n} {e['ETag']} {e['Size']}" for n, e in sorted(listed.items()))) if listed else None
    path = Path(place).expanduser()
    if path.is_dir():
        states = ((file.relative_to(path).as_posix(), file.lstat()) for file in sorted(path.rglob("*")))
        return _hash(*(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states))
    return sha256_of(path) if path.is_file() else None


_PIN = "#content="


def pinned(place: str) -> str:
    """A place with a hash of what it holds behind it; raises UserError where there is nothing."""
    plain = unpinned(place)
    found = version_of(plain)
    if found is None:
        raise UserError(f"{plain} does not exist; mend the configuration, or put it there")
    return f"{plain}{_PIN}{found[:32]}"


def unpinned(place: str) -> str:
    """A place without the hash."""
    return place.partition(_PIN)[0]


def local(place: str | Path) -> Path:
    """A path for a path or an URI, pinned or not: what an URI names is fetched first.

    Raises:
        UserError: it is not there, or holds something else than it did when it was pinned.
    """
    plain, _, content = str(place).partition(_PIN)
    if content and not (version_of(plain) or "").startswith(content):
        raise UserError(f"{plain} has changed since the run was submitted; submit it again")
    return fetch_any(plain) if is_uri(plain) else Path(plain).expanduser()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
