"""The job on file systems that are neither disk nor S3: Google's (an emulator), and fsspec's."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from test_shards import pack

from jobs.caption import main
from stylegan import publish
from stylegan.catalog import fetch_image, freeze_catalog, resolve_filesystem
from stylegan.lock import Lock, LockError
from stylegan.storage import staged

# Ray Data sets its own deprecated options when it copies them
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

SERVER = (
    "import sys; from gcp_storage_emulator.server import create_server as create;"
    "create('127.0.0.1', int(sys.argv[1]), in_memory=True, default_bucket='shop').run()"
)


@pytest.fixture(scope="session")
def gs() -> Iterator[str]:
    """The URI of an empty bucket of an emulator in its own process, for subprocesses too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER, str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/", timeout=5):
                    break
                time.sleep(0.1)
            yield "gs://shop"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(params=["gs", "fsspec"])
def place(request: pytest.FixtureRequest, gs: str, tmp_path: Path) -> str:
    if request.param == "gs":
        return f"{gs}/{tmp_path.name}"
    return f"local://{tmp_path}"  # fsspec's own, on disk: every process sees the same


def put(uri: str, data: bytes) -> None:
    filesystem, path = resolve_filesystem(uri)
    if filesystem.type_name != "gcs":
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


@pytest.mark.slow
@pytest.mark.usefixtures("gs", "local_ray")
def test_images_model_and_output_elsewhere(
    place: str, shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_model.iterdir():
        put(f"{place}/model/{path.name}", path.read_bytes())
    photographs = [f"{number:03}" for number in range(40) if number not in (27, 37, 38)]
    files: list[tuple[str, bytes | str]] = []
    for key in photographs:
        files += [(f"{key}.jpg", (shop.parent / f"{key}.jpg").read_bytes())]
        files += [(f"{key}.txt", "Blue shirt")] * (key < "030")
    put(f"{place}/tars/a-0.tar", pack(files))
    put(f"{place}/tars/a-1.tar", pack([("z.txt", "No image")]))
    night = [
        "--images", f"{place}/tars", "--model", f"{place}/model", "--output", f"{place}/captions",
        "--previous", "latest", "--export", "hub", "--export-images",
    ]  # fmt: skip
    assert main(night) == 0
    capsys.readouterr()
    filesystem, root = resolve_filesystem(f"{place}/captions")
    first = publish.read_latest(f"{place}/captions")
    table = pq.read_table(f"{root}/{first}/data", filesystem=filesystem, partitioning=None)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert sorted(rows) == [*photographs, "z"]
    assert {key for key, row in rows.items() if row["status"] == "failed"} == {"007", "017", "z"}
    assert rows["z"]["error_class"] == "gone" and rows["002"]["description"] == "Blue shirt"
    names = {
        info.path.removeprefix(f"{root}/{first}/")
        for info in filesystem.get_file_info(fs.FileSelector(f"{root}/{first}", recursive=True))
        if info.type == fs.FileType.File
    }
    exported = "export-hub-images/data/train-00000-of-00001.parquet"
    assert {exported, "_SUCCESS", "export-hub-images/_SUCCESS", "report.html"} <= names
    assert not [name for name in names if "_plan" in name or "_EXPORTING" in name]
    with filesystem.open_input_file(f"{root}/{first}/{exported}") as file:
        images = pq.read_table(file)["image"].to_pylist()
    assert sum(image is not None for image in images) == 35

    # the second night: one shard is new, the other is known by size and time
    put(f"{place}/tars/a-2.tar", pack([("new.jpg", (shop.parent / "040.jpg").read_bytes())]))
    assert main([*night[:-3], "--keep-runs", "1"]) == 0
    second = publish.read_latest(f"{place}/captions")
    assert second != first
    with filesystem.open_input_stream(f"{root}/{second}/summary.json") as stream:
        changes = json.loads(stream.read())["changes"]
    assert (changes["carried_over"], changes["new"], changes["changed"]) == (35, 1, 0)
    assert publish.finished_runs(f"{place}/captions") == [second]


def test_shards_locks_and_missing_files_elsewhere(place: str, tmp_path: Path) -> None:
    files = {f"{number}.jpg": bytes([number]) * (number * 700) for number in range(9)}
    put(f"{place}/tars/a.tar", pack(files.items()))
    found = freeze_catalog(f"{place}/tars", tmp_path / "units", identify="stamp")
    rows = pq.read_table(found.units[0]).to_pylist()
    images = [fetch_image(row["_image_uri"]) for row in rows]
    assert [image.data for image in images] == list(files.values())
    assert [image.stamp for image in images] == [row["_image_stamp"] for row in rows]

    with staged(f"{place}/large/b.bin") as path:
        path.write_bytes(b"0123456789" * 1_000_000)
    filesystem, root = resolve_filesystem(place)
    assert filesystem.get_file_info(f"{root}/large/b.bin").size == 10_000_000
    lock = f"{root}/runs/_LOCK-a"
    with (
        Lock.acquire(filesystem, lock),
        pytest.raises(LockError, match=f"process {os.getpid()}"),
    ):
        Lock.acquire(filesystem, lock)
    assert filesystem.get_file_info(lock).type == fs.FileType.NotFound
    assert fetch_image(f"{place}/nothing.jpg").error_class == "gone"
    assert fetch_image(f"{place}/nothing.tar#bytes=0-1023").error_class == "gone"
