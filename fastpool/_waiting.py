"""How a thread waits for tasks: it sleeps, helps out, and refuses to wait in a circle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastpool import _scope
from fastpool._gate import Gate
from fastpool._lane import Lane, here
from fastpool._token import CancelToken

if TYPE_CHECKING:
    from fastpool._ledger import Ledger
    from fastpool._task import Task

__all__ = ["circle_error", "find_circle", "refuse_own_group", "wait_for"]


def wait_for(tasks: Sequence[Task[Any]], timeout: float | None) -> bool:
    """
    Wait until every one of some tasks has ended, by the rules of `Task.result`.

    Args:
        tasks: In the order in which they were submitted.
        timeout: Seconds, checked; `None` waits without limit.

    Returns:
        True if all have ended, False if the time ran out first.

    Raises:
        Cancelled: If the caller's own current token is set before they have.
        RuntimeError: If tasks would wait for each other in a circle.
    """
    left = [task for task in tasks if not task.done()]
    if not left:
        return True
    lane = here()
    if lane is None:
        return _sleep_until_done(left, timeout, None)
    lane.waits = left
    try:
        circle = find_circle(lane, left)
        if circle is not None:
            raise circle_error(*circle)
        return _sleep_until_done(left, timeout, lane)
    finally:
        lane.waits = ()


def _sleep_until_done(tasks: list[Task[Any]], timeout: float | None, lane: Lane | None) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    token = _scope.current_token()
    gate = Gate()
    key = token._add_sleeper(gate)
    try:
        if lane is not None and (timeout is None or timeout > 0):
            for task in tasks:
                token.check()
                task._run.help_out(lane, task)
        # The last one first: it will mostly be the last to end, and then one sleep is enough.
        for task in reversed(tasks):
            while not task.done():
                token.check()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                _sleep_once(task, token, gate, left, lane)
        return True
    finally:
        token._remove(key)


def _sleep_once(
    task: Task[Any], token: CancelToken, gate: Gate, timeout: float | None, lane: Lane | None
) -> None:
    """Sleep until something has happened that may matter to who waits for a task."""
    run = task._run
    run.watch(task, gate)
    if lane is not None:
        run.helpers[gate] = None
    # What is queued has ended when its group's token is set, and nobody tells it.
    key = None if run.token is token or run.token.cancelled() else run.token._add_sleeper(gate)
    try:
        # Registered first, looked at then: whatever happens from here on opens the gate.
        if task.done() or token.cancelled():
            return
        if lane is not None and run.help_out(lane, task):
            return
        gate.wait(timeout)
    finally:
        if key is not None:
            run.token._remove(key)
        run.unwatch(task, gate)
        run.helpers.pop(gate, None)


def find_circle(lane: Lane, tasks: Sequence[Task[Any]]) -> tuple[Task[Any], Task[Any]] | None:
    """
    Whether the task of a lane would wait for itself by waiting for some others.

    Each waiter says what it waits for first and looks then, so of two that would wait for
    each other at least one sees it.

    Returns:
        The task of the lane, and the one among the others that waits for it; or None.
    """
    waiting = lane.task
    if waiting is None:
        return None
    mine = set(lane.stack())
    seen: set[int] = set()
    links = [(task, task) for task in tasks]  # one that is waited for, and what began the chain
    while links:
        task, first = links.pop()
        serving = task._lane
        if serving is None or task._state or id(task) in seen:
            continue
        seen.add(id(task))
        if serving in mine:
            return waiting, first
        # Its thread helps out with another task, which must end before this one goes on; or
        # else it waits for these.
        above = serving.above
        if above is not None and above.task is not None:
            links.append((above.task, first))
        else:
            links.extend((waited, first) for waited in serving.waits)
            if serving.leaves is not None:
                links.extend((waited, first) for waited in serving.leaves.in_hand())
    return None


def circle_error(waiting: Task[Any], waited: Task[Any]) -> RuntimeError:
    """What a wait raises that would never end."""
    if waiting is waited:
        return RuntimeError(f"task {waiting.name!r} cannot wait for itself")
    return RuntimeError(
        f"task {waiting.name!r} cannot wait for task {waited.name!r}, which waits for it in turn"
    )


def refuse_own_group(run: Ledger, lane: Lane | None) -> None:
    """Raise if the calling thread is a worker's, and runs a task of the group it would wait for."""
    if lane is None or lane.task is None:
        return
    for below in lane.stack():
        if below.run is run and below.task is not None:
            why = "" if below is lane else f", whose task {below.task.name!r} waits for it"
            which = "its own group" if below is lane else "group"
            raise RuntimeError(f"task {lane.task.name!r} cannot wait for {which} {run.name!r}{why}")
