from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from stylegan.parts import ERRORS, OUTPUT
from stylegan.report import NUM_CARDS, write_report

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
    assert "<dt>Images/s</dt><dd>–</dd>" in html
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


def test_what_changed_is_beside_what_was(tmp_path: Path) -> None:
    rows = [captioned("1", "New!"), captioned("2", "Kept.", status="carried_over")]
    rows += [failed("3", "gone", "no file"), failed("4", "gone", "no file")]
    write_run(tmp_path, [rows])
    before = {"images": 3, "rows": 3, "statuses": {"captioned": 2, "failed": 1},
              "error_classes": {"truncated": 1}, "needs_review": 2}  # fmt: skip
    changes = {"carried_over": 1, "still_failed": 1, "locked": 0, "new": 1, "changed": 1,
               "retried": 0, "gone": 5}  # fmt: skip
    pairs = [{"id": f"id {HOSTILE}", "style": "colloquial", "before": f"before {HOSTILE}",
              "after": f"after {HOSTILE}"}]  # fmt: skip
    summary = summary_of(
        rows, 4, previous="run=then", previous_counts=before, changes=changes, replaced=pairs
    )
    summary["rates"]["images_this_session"] = 2
    html = report_of(tmp_path, summary)
    page = Page(html)
    texts = [text for text in page.texts if text]
    start = texts.index("Since run=then")
    assert texts[start + 1 : start + 17] == [
        "New", "1", "Changed", "1", "Retried", "0", "Carried over", "1", "Still failed", "1",
        "Locked", "0", "Gone", "5", "Newly failed", "1",
    ]  # fmt: skip
    assert texts[start + 17 : start + 40] == [
        "run=then", "this run", "difference", "images", "3", "4", "+1", "rows with a caption", "2",
        "2", "=", "rows that need review", "2", "0", "-2", "failed images: gone", "0", "2", "+2",
        "failed images: truncated", "1", "0", "-1",
    ]  # fmt: skip
    assert {f"{name} {HOSTILE}" for name in ("id", "before", "after")} <= set(texts)
    assert "script" not in page.tags and "interrupted" not in html
    # what was not opened is not shown beside what was
    assert "1 images that this run captioned, spread evenly over the run." in texts
    assert "New!" in texts and "Kept." not in texts


def test_scores_and_the_captions_at_their_ends(tmp_path: Path) -> None:
    rows = [captioned(str(n), f"Caption {n}!", caption_score=n / 8) for n in range(4)]
    rows.append(captioned("0", "Another of 0.", caption_score=0.9, style="humorous"))
    write_run(tmp_path, [rows])
    ends = [{"score": n / 8, "unit": 0, "id": str(n), "style": "colloquial"} for n in (0, 1, 3)]
    counts = {"colloquial": [1, 3] + [0] * 18}
    scores = {"counts": counts, "lowest": ends[:2], "highest": [ends[2], ends[1]]}
    html = report_of(tmp_path, summary_of(rows, 4, scores=scores))
    shares = re.findall(r'<i style="height: ([\d.]+)%" title="([^"]+)"', html)
    assert shares[:3] == [
        ("33.3", "0.00 to 0.05: 1 captions"), ("100.0", "0.05 to 0.10: 3 captions"),
        ("0.0", "0.10 to 0.15: 0 captions"),
    ]  # fmt: skip
    assert len(shares) == 20
    texts = [text for text in Page(html).texts if text]
    low, high = texts.index("Lowest scores of this run"), texts.index("Highest scores of this run")
    assert [t for t in texts[low:high] if "aption" in t] == ["Caption 0!", "Caption 1!"]
    assert "Another of 0." not in texts[low:]  # another style's caption of the image
    assert [t for t in texts[high : texts.index("Failures")] if "aption" in t] == ["Caption 3!"]


def test_cost_is_shown_where_there_is_a_price(tmp_path: Path) -> None:
    rows = [captioned("1", "Nice!")]
    write_run(tmp_path, [rows])
    summary = summary_of(rows, 1, busy_shares={"caption": 0.934})
    assert "Cost" not in Page(report_of(tmp_path, summary)).texts
    summary["rates"] |= {"cost_this_session": 0.01234, "cost_per_million": 1234.5,
                         "images_per_second_per_actor": 8.25}  # fmt: skip
    html = report_of(tmp_path, summary)
    texts = [text for text in Page(html).texts if text]
    assert texts[texts.index("Cost") : texts.index("Cost") + 4] == [
        "Cost", "0.012", "Per million images", "1,234.50",
    ]  # fmt: skip
    assert "busiest: caption, 93% of the time. One captioner writes for 8.2 images a" in html
