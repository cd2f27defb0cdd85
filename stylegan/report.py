"""What people read: a run's page and data-set card, a model's card, and the page, the curves and
the TensorBoard files of a training.

Captions, ids, descriptions and messages come from strangers. The pages escape all of them and
forbid themselves scripts and foreign resources; in the cards, such text stands in code spans.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import math
import re
import shlex
import time
import warnings
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
            # what was not opened for its caption is not opened for the page
            fresh = [row for row in picked if images[row][0]["status"] != "carried_over"]
            found = dict(zip(fresh, _fetch(filesystem, run, name, fresh, threads), strict=True))
            blobs = [found.get(row) for row in picked]
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
    "caption_score": "the discriminator's probability that a person wrote it; null without one",
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
    "run_id": "the run that wrote the caption",
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
        "best of": _or_default(settings["best_of"]),
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


def export_card(
    summary: Mapping[str, Any], kind: str, counts: Mapping[str, int],
    features: Sequence[Mapping[str, Any]] | None,
) -> str:  # fmt: skip
    """README.md of an export. features: of the data set, where the files alone do not tell them."""
    settings = summary["settings"]
    path = "data/*.parquet" if kind == "hub" else "*.tar"
    front: dict[str, Any] = {
        "pretty_name": f"Captions, run {summary['run_id']}",
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "tags": ["captions", "synthetic", "stylegan"],
        "size_categories": [_size_category(counts.get("samples", summary["counts"]["rows"]))],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": path}]}
        ],
    }
    if features is not None:
        front["dataset_info"] = {"features": features}
    held = {f"`{name}`": text for name, text in COLUMNS.items()}
    return f"""{_front_matter(front)}
# Captions

Captions of product images, written by a model of `stylegan` (revision
{_code(settings["model_revision"])}) in the styles {", ".join(map(_code, settings["styles"]))}; no
person has read them all.

{_table(("", "number"), {name: f"{count:,}" for name, count in counts.items()})}
## Columns

{EXPORT_LAYOUTS[kind]}

{_table(("column", "what it holds"), held)}
The images belong to whoever they belonged to before.
"""


EXPORT_LAYOUTS = {
    "hub": "Each image is here once for each style and caption, failed ones too, with a null "
    "caption. First come `image` (the image, or where it is) and the columns of the input; then:",
    "webdataset": "A sample is an image with its caption (`txt`) and its row (`json`), which has "
    "the columns of the input, and:",
}


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
image.

{_adversarial_method(config)}`curves.png` shows the training, `training.json` its settings.

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


def _adversarial_method(config: Mapping[str, Any]) -> str:
    """Two paragraphs and what follows them; nothing where the stage did not run."""
    if not config.get("adversarial_steps"):
        return ""
    game = {
        "relativistic": "that a real sentence should score higher than a generated one",
        "minimax": "to tell the two apart",
        "non-saturating": "to tell the two apart",
        "hinge": "to keep the two apart by a margin",
    }
    loss = str(config.get("loss", "relativistic"))
    return f"""\
Then two networks compete. A discriminator reads sentences that people wrote and sentences that the
model samples, with words for product and colour hidden in both, so that it hears the voice and not
the topic. It learns {game.get(loss, "to tell the two apart")} ({loss} loss), with
zero-centred gradient penalties on its embeddings (R1 on real, R2 on generated sentences). The
generator learns from it by policy gradient: of several captions for one product, each is measured
against the others (RLOO). It is paid for style, as the discriminator hears it, and for content: the
right product named, nothing contradicted. The exact KL divergence to the likelihood model, token by
token, and some more likelihood training keep it near what it knew. Delivered is the exponential
moving average of its weights, of the snapshot that did best by its faults and by a detector that
learns anew at each measure. `training.html` tells the story step by step.

`caption_score` is that discriminator's verdict on a caption, from 0 to 1: the probability that a
person wrote the sentence, were captions and people's sentences equally frequent. It is calibrated
(Platt scaling) on people's sentences that it did not learn from and on new captions of the
delivered model. It judges the voice, not whether the caption is true of its image.

"""


def _flags(config: Mapping[str, Any]) -> Iterator[str]:
    """The options of jobs.train that are not its defaults; what was read and written is named where
    it is known."""
    from stylegan.training import TrainingConfig  # imports torch

    defaults = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    paths = {"catalog": "CATALOG", "colloquial": "SENTENCES", "output": "MODEL"}
    for name, value in {**paths, **config}.items():
        if value is None or value is False or (name in defaults and value == defaults[name]):
            continue
        words = value if isinstance(value, list | tuple) else [value]
        yield f"--{name.replace('_', '-')} {shlex.join(map(str, words))}"


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

COLUMNS_OF_PANELS = 3  # of curves.png
WIDTH, HEIGHT = 3.4, 1.9  # inches of a panel on the page
CAPTIONS_OVER_TIME = 8  # of one product on the page of a training


@dataclass(frozen=True, slots=True)
class Panel:
    """A small diagram of one stage.

    quantities: name in the rows → its word in the legend. note: how to read it. guides: where a
    thin line helps the eye, numbers or names of settings. main: drawn in curves.png as well.
    held_out: only what was measured beside the training.
    """

    stage: str
    title: str
    quantities: Mapping[str, str]
    note: str
    guides: tuple[float | str, ...] = ()
    main: bool = False
    held_out: bool = False


PANELS: dict[str, list[Panel]] = {
    "Is it getting better?": [
        Panel(
            "adversarial", "Held-out detector, AUC", {"auc": "AUC"},
            "How well a detector that is not the discriminator tells captions from people's "
            "sentences; 0.5: not at all. Rising together with the reward: the reward is gamed.",
            (0.5,), main=True,
        ),
        Panel(
            "adversarial", "Reward",
            {"reward": "total", "reward_style": "style", "reward_content": "content",
             "reward_form": "form"},
            "What the generator is paid. Style: the discriminator's score, which counts by its "
            "differences only. Content and form: what faults cost.",
            main=True,
        ),
        Panel(
            "adversarial", "Diversity, ratio to people's", {"distinct_2": "distinct-2"},
            "Different pairs of words, relative to as many sentences of people. Far below 1, "
            "captions shrink to a few phrases; above, words are made up.",
            (1.0,), main=True, held_out=True,
        ),
    ],
    "Does it stay true and well formed?": [
        Panel(
            "adversarial", "Product named, share", {"named": "named"},
            "Captions that say the right kind of product.", main=True,
        ),
        Panel(
            "adversarial", "Contradicted or invented, share",
            {"contradiction": "contradicted", "invented": "invented words"},
            "Captions that say what the product is not; words that nobody uses.", main=True,
        ),
        Panel(
            "adversarial", "Form, share", {"unfinished": "unfinished", "repeated": "repeated"},
            "Captions cut off at the longest, or saying three words twice.",
        ),
    ],
    "How far has it moved?": [
        Panel(
            "adversarial", "KL, nats per token", {"kl": "KL"},
            "The distance to the likelihood model, exact. Dotted: what it is steered to.",
            ("kl_target",), main=True,
        ),
        Panel(
            "adversarial", "β, the price of KL", {"beta": "β"},
            "Steered, and doubled by a rollback.",
        ),
        Panel(
            "adversarial", "Length, words", {"words": "captions", "human_words": "people"},
            "A drift away from people's is a cheap way to please a discriminator.",
        ),
    ],
    "Who is ahead?": [
        Panel(
            "adversarial", "Pair accuracy", {"pair_accuracy": "accuracy"},
            "How often the discriminator scores a real sentence above a generated one. At 0.5 it "
            "teaches nothing; near 1 the generator cannot follow.",
            (0.5,), main=True,
        ),
        Panel(
            "adversarial", "Verdicts", {"d_real": "on people's", "d_fake": "on captions"},
            "The discriminator's, 1: a person wrote it. A gap that widens: it runs ahead.",
            main=True,
        ),
        Panel(
            "adversarial", "Discriminator steps so far", {"d_steps": "steps"},
            "Flat where it is ahead and waits, steep where it is behind.",
        ),
        Panel(
            "adversarial", "Discriminator loss", {"loss_discriminator": "loss"},
            "Falling to zero: it has won.",
        ),
        Panel(
            "adversarial", "Gradient penalties", {"r1": "R1, real", "r2": "R2, generated"},
            "How steep the discriminator is around sentences of either kind.",
        ),
        Panel(
            "adversarial", "Learning rate", {"rate": "rate"},
            "Of the generator; halved by a rollback.",
        ),
    ],
    "Before it": [
        Panel(
            "backbone", "Vision backbone: loss, nats", {"loss": "loss"},
            "Cross-entropy of the catalogue's attributes.", main=True,
        ),
        Panel(
            "backbone", "Vision backbone: accuracy, share",
            {"type": "type", "colour": "colour", "gender": "gender"},
            "On held-out photographs.", main=True,
        ),
        Panel(
            "likelihood", "Likelihood: nats per token", {"nats_per_token": "cross-entropy"},
            "Cross-entropy of captions; training and held-out text differ in kind.", main=True,
        ),
        Panel(
            "warm-up", "Warm-up: pair accuracy", {"pair_accuracy": "accuracy"},
            "The discriminator learns alone until it can teach.", (0.5,),
        ),
        Panel(
            "warm-up", "Warm-up: discriminator loss", {"loss_discriminator": "loss"},
            "Falls while it learns to tell the two apart.",
        ),
    ],
}  # fmt: skip

# six colours for curves, then text, lines and what went wrong: the page's, light and dark
LIGHT = ("#3056c9", "#c26a00", "#23857a", "#8a5a9e", "#b8457f", "#6d7a1f",
         "#686a70", "#e2dfd8", "#b3322b")  # fmt: skip
DARK = ("#8fabff", "#e8a54c", "#67c2b0", "#c79ddb", "#f09cc4", "#bccb6c",
        "#9b9da5", "#33363d", "#ff8a80")  # fmt: skip
SOFT, LINE, BAD = LIGHT[6:]

_Rows = Sequence[Mapping[str, Any]]
_Curve = list[tuple[float, float]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(panel: Panel, rows: _Rows) -> dict[tuple[str, str, bool], _Curve]:
    """(quantity, style, held-out) → points; style "" where the name has none. What is not finite
    is no point."""
    curves: dict[tuple[str, str, bool], _Curve] = {}
    for row in rows:
        stage = row["stage"].removesuffix(" held-out")
        held_out = stage != row["stage"]
        if stage != panel.stage or (panel.held_out and not held_out):
            continue
        for name, value in row.items():
            quantity, _, style = name.partition("/")
            if quantity in panel.quantities and _is_number(value):
                curves.setdefault((quantity, style, held_out), []).append((row["step"], value))
    order = list(panel.quantities)
    return dict(sorted(curves.items(), key=lambda item: (order.index(item[0][0]), item[0][2])))


def _last_step(stage: str, rows: _Rows) -> float:
    steps = [row["step"] for row in rows if row["stage"].removesuffix(" held-out") == stage]
    return max(steps, default=0)


def _draw(
    axis: Any, panel: Panel, rows: _Rows, events: _Rows, settings: Mapping[str, Any]
) -> tuple[list[Any], list[str]]:
    """A panel on a matplotlib axis; → handles and words of the legend, none for a single curve."""
    from matplotlib.markers import TICKUP
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    curves = _curves(panel, rows)
    quantities = list(dict.fromkeys(quantity for quantity, _, _ in curves))
    styles = list(dict.fromkeys(style for _, style, _ in curves))
    kinds = {held_out for _, _, held_out in curves}
    handles, words = [], []
    for (quantity, style, held_out), points in curves.items():
        number, other = quantities.index(quantity), styles.index(style)
        if len(styles) > 1:  # colours tell styles apart, dashes quantities
            number, other = other, number
        look = {
            "color": LIGHT[number % 6], "linestyle": ("-", "--", ":", "-.")[other % 4],
            "linewidth": 1.4, "solid_capstyle": "round",
        }  # fmt: skip
        if held_out:
            look |= {"marker": "o", "markersize": 3.2, "linewidth": 1.0}
        elif len(kinds) > 1:
            look |= {"alpha": 0.6}
        elif len(points) == 1:
            look |= {"marker": "o", "markersize": 3.2}
        handles += axis.plot(*zip(*points, strict=True), **look)
        parts = [panel.quantities[quantity]] if len(quantities) > 1 else []
        parts += [style or "all"] if len(styles) > 1 else []
        parts += ["held-out" if held_out else "training"] if len(kinds) > 1 else []
        # mathematics is not meant, and a leading underscore would hide the curve from the legend
        words.append(", ".join(parts).replace("$", r"\$").replace("_", " "))
    for guide in panel.guides:
        level = settings.get(guide) if isinstance(guide, str) else guide
        if _is_number(level):
            axis.axhline(level, color=SOFT, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
    _mark(axis, [event for event in events if event["stage"] == panel.stage], TICKUP)
    axis.set_xlim(0, max(1, _last_step(panel.stage, rows)) * 1.02)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.grid(color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(SOFT)
    axis.tick_params(colors=SOFT, length=0)
    return (handles, words) if len(words) > 1 else ([], [])


def _mark(axis: Any, events: _Rows, tick: int) -> None:
    """Rollbacks and stops as lines, what they took back as a tint, snapshots as ticks."""
    number, since = 0, 0
    snapshots = []
    for event in events:
        step, kind = event["step"], event["kind"]
        if kind == "snapshot":
            snapshots.append(step)
            since = step
        elif kind in ("rollback", "stop"):
            number += kind == "rollback"
            label = kind if kind == "stop" else "rollback 1" if number == 1 else f"{number}"
            axis.axvspan(since, step, color=BAD, alpha=0.08, linewidth=0)
            since = step
            axis.axvline(step, color=BAD, linewidth=0.8, linestyle=(0, (3, 2)))
            axis.annotate(
                label, (step, 1.02), xycoords=axis.get_xaxis_transform(), ha="center",
                va="bottom", color=BAD, fontsize="small",
            )  # fmt: skip
    if snapshots:  # an empty curve would spread over the whole picture
        axis.plot(
            snapshots, [0] * len(snapshots), linestyle="", marker=tick, markersize=4, color=SOFT,
            transform=axis.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def plot_curves(rows: _Rows, path: Path, events: _Rows = ()) -> None:
    """Draws training curves as a PNG: a panel for each stage and unit, held-out figures in it.

    rows: `stage` ("backbone", "backbone held-out", …), `step`, and numbers; `name/style` is a
    style's curve of `name`. events: `stage`, `step`, `kind`; rollbacks are drawn as lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # in the order of the training
    panels = [panel for group in PANELS.values() for panel in group if panel.main]
    panels = [panel for panel in panels if _curves(panel, rows)]
    panels.sort(key=lambda panel: panel.stage == "adversarial")
    num_rows = max(1, -(-len(panels) // COLUMNS_OF_PANELS))
    num_columns = min(COLUMNS_OF_PANELS, max(1, len(panels)))
    figure = Figure(figsize=(5.2 * num_columns, 3.8 * num_rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        handles, words = _draw(axis, panel, rows, events, {})
        axis.set_title(panel.title, loc="left", pad=18 if panel.stage == "adversarial" else 8)
        axis.set_xlabel("step", color=SOFT)
        if handles:
            axis.legend(handles, words, frameon=False, fontsize="small")
    for axis in axes[max(1, len(panels)) :]:
        axis.set_visible(False)
    if not panels:
        axes[0].set(xlabel="step", title="no step was reported yet")
    with warnings.catch_warnings():
        # a style's name may be in a script that matplotlib's own typeface does not have
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png")


def _svg(
    panel: Panel, rows: _Rows, events: _Rows, settings: Mapping[str, Any]
) -> tuple[str, str] | None:
    """A panel as two data URIs of SVG, for a light and a dark page; None where it has no curve."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    if not _curves(panel, rows):
        return None
    plain: Any = {
        "svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 8.0,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    }  # fmt: skip
    stream = io.StringIO()
    with matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's may have it
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        handles, words = _draw(figure.subplots(), panel, rows, events, settings)
        if handles:
            columns = min(3, max(1, 56 // (max(map(len, words)) + 6)))  # letters, and the dash
            figure.set_figheight(HEIGHT + 0.17 * -(-len(words) // columns))
            figure.legend(
                handles, words, loc="outside lower left", ncols=columns, frameon=False,
                labelcolor=SOFT, handlelength=1.6, columnspacing=1.4, borderpad=0.2,
            )  # fmt: skip
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    light = stream.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    colours = dict(zip(LIGHT, DARK, strict=True))
    dark = re.sub("|".join(LIGHT), lambda match: colours[match[0]], light)
    light, dark = (base64.b64encode(svg.encode()).decode() for svg in (light, dark))
    return f"data:image/svg+xml;base64,{light}", f"data:image/svg+xml;base64,{dark}"


# --- the page of a training ---------------------------------------------------------------------

FIGURES = {
    "auc": "Detector AUC",
    "named": "Product named",
    "contradiction": "Contradicted",
    "invented": "Invented words",
    "distinct_2": "Distinct-2 / people's",
    "kl": "KL, nats per token",
}
"""The key figures of a training and their titles."""


def write_training_page(
    path: Path, *, title: str, rows: _Rows, events: _Rows, products: _Rows, samples: _Rows,
    configuration: Mapping[str, Any], verdict: Mapping[str, Mapping[str, Any]] | None,
) -> None:  # fmt: skip
    """Writes one page on a training, finished or not, that needs nothing else.

    rows, events: as for plot_curves, events with `why`, a text. products: `description` and
    `image`, the bytes of a picture or None. samples: `step` and `captions` of these products, the
    first by the likelihood model; when the training has finished, those at the last snapshot are
    what is delivered. verdict: `before` and `after`, name → number or interval (`mean`, `low`,
    `high`), of the likelihood model and of what is delivered; without it the page shows the first
    and the last held-out figures.
    """
    import jinja2

    game = [event for event in events if event["stage"] == "adversarial"]
    ended = [event for event in game if event["kind"] in ("stop", "done")]
    if verdict is not None or ended:
        # what came after the last snapshot is not delivered
        last = max((e["step"] for e in game if e["kind"] == "snapshot"), default=math.inf)
        samples = [sample for sample in samples if sample["step"] <= last]
    before, after = (verdict or {}).get("before", {}), (verdict or {}).get("after", {})
    if verdict is None:
        before, after = _so_far(rows)
    groups = {
        name: [
            {"title": panel.title, "note": panel.note, "light": drawn[0], "dark": drawn[1]}
            for panel in panels
            if (drawn := _svg(panel, rows, events, configuration)) is not None
        ]
        for name, panels in PANELS.items()
    }
    with IsolatedDecoder() as decoder:
        blobs = [product["image"] for product in products]
        pictures = [_thumbnail(image) for image in decoder.decode(blobs, THUMBNAIL)]
    template = resources.files("stylegan").joinpath("training.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        title=title,
        sentence=_sentence(before, after) if verdict is not None else "",
        status=_status(rows, ended),
        figures=_key_figures(before, after),
        span="from the likelihood model to what is delivered"
        if verdict is not None
        else "from the first measurement to the latest",
        num_rollbacks=sum(event["kind"] == "rollback" for event in events),
        story=_story(events),
        groups={name: panels for name, panels in groups.items() if panels},
        histories=[
            {"description": product["description"], "picture": picture, "captions": captions}
            for number, (product, picture) in enumerate(zip(products, pictures, strict=True))
            if (captions := _history(samples, number, verdict is not None or bool(ended)))
        ],
        configuration=configuration,
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def _so_far(rows: _Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last held-out figures of an adversarial stage that goes on."""
    measured = [row for row in rows if row["stage"] == "adversarial held-out"]
    trained = [row for row in rows if row["stage"] == "adversarial"]
    figures: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for row, found in zip((measured[0], measured[-1]) if measured else (), figures, strict=False):
        found |= {k: v for k, v in row.items() if k.partition("/")[0] in FIGURES}
    if measured and trained:
        figures[1].update({k: v for k, v in trained[-1].items() if k.partition("/")[0] == "kl"})
    return figures


def _mean(value: Any) -> float | None:
    mean = value["mean"] if isinstance(value, Mapping) else value
    return float(mean) if _is_number(mean) else None


def _figure(value: Any) -> str:
    mean = _mean(value)
    return "–" if mean is None else _number(mean)


def _key_figures(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that the page begins with: title, before, after, and the latter's interval."""
    names = [(name, *name.partition("/")[::2]) for name in {**before, **after}]
    return [
        {
            "title": f"{title}{f', {style}' if style else ''}",
            "before": _figure(before[name]) if name in before else "",
            "after": _figure(after.get(name)),
            "interval": f"{_figure(value['low'])} to {_figure(value['high'])}"
            if isinstance(value := after.get(name), Mapping)
            else "",
        }
        for known, title in FIGURES.items()
        for name, quantity, style in names
        if quantity == known
    ]


def _sentence(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What the adversarial stage achieved and what it cost, in a sentence or two."""

    def change(name: str) -> tuple[float, str]:
        """What it went up by, 0 where that may be chance, and both figures."""
        old, new = before.get(name), after.get(name)
        first, last = _mean(old), _mean(new)
        if first is None or last is None:
            return 0.0, ""
        text = f"{_figure(first)} → {_figure(last)}"
        intervals = [value for value in (old, new) if isinstance(value, Mapping)]
        if len(intervals) == 2 and (
            max(i["low"] for i in intervals) <= min(i["high"] for i in intervals)
        ):
            return 0.0, text
        if name.startswith("distinct_2"):  # more diverse than people is no merit
            first, last = min(1.0, first), min(1.0, last)
        return last - first, text

    names = [(name, *name.partition("/")[::2]) for name in after]
    sentences = []
    for name, quantity, style in names:
        rise, figures = change(name)
        if quantity == "auc" and figures:
            effect = "harder" if rise < -0.005 else "easier" if rise > 0.005 else "no harder"
            sentences.append(
                f"The adversarial stage made {f'{style} ' if style else ''}captions {effect} to "
                f"tell from people's sentences: the AUC of the watching detector is {figures} "
                "(0.5: it cannot tell), by which the snapshot was chosen."
            )
    sign = {"named": -1, "contradiction": 1, "invented": 1, "distinct_2": -1}
    paid = [
        f"{FIGURES[quantity].lower()} {f'({style}) ' if style else ''}{change(name)[1]}"
        for name, quantity, style in names
        if quantity in sign and change(name)[0] * sign[quantity] > 0.01
    ]
    if paid:
        sentences.append(f"It cost: {', '.join(paid)}.")
    elif sentences and any(quantity in sign and change(name)[1] for name, quantity, _ in names):
        sentences.append("No figure of content or diversity got worse by more than 0.01.")
    return " ".join(sentences)


def _status(rows: _Rows, ended: _Rows) -> str:
    """How far the training is. ended: events of its end; a stop comes before the end itself."""
    if ended:
        event = ended[0]
        verb = "Stopped" if event["kind"] == "stop" else "Finished"
        return f"{verb} at step {event['step']:,} of the {event['stage']} stage."
    if not rows:
        return "No step has been reported yet."
    row = next((row for row in reversed(rows) if "steps" in row), rows[-1])
    text = f"Last reported: {row['stage']} stage, step {row['step']:,}"
    if _is_number(row.get("steps")):
        text += f" of {row['steps']:,}"
    if _is_number(row.get("minutes_left")) and row["minutes_left"] >= 1:
        text += f", about {row['minutes_left']:,.0f} minutes left in it"
    return text + "."


def _story(events: _Rows) -> list[dict[str, str]]:
    """The events as they came, snapshots without anything between them as one."""
    words = {"snapshot": "snapshot", "rollback": "rollback", "stop": "stop", "done": "finished"}
    story: list[dict[str, str]] = []
    rollbacks: dict[str, int] = defaultdict(int)
    for event in events:
        kind, step = event["kind"], f"{event['step']:,}"
        entry = {
            "kind": kind, "what": words.get(kind, kind), "stage": event["stage"],
            "steps": f"Step {step}", "why": event["why"],
        }  # fmt: skip
        if kind == "rollback":
            rollbacks[event["stage"]] += 1
            entry["what"] += f" {rollbacks[event['stage']]}"
        last = story[-1] if story else {}
        if kind == "snapshot" == last.get("kind") and event["stage"] == last["stage"]:
            entry["steps"] = f"{last['steps'].replace('Step ', 'Steps ')}, {step}"
            story.pop()
        story.append(entry)
    return story


def _history(samples: _Rows, product: int, finished: bool) -> list[dict[str, str]]:
    """A product's captions where they changed, the first and the last among them."""
    said = [(s["step"], s["captions"][product]) for s in samples if product < len(s["captions"])]
    last = len(said) - 1
    chosen = [
        index for index in range(len(said)) if not index or said[index][1] != said[index - 1][1]
    ]
    if len(chosen) > CAPTIONS_OVER_TIME:
        chosen = [chosen[i] for i in _spread(len(chosen) - 1, CAPTIONS_OVER_TIME - 1)] + chosen[-1:]
    if last > 0 == chosen[-1]:
        chosen.append(last)
    names = {index: f"step {said[index][0]:,}" for index in chosen}
    if finished and chosen:
        since = "" if chosen[-1] == last else f", since step {said[chosen[-1]][0]:,}"
        names[chosen[-1]] = f"delivered{since}"
    names[0] = "likelihood model" if last > 0 or not finished else "likelihood model, delivered"
    return [{"when": names[index], "caption": said[index][1]} for index in chosen]


# --- TensorBoard --------------------------------------------------------------------------------


class TensorBoard:
    """Writes the rows of a training as TensorBoard's event files, in a folder for each stage.

    A training and its held-out figures have the same tags, so that TensorBoard draws them into one
    diagram. Where a stage goes on from an earlier step than was written, by a resume or a rollback,
    TensorBoard is told to forget what lay beyond. Writes nothing where tensorboardX is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[str, tuple[Any, int]] = {}  # stage → writer, last step
        try:
            from tensorboardX import event_file_writer
        except ImportError as error:
            self._open: Any = None
            logging.getLogger(__name__).warning(
                "no TensorBoard files in %s: %s; pip install tensorboardX", directory, error
            )
        else:
            self._open = event_file_writer.EventsWriter
            self._event = event_file_writer.event_pb2.Event

    def add(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among the values; others are left out."""
        if self._open is None:
            return
        if stage not in self._writers:
            folder = self._directory / stage.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            # a name of its own: the writer's has whole seconds, and would replace another of them
            self._writers[stage] = (self._open(str(folder / "events"), f".{time.time_ns()}"), step)
            self._write(stage, step, {"session_log": {"status": "START"}})
        elif step <= self._writers[stage][1]:
            self._write(stage, step, {"session_log": {"status": "START"}})
        scalars = [
            {"tag": name, "simple_value": value}
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        self._write(stage, step, {"summary": {"value": scalars}})
        writer = self._writers[stage][0]
        writer.flush()
        self._writers[stage] = (writer, step)

    def _write(self, stage: str, step: int, content: dict[str, Any]) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._writers[stage][0].write_event(event)

    def close(self) -> None:
        for writer, _ in self._writers.values():
            writer.close()
        self._writers.clear()
