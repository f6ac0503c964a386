"""Where donors are found, how they are downloaded, and what may differ between donors of one pool."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast import load_config, run
from olmfast.config.run import RunConfig
from olmfast.errors import InputError
from olmfast.testing import tiny_model, tiny_run
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.hub import resolve
from olmfast.weights.pool import Pool

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def donors(tmp_path_factory) -> Path:
    """Two donors with heads of their own (alpha, beta) and two with tied heads (tied, knot)."""
    folder = tmp_path_factory.mktemp("donors")
    for seed, name in enumerate(("alpha", "beta"), 1):
        tiny_model(folder / name, seed=seed)
    for seed, name in enumerate(("tied", "knot"), 3):
        tiny_model(folder / name, seed=seed, tie_word_embeddings=True)
    return folder


def open_pool(folder: Path, *names: str) -> Pool:
    return Pool.open(names, folder, folder)


def set_config(donor: Path, **keys: Any) -> None:
    path = donor / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def copy(donors: Path, name: str, target: Path) -> Path:
    return shutil.copytree(donors / name, target)


# ---- where donors lie


def test_a_hub_id_lies_in_models_dir_with_its_slash_replaced(donors, tmp_path):
    stored = copy(donors, "alpha", tmp_path / "models" / "org_alpha-7B")
    assert resolve("org/alpha-7B", tmp_path / "models", tmp_path) == stored


def test_a_revision_of_a_hub_id_has_a_folder_of_its_own(donors, tmp_path):
    stored = copy(donors, "alpha", tmp_path / "org_alpha@v2")
    assert resolve("org/alpha@v2", tmp_path, tmp_path) == stored


def test_a_path_is_taken_from_the_config_or_from_models_dir_or_as_it_is(donors, tmp_path, monkeypatch):
    near = copy(donors, "alpha", tmp_path / "mine" / "alpha")
    stored = copy(donors, "alpha", tmp_path / "models" / "group" / "alpha")
    home = copy(donors, "alpha", tmp_path / "home" / "alpha")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir("/")
    for name, expected in {
        "mine/alpha": near,
        "./mine/alpha": near,
        str(near): near,
        "group/alpha": stored,
        "~/alpha": home,
    }.items():
        assert resolve(name, tmp_path / "models", tmp_path).samefile(expected), name


@pytest.mark.parametrize("name", ["alpha", "./alpha", "/no/where", "~nobody/x", "a/b/c", "", "a\0b"])
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=re.escape(f"{name}: no such model folder; looked in {tmp_path / 'm'}")):
        resolve(name, tmp_path / "m", tmp_path / "absent")


# ---- the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download of a model needs, with one model: org/alpha."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files["pytorch_model.bin"] = self.files["training.log"] = b"not wanted"
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: str | None = None  # the file whose transfer breaks off in the middle

    def answer(self, path: str) -> tuple[int, Any]:
        """Status and content of an API request."""
        found = re.fullmatch(r"/api/models/org/alpha(/revision/\w+|/tree/\w+)?", path)
        if not found:
            return 404, {"error": "Repository not found"}
        if "/tree/" in path:
            return 200, [self._entry(name, content) for name, content in self.files.items()]
        return 200, {"id": "org/alpha", "sha": SHA, "siblings": [{"rfilename": name} for name in self.files]}

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": etag(name, content)[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 134}
        return entry

    def asked_for(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for."""
        return [path.rsplit("/", 1)[1] for verb, path, _ in self.requests if verb == method and "/resolve/" in path]


def etag(name: str, content: bytes) -> str:
    """sha256 for large files, 40 digits for small ones, as the hub has them."""
    digest = hashlib.sha256(content).hexdigest()
    return digest if name.endswith(".safetensors") else digest[:40]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path, ranged = self.path.split("?")[0], self.headers.get("Range")
        self.server.requests.append((self.command, path, ranged))
        if "/resolve/" in path:
            self._file(path.rsplit("/", 1)[1], ranged, body)
            return
        status, data = self.server.answer(path)
        code = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **code}, body)

    def _file(self, name: str, ranged: str | None, body: bool) -> None:
        content = self.server.files[name]
        headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = int(re.match(r"bytes=(\d+)-", ranged)[1]) if ranged else 0
        if body and name == self.server.cut:
            if ranged:
                self._send(403, b"", {}, body)
                return
            self._send(200, content, headers, body, stop=len(content) // 2)
            self.close_connection = True
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:stop])

    def log_message(self, *_: Any) -> None:
        """Keeps the output of the tests clean."""


@pytest.fixture
def hub(donors, tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub on this machine that huggingface_hub talks to."""
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub(donors / "alpha")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # else so small a file arrives whole or not at all
    huggingface_hub.utils.disable_progress_bars()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "models"


def is_whole(folder: Path, hub: Hub) -> bool:
    """Whether every wanted file of the model is there, with the right bytes, and nothing says otherwise."""
    wanted = {name: content for name, content in hub.files.items() if content != b"not wanted"}
    held = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    unfinished = [*folder.parent.glob("*.incomplete"), *folder.rglob("*.incomplete")]
    return held == wanted and not unfinished


def test_a_hub_model_that_is_not_there_is_downloaded_once(hub, models, tmp_path):
    folder = resolve("org/alpha", models, tmp_path)
    assert folder == models / "org_alpha"
    assert is_whole(folder, hub)
    assert Checkpoint(folder).architecture.n_blocks == 2
    hub.requests.clear()
    assert resolve("org/alpha", models, tmp_path) == folder
    assert hub.requests == []


def test_what_is_not_needed_is_not_downloaded(hub, models, tmp_path):
    resolve("org/alpha", models, tmp_path)
    assert "pytorch_model.bin" not in hub.asked_for()
    assert "training.log" not in hub.asked_for()


def test_a_revision_is_asked_for(hub, models, tmp_path):
    assert is_whole(resolve("org/alpha@v2", models, tmp_path), hub)
    assert ("GET", "/api/models/org/alpha/revision/v2", None) in hub.requests


def test_a_download_that_broke_off_is_told_and_continued_with_the_file_it_was_at(hub, models, tmp_path):
    hub.cut = "model.safetensors"
    with pytest.raises(InputError) as caught:
        resolve("org/alpha", models, tmp_path)
    assert str(caught.value).startswith(f"org/alpha: not in {models} and could not be downloaded (unfinished: ")
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    hub.cut = None
    hub.requests.clear()
    assert is_whole(resolve("org/alpha", models, tmp_path), hub)
    assert hub.asked_for() == ["model.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "cut", "cut long ago", "no config", "killed before the tokenizer"])
def test_a_folder_that_a_killed_download_left_is_noticed_and_completed(hub, models, tmp_path, damage):
    folder = resolve("org/alpha", models, tmp_path)
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage.startswith("killed"):
        (folder / "tokenizer.json").unlink()
        (models / "org_alpha.incomplete").touch()
    else:
        before = weights.stat().st_mtime
        weights.write_bytes(weights.read_bytes()[:-100])
        if damage == "cut long ago":
            os.utime(weights, (before, before))
    assert is_whole(resolve("org/alpha", models, tmp_path), hub)


def test_a_missing_shard_of_several_is_fetched_and_the_others_are_not(hub, models, tmp_path, donors):
    for path in tiny_model(tmp_path / "sharded", seed=1, shard_size="40KB").iterdir():
        hub.files[path.name] = path.read_bytes()
    del hub.files["model.safetensors"]
    folder = resolve("org/alpha", models, tmp_path)
    first, *others = sorted(folder.glob("*.safetensors"))
    assert others
    first.unlink()
    hub.requests.clear()
    assert is_whole(resolve("org/alpha", models, tmp_path), hub)
    assert hub.asked_for() == [first.name]
    whole, parts = Checkpoint(donors / "alpha"), Checkpoint(folder)
    assert {name: whole.digest(name) for name in whole.tensors} == {n: parts.digest(n) for n in parts.tensors}


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_does_not_have_is_named_and_leaves_no_trace(models, tmp_path):
    with pytest.raises(InputError) as caught:
        resolve("org/alhpa", models, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"org/alhpa: not in {models} and could not be downloaded: ")
    assert message.endswith(f"; check the name and the network, or put the model at {models / 'org_alhpa'}")
    assert "\n" not in message
    assert not models.exists()


@pytest.fixture
def no_network(hub, monkeypatch) -> None:
    """Nobody listens any more."""
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(hub, "shutdown", lambda: None)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_error_says_so_and_leaves_no_trace(models, tmp_path):
    with pytest.raises(InputError) as caught:
        resolve("org/alpha", models, tmp_path)
    assert "and could not be downloaded: " in str(caught.value)
    assert "check the name and the network" in str(caught.value)
    assert not models.exists()


@pytest.mark.usefixtures("no_network")
def test_without_a_network_an_unfinished_download_is_not_taken_for_the_model(donors, models, tmp_path):
    folder = copy(donors, "alpha", models / "org_alpha")
    assert resolve("org/alpha", models, tmp_path) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"\(unfinished: model\.safetensors\)"):
        resolve("org/alpha", models, tmp_path)


# ---- donors of one pool


def test_a_tied_pool_has_one_tensor_for_embedding_and_head(donors):
    pool = open_pool(donors, "tied", "knot")
    assert pool.tied
    assert HEAD not in pool.tensors


def test_in_an_untied_pool_a_tied_donor_offers_its_embedding_as_head(donors):
    pool = open_pool(donors, "alpha", "tied")
    assert not pool.tied
    assert torch.equal(pool["tied"].read(HEAD), pool["tied"].read(EMBEDDING))
    assert pool["alpha"].digest(HEAD) != pool["alpha"].digest(EMBEDDING)


def test_a_config_that_ties_a_head_of_its_own_is_not_believed(donors, tmp_path):
    copy(donors, "alpha", tmp_path / "odd")
    set_config(tmp_path / "odd", tie_word_embeddings=True)
    pool = open_pool(tmp_path, "odd")
    assert not pool.tied
    assert torch.equal(pool["odd"].read(HEAD), load_file(donors / "alpha" / "model.safetensors")[HEAD])


def test_a_tied_head_that_is_stored_twice_is_still_tied(donors, tmp_path):
    copy(donors, "tied", tmp_path / "twice")
    tensors = load_file(tmp_path / "twice" / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, tmp_path / "twice" / "model.safetensors")
    pool = open_pool(tmp_path, "twice")
    assert pool.tied
    assert HEAD not in pool.tensors


def config_for(folder: Path, donors: Path, names: list[str], **keys: Any) -> RunConfig:
    """A run's config over copies of some donors."""
    path = tiny_run(folder, 0, **{"models": names, "boundary_select": True, "layer_swap": True, **keys})
    for name in names:
        if not (folder / "models" / name).is_dir():
            copy(donors, name, folder / "models" / name)
    return load_config(path)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(torch.arange(5, 15)[None]).logits


@pytest.mark.parametrize("names", [["tied", "knot"], ["tied", "alpha"], ["alpha", "tied"]])
def test_a_merge_of_tied_and_untied_donors_is_saved_as_it_was_scored(donors, tmp_path, names):
    result = run(config_for(tmp_path, donors, names))
    held = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if HEAD in held:
        assert not config["tie_word_embeddings"]
    else:
        assert config["tie_word_embeddings"]
    from olmfast.runs.scoreboard import evaluate

    data = str(tmp_path / "heldout.json")
    board = evaluate(str(tmp_path / "out"), {data: {"mode": "perplexity"}}, device="cpu")
    assert board.rows[str(tmp_path / "out")][data] == result.holdout.rows["merged"]["heldout.json"]
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_config_that_ties_a_head_of_its_own_gives_a_result_that_loads_with_its_head(donors, tmp_path):
    copy(donors, "alpha", tmp_path / "models" / "odd")
    set_config(tmp_path / "models" / "odd", tie_word_embeddings=True)
    run(config_for(tmp_path, donors, ["odd"]))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(donors / "alpha"), rtol=1e-9, atol=1e-9)


def spoil(donor: Path) -> Path:
    """Make a donor so sure of its wrong answers that every other is better."""
    tensors = load_file(donor / "model.safetensors")
    tensors["model.norm.weight"] *= 50
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
    return donor


BY_ENTROPY = {"dataset": {"sums.json": {"mode": "exact"}}, "holdout": {}}


def test_donors_stored_in_another_dtype_join_in_and_the_result_has_the_bases(donors, tmp_path):
    spoil(tiny_model(tmp_path / "models" / "brain", seed=8, dtype=torch.bfloat16))
    tiny_model(tmp_path / "models" / "half", seed=9, dtype=torch.float16)
    result = run(config_for(tmp_path, donors, ["brain", "half", "alpha"], **BY_ENTROPY))
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    donor = result.recipe.tensors["model.norm.weight"].donor
    assert donor != "brain"
    for name, expression in result.recipe.tensors.items():
        stored = load_file(tmp_path / "models" / expression.donor / "model.safetensors")[name]
        assert torch.equal(held[name], stored.to(torch.bfloat16)), name


def test_shards_and_a_single_file_hold_the_same_model(donors, tmp_path):
    tiny_model(tmp_path / "sharded", seed=1, shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    copy(donors, "alpha", tmp_path / "single")
    pool = open_pool(tmp_path, "single", "sharded")
    assert pool["single"].fingerprint() == pool["sharded"].fingerprint()


def test_a_gpt2_file_without_the_prefix_is_the_same_model(tmp_path):
    folder = tiny_model(tmp_path / "plain", "gpt2", seed=1)
    old = shutil.copytree(folder, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()  # old files store this buffer
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "h.0.attn.bias": mask}, old / "model.safetensors", metadata={"format": "pt"})
    pool = open_pool(tmp_path, "plain", "old")
    for name in tensors:
        assert pool["old"].digest(name) == pool["plain"].digest(name)


@pytest.mark.parametrize("names", [["alpha", "stale"], ["stale", "alpha"]])
@pytest.mark.parametrize("winner", ["alpha", "stale"])
def test_a_buffer_that_only_some_donors_store_keeps_none_of_them_from_winning(donors, tmp_path, names, winner):
    for name, source in (("alpha", "alpha"), ("stale", "beta")):
        copy(donors, source, tmp_path / "models" / name)
    weights = tmp_path / "models" / "stale" / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(weights), **buffer}, weights, metadata={"format": "pt"})
    (loser,) = set(names) - {winner}
    spoil(tmp_path / "models" / loser)
    result = run(
        config_for(tmp_path, donors, names, base_select=True, boundary_select=False, layer_swap=False, **BY_ENTROPY)
    )
    assert result.recipe.base == winner
    left_out = "1 computed by the model and not written" in result.record.values["account"]
    assert left_out == (winner == "stale")
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_settings_that_may_differ_are_a_warning(donors, tmp_path):
    copy(donors, "alpha", tmp_path / "alpha")
    copy(donors, "beta", tmp_path / "beta")
    set_config(tmp_path / "beta", rms_norm_eps=0.5)
    (warning,) = open_pool(tmp_path, "alpha", "beta").warnings
    assert warning.startswith("beta: rms_norm_eps is 0.5, alpha has 1e-06; ")
