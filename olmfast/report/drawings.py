"""The pictures of a report, as SVG that stands in the page: by matplotlib, whose colours become the page's own.

Equal data give equal bytes: identifiers come from fixed salts, no date is written, and no setting of the user's counts.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

WIDTH = 5.6  # inches, of 72 pixels: text of 10 points is readable where the page is as narrow as that
INK, FAINT, ACCENT = "#010203", "#010204", "#010205"  # stand for the page's colours until the text is made
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", ACCENT: "var(--accent)"}
MOST_POINTS = 2000  # of a line or a cloud; the rest would lie on each other


@dataclass(frozen=True)
class Series:
    """A cloud or a line: where each point is, in evaluations and in what is told upwards."""

    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Interval:
    """A value with half of its 95 % interval, 0 where that is not known."""

    value: float
    half: float


def progress(tried: Series, kept: Series, upwards: str) -> str:
    """What was tried (dots) and what was kept (the line) against evaluations; `upwards` says what is told upwards."""
    with _figure(2.8, "progress", left=0.62, bottom=0.5, top=0.35) as (axes, text):
        cloud, line = _thinned(tried), _thinned(kept)
        if cloud.x:
            axes.plot(cloud.x, cloud.y, ".", color=FAINT, markersize=4.5)
        axes.plot(line.x, line.y, drawstyle="steps-post", color=ACCENT, linewidth=1.8)
        axes.plot(line.x, line.y, "o", color=ACCENT, markersize=3.5)
        axes.set_ylim(*_framed(kept.y, tried.y))
        axes.set_xlabel("evaluations")
        axes.set_title(upwards, loc="left", fontsize=10.5)
    return text()


def skills(rows: Mapping[str, Mapping[str, Interval]], result: str, shown: Mapping[str, str]) -> str:
    """Skill retained by dataset (rows: dataset -> model -> value), with intervals; `shown` shortens names.

    The models have the markers of `markers`, the result's is filled.
    """
    of = markers([model for by in rows.values() for model in by], result)
    step = 0.72 / max(len(of), 1)
    height = 0.55 + len(rows) * max(0.5, 0.13 * len(of) + 0.2)
    with _figure(height, "skills", left=0.12, bottom=0.5, top=0.05) as (axes, text):
        for place, (model, marker) in enumerate(of.items()):
            points = [(row - 0.22 + (place + 0.5) * step, by[model]) for row, by in enumerate(rows.values())]
            known = [(y, one) for y, one in points if math.isfinite(one.value)]
            ours = model == result
            axes.errorbar(
                [one.value for _, one in known],
                [y for y, _ in known],
                xerr=[one.half if math.isfinite(one.half) else 0.0 for _, one in known],
                fmt=marker,
                color=ACCENT if ours else INK,
                markerfacecolor=ACCENT if ours else "none",
                markersize=5.5 if ours else 4,
                linewidth=1.4 if ours else 0.8,
            )
        for edge in (0, 1):
            axes.axvline(edge, color=FAINT, linewidth=0.8)
        for row, name in enumerate(rows):
            bold = {"transform": axes.get_yaxis_transform(), "va": "center", "weight": "bold"}
            axes.text(0.0, row - 0.36, _short(shown.get(name, name), 48), **bold)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.45, -0.5)
        axes.set_xlabel("skill retained: 0 the worst donor, 1 the best")
    return text()


def markers(models: Iterable[str], result: str) -> dict[str, str]:
    """Model -> how it is drawn, the result last."""
    shapes = "s^Dvx+<>pd"
    others = [model for model in dict.fromkeys(models) if model != result]
    return {model: shapes[place % len(shapes)] for place, model in enumerate(others)} | {result: "o"}


@contextmanager
def _figure(
    height: float, salt: str, left: float, bottom: float, top: float
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes in a figure of a height, with margins, in inches, and what gives its SVG once it is drawn."""
    matplotlib, FigureCanvasSVG, Figure = _library()
    own = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10.5,
        "text.parse_math": False,
        "axes.unicode_minus": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    default = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**default, **own}):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        sides = left / WIDTH, bottom / height, 1 - (left + 0.12) / WIDTH, 1 - (bottom + top) / height
        found: list[str] = []
        yield figure.add_axes(sides), lambda: found[0]
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        found.append(_inline(out.getvalue(), salt))


@cache
def _library() -> tuple[Any, Any, Any]:
    """matplotlib, imported when something is drawn; what it says of fonts and caches nobody can act on here."""
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    finally:
        log.setLevel(before)
    return matplotlib, FigureCanvasSVG, Figure


def _inline(svg: str, salt: str) -> str:
    """The picture as a part of a page: without its head, in the page's colours and font, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    # Each picture numbers its parts anew, and a page holds several: a reference must not lead into another.
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{salt}-", svg)
    svg = re.sub(r'font-family: [^;"]*', "font-family: inherit", svg)
    svg = re.sub(r'font: ((?:bold )?)([0-9.]+)px [^;"]*', r"font: \1\2px inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" class="picture" data-picture="{salt}"', 1).strip()


def _thinned(series: Series) -> Series:
    """At most `MOST_POINTS` of the points whose values are numbers, evenly chosen, the last one among them."""
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    stride = -(-len(points) // MOST_POINTS) or 1
    chosen = points[::-1][::stride][::-1]
    return Series([x for x, _ in chosen], [y for _, y in chosen])


def _framed(kept: Sequence[float], tried: Sequence[float]) -> tuple[float, float]:
    """The values that are shown: all that was kept, and of what was tried what is not far below it."""
    known = [y for y in kept if math.isfinite(y)] or [0.0]
    low, high = min(known), max(known)
    room = max(high - low, 0.1)
    near = [y for y in tried if math.isfinite(y) and low - 1.5 * room <= y <= high + 1.5 * room]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1)


def _short(name: str, most: int) -> str:
    """A name by its end, which tells paths apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
