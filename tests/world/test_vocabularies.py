"""Random vocabularies: every token of a result has one row, and it is the row that docs/mergekit.md says."""

from __future__ import annotations

import json
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olmfast.weights.vocabulary import MEAN, Given, plan_vocabulary

FOLDERS = count()
MODELS = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), st.integers(1, 10)),
    min_size=2,
    max_size=3,
)


@pytest.mark.parametrize("source", ["base", "union", "m1"])
@given(drawn=MODELS, named=st.sets(st.sampled_from("abxy")))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_has_one_row_and_it_is_the_row_of_who_has_it(source, drawn, named, tmp_path):
    pool: dict[str, Any] = {}
    for index, (tokens, _) in enumerate(drawn):
        folder = tmp_path / str(next(FOLDERS))
        folder.mkdir()
        vocab = {token: place for place, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        pool[f"m{index}"] = SimpleNamespace(folder=folder, tokenizer_folder=folder)
    rows = {f"m{index}": n for index, (_, n) in enumerate(drawn)}
    held = {f"m{i}": {t: place for place, t in enumerate(tokens) if place < n} for i, (tokens, n) in enumerate(drawn)}
    tokens = {token: Given(None, False) for token in sorted(named)}
    found = plan_vocabulary(pool, list(pool), "m0", source, tokens, None, rows)  # type: ignore[arg-type]
    chosen = "m1" if source == "m1" else "m0"
    own = list(drawn[int(chosen[1])][0])
    every = {token for tokens, _ in drawn for token in tokens}
    assert set(found.ids) == set(own) | named | (every if source == "union" else set())
    assert all(found.ids[token] == place for place, token in enumerate(own))
    assert len(set(found.ids.values())) == len(found.ids)
    assert max(found.ids.values()) < found.n_rows
    assert found.n_rows >= rows[chosen]
    for model in pool:
        origins = found._origins(model, list(pool), "m0")
        assert len(origins) == found.n_rows
        for token, row in found.ids.items():
            holders = [name for name in pool if token in held[name]]
            if token in held[model]:
                expected = ((model, held[model][token]),)
            elif holders:
                taken = ["m0"] if "m0" in holders and len(holders) > 1 else holders
                expected = tuple((name, held[name][token]) for name in taken)
            else:
                expected = MEAN if token in every else ()
            assert origins[row] == expected
