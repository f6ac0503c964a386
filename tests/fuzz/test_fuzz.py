"""Malformed input of every kind, the first cases of `make fuzz`."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator

import pytest
from fuzz import SHARES, Fuzzer, numbered
from harness import Case, Hangs, caught, judge, restore, tree
from kinds import KINDS
from malformed import as_text, spoil, spoil_bytes

N_CASES = 80
FAMILIES = ("llama", "gpt2", "mixtral")  # `make fuzz` has eight


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Iterator[Fuzzer]:
    """Good input, and the process as it was when all is done."""
    place, limits = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    patch = pytest.MonkeyPatch()
    try:
        yield Fuzzer(tmp_path_factory.mktemp("fuzz"), FAMILIES, patch)
    finally:
        patch.undo()
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_input_is_refused_in_one_message_or_accepted_with_a_result_that_loads(fuzzer, kind):
    wrong = []
    for _, number in numbered(max(4, N_CASES * SHARES[kind] // 100), [kind]):
        tried = fuzzer.run(kind, number)
        if tried.outcome.fault:
            wrong.append((number, tried.outcome.fault, tried.case.arguments, tried.outcome.err[:500]))
    assert not wrong


@pytest.mark.parametrize(
    ("printed", "code", "fault"),
    [
        ("olmfast: cfg.yaml: wrong\n", 2, None),
        ("olmfast: cfg.yaml: wrong\n", 1, "ends with 1"),
        ("olmfast: this is a bug in olmfast: x\n", 1, "ends with 1"),
        ("Traceback (most recent call last):\n", 1, "a traceback"),
        ("wrong\n", 2, "refused, but not with one message"),
        ("olmfast: a\nolmfast: cfg.yaml\n", 2, "refused, but not with one message"),
        ("olmfast: wrong\n", 2, "refused, but none of ('cfg.yaml',) is named"),
        (f"olmfast: cfg.yaml {'x' * 9000}\n", 2, "refused, with 1 lines, the longest of 9018 characters"),
        ("olmfast: cfg.yaml \x1b[2J\n", 2, "refused, with characters that are not printable"),
        ("", 0, None),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch, printed, code, fault):
    def command() -> None:
        os.write(2, printed.encode())
        raise SystemExit(code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("olmfast.cli.main", command)
    assert judge(tmp_path, Case(["run"], ("cfg.yaml",))).fault == fault


def test_the_fuzzer_sees_what_is_written_and_what_does_not_end(tmp_path, monkeypatch):
    def writes() -> None:
        (tmp_path / "stray").touch()
        raise SystemExit(2)

    def hangs() -> None:
        raise Hangs

    def fails() -> None:
        raise ValueError("broken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("olmfast.cli.main", writes)
    assert judge(tmp_path, Case(["run"], ("",))).fault == "refused, but changes ['stray']"
    monkeypatch.setattr("olmfast.cli.main", hangs)
    assert judge(tmp_path, Case(["run"], ("",))).fault == "hangs for 30 s"
    monkeypatch.setattr("olmfast.cli.main", lambda: None)
    assert "does not load: ValueError: broken" in str(judge(tmp_path, Case(["run"], ("",), loads=fails)).fault)


def test_a_case_is_the_same_each_time_and_leaves_its_place_as_it_was(tmp_path):
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "sub").mkdir()
    before = tree(tmp_path)
    (tmp_path / "kept").unlink()
    os.mkfifo(tmp_path / "kept")
    (tmp_path / "sub" / "more").touch()
    restore(tmp_path, before)
    assert tree(tmp_path) == before
    data = {"a": [1, 2.0, "x"], "b": {"c": None}}
    for make in (lambda rng: as_text(rng, spoil(rng, data)), lambda rng: spoil_bytes(rng, b"a: [1, 2]\n")):
        many = [make(random.Random(number)) for number in range(60)]
        assert many == [make(random.Random(number)) for number in range(60)]
        assert len(set(many)) > 40
    assert data == {"a": [1, 2.0, "x"], "b": {"c": None}}


def test_what_any_library_prints_is_caught():
    with caught() as read:
        os.write(1, b"one")
        print("two")
        os.write(2, b"three")
    assert read() == ("onetwo\n", "three")
