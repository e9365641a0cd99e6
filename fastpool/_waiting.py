"""How a thread waits for tasks: it sleeps, helps out, and refuses to wait in a circle."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastpool import _scope
from fastpool._gate import Gate
from fastpool._lane import Lane, here
from fastpool._token import CancelToken

if TYPE_CHECKING:
    from fastpool._ledger import Ledger
    from fastpool._run import Run
    from fastpool._task import Task

__all__ = [
    "AnyOf",
    "InHand",
    "circle_error",
    "find_circle",
    "help_along",
    "own_group_error",
    "refuse_circle_of_all",
    "tell_helpers",
    "tell_waiting",
    "wait_for",
    "wait_for_all",
    "waited_in_words",
    "waiting",
]


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
    if lane is None or (timeout is not None and timeout <= 0):
        return _sleep_until_done(left, timeout, None)
    with waiting(lane, left):
        circle = find_circle(lane, left)
        if circle is not None:
            raise circle_error(*circle)
        return _sleep_until_done(left, timeout, lane)


def wait_for_all(tasks: Iterable[Task[Any]], deadline: float | None) -> bool:
    """
    Wait for tasks that are only looked at when it is their turn, by the rules of `Task.result`.

    Args:
        tasks: The last one first: it will mostly be the last to end, and wait for the others.
        deadline: On `time.monotonic()`; `None` waits without limit.

    Returns:
        True if all have ended, False if the time ran out first.
    """

    def left() -> float | None:
        return None if deadline is None else deadline - time.monotonic()

    if here() is not None:  # a worker says what it waits for, and helps out with the first one
        return wait_for(list(tasks)[::-1], left())
    return all(wait_for((task,), left()) for task in tasks)


class AnyOf(tuple["Task[Any]", ...]):
    """Tasks for one of which something waits."""

    __slots__ = ()


class InHand:
    """The tasks that some lanes are at, whenever somebody looks."""

    __slots__ = ("_lanes",)

    def __init__(self, lanes: dict[Lane, None]) -> None:
        self._lanes = lanes

    def __iter__(self) -> Iterator[Task[Any]]:
        lanes = self._lanes
        # Looked at again after the task: one that has been taken off meanwhile is at another.
        at_work = ((lane, lane.task) for lane in list(lanes))
        return iter([task for lane, task in at_work if task is not None and lane in lanes])


@contextlib.contextmanager
def waiting(lane: Lane, tasks: Iterable[Task[Any]]) -> Generator[None, None, None]:
    """Say that the task of a lane waits for some others: for all, or for one of an `AnyOf`."""
    lane.waits = tasks
    tell_waiting(lane)
    try:
        yield
    finally:
        lane.waits = ()


def _sleep_until_done(tasks: list[Task[Any]], timeout: float | None, lane: Lane | None) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    token = _scope.current_token()
    gate = Gate()
    key = token._add_sleeper(gate)

    def see_them_end() -> bool:  # a function of its own: see `Run._wait_for_room`
        if lane is not None:
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

    try:
        return see_them_end()
    finally:
        token._remove(key)


def _sleep_once(
    task: Task[Any], token: CancelToken, gate: Gate, timeout: float | None, lane: Lane | None
) -> None:
    """Sleep until something has happened that may matter to who waits for a task."""
    run = task._run
    run.watch(task, gate)
    if lane is not None:
        run.helpers[gate] = lane
    # What is queued has ended when its group's token is set, and nobody tells it.
    key = None if run.token is token or run.token.cancelled() else run.token._add_sleeper(gate)
    try:
        # Registered first, looked at then: whatever happens from here on opens the gate.
        if task.done() or token.cancelled():
            return
        if lane is not None and help_along(lane, *lane.waits):
            return
        gate.wait(timeout)
    finally:
        if key is not None:
            run.token._remove(key)
        run.unwatch(task, gate)
        run.helpers.pop(gate, None)


def help_along(lane: Lane, *tasks: Task[Any], last_resort: bool = False) -> bool:
    """
    Have a worker that waits for some tasks run something that one of their ends waits for.

    That is the task itself if nobody has begun it, else what its own wait leads to: on another
    pool it may wait for something that is queued on ours, whose threads could all be waiting.

    Args:
        lane: The worker's.
        *tasks: What it waits for.
        last_resort: Run only what may get no other worker.

    Returns:
        Whether it ran anything.
    """
    links = list(tasks)
    seen: set[int] = set()
    while links:
        task = links.pop()
        if id(task) in seen or task.done():
            continue
        seen.add(id(task))
        run = task._run
        if (run.crowded() or not last_resort) and run.help_out(lane, task):
            return True
        serving = task._lane
        if serving is None:
            links.extend(run.in_hand())  # one of these has the place that it waits for
            continue
        leaves = serving.leaves
        if leaves is not None and leaves.help_leave(lane):
            return True
        room = serving.room
        if room is not None:
            if room.crowded() and room.help_leave(lane, most=1):
                return True
            links.extend(room.in_hand())  # one of these makes room when it has ended
        links.extend(_waited_for(serving))
    return False


def tell_helpers(run: Run) -> None:
    """
    Something was queued in a group: have the workers look again that wait for its tasks, or for
    one that does.
    """
    _tell([run], None, {id(run.pool)})


def tell_waiting(lane: Lane) -> None:
    """The task of a lane begins to wait: others may be able to run what it waits for."""
    pools = _pools_ahead(lane)
    if pools:
        _tell([below.run for below in lane.stack()], lane, pools)


def _tell(runs: list[Run | None], but: Lane | None, pools: set[int]) -> None:
    """Have those look again that wait for tasks of some groups, and are threads of those pools."""
    for run in runs:  # grows as it goes
        if run is not None:
            for gate in list(run.helpers):
                helper = run.helpers.get(gate)
                if helper is not None and helper is not but:
                    if id(helper.pool) in pools:
                        gate.open()
                    runs.extend(below.run for below in helper.stack() if below.run not in runs)


def _pools_ahead(lane: Lane) -> set[int]:
    """By `id`: where something is queued that the task of a lane has to wait for."""
    pools: set[int] = set()
    seen: set[int] = set()
    lanes = [lane]
    for serving in lanes:  # grows as it goes
        leaves, room = serving.leaves, serving.room
        if leaves is not None and leaves.queue:
            pools.add(id(leaves.pool))
        links = list(_waited_for(serving))
        if room is not None:
            pools.add(id(room.pool))
            links.extend(room.in_hand())
        for task in links:  # grows as it goes
            if id(task) in seen or task._state:
                continue
            seen.add(id(task))
            ahead = task._lane
            if ahead is None:
                pools.add(id(task._run.pool))
                links.extend(task._run.in_hand())  # one of these has the place that it waits for
            else:
                lanes.append(ahead)
    return pools


def waited_in_words(lane: Lane) -> list[str]:
    """What the task of a lane waits for."""
    room = lane.room
    if room is not None:
        return [f"room in the queue of group {room.name!r}"]
    tasks = [task for task in _waited_for(lane) if not task._state]
    return [f"task {task.name!r} of group {task._run.name!r}" for task in tasks]


def _waited_for(serving: Lane) -> Sequence[Task[Any]]:
    """
    The tasks that must end before that of a lane can go on; nothing if it runs.

    Who waits for room is not in a circle with them: a worker of theirs that waits makes room.
    """
    leaves = serving.leaves
    waits = serving.waits if leaves is None else leaves.in_hand()
    above = serving.above
    helped = None if above is None else above.task
    if helped is not None and isinstance(waits, AnyOf):
        return (helped,)  # this comes first, and who waits for any looks again before every sleep
    if helped is None:
        return waits if isinstance(waits, tuple) else tuple(waits)
    return (*waits, helped)  # its thread helps out with that meanwhile, which must end as well


def find_circle(lane: Lane, tasks: Sequence[Task[Any]]) -> tuple[Task[Any], Task[Any]] | None:
    """
    Whether the task of a lane would wait for itself by waiting for some others.

    Each waiter says what it waits for first and looks then, so of two that would wait for
    each other at least one sees it.

    Returns:
        The task of the lane, and the one among the others that waits for it; or None.
    """
    own = lane.task
    if own is None:
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
        if serving not in mine:
            links.extend((waited, first) for waited in _waited_for(serving))
        elif not _can_end(first, mine):
            return own, first
    return None


def _can_end(task: Task[Any], mine: set[Lane]) -> bool:
    """
    Whether a task can end while those of some lanes wait for it.

    A chain of waits leads back to them; but one that waits for any of several tasks goes on
    with the first that ends. So, of all tasks in these chains: which run, or wait for nothing
    but those that can go on?
    """
    waits: dict[Task[Any], Sequence[Task[Any]]] = {}
    links = [task]
    while links:
        link = links.pop()
        serving = link._lane
        if link in waits or serving is None or link._state or serving in mine:
            continue
        waits[link] = _waited_for(serving)
        links.extend(waits[link])

    def goes_on(link: Task[Any]) -> bool:
        if link._state or link._lane is None:
            return True
        return link not in waits and link._lane not in mine

    before = -1
    while len(waits) != before:
        before = len(waits)
        for link, waited in list(waits.items()):
            enough = any if isinstance(waited, AnyOf) else all
            if not waited or enough(goes_on(other) for other in waited):
                del waits[link]
    return goes_on(task)


def circle_error(waiting: Task[Any], waited: Task[Any]) -> RuntimeError:
    """What a wait raises that would never end."""
    if waiting is waited:
        return RuntimeError(f"task {waiting.name!r} cannot wait for itself")
    return RuntimeError(
        f"task {waiting.name!r} cannot wait for task {waited.name!r}, which waits for it in turn"
    )


def refuse_circle_of_all(lane: Lane, tasks: Sequence[Task[Any]]) -> None:
    """Raise if the task of a lane would wait for itself by waiting for the first of some others."""
    # Any one of them would do, so it is a circle only if not one can end without us.
    circle = find_circle(lane, tasks)
    if circle is not None and all(find_circle(lane, [task]) for task in tasks):
        raise circle_error(*circle)


def own_group_error(run: Ledger, lane: Lane | None) -> RuntimeError | None:
    """Why a thread cannot wait for a group: it is a worker's, and runs a task of that."""
    if lane is None or lane.task is None:
        return None
    for below in lane.stack():
        if below.run is run and below.task is not None:
            why = "" if below is lane else f", whose task {below.task.name!r} waits for it"
            which = "its own group" if below is lane else "group"
            return RuntimeError(
                f"task {lane.task.name!r} cannot wait for {which} {run.name!r}{why}"
            )
    return None
