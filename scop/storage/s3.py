"""Objects in S3, accessed with boto3: upload, download, list, copy and delete. Errors are one line with a remedy.

boto3 finds credentials, endpoint and region in the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_ENDPOINT_URL_S3``, ``AWS_REGION``), in profiles and in instance roles. Failed requests are retried with backoff,
up to ``AWS_MAX_ATTEMPTS`` attempts (default: 5).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scop.errors import DamagedError, UserError
from scop.system.progress import progress

SCHEME = "s3://"
# Measured with a local server: with chunks of 1 MiB instead of boto3's 256 KiB, a download takes two thirds of the
# time. Chunks of 4 MiB are slower again, because the allocator maps each of them anew.
_PART_SIZE = 32 * 2**20
_IO_CHUNK = 2**20
_CONCURRENCY = 10
_COPY_PART_SIZE = 2**32
"""In bytes; S3 copies up to 5 GiB in one request."""


def is_s3(uri: str | Path) -> bool:
    """Whether a path or URI is an ``s3://`` URI."""
    return str(uri).startswith(SCHEME)


@dataclass(frozen=True)
class Location:
    """A bucket and a key or prefix in it, without a trailing slash."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Location:
        """Parse an ``s3://`` URI; raise UserError if it is not one."""
        bucket, _, key = uri.removeprefix(SCHEME).partition("/")
        if not is_s3(uri) or not bucket:
            raise UserError(f"{uri!r} does not have the form s3://BUCKET/PREFIX")
        return cls(bucket, key.strip("/"))

    def __truediv__(self, name: str) -> Location:
        return Location(self.bucket, f"{self.key}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")


# -- many objects ------------------------------------------------------------------------------------------------------


def upload(files: Mapping[str, Path], target: Location) -> None:
    """Upload files to objects below a prefix, in parallel, large ones in parts."""
    total = sum(path.stat().st_size for path in files.values())
    with errors(target), _transfers(total, f"to {target}") as (manager, counting):
        started = [
            manager.upload(str(path), target.bucket, (target / key).key, subscribers=counting)
            for key, path in files.items()
        ]
        for future in started:
            future.result()


def download(source: Location, files: Mapping[str, Path], sizes: Mapping[str, int]) -> Iterator[str]:
    """Download objects below a prefix, in parallel, large ones in ranges; yield each key when its file is complete."""
    from botocore.exceptions import FlexibleChecksumError

    left = dict(files)
    with errors(source):
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        for last_attempt in (False, True):
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
            except FlexibleChecksumError:  # the one failure of a transfer that boto3 does not retry
                if last_attempt:
                    raise


@contextlib.contextmanager
def _transfers(total: int, label: str) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a transfer manager, and the subscribers that show the progress of its transfers."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager
    from s3transfer.subscribers import BaseSubscriber

    with progress(round(total / 1e6), label, unit="MB") as bar:

        class Count(BaseSubscriber):  # type: ignore[misc]
            def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
                bar.update(bytes_transferred / 1e6)

        settings = TransferConfig(
            multipart_threshold=_PART_SIZE,
            multipart_chunksize=_PART_SIZE,
            max_concurrency=_CONCURRENCY,
            io_chunksize=_IO_CHUNK,
        )
        with create_transfer_manager(client(), settings) as manager:
            yield manager, [Count()]


def list_objects(source: Location, exactly: bool = False) -> dict[str, Mapping[str, Any]]:
    """List objects below a prefix by relative name; with `exactly`, only the object with this key, as an empty name."""
    prefix = source.key if exactly or not source.key else f"{source.key}/"
    with errors(source):
        if exactly:  # if it exists, it sorts before all other keys with this prefix
            found = client().list_objects_v2(Bucket=source.bucket, Prefix=prefix, MaxKeys=1).get("Contents", [])
            return {"": found[0]} if found and found[0]["Key"] == source.key else {}
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=prefix)
        return {entry["Key"][len(prefix) :]: entry for page in pages for entry in page.get("Contents", [])}


def object_exists(source: Location) -> bool:
    """Whether an object with exactly this key exists."""
    return bool(list_objects(source, exactly=True))


def delete_objects(source: Location, which: set[str]) -> None:
    """Delete objects by name below a prefix; missing objects are ignored."""
    # One by one: some servers require an MD5 in a request that deletes several.
    with errors(source):
        for name in sorted(which):
            client().delete_object(Bucket=source.bucket, Key=(source / name).key)


@cache
def client() -> Any:
    """Return boto3's S3 client, one per process; raise UserError if its settings are invalid."""
    import boto3
    from botocore.config import Config

    retries = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"total_max_attempts": 5}
    settings = Config(
        retries={"mode": "standard", **retries},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=2 * _CONCURRENCY,
        user_agent_extra="scop",
    )
    try:
        return boto3.session.Session().client("s3", config=settings)
    except Exception as error:  # a missing profile, or an endpoint that is not a URL
        raise UserError(f"S3 cannot be used: {error}") from error


def forget_client() -> None:
    """Create a new client at the next call, for programs that change the environment."""
    client.cache_clear()


def s3_variables() -> dict[str, str]:
    """Return the settings that boto3 found in files or roles of this machine as environment variables.

    They are for a process without these files and roles. Temporary credentials are those currently valid.
    """
    import boto3

    session = boto3.session.Session()
    variables = {"AWS_REGION": client().meta.region_name, "AWS_ENDPOINT_URL_S3": endpoint()}
    if endpoint().endswith(".amazonaws.com"):  # boto3 finds it without help
        del variables["AWS_ENDPOINT_URL_S3"]
    if found := session.get_credentials():
        keys = found.get_frozen_credentials()
        variables |= {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
        variables |= {"AWS_SESSION_TOKEN": keys.token} if keys.token else {}
    return {name: value for name, value in variables.items() if value}


def endpoint() -> str:
    """Return the server's address, for messages."""
    return str(client().meta.endpoint_url)


# -- single objects ----------------------------------------------------------------------------------------------------


def read_object(source: Location) -> bytes | None:
    """Read an object, or return None if it does not exist."""
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    broken = (FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
    with errors(source, missing_is_fine=True):
        for attempts_left in (2, 1, 0):  # boto3 retries requests, but not the reading of a response
            try:
                content: bytes = client().get_object(Bucket=source.bucket, Key=source.key)["Body"].read()
                return content
            except broken:
                if not attempts_left:
                    raise
    return None


def write_object(target: Location, content: bytes) -> None:
    """Write an object atomically: readers see the old object or the new one."""
    with errors(target):
        client().put_object(Bucket=target.bucket, Key=target.key, Body=content)


def copy_object(source: Location, target: Location) -> None:
    """Copy an object within S3."""
    from boto3.s3.transfer import TransferConfig

    whole = TransferConfig(multipart_threshold=_COPY_PART_SIZE, multipart_chunksize=_COPY_PART_SIZE)
    with errors(target):
        client().copy({"Bucket": source.bucket, "Key": source.key}, target.bucket, target.key, Config=whole)


# -- errors ------------------------------------------------------------------------------------------------------------

_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
            "TokenRefreshRequired", "RequestExpired", "RequestTimeTooSkewed", "InvalidClientTokenId"}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "403", "Forbidden", "UnauthorizedAccess"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest", "IncompleteBody"}


@contextlib.contextmanager
def errors(location: Location, missing_is_fine: bool = False) -> Iterator[None]:
    """Convert exceptions of boto3 to a UserError of one line, with a remedy."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        FlexibleChecksumError,
        IncompleteReadError,
        ResponseStreamingError,
    )
    from s3transfer.exceptions import RetriesExceededError

    interrupted = (FlexibleChecksumError, IncompleteReadError, ResponseStreamingError, RetriesExceededError)
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if missing_is_fine and code in ("NoSuchKey", "404"):
            return
        kind = DamagedError if code in _DAMAGED else UserError
        raise kind(_explain_refusal(error, code, location)) from error
    # If a server fails in a response that announces a checksum, boto3 raises an AttributeError.
    except (BotoCoreError, Boto3Error, RetriesExceededError, OSError, AttributeError) as error:
        kind = DamagedError if isinstance(error, interrupted) else UserError
        raise kind(_explain_failure(error, location)) from error


def _explain_refusal(error: Any, code: str, location: Location) -> str:
    said = error.response.get("Error", {})
    if code == "NoSuchBucket":
        return f"bucket {location.bucket!r} does not exist at {endpoint()}; create it, or use another bucket"
    if code in ("NoSuchKey", "404"):
        return f"{location} does not exist"
    if code in _REFUSED:
        message = said.get("Message", "")
        return f"S3 refuses the credentials ({code}: {message}); renew AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in _DENIED:
        return f"access to {location} is denied ({error.operation_name}); grant these credentials access"
    if code in _ELSEWHERE:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = said.get("Region") or headers.get("x-amz-bucket-region")
        own = client().meta.region_name
        remedy = f"set AWS_REGION={region}" if region else "set AWS_REGION to the bucket's region"
        return f"bucket {location.bucket!r} is not in region {own!r} ({code}); {remedy}"
    if code in _DAMAGED:
        return f"{location} was damaged in transit (wrong checksum, {code}); try again"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500:
        return f"S3 at {endpoint()} fails with {code} on {location}, after several attempts; try again later"
    return f"S3 refuses {error.operation_name} of {location}: {code} {said.get('Message', '')}".rstrip()


def _explain_failure(error: Exception, location: Location) -> str:
    from botocore import exceptions

    match error:
        case exceptions.NoCredentialsError() | exceptions.PartialCredentialsError():
            return f"no credentials for {location}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        case exceptions.FlexibleChecksumError():
            return f"{location} was damaged in transit (wrong checksum); try again"
        case exceptions.ParamValidationError():
            return f"{location} is not a valid S3 location: {' '.join(str(error).split())}"
        case OSError() if error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"cannot write {error.filename or 'here'} ({error.strerror}); free some space, or move SCOP_CACHE"
        case exceptions.HTTPClientError() | exceptions.ConnectionError() | OSError():
            return f"S3 at {endpoint()} cannot be reached ({error}); check AWS_ENDPOINT_URL_S3 and the network"
    if isinstance(error, AttributeError):
        return f"S3 at {endpoint()} fails on {location}; try again later"
    if last := getattr(error, "last_exception", None):
        return f"the transfer of {location} failed repeatedly ({last}); try again later"
    return f"S3 failed on {location}: {error}"
