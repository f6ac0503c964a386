"""Racing: candidates that can no longer win are dropped after a part of the samples.

All candidates are scored on the same few samples first; those that will not beat the leader, at the confidence the
user states, are dropped, and the others continue with more samples (Maron and Moore, Hoeffding races, NIPS 1993; here
with Student's t on paired differences). The rest are scored in full and selected as without racing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from olmfast.config.searches import Racing
from olmfast.evaluation.scores import Scores
from olmfast.search.ranking import Comparison, Rules, choose
from olmfast.weights.draws import normal

Samples = Mapping[str, list[int]]


def heats(
    score: Callable[[list[int], Samples], Scores],
    n_candidates: int,
    questions: Samples,
    racing: Racing,
    rules: Rules,
    seed: int,
    guarded: Collection[str] = (),
    current_leads: bool = True,
) -> tuple[Scores | None, dict[int, str]]:
    """Score candidates 0..n-1 on growing parts of the questions (indices per dataset); `score(rows, samples)` evaluates
    some of them.

    Returns what was scored, a row for each candidate (None: nothing), and the reason for each that was dropped.
    Candidate 0, the incumbent, is never dropped. No candidate is dropped because of one that the guard would refuse,
    being worse than candidate 0 on a dataset in `guarded`; nor, without `current_leads`, because of candidate 0.
    """
    sizes = {name: len(own) for name, own in questions.items()}
    drawn = {name: normal(n, seed, "racing", name).argsort().tolist() for name, n in sizes.items()}
    order = {name: [questions[name][place] for place in places] for name, places in drawn.items()}
    rows = list(range(n_candidates))
    dropped: dict[int, str] = {}
    found: Scores | None = None
    done = 0
    for rung in racing.rungs:
        if rung >= max(sizes.values()) or len(rows) < 3:
            break
        new = score(rows, {name: sorted(indices[done:rung]) for name, indices in order.items()})
        new = new.spread(rows, n_candidates)
        found = new if found is None else found.filled_by(new)
        done = rung
        seen = found.at({name: sorted(indices[:rung]) for name, indices in order.items()})
        finite = [row for row in rows if all(bool(seen.mean(name)[row].isfinite()) for name in sizes)]
        if 0 not in finite:
            break  # the incumbent cannot be scored: the full evaluation says so
        comparison = Comparison(seen, rules)
        leaders = [row for row in finite if row and not any(comparison.is_worse(name, row, 0) for name in guarded)]
        if current_leads:
            leaders.insert(0, 0)
        if not leaders:
            continue
        leader = choose(seen, leaders, rules)
        for row in finite:
            if row not in (0, leader) and comparison.chance_to_beat(row, leader, sizes) < 1 - racing.confidence:
                counts = " and ".join(f"{min(rung, n)} of {n}" for n in dict.fromkeys(sizes.values()))
                dropped[row] = f"behind after {counts} samples"
        rows = [row for row in rows if row not in dropped]
    return found, dropped


def left_to_score(found: Scores, rows: list[int], wanted: Samples) -> dict[str, list[int]]:
    """Those of the wanted samples on which these candidates, all scored on the same, have not been scored yet."""
    done = {name: found.evaluated[name][rows].any(dim=0) for name in wanted}
    return {name: [index for index in own if not done[name][index]] for name, own in wanted.items()}
