"""Runs that are based on others: what is carried over, what is captioned, and what is published.

Captions are made by a function here instead of a model: of the image's content, the description,
the style and the candidate, so that a row carried over in error is seen.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from stylegan import lock as locks
from stylegan import parts, previous, publish
from stylegan import run as runs
from stylegan.catalog import (
    CatalogError,
    fetch_image,
    freeze_catalog,
    hash_images,
    list_stamps,
    resolve_filesystem,
    stamp_images,
)
from stylegan.lock import Lock
from stylegan.parts import Settings
from stylegan.previous import Previous, PreviousError
from stylegan.publish import PublishError
from stylegan.run import Run
from stylegan.storage import patiently

BASE = Settings("", "revision", ("colloquial", "formal"), 2, None, None, 0)

GONE_MODEL = {"uri": "/gone/model", "revision": "revision", "styles": ["colloquial", "formal"],
              "image_size": 48, "files": {"config.json": "1 1"}}  # fmt: skip


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder or prefix for images, manifests and runs."""
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets and several carried units, with few rows."""
    monkeypatch.setattr(previous, "BUCKET_ROWS", 40)
    monkeypatch.setattr(previous, "CARRIED_ROWS", 50)


def put(uri: str, data: bytes) -> None:
    filesystem, path = resolve_filesystem(uri)
    if filesystem.type_name == "local":
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    patiently(uri, write)


# --- a shop, and a captioner that is a function -------------------------------------------------


@dataclass(frozen=True)
class Caption:
    text: str | None
    description: str | None
    seed: int
    error_class: str | None = None
    error_message: str | None = None
    score: float | None = None
    needs_review: bool = False
    num_generated_tokens: int = 3


class Shop:
    """Products with images, descriptions and prices, and what their captions should be."""

    def __init__(self, place: str, count: int) -> None:
        self.place = place
        self.images: dict[str, bytes] = {}
        self.rows: dict[str, dict[str, str]] = {}
        for number in range(count):
            self.add(f"{number:04}")

    def add(self, row_id: str) -> None:
        self.rows[row_id] = {
            "id": row_id, "image": f"img/{row_id}.jpg", "description": f"Shirt {row_id}",
            "brand": "A", "price": "1.00", "caption": "", "caption_locked": "",
        }  # fmt: skip
        self.photograph(row_id, f"photo of {row_id}".encode())

    def photograph(self, row_id: str, data: bytes) -> None:
        self.images[row_id] = data
        put(f"{self.place}/img/{row_id}.jpg", data)

    def manifest(self) -> str:
        text = io.StringIO()
        rows = csv.DictWriter(text, next(iter(self.rows.values())))
        rows.writeheader()
        rows.writerows(self.rows.values())
        put(f"{self.place}/shop.csv", text.getvalue().encode())
        return f"{self.place}/shop.csv"

    def captions(self, settings: Settings = BASE) -> dict[tuple[str, str, int], str | None]:
        """What a run over all of it has to say."""
        expected: dict[tuple[str, str, int], str | None] = {}
        for row_id, row in self.rows.items():
            for style, candidate in settings.versions:
                text = say(self.images[row_id], row["description"], style, candidate)
                is_locked = row["caption_locked"] == "true"
                expected[row_id, style, candidate] = row["caption"] if is_locked else text
        return expected


def say(image: bytes, description: str | None, style: str, candidate: int) -> str | None:
    return None if b"broken" in image else f"{style} {candidate}: {description}, {image!r}"


def plan(
    shop: Shop, output: str, settings: Settings = BASE, *, base: str | None = "latest",
    identify: Any = "stamp", scratch: Path, **options: Any,
) -> Run:  # fmt: skip
    """A planned run, based on the latest one if there is one."""
    folder = scratch / f"units-{random.getrandbits(60):x}"
    catalog = freeze_catalog(shop.manifest(), folder, identify=identify, **options)
    name = publish.read_latest(output) if base == "latest" else base
    old = Previous.load(f"{output}/{name}") if name else None
    settings = replace(
        settings, input_digest=catalog.digest, attribute_columns=catalog.attributes,
        previous=f"{old.name} {old.identity}" if old else None,
    )  # fmt: skip
    return runs.plan_run(output, settings, catalog, None, old)


def write_fresh(run: Run) -> list[str]:
    """Captions the units of a run that have no part; the ids of what was captioned."""
    seen: list[str] = []
    for unit in run.missing_units():
        if unit >= run.num_fresh_units:
            continue
        rows = run.read_unit(unit)
        captions: dict[tuple[int, str, int], Caption] = {}
        locked = parts.locked(rows)
        images = [fetch_image(uri) for uri in rows.column("_image_uri").to_pylist()]
        for index, row in enumerate(rows.to_pylist()):
            seen.append(row["id"])
            for style, candidate in run.settings.versions:
                if locked[index]:
                    continue
                text = say(images[index].data or b"broken", row["description"], style, candidate)
                error = ("not an image", "it is broken") if text is None else (None, None)
                seed = run.settings.row_seed(row["id"], style, candidate)
                captions[index, style, candidate] = Caption(text, row["description"], seed, *error)
        stamps = [
            known or image.stamp
            for known, image in zip(rows.column("_image_stamp").to_pylist(), images, strict=True)
        ]
        at = rows.schema.get_field_index("_image_stamp")
        rows = rows.set_column(at, "_image_stamp", pa.array(stamps, pa.string()))
        part = parts.assemble(rows, captions, run.settings, run_id=run.run_id, model_id="m")
        run.write_part(unit, part, {"caption": 1.0})
    return seen


def finish(run: Run, output: str) -> list[str]:
    """Captions, verifies and publishes; the ids of what was captioned."""
    seen = write_fresh(run)
    run.write_carried(range(run.num_fresh_units, run.num_units))
    found = run.verify()
    assert not found.wrong and found.images == run.num_rows
    summary = {
        "run_id": run.run_id, "finished_at": "", "planned_at": run.created_at, "started_at": "",
        "counts": {"images": found.images, "rows": found.rows, "statuses": dict(found.statuses),
                   "error_classes": dict(found.error_classes), "needs_review": 0,
                   "foreign_files": []},
        "rates": {"images_this_session": 0, "seconds_this_session": 1.0, "images_per_second": 0.0,
                  "failed_share": 0.0},
        "seconds_per_stage": {}, "bottleneck": None, "versions": {}, "identity": "",
        "uri": run.uri, "configuration": {"images": None, "model": None},
        "settings": {"styles": list(run.settings.styles), "model_revision": "r", "seed": 0,
                     "captions_per_image": run.settings.captions_per_image, "temperature": None,
                     "max_new_tokens": None, "best_of": None},
        "input": {"digest": "d", "rows": run.num_rows, "units": run.num_units}, "model": GONE_MODEL,
    }  # fmt: skip
    with Lock.acquire(*runs.lock_path(output, run.settings)) as lock:
        run.publish(summary, lock)
    return seen


def read_back(run: Run) -> pa.Table:
    return pq.read_table(f"{run.path}/data", filesystem=run.filesystem, partitioning=None)


def spoken(run: Run) -> dict[tuple[str, str, int], str | None]:
    """(id, style, candidate) → caption; each exactly once."""
    rows = read_back(run).select(["id", "style", "caption"]).to_pylist()
    numbers: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in rows:
        number = numbers[row["id"], row["style"]]
        numbers[row["id"], row["style"]] += 1
        found[row["id"], row["style"], number] = row["caption"]
    assert len(found) == len(rows)
    return found


def statuses(run: Run) -> dict[str, str]:
    """id → status, the same in all its rows."""
    rows = read_back(run).select(["id", "status"]).to_pylist()
    found = {row["id"]: row["status"] for row in rows}
    assert all(found[row["id"]] == row["status"] for row in rows)
    return found


# --- what is carried over -----------------------------------------------------------------------


def test_only_what_changed_is_captioned(place: str, tmp_path: Path) -> None:
    shop, output = Shop(place, 300), f"{place}/captions"
    for row_id in ("0007", "0008"):
        shop.photograph(row_id, b"broken")
    first = plan(shop, output, scratch=tmp_path, base=None, identify="later")
    assert len(finish(first, output)) == 300 and first.changes is None

    shop.photograph("0001", b"another photo")
    shop.photograph("0007", b"a whole photo")
    shop.rows["0002"]["description"] = "Red skirt"
    shop.rows["0003"]["brand"] = "B"
    for row in shop.rows.values():
        row["price"] = "2.00"
    for row_id in ("0004", "0005", "0006"):
        del shop.rows[row_id]
    shop.add("new")
    shop.rows["0010"] |= {"caption": "A person wrote this.", "caption_locked": "true"}
    second = plan(shop, output, scratch=tmp_path)
    assert second.changes == {
        "carried_over": 292, "still_failed": 1, "locked": 1, "new": 1, "changed": 3, "retried": 0,
        "gone": 3,
    }  # fmt: skip
    assert sorted(finish(second, output)) == ["0001", "0002", "0007", "new"]
    assert spoken(second) == shop.captions()
    assert Counter(statuses(second).values()) == {
        "carried_over": 292, "captioned": 4, "locked": 1, "failed": 1,
    }  # fmt: skip

    # what is carried over is the same but for its status, and what the input says of it now
    old = {(r["id"], r["seed"]): r for r in read_back(first).to_pylist()}
    for row in read_back(second).to_pylist():
        if row["status"] == "carried_over":
            assert row["price"] == "2.00"
            was = old[row["id"], row["seed"]]
            assert row == {**was, "status": "carried_over", "price": "2.00", "brand": row["brand"]}
    listed = pq.read_table(f"{second.path}/errors", filesystem=second.filesystem).to_pylist()
    assert [(row["id"], row["price"], row["error_class"]) for row in listed] == [
        ("0008", "2.00", "not an image")
    ]

    # a person's caption follows the input, and comes to an end with the lock
    shop.rows["0010"] |= {"caption": "A person wrote that.", "caption_locked": "true"}
    third = plan(shop, output, scratch=tmp_path)
    assert finish(third, output) == [] and spoken(third) == shop.captions()
    shop.rows["0010"]["caption_locked"] = ""
    fourth = plan(shop, output, scratch=tmp_path)
    assert finish(fourth, output) == ["0010"] and spoken(fourth) == shop.captions()


def test_what_changed_rows_said_before_is_kept_for_the_report(tmp_path: Path) -> None:
    shop, output = Shop(str(tmp_path), 20), str(tmp_path / "captions")
    shop.photograph("0004", b"broken")
    finish(plan(shop, output, scratch=tmp_path), output)
    before = shop.captions()
    for row_id, photo in (("0001", b"another"), ("0002", b"broken"), ("0004", b"whole")):
        shop.photograph(row_id, photo)
    shop.rows["0011"]["description"] = "Red skirt"
    shop.add("new")

    def replaced(run: Run) -> dict[str, tuple[str, str, str]]:
        write_fresh(run)
        return {r["id"]: (r["style"], r["before"], r["after"]) for r in run.replaced()}

    second = plan(shop, output, scratch=tmp_path)
    now = shop.captions()
    assert replaced(second) == {
        row_id: ("colloquial", *(said[row_id, "colloquial", 0] for said in (before, now)))
        for row_id in ("0001", "0011")
    }
    # all are changed by a style that is new: the one that both runs have is compared
    other = plan(shop, output, replace(BASE, styles=("humorous", "formal")), scratch=tmp_path)
    assert replaced(other) == {
        row_id: ("formal", *(said[row_id, "formal", 0] for said in (before, now)))
        for row_id in ("0001", "0011")
    }
    none = plan(shop, output, replace(BASE, styles=("humorous",)), scratch=tmp_path)
    assert none.changes and none.changes["changed"] == 20 and replaced(none) == {}


def test_what_failed_is_tried_again_when_asked(place: str, tmp_path: Path) -> None:
    shop, output = Shop(place, 60), f"{place}/captions"
    shop.photograph("0007", b"broken")
    finish(plan(shop, output, scratch=tmp_path), output)
    retry = replace(BASE, retry_failed=True)
    again = plan(shop, output, retry, scratch=tmp_path)
    assert again.changes and again.changes["retried"] == 1
    assert finish(again, output) == ["0007"]
    assert statuses(again)["0007"] == "failed"
    # mended behind the manifest's back, with the size and time that it had
    data = b"whole "
    path = Path(place, "img", "0007.jpg")
    if path.exists():
        stamp = path.stat().st_mtime_ns
        shop.photograph("0007", data)
        os.utime(path, ns=(stamp, stamp))
    else:
        shop.photograph("0007", data)
    finish(mended := plan(shop, output, retry, scratch=tmp_path), output)
    assert spoken(mended) == shop.captions() and statuses(mended)["0007"] == "captioned"


@pytest.mark.parametrize(
    ("change", "carried"),
    [
        ({"model_revision": "other"}, 0), ({"temperature": 0.5}, 0), ({"seed": 1}, 0),
        ({"max_new_tokens": 9}, 0), ({"best_of": 4}, 0), ({"hash_content": True}, 0),
        ({"captions_per_image": 3}, 0),
        ({"styles": ("colloquial", "formal", "new")}, 0),
        # what was written is there already
        ({"captions_per_image": 1}, 50), ({"styles": ("formal",)}, 50),
        ({"styles": ("formal", "colloquial")}, 50), ({}, 50),
    ],
)  # fmt: skip
def test_other_settings_make_other_captions(
    tmp_path: Path, change: dict[str, Any], carried: int
) -> None:
    shop, output = Shop(str(tmp_path), 50), f"{tmp_path}/captions"
    finish(plan(shop, output, scratch=tmp_path), output)
    settings = replace(BASE, **change)
    run = plan(shop, output, settings, scratch=tmp_path)
    assert run.changes and run.changes["carried_over"] == carried == run.num_carried
    finish(run, output)
    assert spoken(run) == shop.captions(settings)


def test_attributes_that_are_named_count(tmp_path: Path) -> None:
    shop, output = Shop(str(tmp_path), 50), f"{tmp_path}/captions"
    named = {"attribute_columns": ["brand", "description"]}
    finish(plan(shop, output, scratch=tmp_path, **named), output)
    shop.rows["0003"]["brand"] = "B"
    shop.rows["0004"]["price"] = "9"
    run = plan(shop, output, scratch=tmp_path, **named)
    assert finish(run, output) == ["0003"]
    with pytest.raises(CatalogError, match="no column 'colour' for --attribute-columns"):
        plan(shop, output, scratch=tmp_path, attribute_columns=["colour"])


def test_another_file_of_the_same_size_and_time_is_another_image(tmp_path: Path) -> None:
    shop, output = Shop(str(tmp_path), 50), f"{tmp_path}/captions"
    for row_id in shop.rows:
        os.utime(tmp_path / "img" / f"{row_id}.jpg", (1, 1))
    finish(plan(shop, output, scratch=tmp_path), output)
    shop.rows["0001"]["image"] = "img/0002.jpg"
    shop.images["0001"] = shop.images["0002"]
    run = plan(shop, output, scratch=tmp_path)
    assert finish(run, output) == ["0001"] and spoken(run) == shop.captions()


def test_images_are_known_by_their_content_when_asked(tmp_path: Path) -> None:
    shop, output = Shop(str(tmp_path), 50), f"{tmp_path}/captions"
    settings = replace(BASE, hash_content=True)
    finish(plan(shop, output, settings, scratch=tmp_path, identify="content"), output)
    os.utime(tmp_path / "img" / "0001.jpg", (1, 1))
    status = os.stat(tmp_path / "img" / "0002.jpg")
    shop.photograph("0002", b"photo of 2000")
    os.utime(tmp_path / "img" / "0002.jpg", ns=(status.st_mtime_ns, status.st_mtime_ns))
    run = plan(shop, output, settings, scratch=tmp_path, identify="content")
    assert finish(run, output) == ["0002"] and spoken(run) == shop.captions(settings)


def test_image_bytes_in_a_column_are_known_by_their_hash(tmp_path: Path) -> None:
    output = f"{tmp_path}/captions"

    def night(photos: list[bytes | None]) -> Run:
        ids = [str(number) for number in range(len(photos))]
        table = pa.table({"id": ids, "image": pa.array(photos, pa.binary())})
        pq.write_table(table, tmp_path / "shop.parquet")
        units = tmp_path / f"units-{random.getrandbits(60):x}"
        catalog = freeze_catalog(str(tmp_path / "shop.parquet"), units, identify="stamp")
        name = publish.read_latest(output)
        old = Previous.load(f"{output}/{name}") if name else None
        settings = replace(BASE, input_digest=catalog.digest, previous=name)
        return runs.plan_run(output, settings, catalog, None, old)

    def caption(run: Run) -> list[str]:
        ids = []
        for unit in range(run.num_fresh_units):
            rows = run.read_unit(unit)
            captions = {}
            for index, row in enumerate(rows.to_pylist()):
                ids.append(row["id"])
                for style, n in run.settings.versions:
                    text = say(row["_image_bytes"] or b"", None, style, n)
                    error = ("not an image", "broken") if text is None else (None, None)
                    captions[index, style, n] = Caption(text, None, n, *error)
            part = parts.assemble(rows, captions, run.settings, run_id=run.run_id, model_id="m")
            run.write_part(unit, part, {})
        assert finish(run, output) == []
        return ids

    photos = [*(f"photo {number}".encode() for number in range(99)), b"broken", None]
    assert len(caption(night(photos))) == 101
    photos[3] = b"another"
    run = night(photos)
    assert caption(run) == ["3"]
    assert run.changes and run.changes["carried_over"] == 99 and run.changes["still_failed"] == 1
    listed = pq.read_table(f"{run.path}/errors").to_pylist()
    assert [(row["id"], row["_image_bytes"]) for row in listed] == [("99", b"broken")]


def test_many_nights_of_any_change(tmp_path: Path) -> None:
    """Against a model: what must be captioned is what the last night saw otherwise, or not."""
    chance = random.Random(7)
    shop, output = Shop(str(tmp_path), 120), f"{tmp_path}/captions"
    seen: dict[str, tuple[bytes, str]] = {}
    for night in range(8):
        for row_id in chance.sample(sorted(shop.rows), 25):
            match chance.randrange(6):
                case 0:
                    shop.photograph(row_id, f"photo {night} of {row_id}".encode())
                case 1:
                    shop.rows[row_id]["description"] = f"Shirt {night}"
                case 2:
                    del shop.rows[row_id]
                case 3:
                    shop.add(f"{row_id}-{night}")
                case 4:
                    shop.photograph(row_id, b"broken" * (night + 1))
                case 5:
                    locked = chance.choice(["true", "false", ""])
                    shop.rows[row_id] |= {"caption": f"Mine, {night}", "caption_locked": locked}
        ids = list(shop.rows)
        chance.shuffle(ids)
        shop.rows = {row_id: shop.rows[row_id] for row_id in ids}
        now = {i: (shop.images[i], shop.rows[i]["description"]) for i in ids}
        locked_ids = {i for i in ids if shop.rows[i]["caption_locked"] == "true"}
        due = {i for i in ids if seen.get(i) != now[i]} - (locked_ids if night else set())
        run = plan(shop, output, scratch=tmp_path)
        captioned = finish(run, output)
        assert len(captioned) == len(set(captioned)) and set(captioned) == due
        assert spoken(run) == shop.captions()
        if run.changes:
            gone = run.changes["gone"]
            assert run.num_rows == sum(run.changes.values()) - gone
        seen = {i: value for i, value in now.items() if i not in locked_ids}


# --- a previous run that is not as it was -------------------------------------------------------


def test_a_previous_run_that_is_damaged_is_no_base(tmp_path: Path) -> None:
    shop, output = Shop(str(tmp_path), 80), f"{tmp_path}/captions"
    run = plan(shop, output, scratch=tmp_path)
    with pytest.raises(PreviousError, match="no finished run"):
        Previous.load(run.uri)
    finish(run, output)
    whole = Path(run.path, "data/part-00001.parquet").read_bytes()
    Path(run.path, "data/part-00001.parquet").unlink()
    with pytest.raises(PreviousError, match="of the 320 rows"):
        plan(shop, output, scratch=tmp_path)
    table = pq.read_table(io.BytesIO(whole))
    pq.write_table(table.slice(1), f"{run.path}/data/part-00001.parquet")
    with pytest.raises(PreviousError, match=r"part-00001\.parquet is not as it was published"):
        plan(shop, output, scratch=tmp_path)


# --- stamps -------------------------------------------------------------------------------------


def test_a_stamp_is_the_same_however_it_is_found(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [f"{place}/img/{number:03}.jpg" for number in range(150)]
    for uri in uris[:-1]:
        put(uri, uri.encode())
    wanted = [*uris, None]
    stamps = stamp_images(wanted)
    assert stamps[-2:] == ["gone", ""] and len(set(stamps)) == 151
    assert [fetch_image(uri).stamp for uri in wanted] == stamps
    assert list_stamps(f"{place}/img") == {
        uri.rpartition("/")[2]: stamp for uri, stamp in zip(uris[:-1], stamps, strict=False)
    }
    assert list_stamps(f"{place}/nothing") == {}
    monkeypatch.setattr("stylegan.catalog.LIST_FROM", 10**9)  # each asked for by itself
    assert stamp_images(wanted) == stamps
    monkeypatch.setattr("stylegan.catalog.LIST_FROM", 1)  # few of many: the listing is given up
    assert stamp_images([uris[0], uris[148]]) == [stamps[0], stamps[148]]
    put(uris[0], b"another")
    assert stamp_images(uris[:3]) != stamps[:3] and stamp_images(uris[1:3]) == stamps[1:3]
    hashes = hash_images(wanted)
    assert hashes[-2:] == ["gone", ""] and len(set(hashes)) == 151


# --- what is published --------------------------------------------------------------------------


def four_runs(place: str, scratch: Path) -> tuple[str, list[Run]]:
    """Four finished runs, the oldest first."""
    shop, output = Shop(place, 40), f"{place}/captions"
    made = []
    for _ in range(4):
        made.append(plan(shop, output, scratch=scratch))
        finish(made[-1], output)
        assert publish.read_latest(output) == made[-1].uri.rpartition("/")[2]
    return output, made


def names(output: str, prefix: str = "") -> set[str]:
    filesystem, root = resolve_filesystem(output)
    found = filesystem.get_file_info(fs.FileSelector(root))
    return {info.base_name for info in found if info.base_name.startswith(prefix)}


def test_latest_can_be_rolled_back_and_old_runs_pruned(place: str, tmp_path: Path) -> None:
    output, made = four_runs(place, tmp_path)
    ids = [run.uri.rpartition("/")[2] for run in made]
    assert publish.finished_runs(output) == ids[::-1]
    put(f"{made[3].uri}/_plan/identity", b"killed when all was done but this")
    assert publish.roll_back(output, made[0].run_id) == ids[0]
    assert publish.read_latest(output) == ids[0]
    runs.settle(made[3].uri)  # the job that was killed, once more
    assert publish.read_latest(output) == ids[0]
    with pytest.raises(PublishError, match="run=1999 is no finished run"):
        publish.roll_back(output, "1999")

    # kept: the newest two, and the one that is current
    assert publish.prune(output, 2, runs.lock_name) == [ids[1]]
    assert names(output) == {ids[0], ids[2], ids[3], "latest"}
    publish.roll_back(output, ids[3])
    assert publish.prune(output, 2, runs.lock_name) == [ids[0]]
    assert publish.prune(output, 2, runs.lock_name) == []
    assert len(spoken(made[2])) == 160
    assert not list(resolve_filesystem(output)[0].get_file_info(
        fs.FileSelector(f"{resolve_filesystem(output)[1]}/{ids[0]}", allow_not_found=True)
    ))  # fmt: skip


def test_a_run_that_is_read_or_published_is_not_pruned(place: str, tmp_path: Path) -> None:
    output, made = four_runs(place, tmp_path)
    ids = [run.uri.rpartition("/")[2] for run in made]
    with (
        publish.reading(output, ids[0], "a night"),
        Lock.acquire(*runs.lock_path(output, made[1].settings)),
    ):
        assert publish.prune(output, 1, runs.lock_name) == [ids[2]]
    assert publish.prune(output, 1, runs.lock_name) == [ids[1], ids[0]]
    assert names(output) == {ids[3], "latest"}
    with pytest.raises(PublishError, match="pruned"), publish.reading(output, ids[0], "late"):
        pass
    assert names(output) == {ids[3], "latest"}


def test_a_lease_and_a_mark_of_the_dead_do_not_count(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, made = four_runs(place, tmp_path)
    ids = [run.uri.rpartition("/")[2] for run in made]
    filesystem, root = resolve_filesystem(output)
    for name in (f"_LEASE-{ids[0]}-x", f"_PRUNING-{ids[1]}", f"_PRUNING-{ids[2]}"):
        file = locks.cell(filesystem, f"{root}/{name}")
        owner = {"host": locks._host(), "pid": os.getpid(), "process_started": "1"}
        assert file.swap(None, json.dumps(owner).encode())
    # killed as it pruned the third: it is gone for readers, and its files are left
    filesystem.delete_file(f"{root}/{ids[2]}/_SUCCESS")
    with publish.reading(output, ids[1], "x"):
        assert f"_PRUNING-{ids[1]}" not in names(output)
    assert publish.prune(output, 3, runs.lock_name) == [ids[2]]
    assert publish.prune(output, 1, runs.lock_name) == [ids[1], ids[0]]
    assert names(output) == {ids[3], "latest"}


def test_latest_never_goes_back_by_mending(place: str, tmp_path: Path) -> None:
    output, made = four_runs(place, tmp_path)
    for run in (made[1], made[3]):
        put(f"{run.uri}/_plan/identity", run.settings.identity.encode())
    publish.set_latest(output, made[2].uri.rpartition("/")[2])
    runs.settle(made[1].uri)
    assert publish.read_latest(output) == made[2].uri.rpartition("/")[2]
    runs.settle(made[3].uri)
    assert publish.read_latest(output) == made[3].uri.rpartition("/")[2]
    assert not any(runs._exists(run.uri, f"{run.path}/_plan") for run in made)
