"""A run directory: its identity, plan, parts, verification and _SUCCESS.

The input of a run is frozen into units (`_plan/unit-00000.parquet` …). Each unit becomes exactly
one part, `data/part-00000.parquet`, and, when rows failed, `errors/part-00000.parquet`, written
before it. A part's name is decided by its unit and its captions by content and seed, so that
writing one twice changes nothing. Progress is which parts exist: nothing else is recorded, and
nothing can disagree. A kill leaves

    while planning     `_plan/identity`, some units, no `_plan/run.json`: planned again, same name
    while captioning   the parts that are there; the others are missing units
    while publishing   no `_SUCCESS`: verified and published again
    after _SUCCESS     leftovers of `_plan`, ignored and cleaned by the next run

`data/` and `errors/` hold parts and nothing else: before _SUCCESS a file that is no part of this
run is moved to `_foreign/`, and named.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from stylegan.catalog import FrozenCatalog, resolve_filesystem
from stylegan.lock import Lock, cell
from stylegan.parts import ERRORS, Settings, output_schema
from stylegan.report import data_card, write_report

THREADS = 16  # requests to the storage at a time


class RunError(RuntimeError):
    """A run that cannot be completed now; the message says what the same command will do."""


@dataclass(slots=True)
class Verification:
    """What the storage holds, compared with the plan.

    wrong: unit → what is wrong with its part. rows, images: output and input rows of right parts.
    statuses, error_classes: output rows and failed images of each. seconds: work of each stage.
    """

    wrong: dict[int, str] = field(default_factory=dict)
    rows: int = 0
    images: int = 0
    needs_review: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    error_classes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Run:
    """A planned run directory. Small and picklable: workers get it as it is."""

    uri: str
    settings: Settings
    num_rows: int
    rows_per_unit: int
    num_units: int
    created_at: str

    @property
    def run_id(self) -> str:
        """The name of the directory, `run=<UTC time>`, without the prefix."""
        return self.uri.rpartition("/run=")[2]

    @property
    def filesystem(self) -> fs.FileSystem:
        """Where the directory is."""
        return _resolve(self.uri)[0]

    @property
    def path(self) -> str:
        """The directory in its file system."""
        return _resolve(self.uri)[1]

    def unit_rows(self, unit: int) -> int:
        """Input rows of a unit."""
        return min(self.rows_per_unit, self.num_rows - unit * self.rows_per_unit)

    # --- units and parts ------------------------------------------------------------------------

    def read_unit(self, unit: int, columns: list[str] | None = None) -> pa.Table:
        """The frozen input rows of a unit."""
        return self._read(f"_plan/unit-{unit:05}.parquet", columns)

    def read_part(self, unit: int) -> pa.Table:
        """The output rows of a unit."""
        return self._read(f"data/part-{unit:05}.parquet")

    def write_part(self, unit: int, rows: pa.Table, notes: dict[str, float]) -> None:
        """Writes the part of a unit, failed input rows first; a part that is there stays.

        notes: seconds of each stage, kept in the file. Raises RunError when the rows are not the
        unit's.
        """
        source = self.read_unit(unit, ["id"])
        ids = rows.column("id").to_pylist()
        if ids != self._expected_ids(source) or rows.schema != self._schema():
            raise RunError(
                f"unit {unit} came back with {len(ids)} rows for its {source.num_rows}, or with "
                "other ids or columns: this is a defect of the job, nothing was written"
            )
        name = f"part-{unit:05}.parquet"
        if self._exists(f"data/{name}"):  # a retried task, or another owner's
            return
        statuses, each = rows.column("status").to_pylist(), len(self.settings.versions)
        # input row → its first failed output row: an image that fails in all styles is listed once
        failed = [index for index, status in enumerate(statuses) if status == "failed"]
        first = {index // each: index for index in reversed(failed)}
        if first:
            order = sorted(first)
            whole = self.read_unit(unit).take(order)
            reasons = rows.select(ERRORS.names).take([first[index] for index in order])
            for name_ in ERRORS.names:
                whole = whole.append_column(ERRORS.field(name_), reasons.column(name_))
            self._write(f"errors/{name}", _parquet(whole))
        elif self._exists(f"errors/{name}"):  # of an attempt that failed for another reason
            self.filesystem.delete_file(f"{self.path}/errors/{name}")
        noted = {b"stylegan": json.dumps({"run": self.run_id, "unit": unit, **notes}).encode()}
        self._write(f"data/{name}", _parquet(rows.replace_schema_metadata(noted)))

    def missing_units(self) -> list[int]:
        """The units without a part, in order."""
        there = {_unit_of(name) for name in self._list("data")}
        return [unit for unit in range(self.num_units) if unit not in there]

    # --- the end --------------------------------------------------------------------------------

    def set_aside_foreign(self) -> list[str]:
        """Moves what is no part of this run out of data/ and errors/; the names of what was moved.

        Files that a killed writer left half-written are deleted.
        """
        foreign = []
        for name in self._list():
            folder, _, rest = name.partition("/")
            if re.search(r"(^|/)\.[^/]+\.[0-9a-f]{32}$", name):  # see write_atomically
                self.filesystem.delete_file(f"{self.path}/{name}")
            elif folder in ("data", "errors") and _unit_of(rest) not in range(self.num_units):
                self.filesystem.create_dir(f"{self.path}/_foreign", recursive=True)
                target = f"{self.path}/_foreign/{name.replace('/', '-')}"
                self.filesystem.move(f"{self.path}/{name}", target)
                foreign.append(name)
        return foreign

    def verify(self) -> Verification:
        """Reads back every part and compares its ids with the unit's, one by one."""
        found = Verification()
        errors = {_unit_of(name) for name in self._list("errors")}
        counting = threading.Lock()

        def check(unit: int) -> None:
            wrong = self._verify_unit(unit, errors, found, counting)
            if wrong:
                found.wrong[unit] = wrong

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(check, range(self.num_units)))
        return found

    def _verify_unit(
        self, unit: int, errors: set[int], found: Verification, counting: threading.Lock
    ) -> str:
        """Adds what a right part holds; says what is wrong with a wrong one."""
        expected = self._expected_ids(self.read_unit(unit, ["id"]))
        name = f"part-{unit:05}.parquet"
        try:
            with self.filesystem.open_input_file(f"{self.path}/data/{name}") as file:
                part = pq.ParquetFile(file)
                schema = part.schema_arrow
                if schema.remove_metadata() != self._schema():
                    return "has other columns"
                rows = part.read(["id", "style", "status", "error_class", "needs_review"])
        except FileNotFoundError:
            return "is missing"
        except (pa.ArrowException, OSError) as error:
            return f"cannot be read ({str(error).splitlines()[0]})"
        styles = [style for style, _ in self.settings.versions]
        if rows.column("id").to_pylist() != expected:
            return f"has {rows.num_rows} rows that are not the {len(expected)} expected"
        if rows.column("style").to_pylist() != styles * self.unit_rows(unit):
            return "has other styles"
        statuses = rows.column("status").to_pylist()
        failed = {
            row_id: error_class
            for row_id, error_class, status in zip(
                expected, rows.column("error_class").to_pylist(), statuses, strict=True
            )
            if status == "failed"
        }
        listed: list[str] = []
        if unit in errors:
            try:
                listed = self._read(f"errors/{name}", ["id"]).column("id").to_pylist()
            except (pa.ArrowException, OSError):
                return "has an unreadable list of failed rows"
        if sorted(listed) != sorted(failed):
            return "has a list of failed rows that differs"
        notes = json.loads((schema.metadata or {}).get(b"stylegan", b"{}"))
        with counting:
            found.rows += rows.num_rows
            found.images += self.unit_rows(unit)
            found.needs_review += sum(map(bool, rows.column("needs_review").to_pylist()))
            found.statuses.update(statuses)
            found.error_classes.update(failed.values())
            found.seconds.update({k: v for k, v in notes.items() if k not in ("run", "unit")})
        return ""

    def discard(self, units: Iterable[int]) -> None:
        """Deletes the parts of units, so that they are missing."""
        for unit in units:
            for folder in ("data", "errors"):
                with contextlib.suppress(FileNotFoundError):
                    self.filesystem.delete_file(f"{self.path}/{folder}/part-{unit:05}.parquet")

    def publish(self, summary: dict[str, Any], lock: Lock) -> None:
        """Writes what people read, then _SUCCESS, and deletes the plan.

        Raises LockError when the run is another's by now.
        """
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
        write_report(self.filesystem, self.path, summary)
        self._write("README.md", data_card(summary).encode())
        lock.check(now=True)
        self._write("_SUCCESS", self.settings.identity.encode())
        clean(self.uri)

    # --- storage --------------------------------------------------------------------------------

    def _schema(self) -> pa.Schema:
        return _part_schema(self.uri)

    def _expected_ids(self, unit: pa.Table) -> list[str]:
        each = len(self.settings.versions)
        return [row_id for row_id in unit.column("id").to_pylist() for _ in range(each)]

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        # as a file, not as a data set: a path with `run=` in it would add a column
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return pq.ParquetFile(file).read(columns)

    def _write(self, name: str, data: bytes | pa.Buffer) -> None:
        write_atomically(self.filesystem, f"{self.path}/{name}", data)

    def _exists(self, name: str) -> bool:
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        return bool(info.type != fs.FileType.NotFound)

    def _list(self, folder: str = "") -> list[str]:
        """The files below a folder of the run, relative to it."""
        base = f"{self.path}/{folder}".rstrip("/")
        found = self.filesystem.get_file_info(
            fs.FileSelector(base, allow_not_found=True, recursive=True)
        )
        return [info.path[len(base) + 1 :] for info in found if info.type == fs.FileType.File]


_resolve = cache(resolve_filesystem)


@cache
def _part_schema(run_uri: str) -> pa.Schema:
    filesystem, path = _resolve(run_uri)
    with filesystem.open_input_file(f"{path}/_plan/unit-00000.parquet") as file:
        return output_schema(pq.ParquetFile(file).schema_arrow.remove_metadata())


def _unit_of(name: str) -> int:
    """The unit of a part's name; -1: it is no part."""
    match = re.fullmatch(r"part-(\d{5,})\.parquet", name)
    return int(match[1]) if match else -1


def _parquet(table: pa.Table) -> pa.Buffer:
    # whole in memory before it is stored: a writer that fails halfway must leave nothing behind
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


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


# --- finding and making runs --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The run directory of an identity: finished, planned (it has a `run`), or neither."""

    uri: str
    is_finished: bool
    run: Run | None


def lock_path(output: str, settings: Settings) -> tuple[fs.FileSystem, str]:
    """Where the lock of a run lies: beside the run directories, for it guards their making too."""
    filesystem, root = _resolve(output)
    return filesystem, f"{root.rstrip('/')}/_LOCK-{settings.identity[:16]}"


def has_leftovers(found: Found, lock_file: tuple[fs.FileSystem, str]) -> bool:
    """Whether a kill after _SUCCESS left the plan or the lock of a finished run behind."""
    filesystem, path = _resolve(found.uri)
    infos = filesystem.get_file_info([f"{path}/_plan", lock_file[1]])
    return any(info.type != fs.FileType.NotFound for info in infos)


def clean(uri: str) -> None:
    """Deletes the plan of a finished run."""
    filesystem, path = _resolve(uri)
    if filesystem.get_file_info(f"{path}/_plan").type != fs.FileType.NotFound:
        filesystem.delete_dir(f"{path}/_plan")


def find_run(output: str, settings: Settings) -> Found | None:
    """The run of these settings below `output`: the finished one if there is one, else any."""
    filesystem, root = _resolve(output)
    root = root.rstrip("/")
    listing = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    names = [info.base_name for info in listing if info.base_name.startswith("run=")]

    def look(name: str) -> Found | None:
        uri = f"{output.rstrip('/')}/{name}"
        for marker in ("_SUCCESS", "_plan/identity"):
            with (
                contextlib.suppress(FileNotFoundError),
                filesystem.open_input_stream(f"{root}/{name}/{marker}") as stream,
            ):
                if stream.read().decode(errors="replace").strip() != settings.identity:
                    return None
                if marker == "_SUCCESS":
                    return Found(uri, True, None)
                return Found(uri, False, _load(uri, settings))
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = [run for run in pool.map(look, sorted(names, reverse=True)) if run is not None]
    return max(found, key=lambda run: (run.is_finished, run.run is not None), default=None)


def _load(uri: str, settings: Settings) -> Run | None:
    filesystem, path = _resolve(uri)
    try:
        with filesystem.open_input_stream(f"{path}/_plan/run.json") as stream:
            plan = json.loads(stream.read())
    except FileNotFoundError:
        return None  # killed while planning
    return Run(uri=uri, settings=settings, **plan["plan"])


def plan_run(
    output: str, settings: Settings, catalog: FrozenCatalog, unplanned: str | None = None
) -> Run:
    """Makes a run directory with its plan: units first, `run.json` last.

    unplanned: the directory of the same settings that a kill left without its plan, used again.
    """
    filesystem, root = _resolve(output)
    uri = unplanned or _claim_name(filesystem, root.rstrip("/"), output.rstrip("/"), settings)
    path = _resolve(uri)[1]
    numbers = catalog.num_rows, catalog.rows_per_unit, len(catalog.units)
    run = Run(uri, settings, *numbers, created_at=_now())

    def upload(numbered: tuple[int, Path]) -> None:
        unit, source = numbered
        write_atomically(filesystem, f"{path}/_plan/unit-{unit:05}.parquet", source.read_bytes())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(upload, enumerate(catalog.units)))
    plan = {k: getattr(run, k) for k in ("num_rows", "rows_per_unit", "num_units", "created_at")}
    content = {"identity": settings.identity, "settings": asdict(settings), "plan": plan}
    write_atomically(filesystem, f"{path}/_plan/run.json", json.dumps(content).encode())
    return run


def _claim_name(filesystem: fs.FileSystem, root: str, output: str, settings: Settings) -> str:
    """A new directory of our own: no two jobs that start in one second get the same."""
    stamp = time.strftime("run=%Y-%m-%dT%H-%M-%S", time.gmtime())
    for number in count(1):
        name = stamp if number == 1 else f"{stamp}-{number}"
        if filesystem.get_file_info(f"{root}/{name}").type == fs.FileType.NotFound:
            claim = cell(filesystem, f"{root}/{name}/_plan/identity")
            if claim.swap(None, settings.identity.encode()) is not None:
                return f"{output}/{name}"
    raise AssertionError("unreachable")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
