"""Brand rules: what a shop wants said and not said of its products, read from a TOML file.

    forbidden = ["cheap", "knock-off", "to die for"]
    required_columns = ["brand"]
    max_words = 12

Text is compared as *words*: runs of letters and digits of the normalised text, whatever stands
between them. "Must-have" forbids "must have!" and "must, have"; it does not forbid "must haves".
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from stylegan import corpora
from stylegan.storage import patiently, resolve_filesystem

SHORTEST, LONGEST = 3, 22  # words of any caption, see corpora.is_sayable

# modifiers that stay beside their noun: "the Fila polo shirt", not "the polo Fila shirt"
_BOUND = re.compile(r"(?:(?:polo|cargo|swing|wrap|maxi|midi|mini|[a-z]+-neck) )+$")
# what stands before or after a word that is no noun there: "you can dress it up", "on top of"
_NO_NOUN_AFTER = re.compile(r"(?:\b(?:to|you|can|will|and|or) |[^ ])$")
_NO_NOUN_BEFORE = re.compile(r"-| (?:it|them|up|down|of)\b")


class BrandRulesError(ValueError):
    """A file of brand rules that cannot be obeyed; the message says what, the value, the remedy."""


def spoken(text: str) -> str:
    """The words of a text in lower case, joined by spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", corpora.normalise(text)))


def says(text: str, phrase: str) -> bool:
    """Whether the words of a phrase are in a text, in its order and one after the other."""
    return f" {spoken(phrase)} " in f" {spoken(text)} "


def count_words(text: str) -> int:
    """Words as a person counts them: "must-have" is one, a dash between words is none."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


@dataclass(frozen=True, slots=True)
class BrandRules:
    """The rules. None, empty: there is no such rule.

    forbidden: phrases that no caption has; kept as their words (`spoken`), sorted, so that neither
    order nor spelling makes them other rules. required_columns: columns whose value each caption
    has, where the row has one. min_words … max_characters: of the whole caption. Raises
    BrandRulesError for rules that no caption can obey.
    """

    forbidden: tuple[str, ...] = ()
    required_columns: tuple[str, ...] = ()
    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None

    @classmethod
    def read(cls, uri: str) -> BrandRules:
        """The rules in a file, a path or any URI that the job reads. Raises BrandRulesError."""
        filesystem, path = resolve_filesystem(uri)

        def read() -> bytes:
            with filesystem.open_input_stream(path) as stream:
                content: bytes = stream.read()
            return content

        try:
            return cls.parse(patiently(uri, read).decode())
        except OSError as error:
            raise BrandRulesError(f"{uri} cannot be read: {error}") from error
        except ValueError as error:  # of TOML, UTF-8 and our own
            raise BrandRulesError(f"{uri}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> BrandRules:
        """The rules in a TOML text. Raises BrandRulesError, or tomllib.TOMLDecodeError."""
        given = tomllib.loads(text)
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in given if key not in known]:
            raise BrandRulesError(f"{unknown[0]!r} is no rule; the rules are {', '.join(known)}")
        if not given:
            raise BrandRulesError(f"it has no rule; the rules are {', '.join(known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) != field.default:
                _check(field.name, value)
        object.__setattr__(self, "forbidden", tuple(sorted(set(map(spoken, self.forbidden)))))
        columns = tuple(dict.fromkeys(self.required_columns))
        object.__setattr__(self, "required_columns", columns)
        for unit in ("words", "characters"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise BrandRulesError(f"min_{unit} = {low} is more than max_{unit} = {high}")
        if self.max_words is not None and self.max_words < SHORTEST:
            raise BrandRulesError(
                f"max_words = {self.max_words}: a caption has {SHORTEST} words or more"
            )
        if self.min_words is not None and self.min_words > LONGEST:
            raise BrandRulesError(
                f"min_words = {self.min_words}: a caption has {LONGEST} words or fewer"
            )
        words = max(SHORTEST, self.min_words or 0)  # of a letter each, and what is between them
        if self.max_characters is not None and self.max_characters < 2 * words:
            raise BrandRulesError(
                f"max_characters = {self.max_characters} is too few for {words} words"
            )

    @property
    def is_length_bounded(self) -> bool:
        """Whether a caption may be too long."""
        return self.max_words is not None or self.max_characters is not None

    @property
    def bind_early(self) -> bool:
        """Whether a caption may break them before it is whole."""
        return bool(self.forbidden) or self.is_length_bounded

    def allows(self, text: str) -> bool:
        """Whether a text has no forbidden phrase."""
        if not self.forbidden:
            return True
        words = f" {spoken(text)} "
        return not any(f" {phrase} " in words for phrase in self.forbidden)

    def exceeds(self, text: str, terms: Sequence[str] = ()) -> bool:
        """Whether a text that is being written is too long, with the terms that it has not yet."""
        if not self.is_length_bounded:
            return False
        missing = [term for term in terms if not says(text, term)]
        return self._is_too_long(" ".join([corpora.sentence(text), *missing]))

    def _is_too_long(self, printed: str) -> bool:
        words, characters = count_words(printed), len(printed)
        return (self.max_words is not None and words > self.max_words) or (
            self.max_characters is not None and characters > self.max_characters
        )

    def faults(self, printed: str, terms: Sequence[str] = ()) -> frozenset[str]:
        """Names of the rules that a caption breaks. terms: what it has to say."""
        words, characters = count_words(printed), len(printed)
        is_too_short = words < (self.min_words or 0) or characters < (self.min_characters or 0)
        broken = {
            "forbidden": not self.allows(printed),
            "required": not all(says(printed, term) for term in terms),
            "length": is_too_short or self._is_too_long(printed),
        }
        return frozenset(name for name, is_broken in broken.items() if is_broken)


def _check(key: str, value: Any) -> None:
    """Raises BrandRulesError unless the value is of the rule's type."""
    if key not in ("forbidden", "required_columns"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BrandRulesError(f"{key} = {value!r}: give a whole number from 1 up")
        return
    if not isinstance(value, list | tuple) or not value:
        raise BrandRulesError(f"{key} = {value!r}: give a list with something in it, or no {key}")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise BrandRulesError(f"{key}: {item!r} is no text")
        if key == "forbidden" and not spoken(item):
            raise BrandRulesError(
                f"forbidden: {item!r} has none of the letters and digits that captions are "
                "written in (a to z, 0 to 9): leave it out"
            )


# --- required terms -----------------------------------------------------------------------------


def term(value: object) -> str | None:
    """What a caption has to say for a value of a row; None where there is none."""
    text = "" if value is None else " ".join(str(value).split())
    return text or None


def with_terms(text: str, terms: Sequence[str], kinds: frozenset[str]) -> str:
    """The printed sentence with the terms in it, spelled as they are given.

    Those that the text has not are put before the word that names the product (one of `kinds`):
    "this shirt is so soft" → "This Levi's shirt is so soft." Where that makes no sentence the text
    stays without them.
    """
    missing = [term for term in terms if not says(text, term)]
    printed = corpora.sentence(_placed(corpora.normalise(text), missing, kinds))
    for spelling in terms:
        words = spoken(spelling).split()
        if words:
            phrase = "[^a-z0-9]+".join(words)
            pattern = re.compile(rf"(?<![a-z0-9]){phrase}(?![a-z0-9])", re.IGNORECASE)
            printed = pattern.sub(spelling.replace("\\", r"\\"), printed)
    return printed


def without_terms(text: str, terms: Sequence[str]) -> str:
    """The text without the terms: what else it says."""
    for said in filter(None, map(spoken, terms)):
        phrase = "[^a-z0-9]+".join(said.split())
        text = re.sub(rf"(?i)(?<![a-z0-9]){phrase}(?![a-z0-9]) ?", "", text)
    return text


def _placed(text: str, missing: Sequence[str], kinds: frozenset[str]) -> str:
    said = " ".join(spoken(term) for term in missing)
    if not said:
        return text
    for mention in corpora.lexicon().mentions(text):
        before, after = text[: mention.start], text[mention.end :]
        if not mention.types & kinds or _NO_NOUN_BEFORE.match(after):
            continue
        if bound := _BOUND.search(before):
            before = before[: bound.start()]
        if before and _NO_NOUN_AFTER.search(before):
            continue
        if set(before.split()[-2:]) & set(said.split()):  # "these nike Nike Air shoes"
            continue
        if re.search(r"\ban? $", before):
            article = _article(missing[0])
            if article is None:
                continue
            before = re.sub(r"\ban? $", f"{article} ", before)
        return f"{before}{said} {bound[0] if bound else ''}{text[mention.start :]}"
    return text


def _article(term: str) -> str | None:
    """The article, "a" or "an"; None where spelling does not tell."""
    first = term.split()[0]
    # letters that are spelled out, numbers, a silent h, "you" and "won" written with a vowel
    if (first.isupper() and len(first) < 5) or re.match(
        r"[^a-z]|h|x|y[^aeiou]|u[^a-z]|un[^a-z]|uni|us|ut|eu|one", first.lower()
    ):
        return None
    return "an" if first[0].lower() in "aeiou" else "a"
