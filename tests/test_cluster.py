"""Several workers decide as one process does, byte for byte, whatever becomes of them on the way."""

from __future__ import annotations

import json
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from olmfast import load_config, run
from olmfast.cluster import crew, donors
from olmfast.cluster.crew import Lost
from olmfast.cluster.worker import Worker
from olmfast.errors import InputError, OlmfastError
from olmfast.evaluation.division import PARTS, divided
from olmfast.observer import Observer
from olmfast.search.coefficients import GRAINS
from olmfast.search.record import Record
from olmfast.testing import skilled_run, tiny_run


class Threads:
    """A fleet of real workers, each in a thread of this process. `faults` maps the number of an errand, counted over
    all workers, to what happens to the worker that gets it: `die`, or `sleep` until the fleet is closed."""

    faults: dict[int, str] = {}

    def __init__(self, n, address=None, device=None):  # noqa: ARG002
        self.n, self.asked, self.ended = n, [], threading.Event()
        self.lock, self.turn = threading.Lock(), threading.Lock()
        Threads.latest = self

    def start(self):
        return {"worker": Worker(), "thread": ThreadPoolExecutor(1), "dead": False}

    def ask(self, handle, method, *args):
        future = Future()
        handle["thread"].submit(self._do, handle, method, args, future)
        return future

    def _do(self, handle, method, args, future):
        fault = ""
        if method == "errand":
            with self.lock:
                self.asked.append(args[3])
                fault = self.faults.get(len(self.asked), "")
        if fault == "sleep":
            self.ended.wait(60)
        handle["dead"] = handle["dead"] or fault == "die"
        if handle["dead"]:
            future.set_exception(Lost("killed by the test"))
            return
        try:
            with self.turn:  # libraries have settings of the whole process
                future.set_result(getattr(handle["worker"], method)(*args))
        except BaseException as error:
            future.set_exception(error)

    def ready(self, tickets, timeout_s):
        return list(wait(tickets, timeout_s, FIRST_COMPLETED).done)

    def answer(self, ticket):
        return ticket.result()

    def share(self, value):
        return value

    def end(self, handle):
        handle["dead"] = True

    def check(self):
        pass

    def close(self):
        self.ended.set()


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr("olmfast.runs.session.RayFleet", Threads)
    monkeypatch.setattr("olmfast.runs.inputs.check_installed", lambda: None)
    monkeypatch.setattr(Threads, "faults", {})
    yield Threads
    Threads.latest.close()


class Notes(Observer):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def outcome(folder: Path) -> tuple[dict[str, bytes], list, list]:
    """What a run has made: its tensors, its decisions, and every score of every candidate."""
    tensors = {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
    ledger = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    decisions = [(key, asdict(own)) for key, own in Record.load(folder).steps.items()]
    return tensors, ledger, decisions


def both(config: Path, threads, n: int, **keys):
    """The outcome in one process, and with n workers; what was noted there."""
    one = run(load_config(config, {"output_dir": "one", **keys}))
    notes = Notes()
    several = run(load_config(config, {"output_dir": "several", "workers": n, **keys}), observer=notes)
    assert threads.latest.asked.count("score") > 0
    return outcome(one.output_dir), outcome(several.output_dir), notes.notes


def assert_same(one, several):
    assert one[0] == several[0]
    assert one[1] == several[1]
    assert one[2] == several[2]
    told = [(line["step"], line["candidate"], line["dataset"]) for line in several[1]]
    assert len(told) == len(set(told)) > 0


STAGES = {"base_select": True, "layer_swap": True, "es_svd": True, "tensor_swap": True, "units": ["*1.mlp.up_proj"]}


def test_a_search_by_stages_has_the_same_bytes_with_three_workers(tmp_path, threads):
    config = tiny_run(tmp_path, 3, batch_tokens=64, **STAGES)
    one, several, notes = both(config, threads, 3)
    assert_same(one, several)
    assert notes[0].startswith("3 of 3 workers on ")


def test_a_joint_search_has_the_same_bytes_with_two_workers_and_both_halves_run_side_by_side(tmp_path, threads):
    config = skilled_run(tmp_path, n=6, batch_tokens=128, budget=40)
    one, several, _ = both(config, threads, 2)
    assert_same(one, several)
    assert threads.latest.asked.count("slopes") == 2 * GRAINS["part"]
