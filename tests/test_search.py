"""Whole searches on tiny models: what is chosen, what is recorded, and that nothing is lost or done twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast import load_config, run
from olmfast.evaluation.scores import Scores
from olmfast.search.ranking import Rules, choose
from olmfast.search.record import Record
from olmfast.terminal.runs import print_result
from olmfast.testing import tiny_run, write_choices

ALL_STAGES = {
    "boundary_select": True,
    "layer_swap": True,
    "tensor_swap": True,
    "skip_norm": True,
    "es_svd": True,
    "es_norm": True,
    "es_norm_generations": 2,
    "units": ["*.0.self_attn.q_proj", "*.1.mlp.down_proj"],
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One run with all stages, shared by the tests that only look at its result."""
    config = tiny_run(tmp_path_factory.mktemp("full"), **ALL_STAGES, model={"dtype": torch.bfloat16})
    return run(load_config(config))


def test_a_run_writes_a_folder_that_transformers_loads_and_that_scores_as_reported(full):
    from olmfast.runs.scoreboard import evaluate

    heldout = full.output_dir.parent / "heldout.json"
    board = evaluate(str(full.output_dir), {str(heldout): {"mode": "perplexity"}}, device="cpu")
    assert board.rows[str(full.output_dir)][str(heldout)] == full.holdout.rows["merged"]["heldout.json"]
    assert not full.output_dir.with_name("out.partial").exists()


def test_every_step_picked_a_candidate_that_none_beats_and_the_search_got_somewhere(full):
    for outcome in full.record.choices():
        labels = list(next(iter(outcome.metrics.values())))
        means = {name: torch.tensor([[by[label]] for label in labels]) for name, by in outcome.metrics.items()}
        evaluated = {name: torch.ones_like(mean, dtype=torch.bool) for name, mean in means.items()}
        scores = Scores(means, evaluated, {name: ~mask for name, mask in evaluated.items()})
        assert outcome.winner == labels[choose(scores, range(len(labels)), Rules("copeland", 1e-6))], outcome.unit
    changed = [outcome for outcome in full.record.choices() if outcome.changed]
    assert {outcome.stage for outcome in changed} >= {"layers", "svd_es", "norm_es"}
    assert set(full.selection.rows) == {"donor0", "donor1", "donor2", "plain average", "merged"}


def test_the_report_has_the_originals_shape_and_is_strict_json(full):
    text = (full.output_dir / "merge_report.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["base_model"]["name"] == "donor0"
    assert set(data["base_model"]["metrics"]) == {"sums.json", "more.json", "talk.json"}
    assert set(data["layers"]) == {"0", "1"}
    for entry in data["layers"].values():
        assert set(entry["metrics"]["sums.json"]) == {"donor0", "donor1", "donor2"}
        assert entry["best_model"] in {"donor0", "donor1", "donor2"}
    assert set(data["tensors"]) == {f"model.layers.{at}.weight" for at in ("0.self_attn.q_proj", "1.mlp.down_proj")}


def test_the_ledger_has_a_line_per_candidate_and_dataset_whose_samples_have_its_mean(full):
    lines = ledger(full.output_dir)
    assert len(lines) == 3 * full.record.evaluations
    for line in lines:
        assert line["score"] == pytest.approx(sum(line["samples"]) / len(line["samples"]), rel=1e-4)


def test_refined_tensors_lie_beside_the_report_and_in_the_result(full):
    stored = list((full.output_dir / "refined").iterdir())
    assert stored
    result = weights(full.output_dir)
    for path in stored:
        for name, tensor in load_file(path).items():
            assert torch.equal(result[name], tensor)
            assert tensor.dtype == torch.bfloat16


def test_the_model_card_names_base_and_donors(full):
    import yaml

    front = yaml.safe_load((full.output_dir / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["donor0", "donor1", "donor2"]
    assert front["base_model_relation"] == "merge"
    assert front["tags"] == ["merge", "olmfast"]


def test_the_recipes_digest_stands_in_report_and_card_and_tells_two_results_apart(full, tmp_path):
    other = run(load_config(tiny_run(tmp_path, layer_swap=True)))
    digests = [result.recipe.digest() for result in (full, other)]
    assert digests[0] != digests[1]
    for result, digest in zip((full, other), digests, strict=True):
        assert result.record.values["recipe_digest"] == digest
        assert f"Recipe {digest}." in (result.output_dir / "README.md").read_text()


def test_when_every_candidate_is_worse_the_output_is_the_base_byte_for_byte(tmp_path):
    path = tiny_run(tmp_path, **{**ALL_STAGES, "es_svd_sigma": 3.0, "es_norm_sigma": 2.0})
    donor = load_config(path).models_dir / "donor0"
    write_choices(tmp_path / "own.json", donor)
    keys = {"dataset": {"own.json": {"mode": "choice"}}, "holdout": {}}
    result = run(load_config(path, keys))
    tried = [by for o in result.record.choices() for by in o.metrics["own.json"].values()]
    assert min(tried) == result.selection.rows["donor0"]["own.json"] == 0  # the base answers as itself
    assert sum(score > 0 for score in tried) > len(tried) / 2
    assert not any(outcome.changed for outcome in result.record.choices())
    assert (result.output_dir / "model.safetensors").read_bytes() == (donor / "model.safetensors").read_bytes()


def test_base_select_starts_from_the_best_donor_and_max_models_keeps_the_best(tmp_path):
    keys = {"base_select": True, "max_models": 2, "selection": "mean", "dataset": {"own.json": {"mode": "choice"}}}
    path = tiny_run(tmp_path, n_donors=4, layer_swap=True, **keys)
    write_choices(tmp_path / "own.json", tmp_path / "models" / "donor2")  # which tells the donors apart beyond noise
    result = run(load_config(path))
    base = result.record.outcome("base")
    ranked = [base.winner, *base.order]
    best = max(result.selection.donors, key=result.selection.retained)
    assert result.recipe.base == ranked[0] == best
    tried = set(result.record.data["layers"]["0"]["metrics"]["own.json"])
    assert tried == set(ranked[:2])


def test_a_window_of_blocks_tries_all_combinations(tmp_path):
    path = tiny_run(tmp_path, n_donors=2, layer_swap=True, markov=1, model={"num_hidden_layers": 3})
    result = run(load_config(path))
    tried = result.record.outcome("layers/0+1").metrics["sums.json"]
    assert set(tried) == {f"{a} + {b}" for a in ("donor0", "donor1") for b in ("donor0", "donor1")}
    assert set(result.record.data["layers"]) == {"0", "1", "2"}


def test_backward_walks_blocks_and_modules_from_the_end(tmp_path):
    path = tiny_run(tmp_path, n_donors=2, layer_swap=True, tensor_swap=True, direction="backward", units=["*_proj"])
    steps = list(run(load_config(path)).record.steps)
    assert steps[1:3] == ["layers/1", "layers/0"]
    assert steps[3] == "tensors/model.layers.1.mlp.down_proj"
    assert steps[-1] == "tensors/model.layers.0.self_attn.q_proj"


def test_under_a_guard_a_degraded_candidate_is_not_evaluated_further(tmp_path):
    path = tiny_run(tmp_path, layer_swap=True, improve_all="all")
    result = run(load_config(path))
    guarded = [o for o in result.record.choices() if o.dropped]
    assert guarded
    lines = ledger(result.output_dir)
    for outcome in guarded:
        for label, reason in outcome.dropped.items():
            failed_on = reason.removeprefix("degraded on ")
            seen = [x["dataset"] for x in lines if x["step"] == f"layers/{outcome.unit}" and x["candidate"] == label]
            assert seen[-1] == failed_on
            assert outcome.winner != label
    for name in result.selection.datasets:
        assert result.selection.rows["merged"][name] <= result.selection.rows["donor0"][name] * (1 + 1e-5)


def test_samples_is_honoured_for_every_candidate(tmp_path):
    path = tiny_run(tmp_path, layer_swap=True, samples=2)
    assert {len(line["samples"]) for line in ledger(run(load_config(path)).output_dir)} == {2}


def test_identical_donors_are_evaluated_once(tmp_path):
    path = tiny_run(tmp_path, layer_swap=True)
    config = load_config(path)
    for file in ("model.safetensors", "config.json"):
        (config.models_dir / "donor2" / file).write_bytes((config.models_dir / "donor1" / file).read_bytes())
    result = run(config)
    metrics = result.record.outcome("layers/0").metrics["sums.json"]
    assert metrics["donor1"] == metrics["donor2"]
    assert result.record.evaluations == 2 + 2 * 2  # base and two blocks: two different donors each


def test_a_donor_without_a_score_is_no_end_of_the_scale_and_none_of_its_twins_either(tmp_path):
    path = tiny_run(tmp_path, n_donors=4)
    config = load_config(path, {"dataset": {"sums.json": {"mode": "perplexity"}}})
    first, second = (config.models_dir / name / "model.safetensors" for name in ("donor1", "donor2"))
    tensors = load_file(first)
    tensors["lm_head.weight"] *= 500  # exp of its cross-entropy overflows
    for file in (first, second):
        save_file(tensors, file, metadata={"format": "pt"})
    result = run(config)
    assert result.record.outcome("base").dropped == {"donor1": "scored NaN or infinity on sums.json"}
    assert result.selection.donors == ["donor0", "donor3"]
    assert math.isnan(result.holdout.rows["donor2"]["heldout.json"])
    assert result.holdout.retained("merged") in (0.0, 1.0)  # donor0's, one of two that have a score
    assert math.isnan(result.holdout.retained("donor1"))
    print_result(result, as_json=False)


@pytest.mark.usefixtures("float64_throughout")
def test_a_donor_scored_whole_keeps_its_own_settings_and_a_merge_has_the_bases(tmp_path):
    from olmfast.runs.scoreboard import evaluate

    path = tiny_run(tmp_path, layer_swap=True, dtype="float64")
    config = load_config(path)
    file = config.models_dir / "donor1" / "config.json"
    settings = json.loads(file.read_text())
    settings["rope_parameters"]["rope_theta"] = 50.0
    file.write_text(json.dumps(settings))
    (config.models_dir / "donor2" / "model.safetensors").write_bytes(
        (config.models_dir / "donor1" / "model.safetensors").read_bytes()
    )
    result = run(config)
    scores = {name: row["heldout.json"] for name, row in result.holdout.rows.items()}
    assert scores["donor1"] != pytest.approx(scores["donor2"], rel=1e-3)  # the same weights under other settings
    held_out = {str(tmp_path / "heldout.json"): {"mode": "perplexity"}}
    for name in ("donor0", "donor1", "donor2", "merged"):
        folder = str(result.output_dir if name == "merged" else config.models_dir / name)
        (alone,) = evaluate(folder, held_out, device="cpu", dtype="float64").rows[folder].values()
        # The run scores a donor of other settings sequentially: sums in another order.
        assert alone == pytest.approx(scores[name], rel=1e-9), name


def test_the_next_units_donors_are_read_while_the_present_one_is_evaluated(tmp_path, monkeypatch):
    from olmfast.evaluation.batched import BatchedScorer
    from olmfast.weights.sources import Sources

    events: list[str] = []
    prefetch, score = Sources.prefetch, BatchedScorer.score

    def watched_prefetch(self, expressions):
        copies = list(expressions)
        events.append("read " + " ".join(sorted({x.tensor.split(".")[2] for x in copies if ".layers." in x.tensor})))
        prefetch(self, copies)

    def watched_score(self, unit, *rest):
        events.append(f"evaluate {unit.name}")
        return score(self, unit, *rest)

    monkeypatch.setattr(Sources, "prefetch", watched_prefetch)
    monkeypatch.setattr(BatchedScorer, "score", watched_score)
    run(load_config(tiny_run(tmp_path, layer_swap=True)))
    assert events.index("read 1") < events.index("evaluate 0") < events.index("evaluate 1")


def test_a_budget_of_evaluations_ends_cleanly_and_a_larger_one_goes_on_to_the_same_bytes(tmp_path):
    whole, parts = (tiny_run(tmp_path / name, **ALL_STAGES) for name in ("whole", "parts"))
    expected = run(load_config(whole))
    stopped = run(load_config(parts, {"budget": 9}))
    assert stopped.status == "stopped"
    assert stopped.record.evaluations <= 9
    assert weights(stopped.output_dir)  # the best so far is a complete model
    resumed = run(load_config(parts, {"budget": 10_000}), resume=True)
    assert resumed.status == "finished"
    assert (resumed.output_dir / "model.safetensors").read_bytes() == (
        expected.output_dir / "model.safetensors"
    ).read_bytes()


def test_float64_evaluation_is_available_and_decides_on_float64_scores(tmp_path):
    path = tiny_run(tmp_path, layer_swap=True, dtype="float64")
    record: Record = run(load_config(path)).record
    score = record.outcome("layers/0").metrics["sums.json"]["donor1"]
    assert record.header["environment"]["dtype"] == "float64"
    assert score != float(torch.tensor(score, dtype=torch.float32))
