"""What can go wrong, by name."""

from __future__ import annotations

import concurrent.futures
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpool._token import CancelToken

__all__ = [
    "Cancelled",
    "GroupClosedError",
    "StuckTaskError",
    "TaskCancelledError",
    "WorkerDiedError",
]


def describe(reason: object) -> str:
    """
    Say a reason in words, without calling a method of somebody's exception. Raises nothing.
    """
    if not issubclass(type(reason), BaseException):
        with contextlib.suppress(Exception):
            return str(reason)
    return type(reason).__qualname__


class Cancelled(BaseException):
    """
    Raised when code reaches a check or a blocked call after its token was set.

    It derives from `BaseException`, so `except Exception` lets it pass.

    Attributes:
        reason: Why: what was given to `cancel()`, else the failure, a `TimeoutError` for a
            deadline, or the word `"cancelled"`. `None` only if made by hand without one.
        token: The token that raised it; `None` if made by hand, or come from another process.
        __cause__: The failure that was reported to the token or its group, if there was one.

    Source:
        A `BaseException` like `asyncio.CancelledError` (bpo-32528) and `trio.Cancelled`.
    """

    def __init__(self, reason: object = None, *, token: CancelToken | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.token = token

    def __str__(self) -> str:
        return "" if self.reason is None else describe(self.reason)

    def __reduce__(self) -> tuple[type[Cancelled], tuple[object]]:
        # The token stays behind: it belongs to this process.
        return (type(self), (self.reason,))


class TaskCancelledError(concurrent.futures.CancelledError):
    """
    Raised when a result is asked of a task that was cancelled, by code that was not.

    Attributes:
        reason: Why the task was cancelled.
        __cause__: The first failure of the task's group, if there was one.
    """

    def __init__(self, reason: object = None, message: str = "") -> None:
        super().__init__(message or ("" if reason is None else describe(reason)))
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason, *self.args))


class GroupClosedError(RuntimeError):
    """
    Raised when something is submitted to a group that takes nothing any more, or not yet.

    Attributes:
        reason: Why the group was cancelled; `None` if it was never entered, or has ended.
    """

    def __init__(self, message: str = "", *, reason: object = None) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, {"reason": self.reason})


class StuckTaskError(RuntimeError):
    """
    Raised when a block is left without a task that did not stop.
    """


class WorkerDiedError(RuntimeError):
    """
    Raised when the process that ran a task died under it.
    """
