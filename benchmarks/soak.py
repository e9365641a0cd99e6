"""
Random trees of groups for as long as you like, and after each everything that must hold.

`python -m benchmarks soak --minutes 10`: a round runs one tree, made from the seed and the
round's number, and looks what became of every task, what left every block, and what still runs.
Now and then it looks for what is left behind: threads, processes, descriptors, objects, memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    FailFast,
    FirstSuccess,
    GroupClosedError,
    StuckTaskError,
    Task,
    TaskCancelledError,
    TaskGroup,
    cancellable,
    current_token,
    shield,
    use_token,
)
from fastpool._items import Items
from fastpool._run import Run
from fastpool.backends import Processes

__all__ = ["main"]

POLICIES = {"fail fast": FailFast(), "collect": CollectAll(), "first": FirstSuccess()}
POOLS: dict[str, Any] = {"threads": None}  # and ours: "shared", and "killing" processes
TALLY: collections.Counter[str] = collections.Counter()  # of what was looked at
WRONG: list[BaseException] = []  # what was found, whoever found it
HANG = 120  # seconds after which a round hangs
PATIENCE = 20  # seconds for what was abandoned to end
DEAF = 5  # seconds that a task in a worker process hears nothing, if nobody kills it
KILL_AFTER = 0.03  # seconds
LOOK = 200  # rounds between two looks for what is left behind
CACHED = ("descriptors", "tokens")
MARGIN = 8 * 2**20  # bytes that the process may grow by over the second half of a run


@dataclass(frozen=True)
class Call:
    """What one task does."""

    number: int
    kind: str
    inner: Block | None = field(default=None, repr=False)
    timeout: float | None = None  # of the task


@dataclass(frozen=True)
class Block:
    """One group: how it is made, what is submitted to it and how, and how its body ends."""

    number: int
    workers: int
    policy: str
    timeout: float | None
    max_queued: int | None
    pool: str
    feed: str
    calls: tuple[Call, ...]
    ending: str
    kills: bool  # those that are stuck are killed, and not left behind


class Failed(Exception):
    """A task's or a body's failure, by number."""


class Wrong(AssertionError):
    """A promise was broken."""


# What a task or a body may fail with.
KNOWN = (
    Failed,
    SystemExit,
    Cancelled,
    TaskCancelledError,
    GroupClosedError,
    TimeoutError,
    StuckTaskError,
    BaseExceptionGroup,
)


def wants(holds: object, what: str, *seen: object) -> None:
    """Say what should hold, if it does not."""
    if not holds:
        wrong = Wrong(f"{what}: {', '.join(map(repr, seen))}")
        WRONG.append(wrong)  # a policy may have no use for what is raised in a task or a body
        raise wrong


# --- The trees -----------------------------------------------------------------------------

NEAR = [
    "value",
    "check",
    "sleep",
    "catch",
    "shield",
    "wait",
    "submit",
    "cancel-sibling",
    "cancel-group",
    "fails",
]
FAR = ["value", "check", "sleep", "catch", "shield", "fails"]


def tree(chance: random.Random, pools: list[str]) -> Block:
    """A tree of groups, up to four deep."""
    numbers = itertools.count(1)

    def block(depth: int, pool: str, pools: list[str]) -> Block:
        number = next(numbers)
        workers = chance.choice([1, 1, 2, 3])
        feed = chance.choice(["submit", "submit", "map", "imap", "imap unordered"])
        ending = chance.choice(
            ["leave", "leave", "wait", "results", "as completed", "raises", "cancel"]
        )
        timeout = chance.choice([None] * 5 + [chance.uniform(0.001, 0.03)])
        max_queued = chance.choice([None, None, 1, 4])
        kinds = FAR if pool == "processes" else NEAR
        if chance.random() < 0.3:
            kinds = [*kinds, "fails"] if pool == "processes" else [*kinds, "fails", "cancel-group"]
        if depth < 3:
            kinds = [*kinds, "nested", "nested"]
        # What never ends by itself: the group's deadline ends it, or its body when all is queued.
        ends = ending == "cancel" and max_queued is None and feed in ("submit", "map")
        if ends or timeout is not None:
            kinds = [*kinds, "endless", "endless"]
        if ends and pool != "shared":
            often = chance.choice([0, 0, 0, 1]) if pool == "threads" else 3
            kinds = [*kinds, *["stuck"] * often]
        if chance.random() < 0.02:
            kinds = [*kinds, "exits"]
        inside = ["threads"] if pool == "processes" else pools  # a worker opens groups of threads
        calls = tuple(
            call(depth, chance.choice(kinds), inside)
            for _ in range(chance.choice([0, 2, 5, 10, 30]))
        )
        policy = chance.choice(["fail fast"] * 3 + ["collect", "collect", "first"])
        kills = pool == "processes" and chance.random() < 0.5
        return Block(number, workers, policy, timeout, max_queued, pool, feed, calls, ending, kills)

    def call(depth: int, kind: str, pools: list[str]) -> Call:
        number, inner = next(numbers), None
        if kind == "nested":
            inner = block(depth + 1, chance.choice(pools), pools)
        return Call(number, kind, inner, chance.choice([None] * 49 + [0.005]))

    return block(0, chance.choice(pools), pools)


# --- A round -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a task's body says became of it."""

    begun: int = 0
    ended: int = 0
    process: int = 0  # the worker process that it ran in
    left: Any = None  # what it returned or raised
    raised: bool = False


@dataclass(frozen=True)
class Notes:
    """What the tasks of a round note that run in worker processes: lines of a file."""

    path: str
    round: int

    def add(self, what: str, *more: object) -> None:
        """Add a line, in one piece."""
        line = " ".join(map(str, (self.round, what, *more)))
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.replace("\n", " ").encode() + b"\n")

    def read(self) -> dict[int, Outcome]:
        """What became of the tasks, by the number of the call."""
        seen: dict[int, Outcome] = collections.defaultdict(Outcome)
        with open(self.path, encoding="utf-8") as file:
            *lines, _ = file.read().split("\n")  # the last may still be written
        for line in lines:
            number, what, more = line.split(" ", 2)
            wants(int(number) == self.round and what != "wrong", "in a worker process", line)
            call, process = map(int, more.split())
            seen[call].process = process
            seen[call].begun += what == "begun"
            seen[call].ended += what == "ended"
        return seen


@dataclass
class Round:
    """One tree at work."""

    top: Block
    notes: Notes
    seen: dict[int, Outcome] = field(
        default_factory=lambda: collections.defaultdict(Outcome)  # by the number of the call
    )
    groups: dict[int, TaskGroup] = field(default_factory=dict)
    handles: dict[int, list[tuple[Call, Task[Any]]]] = field(default_factory=dict)
    late: collections.Counter[int] = field(default_factory=collections.Counter)
    released: threading.Event = field(default_factory=threading.Event)  # those that are stuck
    # How often a call had begun and ended when its group had ended, by its number.
    over: dict[int, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> None:
        """Run the tree, and look what became of it."""
        with contextlib.suppress(BaseException):  # what leaves it has been looked at
            self.open(self.top)
        self.released.set()
        far = self.notes.read()
        for number, begun in self.over.copy().items():  # those abandoned may go on
            seen = far.get(number) or self.seen[number]
            wants((seen.begun, seen.ended) == begun, "it went on after its group", number, seen)

    # --- Blocks --------------------------------------------------------------------------------

    def open(self, block: Block) -> None:
        """Run one group, and look what became of it; what left it leaves."""
        outer = current_token()
        abandon = abandons(block)
        pool = "killing" if block.kills and stuck(block) else block.pool
        group = TaskGroup(
            block.workers,
            timeout=block.timeout,
            max_queued=block.max_queued,
            policy=POLICIES[block.policy],
            pool=POOLS.get(pool, pool),
            grace=0.02 if abandon else 60.0,
            on_stuck="abandon" if abandon else "wait",
        )
        self.groups[block.number] = group
        self.handles[block.number] = []
        left: BaseException | None = None
        broken: BaseException | None = None  # what left the body
        try:
            with group:
                try:
                    self.body(block, group)
                except BaseException as error:
                    broken = error
                    raise
        except BaseException as error:
            left = error
        try:
            self.look(block, group, left, outer)
            noted = broken in [failure.exception for failure in group.failures]
            echo = isinstance(broken, Cancelled) and group.token.cancelled()
            wants(noted or echo or broken is None, "what left the body is lost", broken)
            reason = group.token.reason
            if block.policy != "fail fast" and isinstance(reason, Failed) and reason is not broken:
                own = [each.exception for each in group.failures if each.task is not None]
                wants(reason not in own, "cancelled by a task's failure", reason)
        except BaseException as error:
            WRONG.append(error)
        finally:
            if left is not None:
                try:
                    raise left
                finally:
                    del left, broken

    def body(self, block: Block, group: TaskGroup) -> None:
        handles = self.handles[block.number]
        far = block.pool == "processes"
        act: Callable[[Call], Any] = partial(far_act, self.notes) if far else self.act
        if block.feed == "submit":
            for call in block.calls:
                submitter = (
                    group if call.timeout is None else group.with_options(timeout=call.timeout)
                )
                handles.append((call, submitter.submit(act, call)))
        elif block.feed == "map":
            batch = group.map(act, block.calls)
            handles.extend(zip(block.calls, batch.tasks, strict=True))
            if block.ending == "results":
                batch.results()
            elif block.ending == "as completed":
                for index, value in batch.as_completed():
                    wants(value == block.calls[index].number, "a value is another's", value)
        else:
            self.stream(block, group, act)
        if block.ending == "wait":
            group.wait()
        elif block.ending == "results":
            for _, task in handles:
                task.result()
        elif block.ending == "as completed":
            tasks = [task for _, task in handles]
            ended = list(fastpool.as_completed(tasks))
            wants(sorted(map(id, ended)) == sorted(map(id, tasks)), "not each once", ended)
        elif block.ending == "raises":
            raise Failed(block.number)
        elif block.ending == "cancel":
            # A process takes its time to start, and what is stuck is to begin.
            fastpool.sleep(0.1 if far and stuck(block) else 0.002)
            group.cancel(enough(block))

    def stream(self, block: Block, group: TaskGroup, act: Callable[[Call], Any]) -> None:
        """Take values until the last one, or until every fourth block has had enough."""
        taken: list[int] = []
        closed = []

        def items() -> Iterator[Call]:
            try:
                yield from block.calls
            finally:
                closed.append(True)

        window = 1 + block.number % 5
        if block.feed == "imap":
            values = group.imap(act, items(), window=window)
        else:
            values = group.imap_unordered(act, items(), window=window)
        with contextlib.closing(values):  # type: ignore[type-var] # it is a generator
            for value in values:
                taken.append(value)
                if block.number % 4 == 0 and len(taken) > 2:
                    break
        wants(closed or not block.calls, "the input is not closed")
        numbers = [call.number for call in block.calls]
        if block.feed == "imap":
            wants(taken == numbers[: len(taken)], "out of order", taken, numbers)
        wants(len(set(taken)) == len(taken) and set(taken) <= set(numbers), "not once", taken)

    # --- Tasks -------------------------------------------------------------------------------

    def act(self, call: Call) -> int:
        """What a task does, and a note of it."""
        seen = self.seen[call.number]
        seen.begun += 1
        wants(call.number not in self.over, "begun after its group", call)
        if call.number > 0:
            block, group = self.around(call)
            self.late[block.number] += bool(group.failures)
        try:
            self.do(call)
        except BaseException as error:
            seen.left, seen.raised = error, True
            raise
        else:
            seen.left = call.number
            return call.number
        finally:
            seen.ended += 1

    def do(self, call: Call) -> None:
        if call.kind == "nested":
            assert call.inner is not None
            self.open(call.inner)
        elif call.kind == "stuck":
            self.released.wait(timeout=HANG)
        elif call.kind in ALONE:
            ALONE[call.kind]()
        elif call.kind == "fails":
            raise Failed(call.number)
        elif call.kind == "exits":
            raise SystemExit(call.number)
        elif call.kind != "value":
            self.among_others(call)

    def among_others(self, call: Call) -> None:
        """What one task does to the others of its group."""
        block, group = self.around(call)
        others = self.handles[block.number].copy()
        if call.kind == "cancel-group":
            group.cancel(enough(block))
        elif call.kind == "submit":
            more = Call(~call.number, "value")
            with contextlib.suppress(GroupClosedError):
                self.handles[block.number].append((more, group.submit(self.act, more)))
        elif others:
            task = others[call.number % len(others)][1]
            if call.kind == "cancel-sibling":
                task.cancel("by a sibling")
            else:
                with contextlib.suppress(Failed, TaskCancelledError, RuntimeError, TimeoutError):
                    task.result(timeout=0.005)

    def numbers(self, block: Block) -> set[int]:
        """Those of all the calls of a block, and of those that these submit."""
        more = [~call.number for call in block.calls if call.kind == "submit"]
        return {call.number for call in block.calls}.union(more)

    def around(self, call: Call) -> tuple[Block, TaskGroup]:
        """The block that a call is of."""
        blocks = [self.top]
        for block in blocks:  # grows as it goes
            if call in block.calls:
                return block, self.groups[block.number]
            blocks += [each.inner for each in block.calls if each.inner is not None]
        raise LookupError(call)

    # --- What must hold --------------------------------------------------------------------------

    def look(
        self, block: Block, group: TaskGroup, left: BaseException | None, outer: CancelToken
    ) -> None:
        """Look what became of a group that has ended, and of all its tasks."""
        TALLY["groups"] += 1
        far = block.pool == "processes"
        seen = self.notes.read() if far else self.seen
        abandoned: set[int] = set()
        for call, task in self.handles[block.number]:
            if abandons(block) and was_abandoned(task):
                TALLY["abandoned"] += 1
                abandoned.add(call.number)
            else:
                self.look_at(call, task, seen[call.number], far=far)
        if abandons(block) and not self.handles[block.number]:
            # Where the group ends in the middle of a `map`, nobody has a handle of what has begun.
            begun = [call.number for call in block.calls if runs_on(call, seen[call.number])]
            TALLY["abandoned"] += len(begun)
            abandoned.update(begun)
        if far:
            self.look_at_far(block, abandoned)
        else:
            for number in self.numbers(block) - abandoned:
                body = seen[number]
                self.over[number] = body.begun, body.ended
                wants(body.begun == body.ended <= 1, "it runs, or ran twice", number, body)
        if block.policy == "fail fast":
            late = self.late[block.number]
            wants(late <= block.workers, "begun after a failure", late, block.workers)
        self.look_at_failures(block, group)
        self.look_at_leaving(block, group, left, outer, abandoned=bool(abandoned))
        wants(not group.cancel("late"), "a cancel after the end")
        try:
            group.submit(abs, 1)
        except GroupClosedError:
            return
        wants(False, "an ended group takes a task")

    def look_at_far(self, block: Block, abandoned: set[int]) -> None:
        """Each has run once at most, and has ended or was killed; of those abandoned, soon."""
        end = time.monotonic() + PATIENCE
        seen = self.notes.read()
        while any(runs(seen[number]) for number in abandoned):
            wants(time.monotonic() < end, "abandoned and not killed", block.number)
            time.sleep(0.001)
            seen = self.notes.read()
        for call in block.calls:
            outcome = seen[call.number]
            self.over[call.number] = outcome.begun, outcome.ended
            wants(outcome.begun <= 1 and not runs(outcome), "it runs, or ran twice", call, outcome)
            if call.kind == "stuck":
                wants(not outcome.ended, "not killed", call)
                TALLY["killed"] += outcome.begun and call.number not in abandoned

    def look_at(self, call: Call, task: Task[Any], seen: Outcome, *, far: bool) -> None:
        """Exactly one outcome, which is that of the body."""
        wants(task.done() and not task.running(), "not done", call, task)
        TALLY["tasks"] += 1
        error = None
        try:
            value = task.result(timeout=0)
        except (TaskCancelledError, Cancelled):
            TALLY["cancelled"] += 1
            wants(far or task.cancelled() or seen.raised, "told as cancelled", call, task)
            cut = far or (seen.raised and isinstance(seen.left, Cancelled))
            wants(cut or not (seen.begun and task.cancelled()), "not cut short", call, seen)
        except BaseException as raised:
            TALLY["failed"] += 1
            error = raised
            wants(task.exception() is raised and not task.cancelled(), "two outcomes", call)
            if far or isinstance(error, TimeoutError):
                return  # a copy; or of its own deadline
            wants(seen.raised and seen.left is error, "an error that it has not raised", call)
        else:
            wants(value == call.number, "another's value", call, value)
            wants(seen.ended == 1, "a value of no body", call, seen)
            wants(far or seen.left == call.number, "not what the body returned", call, seen)

    def look_at_failures(self, block: Block, group: TaskGroup) -> None:
        """Each task that failed is among the failures once, and no other."""
        noted = [failure.task for failure in group.failures if failure.task is not None]
        wants(len({id(task) for task in noted}) == len(noted), "noted twice", group.failures)
        for task in noted:
            wants(not task.cancelled() and task.exception() is not None, "has not failed", task)
        for failure in group.failures:
            wants(isinstance(failure.exception, KNOWN), "nobody raises that", failure)
        errors = {id(failure.exception) for failure in group.failures}
        for call, task in self.handles[block.number]:
            error = None if task.cancelled() else task.exception()
            wants(error is None or id(error) in errors, "a failure is lost", call, error)

    def look_at_leaving(
        self,
        block: Block,
        group: TaskGroup,
        left: BaseException | None,
        outer: CancelToken,
        *,
        abandoned: bool,
    ) -> None:
        """What left the block is what the rules make of its record, and nothing if that is it."""
        failures = group.failures
        errors = [failure.exception for failure in failures]
        for error in errors:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                wants(left is error, "another than the exit left", left, error)
                return
        if block.policy == "fail fast" and errors:
            wants(left is errors[0], "another than the first failure left", left, errors)
            return
        if block.policy == "first":
            bodies = [failure.exception for failure in failures if failure.task is None]
            if bodies:
                wants(left is bodies[0], "another than the body's left", left, bodies)
                return
            if group.winner is not None:
                wants(not isinstance(left, BaseExceptionGroup), "failures beside a winner", left)
                errors = []
        if errors:
            wants(isinstance(left, BaseExceptionGroup), "not all failures left", left, errors)
            assert isinstance(left, BaseExceptionGroup)
            wants(list(left.exceptions) == errors, "not these failures", left.exceptions, errors)
            return
        wanted: type[BaseException] | None = None
        reason = group.token.reason
        if reason is not None and reason is outer.reason:
            wanted = Cancelled
        elif isinstance(reason, TimeoutError):
            TALLY["timed out"] += 1
            wants(block.timeout is not None, "no deadline", reason)
            wanted = TimeoutError
        elif reason is not None and group.winner is None:
            wants(reason == enough(block), "cancelled by nobody", reason)
        if wanted is None and abandons(block) and isinstance(left, StuckTaskError):
            return
        wants(wanted is not None or not abandoned, "nothing says what was abandoned", left)
        wants(type(left) is (wanted or type(None)), "not what the token says left", left, reason)


def enough(block: Block) -> str:
    """Why its body or a task of its own cancels a group."""
    return f"block {block.number} has had enough"


def stuck(block: Block) -> bool:
    """Whether any of its tasks does not stop."""
    return any(call.kind == "stuck" for call in block.calls)


def abandons(block: Block) -> bool:
    """Whether a group is left without those that are stuck."""
    return stuck(block) and not block.kills


def runs_on(call: Call, seen: Outcome) -> bool:
    """Whether a task that does not stop has begun."""
    return call.kind == "stuck" and seen.begun > seen.ended


def runs(seen: Outcome) -> bool:
    """Whether a task runs in a worker process that is alive."""
    if seen.ended or not seen.begun:
        return False
    try:
        with open(f"/proc/{seen.process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def was_abandoned(task: Task[Any]) -> bool:
    """Whether its block was left without it."""
    try:
        with shield():
            task.result(timeout=0)
    except TaskCancelledError as error:
        return str(error.reason).startswith("it had not stopped")
    except BaseException:
        pass
    return False


def sleep() -> None:
    fastpool.sleep(random.uniform(0, 0.004))


def check() -> None:
    for _ in range(200):
        fastpool.checkpoint()


def catch() -> None:
    with contextlib.suppress(Cancelled):
        fastpool.sleep(0.003)


def shielded() -> None:
    with shield():
        fastpool.sleep(0.001)
    fastpool.checkpoint()


def endless() -> None:
    fastpool.sleep(HANG)
    wants(False, "nobody has cancelled it")


ALONE: dict[str, Callable[[], None]] = {
    "sleep": sleep,
    "check": check,
    "catch": catch,
    "shield": shielded,
    "endless": endless,
}


@cancellable
def far_act(token: CancelToken, notes: Notes, call: Call) -> int:
    """What a task does in a worker process, and a note of it."""
    warnings.simplefilter("ignore", RuntimeWarning)  # of those that are stuck
    notes.add("begun", call.number, os.getpid())
    try:
        if call.inner is not None:
            there = Round(call.inner, notes)
            try:
                there.open(call.inner)
            finally:
                there.released.set()
        elif call.kind == "fails":
            raise Failed(call.number)
        elif call.kind == "stuck":
            time.sleep(DEAF)
        elif call.kind in ALONE:
            ALONE[call.kind]()
        return call.number
    finally:
        for wrong in WRONG:
            notes.add("wrong", wrong)
        WRONG.clear()
        notes.add("ended", call.number, os.getpid())


# --- What is left behind ---------------------------------------------------------------------


def left_behind() -> dict[str, int]:
    """How many threads, processes, descriptors and objects of fastpool's there are."""
    fastpool.shutdown()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:  # what was abandoned ends now
        threads = [thread.name for thread in threading.enumerate() if "fastpool" in thread.name]
        if not threads:
            break
        time.sleep(0.01)
    for _ in range(3):
        gc.collect()
    classes = collections.Counter(type(thing) for thing in gc.get_objects())

    def objects(*kinds: type) -> int:
        return sum(count for kind, count in classes.items() if issubclass(kind, kinds))

    return {
        "threads": len(threads),
        "processes": len(multiprocessing.active_children()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "groups": objects(TaskGroup, Run),
        "tasks": objects(Task, Items),  # the handles of all kinds
        "tokens": objects(CancelToken),
    }


def resident() -> int:
    """Bytes of memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- The run -----------------------------------------------------------------------------------


def one(
    seed: str, number: int, pools: list[str], complaints: list[BaseException], notes: Notes
) -> None:
    """One round."""
    chance = random.Random(f"{seed}/{number}")
    round_ = Round(tree(chance, pools), notes)
    token = CancelToken()
    timer = threading.Timer(chance.uniform(0, 0.02), token.cancel, ["from outside"])
    if chance.random() < 0.15:
        timer.start()
    try:
        with use_token(token):
            if chance.random() < 0.3:
                elsewhere(copy_context().run, round_.run)
            else:
                round_.run()
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
    os.truncate(notes.path, 0)
    wants(not complaints, "nobody was given", complaints)
    if WRONG:
        raise WRONG[0]


def elsewhere(fn: Callable[..., object], *args: object) -> None:
    """Call something in a thread of its own."""
    outcome: list[BaseException] = []

    def call() -> None:
        try:
            fn(*args)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if outcome:
        raise outcome.pop()


def main(arguments: list[str]) -> int:
    """Run rounds until the time is over or one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default 1)")
    parser.add_argument("--seed", help="what the trees are made from; by default a new one")
    parser.add_argument("--round", type=int, help="this round alone, again and again")
    parser.add_argument("--pools", default="threads,shared", help="threads, shared, processes")
    options = parser.parse_args(arguments)
    seed = options.seed or f"{random.SystemRandom().randrange(10**9)}"
    pools = options.pools.split(",")

    complaints: list[BaseException] = []
    sys.unraisablehook = lambda told: complaints.append(told.exc_value or told.exc_type())
    threading.excepthook = lambda told: complaints.append(told.exc_value or told.exc_type())
    warnings.simplefilter("ignore", RuntimeWarning)  # of those that are stuck
    print(f"seed {seed}, {', '.join(pools)}", flush=True)

    rounds, end = 0, time.monotonic() + 60 * options.minutes
    first: dict[str, int] = {}
    middle = 0
    with contextlib.closing(ThreadPool(2)) as shared, tempfile.NamedTemporaryFile() as noted:
        POOLS["shared"] = shared
        POOLS["killing"] = Processes(kill_after=KILL_AFTER)
        while time.monotonic() < end:
            number = rounds if options.round is None else options.round
            faulthandler.dump_traceback_later(2 * HANG, exit=True)
            try:
                one(seed, number, pools, complaints, Notes(noted.name, rounds))
            except BaseException as error:
                print(f"round {number} of seed {seed}: {type(error).__name__}: {error}", flush=True)
                traceback.print_exception(error)
                return 1
            rounds += 1
            if rounds % LOOK == 0:
                seen = left_behind()
                # What is cached is there after the first rounds; of the rest there is nothing.
                first = first or {**dict.fromkeys(seen, 0), **{name: seen[name] for name in CACHED}}
                grown = {name: seen[name] for name in seen if seen[name] > first[name]}
                if grown:
                    print(f"after round {number} of seed {seed}: {grown} left")
                    return 1
                if not middle and time.monotonic() > end - 30 * options.minutes:
                    middle = resident()
    fastpool.shutdown()  # what was abandoned ends, and what is begun too late begins
    if WRONG:
        print(f"after round {rounds} of seed {seed}: {WRONG[0]}")
        return 1
    faulthandler.cancel_dump_traceback_later()
    grown_by = resident() - middle if middle else 0
    print(", ".join(f"{count} {what}" for what, count in [("rounds", rounds), *TALLY.items()]))
    print(f"left: {first}, memory of the second half {grown_by:+} bytes")
    return grown_by > MARGIN
