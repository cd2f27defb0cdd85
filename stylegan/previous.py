"""The run that a new one is based on: which of its rows are carried over, and which are captioned.

Rows are matched by id and compared by fingerprint, vectorised, in buckets of ids that are cut on
local disk, so that memory does not grow with the catalogue. No image is opened. Rows to caption
keep the order of the input; those carried over have an order of their own, the same every time.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from stylegan import parts
from stylegan.catalog import FrozenCatalog, choose_rows_per_unit, cut
from stylegan.parts import OUTPUT, Settings
from stylegan.storage import patiently, resolve_filesystem

BUCKET_ROWS = 1 << 16  # input rows that are compared at a time
MAX_BUCKETS = 500  # open files
CARRIED_ROWS = 1 << 15  # input rows of a unit that is carried over
REPLACED = 24  # changed rows whose old captions are kept for the report


class PreviousError(ValueError):
    """A run that cannot be the base of another; the message says why."""


@dataclass(frozen=True, slots=True)
class Previous:
    """A finished run. model: what its summary knows of the model."""

    uri: str
    identity: str
    versions: tuple[tuple[str, int], ...]
    num_rows: int
    counts: dict[str, Any]
    model: dict[str, Any]

    @classmethod
    def load(cls, uri: str) -> Previous:
        """Raises PreviousError when there is no finished run."""
        filesystem, path = resolve_filesystem(uri)

        def read(name: str) -> bytes:
            with filesystem.open_input_stream(f"{path}/{name}") as stream:
                content: bytes = stream.read()
            return content

        try:
            identity = patiently(uri, lambda: read("_SUCCESS")).decode()
            summary = json.loads(patiently(uri, lambda: read("summary.json")))
        except FileNotFoundError as error:
            raise PreviousError(f"{uri} is no finished run: it has no _SUCCESS") from error
        settings, counts = summary["settings"], summary["counts"]
        candidates = range(settings["captions_per_image"])
        versions = tuple((style, n) for style in settings["styles"] for n in candidates)
        return cls(uri, identity, versions, counts["rows"], counts, summary.get("model", {}))

    @property
    def name(self) -> str:
        """Of the directory, `run=<UTC time>`."""
        return self.uri.rpartition("/")[2]

    def batches(self) -> Iterator[pa.Table]:
        """Our columns of its parts. Raises PreviousError when they are not what was published."""
        filesystem, path = resolve_filesystem(self.uri)
        selector = fs.FileSelector(f"{path}/data")
        listing = patiently(self.uri, lambda: filesystem.get_file_info(selector))
        rows = 0
        for name in sorted(info.path for info in listing if info.path.endswith(".parquet")):
            table = patiently(self.uri, partial(_read, filesystem, name))
            rows += table.num_rows
            if not self._is_whole(table):
                raise PreviousError(f"{self.uri}: {name} is not as it was published")
            yield table
        if rows != self.num_rows:
            raise PreviousError(
                f"{self.uri} has {rows:,} of the {self.num_rows:,} rows that it was published with"
            )

    def _is_whole(self, table: pa.Table) -> bool:
        """Whether each id is there once in each version, in their order."""
        each = len(self.versions)
        ids, styles = table.column("id"), [style for style, _ in self.versions]
        firsts = np.arange(table.num_rows) // each * each
        same_style = pa.array(styles * (table.num_rows // each), pa.string())
        return bool(
            table.num_rows % each == 0
            and ids.equals(ids.take(firsts))
            and table.column("style").equals(pa.chunked_array([same_style]))
        )


def _read(filesystem: fs.FileSystem, path: str) -> pa.Table:
    with filesystem.open_input_file(path) as file:
        return pq.ParquetFile(file).read(OUTPUT.names)


# --- the plan's two kinds of units --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Division:
    """The input, divided into units to caption and units that are there already.

    fresh: files of units of rows_per_unit rows. carried: files of units of carried_rows_per_unit
    rows, each with the file of its part. changes: input rows by what became of them, and those that
    are gone. replaced: a file of some changed rows: `id`, the `unit` that captions it, and the old
    `caption` of a `version` (its number in the settings); None without any.
    """

    fresh: list[Path]
    carried: list[tuple[Path, Path]]
    num_carried: int
    rows_per_unit: int
    carried_rows_per_unit: int
    changes: dict[str, int]
    replaced: Path | None = None

    @classmethod
    def all_fresh(cls, catalog: FrozenCatalog) -> Division:
        """Without a previous run."""
        return cls(list(catalog.units), [], 0, catalog.rows_per_unit, 1, {})


def divide(
    previous: Previous, catalog: FrozenCatalog, settings: Settings, run_id: str, scratch: Path
) -> Division:
    """Compares the input with a previous run. Raises PreviousError when that is damaged."""
    is_fresh, is_failed = np.zeros(catalog.num_rows, bool), np.zeros(catalog.num_rows, bool)
    changes = Counter[str]()
    replaced: list[pa.Table] = []
    most = max(catalog.num_rows, previous.num_rows // len(previous.versions))
    with (
        _Buckets(scratch / "new", most) as new,
        _Buckets(scratch / "old", most) as old,
        _Rows(scratch / "carried") as units,
        _Rows(scratch / "parts") as ours,
    ):
        new.add(_numbered(catalog))
        old.add(previous.batches())
        for bucket in range(new.count):
            match = _Match.of(new.read(bucket), old.read(bucket), previous, settings)
            changes.update(match.changes)
            is_fresh[match.rows_to_caption] = True
            is_failed[match.rows_still_failed] = True
            replaced.append(match.replaced())
            units.write(match.kept_units(catalog.schema))
            ours.write(match.kept_parts(run_id))
    num_fresh = int(is_fresh.sum())
    num_carried = catalog.num_rows - num_fresh
    rows_per_unit = min(catalog.rows_per_unit, choose_rows_per_unit(num_fresh))
    fresh = _save(scratch / "unit", cut(_filtered(catalog, is_fresh), rows_per_unit, num_fresh))
    each = len(settings.versions)
    kept = _with_bytes(units.read(), catalog, is_failed)
    carried = _save(scratch / "old-unit", cut(kept, CARRIED_ROWS, num_carried))
    written = _save(scratch / "old-part", cut(ours.read(), CARRIED_ROWS * each, num_carried * each))
    pairs = list(zip(carried, written, strict=True))
    return Division(
        fresh, pairs, num_carried, rows_per_unit, CARRIED_ROWS, dict(changes),
        _save_replaced(replaced, is_fresh, rows_per_unit, scratch),
    )  # fmt: skip


def _save_replaced(
    found: list[pa.Table], is_fresh: npt.NDArray[np.bool_], rows_per_unit: int, scratch: Path
) -> Path | None:
    """Writes some changed rows with the numbers of the units that caption them."""
    rows = pa.concat_tables(found).sort_by("_image_row")
    rows = rows.take(np.arange(0, len(rows), max(1, len(rows) // REPLACED))[:REPLACED])
    if not rows.num_rows:
        return None
    units = (np.cumsum(is_fresh)[rows.column("_image_row").to_numpy()] - 1) // rows_per_unit
    [path] = _save(scratch / "replaced", [rows.append_column("unit", pa.array(units))])
    return path


def _numbered(catalog: FrozenCatalog) -> Iterator[pa.Table]:
    """The input without image bytes, its rows numbered."""
    names = [name for name in catalog.schema.names if name != "_image_bytes"]
    start = 0
    for unit in catalog.units:
        table = pq.ParquetFile(unit).read(names)
        numbers = np.arange(start, start + table.num_rows)
        yield table.append_column("_image_row", pa.array(numbers))
        start += table.num_rows


def _filtered(catalog: FrozenCatalog, mask: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    start = 0
    for unit in catalog.units:
        with pq.ParquetFile(unit) as file:
            wanted = mask[start : start + file.metadata.num_rows]
            start += len(wanted)
            if wanted.any():
                yield from file.read().filter(pa.array(wanted)).to_batches()


def _with_bytes(
    kept: Iterable[pa.RecordBatch], catalog: FrozenCatalog, mask: npt.NDArray[np.bool_]
) -> Iterator[pa.RecordBatch]:
    """Kept rows with the bytes of those images that have failed: `errors/` lists such rows whole.

    The others' are null, as nothing reads them. The failed ones are all in memory.
    """
    if "_image_bytes" not in catalog.schema.names or not mask.any():
        yield from kept
        return
    failed: dict[str, bytes | None] = {}
    for rows in _filtered(catalog, mask):
        columns = (rows.column(name).to_pylist() for name in ("id", "_image_bytes"))
        failed.update(zip(*columns, strict=True))
    for rows in kept:
        at = rows.schema.get_field_index("_image_bytes")
        data = [failed.get(row_id) for row_id in rows.column("id").to_pylist()]
        yield rows.set_column(at, "_image_bytes", pa.array(data, pa.binary()))


def _save(stem: Path, tables: Iterable[pa.Table]) -> list[Path]:
    paths = []
    for number, table in enumerate(tables):
        paths.append(Path(f"{stem}-{number:05}.parquet"))
        pq.write_table(table, paths[-1], compression="zstd")
    return paths


@dataclass(frozen=True, slots=True)
class _Match:
    """A bucket of the input beside the same ids of the previous run.

    old_rows: where the versions of each row of `new` are in `old`, [rows, versions]; of use only
    where `is_carried`; its first column where `is_changed`, if there is a version that both runs
    have. first_version: its number in the settings.
    """

    new: pa.Table
    old: pa.Table
    settings: Settings
    old_rows: npt.NDArray[np.int64]
    is_carried: npt.NDArray[np.bool_]
    is_locked: npt.NDArray[np.bool_]
    is_changed: npt.NDArray[np.bool_]
    is_still_failed: npt.NDArray[np.bool_]
    first_version: int | None
    changes: Counter[str]

    @classmethod
    def of(cls, new: pa.Table, old: pa.Table, previous: Previous, settings: Settings) -> _Match:
        each = len(previous.versions)
        ids = old.column("id").take(np.arange(0, old.num_rows, each))
        found = pc.index_in(new.column("id"), value_set=ids.combine_chunks())
        is_known = _mask(found.is_valid())
        at = found.fill_null(0).to_numpy().astype(np.int64) * each
        # a version that the previous run had not makes all its rows new
        shared = [v for v in settings.versions if v in previous.versions]
        places = [previous.versions.index(version) for version in shared]
        first_version = settings.versions.index(shared[0]) if shared else None
        old_rows = at[:, None] + np.array(places, np.int64)
        is_same = is_known & (len(places) == len(settings.versions))
        has_failed, has_caption = np.zeros_like(is_known), np.ones_like(is_known)
        if is_same.any():
            prints = {s: pa.array(settings.fingerprints(new, s)) for s in settings.styles}
            for column, (style, _) in enumerate(settings.versions):
                rows = old.select(["fingerprint", "status"]).take(old_rows[:, column])
                is_same &= _mask(pc.equal(rows.column("fingerprint"), prints[style]))
                has_failed |= _mask(pc.equal(rows.column("status"), "failed"))
                has_caption &= _mask(pc.not_equal(rows.column("status"), "locked"))
        is_same &= has_caption
        is_locked = np.array(parts.locked(new), bool)
        is_carried = is_same & ~is_locked & ~(has_failed & settings.retry_failed)
        is_fresh = ~is_carried & ~is_locked
        kinds = {
            "carried_over": is_carried & ~has_failed,
            "still_failed": is_carried & has_failed,
            "locked": is_locked,
            "new": is_fresh & ~is_known,
            "changed": is_fresh & is_known & ~is_same,
            "retried": is_fresh & is_same,
        }
        changes = Counter({kind: int(mask.sum()) for kind, mask in kinds.items()})
        changes["gone"] = len(ids) - int(is_known.sum())
        return cls(
            new, old, settings, old_rows, is_carried, is_locked, kinds["changed"],
            kinds["still_failed"], first_version, changes,
        )  # fmt: skip

    @property
    def rows_to_caption(self) -> npt.NDArray[np.int64]:
        """Their numbers in the input."""
        return self._numbers(~self.is_carried & ~self.is_locked)

    @property
    def rows_still_failed(self) -> npt.NDArray[np.int64]:
        """The same of those that failed in the previous run and are carried over."""
        return self._numbers(self.is_still_failed)

    def _numbers(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        numbers: npt.NDArray[np.int64] = self.new.column("_image_row").to_numpy()
        return numbers[mask]

    def replaced(self) -> pa.Table:
        """Some of the changed rows that had a caption, with it, and their numbers in the input."""
        empty = self.first_version is None
        rows = np.flatnonzero(self.is_changed & (not empty))
        old = self.old_rows[rows, 0] if not empty else rows
        table = pa.table({
            "_image_row": self.new.column("_image_row").take(rows),
            "id": self.new.column("id").take(rows),
            "caption": self.old.column("caption").take(old),
            "version": pa.array([self.first_version or 0] * len(rows), pa.int64()),
        })  # fmt: skip
        return table.filter(pc.is_valid(table.column("caption"))).slice(0, REPLACED)

    def _kept(self) -> tuple[pa.Table, pa.Table]:
        """The input's rows that are carried over, and those with a caption that a person wrote."""
        new = self.new.drop_columns("_image_row")
        return new.filter(pa.array(self.is_carried)), new.filter(pa.array(self.is_locked))

    def kept_units(self, schema: pa.Schema) -> pa.Table:
        """The input's rows that need no captioner; without bytes of images, which nothing reads."""
        rows = pa.concat_tables(self._kept())
        if "_image_bytes" in schema.names:
            rows = rows.append_column("_image_bytes", pa.nulls(rows.num_rows, pa.binary()))
        return rows

    def kept_parts(self, run_id: str) -> pa.Table:
        """Their rows of the output, in the same order. Who made a caption and when stays true."""
        carried, locked = self._kept()
        ours = self.old.take(self.old_rows[self.is_carried].ravel())
        is_failed = pc.equal(ours.column("status"), "failed")
        status = pc.if_else(is_failed, "failed", "carried_over")
        ours = ours.set_column(OUTPUT.get_field_index("status"), OUTPUT.field("status"), status)
        written = parts.assemble(locked, {}, self.settings, run_id=run_id, model_id=None)
        return pa.concat_tables([parts.beside_input(carried, ours), written])


def _mask(values: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = values.fill_null(False).to_numpy().astype(bool)
    return mask


# --- rows on local disk -------------------------------------------------------------------------


class _Rows:
    """A file of rows, written a table at a time and then read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def write(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self.path), rows.schema)
        self._writer.write_table(rows)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def read(self) -> Iterator[pa.RecordBatch]:
        self.close()
        with pa.OSFile(str(self.path)) as file:
            yield from pa.ipc.open_stream(file)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Buckets:
    """Rows cut by a hash of their ids, so that equal ids meet in buckets of the same number."""

    def __init__(self, stem: Path, num_rows: int) -> None:
        self.count = min(MAX_BUCKETS, -(-num_rows // BUCKET_ROWS))
        self._files = [_Rows(Path(f"{stem}-{number}")) for number in range(self.count)]

    def add(self, tables: Iterable[pa.Table]) -> None:
        """Rows of one id stay together and in order."""
        held: list[pa.Table] = []
        schema: pa.Schema | None = None
        for table in tables:
            schema = table.schema
            held.append(table)
            if sum(map(len, held)) >= BUCKET_ROWS:
                self._cut(pa.concat_tables(held))
                held = []
        if schema is not None:  # and an empty table each: every bucket can be read
            self._cut(pa.concat_tables(held or [schema.empty_table()]))
            for file in self._files:
                file.write(schema.empty_table())

    def _cut(self, rows: pa.Table) -> None:
        ids = (zlib.crc32(row_id.encode()) for row_id in rows.column("id").to_pylist())
        buckets = np.fromiter(ids, np.int64, rows.num_rows) % self.count
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(self.count + 1))
        rows = rows.take(order)
        for number, file in enumerate(self._files):
            start, stop = int(bounds[number]), int(bounds[number + 1])
            if stop > start:
                file.write(rows.slice(start, stop - start))

    def read(self, number: int) -> pa.Table:
        file = self._files[number]
        file.close()
        with pa.OSFile(str(file.path)) as source:
            return pa.ipc.open_stream(source).read_all()

    def __enter__(self) -> _Buckets:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
