"""The tables of searches for paths, and a sweep's heat map as an SVG file: plain text, made without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

PICTURE = "repeats.svg"  # in a run's folder
CELL, LEFT, TOP = 22, 60, 64  # pixels
WORSE, NONE, BETTER = (178, 24, 43), (247, 247, 247), (33, 102, 172)  # colours that the colour-blind tell apart


def heat_map(report: Mapping[str, Any]) -> str:
    """The gains of all ranges tried, the block that a range begins with downwards, the one it ends with to the right.

    A ring marks the best, a dot a range that was dropped on a part of the questions; blank ones were not tried.
    """
    n, cells = report["blocks"], report["ranges"]
    known = [one["gain"] for one in cells if one["gain"] is not None and math.isfinite(one["gain"])]
    top = max([abs(gain) for gain in known if gain > 0] or [0.01])
    width, height = LEFT + n * CELL + 120, TOP + n * CELL + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 460)}" height="{height}" '
        f'viewBox="0 0 {max(width, 460)} {height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="18" font-size="13">Blocks of {escape(str(report["model"]))} run twice: share of its error '
        "that is gone</text>",
        f'<text x="{LEFT}" y="38">last block of the range</text>',
        f'<text x="8" y="{TOP - 6}">first</text>',
    ]
    for block in range(n):
        if block % (-(-n // 32)) == 0:
            lines.append(_text(LEFT + (block + 0.5) * CELL, TOP - 6, str(block)))
            lines.append(_text(LEFT - 14, TOP + (block + 0.7) * CELL, str(block)))
    best = report["best"][0]["range"] if report["best"] else None
    for one in cells:
        (first, end), gain = one["range"], one["gain"]
        x, y = LEFT + (end - 1) * CELL, TOP + first * CELL
        if gain is None or not math.isfinite(gain):
            continue
        lines.append(
            f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{_colour(gain / top)}">'
            f"<title>{first}-{end - 1}: {gain:+.3f} on {one['questions']} questions</title></rect>"
        )
        middle = x + (CELL - 1) / 2, y + (CELL - 1) / 2
        if not one["whole"]:
            lines.append(f'<circle cx="{middle[0]}" cy="{middle[1]}" r="1.5" fill="#555"/>')
        if one["range"] == best:
            lines.append(
                f'<circle cx="{middle[0]}" cy="{middle[1]}" r="{CELL * 0.4:.1f}" fill="none" stroke="black" '
                'stroke-width="2"/>'
            )
    lines += _scale(LEFT + n * CELL + 24, top)
    return "\n".join([*lines, "</svg>", ""])


def _scale(x: float, top: float) -> list[str]:
    """What the colours mean."""
    shown = ((1.0, f"+{top:.3f}"), (0.5, ""), (0.0, "0"), (-0.5, ""), (-1.0, f"-{top:.3f} or less"))
    lines = []
    for row, (share, label) in enumerate(shown):
        y = TOP + row * 16
        lines.append(f'<rect x="{x}" y="{y}" width="14" height="15" fill="{_colour(share)}"/>')
        lines.append(f'<text x="{x + 20}" y="{y + 12}">{label}</text>')
    return lines


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'


def _colour(share: float) -> str:
    """From -1, worse, by 0 to 1, the best gain."""
    end, part = (BETTER, min(1.0, share)) if share > 0 else (WORSE, min(1.0, -share))
    mixed = [round(none + part * (other - none)) for none, other in zip(NONE, end, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """The best ranges, a row each under a row of headings."""
    names = list(report["scores of the model"])
    rows = [["blocks run twice", "hops", "gain", "95 % interval", "all intervals together", *names]]
    for one in report["best"]:
        first, end = one["range"]
        label = f"{first}-{end - 1}" if end - first > 1 else str(first)
        intervals = [_interval(one.get(key)) for key in ("interval", "interval of all")]
        gain = one.get("gain")
        scores = [f"{one['scores'][name]:.4f}" for name in names]
        rows.append([label, str(one["hops"]), "" if gain is None else f"{gain:+.3f}", *intervals, *scores])
    own = [f"{score:.4f}" for score in report["scores of the model"].values()]
    return [*rows, ["none", str(report["blocks"]), "", "", "", *own]]


def summary(report: Mapping[str, Any]) -> str:
    """What the sweep came to, in a sentence or two."""
    n, best = report["comparisons"], report["best"]
    if not best:
        return f"{n} ranges tried, none of which has a score"
    one = best[0]
    first, end = one["range"]
    what = f"block {first}" if end - first == 1 else f"blocks {first} to {end - 1}"
    if report["chosen"]:
        verdict = f"running {what} twice is better on questions that did not pick it, and is the result"
    elif report["tested"]:
        verdict = f"the best, running {what} twice, is not better on questions that did not pick it: nothing is changed"
    else:
        verdict = f"none is better than the model, not even the best, running {what} twice: nothing is changed"
    return f"{n} ranges compared with the model: {verdict}{_seen(one, report['questions'])}"


def _seen(one: Mapping[str, Any], questions: str) -> str:
    """How much smaller or larger the best range makes the error, on questions that chose nothing."""
    gain, pair = one.get("gain"), one.get("interval")
    if gain is None or not math.isfinite(gain):
        return ""
    low, high = sorted(abs(x) for x in pair) if pair and None not in pair else (math.nan, math.nan)
    way = "smaller" if gain >= 0 else "larger"
    if pair and None not in pair and pair[0] <= 0 <= pair[1]:
        return f"; on {questions} questions its error is no different ({pair[0]:+.1%} to {pair[1]:+.1%})"
    return f"; on {questions} questions its error is {abs(gain):.1%} {way} ({low:.1%} to {high:.1%})"


def markdown(report: Mapping[str, Any]) -> str:
    """The section of a model card."""
    listed = _lines(table(report))
    text = summary(report)
    return (
        f"## Blocks run twice\n\n{text[0].upper()}{text[1:]}.\n\n{listed}\n\nGains are shares of the model's own error "
        f"that are gone, on {report['questions']} questions, with paired intervals over them; the last intervals hold "
        f"for all rows together. {report['comparisons']} ranges were compared on other questions to find these.\n\n"
        f"![gains of all ranges]({PICTURE})\n"
    )


def front_table(report: Mapping[str, Any]) -> list[list[str]]:
    """The best path of each depth that is better than all shorter ones, under a row of headings."""
    names = list(report["scores of the first model"])
    rows = [["hops", "path", "gain", "95 % interval", "all intervals together", *names]]
    for one in report["front"]:
        gain, scores = one.get("gain"), [f"{one['scores'][name]:.4f}" for name in names]
        intervals = [_interval(one.get(key)) for key in ("interval", "interval of all")]
        rows.append([str(one["hops"]), one["path"], "" if gain is None else f"{gain:+.3f}", *intervals, *scores])
    own = [f"{score:.4f}" for score in report["scores of the first model"].values()]
    return [*rows, ["", f"{report['first model']} as it is", "", "", "", *own]]


def front_markdown(report: Mapping[str, Any]) -> str:
    """The section of a model card."""
    return (
        f"## Score against depth\n\n{_lines(front_table(report))}\n\nGains are shares of the first model's own error "
        f"that are gone, on {report['questions']} questions, with paired intervals over them; the last intervals hold "
        f"for all rows together. {report['comparisons']} paths were compared on other questions to find these.\n"
    )


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *others = rows
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in others)]
    return "\n".join(lines)


def _interval(pair: Sequence[float | None] | None) -> str:
    if pair is None or any(x is None or not math.isfinite(x) for x in pair):
        return ""
    return f"{pair[0]:+.3f} to {pair[1]:+.3f}"
