"""Measures a captioner on held-out photographs and text, beside its baselines.

    python -m jobs.evaluate --catalog catalog.csv --training sentences.csv --real held-out.csv

Rows: real text, a template, a retrieved training sentence of the same kind of product, the model at
temperature 1 without candidates or rules, and the model as it is delivered: from the image alone,
and with the titles given. Columns: content by the lexicon, diversity, novelty and detectors
(stylegan/metrics.py). Only rows of the catalogue with split `val` are used. Prints a Markdown
table; --output writes `evaluation.json`, `evaluation.md` and `captions.csv`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.train import InputError, read_table
from stylegan import corpora, metrics
from stylegan.captioner import Captioner
from stylegan.report import model_card


def measure(
    captions: Sequence[str], truths: Sequence[corpora.Concepts] | None, real: Sequence[str],
    training: Sequence[str], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table. Diversity is beside an equal number of real sentences."""
    random = np.random.default_rng(seed)
    count = min(len(captions), len(real))
    sample = [captions[i] for i in random.permutation(len(captions))[:count]]
    people = [real[i] for i in random.permutation(len(real))[:count]]
    row: dict[str, Any] = {"captions": len(captions)}
    if truths is not None:
        row |= {k: dataclasses.asdict(v) for k, v in metrics.content(captions, truths).items()}
    row |= {
        "first_person": float(np.mean([corpora.is_first_person(text) for text in captions])),
        "distinct_captions": len(set(captions)) / len(captions),
        "distinct_2_ratio": metrics.distinct_n(sample, 2) / metrics.distinct_n(people, 2),
        "novel": metrics.novelty(captions, training),
        "copied_8_grams": metrics.copied(captions, training),
        "invented_words": metrics.invented_words(captions, [*training, *real]),
        "words": float(np.mean([len(text.split()) for text in captions])),
        "auc_words": metrics.detector_auc(people, sample, metrics.word_detector, seed),
        "auc_characters": metrics.detector_auc(people, sample, metrics.character_detector, seed),
    }
    return row


def retrieved(truths: Sequence[corpora.Concepts], training: Sequence[str], seed: int) -> list[str]:
    """For each product a random training sentence that names its kind."""
    by_kind: dict[str, list[str]] = {}
    for text in training:
        for mention in corpora.lexicon().mentions(corpora.normalise(text)):
            for kind in mention.types:
                by_kind.setdefault(kind, []).append(text)
    random = np.random.default_rng(seed)
    return [
        corpora.sentence(options[random.integers(len(options))])
        for truth in truths
        for options in [[t for k in truth.head for t in by_kind.get(k, [])] or list(training)]
    ]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Rows as Markdown."""
    columns = [name for name in max(rows.values(), key=len) if name != "captions"]

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, dict):
            return f"{value['mean']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"

    lines = [
        "| | n | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for name, row in rows.items():
        cells = [cell(row.get(column)) for column in columns]
        lines.append(f"| {name} | {row['captions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """All rows, and the captions: [image, truth, title, caption from the image, from the title]."""
    catalog = [row for row in read_table(arguments.catalog) if row.get("split") == "val"]
    catalog = [row for row in catalog if arguments.only in row["image"]][: arguments.limit]
    if not catalog:
        raise InputError(f"--catalog {arguments.catalog} has no rows with split 'val'")
    base = Path(arguments.catalog).parent
    images = [str(base / row["image"]) for row in catalog]
    titles = [row.get("title") or row["description"] for row in catalog]
    truths = [corpora.lexicon().concepts(row["description"]) for row in catalog]
    named = [
        corpora.lexicon().concepts(t).filled_from(c) for t, c in zip(titles, truths, strict=True)
    ]
    training = [
        corpora.normalise(row["text"])
        for uri in arguments.training
        for row in read_table(uri)
        if row.get("tier", "caption") == "caption"
    ]
    real = [
        corpora.sentence(row["text"])
        for row in read_table(arguments.real)
        if row.get("split", "val") == "val"
        and row.get("tier", "caption") == "caption"
        and row.get("source", "womens-reviews") == "womens-reviews"
        and not corpora.is_first_person(row["text"])
        and any(m.types for m in corpora.lexicon().mentions(corpora.normalise(row["text"])))
    ]
    captioner = Captioner.from_pretrained(arguments.model)
    plain = dataclasses.replace(
        captioner.decoding, temperature=1.0, top_p=1.0, candidates=1, max_candidates=1
    )
    delivered, seed = captioner.decoding, arguments.seed

    def captions(decoding: Any, given: list[str] | None) -> list[str]:
        captioner.decoding = decoding
        seeds = [seed * 1_000_000 + i for i in range(len(images))]
        written = captioner.caption(images, descriptions=given, seed=seeds)
        return [caption.text or "" for caption in written]

    half = len(real) // 2
    from_image = captions(delivered, None)
    from_title = captions(delivered, titles)
    descriptions = [row["description"].rstrip(".").lower() for row in catalog]
    rows = {
        "real (against real)": measure(real[:half], None, real[half:], training, seed),
        "template": measure(
            [f"Great {text}, love it!" for text in descriptions], truths, real, training, seed
        ),
        "retrieved": measure(retrieved(truths, training, seed), truths, real, training, seed),
        "T = 1, no rules, image": measure(captions(plain, None), truths, real, training, seed),
        "T = 1, no rules, title": measure(captions(plain, titles), named, real, training, seed),
        "delivered, image": measure(from_image, truths, real, training, seed),
        "delivered, title": measure(from_title, named, real, training, seed),
    }
    listing = [
        [row["image"], row["description"], title, one, two]
        for row, title, one, two in zip(catalog, titles, from_image, from_title, strict=True)
    ]
    return rows, listing


def write_card(model: Path, rows: dict[str, dict[str, Any]], notes: str) -> None:
    """Adds the table to a model directory's `metrics.json` and writes its card anew."""
    metrics_file = model / "metrics.json"
    figures = json.loads(metrics_file.read_text()) | {"held-out fashion photographs": rows}
    metrics_file.write_text(json.dumps(figures, indent=2) + "\n")
    settings = json.loads((model / "training.json").read_text())
    (model / "README.md").write_text(model_card(figures, settings, notes), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.evaluate", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="model directory; without: the shipped one")
    parser.add_argument("--catalog", required=True, help="as for jobs.train; its val rows are used")
    parser.add_argument(
        "--training", required=True, nargs="+", help="text that the model learned from"
    )
    parser.add_argument("--real", required=True, help="held-out sentences that people wrote")
    parser.add_argument("--only", default="", help="images whose path contains this")
    parser.add_argument("--limit", type=int, default=1000, help="held-out images at the most")
    parser.add_argument("--seed", type=int, default=0, help="of captions and detectors")
    parser.add_argument(
        "--card", metavar="NOTES",
        help="write the figures into the model's metrics.json and card, with these Markdown notes "
        "on its data",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="directory for the figures and the captions")
    arguments = parser.parse_args()
    try:
        rows, listing = evaluate(arguments)
    except (InputError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(rows)
    print(text)
    if arguments.card:
        write_card(Path(arguments.model), rows, Path(arguments.card).read_text(encoding="utf-8"))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "evaluation.md").write_text(text, encoding="utf-8")
        (arguments.output / "evaluation.json").write_text(json.dumps(rows, indent=2) + "\n")
        with (arguments.output / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "description", "title", "from_image", "from_title"])
            writer.writerows(listing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
