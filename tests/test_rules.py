from __future__ import annotations

import pytest

from stylegan import corpora
from stylegan.rules import CONTENT, FAULTS, SHOPS, Rules, penalty, severity

TRAINING = [
    "this navy dress is so soft and pretty.", "this red dress is so soft.", "such a handy watch!",
    "what a pretty and handy belt.", "so pretty, so handy, such a watch for every day.",
]  # fmt: skip
WATCH = corpora.lexicon().concepts("Black watch for men")


@pytest.mark.parametrize(
    ("text", "finished", "faults"),
    [
        ("So pretty and so handy, this watch.", True, set()),
        ("Such a pretty watch", False, {"unfinished"}),
        ("I got this watch!", True, {"first person", "invented", "unsayable"}),
        ("So soft and so pretty.", True, {"unnamed"}),
        ("So pretty, this dress.", True, {"unnamed", "contradiction"}),
        ("Such a handy watch!", True, {"copied"}),
        ("A flummoxed watch, so pretty.", True, {"invented"}),
        ("Watch!", True, {"short"}),
        ("So pretty a watch so pretty a watch.", True, {"repeated"}),
        ("So pretty, so pretty, this watch.", True, set()),
        ("So, so handy, this watch.", True, set()),
        ("So so so handy, this watch.", True, {"repeated"}),
        ("The the watch is handy.", True, {"repeated"}),
        ("So pretty, pretty, this watch.", True, set()),
        ("So pretty, pretty, pretty watch.", True, {"repeated"}),
        ("This watch, so pretty and so.", True, set()),
        ("So handy and so pretty, this watch with a.", True, {"unfinished"}),
        ("Such a handy watch and", True, {"unfinished"}),
        ("So pretty but nothing else, this watch.", True, {"fault-finding"}),
        ("So pretty, a bit heavy, this watch.", True, {"fault-finding"}),
        ("Otherwise a pretty watch.", True, {"fault-finding"}),
        ("So handy, a handy watch, an pretty watch.", True, {"ill-formed"}),
        ("This watch, a every day watch.", True, {"ill-formed"}),
        ("These are so pretty and has a watch.", True, {"ill-formed"}),
        ("What a very pretty watches!", True, {"ill-formed"}),
        ("The perfect day-watch.", True, {"ill-formed"}),
        ("So handy but still so pretty, this watch.", True, set()),
        ("This watch is not only handy.", True, set()),
        ("So pretty, the sleeves of this watch.", True, {"misplaced"}),
        ("", True, {"short", "unnamed"}),
        (". . . !", True, {"short", "unnamed"}),
    ],
)
def test_faults(text: str, finished: bool, faults: set[str]) -> None:
    rules = Rules.of(TRAINING)
    found = rules.faults(corpora.normalise(text), finished, WATCH)
    # the few words of the training text leave most words unknown
    assert found - {"invented", "unsayable"} == faults - {"invented", "unsayable"}
    assert faults <= found | {"invented"} or "invented" in faults


def test_clothes_may_drape() -> None:
    for description, misplaced in (("Blue dress", False), ("Scarf", False), ("Brown belt", True)):
        noun = description.split()[-1].lower()
        found = Rules().faults(
            f"This {noun} drapes nicely.", True, corpora.lexicon().concepts(description)
        )
        assert ("misplaced" in found) == misplaced, description


def test_food_is_not_worn() -> None:
    lemon, shirt = map(corpora.lexicon().concepts, ("Lemon.", "Yellow shirt."))
    for text, misplaced in (
        ("This lemon is so stylish.", True), ("A lemon that goes with jeans.", True),
        ("Such a fresh lemon!", False), ("Lemon and lime, so fresh.", False),
    ):  # fmt: skip
        assert ("misplaced" in Rules().faults(text, True, lemon)) == misplaced, text
        said = text.replace("lemon", "shirt").replace("Lemon", "Shirt")
        assert "misplaced" not in Rules().faults(said, True, shirt), said


def test_a_word_counts_from_its_second_use() -> None:
    rules = Rules.of(TRAINING)
    assert corpora.word_hashes("pretty handy watch") <= rules.words
    assert not corpora.word_hashes("day") <= rules.words


def test_without_words_any_may_be_said() -> None:
    assert "invented" not in Rules().faults("a flummoxed watch for days.", True, WATCH)


def test_what_is_worse_costs_more() -> None:
    assert severity([]) == 0 == penalty([])
    assert severity(["first person"]) > severity(["contradiction"]) > severity(["copied"])
    assert penalty(["contradiction", "unnamed"]) < penalty(["contradiction"]) < 0
    assert set(FAULTS) >= CONTENT
    own = set(FAULTS) - SHOPS
    assert all(severity([name]) > severity(own) and penalty([name]) == 0 for name in SHOPS)
