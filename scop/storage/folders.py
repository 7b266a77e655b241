"""Artifact folders in S3, whole and verified.

A folder is uploaded with its manifest last, in one object, so it is there at once or not at all; a folder that replaces
another is uploaded beside it, and the new manifest switches over. A reader takes nothing that the manifest does not
list, and checks every file's size and sha256.
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
from scop.storage.cache import cache_folder, is_cached, staged
from scop.storage.manifest import MANIFEST, FileEntry, Manifest, read_folder, sha256_of, write_atomically
from scop.storage.s3 import (
    Location,
    copy_object,
    delete_objects,
    download,
    is_uri,
    listing,
    read_object,
    upload,
    write_object,
)

_TRIES = 3
"""To fetch what is being replaced."""
_REPLACEMENT = re.compile(r"~[0-9a-f]{12}$")


def send_folder(folder: Path, uri: str) -> None:
    """Upload an artifact folder; until the manifest, which comes last, the artifact that was there stays as it was.

    A file that replaces one is sent by another name first, which the manifest says (`FileEntry.stored_as`). When all
    has switched over, it is copied to its own name, by which KFP's launcher and people know it, and so again in the
    manifest.

    Raises:
        UserError: the folder is not whole, or S3 does not take it.
    """
    manifest, target = read_folder(folder), Location.parse(uri)
    before = _remote_manifest(target, must_exist=False)
    present = before.files if before else {}
    listed = listing(target) if present else {}
    objects, uploads = {}, {}
    for name, entry in manifest.files.items():
        earlier = present.get(name)
        if earlier is not None and earlier.sha256 == entry.sha256 and _is_untouched(earlier, name, listed):
            objects[name] = earlier
            continue
        # The name itself, unless the artifact that is there, and must stay whole for now, uses it.
        place = f"{name}~{uuid.uuid4().hex[:12]}" if earlier is not None else name
        objects[name] = FileEntry(size=entry.size, sha256=entry.sha256, stored_as=place if place != name else None)
        uploads[place] = folder / name
    upload(uploads, target)
    listed = listing(target)
    for name, entry in objects.items():
        if entry.key(name) not in listed:
            raise UserError(
                f"{target / entry.key(name)} is gone right after it was sent; does another run write there?"
            )
        objects[name] = entry.model_copy(update={"etag": listed[entry.key(name)]["ETag"]})
    _write_manifest(target, manifest, objects)
    if elsewhere := {name: entry.stored_as for name, entry in objects.items() if entry.stored_as}:
        for name, place in elsewhere.items():
            copy_object(target / place, target / name)
        copied = listing(target)
        for name in elsewhere:
            entry, found = objects[name], copied.get(name)
            if found is None or found["Size"] != entry.size:
                raise UserError(f"{target / name} has changed right after it was sent; does another run write there?")
            objects[name] = FileEntry(size=entry.size, sha256=entry.sha256, etag=found["ETag"])
        _write_manifest(target, manifest, objects)
    # What the artifact had before, and what tries that broke off have left of its files.
    ours = {*present, *objects}
    left = {entry.key(name) for name, entry in present.items()}
    left |= {key for key in listed if _REPLACEMENT.sub("", key) in ours}
    delete_objects(target, left - {*objects})


def fetch_folder(uri: str, kind: str | None = None) -> Path:
    """The artifact folder of a URI, verified, in the local cache; nothing may be written there.

    Raises:
        UserError: it is not there, not whole, of another kind, damaged, or cannot be fetched.
    """
    source = Location.parse(uri)
    manifest = _remote_manifest(source)
    for _ in range(_TRIES - 1):
        try:
            return _fetched(source, manifest, kind)
        except UserError:
            before, manifest = manifest, _remote_manifest(source)
            if manifest == before:
                raise
        # Replaced meanwhile: what the old manifest names is gone.
    return _fetched(source, manifest, kind)


def local_folder(place: str, kind: str) -> Path:
    """An artifact's folder, here or in S3, on this machine and whole; raises UserError where it is not."""
    if is_uri(place):
        return fetch_folder(place, kind)
    read_folder(Path(place), kind)
    return Path(place)


def stands(uri: str) -> bool:
    """Whether all of an artifact's objects are there, by a listing and not from the cache."""
    source = Location.parse(uri)
    manifest = _remote_manifest(source, must_exist=False)
    if manifest is None:
        return False
    listed = listing(source)
    return all(_is_untouched(entry, name, listed) for name, entry in manifest.files.items())


def _write_manifest(target: Location, manifest: Manifest, objects: Mapping[str, FileEntry]) -> None:
    switched = manifest.model_copy(update={"files": dict(objects)})
    write_object(target / MANIFEST, (switched.model_dump_json(indent=1, exclude_none=True) + "\n").encode())


def _is_untouched(entry: FileEntry, name: str, listed: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an object is the one that was sent, by its size and, where it was noted, its ETag."""
    found = listed.get(entry.key(name))
    return found is not None and found["Size"] == entry.size and entry.etag in (None, found["ETag"])


def _fetched(source: Location, manifest: Manifest | None, kind: str | None) -> Path:
    """What a manifest says, from the cache or from S3."""
    assert manifest is not None
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{source} holds a {manifest.kind}, but a {kind} is needed")
    folder = cache_folder() / "artifacts" / manifest.identity
    if is_cached(folder):
        return folder
    with staged(folder) as staging:
        entries = {entry.key(name): (staging / name, entry) for name, entry in manifest.files.items()}
        damaged = list(entries)
        for _ in range(2):  # damaged on its way, or at its place?
            damaged = _download_intact(source, {key: entries[key] for key in damaged})
        if damaged:
            raise UserError(
                f"{source / damaged[0]} does not match its manifest (wrong checksum); run the step that makes it again"
            )
        plain = {name: FileEntry(size=e.size, sha256=e.sha256) for name, e in manifest.files.items()}
        text = manifest.model_copy(update={"files": plain}).model_dump_json(indent=1, exclude_none=True)
        write_atomically(staging / MANIFEST, text + "\n")
    return folder


def _download_intact(source: Location, entries: Mapping[str, tuple[Path, FileEntry]]) -> list[str]:
    """Fetch files, and hash those that are there while others are on their way; the keys of those that are damaged."""
    paths, sizes = {k: path for k, (path, _) in entries.items()}, {k: entry.size for k, (_, entry) in entries.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        intact = {key: pool.submit(_is_intact, *entries[key]) for key in download(source, paths, sizes)}
    return [key for key, result in intact.items() if not result.result()]


def _is_intact(path: Path, entry: FileEntry) -> bool:
    return path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def _remote_manifest(source: Location, must_exist: bool = True) -> Manifest | None:
    content = read_object(source / MANIFEST, must_exist=False)
    if content is None:
        if must_exist:
            raise UserError(f"{source} holds no whole artifact (there is no {MANIFEST}); name one that a step finished")
        return None
    try:
        return Manifest.parse(content, str(source / MANIFEST))
    except UserError:
        if not must_exist:  # what is there may be replaced
            return None
        raise
