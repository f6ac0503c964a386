"""Where new capabilities enter: a kind of expression, a Scorer of another process, a model of another depth."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from olmfast import load_config, run
from olmfast.evaluation.scorer import Candidate
from olmfast.observer import Observer
from olmfast.output.writer import Content, OutputTensor, content_of, in_order, write_folder
from olmfast.runs.folder import RunFolder
from olmfast.runs.inputs import Inputs
from olmfast.runs.session import Session
from olmfast.search.loop import Step
from olmfast.search.record import Record
from olmfast.static.plan import Plan
from olmfast.static.write import write_merge
from olmfast.testing import tiny_run
from olmfast.weights.chunks import Held
from olmfast.weights.expressions import Copy, Stored, merge, whole
from olmfast.weights.offspring import NormOffspring
from olmfast.weights.sources import Expression, expression_from_json

NAME = "model.layers.1.mlp.up_proj.weight"


@contextmanager
def session(config_file: Path, *, resume: bool = False, **keys: Any):
    """The engine of a run, ready to walk."""
    config = load_config(config_file, keys)
    inputs = Inputs.open(config, Observer())
    folder = RunFolder(config.output_dir, resume=resume, overwrite=False)
    with folder.locked(inputs.header(), inputs.pool) as record:
        yield Session(config, inputs, record, Observer(), lambda: False)


def test_a_new_kind_of_expression_is_one_class(tmp_path):
    @dataclass(frozen=True)
    class Negated(Expression):
        key: ClassVar[str] = "negated"
        of: Expression

        @property
        def parts(self):
            return (self.of,)

        def to_json(self):
            return {"negated": self.of.to_json()}

        @classmethod
        def from_json(cls, entry):
            return cls(expression_from_json(entry["negated"]))

        def open(self, sources, memory=None):  # noqa: ARG002
            return Held(-self.of.value(sources))

    config, toy = tiny_run(tmp_path, 2), Negated(Copy("donor1", NAME))
    tries = []

    def step(search):
        propose = lambda: tries.append(1) or [Candidate("current"), Candidate("negated", {NAME: toy})]  # noqa: E731
        unit = search.architecture.window_unit(search.tensors, [1])
        return Step("toy/1", "toy", unit, propose, accept=lambda *_: [1])

    with session(config) as engine:  # search and report
        scores = engine.search.take(step(engine.search)).metrics["more.json"]
        assert scores["current"] != scores["negated"]
    with session(config, resume=True) as engine:  # resume: the step is not taken again
        assert engine.search.take(step(engine.search)).winner == "negated"
        assert engine.search.recipe.tensors[NAME] == toy
        engine.write()
        out, pool = engine.record.folder, engine.inputs.pool
        assert Record.load(out).recipe == engine.search.recipe
    expected = -pool["donor1"].read(NAME)
    assert torch.equal(load_file(out / "model.safetensors")[NAME], expected)
    assert len(tries) == 1
    tensors = [OutputTensor(n, i.dtype, i.shape, Copy("donor0", n)) for n, i in pool["donor0"].tensors.items()]
    tensors = in_order([t if t.name != NAME else OutputTensor(NAME, t.dtype, t.shape, toy) for t in tensors])
    base = pool["donor0"]
    plan = Plan("toy", pool, Content(tensors, base, base.config, base), "toy")  # plan
    assert plan.n_bytes_read == base.n_bytes
    assert "1 computed" in write_merge(plan, tmp_path / "static").account
    assert torch.equal(load_file(tmp_path / "static" / "model.safetensors")[NAME], expected)


WORKER = """
import pickle, sys
from multiprocessing.connection import Client
from pathlib import Path
from olmfast import load_config
from olmfast.evaluation.open import Evaluation
from olmfast.observer import Observer
from olmfast.runs.inputs import Inputs
from olmfast.weights.expressions import whole

config = load_config(Path(sys.argv[1]))
inputs = Inputs.open(config, Observer())
recipe = whole(config.base_name, inputs.pool.tensors)
scorer = Evaluation(recipe, inputs.pool, inputs.settings, Path(sys.argv[2])).scorer(inputs.selection)
with Client(sys.argv[3]) as connection:
    while (call := pickle.loads(connection.recv_bytes())) is not None:
        name, arguments = call
        answer = getattr(scorer, name)
        connection.send_bytes(pickle.dumps(answer(*arguments) if callable(answer) else answer))
"""


class RemoteScorer:
    """A Scorer of another process, which opens the donors for itself; only messages go between the two."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.largest = connection, 0

    def ask(self, name: str, *arguments: Any) -> Any:
        message = pickle.dumps((name, arguments))
        self.largest = max(self.largest, len(message) if name == "score" else 0)
        self.connection.send_bytes(message)
        return pickle.loads(self.connection.recv_bytes())

    def __getattr__(self, name: str) -> Any:
        return self.ask(name) if name in ("sizes", "state") else partial(self.ask, name)


def test_a_scorer_in_a_second_process_decides_the_same(tmp_path):
    config = tiny_run(
        tmp_path,
        base_select=True,
        layer_swap=True,
        es_svd=True,
        es_norm=True,
        candidates=["swap", {"linear": [0.5]}],
        units=["*.1.self_attn.q_proj"],
    )
    expected = run(load_config(config))
    with session(config, output_dir="apart") as engine, Listener(str(tmp_path / "socket")) as listener:
        address = [str(config), str(engine.record.folder), str(tmp_path / "socket")]
        with subprocess.Popen([sys.executable, "-c", WORKER, *address]) as worker, listener.accept() as connection:
            remote = RemoteScorer(connection)
            engine.search.scorer = remote
            assert engine.search_all() == "finished"
            connection.send_bytes(pickle.dumps(None))
            assert worker.wait(60) == 0
        assert engine.search.recipe == expected.recipe
        assert engine.record.choices() == expected.record.choices()
        assert any(outcome.changed for outcome in expected.record.choices() if outcome.stage == "svd_es")
        assert remote.largest < 20_000  # the donors' blocks have more bytes, and an offspring's matrix


@pytest.mark.parametrize("scorer", ["sequential", "batched"])
def test_a_candidate_may_have_a_block_fewer(scorer, tmp_path):
    config = tiny_run(tmp_path, 2, model={"num_hidden_layers": 3}, scorer=scorer)
    with session(config) as engine:
        search, pool = engine.search, engine.inputs.pool
        kept = [name for name in pool.tensors if pool.architecture.block_of(name) != 2]
        shorter = whole("donor0", kept)
        shorter = type(shorter)(shorter.base, shorter.tensors, {"num_hidden_layers": 2})
        candidates = [Candidate("current"), Candidate("shorter", recipe=shorter)]
        unit = search.architecture.model_unit(search.tensors)
        found = search.take(Step("depth", "depth", unit, lambda: candidates, accept=lambda *_: [1]))
        assert found.metrics["sums.json"]["current"] != found.metrics["sums.json"]["shorter"]
        assert search.recipe == shorter
        assert search.architecture.n_blocks == 2
        block = search.architecture.window_unit(search.tensors, [1])
        swapped = Candidate("donor1", {name: Copy("donor1", name) for name in block.tensors})
        search.take(Step("layers/1", "layers", block, lambda: [Candidate("current"), swapped], accept=lambda *_: [1]))
        out = tmp_path / "written"
        out.mkdir()
        content = content_of(search.recipe, search.sources, pool["donor0"])
        write_folder(content, search.sources, out, 10**9)
        assert "9 of blocks that the result has not" in content.account()
        live = engine.evaluation.model.module
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(loaded(ids).logits, live(ids).logits, rtol=1e-5, atol=1e-5)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, pool["donor1" if name in block.tensors else "donor0"].read(name)), name


def test_all_transient_values_of_a_winner_are_stored(tmp_path):
    config = tiny_run(tmp_path, 2)
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate")]
    changed = {name: NormOffspring(Copy("donor1", name), "float32", 0.1, 0, name, 0, 0) for name in names}
    nested = merge("linear", [Copy("donor0", names[0]), changed[names[0]]], weight=(0.5, 0.5))
    with session(config) as engine:
        search = engine.search
        unit = search.architecture.window_unit(search.tensors, [1])
        for key, values in (("two", changed), ("nested", {names[0]: nested})):
            tried = [Candidate("current"), Candidate(key, values)]
            search.take(Step(key, key, unit, lambda tried=tried: tried, accept=lambda *_: [1]))
            assert all(isinstance(search.recipe.tensors[name], Stored) for name in values)
            for name, value in values.items():
                assert torch.equal(search.sources.value(search.recipe.tensors[name]), search.sources.value(value))
