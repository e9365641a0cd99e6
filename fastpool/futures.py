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
from fastpool._submitter import Submitter
from fastpool._task import Options, Task, label
from fastpool._taskgroup import TaskGroup
from fastpool.exceptions import Cancelled, GroupClosedError, TaskCancelledError, describe

__all__ = ["GroupExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

WHY = "its future was cancelled"
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
        future: _Call[T] = _Call(self._pending, fn, args, kwargs, self._fail_fast)
        self._pending[future] = None  # and look then: `shutdown` does the reverse
        try:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            task = Submitter(self._group._run, Options(label(fn))).submit(_begin, future)
        except BaseException as error:
            self._pending.pop(future, None)
            if not isinstance(error, (Cancelled, GroupClosedError)):
                raise
            message = f"cannot schedule new futures after {self._what_ended(error)}"
            raise RuntimeError(message) from error
        frame = sys._getframe(1)
        task._code, task._lasti = frame.f_code, frame.f_lasti
        future.task = task
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


class _Call(Future[T]):
    """A future that knows its call."""

    def __init__(
        self,
        pending: dict[Future[Any], None],
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fail_fast: bool,
    ) -> None:
        super().__init__()
        self.task: Task[None] | None = None
        self._pending = pending
        self._call: tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]] | None
        self._call = fn, args, kwargs
        self._fail_fast = fail_fast
        self._claims: dict[None, object] = {}  # whether it begins; `setdefault` decides

    def cancel(self) -> bool:
        """As any future; its task goes with it."""
        cancelled = super().cancel()
        mine = object()
        if cancelled and self._claims.setdefault(None, mine) is mine:
            self.set_running_or_notify_cancel()  # or who waits for it would not be told
            task = self.task
            self._let_go()
            if task is not None:
                task.cancel(WHY)
        return cancelled

    def begin(self) -> None:
        """Make the call, and take note of what it comes to."""
        call = self._call
        try:
            # Who cancels it claims it first, and takes the call away then.
            if (
                self._claims.setdefault(None, self) is not self
                or call is None
                or not self.set_running_or_notify_cancel()
            ):
                token = current_token()
                token.cancel(WHY)
                token.check()
                return
            fn, args, kwargs = call
            try:
                value = fn(*args, **kwargs)
            except BaseException as error:
                if isinstance(error, Cancelled) and current_token().cancelled():
                    self.set_exception(TaskCancelledError(current_token().reason))
                    raise
                self.set_exception(error)
                if self._fail_fast:
                    raise
            else:
                self.set_result(value)
        finally:
            self._let_go()
            # What failed refers to this frame.
            self = call = fn = args = kwargs = value = None  # type: ignore[assignment]

    def _let_go(self) -> None:
        """Keep nothing of the call."""
        self._call = self.task = None
        self._pending.pop(self, None)


def _begin(future: _Call[Any]) -> None:
    try:
        future.begin()
    finally:
        del future  # what failed refers to this frame


def _cancel_all(pending: dict[Future[Any], None]) -> None:
    for future in pending.copy():
        future.cancel()
