"""The group: submit, wait, leave."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing.pool import ThreadPool
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn, Self, TypeVar

from fastpool import (
    _clock,
    _descriptor,
    _guard,
    _input,
    _marks,
    _scope,
    _token,
    structlog_observer,
)
from fastpool._callbacks import run_callbacks
from fastpool._cancellable import refuse
from fastpool._errors import annotate, is_a, raise_as_it_is, release, strip
from fastpool._gate import Gate
from fastpool._lane import here
from fastpool._run import DROPPED, EXITING, UNENTERED, Entry, Run
from fastpool._stream import Source, as_completed, in_order
from fastpool._stuck import Vigil, warn
from fastpool._submitter import Submitter, at_least_one
from fastpool._task import PLAIN, Failure, Options, Task
from fastpool._token import CancelToken, Cause
from fastpool._unraisable import unraisable
from fastpool._waiting import circle_error, find_circle, help_along, own_group_error, tell_waiting
from fastpool.backends import Backend, threads
from fastpool.backends.threads import Leased, Shared
from fastpool.events import Observer
from fastpool.exceptions import Cancelled, StuckTaskError
from fastpool.policies import FailFast, FirstFailure, Judge, Policy

__all__ = ["TaskGroup", "map", "shutdown"]

R = TypeVar("R")
T = TypeVar("T")

GRACE = 5.0  # seconds a cancelled task may take before we say so; chosen by feel
ATTENTION = 1e-4  # seconds, about what it takes to wake a thread and have its answer
ROOM = 200  # calls deep that leaving may go where the stack was at its end
TRIES = 100  # to leave a block: more than signals can be in the way of
NOTED = 5  # failures that a note names beside the one that leaves; the rest are counted

_numbers = itertools.count(1)
_locks: dict[str, threading.Lock] = {}  # "stretch" guards the recursion limit while we change it
_open_runs: dict[Run, None] = {}  # those whose block has been entered and not left
_exiting: list[None] = []  # not empty once the interpreter exits
_dropped: deque[Run] = deque()  # those of them whose group was dropped; the next to come ends them

# In its frame a group is entered for somebody else.
_ENTER_CONTEXT = contextlib.ExitStack.enter_context.__code__

# Read once: asking the system takes longer than a small group does.
_CPUS: int = getattr(os, "process_cpu_count", os.cpu_count)() or 1


class TaskGroup(Submitter):
    """
    Blocking calls in threads, run as a group that fails fast.

    The first exception that a task or the body raises, whatever its class, sets the group's
    token: what is queued never starts, what runs stops at its next check or blocked call.
    Leaving the `with` block waits until nothing runs, and raises that first exception itself.

    Args:
        max_workers: How many tasks run at once. `None`: `min(32, cpus + 4)`, or the size of
            the pool that you give.
        name: The group's name in messages, logs and thread names.
        timeout: Seconds from entry after which the group is cancelled and its block raises
            `TimeoutError`. `None` or infinity: never.
        max_queued: How many tasks may wait to be started: with so many, `submit` waits for one
            to begin, and `map` reads on only then. `None`: any number.
        policy: When to give up and what to raise; `None` is `FailFast()`.
        token: One more token to hear, besides the one that is current on entry.
        pool: A `ThreadPool` of yours, which is left open and usable; a backend; or a backend's
            name, `"threads"`. `None`: threads that fastpool keeps warm from group to group.
            A thread of yours that waits for a task of the group, or for room in its queue, may
            run what is queued, on top of the task that waits: hold no lock then that it takes.
            Its own jobs that open groups on it can take up all its threads, and then wait for
            ever, as they do for each other's jobs; and what `terminate` drops of a group that
            is open, nobody is told of: leave the block first.
        observers: Called with an `Event` for each thing that happens. structlog's is one more,
            if the application has configured structlog; see `StructlogObserver`.
        grace: Seconds a task may go on after the cancel before it is reported by a
            `RuntimeWarning`.
        on_stuck: What to do then: `"wait"` goes on waiting, `"abandon"` leaves the block without
            the task. Its handle is cancelled, its thread is a daemon and not used again, and
            the block raises what it would have raised, or a `StuckTaskError` if that is nothing.

    Raises:
        ValueError: If `max_workers` or `max_queued` is less than 1, the timeout or grace is NaN,
            no pool has that name, or `on_stuck` is neither word.
        TypeError: If an argument is of the wrong kind.

    Threads:
        Entered and left by one thread; everything else is safe from any thread.
    """

    # Around it, and its own. Known to a group that was never made, whose `__del__` looks at it.
    _entered: tuple[_scope.Place, _scope.Scope] | None = None

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        name: str | None = None,
        timeout: float | None = None,
        max_queued: int | None = None,
        policy: Policy | None = None,
        token: CancelToken | None = None,
        pool: ThreadPool | Backend | str | None = None,
        observers: Iterable[Observer] = (),
        grace: float = GRACE,
        on_stuck: Literal["wait", "abandon"] = "wait",
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        if token is not None and not isinstance(token, CancelToken):
            raise TypeError(f"token must be a CancelToken, not {token!r}")
        super().__init__(Run(name or f"group-{next(_numbers)}"), PLAIN)
        self._backend = _backend(pool)
        self._limit = (
            self._backend.slots if max_workers is None else at_least_one("max_workers", max_workers)
        )
        if max_queued is not None:
            self._run.bound(at_least_one("max_queued", max_queued))
        self._timeout = _clock.seconds(timeout)
        self._policy = _policy(policy)
        self._outer_token = token
        self._observers = _observers(observers)
        grace_seconds = _clock.seconds(grace, "grace")
        if on_stuck not in ("wait", "abandon"):
            raise ValueError(f"on_stuck must be 'wait' or 'abandon', not {on_stuck!r}")
        self._on_stuck = on_stuck
        self._grace = math.inf if grace_seconds is None else max(0.0, grace_seconds)
        self._unused = [self._run]  # popped by the one that enters
        # From here on written by who enters the block, and who leaves it then.
        self._failures: tuple[Failure, ...] = ()
        self._winner: Task[Any] | None = None
        self._finished = False  # at interpreter exit, its block still open
        self._concluding = False  # everything has come to rest, and who ends it is settled
        self._left_behind: list[str] = []  # tasks that were abandoned, a line each

    # --- Asking ---------------------------------------------------------------------------

    @property
    def token(self) -> CancelToken:
        """The group's token, current in the body. Each task's own is a child of it."""
        return self._run.token

    @property
    def name(self) -> str:
        """The group's name."""
        return self._run.name

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Everything that has failed so far, the first in time first."""
        failures = tuple(self._run.failures)
        # Looked at then: the end says that it is over first, and takes them away then. What comes
        # after that is too late to be one.
        return self._failures if self._run.over else failures

    @property
    def winner(self) -> Task[Any] | None:
        """The task whose success made the policy end the group, if one did."""
        return self._winner or self._run.winner or self._winner  # as above

    def __repr__(self) -> str:
        run = self._run
        if run.closed is not None:
            state = "not entered" if run.closed is UNENTERED else "left"
        else:
            state = "cancelled" if run.token.cancelled() else "open"
        return f"<TaskGroup {run.name!r}, {state}>"

    # --- Steering -------------------------------------------------------------------------

    def with_options(self, *, name: str | None = None, timeout: float | None = None) -> Submitter:
        """
        Submit with a name and a timeout: `group.with_options(timeout=5).submit(fetch, url)`.

        Args:
            name: What the tasks are called, instead of after their function.
            timeout: Seconds from its start after which a task is cancelled and fails with
                `TimeoutError`.

        Returns:
            An object with `submit`, `map` and `starmap`, as the group has them.

        Raises:
            TypeError, ValueError: If the name is no string, or the timeout no number.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        return Submitter(self._run, Options(name, _clock.seconds(timeout)))

    # --- Streaming ------------------------------------------------------------------------

    def imap(
        self, fn: Callable[[T], R], items: Iterable[T], /, *, window: int | None = None
    ) -> Generator[R, None, None]:
        """
        The values of a function for every item, while the items are read: of any number.

        An item is read when a value is asked for, by the thread that asks. Closing the iterator,
        or leaving its loop, reads and starts nothing more, cancels the tasks, and closes an input
        that is a generator; the group goes on.

        Args:
            fn: The function.
            items: The input, which may be endless. What it raises is raised by the iterator, and
                is a failure of the group.
            window: How many items may have been read whose values have not been taken. `None`:
                twice the workers.

        Returns:
            A generator of the values, in the order of the items.

        Raises:
            Cancelled, GroupClosedError: As `submit`, at once; from the iterator too.
            TypeError: If `fn` cannot be called, or is a coroutine or generator function, or
                `items` is not iterable.
            ValueError: If the window is less than 1.
            BaseException: From the iterator: the failure of a task that failed. At a cancelled
                one: waits for all, then raises the first of their failures in time, or if none
                failed what `Task.result` raises. It has ended then.

        Threads:
            One at a time takes values.

        Source:
            `multiprocessing.pool.Pool.imap`; the window, `buffersize` of
            `concurrent.futures.Executor.map`.
        """
        return in_order(self._stream("imap", fn, items, window, sys._getframe(1)))

    def imap_unordered(
        self, fn: Callable[[T], R], items: Iterable[T], /, *, window: int | None = None
    ) -> Generator[R, None, None]:
        """
        As `imap`, but the values come as soon as they are there, in any order.

        Source:
            `multiprocessing.pool.Pool.imap_unordered`.
        """
        return as_completed(self._stream("imap_unordered", fn, items, window, sys._getframe(1)))

    def _stream(
        self,
        caller: str,
        fn: Callable[[T], R],
        items: Iterable[T],
        window: int | None,
        frame: FrameType,
    ) -> Source[T, R]:
        refuse(fn, caller)
        _input.refuse_no_iterable(caller, items)
        window = 2 * self._limit if window is None else at_least_one("window", window)
        self._run.check_open(fn)
        return Source(self._run, fn, items, window, frame)

    # --- Waiting and cancelling -----------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """
        Wait for everything submitted so far to end; the group stays open.

        Args:
            timeout: Longest wait, in seconds. `None` waits without limit, zero only looks.

        Raises:
            TimeoutError: If something still runs when the time is up.
            Cancelled: If the caller's own current token is set before everything has ended; in
                the body that is the group's, so a failure of a task ends the wait.
            RuntimeError: If called by a task that the wait would wait for.
        """
        span = _clock.seconds(timeout)
        if not self._run.wait(span):
            raise TimeoutError(f"group {self.name!r} has not come to rest after {span:g} s")

    def cancel(self, reason: object = None) -> bool:
        """
        Stop the group: nothing queued starts, everything running is told. That is no failure.

        Args:
            reason: Why; `None` stands for the word `"cancelled"`.

        Returns:
            True for the one call that did it; False if the group was cancelled before, or has
            ended.

        Threads:
            Any, a task of the group or a signal handler too.
        """
        return self._run.token.cancel(reason)

    # --- Entering and leaving -----------------------------------------------------------------

    def __enter__(self) -> Self:
        run = self._run
        judge = _judge(self._policy)  # before the group is used up by an entry that fails
        observers = structlog_observer.with_log(self._observers, run.name)
        try:
            self._unused.pop()
        except IndexError:
            raise RuntimeError(
                f"group {run.name!r} has been entered before; a group is used once, make another"
            ) from None
        _guard.hold(run)
        try:
            self._open(judge, observers, sys._getframe(1))
            _marks.raise_held()  # before the body begins
        except BaseException as error:
            stretched = _stretch(ROOM) if type(error) is RecursionError else 0
            try:
                if self._entered is not None:
                    self.__exit__(type(error), error, error.__traceback__)
                    raise
                run.token._seal()  # no thread for the deadline, say
                _open_runs.pop(run, None)
                interrupt = _guard.let_go(run)
                if interrupt is not None:
                    raise interrupt from error
                raise
            finally:
                if stretched:
                    _stretch(-stretched)
        return self

    def _open(self, judge: Judge, observers: tuple[Observer, ...], frame: FrameType) -> None:
        run = self._run
        place = _scope.current_place()
        token = run.token
        token._link(place._token, strongly=True)
        if self._outer_token is not None:
            token._link(self._outer_token, strongly=True)
        token._limit(self._timeout)
        if _dropped:
            _end_dropped()
        if frame.f_code in (_ENTER_CONTEXT, map.__code__) and frame.f_back is not None:
            frame = frame.f_back  # whoever told the stack to, or asked for a whole group
        run.entry = Entry(
            place, frame.f_code, frame.f_lasti, threading.current_thread(), time.monotonic()
        )
        _open_runs[run] = None
        # Entered first and looked at then, as `_finish` does it the other way round.
        if _exiting and threading.current_thread().daemon:
            raise RuntimeError(
                f"cannot enter group {run.name!r} in {threading.current_thread().name!r}: the "
                "interpreter is exiting, and would cut off what a daemon thread is at"
            )
        self._entered = place, _scope.enter(token, run)
        run.open(
            self,
            backend=self._backend,
            limit=self._limit,
            judge=judge,
            observers=observers,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        # What leaves is raised from here, so its traceback holds this frame. Without our names
        # in it that is no cycle, and a failed task's locals die with the caller's names.
        leaving: BaseException | None = None
        failure: Failure | None = None
        refusal: BaseException | None = None
        interrupts: list[BaseException] = []
        left = False
        tries = stretched = 0
        asked = self._finished
        try:
            while True:
                try:
                    if not asked:
                        refusal = self._refusal()
                        asked = True
                    if refusal is None:
                        if not left:
                            leaving = self._leave(error, interrupts)
                            left = True
                        leaving = self._let_go(leaving, error)
                    break
                except BaseException as interrupt:
                    # A signal handler's, from between our lines: it counts as the body's, and the
                    # group is left all the same. Or the stack is at its end.
                    tries += 1
                    if tries > TRIES:
                        raise
                    if left or self._entered is None or tries == TRIES:
                        self._failures += (Failure(None, interrupt),)
                        leaving, left = self._exit() or interrupt, True
                    interrupts.append(interrupt)
                    if type(interrupt) is RecursionError and not stretched:
                        with contextlib.suppress(RecursionError):
                            stretched = _stretch(ROOM)
            if refusal is not None:
                raise refusal
            for failure in self._failures:
                release(failure.exception)
            if leaving is None:
                return True
            release(leaving)
            if leaving is error:
                return None
            raise_as_it_is(leaving)
        finally:
            if stretched:
                _stretch(-stretched)
            del self, error, interrupts, traceback, leaving, failure, refusal

    def _let_go(
        self, leaving: BaseException | None, body: BaseException | None
    ) -> BaseException | None:
        """Give the signal back; an interrupt that met our last lines leaves like one before."""
        interrupt = _guard.let_go(self._run)
        if interrupt is not None and not is_a(leaving, KeyboardInterrupt, SystemExit):
            self._failures += (Failure(None, interrupt),)
            leaving = interrupt
        if (
            is_a(body, GeneratorExit)
            and is_a(leaving, KeyboardInterrupt, SystemExit)
            and _guard.is_guarding()
        ):
            # A generator that is dropped swallows what leaves it, so the group around raises it.
            _marks.held += (leaving,)
            return body
        return leaving

    def _refusal(self) -> BaseException | None:
        """Why the block cannot be left by the calling code, if it cannot."""
        run = self._run
        if self._entered is None or run.over:
            return RuntimeError(f"group {run.name!r} cannot be left: it is not open")
        return own_group_error(run, here())

    def _take_held(self) -> None:
        """Record an interrupt that was held back as the body's failure that it is."""
        try:
            _marks.raise_held()
        except BaseException as interrupt:
            strip(interrupt)
            self._run._report(interrupt)

    def _leave(
        self, error: BaseException | None, interrupts: Iterable[BaseException]
    ) -> BaseException | None:
        """
        Wait for everything, and say what leaves the block.

        Args:
            error: What left the body.
            interrupts: What signal handlers have raised since.
        """
        run = self._run
        if self._finished:
            return error
        assert self._entered is not None
        around, scope = self._entered
        if self._concluding:
            _open_runs.pop(run, None)
            for interrupt in interrupts:  # they met our last lines
                note = run.note_stray if run.over else run._report
                note(interrupt)
            return self._conclude(around, error)
        if _scope.current.get() is not scope:
            self._end_inner(scope)
        _scope.leave(scope)
        self._take_held()  # it came before
        if error is not None:
            run.token._report(error)
        for interrupt in interrupts:
            run.token._report(interrupt)
        self._rest()
        self._take_held()
        # What a handler raises from here on comes back to it. That is in the main thread; in
        # others the interpreter's exit may have finished the group.
        self._concluding = True
        if _open_runs.pop(run, run) is run:
            return error
        return self._conclude(around, error)

    def _end_inner(self, scope: _scope.Scope) -> None:
        """Cancel the groups that were entered in this one's body, and are still open."""
        inner: dict[Run, None] = {}
        place: _scope.Place | None = _scope.current_place()
        while isinstance(place, _scope.Scope) and place is not scope:
            if isinstance(place._group, Run) and place._group in _open_runs:
                inner[place._group] = None
            place = place.before
        if place is not scope:
            return  # left in another context than it was entered in, which says nothing
        inner.pop(self._run, None)
        for run in inner:
            run.token.cancel(f"group {self.name!r} around it was left first")
            backend = run.backend
            if backend is not None:
                backend.abandon(run)  # its threads end with what they are at
            _warn_about(run, f"is still open as group {self.name!r} around it is left; cancelled")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"group {self.name!r} cannot be pickled: a task in another process cannot submit to "
            "the group that it runs in; let it return what is to be submitted"
        )

    def __del__(self) -> None:
        """
        Dropped without leaving its block: stop its tasks, let its threads go, and say so.

        This runs in the middle of anything, so it takes no lock and starts no thread. What is
        left to do (a helper thread's callbacks, the judge, the observers) waits for the next
        group to be entered, `shutdown()` or the interpreter's exit.
        """
        if self._entered is None or self._run not in _open_runs:
            return
        run = self._run
        around, scope = self._entered
        run.closed = DROPPED
        cause = Cause("it was dropped without leaving its block", source=run.token._key)
        if run.token._claim(cause):
            pending = run.token._spread(cause)
            slow = [pair for pair in pending if pair[0].slow]
            run_callbacks([pair for pair in pending if not pair[0].slow])
            if slow:  # others may wait for what they do
                _clock.run_from_handler(functools.partial(run_callbacks, slow))
        run.token._unlink()
        # The code that goes on was in the body, and is so no more; in contexts that are not
        # current here, the scope stays and stands for what is around it.
        scope._token, scope._group = around._token, around._group
        _scope.leave(scope)
        interrupt = _guard.let_go(run)
        if interrupt is not None:
            _marks.held += (interrupt,)  # for the next wait, or the next group to end
        backend = run.backend
        if backend is not None:
            backend.abandon(run)
        _dropped.append(run)
        _warn_about(run, "was dropped without leaving its with block; cancelled")

    def _conclude(self, around: _scope.Place, error: BaseException | None) -> BaseException | None:
        """Nothing runs any more: take the group apart, and say what leaves the block."""
        run = self._run
        run.tell_cancelled()
        opened = run.entered_at()
        self._winner, broken = run.winner, run.judge_error
        # The rest of the queue, which the run must not keep. Not emptied: to free a million tasks
        # takes longer than the way to the `except`.
        self._left_over = run.queue
        self._failures = tuple(run.failures)  # others may look at any moment
        self._failures = run.end()
        self._entered = None  # the place around is a task, perhaps, which leads to its own failure
        leaving = self._verdict(broken)
        if leaving is None:
            leaving = self._ended_by(around._token, error)
        if leaving is None and self._left_behind:
            leaving = StuckTaskError(f"group {run.name!r} was left while tasks still ran")
        if leaving is not None:
            self._annotate(leaving, outermost=around._group is None)
            if self._left_behind and is_a(leaving, SystemExit):
                warn("\n".join(self._left_behind))  # no traceback shows its notes
        run.emit("group_closed", since=opened, error=leaving)
        return leaving

    def _rest(self) -> None:
        """Wait until nothing of the group runs or will run, whatever interrupts us."""
        run = self._run
        lane = here()
        vigil = Vigil(run, self._grace)
        gate = Gate()
        run.leavers[gate] = None
        key = run.token._add_sleeper(gate)
        interrupts = 0
        attends = True
        try:
            if lane is not None:
                # Said first and looked at then, as by every worker that waits.
                lane.leaves = run
                tell_waiting(lane)
                run.helpers[gate] = lane
                circle = find_circle(lane, run.in_hand())
                if circle is not None:
                    run._report(circle_error(*circle))
            while True:
                try:
                    _clock.run_late()
                    if run.foreign or (run.come_to_rest(lane) and run.close()):
                        return
                    if _guard.at_once(run) or interrupts > 1:
                        self._abandon("its block was left by a second Ctrl-C")
                        return
                    if vigil.reported and self._on_stuck == "abandon":
                        self._abandon(f"it had not stopped {self._grace:g} s after the cancel")
                        return
                    if lane is not None and help_along(lane, *run.in_hand()):
                        continue
                    if attends:
                        attends = False
                        run.attended = True
                        gate.wait(ATTENTION)
                        run.attended = False
                    else:
                        gate.wait(vigil.patience())
                        vigil.look()
                except BaseException as error:
                    # What a signal handler raises here counts as the body's. Ctrl-C a second
                    # time means: now; others than our own handler are counted here.
                    run.attended = False
                    strip(error)
                    run._report(error)
                    interrupts += is_a(error, KeyboardInterrupt)
        finally:
            run.token._remove(key)
            run.leavers.pop(gate, None)
            run.helpers.pop(gate, None)
            if lane is not None:
                lane.leaves = None

    def _abandon(self, why: str) -> None:
        """Leave what still runs behind, by name."""
        self._left_behind = self._run.abandon(why)

    def _verdict(self, broken: BaseException | None) -> BaseException | None:
        """What leaves because something failed; `broken` is what the judge raised before."""
        judge = self._run.judge
        try:
            verdict = _end(judge, self._failures)  # always, whatever leaves then
            if verdict is not None and not is_a(verdict, BaseException):
                raise TypeError(
                    f"{type(judge).__name__}.end() must return an exception or None,"
                    f" not {verdict!r}"
                )
        except BaseException as error:
            strip(error)
            verdict = error
            if is_a(error, KeyboardInterrupt):  # no fault of the judge's
                self._failures += (Failure(None, error),)
        return self._exit() or (verdict if broken is None else broken)

    def _exit(self) -> BaseException | None:
        """The first failure that is an interrupt or an exit, which leaves before all others."""
        for failure in self._failures:
            if is_a(failure.exception, KeyboardInterrupt, SystemExit):
                return failure.exception
        return None

    def _ended_by(self, outer: CancelToken, error: BaseException | None) -> BaseException | None:
        """What leaves because the token was set, where no failure does: what turned it first."""
        run = self._run
        cause = run.token._cause
        if cause is None:
            return None
        if run.token._set_itself():
            late = TimeoutError(f"group {run.name!r} timed out after {self._timeout:g} s")
            late.__cause__ = error
            return late
        if run.token._began(cause):
            return None
        # An ancestor did. The Cancelled that left the body says so already, and says where.
        if is_a(error, Cancelled):
            return error
        for token in (outer, self._outer_token):
            if token is not None and token.cancelled():
                return token._error()
        return None

    def _annotate(self, leaving: BaseException, *, outermost: bool) -> None:
        lines: list[str] = []
        others: list[Failure] = []
        # The policy may have put them together: each bears its own note then.
        inside = leaving.exceptions if is_a(leaving, BaseExceptionGroup) else ()
        collected = {id(error) for error in inside}
        for failure in self._failures:
            task, error = failure.task, failure.exception
            if error is not leaving and id(error) not in collected:
                # A second Ctrl-C tells nothing new.
                if not is_a(error, KeyboardInterrupt) or task is not None:
                    others.append(failure)
            elif task is not None:
                line = f"in {_place(task)} to group {self.name!r}"
                if error is leaving:
                    lines.append(line)
                else:
                    annotate(error, [line], outermost=outermost)
        if others:
            named = [
                f"{type(failure.exception).__qualname__} in {_place(failure.task)}"
                for failure in others[:NOTED]
            ]
            more = f"; and {len(others) - NOTED} more" if len(others) > NOTED else ""
            lines.append(f"also in group {self.name!r}: {'; '.join(named)}{more}")
        annotate(leaving, lines + self._left_behind, outermost=outermost)


def _place(task: Task[Any] | None) -> str:
    """Where something failed, for a note."""
    if task is None:
        return "the body, an input or a call from outside"
    return f"task {task.name!r}, submitted at {task.site}"


def _backend(pool: ThreadPool | Backend | str | None) -> Backend:
    if pool is None or pool == "threads":
        return Leased(min(32, _CPUS + 4))
    if pool == "processes":
        from fastpool.backends import processes

        return processes.default()
    if isinstance(pool, str):
        raise ValueError(f"no pool named {pool!r}; choose one of: processes, threads")
    if isinstance(pool, ThreadPool):
        return Shared(pool)
    if isinstance(pool, Backend):
        return pool
    raise TypeError(f"pool must be a ThreadPool, a backend or a backend's name, not {pool!r}")


def _policy(policy: Policy | None) -> Policy:
    if policy is None:
        return FailFast()
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a value with a start() that gives a judge, as FailFast();"
            f" not {policy!r}"
        )
    return policy


@_marks.calls_out
def _start(policy: Policy) -> Judge:
    return policy.start()


@_marks.calls_out
def _end(judge: Judge, failures: tuple[Failure, ...]) -> BaseException | None:
    return judge.end(failures)


def _judge(policy: Policy) -> Judge:
    judge = _start(policy)
    if type(judge) is not FirstFailure and (
        isinstance(judge, type) or not isinstance(judge, Judge)
    ):
        raise TypeError(
            f"{policy!r}.start() must give a judge, with outcome() and end(), not {judge!r}"
        )
    return judge


@_marks.calls_out
def _observers(observers: Iterable[Observer]) -> tuple[Observer, ...]:
    if not isinstance(observers, Iterable):
        raise TypeError(f"observers must be a collection; write observers=[{observers!r}]")
    found = tuple(observers)
    for observer in found:
        if not callable(observer):
            raise TypeError(f"an observer must be callable, to be given an Event; not {observer!r}")
    return found


def map(
    fn: Callable[..., R],
    /,
    *iterables: Iterable[Any],
    max_workers: int | None = None,
    name: str | None = None,
    timeout: float | None = None,
    max_queued: int | None = None,
    policy: Policy | None = None,
    token: CancelToken | None = None,
    pool: ThreadPool | Backend | str | None = None,
    observers: Iterable[Observer] = (),
    grace: float = GRACE,
    on_stuck: Literal["wait", "abandon"] = "wait",
) -> list[R]:
    """
    The values of a function for every item: a whole group in one line.

    Args:
        fn: The function.
        *iterables: One for each argument, read to the end of the shortest.
        max_workers, name, timeout, max_queued, policy, token, pool, observers, grace, on_stuck:
            As for `TaskGroup`.

    Returns:
        The values, in the order of the items.

    Raises:
        BaseException: As leaving a group's block does: the first failure.
    """
    frame = sys._getframe(1)
    group = TaskGroup(
        max_workers,
        name=name,
        timeout=timeout,
        max_queued=max_queued,
        policy=policy,
        token=token,
        pool=pool,
        observers=observers,
        grace=grace,
        on_stuck=on_stuck,
    )
    batch = None
    try:
        with group:
            batch = group._map(fn, iterables, frame)
        return batch.results()
    finally:
        del group, batch  # what leaves holds this frame in its traceback


def _stretch(room: int) -> int:
    """Let the stack grow by so many calls, or no more; returns what it was given."""
    try:
        _limit_by(room)
    except RecursionError:
        if room > 0:
            raise
        # Where the stack is at that very limit it cannot be lowered; in another thread it can.
        done = Gate()
        _clock.run_in_helper(lambda: _limit_by(room, done))
        done.sit_out()
    return room


def _limit_by(room: int, done: Gate | None = None) -> None:
    try:
        with _locks.setdefault("stretch", threading.Lock()):
            sys.setrecursionlimit(sys.getrecursionlimit() + room)
    finally:
        if done is not None:
            done.open()


def shutdown() -> None:
    """
    End the threads that fastpool keeps warm, and wait for them.

    Those of a group that is open end when it is left. The next group starts new ones.

    Threads:
        Any, but a thread does not wait for itself.
    """
    _end_dropped()
    threads.shutdown()
    _clock.shutdown()


def _warn_about(run: Run, what: str) -> None:
    """Say what is wrong with a group, at the line where it was entered."""
    entry = run.entry
    if entry is None:
        return  # it has been left meanwhile
    file, _, line = entry.site.rpartition(":")
    message = f"group {run.name!r}, entered at {entry.site}, {what}"
    try:
        warnings.warn_explicit(message, ResourceWarning, file, int(line))
    except Exception as error:  # made an error by a filter, or not to be shown: the group ends
        unraisable(error, _warn_about)


def _end_dropped() -> None:
    """End the groups that were dropped, as far as their tasks have ended."""
    for run in _dropped.copy():
        if run.come_to_rest(None):
            try:
                _dropped.remove(run)
            except ValueError:
                continue  # somebody else is at it
            _end_open(run, "dropped without leaving its block")


def _end_open(run: Run, why: str) -> None:
    """Do for a group what the end of its block would have done."""
    group = run.group()
    if group is None:
        group = TaskGroup(name=run.name)  # it was dropped; only its face is new
        group._run = run
    group._rest()
    if _open_runs.pop(run, run) is run:
        return  # it has been left meanwhile
    group._finished = True
    leaving = group._conclude(_scope.current_place(), None)
    if leaving is not None:  # the hook does not show the notes
        notes = getattr(leaving, "__notes__", ())
        unraisable(leaving, "; ".join([f"group {run.name!r}, {why}", *notes]))


def _finish() -> None:
    """At interpreter exit: finish every group that is open, as if its block ended now."""
    _exiting.append(None)
    for run in list(_open_runs):
        if _is_left_behind(run):
            continue  # its task may never end, and nobody waits for it any more
        run.closed = EXITING  # its tasks may go on submitting, as while a block is left
        _end_open(run, "still open at exit")
        interrupt = _guard.let_go(run)
        if interrupt is not None:
            unraisable(interrupt, "the interpreter's exit")
    shutdown()


def _is_left_behind(run: Run) -> bool:
    """Whether a group is open in a task that was abandoned."""
    around: object = run
    while isinstance(around, Run):
        if around.abandoned is not None:
            return True
        entry = around.entry
        around = None if entry is None else entry.place._group
    return False


def _after_fork() -> None:
    """In a forked child: no thread came along, and the parent's groups are not ours."""
    with contextlib.ExitStack() as steps:  # all are made, the last one first, whatever one raises
        for module in (_guard, _clock, threads, _token):
            steps.callback(module.after_fork)
        steps.callback(_descriptor.after_fork)  # before anything is cancelled here
        for run in list(_open_runs):
            steps.callback(run.disown)
        _open_runs.clear()
        _dropped.clear()
        _locks.clear()  # another thread may have held it


# Registered after `multiprocessing`'s own, which is imported above, and so called before it.
atexit.register(_finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
