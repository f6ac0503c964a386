"""Kills, full disks and changed models, many of each: nothing may be lost, and the same command ends as if undisturbed.

    python tests/soak/soak.py --kills 1000 --seed 0

Commands run in forks of this process, which has all modules loaded, so that most moments at which they are disturbed
lie in their work; one in fifty is a process of its own. After each disturbance everything outside of the output must be
as it was, byte for byte, the output must be whole (the old one, the new one, or none where there was none), and the
command given again must complete it with the same bytes as one that was never disturbed. Exits with 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
EVOLVED = {"es_norm": True, "es_norm_generations": 1, "units": ["*.0.*norm*"], "shard_size": "20KB"}
TIMED = ("steps.jsonl", "merge_report.json", "run.log")  # they tell when and how long
MODULES = (
    *("olmfast.cli", "olmfast.runs.session", "olmfast.static.linear", "olmfast.static.write", "olmfast.runs.check"),
    *("olmfast.terminal.progress", "olmfast.terminal.runs", "olmfast.terminal.merges", "olmfast.config.mergekit"),
    *("transformers", "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers"),
)

Tree = dict[str, tuple[int, bytes]]


def tree(folder: Path) -> Tree:
    from olmfast.testing import tree as whole

    return whole(folder)


@dataclass(frozen=True)
class Command:
    """One command on the output of a place: how it is begun, how it goes on, and whether it replaces something."""

    name: str
    begin: tuple[str, ...]
    again: tuple[str, ...]
    replaces: bool


def commands(place: Path) -> list[Command]:
    merge = ("merge", f"{place}/m.yml", f"{place}/out", "--shard-size", "20KB")
    linear = ("linear", f"--model_a={place}/a", f"--model_b={place}/b", "--alpha=0.5", f"--output_dir={place}/out")
    run = ("run", f"{place}/cfg.yaml", "-q")
    return [
        Command("merge", merge, merge, False),
        Command("merge --overwrite", (*merge, "--overwrite"), (*merge, "--overwrite"), True),
        Command("linear", linear, linear, False),
        Command("linear --overwrite", (*linear, "--overwrite"), (*linear, "--overwrite"), True),
        Command("run", run, (*run, "--resume"), False),
        Command("run --overwrite", (*run, "--overwrite"), (*run, "--resume"), True),
    ]


class Place:
    """A folder with two models, a dataset, something of the user's, and the output."""

    def __init__(self, folder: Path) -> None:
        import yaml

        from olmfast.testing import tiny_pair

        self.folder, self.out, self.partial = folder, folder / "out", folder / "out.partial"
        if not (folder / "a").exists():
            tiny_pair(folder)
            config = yaml.safe_load((folder / "cfg.yaml").read_text())
            (folder / "cfg.yaml").write_text(yaml.safe_dump(config | EVOLVED))
            (folder / "old").mkdir()
            (folder / "old" / "thesis.txt").write_text("the only copy")
        self.errors = folder.with_name("errors")
        self.outside = self._outside()
        self.old = tree(folder / "old")

    def begin(self, command: Command) -> None:
        """As it is before the command; its inputs are not touched."""
        for path in self.folder.iterdir():
            if path.name.startswith(("out", ".olmfast-")):
                shutil.rmtree(path)
        if command.replaces:
            shutil.copytree(self.folder / "old", self.out)

    def _outside(self) -> Tree:
        return {p: held for p, held in tree(self.folder).items() if not p.startswith(("out", ".olmfast-"))}

    def result(self, folder: Path) -> Tree:
        """What a finished output holds, without what tells the time and what a kill leaves to be tidied up."""
        return {p: held for p, held in tree(folder).items() if p not in (*TIMED, ".lock", ".replacing")}

    def fork(self, arguments: Sequence[str], disk: tuple[str, int] | None = None) -> int:
        """A process that runs the command; its messages go to a file."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            with self.errors.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["olmfast", *arguments]
            if disk is not None:
                library().olmfast_soak_arm(disk[0].encode(), disk[1])
            from olmfast.cli import main

            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
        except KeyboardInterrupt:
            code = 130
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if disk is not None:
                self.errors.with_name("calls").write_text(str(library().olmfast_soak_calls()))
            os._exit(code)

    def finish(self, arguments: Sequence[str], disk: tuple[str, int] | None = None) -> int:
        """Run a command to its end; returns its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.fork(arguments, disk), 0)[1])

    def told(self) -> str:
        return self.errors.read_text(errors="replace").strip()


def library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@dataclass
class Count:
    """What came out of one kind of disturbance."""

    tried: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


class Soak:
    """Disturbs commands and looks at what is left."""

    def __init__(self, place: Place, dice: random.Random) -> None:
        self.place, self.dice = place, dice
        self.counts: dict[str, Count] = {}
        self.expected: dict[str, Tree] = {}
        self.seconds: dict[str, float] = {}
        for command in commands(place.folder):
            place.begin(command)
            started = time.monotonic()
            code = place.finish(command.begin)
            self.seconds[command.name] = time.monotonic() - started
            assert code == 0, place.told()
            self.expected[command.name] = place.result(place.out)

    def faults(self, command: Command) -> Iterator[str]:
        """What must not be, whenever the command was stopped."""
        place = self.place
        if place._outside() != place.outside:
            yield "something outside of the output was changed"
        old = place.old if command.replaces else None
        held = tree(place.out) if place.out.exists() else None
        if held is not None and held != old and place.result(place.out) != self.expected[command.name]:
            yield "the output is neither whole nor what it was"
        aside = place.folder / "out.replaced"
        if held is None and old is not None and (not aside.exists() or tree(aside) != old):
            yield "the old output is gone and the new one is not there"

    def again(self, command: Command) -> Iterator[str]:
        """Give the command again, undisturbed; what it does not complete."""
        place = self.place
        code = place.finish(command.again)
        if code == 2 and not command.replaces and "exists; use --overwrite" in place.told():
            code = 0  # it was complete, and told so
        if code:
            yield f"the same command ends with {code}: {place.told()[-300:]}"
            return
        if not place.out.exists() or place.result(place.out) != self.expected[command.name]:
            yield "the result is another"
        left = [path.name for path in place.folder.iterdir() if path.name.startswith(("out", ".olmfast-"))]
        left = [name for name in left if name != "out" and list((place.folder / name).iterdir())]
        if left or any((place.out / name).exists() for name in (".lock", ".replacing")):
            yield f"something is left: {left or 'a record in the output'}"
        yield from self.faults(command)

    def enter(self, kind: str, what: str, faults: list[str]) -> None:
        count = self.counts.setdefault(kind, Count())
        count.tried += 1
        if faults:
            count.wrong.append(f"{what}: {'; '.join(faults)}")
        else:
            count.equal += 1

    def kill(self, command: Command, real: bool) -> int:
        """Begin, kill and go on, up to three times; then to the end. Returns how many kills there were."""
        place, arguments, faults, told = self.place, command.begin, list[str](), list[str]()
        place.begin(command)
        for _ in range(self.dice.randint(1, 3)):
            number = self.dice.choice(SIGNALS)
            process: subprocess.Popen[bytes] | None = None
            if real:
                program = [sys.executable, "-m", "olmfast.cli", *arguments]
                process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            child = process.pid if process else place.fork(arguments)
            moment = self.dice.uniform(0, 1.1) * (self.seconds[command.name] + 4 * real)
            time.sleep(moment)
            with suppress(ProcessLookupError):
                os.kill(child, number)
            status = os.waitpid(child, 0)[1] if process is None else process.wait()
            told.append(f"{number.name} after {moment:.3f} s")
            place_faults = list(self.faults(command))
            faults += place_faults
            code = os.waitstatus_to_exitcode(status) if process is None else status
            self.counts.setdefault("kills", Count()).notes["too late" if code in (0, 2) else number.name] += 1
            if code == 0 or place_faults:
                break
            arguments = command.again if place.partial.exists() or "--overwrite" not in command.begin else command.begin
        if not faults and not (command.name == "run --overwrite" and not self._begun()):
            faults += self.again(command)
        elif not faults:
            faults += self.again(Command(command.name, command.begin, command.begin, command.replaces))
        for one in told:
            self.enter("kills", f"{command.name}, {', '.join(told)}" if faults else one, faults)
        return len(told)

    def _begun(self) -> bool:
        """Whether there is anything to resume; before that a run that overwrites is given again as it was."""
        return self.place.partial.exists() or (self.place.out / "steps.jsonl").exists()

    def full_disk(self, command: Command, call: int) -> None:
        """Let the disk be full from one writing call on."""
        place = self.place
        place.begin(command)
        code = place.finish(command.begin, (f"{place.folder}/", call))
        faults, message = list(self.faults(command)), place.told()
        if code not in (0, 1, 2) or "Traceback" in message or "this is a bug" in message:
            faults.append(f"exit code {code}: {message[-300:]}")
        if code and ("No space left" not in message or str(place.folder / "out") not in message):
            faults.append(f"the message names neither file nor reason: {message[-300:]}")
        begun = self._begun() or not command.name.startswith("run --over")
        faults += self.again(command if begun else Command(command.name, (), command.begin, command.replaces))
        self.enter("full disks", f"{command.name}, call {call}", faults)

    def writing_calls(self, command: Command) -> int:
        """How many calls of an undisturbed command write."""
        self.place.begin(command)
        self.place.finish(command.begin, (f"{self.place.folder}/", 0))
        return int(self.place.errors.with_name("calls").read_text())

    def change(self, command: Command) -> None:
        """Change a file of a model while the command is at work: it ends with an error, or as if nothing had been, or,
        where it had not begun to read, as if the file had always been so."""
        place = self.place
        place.begin(command)
        files = ["model.safetensors", "tokenizer.json", "config.json"]
        path = place.folder / self.dice.choice("ab") / self.dice.choice(files)
        held, times = path.read_bytes(), path.stat()
        how = self.dice.choice(["truncated", "removed", "replaced", "edited"])
        child = place.fork(command.begin)
        moment = self.dice.uniform(0.2, 1) * self.seconds[command.name]
        time.sleep(moment)
        if how == "truncated":
            os.truncate(path, len(held) // 2)
        elif how == "removed":
            path.unlink()
        elif how == "replaced":
            path.with_name("new").write_bytes(held[:-1] + b"\x01")
            path.with_name("new").replace(path)
        else:
            with path.open("rb+") as file:
                file.seek(len(held) * 2 // 3)
                file.write(b"\x3f" * 16)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        message, early = place.told(), False
        found = self.expected[command.name] if code else place.result(place.out)
        other = found != self.expected[command.name]
        if other:
            place.begin(command)
            early = place.finish(command.begin) == 0 and place.result(place.out) == found
        path.write_bytes(held)
        path.chmod(times.st_mode & 0o7777)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        faults = [] if other else list(self.faults(command))
        if other and not early:
            faults.append("it ended well, with another result")
        if code not in (0, 1, 2) or "Traceback" in message or "this is a bug" in message:
            faults.append(f"exit code {code}: {message[-300:]}")
        if code and not any(str(name) in message for name in (path, path.parent, f"donor {path.parent.name}")):
            faults.append(f"the message does not name it: {message[-300:]}")
        self.enter("changed models", f"{command.name}, {path.name} {how} after {moment:.3f} s", faults)
        self.counts["changed models"].notes["noticed" if code else "too early" if early else "too late to matter"] += 1

    def told(self) -> str:
        lines = [f"{'':16}{'tried':>8}{'equal':>8}{'wrong':>8}"]
        for kind, count in self.counts.items():
            notes = ", ".join(f"{n} {what}" for what, n in count.notes.most_common())
            lines.append(f"{kind:16}{count.tried:8}{count.equal:8}{len(count.wrong):8}   {notes}".rstrip())
            lines += [f"  wrong: {one}" for one in count.wrong[:20]]
        return "\n".join(lines)


def with_library(place: Path) -> None:
    """Start this process again with the library that fills disks, if it does not have it."""
    if "olmfast_soak" in os.environ:
        return
    built = place / "failing_disk.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", built, HERE / "failing_disk.c", "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(built), "olmfast_soak": str(place), "OMP_NUM_THREADS": "1"}
    raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="how many processes are killed")
    parser.add_argument("--every", type=int, default=1, help="of the writing calls, each how manieth finds a full disk")
    parser.add_argument("--changes", type=int, default=100, help="how often a model is changed underneath")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this time; 0: when all is done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="olmfast-soak-") as folder:
        with_library(Path(folder))
        return soak(Path(folder), options)


def soak(folder: Path, options: argparse.Namespace) -> int:
    for name in MODULES:
        importlib.import_module(name)
    (folder / "place").mkdir()
    dice = random.Random(options.seed)
    started = time.monotonic()
    one = Soak(Place(folder / "place"), dice)
    everything = commands(one.place.folder)
    calls: list[tuple[Command, int]] = []
    for command in everything if options.every else ():
        first = 1 + dice.randrange(options.every)
        calls += [(command, call) for call in range(first, one.writing_calls(command) + 1, options.every)]
    disturbances = ["kill"] * options.kills + ["change"] * options.changes + ["disk"] * len(calls)
    dice.shuffle(disturbances)
    dice.shuffle(calls)
    killed = 0
    for number, disturbance in enumerate(disturbances):
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            print(
                f"stopped after {options.minutes:g} minutes, {len(disturbances) - number} disturbances before the end"
            )
            break
        if disturbance == "disk":
            one.full_disk(*calls.pop())
        elif disturbance == "change":
            one.change(dice.choice(everything))
        elif killed < options.kills:
            killed += one.kill(dice.choice(everything), real=killed % 50 == 49)
    print(one.told())
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    return int(any(count.wrong for count in one.counts.values()))


if __name__ == "__main__":
    raise SystemExit(main())
