"""The log: a line by structlog for each event of a group."""

from __future__ import annotations

import sys
from typing import Any, Protocol, final

from fastpool._errors import is_a
from fastpool._text import plain
from fastpool._unraisable import unraisable
from fastpool.events import Event, Observer
from fastpool.exceptions import Cancelled

__all__ = ["StructlogObserver"]

_LEVELS = {
    "group_opened": "info",
    "task_submitted": "debug",
    "task_started": "debug",
    "task_succeeded": "debug",
    "task_failed": "warning",
    "task_cancelled": "debug",
    "task_stuck": "warning",
    "task_abandoned": "warning",
    "group_cancelled": "info",
    "group_closed": "info",
}


class _Logger(Protocol):
    """A structlog logger, of whatever kind."""

    def bind(self, **values: Any) -> Any:  # Any: which methods that has, the application decides
        """One with these values in each of its lines."""


@final
class StructlogObserver:
    """
    An observer that logs each event, as `fastpool.task_failed` and so on.

    Every group has one by itself once the application has configured structlog. Give one to a
    group, `TaskGroup(observers=[StructlogObserver(logger)])`, to have it log by another logger,
    or without that.

    What happens to a task is told at level `debug`, but at `warning` that it failed, is stuck or
    was abandoned; what happens to the group at `info`, but at `warning` that a failure left its
    block. The keys are `group`, `task` and `worker`, the names without their control characters;
    `duration_s`, in seconds; and `error`, the qualified name of an exception's class. Neither its
    text nor any argument is logged, since they may be secrets.

    Args:
        logger: A logger as `structlog.get_logger()` or `structlog.wrap_logger()` gives it. It is
            bound when a group is entered, so structlog may be configured until then.

    Raises:
        TypeError: If it is no such logger.

    Threads:
        Serves any number of groups at once. What the logger's processors take out of the context
        (`structlog.contextvars.merge_contextvars`) is what was there when the task was submitted,
        and for the group when its block was entered.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: _Logger) -> None:
        if isinstance(logger, type) or not callable(getattr(logger, "bind", None)):
            raise TypeError(
                f"StructlogObserver() wants a structlog logger, with bind(), not {logger!r}; "
                "write StructlogObserver(structlog.get_logger())"
            )
        self._logger = logger

    def __call__(self, event: Event) -> None:
        """Log an event. A group binds the logger once instead, which is quicker."""
        group = event.group
        self._bound("" if group is None else group.name)(event)

    def __repr__(self) -> str:
        return f"StructlogObserver({self._logger!r})"

    def _bound(self, group_name: str) -> Observer:
        return _GroupLog(self._logger.bind(group=plain(group_name)))


class _GroupLog:
    """Logs the events of one group."""

    __slots__ = ("_log",)

    def __init__(self, log: object) -> None:
        self._log = log

    def __call__(self, event: Event) -> None:
        level = _LEVELS[event.name]
        error = event.error
        if event.task is None and error is not None and not is_a(error, Cancelled):
            level = "warning"
        keys: dict[str, object] = {"worker": plain(event.worker)}
        if event.task is not None:
            keys["task"] = plain(event.task.name)
        if event.duration is not None:
            keys["duration_s"] = round(event.duration, 6)
        if error is not None:
            keys["error"] = plain(type(error).__qualname__)
        getattr(self._log, level)(f"fastpool.{event.name}", **keys)


def with_log(observers: tuple[Observer, ...], group_name: str) -> tuple[Observer, ...]:
    """
    The observers of a group that is being entered, structlog's among them if it is in use.

    Args:
        observers: Those that were given to the group.
        group_name: What its lines bear.

    Returns:
        The same, each `StructlogObserver` bound to the group; and one more if there is none, and
        the application has configured structlog.
    """
    # Looked up and not imported: an application that has not imported it cannot have configured
    # it. Another thread may be importing it just now, and have only half of it.
    structlog: Any = sys.modules.get("structlog")  # Any: a module
    built_in = getattr(structlog, "is_configured", bool)()
    if not observers and not built_in:
        return observers
    if built_in and not any(isinstance(observer, StructlogObserver) for observer in observers):
        observers += (StructlogObserver(structlog.get_logger("fastpool")),)
    bound: list[Observer] = []
    for observer in observers:
        if isinstance(observer, StructlogObserver):
            try:
                observer = observer._bound(group_name)
            except BaseException as broken:  # it watches from the side, and changes no outcome
                unraisable(broken, observer)
                continue
        bound.append(observer)
    return tuple(bound)
