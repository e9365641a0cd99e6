"""What happened, for those who watch from the side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from fastpool._task import Task
    from fastpool._taskgroup import TaskGroup

__all__ = ["Event", "Observer"]


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """
    Something that happened in a group.

    Attributes:
        name: `group_opened`, `task_submitted`, `task_started`, `task_succeeded`,
            `task_failed`, `task_cancelled`, `task_stuck`, `task_abandoned`, `group_cancelled` or
            `group_closed`.
        group: The group; `None` only once it has been dropped without leaving its block.
        task: The task, `None` for what happens to the group.
        worker: The name of the thread it happened in; of a stuck task, the one it sits in.
        time: When, on `time.monotonic()`, in seconds.
        duration: How long it took, in seconds; only at the end of what had begun, else `None`.
        error: The exception; only at an end that had one, else `None`.
    """

    name: str
    group: TaskGroup | None
    task: Task[Any] | None  # Any: a group's tasks are of all kinds
    worker: str
    time: float
    duration: float | None = None
    error: BaseException | None = None


Observer = Callable[[Event], object]
"""
Anything that takes an `Event`: called where the thing happens, in that thread; it should be quick.

It finds a copy of the context in which the task was submitted, or the group's block entered, but
no current token: it is not cancelled with the group. What it raises goes to `sys.unraisablehook`
and changes no outcome.
"""
