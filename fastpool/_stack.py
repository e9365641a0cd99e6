"""Where a task is: those frames of its thread that are its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import FrameType

from fastpool._frames import place, show, source_line
from fastpool._lane import Lane
from fastpool._task import call
from fastpool._text import plain
from fastpool.backends.threads import serve_stretch

__all__ = ["called", "is_ours", "module_of", "own_frames", "render", "where"]

LIMIT = 20  # calls that a report shows, the innermost; chosen by feel

# On a thread's stack each task begins with a frame of one of these.
_STARTS = frozenset({call.__code__, serve_stretch.__code__})


def module_of(frame: FrameType) -> str:
    """The name of the module whose code it runs."""
    return str(frame.f_globals.get("__name__"))


def is_ours(frame: FrameType) -> bool:
    """Whether it runs code of this library."""
    return module_of(frame).partition(".")[0] == "fastpool"


def own_frames(lane: Lane, frames: dict[int, FrameType], *, ours: bool = False) -> list[FrameType]:
    """
    The frames of the task that a lane runs.

    Args:
        lane: The task's.
        frames: What `sys._current_frames()` said.
        ours: Whether to keep those of this library.

    Returns:
        From the task's function downwards, the innermost last; empty if nothing is known of it.
    """
    thread = lane.of_thread
    frame = None if thread is None or thread.ident is None else frames.get(thread.ident)
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    # A worker that waits may have begun other tasks on top of the one that waits.
    above = len(list(lane.stack()))
    found: list[FrameType] = []
    for frame in reversed(stack):
        if frame.f_code in _STARTS:
            above -= 1
        elif above == 0 and (ours or not is_ours(frame)):
            found.append(frame)
    return found


def where(frame: FrameType) -> str:
    """The line that a frame is at, by file, line and function."""
    file, line, _ = place(frame)
    return f"{file}:{line} in {frame.f_code.co_qualname}"


def render(frames: Sequence[FrameType]) -> list[str]:
    """The lines that show frames to a reader, as a traceback does."""
    shown = frames[-LIMIT:]
    lines = [] if len(shown) == len(frames) else [f"  ... {len(frames) - LIMIT} calls further out"]
    for text in show(map(place, shown)):
        lines += [text_line for line in text.splitlines() if (text_line := plain(line).rstrip())]
    return lines


def called(frame: FrameType) -> str:
    """
    The name of what a frame calls right now: `acquire` for `lock.acquire()` and `with lock:`.

    Empty if the source does not tell.
    """
    import ast  # only here: it takes longer to load than all of us

    positions = next(
        itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4
    )
    first, last, start, end = positions
    if first is None or last is None or start is None or end is None:
        return ""
    file = frame.f_code.co_filename
    lines = [source_line(file, line).encode() for line in range(first, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    source = b"".join(lines)
    if not source:
        return ""
    if source.startswith(b"with"):  # until Python 3.12 it is the whole statement
        return "acquire"
    try:
        node = ast.parse(b"(" + source + b")", mode="eval").body
    except (SyntaxError, ValueError):  # the file is another one by now
        return ""
    if not isinstance(node, ast.Call):
        return "acquire"  # only entering a `with` block waits in an expression that is no call
    function = node.func
    return getattr(function, "attr", "") or getattr(function, "id", "")
