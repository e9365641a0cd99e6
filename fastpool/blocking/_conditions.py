"""How a thread waits for others and for the current token at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, cast

from fastpool import _clock, _marks
from fastpool._gate import Gate
from fastpool._scope import current_token
from fastpool._token import CancelToken

__all__ = ["FIRST_SLICE", "LONGEST_SLICE", "deadline_of", "sleep_on", "slices", "turns"]

FIRST_SLICE = 0.001  # seconds; most of what is waited for comes soon, or not for long
LONGEST_SLICE = 0.05  # seconds; so late at most is a cancel heard where nothing wakes the call


class _Inside(Protocol):
    """What `threading.Condition.wait` uses of its own condition."""

    _waiters: deque[object]

    def _release_save(self) -> object: ...
    def _acquire_restore(self, state: object) -> None: ...


class _Waiter:
    """
    Stands among the waiters of a condition, where `notify` expects a lock to release.

    Attributes:
        notified: Whether a notification was spent on it. Read and written under the
            condition's lock.
    """

    __slots__ = ("gate", "notified", "token")

    def __init__(self, token: CancelToken) -> None:
        self.token = token
        self.gate = Gate()
        self.notified = False

    def release(self) -> None:
        """
        Take a notification.

        Raises:
            RuntimeError: If the token is set. `notify` then goes on to the next waiter, as it
                does for one that was woken before: the notification is not spent on a thread
                that leaves.
        """
        if self.token.cancelled():
            raise RuntimeError("it leaves")
        self.notified = True
        self.gate.open()


def sleep_on(condition: threading.Condition, timeout: float | None, *, hand_on: bool) -> bool:
    """
    `condition.wait(timeout)`, ended by the current token too.

    The token wakes the one thread and no other, and takes no lock for it. What comes first
    decides: a thread that was notified before the token was set returns.

    Args:
        condition: Held by the caller, as it is again afterwards, whatever comes out.
        timeout: Seconds, checked; `None` waits without limit.
        hand_on: Whether an interrupt hands on the notification that it met. Not where all
            are notified together: it could wake one who began to wait after.

    Returns:
        Whether it was notified.

    Raises:
        Cancelled: If the token was set first.
    """
    token = current_token()
    inside = cast(_Inside, condition)
    waiter = _Waiter(token)
    key = token._add_sleeper(waiter.gate)
    try:
        inside._waiters.append(waiter)
        state = inside._release_save()
    except BaseException:  # a signal handler's: it takes no notification then
        with contextlib.suppress(ValueError):
            inside._waiters.remove(waiter)
        token._remove(key)
        raise
    try:
        try:
            # Registered first, looked at then: whatever happens from here on opens the gate.
            if not token.cancelled():
                waiter.gate.wait(timeout)
        finally:
            inside._acquire_restore(state)
            token._remove(key)
            with contextlib.suppress(ValueError):  # `notify` has taken it off
                inside._waiters.remove(waiter)
    except BaseException:
        if waiter.notified and hand_on:
            condition.notify()
        raise
    if not waiter.notified:
        token.check()
    return waiter.notified


def turns(
    condition: threading.Condition, blocked: Callable[[], bool], timeout: float | None
) -> Iterator[None]:
    """
    Go round a loop that tries without blocking, once whenever it is worth another try.

    Args:
        condition: Notified when it is; not held by the caller.
        blocked: Whether trying is no use; called under the condition's lock.
        timeout: Seconds; `None` waits without limit. The loop ends when they have passed.

    Raises:
        Cancelled: From the iterator, if the current token is set when the loop begins, or
            when it would sleep.
    """
    deadline = deadline_of(timeout)
    current_token().check()
    while True:
        yield
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        with condition:
            if blocked():
                sleep_on(condition, left, hand_on=True)


def slices(timeout: float | None) -> Iterator[float]:
    """
    Go round a loop that tries for some seconds at a time: for what no token can wake.

    Args:
        timeout: Seconds; `None` waits without limit. The loop ends when they have passed.

    Returns:
        An iterator of seconds, which grow.

    Raises:
        Cancelled: From the iterator, if the current token is set before a try.
    """
    deadline = deadline_of(timeout)
    token = current_token()
    longest = FIRST_SLICE
    while True:
        token.check()
        # One that came during the try was held back, so that what the try got is not lost.
        _marks.raise_held()
        left = longest if deadline is None else deadline - time.monotonic()
        yield min(longest, max(left, 0.0))
        if left < longest:
            return
        longest = min(2 * longest, LONGEST_SLICE)


def deadline_of(timeout: float | None) -> float | None:
    """When a timeout, as it was given, runs out; checked."""
    span = _clock.seconds(timeout)
    return None if span is None else time.monotonic() + span
