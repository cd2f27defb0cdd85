"""`python -m jobs.caption --dry-run`: what a run would do, how long it takes and what it costs.

Nothing is written to the output: not a lock, not a lease, not a directory. Speed is measured on a
small run in a temporary directory, of some of the rows that would be captioned.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs.caption import CaptionUnit, Config, Model, read_images, reserve, write_part
from stylegan import cluster, estimate
from stylegan import run as runs
from stylegan.catalog import FrozenCatalog
from stylegan.parts import Settings
from stylegan.previous import Division, Previous, divide
from stylegan.run import Run


def rehearse(
    config: Config, output: str, previous: Previous | None, model: Model, catalog: FrozenCatalog,
    settings: Settings, run: Run | None, began: float,
) -> None:  # fmt: skip
    """Prints what the job would do.

    run: the unfinished one that it would go on with, if any. began: when the job did, by
    time.perf_counter. Raises ClusterError when the job would not fit, InputError when its model is
    gone.
    """
    print(f"input       {config.images or 'the sample catalogue'}, {catalog.num_rows:,} rows")
    with tempfile.TemporaryDirectory(prefix="stylegan-") as folder:
        scratch = Path(folder)
        if run is not None:
            missing = run.missing_units()
            units = [unit for unit in missing if unit < run.num_fresh_units]
            num_fresh, rows_per_unit = sum(map(run.unit_rows, units)), run.rows_per_unit
            changes = run.changes or {}
            print(f"output      {run.uri} goes on")
            print(f"            {len(missing):,} of {run.num_units:,} parts are missing")
        else:
            # without the lease on the previous run that planning takes: a lease is a file
            division = Division.all_fresh(catalog)
            if previous is not None:
                division = divide(previous, catalog, settings, "", scratch)
            units = list(range(len(division.fresh)))
            num_fresh = catalog.num_rows - division.num_carried
            rows_per_unit, changes = division.rows_per_unit, division.changes
            print(f"output      a new run below {output}")
            print(f"            {len(units) + len(division.carried):,} parts")
        if previous is not None:
            print(f"previous    {previous.uri}")
        for kind, count in changes.items():
            print(f"            {count:>11,} {kind.replace('_', ' ')}")
        print(f"to caption  {num_fresh:,} images")
        if not num_fresh:
            return
        model.check_presence(num_fresh)
        pool = reserve(config)
        actors = "–".join(map(str, dict.fromkeys(pool.actors)))
        each = f", {pool.gpus:g} GPU each" if pool.gpus else ""
        print(f"resources   {actors} captioners on {pool.device}{each}")
        print(f"            {pool.readers} readers")
        rows = estimate.draw_sample(
            run.read_unit if run else lambda unit: pq.read_table(division.fresh[unit]), units
        )
        cuts = estimate.divide(len(rows), rows_per_unit, num_fresh)
        pieces = [rows.slice(*cut) for cut in cuts]
        sample = _plan_sample([rows.slice(0, 1), *pieces], catalog, settings, scratch)
        # one of the job's own actors, so that it is on the device that it will have
        Captioner: Any = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(CaptionUnit)
        captioner = Captioner.remote(sample, config, pool.device)

        def caption(unit: int) -> dict[str, Any]:
            row = read_images({"unit": unit}, sample, model.image_size)
            return write_part(ray.get(captioner.__call__.remote(row)), sample)

        caption(0)
        start = time.perf_counter() - began
        receipts = [caption(unit) for unit in range(1, sample.num_units)]
        ray.kill(captioner)
        errors = {
            row["id"]: row["error_class"]
            for unit in range(1, sample.num_units)
            for row in sample.read_part(unit).select(["id", "error_class"]).to_pylist()
        }
    failed = Counter(error for error in errors.values() if error)
    print(f"sample      {len(rows):,} of them, captioned; {failed.total():,} failed")
    for error_class, count in failed.most_common():
        print(f"            {count:>11,} {error_class}")
    timed = list(zip(map(len, pieces), receipts, strict=True))
    pace = estimate.Pace.of(timed, rows_per_unit)
    is_local = not os.environ.get("RAY_ADDRESS")
    cpus = float(cluster.cores()) if is_local else sum(cpus for cpus, _ in cluster.nodes())
    seconds = pace.seconds(num_fresh, len(units), pool, cpus)
    print(estimate.say_times(seconds, start, num_fresh, config.price_per_hour))


def _plan_sample(
    pieces: list[pa.Table], catalog: FrozenCatalog, settings: Settings, scratch: Path
) -> Run:
    """A run of its own for what is measured. Its first unit, of one row, warms up."""
    paths = tuple(scratch / f"sample-{number}" for number in range(len(pieces)))
    for path, rows in zip(paths, pieces, strict=True):
        pq.write_table(rows, path)
    # one row a unit: only how many units there are counts
    catalog = replace(catalog, units=paths, num_rows=len(paths), rows_per_unit=1)
    return runs.plan_run(str(scratch / "output"), settings, catalog)
