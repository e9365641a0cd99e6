"""The tree of open groups, for whoever wants to know what hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fastpool._closing import Closing
from fastpool._frames import looking
from fastpool._lane import Lane
from fastpool._run import DROPPED, Run
from fastpool._scope import Scope
from fastpool._stack import is_ours, module_of, own_frames, where
from fastpool._task import Task
from fastpool._taskgroup import _open_runs
from fastpool._text import plain, some
from fastpool._unraisable import unraisable
from fastpool._waiting import waited_in_words

if TYPE_CHECKING:
    from fastpool._scope import Place

__all__ = ["OpenGroup", "RunningTask", "dump", "dump_on_signal", "print_dump"]


@dataclass(frozen=True, slots=True)
class RunningTask:
    """
    A task that was running when `dump()` looked.

    Attributes:
        name: The task's name.
        thread: The name of the thread it runs in.
        elapsed: Seconds for which it has been running at least: since its start if its group has
            observers, else since the first dump that saw it; so 0.0 in that one. To note every
            start would make every task slower.
        line: Where it is, as `file:line in function`: the innermost line that is neither
            fastpool's nor the standard library's, if there is one. `None` if that is not known,
            as of a task that has just ended.
        waits_for: The tasks that it waits for, or the queue, in words; empty if for none.
        groups: The groups that were opened in it, the oldest first.
    """

    name: str
    thread: str
    elapsed: float
    line: str | None
    waits_for: tuple[str, ...]
    groups: tuple[OpenGroup, ...]


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """
    A group that was open when `dump()` looked: its block entered and not left.

    Attributes:
        name: The group's name.
        state: `"open"`: its body runs; `"leaving"`: its body has ended, and it waits for its
            tasks; `"dropped"`: nobody can leave it any more, and its tasks were cancelled.
        cancelled: Why it was cancelled, an exception by its class; `None` if it was not.
        parent: What it was opened in, in words: `"task 'fetch' of group 'nightly'"`,
            `"group 'nightly'"` for its body; `None` if in neither.
        thread: The name of the thread that entered it.
        site: Where it was entered, as `file:line`.
        line: Where that thread is now, as `file:line in function`; `None` if that is not known.
        elapsed: Seconds since it was entered.
        queued: How many tasks wait for a worker.
        tasks: Those that run, in the order in which their threads came to the group.
        failures: How many failures it has had.
        groups: The groups opened in its body, the oldest first. Those opened in its tasks are
            with the tasks, or here once such a task has ended.
    """

    name: str
    state: Literal["open", "leaving", "dropped"]
    cancelled: str | None
    parent: str | None
    thread: str
    site: str
    line: str | None
    elapsed: float
    queued: int
    tasks: tuple[RunningTask, ...]
    failures: int
    groups: tuple[OpenGroup, ...]


def dump() -> tuple[OpenGroup, ...]:
    """
    What is going on: the tree of open groups, with the tasks that run and where they are.

    Returns:
        The groups that were opened in no other, the oldest first; every other one is below the
        task or group in which it was opened. How many tasks have ended is not among it, since
        nobody counts them.

    Threads:
        Any, also a task's or a signal handler's: it takes no lock and waits for nobody. The
        groups go on meanwhile, so what it says of each was true at some moment of the call.
    """
    with looking():
        survey = _Survey()
        try:
            return survey.groups(None) + survey.left_over()
        finally:
            survey.frames.clear()  # among them are our own, which refer to the survey


def print_dump(file: TextIO | None = None) -> None:
    """
    Print what `dump()` returns, for people to read.

    Args:
        file: Where to; `None` is `sys.stderr`.

    Threads:
        Any. In a signal handler use `dump_on_signal`: the file may be in the middle of a write.
    """
    print(_text(dump()), file=sys.stderr if file is None else file)


class dump_on_signal(Closing):
    """
    Have a signal print the dump to standard error: `kill -USR1` tells what a program is at.

    The signal is taken over at once, until `close()` or the end of a `with` block gives it
    back. The dump goes to file descriptor 2 itself, so it comes out wherever the program is
    interrupted, in the middle of a `print` too.

    Args:
        signum: The signal, `signal.SIGUSR1` say.

    Raises:
        ValueError: If called in another thread than the main one, where Python handles signals;
            or if there is no such signal.
        OSError: If the system lets nobody handle that signal.

    Threads:
        To be called and closed in the main thread. Python runs the handler there, between two
        lines of Python code, so a main thread that is stuck in an extension's code prints
        nothing; `faulthandler.register` does, without knowing of groups.

    Source:
        `faulthandler.register`.
    """

    __slots__ = ("_before", "_handler", "_signum")

    def __init__(self, signum: int) -> None:
        _check_main_thread("dump_on_signal()")
        self._signum = signum

        def handler(signum: int, frame: FrameType | None) -> None:
            _write_dump()

        self._handler = handler  # one of its own, to be known by
        self._before: Any = signal.signal(signum, self._handler)  # Any: whatever was set before

    def close(self) -> None:
        """
        Give the signal back, unless somebody else has taken it over since; once is enough.

        Raises:
            ValueError: If called in another thread than the main one.
        """
        _check_main_thread("close()")
        if signal.getsignal(self._signum) is self._handler:
            # None: it was not set by Python code, which cannot set it again.
            signal.signal(self._signum, signal.SIG_DFL if self._before is None else self._before)


def _check_main_thread(what: str) -> None:
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        raise ValueError(f"{what} must be called in the main thread, not in {thread.name!r}")


def _write_dump() -> None:
    """The signal's handler. It may stand in the middle of anything, and raises nothing there."""
    try:
        left = memoryview((_text(dump()) + "\n").encode("utf-8", "backslashreplace"))
        while left:
            # Not `sys.stderr`, which refuses to be entered again in the middle of a write.
            left = left[os.write(2, left) :]
    except Exception as error:  # no room on the stack, say, or nobody who reads
        unraisable(error, dump_on_signal)


class _Survey:
    """One look at all open groups."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.frames = sys._current_frames()
        self.children: dict[Task[Any] | Run | None, list[Run]] = {}
        self.parents: dict[Run, Task[Any] | Run | None] = {}
        self.seen: set[Run] = set()
        open_runs = list(_open_runs)
        for run in open_runs:
            self.parents[run] = _opened_in(run)
        for run, parent in self.parents.items():
            # One whose task has ended, or whose group has, still belongs somewhere.
            if isinstance(parent, Task) and not parent.running():
                parent = parent._run
            if isinstance(parent, Run) and parent not in self.parents:
                parent = None
            self.children.setdefault(parent, []).append(run)

    def groups(self, parent: Task[Any] | Run | None) -> tuple[OpenGroup, ...]:
        """Those opened there."""
        views = map(self.group, self.children.get(parent, ()))
        return tuple(view for view in views if view is not None)

    def left_over(self) -> tuple[OpenGroup, ...]:
        """Those whose task or group has ended since this look began."""
        views = [self.group(run) for run in self.parents if run not in self.seen]
        return tuple(view for view in views if view is not None)

    def group(self, run: Run) -> OpenGroup | None:
        entry = run.entry
        if entry is None or run in self.seen:
            return None  # it has ended meanwhile, or is with what was left over
        self.seen.add(run)
        cause = run.token._cause
        state: Literal["open", "leaving", "dropped"] = "leaving" if run.leavers else "open"
        tasks = [view for lane in list(run.lanes) if (view := self.task(lane)) is not None]
        return OpenGroup(
            name=run.name,
            state="dropped" if run.closed is DROPPED else state,
            cancelled=None if cause is None else _reason(cause.reason),
            parent=_described(self.parents[run]),
            thread=entry.thread.name,
            site=entry.site,
            line=self.line_of(entry.thread),
            elapsed=self.now - entry.at,
            queued=len(run.queue),
            tasks=tuple(tasks),
            failures=len(run.failures),
            groups=self.groups(run),
        )

    def task(self, lane: Lane) -> RunningTask | None:
        task = lane.task
        if task is None or task._state:
            return None
        frames = own_frames(lane, self.frames)
        return RunningTask(
            name=task.name,
            thread=lane.worker,
            elapsed=self.elapsed(lane),
            line=_line(frames),
            waits_for=tuple(waited_in_words(lane)),
            groups=self.groups(task),
        )

    def elapsed(self, lane: Lane) -> float:
        """How long a lane has been at its task, as far as anybody knows."""
        run, at = lane.run, lane.at
        if at is None or run is None:
            return 0.0
        if run.observers:
            return self.now - lane.since
        index, kept = at if type(at) is tuple else (None, at)
        reference: weakref.ref[object] = weakref.ref(kept)
        before = lane.noticed
        if before is None or before[0] is not reference or before[1] != index:
            lane.noticed = before = (reference, index, self.now)
        return max(0.0, self.now - before[2])

    def line_of(self, thread: threading.Thread) -> str | None:
        """Where a thread is, in somebody's code but ours."""
        frame = None if thread.ident is None else self.frames.get(thread.ident)
        stack: list[FrameType] = []
        while frame is not None:
            if not is_ours(frame):
                stack.append(frame)
            frame = frame.f_back
        return _line(stack[::-1])


def _line(stack: list[FrameType]) -> str | None:
    """Where the code is that somebody wrote who may look at the dump."""
    for frame in reversed(stack):
        if module_of(frame).partition(".")[0] not in sys.stdlib_module_names:
            return where(frame)
    return where(stack[-1]) if stack else None


def _opened_in(run: Run) -> Task[Any] | Run | None:
    """The task or the group in which a group was entered."""
    entry = run.entry
    if entry is None:
        return None
    place: Place | None = entry.place
    around = entry.place._group
    # A scope in a task leads down to the task; one in a body does not.
    while isinstance(place, Scope) and place._group is around:
        place = place.before
    if isinstance(place, Task):
        return place  # pyright: ignore[reportUnknownVariableType] # it is of whatever kind
    return around if isinstance(around, Run) else None


def _reason(reason: object) -> str:
    """In words, without calling a method of it: that could be anybody's code."""
    return reason if type(reason) is str else type(reason).__qualname__


def _described(parent: Task[Any] | Run | None) -> str | None:
    if isinstance(parent, Task):
        return f"task {parent.name!r} of group {parent._run.name!r}"
    return None if parent is None else f"group {parent.name!r}"


def _text(groups: tuple[OpenGroup, ...]) -> str:
    """What a dump looks like."""
    lines: list[str] = []
    for group in groups:
        lines += _lines(group)
    return "\n".join(lines) if lines else "no group is open"


def _lines(group: OpenGroup, known: str | None = None) -> list[str]:
    """What a group looks like; `known` is the line that the one above says its thread is at."""
    state: str = group.state
    if group.cancelled is not None:
        state += ", cancelled"
        state += f" ({group.cancelled})" if group.cancelled != "cancelled" else ""
    counts = f"{group.queued} queued, {len(group.tasks)} running"
    if group.failures:
        counts += f", {group.failures} failed"
    lines = [
        plain(f"group {group.name!r}: {state}, {group.elapsed:.1f} s, {counts}"),
        plain(f"  entered at {group.site} in thread {group.thread!r}"),
    ]
    if group.line is not None and group.line != known:
        lines += [plain(f"  its thread is at {group.line}")]
    for task in group.tasks:
        since = f", at least {task.elapsed:.1f} s" if task.elapsed else ""
        lines += [plain(f"  task {task.name!r} in thread {task.thread!r}{since}")]
        if task.line is not None:
            lines += [plain(f"    at {task.line}")]
        if task.waits_for:
            lines += [plain(f"    waits for {some(task.waits_for)}")]
        for inner in task.groups:
            lines += [f"    {line}" for line in _lines(inner, task.line)]
    for inner in group.groups:
        lines += [f"  {line}" for line in _lines(inner, group.line)]
    return lines
