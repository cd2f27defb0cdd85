from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from test_training_page import EVENTS, rows_of

from stylegan.curves import plot_curves


def test_curves_are_a_picture(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "backbone", "step": step, "loss": 5 / step, "rate": 1e-3} for step in (1, 2, 3)
    ]
    rows += [{"stage": "backbone held-out", "step": 3, "type": 0.8, "colour": 0.7}]
    rows += [{"stage": "likelihood", "step": step, "nats_per_token": 3.0} for step in (1, 2)]
    rows += [{"stage": "likelihood held-out", "step": 2, "nats_per_token": 3.1}]
    plot_curves(rows, tmp_path / "curves.png")
    plot_curves(rows[:3], tmp_path / "one.png")
    plot_curves([], tmp_path / "none.png")
    sizes = {}
    for name in ("curves", "one", "none"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"
            sizes[name] = image.size
    assert sizes["curves"][0] == 3 * sizes["one"][0]
    assert sizes["none"] == sizes["one"]


def test_curves_wrap_into_rows(tmp_path: Path) -> None:
    rows = rows_of(styles=("humorous", "romantic"))
    plot_curves(rows, tmp_path / "all.png", EVENTS)
    plot_curves([row for row in rows if row["stage"] == "backbone"], tmp_path / "one.png")
    with Image.open(tmp_path / "all.png") as image, Image.open(tmp_path / "one.png") as one:
        assert image.width == 3 * one.width
        assert image.height in (3 * one.height, 4 * one.height)
