from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import HOSTILE, Page, picture

from stylegan.curves import PANELS, plot_curves
from stylegan.training_page import write_training_page

Rows = list[dict[str, Any]]


def rows_of(last: int = 600, styles: Sequence[str] = ("",)) -> Rows:
    """What a training reports; every number is made up."""
    rows: Rows = []
    for step in range(100, 1001, 100):
        rows.append({"stage": "backbone", "step": step, "loss": 300 / step, "rate": 1e-3})
    rows.append({"stage": "backbone held-out", "step": 1000, "type": 0.8, "colour": 0.7})
    for step in range(100, 1001, 100):
        rows.append({"stage": "likelihood", "step": step, "nats_per_token": 2 + 100 / step})
    rows.append({"stage": "likelihood held-out", "step": 1000, "nats_per_token": 2.4})
    rows += [{"stage": "warm-up", "step": s, "pair_accuracy": 0.5 + s / 400} for s in (50, 100)]
    for step in range(0, last + 1, 50):
        rows.append({
            "stage": "adversarial held-out", "step": step, "auc": 0.76 - step / 10_000,
            "named": 0.98, "contradiction": 0.01, "distinct_2": 1 + step / 10_000, "score": 1.0,
        })  # fmt: skip
        if step:
            plain = {"kl": step / 6000, "beta": 0.05, "rate": 3e-5, "r1": 0.1, "d_steps": 1.0}
            styled = {
                f"{name}{'/' if style else ''}{style}": value + step / 1000
                for style in styles
                for name, value in {"d_real": 0.5, "d_fake": -0.5, "reward": 0.1}.items()
            }
            row = {"stage": "adversarial", "step": step, "steps": 600, "minutes_left": 6.2}
            rows.append(row | plain | styled)
    return rows


ROLLBACK = {"stage": "adversarial", "step": 300, "kind": "rollback", "why": "KL .31, limit .25"}
EVENTS: Rows = [
    {"stage": "adversarial", "step": 100, "kind": "snapshot", "why": "AUC .75"},
    {"stage": "adversarial", "step": 200, "kind": "snapshot", "why": "AUC .74"},
    ROLLBACK,
    {"stage": "adversarial", "step": 500, "kind": "snapshot", "why": "AUC .70"},
    {"stage": "adversarial", "step": 600, "kind": "done", "why": "all steps taken"},
]
CONFIGURATION = {"preset": "tiny", "adversarial_steps": 600, "backbone": "", "kl_target": 0.1}
VERDICT = {
    "before": {"auc": 0.76, "named": 0.98, "contradiction": 0.01, "kl": 0.0},
    "after": {"auc": 0.7, "named": 0.981, "contradiction": 0.03, "kl": 0.1},
}


def page_of(path: Path, **changes: Any) -> str:
    """The page of a made-up training that has finished, in one part or another different."""
    products = [{"description": "Red rectangle", "image": picture((40, 30), "red")}]
    samples = [{"step": step, "captions": [f"Caption {step}"]} for step in (0, 300, 500)]
    content: dict[str, Any] = {
        "title": "A training", "rows": rows_of(), "events": EVENTS, "products": products,
        "samples": samples, "configuration": CONFIGURATION, "verdict": VERDICT,
    }  # fmt: skip
    write_training_page(path / "training.html", **content | changes)
    return (path / "training.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the made-up training as it is."""
    return page_of(tmp_path_factory.mktemp("page"))


def diagrams(html: str) -> list[str]:
    """The light diagrams of a page, as SVG."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    return [base64.b64decode(data).decode() for data in found]


def words(svg: str) -> list[str]:
    """What a diagram says, as a reader of XML understands it."""
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in texts]


def test_the_page_tells_how_the_training_went(html: str) -> None:
    page = Page(html)
    said = " ".join(page.texts)
    assert "captions harder to tell from people's sentences" in said
    assert "0.760 → 0.700" in said
    assert "It cost: contradicted 0.010 → 0.030." in said
    assert "Finished at step 600 of the adversarial stage." in said
    # the story: snapshots in a row are one entry, rollbacks are numbered
    start = page.texts.index("Steps 100, 200")
    assert [text for text in page.texts[start:] if text][:18] == [
        "Steps 100, 200", "adversarial", "snapshot", "AUC .74",
        "Step 300", "adversarial", "rollback 1", "KL .31, limit .25",
        "Step 500", "adversarial", "snapshot", "AUC .70",
        "Step 600", "adversarial", "finished", "all steps taken",
        "Is it getting better?", "Dashed lines are rollbacks, numbered as above; what they took "
        "back is shaded. Ticks are snapshots.",
    ]  # fmt: skip
    titles = [panel.title for panels in PANELS.values() for panel in panels]
    assert {"Held-out detector, AUC", "Reward", "Verdicts"} < set(titles) & set(page.texts)


def test_the_page_needs_nothing_else_and_runs_nothing(html: str) -> None:
    page = Page(html)
    sources = [v for name, v in page.attributes if name in ("src", "href", "srcset")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        page.attributes
    )
    # a diagram for a light page and the same for a dark one
    assert page.tags.count("source") == page.tags.count("picture") == len(diagrams(html)) > 10


def test_text_of_strangers_stays_text(tmp_path: Path) -> None:
    html = page_of(
        tmp_path,
        title=f"title {HOSTILE}",
        events=[ROLLBACK | {"why": f"why {HOSTILE}"}],
        products=[{"description": f"description {HOSTILE}", "image": b"GIF89a"}],
        samples=[{"step": step, "captions": [f"{step} {HOSTILE}"]} for step in (0, 600)],
        configuration={f"key {HOSTILE}": f"value {HOSTILE}", "pair": {"a": f"in {HOSTILE}"}},
        rows=rows_of(styles=("a$b$^_{", "_<b>&\"'", "幽默")),
    )
    page = Page(html)
    kinds = ("title ", "why ", "description ", "0 ", "600 ", "key ", "value ", "a in ")
    assert not [kind for kind in kinds if f"{kind}{HOSTILE}" not in page.texts]
    assert not {"script", "iframe", "object", "link", "svg", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "evil.example" not in "".join(value for _, value in page.attributes)
    assert page.texts.count("no picture") == 1
    said = [text for svg in diagrams(html) for text in words(svg)]
    assert {"on people's, a$b$^ {", "on people's,  <b>&\"'", "on captions, 幽默"} <= set(said)


@pytest.mark.parametrize("last", [0, 150, 600])
def test_a_training_that_goes_on_has_a_page_too(tmp_path: Path, last: int) -> None:
    rows = rows_of(last) if last else [row for row in rows_of() if row["stage"] == "backbone"]
    html = page_of(tmp_path, rows=rows, events=[], samples=[], verdict=None)
    assert "The adversarial stage made" not in html and "What happened" not in html
    if last:
        assert f"step {last} of 600, about 6 minutes left in it." in html
        assert "<small>0.760 →</small>" in html
        assert "Each from the first measurement to the latest." in html
    else:
        assert "Last reported: backbone stage, step 1,000." in html
        assert "<dl" not in html and len(diagrams(html)) == 1


def test_nothing_at_all_is_a_page(tmp_path: Path) -> None:
    page = Page(page_of(
        tmp_path, rows=[], events=[], products=[], samples=[], configuration={}, verdict=None
    ))  # fmt: skip
    assert "No step has been reported yet." in page.texts
    assert not {"img", "table", "h2", "details"} & set(page.tags)
    nothing: dict[str, Any] = {"before": {}, "after": {}}
    assert "The adversarial stage" not in page_of(tmp_path, rows=[], events=[], verdict=nothing)


def test_what_is_no_number_is_not_shown_as_one(tmp_path: Path) -> None:
    rows = rows_of()
    for row in rows[::3]:
        row |= {k: float("nan") for k in ("kl", "auc", "reward", "loss") if k in row}
    rows.append({"stage": "adversarial", "step": 610, "d_real": float("inf"), "r2": None})
    after = {"auc": {"mean": float("nan"), "low": float("nan"), "high": 1.0}, "kl": None}
    html = page_of(tmp_path, rows=rows, verdict={"before": {"auc": 0.7}, "after": after})
    text = re.sub(r"base64,[^\"]*", "", html)
    shown = [text, *diagrams(html)]
    assert not [found for part in shown for found in re.findall(r"(?i)\b(?:nan|inf)\b", part)]
    assert "The adversarial stage made" not in html
    plot_curves(rows, tmp_path / "curves.png", EVENTS)


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        (0.76, 0.70, "harder"),
        (0.70, 0.76, "easier"),
        (0.70, 0.702, "no harder"),
        # the difference may be chance
        ({"mean": 0.76, "low": 0.72, "high": 0.8}, {"mean": 0.7, "low": 0.66, "high": 0.74},
         "no harder"),
    ],
)  # fmt: skip
def test_the_verdict_claims_no_more_than_was_measured(
    tmp_path: Path, before: Any, after: Any, effect: str
) -> None:
    verdict = {"before": {"auc/dry": before}, "after": {"auc/dry": after}}
    html = page_of(tmp_path, verdict=verdict, rows=[], products=[])
    assert f"The adversarial stage made dry captions {effect} to tell" in html
    assert "got worse" not in html and "It cost" not in html  # nothing of that was measured


def test_captions_are_shown_where_they_changed(tmp_path: Path) -> None:
    said = [
        (0, "So red!"), (100, "So red!"), (200, "Red, red."), (300, "Red!"), (400, "Red!"),
        (500, "Red!"), (600, "Red red red."),
    ]  # fmt: skip
    samples: Rows = [{"step": step, "captions": [caption]} for step, caption in said]

    def shown(**changes: Any) -> list[str]:
        page = Page(page_of(tmp_path, samples=samples, rows=[], **changes))
        texts = [text for text in page.texts if text]
        return texts[texts.index("Red rectangle") + 1 : texts.index("Configuration")]

    # the snapshot of step 500 is delivered, what came after it is not
    beginning = ["likelihood model", "So red!", "step 200", "Red, red."]
    assert shown() == [*beginning, "delivered, since step 300", "Red!"]
    # while it trains, the last is the newest
    going = shown(events=EVENTS[:3], verdict=None)
    assert going == [*beginning, "step 300", "Red!", "step 600", "Red red red."]
    none_better = [{"stage": "adversarial", "step": 0, "kind": "snapshot", "why": "the first"}]
    assert shown(events=none_better) == ["likelihood model, delivered", "So red!"]


def test_rollbacks_are_lines_with_names(html: str) -> None:
    marked = ["rollback 1" in words(svg) for svg in diagrams(html)]
    stages = [panel.stage for panels in PANELS.values() for panel in panels]
    assert 8 < sum(marked) < stages.count("adversarial") + 1
    assert not all(marked)  # those before the adversarial stage have none
