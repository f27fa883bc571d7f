"""Charts of error over true bits: one panel for each setting, every method labelled where it stands."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

OURS, PUBLISHED, OTHERS, TEXT, PALE, GRID = "#0b57d0", "#b3261e", "#5f6368", "#202124", "#c4c7c5", "#eceff1"
KINDS = (  # of methods: marker, colour, what the legend says
    ("o", OURS, "lrqdit"),
    ("D", PUBLISHED, "LRQ-DiT as published"),
    ("o", OTHERS, "another method as a recipe of common parts"),
    ("s", OTHERS, "another package itself (*)"),
)
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "svg.hashsalt": "lrqdit",  # the same bytes for the same data
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": OTHERS,
    "xtick.color": OTHERS,
    "ytick.color": OTHERS,
}
LINE = 10  # points from label to label
PLACES = (  # of a label beside its point and its interval: alignment; the first free one is taken
    ("left", "center"),
    ("center", "top"),
    ("center", "bottom"),
    ("right", "center"),
)
GAP = {"left": 7, "right": -7, "top": -6, "bottom": 6, "center": 0}  # points


def fingerprint(rows: list[dict[str, Any]]) -> str:
    """What a chart was drawn from; it stands in the file, so that a test can tell an old one."""
    shown = [[row[key] for key in ("preset", "bits", "true_bits", "image_mse", "image_mse_interval")] for row in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write an SVG file with one panel for each setting (``bits``) of the rows, in their order."""
    settings = list(dict.fromkeys(row["bits"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.7 * len(settings), 5.1), facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(settings), squeeze=False)[0]
        panels[0].set_ylabel("mean squared error of the pictures x 1000")
        by_panel = [[row for row in rows if row["bits"] == bits] for bits in settings]
        for axes, bits, shown in zip(panels, settings, by_panel, strict=True):
            axes.set_title(bits, loc="left", fontweight="bold", fontsize=11)
            _draw_points(axes, shown)
        handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=5.5) for m, c, _ in KINDS]
        figure.legend(
            handles, [text for *_, text in KINDS], loc="outside lower center", ncols=len(KINDS), frameon=False,
            handletextpad=0.2, columnspacing=1.6,
        )  # fmt: skip
        figure.draw_without_rendering()  # sizes are known from here on
        figure.set_layout_engine("none")
        for axes, shown in zip(panels, by_panel, strict=True):
            _label_points(axes, shown)
        figure.savefig(path, metadata={"Date": None, "Description": fingerprint(rows)})


def _draw_points(axes: Axes, rows: list[dict[str, Any]]) -> None:
    errors, bits = [_error(row) for row in rows], [row["true_bits"] for row in rows]
    axes.set_xlabel("true bits per parameter, everything stored is counted")
    axes.set_yscale("log")
    axes.set_xlim(min(bits) - 1.8, max(bits) + 1.6)
    axes.set_ylim(min(errors) * 0.6, max(errors) * 2.8)
    axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", left=False)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(0.02, 0.03, "\u2199 better", transform=axes.transAxes, color=OTHERS)
    for row in rows:
        marker, colour, _ = _kind(row)
        interval = [1000 * value for value in row["image_mse_interval"]]
        axes.plot([row["true_bits"]] * 2, interval, color=colour, linewidth=1, alpha=0.45, zorder=2)
        axes.plot(
            row["true_bits"], _error(row), marker, color=colour, markersize=8 if colour == OURS else 5,
            markeredgecolor="white", markeredgewidth=0.6, zorder=4 if colour == OURS else 3,
        )  # fmt: skip


def _label_points(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A column of labels where many methods take nearly the same bits, elsewhere each label beside its point."""
    others = [row for row in rows if _kind(row)[1] == OTHERS]
    crowd = [row for row in others if sum(abs(row["true_bits"] - other["true_bits"]) < 0.2 for other in others) > 4]
    left = [row for row in rows if row["true_bits"] < min((row["true_bits"] for row in crowd), default=0)]
    taken = _label_column(axes, sorted(crowd, key=_error), max(map(_error, left), default=0))
    for row in rows:
        half = (4.5 if _kind(row)[1] == OURS else 3) * axes.figure.dpi / 72
        values = [1000 * value for value in row["image_mse_interval"]] + [_error(row)]
        low, high, mean = axes.transData.transform([(row["true_bits"], value) for value in values])
        taken += [Bbox([mean - half, mean + half]), Bbox([low, high])]
    for row in sorted((row for row in rows if row not in crowd), key=lambda row: _kind(row)[1] == OTHERS):
        for place in PLACES:
            label = _annotate(axes, row, *place)
            if not any(label.get_window_extent().overlaps(box) for box in taken):
                break
            label.remove()
        else:  # none is free
            label = _annotate(axes, row, *PLACES[0])
        taken.append(label.get_window_extent())


def _annotate(axes: Axes, row: dict[str, Any], horizontal: str, vertical: str) -> Annotation:
    low, high = (1000 * value for value in row["image_mse_interval"])
    point = row["true_bits"], {"top": low, "bottom": high}.get(vertical, _error(row))
    return axes.annotate(
        _label(row), point, (GAP[horizontal], GAP[vertical]), textcoords="offset points", ha=horizontal, va=vertical,
        **_font(row),
    )  # fmt: skip


def _label_column(axes: Axes, rows: list[dict[str, Any]], floor: float) -> list[Bbox]:
    """Labels left of their points and above ``floor``, moved apart where they would overlap, a line to each point."""
    bottom, top = (math.log(value) for value in axes.get_ylim())
    points = axes.get_window_extent().height * 72 / axes.figure.dpi
    step = LINE / points * (top - bottom)
    lowest = math.log(floor) + 1.2 * step if floor else bottom
    places = _spread([math.log(_error(row)) for row in rows], step, lowest, top - step / 2)
    boxes = []
    for row, place in zip(rows, places, strict=True):
        edge = min(other["true_bits"] for other in rows) - 0.28
        line = [edge + 0.04, edge + 0.14, row["true_bits"]], [math.exp(place), math.exp(place), _error(row)]
        axes.plot(*line, color=PALE, linewidth=0.7, zorder=1)
        text = axes.text(edge, math.exp(place), _label(row), ha="right", va="center", **_font(row))
        boxes.append(text.get_window_extent())
    return boxes


def _spread(values: list[float], step: float, lowest: float, highest: float) -> list[float]:
    """Ascending values, moved until they are ``step`` apart; close ones form a centred run, within the limits."""
    runs: list[list[float]] = []
    for value in values:
        runs.append([value])
        while len(runs) > 1 and _start(runs[-1], step) - _start(runs[-2], step) < len(runs[-2]) * step:
            last = runs.pop()
            runs[-1] += last
    places = [_start(run, step) + i * step for run in runs for i in range(len(run))]
    places = [max(place, lowest + i * step) for i, place in enumerate(places)]
    return [min(place, highest - i * step) for i, place in zip(reversed(range(len(places))), places, strict=True)]


def _start(run: list[float], step: float) -> float:
    return sum(run) / len(run) - step * (len(run) - 1) / 2


def _error(row: dict[str, Any]) -> float:
    return 1000 * row["image_mse"]


def _kind(row: dict[str, Any]) -> tuple[str, str, str]:
    if row["preset"].startswith("package:"):
        return KINDS[3]
    return KINDS[0 if row["preset"].startswith("lrqdit") else 1 if row["preset"] == "lrq-dit-paper" else 2]


def _label(row: dict[str, Any]) -> str:
    name = row["preset"]
    return f"{name.removeprefix('package:')}*" if name.startswith("package:") else name


def _font(row: dict[str, Any]) -> dict[str, Any]:
    colour = _kind(row)[1]
    if colour == OTHERS:
        return {"color": TEXT, "fontsize": 8}
    return {"color": colour, "fontsize": 9, "fontweight": "bold"}
