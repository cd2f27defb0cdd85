"""A run directory: its identity, plan, parts, verification and _SUCCESS.

The input of a run is frozen into units (`_plan/unit-00000.parquet` …). Each unit becomes exactly
one part, `data/part-00000.parquet`, and, when rows failed, `errors/part-00000.parquet`, written
before it. A part's name is decided by its unit and its captions by content and seed, so that
writing one twice changes nothing. Progress is which parts exist: nothing else is recorded, and
nothing can disagree. A kill leaves

    while planning     `_plan/identity`, some units, no `_plan/run.json`: planned again, same name
    while captioning   the parts that are there; the others are missing units
    while publishing   no `_SUCCESS`: verified and published again
    after _SUCCESS     `_plan`: `latest` may not name the run yet; the same command sees to both

Units that are carried over from a previous run come last. Their rows of the output are in the plan
too (`_plan/carried-00012.parquet`), so that nothing but the plan is needed once it is there.

`data/` and `errors/` hold parts and nothing else: before _SUCCESS a file that is no part of this
run is moved to `_foreign/`, and named.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from stylegan.cards import data_card
from stylegan.catalog import FrozenCatalog
from stylegan.lock import Lock, LockError, cell
from stylegan.parts import ERRORS, Settings, output_schema
from stylegan.previous import Division, Previous, divide
from stylegan.publish import read_latest, reading, set_latest
from stylegan.report import write_report
from stylegan.storage import (
    explain,
    names_below,
    patiently,
    resolve_filesystem,
    write_atomically,
)  # fmt: skip

THREADS = 16  # requests to the storage at a time
UPLOAD_BYTES = 128 << 20  # of units in memory at a time, when they hold images
CARRYING = 4  # units that are carried over at a time: each is in memory
BINS = 20  # of the histogram of scores
EXTREMES = 8  # captions of the lowest and of the highest scores that are shown


class RunError(RuntimeError):
    """A run that cannot be completed now; the message says what the same command will do."""


class Scored(NamedTuple):
    """A caption by its place, in the order of scores."""

    score: float
    unit: int
    id: str
    style: str


@dataclass(slots=True)
class Verification:
    """What the storage holds, compared with the plan.

    wrong: unit → what is wrong with its part. rows, images: output and input rows of right parts.
    statuses, error_classes: output rows and failed images of each. seconds: work of each stage.
    review_reasons: output rows that need review for each reason; a row may have several.
    scores: style → how many captions have a score in each twentieth of 0 … 1. lowest, highest: of
    the scores of captions that this run made, each score once.
    """

    wrong: dict[int, str] = field(default_factory=dict)
    rows: int = 0
    images: int = 0
    needs_review: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    error_classes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    review_reasons: Counter[str] = field(default_factory=Counter)
    scores: dict[str, list[int]] = field(default_factory=dict)
    lowest: list[Scored] = field(default_factory=list)
    highest: list[Scored] = field(default_factory=list)

    def add_scores(self, unit: int, rows: pa.Table) -> None:
        """Counts the scores of a part and keeps its lowest and highest."""
        ids, styles = rows.column("id"), np.array(rows.column("style").to_pylist())
        scores = rows.column("caption_score").to_numpy()  # a null is NaN
        scored = ~np.isnan(scores)
        for style in map(str, np.unique(styles[scored])):
            counts = np.histogram(scores[scored & (styles == style)], BINS, (0, 1))[0]
            self.scores[style] = (counts + self.scores.get(style, 0)).tolist()
        made = np.array(rows.column("status").to_pylist()) == "captioned"
        candidates = np.flatnonzero(scored & made)
        # captions that differ in the topic alone have one score: one of them is enough
        first = candidates[np.unique(scores[candidates], return_index=True)[1]]
        ends = {*first[:EXTREMES], *first[-EXTREMES:]}
        here = [
            Scored(float(scores[row]), unit, ids[row].as_py(), str(styles[row]))
            for row in ends
        ]
        distinct: dict[float, Scored] = {}
        for caption in sorted([*self.lowest, *self.highest, *here]):
            distinct.setdefault(caption.score, caption)
        ordered = list(distinct.values())
        self.lowest, self.highest = ordered[:EXTREMES], ordered[-EXTREMES:]


@dataclass(frozen=True, slots=True)
class Run:
    """A planned run directory. Small and picklable: workers get it as it is.

    num_carried: rows of those in units that are carried over, of carried_rows_per_unit rows each.
    changes: input rows by what became of them since the previous run, if there is one.
    """

    uri: str
    settings: Settings
    num_rows: int
    rows_per_unit: int
    num_units: int
    created_at: str
    num_carried: int = 0
    carried_rows_per_unit: int = 1
    changes: dict[str, int] | None = None

    @property
    def run_id(self) -> str:
        """The name of the directory, `run=<UTC time>`, without the prefix."""
        return self.uri.rpartition("/run=")[2]

    @property
    def filesystem(self) -> fs.FileSystem:
        """Where the directory is."""
        return resolve_filesystem(self.uri)[0]

    @property
    def path(self) -> str:
        """The directory in its file system."""
        return resolve_filesystem(self.uri)[1]

    @property
    def num_fresh_units(self) -> int:
        """Units to caption; those after them are carried over."""
        return -(-(self.num_rows - self.num_carried) // self.rows_per_unit)

    def unit_rows(self, unit: int) -> int:
        """Input rows of a unit."""
        if unit < self.num_fresh_units:
            rows = self.num_rows - self.num_carried - unit * self.rows_per_unit
            return min(self.rows_per_unit, rows)
        rows = self.num_carried - (unit - self.num_fresh_units) * self.carried_rows_per_unit
        return min(self.carried_rows_per_unit, rows)

    # --- units and parts ------------------------------------------------------------------------

    def read_unit(self, unit: int, columns: list[str] | None = None) -> pa.Table:
        """The frozen input rows of a unit."""
        return self._read(f"_plan/unit-{unit:05}.parquet", columns)

    def read_part(self, unit: int) -> pa.Table:
        """The output rows of a unit."""
        return self._read(f"data/part-{unit:05}.parquet")

    def write_part(
        self, unit: int, rows: pa.Table, notes: dict[str, float],
        review_reasons: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """Writes the part of a unit, failed input rows first; a part that is there stays.

        notes: seconds of each stage; review_reasons: rows that need review by reason. Both are kept
        in the file. Raises RunError when the rows are not the unit's.
        """
        ids = rows.column("id").to_pylist()
        if ids != self._expected_ids(unit) or rows.schema != self._schema():
            raise RunError(
                f"unit {unit} came back with {len(ids)} rows for its {self.unit_rows(unit)}, or "
                "with other ids or columns: this is a defect of the job, nothing was written"
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
            whole = self.read_unit(unit).drop_columns("_image_stamp").take(order)
            reasons = rows.select(ERRORS.names).take([first[index] for index in order])
            for name_ in ERRORS.names:
                whole = whole.append_column(ERRORS.field(name_), reasons.column(name_))
            self._write(f"errors/{name}", _parquet(whole))
        elif self._exists(f"errors/{name}"):  # of an attempt that failed for another reason
            self._delete(f"errors/{name}")
        noted = {"run": self.run_id, "unit": unit, **notes, "review_reasons": review_reasons or {}}
        metadata = {b"stylegan": json.dumps(noted).encode()}
        self._write(f"data/{name}", _parquet(rows.replace_schema_metadata(metadata)))

    def write_carried(self, units: Iterable[int]) -> None:
        """Writes parts of units that are carried over."""

        def write(unit: int) -> None:
            rows = self._read(f"_plan/carried-{unit:05}.parquet")
            # the run that captioned them has counted the reasons
            count = sum(map(bool, rows.column("needs_review").to_pylist()))
            self.write_part(unit, rows, {}, {"carried over": count} if count else None)

        with ThreadPoolExecutor(CARRYING) as pool:
            list(pool.map(write, units))

    def count_failed(self) -> dict[int, int]:
        """Failed input rows of each unit to caption that has any, of those that are done."""
        there = {_unit_of(name) for name in self._list("data")}
        units = {_unit_of(name): name for name in self._list("errors")}
        wanted = sorted(unit for unit in units if unit in there and unit < self.num_fresh_units)

        def count(unit: int) -> int:
            return len(self._read(f"errors/{units[unit]}", ["id"]))

        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(wanted, pool.map(count, wanted), strict=True))

    def missing_units(self) -> list[int]:
        """The units without a part, in order."""
        there = {_unit_of(name) for name in self._list("data")}
        return [unit for unit in range(self.num_units) if unit not in there]

    def replaced(self) -> list[dict[str, str]]:
        """Some changed rows with their caption in the previous run, `before`, and in this one,
        `after`, where both have one and they differ. Asks for the plan and finished parts."""
        if not self._exists("_plan/replaced.parquet"):
            return []

        def compare(old: dict[str, Any]) -> dict[str, str]:
            rows = self._read(f"data/part-{old['unit']:05}.parquet", ["id", "style", "caption"])
            first = rows.column("id").to_pylist().index(old["id"])
            new = rows.slice(first + old["version"], 1).to_pylist()[0]
            return {
                "id": old["id"], "style": new["style"], "before": old["caption"],
                "after": new["caption"],
            }  # fmt: skip

        with ThreadPoolExecutor(THREADS) as pool:
            pairs = list(pool.map(compare, self._read("_plan/replaced.parquet").to_pylist()))
        return [pair for pair in pairs if pair["after"] not in (None, pair["before"])]

    # --- the end --------------------------------------------------------------------------------

    def set_aside_foreign(self) -> list[str]:
        """Moves what is no part of this run out of data/ and errors/; the names of what was moved.

        Files that a killed writer left half-written are deleted.
        """
        foreign = []
        for name in self._list():
            folder, _, rest = name.partition("/")
            if re.search(r"(^|/)\.[^/]+\.[0-9a-f]{32}$", name):  # see write_atomically
                self._delete(name)
            elif folder in ("data", "errors") and _unit_of(rest) not in range(self.num_units):
                self._set_aside(name)
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
        expected = self._expected_ids(unit)
        name = f"part-{unit:05}.parquet"
        try:
            rows, schema = self._read_with_schema(f"data/{name}", _VERIFIED)
            if schema.remove_metadata() != self._schema():
                return "has other columns"
        except FileNotFoundError:
            return "is missing"
        except (pa.ArrowException, OSError) as error:
            if explain(error)[1]:  # the storage's fault, not the part's
                raise
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
            found.review_reasons.update(notes.pop("review_reasons", {}))
            found.seconds.update({k: v for k, v in notes.items() if k not in ("run", "unit")})
            found.add_scores(unit, rows)
        return ""

    def discard(self, units: Iterable[int]) -> None:
        """Deletes the parts of units, so that they are missing."""
        for unit in units:
            for folder in ("data", "errors"):
                self._delete(f"{folder}/part-{unit:05}.parquet")

    def publish(self, summary: dict[str, Any], lock: Lock) -> None:
        """Writes what people read, then _SUCCESS and `latest`, and deletes the plan.

        Raises LockError when the run is another's by now.
        """
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())
        patiently(self.uri, lambda: write_report(self.filesystem, self.path, summary))
        self._write("README.md", data_card(summary).encode())
        lock.check(now=True)
        self._write("_SUCCESS", self.settings.identity.encode())
        set_latest(*self.uri.rsplit("/", 1))
        clean(self.uri)

    # --- storage --------------------------------------------------------------------------------

    def _schema(self) -> pa.Schema:
        return _part_schema(self.uri)

    def _expected_ids(self, unit: int) -> list[str]:
        ids = self.read_unit(unit, ["id"]).column("id").to_pylist()
        return [row_id for row_id in ids for _ in self.settings.versions]

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self._read_with_schema(name, columns)[0]

    def _read_with_schema(self, name: str, columns: list[str] | None) -> tuple[pa.Table, pa.Schema]:
        """Columns of a file, those of them that it has, and its schema."""

        def read() -> tuple[pa.Table, pa.Schema]:
            # as a file, not as a data set: a path with `run=` in it would add a column
            with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                parquet = pq.ParquetFile(file)
                return parquet.read(columns), parquet.schema_arrow

        return patiently(self.uri, read)

    def _write(self, name: str, data: bytes | pa.Buffer) -> None:
        path = f"{self.path}/{name}"
        patiently(self.uri, lambda: write_atomically(self.filesystem, path, data))

    def _exists(self, name: str) -> bool:
        return _exists(self.uri, f"{self.path}/{name}")

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            patiently(self.uri, lambda: self.filesystem.delete_file(f"{self.path}/{name}"))

    def _set_aside(self, name: str) -> None:
        def move() -> None:
            self.filesystem.create_dir(f"{self.path}/_foreign", recursive=True)
            target = f"{self.path}/_foreign/{name.replace('/', '-')}"
            self.filesystem.move(f"{self.path}/{name}", target)

        with contextlib.suppress(FileNotFoundError):  # an attempt that got no answer had moved it
            patiently(self.uri, move)

    def _list(self, folder: str = "") -> list[str]:
        """The files below a folder of the run, relative to it."""
        base = f"{self.path}/{folder}".rstrip("/")
        selector = fs.FileSelector(base, allow_not_found=True, recursive=True)
        found = patiently(self.uri, lambda: self.filesystem.get_file_info(selector))
        return [info.path[len(base) + 1 :] for info in found if info.type == fs.FileType.File]


_VERIFIED = ["id", "style", "status", "error_class", "needs_review", "caption_score"]


@cache
def _part_schema(run_uri: str) -> pa.Schema:
    filesystem, path = resolve_filesystem(run_uri)

    def read() -> pa.Schema:
        with filesystem.open_input_file(f"{path}/_plan/unit-00000.parquet") as file:
            return pq.ParquetFile(file).schema_arrow

    return output_schema(patiently(run_uri, read).remove_metadata())


def _exists(uri: str, path: str) -> bool:
    filesystem = resolve_filesystem(uri)[0]
    info = patiently(uri, lambda: filesystem.get_file_info(path))
    return bool(info.type != fs.FileType.NotFound)


def _unit_of(name: str) -> int:
    """The unit of a part's name; -1: it is no part."""
    match = re.fullmatch(r"part-(\d{5,})\.parquet", name)
    return int(match[1]) if match else -1


def _parquet(table: pa.Table) -> pa.Buffer:
    # whole in memory before it is stored: a writer that fails halfway must leave nothing behind
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


# --- finding and making runs --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The run directory of an identity: finished, planned (it has a `run`), or neither."""

    uri: str
    is_finished: bool
    run: Run | None


def lock_name(identity: str) -> str:
    """Of the lock of a run: beside the run directories, for it guards their making too."""
    return f"_LOCK-{identity[:16]}"


def lock_path(output: str, settings: Settings) -> tuple[fs.FileSystem, str]:
    """Where the lock of a run lies."""
    filesystem, root = resolve_filesystem(output)
    return filesystem, f"{root.rstrip('/')}/{lock_name(settings.identity)}"


def has_leftovers(found: Found, lock_file: tuple[fs.FileSystem, str]) -> bool:
    """Whether a kill after _SUCCESS left the plan or the lock of a finished run behind."""
    path = resolve_filesystem(found.uri)[1]
    return any(_exists(found.uri, place) for place in (f"{path}/_plan", lock_file[1]))


def settle(uri: str) -> None:
    """Does what a kill after _SUCCESS left undone. `latest` never goes back by that."""
    path = resolve_filesystem(uri)[1]
    if _exists(uri, f"{path}/_plan"):
        output, name = uri.rsplit("/", 1)
        if (read_latest(output) or "") < name:
            with reading(output, name, "publisher"):
                set_latest(output, name)
        clean(uri)


def settle_after_death(uri: str, identity: str) -> None:
    """The same for a finished run that no command of its own may come back to."""
    filesystem, path = resolve_filesystem(uri)
    lock_file = f"{path.rpartition('/')[0]}/{lock_name(identity)}"
    if _exists(uri, f"{path}/_plan") or _exists(uri, lock_file):
        with (
            contextlib.suppress(LockError),  # its job is alive
            Lock.acquire(filesystem, lock_file, say=lambda _: None),
        ):
            settle(uri)


def clean(uri: str) -> None:
    """Deletes the plan of a finished run."""
    filesystem, path = resolve_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):  # an attempt that got no answer had deleted it
        if _exists(uri, f"{path}/_plan"):
            patiently(uri, lambda: filesystem.delete_dir(f"{path}/_plan"))


def find_run(output: str, settings: Settings) -> Found | None:
    """The run of these settings below `output`: the finished one if there is one, else any."""
    root = resolve_filesystem(output)[1].rstrip("/")
    names = [name for name in names_below(output) if name.startswith("run=")]

    def look(name: str) -> Found | None:
        uri = f"{output.rstrip('/')}/{name}"
        for marker in ("_SUCCESS", "_plan/identity"):
            content = _read_bytes(output, f"{root}/{name}/{marker}")
            if content is None:
                continue
            if content.decode(errors="replace").strip() != settings.identity:
                return None
            if marker == "_SUCCESS":
                return Found(uri, True, None)
            return Found(uri, False, _load(uri, settings))
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = [run for run in pool.map(look, sorted(names, reverse=True)) if run is not None]
    return max(found, key=lambda run: (run.is_finished, run.run is not None), default=None)


def _read_bytes(uri: str, path: str) -> bytes | None:
    """The content of a small file; None: there is none."""
    filesystem = resolve_filesystem(uri)[0]

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
        return content

    with contextlib.suppress(FileNotFoundError):
        return patiently(uri, read)
    return None


def _load(uri: str, settings: Settings) -> Run | None:
    content = _read_bytes(uri, f"{resolve_filesystem(uri)[1]}/_plan/run.json")
    if content is None:
        return None  # killed while planning
    return Run(uri=uri, settings=settings, **json.loads(content)["plan"])


def plan_run(
    output: str,
    settings: Settings,
    catalog: FrozenCatalog,
    unplanned: str | None = None,
    previous: Previous | None = None,
) -> Run:
    """Makes a run directory with its plan: units first, `run.json` last.

    unplanned: the directory of the same settings that a kill left without its plan, used again.
    previous: the run that unchanged rows are carried over from.
    """
    filesystem, root = resolve_filesystem(output)
    uri = unplanned or _claim_name(filesystem, root.rstrip("/"), output.rstrip("/"), settings)
    path = resolve_filesystem(uri)[1]

    def upload(name: str, source: Path) -> None:
        data, target = source.read_bytes(), f"{path}/_plan/{name}.parquet"
        patiently(uri, lambda: write_atomically(filesystem, target, data))

    with tempfile.TemporaryDirectory(prefix="stylegan-") as scratch:
        division = Division.all_fresh(catalog)
        if previous is not None:
            base, name = previous.uri.rsplit("/", 1)
            with reading(base, name, settings.identity[:16]):
                run_id = uri.rpartition("/run=")[2]
                division = divide(previous, catalog, settings, run_id, Path(scratch))
        first = len(division.fresh)
        files = {f"unit-{unit:05}": file for unit, file in enumerate(division.fresh)}
        for unit, (file, part) in enumerate(division.carried, first):
            files |= {f"unit-{unit:05}": file, f"carried-{unit:05}": part}
        if division.replaced:
            files["replaced"] = division.replaced
        largest = max(file.stat().st_size for file in files.values())
        with ThreadPoolExecutor(max(1, min(THREADS, UPLOAD_BYTES // largest))) as pool:
            list(pool.map(upload, files, files.values()))
    plan: dict[str, Any] = {
        "num_rows": catalog.num_rows,
        "rows_per_unit": division.rows_per_unit,
        "num_units": first + len(division.carried),
        "created_at": _now(),
        "num_carried": division.num_carried,
        "carried_rows_per_unit": division.carried_rows_per_unit,
        "changes": division.changes or None,
    }
    content = {"identity": settings.identity, "settings": asdict(settings), "plan": plan}
    data = json.dumps(content).encode()
    patiently(uri, lambda: write_atomically(filesystem, f"{path}/_plan/run.json", data))
    return Run(uri, settings, **plan)


def _claim_name(filesystem: fs.FileSystem, root: str, output: str, settings: Settings) -> str:
    """A new directory of our own: no two jobs that start in one second get the same."""
    stamp = time.strftime("run=%Y-%m-%dT%H-%M-%S", time.gmtime())
    for number in count(1):
        name = stamp if number == 1 else f"{stamp}-{number}"
        if not _exists(output, f"{root}/{name}"):
            claim = cell(filesystem, f"{root}/{name}/_plan/identity")
            if claim.swap(None, settings.identity.encode()) is not None:
                return f"{output}/{name}"
    raise AssertionError("unreachable")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
