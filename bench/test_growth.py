"""How the time of a decision grows with blocks, donors and questions: figures, and docs/growth.svg.

    OMP_NUM_THREADS=1 OLMFAST_BENCH_ALL=1 pytest bench/test_growth.py --benchmark-only

Each point is the CPU time of swapping the middle block of the pool of `search_case.py`: every other donor's block
scored, activations up to it included. One size changes at a time, the others stay as they are. The plot, of the large
cases alone, is drawn then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from figures import ALL, Figures, room, sized
from peak import cpu
from search_case import make_case, session

from olmfast.search.candidates import swap_candidates

pytestmark = pytest.mark.timeout(0)
AXES: Mapping[str, Sequence[int]] = sized(
    {"blocks": (1, 2), "donors": (2,), "questions": (2,)},
    {"blocks": (3, 6), "donors": (2, 4), "questions": (2, 4)},
    {"blocks": (6, 12, 24), "donors": (2, 4, 8), "questions": (4, 8, 16, 32)},
)
BLOCKS, DONORS, QUESTIONS = sized((2, 2, 2), (6, 4, 4), (12, 4, 8))  # as long as they stay as they are
PLOT = Path(__file__).parents[1] / "docs" / "growth.svg"
Lines = Mapping[str, list[tuple[int, float]]]


def test_growth(
    benchmark: Any, report: Callable[..., None], figures: Figures, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found: dict[tuple[int, int, int], float] = {}
    lines: dict[str, list[tuple[int, float]]] = {axis: [] for axis in AXES}

    def measure() -> None:
        for axis, sizes in AXES.items():
            for size in sizes:
                point = {"blocks": BLOCKS, "donors": DONORS, "questions": QUESTIONS, axis: size}
                key = (point["blocks"], point["donors"], point["questions"])
                if key not in found:
                    with room(tmp_path_factory, "growth", 3e9) as folder:
                        found[key] = decision_seconds(folder, *key)
                    figures.say(f"  {', '.join(f'{n} {name}' for name, n in point.items())}: {found[key]:.2f} CPU s")
                lines[axis].append((size, found[key]))

    benchmark.pedantic(measure, rounds=1)
    for axis, points in lines.items():
        (few, less), (many, more) = points[0], points[-1]
        # Candidates are one fewer than donors.
        growth = (many - 1) / (few - 1) if axis == "donors" else many / few
        report(
            f"a layer swap, {axis} {few} to {many}", f"{less:.2f} to {more:.2f} CPU s",
            limit=f"{growth * less / more:.0%} of proportion",
        )  # fmt: skip
    if ALL:
        plot(lines)


def decision_seconds(folder: Path, blocks: int, donors: int, questions: int) -> float:
    """CPU seconds of one layer swap in the middle of the depth."""
    case = make_case(folder, questions, blocks, donors)
    with session(case.config(questions)) as engine:
        search = engine.search
        unit = search.architecture.window_unit(search.tensors, [blocks // 2])
        now, *others = swap_candidates(search, unit)
        search.scorer.score(unit, [now])  # its scores are known in a search
        search.scorer.commit(search.recipe, now.label)
        scorer = engine.evaluation.scorer(engine.inputs.selection)  # but no activations are
        scorer.state = search.scorer.state
        return cpu(lambda: scorer.score(unit, others))


def plot(lines: Lines) -> None:
    """One panel for each size, both axes from 0: a straight line through the origin is growth in proportion."""
    import matplotlib

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
