"""What was there before is there after, byte for byte, unless its loss was agreed to: the whole tree is compared."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from olmfast import load_config, merge, run
from olmfast.errors import InputError, Interrupted, OlmfastError
from olmfast.observer import Observer
from olmfast.output.folder import OutputFolder
from olmfast.output.ownership import identity
from olmfast.testing import SLERP, tree

COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "merge": lambda place: ["merge", place / "m.yml", place / "out"],
    "linear": lambda place: [
        *("linear", "--model_a", place / "a", "--model_b", place / "b"),
        *("--alpha", "0.5", "--output_dir", place / "out"),
    ],
    "run": lambda place: ["run", place / "cfg.yaml", "-q"],
}


def without(found: dict[str, tuple[int, bytes]], *names: str) -> dict[str, tuple[int, bytes]]:
    return {path: held for path, held in found.items() if Path(path).parts[0] not in names}


@pytest.fixture(params=COMMANDS)
def command(request, place) -> list[object]:
    return COMMANDS[request.param](place)


FORGED = (
    '{"aside": "important", "identity": "MINE", "gone": "important"}',
    '{"aside": "out.replaced", "identity": "REPLACED", "gone": ".olmfast-0123456789abcdef"}',
    "[]",
)
NOTES = ["important", "..", "../important", "", *FORGED]


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("at", ["out", "out.partial"])
def test_a_note_that_somebody_put_into_a_folder_is_not_obeyed(note, at, place, olmfast):
    (place / at).mkdir()
    shutil.copytree(place / "important", place / "out.replaced")
    for name, folder in (("MINE", "important"), ("REPLACED", "out.replaced")):
        note = note.replace(name, str(identity(place / folder)))
    (place / at / ".replacing").write_text(note)
    before = tree(place)
    for arguments in (build(place) for build in COMMANDS.values()):
        code, _, err = olmfast(*arguments)
        assert (code, tree(place)) == (2, before), err
        assert str(place / at) in err
    code, _, err = olmfast(*COMMANDS["merge"](place), "--overwrite")
    assert code == (0 if at == "out" else 2), err
    assert without(tree(place), at) == without(before, at)
    assert (tree(place) == before) == (at == "out.partial")


def test_a_note_is_not_obeyed_although_a_true_record_lies_beside_it(place, olmfast):
    """Copied from a folder in progress: the record is of another folder."""
    killed("between two names", place)
    for name in (".lock", ".replacing"):
        (place / "important" / name).write_bytes((place / "out.partial" / name).read_bytes())
    shutil.rmtree(place / "out.partial")
    (place / "important").rename(place / "out.partial")
    before = tree(place)
    for flags in ([], ["--overwrite"]):
        code, _, err = olmfast(*COMMANDS["merge"](place), *flags)
        assert (code, tree(place)) == (2, before), err
        assert f"{place / 'out.partial'}: is in the way" in err


def test_another_folder_under_the_name_of_the_old_result_is_left_alone(place, olmfast):
    killed("between two names", place)
    shutil.rmtree(place / "out.replaced")
    shutil.copytree(place / "important", place / "out.replaced")
    before = tree(place)
    code, _, err = olmfast(*COMMANDS["merge"](place))
    assert code == 0, err
    assert without(tree(place), "out", "out.partial") == without(before, "out.partial")


def test_nothing_is_healed_before_the_input_is_checked(place, olmfast):
    killed("between two names", place)
    (place / "m.yml").write_text("merge_method: slerp\n")
    before = tree(place)
    assert olmfast(*COMMANDS["merge"](place))[0] == 2
    assert tree(place) == before


def test_a_dry_run_heals_nothing(place, olmfast):
    killed("between two names", place)
    before = tree(place)
    assert olmfast(*COMMANDS["merge"](place), "--dry-run")[0] == 0
    assert tree(place) == before


class Killed(BaseException):
    """Nothing is done about it, as nothing can be about SIGKILL."""


def killed(moment: str, place: Path) -> None:
    """Leave what a merge leaves that is killed with its result complete, beside an old one or without."""
    if moment == "between two names":
        shutil.copytree(place / "important", place / "out")
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise Killed
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        with pytest.raises(Killed):
            merge(place / "m.yml", place / "out", overwrite=True)


def users_folder(place: Path) -> None:
    shutil.copytree(place / "important", place / "out.partial")


def empty_folder(place: Path) -> None:
    (place / "out.partial").mkdir()


def link_to_a_folder(place: Path) -> None:
    (place / "out.partial").symlink_to("important")


def link_to_nothing(place: Path) -> None:
    (place / "out.partial").symlink_to("nowhere")


def file(place: Path) -> None:
    (place / "out.partial").write_text("mine")


def donor(place: Path) -> None:
    (place / "a").rename(place / "out.partial")
    (place / "a").symlink_to("out.partial")


def copy_of_an_unfinished_merge(place: Path) -> None:
    killed("complete", place)
    shutil.copytree(place / "out.partial", place / "copy")
    shutil.rmtree(place / "out.partial")
    (place / "copy").rename(place / "out.partial")


def unfinished_merge_with_a_file_of_the_users(place: Path) -> None:
    killed("complete", place)
    (place / "out.partial" / "notes.txt").write_text("mine")


def unfinished_merge_with_a_folder_of_the_users(place: Path) -> None:
    killed("complete", place)
    shutil.copytree(place / "important", place / "out.partial" / "refined" / "important")


def unfinished_merge_with_a_link(place: Path) -> None:
    killed("complete", place)
    (place / "out.partial" / "refined").symlink_to("../important")


def unfinished_merge_that_is_a_donor(place: Path) -> None:
    killed("complete", place)
    shutil.rmtree(place / "a")
    (place / "a").symlink_to("out.partial")


FOREIGN = (
    users_folder,
    empty_folder,
    link_to_a_folder,
    link_to_nothing,
    file,
    donor,
    copy_of_an_unfinished_merge,
    unfinished_merge_with_a_file_of_the_users,
    unfinished_merge_with_a_folder_of_the_users,
    unfinished_merge_with_a_link,
    unfinished_merge_that_is_a_donor,
)


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda make: make.__name__)
def test_what_has_the_name_of_a_folder_in_progress_and_is_not_one_is_left_alone(foreign, place, olmfast):
    foreign(place)
    before = tree(place)
    for name, flag in (("merge", ""), ("merge", "--overwrite"), ("run", "--overwrite"), ("run", "--resume")):
        code, _, err = olmfast(*COMMANDS[name](place), *([flag] if flag else []))
        assert (code, tree(place)) == (2, before), err
        assert str(place / "out.partial") in err


def test_what_a_kill_leaves_before_there_is_a_record_is_removed_by_the_next_command(place, olmfast):
    names = [f".olmfast-{digit * 16}" for digit in "0123456"]
    empty, unwritten, locked, written, more, is_file, link = (place / name for name in names)
    for folder in (empty, unwritten, locked, written, more):
        folder.mkdir()
    for folder, text in ((unwritten, ""), (locked, ""), (written, "mine"), (more, ""), (more, "")):
        (folder / ".lock").write_text(text)
    (more / "thesis.txt").write_text("the only copy")
    is_file.write_text("")
    link.symlink_to(empty)
    with (locked / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert olmfast(*COMMANDS["merge"](place))[0] == 0
    left = {path.name for path in place.iterdir() if path.name.startswith(".olmfast-")}
    assert left == {path.name for path in (locked, written, more, is_file, link)}


def test_a_run_is_not_resumed_through_a_link(place, olmfast):
    interrupted(place)
    (place / "out.partial").rename(place / "elsewhere")
    (place / "out.partial").symlink_to("elsewhere")
    before = tree(place)
    for flag in ("--resume", "--overwrite"):
        code, _, err = olmfast(*COMMANDS["run"](place), flag)
        assert (code, tree(place)) == (2, before), err
    (place / "out.partial").unlink()
    (place / "elsewhere").rename(place / "out.partial")
    log = place / "out.partial" / "evaluations.jsonl"
    log.rename(place / "important" / log.name)
    log.symlink_to(place / "important" / log.name)
    before = tree(place)
    code, _, err = olmfast(*COMMANDS["run"](place), "--resume")
    assert (code, tree(place)) == (2, before), err
    assert f"{log}: is a link" in err
    log.unlink()
    os.mkfifo(log)
    code, _, err = olmfast(*COMMANDS["run"](place), "--resume")
    assert code == 2, err
    assert f"{log}: is a link or no file" in err


def test_a_file_of_the_users_in_a_run_in_progress_is_kept(place, olmfast):
    interrupted(place)
    mine = ("notes.txt", "refined/notes.txt", "model_old.safetensors")
    for name in mine:
        (place / "out.partial" / name).write_text("mine")
    assert olmfast(*COMMANDS["run"](place), "--resume", "--set", "es_norm=false")[0] == 0
    assert [(place / "out" / name).read_text() for name in mine] == ["mine"] * 3


def interrupted(place: Path) -> None:
    asked = iter([False])
    with pytest.raises(Interrupted):
        run(load_config(place / "cfg.yaml"), stop_requested=lambda: next(asked, True))


def appears(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("just written")


def appears_empty(out: Path) -> None:
    out.mkdir()


def appears_as_a_file(out: Path) -> None:
    out.write_text("just written")


def appears_as_a_link(out: Path) -> None:
    out.symlink_to("important")


class Once(Observer):
    """Does something at OUT as soon as the work has begun."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act: Callable[[], object] | None = act

    def written(self, *_: object) -> None:
        if self.act is not None:
            self.act()
            self.act = None

    def step(self, *_: object) -> None:
        self.written()


APPEARING = (appears, appears_empty, appears_as_a_file, appears_as_a_link)


@pytest.mark.parametrize("appearing", APPEARING, ids=lambda make: make.__name__)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_during_a_merge_stays(appearing, overwrite, place):
    out = place / "out"
    with pytest.raises(OlmfastError, match="the complete result is") as caught:
        merge(place / "m.yml", out, overwrite=overwrite, observer=Once(lambda: appearing(out)))
    assert caught.value.exit_code == 1
    after = tree(place)
    shutil.rmtree(place / "out.partial")
    out.unlink() if out.is_symlink() or out.is_file() else shutil.rmtree(out)
    appearing(out)
    assert without(after, "out.partial") == tree(place)
    out.unlink() if out.is_symlink() or out.is_file() else shutil.rmtree(out)
    merge(place / "m.yml", out)
    partial = {p.removeprefix("out.partial/"): held for p, held in after.items() if p.startswith("out.partial/")}
    assert {path: held for path, held in partial.items() if path != ".lock"} == tree(out)


def another_folder(out: Path) -> None:
    """The agreement was about the one before; the system may well give it the same number."""
    shutil.rmtree(out)
    appears(out)


def a_new_file(out: Path) -> None:
    (out / "more.txt").write_text("just written")


def a_new_file_deeper(out: Path) -> None:
    (out / "deep" / "more.txt").write_text("just written")


def a_changed_file(out: Path) -> None:
    with (out / "thesis.txt").open("a") as file:
        file.write(" and a new chapter")


CHANGES = (another_folder, a_new_file, a_new_file_deeper, a_changed_file)


@pytest.mark.parametrize("change", CHANGES, ids=lambda make: make.__name__)
def test_an_output_that_changes_after_it_was_agreed_to_overwrite_it_stays(change, place):
    out = place / "out"
    shutil.copytree(place / "important", out)
    (out / "deep").mkdir()
    expected: dict[str, tuple[int, bytes]] = {}

    def act() -> None:
        change(out)
        expected.update(tree(out))

    with pytest.raises(OlmfastError, match=f"{out}: was changed.*the complete result is {out}.partial"):
        merge(place / "m.yml", out, overwrite=True, observer=Once(act))
    assert tree(out) == expected


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("appearing", [appears, appears_empty], ids=lambda make: make.__name__)
def test_what_appears_at_the_output_during_a_run_stays(appearing, resumed, place):
    out, config = place / "out", load_config(place / "cfg.yaml")
    if resumed:
        interrupted(place)
    with pytest.raises(OlmfastError, match="the complete result is"):
        run(config, resume=resumed, observer=Once(lambda: appearing(out)))
    before = without(tree(place), "out.partial")
    if appearing is not appears_empty:
        with pytest.raises(InputError, match=f"{out}: (was not there|exists and is not|is a link)"):
            run(config, resume=True)
    assert without(tree(place), "out.partial") == before
    out.unlink() if out.is_symlink() or out.is_file() else shutil.rmtree(out)
    assert run(config, resume=True).status == "finished"


def test_a_folder_that_appears_between_kill_and_resume_stays(place, olmfast):
    interrupted(place)
    appears(place / "out")
    before = tree(place)
    code, _, err = olmfast(*COMMANDS["run"](place), "--resume")
    assert (code, tree(place)) == (2, before), err
    assert f"{place / 'out'}: was not there" in err


def test_what_it_was_agreed_to_overwrite_is_still_agreed_after_a_kill(place):
    shutil.copytree(place / "important", place / "out")
    asked = iter([False])
    with pytest.raises(Interrupted):
        run(load_config(place / "cfg.yaml"), overwrite=True, stop_requested=lambda: next(asked, True))
    assert run(load_config(place / "cfg.yaml"), resume=True).status == "finished"
    assert not (place / "out" / "thesis.txt").exists()
    assert not (place / "out.replaced").exists()


def test_everything_that_is_written_into_a_folder_in_progress_may_be_removed_from_it(place, monkeypatch):
    """Else a command could not begin again after a kill: names of parts are listed in one place."""
    monkeypatch.setattr(OutputFolder, "rename", lambda *_, **__: None)
    keys = {"es_norm": True, "es_norm_generations": 1, "tensor_swap": False, "layer_swap": False}
    with pytest.raises(InputError, match=r"steps\.jsonl"):  # it was not renamed
        run(load_config(place / "cfg.yaml", keys))
    partial = place / "out.partial"
    assert list((partial / "refined").iterdir())
    assert (partial / "steps.jsonl").exists()
    OutputFolder(place / "out", overwrite=True).check_partial()
    shutil.rmtree(partial)
    (place / "a" / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    for folder, file in (("1_Pooling", "config.json"), ("additional_chat_templates", "tools.jinja")):
        (place / "a" / folder).mkdir()
        (place / "a" / folder / file).write_text("{}")
    keys = SLERP | {"tokenizer": {"source": "union"}, "chat_template": "chatml"}
    (place / "m.yml").write_text(yaml.safe_dump(keys))
    merge(place / "m.yml", place / "out", shard_size=20_000)
    assert (partial / "model.safetensors.index.json").exists()
    assert (partial / "1_Pooling" / "config.json").exists()
    OutputFolder(place / "out", overwrite=True).check_partial()
