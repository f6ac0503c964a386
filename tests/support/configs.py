"""Configs that tests of several files begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olmfast.config.run import RunConfig, parse_config

ORIGINAL = """
models_dir: models
output_dir: out/merged
dataset_dir: data/sharegpt
models:
  - Qwen/Qwen2.5-7B-Instruct
  - Qwen/Qwen2.5-Coder-7B-Instruct
  - ./local/fine-tune
base_model_name: Qwen/Qwen2.5-Coder-7B-Instruct
dataset:
  gsm8k.v2.json:
    mode: exact_match
    think: false
  gpqa.json:
    mode: bigram_loss
  writing.json:
    mode: diversity
    think: true
base_select: true
boundary_select: true
layer_swap: true
tensor_swap: true
skip_norm: true
es_svd: true
es_norm: true
load_merge_report: true
direction: backward
samples: "50"
improve_all: gpqa.json
markov: 1
max_models: 2
es_svd_generations: 2
es_svd_sigma: 1e-1
es_norm_generations: 5
es_norm_sigma: 1e-5
selection: ranks
metric_dir: metrics
"""


def plain(**keys: Any) -> dict[str, Any]:
    """The smallest config, with `keys` set."""
    return {
        "models_dir": "models",
        "output_dir": "out",
        "models": ["alpha", "beta"],
        "dataset": {"sums.json": {"mode": "exact"}},
        **keys,
    }


def parse(**keys: Any) -> RunConfig:
    """The same, parsed as a file of /data/me."""
    return parse_config(plain(**keys), "cfg.yaml", Path("/data/me"))
