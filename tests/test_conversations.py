"""Dataset files in the formats people have, and the messages for files that are none of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.config.datasets import DatasetConfig
from olmfast.errors import InputError
from olmfast.evaluation.conversations import load_conversations
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.items import Conversation
from olmfast.testing import tiny_tokenizer

QUESTION = ({"role": "user", "content": "2+2="},)
ROW = "What is it?,None,TRUE,2,3.0,B\n"


def save(folder: Path, data: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def load(folder: Path, data: Any, mode: str = "exact", name: str = "data.json") -> list[Conversation]:
    return load_conversations(save(folder, data, name), mode, 200).usable


def refusal(folder: Path, data: Any, mode: str = "exact", name: str = "data.json") -> str:
    """The message these contents are refused with; it begins with the file."""
    with pytest.raises(InputError) as caught:
        load(folder, data, mode, name)
    assert str(caught.value).startswith(str(folder / name))
    return str(caught.value).removeprefix(str(folder / name))


@pytest.fixture
def mmlu(tmp_path):
    """A folder as MMLU ships it: worked examples in dev/, questions in test/."""
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
    save(tmp_path / "dev", '"1, or\n2?",a,b,c,d,A\nSky?,red,blue,None,x,B\n', "college_physics_dev.csv")
    return save(tmp_path / "test", ROW + "Again?,w,x,y,z,D\n", "college_physics_test.csv")


@pytest.mark.parametrize(
    "item",
    [
        {"conversation": [{"from": "human", "value": "2+2="}, {"from": "gpt", "value": "4"}], "id": 7},
        {"conversations": [{"from": "human", "value": "2+2="}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]},
        {"prompt": "2+2=", "response": "4", "source": "a book"},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": [{"role": "user", "content": "2+2="}], "completion": [{"role": "assistant", "content": "4"}]},
        {"instruction": "2+2=", "input": "", "output": "4"},
        {"question": "2+2=", "answer": "Two and two are <<2+2=4>>.\n#### 4"},
        {"problem": "2+2=", "solution": 4},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2="}]}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_every_format_says_the_same(tmp_path, item):
    expected = [Conversation(QUESTION, "4")]
    assert load(tmp_path, [item]) == expected
    assert load(tmp_path, item) == expected
    assert load(tmp_path, json.dumps(item) + "\n\n" + json.dumps(item) + "\n") == expected * 2


def test_what_an_instruction_is_about_follows_it_and_a_system_prompt_comes_first(tmp_path):
    item = {"system": "Be brief.", "instruction": "Add.", "input": "2+2", "output": "4"}
    (conversation,) = load(tmp_path, [item])
    told = [(message["role"], message["content"]) for message in conversation.messages]
    assert told == [("system", "Be brief."), ("user", "Add.\n\n2+2")]


TURNS = [{"from": "Human", "value": "2+2="}, {"from": "Assistant", "value": "4"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("item", "before"),
    [
        ({"conversations": TURNS, "system": "Be brief.", "tools": ""}, [SYSTEM]),
        ({"messages": TURNS, "system_prompt": None}, []),
        ({"conversation": TURNS, "system": "Be brief."}, []),
        ({"messages": [{"role": "System", "content": "Be brief."}, *TURNS], "system": "Be long."}, [SYSTEM]),
        (
            {"instruction": "2+2=", "output": "4", "history": [["1+1=", "2"]], "system": "Be brief."},
            [SYSTEM, {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
        ),
        ({"instruction": "2+2=", "output": "4", "history": []}, []),
    ],
)
def test_what_is_given_beside_the_turns_comes_before_them(tmp_path, item, before):
    assert load(tmp_path, [item]) == [Conversation((*before, *QUESTION), "4")]


@pytest.mark.parametrize(
    ("data", "mode", "texts"),
    [
        ([{"prompt": "2+2=", "response": "4"}, {"prompt": "?"}, {"system": "Add.", "prompt": "1+1="}], "exact", None),
        ([{"question": "2+2=", "choices": ["3", "4"], "answer": 1}], "choice", ["2+2=\nA. 3\nB. 4\nAnswer:"]),
    ],
)
def test_the_questions_of_any_file_are_texts_too(tmp_path, data, mode, texts):
    texts = texts or ["2+2=", "?", "Add.\n\n1+1="]
    found = load_conversations(save(tmp_path, data), mode, 200, of_question=True).usable
    assert found == [Conversation((), text) for text in texts]
    with pytest.raises(ValueError, match="of_question: mode diversity is of answers"):
        DatasetConfig(mode="diversity", of_question=True)
    entry = DatasetConfig(mode="exact").model_copy(update={"mode": mode, "of_question": True})
    dataset = load_datasets(tmp_path, {"data.json": entry}, tiny_tokenizer(), 99)["data.json"]
    long = [text for text in texts if len(text) > 1]
    assert len(dataset.samples) == len(long)
    assert dataset.reasons.get("of one token", 0) == len(texts) - len(long)
    tokens = tiny_tokenizer()(long[0])["input_ids"]
    assert [*dataset.samples[0].prompt, *dataset.samples[0].response] == tokens


@pytest.mark.parametrize(
    "options",
    [
        {"choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {"choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"},
        {"choices": ["3", "4"], "answer": "4"},
        {"options": ["3", "4"], "label": "1"},
        {"options": {"A": "3", "B": "4"}, "answer": "4", "answer_idx": "B"},
        {"options": {"a": "3", "b": "4"}, "answer": "b"},
        {"choices": [{"text": "3", "label": "1"}, {"text": "4", "label": "2"}], "answerKey": "2"},
        {
            "question": {"stem": "2+2=", "choices": [{"text": "3", "label": "A"}, {"text": "4", "label": "B"}]},
            "answer": "B",
        },
        {"question_stem": "2+2=", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {"options": ["3", "4"], "correct": ["B"]},
        {"options": ["3", "4"], "correct_option": 1},
        {"target_scores": {"4": 1, "3": 0}},
        {"mc1_targets": {"choices": ["4", "3"], "labels": [1, 0]}},
        {"multiple_choice_targets": ["4", "3"], "multiple_choice_scores": [0.5, -1]},
        {"target_scores": {"4": 1, "3": 0, "5": None}},
    ],
)
def test_the_right_option_is_named_by_label_text_index_or_score(tmp_path, options):
    asked = {} if "question_stem" in options else {"question": "2+2="}
    (conversation,) = load(tmp_path, [{**asked, **options}], "choice")
    assert conversation.messages[-1]["content"] == "2+2=\nA. 3\nB. 4\nAnswer:"
    assert conversation.response == "B"


def test_a_mapping_names_the_keys_of_any_other_form(tmp_path):
    fields = {"prompt": "task", "response": "gold", "system": "role"}
    item = {"role": "Count.", "task": "2+2=", "gold": 4, "prompt": "not this"}
    (conversation,) = load_conversations(save(tmp_path, [item]), "exact", 5, fields).usable
    assert [m["content"] for m in conversation.messages] == ["Count.", "2+2="]
    assert conversation.response == "4"
    table = save(tmp_path, 'gold,task\n4,"2+2=, please"\n', "table.csv")
    (conversation,) = load_conversations(table, "exact", 5, {"prompt": "task", "response": "gold"}).usable
    assert (conversation.messages[0]["content"], conversation.response) == ("2+2=, please", "4")
    fields = {"prompt": "ctx", "choices": "endings", "answer": "label"}
    item = {"ctx": "He", "endings": ["ran", "sat"], "label": "0"}
    (conversation,) = load_conversations(save(tmp_path, [item]), "choice", 5, fields).usable
    assert conversation.response == "A"
    with pytest.raises(InputError, match="item 0: fields: prompt: no key 'ctx', got 'task'"):
        load_conversations(save(tmp_path, [{"task": "a"}]), "exact", 5, {"prompt": "ctx", "response": "b"})


NO_ANSWERS = [
    {"conversation": [{"from": "human", "value": "Talk."}, {"from": "gpt", "value": ""}]},
    {"conversation": [{"from": "human", "value": "Talk."}]},
    {"prompt": "Talk.", "response": None},
    {"prompt": "Talk."},
]


@pytest.mark.parametrize("item", NO_ANSWERS)
def test_an_item_without_an_answer_is_right_for_modes_that_need_none_and_left_out_elsewhere(tmp_path, item):
    answered = {"prompt": "2+2=", "response": "4"}
    path = save(tmp_path, [item, answered])
    for mode in ("diversity", "quality"):
        found = load_conversations(path, mode, 200)
        assert found.usable[0] == Conversation(({"role": "user", "content": "Talk."},), "")
        assert not found.left_out
        (dataset,) = load_datasets(tmp_path, {"data.json": DatasetConfig(mode=mode)}, tiny_tokenizer(), 400).values()
        assert [len(sample.response) > 0 for sample in dataset.samples] == [False, True]
    found = load_conversations(path, "exact", 200)
    assert (found.usable, found.left_out) == ([Conversation(QUESTION, "4")], {"without an expected answer": 1})


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "4"}],
        [{"from": "function_call", "value": "add(2, 2)"}, {"from": "observation", "value": "4"}],
    ],
)
def test_an_item_with_tool_calls_is_left_out_with_a_word(tmp_path, turns):
    question = {"role": "user", "content": "2+2="}
    called = {"messages": [question, *turns, {"role": "assistant", "content": "4"}]}
    items = [called, {"prompt": "2+2=", "response": "4"}]
    found = load_conversations(save(tmp_path, items), "exact", 200)
    assert (found.usable, found.left_out) == ([Conversation(QUESTION, "4")], {"with tool calls": 1})


def test_roles_have_the_names_of_both_worlds(tmp_path):
    turns = [("system", "S"), ("human", "H"), ("gpt", "G"), ("user", "U"), ("assistant", "A")]
    (conversation,) = load(tmp_path, [{"conversation": [{"from": role, "value": text} for role, text in turns]}])
    roles = [(message["role"], message["content"]) for message in conversation.messages]
    assert roles == [("system", "S"), ("user", "H"), ("assistant", "G"), ("user", "U")]
    assert conversation.response == "A"


def test_only_the_first_conversations_are_read(tmp_path):
    items = [{"prompt": str(n), "response": "x"} for n in range(5)] + ["beyond the limit, so never read"]
    path = save(tmp_path, items)
    assert [c.messages[0]["content"] for c in load_conversations(path, "exact", 3).usable] == ["0", "1", "2"]


def test_text_stays_as_it_is(tmp_path):
    text = " Grüße, 世界 \u2028 next\n\tline "
    assert load(tmp_path, [{"prompt": text, "response": text}]) == [
        Conversation(({"role": "user", "content": text},), text)
    ]


def test_json_lines_may_hold_line_separators_inside_a_string(tmp_path):
    lines = '{"prompt": "a\u2028b\u0085c", "response": "1"}\r\n{"prompt": "d", "response": "2"}'
    assert [c.messages[0]["content"] for c in load(tmp_path, lines)] == ["a\u2028b\u0085c", "d"]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    assert load(tmp_path, '\ufeff[{"prompt": "2+2=", "response": "4"}]') == [Conversation(QUESTION, "4")]


@pytest.mark.parametrize("answer", [1, "B"])
@pytest.mark.parametrize(
    "asked",
    [
        {"question": "2+2="},
        {"prompt": "2+2=", "response": "anything"},
        {"conversation": [{"from": "human", "value": "2+2="}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_a_choice_lists_its_options_and_expects_the_letter(tmp_path, asked, answer):
    (conversation,) = load(tmp_path, [{**asked, "choices": ["3", 4, None], "answer": answer}], "choice")
    assert conversation.messages[-1]["content"] == "2+2=\nA. 3\nB. 4\nC. None\nAnswer:"
    assert (conversation.response, conversation.options) == ("B", ("A", "B", "C"))


def test_mmlu_asks_after_the_worked_examples_of_the_subject(mmlu):
    first, second = load_conversations(mmlu, "choice", 200).usable
    assert first.messages == (
        {
            "role": "user",
            "content": "The following are multiple choice questions (with answers) about college physics.\n\n"
            "1, or\n2?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"
            "Sky?\nA. red\nB. blue\nC. None\nD. x\nAnswer: B\n\n"
            "What is it?\nA. None\nB. TRUE\nC. 2\nD. 3.0\nAnswer:",
        },
    )
    assert (first.response, second.response, first.options) == ("B", "D", ("A", "B", "C", "D"))


def test_mmlu_dev_questions_have_no_examples(mmlu):
    dev = mmlu.parent.parent / "dev" / "college_physics_dev.csv"
    assert [c.messages[0]["content"].count("Answer:") for c in load_conversations(dev, "choice", 200).usable] == [1, 1]


def test_mmlu_letters_are_scored_as_the_prompt_asks_for_them(mmlu):
    tokenizer = tiny_tokenizer()
    entries = {"test/college_physics_test.csv": DatasetConfig(mode="choice")}
    (dataset,) = load_datasets(mmlu.parent.parent, entries, tokenizer, 4096).values()
    for sample, letter in zip(dataset.samples, "BD", strict=True):
        prompt = tokenizer.decode(sample.prompt)
        assert prompt.startswith("The following are")
        assert prompt.endswith("Answer: ")  # this tokenizer makes the space before the letter a token of its own
        assert tokenizer.decode(sample.options) == "ABCD"
        assert tokenizer.decode(sample.response) == letter
    read = {"test/college_physics_test.csv": DatasetConfig(mode="exact")}  # the letter is read, no option is picked
    (others,) = load_datasets(mmlu.parent.parent, read, tokenizer, 4096).values()
    assert [(own.prompt, own.response, own.options) for own in others.samples] == [
        (own.prompt, own.response, ()) for own in dataset.samples
    ]


def test_a_change_of_mmlus_worked_examples_is_a_change_of_the_dataset(mmlu):
    def digest() -> str:
        entries = {"test/college_physics_test.csv": DatasetConfig(mode="perplexity")}
        (dataset,) = load_datasets(mmlu.parent.parent, entries, tiny_tokenizer(), 4096).values()
        return dataset.digest

    before = digest()
    save(mmlu.parent.parent / "dev", ROW, "college_physics_dev.csv")
    assert digest() != before


TURN = {"from": "human", "value": "hello"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", ": is empty"),
        ("hello", ": neither JSON nor JSON Lines: "),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"', ":2: not JSON: "),
        ("[" * 3000, ": neither JSON nor JSON Lines: "),
        ("1" * 5000, ": neither JSON nor JSON Lines: "),
        ([], ": expected a list of conversations, got an empty list"),
        ("3", ": expected a list of conversations, got 3"),
        (["a"], ": item 0: expected an object, got str"),
        ([{"prompt": "a", "response": "b"}, None], ": item 1: expected an object, got NoneType"),
        ([{"text": "a"}], "'messages' or 'prompt' and 'response', got 'text'"),
        ([{}], "'prompt' and 'response', got 'none'"),
        ([{"conversation": []}], ": no item can be scored by mode exact: 1 without a question"),
        ([{"conversation": {}}], ": item 0: expected 'conversation'"),
        ([{"conversation": [TURN]}], ": no item can be scored by mode exact: 1 without an expected answer"),
        ([{"prompt": "a", "response": " \n"}], ": no item can be scored by mode exact: 1 without"),
        ([{"conversation": [{"from": "gpt", "value": "b"}]}], ": no item can be scored by mode exact: 1 without a"),
        ([{"conversation": [{"from": "robot", "value": "b"}]}], ": item 0: expected a message with 'from'"),
        ([{"conversation": [{"from": ["gpt"], "value": "b"}]}], ": item 0: expected a message with 'from'"),
        ([{"conversation": [TURN, {"from": "gpt", "value": 4}]}], ": item 0: expected a message with 'from'"),
        ([{"conversation": ["hello", 3]}], ": item 0: expected a message with 'from'"),
        ([{"prompt": ["a"], "response": "b"}], ": item 0: prompt: expected a text or a list of messages, got ['a']"),
        ([{"question": "a", "answer": [["b"], "c"]}], ": item 0: answer: expected a text or a list of messages, got ["),
        ([{"question": "a", "answer": ["b", "4"]}], ", got ['b', '4']; if all are right, fields: {prompt: ..."),
        ([{"question": "a", "answer": "b", "prompt": {"text": "a"}}], ": item 0: prompt: expected a text or a list of"),
        ([{"turns": [{"role": "user", "content": "a"}]}], ": item 0: turns: expected a list of the user's texts"),
        ([{"input": {"text": "a"}}], ": item 0: input: expected a text or a list of messages, got {'text': 'a'}"),
        ([{"prompt": "a", "response": "b", "history": ["c"]}], ": item 0: history: expected pairs of question and"),
        ([{"prompt": "\ud800", "response": "b"}], ": item 0: holds half of a character"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_item(tmp_path, data, message):
    found = refusal(tmp_path, data)
    assert message in found
    assert len(found) < 500


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"question": "q", "answer": 0}, "mode 'choice' needs 'choices', a list of 2 to 26 options"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "mode 'choice' needs 'choices'"),
        ({"question": "q", "choices": ["a"] * 27, "answer": 0}, "mode 'choice' needs 'choices'"),
        ({"question": "q", "choices": "ab", "answer": 0}, "mode 'choice' needs 'choices'"),
        ({"question": "q", "choices": ["a", "b"], "answer": 3}, "index, counted from 0, or one of A, B, got 3"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "no item can be scored by mode choice: 1 without an"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "counted from 0, or one of A, B, got 'C'"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "counted from 0, or one of A, B, got True"),
        ({"question": "q", "choices": ["a", "b"], "answer": [0, 1]}, "by mode choice: 1 with several right options"),
        ({"input": "q", "target_scores": {"a": 1, "b": 1}}, "by mode choice: 1 with several right options"),
        ({"input": "q", "target_scores": {"a": "x"}}, "target_scores: expected options and a number for each"),
        ({"inputs": "q", "multiple_choice_targets": ["a"]}, "_targets: expected options and a number for each"),
        ({"question": "q", "choices": ["a", "b"]}, "fields: {prompt: ..., choices: ..., answer: ...} says which"),
        ({"choices": ["a", "b"], "answer": 0}, "or question and choices, got 'choices, answer'"),
        ({"ctx": "q", "endings": ["a", "b"]}, "named by fields: {prompt: ..., choices: ..., answer: ...}"),
        (
            {"conversation": [{"from": "gpt", "value": "a"}], "choices": ["a", "b"], "answer": 0},
            "no item can be scored by mode choice: 1 without a question",
        ),
    ],
)
def test_a_choice_that_cannot_be_asked_is_named(tmp_path, item, message):
    assert message in refusal(tmp_path, [item], "choice")


PUBLISHED = [  # an item, its question, its options' first letters, and which is right
    ({"ctx": "A man", "ctx_a": "A", "endings": ["eats.", "runs.", "sits."], "label": "2"}, "A man", "ers", "C"),
    ({"goal": "Open it.", "sol1": "Twist.", "sol2": "Eat.", "label": 0}, "Open it.", "TE", "A"),
    ({"sentence": "_ was mad.", "option1": "Tom", "option2": "Bob", "answer": "1"}, "_ was mad.", "TB", "A"),
    ({"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 3, "exp": "so"}, "Q?", "wxyz", "D"),
    (
        {"question": "Q?", "support": "S.", "correct_answer": "C"} | {f"distractor{i + 1}": "dBa"[i] for i in range(3)},
        "S.\n\nQ?",
        "BCad",
        "B",
    ),
    (
        {"Question": "Q?", "Correct Answer": "y"} | {f"Incorrect Answer {i + 1}": "zxw"[i] for i in range(3)},
        "Q?",
        "wxyz",
        "C",
    ),
]


@pytest.mark.parametrize(("item", "asked", "options", "letter"), PUBLISHED)
def test_multiple_choices_are_read_as_they_are_published(tmp_path, item, asked, options, letter):
    """Where the right option has a key of its own, options are listed by alphabet."""
    (found,) = load(tmp_path, [item], "choice")
    question, *listed, end = found.messages[-1]["content"].removeprefix(asked).split("\n")
    assert (question, end) == ("", "Answer:")
    assert [line[:4] for line in listed] == [f"{'ABCD'[i]}. {first}" for i, first in enumerate(options)]
    assert found.response == letter
    right = item.get("correct_answer", item.get("Correct Answer"))
    if right is not None:
        assert load(tmp_path, [item])[0].response == right
    else:
        assert "is a multiple choice, which mode 'exact' does not read" in refusal(tmp_path, [item])


@pytest.mark.parametrize(("answer", "text", "letter"), [(True, "yes", "A"), (False, "no", "B")])
def test_a_question_about_a_passage_that_is_true_or_false_is_answered_by_yes_or_no(tmp_path, answer, text, letter):
    item = {"question": "is it so", "title": "It", "passage": "It is.", "answer": answer}
    asked = "It is.\n\nis it so"
    assert load(tmp_path, [item]) == [Conversation(({"role": "user", "content": asked},), text)]
    (found,) = load(tmp_path, [item], "choice")
    assert (found.messages[-1]["content"], found.response) == (f"{asked}\nA. yes\nB. no\nAnswer:", letter)
    assert "answer: expected a text" in refusal(tmp_path, [{"question": "is it so", "answer": answer}])
    assert load(tmp_path, [item | {"response": "Maybe."}])[0].response == "Maybe."  # which says more


def test_a_question_with_options_is_no_conversation_for_other_modes(tmp_path):
    for item in (
        {"question": "2+2=", "choices": ["3", "4"], "answer": 1},
        {"question": {"stem": "2+2=", "choices": [{"text": "4", "label": "A"}]}, "answerKey": "A"},
    ):
        told = "item 0: is a multiple choice, which mode 'perplexity' does not read; use mode choice"
        assert told in refusal(tmp_path, [item], "perplexity")
    told = "1 without an expected answer; it is a multiple choice, which mode choice reads"
    assert told in refusal(tmp_path, [{"input": "2+2=", "target_scores": {"3": 0, "4": 1}}], "perplexity")


@pytest.mark.parametrize("scores", [float("nan"), None, {}, {"a": "x"}, {"a": 10**400}, [1], "a"])
def test_a_plain_answer_counts_whatever_the_scores_of_options_are(tmp_path, scores):
    item = {"input": "2+2=", "target": "4", "target_scores": scores}
    assert load(tmp_path, [item]) == [Conversation(QUESTION, "4")]
    lettered = {"question": "2+2=", "A": "3", "B": "4", "answer": "B", "target_scores": scores}
    assert load(tmp_path, [lettered], "choice")[0].response == "B"


def test_an_option_of_the_highest_score_that_is_called_like_a_letter_is_told_by_its_place(tmp_path):
    (found,) = load(tmp_path, [{"input": "Which?", "target_scores": {"B": 1, "C": 0}}], "choice")
    assert (found.messages[-1]["content"], found.response) == ("Which?\nA. B\nB. C\nAnswer:", "A")


@pytest.mark.parametrize(
    "other",
    [{"correct": True}, {"correct": 1}, {"correct": "True"}, {"correct_option": 7}, {"gold_label": "-"}],
)
def test_what_names_no_option_names_no_right_one(tmp_path, other):
    answered = {"question": "2+2=", "choices": ["3", "4"], "answer": 1}
    found = load_conversations(save(tmp_path, [{**answered, "answer": None, **other}, answered]), "choice", 9)
    assert (len(found.usable), found.left_out) == (1, {"without an expected answer": 1})


@pytest.mark.parametrize(
    "system", [float("nan"), 3, True, ["Be brief."], {"id": 1}, [{"text": 1}], [{"text": "x", "title": "y"}]]
)
def test_what_is_no_text_and_no_parts_of_text_is_no_system_prompt(tmp_path, system):
    for item in ({"prompt": "2+2=", "response": "4"}, {"messages": TURNS}):
        assert load(tmp_path, [{**item, "system": system}]) == [Conversation(QUESTION, "4")]
    fields = {"prompt": "q", "response": "a", "system": "s"}
    path = save(tmp_path, [{"q": "2+2=", "a": "4", "s": system}])
    assert load_conversations(path, "exact", 5, fields).usable == [Conversation(QUESTION, "4")]


def test_parts_of_text_are_a_system_prompt_and_nothing_is_none(tmp_path):
    for system in ([{"text": "Be"}, {"type": "text", "text": "brief."}], {"parts": [{"text": "Be\nbrief."}]}):
        (found,) = load(tmp_path, [{"prompt": "2+2=", "response": "4", "system": system}])
        assert found.messages == ({"role": "system", "content": "Be\nbrief."}, *QUESTION)
    item = {"prompt": "2+2=", "response": "4", "system": float("nan"), "system_prompt": "Be brief."}
    assert load(tmp_path, [item]) == [Conversation((SYSTEM, *QUESTION), "4")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no questions"),
        (ROW + "What?,a,b,c,A\n", ":2: expected question, A, B, C, D and the answer's letter, got ['What?'"),
        (ROW.replace("B\n", "E\n"), ":1: expected question, A, B, C, D and the answer's letter"),
    ],
)
def test_a_csv_that_is_not_mmlus_is_named_with_the_line(tmp_path, text, message):
    assert message in refusal(tmp_path, text, "choice", "physics_dev.csv")


def test_a_csv_with_a_header_of_other_names_is_said_to_need_fields(tmp_path):
    found = refusal(tmp_path, "Task,Correct Answer\nq?,a\n", "exact", "gpqa.csv")
    assert ":1: expected question, A, B" in found
    assert found.endswith("; a table with a header is read with fields: {prompt: ..., response: ...}")
    found = refusal(tmp_path, "Question,Correct Answer\nq?,a\n", "exact", "gpqa.csv")
    assert "without an expected answer; of the keys 'Question, Correct Answer', fields: {prompt: ...," in found


def test_missing_worked_examples_are_named(mmlu):
    dev = mmlu.parent.parent / "dev" / "college_physics_dev.csv"
    dev.unlink()
    with pytest.raises(InputError, match=re.escape(f"{dev}: cannot be read: No such file")):
        load_conversations(mmlu, "choice", 200)


def test_files_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.json: no such dataset file"):
        load_conversations(tmp_path / "absent.json", "exact", 1)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_conversations(tmp_path, "exact", 1)
    (tmp_path / "latin.json").write_bytes('["Grüße"]'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.json: cannot be read: not UTF-8 text"):
        load_conversations(tmp_path / "latin.json", "exact", 1)


KEYS = st.sampled_from(
    [
        *("conversation", "conversations", "messages", "from", "value", "role", "content"),
        *("prompt", "response", "question", "choices", "answer"),
        *("text", "messages", "parts", "instances"),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
WORDS = st.sampled_from(["gpt", "human", "system", "user", "assistant", "A", "B"])
JSON = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"from": WORDS | JSON, "role": WORDS, "value": LEAVES, "content": LEAVES}),
    max_size=3,
)
ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "conversation": MESSAGES | JSON,
        "messages": MESSAGES,
        "prompt": LEAVES,
        "response": LEAVES,
        "question": LEAVES,
        "choices": st.lists(LEAVES, max_size=3) | JSON,
        "target_scores": st.dictionaries(st.text(max_size=2), LEAVES, max_size=3) | JSON,
        "turns": st.lists(LEAVES, max_size=2) | MESSAGES,
        "system": LEAVES | JSON,
        "chosen": LEAVES | MESSAGES,
        "instances": MESSAGES,
        "answer": LEAVES | WORDS,
    },
)


@settings(max_examples=300)
@given(st.lists(ITEMS, max_size=2) | JSON, st.sampled_from(["exact", "choice"]))
def test_any_json_gives_conversations_that_can_be_asked_or_an_explanation(tmp_path_factory, data, mode):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    try:
        found = load_conversations(path, mode, 200).usable
    except InputError as error:
        found = str(error)
    if isinstance(found, str):
        assert found.startswith(str(path))
        return
    for conversation in found:
        assert conversation.messages
        assert conversation.response.strip()
        assert all(set(message) == {"role", "content"} for message in conversation.messages)
        assert bool(conversation.options) == (mode == "choice")


@settings(max_examples=100)
@given(st.binary(max_size=80))
def test_any_bytes_give_conversations_or_an_explanation(tmp_path_factory, content):
    for name in ("any_dev.csv", "any_bytes.json"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_conversations(path, "choice", 200)
