"""Keeps to the words that people use while a caption is written.

A language model of pieces of words makes words of its own, the more the longer it writes and the
warmer it is drawn. Refused afterwards, they cost the whole caption, and long ones most often: what
is left is shorter than what people write. So each piece is drawn among those that complete, or go
on to, a word of the training text; probabilities are those of the model given that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from stylegan import corpora
from stylegan.generator import EOS
from stylegan.rules import Rules

_TAIL = re.compile(r"[a-z']*$")  # of a text: its last word as far as it is written
_HEAD = re.compile(r"^[a-z']*")


class Spelling:
    """Which tokens may follow. A word is what `corpora.word_hashes` takes for one.

    rules: the words, and the beginnings at which the tokeniser cuts them (`Rules.of`).
    """

    def __init__(self, tokenizer: Tokenizer, rules: Rules) -> None:
        self._words, self._whole = rules.words, rules.words | rules.beginnings
        pieces = token_pieces(tokenizer)
        heads: dict[str, list[int]] = {}  # what the token adds to a word that has begun
        sound = np.ones(len(pieces), dtype=bool)  # what it says after that
        ends = np.zeros(len(pieces), dtype=bool)  # it says something after that, or is the end
        self._tails: list[str | None] = []  # the word that it begins; None: it goes on with one
        for token, piece in enumerate(pieces):
            head = _HEAD.findall(piece)[0]
            rest = piece[len(head) :]
            heads.setdefault(head, []).append(token)
            ends[token] = bool(rest) or not piece
            tail = _TAIL.findall(rest)[0]
            self._tails.append(tail if ends[token] else None)
            whole = re.findall(r"[a-z']+", rest[: len(rest) - len(tail)])
            # what says nothing, or what `corpora.normalise` drops, would join two words
            is_plain = piece.isascii() and piece.isprintable() and '"' not in piece
            sound[token] = is_plain and bool(piece or token == EOS)
            sound[token] &= all(map(self._is_word, whole)) and self._is_begun(tail)
        self._pieces, self._sound, self._ends = pieces, sound, ends
        self._heads = {head: np.array(tokens) for head, tokens in heads.items()}
        self._allowed: dict[str, npt.NDArray[np.bool_]] = {}

    def _is_word(self, text: str) -> bool:
        return not text or corpora.text_number(text) in self._words

    def _is_begun(self, text: str) -> bool:
        return not text or corpora.text_number(text) in self._whole

    def allowed(self, begun: str) -> npt.NDArray[np.bool_]:
        """[V]: the tokens that may follow; begun: the word that is being written, as far as it is.

        All where no token may: what a brand or an opening begins may go on in no word of people's.
        """
        if begun not in self._allowed:
            allowed = np.zeros(len(self._pieces), dtype=bool)
            for head, tokens in self._heads.items():
                allowed[tokens] = np.where(
                    self._ends[tokens], self._is_word(begun + head), self._is_begun(begun + head)
                )
            allowed &= self._sound
            self._allowed[begun] = allowed if allowed.any() else np.ones_like(allowed)
        return self._allowed[begun]

    def knows_kinds(self, texts: Iterable[str]) -> bool:
        """Whether people use all words for kinds of products in the texts: where a shop or an
        opening has another, it could not be written, or would go on to one of people's."""
        forms = [m.form for t in texts for m in corpora.lexicon().mentions(t) if m.types]
        return all(corpora.word_hashes(form) <= self._words for form in forms)

    def follow(self, begun: str, token: int) -> str:
        """The word that is being written after one more token."""
        tail = self._tails[token]
        return begun + self._pieces[token] if tail is None else tail


def token_pieces(tokenizer: Tokenizer) -> list[str]:
    """What each token adds to a text, lower case; the end and other marks add nothing."""
    anchor = next(
        token
        for token in range(EOS + 1, tokenizer.get_vocab_size())
        if re.fullmatch("[a-z]+", tokenizer.decode([token]).strip())
    )
    before = tokenizer.decode([anchor])
    texts = tokenizer.decode_batch([[anchor, t] for t in range(tokenizer.get_vocab_size())])
    return [
        text[len(before) :].lower() if text.startswith(before) else " " + text.lower()
        for text in texts
    ]
