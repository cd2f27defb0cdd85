"""The page of a training, `training.html`, written again and again while it goes on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stylegan.cards import number
from stylegan.curves import PANELS, Rows, draw_svg, is_number
from stylegan.images import IsolatedDecoder
from stylegan.pages import THUMBNAIL, render, spread, thumbnail

CAPTIONS_OVER_TIME = 8  # of one product

FIGURES = {
    "auc": "Detector AUC",
    "named": "Product named",
    "contradiction": "Contradicted",
    "invented": "Invented words",
    "unfit": "Found unfit by the proofreader",
    "distinct_2": "Distinct-2 / people's",
    "kl": "KL, nats per token",
}
"""The key figures of a training and their titles."""


def write_training_page(
    path: Path, *, title: str, rows: Rows, events: Rows, products: Rows, samples: Rows,
    configuration: Mapping[str, Any], verdict: Mapping[str, Mapping[str, Any]] | None,
) -> None:  # fmt: skip
    """Writes one page on a training, finished or not, that needs nothing else.

    rows, events: as for plot_curves, events with `why`, a text. products: `description` and
    `image`, the bytes of a picture or None. samples: `step` and `captions` of these products, the
    first by the likelihood model; when the training has finished, those at the last snapshot are
    what is delivered. verdict: `before` and `after`, name → number or interval (`mean`, `low`,
    `high`), of the likelihood model and of what is delivered; without it the page shows the first
    and the last held-out figures.
    """
    game = [event for event in events if event["stage"] == "adversarial"]
    ended = [event for event in game if event["kind"] in ("stop", "done")]
    if verdict is not None or ended:
        # what came after the last snapshot is not delivered
        last = max((e["step"] for e in game if e["kind"] == "snapshot"), default=math.inf)
        samples = [sample for sample in samples if sample["step"] <= last]
    before, after = (verdict or {}).get("before", {}), (verdict or {}).get("after", {})
    if verdict is None:
        before, after = _so_far(rows)
    groups = {
        name: [
            {"title": panel.title, "note": panel.note, "light": drawn[0], "dark": drawn[1]}
            for panel in panels
            if (drawn := draw_svg(panel, rows, events, configuration)) is not None
        ]
        for name, panels in PANELS.items()
    }
    with IsolatedDecoder() as decoder:
        blobs = [product["image"] for product in products]
        pictures = [thumbnail(image) for image in decoder.decode(blobs, THUMBNAIL)]
    page = render(
        "training.html.j2", {},
        title=title,
        sentence=_sentence(before, after) if verdict is not None else "",
        status=_status(rows, ended),
        figures=_key_figures(before, after),
        span="from the likelihood model to what is delivered"
        if verdict is not None
        else "from the first measurement to the latest",
        num_rollbacks=sum(event["kind"] == "rollback" for event in events),
        story=_story(events),
        groups={name: panels for name, panels in groups.items() if panels},
        histories=[
            {"description": product["description"], "picture": picture, "captions": captions}
            for number, (product, picture) in enumerate(zip(products, pictures, strict=True))
            if (captions := _history(samples, number, verdict is not None or bool(ended)))
        ],
        configuration=configuration,
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def _so_far(rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last held-out figures of an adversarial stage that goes on."""
    measured = [row for row in rows if row["stage"] == "adversarial held-out"]
    trained = [row for row in rows if row["stage"] == "adversarial"]
    figures: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for row, found in zip((measured[0], measured[-1]) if measured else (), figures, strict=False):
        found |= {k: v for k, v in row.items() if k.partition("/")[0] in FIGURES}
    if measured and trained:
        figures[1].update({k: v for k, v in trained[-1].items() if k.partition("/")[0] == "kl"})
    return figures


def _mean(value: Any) -> float | None:
    mean = value["mean"] if isinstance(value, Mapping) else value
    return float(mean) if is_number(mean) else None


def _figure(value: Any) -> str:
    mean = _mean(value)
    return "–" if mean is None else number(mean)


def _key_figures(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures that the page begins with: title, before, after, and the latter's interval."""
    names = [(name, *name.partition("/")[::2]) for name in {**before, **after}]
    return [
        {
            "title": f"{title}{f', {style}' if style else ''}",
            "before": _figure(before[name]) if name in before else "",
            "after": _figure(after.get(name)),
            "interval": f"{_figure(value['low'])} to {_figure(value['high'])}"
            if isinstance(value := after.get(name), Mapping)
            else "",
        }
        for known, title in FIGURES.items()
        for name, quantity, style in names
        if quantity == known
    ]


def _sentence(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What the adversarial stage achieved and what it cost, in a sentence or two."""

    def change(name: str) -> tuple[float, str]:
        """What it went up by, 0 where that may be chance, and both figures."""
        old, new = before.get(name), after.get(name)
        first, last = _mean(old), _mean(new)
        if first is None or last is None:
            return 0.0, ""
        text = f"{_figure(first)} → {_figure(last)}"
        intervals = [value for value in (old, new) if isinstance(value, Mapping)]
        if len(intervals) == 2 and (
            max(i["low"] for i in intervals) <= min(i["high"] for i in intervals)
        ):
            return 0.0, text
        if name.startswith("distinct_2"):  # more diverse than people is no merit
            first, last = min(1.0, first), min(1.0, last)
        return last - first, text

    names = [(name, *name.partition("/")[::2]) for name in after]
    sentences = []
    for name, quantity, style in names:
        rise, figures = change(name)
        if quantity == "auc" and figures:
            effect = "harder" if rise < -0.005 else "easier" if rise > 0.005 else "no harder"
            sentences.append(
                f"The adversarial stage made {f'{style} ' if style else ''}captions {effect} to "
                f"tell from people's sentences: the AUC of the watching detector is {figures} "
                "(0.5: it cannot tell), by which the snapshot was chosen."
            )
    sign = {"named": -1, "contradiction": 1, "invented": 1, "unfit": 1, "distinct_2": -1}
    paid = [
        f"{FIGURES[quantity].lower()} {f'({style}) ' if style else ''}{change(name)[1]}"
        for name, quantity, style in names
        if quantity in sign and change(name)[0] * sign[quantity] > 0.01
    ]
    if paid:
        sentences.append(f"It cost: {', '.join(paid)}.")
    elif sentences and any(quantity in sign and change(name)[1] for name, quantity, _ in names):
        sentences.append("No figure of content or diversity got worse by more than 0.01.")
    return " ".join(sentences)


def _status(rows: Rows, ended: Rows) -> str:
    """How far the training is. ended: events of its end; a stop comes before the end itself."""
    if ended:
        event = ended[0]
        verb = "Stopped" if event["kind"] == "stop" else "Finished"
        return f"{verb} at step {event['step']:,} of the {event['stage']} stage."
    if not rows:
        return "No step has been reported yet."
    row = next((row for row in reversed(rows) if "steps" in row), rows[-1])
    text = f"Last reported: {row['stage']} stage, step {row['step']:,}"
    if is_number(row.get("steps")):
        text += f" of {row['steps']:,}"
    if is_number(row.get("minutes_left")) and row["minutes_left"] >= 1:
        text += f", about {row['minutes_left']:,.0f} minutes left in it"
    return text + "."


def _story(events: Rows) -> list[dict[str, str]]:
    """The events as they came, snapshots without anything between them as one."""
    words = {"snapshot": "snapshot", "rollback": "rollback", "stop": "stop", "done": "finished"}
    story: list[dict[str, str]] = []
    rollbacks: dict[str, int] = defaultdict(int)
    for event in events:
        kind, step = event["kind"], f"{event['step']:,}"
        entry = {
            "kind": kind, "what": words.get(kind, kind), "stage": event["stage"],
            "steps": f"Step {step}", "why": event["why"],
        }  # fmt: skip
        if kind == "rollback":
            rollbacks[event["stage"]] += 1
            entry["what"] += f" {rollbacks[event['stage']]}"
        last = story[-1] if story else {}
        if kind == "snapshot" == last.get("kind") and event["stage"] == last["stage"]:
            entry["steps"] = f"{last['steps'].replace('Step ', 'Steps ')}, {step}"
            story.pop()
        story.append(entry)
    return story


def _history(samples: Rows, product: int, finished: bool) -> list[dict[str, str]]:
    """A product's captions where they changed, the first and the last among them."""
    said = [(s["step"], s["captions"][product]) for s in samples if product < len(s["captions"])]
    last = len(said) - 1
    chosen = [
        index for index in range(len(said)) if not index or said[index][1] != said[index - 1][1]
    ]
    if len(chosen) > CAPTIONS_OVER_TIME:
        chosen = [chosen[i] for i in spread(len(chosen) - 1, CAPTIONS_OVER_TIME - 1)] + chosen[-1:]
    if last > 0 == chosen[-1]:
        chosen.append(last)
    names = {index: f"step {said[index][0]:,}" for index in chosen}
    if finished and chosen:
        since = "" if chosen[-1] == last else f", since step {said[chosen[-1]][0]:,}"
        names[chosen[-1]] = f"delivered{since}"
    names[0] = "likelihood model" if last > 0 or not finished else "likelihood model, delivered"
    return [{"when": names[index], "caption": said[index][1]} for index in chosen]
