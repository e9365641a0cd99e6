"""A queue with room for so many calls."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any, TypeVar

from fastpool._gate import Gate
from fastpool._whole import whole

__all__ = ["BoundedQueue"]

T = TypeVar("T")


class BoundedQueue(deque[T]):
    """
    What waits in a group with `max_queued`: who puts something in has taken room for it before.

    There is no lock, and nothing counts room: it is what neither the queue nor a promise takes
    up, so none is lost wherever a signal handler raises. Who takes some enters a promise first
    and looks then whether there was room; who waits for some says so first and looks then, and
    who gives some back does the reverse.
    """

    __slots__ = ("_lent", "limit", "promised", "waiting")

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        # For how many calls room is taken that are not in the queue yet, and by which thread;
        # under the entry that they go by there, and in the order in which it was asked for.
        self.promised: dict[object, tuple[int, int]] = {}
        self._lent: deque[None] = deque()  # for each that stays in the queue and never runs
        # Where a submitter sleeps, and which thread that is; the first to come first.
        self.waiting: dict[Gate, int] = {}

    def take_room(self, entry: object, most: int = 1) -> int:
        """
        Room for calls that are about to be put in under an entry.

        Whoever takes it sees to it that it is given back, whatever is raised from here on; to put
        them in does so.

        Returns:
            For how many there is room now, `most` at the most.
        """
        promised, me = self.promised, threading.get_ident()
        promised[entry] = (most, me)
        ahead = 0
        if len(promised) > 1:  # of those who look at once, each counts who came before
            for other in list(promised):
                if other is entry:
                    break
                ahead += promised.get(other, (0,))[0]  # what is gone is in the queue by now
        # In this order: who puts something in does so first and gives its promise up then.
        room = self.limit - ahead - max(len(self) - len(self._lent), 0)
        if room <= 0:
            self.give_room(entry)
            return 0
        return min(room, most)  # what is promised beyond that is given back with the rest

    def give_room(self, entry: object) -> None:
        """No more room is taken for an entry: its calls are in, or will not come."""
        self.promised.pop(entry, None)
        if self.waiting:
            self.wake()

    def lend_room(self) -> None:
        """Give room back for what stays in the queue and will never run."""
        try:
            self._lent.append(None)
            self.wake()
        except BaseException:  # what a signal handler raised
            whole(self.wake)
            raise

    def take_nothing(self, entry: object) -> None:
        """Only say that the calling thread is about to make room; see `is_interrupted`."""
        self.promised[entry] = (0, threading.get_ident())

    def is_interrupted(self) -> bool:
        """
        Whether the calling code has interrupted its own thread where that has taken room, is
        about to make some, or stands in line: it would wait for what can only go on after it.
        """
        me = threading.get_ident()
        return me in list(self.waiting.values()) or any(
            owner == me for _, owner in list(self.promised.values())
        )

    def line_up(self, gate: Gate) -> None:
        """Have a gate of the calling thread's opened when there may be room. Look after."""
        self.waiting[gate] = threading.get_ident()

    def wake(self) -> None:
        """
        If there is room, have the one look who has waited longest.

        Said by who gives room back, and by each waiter that leaves, with room or without: it
        may have been woken for some that it has not taken.
        """
        if self.waiting:
            promised = self.promised
            taken = sum(count for count, _ in list(promised.values())) if promised else 0
            if self.limit - taken - max(len(self) - len(self._lent), 0) > 0:  # as above
                for gate in list(self.waiting):
                    gate.open()
                    return

    def popleft(self) -> T:
        if self._lent:
            with contextlib.suppress(IndexError):
                self._lent.pop()  # first, or there would be room for both
        try:
            entry = super().popleft()
        except IndexError:
            self._lent.clear()  # some was lent for what was just taken, or had never come
            raise
        if self.waiting:
            self.wake()
        return entry

    def remove(self, entry: T, /) -> None:
        try:
            super().remove(entry)
            self.wake()
        except BaseException:  # what a signal handler raised, perhaps: it may be out by now
            whole(self.wake)
            raise

    def copy(self) -> Any:  # Any: a plain deque, which the stub would not have
        while True:
            try:
                return deque(self)
            except RuntimeError:
                continue  # others have changed it meanwhile
