"""Which run is the current one, and which may go: `latest`, rollback, pruning.

`latest`, a file beside the runs, holds the name of one that is complete; nothing else is needed to
read the captions. A run is pruned under a mark of its name, and read under a lease on it. Either is
made before the other is looked for, so that of two jobs at one moment at least one sees the other;
the owner of a mark or a lease that died is known as that of a lock is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from pyarrow import fs

from stylegan.lock import Lock, LockError, cell
from stylegan.storage import names_below, patiently, resolve_filesystem, write_atomically

LATEST = "latest"


class PublishError(ValueError):
    """What was asked of the published runs cannot be done; the message says why."""


def read_latest(output: str) -> str | None:
    """The name of the current run, `run=<UTC time>`."""
    filesystem, root = resolve_filesystem(output)
    held = cell(filesystem, f"{root}/{LATEST}").read()
    return held[0].decode().strip() if held else None


def set_latest(output: str, name: str) -> None:
    """Makes a complete run the current one, at once for all readers."""
    filesystem, root = resolve_filesystem(output)
    patiently(
        output, lambda: write_atomically(filesystem, f"{root}/{LATEST}", f"{name}\n".encode())
    )


def roll_back(output: str, run: str) -> str:
    """Makes an older run the current one again, and returns its name. Raises PublishError."""
    name = run if run.startswith("run=") else f"run={run}"
    finished = finished_runs(output)
    if name not in finished:
        there = ", ".join(finished) or "none"
        raise PublishError(f"{name} is no finished run below {output}; there are: {there}")
    filesystem, root = resolve_filesystem(output)
    with reading(output, name, "rollback"):
        for other in finished:  # one that was killed while it was published must not come back
            patiently(output, partial(_delete, filesystem, f"{root}/{other}/_plan"))
        set_latest(output, name)
    return name


def finished_runs(output: str) -> list[str]:
    """Names of the complete runs below an output, the newest first."""
    return sorted(filter(lambda name: _is_complete(output, name), _names(output, "run=")))[::-1]


@contextlib.contextmanager
def reading(output: str, name: str, reader: str) -> Iterator[None]:
    """Keeps a run from being pruned. Raises PublishError when it is gone, or going."""
    with _acquire(output, f"_LEASE-{name}-{reader}"):
        is_going = _is_alive(output, f"_PRUNING-{name}")
        if is_going or not _is_complete(output, name):
            raise PublishError(f"{output}/{name} is being pruned, or was: choose another run")
        yield


def prune(output: str, keep: int, lock_name: Callable[[str], str]) -> list[str]:
    """Deletes all complete runs but the newest `keep`, the current one and those that are read.

    lock_name: of the lock that a job holds while it publishes the run of an identity. Goes on with
    what a killed job was pruning. Returns the names of what was deleted.
    """
    old = finished_runs(output)[keep:]
    begun = {name.removeprefix("_PRUNING-") for name in _names(output, "_PRUNING-")}
    half_deleted = sorted(name for name in begun if not _is_complete(output, name))
    return [name for name in [*old, *half_deleted] if _prune(output, name, lock_name)]


def _prune(output: str, name: str, lock_name: Callable[[str], str]) -> bool:
    filesystem, root = resolve_filesystem(output)
    try:
        mark = _acquire(output, f"_PRUNING-{name}")
    except LockError:  # another job is at it
        return False
    with mark:
        locks = _names(output, f"_LEASE-{name}-")
        identity = cell(filesystem, f"{root}/{name}/_SUCCESS").read()
        if identity:
            locks.append(lock_name(identity[0].decode()))
        # in this order: whoever held a lease to make it the current one has done so before
        if any(_is_alive(output, lock) for lock in locks) or read_latest(output) == name:
            return False
        # complete as long as the marker is there, and known as half deleted by the mark after that
        for path in (f"{name}/_plan", f"{name}/_SUCCESS", name):
            patiently(output, partial(_delete, filesystem, f"{root}/{path}"))
        return True


def _delete(filesystem: fs.FileSystem, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == fs.FileType.File:
            filesystem.delete_file(path)


def _is_alive(output: str, lock: str) -> bool:
    """Whether a lock has an owner; one that a dead owner left is removed."""
    filesystem, root = resolve_filesystem(output)
    if cell(filesystem, f"{root}/{lock}").read() is None:
        return False
    try:
        _acquire(output, lock).release()
    except LockError:
        return True
    return False


def _acquire(output: str, lock: str) -> Lock:
    filesystem, root = resolve_filesystem(output)
    return Lock.acquire(filesystem, f"{root}/{lock}", say=lambda _: None)


def _is_complete(output: str, name: str) -> bool:
    filesystem, root = resolve_filesystem(output)
    info = patiently(output, lambda: filesystem.get_file_info(f"{root}/{name}/_SUCCESS"))
    return bool(info.type == fs.FileType.File)


def _names(output: str, prefix: str) -> list[str]:
    return [name for name in names_below(output) if name.startswith(prefix)]
