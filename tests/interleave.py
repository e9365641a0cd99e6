"""
Runs a model, a few threads that meet in the library, under many orders of its steps.

A model is a function without arguments. It starts threads with `together` or `spawn`, asserts what
the contract says of how they meet, and returns which of the allowed outcomes it was. Only one of
its threads runs at any moment; after each instruction of the library's the explorer chooses which
goes on. A model knows nothing of the package that does this, so that it can be replaced.

Locks, threads and the clock are found by the library when it needs them, so they are the
explorer's while a model runs: one that waits for ever is seen at once, and time passes only when
nobody can go on, or when a model says so.

    FASTPOOL_SCHEDULES=20000 FASTPOOL_SEED=2 pytest tests/test_interleavings.py

tries so many orders of each model, and others than by itself.
"""

import contextlib
import contextvars
import dis
import functools
import gc
import itertools
import os
import random
import re
import sys
import threading
from collections import Counter, deque
from unittest import mock

import interleave_test
from interleave_test import _scheduler

import fastpool
from fastpool import Cancelled, _clock, _gate, _taskgroup
from fastpool.backends import threads

SCHEDULES = int(os.environ.get("FASTPOOL_SCHEDULES", "400"))
LONGEST = 600  # seconds that a model lasts
SEED = int(os.environ.get("FASTPOOL_SEED", "1"))
PACKAGE = os.path.join(os.path.dirname(fastpool.__file__), "")


# --- What a model uses ----------------------------------------------------------------------------


def spawn(fn):
    """Run a function in a thread of its own; it has a `join()`, and then a `result()`."""
    return interleave_test.spawn(_in_thread(threading.Thread(), fn))


def together(*fns):
    """What some functions return that run at the same time, the first of them in this thread."""
    tasks = [spawn(fn) for fn in fns[1:]]
    result = contextvars.Context().run(fns[0])
    for task in tasks:
        task.join()
    return [result, *[task.result() for task in tasks]]


def attempt(fn, *args):
    """What a function returns, or the error that it raises."""
    try:
        return fn(*args)
    except (Exception, Cancelled) as error:
        return error


def pass_time(seconds):
    """Let so much time pass for all, whatever they are at."""
    scheduler = _scheduler.current_scheduler()
    with scheduler._cv:
        scheduler._vnow += seconds
        for thread in scheduler._recs:
            if thread.deadline is not None and thread.deadline <= scheduler._vnow:
                thread.blocked_on.waiters.remove(thread)
                thread.blocked_on = thread.deadline = None
                thread.woke_by_timeout = True
                thread.status = _scheduler.Status.READY
    scheduler.yield_point()


class Workers:
    """Stands where a `ThreadPool` of a user's stood, for a model; `group_pool` is for a group."""

    def __init__(self, size):
        self._processes = size
        self._jobs = deque()
        self._arrived = threading.Semaphore(0)
        self._threads = [spawn(self._work) for _ in range(size)]
        self.group_pool = threads.Shared(self)

    def apply_async(self, fn, args=()):
        self._jobs.append((fn, args))
        self._arrived.release()

    def _work(self):
        while True:
            self._arrived.acquire()
            fn, args = self._jobs.popleft()
            if fn is None:
                return
            fn(*args)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        for _ in self._threads:
            self.apply_async(None)


def pause():
    """Let another thread go on, if its turn has come."""
    _scheduler.current_scheduler().yield_point()


class Gone(_scheduler._Abort):
    """Raised where a thread of the explorer's is to end, wherever it is, without a word."""


class Failed(AssertionError):
    """Raised when a model fails; it says in which order of its steps."""


# --- Exploring ------------------------------------------------------------------------------------


def explore(model, *, schedules=SCHEDULES, seed=SEED):
    """
    Run a model under so many orders, at each of which a thread may stop after any instruction.

    A model that has an attribute `within` has them stop in those files of the library alone, by
    the beginnings of their names: most steps are in the part then that it is about.

    Returns:
        How often there was each outcome.

    Raises:
        Failed: With the steps that led to it, if the model fails, waits for ever or goes
            on for ever in one of them.

    Source:
        Burckhardt et al., A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs.
    """
    outcomes, _ = _run(model, strategy=_Priorities(), iterations=schedules, seed=seed)
    return outcomes


def exhaust(model, *, most=20_000):
    """As `explore`, but all orders in which threads stop twice at most, after a line each."""
    strategy = interleave_test.DFSStrategy(max_preemptions=2)
    outcomes, result = _run(model, strategy=strategy, iterations=most, granularity="line")
    assert result.exhausted, f"{most} orders are not all"
    return outcomes


def replay(model, schedule):
    """Run a model once, in the order that a failure has named."""
    return _run(
        model,
        strategy=interleave_test.ReplayStrategy(_unpacked(schedule)),
        iterations=1,
        granularity="line" if schedule.startswith("line") else "opcode",
        steps=True,
    )


def _run(model, *, steps=False, **options):
    outcomes = Counter()

    def modelled():
        _begin()
        _in_thread(threading.Thread(), lambda: outcomes.update([model()]))()
        fastpool.shutdown()

    within = tuple(PACKAGE + name for name in getattr(model, "within", [""]))
    scheduler = functools.partial(_Scheduler, record_steps=steps, within=within)
    with _alone(), mock.patch.object(_scheduler, "Scheduler", scheduler):
        result = interleave_test.explore(
            modelled, include=[PACKAGE], timeout=60, raise_on_failure=False, **options
        )
    failure = result.failure
    if failure is None:
        return outcomes, result
    text = failure.format()
    if not steps:
        schedule = _packed(failure.schedule)
        with contextlib.suppress(Failed):
            replay(model, schedule)
            text += "\n(it does not fail when it is replayed)"
        text = f"{text}\n\ninterleave.replay({_name(model)}, {schedule!r})"
    raise Failed(re.sub(r"reproduce exactly:.*|rerun the search:.*", "", text))


class _Priorities(interleave_test.Strategy):
    """
    The thread with the highest priority goes on; at some moments that becomes the lowest.

    The package's own has two moments, and counts the steps at which there is only one thread.
    Some faults show when a thread is left behind for long, others when all change often.
    """

    def __init__(self):
        self.longest = 64  # of the runs of late

    def begin(self, iteration, seed):
        self.chance = random.Random(seed)
        stops = self.chance.choice((1, 1, 1, 1, 2, 2, 4, 8))
        self.stops = sorted(self.chance.randrange(self.longest) for _ in range(stops))
        self.priorities = {}
        self.count = 0

    def pick(self, runnable, current, index):
        self.count += 1
        if self.stops and self.count > self.stops[0] and current is not None:
            self.priorities[current.tid] = -self.count
            del self.stops[0]
        for thread in runnable:
            self.priorities.setdefault(thread.tid, self.chance.random() + 1)
        return max(runnable, key=lambda thread: self.priorities[thread.tid])

    def end(self):
        self.longest = max(self.count, int(self.longest * 0.95))

    def certain(self):
        """How often the same thread would be picked again, if nothing else happens."""
        return max(0, self.stops[0] - self.count) if self.stops else sys.maxsize


class _Scheduler(_scheduler.Scheduler):
    """
    Asks only where there is something to choose, which makes it four times as fast, and does not
    take it for progress that threads that are idle look around now and then.
    """

    def __init__(self, strategy, *, record_steps, within, **options):
        super().__init__(strategy, record_steps=record_steps, **options)
        self._within = within
        self._asks = record_steps
        self._certain = self._left = 0  # for so many steps in all, and from now, it is known
        self._alone = True  # since no other thread can go on

    def _pick_next(self, current, kind):
        strategy = self._strategy
        if self._certain > self._left and not self._alone:
            strategy.count += self._certain - self._left
        chosen = super()._pick_next(current, kind)
        if self._vnow > LONGEST:
            waiting = [one for one in self._recs if one.status is _scheduler.Status.BLOCKED]
            self._fail("deadlock", None, self._blocked_table(waiting))
            return None
        if not self._asks:
            ready = _scheduler.Status.READY
            self._alone = not any(one.status is ready and one is not chosen for one in self._recs)
            certain = getattr(strategy, "certain", int)
            self._certain = self._left = sys.maxsize if self._alone else certain()
        return chosen

    def _events_off(self):
        """Not after each run: for the next one all code would have to be prepared again."""
        _tools.add(self._tool_id)

    def _should_trace(self, filename):
        return filename.startswith(PACKAGE)

    def _on_instruction(self, code, offset):
        if offset not in _points_of(code)[0]:
            return sys.monitoring.DISABLE
        if not code.co_filename.startswith(self._within):
            return None  # and not disabled, which it would stay for the next model
        if self._left and not self._abort:
            thread = self._byid.get(threading.get_ident())
            if thread is not None:
                self._left -= 1
                self._decisions.append(thread.tid)
                return None
        return super()._on_instruction(code, offset)

    def _on_line(self, code, line):
        if line not in _points_of(code)[1]:
            return sys.monitoring.DISABLE
        return super()._on_line(code, line)


_tools = set()  # whose events are still on


def _turn_events_off():
    while _tools:
        tool = _tools.pop()
        sys.monitoring.use_tool_id(tool, "explorer")
        sys.monitoring.set_events(tool, 0)
        sys.monitoring.free_tool_id(tool)


_points = {}  # of each code that was met, by its `id`; with the code itself, so that it stays


def _points_of(code):
    """
    Where other threads can make a difference: before what reads or writes an object, or calls.

    All other instructions only move what is a thread's own, and so do those that make an object,
    which nobody else has yet. With them most orders would be repetitions.

    Returns:
        The instructions' places in the code, and their lines.
    """
    known = _points.get(id(code))
    if known is None:
        places, lines = set(), set()
        if code.co_name != "__init__" and code.co_filename.startswith(PACKAGE):
            names = [dis.opname[number] for number in code.co_code[::2]]
            places = {2 * at for at, name in enumerate(names) if _TOUCHES.match(name)}
            for start, end, line in code.co_lines():
                if places & set(range(start, end)):
                    lines.add(line)
        known = _points[id(code)] = (places, lines, code)
    return known


_TOUCHES = re.compile(
    "CALL|(LOAD|STORE|DELETE)_(ATTR|METHOD|DEREF|SUPER)|(BINARY|STORE|DELETE)_(SUB|SLICE|OP)"
    "|STORE_GLOBAL|CONTAINS_OP|FOR_ITER|EXTENDED_ARG"
)


def _name(model):
    return getattr(model, "__qualname__", model)


def _packed(schedule):
    runs = (f"{thread}x{len(list(run))}" for thread, run in itertools.groupby(schedule.choices))
    return " ".join([schedule.granularity, *runs])


def _unpacked(text):
    granularity, *runs = text.split()
    pairs = (map(int, run.split("x")) for run in runs)
    choices = [thread for thread, count in pairs for _ in range(count)]
    return interleave_test.Schedule(choices, granularity)


# --- What the library meets -----------------------------------------------------------------------

_own = threading.local()
_current_thread = threading.current_thread


def _in_thread(thread, fn):
    """A function that finds itself in that thread."""

    def run():
        _own.thread = thread
        return fn()

    return run


class _Thread(interleave_test.Thread):
    def run(self):
        _in_thread(self, super().run)()


class _Lock(interleave_test.Lock):
    """One that has been waited for as long as possible is waited for for ever."""

    def acquire(self, blocking=True, timeout=-1):
        return super().acquire(blocking, -1 if timeout >= threading.TIMEOUT_MAX else timeout)


class _Worker(threads._WorkerThread):
    def __init__(self):
        """Not as a thread, which the explorer's are not."""


class _Pool:
    """Stands where the library's own `ThreadPool` stood: a thread for each job."""

    def grow(self):
        pass

    def apply_async(self, fn, args):
        interleave_test.spawn(_in_thread(_Worker(), lambda: fn(*args)))

    def close(self):
        pass

    def join(self):
        pass


@contextlib.contextmanager
def _alone():
    """Nothing but the model acts meanwhile, and nothing that a broken one has left stays."""
    fastpool.shutdown()
    hook = sys.unraisablehook

    def heed(broken):
        # Ends the threads of a model that failed.
        if not issubclass(broken.exc_type, _scheduler._Abort):
            hook(broken)

    gc.disable()  # finalizers run code of the library's, and must do so at the same step each time
    try:
        with (
            mock.patch.object(sys, "unraisablehook", heed),
            mock.patch.object(threading, "current_thread", _find_thread),
            mock.patch.object(_gate, "SLICE", threading.TIMEOUT_MAX),
            mock.patch.object(threads, "_GrowingPool", _Pool),
        ):
            yield
            _forget()
            gc.collect()
    finally:
        _turn_events_off()
        gc.enable()


def _begin():
    _forget()
    threading.Lock, threading.Thread = _Lock, _Thread  # the explorer puts back what was there


def _find_thread():
    return getattr(_own, "thread", None) or _current_thread()


def _forget():
    for left in (
        _clock._clocks,
        _clock._helpers,
        _clock._idle_helpers,
        _taskgroup._open_runs,
        threads._live_pools,
        *(crew.idle for crew in list(threads._crews)),
    ):
        left.clear()
