from __future__ import annotations

import pytest

from stylegan import corpora, metrics


def test_content_judges_kind_colour_and_contradiction() -> None:
    truth = corpora.lexicon().concepts("Black watch for men")
    figures = metrics.content(
        ["A sleek black watch.", "A sleek red watch.", "A pretty dress.", "So sleek!"], [truth] * 4
    )
    assert figures["type_right"].mean == 0.5
    assert figures["type_wrong"].mean == 0.25
    assert figures["colour_said"].mean == 0.5
    assert figures["colour_right"].mean == 0.5
    assert figures["contradiction"].mean == 0.5


def test_a_fruit_is_not_a_colour() -> None:
    truth = corpora.lexicon().concepts("Orange")
    assert metrics.content(["A juicy orange."], [truth])["contradiction"].mean == 0


def test_bootstrap_holds_the_mean() -> None:
    interval = metrics.bootstrap([0.0, 1.0] * 100)
    assert interval.low < interval.mean == 0.5 < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.15)
    assert metrics.bootstrap([1.0] * 9).low == 1


def test_distinct_n() -> None:
    assert metrics.distinct_n(["a b c.", "a b d."], 2) == 3 / 4
    assert metrics.distinct_n(["one."], 2) == 0


def test_a_training_sentence_with_another_product_is_not_novel() -> None:
    training = ["this navy dress is so soft and pretty."]
    assert metrics.novelty(["This red skirt is so soft and pretty!"], training) == 0
    assert metrics.novelty(["This red skirt is so stiff."], training) == 1


def test_copied_8_grams() -> None:
    training = ["one two three four five six seven eight nine."]
    captions = ["Two three four five six seven eight nine ten.", "One two three four five six."]
    assert metrics.copied(captions, training) == 0.5


def test_invented_words() -> None:
    assert metrics.invented_words(["A soft flummox."], ["a soft dress."]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("detector", [metrics.word_detector, metrics.character_detector])
def test_detectors_can_fail_and_succeed(detector: object) -> None:
    """People against people are not told apart; a template always is."""
    people = corpora.embedded_corpus()[:600]
    assert callable(detector)
    assert metrics.detector_auc(people[::2], people[1::2], detector) == pytest.approx(0.5, abs=0.1)
    template = [f"Great product number {'abcdefghij'[i % 10]}, love it!" for i in range(300)]
    assert metrics.detector_auc(people[:300], template, detector) > 0.99
