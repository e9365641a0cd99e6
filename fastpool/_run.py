"""The engine of one group: its queue, and the lanes that serve it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import Context, copy_context
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastpool import _marks, _scope
from fastpool._bounded import BoundedQueue
from fastpool._callbacks import Callback, Registration
from fastpool._errors import is_a
from fastpool._gate import Gate
from fastpool._items import Items, Stretch
from fastpool._lane import At, Lane, handle, here, stand_in, take_last
from fastpool._ledger import GIVEN_BACK, Ledger
from fastpool._task import (
    Call,
    Failure,
    Task,
    call,
    label,
    site,
)
from fastpool._text import some
from fastpool._token import CancelToken
from fastpool._waiting import (
    InHand,
    help_along,
    own_group_error,
    tell_helpers,
    tell_waiting,
    wait_for,
    wait_for_all,
    waited_in_words,
    waiting,
)
from fastpool._whole import whole
from fastpool.events import Observer
from fastpool.exceptions import GroupClosedError, describe
from fastpool.policies import FirstFailure, Judge

if TYPE_CHECKING:
    from fastpool._taskgroup import TaskGroup
    from fastpool.backends import Backend

__all__ = ["DROPPED", "EXITING", "UNENTERED", "Entry", "Run"]

# What is raised when the system has no thread for us, or a pool takes nothing any more.
NO_LANE = (RuntimeError, MemoryError, OSError, ValueError)

UNENTERED = "it has not been entered; submit inside its with block"
ENDED = "its with block has ended"
EXITING = "the interpreter is exiting"
DROPPED = "it was dropped without leaving its with block"
GOES_ON = "goes on"  # the one key in `Run.closing`


def _waits_for(lane: Lane) -> str:
    """What the task of a lane waits for, for a line about it."""
    waited = waited_in_words(lane)
    return f", waiting for {some(waited)}" if waited else ""


class Entry(NamedTuple):
    """Where, when and by whom a group was entered."""

    place: _scope.Place
    code: CodeType
    lasti: int
    thread: threading.Thread
    at: float

    @property
    def site(self) -> str:
        """By file and line."""
        return site(self.code, self.lasti)


class Fence:
    """
    The `lanes` that a wait has yet to see pass, for what they have in hand.

    It is `complete` once they are all there. What one of them gives back, or any lane before
    that, is waited for as well.
    """

    __slots__ = ("complete", "lanes", "returned")

    def __init__(self) -> None:
        self.lanes: dict[Lane, None] = {}
        self.complete = False
        self.returned: deque[Task[Any]] = deque()


class Run(Ledger):
    """
    One group at work. `TaskGroup` is its face; backends serve it with lanes.

    Lanes and submitters meet in `queue`, `idle` and `called`, without a lock, by one rule:
    everybody writes first and looks then.

    - A submitter appends to the queue, then looks at `called` and `idle`.
    - A lane that finds the queue empty puts itself on `idle`, then looks at the queue.
    - A lane that was called takes itself off `called`, then looks whether the queue wants
      another one: each wakes the next, so that a submitter wakes one at the most.
    """

    __slots__ = (
        "_freed",
        "_fresh",
        "attended",
        "backend",
        "bounded",
        "called",
        "calling",
        "closed",
        "closing",
        "entry",
        "fences",
        "full",
        "helpers",
        "idle",
        "lanes",
        "leavers",
        "limit",
        "notice",
        "pool",
        "queue",
        "recalled",
        "sharing",
        "short",
    )

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # Written by who enters the block and who leaves it then; others look, once at a time.
        self.closed: str | None = UNENTERED
        self.entry: Entry | None = None
        # Whether a group that is about to close does so; `setdefault` decides.
        self.closing: dict[str, bool] | None = None
        self.backend: Backend | None = None
        self.pool: object = None  # what its lanes' threads belong to
        self.queue: deque[Task[Any] | Stretch] = deque()  # a stretch once for each of its calls
        self.bounded: BoundedQueue[Task[Any] | Stretch] | None = None  # the same, with a bound
        # Each of these is written with single atomic operations. Lanes: all that have a slot;
        # those that wait for work; those on their way.
        self.lanes: dict[Lane, None] = {}
        self.idle: dict[Lane, None] = {}
        self.called: dict[Lane, None] = {}
        self.recalled: dict[Lane, None] = {}  # idle too, but the others are quicker to come
        self.calling: dict[object, None] = {}  # threads at what the group must not end before
        self.limit = 0
        self.full = False  # no slot was free when last looked; said first, and looked again then
        self.sharing = False  # lanes may have to wait for what others do on the same pool
        self.short = False  # there was no lane to be had when one was last to be started
        self._fresh = itertools.count()
        self._freed: deque[None] = deque()
        # Whether the thread that leaves is looking on, and calls more lanes if they are needed:
        # few short tasks are done by one before a second one has come.
        self.attended = False
        # Who is to be told of what lanes do, by the gate they sleep at.
        self.leavers: dict[Gate, None] = {}  # that a lane has come to rest
        self.helpers: dict[Gate, Lane] = {}  # that a waiting worker could run something
        # Where somebody observes: has it told that the group was cancelled.
        self.notice: Registration | None = None
        self.fences: dict[Gate, Fence] = {}

    def open(
        self,
        group: TaskGroup,
        *,
        backend: Backend,
        limit: int,
        judge: Judge,
        observers: tuple[Observer, ...],
    ) -> None:
        """Begin to take tasks."""
        self.group = weakref.ref(group)
        self.backend = backend
        self.limit = limit
        self.judge = judge
        self.observers = observers
        if type(judge) is not FirstFailure:
            self.judging = threading.RLock()
        if observers or self.judging is not None:
            self.disturbed = True
        if observers:
            self.context = copy_context()
            self.emit("group_opened")  # before anybody can submit
            # In a helper, since a signal handler may set the token where it stands.
            self.notice = self.token._register(Callback(self.tell_cancelled, slow=True))
        self.closed = None

    # --- Room in the queue ------------------------------------------------------------------

    def bound(self, limit: int) -> None:
        """Let no more than so many calls wait."""
        self.queue = self.bounded = BoundedQueue(limit)

    def room(self, fn: object, entry: object, most: int = 1, *, waits: bool = True) -> int:
        """
        Take room in the queue, where that is bounded; see `BoundedQueue.take_room`.

        Args:
            fn: What is to be submitted.
            entry: Under which it is going to be queued.
            most: For how many calls, at the most.
            waits: Whether to wait until there is some. A task of the group never does, nor does
                who has interrupted a submit of its own thread, which has room and must go on.

        Returns:
            For how many there is room: one at the least if `waits`. Without a bound it is `most`.

        Raises:
            Cancelled, GroupClosedError: As `Submitter.submit`, and if the caller's own current
                token is set while it waits.
        """
        queue = self.bounded
        if queue is None:
            return most
        taken = queue.take_room(entry, most)
        if taken:
            return taken
        if self.is_around(_scope.current_place()) or queue.is_interrupted():
            return 1  # which goes in without room
        if not waits:
            return 0
        if not self.while_open(lambda: self._wait_for_room(queue, fn, entry)):
            raise self.closed_error(fn, ENDED)
        return 1

    def give_room(self, entry: object) -> None:
        """What was to be queued under an entry has been, or will not be."""
        queue = self.bounded
        if queue is not None:
            queue.give_room(entry)

    def is_around(self, place: _scope.Place | None) -> bool:
        """Whether a place is in a task of this group, perhaps in groups further in."""
        while place is not None:
            if not isinstance(place, Task):
                place = getattr(place, "before", None)
            elif place._run is self:
                return True
            else:
                entry = place._run.entry
                place = None if entry is None else entry.place
        return False

    def submit_bounded(self, task: Task[Any], fn: object, queue: BoundedQueue[Any]) -> None:
        """Queue a task as soon as there is room for it."""
        try:
            if not queue.take_room(task):
                self.submit_when_room(task, fn)
                return
            if self.observers:
                self.submit_observed((task,), task, fn)
                return
            self.queue.append(task)
            queue.give_room(task)
            if self.closing is not None:
                self.refuse_late((task,), fn)
            if self.want_lane():
                self.call_for((task,), task)
        except BaseException:  # a signal handler's, too
            whole(queue.give_room, task)
            raise

    def submit_when_room(self, task: Task[Any], fn: object) -> None:
        """Queue a task as soon as there is room for it; the group does not end before."""

        def submit() -> None:
            self.room(fn, task)
            if self.observers:
                self.submit_observed((task,), task, fn)
                return
            self.queue.append(task)
            self.give_room(task)
            if self.want_lane():
                self.call_for((task,), task)

        if not self.while_open(submit):
            raise self.closed_error(fn, ENDED)

    def _wait_for_room(self, queue: BoundedQueue[Any], fn: object, entry: object) -> None:
        token = _scope.current_token()
        lane = here()
        gate = Gate()
        keys = [(heard, heard._add_sleeper(gate)) for heard in dict.fromkeys((token, self.token))]

        # In a function of its own: what a signal handler raises at the jump backwards of a loop
        # passes by what CPython has for the `try` around that, but not around a call.
        def take_in_line() -> None:
            queue.line_up(gate)
            if lane is not None:
                self.helpers[gate] = lane
            while True:  # said first and looked at then
                token.check()
                self.check_open(fn)  # before the room: a cancelled queue may be emptied, too
                if queue.take_room(entry):
                    return
                self.sleep_for_room(queue, gate, lane)

        try:
            take_in_line()
        finally:
            try:
                self.leave_line(queue, gate, keys)
            except BaseException:  # what a signal handler raised: others are in line behind it
                whole(self.leave_line, queue, gate, keys)
                raise

    def leave_line(
        self, queue: BoundedQueue[Any], gate: Gate, keys: Iterable[tuple[CancelToken, int]]
    ) -> None:
        """Who waited for room waits no more, and hears these tokens no more."""
        self.helpers.pop(gate, None)
        queue.waiting.pop(gate, None)
        queue.wake()  # the next one, should this one have been woken for nothing
        for heard, key in keys:
            heard._remove(key)

    def sleep_for_room(self, queue: BoundedQueue[Any], gate: Gate, lane: Lane | None) -> None:
        """Sleep until there may be room, or do something for it; the gate stands in line."""
        self.look_at_queue()
        if lane is None:
            gate.wait()
            return
        # On the same pool a worker can make room itself; on another it can help who will.
        # Meanwhile it does not hear of room, so others do: what it runs may wait for them.
        queue.waiting.pop(gate, None)
        queue.wake()
        helped = self.help_leave(lane, most=1) or help_along(lane, *self.in_hand())
        queue.line_up(gate)
        queue.wake()
        if helped:
            return
        lane.room = self
        try:
            tell_waiting(lane)  # who waits for us may be able to make room
            gate.wait()
        finally:
            lane.room = None

    def entered_at(self) -> float:
        """When its block was entered, on `time.monotonic()`."""
        entry = self.entry
        assert entry is not None
        return entry.at

    # --- Submitting -----------------------------------------------------------------------

    def submit_more(
        self, stretch: Stretch, arguments: Sequence[Any], context: Context | None = None
    ) -> None:
        """
        Queue some calls more, once the group was seen to be open and has room for them.

        Args:
            stretch: What they belong to.
            arguments: Of each.
            context: What they are submitted in, if that is not the same for the whole stretch.
        """
        items = stretch.items
        start = len(items)
        tasks = map(items.task, range(start, start + len(arguments)))
        try:
            stretch.add(arguments, context)
            if self.observers:
                self.submit_observed(list(tasks), stretch, stretch.fn)
                return
            self.queue.extend(itertools.repeat(stretch, len(arguments)))
        except BaseException as error:  # a signal handler's, too
            whole(self.drop, items, start, error)
            raise
        if self.bounded is not None:
            self.give_room(stretch)
        if self.closing is not None:
            self.refuse_late(tasks, stretch.fn)
        if not self.called and (self.idle or not self.full or self.recalled):
            self.call_for(tasks, stretch)

    def submit_one(self, stretch: Stretch, argument: object, context: Context) -> None:
        """As `submit_more`, for one call; nobody else has the context."""
        items = stretch.items
        start = len(items)
        try:
            stretch.contexts.append(context)
            items.taken.append(False)
            items.add_states(1)
            items.values.append(argument)
            if self.observers:
                self.submit_observed((items.task(start),), stretch, stretch.fn)
                return
            self.queue.append(stretch)
        except BaseException as error:  # a signal handler's, too
            whole(self.drop, items, start, error)
            raise
        if self.bounded is not None:
            self.give_room(stretch)
        if self.closing is not None:
            self.refuse_late((items.task(start),), stretch.fn)
        if not self.called and (self.idle or not self.full or self.recalled):
            self.call_for(map(items.task, (start,)), stretch)

    def drop(self, items: Items, start: int, reason: object) -> None:
        """Let no call from a place on be waited for that nobody has begun: it may not be queued."""
        for index in range(start, len(items)):
            super().withdraw(items.task(index), reason)  # it makes room when a lane comes to it

    def submit_observed(
        self, tasks: Sequence[Task[Any]], entry: Task[Any] | Stretch, fn: object
    ) -> None:
        """Tell of some tasks, and queue them under an entry."""

        def submit() -> None:
            context = copy_context()
            for task in tasks:
                self.untold[task] = context
                self.emit("task_submitted", task, context=context)
            self.queue.extend(itertools.repeat(entry, len(tasks)))
            self.give_room(entry)
            if self.want_lane():
                self.call_for(tasks, entry)

        if not self.while_open(submit):
            raise self.closed_error(fn, ENDED)

    def refuse_late(self, tasks: Iterable[Task[Any]], fn: object) -> None:
        """
        Withdraw what was just queued, and raise, if the group has ended meanwhile.

        Whoever leaves says that it is closing first and looks at the queue then. So it has seen
        the tasks there, or who has queued them sees that it is closing, and one of them decides.
        """
        if not self.goes_on():
            withdrawn = [self.withdraw(task, ENDED) for task in tasks]
            if self.over:
                self.queue.clear()  # nobody comes for it any more, and it leads back here
            if any(withdrawn):  # else a lane came for them before the end
                raise self.closed_error(fn, ENDED)

    def call_for(self, tasks: Iterable[Task[Any]], entry: Task[Any] | Stretch) -> None:
        """Have a lane come for what was just queued, under that entry for each of the tasks."""
        try:
            self.call()
        except BaseException as error:
            # No system says `TimeoutError`, but a handler of SIGALRM.
            if is_a(error, TimeoutError) or not is_a(error, *NO_LANE):
                self.look_at_queue()  # others may have found the slot taken that we had
                raise
            if self.lanes:  # it goes on with those that it has
                if self.idle or self.recalled:  # no memory to call one, say
                    self.look_at_queue()
                return
            withdrawn = [task for task in tasks if super(Run, self).withdraw(task, error)]
            for task in withdrawn:
                with contextlib.suppress(ValueError, IndexError):
                    self.queue.remove(entry)
                    if entry is task:  # as in `_leave_queue`
                        self.claims.pop(task, None)
            self.look_at_queue()
            if withdrawn:
                raise

    def check_open(self, fn: object) -> None:
        """Raise if nothing can be submitted."""
        if self.closed is not None:
            self.refuse_closed(fn)
        if self.stopping():
            self.refuse(fn)

    def refuse_closed(self, fn: object) -> None:
        """Raise what a submit raises to a closed group, but to a task of one that is finished."""
        assert self.closed is not None
        lane = here() if self.closed is EXITING else None
        if lane is None or all(below.run is not self for below in lane.stack()):
            raise self.closed_error(fn, self.closed)

    def closed_error(self, fn: object, why: str, reason: object = None) -> GroupClosedError:
        """What a submit raises to a group that takes nothing."""
        return GroupClosedError(
            f"cannot submit {label(fn)}() to group {self.name!r}: {why}", reason=reason
        )

    def refuse(self, fn: object) -> NoReturn:
        """Raise what a submit raises to a group that was cancelled, or is about to be."""
        self.catch_up()
        _scope.checkpoint()
        reason = self.token.reason
        raise self.closed_error(fn, f"it was cancelled: {describe(reason)}", reason)

    def withdraw(self, task: Task[Any], reason: object) -> bool:
        """As a ledger does it. What never runs makes room."""
        won = super().withdraw(task, reason)
        if won and not self.stopping():
            self._leave_queue(task)
        return won

    def _leave_queue(self, task: Task[Any]) -> None:
        """A queued task waits no more, though no lane has taken it: make room."""
        queue = self.bounded
        if queue is None:
            return
        if isinstance(task, Call):
            with contextlib.suppress(ValueError, IndexError):  # taken, or the queue has changed
                queue.remove(task)
                if task._state:  # no lane comes to it, which would take the claim away
                    self.claims.pop(task, None)
        else:
            queue.lend_room()  # until a lane comes to its place among those of its map

    # --- Slots and lanes ------------------------------------------------------------------

    def want_lane(self) -> bool:
        """Whether the queue could do with one more lane, and may have it."""
        return not self.called and bool(self.idle or not self.full or self.recalled)

    def call(self) -> None:
        """Have one more lane serve the queue, if one is idle or may be started."""
        queue, entry = self.bounded, object()
        if queue is not None:
            queue.take_nothing(entry)  # nothing that interrupts us may wait for this lane
        try:
            # Others may have run all there was since we looked, and the group be about to end.
            self.while_open(self._call)
        finally:
            if queue is not None:
                queue.promised.pop(entry, None)

    def _call(self) -> None:
        backend = self.backend
        assert backend is not None
        for resting in (self.idle, self.recalled):
            lane = take_last(resting)
            if lane is not None:
                try:
                    self.called[lane] = None
                except BaseException:
                    resting[lane] = None
                    self.passed(lane)
                    raise
                try:
                    lane.gate.open()
                except BaseException:
                    lane.gate.open()  # a signal handler of the user's may have been quicker
                    raise
                return
        began: list[Lane | None] = [None]
        if self.take_slot():
            try:
                backend.start_lane(self, functools.partial(self.enlist, began))
            except BaseException as error:
                self.not_started(began[0])
                if is_a(error, *NO_LANE):
                    self.short = True
                    tell_helpers(self)  # what one of them waits for may get no other worker
                raise
            self.short = False

    def while_open(self, fn: Callable[[], object]) -> bool:
        """
        Call something, and keep the group from ending meanwhile; False if it has ended.

        So whoever tells something in there has done so before the group is told to be closed.
        """
        # Said first, and looked then whether it ends; `close` does the reverse. No context
        # manager, in whose frames a signal handler could raise between the entry and the body.
        me = object()
        self.calling[me] = None
        try:
            goes_on = self.goes_on()
            if goes_on:
                fn()
            return goes_on
        finally:
            try:
                del self.calling[me]
                self.wake_leavers()  # one may have stayed for our sake
            except BaseException:  # what a signal handler raised
                whole(self.wake_leavers)
                raise

    def goes_on(self) -> bool:
        """Whether the group has not ended. If it is about to, it does not, for our sake."""
        closing = self.closing
        return closing is None or closing.setdefault(GOES_ON, True)

    def take_slot(self) -> bool:
        """Whether one more task may run at once."""
        known = self.full
        for before in (False, True):
            # Without a call at the end: see `take_last`. There would be a slot less for ever.
            try:
                del self._freed[0]
            except IndexError:
                for number in self._fresh:
                    if number < self.limit:
                        return True
                    break
            else:
                if before:
                    self.full = False  # others may have been freed, too
                return True
            # Say so first, and look once more then: a slot that is freed from here on is seen
            # either here or by the submitter that finds `full` taken back.
            if not before:
                self.full = True
        if not known:
            tell_helpers(self)  # what one of them waits for may get no other worker now
        return False

    def free_slot(self) -> None:
        """Give a slot back. Whoever does looks at the queue then."""
        self._freed.append(None)
        self.full = False

    def give_back_slot(self) -> None:
        """Free a slot, and see whether somebody was waiting for it."""
        self.free_slot()
        self.look_at_queue()
        self.wake_leavers()

    def look_at_queue(self) -> None:
        """
        Have a lane come for what is queued, if there should be one.

        Said by who gives a slot back, and by who is about to wait for what is queued: a signal
        handler may have ended the submit that was to call it. The group fails if there is none.
        """
        if self.queue and not self.stopping() and self.want_lane():
            try:
                self.call()
            except TimeoutError:  # as in `call_for`
                raise
            except NO_LANE as error:
                if not self.lanes:
                    self._report(error)  # nobody is left to run the rest

    def wake_leavers(self) -> None:
        """Have who waits for the lanes to come to rest look again."""
        if self.leavers:
            for gate in list(self.leavers):
                gate.open()

    def enlist(self, began: list[Lane | None], lane: Lane) -> None:
        """A backend is about to start this lane, with the slot that was taken for it."""
        lane.run = self
        self.lanes[lane] = None
        try:
            self.called[lane] = None
        except BaseException:
            self.lanes.pop(lane, None)
            self.passed(lane)
            raise
        began[0] = lane  # with no call in between, after which a signal handler could raise

    def not_started(self, lane: Lane | None) -> None:
        """
        A backend has raised instead of starting a lane: what a signal handler did, perhaps.

        Args:
            lane: The one that it had enlisted by then.
        """
        if lane is None:
            self.free_slot()
        elif lane.stays:
            lane.gate.open()  # where its thread is; it comes, with the slot
        elif self.called.pop(lane, lane) is None:  # else it has come, or was recalled
            self.lanes.pop(lane, None)
            self.passed(lane)
            self.free_slot()

    def begin(self, lane: Lane) -> bool:
        """A lane that was called has come. False if nobody needs it any more."""
        if self.called.pop(lane, lane) is not None:
            return False
        lane.at_work = True
        if self.fences:
            self.passed(lane)  # a wait may have begun just as it came
        if len(self.queue) > 1 and not self.attended and self.want_lane():
            with contextlib.suppress(*NO_LANE):
                self.call()  # if there is no lane to be had, go on with those there are
        return True

    def rest(self, lane: Lane) -> bool:
        """A lane has nothing to do. False if work came in meanwhile; it goes on then."""
        if self.abandoned is not None:
            return True  # nobody takes it back
        self.idle[lane] = None
        lane.at_work = False
        self.passed(lane)
        if self.queue and not self.stopping():
            # As in `while_open`: a group that was seen at rest may have ended. What is queued now
            # is to be refused then, and whoever closes the group has this lane.
            self.calling[lane] = None
            try:
                if self.goes_on():
                    lane.at_work = self.idle.pop(lane, lane) is None
            finally:
                del self.calling[lane]
            if lane.at_work:
                return False
        self.wake_leavers()
        return True

    def dismiss(self, lane: Lane) -> None:
        """A lane ends, with its slot."""
        self.lanes.pop(lane, None)
        self.passed(lane)
        self.give_back_slot()

    def lane_failed(self, lane: Lane, error: BaseException) -> None:
        """
        What serves a lane has raised, and no task: out of memory, say. It rests or ends.

        May be said wherever that was: before it began, at work, or when it had come to rest.
        """
        self.broken(lane, error)
        lane.let_go()
        # Only what it has itself. It may be idle, or recalled; and who has just taken it off there
        # calls it: it comes, and finds the group stopped.
        if lane.at_work:
            if lane.stays:
                self.rest(lane)
            else:
                self.dismiss(lane)
        else:
            self.passed(lane)
            self.wake_leavers()

    def recall(self) -> Lane | None:
        """
        Take back a lane that was called and has not come.

        Its slot is the caller's then; but one that stays keeps it, and rests: it will pass its
        gate, find that nobody has called it, and wait on.
        """
        lane = take_last(self.called)
        if lane is not None:
            if lane.stays:
                self.recalled[lane] = None  # without a call before, at which a handler could raise
            else:
                self.lanes.pop(lane, None)
            self.passed(lane)  # a wait may have begun just as it was called
        return lane

    def passed(self, lane: Lane) -> None:
        """A lane has finished what it had in hand."""
        for gate in list(self.fences):
            fence = self.fences.get(gate)
            if fence is not None and fence.lanes.pop(lane, lane) is None and not fence.lanes:
                gate.open()

    # --- What a lane does -----------------------------------------------------------------

    def take(self, lane: Lane, most: int = 1) -> list[Task[Any]]:
        """
        Tasks for a lane to run: in the order submitted, `most` at the most, perhaps none.
        """
        places = self.take_places(lane, most)
        try:
            return [handle(at) for at in places]
        except BaseException as error:
            self.untake(places, lane, error)
            raise

    def take_places(self, lane: Lane, most: int) -> list[At]:
        """As `take`, but calls of a `map` get no handle for it."""
        taken: list[At] = []
        popleft, token = self.queue.popleft, self.token
        try:
            while len(taken) < most:
                if (self.disturbed or token._reason is not None) and self.stopping():
                    break
                try:
                    entry = popleft()
                except IndexError:
                    break
                at: At = entry if isinstance(entry, Task) else (entry.following(), entry)
                taken.append(at)
                if isinstance(at, tuple):
                    at[1].items.taken[at[0]] = True
                else:
                    at._taken = True
                if self.disturbed or token._reason is not None:  # as in `threads.serve`
                    if not self.admit(handle(at), lane):
                        taken.pop()
                        if self.fences and not taken:
                            self.passed(lane)
                elif isinstance(at, tuple):
                    at[1].items.note(at[0], lane)
                else:
                    at._lane = lane
        except BaseException as error:
            self.untake(taken, lane, error)
            raise
        return taken

    def untake(self, places: list[At], lane: Lane, error: BaseException) -> None:
        """A lane that fails has taken these, and is at none of them: they end with the group."""
        self._report(error)
        for task in map(handle, places):
            if task._lane is lane:
                task._lane = None
                self.claims.pop(task, None)  # it may hold the verdict that this lane runs it
            task._taken = False
            self.settle(task)  # who waits has heard of the cancel, and hears of this only from here

    def give_back(self, tasks: list[Task[Any]], lane: Lane) -> None:
        """What a lane took and has not begun, for another one to run; it comes first again."""
        for fence in list(self.fences.values()):
            if lane in fence.lanes or not fence.complete:
                fence.returned.extend(tasks)
        for task in reversed(tasks):
            # It may hold the verdict that this lane runs it. Who has laid it before that and is
            # yet to decide, alone with it, would withdraw what others run: so it is decided.
            claim = self.claims.pop(task, None)
            if claim is not None:
                claim.decide(GIVEN_BACK)
            task._lane = None
            task._taken = False
            self.queue.appendleft(task)
        if self.stopping():
            for task in tasks:
                self.settle(task)  # who began to wait after the cancel hears only from here
        else:
            self.look_at_queue()

    def perform(self, task: Task[Any], lane: Lane) -> None:
        """Run a task that a lane was admitted to, with everything that may go along with it."""
        lane.at = task
        # Who leaves the block says so first, and names what lanes are at then: it runs, and is
        # named, or never runs.
        if self.abandoned is not None:
            lane.at = None
            return
        self.started(task, lane)
        try:
            if task._options.timeout is not None:
                self.token_for(task)._limit(task._options.timeout)
            assert task._context is not None
            value = task._context.run(call, task, task._fn, task._args)  # type: ignore[arg-type] # not its name
        except BaseException as error:
            self.failed(task, lane, error)
        else:
            self.succeeded(task, lane, value)
        lane.at = None
        if self.fences:
            self.passed(lane)
        del self, task, lane  # what failed refers to the frame that called it: see `strip`

    # --- Helping: a worker that waits ---------------------------------------------------------

    def crowded(self) -> bool:
        """Whether what is queued may get no worker before one of those that wait goes on."""
        return self.full or self.sharing or self.short

    def help_out(self, lane: Lane, task: Task[Any]) -> bool:
        """
        Have a worker that waits for a task run it, if nobody has begun to.

        Only on the pool that the worker is of, whose threads could all be waiting like this
        one, and only if the group has a slot: the waiter's own counts, since it only waits.
        """
        if task._taken or self.pool is None or self.pool is not lane.pool or task.done():
            return False
        with self.slot_for(lane) as inner:
            if inner is None:
                return False
            if self.stopping():
                return False
            claim = self.claim(task)
            decided = task._taken or task._lane is not None or bool(task._state)
            if decided or claim.decide(inner) is not inner:
                if task._state:
                    self.claims.pop(task, None)
                return False
            inner.at = task
            task._lane = inner
            self._leave_queue(task)
            self.perform(task, inner)
            return True

    def help_leave(self, lane: Lane, most: float = math.inf) -> bool:
        """
        Have a worker serve the queue that waits for all of it, or for so much; whether it did.
        """
        if self.pool is None or self.pool is not lane.pool:
            return False
        helped = 0
        with self.slot_for(lane) as inner:
            while inner is not None and helped < most and (tasks := self.take(inner)):
                inner.at = tasks[0]
                helped += 1
                self.perform(tasks[0], inner)
        return helped > 0

    @contextlib.contextmanager
    def slot_for(self, lane: Lane) -> Generator[Lane | None, None, None]:
        """A lane on top of a waiting worker's, for it to help out in; None if no slot is free."""
        inner = Lane(lane.pool)
        inner.run = self
        inner.below = lane
        own = any(below.run is self for below in lane.stack())
        if not own and self.recall() is None and not self.take_slot():
            yield None
            return
        try:
            self.lanes[inner] = None
            lane.above = inner
            inner.serve_here()
            # As in `call`: said that we are at it, and looked then whether the group ends.
            yield inner if self.goes_on() else None
        except BaseException as error:
            task = inner.task
            if task is not None and task._state:
                self.notify(task)  # as that may be what failed
            elif task is not None:
                self.broken(inner, error)
            raise
        finally:
            lane.above = None
            stand_in(lane)
            self.lanes.pop(inner, None)
            try:
                self.passed(inner)
            finally:
                if not own:
                    self.give_back_slot()

    # --- Waiting for everything ---------------------------------------------------------------

    def wait(self, timeout: float | None) -> bool:
        """Wait for what was submitted before; False if the time ran out first."""
        refusal = own_group_error(self, here())
        if refusal is not None:
            raise refusal
        deadline = None if timeout is None else time.monotonic() + timeout
        gate, fence = Gate(), Fence()
        self.fences[gate] = fence
        try:
            # Before the queue and after it: a far lane takes many, and gives some of them back.
            in_hand = [task for lane in list(self.lanes) for task in lane.in_hand()]
            queued = [
                entry.unfinished() if type(entry) is Stretch else (entry,)
                for entry in dict.fromkeys(self.queue.copy())
            ]
            # What lanes have in hand now was submitted before, too. Some have taken a task and not
            # yet said so; they pass as soon as they are done with it.
            in_hand += [task for lane in list(self.lanes) for task in lane.in_hand()]
            fence.lanes.update(self.lanes)  # only now: one that is dismissed meanwhile would stay
            fence.complete = True
            self.look_at_queue()
            for resting in [*self.idle, *self.called, *self.recalled]:
                fence.lanes.pop(resting, None)
            tasks = itertools.chain(*reversed(queued), in_hand, InHand(fence.lanes))
            ended = wait_for_all(tasks, deadline) and self._see_pass(fence.lanes, gate, deadline)
            while ended and fence.returned:
                ended = wait_for_all((fence.returned.popleft(),), deadline)
            return ended
        finally:
            self.fences.pop(gate, None)

    def _see_pass(self, pending: dict[Lane, None], gate: Gate, deadline: float | None) -> bool:
        """Wait until lanes have finished what they had in hand, which they may not say yet."""
        token = _scope.current_token()
        lane = here()
        key = token._add_sleeper(gate)
        if lane is not None:
            self.helpers[gate] = lane
        try:
            while pending:
                token.check()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if lane is None:
                    gate.wait(left)
                    continue
                in_hand = InHand(pending)
                with waiting(lane, in_hand):
                    at_work = [task for task in in_hand if not task.done()]
                    if not at_work:
                        gate.wait(left)
                wait_for(at_work, left)
            return True
        finally:
            token._remove(key)
            self.helpers.pop(gate, None)

    def in_hand(self) -> list[Task[Any]]:
        """The tasks that lanes are at."""
        return list(InHand(self.lanes))

    def come_to_rest(self, lane: Lane | None) -> bool:
        """
        Whether no task is running or still to run; sees to it that it will be so.

        Args:
            lane: The lane that the leaving thread serves, if it is a worker's.
        """
        if not self.queue or self.stopping():
            while (recalled := self.recall()) is not None:
                if not recalled.stays:
                    self.free_slot()
        # Looked at again after the recalls: a submitter may have counted on such a lane.
        if not self.queue or self.stopping():
            return self.at_rest()
        self.look_at_queue()
        if lane is not None:
            self.help_leave(lane)
        return False

    def at_rest(self) -> bool:
        """Whether no lane is at work. Queue, called and idle lanes are looked at in this order."""
        if self.queue and not self.stopping():
            return False
        return not self.called and len(self.idle) + len(self.recalled) == len(self.lanes)

    def close(self) -> bool:
        """Take nothing any more, unless something came in since the lanes came to rest."""
        closing: dict[str, bool] = {}
        self.closing = closing
        if not self.calling and self.at_rest() and not closing.setdefault(GOES_ON, False):
            self.closed = ENDED
            return True
        self.closing = None
        return False

    def end(self) -> tuple[Failure, ...]:
        """
        Let go of everything. Tasks refer to this object, so it must not refer to tasks.

        Interrupted by what a signal handler raises, it may be called again.

        Returns:
            The failures, by time.
        """
        for task in list(self.untold):  # nobody else tells of them any more
            self.tell_never_ran(task)
        self.over = True
        backend, notice = self.backend, self.notice
        if backend is not None:
            backend.end(self)
        self.token._seal()
        waits = [
            token._close_callbacks
            for token in (() if self.abandoned else (self.token, *self.loose))
        ]
        if notice is not None:
            waits.append(notice.close)  # what it tells is told before the end is
        for wait in waits:
            try:
                wait()
            except BaseException as interrupt:  # a second Ctrl-C; the end comes all the same
                _marks.held += (interrupt,)
        for task in list(self.watchers):
            self.settle(task)  # what a lane that failed has lost, or never ran, has ended only now
            self.notify(task)
        for belongings in (self.claims, self.tokens, self.watchers):
            belongings.clear()
        for lanes in (self.lanes, self.idle, self.recalled):
            lanes.clear()
        # Nobody tells of what a lane took and never began, nor of a lane that then left; nor, to a
        # wait that was yet to look which of them rest, of those that did.
        for fence in list(self.fences.values()):
            fence.lanes.clear()
        told = () if self.token._reason is None else self.token._sleepers()
        for gate in (*list(self.fences), *told):
            gate.open()
        self.loose.clear()
        if self.abandoned is not None:
            self.queue.clear()  # a thread that was left behind has it for as long as it runs
        failures, queue = tuple(self.failures), deque[Any]()
        # No call from here on, after which a handler could run: these have to come home.
        self.failures, self.strays = [], []  # not emptied, under the hands of who looks into them
        self.winner = self.backend = self.pool = self.judge_error = self.halted_by = None
        self.entry = self.context = self.notice = None
        self.queue, self.bounded = queue, None
        return failures

    def abandon(self, why: str) -> list[str]:
        """
        Stop waiting for what still runs: its handles are cancelled, its threads go on.

        Args:
            why: The reason, for whoever asks the handles.

        Returns:
            What was left behind: a line for each task.
        """
        self.closed = "its with block was left while tasks still ran"
        self.closing = {GOES_ON: False}
        self.abandoned = why
        self.token.cancel(why)
        running = [
            (lane, task) for lane in list(self.lanes) for task in lane.in_hand() if not task._state
        ]
        left: list[str] = []
        for lane, task in running:
            task._abandon()
            left.append(
                f"left behind in group {self.name!r}: task {task.name!r}, submitted at "
                f"{task.site}, in {lane.where}{_waits_for(lane)}"
            )
        for lane, task in running:
            context = self.untold.pop(task, None) or lane.context  # it may be yet to be started
            self.emit("task_abandoned", task, context=context, worker=lane.worker)
        backend = self.backend
        if backend is not None:
            backend.abandon(self)
        return left

    def disown(self) -> None:
        """In a forked child: the group is the parent's, and so are its threads and tasks."""
        self.closed = self.halted_by = "it belongs to the process that this one was forked from"
        self.closing = {GOES_ON: False}  # this thread may be in the middle of a submit
        self.foreign = self.halted = self.disturbed = True
        if self.judging is not None:
            self.judging = threading.RLock()  # another thread may have held it
        self.queue.clear()
        for belongings in (self.lanes, self.idle, self.called, self.recalled, self.claims):
            belongings.clear()
        self.backend = None
        # Nobody wakes this thread any more: if a signal handler has forked, it may be waiting,
        # and an iterator of tasks waits for the next one.
        for fence in list(self.fences.values()):
            fence.lanes.clear()
        watchers = itertools.chain(*list(self.watchers.values()))
        for gate in (*list(self.fences), *watchers, *self.token._sleepers()):
            if isinstance(gate, Gate):
                gate.open()
