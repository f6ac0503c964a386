"""A model whose blocks visit the device in turns: the same scores, slopes, decisions and bytes as one that fits."""

from __future__ import annotations

import json
import os
import random
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from olmfast import run
from olmfast.config.datasets import DatasetConfig
from olmfast.config.run import load_config
from olmfast.errors import FileChanged, OlmfastError
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.blueprint import draw_up
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.memory import Memory
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate, Direction
from olmfast.evaluation.upload import Uploader, marked
from olmfast.search import coefficients
from olmfast.testing import skilled_run, sums, tiny_model, tiny_run, tiny_tokenizer, write_dataset
from olmfast.weights.by_row import by_row
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.filing import Wanted, filed
from olmfast.weights.offspring import NormOffspring, SvdOffspring
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MODES = {
    "free.json": {"mode": "exact_match"},
    "loss.json": {"mode": "exact"},
    "words.json": {"mode": "diversity", "max_new_tokens": 5},
    "choice.json": {"mode": "choice"},
}
N_BLOCKS = 4


class World:
    """Donors and questions that no other run has seen, and a scorer on a resident and on a streamed model."""

    def __init__(self, folder: Path, family: str, dtype=torch.float64, saved=torch.float32, **config):
        dice = random.Random()
        print("seed", seed := dice.randrange(1 << 30))
        for i in range(3):
            config = {"num_hidden_layers": N_BLOCKS, "n_layer": N_BLOCKS, **config}
            tiny_model(folder / f"d{i}", family, seed + i, dtype=saved, **config)
        self.pool = Pool.open(["d0", "d1", "d2"], folder, folder)
        ragged = 0 if family == "gemma2" else 4  # Transformers' attention turns its left padding into NaN in float64
        texts = [(f"{q:x>{6 + i % (ragged + 1)}}", f"{a}{'y' * (i % 3)}") for i, (q, a) in enumerate(sums(6, seed))]
        for name in MODES:
            write_dataset(folder / name, texts)
        items = [
            {"prompt": q, "response": "-", "choices": list("abc"), "answer": i % 3} for i, (q, _) in enumerate(texts)
        ]
        (folder / "choice.json").write_text(json.dumps(items))
        entries = {name: DatasetConfig(**keys) for name, keys in MODES.items()}
        datasets = load_datasets(folder, entries, tiny_tokenizer(), self.pool.architecture.context)
        recipe = whole("d0", self.pool.tensors)
        self.tensors = draw_up(recipe, self.pool, dtype).tensors
        self.models = [WorkingModel(recipe, Sources(self.pool, folder), CPU, dtype, bool(i)) for i in range(2)]
        # A batch is narrower than all questions of a dataset, and several candidates take several passes.
        told = (datasets, tiny_tokenizer(), [4, 20, 21], 100)
        self.resident, self.streamed = (BatchedScorer(model, *told) for model in self.models)
        self.samples = {name: list(range(len(own.samples))) for name, own in datasets.items() if name != "words.json"}
        self.directions = {
            name: [Direction(Copy("d0", name), Copy(donor, name)) for donor in ("d1", "d2")] for name in self.tensors
        }

    @property
    def buffers(self):
        return self.models[1].residency.buffers

    def commit(self, candidate):
        recipe = candidate.of(self.models[0].recipe)
        for scorer in (self.resident, self.streamed):
            scorer.commit(recipe, candidate.label)

    def block(self, *blocks):
        return self.pool.architecture.window_unit(self.tensors, blocks)

    def donors(self, unit):
        return [Candidate("now"), *(Candidate(d, {n: Copy(d, n) for n in unit.tensors}) for d in ("d1", "d2"))]

    def offspring(self, name):
        told = (Copy("d0", name), "float32", 0.05, 5, name, 0)
        axis = self.pool.architecture.row_axis(name)
        return [
            *(Candidate(f"svd{i}", {name: SvdOffspring(*told, i)}) for i in range(3)),
            *(Candidate(f"norm{i}", {name: NormOffspring(*told, i, axis)}) for i in range(2)),
        ]

    def blend(self, label, *weights):
        """All tensors between the donors, matrices of blocks by other shares in every row."""
        values = {}
        for name in self.tensors:
            info, terms = self.pool["d0"].tensors[name], [Copy("d1", name), Copy("d2", name)]
            if len(info.shape) == 2 and self.pool.architecture.block_of(name) is not None:
                shares = torch.rand(2, info.shape[0])
                values[name] = by_row(Copy("d0", name), terms, Copy("d0", name), shares, 0)
            else:
                values[name] = merge("task_arithmetic", terms, Copy("d0", name), weight=weights)
        return Candidate(label, values)

    def assert_same_scores(self, unit, candidates):
        first, second = (scorer.score(unit, candidates) for scorer in (self.resident, self.streamed))
        for name in first.samples:
            assert torch.equal(first.truncated[name], second.truncated[name])
            torch.testing.assert_close(second.samples[name], first.samples[name], rtol=1e-9, atol=1e-9, equal_nan=True)


def all_nan(model):
    names = [name for name in model.recipe.tensors if model.architecture.block_of(name) is not None]
    return all(bool(model.live(name).isnan().all()) for name in names)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "mixtral"])
def test_scores_and_slopes_are_those_of_the_resident_model(family, tmp_path):
    world = World(tmp_path, family)
    unit, model_unit = world.block(2), world.pool.architecture.model_unit(world.tensors)
    modules = world.pool.architecture.module_units(world.tensors)
    matrix = next(u for u in modules if u.blocks == (1,) and len(world.pool["d0"].tensors[u.tensors[0]].shape) == 2)
    world.assert_same_scores(unit, world.donors(unit))
    world.commit(world.donors(unit)[2])
    world.assert_same_scores(matrix, world.offspring(matrix.tensors[0]))
    world.assert_same_scores(model_unit, [Candidate("now"), world.blend("a", 0.3, 0.5), world.blend("b", 0.6, 0.1)])
    world.commit(world.blend("a", 0.3, 0.5))
    world.assert_same_scores(world.block(1, 3), world.donors(world.block(1, 3)))
    weights = dict.fromkeys(world.samples, 1.0)
    teachers = {name: Candidate("d2", recipe=whole("d2", world.pool.tensors)) for name in world.samples}
    asked = (world.blend("c", 0.2, 0.4), world.directions, world.samples, weights, teachers)
    first, second = (scorer.slopes(*asked) for scorer in (world.resident, world.streamed))
    assert second.losses == pytest.approx(first.losses, rel=1e-9)
    size = max(float(values.abs().max()) for values in first.along.values())
    for name, values in first.along.items():
        torch.testing.assert_close(second.along[name], values, rtol=1e-9, atol=1e-9 * size)
    assert size > 0
    assert all_nan(world.models[1])


# Whole runs


@pytest.fixture
def streaming(monkeypatch):
    """As under a limit that the model does not fit; says how many were built so."""
    built, build = [], WorkingModel.__init__

    def watched(self, recipe, sources, device, dtype, streamed=False):
        built.append(streamed)
        build(self, recipe, sources, device, dtype, streamed)

    monkeypatch.setattr(WorkingModel, "__init__", watched)
    monkeypatch.setattr(Memory, "streams", lambda *_: True)
    return built


def decided(folder: Path) -> list[tuple]:
    """Every step of a run: what won, and what it changed in the recipe."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["entry"] == "step"]
    return [(one["key"], one["outcome"]["winner"], one["outcome"]["changed"], one["change"]) for one in steps]


def result_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Killed(BaseException):
    pass


def killed_after(n, config, monkeypatch):
    """Run until the n-th call of the scorer, which is never answered."""
    score, calls = BatchedScorer.score, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise Killed
        return score(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BatchedScorer, "score", dies)
        with pytest.raises(Killed):
            run(config)


def test_a_joint_search_decides_the_same_killed_or_not(tmp_path, streaming, monkeypatch):
    for grain in ("part", "row", "tensor"):
        monkeypatch.setitem(coefficients.GRAINS, grain, 6)
    config = skilled_run(tmp_path, n=12, budget=40, mode="exact", n_blocks=3, significance=0.5)
    killed_after(6, load_config(config), monkeypatch)
    run(config, resume=True)
    assert set(streaming) == {True}
    monkeypatch.setattr(Memory, "streams", lambda *_: False)
    resident = run(load_config(config, {"output_dir": str(tmp_path / "resident")}))
    assert streaming[-1] is False
    assert any(one.changed for key, one in resident.record.steps.items() if key.startswith("gradient"))
    assert decided(tmp_path / "out") == decided(tmp_path / "resident")
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "resident")


STAGES = {
    "scales": ["kind", "block", "tensor"], "units": ["*.0.self_attn.q_proj", "*.2.mlp.up_proj", "boundary"],
    "es_svd": True, "es_norm": True, "es_svd_generations": 1, "es_norm_generations": 1,
}  # fmt: skip


def test_a_search_by_stages_decides_the_same(tmp_path, streaming, monkeypatch):
    config = tiny_run(tmp_path, 2, model={"num_hidden_layers": 3}, **STAGES)
    streamed = run(config)
    monkeypatch.setattr(Memory, "streams", lambda *_: False)
    run(load_config(config, {"output_dir": str(tmp_path / "resident")}))
    assert streaming == [True, False]
    assert {one.stage for one in streamed.record.steps.values() if one.changed} >= {"layers", "svd_es"}
    assert decided(tmp_path / "out") == decided(tmp_path / "resident")
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "resident")


# Blocks and their buffers


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donors")
    for seed in range(2):
        tiny_model(folder / f"d{seed}", seed=seed, num_hidden_layers=5)
    return folder


def streamed(folder: Path, names=("d0", "d1")) -> WorkingModel:
    pool = Pool.open(list(names), folder, folder)
    return WorkingModel(whole(names[0], pool.tensors), Sources(pool, folder), CPU, torch.float32, streamed=True)


def test_a_block_has_its_values_while_it_is_visited_and_the_next_one_comes_meanwhile(donors):
    model = streamed(donors)
    buffers, visit = model.residency.buffers, model.residency.visit
    for block in (*range(5), *reversed(range(4)), 0, 1):
        with visit(block), visit(block):
            for name in (n for n in model.recipe.tensors if model.architecture.block_of(n) == block):
                assert torch.equal(model.live(name), model.sources.pool["d0"].read(name))
        assert all_nan(model)
    # Those that turn out not to be next at the two turns are fetched in vain; none but the first was asked for before.
    assert buffers.fetched <= 5 + 4 + 2 + 3
    largest = sum(model.live(n).nbytes for n in model.recipe.tensors if model.architecture.block_of(n) == 0)
    held = sum(one.memory.nbytes for one in buffers.each)
    assert 2 * largest <= held < 2 * largest + 2 * 256 * 12


def test_a_call_fetches_each_block_once_whatever_its_batches(tmp_path):
    world = World(tmp_path, "llama", torch.float32)
    unit, buffers = world.block(1), world.buffers
    world.streamed.score(unit, [Candidate("now")])  # finds the trajectories
    along = ["loss.json", "choice.json"]  # nothing is decoded
    passes, before = world.streamed.statistics.passes, buffers.fetched
    world.streamed.score(unit, world.donors(unit), along)
    assert world.streamed.statistics.passes - passes > 3
    # From the unit's block on, for the current model and for the others at once; and at most two in vain.
    assert buffers.fetched - before <= 2 * (N_BLOCKS - 1) + 2
    world.streamed.shares.sweep_bytes, before = 0, buffers.fetched
    world.streamed.score(unit, world.donors(unit), along)
    assert buffers.fetched - before > 3 * (N_BLOCKS - 1)  # for every pass


def open_files() -> int:
    """How many files without a name this process has open, once the thread that fetches has let go of what it read."""
    time.sleep(0.2)
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found += os.readlink(f"/proc/self/fd/{number}").endswith("(deleted)")
    return found


def test_values_that_are_computed_lie_in_a_file_until_nobody_wants_them(donors):
    model = streamed(donors)
    name = "model.layers.3.mlp.up_proj.weight"
    value = merge("linear", [Copy("d0", name), Copy("d1", name)], weight=(0.25, 0.75), normalize=False)
    before = open_files()
    with model.trial(Candidate("blend", {name: value})):
        assert open_files() == before + 1
        assert model.equals(name, value.value(model.sources))
    assert open_files() == before
    assert model.equals(name, model.sources.pool["d0"].read(name))
    model.set_recipe(model.recipe.with_values({name: value}))
    with model.trial(Candidate("donor", {name: Copy("d1", name)})):
        assert model.equals(name, model.sources.pool["d1"].read(name))
        assert open_files() == before + 1
    assert model.equals(name, value.value(model.sources))
    other = Candidate("other", recipe=whole("d1", model.recipe.tensors))
    with model.trial(other):
        assert model.equals(name, model.sources.pool["d1"].read(name))
    assert model.equals(name, value.value(model.sources))
    assert not [path for path in donors.iterdir() if path.is_file()]


def test_a_candidate_with_a_config_of_its_own_takes_turns_in_the_same_buffers(tmp_path):
    tiny_model(tmp_path / "d0", num_hidden_layers=3)
    tiny_model(tmp_path / "d1", seed=1, num_hidden_layers=3, rope_theta=777.0)
    model = streamed(tmp_path)
    ids = torch.arange(12)[None]
    plain = WorkingModel(model.recipe, model.sources, CPU, torch.float32)
    other = Candidate("other", recipe=whole("d1", model.recipe.tensors))
    with torch.inference_mode():
        for _ in range(2):
            with model.trial(other), plain.trial(other):
                assert torch.equal(model.module(ids).logits, plain.module(ids).logits)
            assert torch.equal(model.module(ids).logits, plain.module(ids).logits)
    assert len(model.residency.buffers.each) == 2


@pytest.mark.parametrize("way", ["upload", "send", "read"])
@pytest.mark.parametrize("device", DEVICES)
def test_bytes_sent_through_small_buffers_arrive(device, way, donors):
    pool, device = Pool.open(["d0"], donors, donors), torch.device(device)
    infos = list(pool["d0"].tensors.values())
    targets = [torch.empty(info.shape, dtype=torch.float64, device=device) for info in infos]
    pairs, uploader = list(zip(infos, targets, strict=True)), Uploader(device, buffer_bytes=1000, stage_bytes=1000)
    for _ in range(3):  # the same buffers again
        for target in targets:
            target.zero_()
        if way == "send":
            arrived = uploader.send(pairs, marked(torch.cuda.current_stream()) if device.type == "cuda" else None)
            if arrived is not None:
                arrived.synchronize()
        else:
            getattr(uploader, way)(pairs)
        for info, target in zip(infos, targets, strict=True):
            assert torch.equal(target.cpu(), info.read().to(torch.float64))


# What goes wrong


def test_a_donor_that_changes_is_named_when_its_block_comes(tmp_path):
    tiny_model(tmp_path / "d0", num_hidden_layers=4)
    model = streamed(tmp_path, ["d0"])
    with model.residency.visit(0):
        pass
    (tmp_path / "d0" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(OlmfastError, match=r"model\.safetensors: .*(changed|shrank)"):
        model.module(torch.arange(5)[None])


def test_what_is_sent_while_an_error_is_on_its_way_arrives(tmp_path):
    for seed in range(2):
        tiny_model(tmp_path / f"d{seed}", seed=seed, hidden_size=256, intermediate_size=768)
    pool = Pool.open(["d0", "d1"], tmp_path, tmp_path)
    infos = {donor: list(pool[donor].tensors.values()) for donor in pool.names}
    targets = [torch.empty(info.shape) for info in infos["d0"]]
    uploader, file = Uploader(CPU, buffer_bytes=1 << 16), tmp_path / "d1" / "model.safetensors"
    uploader.upload(zip(infos["d1"], targets, strict=True))
    os.truncate(file, file.stat().st_size // 8)
    for _ in range(20):
        try:
            uploader.upload(zip(infos["d1"], targets, strict=True))
        except FileChanged:
            uploader.upload(zip(infos["d0"], targets, strict=True))
        for info, target in zip(infos["d0"], targets, strict=True):
            assert torch.equal(target, info.read())


def test_a_full_disk_is_told(donors, monkeypatch):
    class Full:
        def __init__(self, dir):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("olmfast.weights.filing.tempfile.TemporaryFile", Full)
    pool = Pool.open(["d0"], donors, donors)
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = {name: Wanted(Copy("d0", name), torch.float32, pool["d0"].tensors[name].shape)}
    with pytest.raises(OlmfastError, match=rf"{donors}: No space left on device; 0\.00 GB of computed weights"):
        filed(wanted, Sources(pool, donors))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of one model of five blocks, of 30 MB each."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 5, "initializer_range": 0.02}
    return tiny_run(folder, 1, model={"dtype": torch.bfloat16, **shape}, scales=["block"])


@pytest.fixture
def below(large, monkeypatch, olmfast):
    """Plan the run where the libraries take 500 MB and so many blocks are allowed beside: code, output, errors."""
    monkeypatch.setattr(Memory, "used", 500_000_000)  # what the process holds itself changes from call to call

    def plan(blocks, *options):
        return olmfast("check", large, "--set", f"max_ram={500_000_000 + int(blocks * 30e6)}", *options)

    return plan


def test_a_plan_says_that_blocks_are_streamed(below):
    code, out, _ = below(4)
    assert code == 0
    assert re.search(r"the model takes 14\d\.\d MB, .* its blocks are streamed", out)
    told = json.loads(below(4, "--json")[1])
    assert told["streams"] is True
    assert 560e6 < told["memory_bytes"] < told["memory_limit_bytes"] == 620e6 < 500e6 + told["model_bytes"]
    code, out, _ = below(9)
    assert code == 0
    assert "streamed" not in out


def test_less_than_two_blocks_is_an_error_that_says_what_is_needed(below):
    code, _, err = below(2)
    assert code == 2
    assert re.search(r"max_ram: 0\.56 GB; .* take 0\.64 GB, and at least 0\.57 GB with its blocks streamed", err)


def test_the_sequential_scorer_says_who_streams(below):
    code, _, err = below(4, "--set", "scorer=sequential")
    assert code == 2
    assert "scorer: sequential evaluates whole models, and this one does not fit" in err
