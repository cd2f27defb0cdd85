"""Captions a catalogue of images: read → decode → caption → write, streamed by Ray Data.

    python -m jobs.caption --images s3://shop/catalog.parquet --output s3://shop/captions
    ray job submit --working-dir . -- python -m jobs.caption --images … --output s3://…
    python -m jobs.caption            captions the drawn sample catalogue into ./captions
    python -m jobs.caption … --previous latest        every night: only what changed is captioned
    python -m jobs.caption … --dry-run                says what would be done, and how long it takes
    python -m jobs.caption --output … --rollback RUN  makes an older run the latest again
    python -m jobs.caption --output … --export hub    the latest run as a data set, for others

Each run is a directory `run=<UTC time>` below --output; its `data/` is the result, and the file
`latest` names the run that was completed last. The same command again goes on with an unfinished
run, and names a finished one. Exit code 0: every input row
is in the output, failed ones too; 1: the run could not be completed, the same command mends it;
2: the input or a flag is wrong, nothing was captioned.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

import stylegan
from stylegan import cluster, parts, publish
from stylegan import run as runs
from stylegan.brand import BrandRules, BrandRulesError, term
from stylegan.catalog import (
    CatalogError,
    Fetched,
    FrozenCatalog,
    fetch_image,
    freeze_catalog,
    list_stamps,
)  # fmt: skip
from stylegan.cluster import ClusterError, Pool
from stylegan.export import KINDS, ExportError, export_run
from stylegan.images import IsolatedDecoder
from stylegan.lock import RAY_JOB, Lock, LockError
from stylegan.parts import OUTPUT, Settings
from stylegan.previous import Previous, PreviousError
from stylegan.progress import Progress
from stylegan.publish import PublishError
from stylegan.run import Found, Run, RunError

READ_CPUS = 0.5  # fetching waits for storage, decoding works in a child process
WRITE_CPUS = 0.1  # of all that write: each waits for storage
CAPTIONERS_PER_WRITER = 4  # at least two write; a unit is written much faster than captioned
# By default Ray Data starts for ever again what crashes. A unit that crashes its actor stops the
# job when the restarts are used up; its tries have no limit, for a lost node uses up many at once.
TASK_TRIES: Any = {"max_retries": 5}
ACTOR_TRIES: Any = {"max_restarts": 5, "max_task_retries": -1}
SCORER = "discriminator.safetensors"  # FILE of stylegan.critic, which imports torch
FETCH_THREADS = 16
FETCH_ROWS = 64  # images held as bytes by a reader at a time, and as many again on their way


@dataclass(frozen=True, slots=True)
class Config:
    """The command line. None: decided by the model (decoding), the machine (actors) or the unit
    (batch_size); images None: the sample catalogue."""

    images: str | None
    output: str
    model: str | None
    styles: tuple[str, ...]
    id_column: str | None
    image_column: str | None
    description_column: str | None
    captions_per_image: int
    temperature: float | None
    max_new_tokens: int | None
    best_of: int | None
    rules: str | None
    min_score: float | None
    seed: int
    limit: int | None
    batch_size: int | None
    actors: tuple[int, int] | None
    gpus_per_actor: float | None
    wait_for_machines: float
    previous: str | None
    retry_failed: bool
    attribute_columns: tuple[str, ...]
    hash_content: bool
    max_failed_share: float | None
    keep_runs: int | None
    rollback: str | None
    dry_run: bool
    price_per_hour: float | None
    export: str | None
    export_images: bool
    export_to: str | None


class InputError(ValueError):
    """A flag that cannot be obeyed here; the message names the flag and the remedy."""


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """The configuration of a command line. Exits with code 2 and one line when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.caption",
        description=__doc__.partition("\n")[0] if __doc__ else None,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--images", metavar="URI", help="folder, glob, manifest (CSV, JSON Lines, Parquet) or "
        "shards (*.tar), on disk, s3://, gs://; left out: the drawn sample catalogue")  # fmt: skip
    add("--output", metavar="URI", default="captions", help="directory that gets a run=… directory "
        "for this run (captions)")  # fmt: skip
    add("--model", metavar="URI", help="model directory; left out: the shipped model")
    add("--style", metavar="NAME[,NAME]", default="colloquial", type=_names, dest="styles",
        help="styles to write, each image once in each (colloquial)")  # fmt: skip
    add("--id-column", metavar="NAME", help="column that identifies a row (id, else the path)")
    add("--image-column", metavar="NAME", help="column with paths, URIs or image bytes (image)")
    add("--description-column", metavar="NAME", help="column of formal descriptions (description)")
    add("--captions-per-image", metavar="N", default=1, type=_positive,
        help="captions of each image in each style (1)")  # fmt: skip
    add("--temperature", metavar="T", type=_temperature,
        help="above 0, at most 5: higher is more varied; left out: the model's own")  # fmt: skip
    add("--max-new-tokens", metavar="N", type=_positive,
        help="longest caption, in tokens; left out: the model's own")  # fmt: skip
    add("--best-of", metavar="N", type=_positive,
        help="candidates of each caption, the one with the highest score is kept; left out: the "
        "model's own")  # fmt: skip
    add("--rules", metavar="URI", help="TOML file of brand rules: forbidden, required_columns, "
        "min_words, max_words, min_characters, max_characters")  # fmt: skip
    add("--min-score", metavar="F", type=_fraction,
        help="captions with a lower score need review, 0 to 1; left out: none does")  # fmt: skip
    add("--seed", metavar="N", default=0, type=int, help="another seed draws other captions (0)")
    add("--limit", metavar="N", type=_positive, help="caption only the first N rows")
    add("--batch-size", metavar="N|auto", type=_batch_size,
        help="images a captioner gets at a time; changes speed, no caption (auto)")  # fmt: skip
    add("--actors", metavar="N|MIN,MAX", type=_actors,
        help="captioners; left out: one a GPU, else one a core, up to 8 a node")  # fmt: skip
    add("--gpus-per-actor", metavar="F", type=_fraction,
        help="share of a GPU of each captioner, 0 to 1; left out: 1 if there are GPUs")  # fmt: skip
    add("--wait-for-machines", metavar="MINUTES", default=0.0, type=_price,
        help="while a cluster has too few for --actors and --gpus-per-actor (0)")  # fmt: skip
    add("--previous", metavar="URI|latest", help="run whose unchanged rows are carried over, "
        "without a look at their images; latest: the last one below --output, if any")  # fmt: skip
    add("--retry-failed", action="store_true",
        help="caption those too that failed in the previous run")  # fmt: skip
    add("--attribute-columns", metavar="NAME[,NAME]", default=(), type=_names,
        help="a row has changed when one of these has")  # fmt: skip
    add("--hash-content", action="store_true", help="an image has changed when its bytes have, not "
        "its size, time or ETag; reads every image")  # fmt: skip
    add("--max-failed-share", metavar="F", type=_fraction,
        help="fail the run when more of the images fail, 0 to 1; left out: never")  # fmt: skip
    add("--keep-runs", metavar="N", type=_positive,
        help="then delete all complete runs but the newest N and the latest")  # fmt: skip
    add("--rollback", metavar="RUN", help="make this older run the latest again; nothing else")
    add("--dry-run", action="store_true",
        help="say what would be done, how long it takes and what it costs; write nothing")
    add("--price-per-hour", metavar="F", type=_price,
        help="of all machines together, for the cost of the run and of a million images")
    add("--export", choices=KINDS, help="then write the run as a data set, for the hub or as "
        "WebDataset shards; without --images: the latest run, captioning nothing")  # fmt: skip
    add("--export-images", action="store_true", help="with --export hub: with the images' bytes")
    add("--export-to", metavar="URI", help="a new folder for it (export-… in the run's directory)")
    config = Config(**vars(parser.parse_args(arguments)))
    if config.dry_run and config.rollback:
        parser.error("--dry-run does not go with --rollback, which does nothing but that")
    if config.dry_run and config.export:
        parser.error("--dry-run writes nothing: leave --export out")
    if config.retry_failed and not config.previous:
        parser.error("--retry-failed needs --previous: the run in which rows failed")
    if (config.export_images or config.export_to) and not config.export:
        parser.error(f"--export-images and --export-to need --export {' or '.join(KINDS)}")
    if config.export and config.rollback:
        parser.error("--rollback does nothing else: give --export in a command of its own")
    if config.model and "://" not in config.model:  # workers may run in another directory
        config = replace(config, model=os.path.abspath(config.model))
    return config


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: give each style once, as NAME or NAME,NAME")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 up")
    return int(text)


def _temperature(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 5:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0, at most 5")


def _price(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 up")


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 to 1")


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _actors(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    pair = _positive(low), _positive(high or low)
    if pair[0] > pair[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: MIN is more than MAX")
    return pair


# --- the chain ----------------------------------------------------------------------------------


def caption_units(
    run: Run, units: list[int], config: Config, image_size: int, pool: Pool,
    actor: type[CaptionUnit] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Captions units and writes their parts; one receipt a unit, as they are done.

    actor: what captions a unit, CaptionUnit; a benchmark gives one that waits instead.

    A unit is one row of the data set from end to end, its table packed into one value. So Ray can
    neither split nor merge it, and what an actor gets does not depend on sizes or settings.
    """
    least, most, readers = (min(n, len(units)) for n in (*pool.actors, pool.readers))
    # Without a bound, units that are done faster than processes start get a process each to be
    # written, and what reads waits for all of these to start.
    writers = min(max(2, -(-most // CAPTIONERS_PER_WRITER)), len(units))
    unit_bytes = run.rows_per_unit * image_size * image_size * 3
    cluster.bound_waiting(unit_bytes * (readers + 3 * most + 2))
    return iter(
        ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        .map(
            partial(read_images, run=run, image_size=image_size),
            compute=ray.data.TaskPoolStrategy(size=readers),
            num_cpus=READ_CPUS,
            # Ray Data spreads over all nodes; Ray itself turns to those with GPUs last
            scheduling_strategy="DEFAULT" if pool.gpus else "SPREAD",
            **TASK_TRIES,
        )
        .map(
            actor or CaptionUnit,  # type: ignore[arg-type]  # a class: Ray makes actors of it
            fn_constructor_kwargs={"run": run, "config": config, "device": pool.device},
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **ACTOR_TRIES,
        )
        .map(
            partial(write_part, run=run),
            compute=ray.data.TaskPoolStrategy(size=writers),
            num_cpus=WRITE_CPUS / writers,
            **TASK_TRIES,
        )
        .iter_rows()
    )


def read_images(row: dict[str, Any], run: Run, image_size: int) -> dict[str, Any]:
    """A unit's number → its rows with decoded images, or the reason why there is none.

    `_image_pixels` holds image_size * image_size * 3 bytes; null for an image that failed, that was
    not given, or that is not needed because a person wrote the caption.
    """
    unit = run.read_unit(row["unit"])
    wanted = [not locked for locked in parts.locked(unit)]
    seconds = {"read": 0.0, "decode": 0.0}
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(FETCH_THREADS) as threads:
        fetching = _fetch(unit, wanted, 0, threads)
        while fetching:
            # the next images are on their way while these are decoded
            later = _fetch(unit, wanted, len(found) + len(fetching), threads)
            began = time.perf_counter()
            fetched = [future.result() for future in fetching]
            seconds["read"] += time.perf_counter() - began
            began = time.perf_counter()
            decoded = _decoder().decode([file.data for file in fetched], image_size)
            seconds["decode"] += time.perf_counter() - began
            for file, image in zip(fetched, decoded, strict=True):
                sha256 = None if file.data is None else hashlib.sha256(file.data).hexdigest()
                found.append(
                    {
                        "image_sha256": sha256,
                        "width": image.width,
                        "height": image.height,
                        "error_class": file.error_class or image.error_class,
                        "error_message": file.error_message or image.error_message,
                        "_image_stamp": (run.settings.hash_content and sha256) or file.stamp,
                        "_image_pixels": None if image.pixels is None else image.pixels.tobytes(),
                    }
                )
            fetching = later
    rows = unit.select([name for name in unit.column_names if not name.startswith("_image_")])
    pixels = pa.field("_image_pixels", pa.binary(image_size * image_size * 3))
    fields = [OUTPUT.field(name) for name in found[0] if name in OUTPUT.names]
    for column in [*fields, pa.field("_image_stamp", pa.string()), pixels]:
        values = pa.array([image[column.name] for image in found], column.type)
        if column.name == "_image_stamp":  # the plan's is older: an image may have changed since
            values = pc.coalesce(unit.column(column.name), values)
        rows = rows.append_column(column, values)
    return {**row, "rows": _pack(rows), **seconds}


def _fetch(
    unit: pa.Table, wanted: list[bool], start: int, threads: ThreadPoolExecutor
) -> list[Future[Fetched]]:
    """Begins to fetch the next FETCH_ROWS images; nothing of those that are not given or wanted."""
    has_bytes = "_image_bytes" in unit.column_names
    column = unit.column("_image_bytes" if has_bytes else "_image_uri")

    def fetch(value: Any, is_wanted: bool) -> Fetched:
        if value is None or not is_wanted:
            return Fetched(None, "")
        return Fetched(value, None) if has_bytes else fetch_image(value)

    rows = slice(start, start + FETCH_ROWS)
    values = column.slice(start, FETCH_ROWS).to_pylist()
    return [threads.submit(fetch, *pair) for pair in zip(values, wanted[rows], strict=True)]


class CaptionUnit:
    """An actor that holds a Captioner: decoded rows of a unit in, the rows of its part out."""

    def __init__(self, run: Run, config: Config, device: str) -> None:
        # here and not above: what reads and writes has no use for torch
        import torch

        from stylegan.captioner import Captioner

        # The one CPU that it reserves: the number of threads can change the last bits of a sum.
        torch.set_num_threads(1)
        if device == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                f"node {ray.util.get_node_ip_address()} has a GPU for Ray, and torch "
                f"{torch.__version__} sees none: install torch with CUDA and a driver there, or "
                "give --gpus-per-actor 0"
            )
        self.run, self.batch_size = run, config.batch_size
        self.captioner = Captioner.from_pretrained(config.model, device=device)
        if self.captioner.model_revision != run.settings.model_revision:
            raise RunError(
                f"the model {config.model} is {self.captioner.model_revision} on this node and "
                f"{run.settings.model_revision} where the job was started: give every node the same"
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        rows = _unpack(row["rows"])
        settings, size = self.run.settings, self.captioner.image_size
        locked, errors = parts.locked(rows), rows.column("error_class").to_pylist()
        todo = [i for i, error in enumerate(errors) if error is None and not locked[i]]
        ids, descriptions = (rows.column(name).to_pylist() for name in ("id", "description"))
        images = [
            None if value is None else np.frombuffer(value, np.uint8).reshape(size, size, 3)
            for value in rows.column("_image_pixels").to_pylist()
        ]
        terms = _terms(rows, settings.required_columns)
        step = self.batch_size or max(1, len(todo))
        captions: dict[tuple[int, str, int], Any] = {}
        for start in range(0, len(todo), step):
            batch = todo[start : start + step]
            encoding = self.captioner.encode(
                [images[i] for i in batch], [descriptions[i] for i in batch]
            )
            for style, candidate in settings.versions:
                written = self.captioner.write(
                    encoding,
                    style,
                    [settings.row_seed(ids[i], style, candidate) for i in batch],
                    temperature=settings.temperature,
                    max_new_tokens=settings.max_new_tokens,
                    best_of=settings.best_of,
                    rules=settings.rules,
                    terms=[terms[i] for i in batch],
                    min_score=settings.min_score,
                    others=[
                        [captions[i, style, n].text or "" for n in range(candidate)] for i in batch
                    ],
                )
                for index, caption in zip(batch, written, strict=True):
                    captions[index, style, candidate] = caption
        part = parts.assemble(
            rows, captions, settings,
            run_id=self.run.run_id, model_id=self.captioner.model_id,
        )  # fmt: skip
        reasons = Counter(why for caption in captions.values() for why in caption.review_reasons)
        return {
            **row, "rows": _pack(part), "caption": time.perf_counter() - began,
            "review_reasons": json.dumps(reasons),
        }  # fmt: skip


def _terms(rows: pa.Table, columns: Sequence[str]) -> list[list[str]]:
    """What the caption of each row has to say: its values in the required columns."""
    values = rows.select(list(columns)).to_pylist() if columns else [{}] * rows.num_rows
    return [[said for value in row.values() if (said := term(value))] for row in values]


def write_part(row: dict[str, Any], run: Run) -> dict[str, Any]:
    """Writes the part of a unit and returns its receipt: numbers for the progress line."""
    began = time.perf_counter()
    rows = _unpack(row["rows"])
    seconds = {stage: row[stage] for stage in ("read", "decode", "caption")}
    run.write_part(row["unit"], rows, seconds, json.loads(row["review_reasons"]))
    failed = rows.column("status").to_pylist().count("failed")
    seconds["write"] = time.perf_counter() - began
    return {"unit": row["unit"], "failed": failed // len(run.settings.versions), **seconds}


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _unpack(packed: bytes) -> pa.Table:
    return pa.ipc.open_stream(packed).read_all()


@cache
def _decoder() -> IsolatedDecoder:
    """One child process a worker, kept from unit to unit."""
    return IsolatedDecoder()


# --- the job ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """What the job needs to know of a model before any is loaded.

    files: stamps by name; a run that finds the same as the previous one reads none of them.
    """

    uri: str | None
    revision: str
    styles: tuple[str, ...]
    image_size: int
    files: dict[str, str]

    @classmethod
    def look_up(cls, model: str | None, previous: Previous | None) -> Model:
        """Raises InputError when there is no model, and the previous run's was another."""
        try:
            files = list_stamps(model or str(Path(stylegan.__file__).parent / "pretrained"))
        except OSError as error:
            raise InputError(f"--model: {error}") from error
        known = previous.model if previous else {}
        if known and known["uri"] == model and (not files or known["files"] == files):
            return cls(**known | {"files": files, "styles": tuple(known["styles"])})
        from stylegan.captioner import model_revision, open_model

        try:
            with open_model(model) as directory:
                described = json.loads((directory / "config.json").read_text())
                styles, image_size = tuple(described["styles"]), int(described["image_size"])
                return cls(model, model_revision(directory), styles, image_size, files)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--model: {error}") from error

    def check_presence(self, images: int) -> None:
        """Raises InputError when it is gone, and so many images have to be captioned."""
        if not self.files:
            raise InputError(
                f"--model {self.uri} is gone, and {images:,} images have to be captioned: bring it "
                "back"
            )


def run_job(config: Config, actor: type[CaptionUnit] | None = None) -> Found | None:
    """Captions what the configuration asks for; the finished run, with its `run` if it is new.

    None after a dry run, unless the run is finished already.

    Raises InputError, CatalogError, ClusterError (nothing was captioned), LockError, RunError.
    """
    began = time.perf_counter()
    output = _absolute_output(config.output)
    try:
        rules = BrandRules.read(config.rules) if config.rules else None
    except BrandRulesError as error:
        raise InputError(f"--rules {error}") from error
    previous = _find_previous(output, config.previous, settle=not config.dry_run)
    model = Model.look_up(config.model, previous)
    if unknown := set(config.styles) - set(model.styles):
        raise InputError(
            f"--style {','.join(sorted(unknown))} is unknown: this model writes "
            f"{', '.join(model.styles)}"
        )
    if config.min_score is not None and model.files and SCORER not in model.files:
        raise InputError(
            f"--min-score {config.min_score:g}: the model has no {SCORER}, which scores captions: "
            "leave the flag out, or give a model whose adversarial stage was trained"
        )
    identify: Any = "content" if config.hash_content else "stamp"
    with (scratch := tempfile.TemporaryDirectory(prefix="stylegan-")):
        catalog = freeze_catalog(
            config.images or _sample_catalog(), Path(scratch.name), id_column=config.id_column,
            image_column=config.image_column, description_column=config.description_column,
            limit=config.limit, attribute_columns=config.attribute_columns,
            required_columns=rules.required_columns if rules else (),
            identify=identify if config.previous else "later",
        )  # fmt: skip
        settings = Settings(
            catalog.digest, model.revision, config.styles, config.captions_per_image,
            config.temperature, config.max_new_tokens, config.seed, config.best_of,
            attribute_columns=tuple(dict.fromkeys(catalog.attributes + catalog.required)),
            hash_content=config.hash_content,
            previous=f"{previous.name} {previous.identity}" if previous else None,
            retry_failed=config.retry_failed and previous is not None,
            rules=rules, required_columns=catalog.required, min_score=config.min_score,
        )  # fmt: skip
        lock_file = runs.lock_path(output, settings)
        try:
            found = runs.find_run(output, settings)
            if found and found.is_finished and (
                config.dry_run or not runs.has_leftovers(found, lock_file)
            ):
                return found
            lock = None if config.dry_run else Lock.acquire(*lock_file, say=_say)
        except OSError as error:
            raise InputError(f"--output {output} cannot be used: {error}") from error
        if lock is None:
            from jobs.dry_run import rehearse  # it imports the stages

            unfinished = found.run if found else None
            rehearse(config, output, previous, model, catalog, settings, unfinished, began)
            return None
        with lock:
            found = runs.find_run(output, settings)  # another job may have finished it meanwhile
            if found and found.is_finished:
                runs.settle(found.uri)
                return found
            run = found.run if found else None
            if run is None:
                if previous is None:
                    reserve(config)  # before the plan: nothing is left when it does not fit
                unplanned = found.uri if found else None
                run = runs.plan_run(output, settings, catalog, unplanned, previous)
            scratch.cleanup()  # the plan holds the input now
            _complete(run, config, model, lock, previous, catalog, actor)
            return Found(run.uri, True, run)


def _find_previous(output: str, previous: str | None, *, settle: bool) -> Previous | None:
    """The run to carry over from. Raises InputError when it is not there.

    settle: do what a kill left undone in it.
    """
    if previous is None:
        return None
    try:
        if previous == publish.LATEST:
            name = publish.read_latest(output)
            if name is None:
                _say(f"no run is complete below {output}: every row is captioned")
                return None
            latest = Previous.load(f"{output}/{name}")
            if settle:
                runs.settle_after_death(latest.uri, latest.identity)
            return latest
        return Previous.load(_absolute(previous))
    except (OSError, PreviousError) as error:
        raise InputError(f"--previous {previous}: {error}") from error


def reserve(config: Config) -> Pool:
    """Starts or joins Ray and says what the chain may use of it. Raises ClusterError."""
    cluster.connect()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop`; Ray's exits
    until, said = time.monotonic() + 60 * config.wait_for_machines, ""
    while True:
        try:
            pool = cluster.choose_pool(
                cluster.nodes(), config.actors, config.gpus_per_actor, read_cpus=READ_CPUS,
                write_cpus=WRITE_CPUS, is_local=not os.environ.get("RAY_ADDRESS"),
            )  # fmt: skip
            break
        except ClusterError as error:
            if time.monotonic() >= until:
                raise
            if said != (said := str(error)):
                _say(f"waiting for machines: {error}")
            time.sleep(2)
    cpus = pool.actors[0] * pool.cpus + READ_CPUS + WRITE_CPUS
    for name, needed in (("CPU", cpus), ("GPU", pool.actors[0] * pool.gpus)):
        if (free := ray.available_resources().get(name, 0.0)) < needed:
            _say(
                f"waiting for {name}s: {needed:g} are needed, other work on the cluster leaves "
                f"{free:g}"
            )
    return pool


def _local_paths(run: Run, config: Config) -> dict[str, str]:
    """What every node of a cluster has to see, by flag."""
    paths = {"--output": run.uri, "--model": config.model}
    unit = run.read_unit(0)
    if "_image_uri" in unit.column_names:
        uris = (uri for uri in unit.column("_image_uri").to_pylist() if uri and "://" not in uri)
        paths["--images"] = os.path.dirname(next(uris, "")) or None
    return {flag: path for flag, path in paths.items() if path and "://" not in path}


def _complete(
    run: Run, config: Config, model: Model, lock: Lock, previous: Previous | None,
    catalog: FrozenCatalog, actor: type[CaptionUnit] | None,
) -> None:  # fmt: skip
    """Captions the units without a part, verifies all parts against the input, publishes.

    Raises RunError when parts are still wrong after they were captioned once more, or when more
    failed than --max-failed-share allows.
    """
    started, began = datetime.now(UTC), time.monotonic()
    pool: Pool | None = None
    seconds: Counter[str] = Counter()
    images, captioning, rate = 0, 0.0, None
    foreign: list[str] = []
    limit = _Failures(run, config.max_failed_share)
    limit.discard()
    for _ in range(2):
        limit.recount()
        missing = run.missing_units()
        units = [unit for unit in missing if unit < run.num_fresh_units]
        if carried := missing[len(units) :]:
            rows = sum(map(run.unit_rows, carried))
            _say(f"{rows:,} of {run.num_rows:,} images are carried over into {run.uri}")
            run.write_carried(carried)
        if units:
            model.check_presence(sum(map(run.unit_rows, units)))
            pool = reserve(config)
            cluster.check_visible(_local_paths(run, config))
            done = run.num_rows - sum(map(run.unit_rows, units))
            _say(
                f"captioning {run.num_rows - done:,} of {run.num_rows:,} images with "
                f"{pool.actors[0]} captioners on {pool.device} into {run.uri}"
            )
            since = time.monotonic()
            with Progress(run.num_rows, done) as progress:
                for receipt in caption_units(
                    run, units, config, model.image_size, pool, actor
                ):
                    lock.check()
                    progress.add(run.unit_rows(receipt["unit"]), receipt["failed"])
                    limit.add(receipt["failed"])
                    images += run.unit_rows(receipt["unit"])
                    seconds.update({stage: receipt[stage] for stage in STAGES})
            captioning, rate = captioning + time.monotonic() - since, progress.rate or rate
        lock.check(now=True)
        foreign += run.set_aside_foreign()
        found = run.verify()
        if not found.wrong:
            break
        for unit, reason in sorted(found.wrong.items())[:10]:
            _say(f"the part of unit {unit} {reason}; it is captioned again")
        run.discard(found.wrong)
    else:
        raise RunError(
            f"{len(found.wrong)} parts of {run.uri} were wrong even after they were captioned "
            "again; they are removed, and the same command captions them once more"
        )
    limit.check(sum(found.error_classes.values()))
    for name in foreign:
        _say(f"{name} is no part of this run; it was moved to _foreign/")
    session = time.monotonic() - began
    busy = _busy_shares(seconds, pool, captioning) if pool else {}
    per_hour = config.price_per_hour
    summary = {
        "run_id": run.run_id,
        "identity": run.settings.identity,
        "uri": run.uri,
        "planned_at": run.created_at,
        "started_at": started.isoformat(timespec="seconds"),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": {
            "images": found.images,
            "rows": found.rows,
            "statuses": dict(sorted(found.statuses.items())),
            "error_classes": dict(found.error_classes.most_common()),
            "needs_review": found.needs_review,
            "review_reasons": dict(found.review_reasons.most_common()),
            "foreign_files": foreign,
        },
        "previous": run.settings.previous and run.settings.previous.split()[0],
        "previous_counts": previous and previous.counts,
        "changes": run.changes,
        "replaced": run.replaced(),
        "rates": {
            "images_this_session": images,
            "seconds_this_session": round(session, 1),
            "images_per_second": round(images / session, 2),
            # of one captioner while it works
            "images_per_second_per_actor": (
                round(images / seconds["caption"], 2) if seconds["caption"] else None
            ),
            # the start left out, as the progress line has it
            "images_per_second_at_work": rate and round(rate, 2),
            "cost_this_session": None if per_hour is None else round(session / 3600 * per_hour, 4),
            "cost_per_million": (
                round(per_hour / 3600 / rate * 1e6, 2) if per_hour is not None and rate else None
            ),
            "failed_share": round(sum(found.error_classes.values()) / found.images, 4),
        },
        # work of all workers, over all sessions but for writing; the wall clock is under rates
        "seconds_per_stage": {
            stage: round(found.seconds[stage] or seconds[stage], 2) for stage in STAGES
        },
        # of the time from the first image to the last
        "busy_shares": busy,
        "bottleneck": max(busy, key=busy.__getitem__, default=None),
        "scores": {
            "counts": found.scores,
            "lowest": [scored._asdict() for scored in found.lowest],
            "highest": [scored._asdict() for scored in reversed(found.highest)],
        },
        "configuration": asdict(config) | {"pool": asdict(pool) if pool else None},
        "settings": asdict(run.settings),
        "model": asdict(model),
        "input": {
            "digest": run.settings.input_digest, "rows": run.num_rows, "units": run.num_units,
            "images": asdict(catalog.images),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ray", "torch", "transformers", "pyarrow", "pillow")},
    }
    run.publish(summary, lock)


STAGES = ("read", "decode", "caption", "write")


class _Failures:
    """How many images may fail (--max-failed-share), and how many did."""

    def __init__(self, run: Run, share: float | None) -> None:
        self.run, self.share = run, share
        self.count = 0

    def recount(self) -> dict[int, int]:
        """Failed images by unit, of those that are done."""
        failed = self.run.count_failed() if self.share is not None else {}
        self.count = sum(failed.values())
        return failed

    def discard(self) -> None:
        """Too many failed in an earlier session: those units are captioned again."""
        failed = self.recount()
        if self._is_exceeded():
            _say(f"{self.count:,} images failed before; their units are captioned again")
            self.run.discard(failed)

    def add(self, count: int) -> None:
        """Stops the job as soon as it cannot be good any more. Raises RunError."""
        self.check(self.count + count)

    def check(self, count: int) -> None:
        self.count = count
        if self._is_exceeded():
            raise RunError(
                f"{count:,} of {self.run.num_rows:,} images failed, more than --max-failed-share "
                f"{self.share:g} allows: nothing is published; {self.run.uri}/errors lists them, "
                "and the same command tries them again (those that failed in the previous run: "
                "with --retry-failed)"
            )

    def _is_exceeded(self) -> bool:
        return self.share is not None and self.count > self.share * self.run.num_rows


def _busy_shares(seconds: Counter[str], pool: Pool, wall: float) -> dict[str, float]:
    """The share of the time that each stage's workers were at work, readers in two stages."""
    slots = dict.fromkeys(STAGES, pool.readers) | {"caption": pool.actors[1]}
    return {stage: round(seconds[stage] / slots[stage] / wall, 3) for stage in STAGES}


def _latest(output: str) -> str:
    """The latest run below an output. Raises InputError when there is none."""
    name = publish.read_latest(output)
    if name is None:
        raise InputError(
            f"--export: no run is complete below --output {output}; name the --images to caption"
        )
    return f"{output}/{name}"


def _export(config: Config, run: str) -> str:
    assert config.export
    target = config.export_to and _absolute_output(config.export_to, "--export-to")
    return export_run(run, config.export, target, with_images=config.export_images)


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def _absolute_output(output: str, flag: str = "--output") -> str:
    """The output as a URI or absolute path. Raises InputError for one that would vanish."""
    if RAY_JOB in os.environ and "://" not in output and not os.path.isabs(output):
        raise InputError(
            f"{flag} {output} is relative: under `ray job submit` it would vanish with the job's "
            "working directory; give an s3:// URI or an absolute path"
        )
    return _absolute(output)


def _sample_catalog() -> str:
    """Draws the sample catalogue, where it is not there yet, and returns its list."""
    from stylegan.samples import write_samples

    # always the same place: the paths are part of the input's identity
    folder = Path(tempfile.gettempdir()) / f"stylegan-samples-{os.getuid()}"
    return str(write_samples(folder))


def _print_captions(run: Run, count: int = 6) -> None:
    """A few captions of a finished run, as an aligned table."""
    rows = run.read_part(0).slice(0, count)
    lines = [("id", "caption")]
    for row in rows.select(["id", "caption", "error_class"]).to_pylist():
        lines.append((row["id"], row["caption"] or f"({row['error_class']})"))
    width = max(len(row_id) for row_id, _ in lines)
    print("\n".join(f"{row_id:<{width}}  {caption}" for row_id, caption in lines))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The job; its exit code."""
    config = parse_arguments(arguments)
    try:
        output = _absolute_output(config.output)
        if config.rollback:
            print(f"latest is {publish.roll_back(output, config.rollback)} again")
            return 0
        if config.export and config.images is None:
            print(_export(config, _latest(output)))
            return 0
        found = run_job(config)
        if found is None or config.dry_run:
            print(f"finished already: {found.uri}" if found else "Nothing was written.")
            return 0
        exported = _export(config, found.uri) if config.export else ""
        if config.keep_runs:
            for name in publish.prune(output, config.keep_runs, runs.lock_name):
                _say(f"deleted {output}/{name}: --keep-runs {config.keep_runs}")
    except (
        InputError, CatalogError, ClusterError, ExportError, PreviousError, PublishError,
    ) as error:  # fmt: skip
        _say(f"jobs.caption: {error}")
        return 2
    except (LockError, RunError) as error:
        _say(f"jobs.caption: {error}")
        return 1
    except KeyboardInterrupt:
        _say("\njobs.caption: stopped; what is done is kept, the same command goes on")
        return 130
    except Exception as error:
        _say(f"jobs.caption: {cluster.explain(error)}")
        _say("What is done is kept: the same command goes on.")
        return 1
    if found.run is None:
        _say(f"finished already: {found.uri}; nothing was written")
    else:
        _print_captions(found.run)
        print(f"\n{found.uri}")
    if exported:
        print(exported)
    return 0


if __name__ == "__main__":
    # as a module, so that workers import the stages instead of getting them pickled
    from jobs.caption import main as run_main

    sys.exit(run_main())
