"""Seeded questions for the four skills of the demo pool.

Every skill is one function that draws a question and its answer. A question belongs to exactly one split
(train, selection, holdout or fresh), decided by a hash of its text, so no two splits ever share a question,
whatever the seeds. New datasets that nothing in this folder was trained or tuned on::

    python examples/demo/skills.py --seed 7 --count 128 --out fresh/seed-7
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Question = tuple[str, str]
"""The question and the expected answer."""

SPLITS = {"train": range(10), "selection": range(10, 12), "holdout": range(12, 14), "fresh": range(14, 16)}
"""Which sixteenths of all questions belong to which split."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"

PEOPLE = ("baker", "child", "doctor", "farmer", "friend", "king", "painter", "pilot", "sailor", "singer", "teacher")

PAST = {
    "begins": "began", "breaks": "broke", "brings": "brought", "builds": "built", "buys": "bought",
    "catches": "caught", "chooses": "chose", "draws": "drew", "drives": "drove", "feeds": "fed",
    "finds": "found", "forgets": "forgot", "gets": "got", "gives": "gave", "hides": "hid", "holds": "held",
    "keeps": "kept", "knows": "knew", "leaves": "left", "loses": "lost", "makes": "made", "pays": "paid",
    "reads": "read", "rides": "rode", "sees": "saw", "sells": "sold", "sends": "sent", "steals": "stole",
    "takes": "took", "teaches": "taught", "tells": "told", "throws": "threw", "wins": "won", "writes": "wrote",
}  # fmt: skip
"""Irregular verbs: present and past."""

THINGS = ("book", "boat", "cake", "coin", "game", "gift", "horse", "house", "letter", "map", "picture", "ring", "song")

SUBJECTS = {
    "bear": "brown bear eats sweet honey", "bell": "bronze bell rings every hour",
    "bird": "small bird builds its nest", "cloud": "grey cloud brings cold rain",
    "desert": "dry desert hides golden sand", "fish": "silver fish swims under water",
    "forest": "green forest grows tall trees", "fox": "clever fox hunts at night",
    "garden": "quiet garden smells of roses", "lamp": "bright lamp shines above tables",
    "market": "busy market sells fresh bread", "moon": "pale moon rises after dark",
    "mountain": "high mountain carries white snow", "river": "wide river flows past villages",
    "ship": "old ship crosses stormy seas", "train": "fast train leaves before noon",
}  # fmt: skip
"""What the writer knows about each subject, in words that no other subject shares."""


def arithmetic(random_numbers: random.Random) -> Question:
    """A sum or a difference of two numbers of two digits."""
    first, second = random_numbers.randint(10, 99), random_numbers.randint(10, 99)
    if random_numbers.random() < 0.5:
        return f"What is {first} + {second}?", str(first + second)
    larger, smaller = max(first, second), min(first, second)
    return f"What is {larger} - {smaller}?", str(larger - smaller)


def sorting(random_numbers: random.Random) -> Question:
    """Seven different letters, to be put into alphabetical order."""
    letters = random_numbers.sample(LETTERS, 7)
    return f"Sort the letters {' '.join(letters)}", " ".join(sorted(letters))


def grammar(random_numbers: random.Random) -> Question:
    """A sentence with an irregular verb, to be put into the past."""
    person, verb = random_numbers.choice(PEOPLE), random_numbers.choice(list(PAST))
    thing = random_numbers.choice(THINGS)
    return f"Say in the past: the {person} {verb} the {thing}.", f"The {person} {PAST[verb]} the {thing}."


def writing(random_numbers: random.Random) -> Question:
    """Four subjects to write about: a sentence for each, every one in words of its own."""
    subjects = random_numbers.sample(list(SUBJECTS), 4)
    return f"Write about {', '.join(subjects)}.", write_about(subjects)


def write_about(subjects: list[str]) -> str:
    """One sentence for each of ``subjects``."""
    return " ".join(f"The {SUBJECTS[subject]}." for subject in subjects)


def first_lessons(skill: str, pairs: list[Question]) -> list[Question]:
    """What the common ancestor is taught: half of the verbs are rare, and a text names some of its subjects only."""
    if skill == "grammar":
        common = tuple(f" {verb} " for verb in list(PAST)[::2])
        return [pair for index, pair in enumerate(pairs) if index % 32 == 0 or any(verb in pair[0] for verb in common)]
    if skill == "writing":
        return [(question, answer.rsplit(" The ", 1 + index % 3)[0]) for index, (question, answer) in enumerate(pairs)]
    return pairs


SKILLS: dict[str, Callable[[random.Random], Question]] = {
    "arithmetic": arithmetic,
    "sorting": sorting,
    "grammar": grammar,
    "writing": writing,
}


def split_of(question: str) -> str:
    """The one split that ``question`` belongs to."""
    sixteenth = hashlib.sha256(question.encode()).digest()[0] % 16
    return next(split for split, sixteenths in SPLITS.items() if sixteenth in sixteenths)


def draw(skill: str, split: str, seed: int) -> Iterator[Question]:
    """Endless questions of ``skill`` that belong to ``split``, in an order that ``seed`` decides."""
    random_numbers = random.Random(f"{skill} {split} {seed}")
    while True:
        question, answer = SKILLS[skill](random_numbers)
        if split_of(question) == split:
            yield question, answer


def conversations(skill: str, split: str, seed: int, count: int) -> list[dict[str, Any]]:
    """``count`` different questions of ``skill`` as ShareGPT conversations; ValueError if a split has fewer."""
    different: dict[str, str] = {}
    for question, answer in islice(draw(skill, split, seed), 100 * count):
        different[question] = answer
        if len(different) == count:
            break
    if len(different) < count:
        raise ValueError(f"{skill}: {split} has fewer than {count} different questions")
    return [
        {"conversation": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in different.items()
    ]


def write_datasets(folder: Path, split: str, seed: int, count: int, suffix: str = "") -> None:
    """Write one dataset file per skill into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        lines = [json.dumps(each) for each in conversations(skill, split, seed, count)]
        (folder / f"{skill}{suffix}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write one dataset file per skill, drawn with a seed.")
    parser.add_argument("--seed", type=int, required=True, help="decides which questions are drawn")
    parser.add_argument("--count", type=int, default=128, help="questions per skill")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--split", choices=list(SPLITS), default="fresh", help="which questions to draw from")
    arguments = parser.parse_args()
    write_datasets(arguments.out, arguments.split, arguments.seed, arguments.count)


if __name__ == "__main__":
    main()
