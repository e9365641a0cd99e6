"""The calls of a `map`: kept in lists, each with a handle only once somebody asks for it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar, final

from fastpool._lane import Lane
from fastpool._task import CANCELLED, NOTHING, PENDING, VALUE, Options, Task, label
from fastpool._token import CancelToken

if TYPE_CHECKING:
    from fastpool._arrivals import Arrivals
    from fastpool._run import Run

__all__ = ["Items", "Stretch"]

R_co = TypeVar("R_co", covariant=True)


class Items:
    """
    What the calls of a `map`, or some of an `imap`, have come to, by position.

    A call costs its place in three lists. Whoever asks for a task gets a handle, which looks
    into the lists, and the same one as everybody else who has it. Handles lead here, so they
    are known here by weak references only, and nothing is a cycle.
    """

    __slots__ = (
        "__weakref__",
        "abandoned",
        "code",
        "first",
        "handles",
        "lasti",
        "listener",
        "name",
        "options",
        "run",
        "states",
        "stretch",
        "taken",
        "tokens",
        "values",
    )

    def __init__(
        self,
        run: Run,
        fn: object,
        options: Options,
        code: CodeType,
        lasti: int,
        *,
        first: int = 0,
        listener: Arrivals[int] | None = None,
    ) -> None:
        self.run = run
        self.name = label(fn)  # of the function itself nothing is kept when all are done
        self.options = options
        self.code = code
        self.lasti = lasti
        self.first = first  # the number of the first call, where others came before these
        # Told of each call that has ended, by its number, in the thread that ended it.
        self.listener = listener
        # Places are added by the thread that submits; who has taken a call writes into its own.
        # An argument (with `unpack` a tuple of them) until the call has ended, its value then.
        self.values: list[Any] = []
        # `PENDING`, the lane that runs it, or what it has come to.
        self.states: list[int | Lane] = []
        self.taken: list[bool] = []  # see `Task`
        self.tokens: dict[int, CancelToken] = {}  # of calls that ended with theirs set
        self.abandoned: frozenset[int] = frozenset()  # written by who leaves the block
        self.handles: dict[int, _Reference] = {}  # `setdefault` decides
        # What is queued of them, as long as any of it is queued or runs.
        self.stretch: Callable[[], Stretch | None] = lambda: None

    def __len__(self) -> int:
        return len(self.values)

    def task(self, index: int) -> Task[Any]:
        """The handle of a call."""
        handles = self.handles
        fresh: _Item[Any] | None = None
        while True:
            reference = handles.get(index)
            if reference is None:
                if fresh is None:
                    fresh = _Item(self, index, self.stretch())
                reference = handles.setdefault(index, _Reference(fresh))
            task: _Item[Any] | None = reference()
            if task is not None:
                break
            handles = reference.next
        if handles is not self.handles:
            self.handles[index] = reference  # those before it were dropped, and can be forgotten
        if task is fresh and self._ended(index):
            # Looked at after it can be found: whoever ends the call does the reverse.
            task._context = None
        return task

    def known(self, index: int) -> _Item[Any] | None:
        """The handle of a call, if somebody has it."""
        handles = self.handles
        while (reference := handles.get(index)) is not None:
            task: _Item[Any] | None = reference()
            if task is not None:
                return task
            handles = reference.next
        return None

    def done(self, index: int) -> bool:
        """Whether a call has ended, or will never start."""
        if self._ended(index):
            return True
        run = self.run
        return (run.disturbed or run.token.cancelled()) and self.task(index).done()

    def hand_out(self, start: int, stop: int) -> list[Any]:
        """The values of some calls, each kept from now on by its handle alone, if it has one."""
        values = self.values[start:stop]
        if self.handles:
            for index, value in enumerate(values, start):
                task = self.known(index)
                if task is not None:
                    task._kept = value  # first, or who reads there would find neither
        self.values[start:stop] = [None] * len(values)
        return values

    def _ended(self, index: int) -> bool:
        state = self.states[index]
        return type(state) is int and state != PENDING

    def succeeded(self) -> bool:
        """Whether all have returned."""
        return self.states.count(VALUE) == len(self.states)

    def unfinished(self) -> Iterator[Task[Any]]:
        """Of those there are now, the tasks not ended, the last first, looked at when asked for."""
        return self._unfinished(len(self))

    def _unfinished(self, count: int) -> Iterator[Task[Any]]:
        yielded = 0
        for index in range(count - 1, -1, -1):
            if self.states[index] != VALUE and not self.done(index):
                yield self.task(index)
                yielded += 1
                # Mostly all have ended with the last one. Looked at now and then: it takes time.
                if not yielded & (yielded - 1) and self.succeeded():
                    return

    def add_states(self, count: int) -> None:
        """Make place for so many calls more."""
        states = self.states
        states.extend([PENDING] * count)
        if self.states is not states:  # as `abandon` looks: it has replaced them meanwhile
            self.states.extend([PENDING] * count)  # twice, perhaps, which does no harm

    def note(self, index: int, state: int | Lane) -> None:
        """How a call stands, unless it was abandoned."""
        # In this order: `abandon` names them first and replaces the list then.
        states = self.states
        if index not in self.abandoned:
            states[index] = state

    def abandon(self, index: int) -> None:
        """
        Make what runs now cancelled for good: workers go on writing into the old list.

        Args:
            index: Of a call that is taken. A worker may be about to note that it runs it.
        """
        old = self.states
        states = old.copy()
        running = [number for number, state in enumerate(states) if type(state) is not int]
        if states[index] == PENDING:
            running.append(index)
        if not running:
            return
        for number in running:
            states[number] = CANCELLED
        self.abandoned |= set(running)  # whose values may still be written
        self.states = states
        states.extend([PENDING] * (len(old) - len(states)))  # what has come meanwhile
        if self.listener is not None:
            for number in running:
                self.listener.arrive(self.first + number)


@final
class Stretch:
    """
    The calls of one `Items` as they stand in the queue: as often as there are calls.

    Which of them a worker has taken with it, the cursor tells.

    Args:
        items: What they come to.
        fn: The function.
        unpack: Whether an item is a tuple of arguments.
        context: Of all the calls, each of which has a copy. `None`: they are in `contexts`.
    """

    __slots__ = (
        "__weakref__",
        "contexts",
        "copy",
        "fn",
        "following",
        "items",
        "unpack",
    )

    def __init__(
        self, items: Items, fn: Callable[..., Any], *, unpack: bool, context: Context | None = None
    ) -> None:
        self.items = items
        self.fn = fn
        self.unpack = unpack
        self.copy = None if context is None else context.copy
        self.contexts: list[Context | None] = []  # none is entered; None where it has been used
        self.following = itertools.count().__next__
        items.stretch = weakref.ref(self)

    def add(self, arguments: Sequence[Any], context: Context | None) -> None:
        """Have some calls more, submitted in a context if that is not the same for all."""
        items, more = self.items, len(arguments)
        if self.copy is None:
            self.contexts.extend([context] * more)
        items.taken.extend([False] * more)
        items.add_states(more)
        items.values.extend(arguments)  # the last: others look as far as that

    def context(self, index: int) -> Context | None:
        """A copy of what a call was submitted in, if it has not run."""
        if self.copy is not None:
            return self.copy()
        context = self.contexts[index]
        return None if context is None else context.copy()

    def task(self, index: int) -> Task[Any]:
        """The handle of a call."""
        return self.items.task(index)

    def unfinished(self) -> Iterator[Task[Any]]:
        """As `Items.unfinished`, of all that are in the stretch now."""
        return self.items.unfinished()

    def take(self) -> Task[Any]:
        """The task that a worker has taken with this."""
        return self.items.task(self.following())


class _Reference(weakref.ref["_Item[Any]"]):
    """Where a handle is known by; once that was dropped, `next` has the one that came after it."""

    __slots__ = ("next",)

    next: dict[int, _Reference]  # like `Items.handles`: `setdefault` decides

    def __new__(cls, task: _Item[Any]) -> _Reference:
        self = super().__new__(cls, task)
        self.next = {}
        return self


_LISTED = object()


class _Item(Task[R_co]):
    """The handle of one call of a `map`."""

    __slots__ = ("_index", "_items", "_kept", "_own", "_stretch")

    def __init__(self, items: Items, index: int, stretch: Stretch | None) -> None:
        self._items = items
        self._index = index
        self._kept: Any = _LISTED  # the value, once it is not in the list any more
        self._stretch = stretch  # until the call has ended
        self._own = items.tokens.get(index)

    def _keep_token(self, token: CancelToken) -> None:
        assert self._index is not None
        self._items.tokens[self._index] = token  # the next handle's, should this one be dropped

    def _abandon(self) -> None:
        assert self._index is not None
        if self._index not in self._items.abandoned:
            self._items.abandon(self._index)

    def _is_abandoned(self) -> bool:
        return self._index in self._items.abandoned

    @property
    def _number(self) -> int | None:
        assert self._index is not None
        return self._items.first + self._index

    @property
    def _reason(self) -> object:
        items = self._items
        return items.run.abandoned if self._index in items.abandoned else self._value

    if not TYPE_CHECKING:  # to checkers they are what `Task` says

        @property
        def _run(self):
            return self._items.run

        @property
        def _options(self):
            return self._items.options

        @property
        def _code(self):
            return self._items.code

        @property
        def _lasti(self):
            return self._items.lasti

        @property
        def _fn(self):
            stretch = self._stretch
            return self._items.name if stretch is None else stretch.fn

        @_fn.setter
        def _fn(self, fn):
            """It goes with the stretch."""

        @property
        def _args(self):
            arguments = self._items.values[self._index]
            return arguments if self._stretch.unpack else (arguments,)

        @_args.setter
        def _args(self, args):
            """The value takes their place."""

        @property
        def _kwargs(self):
            return NOTHING

        @property
        def _context(self):
            stretch = self._stretch
            return None if stretch is None else stretch.context(self._index)

        @_context.setter
        def _context(self, context):
            stretch = self._stretch
            if stretch is not None and stretch.contexts:
                stretch.contexts[self._index] = None
            self._stretch = None

        @property
        def _taken(self):
            return self._items.taken[self._index]

        @_taken.setter
        def _taken(self, taken):
            self._items.taken[self._index] = taken

        @property
        def _lane(self):
            state = self._items.states[self._index]
            return None if type(state) is int else state

        @_lane.setter
        def _lane(self, lane):
            self._items.note(self._index, PENDING if lane is None else lane)

        @property
        def _state(self):
            state = self._items.states[self._index]
            return state if type(state) is int else PENDING

        @_state.setter
        def _state(self, state):
            items = self._items
            items.note(self._index, state)
            if items.listener is not None:
                items.listener.arrive(items.first + self._index)

        @property
        def _value(self):
            listed = self._items.values[self._index]
            kept = self._kept  # looked at after the list
            return listed if kept is _LISTED else kept

        @_value.setter
        def _value(self, value):
            self._items.values[self._index] = value
