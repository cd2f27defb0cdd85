"""What the benchmarks compute, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from jobs.benchmark import Schedule


def test_a_schedule_by_hand() -> None:
    # two captioners, two seconds a unit: one works all the time, the other begins a second later,
    # pauses for a second and ends a second before the other
    times = [
        (7, 10.0, 12.0), (7, 12.0, 14.0), (7, 14.0, 16.0),
        (8, 11.0, 13.0), (8, 14.0, 15.0),
    ]  # fmt: skip
    made = Schedule.of(times, 2.0, began=5.0)
    assert made.units == 5
    assert made.efficiency == pytest.approx(5 * 2 / (6 + 5))
    assert made.start == pytest.approx(6)
    assert made.tail == pytest.approx(0.5)


def figures(*flags: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "jobs.benchmark", *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(160)
def test_captioners_that_wait_are_all_given_work() -> None:
    """How much of their time they work is measured by hand, on a machine that does nothing else."""
    (found,) = figures("--mock-actors", "2", "--wait", "0.3")["mock_actors"]
    assert found["units"] == 48
    assert 0 < found["efficiency"] <= 1
    assert 0 <= found["tail_in_units"] < 48


@pytest.mark.slow
@pytest.mark.timeout(160)
def test_many_images_and_the_last_hundredth_of_them() -> None:
    (found,) = figures("--scale", "3000")["scale"]
    assert found["rows"] == 3000
    assert 0 <= found["resume_images"] <= 32  # a unit; none when it was stopped a moment later
    assert found["resume_seconds"] < found["seconds"] * 1.5
    assert 200 < found["peak_memory_mib"] < 6000
