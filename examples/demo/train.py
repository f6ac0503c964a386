"""Train the demo pool: one common ancestor and a specialist for every skill, fine-tuned gently from it.

    python examples/demo/train.py

writes the weights and tokenizers to ``examples/demo/models/`` and the questions to ``examples/demo/data/`` in about
five minutes of one processor core. Everything is seeded and runs on one thread: the same machine type and
library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import skills
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_QUESTIONS = 5000
"""Drawn per skill, usually; where a skill has fewer in its training split, some come twice."""
SELECTION_QUESTIONS, HOLDOUT_QUESTIONS = 192, 160
"""Per skill."""
IGNORED = -100
"""Label of tokens that are not part of an answer."""


@dataclass(frozen=True)
class Phase:
    """One training run: how long, how fast, and how many questions of each skill are in a batch."""

    steps: int
    learning_rate: float
    mixture: dict[str, int]
    weight_decay: float = 0.01
    warmup: int = 50


ANCESTOR = Phase(1000, 2e-3, {"arithmetic": 20, "sorting": 14, "grammar": 8, "writing": 6})
"""Long enough to know what every skill is about, too short to be good at all of them."""


def specialist(skill: str) -> Phase:
    """A short fine-tuning on one skill, slow enough that the weights move by a few percent."""
    return Phase(120, 3e-4, {skill: 36}, warmup=20)


def training_questions(skill: str, seed: int, count: int) -> list[tuple[str, str]]:
    """Questions of the training split."""
    return list(islice(skills.draw(skill, "train", seed), count))


def build_tokenizer(examples: dict[str, list[tuple[str, str]]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (digits one by one) with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [
        f"user\n{question}\nassistant\n{answer}" for pairs in examples.values() for question, answer in pairs[:2000]
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of about 1.4 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


Encoded = tuple[list[int], list[int]]
"""Token ids of the prompt, and of the answer with its end of turn."""


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[Encoded]:
    """Questions as the chat template writes them."""
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question, _ in pairs], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([answer + END for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return list(zip(prompt_ids, answer_ids, strict=True))


def pack(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded input ids and labels, both (questions, tokens); only answers carry labels."""
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    tokens = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the answers' tokens. Right padding needs no mask: it follows everything scored."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    expected = labels[:, 1:]
    scored = expected != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), expected[scored])


def train(model: LlamaForCausalLM, encoded: dict[str, list[Encoded]], phase: Phase, seed: int, name: str) -> None:
    """Run ``phase`` on ``model`` in place: AdamW, warm-up, cosine to a tenth."""
    draws = random.Random(f"{name} {seed}")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=phase.weight_decay
    )
    pad, begin = model.config.pad_token_id, time.perf_counter()
    questions = sum(phase.mixture.values())
    for step in range(phase.steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / phase.steps)
        optimizer.param_groups[0]["lr"] = phase.learning_rate * min((step + 1) / phase.warmup, 1) * cosine
        losses = {}
        for skill, count in phase.mixture.items():
            loss = mean_loss(model, *pack(draws.sample(encoded[skill], count), pad))
            (loss * count / questions).backward()  # type: ignore[no-untyped-call]
            losses[skill] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            report = "  ".join(f"{skill} {loss:.3f}" for skill, loss in losses.items())
            print(f"{name} {step + 1}/{phase.steps} ({time.perf_counter() - begin:.0f} s)  {report}", flush=True)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, encoded: list[Encoded]) -> float:
    """The share of questions that ``model`` answers word for word, and then stops, when it decodes greedily.

    One pass over the expected answers tells: as long as every token is the most likely one, decoding follows.
    """
    tokens, labels = pack(encoded, model.config.pad_token_id)
    chosen = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
    expected = labels[:, 1:]
    return float(((chosen == expected) | (expected == IGNORED)).all(1).float().mean())


def relative_distance(model: LlamaForCausalLM, ancestor: LlamaForCausalLM) -> float:
    """||W - W_ancestor|| / ||W_ancestor|| over all parameters."""
    with torch.no_grad():
        ours, theirs = (torch.cat([each.flatten() for each in one.parameters()]) for one in (model, ancestor))
        return float((ours - theirs).norm() / theirs.norm())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Transformers folder: bfloat16 weights, tokenizer and generation settings."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=48
    )
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's ancestor and its specialists.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for models/ and data/")
    parser.add_argument("--seed", type=int, default=0, help="decides the first weights and every order")
    parser.add_argument("--steps", type=int, default=ANCESTOR.steps, help="of each training at most, to try it out")
    parser.add_argument("--questions", type=int, default=TRAINING_QUESTIONS, help="drawn per skill to train on")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    skills.write_datasets(arguments.out / "data", "selection", seed=1, count=SELECTION_QUESTIONS)
    skills.write_datasets(arguments.out / "data", "holdout", seed=2, count=HOLDOUT_QUESTIONS, suffix="_holdout")

    def shortened(phase: Phase) -> Phase:
        return replace(phase, steps=min(phase.steps, arguments.steps))

    begin = time.perf_counter()
    full = {skill: training_questions(skill, arguments.seed, arguments.questions) for skill in skills.SKILLS}
    tokenizer = build_tokenizer(full)
    lessons = {skill: encode(tokenizer, pairs) for skill, pairs in full.items()}
    first_lessons = {skill: encode(tokenizer, skills.first_lessons(skill, full[skill])) for skill in full}
    holdout = {
        skill: encode(tokenizer, list(islice(skills.draw(skill, "holdout", 2), HOLDOUT_QUESTIONS))) for skill in full
    }
    ancestor = build_model(tokenizer)
    train(ancestor, first_lessons, shortened(ANCESTOR), arguments.seed, "ancestor")
    pool = {"ancestor": ancestor}
    for skill in skills.SKILLS:
        pool[skill] = copy.deepcopy(ancestor)
        train(pool[skill], lessons, shortened(specialist(skill)), arguments.seed, skill)
        save(pool[skill], tokenizer, arguments.out / "models" / skill)
    print(f"trained in {time.perf_counter() - begin:.0f} s")
    print("held-out questions answered word for word, and distance from the ancestor")
    for name, model in pool.items():
        scores = "  ".join(f"{skill} {accuracy(model, holdout[skill]):.2f}" for skill in skills.SKILLS)
        print(f"{name:10}  {scores}  distance {relative_distance(model, ancestor):.1%}")


if __name__ == "__main__":
    main()
