"""The search for a path: what is drawn, what it costs, what is accepted and written, and that it can be resumed."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from olmfast import InputError, load_config, run
from olmfast.config.searches import Dataflow
from olmfast.dataflow import execute
from olmfast.dataflow.drawing import FACTORS, Space, distribution
from olmfast.dataflow.hops import Hop
from olmfast.errors import Interrupted
from olmfast.evaluation.memory import Memory
from olmfast.testing import own_answers, tiny_adapter, tiny_model

N = 3
SPACE = Space(("a", "b"), N, 2, True)


@functools.cache
def material() -> Path:
    """Two models, and questions whose answers are those of a path through both: a0 a1 b2 a2."""
    folder = Path(tempfile.mkdtemp(prefix="searched-"))
    models = folder / "models"
    for seed, name in enumerate("ab", 1):
        tiny_model(models / name, seed=seed, noise=0.5, num_hidden_layers=N)
    tiny_model(models / "path", seed=1, noise=0.5, num_hidden_layers=N + 1)
    own, other = (load_file(models / name / "model.safetensors") for name in "ab")
    made = {name: value for name, value in own.items() if ".layers." not in name}
    for place, (donor, block) in enumerate([(own, 0), (own, 1), (other, 2), (own, 2)]):
        prefix = f"model.layers.{block}."
        made |= {name.replace(prefix, f"model.layers.{place}."): v for name, v in donor.items() if prefix in name}
    made = {name: value.clone() for name, value in made.items()}
    save_file(made, models / "path" / "model.safetensors", {"format": "pt"})
    for name, n, seed in (("asked.json", 80, 1), ("held.json", 60, 2)):
        own_answers(folder / name, models / "path", n, seed)
    return folder


def searched(folder: Path, **keys: Any) -> Path:
    """The config of a search for that path."""
    for name in ("asked.json", "held.json"):
        shutil.copy(material() / name, folder)
    config = {
        "models_dir": str(material() / "models"),
        "output_dir": "out",
        "models": ["a", "b"],
        "dataset": {"asked.json": {"mode": "exact"}},
        "holdout": {"held.json": {"mode": "exact"}},
        "device": "cpu",
        "dataflow": {"generations": 10, "population": 12, "max_hops": 5},
        **keys,
    }
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# What is drawn


def test_entries_are_run_in_the_order_of_pass_model_and_block():
    assert SPACE.entries[:4] == [(0, "a", 0), (0, "a", 1), (0, "a", 2), (0, "b", 0)]
    assert SPACE.path(SPACE.first, np.full(12, 1.0)) == tuple(Hop("a", block) for block in range(N))


def test_factors_of_entries_that_are_not_used_play_no_part():
    used = np.array([True, False] * 6)
    factors = np.linspace(0.5, 1.5, 12)
    path = SPACE.path(used, factors)
    others = np.where(used, factors, 7.0)
    assert SPACE.path(used, others) == path
    assert [hop.scale for hop in path] == list(factors[::2])
    assert all(hop.scale is None for hop in SPACE.path(used, None))


def test_a_path_is_said_by_a_file_of_the_format():
    path = (Hop("a", 0), Hop("b", 1, 0.8), Hop("a", 0, 1.2), Hop("a", 2))
    data = SPACE.file(path, ["x", "y"])
    assert data["layer_mask"] == [[[True, False, False], [False, True, False]], [[True, False, True], [False] * 3]]
    assert data["scaling_factors"][0] == [[1.0, None, None], [None, 0.8, None]]
    assert data["scaling_factors"][1] == [[1.2, None, 1.0], [None] * 3]
    assert (data["num_r"], data["add_last_layer"]) == (2, False)


@pytest.mark.parametrize("method", ["catcma", "paper"])
def test_a_search_begins_at_the_first_model_and_moves_to_what_is_good(method):
    config = Dataflow(method=method, population=24)
    draws = distribution(config, SPACE, 1)
    first, wanted = set(SPACE.path(SPACE.first, None)), {("b", 1), ("a", 0), ("a", 2)}
    begun = draws.draw()
    own = sum(len([hop for hop in one.hops if Hop(hop.donor, hop.block) in first]) for one in begun)
    assert own >= 0.75 * 24 * N
    assert sum(map(len, (one.hops for one in begun))) <= 24 * (N + 4)

    def value(hops):
        return len(wanted ^ {(hop.donor, hop.block) for hop in hops}) + 0.1 * len(hops)

    means = []
    for _ in range(40):
        drawn = draws.draw()
        means.append(np.mean([value(one.hops) for one in drawn]))
        draws.tell(drawn, [value(one.hops) for one in drawn])
    assert means[-1] < means[0] - 1


def test_factors_of_blocks_that_no_path_uses_are_not_searched():
    draws = distribution(Dataflow(population=8), Space(("a", "b"), 20, 2, True), 1)
    for _ in range(15):
        drawn = draws.draw()
        before, used = draws.optimizer._mean.copy(), np.any([one.raw.c[:, 1] for one in drawn], axis=0)
        draws.tell(drawn, [sum(hop.scale or 1.0 for hop in one.hops) for one in drawn])
        assert (draws.optimizer._mean[~used] == before[~used]).all()
        assert (draws.optimizer._mean[used] != before[used]).any()
    assert (~used).any()


def test_the_defaults_are_those_of_the_paper_where_it_is_asked_for():
    paper = Dataflow(method="paper")
    assert (paper.n_generations, paper.population_of(64)) == (100, 128)
    own = Dataflow()
    assert own.population_of(12) == 4 + int(3 * np.log(24))
    assert own.most_hops(7) == 11
    drawn = {hop.scale or 1.0 for one in distribution(own, SPACE, 3).draw() for hop in one.hops}
    assert drawn <= set(FACTORS)
    assert len(drawn) > 1


# Runs


def test_a_search_finds_a_path_that_is_better_and_writes_it_as_a_model_and_as_a_file(tmp_path):
    result = run(searched(tmp_path))
    assert result.record.values["validation"]["result"] != "start"
    report = result.record.values["paths"]
    best = report["front"][-1]
    assert best["interval"][0] > 0
    assert report["comparisons"] <= 1 + 10 * 12
    depths, skills = [one["hops"] for one in report["front"]], [one["picked by"] for one in report["front"]]
    assert depths == sorted(set(depths))
    assert skills == sorted(skills)
    assert max(depths) <= 5
    assert result.holdout.rows["merged"]["held.json"] < result.holdout.rows["a"]["held.json"]
    against = next(one for one in result.verdict.comparisons if one.rival == "a") if result.verdict else None
    assert against is None or against.low > 0
    _, tokenizer = execute(
        merge_config=str(tmp_path / "out" / "path.yml"), output_path=str(tmp_path / "again"), dtype="float32"
    )
    assert tokenizer is not None
    found, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert found.keys() == again.keys()
    assert all((found[name] == again[name]).all() for name in found)
    assert "## Score against depth" in (tmp_path / "out" / "README.md").read_text()
    command = [sys.executable, "-m", "olmfast.cli", "rebuild", str(tmp_path / "out"), str(tmp_path / "rebuilt")]
    subprocess.run(command, check=True, capture_output=True)  # a process of its own, which has imported nothing yet
    made, rebuilt = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "rebuilt"))
    assert made == rebuilt


def test_what_is_empty_or_too_deep_or_known_is_not_scored(tmp_path, olmfast):
    config = searched(tmp_path, dataflow={"generations": 4, "population": 16, "max_hops": 3, "factors": False})
    code, out, _ = olmfast("check", config)
    assert (code, "paths" in out) == (0, True)
    code, out, _ = olmfast("run", config, "-q")
    assert code == 0
    assert "Score against depth, on 60 held-out questions" in out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())["olmfast"]["paths"]
    lines = (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()
    scored = [line for line in lines if '"step": "paths/' in line and "test" not in line]
    assert len(scored) == report["comparisons"] < 1 + 4 * 16
    assert all(0 < one["hops"] <= 3 for one in report["front"])


def test_paths_may_have_to_be_shallower_than_the_first_model(tmp_path):
    dataflow = {"generations": 3, "population": 16, "max_hops": 2}
    result = run(searched(tmp_path, dataflow=dataflow))
    depths = {one["hops"] for one in result.record.values["paths"]["front"]}
    assert depths <= {1, 2, N}
    assert depths & {1, 2}


def test_a_search_killed_and_stopped_is_resumed_to_the_same_bytes(tmp_path):
    config = searched(tmp_path, dataflow={"generations": 6, "population": 8, "max_hops": 5})
    whole = run(load_config(config, {"output_dir": str(tmp_path / "whole")}))
    log = tmp_path / "out.partial" / "steps.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "olmfast.cli", "run", str(config), "-q"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    asked = iter(range(2))
    with pytest.raises(Interrupted):
        run(config, stop_requested=lambda: next(asked, None) is None, resume=True)
    resumed = run(config, resume=True)
    assert resumed.record.steps == whole.record.steps
    assert resumed.record.values["paths"] == whole.record.values["paths"]
    for name in ("model.safetensors", "config.json", "path.yml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_papers_method_on_blocks_of_one_model(tmp_path):
    dataflow = {"method": "paper", "models": "one", "generations": 2, "population": 8, "max_hops": 5}
    report = run(searched(tmp_path, models=["a"], holdout={}, dataflow=dataflow)).record.values["paths"]
    assert 1 < report["comparisons"] <= 17
    assert report["questions"].endswith("selection")
    assert {one["path"].split()[0] for one in report["front"]} == {"a"}


@pytest.mark.usefixtures("float64_throughout")
def test_the_sequential_scorer_scores_the_same_and_decides_the_same(tmp_path):
    config = searched(tmp_path, dtype="float64", dataflow={"generations": 5, "population": 4, "factors": False})
    found = []
    for scorer in ("batched", "sequential"):
        result = run(load_config(config, {"scorer": scorer, "output_dir": str(tmp_path / scorer)}))
        found.append({key: (one.winner, one.metrics) for key, one in result.record.steps.items()})
    assert found[0].keys() == found[1].keys()
    for key, (winner, metrics) in found[0].items():
        assert winner == found[1][key][0]
        for dataset, by in metrics.items():
            assert by == pytest.approx(found[1][key][1][dataset], abs=1e-9)


def test_the_blocks_of_all_models_have_to_fit_the_memory(tmp_path, monkeypatch):
    asked = []

    def check(_, n_bytes, what):
        asked.append(n_bytes)
        raise InputError(f"max_ram: too little: {what}")

    monkeypatch.setattr(Memory, "check", check)
    with pytest.raises(InputError, match="max_ram: too little: the other models' blocks"):
        run(searched(tmp_path))
    blocks = [t for name, t in load_file(material() / "models/b/model.safetensors").items() if ".layers." in name]
    assert asked == [sum(4 * t.numel() for t in blocks)]  # of the one beside the first
    assert not (tmp_path / "out.partial").exists()


def test_a_model_with_an_adapter_gives_its_blocks_and_is_named_with_it(tmp_path):
    tiny_adapter(tmp_path / "lora", material() / "models/a", 3, spread=0.3, target_modules=["down_proj", "q_proj"])
    dataflow = {"generations": 1, "population": 12, "passes": 1, "max_hops": 4}
    models = ["a", f"a+{tmp_path / 'lora'}"]
    run(searched(tmp_path, models=models, dataflow=dataflow, significance=False, validation=0.0))
    file = tmp_path / "out" / "path.yml"
    assert yaml.safe_load(file.read_text())["model_paths"][1][0].endswith("models/a+../lora")
    execute(merge_config=str(file), output_path=str(tmp_path / "again"), dtype="float32")
    made, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all((made[name] == again[name]).all() for name in made)


@pytest.mark.parametrize(
    ("dataflow", "said"),
    [
        ({"repeat": True}, "dataflow.models: is one, and models lists 2"),
        ({"repeat": True, "models": "all"}, "give models: one"),
        ({"grid": 9}, "grid: not with repeat: false"),
        ({"repeat": True, "models": "one", "max_hops": 9}, "max_hops: not with repeat: true"),
        ({"method": "catcmaes"}, "dataflow.method"),
        ({"max_hops": 0}, "dataflow.max_hops"),
    ],
)
def test_what_does_not_fit_is_named(dataflow, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(searched(tmp_path, dataflow=dataflow))
    assert not (tmp_path / "out.partial").exists()
