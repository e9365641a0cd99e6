"""What cannot be interrupted at all: a call in a thread that a cancel leaves behind."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from fastpool import _clock
from fastpool._gate import SLICE
from fastpool._scope import current_token
from fastpool._text import plain
from fastpool._unraisable import unraisable
from fastpool.blocking._elsewhere import Call

__all__ = ["abandon", "abandoned"]

P = ParamSpec("P")
R = TypeVar("R")


def abandon(fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """
    Call what nothing can interrupt, in a thread that a cancel leaves behind.

    For the look-up of a host's name, a mount whose server is gone, a computation in C. The thread
    runs until the call returns, does not hold the program when it ends, and what the call leaves
    is dropped. A `RuntimeWarning` names the function; `abandoned()` tells which still run.

    Args:
        fn: Called with `args` and `kwargs`, in a copy of the caller's context, token included.

    Returns:
        What it returns.

    Raises:
        Cancelled: As soon as the current token is set.
        BaseException: What it raises.
        RuntimeError: If no thread can be started; and in a child that a signal handler forks in
            the main thread meanwhile, where nobody makes the call.
        TypeError: If `fn` is no function.
    """
    if not callable(fn):
        raise TypeError(f"abandon() wants a function and its arguments, not {fn!r}")
    token = current_token()
    token.check()
    call = _Call(lambda: fn(*args, **kwargs), plain(getattr(fn, "__qualname__", repr(fn))))
    _clock.start_thread(call.run, f"fastpool-abandon-{call.name}")
    key = token._add_sleeper(call.gate)
    # Signals are handled in the main thread, whose sleep is in slices in any case.
    longest = SLICE if threading.current_thread() is threading.main_thread() else None
    try:
        while not (call.ended() or token.cancelled()):
            call.gate.wait(longest)
            call.check_process()
    finally:
        token._remove(key)
        left = not call.is_left() and call.leave()
        if left:
            _warn(call.name)
    if left:
        token.check()
    return call.unwrap()


def _warn(name: str) -> None:
    try:
        message = f"{name}() was left behind by a cancel: its thread runs until it returns"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Warning as error:  # made an error by a filter: it must not pass for what is raised
        unraisable(error, _warn)


def abandoned() -> tuple[str, ...]:
    """
    The calls that were left behind and still run.

    Returns:
        The names of the functions, in the order in which they were left.
    """
    return tuple(call.name for call in list(_left))


_left: dict[_Call[Any], None] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_left.clear)  # their threads did not come along


class _Call(Call[R]):
    """A call in a thread of its own, which is left behind unless it ends first."""

    __slots__ = ("_claims", "name")

    def __init__(self, fn: Callable[[], R], name: str) -> None:
        super().__init__(fn)
        self.name = name
        self._claims: dict[None, str] = {}  # `setdefault` is atomic: what came first stays

    def run(self) -> None:
        super().run()
        if self._claims.setdefault(None, "ended") == "left":
            _left.pop(self, None)
        self.gate.open()

    def ended(self) -> bool:
        return self._claims.get(None) == "ended"

    def leave(self) -> bool:
        """Leave it behind; False if it has ended first."""
        _left[self] = None  # before it can end, and take itself off
        if self._claims.setdefault(None, "left") == "left":
            return True
        _left.pop(self, None)
        return False
