"""Where other threads are: their frames looked at, and shown to a reader."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sys
import traceback
from collections.abc import Generator, Iterable
from types import FrameType

__all__ = ["Call", "looking", "place", "show", "source_line"]

Call = tuple[str, int, str]  # the file, the line and the function that a frame is at


@contextlib.contextmanager
def looking() -> Generator[None, None, None]:
    """
    To be in while the frames of other threads are asked for and walked.

    Before Python 3.12 a collection starts in the middle of making a frame object, with a lock of
    the interpreter's held: what it finalizes may hand over to the thread that is looked at, or
    wait for ever for one that wants that lock.
    """
    pauses = sys.version_info < (3, 12) and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield
    finally:
        if pauses:
            gc.enable()


def place(frame: FrameType) -> Call:
    """Where a frame is."""
    code = frame.f_code
    return code.co_filename, frame.f_lineno or code.co_firstlineno, code.co_name


def source_line(file: str, line: int) -> str:
    """
    A line of source, with its end; empty if it cannot be had.

    The loader of the module is not asked, which may be anybody's code. It is where somebody else
    has told `linecache` of it.
    """
    try:
        return linecache.getline(file, line)
    except Exception:  # such a loader's, or of a name that no file can have
        return ""


def show(calls: Iterable[Call]) -> list[str]:
    """What a traceback shows of calls, a text for each; those that are repeated are counted."""
    return traceback.StackSummary.from_list(
        [(file, line, name, source_line(file, line)) for file, line, name in calls]
    ).format()
