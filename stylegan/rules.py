"""What a caption must obey: checked when captions are delivered, rewarded when they are learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from stylegan import corpora
from stylegan.corpora import Concepts

# fault → (how badly a delivered caption breaks the rules, what it costs a sampled one in training)
FAULTS: dict[str, tuple[int, float]] = {
    "first person": (8, 1.0),  # a shop that poses as a customer
    "contradiction": (4, 1.5),  # a kind, colour or gender that the product has not
    "unnamed": (4, 1.0),  # its kind is not said
    "unfinished": (2, 1.0),  # cut off at the longest
    "repeated": (2, 1.0),  # three words in a row twice
    "invented": (2, 1.0),  # a word that people do not use
    "short": (1, 0.5),  # fewer than three words
    "ill-formed": (1, 0.5),  # "these belt are"
    "unsayable": (1, 1.0),  # orders, prices, bodies, sizes
    "copied": (1, 0.5),  # a sentence of the training text, with its topic hidden
}
CONTENT = frozenset({"unnamed", "contradiction"})


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules, with what they know of the training text.

    seen: numbers of its sentences (`corpora.sentence_hash`), none of which is to be delivered.
    words: numbers of the words that people use (`corpora.word_hashes`); empty: any may be said.
    """

    seen: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()

    @classmethod
    def of(cls, sentences: Iterable[str]) -> Rules:
        """From the training sentences; a word that occurs only once in them counts as invented."""
        counts: Counter[int] = Counter()
        seen = set()
        for text in sentences:
            counts.update(corpora.word_hashes(text))
            seen.add(corpora.sentence_hash(text))
        return cls(frozenset(seen), frozenset(word for word, n in counts.items() if n > 1))

    def faults(self, text: str, finished: bool, concepts: Concepts) -> frozenset[str]:
        """Names of the rules that a caption breaks; concepts: what is known of the product."""
        named, contradicts = corpora.lexicon().verdict(text, concepts)
        words = text.split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        broken = {
            "first person": corpora.is_first_person(text),
            "contradiction": contradicts,
            "unnamed": not named,
            "unfinished": not finished,
            "repeated": len(trigrams) > len(set(trigrams)),
            "invented": bool(self.words and not corpora.word_hashes(text) <= self.words),
            "short": len(words) < 3,
            "ill-formed": not corpora.is_well_formed(text),
            "unsayable": not corpora.is_sayable(text),
            "copied": corpora.sentence_hash(text) in self.seen,
        }
        return frozenset(name for name, is_broken in broken.items() if is_broken)


def severity(faults: Iterable[str]) -> int:
    """How badly the rules are broken; 0 when they are obeyed."""
    return sum(FAULTS[name][0] for name in faults)


def penalty(faults: Iterable[str]) -> float:
    """What the faults cost in training, 0 or less."""
    return -float(sum(FAULTS[name][1] for name in faults))
