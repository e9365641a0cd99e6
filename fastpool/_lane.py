"""What serves a group's queue: one thread, or the thread that talks to one far worker."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from fastpool._gate import Gate
from fastpool._scope import this_thread
from fastpool._whole import is_handlers

if TYPE_CHECKING:
    from fastpool._items import Stretch
    from fastpool._run import Run
    from fastpool._task import Task

__all__ = ["At", "Lane", "handle", "here", "stand_in", "take_last"]

T = TypeVar("T")

At: TypeAlias = "Task[Any] | tuple[int, Stretch]"  # a task, or a place among those of a `map`


class Lane:
    """
    One worker's place in a group: it takes tasks from the group's queue, one at a time.

    A lane is written by the thread that serves it alone, but for `run`, which whoever calls
    it sets before opening its gate, and `noticed`; others look at each field once.
    """

    __slots__ = (
        "above",
        "at",
        "at_work",
        "below",
        "context",
        "gate",
        "leaves",
        "noticed",
        "number",
        "of_thread",
        "pool",
        "room",
        "run",
        "since",
        "stays",
        "thread",
        "waits",
    )

    def __init__(self, pool: object, number: int = 0) -> None:
        self.stays = number > 0  # whether its thread waits at its gate when there is nothing to do
        self.pool = pool  # what its thread belongs to: only its own kind may help it out
        self.number = number
        self.gate = Gate()
        self.run: Run | None = None
        self.at_work = False  # whether it has begun, and not come to rest since
        # What it runs now, or is about to: a task, or a place among those of a `map`.
        self.at: At | None = None
        # Where somebody observes: when that began, and the context in which it is told of.
        self.since = 0.0
        self.context: Context | None = None
        # What a dump last saw it at, and since when; it keeps nothing alive.
        self.noticed: tuple[weakref.ref[object], int | None, float] | None = None
        self.waits: Iterable[Task[Any]] = ()  # what that task waits for
        self.leaves: Run | None = None  # the group that it waits for as a whole
        self.room: Run | None = None  # the group in whose queue it waits for room
        self.below: Lane | None = None  # the lane whose waiting task helps out here
        self.above: Lane | None = None  # the lane in which the waiting task helps out
        self.thread: object = None  # `this_thread()` of the thread that serves it
        self.of_thread: threading.Thread | None = None  # the same, to be asked for its name

    def serve_here(self) -> None:
        """Say that the calling thread serves this lane from now on."""
        _local.lane = self
        self.thread = this_thread()
        self.of_thread = threading.current_thread()

    @property
    def task(self) -> Task[Any] | None:
        """What it runs now."""
        at = self.at
        return None if at is None else handle(at)

    @property
    def worker(self) -> str:
        """The name of the thread that serves it."""
        return "" if self.of_thread is None else self.of_thread.name

    def in_hand(self) -> list[Task[Any]]:
        """What it has taken and not ended; all of it was shipped, if it is a far one's."""
        task = self.task
        return [] if task is None else [task]

    def let_go(self) -> None:
        """It has nothing in hand any more."""
        self.at = None

    @property
    def where(self) -> str:
        """What runs its tasks, for a line about it."""
        return f"thread {self.worker!r}"

    def far_stack(self) -> str | None:
        """The stack of what it runs, if that is in another process; empty if it does not say."""
        return None

    def task_cancelled(self, task: Task[Any], reason: object) -> None:
        """The token of what it runs was set: it listens to that, where it runs here."""

    def stack(self) -> Iterator[Lane]:
        """This lane and those below it, whose tasks wait on the same thread."""
        lane: Lane | None = self
        while lane is not None:
            yield lane
            lane = lane.below


def handle(at: At) -> Task[Any]:
    """The handle of a task, or of a place among those of a `map`."""
    return at[1].task(at[0]) if isinstance(at, tuple) else at


_local = threading.local()


def here() -> Lane | None:
    """The lane that the calling thread serves, if it is a worker's."""
    lane: Lane | None = getattr(_local, "lane", None)
    return lane


def stand_in(lane: Lane | None) -> None:
    """Have the calling thread serve another lane, or none."""
    _local.lane = lane


def take_last(entries: dict[T, None]) -> T | None:
    """
    Take off a dictionary what came last, which is the caller's then; None if it is empty.

    As `popitem`, but without a call at the end of it, at which a signal handler of the user's
    could raise: nobody would have what was taken.
    """
    while entries:
        try:
            last = next(reversed(entries))
            del entries[last]
        except (KeyError, RuntimeError, StopIteration) as error:
            if is_handlers(error):
                raise
            continue  # others have changed it meanwhile
        return last
    return None
