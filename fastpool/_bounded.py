"""A queue with room for so many calls."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeVar

from fastpool._gate import Gate

__all__ = ["BoundedQueue"]

T = TypeVar("T")


class BoundedQueue(deque[T]):
    """
    What waits in a group with `max_queued`: who puts something in has taken room for it before.

    There is no lock. Room is a counter up to the limit, and then what was given back; whoever
    waits for some says so first and looks then, and who gives some back does the reverse.
    """

    __slots__ = ("_freed", "_fresh", "_overdrawn", "limit", "waiting")

    def __init__(self, entries: Iterable[T] = (), limit: int = 0) -> None:
        super().__init__(entries)
        self.limit = limit
        self._fresh = itertools.count()
        self._freed: deque[None] = deque()
        self._overdrawn: deque[None] = deque()  # for each that is in without room
        self.waiting: dict[Gate, None] = {}  # where a submitter sleeps, the first to come first

    def take_room(self) -> bool:
        """Room for one more, if there is any."""
        try:
            del self._freed[0]  # see `Run.take_slot`
        except IndexError:
            for number in self._fresh:
                return number < self.limit
        return True

    def overdraw(self) -> None:
        """Room for one more in any case; it is given back before anybody else gets some."""
        if not self.take_room():
            self._overdrawn.append(None)

    def give_room(self) -> None:
        """Something was taken out, or not put in."""
        try:
            self._overdrawn.pop()
        except IndexError:
            self._freed.append(None)
            self.wake()

    def lend_room(self) -> None:
        """Give room back for what stays in the queue and will never run."""
        self._overdrawn.append(None)
        self._freed.append(None)
        self.wake()

    def wake(self) -> None:
        """
        If there is room, have the one look who has waited longest.

        Said by who gives room back, and by each waiter that leaves, with room or without: it
        may have been woken for some that it has not taken.
        """
        if self._freed and self.waiting:
            for gate in self.waiting.copy():
                gate.open()
                return

    def popleft(self) -> T:
        entry = super().popleft()
        self.give_room()
        return entry

    def remove(self, entry: T, /) -> None:
        super().remove(entry)
        self.give_room()

    def appendleft(self, entry: T, /) -> None:
        self.overdraw()  # it was here before
        super().appendleft(entry)

    def copy(self) -> Any:  # Any: a plain deque, which the stub would not have
        while True:
            try:
                return deque(self)
            except RuntimeError:
                continue  # others have changed it meanwhile
