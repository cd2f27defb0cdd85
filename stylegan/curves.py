"""The curves of a training: which there are, and how they are drawn."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylegan.pages import BAD, LIGHT, LINE, SOFT, light_and_dark

COLUMNS_OF_PANELS = 3  # of curves.png
WIDTH, HEIGHT = 3.4, 1.9  # inches of a panel on the page


@dataclass(frozen=True, slots=True)
class Panel:
    """A small diagram of one stage.

    quantities: name in the rows → its word in the legend. note: how to read it. guides: where a
    thin line helps the eye, numbers or names of settings. main: drawn in curves.png as well.
    held_out: only what was measured beside the training.
    """

    stage: str
    title: str
    quantities: Mapping[str, str]
    note: str
    guides: tuple[float | str, ...] = ()
    main: bool = False
    held_out: bool = False


PANELS: dict[str, list[Panel]] = {
    "Is it getting better?": [
        Panel(
            "adversarial", "Held-out detector, AUC", {"auc": "AUC"},
            "How well a detector that is not the discriminator tells captions from people's "
            "sentences; 0.5: not at all. Rising together with the reward: the reward is gamed.",
            (0.5,), main=True,
        ),
        Panel(
            "adversarial", "Reward",
            {"reward": "total", "reward_style": "style", "reward_content": "content",
             "reward_form": "form", "matching": "matching"},
            "What the generator is paid. Style: the discriminator's score, which counts by its "
            "differences only. Content and form: what faults cost. Matching: phrases that "
            "captions wear out cost, those that they forget pay.",
            main=True,
        ),
        Panel(
            "adversarial", "Diversity, ratio to people's", {"distinct_2": "distinct-2"},
            "Different pairs of words, relative to as many sentences of people. Far below 1, "
            "captions shrink to a few phrases; above, words are made up.",
            (1.0,), main=True, held_out=True,
        ),
    ],
    "Does it stay true and well formed?": [
        Panel(
            "adversarial", "Product named, share", {"named": "named"},
            "Captions that say the right kind of product.", main=True,
        ),
        Panel(
            "adversarial", "Contradicted or invented, share",
            {"contradiction": "contradicted", "invented": "invented words", "unfit": "unfit"},
            "Captions that say what the product is not; words that nobody uses; captions that the "
            "proofreader finds unfit, where there is one.", main=True,
        ),
        Panel(
            "adversarial", "Form, share", {"unfinished": "unfinished", "repeated": "repeated"},
            "Captions cut off at the longest, or saying three words twice.",
        ),
    ],
    "How far has it moved?": [
        Panel(
            "adversarial", "KL, nats per token", {"kl": "KL"},
            "The distance to the likelihood model, exact. Dotted: what it is steered to.",
            ("kl_target",), main=True,
        ),
        Panel(
            "adversarial", "β, the price of KL", {"beta": "β"},
            "Steered, and doubled by a rollback.",
        ),
        Panel(
            "adversarial", "Length, words", {"words": "captions", "human_words": "people"},
            "A drift away from people's is a cheap way to please a discriminator.",
        ),
    ],
    "Who is ahead?": [
        Panel(
            "adversarial", "Pair accuracy", {"pair_accuracy": "accuracy"},
            "How often the discriminator scores a real sentence above a generated one. At 0.5 it "
            "teaches nothing; near 1 the generator cannot follow.",
            (0.5,), main=True,
        ),
        Panel(
            "adversarial", "Verdicts", {"d_real": "on people's", "d_fake": "on captions"},
            "The discriminator's, 1: a person wrote it. A gap that widens: it runs ahead.",
            main=True,
        ),
        Panel(
            "adversarial", "Discriminator steps so far", {"d_steps": "steps"},
            "Flat where it is ahead and waits, steep where it is behind.",
        ),
        Panel(
            "adversarial", "Discriminator loss", {"loss_discriminator": "loss"},
            "Falling to zero: it has won.",
        ),
        Panel(
            "round", "Rounds: log odds of captions", {"odds_mean": "mean"},
            "Of a discriminator that learned from other captions. At 0 it cannot tell.", (0.0,),
        ),
        Panel(
            "adversarial", "Gradient penalties", {"r1": "R1, real", "r2": "R2, generated"},
            "How steep the discriminator is around sentences of either kind.",
        ),
        Panel(
            "adversarial", "Learning rate", {"rate": "rate"},
            "Of the generator; halved by a rollback.",
        ),
    ],
    "Before it": [
        Panel(
            "backbone", "Vision backbone: loss, nats", {"loss": "loss"},
            "Cross-entropy of the catalogue's attributes.", main=True,
        ),
        Panel(
            "backbone", "Vision backbone: accuracy, share",
            {"type": "type", "colour": "colour", "gender": "gender"},
            "On held-out photographs.", main=True,
        ),
        Panel(
            "likelihood", "Likelihood: nats per token", {"nats_per_token": "cross-entropy"},
            "Cross-entropy of captions; training and held-out text differ in kind.", main=True,
        ),
        Panel(
            "warm-up", "Warm-up: pair accuracy", {"pair_accuracy": "accuracy"},
            "The discriminator learns alone until it can teach.", (0.5,),
        ),
        Panel(
            "warm-up", "Warm-up: discriminator loss", {"loss_discriminator": "loss"},
            "Falls while it learns to tell the two apart.",
        ),
    ],
}  # fmt: skip

Rows = Sequence[Mapping[str, Any]]
_Curve = list[tuple[float, float]]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(panel: Panel, rows: Rows) -> dict[tuple[str, str, bool], _Curve]:
    """(quantity, style, held-out) → points; style "" where the name has none. What is not finite
    is no point."""
    curves: dict[tuple[str, str, bool], _Curve] = {}
    for row in rows:
        stage = row["stage"].removesuffix(" held-out")
        held_out = stage != row["stage"]
        if stage != panel.stage or (panel.held_out and not held_out):
            continue
        for name, value in row.items():
            quantity, _, style = name.partition("/")
            if quantity in panel.quantities and is_number(value):
                curves.setdefault((quantity, style, held_out), []).append((row["step"], value))
    order = list(panel.quantities)
    return dict(sorted(curves.items(), key=lambda item: (order.index(item[0][0]), item[0][2])))


def _last_step(stage: str, rows: Rows) -> float:
    steps = [row["step"] for row in rows if row["stage"].removesuffix(" held-out") == stage]
    return max(steps, default=0)


def _draw(
    axis: Any, panel: Panel, rows: Rows, events: Rows, settings: Mapping[str, Any]
) -> tuple[list[Any], list[str]]:
    """A panel on a matplotlib axis; → handles and words of the legend, none for a single curve."""
    from matplotlib.markers import TICKUP
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    curves = _curves(panel, rows)
    quantities = list(dict.fromkeys(quantity for quantity, _, _ in curves))
    styles = list(dict.fromkeys(style for _, style, _ in curves))
    kinds = {held_out for _, _, held_out in curves}
    handles, words = [], []
    for (quantity, style, held_out), points in curves.items():
        number, other = quantities.index(quantity), styles.index(style)
        if len(styles) > 1:  # colours tell styles apart, dashes quantities
            number, other = other, number
        look = {
            "color": LIGHT[number % 6], "linestyle": ("-", "--", ":", "-.")[other % 4],
            "linewidth": 1.4, "solid_capstyle": "round",
        }  # fmt: skip
        if held_out:
            look |= {"marker": "o", "markersize": 3.2, "linewidth": 1.0}
        elif len(kinds) > 1:
            look |= {"alpha": 0.6}
        elif len(points) == 1:
            look |= {"marker": "o", "markersize": 3.2}
        handles += axis.plot(*zip(*points, strict=True), **look)
        parts = [panel.quantities[quantity]] if len(quantities) > 1 else []
        parts += [style or "all"] if len(styles) > 1 else []
        parts += ["held-out" if held_out else "training"] if len(kinds) > 1 else []
        # mathematics is not meant, and a leading underscore would hide the curve from the legend
        words.append(", ".join(parts).replace("$", r"\$").replace("_", " "))
    for guide in panel.guides:
        level = settings.get(guide) if isinstance(guide, str) else guide
        if is_number(level):
            axis.axhline(level, color=SOFT, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
    _mark(axis, [event for event in events if event["stage"] == panel.stage], TICKUP)
    axis.set_xlim(0, max(1, _last_step(panel.stage, rows)) * 1.02)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.grid(color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(SOFT)
    axis.tick_params(colors=SOFT, length=0)
    return (handles, words) if len(words) > 1 else ([], [])


def _mark(axis: Any, events: Rows, tick: int) -> None:
    """Rollbacks and stops as lines, what they took back as a tint, snapshots as ticks."""
    number, since = 0, 0
    snapshots = []
    for event in events:
        step, kind = event["step"], event["kind"]
        if kind == "snapshot":
            snapshots.append(step)
            since = step
        elif kind in ("rollback", "stop"):
            number += kind == "rollback"
            label = kind if kind == "stop" else "rollback 1" if number == 1 else f"{number}"
            axis.axvspan(since, step, color=BAD, alpha=0.08, linewidth=0)
            since = step
            axis.axvline(step, color=BAD, linewidth=0.8, linestyle=(0, (3, 2)))
            axis.annotate(
                label, (step, 1.02), xycoords=axis.get_xaxis_transform(), ha="center",
                va="bottom", color=BAD, fontsize="small",
            )  # fmt: skip
    if snapshots:  # an empty curve would spread over the whole picture
        axis.plot(
            snapshots, [0] * len(snapshots), linestyle="", marker=tick, markersize=4, color=SOFT,
            transform=axis.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def plot_curves(rows: Rows, path: Path, events: Rows = ()) -> None:
    """Draws training curves as a PNG: a panel for each stage and unit, held-out figures in it.

    rows: `stage` ("backbone", "backbone held-out", …), `step`, and numbers; `name/style` is a
    style's curve of `name`. events: `stage`, `step`, `kind`; rollbacks are drawn as lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # in the order of the training
    panels = [panel for group in PANELS.values() for panel in group if panel.main]
    panels = [panel for panel in panels if _curves(panel, rows)]
    panels.sort(key=lambda panel: panel.stage == "adversarial")
    num_rows = max(1, -(-len(panels) // COLUMNS_OF_PANELS))
    num_columns = min(COLUMNS_OF_PANELS, max(1, len(panels)))
    figure = Figure(figsize=(5.2 * num_columns, 3.8 * num_rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        handles, words = _draw(axis, panel, rows, events, {})
        axis.set_title(panel.title, loc="left", pad=18 if panel.stage == "adversarial" else 8)
        axis.set_xlabel("step", color=SOFT)
        if handles:
            axis.legend(handles, words, frameon=False, fontsize="small")
    for axis in axes[max(1, len(panels)) :]:
        axis.set_visible(False)
    if not panels:
        axes[0].set(xlabel="step", title="no step was reported yet")
    with warnings.catch_warnings():
        # a style's name may be in a script that matplotlib's own typeface does not have
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png")


def draw_svg(
    panel: Panel, rows: Rows, events: Rows, settings: Mapping[str, Any]
) -> tuple[str, str] | None:
    """A panel as two data URIs of SVG, for a light and a dark page; None where it has no curve."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    if not _curves(panel, rows):
        return None
    plain: Any = {
        "svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 8.0,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    }  # fmt: skip
    stream = io.StringIO()
    with matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's may have it
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        handles, words = _draw(figure.subplots(), panel, rows, events, settings)
        if handles:
            columns = min(3, max(1, 56 // (max(map(len, words)) + 6)))  # letters, and the dash
            figure.set_figheight(HEIGHT + 0.17 * -(-len(words) // columns))
            figure.legend(
                handles, words, loc="outside lower left", ncols=columns, frameon=False,
                labelcolor=SOFT, handlelength=1.6, columnspacing=1.4, borderpad=0.2,
            )  # fmt: skip
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    return light_and_dark(stream.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'"))
