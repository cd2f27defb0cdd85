"""Measures the job beside a plain loop over the same Captioner, in one run, on the same images.

    python -m jobs.benchmark --images photographs/ --limit 5000

The peer is one Python process with all cores for torch: read, decode, caption, collect. The job is
`python -m jobs.caption` as anybody runs it, with its own Ray. Reported: images/s of both with and
without start-up, their ratio, and the peak memory of all processes together (proportional set
size, so that shared memory counts once; Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet

from stylegan.captioner import Captioner
from stylegan.catalog import CatalogError, freeze_catalog, read_image
from stylegan.images import decode_image


class MemoryMeter(threading.Thread):
    """Samples the memory of a process and all that descend from it, every half second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_mib, self.done = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            total = sum(_proportional_kib(pid) for pid in _descendants(self.pid))
            self.peak_mib = max(self.peak_mib, total / 1024)


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return list(family)


def _proportional_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def plain_loop(images: str, model: str | None, limit: int | None, batch: int) -> dict[str, Any]:
    """Captions in this process, a batch at a time."""
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
        summary = json.loads(next(Path(output).glob("run=*/summary.json")).read_text())
    rows = summary["counts"]["images"]
    return {
        "rows": rows,
        "seconds": ended - began,
        "images_per_second": summary["rates"]["images_per_second"],
        "images_per_second_with_start": rows / (ended - began),
        "peak_memory_mib": round(meter.peak_mib),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--images", required=True, help="as for jobs.caption")
    parser.add_argument("--model", help="model directory; without: the shipped one")
    parser.add_argument("--limit", type=int, help="the first N images")
    parser.add_argument("--batch", type=int, default=256, help="images at a time in the plain loop")
    parser.add_argument("--no-loop", action="store_true", help="the job alone, for its memory")
    parser.add_argument("--actors", help="as for jobs.caption")
    arguments = parser.parse_args()
    more = ["--actors", arguments.actors] if arguments.actors else []
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    try:
        figures["job"] = job(arguments.images, arguments.model, arguments.limit, more)
        if not arguments.no_loop:
            figures["plain_loop"] = plain_loop(
                arguments.images, arguments.model, arguments.limit, arguments.batch
            )
            for name in ("images_per_second", "images_per_second_with_start"):
                figures[f"ratio_of_{name}"] = figures["job"][name] / figures["plain_loop"][name]
    except (CatalogError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
