"""Other people's exceptions: handled without calling a method of theirs, and annotated."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, NoReturn

__all__ = ["Note", "annotate", "raise_as_it_is", "strip"]

# The modules in which tasks and judges are called. Their frames are of no interest to
# who reads a traceback, and their locals would keep things alive.
_CALLERS = frozenset(
    {
        "fastpool._cancellable",
        "fastpool._ledger",
        "fastpool._run",
        "fastpool._task",
        "fastpool._taskgroup",
        "fastpool.backends.threads",
    }
)


# The base class's own attributes: a subclass may have made anything of these names.
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]  # Any: no stub knows them as descriptors
_CONTEXT: Any = BaseException.__dict__["__context__"]


def strip(error: BaseException) -> TracebackType | None:
    """
    Take our own frames off the head of an exception's traceback, and empty them.

    A frame that is left refers to the one that called it, so that one must not refer to
    anything that leads to the exception. Those that still run let go of their names themselves.

    Returns:
        What is left of the traceback.
    """
    traceback: TracebackType | None = _TRACEBACK.__get__(error)
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in _CALLERS:
        with contextlib.suppress(RuntimeError):  # it still runs
            traceback.tb_frame.clear()
        traceback = traceback.tb_next
    BaseException.with_traceback(error, traceback)
    return traceback


def raise_as_it_is(error: BaseException) -> NoReturn:
    """
    Raise an exception without making what is being handled its context.

    The caller deletes its own names for the error, so that no traceback closes a cycle.
    """
    context = _CONTEXT.__get__(error)
    try:
        raise error
    finally:
        _CONTEXT.__set__(error, context)
        del error, context


class Note(str):
    """
    A note that a group has put on an exception, to be told from other people's.

    Attributes:
        settled: True once the exception has left an outermost block. A group that meets it
            again replaces the note.
    """

    settled = False


def annotate(error: BaseException, lines: list[str], *, outermost: bool) -> None:
    """
    Add our notes to an exception, after those of the groups inside ours.

    Args:
        error: The exception. If it takes no notes, it stays without.
        lines: The notes.
        outermost: Whether it leaves an outermost block now.
    """
    try:
        notes: object = error.__dict__.get("__notes__")
        kept: list[str] = list(notes) if isinstance(notes, list) else []  # pyright: ignore
        if any(isinstance(note, Note) and note.settled for note in kept):
            kept = [note for note in kept if not isinstance(note, Note)]
        kept.extend(Note(line) for line in lines)
        if kept:
            error.__notes__ = kept
        if outermost:
            for note in kept:
                if isinstance(note, Note):
                    note.settled = True
    except Exception:
        return
