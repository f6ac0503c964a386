"""What is scored, token by token, and that scores follow the formulas, computed here in float64 on their own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from olmfast.config.datasets import DatasetConfig, Mode
from olmfast.errors import InputError
from olmfast.evaluation import metrics
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.encoding import Dataset, load_datasets, make_batches
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.testing import sums, tiny_model, tiny_tokenizer, write_dataset
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

PAIRS = [*sums(4, 5), ("Say x", "x"), ("Name the largest number below ten.", "nine")]


def encode(folder: Path, pairs: list[tuple[str, str]], context: int = 128, template=None, **keys) -> Dataset:
    write_dataset(folder / "set.json", pairs)
    tokenizer = tiny_tokenizer() if template is None else tiny_tokenizer(template)
    entries = {"set.json": DatasetConfig(**{"mode": "exact", **keys})}
    return load_datasets(folder, entries, tokenizer, context)["set.json"]


def tokens(ids: tuple[int, ...]) -> list[str]:
    return tiny_tokenizer().convert_ids_to_tokens(list(ids))


def test_a_sample_is_the_templates_prompt_and_the_answers_text_without_end_of_turn(tmp_path):
    (sample,) = encode(tmp_path, [("2+3=", "5!")]).samples
    assert tokens(sample.prompt) == [
        *("<|im_start|>", *"user", "\n", *"2+3=", "<|im_end|>", "\n"),
        *("<|im_start|>", *"assistant", "\n"),
    ]
    assert tokens(sample.response) == ["5", "!"]


def test_a_one_token_answer_is_one_scored_token(tmp_path):
    (sample,) = encode(tmp_path, [("2+3=", "5")]).samples
    assert tokens(sample.response) == ["5"]


def test_include_eos_adds_the_end_of_turn(tmp_path):
    (sample,) = encode(tmp_path, [("2+3=", "5")], include_eos=True).samples
    assert tokens(sample.response) == ["5", "<|im_end|>"]


def test_think_false_appends_an_empty_thinking_block_to_the_prompt(tmp_path):
    (sample,) = encode(tmp_path, [("2+3=", "5")], think=False).samples
    assert "".join(tokens(sample.prompt)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokens(sample.response) == ["5"]


def test_think_false_closes_a_block_that_the_template_opened(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    (sample,) = encode(tmp_path, [("2+3=", "5")], think=False, template=template).samples
    assert "".join(tokens(sample.prompt)) == "2+3=<think>\n\n</think>\n\n"


def test_a_sample_longer_than_the_context_is_left_out_and_counted(tmp_path):
    short, long = ("2+3=", "5"), ("x" * 90, "5")
    dataset = encode(tmp_path, [short, long, short], context=64)
    assert (len(dataset.samples), dataset.left_out) == (2, 1)
    length = len(dataset.samples[0].prompt) + 1
    assert encode(tmp_path, [short], context=length).left_out == 0  # exactly as long as the context fits
    with pytest.raises(InputError, match="every sample is longer than the model's context"):
        encode(tmp_path, [short], context=length - 1)


def test_without_a_chat_template_chatml_is_used_and_raw_is_the_text_alone(tmp_path):
    plain = encode(tmp_path, [("Hi", "ho")], template="").samples[0]
    assert "".join(tokens(plain.prompt)) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    write_dataset(tmp_path / "raw.json", [("Hi", "ho")])
    entry = {"raw.json": DatasetConfig(mode="exact", template="raw")}
    sample = load_datasets(tmp_path, entry, tiny_tokenizer(), 64)["raw.json"].samples[0]
    assert tokens(sample.prompt) == ["H", "i"]


def test_the_begin_token_stands_once_at_the_start(tmp_path):
    from tokenizers.processors import TemplateProcessing

    write_dataset(tmp_path / "set.json", [("Hi", "ho")])
    for template in ("raw", "chatml", "tokenizer"):
        tokenizer = tiny_tokenizer("<s>{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 4)]
        )
        entry = {"set.json": DatasetConfig(mode="exact", template=template)}
        sample = load_datasets(tmp_path, entry, tokenizer, 64)["set.json"].samples[0]
        assert sample.prompt[0] == 1, template
        assert sample.prompt.count(1) == 1, template
        assert sample.prompt[-1] != 4, template
        assert 1 not in sample.response, template


def test_a_template_that_trims_and_knows_no_system_role_is_served(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    items = [
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi "},
            {"role": "assistant", "content": " ho \n"},
        ]}
    ]
    (tmp_path / "set.json").write_text(json.dumps(items))
    entry = {"set.json": DatasetConfig(mode="exact")}
    sample = load_datasets(tmp_path, entry, tiny_tokenizer(template), 64)["set.json"].samples[0]
    assert "".join(tokens(sample.prompt)) == "<user>Be brief.\n\nHi<assistant>"
    assert "".join(tokens(sample.response)) == "ho"


# --- The metrics, from their formulas, in float64 and sample by sample ---------------------------------------


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("donor")
    tiny_model(folder / "donor", "llama", 1)
    return folder


def scorer_for(folder: Path, dataset: Dataset, dtype=torch.float32, batch_tokens: int = 4096) -> SequentialScorer:
    pool = Pool.open(["donor"], folder, folder)
    model = WorkingModel(whole("donor", pool.tensors), Sources(pool, folder), torch.device("cpu"), dtype)
    return SequentialScorer(model, {"set.json": dataset}, tiny_tokenizer(), [4], batch_tokens)


def scores_of(scorer: SequentialScorer) -> Scores:
    unit = scorer.model.sources.pool.architecture.model_unit(())
    return scorer.score(unit, [Candidate("now")])


def score(scorer: SequentialScorer) -> np.ndarray:
    return scores_of(scorer).samples["set.json"][0].numpy()


def softmax64(logits: torch.Tensor) -> np.ndarray:
    values = logits.detach().double().numpy()
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def free_running(model, prompt: tuple[int, ...], n: int) -> tuple[list[int], list[float]]:
    """n greedy tokens and their probabilities: one full forward per token, no cache, no batch."""
    ids, chosen, probabilities = list(prompt), [], []
    for _ in range(n):
        p = softmax64(model(torch.tensor([ids])).logits[0, -1])
        chosen.append(int(p.argmax()))
        probabilities.append(float(p.max()))
        ids.append(chosen[-1])
    return chosen, probabilities


def reference(model, mode: str, sample, strict: bool = False) -> float:
    n = len(sample.response)
    if mode == "exact_match":
        chosen, m = free_running(model, sample.prompt, n)
        right = [a == b for a, b in zip(chosen, sample.response, strict=True)]
        if strict and not all(right):
            return 1.0
        return sum(1 - x if ok else 1 + x for ok, x in zip(right, m, strict=True)) / n
    logits = model(torch.tensor([sample.prompt + sample.response])).logits[0]
    p = softmax64(logits[len(sample.prompt) - 1 : -1])
    c = [float(p[t, token]) for t, token in enumerate(sample.response)]
    if mode == "choice":
        return float(max(sample.options, key=lambda option: p[0, option]) != sample.response[0])
    if mode == "bigram_loss":
        s = [1.0 if c[t] < p[t].max() else 1 - float(p[t].max()) for t in range(n)]
        return 2 * s[0] if n == 1 else sum(a + b for a, b in itertools.pairwise(s)) / (n - 1)
    ce = [-math.log(x) for x in c]
    if mode == "exact":
        return sum(ce) / n
    if mode == "perplexity":
        return math.exp(sum(ce) / n)
    pairs = [2 * ce[0]] if n == 1 else [a + b for a, b in itertools.pairwise(ce)]
    return math.exp(sum(pairs) / len(pairs))


def with_own_answers(model, folder: Path) -> list[tuple[str, str]]:
    """Questions of which some are answered as the model does, so that right tokens are seen as well as wrong ones."""
    asked = encode(folder, PAIRS)
    pairs = list(PAIRS)
    for index in (0, 1, 4):
        own, _ = free_running(model, asked.samples[index].prompt, 3)
        text = tiny_tokenizer().decode(own)
        if text.strip() == text and text:
            pairs[index] = (PAIRS[index][0], text)
    return pairs


@pytest.mark.parametrize("mode", ["exact_match", "bigram_loss", "exact", "bigram", "perplexity"])
def test_scores_follow_the_formula(mode, donor, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(donor / "donor", dtype=torch.float64)
    dataset = encode(tmp_path, with_own_answers(model, tmp_path), mode=mode)
    wanted = [reference(model, mode, sample) for sample in dataset.samples]
    np.testing.assert_allclose(score(scorer_for(donor, dataset, torch.float64)), wanted, rtol=1e-9)
    found = score(scorer_for(donor, dataset))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-4)


def is_right(model, mode: str, sample, strict: bool = False) -> bool:
    if mode == "exact_match" and not strict:
        return free_running(model, sample.prompt, len(sample.response))[0] == list(sample.response)
    logits = model(torch.tensor([sample.prompt + sample.response])).logits[0]
    tops = softmax64(logits[len(sample.prompt) - 1 : -1]).argmax(-1)
    return tuple(tops) == sample.response


@pytest.mark.parametrize("mode", [*metrics.TEACHER_FORCED, "exact_match", "strict"])
def test_an_answer_is_right_when_every_token_is_the_expected_one(mode, donor, tmp_path):
    keys = {"mode": mode} if mode != "strict" else {"mode": "exact_match", "strict": True}
    model = AutoModelForCausalLM.from_pretrained(donor / "donor", dtype=torch.float64)
    dataset = encode(tmp_path, with_own_answers(model, tmp_path), **keys)
    wanted = [is_right(model, keys["mode"], sample, "strict" in keys) for sample in dataset.samples]
    assert 0 < sum(wanted) < len(wanted)
    scores = scores_of(scorer_for(donor, dataset, torch.float64))
    assert scores.right["set.json"][0].tolist() == wanted
    assert float(scores.accuracy("set.json")) == pytest.approx(sum(wanted) / len(wanted))


def test_a_right_choice_is_the_one_that_costs_nothing_and_a_written_text_is_neither_right_nor_wrong(donor, tmp_path):
    items = [{"question": f"Pick {i}", "choices": ["w", "x", "y", "z"], "answer": i % 4} for i in range(8)]
    (tmp_path / "set.json").write_text(json.dumps(items))
    dataset = load_datasets(tmp_path, {"set.json": DatasetConfig(mode="choice")}, tiny_tokenizer(), 128)["set.json"]
    scores = scores_of(scorer_for(donor, dataset, torch.float64))
    assert scores.right["set.json"].tolist() == (scores.samples["set.json"] == 0).tolist()
    assert 0 < int(scores.right["set.json"].sum()) < len(items)
    for mode in metrics.GENERATIVE:
        scores = scores_of(scorer_for(donor, encode(tmp_path, PAIRS, mode=mode, max_new_tokens=4)))
        assert scores.right == {}
        assert scores.accuracy("set.json") is None


def test_strict_exact_match_is_one_once_a_token_is_wrong(donor, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(donor / "donor", dtype=torch.float64)
    asked = encode(tmp_path, [("2+2=", "4"), ("Hi", "ho")])
    own = tiny_tokenizer().decode(free_running(model, asked.samples[0].prompt, 2)[0])
    dataset = encode(tmp_path, [("2+2=", own), ("Hi", "ho")], mode="exact_match", strict=True)
    wanted = [reference(model, "exact_match", sample, strict=True) for sample in dataset.samples]
    assert wanted[0] < 1.0 == wanted[1]
    np.testing.assert_allclose(score(scorer_for(donor, dataset, torch.float64)), wanted, rtol=1e-9)


def test_choice_is_the_error_rate_of_the_likeliest_letter(donor, tmp_path):
    items = [
        {"question": f"Pick {letter}", "choices": ["w", "x", "y", "z"], "answer": index}
        for index, letter in enumerate("ABCD")
    ]
    (tmp_path / "set.json").write_text(json.dumps(items))
    entries = {"set.json": DatasetConfig(mode="choice")}
    dataset = load_datasets(tmp_path, entries, tiny_tokenizer(), 128)["set.json"]
    assert tokens(dataset.samples[2].options) == list("ABCD")
    assert tokens(dataset.samples[2].response) == ["C"]
    model = AutoModelForCausalLM.from_pretrained(donor / "donor", dtype=torch.float64)
    wanted = [reference(model, "choice", sample) for sample in dataset.samples]
    assert 0 < sum(wanted) <= 4
    assert score(scorer_for(donor, dataset, torch.float64)).tolist() == wanted


@pytest.mark.parametrize(("mode", "formula"), [("diversity", metrics.diversity), ("quality", metrics.quality)])
def test_generative_modes_score_the_greedy_text_up_to_the_end_token(mode, formula, donor, tmp_path):
    dataset = encode(tmp_path, PAIRS, mode=mode, max_new_tokens=12)
    scorer = scorer_for(donor, dataset, torch.float64)
    model = AutoModelForCausalLM.from_pretrained(donor / "donor", dtype=torch.float64)
    wanted = []
    for sample in dataset.samples:
        own, _ = free_running(model, sample.prompt, 12)
        own = own[: own.index(4)] if 4 in own else own
        wanted.append(formula(tiny_tokenizer().decode(own, skip_special_tokens=True), dataset.config.forbid))
    assert score(scorer).tolist() == pytest.approx(wanted)


def test_every_mode_is_a_metric_and_every_metric_a_mode():
    tables = [metrics.TEACHER_FORCED, metrics.GENERATIVE, metrics.CHOICES, {"exact_match"}]
    assert sorted(get_args(Mode)) == sorted(name for table in tables for name in table)


def test_a_metric_is_one_function_and_its_name(donor, tmp_path, monkeypatch):
    """One of a generated text asks nothing of the response: a sample whose response is too long is not left out."""
    monkeypatch.setitem(metrics.GENERATIVE, "length", lambda text, _: float(len(text)))
    monkeypatch.setitem(metrics.TEACHER_FORCED, "worst", lambda logits: logits.cross_entropy.max())
    pairs = [("2+3=", "5"), ("2+3=", "5" * 200)]
    write_dataset(tmp_path / "set.json", pairs)
    for mode, n_fitting in (("length", 2), ("worst", 1)):
        entry = DatasetConfig(mode="exact", max_new_tokens=6).model_copy(update={"mode": mode})
        dataset = load_datasets(tmp_path, {"set.json": entry}, tiny_tokenizer(), 128)["set.json"]
        assert (len(dataset.samples), dataset.left_out) == (n_fitting, 2 - n_fitting)
        plain = scorer_for(donor, dataset)
        batched = BatchedScorer(plain.model, plain.datasets, plain.tokenizer, plain.stop_tokens, 4096)
        unit = plain.model.sources.pool.architecture.boundary_unit(tuple(plain.model.recipe.tensors))
        fast = batched.score(unit, [Candidate("now")])
        assert fast.samples["set.json"][0].tolist() == pytest.approx(score(plain).tolist(), rel=1e-4)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_model_whose_logits_are_no_numbers_has_no_score_in_any_mode(mode, donor, tmp_path):
    keys = {"question": "No. 1", "choices": ["a", "b"], "answer": 0} if mode in metrics.CHOICES else None
    dataset = encode(tmp_path, PAIRS, mode=mode if keys is None else "exact", max_new_tokens=4, strict=True)
    if keys:
        (tmp_path / "set.json").write_text(json.dumps([keys]))
        dataset = load_datasets(tmp_path, {"set.json": DatasetConfig(mode=mode)}, tiny_tokenizer(), 128)["set.json"]
    scorer = scorer_for(donor, dataset)
    scorer.model.module.model.norm.weight.fill_(torch.nan)
    assert np.isnan(score(scorer)).all()
    assert not any(bool(right.any()) for right in scores_of(scorer).right.values())


def test_one_sample_without_a_score_leaves_the_candidate_without_a_mean():
    samples, evaluated = torch.tensor([[1.0, 3.0], [1.0, torch.nan], [1.0, torch.nan]]), torch.ones(3, 2).bool()
    evaluated[2, 1] = False
    mean = Scores({"a": samples}, {"a": evaluated}, {"a": torch.zeros_like(evaluated)}).mean("a")
    np.testing.assert_equal(mean.numpy(), [2.0, np.nan, 1.0])


def test_what_is_known_of_scores_stays_with_them_whatever_is_done_to_them():
    def table(n: int) -> Scores:
        generator = torch.Generator().manual_seed(n)
        flags = [{name: torch.rand(n, 4, generator=generator) < 0.5 for name in names} for names in ("ab", "a")]
        samples = {name: torch.rand(n, 4, generator=generator) for name in "ab"}
        return Scores(samples, {name: torch.ones(n, 4).bool() for name in "ab"}, *flags)

    one, two = table(3), table(2)
    assert one.rows([2, 0]).right["a"].tolist() == one.right["a"][[2, 0]].tolist()
    assert one.followed_by(two).right["a"].tolist() == [*one.right["a"].tolist(), *two.right["a"].tolist()]
    assert one.only(["b"]).right == {}
    assert list(one.only(["a"]).right) == ["a"]
    assert one.at({"a": [3, 1]}).right["a"].tolist() == one.right["a"][:, [3, 1]].tolist()
    assert Scores.joined([one.only(["a"]), one.only(["b"])]).right["a"] is one.right["a"]
    limited = one.limited_to({"a": [1], "b": [0, 2]})
    assert limited.right["a"][:, 1].tolist() == one.right["a"][:, 1].tolist()
    assert not bool(limited.right["a"][:, [0, 2, 3]].any())
    filled = limited.filled_by(one)
    assert all(torch.equal(part["a"], other["a"]) for part, other in zip(filled.parts, one.parts, strict=True))
    assert one.spread([4, 1, 0], 5).right["a"][[4, 1, 0]].tolist() == one.right["a"].tolist()
    read = Scores.from_json(json.loads(json.dumps(one.to_json())))
    for part, other in zip(read.parts, one.parts, strict=True):
        assert {name: x.tolist() for name, x in part.items()} == {name: x.tolist() for name, x in other.items()}
    known = limited.rows([0])
    two.put(1, known)
    assert two.right["a"][1].tolist() == known.right["a"][0].tolist()


def test_text_formulas():
    assert metrics.diversity("a b a c", None) == 4096 / 3
    assert metrics.diversity("", None) == 4096
    assert metrics.diversity("a 字 b", "[\u4e00-\u9fff]") == 4096
    assert metrics.diversity("a 字 b", None) == 4096 / 3
    words = [f"w{i % 80}" for i in range(160)]
    assert metrics.quality(" ".join(words), None) == pytest.approx(1 / (160 / 2048 * 0.5**2))
    assert metrics.quality(" ".join(words[:99]), None) == 2048


@pytest.mark.parametrize("mode", ["exact_match", "bigram_loss", "diversity"])
def test_batching_changes_no_score(mode, donor, tmp_path):
    dataset = encode(tmp_path, PAIRS, mode=mode, max_new_tokens=8)
    alone = score(scorer_for(donor, dataset, torch.float64, batch_tokens=1))
    np.testing.assert_allclose(score(scorer_for(donor, dataset, torch.float64)), alone, rtol=1e-12)


def test_a_subset_of_samples_is_scored_alone_and_the_rest_marked(donor, tmp_path):
    dataset = encode(tmp_path, PAIRS)
    scorer = scorer_for(donor, dataset, torch.float64)
    unit = scorer.model.sources.pool.architecture.model_unit(())
    part = scorer.score(unit, [Candidate("now")], ["set.json"], {"set.json": [1, 3]})
    assert part.evaluated["set.json"][0].tolist() == [i in (1, 3) for i in range(len(PAIRS))]
    np.testing.assert_allclose(part.samples["set.json"][0][[1, 3]].numpy(), score(scorer)[[1, 3]], rtol=1e-12)
    assert bool(part.samples["set.json"][0][[0, 2]].isnan().all())


def test_batches_hold_every_index_once_within_the_limit():
    lengths = [3, 9, 1, 9, 4, 20]
    batches = list(make_batches(lengths, 18))
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(b) * max(lengths[i] for i in b) <= 18 or len(b) == 1 for b in batches)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 60), st.integers(1, 40))
def test_no_other_way_to_divide_inputs_by_length_costs_less(lengths, limit, overhead):
    def cost(batches):
        return sum(max(batch) * len(batch) + overhead for batch in batches)

    ordered = sorted(lengths, reverse=True)
    ways = []
    for cuts in itertools.product([False, True], repeat=max(len(ordered) - 1, 0)):
        ends = [*(i + 1 for i, cut in enumerate(cuts) if cut), len(ordered)]
        way = [ordered[begin:end] for begin, end in itertools.pairwise([0, *ends]) if end > begin]
        if all(len(batch) == 1 or max(batch) * len(batch) <= limit for batch in way):
            ways.append(cost(way))
    batches = [[lengths[index] for index in batch] for batch in make_batches(lengths, limit, overhead)]
    assert [length for batch in batches for length in batch] == ordered
    assert cost(batches) == min(ways)
