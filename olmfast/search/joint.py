"""The joint search: the coefficients of all donors at once, from a strong start, coarse to fine, until nothing helps.

Everything that is tried is a merge in task vectors (`weights/coefficients.py`), or what the stages of `candidates` try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count

from olmfast.evaluation.scorer import Candidate
from olmfast.search.acceptance import Scale
from olmfast.search.coefficients import GRAINS, Coefficients
from olmfast.search.log import Outcome
from olmfast.search.loop import Search, Step
from olmfast.weights.chunks import Setting
from olmfast.weights.coefficients import TaskVectors
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression

SCALES_OF_SUM = (0.3, 0.5, 0.7, 1.0)
# kappa of the restored mean W0 + kappa sqrt(N) (mean - W0), where donors' distances are alike and where they are not,
# and from which ratio on they are not (arXiv 2608.17366).
RESTORED, RESTORED_UNEVEN, UNEVEN = 1.15, 0.5, 3.0
DENSITY = 0.5  # of TIES and DARE
N_STARTS = len(SCALES_OF_SUM) + 4  # average, restored mean, TIES, DARE-TIES


@dataclass
class Joint:
    """One joint search. `stages` walks the units of the stages that the config also has, and says whether they changed
    anything; `given` are the values of the start that the config names."""

    search: Search
    vectors: TaskVectors
    stages: Callable[[int], bool]
    given: Mapping[str, Expression] | None = None

    def run(self) -> None:
        """Search until nothing passes, or the budget is spent. What each part led to is kept in the record."""
        for name, changed in self._parts():
            if changed:
                self.search.record.keep_snapshot(name)

    def _parts(self) -> Iterator[tuple[str, bool]]:
        self.choose_start()
        yield "start", True
        coefficients = Coefficients(self.search, self.vectors)
        if not self.vectors.tensors or not self._scale.spans:
            return
        for number in count(1):
            found = False
            for name, part in self._round(coefficients, number):
                changed = part()
                found |= changed
                yield f"{name} {number}", changed
            if not found:
                return

    def _round(self, coefficients: Coefficients, number: int) -> Iterator[tuple[str, Callable[[], bool]]]:
        for grain in GRAINS:
            yield f"gradient/{grain}", partial(coefficients.descend, grain, number)
        yield "evolution/model", partial(coefficients.evolve, "model", number)
        yield "moves", partial(coefficients.move_blocks, number)
        yield "stages", partial(self.stages, number)

    @property
    def _scale(self) -> Scale:
        assert self.search.crossfit is not None
        return self.search.crossfit.scale

    def choose_start(self) -> Outcome:
        """Whole models that need no search, each scored once: the best donor, and the usual merges of all."""
        unit = self.search.architecture.model_unit(self.search.tensors)

        def propose() -> list[Candidate]:
            usual = starts(self.search, self.vectors, self.given)
            return [Candidate("best donor"), *(Candidate(label, recipe=recipe) for label, recipe in usual.items())]

        return self.search.take(Step("start", "start", unit, propose, begins=True))


def starts(search: Search, vectors: TaskVectors, given: Mapping[str, Expression] | None = None) -> dict[str, Recipe]:
    """Label -> a merge that needs no search: of all donors, but for the `given` one."""
    base = whole(search.config.base_name, search.sources.pool.tensors)
    n, found = len(vectors.donors), dict[str, Recipe]()
    if given is not None:
        found["given start"] = base.with_values(given)
    if not n:
        return found
    found["average"] = vectors.uniform(base, 1 / n)
    found |= {f"sum x {scale:g}": vectors.uniform(base, scale) for scale in SCALES_OF_SUM}
    kappa = RESTORED if vectors.unevenness <= UNEVEN else RESTORED_UNEVEN
    found[f"restored mean {kappa:g}"] = vectors.uniform(base, kappa / n**0.5)
    found["ties"] = _trimmed(search, base, vectors, "ties")
    found["dare_ties"] = _trimmed(search, base, vectors, "dare_ties")
    return found


def _trimmed(search: Search, base: Recipe, vectors: TaskVectors, method: str) -> Recipe:
    """TIES or DARE-TIES of all task vectors (arXiv 2306.01708, 2311.03099)."""

    def value(name: str) -> Expression:
        drawn: dict[str, Setting] = {"seed": search.config.seed, "stream": name} if method == "dare_ties" else {}
        terms = [Copy(donor, name) for donor in vectors.donors]
        return merge(method, terms, vectors.anchor_of(name), weight=1.0, density=DENSITY, **drawn)

    return base.with_values({name: value(name) for name in vectors.tensors})
