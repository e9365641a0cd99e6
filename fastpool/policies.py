"""When a group gives up, and what leaves it then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing import Any

    from fastpool._task import Failure, Task

__all__ = ["CollectAll", "FailFast", "FirstSuccess", "Judge", "Policy"]


@runtime_checkable
class Judge(Protocol):
    """Watches the outcomes of one group's tasks, and says when to stop and what to raise."""

    def outcome(self, task: Task[Any], error: BaseException | None) -> bool:
        """
        A task has an outcome: `error`, or a value where that is None.

        Called where the outcome is first known, one call at a time, for every value and every
        failure, but not for what was cancelled. It must not wait for tasks. What it raises
        cancels the rest and leaves the block.

        Returns:
            True to cancel the rest.
        """
        ...

    def end(self, failures: Sequence[Failure]) -> BaseException | None:
        """
        Everything has stopped: what leaves the block, if anything.

        Called once, on the leaving thread. What it raises leaves the block.

        Args:
            failures: Every failure, the first in time first.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """A value that serves any number of groups: it gives each a judge of its own."""

    def start(self) -> Judge:
        """A judge for a group that is being entered."""
        ...


class FailFast:
    """The first failure cancels the rest, and leaves the block as the object it is."""

    __slots__ = ()

    def start(self) -> Judge:
        """The judge of one group."""
        return FirstFailure()

    def __repr__(self) -> str:
        return "FailFast()"


class FirstFailure:
    """The judge that `FailFast` appoints."""

    __slots__ = ()

    def outcome(self, task: Task[Any], error: BaseException | None) -> bool:
        """Any failure is enough."""
        return error is not None

    def end(self, failures: Sequence[Failure]) -> BaseException | None:
        """The first failure in time."""
        return failures[0].exception if failures else None


class CollectAll:
    """
    No task's failure cancels the rest; all failures leave the block in an `ExceptionGroup`.

    What leaves the body cancels the rest all the same, as Ctrl-C does, and is among them. What
    has a value can be read as ever.
    """

    __slots__ = ()

    def start(self) -> Judge:
        """The judge of one group."""
        return Collector()

    def __repr__(self) -> str:
        return "CollectAll()"


class Collector:
    """The judge that `CollectAll` appoints."""

    __slots__ = ()

    def outcome(self, task: Task[Any], error: BaseException | None) -> bool:
        """Nothing is enough."""
        return False

    def end(self, failures: Sequence[Failure]) -> BaseException | None:
        """All failures, by time, as a group of exceptions."""
        return _collect(failures)


class FirstSuccess:
    """
    The first task that has a value cancels the rest, and is the group's `winner`.

    No failure of a task does. The block raises what left the body, if something did; with a
    winner nothing else, and without one all failures in an `ExceptionGroup`.
    """

    __slots__ = ()

    def start(self) -> Judge:
        """The judge of one group."""
        return FirstValue()

    def __repr__(self) -> str:
        return "FirstSuccess()"


class FirstValue:
    """The judge that `FirstSuccess` appoints."""

    __slots__ = ("_won",)

    def __init__(self) -> None:
        self._won = False

    def outcome(self, task: Task[Any], error: BaseException | None) -> bool:
        """Any value is enough."""
        # One that comes after the group was cancelled by others has won nothing.
        if error is None and not task._run.late:
            self._won = True
        return error is None

    def end(self, failures: Sequence[Failure]) -> BaseException | None:
        """What no task raised; else all failures, unless somebody has won."""
        for failure in failures:
            if failure.task is None:
                return failure.exception
        return None if self._won else _collect(failures)


def _collect(failures: Sequence[Failure]) -> BaseException | None:
    errors = [failure.exception for failure in failures]
    if not errors:
        return None
    if len(errors) == 1 and failures[0].task is None and isinstance(errors[0], GeneratorExit):
        return errors[0]  # a generator that is closed in the block lets nothing else pass
    how_many = f"{len(errors)} failure{'s' if len(errors) > 1 else ''}"
    return BaseExceptionGroup(how_many, errors)  # of exceptions alone it is an `ExceptionGroup`
