"""Artifacts in S3: folders and files to and from ``s3://bucket/prefix``, whole and verified.

A folder is uploaded with its manifest last, in one object, so it is there at once or not at all; a folder that replaces
another is uploaded beside it, and the new manifest switches over. A reader takes nothing that the manifest does not
list, and checks every file's size and sha256. What was fetched is kept in a cache by its content, so that a dataset
travels once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scop.errors import UserError
from scop.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_name,
    read_folder,
    sha256_of,
    write_atomically,
    write_manifest,
)
from scop.s3 import SCHEME as SCHEME
from scop.s3 import (
    Location,
    copy_object,
    delete_objects,
    download,
    endpoint,
    listing,
    object_exists,
    read_object,
    upload,
    write_object,
)
from scop.s3 import is_uri as is_uri

CACHE_VARIABLE = "SCOP_CACHE"
CACHE_PARTS = ("artifacts", "objects", "trees")
"""The folders in the cache: whole artifacts, single objects, and all that is below a prefix."""
# -- whole folders -----------------------------------------------------------------------------------------------------


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


_TRIES = 3
"""To fetch what is being replaced."""
_REPLACEMENT = re.compile(r"~[0-9a-f]{12}$")


def _write_manifest(target: Location, manifest: Manifest, objects: Mapping[str, FileEntry]) -> None:
    switched = manifest.model_copy(update={"files": dict(objects)})
    write(str(target / MANIFEST), (switched.model_dump_json(indent=1, exclude_none=True) + "\n").encode())


def _is_untouched(entry: FileEntry, name: str, listed: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an object is the one that was sent, by its size and, where it was noted, its ETag."""
    found = listed.get(entry.key(name))
    return found is not None and found["Size"] == entry.size and entry.etag in (None, found["ETag"])


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


def _fetched(source: Location, manifest: Manifest | None, kind: str | None) -> Path:
    """What a manifest says, from the cache or from S3."""
    assert manifest is not None
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{source} holds a {manifest.kind}, but a {kind} is needed")
    folder = cache_folder() / "artifacts" / manifest.identity
    if _is_cached(folder):
        return folder
    with _staged(folder) as staging:
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
    content = read(str(source / MANIFEST), must_exist=False)
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


# -- single files, and trees of files ----------------------------------------------------------------------------------


def local_folder(place: str, kind: str) -> Path:
    """An artifact's folder, here or in S3, on this machine and whole; raises UserError where it is not."""
    if is_uri(place):
        return fetch_folder(place, kind)
    read_folder(Path(place), kind)
    return Path(place)


def fetch_file(uri: str) -> Path:
    """One object, in the local cache, by its place and version; raises UserError where it cannot be had."""
    source = Location.parse(uri)
    found = _version(source)
    if found is None:
        raise UserError(f"{uri} does not exist")
    folder = cache_folder() / "objects" / _hash(endpoint(), str(source), *found)
    name = check_name(source.key.rpartition("/")[2])
    if not _is_cached(folder):
        with _staged(folder) as staging:
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


def _is_cached(folder: Path) -> bool:
    """Whether the cache has it, and as it came; what somebody changed is removed."""
    if folder.exists():
        with contextlib.suppress(UserError):
            read_folder(folder)
            return True
        shutil.rmtree(folder)
    return False


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
    if not _is_cached(folder):
        with _staged(folder) as staging:
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


def stands(uri: str) -> bool:
    """Whether all of an artifact's objects are there, by a listing and not from the cache."""
    source = Location.parse(uri)
    manifest = _remote_manifest(source, must_exist=False)
    if manifest is None:
        return False
    listed = listing(source)
    return all(_is_untouched(entry, name, listed) for name, entry in manifest.files.items())


def local(place: str | Path) -> Path:
    """A path for a path or an URI, pinned or not: what an URI names is fetched first.

    Raises:
        UserError: it is not there, or holds something else than it did when it was pinned.
    """
    plain, _, content = str(place).partition(_PIN)
    if content and not (version_of(plain) or "").startswith(content):
        raise UserError(f"{plain} has changed since the run was submitted; submit it again")
    return fetch_any(plain) if is_uri(plain) else Path(plain).expanduser()


# -- small objects and files, by the same calls ------------------------------------------------------------------------


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


# -- cache -------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where fetched artifacts are kept: SCOP_CACHE, or scop in the user's cache folder; may be removed at any time."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scop"


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
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


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
