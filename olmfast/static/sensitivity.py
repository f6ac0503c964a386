"""Which layers of two models gain most on a dataset when they are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from olmfast.config.run import RunConfig, parse_config
from olmfast.static.adaptive import LinearMerge, is_selected
from olmfast.weights.recipe import Copy

RANKED_ON = 200  # conversations of the dataset that ranks layers, at most


@dataclass(frozen=True)
class Ranked:
    """A layer and what merging it alone does to the score: negative is better."""

    layer: int
    score: float
    change: float


def _ranking_config(wanted: LinearMerge) -> RunConfig:
    """What the run is told whose scorer ranks the layers. Raises InputError for a mode that is none."""
    dataset, mode = wanted.sensitivity or (Path(), "")
    data = {
        "models_dir": ".",
        "output_dir": str(Path("merged_models") / wanted.folder_name),
        "models": list(dict.fromkeys([wanted.model_a, wanted.model_b])),
        "dataset_dir": str(dataset.parent),
        "dataset": {dataset.name: {"mode": mode, "samples": RANKED_ON}},
    }
    return parse_config(data, where="--sensitivity", folder=Path.cwd())


def rank_layers(wanted: LinearMerge) -> list[Ranked]:
    """Merge each layer alone and score it: the layers (all, or those of `wanted`), the best first.

    Raises InputError if the models cannot be evaluated, or the dataset cannot be read.
    """
    from olmfast.evaluation.batched import BatchedScorer
    from olmfast.evaluation.model import WorkingModel
    from olmfast.evaluation.scorer import Candidate
    from olmfast.observer import Observer
    from olmfast.runs.inputs import Inputs
    from olmfast.weights.methods import Sources
    from olmfast.weights.recipe import whole

    config = _ranking_config(wanted)
    (name,) = config.dataset
    inputs = Inputs.open(config, Observer(), download=False)
    architecture, pool = inputs.pool.architecture, inputs.pool
    model = WorkingModel(whole(wanted.model_a, pool.tensors), Sources(pool, Path()), inputs.device, inputs.dtype)
    scorer = BatchedScorer(model, inputs.datasets, inputs.tokenizer, inputs.stop_tokens, config.batch_tokens)
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
        ranked.append(Ranked(layer, score, score - now))
    return sorted(ranked, key=lambda one: (one.score, one.layer))
