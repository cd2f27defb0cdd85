"""The shipped model on drawings that it has not seen."""

from __future__ import annotations

import csv
from dataclasses import replace
from operator import eq
from pathlib import Path

import numpy as np
import pytest

from jobs import train
from stylegan import corpora, metrics
from stylegan.captioner import SHIPPED, Caption, Captioner
from stylegan.samples import write_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """66 drawings of another seed than those of the training."""
    path = write_samples(tmp_path_factory.mktemp("samples"), count=66, seed=977)
    with path.open(newline="") as file:
        return [row | {"path": str(path.parent / row["image"])} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def captions(samples: list[dict[str, str]]) -> list[Caption]:
    captioner = Captioner.from_pretrained(device="cpu")
    return captioner.caption([row["path"] for row in samples], seed=list(range(len(samples))))


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors")) < 40e6


def test_it_names_what_is_drawn(samples: list[dict[str, str]], captions: list[Caption]) -> None:
    truths = [corpora.lexicon().concepts(row["description"]) for row in samples]
    content = metrics.content([caption.text or "" for caption in captions], truths)
    assert content["type_right"].mean >= 0.8
    assert content["contradiction"].mean <= 0.2


def test_it_never_speaks_as_a_customer(captions: list[Caption]) -> None:
    assert not [c.text for c in captions if corpora.is_first_person(c.text or "")]


def test_it_scores_what_it_writes(captions: list[Caption]) -> None:
    """A colloquial sentence scores higher than a formal one; every caption has a score."""
    captioner = Captioner.from_pretrained(device="cpu")
    casual = ["Love this shirt, so flattering and cute.", "Great top for summer.",
              "Such a cute little jacket, you can dress it up or down."]  # fmt: skip
    formal = ["Black shirt for men.", "Navy blue watch for women.", "White handbag for women."]
    own, other = (captioner._scores(texts, "colloquial")[1] for texts in (casual, formal))
    assert min(own) > max(other)
    assert all(caption.score is not None and 0 < caption.score < 1 for caption in captions)


def test_it_prefers_what_people_would_write(samples: list[dict[str, str]]) -> None:
    captioner = Captioner.from_pretrained(device="cpu")
    encoding = captioner.encode([None] * 40, [row["description"] for row in samples[:40]])
    chosen = captioner.write(encoding, seed=list(range(40)))
    delivered = captioner.decoding
    assert delivered.selectivity > 1 and delivered.max_surprise > 0
    captioner.decoding = replace(delivered, selectivity=1.0)
    first = captioner.write(encoding, seed=list(range(40)))
    captioner.decoding = delivered
    best = captioner.write(encoding, seed=list(range(40)), best_of=4)
    scores = [np.mean([c.score for c in captions]) for captions in (first, chosen, best)]
    assert scores[0] + 0.05 < min(scores[1:])
    assert 0 < sum(map(eq, first, chosen)) < 40  # what would be accepted anyway stays


def test_it_does_not_recite(captions: list[Caption]) -> None:
    texts = [caption.text or "" for caption in captions]
    assert len(set(texts)) >= 0.95 * len(texts)
    assert metrics.novelty(texts, corpora.embedded_corpus()) == 1


def test_descriptions_without_pictures_are_rewritten() -> None:
    titles = ["Titan Men Black Dial Watch", "Lino Perros Women Brown Leather Handbag",
              "Puma Men White Running Shoes", "Wildcraft Black Backpack"]  # fmt: skip
    captioner = Captioner.from_pretrained(device="cpu")
    written = captioner.caption([None] * 4, descriptions=titles)
    for title, caption in zip(titles, written, strict=True):
        concepts = corpora.lexicon().concepts(title)
        assert corpora.lexicon().verdict(caption.text or "", concepts) == (True, False)
        assert not caption.needs_review
        assert caption.text and caption.text[0].isupper()


def test_its_card_says_where_it_comes_from() -> None:
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert 'pipeline_tag: "image-to-text"' in card
    for part in ("## Data", "CC0", "## Measured quality", "jobs.train"):
        assert part in card, Path(SHIPPED / "README.md")


def test_what_was_read_is_a_table_that_training_reads() -> None:
    judged = str(SHIPPED / "judged.csv.gz")
    verdicts = train.read_judged(judged)
    voice = train.read_sentences([judged])
    known = len(voice.written["colloquial"]) + len(voice.unfit)
    assert 60_000 < known <= len(verdicts) == len({text for text, _ in verdicts})
    assert sum(fit for _, fit in verdicts) >= len(voice.written["colloquial"])
    assert not voice.sentences["colloquial"] and not voice.background


def test_what_was_rewritten_can_be_said_of_its_product() -> None:
    voice = train.read_sentences([str(SHIPPED / "adapted.csv.gz")])
    examples = voice.written["colloquial"]
    assert len(examples) > 10_000 and not voice.unfit and not voice.sentences["colloquial"]
    for example in examples:
        assert corpora.is_sayable(example.text), example
        assert not corpora.is_first_person(example.text), example
