"""Who owns Ctrl-C while a group is open on the main thread, and other signals if asked to."""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from fastpool import _marks
from fastpool._token import CancelToken

if TYPE_CHECKING:
    from fastpool._taskgroup import TaskGroup

__all__ = ["after_fork", "at_once", "cancel_on_signals", "hold", "let_go"]

# What `signal` wraps, at ten times the price: it would be a tenth of a small group.
_signal: Any = importlib.import_module("_signal")  # Any: no stub has it


class Guarded(Protocol):
    """What is cancelled by a signal: a group's run."""

    name: str
    token: CancelToken
    closed: str | None


class _Guard:
    """
    The one handler that we have. All of it is the main thread's, where signals are handled.
    """

    def __init__(self) -> None:
        self.open: dict[Guarded, None] = {}  # those open on the main thread, the outermost first
        # By signal: those of them that asked for it, and the handler that was there before.
        self.asked: dict[int, dict[Guarded, None]] = {}
        self.before: dict[int, Any] = {}  # Any: as `signal` has it
        self.count = 0  # of the signals since the first of them was entered
        self.thread: int | None = None  # the main thread that entered them

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """
        Set the tokens of those concerned; raise here and now if a line of the user's was met.

        It takes no lock and runs no callback.
        """
        concerned = list(self.asked.get(signum, ()))
        if signum == signal.SIGINT:
            concerned = [*self.open, *(run for run in concerned if run not in self.open)]
            if not concerned:  # it was left on another thread
                signal.default_int_handler(signum, frame)
        self.count += 1
        error = KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(128 + signum)
        breaks_in = _marks.breaks_in(frame, again=self.count > 1)
        # The innermost first, each by itself: one whose body handles it ends with nothing.
        for guarded in reversed(concerned):
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
    A group has ended: restore the handlers after the last one, unless somebody replaced ours.

    Returns:
        An interrupt that was held back, and is to be raised now.
    """
    main = _in_main_thread()
    if _guard.asked:
        for signum in list(_guard.asked):
            _stop_asking(guarded, signum)
    try:
        if main and guarded in _guard.open and len(_guard.open) == 1:
            # As soon as it is back, Python's own handler may raise after any call of ours; so
            # there is none from here on.
            _restore()
    finally:
        held: tuple[BaseException, ...] = ()
        if main:
            held, _marks.held = _marks.held, ()
        if guarded in _guard.open:
            del _guard.open[guarded]
        if not _guard.open and not _guard.asked:
            _guard.count = 0
    if main and not _guard.open:
        _restore()  # a finalizer has opened a group in the middle of this
    return held[0] if held else None


def _restore() -> None:
    if _signal.getsignal(signal.SIGINT) is _handler and signal.SIGINT not in _guard.asked:
        _signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop_asking(guarded: Guarded, signum: int) -> None:
    asked = _guard.asked.get(signum, {})
    if asked.pop(guarded, guarded) is None and not asked:
        del _guard.asked[signum]
        before = _guard.before.pop(signum)
        if _signal.getsignal(signum) is _handler and _in_main_thread():
            _signal.signal(signum, signal.SIG_DFL if before is None else before)


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def at_once(guarded: Guarded) -> bool:
    """Whether a group is to be left without waiting: a signal came a second time."""
    return _guard.count > 1 and (
        guarded in _guard.open or any(guarded in asked for asked in _guard.asked.values())
    )


def after_fork() -> None:
    """In a forked child: groups that were open on another thread than this one are none of its."""
    if threading.get_ident() != _guard.thread:
        _guard.open.clear()
        _guard.asked.clear()
        _marks.held = ()
        _guard.count = 0


class cancel_on_signals:
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
        ValueError: If a signal does not exist or cannot be handled; if the caller is not the main
            thread, which alone handles signals.

    Threads:
        To be called and closed in the main thread.

    Source:
        128 and the signal's number is what a shell reports of a program that a signal has ended.
    """

    __slots__ = ("_run", "_signals")

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
        if run.closed is not None:
            raise RuntimeError(
                f"group {run.name!r} is not open; call cancel_on_signals() inside its with block"
            )
        self._run = run
        self._signals = signals
        try:
            for signum in signals:
                self._ask(signum)
        except BaseException:
            self.close()
            raise

    def _ask(self, signum: int) -> None:
        try:
            before = _signal.getsignal(signum)
            _guard.asked.setdefault(signum, {})[self._run] = None
            _guard.before.setdefault(signum, before)
            if before is not _handler:
                _signal.signal(signum, _handler)
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"cancel_on_signals() cannot handle signal {signum!r}: {error}"
            ) from error

    def close(self) -> None:
        """Restore the handlers now; once is enough."""
        for signum in self._signals:
            _stop_asking(self._run, signum)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
