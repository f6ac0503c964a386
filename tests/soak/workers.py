"""Runs with two Ray workers whose processes are killed: the bytes are those of one process, whatever happens.

    OMP_NUM_THREADS=1 python tests/soak/workers.py --kills 10 --seed 0

Commands on one config: in one process; with two workers, of which one is killed (SIGKILL) again and again, as often as
it takes for all kills; with two workers whose raylet is killed, and resumed after that; and one whose driver is killed,
and resumed. Each must end
with the tensors and the scores of the first, every candidate once. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

LONGEST_S = 1800


def command(folder: Path, out: str, *more: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "olmfast", "run", "cfg.yaml", "--set", f"output_dir={out}", *more]
    return subprocess.Popen(
        program, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def workers_of(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """The processes of a driver's own Ray whose title holds a word."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
        return [one for one in children if name in " ".join(one.cmdline()) or name in one.name()]
    except psutil.NoSuchProcess:
        return []


def steps_of(folder: Path, out: str) -> int:
    log = folder / f"{out}.partial" / "steps.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def outcome(folder: Path, out: str) -> tuple[dict[str, bytes], list[str]]:
    tensors = {path.name: path.read_bytes() for path in sorted((folder / out).rglob("*.safetensors"))}
    return tensors, (folder / out / "evaluations.jsonl").read_text().splitlines()


def kill_workers(folder: Path, out: str, n: int, dice: random.Random) -> int:
    """Run with two workers, of which up to n are killed at random moments while it lasts; returns how many were."""
    driver = command(folder, out, "--set", "workers=2")
    killed = 0
    while driver.poll() is None and killed < n:
        time.sleep(dice.uniform(0.5, 4))
        found = workers_of(driver, "ray::Worker")
        found = [one for one in found if not any(word in " ".join(one.cmdline()) for word in (".open", ".build"))]
        if len(found) < 2 or steps_of(folder, out) < 2:
            continue  # one at a time, once the search has begun and both are at it
        victim = dice.choice(found)
        os.kill(victim.pid, signal.SIGKILL)
        killed += 1
        print(f"  killed worker {victim.pid}, {killed} of {n}, after {steps_of(folder, out)} steps", flush=True)
    said, _ = driver.communicate(timeout=LONGEST_S)
    assert driver.returncode == 0, said
    assert killed, "the run ended before both workers were at work: give it more to do"
    print(f"  {said.count('is lost')} losses told, {said.count('joins')} joined")
    return killed


def kill_once(folder: Path, out: str, name: str, at_step: int) -> tuple[int, str, float]:
    """Kill the raylet, or the driver itself (no name), after a step: exit code, what was printed, seconds until its
    end."""
    driver = command(folder, out, "--set", "workers=2")
    while driver.poll() is None and steps_of(folder, out) < at_step:
        time.sleep(0.2)
    assert driver.poll() is None, driver.communicate()
    pids = [one.pid for one in workers_of(driver, name)] if name else [driver.pid]
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    said, _ = driver.communicate(timeout=300)
    return driver.returncode, said, time.monotonic() - began


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from olmfast.testing import sums, tiny_run, write_dataset

    dice, wrong = random.Random(given.seed), 0
    stages = {"base_select": True, "layer_swap": True, "tensor_swap": True, "es_svd": True, "es_norm": True}
    stages |= {"es_svd_generations": 4, "es_norm_generations": 6}
    with tempfile.TemporaryDirectory(prefix="olmfast-soak-") as place:
        folder = Path(place)
        tiny_run(folder, 3, batch_tokens=64, units=["*.mlp.*"], **stages)
        write_dataset(folder / "more.json", sums(40, 2))
        said, _ = command(folder, "one", "--set", "workers=1").communicate(timeout=LONGEST_S)
        truth = outcome(folder, "one")

        def check(kind: str, out: str) -> None:
            nonlocal wrong
            lines = [json.loads(line) for line in outcome(folder, out)[1]]
            scored = Counter((line["step"], line["candidate"], line["dataset"]) for line in lines)
            twice = [key for key, n in scored.items() if n > 1]
            same = outcome(folder, out) == truth and not twice
            wrong += not same
            print(f"{kind}: {'same bytes, every candidate once' if same else f'WRONG, twice: {twice[:3]}'}", flush=True)

        left, began = given.kills, time.monotonic()
        while left:
            out = f"killed-{left}"
            left -= kill_workers(folder, out, left, dice)
            check(f"{given.kills - left} workers killed in {time.monotonic() - began:.0f} s", out)
        for kind, name in (("raylet", "raylet/raylet"), ("driver", "")):
            code, said, took = kill_once(folder, kind, name, 4)
            last = [line for line in said.splitlines() if "olmfast: ray: " in line][-1:]  # among what Ray says
            print(f"{kind} killed: exit code {code} after {took:.0f} s; {''.join(last)}", flush=True)
            wrong += name != "" and (code != 1 or not last)
            resumed = command(folder, kind, "--set", "workers=2", "--resume")
            said, _ = resumed.communicate(timeout=LONGEST_S)
            assert resumed.returncode == 0, said
            check(f"{kind} killed, resumed", kind)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
