"""Who has not stopped."""

from __future__ import annotations

import math
import time
import warnings
from typing import TYPE_CHECKING

from fastpool._unraisable import unraisable

if TYPE_CHECKING:
    from fastpool._run import Run

__all__ = ["Vigil"]


class Vigil:
    """
    Watches over the end of one group: reports the tasks that go on after the cancel.

    The first report comes `grace` seconds after the token was set, the next ones after twice
    the time each.
    """

    __slots__ = ("_due", "_interval", "_run")

    def __init__(self, run: Run, grace: float) -> None:
        self._run = run
        self._interval = grace
        self._due: float | None = None

    def patience(self) -> float | None:
        """Seconds until there is something to report; `None` as long as nobody was cancelled."""
        if self._due is None:
            cause = self._run.token._cause
            if cause is None or self._interval == math.inf:
                return None
            self._due = cause.at + self._interval
        return max(0.0, self._due - time.monotonic())

    def look(self) -> None:
        """Report, if it is time."""
        if self._due is None or time.monotonic() < self._due:
            return
        self._interval = max(2 * self._interval, 1.0)
        self._due = time.monotonic() + self._interval
        run = self._run
        cause = run.token._cause
        waited = 0.0 if cause is None else time.monotonic() - cause.at
        for lane in run.lanes.copy():
            task = lane.task
            if task is None:
                continue
            run.emit("task_stuck", task, context=lane.context, worker=lane.worker)
            _warn(
                f"task {task.name!r} of group {run.name!r} still runs in thread {lane.worker!r}, "
                f"{waited:.1f} s after it was cancelled; it was submitted at {task.site}"
            )


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=6)  # at the end of the with block
    except RuntimeWarning as error:  # made an error by a filter: it must not end the wait
        unraisable(error, _warn)
