from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stylegan import corpora
from stylegan.corpora import Product, PseudoPairs


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("I LOVE this “dress”!!!", "i love this dress!"),
        ("so soft ,and   warm", "so soft, and warm."),
        ("It’s cute &amp; comfy w/ jeans", "it's cute and comfy with jeans."),
        ("spring/summer staple -", "spring or summer staple."),
        ("", ""),
    ],
)
def test_normalise_gives_plain_lower_case_sentences(raw: str, expected: str) -> None:
    assert corpora.normalise(raw) == expected


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = corpora.normalise(text)
    assert corpora.normalise(corpora.normalise(once)) == corpora.normalise(once)
    assert once == once.lower() and once.isascii()


def test_printed_sentences_begin_with_capitals() -> None:
    assert corpora.sentence("so cute! love it") == "So cute! Love it."


@pytest.mark.parametrize("text", ["I love it.", "it's on my desk.", "we're fans.", "Im in love."])
def test_first_person_is_found(text: str) -> None:
    assert corpora.is_first_person(text)


@pytest.mark.parametrize(
    "text", ["So mild and sweet.", "A summery dress.", "Just us-style fun? no."]
)
def test_first_person_is_not_found_inside_words(text: str) -> None:
    assert corpora.is_first_person(text) == ("us-" in text)


@pytest.mark.parametrize(
    "text",
    [
        "Runs small so order a size up.",
        "Got so many compliments on it!",
        "Worth every dollar, $40.",
    ],
)
def test_a_shop_cannot_say(text: str) -> None:
    assert not corpora.is_sayable(text)


def test_embedded_corpus_is_what_it_should_be() -> None:
    lines = corpora.embedded_corpus()
    assert len(lines) >= 2000
    assert len({line.lower() for line in lines}) == len(lines)
    assert not [line for line in lines if corpora.is_first_person(line)]
    openings = [" ".join(line.lower().split()[:2]) for line in lines]
    assert max(map(openings.count, set(openings))) < 0.03 * len(lines)


def test_description_concepts_take_the_last_noun_as_head() -> None:
    concepts = corpora.lexicon().concepts("Nike Men Navy Blue Dress Shirt")
    assert "shirt" in concepts.head
    assert concepts.colours == {"blue"}
    assert concepts.genders == {"men"}


@pytest.mark.parametrize(
    ("caption", "description", "named", "contradicts"),
    [
        ("Such a soft black tee!", "Black t-shirt for men", True, False),
        ("Such a soft red tee!", "Black t-shirt for men", True, True),
        ("Such a soft tee!", "Black t-shirt for men", True, False),
        ("Such a soft dress!", "Black t-shirt for men", False, True),
        ("So soft and easy!", "Black t-shirt for men", False, False),
        ("These sneakers are fun.", "White casual shoes", True, False),
        ("Shoes any woman will love.", "White casual shoes for men", True, True),
        ("A navy shirt is always right.", "Blue shirt", True, False),
        ("A tank for warm days.", "Black t-shirt for men", False, True),
        ("A wallet for every day.", "Brown belt", False, True),
        ("Cold orange juice!", "Juice in an orange carton", True, False),
        ("A roomy bag.", "Black backpack", True, False),
        ("Top notch shirt.", "Blue shirt", True, False),
        ("Ripe orange, so juicy.", "Orange", True, False),
        ("Dresses up any table, what an apple.", "Royal gala apple", True, False),
        ("A shirt that is great with jeans or leggings.", "Blue shirt", True, False),
        ("This shirt is fun over your favourite shorts.", "Blue shirt", True, False),
        ("So cute with jeans.", "Blue shirt", False, True),
        ("This shirt and these jeans are so soft.", "Blue shirt", True, True),
        ("Shirt lovers will like this pair of jeans.", "Blue shirt", True, True),
        # a product that is only worn with itself is not named
        ("Cute with heels or boots.", "Brown heels.", False, True),
        ("These heels look great with boots.", "Brown heels.", True, False),
        ("Looks good with a linen belt.", "Brown belt.", False, False),
        ("In love with this belt!", "Brown belt.", True, False),
    ],
)
def test_verdict(caption: str, description: str, named: bool, contradicts: bool) -> None:
    lexicon = corpora.lexicon()
    assert lexicon.verdict(caption, lexicon.concepts(description)) == (named, contradicts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("These belt are so nice.", False),
        ("This digital watches is handy.", False),
        ("Easy to throw on, this sunglasses for fall!", False),
        ("These belt loops are neat.", True),
        ("This shoes, so light!", False),
        ("So soft and soft.", False),
        ("The shoes is fun.", False),
        ("This pair of shoes is fun.", True),
        ("The stitching on these jeans is neat.", True),
        ("These jeans are so neat.", True),
        ("This watch is handy and these straps are soft.", True),
        ("A dress, a tie, some socks.", True),
        ("It is the perfect jeans.", False),
        ("This is gorgeous flowy jeans.", False),
        ("It is the perfect pair of jeans.", True),
        ("This watch is a great!", False),
        ("This is a great, light dress.", True),
        ("It is a such a cute dress.", False),
        ("This is perfect handbag for fall.", False),
        ("This handbag is perfect.", True),
        ("It is great milk.", True),
        ("It's so cute with jeans.", True),
    ],
)
def test_well_formed(text: str, expected: bool) -> None:
    assert corpora.is_well_formed(text) == expected


def test_people_are_well_formed() -> None:
    """The rule costs little of what people write."""
    corpus = corpora.embedded_corpus()
    assert sum(map(corpora.is_well_formed, corpus)) > 0.97 * len(corpus)


def test_topic_is_hidden() -> None:
    hide = corpora.lexicon().hide
    assert hide("this navy dress is so soft.") == "this product is so soft."
    one, other = "This navy dress is so soft.", "this red skirt is so soft!"
    assert corpora.sentence_hash(one) == corpora.sentence_hash(other)
    assert corpora.sentence_hash(one) != corpora.sentence_hash("this navy dress is so stiff.")


def test_formal_description() -> None:
    assert corpora.formal_description("t-shirt", "navy blue", "men") == "Navy blue t-shirt for men."


def test_pseudo_pairs_agree_with_their_products() -> None:
    products = [
        Product(0, "Black watch for men.", ("Titan Men Black Watch",)),
        Product(1, "White watch for women."),
        Product(2, "Red dress for women."),
    ]
    sentences = [
        "this black watch is so sleek.",
        "such a pretty dress for summer.",
        "looks great with any watch you have.",
        "these jeans are the best thing ever.",
    ]
    pairs = PseudoPairs(products, {"colloquial": sentences})
    random = np.random.default_rng(0)
    drawn = [pairs.paired_example("colloquial", random) for _ in range(200)]
    # "with any watch" is an aside, and no product is a pair of jeans
    assert {example.text for example in drawn} <= {
        "this black watch is so sleek.", "such a pretty dress for summer.",
        "such a pretty watch for summer.",
    }  # fmt: skip
    for example in drawn:
        if "black watch" in example.text:
            assert example.description in {
                "Black watch for men.", "Titan Men Black Watch", "Men Black Watch",
            }  # fmt: skip
            assert example.image in {0, -1}
    assert any(example.image >= 0 for example in drawn)


def test_titles_are_varied_and_mean_the_same() -> None:
    """As another brand might have them; words that the sentence says stay."""
    brands = ("Arrow", "Checked"), ("Lee", "Slim"), ("Spykar", "Casual"), ("Turtle", "Solid")
    titles = [f"{brand} Men {line} Blue Shirts" for brand, line in brands]
    products = [Product(i, "Blue shirt for men.", (title,)) for i, title in enumerate(titles)]
    pairs = PseudoPairs(products, {"colloquial": ["this shirt is so soft."]})
    random, concepts = np.random.default_rng(0), corpora.lexicon().concepts
    drawn = Counter(pairs.renamed(titles[0], random, "so checked!") for _ in range(400))
    assert drawn[titles[0]] > 200 and len(drawn) > 8
    assert all(concepts(title) == concepts(titles[0]) for title in drawn)
    assert all("Checked" in title for title in drawn)
    assert any("Turtle" in title for title in drawn)
    long = "A shirt. It is made of cotton, and it has a collar, two pockets and a row of buttons."
    assert {pairs.renamed(long, random) for _ in range(20)} == {long}


def test_every_sentence_as_often_and_every_kind_as_frequent() -> None:
    dress, both = frozenset({"dress"}), frozenset({"dress", "watch"})
    chances = corpora.couple({dress: 30, both: 10}, {"dress": 300, "watch": 100})
    assert chances[dress].tolist() == [1.0]
    assert chances[both][0] < 0.05  # what can be said of a watch is needed for the watches
    chances = corpora.couple({dress: 10, both: 30}, {"dress": 10, "watch": 10})
    assert chances[both][0] == pytest.approx(1 / 3, abs=0.01)
    assert corpora.couple({}, {"dress": 1}) == {}


def test_a_colour_that_no_product_has_is_described_without_the_noun() -> None:
    pairs = PseudoPairs([Product(0, "Orange."), Product(1, "Black watch.")], {
        "colloquial": ["such a juicy orange.", "this red watch is so sleek."],
    })  # fmt: skip
    random = np.random.default_rng(0)
    drawn = {e.text: e.description for e in
             (pairs.paired_example("colloquial", random) for _ in range(60))}  # fmt: skip
    assert drawn == {
        "such a juicy orange.": "Orange.", "this red watch is so sleek.": "Red watch.",
    }  # fmt: skip
    assert not corpora.lexicon().is_many("asparagus") and corpora.lexicon().is_many("jeans")


def test_praise_is_said_of_others_but_not_what_belongs_to_its_own() -> None:
    products = [
        Product(0, "Black watch."), Product(1, "Red dress."), Product(2, "Green sandals."),
        Product(3, "Blue jeans."), Product(4, "White t-shirt."),
    ]  # fmt: skip
    pairs = PseudoPairs(products, {"colloquial": [
        "this dress is gorgeous with jeans.", "the flowy skirt of this dress is so soft.",
        "such soft sleeves, what a dress!",
    ]})  # fmt: skip
    targets = {pair.text: pair.targets for pair in pairs.paired["colloquial"]}
    # what is worn with it is not what it is; a skirt beside the dress may be the subject too
    assert targets["this dress is gorgeous with jeans."] == {"dress", "watch", "sandals", "t-shirt"}
    assert targets["such soft sleeves, what a dress!"] == {"dress", "t-shirt"}
    assert "the flowy skirt of this dress is so soft." not in targets
    random = np.random.default_rng(0)
    said = {pairs.paired_example("colloquial", random).text for _ in range(200)}
    assert "these sandals are gorgeous with jeans." in said
    assert "this watch is gorgeous with jeans." in said
    assert "such soft sleeves, what a t-shirt!" in said


def test_tokeniser_comes_back_with_the_text() -> None:
    tokenizer = corpora.train_tokenizer(corpora.embedded_corpus()[:400], 600)
    text = "brand-new ZÜRICH watch, 50% off"
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text.lower()
    assert tokenizer.token_to_id("<eos>") == 2
