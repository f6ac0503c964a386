"""Kills, interruptions and resumes: the same bytes as an uninterrupted run, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olmfast import load_config, run
from olmfast.errors import InputError, Interrupted
from olmfast.output.folder import OutputFolder
from olmfast.testing import tiny_run

STAGES = {
    "candidates": ["swap", "linear"],
    "scales": ["model", "kind"],
    "boundary_select": True,
    "layer_swap": True,
    "tensor_swap": True,
    "es_svd": True,
    "es_norm": True,
    "es_norm_generations": 2,
    "units": ["*.0.self_attn.[qo]_proj", "*.1.mlp.*_proj"],
    "model": {"dtype": torch.bfloat16},
}

AS_THE_ORIGINAL = {"candidates": ["swap"], "scales": []}


def command(config: Path, *flags: str, hash_seed: str = "0") -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "olmfast.cli", "run", str(config), "-q", *flags]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    tiny_run(folder, **STAGES)
    return folder


@pytest.fixture
def config(pool, tmp_path) -> Path:
    """A config of its own on the shared pool."""
    return _elsewhere(pool, tmp_path)


def _elsewhere(pool: Path, folder: Path) -> Path:
    import yaml

    data = yaml.safe_load((pool / "cfg.yaml").read_text())
    data |= {"models_dir": str(pool / "models"), "dataset_dir": str(pool), "output_dir": str(folder / "out")}
    (folder / "cfg.yaml").write_text(yaml.safe_dump(data))
    return folder / "cfg.yaml"


@pytest.fixture(scope="module")
def uninterrupted(pool, tmp_path_factory) -> Path:
    """The output folder of a run in a process of its own, under its own hash seed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = command(_elsewhere(pool, folder), hash_seed="1")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    return folder / "out"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_another_process_and_hash_seed_give_the_same_bytes(config, uninterrupted):
    result = run(load_config(config))
    assert weights(result.output_dir) == weights(uninterrupted)
    other = json.loads((uninterrupted / "merge_report.json").read_text())
    assert result.record.data["olmfast"]["steps"] == other["olmfast"]["steps"]


def test_killed_three_times_at_random_moments_and_resumed_it_gives_the_same_bytes(config, uninterrupted):
    dice = random.Random(os.urandom(8))
    out = config.parent / "out"
    log, report = (config.parent / "out.partial" / name for name in ("steps.jsonl", "merge_report.json"))
    for _ in range(3):
        process = command(config, "--resume")
        wait_for_lines(log, dice.randint(0, 2), process)
        time.sleep(dice.uniform(0, 0.05))
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
        if report.exists():
            json.loads(report.read_text())  # whatever the moment, it is whole
    process = command(config, "--resume")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    assert weights(out) == weights(uninterrupted)
    ledgers = [(folder / "evaluations.jsonl").read_text().splitlines() for folder in (out, uninterrupted)]
    assert len(ledgers[0]) == len(ledgers[1])


def wait_for_lines(path: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a log has grown n times, or the process has ended."""

    def size() -> int:
        return path.stat().st_size if path.exists() else 0

    seen = size()
    while n and process.poll() is None:
        if size() != seen:
            seen, n = size(), n - 1
        time.sleep(0.002)


def test_a_kill_after_every_single_step_changes_nothing(config, uninterrupted):
    """Stops between all steps, in this process: whatever the moment, the next session goes on."""
    steps_taken = 0
    while True:
        try:
            result = run(load_config(config), resume=True, stop_requested=stop_after(1))
            break
        except Interrupted:
            steps_taken += 1
            assert not (config.parent / "out").exists()
    assert steps_taken > 8
    assert weights(result.output_dir) == weights(uninterrupted)


def test_a_finished_run_that_is_resumed_changes_no_byte(config):
    out = run(load_config(config)).output_dir
    before = snapshot(out)
    again = run(load_config(config), resume=True)
    assert again.status == "finished"
    assert snapshot(out) == before
    assert sorted(path.name for path in config.parent.iterdir()) == ["cfg.yaml", "out"]


def test_a_finished_run_outlives_an_overwrite_that_was_killed_before_it_began(config):
    out = run(load_config(config)).output_dir
    before = snapshot(out)
    with OutputFolder(out, overwrite=True).lock(empty=True):
        pass
    assert run(load_config(config), resume=True).status == "finished"
    assert snapshot(out) == before
    assert sorted(path.name for path in config.parent.iterdir()) == ["cfg.yaml", "out"]


def test_a_damaged_report_does_not_keep_its_folder_from_being_overwritten(config, uninterrupted):
    out = config.parent / "out"
    out.mkdir()
    (out / "merge_report.json").write_text("{")
    assert weights(run(load_config(config), overwrite=True).output_dir) == weights(uninterrupted)
    assert sorted(path.name for path in config.parent.iterdir()) == ["cfg.yaml", "out"]


def test_a_kill_just_before_the_last_rename_is_made_good(config):
    out = run(load_config(config)).output_dir
    before = snapshot(out)
    out.rename(out.with_name("out.partial"))
    assert run(load_config(config), resume=True).status == "finished"
    assert snapshot(out) == before


def test_resume_with_nothing_to_resume_starts_the_run(config, uninterrupted):
    assert weights(run(load_config(config, {"load_merge_report": True})).output_dir) == weights(uninterrupted)


def stop_after(n: int) -> Callable[[], bool]:
    """A stop request that comes when n steps have been taken."""
    asked = iter([False] * n)
    return lambda: next(asked, True)


def interrupted(config: Path, after: int) -> None:
    with pytest.raises(Interrupted):
        run(load_config(config), stop_requested=stop_after(after))


def test_what_a_killed_write_left_behind_is_dropped(config, uninterrupted):
    interrupted(config, 6)
    partial = config.parent / "out.partial"
    (partial / "refined" / "orphan.safetensors").write_bytes(b"half")
    (partial / "merge_report.json.tmp").write_text('{"half')
    for name in ("evaluations.jsonl", "steps.jsonl"):
        with (partial / name).open("a") as file:
            file.write('{"step": "half')
    (partial / "model.safetensors").write_bytes(b"half a model")
    result = run(load_config(config), resume=True)
    assert weights(result.output_dir) == weights(uninterrupted)
    assert not (result.output_dir / "refined" / "orphan.safetensors").exists()
    for name in ("evaluations.jsonl", "steps.jsonl"):
        for line in (result.output_dir / name).read_text().splitlines():
            json.loads(line)


def test_a_changed_config_donor_or_dataset_is_named(pool, tmp_path):
    shutil.copytree(pool, tmp_path, dirs_exist_ok=True)
    config = _elsewhere(tmp_path, tmp_path)
    interrupted(config, 2)
    with pytest.raises(InputError, match="changed since it was begun: config key seed"):
        run(load_config(config, {"seed": 5}), resume=True)
    dataset = tmp_path / "sums.json"
    original = dataset.read_text()
    dataset.write_text(original.replace("1", "2", 1))
    with pytest.raises(InputError, match=r"dataset sums\.json"):
        run(load_config(config), resume=True)
    dataset.write_text(original)
    donor = tmp_path / "models" / "donor1" / "model.safetensors"
    content = bytearray(donor.read_bytes())
    content[-40] ^= 1
    donor.write_bytes(bytes(content))
    with pytest.raises(InputError, match="donor donor1"):
        run(load_config(config), resume=True)
    content[-40] ^= 1
    donor.write_bytes(bytes(content))
    assert run(load_config(config), resume=True).status == "finished"


def test_an_unfinished_run_is_not_overwritten_by_surprise(config):
    interrupted(config, 2)
    with pytest.raises(InputError, match="an unfinished run; --resume continues it"):
        run(load_config(config))
    assert run(load_config(config), overwrite=True).status == "finished"


def test_a_second_process_on_the_same_run_is_refused(config):
    interrupted(config, 2)
    import fcntl

    with (config.parent / "out.partial" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is running this merge"):
            run(load_config(config), resume=True)


def test_a_report_of_the_original_tool_is_continued(config, pool):
    """Its decisions stand as they are; the search goes on after them."""
    out = config.parent / "out"
    out.mkdir()
    original = {
        "base_model": {"name": "donor0", "metrics": {"sums.json": 1.0}},
        "boundary_layers": {"name": "donor2", "metrics": {"sums.json": 0.9}},
        "layers": {"0": {"metrics": {"sums.json": {"donor1": 0.5}}, "best_model": "donor1"}},
        "tensors": {"model.layers.0.mlp.gate_proj.weight": {"best_model": "donor2"}},
    }
    (out / "merge_report.json").write_text(json.dumps(original))
    (out / "model.safetensors").write_bytes(b"the original tool's result")
    result = run(load_config(config, AS_THE_ORIGINAL), resume=True)
    donors = [load_file(pool / "models" / name / "model.safetensors") for name in ("donor0", "donor1", "donor2")]
    merged = load_file(result.output_dir / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"], donors[2]["model.embed_tokens.weight"])
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], donors[1]["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(merged["model.layers.0.mlp.gate_proj.weight"], donors[2]["model.layers.0.mlp.gate_proj.weight"])
    steps = result.record.data["olmfast"]["steps"]
    assert steps["layers/0"]["winner"] == "donor1"
    assert "layers/1" in steps
    kept = out.with_name("out.original")
    assert (kept / "model.safetensors").read_bytes() == b"the original tool's result"


def test_the_base_in_a_report_of_the_original_stands_although_another_donor_scores_better(config):
    out = config.parent / "out"
    keys = {"base_select": True, "tensor_swap": False, "es_svd": False}
    config_with_selection = load_config(config, AS_THE_ORIGINAL | keys)
    best = run(config_with_selection).record.outcome("base").winner
    shutil.rmtree(out)
    out.mkdir()
    named = next(name for name in config_with_selection.models if name != best)
    original = {"base_model": {"name": named}, "layers": {"0": {"best_model": named}}}
    (out / "merge_report.json").write_text(json.dumps(original))
    recipe = run(config_with_selection, resume=True).recipe
    assert recipe.base == recipe.tensors["model.layers.0.mlp.up_proj.weight"].donor == named


@pytest.mark.parametrize(
    ("original", "message"),
    [
        ({"base_model": {"name": "someone/else"}}, "names the donor 'someone/else', which is not in models"),
        ({"layers": {"7": {"best_model": "donor1"}}}, "names block 7; the models have 0 to 1"),
        ({"tensors": {"h.0.x.weight": {"best_model": "donor1"}}}, "names the tensor 'h.0.x'"),
    ],
)
def test_a_report_of_the_original_that_names_what_is_not_there_is_refused(config, original, message):
    out = config.parent / "out"
    out.mkdir()
    (out / "merge_report.json").write_text(json.dumps(original))
    with pytest.raises(InputError, match=message):
        run(load_config(config), resume=True)
    assert not out.with_name("out.partial").exists()
