"""The nightly job as a command: nothing or little changed, failures, kills, broken storage."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faulty_proxy import FaultyProxy
from pyarrow import fs
from test_nightly import GONE_MODEL, Shop, finish, names, plan, put

from jobs.caption import main
from stylegan import lock as locks
from stylegan import previous, publish, storage
from stylegan.catalog import resolve_filesystem

ROOT = Path(__file__).parents[1]

# Ray Data sets its own deprecated options when it copies them
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


def latest(output: str) -> list[dict[str, Any]]:
    """The rows of the current run, in order of id and version."""
    filesystem, root = resolve_filesystem(output)
    name = publish.read_latest(output)
    assert name and name in publish.finished_runs(output)
    table = pq.read_table(f"{root}/{name}/data", filesystem=filesystem, partitioning=None)
    keys = ["id", "style", "seed"]
    return list(table.sort_by([(key, "ascending") for key in keys]).to_pylist())


def summary(output: str) -> dict[str, Any]:
    filesystem, root = resolve_filesystem(output)
    with filesystem.open_input_stream(
        f"{root}/{publish.read_latest(output)}/summary.json"
    ) as stream:
        found: dict[str, Any] = json.loads(stream.read())
    return found


# --- without a model, without Ray: nothing changed ----------------------------------------------


def line(shop: Shop, output: str, *more: str) -> list[str]:
    return [
        "--images", shop.manifest(), "--output", output, "--model", str(GONE_MODEL["uri"]),
        "--style", "colloquial,formal", "--captions-per-image", "2", "--previous", "latest", *more,
    ]  # fmt: skip


def captions(output: str) -> list[tuple[str, str, str]]:
    return [(row["id"], row["style"], row["caption"]) for row in latest(output)]


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    endpoint = storage.endpoint()
    assert endpoint is not None
    with FaultyProxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def bury(output: str) -> None:
    """What this process left as the owner of locks is now a dead process's."""
    filesystem, root = resolve_filesystem(output)
    for name in names(output, "_"):
        cell = locks.cell(filesystem, f"{root}/{name}")
        held = cell.read()
        assert held is not None
        owner = {**json.loads(held[0]), "process_started": "1"}
        assert cell.swap(held[1], json.dumps(owner).encode())


def is_whole(output: str) -> bool:
    """Whether `latest` names a run with all its rows."""
    name = publish.read_latest(output)
    return name in publish.finished_runs(output) and len(captions(output)) == 160


@pytest.mark.timeout(1200)
@pytest.mark.slow
@pytest.mark.parametrize("step", [23, 7])
def test_death_after_any_write_is_mended_by_the_same_command(
    s3: str, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, step: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(previous, "BUCKET_ROWS", 15)
    monkeypatch.setattr(previous, "CARRIED_ROWS", 15)
    monkeypatch.setattr(storage, "SDK_ATTEMPTS", 1)
    monkeypatch.setattr(storage, "PATIENCE_S", 60.0)
    shop, output = Shop(f"{s3}/{tmp_path.name}", 40), f"{s3}/{tmp_path.name}/captions"
    for _ in range(2):
        finish(plan(shop, output, scratch=tmp_path), output)
    expected = captions(output)
    command = line(shop, output, "--keep-runs", "2")
    count, writes = 0, 3
    while True:
        before = publish.read_latest(output)
        proxy.writes_left = writes
        monkeypatch.setattr(storage, "PATIENCE_S", -1.0)
        code = main(command)
        has_died = proxy.writes_left == 0
        proxy.writes_left = None
        monkeypatch.setattr(storage, "PATIENCE_S", 60.0)
        assert is_whole(output), (writes, capsys.readouterr().err)
        if has_died:
            count += 1
            bury(output)
            assert main(command) == 0, (writes, capsys.readouterr().err)
        else:
            assert code == 0, capsys.readouterr().err
        assert is_whole(output) and captions(output) == expected
        now = publish.read_latest(output)
        assert now and before and now > before
        left = names(output)
        runs = {name for name in left if name.startswith("run=")}
        assert left == runs | {"latest"}, writes
        unfinished = runs - set(publish.finished_runs(output))
        assert not unfinished and len(runs) == 2, writes
        filesystem, root = resolve_filesystem(output)
        found = filesystem.get_file_info(fs.FileSelector(f"{root}/{now}"))
        assert {info.base_name for info in found} <= {
            "data", "errors", "README.md", "report.html", "summary.json", "_SUCCESS",
        }  # fmt: skip
        if not has_died:
            break
        writes += step
    assert count > 30 // step, count


MOMENTS = {
    "planning": r"run=[^/]*/_plan/unit-00000",
    "planned": r"run=[^/]*/_plan/run\.json",
    "carrying": r"run=[^/]*/data/part",
    "publishing": r"run=[^/]*/summary\.json",
    "published": r"run=[^/]*/_SUCCESS",
    "pruning": r"_PRUNING",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_night_goes_on(tmp_path: Path, moment: str) -> None:
    """SIGKILL on disk, and a reader that looks at `latest` all the time."""
    shop, output = Shop(str(tmp_path), 40), str(tmp_path / "captions")
    for _ in range(2):
        finish(plan(shop, output, scratch=tmp_path), output)
    expected = captions(output)
    before = {str(path) for path in Path(output).rglob("*")}
    ended, wrong = threading.Event(), []

    def watch() -> None:
        while not ended.wait(0.01):
            name = (Path(output) / "latest").read_text().strip()
            if not (Path(output) / name / "_SUCCESS").exists():
                wrong.append(name)

    def is_there() -> bool:
        with contextlib.suppress(FileNotFoundError):
            new = {str(path) for path in Path(output).rglob("*")} - before
            return any(re.search(MOMENTS[moment], path) for path in new)
        return False

    command = line(shop, output, "--keep-runs", "2")
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.caption", *command], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not is_there() and job.poll() is None:
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
        said = job.communicate()[1]
        # pruning is over in a moment: a job that was not hit has done all there is to do
        assert job.returncode in (-signal.SIGKILL, 0), said
        assert main(command) == 0
    finally:
        ended.set()
        watcher.join()
    assert not wrong
    assert captions(output) == expected
    # a kill may leave a half-written `latest` under a hidden name, which nobody reads
    left = {name for name in names(output) if not re.fullmatch(r"\.latest\.[0-9a-f]{32}", name)}
    runs = {name for name in left if name.startswith("run=")}
    assert left == runs | {"latest"} and runs == set(publish.finished_runs(output))
    assert len(runs) == 2


def test_rows_to_caption_need_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop, output = Shop(str(tmp_path), 40), str(tmp_path / "captions")
    finish(plan(shop, output, scratch=tmp_path), output)
    shop.add("new")
    assert main(line(shop, output)) == 2
    assert "--model /gone/model is gone, and 1 images have to be captioned" in (
        capsys.readouterr().err
    )
    del shop.rows["new"]
    assert main(line(shop, output)) == 0
    assert "40 of 40 images are carried over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--previous", "nowhere"], "nowhere is no finished run"),
        (["--retry-failed"], "--retry-failed needs --previous"),
        (["--rollback", "1999"], "run=1999 is no finished run below"),
        (["--max-failed-share", "2"], "'2'"),
        (["--keep-runs", "0"], "'0'"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["--images", "x", "--output", str(tmp_path / "out"), *more])
    except SystemExit as error:  # argparse
        code = error.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code == 2 and message in said.splitlines()[-1], said


def test_rollback_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop, output = Shop(str(tmp_path), 40), str(tmp_path / "captions")
    first = plan(shop, output, scratch=tmp_path)
    finish(first, output)
    shop.photograph("0001", b"a bad photo")
    second = plan(shop, output, scratch=tmp_path)
    finish(second, output)
    assert main(["--output", output, "--rollback", first.run_id]) == 0
    assert f"latest is run={first.run_id} again" in capsys.readouterr().out
    assert (tmp_path / "captions/latest").read_text() == f"run={first.run_id}\n"


# --- with a model, on Ray -----------------------------------------------------------------------


def real(shop: Path | str, model: Path, output: Path | str, *more: str) -> list[str]:
    return [
        "--images", str(shop), "--id-column", "sku", "--image-column", "photo",
        "--description-column", "title", "--model", str(model), "--output", str(output), *more,
    ]  # fmt: skip


@pytest.fixture
def own_shop(shop: Path, tmp_path: Path) -> Path:
    """A copy of the first 80 products of the shop, to change."""
    folder = tmp_path / "shop"
    shutil.copytree(shop.parent, folder)
    rows = shop.read_text().splitlines()[:81]
    (folder / shop.name).write_text("\n".join(rows) + "\n")
    return folder / shop.name


def same(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("status", "run_id")}


@pytest.mark.usefixtures("local_ray")
def test_nights(
    own_shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "model", str(tmp_path / "captions")
    shutil.copytree(tiny_model, model)
    # the first night has no previous one
    night = real(own_shop, model, output, "--previous", "latest", "--keep-runs", "3")
    assert main(night) == 0
    assert "no run is complete below" in capsys.readouterr().err
    first = latest(output)
    assert Counter(row["status"] for row in first) == {"captioned": 72, "failed": 7, "locked": 1}

    # nothing changed, and nothing is opened: zeros of the same size and time, no model
    kept = {}
    for path in own_shop.parent.glob("*.jpg"):
        status = path.stat()
        kept[path] = path.read_bytes(), status.st_mtime_ns
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    shutil.move(model, tmp_path / "elsewhere")
    assert main(night) == 0
    said = capsys.readouterr().err
    assert "80 of 80 images are carried over" in said and "captioners" not in said
    second = latest(output)
    assert Counter(row["status"] for row in second) == {
        "carried_over": 72, "failed": 7, "locked": 1,
    }  # fmt: skip
    unlocked = [row["id"] for row in first if row["status"] != "locked"]
    old, new = ({row["id"]: row for row in rows} for rows in (first, second))
    assert [old[i]["run_id"] for i in unlocked] == [new[i]["run_id"] for i in unlocked]
    assert [same(old[i]) for i in unlocked] == [same(new[i]) for i in unlocked]
    assert summary(output)["changes"] == {
        "carried_over": 72, "still_failed": 7, "locked": 1, "new": 0, "changed": 0, "retried": 0,
        "gone": 0,
    }  # fmt: skip

    # a little changed; what failed is tried again
    shutil.move(tmp_path / "elsewhere", model)
    for path, (data, mtime) in kept.items():
        path.write_bytes(data)
        os.utime(path, ns=(mtime, mtime))
    (own_shop.parent / "gone-27.jpg").write_bytes(kept[own_shop.parent / "001.jpg"][0])
    with open(own_shop, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[2]["title"] = "Women's green dress"
    del rows[5]
    with open(own_shop, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert main([*night, "--retry-failed"]) == 0
    third = {row["id"]: row for row in latest(output)}
    changes = summary(output)["changes"]
    assert changes == {
        "carried_over": 70, "still_failed": 0, "locked": 1, "new": 0, "changed": 2, "retried": 6,
        "gone": 1,
    }  # fmt: skip
    assert {i for i, row in third.items() if row["status"] == "captioned"} == {"002", "027"}
    told = summary(output)
    assert told["previous_counts"]["statuses"] == {"carried_over": 72, "failed": 7, "locked": 1}
    [pair] = told["replaced"]
    assert pair == {"id": "002", "style": "colloquial", "before": old["002"]["caption"],
                    "after": third["002"]["caption"]}  # fmt: skip
    assert Counter(row["status"] for row in third.values())["failed"] == 6
    # and every caption is the one that a run over everything writes
    assert main(real(own_shop, model, tmp_path / "whole")) == 0
    whole = latest(str(tmp_path / "whole"))
    volatile = ("status", "run_id", "generated_at")
    assert [{k: v for k, v in row.items() if k not in volatile} for row in whole] == [
        {k: v for k, v in third[row["id"]].items() if k not in volatile} for row in whole
    ]


@pytest.mark.usefixtures("local_ray")
def test_too_many_failures_are_a_failed_run(
    own_shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "captions")
    night = real(own_shop, tiny_model, output, "--max-failed-share", "0.07")
    assert main(night) == 1
    said = capsys.readouterr().err
    assert "7 of 80 images failed, more than --max-failed-share 0.07 allows" in said
    assert publish.read_latest(output) is None and not publish.finished_runs(output)
    (own_shop.parent / "gone-27.jpg").write_bytes((own_shop.parent / "001.jpg").read_bytes())
    (own_shop.parent / "gone-77.jpg").write_bytes((own_shop.parent / "001.jpg").read_bytes())
    assert main(night) == 0
    assert "their units are captioned again" in capsys.readouterr().err
    assert Counter(row["status"] for row in latest(output)) == {
        "captioned": 74, "failed": 5, "locked": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("local_ray")
def test_a_job_on_storage_that_fails(
    own_shop: Path, tiny_model: Path, tmp_path: Path, s3: str, proxy: FaultyProxy,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """5 % of all requests fail in some way, and for a while all do. Input, model and output."""
    quiet = str(tmp_path / "quiet")
    assert main(real(own_shop, tiny_model, quiet)) == 0
    place = f"{s3}/{tmp_path.name}"
    for folder, source in (("shop", own_shop.parent), ("model", tiny_model)):
        for path in source.iterdir():
            put(f"{place}/{folder}/{path.name}", path.read_bytes())
    output = f"{place}/captions"
    command = [
        sys.executable, "-m", "jobs.caption",
        *real(f"{place}/shop/{own_shop.name}", Path("x"), output, "--previous", "latest"),
    ]  # fmt: skip
    command[command.index("x")] = f"{place}/model"
    proxy.share = 0.05
    timer = threading.Timer(30, proxy.fall_silent, (30,))
    timer.start()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    proxy.share = 0.0
    timer.join()
    assert len(proxy.failed) > 5, proxy.failed
    expected = {row["id"]: row["caption"] for row in latest(quiet)}
    assert {row["id"]: row["caption"] for row in latest(output)} == expected
    assert {row["status"] for row in latest(output)} == {"carried_over", "failed", "locked"}
