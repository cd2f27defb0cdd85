"""The rows of a part: which columns they have, and what each of their values is.

Each input row comes out once for each style and candidate, captioned, failed or locked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from stylegan.brand import BrandRules

FORMAT = 1  # of the plan and the parts; a new number makes new runs instead of resuming old ones

OUTPUT = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("style", pa.string()),
        pa.field("caption_score", pa.float32()),
        pa.field("description", pa.string()),
        pa.field("status", pa.string()),
        pa.field("needs_review", pa.bool_()),
        pa.field("error_class", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("image_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("model_id", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("fingerprint", pa.string()),
        pa.field("run_id", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("num_generated_tokens", pa.int32()),
        pa.field("generated_at", pa.timestamp("us", tz="UTC")),
    ]
)
ERRORS = pa.schema([OUTPUT.field("error_class"), OUTPUT.field("error_message")])


def input_columns(unit: pa.Schema) -> list[str]:
    """The columns of a unit that are handed through to the output as they are."""
    return [n for n in unit.names if n not in OUTPUT.names and not n.startswith("_image_")]


def output_schema(unit: pa.Schema) -> pa.Schema:
    """The columns of a part, from those of a unit: the input's, then ours."""
    return pa.schema([*(unit.field(name) for name in input_columns(unit)), *OUTPUT])


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the captions of a run, hence its identity. None: the model's own setting.

    attribute_columns: the unit's names of those that a caption depends on. hash_content: images are
    known by their content. previous: the run that unchanged rows are carried over from, if any.
    retry_failed: those that failed in it are not. rules: of the brand, their content and not their
    file. required_columns: the unit's names of those, all among attribute_columns. min_score: a
    caption with a lower score needs review.
    """

    input_digest: str
    model_revision: str
    styles: tuple[str, ...]
    captions_per_image: int
    temperature: float | None
    max_new_tokens: int | None
    seed: int
    best_of: int | None = None
    attribute_columns: tuple[str, ...] = ()
    hash_content: bool = False
    previous: str | None = None
    retry_failed: bool = False
    rules: BrandRules | None = None
    required_columns: tuple[str, ...] = ()
    min_score: float | None = None

    @property
    def identity(self) -> str:
        """A sha256 that two runs share exactly when they come to the same rows the same way."""
        return _sha256({"format": FORMAT, **asdict(self)})

    @property
    def versions(self) -> list[tuple[str, int]]:
        """(style, number of the candidate) of each output row of an input row, in order."""
        return [(style, n) for style in self.styles for n in range(self.captions_per_image)]

    def row_seed(self, row_id: str, style: str, candidate: int) -> int:
        """63 bits from the job's seed and the row's identity, never from its position."""
        key = json.dumps([self.seed, row_id, style, candidate]).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1

    def fingerprints(self, rows: pa.Table, style: str) -> list[str | None]:
        """Of each row of a unit a sha256 of all that its captions depend on, but for its id.

        rows: with the description that was given. None where it is not known what the image is.
        """
        decoding = [self.temperature, self.max_new_tokens, self.best_of, self.seed]
        made = [self.model_revision, style, decoding, self.hash_content, self.attribute_columns]
        if self.rules is not None or self.min_score is not None:
            gates = asdict(self.rules) if self.rules else None
            made += [gates, self.required_columns, self.min_score]
        common = hashlib.sha256(json.dumps(made).encode())

        def digest(values: tuple[Any, ...]) -> str | None:
            if values[0] is None:
                return None
            whole = common.copy()
            whole.update(json.dumps(values, default=str).encode())
            return whole.hexdigest()

        names = ["_image_stamp", "description", *self.attribute_columns]
        columns = [rows.column(name).to_pylist() for name in names]
        return [digest(values) for values in zip(*columns, strict=True)]


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Written(Protocol):
    """What is needed of a caption (`stylegan.captioner.Caption`), without importing torch."""

    text: str | None
    score: float | None
    description: str | None
    needs_review: bool
    num_generated_tokens: int
    seed: int
    error_class: str | None
    error_message: str | None


def locked(rows: pa.Table) -> list[bool]:
    """Which rows have a caption that a person wrote."""
    if not {"caption", "caption_locked"} <= set(rows.column_names):
        return [False] * rows.num_rows
    return [bool(value) for value in rows.column("caption_locked").to_pylist()]


def assemble(
    rows: pa.Table,
    captions: Mapping[tuple[int, str, int], Written],
    settings: Settings,
    *,
    run_id: str,
    model_id: str | None,
) -> pa.Table:
    """The rows of a part, with all columns of the output.

    rows: those of the unit, with what is known of their images, in the output's column names, and
    their stamps. captions: by number of the row, style and candidate; rows that failed before have
    none.
    """
    constant = {
        "model_id": model_id,
        "model_revision": settings.model_revision,
        "run_id": run_id,
        "generated_at": datetime.now(UTC),
        "needs_review": False,
    }
    given = [name for name in OUTPUT.names if name in rows.column_names]
    is_locked = locked(rows)
    prints = {style: settings.fingerprints(rows, style) for style in settings.styles}
    ours: list[dict[str, Any]] = []
    for index, row in enumerate(rows.select(given).to_pylist()):
        for style, candidate in settings.versions:
            caption = captions.get((index, style, candidate))
            out = {**row, **constant, "style": style, "fingerprint": prints[style][index]}
            if is_locked[index]:  # no model had a part in it
                nothing = dict.fromkeys(("model_id", "model_revision", "fingerprint"))
                out |= {"status": "locked", **nothing}
            elif caption is None:
                out |= {"status": "failed", "caption": None}
            elif caption.error_class is not None:
                out |= {
                    "status": "failed",
                    "caption": None,
                    "error_class": caption.error_class,
                    "error_message": caption.error_message,
                }
            else:
                out |= {
                    "status": "captioned",
                    "caption": caption.text,
                    "caption_score": caption.score,
                    "description": caption.description,
                    "needs_review": caption.needs_review,
                    "seed": caption.seed,
                    "num_generated_tokens": caption.num_generated_tokens,
                }
            ours.append(out)
    return beside_input(rows, pa.Table.from_pylist(ours, OUTPUT))


def beside_input(rows: pa.Table, ours: pa.Table) -> pa.Table:
    """The rows of a part: the input's columns of a unit's rows, each row as often as it came out,
    and our own.
    """
    kept = rows.select(input_columns(rows.schema))
    if rows.num_rows:
        kept = kept.take(np.repeat(np.arange(rows.num_rows), ours.num_rows // rows.num_rows))
    schema = pa.schema([*kept.schema, *OUTPUT])
    return pa.Table.from_arrays([*kept.columns, *ours.columns], schema=schema)
