"""Getting from a queue and putting into it, until the current token is set."""

from __future__ import annotations

import queue as queues
import sys
from typing import Any, Protocol, TypeVar

from fastpool._scope import current_token
from fastpool.blocking._conditions import slices, turns

__all__ = ["get", "put"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class Gettable(Protocol[T_co]):
    """A queue, by what is got from it."""

    def get(self, block: bool = ..., timeout: float | None = ...) -> T_co:
        """Get an item."""
        ...


class Puttable(Protocol[T_contra]):
    """A queue, by what can be put into it."""

    def put(self, item: T_contra, block: bool = ..., timeout: float | None = ..., /) -> None:
        """Put an item."""


def get(queue: Gettable[T], timeout: float | None = None) -> T:
    """
    `queue.get()`, until the current token is set.

    An item is never lost: one that was got is returned, also if the token is set in the same
    moment; and where `Cancelled` is raised nothing was taken.

    Args:
        queue: A `queue.Queue` or a subclass, a `queue.SimpleQueue`, or a queue of
            `multiprocessing` whose `get` takes a timeout. A `Queue` wakes at once on cancel,
            and so does a `multiprocessing.Queue`. Nothing can wake `SimpleQueue.get`, nor that
            of a manager's queue: an item is got at once there, and a cancel heard within 0.05
            seconds, at which the call wakes to look. Before Python 3.13, where a timed
            `SimpleQueue.get` may never end, it is the item that is got so late.
        timeout: Longest wait, in seconds. `None` waits without limit, zero or less only
            looks, where `queue.Queue` itself refuses less.

    Returns:
        The item.

    Raises:
        Cancelled: As soon as the token is set.
        queue.Empty: If the time is up.
        queue.ShutDown: If the queue is shut down and empty; Python 3.13 and newer.
        TypeError: If it is no such queue.

    Threads:
        Any. Other waiters are served as before: a `put` that meets a thread which leaves goes
        to the next.
    """
    item: T
    if isinstance(queue, queues.Queue):
        for _ in turns(queue.not_empty, lambda: _is_empty(queue), timeout):
            try:
                item = queue.get(block=False)
                return item
            except queues.Empty:
                continue
    elif _is_from_multiprocessing(queue):
        from fastpool.blocking import _processes  # which is for systems that have `poll`

        item = _processes.get(queue, timeout)
        return item
    elif sys.version_info < (3, 13) and isinstance(queue, queues.SimpleQueue):
        # Its own timed `get` waits without end there, if another thread takes the item for which
        # it was woken as the time runs out.
        for seconds in slices(timeout):
            try:
                item = queue.get(False)
                return item
            except queues.Empty:
                current_token().sleep(seconds)
        item = queue.get(False)
        return item
    elif isinstance(queue, queues.SimpleQueue) or _is_from_manager(queue):
        for seconds in slices(timeout):
            try:
                item = queue.get(True, seconds)
                return item
            except queues.Empty:
                continue
    else:
        raise TypeError(_wrong("get", queue))
    raise queues.Empty


def put(queue: Puttable[T], item: T, timeout: float | None = None) -> None:
    """
    `queue.put(item)`, until the current token is set.

    The item is in the queue if and only if this returns.

    Args:
        queue: A queue as for `get`. A full `queue.Queue` wakes at once on cancel; with a full
            queue of `multiprocessing` a cancel is heard within 0.05 seconds.
        item: What to put.
        timeout: Longest wait, in seconds. As for `get`.

    Raises:
        Cancelled: As soon as the token is set.
        queue.Full: If the time is up.
        queue.ShutDown: If the queue is shut down; Python 3.13 and newer.
        TypeError: If it is no such queue.

    Threads:
        Any, as for `get`.
    """
    if isinstance(queue, queues.Queue):
        for _ in turns(queue.not_full, lambda: _is_full(queue), timeout):
            try:
                return queue.put(item, block=False)
            except queues.Full:
                continue
    elif isinstance(queue, queues.SimpleQueue):
        current_token().check()
        return queue.put(item)
    elif _is_from_multiprocessing(queue) or _is_from_manager(queue):
        for seconds in slices(timeout):
            try:
                return queue.put(item, True, seconds)
            except queues.Full:
                continue
    else:
        raise TypeError(_wrong("put", queue))
    raise queues.Full


# Asked under the queue's lock. One that was shut down has nothing to wait for: the next try
# says so.


def _is_empty(queue: queues.Queue[Any]) -> bool:  # Any: whatever is in it
    return not queue._qsize() and not getattr(queue, "is_shutdown", False)


def _is_full(queue: queues.Queue[Any]) -> bool:  # Any: whatever is in it
    return 0 < queue.maxsize <= queue._qsize() and not getattr(queue, "is_shutdown", False)


def _is_from_multiprocessing(queue: object) -> bool:
    module = sys.modules.get("multiprocessing.queues")  # who has such a queue has imported it
    return module is not None and isinstance(queue, module.Queue)


def _is_from_manager(queue: object) -> bool:
    module = sys.modules.get("multiprocessing.managers")
    if module is None or not isinstance(queue, module.BaseProxy):
        return False
    return {"get", "put", "qsize"} <= set(dir(queue))


def _wrong(call: str, queue: object) -> str:
    advice = ""
    if type(queue).__module__.startswith("multiprocessing"):
        advice = "; use a multiprocessing.Queue, whose calls take a timeout"
    elif type(queue).__module__.startswith("asyncio"):
        advice = "; await its own methods"
    return f"{call}() wants a queue of queue or multiprocessing, not {queue!r}{advice}"
