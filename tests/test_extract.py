"""`olmfast extract-lora`: from a fine-tune to an adapter that PEFT loads, and what it leaves out."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from olmfast.errors import InputError
from olmfast.static.extract import extract_lora, low_rank
from olmfast.testing import tiny_adapter, tiny_model
from olmfast.weights.pool import Pool

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base and a fine-tune of each kind, named `kind0` and `kind1`."""
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", {}),
        "tied": ("llama", {"tie_word_embeddings": True}),
        "gpt2": ("gpt2", {}),
        "qwen2": ("qwen2", {"tie_word_embeddings": False}),
        "mixtral": ("mixtral", {}),
    }
    for kind, (family, keys) in kinds.items():
        for seed in (0, 1):
            tiny_model(folder / f"{kind}{seed}", family, seed + 1, **keys)
    return folder


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "qwen2"])
def test_at_full_rank_peft_and_olmfast_get_the_fine_tune_back(kind, place, tmp_path):
    base, model = (place / f"{kind}{i}" for i in (0, 1))
    done = extract_lora(base, model, tmp_path / "ad", 32)
    assert done.error < 1e-6
    assert not done.left_out
    full = AutoModelForCausalLM.from_pretrained(model)
    torch.testing.assert_close(peft_logits(base, tmp_path / "ad"), full(IDS).logits, rtol=1e-3, atol=1e-3)
    pool = Pool.open([str(model), f"{base}+{tmp_path}/ad"], place, place, alike=False)
    expected, found = pool
    assert found.is_tied is expected.is_tied
    for name in expected.tensors:
        torch.testing.assert_close(found.read(name), expected.read(name), rtol=1e-5, atol=1e-5)


def test_a_lower_rank_leaves_out_what_it_says(place, tmp_path):
    done = extract_lora(place / "llama0", place / "llama1", tmp_path / "ad", 4)
    names = [str(place / "llama0"), str(place / "llama1"), f"{place}/llama0+{tmp_path}/ad"]
    base, model, adapted = Pool.open(names, place, place, alike=False)
    total = left = 0.0
    for module, error in done.errors.items():
        name = f"{module}.weight"
        difference = (model.read(name) - base.read(name)).double()
        own = (model.read(name) - adapted.read(name)).double()
        best = torch.linalg.svdvals(difference)[4:].norm()
        assert float(own.norm() / difference.norm()) == pytest.approx(error, rel=1e-4)
        assert float(own.norm()) == pytest.approx(float(best), rel=1e-4)  # no product of that rank is nearer
        total, left = total + float(difference.norm()) ** 2, left + float(own.norm()) ** 2
    assert done.error == pytest.approx((left / total) ** 0.5, rel=1e-4)
    assert 0.1 < done.error < 1
    assert "model.norm" in done.saved
    assert torch.equal(adapted.read("model.norm.weight"), model.read("model.norm.weight"))


def test_a_large_matrix_is_cut_nearly_as_well_as_by_its_svd():
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 150, generator=draw))[0] for n in (300, 200))
    values = torch.arange(1, 151) ** -0.7
    matrix = u * values @ v.T
    b, a = low_rank(matrix, 8, "seed", "name")
    assert b.shape == (300, 8)
    assert a.shape == (8, 200)
    assert float((matrix - b @ a).norm()) < 1.01 * float(values[8:].norm())
    assert all(torch.equal(x, y) for x, y in zip((b, a), low_rank(matrix, 8, "seed", "name"), strict=True))


def test_an_adapter_is_extracted_from_what_it_made(place, tmp_path):
    from peft import PeftModel

    adapter = tiny_adapter(tmp_path / "ad", place / "llama0", 5, target_modules=["q_proj", "down_proj"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "llama0"), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "full")
    done = extract_lora(place / "llama0", tmp_path / "full", tmp_path / "again", 4)
    assert sorted(done.errors) == sorted(
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    assert done.error < 1e-5
    assert not done.saved
    straight = extract_lora(place / "llama0", f"{place}/llama0+{adapter}", tmp_path / "straight", 4)
    assert straight.error < 1e-5
    again, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "straight"))
    assert again.keys() == other.keys()


def test_what_peft_cannot_name_is_said_and_counted(place, tmp_path, olmfast):
    arguments = ["extract-lora", place / "mixtral0", place / "mixtral1", tmp_path / "ad", "--rank", 32]
    code, out, err = olmfast(*arguments)
    assert code == 0, err
    assert "12 tensors left out, which have no parameter of their own in the Transformers module: " in out
    code, out, _ = olmfast(*arguments, "--overwrite", "--json")
    told = json.loads(out)
    assert 0.5 < told["error"] < 1  # the experts
    assert max(told["errors"].values()) < 1e-5
    assert len(told["left_out"]) == 12
    assert "model.layers.0.mlp.gate" in told["modules_to_save"]
    card = (tmp_path / "ad" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "left out" in card


def refused(*arguments: Any, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        extract_lora(*arguments, **keys)
    return str(caught.value)


def test_models_that_do_not_fit_are_refused_before_anything_is_written(place, tmp_path):
    out, base = tmp_path / "ad", place / "llama0"
    assert "has the same weights" in refused(base, base, out, 4)
    assert "--rank 0: expected 1 or more" in refused(base, place / "llama1", out, 0)
    assert "tensors that only" in refused(base, place / "gpt20", out, 4)
    small = tiny_model(tmp_path / "small", "llama", 1, intermediate_size=40)
    assert "has shape [32, 40]" in refused(base, small, out, 4)
    norms = shutil.copytree(base, tmp_path / "norms")
    held = load_file(norms / "model.safetensors")
    save_file(held | {"model.norm.weight": torch.zeros(32)}, norms / "model.safetensors", metadata={"format": "pt"})
    assert "nothing of a rank to extract; what differs: model.norm.weight" in refused(base, norms, out, 4)
    nan = held | {"model.layers.0.mlp.up_proj.weight": torch.full((48, 32), torch.nan)}
    save_file(nan, norms / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors: model.layers.0.mlp.up_proj.weight: holds NaN" in refused(base, norms, out, 4)
    assert not out.exists()
    assert not list(tmp_path.glob("ad*"))
    out.mkdir()
    (out / "mine").touch()
    assert "exists; use --overwrite" in refused(base, place / "llama1", out, 4)
    assert "holds the model" in refused(base, place / "llama1", base, 4, overwrite=True)
    assert "holds the model" in refused(base, place / "llama1", place, 4, overwrite=True)
