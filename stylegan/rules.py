"""What a caption must obey: checked when captions are delivered, rewarded when they are learned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from stylegan import corpora
from stylegan.corpora import Concepts

# fault → (how badly a delivered caption breaks the rules, what it costs a sampled one in training)
FAULTS: dict[str, tuple[int, float]] = {
    "first person": (8, 1.0),  # a shop that poses as a customer
    "contradiction": (4, 1.5),  # a kind, colour or gender that the product has not
    "unnamed": (4, 1.0),  # its kind is not said
    "unfinished": (2, 1.0),  # cut off at the longest, or in the middle: "such a nice watch with."
    "repeated": (2, 1.0),  # three words in a row twice, or "the the"
    "invented": (2, 1.0),  # a word that people do not use
    "short": (1, 0.5),  # fewer than three words
    "ill-formed": (1, 0.5),  # "these belt are"
    "unsayable": (1, 1.0),  # orders, prices, bodies, sizes
    "fault-finding": (1, 0.5),  # "cute, but nothing special"
    "misplaced": (1, 0.5),  # of a watch, that it drapes
    "copied": (1, 0.5),  # a sentence of the training text, with its topic hidden
    # what a shop asks of captions that are delivered, see brand.py: not learned, but worse to
    # break than all of the above together
    "forbidden": (128, 0.0),  # has what the brand forbids
    "required": (64, 0.0),  # has not what the brand requires
    "length": (64, 0.0),  # shorter or longer than the brand allows
    "duplicate": (32, 0.0),  # another caption of this image and style says the same
}
CONTENT = frozenset({"unnamed", "contradiction"})
SHOPS = frozenset({"forbidden", "required", "length", "duplicate"})

# words that no sentence ends with
_CUT_OFF = re.compile(
    r"\b(a|an|the|and|or|but|of|with|than|because|my|your|its|their|every|very)[\s.!?]*$"
)
# "so so nice" and "love, love this" are meant
_STUTTER = re.compile(r"\b(?!so\b)([a-z'-]+)\s+\1\b|\b([a-z']+)(?:[,\s]+\2\b){2}")


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules, with what they know of the training text.

    seen: numbers of its sentences (`corpora.sentence_hash`), none of which is to be delivered.
    words: numbers of the words that people use (`corpora.word_hashes`); empty: any may be said.
    beginnings: numbers of what these words begin with, as a tokeniser cuts them (`spelling.py`);
    empty: words are not watched while they are written.
    """

    seen: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()
    beginnings: frozenset[int] = frozenset()

    @classmethod
    def of(cls, sentences: Iterable[str], tokenizer: Tokenizer | None = None) -> Rules:
        """From the training sentences; a word that occurs only once in them counts as invented."""
        counts: Counter[str] = Counter()
        seen = set()
        for text in sentences:
            counts.update(corpora.words_of(text))
            seen.add(corpora.sentence_hash(text))
        words = [word for word, n in counts.items() if n > 1]
        return cls(
            frozenset(seen), frozenset(map(corpora.text_number, words)),
            _beginnings(words, tokenizer) if tokenizer else frozenset(),
        )  # fmt: skip

    def faults(self, text: str, finished: bool, concepts: Concepts) -> frozenset[str]:
        """Names of the rules that a caption breaks; concepts: what is known of the product."""
        named, contradicts = corpora.lexicon().verdict(text, concepts)
        words = re.findall(r"[a-z0-9'-]*[a-z0-9][a-z0-9'-]*", text.lower())
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        broken = {
            "first person": corpora.is_first_person(text),
            "contradiction": contradicts,
            "unnamed": not named,
            "unfinished": not finished or bool(_CUT_OFF.search(text.lower())),
            "repeated": len(trigrams) > len(set(trigrams)) or bool(_STUTTER.search(text.lower())),
            "invented": bool(self.words and not corpora.word_hashes(text) <= self.words),
            "short": len(words) < 3,
            "ill-formed": not corpora.is_well_formed(text),
            "unsayable": not corpora.is_sayable(text),
            "fault-finding": corpora.finds_fault(text),
            "misplaced": corpora.is_misplaced(text, concepts),
            "copied": corpora.sentence_hash(text) in self.seen,
        }
        return frozenset(name for name, is_broken in broken.items() if is_broken)


def _beginnings(words: Sequence[str], tokenizer: Tokenizer) -> frozenset[int]:
    """What the words begin with where the tokeniser cuts them, after a space and after none."""
    found = set[str]()
    texts = [mark + word for word in words for mark in ("", "-")]
    for encoding in tokenizer.encode_batch(texts):
        for end in range(1, len(encoding.ids)):
            text = tokenizer.decode(encoding.ids[:end]).lower()
            found.update(re.findall(r"[a-z']+$", text))
    return frozenset(map(corpora.text_number, found))


def severity(faults: Iterable[str]) -> int:
    """How badly the rules are broken; 0 when they are obeyed."""
    return sum(FAULTS[name][0] for name in faults)


def penalty(faults: Iterable[str]) -> float:
    """What the faults cost in training, 0 or less."""
    return -float(sum(FAULTS[name][1] for name in faults))
