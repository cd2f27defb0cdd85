from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stylegan import corpora
from stylegan.critic import Critic, calibrate
from stylegan.discriminator import detector_auc, hidden_ids


@pytest.fixture(scope="module")
def people() -> list[list[int]]:
    corpus = corpora.embedded_corpus()
    return hidden_ids(corpus, corpora.train_tokenizer(corpus, 1500))


def worn_out(people: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """Sentences as a captioner would write them that says one thing too often: each third one
    begins with the same two words."""
    random = np.random.default_rng(seed)
    chosen = [people[i] for i in random.integers(len(people), size=count)]
    return [[77, 88, *row[2:]] if i % 3 == 0 else row for i, row in enumerate(chosen)]


def test_odds_are_calibrated_and_undo_what_is_worn_out(people: list[list[int]]) -> None:
    random = np.random.default_rng(0)
    real, apart = people[::2], people[1::2]
    critic = Critic.fit(
        {"colloquial": real}, {"colloquial": worn_out(real, 3000, 1)},
        {"colloquial": (apart, worn_out(apart, 1000, 2))},
    )  # fmt: skip
    fresh = worn_out(apart, 3000, 3)
    odds = critic.log_odds(fresh, "colloquial")
    marked = torch.tensor([row[0] == 77 for row in fresh])
    assert odds[marked].max() < odds[~marked].median()
    apart_odds = critic.log_odds(apart, "colloquial")
    scores = [critic.probability(o, "colloquial").mean().item() for o in (apart_odds, odds)]
    assert 0.5 < scores[0] < 0.9 and scores[1] < 0.5
    # rejection sampling in proportion to them, as the captioner does it
    luck = torch.from_numpy(random.random(len(fresh)))
    accepted = [row for row, keep in zip(fresh, luck < odds.exp() / 4, strict=True) if keep]
    assert len(accepted) > 300
    assert np.mean([row[0] == 77 for row in accepted]) < 0.05
    assert detector_auc(apart[:400], accepted[:400]) < detector_auc(apart[:400], fresh[:400]) - 0.05


def test_a_sentence_is_judged_by_itself_and_nothing_at_all_can_be(people: list[list[int]]) -> None:
    critic = Critic.fit({"a": people[:200]}, {"a": worn_out(people, 200, 0)}, {})
    together = critic.log_odds(people[:50], "a")
    alone = torch.cat([critic.log_odds([row], "a") for row in people[:50]])
    assert torch.equal(together, alone)
    scores = [critic.probability(odds, "a") for odds in (together, *together.split(1))]
    assert torch.equal(scores[0], torch.cat(scores[1:]))
    assert critic.log_odds([], "a").tolist() == []


def test_styles_are_judged_apart(people: list[list[int]]) -> None:
    worn = worn_out(people[:300], 300, 0)  # of the same things: nothing else tells them
    critic = Critic.fit({"a": people[:300], "b": worn}, {"a": worn, "b": people[:300]}, {})
    marked = [[77, 88, *people[0][2:]]]
    assert critic.log_odds(marked, "a") < 0 < critic.log_odds(marked, "b")


def test_captions_that_count_more_are_accepted_less_often(people: list[list[int]]) -> None:
    fake = worn_out(people, 3000, 1)
    marked = torch.tensor([row[0] == 77 for row in fake])
    counts = torch.where(marked, 4.0, 1.0).tolist()
    plain = Critic.fit({"a": people}, {"a": fake}, {}).log_odds(fake, "a")
    other = Critic.fit({"a": people}, {"a": fake}, {}, {"a": counts}).log_odds(fake, "a")
    difference = (other - plain)[marked].mean() - (other - plain)[~marked].mean()
    assert difference.item() == pytest.approx(-math.log(4), abs=0.5)


def test_it_comes_back_from_disk(people: list[list[int]], tmp_path: Path) -> None:
    critic = Critic.fit({"a": people[:200]}, {"a": worn_out(people, 200, 0)}, {})
    critic.save(tmp_path)
    again = Critic.load(tmp_path)
    assert again is not None and again.styles == ["a"]
    torch.testing.assert_close(
        again.log_odds(people[:9], "a"), critic.log_odds(people[:9], "a"), atol=1e-2, rtol=1e-2
    )
    assert Critic.load(tmp_path / "nowhere") is None


def test_calibrated_scores_are_probabilities() -> None:
    torch.manual_seed(0)
    real, fake = 3 * (torch.randn(4000) + 1) + 5, 3 * (torch.randn(4000) - 1) + 5
    scale, shift = calibrate(real, fake)
    scores, labels = torch.cat([real, fake]), torch.cat([torch.ones(4000), torch.zeros(4000)])
    probability = (scale * scores + shift).sigmoid()
    for low in (0.1, 0.3, 0.5, 0.7):
        inside = (probability >= low) & (probability < low + 0.2)
        assert labels[inside].mean().item() == pytest.approx(low + 0.1, abs=0.06)


def test_calibration_is_finite_where_the_sides_do_not_overlap() -> None:
    scale, shift = calibrate(torch.full((50,), 4.0), torch.full((50,), -4.0))
    assert np.isfinite([scale, shift]).all()
    assert 1 / (1 + np.exp(-4 * scale - shift)) > 0.9
