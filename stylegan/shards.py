"""WebDataset shards: uncompressed tar files in which the files of one name before the first dot are
a sample.

A shard is read once, past its headers, to list its samples; no process ever holds one in memory.
An image is then known as the bytes of the shard that hold it, header and all:

    s3://shop/shard-000.tar#bytes=1024-22015

so that it can be read with one ranged request, and a shard that was replaced is noticed.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from pyarrow import fs

from stylegan.storage import patiently, resolve_filesystem

# fmt: off
IMAGE_EXTENSIONS: Final = frozenset((
    "jpg", "jpeg", "jfif", "png", "webp", "gif", "tif", "tiff", "bmp", "avif", "jp2", "j2k", "ico",
    "ppm", "pgm", "pbm", "pnm", "qoi", "pcx", "tga",
))
# fmt: on
MAX_TEXT_BYTES: Final = 16 << 20  # of a .json or .txt
THREADS: Final = 8  # shards that are listed at a time
LOCAL_BUFFER, REMOTE_BUFFER = 16 << 10, 4 << 20  # a request costs more than bytes that are not used


class ShardError(ValueError):
    """A shard that cannot be listed whole; the message says which, why, and the remedy."""


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{a,b}` are alternatives."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    first, last, names = found.groups()
    if names is None:
        numbers = range(int(first), int(last) + 1)
        inside = [f"{number:0{len(first)}}" for number in numbers]
    else:
        inside = names.split(",")
    rest = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + name + tail for name in inside for tail in rest]


# --- a sample's image ---------------------------------------------------------------------------


class Span(NamedTuple):
    """Bytes [start, stop) of a shard: a tar header of 512 bytes, then the image."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"bytes={self.start}-{self.stop - 1}"  # as HTTP counts


NO_IMAGE: Final = "#no-image"


def split_span(uri: str) -> tuple[str, Span | None]:
    """The file that a reference leads to, and the part of it that is meant; None: all of it."""
    match = re.fullmatch(r"(.+\.tar)#bytes=(\d+)-(\d+)", uri, re.DOTALL | re.IGNORECASE)
    return (match[1], Span(int(match[2]), int(match[3]) + 1)) if match else (uri, None)


def unwrap(block: bytes, span: Span) -> bytes | None:
    """The image in the bytes of a span; None when they are not, or no longer, a file of a tar."""
    size = span.stop - span.start - tarfile.BLOCKSIZE
    try:
        header = tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    is_whole = header.isreg() and header.size == size == len(block) - tarfile.BLOCKSIZE
    return block[tarfile.BLOCKSIZE :] if is_whole else None


# --- the list of samples ------------------------------------------------------------------------


def index_shards(
    shards: Sequence[str], index: Path, *, image_extension: str | None = None,
    limit: int | None = None,
) -> None:  # fmt: skip
    """Writes a JSON line for each sample: `id` (its key), `image` (a reference), what its .json
    holds, and its .txt as `description` where that does not. Stops after `limit` samples.

    image_extension: of the image, where samples have several. A sample without an image is in the
    list, with a reference that leads nowhere. Raises ShardError.
    """

    def scan(shard: str) -> tuple[Path, int]:
        lines = index.with_name(f"{index.name}.{hash(shard):x}")
        return lines, patiently(shard, lambda: _scan(shard, lines, image_extension, limit))

    found = 0
    remaining = iter(shards)
    with open(index, "wb") as whole, ThreadPoolExecutor(THREADS) as threads:
        while limit is None or found < limit:
            chunk = list(itertools.islice(remaining, THREADS))
            if not chunk:
                return
            for lines, count in threads.map(scan, chunk):
                with open(lines, "rb") as part:
                    shutil.copyfileobj(part, whole)
                lines.unlink()
                found += count


def _scan(shard: str, lines: Path, image_extension: str | None, limit: int | None) -> int:
    filesystem, path = resolve_filesystem(shard)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    count = 0
    try:
        with (
            filesystem.open_input_file(path) as raw,
            io.BufferedReader(raw, LOCAL_BUFFER if is_local else REMOTE_BUFFER) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
            open(lines, "w", encoding="ascii") as out,
        ):
            samples = _samples(shard, file, tar, image_extension)
            for sample in itertools.islice(samples, limit):
                out.write(json.dumps(sample) + "\n")
                count += 1
    except tarfile.TarError as error:
        raise ShardError(
            f"{shard} is damaged, truncated or no tar file ({error}): write it again, or leave it "
            "out; compressed ones have to be unpacked"
        ) from error
    except FileNotFoundError as error:
        raise ShardError(f"{shard}: no such file") from error
    return count


def _samples(
    shard: str, file: IO[bytes], tar: tarfile.TarFile, image_extension: str | None
) -> Iterator[dict[str, Any]]:
    for key, members in itertools.groupby(_files(file, tar), key=lambda found: found[0]):
        parts: dict[str, tarfile.TarInfo] = {}
        texts: dict[str, str] = {}
        for _, extension, member in members:
            if extension in parts:
                raise ShardError(f"{shard} holds {member.name} twice: remove one")
            parts[extension] = member
            if extension in ("json", "txt"):  # now: what was passed is not gone back to
                texts[extension] = _text(shard, tar, member)
        image = {"id": key, "image": _reference(shard, key, parts, image_extension)}
        yield image | _facts(shard, key, texts)


def _files(file: IO[bytes], tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of each file that is part of a sample. Raises tarfile.TarError."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        name = os.fsencode(member.name.removeprefix("./")).decode("utf-8", "backslashreplace")
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name, re.DOTALL)
        if match and not member.isdir():
            yield match[1], match[2].lower(), member
    # tarfile takes whatever it cannot read for the end
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark at byte {tar.offset:,}")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("something follows the end mark: two files in one?")


def _text(shard: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = tar.extractfile(member) if member.isreg() else None
    if content is None or member.size > MAX_TEXT_BYTES:
        raise ShardError(f"{shard}: {member.name} is no file of at most {MAX_TEXT_BYTES:,} bytes")
    try:
        return content.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShardError(f"{shard}: {member.name} is not UTF-8 ({error})") from error


def _reference(
    shard: str, key: str, parts: dict[str, tarfile.TarInfo], image_extension: str | None
) -> str:
    wanted = {image_extension.lower()} if image_extension else IMAGE_EXTENSIONS
    images = [extension for extension in parts if extension in wanted]
    if len(images) > 1:
        raise ShardError(
            f"{shard}: the sample {key} has {len(images)} images, {' and '.join(images)}: name the "
            "extension of the right one with --image-column"
        )
    if not images or not (member := parts[images[0]]).isreg() or member.issparse():
        return shard + NO_IMAGE
    start = member.offset_data
    return f"{shard}#{Span(start - tarfile.BLOCKSIZE, start + member.size)}"


def _facts(shard: str, key: str, texts: dict[str, str]) -> dict[str, Any]:
    """What .json and .txt say; a name that the reference or the key has becomes `input_NAME`."""
    try:
        given = json.loads(texts.get("json", "{}"))
    except ValueError as error:
        raise ShardError(f"{shard}: {key}.json cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ShardError(f"{shard}: {key}.json is not a JSON object")
    if "txt" in texts:
        given.setdefault("description", texts["txt"])
    for name in {"id", "image"} & given.keys():
        free = f"input_{name}"
        while free in given:
            free = f"input_{free}"
        given[free] = given.pop(name)
    return given
