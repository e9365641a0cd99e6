"""Processes of this machine: each lane has a worker of its own, with pipes of its own."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import os
import pickle
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, TypeVar

from fastpool import _clock, _token
from fastpool._descriptor import Descriptor
from fastpool._errors import in_words, strip
from fastpool._lane import At, Lane, handle
from fastpool._task import NOTHING, PLAIN, Task
from fastpool.backends import _process
from fastpool.backends._process import WorkerProcess
from fastpool.backends._wire import (
    FOLLOWS,
    LONG,
    PROTOCOL,
    Far,
    cannot_return,
    dump_function,
    dump_reason,
    load_error,
    load_reason,
)
from fastpool.backends.threads import Crew, Leased
from fastpool.exceptions import WorkerDiedError

if TYPE_CHECKING:
    from fastpool._run import Run

__all__ = ["Processes", "default"]

T = TypeVar("T")

KILL_AFTER = 30.0  # seconds, well after the report of a task that does not stop
SLICE = 0.002  # seconds after which a worker sends home what it has, so that nothing waits long
HELD = 5 * SLICE  # ...and after which what one call holds up is taken back
MOST = 1024  # calls that are shipped at once
GROWTH = 8  # times as many the next time, as long as they are quick; the slice bounds the rest
BULK = 1 << 16  # bytes that a batch is to come to, with what it brings home
MOST_WORKERS = 10_000
HOMEWARD = 5.0  # seconds that what tasks came to has to come home though its worker is overdue
DAY = 86_400.0  # seconds; `poll` takes no more than 24 of them
KNOWN = 256  # functions that a worker is trusted to remember, beyond those of one message
STARTS = 3  # workers that may die one after another before they have begun a task
REST, END = (pickle.dumps((word,), PROTOCOL) for word in ("rest", "end"))

_CPUS: int = getattr(os, "process_cpu_count", os.cpu_count)() or 1

_numbers = itertools.count(1)  # of runs, for the workers


class Processes:
    """
    The backend of a group whose tasks run in processes of this machine.

    Args:
        workers: How many processes at most; `None`: as many as there are processors.
        start_method: `"forkserver"` or `"spawn"`; `None`: the first where there is one.
        initializer: Called in each process before its first task.
        initargs: Its arguments.
        kill_after: Seconds after which a process is killed whose task has not stopped, after the
            cancel of its group or its own, or the end of its own timeout. One that has yet to
            begin a task is killed for its group alone. `None`: never.
        context_vars: The context variables that go along with a task, with what they are set to
            where it is submitted; each is a variable of a module.

    Raises:
        ValueError, TypeError: If one of them cannot be meant.
    """

    remote = True

    def __init__(
        self,
        workers: int | None = None,
        *,
        start_method: str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Sequence[Any] = (),
        kill_after: float | None = KILL_AFTER,
        context_vars: Sequence[contextvars.ContextVar[Any]] = (),
    ) -> None:
        if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool)):
            raise TypeError(f"workers must be a whole number, not {workers!r}")
        if workers is not None and not 1 <= workers <= MOST_WORKERS:
            raise ValueError(f"workers must be between 1 and {MOST_WORKERS}, not {workers!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a function, not {initializer!r}")
        self.slots = workers or _CPUS
        self._context = _process.context_for(start_method)
        self._start = _process.dump_start(initializer, tuple(initargs))
        self._kill_after = _clock.seconds(kill_after, "kill_after")
        self._variables = [_place_of(variable) for variable in context_vars]
        self._crew = Crew(_serve, self._lane, _Lane.leave, _Lane.disown)
        # Each of these is written with single atomic operations.
        self._leases: dict[Run, Leased] = {}
        self._serving: dict[_Lane, Run] = {}
        self._numbers: dict[Run, int] = {}  # what the workers know a group by

    def _lane(self, pool: object, number: int) -> _Lane:
        return _Lane(pool, number, self)

    def start_lane(self, run: Run, enlist: Callable[[Lane], None]) -> None:
        """Wake a thread that has a worker, or start one that gets one."""
        _process.refuse_in_import()
        lease = self._leases.get(run)
        if lease is None:
            lease = self._leases.setdefault(run, Leased(self.slots, self._crew))
        lease.start_lane(run, enlist)

    def cancel(self, run: Run) -> None:
        """The lanes hear the group's token themselves, and tell their workers."""

    def escalate(self, run: Run, level: int) -> bool:
        """Kill the workers that are at work."""
        if level < 2:
            return False
        self._kill(run)
        return True

    def _kill(self, run: Run) -> None:
        for lane in list(self._serving):
            if self._serving.get(lane) is run:
                lane.kill()

    def end(self, run: Run) -> None:
        """The workers are for the next group."""
        self._numbers.pop(run, None)
        lease = self._leases.get(run)
        if lease is not None:
            for lane in (*run.idle, *run.recalled):
                if isinstance(lane, _Lane):
                    lane.forget()
            lease.end(run)
            self._leases.pop(run, None)

    def abandon(self, run: Run) -> None:
        """What still runs is killed."""
        lease = self._leases.pop(run, None)
        if lease is not None:
            lease.abandon(run)
        self._kill(run)

    def number_of(self, run: Run) -> int:
        """What the workers know a group by."""
        number = self._numbers.get(run)
        if number is None:
            number = self._numbers.setdefault(run, next(_numbers))
            if run.over:  # looked at after that: who ends it does the reverse
                self._numbers.pop(run, None)
        return number

    def carries(self) -> bool:
        """Whether anything of a task's context may go along with it."""
        logged = sys.modules.get("structlog.contextvars")
        return bool(self._variables or (logged is not None and logged._CONTEXT_VARS))

    def start_worker(self) -> WorkerProcess:
        """A new one, which will say when it is ready."""
        return _process.start_worker(self._context, self._start)

    def variables(self, task: Task[Any]) -> tuple[dict[str, Any], list[Any]] | None:
        """What goes along with a task of the context that it was submitted in."""
        context = task._context
        if context is None:  # it has been withdrawn meanwhile
            return None
        logged = sys.modules.get("structlog.contextvars")
        bound: dict[str, Any] = {}
        if logged is not None:
            bound = context.run(logged.get_contextvars)
        named = [
            (module, name, context[variable])
            for module, name, variable in self._variables
            if variable in context
        ]
        return (bound, named) if bound or named else None


class _Died(Exception):
    """The worker has died, and what it was at is known by its progress."""


class _Lane(Lane):
    """
    A thread that ships tasks to one worker, and takes home what they come to.

    It alone writes, but for `_orders`, which others append to, and `_killed`, which they set.
    """

    __slots__ = (
        "_asked",
        "_backend",
        "_batch",
        "_bell",
        "_done",
        "_due",
        "_far",
        "_first",
        "_killed",
        "_next",
        "_orders",
        "_overdue",
        "_size",
        "_took",
        "_untold",
    )

    def __init__(self, pool: object, number: int, backend: Processes) -> None:
        super().__init__(pool, number)
        self._backend = backend
        self._far: WorkerProcess | None = None
        self._batch: list[At] = []
        self._first = 0  # the number of the first of them, as the worker counts
        self._next = 0  # no number is used again: what was said of it may come late
        self._took = 0.0  # seconds of the worker's, for the batch before
        self._size = 0  # bytes that it came to, there and back
        self._bell: Descriptor | None = None
        self._done: Descriptor | None = None  # opened by a helper that has sent or received
        self._orders: deque[tuple[Task[Any], object]] = deque()
        self._untold: deque[tuple[int, Far]] = deque()  # those that the worker is yet to hear of
        self._asked = False  # it wants to know when it has heard of all
        self._killed = False
        # When the worker is killed for a call that was cancelled or is late, and how long that
        # may go on, by the call's number.
        self._due: dict[int, tuple[float, float | None]] = {}
        self._overdue = False  # it was

    # --- Asked by others ---------------------------------------------------------------------

    @property
    def task(self) -> Task[Any] | None:
        batch, far = self._batch, self._far
        if not batch:
            return None
        at = -1 if far is None else far.shared.at - self._first
        return handle(batch[min(max(at, 0), len(batch) - 1)])

    def in_hand(self) -> list[Task[Any]]:
        return [task for task in map(handle, self._batch) if not task._state]

    def let_go(self) -> None:
        self._batch, self.at = [], None

    def task_cancelled(self, task: Task[Any], reason: object) -> None:
        self._orders.append((task, reason))
        far, bell = self._far, self._bell
        if far is not None:
            far.shared.ordered = True  # after the order: the worker asks for it before it goes on
        if bell is not None:
            bell.open()

    def kill(self) -> None:
        """Kill the worker, if it is at something."""
        self._killed = True
        bell = self._bell
        if bell is not None:
            bell.open()

    def forget(self) -> None:
        """The group has ended: nothing of it stays in the worker, nor here."""
        far = self._far
        if far is not None:
            far.known.clear()
            far.rest(END)

    @property
    def worker(self) -> str:
        far = self._far
        return super().worker if far is None else far.name

    @property
    def where(self) -> str:
        far = self._far
        return super().where if far is None else far.name

    def far_stack(self) -> str | None:
        far = self._far
        return None if far is None else far.stack()

    # --- Serving -----------------------------------------------------------------------------

    def serve(self, run: Run) -> None:
        """Run a group's tasks until there is nothing to do."""
        number = self._backend.number_of(run)
        self._killed = False
        self._bell = bell = Descriptor()
        self._done = Descriptor()
        self._backend._serving[self] = run
        key = run.token._add_sleeper(bell)
        most = 1
        try:
            while True:
                batch = run.take_places(self, most)
                if not batch:
                    if run.rest(self):
                        return
                    continue
                self.at, self._batch = batch[0], batch
                if run.abandoned is not None:  # as in `Run.perform`
                    self.let_go()
                    return
                done = self._ship(run, number, batch, bell)
                if run.observers:
                    continue
                if self._size >= BULK:
                    most = max(1, min(done, len(batch) * BULK // self._size))
                elif done < len(batch):
                    most = max(1, done)
                elif self._took < SLICE:
                    fair = len(run.queue) // (2 * self._backend.slots)
                    most = max(1, min(GROWTH * most, fair, MOST))
        finally:
            self._backend._serving.pop(self, None)
            self._bell = self._done = None
            self._orders.clear()
            run.token._remove(key)
            if self._far is not None:
                self._far.rest(REST)

    def _ship(self, run: Run, number: int, batch: list[At], bell: Descriptor) -> int:
        """Have a batch run; how many of it have ended."""
        if run.observers:
            run.started(handle(batch[0]), self)
        ended = 0  # of those that the worker has: the first so many
        died: BaseException = _Died()
        try:
            for _ in range(STARTS):
                try:
                    far = self._ready_worker(run, number, bell)
                except WorkerDiedError as error:
                    strip(error)
                    died = error
                    if self._killed:
                        break
                    continue
                try:
                    ended = self._take_home(run, far, number, bell)
                except BaseException as error:
                    # Whatever it was: what the worker says next would be taken for something else.
                    try:
                        early = self._bury(run, far, error)
                    except BaseException as wrong:
                        if wrong is not error:
                            run.broken(self, wrong)  # what was begun runs no second time
                        raise
                    if early is not None and not self._killed:
                        died = early
                        continue
                break
            else:
                raise died
        except BaseException as error:
            BaseException.with_traceback(error, None)  # ours, which holds all that this frame does
            first = next((task for task in map(handle, self._batch) if not task._state), None)
            if run.stopping():
                pass  # another lane has said so already, or nobody wants it any more
            elif first is None:
                run.broken(self, error)
            else:
                run.failed(first, self, error)
        finally:
            del died  # it refers to this frame
            rest = [task for task in map(handle, self._batch[ended:]) if not task._state]
        if rest and run.observers and run.stopping():
            run.stopped(rest.pop(), self)  # there is but one, and it is told to have started
        try:
            if rest:
                self._give_back(run, rest)
        finally:
            self.let_go()  # only now: who looks for them finds them here or there
        if run.fences:
            run.passed(self)
        return len(batch) - len(rest)

    def _ready_worker(self, run: Run, number: int, bell: Descriptor) -> WorkerProcess:
        far = self._far
        if far is not None and far.has_ended():
            self.leave()
            far = None
        if far is None:
            far = self._far = self._backend.start_worker()
            what: Any = None
            try:
                hello = self._await(run, far, number, bell, shipped=False)
                word, what = pickle.loads(hello)
            except (EOFError, OSError):
                word = "died"  # not raised here: the one would hold the other
            except BaseException:
                far.kill()
                self.leave()
                raise
            if word == "died":
                why = far.never_came()
                self.leave()
                raise why
            if word == "failed":
                self.leave()
                raise load_error(what, "initializer", far.name)
        return far

    def _take_home(self, run: Run, far: WorkerProcess, number: int, bell: Descriptor) -> int:
        """Have the worker run the batch; how many of it have ended."""
        self._first = self._next  # where the worker is, is before that until it has begun
        far.shared.recalled = far.shared.over = False
        self._due.clear()
        self._overdue = self._asked = False
        self._untold.clear()
        _token.messages.writing = run.token, number
        try:
            message = self._encode(run, far, number)
            if not self._batch or run.stopping():
                far.known.clear()  # the functions of this message are not known over there
                return 0
            word, self._took, *rest = self._ask(run, far, number, message, bell)
            if word == "unread":
                far.known.clear()  # the functions were not read, either
                message = self._encode(run, far, number, singly=True)
                if not self._batch:
                    return 0
                word, self._took, *rest = self._ask(run, far, number, message, bell)
        finally:
            _token.messages.writing = None
        batch = self._batch
        if word == "values":
            values = rest[0]
            run.all_succeeded(batch, self, values)
            return len(values)
        if word == "stopped":
            values, (how, what) = rest
            run.all_succeeded(batch, self, values)
            self._report(run, far, handle(batch[len(values)]), how, what)
            return len(values) + 1
        self._report_each(run, far, rest[0])
        return len(rest[0])

    def _encode(self, run: Run, far: WorkerProcess, number: int, *, singly: bool = False) -> bytes:
        """
        The message that has the worker run the batch.

        What cannot be sent fails, and is no longer in the batch then; it may be empty.

        Args:
            singly: Whether each call is pickled by itself, as it is anyway if one cannot be.
        """
        functions: dict[int, bytes] = {}
        if len(far.known) > KNOWN:  # each access to a method makes another one
            far.known.clear()

        def key_of(fn: Any) -> int:
            entry = far.known.get(id(fn))
            if entry is None:
                entry = fn, len(far.known)
                functions[entry[1]] = dump_function(fn)
                far.known[id(fn)] = entry
            return entry[1]

        def message(key: int | None, calls: list[Any]) -> bytes:
            first, self._next = self._next, self._next + len(calls)
            self._first = first
            header = ("run", number, first, run.token.remaining(), SLICE, functions)
            return pickle.dumps((*header, key, calls), PROTOCOL)

        simple = not (singly or run.tokens or self._backend.carries())
        plain = _plain(self._batch) if simple else None
        if plain is not None:
            fn, arguments = plain
            with contextlib.suppress(BaseException):  # each by itself, then
                return message(key_of(fn), arguments)
        tasks: list[Task[Any]] = []
        calls: list[Any] = []
        for task in map(handle, self._batch):
            own = run.tokens.get(task)
            if own is not None and own.cancelled():  # it was, while no worker had it
                run.stopped(task, self)
                continue
            try:
                call = key_of(task._fn), task._args
            except BaseException as error:
                run.failed(task, self, error)
                continue
            more = task._kwargs, task._options.timeout, self._backend.variables(task)
            calls.append(call if more == (NOTHING, None, None) else call + more)
            tasks.append(task)
        self._batch = [*tasks]
        if not singly:
            with contextlib.suppress(BaseException):
                return message(None, calls)
        sent: list[At] = []
        pickled: list[bytes] = []
        for task, call in zip(tasks, calls, strict=True):
            try:
                pickled.append(pickle.dumps(call, PROTOCOL))
            except BaseException as error:
                wrong = TypeError(
                    f"the arguments of task {task.name!r} cannot be sent to a worker process: "
                    f"{in_words(error)}"
                )
                wrong.__cause__ = error
                run.failed(task, self, wrong)
            else:
                sent.append(task)
        self._batch = sent
        return message(None, pickled)

    def _ask(
        self, run: Run, far: WorkerProcess, number: int, message: bytes, bell: Descriptor
    ) -> tuple[Any, ...]:
        try:
            if len(message) <= LONG:
                far.calls.send_bytes(message)
            else:
                self._in_helper(run, far, number, bell, lambda: far.calls.send_bytes(message))
            while True:
                reply = self._receive(run, far, number, bell)
                self._size = len(message) + len(reply)
                try:
                    answer: tuple[Any, ...] = pickle.loads(reply)
                except BaseException:  # one of the values; each by itself, then
                    far.calls.send_bytes(pickle.dumps(("again",), PROTOCOL))
                    answer = pickle.loads(self._receive(run, far, number, bell))
                if answer[0] == "set":
                    self._set(run, number, *answer[1:])
                elif answer[0] == "ordered":
                    self._asked = True
                elif answer[0] == "so far":
                    ended = len(answer[1])
                    self._report_each(run, far, answer[1])
                    self._first, self._batch = self._first + ended, self._batch[ended:]
                else:
                    return answer
        except (EOFError, OSError) as error:
            raise _Died from error

    def _receive(self, run: Run, far: WorkerProcess, number: int, bell: Descriptor) -> bytes:
        reply = self._await(run, far, number, bell)
        if reply == FOLLOWS:
            reply = self._in_helper(run, far, number, bell, far.calls.recv_bytes)
        return reply

    def _in_helper(
        self, run: Run, far: WorkerProcess, number: int, bell: Descriptor, call: Callable[[], T]
    ) -> T:
        """Send or receive much in a helper, and hear meanwhile what else there is."""
        done = self._done
        assert done is not None  # while it serves
        values: list[T] = []
        errors: list[BaseException] = []

        def make() -> None:
            try:
                values.append(call())
            except BaseException as error:
                errors.append(error)
            done.open()

        _clock.run_in_helper(make)
        try:
            self._await(run, far, number, bell, shipped=False, until=done)
        except BaseException as error:
            far.hang_up()
            connection.wait([done.fileno()])
            if not isinstance(error, EOFError):  # it has died; all of an answer may have come
                raise
        finally:
            done.clear()
        if errors:
            raise errors[0]
        return values[0]

    def _set(self, run: Run, number: int, of: int, failed: bool, reason: Far) -> None:
        """A task has set its group's token over there."""
        if of != number:
            return  # of a group that has ended
        why = load_reason(reason)
        if failed and isinstance(why, BaseException):
            run.token._report(why)
        else:
            run.token.cancel(why)

    def _await(
        self,
        run: Run,
        far: WorkerProcess,
        number: int,
        bell: Descriptor,
        *,
        shipped: bool = True,
        until: Descriptor | None = None,
    ) -> bytes:
        """
        What the worker answers; meanwhile it is told of cancels, and killed in the end.

        Args:
            shipped: Whether it has the batch.
            until: Have it that this opens, and not an answer, that is awaited.
        """
        poll = select.poll()
        awaited = far.calls.fileno() if until is None else until.fileno()
        for fd in (awaited, far.sentinel, bell.fileno()):
            poll.register(fd, select.POLLIN)
        told = untold = homeward = False
        kill_after = self._backend._kill_after
        deadline = held = math.inf
        spared = -math.inf if until is None else time.monotonic() + HOMEWARD
        if shipped and len(self._batch) == 1:
            self._limit_last(kill_after)
        elif shipped and not far.shared.recalled:
            held = time.monotonic() + HELD
            spared = math.inf  # until what is behind is taken back: the kill is to meet no other
        while True:
            now = time.monotonic()
            if now >= deadline and far.shared.over and not homeward:
                homeward, deadline = True, deadline + HOMEWARD
            if self._killed or run.abandoned is not None or now >= deadline:
                self._killed, deadline = True, math.inf
                far.kill()
            elif run.token.cancelled() and not told:
                told = True
                cause = run.token._cause
                assert cause is not None
                far.tell("cancel", number, dump_reason(cause.reason), cause.failure is not None)
                if kill_after is not None:
                    deadline = cause.at + kill_after
            if shipped and (self._orders or self._untold or self._asked):
                self._pass_on(far)
            if now >= held:
                held = math.inf
                self._recall(run, far)
                self._limit_last(kill_after)
                spared = now + HOMEWARD if len(self._batch) > 1 else now  # what is before it
            if now >= spared and self._is_overdue(far, now):
                self._overdue = True
                far.kill()
            moment = min(deadline, held, *(max(due, spared) for due, _ in self._due.values()))
            if untold is not (shipped and bool(self._untold)):
                if untold:
                    poll.unregister(far.control.fileno())
                else:
                    poll.register(far.control.fileno(), select.POLLOUT)
                untold = not untold
            left = min(max(0.0, moment - time.monotonic()), DAY)
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if bell.fileno() in ready:
                bell.clear()
            if until is not None and awaited in ready:
                return b""
            if until is None and (awaited in ready or far.calls.poll()):
                reply: bytes = far.calls.recv_bytes()
                return reply
            if far.sentinel in ready:
                raise EOFError

    def _recall(self, run: Run, far: WorkerProcess) -> None:
        """
        A call takes its time. What is behind it goes to others, which it may even wait for, and
        what is before it comes home.
        """
        far.shared.recalled = far.shared.ordered = True  # in this order: it looks at the other one
        far.tell("so far")
        # Looked at after it was said: the worker does the reverse, and so has begun no other one.
        begun = max(far.shared.at - self._first, 0) + 1
        rest = [task for task in map(handle, self._batch[begun:]) if not task._state]
        try:
            self._give_back(run, rest)
        finally:
            self._batch = self._batch[:begun]

    def _give_back(self, run: Run, tasks: list[Task[Any]]) -> None:
        """Have others run what the worker has not begun; none of it is lost if that fails."""
        try:
            run.give_back(tasks, self)
        except BaseException as error:
            run.untake([task for task in tasks if task._lane is self], self, error)
            raise

    def _pass_on(self, far: WorkerProcess) -> None:
        """Tell the worker which of its tasks have been cancelled."""
        numbers = {handle(at): number for number, at in enumerate(self._batch, self._first)}
        kill_after = self._backend._kill_after
        while self._orders:
            task, reason = self._orders.popleft()
            if task in numbers:
                self._untold.append((numbers[task], dump_reason(reason)))
                if kill_after is not None:
                    self._due[numbers[task]] = time.monotonic() + kill_after, kill_after
        while self._untold and far.hears():
            far.tell("cancel task", *self._untold.popleft())
        if self._asked and not self._untold:
            self._asked = False
            far.tell("all told")

    def _limit_last(self, kill_after: float | None) -> None:
        """See to it that a call which has a timeout of its own does not go on for ever."""
        if not self._batch:
            return
        at, number = self._batch[-1], self._first + len(self._batch) - 1
        options = at[1].items.options if isinstance(at, tuple) else at._options
        if options.timeout is not None and kill_after is not None and number not in self._due:
            span = max(0.0, options.timeout) + kill_after
            self._due[number] = time.monotonic() + span, span

    def _is_overdue(self, far: WorkerProcess, now: float) -> bool:
        """Whether the worker is at a call that should have stopped long since."""
        for number, (due, span) in list(self._due.items()):
            if now < due:
                continue
            del self._due[number]
            at = far.shared.at
            if span is None or (at == number and not far.shared.over):
                return True
            if at == number:  # what it came to is on its way
                self._due[number] = now + HOMEWARD, None
            elif at < number:  # it was not even begun yet
                self._due[number] = now + max(span, HELD), span
        return False

    def _report_each(self, run: Run, far: WorkerProcess, outcomes: list[bytes]) -> None:
        """Enter what tasks came to, each of which was pickled by itself."""
        for at, outcome in zip(self._batch, outcomes, strict=False):
            try:
                how, what = pickle.loads(outcome)
            except BaseException as error:
                how, what = "unsent", ("returned a value", in_words(error))
            self._report(run, far, handle(at), how, what)

    def _report(self, run: Run, far: WorkerProcess, task: Task[Any], how: str, what: Any) -> None:
        """Enter what a task came to."""
        if how == "value":
            run.succeeded(task, self, what)
        elif how == "cancelled":
            run.stopped(task, self)
        elif how == "unsent":
            run.failed(task, self, cannot_return(task.name, *what))
        elif how == "unread":
            which, why = what
            error = load_error(why, task.name, far.name)
            wrong = TypeError(
                f"the {which} of task {task.name!r} cannot be read in its worker process: "
                f"{in_words(error)}"
            )
            wrong.__cause__ = error
            run.failed(task, self, wrong)
        elif how == "late":
            late = self._late(task)
            late.__cause__ = load_error(what, task.name, far.name)
            run.failed(task, self, late)
        else:
            run.failed(task, self, load_error(what, task.name, far.name))

    def _late(self, task: Task[Any]) -> TimeoutError:
        return TimeoutError(f"task {task.name!r} timed out after {task._options.timeout:g} s")

    def _bury(self, run: Run, far: WorkerProcess, error: BaseException) -> WorkerDiedError | None:
        """
        The worker has died: what it was at has failed, or was killed by us for not stopping.

        Args:
            error: A `_Died`, or what went wrong on our side: then it is ended here.

        Returns:
            What to say of it if it had begun nothing; what it had is run elsewhere then.

        Raises:
            BaseException: The error, if that was on our side and no task of the worker's has it.
        """
        lost = not isinstance(error, _Died)
        if lost:
            far.kill()
        how = far.how_it_ended()
        self.leave()
        # Only now: without its pipes it may have gone on for a while.
        at: int = far.shared.at - self._first
        if lost and (at < 0 or all(task._state for task in map(handle, self._batch))):
            raise error
        if not self._batch:
            return None  # all of it has come home before the answer
        if at < 0:
            return WorkerDiedError(f"{far.name} died before it began a task: {how}")
        *before, last = map(handle, self._batch[: at + 1])
        for task in (last, *before):
            if task._state:
                continue  # it had come home
            own = run.tokens.get(task)
            overdue = task is last and self._overdue
            if self._killed or (overdue and own is not None and own.cancelled()):
                run.stopped(task, self)
                continue
            if overdue:
                late = self._late(task)
                late.__cause__ = WorkerDiedError(f"{far.name} was killed, as it did not stop")
                run.failed(task, self, late)
                continue
            what = "ran" if task is last else "was about to bring home what it came to"
            why = f"{far.name} died while task {task.name!r} {what}: {how}"
            if lost:
                why = f"what task {task.name!r} came to in {far.name} is lost: {in_words(error)}"
            failure = WorkerDiedError(why)
            failure.__cause__ = error if lost else None
            run.failed(task, self, failure)
        return None

    def leave(self) -> None:
        """The thread ends, and its worker with it; or the worker has ended by itself."""
        far, self._far = self._far, None
        if far is not None:
            far.close()

    def disown(self) -> None:
        """In a forked child: its worker must see that the parent is gone when that goes."""
        if self._far is not None:
            self._far.disown()
            self._far = None


def _plain(batch: list[At]) -> tuple[object, list[Any]] | None:
    """The function and the arguments, if there is but one and nothing goes along with them."""
    arguments: list[Any] = []
    first = batch[0]
    if isinstance(first, tuple):
        stretch = first[1]
        for at in batch:
            if not isinstance(at, tuple) or at[1] is not stretch:
                return None
            arguments.append(stretch.items.values[at[0]])
        if stretch.items.options is not PLAIN:
            return None
        return stretch.fn, arguments if stretch.unpack else [(value,) for value in arguments]
    fn = first._fn
    for at in batch:
        if isinstance(at, tuple) or at._fn is not fn or at._kwargs or at._options is not PLAIN:
            return None
        arguments.append(at._args)
    return fn, arguments


def _serve(run: Run, lane: _Lane) -> None:
    lane.serve(run)


def _place_of(
    variable: contextvars.ContextVar[Any],
) -> tuple[str, str, contextvars.ContextVar[Any]]:
    """Where a worker finds a context variable: a module, and its name there."""
    if not isinstance(variable, contextvars.ContextVar):
        raise TypeError(f"context_vars must be context variables, not {variable!r}")
    for module, holder in sys.modules.copy().items():
        for name, value in getattr(holder, "__dict__", {}).copy().items():
            if value is variable:
                return module, name, variable
    raise ValueError(f"{variable!r} is not a module's, where a worker process could find it")


_default: list[Processes] = []


def default() -> Processes:
    """The backend of `pool="processes"`; its workers are for one group after another."""
    if not _default:
        _default.append(Processes())
    return _default[0]
