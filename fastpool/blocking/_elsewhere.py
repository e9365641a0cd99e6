"""A call that another thread makes while this one waits for it."""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from fastpool import _clock, _marks
from fastpool._gate import SLICE, Gate
from fastpool._unraisable import unraisable

__all__ = ["Call", "call_out", "sit_in"]

P = ParamSpec("P")
R = TypeVar("R")


class Call(Generic[R]):
    """
    A call without arguments, and what comes of it.

    Attributes:
        gate: Opened when it has ended.
    """

    __slots__ = ("_context", "_ended", "_error", "_fn", "_pid", "_value", "gate")

    def __init__(self, fn: Callable[[], R]) -> None:
        self.gate = Gate()
        self._fn = fn
        self._context = contextvars.copy_context()
        self._value: tuple[R, ...] = ()
        self._error: BaseException | None = None
        self._ended = False
        self._pid = os.getpid()

    def run(self) -> None:
        """Make it, in a copy of the context of whoever wants it made."""
        try:
            self._value = (self._context.run(self._fn),)
        except BaseException as error:
            self._error = error
        self._ended = True
        self.gate.open()

    def ended(self) -> bool:
        return self._ended

    def is_left(self) -> bool:
        """Whether nobody makes it: this is a child that a signal handler has forked meanwhile."""
        return os.getpid() != self._pid

    # A function of its own: see `Run._wait_for_room`.
    def see_end(self, wait: Callable[[], object]) -> None:
        """
        Wait until it has ended.

        Args:
            wait: Comes back when it has, and now and then before.

        Raises:
            RuntimeError: If nobody makes it.
        """
        while not self.ended():
            wait()
            self.check_process()

    def check_process(self) -> None:
        """Raise if nobody makes it."""
        if self.is_left():
            raise RuntimeError(
                "this call is made by a thread of the process that this one was forked from"
            )

    def unwrap(self) -> R:
        """What it has returned or raised."""
        error, self._error = self._error, None
        if error is None:
            return self._value[0]
        try:
            raise error
        finally:
            del error  # its traceback holds this frame: without the name it is no cycle


@_marks.calls_out
def call_out(fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call what is not ours: Ctrl-C may break in."""
    return fn(*args, **kwargs)


def sit_in(
    interrupt: Callable[[], object], fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> R:
    """
    Call what blocks in the system.

    The main thread alone handles signals, and one that another thread was given, or that comes
    just before the call, does not wake it. So there a helper makes the call, and the main thread
    sleeps as it does elsewhere.

    Args:
        interrupt: Makes the call return. Called if Ctrl-C has come, which is then raised when
            the call has ended, and what it returned is dropped.
        fn: Called with the rest.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return fn(*args, **kwargs)
    call = Call(lambda: fn(*args, **kwargs))
    _clock.run_in_helper(call.run)
    try:
        call.see_end(functools.partial(call.gate.wait, SLICE))
    except BaseException:
        if not call.is_left():  # else it is the parent's
            try:
                interrupt()
            except Exception as error:  # it must not come in the place of the other
                unraisable(error, interrupt)
            call.see_end(call.gate.sit_out)
        raise
    return call.unwrap()
