"""A model as large as a GPU is for, three donors of it, and questions; see test_large.py."""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import GPU, sized
from search_case import Case, llama_config, with_chatml, word_tokenizer, write_questions

from olmfast.evaluation.conversations import load_conversations
from olmfast.testing import SPECIAL

DEVICE = torch.device("cuda" if GPU else "cpu")
SOURCE = os.environ.get("OLMFAST_BENCH_CONVERSATIONS")
WORDS = sized((8, 12), (60, 170), (60, 170))  # of a question that is random
CONTEXT = 2048
EMBEDDING, LOGITS = 3.0, 4.0  # standard deviations, as in search_case.make_case
QUESTIONS = sized(2, 64 if GPU else 16, 64)  # of each dataset
MODES = {"free.json": "exact_match", "forced.json": "bigram_loss", "likely.json": "perplexity"}
DONORS = ("donor0", "donor1", "donor2")


@dataclass(frozen=True)
class Shape:
    """Of a Llama; `words`: the size of its vocabulary, `kv_heads`: heads of keys and values, if fewer than `heads`."""

    n_blocks: int
    width: int
    inner: int
    heads: int
    words: int
    kv_heads: int | None = None

    @property
    def n_bytes(self) -> int:
        """Of the weights in bfloat16; the norms are not counted."""
        return 2 * (self.n_blocks * self.block_parameters + 2 * self.words * self.width)

    @property
    def block_parameters(self) -> int:
        """Of a block's matrices."""
        kv_width = self.width * (self.kv_heads or self.heads) // self.heads
        return 2 * self.width * (self.width + kv_width) + 3 * self.width * self.inner


SHAPES = {  # of Llama-2-7B, Llama-3-8B but for its vocabulary, eight of their blocks, and what a CPU has time for
    "7b": Shape(32, 4096, 11008, 32, 32000),
    "8b": Shape(32, 4096, 14336, 32, 32000, 8),
    "quarter": Shape(8, 4096, 11008, 32, 32000),
    "quarter8b": Shape(8, 4096, 14336, 32, 32000, 8),
    "small": Shape(4, 256, 688, 4, 8000),
    "tiny": Shape(2, 32, 48, 4, 100),
}


def write_case(folder: Path, shape: Shape) -> Case:
    """Donors and datasets; donors are written side by side."""
    tokenizer = write_datasets(folder, shape)
    with ThreadPoolExecutor(len(DONORS)) as pool:
        written = [
            pool.submit(write_donor, folder / "models" / name, shape, tokenizer, index)
            for index, name in enumerate(DONORS)
        ]
    for one in written:
        one.result()
    return Case(folder, DONORS)


def write_datasets(folder: Path, shape: Shape) -> Any:
    """Write three files of questions; returns the tokenizer that they are read with."""
    if SOURCE is None:
        tokenizer = word_tokenizer(shape.words)
        for seed, name in enumerate(MODES):
            write_questions(folder / name, None, tokenizer, QUESTIONS, WORDS, seed, answer_tokens=8)
        return tokenizer
    texts, files = [], []
    for path in SOURCE.split(os.pathsep):
        items = []
        for conversation in load_conversations(Path(path), "exact_match", sys.maxsize).usable:
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
    """One ancestor, the same for all, and this donor's noise; no more than a tensor of it is held at a time."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Matrices keep the size of what goes through them, whatever the width; see search_case.make_case.
    spread = 0.9 / shape.width**0.5
    config = llama_config(shape.n_blocks, shape.width, shape.inner, shape.heads, shape.words, spread, CONTEXT)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.num_key_value_heads = shape.kv_heads or shape.heads
    with torch.device("meta"):
        sizes = {name: x.shape for name, x in transformers.LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spreads = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": LOGITS / shape.width**0.5}
    numbers = {name: number for number, name in enumerate(sizes)}

    def value(name: str) -> torch.Tensor:
        size, number = sizes[name], numbers[name]
        std = spreads.get(name, spread) if len(size) == 2 else 1.0
        found = std * normal(size, number) if len(size) == 2 else torch.ones(size, device=DEVICE)
        found += std * 0.01 * (1 + index % 2) * normal(size, (index + 1) * len(sizes) + number)
        return found

    places = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in sizes}
    for file in sorted(set(places.values())):
        write_shard(folder / file, {name: sizes[name] for name in sizes if places[name] == file}, value)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_shard(path: Path, sizes: Mapping[str, Sequence[int]], value: Callable[[str], torch.Tensor]) -> None:
    """Tensors, in bfloat16, in a file that they are computed into: large models take as long as that does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, n_bytes = {}, 0
    for name, size in sizes.items():
        places[name] = slice(n_bytes, n_bytes + 2 * prod(size))
        n_bytes = places[name].stop
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [places[name].start, n_bytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb+") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + n_bytes)  # an error where there is no room
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8, offset=8 + len(text))
        for name, place in places.items():
            memory[place].view(torch.bfloat16).view(*sizes[name]).copy_(value(name))


def normal(size: Sequence[int], seed: int) -> torch.Tensor:
    """Draws in float32, made where the model will be."""
    return torch.randn(*size, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
