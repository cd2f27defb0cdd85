"""The sample catalogue: the same bytes every time, descriptions that are true by the lexicon."""

from __future__ import annotations

import csv
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylegan import samples
from stylegan.samples import draw_product, write_samples

PACKAGE = Path(samples.__file__).parent
LEXICON = tomllib.loads((PACKAGE / "lexicon.toml").read_text("utf-8"))
TABLES = tomllib.loads((PACKAGE / "samples.toml").read_text("utf-8"))
KINDS = list(TABLES["kinds"])


def _products(catalog: Path) -> list[dict[str, str]]:
    with catalog.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def _mentioned(text: str, table: dict[str, set[str]]) -> set[str]:
    """What a text names by one of the forms, the longest form at each place."""
    forms = sorted({form for own in table.values() for form in own}, key=len, reverse=True)
    pattern = r"(?<![\w'-])(" + "|".join(map(re.escape, forms)) + r")(?:e?s)?(?![\w-])"
    found = set(re.findall(pattern, text.lower()))
    return {name for name, own in table.items() if own & found}


def _colours_of(kind: str) -> list[str]:
    names = TABLES["kinds"][kind]["colours"]
    return [colour for name in names for colour in TABLES["palettes"].get(name, [name])]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), count=2 * len(KINDS) + 1, seed=5)


def test_every_kind_is_there_and_every_image_decodes(catalog: Path) -> None:
    products = _products(catalog)
    assert [product["id"] for product in products] == [f"{i:04d}" for i in range(len(products))]
    assert {product["type"] for product in products[: len(KINDS)]} == set(KINDS)
    for product in products:
        with Image.open(catalog.parent / product["image"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (192, 256))
            image.load()


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for directory, seed in ((first, 1), (second, 1), (other, 2)):
        write_samples(directory, count=5, seed=seed)
    assert _files(first) == _files(second)
    assert sorted(_files(first)) == ["catalog.csv", *(f"images/{i:04d}.jpg" for i in range(5))]
    assert not set(_files(first).values()) & set(_files(other).values())


def test_an_image_does_not_depend_on_the_count(catalog: Path, tmp_path: Path) -> None:
    few = write_samples(tmp_path, count=3, seed=5)
    assert _products(few) == _products(catalog)[:3]
    for product in _products(few):
        image = product["image"]
        assert (few.parent / image).read_bytes() == (catalog.parent / image).read_bytes()


def test_a_second_call_draws_nothing_unless_something_is_missing(tmp_path: Path) -> None:
    catalog = write_samples(tmp_path, count=4)
    whole = _files(tmp_path)
    # a mark that drawing would remove
    (tmp_path / "images" / "0002.jpg").write_bytes(b"mark")
    assert write_samples(tmp_path, count=4) == catalog
    assert (tmp_path / "images" / "0002.jpg").read_bytes() == b"mark"
    (tmp_path / "images" / "0001.jpg").unlink()
    write_samples(tmp_path, count=4)
    assert _files(tmp_path) == whole
    write_samples(tmp_path, count=4, seed=9)
    assert _files(tmp_path)["catalog.csv"] != whole["catalog.csv"]


def test_descriptions_name_kind_colour_and_gender_by_the_lexicon() -> None:
    kinds = {
        kind: {kind, *entry["forms"], *entry.get("also", [])}
        for kind, entry in LEXICON["types"].items()
    }
    colours = {family: set(words) for family, words in LEXICON["colours"].items()}
    genders = {gender: set(words) for gender, words in LEXICON["genders"].items()}
    rng = random.Random(0)
    for kind in KINDS:
        for colour in _colours_of(kind) * 4:
            product = samples._choose(kind, colour, rng)
            title = samples._describe(product, rng)
            # "orange" names a fruit as well as a colour
            nouns = re.sub(r"(?i)\borange\b", "", title) if colour == "orange" else title
            assert kind in _mentioned(nouns, kinds), title
            own = {kind} | {k for k in kinds if kinds[k] & kinds[kind]}
            assert _mentioned(nouns, kinds) <= own, title
            families = {family for family, words in colours.items() if colour in words}
            assert families and _mentioned(title, colours) == families, title
            assert _mentioned(title, genders) == ({product.gender} - {""}), title
            assert title[0].isupper() and "  " not in title


@pytest.mark.parametrize("kind", KINDS)
def test_the_colour_is_seen_in_the_picture(kind: str) -> None:
    plain = {"red", "blue", "green", "yellow", "black"}
    for colour in plain.intersection(_colours_of(kind)):
        pixels = np.asarray(draw_product(kind, colour, random.Random(1)), np.float64)
        r, g, b = np.moveaxis(pixels, -1, 0)
        seen = {
            "red": (r > g + 40) & (r > b + 40),
            "blue": (b > r + 12) & (b > g + 8),
            "green": (g > r + 12) & (g > b + 8),
            "yellow": (r > b + 60) & (g > b + 40),
            "black": (pixels.max(-1) < 100) & (np.ptp(pixels, -1) < 40),
        }[colour]
        # the frame of sunglasses is thin
        assert seen.mean() > (0.015 if kind == "sunglasses" else 0.05), colour


def test_every_drawing_can_be_drawn() -> None:
    for kind, entry in TABLES["kinds"].items():
        for detail in entry.get("details", [""]):
            for pattern in entry.get("patterns", ["plain"]):
                product = samples.Product(kind, _colours_of(kind)[0], "", pattern, detail)
                image = samples._Sketch(product, random.Random(detail)).photograph()
                assert np.asarray(image.convert("L"), np.float64).std() > 5, product


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stylegan.samples", str(tmp_path), "--count", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert Path(done.stdout.strip()) == tmp_path / "catalog.csv"
    assert len(_products(tmp_path / "catalog.csv")) == 2
