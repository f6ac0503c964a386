"""The driver's side: workers that come and go, errands that are done once, whoever does them.

A worker that is lost gives its errands back, and another is started in its place. One that takes much longer than
others have taken for as much has its errands done by others too; what comes first counts. Since a worker's answer
depends on what it was asked alone, neither makes a difference but in time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from olmfast.cluster.donors import SENT_AT_ONCE
from olmfast.cluster.worker import Asked, Opening, Report, news_of, stored_files
from olmfast.errors import OlmfastError
from olmfast.evaluation.memory import Shares
from olmfast.evaluation.trajectories import Expected
from olmfast.weights.recipe import Recipe

LOSSES = 5  # workers lost over one errand, after which it is the errand's fault
SLOW, GRACE_S = 4.0, 5.0  # an errand has others do it too after so many times the longest of late, and so long more
WAIT_S = 0.2
CHECK_S = 5.0  # between looks whether all is well, while nothing is lost
JOIN_S = 600.0  # to wait for a first worker
END_S = 10.0  # to wait at the end for one that is still coming up
FAILED_STARTS = 5  # in a row


class Lost(Exception):
    """A worker is gone; the message says what is known of it."""


class Fleet(Protocol):
    """Where workers are: their handles and tickets are opaque. `RayFleet` is one."""

    def start(self) -> Any:
        """A new worker's handle; it may take its time to come up."""
        ...

    def ask(self, handle: Any, method: str, *args: Any) -> Any:
        """Have a worker do something; the ticket of its answer. A worker does one thing after another."""
        ...

    def ready(self, tickets: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those whose answers are there, after the first of them or the time."""
        ...

    def answer(self, ticket: Any) -> Any:
        """Wait for an answer. Raises Lost, or what the worker raised."""
        ...

    def share(self, value: Any) -> Any:
        """What stands for a value as an argument of `ask` and is sent to each machine once."""
        ...

    def end(self, handle: Any) -> None:
        """Stop a worker."""
        ...

    def check(self) -> None:
        """Raises OlmfastError if no worker can be reached any more."""
        ...

    def close(self) -> None:
        """Stop all."""
        ...


@dataclass(eq=False)
class Member:
    """A worker that has joined, and what it has been told."""

    handle: Any
    number: int
    report: Report
    recipe: Recipe
    expected: dict[int, Expected] = field(default_factory=dict)  # by scorer
    closed: int = 0  # of the scorers that were closed, how many it knows of
    busy: bool = False

    @property
    def name(self) -> str:
        return f"worker {self.number} on {self.report.host}"


@dataclass(eq=False)
class Errand:
    """Something for any worker to do, on behalf of a scorer; `size` is how much, compared with others of its method.

    `owner` is the place of the worker who had better do it, among those there are. `done` is told the answer, once.
    """

    method: str
    args: tuple[Any, ...]
    done: Callable[[Any], None]
    owner: int | None = None
    only: Member | None = None  # who must do it, or nobody
    size: float = 1.0
    is_done: bool = False
    losses: int = 0
    running: dict[Any, tuple[Member, float]] = field(default_factory=dict)  # ticket -> by whom, since when


@dataclass
class Desk:
    """What errands of one scorer have in common: its number, its questions as `Fleet.share` gave them, and what all
    workers have agreed on."""

    number: int
    questions: Any
    expected: Callable[[], Expected]
    shares: Shares | None = None


class Crew:
    """The workers of a run. They hold the model `recipe`, which `commit` changes; `note` is told what a user should
    know. Any thread may have errands done."""

    def __init__(
        self,
        fleet: Fleet,
        n: int,
        opening: Opening,
        recipe: Recipe,
        environment: dict[str, Any],
        note: Callable[[str], None],
    ) -> None:
        """Start n workers; returns when the first is there, and all others are or have had as long again.

        Raises OlmfastError if none comes.
        """
        self.fleet, self.opening, self.recipe, self.environment, self.note = fleet, opening, recipe, environment, note
        self.members: list[Member] = []
        self._changed = threading.Condition(threading.RLock())
        self._closed: list[int] = []
        self.busy_s = 0.0  # that workers have been at errands, all together
        self._usual: dict[str, deque[float]] = {}
        self._strays: dict[Any, Member] = {}  # tickets of errands that somebody else has done by now
        self._coming, self._failed, self._started = 0, 0, 0
        self._arriving: dict[threading.Thread, Any] = {}  # what brings a worker up -> its handle, once it has one
        self._why, self._news = "", list[str]()
        self._began = self._ended = False
        self._in_doubt, self._checked = False, time.monotonic()
        began = time.monotonic()
        for _ in range(n):
            self._start()
        with self._changed:
            while self._coming and not self.members:
                self._changed.wait(WAIT_S)
                self._check_alive(began)
            took = time.monotonic() - began
            while self._coming and time.monotonic() - began < 2 * took + GRACE_S:
                self._changed.wait(WAIT_S)
            self._check_alive(began)
            hosts = {member.report.host for member in self.members}
            self._say(f"{len(self.members)} of {n} workers on {', '.join(sorted(hosts))}")
            self._tell()
            self._began = True

    def commit(self, recipe: Recipe) -> None:
        """The model is this recipe from now on; workers learn it with their next errand."""
        self.recipe = recipe

    def close_desk(self, number: int) -> None:
        """Nobody will ask this scorer any more."""
        self._closed.append(number)

    def close(self) -> None:
        """End all workers. Those that are still coming up are waited for: who asks a fleet that is closed may end this
        process."""
        with self._changed:
            self._ended = True
            self.members.clear()
            arriving = dict(self._arriving)
        until = time.monotonic() + END_S
        for thread, handle in arriving.items():
            if handle is not None:
                with suppress(Exception):  # it may have gone with what it ran on
                    self.fleet.end(handle)
            thread.join(max(0.0, until - time.monotonic()))
        self.fleet.close()

    def _say(self, text: str) -> None:
        """Something for the user, told by a thread of theirs."""
        self._news.append(text)

    def _tell(self) -> None:
        while self._news:
            self.note(self._news.pop(0))

    # Workers that come and go

    def _start(self) -> None:
        with self._changed:
            if self._ended:
                return
            self._coming += 1
            self._started += 1
            thread = threading.Thread(target=self._bring_up, args=(self._started,), daemon=True, name="bring up")
            self._arriving[thread] = None
            thread.start()

    def _bring_up(self, number: int) -> None:
        """Have a worker find its donors and build its model; then it is a member."""
        handle, why = None, ""
        try:
            with self._changed:
                if not self._ended:
                    handle = self._arriving[threading.current_thread()] = self.fleet.start()
            if handle is None:
                return
            report: Report = self._asked(handle, "open", self.opening)
            why = differing(report, self.environment)
            if not why:
                self._send(handle, report)
                recipe = self.recipe
                files = {} if report.sees_folder else stored_files(recipe, self.opening.folder)
                self._asked(handle, "build", recipe, files)
        except (Exception, SystemExit) as error:  # a thread's: told by those who wait for the worker
            why = f"{type(error).__name__}: {error}" if not isinstance(error, (OlmfastError, Lost)) else str(error)
        with self._changed:
            del self._arriving[threading.current_thread()]
            self._coming -= 1
            if why or handle is None:
                self._failed += 1
                self._why = why
                if not self._ended:
                    self._say(f"worker {number} did not come up: {why}")
                    if handle is not None:
                        self.fleet.end(handle)
                    if self._began and self._failed < FAILED_STARTS:
                        self._start()
            elif self._ended:
                self.fleet.end(handle)
            else:
                self._failed = 0
                self.members.append(Member(handle, number, report, recipe, closed=len(self._closed)))
                if self._began:
                    self._say(f"{self.members[-1].name} joins: {len(self.members)} now")
            self._changed.notify_all()

    def _asked(self, handle: Any, method: str, *args: Any) -> Any:
        return self.fleet.answer(self.fleet.ask(handle, method, *args))

    def _send(self, handle: Any, report: Report) -> None:
        """Send the donors that a worker lacks."""
        for donor in (one for one in self.opening.donors if one.name in report.missing):
            self._say(f"{donor.name}: is sent to {report.host}, which keeps it")
            for part, path in donor.files():
                with path.open("rb") as file:
                    while data := file.read(SENT_AT_ONCE):
                        self._asked(handle, "receive", donor.name, part, path.name, data)
            self._asked(handle, "receive", donor.name, 0, "", b"")

    def _lost(self, member: Member, why: str) -> None:
        if member not in self.members:
            return
        self.members.remove(member)
        self._in_doubt = True
        left = len(self.members)
        self._say(
            f"{member.name} is lost ({why}): what it had to do goes to others; {left or 'none'} left, and one is "
            "started in its place"
        )
        self._start()

    def _check_alive(self, since: float) -> None:
        """Raise OlmfastError if there is no worker, and none will come."""
        self._tell()
        if self._in_doubt or not self.members or time.monotonic() - self._checked > CHECK_S:
            self._in_doubt, self._checked = False, time.monotonic()
            self.fleet.check()
        if self.members:
            return
        saved = "everything decided so far is saved, --resume continues"
        if not self._coming:
            raise OlmfastError(f"workers: none is left ({self._why}); {saved}")
        if time.monotonic() - since > JOIN_S:
            raise OlmfastError(f"workers: none has come up in {JOIN_S / 60:.0f} minutes; {saved}")

    # Errands

    def do(self, desk: Desk, errands: Sequence[Errand]) -> None:
        """Have errands done, in order as far as there is an order. Raises what a worker raised, or OlmfastError."""
        pending, alone_since = list(errands), time.monotonic()
        while not all(errand.is_done for errand in errands):
            with self._changed:
                if self.members:
                    alone_since = time.monotonic()
                self._check_alive(alone_since)
                self._hand_out(desk, pending, errands)
                tickets = [ticket for errand in errands for ticket in errand.running]
                tickets += list(self._strays)
                if not tickets:
                    self._changed.wait(WAIT_S)
                    continue
            ready = self.fleet.ready(tickets, WAIT_S)
            with self._changed:
                for ticket in ready:
                    self._take(ticket, errands, pending)
                self._changed.notify_all()
        with self._changed:  # what is still being done in vain goes on without us
            for errand in errands:
                self._strays |= {ticket: member for ticket, (member, _) in errand.running.items()}

    def everywhere(self, desk: Desk, method: str, *args: Any) -> list[Any]:
        """The answers of all workers that are free; of one that is lost meanwhile, or hangs, none."""
        found: list[Any] = []
        with self._changed:
            free = [member for member in self.members if not member.busy]  # else it may hang
            errands = [Errand(method, args, found.append, only=member) for member in free]
        self.do(desk, errands)
        return found

    def _hand_out(self, desk: Desk, pending: list[Errand], errands: Sequence[Errand]) -> None:
        for one in [one for one in pending if one.only is not None and one.only not in self.members]:
            pending.remove(one)
            one.is_done = True
        for one in [one for one in errands if one.only is not None and self._is_slow(one)]:
            one.is_done = True  # without an answer
        for place, member in enumerate(self.members):
            if member.busy:
                continue
            errand = _next(pending, place, len(self.members), member) or self._slow_one(errands)
            if errand is None:
                continue
            if errand in pending:
                pending.remove(errand)
            member.busy = True
            try:
                ticket = self._ask(desk, member, errand)
            except Lost as lost:
                member.busy = False
                pending.insert(0, errand)
                self._lost(member, str(lost))
                return
            errand.running[ticket] = member, time.monotonic()

    def _ask(self, desk: Desk, member: Member, errand: Errand) -> Any:
        """Ask a member for an errand, with all that it does not know yet."""
        news = news_of(member.recipe, self.recipe)
        if news.recipe is not None and not member.report.sees_folder:
            news = replace(news, files=stored_files(news.recipe, self.opening.folder))
        known = member.expected.get(desk.number)
        expected = desk.expected()
        told = {task: own for task, own in expected.items() if own != (known or {}).get(task)}
        news = replace(news, expected=told, closed=tuple(self._closed[member.closed :]))
        questions = desk.questions if known is None else None
        asked = Asked(desk.number, desk.shares)
        ticket = self.fleet.ask(member.handle, "errand", news, asked, questions, errand.method, *errand.args)
        member.recipe, member.expected[desk.number], member.closed = self.recipe, expected, len(self._closed)
        return ticket

    def _slow_one(self, errands: Sequence[Errand]) -> Errand | None:
        """An errand that one worker is at for much longer than others have taken."""
        for errand in errands:
            if errand.only is None and self._is_slow(errand):
                ((member, _),) = errand.running.values()
                self._say(f"{member.name} is slow: another does the same")
                return errand
        return None

    def _is_slow(self, errand: Errand) -> bool:
        usual = self._usual.get(errand.method)
        if errand.is_done or len(errand.running) != 1 or not usual:
            return False
        ((_, began),) = errand.running.values()
        return time.monotonic() - began > SLOW * max(usual) * errand.size + GRACE_S

    def _take(self, ticket: Any, errands: Sequence[Errand], pending: list[Errand]) -> None:
        """Take an answer."""
        errand = next((one for one in errands if ticket in one.running), None)
        if errand is None:
            member = self._strays.pop(ticket, None)
            if member is not None:
                member.busy = False
                try:
                    self.fleet.answer(ticket)
                except Lost as lost:
                    self._lost(member, str(lost))
                except Exception:  # of an errand that another has done, or that has failed as a whole
                    pass
            return
        member, began = errand.running.pop(ticket)
        self.busy_s += time.monotonic() - began
        try:
            answer = self.fleet.answer(ticket)
        except Lost as lost:
            errand.losses += 1
            self._lost(member, str(lost))
            if errand.losses >= LOSSES:
                raise OlmfastError(
                    f"workers: {LOSSES} were lost over the same work ({lost}); is there memory for them all? "
                    "Everything decided so far is saved, --resume continues, with other workers if you say so"
                ) from lost
            if not errand.is_done and not errand.running:
                errand.owner = None
                pending.insert(0, errand)
            return
        except BaseException:
            member.busy = False
            raise
        member.busy = False
        if not errand.is_done:
            errand.is_done = True
            self._usual.setdefault(errand.method, deque(maxlen=50)).append((time.monotonic() - began) / errand.size)
            errand.done(answer)


def _next(pending: Sequence[Errand], place: int, n: int, member: Member) -> Errand | None:
    """The errand that a worker, at a place, had better do: its own, one that is nobody's, or the last one of whoever
    has most left."""
    pending = [one for one in pending if one.only in (None, member)]
    own = next((one for one in pending if one.owner == place), None)
    free = next((one for one in pending if one.owner is None or one.owner >= n), None)
    if own is not None or free is not None:
        return own or free
    left = [one.owner for one in pending if one.owner is not None]
    if not left:
        return None
    most = max(set(left), key=lambda owner: (left.count(owner), -owner))
    return next(one for one in reversed(pending) if one.owner == most)


def differing(report: Report, own: dict[str, Any]) -> str:
    """How a worker's environment differs from the driver's: its scores would not be ours; empty where it does not."""
    other = report.environment
    told = [f"{key} is {other.get(key)} instead of {value}" for key, value in own.items() if other.get(key) != value]
    return f"{report.host}: {', '.join(told)}" if told else ""
