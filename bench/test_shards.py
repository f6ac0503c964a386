"""The shard engine: swapping a block, writing a merged folder, opening a pool.

    pytest bench/test_shards.py --benchmark-only

A checkpoint of 1 GB (bfloat16, 16 blocks, random weights) is made in a temporary folder, with a second donor
beside it. Ours and the baseline run in turn in one process, medians are compared, results are checked. The
limit of a swap is the faster of two parallel copies of the same bytes from plain memory (torch's own, and one
by plain threads); of writing, `cp` plus sync of the same files. Needs 5 GB of disk and 6 GB of memory; with
OLMFAST_BENCH_ALL=1, 7 GB of disk.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import GPU, room, sized

from olmfast import _shards
from olmfast.evaluation.model import WorkingModel
from olmfast.output.writer import content_of, write_folder
from olmfast.weights.checkpoint import Checkpoint, prefetch
from olmfast.weights.expressions import Copy, merge
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Sources

pytestmark = pytest.mark.timeout(0)
Report = Callable[..., None]
N_BLOCKS = sized(3, 16, 16)
WIDTH, INNER, WORDS = sized((64, 96, 100), (1536, 4096, 16000), (1536, 4096, 16000))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
}


def shapes(n_blocks: int) -> dict[str, list[int]]:
    block = {f"self_attn.{m}_proj": [WIDTH, WIDTH] for m in "qkvo"}
    block |= {"mlp.gate_proj": [INNER, WIDTH], "mlp.up_proj": [INNER, WIDTH], "mlp.down_proj": [WIDTH, INNER]}
    block |= {"input_layernorm": [WIDTH], "post_attention_layernorm": [WIDTH]}
    named = {f"model.layers.{i}.{m}.weight": shape for i in range(n_blocks) for m, shape in block.items()}
    ends = {"model.embed_tokens.weight": [WORDS, WIDTH], "lm_head.weight": [WORDS, WIDTH], "model.norm.weight": [WIDTH]}
    return dict(sorted({**named, **ends}.items()))


def bytes_of(n_blocks: int) -> int:
    """Of a donor's weights."""
    return sum(2 * torch.Size(shape).numel() for shape in shapes(n_blocks).values())


def make_donor(folder: Path, n_blocks: int, seed: int | None) -> None:
    """A Hugging Face folder of random weights; with no seed, a sparse file of zeros."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": n_blocks}))
    header, position = {}, 0
    for name, shape in shapes(n_blocks).items():
        end = position + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if seed is None:
            file.truncate(8 + len(text) + position)
            return
        dice = torch.Generator().manual_seed(seed)
        for shape in shapes(n_blocks).values():
            values = (torch.randn(shape, generator=dice) * 0.02).bfloat16()
            file.write(values.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with room(tmp_path_factory, "pool", 2.2 * bytes_of(N_BLOCKS)) as folder:
        for seed, name in enumerate(("one", "two")):
            make_donor(folder / name, N_BLOCKS, seed)
        yield folder


@pytest.fixture
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For two results at a time."""
    with room(tmp_path_factory, "results", 2.2 * bytes_of(N_BLOCKS)) as folder:
        yield folder


@pytest.fixture
def pool(folder: Path) -> Pool:
    return Pool.open(["one", "two"], folder, folder)


def whole(donor: str, pool: Pool) -> Recipe:
    return Recipe("one", {name: Copy(donor, name) for name in pool.tensors})


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: what a copy too many would show in."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


def growth_while(call: Callable[[], object]) -> int:
    """How much anonymous memory grows at most while `call` runs, read every few milliseconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not hide what this one takes
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(peak, anonymous_bytes()) - before


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def block_of(pool: Pool, donor: str, index: int) -> dict[str, Copy]:
    unit = pool.architecture.window_unit(pool.tensors, [index])
    return {name: Copy(donor, name) for name in unit.tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "bf16 to float32"])
def test_swap_of_one_block(benchmark: Any, report: Report, pool: Pool, dtype: torch.dtype) -> None:
    model = WorkingModel(whole("one", pool), Sources(pool, Path()), torch.device("cpu"), dtype)
    blocks = [block_of(pool, "two", i) for i in range(N_BLOCKS)]
    plain = [{name: pool["two"].read(name) for name in block} for block in blocks]
    n_bytes = sum(pool["two"].tensors[name].n_bytes for name in blocks[0])

    def torch_copy(i: int) -> None:
        for name, value in plain[i].items():
            model.live(name).copy_(value)

    n_threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(n_threads)

    def thread_copy(i: int) -> None:
        """The same without torch's own threads, which suffer most on a machine that does other work as well."""
        torch.set_num_threads(1)
        parts = [(model.live(n).view(-1).tensor_split(8), v.view(-1).tensor_split(8)) for n, v in plain[i].items()]
        pairs = [pair for targets, sources in parts for pair in zip(targets, sources, strict=True)]
        list(workers.map(lambda pair: pair[0].copy_(pair[1]), pairs))
        torch.set_num_threads(n_threads)

    def spoil(i: int) -> None:
        for name in plain[i]:
            model.live(name).zero_()

    for name in pool.tensors:  # no page of the donor is in the process's map yet, all are in the page cache
        (info,) = pool["two"].tensors[name].places()
        info.shard.advise(info.offset, info.n_bytes, "release")
    names = ("torch", "threads", "first", "again", "prefetched")
    times: dict[str, list[float]] = {name: [] for name in names}
    ours = [partial(model.apply, block) for block in blocks]
    before = anonymous_bytes()
    for i in range(N_BLOCKS):
        times["first"].append(timed(ours[i]))
        times["torch"].append(timed(partial(torch_copy, i)))
        times["threads"].append(timed(partial(thread_copy, i)))
        times["again"].append(timed(ours[i]))
    for _ in range(2):
        for i in range(N_BLOCKS):
            for name in blocks[i]:
                (info,) = pool["two"].tensors[name].places()
                info.shard.advise(info.offset, info.n_bytes, "release")
            # In a search, while the block before is evaluated.
            prefetch(info for name in blocks[i] for info in pool["two"].tensors[name].places())
            times["prefetched"].append(timed(ours[i]))
            times["torch"].append(timed(partial(torch_copy, i)))
            times["threads"].append(timed(partial(thread_copy, i)))
            times["again"].append(timed(ours[i]))
    growth = anonymous_bytes() - before
    for i in range(N_BLOCKS):
        spoil(i)
        ours[i]()
        for name, value in plain[i].items():
            assert torch.equal(model.live(name), value.to(dtype))
    benchmark.pedantic(ours[0], rounds=5)
    workers.shutdown()
    into = str(dtype).removeprefix("torch.")
    for kind, pick in (("median", statistics.median), ("best", min)):
        figure = {name: pick(values) for name, values in times.items()}
        limit = min(figure["torch"], figure["threads"])
        rates = {name: f"{n_bytes / seconds / 1e9:.1f} GB/s" for name, seconds in figure.items()}
        shares = {name: f"{limit / figure[name]:.0%}" for name in ("prefetched", "first")}
        report(
            f"swap a block of {n_bytes / 1e6:.0f} MB into {into}, {kind}", rates["again"], f"torch {rates['torch']}",
            figure["torch"] / figure["again"], f"{limit / figure['again']:.0%} of a copy", threads=rates["threads"],
            **shares, RssAnon_growth=f"{growth / 1e6:.1f} MB",
        )  # fmt: skip


def test_swap_against_a_reload(benchmark: Any, report: Report, folder: Path, pool: Pool) -> None:
    from transformers import AutoModelForCausalLM

    model = WorkingModel(whole("one", pool), Sources(pool, Path()), torch.device("cpu"), torch.bfloat16)
    live = dict(model.module.named_parameters())

    def reload() -> None:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "two", dtype=torch.bfloat16)
        with torch.no_grad():
            for name, value in loaded.named_parameters():
                live[name].copy_(value)

    times: list[tuple[float, float]] = []
    for i in range(sized(1, 3, 5)):
        swaps = [timed(partial(model.apply, block_of(pool, "two", j))) for j in range(i * 3, i * 3 + 3)]
        times.append((timed(reload), statistics.median(swaps)))
    benchmark.pedantic(lambda: model.apply(block_of(pool, "two", 0)), rounds=5)
    reload_s, swap_s = (statistics.median(column) for column in zip(*times, strict=True))
    report(
        f"swap a block of {N_BLOCKS}, first touch", f"{swap_s * 1e3:.1f} ms",
        f"from_pretrained and a copy {reload_s * 1e3:.0f} ms", reload_s / swap_s,
    )  # fmt: skip


def mixed(pool: Pool) -> Recipe:
    """Blocks of both donors in turn."""
    block_of = pool.architecture.block_of
    return Recipe("one", {n: Copy("two" if (block_of(n) or 0) % 2 else "one", n) for n in pool.tensors})


def test_writing_a_merged_folder(benchmark: Any, report: Report, folder: Path, pool: Pool, results: Path) -> None:
    source = folder / "one"

    def write(target: Path) -> None:
        target.mkdir()
        sources = Sources(pool, Path())
        write_folder(content_of(mixed(pool), sources, pool["one"]), sources, target, 10**12)

    def copy(target: Path) -> None:
        target.mkdir()
        files = [str(path) for path in source.iterdir()]
        subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)
        subprocess.run(["sync", *(str(target / Path(file).name) for file in files), str(target)], check=True)

    times: list[tuple[float, float]] = []
    for i in range(sized(1, 3, 7)):
        row = {}
        for call in ((write, copy), (copy, write))[i % 2]:
            target = results / f"{call.__name__}{i}"
            row[call.__name__] = timed(partial(call, target))
            if call is write and i == 0:
                check_written(target, pool)
            subprocess.run(["rm", "-r", str(target)], check=True)
            os.sync()
        times.append((row["write"], row["copy"]))
    ours_s, copy_s = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(copy_s / ours_s for ours_s, copy_s in times)
    benchmark.pedantic(lambda: write(results / "last"), rounds=1)
    n_bytes = pool["one"].n_bytes
    report(
        f"write a merged folder of {n_bytes / 1e9:.2f} GB", f"{n_bytes / ours_s / 1e9:.2f} GB/s",
        f"cp and sync {n_bytes / copy_s / 1e9:.2f} GB/s", copy_s / ours_s, f"{copy_s / ours_s:.0%} of cp and sync",
        median_of_ratios=f"{ratio:.2f}x",
    )  # fmt: skip


def check_written(target: Path, pool: Pool) -> None:
    written, sources = Checkpoint(target), Sources(pool, Path())
    for name, expression in list(mixed(pool).tensors.items())[::7]:
        assert torch.equal(written.read(name), sources.value(expression))


@pytest.mark.parametrize("times", sized([1], [1], [1, 4]), ids=lambda times: f"{times} GB")
def test_memory_while_writing(
    benchmark: Any, report: Report, folder: Path, tmp_path_factory: pytest.TempPathFactory, times: int
) -> None:
    """Copied blocks, and in each a matrix that is computed from both donors. 1 GB for each of `times`."""
    with room(tmp_path_factory, "memory", 1.1 * bytes_of(times * N_BLOCKS)) as results:
        places = [folder / "one", folder / "two"]
        if times > 1:  # sparse files, which take no room
            places = [results / "one", results / "two"]
            for place in places:
                make_donor(place, times * N_BLOCKS, None)
        _memory_while_writing(benchmark, report, places, results / "out")


def _memory_while_writing(benchmark: Any, report: Report, places: list[Path], target: Path) -> None:
    pool = Pool([Checkpoint(place, place.name) for place in places])
    computed = [name for name in pool.tensors if name.endswith("mlp.down_proj.weight") or name == "lm_head.weight"]
    recipe = mixed(pool).with_values(
        {name: merge("linear", [Copy("one", name), Copy("two", name)]) for name in computed}
    )
    target.mkdir()

    def write() -> None:
        sources = Sources(pool, Path())
        write_folder(content_of(recipe, sources, pool["one"]), sources, target, 10**12)

    growth = growth_while(lambda: benchmark.pedantic(write, rounds=1))
    largest = max(info.n_bytes for info in pool["one"].tensors.values())
    report(
        f"memory while writing {pool['one'].n_bytes / 1e9:.2f} GB", f"{growth / 1e6:.0f} MB",
        limit=f"{growth / 300e6:.0%} of 300 MB", largest_tensor=f"{largest / 1e6:.0f} MB",
    )  # fmt: skip
    assert growth < 300e6


def test_opening_thirty_donors(benchmark: Any, report: Report, tmp_path: Path) -> None:
    """Sparse files, and one file under many names."""
    n = sized(3, 30, 30)
    make_donor(tmp_path / "first", sized(4, 256, 256), None)
    folders = [tmp_path / "first"]
    for i in range(n - 1):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        for path in folders[0].iterdir():
            os.link(path, folders[-1] / path.name)
    before = anonymous_bytes()
    times = [timed(lambda: [Checkpoint(path) for path in folders]) for _ in range(3)]
    pool = benchmark.pedantic(lambda: [Checkpoint(path) for path in folders], rounds=1)
    growth, elapsed = anonymous_bytes() - before, statistics.median(times)
    report(
        f"open {n} donors of {pool[0].n_bytes / 1e9:.1f} GB, {len(pool[0].tensors)} tensors each",
        f"{elapsed * 1e3:.0f} ms", limit=f"{elapsed:.0%} of a second", RssAnon_growth=f"{growth / 1e6:.0f} MB",
    )  # fmt: skip
    assert elapsed < 1.0


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_swap_of_a_7b_block_to_the_device(benchmark: Any, report: Report, pool: Pool) -> None:
    """Beside the rates of a pinned and a pageable copy, and how much of it a prefetch hides."""
    device = torch.device("cuda")
    model = WorkingModel(whole("one", pool), Sources(pool, Path()), device, torch.bfloat16)
    # As many bytes as one block of a 7B model (405 MB): seven of this model's blocks.
    block = {name: copy for i in range(min(7, N_BLOCKS)) for name, copy in block_of(pool, "two", i).items()}
    n_bytes = sum(pool["two"].tensors[name].n_bytes for name in block)
    pinned = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    pageable, target = torch.ones(n_bytes, dtype=torch.uint8), torch.empty(n_bytes, dtype=torch.uint8, device=device)
    gemm = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)

    def on_device(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def compute() -> None:
        for _ in range(40):
            gemm @ gemm

    def both() -> None:
        compute()
        model.apply(block)

    model.apply(block)
    calls: dict[str, Callable[[], object]] = {
        "swap": partial(model.apply, block),
        "pinned": lambda: target.copy_(pinned, non_blocking=True),
        "pageable": lambda: target.copy_(pageable),
        "compute": compute,
        "both": both,
    }
    times = {name: statistics.median(on_device(call) for _ in range(7)) for name, call in calls.items()}
    benchmark.pedantic(lambda: on_device(calls["swap"]), rounds=3)
    for name in block:
        assert torch.equal(model.live(name).cpu(), pool["two"].read(name))
    hidden = (times["swap"] + times["compute"] - times["both"]) / min(times["swap"], times["compute"])
    rates = {name: f"{n_bytes / times[name] / 1e9:.1f} GB/s" for name in ("swap", "pinned", "pageable")}
    report(
        f"swap {n_bytes / 1e6:.0f} MB to the device", rates["swap"], f"pageable copy {rates['pageable']}",
        times["pageable"] / times["swap"], f"{times['pinned'] / times['swap']:.0%} of a pinned copy",
        hidden_behind_compute=f"{hidden:.0%}",
    )  # fmt: skip


def test_number_of_threads(benchmark: Any, report: Report, pool: Pool) -> None:
    """The default number of threads against others: a swap of one block into float32."""
    model = WorkingModel(whole("one", pool), Sources(pool, Path()), torch.device("cpu"), torch.float32)
    block, usual = block_of(pool, "two", 0), _shards.threads()
    model.apply(block)
    times = {}
    for n in (1, usual, 2 * usual):
        _shards.set_threads(n)
        times[n] = statistics.median(timed(lambda: model.apply(block)) for _ in range(9))
    _shards.set_threads(usual)
    benchmark.pedantic(lambda: model.apply(block), rounds=3)
    rival = min((n for n in times if n != usual), key=lambda n: times[n])
    report(
        f"swap a block into float32, {usual} threads", f"{times[usual] * 1e3:.1f} ms",
        f"{rival} threads {times[rival] * 1e3:.1f} ms", times[rival] / times[usual],
    )  # fmt: skip
