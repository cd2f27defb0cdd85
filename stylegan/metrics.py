"""The evaluation's numbers: content, diversity, novelty, and how easily a detector tells machine
from person. Every function takes plain sentences; all text goes through the one normaliser first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stylegan import corpora
from stylegan.corpora import Concepts


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(values: Sequence[float], samples: int = 1000, seed: int = 0) -> Interval:
    """Mean and percentile interval of values [n], resampled `samples` times."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return Interval(float("nan"), float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    means = array[random.integers(len(array), size=(samples, len(array)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))


def content(captions: Sequence[str], truths: Sequence[Concepts]) -> dict[str, Interval]:
    """Shares of captions, judged by the lexicon against what is known of each product.

    type_right: a form of the product's kind is named. type_wrong: a kind is named and none of the
    named is right. colour_said; colour_right: of those that say a colour, one of its family is the
    product's. contradiction: a kind, colour or gender that the product has not.
    """
    lexicon = corpora.lexicon()
    right, wrong, said, colour_right, contradiction = [], [], [], [], []
    for caption, truth in zip(captions, truths, strict=True):
        mentions = lexicon.mentions(corpora.normalise(caption))
        kinds = [m for m in mentions if m.types and not (m.colours & truth.colours)]
        named = any(m.types & truth.head for m in kinds)
        right.append(named)
        wrong.append(bool(kinds) and not named)
        # a word that names a kind of this product ("lemon", "orange") is no colour
        colours = [m for m in mentions if m.colours and not m.types & truth.head]
        if truth.colours:
            said.append(bool(colours))
            if colours:
                colour_right.append(all(m.colours & truth.colours for m in colours))
        genders = [m for m in mentions if m.genders]
        contradiction.append(
            (bool(kinds) and not named)
            or bool(truth.colours and colours and not colour_right[-1])
            or bool(truth.genders and any(not m.genders & truth.genders for m in genders))
        )
    return {
        "type_right": bootstrap(right),
        "type_wrong": bootstrap(wrong),
        "colour_said": bootstrap(said),
        "colour_right": bootstrap(colour_right),
        "contradiction": bootstrap(contradiction),
    }


def distinct_n(sentences: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams (Li et al., NAACL 2016); compare at equal numbers only."""
    grams = [
        gram
        for text in sentences
        for words in [corpora.normalise(text).split()]
        for gram in zip(*(words[i:] for i in range(n)), strict=False)
    ]
    return len(set(grams)) / max(1, len(grams))


def novelty(sentences: Sequence[str], training: Iterable[str]) -> float:
    """Share that are no training sentence, with topic words hidden on both sides."""
    seen = {corpora.sentence_hash(text) for text in training}
    return float(np.mean([corpora.sentence_hash(text) not in seen for text in sentences]))


def copied(sentences: Sequence[str], training: Iterable[str], n: int = 8) -> float:
    """Share of sentences that hold n words in a row of one training sentence."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = corpora.normalise(text).strip(".!?").split()
        return set(zip(*(words[i:] for i in range(n)), strict=False))

    known = set().union(*(grams(text) for text in training))
    return float(np.mean([bool(grams(text) & known) for text in sentences]))


def invented_words(sentences: Sequence[str], vocabulary: Iterable[str]) -> float:
    """Share of words that occur nowhere in the texts of `vocabulary`."""
    known = {word for text in vocabulary for word in _words(text)}
    words = [word for text in sentences for word in _words(text)]
    return float(np.mean([word not in known for word in words]))


def _words(text: str) -> list[str]:
    return [word.strip(".,!?;:'\"-") for word in corpora.normalise(text).split()]


def detector_auc(
    human: Sequence[str], machine: Sequence[str], detector: Callable[[], object], seed: int = 0
) -> float:
    """Area under the ROC curve of a fresh human-or-machine detector, five-fold, topic hidden.

    .5 cannot tell them apart, 1 always can. human and machine are cut to equal numbers. detector
    makes a scikit-learn classifier of texts.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    hide = corpora.lexicon().hide
    count = min(len(human), len(machine))
    random = np.random.default_rng(seed)
    texts = [
        hide(corpora.normalise(group[i]))
        for group in (human, machine)
        for i in random.permutation(len(group))[:count]
    ]
    labels = np.repeat([0, 1], count)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = cross_val_predict(detector(), texts, labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, scores))


def word_detector() -> object:
    """Logistic regression on words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[\w']+|[.,!?]", sublinear_tf=True),
        LogisticRegression(C=4.0, max_iter=1000),
    )


def character_detector() -> object:
    """Logistic regression on one to five characters in a row, within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True, min_df=2),
        LogisticRegression(C=4.0, max_iter=1000),
    )
