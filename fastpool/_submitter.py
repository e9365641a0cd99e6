"""How calls are handed to a group."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import copy_context
from types import FrameType, FunctionType
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, overload

from fastpool import _input, _marks
from fastpool._batch import Batch
from fastpool._cancellable import UNRUNNABLE, refuse
from fastpool._items import Items, Stretch
from fastpool._run import Run
from fastpool._task import PENDING, PLAIN, Call, CallWith, Options, Task, label
from fastpool._whole import whole

__all__ = ["Submitter", "at_least_one"]

P = ParamSpec("P")
R = TypeVar("R")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
Ts = TypeVarTuple("Ts")


class Submitter:
    """
    Takes calls for a group, with some options of their own; see `TaskGroup.with_options`.

    Threads:
        Safe from any thread while the group is open, its final wait included; from its tasks
        too.
    """

    _run: Run
    _options: Options

    def __init__(self, run: Run, options: Options) -> None:
        self._run = run
        self._options = options

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Task[R]:
        """
        Have a function called in the group.

        Where the group has a `max_queued`, this waits while the queue is full; in a task of the
        group it does not.

        Args:
            fn: The function. A `@cancellable` one gets its token; any other finds it with
                `current_token()`.
            *args: Its arguments.
            **kwargs: Its keyword arguments. All of them are the function's.

        Returns:
            The task's handle.

        Raises:
            Cancelled: If the group was cancelled, and with it the caller: its current token is
                set.
            GroupClosedError: If the group was cancelled and the caller was not; if its block
                has not been entered, or has ended.
            TypeError: If `fn` cannot be called, or is a coroutine or generator function.
            RuntimeError: If the group has no thread and the system gives it none.
        """
        if type(fn) is not FunctionType or fn.__code__.co_flags & UNRUNNABLE:
            refuse(fn)
        run = self._run
        if run.closed is not None or run.disturbed or run.token._reason is not None:
            run.check_open(fn)
        options = self._options
        task: Call[R]
        if kwargs or options is not PLAIN:
            task = CallWith()
            task._kwargs = kwargs
            task._options = options
            if options.timeout is not None:
                run.disturbed = True
        else:
            task = Call()
        task._run = run
        task._fn = fn
        task._args = args
        task._context = copy_context()
        frame = sys._getframe(1)
        task._code = frame.f_code
        task._lasti = frame.f_lasti
        task._taken = False
        task._lane = None
        task._state = PENDING
        task._own = None
        bounded = run.bounded
        if bounded is not None:
            run.submit_bounded(task, fn, bounded)
            return task
        if run.observers:
            run.submit_observed((task,), task, fn)
            return task
        run.queue.append(task)
        if run.closing is not None:
            run.refuse_late((task,), fn)
        if not run.called and (run.idle or not run.full or run.recalled):  # `Run.want_lane`
            run.call_for((task,), task)
        return task

    @overload
    def map(self, fn: Callable[[T1], R], a: Iterable[T1], /) -> Batch[R]: ...
    @overload
    def map(self, fn: Callable[[T1, T2], R], a: Iterable[T1], b: Iterable[T2], /) -> Batch[R]: ...
    @overload
    def map(
        self,
        fn: Callable[[T1, T2, T3], R],
        a: Iterable[T1],
        b: Iterable[T2],
        c: Iterable[T3],
        /,
    ) -> Batch[R]: ...
    @overload
    def map(
        self,
        fn: Callable[[T1, T2, T3, T4], R],
        a: Iterable[T1],
        b: Iterable[T2],
        c: Iterable[T3],
        d: Iterable[T4],
        /,
    ) -> Batch[R]: ...
    @overload
    def map(
        self,
        fn: Callable[[T1, T2, T3, T4, T5], R],
        a: Iterable[T1],
        b: Iterable[T2],
        c: Iterable[T3],
        d: Iterable[T4],
        e: Iterable[T5],
        /,
    ) -> Batch[R]: ...
    @overload
    def map(
        self,
        fn: Callable[..., R],
        a: Iterable[Any],  # Any: no checker can match more than five
        b: Iterable[Any],
        c: Iterable[Any],
        d: Iterable[Any],
        e: Iterable[Any],
        f: Iterable[Any],
        /,
        *more: Iterable[Any],
    ) -> Batch[R]: ...
    def map(self, fn: Callable[..., R], /, *iterables: Iterable[Any]) -> Batch[R]:
        """
        Have a function called for every item.

        Args:
            fn: The function.
            *iterables: One for each argument. They are read to the end of the shortest, in the
                calling thread. What one of them raises is raised here, and is a failure of the
                group.

        Returns:
            The handles, in the order of the items.

        Raises:
            Cancelled, GroupClosedError, TypeError, RuntimeError: As `submit`. If the group
                takes nothing to begin with, nothing is taken from the iterables.

        Source:
            The built-in `map`.
        """
        return self._map(fn, iterables, sys._getframe(1))

    def _map(
        self, fn: Callable[..., R], iterables: tuple[Iterable[Any], ...], frame: FrameType
    ) -> Batch[R]:
        refuse(fn, "map")
        if not iterables:
            raise TypeError(f"map() wants an iterable for each argument of {label(fn)}()")
        for items in iterables:
            _input.refuse_no_iterable("map", items)
        prompt = [items for items in iterables if _input.is_prompt(items)]
        sized = prompt if len(prompt) == len(iterables) else None
        if len(iterables) == 1:
            return self._submit_all(fn, functools.partial(iter, iterables[0]), sized, frame)
        return self._submit_all(fn, functools.partial(zip, *iterables), sized, frame, unpack=True)

    def starmap(self, fn: Callable[[*Ts], R], items: Iterable[tuple[*Ts]], /) -> Batch[R]:
        """
        Have a function called for every tuple of arguments.

        Args:
            fn: The function.
            items: Read to the end, as in `map`.

        Returns:
            The handles, in the order of the items.

        Raises:
            Cancelled, GroupClosedError, TypeError, RuntimeError: As `map`.

        Source:
            `itertools.starmap`.
        """
        refuse(fn, "starmap")
        _input.refuse_no_iterable("starmap", items)
        # Items of other kinds run their own code when they are read.
        sized = None
        if isinstance(items, (list, tuple)) and _input.is_prompt(items):
            sized = [items] if all(type(item) is tuple for item in items) else None
        return self._submit_all(
            fn, functools.partial(map, _arguments(fn), items), sized, sys._getframe(1), unpack=True
        )

    def _submit_all(
        self,
        fn: Callable[..., R],
        begin: Callable[[], Iterator[Any]],
        sized: Sequence[Collection[Any]] | None,
        frame: FrameType,
        *,
        unpack: bool = False,
    ) -> Batch[R]:
        """
        Submit a call for each item.

        Args:
            fn: The function.
            begin: Begins to iterate.
            sized: What it reads, if that runs nobody's code and waits for nothing, so that many
                items can be taken at once.
            frame: Where the call stands that the handles name.
            unpack: Whether an item is a tuple of arguments.
        """
        run = self._run
        prompt = sized is not None
        run.check_open(fn)
        items = Items(run, fn, self._options, frame.f_code, frame.f_lasti)
        if self._options.timeout is not None:
            run.disturbed = True
        # No code of anybody's runs while a prompt input is read, so the context stays as it is.
        stretch = Stretch(items, fn, unpack=unpack, context=copy_context() if prompt else None)
        try:
            _submit_to(stretch, begin, sized)
        except BaseException:  # a signal handler's, too
            whole(run.give_room, stretch)
            raise
        return Batch(items)


def _submit_to(
    stretch: Stretch,
    begin: Callable[[], Iterator[Any]],
    sized: Sequence[Collection[Any]] | None,
) -> None:
    """As `Submitter._submit_all`; a function of its own, see `Run._wait_for_room`."""
    items, fn = stretch.items, stretch.fn
    run = items.run
    prompt = sized is not None
    iterator: Iterator[Any] | None = None
    size = most = 1  # so that the first one begins at once
    while True:
        if run.bounded is not None:
            if sized is not None and len(items) >= min(map(len, sized)):
                return  # or it would wait for room that nothing needs
            most = run.room(fn, stretch, size)
            if not prompt:  # not kept meanwhile: the input may submit to the group
                run.give_room(stretch)
        try:
            if iterator is None:
                iterator = _input.begin(begin)
            arguments = _input.read(iterator, most)
        except BaseException as error:
            _input.blame(run.token, error)
            raise
        if not arguments:
            run.give_room(stretch)
            return
        if run.closed is not None or run.disturbed or run.token._reason is not None:
            run.check_open(fn)
        if not prompt:
            context = copy_context()
            if run.bounded is not None:
                run.room(fn, stretch)
            run.submit_one(stretch, arguments[0], context)
        else:
            run.submit_more(stretch, arguments)
            size = most = min(2 * size, MOST_AT_ONCE)


MOST_AT_ONCE = 1024  # items that are queued in one go; from here on more at once gains nothing


def _arguments(fn: object) -> Callable[[Iterable[Any]], tuple[Any, ...]]:
    """What makes the arguments of a call of an item of `starmap`."""

    @_marks.calls_out
    def arguments(item: Iterable[Any]) -> tuple[Any, ...]:
        if not isinstance(item, tuple) and (
            isinstance(item, (str, bytes)) or not isinstance(item, Iterable)
        ):
            raise TypeError(
                f"starmap() wants a tuple of arguments for each call, not {item!r}; "
                f"for one argument each, write map({label(fn)}, ...)"
            )
        return tuple(item)

    return arguments


def at_least_one(name: str, value: int) -> int:
    """A number of things, if it is one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value!r}")
    return value
