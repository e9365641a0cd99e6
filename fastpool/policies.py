"""When a group gives up, and what leaves it then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing import Any

    from fastpool._task import Failure, Task

__all__ = ["FailFast", "Judge", "Policy"]


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
