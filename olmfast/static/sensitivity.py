"""Which layers of two models improve the score on a dataset most when they are merged."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from olmfast.errors import InputError
from olmfast.output.folder import check_space
from olmfast.static.adaptive import LinearMerge, is_selected, ranking_dataset
from olmfast.weights.expressions import Copy, whole
from olmfast.weights.pool import Pool


@dataclass(frozen=True)
class Ranked:
    """A layer and what merging it alone does to the score: negative is better."""

    layer: int
    score: float
    change: float


def rank_layers(wanted: LinearMerge, output: Path, device: str) -> list[Ranked]:
    """Merge each layer alone and score it: the layers (all, or those of `wanted`), the best first.

    Raises InputError if the models cannot be evaluated on `device`, the dataset cannot be read, or the disk of
    `output` has no space for the result.
    """
    from olmfast.evaluation.open import Evaluation, Questions, Settings
    from olmfast.evaluation.scorer import Candidate

    settings = Settings.of(device, "auto", where="--device")
    pool = Pool.open([wanted.model_a, wanted.model_b], Path.cwd(), Path.cwd(), download=False)
    check_space(output, pool[wanted.model_a].n_bytes)
    pool.check_finite()
    entries = ranking_dataset(wanted)
    (name,) = entries
    questions = Questions.load(pool[wanted.model_a], Path.cwd(), entries)
    scorer = Evaluation(whole(wanted.model_a, pool.tensors), pool, settings).scorer(questions)
    architecture = pool.architecture
    donor = pool[wanted.model_a]
    now = float(scorer.score(architecture.model_unit(pool.tensors), [Candidate("A")]).mean(name)[0])
    ranked = []
    for layer in wanted.ranked_layers(architecture.n_blocks):
        alone = replace(wanted, layers=(layer,))
        unit = architecture.window_unit(pool.tensors, [layer])
        values = {
            tensor: alone.blend(tensor, layer, Copy(wanted.model_b, tensor), len(donor.tensors[tensor].shape))
            for tensor in unit.tensors
            if is_selected(alone, tensor, layer)
        }
        score = float(scorer.score(unit, [Candidate(str(layer), values)]).mean(name)[0])
        if math.isnan(score - now):
            raise InputError(
                f"--sensitivity: the score of layer {layer} is no number: it overflows in {settings.dtype}"
            )
        ranked.append(Ranked(layer, score, score - now))
    return sorted(ranked, key=lambda one: (one.score, one.layer))
