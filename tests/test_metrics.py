"""The measure: closed forms, and that every column fails where it should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stylegan import corpora, metrics
from stylegan.metrics import Detection, Encoder, Floats

PEOPLE = [corpora.sentence(text) for text in corpora.embedded_corpus()]
ONE, OTHER = PEOPLE[0:800:2], PEOPLE[1:800:2]  # neighbours are about the same kinds of products


def shuffled(sentences: list[str]) -> list[str]:
    """The words of each sentence in random order."""
    random = np.random.default_rng(0)
    bare = [corpora.normalise(text).rstrip(".!?").split() for text in sentences]
    return [corpora.sentence(" ".join(random.permutation(words))) for words in bare]


def write_tiny_encoder(directory: Path, sentences: list[str]) -> Path:
    """Saves a BERT of random weights with a WordPiece vocabulary of these sentences."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(directory)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    directory = write_tiny_encoder(tmp_path_factory.mktemp("encoder"), PEOPLE[:500])
    return Encoder.from_pretrained(str(directory))


# --- intervals ----------------------------------------------------------------------------------


def test_bootstrap_holds_the_mean() -> None:
    interval = metrics.bootstrap([0.0, 1.0] * 100)
    assert interval.low < interval.mean == 0.5 < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.15)
    assert metrics.bootstrap([1.0] * 9).low == 1
    assert math.isnan(metrics.bootstrap([]).mean)


def test_captions_of_one_product_are_not_independent() -> None:
    """Three seeds that all say the same narrow nothing; three that differ do."""
    random = np.random.default_rng(0)
    once = random.normal(size=(400, 1))
    width = {}
    for name, values in {"same": np.tile(once, 3), "differ": random.normal(size=(400, 3))}.items():
        interval = metrics.bootstrap(values)
        width[name] = interval.high - interval.low
    assert width["same"] == pytest.approx(2 * 1.96 / 400**0.5, rel=0.15)
    assert width["differ"] == pytest.approx(2 * 1.96 / 1200**0.5, rel=0.15)


def test_what_does_not_apply_counts_for_nothing() -> None:
    assert metrics.bootstrap([1.0, math.nan, 0.0, math.nan]).mean == 0.5
    assert math.isnan(metrics.bootstrap([math.nan]).mean)
    assert metrics.bootstrap([1.0, 3.0], sizes=[10, 10]).mean == 0.2


def detection(human: Floats, machine: Floats) -> Detection:
    return Detection(human, machine, np.zeros(len(human), int), np.zeros(len(machine), int))


def test_auc_is_the_share_of_pairs_in_order() -> None:
    zero, one = np.zeros(30), np.ones(30)
    assert metrics.auc([detection(zero, one)]) == metrics.Interval(1, 1, 1)
    assert metrics.auc([detection(zero, zero)]).mean == 0.5
    assert metrics.auc([detection(one, zero)]).mean == 0
    assert metrics.auc([detection(zero, one), detection(zero, zero)]).mean == 0.75
    mixed = detection(np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    assert metrics.auc([mixed]).mean == 0.75


def test_auc_interval_is_that_of_hanley_and_mcneil() -> None:
    """Radiology 1982: the standard error of an AUC of n + m scores."""
    random = np.random.default_rng(1)
    count = 300
    found = metrics.auc([detection(random.normal(size=count), random.normal(1, size=count))])
    area = found.mean
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (count - 1) * (q1 + q2 - 2 * area**2)) / count**2
    assert found.high - found.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.15)


def test_scores_of_two_folds_are_never_compared() -> None:
    """The second fold's model has another scale."""
    folds = np.repeat([0, 1], 20)
    human, machine = np.where(folds, 10.0, 0.0), np.where(folds, 11.0, 1.0)
    assert metrics.auc([Detection(human, machine, folds, folds)]).mean == 1


def test_the_worst_detector_counts() -> None:
    zero, one = np.zeros(30), np.ones(30)
    blind, sharp = [detection(zero, zero)], [detection(zero, one)]
    assert metrics.worst_auc([blind, sharp]).mean == 1
    assert metrics.auc_difference([blind, blind], [blind, sharp]).mean == -0.5
    assert metrics.auc_difference([blind, sharp], [sharp, blind]) == metrics.Interval(0, 0, 0)


def test_a_difference_resamples_the_human_sentences_jointly() -> None:
    """Two systems whose captions say nothing of chance: all chance is in the people's sentences,
    and cancels. Against other sentences it is the sum of two variances."""
    random = np.random.default_rng(2)
    human = random.uniform(size=200)
    machine = np.full(200, 0.6)
    one, other = [[detection(human, machine)]], [[detection(human.copy(), machine)]]
    single = metrics.auc(one[0])
    assert single.high - single.low > 0.1
    assert metrics.auc_difference(one, other) == metrics.Interval(0, 0, 0)
    # the other way round nothing cancels: the width grows by the square root of two
    systems = [[[detection(np.full(200, 0.6), random.uniform(size=200))]] for _ in range(2)]
    found = metrics.auc_difference(systems[0], systems[1])
    expected = 2 * 1.96 * (2 * 0.25 / 200) ** 0.5
    assert found.high - found.low == pytest.approx(expected, rel=0.15)
    with pytest.raises(ValueError, match="judged against the same"):
        metrics.auc_difference(one, [[detection(human[:9], machine)]])


# --- content ------------------------------------------------------------------------------------


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


def test_gender_is_judged_where_it_is_known_and_said() -> None:
    truth = corpora.lexicon().concepts("Black watch for men")
    figures = metrics.content(["A watch for men.", "A watch for women.", "A watch."], [truth] * 3)
    assert figures["gender_said"].mean == pytest.approx(2 / 3)
    assert figures["gender_right"].mean == 0.5
    unknown = metrics.judge(["A watch for men."], [corpora.lexicon().concepts("Black watch")])
    assert math.isnan(unknown["gender_said"][0]) and unknown["contradiction"][0] == 0


def test_a_fruit_is_not_a_colour() -> None:
    truth = corpora.lexicon().concepts("Orange")
    assert metrics.content(["A juicy orange."], [truth])["contradiction"].mean == 0


# --- diversity and novelty ----------------------------------------------------------------------


def test_distinct_n() -> None:
    assert metrics.distinct_n(["a b c.", "a b d."], 2) == 3 / 4
    assert metrics.distinct_n(["one."], 2) == 0


def test_vocabulary_size() -> None:
    assert metrics.vocabulary_size(["So soft, so nice!", "Soft -"]) == 3


def test_self_bleu_is_that_of_nltk() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    texts = [corpora.normalise(text).split() for text in ONE[:40]]
    expected = [
        sentence_bleu(
            texts[:i] + texts[i + 1 :], words, smoothing_function=SmoothingFunction().method1
        )
        for i, words in enumerate(texts)
    ]
    assert metrics.self_bleu(ONE[:40]) == pytest.approx(np.mean(expected))
    assert metrics.self_bleu(["It is so very soft."] * 5) == pytest.approx(1)
    assert metrics.self_bleu(["It is so very soft."] * 4 + [""]) == pytest.approx(0.8)


def test_relative_to_real_text() -> None:
    """The interval of half-samples is that of the mean's standard error."""

    def mean_length(texts: list[str]) -> float:
        return float(np.mean([len(text) for text in texts]))

    random = np.random.default_rng(0)
    captions = ["x" * int(length) for length in random.integers(1, 40, size=500)]
    found = metrics.relative(mean_length, [captions], ["x" * 10] * 500, samples=300)
    error = np.std([len(text) for text in captions]) / 500**0.5 / 10
    assert found.mean == pytest.approx(mean_length(captions) / 10)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    # at equal n, however many real sentences there are
    assert metrics.relative(metrics.vocabulary_size, [ONE[:50]], PEOPLE[:800]).mean < 1.3


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


def test_retrieved_sentences_are_caught_by_novelty() -> None:
    """They pass every detector, for people wrote them."""
    assert metrics.detector_auc(ONE, OTHER, metrics.word_detector).mean < 0.6
    assert metrics.novelty(OTHER, PEOPLE) == 0
    assert metrics.copied([t for t in OTHER if len(t.split()) > 9], PEOPLE) == 1


# --- fluency ------------------------------------------------------------------------------------


def test_language_model_is_witten_bell() -> None:
    """Of N sentences that are all the same, each continuation is (N + P) / (N + 1) likely, P its
    share among the words and the two ends."""
    count = 7
    score = metrics.language_model(["cute, love."] * count, order=2)
    nats, tokens = score(["Cute, love."])[0]
    assert tokens == 5  # cute , love . and the end
    assert nats == pytest.approx(-5 * math.log((count + 1 / 6) / (count + 1)))
    with pytest.raises(ValueError, match="no sentences"):
        metrics.language_model([])


def test_perplexity_ratio() -> None:
    real = np.tile([[20.0, 10.0]], (50, 1))
    worse = np.tile([[25.0, 10.0]], (50, 1))
    assert metrics.perplexity_ratio(worse, real) == metrics.Interval(*[math.exp(0.5)] * 3)
    both = np.stack([worse, real], axis=1)  # two seeds
    assert metrics.perplexity_ratio(both, real).mean == pytest.approx(math.exp(0.25))


def test_nonsense_is_caught_by_perplexity() -> None:
    score = metrics.language_model(PEOPLE[800:])
    real = score(ONE)
    assert metrics.perplexity_ratio(score(OTHER), real).mean == pytest.approx(1, abs=0.15)
    assert metrics.perplexity_ratio(score(shuffled(OTHER)), real).low > 2
    invented = [text.replace("e", "ou") for text in OTHER]
    assert metrics.perplexity_ratio(score(invented), real).low > 2
    assert metrics.invented_words(invented, PEOPLE) > 0.3
    bland = ["This is so cute!"] * 100
    assert metrics.perplexity_ratio(score(bland), real).high < 0.7


# --- style --------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", [metrics.word_detector, metrics.character_detector])
def test_detectors_can_fail_and_succeed(detector: metrics.Detector) -> None:
    """People against people are not told apart; a template and shuffled words are."""
    floor = metrics.detector_auc(ONE, OTHER, detector)
    assert floor.mean == pytest.approx(0.5, abs=0.1)
    template = [f"Great product number {'abcdefghij'[i % 10]}, love it!" for i in range(400)]
    assert metrics.detector_auc(ONE, template, detector).low > 0.98
    assert metrics.detector_auc(ONE, shuffled(OTHER), detector).low > floor.high


def test_frozen_embeddings_tell_a_template(encoder: Encoder) -> None:
    detector = metrics.embedding_detector(encoder)
    assert metrics.detector_auc(ONE, OTHER, detector).mean == pytest.approx(0.5, abs=0.1)
    template = [f"Great {text.split()[-1]}, love it!" for text in OTHER]
    assert metrics.detector_auc(ONE, template, detector).low > 0.9


def test_a_vector_is_the_mean_over_a_texts_own_tokens(encoder: Encoder) -> None:
    alone = encoder.pool(encoder.model, ["so soft."])
    padded = encoder.pool(encoder.model, ["so soft.", "so soft and so very long that it pads."])
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-4)
    assert encoder.embed(["so soft."] * 3).shape == (3, 32)


def test_the_fine_tuned_detector_can_fail_and_succeed(encoder: Encoder) -> None:
    before = [weight.clone() for weight in encoder.model.parameters()]
    detector = metrics.fine_tuned_detector(encoder, epochs=2, rate=3e-3)  # weights are random yet
    # a topic cannot give a machine away: it is hidden
    swapped = [corpora.lexicon().hide(corpora.normalise(text)) for text in OTHER[:150]]
    swapped = [text.replace("product", "watch") for text in swapped]
    floor = metrics.detector_auc(ONE[:150], swapped, detector, folds=3)
    assert floor.low < 0.5 < floor.high
    template = [f"Great {text.split()[-1]}, love it!" for text in OTHER[:150]]
    assert metrics.detector_auc(ONE[:150], template, detector, folds=3).low > 0.9
    for weight, copy in zip(encoder.model.parameters(), before, strict=True):
        assert torch.equal(weight, copy)


def test_a_detection_depends_on_its_seed_alone(encoder: Encoder) -> None:
    detector = metrics.fine_tuned_detector(encoder, epochs=1, rate=1e-3)
    state = torch.random.get_rng_state()
    first = metrics.detect(ONE[:12], OTHER[:12], detector, folds=2, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    again = metrics.detect(ONE[:12], OTHER[:12], detector, folds=2, seed=3)
    np.testing.assert_array_equal(first.machine, again.machine)


def test_each_sentence_is_scored_by_a_model_that_has_not_seen_it() -> None:
    def memory(texts: list[str], labels: Floats, others: list[str], seed: int) -> Floats:
        known = dict(zip(texts, labels, strict=True))
        assert not set(others) & set(known)
        assert labels.mean() == 0.5
        return np.array([known.get(text, 0.5) for text in others])

    human, machine = ([f"{word} {'abcdefghijkl'[i]}" for i in range(12)] for word in ("so", "too"))
    assert metrics.auc([metrics.detect(human, machine, memory, folds=3)]).mean == 0.5
    with pytest.raises(ValueError, match="equal numbers"):
        metrics.detect(human, machine[:5], memory)


def test_an_encoder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a directory"):
        Encoder.from_pretrained(str(tmp_path))


def test_style_is_calibrated_on_real_text() -> None:
    kinds = ["shirt", "dress", "watch", "jeans", "belt", "cap"]
    makes = ["cotton", "printed", "striped", "casual", "formal", "sports", "woven", "solid"]
    formal = [
        f"{make} {other} {kind} for men" for make in makes for other in makes for kind in kinds
    ]
    style = metrics.style_classifier(formal[::2], PEOPLE[800:])
    assert style(OTHER).mean() > 0.9
    assert style(formal[1::2]).mean() < 0.2
    assert 0 <= style(["Striped cotton shirt, love it!"])[0] <= 1
    with pytest.raises(ValueError, match="ten of each"):
        metrics.style_classifier(["Blue shirt."] * 99, PEOPLE)


# --- formal captions ----------------------------------------------------------------------------


def test_formal_scores_of_the_references_themselves_are_the_largest() -> None:
    references = [f"{colour} checked shirt for {whom}." for colour in ("Red", "Blue", "Grey")
                  for whom in ("men", "women")]  # fmt: skip
    scores = metrics.formal_scores(references, references)
    assert scores["bleu_4"].mean == pytest.approx(1)
    assert scores["rouge_l"].mean == pytest.approx(1)
    assert scores["cider_d"].mean == pytest.approx(10)
    other = metrics.formal_scores(["A lamp."] * 6, references)
    assert [round(other[name].mean, 6) for name in ("bleu_4", "rouge_l", "cider_d")] == [0, 0, 0]


def test_cider_d_by_hand() -> None:
    """Two words of one reference of two; its 3- and 4-grams do not exist."""
    weight = math.log(2)  # each n-gram is in one of two references
    cosine = weight**2 / (math.sqrt(2) * weight * math.sqrt(2) * weight)  # one word of two shared
    found = metrics.cider_d(["red shirt", "blue jeans"], ["red dress", "blue jeans"])
    assert found == pytest.approx([10 / 4 * cosine, 10 / 4 * 2])
    longer = metrics.cider_d(["red dress x y z", ""], ["red dress", "blue jeans"])
    penalty = math.exp(-(3**2) / (2 * 6**2))
    words = math.sqrt(2) / math.sqrt(2 + 3)  # the three others weigh log(2 / 1) too
    pairs = 1 / math.sqrt(1 + 3)
    assert longer == pytest.approx([10 / 4 * penalty * (words + pairs), 0])
