from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from stylegan import sizing
from stylegan.sizing import Assumptions, size

GIVEN = Assumptions(
    decode_rate=100, caption_rate=50, price_decoder=2, price_captioner=3, cores=4, captioners=2,
    efficiency=0.5, start=3600, hours=3,
)  # fmt: skip


def test_a_size_by_hand() -> None:
    # a captioner machine makes 50 images/s, so 360,000 in the two hours that are left
    made = size(720_000, GIVEN)
    assert (made.captioners, made.decoders) == (2, 1)
    assert made.hours == pytest.approx(3)
    assert made.cost == pytest.approx(3 * (2 * 3 + 1 * 2))
    assert size(720_001, GIVEN).captioners == 3


def test_decoders_feed_all_captioners() -> None:
    for images in (10**6, 10**8, 10**9):
        made = size(images, GIVEN)
        needed = images / ((made.hours - 1) * 3600)
        assert made.decoders * 400 >= needed * (1 - 1e-9)
        assert made.captioners * 50 >= needed * (1 - 1e-9)
        assert made.hours <= 3 + 1e-9
        assert (made.decoders - 1) * 400 < made.captioners * 50


def parse(*more: str) -> Assumptions:
    parser = argparse.ArgumentParser()
    sizing.add_arguments(parser)
    return Assumptions.of(parser.parse_args(more))


MEASURED = ("--decode-rate=400", "--caption-rate=200", "--price-decoder=.4", "--price-captioner=.8")


def test_the_table_shows_every_assumption() -> None:
    given = parse(*MEASURED, "--hours", "7")
    assert given.hours == 7
    table = sizing.table([10_000_000, 1_000_000_000], given)
    lines = table.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    made = size(10_000_000, given)
    row = f"| 10,000,000 | {made.decoders} | {made.captioners} | {made.hours:.1f} | "
    assert lines[2].startswith(row)
    for name, value in dataclasses.asdict(given).items():
        assert f"{value:g} {sizing.HELP[name]}" in table


def test_the_readme_has_the_table_that_its_command_prints() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (command,) = re.findall(r"`python -m jobs\.benchmark (--sizing [^`]+)`", readme)
    _, numbers, *flags = command.split()
    table = sizing.table([int(number) for number in numbers.split(",")], parse(*flags))
    assert table.split("\n\n")[0] in readme


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (MEASURED[1:], "--decode-rate is missing"),
        ((*MEASURED, "--cores", "0"), "--cores is 0"),
        ((*MEASURED, "--efficiency", "1.1"), "--efficiency is 1.1"),
        ((*MEASURED, "--hours", "0.1"), "--hours 0.1 are over"),
        ((*MEASURED, "--price-decoder", "nan"), "--price-decoder is nan"),
    ],
)
def test_what_is_impossible_is_named(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*flags)
