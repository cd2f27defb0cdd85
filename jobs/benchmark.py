"""Measures the job: beside a plain loop over the same Captioner, with captioners that only wait, on
many images; and says what millions of images would take.

    python -m jobs.benchmark --images photographs/ --limit 5000
    python -m jobs.benchmark --mock-actors 1,2,4,8
    python -m jobs.benchmark --scale 10000,100000
    python -m jobs.benchmark --sizing 10000000,1000000000 --decode-rate 400 --caption-rate 200
        --price-decoder 0.4 --price-captioner 0.8

`--mock-actors`: the job's own chain on a local Ray, but each captioner waits --wait seconds a unit
instead of captioning, as one on a GPU of its own would. Reported for each number of them: its
efficiency, which is the wait of all units as a share of the time of all captioners, each from its
first unit on until the last unit of all is done; the longest time until a captioner got its first
unit; and the tail, the time from the end of the first captioner that gets no more to the end of the
last, in units. The wait must be long enough for the cores to feed so many captioners meanwhile.

`--scale`: the whole job on so many small drawn images, with captioners that do not even wait; then
the same, stopped as soon as 99 % of the parts are there, and how long the same command takes for
the rest.

`--sizing`: computed, not measured; see stylegan.sizing.

`--images`: the peer is one Python process with all cores for torch: read, decode, caption, collect.
The job is `python -m jobs.caption` as anybody runs it, with its own Ray. Reported: images/s of both
with and without start-up, their ratio, and the peak memory of all processes together (proportional
set size, so that shared memory counts once; Linux).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet
import ray
from PIL import Image

from jobs.caption import (
    READ_CPUS,
    WRITE_CPUS,
    CaptionUnit,
    Config,
    InputError,
    caption_units,
    parse_arguments,
    run_job,
)  # fmt: skip
from stylegan import cluster, sizing
from stylegan import run as runs
from stylegan.catalog import CatalogError, freeze_catalog, read_image
from stylegan.cluster import ClusterError
from stylegan.images import decode_image
from stylegan.parts import Settings
from stylegan.run import Run

IMAGE_SIZE = 128  # pixels that the shipped model reads
DISTINCT = 2000  # drawn images; more rows than that name them again
UNITS_PER_ACTOR = 24  # a unit's length of idle time in the end is 4 % of that
ROWS_PER_UNIT = 16  # few, so that two cores feed eight captioners that wait a second each


class MemoryMeter(threading.Thread):
    """Samples the memory of a process and all that descend from it, every half second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_mib, self.done = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            total = sum(_proportional_kib(pid) for pid in descendants(self.pid))
            self.peak_mib = max(self.peak_mib, total / 1024)


def descendants(root: int) -> set[int]:
    """A process and all that it started, and what these started, and so on."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _proportional_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def plain_loop(images: str, model: str | None, limit: int | None, batch: int) -> dict[str, Any]:
    """Captions in this process, a batch at a time."""
    # not above: captioners that wait have no use for torch
    from stylegan.captioner import Captioner

    began = time.perf_counter()
    captioner = Captioner.from_pretrained(model)
    with tempfile.TemporaryDirectory() as directory:
        catalog = freeze_catalog(
            images, Path(directory) / "plan", id_column=None, image_column=None,
            description_column=None, limit=limit,
        )  # fmt: skip
        uris: list[str] = []
        for unit in catalog.units:
            table = pyarrow.parquet.read_table(unit, partitioning=None)
            uris += table.column("_image_uri").to_pylist()
    ready = time.perf_counter()
    captioned = 0
    for start in range(0, len(uris), batch):
        blobs = [read_image(uri) for uri in uris[start : start + batch]]
        decoded = [
            decode_image(blob, captioner.image_size).pixels
            for blob in blobs
            if isinstance(blob, bytes)
        ]
        good = [pixels for pixels in decoded if pixels is not None]
        captioned += len(captioner.caption(good, seed=list(range(start, start + len(good)))))
    ended = time.perf_counter()
    return {
        "rows": captioned,
        "seconds": ended - began,
        "images_per_second": captioned / (ended - ready),
        "images_per_second_with_start": captioned / (ended - began),
    }


def job(images: str, model: str | None, limit: int | None, more: list[str]) -> dict[str, Any]:
    """The job in a process of its own."""
    with tempfile.TemporaryDirectory() as output:
        line = [sys.executable, "-m", "jobs.caption", "--images", images, "--output", output, *more]
        line += ["--model", model] if model else []
        line += ["--limit", str(limit)] if limit else []
        began = time.perf_counter()
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        meter = MemoryMeter(process.pid)
        meter.start()
        code = process.wait()
        ended = time.perf_counter()
        meter.done.set()
        if code:
            raise RuntimeError(f"{' '.join(line)} ended with exit code {code}; run it by itself")
        summary = _summary(Path(output))
    rows = summary["counts"]["images"]
    return {
        "rows": rows,
        "seconds": ended - began,
        "images_per_second": summary["rates"]["images_per_second"],
        "images_per_second_with_start": rows / (ended - began),
        "peak_memory_mib": round(meter.peak_mib),
    }


# --- captioners that wait -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Said:
    """A caption of no model: `stylegan.parts.Written`."""

    seed: int
    text: str | None = "A waiting captioner said this."
    score: float | None = None
    description: str | None = None
    needs_review: bool = False
    num_generated_tokens: int = 0
    error_class: str | None = None
    error_message: str | None = None
    review_reasons: tuple[str, ...] = ()


class _Silent:
    """Stands for a Captioner: waits, and says the same of every image."""

    model_id, image_size = "waiting", IMAGE_SIZE

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode(self, images: Sequence[Any], descriptions: Sequence[str | None]) -> int:
        time.sleep(self.seconds)
        return len(images)

    def write(self, count: int, style: str, seeds: Sequence[int], **_: Any) -> list[_Said]:
        return [_Said(seed) for seed in seeds]


class Waiting(CaptionUnit):
    """The job's actor with a captioner that waits so many seconds a unit, and tells when it did."""

    seconds: ClassVar[float] = 0.0
    log: ClassVar[str] = ""  # of a line a unit: process, begin, end

    def __init__(self, run: Run, config: Config, device: str) -> None:
        self.run, self.batch_size = run, config.batch_size
        self.captioner: Any = _Silent(self.seconds)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        done = super().__call__(row)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{json.dumps([os.getpid(), began, time.time()])}\n")
        return done


@dataclass(frozen=True, slots=True)
class Schedule:
    """How well captioners were kept at work. start, tail: seconds and units; see above."""

    units: int
    efficiency: float
    start: float
    tail: float

    @classmethod
    def of(cls, times: Sequence[tuple[int, float, float]], wait: float, began: float) -> Schedule:
        """times: captioner, begin and end of each unit. wait: seconds of a unit. began: the job."""
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        for actor, start, end in times:
            first[actor] = min(start, first.get(actor, start))
            last[actor] = max(end, last.get(actor, end))
        ended = max(last.values())
        available = sum(ended - start for start in first.values())
        return cls(
            len(times), len(times) * wait / available, max(first.values()) - began,
            (ended - min(last.values())) / wait,
        )  # fmt: skip


def mock_actors(counts: Sequence[int], wait: float) -> list[dict[str, Any]]:
    """The chain with so many captioners that wait. Raises ClusterError."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(
        address="local", num_cpus=max(counts) + 2, object_store_memory=cluster.LOCAL_STORE,
        include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
    )  # fmt: skip
    cluster.connect()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = draw_images(Path(folder), max(counts) * UNITS_PER_ACTOR * ROWS_PER_UNIT)
        for count in counts:
            place = Path(folder, str(count))
            rows = count * UNITS_PER_ACTOR * ROWS_PER_UNIT
            catalog = freeze_catalog(
                str(manifest), place / "plan", limit=rows, rows_per_unit=ROWS_PER_UNIT
            )
            settings = Settings(catalog.digest, "", ("colloquial",), 1, None, None, 0)
            run = runs.plan_run(str(place), settings, catalog)
            pool = cluster.choose_pool(
                cluster.nodes(), (count, count), None, read_cpus=READ_CPUS, write_cpus=WRITE_CPUS,
                is_local=True,
            )  # fmt: skip
            log = place / "times"
            # of its own class, which travels with its attributes
            actor = type("WaitingHere", (Waiting,), {"seconds": wait, "log": str(log)})
            began = time.time()
            config = parse_arguments([])
            for _ in caption_units(
                run, list(range(run.num_units)), config, IMAGE_SIZE, pool, actor
            ):
                pass
            times = [json.loads(line) for line in log.read_text().splitlines()]
            schedule = Schedule.of(times, wait, began)
            if (working := len({actor for actor, _, _ in times})) < count:
                raise RuntimeError(f"{working} of {count} captioners got work: raise --wait")
            figures.append({
                "actors": count,
                "units": schedule.units,
                "images_per_second": round(schedule.efficiency * count * ROWS_PER_UNIT / wait, 1),
                "efficiency": round(schedule.efficiency, 4),
                "seconds_to_first_units": round(schedule.start, 1),
                "tail_in_units": round(schedule.tail, 2),
            })  # fmt: skip
            print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
    ray.shutdown()
    return figures


# --- many images --------------------------------------------------------------------------------


def draw_images(folder: Path, rows: int) -> Path:
    """A manifest of so many rows that name small JPEG files, up to DISTINCT of them."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(min(rows, DISTINCT)):
        pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{number:04}.jpg")
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image"])
        table.writerows((f"{row:09}", f"{row % DISTINCT:04}.jpg") for row in range(rows))
    return manifest


def without_model(arguments: Sequence[str]) -> int:
    """The whole job but for its captioner, in a process of its own. Exit code 130: stopped."""
    try:
        run_job(parse_arguments(arguments), Waiting)
    except KeyboardInterrupt:
        return 130
    return 0


def at_scale(rows: int) -> dict[str, Any]:
    """Seconds and memory of the job on so many images, and of the last hundredth of it."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = draw_images(Path(folder, "images"), rows)

        def run(output: str, stop_at: float | None = None) -> tuple[float, float]:
            """Seconds and peak MiB. stop_at: the share of the parts to stop it after."""
            code = "import sys, jobs.benchmark as b; sys.exit(b.without_model(sys.argv[1:]))"
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-c", code, "--images", str(manifest),
                 "--output", str(Path(folder, output))], stderr=subprocess.DEVNULL,
            )  # fmt: skip
            meter = MemoryMeter(process.pid)
            meter.start()
            while stop_at is not None and process.poll() is None:
                time.sleep(0.02)
                done, units = (
                    len(list(Path(folder, output).glob(f"run=*/{pattern}-*.parquet")))
                    for pattern in ("data/part", "_plan/unit")
                )
                # at least one part is missing, however few there are
                if done and done >= min(units - 1, stop_at * units):
                    process.send_signal(signal.SIGTERM)
                    break
            if (left := process.wait()) != (0 if stop_at is None else 130):
                raise RuntimeError(f"the job on {rows:,} images ended with exit code {left}")
            meter.done.set()
            return time.perf_counter() - began, meter.peak_mib

        seconds, memory = run("whole")
        whole = _summary(Path(folder, "whole"))
        run("stopped", 0.99)
        resumed_seconds, _ = run("stopped")
        resumed = _summary(Path(folder, "stopped"))
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "images_per_second_at_work": whole["rates"]["images_per_second_at_work"],
        "peak_memory_mib": round(memory),
        "resume_images": resumed["rates"]["images_this_session"],
        "resume_seconds": round(resumed_seconds, 1),
    }


def _summary(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(next(output.glob("run=*/summary.json")).read_text())
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--images", help="beside a plain loop; as for jobs.caption")
    kinds.add_argument("--mock-actors", type=_numbers, metavar="N,N", help="captioners that wait")
    kinds.add_argument("--scale", type=_numbers, metavar="N,N", help="numbers of small images")
    kinds.add_argument("--sizing", type=_numbers, metavar="N,N", help="numbers of images")
    parser.add_argument("--model", help="model directory; without: the shipped one")
    parser.add_argument("--limit", type=int, help="the first N images")
    parser.add_argument("--batch", type=int, default=256, help="images at a time in the plain loop")
    parser.add_argument("--no-loop", action="store_true", help="the job alone, for its memory")
    parser.add_argument("--actors", help="as for jobs.caption")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds a unit of --mock-actors")
    sizing.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.sizing:
        try:
            print(sizing.table(arguments.sizing, sizing.Assumptions.of(arguments)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    more = ["--actors", arguments.actors] if arguments.actors else []
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    try:
        if arguments.mock_actors:
            figures["mock_actors"] = mock_actors(arguments.mock_actors, arguments.wait)
        elif arguments.scale:
            figures["scale"] = [at_scale(rows) for rows in arguments.scale]
        else:
            figures["job"] = job(arguments.images, arguments.model, arguments.limit, more)
        if arguments.images and not arguments.no_loop:
            figures["plain_loop"] = plain_loop(
                arguments.images, arguments.model, arguments.limit, arguments.batch
            )
            for name in ("images_per_second", "images_per_second_with_start"):
                figures[f"ratio_of_{name}"] = figures["job"][name] / figures["plain_loop"][name]
    except (CatalogError, ClusterError, InputError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    return 0


def _numbers(text: str) -> list[int]:
    numbers = [int(number) if number.isdecimal() else 0 for number in text.split(",")]
    if 0 in numbers:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers from 1 up, as N,N")
    return numbers


if __name__ == "__main__":
    # as a module, so that workers import the captioners that wait
    from jobs.benchmark import main as run_main

    sys.exit(run_main())
