"""What a model says to questions, for people to read: the score is told elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.encoding import Dataset, Sample
from olmfast.evaluation.generation import generate
from olmfast.evaluation.model import WorkingModel

LONGEST = 128  # tokens of a reply


@torch.inference_mode()
def replies(
    model: WorkingModel, dataset: Dataset, indices: Sequence[int], tokenizer: Any, stop_tokens: Sequence[int]
) -> list[str]:
    """The live model's answers to some questions of a dataset: the letter that it picks, or its own greedy words.

    They are as long as the expected answer, or end at a stop token, where the mode generates; never longer than
    `LONGEST` tokens.
    """
    samples = [dataset.samples[index] for index in indices]
    generates = dataset.config.mode in metrics.GENERATIVE
    found = []
    for sample in samples:  # one at a time: a long prompt must not widen the others'
        if sample.options:
            found.append(_picked(model, sample, tokenizer))
            continue
        longest = dataset.config.max_new_tokens if generates else len(sample.response)
        limit = min(longest, LONGEST, model.context - len(sample.prompt))
        generated = generate(model.module, [sample.prompt], [limit], model.context, stop_tokens if generates else ())
        tokens = generated.tokens[0, : int(generated.lengths[0])].tolist()
        found.append(text_of(tokens, tokenizer))
    return found


def text_of(tokens: Sequence[int], tokenizer: Any) -> str:
    """Tokens as people read them: without those that only steer."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _picked(model: WorkingModel, sample: Sample, tokenizer: Any) -> str:
    ids = torch.tensor([sample.prompt], device=model.device)
    logits = model.module(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    options = torch.tensor(sample.options, device=logits.device)
    shares = logits[options].float().softmax(dim=0)
    best = int(shares.argmax())
    return f"{text_of([sample.options[best]], tokenizer).strip()} ({float(shares[best]):.0%} of the letters)"
