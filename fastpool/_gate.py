"""Where a thread sleeps until another wakes it."""

from __future__ import annotations

import os
import threading
import time

from fastpool import _marks

__all__ = ["SLICE", "Gate"]

# Seconds that the main thread sleeps at a time. It alone handles signals, and is not woken by one
# that comes between the interpreter's last look and the sleep, or that another thread was given.
SLICE = 0.1


class Gate:
    """
    A gate that one thread waits at and any other opens; it shuts behind the one it lets through.

    Opening an open gate does nothing, and never blocks: a signal handler, a finalizer or a
    weak reference's callback may do it, wherever it interrupted. `threading.Event` cannot
    offer that: its `set()` takes the lock that `wait()` holds.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        # Held while the gate is shut. It guards nothing: it is what the waiter sleeps on.
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiter through, or the next one to come."""
        try:
            self._lock.release()
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise  # a signal handler's
            return  # it is open: somebody else woke the waiter first

    def notify(self, task: object) -> None:
        """A task has ended; what that means, the waiter finds out itself."""
        self.open()

    @_marks.calls_out
    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait until the gate opens, and shut it again.

        Args:
            timeout: Longest wait, in seconds. `None` waits without limit.

        Returns:
            True if the gate was open, False if the time ran out.

        Raises:
            KeyboardInterrupt: If Ctrl-C comes while the main thread waits, or has come already
                and was held back.
        """
        if _marks.held:
            _marks.raise_held()
        if timeout is not None and timeout <= 0:
            return self._lock.acquire(False)
        is_main = threading.get_ident() == threading.main_thread().ident
        longest = SLICE if is_main else threading.TIMEOUT_MAX
        if timeout is None:
            while not self._lock.acquire(True, longest):
                pass
            return True
        deadline = time.monotonic() + timeout
        while not self._lock.acquire(True, min(timeout, longest)):
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                return False
        return True

    @_marks.sits_out
    def sit_out(self) -> bool:
        """
        Wait until the gate opens, whatever comes but a second Ctrl-C.

        Returns:
            True if it has opened; False in a child that a signal handler has forked meanwhile,
            where no other thread is there to open it.
        """
        pid = os.getpid()
        while not self._lock.acquire(True, SLICE):
            if os.getpid() != pid:
                return False
        return True
