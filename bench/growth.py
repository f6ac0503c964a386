"""How the time of a decision grows with blocks, donors and questions: a table, and docs/growth.svg.

    OMP_NUM_THREADS=1 python bench/growth.py

Each point is the CPU time of swapping the middle block of the pool of `search_case.py`: every other donor's block
scored, activations up to it included. One size changes at a time, the others stay at 12 blocks, 4 donors and 8 + 8
questions. The plot needs matplotlib (`pip install 'olmfast[bench]'`); without it the table is all there is.
"""

import sys
import tempfile
import time
from pathlib import Path

from search_case import make_case, session

from olmfast.search.candidates import swap_candidates

AXES = {"blocks": (6, 12, 24), "donors": (2, 4, 8), "questions": (4, 8, 16, 32)}
USUAL = {"blocks": 12, "donors": 4, "questions": 8}
PLOT = Path(__file__).parents[1] / "docs" / "growth.svg"


def decision_seconds(blocks: int, donors: int, questions: int) -> float:
    """CPU seconds of one layer swap in the middle of the depth."""
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder), blocks, donors, questions)
        with session(case.config(questions)) as engine:
            search = engine.search
            unit = search.architecture.window_unit(search.tensors, [blocks // 2])
            now, *others = swap_candidates(search, unit)
            search.scorer.score(unit, [now])  # its scores are known in a search
            search.scorer.decided(now.label)
            search.scorer.forget()  # but no activations are
            began = time.process_time()
            search.scorer.score(unit, others)
            return time.process_time() - began


def main() -> None:
    found: dict[tuple[int, int, int], float] = {}
    lines: dict[str, list[tuple[int, float]]] = {}
    for axis, sizes in AXES.items():
        for size in sizes:
            point = {**USUAL, axis: size}
            key = tuple(point.values())
            if key not in found:
                found[key] = decision_seconds(**point)
            lines.setdefault(axis, []).append((size, found[key]))
            print(f"{axis} {size}: {found[key]:.2f} CPU s", flush=True)
    plot(lines)


def plot(lines: dict[str, list[tuple[int, float]]]) -> None:
    """One panel for each size, both axes from 0: a straight line through the origin is growth in proportion."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "olmfast", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(lines), figsize=(8, 2.6), sharey=True)
    for panel, (axis, points) in zip(panels, lines.items(), strict=True):
        panel.plot(*zip(*points, strict=True), marker="o", color="#2266aa", linewidth=1.5)
        panel.set(xlabel=axis, xlim=(0, None), ylim=(0, None), xticks=[size for size, _ in points])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("CPU seconds of a layer swap")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
