"""Several workers decide as one process does, byte for byte, whatever becomes of them on the way."""

from __future__ import annotations

import json
import os
import runpy
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from olmfast import load_config, run
from olmfast.cluster import crew
from olmfast.cluster.crew import Lost
from olmfast.cluster.donors import Described, Shelf
from olmfast.cluster.worker import Worker
from olmfast.errors import InputError, OlmfastError
from olmfast.evaluation import division
from olmfast.evaluation.division import PARTS, divided
from olmfast.observer import Observer
from olmfast.search.coefficients import GRAINS
from olmfast.search.record import Record
from olmfast.testing import skilled_run, tiny_adapter, tiny_model, tiny_run
from olmfast.weights.pool import Pool


class Threads:
    """A fleet of real workers, each in a thread of this process. `faults` maps the number of an errand, counted over
    all workers, to what happens to the worker that gets it: `die`, or nothing; 0: all others. The worker that gets the
    `hangs`-th errand to score sleeps until the fleet is closed."""

    faults: ClassVar[dict[int, str]] = {}
    hangs: ClassVar[int] = 0

    def __init__(self, n, address=None, device=None):  # noqa: ARG002
        self.n, self.asked, self.ended = n, [], threading.Event()
        self.lock, self.turn = threading.Lock(), threading.Lock()
        self.started = []
        Threads.latest = self

    def start(self):
        thread = ThreadPoolExecutor(1)  # its own: others are started meanwhile
        self.started.append(thread)
        return {"worker": Worker(), "thread": thread, "dead": False}

    def ask(self, handle, method, *args):
        future = Future()
        handle["thread"].submit(self._do, handle, method, args, future)
        return future

    def _do(self, handle, method, args, future):
        fault, hangs = "", False
        if method == "errand":
            with self.lock:
                self.asked.append(args[3])
                fault = self.faults.get(len(self.asked), self.faults.get(0, ""))
                hangs = args[3] == "score" and self.asked.count("score") == self.hangs
        if hangs:
            self.ended.wait()
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
        for thread in self.started:  # what it is at would change settings under whatever comes next
            thread.shutdown(cancel_futures=True)


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr("olmfast.runs.session.RayFleet", Threads)
    monkeypatch.setattr("olmfast.runs.inputs.check_installed", lambda: None)
    monkeypatch.setattr(Threads, "faults", {})
    monkeypatch.setattr(Threads, "hangs", 0)
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


STAGES = {"base_select": True, "layer_swap": True, "es_svd": True, "tensor_swap": True, "units": ["*1.mlp.up_proj"]}


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Few questions are divided too, in every run of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "FEWEST", 1)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A search by stages, and in `one` what one process has made of it."""
    config = tiny_run(tmp_path_factory.mktemp("stages"), 2, batch_tokens=64, **STAGES)
    run(load_config(config, {"output_dir": "one", "workers": 1}))
    return config


def with_workers(config: Path, n: int, **keys) -> list[str]:
    """What is noted in a run with n workers, whose outcome must be that of the one in one process."""
    notes = Notes()
    several = run(load_config(config, {"output_dir": "several", "workers": n, **keys}), overwrite=True, observer=notes)
    assert_same(outcome(config.parent / "one"), outcome(several.output_dir))
    return notes.notes


def assert_same(one, several):
    assert one[0] == several[0]
    assert one[1] == several[1]
    assert one[2] == several[2]
    told = [(line["step"], line["candidate"], line["dataset"]) for line in several[1]]
    assert len(told) == len(set(told)) > 0


def test_questions_are_divided_by_their_batches_alone(monkeypatch):
    monkeypatch.setattr(division, "FEWEST", 8)
    assert [len(part) for part in divided([[i] for i in range(19)], PARTS)] == [9, 10]  # no part of few questions
    assert len(divided([[i] for i in range(500)], PARTS)) == PARTS
    monkeypatch.setattr(division, "FEWEST", 1)
    batches = [[i] for i in range(19)]
    parts = divided(batches, PARTS)
    assert [batch for part in parts for batch in part] == [tuple(batch) for batch in batches]
    assert len(parts) == PARTS
    assert {len(part) for part in parts} == {2, 3}
    assert divided([[1, 2], [3]], PARTS) == [((1, 2),), ((3,),)]
    assert divided([], PARTS) == []
    assert divided(batches, 1) == [tuple(tuple(batch) for batch in batches)]
    costs = [100] * 5 + [10] * 14
    assert [len(part) for part in divided(batches, PARTS, costs)] == [1, 1, 1, 1, 1, 1, 5, 8]  # by what they cost
    assert [len(part) for part in divided(batches[:3], 3, [100, 1, 1])] == [1, 1, 1]


def test_a_search_by_stages_has_the_same_bytes_with_three_workers(config, threads):
    notes = with_workers(config, 3)
    assert notes[0].startswith("3 of 3 workers on ")
    asked = threads.latest.asked
    assert asked.count("score") > 2 * asked.count("together")  # there was something to share


def test_a_joint_search_has_the_same_bytes_and_both_halves_run_side_by_side(tmp_path, threads):
    config = skilled_run(tmp_path, n=6, batch_tokens=128, budget=60)
    run(load_config(config, {"output_dir": "one", "workers": 1}))
    with_workers(config, 2)
    assert threads.latest.asked.count("slopes") == 2 * GRAINS["part"]


@pytest.mark.usefixtures("threads")
def test_workers_of_the_sequential_scorer_have_a_candidate_each(tmp_path):
    config = tiny_run(tmp_path, 2, scorer="sequential", search="stages", base_select=True)
    run(load_config(config, {"output_dir": "one", "workers": 1}))
    with_workers(config, 2)


def test_workers_that_die_make_no_difference_and_others_take_their_place(config, threads):
    threads.faults.update(dict.fromkeys((1, 5, 6, 17, 30), "die"))
    notes = with_workers(config, 2)
    assert sum("is lost (killed by the test): what it had to do goes to others" in note for note in notes) == 5
    assert sum(" joins: " in note for note in notes) >= 4


def test_the_work_of_one_that_hangs_is_done_by_others(config, threads, monkeypatch):
    monkeypatch.setattr(crew, "GRACE_S", 0.3)
    monkeypatch.setattr(crew, "SLOW", 0)  # else it waits for as long as a busy machine took for what came before
    monkeypatch.setattr(threads, "hangs", 10)
    assert sum("is slow: another does the same" in note for note in with_workers(config, 2)) >= 1


def test_who_is_still_coming_up_at_the_end_asks_nobody_after_it(config, threads, monkeypatch):
    """Ray ends a process that asks it for anything after that."""
    with_workers(config, 2)
    threads.faults.update({len(threads.latest.asked): "die"})  # the last errand: another worker is started for it
    opened, after, coming = Worker.open, [], []

    def slowly(self, opening):
        if len(threads.latest.started) > 2:
            coming.append(self)
            time.sleep(1)
        return opened(self, opening)

    def watched(name):
        own = getattr(Threads, name)

        def call(self, *args):
            if self.ended.is_set():
                after.append(name)
            return own(self, *args)

        return call

    monkeypatch.setattr(Worker, "open", slowly)
    for name in ("start", "ask", "answer", "end"):
        monkeypatch.setattr(Threads, name, watched(name))
    with_workers(config, 2)
    assert len(coming) == 1
    time.sleep(0.2)
    assert after == []


def test_work_that_no_worker_survives_ends_the_run_which_resumes(config, threads):
    several = load_config(config, {"output_dir": "several", "workers": 2})
    threads.faults.update(dict.fromkeys(range(1, 25), "") | {0: "die"})
    with pytest.raises(OlmfastError, match=r"5 were lost over the same work .*--resume continues") as failed:
        run(several, overwrite=True)
    assert failed.value.exit_code == 1
    threads.faults.clear()
    run(several, resume=True)
    assert_same(outcome(config.parent / "one"), outcome(several.output_dir))


@pytest.mark.usefixtures("threads")
def test_a_worker_elsewhere_is_sent_donors_and_refined_tensors(config, tmp_path, monkeypatch):
    """One that sees neither the donors' folders nor the run's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = Worker.open

    def far_away(self, opening):
        nowhere = tmp_path / "nowhere"
        moved = tuple(replace(own, folders=tuple(nowhere / part for part in own.parts)) for own in opening.donors)
        return opened(self, replace(opening, donors=moved, folder=nowhere))

    monkeypatch.setattr(Worker, "open", far_away)
    notes = with_workers(config, 2)
    assert list((config.parent / "one" / "refined").iterdir())
    assert sum("is sent to" in note for note in notes) in (2, 3, 4)  # by both workers, unless one finds it in time
    assert len(list((tmp_path / "cache" / "olmfast" / "donors").iterdir())) == 2


@pytest.mark.parametrize("other", ["tied", "base+adapter"])
def test_a_donor_that_is_sent_is_known_by_its_bytes(tmp_path, monkeypatch, other):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny_model(tmp_path / "base")
    if other == "tied":
        tiny_model(tmp_path / other, tie_word_embeddings=True)
    else:
        pytest.importorskip("peft")
        tiny_adapter(tmp_path / "adapter", base)
    pool = Pool.open(["base", other], tmp_path, tmp_path)
    nowhere = (tmp_path / "x", tmp_path / "y")
    told = [replace(Described.of(donor), folders=nowhere[: len(donor.made_of)]) for donor in pool]
    shelf = Shelf(told, pool.digests.known)
    assert list(shelf.missing()) == ["base", other]
    for donor in pool:
        for part, path in Described.of(donor).files():
            shelf.receive(donor.name, part, path.name, path.read_bytes())
        shelf.receive(donor.name, 0, "", b"")
    own = shelf.pool()  # whose donors offer the same tensors, also the one without a head of its own
    assert [donor.fingerprint() for donor in own] == [donor.fingerprint() for donor in pool]
    assert not list(Shelf(told, ()).missing())  # kept for later
    weights = next((tmp_path / "cache").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    shelf = Shelf(told, ())
    missing = list(shelf.missing())
    assert missing
    for name in missing:  # a damaged one gives way
        for part, path in Described.of(pool[name]).files():
            shelf.receive(name, part, path.name, path.read_bytes())
        shelf.receive(name, 0, "", b"")
    assert len(shelf.pool()) == 2


@pytest.mark.usefixtures("threads")
def test_a_worker_that_would_score_otherwise_is_left_out(tmp_path, monkeypatch):
    config = tiny_run(tmp_path, 2, layer_swap=True)
    opened = Worker.open

    def older(self, opening):
        report = opened(self, opening)
        return replace(report, environment={**report.environment, "torch": "2.0"})

    monkeypatch.setattr(Worker, "open", older)
    with pytest.raises(OlmfastError, match=r"workers: none is left \(.*torch is 2.0 instead of "):
        run(load_config(config, {"workers": 2}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": "many"}, "workers"),
        ({"ray": {"adress": "auto"}}, "ray.adress: unknown key; did you mean 'address'?"),
        ({"workers": 2, "dataflow": {}}, "workers, ray: a search of paths and pruning run in one process"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        load_config(tiny_run(tmp_path, 2), keys)


def test_without_ray_a_run_with_workers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"workers: Ray is not installed; pip install 'olmfast\[cluster\]'"):
        run(load_config(tiny_run(tmp_path, 2), {"workers": 2}))


def test_the_documentation_says_what_is_computed_for_a_thousand_workers(capsys):
    root = Path(__file__).parents[1]
    runpy.run_path(str(root / "examples" / "cluster" / "ceilings.py"), run_name="__main__")
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split()[-6:] == ["1", "2", "8", "64", "1000", "errands"]
    rows = [line.rsplit(maxsplit=6) for line in lines]
    table = [
        [cell.strip().replace(",", "") for cell in row.split("|")[1:-1]]
        for row in (root / "docs" / "cluster.md").read_text().splitlines()
        if row.count("|") == 7
    ]
    told = {cells[0]: cells[1:] for cells in table}
    for name, _, *gains in rows:
        assert told[name.replace(",", "").strip()] == gains


class Killer(Notes):
    """Kills a worker once the second step has been taken."""

    steps, killed = 0, ()

    def chosen(self, outcome):  # noqa: ARG002
        self.steps += 1
        if self.steps == 2:
            own = [one for one in psutil.Process().children(recursive=True) if "ray::Worker" in " ".join(one.cmdline())]
            self.killed = own
            os.kill(own[0].pid, signal.SIGKILL)


def test_on_ray_two_workers_of_which_one_is_killed_decide_as_one_process(config):
    pytest.importorskip("ray")
    killer = Killer()
    several = run(load_config(config, {"output_dir": "on_ray", "workers": 2}), observer=killer)
    assert_same(outcome(config.parent / "one"), outcome(several.output_dir))
    assert len(killer.killed) == 2
    assert any("is lost (its process has ended)" in note for note in killer.notes), killer.notes
    assert not [one for one in psutil.Process().children(recursive=True) if "ray" in one.name()]  # none is left
