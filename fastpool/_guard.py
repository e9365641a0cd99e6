"""Who owns Ctrl-C while a group is open on the main thread, and other signals if asked to."""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from fastpool import _marks
from fastpool._closing import Closing
from fastpool._token import CancelToken
from fastpool._whole import is_handlers

if TYPE_CHECKING:
    from fastpool._run import Entry
    from fastpool._taskgroup import TaskGroup

__all__ = [
    "after_fork",
    "at_once",
    "cancel_on_signals",
    "has_heard",
    "hold",
    "is_guarding",
    "let_go",
]

# What `signal` wraps, at ten times the price: it would be a tenth of a small group.
_signal: Any = importlib.import_module("_signal")  # Any: no stub has it


class Guarded(Protocol):
    """What is cancelled by a signal: a group's run."""

    name: str
    token: CancelToken
    closed: str | None
    entry: Entry | None


class _Guard:
    """
    The one handler that we have. All of it is the main thread's, where signals are handled.
    """

    def __init__(self) -> None:
        # By signal: the groups that it stops, the outermost first, and how often each of them has
        # asked for that; the handler there was before.
        self.wards: dict[int, dict[Guarded, int]] = {SIGINT: {}}
        # Any: as `signal` has it
        self.before: dict[int, Any] = {SIGINT: signal.default_int_handler}
        self.heard: dict[Guarded, int] = {}  # how many signals each of them has heard
        self.thread: int | None = None  # the main thread that entered them

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """
        Set the tokens of those concerned; raise here and now if a line of the user's was met.

        It takes no lock and runs no callback.
        """
        wards = list(self.wards.get(signum, ()))
        if not wards:
            self.pass_on(signum, frame)
            return
        again = any(guarded in self.heard for guarded in wards)
        # Those that did not ask for this signal, and are open in one that did, are left with it.
        open_here = list(self.wards[SIGINT])  # the outermost first
        first = open_here.index(wards[0]) if wards[0] in open_here else len(open_here)
        for guarded in dict.fromkeys(wards + open_here[first:]):
            self.heard[guarded] = self.heard.get(guarded, 0) + 1
        error = KeyboardInterrupt() if signum == SIGINT else SystemExit(128 + signum)
        breaks_in = _marks.breaks_in(frame, again=again)
        # The innermost first, each by itself: one whose body handles it ends with nothing.
        for guarded in reversed(wards):
            guarded.token._interrupt(error)
        if not breaks_in:
            _marks.held += (error,)
            if not (again and _marks.is_in_others_code(frame)):
                return
            # What it calls would hold the program for ever, so it ends, with one of its own.
            error = type(error)(*error.args)
        try:
            raise error
        finally:
            del error, frame  # its traceback holds this frame: without these names it is no cycle

    def pass_on(self, signum: int, frame: FrameType | None) -> None:
        """No group is stopped by it: have it do what it does without us."""
        handler = _signal.getsignal(signum)
        if handler is _handler:  # they were left on another thread
            _restore(signum)
            signal.raise_signal(signum)
            return
        # The user's, put in place in a block, has called the one that it found there.
        before = self.before.get(signum)
        if before is None or before is handler:
            before = signal.default_int_handler if signum == SIGINT else _signal.SIG_DFL
        if callable(before):
            before(signum, frame)
        elif before == _signal.SIG_DFL:
            _signal.signal(signum, before)
            signal.raise_signal(signum)


SIGINT = int(signal.SIGINT)  # as a key of a dictionary, the enum's member takes calls to look up

_guard = _Guard()
_handler = _guard.handle  # one object, to be told from others


def hold(guarded: Guarded) -> None:
    """
    A group is about to be opened: from here on no line of ours is torn by Ctrl-C.

    Not so on other threads, and where somebody else handles SIGINT: there signals are left alone.
    """
    if not _in_main_thread():
        return
    handler = _signal.getsignal(SIGINT)
    if handler is not signal.default_int_handler and handler is not _handler:
        return
    try:
        _guard.wards[SIGINT][guarded] = 1
        _guard.thread = threading.get_ident()
        if handler is not _handler:
            _guard.before[SIGINT] = handler
            _signal.signal(SIGINT, _handler)
    except BaseException as error:
        # What a handler raised, Python's own perhaps; or this is a subinterpreter, which has none.
        _guard.wards[SIGINT].pop(guarded, None)
        if not _guard.wards[SIGINT]:
            _restore(SIGINT)
        if not isinstance(error, ValueError) or is_handlers(error):
            raise


def let_go(guarded: Guarded) -> BaseException | None:
    """
    A group has ended: restore the handlers after the last one, unless somebody replaced ours.

    Returns:
        An interrupt that was held back, or came just now, and is to be raised.
    """
    try:
        return _let_go(guarded)
    except BaseException as error:
        # Python's own handler, as soon as it was back, or that of another signal.
        return _let_go(guarded) or error


def _let_go(guarded: Guarded) -> BaseException | None:
    main = _in_main_thread()
    if len(_guard.wards) > 1:
        for signum, wards in list(_guard.wards.items()):
            if signum != SIGINT:
                wards.pop(guarded, None)
        if main:
            _tidy()
    wards = _guard.wards[SIGINT]
    # In a callback, say, it would be lost; one of the groups around raises it then.
    takes = main and (len(wards) < 2 or not _marks.is_swallowed())
    if main and guarded in wards and len(wards) == 1:
        _restore(SIGINT)
    if guarded in wards:
        del wards[guarded]
    if guarded in _guard.heard:
        del _guard.heard[guarded]
    if main and not wards:
        _restore(SIGINT)  # a finalizer has opened a group in the middle of this
    held: tuple[BaseException, ...] = ()
    if takes:
        held, _marks.held = _marks.held, ()
    return held[0] if held else None


def _tidy() -> None:
    """Restore the handlers that nobody needs any more."""
    for signum, wards in list(_guard.wards.items()):
        if not wards and _restore(signum) and signum != SIGINT:
            _guard.before.pop(signum, None)


def _restore(signum: int) -> bool:
    """Put back the handler there was, unless somebody has replaced ours; whether it is there."""
    # In this order: a finalizer that leaves a group in the middle restores it, and forgets this.
    before = _guard.before.get(signum)
    handler = _signal.getsignal(signum)
    if handler is _handler:
        # None: it was not set by Python code.
        _signal.signal(signum, _signal.SIG_DFL if before is None else before)
    return handler is _handler


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def at_once(guarded: Guarded) -> bool:
    """Whether a group is to be left without waiting: it has heard a second signal."""
    return _guard.heard.get(guarded, 0) > 1


def has_heard(guarded: Guarded) -> bool:
    """Whether a group has heard a signal."""
    return guarded in _guard.heard


def is_guarding() -> bool:
    """Whether a group is open on the main thread, and this is it."""
    return bool(_guard.wards[SIGINT]) and _in_main_thread()


def after_fork() -> None:
    """In a forked child: groups that were open on another thread than this one are none of its."""
    if threading.get_ident() != _guard.thread:
        for wards in list(_guard.wards.values()):
            wards.clear()
        _marks.held = ()
        _guard.heard.clear()
        _tidy()


class cancel_on_signals(Closing):
    """
    Have a group stop in good order on signals, as it does on Ctrl-C by itself.

    The first signal sets the group's token: nothing queued starts, what runs is told, and the
    block is left when the running tasks have stopped. What leaves it is a `SystemExit` with the
    signal's exit code, 128 and its number (143 for `SIGTERM`), for `SIGINT` `KeyboardInterrupt`.
    It is raised in the body's own code at once, or by the wait of ours that it ends. A second
    signal leaves at once, and names what still runs.

    The signals are taken over at once, until the group ends; `close()`, or the end of a `with`
    block, gives them back before.

    Args:
        group: An open group.
        *signals: Which: `signal.SIGTERM`, for a start.

    Raises:
        RuntimeError: If the group is not open.
        TypeError: If that is no group.
        ValueError: If a signal does not exist or cannot be handled; if the group was opened, or
            this is called, in another thread than the main one, which alone handles signals.

    Threads:
        To be called and closed in the main thread.

    Source:
        128 and the signal's number is what a shell reports of a program that a signal has ended.
    """

    __slots__ = ("_run", "_taken")

    def __init__(self, group: TaskGroup, *signals: int) -> None:
        run: Guarded | None = getattr(group, "_run", None)
        if run is None:
            raise TypeError(f"cancel_on_signals() wants a group first, not {group!r}")
        if not signals:
            raise ValueError("cancel_on_signals() wants a signal, as signal.SIGTERM")
        if not _in_main_thread():
            raise ValueError(
                "cancel_on_signals() must be called in the main thread, which handles signals"
            )
        entry = run.entry
        if run.closed is not None or entry is None:
            raise RuntimeError(
                f"group {run.name!r} is not open; call cancel_on_signals() inside its with block"
            )
        if entry.thread is not threading.main_thread():
            raise ValueError(
                f"cancel_on_signals() is for a group of the main thread; group {run.name!r} was "
                f"opened in {entry.thread.name!r}, so cancel it by a token of yours"
            )
        self._run = run
        self._taken: list[int] = []
        try:
            for signum in signals:
                self._take(signum)
        except BaseException:
            self.close()
            raise

    def _take(self, signum: int) -> None:
        try:
            handler = _signal.getsignal(signum)
            number = int(signum)
            wards = _guard.wards.setdefault(number, {})
            count = wards.get(self._run, 0) + 1
            wards[self._run] = count  # in one breath: what is taken is given back
            self._taken.append(number)
            _guard.thread = threading.get_ident()
            if handler is not _handler:
                _guard.before[number] = handler
                _signal.signal(number, _handler)
        except (TypeError, ValueError, OSError) as error:
            if is_handlers(error):
                raise
            raise ValueError(
                f"cancel_on_signals() cannot handle signal {signum!r}: {error}"
            ) from error

    def close(self) -> None:
        """Restore the handlers now; once is enough."""
        while self._taken:
            wards = _guard.wards.get(self._taken.pop(), {})
            count = wards.get(self._run, 0)
            if count > 1:
                wards[self._run] = count - 1  # it has asked for that by another one, too
            else:
                wards.pop(self._run, None)
        if _in_main_thread():
            _tidy()
