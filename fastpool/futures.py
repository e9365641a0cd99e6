"""A group as an executor, for the libraries that take one."""

from __future__ import annotations

import concurrent.futures
import functools
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from fastpool._callbacks import Callback
from fastpool._scope import current_token
from fastpool._task import NOTHING, Task, label
from fastpool._taskgroup import TaskGroup
from fastpool.exceptions import Cancelled, GroupClosedError, TaskCancelledError, describe

__all__ = ["GroupExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

WAKING = 50  # milliseconds that a worker may take to come


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
        self._closed = False
        self._pending: dict[Future[Any], None] = {}  # what has not ended
        # In a helper, since it takes the locks of the futures, and calls anybody's callbacks.
        cancel = functools.partial(_cancel_all, self._pending)
        self._hearing = group.token._register(Callback(cancel, slow=True))

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
        future: Future[T] = Future()
        work = _Work(future, fn, args, kwargs, self._fail_fast)
        future.add_done_callback(functools.partial(_done, self._pending, work))
        self._pending[future] = None  # and look then: `shutdown` does the reverse
        try:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            task = self._group.submit(work)
        except BaseException as error:
            self._pending.pop(future, None)
            if not isinstance(error, (Cancelled, GroupClosedError)):
                raise
            message = f"cannot schedule new futures after {self._what_ended(error)}"
            raise RuntimeError(message) from error
        frame = sys._getframe(1)
        task._code, task._lasti = frame.f_code, frame.f_lasti
        work.task = task
        return future

    def _what_ended(self, error: Cancelled | GroupClosedError) -> str:
        group = self._group
        if group.token.cancelled():
            return f"group {group.name!r} was cancelled: {describe(group.token.reason)}"
        return f"shutdown: {error}"

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """
        Take nothing any more. The group goes on.

        Args:
            wait: Whether to wait for the futures that have not ended.
            cancel_futures: Whether to cancel those that have not begun.
        """
        self._closed = True
        if cancel_futures:
            self._let_woken_begin()
            _cancel_all(self._pending)
        if wait:
            concurrent.futures.wait(self._pending.copy())
        if not self._pending:
            self._hearing.unregister()

    def _let_woken_begin(self) -> None:
        """
        Give workers that were woken for a call the time to begin it.

        Those of the standard library's executors have begun by now: they start one by one while
        it is submitted.
        """
        for _ in range(WAKING):
            if not self._group._run.called:
                return
            time.sleep(0.001)


class _Work:
    """One call, which brings its outcome to its future."""

    __slots__ = ("__name__", "_args", "_claims", "_fail_fast", "_fn", "_future", "_kwargs", "task")

    def __init__(
        self,
        future: Future[Any],
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fail_fast: bool,
    ) -> None:
        self.__name__ = label(fn)
        self.task: Task[None] | None = None
        self._future: Future[Any] | None = future
        self._fn: Callable[..., Any] | None = fn
        self._args = args
        self._kwargs = kwargs
        self._fail_fast = fail_fast
        self._claims: dict[None, object] = {}  # whether it runs; `setdefault` decides

    def claim(self, mine: object) -> bool:
        """Whether it is the caller who decides what becomes of it."""
        return self._claims.setdefault(None, mine) is mine

    def __call__(self) -> None:
        future, fn, token = self._future, self._fn, current_token()
        try:
            if (
                fn is not None  # else somebody has claimed and forgotten it
                and future is not None
                and self.claim(self)
                and future.set_running_or_notify_cancel()
            ):
                self._run(future, fn)
            else:
                token.cancel("its future was cancelled")
                token.check()
        finally:
            self.forget()
            del self, future, fn  # what failed refers to this frame

    def _run(self, future: Future[Any], fn: Callable[..., Any]) -> None:
        token = current_token()
        try:
            value = fn(*self._args, **self._kwargs)
        except BaseException as error:
            if isinstance(error, Cancelled) and token.cancelled():
                future.set_exception(TaskCancelledError(token.reason))
                raise
            future.set_exception(error)
            if self._fail_fast:
                raise
        else:
            future.set_result(value)
        finally:
            del self, future, fn

    def forget(self) -> None:
        """Keep nothing of the call: its future refers to this."""
        self._future = self._fn = self.task = None
        self._args, self._kwargs = (), NOTHING


def _done(pending: dict[Future[Any], None], work: _Work, future: Future[Any]) -> None:
    """A future has ended, perhaps because somebody cancelled it."""
    pending.pop(future, None)
    if future.cancelled() and work.claim(pending):
        future.set_running_or_notify_cancel()  # or who waits for it would not be told
        task = work.task
        work.forget()
        if task is not None:
            task.cancel("its future was cancelled")


def _cancel_all(pending: dict[Future[Any], None]) -> None:
    for future in pending.copy():
        future.cancel()
