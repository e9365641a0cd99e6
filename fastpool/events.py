"""What happened, for those who watch from the side."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from fastpool._task import Task
    from fastpool._taskgroup import TaskGroup

__all__ = ["Event", "Observer", "plain"]


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

# What would break a line, reorder it, or fail to be encoded: control characters, line separators,
# marks that turn the direction of the text, halves of a character.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(name: str) -> str:
    """A name without control characters, for a terminal or a page."""
    return name if name.isprintable() else _CONTROLS.sub("", name)
