"""The job on a real local Ray: what comes out, and what survives kills, mistakes and crowds."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from process_tree import descendants
from pyarrow import fs
from ray.job_submission import JobSubmissionClient

from jobs.caption import main, parse_arguments, run_job
from stylegan import brand, cluster, run
from stylegan.catalog import resolve_filesystem
from stylegan.cluster import ClusterError, Pool
from stylegan.images import decode_image
from stylegan.lock import RAY_JOB
from stylegan.parts import OUTPUT
from stylegan.progress import Progress

ROOT = Path(__file__).parents[1]
# what may differ between two runs that write the same captions
VOLATILE = ("run_id", "generated_at")

# Ray Data sets its own deprecated options when it copies them
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


def arguments(shop: Path | str, model: Path, output: Path | str, *more: str) -> list[str]:
    return [
        "--images", str(shop), "--id-column", "sku", "--image-column", "photo",
        "--description-column", "title", "--model", str(model), "--output", str(output), *more,
    ]  # fmt: skip


def only_run(output: Path | str) -> tuple[fs.FileSystem, str]:
    """The one run directory below an output."""
    filesystem, root = resolve_filesystem(str(output))
    found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    runs = [info.path for info in found if info.base_name.startswith("run=")]
    assert len(runs) == 1, [info.path for info in found]
    return filesystem, runs[0]


def files(filesystem: fs.FileSystem, path: str) -> dict[str, tuple[int, str]]:
    """Name → modification time and hash of each file below a directory."""
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    found = {}
    for info in filesystem.get_file_info(selector):
        with contextlib.suppress(FileNotFoundError):
            if info.type == fs.FileType.File:
                with filesystem.open_input_stream(info.path) as stream:
                    digest = hashlib.sha256(stream.read()).hexdigest()
                found[info.path.removeprefix(path).strip("/")] = info.mtime_ns, digest
    return found


def captions(output: Path | str) -> list[dict[str, Any]]:
    """The rows of the finished run, in order of id, without what may differ."""
    filesystem, path = only_run(output)
    there = set(files(filesystem, path))
    assert {"_SUCCESS", "summary.json", "report.html", "README.md"} <= there
    assert not [name for name in there if name.startswith("_") and name != "_SUCCESS"]
    table = pq.read_table(f"{path}/data", filesystem=filesystem)
    keys = [("sku", "ascending"), ("style", "ascending"), ("seed", "ascending")]
    return list(table.drop_columns(list(VOLATILE)).sort_by(keys).to_pylist())


# --- what comes out -----------------------------------------------------------------------------


def test_every_row_comes_out_once_with_caption_or_reason(quiet: Path, shop: Path) -> None:
    rows = {row["id"]: row for row in captions(quiet)}
    assert sorted(rows) == [f"{number:03}" for number in range(260)]
    path = only_run(quiet)[1]
    schema = pq.read_schema(f"{path}/data/part-00000.parquet")
    inputs = ["sku", "photo", "title", "price", "caption_locked"]
    assert schema.names == [*inputs, *OUTPUT.names]
    assert {str(field.type) for field in schema if field.name in inputs} == {"string", "bool"}

    reasons = collections.Counter(row["error_class"] for row in rows.values())
    assert reasons == {None: 239, "truncated": 6, "not an image": 5, "gone": 10}
    captioned, failed = rows["000"], rows["007"]
    data = (shop.parent / "000.jpg").read_bytes()
    image = decode_image(data, 48)
    assert captioned["status"] == "captioned" and captioned["caption"]
    assert captioned["image_sha256"] == hashlib.sha256(data).hexdigest()
    assert (captioned["width"], captioned["height"]) == (image.width, image.height)
    assert captioned["description"] == "Men's blue shirt no. 0" and captioned["price"] == "0.50"
    assert failed["status"] == "failed" and failed["caption"] is None
    assert failed["error_message"] and failed["fingerprint"]
    # a description without an image is rewritten, a person's caption stays
    assert rows["037"]["status"] == "captioned" and rows["037"]["image_sha256"] is None
    assert rows["038"]["error_class"] == "gone"
    assert rows["047"]["status"] == "locked" and rows["047"]["caption"] == "A person wrote this."
    assert len({row["seed"] for row in rows.values() if row["seed"] is not None}) == 234

    listed = pq.read_table(f"{path}/errors").to_pylist()
    assert {row["id"] for row in listed} == {i for i, r in rows.items() if r["status"] == "failed"}
    assert all(row["error_message"] and "_image_uri" in row and row["price"] for row in listed)


def test_the_summary_counts_what_is_there(quiet: Path) -> None:
    path = only_run(quiet)[1]
    summary = json.loads(Path(path, "summary.json").read_text())
    rows = captions(quiet)
    counts = summary["counts"]
    assert counts["images"] == counts["rows"] == len(rows) == 260
    assert counts["statuses"] == collections.Counter(row["status"] for row in rows)
    assert sum(counts["error_classes"].values()) == counts["statuses"]["failed"] == 21
    assert summary["configuration"]["batch_size"] is None and summary["versions"]["ray"]
    assert set(summary["seconds_per_stage"]) == {"read", "decode", "caption", "write"}
    busy = summary["busy_shares"]
    assert summary["bottleneck"] == max(busy, key=busy.__getitem__) and max(busy.values()) <= 1
    rates = summary["rates"]
    assert rates["images_per_second_at_work"] and rates["images_per_second_per_actor"] > 0
    assert rates["cost_this_session"] is rates["cost_per_million"] is None  # there is no price
    scored = sorted(row["caption_score"] for row in rows if row["caption_score"] is not None)
    scores = summary["scores"]
    assert sum(scores["counts"]["colloquial"]) == len(scored) > 0
    assert (scores["lowest"][0]["score"], scores["highest"][0]["score"]) == (scored[0], scored[-1])
    assert Path(path, "_SUCCESS").read_text() == summary["identity"]
    assert sorted(os.listdir(quiet)) == ["latest", Path(path).name]  # no lock
    assert Path(quiet, "latest").read_text() == f"{Path(path).name}\n"


def test_the_same_command_again_writes_nothing(
    quiet: Path, shop: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(*resolve_filesystem(str(quiet)))
    # neither batch size nor actors make it another run
    assert main(arguments(shop, tiny_model, quiet, "--batch-size", "5", "--actors", "1")) == 0
    assert files(*resolve_filesystem(str(quiet))) == before
    assert "finished already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch_size", "actors"),
    [
        ("7", "1"),
        pytest.param("1", "2", marks=pytest.mark.slow),
        pytest.param("64", "1,2", marks=pytest.mark.slow),
    ],
)
def test_batch_size_and_actors_change_no_caption(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, batch_size: str, actors: str
) -> None:
    more = ["--batch-size", batch_size, "--actors", actors, "--limit", "70"]
    assert main(arguments(shop, tiny_model, tmp_path, *more)) == 0
    assert captions(tmp_path) == captions(quiet)[:70]


@pytest.mark.usefixtures("local_ray")
def test_styles_and_captions_per_image_on_object_storage(
    quiet: Path, shop: Path, tiny_model: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filesystem = resolve_filesystem(s3)[0]
    for source in shop.parent.iterdir():
        with filesystem.open_output_stream(f"shop/products/{source.name}") as stream:
            stream.write(source.read_bytes())
    output = f"{s3}/several"
    line = arguments(
        f"{s3}/products/{shop.name}", tiny_model, output,
        "--style", "colloquial,formal", "--captions-per-image", "2", "--limit", "50",
    )  # fmt: skip
    assert main(line) == 0
    rows = captions(output)
    assert len(rows) == 50 * 2 * 2
    first = {r["id"]: r for r in captions(quiet) if int(r["id"]) < 50}
    for row in rows:
        same = row["style"] == "colloquial" and row["seed"] == first[row["id"]]["seed"]
        if same and row["status"] == "captioned":
            # the fingerprint knows the image by its size and time on disk, by its ETag there
            other = {name: row[name] for name in ("photo", "fingerprint")}
            assert row == {**first[row["id"]], **other}
    assert len({(row["id"], row["style"], row["seed"]) for row in rows if row["seed"]}) == 4 * 45
    capsys.readouterr()
    before = files(filesystem, "shop/several")
    assert main(line) == 0 and files(filesystem, "shop/several") == before
    assert "finished already" in capsys.readouterr().err


# --- what is wrong is said in a line ------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--style", "pirate"], "--style pirate is unknown: this model writes formal, colloquial"),
        (["--model", "nowhere"], "no model directory"),
        (["--images", "nowhere.csv"], "nowhere.csv"),
        (["--id-column", "title"], "title"),
        (["--actors", "9"], "--actors asks for 9, and 3 fit: 4 CPUs"),
        (["--gpus-per-actor", "0.5"], "the cluster has no GPU"),
        (["--actors", "3,2"], "MIN is more than MAX"),
        (["--temperature", "hot"], "'hot'"),
        (["--captions-per-image", "0"], "'0'"),
        (["--style", "formal,formal"], "each style once"),
        (["--output", f"{__file__}/below"], "test_caption_job.py/below cannot be used"),
        (["--output", "s3://no-such-bucket/captions"], "NoSuchBucket"),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_bad_input_ends_with_code_2_and_one_line(
    shop: Path, tiny_model: Path, tmp_path: Path, more: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    try:
        code = main(arguments(shop, tiny_model, tmp_path / "out", *more))
    except SystemExit as error:  # argparse
        code = error.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code == 2 and message in said.splitlines()[-1], said
    assert not list(tmp_path.glob("out/*"))


def test_a_relative_output_under_a_submitted_job_is_refused(
    shop: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(RAY_JOB, "{}")
    assert main(arguments(shop, tiny_model, "captions")) == 2
    assert "give an s3:// URI or an absolute path" in capsys.readouterr().err


@pytest.mark.usefixtures("local_ray")
def test_an_error_in_a_stage_ends_with_code_1_and_its_cause(
    shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert main(arguments(shop, broken, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "Safetensor" in said and "the same command goes on" in said
    assert "ray/data" not in said and len(said.splitlines()) < 6
    # mended, it goes on in the same directory: the weights are part of the identity
    assert not list(tmp_path.glob("out/_LOCK*"))


def pools(
    nodes: list[tuple[float, float]], actors: tuple[int, int] | None = None,
    gpus: float | None = None, is_local: bool = False,
) -> Pool:  # fmt: skip
    return cluster.choose_pool(
        nodes, actors, gpus, read_cpus=0.5, write_cpus=0.1, is_local=is_local
    )


def test_the_pool_leaves_room_to_read_and_write() -> None:
    assert pools([(2, 0)]) == Pool((1, 1), 1, 0)
    assert pools([(16, 0)]) == Pool((8, 8), 15, 0)
    assert pools([(16, 0), (16, 0)]) == Pool((16, 16), 31, 0)
    assert pools([(8, 0)], (2, 99)) == Pool((2, 7), 11, 0)
    assert pools([(4, 0), (16, 4)]) == Pool((4, 4), 31, 1)
    assert pools([(16, 4)], gpus=0.5) == Pool((8, 8), 15, 0.5)
    assert pools([(16, 4)], gpus=0) == Pool((8, 8), 15, 0)
    assert pools([(0, 0), (3, 1)]) == Pool((1, 1), 3, 1)


def test_actors_go_to_gpus_and_readers_to_what_is_left() -> None:
    """The shapes of cluster.yaml: a head without CPUs, nodes that decode, nodes with a GPU."""
    three = [(0.0, 0.0), (8.0, 0.0), (8.0, 0.0), (4.0, 1.0), (4.0, 1.0)]
    assert pools(three) == Pool((2, 2), 43, 1)
    assert pools(three, (1, 9)) == Pool((1, 2), 45, 1)
    assert pools(three, gpus=0.25) == Pool((8, 8), 31, 0.25)
    assert pools(three, (3, 3), 0.5) == Pool((3, 3), 41, 0.5)
    # one GPU holds one actor of .6 of it, three of a third, and what is over is no fourth
    assert pools([(16, 2)], gpus=0.6).actors == (2, 2)
    assert pools([(16, 2)], gpus=0.3333).actors == (6, 6)
    assert pools([(16, 2)], (1, 99), 0.3).actors == (1, 6)
    # no more than one for each CPU of the node, and none where there is no GPU
    assert pools([(64, 0), (4, 8)]).actors == (4, 4)
    # actors with a GPU reserve no CPU, so that what reads and writes fits beside them
    assert pools([(4, 4)]) == Pool((4, 4), 1, 1)
    assert (pools([(4, 4)]).cpus, pools([(4, 0)]).cpus) == (0, 1)


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "message"),
    [
        ([(1, 0)], None, None, "1 CPUs and 0 GPUs; one captioner .* need 1.6 CPUs: start Ray with"),
        ([(2, 0)], (2, 2), None, "--actors asks for 2, and 1 fit: 2 CPUs on .* lower --actors$"),
        ([(8, 2)], (3, 3), 1.0, "for 3, and 2 fit: 8 CPUs and 2 GPUs .* or --gpus-per-actor$"),
        ([(8, 2)], (3, 3), 0.6, "for 3, and 2 fit: .*one CPU and 0.6 GPU of its node each"),
        ([(99, 0), (4, 1)], (2, 2), None, "for 2, and 1 fit: 103 CPUs and 1 GPUs on 2 node"),
        ([(8, 0)], None, 0.5, "--gpus-per-actor is 0.5, and the cluster has no GPU: leave it out"),
        ([(64, 0), (0, 8)], None, None, "a CPU and 1 GPU of one node: .* give --gpus-per-actor 0"),
    ],
)
def test_what_does_not_fit_is_said_with_the_flag_that_mends_it(
    nodes: list[tuple[float, float]], actors: tuple[int, int] | None, gpus: float | None,
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(ClusterError, match=message):
        pools(nodes, actors, gpus)


# --- quality gates ------------------------------------------------------------------------------


def gated(shop: Path, model: Path, output: Path, rules: str, *more: str) -> list[str]:
    output.mkdir(exist_ok=True)
    (output / "rules.toml").write_text(rules)
    return arguments(
        shop, model, output, "--rules", str(output / "rules.toml"), "--limit", "50",
        "--style", "colloquial,formal", "--captions-per-image", "3", *more,
    )  # fmt: skip


@pytest.mark.usefixtures("local_ray")
def test_quality_gates(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [row for row in captions(quiet) if row["status"] == "captioned"]
    texts = [brand.spoken(row["caption"]) for row in plain]
    common = [w for w, _ in collections.Counter(" ".join(texts).split()).most_common(30)]
    rules = f'forbidden = {common}\nrequired_columns = ["price"]\nmax_words = 12\n'
    line = gated(shop, tiny_model, tmp_path / "one", rules, "--min-score", "0.5")
    assert main(line) == 0
    rows = captions(tmp_path / "one")
    written = [row for row in rows if row["status"] == "captioned"]
    assert len(rows) == 50 * 6 and len(written) == 45 * 6
    found: dict[str, set[str]] = collections.defaultdict(set)
    for row in written:
        if row["style"] == "colloquial":
            assert not set(common) & set(brand.spoken(row["caption"]).split())
            found[row["id"]].add(row["caption"])
        is_low = row["caption_score"] is not None and row["caption_score"] < 0.5
        breaks = is_low or len(row["caption"].split()) > 12
        assert row["needs_review"] >= (breaks or row["price"] not in row["caption"])
    assert len(found) == 45 and {len(texts) for texts in found.values()} == {3}
    counts = json.loads(Path(only_run(tmp_path / "one")[1], "summary.json").read_text())["counts"]
    assert counts["needs_review"] == sum(row["needs_review"] for row in rows)
    reasons = counts["review_reasons"]
    assert {"required", "duplicate", "low score", "unnamed"} <= set(reasons)
    assert reasons["duplicate"] == 45 * 2  # a description is rewritten formally in one way only
    assert all(0 < count <= counts["needs_review"] for count in reasons.values())
    page = Path(only_run(tmp_path / "one")[1], "report.html").read_text()
    assert f"required {reasons['required']}" in page

    # neither batches nor actors, nor how the file is written, change anything
    again = rules.replace("max_words = 12", f"  max_words=12\n# {'x' * 9}").upper()
    again = re.sub(r"[A-Z_]+(?= *=)|\"PRICE\"", lambda match: match[0].lower(), again)
    assert main([*gated(shop, tiny_model, tmp_path / "two", again, "--min-score", "0.5"),
                 "--batch-size", "7", "--actors", "1"]) == 0  # fmt: skip
    assert captions(tmp_path / "two") == rows

    # the same rules carry everything over, others nothing that was captioned
    capsys.readouterr()
    night = ["--min-score", "0.5", "--previous", "latest"]
    assert main(gated(shop, tiny_model, tmp_path / "one", again, *night)) == 0
    assert "50 of 50 images are carried over" in capsys.readouterr().err
    latest = (tmp_path / "one/latest").read_text().strip()
    counts = json.loads((tmp_path / "one" / latest / "summary.json").read_text())["counts"]
    assert counts["review_reasons"] == {"carried over": counts["needs_review"]}
    other = rules.replace("max_words = 12", "max_words = 11")
    planned = plan(parse_arguments(gated(shop, tiny_model, tmp_path / "one", other, *night)))
    assert planned.changes and planned.changes["changed"] == 49 and planned.changes["locked"] == 1


@pytest.mark.parametrize(
    ("rules", "more", "message"),
    [
        ('required_columns = ["brand"]', [], "no column 'brand' for required_columns of --rules"),
        ("min_words = 9\nmax_words = 8", [], "rules.toml: min_words = 9 is more than max_words"),
        ("max_words = 9", ["--rules", "s3://shop/none.toml"], "s3://shop/none.toml cannot be read"),
        ("max_words = 9", ["--min-score", "2"], "'2'"),
        ("max_words = 9", ["--min-score", "0.2"], "the model has no discriminator.safetensors"),
    ],
)
def test_gates_that_cannot_be_obeyed_end_with_code_2(
    shop: Path, tiny_model: Path, tmp_path: Path, s3: str, rules: str, more: list[str],
    message: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(tiny_model / name, model)
    (model / "model.safetensors").write_bytes(b"none that could be loaded")
    try:
        code = main(gated(shop, model, tmp_path / "out", rules, *more))
    except SystemExit as error:  # argparse
        code = error.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code == 2 and message in said.splitlines()[-1], said
    assert os.listdir(tmp_path / "out") == ["rules.toml"]


# --- two jobs, strange files --------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_a_second_job_on_the_run_is_refused(
    shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(shop, tiny_model, tmp_path, "--limit", "40")
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.caption", *line], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        wait_for(lambda: list(tmp_path.glob("_LOCK-*")))
        assert main(line) == 1
        said = capsys.readouterr().err
        assert f"works on this run: process {owner.pid} on {socket.gethostname()}" in said
        said = owner.communicate(timeout=120)[1]
    assert owner.returncode == 0, said
    assert len(captions(tmp_path)) == 40


@pytest.mark.usefixtures("local_ray")
def test_strange_and_half_written_files_do_not_end_in_the_result(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run is made by hand: some parts, some of them wrong, files that are none."""
    config = parse_arguments(arguments(shop, tiny_model, tmp_path))
    unfinished = plan(config)
    finished = Path(only_run(quiet)[1])
    data, errors = Path(unfinished.path, "data"), Path(unfinished.path, "errors")
    data.mkdir()
    errors.mkdir()
    for number in (0, 1, 2, 3):
        name = f"part-{number:05}.parquet"
        shutil.copy(finished / "data" / name, data)
        if (finished / "errors" / name).exists():
            shutil.copy(finished / "errors" / name, errors)
    untouched = files(fs.LocalFileSystem(), str(data))
    whole = (data / "part-00001.parquet").read_bytes()
    (data / "part-00001.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pq.read_table(data / "part-00002.parquet").slice(1), data / "part-00003.parquet")
    shutil.copy(data / "part-00000.parquet", data / "part-00000-copy.parquet")
    (data / f".part-00004.parquet.{'0' * 32}").write_bytes(whole[:100])

    assert main(arguments(shop, tiny_model, tmp_path)) == 0
    said = capsys.readouterr().err
    assert "the part of unit 1 cannot be read" in said and "the part of unit 3 has" in said
    assert "data/part-00000-copy.parquet is no part of this run" in said
    filesystem, path = only_run(tmp_path)
    assert os.listdir(f"{path}/_foreign") == ["data-part-00000-copy.parquet"]
    shutil.rmtree(f"{path}/_foreign")
    assert captions(tmp_path) == captions(quiet)
    now = files(filesystem, f"{path}/data")
    assert all(now[f"part-0000{n}.parquet"] == untouched[f"part-0000{n}.parquet"] for n in (0, 2))


def plan(config: Any) -> run.Run:
    """The plan that the job would make, and no more: it is stopped as soon as it has one."""
    made: list[run.Run] = []

    class Stop(Exception):
        pass

    def stop(*arguments: Any) -> None:
        made.append(arguments[0])
        raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr("jobs.caption._complete", stop)
        run_job(config)
    return made[0]


def test_the_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4000, 1000) as progress:
        assert progress.line() == "1,000 of 4,000 images  25%"
        progress.add(500, 0)
        time.sleep(0.05)
        progress.add(500, 2)
        line = re.sub(r"[\d,.]+ images/s", "N images/s", progress.line())
        assert line == "2,000 of 4,000 images  50%  N images/s  0:00:00 left  2 failed"
    assert capsys.readouterr().err.count("\n") == 1


# --- kills --------------------------------------------------------------------------------------


def wait_for(is_so: Callable[[], object], pause: float = 0.002, timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def number_of_parts(output: Path | str) -> int:
    filesystem, root = resolve_filesystem(str(output))
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    paths = [info.path for info in filesystem.get_file_info(selector)]
    return sum(bool(re.search(r"data/part-\d+\.parquet$", path)) for path in paths)


def has_file(output: Path | str, name: str) -> bool:
    filesystem, root = resolve_filesystem(str(output))
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    return any(info.path.endswith(name) for info in filesystem.get_file_info(selector))


MOMENTS: dict[str, Callable[[Path | str], bool]] = {
    "planning": lambda output: has_file(output, "_plan/unit-00000.parquet"),
    "planned": lambda output: has_file(output, "_plan/run.json"),
    "early": lambda output: number_of_parts(output) >= 1,
    "midway": lambda output: number_of_parts(output) >= 4,
    "late": lambda output: number_of_parts(output) >= 8,
    "verifying": lambda output: number_of_parts(output) >= 9,
    "publishing": lambda output: has_file(output, "summary.json"),
    "published": lambda output: has_file(output, "_SUCCESS"),
}


def kill_at(
    moment: str, line: list[str], output: Path | str, how: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Runs the job, sends the signal at a moment; its exit code and what it wrote to stderr."""
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.caption", *line], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pause = 0.1 if "://" in str(output) else 0.002  # the endpoint has other work
    wait_for(lambda: MOMENTS[moment](output) or job.poll() is not None, pause)
    job.send_signal(how)
    said = job.communicate(timeout=60)[1]
    return job.returncode, said


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("moment", "storage"),
    [
        ("midway", "disk"),
        pytest.param("publishing", "s3", marks=pytest.mark.slow),
        *(
            pytest.param(moment, storage, marks=pytest.mark.slow)
            for moment in MOMENTS
            for storage in ("disk", "s3")
            if (moment, storage) not in (("midway", "disk"), ("publishing", "s3"))
            and (moment, storage) not in (("early", "s3"), ("late", "s3"))  # as midway
        ),
    ],
)
def test_a_killed_job_goes_on(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, s3: str, moment: str, storage: str
) -> None:
    output = str(tmp_path) if storage == "disk" else f"{s3}/{tmp_path.name}"
    line = arguments(shop, tiny_model, output)
    slowly = ["--batch-size", "4"] if moment in ("early", "midway", "late") else []
    code, said = kill_at(moment, [*line, *slowly], output)
    assert code == -signal.SIGKILL, said
    filesystem, path = only_run(output)
    time.sleep(1)  # what the dead driver's workers still had in hand
    before = files(filesystem, path)
    assert main(line) == 0
    after = files(filesystem, path)
    parts = [name for name in before if re.match(r"(data|errors)/part-\d+\.parquet$", name)]
    assert {name: after[name] for name in parts} == {name: before[name] for name in parts}
    assert captions(output) == captions(quiet)
    filesystem, root = resolve_filesystem(output)
    assert not [i for i in filesystem.get_file_info(fs.FileSelector(root)) if "_LOCK" in i.path]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_says_that_it_can_go_on(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, how: signal.Signals
) -> None:
    line = arguments(shop, tiny_model, tmp_path)
    code, said = kill_at("early", [*line, "--batch-size", "2"], tmp_path, how)
    assert code == 130 and "the same command goes on" in said and "Traceback" not in said, said
    assert not list(tmp_path.glob("_LOCK*"))
    assert main(line) == 0
    assert captions(tmp_path) == captions(quiet)


@pytest.mark.slow
def test_a_captioner_that_dies_is_started_again(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def kill_one() -> None:
        wait_for(lambda: number_of_parts(tmp_path) >= 2)
        name = "ray::MapWorker(Map(CaptionUnit))"
        captioner = next(pid for pid, line in descendants().items() if line.startswith(name))
        os.kill(captioner, signal.SIGKILL)

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill_one)
        line = arguments(shop, tiny_model, tmp_path, "--batch-size", "4", "--actors", "1")
        assert main(line) == 0
        killing.result()
    assert captions(tmp_path) == captions(quiet)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """The address for jobs of a Ray that `ray start --head` started, stopped afterwards."""
    ports = []
    for _ in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    started = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus", "4",
            "--port", ports[0], "--dashboard-port", ports[1], "--ray-client-server-port", ports[2],
            "--dashboard-agent-listen-port", ports[3], "--metrics-export-port", ports[4],
            "--object-store-memory", str(300 << 20), "--temp-dir", folder, "--disable-usage-stats",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{ports[1]}"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/jobs/"):
            return True
        return False

    try:
        wait_for(answers)
        yield address
    finally:
        started.terminate()  # and with it all that it started
        started.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_job(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, head: str
) -> None:
    for package in ("jobs", "stylegan"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package)

    def submit(*more: str) -> tuple[int, str]:
        done = subprocess.run(
            [
                Path(sys.executable).with_name("ray"), "job", "submit", "--address", head,
                "--working-dir", ".", "--", sys.executable, "-m", "jobs.caption",
                *arguments(shop, tiny_model, *more),
            ],
            cwd=tmp_path / "code", capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    code, said = submit(str(tmp_path / "out"))
    assert code == 0, said
    assert "captioning 260 of 260 images with 3 captioners on cpu" in said
    assert "Traceback" not in said and "(raylet" not in said and "deprecated" not in said
    assert captions(tmp_path / "out") == captions(quiet)
    code, said = submit("captions")
    assert code == 1 and "give an s3:// URI or an absolute path" in said
    codes = [job.driver_exit_code for job in JobSubmissionClient(head).list_jobs()]
    assert sorted(codes) == [0, 2]
