"""How many machines, hours and how much money so many images take: computed from stated rates."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from math import ceil

HELP = {
    "decode_rate": "images/s that one core fetches and decodes",
    "caption_rate": "images/s that one captioner makes",
    "price_decoder": "an hour of a decoder machine",
    "price_captioner": "an hour of a captioner machine",
    "cores": "cores of a decoder machine",
    "captioners": "captioners on a captioner machine",
    "efficiency": "share of its time that a captioner works",
    "start": "seconds until the machines are up and the first image is captioned",
    "hours": "hours that it may take, the start among them",
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a size rests on; HELP says what each is, and in which unit."""

    decode_rate: float
    caption_rate: float
    price_decoder: float
    price_captioner: float
    cores: float = 8
    captioners: float = 1
    efficiency: float = 0.95
    start: float = 600
    hours: float = 8

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Assumptions:
        """From the command line. Raises ValueError for what is missing or impossible."""
        values = {name: getattr(arguments, name) for name in HELP}
        for name, value in values.items():
            if value is None or not 0 < value < float("inf"):
                said = "missing" if value is None else f"{value:g}"
                raise ValueError(f"--{name.replace('_', '-')} is {said}: give a number above 0")
        given = cls(**values)
        if given.efficiency > 1:
            raise ValueError(f"--efficiency is {given.efficiency:g}: give at most 1")
        if given.hours * 3600 <= given.start:
            raise ValueError(
                f"--hours {given.hours:g} are over when the start ({given.start:g} s) is: raise it"
            )
        return given


@dataclass(frozen=True, slots=True)
class Size:
    """Machines of each kind, the hours that they run, and what they cost."""

    decoders: int
    captioners: int
    hours: float
    cost: float


def size(images: int, given: Assumptions) -> Size:
    """The fewest captioner machines that are done in time, and the decoders that feed them."""
    captioning = given.captioners * given.caption_rate * given.efficiency  # images/s of a machine
    captioners = ceil(images / captioning / (given.hours * 3600 - given.start))
    decoders = ceil(captioners * captioning / (given.cores * given.decode_rate))
    hours = (given.start + images / captioning / captioners) / 3600
    each = decoders * given.price_decoder + captioners * given.price_captioner
    return Size(decoders, captioners, hours, hours * each)


def table(images: Sequence[int], given: Assumptions) -> str:
    """Markdown: a row for each number of images, then what it assumes."""
    lines = ["| images | decoder machines | captioner machines | hours | cost | a million |"]
    lines.append("|---|---|---|---|---|---|")
    for count in images:
        made = size(count, given)
        lines.append(
            f"| {count:,} | {made.decoders:,} | {made.captioners:,} | {made.hours:.1f} | "
            f"{made.cost:,.0f} | {made.cost / count * 1e6:,.2f} |"
        )
    assumed = "; ".join(f"{getattr(given, name):g} {meaning}" for name, meaning in HELP.items())
    return "\n".join([*lines, "", f"Assumed: {assumed}. The head is not counted."])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each assumption."""
    for field in fields(Assumptions):
        default = None if field.default is MISSING else field.default
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=float, default=default, metavar="F", help=f"--sizing: {HELP[field.name]}"
        )
