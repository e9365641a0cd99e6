"""What is called when a token is set: callbacks, their registrations, interruptions."""

from __future__ import annotations

import contextvars
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from fastpool import _clock, _marks, _wakers
from fastpool._closing import Closing
from fastpool._errors import is_a
from fastpool._gate import Gate
from fastpool._unraisable import unraisable
from fastpool._whole import whole
from fastpool.exceptions import Cancelled

if TYPE_CHECKING:
    from fastpool._token import CancelToken

__all__ = [
    "Callback",
    "Interrupts",
    "Registration",
    "after_fork",
    "is_left",
    "keys",
    "run_callbacks",
]

# Orders tokens, callbacks, causes and claims by age; `next` of it is atomic.
keys = itertools.count(1)
_first = 0  # the first of them that is of this process, and not of the one that it was forked from

_HELPER = "helper"  # the claim of which helper runs a slow callback, or goes on with it
FIRST_PAUSE = 0.001  # seconds until an interruption that could not be made is tried again
LONGEST_PAUSE = 0.05  # seconds; mostly the second try is the last


class Callback:
    """
    A function to be called once, by whoever takes the claim; who has it writes the rest.
    """

    __slots__ = (
        "_again",
        "_begun",
        "_claims",
        "_context",
        "_pause",
        "_waiters",
        "finished",
        "function",
        "key",
        "registration",
        "slow",
    )

    def __init__(self, function: Callable[[], object], *, slow: bool) -> None:
        self.function: Callable[[], object] | None = function
        self.key = next(keys)
        self.slow = slow
        self.registration: weakref.ref[Registration] | None = None
        self.finished = False
        self._begun = False
        self._again = False
        self._context: contextvars.Context | None = contextvars.copy_context()
        self._claims: dict[str | None, int] = {}  # `setdefault` is atomic: one alone gets it
        self._waiters: list[Gate] = []  # only ever added to
        self._pause: Gate | None = None

    def claim(self, mine: int) -> bool:
        """Whether it is the caller who decides what becomes of it."""
        return self._claims.setdefault(None, mine) == mine

    def has_claimed(self, mine: int) -> bool:
        """Whether it was the caller; takes nothing."""
        return self._claims.get(None) == mine

    def run_in(self, token: CancelToken) -> None:
        """Run it, if nobody has, and take it off its token."""
        mine = next(keys)
        try:
            self._run(token, mine)
        except BaseException:  # what a signal handler raised: somebody may be waiting
            if self.has_claimed(mine):
                try:
                    whole(self._run, token, mine)
                except BaseException:  # it has an error of its own
                    if self._claims.setdefault(_HELPER, mine) == mine:
                        whole(self.finish, token)
                    raise
            raise

    def _run(self, token: CancelToken, mine: int) -> None:
        """May be called again, wherever it was interrupted."""
        if not self.claim(mine):
            return
        if not self.slow and not self._begun:
            self._again = self._call()
        if self.slow or self._again:
            _clock.run_in_helper(lambda: self._go_on(token))
        else:
            self.finish(token)

    @_marks.swallows
    def _call(self) -> bool:
        """Call the function; whether it wants to be called again."""
        context, function = self._context, self.function
        assert context is not None
        assert function is not None
        self._begun = True  # and no handler can run before it is called
        try:
            return context.run(function) is _wakers.AGAIN
        except BaseException as error:  # even an exit: it must not pass for the canceller's
            unraisable(error, function)
            return False

    def _go_on(self, token: CancelToken) -> None:
        """In a helper: call it, with growing pauses, until somebody waits for the end of it."""
        me = next(keys)
        if self._claims.setdefault(_HELPER, me) != me:
            return
        try:
            if self.slow and not self._call():
                return
            self._pause = gate = Gate()  # and look then: `join` says that it waits, opens then
            pause = FIRST_PAUSE
            while not self._waiters and not gate.wait(pause) and self._call():
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self.finish(token)

    def finish(self, token: CancelToken) -> None:
        """It has run, or never will."""
        try:
            token._remove(self.key)
            registration = None if self.registration is None else self.registration()
            if registration is not None:
                registration.let_go()
            self.function = self._context = None
        finally:  # whatever a signal handler raises here: somebody may be waiting
            self.finished = True
            for gate in self._waiters:
                gate.open()

    def join(self) -> None:
        """
        Wait until it has finished.

        Not from inside a callback, which could be this one, nor from a signal handler or a
        finalizer that interrupted what runs them, or takes one back.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code in _RUNNING:
                return
            frame = frame.f_back
        gate = Gate()
        self._waiters.append(gate)  # and look then: `finish` sets first and opens then
        pause = self._pause
        if pause is not None:
            pause.open()
        # Nobody goes on in a forked child with what was begun before.
        while not self.finished and not is_left(self._claims.get(None)):
            gate.sit_out()


def run_callbacks(pending: list[tuple[Callback, CancelToken]]) -> None:
    for entry, token in pending:
        cause = token._cause
        if cause is not None and is_left(cause.number):
            return  # somebody has forked since, and returned in the child: the parent runs them
        entry.run_in(token)


def is_left(number: int | None) -> bool:
    """Whether what has a number is of the process that this one was forked from."""
    return number is not None and number < _first


def after_fork() -> None:
    """In a forked child: what has a number by now is the parent's."""
    global _first
    _first = next(keys)


class Registration(Closing):
    """
    A callback's place on a token, as `CancelToken.on_cancel` returns it.

    It holds its token until it is taken back or has run. In a `with` statement it is closed
    at the end of the block.
    """

    __slots__ = ("__weakref__", "_entry", "_token")

    def __init__(self, token: CancelToken, entry: Callback) -> None:
        self._token: CancelToken | None = token
        self._entry = entry

    def unregister(self) -> bool:
        """
        Take the callback back, without waiting for anything.

        Returns:
            True if this call won: the callback never runs. False if it has run, is running, or
            was taken back before.

        Threads:
            Any; takes no lock, so signal handlers and finalizers may call it.
        """
        entry, token, mine = self._entry, self._token, next(keys)
        try:
            if not entry.claim(mine):
                return False
            if token is not None:
                entry.finish(token)
        except BaseException:  # what a signal handler raised: somebody may be waiting
            if token is not None and entry.has_claimed(mine):
                whole(entry.finish, token)
            raise
        return True

    def close(self) -> None:
        """
        Take the callback back, and wait for it if it is running.

        After it the callback is not running and never will be; except when called from inside
        a callback, where it does not wait.
        """
        if not self.unregister():
            self._entry.join()

    def let_go(self) -> None:
        """Hold the token no longer."""
        self._token = None


# What is on a thread's stack while it decides on a callback, or runs it. Asked of the stack and
# not noted in a variable, which an interrupt between two lines would leave wrong.
_RUNNING = frozenset(
    fn.__code__
    for fn in (
        Callback._run,
        Callback._go_on,
        Callback.run_in,
        Callback.finish,
        Registration.unregister,
    )
)


class Interrupts:
    """What `CancelToken.interrupts` returns."""

    __slots__ = ("_registrations", "_slow", "_token", "interrupt")

    def __init__(self, token: CancelToken, interrupt: Callable[[], object], slow: bool) -> None:
        self._token = token
        self.interrupt = interrupt
        self._slow = slow
        # One for each block that is in it, with its thread.
        self._registrations: list[tuple[int, Registration]] = []

    def __enter__(self) -> None:
        token = self._token
        token.check()
        me = threading.get_ident()
        registration = token._register(Callback(self.interrupt, slow=self._slow))
        entry = me, registration  # no call: a handler that raises would leave it registered
        try:
            if token.cancelled():
                # Set since the check: the interruption has come too early to wake anything.
                registration.close()
                token.check()
            self._registrations.append(entry)
        except BaseException:  # a signal handler's, too
            whole(self._drop, entry)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entry: tuple[int, Registration] | None = None
        try:
            entry = self._innermost()
            entry[1].close()
            self._registrations.remove(entry)
        except BaseException:  # what a signal handler raised: it must not come after the block
            if entry is None:
                entry = whole(self._innermost)
            whole(self._drop, entry)
            raise
        if not is_a(error, Cancelled, GeneratorExit) and not _follows_exit(error):
            self._token.check()

    def _drop(self, entry: tuple[int, Registration]) -> None:
        """Take an interruption back, wherever its end was torn."""
        entry[1].unregister()
        if entry in self._registrations:
            self._registrations.remove(entry)

    def _innermost(self) -> tuple[int, Registration]:
        """That of this thread; a generator may be closed in another one."""
        me = threading.get_ident()
        for entry in reversed(self._registrations):
            if entry[0] == me:
                return entry
        return self._registrations[-1]


def _follows_exit(error: BaseException | None) -> bool:
    """
    Whether it is an interrupt or an exit, has one in it, or came up while one was on its way.

    The clean-up after Ctrl-C meets what that has interrupted: to a group, a `Cancelled` in place
    of its error would be the echo of a cancel, and nothing would be left of the interrupt.
    """
    errors = [error]
    seen: set[int] = set()
    for each in errors:  # grows as it goes
        if each is not None and id(each) not in seen:
            if is_a(each, KeyboardInterrupt, SystemExit):
                return True
            seen.add(id(each))
            errors.append(each.__context__)
            if is_a(each, BaseExceptionGroup):
                errors.extend(each.exceptions)
    return False
