"""What has ended, for one thread that waits for any of it."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastpool import _scope
from fastpool._closing import Closing
from fastpool._gate import Gate
from fastpool._lane import Lane, here
from fastpool._waiting import AnyOf, help_along, refuse_circle_of_all, waiting

if TYPE_CHECKING:
    from fastpool._run import Run
    from fastpool._task import Task

__all__ = ["Arrivals"]

K = TypeVar("K")


class Arrivals(Closing, Generic[K]):
    """
    Takes note of tasks as they end, whatever they come to; whoever made it takes them.

    A task goes by a key.
    """

    __slots__ = ("_keys", "asleep", "ended", "gate")

    def __init__(self) -> None:
        self.ended: deque[K] = deque()  # some twice, perhaps
        self.gate = Gate()
        self.asleep: dict[None, None] = {}  # not empty: the gate is to be opened, by one
        self._keys: dict[Run, int] = {}  # the waiting thread's own

    @abc.abstractmethod
    def task(self, key: K) -> Task[Any]:
        """The handle that goes by a key."""

    @abc.abstractmethod
    def left(self) -> Iterable[K]:
        """The keys of those that have not been taken."""

    def hear(self, run: Run) -> None:
        """Listen to a group: what is queued in it has ended when its token is set."""
        if run not in self._keys:
            self._keys[run] = run.token._add_sleeper(self.gate)

    def arrive(self, key: K) -> None:
        """A task has ended. Any thread says so, more than once perhaps."""
        self.ended.append(key)
        # Looked at after it can be found: who falls asleep does the reverse.
        if self.asleep:
            self.wake()

    def wake(self) -> None:
        """Have who sleeps look what has ended; one of those that say so does it."""
        if self.asleep.pop(None, self) is None:
            self.gate.open()

    def wait(self) -> None:
        """
        Wait until one has ended.

        Raises:
            Cancelled: If the caller's own current token is set before.
            RuntimeError: If tasks would wait for each other in a circle.
        """
        if self.ended:
            return
        token = _scope.current_token()
        lane = here()  # an iterator may be handed from thread to thread
        key = token._add_sleeper(self.gate)
        if lane is not None:
            for run in self._keys:
                run.helpers[self.gate] = lane
        try:
            while True:
                self.asleep[None] = None
                if self.ended:
                    return
                token.check()
                # A token that was set may have opened the gate together with what ended before.
                if any(run.stopping() for run in self._keys):
                    self.look()
                    if self.ended:
                        return
                if lane is None:
                    self.gate.wait()
                else:
                    self._wait_in(lane)
                if not self.ended:  # a token was set, perhaps
                    self.look()
        finally:
            self.asleep.clear()
            for run in self._keys:
                run.helpers.pop(self.gate, None)
            token._remove(key)

    def look(self) -> None:
        """Note what has ended, and what has ended with its group's token: nobody tells."""
        for key in self.left():
            if self.task(key).done():
                self.ended.append(key)

    def _wait_in(self, lane: Lane) -> None:
        """As a worker waits: it runs what may get no other, or sleeps."""
        tasks = [self.task(key) for key in self.left()]
        # Only what may get no other worker: a task that one of them begins could wait for what
        # we do once the first of all has ended, and here it never would.
        # Of each group the first: one of them may stand behind what waits for another one.
        queued = {task._run: task for task in reversed(tasks) if not (task._taken or task._state)}
        at_work = [task for run in self._keys for task in run.in_hand() if task in tasks]
        if help_along(lane, *queued.values(), *at_work, last_resort=True):
            return
        first = AnyOf(tasks)
        with waiting(lane, first):
            refuse_circle_of_all(lane, first)
            self.gate.wait()

    def close(self) -> None:
        """Listen no more."""
        for run, key in self._keys.items():
            run.token._remove(key)
