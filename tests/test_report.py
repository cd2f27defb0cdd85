from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pyarrow import fs

from stylegan.parts import ERRORS, OUTPUT
from stylegan.report import NUM_CARDS, data_card, model_card, plot_curves, write_report
from stylegan.training import TrainingConfig

HOSTILE = "<script>alert(1)</script> & \"double\" 'single' {{ 7 * 7 }} <img src=//evil.example/x>"


class Page(HTMLParser):
    """The elements, attributes and texts of a page, as a browser understands them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def picture(size: tuple[int, int], colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def summary_of(rows: Sequence[dict[str, Any]], images: int, **changes: Any) -> dict[str, Any]:
    """As jobs.caption makes it."""
    statuses = [row["status"] for row in rows]
    errors = [row["error_class"] for row in rows if row["status"] == "failed"]
    styles = tuple(dict.fromkeys(row["style"] for row in rows))
    configuration = {"images": None, "output": "captions", "model": None, "styles": styles}
    settings = {
        "input_digest": "c0ffee", "model_revision": "abc123", "styles": styles,
        "captions_per_image": 1, "temperature": None, "max_new_tokens": 24, "seed": 0,
        "best_of": None,
    }  # fmt: skip
    return {
        "run_id": "2026-11-23T02-00-00",
        "finished_at": "2026-11-23T02:00:30+00:00",
        "counts": {
            "images": images,
            "rows": len(rows),
            "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
            "error_classes": {error: errors.count(error) for error in errors},
            "needs_review": sum(bool(row.get("needs_review")) for row in rows),
            "foreign_files": [],
        },
        "rates": {
            "images_this_session": images,
            "seconds_this_session": 29.5,
            "images_per_second": images / 29.5,
            "failed_share": 0.0,
        },
        "seconds_per_stage": {"read": 0.5, "decode": 1.0, "caption": 20.0, "write": 0.1},
        "bottleneck": "caption",
        "configuration": configuration | {"pool": {"actors": (1, 2), "readers": 2, "gpus": 0.0}},
        "settings": settings,
        "input": {"rows": images, "digest": "c0ffee", "units": 1},
        "versions": {"python": "3.11", "ray": "2.60.0"},
    } | changes


def write_run(
    run: Path, parts: Sequence[list[dict[str, Any]]], units: Sequence[list[dict[str, Any]]] = ()
) -> None:
    """data/, errors/ and _plan/ of a run directory, before it is published."""
    for number, rows in enumerate(parts):
        name = f"part-{number:05}.parquet"
        failed = [row for row in rows if row["status"] == "failed"]
        for folder, table in (
            ("data", pa.Table.from_pylist(rows, OUTPUT)),
            ("errors", pa.Table.from_pylist(failed, pa.schema([OUTPUT.field("id"), *ERRORS]))),
        ):
            (run / folder).mkdir(parents=True, exist_ok=True)
            if table.num_rows:
                pq.write_table(table, run / folder / name)
    for number, rows in enumerate(units):
        (run / "_plan").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), run / f"_plan/unit-{number:05}.parquet")


def captioned(row_id: str, caption: str, **more: Any) -> dict[str, Any]:
    row = {"id": row_id, "caption": caption, "style": "colloquial", "status": "captioned"}
    return row | {"needs_review": False, "width": 40, "height": 30} | more


def failed(row_id: str, error_class: str, message: str) -> dict[str, Any]:
    error = {"error_class": error_class, "error_message": message}
    return {"id": row_id, "style": "colloquial", "status": "failed"} | error


def report_of(run: Path, summary: dict[str, Any]) -> str:
    write_report(fs.LocalFileSystem(), str(run), summary)
    return (run / "report.html").read_text(encoding="utf-8")


def test_text_of_strangers_stays_text(tmp_path: Path) -> None:
    rows = [
        captioned(f"caption {HOSTILE}", HOSTILE, description=f"description {HOSTILE}"),
        failed(f"failed {HOSTILE}", f"class {HOSTILE}", f"message {HOSTILE}"),
    ]
    write_run(tmp_path, [rows])
    summary = summary_of(rows, 2)
    summary["configuration"] |= {"images": f"images {HOSTILE}", "model": f"model {HOSTILE}"}
    html = report_of(tmp_path, summary)

    page = Page(html)
    kinds = ("", "caption ", "description ", "failed ", "class ", "message ", "images ", "model ")
    assert not [kind for kind in kinds if f"{kind}{HOSTILE}" not in page.texts]
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "evil.example" not in "".join(value for _, value in page.attributes)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture((40, 30), "red"))
    rows = [captioned("red.png", "A cute red rectangle!")]
    write_run(tmp_path, [rows], [[{"id": "red.png", "_image_uri": str(tmp_path / "red.png")}]])
    html = report_of(tmp_path, summary_of(rows, 1))

    page = Page(html)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/jpeg;base64,")
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html and "@import" not in html
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        page.attributes
    )


def test_pictures_keep_their_shape_whether_they_come_as_paths_or_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(picture((80, 20), "blue"))
    rows = [captioned("wide.png", "So blue!", width=80, height=20)]
    references: tuple[dict[str, Any], ...] = (
        {"_image_uri": str(tmp_path / "wide.png")},
        {"_image_bytes": picture((80, 20), "blue")},
    )
    for number, reference in enumerate(references):
        run = tmp_path / f"run={number}"
        write_run(run, [rows], [[{"id": "wide.png"} | reference]])
        page = Page(report_of(run, summary_of(rows, 1)))
        [source] = [value for name, value in page.attributes if name == "src"]
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert shown.size == (224, 56)
        red, green, blue = shown.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        assert (red < 20, green < 20, blue > 235) == (True, True, True)


def test_an_image_that_is_gone_or_broken_by_now_leaves_its_place_empty(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"GIF89a")
    names = ["gone", "broken", "none"]
    rows = [captioned(name, f"Nice {name}!") for name in names]
    uris = [str(tmp_path / "gone"), str(tmp_path / "broken"), None]
    unit = [{"id": name, "_image_uri": uri} for name, uri in zip(names, uris, strict=True)]
    write_run(tmp_path, [rows], [unit])
    page = Page(report_of(tmp_path, summary_of(rows, 3)))
    assert page.texts.count("no picture") == 3
    assert "Nice gone!" in page.texts


def test_cards_are_spread_over_the_run_and_show_every_style(tmp_path: Path) -> None:
    parts = [
        [
            captioned(f"{part}-{row}", f"{style} {part}-{row}", style=style)
            for row in range(32)
            for style in ("colloquial", "humorous")
        ]
        for part in range(20)
    ]
    write_run(tmp_path, parts)
    rows = [row for part in parts for row in part]
    page = Page(report_of(tmp_path, summary_of(rows, 640)))
    ids = [row["id"] for row in rows[::2]]
    shown = [row_id for row_id in ids if row_id in page.texts]
    assert len(shown) == NUM_CARDS == page.tags.count("article")
    assert len({row_id.partition("-")[0] for row_id in shown}) == 12
    assert all(f"{style} {shown[5]}" in page.texts for style in ("colloquial", "humorous"))


def test_a_resumed_run_says_what_its_speed_is_of(tmp_path: Path) -> None:
    rows = [captioned("1", "Nice!"), captioned("2", "So nice!")]
    write_run(tmp_path, [rows])
    summary = summary_of(rows, 2, bottleneck=None)  # a job that had only to publish
    summary["rates"] |= {"images_this_session": 0, "images_per_second": 0.0}
    summary["configuration"]["pool"] = None
    html = report_of(tmp_path, summary)
    assert "This run was interrupted and resumed." in html
    assert "<dt>Images per second</dt><dd>–</dd>" in html
    assert ">bottleneck<" not in html


def test_failures_are_counted_and_shown_by_class(tmp_path: Path) -> None:
    rows = [failed(f"{n}.jpg", "truncated", f"ends after {n} bytes") for n in range(9)]
    rows += [failed("page.jpg", "not an image", "this is an HTML page")]
    write_run(tmp_path, [rows])
    page = Page(report_of(tmp_path, summary_of(rows, 10)))
    assert page.texts.index("truncated") < page.texts.index("not an image")
    assert [f"ends after {n} bytes" in page.texts for n in range(9)].count(True) == 5
    assert "and 4 more" in page.texts
    assert "this is an HTML page" in page.texts
    assert "No row of this run has a caption." in page.texts


@pytest.mark.parametrize("images", ["s3://shop/catalog.parquet", "a\n---\nb | `c`: \"d\" '#e"])
def test_the_data_card_is_read_by_the_hub(images: str) -> None:
    rows = [captioned("1", "Nice!"), failed("2", "gone", "no such file")]
    summary = summary_of(rows, 2)
    summary["configuration"]["images"] = images
    front, body = front_matter(data_card(summary))
    [config] = front["configs"]
    assert config["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert front["size_categories"] == ["n<1K"]
    assert all(f"| `{name}` |" in body for name in OUTPUT.names)
    assert "| images | 2 |" in body
    assert "| images that failed: gone | 1 |" in body
    [line] = [line for line in body.splitlines() if line.startswith("| input |")]
    assert line.count("|") == 3 and line.count("`") == 2


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (4_200_000, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories_are_the_hubs(rows: int, category: str) -> None:
    summary = summary_of([captioned("1", "Nice!")], 1)
    summary["counts"]["rows"] = rows
    assert front_matter(data_card(summary))[0]["size_categories"] == [category]


def test_the_model_card_shows_figures_beside_their_baselines() -> None:
    metrics = {
        "held_out_nats_per_token": 2.34567,
        "content": {
            "template": {"captions": 950, "type_right": {"mean": 0.9, "low": 0.88, "high": 0.92}},
            "delivered": {"captions": 950, "distinct_2": 0.71},
        },
    }
    card = model_card(metrics, {"preset": "base", "backbone_rate": 0.004}, "Street photographs.")
    front, body = front_matter(card)
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "image-to-text")
    assert front["library_name"] == "stylegan"
    assert "## Data\n\nStreet photographs.\n" in body
    assert "| held out nats per token | 2.346 |" in body
    assert "|  | template | delivered |" in body
    assert "| type right | 0.900 (0.880 to 0.920) |  |" in body
    assert "| distinct 2 |  | 0.710 |" in body
    assert "    --preset base \\\n    --backbone-rate 0.004\n" in body


def test_the_model_card_tells_of_the_adversarial_stage_where_it_ran() -> None:
    settings = dataclasses.asdict(TrainingConfig())
    alone = model_card({}, settings | {"adversarial_steps": 0}, "")
    both = model_card({}, settings | {"adversarial_steps": 600, "backbone": "my models/a"}, "")
    for term in ("discriminator", "RLOO", "R1", "KL divergence", "moving average", "caption_score"):
        assert term in both and term not in alone
    assert "\n\n\n" not in both + alone
    assert "    --backbone 'my models/a'" in both


def test_the_command_leaves_out_what_is_the_default_anyway() -> None:
    card = model_card({}, dataclasses.asdict(TrainingConfig(seed=3)), "")
    flags = ("--catalog CATALOG", "--colloquial SENTENCES", "--output MODEL", "--seed 3")
    assert "".join(f" \\\n    {flag}" for flag in flags) + "\n```\n" in card


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    start, front, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


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
