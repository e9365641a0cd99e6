"""Who has not stopped, and where it sits."""

from __future__ import annotations

import math
import sys
import time
import warnings
from contextvars import Context
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastpool._frames import looking
from fastpool._gate import Gate
from fastpool._guard import has_heard
from fastpool._lane import Lane
from fastpool._stack import is_ours, module_of, own_frames, render
from fastpool._syscalls import Look, Seat, cure, look, settle
from fastpool._text import plain, some
from fastpool._unraisable import unraisable
from fastpool._waiting import waited_in_words

if TYPE_CHECKING:
    from fastpool._run import Run
    from fastpool._task import Task

__all__ = ["Vigil", "warn"]

# Seconds between two looks at a thread. One that computes gives up the interpreter's lock every
# five thousandths, one that sits in a call has not moved.
STILL = 0.02


class Vigil:
    """
    Watches over the end of one group: reports the tasks that go on after the cancel.

    The first report comes `grace` seconds after the token was set, the next ones after twice
    the time each. It is the leaving thread's.
    """

    __slots__ = ("_due", "_interval", "_run", "reported")

    def __init__(self, run: Run, grace: float) -> None:
        self._run = run
        self._interval = grace
        self._due: float | None = None
        self.reported = False  # whether the time of grace is over

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
        self.reported = True
        self._interval = max(2 * self._interval, 1.0)
        self._due = time.monotonic() + self._interval
        run = self._run
        cause = run.token._cause
        waited = 0.0 if cause is None else time.monotonic() - cause.at
        stuck: list[tuple[Task[Any], Lane]] = []
        contexts: list[Context | None] = []
        for lane in list(run.lanes):
            task, context = lane.task, lane.context
            # Without a context where somebody observes, it is just beginning, or has just ended.
            if task is not None and not task._state and (context or not run.observers):
                stuck.append((task, lane))
                contexts.append(context)
        way_out = "\n  A second Ctrl-C leaves the block without it." if has_heard(run) else ""
        # Where they are is looked at before anybody is told, who may let them go on.
        reports = [
            f"{_headline(task, lane, waited)}{details}{way_out}"
            for (task, lane), details in zip(stuck, _details(stuck), strict=True)
        ]
        for (task, lane), context, report in zip(stuck, contexts, reports, strict=True):
            if not task._state:  # it has stopped after all
                run.emit("task_stuck", task, context=context, worker=lane.worker)
                warn(report)


def warn(message: str) -> None:
    """Warn of what still runs, at the line that leaves the block."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_ours(frame):
        frame = frame.f_back
    file = module = "<exit>"  # without a module, the warning would be dropped in silence
    line = 0
    if frame is not None:
        file, line, module = frame.f_code.co_filename, frame.f_lineno, module_of(frame)
    try:
        # Without a registry, in which a report that reads like an earlier one would be dropped.
        warnings.warn_explicit(message, RuntimeWarning, file, line, module)
    except Exception as error:  # made an error by a filter, say: it must not end the wait
        unraisable(error, warn)


def _headline(task: Task[Any], lane: Lane, waited: float) -> str:
    return plain(
        f"task {task.name!r} of group {task._run.name!r} still runs in {lane.where}, "
        f"{waited:.1f} s after it was cancelled; it was submitted at {task.site}"
    )


def _details(stuck: list[tuple[Task[Any], Lane]]) -> list[str]:
    """For each task what a reader needs to find out why it goes on."""
    try:
        far = [lane.far_stack() for _, lane in stuck]
        first = [_look(lane) for _, lane in stuck]
        with looking():
            frames = sys._current_frames()
            stacks = [own_frames(lane, frames, ours=True) for _, lane in stuck]
            del frames  # among them is our own
        if any(first):
            Gate().wait(STILL)
        second = [_look(lane) for _, lane in stuck]
        return [
            "".join(
                f"\n  {line}"
                for line in (
                    _explain(lane, stack, settle(*looks)) if away is None else _explain_far(away)
                )
            )
            for (_, lane), away, stack, looks in zip(
                stuck, far, stacks, zip(first, second, strict=True), strict=True
            )
        ]
    except Exception as error:  # the report's first line must get out, whatever is wrong here
        unraisable(error, _details)
        return [""] * len(stuck)


def _look(lane: Lane) -> Look | None:
    return None if lane.of_thread is None else look(lane.of_thread.native_id)


def _explain_far(stack: str) -> list[str]:
    """The same of a task in another process."""
    if not stack:
        return ["Its process does not answer."]
    return ["Its Python stack, innermost call last:", *map(plain, stack.splitlines())]


def _explain(lane: Lane, stack: list[FrameType], seat: Seat | None) -> list[str]:
    """
    The lines of a report after its first.

    Args:
        lane: The task's.
        stack: Its frames, with ours among them.
        seat: Where its thread sits, if that is known.
    """
    lines: list[str] = []
    users = [frame for frame in stack if not is_ours(frame)]
    if users:
        lines += ["Its Python stack, innermost call last:"]
        lines += render(users)
    waited = waited_in_words(lane)
    if waited:
        lines += [f"It waits for {some(waited)}."]
    elif stack and is_ours(stack[-1]) and seat is not None and seat.call == "futex":
        lines += ["It waits in a call of fastpool's, on a token that is not set; see shield()."]
    elif seat is not None:
        lines += [_sits(seat)]
        instead = cure(seat, stack)
        if instead:
            lines += [f"To have a cancel wake it, use {instead}."]
        elif seat.call is None:
            lines += ["To have it stop on a cancel, call token.check() in its loop."]
    return [plain(line) for line in lines]


def _sits(seat: Seat) -> str:
    if seat.call is None:
        return "It sits in no system call: it computes, in Python or in what that line calls."
    said = f"It sits in the system call {seat.call}"
    if seat.fd is not None:
        said += f" on file descriptor {seat.fd}"
        if seat.file:
            said += f", {seat.file}"
        if seat.ready_to:
            said += f", until it is ready to {seat.ready_to}"
    elif seat.file:
        said += f", {'for' if seat.call in ('wait4', 'waitid') else 'on'} {seat.file}"
    return said + "."
