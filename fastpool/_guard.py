"""Who owns Ctrl-C while a group is open on the main thread."""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType
from typing import Any, Protocol

from fastpool import _marks
from fastpool._token import CancelToken

__all__ = ["after_fork", "at_once", "hold", "let_go"]


# What `signal` wraps, at ten times the price: it would be a tenth of a small group.
_signal: Any = importlib.import_module("_signal")  # Any: no stub has it


class Guarded(Protocol):
    """What is cancelled by Ctrl-C: a group's run."""

    token: CancelToken


class _Guard:
    """
    The one handler for SIGINT. All of it is the main thread's, where signals are handled.
    """

    def __init__(self) -> None:
        self.open: dict[Guarded, None] = {}  # those open on the main thread, the outermost first
        self.count = 0  # of the signals since the first of them was entered
        self.thread: int | None = None  # the main thread that entered them

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """
        Set the token of every open group; raise here and now if a line of the user's was met.

        It takes no lock and runs no callback.
        """
        if not self.open:  # left on another thread, or still to be entered
            signal.default_int_handler(signum, frame)
        self.count += 1
        error = KeyboardInterrupt()
        breaks_in = _marks.breaks_in(frame, again=self.count > 1)
        # The innermost first, each by itself: one whose body handles it ends with nothing.
        for guarded in reversed(list(self.open)):
            guarded.token._interrupt(error)
        if not breaks_in:
            _marks.held += (error,)
            return
        try:
            raise error
        finally:
            del error, frame  # its traceback holds this frame: without these names it is no cycle


_guard = _Guard()
_handler = _guard.handle  # one object, to be told from others


def hold(guarded: Guarded) -> None:
    """
    A group is about to be opened: from here on no line of ours is torn by Ctrl-C.

    Not so on other threads, and where somebody else handles SIGINT: there signals are left alone.
    """
    if not _in_main_thread():
        return
    handler = _signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler and handler is not _handler:
        return
    try:
        _guard.open[guarded] = None
        _guard.thread = threading.get_ident()
        if handler is not _handler:
            _signal.signal(signal.SIGINT, _handler)
    except BaseException as error:
        # An interrupt before ours was in place; or this is a subinterpreter, which has none.
        _guard.open.pop(guarded, None)
        if not isinstance(error, ValueError):
            raise


def let_go(guarded: Guarded) -> BaseException | None:
    """
    A group has ended: restore Python's handler after the last one, unless somebody replaced ours.

    Returns:
        An interrupt that was held back, and is to be raised now.
    """
    main = _in_main_thread()
    try:
        last = main and guarded in _guard.open and len(_guard.open) == 1
        if last and _signal.getsignal(signal.SIGINT) is _handler:
            # As soon as it is back, Python's own handler may raise after any call of ours; so
            # there is none from here on.
            _signal.signal(signal.SIGINT, signal.default_int_handler)
    finally:
        held: tuple[BaseException, ...] = ()
        if main:
            held, _marks.held = _marks.held, ()
        if guarded in _guard.open:
            del _guard.open[guarded]
        if not _guard.open:
            _guard.count = 0
    return held[0] if held else None


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def at_once(guarded: Guarded) -> bool:
    """Whether a group is to be left without waiting: Ctrl-C came a second time."""
    return _guard.count > 1 and guarded in _guard.open


def after_fork() -> None:
    """In a forked child: groups that were open on another thread than this one are none of its."""
    if threading.get_ident() != _guard.thread:
        _guard.open.clear()
        _marks.held = ()
        _guard.count = 0
