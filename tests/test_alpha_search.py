"""Alphas searched: scored as merging and evaluating would, resumed to the same bytes, by no question held out."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmfast.config.pruning import Pruning
from olmfast.config.run import parse_config
from olmfast.errors import InputError, Interrupted
from olmfast.evaluation.open import Evaluation, Settings
from olmfast.pruning.alphas import weights_of
from olmfast.pruning.prune import prune
from olmfast.pruning.questions import Divided, with_objective
from olmfast.pruning.searches import AlphaSearch
from olmfast.pruning.session import Searched
from olmfast.pruning.target import Target
from olmfast.runs.scoreboard import evaluate
from olmfast.search.record import Record
from olmfast.testing import sums, tiny_model, tree, write_dataset, write_mmlu

METHODS = ("cma", "bayes", "gradient")
SUBJECTS = ("addition", "subtraction")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, MMLU of two subjects, and other questions."""
    folder = tmp_path_factory.mktemp("search")
    tiny_model(folder / "m", "llama", 1, num_hidden_layers=6, max_position_embeddings=512)
    write_mmlu(folder / "data", dict.fromkeys(SUBJECTS, 8))
    write_dataset(folder / "sums.json", sums(12, 1))
    write_dataset(folder / "more.json", sums(6, 2))
    return folder


@pytest.fixture
def config(world, tmp_path, monkeypatch):
    """Makes the config of a search of three alphas; keys of the section `prune`, and `top` ones of the config."""
    monkeypatch.setattr("olmfast.pruning.searches.STEPS", 2)

    def make(method="cma", top=None, **keys):
        section = {"method": method, "num_layer": 3, "data_dir": "data", "ntrain": 1, **keys}
        section = {key: value for key, value in section.items() if value is not None}
        data = {"models": ["m"], "models_dir": ".", "output_dir": str(tmp_path / "out"), "prune": section}
        return parse_config({**data, "device": "cpu", "budget": 26, **(top or {})}, "cfg", world)

    return make


@pytest.fixture
def finished(config, world):
    """The files of a search that nothing stopped; each method's is made once."""

    def of(method):
        folder = world / "whole" / method
        if not folder.exists():
            prune(config(method, top={"output_dir": str(folder)}))
        return tree(folder)

    return of


def ledger(folder):
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_what_was_tried_is_written_and_scores_what_it_scored(config, world, tmp_path, method):
    done = prune(config(method))
    report = json.loads((tmp_path / "out/merge_report.json").read_text())["olmfast"]
    tried = [(step["metrics"]["MMLU likelihood"], key) for key, step in report["steps"].items()]
    best = min(value for metrics, _ in tried for value in metrics.values())
    assert report["pruned"]["objective"] == pytest.approx(best)
    assert report["pruned"]["alphas"] == list(done.alphas)
    assert len(tried) > 2
    steps = json.loads((tmp_path / "out/alphas.json").read_text())
    assert [one["ratio_i_alpha"] for one in steps] == list(done.alphas)
    assert [(one["layer_to_merge_into"], one["layer_to_remove"]) for one in steps] == [(4, 5), (3, 4), (2, 3)]

    a, out = load_file(world / "m/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    exact = sum(w * a[name.replace(".2.", f".{2 + k}.")].double() for k, w in enumerate(weights_of(done.alphas)))
    torch.testing.assert_close(out[name].double(), exact, rtol=1e-6, atol=1e-6)
    assert done.selection.rows["searched"]["MMLU likelihood"] == pytest.approx(best, rel=1e-5)
    assert list(done.selection.rows) == ["original", "drop", "uniform", "searched"]
    page = (tmp_path / "out/report.html").read_text()
    assert "Layers 2 to 5 became layer 2; alphas" in page
    assert "What it says" in page
    assert "<td>searched</td><td>" in page[page.index("<h2>Parameters</h2>") :]
    assert best <= min(done.selection.rows[name]["MMLU likelihood"] for name in ("uniform", "drop")) + 1e-6


def test_candidates_score_what_their_folders_score(config, world, tmp_path):
    """The ledger's scores of alphas are those of the same alphas merged, written and evaluated."""
    top = {"dataset": {"sums.json": {"mode": "exact_match"}}, "holdout": {"more.json": {"mode": "exact"}}}
    prune(config("cma", data_dir=None, top={**top, "budget": 8}))
    recorded = {(one["step"], one["candidate"]): one["score"] for one in ledger(tmp_path / "out")}
    for label, method in (("uniform", "uniform"), ("drop", "drop")):
        section = {"method": method, "num_layer": 3}
        folder = tmp_path / label
        data = {"models": ["m"], "models_dir": ".", "output_dir": str(folder), "prune": section}
        prune(parse_config(data, "cfg", world))
        files = {world / "sums.json": {"mode": "exact_match"}}
        board = evaluate(folder, files, device="cpu", dtype="float32")
        (score,) = board.rows[str(folder)].values()
        assert recorded["start", label] == pytest.approx(score, rel=1e-4)


def test_the_closing_table_has_what_is_kept_and_what_it_costs(world, tmp_path, olmfast, monkeypatch):
    """Of held-out questions: those figures that each folder has when it is evaluated by itself."""
    monkeypatch.chdir(world)
    entries = [
        {"step": k, "layer_to_merge_into": 4 - k, "layer_to_remove": 5 - k, "ratio_i_alpha": alpha}
        for k, alpha in enumerate((0.9, 0.8, 0.7))
    ]
    (tmp_path / "start.json").write_text(json.dumps(entries))
    line = ["prune", "--model_path", "m", "-i", 3, "--method", "cma", "--alphas_file", tmp_path / "start.json"]
    line += ["--dataset", "sums.json:exact", "--holdout", "more.json:exact", "--budget", 4, "--device", "cpu"]
    code, shown, _ = olmfast(*line, "--output_dir", tmp_path / "out")
    assert code == 0
    assert "What is kept and what it costs, held-out questions" in shown
    closing = Searched.of(Record.load(tmp_path / "out"), tmp_path / "out").closing
    head, *rows = closing.table()
    assert [row[0] for row in rows] == ["original", "drop", "uniform", "file", "searched"]
    assert head[2:] == [
        *("searched is lower by", "generated right", "perplexity of answers", "of questions"),
        *("parameters", "tokens/s"),
    ]
    out, file = str(tmp_path / "out"), world / "more.json"
    read, generated = (
        evaluate(out, {file: {"mode": mode}}, device="cpu", dtype="float32") for mode in ("exact", "exact_match")
    )
    (loss,), (right,) = read.rows[out].values(), generated.accuracy[out].values()
    assert rows[-1][1].startswith(f"{loss:.4f} ± ")
    assert closing.perplexity("answers", "searched") == pytest.approx(math.exp(loss), rel=1e-4)
    assert rows[-1][3].startswith(f"{right:.1%} ± ")
    for label, folder in (("original", world / "m"), ("searched", tmp_path / "out")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        losses = []
        for item in json.loads((world / "more.json").read_text()):
            ids = torch.tensor([tokenizer(item["conversation"][0]["value"])["input_ids"]])
            losses.append(model(ids, labels=ids).loss.item())
        assert closing.perplexity("questions", label) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert closing.parameters[label] == sum(one.numel() for one in model.parameters())
        assert closing.tokens_per_s[label] > 0
    gain, margin = closing.gain("searched", "drop")
    leads = closing.board.scores_of(["drop", "searched"], "more.json").diff(dim=0)[0]
    assert gain == pytest.approx(-float(leads.mean()))
    assert margin == pytest.approx(1.96 * float(leads.std()) / len(leads) ** 0.5, rel=1e-3)


def test_held_out_questions_are_used_for_no_choice(config, tmp_path):
    done = prune(config("cma"))
    assert {len(one["samples"]) for one in ledger(tmp_path / "out")} == {8}  # of 16
    (decided, held) = (done.selection.samples["searched"], done.holdout.samples["searched"])
    assert [len(part["MMLU likelihood"]) for part in (decided, held)] == [8, 8]
    base = Target.open(config("cma"), evaluated=True).base
    divided = Divided.load(with_objective(config("cma")), base)
    both = [part.datasets["MMLU likelihood"].samples for part in (divided.selection, divided.holdout)]
    assert not {sample.prompt for sample in both[0]} & {sample.prompt for sample in both[1]}
    closing = done.closing.kept  # each question once, whichever way it is scored, and those that decided not at all
    wanted = [f"{part}: MMLU likelihood" for part in ("generated", "answers", "questions")]
    assert {name: closing.n_questions(name) for name in closing.datasets} == dict.fromkeys(wanted, 8)
    both = Divided.load(with_objective(config("cma", objective="accuracy + 2 * likelihood")), base)
    first, second = both.selection.datasets.values()
    assert [s.prompt for s in first.samples] == [s.prompt for s in second.samples]  # scored in two ways, set aside once


@pytest.mark.parametrize(("method", "after"), [("cma", 2), ("bayes", 2), ("gradient", 3)])
def test_killed_and_resumed_it_gives_the_same_bytes(config, finished, tmp_path, method, after):
    whole, asked = finished(method), 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(Interrupted):
        prune(config(method), stop_requested=stop)
    prune(config(method), resume=True)
    again = tree(tmp_path / "out")
    for name in ("model.safetensors", "alphas.json", "evaluations.jsonl", "config.json"):
        assert again[name] == whole[name], name
    assert set(again) == set(whole)


@pytest.mark.parametrize("method", METHODS)
def test_a_kill_while_a_round_is_scored_loses_that_round_alone(config, finished, tmp_path, method, monkeypatch):
    from olmfast.search.record import Record

    whole, add, seen = finished(method), Record.add, []

    def die(self, key, *rest):
        seen.append(key)
        if len(seen) == 3:
            raise KeyboardInterrupt
        add(self, key, *rest)

    monkeypatch.setattr(Record, "add", die)
    with pytest.raises(KeyboardInterrupt):
        prune(config(method))
    monkeypatch.setattr(Record, "add", add)
    prune(config(method), resume=True)
    again = tree(tmp_path / "out")
    for name in ("model.safetensors", "alphas.json", "evaluations.jsonl"):
        assert again[name] == whole[name], name


def test_a_larger_budget_goes_on_from_where_a_smaller_one_ended(config, finished, tmp_path):
    whole = finished("cma")
    assert prune(config("cma", top={"budget": 12})).status == "stopped"
    prune(config("cma"), resume=True)
    again = tree(tmp_path / "out")
    assert again["model.safetensors"] == whole["model.safetensors"]
    assert again["evaluations.jsonl"] == whole["evaluations.jsonl"]


def test_an_alpha_file_is_the_start_point(config, tmp_path):
    entries = [
        {"step": k, "layer_to_merge_into": 4 - k, "layer_to_remove": 5 - k, "ratio_i_alpha": alpha}
        for k, alpha in enumerate((0.9, 0.8, 0.7))
    ]
    (tmp_path / "start.json").write_text(json.dumps(entries))
    done = prune(config("cma", alphas_file=str(tmp_path / "start.json"), top={"budget": 3}))
    assert "file" in done.holdout.rows
    recorded = {one["candidate"] for one in ledger(tmp_path / "out")}
    assert recorded == {"current", "uniform", "drop"}
    assert done.selection.rows["file"]["MMLU likelihood"] == pytest.approx(
        next(one["score"] for one in ledger(tmp_path / "out") if one["candidate"] == "current"), rel=1e-5
    )


def test_the_gradient_by_alphas_is_that_of_the_loss(config):
    """Against finite differences of the model that is built, and through the one merged layer alone."""
    own = with_objective(config("gradient"))
    target = Target.open(own, evaluated=True)
    settings = Settings.of("cpu", "float64")
    alphas = (0.4, 0.6, 0.7)
    evaluation = Evaluation(target.recipe(weights_of(alphas)), target.pool, settings)
    scorer = evaluation.scorer(Divided.load(own, target.base).selection)
    questions = {"MMLU likelihood": list(range(8))}

    class Bare:
        config, slopes = own, None

    search = Bare()
    search.slopes = lambda values, directions, asked, _, weights: scorer.slopes(
        _candidate(values), directions, asked, weights, {}
    )
    found = AlphaSearch(search, target, alphas)._slopes(weights_of(alphas), questions)
    for layer in (1, 2, 3):
        scores = []
        for step in (1e-3, -1e-3):
            weights = weights_of(alphas)
            weights[layer] += step
            weights[0] -= step
            values = target.values(weights)
            scores.append(float(scorer.score(target.unit, [_candidate(values)]).mean("MMLU likelihood")[0]))
        assert float(found[layer]) == pytest.approx((scores[0] - scores[1]) / 2e-3, rel=2e-2, abs=1e-4)


def _candidate(values):
    from olmfast.evaluation.scorer import Candidate

    return Candidate("moved", values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("likelihood", [("likelihood", 1.0, None, False)]),
        ("accuracy + 0.1 * perplexity", [("choice", 1.0, None, False), ("exact", 0.1, None, True)]),
        ("anatomy,virology", [("likelihood", 1.0, ("anatomy", "virology"), False)]),
        ("2*exact_match+anatomy", [("exact_match", 2.0, None, False), ("likelihood", 1.0, ("anatomy",), False)]),
    ],
)
def test_objectives(text, expected):
    terms = Pruning(method="cma", num_layer=1, objective=text).terms
    assert [(t.mode, t.weight, t.subjects, t.of_question) for t in terms] == expected


@pytest.mark.parametrize("objective", ["addition", "exact_match", "accuracy + 0.5 * perplexity"])
def test_every_objective_searches(config, objective):
    done = prune(config("cma", objective=objective, top={"budget": 4}))
    assert all(math.isfinite(score) for score in done.holdout.rows["searched"].values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective": "0 * accuracy"}, "objective: expected such as likelihood"),
        ({"objective": "accuracy - perplexity"}, "objective: expected such as likelihood"),
        ({"objective": "aditon"}, "no subject 'aditon'; did you mean 'addition'?"),
        ({"objective": "accuracy + addition"}, "which of them to hold out cannot be told; name --holdout FILE:MODE"),
        ({"data_dir": None}, "method cma: nothing to search by: expected --data_dir DIR or --dataset FILE:MODE"),
        ({"data_dir": None, "objective": "accuracy"}, "objective: says what of MMLU is searched by, and data_dir"),
        ({"data_dir": "nowhere"}, "nowhere: is no folder of MMLU"),
        ({"holdout": 1}, "prune.holdout"),
        ({"method": "file"}, "method file: alphas_file is missing"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(config, tmp_path, keys, message):
    with pytest.raises(InputError) as caught:
        prune(config(**{"method": "cma", **keys}))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_optuna_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="method bayes: needs optuna, which is not installed; pip install"):
        prune(config("bayes"))


def test_alphas_that_cannot_be_scored_are_an_error(world, tmp_path):
    (tmp_path / "big").mkdir()
    for path in (world / "m").iterdir():
        (tmp_path / "big" / path.name).write_bytes(path.read_bytes())
    held = load_file(tmp_path / "big/model.safetensors")
    for name in [name for name in held if "gate_proj" in name or "up_proj" in name]:
        held[name] *= 1e38  # finite; what they compute is not
    save_file(held, tmp_path / "big/model.safetensors", metadata={"format": "pt"})
    data = {"models": ["big"], "models_dir": ".", "output_dir": "out", "device": "cpu", "budget": 5}
    section = {"method": "cma", "num_layer": 3, "data_dir": str(world / "data"), "ntrain": 1}
    with pytest.raises(Exception, match=r"scored NaN or infinity on MMLU likelihood"):
        prune(parse_config({**data, "prune": section}, "cfg", tmp_path))


def test_the_command_line_searches_resumes_and_scores(world, tmp_path, olmfast, monkeypatch):
    monkeypatch.chdir(world)
    out = str(tmp_path / "out")
    line = ["prune", "--model_path", "m", "-i", 2, "--method", "cma", "--output_dir", out, "--device", "cpu"]
    line += ["--dataset", "sums.json:exact", "--holdout", "more.json:exact_match", "--seed", 3]
    before = tree(tmp_path)
    code, shown, _ = olmfast(*line, "--budget", 6, "--dry-run")
    assert (code, "cma searches their alphas within 6 evaluations" in shown) == (0, True)
    assert "sums.json: 12 questions decide, 0 are held out" in shown
    assert tree(tmp_path) == before
    code, shown, _ = olmfast(*line, "--budget", 6)
    assert (code, "Held-out questions" in shown, "the budget is spent" in shown) == (0, True, True)
    assert olmfast(*line, "--budget", 6)[0] == 2  # exists
    told = json.loads(olmfast(*line, "--budget", 12, "--resume", "--json")[1])
    assert len(told["alphas"]) == 2
    assert olmfast(*line, "--resume", "--overwrite")[0] == 2
    assert "done in one go" in olmfast("prune", "--model_path", "m", "-i", 2, "--method", "drop", "--resume")[2]
    assert olmfast("rebuild", out, str(tmp_path / "again"))[0] == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
