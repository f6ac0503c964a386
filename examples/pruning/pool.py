"""Train the pool that pruning is shown on: a generalist grown to 12 layers, and two fine-tunes of it.

    python examples/pruning/pool.py --out FOLDER

writes models/base, models/arithmetic and models/sorting, and questions to data/, with the skills and the training of
examples/demo. A model of 6 layers is trained, grown by repeating its last layer (depth up-scaling, Kim et al., arXiv
2312.15166), and trained on, so that its last layers are alike, as those of large models are said to be. Arithmetic is
generated: an answer counts when every digit of it is right. About eight minutes of one core; everything is seeded.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import skills
import train as demo

SHALLOW, N_LAYERS, WIDTH, INNER = 6, 12, 96, 256
MIXTURE = {"arithmetic": 24, "sorting": 12, "grammar": 6, "writing": 2}
YOUNG, GROWN = demo.Phase(800, 2e-3, MIXTURE), demo.Phase(300, 5e-4, MIXTURE)
SPECIALISTS = ("arithmetic", "sorting")
SELECTION, HOLDOUT = 96, 160  # questions of each skill


def build_model(tokenizer: PreTrainedTokenizerFast, n_layers: int) -> LlamaForCausalLM:
    """A fresh Llama of narrow layers, 1.4 million parameters with 12 of them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=n_layers,
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


def grown(young: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model of 12 layers: those of the young one, the last of them again and again."""
    model, held = build_model(tokenizer, N_LAYERS), young.state_dict()
    tensors = {}
    for name in model.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(min(int(parts[2]), SHALLOW - 1))
        tensors[name] = held[".".join(parts)]
    model.load_state_dict(tensors)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the pool that pruning is shown on.")
    parser.add_argument("--out", type=Path, required=True, help="folder for models/ and data/")
    parser.add_argument("--seed", type=int, default=0, help="decides the first weights and every order")
    parser.add_argument("--steps", type=int, default=YOUNG.steps, help="of each training at most, to try it out")
    parser.add_argument("--questions", type=int, default=demo.TRAINING_QUESTIONS, help="drawn per skill to train on")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    skills.write_datasets(arguments.out / "data", "selection", seed=1, count=SELECTION)
    skills.write_datasets(arguments.out / "data", "holdout", seed=2, count=HOLDOUT, suffix="_holdout")
    begin = time.perf_counter()
    full = {skill: demo.training_questions(skill, arguments.seed, arguments.questions) for skill in skills.SKILLS}
    tokenizer = demo.build_tokenizer(full)
    lessons = {skill: demo.encode(tokenizer, pairs) for skill, pairs in full.items()}

    def train(model: LlamaForCausalLM, phase: demo.Phase, name: str) -> None:
        demo.train(model, lessons, replace(phase, steps=min(phase.steps, arguments.steps)), arguments.seed, name)

    young = build_model(tokenizer, SHALLOW)
    train(young, YOUNG, "young")
    base = grown(young, tokenizer)
    train(base, GROWN, "base")
    demo.save(base, tokenizer, arguments.out / "models" / "base")
    for skill in SPECIALISTS:
        model = copy.deepcopy(base)
        train(model, demo.specialist(skill), skill)
        demo.save(model, tokenizer, arguments.out / "models" / skill)
    print(f"trained in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
