"""What is to be captioned: a folder, a glob, one image, a manifest or WebDataset shards, frozen to
Parquet units.

A unit is a file of consecutive input rows in a fixed order. Its columns are the input's columns
(without image bytes), then `id`, `description`, what identifies the image's content, as far as it
is known, as `_image_stamp` ("" for no image), and the image as `_image_uri` (text, absolute) or
`_image_bytes` (binary). All that a user can get wrong about the input is found here, before
anything is started, as one `CatalogError`; an image that cannot be read is a failed row, later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
import re
import stat
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from stylegan.shards import (
    IMAGE_EXTENSIONS,
    NO_IMAGE,
    ShardError,
    Span,
    expand_braces,
    index_shards,
    split_span,
    unwrap,
)
from stylegan.storage import endpoint, explain, patiently, s3_client
from stylegan.storage import resolve_filesystem as resolve_filesystem

# fmt: off
OUTPUT_COLUMNS: Final = (
    "id", "caption", "style", "caption_score", "description", "status", "needs_review",
    "error_class", "error_message", "image_sha256", "width", "height", "model_id",
    "model_revision", "fingerprint", "run_id", "seed", "num_generated_tokens", "generated_at",
)
# fmt: on
"""Columns that a run adds; an input column of such a name is kept as `input_NAME`."""

MAX_FILE_BYTES: Final = 512 << 20
"""A larger file is not fetched: no image within the pixel limit is that large."""


class CatalogError(ValueError):
    """The input as a whole cannot be captioned; the message says what, the value, the remedy."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the images of a run are, in terms of its output, whose rows have no `_image_uri`.

    column: holds references, which are relative to `folder`; None: there are none. manifest: holds
    the bytes themselves, in the column `bytes_column`, beside `id_column`.
    """

    column: str | None = None
    folder: str | None = None
    manifest: str | None = None
    id_column: str | None = None
    bytes_column: str | None = None

    def uri(self, reference: str | None) -> str | None:
        """Where the image of a row is that has this in the column of references."""
        return _absolute((reference or "").strip() or None, self.folder)

    def read_bytes(self, num_rows: int) -> Iterator[list[tuple[str, bytes | None]]]:
        """Id and image of the first rows of the manifest, some rows at a time."""
        assert self.manifest and self.id_column and self.bytes_column
        filesystem, path = resolve_filesystem(self.manifest)
        for batch in _open_parquet(self.manifest, filesystem, path, None).batches():
            rows = batch.slice(0, num_rows)
            num_rows -= rows.num_rows
            ids, data = rows.column(self.id_column), _image_bytes(rows.column(self.bytes_column))
            yield list(zip(_text(ids).to_pylist(), data.to_pylist(), strict=True))
            if num_rows == 0:
                return


@dataclass(frozen=True, slots=True)
class FrozenCatalog:
    """The input, cut into units."""

    units: tuple[Path, ...]
    """Parquet files in order; unit k holds rows [k * rows_per_unit, (k + 1) * rows_per_unit)."""
    num_rows: int
    rows_per_unit: int
    digest: str
    """sha256 of ids, image references, descriptions and all other columns, however it is cut.

    Files of a folder or glob count with size and modification time, image bytes with their hash.
    """
    schema: pa.Schema
    """Of every unit."""
    attributes: tuple[str, ...] = ()
    """The unit's names of the attribute columns asked for."""
    required: tuple[str, ...] = ()
    """The unit's names of the required columns asked for."""
    images: ImageSource = dataclasses.field(default_factory=ImageSource)


def choose_rows_per_unit(num_rows: int, bytes_per_row: float = 0.0) -> int:
    """The largest power of two ≤ num_rows / 64, within 32 … 256, and ≤ 64 MiB where it can be.

    At least 64 units: enough to spread over workers and to lose little when one is lost. No more
    rows than that: several units are decoded in memory at a time, some of them copied.
    """
    bound = min(num_rows / 64, (64 << 20) / max(bytes_per_row, 1.0), 256)
    return 1 << max(5, math.floor(math.log2(max(bound, 1.0))))


def freeze_catalog(
    images: str,
    destination: Path,
    *,
    id_column: str | None = None,
    image_column: str | None = None,
    description_column: str | None = None,
    limit: int | None = None,
    rows_per_unit: int | None = None,
    attribute_columns: Sequence[str] = (),
    required_columns: Sequence[str] = (),
    identify: Literal["later", "stamp", "content"] = "later",
) -> FrozenCatalog:
    """Write the units of `images` (a path or URI) as `destination/unit-00000.parquet` ….

    A folder is listed recursively, in sorted path order: every file is a row whatever its
    extension, links to files included; hidden files and folders, and links to folders, are not.
    A manifest is known by its extension; so are shards (`.tar`), of which a folder or a glob may
    hold many, and of which `{000..010}` names a series. `limit` keeps the first rows. `identify`:
    how images are known (`_image_stamp`): "later", when they are read; "stamp", from a listing or
    by asking the storage; "content", by reading each. Bytes have their hash. Raises CatalogError.
    """
    if limit is not None and limit < 1:
        raise CatalogError(f"--limit is {limit}; it must be at least 1")
    destination.mkdir(parents=True, exist_ok=True)
    if any(destination.glob("unit-*.parquet")):
        raise FileExistsError(f"{destination} already holds the units of a catalogue")
    choice = id_column, image_column, description_column, identify
    wanted = attribute_columns, required_columns
    # a storage that fails in the middle: from the start again
    return patiently(
        images,
        lambda: _freeze(images, destination, choice, limit, rows_per_unit, *wanted),
    )


def _freeze(
    images: str, destination: Path,
    choice: tuple[str | None, str | None, str | None, Literal["later", "stamp", "content"]],
    limit: int | None, rows_per_unit: int | None, attribute_columns: Sequence[str],
    required_columns: Sequence[str],
) -> FrozenCatalog:  # fmt: skip
    """Leaves nothing in `destination` when it fails."""
    index = destination / "samples.jsonl"
    try:
        return _freeze_source(
            _open_source(images, limit, choice[1], index), destination, choice, rows_per_unit,
            attribute_columns, required_columns,
        )  # fmt: skip
    finally:
        for path in destination.glob(f"{index.name}*"):
            path.unlink()


def _freeze_source(
    source: _Source, destination: Path,
    choice: tuple[str | None, str | None, str | None, Literal["later", "stamp", "content"]],
    rows_per_unit: int | None, attribute_columns: Sequence[str], required_columns: Sequence[str],
) -> FrozenCatalog:  # fmt: skip
    images = source.name
    if source.num_rows == 0:
        raise CatalogError(f"{images} has no rows: there is nothing to caption")
    columns = _Columns.choose(source, *choice)
    attributes = columns.names_of(source, attribute_columns, "--attribute-columns")
    required = columns.names_of(source, required_columns, "required_columns of --rules")
    rows = rows_per_unit or choose_rows_per_unit(source.num_rows, source.bytes_per_row)

    units: list[Path] = []
    digest = _Digest(columns.schema)
    id_hashes: list[npt.NDArray[np.int64]] = []
    seen = 0
    try:
        for table in cut(_converted(source, columns), rows, source.num_rows):
            ids = table["id"].to_pylist()
            if None in ids:
                raise CatalogError(
                    f"{images}: row {seen + ids.index(None) + 1} has no {columns.id_name!r}, the"
                    " column that identifies a row; fill it, or name another with --id-column"
                )
            # 8 bytes an id, whatever its length: duplicates are looked up only where hashes meet.
            id_hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
            digest.update(table)
            units.append(destination / f"unit-{len(units):05d}.parquet")
            pq.write_table(table, units[-1], use_dictionary=not columns.has_bytes)
            seen += len(ids)
        if seen != source.num_rows:
            raise CatalogError(f"{images} changed while it was read: try again")
        _refuse_duplicates(images, columns.id_name, units, np.concatenate(id_hashes))
    except BaseException:
        for unit in units:
            unit.unlink(missing_ok=True)
        raise
    digest_ = digest.hexdigest(source.stamps)
    return FrozenCatalog(
        tuple(units), seen, rows, digest_, columns.schema, attributes, required,
        columns.images(source),
    )


def _converted(source: _Source, columns: _Columns) -> Iterator[pa.RecordBatch]:
    try:
        for batch in source.batches():
            yield columns.convert(batch)
    except CatalogError:
        raise
    except _UNREADABLE as error:
        _refuse_manifest(source.name, error)


def cut(batches: Iterable[pa.RecordBatch], rows_per_unit: int, num_rows: int) -> Iterator[pa.Table]:
    """The first `num_rows` rows as tables of `rows_per_unit`, the last one shorter."""
    pending: list[pa.RecordBatch] = []
    taken = held = 0
    for batch in batches:
        batch = batch.slice(0, num_rows - taken)
        taken += batch.num_rows
        while held + batch.num_rows >= rows_per_unit:
            head = batch.slice(0, rows_per_unit - held)
            yield pa.Table.from_batches([*pending, head])
            batch = batch.slice(head.num_rows)
            pending, held = [], 0
        if batch.num_rows:
            pending.append(batch)
            held += batch.num_rows
        if taken == num_rows:
            break
    if pending:
        yield pa.Table.from_batches(pending)


def _refuse_duplicates(
    images: str, id_name: str, units: list[Path], id_hashes: npt.NDArray[np.int64]
) -> None:
    hashes, counts = np.unique(id_hashes, return_counts=True)
    suspects = set(hashes[counts > 1].tolist())
    if not suspects:
        return
    found: Counter[str] = Counter()
    for unit in units:
        ids = pq.read_table(unit, columns=["id"])["id"].to_pylist()
        found.update(value for value in ids if hash(value) in suspects)
    twins = [(value, count) for value, count in found.items() if count > 1]
    if twins:
        shown = ", ".join(f"{value!r} ({count} times)" for value, count in twins[:5])
        raise CatalogError(
            f"{images}: {len(twins):,} values of {id_name!r} occur in more than one row: {shown}"
            f"{', …' if len(twins) > 5 else ''}; the identifier must be unique: name another column"
            " with --id-column, or remove the rows"
        )


class _Digest:
    """A hash for each column, fed value by value: how the rows are batched does not matter."""

    def __init__(self, schema: pa.Schema) -> None:
        self._hashes = {field.name: hashlib.sha256(str(field.type).encode()) for field in schema}

    def update(self, table: pa.Table) -> None:
        for name, column in zip(table.column_names, table.columns, strict=True):
            text = json.dumps(column.to_pylist(), default=_hashable)
            self._hashes[name].update(text[1:-1].encode() + b", ")

    def hexdigest(self, stamps: Sequence[str]) -> str:
        columns = [(name, value.hexdigest()) for name, value in self._hashes.items()]
        return hashlib.sha256(json.dumps([columns, list(stamps)]).encode()).hexdigest()


def _hashable(value: object) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


# --- Where the rows come from -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """A table that can be read again and again in batches of its rows, in order."""

    name: str
    schema: pa.Schema
    num_rows: int
    batches: Callable[[], Iterable[pa.RecordBatch]]
    folder: str | None = None
    """What a manifest's relative paths are relative to, as a path or URI; None for a listing."""
    listed: str = ""
    """What the ids of a listing are relative to."""
    bytes_per_row: float = 0.0
    stamps: Sequence[str] = ()
    """What else identifies the input: size and modification time of each listed file."""
    image_column: str | None = None
    """The column of images where that is not for the user to name."""


_UNREADABLE: Final = (OSError, ValueError, pa.ArrowException)


def _refuse_manifest(name: str, error: BaseException) -> NoReturn:
    reason = str(error).partition("\n")[0]
    raise CatalogError(
        f"the manifest {name} cannot be read: {reason}; CSV (UTF-8, with a header), JSON Lines and"
        " Parquet are understood, by their extension"
    ) from error


def _open_source(images: str, limit: int | None, image_column: str | None, index: Path) -> _Source:
    """index: a file on local disk that the list of samples of shards may be written to."""
    try:
        filesystem, path = resolve_filesystem(images)
        kind = filesystem.get_file_info(path).type
    except Exception as error:  # file systems of all kinds raise errors of all kinds
        reason = str(error).partition("\n")[0]
        raise CatalogError(f"{images} cannot be reached: {reason}") from error
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    root = path if is_local else images.rstrip("/")
    if kind == fs.FileType.Directory:
        files = _list_files(images, filesystem, root, None)
        return _choose_files(images, root, files, limit, image_column, index)
    if kind == fs.FileType.NotFound and len(series := expand_braces(root)) > 1:
        if not root.lower().endswith(".tar"):
            raise CatalogError(f"{images}: braces name a series of shards, *.tar; use a glob here")
        stamps = stamp_images(series)
        named = [(shard, shard, stamp or "") for shard, stamp in zip(series, stamps, strict=True)]
        return _open_shards(images, named, limit, image_column, index)
    if kind == fs.FileType.NotFound and (wildcard := re.search(r"[*?[]", root)):
        cut = root.rindex("/", 0, wildcard.start()) + 1
        files = _list_files(images, filesystem, root[:cut], root[cut:])
        return _choose_files(images, root[:cut], files, limit, image_column, index)
    if kind != fs.FileType.File:
        raise CatalogError(f"{images}: no such file or folder; name a folder, a glob or a manifest")
    extension = re.search(
        r"\.(csv|tsv|jsonl|ndjson|json|parquet)(\.gz|\.bz2|\.zst)?$", root.lower()
    )
    if extension is None:
        name = posixpath.basename(root)
        if is_local:
            file = _describe_local(name, root)
        elif (stamp := _ask_stamp(root)) is None:
            raise CatalogError(f"{images} cannot be reached: the storage says nothing of it")
        else:
            file = name, root, stamp
        folder = posixpath.dirname(root)
        return _choose_files(images, folder, [file], limit, image_column, index)
    opener = {"csv": _open_csv, "tsv": _open_csv, "parquet": _open_parquet}
    try:
        source = opener.get(extension[1], _open_json_lines)(images, filesystem, path, limit)
    except CatalogError:
        raise
    except _UNREADABLE as error:
        _refuse_manifest(images, error)
    rows = source.num_rows if limit is None else min(limit, source.num_rows)
    return dataclasses.replace(source, folder=posixpath.dirname(root), num_rows=rows)


def _open_csv(name: str, filesystem: fs.FileSystem, path: str, limit: int | None) -> _Source:
    """Every column is text: "007" stays, and so does "NA"."""
    is_tab_separated = re.search(r"\.tsv(\.\w+)?$", path.lower()) is not None

    def read(types: dict[str, pa.DataType], only: list[str]) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            filesystem.open_input_stream(path),
            pyarrow.csv.ReadOptions(block_size=16 << 20),
            pyarrow.csv.ParseOptions(
                delimiter="\t" if is_tab_separated else ",", newlines_in_values=True
            ),
            pyarrow.csv.ConvertOptions(column_types=types, include_columns=only),
        )

    try:
        names = read({}, []).schema.names
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            raise CatalogError(f"{name} is empty: there is nothing to caption") from error
        raise
    _refuse_twin_columns(name, names)
    types = dict.fromkeys(names, pa.string())
    num_rows = sum(batch.num_rows for batch in read(types, names[:1]))
    return _Source(name, pa.schema(types), num_rows, lambda: read(types, []))


def _open_json_lines(name: str, filesystem: fs.FileSystem, path: str, limit: int | None) -> _Source:
    """Types come from all rows at once: a column of mixed or nested values is JSON text."""

    def rows() -> Iterator[dict[str, Any]]:
        with io.BufferedReader(filesystem.open_input_stream(path)) as lines:
            numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
            for number, line in itertools.islice(numbered, limit):
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield row

    kinds: dict[str, set[type]] = {}
    num_rows = 0
    for row in rows():
        num_rows += 1
        for key, value in row.items():
            kinds.setdefault(key, set()).add(_kind(value))
    schema = pa.schema([(key, _arrow_type(found - {type(None)})) for key, found in kinds.items()])

    def batches() -> Iterator[pa.RecordBatch]:
        remaining = rows()
        while chunk := list(itertools.islice(remaining, 4096)):
            yield pa.record_batch(
                [
                    pa.array([_json_value(row.get(name), type_) for row in chunk], type_)
                    for name, type_ in zip(schema.names, schema.types, strict=True)
                ],
                schema=schema,
            )

    return _Source(name, schema, num_rows, batches)


def _kind(value: object) -> type:
    """What a JSON value counts as; integers beyond 64 bits and nested values become text."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str
    return str if isinstance(value, list | dict) else type(value)


def _arrow_type(kinds: set[type]) -> pa.DataType:
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _json_value(value: object, type_: pa.DataType) -> object:
    if value is None or isinstance(value, str):
        return value
    if pa.types.is_string(type_):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if pa.types.is_floating(type_) else value  # type: ignore[arg-type]


def _open_parquet(name: str, filesystem: fs.FileSystem, path: str, limit: int | None) -> _Source:
    with filesystem.open_input_file(path) as opened:
        file = pq.ParquetFile(opened)
        schema, metadata = file.schema_arrow.remove_metadata(), file.metadata
    _refuse_twin_columns(name, schema.names)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    bytes_per_row = sum(group.total_byte_size for group in groups) / max(metadata.num_rows, 1)
    batch_size = min(max(int((16 << 20) / max(bytes_per_row, 1.0)), 16), 8192)

    def batches() -> Iterator[pa.RecordBatch]:
        # Page by page: a row group of image bytes may be larger than memory.
        with filesystem.open_input_file(path) as opened:
            file = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
            yield from file.iter_batches(batch_size, use_threads=False)

    return _Source(name, schema, metadata.num_rows, batches, bytes_per_row=bytes_per_row)


def _refuse_twin_columns(name: str, columns: list[str]) -> None:
    twins = [column for column, count in Counter(columns).items() if count > 1]
    if twins:
        raise CatalogError(f"{name} has more than one column {twins[0]!r}; rename one of them")


_File = tuple[str, str, str]  # id, URI, stamp


def _choose_files(
    images: str, folder: str, files: Sequence[_File], limit: int | None, image_column: str | None,
    index: Path,
) -> _Source:  # fmt: skip
    """Files as images, or as shards where there are any: then images may not lie beside them."""
    if packed := [name for name, _, _ in files if re.search(r"\.(tgz|tar\.\w+)$", name.lower())]:
        raise CatalogError(f"{images}: {packed[0]} is compressed, so that no image of it can be "
                           "read alone: unpack it to a .tar")  # fmt: skip
    shards = [file for file in files if file[0].lower().endswith(".tar")]
    if not shards:
        return dataclasses.replace(_listing(images, files[:limit]), listed=folder)
    for name, _, _ in files:
        if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
            raise CatalogError(
                f"{images} holds shards ({shards[0][0]}) and images ({name}): name either with a "
                "glob, such as *.tar"
            )
    return _open_shards(images, shards, limit, image_column, index)


def _open_shards(
    images: str, shards: Sequence[_File], limit: int | None, image_column: str | None, index: Path
) -> _Source:
    """A manifest of the samples, which is written to `index`."""
    try:
        index_shards([uri for _, uri, _ in shards], index, image_extension=image_column,
                     limit=limit)  # fmt: skip
        source = _open_json_lines(images, fs.LocalFileSystem(), str(index), limit)
    except ShardError as error:
        raise CatalogError(f"{images}: {error}") from error
    except _UNREADABLE as error:
        raise CatalogError(f"{images} cannot be read: {explain(error)[0]}") from error
    return dataclasses.replace(
        source, folder=posixpath.dirname(shards[0][1]), image_column="image",
        stamps=[stamp for _, _, stamp in shards],
    )  # fmt: skip


def _list_files(
    images: str, filesystem: fs.FileSystem, folder: str, pattern: str | None
) -> list[_File]:
    """The files below a folder, or those of them that a pattern matches, in sorted path order."""
    depth = None if pattern is None or "**" in pattern else pattern.count("/")
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    try:
        walk = _walk_local(folder, depth) if is_local else _walk(filesystem, folder, depth)
        matches = re.compile(".*" if pattern is None else _glob_to_regex(pattern), re.DOTALL)
        files = sorted(file for file in walk if matches.fullmatch(file[0]))
    except OSError as error:
        raise CatalogError(f"{images} cannot be listed: {error}") from error
    if not files:
        found = "holds no files" if pattern is None else "matches no files"
        raise CatalogError(f"{images} {found} (hidden ones do not count); name another")
    return files


def _walk_local(folder: str, depth: int | None) -> Iterator[_File]:
    """(id, URI, stamp) of every file that is not hidden; links to folders are not followed."""

    def refuse(error: OSError) -> NoReturn:
        raise error  # os.walk would leave the folder's rows out in silence

    for parent, folders, names in os.walk(folder, onerror=refuse):
        relative = os.path.relpath(parent, folder)
        prefix = "" if relative == "." else relative + "/"
        at_depth = depth is not None and prefix.count("/") >= depth
        folders[:] = [] if at_depth else [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield _describe_local(prefix + name, os.path.join(parent, name))


def _describe_local(name: str, path: str) -> _File:
    uri = path
    try:
        path.encode()
    except UnicodeEncodeError:  # a name of other bytes than UTF-8 cannot be a text
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
        uri = "file://" + urllib.parse.quote(os.fsencode(path))
    try:
        status = os.stat(path)
        return name, uri, _time_stamp(status.st_size, status.st_mtime_ns, uri)
    except OSError:  # a broken link: a row, which fails when it is read
        return name, uri, GONE


def _walk(filesystem: fs.FileSystem, folder: str, depth: int | None) -> Iterator[_File]:
    root = resolve_filesystem(folder)[1].rstrip("/")
    if filesystem.type_name == "s3":  # pyarrow's listing has no ETags
        bucket, _, prefix = f"{root}/".partition("/")
        for key, stamp in _list_objects(bucket, prefix, "/" if depth == 0 else ""):
            if "/." not in f"/{key[len(prefix) :]}":
                yield key[len(prefix) :], f"{folder.rstrip('/')}/{key[len(prefix) :]}", stamp
        return
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=depth != 0)):
        name = info.path.strip("/").removeprefix(root.strip("/")).strip("/")
        if info.type != fs.FileType.Directory and "/." not in f"/{name}":
            uri = f"{folder.rstrip('/')}/{name}"
            yield name, uri, _time_stamp(info.size, info.mtime_ns, uri)


def _time_stamp(size: int, mtime_ns: int | None, uri: str) -> str:
    # with the place: files that were copied together may have one time, and some of them one size
    return f"{size} {mtime_ns} {uri}"


def _glob_to_regex(pattern: str) -> str:
    """`*` and `?` stop at a slash, `**/` is any number of folders, `[ab]` and `[!ab]` are sets."""
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\])", pattern)
    return "".join(
        f"[{'^' * (part[1] == '!')}{re.escape(part[1:-1].removeprefix('!'))}]".replace(r"\-", "-")
        if part.startswith("[") and part.endswith("]")
        else rules.get(part) or re.escape(part)
        for part in parts
    )


def _listing(images: str, files: Sequence[_File]) -> _Source:
    names, uris, stamps = map(list, zip(*files, strict=True))
    columns = {"id": names, "image": uris, "_stamp": stamps}
    table = pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})
    return _Source(images, table.schema, len(files), table.to_batches, stamps=stamps)


# --- Columns ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which input column is what, and under which name each is kept."""

    id_name: str
    image_name: str | None
    description_name: str | None
    kept: tuple[tuple[str, str], ...]
    """Input name, name in the unit."""
    has_bytes: bool
    folder: str | None
    schema: pa.Schema
    identify: str

    @classmethod
    def choose(
        cls,
        source: _Source,
        id_column: str | None,
        image_column: str | None,
        description_column: str | None,
        identify: str,
    ) -> _Columns:
        names = source.schema.names
        if source.folder is None:
            if id_column or image_column or description_column:
                raise CatalogError(
                    f"{source.name} is not a manifest and has no columns; leave out --id-column,"
                    " --image-column and --description-column"
                )
            schema = pa.schema([*_TEXTS, ("_image_uri", pa.string())])
            return cls("id", "image", None, (), False, None, schema, identify)

        def pick(flag: str, wanted: str | None, default: str) -> str | None:
            if wanted is not None and wanted not in names:
                raise CatalogError(
                    f"{source.name} has no column {wanted!r} for {flag};"
                    f" its columns are {', '.join(map(repr, names))}"
                )
            return wanted or (default if default in names else None)

        image = source.image_column or pick("--image-column", image_column, "image")
        description = pick("--description-column", description_column, "description")
        if image is None and description is None:
            raise CatalogError(
                f"{source.name} has no column 'image' and none 'description'; its columns are"
                f" {', '.join(map(repr, names))}: name one with --image-column or"
                " --description-column"
            )
        has_bytes = image is not None and _holds_bytes(source, image)
        key = pick("--id-column", id_column, "id") or (None if has_bytes else image)
        if key is None:
            raise CatalogError(
                f"{source.name} has no column 'id'; its columns are"
                f" {', '.join(map(repr, names))}: name the one that identifies a row with"
                " --id-column"
            )
        for flag, name in (("--id-column", key), ("--description-column", description)):
            if name is not None and pa.types.is_nested(source.schema.field(name).type):
                raise CatalogError(
                    f"{source.name}: {flag} {name!r} has the type"
                    f" {source.schema.field(name).type}; it must be text or a number"
                )
        taken = set(names)
        kept = []
        for name in names:
            is_itself = (name == "id" == key) or (name == "description" == description)
            if not is_itself and not (has_bytes and name == image):
                kept.append((name, _kept_name(name, taken)))
        is_locking = {"caption", "caption_locked"} <= taken
        fields = [
            (output, pa.bool_())
            if is_locking and name == "caption_locked"
            else (output, _plain_type(source.schema.field(name).type))
            for name, output in kept
        ]
        image_field = ("_image_bytes", pa.binary()) if has_bytes else ("_image_uri", pa.string())
        schema = pa.schema([*fields, *_TEXTS, image_field])
        kept_ = tuple(kept)
        return cls(key, image, description, kept_, has_bytes, source.folder, schema, identify)

    def names_of(self, source: _Source, wanted: Sequence[str], flag: str) -> tuple[str, ...]:
        """The names in the unit of some columns of a manifest."""
        names = dict(self.kept) | {self.id_name: "id"}
        if self.description_name is not None:
            names[self.description_name] = "description"
        unknown = [name for name in wanted if source.folder is None or name not in names]
        if unknown:
            raise CatalogError(
                f"{source.name} has no column {unknown[0]!r} for {flag}; its columns"
                f" are {', '.join(map(repr, source.schema.names))}"
            )
        return tuple(names[name] for name in wanted)

    def images(self, source: _Source) -> ImageSource:
        """Where the images are, for those who have the output only."""
        if source.folder is None:
            return ImageSource("id", source.listed)
        if self.has_bytes:
            # as freeze_catalog got it, but absolute
            manifest = source.name if "://" in source.name else os.path.abspath(source.name)
            return ImageSource(None, None, manifest, self.id_name, self.image_name)
        names = {"id": "id"} | dict(self.kept)
        return ImageSource(self.image_name and names.get(self.image_name), source.folder)

    def convert(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = [
            _plain(batch.column(name), self.schema.field(output).type) for name, output in self.kept
        ]
        columns.append(_text(batch.column(self.id_name)))
        if self.description_name is None:
            columns.append(pa.nulls(batch.num_rows, pa.string()))
        else:
            columns.append(_text(batch.column(self.description_name)))
        columns += self._images(batch)
        return pa.record_batch(columns, schema=self.schema)

    def _images(self, batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
        """Stamps, and URIs or bytes."""
        if self.image_name is None:
            return pa.array([""] * batch.num_rows), pa.nulls(batch.num_rows, pa.string())
        image = batch.column(self.image_name)
        if self.has_bytes:
            data = _image_bytes(image)
            hashes = ["" if d is None else hashlib.sha256(d).hexdigest() for d in data.to_pylist()]
            return pa.array(hashes, pa.string()), data
        uris = [_absolute(reference, self.folder) for reference in _text(image).to_pylist()]
        if self.identify == "content":
            stamps = hash_images(uris)
        elif self.identify == "stamp":
            is_listed = self.folder is None
            stamps = batch.column("_stamp").to_pylist() if is_listed else stamp_images(uris)
        else:
            stamps = [None if uri else "" for uri in uris]
        return pa.array(stamps, pa.string()), pa.array(uris, pa.string())


_TEXTS: Final = (
    ("id", pa.string()), ("description", pa.string()), ("_image_stamp", pa.string()),
)  # fmt: skip


def _kept_name(name: str, taken: set[str]) -> str:
    is_ours = name in OUTPUT_COLUMNS or name.startswith("_image_")
    if not is_ours or (name == "caption" and "caption_locked" in taken):
        return name
    while name in taken:
        name = f"input_{name}"
    taken.add(name)
    return name


def _holds_bytes(source: _Source, name: str) -> bool:
    """Whether the image column holds image bytes; False: paths or URIs."""
    kind = _plain_type(source.schema.field(name).type)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as on the hub
        kind = kind.field("bytes").type
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return False
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    raise CatalogError(
        f"{source.name}: --image-column {name!r} has the type {kind}; it must be text (paths or"
        " URIs) or image bytes"
    )


def _image_bytes(column: pa.Array) -> pa.Array:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.cast(pa.binary())


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Without dictionaries, which differ from batch to batch, and columns of nothing but nulls."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return pa.string() if pa.types.is_null(kind) else kind


def _plain(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_boolean(kind) and not pa.types.is_boolean(column.type):
        return _flag(column)
    return column.cast(kind)


def _flag(column: pa.Array) -> pa.Array:
    """Text or number → true or false; nothing at all is false."""
    text = pc.utf8_lower(_text(column).fill_null("false"))
    unknown = set(text.to_pylist()) - {*_TRUE, *_FALSE}
    if unknown:
        raise CatalogError(
            f"the column 'caption_locked' holds {unknown.pop()!r}; write true or false"
        )
    return pc.is_in(text, pa.array(_TRUE))


_TRUE: Final = ("true", "yes", "1")
_FALSE: Final = ("false", "no", "0")


def _text(column: pa.Array) -> pa.Array:
    """As text, null where there is nothing but white space."""
    text = column.cast(pa.string())
    is_blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    return pc.if_else(is_blank, pa.scalar(None, pa.string()), text)


# --- Files --------------------------------------------------------------------------------------


def _absolute(reference: str | None, folder: str | None) -> str | None:
    if reference is None or folder is None or "://" in reference or reference.startswith("/"):
        return reference
    scheme, separator, path = folder.rpartition("://")
    path = posixpath.join(path, reference)
    # Object storage knows no ".."; on disk it may lead through a link, so it is left alone.
    return scheme + separator + posixpath.normpath(path) if separator else path


class Fetched(NamedTuple):
    """An image file, or why there is none. stamp: what identifies its content; None: unknown."""

    data: bytes | None
    stamp: str | None
    error_class: str | None = None
    error_message: str | None = None


GONE: Final = "gone"


def read_image(uri: str | None) -> bytes | tuple[str, str]:
    """The bytes of a file, or the error class and message; see `fetch_image`."""
    found = fetch_image(uri)
    if found.data is not None:
        return found.data
    return found.error_class or "", found.error_message or ""


def fetch_image(uri: str | None) -> Fetched:
    """A file with its stamp, or an error class ("gone", "unreadable", "too large") and a message.

    Never raises for what a URI leads to. What may pass is tried again, after a pause. Safe to
    call from many threads.
    """
    if uri is None:
        return Fetched(None, "", GONE, "the row names no image")
    if uri.endswith(NO_IMAGE):
        return Fetched(None, GONE, GONE, "the sample has no file with an image's extension")
    shown = uri if len(uri) <= 200 else f"…{uri[-200:]}"
    try:
        return patiently(uri, lambda: _fetch(uri, shown))
    except (FileNotFoundError, NotADirectoryError):
        return Fetched(None, GONE, GONE, f"no such file: {shown}")
    except Exception as error:  # file systems of all kinds raise errors of all kinds
        return Fetched(None, None, "unreadable", f"{explain(error)[0]}: {shown}")


def _fetch(uri: str, shown: str) -> Fetched:
    """The stamp is from before the content: one that changes meanwhile will differ next time."""
    uri, span = split_span(uri)
    filesystem, path = resolve_filesystem(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return Fetched(None, None, "unreadable", f"not a regular file: {shown}")
        stamp = _time_stamp(status.st_size, status.st_mtime_ns, uri)
        with open(path, "rb") as file:
            return _read_span(file, status.st_size, stamp, span, shown)
    with filesystem.open_input_file(path) as file:
        if filesystem.type_name == "s3":
            stamp = _etag_stamp(file.size(), file.metadata()["ETag"].decode())
        else:
            info = filesystem.get_file_info(path)
            stamp = _time_stamp(info.size, info.mtime_ns, uri)
        return _read_span(file, file.size(), stamp, span, shown)


def _read_span(file: Any, size: int, stamp: str, span: Span | None, shown: str) -> Fetched:
    if span is None:
        return _too_large(size, stamp) or Fetched(file.read(), stamp)
    stamp = _span_stamp(stamp, span)
    if too_large := _too_large(span.stop - span.start, stamp):
        return too_large
    file.seek(span.start)
    data = unwrap(file.read(span.stop - span.start), span)
    if data is None:
        return Fetched(None, stamp, "unreadable", f"the shard has changed since: {shown}")
    return Fetched(data, stamp)


def _too_large(size: int, stamp: str) -> Fetched | None:
    if size <= MAX_FILE_BYTES:
        return None
    return Fetched(
        None, stamp, "too large", f"{size:,} bytes, over the limit of {MAX_FILE_BYTES:,}"
    )


# --- Stamps: has an image changed? --------------------------------------------------------------

LIST_FROM: Final = 100  # objects of one folder: listing it is cheaper than asking for each
STAMP_THREADS: Final = 32


def stamp_images(uris: Sequence[str | None]) -> list[str | None]:
    """What identifies the content of each file without opening it: size and ETag, or size, time
    and place.

    "" for no image, "gone" for one that is not there, None where the storage does not say. An image
    in a shard is known by the shard's and its place in it.
    """
    places = [split_span(uri) if uri else ("", None) for uri in uris]
    files = dict.fromkeys(file for file, _ in places if not file.endswith(NO_IMAGE))
    known = dict(zip(files, _stamp_files(list(files)), strict=True))
    return [GONE if file not in known else _span_stamp(known[file], span) for file, span in places]


def _span_stamp(stamp: str | None, span: Span | None) -> Any:
    return stamp if span is None or stamp in (None, GONE) else f"{stamp} {span}"


def _stamp_files(uris: Sequence[str]) -> list[str | None]:
    known: dict[str, str | None] = {}
    objects: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        if uri and uri.startswith(("s3://", "s3a://")):
            objects[uri.rpartition("/")[0] + "/"].append(uri)
    for folder, inside in objects.items():
        if len(inside) >= LIST_FROM:
            known |= _list_stamps(folder, inside)
    with ThreadPoolExecutor(STAMP_THREADS) as threads:
        asked = [uri for uri in dict.fromkeys(uris) if uri and "://" in uri and uri not in known]
        known |= zip(asked, threads.map(_ask_stamp, asked), strict=True)
    return ["" if not uri else known[uri] if "://" in uri else _ask_stamp(uri) for uri in uris]


def list_stamps(folder: str) -> dict[str, str]:
    """The same of each file of a folder, by name; empty where there is no such folder."""
    filesystem, path = resolve_filesystem(folder)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    try:
        walk = _walk_local(path, 0) if is_local else _walk(filesystem, folder, 0)
        return {name: stamp for name, _, stamp in walk}
    except FileNotFoundError:
        return {}


def hash_images(uris: Sequence[str | None]) -> list[str | None]:
    """The same by content: reads every file."""

    def digest(uri: str | None) -> str | None:
        found = fetch_image(uri)
        return found.stamp if found.data is None else hashlib.sha256(found.data).hexdigest()

    with ThreadPoolExecutor(STAMP_THREADS) as threads:
        return list(threads.map(digest, uris))


def _ask_stamp(uri: str) -> str | None:
    try:
        if "://" not in uri:
            status = os.stat(uri)
            return _time_stamp(status.st_size, status.st_mtime_ns, uri)
        return patiently(uri, lambda: _ask_store(uri))
    except (FileNotFoundError, NotADirectoryError):
        return GONE
    except Exception:  # not to be known is no error: the image is looked at
        return None


def _ask_store(uri: str) -> str | None:
    filesystem, path = resolve_filesystem(uri)
    if filesystem.type_name == "s3":
        bucket, _, key = path.partition("/")
        client = s3_client(endpoint())
        try:
            answer = client.head_object(Bucket=bucket, Key=key)
        except client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return GONE
            raise
        return _etag_stamp(answer["ContentLength"], answer["ETag"])
    info = filesystem.get_file_info(path)
    is_gone = info.type == fs.FileType.NotFound
    return GONE if is_gone else _time_stamp(info.size, info.mtime_ns, uri)


def _list_stamps(folder: str, uris: list[str]) -> dict[str, str | None]:
    """Stamps of objects of one folder, from its listing between the first and the last of them.

    Those of a sorted manifest lie close together. Where they do not, the listing is given up, and
    some are not in the answer.
    """
    scheme, _, path = folder.partition("://")
    bucket, _, prefix = path.partition("/")
    wanted = sorted({uri.split("/", 3)[3].encode() for uri in uris})  # the order of a listing
    found: dict[str, str | None] = {}
    scanned = 0
    try:
        before = wanted[0][:-1].decode("utf-8", "ignore")
        for name, stamp in _list_objects(bucket, prefix, "/", before):
            found[f"{scheme}://{bucket}/{name}"] = stamp
            scanned += 1
            if name.encode() >= wanted[-1] or scanned > 4 * len(wanted):
                break
    except OSError:  # no right to list
        return {}
    if scanned > 4 * len(wanted):
        return {uri: found[uri] for uri in uris if uri in found}
    return {uri: found.get(uri, GONE) for uri in uris}


def _list_objects(
    bucket: str, prefix: str, delimiter: str, after: str = ""
) -> Iterator[tuple[str, str]]:
    """Key and stamp of each object."""
    from botocore.exceptions import BotoCoreError, ClientError

    pages = s3_client(endpoint()).get_paginator("list_objects_v2")
    try:
        for page in pages.paginate(
            Bucket=bucket, Prefix=prefix, Delimiter=delimiter, StartAfter=after
        ):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # the mark of a folder
                    yield entry["Key"], _etag_stamp(entry["Size"], entry["ETag"])
    except (ClientError, BotoCoreError) as error:
        raise OSError(f"s3://{bucket}/{prefix}: {error}") from error


def _etag_stamp(size: int, etag: str) -> str:
    return f"{size} {etag.strip(chr(34))}"
