"""Deadlines, and the helper threads that act when no thread of the user's should have to."""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import functools
import heapq
import itertools
import math
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from fastpool._gate import Gate
from fastpool._unraisable import unraisable
from fastpool._whole import whole

__all__ = [
    "IDLE",
    "add_deadline",
    "after_fork",
    "check_threads",
    "run_from_handler",
    "run_in_helper",
    "run_late",
    "seconds",
    "shutdown",
    "start_thread",
]

IDLE = 10.0  # seconds an idle thread waits for more to do, as trio's thread cache does
MOMENT = 0.1  # seconds that `shutdown` gives a helper at work, which mostly is at its very end


class Expiring(Protocol):
    """What a deadline happens to."""

    def _due(self) -> float | None:
        """When, on `time.monotonic()`; anything else than what was added means: no more."""

    def _expire(self) -> None:
        """The deadline has passed. Called in the clock's thread; must not block."""


def seconds(value: float | None, what: str = "timeout") -> float | None:
    """
    A span of time as it was given, checked.

    Returns:
        Seconds, possibly negative; `None` for no limit, which is what infinity means too.

    Raises:
        TypeError: If it is no number of seconds.
        ValueError: If it is not a number (NaN).
    """
    if value is None:
        return None
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        advice = "; give its total_seconds()" if hasattr(value, "total_seconds") else ""
        raise TypeError(f"{what} must be a number of seconds, not {value!r}{advice}")
    try:
        span = float(value)
    except OverflowError:  # a whole number that is larger than any float
        span = math.inf if value > 0 else -math.inf
    if math.isnan(span):
        raise ValueError(f"{what} must be a number of seconds, not {value!r}")
    return None if span == math.inf else span


def check_threads() -> None:
    """
    Raise if no thread of ours can be started any more, or at all; the system would hang, or say
    something else.
    """
    if sys.is_finalizing():
        raise RuntimeError("can't start a thread: the interpreter is exiting")
    if not _daemon_threads_allowed():
        raise RuntimeError(
            "can't start a thread: fastpool needs daemon threads, and a subinterpreter has none; "
            "use it in the main interpreter"
        )


# Python 3.12 and newer have it.
_daemon_threads_allowed: Callable[[], bool] = getattr(
    _thread, "daemon_threads_allowed", lambda: True
)


def start_thread(
    target: Callable[[], object],
    name: str,
    note: Callable[[threading.Thread], object] = lambda thread: None,
) -> None:
    """
    Start a daemon thread in an empty context, so that it keeps nothing of its starter's.

    Args:
        target: What it runs.
        name: Its name.
        note: Called with the thread once it is sure that it runs.

    Raises:
        BaseException: Why it never runs; or what a signal handler has raised when it ran already.
    """
    check_threads()
    claims: dict[None, bool] = {}  # whether it runs; `setdefault` decides

    def run() -> None:
        if claims.setdefault(None, True):
            target()

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        # Free-threaded builds hand on the starter's context: give them an empty one.
        contextvars.Context().run(thread.start)
    except BaseException:
        if claims.setdefault(None, False):
            note(thread)
        raise
    note(thread)


Deadline = tuple[float, int, "weakref.ref[Expiring]"]  # when, a tie-breaker, whose


class _Turn:
    """One thread's time as the clock's, if another one is not it already."""

    __slots__ = ("asked", "began", "over", "thread")

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.asked: deque[Gate] = deque()  # `shutdown` asks it to end, and waits for the answer
        self.began = self.over = False

    def answer(self) -> None:
        while self.asked:
            self.asked.popleft().open()


class _Clock:
    """
    One thread that sleeps until the nearest deadline, and another one when that has ended.

    No lock: the heap is the thread's that has the turn, and deadlines reach it through a deque.
    Both sides write first and look then (the adder appends, then reads `_wakes_at`, and whether
    a thread has the turn or is sure to come; the thread begins, sets `_wakes_at`, gives up its
    turn, and looks into the deque after each of these), so one of them always sees the other.
    """

    def __init__(self) -> None:
        self.arrivals: deque[Deadline] = deque()
        self.gate = Gate()
        # Whose turn it is, under the one key "clock": `setdefault` decides, without a lock.
        self.turns: dict[str, _Turn] = {}
        self.latest: _Turn | None = None  # of a thread that began, or is sure to
        self._wakes_at = -math.inf  # -inf while the thread is awake, and looks by itself
        self._heap: list[Deadline] = []  # this and the next are the thread's that has the turn
        self._sweep_at = 64

    def arrive(self, entry: Deadline) -> None:
        self.arrivals.append(entry)
        # Many that are far off, and lifted by now for the most part, are to be swept out.
        if entry[0] < self._wakes_at or len(self.arrivals) > 100:
            self.gate.open()
        if not self._looks():
            self._start()

    def _looks(self) -> bool:
        """Whether a thread is sure to look into the arrivals after this."""
        latest = self.latest
        return bool(self.turns) or (latest is not None and not latest.began)

    def _start(self) -> None:
        # Not left to another that is at it: if that one gets no thread, it has nobody to tell.
        turn = _Turn()
        try:
            start_thread(
                functools.partial(self.run, turn),
                "fastpool-clock",
                lambda thread: setattr(self, "latest", turn),
            )
        except BaseException as error:
            if not (_says_no_thread(error) and self._looks()):
                raise

    def run(self, turn: _Turn) -> None:
        turn.thread = threading.current_thread()
        turn.began = True
        try:
            while self.arrivals and self.turns.setdefault("clock", turn) is turn:
                try:
                    while self._goes_on(turn):
                        pass
                finally:
                    del self.turns["clock"]
        finally:
            # Looked at by `shutdown` after it has asked.
            turn.over = True
            turn.answer()

    def _goes_on(self, turn: _Turn) -> bool:
        """Look once, and sleep; False if there has been nothing to do for long, or it is asked."""
        try:
            return self._look(turn)
        except Exception as error:  # out of memory, say: it is tried again
            turn.answer()
            with contextlib.suppress(Exception):
                unraisable(error, self)
            time.sleep(MOMENT)
            return True

    def _look(self, turn: _Turn) -> bool:
        heap = self._heap
        self._wakes_at = -math.inf
        for entry in self.arrivals.copy():
            # Here or there, each can be found at any moment, by a forked child say.
            heapq.heappush(heap, entry)
            with contextlib.suppress(ValueError):  # who has brought it may take it back
                self.arrivals.remove(entry)
        self._fire()
        if turn.asked:
            self._sweep()
            if not heap:
                return False
            turn.answer()
        self._wakes_at = heap[0][0] if heap else math.inf
        if self.arrivals:
            return True
        return self.gate.wait(heap[0][0] - time.monotonic() if heap else IDLE) or bool(heap)

    def _fire(self) -> None:
        heap = self._heap
        again: list[Deadline] = []
        now = time.monotonic()
        while heap and (heap[0][0] <= now or not _alive(heap[0])):
            when, _, reference = heap[0]
            target = reference()
            try:
                if target is not None and target._due() == when:
                    target._expire()
            except BaseException as error:  # out of memory, say: the others still expire
                if isinstance(error, MemoryError):
                    again.append(heap[0])
                unraisable(error, target)
            finally:
                heapq.heappop(heap)
        if again:
            self.arrivals.extend(again)
            time.sleep(MOMENT)
        # A deadline that was lifted stays in the heap until its time comes, so sweep them out
        # whenever they may be half of it: a constant cost for each deadline added.
        if len(heap) > self._sweep_at:
            self._sweep()
            self._sweep_at = 2 * len(heap) + 64

    def _sweep(self) -> None:
        self._heap[:] = [entry for entry in self._heap if _alive(entry)]
        heapq.heapify(self._heap)

    def pending(self) -> list[Deadline]:
        return [*self._heap, *self.arrivals]


def _alive(entry: Deadline) -> bool:
    target = entry[2]()
    return target is not None and target._due() == entry[0]


# The clock of this process, under the one key "clock", once there is a deadline.
_clocks: dict[str, _Clock] = {}
_counter = itertools.count()


def add_deadline(when: float, target: Expiring) -> None:
    """
    Have `target._expire()` called at `when`, as long as that is still its deadline.

    Args:
        when: On `time.monotonic()`, in seconds.
        target: Held weakly.

    Threads:
        Any. Takes no lock. `_expire()` is called in the clock's thread.
    """
    entry = when, next(_counter), weakref.ref(target)
    try:
        _arrive(entry)
    except BaseException:
        clock = _clocks.get("clock")
        if clock is not None:
            with contextlib.suppress(ValueError, IndexError):  # it has been taken from there
                clock.arrivals.remove(entry)
        raise


def _arrive(entry: Deadline) -> None:
    while True:
        clock = _clocks.get("clock") or _clocks.setdefault("clock", _Clock())
        clock.arrive(entry)
        # A signal handler may have forked meanwhile, and the child has another one. Arriving
        # twice does no harm.
        if _clocks.get("clock") is clock:
            return


def _end() -> None:
    """Stands where a helper's job stands, and ends it."""


def _says_no_thread(error: BaseException) -> bool:
    """Whether it is the system's, or `check_threads`'s: a signal handler may raise anything."""
    return isinstance(error, MemoryError) or (
        type(error) is RuntimeError and str(error).startswith("can't start")
    )


class _Helper:
    """A thread that runs one thing after another, for those who may not wait for it."""

    def __init__(self) -> None:
        # Set by who took it off the idle, before its gate is opened; its own then.
        self.job: Callable[[], object] | None = None
        self.gate = Gate()
        self.thread: threading.Thread | None = None
        self.ends = False  # after what it is at; only ever set

    def run(self) -> None:
        self._serve()
        _helpers.pop(self, None)

    def _serve(self) -> None:
        while True:
            job, self.job = self.job, None
            if job is _end:
                return
            if job is not None:  # else the gate was opened twice, by who was interrupted there
                job()
                _idle_helpers[self] = None
            del job
            # Looked at after it can be found idle: `shutdown` does the reverse.
            if not self.gate.wait(0.0 if self.ends else IDLE):
                # Whoever takes it off the list decides: we end, or a job is on its way.
                if _idle_helpers.pop(self, self) is None:
                    return
                self.gate.wait()


_helpers: dict[_Helper, None] = {}  # all that live, or are about to
_idle_helpers: dict[_Helper, None] = {}


def run_in_helper(job: Callable[[], object]) -> None:
    """
    Run something in a helper thread, soon, and wait for nothing.

    Args:
        job: Must not raise.

    Threads:
        Any. Takes no lock of ours; may start a thread. If none can be started, `job` runs here.
    """
    helper: _Helper | None
    for helper in reversed(list(_idle_helpers)):
        # Taken off and given its job without a call, after which a signal handler could raise.
        try:
            del _idle_helpers[helper]
        except KeyError:
            continue
        helper.job = job
        try:
            helper.gate.open()
        except BaseException:
            whole(helper.gate.open)
            raise
        return
    helper = None
    try:
        helper = _Helper()
        helper.job = job
        _helpers[helper] = None  # before it can begin, so that `shutdown` always finds it
        note = functools.partial(setattr, helper, "thread")
        start_thread(helper.run, "fastpool-helper", note)
    except BaseException as error:
        if helper is not None:
            if helper.thread is not None:
                raise  # a signal handler's, and it is at it
            _helpers.pop(helper, None)
        if not _says_no_thread(error):
            raise
        job()  # late is better than never


def run_from_handler(job: Callable[[], object]) -> None:
    """
    The same for a signal handler: it takes no lock, wherever that interrupted.

    Args:
        job: Must not raise. If no thread can be started, it is left for `run_late`.
    """
    try:
        # Straight from the interpreter: `threading` takes locks, so the thread that is started
        # here does no more than that.
        _thread.start_new_thread(run_in_helper, (job,))
    except (RuntimeError, MemoryError):
        _late.append(job)


_late: deque[Callable[[], object]] = deque()


def run_late() -> None:
    """Run what `run_from_handler` could find no thread for."""
    while _late:
        with contextlib.suppress(IndexError):
            _late.popleft()()


def shutdown() -> None:
    """
    End the helper threads, and the clock unless a deadline is still to come.

    Helpers that are at work end after it; they are not waited for longer than a moment.
    """
    helpers = list(_helpers)
    for helper in helpers:
        helper.ends = True
    while _idle_helpers:
        try:
            helper, _ = _idle_helpers.popitem()
        except KeyError:
            break
        helper.job = _end
        helper.gate.open()
        if helper.thread is not None:
            helper.thread.join()
    for helper in helpers:
        if helper.thread not in (None, threading.current_thread()):
            helper.thread.join(MOMENT)
    clock = _clocks.get("clock")
    turn = None if clock is None else clock.turns.get("clock", clock.latest)
    if clock is None or turn is None or turn.thread is threading.current_thread():
        return
    answer = Gate()
    turn.asked.append(answer)
    clock.gate.open()
    # Looked at after the question can be found: who is over does the reverse.
    if not turn.over:
        answer.wait()
    if turn.over and turn.thread is not None:
        turn.thread.join()


def after_fork() -> None:
    """In a forked child: the threads did not come along, the deadlines did."""
    clock = _clocks.pop("clock", None)
    _idle_helpers.clear()
    _helpers.clear()
    for entry in clock.pending() if clock is not None else ():
        if _alive(entry):
            _arrive(entry)
