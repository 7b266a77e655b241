"""Artifacts in S3: folders and files to and from ``s3://bucket/prefix``, whole and verified.

A folder is uploaded with its manifest last, in one object, so it is there at once or not at all; a folder that replaces
another is uploaded beside it, and the new manifest switches over. A reader takes nothing that the manifest does not
list, and checks every file's size and sha256. What was fetched is kept in a cache by its content, so that a dataset
travels once.

Credentials, endpoint and region are found as boto3 finds them: environment (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL_S3``, ``AWS_REGION``), profiles, instance roles. Failed requests are
tried again with backoff, ``AWS_MAX_ATTEMPTS`` times (5).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scop.errors import UserError
from scop.manifest import MANIFEST, FileEntry, Manifest, check_name, read_folder, sha256_of, write_atomically
from scop.progress import progress

SCHEME = "s3://"
CACHE_VARIABLE = "SCOP_CACHE"
CACHE_PARTS = ("artifacts", "objects", "trees")
"""The folders in the cache: whole artifacts, single objects, and all that is below a prefix."""
# Measured against a local server: with 1 MiB at a time instead of boto3's 256 KiB a download takes two thirds of the
# time; with 4 MiB, which the allocator maps anew each time, it takes longer again.
_PART = 32 * 2**20
_WRITE = 2**20
_AT_ONCE = 10


def is_uri(place: str | Path) -> bool:
    """Whether a place is in S3 rather than a path."""
    return str(place).startswith(SCHEME)


@dataclass(frozen=True)
class Location:
    """A bucket and a key or prefix in it, without a slash at its end."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Location:
        """Take an ``s3://`` URI apart; raises UserError where it is none."""
        bucket, _, key = uri.removeprefix(SCHEME).partition("/")
        if not is_uri(uri) or not bucket:
            raise UserError(f"{uri!r} is not of the form s3://BUCKET/PREFIX")
        return cls(bucket, key.strip("/"))

    def __truediv__(self, name: str) -> Location:
        return Location(self.bucket, f"{self.key}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")


# -- whole folders -----------------------------------------------------------------------------------------------------


def send_folder(folder: Path, uri: str) -> None:
    """Upload an artifact folder; until the manifest, which comes last, what was there before stays as it was.

    Raises:
        UserError: the folder is not whole, or S3 does not take it.
    """
    manifest, target = read_folder(folder), Location.parse(uri)
    before = _remote_manifest(target, must_exist=False)
    present = before.files if before else {}
    listed = _listing(target) if present else {}
    objects, uploads = {}, {}
    for name, entry in manifest.files.items():
        earlier = present.get(name)
        if (
            earlier is not None
            and earlier.sha256 == entry.sha256
            and _matches(earlier.key(name), folder / name, listed)
        ):
            objects[name] = earlier
            continue
        # The name itself, unless the artifact that is there, and must stay whole for now, uses it.
        place = f"{name}~{uuid.uuid4().hex[:12]}" if earlier is not None else name
        objects[name] = FileEntry(size=entry.size, sha256=entry.sha256, stored_as=place if place != name else None)
        uploads[place] = folder / name
    _upload(uploads, target)
    switched = manifest.model_copy(update={"files": objects})
    write(str(target / MANIFEST), (switched.model_dump_json(indent=1, exclude_none=True) + "\n").encode())
    _delete(target, {e.key(n) for n, e in present.items()} - {e.key(n) for n, e in objects.items()})


def _matches(key: str, file: Path, listed: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an object surely has a file's bytes: its size is the same, and its ETag an MD5 of them."""
    entry = listed.get(key)
    if entry is None or entry["Size"] != file.stat().st_size:
        return False
    etag = entry["ETag"].strip('"')
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == etag


def fetch_folder(uri: str, kind: str | None = None) -> Path:
    """The artifact folder of a URI, verified, in the local cache; nothing may be written there.

    Raises:
        UserError: it is not there, not whole, of another kind, damaged, or cannot be fetched.
    """
    source = Location.parse(uri)
    manifest = _remote_manifest(source)
    assert manifest is not None
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{uri} holds a {manifest.kind}, but a {kind} is needed")
    folder = cache_folder() / "artifacts" / manifest.identity
    if folder.exists():
        with contextlib.suppress(UserError):  # somebody changed it: fetched anew
            read_folder(folder)
            return folder
        shutil.rmtree(folder)
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
    """Fetch files, and hash each while others are on their way; returns the keys of those that are damaged."""
    damaged = []
    paths, sizes = {k: path for k, (path, _) in entries.items()}, {k: entry.size for k, (_, entry) in entries.items()}
    for key in _download(source, paths, sizes):
        path, entry = entries[key]
        if path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            damaged.append(key)
    return damaged


def _remote_manifest(source: Location, must_exist: bool = True) -> Manifest | None:
    content = read(str(source / MANIFEST), must_exist=False)
    if content is None:
        if must_exist:
            raise UserError(f"{source} holds no whole artifact (there is no {MANIFEST}); name one that a step finished")
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        if not must_exist:
            return None
        raise UserError(f"{source / MANIFEST} is damaged; run the step that makes it again") from error


# -- single files, and trees of files ----------------------------------------------------------------------------------


def fetch_file(uri: str) -> Path:
    """One object, in the local cache, by its place and version; raises UserError where it cannot be had."""
    source = Location.parse(uri)
    with _errors(source):
        head = _client().head_object(Bucket=source.bucket, Key=source.key)
    folder = cache_folder() / "objects" / _hash(_endpoint(), str(source), head["ETag"], str(head["ContentLength"]))
    name = check_name(source.key.rpartition("/")[2])
    if not (folder / name).exists():
        with _staged(folder) as staging:
            parent = Location(source.bucket, source.key.rpartition("/")[0])
            list(_download(parent, {name: staging / name}, {name: head["ContentLength"]}))
    return folder / name


def fetch_tree(uri: str) -> Path:
    """All objects below a prefix, as a folder in the local cache; raises UserError where there are none.

    Names that would leave the folder are refused.
    """
    source = Location.parse(uri)
    title = check_name(source.key.rpartition("/")[2] or source.bucket)
    found = {name: entry for name, entry in _listing(source).items() if not name.endswith("/")}
    if not found:
        raise UserError(f"{uri} does not exist: there is neither an object nor a prefix of that name")
    for name in found:
        check_name(name)
    versions = [f"{name} {entry['ETag']} {entry['Size']}" for name, entry in sorted(found.items())]
    folder = cache_folder() / "trees" / _hash(_endpoint(), *versions)
    if not folder.exists():
        with _staged(folder) as staging:
            sizes = {name: entry["Size"] for name, entry in found.items()}
            list(_download(source, {name: staging / title / name for name in found}, sizes))
    return folder / title


def fetch_any(uri: str) -> Path:
    """An object, or else all objects below that prefix."""
    return fetch_file(uri) if not uri.endswith("/") and _exists(Location.parse(uri)) else fetch_tree(uri)


def exists(uri: str) -> bool:
    """Whether there is an object of that name, or any below it; raises UserError where S3 does not tell."""
    source = Location.parse(uri)
    return (not uri.endswith("/") and _exists(source)) or bool(_listing(source))


def version_of(place: str) -> str | None:
    """What a file, folder, object or prefix holds, as a hash; None where there is nothing.

    A file's is its sha256; the others' goes over names, sizes, and times of change or ETags.
    """
    if is_uri(place):
        source = Location.parse(place)
        if not place.endswith("/") and _exists(source):
            found = {"": _client().head_object(Bucket=source.bucket, Key=source.key)}
            return _hash(found[""]["ETag"], str(found[""]["ContentLength"]))
        listed = _listing(source)
        return _hash(*(f"{n} {e['ETag']} {e['Size']}" for n, e in sorted(listed.items()))) if listed else None
    path = Path(place).expanduser()
    if path.is_dir():
        states = ((file.relative_to(path).as_posix(), file.stat()) for file in sorted(path.rglob("*")))
        return _hash(*(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states))
    return sha256_of(path) if path.is_file() else None


def stands(uri: str) -> bool:
    """Whether all of an artifact's objects are there, by a listing and not from the cache."""
    source = Location.parse(uri)
    manifest = _remote_manifest(source, must_exist=False)
    if manifest is None:
        return False
    sizes = {name: entry["Size"] for name, entry in _listing(source).items()}
    return all(sizes.get(entry.key(name)) == entry.size for name, entry in manifest.files.items())


def local(place: str | Path) -> Path:
    """A path for a path or an URI: what an URI names is fetched first."""
    return fetch_any(str(place)) if is_uri(place) else Path(place).expanduser()


# -- small objects and files, by the same calls ------------------------------------------------------------------------


def join(place: str | Path, *names: str) -> str:
    """A place below a path or an URI."""
    return "/".join((str(place).rstrip("/"), *names))


def read(place: str, must_exist: bool = True) -> bytes | None:
    """The bytes at a path or URI; None, if it need not exist, where there is nothing."""
    if is_uri(place):
        return _read_object(Location.parse(place), must_exist)
    try:
        return Path(place).read_bytes()
    except FileNotFoundError as error:
        if not must_exist:
            return None
        raise UserError(f"{place} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}") from error


def _read_object(source: Location, must_exist: bool) -> bytes | None:
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    broken = (FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
    with _errors(source, missing_is_fine=not must_exist):
        for tries_left in (2, 1, 0):  # boto3 tries requests again, not the reading of an answer
            try:
                content: bytes = _client().get_object(Bucket=source.bucket, Key=source.key)["Body"].read()
                return content
            except broken:
                if not tries_left:
                    raise
    return None


def exists_at(place: str, name: str) -> bool:
    """Whether there is a file or object of this name below a path or URI."""
    return _exists(Location.parse(place) / name) if is_uri(place) else (Path(place) / name).exists()


def write(place: str, content: bytes) -> None:
    """Put bytes at a path or URI, at once: a reader sees the old ones or the new ones."""
    if is_uri(place):
        target = Location.parse(place)
        with _errors(target):
            _client().put_object(Bucket=target.bucket, Key=target.key, Body=content)
        return
    path = Path(place)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from error


def names(place: str) -> list[str]:
    """The names of all files or objects below a path or URI, relative to it, in order."""
    if is_uri(place):
        return sorted(_listing(Location.parse(place)))
    root = Path(place)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def delete(place: str, which: list[str]) -> None:
    """Remove files or objects by their names below a path or URI; what is gone already is no error."""
    if is_uri(place):
        _delete(Location.parse(place), set(which))
        return
    root = Path(place)
    for name in which:
        (root / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # where it is empty now, as prefixes in S3 vanish too
        root.rmdir()


# -- transfer ----------------------------------------------------------------------------------------------------------


def _upload(files: Mapping[str, Path], target: Location) -> None:
    """Files to objects below a prefix, in parallel, large ones in parts."""
    total = sum(path.stat().st_size for path in files.values())
    with _errors(target), _transfers(total, f"to {target}") as (manager, counting):
        started = [
            manager.upload(str(path), target.bucket, (target / key).key, subscribers=counting)
            for key, path in files.items()
        ]
        for future in started:
            future.result()


def _download(source: Location, files: Mapping[str, Path], sizes: Mapping[str, int]) -> Iterator[str]:
    """Objects below a prefix to files, in parallel, large ones in ranges; gives each key when its file is there."""
    from botocore.exceptions import FlexibleChecksumError

    left = dict(files)
    with _errors(source):
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        for last_try in (False, True):
            try:
                with _transfers(sum(sizes[key] for key in left), f"from {source}") as (manager, counting):
                    started = {
                        key: manager.download(source.bucket, (source / key).key, str(path), subscribers=counting)
                        for key, path in left.items()
                    }
                    for key, future in started.items():
                        future.result()
                        del left[key]
                        yield key
                return
            except FlexibleChecksumError:  # the one failure of a transfer that boto3 does not try again
                if last_try:
                    raise


@contextlib.contextmanager
def _transfers(total: int, label: str) -> Iterator[tuple[Any, list[Any]]]:
    """A transfer manager, and the subscribers by which transfers show their progress."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager
    from s3transfer.subscribers import BaseSubscriber

    with progress(round(total / 1e6), label, unit="MB") as bar:

        class Count(BaseSubscriber):  # type: ignore[misc]
            def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
                bar.update(bytes_transferred / 1e6)

        settings = TransferConfig(
            multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=_AT_ONCE, io_chunksize=_WRITE
        )
        with create_transfer_manager(_client(), settings) as manager:
            yield manager, [Count()]


def _listing(source: Location) -> dict[str, Mapping[str, Any]]:
    """Objects below a prefix, by their relative names."""
    prefix = f"{source.key}/" if source.key else ""
    with _errors(source):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=prefix)
        return {entry["Key"][len(prefix) :]: entry for page in pages for entry in page.get("Contents", [])}


def _exists(source: Location) -> bool:
    with _errors(source):
        found = _client().list_objects_v2(Bucket=source.bucket, Prefix=source.key, MaxKeys=1).get("Contents", [])
        # The first in order of all that begin with the key, so the object itself if there is one.
        return bool(found) and found[0]["Key"] == source.key


def _delete(source: Location, which: set[str]) -> None:
    # One by one: some servers want an MD5 for the request that deletes many.
    with _errors(source):
        for name in sorted(which):
            _client().delete_object(Bucket=source.bucket, Key=(source / name).key)


@cache
def _client() -> Any:
    import boto3
    from botocore.config import Config

    retries = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"total_max_attempts": 5}
    settings = Config(
        retries={"mode": "standard", **retries},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=2 * _AT_ONCE,
        user_agent_extra="scop",
    )
    try:
        return boto3.session.Session().client("s3", config=settings)
    except Exception as error:  # a profile that does not exist, an endpoint that is no URL
        raise UserError(f"S3 cannot be used: {error}") from error


def forget_client() -> None:
    """Look at the environment anew; for programs that change it."""
    _client.cache_clear()


def _endpoint() -> str:
    return str(_client().meta.endpoint_url)


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


# -- errors ------------------------------------------------------------------------------------------------------------

_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
            "TokenRefreshRequired", "RequestExpired", "RequestTimeTooSkewed", "InvalidClientTokenId"}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "403", "Forbidden", "UnauthorizedAccess"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest", "IncompleteBody"}


@contextlib.contextmanager
def _errors(location: Location, missing_is_fine: bool = False) -> Iterator[None]:
    """Whatever boto3 raises as a UserError of one line, which says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if missing_is_fine and code in ("NoSuchKey", "404"):
            return
        raise UserError(_explain_refusal(error, code, location)) from error
    # boto3 stumbles, with an AttributeError, over a server's failure in an answer that announces a checksum.
    except (BotoCoreError, Boto3Error, RetriesExceededError, OSError, AttributeError) as error:
        raise UserError(_explain_failure(error, location)) from error


def _explain_refusal(error: Any, code: str, location: Location) -> str:
    said = error.response.get("Error", {})
    if code == "NoSuchBucket":
        return f"bucket {location.bucket!r} does not exist at {_endpoint()}; make it, or mend {location}"
    if code in ("NoSuchKey", "404"):
        return f"{location} does not exist"
    if code in _REFUSED:
        return f"S3 refuses the credentials ({code}: {said.get('Message', '')}); renew AWS_ACCESS_KEY_ID and the others"
    if code in _DENIED:
        return f"access to {location} is denied ({error.operation_name}); give these credentials the right to it"
    if code in _ELSEWHERE:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = said.get("Region") or headers.get("x-amz-bucket-region")
        own = _client().meta.region_name
        remedy = f"set AWS_REGION={region}" if region else "set AWS_REGION to the bucket's region"
        return f"bucket {location.bucket!r} is not in region {own!r} ({code}); {remedy}"
    if code in _DAMAGED:
        return f"{location} was damaged on its way (wrong checksum, {code}); try again"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500:
        return f"S3 at {_endpoint()} fails, after several tries, with {code} on {location}; try again later"
    return f"S3 refuses {error.operation_name} of {location}: {code} {said.get('Message', '')}".rstrip()


def _explain_failure(error: Exception, location: Location) -> str:
    from botocore import exceptions

    match error:
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return (
                f"there are no credentials for {location}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE"
            )
        case exceptions.FlexibleChecksumError():
            return f"{location} was damaged on its way (wrong checksum); try again"
        case exceptions.ParamValidationError():
            return f"{location} is no valid place in S3: {' '.join(str(error).split())}"
        case OSError() if error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"cannot write {error.filename or cache_folder()} ({error.strerror}); free it, or set {CACHE_VARIABLE}"
            )
        case exceptions.HTTPClientError() | exceptions.ConnectionError() | OSError():
            return f"S3 at {_endpoint()} cannot be reached ({error}); check AWS_ENDPOINT_URL_S3 and the network"
    if isinstance(error, AttributeError):
        return f"S3 at {_endpoint()} fails on {location}; try again later"
    if last := getattr(error, "last_exception", None):
        return f"{location} broke off again and again on its way ({last}); try again later"
    return f"S3 failed on {location}: {error}"
