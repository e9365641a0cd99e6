"""What becomes of a group's tasks: who decides it, what failed, who is told."""

from __future__ import annotations

import abc
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Protocol

from fastpool import _marks
from fastpool._errors import is_a, strip
from fastpool._lane import At, Lane, handle
from fastpool._scope import OUTSIDE, current
from fastpool._task import CANCELLED, ERROR, NOTHING, VALUE, Failure, Task, label
from fastpool._token import CancelToken
from fastpool._unraisable import unraisable
from fastpool._whole import whole
from fastpool.events import Event, Observer
from fastpool.exceptions import Cancelled
from fastpool.policies import FirstFailure, Judge

if TYPE_CHECKING:
    from fastpool._items import Items
    from fastpool._taskgroup import TaskGroup

__all__ = ["Ledger"]


class Watcher(Protocol):
    """Who waits for a task."""

    def notify(self, task: Task[Any]) -> None:
        """It has ended."""


class _Claim:
    """
    What has been decided about a task by others than the worker that takes it.

    The verdict is a lane (which runs it), a `_Withdrawn` or `GIVEN_BACK`; `setdefault` decides
    once.
    """

    __slots__ = ("_verdicts",)

    def __init__(self) -> None:
        self._verdicts: dict[None, object] = {}

    def decide(self, verdict: object) -> object:
        return self._verdicts.setdefault(None, verdict)

    def verdict(self) -> object:
        return self._verdicts.get(None)


class _Withdrawn:
    """The verdict that a task never runs."""

    __slots__ = ("reason",)

    def __init__(self, reason: object) -> None:
        self.reason = reason


# The verdict that a lane has put a task back into the queue: what is decided of it now is decided
# with another claim.
GIVEN_BACK = object()


class Ledger:
    """
    The books of one group: every task gets one outcome here, and the first failure is found.

    There is no lock on the way of a task. Where several could decide what becomes of a queued
    one (the worker that takes it, a `cancel()`, a waiter that would run it itself, the end of
    the group), they lay a claim; see `Task`.

    Tasks refer to their ledger, so once the group has ended it refers to no task: nothing is a
    cycle, and a failed task's locals die with the last name for it.
    """

    # Slots, since more attributes than thirty are slow to read from a dictionary.
    __slots__ = (
        "__weakref__",
        "abandoned",
        "claims",
        "context",
        "disturbed",
        "failures",
        "first",
        "foreign",
        "group",
        "halted",
        "halted_by",
        "judge",
        "judge_error",
        "judging",
        "late",
        "loose",
        "name",
        "observers",
        "over",
        "strays",
        "token",
        "tokens",
        "told",
        "untold",
        "watchers",
        "winner",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.token = CancelToken()
        self.token._reports_to(self)
        self.group: Callable[[], TaskGroup | None] = lambda: None
        self.observers: tuple[Observer, ...] = ()
        self.context: Context | None = None  # where somebody observes: that of the block's entry
        # The first failure, kept for the `__cause__` of what was cancelled by it; the same one,
        # whoever writes it.
        self.first: BaseException | None = None
        # True whenever a task cannot simply be run: somebody observes, a claim has been laid,
        # a failure was recorded. Only ever set.
        self.disturbed = False
        self.halted = False  # no queued task starts any more; only ever set
        self.halted_by: object = None  # why not; of two reasons at once it is either
        self.over = False  # the block has been left, the lanes are gone; only ever set
        self.foreign = False  # it is the group of the process that this one was forked from
        # Why the block was left though something ran; what that leaves is nobody's any more.
        self.abandoned: str | None = None

        # Ordered by time: appending is atomic, so the first in the list is the first in time;
        # a check and a set would let two workers both find nothing and the later one win.
        self.failures: list[Failure] = []
        self.strays: list[BaseException] = []  # those of them that no task raised
        self.winner: Task[Any] | None = None  # like `judge_error` written with `judging` held
        self.judge: Judge = FirstFailure()
        self.judge_error: BaseException | None = None
        # Whether what the judge is told of came after somebody had cancelled the group. Looked at
        # once, for judge and winner alike; written with `judging` held.
        self.late = False
        # Guards the judge, which gets one outcome at a time. Held by workers only, while they
        # have an outcome in hand; nothing that cancels takes it. None with the default policy,
        # where the first failure decides. It is re-entrant, since a finalizer may run in the
        # middle of a judge, and wait for a task, which the worker runs then.
        self.judging: contextlib.AbstractContextManager[bool] | None = None

        # Each of these is written with single atomic operations.
        self.claims: dict[Task[Any], _Claim] = {}
        self.tokens: dict[Task[Any], CancelToken] = {}  # of running tasks that asked for theirs
        self.loose: list[CancelToken] = []  # of ended tasks, with callbacks perhaps still to run
        self.watchers: dict[Task[Any], list[Watcher]] = {}
        # Where somebody observes: the tasks that have neither started nor been told to be
        # cancelled, with the contexts that they were submitted in. Who pops one tells.
        self.untold: dict[Task[Any], Context] = {}
        self.told: dict[str, object] = {}  # what was said once of the group

    # --- Deciding ---------------------------------------------------------------------------

    def stopping(self) -> bool:
        """Whether no queued task starts any more."""
        # With the default policy the first failure is enough, from the moment it is recorded.
        return (
            self.halted or self.token.cancelled() or (self.judging is None and bool(self.failures))
        )

    def why(self) -> object:
        """The reason of what is cancelled now."""
        reason = self.token.reason
        if reason is not None:
            return reason
        failures = self.failures
        if self.judging is None and failures:
            return failures[0].exception
        for reason in (self.judge_error, self.halted_by):
            if reason is not None:
                return reason
        return "its group has ended"

    def claim(self, task: Task[Any]) -> _Claim:
        """Where it is decided what becomes of a queued task. Look at `_taken` after."""
        self.disturbed = True
        return self.claims.setdefault(task, _Claim())

    def admit(self, task: Task[Any], lane: Lane) -> bool:
        """Whether a lane that took a task off the queue may run it."""
        stopping = self.stopping()
        if stopping:
            self.catch_up()
        claim = self.claim(task) if stopping else self.claims.get(task)
        # Looked at after the claim, which stays until the task has ended: somebody may have run
        # it or withdrawn it, and it is still in the queue.
        verdict: object = None
        if task._lane is None and not task._state:
            verdict = lane
            if claim is not None:
                verdict = claim.decide(_Withdrawn(self.why()) if stopping else lane)
        if verdict is lane:
            task._lane = lane
            return True
        if isinstance(verdict, _Withdrawn):
            self.never_ran(task, verdict)
        self.claims.pop(task, None)
        return False

    def withdraw(self, task: Task[Any], reason: object) -> bool:
        """Keep a queued task from ever running. False if it is too late."""
        withdrawn = _Withdrawn(reason)
        verdict: object = GIVEN_BACK
        while verdict is GIVEN_BACK:
            claim = self.claim(task)
            # Who ran it, or withdrew it, took the claim away with it, but has left a lane or a
            # state.
            decided = task._taken or task._lane is not None or bool(task._state)
            verdict = None if decided else claim.decide(withdrawn)
        won = verdict is withdrawn
        if won:
            try:
                self.never_ran(task, withdrawn)
            except BaseException:  # what a signal handler raised: somebody may be waiting
                whole(self.never_ran, task, withdrawn)
                raise
        # Laid first and looked at then: `end` says that it is over first and lets go then.
        if self.over or (not won and task._state):
            self.claims.pop(task, None)
        return won

    def settle(self, task: Task[Any]) -> bool:
        """Whether a task has ended, where it may be that it is only never going to start."""
        if self.over or self.foreign:
            # What runs on was left behind, which is a state. A lane that has taken something and
            # not come to it yet never runs it, or its thread is not in this process.
            if not task._state:
                self.let_go(task, self.why())
            return True
        if self.stopping() and not task._taken:
            self.catch_up()
            self.withdraw(task, self.why())
        claim = self.claims.get(task)
        verdict = None if claim is None else claim.verdict()
        if isinstance(verdict, _Withdrawn):
            self.never_ran(task, verdict)
        return bool(task._state)

    def never_ran(self, task: Task[Any], withdrawn: _Withdrawn) -> None:
        """A task is done without having run. May be said more than once, by several threads."""
        self.let_go(task, withdrawn.reason)
        if self.watchers:
            self.notify(task)
        if self.untold:
            # If the group has ended, it is told by the one who has closed it.
            self.while_open(lambda: self.tell_never_ran(task))

    def let_go(self, task: Task[Any], reason: object) -> None:
        """Make it final that a task never runs, and keep nothing of the call but its function."""
        task._args = ()
        if task._kwargs:
            task._kwargs = NOTHING
        task._context = None  # it may lead back to the task, through the one that submitted it
        task._value = reason
        task._state = CANCELLED

    def cancel_task(self, task: Task[Any], reason: object) -> bool:
        """`Task.cancel`."""
        if task.done():
            return False
        if self.withdraw(task, reason):
            return True
        if task.done() or not self.token_for(task).cancel(reason):
            return False
        lane = task._lane
        if lane is not None:
            lane.task_cancelled(task, reason)
        return True

    # --- Tokens of tasks ----------------------------------------------------------------------

    def token_for(self, task: Task[Any]) -> CancelToken:
        """A task's own token, made now if it has none."""
        fresh = CancelToken()
        fresh._link(self.token, strongly=True)
        token = self.tokens.setdefault(task, fresh)
        if token is not fresh:
            fresh._seal()
        task._own = token
        # It may have ended meanwhile: it says so first and looks for a token then.
        if task._state or self.over:
            self.close_token(task)
        return token

    def close_token(self, task: Task[Any]) -> None:
        """A task has ended: nothing sets its token any more."""
        token = self.tokens.pop(task, None)
        if token is None or token._seal():
            return
        task._keep_token(token)
        if token._callbacks():
            self.loose.append(token)

    # --- Outcomes -----------------------------------------------------------------------------

    def started(self, task: Task[Any], lane: Lane) -> None:
        """A lane is about to run a task."""
        if self.observers:
            lane.since = time.monotonic()
            lane.context = self.untold.pop(task, None)
            self.emit("task_started", task, context=lane.context)

    def succeeded(self, task: Task[Any], lane: Lane, value: object) -> None:
        """A task has returned."""
        if task._is_abandoned():
            self.ended(task, CANCELLED, None)
            self.tell_ended("task_succeeded", task, lane)
            return
        self.ended(task, VALUE, value)
        tells = False
        if self.judging is not None:
            with self.judging:
                stop = self.consult(task, None)
            if stop:
                tells = self.shall_tell_cancelled()
                self.cancel_rest()
        if self.watchers:
            self.notify(task)
        self.tell_ended("task_succeeded", task, lane)
        if tells:
            self.emit("group_cancelled", context=self.context)

    def all_succeeded(self, places: Sequence[At], lane: Lane, values: list[Any]) -> None:
        """Tasks have returned, in another process."""
        slowly = bool(self.observers) or self.judging is not None
        fn: object = None
        name = ""
        for at, value in zip(places, values, strict=False):
            # Before we look whether the group was abandoned, which puts others in their place.
            states = at[1].items.states if isinstance(at, tuple) else []
            if slowly or self.abandoned is not None:
                self.succeeded(handle(at), lane, value)
            elif isinstance(at, tuple):  # as in `threads.serve_stretch`
                index, items = at[0], at[1].items
                items.values[index] = value
                states[index] = VALUE
                if index in items.handles:
                    self.item_ended(items, index)
                if items.listener is not None:
                    items.listener.arrive(items.first + index)
            else:  # as in `threads.serve`
                if at._fn is not fn:
                    fn = at._fn
                    name = label(fn)
                at._fn = name
                at._args = ()
                if at._kwargs:
                    at._kwargs = NOTHING
                at._context = None
                at._value = value
                at._state = VALUE
                if self.tokens:
                    self.close_token(at)
                if self.claims:
                    self.claims.pop(at, None)
                if self.watchers:
                    self.notify(at)

    def failed(self, task: Task[Any], lane: Lane, error: BaseException) -> None:
        """A task has raised, whatever it was."""
        traceback = strip(error)
        if task._is_abandoned():
            self.ended(task, CANCELLED, None)
            self.tell_ended("task_failed", task, lane, error)
            return
        own = self.tokens.get(task)
        heard = self.token if own is None else own
        if is_a(error, Cancelled) and heard.cancelled():
            if own is None or not own._set_itself():
                self.stopped(task, lane, error)
                return
            late = TimeoutError(f"task {task.name!r} timed out after {task._options.timeout:g} s")
            late.__cause__ = error
            error = BaseException.with_traceback(late, traceback)
        if own is not None:
            # First: who meets the failure sets the group's token, and this one would hear that
            # and hold what its task has raised, whose frames may hold it: a cycle.
            own._seal()
        # In this order: the failure is recorded, the task is done, the token is set, waiters
        # wake, callbacks run. Were the token set first, the echo of a woken sibling could be
        # recorded before the failure itself. Who is to tell of the cancel is settled before, too,
        # so that the failure is told first, and not by a sibling that hears of it.
        if self.judging is None:
            stop = True
            tells = self.shall_tell_cancelled()
            self.ended(task, ERROR, (error, traceback, self.record(task, error)))
        else:
            with self.judging:
                self.ended(task, ERROR, (error, traceback, self.record(task, error)))
                stop = self.consult(task, error)
            tells = stop and self.shall_tell_cancelled()
        if stop:
            self.cancel_rest()
        if self.watchers:
            self.notify(task)
        self.tell_ended("task_failed", task, lane, error)
        if tells:
            self.emit("group_cancelled", context=self.context)

    def stopped(self, task: Task[Any], lane: Lane, error: BaseException | None = None) -> None:
        """A task has ended in `Cancelled`, and its own token was set."""
        own = self.tokens.get(task)
        reason = (self.token if own is None else own).reason
        self.ended(task, CANCELLED, "its group was cancelled" if reason is None else reason)
        if self.watchers:
            self.notify(task)
        self.tell_ended("task_cancelled", task, lane, error)

    def ended(self, task: Task[Any], state: int, value: object) -> None:
        """Make an outcome final, and keep nothing of the call."""
        fn = task._fn
        task._fn = fn if isinstance(fn, str) else label(fn)
        task._args = ()
        if task._kwargs:
            task._kwargs = NOTHING
        task._context = None
        task._value = value
        task._state = state
        if self.tokens:
            self.close_token(task)
        if self.claims:
            self.claims.pop(task, None)

    def item_ended(self, items: Items, index: int) -> None:
        """A call of a `map` has returned: as `ended`, if somebody has its handle."""
        task = items.known(index)
        if task is not None:
            task._context = None
            self.close_token(task)
            self.claims.pop(task, None)
            self.notify(task)

    def broken(self, lane: Lane, error: BaseException) -> None:
        """
        A lane has failed, not its task: out of memory, say. So the group has.

        What it was at fails with that, and what it has taken besides never runs.
        """
        traceback = strip(error)
        taken = [
            task
            for task in lane.in_hand()
            # It may have been about to ask whether it may run it.
            if not task._state and (task._lane is lane or self.admit(task, lane))
        ]
        if not taken:
            self._report(error)
            for task in lane.in_hand():
                self.notify(task)  # as that may be what failed
            return
        task, *others = taken
        order = next((at for at, of in enumerate(self.failures) if of.task is task), None)
        if order is None:
            self.ended(task, ERROR, (error, traceback, self.record(task, error)))
        else:  # its own failure, which was yet to be told
            error = self.failures[order].exception
            self.ended(task, ERROR, (error, strip(error), order))
        self.halt(error)
        self.cancel_rest()
        for other in others:
            self.never_ran(other, _Withdrawn(error))
        self.notify(task)
        if task in self.untold:
            lane.context = self.untold.pop(task, None)
        self.tell_ended("task_failed", task, lane, error)

    def record(self, task: Task[Any] | None, error: BaseException) -> int:
        """Note a failure; its place in time."""
        self.disturbed = True
        failures = self.failures
        if task is None or not any(stray is error for stray in self.strays):
            failures.append(Failure(task, error))
            if self.first is None:
                self.first = failures[0].exception
        # else it is the same object again, on its way out through the task it was raised in.
        # It was the last one a moment ago, so look from the end.
        for order in range(len(failures) - 1, -1, -1):
            failure = failures[order]
            if failure.exception is error and (failure.task is task or failure.task is None):
                return order
        return len(failures)  # a stray that is just being noted

    def consult(self, task: Task[Any], error: BaseException | None) -> bool:
        """Tell the judge of an outcome; whether to cancel the rest. With `judging` held."""
        self.late = self.stopping()
        try:
            stop = bool(self.judge.outcome(task, error))
        except BaseException as broken:  # it leaves the block in place of what `end` says
            strip(broken)
            if self.judge_error is None:
                self.judge_error = broken
            stop = True
        if is_a(error, KeyboardInterrupt, SystemExit):
            stop = True
        if stop and error is None and self.judge_error is None and not self.late:
            self.winner = task
        if stop:
            self.halt(f"task {task.name!r} was enough" if error is None else error)
        return stop

    def halt(self, reason: object) -> None:
        """No queued task starts any more; the token is to be set now."""
        if self.halted_by is None:
            self.halted_by = reason
        self.halted = True

    def catch_up(self) -> None:
        """
        Set the token for a worker that has recorded a failure and has not come to that yet.

        Whoever meets the recorded failure, and so finds the group `stopping`, does so, or would
        hear of a cancelled sibling before its own token is set.
        """
        if not self.token.cancelled():
            self.cancel_rest()

    def cancel_rest(self) -> None:
        """Set the token, by what was recorded first."""
        failures = self.failures
        if self.judging is None and failures:
            # Whose failure that was may not have come to this yet, and is done before.
            task, error = failures[0].task, failures[0].exception
            if task is not None and not task._state:
                self.ended(task, ERROR, (error, strip(error), 0))
        reason = self.why()
        if is_a(reason, BaseException):
            self.token._fail(reason)
        else:
            self.token.cancel(reason)

    def _report(self, error: BaseException) -> None:
        """
        Record a failure that no task had, and set the token: of the body, of an input, or of a
        call that was given the group's token.
        """
        if self.over:
            return
        self.note_stray(error)
        self.halt(error)
        self.cancel_rest()

    def note_stray(self, error: BaseException) -> None:
        """Record a failure that no task had."""
        if not any(failure.exception is error for failure in self.failures):
            self.strays.append(error)
            self.record(None, error)

    # --- Telling ------------------------------------------------------------------------------

    def watch(self, task: Task[Any], watcher: Watcher) -> None:
        """Be told when a task ends. Look at the task after, not before."""
        self.watchers.setdefault(task, []).append(watcher)

    def unwatch(self, task: Task[Any], watcher: Watcher) -> None:
        """No more."""
        watchers = self.watchers.get(task)
        if watchers is not None:
            with contextlib.suppress(ValueError):
                watchers.remove(watcher)
            # An empty list stays until the task ends: somebody may be about to add to it.
            if task._state and not watchers:
                self.watchers.pop(task, None)

    def notify(self, task: Task[Any]) -> None:
        """Wake who waits for a task."""
        watchers = self.watchers.get(task)
        if watchers is None:
            return
        try:
            watchers = self.watchers.pop(task, [])  # a handler that raises at its end loses none
            for watcher in tuple(watchers):  # others may take theirs off it now
                watcher.notify(task)
        except BaseException:
            self.watchers.setdefault(task, []).extend(watchers)  # to be told again: see `broken`
            raise

    @_marks.swallows
    def emit(
        self,
        name: str,
        task: Task[Any] | None = None,
        *,
        context: Context | None = None,
        since: float | None = None,
        error: BaseException | None = None,
        worker: str | None = None,
    ) -> None:
        """
        Tell the observers.

        Args:
            name: What happened.
            task: To which task; `None` if to the group.
            context: In whose copy they are called; nobody may have entered it. `None`: ours.
            since: When what has ended had begun.
            error: What it ended with.
            worker: In which thread, if not in this one.
        """
        if not self.observers:
            return
        now = time.monotonic()
        if worker is None:
            worker = threading.current_thread().name
        duration = None if since is None else now - since
        event = Event(name, self.group(), task, worker, now, duration, error)
        # A copy, so that nothing they note in it reaches a task, and no two threads enter one.
        context = copy_context() if context is None else context.copy()
        context.run(self._tell, event)

    @_marks.swallows
    def _tell(self, event: Event) -> None:
        current.set(OUTSIDE)  # they are no part of the group, and are not cancelled with it
        for observer in self.observers:
            try:
                observer(event)
            except BaseException as broken:  # it watches from the side, and changes no outcome
                unraisable(broken, observer)

    def tell_ended(
        self, name: str, task: Task[Any], lane: Lane, error: BaseException | None = None
    ) -> None:
        """Tell how a task ended that had started."""
        if self.observers:
            self.emit(name, task, context=lane.context, since=lane.since, error=error)
            lane.context = None

    def tell_never_ran(self, task: Task[Any]) -> None:
        """Tell, if nobody has, that a task is done without having run."""
        context = self.untold.pop(task, None)
        if context is not None:
            self.emit("task_cancelled", task, context=context)

    def shall_tell_cancelled(self) -> bool:
        """Whether it is the caller who tells that the group was cancelled; True for one alone."""
        me = object()
        return bool(self.observers) and self.told.setdefault("cancelled", me) is me

    def tell_cancelled(self) -> None:
        """Tell that the group was cancelled, if it was and nobody does."""
        if self.token.cancelled() and self.shall_tell_cancelled():
            self.emit("group_cancelled", context=self.context)

    @abc.abstractmethod
    def while_open(self, fn: Callable[[], object]) -> bool:
        """Call something, and keep the group from ending meanwhile; False if it has. See `Run`."""
