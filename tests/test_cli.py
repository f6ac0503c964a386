"""The command line: what it prints and where, how it ends, and how quickly it starts."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from olmfast import __version__, cli, load_config, run
from olmfast.testing import tiny_run, write_answers

OLMFAST = [sys.executable, "-m", "olmfast.cli"]
STAGES = {"boundary_select": True, "layer_swap": True, "tensor_swap": True, "es_norm": True}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """A folder with donors, datasets and a config; one donor has a name that markup would swallow."""
    folder = tmp_path_factory.mktemp("pool")
    cfg = tiny_run(folder, 2, **STAGES, units=["*.0.self_attn.q_proj"])
    (folder / "models" / "donor1").rename(folder / "models" / "donor[1]")
    cfg.write_text(cfg.read_text().replace("donor1", "'donor[1]'"))
    return folder


@pytest.fixture
def cfg(pool, tmp_path) -> Path:
    """The config of a copy whose output folder is free."""
    return shutil.copytree(pool, tmp_path / "run", ignore=shutil.ignore_patterns("out*")) / "cfg.yaml"


def loaded_modules(code: str) -> set[str]:
    """The packages that are loaded after some code ran in a new interpreter."""
    code += "\nimport sys; print('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_the_command_says_hello_without_loading_anything_heavy(argument):
    code = f"import sys; sys.argv = ['olmfast', '{argument}']\nfrom olmfast import cli\n"
    loaded = loaded_modules(code + "try: cli.main()\nexcept SystemExit as end: assert not end.code")
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "triton", "huggingface_hub"}


def test_the_kernels_are_importable_without_transformers():
    loaded = loaded_modules("from olmfast import kernels\nassert callable(kernels.weighted_sum)")
    assert "torch" in loaded
    assert "transformers" not in loaded


def test_the_package_is_importable_without_torch():
    assert not loaded_modules("import olmfast") & {"torch", "transformers"}


def test_version(olmfast):
    assert olmfast("--version") == (0, f"olmfast {__version__}\n", "")


def test_without_a_command_the_help_is_shown(olmfast):
    code, out, err = olmfast()
    assert code == 2
    assert all(command in out + err for command in ("run", "evaluate", "doctor"))


@pytest.mark.parametrize("arguments", [["rum"], ["run"], ["run", "a.yaml", "--fast"], ["evaluate", "m"]])
def test_bad_usage_ends_with_2(olmfast, arguments):
    assert olmfast(*arguments)[0] == 2


def test_an_error_is_one_message_and_its_causes_are_shown_where_they_are_asked_for(olmfast, monkeypatch):
    message = "olmfast: absent.yaml: cannot be read: No such file or directory\n"
    for value in ("", "0"):
        monkeypatch.setenv("OLMFAST_DEBUG", value)
        assert olmfast("run", "absent.yaml") == (2, "", message)
    monkeypatch.setenv("OLMFAST_DEBUG", "1")
    code, out, err = olmfast("run", "absent.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("cannot be read: No such file or directory\n" + message)
    assert "in read_any_yaml" in err
    assert "FileNotFoundError: [Errno 2]" in err
    assert "The above exception was the direct cause of the following exception:" in err


def test_no_error_hides_its_cause():
    root = Path(__file__).parent.parent
    sources = [path for folder in ("olmfast", "kernels") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [path for path in sources if "from None" in path.read_text()] == []


def test_what_nobody_foresaw_is_told_as_a_bug_in_one_line(olmfast, monkeypatch):
    def odd() -> None:
        raise ZeroDivisionError("one\nthing or\tanother")

    monkeypatch.setattr("olmfast.terminal.doctor.examine", odd)
    told = "ZeroDivisionError: one thing or another"
    message = f"olmfast: this is a bug in olmfast: {told}; OLMFAST_DEBUG=1 shows where\n"
    monkeypatch.delenv("OLMFAST_DEBUG", raising=False)
    assert olmfast("doctor") == (1, "", message)
    monkeypatch.setenv("OLMFAST_DEBUG", "1")
    code, _, err = olmfast("doctor")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):\n")
    assert ", in odd\n" in err
    assert err.endswith(message)


def test_doctor_names_versions_device_kernels_and_extension(olmfast):
    code, out, _ = olmfast("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["olmfast"] == __version__
    assert {"python", "torch", "transformers", "cpu", "gpu", "kernels", "extension"} <= set(found)
    code, out, _ = olmfast("doctor")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(found)


def test_a_dry_run_checks_everything_prints_the_plan_and_writes_nothing(olmfast, cfg):
    before = sorted(cfg.parent.rglob("*"))
    code, out, _ = olmfast("run", cfg, "--dry-run")
    assert code == 0
    for line in ("layers", "boundary", "tensors", "norm_es", "sums.json: exact_match, 6 samples"):
        assert line in out
    assert "nothing has been written" in out
    code, out, _ = olmfast("run", cfg, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["stages"]["layers"] == {"units": 2, "tensors": 18, "candidates": 4}
    assert plan["datasets"]["heldout.json"] == {"mode": "perplexity", "samples": 6}
    assert sorted(cfg.parent.rglob("*")) == before
    (cfg.parent / "models" / "donor0" / "config.json").unlink()
    assert olmfast("run", cfg, "--dry-run")[0] == 2


def test_a_run_prints_plain_lines_and_closing_tables_where_there_is_no_terminal(olmfast, cfg):
    code, out, err = olmfast("run", cfg, "-v")
    assert code == 0
    assert "\x1b" not in out + err
    assert all(line.startswith("[") and "s] " in line for line in err.splitlines())
    assert any("layers 0: 2 candidates" in line for line in err.splitlines())
    selection, heldout = out.split("Held-out scores")
    for row in ("donor0", "donor[1]", "plain average", "merged", "skill retained"):
        assert row in selection
        assert row in heldout
    assert "What was chosen" in selection
    assert out.rstrip().endswith(f"{cfg.parent / 'out'}: finished")


def test_a_run_can_print_json_and_nothing_else(olmfast, cfg):
    code, out, err = olmfast("run", cfg, "--json", "--set", "dataset.sums.json.mode=exact", "--seed", "3")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, err) == (0, "")
    assert result["status"] == "finished"
    assert result["output_dir"] == str(cfg.parent / "out")
    assert set(result["selection"]["rows"]) == {"donor0", "donor[1]", "plain average", "merged"}
    assert set(result["holdout"]["rows"]["merged"]) == {"heldout.json"}
    assert {"boundary/boundary", "layers/0", "layers/1"} <= set(result["choices"])
    report = json.loads((cfg.parent / "out" / "merge_report.json").read_text())
    assert report["olmfast"]["config"]["seed"] == 3
    assert report["olmfast"]["config"]["dataset"]["sums.json"]["mode"] == "exact"


def test_quiet_means_no_progress(olmfast, cfg):
    code, out, err = olmfast("run", cfg, "-q")
    assert (code, err) == (0, "")
    assert "merged" in out


def test_a_budget_too_small_for_the_first_step_still_ends_cleanly(olmfast, cfg):
    code, out, _ = olmfast("run", cfg, "-q", "--set", "budget=1")
    assert code == 0
    assert "the budget is spent, --resume with a larger one continues" in out
    code, out, _ = olmfast("run", cfg, "-q", "--resume")
    assert code == 0
    assert out.rstrip().endswith("finished")


def test_evaluate_scores_a_single_model(olmfast, pool):
    donor, data = pool / "models" / "donor0", pool / "heldout.json"
    arguments = ("evaluate", donor, "--dataset", f"{data}:perplexity", "--dataset", f"{pool / 'sums.json'}:exact")
    code, out, _ = olmfast(*arguments, "--samples", 3, "--json")
    board = json.loads(out)
    assert code == 0
    assert list(board["rows"]) == [str(donor)]
    assert list(board["rows"][str(donor)]) == [str(data), str(pool / "sums.json")]
    code, out, _ = olmfast(*arguments)
    assert code == 0
    assert "skill retained" not in out


def test_evaluate_shows_a_model_beside_donors_and_their_average(olmfast, pool, tmp_path):
    models = [str(pool / "models" / name) for name in ("donor0", "donor[1]")]
    data = write_answers(tmp_path / "own.json", models[1])  # which tells the donors apart beyond noise
    against = [part for model in models for part in ("--against", model)]
    arguments = ("evaluate", models[1], *against, "--dataset", f"{data}:exact_match")
    code, out, _ = olmfast(*arguments, "--json")
    board = json.loads(out)
    assert code == 0
    assert list(board["rows"]) == [models[0], models[1], "plain average"]
    scores = {name: row[str(data)] for name, row in board["rows"].items()}
    best, worst = sorted(models, key=scores.__getitem__)
    assert board["skill_retained"][best] == 1
    assert board["skill_retained"][worst] == 0
    code, out, _ = olmfast(*arguments)
    assert code == 0
    assert "donor[1]" in out
    assert "skill retained" in out


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("heldout.json", "--dataset heldout.json: expected FILE:MODE"),
        ("heldout.json:perplexed", "dataset.heldout.json.mode: expected 'exact_match'"),
        ("absent.json:exact", "absent.json: no such dataset file"),
    ],
)
def test_evaluate_names_what_it_cannot_use(olmfast, pool, monkeypatch, dataset, message):
    monkeypatch.chdir(pool)
    code, out, err = olmfast("evaluate", pool / "models" / "donor0", "--dataset", dataset)
    assert (code, out) == (2, "")
    assert message in err


def files(folder: Path) -> dict[str, bytes]:
    """What a result consists of, but for the log and the report, which hold times."""
    timed = {"steps.jsonl", "merge_report.json", "run.log"}
    wanted = [path for path in folder.iterdir() if path.is_file() and path.name not in timed]
    return {path.name: path.read_bytes() for path in sorted(wanted)}


def test_one_ctrl_c_finishes_the_step_and_leaves_a_run_that_can_be_resumed(olmfast, cfg, pool):
    text = cfg.read_text() + "es_norm_generations: 6\n"
    cfg.write_text(text)
    process = subprocess.Popen(
        [*OLMFAST, "run", str(cfg), "-v"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "layers 0: 2 candidates" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""
    assert any("finishing the current step; Ctrl-C again stops at once" in line for line in lines)
    assert lines[-1] == ("olmfast: stopped on request; everything decided so far is saved, continue with --resume\n")
    assert not (cfg.parent / "out").exists()
    steps = json.loads((cfg.parent / "out.partial" / "merge_report.json").read_text())["olmfast"]["steps"]
    assert "layers/0" in steps
    assert olmfast("run", cfg, "-q", "--resume")[0] == 0
    whole = pool / "whole.yaml"
    whole.write_text(text.replace("output_dir: out", "output_dir: out_whole"))
    assert files(cfg.parent / "out") == files(run(load_config(whole)).output_dir)


def test_a_second_ctrl_c_stops_at_once_and_can_be_resumed_too(monkeypatch, olmfast, cfg):
    from olmfast.search.loop import Search

    def twice(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Search, "_evaluate", twice)
    code, _, err = olmfast("run", cfg, "-q", "--set", "holdout={}")
    assert code == 130
    assert err.endswith("olmfast: stopped at once; everything decided so far is saved, continue with --resume\n")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["olmfast", "run", str(cfg), "-q", "--resume", "--set", "holdout={}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code


def test_on_a_terminal_there_are_bars_that_name_the_step(olmfast, cfg, monkeypatch):
    controller, terminal = pty.openpty()
    stream = os.fdopen(terminal, "w")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", stream)
    parts = []

    def read() -> None:
        with suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(controller, 65536):
                parts.append(part)

    # All along: a terminal holds a few kilobytes, and on a slow machine the bars write more before the run ends.
    reader = threading.Thread(target=read)
    reader.start()
    code, _, _ = olmfast("run", cfg, "--set", "es_norm=false", "--set", "tensor_swap=false")
    stream.close()
    reader.join()
    os.close(controller)
    shown = b"".join(parts)
    assert code == 0
    assert b"layers" in shown
    assert b"\x1b[" in shown


def test_the_merges_of_the_readme_work_and_print_what_it_shows(olmfast, tmp_path, monkeypatch):
    root = Path(__file__).parent.parent
    section = (root / "README.md").read_text().split("## Merge without a search")[1].split("\n## ")[0]
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    Path("slerp.yml").write_text(section.split("```yaml\n")[1].split("```")[0])
    consoles = [part.split("```")[0].splitlines() for part in section.split("```console\n")[1:]]
    commands = [line for lines in consoles for line in lines if line.startswith("$ ")]
    assert len(commands) == 5
    for lines in consoles:
        for line in lines:
            if line.startswith("$ "):
                code, said, _ = olmfast(*line.removeprefix("$ olmfast ").split())
                assert code == 0, line
            else:
                assert line in said.splitlines()
    names = {path.name for path in Path("slerped").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "mergekit_config.yml"}
    assert Path("merged_models/arithmetic_writing_alpha0.70_layers2-3/config.json").is_file()
    assert sorted(path.name for path in Path().iterdir()) == ["examples", "merged_models", "slerp.yml", "slerped"]
