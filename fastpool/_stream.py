"""Calls for the items of an input that is read as their values are taken."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import copy_context
from types import FrameType
from typing import Any, Generic, TypeVar

from fastpool import _input
from fastpool._arrivals import Arrivals
from fastpool._items import Items, Stretch
from fastpool._run import Run
from fastpool._task import CANCELLED, ERROR, PLAIN, VALUE, Task
from fastpool._waiting import wait_for, wait_for_all

__all__ = ["Source", "as_completed", "in_order"]

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 256  # calls that are kept, and forgotten, together; so many that their lists cost nothing


class Source(Generic[T, R]):
    """
    An input of which each item becomes a call when it is read.

    The calls are numbered, and kept in chunks as those of a `map` are kept as a whole.

    Args:
        run: The group.
        fn: The function.
        items: The input.
        window: How many calls there may be that nobody has taken the value of.
        frame: Where the call stands that the handles name.
    """

    __slots__ = (
        "_begin",
        "_code",
        "_fn",
        "_is_prompt",
        "_iterator",
        "_lasti",
        "_stretch",
        "chunks",
        "count",
        "listener",
        "more",
        "run",
        "window",
    )

    def __init__(
        self,
        run: Run,
        fn: Callable[[T], R],
        items: Iterable[T],
        window: int,
        frame: FrameType,
    ) -> None:
        self.run = run
        self.window = window
        self.count = 0  # of the items that were read
        self.chunks: dict[int, Items] = {}
        self.listener: Callable[[int], object] | None = None
        self._fn = fn
        self._begin: Callable[[], Iterator[T]] | None = functools.partial(iter, items)
        self.more = True  # whether there may be more items
        self._iterator: Iterator[T] | None = None
        self._is_prompt = _input.is_prompt(items)
        self._stretch: Stretch | None = None
        self._code = frame.f_code
        self._lasti = frame.f_lasti

    def task(self, number: int) -> Task[R]:
        """The handle of a call that has not been forgotten."""
        return self.chunks[number // CHUNK].task(number % CHUNK)

    def read(self, ahead: int) -> bool:
        """
        Read an item and submit its call; more of them if that waits for nothing.

        Args:
            ahead: How many calls there are that nobody has taken the value of. If there are any,
                this does not wait for room in the group's queue, nor raise because the group is
                closed.

        Returns:
            False if there are no more items, or it is not the time for one.

        Raises:
            Cancelled, GroupClosedError: As `Submitter.submit`.
            BaseException: What the input raises; it is recorded as a failure of the group.
        """
        run = self.run
        if not self.more:
            return False
        if (
            run.closed is not None or run.disturbed or run.token._reason is not None
        ) and not self._is_open(ahead):
            return False
        return self._read_many(ahead) if self._is_prompt else self._read_one(ahead)

    def _read_one(self, ahead: int) -> bool:
        run, iterator = self.run, self._iterator
        if run.bounded is not None and not run.room(self._fn, waits=not ahead):
            return False
        try:
            if iterator is None:
                iterator = self._open_input()
            item = _input.read_one(iterator)
        except StopIteration:
            self.more = False
            run.give_room(1)
            return False
        except BaseException as error:
            self.more = False
            run.token._report(error)
            raise
        if (
            run.closed is not None or run.disturbed or run.token._reason is not None
        ) and not self._is_open(ahead):
            return False
        stretch = self._stretch
        if stretch is None or not self.count % CHUNK:
            stretch = self._begin_chunk()
        self.count += 1
        run.submit_one(stretch, item)
        return True

    def _read_many(self, ahead: int) -> bool:
        run, iterator = self.run, self._iterator
        most = min(self.window - ahead, CHUNK - self.count % CHUNK)
        if run.bounded is not None:
            most = run.room(self._fn, most, waits=not ahead)
        try:
            if iterator is None:
                iterator = self._open_input()
            items = _input.read(iterator, most)
        except BaseException as error:  # a dictionary that has changed, say
            self.more = False
            run.token._report(error)
            raise
        if len(items) < most:
            self.more = False
            run.give_room(most - len(items))
        if not items:
            return False
        stretch = self._stretch
        if stretch is None or not self.count % CHUNK:
            stretch = self._begin_chunk()
        self.count += len(items)
        run.submit_more(stretch, items, copy_context())
        return True

    def _open_input(self) -> Iterator[T]:
        assert self._begin is not None
        iterator = self._iterator = _input.begin(self._begin)
        return iterator

    def _begin_chunk(self) -> Stretch:
        chunk = self.chunks[self.count // CHUNK] = Items(
            self.run,
            self._fn,
            PLAIN,
            self._code,
            self._lasti,
            first=self.count,
            listener=self.listener,
        )
        self._stretch = stretch = Stretch(chunk, self._fn, unpack=False)
        return stretch

    def _is_open(self, ahead: int) -> bool:
        """Whether the group takes one more; raises if not, unless there are values to take."""
        run = self.run
        if ahead and (run.closed is not None or run.stopping()):
            return False
        run.check_open(self._fn)
        return True

    def meet(self, number: int, left: Iterable[int]) -> R:
        """
        The value of a call, or what is raised in its place.

        Args:
            number: Which.
            left: All that nobody has taken the value of, this one too: a cancelled one must not
                hide the failure of another.
        """
        task = self.task(number)
        error = None
        try:
            wait_for((task,), None)
            if task._state == CANCELLED:
                tasks = [self.task(other) for other in left]
                wait_for_all(reversed(tasks), None)
                failed = [other for other in tasks if other._state == ERROR]
                if failed:
                    error = min(failed, key=lambda other: other._value[2])._error()
                    raise error
            return task.result()
        finally:
            del self, task, error  # what is raised holds this frame in its traceback

    def close(self, left: Iterable[int]) -> None:
        """
        Read nothing more, and cancel some calls.

        A generator is closed, since nobody else may have a name for it; a file is its owner's.
        """
        for number in left:
            self.task(number).cancel("its iterator was closed")
        iterator = self._iterator
        self.more = False
        self._begin = self._iterator = self._stretch = self.listener = None
        self.chunks.clear()  # they lead back here, if somebody listens
        if isinstance(iterator, Generator):
            _input.close(iterator)  # pyright: ignore[reportUnknownArgumentType] # as it was


def in_order(source: Source[Any, R]) -> Generator[R, None, None]:
    """The values in the order of the items, each as soon as it and those before it are there."""
    chunks, window, queue = source.chunks, source.window, source.run.queue
    few = window // 2
    taken = index = 0
    chunk: Items | None = None
    try:
        while True:
            ahead = source.count - taken
            ready = chunk is not None and ahead > few and chunk.states[index] == VALUE
            # While there is work for the workers, what there is comes first.
            if source.more and not (ready and queue):
                while ahead < window and source.read(ahead):
                    ahead = source.count - taken
                    if chunk is None:
                        chunk = chunks[taken // CHUNK]
                    if chunk.states[index] == VALUE:
                        break  # the next value is there, and the input may be slow
            if not ahead:
                return
            assert chunk is not None
            if chunk.states[index] != VALUE:
                value: R = source.meet(taken, range(taken, source.count))
                del value
            taken += 1
            at = index
            index += 1
            yield _take(chunk, at)
            if index == CHUNK:
                del chunks[(taken - 1) // CHUNK]
                chunk = chunks.get(taken // CHUNK)
                index = 0
    finally:
        try:
            source.close(range(taken, source.count))
        finally:
            del source, chunks, chunk, queue  # what is raised holds this frame in its traceback


def as_completed(source: Source[Any, R]) -> Generator[R, None, None]:
    """The values as they come."""
    chunks, window, queue = source.chunks, source.window, source.run.queue
    few = window // 2
    chunk: Items | None = None
    left_in: dict[Items, int] = {}  # how many of a chunk have not been taken, those to come too
    arrivals = _Arrivals(source)
    left, ended = arrivals.left, arrivals.ended
    try:
        with arrivals:
            while True:
                # While there is work for the workers, what there is comes first.
                if source.more and not (queue and len(left) > few and ended):
                    while len(left) < window and arrivals.read() and not ended:
                        pass
                if not ended:
                    arrivals.wait()
                if not left:
                    return
                number = ended.popleft()
                if left.pop(number, number) is not None:
                    continue
                chunk, index = chunks[number // CHUNK], number % CHUNK
                if chunk.states[index] != VALUE:
                    source.meet(number, (number, *left))
                left_in[chunk] = rest = left_in.get(chunk, CHUNK) - 1
                if not rest:
                    del chunks[number // CHUNK], left_in[chunk]
                yield _take(chunk, index)
    finally:
        try:
            source.close(left)
        finally:
            # What is raised holds this frame in its traceback.
            del source, chunks, chunk, left_in, arrivals, left, ended, queue


class _Arrivals(Arrivals[int]):
    """The calls of one source, by their numbers."""

    __slots__ = ("_source",)

    def __init__(self, source: Source[Any, Any]) -> None:
        super().__init__()
        self._source = source
        source.listener = self.arrive
        self.hear(source.run)

    def task(self, key: int) -> Task[Any]:
        return self._source.task(key)

    def read(self) -> bool:
        """As `Source.read`."""
        source, left = self._source, self.left
        before = source.count
        more = source.read(len(left))
        left.update(dict.fromkeys(range(before, source.count)))
        return more


def _take(chunk: Items, index: int) -> Any:
    """A value, which is forgotten here unless somebody has the call's handle."""
    value = chunk.values[index]
    if index not in chunk.handles:
        chunk.values[index] = None
    return value
