"""Measures a captioner on held-out photographs and text, beside its baselines.

    python -m jobs.evaluate --catalog catalog.csv --training sentences.csv --real held-out.csv \\
        [--model MODEL] [--likelihood MODEL] [--encoder MINILM] [--output evaluation/]

Rows of its one table: people's sentences (against people's), a template, the nearest training
sentence, rewriting by rules; with --likelihood the likelihood model at three temperatures and the
best of four of its captions; the model at temperature 1 without any rule, as it is delivered, and
its best of four. Captions are made with the title given, but for one row. Columns: content by the
lexicon, style, fluency, diversity and novelty (stylegan/metrics.py). The headline is a difference:
how much harder the adversarial model is to tell from people than the likelihood model.

Only rows of the catalogue with split `val` are used. Every figure is the mean over --seeds, with a
95 % interval over sentences. --encoder names a pretrained text encoder (a directory or a hub's id,
such as a MiniLM); without it two of the four detectors are left out, and the worst of the others
says less. Prints the table; --output writes `evaluation.json`, `.md`, `.html` and `captions.csv`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.train import InputError, read_table
from stylegan import corpora, metrics
from stylegan.captioner import Caption, Captioner, Decoding
from stylegan.cards import model_card
from stylegan.catalog import read_image
from stylegan.images import decode_image
from stylegan.metrics import Detection, Detector, Floats, Interval
from stylegan.pages import LIGHT, LINE, SOFT, THUMBNAIL, light_and_dark, render, thumbnail

REAL = "real (against real)"
SAMPLES = 12  # products on the page
MIN_PRODUCTS = 5  # as many as a detector has folds
MIN_LANGUAGE = 1000  # sentences; of less a language model knows too little
PLAIN = Decoding(temperature=1.0, top_p=1.0, top_k=0, best_of=1, max_candidates=1)
BEST_OF_4 = Decoding(temperature=1.0, top_p=1.0, top_k=0, best_of=4, max_candidates=16)

BLOCKS = {
    "Told from people": ("auc_words", "auc_characters", "auc_embedding", "auc_fine_tuned",
                         "auc_worst"),
    "Content": (*metrics.CONTENT, "first_person", "needs_review"),
    "Fluency, style, novelty": ("perplexity_ratio", "colloquial", "words", "invented_words",
                                "novel", "copied_8_grams", "score"),
    "Diversity, relative to as much real text": ("distinct_captions", "distinct_1", "distinct_2",
                                                 "vocabulary", "self_bleu_4"),
}  # fmt: skip
"""The table is as wide as these together, so it is printed in four blocks with the same rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Products:
    """Held-out rows of the catalogue whose image can be read, n of each.

    truths: what is known of a product. named: what its title says, and where that is silent its
    description; the captions of a title are held to it.
    """

    images: list[str]
    files: list[bytes]
    descriptions: list[str]
    titles: list[str]
    truths: list[corpora.Concepts]
    named: list[corpora.Concepts]


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """People's text. training: what the models learned from. voice: of it what is colloquial and
    can be printed. formal: descriptions and titles of the training catalogue. real: the reference.
    language: for the language model, neither training text nor reference where there is enough."""

    training: list[str]
    voice: list[str]
    formal: list[str]
    real: list[str]
    language: list[str]
    is_language_held_out: bool


@dataclasses.dataclass(frozen=True, slots=True)
class System:
    """One row of the table: captions [k][n] of the same products under k seeds."""

    captions: list[list[str]]
    truths: list[corpora.Concepts] | None = None
    needs_review: Floats | None = None  # [n, k]
    scores: Floats | None = None  # [n, k], NaN without a critic
    described: list[str] | None = None  # [n] formal, by the model, where it saw the image alone

    @classmethod
    def of(cls, written: list[list[Caption]], truths: list[corpora.Concepts]) -> System:
        return cls(
            [[caption.text or "" for caption in captions] for captions in written],
            truths,
            np.array([[c.needs_review for c in captions] for captions in written], float).T,
            np.array([[c.score for c in captions] for captions in written], float).T,
            [caption.description or "" for caption in written[0]],
        )


@dataclasses.dataclass(slots=True)
class Evaluation:
    """All that was found. rows: system → figure → number or interval, as evaluation.json has it."""

    settings: dict[str, Any]
    products: Products
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    differences: dict[str, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    formal: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    systems: dict[str, System] = dataclasses.field(default_factory=dict)
    detections: dict[str, list[list[Detection]]] = dataclasses.field(default_factory=dict)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- input --------------------------------------------------------------------------------------


def read_products(uri: str, only: str, limit: int) -> Products:
    """Held-out products. One whose image cannot be read is left out, and that is said."""
    rows = [row for row in read_table(uri) if row.get("split") == "val" and only in row["image"]]
    rows = rows[:limit]
    if not rows:
        raise InputError(
            f"--catalog {uri} has no rows with split 'val'"
            + (f" and an image whose path contains {only!r}" if only else "")
        )
    base = uri.rsplit("/", 1)[0] if "/" in uri else "."
    uris = [
        image if image.startswith("/") or "://" in image else f"{base}/{image}"
        for image in (row["image"] for row in rows)
    ]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read_image, uris))
    kept: list[tuple[dict[str, str], bytes]] = []
    for row, data in zip(rows, found, strict=True):
        problem = data[1] if isinstance(data, tuple) else decode_image(data, 8).error_message
        if problem is None and isinstance(data, bytes):
            kept.append((row, data))
        else:
            log(f"left out: {row['image']}: {problem}")
    if len(kept) < MIN_PRODUCTS:
        raise InputError(
            f"--catalog {uri}: {len(kept)} of {len(rows)} held-out images can be read, at least "
            f"{MIN_PRODUCTS} are needed; paths are relative to the catalogue"
        )
    titles = [row.get("title") or row["description"] for row, _ in kept]
    truths = [corpora.lexicon().concepts(row["description"]) for row, _ in kept]
    return Products(
        [row["image"] for row, _ in kept], [data for _, data in kept],
        [row["description"] for row, _ in kept], titles, truths,
        [corpora.lexicon().concepts(t).filled_from(c) for t, c in zip(titles, truths, strict=True)],
    )  # fmt: skip


def read_text(catalog: str, training: Sequence[str], real: str) -> Text:
    """All text, and which of it is the reference.

    The reference is what --real has of split `val`, tier `caption` and source `womens-reviews`, as
    far as it has such columns, that names a product and does not speak in the first person.
    """
    learned = [row for uri in training for row in read_table(uri)]
    for rows, flag in ((learned, "--training"), (people := read_table(real), "--real")):
        if not rows or "text" not in rows[0]:
            raise InputError(f"{flag}: no sentences; give a text file, or a table with `text`")
    reference = [
        row["text"]
        for row in people
        if row.get("split", "val") == "val"
        and row.get("tier", "caption") == "caption"
        and row.get("source", "womens-reviews") == "womens-reviews"
        and not corpora.is_first_person(row["text"])
        and corpora.names_kind(row["text"])
    ]
    if len(reference) < 20:
        raise InputError(
            f"--real {real}: {len(reference)} sentences name a product and are not in the first "
            "person; at least 20 are needed"
        )
    known = [corpora.normalise(row["text"]) for row in learned]
    used = {*known, *map(corpora.normalise, reference)}
    others = [text for row in people if (text := corpora.normalise(row["text"])) not in used]
    is_held_out = len(others) >= MIN_LANGUAGE
    formal = [
        text
        for row in read_table(catalog)
        if row.get("split") != "val"
        for text in (row["description"], row.get("title", ""))
        if text
    ]
    voice = [
        text
        for text, row in zip(known, learned, strict=True)
        if row.get("tier", "caption") == "caption" and corpora.is_sayable(text)
    ]
    # in random order, so that any part of it is like the rest
    order = np.random.default_rng(0).permutation(len(reference))
    return Text(
        known, voice, formal, [corpora.sentence(reference[i]) for i in order],
        others if is_held_out else known, is_held_out,
    )  # fmt: skip


# --- baselines ----------------------------------------------------------------------------------

FRAMES = (  # of one, of many
    ("Love this {}!", "Love these {}!"),
    ("This {} is so cute!", "These {} are so cute!"),
    ("Such a pretty {}, it goes with everything.", "Such pretty {}, they go with everything."),
    ("This {} is super comfortable and looks great.",
     "These {} are super comfortable and look great."),
    ("What a lovely {} for every day!", "What lovely {} for every day!"),
    ("The perfect {}, so easy to wear.", "The perfect {}, so easy to wear."),
    ("A really nice {} that looks even better in person.",
     "Really nice {} that look even better in person."),
    ("Stylish and simple, this {} is a must!", "Stylish and simple, these {} are a must!"),
    ("This is one gorgeous {}.", "These are some gorgeous {}."),
    ("So happy this {} exists, great quality!", "So happy these {} exist, great quality!"),
)  # fmt: skip


def templated(descriptions: Sequence[str]) -> list[str]:
    """One frame for all."""
    return [f"Great {text.rstrip('.').lower()}, love it!" for text in descriptions]


def rewritten(descriptions: Sequence[str], seed: int) -> list[str]:
    """Each description, without whom it is for, in a random colloquial frame of its number."""
    random = np.random.default_rng(seed)
    sentences = []
    for text in descriptions:
        thing = re.sub(r" for \w+$", "", text.rstrip(".").lower())
        kinds = [m for m in corpora.lexicon().mentions(thing) if m.types]
        is_plural = bool(kinds) and corpora.lexicon().is_singular(kinds[-1].form) is False
        frame = FRAMES[random.integers(len(FRAMES))][is_plural]
        sentences.append(corpora.sentence(frame.format(thing)))
    return sentences


def retrieved(
    queries: Sequence[str], truths: Sequence[corpora.Concepts], voice: Sequence[str], seed: int,
    near: int = 10,
) -> list[str]:  # fmt: skip
    """For each description one of the `near` most similar training sentences (TF-IDF, cosine),
    among those that name the product's kind where there are any."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"[a-z][a-z'-]+", sublinear_tf=True)
    sentences = vectorizer.fit_transform(voice)
    similarity = vectorizer.transform(map(corpora.normalise, queries)) @ sentences.T
    by_kind: dict[str, set[int]] = {}
    for index, text in enumerate(voice):
        for mention in corpora.lexicon().mentions(text):
            for kind in mention.types:
                by_kind.setdefault(kind, set()).add(index)
    random = np.random.default_rng(seed)
    chosen = []
    for row, truth in enumerate(truths):
        named = sorted(set().union(*(by_kind.get(kind, set()) for kind in truth.head)))
        options = np.array(named or range(len(voice)))
        similar = similarity[[row]].toarray()[0][options]
        nearest = options[np.argsort(-similar, kind="stable")[:near]]
        chosen.append(corpora.sentence(voice[random.choice(nearest)]))
    return chosen


def halves(real: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """People's sentences in two random halves, to be told from each other."""
    order = np.random.default_rng(seed).permutation(len(real))
    half = len(real) // 2
    return [real[i] for i in order[:half]], [real[i] for i in order[half:]]


# --- the models' captions -----------------------------------------------------------------------


class Writer:
    """Captions the products with models; an image is decoded once a size."""

    def __init__(self, products: Products, seeds: Sequence[int]) -> None:
        self.products, self.seeds = products, seeds
        self.pixels: dict[int, list[Any]] = {}

    def write(self, captioner: Captioner, decoding: Decoding, is_given: bool = True) -> System:
        """is_given: whether the titles are given with the images."""
        size = captioner.image_size
        if size not in self.pixels:
            self.pixels[size] = [decode_image(data, size).pixels for data in self.products.files]
        captioner.decoding = dataclasses.replace(
            decoding, max_new_tokens=captioner.decoding.max_new_tokens
        )
        titles = self.products.titles if is_given else None
        encoding = captioner.encode(self.pixels[size], titles)
        rows = range(len(self.products.images))
        written = [
            captioner.write(encoding, seed=[seed * 1_000_000 + row for row in rows])
            for seed in self.seeds
        ]
        return System.of(written, self.products.named if is_given else self.products.truths)


def write_captions(
    products: Products, text: Text, seeds: Sequence[int], model: str | None, likelihood: str | None
) -> dict[str, System]:
    """The systems to be measured, in the order of the table."""
    queries = [f"{t} {d}" for t, d in zip(products.titles, products.descriptions, strict=True)]
    systems = {
        REAL: System([halves(text.real, seed)[0] for seed in seeds]),
        "template": System([templated(products.descriptions)] * len(seeds), products.truths),
        "nearest neighbour": System(
            [retrieved(queries, products.truths, text.voice, seed) for seed in seeds],
            products.truths,
        ),
        "rules": System(
            [rewritten(products.descriptions, seed) for seed in seeds], products.truths
        ),
    }
    writer = Writer(products, seeds)
    adversarial = Captioner.from_pretrained(model)
    delivered = adversarial.decoding

    def add(name: str, *arguments: Any) -> None:
        start = time.monotonic()
        systems[name] = writer.write(*arguments)
        count = len(seeds) * len(products.images)
        log(f"{name}: {count:,} captions in {time.monotonic() - start:.0f} s")

    if likelihood:
        captioner = Captioner.from_pretrained(likelihood)
        if captioner.tokenizer.to_str() != adversarial.tokenizer.to_str():
            raise InputError(
                f"--likelihood {likelihood} has other tokens than --model {model or '(shipped)'}: "
                "give the likelihood model that the adversarial training began from"
            )
        # a critic that was fitted to other captions serves it badly; the tokens are the same
        captioner.critic = captioner.critic or adversarial.critic
        for temperature, name in ((1.0, "1"), (0.8, ".8"), (0.6, ".6")):
            decoding = dataclasses.replace(PLAIN, temperature=temperature)
            add(f"likelihood, T = {name}", captioner, decoding)
        add("likelihood, best of 4", captioner, BEST_OF_4)
    # a model without a critic is what it is
    name = "adversarial" if adversarial.critic is not None else "model"
    add(f"{name}, T = 1", adversarial, PLAIN)
    add(f"{name}, delivered, image alone", adversarial, delivered, False)
    add(f"{name}, delivered, title given", adversarial, delivered)
    add(f"{name}, best of 4", adversarial, BEST_OF_4)
    return systems


# --- the figures --------------------------------------------------------------------------------


class Yardstick:
    """What all systems are measured with, made once."""

    def __init__(
        self, text: Text, encoder: metrics.Encoder | None, seeds: Sequence[int],
        fine_tuned_seeds: int,
    ) -> None:  # fmt: skip
        self.seeds, self.fine_tuned_seeds = seeds, fine_tuned_seeds
        self.sentences = metrics.sentence_hashes(text.training)
        self.grams = metrics.word_grams(text.training)
        self.words = metrics.words_of([*text.training, *text.language])  # of any row, real too
        self.language = metrics.language_model(text.language)
        try:
            self.colloquial = metrics.style_classifier(text.formal, text.voice)
        except ValueError as error:
            raise InputError(f"--catalog's other splits and --training: {error}") from error
        self.detectors: dict[str, tuple[Detector, int]] = {  # with the number of folds
            "auc_words": (metrics.word_detector, 5),
            "auc_characters": (metrics.character_detector, 5),
        }
        if encoder is not None:
            self.detectors["auc_embedding"] = (metrics.embedding_detector(encoder), 5)
            self.detectors["auc_fine_tuned"] = (metrics.fine_tuned_detector(encoder), 3)

    def measure(
        self, system: System, real: Sequence[Sequence[str]]
    ) -> tuple[dict[str, Any], list[list[Detection]]]:
        """A row of the table, and what each detector saw, one detection a seed.

        real: people's sentences, for each seed as many, for all systems the same."""
        captions, count = system.captions, len(system.captions[0])

        def each(figure: Any) -> Floats:
            """[n, k] or [n, k, 2] of a function of sentences."""
            return np.stack([figure(group) for group in captions], axis=1).astype(float)

        row: dict[str, Interval] = {}
        if system.truths is not None:
            judged = [metrics.judge(group, system.truths) for group in captions]
            for name in metrics.CONTENT:
                row[name] = metrics.bootstrap(np.stack([j[name] for j in judged], axis=1))
        row["first_person"] = metrics.bootstrap(
            each(lambda g: [corpora.is_first_person(text) for text in g])
        )
        for name, values in (("needs_review", system.needs_review), ("score", system.scores)):
            if values is not None:
                row[name] = metrics.bootstrap(values)
        for name, statistic in (
            ("distinct_captions", lambda texts: len(set(texts)) / len(texts)),
            ("distinct_1", partial(metrics.distinct_n, n=1)),
            ("distinct_2", partial(metrics.distinct_n, n=2)),
            ("vocabulary", metrics.vocabulary_size),
            ("self_bleu_4", metrics.self_bleu),
        ):
            row[name] = metrics.relative(statistic, captions, real[0])
        row["novel"] = metrics.bootstrap(each(lambda g: metrics.is_novel(g, self.sentences)))
        row["copied_8_grams"] = metrics.bootstrap(each(lambda g: metrics.is_copied(g, self.grams)))
        invented = each(lambda g: metrics.count_invented(g, self.words))
        row["invented_words"] = metrics.bootstrap(invented[..., 0], invented[..., 1])
        row["words"] = metrics.bootstrap(each(lambda g: [len(t.split()) for t in g]))
        row["perplexity_ratio"] = metrics.perplexity_ratio(
            each(self.language), self.language(real[0])
        )
        row["colloquial"] = metrics.bootstrap(each(self.colloquial))

        # the same sentences and products under all seeds, so that they can be resampled as one
        size = min(count, len(real[0]))
        random = np.random.default_rng(0)
        chosen = random.permutation(count)[:size]
        against = random.permutation(len(real[0]))[:size]
        detections = []
        for name, (detector, folds) in self.detectors.items():
            count_seeds = self.fine_tuned_seeds if name == "auc_fine_tuned" else len(self.seeds)
            runs = [
                metrics.detect(
                    [people[i] for i in against], [group[i] for i in chosen], detector, folds, seed
                )
                for people, group, seed in zip(
                    real[:count_seeds], captions, self.seeds, strict=False
                )
            ]
            row[name] = metrics.auc(runs)
            detections.append(runs)
        row["auc_worst"] = metrics.worst_auc(detections)
        return {"captions": count} | {k: _plain(v) for k, v in row.items()}, detections


def _plain(interval: Interval) -> dict[str, float] | None:
    """As JSON has it; None where there was nothing to be measured."""
    return None if math.isnan(interval.mean) else dataclasses.asdict(interval)


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Captions, figures and differences, as the command line asks for them."""
    products = read_products(arguments.catalog, arguments.only, arguments.limit)
    text = read_text(arguments.catalog, arguments.training, arguments.real)
    encoder = None
    if arguments.encoder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = metrics.Encoder.from_pretrained(arguments.encoder, device)
    seeds = arguments.seeds
    yardstick = Yardstick(text, encoder, seeds, arguments.fine_tuned_seeds)
    systems = write_captions(products, text, seeds, arguments.model, arguments.likelihood)
    result = Evaluation(
        {
            "model": arguments.model or "shipped", "likelihood": arguments.likelihood,
            "encoder": arguments.encoder, "seeds": list(seeds), "products": len(products.images),
            "real_sentences": len(text.real), "training_sentences": len(text.training),
            "language_model_sentences": len(text.language),
            "language_model_is_held_out": text.is_language_held_out,
            "detector_sentences_of_each_kind": min(len(products.images), len(text.real)),
            "versions": {p: metadata.version(p) for p in ("torch", "transformers", "scikit-learn")},
        },
        products, systems=systems,
    )  # fmt: skip
    everyone = [text.real] * len(seeds)
    for name, system in systems.items():
        start = time.monotonic()
        real = [halves(text.real, seed)[1] for seed in seeds] if name == REAL else everyone
        result.rows[name], result.detections[name] = yardstick.measure(system, real)
        log(f"{name}: measured in {time.monotonic() - start:.0f} s")
    for one in ("adversarial, T = 1", "adversarial, delivered, title given"):
        for other in ("likelihood, T = 1", "likelihood, best of 4"):
            if one in systems and other in systems:
                found = metrics.auc_difference(result.detections[one], result.detections[other])
                result.differences[f"{one} − {other}"] = _plain(found)
    for name, system in systems.items():
        if name.endswith("image alone") and system.described is not None:
            judged = metrics.content(system.described, products.truths)
            scores = metrics.formal_scores(system.described, products.descriptions)
            result.formal[name.split(",")[0]] = {"captions": len(system.described)} | {
                k: _plain(v) for k, v in (scores | judged).items()
            }
    return result


# --- output -------------------------------------------------------------------------------------


def words(name: str) -> str:
    return name.replace("_", " ")


def cell(value: Any) -> tuple[str, str]:
    """A figure and its interval as text; both empty where there is none."""
    if value is None:
        return "", ""
    if isinstance(value, Mapping):
        return _round(value["mean"]), f"{_round(value['low'])} to {_round(value['high'])}"
    return f"{value:,}", ""


def _round(value: float) -> str:
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}").replace("-", "−")


def blocks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Title → those of its figures that any row has."""
    return {
        title: kept
        for title, names in BLOCKS.items()
        if (kept := tuple(n for n in names if any(row.get(n) is not None for row in rows.values())))
    }


def table(names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [f"| | n | {' | '.join(map(words, names))} |", "|---" * (len(names) + 2) + "|"]
    for title, row in rows.items():
        cells = []
        for name in ("captions", *names):
            mean, interval = cell(row.get(name))
            cells.append(f"{mean} ({interval})" if interval else mean)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def remarks(settings: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures has to know of this run."""
    lines = [
        f"{settings['products']:,} products; seeds {', '.join(map(str, settings['seeds']))}; "
        f"detectors learn from {settings['detector_sentences_of_each_kind']:,} sentences of each "
        "kind; in brackets the 95 % interval over sentences."
    ]
    if settings["encoder"] is None:
        lines.append(
            "Without --encoder: the embedding and the fine-tuned detector were left out, and the "
            "worst of the others says less."
        )
    if not settings["language_model_is_held_out"]:
        lines.append(
            f"Fewer than {MIN_LANGUAGE:,} sentences of --real are neither reference nor training "
            "text, so the language model learned from the training text: it flatters what recites."
        )
    return lines


def formal_names(result: Evaluation) -> tuple[str, ...]:
    return tuple(name for name in next(iter(result.formal.values()), {}) if name != "captions")


def markdown(result: Evaluation) -> str:
    parts = ["\n".join(remarks(result.settings)) + "\n"]
    if result.differences:
        parts.append("## Worst detector's AUC, difference\n")
        parts += [
            f"- {name}: {mean} ({interval})"
            for name, value in result.differences.items()
            for mean, interval in [cell(value)]
        ]
        parts.append("")
    for title, names in blocks(result.rows).items():
        parts += [f"## {title}\n", table(names, result.rows)]
    if result.formal:
        parts += ["## Formal descriptions, from the image alone\n",
                  table(formal_names(result), result.formal)]  # fmt: skip
    return "\n".join(parts)


DETECTORS = {
    "auc_words": ("words", "o"), "auc_characters": ("characters", "s"),
    "auc_embedding": ("embedding", "D"), "auc_fine_tuned": ("fine-tuned encoder", "^"),
}  # fmt: skip


def plot_auc(rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Each detector's AUC with its interval, a line a system: data URIs of SVG, for a light and a
    dark page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 1.2 + 0.46 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    there = [name for name in DETECTORS if any(row.get(name) for row in rows.values())]
    for place, name in enumerate(there):
        label, marker = DETECTORS[name]
        found = [(y, row[name]) for y, row in enumerate(rows.values()) if row.get(name)]
        heights = [y + 0.17 * (place - (len(there) - 1) / 2) for y, _ in found]
        means, lows, highs = (
            np.array([value[end] for _, value in found]) for end in ("mean", "low", "high")
        )
        axis.errorbar(
            means, heights, xerr=np.maximum([means - lows, highs - means], 0), fmt=marker,
            label=label, color=LIGHT[place], markersize=5, elinewidth=1.6,
        )  # fmt: skip
    axis.axvline(0.5, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_yticks(range(len(rows)), list(rows), color=SOFT)
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.set_xlabel("AUC: .5 cannot be told from people's text, 1 always can", color=SOFT)
    axis.tick_params(axis="x", labelcolor=SOFT)
    axis.tick_params(length=0)
    axis.grid(axis="x", color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    figure.legend(
        loc="outside upper left",
        ncols=len(there),
        frameon=False,
        labelcolor=SOFT,
        handletextpad=0.2,
    )
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "auc"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return light_and_dark(stream.getvalue())


def page(result: Evaluation) -> str:
    """`evaluation.html`: one page that needs nothing else, and forbids itself to fetch anything."""
    products = result.products
    count = min(SAMPLES, len(products.images))
    chosen = [index * len(products.images) // count for index in range(count)]
    samples = [
        {
            "picture": thumbnail(decode_image(products.files[i], THUMBNAIL)),
            "title": products.titles[i],
            "captions": {
                name: system.captions[0][i]
                for name, system in result.systems.items()
                if system.truths is not None
            },
        }
        for i in chosen
    ]
    return render(
        "evaluation.html.j2", {"words": words, "cell": cell},
        result=result,
        blocks=blocks(result.rows),
        remarks=remarks(result.settings),
        plots=plot_auc(result.rows),
        content={name: row for name, row in result.rows.items() if row.get("type_right")},
        formal_names=formal_names(result),
        samples=samples,
    )


def write(result: Evaluation, output: Path) -> None:
    """The four files; `evaluation.json` comes last."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.md").write_text(markdown(result), encoding="utf-8")
    (output / "evaluation.html").write_text(page(result), encoding="utf-8")
    captioned = {n: s for n, s in result.systems.items() if s.truths is not None}
    described = next((s.described for n, s in captioned.items() if "image alone" in n), None)
    products = result.products
    with (output / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = ("image", "description", "title", "predicted_description", "seed")
        writer.writerow([*columns, *captioned])
        for number, seed in enumerate(result.settings["seeds"]):
            for row, image in enumerate(products.images):
                writer.writerow([
                    image, products.descriptions[row], products.titles[row],
                    described[row] if described else "", seed,
                    *(system.captions[number][row] for system in captioned.values()),
                ])  # fmt: skip
    found = {
        "settings": result.settings, "differences": result.differences, "rows": result.rows,
        "formal": result.formal,
    }  # fmt: skip
    (output / "evaluation.json").write_text(
        json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def write_card(model: Path, result: Evaluation, notes: str) -> None:
    """Adds the figures to a model directory's `metrics.json` and writes its card anew."""
    metrics_file = model / "metrics.json"
    figures = json.loads(metrics_file.read_text()) | {
        "worst detector's AUC, difference": result.differences,
        "formal descriptions, image alone": result.formal,
        "held-out fashion photographs": result.rows,
    }
    figures = {name: value for name, value in figures.items() if value != {}}
    metrics_file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", "utf-8")
    settings = json.loads((model / "training.json").read_text())
    (model / "README.md").write_text(model_card(figures, settings, notes), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.evaluate", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="model directory; without: the shipped one")
    parser.add_argument(
        "--likelihood", metavar="MODEL",
        help="directory of the likelihood model that the adversarial training began from; without: "
        "its rows and the differences are left out",
    )  # fmt: skip
    parser.add_argument("--catalog", required=True, help="as for jobs.train; its val rows are used")
    parser.add_argument(
        "--training", required=True, nargs="+", help="text that the models learned from"
    )
    parser.add_argument(
        "--real", required=True,
        help="sentences that people wrote: those that are held out are the reference, those that "
        "are neither reference nor training text teach the language model",
    )  # fmt: skip
    parser.add_argument(
        "--encoder",
        help="pretrained text encoder, a directory or a hub's id, for the embedding and the "
        "fine-tuned detector; without: they are left out",
    )
    parser.add_argument("--only", default="", help="images whose path contains this")
    parser.add_argument("--limit", type=int, default=1000, help="held-out images at the most")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of captions and detectors"
    )
    parser.add_argument(
        "--fine-tuned-seeds",
        type=int,
        default=1,
        help="of them, how many the fine-tuned detector, the slowest by far, is trained under",
    )
    parser.add_argument(
        "--card", metavar="NOTES",
        help="write the figures into the model's metrics.json and card, with these Markdown notes "
        "on its data",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="directory for the figures and the captions")
    arguments = parser.parse_args()
    try:
        if len(set(arguments.seeds)) < len(arguments.seeds):
            raise InputError(f"--seeds {' '.join(map(str, arguments.seeds))}: name each once")
        if arguments.card and not arguments.model:
            raise InputError("--card writes into a model directory: name it with --model")
        result = evaluate(arguments)
    except (InputError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(result))
    if arguments.card:
        write_card(Path(arguments.model), result, Path(arguments.card).read_text(encoding="utf-8"))
    if arguments.output:
        write(result, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
