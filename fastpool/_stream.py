"""Calls for the items of an input that is read as their values are taken."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Reversible
from contextvars import copy_context
from types import FrameType
from typing import Any, Generic, TypeVar

from fastpool import _input
from fastpool._arrivals import Arrivals
from fastpool._gate import Gate
from fastpool._items import Items, Stretch
from fastpool._lane import Lane, here
from fastpool._run import Run
from fastpool._scope import current_token
from fastpool._task import CANCELLED, ERROR, PLAIN, VALUE, Task
from fastpool._waiting import (
    wait_for,
    wait_for_all,
)
from fastpool.exceptions import GroupClosedError

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
        "arrivals",
        "chunks",
        "count",
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
        self.arrivals: _Arrivals | None = None  # where values are taken as they come
        self._fn = fn
        self._begin: Callable[[], Iterator[T]] | None = functools.partial(iter, items)
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
        if self._begin is None:
            return False
        if (
            run.closed is not None or run.disturbed or run.token._reason is not None
        ) and not self._is_open(ahead):
            return False
        return self._read_many(ahead) if self._is_prompt else self._read_one(ahead)

    def _read_one(self, ahead: int) -> bool:
        run, iterator = self.run, self._iterator
        if run.bounded is not None:
            # Not kept meanwhile: the input may submit to the group, or be a stream of it.
            if not self._room(ahead, 1):
                return False
            run.give_room(1)
        try:
            if iterator is None:
                iterator = self._open_input()
            item = _input.read_one(iterator)
        except BaseException as error:
            self._begin = None
            _input.blame(run.token, error)
            raise
        if item is _input.END:
            self._begin = None
            return False
        if (
            run.closed is not None or run.disturbed or run.token._reason is not None
        ) and not self._is_open(ahead):
            return False
        if run.bounded is not None:
            try:
                run.room(self._fn)
            except GroupClosedError:
                if ahead:
                    return False  # one of those ahead may have failed, and says more
                raise
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
            most = self._room(ahead, most)
            if not most:
                return False
        try:
            if iterator is None:
                iterator = self._open_input()
            items = _input.read(iterator, most)
        except BaseException as error:  # a dictionary that has changed, say
            self._begin = None
            _input.blame(run.token, error)
            raise
        if len(items) < most:
            self._begin = None
            run.give_room(most - len(items))
        if not items:
            return False
        stretch = self._stretch
        if stretch is None or not self.count % CHUNK:
            stretch = self._begin_chunk()
        self.count += len(items)
        run.submit_more(stretch, items, copy_context())
        return True

    def _room(self, ahead: int, most: int) -> int:
        """As `Run.room`; but with calls ahead there is none once a value can be taken."""
        run = self.run
        if not ahead:
            return run.room(self._fn, most)
        room = run.room(self._fn, most, waits=False)
        lane = here()
        # A worker of the same pool makes room by the calls that it runs as it waits for values.
        if room or (lane is not None and lane.pool is run.pool):
            return room
        return self._wait_for_room(ahead, most, lane)

    def _wait_for_room(self, ahead: int, most: int, lane: Lane | None) -> int:
        run, queue, token = self.run, self.run.bounded, current_token()
        assert queue is not None
        arrivals, task, gate = self.arrivals, None, Gate()
        if arrivals is None:
            task = self.task(self.count - ahead)
            ready = task.done
            run.watch(task, gate)
        else:
            gate, ready = arrivals.gate, lambda: bool(arrivals.ended)
            arrivals.asleep[None] = None
        keys = [(heard, heard._add_sleeper(gate)) for heard in dict.fromkeys((token, run.token))]
        queue.waiting[gate] = None
        if lane is not None:
            run.helpers[gate] = lane
        try:
            while not (room := run.room(self._fn, most, waits=False)):
                if ready() or token.cancelled() or run.closed is not None or run.stopping():
                    return 0  # what there is to say, who waits for the value says
                run.sleep_for_room(queue, gate, lane)
            return room
        finally:
            if task is not None:
                run.unwatch(task, gate)
            if arrivals is not None:
                arrivals.asleep.clear()
            run.helpers.pop(gate, None)
            queue.waiting.pop(gate, None)
            queue.wake()  # the next one, should this one have been woken for nothing
            for heard, key in keys:
                heard._remove(key)

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
            listener=None if self.arrivals is None else self.arrivals.arrive,
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

    def close(self, left: Reversible[int]) -> None:
        """
        Read nothing more, and cancel some calls.

        A generator is closed, if it has begun; a file, say, is its owner's.
        """
        # The last one first: a worker whose call is told would begin one that is still queued.
        try:
            for number in reversed(left):
                chunk = self.chunks[number // CHUNK]
                if number % CHUNK < len(chunk):  # its submit may have been interrupted
                    chunk.task(number % CHUNK).cancel("its iterator was closed")
        finally:
            iterator = self._iterator
            self._begin = self._iterator = self._stretch = self.arrivals = None
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
            if not ready or not queue:
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
            yield chunk.hand_out(at)
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
    to_take: dict[Items, int] = {}  # how many of a chunk, where it is not all
    arrivals = _Arrivals(source)
    left, ended = arrivals.left, arrivals.ended
    try:
        with arrivals:
            while True:
                # While there is work for the workers, what there is comes first.
                if not (queue and len(left) > few and ended):
                    while len(left) < window and arrivals.read() and not ended:
                        pass
                number = arrivals.take()
                if number is None:
                    return
                chunk, index = chunks[number // CHUNK], number % CHUNK
                if chunk.states[index] != VALUE:
                    source.meet(number, (number, *left))
                to_take[chunk] = rest = to_take.get(chunk, CHUNK) - 1
                if not rest:
                    del chunks[number // CHUNK], to_take[chunk]
                yield chunk.hand_out(index)
    finally:
        try:
            source.close(left)
        finally:
            # What is raised holds this frame in its traceback.
            del source, chunks, chunk, to_take, arrivals, left, ended, queue


class _Arrivals(Arrivals[int]):
    """The calls of one source, by their numbers."""

    __slots__ = ("_source",)

    def __init__(self, source: Source[Any, Any]) -> None:
        super().__init__()
        self._source = source
        source.arrivals = self
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
