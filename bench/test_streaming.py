"""A joint search whose model does not fit `max_ram`, so that its blocks are streamed, against the same without a limit.

    OMP_NUM_THREADS=1 pytest bench/test_streaming.py --benchmark-only

Three donors in bfloat16, evaluated in float32 on a CPU: 16 blocks of width 512 (200 MB in float32) and, with
OLMFAST_BENCH_ALL=1, 24 of width 1,024 (1.23 GB), 24 questions, few gradient steps. Each search runs in a process of its
own, which watches the peak of its resident set, the libraries' pages included. Seconds are of the processor, threads
that fetch included, so that other work on the machine counts little; on a card, test_large.py has this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from figures import TINY, room, sized
from search_peak import Ran, searched

from olmfast.testing import own_answers, tiny_model

pytestmark = pytest.mark.timeout(0)
Report = Callable[..., None]
N_BLOCKS, WIDTH, INNER, HEADS = sized((4, 32, 48, 4), (16, 512, 1376, 8), (24, 1024, 2816, 16))
# What a limit leaves beside the libraries, as a share of the weights in float32.
SHARE = sized(1e9, 0.75, 0.32)
QUESTIONS, BUDGET = 8, 24
DONORS = ("donor0", "donor1", "donor2")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with room(tmp_path_factory, "streaming", sized(1e8, 1e9, 5e9)) as place:
        for index, name in enumerate(DONORS):
            shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": N_BLOCKS}
            heads: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
            model = place / "models" / name
            tiny_model(
                model, seed=index, dtype=torch.bfloat16, noise=0.2, initializer_range=1.3 / WIDTH**0.5, **shape, **heads
            )
            own_answers(place / f"skill{index}.json", model, QUESTIONS, index)
        config = {
            "models_dir": "models", "output_dir": "out", "models": list(DONORS), "device": "cpu", "dtype": "float32",
            "dataset": {f"skill{index}.json": {"mode": "exact"} for index in range(len(DONORS))},
            "budget": BUDGET, "significance": 0.5, "answers": 0, "samples": 1000,
        }  # fmt: skip
        (place / "cfg.yaml").write_text(yaml.safe_dump(config))
        yield place


def apart(path: Path, limit: int | None) -> Ran:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(searched, path, limit).result()


def test_a_search_under_less_memory_than_the_model_takes(benchmark: Any, report: Report, folder: Path) -> None:
    weights = 4 * N_BLOCKS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
    free = apart(folder / "cfg.yaml", None)
    limit = free.libraries + int(SHARE * weights)
    tight = benchmark.pedantic(apart, (folder / "cfg.yaml", limit), rounds=1)
    report(
        f"search, {weights / 1e6:.0f} MB of weights, max_ram {limit / 1e6:.0f} MB", f"{tight.seconds:.1f} CPU s",
        f"no limit {free.seconds:.1f} CPU s", free.seconds / tight.seconds, f"{tight.peak / limit:.0%} of max_ram",
        peak=f"{tight.peak / 1e6:.0f} MB", without=f"{free.peak / 1e6:.0f} MB",
        libraries=f"{free.libraries / 1e6:.0f} MB", decisions=len(tight.decisions),
        changed=sum(one[2] is not None for one in tight.decisions),
    )  # fmt: skip
    assert [one[:2] for one in tight.decisions] == [one[:2] for one in free.decisions]
    assert not free.streamed
    assert tight.streamed or TINY
    assert tight.peak < limit
