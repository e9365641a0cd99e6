"""Calls for the items of an input that is read as their values are taken."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import Context, copy_context
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
from fastpool._waiting import wait_for, wait_for_all
from fastpool._whole import whole

__all__ = ["Source", "as_completed", "in_order"]

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 256  # calls that are kept, and forgotten, together; so many that their lists cost nothing
MOST = 64  # values that are handed out before the input is read again
PATIENCE = 5e-5  # seconds that a value waits while the input is read, and goes on to be quick


class Source(Generic[T, R]):
    """
    An input of which each item becomes a call when it is read.

    The calls are numbered, and kept in chunks as those of a `map` are kept as a whole.
    All of it is the thread's that takes a value; one at a time does.

    Args:
        run: The group.
        fn: The function.
        items: The input.
        window: How many calls there may be that nobody has taken the value of.
        frame: Where the call stands that the handles name.
    """

    __slots__ = (
        "_code",
        "_fn",
        "_handed",
        "_in_hand",
        "_is_over",
        "_is_prompt",
        "_items",
        "_iterator",
        "_lasti",
        "_stretch",
        "arrivals",
        "chunks",
        "count",
        "run",
        "taken",
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
        self.count = 0  # of the calls that were submitted
        self.taken = 0  # of the values that were handed out
        self.chunks: dict[int, Items] = {}
        self._handed: dict[int, bytearray] = {}  # of each chunk: which values were handed out
        self.arrivals: _Arrivals | None = None  # where values are taken as they come
        self._fn = fn
        self._items: Iterable[T] | None = items
        self._iterator: Iterator[T] | None = None
        self._is_prompt = _input.is_prompt(items)
        self._is_over = False  # nothing more is read
        self._in_hand: tuple[T, Context] | None = None  # an item that waits for room
        self._stretch: Stretch | None = None
        self._code = frame.f_code
        self._lasti = frame.f_lasti

    def task(self, number: int) -> Task[R]:
        """The handle of a call that has not been forgotten."""
        return self.chunks[number // CHUNK].task(number % CHUNK)

    def has_value(self) -> bool:
        """Whether there is a value to take, or what is raised in its place."""
        if self.arrivals is not None:
            return bool(self.arrivals.ended)
        chunk, index = self.chunks.get(self.taken // CHUNK), self.taken % CHUNK
        return chunk is not None and index < len(chunk) and chunk.states[index] == VALUE

    def fill(self) -> int:
        """
        Read items and submit their calls, until the window is full.

        With calls ahead this does not wait for room in the group's queue once a value can be
        taken, nor raise because the group is closed.

        Returns:
            How many calls there are that nobody has taken the value of.

        Raises:
            Cancelled, GroupClosedError: As `Submitter.submit`.
            BaseException: What the input raises; it is recorded as a failure of the group.
        """
        try:
            return self._fill()
        except BaseException:  # a signal handler's, too
            whole(self.run.give_room, self._stretch)
            raise

    def _fill(self) -> int:
        """As `fill`; a function of its own, see `Run._wait_for_room`."""
        read = self._read_many if self._is_prompt else self._read_each
        while not self._is_over and (ahead := self.count - self.taken) < self.window:
            if self._is_closed(ahead) or not read(ahead) or self.has_value():
                break
        return self.count - self.taken

    def _read_each(self, before: int) -> bool:
        """Read items one by one; False if there are no more, or it is not the time."""
        run, read, stretch = self.run, _input.read_one, self._stretch
        token, until = run.token, time.monotonic() + PATIENCE
        for ahead in range(before, self.window):
            if self._in_hand is None:
                if run.bounded is not None:
                    stretch = self._next_stretch()
                    # Not kept meanwhile: the input may submit to the group, or be a stream of it.
                    if not self._room(stretch, ahead, 1):
                        return False
                    run.give_room(stretch)
                try:
                    iterator = self._iterator
                    if iterator is None:
                        iterator = self._open_input()
                    item = read(iterator)
                except BaseException as error:
                    self._is_over = True
                    _input.blame(token, error)
                    raise
                if item is _input.END:
                    self._is_over = True
                    return False
                context = copy_context()
            else:
                item, context = self._in_hand
            if (
                run.bounded is not None
                or run.closed is not None
                or run.disturbed
                or token._reason is not None
            ):
                self._in_hand = (item, context)
                stretch = self._next_stretch()
                if self._is_closed(ahead) or not self._room(stretch, ahead, 1):
                    return False
                self._in_hand = None
            number = self.count
            if stretch is None or not number % CHUNK:
                stretch = self._next_stretch()
            self.count = number + 1
            run.submit_one(stretch, item, context)
            # Once a value is there it waits for no slow input; but mostly that is quick.
            if time.monotonic() > until:
                break
        return True

    def _read_many(self, ahead: int) -> bool:
        """As `_read_each`, in one go."""
        run = self.run
        stretch = self._next_stretch()
        most = min(self.window - ahead, CHUNK - self.count % CHUNK)
        if run.bounded is not None:
            most = self._room(stretch, ahead, most)
            if not most:
                return False
        try:
            iterator = self._iterator
            if iterator is None:
                iterator = self._open_input()
            items = _input.read(iterator, most)
        except BaseException as error:  # a dictionary that has changed, say
            self._is_over = True
            _input.blame(run.token, error)
            raise
        if len(items) < most:
            self._is_over = True
        if not items:
            run.give_room(stretch)
            return False
        self.count += len(items)
        run.submit_more(stretch, items, copy_context())
        return True

    def _room(self, stretch: Stretch, ahead: int, most: int) -> int:
        """As `Run.room`; but with calls ahead there is none once a value can be taken."""
        run = self.run
        if not ahead:
            return run.room(self._fn, stretch, most)
        room = run.room(self._fn, stretch, most, waits=False)
        lane = here()
        # A worker of the same pool makes room by the calls that it runs as it waits for values.
        if room or (lane is not None and lane.pool is run.pool):
            return room
        return self._wait_for_room(stretch, most, lane)

    def _wait_for_room(self, stretch: Stretch, most: int, lane: Lane | None) -> int:
        run, queue, token = self.run, self.run.bounded, current_token()
        if queue is None:
            return 0  # the group has ended meanwhile
        arrivals, task, gate = self.arrivals, None, Gate()
        if arrivals is None:
            task = self.task(self.taken)
            ready = task.done
            run.watch(task, gate)
        else:
            gate, ready = arrivals.gate, lambda: bool(arrivals.ended)
            arrivals.asleep[None] = None
        keys = [(heard, heard._add_sleeper(gate)) for heard in dict.fromkeys((token, run.token))]

        def take_in_line() -> int:  # see `Run._wait_for_room`
            queue.line_up(gate)
            if lane is not None:
                run.helpers[gate] = lane
            while not (room := queue.take_room(stretch, most)):
                if ready() or token.cancelled() or run.closed is not None or run.stopping():
                    return 0  # what there is to say, who waits for the value says
                run.sleep_for_room(queue, gate, lane)
            return room

        try:
            return take_in_line()
        finally:
            try:
                run.leave_line(queue, gate, keys)
            except BaseException:  # what a signal handler raised: others are in line behind it
                whole(run.leave_line, queue, gate, keys)
                raise
            if task is not None:
                run.unwatch(task, gate)
            if arrivals is not None:
                arrivals.asleep.clear()

    def _open_input(self) -> Iterator[T]:
        assert self._items is not None
        iterator = self._iterator = _input.begin(functools.partial(iter, self._items))
        self._items = None
        return iterator

    def _next_stretch(self) -> Stretch:
        """What the next call belongs to: it begins a chunk, perhaps."""
        stretch = self._stretch
        if stretch is not None and (self.count % CHUNK or not stretch.items):
            return stretch
        chunk = self.chunks[self.count // CHUNK] = Items(
            self.run,
            self._fn,
            PLAIN,
            self._code,
            self._lasti,
            first=self.count,
            listener=self.arrivals,
        )
        self._handed[self.count // CHUNK] = bytearray(CHUNK)
        self._stretch = stretch = Stretch(chunk, self._fn, unpack=False)
        return stretch

    def _is_closed(self, ahead: int) -> bool:
        """Whether the group takes nothing more; raises then, unless there are values to take."""
        run = self.run
        if run.closed is None and not run.disturbed and run.token._reason is None:
            return False
        if ahead and (run.closed is not None or run.stopping()):
            return True
        run.check_open(self._fn)
        return False

    def left(self) -> list[int]:
        """The calls that nobody has taken the value of."""
        return [
            number
            for chunk in list(self.chunks)
            for number in range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count))
            if not self.is_taken(number)
        ]

    def is_taken(self, number: int) -> bool:
        """Whether the value of a call was handed out."""
        handed = self._handed.get(number // CHUNK)
        return handed is None or bool(handed[number % CHUNK])

    def in_a_row(self, first: int, most: int) -> int:
        """Of how many calls in a row, at most so many, the value can be handed out."""
        number, start = divmod(first, CHUNK)
        states, handed = self.chunks[number].states, self._handed[number]
        stop = min(start + most, CHUNK)
        while states[start:stop].count(VALUE) < stop - start or 1 in handed[start:stop]:
            stop = (start + stop) // 2
        return stop - start

    def hand_out(self, first: int, count: int) -> list[R]:
        """The values of some calls in a row, the last one first."""
        number, start = divmod(first, CHUNK)
        values = self.chunks[number].hand_out(start, start + count)
        values.reverse()
        self.taken += count
        handed = self._handed[number]
        handed[start : start + count] = b"\1" * count
        if 0 not in handed:
            del self.chunks[number], self._handed[number]
        return values

    def most(self) -> int:
        """How many values may be handed out now before the input is read again."""
        ahead = self.count - self.taken
        return min(max(1, ahead if self._is_over else ahead - self.window // 2), MOST)

    def meet(self, number: int) -> None:
        """
        Wait until a call has a value, or raise what is raised in its place.

        A cancelled one does not hide the failure of another that nobody has taken the value of.
        """
        task = self.task(number)
        error = None
        try:
            wait_for((task,), None)
            if task._state == CANCELLED:
                tasks = [self.task(other) for other in self.left()]
                wait_for_all(reversed(tasks), None)
                failed = [other for other in tasks if other._state == ERROR]
                if failed:
                    error = min(failed, key=lambda other: other._value[2])._error()
                    raise error
            task.result()
        finally:
            del self, task, error  # what is raised holds this frame in its traceback

    def close(self) -> None:
        """
        Read nothing more, and cancel the calls that nobody has taken the value of.

        A generator is closed; a file, say, is its owner's.
        """
        # The last one first: a worker whose call is told would begin one that is still queued.
        try:
            for number in reversed(self.left()):
                chunk = self.chunks[number // CHUNK]
                if number % CHUNK < len(chunk):  # its submit may have been interrupted
                    chunk.task(number % CHUNK).cancel("its iterator was closed")
        finally:
            # A generator that has not begun is closed, too: it may have been used before.
            iterator = self._items if self._iterator is None else self._iterator
            self._is_over = True
            self._items = self._iterator = self._in_hand = self._stretch = self.arrivals = None
            self._handed.clear()
            self.chunks.clear()  # they lead back here, if somebody listens
            if isinstance(iterator, Generator):
                _input.close(iterator)  # pyright: ignore[reportUnknownArgumentType] # as it was


def in_order(source: Source[Any, R]) -> Generator[R, None, None]:
    """The values in the order of the items, each as soon as it and those before it are there."""
    return _begun(_in_order(source))


def as_completed(source: Source[Any, R]) -> Generator[R, None, None]:
    """The values as they come."""
    return _begun(_as_completed(source))


def _begun(values: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Begin a generator, or to close it would do nothing."""
    next(values)
    return values


def _in_order(source: Source[Any, Any]) -> Generator[Any, None, None]:
    queue, few = source.run.queue, source.window // 2
    try:
        yield None  # see `_begun`
        while True:
            # While there is work for the workers, what there is comes first.
            if source.count - source.taken <= few or not queue or not source.has_value():
                if not source.fill():
                    return
                if not source.has_value():
                    source.meet(source.taken)
            values = source.hand_out(source.taken, source.in_a_row(source.taken, source.most()))
            while values:
                yield values.pop()
    finally:
        try:
            source.close()
        finally:
            del source, queue  # what is raised holds this frame in its traceback


def _as_completed(source: Source[Any, Any]) -> Generator[Any, None, None]:
    queue, few = source.run.queue, source.window // 2
    arrivals = _Arrivals(source)
    ended = arrivals.ended
    try:
        with arrivals:
            yield None  # see `_begun`
            while True:
                if source.count - source.taken <= few or not queue or not ended:
                    if not source.fill():
                        return
                    arrivals.wait()
                most = min(source.most(), len(ended))
                numbers = [ended.popleft() for _ in range(most)]
                # Mostly they have ended in their order.
                are_in_order = numbers[-1] - numbers[0] == most - 1 and numbers == sorted(numbers)
                while numbers:
                    first = numbers[0]
                    if source.is_taken(first):
                        del numbers[0]
                        continue
                    count = source.in_a_row(first, len(numbers) if are_in_order else 1)
                    if not count:
                        source.meet(first)
                        continue
                    del numbers[:count]
                    values = source.hand_out(first, count)
                    while values:
                        yield values.pop()
    finally:
        try:
            source.close()
        finally:
            del source, arrivals, ended, queue  # as above


class _Arrivals(Arrivals[int]):
    """The calls of one source, by their numbers."""

    __slots__ = ("_source",)

    def __init__(self, source: Source[Any, Any]) -> None:
        super().__init__()
        self._source = source
        source.arrivals = self
        self.hear(source.run)

    def left(self) -> list[int]:
        return self._source.left()

    def task(self, key: int) -> Task[Any]:
        return self._source.task(key)
