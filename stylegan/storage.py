"""Storage: the file system of a URI, patience where it stumbles, files that are whole or not."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any, Final, TypeVar

import pyarrow as pa
from fsspec.core import url_to_fs
from pyarrow import fs

T = TypeVar("T")

SDK_ATTEMPTS = 10  # by the libraries themselves, within about 20 s
PATIENCE_S = 90.0  # an outage that is waited out
PAUSE_S = 0.2  # before the first repetition
TRIES = 4  # of one request, when the storage answers others meanwhile


def resolve_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path, file://, s3://, gs:// or any URI that fsspec knows, and
    the path in it. Object keys are taken as they are, without percent-decoding.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    if scheme == "file":
        path = "/" + rest.partition("/")[2]
        return fs.LocalFileSystem(), os.fsdecode(urllib.parse.unquote_to_bytes(path))
    if scheme in _OBJECT_STORES:
        bucket = rest.partition("/")[0]
        return _object_store(_OBJECT_STORES[scheme], bucket, endpoint()), rest.rstrip("/")
    filesystem, path = url_to_fs(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


_OBJECT_STORES: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def endpoint() -> str | None:
    """Of an S3 that is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@functools.lru_cache(maxsize=256)
def _object_store(scheme: str, bucket: str, endpoint: str | None) -> fs.FileSystem:
    """Kept: a new one looks up the bucket's region and opens new connections."""
    if scheme != "s3":
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region, endpoint_override=endpoint, connect_timeout=10, request_timeout=60,
        allow_delayed_open=True,  # a small file is one PUT
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS),
    )  # fmt: skip


@functools.cache
def s3_client(endpoint: str | None) -> Any:
    """For what pyarrow has not: conditional PUTs, listings with ETags. Safe in many threads."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": SDK_ATTEMPTS}
    config = Config(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=32)
    return boto3.session.Session().client("s3", config=config)  # the default one is not thread-safe


# --- patience -----------------------------------------------------------------------------------

_answered: dict[str, float] = {}  # storage → when it last answered
_silent: dict[str, float] = {}  # storage → since when it has not


def patiently(uri: str, act: Callable[[], T]) -> T:
    """Calls `act`, which works on `uri`, again while it fails for a reason that may pass.

    It pauses before, longer each time and with jitter. An outage is waited out for PATIENCE_S, once
    and not for every file: after that each request has few tries, until the storage answers. So
    has one that fails alone while the storage answers others.
    """
    storage = "/".join(uri.split("/")[:3]) if "://" in uri else "disk"
    began = time.monotonic()
    for attempt in itertools.count(1):
        try:
            result = act()
        except Exception as error:  # file systems of all kinds raise errors of all kinds
            if not explain(error)[1]:
                raise
            now = time.monotonic()
            is_outage = _answered.get(storage, 0.0) < began
            is_over = now - _silent.setdefault(storage, now) > PATIENCE_S
            if attempt >= TRIES and (is_over or not is_outage):
                raise
            time.sleep(random.uniform(0.5, 1) * min(PAUSE_S * 2**attempt, 10))
        else:
            _answered[storage] = time.monotonic()
            _silent.pop(storage, None)
            return result
    raise AssertionError("unreachable")


def explain(error: BaseException) -> tuple[str, bool]:
    """A reason in words of ours, and whether the next attempt may succeed."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file", False
    aws = re.search(r"AWS Error (\w+)", str(error))
    if isinstance(error, PermissionError) or (aws and aws[1] == "ACCESS_DENIED"):
        return "permission denied", False
    if aws:
        status = re.search(r"HTTP status (\d+)", str(error))
        is_refused = status is not None and status[1][0] == "4" and status[1] not in ("408", "429")
        return f"object storage answered {aws[1]}", aws[1] not in _REFUSALS and not is_refused
    if type(error).__module__.startswith("botocore"):
        return _explain_botocore(error)
    if isinstance(error, ImportError | ValueError):
        return "no file system serves this address", False
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower(), error.errno in _MAY_PASS
    # pyarrow says so of a file that is no Parquet; what libraries raise themselves is about their
    # connections
    is_passing = isinstance(error, TimeoutError | ConnectionError) or (
        type(error).__module__.partition(".")[0] not in ("builtins", "pyarrow", "stylegan")
    )
    return "cannot be read", is_passing or bool(re.search(_GCS_BUSY, str(error)))


def _explain_botocore(error: BaseException) -> tuple[str, bool]:
    answer = getattr(error, "response", None)
    if answer is None:  # the connection; or there are no credentials to ask with
        kinds = {kind.__name__ for kind in type(error).__mro__}
        is_broken = kinds & {"HTTPClientError", "ConnectionError", "IncompleteReadError"}
        return f"object storage: {type(error).__name__}", bool(is_broken)
    status, code = answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]
    is_busy = status in (408, 409, 429) or status >= 500
    return f"object storage answered {code}", is_busy or code in ("SlowDown", "RequestTimeout")


_GCS_BUSY: Final = r"Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|ABORTED)"
_REFUSALS: Final = (
    "NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE", "VALIDATION",
    "MISSING_AUTHENTICATION_TOKEN", "UNRECOGNIZED_CLIENT", "OBJECT_NOT_IN_ACTIVE_TIER",
    "INVALID_OBJECT_STATE",
)  # fmt: skip
_MAY_PASS: Final = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
)  # fmt: skip
"""Of network file systems and connections."""


# --- files --------------------------------------------------------------------------------------


def write_atomically(filesystem: fs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """Writes a file that is there whole or not at all.

    On disk: temporary file, fsync, rename. Elsewhere: one PUT or one completed upload.
    """
    if filesystem.type_name != "local":
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name itself
    finally:
        os.close(descriptor)
