"""Run directories and their lock, on disk and on an S3 endpoint, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from stylegan import cards
from stylegan import lock as locks
from stylegan import run as runs
from stylegan.catalog import OUTPUT_COLUMNS, FrozenCatalog, freeze_catalog, resolve_filesystem
from stylegan.lock import Lock, LockError
from stylegan.parts import OUTPUT, Settings, output_schema
from stylegan.run import Found, Run, RunError

SETTINGS = Settings("digest", "revision", ("colloquial", "formal"), 2, None, None, 0)


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place for runs."""
    if request.param == "disk":
        return str(tmp_path / "captions")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def catalog(tmp_path: Path) -> FrozenCatalog:
    """70 rows, in units of 32."""
    lines = "".join(f"{number},Red shirt no. {number},{number % 5}\n" for number in range(70))
    (tmp_path / "list.csv").write_text("id,description,shelf\n" + lines)
    return freeze_catalog(str(tmp_path / "list.csv"), tmp_path / "units")


@pytest.fixture
def run(output: str, catalog: FrozenCatalog) -> Run:
    return runs.plan_run(output, SETTINGS, catalog)


def part(run: Run, unit: int, failed: tuple[str, ...] = ()) -> pa.Table:
    """The rows that a captioner would have made of a unit; those of the ids in `failed` failed."""
    source = run.read_unit(unit)
    rows = []
    for row in source.to_pylist():
        for style, candidate in run.settings.versions:
            row_id = row["id"]
            rows.append(
                {name: None for name in OUTPUT.names}
                | {"id": row_id, "shelf": row["shelf"], "style": style, "needs_review": False}
                | {"seed": run.settings.row_seed(row_id, style, candidate)}
                | (
                    {"status": "failed", "error_class": "gone", "error_message": "no such file"}
                    if row_id in failed
                    else {"status": "captioned", "caption": f"{style} {row_id}"}
                )
            )
    return pa.Table.from_pylist(rows, output_schema(source.schema))


def fill(run: Run, *failed: str) -> None:
    for unit in run.missing_units():
        run.write_part(unit, part(run, unit, failed), {"caption": 1.0})


def listing(run: Run) -> set[str]:
    found = run.filesystem.get_file_info(fs.FileSelector(run.path, recursive=True))
    return {i.path[len(run.path) + 1 :] for i in found if i.type == fs.FileType.File}


def put(run: Run, name: str, data: bytes) -> None:
    if run.filesystem.type_name == "local":
        Path(run.path, name).parent.mkdir(parents=True, exist_ok=True)
    with run.filesystem.open_output_stream(f"{run.path}/{name}") as stream:
        stream.write(data)


# --- identity -----------------------------------------------------------------------------------


def test_all_agree_on_the_columns() -> None:
    assert tuple(OUTPUT.names) == tuple(OUTPUT_COLUMNS) == tuple(cards.COLUMNS)


@pytest.mark.parametrize(
    "other",
    [
        {"input_digest": "x"}, {"model_revision": "x"}, {"styles": ("formal",)}, {"seed": 1},
        {"captions_per_image": 1}, {"temperature": 0.5}, {"max_new_tokens": 8}, {"best_of": 4},
    ],
)  # fmt: skip
def test_whatever_decides_captions_decides_the_identity(other: dict[str, Any]) -> None:
    assert replace(SETTINGS, **other).identity != SETTINGS.identity
    assert replace(SETTINGS).identity == SETTINGS.identity


def test_seeds_depend_on_the_row_and_nothing_else() -> None:
    seeds = {
        SETTINGS.row_seed(row_id, style, candidate)
        for row_id in ("1", "12", "2", "")
        for style, candidate in SETTINGS.versions
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert replace(SETTINGS, seed=1).row_seed("1", "formal", 0) not in seeds
    # the numbers themselves are part of the contract: a resumed run must draw the same
    assert SETTINGS.row_seed("1", "formal", 0) == 6232203139904229659


# --- planning -----------------------------------------------------------------------------------


def test_a_plan_is_found_again(output: str, catalog: FrozenCatalog) -> None:
    assert runs.find_run(output, SETTINGS) is None
    run = runs.plan_run(output, SETTINGS, catalog)
    assert runs.find_run(output, SETTINGS) == Found(run.uri, False, run)
    assert runs.find_run(output, replace(SETTINGS, seed=1)) is None
    assert run.missing_units() == [0, 1, 2]
    assert [run.unit_rows(unit) for unit in range(3)] == [32, 32, 6]
    assert run.read_unit(2, ["id"])["id"].to_pylist() == [str(number) for number in range(64, 70)]


@pytest.mark.parametrize(
    "left",
    [["_plan/identity"], ["_plan/identity", "_plan/unit-00001.parquet"]],
)
def test_a_kill_while_planning_leaves_nothing_that_is_misread(
    output: str, catalog: FrozenCatalog, left: list[str]
) -> None:
    killed = runs.plan_run(output, SETTINGS, catalog)
    for name in listing(killed) - set(left):
        killed.filesystem.delete_file(f"{killed.path}/{name}")
    found = runs.find_run(output, SETTINGS)
    assert found == Found(killed.uri, False, None)
    again = runs.plan_run(output, SETTINGS, catalog, found.uri)
    assert again.uri == killed.uri
    fill(again)
    assert not again.verify().wrong


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(
    output: str, catalog: FrozenCatalog
) -> None:
    settings = [replace(SETTINGS, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda s: runs.plan_run(output, s, catalog), settings))
    assert len({run.uri for run in made}) == 6
    assert [runs.find_run(output, s) for s in settings] == [Found(r.uri, False, r) for r in made]


# --- parts --------------------------------------------------------------------------------------


def test_failed_rows_are_listed_whole_before_the_part_is_there(run: Run) -> None:
    run.write_part(0, part(run, 0, failed=("3", "9")), {})
    with run.filesystem.open_input_file(f"{run.path}/errors/part-00000.parquet") as file:
        errors = pq.read_table(file).to_pylist()
    assert [(row["id"], row["shelf"], row["error_class"]) for row in errors] == [
        ("3", "3", "gone"), ("9", "4", "gone"),
    ]  # fmt: skip
    # killed between the two, and the image was back on the second attempt
    run.filesystem.delete_file(f"{run.path}/data/part-00000.parquet")
    assert 0 in run.missing_units()
    run.write_part(0, part(run, 0), {})
    assert "errors/part-00000.parquet" not in listing(run)


def test_a_part_that_is_there_is_not_touched(run: Run) -> None:
    run.write_part(1, part(run, 1), {"caption": 1.0})
    path = f"{run.path}/data/part-00001.parquet"
    before = run.filesystem.get_file_info(path).mtime_ns, run.read_part(1).schema.metadata
    run.write_part(1, part(run, 1), {"caption": 2.0})
    after = run.filesystem.get_file_info(path).mtime_ns, run.read_part(1).schema.metadata
    assert before == after


def changed(**values: object) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        for name, value in values.items():
            field = rows.schema.field(name)
            column = pa.array([value, *rows[name].to_pylist()[1:]], field.type)
            rows = rows.set_column(rows.schema.get_field_index(name), field, column)
        return rows

    return change


WRONG: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a row is missing": lambda rows: rows.slice(1),
    "all is double": lambda rows: pa.concat_tables([rows, rows]),
    "another order": lambda rows: rows.take(list(range(rows.num_rows))[::-1]),
    "a foreign id": changed(id="x"),
    "a column is missing": lambda rows: rows.drop_columns("shelf"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_are_not_the_units_are_not_written(run: Run, wrong: str) -> None:
    with pytest.raises(RunError, match="unit 1"):
        run.write_part(1, WRONG[wrong](part(run, 1)), {})
    assert run.missing_units() == [0, 1, 2]


# --- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [*WRONG, "another style", "half-written", "empty", "unlisted"])
def test_verification_finds(run: Run, wrong: str) -> None:
    fill(run, "33")
    found = run.verify()
    assert not found.wrong and found.images == 70 and found.rows == 280
    assert found.statuses == {"captioned": 276, "failed": 4} and found.error_classes == {"gone": 1}
    name = "data/part-00001.parquet"
    rows = run.read_part(1)
    sink = pa.BufferOutputStream()
    change = {**WRONG, "another style": changed(style="formal")}.get(wrong, lambda rows: rows)
    pq.write_table(change(rows), sink)
    data = sink.getvalue().to_pybytes()
    if wrong == "unlisted":
        run.filesystem.delete_file(f"{run.path}/errors/part-00001.parquet")
    put(run, name, {"half-written": data[: len(data) // 2], "empty": b""}.get(wrong, data))
    assert list(run.verify().wrong) == [1]
    run.discard([1])
    assert run.missing_units() == [1] and run.verify().wrong == {1: "is missing"}
    fill(run, "33")
    assert not run.verify().wrong


def test_what_is_no_part_is_moved_away(run: Run) -> None:
    fill(run, "33")
    expected = listing(run)
    foreign = [
        "data/extra.parquet", "data/part-00003.parquet", "data/deep/part-00000.parquet",
        "errors/notes.txt", "data/.part-1.parquet", "data/part-00001.parquet.tmp",
    ]  # fmt: skip
    half_written = [f"data/.part-00001.parquet.{'0' * 32}", f".summary.json.{'a' * 32}"]
    for name in [*foreign, *half_written]:
        put(run, name, b"PAR1")
    assert sorted(run.set_aside_foreign()) == sorted(foreign)
    kept = listing(run)
    assert {name for name in kept if not name.startswith("_foreign/")} == expected
    assert len(kept) == len(expected) + len(foreign)
    assert run.set_aside_foreign() == []


def summary(run: Run) -> dict[str, Any]:
    """The least that the report and the card ask for."""
    return {
        "run_id": run.run_id,
        "finished_at": "2026-01-01T00:00:00+00:00",
        "counts": {"images": 70, "rows": 280, "statuses": {"captioned": 280}, "error_classes": {},
                   "needs_review": 0, "foreign_files": []},
        "rates": {"images_this_session": 0, "seconds_this_session": 1.0, "images_per_second": 0.0,
                  "failed_share": 0.0},
        "seconds_per_stage": {}, "bottleneck": None, "versions": {},
        "started_at": "2026-01-01T00:00:00+00:00", "planned_at": run.created_at,
        "identity": run.settings.identity, "uri": run.uri,
        "configuration": {"images": None, "model": None},
        "settings": {"styles": ["colloquial", "formal"], "model_revision": "r", "seed": 0,
                     "captions_per_image": 2, "temperature": None, "max_new_tokens": None,
                     "best_of": None},
        "input": {"digest": "d", "rows": 70, "units": 3},
    }  # fmt: skip


def test_scores_are_counted_and_their_ends_kept_in_whatever_order_parts_come() -> None:
    random = np.random.default_rng(0)
    parts = {}
    for unit in range(5):
        scores = np.float32((random.integers(0, 40, 30) + 0.5) / 40)  # some of them equal
        parts[unit] = pa.table({
            "id": [f"{unit}-{row}" for row in range(30)],
            "style": ["colloquial", "formal", "humorous"] * 10,
            "status": (["captioned"] * 5 + ["carried_over"]) * 5,
            "caption_score": pa.array(
                [None if row % 3 == 1 else score for row, score in enumerate(scores)], pa.float32()
            ),
        })  # fmt: skip
    rows = [row | {"unit": unit} for unit, part in parts.items() for row in part.to_pylist()]
    made = [row for row in rows if row["caption_score"] is not None]
    first: dict[float, Any] = {}
    for row in sorted(made, key=lambda row: (row["caption_score"], row["unit"])):
        if row["status"] == "captioned":
            first.setdefault(row["caption_score"], row)
    found = []
    for order in (range(5), [3, 1, 4, 0, 2]):
        verification = runs.Verification()
        for unit in order:
            verification.add_scores(unit, parts[unit])
        found.append((verification.scores, verification.lowest, verification.highest))
    assert found[0] == found[1]
    counts, lowest, highest = found[0]
    assert {style: sum(numbers) for style, numbers in counts.items()} == Counter(
        row["style"] for row in made
    )
    assert counts["humorous"][19] == sum(
        row["caption_score"] >= 0.95 for row in made if row["style"] == "humorous"
    )
    distinct = list(first.values())
    ends = (lowest, distinct[: runs.EXTREMES]), (highest, distinct[-runs.EXTREMES :])
    for kept, expected in ends:
        assert [(k.score, k.unit) for k in kept] == [
            (row["caption_score"], row["unit"]) for row in expected
        ]
    empty = runs.Verification()
    empty.add_scores(0, parts[0].slice(0, 0))
    assert (empty.scores, empty.lowest, empty.highest) == ({}, [], [])


def test_a_published_run_is_found_as_finished_and_has_no_plan(output: str, run: Run) -> None:
    fill(run)
    lock_file = runs.lock_path(output, SETTINGS)
    with Lock.acquire(*lock_file) as lock:
        run.publish(summary(run), lock)
    parts = {f"data/part-0000{unit}.parquet" for unit in range(3)}
    assert listing(run) == parts | {"summary.json", "report.html", "README.md", "_SUCCESS"}
    found = runs.find_run(output, SETTINGS)
    assert found == Found(run.uri, True, None) and not runs.has_leftovers(found, lock_file)
    table = pq.read_table(f"{run.path}/data", filesystem=run.filesystem)
    assert table.num_rows == 280 and table.schema.names == ["shelf", *OUTPUT.names]
    # a kill before the plan was deleted
    put(run, "_plan/identity", SETTINGS.identity.encode())
    put(run, "_plan/unit-00000.parquet", b"")
    assert runs.find_run(output, SETTINGS) == found and runs.has_leftovers(found, lock_file)
    runs.clean(found.uri)
    assert not runs.has_leftovers(found, lock_file)


def test_a_run_whose_lock_is_lost_is_not_published(output: str, run: Run) -> None:
    fill(run)
    filesystem, path = runs.lock_path(output, SETTINGS)
    with Lock.acquire(filesystem, path) as lock:
        filesystem.delete_file(path)
        with pytest.raises(LockError, match="deleted"):
            run.publish(summary(run), lock)
    assert "_SUCCESS" not in listing(run) and "_plan/run.json" in listing(run)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    filesystem, path = resolve_filesystem(str(tmp_path / "a" / "b.parquet"))
    with pytest.raises(TypeError):
        runs.write_atomically(filesystem, path, "text")  # type: ignore[arg-type]
    assert list((tmp_path / "a").iterdir()) == []


# --- the lock -----------------------------------------------------------------------------------


@pytest.fixture
def place(output: str) -> tuple[fs.FileSystem, str]:
    return runs.lock_path(output, SETTINGS)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths."""
    monkeypatch.setattr(locks, "LEASE_S", 1.5)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.2)


def rewrite(place: tuple[fs.FileSystem, str], **owner: object) -> None:
    """Gives the lock file to an owner that differs in these."""
    cell = locks.cell(*place)
    held = cell.read()
    assert held is not None
    assert cell.swap(held[1], json.dumps({**json.loads(held[0]), **owner}).encode())


def exists(place: tuple[fs.FileSystem, str]) -> bool:
    return bool(place[0].get_file_info(place[1]).type == fs.FileType.File)


def test_a_living_owner_is_named(place: tuple[fs.FileSystem, str]) -> None:
    with Lock.acquire(*place) as lock:
        with pytest.raises(LockError, match=f"process {os.getpid()} on "):
            Lock.acquire(*place)
        lock.check(now=True)
    assert not exists(place)
    Lock.acquire(*place).release()


def test_one_of_many_gets_it(place: tuple[fs.FileSystem, str]) -> None:
    start = threading.Barrier(8)

    def acquire(_: int) -> Lock | None:
        start.wait()
        try:
            return Lock.acquire(*place)
        except LockError:
            return None

    with ThreadPoolExecutor(8) as pool:
        got = [lock for lock in pool.map(acquire, range(8)) if lock is not None]
    assert len(got) == 1
    got[0].check(now=True)
    got[0].release()


DEAD_OWNER = """
import sys, os
from stylegan.catalog import resolve_filesystem
from stylegan.lock import Lock
Lock.acquire(*resolve_filesystem(sys.argv[1]))
os._exit(9)
"""


def test_a_dead_owner_on_this_host_is_replaced_at_once(output: str) -> None:
    uri = f"{output}/_LOCK-dead"
    killed = subprocess.run([sys.executable, "-c", DEAD_OWNER, uri], cwd=Path(__file__).parents[1])
    place = resolve_filesystem(uri)
    assert killed.returncode == 9 and exists(place)
    began = time.monotonic()
    with Lock.acquire(*place) as lock:
        lock.check(now=True)
    assert time.monotonic() - began < 2


def test_a_process_number_that_is_used_again_is_another_process(
    place: tuple[fs.FileSystem, str]
) -> None:
    first = Lock.acquire(*place)
    rewrite(place, process_started="1")
    with Lock.acquire(*place) as second:
        second.check(now=True)
        with pytest.raises(LockError, match="taken over by process"):
            first.check(now=True)
        first.release()  # does not take the other's away
        second.check(now=True)


@pytest.mark.usefixtures("hasty")
def test_a_silent_owner_elsewhere_is_waited_for(place: tuple[fs.FileSystem, str]) -> None:
    Lock.acquire(*place)._released.set()  # beats no more, and leaves its file
    rewrite(place, host="elsewhere")
    said: list[str] = []
    began = time.monotonic()
    with Lock.acquire(*place, say=said.append) as lock:
        assert 1.4 < time.monotonic() - began < 10
        lock.check(now=True)
    assert len(said) == 1 and "elsewhere" in said[0]


@pytest.mark.usefixtures("hasty")
def test_a_beating_owner_elsewhere_is_respected(
    place: tuple[fs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lock.acquire(*place) as lock:
        monkeypatch.setattr(locks, "_host", lambda: "this other host")
        with pytest.raises(LockError, match="another job works on this run: process"):
            Lock.acquire(*place, say=lambda _: None)
        lock.check(now=True)


@pytest.mark.usefixtures("hasty")
def test_a_lock_file_that_was_written_half_does_not_block_for_ever(
    place: tuple[fs.FileSystem, str]
) -> None:
    locks.cell(*place).swap(None, b'{"host": "x"')
    said: list[str] = []
    with Lock.acquire(*place, say=said.append) as lock:
        lock.check(now=True)
    assert "left no name" in said[0]


def test_storage_without_conditional_writes_has_a_lock_too(tmp_path: Path) -> None:
    place = resolve_filesystem(f"local://{tmp_path}/_LOCK-plain")  # through fsspec
    assert place[0].type_name != "local"
    with Lock.acquire(*place) as lock:
        lock.check(now=True)
        with pytest.raises(LockError, match=f"process {os.getpid()} on "):
            Lock.acquire(*place)
    assert not exists(place)
