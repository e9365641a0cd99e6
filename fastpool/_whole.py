"""Steps that are all made, whatever a signal handler raises between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

__all__ = ["is_handlers", "whole"]

T = TypeVar("T")
Args = TypeVarTuple("Args")

TRIES = 20  # more than there are signals that come one after another


def whole(step: Callable[[*Args], T], *args: *Args, tries: int = TRIES) -> T:
    """
    Call something until it has come to its end, though a signal handler raises in the middle.

    Args:
        step: May be called again, wherever it was interrupted.
        *args: What it is called with.
        tries: How often at the most; it may have an error of its own.

    Raises:
        BaseException: What it was interrupted by first; the last, if it never came to its end.
    """
    try:
        return step(*args)
    except BaseException:
        if tries > 1:
            whole(step, *args, tries=tries - 1)
        raise


def is_handlers(error: BaseException) -> bool:
    """
    Whether an exception is a signal handler's.

    To be asked in the very function that called nothing but C, in which it was met: what C raises
    has no frame further in.
    """
    traceback = error.__traceback__
    return traceback is not None and traceback.tb_next is not None
