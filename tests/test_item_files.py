"""Dataset files in the shapes that tools and authors give them: containers, columns, tables, compression, key names."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from olmfast.config.datasets import parse_datasets, read_dataset_option
from olmfast.errors import InputError
from olmfast.evaluation.conversations import load_conversations
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.items import Conversation
from olmfast.testing import tiny_tokenizer

PAIRS = [{"question": "1+1=", "answer": "2"}, {"question": "2+2=", "answer": "4"}]
EXPECTED = [(("1+1=",), "2"), (("2+2=",), "4")]


def said(found: list[Conversation]) -> list[tuple[tuple[str, ...], str]]:
    return [(tuple(message["content"] for message in one.messages), one.response) for one in found]


def load(path: Path, content: Any, mode: str = "exact", **keys: Any) -> list[Conversation]:
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_conversations(path, mode, 200, **keys).usable


def refusal(path: Path, content: Any, mode: str = "exact", **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(path, content, mode, **keys)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"data": PAIRS, "version": 2},
        {"features": [], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(PAIRS)], "num_rows_total": 2},
        {"0": PAIRS[0], "1": PAIRS[1]},
        {"question": ["1+1=", "2+2="], "answer": ["2", "4"]},
        {"question": {"0": "1+1=", "1": "2+2="}, "answer": {"0": "2", "1": "4"}},
        {"columns": ["question", "answer"], "index": [0, 1], "data": [["1+1=", "2"], ["2+2=", "4"]]},
        {"messages": [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for (q,), a in EXPECTED]},
    ],
    ids=["in a key", "the Hub's viewer", "by number", "columns", "pandas", "pandas split", "columns of messages"],
)
def test_items_lie_in_what_other_tools_write(content, tmp_path):
    assert said(load(tmp_path / "x.json", content)) == EXPECTED


ALONE = {"messages": [{"role": "user", "content": "1+1="}, {"from": "gpt", "value": "2"}]}


@pytest.mark.parametrize("item", [PAIRS[0], ALONE])
def test_one_item_alone_is_a_file_of_one(item, tmp_path):
    assert said(load(tmp_path / "x.json", item)) == EXPECTED[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": PAIRS, "test": PAIRS}, "holds several lists, 'train, test'; write the one to be used as a file"),
        ({"question": ["1+1=", "2+2="], "answer": ["2"]}, "has columns of different lengths"),
        (
            {"question": ["1+1=", "2+2="], "answer": "2"},
            "has columns of different lengths, or beside them what is none",
        ),
        ({"info": {"a": 1}}, "item 0: expected 'conversation'"),
    ],
)
def test_which_items_are_meant_is_not_guessed(content, message, tmp_path):
    assert message in refusal(tmp_path / "x.json", content)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", "\n".join(map(json.dumps, PAIRS))),
        ("x.csv", 'id,question,answer\n0,1+1=,2\n1,"2+2=",4\n'),
        ("x.tsv", "question\tanswer\n1+1=\t2\n2+2=\t4\n"),
    ],
)
def test_a_file_may_be_compressed_and_a_table_has_its_names_in_the_first_line(name, text, tmp_path):
    assert said(load(tmp_path / name, text)) == EXPECTED
    for ending, how in (("gz", gzip), ("bz2", bz2), ("xz", lzma)):
        assert said(load(tmp_path / f"{name}.{ending}", how.compress(text.encode()))) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", "not readable by pyarrow: "),
        (b"\xff\xff\xff\xff\x10", "not readable by pyarrow: "),
        (b"ARROW1\0\0", "not readable by pyarrow: "),
        (b"PK\x03\x04", "is a zip archive, which is not read; unpack it"),
        (b"\x28\xb5\x2f\xfd", "is compressed by zstd, which is not read; unpack it"),
        (gzip.compress(b"[]" * 99, mtime=0)[:-9], "not readable as gzip"),
        (bz2.compress(b"[]" * 99)[:-9], "not readable as bz2"),
        (lzma.compress(b"[]" * 99)[:-9], "not readable as lzma"),
    ],
)
def test_what_is_not_read_is_told_as_what_it_is(content, message, tmp_path):
    assert message in refusal(tmp_path / "x.parquet", content)


def test_a_row_of_more_cells_than_names_is_an_error_that_names_its_line(tmp_path):
    table = 'question,answer\n"a\nb, then?",1\nWhat is it, then?,a dog\n'
    told = refusal(tmp_path / "x.csv", table)
    assert ":4: has 3 cells, and the first line names 2; quote a cell that holds ','" in told


@pytest.mark.parametrize("header", ["input,output", "query,response", "problem,solution", "inputs,targets"])
def test_a_csv_with_any_known_names_is_no_file_of_mmlu(header, tmp_path):
    assert said(load(tmp_path / "x.csv", f"{header}\n1+1=,2\n2+2=,4\n")) == EXPECTED


def test_a_long_cell_and_a_lone_line_are_read(tmp_path):
    (long,) = load(tmp_path / "x.csv", f"question,answer\n{'x' * 200_000},2\n")
    assert len(long.messages[0]["content"]) == 200_000
    (lone,) = load(tmp_path / "x.jsonl", json.dumps({"conversations": ["1+1=", "2"]}))
    assert said([lone]) == EXPECTED[:1]


def columnar(kind: str, items: list[Any]) -> bytes:
    table, memory = pyarrow.Table.from_pylist(items), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, memory, compression="zstd")
    else:
        writer = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with writer(memory, table.schema) as out:
            out.write_table(table)
    return memory.getvalue()


# As the Hub has them: a struct's keys are there in every row, null where a row has none.
CHAT = [
    {"messages": [{"role": "user", "content": q, "name": None}, {"role": "assistant", "content": a, "name": "m"}]}
    for (q,), a in EXPECTED
]
CHOICES = [
    {"question": q, "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"} for (q,), _ in EXPECTED
]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow of datasets"])
def test_parquet_and_arrow_files_are_read(kind, tmp_path):
    path = tmp_path / "train-00000-of-00001"
    assert said(load(path, columnar(kind, PAIRS))) == EXPECTED
    assert said(load(path, columnar(kind, CHAT))) == EXPECTED
    assert [(one.response, len(one.options)) for one in load(path, columnar(kind, CHOICES), "choice")] == [("B", 2)] * 2
    assert said(load(path, columnar(kind, [{"a": "1+1=", "b": 2}]), fields={"prompt": "a", "response": "b"})) == [
        (("1+1=",), "2")
    ]
    assert "holds no rows" in refusal(path, columnar(kind, []))


def test_a_parquet_file_says_which_package_reads_it(tmp_path, monkeypatch):
    content = columnar("parquet", PAIRS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "is a parquet file, which needs pyarrow; pip install 'olmfast[parquet]'" in refusal(tmp_path / "x", content)


def test_a_table_with_a_header_is_no_file_of_mmlu(tmp_path):
    rows = "question,A,B,C,D,answer\n2+2=,3,4,5,6,B\n"
    (tmp_path / "val.csv").write_text(rows)
    entries = parse_datasets({"val.csv": {"mode": "choice"}}, "x")
    (sample,) = load_datasets(tmp_path, entries, tiny_tokenizer(), 2048)["val.csv"].samples
    assert sample.options
    (found,) = load(tmp_path / "val.csv", rows, "choice")
    assert said([found]) == [(("2+2=\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:",), "B")]


@pytest.mark.parametrize(
    ("item", "answer"),
    [
        ({"Question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "Answer": "C"}, "C"),
        ({"question": "q", "A": "a", "B": "b", "C": None, "answer": "b"}, "B"),
        ({"query": "q", "options": ["a", "b"], "answer": 0}, "A"),
    ],
)
def test_options_under_letters_are_options(item, answer, tmp_path):
    (found,) = load(tmp_path / "x.json", [item], "choice")
    assert found.response == answer
    assert len(found.options) == (4 if item.get("D") else 2)
    # The letter alone is no answer to a question without its options.
    assert "is a multiple choice" in refusal(tmp_path / "x.json", [item], "exact")


def test_options_may_lie_in_keys_of_their_own(tmp_path):
    fields = {"prompt": "goal", "choices": ["sol1", "sol2"], "answer": "label"}
    item = {"goal": "q", "sol1": "a", "sol2": "b"}
    for label, letter in ((1, "B"), ("sol1", "A"), ("b", "B"), ("0", "A")):
        (found,) = load(tmp_path / "x.json", [{**item, "label": label}], "choice", fields=fields)
        assert said([found]) == [(("q\nA. a\nB. b\nAnswer:",), letter)]
    message = "item 0: fields: choices: no key 'sol3', got 'goal, sol1, sol2, label'"
    wrong = {**fields, "choices": ["sol1", "sol3"]}
    assert message in refusal(tmp_path / "x.json", [{**item, "label": 0}], "choice", fields=wrong)
    for keys in ({"response": ["a", "b"]}, {"choices": ["a"]}):
        with pytest.raises(InputError, match=r"expected a key, or several for prompt and choices, got \["):
            parse_datasets({"x.json": {"mode": "choice", "fields": keys}}, "x")
    _, entry = read_dataset_option("x.json:choice,fields.choices=[sol1, sol2],samples=3")
    assert entry == {"mode": "choice", "fields": {"choices": ["sol1", "sol2"]}, "samples": 3}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parts(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


@pytest.mark.parametrize(
    ("item", "asked"),
    [
        ({"chosen": [user("q"), model("a")], "rejected": [user("q"), model("b")]}, ("q",)),
        ({"system": "s", "chosen": [user("q"), model("a")]}, ("s", "q")),
        ({"prompt": "r", "chosen": [user("q"), model("p"), user("r"), model("a")]}, ("q", "p", "r")),
        ({"prompt": "q", "system": "s", "chosen": [user("q"), model("a")]}, ("s", "q")),
        ({"prompt": [user("q"), model("p"), user("r")], "chosen": [model("a")]}, ("q", "p", "r")),
        ({"conversations": ["q", "p", "r", "a"]}, ("q", "p", "r")),
        ({"INSTRUCTION": "q", "RESPONSE": "a"}, ("q",)),
        ({"input": "q", "output": "a"}, ("q",)),
        ({"inputs": "q", "targets": "a"}, ("q",)),
        ({"prompt": "q", "canonical_solution": "a", "test": "t"}, ("q",)),
        ({"input": {"messages": [user("q")], "tools": []}, "preferred_output": [model("a")]}, ("q",)),
        ({"input": "q", "preferred_output": model("a")}, ("q",)),
        ({"conversations": [user("q")], "chosen": model("a"), "rejected": model("b")}, ("q",)),
        ({"messages": [user("q"), model("p"), user("r")], "chosen": "a"}, ("q", "p", "r")),
        ({"input": [{"role": "system", "content": "s"}, user("q")], "ideal": "a"}, ("s", "q")),
        ({"inputs": [3, 4], "inputs_pretokenized": "q", "targets": [5], "targets_pretokenized": "a"}, ("q",)),
        ({"task_name": "t", "definition": "d", "inputs": "q", "targets": "a"}, ("d\n\nq",)),
        ({"id": "task001-0", "definition": ["d", "e"], "inputs": "q", "targets": ["a", "b"]}, ("d\n\ne\n\nq",)),
        ({"text": "q", "code": "a", "test_list": ["assert a"]}, ("q",)),
        ({"prompt": "q", "code": "a", "test_list": ["assert a"]}, ("q",)),
        ({"input": "q", "expected_output": "a", "context": ["c", "d"]}, ("q\n\nc\n\nd",)),
        ({"system": [{"text": "s"}], "messages": [user("q"), model("a")]}, ("s", "q")),
        ({"systemInstruction": parts("", "s"), "contents": [parts("user", "q"), parts("model", "a")]}, ("s", "q")),
    ],
)
def test_what_was_said_before_an_answer_is_asked_with_it(item, asked, tmp_path):
    assert said(load(tmp_path / "x.json", [item])) == [(asked, "a")]


@pytest.mark.parametrize(
    "answers",
    [
        {"targets": ["a", "b"]},
        {"best_answer": "a", "answers": ["c", "a"]},
        {"answers": ["a", "b"]},
        {"answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        {"answers": [{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 1}]},
        {"answer": {"value": "a", "aliases": ["b", "a"]}},
        {"ideal": ["a", "b"]},
    ],
)
def test_of_several_right_answers_the_first_is_expected(answers, tmp_path):
    assert said(load(tmp_path / "x.json", [{"question": "q", **answers}])) == [(("q",), "a")]
    fields = {"prompt": "question", "response": next(iter(answers))}
    assert said(load(tmp_path / "x.json", [{"question": "q", **answers}], fields=fields)) == [(("q",), "a")]


def test_a_list_is_of_answers_that_are_all_right_where_its_name_or_the_user_says_so(tmp_path):
    path = tmp_path / "x.json"
    assert said(load(path, [{"input": "q", "target": ["a", "b"]}])) == [(("q",), "a")]  # BIG-bench
    for key in ("answer", "response", "solution", "output", "target"):
        item = {"question": "q", key: ["step 1", "step 2", "4"]}
        assert f"{key}: expected a text or a list of messages" in refusal(path, [item])
        assert said(load(path, [item], fields={"prompt": "question", "response": key})) == [(("q",), "step 1")]
    assert "targets: expected a text" in refusal(path, [{"inputs": "q", "targets": [5, 6]}])  # tokens


@pytest.mark.parametrize(
    "item",
    [
        {"question": "q", "code": "print(1)", "expected": "1"},
        {"Question": "q", "Code": "Q12"},
        {"prompt": "q", "code": "print(1)"},
        {"question": "q", "reference": "https://x", "gold": "a"},
        {"question": "q", "answers": ["w", "a"], "correct": 1},
        {"question": "q", "answers": ["w", "a"], "label": 1},
        {"question": "q", "answers": 3},
        {"question": "q", "answers": [{"text": "w", "score": 1}, {"text": "a", "score": 9}]},
        {"question": "q", "best_answer": 2},
        {"question": "q", "ideal": True},
        {"question": "q", "ground_truth": '{"inputs": ["1"], "outputs": ["2"]}'},
        {"question": "q", "ground_truth": {"a": 1}},
        {"instruction": "q", "expected_output": "3", "test": "t"},
        {"messages": [user("q")], "completions": ["a", "b"], "chosen": 1},
        {"messages": [user("q")], "chosen": [{"text": "a"}]},
        {"messages": [user("q")], "chosen": float("nan")},
    ],
)
def test_what_other_files_call_by_the_name_of_an_answer_is_none(item, tmp_path):
    path = tmp_path / "x.json"
    assert "1 without an expected answer" in refusal(path, [item])
    assert said(load(path, [item], "quality")) == [(("q",), "")]


PAIR = {"prompt": "q", "response": "a"}
ABOUT = [{"idx": 0, "title": "t", "paragraph_text": "p"}]


@pytest.mark.parametrize(
    "content",
    [
        [{"paragraphs": ABOUT, "question": "q", "answer": "a"}],
        [{**PAIR, "qas": [{"question": "x", "answer": "y"}]}],
        {**PAIR, "qas": [{"question": "x", "answer": "y"}]},
        [{"instruction": "q", "paragraphs": [{"text": "t"}], "output": "a"}],
        [{"Instruction": "q", "output": "a", "instances": [{"input": "x", "output": "y"}]}],
        [{"messages": [user("q"), model("a")], "instances": [{"id": 1}]}],
        [{"chosen": [user("q"), model("a")], "instances": [{"input": "x"}]}],
        [{"word": "apple", "definition": "a fruit", **PAIR}],
        [{"definition": "a fruit", "inputs": "q", "targets": "a", "id": 7}],
        [{"task_prefix": "t", "input": "q", "target": "a"}],
        {"definition": "What this file is", "examples": [PAIR]},
        {"context": "C", "items": [PAIR]},
        {"context": {"source": "x"}, "items": [PAIR]},
        {"context": {"source": "x"}, "qas": [{"question": "q", "answer": "a"}]},
        {"definition": {"source": "x"}, "instances": [{"input": "q", "output": "a"}]},
        {"task_prefix": {"source": "x"}, "examples": [{"input": "q", "target": "a"}]},
        {"task_prefix": "t", "items": [{"input": "q", "target": "a"}]},
        {"contents": [PAIR]},
        {"inputs_pretokenized": None, "items": [PAIR]},
        {"contents": [{"parts": [1], **PAIR}]},
        [{**PAIR, "contents": [{"title": "t", "text": "x"}]}],
        [{**PAIR, "contents": [parts("user", "x"), parts("model", "y")]}],
        [{**PAIR, "systemInstruction": "s"}],
        [{"turns": 2, "chosen": [user("q"), model("a")]}],
        [{"inputs": "q", "targets": "a", "inputs_pretokenized": "x", "targets_pretokenized": "y"}],
        [{"messages": [{**user("q"), "parts": [{"functionCall": "f"}]}, model("a")]}],
    ],
)
def test_what_lies_beside_a_question_is_not_taken_for_it_or_told_with_it(content, tmp_path):
    assert said(load(tmp_path / "x.json", content)) == [(("q",), "a")]


def test_items_with_keys_that_the_user_names_are_read_as_they_are(tmp_path):
    fields = {"prompt": "task", "response": "gold"}
    item = {"task": "q", "gold": "a", "qas": [{"question": "x", "answer": "y"}], "paragraphs": [{"prompt": "z"}]}
    assert said(load(tmp_path / "x.json", [item], fields=fields)) == [(("q",), "a")]
    examples = {"task_prefix": "t", "examples": [{"input": "q", "target": "a"}]}
    fields = {"prompt": "input", "response": "target"}
    assert said(load(tmp_path / "x.json", examples, fields=fields)) == [(("q",), "a")]
    contents = {"contents": [{"role": "q", "parts": "a"}]}
    assert said(load(tmp_path / "x.json", contents, fields={"prompt": "role", "response": "parts"})) == [(("q",), "a")]


def test_an_empty_list_of_answers_is_none(tmp_path):
    for answers in ({"answer": []}, {"answers": {"text": [], "answer_start": []}}):
        assert "1 without an expected answer" in refusal(tmp_path / "x.json", [{"question": "q", **answers}])


def test_of_questions_that_follow_one_another_the_first_is_asked(tmp_path):
    items = [
        {"question_id": 81, "category": "math", "turns": ["q", "And?"], "reference": ["a", "b"]},
        {"question_id": 82, "category": "writing", "turns": ["r", "And?"]},
        {"uid": "1", "turns": [{"content": "s"}]},
    ]
    path = tmp_path / "question.jsonl"
    lines = "\n".join(map(json.dumps, items))
    assert said(load(path, lines)) == [(("q",), "a")]
    assert load_conversations(path, "exact", 9).left_out == {"without an expected answer": 2}
    assert said(load(path, lines, "quality")) == [(("q",), "a"), (("r",), ""), (("s",), "")]


def test_an_item_whose_options_tie_is_left_out_while_others_are_asked(tmp_path):
    examples = [{"input": "q", "target_scores": scores} for scores in ({"z": 1, "y": 0}, {"z": 1, "y": 1})]
    path = tmp_path / "task.json"
    (found,) = load(path, {"name": "n", "metrics": ["m"], "task_prefix": "t", "examples": examples}, "choice")
    assert said([found]) == [(("t\n\nq\nA. y\nB. z\nAnswer:",), "B")]  # by alphabet: files have the right one first
    assert load_conversations(path, "choice", 9).left_out == {"with several right options": 1}


def test_questions_inside_of_an_item_are_items_with_what_is_said_once_for_all(tmp_path):
    path = tmp_path / "x.json"
    example = {"input": "p", "output": "p", "explanation": "e"}
    instances = [{"input": "q", "output": ["a"]}, {"input": "r", "output": ["b", "c"]}]
    task = {"Definition": ["d"], "Positive Examples": [example], "Negative Examples": [example], "Instances": instances}
    assert said(load(path, task)) == [(("d\n\nq",), "a"), (("d\n\nr",), "b")]
    qas = [{"question": "q", "answers": [{"text": "a"}]}, {"question": "r", "answers": []}]
    empty = {"context": "d", "qas": []}
    squad = {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": qas}, empty]}]}
    assert said(load(path, squad)) == [(("q\n\nc",), "a")]
    seeds = [{"id": "1", "instruction": "i", "instances": [{"input": "q", "output": "a"}]}]
    assert said(load(path, seeds)) == [(("i\n\nq",), "a")]


@pytest.mark.parametrize("missing", [float("nan"), None, float("inf")])
def test_a_number_that_is_none_is_no_answer(missing, tmp_path):
    assert "1 without an expected answer" in refusal(tmp_path / "x.json", [{"question": "q", "answer": missing}])


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "data/train-00000-of-00001.parquet"])
def test_a_folder_of_the_hub_is_told_as_what_it_is(name, tmp_path):
    (tmp_path / "set" / name).parent.mkdir(parents=True)
    (tmp_path / "set" / name).write_bytes(b"")
    entries = parse_datasets({"set": {"mode": "exact"}}, "x")
    with pytest.raises(InputError, match=f"it holds {name}: name that file"):
        load_datasets(tmp_path, entries, tiny_tokenizer(), 2048)
