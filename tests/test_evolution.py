"""One full generation of each evolution strategy, recomputed from the formulas in float64."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from olmfast import load_config, run
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.kernels import offspring_count, svd_coefficients
from olmfast.search.evolve import _accept_any, consolidated
from olmfast.search.ranking import Rules, choose
from olmfast.testing import sums, tiny_model, tiny_run, tiny_tokenizer
from olmfast.weights.draws import normal
from olmfast.weights.expressions import Copy
from olmfast.weights.offspring import NormOffspring, SvdOffspring
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources, expression_from_json

UNIT = "model.layers.0.self_attn.q_proj"
TENSOR = f"{UNIT}.weight"


def svd_generation(weight: np.ndarray, seed: int, sigma: float) -> list[np.ndarray]:
    """All offspring of generation 0, unrounded: numpy alone, following the published formulas."""
    scaled = weight / np.abs(weight).max()
    u, s, vh = np.linalg.svd(scaled, full_matrices=False)
    keep = s > s.max() * max(weight.shape) * 2.0**-23
    u, s, vh = u[:, keep], s[keep], vh[keep]
    # The sign of a singular pair is free; the engine makes the largest entry of each column of U positive.
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(len(s))])
    u, vh = u * signs, vh * signs[:, None]
    step = sigma * max(s.std(ddof=1), 1e-10)
    damping = np.sqrt(s.max() / (s + 1e-10))
    damping /= damping.mean()
    result = []
    for k in range(max(4, int(4 + 3 * math.log(len(s))))):
        d = normal(len(s), seed, TENSOR, "svd_es", 0, k).numpy() * step
        result.append(weight * np.exp(np.clip((u * (d * damping)) @ vh, -3, 3)))
    return result


def norm_generation(weight: np.ndarray, seed: int, sigma: float) -> list[np.ndarray]:
    norms = np.linalg.norm(weight, axis=1, keepdims=True)
    directions = weight / np.where(norms > 0, norms, 1)
    result = []
    for k in range(max(4, int(4 + 3 * math.log(len(weight))))):
        log_norms = np.log(np.where(norms > 0, norms, 1)) + sigma * normal(
            len(weight), seed, TENSOR, "norm_es", 0, k
        ).numpy().reshape(-1, 1)
        result.append(np.where(norms > 0, directions * np.exp(log_norms), weight))
    return result


@pytest.mark.parametrize(
    ("method", "generation", "keys"),
    [("svd_es", svd_generation, {"es_svd_sigma": 0.2}), ("norm_es", norm_generation, {"es_norm_sigma": 0.2})],
)
def test_the_accepted_offspring_is_the_formulas(method, generation, keys, tmp_path):
    on = {"es_svd": method == "svd_es", "es_norm": method == "norm_es", "es_norm_generations": 1}
    path = tiny_run(tmp_path, n_donors=2, units=[UNIT], seed=7, dtype="float64", **on, **keys)
    result = run(load_config(path))
    (outcome,) = [o for o in result.record.choices() if o.stage == method]
    start = load_file(tmp_path / "models" / "donor0" / "model.safetensors")[TENSOR].double().numpy()
    offspring = generation(start, 7, next(iter(keys.values())))
    assert len(outcome.metrics["sums.json"]) == 1 + len(offspring)
    assert outcome.changed
    chosen = offspring[int(outcome.winner.rsplit("/", 1)[1])]
    written = load_file(result.output_dir / "model.safetensors")[TENSOR].double().numpy()
    np.testing.assert_allclose(written, chosen, rtol=2e-5, atol=1e-9)
    # The winner stands out: no other offspring explains what was written.
    distances = sorted(np.abs(written - other).max() for other in offspring)
    assert distances[1] > 100 * distances[0]


@pytest.mark.parametrize(
    ("method", "generation", "keys"),
    [("svd_es", svd_generation, {"es_svd_sigma": 0.2}), ("norm_es", norm_generation, {"es_norm_sigma": 0.2})],
)
def test_every_offspring_of_a_generation_scores_as_its_formula_says(method, generation, keys, tmp_path):
    """Weights from numpy, scores from Transformers alone, the choice from the scores: no part of the engine."""
    from transformers import AutoModelForCausalLM

    on = {"es_svd": method == "svd_es", "es_norm": method == "norm_es", "es_norm_generations": 1}
    data = {"dataset": {"sums.json": {"mode": "perplexity"}}, "holdout": {}}
    path = tiny_run(tmp_path, n_donors=2, units=[UNIT], seed=7, dtype="float64", **data, **on, **keys)
    result = run(load_config(path))
    (outcome,) = [o for o in result.record.choices() if o.stage == method]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "donor0", dtype=torch.float64)
    weight = model.get_parameter(TENSOR)
    start = weight.detach().numpy().copy()
    expected = {"current": perplexity_of_sums(model)}
    for k, offspring in enumerate(generation(start, 7, next(iter(keys.values())))):
        with torch.no_grad():
            weight.copy_(torch.from_numpy(offspring).float())  # rounded as it would be saved
        expected[f"{method}/0/{k}"] = perplexity_of_sums(model)
    measured = outcome.metrics["sums.json"]
    assert measured == pytest.approx(expected, rel=1e-5)
    assert outcome.winner == min(expected, key=expected.get)
    assert max(expected.values()) > 1.01 * min(expected.values())  # the offspring do differ


def perplexity_of_sums(model) -> float:
    tokenizer, scores = tiny_tokenizer(), []
    for question, answer in sums(6, 1):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
        with torch.no_grad():
            logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
        log_p = logits.log_softmax(-1)[range(len(ids[1])), ids[1]]
        scores.append(math.exp(-float(log_p.mean())))
    return sum(scores) / len(scores)


@pytest.mark.usefixtures("float64_throughout")
def test_scores_of_offspring_are_those_of_the_rounded_weights(tmp_path):
    path = tiny_run(tmp_path, n_donors=2, units=[UNIT], es_svd=True, dtype="float64", model={"dtype": torch.bfloat16})
    result = run(load_config(path))
    assert any(outcome.changed for outcome in result.record.choices())
    scored = result.record.choices()[-1]
    merged = {name: result.selection.rows["merged"][name] for name in result.selection.datasets}
    # Offspring are scored together, the result alone: sums in another order.
    assert merged == pytest.approx({name: by[scored.winner] for name, by in scored.metrics.items()}, rel=1e-9)


def test_draws_are_a_function_of_their_address_alone():
    first = normal(5, 0, TENSOR, "svd_es", 1, 3)
    normal(100, 0, TENSOR, "svd_es", 1, 4)
    assert torch.equal(first, normal(5, 0, TENSOR, "svd_es", 1, 3))
    others = [(1, TENSOR, "svd_es", 1, 3), (0, UNIT, "svd_es", 1, 3), (0, TENSOR, "norm_es", 1, 3)]
    others += [(0, TENSOR, "svd_es", 2, 3), (0, TENSOR, "svd_es", 1, 4)]
    assert all(not torch.equal(first, normal(5, *address)) for address in others)
    many = normal(200_000, 1)
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01


def test_large_singular_values_get_smaller_steps():
    coefficients = svd_coefficients(torch.tensor([4.0, 1.0]), 0.1, torch.ones(2, dtype=torch.float64))
    spread = torch.tensor([4.0, 1.0]).std().item()
    torch.testing.assert_close(
        coefficients, torch.tensor([1.0, 2.0], dtype=torch.float64) / 1.5 * 0.1 * spread, rtol=1e-6, atol=0
    )


def test_population_size_follows_the_dimension():
    assert [offspring_count(n) for n in (1, 2, 32, 4096)] == [4, 6, 14, 28]


def test_the_parent_is_never_changed_and_a_step_of_zero_gives_it_back(tmp_path):
    tiny_model(tmp_path / "one", dtype=torch.bfloat16)
    pool = Pool.open(["one"], tmp_path, tmp_path)
    sources, weight = Sources(pool, tmp_path), pool["one"].read(TENSOR)
    still, moved = (SvdOffspring(Copy("one", TENSOR), "bfloat16", sigma, 0, TENSOR, 0, 0) for sigma in (0.0, 1.0))
    assert torch.equal(sources.value(still), weight)
    assert not torch.equal(sources.value(moved), weight)
    assert torch.equal(sources.parent(Copy("one", TENSOR), torch.bfloat16).weight, weight)


def test_when_nothing_improves_the_tensor_stays_bit_identical(tmp_path):
    path = tiny_run(tmp_path, n_donors=2, units=[UNIT], es_norm=True, improve_all="all", tie_tolerance=10.0)
    result = run(load_config(path))
    assert not any(outcome.changed for outcome in result.record.choices())
    donor = (tmp_path / "models" / "donor0" / "model.safetensors").read_bytes()
    assert (result.output_dir / "model.safetensors").read_bytes() == donor


def test_es_accept_any_wants_one_dataset_improved_where_the_selection_wants_the_majority():
    table = {"a": [1.0, 0.5, 2.0], "b": [1.0, 1.5, 2.0], "c": [1.0, 1.5, 2.0]}
    samples = {name: torch.tensor(rows)[:, None] for name, rows in table.items()}
    evaluated = {name: torch.ones(3, 1, dtype=torch.bool) for name in samples}
    scores = Scores(samples, evaluated, {name: ~mask for name, mask in evaluated.items()})
    search = SimpleNamespace(rules=Rules("copeland", 1e-6))
    assert choose(scores, [0, 1, 2], search.rules) == 0
    assert _accept_any(search, scores, [0, 1, 2]) == [1]
    assert _accept_any(search, scores, [0, 2]) == [0]
    assert _accept_any(search, scores, [0]) == [0]


def test_what_es_accept_any_takes_improves_a_dataset(tmp_path):
    path = tiny_run(tmp_path, n_donors=2, units=["*.0.*"], es_norm=True, es_accept="any")
    taken = [outcome for outcome in run(load_config(path)).record.choices() if outcome.changed]
    assert taken
    for outcome in taken:
        assert any(by[outcome.winner] < by["current"] for by in outcome.metrics.values())


def test_a_generation_offers_the_sum_of_its_perturbations_by_what_they_gained(tmp_path):
    tiny_model(tmp_path / "d0", seed=0)
    pool = Pool.open(["d0"], tmp_path, tmp_path)
    sources, skills = Sources(pool, tmp_path), [0.1, 0.4, 0.1, 0.2]
    siblings = [
        Candidate(f"{i}", {TENSOR: NormOffspring(Copy("d0", TENSOR), "float32", 0.02, 0, TENSOR, 0, i)})
        for i in range(4)
    ]
    found = consolidated(siblings, TENSOR, skills).values[TENSOR]
    gained = np.array(skills) - np.mean(skills)
    shares = gained / np.linalg.norm(gained)
    weight = pool["d0"].read(TENSOR).double()
    draws = torch.stack([normal(len(weight), 0, TENSOR, "norm_es", 0, i) for i in range(4)])
    wanted = weight * torch.exp(0.02 * (torch.from_numpy(shares)[:, None] * draws).sum(0))[:, None]
    torch.testing.assert_close(sources.value(found).double(), wanted, rtol=1e-6, atol=1e-7)
    assert expression_from_json(json.loads(json.dumps(found.to_json()))) == found
