"""Storage: the file system of a URI, patience where it stumbles, files that are whole or not."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import re
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
from fsspec.core import url_to_fs
from pyarrow import fs

T = TypeVar("T")

SDK_ATTEMPTS = 10  # by the libraries themselves, within about 20 s
GCS_PATIENCE_S = 20  # by Google's library itself
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
        kind = _OBJECT_STORES[scheme]
        return _object_store(kind, bucket, endpoint(kind)), rest.rstrip("/")
    filesystem, path = url_to_fs(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


_OBJECT_STORES: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def endpoint(kind: str = "s3") -> str | None:
    """Of an S3 that is not Amazon's, or of an emulator of Google's storage."""
    if kind == "gs":
        return os.environ.get("STORAGE_EMULATOR_HOST") or None
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@functools.lru_cache(maxsize=256)
def _object_store(scheme: str, bucket: str, endpoint: str | None) -> fs.FileSystem:
    """Kept: a new one looks up the bucket's region and opens new connections."""
    if scheme != "s3":
        patience = timedelta(seconds=GCS_PATIENCE_S)  # its own is a quarter of an hour
        if endpoint is None:
            return fs.GcsFileSystem(retry_time_limit=patience)
        protocol, separator, host = endpoint.rpartition("://")
        return fs.GcsFileSystem(
            anonymous=True, endpoint_override=host, scheme=protocol if separator else "http",
            retry_time_limit=patience,
        )  # fmt: skip
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


def names_below(uri: str) -> list[str]:
    """Names of the files and folders right below a folder, sorted; none where it is not there."""
    filesystem, root = resolve_filesystem(uri)
    root = root.rstrip("/")
    # pyarrow's listing of one level of Google's storage leaves out folders
    is_flat = filesystem.type_name == "gcs"
    selector = fs.FileSelector(root, allow_not_found=True, recursive=is_flat)
    listing = patiently(uri, lambda: filesystem.get_file_info(selector))
    return sorted({info.path[len(root) :].strip("/").partition("/")[0] for info in listing})


# --- files --------------------------------------------------------------------------------------


def write_atomically(filesystem: fs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """Writes a file that is there whole or not at all.

    On disk: temporary file, fsync, rename. Elsewhere: one PUT or one completed upload.
    """
    if filesystem.type_name != "local":
        make_parent(filesystem, path)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        _put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def make_parent(filesystem: fs.FileSystem, path: str) -> None:
    """The folder of a file to write, where storage has folders that have to be made."""
    if filesystem.type_name not in ("s3", "gcs"):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)


def _put_in_place(temporary: str, path: str) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name itself
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(uri: str) -> Iterator[Path]:
    """A file on local disk to write to, which is put at `uri` when the block ends well: whole or
    not at all, however large (elsewhere than on disk and S3: whole, or a rest of it after a kill).
    """
    filesystem, path = resolve_filesystem(uri)
    if filesystem.type_name == "local":
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = Path(folder, f".{name}.{uuid.uuid4().hex}")
        try:
            yield temporary
            _put_in_place(str(temporary), path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="stylegan-") as scratch:
        temporary = Path(scratch, "staged")
        yield temporary
        patiently(uri, lambda: _upload(temporary, filesystem, path))


def _upload(source: Path, filesystem: fs.FileSystem, path: str) -> None:
    if filesystem.type_name == "s3":  # takes an upload that failed back; pyarrow completes it
        bucket, _, key = path.partition("/")
        s3_client(endpoint()).upload_file(str(source), bucket, key)
        return
    make_parent(filesystem, path)
    with open(source, "rb") as file, filesystem.open_output_stream(path) as stream:
        shutil.copyfileobj(file, stream, 8 << 20)
