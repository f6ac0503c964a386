"""Static merges beside mergekit's, on the same machine in the same run.

    OLMFAST_MERGEKIT=build/parity/bin/python pytest bench/test_merge.py --benchmark-only

Two models of 0.5 B parameters in bfloat16 and the one they come from (random weights, the shapes of Qwen2.5-0.5B) are
merged by linear, slerp and ties. Each merge is a process of its own, alternating between the two tools; CPU and wall
seconds are counted from when its imports are done, without the thread that watches the memory.
`make build/parity/installed` makes the environment with mergekit; without the variable olmfast is measured alone. The
limit is `cp` plus sync of as many bytes. How a result is written is measured apart: past the page cache, and through it
as on a file system that refuses. One round, or with OLMFAST_BENCH_ALL=1 the medians of three. Needs 6 GB of
disk.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from figures import TINY, room, sized

from olmfast import _shards

pytestmark = pytest.mark.timeout(0)
ROUNDS = sized(1, 1, 3)
QWEN = (24, 896, 4864, 128, 151936)
BLOCKS, WIDTH, INNER, KEYS, WORDS = sized((2, 56, 64, 8, 100), QWEN, QWEN)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MERGES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [{"model": "one", "parameters": {"weight": 0.6}}, {"model": "two", "parameters": {"weight": 0.4}}],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "one",
        "models": [{"model": "one"}, {"model": "two"}],
        "parameters": {"t": 0.4},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")],
    },
}
WATCH = """
import json, re, sys, threading, time
from pathlib import Path

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def watched(call):
    before = peak = anonymous()
    done = threading.Event()
    watching = 0.0
    def watch():
        nonlocal peak, watching
        while not done.wait(0.02):
            peak = max(peak, anonymous())
        watching = time.thread_time()
    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    growth = max(peak, anonymous()) - before
    print(json.dumps({"wall": wall, "cpu": cpu - watching, "growth": growth}))
"""
OURS = """
import olmfast
merge = olmfast.merge
assert "transformers" not in sys.modules
watched(lambda: merge(sys.argv[1], sys.argv[2]))
assert "transformers.models.qwen2.modeling_qwen2" not in sys.modules
"""
THEIRS = """
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
watched(lambda: run_merge(config, sys.argv[2], MergeOptions(quiet=True, write_model_card=False)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with room(tmp_path_factory, "merge", 6e6 if TINY else 6e9) as folder:
        write_models(folder)
        yield folder


def write_models(folder: Path) -> None:
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for block in range(BLOCKS):
        at = f"model.layers.{block}"
        for name, rows in (("q", WIDTH), ("k", KEYS), ("v", KEYS)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    base = {name: torch.randn(s, generator=dice(0)).mul_(0.02).bfloat16() for name, s in shapes.items()}
    for seed, name in enumerate(("base", "one", "two")):
        own = base
        if seed:
            noise = dice(seed)
            own = {k: (v + torch.randn(v.shape, generator=noise) * 0.0004).bfloat16() for k, v in base.items()}
        (folder / name).mkdir()
        save_file(own, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    for name, merge in MERGES.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump({**_with_paths(merge, folder), "dtype": "bfloat16"}))


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_paths(merge: dict[str, Any], folder: Path) -> dict[str, Any]:
    models = [{**entry, "model": str(folder / entry["model"])} for entry in merge["models"]]
    base = {"base_model": str(folder / merge["base_model"])} if "base_model" in merge else {}
    return {**merge, "models": models, **base}


def measured(python: str, program: str, config: Path, out: Path) -> dict[str, float]:
    subprocess.run(["rm", "-rf", str(out)], check=True)
    os.sync()
    done = subprocess.run(
        [python, "-c", WATCH + program, str(config), str(out)], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def copied(source: Path, target: Path) -> float:
    """Bytes per second of `cp` and sync, reading from the page cache as a merge does."""
    began = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    rate = source.stat().st_size / (time.perf_counter() - began)
    target.unlink()
    return rate


@pytest.mark.parametrize("method", sized(["ties"], list(MERGES), list(MERGES)))
def test_a_merge_beside_mergekits(benchmark: Any, report: Callable[..., None], folder: Path, method: str) -> None:
    mergekit = os.environ.get("OLMFAST_MERGEKIT")
    config, ours, theirs, rates = folder / f"{method}.yml", [], [], []
    for _ in range(ROUNDS):
        rates.append(copied(folder / "one" / "model.safetensors", folder / "copy"))
        ours.append(measured(sys.executable, OURS, config, folder / "ours"))
        if mergekit:
            theirs.append(measured(mergekit, THEIRS, config, folder / "theirs"))
    benchmark.pedantic(lambda: None, rounds=1)
    n_bytes = (folder / "one" / "model.safetensors").stat().st_size
    mine = {key: statistics.median(run[key] for run in ours) for key in ours[0]}
    share = n_bytes / mine["wall"] / statistics.median(rates)
    more = {"wall": f"{mine['wall']:.2f} s", "RssAnon_growth": f"{mine['growth'] / 1e6:.0f} MB"}
    rival, ratio = "-", None
    if theirs:
        other = {key: statistics.median(run[key] for run in theirs) for key in theirs[0]}
        rival, ratio = f"mergekit {other['cpu']:.2f} CPU s", other["cpu"] / mine["cpu"]
        more |= {"mergekit_wall": f"{other['wall']:.2f} s", "wall_ratio": f"{other['wall'] / mine['wall']:.1f}x"}
        more |= {"mergekit_growth": f"{other['growth'] / 1e6:.0f} MB"}
    case = f"{method} of two models, {n_bytes / 1e9:.2f} GB"
    report(case, f"{mine['cpu']:.2f} CPU s", rival, ratio, f"{share:.0%} of cp's rate", **more)
    assert mine["growth"] < 300e6


def written(path: Path, n_bytes: int, direct: bool) -> dict[str, float]:
    """CPU and wall seconds of writing a file as a merge does, a buffer at a time, until it is on the disk."""
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    output = _shards.Output(path, n_bytes)
    output._direct = direct
    for at in range(0, n_bytes, _shards.ROOM_BYTES):
        output.room(at, min(_shards.ROOM_BYTES, n_bytes - at))
    output.finish()
    after = resource.getrusage(resource.RUSAGE_SELF)
    path.unlink()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - began}


def test_writing_past_the_page_cache(benchmark: Any, report: Callable[..., None], folder: Path) -> None:
    n_bytes = sized(1 << 20, 1 << 30, 1 << 30)
    runs = [(written(folder / "past", n_bytes, True), written(folder / "past", n_bytes, False)) for _ in range(ROUNDS)]
    benchmark.pedantic(lambda: None, rounds=1)
    past, through = ({key: statistics.median(run[i][key] for run in runs) for key in ("cpu", "wall")} for i in (0, 1))
    more = {"wall": f"{past['wall']:.2f} s", "wall_through": f"{through['wall']:.2f} s"}
    rival, ratio = f"through it {through['cpu']:.2f} CPU s", through["cpu"] / max(past["cpu"], 1e-3)
    report(f"{n_bytes / 1e9:.2f} GB past the page cache", f"{past['cpu']:.3f} CPU s", rival, ratio, **more)
