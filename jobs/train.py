"""Trains a captioner on a catalogue with formal descriptions and plain colloquial sentences.

    python -m jobs.train --catalog catalog.csv --colloquial sentences.txt --output model/
    python -m jobs.train --catalog … --colloquial reviews.csv --colloquial humorous=funny.txt …
    python -m jobs.train --workers 1,8 …            as many of 1 to 8 as the cluster has at a time
    python -m jobs.train            a demonstration: a tiny model, in minutes, on drawn products

Stages: the vision backbone on the catalogue's attributes; likelihood on both roads (describe: image
→ formal description; rewrite: description and image → sentence); then the adversarial stage, in
which a discriminator that reads the sentences teaches the generator their voice. To resume, run the
same command again: it goes on from the last checkpoint under OUTPUT/training. With --workers 0 the
loops run in this process, without Ray; with more, one process a worker under Ray Train, each on a
GPU where the cluster has any. With MIN,MAX a cluster that loses machines trains on with those that
are left, from the last checkpoint, and takes in new ones later; a step is the same number of
samples with any number of workers.

The catalogue is a CSV or Parquet table: `image` (a path relative to it, or a URI), `description`
(formal), and where there are any `title` (other formal texts to start from), `type`, `colour`,
`gender` (attributes for the backbone; else found in the description) and `split` (`val` rows are
only measured on). Sentences are a text file, one a line, or a table with a `text` column. `samples`
stands for the drawn sample catalogue, `embedded` for the project's own colloquial corpus. Rows of a
sentence table with a `description` are examples of what to say of such a product, as jobs.distil
writes them: they are learned from, and are no people's. With a column `fit` somebody has read them:
those of 1 are learned from, in the rounds those of 0 become unlikelier, and rows without a
description only say what `--judged` is for.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

from stylegan import corpora
from stylegan.adversarial import train_adversarial, train_critic
from stylegan.captioner import (
    Captioner,
    Decoding,
    open_model,
    save_model,
    token_frequency,
)  # fmt: skip
from stylegan.catalog import resolve_filesystem
from stylegan.discriminator import Discriminator
from stylegan.generator import PRESETS, Generator, GeneratorConfig, begin_language
from stylegan.images import decode_image
from stylegan.losses import LOSSES
from stylegan.rounds import train_rounds
from stylegan.rules import Rules
from stylegan.samples import write_samples
from stylegan.teacher import Proofreader
from stylegan.training import (
    Curves,
    NonFiniteLoss,
    Process,
    TrainingConfig,
    image_features,
    train_backbone,
    train_likelihood,
)

ATTRIBUTES = ("type", "colour", "gender")
SAMPLES, EMBEDDED = "samples", "embedded"  # the package's own catalogue and sentences
# what `python -m jobs.train` without a catalogue does, in minutes on two cores
DEMONSTRATION: dict[str, Any] = {
    "catalog": SAMPLES, "colloquial": [EMBEDDED], "output": "models/tiny", "preset": "tiny",
    "backbone_epochs": 12, "likelihood_steps": 1500, "likelihood_rate": 2e-3, "dropout": 0.2,
    "adversarial_steps": 120, "adversarial_rate": 3e-4, "discriminator_rate": 3e-4,
    "report_every": 100, "critic_captions": 3000,
}  # fmt: skip
# how a trained model draws its captions: see README, Measured
LEAST_JUDGED = 50  # captions of each verdict
DELIVERED = {"temperature": 0.9, "max_surprise": 1.5, "selectivity": 5.0, "max_candidates": 20}
# sentences left out of all training, to choose weights by and to watch the game with: one in so
# many, and of those that name a product
DEV_SHARE, DEV_NAMED = 32, 8
MIN_SENTENCES = 100


class InputError(ValueError):
    """Input that cannot be trained on: what, the value, the remedy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """What the loops read. pixels [N, S, S, 3] uint8 are the catalogue's images, held-out last."""

    pixels: np.ndarray
    num_train: int
    labels: dict[str, torch.Tensor]
    products: list[corpora.Product]
    voice: Voice
    unreadable: int


@dataclasses.dataclass(frozen=True, slots=True)
class Voice:
    """All sentences. By style: sentences of people, support, dev (left out of all training), and
    written: examples with what they were written for. background: sentences of no style. unfit:
    written examples that were read and found unfit."""

    sentences: dict[str, list[str]]
    support: dict[str, list[str]]
    written: dict[str, list[corpora.Example]]
    background: list[str]
    unfit: list[corpora.Example]
    dev: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def pairs(self, products: list[corpora.Product], written_share: float) -> corpora.PseudoPairs:
        """What conditional examples are drawn from; products: those that are trained with."""
        written = {s: self.shown(rows, products) for s, rows in self.written.items()}
        return corpora.PseudoPairs(products, self.sentences, self.support, written, written_share)

    @staticmethod
    def shown(
        examples: list[corpora.Example], products: list[corpora.Product]
    ) -> list[corpora.Example]:
        """The examples, most of them with the photograph of a product that is described so."""
        random = np.random.default_rng(0)
        sold: dict[str, list[int]] = {}
        for product in products:
            for text in (product.description, *product.titles):
                sold.setdefault(text, []).append(product.image)

        def seen(example: corpora.Example) -> corpora.Example:
            images = sold.get(example.description, [])
            if not images or random.random() >= 0.85:  # as often as in PseudoPairs.condition
                return example
            return dataclasses.replace(example, image=images[random.integers(len(images))])

        return [seen(example) for example in examples]

    def rules(self, tokenizer: Tokenizer | None = None) -> Rules:
        """The rules that captions obey."""
        voices = (*self.sentences.values(), *self.support.values())
        return Rules.of((text for texts in voices for text in texts), tokenizer)


def read_table(uri: str) -> list[dict[str, str]]:
    """Rows of a text file, CSV or Parquet table, every value as text."""
    filesystem, path = resolve_filesystem(uri)
    try:
        if path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path, filesystem=filesystem)
        else:
            with filesystem.open_input_stream(path, compression="detect") as stream:
                data = stream.read()
            if not path.endswith((".csv", ".csv.gz")):
                return [
                    {"text": line} for line in data.decode("utf-8").splitlines() if line.strip()
                ]
            names = pyarrow.csv.open_csv(pa.BufferReader(data)).schema.names
            table = pyarrow.csv.read_csv(
                pa.BufferReader(data),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            )
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise InputError(f"{uri} cannot be read: {str(error).splitlines()[0]}") from error
    return [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for row in table.to_pylist()
    ]


def verdict(row: dict[str, str], number: int, source: str) -> bool:
    """Whether the caption of a row was found fit to print."""
    if row["fit"] not in ("0", "1"):
        raise InputError(
            f"{source}: row {number} has fit {row['fit']!r}; give 1 where a caption may be printed "
            "as it is and 0 where it may not"
        )
    return row["fit"] == "1"


def read_sentences(specs: list[str]) -> Voice:
    """[STYLE=]URI … → all sentences, none left out yet.

    A table may have a `tier` column: rows of tier `caption` are the voice, which the discriminator
    takes for real; rows of tier `support` are in the style and teach what the voice is silent of;
    the others only teach the language. Rows with a `description` are written examples. A column
    `fit` says that they were read: 1, fit to print, 0, not.
    """
    sentences: dict[str, list[str]] = {}
    support: dict[str, list[str]] = {}
    written: dict[str, list[corpora.Example]] = {}
    unfit: list[corpora.Example] = []
    background: list[str] = []
    for spec in specs:
        style, _, uri = spec.rpartition("=") if "=" in spec.split("/")[0] else ("", "", spec)
        style = style or "colloquial"
        own = uri == EMBEDDED
        rows = [{"text": t} for t in corpora.embedded_corpus()] if own else read_table(uri)
        if not rows:
            raise InputError(f"--colloquial {spec}: the file is empty; give one sentence a line")
        if "text" not in rows[0]:
            raise InputError(
                f"--colloquial {spec}: no column 'text' among {', '.join(rows[0])}; name it so"
            )
        fit = written.setdefault(style, [])
        for number, row in enumerate(rows, 1):
            is_fit = "fit" not in row or verdict(row, number, f"--colloquial {spec}")
            if row.get("description"):
                text = corpora.normalise(row["text"])
                (fit if is_fit else unfit).append(corpora.Example(text, style, row["description"]))
        # what was read is no person's, even where nobody knows what it was written for
        rows = [row for row in rows if not row.get("description") and "fit" not in row]
        for tier, kept in (("caption", sentences), ("support", support)):
            texts = [row["text"] for row in rows if row.get("tier", "caption") == tier]
            kept.setdefault(style, []).extend(texts)
        for row in rows:
            text = corpora.normalise(row["text"])
            if row.get("tier") != "phrase" and 3 <= len(text.split()) <= 24:
                background.append(text)
    return Voice(sentences, support, written, background, unfit)


def read_rows(uri: str) -> list[dict[str, str]]:
    """The catalogue's rows, held-out ones last."""
    rows = read_table(uri)
    if not rows:
        raise InputError(f"--catalog {uri} has no rows")
    for column in ("image", "description"):
        if column not in rows[0]:
            raise InputError(
                f"--catalog {uri}: no column {column!r} among {', '.join(rows[0])}; rename yours"
            )
    rows.sort(key=lambda row: row.get("split") == "val")  # stable
    return rows


def products_of(rows: list[dict[str, str]]) -> list[corpora.Product]:
    """What the catalogue says of each row."""
    return [
        corpora.Product(index, row["description"], (row["title"],) if row.get("title") else ())
        for index, row in enumerate(rows)
    ]


def read_catalog(uri: str, image_size: int, cache: Path, voice: Voice) -> Data:
    """The catalogue's rows and decoded images; images that cannot be decoded are left out."""
    if uri == SAMPLES:
        uri = str(write_samples(cache / "samples", count=1200, seed=1))
    rows = read_rows(uri)
    base = uri.rsplit("/", 1)[0] if "/" in uri else "."

    def load(row: dict[str, str]) -> np.ndarray | None:
        image = row["image"]
        full = image if image.startswith("/") or "://" in image else f"{base}/{image}"
        try:
            filesystem, path = resolve_filesystem(full)
            with filesystem.open_input_stream(path) as stream:
                return decode_image(stream.read(), image_size).pixels
        except OSError:
            return None

    digest = hashlib.sha256(json.dumps([rows, image_size]).encode()).hexdigest()[:16]
    stored = cache / f"pixels-{digest}.npz"
    if stored.exists():
        with np.load(stored) as archive:
            pixels, kept = archive["pixels"], archive["kept"]
    else:
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            images = list(pool.map(load, rows))
        kept = np.array([i for i, image in enumerate(images) if image is not None], dtype=int)
        if not len(kept):
            raise InputError(
                f"--catalog {uri}: none of {len(rows)} images can be read, the first is "
                f"{rows[0]['image']!r}; paths are relative to the catalogue"
            )
        pixels = np.stack([image for image in images if image is not None])
        cache.mkdir(parents=True, exist_ok=True)
        partial = stored.with_name(f"partial-{os.getpid()}.npz")
        np.savez(partial, pixels=pixels, kept=kept)
        partial.replace(stored)
    unreadable = len(rows) - len(kept)
    rows = [rows[i] for i in kept]
    num_train = sum(row.get("split") != "val" for row in rows)
    return Data(pixels, num_train, attribute_labels(rows), products_of(rows), voice, unreadable)


def attribute_labels(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Class numbers [N] of each attribute, -1 unknown: from the columns, else the descriptions."""
    labels: dict[str, torch.Tensor] = {}
    for attribute in ATTRIBUTES:
        if attribute in rows[0]:
            values = [row[attribute] for row in rows]
        else:
            field = {"type": "head", "colour": "colours", "gender": "genders"}[attribute]
            concepts = [corpora.lexicon().concepts(row["description"]) for row in rows]
            values = [min(getattr(c, field), default="") for c in concepts]
        names = sorted(set(values) - {""})
        if len(names) > 1:
            numbers = {name: number for number, name in enumerate(names)}
            labels[attribute] = torch.tensor([numbers.get(value, -1) for value in values])
    if not labels:
        raise InputError(
            "no attribute differs between the catalogue's rows: add a column type, colour or "
            "gender, or descriptions that name them"
        )
    return labels


def prepare(arguments: argparse.Namespace, cache: Path) -> Data:
    """All training data, checked."""
    voice = read_voice(arguments.colloquial)
    return read_catalog(arguments.catalog, PRESETS[arguments.preset]["image_size"], cache, voice)


def read_voice(specs: list[str]) -> Voice:
    """All sentences, checked, and some of people's left out. Raises InputError."""
    voice = read_sentences(specs)
    sentences, support = voice.sentences, voice.support
    dev: dict[str, list[str]] = {}
    for style, texts in sentences.items():
        usable = sum(map(corpora.is_sayable, texts))
        if usable < MIN_SENTENCES:
            raise InputError(
                f"style {style!r}: {usable} of {len(texts)} sentences can be printed (no first "
                "person, orders, sizes or prices; 3 to 22 words), at least "
                f"{MIN_SENTENCES} are needed: add sentences to its file"
            )
        # by what is left with the topic hidden, so that no near copy stays in training
        numbers = [corpora.sentence_hash(text) for text in texts]
        named = [
            number
            for text, number in zip(texts, numbers, strict=True)
            if corpora.is_sayable(text) and corpora.names_kind(text)
        ]
        chosen = {n for n in numbers if n % DEV_SHARE == 0}
        chosen |= {n for n in named if n % DEV_NAMED == 0}
        chosen = chosen or {min(numbers)}
        dev[style] = [text for text, n in zip(texts, numbers, strict=True) if n in chosen]
        sentences[style] = [text for text, n in zip(texts, numbers, strict=True) if n not in chosen]
        support[style] = [t for t in support[style] if corpora.sentence_hash(t) not in chosen]
    hidden = {corpora.normalise(t) for texts in dev.values() for t in texts}
    background = [text for text in voice.background if text not in hidden]
    return dataclasses.replace(voice, background=background, dev=dev)


def build(config: TrainingConfig, data: Data) -> tuple[Generator, Tokenizer]:
    """A generator with random weights, and its tokeniser."""
    formal = [text for p in data.products[: data.num_train] for text in (p.description, *p.titles)]
    voice = (*data.voice.sentences.values(), *data.voice.support.values())
    sentences = [corpora.normalise(text) for texts in voice for text in texts]
    # sentences twice: the budget of the vocabulary belongs to what is written, not to brand names
    tokenizer = corpora.train_tokenizer(
        [*sentences, *sentences, *data.voice.background, *formal],
        PRESETS[config.preset]["vocab_size"],
    )
    torch.manual_seed(config.seed)
    model_config = GeneratorConfig.preset(
        config.preset, tokenizer.get_vocab_size(), ["formal", *data.voice.sentences], config.dropout
    )
    if not config.language:
        return Generator(model_config), tokenizer
    try:
        language = begin_language(
            Path(config.language), tokenizer, config.language_layers, config.dropout
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--language {config.language}: {error}; give a directory with the config.json, "
            "weights and tokenizer.json of an encoder or decoder of transformers"
        ) from error
    model_config.text_config = language.config
    return Generator(model_config, language=language), tokenizer


@dataclasses.dataclass(slots=True)
class Trained:
    """What a training makes. verdict: figures before and after the adversarial stage, if any."""

    captioner: Captioner
    curves: Curves
    verdict: dict[str, dict[str, float]] | None


def begin(config: TrainingConfig, data: Data) -> tuple[Generator, Tokenizer, Curves]:
    """The generator before the first stage: new, or from what --start or --backbone name."""
    start = config.start or config.backbone
    if not start:
        return *build(config, data), Curves()
    with open_model(None if start == "shipped" else start) as directory:
        trained = Generator.from_pretrained(directory, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        stored = directory / "curves.json"
        told = json.loads(stored.read_text()) if stored.exists() else {"rows": []}
    size = PRESETS[config.preset]["image_size"]
    if trained.config.image_size != size:
        raise InputError(
            f"{start} reads images of {trained.config.image_size} pixels, preset {config.preset!r} "
            f"of {size}: choose the preset that it was trained with"
        )
    stages = ("backbone", "likelihood") if config.start else ("backbone",)
    curves = Curves([row for row in told["rows"] if row["stage"].split()[0] in stages])
    if config.start:
        missing = [style for style in data.voice.sentences if style not in trained.config.styles]
        if missing:
            raise InputError(
                f"{start} does not know style {missing[0]!r}, it knows "
                f"{', '.join(trained.config.styles)}: leave --start out, or use --backbone"
            )
        return trained, tokenizer, curves
    generator, tokenizer = build(config, data)
    try:
        generator.vision.load_state_dict(trained.vision.state_dict())
    except RuntimeError as error:
        raise InputError(
            f"--backbone {start} has another shape than that of preset {config.preset!r}: choose "
            "the preset that it was trained with, or leave --backbone out"
        ) from error
    return generator, tokenizer, curves


def begin_discriminator(config: TrainingConfig, generator: Generator) -> Discriminator:
    """A discriminator that begins with the likelihood model or with what --discriminator names."""
    torch.manual_seed(config.seed)
    layers = config.discriminator_layers
    if not config.discriminator:
        return Discriminator.beside(generator, layers=layers)
    try:
        return Discriminator.pretrained(
            Path(config.discriminator), generator.config.styles, layers=layers
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--discriminator {config.discriminator}: {error}; give a directory with the "
            "config.json, weights and tokenizer.json of an encoder of transformers"
        ) from error


def begin_proofreader(
    directory: str, judged: Sequence[tuple[str, bool]], pairs: corpora.PseudoPairs, device: str
) -> Proofreader:
    """The proofreader of a directory, which learns the verdict of what was judged, if any was."""
    people = [text for style in pairs.plain for text in (pairs.people[style] or pairs.plain[style])]
    try:
        return Proofreader(Path(directory), people, device, judged)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--proofreader {directory}: {str(error).splitlines()[0]}; give a directory "
            "with the config.json, weights and tokenizer.json of a causal language model"
        ) from error


def read_judged(uri: str) -> list[tuple[str, bool]]:
    """Captions, and whether they were found fit to print."""
    rows = read_table(uri)
    for column in ("text", "fit"):
        if rows and column not in rows[0]:
            raise InputError(f"--judged {uri}: no column {column!r} among {', '.join(rows[0])}")
    judged = [(row["text"], verdict(row, n, f"--judged {uri}")) for n, row in enumerate(rows, 1)]
    good = sum(is_fit for _, is_fit in judged)
    if min(good, len(judged) - good) < LEAST_JUDGED:
        raise InputError(
            f"--judged {uri} has {good} captions that are fit to print and {len(judged) - good} "
            f"that are not; a verdict is learned from {LEAST_JUDGED} of each or more"
        )
    return judged


def fit(
    config: TrainingConfig, decoding: Decoding, data: Data, process: Process,
    resume: dict[str, Any] | None, save: Callable[[dict[str, Any], Curves], None],
    log: Callable[[str], None] = print,
) -> Trained:  # fmt: skip
    """All stages, from the beginning or from a checkpoint. decoding: of the model's captions."""
    generator, tokenizer, curves = begin(config, data)
    if resume is not None:
        curves = Curves(**resume["curves"])
        generator.vision.load_state_dict(resume["vision"])
    nn.Module.to(generator, process.device)
    generator.vision = generator.vision.to(memory_format=torch.channels_last)
    products = data.products[: data.num_train]
    pairs, rules = data.voice.pairs(products, config.written_share), data.voice.rules(tokenizer)

    def checkpoint(state: dict[str, Any]) -> None:
        # one dictionary for all that must survive
        told = dataclasses.asdict(curves)
        save({**state, "vision": generator.vision.state_dict(), "curves": told}, curves)

    stage = resume["stage"] if resume is not None else "backbone"
    train, held = slice(0, data.num_train), slice(data.num_train, None)
    if stage == "backbone":
        if not (config.backbone or config.start) and config.backbone_epochs > 0:
            train_backbone(
                generator, data.pixels[train], {k: v[train] for k, v in data.labels.items()},
                (data.pixels[held], {k: v[held] for k, v in data.labels.items()}), config,
                process=process, curves=curves, resume=resume, save=checkpoint, log=log,
            )  # fmt: skip
        stage, resume = "likelihood", None
    features = image_features(generator, data.pixels[train], process)
    if stage == "likelihood":
        if config.likelihood_steps > 0:
            train_likelihood(
                generator, tokenizer, pairs, data.voice.background, features,
                held_out_examples(products, data.voice.dev, config.seed), config, process=process,
                curves=curves, resume=resume, save=checkpoint, log=log,
            )  # fmt: skip
        stage, resume = "adversarial", None
    captioner = Captioner(
        generator, tokenizer, decoding, rules=rules, device=process.device,
        frequency=token_frequency(
            (text for texts in pairs.plain.values() for text in texts), tokenizer
        ),
    )  # fmt: skip
    verdict = None
    if config.adversarial_steps > 0 and stage != "rounds":
        verdict = train_adversarial(
            generator, begin_discriminator(config, generator).to(process.device), tokenizer, pairs,
            data.voice.dev, features, rules, config, process=process, curves=curves, resume=resume,
            save=checkpoint, log=log,
        )  # fmt: skip
        resume = None
    proofreader, fits_critic = None, config.critic_captions > 0 and process.rank == 0
    if config.proofreader and (config.rounds > 0 or (config.judged and fits_critic)):
        judged = read_judged(config.judged) if config.judged else []
        proofreader = begin_proofreader(config.proofreader, judged, pairs, process.device)
    if config.rounds > 0:
        reference = copy.deepcopy(generator)  # what discriminators of every round begin with
        rounds = train_rounds(
            generator, lambda: begin_discriminator(config, reference).to(process.device), tokenizer,
            pairs, data.voice.dev, features, rules, config, process=process, curves=curves,
            proofreader=proofreader, unfit=data.voice.shown(data.voice.unfit, products),
            resume=resume, save=checkpoint, log=log,
        )  # fmt: skip
        before = (verdict or rounds)["before"]  # of the game, too, what rounds also measure
        verdict = rounds | {"before": {name: before[name] for name in rounds["before"]}}
    if fits_critic:
        log(f"critic  learns from {config.critic_captions:,} captions of each style")
        captioner.critic = train_critic(
            captioner, pairs, data.voice.dev, features, config.critic_captions, config.seed,
            proofreader,
        )  # fmt: skip
    return Trained(captioner, curves, verdict)


def delivered(arguments: argparse.Namespace) -> Decoding:
    """How the model draws captions where nothing else is asked for."""
    names = [field.name for field in dataclasses.fields(Decoding)]
    return Decoding(**{k: value for k, value in vars(arguments).items() if k in names})


def held_out_examples(
    products: list[corpora.Product], dev: dict[str, list[str]], seed: int
) -> list[corpora.Example]:
    """The sentences that were left out, with products that they can be said of."""
    random = np.random.default_rng(seed)
    pairs = corpora.PseudoPairs(products, dev)
    return [
        pairs.paired_example(style, random)
        for style in dev
        for _ in range(2 * len(pairs.paired[style]))
    ] or [corpora.Example(corpora.normalise(t), s) for s, texts in dev.items() for t in texts]


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint; tensors and plain values only, nothing is unpickled."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def save_state(state: dict[str, Any], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def worker(settings: dict[str, Any]) -> None:
    """One process of Ray Train."""
    import ray.train
    from ray.train import Checkpoint

    arguments = argparse.Namespace(**settings["arguments"])
    config, process = TrainingConfig(**settings["config"]), Process.current()
    here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))

    def save(state: dict[str, Any], curves: Curves) -> None:
        metrics = {"stage": state["stage"], "step": state["step"]}
        if process.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            save_state(state, Path(directory) / "state.pt")
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))
        diagnostics.update(curves)

    def log(line: str) -> None:
        print(line, flush=True)

    try:
        data = prepare(arguments, Path(settings["cache"]))
        diagnostics = Diagnostics(arguments, config, data)
        last = ray.train.get_checkpoint()
        resume = None
        if last is not None:
            with last.as_directory() as directory:
                resume = load_state(Path(directory) / "state.pt")
        if process.rank == 0:
            since = f"from step {resume['step']} of {resume['stage']}" if resume else "anew"
            log(f"training {since} with {process.size} workers on {process.device}")
        trained = fit(config, delivered(arguments), data, process, resume, save, log)
    except (InputError, NonFiniteLoss) as error:
        # every process is here, for the same reason: trying again would end the same way
        if process.rank == 0:
            _write(arguments.output, FAILURE, f"{type(error).__name__}: {error}".encode())
        return
    if process.rank == 0:
        publish(arguments, config, trained, diagnostics)


FAILURE = "training/failure.txt"  # why the workers gave up, for the driver to tell


def _write(output: str, name: str, data: bytes) -> None:
    """Writes a file below the output, locally or on object storage."""
    filesystem, target = resolve_filesystem(output)
    path = f"{target}/{name}"
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


class Diagnostics:
    """What a person watches while it trains, in the output: `training.html` (curves, rollbacks,
    captions of the same products over time) and `tensorboard/`."""

    def __init__(self, arguments: argparse.Namespace, config: TrainingConfig, data: Data) -> None:
        from stylegan.tensorboard import TensorBoard

        self.output, self.config, self.data = arguments.output, config, data
        self.is_local = "://" not in self.output
        parent = self.output if self.is_local else tempfile.mkdtemp(prefix="stylegan-training-")
        self.folder = Path(parent) / "tensorboard"
        self.board, self.told = TensorBoard(self.folder), 0

    def update(self, curves: Curves, verdict: dict[str, dict[str, float]] | None = None) -> None:
        """Tells what came since the last time. verdict: when the training has ended."""
        from stylegan.training_page import write_training_page  # slow to import

        for row in curves.rows[self.told :]:
            values = {k: v for k, v in row.items() if k not in ("stage", "step")}
            self.board.add(str(row["stage"]), int(row["step"]), values)
        self.told = len(curves.rows)
        if not self.is_local:
            for path in self.folder.rglob("*"):
                if path.is_file():
                    name = f"tensorboard/{path.relative_to(self.folder).as_posix()}"
                    _write(self.output, name, path.read_bytes())
        products = [{**p, "image": self._picture(p["image"])} for p in curves.products]
        with tempfile.TemporaryDirectory() as scratch:
            page = Path(scratch) / "training.html"
            write_training_page(
                page, title=f"Training of {Path(self.output).name}", rows=curves.rows,
                events=curves.events, products=products, samples=curves.samples,
                configuration=dataclasses.asdict(self.config), verdict=verdict,
            )  # fmt: skip
            _write(self.output, page.name, page.read_bytes())

    def _picture(self, index: int) -> bytes | None:
        if index < 0:
            return None
        buffer = io.BytesIO()
        Image.fromarray(self.data.pixels[index]).save(buffer, "JPEG")
        return buffer.getvalue()


def publish(
    arguments: argparse.Namespace, config: TrainingConfig, trained: Trained,
    diagnostics: Diagnostics,
) -> None:  # fmt: skip
    """Writes the model directory, locally or on object storage; `metrics.json` comes last."""
    from stylegan.cards import model_card
    from stylegan.curves import plot_curves  # slow to import, needed once

    curves = trained.curves
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        save_model(directory, trained.captioner)
        settings = dataclasses.asdict(config)
        metrics: dict[str, Any] = {
            f"held_out_{name}_accuracy": row[name]
            for row in curves.rows
            if row["stage"] == "backbone held-out"
            for name in ATTRIBUTES
            if name in row
        }
        nats = [r["nats_per_token"] for r in curves.rows if r["stage"] == "likelihood held-out"]
        if nats:
            metrics["held_out_nats_per_token"] = min(nats)
        if trained.verdict is not None:
            metrics["watched_while_training"] = trained.verdict
        notes = (arguments.notes and Path(arguments.notes).read_text()) or ""
        (directory / "README.md").write_text(model_card(metrics, settings, notes), encoding="utf-8")
        (directory / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        (directory / "curves.json").write_text(json.dumps(dataclasses.asdict(curves)) + "\n")
        plot_curves(curves.rows, directory / "curves.png", curves.events)
        (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        diagnostics.update(curves, trained.verdict)
        diagnostics.board.close()
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "metrics.json"):
            _write(arguments.output, path.name, path.read_bytes())


def choose_workers(
    asked: tuple[int, int], cpus: float, gpus: float, is_local: bool
) -> tuple[int | tuple[int, int], bool]:
    """How many workers for --workers MIN,MAX, or between what, and whether each has a GPU.

    A machine of its own neither grows nor shrinks: there the number is fixed, by its GPUs, else its
    CPUs. Raises InputError when there are not enough.
    """
    least, most = asked
    there, kind = (int(gpus), "GPUs") if gpus else (int(cpus), "CPUs")
    if there < least:
        raise InputError(
            f"--workers asks for {least}, and there are {there} {kind}, one for each: lower it"
            + ("" if is_local else ", or wait until the machines are up")
        )
    if is_local:
        return min(most, there), bool(gpus)
    return (least if least == most else (least, most)), bool(gpus)


RESIZE_S = 300.0  # between two looks for new machines; taking one in costs the steps since a save
# A lost machine is a failure among these; what fails each time ends within minutes.
MAX_FAILURES = 20


def train_with_ray(arguments: argparse.Namespace, config: TrainingConfig, cache: Path) -> None:
    """The same stages in `--workers` processes; a killed worker is replaced and goes on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from stylegan.cluster import ClusterError, check_visible

    cores = os.cpu_count() or 1
    on_cluster = bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()
    if not ray.is_initialized():
        local_cpus = max(cores, arguments.workers[0] + 2)
        ray.init(
            # "local", else it would join whatever Ray was last started on this machine
            **({} if on_cluster else {"address": "local", "num_cpus": local_cpus}),
            include_dashboard=None if on_cluster else False,
            logging_level=logging.WARNING,
        )
    there = ray.cluster_resources()
    cpus = there.get("CPU", 0.0) if on_cluster else max(cores, arguments.workers[0])
    workers, use_gpu = choose_workers(
        arguments.workers, cpus, there.get("GPU", 0.0), is_local=not on_cluster
    )
    settings = {
        "arguments": vars(arguments),
        "config": dataclasses.asdict(config),
        "cache": str(cache),
    }
    storage = (
        arguments.output if "://" in arguments.output else str(Path(arguments.output).resolve())
    )
    if "://" not in storage:
        os.makedirs(storage, exist_ok=True)
    inputs = {spec.rpartition("=")[2] for spec in arguments.colloquial} - {EMBEDDED}
    paths = {"--output": storage} | {f"--colloquial {path}": path for path in inputs}
    if arguments.catalog != SAMPLES:
        paths["--catalog"] = arguments.catalog
    try:
        check_visible({flag: path for flag, path in paths.items() if "://" not in path})
    except ClusterError as error:
        raise InputError(str(error)) from error
    # The run's name is its configuration: the same command finds its checkpoints, another does not.
    # How many train is no part of it.
    named = {key: value for key, value in vars(arguments).items() if key != "workers"}
    name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]
    trainer = TorchTrainer(
        worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(  # V2's; the types are those of V1
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=RESIZE_S,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=name,
            storage_path=f"{storage}/training",
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    filesystem, target = resolve_filesystem(arguments.output)
    failure = f"{target}/{FAILURE}"
    if filesystem.get_file_info(failure).is_file:
        filesystem.delete_file(failure)
    trainer.fit()
    if filesystem.get_file_info(failure).is_file:
        with filesystem.open_input_stream(failure) as stream:
            kind, _, why = stream.read().decode().partition(": ")
        raise InputError(why) if kind == "InputError" else NonFiniteLoss(why)


def train_here(arguments: argparse.Namespace, config: TrainingConfig, cache: Path) -> None:
    """The same stages in this process, without Ray."""
    if "://" in arguments.output:
        raise InputError(
            f"--workers 0 keeps its checkpoint on disk, --output is {arguments.output}"
        )
    process = Process.current()
    path = Path(arguments.output) / "training" / "state.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = load_state(path) if path.exists() else None
    if state is not None and state["config"] != dataclasses.asdict(config):
        raise InputError(
            f"{path} belongs to another configuration: give another --output or remove it"
        )
    data = prepare(arguments, cache)

    def save(state: dict[str, Any], curves: Curves) -> None:
        save_state({**state, "config": dataclasses.asdict(config)}, path)
        diagnostics.update(curves)

    diagnostics = Diagnostics(arguments, config, data)
    trained = fit(
        config, delivered(arguments), data, process, state, save,
        lambda line: print(line, flush=True),
    )  # fmt: skip
    publish(arguments, config, trained, diagnostics)


def show(output: str) -> None:
    """Prints captions before and after the adversarial stage, and what a detector makes of them."""
    filesystem, target = resolve_filesystem(output)
    told = {}
    for name in ("curves", "metrics"):
        with filesystem.open_input_stream(f"{target}/{name}.json") as stream:
            told[name] = json.loads(stream.read())
    samples, verdict = told["curves"]["samples"], told["metrics"].get("watched_while_training")
    if not verdict:
        return
    best = max(
        (e["step"] for e in told["curves"]["events"] if e["kind"] == "snapshot"), default=0
    )
    after = next(row for row in samples if row["step"] == best)
    for number, product in enumerate(told["curves"]["products"]):
        print(f"\n{product['description']}")
        print(f"  before  {samples[0]['captions'][number]}")
        print(f"  after   {after['captions'][number]}")
    print()
    for name in sorted({key for row in verdict.values() for key in row}):
        print(f"{name:24} {verdict['before'][name]:8.3f} → {verdict['after'][name]:8.3f}")
    print("\nauc: how easily a detector that was not trained against tells captions from people's;")
    print(".5 not at all, 1 always. Named, contradiction: of the product's kind, colour, gender.")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--catalog", help="table of images and formal descriptions, or `samples`; without: a "
        "demonstration",
    )  # fmt: skip
    parser.add_argument(
        "--colloquial", nargs="+", action="extend", metavar="[STYLE=]URI",
        help="sentences of a style: a text file, one a line, or a table with a text column, or "
        "`embedded`",
    )  # fmt: skip
    parser.add_argument("--output", help="model directory, on disk or s3://")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS), help="model size")
    parser.add_argument(
        "--workers", type=_workers, default="1", metavar="N|MIN,MAX",
        help="processes, a GPU each where there are any; 0: without Ray",
    )  # fmt: skip
    for setting in dataclasses.fields(Decoding):
        if setting.name != "max_new_tokens":  # the generator's own length
            parser.add_argument(
                f"--{setting.name.replace('_', '-')}", type=type(setting.default),
                default=DELIVERED.get(setting.name, setting.default),
                help="of the model's captions, see stylegan.captioner.Decoding",
            )  # fmt: skip
    parser.add_argument("--notes", help="a Markdown file that goes into the model card")
    for field in dataclasses.fields(TrainingConfig):
        if field.name != "preset":
            kind = type(field.default)
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=kind, default=field.default,
                choices=sorted(LOSSES) if field.name == "loss" else None,
                help="see stylegan.training.TrainingConfig",
            )  # fmt: skip
    return parser


def _workers(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    if not (low.isdecimal() and (high or low).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 up, or MIN,MAX")
    pair = int(low), int(high or low)
    if pair[0] > pair[1] or (pair[0] == 0 and pair[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: MIN is from 1 to MAX")
    return pair


def main() -> int:
    options = parser()
    arguments = options.parse_args()
    if not arguments.catalog and not arguments.colloquial:
        options.set_defaults(**DEMONSTRATION)
        arguments = options.parse_args()
        arguments.colloquial = DEMONSTRATION["colloquial"]
    for flag in ("catalog", "colloquial", "output"):
        if not getattr(arguments, flag):
            print(f"error: --{flag} is missing; see --help", file=sys.stderr)
            return 2
    for stage in ("backbone", "likelihood", "adversarial"):
        if (batch := getattr(arguments, f"{stage}_batch")) < arguments.workers[1]:
            print(
                f"error: --{stage}-batch is {batch}, and --workers {arguments.workers[1]}: each "
                "worker needs a part of it", file=sys.stderr,
            )  # fmt: skip
            return 2
    if arguments.group_size < 2:
        print(
            f"error: --group-size is {arguments.group_size}: choose 2 or more, each caption is "
            "compared with the others of its product", file=sys.stderr,
        )  # fmt: skip
        return 2
    # workers may run in another directory
    for name in ("start", "backbone", "language", "discriminator", "proofreader", "judged"):
        uri = getattr(arguments, name)
        if uri and "://" not in uri and uri != "shipped":
            setattr(arguments, name, str(Path(uri).resolve()))
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(arguments, name) for name in names})
    if "://" not in arguments.catalog and arguments.catalog != SAMPLES:
        arguments.catalog = str(Path(arguments.catalog).resolve())
    arguments.colloquial = [
        spec if "://" in spec else _absolute(spec) for spec in arguments.colloquial
    ]
    cache = Path(tempfile.gettempdir()) / "stylegan-pixels"
    try:
        if config.judged:  # now, and not after hours
            if not config.proofreader:
                raise InputError("--judged needs a --proofreader, which learns from it")
            read_judged(config.judged)
        if arguments.workers[1]:
            train_with_ray(arguments, config, cache)
        else:
            train_here(arguments, config, cache)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteLoss, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(arguments.output)
    print(f"model written to {arguments.output}")
    return 0


def _absolute(spec: str) -> str:
    style, equals, path = spec.rpartition("=")
    if path == EMBEDDED:
        return spec
    return f"{style}{equals}{Path(path).resolve()}"


if __name__ == "__main__":
    # As a module, so that workers import `worker` instead of getting it pickled: Ray replaces print
    # when a worker's first line comes, and a function with print as its default cannot be pickled.
    from jobs.train import main as run_main

    sys.exit(run_main())
