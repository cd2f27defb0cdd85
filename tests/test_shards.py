"""WebDataset shards as input: whole or refused, read by range, known by what they are."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stylegan.catalog import (
    CatalogError,
    FrozenCatalog,
    fetch_image,
    freeze_catalog,
    read_image,
    resolve_filesystem,
    stamp_images,
)
from stylegan.shards import expand_braces


def pack(files: Iterable[tuple[str, bytes | str]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def samples(first: int, last: int) -> list[tuple[str, bytes | str]]:
    """Three files a sample; images of all sizes around a block of 512 bytes."""
    found: list[tuple[str, bytes | str]] = []
    for number in range(first, last):
        key = f"{number:03}"
        found += [
            (f"{key}.jpg", f"photo {key}".encode() * (number * 20)),
            (f"{key}.json", json.dumps({"sku": f"S{key}", "price": number, "id": number * 7})),
            (f"{key}.txt", f"Shirt no. {number}"),
        ]
    return found


def freeze(images: str | Path, tmp_path: Path, **options: Any) -> FrozenCatalog:
    number = len(list(tmp_path.glob("plan-*")))
    catalog = freeze_catalog(str(images), tmp_path / f"plan-{number}", **options)
    assert {path.suffix for path in (tmp_path / f"plan-{number}").iterdir()} == {".parquet"}
    return catalog


def rows(catalog: FrozenCatalog) -> list[dict[str, Any]]:
    return [row for unit in catalog.units for row in pq.read_table(unit).to_pylist()]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        (tmp_path / "tars").mkdir()
        return f"{tmp_path}/tars"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def put(uri: str, data: bytes) -> None:
    filesystem, path = resolve_filesystem(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def test_samples_of_many_shards_are_rows(place: str, tmp_path: Path) -> None:
    for number in range(3):
        put(f"{place}/shop-{number:02}.tar", pack(samples(number * 10, number * 10 + 10)))
    put(f"{place}/README.md", b"beside the shards")
    catalog = freeze(place, tmp_path)
    found = rows(catalog)
    assert [row["id"] for row in found] == [f"{number:03}" for number in range(30)]
    assert catalog.schema.names == [
        "image", "sku", "price", "input_id", "id", "description", "_image_stamp", "_image_uri",
    ]  # fmt: skip
    assert found[7] == {
        "image": found[7]["_image_uri"], "sku": "S007", "price": 7, "input_id": 49, "id": "007",
        "description": "Shirt no. 7", "_image_stamp": None, "_image_uri": found[7]["image"],
    }  # fmt: skip
    for number, row in enumerate(found):
        assert read_image(row["_image_uri"]) == f"photo {number:03}".encode() * (number * 20)

    def digest(images: str, **options: Any) -> str:
        return freeze(f"{place}/{images}", tmp_path, **options).digest

    assert catalog.digest == digest("*.tar") == digest("shop-{00..02}.tar")
    assert digest("shop-0[01].tar") == digest("shop-{00,01}.tar")
    assert [r["id"] for r in rows(freeze(f"{place}/*.tar", tmp_path, limit=13))][-2:] == [
        "011", "012",
    ]  # fmt: skip
    by_sku = freeze(f"{place}/shop-02.tar", tmp_path, id_column="sku", description_column="price")
    assert {(row["id"], row["description"]) for row in rows(by_sku)} == {
        (f"S{number:03}", str(number)) for number in range(20, 30)
    }


def test_a_shard_that_was_replaced_is_noticed(place: str, tmp_path: Path) -> None:
    put(f"{place}/a.tar", pack(samples(0, 20)))
    put(f"{place}/b.tar", pack(samples(20, 40)))
    uris = [row["_image_uri"] for row in rows(freeze(place, tmp_path))]
    stamps = stamp_images(uris)
    assert len(set(stamps)) == 40 and None not in stamps
    fetched = [fetch_image(uri) for uri in uris]
    assert [image.stamp for image in fetched] == stamps  # asked, or read: the same
    planned = rows(freeze(place, tmp_path, identify="stamp"))
    assert [row["_image_stamp"] for row in planned] == stamps
    content = rows(freeze(place, tmp_path, identify="content"))

    put(f"{place}/a.tar", pack([("new.jpg", b"x" * 9000), *samples(0, 20)]))
    changed = stamp_images(uris)
    assert changed[20:] == stamps[20:] and not set(changed[:20]) & set(stamps)
    for uri in uris[1:20]:
        assert fetch_image(uri).error_class == "unreadable", uri
    # by content, a move inside a shard is no change
    again = {r["id"]: r["_image_stamp"] for r in rows(freeze(place, tmp_path, identify="content"))}
    assert again.items() > {row["id"]: row["_image_stamp"] for row in content}.items()
    resolve_filesystem(place)[0].delete_file(resolve_filesystem(f"{place}/b.tar")[1])
    assert stamp_images(uris[-1:]) == ["gone"] and fetch_image(uris[-1]).error_class == "gone"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_or_joined_shard_is_never_taken_for_a_whole_one(tmp_path: Path, format: int) -> None:
    files = [("a.jpg", b"a" * 700), ("a.txt", "text"), ("b.jpg", b"b" * 512), ("c.jpg", b"")]
    if format != tarfile.USTAR_FORMAT:
        files.append((f"{'long' * 60}.jpg", b"l"))
    whole = pack(files, format)
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    expected = rows(freeze(path, tmp_path))
    assert [read_image(row["_image_uri"]) for row in expected] == [
        data for name, data in files if name.endswith(".jpg")
    ]
    end = len(whole.rstrip(b"\0"))
    refused = 0
    for length in [*range(0, len(whole), 256), end - 1]:
        path.write_bytes(whole[:length])
        try:
            assert rows(freeze(path, tmp_path)) == expected
            assert length > end
        except CatalogError as error:
            assert "a.tar" in str(error)
            refused += 1
    assert refused > 10
    path.write_bytes(whole + whole)
    with pytest.raises(CatalogError, match="follows the end mark"):
        freeze(path, tmp_path)
    damaged = bytearray(whole)
    damaged[1024 + 512] ^= 255  # the second header
    path.write_bytes(damaged)
    with pytest.raises(CatalogError, match=r"damaged, truncated"):
        freeze(path, tmp_path)


def test_odd_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("folder.d"), io.BytesIO())
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in [
            ("./dir.v1/a.b.JPG", b"not the whole extension"), ("._mac.jpg", b""), ("README", b""),
            ("dir.v1/b.PNG", b"png"), ("words.txt", b"Only words"), ("e\xff.jpg".encode(), b"e"),
        ]:  # fmt: skip
            member = tarfile.TarInfo(os.fsdecode(name) if isinstance(name, bytes) else name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    found = {row["id"]: read_image(row["_image_uri"]) for row in rows(freeze(path, tmp_path))}
    none = ("gone", "the sample has no file with an image's extension")
    assert found == {
        "folder": none, "linked": none, "dir.v1/a": none, "dir.v1/b": b"png", "words": none,
        "eÿ": b"e",
    }  # fmt: skip
    chosen = freeze(path, tmp_path, image_column="b.jpg")
    images = {row["id"]: read_image(row["_image_uri"]) for row in rows(chosen)}
    assert images["dir.v1/a"] == b"not the whole extension" and images["dir.v1/b"] == none


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.tar": samples(0, 2), "b.tar": samples(1, 3)}, r"1 values of 'id'.*'001' \(2 times\)"),
        ({"a.tar": [("1.jpg", b"x"), ("2.jpg", b"y"), ("1.txt", "z")]}, r"'1' \(2 times\)"),
        ({"a.tar": [("1.jpg", b"x"), ("1.png", b"y")]}, "2 images, jpg and png.*--image-column"),
        ({"a.tar": [("1.jpg", b"x"), ("1.jpg", b"y")]}, r"holds 1\.jpg twice"),
        ({"a.tar": [("1.jpg", b"x"), ("1.json", "{")]}, r"1\.json cannot be read"),
        ({"a.tar": [("1.jpg", b"x"), ("1.json", "[]")]}, r"1\.json is not a JSON object"),
        ({"a.tar": [("1.jpg", b"x"), ("1.txt", b"\xff")]}, r"1\.txt is not UTF-8"),
        ({"a.tar": samples(0, 1), "b.jpg": []}, "holds shards .* and images"),
        ({"a.tar.gz": samples(0, 1)}, "is compressed"),
        ({"a.tar": []}, "has no rows"),
    ],
)
def test_mistakes(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(pack(content))
    with pytest.raises(CatalogError, match=message):
        freeze(tmp_path / "in", tmp_path)


def test_a_shard_of_a_series_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").write_bytes(pack(samples(0, 2)))
    with pytest.raises(CatalogError, match=r"a-1\.tar: no such file"):
        freeze(tmp_path / "a-{0..1}.tar", tmp_path)
    with pytest.raises(CatalogError, match="braces name a series of shards"):
        freeze(tmp_path / "a-{0..1}.jpg", tmp_path)
    assert expand_braces("s{098..101}-{a,b}.tar")[::3] == ["s098-a.tar", "s099-b.tar", "s101-a.tar"]


def test_no_shard_is_held_in_memory(place: str, tmp_path: Path) -> None:
    put(f"{place}/a.tar", pack((f"{n}.jpg", bytes(300_000)) for n in range(60)))  # 18 MB
    freeze(f"{place}/a.tar", tmp_path, limit=1)
    tracemalloc.start()
    try:
        catalog = freeze(f"{place}/a.tar", tmp_path)
        uris = [row["_image_uri"] for row in rows(catalog)]
        assert {len(fetch_image(uri).data or b"") for uri in uris} == {300_000}
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
