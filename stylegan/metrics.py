"""The evaluation's numbers: content, style, fluency, diversity, novelty, and formal captions.

Every function takes plain sentences; all text goes through the one normaliser first. Topic words
are hidden wherever the way of writing is judged, so that nothing is told apart by what it is about.

Shapes: n sentences, k seeds, S bootstrap samples. Needs the extra `evaluate`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stylegan import corpora
from stylegan.corpora import Concepts
from stylegan.training import Process

Floats = npt.NDArray[np.float64]


# --- intervals ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval; all three are NaN where nothing was there to be measured."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def _percentiles(figures: Floats) -> Interval:
    """figures [1 + S]: the estimate, then its bootstrap samples."""
    low, high = np.percentile(figures[1:], [2.5, 97.5])
    return Interval(float(figures[0]), float(low), float(high))


def _resample(count: int, samples: int, seed: int | Sequence[int]) -> Floats:
    """How often each of `count` units is drawn [1 + S, count]; first every one once."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=samples)
    return np.vstack([np.ones(count), drawn])


def bootstrap(
    values: npt.ArrayLike, sizes: npt.ArrayLike | None = None, samples: int = 1000, seed: int = 0
) -> Interval:
    """The sum of values over the sum of sizes, with its percentile interval.

    values: [n], or [n, k] for k seeds, of which only the n are resampled: captions of one product
    under several seeds are not independent. NaN: does not apply, and counts for nothing. sizes: of
    the same shape; without, each value has size 1, and the figure is the mean.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan)
    array = array.reshape(len(array), -1)
    applies = ~np.isnan(array)
    weights = applies if sizes is None else np.asarray(sizes, float).reshape(array.shape) * applies
    drawn = _resample(len(array), samples, seed)
    sums, totals = drawn @ np.nansum(array, axis=1), drawn @ weights.sum(axis=1)
    if not totals[0]:
        return Interval(math.nan, math.nan, math.nan)
    return _percentiles(sums[totals > 0] / totals[totals > 0])


# --- content ------------------------------------------------------------------------------------


def judge(captions: Sequence[str], truths: Sequence[Concepts]) -> dict[str, Floats]:
    """What the lexicon says of each caption, 1 or 0 [n]; NaN where the question does not arise.

    type_right: a form of the product's kind is named. type_wrong: a kind is named and none of the
    named is right. colour_said, gender_said: one is, of a product that is known to have one.
    colour_right, gender_right: of those that say one, all that are said are the product's (a colour
    by its family). contradiction: a kind, colour or gender that the product has not.
    """
    lexicon = corpora.lexicon()
    figures: dict[str, list[float]] = {name: [] for name in CONTENT}
    for caption, truth in zip(captions, truths, strict=True):
        mentions = lexicon.mentions(corpora.normalise(caption))
        kinds = [m for m in mentions if m.types and not (m.colours & truth.colours)]
        named = any(m.types & truth.head for m in kinds)
        # a word that names a kind of this product ("lemon", "orange") is no colour
        colours = [m for m in mentions if m.colours and not m.types & truth.head]
        genders = [m for m in mentions if m.genders]
        wrong = bool(kinds) and not named
        colour_right = all(m.colours & truth.colours for m in colours)
        gender_right = all(m.genders & truth.genders for m in genders)
        contradiction = (
            wrong
            or bool(truth.colours and not colour_right)
            or bool(truth.genders and not gender_right)
        )
        for name, value, applies in (
            ("type_right", named, True),
            ("type_wrong", wrong, True),
            ("colour_said", bool(colours), bool(truth.colours)),
            ("colour_right", colour_right, bool(truth.colours and colours)),
            ("gender_said", bool(genders), bool(truth.genders)),
            ("gender_right", gender_right, bool(truth.genders and genders)),
            ("contradiction", contradiction, True),
        ):
            figures[name].append(float(value) if applies else math.nan)
    return {name: np.array(values, float) for name, values in figures.items()}


CONTENT = (
    "type_right", "type_wrong", "colour_said", "colour_right", "gender_said", "gender_right",
    "contradiction",
)  # fmt: skip


def content(captions: Sequence[str], truths: Sequence[Concepts]) -> dict[str, Interval]:
    """Shares of the captions of which each judgement of `judge` is true."""
    return {name: bootstrap(values) for name, values in judge(captions, truths).items()}


# --- diversity and novelty ----------------------------------------------------------------------


def _words(text: str) -> list[str]:
    words = (word.strip(".,!?;:'\"-") for word in corpora.normalise(text).split())
    return [word for word in words if word]


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(sentences: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams (Li et al., NAACL 2016); compare at equal numbers only."""
    grams = [gram for text in sentences for gram in _grams(corpora.normalise(text).split(), n)]
    return len(set(grams)) / max(1, len(grams))


def vocabulary_size(sentences: Sequence[str]) -> float:
    """Different words; compare at equal numbers only."""
    return float(len({word for text in sentences for word in _words(text)}))


def self_bleu(sentences: Sequence[str], n: int = 4) -> float:
    """Mean BLEU-n of each sentence with all others as its references: 1 when all are the same.

    Texygen (Zhu et al., SIGIR 2018). A count of zero becomes .1, smoothing 1 of Chen & Cherry (WMT
    2014), as in nltk's method1. Compare at equal numbers only. Raises ValueError below two.
    """
    if len(sentences) < 2:
        raise ValueError(f"self-BLEU of {len(sentences)} sentences: give two or more")
    texts = [corpora.normalise(text).split() for text in sentences]
    logs = np.zeros(len(texts))
    for order in range(1, n + 1):
        counts = [Counter(_grams(words, order)) for words in texts]
        first: dict[tuple[str, ...], tuple[int, int]] = {}  # the largest count, and whose it is
        second: dict[tuple[str, ...], int] = {}  # the largest count of the others
        for index, counter in enumerate(counts):
            for gram, count in counter.items():
                best = first.get(gram, (0, -1))
                if count > best[0]:
                    first[gram], second[gram] = (count, index), best[0]
                else:
                    second[gram] = max(second[gram], count)
        for index, counter in enumerate(counts):
            shared = sum(
                min(count, second[gram] if first[gram][1] == index else first[gram][0])
                for gram, count in counter.items()
            )
            logs[index] += math.log((shared or 0.1) / max(1, counter.total())) / n
    lengths = np.array([len(words) for words in texts])
    for index, length in enumerate(lengths):
        others = np.delete(lengths, index)
        near = others[np.lexsort((others, abs(others - length)))[0]]
        # the brevity penalty; a sentence of no words has a BLEU of 0
        logs[index] += min(0.0, 1 - near / length) if length else -math.inf
    return float(np.exp(logs).mean())


def relative(
    statistic: Callable[[Sequence[str]], float], captions: Sequence[Sequence[str]],
    real: Sequence[str], samples: int = 40, seed: int = 0,
) -> Interval:  # fmt: skip
    """A statistic of a whole set of captions over that of as many real sentences.

    captions: one set a seed, of which the mean is taken. Drawing sentences twice would spoil
    distinct-n, so the interval is 1.96 standard deviations over half-samples, which vary as much
    about the whole as the whole does about its population (Shao & Wu, Annals of Statistics 1989).
    """
    random = np.random.default_rng(seed)
    count = min(len(real), *map(len, captions))
    sets = [[group[i] for i in random.permutation(len(group))[:count]] for group in captions]
    people = [real[i] for i in random.permutation(len(real))[:count]]

    def figure(ours: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> float:
        below = statistic([people[i] for i in theirs])
        return float(np.mean([statistic([group[i] for i in ours]) / below for group in sets]))

    whole = figure(np.arange(count), np.arange(count))
    half = count // 2
    halves = [
        figure(random.permutation(count)[:half], random.permutation(count)[:half])
        for _ in range(samples if half > 1 else 0)
    ]
    margin = 1.96 * float(np.std(halves)) if halves else math.nan
    return Interval(whole, whole - margin, whole + margin)


def sentence_hashes(training: Iterable[str]) -> frozenset[int]:
    """What `is_novel` compares with: training sentences with their topic hidden."""
    return frozenset(corpora.sentence_hash(text) for text in training)


def is_novel(sentences: Sequence[str], training: Collection[int]) -> npt.NDArray[np.bool_]:
    """Which are no training sentence, with topic words hidden on both sides [n]."""
    return np.array([corpora.sentence_hash(text) not in training for text in sentences], bool)


def novelty(sentences: Sequence[str], training: Iterable[str]) -> float:
    """Share that are no training sentence, with topic words hidden on both sides."""
    return float(is_novel(sentences, sentence_hashes(training)).mean())


def word_grams(training: Iterable[str], n: int = 8) -> frozenset[tuple[str, ...]]:
    """What `is_copied` compares with: all n words in a row of the training text."""
    return frozenset(gram for text in training for gram in _grams(_bare(text), n))


def is_copied(
    sentences: Sequence[str], training: Collection[tuple[str, ...]], n: int = 8
) -> npt.NDArray[np.bool_]:
    """Which hold n words in a row of one training sentence [n]."""
    return np.array([any(g in training for g in _grams(_bare(t), n)) for t in sentences], bool)


def copied(sentences: Sequence[str], training: Iterable[str], n: int = 8) -> float:
    """Share of sentences that hold n words in a row of one training sentence."""
    return float(is_copied(sentences, word_grams(training, n), n).mean())


def _bare(text: str) -> list[str]:
    return corpora.normalise(text).strip(".!?").split()


def words_of(texts: Iterable[str]) -> frozenset[str]:
    """What `count_invented` compares with: all words of the texts."""
    return frozenset(word for text in texts for word in _words(text))


def count_invented(sentences: Sequence[str], known: Collection[str]) -> Floats:
    """Words that are not among the known, and words in all, of each sentence [n, 2]."""
    counts = [(sum(word not in known for word in w), len(w)) for w in map(_words, sentences)]
    return np.array(counts, float).reshape(-1, 2)


def invented_words(sentences: Sequence[str], vocabulary: Iterable[str]) -> float:
    """Share of words that occur nowhere in the texts of `vocabulary`."""
    invented, total = count_invented(sentences, words_of(vocabulary)).sum(axis=0)
    return float(invented / total)


# --- fluency ------------------------------------------------------------------------------------


def language_model(texts: Sequence[str], order: int = 3) -> Callable[[Sequence[str]], Floats]:
    """An n-gram language model of people's text; it gives (nats, tokens) of sentences [n, 2].

    Interpolated with Witten–Bell smoothing (nltk.lm), topic hidden, the end of a sentence counted.
    A word seen less than twice shares the probability of all such words evenly among them: a
    vocabulary that is left open must not make nonsense cheap. Raises ValueError without texts.
    """
    from nltk.lm import Vocabulary, WittenBellInterpolated
    from nltk.lm.preprocessing import pad_both_ends, padded_everygrams

    if not texts:
        raise ValueError("a language model of no sentences: give some that people wrote")

    def split(text: str) -> list[str]:
        return [piece for word in _hidden(text).split() for piece in _punctuation(word)]

    counts = Counter(word for text in texts for word in split(text))
    rare = sum(count < 2 for count in counts.values())
    vocabulary = Vocabulary(counts | {"<s>": len(texts), "</s>": len(texts)}, unk_cutoff=2)
    model = WittenBellInterpolated(order, vocabulary=vocabulary)
    model.fit([list(padded_everygrams(order, vocabulary.lookup(split(text)))) for text in texts])
    known: dict[tuple[str, ...], float] = {}

    def score(sentences: Sequence[str]) -> Floats:
        rows = []
        for text in sentences:
            words = list(pad_both_ends(vocabulary.lookup(split(text)), n=order))
            grams = _grams(words, order)[: len(words) - 2 * (order - 1) + 1]
            nats = 0.0
            for gram in grams:
                if gram not in known:
                    *context, word = gram
                    known[gram] = -math.log(2) * model.logscore(word, context)
                    known[gram] += math.log(max(1, rare)) * (word == "<UNK>")
                nats += known[gram]
            rows.append((nats, len(grams)))
        return np.array(rows, float).reshape(-1, 2)

    return score


def _punctuation(word: str) -> list[str]:
    bare = word.rstrip(".,!?;")
    return [piece for piece in (bare, word[len(bare) :]) if piece]


def perplexity_ratio(
    captions: Floats, real: Floats, samples: int = 1000, seed: int = 0
) -> Interval:
    """Perplexity of captions over that of real held-out text, under one language model.

    captions: (nats, tokens) [n, 2], or [n, k, 2] for k seeds; real: [m, 2]; both sides are
    resampled. Away from 1 is bad in both directions: above, the captions are clumsy; below, they
    are blander than people, or recited.
    """
    ours = captions.reshape(len(captions), -1, 2).sum(axis=1)

    def nats_per_token(table: Floats, stream: int) -> Floats:
        nats, tokens = (_resample(len(table), samples, [seed, stream]) @ table).T
        return np.asarray(nats / tokens)

    return _percentiles(np.exp(nats_per_token(ours, 0) - nats_per_token(real, 1)))


# --- style: human or machine --------------------------------------------------------------------

Detector = Callable[[list[str], Floats, list[str], int], Floats]
"""(sentences [n], which of them a machine wrote [n], others [m], seed) → scores of the others [m],
the higher the more like a machine's. Topics are hidden already."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What a detector thought of each sentence, each scored by a model that had not seen it.

    human, machine: scores [n]. Their folds [n] say which model scored them; scores of two models
    are on two scales and are never compared.
    """

    human: Floats
    machine: Floats
    human_folds: npt.NDArray[np.int64]
    machine_folds: npt.NDArray[np.int64]


def _hidden(text: str) -> str:
    return corpora.lexicon().hide(corpora.normalise(text))


def detect(
    human: Sequence[str], machine: Sequence[str], detector: Detector, folds: int = 5, seed: int = 0
) -> Detection:
    """Trains a fresh detector for each fold, and has it score the sentences that it has not seen.

    Raises ValueError unless both sides have the same number, one a fold at least.
    """
    count = len(human)
    if len(machine) != count or count < folds:
        raise ValueError(
            f"{count} human and {len(machine)} machine sentences in {folds} folds: give equal "
            "numbers, and no fewer than folds"
        )
    texts = [_hidden(text) for text in (*human, *machine)]
    labels = np.repeat([0.0, 1.0], count)
    random = np.random.default_rng(seed)
    fold = np.concatenate([random.permutation(count) % folds for _ in range(2)])
    scores = np.empty(2 * count)
    for number in range(folds):
        seen, unseen = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        scores[unseen] = detector(
            [texts[i] for i in seen], labels[seen], [texts[i] for i in unseen], seed
        )
    return Detection(scores[:count], scores[count:], fold[:count], fold[count:])


def _auc_samples(
    detectors: Sequence[Sequence[Detection]], samples: int, seed: int, stream: int
) -> Floats:
    """The largest AUC among detectors, each the mean over its seeds, in every resample [1 + S].

    AUC = P(a machine's sentence scores above a person's), a tie counting half, over the pairs that
    one model scored; with sentences drawn w times, a pair counts w · w' times. The same seed draws
    the same human sentences whatever the stream.
    """
    first = detectors[0][0]
    human = _resample(len(first.human), samples, [seed, 0])
    machine = _resample(len(first.machine), samples, [seed, stream])
    largest = np.full(1 + samples, -np.inf)
    for runs in detectors:
        aucs = []
        for run in runs:
            if (len(run.human), len(run.machine)) != (len(first.human), len(first.machine)):
                raise ValueError(
                    f"detections of {len(first.human)} and of {len(run.human)} human sentences: "
                    "compare those that judge the same"
                )
            wins, pairs = np.zeros(1 + samples), np.zeros(1 + samples)
            for number in np.unique(run.human_folds):
                people, ours = run.human_folds == number, run.machine_folds == number
                gap = run.machine[ours] - run.human[people][:, None]
                above = (gap > 0) + 0.5 * (gap == 0)
                wins += ((human[:, people] @ above) * machine[:, ours]).sum(axis=1)
                pairs += human[:, people].sum(axis=1) * machine[:, ours].sum(axis=1)
            aucs.append(wins / pairs)
        largest = np.maximum(largest, np.mean(aucs, axis=0))
    return largest


def auc(runs: Sequence[Detection], samples: int = 1000, seed: int = 0) -> Interval:
    """Area under a detector's ROC curve, the mean over seeds, bootstrapped over sentences.

    .5 cannot tell people's text from the machine's, 1 always can. runs: one a seed, about the same
    human sentences and the same products. Only pairs that one fold's model scored are compared:
    pooling folds biases the figure (Airola et al., Computational Statistics & Data Analysis 2011).
    The interval is of the sentences scored, not of those learned from, and so a little narrow: with
    people's text on both sides, n 350 or 700, it held .5 in 85 of 96 splits.
    """
    return worst_auc([runs], samples, seed)


def worst_auc(
    detectors: Sequence[Sequence[Detection]], samples: int = 1000, seed: int = 0
) -> Interval:
    """The AUC of whichever detector sees most, chosen anew in every bootstrap sample."""
    return _percentiles(_auc_samples(detectors, samples, seed, 1))


def auc_difference(
    first: Sequence[Sequence[Detection]], second: Sequence[Sequence[Detection]],
    samples: int = 1000, seed: int = 0,
) -> Interval:  # fmt: skip
    """Worst AUC of the first system minus that of the second; below 0, the first is harder to tell.

    first, second: the detections of each detector, one a seed. Both systems are judged against the
    same human sentences in the same order, which are resampled jointly; their captions are not.
    Raises ValueError where the numbers of human sentences differ.
    """
    if len(first[0][0].human) != len(second[0][0].human):
        raise ValueError(
            f"{len(first[0][0].human)} and {len(second[0][0].human)} human sentences: the two "
            "systems must be judged against the same"
        )
    return _percentiles(
        _auc_samples(first, samples, seed, 1) - _auc_samples(second, samples, seed, 2)
    )


def detector_auc(
    human: Sequence[str], machine: Sequence[str], detector: Detector, folds: int = 5, seed: int = 0
) -> Interval:
    """AUC of a fresh detector on two sets of sentences, cut to equal numbers at random."""
    count = min(len(human), len(machine))
    random = np.random.default_rng(seed)
    people, ours = (
        [group[i] for i in random.permutation(len(group))[:count]] for group in (human, machine)
    )
    return auc([detect(people, ours, detector, folds, seed)])


def _linear_detector(
    transform: Any, seen: Any, labels: Floats, unseen: Any, strength: float = 4.0
) -> Floats:
    """Scores of the unseen by logistic regression on what the transform makes of texts or vectors.

    strength: the inverse of the penalty on the weights."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(transform, LogisticRegression(C=strength, max_iter=2000))
    return np.asarray(model.fit(seen, labels).decision_function(unseen))


def word_detector(texts: list[str], labels: Floats, others: list[str], seed: int) -> Floats:
    """Logistic regression on words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[\w']+|[.,!?]", sublinear_tf=True)
    return _linear_detector(words, texts, labels, others)


def character_detector(texts: list[str], labels: Floats, others: list[str], seed: int) -> Floats:
    """Logistic regression on one to five characters in a row, within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True, min_df=2
    )
    return _linear_detector(characters, texts, labels, others)


@dataclass
class Encoder:
    """A pretrained bidirectional text encoder of transformers; it is never changed."""

    model: nn.Module
    tokenizer: Any
    device: str = "cpu"
    embedded: dict[str, Floats] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(cls, name: str, device: str = "cpu") -> Encoder:
        """From a directory or a hub's id. Raises FileNotFoundError when there is none."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no text encoder can be loaded from {name} ({str(error).splitlines()[0]}): give a "
                "directory with config.json, model.safetensors and tokenizer.json, or a hub id"
            ) from error
        return cls(model.to(device).eval(), tokenizer, device)

    def pool(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """The mean of a model's last hidden states over each text's tokens [B, H]."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
        ).to(self.device)
        hidden_BTH = model(**batch).last_hidden_state
        mask_BT1 = batch["attention_mask"][..., None].to(hidden_BTH.dtype)
        pooled: Tensor = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
        return pooled

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Floats:
        """Vectors [n, H] of texts; each text is computed once."""
        # by length, so that little is padded; then a text's vector depends on its batch by rounding
        new = sorted(set(texts) - set(self.embedded), key=lambda text: (len(text), text))
        for start in range(0, len(new), 64):
            vectors = self.pool(self.model, new[start : start + 64]).double().cpu().numpy()
            self.embedded.update(zip(new[start : start + 64], vectors, strict=True))
        return np.stack([self.embedded[text] for text in texts])


def embedding_detector(encoder: Encoder) -> Detector:
    """Logistic regression on the sentence vectors of a frozen encoder."""

    def detector(texts: list[str], labels: Floats, others: list[str], seed: int) -> Floats:
        from sklearn.preprocessing import StandardScaler

        vectors, unseen = encoder.embed(texts), encoder.embed(others)
        return _linear_detector(StandardScaler(), vectors, labels, unseen, 0.02)

    return detector


def fine_tuned_detector(
    encoder: Encoder, *, epochs: int = 3, rate: float = 5e-5, batch: int = 32
) -> Detector:
    """The whole encoder, trained further to tell human from machine.

    AdamW; the rate rises over the first tenth of the steps to `rate` and falls to 0. Raises
    FloatingPointError when the loss is not finite.
    """

    def detector(texts: list[str], labels: Floats, others: list[str], seed: int) -> Floats:
        devices = [encoder.device] if encoder.device != "cpu" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            model = copy.deepcopy(encoder.model).train()
            config: Any = model.config
            head = nn.Linear(config.hidden_size, 1).to(encoder.device)
            optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], rate)
            steps = epochs * math.ceil(len(texts) / batch)
            fast = Process(device=encoder.device).autocast()
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(10 * (step + 1), (steps - step) * 10 / 9) / steps
            )
            for _ in range(epochs):
                order = torch.randperm(len(texts)).tolist()
                for start in range(0, len(order), batch):
                    rows = order[start : start + batch]
                    with fast:
                        pooled_BH = encoder.pool(model, [texts[i] for i in rows])
                    logits_B = head(pooled_BH.float()).squeeze(1)
                    target_B = torch.tensor(labels[rows]).to(logits_B)
                    loss = nn.functional.binary_cross_entropy_with_logits(logits_B, target_B)
                    if not torch.isfinite(loss):
                        raise FloatingPointError(
                            f"the fine-tuned detector's loss is {loss.item()}: lower its rate, "
                            f"{rate:g}"
                        )
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
            model.eval()
            with torch.inference_mode():
                scores = [
                    head(encoder.pool(model, others[start : start + 64])).squeeze(1)
                    for start in range(0, len(others), 64)
                ]
        return torch.cat(scores).double().cpu().numpy()

    return detector


# --- style: colloquial or formal ----------------------------------------------------------------


def style_classifier(
    formal: Sequence[str], colloquial: Sequence[str], seed: int = 0
) -> Callable[[Sequence[str]], Floats]:
    """A classifier of style that gives the probability [n] that sentences are colloquial.

    Learned from real text of both styles, cut to equal numbers of different sentences, topic
    hidden: words and pairs of words, calibrated by Platt's sigmoid on sentences that each of five
    fits had not seen (scikit-learn). Raises ValueError with less than ten of a style.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    groups = [sorted({_hidden(text) for text in texts}) for texts in (formal, colloquial)]
    count = min(map(len, groups))
    if count < 10:
        raise ValueError(
            f"{len(groups[0])} different formal and {len(groups[1])} colloquial sentences with "
            "their topic hidden: give ten of each or more"
        )
    random = np.random.default_rng(seed)
    texts = [group[i] for group in groups for i in random.permutation(len(group))[:count]]
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[\w']+|[.,!?]", sublinear_tf=True)
    model = CalibratedClassifierCV(
        make_pipeline(words, LogisticRegression(C=4.0, max_iter=1000)), method="sigmoid", cv=5
    )
    model.fit(texts, np.repeat([0, 1], count))
    return lambda sentences: np.asarray(
        model.predict_proba([_hidden(text) for text in sentences])[:, 1]
    )


# --- formal captions ----------------------------------------------------------------------------


def formal_scores(candidates: Sequence[str], references: Sequence[str]) -> dict[str, Interval]:
    """BLEU-4 (0–1), ROUGE-L (0–1) and CIDEr-D (0–10) of descriptions, one reference each.

    BLEU: sacrebleu (Post, WMT 2018), of the corpus. ROUGE-L: F1 of rouge-score (Lin, 2004).
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    ours, theirs = (
        [" ".join(_words(text)) for text in texts] for texts in (candidates, references)
    )
    rouge = RougeScorer(["rougeL"])
    random = np.random.default_rng(0)
    rows = [np.arange(len(ours)), *random.integers(len(ours), size=(200, len(ours)))]
    bleu = [
        sacrebleu.corpus_bleu(
            [ours[i] for i in drawn], [[theirs[i] for i in drawn]], tokenize="none", force=True
        ).score
        for drawn in rows
    ]
    pairs = list(zip(theirs, ours, strict=True))
    return {
        "bleu_4": _percentiles(np.array(bleu) / 100),
        "rouge_l": bootstrap([rouge.score(*pair)["rougeL"].fmeasure for pair in pairs]),
        "cider_d": bootstrap(cider_d(candidates, references)),
    }


def cider_d(candidates: Sequence[str], references: Sequence[str], sigma: float = 6.0) -> Floats:
    """CIDEr-D of each candidate with its one reference [n], 0 to 10 (Vedantam et al., CVPR 2015).

    CIDEr-D = 10/4 · Σ_{n=1..4} exp(−(l_c − l_r)² / 2σ²) · min(g_c, g_r) · g_r / (‖g_c‖ ‖g_r‖)

    g: n-gram counts times log(number of references / references that have the n-gram); l: words.
    A sentence of less than four words has no 4-grams and cannot reach 10, even with itself.
    """
    ours, theirs = ([_words(text) for text in texts] for texts in (candidates, references))
    scores = np.zeros(len(ours))
    for n in range(1, 5):
        frequency = Counter(gram for words in theirs for gram in set(_grams(words, n)))

        def weigh(words: list[str], n: int = n, df: Counter[Any] = frequency) -> dict[Any, float]:
            return {
                gram: count * math.log(len(theirs) / max(1, df[gram]))
                for gram, count in Counter(_grams(words, n)).items()
            }

        for index, (candidate, reference) in enumerate(zip(ours, theirs, strict=True)):
            mine, truth = weigh(candidate), weigh(reference)
            norms = math.hypot(*mine.values()) * math.hypot(*truth.values())
            if norms:
                dot = sum(min(w, truth[g]) * truth[g] for g, w in mine.items() if g in truth)
                penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * sigma**2))
                scores[index] += 10 / 4 * penalty * dot / norms
    return scores
