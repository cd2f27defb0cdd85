"""jobs.evaluate from end to end, on drawings, with tiny models."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_metrics import write_tiny_encoder
from tiny_model import write_tiny_model

from jobs import evaluate
from stylegan import corpora
from stylegan.samples import write_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """catalog.csv with 24 held-out drawings and one image that is none, training.csv, real.csv."""
    folder = tmp_path_factory.mktemp("data")
    with write_samples(folder, count=34, seed=5).open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "catalog.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "description", "title", "split"])
        for index, row in enumerate(rows):
            formal = corpora.formal_description(row["type"], row["colour"], row["gender"])
            split = "val" if index < 24 else "train"
            writer.writerow([row["image"], formal, f"{row['description']} <b>", split])
        writer.writerow(["catalog.csv", "Red shirt.", "Red shirt", "val"])
        for kind in ("Printed", "Checked", "Striped", "Solid", "Washed", "Casual"):
            writer.writerow([rows[0]["image"], f"{kind} cotton shirt for men.", "", "train"])
    corpus = corpora.embedded_corpus()
    with (folder / "training.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in corpus[::3])])
    with (folder / "real.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "split"])
        writer.writerows([text, "val"] for text in corpus[1:400:3])
        writer.writerows([text, "train"] for text in corpus[401:])
    return folder


def run(monkeypatch: pytest.MonkeyPatch, data: Path, *flags: str) -> int:
    required = {"catalog": "catalog.csv", "training": "training.csv", "real": "real.csv"}
    files = [part for k, name in required.items() for part in (f"--{k}", str(data / name))]
    monkeypatch.setattr(sys, "argv", ["evaluate", *files, *flags])
    return evaluate.main()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("adversarial"), seed=1)
    (directory / "metrics.json").write_text('{"held_out_nats_per_token": 9.0}')
    (directory / "training.json").write_text('{"preset": "tiny"}')
    return directory


def test_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    data: Path, tiny_model: Path, model: Path,
) -> None:  # fmt: skip
    encoder = write_tiny_encoder(tmp_path / "encoder", corpora.embedded_corpus()[:300])
    notes = tmp_path / "notes.md"
    notes.write_text("Drawn by a test.")
    output = tmp_path / "evaluation"
    assert run(
        monkeypatch, data, "--model", str(model), "--likelihood", str(tiny_model), "--encoder",
        str(encoder), "--seeds", "0", "1", "--card", str(notes), "--output", str(output),
    ) == 0  # fmt: skip
    printed = capsys.readouterr()
    assert "left out: catalog.csv: " in printed.err
    found = json.loads((output / "evaluation.json").read_text("utf-8"))

    rows: dict[str, dict[str, Any]] = found["rows"]
    models = ["likelihood, T = 1", "likelihood, T = .8", "likelihood, T = .6",
              "likelihood, best of 4", "adversarial, T = 1", "adversarial, delivered, image alone",
              "adversarial, delivered, title given", "adversarial, best of 4"]  # fmt: skip
    baselines = ["template", "nearest neighbour", "rules"]
    assert list(rows) == ["real (against real)", *baselines, *models]
    for row in rows.values():
        for name, value in row.items():
            if isinstance(value, dict):
                assert value["low"] <= value["mean"] <= value["high"], name
    # the columns that have to catch each of the cheats
    assert rows["template"]["auc_words"]["mean"] > 0.9
    assert rows["template"]["distinct_2"]["high"] < 0.7
    assert rows["nearest neighbour"]["novel"]["mean"] == 0
    assert rows["nearest neighbour"]["perplexity_ratio"]["mean"] < 2
    assert rows["rules"]["type_right"]["mean"] > 0.9
    assert rows["rules"]["contradiction"]["mean"] < 0.1
    for name in models:  # random weights write nonsense
        assert rows[name]["perplexity_ratio"]["low"] > 2
        assert rows[name]["auc_worst"]["mean"] > 0.8
    assert rows["real (against real)"]["perplexity_ratio"]["mean"] == pytest.approx(1, abs=0.8)
    assert rows["real (against real)"]["novel"]["mean"] > 0.9
    assert rows["real (against real)"]["auc_words"]["mean"] < 0.7

    assert set(found["differences"]) == {
        f"adversarial, {one} − likelihood, {other}"
        for one in ("T = 1", "delivered, title given")
        for other in ("T = 1", "best of 4")
    }
    assert set(found["formal"]["adversarial"]) >= {"bleu_4", "rouge_l", "cider_d", "type_right"}

    with (output / "captions.csv").open(newline="", encoding="utf-8") as file:
        captions = list(csv.DictReader(file))
    assert len(captions) == 2 * 24
    assert list(captions[0])[-11:] == [*baselines, *models]
    assert all(row["rules"] and "predicted_description" in row for row in captions)

    table = (output / "evaluation.md").read_text("utf-8")
    assert table in printed.out
    for name in rows:
        assert f"| {name} | " in table
    page = (output / "evaluation.html").read_text("utf-8")
    assert "&lt;b&gt;" in page and "<b>&" not in page and " <b></h3>" not in page
    assert "default-src 'none'" in page and "<script" not in page and "http" not in page.split(
        "base64")[0].replace("http-equiv", "")  # fmt: skip
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("data:image/jpeg;base64,") == evaluate.SAMPLES

    card = (model / "README.md").read_text("utf-8")
    assert "Drawn by a test." in card and "likelihood, best of 4" in card
    assert json.loads((model / "metrics.json").read_text())["held_out_nats_per_token"] == 9


def test_without_likelihood_and_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, model: Path
) -> None:
    flags = ("--model", str(model), "--seeds", "3", "--limit", "8", "--only", "images/")
    assert run(monkeypatch, data, *flags) == 0
    first = capsys.readouterr().out
    assert "| likelihood" not in first and "Without --encoder" in first
    assert "auc embedding" not in first and "auc characters" in first
    assert run(monkeypatch, data, *flags) == 0
    assert capsys.readouterr().out == first  # the same seeds, the same figures


def test_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    for flags, message in (
        (["--only", "nowhere"], "contains 'nowhere'"),
        (["--encoder", str(tmp_path)], "no text encoder can be loaded"),
        (["--real", str(data / "catalog.csv")], "--real: no sentences"),
        (["--card", "notes.md"], "name it with --model"),
        (["--seeds", "1", "1"], "--seeds 1 1"),
    ):
        assert run(monkeypatch, data, *flags) == 2
        assert message in capsys.readouterr().err
