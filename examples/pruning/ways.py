"""Prune the pool of `pool.py` in every way, at equal evaluations, and compare the results on held-out questions.

    python examples/pruning/ways.py FOLDER [--remove 4] [--budget 200]

FOLDER is that of pool.py; results go to FOLDER/pruned. What is searched by is the likelihood of the answers: their
cross-entropy, a mean over arithmetic, sorting and grammar. An answer is right where all of it would be generated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmfast.config.run import parse_config
from olmfast.pruning.prune import prune
from olmfast.runs.scoreboard import Scoreboard, evaluate

SKILLS = ("arithmetic", "sorting", "grammar")
Z = 1.96  # standard errors on each side of a 95 % interval


def pruned(folder: Path, method: str, remove: int, budget: int, samples: int, **section: Any) -> Path:
    """Prune by a method, unless that was done before; the result's folder."""
    out = folder / "pruned" / method
    if not (out / "config.json").is_file():
        names = ["base", *(["arithmetic", "sorting"] if method == "joint" else [])]
        data: dict[str, Any] = {"models": names, "models_dir": "models", "output_dir": str(out), "device": "cpu"}
        if method in ("cma", "joint"):
            data["dataset"] = {f"data/{skill}.json": {"mode": "exact", "samples": samples} for skill in SKILLS}
            data["budget"] = budget
            section["holdout"] = 0
        data["prune"] = {"method": method, "num_layer": remove, **section}
        prune(parse_config(data, method, folder))
    return out


def text_loss(folder: Path, questions: list[str]) -> float:
    """The mean cross-entropy of the questions' own tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    with torch.inference_mode():
        for text in questions:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            losses.append(float(model(ids, labels=ids).loss))
    return math.fsum(losses) / len(losses)


def speed(folder: Path) -> tuple[int, float]:
    """Parameters, and tokens per second of passes over eight texts of 64 tokens, the best of five."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, best = torch.zeros(8, 64, dtype=torch.long), math.inf
    with torch.inference_mode():
        for _ in range(5):
            begin = time.process_time()
            model(ids)
            best = min(best, time.process_time() - begin)
    return sum(parameter.numel() for parameter in model.parameters()), ids.numel() / best


def difference(board: Scoreboard, one: str, other: str) -> tuple[float, float]:
    """By how much `one` is lower than `other`, a mean over datasets, and half of its 95 % interval, paired."""
    means, variance = [], 0.0
    for name in board.datasets:
        a, b = board.scores_of([one, other], name)
        means.append(float((b - a).mean()))
        variance += float((b - a).var()) / len(a)
    return math.fsum(means) / len(means), Z * math.sqrt(variance) / len(means)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune in every way and compare.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--remove", type=int, default=4, help="layers that go")
    parser.add_argument("--budget", type=int, default=200, help="evaluations of each search")
    parser.add_argument("--samples", type=int, default=160, help="questions of each skill at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, remove = arguments.folder.absolute(), arguments.remove
    models = {"original": folder / "models" / "base"}
    for method, label in (("drop", "drop"), ("uniform", "uniform"), ("cma", "searched"), ("joint", "joint")):
        began = time.process_time()
        models[label] = pruned(folder, method, remove, arguments.budget, arguments.samples)
        print(f"{label}: {time.process_time() - began:.0f} CPU s", flush=True)
    measured = json.loads((models["searched"] / "merge_report.json").read_text())["olmfast"]["measured"]
    last = 12 - 1
    entries = [
        {"step": k, "layer_to_merge_into": last - k - 1, "layer_to_remove": last - k, "ratio_i_alpha": alpha}
        for k, alpha in enumerate(measured["alphas"])
    ]
    (folder / "similarity.json").write_text(json.dumps(entries, indent=2))
    similar = pruned(folder, "file", remove, 0, 0, alphas_file=str(folder / "similarity.json"))
    models = {**models, "similarity": similar}
    order = ("original", "drop", "uniform", "similarity", "searched", "joint")
    files = {
        str(folder / "data" / f"{skill}_holdout.json"): {"mode": "exact", "samples": arguments.samples}
        for skill in SKILLS
    }
    board = Scoreboard([])
    for label in order:
        own = evaluate(models[label], files, device="cpu", dtype="float32")
        name = str(models[label])
        board.rows[label], board.accuracy[label] = own.rows[name], own.accuracy[name]
        board.samples[label] = own.samples[name]
    texts = {skill: json.loads((folder / "data" / f"{skill}_holdout.json").read_text()) for skill in SKILLS}
    asked = [item["conversation"][0]["value"] for items in texts.values() for item in items[: arguments.samples // 3]]
    heads = ("model", "cross-entropy of answers", "arithmetic right", "all right", "perplexity: answers, questions")
    print(f"| {' | '.join(heads)} | parameters | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for label in order:
        losses = list(board.rows[label].values())
        mean, right = math.fsum(losses) / len(losses), list(board.accuracy[label].values())
        spread = sum(
            float(board.scores_of([label], name)[0].var()) / len(board.samples[label][name]) for name in board.datasets
        )
        n, rate = speed(models[label])
        ppl = math.exp(text_loss(models[label], asked))
        print(
            f"| {label} | {mean:.3f} ± {Z * math.sqrt(spread) / len(losses):.3f} | {right[0]:.1%} | "
            f"{sum(right) / len(right):.1%} | {math.exp(mean):.2f}, {ppl:.3g} | {n:,} | {rate:,.0f} |"
        )
    pairs = [*pairwise(order[1:]), ("uniform", "searched"), ("drop", "searched")]
    for worse, better in pairs:
        gain, margin = difference(board, better, worse)
        print(f"{better} against {worse}: {gain:+.4f} ± {margin:.4f} lower")


if __name__ == "__main__":
    main()
