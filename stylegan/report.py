"""What people read: a run's page and data-set card, a model's card and training curves.

Captions, ids, descriptions and messages come from strangers. The page escapes all of them and
forbids itself scripts and foreign resources; in the cards, such text stands in code spans.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from stylegan.catalog import read_image
from stylegan.images import DecodedImage, IsolatedDecoder

NUM_CARDS = 60  # images on the page
CARD_UNITS = 12  # parts that they are taken from; each is one request for rows and one for images
THUMBNAIL = 224  # pixels of the longer side
EXAMPLES = 5  # failed rows shown of each class
EXAMPLE_PARTS = 50  # lists of failed rows that are searched for them

STAGES = ("read", "decode", "caption", "write")


# --- the page of a run --------------------------------------------------------------------------


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
    # here and not above: every worker imports this module, through stylegan.run
    import jinja2

    counts = summary["counts"]
    seconds = {stage: summary["seconds_per_stage"].get(stage, 0.0) for stage in STAGES}
    cards = list(_cards(filesystem, run))
    template = resources.files("stylegan").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = _duration
    page = environment.from_string(template).render(
        summary=summary,
        cards=cards,
        has_styles=len(summary["settings"]["styles"]) > 1,
        failures=_failures(filesystem, run, counts["error_classes"]),
        num_failed=sum(counts["error_classes"].values()),
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


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers 0 … count - 1, evenly spaced, the first among them."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


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


def _cards(filesystem: fs.FileSystem, run: str) -> Iterator[Card]:
    """Captioned images, spread evenly over the run."""
    columns = ["id", "caption", "style", "caption_score", "description", "status", "needs_review",
               "width", "height"]  # fmt: skip
    parts = _parts(filesystem, f"{run}/data")
    chosen = [parts[index] for index in _spread(len(parts), CARD_UNITS)]
    with IsolatedDecoder() as decoder, ThreadPoolExecutor(8) as threads:
        for index, name in enumerate(chosen):
            wanted = NUM_CARDS * (index + 1) // len(chosen) - NUM_CARDS * index // len(chosen)
            rows = _read(filesystem, f"{run}/data/{name}", columns)
            images: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for row in rows:
                if row["caption"] is not None:
                    images[row["id"]].append(row)
            captioned = list(images)
            picked = [captioned[row] for row in _spread(len(captioned), wanted)]
            blobs = _fetch(filesystem, run, name, picked, threads)
            for row_id, image in zip(picked, decoder.decode(blobs, THUMBNAIL), strict=True):
                first = images[row_id][0]
                yield Card(
                    row_id, first["description"], images[row_id],
                    image.width or first["width"], image.height or first["height"],
                    _thumbnail(image),
                )  # fmt: skip


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


def _thumbnail(image: DecodedImage) -> str | None:
    """A small JPEG in the shape of the original, as a data URI."""
    if image.pixels is None or not image.width or not image.height:
        return None
    scale = THUMBNAIL / max(image.width, image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    jpeg = io.BytesIO()
    Image.fromarray(image.pixels).resize(size).save(jpeg, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def _failures(
    filesystem: fs.FileSystem, run: str, error_classes: Mapping[str, int]
) -> list[Failure]:
    """The classes of failed images, the most frequent first, with examples."""
    failures = {name: Failure(name, count) for name, count in error_classes.items()}
    parts = _parts(filesystem, f"{run}/errors")
    names = [f"{run}/errors/{parts[index]}" for index in _spread(len(parts), EXAMPLE_PARTS)]
    columns = ["id", "error_class", "error_message"]
    with ThreadPoolExecutor(8) as threads:
        for rows in threads.map(lambda name: _read(filesystem, name, columns), names):
            for row in rows:
                failure = failures.get(row["error_class"])
                if failure is not None and len(failure.examples) < EXAMPLES:
                    failure.examples.append(row)
    return sorted(failures.values(), key=lambda failure: -failure.count)


# --- cards --------------------------------------------------------------------------------------

COLUMNS = {
    "id": "identifies the row; the path where the input names no other",
    "caption": "the caption, null when the row failed",
    "style": "the voice it is written in",
    "caption_score": "the discriminator's verdict, null while there is none",
    "description": "the formal description, given or predicted from the image",
    "status": "`captioned`, `carried_over`, `locked` (a person wrote the caption) or `failed`",
    "needs_review": "true where the captioner doubts its caption",
    "error_class": "why a row failed, in a few classes",
    "error_message": "the same in a sentence",
    "image_sha256": "of the image's bytes",
    "width": "pixels of the upright image",
    "height": "pixels of the upright image",
    "model_id": "the model that wrote the caption",
    "model_revision": "a hash of its files",
    "fingerprint": "a hash of all that the caption depends on",
    "run_id": "the run that wrote the row",
    "seed": "of this row's noise",
    "num_generated_tokens": "length of the caption in tokens",
    "generated_at": "when, UTC",
}


def data_card(summary: Mapping[str, Any]) -> str:
    """README.md of a run directory: a data-set card as the Hugging Face hub reads it."""
    counts, settings = summary["counts"], summary["settings"]
    configuration, versions = summary["configuration"], summary["versions"]
    front = {
        "pretty_name": f"Captions, run {summary['run_id']}",
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "tags": ["captions", "synthetic", "stylegan"],
        "size_categories": [_size_category(counts["rows"])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    }
    facts = {
        "images": f"{counts['images']:,}",
        "rows": f"{counts['rows']:,}",
        **{f"rows {name}": f"{count:,}" for name, count in counts["statuses"].items()},
        "rows that need review": f"{counts['needs_review']:,}",
        **{f"images that failed: {k}": f"{n:,}" for k, n in counts["error_classes"].items()},
    }
    made = {
        "input": _code(configuration["images"] or "the sample catalogue"),
        "input digest": _code(summary["input"]["digest"]),
        "model": _code(configuration["model"] or "the shipped model"),
        "model revision": _code(settings["model_revision"]),
        "styles": ", ".join(map(_code, settings["styles"])),
        "captions an image and style": str(settings["captions_per_image"]),
        "temperature": _or_default(settings["temperature"]),
        "longest caption, tokens": _or_default(settings["max_new_tokens"]),
        "seed": str(settings["seed"]),
        "finished": summary["finished_at"],
        "with": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return f"""{_front_matter(front)}
# Captions

Captions of product images, written by a model of `stylegan`; no person has read them all.
`report.html` shows some beside their images, `summary.json` has every figure.

{_table(("", "number"), facts)}
## Columns

Each row of the input is here once for each style and caption, failed rows too. First come the
columns of the input, without image bytes; then:

{_table(("column", "what it holds"), {f"`{name}`": text for name, text in COLUMNS.items()})}
`errors/` lists the failed rows of the input, whole.

## How it was made

{_table(("", ""), made)}
The images belong to whoever they belonged to before; they are not part of this data set.
"""


def _size_category(rows: int) -> str:
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    sizes = [10 ** (3 + index) for index in range(len(bounds))]
    for index, size in enumerate(sizes):
        if rows < size:
            return f"{bounds[index - 1]}<n<{bounds[index]}" if index else "n<1K"
    return "n>1T"


def _or_default(value: float | None) -> str:
    return "the model's own" if value is None else f"{value:g}"


def model_card(metrics: Mapping[str, Any], config: Mapping[str, Any], notes: str) -> str:
    """README.md of a model directory: a model card as the Hugging Face hub reads it.

    metrics: name → number, interval (`mean`, `low`, `high`), or a group: name → number or interval,
    or baseline → name → number or interval, which becomes a table with a column for each baseline.
    config: the settings of the training. notes: Markdown about data and limits, taken as it is.
    """
    front = {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "stylegan",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "colloquial", "stylegan"],
    }
    flags = "".join(f" \\\n    {flag}" for flag in _flags(config))
    return f"""{_front_matter(front)}
# A captioner of the {config.get("preset", "small")} preset

## What it does

Writes a colloquial sentence about the product in a picture, as a shop could print it; with a formal
description beside the picture, or instead of it, it keeps to what that says.

```python
from stylegan import Captioner

captioner = Captioner.from_pretrained("path/of/this/directory")
print(captioner.caption(["photo.jpg"])[0].text)
```

## Method

A vision backbone, a projector and a causal language model, conditioned on style, on the formal
description where there is one, and on noise. The backbone learns to tell apart products, colours
and whom they are for; then the language model learns two roads by maximum likelihood: to describe
an image formally, and to say a description colloquially. No colloquial sentence belonged to any
image. `curves.png` shows the training, `training.json` its settings.

## Data

{notes.strip() or "Not described: the training was started without `--notes`."}

## Measured quality

On data that was held out. In brackets: the 95 % interval.

{_metrics(metrics)}
## Limits

English only. It names the kind of product, its colour and whom it is for; do not trust it on brand,
material, size or price, which a picture seldom shows. It errs more on products and photographs
unlike those it learned from. It knows nothing of people, and must not be used to judge them. Read
what it marks `needs_review` before it is printed.

## The command that makes it again

```
python -m jobs.train{flags}
```
"""


def _flags(config: Mapping[str, Any]) -> Iterator[str]:
    """The options of jobs.train; what was read and written is named where it is known."""
    paths = {"catalog": "CATALOG", "colloquial": "SENTENCES", "output": "MODEL"}
    for name, value in {**paths, **config}.items():
        if value is None or value is False:
            continue
        words = value if isinstance(value, list | tuple) else [value]
        yield " ".join([f"--{name.replace('_', '-')}", *(str(word) for word in words)])


def _metrics(metrics: Mapping[str, Any]) -> str:
    """Single numbers as one table, then a table for each group."""
    single = {name: value for name, value in metrics.items() if not _is_group(value)}
    tables = [_table(("", "measured"), _numbers(single))] if single else []
    for title, group in metrics.items():
        if not _is_group(group):
            continue
        if any(map(_is_group, group.values())):
            names = dict.fromkeys(name for row in group.values() for name in row)
            rows = {
                _words(name): " | ".join(_number(row.get(name)) for row in group.values())
                for name in names
            }
            tables.append(f"### {_words(title)}\n\n{_table(('', *map(_words, group)), rows)}")
        else:
            tables.append(f"### {_words(title)}\n\n{_table(('', 'measured'), _numbers(group))}")
    return "\n".join(tables) or "Nothing was measured.\n"


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and "mean" not in value


def _numbers(values: Mapping[str, Any]) -> dict[str, str]:
    return {_words(name): _number(value) for name, value in values.items()}


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{_number(value['mean'])} ({_number(value['low'])} to {_number(value['high'])})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else _code(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("|", "/")


def _table(head: Sequence[str], rows: Mapping[str, str]) -> str:
    """A Markdown table; a row's text may hold several cells."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {name} | {text} |" for name, text in rows.items()]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """Text that is not ours as a code span that it cannot leave, on one line, in a table too."""
    text = re.sub(r"[\s`|]+", " ", text).strip() or " "
    return f"`{text}`"


def _front_matter(content: Mapping[str, Any]) -> str:
    # JSON values are YAML values, and cannot break out of their line
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items()]
    return "\n".join(["---", *lines, "---"])


# --- curves -------------------------------------------------------------------------------------

QUANTITIES = {
    "loss": "cross-entropy, nats",
    "nats_per_token": "cross-entropy, nats per token",
    "type": "accuracy, share",
    "colour": "accuracy, share",
    "gender": "accuracy, share",
}
"""What is drawn, and on which axis; other numbers of a row, such as rates and speeds, are not."""


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws training curves as a PNG: a panel for each stage and unit, held-out figures in it.

    rows: `stage` ("backbone", "backbone held-out", …), `step`, and numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        family = row["stage"].removesuffix(" held-out")
        is_held_out = row["stage"] != family
        for name, unit in QUANTITIES.items():
            if row.get(name) is not None:
                curves = panels.setdefault((family, unit), {})
                what = f"{name}, " if unit.startswith("accuracy") else ""
                label = what + ("held-out" if is_held_out else "training")
                curves.setdefault(label, []).append((row["step"], row[name]))
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axis, ((family, unit), curves) in zip(axes, panels.items(), strict=False):
        for label, points in curves.items():
            marker = "o" if "held-out" in label else None
            axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        axis.set(title=family, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    if not panels:
        axes[0].set(xlabel="step", title="no step was reported yet")
    figure.savefig(path, format="png")
