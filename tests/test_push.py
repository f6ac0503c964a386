"""A result on the Hub: what goes there and what never does, and its scores in the Hub's form."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import yaml

from olmfast import InputError, OlmfastError, load_config, run
from olmfast.output.push import plan_upload, push
from olmfast.testing import skilled_run

KEPT_HERE = {"steps.jsonl", "evaluations.jsonl", "run.log"}
HISTORY = {"report.html", "merge_report.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A result whose held-out sets are benchmarks: one of the Hub's organisations, one told as a share."""
    benchmarks = {
        "held0.json": {"dataset": "openai/gsm8k", "task": "gsm8k"},
        "held1.json": {"dataset": "org/other", "scale": 1},
    }
    config = skilled_run(tmp_path_factory.mktemp("run"), 6, 2, held_out=8, budget=8, benchmarks=benchmarks)
    return run(config).output_dir


class Hub:
    """Stands for `HfApi`: keeps what it is asked for."""

    calls: list[tuple]
    fault: Exception | None = None

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> str:
        if self.fault:
            raise self.fault
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://huggingface.co/{repo}"

    def create_commit(self, repo: str, operations: list, *, commit_message: str) -> None:
        assert commit_message
        self.calls.append(("commit", repo, {one.path_in_repo: Path(one.path_or_fileobj) for one in operations}))


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    Hub.calls, Hub.fault = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_held_out_scores_are_told_in_the_hubs_form(finished):
    board = load_config(finished.parent / "cfg.yaml")
    (first,) = huggingface_hub.parse_eval_result_entries(
        yaml.safe_load((finished / ".eval_results/openai_gsm8k_gsm8k.yaml").read_text())
    )
    (second,) = huggingface_hub.parse_eval_result_entries(
        yaml.safe_load((finished / ".eval_results/org_other_default.yaml").read_text())
    )
    from olmfast.report.history import History

    accuracy = History.read(finished).boards["held-out"].accuracy["merged"]
    assert (first.dataset_id, first.task_id) == ("openai/gsm8k", "gsm8k")
    assert first.value == pytest.approx(100 * accuracy["held0.json"], rel=1e-5)
    assert (second.dataset_id, second.task_id) == ("org/other", "default")
    assert second.value == pytest.approx(accuracy["held1.json"], rel=1e-5)
    assert first.notes.startswith("right answers, mode exact_match; 8 questions of held0.json; olmfast ")
    assert board.benchmarks["held0.json"].scale == 100


def test_a_dataset_that_chose_the_result_is_no_benchmark_of_it(finished):
    config = finished.parent / "cfg.yaml"
    with pytest.raises(InputError, match=r"benchmarks: 'skill0.json' is not in holdout"):
        load_config(config, {"benchmarks": {"skill0.json": {"dataset": "a/b"}}})
    with pytest.raises(InputError, match="benchmarks"):
        load_config(config, {"benchmarks": {"held0.json": {"dataset": "../b"}}})


def test_the_model_its_card_and_its_scores_go_to_the_hub_and_the_record_stays(finished, hub, olmfast):
    code, out, _ = olmfast("push", finished, "org/name", "--private")
    assert code == 0
    created, (kind, repo, sent) = hub.calls
    assert created == ("create", "org/name", True, True)
    assert (kind, repo) == ("commit", "org/name")
    held = {path.relative_to(finished).as_posix(): path for path in finished.rglob("*") if path.is_file()}
    assert sent == {name: path for name, path in held.items() if name not in KEPT_HERE | HISTORY}
    assert {"model.safetensors", "config.json", "README.md", ".eval_results/org_other_default.yaml"} <= sent.keys()
    assert out.endswith("go to org/name\nhttps://huggingface.co/org/name\n")
    push(plan_upload(finished, "org/name", with_report=True))
    assert hub.calls[-1][2].keys() - sent.keys() == HISTORY


def test_a_dry_run_says_what_would_go_and_asks_nobody(finished, hub, olmfast):
    code, out, _ = olmfast("push", finished, "org/name", "--dry-run")
    assert code == 0
    assert hub.calls == []
    lines = out.splitlines()
    upload = plan_upload(finished, "org/name")
    assert [line.split()[-1] for line in lines[:-1]] == list(upload.files)
    assert lines[-1].split() == [f"{upload.n_bytes:,}", "bytes", "would", "go", "to", "org/name"]


@pytest.mark.parametrize(
    ("make", "repo", "message"),
    [
        (lambda folder: folder.mkdir(), "org/name", "holds no model"),
        (lambda _: None, "org/name", "is not a directory"),
        (lambda folder: folder.mkdir(), "name", "expected org/name"),
        (lambda folder: folder.mkdir(), "org/na me", "is no name of a repository"),
    ],
)
def test_what_cannot_be_pushed_is_named_before_anything_goes(tmp_path, hub, make, repo, message):
    make(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        plan_upload(tmp_path / "out", repo)
    assert hub.calls == []


def test_a_run_in_progress_is_not_pushed(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match="is not complete"):
        plan_upload(tmp_path / "out.partial", "org/name")


def test_what_the_hub_refuses_is_told_with_what_to_do(finished, hub):
    hub.fault = RuntimeError("401 Client Error")
    with pytest.raises(OlmfastError, match="org/name: cannot be uploaded: 401 Client Error; log in with"):
        push(plan_upload(finished, "org/name"))
