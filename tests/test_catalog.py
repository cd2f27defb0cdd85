"""Every kind of input, frozen to units, and every mistake in one, named."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer
from PIL import Image
from pyarrow import fs

from stylegan import storage
from stylegan.catalog import (
    OUTPUT_COLUMNS,
    CatalogError,
    FrozenCatalog,
    choose_rows_per_unit,
    freeze_catalog,
    read_image,
    resolve_filesystem,
)
from stylegan.images import IsolatedDecoder


def freeze(images: str | Path, tmp_path: Path, **options: Any) -> FrozenCatalog:
    number = len(list(tmp_path.glob("plan-*")))
    return freeze_catalog(str(images), tmp_path / f"plan-{number}", **options)


def rows(catalog: FrozenCatalog) -> list[dict[str, Any]]:
    tables = [pq.read_table(unit) for unit in catalog.units]
    assert all(table.schema.equals(catalog.schema) for table in tables)
    sizes = [table.num_rows for table in tables]
    assert sum(sizes) == catalog.num_rows
    assert all(size == catalog.rows_per_unit for size in sizes[:-1])
    assert [unit.name for unit in catalog.units] == [
        f"unit-{number:05d}.parquet" for number in range(len(sizes))
    ]
    return [row for table in tables for row in table.to_pylist()]


def image_bytes(format: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, format)
    return buffer.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- Folders, globs, single files ---------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write(folder / "b.jpg", "b")
    write(folder / "a" / "z.txt", "z")
    write(folder / "a.png", "a")
    write(folder / "a" / "new\nline & 100%#?.jpg", "odd name")
    write(folder / ".hidden.jpg", "h")
    write(folder / ".thumbnails" / "x.jpg", "h")
    write(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")), "latin")
    write(tmp_path / "elsewhere" / "real.jpg", "linked")
    (folder / "link.jpg").symlink_to(tmp_path / "elsewhere" / "real.jpg")
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "folder-link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.jpg")

    catalog = freeze(folder, tmp_path)
    found = {row["id"]: read_image(row["_image_uri"]) for row in rows(catalog)}
    assert list(found) == sorted(found)
    assert catalog.schema.names == ["id", "description", "_image_stamp", "_image_uri"]
    assert found == {
        "a.png": b"a",
        "a/new\nline & 100%#?.jpg": b"odd name",
        "a/z.txt": b"z",
        "b.jpg": b"b",
        "broken.jpg": ("gone", f"no such file: {folder}/broken.jpg"),
        r"caf\xe9.jpg": b"latin",
        "link.jpg": b"linked",
        "loop.jpg": ("unreadable", f"too many levels of symbolic links: {folder}/loop.jpg"),
        "pipe.jpg": ("unreadable", f"not a regular file: {folder}/pipe.jpg"),
    }
    assert read_image(str(folder)) == ("unreadable", f"not a regular file: {folder}")
    assert read_image(f"{folder}/b.jpg/c.jpg") == ("gone", f"no such file: {folder}/b.jpg/c.jpg")
    assert read_image(f"file://{folder}/b.jpg") == b"b"
    assert read_image("x" * 5000) == ("unreadable", f"file name too long: …{'x' * 200}")
    assert read_image("a\0b") == ("unreadable", "no file system serves this address: a\0b")
    assert read_image("gopher://a/b")[0] == "unreadable"
    assert read_image(None) == ("gone", "the row names no image")


def test_glob_and_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1.jpg", "2.jpg", "2.png", "a/3.jpg", "a/b/4.jpg", ".x/5.jpg", "[1].jpg"):
        write(tmp_path / "shop" / name, name)
    monkeypatch.chdir(tmp_path / "shop")

    def ids(images: str) -> list[str]:
        return [row["id"] for row in rows(freeze(images, tmp_path))]

    assert ids("*.jpg") == ["1.jpg", "2.jpg", "[1].jpg"]
    assert ids(f"{tmp_path}/shop/*/*.jpg") == ["a/3.jpg"]
    assert ids("**/*.jpg") == ["1.jpg", "2.jpg", "[1].jpg", "a/3.jpg", "a/b/4.jpg"]
    assert ids("a/**") == ["3.jpg", "b/4.jpg"]
    assert ids("[!1].?n*") == ["2.png"]
    assert ids("[0-1].jpg") == ["1.jpg"]
    assert ids("[1].jpg") == ["[1].jpg"]  # a file of this very name comes before the pattern
    assert ids("a/3.jpg") == ["3.jpg"]


def test_limit_takes_the_first_in_order(tmp_path: Path) -> None:
    for number in range(70):
        write(tmp_path / "shop" / f"{number:02}.jpg", "")
    full = freeze(tmp_path / "shop", tmp_path)
    first = freeze(tmp_path / "shop", tmp_path, limit=40)
    assert [row["id"] for row in rows(first)] == [f"{number:02}.jpg" for number in range(40)]
    assert (full.num_rows, len(full.units), len(first.units)) == (70, 3, 2)
    assert full.digest != first.digest
    assert first.digest == freeze(tmp_path / "shop", tmp_path, limit=40, rows_per_unit=7).digest
    os.utime(tmp_path / "shop" / "05.jpg", (1, 1))
    assert first.digest != freeze(tmp_path / "shop", tmp_path, limit=40).digest


@pytest.mark.parametrize(
    ("num_rows", "bytes_per_row", "expected"),
    [
        (1, 0, 32),
        (4095, 0, 32),
        (4096, 0, 64),
        (20_000, 0, 256),
        (10**8, 0, 256),
        (10**8, 300_000, 128),
        (10**8, 10**8, 32),
    ],
)
def test_rows_per_unit(num_rows: int, bytes_per_row: float, expected: int) -> None:
    assert choose_rows_per_unit(num_rows, bytes_per_row) == expected


# --- Manifests ----------------------------------------------------------------------------------


def test_csv_is_text_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    write(tmp_path / "shop" / "img" / "1.jpg", "one")
    text = (
        "\ufeffid,image,description,price,size\n"
        '007,img/1.jpg,"Red shoe, ""new""\nline two",1.50,NA\n'
        f"1e5,{tmp_path}/shop/img/1.jpg,  ,,\n"
        "2020-01-01,s3://bucket/a b%20#.jpg,null,true,42\n"
        "x,,Only words,,\n"
    )
    expected = [
        ("007", f"{tmp_path}/shop/img/1.jpg", 'Red shoe, "new"\nline two', "1.50", "NA"),
        ("1e5", f"{tmp_path}/shop/img/1.jpg", None, "", ""),
        ("2020-01-01", "s3://bucket/a b%20#.jpg", "null", "true", "42"),
        ("x", None, "Only words", "", ""),
    ]
    write(tmp_path / "shop" / "catalog.csv", text)
    write(tmp_path / "shop" / "catalog.CSV.gz", gzip.compress(text.encode()))
    digests = set()
    for name in ("catalog.csv", "catalog.CSV.gz"):
        catalog = freeze(tmp_path / "shop" / name, tmp_path)
        digests.add(catalog.digest)
        names = ("id", "_image_uri", "description", "price", "size")
        assert [tuple(row[name] for name in names) for row in rows(catalog)] == expected
        assert catalog.schema.names[:3] == ["image", "price", "size"]
    assert len(digests) == 1
    tabs = write(tmp_path / "shop" / "catalog.tsv", "id\timage\n1\ta,b.jpg\n")
    assert rows(freeze(tabs, tmp_path))[0]["_image_uri"] == f"{tmp_path}/shop/a,b.jpg"


def test_json_lines_keep_their_types(tmp_path: Path) -> None:
    lines = [
        {"id": 7, "image": "a.jpg", "stock": 1, "price": 1, "tags": ["a", "é"], "new": True},
        {"id": "007", "image": None, "description": "2020-01-01", "price": 2.5, "big": 2**70},
        {"id": True, "image": "b.jpg", "stock": None, "extra": None},
    ]
    text = "\n\n".join(json.dumps(line) for line in lines)
    catalog = freeze(write(tmp_path / "catalog.jsonl", text), tmp_path)
    found = rows(catalog)
    assert [row["id"] for row in found] == ["7", "007", "true"]
    assert [row["description"] for row in found] == [None, "2020-01-01", None]
    assert [row["stock"] for row in found] == [1, None, None]
    assert [row["price"] for row in found] == [1.0, 2.5, None]
    assert found[0]["tags"] == '["a", "é"]'
    assert found[0]["new"] is True
    assert found[1]["big"] == str(2**70)
    assert found[1]["_image_uri"] is None
    assert [row["extra"] for row in found] == [None] * 3


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    data = image_bytes()
    table = pa.table(
        {
            "sku": pa.array([1, 2, 3], pa.int64()),
            "photo": pa.array([data, None, b""]),
            "title": pa.array(["Shoe", "Hat", None]).dictionary_encode(),
            "nothing": pa.nulls(3),
            "sizes": [[1], [], None],
        }
    )
    pq.write_table(table, tmp_path / "catalog.parquet")
    hub = table.set_column(
        1, "photo", pa.array([{"bytes": data, "path": "1.png"}, None, {"bytes": b"", "path": None}])
    )
    pq.write_table(hub, tmp_path / "hub.parquet")
    options = {"id_column": "sku", "image_column": "photo", "description_column": "title"}
    catalog = freeze(tmp_path / "catalog.parquet", tmp_path, **options)
    assert catalog.digest == freeze(tmp_path / "hub.parquet", tmp_path, **options).digest
    assert catalog.schema.names == [
        "sku", "title", "nothing", "sizes", "id", "description", "_image_stamp", "_image_bytes",
    ]  # fmt: skip
    assert catalog.schema.field("nothing").type == pa.string()
    assert [row["_image_bytes"] for row in rows(catalog)] == [data, None, b""]
    assert [(row["id"], row["description"]) for row in rows(catalog)] == [
        ("1", "Shoe"), ("2", "Hat"), ("3", None),
    ]  # fmt: skip
    other = table.set_column(1, "photo", pa.array([data[:-1] + b"?", None, b""]))
    pq.write_table(other, tmp_path / "catalog.parquet")
    assert catalog.digest != freeze(tmp_path / "catalog.parquet", tmp_path, **options).digest


def test_columns_with_names_of_the_output(tmp_path: Path) -> None:
    header = "id,sku,image,status,input_status,caption,description,title,_image_uri"
    manifest = write(tmp_path / "a.csv", f"{header}\n1,A,x.jpg,new,old,C,D,T,u\n")
    catalog = freeze(manifest, tmp_path, id_column="sku", description_column="title")
    assert rows(catalog) == [
        {
            "input_id": "1",
            "sku": "A",
            "image": "x.jpg",
            "input_input_status": "new",
            "input_status": "old",
            "input_caption": "C",
            "input_description": "D",
            "title": "T",
            "input__image_uri": "u",
            "id": "A",
            "description": "T",
            "_image_stamp": None,
            "_image_uri": f"{tmp_path}/x.jpg",
        }
    ]
    assert not {*catalog.schema.names} & {*OUTPUT_COLUMNS} - {"id", "description"}
    manifest = write(
        tmp_path / "b.csv", "id,image,caption,caption_locked\n1,x,C,Yes\n2,y,,\n3,z,C,0\n"
    )
    locked = rows(freeze(manifest, tmp_path))
    assert [(row["caption"], row["caption_locked"]) for row in locked] == [
        ("C", True), ("", False), ("C", False),
    ]  # fmt: skip


def test_without_an_id_column_the_path_is_the_id(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a.csv", "photo,title\n../x.jpg,A\nimg/y.jpg,B\n")
    found = rows(freeze(manifest, tmp_path, image_column="photo"))
    assert [row["id"] for row in found] == ["../x.jpg", "img/y.jpg"]
    assert found[0]["_image_uri"] == f"{tmp_path}/../x.jpg"
    assert found[0]["photo"] == "../x.jpg"


def test_digest_covers_every_column_and_nothing_of_the_cut(tmp_path: Path) -> None:
    base = "id,image,description,price\n1,a,x,1\n2,b,y,2\n3,c,z,3\n"
    digests = [
        freeze(write(tmp_path / "0.csv", base), tmp_path, rows_per_unit=n).digest for n in (1, 2, 9)
    ]
    for old, new in (("1,a", "9,a"), ("2,b", "2,B"), ("z", "Z"), ("y,2", "y,5"), ("price", "cost")):
        changed = write(tmp_path / "0.csv", base.replace(old, new))
        digests.append(freeze(changed, tmp_path).digest)
    assert len(digests) == 8
    assert len(set(digests)) == 6


def test_large_manifests_stream(tmp_path: Path) -> None:
    table = pa.table({"id": [str(n) for n in range(5000)], "image": [os.urandom(20_000)] * 5000})
    pq.write_table(table, tmp_path / "catalog.parquet", use_dictionary=False, compression="none")
    del table
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        catalog = freeze(tmp_path / "catalog.parquet", tmp_path)
    finally:
        pa.set_memory_pool(before)
    assert (catalog.num_rows, catalog.rows_per_unit) == (5000, 64)
    assert pool.max_memory() < 64 << 20  # of 100 MB in one row group


# --- Mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "", {}, "is empty"),
        ("a.csv", "id,image\n", {}, "has no rows"),
        ("a.jsonl", "", {}, "has no rows"),
        ("a.csv", "sku,photo\n1,a\n", {}, "'sku', 'photo': name one with --image-column"),
        ("a.csv", "sku,description\n1,a\n", {}, "name the one that identifies a row with --id-"),
        (
            "a.csv",
            "id,image\n1,a\n",
            {"description_column": "title"},
            "no column 'title' for --description-column; its columns are 'id', 'image'",
        ),
        ("a.csv", "id,image\n1,a\n", {"id_column": "sku"}, "no column 'sku' for --id-column"),
        (
            "a.csv",
            "id,image\n1,a\n2,b\n1,c\n",
            {},
            "1 values of 'id' occur in more than one row: '1' (2",
        ),
        ("a.csv", "id,image\n1,a\n ,b\n", {}, "row 2 has no 'id'"),
        ("a.csv", "image,description\na,b\n,c\n", {}, "row 2 has no 'image'"),
        ("a.csv", "id,id\n1,a\n", {}, "more than one column 'id'"),
        ("a.csv", "id,image\n1,a,b\n", {}, "a.csv cannot be read: CSV parse error"),
        ("a.csv", b"id,image\n1,caf\xe9\n", {}, "cannot be read"),
        ("a.jsonl", '{"id": 1, "image": "a"}\n{"id": 2,\n', {}, "cannot be read: line 2"),
        ("a.jsonl", "[1]\n", {}, "line 1 is not a JSON object"),
        ("a.jsonl", '{"id": "\\ud800", "image": "a"}\n', {}, "cannot be read"),
        ("a.parquet", "PAR1 no more", {}, "a.parquet cannot be read"),
        ("a.csv.gz", "not gzip", {}, "cannot be read"),
        ("a.csv", "id,image\n1,a\n", {"limit": 0}, "--limit is 0"),
        ("a.csv", "id,image,caption,caption_locked\n1,a,b,maybe\n", {}, "'maybe'"),
        ("a.jpg", "x", {"id_column": "id"}, "leave out --id-column"),
    ],
)
def test_mistakes(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any], message: str
) -> None:
    manifest = write(tmp_path / name, content)
    with pytest.raises(CatalogError) as caught:
        freeze(manifest, tmp_path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("plan-*/*"))


def test_mistaken_places_and_types(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    write(tmp_path / "empty" / ".hidden", "")
    for images, message in (
        (tmp_path / "empty", "holds no files"),
        (tmp_path / "*.jpg", "matches no files"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "nowhere.csv", "no such file or folder"),
        ("gopher://x/y", "cannot be reached"),
    ):
        with pytest.raises(CatalogError, match=message):
            freeze(images, tmp_path)
    for column, message in ((pa.array([1.5]), "has the type double"), ([[1]], "list<")):
        pq.write_table(pa.table({"id": ["1"], "image": column}), tmp_path / "a.parquet")
        with pytest.raises(CatalogError, match=message):
            freeze(tmp_path / "a.parquet", tmp_path)
    pq.write_table(pa.table({"id": [["1"]], "image": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CatalogError, match="--id-column 'id' has the type list"):
        freeze(tmp_path / "a.parquet", tmp_path)
    manifest = write(tmp_path / "a.csv", "id,image\n1,a\n")
    plan = freeze(manifest, tmp_path).units[0].parent
    with pytest.raises(FileExistsError):
        freeze_catalog(str(manifest), plan)


# --- Object storage and other file systems ------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.FileSystem]:
    """The bucket `shop` on an S3 endpoint in this process."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystem = fs.FileSystem.from_uri("s3://shop?allow_bucket_creation=true")[0]
    filesystem.create_dir("shop")
    yield filesystem
    server.stop()


def test_s3(bucket: fs.FileSystem, tmp_path: Path) -> None:
    objects = {
        "img/b.jpg": b"b",
        "img/sub/a c%20#?.jpg": b"a",
        "img/.hidden": b"",
        "lists/catalog.csv": b"id,image\n1,../img/b.jpg\n2,s3://shop/img/gone.jpg\n3,here.jpg\n",
        "lists/here.jpg": b"here",
    }
    for key, content in objects.items():
        with bucket.open_output_stream(f"shop/{key}") as stream:
            stream.write(content)

    def read(images: str) -> dict[str, bytes | tuple[str, str]]:
        return {row["id"]: read_image(row["_image_uri"]) for row in rows(freeze(images, tmp_path))}

    assert read("s3://shop/img/") == {"b.jpg": b"b", "sub/a c%20#?.jpg": b"a"}
    assert read("s3://shop/*/*.jpg") == {"img/b.jpg": b"b", "lists/here.jpg": b"here"}
    assert read("s3://shop/img/b.jpg") == {"b.jpg": b"b"}
    assert read("s3://shop/lists/catalog.csv") == {
        "1": b"b",
        "2": ("gone", "no such file: s3://shop/img/gone.jpg"),
        "3": b"here",
    }
    first = freeze("s3://shop/img", tmp_path)
    with bucket.open_output_stream("shop/img/b.jpg") as stream:
        stream.write(b"longer")
    assert first.digest != freeze("s3://shop/img", tmp_path).digest
    for images, message in (
        ("s3://shop/nothing", "no such file or folder"),
        ("s3://shop/nothing/*.jpg", "matches no files"),
        ("s3://shop/img/*.png", "matches no files"),
        ("s3://missing/a.csv", "no such file or folder"),
    ):
        with pytest.raises(CatalogError, match=message):
            freeze(images, tmp_path)


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Fails twice before each success, and always for names with "never"."""

    protocol = "flaky"
    attempts: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.attempts[path] += 1
        if mode == "rb" and (self.attempts[path] % 3 or "never" in path):
            raise TimeoutError("<connection object at 0x7f0011223344>")
        return super()._open(path, mode, **options)


def test_other_file_systems_and_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 2.0)
    memory = fsspec.filesystem("memory")
    memory.pipe("/shop/a.jpg", b"a")
    memory.pipe("/shop/sub/b.jpg", b"b")
    memory.pipe("/shop/never.jpg", b"never")
    memory.pipe("/shop/c.jsonl", b'{"id": "1", "image": "sub/b.jpg"}')
    found = {row["id"]: row["_image_uri"] for row in rows(freeze("memory://shop", tmp_path))}
    assert {key: read_image(uri) for key, uri in found.items() if key != "c.jsonl"} == {
        "a.jpg": b"a",
        "never.jpg": b"never",
        "sub/b.jpg": b"b",
    }
    (row,) = rows(freeze("memory://shop/c.jsonl", tmp_path))
    assert row["_image_uri"] == "memory://shop/sub/b.jpg"
    assert read_image("memory://shop/no.jpg") == ("gone", "no such file: memory://shop/no.jpg")
    assert resolve_filesystem("memory://shop/a.jpg")[1] == "/shop/a.jpg"

    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    assert read_image("flaky://shop/a.jpg") == b"a"
    assert FlakyFileSystem.attempts["/shop/a.jpg"] == 3
    assert read_image("flaky://shop/never.jpg") == (
        "unreadable",
        "cannot be read: flaky://shop/never.jpg",
    )


# --- Together -----------------------------------------------------------------------------------


def test_hundreds_of_broken_and_exotic_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    folder = tmp_path / "shop"
    formats = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "AVIF"]
    for number in range(300):
        data = bytearray(image_bytes(formats[number % len(formats)], (60, 40)))
        match number % 5:
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                data[rng.randrange(len(data))] ^= 0xFF
            case 2:
                at = rng.randrange(len(data))
                data[at : at + 40] = rng.randbytes(40)
        write(folder / f"{number:03}.{rng.choice(['jpg', 'png', 'pdf', ''])}", bytes(data))
    for number, content in enumerate(
        [b"", b"text", b"<html>404</html>", b"%PDF-1.4", b"%!PS-Adobe", b"PK\3\4", b"<svg >"] * 10
    ):
        write(folder / f"other-{number}.jpg", content)
    for number in range(10):
        (folder / f"broken-{number}.jpg").symlink_to("nowhere")
    catalog = freeze(folder, tmp_path)
    classes: Counter[str | None] = Counter()
    with IsolatedDecoder() as decoder:
        for unit in catalog.units:
            fetched = [read_image(uri) for uri in pq.read_table(unit)["_image_uri"].to_pylist()]
            images = decoder.decode([b if isinstance(b, bytes) else None for b in fetched], 32)
            for answer, image in zip(fetched, images, strict=True):
                failure = answer[0] if isinstance(answer, tuple) else image.error_class
                classes[failure] += 1
    assert catalog.num_rows == sum(classes.values()) == 380
    assert classes["gone"] == 10
    assert classes["unsupported"] >= 30
    assert classes[None] >= 120
    assert {"not an image", "truncated", "unreadable"} <= set(classes)
    assert "crashed" not in classes
