"""Artifact folders in S3: uploaded completely or not at all, and verified when fetched.

The manifest is uploaded last, as one object, so an artifact appears at once or not at all. An artifact that replaces
another is uploaded beside it, and the new manifest replaces the old one last. Readers use only files that the manifest
lists, and check the size and sha256 of each.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scop.errors import UserError
from scop.storage.cache import Cache
from scop.storage.files import is_s3
from scop.storage.manifest import MANIFEST, FileEntry, Manifest, read_folder, sha256_of, write_atomically
from scop.storage.s3 import (
    Location,
    copy_object,
    delete_objects,
    download,
    list_objects,
    read_object,
    upload,
    write_object,
)

_ATTEMPTS = 3
"""Number of attempts to fetch an artifact that is being replaced."""
_REPLACEMENT = re.compile(r"~[0-9a-f]{12}$")


def upload_folder(folder: Path, uri: str) -> None:
    """Upload an artifact folder; an existing artifact stays complete until the new manifest is written.

    A file that replaces another is uploaded under a temporary name first, which the manifest records
    (`FileEntry.stored_as`). After the manifest is written, the file is copied to its own name, which KFP's launcher and
    people use, and the manifest is written again.

    Raises:
        UserError: the folder is incomplete, or S3 refuses.
    """
    manifest, target = read_folder(folder), Location.parse(uri)
    before = _remote_manifest(target)
    present = before.files if before else {}
    listed = list_objects(target) if present else {}
    objects, uploads = {}, {}
    for name, entry in manifest.files.items():
        earlier = present.get(name)
        if earlier is not None and earlier.sha256 == entry.sha256 and _is_untouched(earlier, name, listed):
            objects[name] = earlier
            continue
        # Use the file's own name, unless the existing artifact, which must stay complete for now, uses it.
        key = f"{name}~{uuid.uuid4().hex[:12]}" if earlier is not None else name
        objects[name] = FileEntry(size=entry.size, sha256=entry.sha256, stored_as=key if key != name else None)
        uploads[key] = folder / name
    upload(uploads, target)
    listed = list_objects(target)
    for name, entry in objects.items():
        if entry.key(name) not in listed:
            raise UserError(
                f"{target / entry.key(name)} vanished right after the upload; does another run write to this prefix?"
            )
        objects[name] = entry.model_copy(update={"etag": listed[entry.key(name)]["ETag"]})
    _write_manifest(target, manifest, objects)
    if renamed := {name: entry.stored_as for name, entry in objects.items() if entry.stored_as}:
        for name, key in renamed.items():
            copy_object(target / key, target / name)
        copied = list_objects(target)
        for name in renamed:
            entry, found = objects[name], copied.get(name)
            if found is None or found["Size"] != entry.size:
                raise UserError(
                    f"{target / name} changed right after the upload; does another run write to this prefix?"
                )
            objects[name] = FileEntry(size=entry.size, sha256=entry.sha256, etag=found["ETag"])
        _write_manifest(target, manifest, objects)
    # Delete files of the earlier artifact and leftovers of interrupted uploads.
    ours = {*present, *objects}
    left = {entry.key(name) for name, entry in present.items()}
    left |= {key for key in listed if _REPLACEMENT.sub("", key) in ours}
    delete_objects(target, left - {*objects})


def fetch_folder(uri: str, cache: Cache, kind: str | None = None) -> Path:
    """Fetch an artifact folder into the cache and verify it; the folder must not be changed.

    Args:
        uri: an ``s3://`` URI.
        cache: the local cache.
        kind: required kind, or None for any.

    Raises:
        UserError: it does not exist, is incomplete, damaged or of another kind, or cannot be fetched.
    """
    source = Location.parse(uri)
    manifest = _require_manifest(source)
    for _ in range(_ATTEMPTS - 1):
        try:
            return _fetch(source, manifest, cache, kind)
        except UserError:
            before, manifest = manifest, _require_manifest(source)
            if manifest == before:
                raise
        # The artifact was replaced meanwhile, and the old manifest's files are gone: try again.
    return _fetch(source, manifest, cache, kind)


def local_folder(uri: str, cache: Cache, kind: str) -> Path:
    """Return an artifact's local folder, fetched from S3 if necessary; raise UserError unless it is complete."""
    if is_s3(uri):
        return fetch_folder(uri, cache, kind)
    read_folder(Path(uri), kind)
    return Path(uri)


def is_complete(uri: str) -> bool:
    """Whether all objects of an artifact exist in S3; the cache is not used."""
    source = Location.parse(uri)
    manifest = _remote_manifest(source)
    if manifest is None:
        return False
    listed = list_objects(source)
    return all(_is_untouched(entry, name, listed) for name, entry in manifest.files.items())


def _write_manifest(target: Location, manifest: Manifest, objects: Mapping[str, FileEntry]) -> None:
    switched = manifest.model_copy(update={"files": dict(objects)})
    write_object(target / MANIFEST, (switched.model_dump_json(indent=1, exclude_none=True) + "\n").encode())


def _is_untouched(entry: FileEntry, name: str, listed: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an object is unchanged since its upload, by size and, if known, ETag."""
    found = listed.get(entry.key(name))
    return found is not None and found["Size"] == entry.size and entry.etag in (None, found["ETag"])


def _fetch(source: Location, manifest: Manifest, cache: Cache, kind: str | None) -> Path:
    """Return the folder that a manifest describes, from the cache or from S3."""
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{source} holds a {manifest.kind}, but a {kind} is needed")
    folder = cache.folder("artifacts", manifest.identity)
    if cache.has(folder):
        return folder
    with cache.staged(folder) as staging:
        entries = {entry.key(name): (staging / name, entry) for name, entry in manifest.files.items()}
        damaged = list(entries)
        for _ in range(2):  # a second attempt distinguishes damage in transit from damage in S3
            damaged = _download_damaged(source, {key: entries[key] for key in damaged})
        if damaged:
            raise UserError(
                f"{source / damaged[0]} does not match its manifest (wrong checksum); rerun the step that wrote it"
            )
        plain = {name: FileEntry(size=e.size, sha256=e.sha256) for name, e in manifest.files.items()}
        text = manifest.model_copy(update={"files": plain}).model_dump_json(indent=1, exclude_none=True)
        write_atomically(staging / MANIFEST, text + "\n")
    return folder


def _download_damaged(source: Location, entries: Mapping[str, tuple[Path, FileEntry]]) -> list[str]:
    """Download files, hashing each while others are downloading; return the keys of damaged ones."""
    paths, sizes = {k: path for k, (path, _) in entries.items()}, {k: entry.size for k, (_, entry) in entries.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        intact = {key: pool.submit(_is_intact, *entries[key]) for key in download(source, paths, sizes)}
    return [key for key, result in intact.items() if not result.result()]


def _is_intact(path: Path, entry: FileEntry) -> bool:
    return path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def _remote_manifest(source: Location) -> Manifest | None:
    """Read an artifact's manifest; return None if it is missing or damaged, so that it may be replaced."""
    content = read_object(source / MANIFEST)
    try:
        return None if content is None else Manifest.parse(content, str(source / MANIFEST))
    except UserError:
        return None


def _require_manifest(source: Location) -> Manifest:
    content = read_object(source / MANIFEST)
    if content is None:
        raise UserError(
            f"{source} holds no complete artifact (it has no {MANIFEST}); use the output of a finished step"
        )
    return Manifest.parse(content, str(source / MANIFEST))
