"""A report gives its model back, byte for byte: a finished run's, a killed one's, one of the original tool."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast import load_config, run
from olmfast.errors import InputError, Interrupted, OlmfastError
from olmfast.runs.rebuild import rebuild
from olmfast.testing import tiny_run

KEYS = {
    "candidates": ["swap", "linear"], "layer_swap": True, "es_norm": True, "units": ["*.0.self_attn.q_proj"],
    "es_norm_sigma": 0.05, "shard_size": 20_000, "base_select": True, "model": {"dtype": torch.bfloat16},
}


def hashes(folder: Path) -> dict[str, str]:
    """What makes a folder a model: weights, index, config and tokenizer."""
    own = [path for path in folder.iterdir() if path.is_file() and path.name.startswith(("model", "config", "token"))]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in own}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output folder of a run that blended, swapped and refined, in several shards."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(load_config(tiny_run(folder, 2, **KEYS)))
    assert any("stored" in json.dumps(e.to_json()) for e in result.recipe.tensors.values())
    assert len(list(result.output_dir.glob("model-*.safetensors"))) > 1
    return result.output_dir


@pytest.mark.parametrize("given", ["merge_report.json", "."])
def test_a_finished_runs_report_gives_its_model(finished, tmp_path, given):
    done = rebuild(finished / given, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(finished)
    assert done.recipe_digest == json.loads((finished / "merge_report.json").read_text())["olmfast"]["recipe_digest"]
    assert not (tmp_path / "again.partial").exists()


def test_the_report_alone_is_enough_if_its_refined_tensors_are_beside_it(finished, tmp_path, olmfast):
    (tmp_path / "kept").mkdir()
    report = shutil.copy(finished / "merge_report.json", tmp_path / "kept" / "merge_report.json")
    models = ("--models-dir", finished.parent / "models")
    code, _, error = olmfast("rebuild", report, tmp_path / "again", *models)
    assert code != 0
    assert "refined" in error
    assert not (tmp_path / "again").exists()
    shutil.copytree(finished / "refined", tmp_path / "kept" / "refined")
    code, said, _ = olmfast("rebuild", report, tmp_path / "again", *models)
    assert (code, "tensors written" in said) == (0, True)
    assert hashes(tmp_path / "again") == hashes(finished)


def test_a_killed_runs_report_gives_the_model_it_had_come_to(tmp_path):
    path = tiny_run(tmp_path, 2, **KEYS)
    stopped = run(load_config(path, {"budget": 8, "output_dir": "stopped"}))
    steps = len(stopped.record.steps)
    asked = iter([False] * steps + [True] * 99)
    with pytest.raises(Interrupted):
        run(load_config(path), stop_requested=lambda: next(asked))
    (tmp_path / "out.partial" / "merge_report.json").write_text("{}")  # behind, as after a kill
    rebuild(tmp_path / "out.partial", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(stopped.output_dir)


def test_a_report_of_the_original_gives_its_model(finished, tmp_path):
    models = finished.parent / "models"
    report = tmp_path / "merge_report.json"
    original = {
        "base_model": {"name": "donor1", "metrics": {}},
        "boundary_layers": {"name": "donor0", "metrics": {}},
        "layers": {"1": {"metrics": {}, "best_model": "donor0"}},
        "tensors": {"model.layers.1.mlp.up_proj.weight": {"metrics": {}, "best_model": "donor1"}},
    }
    report.write_text(json.dumps(original))
    rebuild(report, tmp_path / "out", models_dir=models)
    donors = [load_file(models / f"donor{i}" / "model.safetensors") for i in (0, 1)]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        donor = 1 if "layers.0." in name or name == "model.layers.1.mlp.up_proj.weight" else 0
        assert torch.equal(tensor, donors[donor][name]), name


def test_a_donor_whose_bytes_changed_is_an_error_that_names_it(finished, tmp_path):
    models = shutil.copytree(finished.parent / "models", tmp_path / "models")
    path = models / "donor1" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"donor1: is not the donor1 that .*merge_report.json was made of"):
        rebuild(finished, tmp_path / "out", models_dir=models)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a merge report"),
        ('{"layers": {}, "tensors": {"a": {"best_model": null}}}', "names no model"),
        ('{"olmfast": {"recipe": null, "donors": {"a": "0"}}}', "the run had chosen nothing yet"),
        ('{"olmfast": {"recipe": {"version": 1, "base": "a"}}}', "is damaged: has no 'tensors'"),
        ('{"olmfast": {"recipe": 3, "donors": {"a": "0"}}}', "is damaged: 'int' object has no attribute"),
        ('{"olmfast": {"validation": {"result": "start"}}}', "is damaged: has no 'snapshot: start'"),
    ],
)
def test_a_report_without_a_model_is_refused(tmp_path, content, message):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=message):
        rebuild(tmp_path / "report.json", tmp_path / "out")


def test_an_output_that_is_there_stays_unless_it_may_be_replaced(finished, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="exists; use --overwrite to replace it"):
        rebuild(finished, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *((damage, "model-00002-of-*.safetensors") for damage in (_remove, _cut, _empty)),
        *((_remove, name) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")),
    ],
)
def test_a_finished_run_without_all_of_its_model_is_made_whole(finished, tmp_path, damage, file):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    before = hashes(tmp_path / "out")
    damage(next((tmp_path / "out").glob(file)))
    (tmp_path / "out" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    result = run(load_config(tmp_path / "cfg.yaml"), resume=True)
    assert result.status == "finished"
    assert hashes(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in finished.parent.iterdir()}


def test_a_refined_tensor_whose_bytes_changed_is_an_error(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    path = next((tmp_path / "out" / "refined").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OlmfastError, match="the bytes have changed since they were stored"):
        rebuild(tmp_path / "out", tmp_path / "again")
