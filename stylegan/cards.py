"""Data-set and model cards, as the Hugging Face hub reads them.

Text that comes from strangers stands in code spans that it cannot leave.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS = {
    "id": "identifies the row; the path where the input names no other",
    "caption": "the caption, null when the row failed",
    "style": "the voice it is written in",
    "caption_score": "the critic's probability that a person wrote it; null without one",
    "description": "the formal description, given or predicted from the image",
    "status": "`captioned`, `carried_over`, `locked` (a person wrote the caption) or `failed`",
    "needs_review": "true where no caption obeyed every rule, or its score is too low",
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
        **{f"for this reason: {k}": f"{n:,}" for k, n in counts.get("review_reasons", {}).items()},
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


_ROUNDS = """\
Two networks compete in rounds. In each the generator samples thousands of captions. Discriminators
read them and sentences that people wrote, with words for product and colour hidden in both, so that
they hear the voice and not the topic, and learn how much likelier people are to write a sentence
than the generator is; each judges captions that it did not learn from. Then the generator learns
its own captions, each weighted by these odds (as in MaliGAN), and none that breaks a rule. Some
more likelihood training keeps it near what it knew. Delivered are the weights of the round that did
best by its faults and by a detector that learns anew at each measure.

"""
_CRITIC = """\
When the game is over a critic takes the discriminator's place: a linear model of words and pairs of
words, topic hidden, fitted to thousands of captions as they are delivered and to people's
sentences. Where `generation_config.json` has a `selectivity` above 1, captions are delivered by
rejection sampling, in proportion to its odds, so that what captions say too often comes no more
often than people say it.
`caption_score` is its verdict on a caption, from 0 to 1: the probability that a person wrote the
sentence, were captions and people's sentences equally frequent. It is calibrated (Platt scaling) on
people's sentences and captions that it did not learn from. It judges the voice, not whether the
caption is true of its image.

"""


_PROOFREADER = """\
A pretrained language model proofreads: captions that it finds odder than three in four of people's
sentences of about their length have no weight.

"""

_JUDGED = """\
A pretrained language model proofreads. It has learned from captions that somebody read which of
them are fit to print; captions that it finds unfit have no weight.

"""


def _adversarial_method(config: Mapping[str, Any]) -> str:
    """A paragraph for each part and what follows it; nothing where the stage did not run."""
    rounds = _ROUNDS * bool(config.get("rounds"))
    if config.get("proofreader"):
        rounds += (_JUDGED if config.get("judged") else _PROOFREADER) * bool(rounds)
    if not config.get("adversarial_steps"):
        return (rounds + _CRITIC) * bool(rounds)
    game = {
        "relativistic": "that a real sentence should score higher than a generated one",
        "minimax": "to tell the two apart",
        "non-saturating": "to tell the two apart",
        "hinge": "to keep the two apart by a margin",
    }
    loss = str(config.get("loss", "relativistic"))
    matching = "; for pairs of words as frequent as with people too" * bool(
        config.get("matching_weight")
    )
    return f"""\
Then two networks compete. A discriminator reads sentences that people wrote and sentences that the
model samples, with words for product and colour hidden in both, so that it hears the voice and not
the topic. It learns {game.get(loss, "to tell the two apart")} ({loss} loss), with
zero-centred gradient penalties on its embeddings (R1 on real, R2 on generated sentences). The
generator learns from it by policy gradient: of several captions for one product, each is measured
against the others (RLOO). It is paid for style, as the discriminator hears it, and for content: the
right product named, nothing contradicted{matching}.
The exact KL divergence to the likelihood model, token by token, and some more likelihood training
keep it near what it knew. Delivered is the exponential moving average of its weights, of the
snapshot that did best by its faults and by a detector that
learns anew at each measure. `training.html` tells the story step by step.

{rounds}{_CRITIC}"""


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
                _words(name): " | ".join(number(row.get(name)) for row in group.values())
                for name in names
            }
            tables.append(f"### {_words(title)}\n\n{_table(('', *map(_words, group)), rows)}")
        else:
            tables.append(f"### {_words(title)}\n\n{_table(('', 'measured'), _numbers(group))}")
    return "\n".join(tables) or "Nothing was measured.\n"


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and "mean" not in value


def _numbers(values: Mapping[str, Any]) -> dict[str, str]:
    return {_words(name): number(value) for name, value in values.items()}


def number(value: Any) -> str:
    """A figure or an interval; other text as a code span, None as nothing."""
    if isinstance(value, Mapping):
        return f"{number(value['mean'])} ({number(value['low'])} to {number(value['high'])})"
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
