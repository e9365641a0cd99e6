"""The handle of one submitted call."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

from fastpool import _clock, _scope
from fastpool._lane import Lane
from fastpool._scope import current
from fastpool._token import CancelToken
from fastpool._waiting import wait_for
from fastpool.exceptions import TaskCancelledError, describe

if TYPE_CHECKING:
    from fastpool._run import Run

__all__ = [
    "CANCELLED",
    "ERROR",
    "NOTHING",
    "PENDING",
    "PLAIN",
    "VALUE",
    "Call",
    "CallWith",
    "Failure",
    "Options",
    "Task",
    "call",
    "label",
    "site",
]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# What a task has come to. Zero means: nothing final yet.
PENDING, VALUE, ERROR, CANCELLED = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """
    Something that went wrong in a group.

    Attributes:
        task: The task that raised it; `None` where no task did: the group's body, an input of
            `map`, Ctrl-C, or a call that was given the group's token.
        exception: What was raised, the object itself.
    """

    task: Task[Any] | None  # Any: a group's tasks are of all kinds
    exception: BaseException


class Options(NamedTuple):
    """What `with_options` sets for the tasks submitted through it."""

    name: str | None = None
    timeout: float | None = None


PLAIN = Options()
NOTHING: dict[str, Any] = {}  # the keyword arguments of a call that has none


def label(fn: object) -> str:
    """What a callable is called, in messages and logs. Raises nothing."""
    inner: Any = fn  # Any: it may be anything that can be called
    # Not `isinstance`, which would ask a proxy what it stands for.
    while issubclass(type(inner), functools.partial):
        inner = inner.func
    try:
        name: object = inner.__name__
    except BaseException:  # its own code, perhaps; no name is worth a task
        name = None
    return name if type(name) is str else type(inner).__name__


def site(code: CodeType, lasti: int) -> str:
    """Where an instruction is, by file and line."""
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= lasti < end and number is not None:
            line = number
    return f"{code.co_filename}:{line}"


class Task(Generic[R_co]):
    """
    The handle of one submitted call.

    It stands wherever an `AsyncResult` stood: `get`, `ready`, `successful` and `wait` are there.

    Threads:
        Safe from any thread.
    """

    # How it is decided what becomes of a queued task, at no cost for those that just run:
    # a worker sets `_taken` first and looks then whether its run is `disturbed` (a claim has
    # been laid on some task) or cancelled. Who wants to keep a task from running, or run it
    # itself, disturbs the run and lays a claim first (`Run.claim`), and looks at `_taken` then.
    # Where both see each other, the claim decides, by an atomic `setdefault`.
    # `_state` is written once, after `_value`, by the one that decided.
    if not TYPE_CHECKING:  # to checkers the attributes below are kept here
        __slots__ = ("__weakref__",)

    _run: Run
    _fn: Callable[..., R_co] | str  # only its name once the task is done
    _args: tuple[object, ...]
    _kwargs: dict[str, Any]
    _context: Context | None
    _code: CodeType
    _lasti: int
    _options: Options
    _index: int | None  # among the items of a `map`
    _taken: bool
    _lane: Lane | None
    _state: int
    _value: Any
    _own: CancelToken | None

    # --- What it is -----------------------------------------------------------------------

    @property
    def name(self) -> str:
        """
        What the call is called in messages.

        The function's name, unless `with_options` says otherwise; for a `map` with the position
        of its item, as in `resize[3]`.
        """
        name = self._options.name
        if name is None:
            fn = self._fn
            name = fn if isinstance(fn, str) else label(fn)
        number = self._number
        return name if number is None else f"{name}[{number}]"

    @property
    def _number(self) -> int | None:
        """Its place among the items of a `map` or an `imap`."""
        return self._index

    @property
    def site(self) -> str:
        """Where it was submitted, by file and line."""
        return site(self._code, self._lasti)

    def __repr__(self) -> str:
        if self.done():
            state = ("", "succeeded", "failed", "cancelled")[self._state]
        else:
            state = "running" if self.running() else "queued"
        return f"<Task {self.name!r} of group {self._run.name!r}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"task {self.name!r} cannot be pickled: its handle belongs to the process that made "
            "it; send its result()"
        )

    # --- Where its context is (see `_scope.Place`) ------------------------------------------

    @property
    def _token(self) -> CancelToken:
        """The task's own token, a child of its group's; made when somebody first asks."""
        token = self._own
        return self._run.token_for(self) if token is None else token

    def _keep_token(self, token: CancelToken) -> None:
        """The task has ended, and its token was set: its context will go on saying so."""

    @property
    def _group(self) -> object:
        """The run it belongs to."""
        return self._run

    @property
    def _thread(self) -> object:
        """The thread that runs it, as `_scope.this_thread()` names it."""
        lane = self._lane
        return None if lane is None or self._state else lane.thread

    # --- How it stands ----------------------------------------------------------------------

    def done(self) -> bool:
        """Whether it has ended, or will never start."""
        if self._state:
            return True
        run = self._run
        return (run.disturbed or run.token.cancelled()) and run.settle(self)

    def running(self) -> bool:
        """Whether it has started and not ended."""
        return self._lane is not None and not self.done()

    def cancelled(self) -> bool:
        """Whether it never started, or ended in `Cancelled` while its own token was set."""
        return self.done() and self._state == CANCELLED

    def cancel(self, reason: object = None) -> bool:
        """
        Stop this task alone; that is no failure of its group.

        A queued one is done at once and never runs; a running one is told by its own token.

        Args:
            reason: Why; `None` stands for the word `"cancelled"`.

        Returns:
            True for the one call that did it; False if the task has ended, or was cancelled.
        """
        return self._run.cancel_task(self, "cancelled" if reason is None else reason)

    # --- Waiting ----------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> R_co:
        """
        Wait for the task and return its value.

        A task that has ended answers at once, whatever the tokens say.

        Args:
            timeout: Longest wait, in seconds. `None` waits without limit, zero only looks.

        Returns:
            What the function returned.

        Raises:
            TimeoutError: If the task is still running when the time is up. It goes on.
            TaskCancelledError: If the task was cancelled; a new one each time.
            Cancelled: If the caller's own current token is set, and the task is not done or
                was cancelled.
            RuntimeError: If tasks would wait for each other in a circle.
            BaseException: What the function raised: the same object each time, with the
                traceback that it left with.

        Threads:
            Any. A worker that waits runs the task itself if nobody has begun to, and may then
            be back later than `timeout`.

        Source:
            `concurrent.futures.Future.result`.
        """
        if timeout is not None:
            timeout = _clock.seconds(timeout)
        if self._state == VALUE or self._ended(timeout) == VALUE:
            value: R_co = self._value
            return value
        error = self._error()
        try:
            raise error
        finally:
            # The error's traceback holds this frame: without these names it is no cycle.
            del self, error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """
        Wait for the task and return what it raised.

        Args:
            timeout: As for `result`.

        Returns:
            The exception the function raised, `None` if it returned.

        Raises:
            TimeoutError, TaskCancelledError, Cancelled, RuntimeError: As `result`.
        """
        if timeout is not None:
            timeout = _clock.seconds(timeout)
        state = self._ended(timeout)
        if state == VALUE:
            return None
        error = self._error()
        if state == ERROR:
            return error
        try:
            raise error
        finally:
            del self, error

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait for the task to end.

        Args:
            timeout: As for `result`.

        Returns:
            True if it has ended, False if the time ran out first.

        Raises:
            Cancelled: If the caller's own current token is set before the task has ended.
            RuntimeError: If tasks would wait for each other in a circle.
        """
        return wait_for((self,), _clock.seconds(timeout))

    get = result
    ready = done

    def successful(self) -> bool:
        """
        Whether it has returned.

        Raises:
            ValueError: If it has not ended yet.

        Source:
            `multiprocessing.pool.AsyncResult.successful`.
        """
        if not self.done():
            raise ValueError(f"{self!r} has not ended; wait() for it first")
        return self._state == VALUE

    def _ended(self, timeout: float | None) -> int:
        if not self._state and not wait_for((self,), timeout):
            raise TimeoutError(f"task {self.name!r} has not ended after {timeout:g} s")
        return self._state

    @property
    def _reason(self) -> object:
        """Why it was cancelled, if it was."""
        return self._value

    @abc.abstractmethod
    def _abandon(self) -> None:
        """Make it cancelled for good while it runs: what it comes to later is not written here."""

    def _is_abandoned(self) -> bool:
        return False

    def _error(self) -> BaseException:
        """What `result` raises for a task that has no value."""
        if self._state == ERROR:
            error, traceback, _ = self._value
            # The base class's method: the exception's own may be anything.
            BaseException.with_traceback(error, traceback)
            return error  # type: ignore[no-any-return]
        _scope.checkpoint()
        return self._cancelled()

    def _cancelled(self) -> TaskCancelledError:
        """What is raised for a task that was cancelled, to those who were not."""
        reason = self._reason
        cancelled = TaskCancelledError(
            reason,
            f"task {self.name!r} of group {self._run.name!r} was cancelled: {describe(reason)}",
        )
        cancelled.__cause__ = self._run.first
        return cancelled


class Call(Task[R_co]):
    """
    The handle of a call that was submitted by itself.

    `Submitter.submit` fills it in: an `__init__` would make a submit a tenth slower.
    """

    __slots__ = (
        "_args",
        "_code",
        "_context",
        "_fn",
        "_lane",
        "_lasti",
        "_own",
        "_run",
        "_state",
        "_taken",
        "_value",
    )

    _index = None
    _kwargs = NOTHING
    _options = PLAIN

    def _abandon(self) -> None:
        # In one step. To look first and write then would miss an end in between, and to ask the
        # worker to look before it writes would cost every task.
        object.__setattr__(self, "__class__", _AbandonedCall)


class CallWith(Call[R_co]):
    """One that has keyword arguments, or options."""

    __slots__ = ("_kwargs", "_options")

    def _abandon(self) -> None:
        object.__setattr__(self, "__class__", _AbandonedCallWith)


class _Abandoned:
    """What a handle becomes when its block is left without it: nothing changes its outcome."""

    __slots__ = ()

    def _is_abandoned(self) -> bool:
        return True

    if not TYPE_CHECKING:  # to checkers they are what `Task` says

        @property
        def _state(self):
            return Call._state.__get__(self) or CANCELLED  # unless it had just ended

        @_state.setter
        def _state(self, state):
            """It comes too late."""

        @property
        def _value(self):
            return Call._value.__get__(self) if Call._state.__get__(self) else self._run.abandoned

        @_value.setter
        def _value(self, value):
            """It comes too late."""


class _AbandonedCall(_Abandoned, Call[R_co]):
    __slots__ = ()


class _AbandonedCallWith(_Abandoned, CallWith[R_co]):
    __slots__ = ()


def call(task: Task[R], fn: Callable[..., R], args: tuple[object, ...]) -> R:
    """Run a task's function, in the task's context."""
    current.set(task)
    kwargs = task._kwargs
    return fn(*args, **kwargs) if kwargs else fn(*args)
