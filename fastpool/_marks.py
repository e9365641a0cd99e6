"""Whose frame this is: where Ctrl-C may break in, and the interrupt that is held back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

__all__ = [
    "breaks_in",
    "calls_out",
    "held",
    "is_in_others_code",
    "is_swallowed",
    "raise_held",
    "sits_out",
    "swallows",
]

F = TypeVar("F", bound=Callable[..., Any])  # Any: it is given back as it is

_PACKAGE = __name__.partition(".")[0]

# The code of those functions of ours that do not simply hold an interrupt back.
_CALLING_OUT: set[CodeType] = set()
_SITTING_OUT: set[CodeType] = set()
_SWALLOWING: set[CodeType] = set()

held: tuple[BaseException, ...] = ()
"""
Interrupts that met a line of ours; the main thread raises them where it can.

Its alone, signal handlers included, and changed without a call, at which one could come between.
"""


def calls_out(fn: F) -> F:
    """
    Mark a function that does nothing but call the user's code, or sleep.

    An interrupt that comes while it is the nearest of ours is raised there and then.
    """
    _CALLING_OUT.add(fn.__code__)
    return fn


def sits_out(fn: F) -> F:
    """Mark a function that sleeps, and lets nothing but a second interrupt end its sleep."""
    _SITTING_OUT.add(fn.__code__)
    return fn


def swallows(fn: F) -> F:
    """Mark a function that lets no exception pass: an interrupt raised below it would be lost."""
    _SWALLOWING.add(fn.__code__)
    return fn


def breaks_in(frame: FrameType | None, *, again: bool) -> bool:
    """
    Whether an interrupt may be raised in a frame.

    The nearest frame of ours decides: it holds the interrupt back, so that none of our lines
    is torn, unless it calls the user's code.

    Args:
        frame: What was interrupted.
        again: Whether it is not the first time.

    Source:
        trio's rule for KeyboardInterrupt.
    """
    nearest: CodeType | None = None
    while frame is not None:
        code = frame.f_code
        if code in _SWALLOWING:
            return False
        if nearest is None and _is_ours(frame):
            nearest = code
        frame = frame.f_back
    return nearest is None or nearest in _CALLING_OUT or (again and nearest in _SITTING_OUT)


def is_in_others_code(frame: FrameType | None) -> bool:
    """Whether a frame is not ours, and was called by a function that does no more than that."""
    if frame is None or _is_ours(frame):
        return False
    while frame is not None and not _is_ours(frame):
        frame = frame.f_back
    return frame is not None and frame.f_code in _CALLING_OUT | _SWALLOWING


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE


def is_swallowed() -> bool:
    """Whether a function of ours, further out, would swallow what is raised."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _SWALLOWING:
            return True
        frame = frame.f_back
    return False


def raise_held() -> None:
    """
    Raise an interrupt that was held back, if there is one, and this is the main thread.

    Not where a function of ours further out would swallow it.
    """
    global held
    if not held or threading.get_ident() != threading.main_thread().ident:
        return
    if not is_swallowed() and held:
        error, held = held[0], held[1:]
        raise error
