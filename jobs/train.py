"""Trains a captioner on a catalogue with formal descriptions and plain colloquial sentences.

    python -m jobs.train --catalog catalog.csv --colloquial sentences.txt --output model/

Stages: the vision backbone on the catalogue's attributes, then likelihood on both roads (describe:
image → formal description; rewrite: description and image → sentence). To resume, run the same
command again: it goes on from the last checkpoint under OUTPUT/training. With --workers 0 the loops
run in this process, without Ray; with more, one process a worker under Ray Train.

The catalogue is a CSV or Parquet table: `image` (a path relative to it, or a URI), `description`
(formal), and where there are any `title` (other formal texts to start from), `type`, `colour`,
`gender` (attributes for the backbone; else found in the description) and `split` (`val` rows are
only measured on). Sentences are a text file, one a line, or a table with a `text` column.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from tokenizers import Tokenizer
from torch import nn

from stylegan import corpora
from stylegan.captioner import Decoding, save_model
from stylegan.catalog import resolve_filesystem
from stylegan.generator import PRESETS, Generator, GeneratorConfig
from stylegan.images import decode_image
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
# a 32nd of the sentences is left out of training, to choose the weights on
DEV_SHARE = 32
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
    sentences: dict[str, list[str]]
    background: list[str]
    dev: dict[str, list[str]]
    unreadable: int


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


def read_sentences(specs: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """[STYLE=]URI … → sentences by style, and background text.

    A table may have a `tier` column: rows of tier `caption` are in the style, others only teach
    the language.
    """
    sentences: dict[str, list[str]] = {}
    background: list[str] = []
    for spec in specs:
        style, _, uri = spec.rpartition("=") if "=" in spec.split("/")[0] else ("", "", spec)
        rows = read_table(uri)
        if not rows:
            raise InputError(f"--colloquial {spec}: the file is empty; give one sentence a line")
        if "text" not in rows[0]:
            raise InputError(
                f"--colloquial {spec}: no column 'text' among {', '.join(rows[0])}; name it so"
            )
        texts = [row["text"] for row in rows if row.get("tier", "caption") == "caption"]
        sentences.setdefault(style or "colloquial", []).extend(texts)
        for row in rows:
            text = corpora.normalise(row["text"])
            if row.get("tier") != "phrase" and 3 <= len(text.split()) <= 24:
                background.append(text)
    return sentences, background


def read_catalog(uri: str, image_size: int, cache: Path) -> Data:
    """The catalogue's rows and decoded images; images that cannot be decoded are left out."""
    rows = read_table(uri)
    if not rows:
        raise InputError(f"--catalog {uri} has no rows")
    for column in ("image", "description"):
        if column not in rows[0]:
            raise InputError(
                f"--catalog {uri}: no column {column!r} among {', '.join(rows[0])}; rename yours"
            )
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

    rows.sort(key=lambda row: row.get("split") == "val")  # stable: held-out rows last
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
    products = [
        corpora.Product(index, row["description"], (row["title"],) if row.get("title") else ())
        for index, row in enumerate(rows)
    ]
    return Data(pixels, num_train, attribute_labels(rows), products, {}, [], {}, unreadable)


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
    sentences, background = read_sentences(arguments.colloquial)
    size = PRESETS[arguments.preset]["image_size"]
    data = read_catalog(arguments.catalog, size, cache)
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
        chosen = {n for n in numbers if n % DEV_SHARE == 0} or {min(numbers)}
        dev[style] = [text for text, n in zip(texts, numbers, strict=True) if n in chosen]
        sentences[style] = [text for text, n in zip(texts, numbers, strict=True) if n not in chosen]
    hidden = {corpora.normalise(t) for texts in dev.values() for t in texts}
    background = [text for text in background if text not in hidden]
    return dataclasses.replace(data, sentences=sentences, background=background, dev=dev)


def build(config: TrainingConfig, data: Data) -> tuple[Generator, Tokenizer]:
    """A generator with random weights, and its tokeniser."""
    formal = [text for p in data.products[: data.num_train] for text in (p.description, *p.titles)]
    sentences = [corpora.normalise(t) for texts in data.sentences.values() for t in texts]
    # sentences twice: the budget of the vocabulary belongs to what is written, not to brand names
    tokenizer = corpora.train_tokenizer(
        [*sentences, *sentences, *data.background, *formal],
        PRESETS[config.preset]["vocab_size"],
    )
    torch.manual_seed(config.seed)
    model_config = GeneratorConfig.preset(
        config.preset, tokenizer.get_vocab_size(), ["formal", *data.sentences]
    )
    return Generator(model_config), tokenizer


def fit(
    config: TrainingConfig, data: Data, process: Process, resume: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None], log: Callable[[str], None] = print,
) -> tuple[Generator, Tokenizer, Curves]:  # fmt: skip
    """All stages, from the beginning or from a checkpoint."""
    generator, tokenizer = build(config, data)
    nn.Module.to(generator, process.device)
    generator.vision = generator.vision.to(memory_format=torch.channels_last)
    curves = Curves(resume["curves"] if resume else [])
    products = data.products[: data.num_train]
    pairs = corpora.PseudoPairs(products, data.sentences)
    random = np.random.default_rng(config.seed)
    dev_pairs = corpora.PseudoPairs(products, data.dev)
    dev = [
        dev_pairs.paired_example(style, random)
        for style in data.dev
        for _ in range(2 * len(dev_pairs.paired[style]))
    ] or [corpora.Example(corpora.normalise(t), s) for s, texts in data.dev.items() for t in texts]

    def checkpoint(state: dict[str, Any]) -> None:
        # one dictionary for all that must survive; the adversarial stage adds the discriminator
        save({**state, "vision": generator.vision.state_dict(), "curves": curves.rows})

    train, held = slice(0, data.num_train), slice(data.num_train, None)
    if resume is not None:
        generator.vision.load_state_dict(resume["vision"])
    if resume is None or resume["stage"] == "backbone":
        train_backbone(
            generator, data.pixels[train], {k: v[train] for k, v in data.labels.items()},
            (data.pixels[held], {k: v[held] for k, v in data.labels.items()}), config,
            process=process, curves=curves, resume=resume, save=checkpoint, log=log,
        )  # fmt: skip
        resume = None
    features = image_features(generator, data.pixels[train], process)
    train_likelihood(
        generator, tokenizer, pairs, data.background, features, dev, config,
        process=process, curves=curves, resume=resume, save=checkpoint, log=log,
    )  # fmt: skip
    return generator, tokenizer, curves


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
    process = Process.current()
    torch.set_num_threads(settings["threads"])
    data = prepare(arguments, Path(settings["cache"]))
    last = ray.train.get_checkpoint()
    resume = None
    if last is not None:
        with last.as_directory() as directory:
            resume = load_state(Path(directory) / "state.pt")

    def save(state: dict[str, Any]) -> None:
        metrics = {"stage": state["stage"], "step": state["step"]}
        if process.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            save_state(state, Path(directory) / "state.pt")
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))

    def log(line: str) -> None:
        print(line, flush=True)

    generator, tokenizer, curves = fit(
        TrainingConfig(**settings["config"]), data, process, resume, save, log
    )
    if process.rank == 0:
        publish(arguments, TrainingConfig(**settings["config"]), generator, tokenizer, data, curves)


def publish(
    arguments: argparse.Namespace, config: TrainingConfig, generator: Generator,
    tokenizer: Tokenizer, data: Data, curves: Curves,
) -> None:  # fmt: skip
    """Writes the model directory, locally or on object storage; `metrics.json` comes last."""
    from stylegan.report import model_card, plot_curves  # slow to import, needed once

    filesystem, target = resolve_filesystem(arguments.output)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        decoding = Decoding(
            arguments.temperature, arguments.top_p, arguments.top_k, candidates=arguments.candidates
        )
        seen = [text for texts in data.sentences.values() for text in texts]
        save_model(directory, generator.cpu(), tokenizer, decoding, seen)
        settings = dataclasses.asdict(config)
        metrics = {
            "held_out_nats_per_token": min(
                row["nats_per_token"]
                for row in curves.rows
                if row["stage"] == "likelihood held-out"
            ),
            **{
                f"held_out_{name}_accuracy": row[name]
                for row in curves.rows
                if row["stage"] == "backbone held-out"
                for name in ATTRIBUTES
                if name in row
            },
        }
        card = model_card(
            metrics, settings, (arguments.notes and Path(arguments.notes).read_text()) or ""
        )
        (directory / "README.md").write_text(card, encoding="utf-8")
        (directory / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        (directory / "curves.json").write_text(json.dumps(curves.rows) + "\n")
        plot_curves(curves.rows, directory / "curves.png")
        (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        filesystem.create_dir(target, recursive=True)
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "metrics.json"):
            with filesystem.open_output_stream(f"{target}/{path.name}") as stream:
                stream.write(path.read_bytes())


def train_with_ray(arguments: argparse.Namespace, config: TrainingConfig, cache: Path) -> None:
    """The same stages in `--workers` processes; a killed worker is replaced and goes on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cores = os.cpu_count() or 1
    if not ray.is_initialized():
        on_cluster = bool(os.environ.get("RAY_ADDRESS"))
        ray.init(
            **({} if on_cluster else {"num_cpus": max(cores, arguments.workers + 2)}),
            include_dashboard=None if on_cluster else False,
            logging_level=logging.WARNING,
        )
    use_gpu = ray.cluster_resources().get("GPU", 0) >= arguments.workers
    settings = {
        "arguments": vars(arguments),
        "config": dataclasses.asdict(config),
        "cache": str(cache),
        "threads": max(1, cores // arguments.workers),
    }
    storage = (
        arguments.output if "://" in arguments.output else str(Path(arguments.output).resolve())
    )
    # the run's name is its configuration: the same command finds its checkpoints, another does not
    name = hashlib.sha256(json.dumps(settings["arguments"], sort_keys=True).encode()).hexdigest()[
        :12
    ]
    trainer = TorchTrainer(
        worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=name,
            storage_path=f"{storage}/training",
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


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

    def save(state: dict[str, Any]) -> None:
        save_state({**state, "config": dataclasses.asdict(config)}, path)

    generator, tokenizer, curves = fit(
        config, data, process, state, save, lambda line: print(line, flush=True)
    )
    publish(arguments, config, generator, tokenizer, data, curves)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--catalog", required=True, help="table of images and formal descriptions")
    parser.add_argument(
        "--colloquial", required=True, nargs="+", action="extend", metavar="[STYLE=]URI",
        help="sentences of a style: a text file, one a line, or a table with a text column",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="model directory, on disk or s3://")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS), help="model size")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0: without Ray")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="the model's own, for captions"
    )
    parser.add_argument("--top-p", type=float, default=0.9, help="the model's own, for captions")
    parser.add_argument("--top-k", type=int, default=100, help="the model's own, for captions")
    parser.add_argument("--candidates", type=int, default=6, help="drawn for each caption")
    parser.add_argument("--notes", help="a Markdown file that goes into the model card")
    for field in dataclasses.fields(TrainingConfig):
        if field.name != "preset":
            kind = type(field.default)
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=kind, default=field.default,
                help="see stylegan.training.TrainingConfig",
            )  # fmt: skip
    return parser


def main() -> int:
    arguments = parser().parse_args()
    if arguments.workers < 0:
        print(f"--workers is {arguments.workers}: choose 0 or more", file=sys.stderr)
        return 2
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(arguments, name) for name in names})
    if "://" not in arguments.catalog:
        arguments.catalog = str(Path(arguments.catalog).resolve())
    arguments.colloquial = [
        spec if "://" in spec else _absolute(spec) for spec in arguments.colloquial
    ]
    cache = Path(tempfile.gettempdir()) / "stylegan-pixels"
    try:
        if arguments.workers:
            train_with_ray(arguments, config, cache)
        else:
            train_here(arguments, config, cache)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteLoss, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model written to {arguments.output}")
    return 0


def _absolute(spec: str) -> str:
    style, equals, path = spec.rpartition("=")
    return f"{style}{equals}{Path(path).resolve()}"


if __name__ == "__main__":
    sys.exit(main())
