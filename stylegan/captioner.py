"""The Captioner: a batch of images in, captions out. Plain torch; each actor of the job holds one.

A caption depends on its image, description, style, seed, the model and the decoding settings, and
on nothing else: every forward pass runs on a tile of TILE rows and fixed length, whatever the size
of the batch, and each row draws from its own random stream. Where a tile does not fit into memory,
it is halved for good and tried again: the same numbers are drawn, but a smaller tile can change the
last bits of a sum, as another device can.

A candidate is kept when it obeys the rules (`rules.py`): it names the product, contradicts nothing
that is known of it, is sayable by a shop, has no word that people do not use and is no sentence
of the training text; else the next one is drawn. Where none names the product, some are made to
begin with its name. When all fail, the one that breaks them least is
delivered and marked for review. The critic (`critic.py`) scores what is delivered; a candidate that
obeys is accepted in proportion to its odds, or the best of several is, where these are asked for.
Brand rules (`brand.py`) are kept while a caption is written: a token that would complete a
forbidden phrase is not drawn. They are checked on what is delivered.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from pyarrow.fs import FileSelector
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from stylegan import brand, corpora
from stylegan.brand import BrandRules
from stylegan.corpora import Concepts
from stylegan.critic import FILE as CRITIC
from stylegan.critic import Critic
from stylegan.discriminator import hidden_ids
from stylegan.generator import BOS, EOS, PAD, Generator
from stylegan.images import decode_image
from stylegan.rules import SHOPS, Rules, severity
from stylegan.spelling import Spelling
from stylegan.storage import patiently, resolve_filesystem

TILE = 32  # rows of every forward pass, where there is memory for them
SHIPPED = Path(__file__).parent / "pretrained"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
SEEN = "training_text.safetensors"  # numbers of sentences and words, no text
_NUMBERS = ("sentences", "words", "beginnings")  # in it, of `Rules`
SURE = 0.9  # probability from which on a colour that was only seen may be said
REFUSALS = 16  # tokens in a row that complete what is forbidden; then the candidate is given up
OPENED = 4  # candidates that begin with the product's name, where none of the others named it
PERSISTENCE = 2  # times as many candidates are drawn where only the shop's rules stood in the way

_OUT_OF_MEMORY = re.compile(r"can't allocate memory|_ALLOC_FAILED")  # of the CPU; cuBLAS, cuDNN
_Row = TypeVar("_Row")
_Draw = tuple[int, tuple[int, int] | None]  # a row of an encoding, key of its random stream
_Made = TypeVar("_Made")

# an image as bytes, a path, a PIL image or an array [H, W, 3] uint8; None with a description
ImageLike = bytes | str | Path | Image.Image | np.ndarray | None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How captions are drawn.

    temperature: divides the logits. top_p: only the most likely tokens that make up this share are
    drawn. top_k: only so many of the most likely tokens are, 0 for all. max_surprise: no token is
    drawn that is rarer in its place than in the training text as a whole by more than so many nats,
    0 for no such bound; it cuts slips of grammar, and no rare words where they fit. max_new_tokens:
    length limit of a caption. best_of: how many candidates that obey the rules are drawn; the one
    with the highest score is delivered, the likeliest where there is no critic. selectivity: where
    one is drawn, it is accepted with a probability of its odds (to be a person's) divided by this,
    1 for all, which needs a critic. max_candidates: how many are drawn at the most, until so many
    obey and are accepted.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 31
    best_of: int = 1
    max_candidates: int = 12
    max_surprise: float = 0.0
    selectivity: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 5:
            raise ValueError(f"temperature is {self.temperature}: choose one in (0, 5]")
        if not self.max_new_tokens >= 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: choose 1 or more")
        if not self.best_of >= 1:
            raise ValueError(f"best_of is {self.best_of}: choose 1 or more")
        if not self.max_surprise >= 0:
            raise ValueError(f"max_surprise is {self.max_surprise}: choose 0 or more")
        if not self.selectivity >= 1:
            raise ValueError(f"selectivity is {self.selectivity}: choose 1 or more")


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption, or the reason why there is none.

    text: the caption, null when failed. style: its style. score: the critic's probability
    that a person wrote it, null without one. description: the formal description given or
    predicted. needs_review: no candidate obeyed all rules, or the score is too low. review_reasons:
    names of the rules that it breaks (`rules.FAULTS`), "low score". num_generated_tokens: of the
    candidate, its end included. seed: that it was drawn from.
    """

    text: str | None
    style: str
    score: float | None
    description: str | None
    needs_review: bool
    num_generated_tokens: int
    seed: int
    error_class: str | None = None
    error_message: str | None = None
    review_reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoding:
    """Images seen once, to write about in any style as often as wanted: `Captioner.encode`.

    given: the descriptions that came with them. errors: number of an image → error_class and
    error_message. features: → [I, C]. known: → description given or predicted. concepts: → what
    may be said of it.
    """

    given: Sequence[str | None]
    errors: dict[int, tuple[str, str]]
    features: dict[int, Tensor]
    known: dict[int, str]
    concepts: dict[int, Concepts]


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a caption has to obey besides the captioner's own rules.

    terms: those that it has to say. taken: what it must not say, see `brand.spoken`.
    """

    rules: BrandRules
    terms: Sequence[str]
    taken: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Generated:
    text: str
    ids: list[int]
    log_probabilities: list[float]  # of each id, nats
    finished: bool  # whether it ended by itself
    luck: float  # a number from (0, 1] of the row's own stream, against which it is accepted


@dataclass(frozen=True, slots=True)
class _Candidate:
    text: str
    tokens: int
    faults: frozenset[str]
    value: float = 0.0  # of those that obey alike, the highest is chosen
    score: float | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """The lowest is chosen."""
        return severity(self.faults), -self.value


def model_revision(directory: Path) -> str:
    """Twelve hexadecimal digits that identify the weights, tokeniser and settings of a model."""
    digest = hashlib.sha256()
    for name in (*_FILES, SEEN, CRITIC):
        path = directory / name
        if path.exists():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


@contextmanager
def open_model(model: str | Path | None = None) -> Iterator[Path]:
    """The directory of a model on local disk; None: of the shipped one.

    A model on object storage is copied, and the copy removed at the end. Raises FileNotFoundError
    naming what is missing.
    """
    with ExitStack() as stack:
        if model is None:
            directory = SHIPPED
        elif "://" in str(model):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="stylegan-model-"))
            directory = Path(scratch)
            _download(str(model), directory)
        else:
            directory = Path(model)
        missing = [name for name in _FILES if not (directory / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{model or directory} is no model directory: {', '.join(missing)} missing; give "
                "the --output of jobs.train, or leave the model out for the shipped one"
            )
        yield directory


def _download(uri: str, target: Path) -> None:
    filesystem, root = resolve_filesystem(uri)

    def copy() -> None:
        for entry in filesystem.get_file_info(FileSelector(root, allow_not_found=True)):
            if entry.is_file:
                with filesystem.open_input_stream(entry.path) as stream:
                    (target / entry.base_name).write_bytes(stream.read())

    patiently(uri, copy)


def save_model(directory: Path, captioner: Captioner) -> None:
    """Writes a model directory that `Captioner.from_pretrained` and transformers load.

    Weights are stored in half precision, and are back on the CPU afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator, rules, critic = captioner.generator.cpu(), captioner.rules, captioner.critic
    generator.half().save_pretrained(directory)
    generator.float()
    PreTrainedTokenizerFast(
        tokenizer_object=captioner.tokenizer, pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>",
    ).save_pretrained(directory)  # fmt: skip
    GenerationConfig(
        do_sample=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        **asdict(captioner.decoding),
    ).save_pretrained(directory)  # fmt: skip
    config = generator.config
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3,
        "size": {"height": config.image_size, "width": config.image_size},
        "rescale_factor": 1 / 255, "image_mean": config.image_mean, "image_std": config.image_std,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    numbers = zip(_NUMBERS, (rules.seen, rules.words, rules.beginnings), strict=True)
    tensors = {name: torch.tensor(sorted(v), dtype=torch.int64) for name, v in numbers}
    if captioner.frequency is not None:
        tensors["tokens"] = captioner.frequency.cpu()
    save_file(tensors, directory / SEEN)
    if critic is not None:
        critic.save(directory)


def token_frequency(sentences: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    """Logarithm of each token's share of sentences, their ends included, [V]; nats."""
    counts = torch.full((tokenizer.get_vocab_size(),), 0.5)
    for text in sentences:
        for token in (*tokenizer.encode(text).ids, EOS):
            counts[token] += 1
    return (counts / counts.sum()).log()


class Captioner:
    """Writes captions with a trained model. Attributes: image_size (pixels of the square that the
    model reads), styles, model_id, model_revision, decoding (the model's own settings), tile (rows
    of a forward pass)."""

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, decoding: Decoding,
        *, rules: Rules | None = None, frequency: Tensor | None = None,
        critic: Critic | None = None, model_id: str = "", revision: str = "", device: str = "cpu",
    ) -> None:  # fmt: skip
        self.generator = generator.float().eval()
        nn.Module.to(generator, device)
        self.tokenizer = tokenizer
        self.decoding = decoding
        self.device = device
        self.tile = TILE
        self.rules = rules or Rules()
        self.spelling = Spelling(tokenizer, self.rules) if self.rules.beginnings else None
        self.frequency = None if frequency is None else frequency.to(device)
        self.critic = critic
        self.model_id = model_id
        self.model_revision = revision
        self.image_size = generator.config.image_size
        self.styles = tuple(generator.config.styles)

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, *, device: str | None = None
    ) -> Captioner:
        """The shipped model, or one from a directory or an s3:// URI that jobs.train wrote.

        device: "cuda" where there is a GPU, else "cpu". Raises FileNotFoundError.
        """
        disable_progress_bar()  # of loading a few megabytes
        with open_model(model) as directory:
            settings = json.loads((directory / "generation_config.json").read_text())
            text = load_file(directory / SEEN) if (directory / SEEN).exists() else {}
            frequency = text.pop("tokens", None)
            numbers = {name: frozenset(tensor.tolist()) for name, tensor in text.items()}
            return cls(
                Generator.from_pretrained(directory, dtype=torch.float32),
                Tokenizer.from_file(str(directory / "tokenizer.json")),
                Decoding(**{k: settings[k] for k in Decoding.__slots__ if k in settings}),
                rules=Rules(*(numbers.get(name, frozenset()) for name in _NUMBERS)),
                frequency=frequency,
                critic=Critic.load(directory),
                model_id=str(model) if model is not None else "stylegan-small",
                revision=model_revision(directory),
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            )

    def caption(
        self, images: Sequence[ImageLike], style: str = "colloquial",
        descriptions: Sequence[str | None] | None = None, seed: int | Sequence[int] = 0,
        *, temperature: float | None = None, max_new_tokens: int | None = None,
        best_of: int | None = None, rules: BrandRules | None = None,
        terms: Sequence[Sequence[str]] | None = None, min_score: float | None = None,
    ) -> list[Caption]:  # fmt: skip
        """Captions of images, in order: `encode`, then `write`.

        images: bytes, paths, PIL images or [H, W, 3] uint8 arrays; None where a description alone
        is rewritten. descriptions: formal, one an image, None where it is to be predicted. A bad
        image gives a Caption with an error_class. Raises ValueError for an unknown style or lengths
        that differ.
        """
        self._check_style(style)
        return self.write(
            self.encode(images, descriptions), style, seed, temperature=temperature,
            max_new_tokens=max_new_tokens, best_of=best_of, rules=rules, terms=terms,
            min_score=min_score,
        )  # fmt: skip

    def encode(
        self, images: Sequence[ImageLike], descriptions: Sequence[str | None] | None = None
    ) -> Encoding:
        """Looks at images, and describes those that need it. Arguments as for `caption`."""
        given = [None] * len(images) if descriptions is None else list(descriptions)
        if len(images) != len(given):
            raise ValueError(
                f"{len(images)} images, {len(given)} descriptions: give as many of each"
            )
        loaded = [self._load(image) for image in images]
        errors: dict[int, tuple[str, str]] = {}
        for index, image in enumerate(loaded):
            if isinstance(image, tuple):
                errors[index] = image
            elif image is None and not (given[index] or "").strip():
                errors[index] = ("gone", "neither an image nor a description was given")
        good = [index for index in range(len(images)) if index not in errors]
        pixels = {i: image for i in good if isinstance(image := loaded[i], np.ndarray)}
        features = self._features(pixels)

        known = {i: text for i in good if (text := (given[i] or "").strip())}
        concepts = {i: corpora.lexicon().concepts(text) for i, text in known.items()}
        # the image is asked for what the description does not say
        asked = [i for i in good if i in pixels and (i not in known or not concepts[i].head)]
        predicted = self._describe(asked, features)
        for index, (text, seen) in predicted.items():
            if index in known:
                concepts[index] = concepts[index].filled_from(seen)
            else:
                known[index], concepts[index] = text, seen
        return Encoding(given, errors, features, known, concepts)

    def write(
        self, encoding: Encoding, style: str = "colloquial", seed: int | Sequence[int] = 0,
        *, temperature: float | None = None, max_new_tokens: int | None = None,
        best_of: int | None = None, rules: BrandRules | None = None,
        terms: Sequence[Sequence[str]] | None = None, min_score: float | None = None,
        others: Sequence[Collection[str]] | None = None,
    ) -> list[Caption]:  # fmt: skip
        """A caption of each image of an encoding.

        seed: one for all images alike, or one an image. rules: of a brand. terms: what each caption
        has to say, one list an image, as `rules.required_columns` of a row would give it.
        min_score: captions with a lower score need review. others: captions of each image that
        there are already; none of them is written again. Raises ValueError for an unknown style or
        lengths that differ.
        """
        self._check_style(style)
        count = len(encoding.given)
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        for name, values in (("seeds", seeds), ("lists of terms", terms), ("others", others)):
            if values is not None and len(values) != count:
                raise ValueError(f"{count} images, {len(values)} {name}: give as many of each")
        decoding = replace(
            self.decoding,
            temperature=self.decoding.temperature if temperature is None else temperature,
            max_new_tokens=min(max_new_tokens or self.decoding.max_new_tokens, self._longest()),
            best_of=self.decoding.best_of if best_of is None else best_of,
        )
        limits = {
            row: _Limits(
                rules or BrandRules(),
                terms[row] if terms else (),
                frozenset(map(brand.spoken, others[row] if others else ())),
            )
            for row in encoding.known
        }
        if style == "formal":
            best = {row: _formal(encoding, row, limit) for row, limit in limits.items()}
        else:
            best = self._rewrite(encoding, style, seeds, decoding, limits)
        captions = []
        for row, description in enumerate(encoding.given):
            if error := encoding.errors.get(row):
                failed = Caption(None, style, None, description, False, 0, seeds[row], *error)
                captions.append(failed)
                continue
            chosen = best[row]
            is_low = min_score is not None and chosen.score is not None and chosen.score < min_score
            reasons = (*sorted(chosen.faults), *(["low score"] if is_low else []))
            captions.append(
                Caption(
                    chosen.text, style, chosen.score, encoding.known[row], bool(reasons),
                    chosen.tokens, seeds[row], review_reasons=reasons,
                )
            )  # fmt: skip
        return captions

    def _check_style(self, style: str) -> None:
        if style not in self.styles:
            raise ValueError(f"unknown style {style!r}: this model writes {', '.join(self.styles)}")

    def _longest(self) -> int:
        return int(self.generator.config.caption_length) - 1

    def _load(self, image: ImageLike) -> np.ndarray | tuple[str, str] | None:
        """Pixels [S, S, 3] uint8, None for no image, or (error_class, error_message)."""
        size = self.image_size
        if image is None:
            return None
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(
                    f"an image array has shape {list(image.shape)} and type {image.dtype}: give "
                    "[H, W, 3] uint8, or the file's bytes"
                )
            if image.shape[:2] == (size, size):
                return image
            image = Image.fromarray(image)
        if isinstance(image, str | Path):
            try:
                data = Path(image).read_bytes()
            except FileNotFoundError:
                return "gone", f"there is no file {image}"
            except OSError as error:
                return "unreadable", f"{image}: {error.strerror}"
        elif isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            data = buffer.getvalue()
        else:
            data = image
        decoded = decode_image(data, size)
        if decoded.pixels is None:
            return decoded.error_class or "unreadable", decoded.error_message or ""
        return decoded.pixels

    def _by_tile(
        self, rows: Sequence[_Row], forward: Callable[[Sequence[_Row]], Sequence[_Made]]
    ) -> Iterator[tuple[_Row, _Made]]:
        """Each row with what `forward` makes of it, which gets `tile` rows at a time.

        A tile that does not fit into memory is halved from then on; `forward` is called again.
        Raises torch.OutOfMemoryError when a single row does not fit.
        """
        done = 0
        while done < len(rows):
            tile = rows[done : done + self.tile]
            try:
                made = forward(tile)
            except RuntimeError as error:
                is_ours = isinstance(error, torch.OutOfMemoryError)
                if not is_ours and not _OUT_OF_MEMORY.search(str(error)):
                    raise
                if self.tile == 1:
                    raise torch.OutOfMemoryError(
                        f"not even one row fits into the memory of {self.device}: put fewer "
                        "captioners on it (--actors, --gpus-per-actor), or take a smaller model "
                        f"({error})"
                    ) from error
            else:
                yield from zip(tile, made, strict=True)
                done += len(tile)
                continue
            # here and not above: until the handler ends, its traceback holds the tensors
            self.tile //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            # not by logging: Ray's settings in a process silence loggers of others
            print(
                f"out of memory on {self.device}: tiles of {self.tile} rows from now on",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    @torch.inference_mode()
    def _features(self, pixels: dict[int, np.ndarray]) -> dict[int, Tensor]:
        """Features [I, C] of each image."""
        size = self.image_size

        def look(tile: Sequence[int]) -> Sequence[Tensor]:
            batch = np.zeros((self.tile, size, size, 3), dtype=np.uint8)
            for row, index in enumerate(tile):
                batch[row] = pixels[index]
            images = self.generator.normalise(torch.from_numpy(batch).to(self.device))
            output = self.generator.features(images.contiguous(memory_format=torch.channels_last))
            return list(output[: len(tile)])

        return dict(self._by_tile(list(pixels), look))

    def _describe(
        self, rows: list[int], features: dict[int, Tensor]
    ) -> dict[int, tuple[str, Concepts]]:
        """The most likely formal description of each image (greedy), and what may be said of it.

        A colour that was only seen may be said where the model is sure of it: others are wrong
        too often.
        """
        texts: dict[int, tuple[str, Concepts]] = {}
        greedily: list[_Draw] = [(row, None) for row in rows]
        for (row, _), written in self._generate(greedily, "formal", features, {}, Decoding()):
            concepts = corpora.lexicon().concepts(written.text)
            if self._colour_probability(written) < SURE:
                concepts = replace(concepts, colours=frozenset())
            texts[row] = corpora.sentence(written.text).rstrip("."), concepts
        return texts

    def _colour_probability(self, written: _Generated) -> float:
        """Probability of the tokens of a description up to the end of its last colour word."""
        ends = [m.end for m in corpora.lexicon().mentions(written.text) if m.colours]
        if not ends:
            return 0.0
        for count in range(1, len(written.ids) + 1):
            if len(self.tokenizer.decode(written.ids[:count]).strip()) >= ends[-1]:
                break
        return math.exp(sum(written.log_probabilities[:count]))

    def _rewrite(
        self, encoding: Encoding, style: str, seeds: Sequence[int], decoding: Decoding,
        limits: dict[int, _Limits],
    ) -> dict[int, _Candidate]:  # fmt: skip
        """A caption for each row: candidates are drawn until enough obey and are accepted."""
        best: dict[int, _Candidate] = {}
        rows = list(encoding.known)
        accepted = dict.fromkeys(rows, 0)
        promising: set[int] = set()
        # what is of no known kind has no place for a term, however often it is tried
        mendable = {r: SHOPS if encoding.concepts[r].head else SHOPS - {"required"} for r in rows}
        pending, choosing = rows, decoding.best_of > 1
        usual = max(decoding.best_of, decoding.max_candidates)
        # a single candidate is what the model says by itself
        opened = OPENED if decoding.max_candidates > 1 else 0
        attempt, last = 0, max(PERSISTENCE * usual, usual + opened)
        while pending and attempt < last:
            # where they leave room in a tile, candidates are drawn ahead, and forgotten where they
            # turn out not to be needed: each is what it would have been in its turn
            ahead = max(1, min(self.tile // len(pending), usual - attempt))
            openings = {
                row: self._opening(encoding.known[row], encoding.concepts[row])
                for row in pending
                if attempt >= usual and "unnamed" in best[row].faults
            }
            draws: list[_Draw] = [
                (row, (seeds[row], attempt + k)) for row in pending for k in range(ahead)
            ]
            generated = [
                (row, written)
                for (row, _), written in self._generate(
                    draws, style, encoding.features, encoding.known, decoding, limits, openings
                )
            ]
            candidates = [self._judge(w, encoding.concepts[r], limits[r]) for r, w in generated]
            odds, scores = self._scores([c.text for c in candidates], style)
            for place, (row, written) in enumerate(generated):
                if accepted[row] >= decoding.best_of:
                    continue
                candidate, is_accepted = candidates[place], True
                if odds:
                    candidate = replace(candidate, score=scores[place])
                if choosing:
                    likelihood = sum(written.log_probabilities) / max(1, len(written.ids))
                    candidate = replace(candidate, value=odds[place] if odds else likelihood)
                elif odds and decoding.selectivity > 1:
                    # where none is accepted, the one that came nearest to it is chosen
                    wanted = odds[place] - math.log(decoding.selectivity * written.luck)
                    candidate = replace(candidate, value=min(0.0, wanted))
                    is_accepted = wanted >= 0
                accepted[row] += is_accepted and not candidate.faults
                if candidate.faults and candidate.faults <= mendable[row]:
                    promising.add(row)
                if row not in best or candidate.rank < best[row].rank:
                    best[row] = candidate
            attempt += ahead
            pending = [row for row in pending if accepted[row] < decoding.best_of]
            if attempt >= usual:
                pending = [
                    row
                    for row in pending
                    if best[row].faults
                    and (
                        row in promising
                        or (attempt < usual + opened and "unnamed" in best[row].faults)
                    )
                ]
        return best

    def _opening(self, description: str, concepts: Concepts) -> list[int]:
        """Tokens of "this watch" or "these shoes", as the description names its product."""
        mentions = corpora.lexicon().mentions(description)
        nouns = [m.form for m in mentions if m.types & concepts.head]
        if not nouns:
            return []
        word = "these" if corpora.lexicon().is_many(nouns[-1]) else "this"
        return list(self.tokenizer.encode(f"{word} {nouns[-1]}").ids)

    def _judge(self, written: _Generated, concepts: Concepts, limits: _Limits) -> _Candidate:
        """What would be delivered of a text, and the rules that this breaks."""
        candidates = []
        for text, finished in _cut(written, limits):
            printed = brand.with_terms(text, limits.terms, concepts.head)
            faults = self.rules.faults(text, finished, concepts)
            if faults and limits.terms:  # what the row itself says is no fault of the caption's
                bare = brand.without_terms(text, limits.terms)
                faults &= self.rules.faults(bare, finished, concepts)
            faults |= limits.rules.faults(printed, limits.terms)
            if limits.taken and brand.spoken(printed) in limits.taken:
                faults |= {"duplicate"}
            candidates.append(_Candidate(printed, len(written.ids), faults))
        return min(candidates, key=lambda candidate: candidate.rank)

    def _scores(self, texts: Sequence[str], style: str) -> tuple[list[float], list[float]]:
        """Log odds of texts to be a person's, and probabilities; none without a critic."""
        if self.critic is None or style not in self.critic.styles:
            return [], []
        odds_N = self.critic.log_odds(hidden_ids(texts, self.tokenizer), style)
        return odds_N.tolist(), self.critic.probability(odds_N, style).tolist()

    def _generate(
        self, draws: list[_Draw], style: str, features: dict[int, Tensor], known: dict[int, str],
        decoding: Decoding, limits: dict[int, _Limits] | None = None,
        openings: dict[int, list[int]] | None = None,
    ) -> Iterator[tuple[_Draw, _Generated]]:  # fmt: skip
        """A text for each draw: a row and the key of its random stream; without one it is decoded
        greedily, with zero noise. openings: row → tokens that its text begins with."""
        return self._by_tile(
            draws,
            lambda tile: self._generate_tile(
                tile, style, features, known, decoding, limits, openings or {}
            ),
        )

    @torch.inference_mode()
    def _generate_tile(
        self, tile: Sequence[_Draw], style: str, features: dict[int, Tensor],
        known: dict[int, str], decoding: Decoding, limits: dict[int, _Limits] | None,
        openings: dict[int, list[int]],
    ) -> list[_Generated]:  # fmt: skip
        config, size = self.generator.config, self.tile
        longest = decoding.max_new_tokens
        image = torch.zeros(size, config.image_length, self.generator.projector[0].in_features)
        image = image.to(self.device)
        has_image = torch.zeros(size, dtype=torch.bool, device=self.device)
        description = torch.full((size, config.description_length), PAD, device=self.device)
        noise = np.zeros((size, config.noise_size), dtype=np.float32)
        uniform = np.zeros((size, longest), dtype=np.float32)
        rows, luck = [row for row, _ in tile], [1.0] * len(tile)
        for slot, (row, key) in enumerate(tile):
            if row in features:
                image[slot], has_image[slot] = features[row], True
            if row in known:
                ids = self.tokenizer.encode(known[row]).ids[: config.description_length]
                description[slot, : len(ids)] = torch.tensor(ids)
            if key is not None:
                stream = np.random.Generator(np.random.Philox(key=key))
                noise[slot] = stream.standard_normal(config.noise_size, dtype=np.float32)
                uniform[slot] = stream.random(longest, dtype=np.float32)
                luck[slot] = 1 - stream.random()
        styles = torch.full((size,), config.styles.index(style), device=self.device)
        prefix, mask = self.generator.prefix(
            image, has_image, description, styles, torch.from_numpy(noise).to(self.device)
        )
        greedy = torch.tensor([key is None for _, key in tile] + [True] * (size - len(tile)))
        draws = torch.from_numpy(uniform).to(self.device)
        greedy = greedy.to(self.device)

        idle = torch.arange(size, device=self.device) >= len(rows)
        watch = _Watch(self.tokenizer, [limits[row] for row in rows] if limits else [])
        forced = [(slot, openings[row]) for slot, row in enumerate(rows) if row in openings]
        # a description may have a word that people do not use
        spelling, begun = self.spelling if limits else None, [""] * size
        free = {
            slot
            for slot, row in enumerate(rows)
            if spelling and limits
            and not spelling.knows_kinds(
                [*limits[row].terms, self.tokenizer.decode(openings.get(row, []))]
            )
        }  # fmt: skip

        def choose(log_probs_BV: Tensor, step: int) -> Tensor:
            if spelling:
                allowed_BV = torch.from_numpy(np.stack([spelling.allowed(word) for word in begun]))
                allowed_BV[list(free)] = True
                log_probs_BV = log_probs_BV.masked_fill(~allowed_BV.to(self.device), -torch.inf)
                log_probs_BV = log_probs_BV.log_softmax(-1)  # given that it is a word

            def draw(p_BV: Tensor) -> Tensor:
                tokens_B = _draw(p_BV, draws[:, step], greedy, decoding, self.frequency)
                for slot, opening in forced:
                    if step < len(opening):
                        tokens_B[slot] = opening[step]
                return tokens_B

            tokens_B = watch.choose(log_probs_BV, draw)
            if spelling:
                begun[:] = map(spelling.follow, begun, tokens_B.tolist())
            return tokens_B

        ids_BT, scores_BT = self.generator.sample(prefix, mask, choose, longest, idle)
        tokens, log_probabilities = ids_BT.tolist(), scores_BT.tolist()
        results = []
        for slot in range(len(rows)):
            ids = [token for token in tokens[slot] if token != PAD]
            finished = bool(ids) and ids[-1] == EOS and slot not in watch.given_up
            text = self.tokenizer.decode([t for t in ids if t != EOS]).strip()
            log_probs = log_probabilities[slot][: len(ids)]
            results.append(_Generated(text, ids, log_probs, finished, luck[slot]))
        return results


def _formal(encoding: Encoding, row: int, limits: _Limits) -> _Candidate:
    """The description as a sentence: there is no other, whatever rules it breaks."""
    text = brand.with_terms(encoding.known[row], limits.terms, encoding.concepts[row].head)
    faults = {
        *limits.rules.faults(text, limits.terms),
        *({"duplicate"} if brand.spoken(text) in limits.taken else ()),
        *({"short"} if not brand.spoken(text) else ()),
    }
    return _Candidate(text, 0, frozenset(faults))


def _cut(written: _Generated, limits: _Limits) -> Iterator[tuple[str, bool]]:
    """A text and whether it is finished; where it is too long, also its first sentences alone."""
    yield written.text, written.finished
    is_too_long = limits.rules.exceeds(written.text, limits.terms)
    if limits.rules.is_length_bounded and (is_too_long or not written.finished):
        sentences = re.findall(r"\S.*?[.!?]+(?=\s|$)", written.text)
        for count in range(len(sentences), 0, -1):
            yield " ".join(sentences[:count]), True


class _Watch:
    """Keeps brand rules while the texts of a tile are written.

    Each text so far is free of forbidden phrases, as it would be printed if it ended there, and its
    end adds nothing to it: so is each whole text. given_up: places in the tile of texts that could
    not go on, or that are too long already.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Sequence[_Limits]) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.ids: list[list[int]] = [[] for _ in limits]
        self.open = [place for place, limit in enumerate(limits) if limit.rules.bind_early]
        self.given_up: set[int] = set()

    def choose(self, log_probs_BV: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """The next token of each row. draw: what the rows would have, by log-probabilities."""
        tokens_B = draw(log_probs_BV)
        if not self.open:
            return tokens_B
        log_probs_BV, pending = log_probs_BV.clone(), self.open
        texts: dict[int, str] = {}
        for _ in range(REFUSALS):
            tokens = tokens_B.tolist()
            texts |= {place: self._text([*self.ids[place], tokens[place]]) for place in pending}
            pending = [p for p in pending if not self.limits[p].rules.allows(texts[p])]
            if not pending:
                break
            for place in pending:
                log_probs_BV[place, tokens[place]] = -torch.inf
            # of the few tokens that go on with a word, none may be left
            stuck = [p for p in pending if not log_probs_BV[p].isfinite().any()]
            if stuck:
                self.given_up.update(stuck)
                log_probs_BV[stuck] = 0.0
                pending = [p for p in pending if p not in self.given_up]
            tokens_B = draw(log_probs_BV)  # a row that was allowed gets the same again
        self.given_up.update(pending)
        tokens = tokens_B.tolist()
        for place in self.open:
            limit = self.limits[place]
            if place in self.given_up or limit.rules.exceeds(texts[place], limit.terms):
                self.given_up.add(place)
                tokens[place] = tokens_B[place] = EOS
            self.ids[place].append(tokens[place])
        self.open = [place for place in self.open if tokens[place] != EOS]
        return tokens_B

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([token for token in ids if token != EOS])).strip()


def _draw(
    log_probs_BV: Tensor, uniform_B: Tensor, greedy_B: Tensor, decoding: Decoding,
    frequency_V: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A token for each row by inverting the distribution at the row's uniform number.

    frequency_V: logarithm of each token's share of the training text. In the order of the
    vocabulary, not of the probabilities: of two that are nearly equal, the last bits would decide
    which comes first, and with it which token is drawn.
    """
    if decoding.max_surprise and frequency_V is not None:
        misplaced = log_probs_BV < frequency_V - decoding.max_surprise
        misplaced.scatter_(1, log_probs_BV.argmax(-1, keepdim=True), False)  # one must be left
        log_probs_BV = log_probs_BV.masked_fill(misplaced, -torch.inf)
    probabilities = (log_probs_BV / decoding.temperature).softmax(-1)
    if decoding.top_k or decoding.top_p < 1:
        sorted_BK, order = probabilities.topk(decoding.top_k or probabilities.shape[-1])
        sorted_BK = sorted_BK / sorted_BK.sum(-1, keepdim=True)
        before = sorted_BK.cumsum(-1) - sorted_BK
        kept = torch.where(before < decoding.top_p, sorted_BK, 0.0)  # the first is always kept
        probabilities = torch.zeros_like(probabilities).scatter(1, order, kept)
    cumulative = probabilities.cumsum(-1)
    # never a token of probability 0 that follows the last one with more
    last = probabilities.shape[-1] - 1 - probabilities.flip(-1).ne(0).int().argmax(-1)
    drawn = torch.searchsorted(cumulative, (uniform_B * cumulative[:, -1])[:, None], right=True)
    drawn = torch.minimum(drawn.squeeze(1), last)
    return torch.where(greedy_B, log_probs_BV.argmax(-1), drawn)
