"""Steps that are all made, whatever a signal handler raises between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

__all__ = ["once", "whole"]

T = TypeVar("T")
Args = TypeVarTuple("Args")

TRIES = 20  # more than signals can be in the way of


def whole(step: Callable[[*Args], T], *args: *Args, tries: int = TRIES) -> T:
    """
    Call something until it has come to its end.

    Args:
        step: May be called again, wherever it was interrupted.
        *args: What it is called with.
        tries: How often at the most; it may have an error of its own.

    Raises:
        BaseException: What it was interrupted by, but only then.
    """
    try:
        return step(*args)
    except BaseException:
        if tries > 1:
            whole(step, *args, tries=tries - 1)
        raise


def once(fn: Callable[[], object]) -> Callable[[], None]:
    """A function that calls another the first time that it is called, and does nothing then."""
    claims: dict[None, object] = {}  # `setdefault` decides

    def call() -> None:
        mine = object()
        if claims.setdefault(None, mine) is mine:
            fn()

    return call
