"""What a dataset's items ask: samples that are left out are counted, and nothing that belongs to a question is lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from olmfast.config.datasets import DatasetConfig
from olmfast.errors import InputError
from olmfast.evaluation import encoding
from olmfast.evaluation.conversations import load_conversations
from olmfast.evaluation.encoding import load_datasets
from olmfast.testing import tiny_model, tiny_tokenizer

GOOD = {"prompt": "2+2=", "response": "4"}
ASKED = {"question": "q", "choices": ["a", "b", "c"]}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def model(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def save(folder: Path, items: list[Any], name: str = "data.json") -> Path:
    (folder / name).write_text(json.dumps(items))
    return folder / name


def asked(folder: Path, item: Any, mode: str = "exact", **keys: Any) -> str:
    (found,) = load_conversations(save(folder, [item]), mode, 9, **keys).usable
    return found.messages[-1]["content"]


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"conversations": []}, "without a question"),
        ({"conversations": [{"from": "gpt", "value": "Hi."}]}, "without a question"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "without a question"),
        ({"messages": [user("q"), {**model(None), "refusal": "no"}]}, "without an expected answer"),
        ({"messages": [user("q"), model([])]}, "without an expected answer"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {}}]), model("a")]},
            "with images or other parts that are no text",
        ),
        (
            {"prompt": "q", "completion": "bad", "label": False},
            "with an answer that is labelled unwanted",
        ),
    ],
)
def test_an_item_that_cannot_be_asked_is_left_out_with_a_word(item, why, tmp_path):
    found = load_conversations(save(tmp_path, [item, GOOD]), "exact", 9)
    assert [one.response for one in found.usable] == ["4"]
    assert found.left_out == Counter([why])


@pytest.mark.parametrize("right", [{"answer": None}, {"answer": ""}, {"answer": -1}, {}])
def test_a_choice_without_a_right_option_is_left_out(right, tmp_path):
    found = load_conversations(save(tmp_path, [{**ASKED, **right}, {**ASKED, "answer": 1}]), "choice", 9)
    assert [one.response for one in found.usable] == ["B"]
    assert found.left_out == {"without an expected answer": 1}


@pytest.mark.parametrize(
    "turns",
    [
        [{"input": "1+1=", "output": "2"}, {"input": "2+2=", "output": "4"}],
        [{"human": "1+1=", "assistant": "2"}, {"human": "2+2=", "assistant": "4"}],
        json.dumps([user("1+1="), model("2"), user("2+2="), model("4")]),
        [user("1+1="), model("2"), user([{"type": "input_text", "text": "2+2="}]), model("4")],
    ],
)
def test_turns_come_in_many_shapes(turns, tmp_path):
    (found,) = load_conversations(save(tmp_path, [{"conversation": turns}]), "exact", 9).usable
    assert [one["content"] for one in found.messages] == ["1+1=", "2", "2+2="]
    assert found.response == "4"


def test_what_a_question_is_about_is_asked_with_it(tmp_path):
    assert asked(tmp_path, {"Body": "Ann had 7 eggs.", "Question": "How many?", "Answer": 7.0}) == (
        "Ann had 7 eggs.\n\nHow many?"
    )
    assert asked(tmp_path, {"prompt": "Sum up: It rains.", "article": "It rains.", "response": "Rain."}) == (
        "Sum up: It rains."
    )
    passage = {"passage": "It rains.", "question": "Is it dry?", "options": ["(A)yes", "(B)no"], "label": "B"}
    assert asked(tmp_path, passage, "choice") == "It rains.\n\nIs it dry?\nA. (A)yes\nB. (B)no\nAnswer:"
    assert asked(tmp_path, {"instruction": "Double it.", "input": 4, "output": 8}) == "Double it.\n\n4"
    assert asked(tmp_path, {"instruction": "Sing.", "input": float("nan"), "output": "la"}) == "Sing."
    item = {"question": "q", "answer": "a", "context": {"title": ["t"]}}
    with pytest.raises(InputError, match=r"item 0: context: expected a text, got .*; fields: {prompt: question, "):
        load_conversations(save(tmp_path, [item]), "exact", 9)
    fields = {"prompt": ["context", "task"], "response": "gold"}
    item = {"context": "It rains.", "task": "Is it dry?", "gold": "no", "spare": None}
    assert asked(tmp_path, item, fields=fields) == "It rains.\n\nIs it dry?"


@pytest.mark.parametrize(
    ("answers", "letters"),
    [
        ([1, 2, 3], "ABC"),
        (["3", "1"], "CA"),
        ([1, 2], "BC"),  # nothing says that they do not count from 0
        ([0, 2], "AC"),
        (["(B)", "c", "A."], "BCA"),
        ([1.0, "2.0"], "BC"),
    ],
)
def test_right_options_are_counted_from_what_the_file_says(answers, letters, tmp_path):
    items = [{**ASKED, "answer": answer} for answer in answers]
    assert [one.response for one in load_conversations(save(tmp_path, items), "choice", 9).usable] == list(letters)


def test_an_item_that_is_not_asked_need_not_be_a_question(tmp_path):
    fields = {"prompt": "q", "choices": ["x", "y"], "answer": "label"}
    path = save(tmp_path, [{"q": "q", "x": "a", "y": "b", "label": 1}, {"q": "without the rest"}])
    assert [one.response for one in load_conversations(path, "choice", 1, fields).usable] == ["B"]
    with pytest.raises(InputError, match="item 1: fields: choices: no key 'x'"):
        load_conversations(path, "choice", 2, fields)


def test_a_number_may_name_a_label_and_null_is_no_option(tmp_path):
    item = {"question": "q", "options": {"1": "x", "2": "y", "3": "z", "4": None}, "answer": 2}
    (found,) = load_conversations(save(tmp_path, [item]), "choice", 9).usable
    assert (found.response, found.options) == ("B", ("A", "B", "C"))


def test_the_right_option_may_not_be_the_same_one_of_all_items():
    fields = {"prompt": "Question", "choices": ["Correct Answer", "Incorrect Answer"], "answer": "Correct Answer"}
    with pytest.raises(ValueError, match="'Correct Answer' is one of choices, so that the right letter would"):
        DatasetConfig(mode="choice", fields=fields)


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}\n{% endfor %}"
)


def dataset(folder: Path, items: list[Any], template: str) -> encoding.Dataset:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    save(folder, items)
    return load_datasets(folder, {"data.json": DatasetConfig(mode="exact")}, tokenizer, 400)["data.json"]


def test_turns_that_the_chat_template_refuses_are_left_out(tmp_path):
    twice = {"messages": [user("q"), user("r"), model("a")]}
    found = dataset(tmp_path, [twice, GOOD], ALTERNATING)
    assert ([one.number for one in found.samples], found.reasons) == ([1], {"refused by the chat template": 1})
    with pytest.raises(InputError, match=r"item 0: the chat template refuses it: roles must alternate"):
        dataset(tmp_path, [twice, twice], ALTERNATING)


def prompt_of(found: encoding.Dataset) -> str:
    return tiny_tokenizer().decode(found.samples[0].prompt)


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(tmp_path):
    template = "{%- set day = strftime_now('%d %b %Y, %A') %}{{ day }}:{{ messages[0].content }}"

    assert prompt_of(dataset(tmp_path, [GOOD], template)) == "26 Jul 2024, Friday:2+2="


def test_a_template_that_wants_lists_of_parts_gets_them(tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
    )
    assert prompt_of(dataset(tmp_path, [GOOD], template)) == "user:2+2=;"
    with pytest.raises(InputError, match="the chat template leaves the question out; use template: chatml, or raw"):
        dataset(tmp_path, [GOOD], "{% for m in messages %}{{ m['role'] }}{% endfor %}")


def test_evaluate_says_what_it_leaves_out(tmp_path, olmfast):
    tiny_model(tmp_path / "m", "llama", 1)
    save(tmp_path, [GOOD, {"prompt": "q", "response": ""}])
    dataset = f"{tmp_path}/data.json:exact"
    code, out, err = olmfast("evaluate", tmp_path / "m", "--dataset", dataset)
    assert (code, "n=1" in out) == (0, True), err
    assert f"{tmp_path}/data.json: 1 samples without an expected answer are left out" in err
