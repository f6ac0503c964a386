"""What follows the last block: computed without the logits where that gives the module's own, else by the module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from olmfast import run
from olmfast.config.run import load_config
from olmfast.evaluation import head
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.head import LinearHead, ModuleHead, head_of
from olmfast.observer import Observer
from olmfast.testing import FAMILIES, tiny_model, tiny_run
from olmfast.weights.architecture import Architecture

SCALED = ("granite", "cohere")  # whose logits are multiplied by a number of the config
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def taken_apart(folder: Path, family: str, dtype: torch.dtype, **config) -> BlockwiseModel:
    tiny_model(folder, family, **config)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if dtype == torch.float64:
        module.config._experts_implementation = "eager"  # torch's grouped product knows no float64
    architecture = Architecture.from_config(AutoConfig.from_pretrained(folder).to_dict(), family)
    with torch.inference_mode():
        return BlockwiseModel(module.eval(), architecture)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_head_is_the_modules_own_only_where_it_is_more_than_norm_weight_bias_and_cap(family, dtype, tmp_path):
    kind = ModuleHead if family in SCALED else LinearHead
    assert type(taken_apart(tmp_path, family, dtype).head) is kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scaling", "kind"), [(1.0, LinearHead), (1.05, ModuleHead), (0.95, ModuleHead)])
def test_rounding_is_no_difference_and_a_factor_near_1_is_one(scaling, kind, dtype, tmp_path):
    assert type(taken_apart(tmp_path, "granite", dtype, logits_scaling=scaling).head) is kind


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_a_modules_own_head_gives_its_logits_in_any_number_of_pieces(family, tmp_path, monkeypatch):
    """For every family, of whichever kind its blocks and what they return are."""
    blockwise = taken_apart(tmp_path, family, torch.float64)
    module, leaving = blockwise.module, []
    ids = torch.randint(5, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    hook = blockwise.blocks[-1].register_forward_hook(lambda _, __, out: leaving.append(out))
    expected = module(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    hook.remove()
    hidden = (leaving[0][0] if isinstance(leaving[0], tuple) else leaving[0]).flatten(0, 1)
    labels = torch.randint(5, 100, (21,), generator=torch.Generator().manual_seed(1))
    labels[4] = -100
    rows: list[int] = []
    forward = module.forward
    module.forward = lambda **told: (rows.append(len(told["input_ids"])), forward(**told))[1]
    for n_rows, passes in ((1000, [21]), (8, [8, 8, 5]), (1, [1] * 21)):
        monkeypatch.setattr(head, "LOGIT_BYTES", 4 * n_rows * expected.shape[1])
        own = ModuleHead(module, blockwise.blocks, leaving[0])
        scores = own.token_scores(hidden, labels)
        assert rows == passes
        options = torch.tensor([70, 9, 33])
        torch.testing.assert_close(own.logits(hidden, options), expected[:, options], rtol=1e-12, atol=1e-12)
        rows.clear()
        close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
        torch.testing.assert_close(scores.max_logit, expected.amax(dim=1), **close)
        assert torch.equal(scores.argmax, expected.argmax(dim=1))
        torch.testing.assert_close(scores.logsumexp, expected.logsumexp(dim=1), **close)
        label_logit = expected[torch.arange(21), labels.clamp(min=0)].masked_fill(labels < 0, torch.nan)
        torch.testing.assert_close(scores.label_logit, label_logit, **close)
    assert torch.equal(module(input_ids=ids, use_cache=False).logits.flatten(0, 1), expected)  # blocks compute again


def test_weights_that_are_no_numbers_tell_nothing_of_the_head(tmp_path):
    blockwise = taken_apart(tmp_path, "llama", torch.float32)
    module = blockwise.module
    torch.nn.init.constant_(module.lm_head.weight, torch.nan)
    assert isinstance(head_of(module, blockwise.blocks, module.model.norm), LinearHead)


@pytest.mark.parametrize(("family", "n_notes"), [("granite", 1), ("llama", 0)])
def test_a_run_says_once_that_the_modules_own_head_is_used(family, n_notes, tmp_path):
    notes: list[str] = []
    observer = Observer()
    observer.note = notes.append
    run(load_config(tiny_run(tmp_path, family=family, base_select=True)), observer=observer)
    assert sum(note.startswith(f"{family}: its head is more than") for note in notes) == n_notes
