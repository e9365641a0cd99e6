"""Threads of this process: pools leased to one group at a time, or one that you have."""

from __future__ import annotations

import contextvars
import multiprocessing
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.dummy import DummyProcess
from multiprocessing.pool import Pool, ThreadPool
from types import FunctionType
from typing import TYPE_CHECKING, Any

from fastpool import _marks
from fastpool._clock import IDLE, check_threads, run_in_helper
from fastpool._errors import is_a
from fastpool._gate import Gate
from fastpool._items import Stretch
from fastpool._lane import Lane, stand_in, take_last
from fastpool._scope import current
from fastpool._task import NOTHING, VALUE, Task, call, label
from fastpool._waiting import tell_helpers

if TYPE_CHECKING:
    from fastpool._run import Run

__all__ = ["Crew", "Leased", "Shared", "serve_stretch", "shutdown"]

SLICE = 0.01  # seconds after which we let other users of a shared pool have their turn


class _WorkerThread(DummyProcess):
    """A thread of a leased pool. It goes by the name of the group that it serves."""

    lane: Lane | None = None

    @property
    def name(self) -> str:
        lane = self.lane
        run = None if lane is None else lane.run
        if lane is None or run is None:
            return "fastpool-idle"
        return f"fastpool-{run.name}-{lane.number}"

    @name.setter  # the stub has a variable where there is a property
    def name(self, name: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The pool numbers its threads; ours have names."""


_CONTEXT = (
    multiprocessing.get_context("fork")
    if "fork" in multiprocessing.get_all_start_methods()
    else None
)


class _GrowingPool(ThreadPool):
    """A `ThreadPool` that starts with one thread and gets more as they are needed."""

    if TYPE_CHECKING:  # what it has and its stub does not say
        _processes: int
        _state: str
        _pool: list[_WorkerThread]
        _inqueue: Any
        _change_notifier: Any
        _worker_handler: Any

        def _repopulate_pool(self) -> None: ...

    def __init__(self) -> None:
        try:
            # As its parent does, but with locks that no other process is to find: those of
            # another context have names, which stay behind if the process is killed.
            Pool.__init__(self, 1, context=_CONTEXT)
        except BaseException:
            self._give_up()
            raise

    @staticmethod
    def Process(ctx: object, *args: Any, **kwargs: Any) -> Any:
        return _WorkerThread(*args, **kwargs)

    def grow(self) -> None:
        """Start one thread more, or raise what the system says."""
        self._processes += 1
        try:
            # An empty context: free-threaded builds would give the thread its starter's.
            contextvars.Context().run(self._repopulate_pool)
        except BaseException:
            self._processes -= 1
            raise

    @classmethod
    def _terminate_pool(cls, *args: Any) -> None:
        """What the interpreter calls as it ends, and `terminate()`."""
        # The sixth is the thread that looks after the workers, on 3.11 to 3.14. It is told before
        # it is terminated, and `close` looks after it has told it to close: one sees the other.
        args[5].terminated = True
        super()._terminate_pool(*args)  # type: ignore[misc] # the stub has it not

    def close(self) -> None:
        """
        As any `ThreadPool`; but one that is being terminated stays so.

        Its last thread may close it just as the interpreter ends: told to close, the handler
        would wait for a job that goes on, and who terminates it for the handler.
        """
        super().close()
        if getattr(self._worker_handler, "terminated", False):
            self._worker_handler._state = "TERMINATE"
            self._change_notifier.put(None)

    def _give_up(self) -> None:
        """The constructor could not start all its threads: end those that it did start."""
        handler = getattr(self, "_worker_handler", None)
        if handler is not None:
            handler._state = "TERMINATE"
            self._change_notifier.put(None)
            if handler.is_alive():
                handler.join()  # or it would replace the workers that end now
        for _ in self._pool:
            self._inqueue.put(None)


class Crew:
    """
    Pools whose threads do the same, and which go from group to group.

    Args:
        serve: What a thread does in a group: run its tasks until there is nothing to do.
        lane: Makes the lane of a thread.
        leave: Called with the lane when its thread ends.
        disown: Called with the lane in a forked child.
    """

    def __init__(
        self,
        serve: Callable[[Run, Any], None],
        lane: Callable[[object, int], Lane] = Lane,
        leave: Callable[[Any], None] | None = None,
        disown: Callable[[Any], None] | None = None,
    ) -> None:
        self.serve = serve
        self.lane = lane
        self.leave = leave
        self.disown = disown
        # Those that no group has leased; the one that was used last is used next.
        self.idle: dict[_Pool, None] = {}
        _crews[self] = None


class _Pool:
    """
    A pool of threads, each of which has one job for good: to serve lane after lane.

    The lanes that are not at work are parked, in `reserve`, and are woken directly: a hop
    through `apply_async` and its result costs as much as a dozen tasks.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.threads: _GrowingPool | None = None
        self.lanes: list[Lane] = []
        self.reserve: dict[Lane, None] = {}  # whoever takes a lane off has it
        self.ended = False  # only ever set
        self.foreign = False  # it is the pool of the process that this one was forked from
        self.idle_since = 0.0  # written by who gives it back
        _live_pools[self] = None
        # Guards the growing of `threads` and `lanes`. Held while a thread starts; by submitters
        # only. It is re-entrant, since a finalizer that submits may run in the middle of that.
        self.growing = threading.RLock()

    def start(self, lane_ready: Callable[[Lane], None]) -> None:
        """
        Start one thread more, with a lane of its own.

        Args:
            lane_ready: Called with the lane before it can begin.
        """
        check_threads()
        _out_of_reach(lambda: self._start(lane_ready))

    def _start(self, lane_ready: Callable[[Lane], None]) -> None:
        with self.growing:
            threads = self.threads
            if threads is None:
                fresh = contextvars.Context().run(_GrowingPool)
                threads = self.threads
                if threads is None:
                    threads = self.threads = fresh
                else:  # a finalizer has submitted meanwhile, and made one
                    fresh.close()
                    threads.grow()
            else:
                threads.grow()
            lane = self.crew.lane(self, len(self.lanes) + 1)
            self.lanes.append(lane)
        threads.apply_async(_park, (self, lane))  # first: if it raises, nobody counts on the lane
        try:
            lane_ready(lane)
        except BaseException:
            self.reserve[lane] = None
            raise
        lane.gate.open()

    def end(self) -> None:
        """Let every thread go."""
        self.let_go()
        if self.threads is not None:
            self.threads.close()

    def let_go(self) -> None:
        """
        As `end`, which the threads do by themselves then.

        Nothing here takes a lock, as closing a `ThreadPool` does: a finalizer may call it.
        """
        self.ended = True
        _live_pools.pop(self, None)
        for lane in self.lanes.copy():
            lane.gate.open()

    def disown(self) -> None:
        """In a forked child: the threads are the parent's, and so are the pool's pipes."""
        self.ended = self.foreign = True
        if self.threads is not None:
            self.threads._state = "CLOSE"  # or its finalizer would write to them
        if self.crew.disown is not None:
            for lane in self.lanes:
                self.crew.disown(lane)

    def patience(self) -> float:
        """How long its threads go on waiting, in seconds, while nobody leases it."""
        return self.idle_since + IDLE - time.monotonic() if self in self.crew.idle else IDLE

    def retire(self) -> None:
        """End, unless it has just been leased."""
        try:
            del self.crew.idle[self]  # whoever takes it off owns it
        except KeyError:
            return
        self.end()


def _out_of_reach(fn: Callable[[], None]) -> None:
    """
    Call something where no signal handler can interrupt it halfway: not in the main thread.

    What a handler raises meanwhile is held back. Interrupted while it starts a thread, a
    `ThreadPool` loses count of them, and waits for ever when it ends.
    """
    if threading.current_thread() is not threading.main_thread():
        fn()
        return
    outcome: list[BaseException | None] = []
    claims: dict[None, bool] = {}  # whether it is called; `setdefault` decides
    gate = Gate()

    def call() -> None:
        if not claims.setdefault(None, True):
            return
        try:
            fn()
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)
        gate.open()

    interrupt: BaseException | None = None
    try:
        run_in_helper(call)
    except BaseException as error:
        if not claims.setdefault(None, False):
            raise
        interrupt = error  # the helper is at it all the same
    while not outcome:
        try:
            if not gate.sit_out():
                break  # in a forked child, where nobody is at it
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        _marks.held += (interrupt,)
    leaving = outcome.pop() if outcome else None
    try:
        if leaving is not None:
            raise leaving
    finally:
        del leaving, interrupt


# All that have not ended.
_live_pools: dict[_Pool, None] = {}
_crews: weakref.WeakKeyDictionary[Crew, None] = weakref.WeakKeyDictionary()
# Another one with each `shutdown`: a pool leased before that is not kept when it comes back.
_era = object()


def _park(pool: _Pool, lane: Lane) -> None:
    """The one job of a pool's thread. Raises nothing: a `ThreadPool` would hang on it."""
    patience = IDLE
    while not pool.ended:
        run: Run | None = None
        try:
            if lane.of_thread is None:
                _come_to(lane)
            if not lane.gate.wait(patience):
                patience = pool.patience()
                if patience <= 0:
                    pool.retire()
                continue
            patience = IDLE
            run = lane.run
            if run is not None and run.begin(lane):
                pool.crew.serve(run, lane)
        except BaseException as error:
            if run is None:
                if not is_a(error, MemoryError):
                    raise
                run = lane.run  # it may have been called: the gate is shut behind it
            if run is not None:
                run.lane_failed(lane, error)
    if pool.crew.leave is not None:
        pool.crew.leave(lane)
    lane.run = None  # from a group that was abandoned nobody takes it back
    thread = lane.of_thread
    if isinstance(thread, _WorkerThread):
        thread.lane = None
    if pool.foreign:
        # A task has forked, and returned in the child as well. Its thread is all there is of that
        # process, which a `ThreadPool` would have wait for a job for ever; so the thread ends.
        sys.exit()
    assert pool.threads is not None
    pool.threads.close()


def _come_to(lane: Lane) -> None:
    """The calling thread serves a lane from now on."""
    thread = threading.current_thread()
    assert isinstance(thread, _WorkerThread)
    thread.lane = lane
    lane.serve_here()


def serve(run: Run, lane: Lane) -> None:
    """
    Run a group's tasks until there is nothing to do.

    This is `Run.take` and `Run.perform` written out for the plain case, where nothing
    disturbs: it is what a task costs.
    """
    popleft = run.queue.popleft
    token = run.token
    entry: Task[Any] | Stretch | None = None
    while True:
        if entry is None:
            try:
                entry = popleft()
            except IndexError:
                if run.rest(lane):
                    break
                continue
        if type(entry) is Stretch:
            entry = serve_stretch(run, lane, entry)
            continue
        # First: if the lane fails, this is not lost; and who leaves the block without us sets the
        # token first and looks here then.
        lane.at = entry
        entry._taken = True
        if run.disturbed or token._reason is not None:
            _serve_disturbed(run, lane, entry)
            if run.stopping() and run.rest(lane):
                break
        else:
            entry._lane = lane
            fn, context = entry._fn, entry._context
            try:
                value = context.run(call, entry, fn, entry._args)  # type: ignore[union-attr, arg-type] # it has both yet
            except BaseException as error:
                run.failed(entry, lane, error)
            else:
                # `Ledger.ended` written out.
                entry._fn = fn.__name__ if type(fn) is FunctionType else label(fn)
                entry._args = ()
                if entry._kwargs:
                    entry._kwargs = NOTHING
                entry._context = None
                entry._value = value
                entry._state = VALUE
                del value
                if run.tokens:
                    run.close_token(entry)
                if run.claims:
                    run.claims.pop(entry, None)
                if run.watchers:
                    run.notify(entry)
            del fn, context
            lane.at = None
            if run.fences:
                run.passed(lane)
        entry = None
    del run, lane, popleft, token  # what failed refers to this frame: see `strip`


def serve_stretch(run: Run, lane: Lane, stretch: Stretch) -> Task[Any] | Stretch | None:
    """
    Run calls of a `map`, as long as nothing else comes up.

    Returns:
        What comes up: it was taken off the queue and is still to be run, if it is not None.
    """
    popleft = run.queue.popleft
    token = run.token
    fn, unpack, following, items = stretch.fn, stretch.unpack, stretch.following, stretch.items
    first, listener = items.first, items.listener
    arrive, asleep = (None, None) if listener is None else (listener.ended.append, listener.asleep)
    handles, taken, states, values = items.handles, items.taken, items.states, items.values
    copy, contexts = stretch.copy, stretch.contexts
    become, own, place = current.set, None, None
    entry: Task[Any] | Stretch | None = stretch
    while entry is stretch:
        index = following()
        lane.at = place = (index, stretch)  # as in `serve`
        taken[index] = True
        if run.disturbed or token._reason is not None:
            entry = items.task(index)
            break
        states[index] = lane
        if copy is not None:
            own = copy()
        else:
            own = contexts[index].copy()  # type: ignore[union-attr] # it is there yet
            contexts[index] = None
        own.run(become, place)
        try:
            value = own.run(fn, *values[index]) if unpack else own.run(fn, values[index])
        except BaseException as error:
            run.failed(items.task(index), lane, error)
        else:
            values[index] = value
            states[index] = VALUE
            del value
            if index in handles:
                run.item_ended(items, index)
            if arrive is not None:  # `Arrivals.arrive` written out
                arrive(first + index)
                if asleep:
                    listener.wake()  # type: ignore[union-attr] # there is one
        lane.at = None
        if run.fences:
            run.passed(lane)
        try:
            entry = popleft()
        except IndexError:
            entry = None
    # What failed refers to this frame: see `strip`.
    del run, lane, stretch, popleft, token, fn, following, items
    del handles, taken, states, values, listener, arrive, asleep, copy, contexts, own, place
    return entry


def _serve_disturbed(run: Run, lane: Lane, task: Task[Any]) -> None:
    """Run what was just taken off the queue, if it may."""
    if run.admit(task, lane):
        run.perform(task, lane)
    else:
        lane.at = None
        if run.fences:
            run.passed(lane)
    del run, task, lane  # what failed refers to this frame: see `strip`


_threads = Crew(serve)


class Leased:
    """The backend of a group without a pool of its own: leases one when it has a task."""

    remote = False

    def __init__(self, slots: int, crew: Crew | None = None) -> None:
        self.slots = slots
        self._crew = crew or _threads
        self._leases: dict[str, _Pool] = {}  # under one key: `setdefault` decides who leases
        self._era = _era

    def start_lane(self, run: Run, enlist: Callable[[Lane], None]) -> None:
        """Wake a parked thread, or start one."""
        pool = self._leases.get("pool")
        if pool is None:
            pool = self._lease()
            if run.abandoned is not None:  # looked at then: `abandon` says so first
                self.abandon(run)
                return  # nobody comes any more, as for all that is queued
        run.pool = pool
        lane = take_last(pool.reserve)
        if lane is None:
            pool.start(enlist)
        else:
            try:
                enlist(lane)
                lane.gate.open()
            except BaseException:  # a signal handler's, say
                if lane not in run.lanes:
                    pool.reserve[lane] = None
                raise

    def _lease(self) -> _Pool:
        pool = take_last(self._crew.idle)
        if pool is None:
            pool = _Pool(self._crew)
        leased = self._leases.setdefault("pool", pool)
        if leased is not pool:
            self._crew.idle[pool] = None
        return leased

    def cancel(self, run: Run) -> None:
        """The tasks look at the group's token itself."""

    def escalate(self, run: Run, level: int) -> bool:
        """Threads can't be stopped."""
        return False

    def end(self, run: Run) -> None:
        """Give the pool back. Interrupted by what a handler raises, it may be called again."""
        pool = self._leases.get("pool")
        if pool is None:
            return
        for resting in (run.recalled, run.idle):  # what goes in last is used first
            for lane in resting:
                lane.run = None
            pool.reserve.update(resting)
        pool.idle_since = time.monotonic()
        if self._era is not _era:
            pool.end()
            return
        # Without a call in between, after which a handler could run: it is given back once.
        try:
            del self._leases["pool"]
        except KeyError:
            return  # it was abandoned meanwhile
        self._crew.idle[pool] = None

    def abandon(self, run: Run) -> None:
        """The pool ends when its threads come back."""
        pool = self._leases.pop("pool", None)
        if pool is not None:
            pool.let_go()


class Shared:
    """
    The backend of a group on a `ThreadPool` that somebody has already.

    Our jobs there end when the queue is empty, and now and then make way for other users'.
    """

    remote = False

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self.slots: int = pool._processes  # type: ignore[attr-defined]

    def start_lane(self, run: Run, enlist: Callable[[Lane], None]) -> None:
        """Issue a job that serves the group."""
        run.pool = self.pool
        run.sharing = True
        lane = Lane(self.pool)
        enlist(lane)
        run.passed(lane)  # a wait may have begun, and this may get no thread before it ends
        self.pool.apply_async(self._job, (run, lane))
        # A worker that waits for the group can do what this job would, if it never gets there.
        tell_helpers(run)

    def _job(self, run: Run, lane: Lane) -> None:
        try:
            if not run.begin(lane):
                return
            lane.serve_here()
            until = time.monotonic() + SLICE
            while tasks := run.take(lane):
                lane.at = tasks[0]
                run.perform(tasks.pop(), lane)
                if run.queue and time.monotonic() > until and self._make_way(run, lane):
                    return
            run.dismiss(lane)
        except BaseException as error:  # not to the pool, which would hang on it
            run.lane_failed(lane, error)
        finally:
            stand_in(None)
            del run, lane  # what failed refers to this frame: see `strip`

    def _make_way(self, run: Run, lane: Lane) -> bool:
        """Go to the end of the pool's own queue; False if that cannot be."""
        run.called[lane] = None
        try:
            run.passed(lane)
            self.pool.apply_async(self._job, (run, lane))
            tell_helpers(run)  # as in `start_lane`
        except Exception:  # it takes nothing any more, say
            # From the call on the lane is whoever's takes it off: the new job's, perhaps.
            return run.called.pop(lane, lane) is not None
        return True

    def cancel(self, run: Run) -> None:
        """The tasks look at the group's token itself."""

    def escalate(self, run: Run, level: int) -> bool:
        """Threads can't be stopped."""
        return False

    def end(self, run: Run) -> None:
        """The pool is its owner's, and stays as it is."""

    def abandon(self, run: Run) -> None:
        """Our jobs end with the task that they are at."""


def _all_crews() -> list[Crew]:
    # To iterate over the dictionary itself fails where another thread makes a backend meanwhile.
    return [crew for reference in _crews.keyrefs() if (crew := reference()) is not None]


def shutdown() -> None:
    """End every idle pool and wait for its threads; those in use end when they come back."""
    global _era
    _era = object()
    for crew in _all_crews():
        while (pool := take_last(crew.idle)) is not None:
            pool.end()
            if pool.threads is not None:
                pool.threads.join()


def after_fork() -> None:
    """In a forked child: the threads did not come along."""
    for crew in _all_crews():
        crew.idle.clear()
    while (pool := take_last(_live_pools)) is not None:
        pool.disown()
