"""One owner at a time: a lock file that is created, refreshed and taken over by compare-and-swap.

On disk the swap is an exclusive create and a `flock`, on S3 a conditional PUT. An owner refreshes
its lock every few seconds. One that died on this host is known by its process and replaced at once;
one elsewhere is watched: a lock that does not change for LEASE_S is dead. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyarrow import fs

from stylegan.storage import endpoint, make_parent, patiently, s3_client

T = TypeVar("T")

LEASE_S = 30.0
HEARTBEAT_S = 5.0
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in every driver that `ray job submit` starts


class LockError(RuntimeError):
    """The lock is somebody else's; the message names its owner."""


class Cell(Protocol):
    """A small file with compare-and-swap. A version identifies its content; None: no file."""

    def read(self) -> tuple[bytes, str] | None: ...
    def swap(self, version: str | None, data: bytes) -> str | None:
        """Write if the file still has this version; the new version, or None when it has not."""

    def delete(self, version: str) -> None: ...


class _DiskCell:
    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> tuple[bytes, str] | None:
        try:
            with open(self.path, "rb") as file:
                _flock(file.fileno(), fcntl.LOCK_SH)
                data = file.read()
        except FileNotFoundError:
            return None
        return data, data.hex()

    def swap(self, version: str | None, data: bytes) -> str | None:
        try:
            if version is None:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "xb" if version is None else "r+b") as file:
                _flock(file.fileno(), fcntl.LOCK_EX)
                if version is not None:
                    if file.read().hex() != version or not self._is(file.fileno()):
                        return None
                    file.seek(0)
                file.write(data)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except (FileExistsError, FileNotFoundError):
            return None
        return data.hex()

    def delete(self, version: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            _flock(file.fileno(), fcntl.LOCK_EX)
            if file.read().hex() == version and self._is(file.fileno()):
                os.unlink(self.path)

    def _is(self, descriptor: int) -> bool:
        """Whether the open file still is the one of that name."""
        return os.path.samestat(os.fstat(descriptor), os.stat(self.path))


def _flock(descriptor: int, how: int) -> None:
    with contextlib.suppress(OSError):  # some network file systems have none
        fcntl.flock(descriptor, how)


class _S3Cell:
    """Content is never the same twice: a PUT whose answer was lost is known by it."""

    def __init__(self, path: str) -> None:
        self.bucket, _, self.key = path.partition("/")
        self.client = s3_client(endpoint())

    def read(self) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str] | None:
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.key)
            except self.client.exceptions.ClientError as error:
                if _status(error) == 404 and error.response["Error"]["Code"] != "NoSuchBucket":
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

        return self._patiently(get)

    def swap(self, version: str | None, data: bytes) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def put() -> str | None:
            try:
                answer = self.client.put_object(
                    Bucket=self.bucket, Key=self.key, Body=data, **condition
                )
            except self.client.exceptions.ClientError as error:
                # 412: another version, 409: another writer right now, 404: no file any more
                is_late = _status(error) in (404, 409, 412)
                if is_late and error.response["Error"]["Code"] != "NoSuchBucket":
                    return None
                raise
            return str(answer["ETag"])

        if (written := self._patiently(put)) is not None:
            return written
        current = self.read()  # ours, when it was tried again after an answer that was lost
        return current[1] if current is not None and current[0] == data else None

    def delete(self, version: str) -> None:
        current = self.read()
        if current is not None and current[1] == version:
            self._patiently(lambda: self.client.delete_object(Bucket=self.bucket, Key=self.key))

    def _patiently(self, ask: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return patiently(f"s3://{self.bucket}", ask)
        except (BotoCoreError, ClientError) as error:
            raise OSError(f"s3://{self.bucket}/{self.key}: {error}") from error


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


class _PlainCell:
    """Storage without a conditional write: checked before and after, which is nearly as good."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path

    def read(self) -> tuple[bytes, str] | None:
        try:
            with self.filesystem.open_input_stream(self.path) as stream:
                data: bytes = stream.read()
        except FileNotFoundError:
            return None
        return data, data.hex()

    def swap(self, version: str | None, data: bytes) -> str | None:
        current = self.read()
        if (current and current[1]) != version:
            return None
        make_parent(self.filesystem, self.path)
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(data)
        time.sleep(1)  # the other one that saw the same version has written by now
        current = self.read()
        return data.hex() if current is not None and current[0] == data else None

    def delete(self, version: str) -> None:
        current = self.read()
        if current is not None and current[1] == version:
            self.filesystem.delete_file(self.path)


def cell(filesystem: fs.FileSystem, path: str) -> Cell:
    """The compare-and-swap file at a path of this file system."""
    if filesystem.type_name == "local":
        return _DiskCell(path)
    return _S3Cell(path) if filesystem.type_name == "s3" else _PlainCell(filesystem, path)


class Lock:
    """A lock that is held from `acquire` to `release`, or until `check` says that it is lost."""

    def __init__(self, file: Cell, owner: dict[str, Any], version: str) -> None:
        self._file, self._owner, self._version = file, owner, version
        self._lost = ""
        self._refreshed = time.monotonic()
        self._mutex = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls, filesystem: fs.FileSystem, path: str, *, say: Callable[[str], None] = print
    ) -> Lock:
        """Takes the lock; waits up to LEASE_S for a silent owner on another host.

        Raises LockError when a living owner has it.
        """
        file = cell(filesystem, path)
        owner = {
            "token": uuid.uuid4().hex,
            "host": _host(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "ray_job": _ray_job(),
            "acquired_at": _now(),
        }
        seen: str | None = None
        since = time.monotonic()
        while True:
            held = file.read()
            if held is None or _is_dead(held[0]) or (
                held[1] == seen and time.monotonic() - since > LEASE_S
            ):  # fmt: skip
                data = _encode(owner)
                version = file.swap(None if held is None else held[1], data)
                if version is not None and (now := file.read()) and now[0] == data:
                    return cls(file, owner, version)
                continue
            if _is_here(held[0]) or (seen is not None and held[1] != seen):
                raise LockError(f"another job works on this run: {_name(held[0])}")
            if seen is None:
                seen, since = held[1], time.monotonic()
                say(f"waiting up to {LEASE_S:.0f} s for a sign of {_name(held[0])} …")
            time.sleep(1)

    def check(self, *, now: bool = False) -> None:
        """Raises LockError when the lock was lost; `now`: asks the storage, not the heartbeat."""
        # a process that was stopped for a while, or storage that did not answer, has to ask too
        if now or time.monotonic() - self._refreshed > LEASE_S:
            self._refresh()
        if self._lost:
            raise LockError(f"{self._lost}: this job stops")

    def _refresh(self) -> None:
        """Writes a sign of life."""
        with self._mutex:
            if self._lost or self._released.is_set():
                return
            data = _encode(self._owner)
            version = self._file.swap(self._version, data)
            if version is None:
                held = self._file.read()
                self._lost = (
                    f"the lock of this run was taken over by {_name(held[0])}"
                    if held
                    else "the lock of this run was deleted"
                )
            else:
                self._version, self._refreshed = version, time.monotonic()

    def release(self) -> None:
        """Gives the lock back; nothing happens when it is lost."""
        self._released.set()
        self._thread.join(timeout=LEASE_S)
        with self._mutex:
            if not self._lost:
                self._file.delete(self._version)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S) and not self._lost:
            with contextlib.suppress(Exception):  # storage hiccups: `check` counts the seconds
                self._refresh()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _encode(owner: dict[str, Any]) -> bytes:
    # the beat makes every refresh a new version
    return json.dumps({**owner, "beat": uuid.uuid4().hex[:8], "beat_at": _now()}).encode()


def _decode(data: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(data)
    except ValueError:  # written half
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(data: bytes) -> str:
    owner = _decode(data)
    if not owner:
        return "an owner that left no name"
    job = f", Ray job {owner['ray_job']}" if owner.get("ray_job") else ""
    return (
        f"process {owner.get('pid')} on {str(owner.get('host')).split()[0]}{job}, since "
        f"{owner.get('acquired_at')}, last sign of life {owner.get('beat_at')}"
    )


def _is_here(data: bytes) -> bool:
    return bool(_decode(data).get("host") == _host())


def _is_dead(data: bytes) -> bool:
    """Whether the owner ran on this host and does not any more."""
    owner = _decode(data)
    if not _is_here(data):
        return False
    return _process_started(int(owner["pid"])) != owner.get("process_started")


def _ray_job() -> str | None:
    """The submission id under `ray job submit`, else None."""
    metadata = json.loads(os.environ.get(RAY_JOB, "{}")).get("metadata", {})
    job = metadata.get("job_submission_id")
    return None if job is None else str(job)


def _host() -> str:
    """The name of this host, and what tells its boots and process namespaces apart."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_started(pid: int) -> str | None:
    """When a process of this host started, in its own clock; None: there is no such process.

    A number is used again by another process; its start is not.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return answer.stdout.strip() or None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
