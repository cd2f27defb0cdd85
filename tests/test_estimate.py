from __future__ import annotations

import pyarrow as pa
import pytest

from stylegan.cluster import Pool
from stylegan.estimate import SAMPLE, SHARE, START, Pace, divide, draw_sample, say_times

POOL = Pool((2, 4), 2, 0.0)


def test_a_sample_is_spread_over_the_units() -> None:
    def read(unit: int) -> pa.Table:
        return pa.table({"unit": [unit] * 100, "row": range(100)})

    rows = draw_sample(read, range(3, 203)).to_pylist()
    units = sorted({row["unit"] for row in rows})
    assert len(rows) == SAMPLE and units == list(range(3, 203, 25))
    assert {row["row"] for row in rows} == {index * 100 // 16 for index in range(16)}
    few = draw_sample(lambda _: pa.table({"row": range(5)}), [7])
    assert few.column("row").to_pylist() == list(range(5))


@pytest.mark.parametrize(
    ("rows", "rows_per_unit", "total", "pieces"),
    [
        (128, 32, 9000, [(0, 32), (32, 32), (64, 32), (96, 32)]),
        (100, 32, 9000, [(0, 32), (32, 32), (64, 32)]),
        (128, 1024, 9000, [(0, 64), (0, 128)]),
        (128, 128, 9000, [(0, 64), (0, 128)]),
        (20, 32, 20, [(0, 20)]),  # all there is: a unit as the job has it
        (1, 32, 1, [(0, 1)]),
    ],
)
def test_a_sample_is_captioned_as_units_or_as_a_half_and_the_whole(
    rows: int, rows_per_unit: int, total: int, pieces: list[tuple[int, int]]
) -> None:
    assert list(divide(rows, rows_per_unit, total)) == pieces


def cost(rows: int) -> dict[str, float]:
    """Seconds of a unit with a fixed part."""
    return {"read": 0.01 * rows, "decode": 0.02 * rows, "caption": 3 + 0.05 * rows}


@pytest.mark.parametrize("rows_per_unit", [128, 256, 1024])
def test_a_large_unit_is_told_from_a_half_and_the_whole(rows_per_unit: int) -> None:
    pace = Pace.of([(64, cost(64)), (128, cost(128))], rows_per_unit)
    least, likely, most = pace.caption
    assert (pace.read, pace.decode) == pytest.approx((0.01, 0.02))
    assert likely * SHARE * rows_per_unit == pytest.approx(cost(rows_per_unit)["caption"])
    assert least == pytest.approx(0.05)
    assert most * SHARE * 128 == pytest.approx(cost(128)["caption"])


def test_units_of_their_true_size_tell_a_mean_and_a_range() -> None:
    seconds = [4.0, 2.0, 3.0]
    pieces = [(32, {"read": 0.0, "decode": 0.0, "caption": value}) for value in seconds]
    assert Pace.of(pieces, 32).caption == pytest.approx((2 / 32, 3 / 32 / SHARE, 4 / 32 / SHARE))


def test_the_slowest_stage_decides() -> None:
    def likely(read: float, caption: float, units: int = 99, pool: Pool = POOL) -> float:
        pace = Pace(read, 0.0, (0.0, caption, caption))
        return pace.seconds(100, units, pool, 3.0)[1]

    assert likely(0.1, 0.1) == pytest.approx(100 * 0.1 / 2)  # two readers
    assert likely(0.0, 0.3) == pytest.approx(100 * 0.3 / 3)  # three CPUs for four captioners
    assert likely(0.0, 0.3, pool=Pool((2, 2), 2, 0.0)) == pytest.approx(100 * 0.3 / 2)
    assert likely(0.0, 0.3, units=1) == pytest.approx(100 * 0.3)  # work for one
    assert likely(0.0, 0.3, pool=Pool((4, 4), 2, 1.0)) == pytest.approx(100 * 0.3 / 4)  # on GPUs


def test_time_and_cost_in_words() -> None:
    hour = [3600.0 - first for first in START]
    said = say_times([hour[0], 2 * hour[1], 3 * hour[2]], 0.0, 7200, 3.5)
    assert "speed       1.0 (0.7 to 2.0) images/s" in said
    assert "1 h 00 min to " in said and "9.0 s of it to start" in said
    assert "cost        6.99 (3.50 to 10.47) at 3.5 an hour" in said
    assert "cost" not in say_times(hour, 0.0, 7200, None)
    assert "cost        0 " in say_times(hour, 0.0, 7200, 0.0)
