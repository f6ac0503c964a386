"""Questions behind a shared beginning: the letters' logits, the beginning computed once; and how likely texts are.

The prompts of a subject of MMLU share its worked examples, most of what they are made of. What their tokens share is
run once, and its keys and values are what each batch of questions goes on from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from olmfast.config.datasets import DatasetConfig
from olmfast.errors import InputError
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.encoding import Encoder, make_batches
from olmfast.evaluation.items import Conversation
from olmfast.evaluation.memory import CPU_TOKENS
from olmfast.evaluation.mmlu import LETTERS, Question, Subject
from olmfast.evaluation.model import WorkingModel

Ids = tuple[int, ...]
CACHED = 8  # times the tokens of a batch: what its questions go on from may take as much


@dataclass(frozen=True)
class Asked:
    """A subject's questions as tokens: whole prompts, the questions alone, the letters, and which of them is right.

    `fewer` says how many worked examples each prompt lacks, as it would not fit the context with them.
    """

    name: str
    prompts: tuple[Ids, ...]
    texts: tuple[Ids, ...]
    letters: Ids
    right: tuple[int, ...]
    fewer: tuple[int, ...]


def encode(subject: Subject, tokenizer: Any, context: int, n_shots: int) -> Asked:
    """The tokens of a subject's questions, each after as many of `n_shots` worked examples as fit the context.

    Raises InputError for a question that does not fit it, or letters that the tokenizer does not tell apart.
    """
    where = str(subject.files[0])
    encoder = Encoder(tokenizer, DatasetConfig(mode="choice", template="raw"), raw_by_default=True, where=where)
    beginnings = [subject.before(shots) for shots in range(n_shots, -1, -1)]

    def ids(*texts: str) -> list[Ids]:
        asked = [Conversation(({"role": "user", "content": text},), "") for text in texts]
        return [sample.prompt for sample in encoder.all(asked)]

    letters, following = _letters(subject, encoder, ids)
    prompts, fewer = [], []
    for question in subject.questions:
        # Fewer examples one after another, as MMLU's own script does.
        tried = ((n, own + following) for n, text in enumerate(beginnings) for own in ids(text + question.text))
        n, own = next(((n, own) for n, own in tried if len(own) <= context), (0, ()))
        if not own:
            raise InputError(f"{where}: a question is longer than the model's context of {context} tokens")
        prompts.append(own)
        fewer.append(n)
    texts = ids(*(question.text for question in subject.questions))
    right = tuple(LETTERS.index(question.answer) for question in subject.questions)
    return Asked(subject.name, tuple(prompts), tuple(own[:context] for own in texts), letters, right, tuple(fewer))


def _letters(subject: Subject, encoder: Encoder, ids: Any) -> tuple[Ids, Ids]:
    """The letters' tokens, and tokens that belong between a prompt and them: a space that is one of its own."""
    if subject.style == "seed":
        bare = [tuple(encoder.tokenizer(letter, add_special_tokens=False)["input_ids"]) for letter in LETTERS]
        letters = tuple(own[-1] for own in bare if own)
        if len(set(letters)) < len(LETTERS):
            raise InputError(f"{encoder.where}: the tokenizer does not tell the bare letters A, B, C and D apart")
        return letters, ()
    question: Question = subject.questions[0]
    asked = Conversation(({"role": "user", "content": question.text},), question.answer, tuple(LETTERS))
    (sample,), (plain,) = encoder.all([asked]), ids(question.text)
    return sample.options, sample.prompt[len(plain) :]


@torch.inference_mode()
def letter_logits(model: WorkingModel, blockwise: BlockwiseModel, asked: Asked, batch_tokens: int) -> torch.Tensor:
    """(questions, letters) on the CPU, at least float32: the logits of the letters after each prompt."""
    options = torch.tensor(asked.letters, device=blockwise.device)
    found: dict[int, torch.Tensor] = {}
    for fewer in sorted(set(asked.fewer)):
        rows = [row for row, n in enumerate(asked.fewer) if n == fewer]
        for batch, hidden in _batches(model, blockwise, [asked.prompts[row] for row in rows], batch_tokens):
            logits = blockwise.head.logits(hidden, options).cpu()
            found.update(zip((rows[index] for index in batch), logits, strict=True))
    return torch.stack([found[row] for row in range(len(asked.prompts))])


def _batches(
    model: WorkingModel, blockwise: BlockwiseModel, prompts: Sequence[Ids], batch_tokens: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Indices of prompts, and what leaves the last block at their last tokens, (prompts, hidden)."""
    n_shared, n_tokens = _n_shared(prompts), _pass_tokens(blockwise, batch_tokens)
    cache = _run(model, [prompts[0][:n_shared]], _empty_cache(model)) if n_shared else None
    rest = [prompt[n_shared:] for prompt in prompts]
    most = max(1, CACHED * n_tokens // max(n_shared, 1))
    for batch in make_batches([len(own) for own in rest], n_tokens):
        for begin in range(0, len(batch), most):
            rows = batch[begin : begin + most]
            yield rows, _leaving(model, blockwise, [rest[index] for index in rows], cache)


@torch.inference_mode()
def mean_losses(blockwise: BlockwiseModel, texts: Sequence[Ids], batch_tokens: int) -> torch.Tensor:
    """(texts,) float64: the mean cross-entropy of each text's tokens but the first."""
    found = torch.full((len(texts),), torch.nan, dtype=torch.float64)
    for batch in make_batches([len(ids) for ids in texts], _pass_tokens(blockwise, batch_tokens)):
        inputs = [texts[index] for index in batch]
        hidden = blockwise.run(blockwise.enter(blockwise.pad(inputs)), 0, len(blockwise.blocks))
        for row, index in enumerate(batch):
            labels = torch.tensor(inputs[row][1:], device=hidden.device)
            if len(labels):
                scores = blockwise.head.token_scores(hidden[row, : len(labels)], labels)
                found[index] = float((scores.logsumexp - scores.label_logit).double().mean())
    return found


def _n_shared(prompts: Sequence[Ids]) -> int:
    """How many tokens all prompts begin with; at least one is left of each."""
    shortest = min(map(len, prompts)) - 1
    together = zip(*(prompt[:shortest] for prompt in prompts), strict=True)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, together))


def _pass_tokens(blockwise: BlockwiseModel, batch_tokens: int) -> int:
    return min(batch_tokens, CPU_TOKENS) if blockwise.device.type == "cpu" else batch_tokens


def _empty_cache(model: WorkingModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.module.config)


def _run(model: WorkingModel, inputs: Sequence[Ids], cache: Any) -> Any:
    """Run inputs, right-padded, on from a cache, which is extended."""
    ids = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.long)
    for row, tokens in enumerate(inputs):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    model.module.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    return cache


def _leaving(model: WorkingModel, blockwise: BlockwiseModel, inputs: Sequence[Ids], cache: Any) -> torch.Tensor:
    """(inputs, hidden): what leaves the last block at each input's last token, on from what all of them share."""
    own = _empty_cache(model) if cache is None else copy.deepcopy(cache)
    if cache is not None:
        own.batch_repeat_interleave(len(inputs))
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    hook = blockwise.blocks[-1].register_forward_hook(keep)
    try:
        _run(model, inputs, own)
    finally:
        hook.remove()
    last = torch.tensor([len(ids) - 1 for ids in inputs], device=kept[0].device)
    return kept[0][torch.arange(len(inputs), device=last.device), last]
