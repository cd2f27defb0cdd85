from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from test_report import captioned, failed, summary_of

from stylegan.cards import data_card, model_card
from stylegan.parts import OUTPUT
from stylegan.training import TrainingConfig


@pytest.mark.parametrize("images", ["s3://shop/catalog.parquet", "a\n---\nb | `c`: \"d\" '#e"])
def test_the_data_card_is_read_by_the_hub(images: str) -> None:
    rows = [captioned("1", "Nice!"), failed("2", "gone", "no such file")]
    summary = summary_of(rows, 2)
    summary["configuration"]["images"] = images
    front, body = front_matter(data_card(summary))
    [config] = front["configs"]
    assert config["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert front["size_categories"] == ["n<1K"]
    assert all(f"| `{name}` |" in body for name in OUTPUT.names)
    assert "| images | 2 |" in body
    assert "| images that failed: gone | 1 |" in body
    [line] = [line for line in body.splitlines() if line.startswith("| input |")]
    assert line.count("|") == 3 and line.count("`") == 2


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (4_200_000, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories_are_the_hubs(rows: int, category: str) -> None:
    summary = summary_of([captioned("1", "Nice!")], 1)
    summary["counts"]["rows"] = rows
    assert front_matter(data_card(summary))[0]["size_categories"] == [category]


def test_the_model_card_shows_figures_beside_their_baselines() -> None:
    metrics = {
        "held_out_nats_per_token": 2.34567,
        "content": {
            "template": {"captions": 950, "type_right": {"mean": 0.9, "low": 0.88, "high": 0.92}},
            "delivered": {"captions": 950, "distinct_2": 0.71},
        },
    }
    card = model_card(metrics, {"preset": "base", "backbone_rate": 0.004}, "Street photographs.")
    front, body = front_matter(card)
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "image-to-text")
    assert front["library_name"] == "stylegan"
    assert "## Data\n\nStreet photographs.\n" in body
    assert "| held out nats per token | 2.346 |" in body
    assert "|  | template | delivered |" in body
    assert "| type right | 0.900 (0.880 to 0.920) |  |" in body
    assert "| distinct 2 |  | 0.710 |" in body
    assert "    --preset base \\\n    --backbone-rate 0.004\n" in body


def test_the_model_card_tells_of_the_adversarial_stage_where_it_ran() -> None:
    settings = dataclasses.asdict(TrainingConfig())
    alone = model_card({}, settings | {"adversarial_steps": 0}, "")
    both = model_card({}, settings | {"adversarial_steps": 600, "backbone": "my models/a"}, "")
    for term in ("discriminator", "RLOO", "R1", "KL divergence", "moving average", "caption_score"):
        assert term in both and term not in alone
    rounds = model_card({}, settings | {"adversarial_steps": 0, "rounds": 2}, "")
    for term in ("in rounds", "MaliGAN", "caption_score"):
        assert term in rounds and (term == "caption_score" or term not in both + alone)
    assert "RLOO" not in rounds and "proofreads" not in rounds
    proofread = settings | {"rounds": 2, "proofreader": "LM"}
    assert "odder" in model_card({}, proofread, "")
    assert "unfit" in model_card({}, proofread | {"judged": "verdicts.csv"}, "")
    assert "\n\n\n" not in both + alone + rounds
    assert "    --backbone 'my models/a'" in both


def test_the_command_leaves_out_what_is_the_default_anyway() -> None:
    card = model_card({}, dataclasses.asdict(TrainingConfig(seed=3)), "")
    flags = ("--catalog CATALOG", "--colloquial SENTENCES", "--output MODEL", "--seed 3")
    assert "".join(f" \\\n    {flag}" for flag in flags) + "\n```\n" in card


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    start, front, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body
