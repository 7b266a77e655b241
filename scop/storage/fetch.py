"""Fetching files and trees from S3 into the local cache, and versions of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scop.errors import UserError
from scop.storage.cache import Cache
from scop.storage.files import is_s3
from scop.storage.manifest import check_name, sha256_of, write_manifest
from scop.storage.s3 import Location, download, endpoint, list_objects, object_exists

_PIN = "#content="


def local_path(uri: str | Path, cache: Cache) -> Path:
    """Return a local path for a path or URI, pinned or not; files in S3 are fetched first.

    Raises:
        UserError: it does not exist, or its content has changed since it was pinned.
    """
    plain, _, content = str(uri).partition(_PIN)
    if content and not (content_version(plain) or "").startswith(content):
        raise UserError(f"{plain} has changed since the run was submitted; submit it again")
    if not is_s3(plain):
        return Path(plain).expanduser()
    is_object = not plain.endswith("/") and object_exists(Location.parse(plain))
    return fetch_file(plain, cache) if is_object else fetch_tree(plain, cache)


def fetch_file(uri: str, cache: Cache) -> Path:
    """Fetch one object into the cache; raise UserError if it cannot be fetched."""
    source = Location.parse(uri)
    version = _object_version(source)
    if version is None:
        raise UserError(f"{uri} does not exist")
    folder = cache.folder("objects", _hash(endpoint(), str(source), *version))
    name = check_name(source.key.rpartition("/")[2])
    if not cache.has(folder):
        with cache.staged(folder) as staging:
            parent = Location(source.bucket, source.key.rpartition("/")[0])
            list(download(parent, {name: staging / name}, {name: int(version[1])}))
            if _object_version(source) != version:
                raise UserError(f"{uri} changed while it was fetched; try again")
            write_manifest(staging, kind="object")
    return folder / name


def fetch_tree(uri: str, cache: Cache) -> Path:
    """Fetch all objects below a prefix into a folder of the cache.

    Raises:
        UserError: there are no objects, they cannot be fetched, or a name points outside the folder.
    """
    source = Location.parse(uri)
    title = check_name(source.key.rpartition("/")[2] or source.bucket)
    found = _tree(source)
    if not found:
        raise UserError(f"{uri} does not exist: no object and no prefix has this name")
    for name in found:
        check_name(name)
    versions = _versions(found)
    folder = cache.folder("trees", _hash(endpoint(), *versions))
    if not cache.has(folder):
        with cache.staged(folder) as staging:
            sizes = {name: entry["Size"] for name, entry in found.items()}
            list(download(source, {name: staging / title / name for name in found}, sizes))
            if _versions(_tree(source)) != versions:
                raise UserError(f"{uri} changed while it was fetched; try again")
            write_manifest(staging, kind="tree")
    return folder / title


def uri_exists(uri: str) -> bool:
    """Whether an ``s3://`` URI names an object or a prefix of objects; raise UserError if S3 cannot be read."""
    source = Location.parse(uri)
    return (not uri.endswith("/") and object_exists(source)) or bool(list_objects(source))


def content_version(uri: str) -> str | None:
    """Return a hash of the content of a file, folder, object or prefix, or None if it does not exist.

    For a file this is its sha256. For the others it covers names, sizes, and modification times or ETags.
    """
    uri = unpin(uri)
    if is_s3(uri):
        source = Location.parse(uri)
        if not uri.endswith("/") and (version := _object_version(source)):
            return _hash(*version)
        listed = list_objects(source)
        return _hash(*_versions(listed)) if listed else None
    path = Path(uri).expanduser()
    if path.is_dir():
        states = ((file.relative_to(path).as_posix(), file.lstat()) for file in sorted(path.rglob("*")))
        return _hash(*(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states))
    return sha256_of(path) if path.is_file() else None


def pin(uri: str) -> str:
    """Append a hash of the current content to a URI; raise UserError if it does not exist.

    KFP's cache compares only parameters: without the hash, new data with the same name would count as unchanged.
    """
    plain = unpin(uri)
    version = content_version(plain)
    if version is None:
        raise UserError(f"{plain} does not exist; correct the configuration, or upload it")
    return f"{plain}{_PIN}{version[:32]}"


def unpin(uri: str) -> str:
    """Return a URI without the hash that `pin` appends."""
    return uri.partition(_PIN)[0]


def _object_version(source: Location) -> tuple[str, str] | None:
    """Return an object's ETag and size, or None if it does not exist. Listing has clearer errors than HEAD requests."""
    found = list_objects(source, exactly=True).get("")
    return None if found is None else (found["ETag"], str(found["Size"]))


def _tree(source: Location) -> dict[str, Mapping[str, Any]]:
    """Return the objects below a prefix, without folder markers."""
    return {name: entry for name, entry in list_objects(source).items() if name and not name.endswith("/")}


def _versions(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{name} {entry['ETag']} {entry['Size']}" for name, entry in sorted(found.items())]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
