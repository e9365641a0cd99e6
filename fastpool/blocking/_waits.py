"""Waiting for locks, events, conditions, futures, threads and processes."""

from __future__ import annotations

import concurrent.futures
import inspect
import multiprocessing.process
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Protocol, cast

from fastpool import _clock, _wakers
from fastpool._scope import current_token
from fastpool._task import Task
from fastpool.blocking._conditions import sleep_on, slices, turns

__all__ = ["Lock", "acquire", "wait"]


class Lock(Protocol):
    """What can be acquired."""

    def acquire(self, blocking: bool = ..., timeout: float = ..., /) -> bool:
        """Acquire it."""
        ...


class _SemaphoreInside(Protocol):
    _cond: threading.Condition
    _value: int


class _EventInside(Protocol):
    _cond: threading.Condition


class _FutureInside(Protocol):
    _condition: threading.Condition


def acquire(
    lock: Lock | threading.Condition | threading.Semaphore, timeout: float | None = None
) -> bool:
    """
    `lock.acquire()`, until the current token is set.

    A lock is never lost: where `Cancelled` is raised it was not acquired. One that was acquired
    is yours to release, also if the token is set in the same moment: write
    `if blocking.acquire(lock):`, then `try` and `finally: lock.release()`.

    Args:
        lock: A `threading.Semaphore` or `BoundedSemaphore` wakes at once on cancel. Nothing
            but its release can wake who waits for a `Lock`, an `RLock`, a `Condition` (which
            has one of these) or a lock of `multiprocessing`: it is acquired at once when it is
            free, and a cancel is heard within 0.05 seconds, at which the call wakes to look.
            Where that is too late, use a `Semaphore(1)`.
        timeout: Longest wait, in seconds. `None` waits without limit, zero or less only looks;
            so does -1, which for the own `acquire` of a `Lock` is no limit.

    Returns:
        Whether it was acquired; False if the time is up.

    Raises:
        Cancelled: As soon as the token is set.
        TypeError: If it is no lock of threads or processes, nor one whose `acquire` takes the
            same, `blocking` and `timeout`, in this order.

    Threads:
        Any. A release that meets a thread which leaves goes to the next.
    """
    if isinstance(lock, threading.Semaphore):
        inside = cast(_SemaphoreInside, lock)
        for _ in turns(inside._cond, lambda: inside._value == 0, timeout):
            if lock.acquire(blocking=False):
                return True
        return False
    method = getattr(lock, "acquire", None)
    if not callable(method) or inspect.iscoroutinefunction(method):
        raise TypeError(f"acquire() wants a lock of threads, not {lock!r}")
    if not _takes_blocking_and_timeout(method):
        raise TypeError(
            "acquire() wants a lock whose own acquire() takes (blocking, timeout), not "
            f"{lock!r}; try that without waiting, in a loop with fastpool.blocking.sleep(0.05)"
        )
    return any(method(True, seconds) for seconds in slices(timeout))


def _takes_blocking_and_timeout(acquire: Callable[..., object]) -> bool:
    """
    Whether a lock may be acquired by `acquire(True, seconds)`, for all that its signature tells.

    Of locks of files and the like, some have their pauses there, and would wait without end.
    """
    if getattr(acquire, "__module__", None) in (None, "threading"):
        return True  # one of Python's own; asking takes ten times as long as acquiring it
    try:
        signature = inspect.signature(acquire)
    except (TypeError, ValueError):  # it tells nothing
        return True
    try:
        *_, last = signature.bind(True, 0.0).arguments
    except TypeError:
        return False
    return last == "timeout" or signature.parameters[last].kind is inspect.Parameter.VAR_POSITIONAL


def wait(
    thing: threading.Event
    | threading.Condition
    | concurrent.futures.Future[object]
    | threading.Thread
    | multiprocessing.process.BaseProcess
    | subprocess.Popen[Any],
    timeout: float | None = None,
) -> bool:
    """
    Wait until something has happened, or the current token is set.

    Args:
        thing: What to wait for. A `threading.Event`: until it is set. A `threading.Condition`,
            which you hold: until it is notified; you hold it again afterwards, also when
            `Cancelled` is raised. A `concurrent.futures.Future`: until it is done; its
            outcome is yours to ask for. A `multiprocessing.Process` or a `subprocess.Popen`: until
            it has ended; a cancel leaves it running. All these wake at once on cancel. A
            `threading.Thread`, until it has ended: nothing else can wake who waits for it, so
            a cancel is heard within 0.05 seconds, at which the call wakes to look.
        timeout: Longest wait, in seconds. `None` waits without limit, zero or less only looks.

    Returns:
        Whether it happened; False if the time is up. A notification that came before the token
        was set counts, so none is lost.

    Raises:
        Cancelled: As soon as the token is set.
        RuntimeError: If a condition is not held, a thread was not started or is this one.
        TypeError: If it is nothing of these.

    Threads:
        Any. A cancel wakes this thread and no other; a notification that meets a thread which
        leaves goes to the next.

    Source:
        `threading.Event.wait`, `threading.Condition.wait`.
    """
    span = _clock.seconds(timeout)
    token = current_token()
    token.check()
    if isinstance(thing, threading.Event):
        happened = cast(_EventInside, thing)._cond
        with happened:
            return thing.is_set() or sleep_on(happened, span, hand_on=False)
    if isinstance(thing, threading.Condition):
        if not thing._is_owned():  # type: ignore[attr-defined] # as its own `wait` asks
            raise RuntimeError("cannot wait on a condition that is not held; write: with condition")
        return sleep_on(thing, span, hand_on=True)
    if isinstance(thing, concurrent.futures.Future):
        # Its condition, and not a callback, since that could not be taken back.
        changed = cast(_FutureInside, thing)._condition
        with changed:
            return thing.done() or sleep_on(changed, span, hand_on=False)
    if isinstance(thing, threading.Thread):
        return any(_has_ended(thing, seconds) for seconds in slices(timeout))
    if isinstance(thing, multiprocessing.process.BaseProcess):
        from fastpool.blocking import _processes  # which is for systems that have `poll`

        return _processes.wait(thing, span)
    if isinstance(thing, subprocess.Popen):
        from fastpool.blocking import _children  # as well

        return _children.wait(thing, span)
    if isinstance(thing, Task):
        raise TypeError(f"wait() is not for {thing!r}; its own wait() hears the token")
    raise TypeError(
        f"wait() wants an event, a condition, a future, a thread or a process, not {thing!r}; "
        "for other things there is token.interrupts()"
    )


def _has_ended(thread: threading.Thread, seconds: float) -> bool:
    thread.join(seconds)
    return not thread.is_alive()


def _notify_all(condition: threading.Condition) -> object:
    """Wake all who wait on a condition; again and again, for the block may not wait yet."""
    # Not longer than a moment: the block that is left may hold the lock, and waits for us.
    if condition.acquire(blocking=False):
        try:
            condition.notify_all()
        finally:
            condition.release()
    return _wakers.AGAIN


_wakers.provide("threading.Condition", _notify_all, slow=True)
# It breaks for all, as it does when one of them waits too long.
_wakers.provide("threading.Barrier", threading.Barrier.abort, slow=True)
