"""Asking for a line on standard input."""

from __future__ import annotations

import contextlib
import io
import select
import sys
from collections.abc import Generator
from typing import IO, Any

from fastpool import _marks
from fastpool._scope import current_token
from fastpool.blocking._polling import poll

__all__ = ["input"]


def input(prompt: object = "", /) -> str:
    """
    Ask for a line on standard input, as the built-in function does.

    On a terminal the line is edited as the terminal itself allows it, without the history that
    `readline` adds. What `sys.stdin` has read ahead comes first, and what comes after the line
    stays for the next reader, whoever that is.

    Args:
        prompt: Shown before, on `sys.stdout`.

    Returns:
        The line without its end.

    Raises:
        Cancelled: As soon as the current token is set. Of a pipe, the part of the line that has
            come by then is lost, as on Ctrl-C in `sys.stdin.readline()`.
        EOFError: If there is no line any more.

    Threads:
        One at a time reads; another that asks meanwhile hears its token only when it is its turn.
    """
    current_token().check()
    if sys.stdin is None:  # as without a console
        raise RuntimeError("input(): lost sys.stdin")
    if sys.stdout is not None:
        _show(prompt, sys.stdout)
    with _hearing(sys.stdin):
        line = _readline(sys.stdin)
    if not line:
        raise EOFError("EOF when reading a line")
    return line.removesuffix("\n")


@_marks.calls_out
def _show(prompt: object, file: IO[str]) -> None:
    file.write(str(prompt))
    file.flush()


@_marks.calls_out
def _readline(file: IO[str]) -> str:
    return file.readline()


_heard: dict[object, int] = {}  # one entry for each call that reads, and the file it reads


@contextlib.contextmanager
def _hearing(file: object) -> Generator[None, None, None]:
    """
    Have a text file wait for what it reads on the token of whoever reads.

    Its two layers keep what they have read ahead, and cannot be asked for it; so the waiting is
    put below them, where they ask the system for more. A file made otherwise reads as it does.
    """
    raw = getattr(getattr(file, "buffer", None), "raw", None)
    if not isinstance(raw, io.FileIO):
        yield
        return

    def readinto(buffer: Any, /) -> int | None:  # Any: as `io.FileIO` has it
        poll(current_token(), {raw.fileno(): select.POLLIN})
        return io.FileIO.readinto(raw, buffer)

    mine = object()
    _heard[mine] = id(raw)
    # On the object, before the method of its class. Whoever begins is noted first and puts it
    # there then; whoever ends takes it off and looks then: no call that reads goes without.
    vars(raw)["readinto"] = readinto
    try:
        yield
    finally:
        del _heard[mine]
        if id(raw) not in list(_heard.values()):
            vars(raw).pop("readinto", None)
            if id(raw) in list(_heard.values()):
                vars(raw)["readinto"] = readinto
