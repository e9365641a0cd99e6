"""A group as an executor, for the libraries that take one."""

from __future__ import annotations

import concurrent.futures
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, InvalidStateError
from typing import Any, ParamSpec, TypeVar

from fastpool import _marks, _taskgroup
from fastpool._callbacks import Callback, Registration
from fastpool._errors import is_a
from fastpool._scope import current_place, current_token, use_token
from fastpool._submitter import Submitter
from fastpool._task import CANCELLED, ERROR, Options, Task, label
from fastpool._taskgroup import TaskGroup
from fastpool._token import CancelToken
from fastpool._unraisable import unraisable
from fastpool._waiting import wait_for_all
from fastpool.backends._wire import Far, dump_error, load_error
from fastpool.exceptions import Cancelled, GroupClosedError, describe

__all__ = ["GroupExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

WHY = "its future was cancelled"
WAKING = 100  # milliseconds that a worker may take to come


class GroupExecutor(Executor):
    """
    An executor whose calls are tasks of a group, and whose futures are real ones.

    A failure stays with its future, as a library expects that takes an executor. When the group
    is cancelled, futures that have not begun are cancelled, and calls that run hear their token.

    Args:
        group: The group. Its block is entered and left by whoever has it, and not by this.
        fail_fast: Whether a call that fails fails the group as well.

    Raises:
        TypeError: If `group` is no `TaskGroup`.

    Threads:
        Safe from any thread.

    Source:
        `concurrent.futures.Executor`.
    """

    def __init__(self, group: TaskGroup, fail_fast: bool = False) -> None:
        if not isinstance(group, TaskGroup):
            raise TypeError(f"GroupExecutor() wants a TaskGroup, not {group!r}")
        self._group = group
        self._fail_fast = fail_fast
        self._calls = calls = _Calls()
        # In a helper, since it takes the locks of the futures, and calls anybody's callbacks.
        calls.hearing = group.token._register(Callback(calls.cancel, slow=True))

    @property
    def _max_workers(self) -> int:
        """What libraries ask that want to know how many calls run at once."""
        return self._group._limit

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """
        Have a function called in the group.

        Args:
            fn: The function. A `@cancellable` one gets its token.
            *args: Its arguments.
            **kwargs: Its keyword arguments.

        Returns:
            Its future. If the call is cancelled while it runs, that raises `TaskCancelledError`,
            a `concurrent.futures.CancelledError`.

        Raises:
            RuntimeError: After `shutdown()`, if the group was cancelled, or if its block has not
                been entered or has ended. Never `Cancelled`.
        """
        calls = self._calls
        run = self._group._run
        backend = run.backend
        away = backend is not None and backend.remote
        future: _Call[T] = _Call(calls, fn, args, kwargs, self._fail_fast, away)
        calls.open[future] = None  # and look then: `shutdown` does the reverse
        try:
            if calls.closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            submitter = Submitter(run, Options(label(fn)))
            task: Task[Any]
            if not future.away:
                task = submitter.submit(_begin, [future])
            elif self._fail_fast:
                task = submitter.submit(fn, *args, **kwargs)
            else:
                task = submitter.submit(_outcome, fn, args, kwargs)
        except BaseException as error:
            future.cancel()  # `shutdown` may wait for it already
            if not isinstance(error, (Cancelled, GroupClosedError)):
                raise
            message = f"cannot schedule new futures after {self._what_ended(error)}"
            raise RuntimeError(message) from error
        frame = sys._getframe(1)
        while frame.f_globals is Executor.submit.__globals__ and frame.f_back is not None:
            frame = frame.f_back  # whoever called `Executor.map`
        task._code, task._lasti = frame.f_code, frame.f_lasti
        future.task = task  # and look then: `cancel` does the reverse
        if future.done():
            future.task = None
            if future.cancelled():
                task.cancel(WHY)
        if away:
            future.watch()
        return future

    def _what_ended(self, error: Cancelled | GroupClosedError) -> str:
        group = self._group
        if group.token.cancelled():
            return f"group {group.name!r} was cancelled: {describe(group.token.reason)}"
        if isinstance(error, Cancelled):
            return f"the caller was cancelled: {error}"
        exiting = "interpreter " if _taskgroup._exiting else ""
        return f"{exiting}shutdown: group {group.name!r}: {group._run.closed}"

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """
        Take nothing any more. The group goes on.

        Args:
            wait: Whether to wait for the futures that have not ended.
            cancel_futures: Whether to cancel those that have not begun.
        """
        calls = self._calls
        calls.close()
        if cancel_futures:
            self._let_woken_begin()
            calls.cancel()
        if wait:
            # It ends as they do, and not before, whoever is cancelled. A worker that waits here
            # runs what has not begun; or is told that it would wait for itself.
            with use_token(CancelToken.NEVER):
                wait_for_all(calls.tasks()[::-1], None)
            if not self._group._run.foreign:  # in a forked child nobody tells the futures
                _wait(list(calls.open))

    def __del__(self) -> None:
        """Nobody submits any more. This takes no lock, as it may run in the middle of anything."""
        calls: _Calls | None = getattr(self, "_calls", None)  # None if `__init__` has refused
        if calls is not None:
            calls.close()

    def _let_woken_begin(self) -> None:
        """
        Give workers that were woken for a call the time to begin it.

        Those of the standard library's executors have begun by now: they start one by one while
        it is submitted.
        """
        for _ in range(WAKING):
            if self._has_begun():
                return
            time.sleep(0.001)

    def _has_begun(self) -> bool:
        """Whether a call has begun, or no worker is on its way to one."""
        run, calls = self._group._run, list(self._calls.open)
        if run.stopping() or any(call.running() for call in calls):
            return True
        at_work = run.in_hand()
        resting = len(run.idle) + len(run.recalled)
        if resting + len(at_work) < len(run.lanes):
            return False
        return not any(call.task in at_work for call in calls)


class _Calls:
    """The calls of one executor, of which it knows those that have not ended."""

    def __init__(self) -> None:
        self.open: dict[_Call[Any], None] = {}
        self.closed = False  # only ever set, first; who has added a call looks at it then
        self.hearing: Registration | None = None  # of the group's token

    def close(self) -> None:
        """There will be no more."""
        self.closed = True
        self._look()

    def ended(self, call: _Call[Any]) -> None:
        """One of them has ended."""
        self.open.pop(call, None)
        self._look()

    def _look(self) -> None:
        if self.closed and not self.open and self.hearing is not None:
            self.hearing.unregister()

    def tasks(self) -> list[Task[Any]]:
        """Their tasks, of those that have one."""
        return [task for call in list(self.open) if (task := call.task) is not None]

    def cancel(self) -> None:
        """Cancel what has not begun, and have an eye on the rest."""
        for call in list(self.open):
            if not _cancel(call):
                call.watch()


class _Call(Future[T]):
    """A future that knows its call."""

    def __init__(
        self,
        calls: _Calls,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fail_fast: bool,
        away: bool,
    ) -> None:
        super().__init__()
        self.away = away  # whether the call is made in another process
        self.task: Task[Any] | None = None
        self._calls = calls
        self._call: tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]] | None
        self._call = fn, args, kwargs
        self._fail_fast = fail_fast
        self._claims: dict[None, object] = {}  # whether it begins; `setdefault` decides

    def cancel(self) -> bool:
        """As any future; its task goes with it."""
        task = self.task
        if self.away and task is not None and task.running():
            return False
        try:
            return super().cancel()
        finally:  # whatever a callback has raised
            mine = object()
            if self.cancelled() and self._claims.setdefault(None, mine) is mine:
                self.set_running_or_notify_cancel()  # or who waits for it would not be told
                task = self.task
                self._let_go()
                if task is not None:
                    task.cancel(WHY)

    def begin(self) -> None:
        """Make the call, and take note of what it comes to."""
        call = self._call
        mine = object()
        try:
            # Who cancels it claims it first, and takes the call away then.
            if (
                self._claims.setdefault(None, mine) is not mine
                or call is None
                or not self.set_running_or_notify_cancel()
            ):
                token = current_token()
                token.cancel(WHY)
                self._let_go()
                token.check()
                return
            task: Task[Any] = current_place()  # type: ignore[assignment] # a task's function is called in it
            self.task = task
            if task._run.token.cancelled():  # looked at after: `_Calls.cancel` does the reverse
                self.watch()
            fn, args, kwargs = call
            try:
                value = fn(*args, **kwargs)
            except BaseException as error:
                if self._fail_fast or (is_a(error, Cancelled) and current_token().cancelled()):
                    self.watch()  # the group is to know of it before those who wait for this
                    raise
                _tell(self.set_exception, error)
            else:
                _tell(self.set_result, value)
            self._let_go()
        finally:
            self._call = None
            # What failed refers to this frame.
            self = call = task = fn = args = kwargs = value = None  # type: ignore[assignment]

    def watch(self) -> None:
        """Take note of what the task comes to; it may be abandoned while the call runs."""
        task = self.task
        if task is not None:
            task._run.watch(task, self)
            if task.done():  # looked at after
                task._run.unwatch(task, self)
                self.notify(task)

    def notify(self, task: Task[Any]) -> None:
        """The task has ended."""
        mine = object()
        if self.away and (
            self._claims.setdefault(None, mine) is not mine
            or not self.set_running_or_notify_cancel()
        ):
            return  # somebody has cancelled it
        if self.done():
            return
        value = task._value
        if task._state == ERROR:
            _tell(self.set_exception, value[0])
        elif task._state == CANCELLED:
            _tell(self.set_exception, task._cancelled())
        elif isinstance(value, Far):
            _tell(self.set_exception, load_error(value, task.name, "its worker"))
        else:
            _tell(self.set_result, value)
        self._let_go()

    def _let_go(self) -> None:
        """Keep nothing of the call."""
        self._call = self.task = None
        self._calls.ended(self)


def _begin(box: list[_Call[Any]]) -> None:
    future = box.pop()  # the arguments stay in a frame that what failed refers to
    try:
        future.begin()
    finally:
        del future  # what failed refers to this frame


def _outcome(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a worker process: what a call comes to whose error is its future's alone."""
    try:
        return fn(*args, **kwargs)
    except BaseException as error:
        if is_a(error, Cancelled) and current_token().cancelled():
            raise
        return dump_error(error)


@_marks.swallows
def _tell(tell: Callable[[Any], None], outcome: object) -> None:
    """Tell a future what has become of it."""
    try:
        tell(outcome)
    except InvalidStateError:
        pass  # it knows already; this comes after the call was abandoned, or the other way round
    except BaseException as error:  # a callback's; the standard library stops at an `Exception`
        unraisable(error, tell)
    finally:
        del tell, outcome


@_marks.swallows
def _cancel(future: Future[Any]) -> bool:
    """Cancel a future, whatever its callbacks raise; whether it is cancelled."""
    try:
        return future.cancel()
    except BaseException as error:
        unraisable(error, future.cancel)
        return True


@_marks.calls_out
def _wait(futures: Iterable[Future[Any]]) -> None:
    concurrent.futures.wait(futures)
