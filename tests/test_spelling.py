"""Only words that people use are written, and all of them can be."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_model
from tokenizers import Tokenizer

from stylegan import corpora
from stylegan.brand import BrandRules
from stylegan.captioner import Captioner, Decoding, save_model
from stylegan.generator import EOS
from stylegan.rules import Rules
from stylegan.spelling import Spelling, token_pieces

SENTENCES = [
    "it's a well-made watch, isn't it?", "such a pretty, pretty little watch!",
    "the prettiest strap: goes with everything.", "so handy (and so soft)!",
]  # fmt: skip


@pytest.fixture
def tokenizer() -> Tokenizer:
    return corpora.train_tokenizer(SENTENCES, 300)


def written(spelling: Spelling, tokens: list[int]) -> bool:
    """Whether each token could follow those before it."""
    begun = ""
    for token in tokens:
        if not spelling.allowed(begun)[token]:
            return False
        begun = spelling.follow(begun, token)
    return True


def test_what_people_write_can_be_written(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer, Rules.of(SENTENCES * 2, tokenizer))
    for text in (*SENTENCES, "handy strap, pretty soft!", "a watch-strap"):
        tokens = tokenizer.encode(text).ids
        assert len(tokens) > len(text.split()), "of words that are cut, there are none"
        assert written(spelling, [*tokens, EOS]), text


def test_other_words_cannot(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer, Rules.of(SENTENCES * 2, tokenizer))
    for text in ("a watchsoft strap", "prettyest", "so soft watchy.", "a wat."):
        assert not written(spelling, [*tokenizer.encode(text).ids, EOS]), text


def test_a_piece_is_what_it_adds(tokenizer: Tokenizer) -> None:
    pieces = token_pieces(tokenizer)
    for text in SENTENCES:
        said = "".join(pieces[token] for token in tokenizer.encode(text).ids)
        assert re.findall("[a-z]+", said) == re.findall("[a-z]+", text)
    assert pieces[EOS] == ""


def test_where_nothing_may_follow_all_may(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer, Rules.of(SENTENCES * 2, tokenizer))
    assert spelling.allowed("zzz").all()
    assert not spelling.allowed("watch").all()
    assert not spelling.allowed("wa")[EOS]
    assert spelling.allowed("")[EOS]


def test_a_captioner_invents_no_word(tmp_path: Path) -> None:
    loose = Captioner.from_pretrained(write_tiny_model(tmp_path / "loose"))
    corpus = corpora.embedded_corpus()
    rules = Rules.of(corpus, loose.tokenizer)
    save_model(
        tmp_path / "strict",
        Captioner(loose.generator, loose.tokenizer, Decoding(max_candidates=1), rules=rules),
    )
    strict = Captioner.from_pretrained(tmp_path / "strict")
    assert strict.rules == rules
    drawn = strict.caption([None] * 40, descriptions=["Blue watch for men."] * 40, seed=range(40))
    free = Captioner(
        loose.generator, loose.tokenizer, Decoding(max_candidates=1),
        rules=Rules(rules.seen, rules.words),
    )  # fmt: skip
    others = free.caption([None] * 40, descriptions=["Blue watch for men."] * 40, seed=range(40))

    def inventing(captions: list) -> float:  # type: ignore[type-arg]
        # what is cut off at the longest may end within a word
        whole = [c for c in captions if "unfinished" not in c.review_reasons]
        return float(np.mean(["invented" in c.review_reasons for c in whole] or [0.0]))

    cut = [corpora.words_of(str(c.text).rsplit(" ", 1)[0]) for c in drawn]
    assert all(set(map(corpora.text_number, words)) <= rules.words for words in cut)
    assert inventing(drawn) == 0
    # an untrained model without it writes hardly anything else
    assert np.mean(["invented" in c.review_reasons for c in others]) > 0.8
    again = strict.caption([None] * 3, descriptions=["Blue watch for men."] * 3, seed=[5, 6, 7])
    assert [c.text for c in again] == [c.text for c in drawn[5:8]]


def test_the_embedded_corpus_can_be_written() -> None:
    corpus = [corpora.normalise(text) for text in corpora.embedded_corpus()]
    tokenizer = corpora.train_tokenizer(corpus, 1500)
    spelling = Spelling(tokenizer, Rules.of(corpus * 2, tokenizer))
    assert all(written(spelling, [*tokenizer.encode(text).ids, EOS]) for text in corpus)


def test_a_shops_own_name_for_the_kind_can_be_written() -> None:
    corpus = [t for t in map(corpora.normalise, corpora.embedded_corpus()) if "anorak" not in t]
    spelling = Spelling(
        tokenizer := corpora.train_tokenizer(corpus, 1500), Rules.of(corpus, tokenizer)
    )
    assert spelling.knows_kinds(["Nike", "watch", "these shoes", "Kjøp"])
    assert not spelling.knows_kinds(["Nike", "Anorak"])


def test_a_required_kind_that_people_do_not_name(tmp_path: Path) -> None:
    loose = Captioner.from_pretrained(write_tiny_model(tmp_path))
    rules = Rules.of(["a pretty watch, a pretty watch."] * 2, loose.tokenizer)
    captioner = Captioner(loose.generator, loose.tokenizer, Decoding(max_candidates=1), rules=rules)

    def words(*terms: str) -> set[int]:
        captions = captioner.caption(
            [None] * 8, descriptions=["Blue anorak"] * 8, seed=range(8), terms=[terms] * 8,
            rules=BrandRules(required_columns=("kind",)),
        )  # fmt: skip
        return corpora.word_hashes(" ".join(str(c.text).rsplit(" ", 1)[0] for c in captions))

    known = rules.words | corpora.word_hashes("Nike and or with")  # "&", "/" and "w/" too
    assert words("Nike") <= known
    assert not words("Anorak") <= known
