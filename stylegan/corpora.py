"""Formal and colloquial text: one normaliser, the concepts a sentence mentions, pseudo-pairs.

A *concept* is something a caption can be right or wrong about: the kind of product, its colour,
whom it is for (`lexicon.toml`). Colloquial sentences belong to no image; one that says "this navy
dress" becomes a conditional example by pairing it with the description, and half of the time with
the image, of a training product that shares them (as in SemStyle, Mathews et al., CVPR 2018).
"""

from __future__ import annotations

import hashlib
import html
import re
import tomllib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_FIRST_PERSON = re.compile(
    r"\b(i|i'm|i've|i'd|i'll|im|ive|me|my|mine|myself|we|we're|we've|we'll|us|our|ours|ourselves)\b"
)
_QUOTES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": " - ", "…": "..."}
)


def normalise(text: str) -> str:
    """Lower-case text with plain punctuation, ending in . ! or ?; the form all models read.

    Real and generated sentences go through this same function, so that no difference of formatting
    tells them apart.
    """
    text = html.unescape(text).translate(_QUOTES)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    text = text.replace('"', "").replace("--", " - ").replace("&", " and ").replace("w/", "with ")
    text = re.sub(r"(?<=[a-z])\s*/\s*(?=[a-z])", " or ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([!?])[!?.]+", r"\1", text)  # !!! -> !
    text = re.sub(r"\.{2,}", "...", text)
    text = re.sub(r"\s+([,.!?;])", r"\1", text)
    text = re.sub(r"([,!?;])(?=[a-z])", r"\1 ", text)
    text = re.sub(r"(?<![\w'])'|'(?![\w'])", "", text)
    text = re.sub(r"(?<=[a-z])\.(?=[a-z]{2,})", ". ", text)
    text = text.strip(" -,;:'.") if not text.endswith("...") else text.strip(" -,;:'")
    if text and text[-1] not in ".!?":
        text += "."
    return text


def sentence(text: str) -> str:
    """The printed form: normalised, each sentence beginning with a capital letter."""
    text = normalise(text)
    text = re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    return re.sub(r"\bi\b", "I", text)


def is_first_person(text: str) -> bool:
    """Whether the sentence speaks of its speaker, as a customer's testimonial does."""
    return bool(_FIRST_PERSON.search(text.lower()))


def speaks_of_products(text: str) -> bool:
    """Whether a normalised sentence names a product, and does not speak of its speaker."""
    return not _FIRST_PERSON.search(text) and names_kind(text)


def is_sayable(text: str) -> bool:
    """Whether a shop could print the sentence under a picture.

    No first person, nothing about orders, prices, bodies or sizes, no digits; 3 to 22 words.
    """
    text = normalise(text)
    return (
        3 <= len(text.split()) <= 22
        and not _FIRST_PERSON.search(text)
        and not lexicon().unsayable.search(text)
    )


def finds_fault(text: str) -> bool:
    """Whether a sentence says what is wrong with a product, or takes something back."""
    words = lexicon()
    return bool(words.faultfinding.search(words.praise.sub("", normalise(text))))


def is_misplaced(text: str, concepts: Concepts) -> bool:
    """Whether a caption says of a product what only others have: of a watch, that it drapes, and
    of a lemon, that it is stylish, or cute with jeans."""
    words, text = lexicon(), normalise(text)
    if not concepts.head or concepts.head & words.clothes:
        return False
    if concepts.head <= words.food and (
        words.inedible_words.search(text)
        or any(m.types and not m.colours and not m.types & words.food for m in words.mentions(text))
    ):
        return True
    return bool(words.clothes_words.search(text))


_ONE = re.compile(
    r"\b(this|that|a|an|another|every)( (very|so|really|super|truly))?"
    r"( \w+(ing|ed|y|al|ic|ful|ous|ive|sh|e|d|k|t))?$"
)
# "it is the perfect jeans", but not "it is fun with jeans", "this is a pair of jeans"
_IS_ONE = re.compile(
    r"\b(this|it|that)('s| is)( (?!(of|for|with|to|on|in|and|over|pair)\b)\w+){0,4}$"
)
_MANY = re.compile(r"\b(these|those|many|few)( \w+)?$")
_OTHER = re.compile(r"\b(of|on|in|with|for|at|to|and)\b")
_ARTICLE = re.compile(
    r"\ba (?=[aeio]\w)(?!(one|once|eu)\w*\b)|\ba u[bglmnp](?!i[^mn])"
    r"|\ban (?![aeiou]|hour|hono|heir)"
)
# "these flats are lovely and has", "makes they feel"
_MANY_HAS = re.compile(
    r"\b(these|they|both)\b[^.!?]* (and|but|,) (has|is|was|looks|feels|fits|goes|comes|works)\b"
    r"|\b(makes?|made|lets?|on|of|for|with) they\b"
)
_PRAISE = (
    r"(great|perfect|beautiful|lovely|nice|cute|gorgeous|pretty|delightful|wonderful|amazing|soft|comfortable"
    r"|fantastic|stunning|adorable|versatile|flattering|fabulous)"
)
# "this milk is a great!", "a such a cute top"
_NO_NOUN = re.compile(rf"\b(a|an) (very |so |really |super )?{_PRAISE}(?=[.!?]|$)|\ba such a\b")
# "this is perfect handbag"
_NO_ARTICLE = re.compile(rf"\b(is|it's|that's) (very |so |really |super )?{_PRAISE}$")
_TWICE = re.compile(r"\b(\w{4,})( and| or| to)?( so| very| super)? \1\b")


def is_well_formed(text: str) -> bool:
    """Whether products agree in number with their articles and verbs, and no word is said twice.

    "These belt are nice.", "this shoes", "a shorts", "a elegant", "soft and soft", "is a great!",
    "is perfect bag" and "one-shirt" are not. It finds the commonest slips, no more; a pair of shoes
    is one, and so is what has a noun after it.
    """
    text = normalise(text)
    if any(slip.search(text) for slip in (_TWICE, _ARTICLE, _MANY_HAS, _NO_NOUN)):
        return False
    for mention in lexicon().mentions(text):
        if not mention.types:
            continue
        if mention.start and text[mention.start - 1] == "-":  # "the perfect one-t-shirt"
            return False
        before, after = text[: mention.start].rstrip(), text[mention.end :]
        singular = lexicon().is_singular(mention.form)
        # of food there is some: "it is great milk"
        bare = singular and _NO_ARTICLE.search(before) and not mention.types & lexicon().food
        if bare and re.match(r" (for|with|that|to|in|when|and)\b|[.,!?]|$", after):
            return False
        followed = re.match(r"( (is|are|has|have|was|looks?|feels?|makes?)\b|[.,!?]|$)", after)
        if singular is None or (singular and not followed):  # "these belt loops"
            continue
        # "the colours of this skirt are": the verb belongs to another noun
        verb = "" if _OTHER.search(before) else after
        if singular and (_MANY.search(before) or re.match(r" (are|have)\b", verb)):
            return False
        is_one = _ONE.search(before) or _IS_ONE.search(before)
        if not singular and (is_one or re.match(r" (is|has|looks|feels)\b", verb)):
            return False
    return True


def embedded_corpus() -> list[str]:
    """The project's own colloquial sentences, written for it (`colloquial.txt`)."""
    text = resources.files("stylegan").joinpath("colloquial.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


@dataclass(frozen=True, slots=True)
class Mention:
    """A concept word in a text: its place, and what it can mean."""

    start: int
    end: int
    form: str
    types: frozenset[str]
    colours: frozenset[str]
    genders: frozenset[str]


@dataclass(frozen=True, slots=True)
class Concepts:
    """What a description commits a caption to. An empty set: it says nothing of it.

    head: the kinds that its main noun can be, one of which a caption has to name. types: all kinds
    that it mentions.
    """

    head: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    colours: frozenset[str] = frozenset()
    genders: frozenset[str] = frozenset()

    def filled_from(self, other: Concepts) -> Concepts:
        """These concepts, with what they leave open taken from the other."""
        return Concepts(
            self.head or other.head,
            self.types or other.types,
            self.colours or other.colours,
            self.genders or other.genders,
        )


def _plurals(form: str) -> Iterator[str]:
    yield form
    if form.endswith(("ch", "sh", "x", "ss", "s")):
        if not form.endswith("s") or form.endswith("ss"):
            yield form + "es"
    elif re.search(r"[^aeiou]y$", form):
        yield form[:-1] + "ies"
    else:
        yield form + "s"


class Lexicon:
    """Finds the concepts that a text mentions. Built from `lexicon.toml`'s three tables."""

    def __init__(self, tables: dict[str, Any]) -> None:
        types: dict[str, set[str]] = {}
        self.own: dict[str, set[str]] = {}  # form → the kinds that it names exactly
        for kind, entry in tables["types"].items():
            own = [kind, *entry["forms"]]
            for form in own:
                for plural in _plurals(form):
                    self.own.setdefault(plural, set()).add(kind)
            for form in [*own, *entry.get("also", [])]:
                for plural in _plurals(form):
                    types.setdefault(plural, set()).add(kind)
        self.types = types

        def words(name: str, more: str = "") -> re.Pattern[str]:
            listed = "|".join(tables.get(name, []))
            return re.compile(rf"\b({listed})\b{more}" if listed else r"(?!)")

        self.unsayable = words("unsayable", r"|[\d$%#*@~/():]")
        self.garment_words = words("garment_words")
        self.specific_words = words("specific_words")
        self.clothes_words = words("clothes_words")
        self.food, self.inedible_words = frozenset(tables.get("food", [])), words("inedible_words")
        self.faultfinding, self.praise = words("faultfinding"), words("praise")
        self.praised = frozenset(tables.get("praised", []))
        self.wearable = frozenset(tables.get("wearable", []))
        self.groups = [frozenset(kinds) for kinds in tables.get("groups", {}).values()]
        self.clothes = frozenset(tables.get("clothes", [])).union(*self.groups)
        self.colours = self._invert(tables["colours"])
        self.genders = self._invert(tables["genders"])
        ignored = tables.get("ignore", [])
        forms = sorted({*types, *self.colours, *self.genders, *ignored}, key=len, reverse=True)
        # a form inside a hyphenated word counts ("v-neck tee"), inside a longer word it does not
        self._pattern = re.compile(r"(?<![\w'])(?:" + "|".join(map(re.escape, forms)) + r")(?!\w)")

    @staticmethod
    def _invert(table: dict[str, list[str]]) -> dict[str, set[str]]:
        inverse: dict[str, set[str]] = {}
        for concept, forms in table.items():
            for form in forms:
                inverse.setdefault(form, set()).add(concept)
        return inverse

    def mentions(self, text: str) -> list[Mention]:
        """Concept words of the text, in order, the longest form at each place."""
        nothing: frozenset[str] = frozenset()
        return [
            Mention(
                match.start(),
                match.end(),
                match[0],
                frozenset(self.types.get(match[0], nothing)),
                frozenset(self.colours.get(match[0], nothing)),
                frozenset(self.genders.get(match[0], nothing)),
            )
            for match in self._pattern.finditer(text.lower().replace("’", "'"))
            if match[0] in self.types or match[0] in self.colours or match[0] in self.genders
        ]

    def concepts(self, description: str) -> Concepts:
        """What a formal description says: its first sentence's last kind of product is its head."""
        first = description.split(". ")[0]
        mentions = self.mentions(first) or self.mentions(description)
        # "orange" beside another product is a colour, alone it is a fruit
        kinds = [mention for mention in mentions if mention.types and not mention.colours]
        kinds = kinds or [mention for mention in mentions if mention.types]
        head = kinds[-1] if kinds else None
        return Concepts(
            self._exact(head) if head else frozenset(),
            frozenset().union(*map(self._exact, kinds)),
            frozenset().union(*(m.colours for m in mentions if m is not head)),
            frozenset().union(*(m.genders for m in mentions)),
        )

    @staticmethod
    def is_many(form: str) -> bool:
        """Whether a form names many things ("watches", "jeans")."""
        return form.endswith("s") and not form.endswith(("ss", "us", "is"))

    def is_singular(self, form: str) -> bool | None:
        """Whether a form is one thing ("watch"), many ("watches", "jeans"); None: either."""
        if self.is_many(form):
            return False
        # "men's watch" and "sweet potato" have a plural among the forms; "jean" is half of "jeans"
        plurals = set(_plurals(form)) - {form}
        return True if plurals & set(self.types) else None

    def asides(self, text: str, mentions: Sequence[Mention]) -> list[Aside | None]:
        """How each mention of a kind stands beside the subject, None where it may be it.

        "this top is cute with jeans or leggings": jeans and leggings are worn with it. "for any
        dress": no more than an aside either, but none that says what goes with the subject.
        """
        found: list[Aside | None] = []
        last: Mention | None = None
        for mention in mentions:
            aside: Aside | None = None
            if mention.types:
                before = _BESIDE.search(text[: mention.start])
                if before:
                    aside = _HOW.get(before[1], "other")
                elif last is not None and _CHAIN.fullmatch(text[last.end : mention.start]):
                    aside = found[-1]
                last = mention
            found.append(aside)
        return found

    def _exact(self, mention: Mention) -> frozenset[str]:
        """The kinds that a form names exactly, all that it may name when it is a loose word."""
        return frozenset(self.own.get(mention.form, mention.types))

    def verdict(self, caption: str, concepts: Concepts) -> tuple[bool, bool]:
        """(names the right kind, contradicts) for a caption and what its description says.

        Every concept word has to be compatible in one of its meanings; a colour, kind or gender
        of which the description says nothing is a contradiction too: it is invented. What the
        product can be worn with is none of them, once it is named.
        """
        named = not concepts.head
        contradicts = False
        mentions = self.mentions(caption)
        for mention, aside in zip(mentions, self.asides(caption, mentions), strict=True):
            allowed = False
            if mention.types:
                # "great with boots", of boots, is said of something else
                if aside not in ("beside", "over"):
                    named = named or bool(mention.types & concepts.head)
                allowed = bool(mention.types & concepts.types)
                allowed = allowed or (named and aside in ("beside", "over"))
            if mention.colours:
                allowed = allowed or bool(mention.colours & concepts.colours)
            if mention.genders:
                allowed = (
                    allowed or not concepts.genders or bool(mention.genders & concepts.genders)
                )
            contradicts = contradicts or not allowed
        return named, contradicts

    def hide(self, text: str) -> str:
        """The text with its topic hidden: kinds become "product", colour and gender words go."""
        pieces, end = [], 0
        for mention in self.mentions(text):
            pieces.append(text[end : mention.start])
            pieces.append("product" if mention.types else "")
            end = mention.end
        hidden = "".join([*pieces, text[end:]])
        hidden = re.sub(r"\b(product)( product)+\b", r"\1", re.sub(r"\s+", " ", hidden))
        return re.sub(r"\s+([,.!?])", r"\1", hidden).strip()


@cache
def lexicon() -> Lexicon:
    """The lexicon of this package."""
    text = resources.files("stylegan").joinpath("lexicon.toml").read_text(encoding="utf-8")
    return Lexicon(tomllib.loads(text))


def has_type(text: str, kind: str) -> bool:
    """Whether the text names this kind of product."""
    return any(kind in mention.types for mention in lexicon().mentions(text))


def names_kind(text: str) -> bool:
    """Whether the text names a product of any kind."""
    return any(mention.types for mention in lexicon().mentions(normalise(text)))


def colour_family(colour: str) -> str:
    """A family of a colour word ("navy blue" → "blue"), always the same; "" where it is none."""
    return min(lexicon().colours.get(colour.lower(), {""}))


def formal_description(kind: str, colour: str, gender: str) -> str:
    """A formal description from attributes: "Navy blue t-shirt for men."."""
    text = " ".join(part for part in (colour, kind) if part)
    return sentence(f"{text} for {gender}" if gender else text)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of lower-case text; entries 0, 1, 2 are <pad>, <bos>, <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Product:
    """A row of the training catalogue: what is known of one photograph.

    image: its row among the image features, -1 without a photograph. description: formal, what the
    describe road learns to write. titles: other formal texts that a rewrite may be asked to start
    from.
    """

    image: int
    description: str
    titles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: a target sentence, and what it is conditioned on ("" and -1: nothing)."""

    text: str
    style: str
    description: str = ""
    image: int = -1


@dataclass(frozen=True, slots=True)
class _Pair:
    """A sentence, the kinds of the catalogue that it names, what it says of the product, its noun,
    and all kinds that it can be said of."""

    text: str
    kinds: tuple[str, ...]
    said: Concepts
    main: Mention
    targets: frozenset[str]


def couple(
    sentences: Mapping[frozenset[str], int], kinds: Mapping[str, int]
) -> dict[frozenset[str], npt.NDArray[np.float64]]:
    """Of which kind a sentence is said: cumulative probabilities of its kinds, in sorted order.

    sentences: how many can be said of just these kinds. kinds: how frequent each is. Every sentence
    is said equally often, and every kind is spoken of as often as it is frequent, or as nearly as
    the sentences allow (Sinkhorn's iteration for the transport plan of the highest entropy).
    """
    sets = sorted(sentences, key=sorted)
    names = sorted(set().union(*sets))
    plan = np.array([[float(name in kinds_) for name in names] for kinds_ in sets])
    plan = plan.reshape(len(sets), len(names))
    weights = np.array([sentences[kinds_] for kinds_ in sets], float)
    wanted = np.array([kinds[name] for name in names], float)
    wanted *= weights.sum() / max(1.0, wanted.sum())
    for _ in range(200):
        plan *= wanted / np.maximum(plan.sum(0), 1e-12)
        plan *= (weights / np.maximum(plan.sum(1), 1e-12))[:, None]
    chances = {}
    for kinds_, row in zip(sets, plan, strict=True):
        share = row[[names.index(name) for name in sorted(kinds_)]]
        chances[kinds_] = np.cumsum(share / share.sum())
    return chances


def _said_of(pair: _Pair, kind: str) -> str:
    """The sentence with another kind in the place of its own; verbs and articles follow."""
    before: str | None = pair.text[: pair.main.start]
    after = pair.text[pair.main.end :]
    if lexicon().is_many(kind) and not lexicon().is_many(pair.main.form):
        before, after = _to_plural(pair.text[: pair.main.start], after)
    article = "an " if kind[0] in "aeiou" else "a "
    return re.sub(r"\b(a|an) $", article, before or "") + kind + after


def _to_plural(before: str, after: str) -> tuple[str | None, str]:
    """What stands before and after a noun, for a noun of many; None where that is not plain.

    "this … is so cute." → "these … are so cute."; "such a cute …!" → "such cute …!"
    """
    if re.search(r"\b(it|it's|its|one|that|which)\b", before + after):
        return None, after
    words = r"((?:[\w-]+,? ){0,3})$"
    if re.search(r"\bthis is (such )?(a|an) " + words, before):
        return re.sub(r"\bthis is (such )?(a|an) " + words, r"these are \1\3", before), after
    if re.search(r"\bthis " + words, before):
        verbs = {"is": "are", "has": "have", "looks": "look", "feels": "feel", "makes": "make",
                 "goes": "go", "fits": "fit", "works": "work"}  # fmt: skip
        verb = re.match(r" (\w+)", after)
        if verb and verb[1] in verbs:
            after = f" {verbs[verb[1]]}{after[verb.end() :]}"
        elif not re.match(r"[.,!]", after):
            return None, after
        return re.sub(r"\bthis " + words, r"these \1", before), after
    if not re.match(r"[.,!]| (for|to|with|and)\b", after):
        return None, after
    if re.search(r"(^|such |what )(a|an) " + words, before):
        return re.sub(r"\b(a|an) " + words, r"\2", before), after
    return (before if re.fullmatch(words, before) else None), after


Aside = Literal["beside", "over", "other"]
# "with your favourite jeans", but not "with this top", "of these jeans"
_BESIDE = re.compile(
    r"\b(with|over|under|underneath|beneath|like|than|to|for|your|any|some|other|without)"
    r" (?:(?!(?:this|these|the|it|its|it's|is|are)\b)[\w'-]+ ){0,3}$"
)
_HOW: Final[dict[str, Aside]] = {
    "with": "beside", "over": "over", "under": "over", "underneath": "over", "beneath": "over",
}  # fmt: skip
_CHAIN = re.compile(r"(,| and| or|, and|, or) (?:(?!(?:this|these|the|it)\b)[\w'-]+ ){0,2}")

SUPPORT_SHARE = 0.08  # of the pairs: support, about kinds that the voice speaks of itself
LONGEST_PRAISE = 16  # words of a sentence that is said of another kind
LONGEST_TITLE = 16  # words; what is longer describes the product in sentences


class PseudoPairs:
    """Turns colloquial sentences that belong to no image into conditional examples.

    products: the training catalogue. sentences: style → sentences, of which those are taken that a
    shop could print. support: more of them, of a style, about products that the voice is silent of.
    written: examples of a style that are no people's, with what they were written for; so large a
    share of the examples they are. people: of each style, what is in the first person left out, all
    sentences that name a product, whether a shop could print them or not.

    A sentence can be said of the kinds that it names, and its praise of others ("this dress is
    gorgeous" of a watch). Which it is said of is drawn so that every sentence is drawn equally
    often, and every kind as often as the catalogue has it, as far as that goes (`couple`). A model
    that learned only what is short and general of some kinds would be told from people by that.
    """

    def __init__(
        self, products: Sequence[Product], sentences: dict[str, list[str]],
        support: dict[str, list[str]] | None = None,
        written: Mapping[str, Sequence[Example]] | None = None, written_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.products = products
        self.concepts = [lexicon().concepts(product.description) for product in products]
        self.written = {style: list(rows) for style, rows in (written or {}).items() if rows}
        self.written_share = written_share
        self._worth: dict[str, npt.NDArray[np.float64]] = {}
        self.people: dict[str, list[str]] = {}
        by_kind: dict[str, list[int]] = defaultdict(list)
        for index, concepts in enumerate(self.concepts):
            for kind in concepts.head:
                by_kind[kind].append(index)
        self.by_kind = dict(by_kind)
        titles = sorted({title for product in products for title in product.titles})
        words = [w for t in titles if len(t.split()) <= LONGEST_TITLE for w in t.split()]
        meaning = {word for word in set(words) if lexicon().mentions(word)}
        self._names = [word for word in words if word not in meaning]
        self.plain: dict[str, list[str]] = {}  # nothing known: learned without a condition
        self.paired: dict[str, list[_Pair]] = {}
        self.supported: dict[str, list[_Pair]] = {}
        self._chances: dict[str, dict[frozenset[str], npt.NDArray[np.float64]]] = {}
        self._spoken: dict[str, tuple[list[str], npt.NDArray[np.float64]]] = {}
        self._silent: dict[str, tuple[float, list[_Pair]]] = {}
        for style, texts in sentences.items():
            normalised = [normalise(text) for text in texts]
            usable = [text for text in normalised if is_sayable(text)]
            self.people[style] = [text for text in normalised if speaks_of_products(text)]
            more = [normalise(t) for t in (support or {}).get(style, []) if is_sayable(t)]
            self.plain[style] = usable
            self.paired[style] = [pair for pair in map(self.pair, usable) if pair is not None]
            self.supported[style] = [pair for pair in map(self.pair, more) if pair is not None]
            self._chances[style] = couple(
                Counter(pair.targets for pair in self.paired[style]),
                {kind: len(members) for kind, members in self.by_kind.items()},
            )
            spoken = sorted({k for targets in self._chances[style] for k in targets})
            kinds = spoken or sorted(self.by_kind)
            counts = np.array([len(self.by_kind[kind]) for kind in kinds], float)
            self._spoken[style] = kinds, counts / counts.sum()
            silent = [p for p in self.supported[style] if not set(p.kinds) & set(spoken)]
            unspoken = {kind for pair in silent for kind in pair.kinds}
            members = sum(len(self.by_kind[kind]) for kind in unspoken)
            self._silent[style] = members / max(1.0, members + counts.sum()), silent

    def pair(self, text: str) -> _Pair | None:
        """The sentence with the kinds it can be about; None when it names none, or two."""
        mentions = lexicon().mentions(text)
        asides = lexicon().asides(text, mentions)
        main: Mention | None = None
        worn_with: frozenset[str] = frozenset()
        for mention, aside in zip(mentions, asides, strict=True):
            if not mention.types or (mention.colours and mention is not mentions[-1]):
                continue
            if aside in ("beside", "over"):
                worn_with |= mention.types
            elif main is None and aside is None:
                main = mention
            elif main is None or not mention.types & main.types:
                return None
        if main is None:
            return None
        available = tuple(sorted(kind for kind in main.types if kind in self.by_kind))
        if not available:
            return None
        colours = frozenset().union(*(m.colours for m in mentions if m is not main))
        genders = frozenset().union(*(m.genders for m in mentions))
        concepts = Concepts(main.types, main.types, colours, genders)
        others = self._others(text, available, main, "over" in asides) - worn_with
        return _Pair(text, available, concepts, main, frozenset(available) | others)

    def _others(
        self, text: str, kinds: Sequence[str], main: Mention, is_layered: bool
    ) -> frozenset[str]:
        """The kinds that the sentence does not name, and can be said of all the same."""
        words, others = lexicon(), set[str]()
        if is_layered or words.garment_words.search(text):  # only what is worn in the same place
            if not words.specific_words.search(text):
                for group in words.groups:
                    others |= group if set(kinds) & group else set()
        elif set(kinds) & words.praised and len(text.split()) <= LONGEST_PRAISE:
            others |= words.wearable
        many = _to_plural(text[: main.start], text[main.end :])[0] is not None
        from_many = words.is_many(main.form)
        return frozenset(
            kind
            for kind in others
            if kind in self.by_kind
            and (from_many or many if words.is_many(kind) else not from_many)
        )

    def paired_example(
        self, style: str, random: np.random.Generator, silent: float | None = None
    ) -> Example:
        """A sentence, the description of a product with its concepts, perhaps the photograph.

        silent: share of examples about kinds that the voice is silent of, all else people's; None:
        as frequent as those kinds are, and some support beside.
        """
        if style in self.written and silent is None:
            if random.random() < self.written_share:
                worth, rows = self._worth.get(style), self.written[style]
                if worth is None:
                    row = rows[random.integers(len(rows))]
                else:
                    number = np.searchsorted(worth, random.random() * worth[-1], side="right")
                    row = rows[int(number)]
                return replace(row, description=self.renamed(row.description, random, row.text))
            # a teacher writes about what the voice is silent of, and less is told from it by that
            silent = 0.0
        pairs, (share, unspoken) = self.paired[style], self._silent[style]
        supported = self.supported[style]
        often = SUPPORT_SHARE if silent is None else 0.0
        share = share if silent is None else silent
        chance = random.random()
        if unspoken and chance < share:
            pairs = unspoken
        elif supported and (not pairs or chance < share * bool(unspoken) + often):
            pairs = supported
        pair = pairs[random.integers(len(pairs))]
        if pairs is self.paired[style]:
            kinds = sorted(pair.targets)
            chances = self._chances[style][pair.targets]
            kind = kinds[int(np.searchsorted(chances, random.random(), side="right"))]
            text = pair.text if kind in pair.kinds else _said_of(pair, kind)
        else:
            text, kind = pair.text, pair.kinds[random.integers(len(pair.kinds))]
        said, members = pair.said, self.by_kind[kind]
        for _ in range(30):
            index = members[random.integers(len(members))]
            concepts = self.concepts[index]
            if said.colours and not (said.colours & concepts.colours):
                continue
            if said.genders and concepts.genders and not (said.genders & concepts.genders):
                continue
            product = self.products[index]
            description = self._formal(index, random)
            if said.colours and not lexicon().concepts(description).colours & said.colours:
                description = product.description
            return Example(text, style, description, product.image if random.random() < 0.5 else -1)
        # no product has this colour: the concepts themselves are the description
        mentions = lexicon().mentions(text)
        words = sorted({m.form for m in mentions if m.colours and not m.types & said.types})
        return Example(text, style, formal_description(kind, " ".join(words), ""))

    def weigh(self, style: str, weights: npt.ArrayLike) -> None:
        """How often each of the written examples of a style is drawn, compared with the others."""
        self._worth[style] = np.cumsum(np.asarray(weights, float))

    def condition(
        self, style: str, random: np.random.Generator, is_any: bool | None = None
    ) -> tuple[Example, Concepts]:
        """A product to write about, without a text, and what a caption may say of it.

        is_any: of any kind, else of one that the voice can speak of, as frequent as in the
        catalogue; None: of any where there are written examples of the style. There always is a
        description, as a captioner first describes an image that has none; the image is given 17
        times in 20.
        """
        kinds, shares = self._spoken[style]
        members = self.by_kind[kinds[random.choice(len(kinds), p=shares)]]
        index = members[random.integers(len(members))]
        if is_any or (is_any is None and style in self.written):
            index = int(random.integers(len(self.products)))
        description = self._formal(index, random)
        image = self.products[index].image if random.random() < 0.85 else -1
        said = lexicon().concepts(description)
        return Example("", style, description, image), said.filled_from(self.concepts[index])

    def _formal(self, index: int, random: np.random.Generator) -> str:
        """A product's description, or one of its titles."""
        product = self.products[index]
        formal = (product.description, *product.titles)
        number = int(random.integers(len(formal)))
        if not number:
            return product.description
        title = self.renamed(formal[number], random)
        if not lexicon().concepts(title).head & self.concepts[index].head:
            return product.description  # a title that does not name the kind
        return title

    def renamed(self, title: str, random: np.random.Generator, text: str = "") -> str:
        """Half the time, a title as it might be of another brand.

        Of the words that say nothing of kind, colour or gender, nor are said by the text, a quarter
        is left out and a quarter is other titles'. Otherwise a model knows the few titles that it
        has learned by heart, and what it says of others makes less sense.
        """
        if not self._names or random.random() < 0.5 or len(title.split()) > LONGEST_TITLE:
            return title
        mentions = lexicon().mentions(title)
        said = {word[:5] for word in re.findall(r"[\w'-]+", normalise(text))}
        words = []
        for match in re.finditer(r"\S+", title):
            chance, word = random.random(), match[0]
            if (
                chance < 0.5 or word.lower()[:5] in said
                or any(m.start < match.end() and match.start() < m.end for m in mentions)
            ):  # fmt: skip
                words.append(word)
            elif chance < 0.75:
                words.append(self._names[random.integers(len(self._names))])
        other = " ".join(words)
        # two words may come together that mean something ("flip", "flops")
        return other if lexicon().concepts(other) == lexicon().concepts(title) else title

    def plain_example(self, style: str, random: np.random.Generator) -> Example:
        """A sentence of the style without a condition."""
        texts = self.plain[style]
        return Example(texts[random.integers(len(texts))], style)

    def described_example(self, random: np.random.Generator) -> Example:
        """A photograph and its formal description, kinds evened out by the square root."""
        if not hasattr(self, "_photographed"):
            self._photographed = np.array(
                [i for i, product in enumerate(self.products) if product.image >= 0]
            )
        index = self._photographed[random.integers(len(self._photographed))]
        product = self.products[index]
        return Example(normalise(product.description), "formal", "", product.image)


def sentence_hash(text: str) -> int:
    """A 63-bit number of the sentence with its topic hidden: "this navy dress is so soft." and
    "this red skirt is so soft." have the same one."""
    hidden = re.sub(r"[^a-z' ]", "", lexicon().hide(normalise(text)))
    return text_number(" ".join(hidden.split()))


def words_of(text: str) -> set[str]:
    """The words of a text."""
    return set(re.findall(r"[a-z']+", normalise(text)))


def word_hashes(text: str) -> set[int]:
    """63-bit numbers of the words of a text."""
    return set(map(text_number, words_of(text)))


def text_number(text: str) -> int:
    """63 bits that stand for a text, so that it need not be kept."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
