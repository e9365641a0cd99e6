"""What is called when a token is set: callbacks, their registrations, interruptions."""

from __future__ import annotations

import contextvars
import itertools
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from fastpool import _clock
from fastpool._errors import is_a
from fastpool._gate import Gate
from fastpool._unraisable import unraisable
from fastpool.exceptions import Cancelled

if TYPE_CHECKING:
    from fastpool._token import CancelToken

__all__ = ["Callback", "Interrupts", "Registration", "keys", "run_callbacks"]

keys = itertools.count(1)  # orders tokens and callbacks by age; `next` of it is atomic


class Callback:
    """
    A function to be called once, by whoever takes the claim.
    """

    __slots__ = (
        "_claims",
        "_context",
        "_waiters",
        "finished",
        "function",
        "key",
        "registration",
        "slow",
    )

    def __init__(self, function: Callable[[], object], *, slow: bool) -> None:
        self.function = function
        self.key = next(keys)
        self.slow = slow
        self.registration: weakref.ref[Registration] | None = None
        self.finished = False
        self._context = contextvars.copy_context()
        self._claims = [self.key]  # `pop` is atomic: one alone gets it
        self._waiters: list[Gate] = []

    def claim(self) -> bool:
        """Whether the caller may decide what becomes of it. True once."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True

    def run_in(self, token: CancelToken) -> None:
        """Run it, if nobody has, and take it off its token."""
        if not self.claim():
            return
        if self.slow:
            _clock.run_in_helper(lambda: self._run(token))
        else:
            self._run(token)

    def _run(self, token: CancelToken) -> None:
        thread = threading.get_ident()
        _calling[thread] = _calling.get(thread, 0) + 1
        try:
            self._context.run(self.function)
        except BaseException as error:  # even an exit: it must not pass for the canceller's
            unraisable(error, self.function)
        finally:
            _calling[thread] -= 1
            if not _calling[thread]:
                del _calling[thread]
            self.finish(token)

    def finish(self, token: CancelToken) -> None:
        """It has run, or never will."""
        token._remove(self.key)
        registration = None if self.registration is None else self.registration()
        if registration is not None:
            registration.let_go()
        self.finished = True
        for gate in self._waiters:
            gate.open()

    def join(self) -> None:
        """Wait until it has finished; not from inside a callback, which could be this one."""
        if threading.get_ident() in _calling:
            return
        gate = Gate()
        self._waiters.append(gate)  # and look then: `finish` sets first and opens then
        while not self.finished:
            gate.wait()


# The threads that are inside a callback now, and how deep. Each writes its own entry only.
_calling: dict[int, int] = {}


def run_callbacks(pending: list[tuple[Callback, CancelToken]]) -> None:
    for entry, token in pending:
        entry.run_in(token)


class Registration:
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
        if not self._entry.claim():
            return False
        token = self._token
        if token is not None:
            self._entry.finish(token)
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

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Interrupts:
    """What `CancelToken.interrupts` returns."""

    __slots__ = ("_interrupt", "_registration", "_slow", "_token")

    def __init__(self, token: CancelToken, interrupt: Callable[[], object], slow: bool) -> None:
        self._token = token
        self._interrupt = interrupt
        self._slow = slow
        self._registration: Registration | None = None

    def __enter__(self) -> None:
        token = self._token
        token.check()
        registration = token._register(Callback(self._interrupt, slow=self._slow))
        if token.cancelled():
            # Set since the check: the interruption has come too early to wake anything.
            registration.close()
            token.check()
        self._registration = registration

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            registration.close()
        if not is_a(error, Cancelled, KeyboardInterrupt, SystemExit, GeneratorExit):
            self._token.check()
