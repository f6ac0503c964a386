"""olmfast as a library: the ten names, what they take, and that the examples of the documents run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import olmfast
from olmfast.testing import sums, tiny_model, write_answers, write_dataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SLERP = {
    "merge_method": "slerp",
    "base_model": "models/org_base-math",
    "models": [{"model": "models/org_base-code"}],
    "parameters": {"t": 0.5},
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def n_bytes(folder: str) -> int:
    """Bytes of a model's weights."""
    return sum(t.nbytes for t in load_file(Path(folder) / "model.safetensors").values())


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """The pool, the datasets and the `merge.yaml` of the README, tiny."""
    folder = tmp_path_factory.mktemp("readme")
    (config,) = (block for block in blocks(README, "yaml") if block.startswith("# merge.yaml\n"))
    (folder / "merge.yaml").write_text(config)
    keys = yaml.safe_load(config)
    for seed, name in enumerate(keys["models"], 1):
        tiny_model(folder / keys["models_dir"] / name.replace("/", "_"), seed=seed)
    for seed, name in enumerate({**keys["dataset"], **keys["holdout"]}, 1):
        write_dataset(folder / name, sums(3, seed))
    # What is held out tells the donors apart beyond noise: the answers are those of one of them.
    write_answers(folder / "math_held_out.json", folder / keys["models_dir"] / "org_base-math")
    return folder


@pytest.fixture
def here(pool, tmp_path, monkeypatch) -> Path:
    """A copy of the pool as the working directory."""
    folder = shutil.copytree(pool, tmp_path / "pool")
    monkeypatch.chdir(folder)
    return folder


def test_the_readmes_python_example_runs_as_it_is_written(here, capsys):
    (example,) = (block for block in blocks(README, "python") if "olmfast.run(" in block)
    exec(example, {})
    retained, folder = capsys.readouterr().out.split()
    report = json.loads((here / "merged/merge_report.json").read_text())["olmfast"]
    assert float(retained) == pytest.approx(report["holdout"]["skill_retained"]["merged"])
    assert Path(folder) == here / "merged"
    assert (here / "merged/model.safetensors").is_file()


def test_every_name_is_documented_with_an_example_that_runs(here, capsys):
    text = (ROOT / "docs/python.md").read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    names = [name for name in olmfast.__all__ if name != "__version__"]
    assert len(names) <= 10
    assert sorted(sections) == sorted(names)
    said, namespace = {}, {}
    for name, section in sections.items():
        (example,) = blocks(section, "python")
        assert len(example.splitlines()) <= 10, name
        assert f"olmfast.{name}" in example
        exec(example, namespace)
        said[name] = capsys.readouterr().out
    assert said["load_config"] == f"{here / 'blocks'} 50\n"
    assert said["RunConfig"] == "org/base-math ['block']\n"
    assert said["Result"].endswith(f"{here / 'pair'} finished\n")
    assert [line.split()[0] for line in said["evaluate"].splitlines()] == [
        "models/org_base-math",
        "models/org_base-code",
        "plain",
        "merged",
    ]
    assert said["merge"] == "slerped 21 tensors written: 21 merged by slerp\n"
    assert said["check"].endswith(f"21 tensors written: 21 merged by slerp {n_bytes('slerped')}\n")
    assert "config: smaples: unknown key; did you mean 'samples'?\n" in said["InputError"]
    assert said["OlmfastError"].startswith(f"2 {here / 'merged'}: exists; use --overwrite to replace it")
    made = {path.parent.name for path in here.glob("*/config.json")}
    assert made == {"merged", "pair", "slerped", "some", "each", "best"}


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_text_or_paths(here, kind):
    (here / "slerp.yml").write_text(yaml.safe_dump(SLERP))
    a, b = kind("models/org_base-math"), kind(here / "models/org_base-code")
    config = olmfast.load_config(kind("merge.yaml"), {"scales": ["kind"], "holdout": {}, "candidates": ["swap"]})
    assert config.output_dir == here / "merged"
    assert olmfast.run(config).output_dir == here / "merged"
    assert olmfast.check(kind("slerp.yml")).n_bytes == olmfast.merge(kind("slerp.yml"), kind("out")).n_bytes
    assert olmfast.check(kind(here / "merge.yaml")).output_dir == here / "merged"
    assert olmfast.linear(a, b, 0.5, kind("linear")).output_dir == Path("linear")
    assert olmfast.linear(a, b, 0.5).output_dir == Path("merged_models/org_base-math_org_base-code_alpha0.50")
    datasets = {kind(here / "math.json"): {"mode": "perplexity"}}
    board = olmfast.evaluate(a, datasets, [a, b], models_dir=kind("models"), device="cpu")
    assert list(board.rows) == [str(a), str(b), "plain average"]
    assert olmfast.run(kind("merge.yaml"), overwrite=True).status == "finished"


def test_what_a_file_holds_does_what_the_file_does(here):
    (here / "slerp.yml").write_text(yaml.safe_dump(SLERP))
    olmfast.merge("slerp.yml", "by_file")
    olmfast.merge(SLERP, "by_value")
    one, other = ((here / name / "model.safetensors").read_bytes() for name in ("by_file", "by_value"))
    assert one == other
    held = yaml.safe_load((here / "merge.yaml").read_text())
    before = repr(held)
    assert olmfast.load_config(held, {"dataset.math.json.samples": 7}) == olmfast.load_config(
        "merge.yaml", {"dataset.math.json.samples": 7}
    )
    assert repr(held) == before


def test_alphas_of_layers_may_be_a_list_a_mapping_or_a_file(here):
    (here / "alphas.yaml").write_text("[0.9, 0.1]")
    a, b = "models/org_base-math", "models/org_base-code"
    for name, alphas in {"list": [0.9, 0.1], "mapping": {0: 0.9, 1: 0.1}, "file": "alphas.yaml"}.items():
        olmfast.linear(a, b, 0.5, name, layer_alphas=alphas)
    written = {name: (here / name / "model.safetensors").read_bytes() for name in ("list", "mapping", "file")}
    assert written["list"] == written["mapping"] == written["file"]
    olmfast.linear(a, b, 0.5, "plain")
    assert written["list"] != (here / "plain/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: olmfast.load_config({"models": 3}), "config: models: expected a valid list, got 3"),
        (lambda: olmfast.merge({"merge_method": "tie"}, "out"), "config: merge_method: expected one of"),
        (lambda: olmfast.merge(SLERP, "out", shard_size="big"), "--shard-size: expected a size in bytes"),
        (lambda: olmfast.merge(SLERP, "out", max_ram="1MB"), "--max-ram 1000000: the merge needs about"),
        (lambda: olmfast.merge(SLERP, "out", device="gpu"), "--device: 'gpu' cannot be used here"),
        (lambda: olmfast.check("absent.yaml"), "absent.yaml: cannot be read: No such file"),
        (lambda: olmfast.linear("models/org_base-math", "nowhere", 0.5), "nowhere: "),
        (lambda: olmfast.linear("a", "b", 2, layers=[], top=0), "--alpha must be in range [0, 1], got 2\n--layers: "),
        (lambda: olmfast.linear("a", "b", 0.5, layer_alphas=[2]), "--layer_alphas: layer 0: alpha must be in range"),
        (lambda: olmfast.linear("a", "b", 0.5, sensitivity="x", top=1), "--sensitivity x: expected FILE:MODE"),
        (lambda: olmfast.evaluate("models/org_base-math", {"math.json": {"mode": "exakt"}}), "did you mean 'exact'?"),
    ],
)
def test_what_cannot_be_done_is_an_input_error_and_nothing_is_written(here, call, message):
    before = sorted(here.rglob("*"))
    with pytest.raises(olmfast.InputError) as caught:
        call()
    assert message in str(caught.value)
    assert sorted(here.rglob("*")) == before


def test_names_that_are_not_there_are_refused_and_those_that_are_listed():
    with pytest.raises(AttributeError, match="'olmfast' has no attribute 'rum'"):
        olmfast.rum  # noqa: B018
    assert set(olmfast.__all__) <= set(dir(olmfast))
    assert all(getattr(olmfast, name) is not None for name in olmfast.__all__)
