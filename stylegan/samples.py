"""The sample catalogue: drawn product images with their formal descriptions.

    python -m stylegan.samples DIRECTORY [--count N] [--seed S]

Demonstrations, tests and a share of the training data need pictures that may be given to anybody.
They are drawn when needed, as `samples.toml` says; colour, cut, pattern, pose and light vary.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
import re
import tomllib
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFilter import BoxBlur, GaussianBlur

Array = npt.NDArray[np.float64]
Rgb = tuple[int, int, int]
WIDTH, HEIGHT = 192, 256  # pixels


@cache
def _tables() -> dict[str, Any]:
    """samples.toml: titles, paints, mixes, palettes, kinds, drawings."""
    return tomllib.loads(resources.files("stylegan").joinpath("samples.toml").read_text("utf-8"))


class Product(NamedTuple):
    """What a picture shows and its description says; an empty string: nothing of the sort."""

    kind: str
    colour: str
    gender: str
    pattern: str
    detail: str


def _mix(colour: Rgb, other: Rgb, share: float) -> Rgb:
    r, g, b = (round(x + (y - x) * share) for x, y in zip(colour, other, strict=True))
    return r, g, b


def _points(*numbers: float) -> Array:
    """[N, 2] from x, y, x, y …"""
    return np.array(numbers, np.float64).reshape(-1, 2)


def _turn(degrees: float) -> Array:
    """The matrix [2, 2] that turns row vectors."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _points(cos, sin, -sin, cos)


def _smooth(points: Array, share: float, closed: bool) -> Array:
    """Chaikin's corner cutting; share: how much of an edge a corner may take, 0 to .25."""
    for cut in (share, 0.25, 0.25) if share else ():
        a, b = points, np.roll(points, -1, 0)
        cuts = np.stack([a + cut * (b - a), b - cut * (b - a)], 1).reshape(-1, 2)
        points = cuts if closed else np.concatenate([a[:1], cuts[:-2], a[-1:]])
    return points


class _Sketch:
    """A product at twice the size: paint on `base`, volume on `light`, soft folds on `creases`."""

    def __init__(self, product: Product, rng: random.Random) -> None:
        self.product, self.rng, u, tables = product, rng, rng.uniform, _tables()
        self.noise = np.random.default_rng(rng.getrandbits(32))
        self.kind = tables["kinds"][product.kind]
        paints: dict[str, Rgb] = {k: (r, g, b) for k, (r, g, b) in tables["paints"].items()}
        white, dark, (tint, share) = paints["white"], paints["dark"], self.kind["tint"]
        glare, sun = u(0.9, 1.08), rng.choice((-1, 1))
        r, g, b = (min(250, max(12, int(c * glare + u(-4, 4)))) for c in paints[product.colour])
        body = _mix((r, g, b), paints[tint], share)
        accent = rng.choice([c for c in paints.values() if sum(abs(np.subtract(c, body))) > 250])
        metal = product.colour if product.colour in ("gold", "silver") else "steel"
        pale, (dial, mark) = sum(body) > 480, rng.sample((white, dark), 2)
        ground = u(202, 222) if pale else u(236, 251)
        paints |= {
            "body": body, "accent": accent, "metal": paints[metal], "dial": dial, "mark": mark,
            "contrast": _mix(_mix(accent, dark, 0.2), body, 0.35) if pale else white,
            # a seam has to show on black, too
            "ink": _mix(body, dark, 0.42) if sum(body) > 225 else _mix(body, white, 0.24),
            "ground": (int(ground), int(ground + u(-2, 2)), int(ground + u(-3, 3))),
        }  # fmt: skip
        for name, (one, other, share) in tables["mixes"].items():
            paints[name] = _mix(paints[one], paints[other], share)
        self.paints, self.cloths = paints, dict[Rgb, Image.Image]()
        self.terms = {"": 1.0, "h": u(0, 1), "w": u(0, 1), "k": u(0, 1), "t": u(0.11, 0.22)}
        self.terms |= {"f": product.gender == "women", "v": product.detail == "v-neck"}
        self.sun = (u(0.3, 0.8) * sun, u(0.4, 0.9))
        self.size, aspect, tilt = u(138, 168), u(0.95, 1.05), self.kind["tilt"]
        pose = _points(aspect * rng.choice((-1, 1)), 0, 0, 1 / aspect) @ _turn(u(-tilt, tilt))
        # the drawing's coordinates to the canvas: row vectors @ matrix + centre
        self.matrix, self.centre = pose * self.size, _points(WIDTH + u(-9, 9), HEIGHT + u(-12, 12))
        self.base = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), paints["ground"])
        self.alpha = Image.new("L", self.base.size)
        self.creases, self.light = Image.new("L", (WIDTH, HEIGHT), 128), np.ones((HEIGHT, WIDTH))

    def place(self, points: Array) -> Array:
        """Canvas positions [N, 2] of points in the drawing's coordinates."""
        return np.asarray(points @ self.matrix + self.centre)

    def number(self, word: str) -> float:
        """.5h.1 is .5 + .1 h."""
        self.terms["q"] = self.rng.uniform(-1, 1)
        terms = re.findall(r"([a-z]?)(-?[\d.]+)", word)
        return sum(float(value) * self.terms[letter] for letter, value in terms)

    def draw(self, drawing: str) -> None:
        """Carry out a drawing's statements; samples.toml says what they mean."""
        for statement in _tables()["drawings"][drawing].split(";"):
            verb, *words = statement.split()
            numbers = [self.number(word) for word in words if re.match(r"[-.\d]", word)]
            if verb == "use":
                self.draw(self.rng.choice(words))
            elif verb == "at":
                x, y, scale_x, scale_y, degrees = numbers
                self.centre = self.place(_points(x, y))
                self.matrix = _points(scale_x, 0, 0, scale_y) @ _turn(degrees) @ self.matrix
            elif verb == "text":
                font = ImageFont.load_default(size=numbers[2] * self.size)
                x, y = self.place(_points(*numbers[:2]))[0].tolist()
                brush, paint = ImageDraw.Draw(self.base), self.paints[words[1]]
                brush.text((x, y), words[0], paint, font, "mm", stroke_width=1)
            else:
                self.stroke(verb, words, numbers)

    def stroke(self, verb: str, words: list[str], numbers: list[float]) -> None:
        """A part or a line, with its repetitions."""
        options = {word[0]: word[1:] for word in words if re.match(r"[a-z](?![a-z])", word)}
        values = {key: self.number(options[key]) / 100 for key in "rwvd" if key in options}
        colour = next((self.paints[w] for w in words if w in self.paints), self.paints["body"])
        points, u = _points(*numbers), self.rng.uniform
        if "e" in options:
            start, end = [*numbers, 0, 360][4:6]
            angles = np.radians(np.linspace(start, end, 29))
            points = points[0] + points[1] * np.stack([np.cos(angles), np.sin(angles)], 1)
        if "b" in options:
            points = np.concatenate([points, points[::-1] * _points(-1, 1)])
        copies = [points]
        for repeat, arguments in re.findall(r"\b([xos])(\d\S*)", " ".join(words)):
            times, *step = map(self.number, arguments.split(","))
            pairs = [(c, i) for c in copies for i in range(int(times))]
            if repeat == "x":
                move = np.linspace(step[:2], step[-2:], len(points))
                copies = [c + move * i for c, i in pairs]
            elif repeat == "o":
                axis = _points(*step[:2])
                copies = [(c - axis) @ _turn(step[2] * i) + axis for c, i in pairs]
            else:
                x, y0, y1 = step
                copies = [c @ _turn(u(-50, 50)) + _points(u(-x, x), u(y0, y1)) for c, _ in pairs]
        sides = (1, -1) if "m" in options else (1,)
        for c in [c * _points(side, 1) for c in copies for side in sides]:
            if verb in ("fill", "glow"):
                outline = self.place(_smooth(c, values.get("r", 0.05), True))
                paint = None if verb == "glow" else colour
                self.fill(outline, paint, values.get("v", 1.0), "p" in options)
                continue
            placed = self.place(_smooth(c, 0 if verb == "dot" else values.get("r", 0.25), False))
            if verb == "fold":
                ends, depth = (placed / 2).ravel().tolist(), round(128 - 100 * values.get("d", 0.3))
                width = round(100 * values.get("w", 0.03))
                ImageDraw.Draw(self.creases).line(ends, depth, width, joint="curve")
            else:
                self.line(verb, placed, colour, values.get("w", 0.02) * self.size)

    def line(self, verb: str, placed: Array, colour: Rgb, width: float) -> None:
        """Dots, a line, a dashed seam, or a tube with a dark edge and a bright back."""
        brush, fine = ImageDraw.Draw(self.base), max(1, round(width))
        if verb == "dot":
            for x, y in placed.tolist():
                brush.ellipse((x - width, y - width, x + width, y + width), colour)
        elif verb == "seam":
            for a, b in pairwise(placed):
                step = 8 / max(8.0, float(np.hypot(*(b - a))))
                for i in np.arange(0, 1, step):
                    ends = np.concatenate([a + (b - a) * i, a + (b - a) * (i + 0.6 * step)])
                    brush.line(ends.tolist(), colour, fine)
        else:
            ImageDraw.Draw(self.alpha).line(placed.ravel().tolist(), 255, fine, joint="curve")
            edge, back = _mix(colour, (0, 0, 0), 0.4), _mix(colour, (255, 255, 255), 0.25)
            tube = [(edge, 1.0, 0.0), (colour, 0.76, 0.0), (back, 0.22, -0.15)]
            for paint, share, shift in tube if verb == "tube" else [(colour, 1.0, 0.0)]:
                middle, pixels = placed + shift * width, max(1, round(width * share))
                brush.line(middle.ravel().tolist(), paint, pixels, joint="curve")

    def cloth(self, colour: Rgb) -> Image.Image:
        """The product's pattern on this colour, as large as the canvas."""
        if colour not in self.cloths:
            base, alpha = self.base, self.alpha
            self.base, self.alpha = Image.new("RGB", base.size, colour), alpha.copy()
            self.draw(self.product.pattern)
            self.cloths[colour], self.base, self.alpha = self.base, base, alpha
        return self.cloths[colour]

    def fill(self, outline: Array, colour: Rgb | None, volume: float, patterned: bool) -> None:
        """A part, [N, 2] on the canvas, that bulges by `volume`; without a colour: mere light."""
        mask = Image.new("L", self.base.size)
        ImageDraw.Draw(mask).polygon(outline.ravel().tolist(), fill=255)
        small = mask.reduce(2)
        if colour is None:
            self.light += volume * np.asarray(small.filter(BoxBlur(7)).filter(BoxBlur(5))) / 255
            return
        self.base.paste(self.cloth(colour) if patterned else colour, (0, 0), mask)
        # a gap shows the ground again
        self.alpha.paste(0 if colour == self.paints["ground"] else 255, (0, 0), mask)
        self.creases.paste(128, (0, 0), small)
        x0, y0, x1, y1 = small.getbbox() or (0, 0, 1, 1)
        reach = max(2, min(8, min(x1 - x0, y1 - y0) // 6))
        wide = small.crop((x0 - reach, y0 - reach, x1 + reach, y1 + reach))
        soft = np.asarray(wide.filter(BoxBlur(reach * 0.7)).filter(BoxBlur(reach * 0.4))) / 255
        core, m = slice(reach, -reach), np.asarray(small.crop((x0, y0, x1, y1))) / 255
        slope_x = soft[core, 2 * reach :] - soft[core, : -2 * reach]
        slope_y = soft[2 * reach :, core] - soft[: -2 * reach, core]
        fall = np.linspace(-0.22, -0.34, len(m))[:, None] + 0.32 * soft[core, core]
        part = 1 + volume * (0.16 * (self.sun[0] * slope_x + self.sun[1] * slope_y) + fall)
        if patterned and "grain" in self.kind:
            part += self.noise.normal(0, self.kind["grain"], m.shape)
        window = self.light[y0:y1, x0:x1]
        window += m * (part - window)

    def photograph(self) -> Image.Image:
        """The picture, 192 x 256 RGB: paint under light, on a ground with a soft shadow."""
        exact = f"{self.product.kind} {self.product.detail}"
        self.draw(exact if exact in _tables()["drawings"] else self.product.kind)
        u, small = self.rng.uniform, self.alpha.reduce(2)
        alpha = np.asarray(small) / 255
        blurred = np.asarray(small.filter(BoxBlur(u(2, 6))).filter(BoxBlur(2))) / 255
        shadow = np.roll(blurred, (self.rng.randint(2, 6), round(-5 * self.sun[0])), (0, 1))
        y, x = np.linspace(-1, 1, HEIGHT)[:, None], np.linspace(-1, 1, WIDTH)[None]
        ground = 1 - u(0, 0.04) * (x * x + y * y) + u(-0.025, 0.025) * (x + y)
        lit = self.light * np.asarray(self.creases.filter(BoxBlur(1.3))) / 128
        light = ground * (1 - u(0.2, 0.4) * shadow) * (1 - alpha) + alpha * lit
        # light times black is black: some sheen is added
        sheen = 40 * alpha * (lit - 0.95) + self.noise.normal(0, u(1, 3.2), alpha.shape)
        rgb = np.asarray(self.base.reduce(2)) * light[..., None] + sheen[..., None]
        return Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).filter(GaussianBlur(u(0.2, 0.5)))


def _choose(kind: str, colour: str, rng: random.Random) -> Product:
    """A product of this kind and colour: for whom, its pattern, its detail."""
    entry = _tables()["kinds"][kind]
    gender = rng.choice(entry.get("genders", [""])) if rng.random() < 0.7 else ""
    pattern = "multi" if colour == "multicolour" else rng.choice(entry.get("patterns", ["plain"]))
    return Product(kind, colour, gender, pattern, rng.choice(entry.get("details", [""])))


def draw_product(kind: str, colour: str, rng: random.Random) -> Image.Image:
    """A picture, 192 x 256 RGB, of a product; kind and colour: in samples.toml."""
    return _Sketch(_choose(kind, colour, rng), rng).photograph()


def _describe(product: Product, rng: random.Random) -> str:
    """A formal title that names the kind, the colour and, where chosen, the gender."""
    entry, colour, gender = _tables()["kinds"][product.kind], product.colour, product.gender
    parts = {
        "name": rng.choice(entry["names"]), "colour": colour, "gender": gender,
        "owner": gender and f"{gender}'s", "for_whom": gender and f"for {gender}",
        "pattern": "" if product.pattern in ("plain", "multi") else product.pattern,
        "detail": product.detail if "titles" in entry or rng.random() < 0.7 else "",
        "material": entry.get("material", "") if rng.random() < 0.5 else "",
    }  # fmt: skip
    titles = _tables()[entry.get("titles", "titles")]
    # the last title ends with the colour, and an orange at the end is a fruit
    title = rng.choice(titles[:-1] if colour == "orange" else titles)
    title = " ".join(title.format(**parts).split())
    if rng.random() < 0.5:
        first = r"(^|[ -])(?!(?:in|for|of|an?) )([a-z])"
        title = re.sub(first, lambda match: match[1] + match[2].upper(), title)
    return title[0].upper() + title[1:]


def write_samples(directory: Path, count: int = 240, seed: int = 0) -> Path:
    """Draw `count` products into directory/images and list them in directory/catalog.csv.

    Returns the list's path; its columns: id, image, description, type, colour, gender. It is
    written last; if it and its images are there, nothing is drawn. Image i depends on i and seed.
    """
    kinds, palettes = _tables()["kinds"], _tables()["palettes"]
    rows, products = io.StringIO(), []
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["id", "image", "description", "type", "colour", "gender"])
    for i in range(count):
        # every kind comes once before any comes again
        turn, place = divmod(i, len(kinds))
        kind = random.Random(f"{seed}/turn {turn}").sample(list(kinds), len(kinds))[place]
        rng, image = random.Random(f"{seed}/{i}"), f"images/{i:04d}.jpg"
        colours = [c for name in kinds[kind]["colours"] for c in palettes.get(name, [name])]
        product = _choose(kind, rng.choice(colours), rng)
        writer.writerow([f"{i:04d}", image, _describe(product, rng), *product[:3]])
        products.append((directory / image, product, rng))
    catalog, text = directory / "catalog.csv", rows.getvalue()
    if catalog.is_file():
        if catalog.read_text("utf-8") == text and all(path.is_file() for path, _, _ in products):
            return catalog
        catalog.unlink()
    (directory / "images").mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{os.getpid()}"
    for path, product, rng in products:
        _Sketch(product, rng).photograph().save(temporary, "JPEG", quality=88)
        temporary.replace(path)
    temporary.write_text(text, "utf-8")
    return temporary.replace(catalog)


def main() -> None:
    """Write the sample catalogue and print the path of its list."""
    parser = argparse.ArgumentParser(prog="python -m stylegan.samples", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="where images/ and catalog.csv are written")
    parser.add_argument("--count", type=int, default=240, help="number of images (240)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other products (0)")
    print(write_samples(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
