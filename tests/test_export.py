"""Finished runs as data sets: whole, the same bytes each time, loaded by those who load such."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs
from test_nightly import Caption

from jobs.caption import main
from stylegan import export, parts, publish
from stylegan import run as runs
from stylegan.catalog import fetch_image, freeze_catalog, resolve_filesystem
from stylegan.export import ExportError, export_run
from stylegan.images import decode_image
from stylegan.lock import Lock, LockError
from stylegan.parts import Settings
from stylegan.publish import PublishError


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def put(uri: str, data: bytes) -> None:
    filesystem, path = resolve_filesystem(uri)
    if filesystem.type_name == "local":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def photograph(number: int, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number % 5, 16), (number % 250, 9, 200)).save(buffer, format)
    return buffer.getvalue()


def shop(place: str, count: int = 150) -> dict[str, bytes]:
    """A manifest with pictures of three formats, some broken or absent; images by id."""
    images, lines = {}, ["sku,image,title,caption,caption_locked"]
    for number in range(count):
        sku = f"{number:03}" if number % 10 else f"odd/{number}.x"
        images[sku] = photograph(number, ("JPEG", "PNG", "WEBP")[number % 3])
        if number % 40 == 7:
            images[sku] = b"broken"
        put(f"{place}/img/{number}", images[sku])
        locked = "Said by a person.,true" if number == 11 else ","
        lines.append(f"{sku},img/{number},Shirt no. {number},{locked}")
    lines.append("text,,Only words,,")
    put(f"{place}/shop.csv", "\n".join(lines).encode())
    return images


def finished_run(
    images: str, output: str, scratch: Path, styles: tuple[str, ...] = ("plain",), **options: Any
) -> str:
    """A published run whose captions are made by a function instead of a model."""
    folder = scratch / f"units-{random.getrandbits(60):x}"
    catalog = freeze_catalog(images, folder, **options)
    settings = Settings(catalog.digest, "revision", styles, 1, None, None, 0)
    run = runs.plan_run(output, settings, catalog)
    for unit in range(run.num_units):
        rows, captions, found = run.read_unit(unit), {}, []
        column = "_image_bytes" if "_image_bytes" in rows.column_names else "_image_uri"
        for index, row in enumerate(rows.to_pylist()):
            given = row[column]
            data = given if isinstance(given, bytes) or not given else fetch_image(given).data
            is_locked = parts.locked(rows)[index]
            image = decode_image(data, 8) if data and not is_locked else None
            sha256 = hashlib.sha256(data).hexdigest() if data and not is_locked else None
            error = image.error_class if image else None
            found.append((sha256, image and image.width, image and image.height, error, error))
            if error is None and not is_locked:
                for style in styles:
                    captions[index, style, 0] = Caption(f"{style}: {row['id']}", "a shirt", 1)
        names = ("image_sha256", "width", "height", "error_class", "error_message")
        for name, values in zip(names, zip(*found, strict=True), strict=True):
            field = parts.OUTPUT.field(name)
            rows = rows.append_column(field, pa.array(values, field.type))
        part = parts.assemble(rows, captions, settings, run_id=run.run_id, model_id="m")
        run.write_part(unit, part, {})
    verified = run.verify()
    assert not verified.wrong
    summary = {
        "run_id": run.run_id, "finished_at": "",
        "counts": {"images": verified.images, "rows": verified.rows, "foreign_files": [],
                   "statuses": dict(verified.statuses), "needs_review": 0,
                   "error_classes": dict(verified.error_classes)},
        "rates": {"images_this_session": 0, "seconds_this_session": 1.0, "images_per_second": 0.0,
                  "failed_share": 0.0},
        "seconds_per_stage": {}, "bottleneck": None, "versions": {},
        "configuration": {"images": images, "model": None}, "settings": asdict(settings),
        "input": {"digest": "d", "rows": run.num_rows, "units": run.num_units,
                  "images": asdict(catalog.images)},
    }  # fmt: skip
    with Lock.acquire(*runs.lock_path(output, settings)) as lock:
        run.publish(summary, lock)
    return run.uri


CSV = {"id_column": "sku", "description_column": "title"}


def files(uri: str) -> dict[str, bytes]:
    filesystem, path = resolve_filesystem(uri)
    found = {}
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        if info.type == fs.FileType.File:
            with filesystem.open_input_stream(info.path) as stream:
                found[info.path[len(path) + 1 :]] = stream.read()
    return found


def members(shard: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield


def load(folder: str, tmp_path: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path / "cache"))


# --- hub ----------------------------------------------------------------------------------------


def test_hub_export_holds_every_row(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "HUB_GROUP", 32)
    monkeypatch.setattr(export, "HUB_BYTES", 10_000)
    shop(place)
    run = finished_run(f"{place}/shop.csv", f"{place}/captions", tmp_path, **CSV)
    said = export_run(run, "hub")
    assert "151 rows" in said and "4 rows that failed" in said
    found = files(f"{run}/export-hub")
    names = [name for name in found if name.startswith("data/")]
    assert sorted({*found} - {*names}) == ["README.md", "_SUCCESS"] and len(names) > 1
    assert sorted(names) == [
        f"data/train-{n:05}-of-{len(names):05}.parquet" for n in range(len(names))
    ]
    tables = [pq.read_table(io.BytesIO(found[name])) for name in sorted(names)]
    filesystem, path = resolve_filesystem(run)
    source = pq.read_table(f"{path}/data", filesystem=filesystem, partitioning=None)
    whole = pa.concat_tables(tables)
    assert whole.drop_columns("image").equals(source.drop_columns("image"))
    uris = dict(zip(whole["id"].to_pylist(), whole["image"].to_pylist(), strict=True))
    assert uris["011"] == f"{place}/img/11" and uris["text"] is None
    # elsewhere the same bytes, and nothing is written twice
    export_run(run, "hub", f"{place}/elsewhere")
    assert files(f"{place}/elsewhere") == found
    assert "exported already" in export_run(run, "hub")


@pytest.mark.usefixtures("offline")
def test_everybody_reads_a_run_and_its_export_without_an_option(tmp_path: Path) -> None:
    images = shop(str(tmp_path))
    run = finished_run(f"{tmp_path}/shop.csv", f"{tmp_path}/captions", tmp_path, **CSV)
    export_run(run, "hub", f"{tmp_path}/plain")
    export_run(run, "hub", f"{tmp_path}/pictures", with_images=True)
    for number, folder in enumerate((run, f"{tmp_path}/plain", f"{tmp_path}/pictures")):
        query = f"SELECT count(*), count(caption) FROM '{folder}/data/*.parquet'"
        assert duckdb.sql(query).fetchall() == [(151, 147)]
        frame = pandas.read_parquet(f"{folder}/data")
        assert len(frame) == 151 and frame["caption"].notna().sum() == 147
        loaded = load(folder, tmp_path / str(number))
        assert loaded.num_rows == 151
        assert loaded[5]["caption"] == "plain: 005"
    assert loaded[5]["image"].size == (20, 16) and loaded[7]["image"] is None
    held = pq.read_table(f"{tmp_path}/pictures/data").select(["id", "image", "status"]).to_pylist()
    assert {row["id"]: row["image"] and row["image"]["bytes"] for row in held} == {
        **{sku: None if data == b"broken" else data for sku, data in images.items()}, "text": None,
    }  # fmt: skip


def test_image_columns_of_the_input_make_room(tmp_path: Path) -> None:
    put(f"{tmp_path}/a.jpg", photograph(1, "JPEG"))
    put(f"{tmp_path}/shop.csv", b"id,photo,image,input_image\n1,a.jpg,front,x\n2,,,\n")
    run = finished_run(f"{tmp_path}/shop.csv", f"{tmp_path}/out", tmp_path, image_column="photo")
    export_run(run, "hub")
    (first, second) = pq.read_table(f"{run}/export-hub/data").to_pylist()
    assert first["image"] == f"{tmp_path}/a.jpg" and first["input_input_image"] == "front"
    assert first["photo"] == "a.jpg" and first["input_image"] == "x" and second["image"] is None


# --- WebDataset ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_shards_hold_each_caption_with_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_SAMPLES", 100)
    images = shop(str(tmp_path))
    run = finished_run(
        f"{tmp_path}/shop.csv", f"{tmp_path}/captions", tmp_path, ("plain", "merry"), **CSV
    )
    said = export_run(run, "webdataset")
    assert "292 samples" in said and "8 rows that failed, left out" in said
    assert "2 rows without an image, left out" in said
    found = files(f"{run}/export-webdataset")
    assert sorted(found) == ["00000.tar", "00001.tar", "00002.tar", "README.md", "_SUCCESS"]
    samples: dict[str, dict[str, bytes]] = {}
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        for member, content in members(found[name]).items():
            key, _, extension = member.partition(".")
            samples.setdefault(key, {})[extension] = content
    assert len(samples) == 292
    seen: Counter[str] = Counter()
    for sample in samples.values():
        row = json.loads(sample["json"])
        seen[row["id"]] += 1
        assert sample["txt"].decode() == row["caption"]
        assert set(sample) in (
            {"jpg", "txt", "json"},
            {"png", "txt", "json"},
            {"webp", "txt", "json"},
        )
        (content,) = (sample[name] for name in sample if name not in ("txt", "json"))
        assert content == images[row["id"]]
    assert set(seen.values()) == {2} and len(seen) == 146

    loaded = load(f"{run}/export-webdataset", tmp_path)
    assert loaded.num_rows == 292
    sample = loaded[2]
    assert sample["jpg"] or sample["png"] or sample["webp"]
    assert sample["json"]["caption"] == sample["txt"] and sample["json"]["error_class"] is None
    # and as an input it is whole
    catalog = freeze_catalog(f"{run}/export-webdataset", tmp_path / "again")
    assert catalog.num_rows == 292


def test_keys_are_safe_and_unique() -> None:
    ids = ["a", "A", "a.b", "a/b", "a b", "..", "é", "", "x" * 300, "a-" + "0" * 16, "../../etc/x"]
    keys = [export._key(row_id, None) for row_id in ids]
    assert keys[0] == "a" and len(set(keys)) == len(ids)
    assert all(key and len(key) < 100 and not set(key) & set("./ ") for key in keys)
    assert export._key("a", 0) != export._key("a", 1)


def test_an_image_that_changed_is_not_given_a_caption_of_another(tmp_path: Path) -> None:
    images = shop(str(tmp_path))
    run = finished_run(f"{tmp_path}/shop.csv", f"{tmp_path}/captions", tmp_path, **CSV)
    put(f"{tmp_path}/img/5", photograph(99, "JPEG"))
    os.unlink(f"{tmp_path}/img/6")
    said = export_run(run, "webdataset")
    assert "144 samples" in said and "2 rows whose image is gone or has changed" in said
    said = export_run(run, "hub", with_images=True)
    assert "151 rows" in said and "2 rows whose image is gone or has changed" in said
    rows = pq.read_table(f"{run}/export-hub-images/data").to_pylist()
    found = {row["id"]: row["image"] and row["image"]["bytes"] for row in rows}
    assert found["005"] is None and found["006"] is None and found["008"] == images["008"]


@pytest.mark.parametrize("kind", ["folder", "glob", "one", "shards", "bytes", "hub bytes"])
def test_images_are_found_for_every_kind_of_input(tmp_path: Path, kind: str) -> None:
    data = {f"{n:02}.png": photograph(n, "PNG") for n in range(40)}
    source, options = f"{tmp_path}/in", {}
    for name, content in data.items():
        put(f"{source}/sub/{name}", content)
    if kind == "glob":
        source += "/*/*.png"
    elif kind == "one":
        source += "/sub/07.png"
        data = {"07.png": data["07.png"]}
    elif kind == "shards":
        source = f"{tmp_path}/a.tar"
        with tarfile.open(source, "w") as tar:
            for name in data:
                tar.add(f"{tmp_path}/in/sub/{name}", name)
    elif "bytes" in kind:
        source, options = f"{tmp_path}/in.parquet", {"id_column": "sku"}
        rows = [{"sku": name, "image": content} for name, content in data.items()]
        if kind == "hub bytes":
            rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), source)
    run = finished_run(source, f"{tmp_path}/captions", tmp_path, **options)
    said = export_run(run, "webdataset")
    assert f"{len(data)} samples" in said
    found = members(files(f"{run}/export-webdataset")["00000.tar"])
    assert [c for name, c in found.items() if name.endswith(".png")] == list(data.values())
    export_run(run, "hub", with_images=True)
    images = pq.read_table(f"{run}/export-hub-images/data")["image"].to_pylist()
    assert [image["bytes"] for image in images] == list(data.values())


# --- kills, crowds, mistakes --------------------------------------------------------------------


@pytest.mark.parametrize("kind", export.KINDS)
@pytest.mark.parametrize("on", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_killed_export_is_begun_anew(
    request: pytest.FixtureRequest,
    on: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "HUB_GROUP", 32)
    monkeypatch.setattr(export, "HUB_BYTES", 10_000)
    monkeypatch.setattr(export, "SHARD_SAMPLES", 60)
    place = str(tmp_path)
    if on == "s3":
        place = f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    shop(place)
    run = finished_run(f"{place}/shop.csv", f"{place}/captions", tmp_path, **CSV)
    export_run(run, kind, f"{place}/whole")
    whole = files(f"{place}/whole")

    class Killed(BaseException):
        pass

    rows = export._rows
    for after in (1, 3):

        def dying(run: str, after: int = after) -> Iterator[pa.RecordBatch]:
            for number, batch in enumerate(rows(run)):
                if number == after:
                    raise Killed
                yield batch

        monkeypatch.setattr(export, "_rows", dying)
        with pytest.raises(Killed):
            export_run(run, kind)
        left = files(f"{run}/export-{kind}")
        assert "_SUCCESS" not in left and "_EXPORTING" in left
        whole_files = {name for name in left if name != "_EXPORTING"}
        assert all(left[name] == whole[name] for name in whole_files)
    put(f"{run}/export-{kind}/99999.tar", b"of a longer run")
    monkeypatch.setattr(export, "_rows", rows)
    export_run(run, kind)
    assert files(f"{run}/export-{kind}") == whole


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    shop(str(tmp_path), 40)
    run = finished_run(f"{tmp_path}/shop.csv", f"{tmp_path}/captions", tmp_path, **CSV)
    put(f"{tmp_path}/mine/a.txt", b"mine")
    with pytest.raises(ExportError, match=r"mine is not empty \(a\.txt\)"):
        export_run(run, "hub", f"{tmp_path}/mine")
    export_run(run, "hub", f"{tmp_path}/there")
    with pytest.raises(ExportError, match="holds another export"):
        export_run(run, "webdataset", f"{tmp_path}/there")
    assert files(f"{tmp_path}/mine") == {"a.txt": b"mine"}
    output, name = run.rsplit("/", 1)
    with publish.reading(output, name, "export-hub"), pytest.raises(LockError):
        export_run(run, "hub", f"{tmp_path}/third")
    # with the run goes its export
    export_run(run, "hub")
    finished_run(f"{tmp_path}/shop.csv", output, tmp_path, ("merry",), **CSV)
    assert publish.prune(output, 1, runs.lock_name) == [name]
    assert not Path(run).exists()
    with pytest.raises(PublishError):
        export_run(run, "hub")


def test_the_command_exports_the_latest_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"{tmp_path}/captions"
    assert main(["--output", output, "--export", "hub"]) == 2
    assert "no run is complete" in capsys.readouterr().err
    shop(str(tmp_path), 40)
    run = finished_run(f"{tmp_path}/shop.csv", output, tmp_path, **CSV)
    # neither a model nor an image is opened
    for image in Path(tmp_path, "img").iterdir():
        image.unlink()
    assert main(["--output", output, "--export", "hub"]) == 0
    assert f"exported to {run}/export-hub" in capsys.readouterr().out
    assert main(["--output", output, "--export", "hub", "--export-to", f"{tmp_path}/img"]) == 0
    assert files(f"{tmp_path}/img") == files(f"{run}/export-hub")
    for wrong in (["--export-images"], ["--export", "hub", "--rollback", "x"], ["--export", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(["--output", output, *wrong])
        assert stop.value.code == 2
