"""Writes examples of a voice for a catalogue, by a pretrained language model that learned it.

    python -m jobs.distil --catalog catalog.csv --colloquial sentences.csv --teacher LM \\
        --output written.csv
    python -m jobs.train --catalog catalog.csv --colloquial sentences.csv written.csv …

With `--judged verdicts.csv` (`text`, `fit`: 1 where you would print the caption, 0 where not) the
LM learns that verdict too, as it came, and what it finds unfit is left out.

LM is the directory of a causal language model of transformers (config.json, weights,
tokenizer.json), of some hundred million parameters: it is tuned on the sentences for minutes on a
GPU, and writes captions of the catalogue's descriptions. The table has the columns `text`,
`description`, `style` and `tier`; with several styles, give each style's rows to jobs.train as
STYLE=FILE. Its log says why the others were left out. The training catalogue and the left-out
sentences are those of jobs.train. The table is written at the end, in one step: a run that was
stopped is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import torch

from jobs.train import (
    EMBEDDED,
    InputError,
    begin_proofreader,
    held_out_examples,
    products_of,
    read_judged,
    read_rows,
    read_voice,
)
from stylegan.catalog import resolve_filesystem
from stylegan.corpora import Example, PseudoPairs
from stylegan.teacher import Teacher, TeacherConfig, distil
from stylegan.training import Curves, NonFiniteLoss


def write_table(uri: str, examples: list[Example]) -> None:
    """The examples as CSV, on disk or object storage."""
    table = pa.table({
        "text": [example.text for example in examples],
        "description": [example.description for example in examples],
        "style": [example.style for example in examples],
        "tier": ["support"] * len(examples),
    })  # fmt: skip
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    filesystem, path = resolve_filesystem(uri)
    if "/" in path:
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(buffer.getvalue())


def run(arguments: argparse.Namespace, config: TeacherConfig) -> int:
    """→ how many examples were written. Raises InputError."""
    voice = read_voice(arguments.colloquial)
    judged = read_judged(arguments.judged) if arguments.judged else []
    rows = [row for row in read_rows(arguments.catalog) if row.get("split") != "val"]
    products = products_of(rows)
    if not products:
        raise InputError(f"--catalog {arguments.catalog}: all its rows have split `val`")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        teacher = Teacher.from_pretrained(Path(arguments.teacher), device)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--teacher {arguments.teacher}: {str(error).splitlines()[0]}; give a directory with "
            "the config.json, weights and tokenizer.json of a causal language model of transformers"
        ) from error
    pairs = PseudoPairs(products, voice.sentences, voice.support)
    held_out = held_out_examples(products, voice.dev, config.seed)
    teacher.train(pairs, voice.background, held_out, config, Curves(), log)
    examples, why = distil(teacher, pairs, voice.rules(), config, log)
    for name, share in why.items():
        log(f"left out  {name} {share:.1%}")
    if not examples:
        raise InputError(
            f"none of {config.captions:,} captions names its product and says nothing false of it: "
            "train the teacher longer (--steps), or give it more sentences"
        )
    if judged:
        proofreader = begin_proofreader(arguments.teacher, judged, pairs, device)
        passed = proofreader.passes([example.text for example in examples])
        log(f"left out  unfit {1 - passed.mean():.1%} of {len(examples):,}")
        examples = [x for x, passes in zip(examples, passed, strict=True) if passes]
        if not examples:
            raise InputError(
                f"--judged {arguments.judged}: no caption that was written is fit by this verdict; "
                "judge some of this teacher's captions too, of which it may know nothing"
            )
    write_table(arguments.output, examples)
    return len(examples)


def log(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.distil", description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--catalog", required=True, help="table of formal descriptions")
    parser.add_argument(
        "--colloquial", required=True, nargs="+", action="extend", metavar="[STYLE=]URI",
        help=f"as for jobs.train, `{EMBEDDED}` too",
    )  # fmt: skip
    parser.add_argument("--teacher", required=True, help="directory of a causal language model")
    parser.add_argument("--judged", default="", help="table of captions that somebody read")
    parser.add_argument("--output", required=True, help="CSV table, on disk or s3://")
    for field in dataclasses.fields(TeacherConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default,
            help="see stylegan.teacher.TeacherConfig",
        )  # fmt: skip
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(TeacherConfig)]
    try:
        count = run(arguments, TeacherConfig(**{name: getattr(arguments, name) for name in names}))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count:,} examples written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
