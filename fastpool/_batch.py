"""Many tasks at once: a batch of them, and tasks as they end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from fastpool import _clock, _marks
from fastpool._arrivals import Arrivals
from fastpool._items import Items
from fastpool._task import CANCELLED, ERROR, VALUE, Task
from fastpool._waiting import wait_for, wait_for_all

__all__ = ["Batch", "as_completed"]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Batch(Generic[R_co]):
    """
    The handles of one `map` or `starmap`: one task for each item, in the order of the items.

    Threads:
        Safe from any thread.
    """

    __slots__ = ("__weakref__", "_items", "_tasks")

    def __init__(self, items: Items) -> None:
        self._items = items
        self._tasks: tuple[Task[R_co], ...] | None = None  # the same handles, whoever asks first

    @property
    def tasks(self) -> tuple[Task[R_co], ...]:
        """The tasks, in the order of the items."""
        tasks = self._tasks
        if tasks is None:
            tasks = self._tasks = tuple(map(self._items.task, range(len(self))))
        return tasks

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        done = sum(map(self._items.done, range(len(self))))
        return f"<Batch of {len(self)} tasks, {done} done>"

    def results(self, timeout: float | None = None) -> list[R_co]:
        """
        Wait for every task and return their values.

        Args:
            timeout: Longest wait, in seconds. `None` waits without limit, zero only looks.

        Returns:
            One value per task, in the order of the items; empty for an empty batch.

        Raises:
            TimeoutError: If a task is still running when the time is up. It goes on.
            BaseException: The first failure in time among these tasks, as the task raised it.
            TaskCancelledError: If none failed, but one was cancelled.
            Cancelled: If the caller's own current token is set before all have ended, or the
                error would be a `TaskCancelledError`.
            RuntimeError: If tasks would wait for each other in a circle.

        Threads:
            Any; a worker that waits runs what has not started.

        Source:
            The order follows `concurrent.futures.Executor.map`.
        """
        span = _clock.seconds(timeout)
        if not self._wait(span):
            running = sum(not self._items.done(index) for index in range(len(self)))
            raise TimeoutError(f"{running} of {len(self)} tasks have not ended after {span:g} s")
        error = self._first_error()
        if error is None:
            return self._items.values.copy()
        try:
            raise error
        finally:
            del self, error

    def __iter__(self) -> Iterator[R_co]:
        """
        The values in the order of the items, each as soon as it and those before it are there.

        Raises:
            BaseException: The failure of a task that failed. At a cancelled one: waits for all,
                then as `results`.
        """
        items = self._items
        task = value = None
        try:
            for index in range(len(items)):
                if items.states[index] == VALUE:
                    value = items.values[index]
                else:
                    task = items.task(index)
                    self._meet(task)
                    value = task.result()
                yield value
        finally:
            del self, items, task, value  # what is raised holds this frame in its traceback

    def as_completed(self) -> Iterator[tuple[int, R_co]]:
        """
        The values as they come.

        Returns:
            An iterator of pairs: the position of the item, from zero, and the value.

        Raises:
            BaseException: As iteration.
        """
        task = None
        try:
            for task in as_completed(self.tasks):
                self._meet(task)
                assert task._index is not None
                yield task._index, task.result()
        finally:
            del self, task  # what is raised holds this frame in its traceback

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait for every task to end.

        Args:
            timeout: Longest wait, in seconds. `None` waits without limit, zero only looks.

        Returns:
            True if all have ended, False if the time ran out first.

        Raises:
            Cancelled: If the caller's own current token is set before all have ended.
            RuntimeError: If tasks would wait for each other in a circle.
        """
        return self._wait(_clock.seconds(timeout))

    def _wait(self, timeout: float | None) -> bool:
        items = self._items
        if items.succeeded():
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        return wait_for_all(items.unfinished(), deadline)

    def done(self) -> bool:
        """Whether every task has ended, or will never start."""
        return all(map(self._items.done, range(len(self))))

    def cancel(self, reason: object = None) -> bool:
        """
        Stop these tasks alone, as `Task.cancel` does.

        Returns:
            True if this call stopped any.
        """
        # The last one first: a worker whose task is told would begin one that is still queued.
        stopped = [task for task in reversed(self.tasks) if task.cancel(reason)]
        return bool(stopped)

    def _meet(self, task: Task[Any]) -> None:
        """Before an iterator hands out a task: a cancelled one must not hide a failure."""
        wait_for((task,), None)
        if task._state != CANCELLED:
            return
        self._wait(None)
        error = self._first_error()
        try:
            if error is not None:
                raise error
        finally:
            del self, error, task

    def _first_error(self) -> BaseException | None:
        """What `results` raises, once all have ended."""
        items = self._items
        if items.succeeded():
            return None
        failed = [index for index, state in enumerate(items.states) if state == ERROR]
        if failed:
            return items.task(min(failed, key=lambda index: items.values[index][2]))._error()
        return items.task(items.states.index(CANCELLED))._error()


@_marks.calls_out
def as_completed(tasks: Iterable[Task[R]]) -> Iterator[Task[R]]:
    """
    Tasks as they end, whatever they come to.

    Args:
        tasks: Of any groups, in any number.

    Returns:
        An iterator that yields each task once: first those that have ended already, in the
        order given, then the others as they end. A cancelled one counts as ended.

    Raises:
        TypeError: If one of them is no task.
        Cancelled: From the iterator, if the caller's own current token is set while it waits.
        RuntimeError: From the iterator, if tasks would wait for each other in a circle.

    Source:
        `concurrent.futures.as_completed`.
    """
    each = list(dict.fromkeys(tasks))
    for task in each:
        if not isinstance(task, Task):
            raise TypeError(f"as_completed() wants tasks, not {task!r}")
    return _as_completed(each)


def _as_completed(tasks: list[Task[R]]) -> Iterator[Task[R]]:
    arrivals: _Arrivals[R] = _Arrivals()
    with arrivals:
        for task in tasks:
            arrivals.add(task)
        arrivals.look()
        while (ended := arrivals.take()) is not None:
            yield ended


class _Arrivals(Arrivals[Task[R]], Generic[R]):
    """Tasks of any groups, each its own key."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[Task[R], None] = {}

    def task(self, key: Task[R]) -> Task[R]:
        return key

    def left(self) -> Iterable[Task[R]]:
        return self._left

    def add(self, task: Task[R]) -> None:
        self.hear(task._run)
        self._left[task] = None
        task._run.watch(task, self)

    def notify(self, task: Task[Any]) -> None:
        """It has ended."""
        self.arrive(task)

    def take(self) -> Task[R] | None:
        """Wait for the next one that ends; None if none are left."""
        while self._left:
            self.wait()
            task = self.ended.popleft()
            if self._left.pop(task, task) is None:
                task._run.unwatch(task, self)
                return task
        return None

    def close(self) -> None:
        super().close()
        for task in self._left:
            task._run.unwatch(task, self)
