"""How long a run takes and what it costs, from some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from stylegan.cluster import Pool
from stylegan.pages import duration, price, spread

SAMPLE = 128  # rows that are read and captioned, or fewer
SAMPLE_UNITS = 8  # that they are taken from
# Not measured by a sample: seconds, at least, likely and at most, for the imports of the job and
# the plan and workers of its first data set; and the share of what a captioner reaches alone that
# it reaches beside its like. Both as seen on two cores.
START = (6.0, 9.0, 14.0)
SHARE = 0.87


def draw_sample(read: Callable[[int], pa.Table], units: Sequence[int]) -> pa.Table:
    """About SAMPLE rows, spread evenly over units. read: the rows of a unit."""
    chosen = [units[index] for index in spread(len(units), SAMPLE_UNITS)]
    tables = []
    for place, unit in enumerate(chosen):
        wanted = SAMPLE * (place + 1) // len(chosen) - SAMPLE * place // len(chosen)
        rows = read(unit)
        tables.append(rows.take(spread(len(rows), wanted)))
    return pa.concat_tables(tables)


def divide(rows: int, rows_per_unit: int, total: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of what is captioned at a time of a sample, for `Pace.of`.

    Units of their true size where the sample holds several; else all of it, and first a half, for
    a unit of a thousand rows costs less than eight of 128: the last rows that obey no rule are
    drawn again in passes of their own.
    """
    if rows_per_unit <= rows // 2:
        for start in range(0, rows - rows_per_unit + 1, rows_per_unit):
            yield start, rows_per_unit
    else:
        if total > rows > 1:
            yield 0, rows // 2
        yield 0, rows


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one worker's work on an image. caption: at least, likely, at most."""

    read: float
    decode: float
    caption: tuple[float, float, float]

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, Mapping[str, float]]], rows_per_unit: int) -> Pace:
        """pieces: of a sample, as `divide` cuts it: number of rows, and seconds of each stage."""
        rows = sum(count for count, _ in pieces)
        read, decode = (sum(seconds[s] for _, seconds in pieces) / rows for s in ("read", "decode"))
        each = [seconds["caption"] / count for count, seconds in pieces]
        least, likely, most = min(each), sum(each) / len(each), max(each)
        (few, less), (many, more) = pieces[0], pieces[-1]  # equal but for a half and the whole
        if few < many:  # a fixed part of each unit, and one of each row
            least = max(0.0, (more["caption"] - less["caption"]) / (many - few))
            fixed = more["caption"] - least * many
            likely, most = least + fixed / rows_per_unit, each[-1]
        return cls(read, decode, (least, likely / SHARE, most / SHARE))

    def seconds(self, images: int, units: int, pool: Pool, cpus: float) -> list[float]:
        """Of the slowest stage for so many images: at least, likely, at most.

        cpus: that all stages share.
        """
        fetching = (self.read + self.decode) / min(pool.readers, units)
        return [
            images * max(
                fetching,
                caption / min(pool.actors[1], units),
                (self.decode + (0 if pool.gpus else caption)) / cpus,
            )
            for caption in self.caption
        ]  # fmt: skip


def say_times(seconds: Sequence[float], start: float, images: int, per_hour: float | None) -> str:
    """Lines on speed, time and cost. seconds: at least, likely, at most, without the start.

    start: seconds until the first image was captioned, without START. per_hour: the price of
    all machines.
    """

    def between(low: str, likely: str, high: str) -> str:
        return likely if low == high else f"{likely} ({low} to {high})"

    starts = [start + more for more in START]
    whole = [first + rest for first, rest in zip(starts, seconds, strict=True)]
    speeds = [f"{images / value:,.1f}" for value in reversed(seconds)]
    lines = [
        f"speed       {between(*speeds)} images/s",
        f"time        {between(*map(duration, whole))}, {duration(starts[1])} of it to start",
    ]
    if per_hour is not None:
        costs = [price(value / 3600 * per_hour) for value in whole]
        lines.append(f"cost        {between(*costs)} at {per_hour:g} an hour")
    return "\n".join(lines)
