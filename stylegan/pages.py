"""What the pages for people share: their template, theme and thumbnails.

Captions, ids, descriptions and messages come from strangers. A page escapes all of them, forbids
itself scripts and foreign resources, and needs nothing but itself.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from stylegan.images import DecodedImage

THUMBNAIL = 224  # pixels of the longer side

# six colours for curves, then text, lines and what went wrong: the page's, light and dark
LIGHT = ("#3056c9", "#c26a00", "#23857a", "#8a5a9e", "#b8457f", "#6d7a1f",
         "#686a70", "#e2dfd8", "#b3322b")  # fmt: skip
DARK = ("#8fabff", "#e8a54c", "#67c2b0", "#c79ddb", "#f09cc4", "#bccb6c",
        "#9b9da5", "#33363d", "#ff8a80")  # fmt: skip
SOFT, LINE, BAD = LIGHT[6:]


def render(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A page from a template of this package, which extends `page.html.j2`."""
    # here and not above: every worker imports this module, through stylegan.run
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stylegan", ""), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"setting": _setting, **filters}
    return environment.get_template(template).render(values)


def _setting(value: Any) -> str:
    """A value of a configuration in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def thumbnail(image: DecodedImage) -> str | None:
    """A small JPEG in the shape of the original, as a data URI; None where there is no image."""
    if image.pixels is None or not image.width or not image.height:
        return None
    scale = THUMBNAIL / max(image.width, image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    jpeg = io.BytesIO()
    Image.fromarray(image.pixels).resize(size).save(jpeg, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def light_and_dark(svg: str) -> tuple[str, str]:
    """A diagram drawn in LIGHT as two data URIs, for a light and a dark page."""
    colours = dict(zip(LIGHT, DARK, strict=True))
    dark = re.sub("|".join(LIGHT), lambda match: colours[match[0]], svg)
    light, dark = (base64.b64encode(text.encode()).decode() for text in (svg, dark))
    return f"data:image/svg+xml;base64,{light}", f"data:image/svg+xml;base64,{dark}"


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers 0 … count - 1, evenly spaced, the first among them."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def duration(seconds: float) -> str:
    """Seconds in words, as exact as is of use."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def price(amount: float) -> str:
    """In hundredths, or to two digits where it is less than one."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"
