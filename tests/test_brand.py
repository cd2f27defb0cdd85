"""Brand rules: the file, what is found in a text, and where a required term is put."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stylegan import brand, corpora
from stylegan.brand import BrandRules, BrandRulesError

SHIRT, SHOES, NOTHING = frozenset({"shirt"}), frozenset({"casual shoes"}), frozenset[str]()


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(
        'forbidden = ["Must-have", "cheap", "must  have"]\nrequired_columns = ["brand"]\n'
        "max_words = 12\n"
    )
    assert BrandRules.read(str(path)) == BrandRules(("cheap", "must have"), ("brand",), None, 12)
    other = BrandRules.parse('max_words = 12\nrequired_columns = ["brand"]\n'
                             'forbidden = ["CHEAP", "must have"]')  # fmt: skip
    assert other == BrandRules.read(str(path))
    assert other == BrandRules(("Must-have!", "cheap"), ("brand", "brand"), max_words=12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no rule; the rules are forbidden, required_columns, min_words, max_words"),
        ('forbiden = ["cheap"]', "'forbiden' is no rule; the rules are forbidden"),
        ("forbidden = []", r"forbidden = \[\]: give a list with something in it"),
        ("required_columns = []", r"required_columns = \[\]: give a list with something"),
        ('forbidden = "cheap"', "forbidden = 'cheap': give a list"),
        ('forbidden = ["cheap", " "]', "forbidden: ' ' is no text"),
        ('forbidden = ["便宜"]', "'便宜' has none of the letters and digits"),
        ("max_words = true", "max_words = True: give a whole number from 1 up"),
        ("max_characters = 0", "max_characters = 0: give a whole number"),
        ("min_words = 9\nmax_words = 8", "min_words = 9 is more than max_words = 8"),
        ("max_words = 2", "max_words = 2: a caption has 3 words or more"),
        ("min_words = 30", "min_words = 30: a caption has 22 words or fewer"),
        ("min_words = 10\nmax_characters = 19", "max_characters = 19 is too few for 10 words"),
        ("max_words 12", "line 1"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BrandRulesError, match=f"rules.toml: .*{message}"):
        BrandRules.read(str(path))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrandRulesError, match=r"none\.toml cannot be read"):
        BrandRules.read(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("A must-have shirt.", False),
        ("MUST HAVE!", False),
        ("You must... have it.", False),
        ("Must—have", False),
        ("Must\u00adhave", True),  # prints as one word
        ("Must haves and a musthave.", True),
        ("You must not have it.", True),
        ("So cheap.", False),
        ("So chéap.", False),
        ('So "cheap".', False),
        ("Cheap-looking", False),
        ("Cheaper, cheaply.", True),
    ],
)
def test_phrases_are_found_as_whole_words(text: str, is_allowed: bool) -> None:
    rules = BrandRules.parse('forbidden = ["must-have", "cheap"]')
    assert rules.allows(text) is is_allowed
    assert rules.faults(text) == (frozenset() if is_allowed else {"forbidden"})


def test_lengths_are_of_the_whole_caption() -> None:
    rules = BrandRules(min_words=4, max_words=6, min_characters=15, max_characters=30)
    assert not rules.faults("So soft - a must-have shirt.")  # the dash is no word
    assert rules.faults("So very soft.") == {"length"}
    assert rules.faults("A b c d e.") == {"length"}
    assert rules.faults("So soft and so nice a shirt.") == {"length"}
    assert rules.faults("Extraordinarily comfortable handmade shirt.") == {"length"}
    assert not rules.faults("This H&M shirt is so soft.")  # as it is printed
    assert rules.exceeds("so soft a shirt", ["United Colors of Benetton"])
    assert not rules.exceeds("so soft a shirt", ["soft"])


@pytest.mark.parametrize(
    ("text", "terms", "kinds", "expected"),
    [
        ("this shirt is so soft.", ["Levi's"], SHIRT, "This Levi's shirt is so soft."),
        ("shirt is so soft.", ["ADIDAS"], SHIRT, "ADIDAS shirt is so soft."),
        ("such a soft shirt!", ["Levi's", "Cotton"], SHIRT, "Such a soft Levi's Cotton shirt!"),
        ("this is a shirt.", ["Arrow"], SHIRT, "This is an Arrow shirt."),
        ("this is an shirt.", ["Puma"], SHIRT, "This is a Puma shirt."),
        ("a soft levi's shirt.", ["Levi's"], SHIRT, "A soft Levi's shirt."),
        ("these shoes are fun.", ["Dr. Martens"], SHOES, "These Dr. Martens shoes are fun."),
        ("the v-neck shirt.", ["H&M"], SHIRT, "The H&M v-neck shirt."),
        ("love this shirt.", [r"A\1 {B}"], SHIRT, r"Love this A\1 {B} shirt."),
        ("love this shirt.", ["Élan"], SHIRT, "Love this Élan shirt."),
        # no place for it
        ("so soft.", ["Levi's"], SHIRT, "So soft."),
        ("this shirt is soft.", ["Levi's"], NOTHING, "This shirt is soft."),
        ("this is a shirt.", ["HRX"], SHIRT, "This is a shirt."),  # a or an?
        ("you can shirt it up.", ["Levi's"], SHIRT, "You can shirt it up."),
        ("a cotton shirt.", ["Cotton Blend"], SHIRT, "A cotton shirt."),
        ("this shirt is soft.", ["衬衫"], SHIRT, "This shirt is soft."),
    ],
)
def test_required_terms_have_their_place(
    text: str, terms: list[str], kinds: frozenset[str], expected: str
) -> None:
    said = brand.with_terms(text, terms, kinds)
    assert said == expected
    is_said = all(term in said for term in terms)
    assert BrandRules().faults(said, terms) == (frozenset() if is_said else {"required"})


def test_a_row_without_a_value_requires_nothing() -> None:
    assert [brand.term(value) for value in (None, "", "  ", " Levi's \n 501", 7)] == [
        None, None, None, "Levi's 501", "7",
    ]  # fmt: skip


GAPS = 30
SPOKEN = st.sampled_from(["so", "cheap", "must", "have", "e", "r&b"])
WORDS = st.lists(SPOKEN, min_size=1, max_size=GAPS)
BETWEEN = st.sampled_from([" ", "-", " - ", ", ", ". ", "! ", "' ", "\u00a0", "—"])


@given(WORDS, st.lists(BETWEEN, min_size=GAPS, max_size=GAPS))
def test_what_stands_between_words_hides_none(words: list[str], between: list[str]) -> None:
    text = "".join(word + gap for word, gap in zip(words, between, strict=False))
    assert brand.says(text, " ".join(words))
    assert brand.says(corpora.sentence(text), " ".join(words))
