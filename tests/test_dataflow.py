"""A folded path computes what the path computes, hop after hop, with Transformers' own modules."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hops import BIASED, DEPTH, MODELS, D, Factor, bias_of, donors, factor, file_of, folded, hop_by_hop, loaded, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from olmfast.dataflow.execution import execute
from olmfast.errors import InputError
from olmfast.testing import FAMILIES

OTHER_KINDS = [
    ("llama", {"mlp_bias": True}),
    ("cohere", {"attention_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}),
]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("family", "config"), [*((family, {}) for family in FAMILIES), *OTHER_KINDS])
def test_every_family_folds_numbers_diagonals_matrices_and_what_biases_it_has(family, config):
    mixed = "diagonal" if family == "gemma2" else "matrix"
    path: list[tuple[int, int, Factor, Factor]] = [
        (1, 1, factor("matrix", 1), bias_of("vector", 1)),
        (0, 0, factor("-0.7", 2), None),
        (0, 1, factor(mixed, 3), None),
        (1, 1, factor("diagonal", 4), None),
        (1, 0, None, None),
        (1, 1, factor("0", 5), None),
    ]
    if family in BIASED:
        path = [(*hop[:3], bias_of("vector" if i % 2 else "0.25", i)) for i, hop in enumerate(path)]
    folders = donors(family, **config)
    models = [whole(folder) for folder in folders]
    got = folded(folders, {**file_of(path), "input_layer_model": 0, "output_layer_model": 1})
    torch.testing.assert_close(got, hop_by_hop(models, path, 0, 1), rtol=1e-9, atol=1e-9)


FACTORS = st.sampled_from(["0", "1", "-1", "0.3", "2.5", "diagonal", "matrix"])
BIASES = st.sampled_from(["0", "-0.5", "vector"])


@pytest.mark.usefixtures("float64_throughout")
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mask_factors_and_settings_fold(data):
    family = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox"]))
    tied = data.draw(st.booleans())
    folders = donors(family, tie_word_embeddings=tied)
    n_r = data.draw(st.integers(1, 2))
    mask = data.draw(st.lists(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=2),
                              min_size=n_r, max_size=n_r))  # fmt: skip
    entry, out = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    last = data.draw(st.one_of(st.none(), st.sampled_from([0.0, 1.0, -2.0, 0.5])))
    if last is None and not any(flag for r in mask for m in r for flag in m):
        last = 1.0
    path, scales, biases = [], [], []
    for r in range(n_r):
        scales.append([[], []])
        biases.append([[], []])
        for m in range(2):
            for layer in range(3):
                kind = data.draw(FACTORS)
                if family == "gemma2" and kind == "matrix" and path:
                    kind = "diagonal"
                scale = factor(kind, 7 * r + 3 * m + layer)
                may_add = family in BIASED or not path
                bias = bias_of(data.draw(BIASES) if may_add else "0", 100 + 7 * r + 3 * m + layer)
                scales[r][m].append(scale)
                biases[r][m].append(bias)
                if mask[r][m][layer]:
                    path.append((m, layer, scale, bias))
    if last is not None:
        path.append((out, DEPTH - 1, last, None))
    file = {"num_r": n_r, "layer_mask": mask, "scaling_factors": scales, "bias_factors": biases}
    file |= {"input_layer_model": entry, "output_layer_model": out}
    got = folded(folders, file, add_last_layer=last is not None, last_layer_scale=last)
    want = hop_by_hop([whole(folder) for folder in folders], path, entry, out)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BIASED])
def test_where_no_bias_can_go_the_error_names_hop_and_factor(family):
    path = [(0, 0, None, 1.0), (1, 1, None, bias_of("vector", 0))]
    with pytest.raises(InputError, match=rf"bias_factors\[1\]\[1\]\[1\]: {family} has no bias"):
        folded(donors(family), file_of(path))
    if family == "gemma2":
        with pytest.raises(InputError, match=r"scaling_factors\[1\]\[0\]\[0\]: gemma2 has a norm behind its MLP"):
            folded(donors(family), file_of([(0, 0, None, None), (0, 0, factor("matrix", 0), None)]))


def test_what_is_tied_stays_tied_until_a_factor_changes_the_embedding():
    folders = donors("qwen2", torch.float32)
    plain, _ = execute({**file_of([(0, 0, None, None), (1, 1, 0.5, None)]), "model_paths": folders}, dtype="float32")
    assert plain.config.tie_word_embeddings
    scaled, _ = execute({**file_of([(0, 0, 2.0, None)]), "model_paths": folders}, dtype="float32")
    assert not scaled.config.tie_word_embeddings
    assert torch.equal(scaled.model.embed_tokens.weight, 2 * plain.model.embed_tokens.weight)
    assert torch.equal(scaled.lm_head.weight, plain.lm_head.weight)


def test_what_is_a_number_or_a_diagonal_goes_where_only_these_can():
    none, diagonal = torch.zeros(D, dtype=torch.float64), factor("diagonal", 1)
    path = [
        (0, 0, None, None),
        (1, 1, torch.eye(D, dtype=torch.float64) * 0.5, none),
        (0, 2, torch.diag(diagonal), none),
    ]
    simple = [(0, 0, None, None), (1, 1, 0.5, None), (0, 2, diagonal, None)]
    for family in ("mistral", "gemma2"):
        folders = donors(family)
        assert torch.equal(folded(folders, file_of(path)), folded(folders, file_of(simple)))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("entry", [0, 1])
def test_a_folded_model_with_biases_is_a_donor_beside_those_without(entry):
    plain, first = donors("llama"), [(0, 0, 0.5, None), (1, 1, None, bias_of("vector", 3)), (0, 2, -1.0, 0.5)]
    with tempfile.TemporaryDirectory(dir=MODELS.name) as folder:
        out = Path(folder) / "folded"
        execute({**file_of(first), "model_paths": plain}, out, dtype="float64")
        path = [(0, 0, 2.0, None), (1, 0, factor("diagonal", 1), None), (1, 2, None, 1.0), (0, 1, None, None)]
        both = [plain[0], str(out)]
        got = folded(both, {**file_of(path), "input_layer_model": entry})
        want = hop_by_hop([whole(plain[0]), loaded(out, attn_implementation="eager")], path, entry)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_in_float32_the_logits_are_those_of_the_path_but_for_rounding(family):
    path = [(0, 0, factor("matrix", 1), bias_of("vector", 1)), (1, 1, -0.7, 0.25), (0, 2, factor("diagonal", 2), None)]
    got = folded(donors(family, torch.float32), file_of(path), dtype="float32")
    want = hop_by_hop([whole(folder).double() for folder in donors(family, torch.float32)], path)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.std()))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_products_are_of_float32_and_rounded_once(stored):
    folders = donors("llama", stored)
    a, b = factor("matrix", 1), bias_of("vector", 1)
    path = [(0, 0, a, b), (0, 1, factor("diagonal", 2), b), (0, 2, a, None)]
    held = load_file(f"{folders[0]}/model.safetensors")
    exact = {
        "model.embed_tokens.weight": held["model.embed_tokens.weight"].double() @ a.T + b,
        "model.layers.0.mlp.down_proj.weight": factor("diagonal", 2)[:, None]
        * held["model.layers.0.mlp.down_proj.weight"],
        "model.layers.0.mlp.down_proj.bias": b,
        "model.layers.1.mlp.down_proj.weight": a @ held["model.layers.1.mlp.down_proj.weight"].double(),
    }
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            execute({**file_of(path), "model_paths": folders}, Path(folder) / "out", dtype=dtype)
            got = load_file(f"{folder}/out/model.safetensors")
        for name, wanted in exact.items():
            step = torch.finfo(getattr(torch, dtype)).eps
            slack = 1e-5 * wanted.abs().max()  # of sums in float32
            assert bool(((got[name].double() - wanted).abs() <= step / 2 * wanted.abs() + slack).all()), name
