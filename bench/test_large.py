"""One block's swap and one module's SVD-ES in a model of 7 billion parameters, on a GPU.

    OLMFAST_BENCH_CONVERSATIONS=questions.json pytest bench/test_large.py --benchmark-only -s

On CUDA the model is shaped as Llama-7B (32 blocks, width 4,096) and scored in bfloat16 under `max_vram: 24GB`;
elsewhere it is a small one that shows that all of this works: OLMFAST_BENCH_SHAPE=small or =7b says otherwise. Weights
are random and bfloat16: each donor is one ancestor with 1 or 2 % of each matrix's spread added, made a tensor at a time
and written a block at a time. Three donors of 7b take 40.4 GB of disk, and as much as a fourth must be free for a
result (`--basetemp=FOLDER` says where); they are deleted afterwards. The plain driver loads a donor into main memory.

OLMFAST_BENCH_CONVERSATIONS names a file of docs/config.md's formats, or several with a colon between: the three
datasets get 64 questions each, from the files in turn, by a byte-level BPE trained on them. Without it questions are
random words, 60 to 170 of them, with answers of 8. The datasets are scored by exact_match, bigram_loss and perplexity.

What is there is scored first, which finds its own tokens and what enters the middle block, where everything is
measured. Then, for each kind of candidate:

- `all three` is scoring all candidates on all datasets, decoding of what leaves the expected tokens included; `read
  along` is the two datasets in which nothing is decoded. Both begin with the donors' bytes, or the offspring's numbers.
- suffix tokens: the inputs' tokens without padding, times candidates. Tokens that are decoded are not counted.
- `of plain inference`: these tokens a second, as a share of those of one model's blocks from the same one on, called
  with the same batches and nothing else done.
- `of matmul`: two operations for each token and parameter of these blocks, as a share of the rate of one large product
  in the same dtype. It counts what olmfast leaves out (most of the last block's MLP, and what comes before the
  changed module, once for all candidates), so that with few blocks it can exceed 100 %.
- `plain` is the first candidate by `baseline.py`. In float32, on a CPU, that does not round offspring to bfloat16 as
  olmfast does, and mean scores differ by as much.

On a GPU seconds are by the clock, synchronised; on a CPU they are the processor's (OMP_NUM_THREADS=1).
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from baseline import Baseline
from peak import elapsed, watched
from search_case import Case, candidates_of, llama_config, session, with_chatml, word_tokenizer, write_questions

from olmfast.evaluation.conversations import load_conversations
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.testing import SPECIAL
from olmfast.weights.architecture import Unit

pytestmark = pytest.mark.timeout(0)


@dataclass(frozen=True)
class Shape:
    """Of a Llama; `words`: the size of its vocabulary."""

    n_blocks: int
    width: int
    inner: int
    heads: int
    words: int

    @property
    def n_bytes(self) -> int:
        """Of the weights in bfloat16; the norms are not counted."""
        return 2 * (self.n_blocks * self.block_parameters + 2 * self.words * self.width)

    @property
    def block_parameters(self) -> int:
        """Of a block's matrices."""
        return 4 * self.width**2 + 3 * self.width * self.inner


SHAPES = {"7b": Shape(32, 4096, 11008, 32, 32000), "small": Shape(4, 256, 688, 4, 8000)}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MODES = {"free.json": "exact_match", "forced.json": "bigram_loss", "likely.json": "perplexity"}
READ_ALONG = [name for name, mode in MODES.items() if mode != "exact_match"]
SOURCE = os.environ.get("OLMFAST_BENCH_CONVERSATIONS")
KINDS = ("block", "svd_es")
DONORS = ("donor0", "donor1", "donor2")
QUESTIONS = 64  # of each dataset
CONTEXT = 2048
VRAM = 24 * 10**9
ROUNDS = 5 if GPU else 1
EMBEDDING, LOGITS = 3.0, 4.0  # standard deviations, as in search_case.make_case
NOW = Candidate("now")


def shape_asked_for() -> tuple[str, Shape]:
    name = os.environ.get("OLMFAST_BENCH_SHAPE", "7b" if GPU else "small")
    if name not in SHAPES:
        pytest.fail(f"OLMFAST_BENCH_SHAPE: {name!r} is none of {', '.join(SHAPES)}")
    return name, SHAPES[name]


def say(benchmark, title: str, **figures: object) -> None:
    benchmark.extra_info.update({f"{title}: {name}": str(value) for name, value in figures.items()})
    print(f"\n{title} | " + " | ".join(f"{name} {value}" for name, value in figures.items()), flush=True)


@pytest.fixture
def case(tmp_path):
    """Donors and datasets; the donors do not stay."""
    _, shape = shape_asked_for()
    needed, free = (len(DONORS) + 1) * shape.n_bytes, shutil.disk_usage(tmp_path).free
    if free < needed:
        pytest.fail(f"{tmp_path}: needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; use --basetemp=FOLDER")
    try:
        tokenizer = write_datasets(tmp_path, shape)
        for index, name in enumerate(DONORS):
            write_donor(tmp_path / "models" / name, shape, tokenizer, index)
        yield Case(tmp_path, DONORS)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def write_datasets(folder: Path, shape: Shape) -> Any:
    """Write three files of questions; returns the tokenizer that they are read with."""
    if SOURCE is None:
        tokenizer = word_tokenizer(shape.words)
        for seed, name in enumerate(MODES):
            write_questions(folder / name, None, tokenizer, QUESTIONS, (60, 170), seed, answer_tokens=8)
        return tokenizer
    texts, files = [], []
    for path in SOURCE.split(os.pathsep):
        items = []
        for conversation in load_conversations(Path(path), "exact_match", sys.maxsize):
            messages = [*conversation.messages, {"role": "assistant", "content": conversation.response}]
            texts += [message["content"] for message in messages]
            items.append({"messages": messages})
        files.append(iter(items))
    for place, name in enumerate(MODES):
        chosen = list(islice(files[place % len(files)], QUESTIONS))
        if len(chosen) < QUESTIONS:
            pytest.fail(f"OLMFAST_BENCH_CONVERSATIONS: too few conversations: {len(chosen)} of {QUESTIONS} for {name}")
        (folder / name).write_text(json.dumps(chosen))
    return trained_on(texts, shape.words)


def trained_on(texts: Sequence[str], n_words: int) -> Any:
    """A byte-level BPE of at most so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_words, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_chatml(tokenizer)


def write_donor(folder: Path, shape: Shape, tokenizer: Any, index: int) -> None:
    """One ancestor, the same for all, and this donor's noise; no more than a block of it is held at a time."""
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Matrices keep the size of what goes through them, whatever the width; see search_case.make_case.
    spread = 0.9 / shape.width**0.5
    config = llama_config(shape.n_blocks, shape.width, shape.inner, shape.heads, shape.words, spread, CONTEXT)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        sizes = {name: x.shape for name, x in transformers.LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spreads = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": LOGITS / shape.width**0.5}
    shards: dict[str, dict[str, int]] = {}
    for number, name in enumerate(sizes):
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = number
    for file, numbers in shards.items():
        tensors = {}
        for name, number in numbers.items():
            size = sizes[name]
            std = spreads.get(name, spread) if len(size) == 2 else 1.0
            value = std * normal(size, number) if len(size) == 2 else torch.ones(size, device=DEVICE)
            value += std * 0.01 * (1 + index % 2) * normal(size, (index + 1) * len(sizes) + number)
            tensors[name] = value.to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, numbers in shards.items() for name in numbers}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def normal(size: Sequence[int], seed: int) -> torch.Tensor:
    """Draws in float32, made where the model will be."""
    return torch.randn(*size, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def rate_of_matmul(dtype: torch.dtype, tokens: int, shape: Shape) -> float:
    """Operations a second of one product of as many tokens as a pass has with a matrix of the MLP."""
    x = torch.randn(tokens, shape.width, device=DEVICE, dtype=dtype)
    weight = torch.randn(shape.inner, shape.width, device=DEVICE, dtype=dtype)
    times = 20 if GPU else 5

    def products() -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)

    products()
    seconds = median(elapsed(products, DEVICE) for _ in range(5))
    return 2 * tokens * weight.numel() * times / seconds


@torch.inference_mode()
def plain_inference(scorer: Any, block: int, names: Sequence[str]) -> Callable[[], None]:
    """One model's blocks from `block` on, on the datasets' inputs in the scorer's batches and nothing else."""
    blockwise, passes = scorer.blockwise, scorer.passes
    entering = [passes.entering(block, numbers) for numbers in passes.batches(numbers_of(scorer, names))]

    @torch.inference_mode()
    def run() -> None:
        for hidden in entering:
            blockwise.run(hidden, block, len(blockwise.blocks))

    return run


def numbers_of(scorer: Any, names: Sequence[str]) -> list[int]:
    return [number for number, task in enumerate(scorer.trajectories.tasks) if task.name in names]


@dataclass
class Measured:
    """Of one kind of candidate; seconds are for all of them, `preparing` those before any is scored."""

    unit: Unit
    labels: list[str]
    scores: Scores
    preparing: float
    decoded: int
    seconds: dict[str, float] = field(default_factory=dict)


def test_candidates_of_a_large_model(benchmark, case):
    name, shape = shape_asked_for()
    config = case.config(
        QUESTIONS,
        device=str(DEVICE),
        dtype="auto",
        dataset={file: {"mode": mode} for file, mode in MODES.items()},
        max_vram="24GB",
    )
    card = torch.cuda.get_device_name(DEVICE) if GPU else f"CPU, {torch.get_num_threads()} threads"
    say(benchmark, f"shape {name} on {card}", blocks=shape.n_blocks, width=shape.width,
        weights=f"{shape.n_bytes / 1e9:.2f} GB", torch=torch.__version__,
        questions=f"{QUESTIONS} x {len(MODES)} of {'random words' if SOURCE is None else 'conversations'}")  # fmt: skip
    with session(config) as engine:
        peak, found = measure(benchmark, engine, shape)
        datasets, base, dtype = engine.inputs.datasets, engine.search.model.recipe.base, engine.search.model.dtype
    del engine  # the plain driver has the device to itself
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    baseline = Baseline(case.folders, datasets, case.folder / "plain", device=DEVICE, dtype=dtype)
    baseline.start(base, Scores.empty(1, datasets, torch.float32))
    baseline._score(baseline.model)  # the first forwards are slower
    for kind, ours in found.items():
        compare(benchmark, kind, ours, baseline)
    assert not GPU or peak < VRAM


def measure(benchmark: Any, engine: Any, shape: Shape) -> tuple[int, dict[str, Measured]]:
    """Bytes at the peak of scoring, and for each kind of candidate what was measured."""
    search, scorer, block = engine.search, engine.search.scorer, shape.n_blocks // 2
    parts = {"all three": list(MODES), "read along": READ_ALONG}
    found: dict[str, Measured] = {}
    with watched(scorer.memory) as peak:
        scorer.score(search.architecture.window_unit(search.tensors, [block]), [NOW])
        for kind in KINDS:
            made: list[tuple[Unit, list[Candidate]]] = []
            at_hand = (0, block, shape.n_blocks - 1)
            prepare = partial(candidates_of, kind, engine, block, at_hand, per_unit=None)
            preparing = elapsed(lambda made=made, prepare=prepare: made.append(prepare()), DEVICE)
            unit, candidates = made[0]
            before = scorer.statistics.decoded
            scores = scorer.score(unit, candidates)  # compiles, and fills caches
            decoded = scorer.statistics.decoded - before
            found[kind] = Measured(unit, [one.label for one in candidates], scores, preparing, decoded)
            for part, names in parts.items():
                call = partial(scorer.score, unit, candidates, names)
                found[kind].seconds[part] = median(elapsed(call, DEVICE) for _ in range(ROUNDS))
        benchmark.pedantic(call, rounds=1)
        reserved = torch.cuda.max_memory_reserved(DEVICE) if GPU else None
    lengths = [len(task.ids) for task in scorer.trajectories.tasks]
    n_suffix = shape.n_blocks - block
    operations = 2 * n_suffix * shape.block_parameters  # of a token
    matmul = rate_of_matmul(search.model.dtype, scorer.shares.pass_tokens, shape)
    for part, names in parts.items():
        tokens = sum(len(scorer.trajectories.tasks[number].ids) for number in numbers_of(scorer, names))
        run = plain_inference(scorer, block, names)
        run()
        plain = tokens / median(elapsed(run, DEVICE) for _ in range(ROUNDS))
        say(benchmark, f"plain inference, {part}", blocks=f"{block} to {shape.n_blocks - 1}",
            inputs=f"{min(lengths)} to {max(lengths)} tokens", suffix_tokens=f"{plain:,.0f}/s",
            of_matmul=f"{operations * plain / matmul:.1%}",
            matmul=f"{matmul / 1e12:.3g} TFLOP/s in {search.model.dtype}")  # fmt: skip
        for kind, ours in found.items():
            rate = len(ours.labels) * tokens / ours.seconds[part]
            say(benchmark, f"{kind}, {len(ours.labels)} candidates, {part}", unit=ours.unit.name,
                seconds=f"{ours.seconds[part]:.3g}", suffix_tokens=f"{rate:,.0f}/s",
                of_plain_inference=f"{rate / plain:.1%}", of_matmul=f"{operations * rate / matmul:.1%}",
                decoded=f"{ours.decoded if part == 'all three' else 0} tokens")  # fmt: skip
    say(benchmark, "memory at the peak of scoring", allocated=f"{peak.n_bytes / 1e9:.2f} GB",
        reserved="-" if reserved is None else f"{reserved / 1e9:.2f} GB", splits=scorer.statistics.splits,
        padding=f"{scorer.statistics.padding:.1%}")  # fmt: skip
    return peak.n_bytes, found


def compare(benchmark: Any, kind: str, ours: Measured, baseline: Baseline) -> None:
    """The first candidate by the plain driver; a generation's factors are shared out among its offspring."""
    result: list[Any] = []
    once, n = 0.0, len(ours.labels)
    if kind == "block":
        call = partial(baseline.score_donor, ours.labels[0], ours.unit.tensors)
    else:
        tensor = ours.unit.tensors[0]
        once = elapsed(lambda: result.append(baseline.offspring(tensor, kind)), DEVICE)
        offspring = result.pop()
        assert offspring.count == n
        call = lambda: baseline.score_child(tensor, offspring.child(0))  # noqa: E731
    plain = elapsed(lambda: result.append(call()), DEVICE) + once / n
    fast = (ours.preparing + ours.seconds["all three"]) / n
    pairs = {mode: (float(ours.scores.mean(name)[0]), float(result[0].mean(name)[0])) for name, mode in MODES.items()}
    means = ", ".join(f"{mode} {own:.6g}, plain {other:.6g}" for mode, (own, other) in pairs.items())
    say(benchmark, f"seconds per candidate, {kind}", plain=f"{plain:.3g} (1 run)",
        olmfast=f"{fast:.3g} (mean of {n})", ratio=f"{plain / fast:.1f}x",
        preparing=f"{ours.preparing:.3g} for all, plain {once:.3g}", mean_scores=means)  # fmt: skip
    if kind == "block" and baseline.dtype == torch.float32:  # where rounding does not hide a wrong candidate
        for own, other in pairs.values():
            assert own == pytest.approx(other, rel=1e-3)
