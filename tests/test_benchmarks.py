"""Every benchmark and every example runs, in a small form: what nobody runs is broken by the next change."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from olmfast import load_config, run
from olmfast.search.record import Record
from olmfast.testing import skilled_run
from olmfast.weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "demo"
SKILLS = ["arithmetic", "sorting", "grammar", "writing"]

Example = Callable[..., str]


@pytest.fixture
def example(monkeypatch, capsys) -> Example:
    """Runs a script as `python` would, in this process; returns what it printed."""
    threads = torch.get_num_threads()

    def call(script: Path, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        monkeypatch.syspath_prepend(script.parent)
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Of a finished run over the demo's donors: few questions, and the whole model alone."""
    folder = tmp_path_factory.mktemp("demo")
    keys = yaml.safe_load((DEMO / "olm_config.yaml").read_text())
    for entry in (*keys["dataset"].values(), *keys["holdout"].values()):
        entry["samples"] = 6
    keys |= {"models_dir": str(DEMO / "models"), "dataset_dir": str(DEMO / "data"), "output_dir": "runs/demo"}
    keys |= {"scales": ["model"], "es_svd": False, "es_norm": False, "units": ["*"]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(keys))
    run(load_config(path))
    return path


def rows_of(printed: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


@pytest.mark.timeout(1200)  # on a machine that does much else
def test_every_benchmark_runs_and_shows_its_figures_as_they_come_and_in_one_table():
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OLMFAST_BENCH", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-p", "no:cacheprovider", "-rpfE"]
    environment = {**kept, "OLMFAST_BENCH_TINY": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = set(re.findall(r"^PASSED (bench/test_\w+\.py)::(\w+)", done.stdout, re.MULTILINE))
    written = {
        (f"bench/{path.name}", name)
        for path in (ROOT / "bench").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    left_out = re.findall(r"^skipped: (bench/test_\w+\.py)::(\w+).*?: (.+)$", done.stdout, re.MULTILINE)
    assert passed | {(file, name) for file, name, _ in left_out} == written
    assert {reason for *_, reason in left_out} <= {"needs a GPU", "needs Ray"}
    at_once, table = re.split(r"^=+ figures =+$", done.stdout, flags=re.MULTILINE)
    cases = [re.split(" {2,}", row)[0] for row in table.split("\n=")[0].strip().splitlines()[2:]]
    assert len(cases) > len(passed)
    assert [case for case in cases if f"\n{case} | " not in f"\n{at_once}"] == []


def test_the_demo_trains_its_pool(example, tmp_path):
    printed = example(DEMO / "train.py", "--steps", 1, "--questions", 40, "--out", tmp_path)
    donors = [Checkpoint(tmp_path / "models" / skill) for skill in SKILLS]
    assert len({donor.digest("model.embed_tokens.weight") for donor in donors}) == len(SKILLS)  # each took its own step
    assert {path.stem for path in (tmp_path / "data").iterdir()} == {*SKILLS, *(f"{skill}_holdout" for skill in SKILLS)}
    assert re.findall(r"^(\w+) +arithmetic \d\.\d\d ", printed, re.MULTILINE) == ["ancestor", *SKILLS]


def test_the_demo_is_compared_with_static_merges(example, config):
    printed = example(DEMO / "compare.py", "--config", config, "--evaluations", 6, "--count", 5)
    found = re.findall(r"^([\w -]+): best of (\d+) on the selection questions", printed, re.MULTILINE)
    grids = {"linear": "4", "slerp": "9", "task arithmetic": "21", "TIES": "21", "DARE-TIES": "21"}
    assert dict(found) == grids  # the smallest that there are
    held_out, fresh = printed.split("Fresh questions, seeds 21, 22, 23")
    labels = [*SKILLS, "plain average", *(f"best {grid}" for grid in grids), "merged"]
    assert [row[0] for row in rows_of(held_out)] == [row[0] for row in rows_of(fresh)] == labels
    board = Record.load(load_config(config).output_dir).values["holdout"]  # what the run itself has scored
    scored = {row[0]: row[1:6] for row in rows_of(held_out)}
    for label, means in board["rows"].items():
        told = [*means.values(), board["skill_retained"][label]]
        assert [float(cell) for cell in scored[label]] == pytest.approx(told, abs=6e-4)


def test_runs_on_several_draws_are_compared_with_static_merges(example, tmp_path):
    settings = yaml.safe_load(skilled_run(tmp_path, n=12, n_donors=2, budget=8).read_text())
    questions = {name: json.loads((tmp_path / name).read_text()) for name in settings["dataset"]}
    configs = [tmp_path / f"draw{draw}.yaml" for draw in (0, 1)]
    for draw, path in enumerate(configs):
        folder = tmp_path / path.stem
        folder.mkdir()
        parts = {"dataset": {}, "holdout": {}}
        for name, own in questions.items():
            for key, drawn in (("dataset", own[draw::2]), ("holdout", own[1 - draw :: 2])):
                (folder / f"{key}-{name}").write_text(json.dumps(drawn))
                parts[key][f"{key}-{name}"] = settings["dataset"][name]
        keys = {"dataset_dir": str(folder), "output_dir": f"out{draw}"}
        path.write_text(yaml.safe_dump({**settings, **parts, **keys}))
        run(path)
    printed = example(DEMO / "draws.py", *configs, "--merges", 1)
    rows = {row[0]: row[1:4] for row in rows_of(printed)}
    grids = ["linear", "slerp", "arithmetic", "TIES", "DARE-TIES"]
    assert [label.split()[-1] for label in rows][3:-1] == [*grids, "merged"]
    boards = [Record.load(load_config(path).output_dir).values["holdout"]["skill_retained"] for path in configs]
    for label in ("donor0", "donor1", "plain average", "merged"):
        told = [board[label] for board in boards]
        assert [float(cell) for cell in rows[label]] == pytest.approx([*told, sum(told) / 2], abs=6e-4)


def test_the_demos_searches_are_drawn_against_their_budgets(example, tmp_path):
    picture, runs = tmp_path / "curve.svg", tmp_path / "runs"
    printed = example(DEMO / "curve.py", picture, "--budgets", 8, "--samples", 4, "--runs", runs)
    found = re.findall(r"^(.+?) +budget +8: +[\d.]+ +\S+ +\S+$", printed, re.MULTILINE)
    assert found == ["joint search", "search by stages", "CMA-ES over the numbers of one merge"]
    assert picture.read_text().startswith("<?xml")


def test_the_demo_is_scored_on_fresh_questions(example, config):
    printed = example(DEMO / "fresh.py", "--config", config, "--count", 5)
    assert re.findall(r"Fresh questions, seed (\d+)", printed) == ["21", "22", "23"]
    labels = [row[0] for row in rows_of(printed)]
    assert labels == [*SKILLS, "plain average", "demo"] * 3


def test_the_demos_questions_are_drawn(example, tmp_path):
    example(DEMO / "skills.py", "--seed", 7, "--count", 3, "--out", tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(SKILLS)


def test_a_foreign_script_merges_with_the_kernels(example):
    printed = example(EXAMPLES / "foreign_merge.py", 64)  # compares its results itself
    assert re.findall(r"^(TIES|weighted sum), \w+: plain torch \d+ ms", printed, re.MULTILINE) == [
        "TIES", "weighted sum",
    ]  # fmt: skip


def test_the_ways_to_prune_are_compared(example, tmp_path):
    example(EXAMPLES / "pruning" / "pool.py", "--steps", 1, "--questions", 40, "--out", tmp_path)
    printed = example(EXAMPLES / "pruning" / "ways.py", tmp_path, "--budget", 4, "--samples", 20)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    begin = [at for at, row in enumerate(rows) if row[0] == "model"]
    alphas, joint = ([row[0] for row in rows[at + 2 : end]] for at, end in zip(begin, [*begin[1:], None], strict=True))
    assert alphas == ["original", "drop", "uniform", "similarity", "searched"]
    least = [f"least influence{how}" for how in (" dropped", " blended", ", all donors")]
    assert joint == ["original", "drop", "uniform", "file", "similarity", *least, "joint"]
    assert all(re.fullmatch(r"[-+]\d+\.\d+ ± \d+\.\d+", row[2]) for row in rows[begin[1] + 2 : -1])


def test_no_example_is_forgotten():
    known = {"foreign_merge.py", "compare.py", "fresh.py", "skills.py", "train.py", "pool.py", "ways.py", "curve.py"}
    known |= {"draws.py", "ceilings.py", "pictures.py"}  # the last two are tried in test_cluster and test_report
    assert {path.name for path in EXAMPLES.rglob("*.py")} == known
