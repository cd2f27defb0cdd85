from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import write_pretrained

from jobs import distil as job
from jobs import train
from stylegan import corpora
from stylegan.corpora import Example, Product, PseudoPairs
from stylegan.rules import Rules
from stylegan.teacher import Proofreader, Teacher, TeacherConfig, distil, lesson
from stylegan.training import Curves

KINDS = ["watch", "belt", "tie"]
SENTENCES = [
    f"{opening} {kind} {ending}"
    for opening in ("such a lovely", "what a smart", "this is a really neat")
    for kind in KINDS
    for ending in ("for summer.", "for every day!", "full of charm.", "that goes with anything.")
]
PRODUCTS = [Product(i, f"{kind.capitalize()}.") for i, kind in enumerate(KINDS)]
CONFIG = TeacherConfig(
    steps=240, batch=24, rate=5e-3, measure_every=60, captions=192, at_once=96, weight_decay=0.0
)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model as transformers saves it, with random weights."""
    directory = tmp_path_factory.mktemp("language")
    write_pretrained(directory, "decoder")
    return directory


def test_a_teacher_learns_the_voice_and_writes_what_is_true(language: Path) -> None:
    torch.manual_seed(0)
    teacher = Teacher.from_pretrained(language)
    pairs = PseudoPairs(PRODUCTS, {"colloquial": SENTENCES})
    held_out = [pairs.paired_example("colloquial", np.random.default_rng(i)) for i in range(24)]
    curves = Curves()
    teacher.train(pairs, [], held_out, CONFIG, curves, lambda line: None)
    told = [float(row["held_out_nats_per_token"]) for row in curves.rows]
    assert min(told) < told[0] / 3 and len(told) == 5
    assert teacher.held_out_loss(held_out) == pytest.approx(min(told), rel=0.02)
    lines: list[str] = []
    examples, why = distil(teacher, pairs, Rules(), CONFIG, lines.append)
    assert len(examples) > 12 and "written before" in why
    for example in examples:
        concepts = corpora.lexicon().concepts(example.description)
        assert corpora.lexicon().verdict(example.text, concepts) == (True, False), example
    assert len({(x.description, x.text) for x in examples}) == len(examples)
    assert len(examples) + round(why["written before"] * CONFIG.captions) <= CONFIG.captions
    assert [line.split()[3] for line in lines] == ["96", "192"]
    again, _ = distil(teacher, pairs, Rules(), CONFIG, lines.append)
    assert again == examples
    # a sentence of the training text, its topic hidden, is recited
    none, why = distil(teacher, pairs, Rules.of(SENTENCES), CONFIG, lines.append)
    assert why["copied"] > 0.5 and len(none) < len(examples)


def test_a_prompt_is_no_part_of_what_is_learned(language: Path) -> None:
    """The loss counts the sentence and its end, whatever the batch is padded to."""
    teacher = Teacher.from_pretrained(language)
    teacher.language.eval()
    short = Example("neat tie.", "colloquial", "Tie.")
    long = Example("this is a really neat watch for every day!", "colloquial", "Watch, for men.")
    with torch.no_grad():
        alone, count = teacher.loss([short])
        other, many = teacher.loss([long])
        both, total = teacher.loss([short, long])
    assert count == len(teacher.tokenizer.encode(short.text).ids) + 1
    assert total == count + many
    assert both.item() == pytest.approx(alone.item() + other.item(), rel=0.02)


def test_a_proofreader_passes_what_reads_like_people(language: Path, tmp_path: Path) -> None:
    teacher = Teacher.from_pretrained(language)
    pairs = PseudoPairs(PRODUCTS, {"colloquial": SENTENCES})
    held_out = [Example(text, "colloquial", "") for text in SENTENCES[:8]]
    teacher.train(pairs, [], held_out, CONFIG, Curves(), lambda line: None)
    teacher.language.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((language / "tokenizer.json").read_bytes())
    proofreader = Proofreader(tmp_path, SENTENCES)
    shuffled = [" ".join(np.random.default_rng(i).permutation(text.split()))
                for i, text in enumerate(SENTENCES)]  # fmt: skip
    assert 0.6 < proofreader.passes(SENTENCES).mean() < 0.9
    assert proofreader.passes(shuffled).mean() < 0.2
    # a sentence is judged by itself
    alone = proofreader.read(SENTENCES[:1])
    assert torch.allclose(alone[0], proofreader.read(SENTENCES)[0], atol=0.05)
    with pytest.raises(ValueError, match="give judged"):
        proofreader.probability(SENTENCES)


def test_a_proofreader_learns_the_verdict_of_who_read_captions(language: Path) -> None:
    """Whatever it is: here that ties are unfit, which no surprise tells."""
    sentences = [f"{text[:-1]}, {more}" for text in SENTENCES
                 for more in ("really.", "honestly!", "no doubt.", "of course.")]  # fmt: skip
    judged = [(text, "tie" not in text) for text in sentences]
    learned = [pair for i, pair in enumerate(judged) if i % 3]
    good = [text for text, is_fit in judged if is_fit]
    proofreader = Proofreader(language, good, judged=learned * 2)
    probability = proofreader.probability([text for text, _ in judged[::3]])
    fit = np.array([is_fit for _, is_fit in judged[::3]])
    assert probability[fit].min() > probability[~fit].max()
    assert (proofreader.passes([text for text, _ in judged[::3]]) <= fit).all()


def test_a_lesson_is_mostly_pairs_of_people() -> None:
    products = [*PRODUCTS, Product(3, "Perfume.")]
    support = ["this perfume smells of summer."]
    pairs = PseudoPairs(products, {"colloquial": SENTENCES}, {"colloquial": support})
    drawn = lesson(pairs, ["said of nothing."], 800, np.random.default_rng(0))
    background = np.mean([example.style == "" for example in drawn])
    supported = np.mean([example.text in support for example in drawn])
    assert background == pytest.approx(0.15, abs=0.05)
    assert supported == pytest.approx(0.03, abs=0.02)
    assert np.mean([bool(example.description) for example in drawn]) == pytest.approx(0.6, abs=0.07)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    rows = [[f"{i}.png", f"{KINDS[i % 3]}", "val" if i % 5 == 4 else "train"] for i in range(30)]
    with (directory / "catalog.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "description", "split"], *rows])
    more = [text.replace("lovely", word) for word in ("pretty", "nice", "fine", "soft", "light")
            for text in SENTENCES if "lovely" in text]  # fmt: skip
    (directory / "voice.txt").write_text("\n".join([*SENTENCES, *more, *SENTENCES]) + "\n")
    return directory


def run_distil(monkeypatch: pytest.MonkeyPatch, inputs: Path, *more: str) -> int:
    line = ["--catalog", str(inputs / "catalog.csv"), "--colloquial", str(inputs / "voice.txt")]
    monkeypatch.setattr(sys, "argv", ["jobs.distil", *line, *more])
    return job.main()


def test_the_job_writes_a_table_that_training_reads(
    language: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = ["--steps", "160", "--rate", "5e-3", "--batch", "24", "--captions", "400"]
    table = tmp_path / "made" / "written.csv"
    more = ["--teacher", str(language), "--output", str(table), *settings]
    assert run_distil(monkeypatch, inputs, *more) == 0
    printed = capsys.readouterr().out
    assert "left out" in printed and f"examples written to {table}" in printed
    voice = train.read_voice([str(inputs / "voice.txt"), str(table)])
    written = voice.written["colloquial"]
    assert written and all(example.description.lower() in KINDS for example in written)
    # a machine's sentences are no people's, and no background either
    people = {corpora.normalise(t) for t in (inputs / "voice.txt").read_text().splitlines()}
    assert set(map(corpora.normalise, voice.sentences["colloquial"])) <= people
    assert set(voice.background) <= people and not voice.support["colloquial"]
    products = train.products_of(train.read_rows(str(inputs / "catalog.csv")))
    pairs = voice.pairs(products, 1.0)
    random = np.random.default_rng(0)
    drawn = [pairs.paired_example("colloquial", random) for _ in range(300)]
    assert {example.text for example in drawn} <= {example.text for example in written}
    shown = [example for example in drawn if example.image >= 0]
    assert 0.6 < len(shown) / len(drawn) < 1
    assert all(products[x.image].description == x.description for x in shown)


def test_what_the_reader_found_unfit_is_not_written(
    language: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sentences = (inputs / "voice.txt").read_text().splitlines()
    judged = tmp_path / "judged.csv"
    with judged.open("w", newline="") as file:
        rows = [(text, int("lovely" not in text)) for text in sentences * 12]
        csv.writer(file).writerows([("text", "fit"), *rows])
    settings = ["--steps", "160", "--rate", "5e-3", "--batch", "24", "--captions", "400"]
    shares = []
    for more in ([], ["--judged", str(judged)]):
        table = tmp_path / f"written{len(more)}.csv"
        line = ["--teacher", str(language), "--output", str(table), *settings, *more]
        assert run_distil(monkeypatch, inputs, *line) == 0
        with table.open(newline="") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
        shares.append(np.mean(["lovely" in text for text in texts]))
    assert "left out  unfit" in capsys.readouterr().out
    assert shares[0] > 0.1 and shares[1] < shares[0] / 3
    line = ["--teacher", str(language), "--output", "x.csv", "--judged", str(inputs / "voice.txt")]
    assert run_distil(monkeypatch, inputs, *line) == 2
    assert "--judged" in capsys.readouterr().err


def test_what_cannot_teach_says_why(
    language: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    table = str(tmp_path / "written.csv")
    assert run_distil(monkeypatch, inputs, "--teacher", str(tmp_path), "--output", table) == 2
    assert "causal language model of transformers" in capsys.readouterr().err
    settings = json.loads((language / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in language.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "config.json").write_text(json.dumps(settings | {"eos_token_id": 50256}))
    assert run_distil(monkeypatch, inputs, "--teacher", str(broken), "--output", table) == 2
    assert "eos_token_id 50256 is no token" in capsys.readouterr().err
    more = ["--teacher", str(language), "--output", table, "--steps", "0", "--captions", "32"]
    assert run_distil(monkeypatch, inputs, *more) == 2
    assert "train the teacher longer" in capsys.readouterr().err
    assert not Path(table).exists()
