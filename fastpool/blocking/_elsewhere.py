"""A call that another thread makes while this one waits for it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from fastpool import _clock, _marks
from fastpool._gate import Gate
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

    __slots__ = ("_context", "_ended", "_error", "_fn", "_value", "gate")

    def __init__(self, fn: Callable[[], R]) -> None:
        self.gate = Gate()
        self._fn = fn
        self._context = contextvars.copy_context()
        self._value: tuple[R, ...] = ()
        self._error: BaseException | None = None
        self._ended = False

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
        _see_end_of(call, call.gate.wait)
    except BaseException:
        try:
            interrupt()
        except Exception as error:  # it must not come in the place of the other
            unraisable(error, interrupt)
        _see_end_of(call, call.gate.sit_out)
        raise
    return call.unwrap()


# A function of its own: see `Run._wait_for_room`.
def _see_end_of(call: Call[R], wait: Callable[[], object]) -> None:
    while not call.ended():
        wait()
