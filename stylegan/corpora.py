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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
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


_ONE = re.compile(r"\b(this|that|a|an|another|every)( \w+(ing|ed|y|al|ic|e|d|k|t))?$")
_MANY = re.compile(r"\b(these|those|many|few)( \w+)?$")
_OTHER = re.compile(r"\b(of|on|in|with|for|at|to|and)\b")
_TWICE = re.compile(r"\b(\w{4,})( and| or| to)?( so| very| super)? \1\b")


def is_well_formed(text: str) -> bool:
    """Whether products agree in number with their articles and verbs, and no word is said twice.

    "These belt are nice.", "this shoes", "a shorts" and "soft and soft" are not. It finds the
    commonest slips, no more; a pair of shoes is one, and so is what has a noun after it.
    """
    text = normalise(text)
    if _TWICE.search(text):
        return False
    for mention in lexicon().mentions(text):
        if not mention.types:
            continue
        before, after = text[: mention.start].rstrip(), text[mention.end :]
        singular = lexicon().is_singular(mention.form)
        followed = re.match(r"( (is|are|has|have|was|looks?|feels?|makes?)\b|[.,!?]|$)", after)
        if singular is None or (singular and not followed):  # "these belt loops"
            continue
        # "the colours of this skirt are": the verb belongs to another noun
        verb = "" if _OTHER.search(before) else after
        if singular and (_MANY.search(before) or re.match(r" (are|have)\b", verb)):
            return False
        if not singular and (_ONE.search(before) or re.match(r" (is|has|looks|feels)\b", verb)):
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
        words = "|".join(tables.get("unsayable", []))
        self.unsayable = re.compile(rf"\b({words})\b|[\d$%#*@~/():]" if words else r"(?!)")
        words = "|".join(tables.get("garment_words", []))
        self.garment_words = re.compile(rf"\b({words})\b" if words else r"(?!)")
        words = "|".join(tables.get("specific_words", []))
        self.specific_words = re.compile(rf"\b({words})\b" if words else r"(?!)")
        self.praised = frozenset(tables.get("praised", []))
        self.wearable = frozenset(tables.get("wearable", []))
        self.groups = [frozenset(kinds) for kinds in tables.get("groups", {}).values()]
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

    def is_singular(self, form: str) -> bool | None:
        """Whether a form is one thing ("watch"), many ("watches", "jeans"); None: either."""
        if form.endswith("s") and not form.endswith(("ss", "us", "is")):
            return False
        # "men's watch" and "sweet potato" have a plural among the forms; "jean" is half of "jeans"
        plurals = set(_plurals(form)) - {form}
        return True if plurals & set(self.types) else None

    def _exact(self, mention: Mention) -> frozenset[str]:
        """The kinds that a form names exactly, all that it may name when it is a loose word."""
        return frozenset(self.own.get(mention.form, mention.types))

    def verdict(self, caption: str, concepts: Concepts) -> tuple[bool, bool]:
        """(names the right kind, contradicts) for a caption and what its description says.

        Every concept word has to be compatible in one of its meanings; a colour, kind or gender
        of which the description says nothing is a contradiction too: it is invented.
        """
        named = not concepts.head
        contradicts = False
        for mention in self.mentions(caption):
            allowed = False
            if mention.types:
                named = named or bool(mention.types & concepts.head)
                allowed = bool(mention.types & concepts.types)
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


_Pair = tuple[str, tuple[str, ...], Concepts, Mention]  # text, its kinds, what it says, its noun


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


_ASIDE = re.compile(r"\b(with|over|under|and|or|for|your|to|of|like|any|some|other)\s+(\w+\s+)?$")


SUPPORT_SHARE = 0.35  # of the pairs: sentences about what the voice itself is silent of
TRANSFER_SHARE = 0.55  # of the pairs: the praise of one product said of another


class PseudoPairs:
    """Turns colloquial sentences that belong to no image into conditional examples.

    products: the training catalogue. sentences: style → sentences, of which those are taken that a
    shop could print. support: more of them, of a style, about products that the voice is silent of.
    """

    def __init__(
        self, products: Sequence[Product], sentences: dict[str, list[str]],
        support: dict[str, list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.products = products
        self.concepts = [lexicon().concepts(product.description) for product in products]
        by_kind: dict[str, list[int]] = defaultdict(list)
        for index, concepts in enumerate(self.concepts):
            for kind in concepts.head:
                by_kind[kind].append(index)
        self.by_kind = dict(by_kind)
        self._kinds: list[str] = []
        self._shares = np.zeros(0)
        self.plain: dict[str, list[str]] = {}  # nothing known: learned without a condition
        self.paired: dict[str, list[_Pair]] = {}
        self.supported: dict[str, list[_Pair]] = {}
        for style, texts in sentences.items():
            usable = [text for text in map(normalise, texts) if is_sayable(text)]
            more = [normalise(t) for t in (support or {}).get(style, []) if is_sayable(t)]
            self.plain[style] = usable + more
            self.paired[style] = [pair for pair in map(self._pair, usable) if pair is not None]
            self.supported[style] = [pair for pair in map(self._pair, more) if pair is not None]

    def _pair(self, text: str) -> _Pair | None:
        """The sentence with the kinds it can be about; None when it names none, or two."""
        mentions = lexicon().mentions(text)
        kinds = [m for m in mentions if m.types and not (m.colours and m is not mentions[-1])]
        main = next((m for m in kinds if not _ASIDE.search(text[: m.start])), None)
        if main is None or any(not (m.types & main.types) for m in kinds):
            return None
        available = tuple(sorted(kind for kind in main.types if kind in self.by_kind))
        if not available:
            return None
        colours = frozenset().union(*(m.colours for m in mentions if m is not main))
        genders = frozenset().union(*(m.genders for m in mentions))
        return text, available, Concepts(main.types, main.types, colours, genders), main

    def paired_example(self, style: str, random: np.random.Generator) -> Example:
        """A sentence, the description of a product with its concepts, perhaps the photograph."""
        pairs = self.paired[style]
        if self.supported[style] and (not pairs or random.random() < SUPPORT_SHARE):
            pairs = self.supported[style]
        text, kinds, said, main = pairs[random.integers(len(pairs))]
        kind = kinds[random.integers(len(kinds))]
        if random.random() < TRANSFER_SHARE:
            text, kind = self._transferred(text, kind, main, random)
        members = self.by_kind[kind]
        for _ in range(30):
            index = members[random.integers(len(members))]
            concepts = self.concepts[index]
            if said.colours and not (said.colours & concepts.colours):
                continue
            if said.genders and concepts.genders and not (said.genders & concepts.genders):
                continue
            product = self.products[index]
            formal = (product.description, *product.titles)
            description = formal[random.integers(len(formal))]
            if not lexicon().concepts(description).head & self.concepts[index].head:
                description = product.description  # a title that does not name the kind
            if said.colours and not lexicon().concepts(description).colours & said.colours:
                description = product.description
            return Example(text, style, description, product.image if random.random() < 0.5 else -1)
        # no product has this colour: the concepts themselves are the description
        words = sorted({m.form for m in lexicon().mentions(text) if m.colours and m is not main})
        return Example(text, style, formal_description(kind, " ".join(words), ""))

    def _transferred(
        self, text: str, kind: str, main: Mention, random: np.random.Generator
    ) -> tuple[str, str]:
        """The same praise of another kind of garment or accessory, where it can be said of both."""
        words = lexicon()
        if words.garment_words.search(text):  # only what is worn in the same place
            near = [g for g in words.groups if kind in g and not words.specific_words.search(text)]
            targets = [k for k in self.by_kind if any(k in group for group in near)]
        else:
            general = kind in words.praised and len(text.split()) <= 12
            targets = [k for k in self.by_kind if general and k in words.wearable]
        if not targets:
            return text, kind
        share = np.sqrt([len(self.by_kind[k]) for k in targets])
        target = targets[random.choice(len(targets), p=share / share.sum())]
        before: str | None = text[: main.start]
        after = text[main.end :]
        is_plural, to_plural = (
            form.endswith("s") and not form.endswith("ss") for form in (main.form, target)
        )
        if to_plural and not is_plural:
            before, after = _to_plural(text[: main.start], after)
        elif is_plural and not to_plural:
            return text, kind
        if before is None:
            return text, kind
        before = re.sub(r"\b(a|an) $", "an " if target[0] in "aeiou" else "a ", before)
        return before + target + after, target

    def condition(self, style: str, random: np.random.Generator) -> tuple[Example, Concepts]:
        """A product to write about, without a text, and what a caption may say of it.

        Kinds are drawn by the 0.7th power of their numbers. There always is a description, as a
        captioner first describes an image that has none; the image is given 17 times in 20.
        """
        if not self._kinds:
            self._kinds = sorted(self.by_kind)
            share = np.array([len(self.by_kind[kind]) ** 0.7 for kind in self._kinds])
            self._shares = share / share.sum()
        members = self.by_kind[self._kinds[random.choice(len(self._kinds), p=self._shares)]]
        index = members[random.integers(len(members))]
        product, concepts = self.products[index], self.concepts[index]
        formal = (product.description, *product.titles)
        description = formal[random.integers(len(formal))]
        if not lexicon().concepts(description).head & concepts.head:
            description = product.description
        image = product.image if random.random() < 0.85 else -1
        said = lexicon().concepts(description)
        return Example("", style, description, image), said.filled_from(concepts)

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
    return _number(" ".join(hidden.split()))


def word_hashes(text: str) -> set[int]:
    """63-bit numbers of the words of a text."""
    return {_number(word) for word in re.findall(r"[a-z']+", normalise(text))}


def _number(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
