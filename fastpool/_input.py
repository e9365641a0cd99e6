"""Reading what a user gives to be read."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from typing import Any, TypeGuard, TypeVar

from fastpool import _marks
from fastpool._errors import is_a
from fastpool._scope import current_token
from fastpool._token import CancelToken
from fastpool.exceptions import Cancelled

__all__ = [
    "END",
    "begin",
    "blame",
    "close",
    "is_prompt",
    "read",
    "read_one",
    "refuse_no_iterable",
]

T = TypeVar("T")

END: Any = object()  # Any: it stands for an item
_PROMPT = frozenset({list, tuple, range, str, bytes, set, frozenset, dict, deque})


def is_prompt(items: object) -> TypeGuard[Collection[Any]]:
    """Whether something can be read to its end without anybody's code, and without waiting."""
    return type(items) in _PROMPT


def refuse_no_iterable(caller: str, items: object) -> None:
    """Raise if something cannot be read."""
    if not hasattr(items, "__iter__") and not hasattr(items, "__getitem__"):
        raise TypeError(f"{caller}() wants an iterable, not {items!r}")


def blame(token: CancelToken, error: BaseException) -> None:
    """
    An input has raised: that is a failure of the group whose token it is.

    But for the `Cancelled` of who reads: a task that is cancelled alone, say, or a scope whose
    time is up.
    """
    if not (is_a(error, Cancelled) and current_token().cancelled()):
        token._report(error)


@_marks.calls_out
def begin(begin: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Begin to iterate."""
    return begin()


@_marks.calls_out
def read(iterator: Iterator[T], most: int) -> list[T]:
    """The next items, `most` at the most; fewer at the end."""
    return list(itertools.islice(iterator, most))


@_marks.calls_out
def read_one(iterator: Iterator[T]) -> T:
    """The next item; `END` at the end."""
    return next(iterator, END)


@_marks.calls_out
def close(iterator: Generator[Any, Any, Any]) -> None:
    """End a generator where it is."""
    iterator.close()
