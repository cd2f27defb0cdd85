"""A finished run in the layouts that builders of data sets load.

    hub          data/train-00000-of-00004.parquet …, README.md: `datasets.load_dataset(folder)`,
                 DuckDB and pandas read it without an option
    webdataset   00000.tar …, README.md: of each captioned image KEY.jpg (or what it is), KEY.txt
                 with the caption and KEY.json with the row; failed rows are left out, and counted

The same run comes to the same bytes. Everything is streamed: a file is built on local disk and put
in place whole. `_SUCCESS` is written last; until then `_EXPORTING` says whose the folder is, and
the same command begins anew. The run is not pruned meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import posixpath
import re
import sqlite3
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from stylegan.cards import export_card
from stylegan.catalog import ImageSource, cut, fetch_image
from stylegan.images import EXTENSIONS, identify
from stylegan.publish import reading
from stylegan.storage import patiently, resolve_filesystem, staged, write_atomically

KINDS: Final = ("hub", "webdataset")
FORMAT = 1  # a new number makes a folder of the old one another export

HUB_BYTES = 256 << 20  # of a file without images, about
HUB_GROUP = 8192  # rows of a row group
HUB_IMAGES = 5000  # rows of a file with images: 500 MB of 100 kB each
HUB_IMAGE_GROUP = 100  # as the hub's own viewer wants them
SHARD_SAMPLES, SHARD_BYTES = 10_000, 1 << 30
FETCH_THREADS, FETCH_ROWS = 16, 64  # images in memory at a time


class ExportError(ValueError):
    """What cannot be exported, or not there; the message says why and the remedy."""


def export_run(run: str, kind: str, target: str | None = None, *, with_images: bool = False) -> str:
    """Writes a finished run as a data set; a sentence that says where, and what is in it.

    run: its URI. kind: one of KINDS. target: a folder that is empty or holds this very export,
    finished or not; None: `export-…` in the run's directory. with_images: hub only, shards always
    have them. Raises ExportError, PublishError (the run is being pruned), LockError (another job
    exports it).
    """
    output, _, name = run.rpartition("/")
    with_images = with_images or kind == "webdataset"
    with reading(output, name, f"export-{kind}"):
        identity, summary = _read(run, "_SUCCESS").decode(), json.loads(_read(run, "summary.json"))
        suffix = "-images" if with_images and kind == "hub" else ""
        target = target or f"{run}/export-{kind}{suffix}"
        mark = {"format": FORMAT, "run": name, "identity": identity, "kind": kind,
                "with_images": with_images}  # fmt: skip
        if not _begin(target, json.dumps(mark).encode()):
            return f"exported already: {target}; nothing was written"
        with _Images.open(summary, with_images) as images:
            write = _write_hub if kind == "hub" else _write_shards
            written = write(run, target, summary, images)
        card = export_card(summary, kind, written.counts, written.features)
        _write(target, "README.md", card.encode())
        _write(target, "_SUCCESS", json.dumps(mark).encode())
        filesystem, path = resolve_filesystem(target)
        patiently(target, lambda: filesystem.delete_file(f"{path}/_EXPORTING"))
    counted = ", ".join(f"{count:,} {what}" for what, count in written.counts.items())
    return f"exported to {target}: {counted}"


@dataclass(frozen=True, slots=True)
class _Written:
    """counts: by what they count. features: of the data set, where files alone do not tell them."""

    counts: dict[str, int]
    features: list[dict[str, Any]] | None = None


def _begin(target: str, mark: bytes) -> bool:
    """Makes the folder ours and removes what a killed export left; False: it is finished."""
    filesystem, path = resolve_filesystem(target)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
    listing = patiently(target, lambda: filesystem.get_file_info(selector))
    there = {i.path[len(path) + 1 :]: i.path for i in listing if i.type == fs.FileType.File}
    for name in ("_SUCCESS", "_EXPORTING"):
        if name in there and _read(target, name) != mark:
            raise ExportError(
                f"{target} holds another export: delete it, or name another folder with --export-to"
            )
    if "_SUCCESS" in there:
        return False
    if there and "_EXPORTING" not in there:
        raise ExportError(
            f"{target} is not empty ({min(there)}): name a new folder with --export-to"
        )
    _write(target, "_EXPORTING", mark)
    for name, file in there.items():
        if name != "_EXPORTING":
            patiently(target, partial(filesystem.delete_file, file))
    return True


def _read(uri: str, name: str) -> bytes:
    filesystem, path = resolve_filesystem(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            content: bytes = stream.read()
        return content

    return patiently(uri, read)


def _write(uri: str, name: str, data: bytes) -> None:
    filesystem, path = resolve_filesystem(uri)
    patiently(uri, lambda: write_atomically(filesystem, f"{path}/{name}", data))


def _parts(run: str) -> Iterator[fs.FileInfo]:
    filesystem, path = resolve_filesystem(run)
    selector = fs.FileSelector(f"{path}/data")
    listing = patiently(run, lambda: filesystem.get_file_info(selector))
    yield from sorted((i for i in listing if i.extension == "parquet"), key=lambda info: info.path)


def _rows(run: str) -> Iterator[pa.RecordBatch]:
    """The rows of the run, FETCH_ROWS at most at a time."""
    filesystem = resolve_filesystem(run)[0]

    def read(path: str) -> pa.Table:
        with filesystem.open_input_file(path) as file:
            return pq.ParquetFile(file).read()

    for part in _parts(run):
        table = patiently(run, partial(read, part.path)).replace_schema_metadata(None)
        yield from table.to_batches(FETCH_ROWS)


# --- images -------------------------------------------------------------------------------------


class _Images:
    """The images of rows of a run. missing: rows whose image is no longer what was captioned."""

    def __init__(
        self, source: ImageSource, with_bytes: bool, bytes_by_id: sqlite3.Connection | None = None
    ) -> None:
        self.source, self.with_bytes = source, with_bytes
        self.missing: Counter[str] = Counter()
        self._bytes = bytes_by_id

    @classmethod
    @contextlib.contextmanager
    def open(cls, summary: Mapping[str, Any], with_bytes: bool) -> Iterator[_Images]:
        """with_bytes: `read` will be called. Raises ExportError when that cannot be done."""
        if "images" not in summary["input"]:
            raise ExportError("this run was made before runs said where their images are: run anew")
        source = ImageSource(**summary["input"]["images"])
        if not with_bytes or source.manifest is None:
            yield cls(source, with_bytes)
            return
        # a manifest has an order of its own: on disk its images can be found by id
        with (
            tempfile.TemporaryDirectory(prefix="stylegan-") as scratch,
            contextlib.closing(sqlite3.connect(Path(scratch, "images"))) as database,
        ):
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute("CREATE TABLE images (id TEXT PRIMARY KEY, data BLOB)")
            try:
                for rows in source.read_bytes(summary["input"]["rows"]):
                    database.executemany("INSERT INTO images VALUES (?, ?)", rows)
                    database.commit()
            except (OSError, KeyError, pa.ArrowException, sqlite3.Error) as error:
                raise ExportError(
                    f"the images are in {source.manifest}, which is gone or has changed: {error}"
                ) from error
            yield cls(source, True, database)

    def references(self, rows: pa.RecordBatch) -> list[str | None]:
        """URIs; None for a row without an image, or whose image has none."""
        if self.source.column is None:
            return [None] * rows.num_rows
        values = rows.column(self.source.column).to_pylist()
        return [self.source.uri(None if value is None else str(value)) for value in values]

    def read(self, rows: pa.RecordBatch, threads: ThreadPoolExecutor) -> list[bytes | None]:
        """The files of rows; None for what failed, has no image, or has it no more."""
        names = ("id", "status", "image_sha256")
        columns = [rows.column(name).to_pylist() for name in names]
        facts = list(zip(*columns, self.references(rows), strict=True))
        # a locked row's image was never opened: there may be one
        wanted = {
            row_id: (reference, sha256)
            for row_id, status, sha256, reference in facts
            if status == "locked" or sha256
            if status != "failed" and (reference or self._bytes)
        }
        if self._bytes is None:
            found = threads.map(fetch_image, (reference for reference, _ in wanted.values()))
            data = {row_id: image.data for row_id, image in zip(wanted, found, strict=True)}
        else:
            data = {row_id: self._lookup(row_id) for row_id in wanted}
        for row_id, (_, sha256) in wanted.items():
            content = data[row_id]
            if content is not None and sha256 and hashlib.sha256(content).hexdigest() != sha256:
                data[row_id] = None
        files = [data.get(row_id) for row_id, *_ in facts]
        for (row_id, status, _, _), file in zip(facts, files, strict=True):
            # a manifest may give a person's caption no image
            if file is None and row_id in wanted and (self._bytes is None or status != "locked"):
                self.missing["rows whose image is gone or has changed"] += 1
        return files

    def _lookup(self, row_id: str) -> bytes | None:
        assert self._bytes
        found = self._bytes.execute("SELECT data FROM images WHERE id = ?", (row_id,)).fetchone()
        return found[0] if found else None


# --- hub ----------------------------------------------------------------------------------------

_IMAGE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _write_hub(run: str, target: str, summary: Mapping[str, Any], images: _Images) -> _Written:
    """All rows, failed ones too, with a column `image` of URIs, or of the hub's own kind."""
    num_rows = summary["counts"]["rows"]
    if images.with_bytes:
        rows_per_group, rows_per_file = HUB_IMAGE_GROUP, HUB_IMAGES
    else:
        num_bytes = sum(part.size for part in _parts(run))
        num_files = max(1, -(-num_bytes // HUB_BYTES))
        rows_per_group = HUB_GROUP
        rows_per_file = -(-num_rows // (num_files * HUB_GROUP)) * HUB_GROUP
    num_files = -(-num_rows // rows_per_file)
    groups = cut(_with_images(run, images), rows_per_group, num_rows)
    written = 0
    for number in range(num_files):
        inside = itertools.islice(groups, rows_per_file // rows_per_group)
        if (first := next(inside, None)) is None:
            break
        name = f"train-{number:05}-of-{num_files:05}.parquet"
        with (
            staged(f"{target}/data/{name}") as path,
            pq.ParquetWriter(path, first.schema, compression="zstd") as writer,
        ):
            for group in itertools.chain([first], inside):
                writer.write_table(group, row_group_size=rows_per_group)
                written += group.num_rows
    if written != num_rows:
        raise ExportError(f"{run} has {written:,} of the {num_rows:,} rows it was published with")
    failed = {"rows that failed": summary["counts"]["statuses"].get("failed", 0)}
    return _Written({"files": num_files, "rows": written, **failed, **images.missing})


def _with_images(run: str, images: _Images) -> Iterator[pa.RecordBatch]:
    """The rows with the column `image` before all others. A column of the input that has this name,
    and is not the image's, becomes `input_image`.
    """
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        for rows in _rows(run):
            fields, columns = [], []
            uris = images.references(rows)
            if images.with_bytes:
                files = [
                    None if data is None else {"bytes": data, "path": _file_name(row_id, uri, data)}
                    for row_id, uri, data in zip(
                        rows.column("id").to_pylist(), uris, images.read(rows, threads), strict=True
                    )
                ]
                fields.append(pa.field("image", _IMAGE))
                columns.append(pa.array(files, _IMAGE))
            elif images.source.column is not None:
                fields.append(pa.field("image", pa.string()))
                columns.append(pa.array(uris, pa.string()))
            for field, column in zip(rows.schema, rows.columns, strict=True):
                if fields and field.name == "image":
                    if images.source.column == "image":
                        continue
                    field = field.with_name(_free("input_image", rows.schema.names))
                fields.append(field)
                columns.append(column)
            schema = pa.schema(fields, _HUB_METADATA if images.with_bytes else None)
            yield pa.record_batch(columns, schema=schema)


_HUB_METADATA: Final = {
    "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
}


def _file_name(row_id: str, uri: str | None, data: bytes) -> str:
    name = posixpath.basename(uri) if uri and "#" not in uri else f"{row_id}.{_extension(data)}"
    return name[-200:]


def _free(name: str, taken: list[str]) -> str:
    while name in taken:
        name = f"input_{name}"
    return name


def _extension(data: bytes) -> str | None:
    """None: it is no image; a person's caption may stand at such a file."""
    return EXTENSIONS.get(str(identify(data)))


# --- WebDataset ---------------------------------------------------------------------------------


def _write_shards(run: str, target: str, summary: Mapping[str, Any], images: _Images) -> _Written:
    """A sample for each row with an image and a caption."""
    left_out: Counter[str] = Counter()
    extensions: set[str] = set()
    samples = _samples(run, summary, images, left_out, extensions)
    num_samples = num_shards = 0
    sample = next(samples, None)
    while sample is not None:
        with staged(f"{target}/{num_shards:05}.tar") as path, tarfile.open(path, "w") as tar:
            count = size = 0
            while sample is not None and count < SHARD_SAMPLES and size < SHARD_BYTES:
                for name, data in sample:
                    member = tarfile.TarInfo(name)  # of no time and nobody: the same bytes again
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    size += len(data)
                count += 1
                sample = next(samples, None)
        num_samples += count
        num_shards += 1
    counts = {"shards": num_shards, "samples": num_samples, **left_out, **images.missing}
    return _Written(counts, _features(run, extensions))


def _samples(
    run: str, summary: Mapping[str, Any], images: _Images, left_out: Counter[str],
    extensions: set[str],
) -> Iterator[list[tuple[str, bytes]]]:  # fmt: skip
    settings = summary["settings"]
    num_versions = len(settings["styles"]) * settings["captions_per_image"]
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        numbers = itertools.cycle(range(num_versions))  # every image comes once in each version
        for batch in _rows(run):
            files = images.read(batch, threads)
            for row, data in zip(batch.to_pylist(), files, strict=True):
                number = next(numbers)
                if row["status"] == "failed":
                    left_out["rows that failed, left out"] += 1
                    continue
                extension = _extension(data) if data is not None else None
                if data is None or extension is None:
                    left_out["rows without an image, left out"] += 1
                    continue
                key = _key(row["id"], number if num_versions > 1 else None)
                extensions.add(extension)
                values = {name: _plain(value) for name, value in row.items()}
                yield [
                    (f"{key}.{extension}", data),
                    (f"{key}.txt", (row["caption"] or "").encode()),
                    (f"{key}.json", json.dumps(values, ensure_ascii=False).encode()),
                ]


def _key(row_id: str, version: int | None) -> str:
    """The id, where it is a safe file name without a dot, and there is one caption only; else what
    is safe of it, with a hash.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", row_id)[:80]
    if safe and safe == row_id and version is None and not re.search(r"-[0-9a-f]{16}$", safe):
        return safe
    digest = hashlib.sha256(json.dumps([row_id, version]).encode()).hexdigest()
    return f"{safe}-{digest[:16]}"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if isinstance(value, date) else json.dumps(value, default=str)


def _features(run: str, extensions: set[str]) -> list[dict[str, Any]]:
    """What a sample holds, as a data-set card says it: the first few samples may not show all."""
    row = [{"name": field.name, "dtype": _dtype(field.type)} for field in next(_rows(run)).schema]
    return [
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
        *({"name": extension, "dtype": "image"} for extension in sorted(extensions)),
        {"name": "txt", "dtype": "string"},
        {"name": "json", "struct": row},
    ]


def _dtype(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int64"
    return "float64" if pa.types.is_floating(kind) else "string"
