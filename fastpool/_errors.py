"""Other people's exceptions: handled without calling a method of theirs, and annotated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeGuard, TypeVar

__all__ = ["Note", "annotate", "is_a", "raise_as_it_is", "release", "strip"]

E = TypeVar("E", bound=BaseException)

# The modules in which tasks and judges are called. Their frames are of no interest to
# who reads a traceback, and their locals would keep things alive.
_CALLERS = frozenset(
    {
        "fastpool._cancellable",
        "fastpool._items",
        "fastpool._ledger",
        "fastpool._run",
        "fastpool._task",
        "fastpool._taskgroup",
        "fastpool.backends._worker",
        "fastpool.backends.threads",
        "fastpool.futures",
    }
)


# The base class's own attributes: a subclass may have made anything of these names.
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]  # Any: no stub knows them as descriptors
_CONTEXT: Any = BaseException.__dict__["__context__"]
_CAUSE: Any = BaseException.__dict__["__cause__"]
_DICT: Any = BaseException.__dict__["__dict__"]


def is_a(error: object, *kinds: type[E]) -> TypeGuard[E]:
    """`isinstance`, which would ask the exception itself for its class."""
    return issubclass(type(error), kinds)


def strip(error: BaseException) -> TracebackType | None:
    """
    Take our own frames off the head of an exception's traceback, and empty all of ours in it.

    What they refer to leads to the exception in the end. Those that still run let go of their
    names themselves. An object that has left a block before and is raised again has a traceback
    that goes on with the old one, as in Python without us; of that, ours are taken out, too.

    Returns:
        What is left of the traceback.
    """
    traceback: TracebackType | None = _TRACEBACK.__get__(error)
    while traceback is not None and _module_of(traceback.tb_frame) in _CALLERS:
        _empty(traceback.tb_frame)
        traceback = traceback.tb_next
    if any(isinstance(note, Note) and note.settled for note in _notes(error) or ()):
        traceback = _without_ours(traceback)
    BaseException.with_traceback(error, traceback)
    for frame in _frames(error):
        _empty(frame)
    return traceback


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without our frames; a copy, since somebody may have kept the other one."""
    kept: list[TracebackType] = []
    while traceback is not None:
        if _module_of(traceback.tb_frame) not in _CALLERS | {__name__}:
            kept.append(traceback)
        traceback = traceback.tb_next
    for entry in reversed(kept):
        traceback = TracebackType(traceback, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return traceback


def release(error: BaseException) -> None:
    """
    Empty those of our frames that are over and called what an exception went through.

    To be done last, for an exception that leaves us: a frame of a judge's, say, refers to ours
    that called it, and that one to the exception.
    """
    seen: set[FrameType] = set()
    for frame in _frames(error):
        caller: FrameType | None = frame
        while caller is not None and caller not in seen:
            seen.add(caller)
            _empty(caller)
            caller = caller.f_back


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an exception, its causes and its contexts went through."""
    chain = [error]
    for link in chain:  # grows as it goes
        traceback: TracebackType | None = _TRACEBACK.__get__(link)
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next
        for before in (_CAUSE.__get__(link), _CONTEXT.__get__(link)):
            if before is not None and not any(before is known for known in chain):
                chain.append(before)


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _empty(frame: FrameType) -> None:
    if _module_of(frame).startswith("fastpool."):
        with contextlib.suppress(RuntimeError):  # it still runs
            frame.clear()


def raise_as_it_is(error: BaseException) -> NoReturn:
    """
    Raise an exception without making what is being handled its context.

    The caller deletes its own names for the error, so that no traceback closes a cycle.
    """
    context = _CONTEXT.__get__(error)
    # What is being handled may have it as its own context, which the interpreter would cut off.
    handled = sys.exception()
    seen: set[int] = set()
    while handled is not None and _CONTEXT.__get__(handled) is not error:
        seen.add(id(handled))
        handled = _CONTEXT.__get__(handled)
        if id(handled) in seen:
            handled = None
    try:
        raise error
    finally:
        _CONTEXT.__set__(error, context)
        if handled is not None:
            _CONTEXT.__set__(handled, error)
        del error, context, handled


class Note(str):
    """
    A note that a group has put on an exception, to be told from other people's.

    Attributes:
        settled: True once the exception has left an outermost block. A group that meets it
            again replaces the note.
    """

    settled = False


def in_words(error: BaseException) -> str:
    """What an exception is and says. Raises nothing, though it be somebody's."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except BaseException:
        return kind


def add_note(error: BaseException, line: str) -> None:
    """As `error.add_note`, also where the exception takes no attributes."""
    kept = _notes(error)
    if kept is not None:
        names: dict[str, Any] = _DICT.__get__(error)
        names["__notes__"] = [*kept, line]


def annotate(error: BaseException, lines: list[str], *, outermost: bool) -> None:
    """
    Add our notes to an exception, after those of the groups inside ours.

    Args:
        error: The exception. One whose `__notes__` are no list keeps them as they are.
        lines: The notes.
        outermost: Whether it leaves an outermost block now.
    """
    kept = _notes(error)
    if kept is None:
        return  # something of its own: `add_note` would refuse, too
    names: dict[str, Any] = _DICT.__get__(error)
    if any(isinstance(note, Note) and note.settled for note in kept):
        kept = [note for note in kept if not isinstance(note, Note)]
    kept = kept + [Note(line) for line in lines]
    if kept:
        names["__notes__"] = kept
    else:
        names.pop("__notes__", None)
    if outermost:
        for note in kept:
            if isinstance(note, Note):
                note.settled = True


def _notes(error: BaseException) -> list[str] | None:
    """The notes of an exception; `None` if what it has in their place is no list."""
    notes: list[str] = _DICT.__get__(error).get("__notes__", [])
    return notes if type(notes) is list else None
