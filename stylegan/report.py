"""The page of a run, `report.html`: what changed, captions beside their images, scores, failures,
speed and cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from stylegan.catalog import read_image
from stylegan.images import IsolatedDecoder
from stylegan.pages import THUMBNAIL, duration, price, render, spread, thumbnail

NUM_CARDS = 60  # images on the page
CARD_UNITS = 12  # parts that they are taken from; each is one request for rows and one for images
EXAMPLES = 5  # failed rows shown of each class
EXAMPLE_PARTS = 50  # lists of failed rows that are searched for them

STAGES = ("read", "decode", "caption", "write")
CHANGES = ("new", "changed", "retried", "carried_over", "still_failed", "locked", "gone")


@dataclass(slots=True)
class Card:
    """An image of the run with its captions, one for each style and candidate."""

    id: str
    description: str | None
    captions: list[dict[str, Any]]
    width: int | None
    height: int | None
    picture: str | None = None
    """A data URI; None where the image cannot be had any more."""


@dataclass(slots=True)
class Failure:
    """A class of failed images. examples: some of them, with id and error_message."""

    error_class: str
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)


def write_report(filesystem: fs.FileSystem, run: str, summary: Mapping[str, Any]) -> None:
    """Writes `report.html` into a run directory: one page that needs nothing else.

    run: the directory's path in the file system. Thumbnails are made from the images that the run's
    plan refers to. An image that is gone by now leaves its place empty.
    """
    counts, changes = summary["counts"], summary.get("changes")
    num_fresh = counts["images"]
    if changes:
        num_fresh = sum(changes[kind] for kind in ("new", "changed", "retried"))
    seconds = {stage: summary["seconds_per_stage"].get(stage, 0.0) for stage in STAGES}
    scores = summary.get("scores") or {"counts": {}, "lowest": [], "highest": []}
    with IsolatedDecoder() as decoder, ThreadPoolExecutor(8) as threads:
        has_fresh = bool(counts["statuses"].get("captioned"))
        pictures = _Pictures(filesystem, run, decoder, threads, has_fresh)
        cards = list(_cards(pictures))
        lowest = scores["lowest"]
        highest = [scored for scored in scores["highest"] if scored not in lowest]
        extremes = {
            "Lowest scores of this run": _scored(pictures, lowest),
            "Highest scores of this run": _scored(pictures, highest),
        }
    page = render(
        "report.html.j2", {"duration": duration, "price": price},
        summary=summary,
        comparison=_comparison(summary),
        cost=summary["rates"].get("cost_this_session"),
        cost_per_million=summary["rates"].get("cost_per_million"),
        per_actor=summary["rates"].get("images_per_second_per_actor"),
        busy=summary.get("busy_shares"),
        cards=cards,
        has_fresh=has_fresh,
        scores={style: _histogram(counts) for style, counts in scores["counts"].items()},
        extremes=extremes,
        has_styles=len(summary["settings"]["styles"]) > 1,
        failures=_failures(filesystem, run, counts["error_classes"]),
        num_fresh=num_fresh,
        num_failed=sum(counts["error_classes"].values()),
        review_reasons=counts.get("review_reasons", {}),
        seconds=seconds,
        total_seconds=sum(seconds.values()),
        source=summary["configuration"]["images"] or "the sample catalogue",
        model=summary["configuration"]["model"] or "the shipped model",
        configuration={
            "Command": summary["configuration"],
            "What decides the captions": summary["settings"],
            "Versions": summary["versions"],
        },
    )
    with filesystem.open_output_stream(f"{run}/report.html") as stream:
        stream.write(page.encode("utf-8", "replace"))


def _comparison(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """This run's counts beside those of the previous one, if there is one."""
    old, new, changes = summary.get("previous_counts"), summary["counts"], summary.get("changes")
    if not old or not changes:
        return None
    classes = {**new["error_classes"], **old["error_classes"]}
    pairs = {
        "images": [counts["images"] for counts in (old, new)],
        "rows with a caption": [
            counts["rows"] - counts["statuses"].get("failed", 0) for counts in (old, new)
        ],
        "rows that need review": [counts["needs_review"] for counts in (old, new)],
        **{
            f"failed images: {name}": [c["error_classes"].get(name, 0) for c in (old, new)]
            for name in classes
        },
    }
    failed = sum(new["error_classes"].values()) - changes.get("still_failed", 0)
    return {
        "changes": {name: changes.get(name, 0) for name in CHANGES} | {"newly failed": failed},
        "counts": {name: (a, b, b - a) for name, (a, b) in pairs.items()},
        "replaced": summary.get("replaced", []),
    }


def _histogram(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Bars of a histogram of 0 … 1: from where, how many, and the share of the highest bar."""
    width, most = 1 / len(counts), max(counts)
    return [
        {"low": number * width, "high": (number + 1) * width, "count": count, "share": count / most}
        for number, count in enumerate(counts)
    ]


def _parts(filesystem: fs.FileSystem, folder: str) -> list[str]:
    listing = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return sorted(info.base_name for info in listing if info.base_name.startswith("part-"))


def _read(filesystem: fs.FileSystem, path: str, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of a Parquet file; of the columns those that it has."""
    with filesystem.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        there = [name for name in columns if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = file.read(there).to_pylist()
    return rows


_COLUMNS = ["id", "caption", "style", "caption_score", "description", "status", "needs_review",
            "width", "height"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Makes cards of the rows of a run's parts. fresh_only: of what was not carried over."""

    filesystem: fs.FileSystem
    run: str
    decoder: IsolatedDecoder
    threads: ThreadPoolExecutor
    fresh_only: bool

    def cards(self, part: str, which: str | int) -> Iterator[Card]:
        """Cards of images of a part that have a caption: of an id, or so many, spread evenly."""
        images: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in _read(self.filesystem, f"{self.run}/data/{part}", _COLUMNS):
            is_fresh = row["status"] != "carried_over"
            if row["caption"] is not None and (is_fresh or not self.fresh_only):
                images[row["id"]].append(row)
        picked = [which] if isinstance(which, str) else list(images)
        if isinstance(which, int):
            picked = [picked[row] for row in spread(len(picked), which)]
        # what was not opened for its caption is not opened for the page
        fresh = [row for row in picked if images[row][0]["status"] != "carried_over"]
        blobs = _fetch(self.filesystem, self.run, part, fresh, self.threads)
        found = dict(zip(fresh, blobs, strict=True))
        decoded = self.decoder.decode([found.get(row) for row in picked], THUMBNAIL)
        for row_id, image in zip(picked, decoded, strict=True):
            first = images[row_id][0]
            yield Card(
                row_id, first["description"], images[row_id],
                image.width or first["width"], image.height or first["height"], thumbnail(image),
            )  # fmt: skip


def _cards(pictures: _Pictures) -> Iterator[Card]:
    """Captioned images, spread evenly over the run."""
    parts = _parts(pictures.filesystem, f"{pictures.run}/data")
    chosen = [parts[index] for index in spread(len(parts), CARD_UNITS)]
    for index, name in enumerate(chosen):
        wanted = NUM_CARDS * (index + 1) // len(chosen) - NUM_CARDS * index // len(chosen)
        yield from pictures.cards(name, wanted)


def _scored(pictures: _Pictures, scores: Sequence[Mapping[str, Any]]) -> list[Card]:
    """The images of some captions, with nothing but the caption that has the score."""
    cards = []
    for scored in scores:
        [card] = pictures.cards(f"part-{scored['unit']:05}.parquet", scored["id"])
        card.captions = [
            row
            for row in card.captions
            if (row["style"], row["caption_score"]) == (scored["style"], scored["score"])
        ][:1]
        cards.append(card)
    return cards


def _fetch(
    filesystem: fs.FileSystem, run: str, part: str, ids: Sequence[str], threads: ThreadPoolExecutor
) -> list[bytes | None]:
    """The images of some rows of a part, through the plan; None where there is none to be had."""
    unit = f"{run}/_plan/{part.replace('part-', 'unit-')}"
    try:
        planned = _read(filesystem, unit, ["id", "_image_uri", "_image_bytes"])
    except FileNotFoundError:  # the page of a finished run is written again
        return [None] * len(ids)
    rows = {row["id"]: row for row in planned}

    def fetch(row_id: str) -> bytes | None:
        uri, data = rows[row_id].get("_image_uri"), rows[row_id].get("_image_bytes")
        found = read_image(uri) if uri else data
        return found if isinstance(found, bytes) else None

    return list(threads.map(fetch, ids))


def _failures(
    filesystem: fs.FileSystem, run: str, error_classes: Mapping[str, int]
) -> list[Failure]:
    """The classes of failed images, the most frequent first, with examples."""
    failures = {name: Failure(name, count) for name, count in error_classes.items()}
    parts = _parts(filesystem, f"{run}/errors")
    names = [f"{run}/errors/{parts[index]}" for index in spread(len(parts), EXAMPLE_PARTS)]
    columns = ["id", "error_class", "error_message"]
    with ThreadPoolExecutor(8) as threads:
        for rows in threads.map(lambda name: _read(filesystem, name, columns), names):
            for row in rows:
                failure = failures.get(row["error_class"])
                if failure is not None and len(failure.examples) < EXAMPLES:
                    failure.examples.append(row)
    return sorted(failures.values(), key=lambda failure: -failure.count)
