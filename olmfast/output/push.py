"""A result on the Hub: which of its files go there, and their upload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from olmfast.errors import InputError, OlmfastError, told
from olmfast.output.beside import CODE, PROCESSOR
from olmfast.output.folder import partial_of
from olmfast.output.writer import WEIGHTS
from olmfast.weights.checkpoint import ADAPTER_CONFIG, GENERATION_CONFIG, TOKENIZER_FILES

ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors")
# What anybody needs to use the model, and what its card shows.
MODEL = (*WEIGHTS, *ADAPTER, "config.json", "README.md", GENERATION_CONFIG, *TOKENIZER_FILES, *PROCESSOR, CODE)
SHOWN = ("mergekit_config.yml", "repeats.svg")
# What tells how it came to be; it holds questions and answers, and where models lay.
HISTORY = ("report.html", "merge_report.json", "alphas.json", "path.yml", "mmlu_results.json")
# Files of folders in it.
INSIDE = (".eval_results/*.yaml", "additional_chat_templates/*.jinja", "[0-9]*_*/*")


@dataclass(frozen=True)
class Upload:
    """What goes to a repository: names in it, each with its file."""

    repo: str
    files: dict[str, Path]

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return sum(path.stat().st_size for path in self.files.values())


def plan_upload(folder: str | Path, repo: str, with_report: bool = False) -> Upload:
    """What of a result would go to `repo` (`org/name`); `with_report`: how it came to be too.

    Raises InputError for a folder that holds no complete model, and for a name that the Hub does not allow.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: is no name of a repository on the Hub: {told(error)}") from error
    if "/" not in repo:
        raise InputError(f"{repo}: expected org/name, whose repository it is and what it is called")
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a directory")
    if folder == partial_of(folder.with_name(folder.name.removesuffix(".partial"))):
        raise InputError(f"{folder}: is not complete; finish the run first")
    files = dict(_chosen(folder, (*MODEL, *SHOWN, *INSIDE, *(HISTORY if with_report else ()))))
    weights = [name for name in files if any(fnmatchcase(name, own) for own in (*WEIGHTS, ADAPTER[1]))]
    if not weights or not ({"config.json", ADAPTER_CONFIG} & files.keys()):
        raise InputError(f"{folder}: holds no model: expected config.json and model.safetensors, or an adapter's files")
    return Upload(repo, files)


def push(upload: Upload, private: bool = False) -> str:
    """Upload it in one commit, to a repository that is made where there is none. Returns the address.

    Raises OlmfastError saying what the Hub refused.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
    try:
        url = api.create_repo(upload.repo, private=private or None, exist_ok=True)
        api.create_commit(upload.repo, operations, commit_message="A model merged by olmfast")
    except Exception as error:  # the hub client and its transport raise many unrelated types
        raise OlmfastError(
            f"{upload.repo}: cannot be uploaded: {told(error)}; log in with `hf auth login`, and push again"
        ) from error
    return str(url)


def _chosen(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatchcase(name, own) and name.count("/") == own.count("/") for own in patterns):
            yield name, path
