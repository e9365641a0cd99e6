"""Pipes, FIFOs, whatever has a descriptor; and file locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select as _select
import stat
import sys
import time
from collections.abc import Callable, Iterable
from typing import IO, Any, Protocol, TypeVar

from fastpool import _clock, _marks
from fastpool._scope import current_token
from fastpool._token import CancelToken
from fastpool.blocking._elsewhere import sit_in
from fastpool.blocking._polling import IN, OUT, poll

__all__ = ["flock", "open_fifo", "read", "select"]

FIRST_PAUSE = 0.001  # seconds between two looks at a lock: short at first, for most are
LONGEST_PAUSE = 0.05  # held for a moment only; then as long as nobody notices


class HasFileno(Protocol):
    """A file, a socket, or whatever else has a descriptor."""

    def fileno(self) -> int: ...


F = TypeVar("F", bound="int | HasFileno")
G = TypeVar("G", bound="int | HasFileno")
H = TypeVar("H", bound="int | HasFileno")


def _fileno(file: int | HasFileno) -> int:
    if not isinstance(file, int) and not callable(getattr(file, "fileno", None)):
        raise TypeError(f"a file must be a descriptor or have a fileno(), which {file!r} has not")
    fd = file if isinstance(file, int) else file.fileno()
    if fd < 0:
        raise ValueError(f"a file descriptor cannot be negative, as that of {file!r} is")
    return fd


def select(
    rlist: Iterable[F], wlist: Iterable[G], xlist: Iterable[H], timeout: float | None = None
) -> tuple[list[F], list[G], list[H]]:
    """
    Wait until files are ready to be read from or written to, as `select.select` does.

    A cancel ends the wait. A descriptor may have any number; `select.select` ends at 1023.

    Args:
        rlist: Descriptors, or objects with a `fileno()`, to be read from.
        wlist: The same, to be written to.
        xlist: The same, that may have something exceptional to tell.
        timeout: Longest wait, in seconds. `None` waits without limit; zero or less only looks,
            where `select.select` itself refuses less.

    Returns:
        Those of each list that are ready, in its order; three empty lists if the time ran out.

    Raises:
        Cancelled: As soon as the current token is set.
        OSError: If one of them is closed.
    """
    span = _clock.seconds(timeout)
    deadline = None if span is None else time.monotonic() + span
    token = current_token()
    readers = [(file, _fileno(file)) for file in rlist]
    writers = [(file, _fileno(file)) for file in wlist]
    others = [(file, _fileno(file)) for file in xlist]
    wanted: dict[int, int] = {}
    for files, events in (
        (readers, _select.POLLIN),
        (writers, _select.POLLOUT),
        (others, _select.POLLPRI),
    ):
        for _, fd in files:
            wanted[fd] = wanted.get(fd, 0) | events
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        seen = poll(token, wanted, left)
        found = (
            [file for file, fd in readers if seen.get(fd, 0) & IN],
            [file for file, fd in writers if seen.get(fd, 0) & OUT],
            [file for file, fd in others if seen.get(fd, 0) & _select.POLLPRI],
        )
        if not seen or any(found):
            return found
        for fd in seen:  # its other end is closed, which `poll` tells unasked, and `select` not
            del wanted[fd]


def read(fd: int | HasFileno, n: int, /) -> bytes:
    """
    Read from a pipe, a terminal or a FIFO, as `os.read` does.

    Args:
        fd: The descriptor, or an object that has one. What a file object of Python's has read
            ahead is not seen. There should be one reader at a time: who finds that another was
            faster waits in the system's own `read`, which no cancel reaches.
        n: The most bytes to read.

    Returns:
        Bytes, at least one, as soon as there are any; `b""` at the end.

    Raises:
        Cancelled: As soon as the current token is set. Nothing has been read then.
        OSError: As from `os.read`.
    """
    number = _fileno(fd)
    current_token().check()
    if n > 0:
        poll(current_token(), {number: _select.POLLIN})
    return _read(number, n)


@_marks.calls_out
def _read(fd: int, n: int) -> bytes:
    return os.read(fd, n)


def open_fifo(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> IO[Any]:
    """
    Open a FIFO, as `open` does: it waits until somebody opens the other end.

    A cancel opens the other end itself, for a moment. Others who wait for the same end are woken
    by that too, and find that nobody is there.

    Args:
        path: Of the FIFO. You need to be allowed both to read and to write it, or a cancel could
            not end the wait; `abandon(open, path)` is the way then.
        mode: And the others: as for `open`.

    Returns:
        The file. Reading from it blocks as it does from any other; `read` hears the token.

    Raises:
        Cancelled: As soon as the current token is set. The FIFO is closed then.
        OSError: As from `open`.
        PermissionError: If you may not both read and write it; this is an `OSError`.
    """
    token = current_token()
    token.check()
    return open(path, mode, buffering, encoding, errors, newline, opener=_fifo_opener(token))


def _fifo_opener(token: CancelToken) -> Callable[[str, int], int]:
    def opener(path: str, flags: int) -> int:
        with contextlib.ExitStack() as closing:
            target = path
            spare: list[int] = []  # closed to make room, should the cancel come with none left

            def make_room() -> None:
                with contextlib.suppress(IndexError):
                    os.close(spare.pop())

            if sys.platform == "linux" and os.path.exists(path):
                # The file itself and not its name, which may be gone when the cancel comes.
                anchor = os.open(path, os.O_PATH)
                closing.callback(os.close, anchor)
                target = f"/proc/self/fd/{anchor}"
                may = os.access(target, os.R_OK | os.W_OK, effective_ids=True)
                if not may and stat.S_ISFIFO(os.fstat(anchor).st_mode):
                    raise PermissionError(
                        errno.EACCES,
                        "open_fifo() must be allowed to read and to write, or no cancel could end "
                        "it; use fastpool.blocking.abandon(open, path)",
                        path,
                    )
                spare.append(os.dup(anchor))
                closing.callback(make_room)

            def come() -> None:
                make_room()
                # Both ends at once, which never blocks. They stay open until the call is out: it
                # may not have got as far as to wait yet.
                closing.callback(os.close, os.open(target, os.O_RDWR | os.O_NONBLOCK))

            opened: list[int] = []

            def opens() -> None:
                opened.append(os.open(target, flags, 0o666))

            try:
                with token.interrupts(come):
                    sit_in(come, opens)
            except BaseException:
                for fd in opened:
                    os.close(fd)
                raise
            return opened[0]

    return opener


def flock(fd: int | HasFileno, operation: int, /) -> None:
    """
    Lock a file, as `fcntl.flock` does.

    The system wakes nobody who waits for a lock and wants to hear of something else as well. So
    the lock is looked at again and again, after pauses that grow to a twentieth of a second: it
    is had that much later, and who waits in `fcntl.flock` itself has it first. The pauses are
    spent on the token: a cancel ends them at once.

    Args:
        fd: The descriptor, or an object that has one.
        operation: As for `fcntl.flock`.

    Raises:
        Cancelled: As soon as the current token is set. The lock has not been taken then.
        OSError: As from `fcntl.flock`.
    """
    number = _fileno(fd)
    if operation & fcntl.LOCK_UN:  # which clean-up may do at any time
        fcntl.flock(number, operation)
        return
    token = current_token()
    token.check()
    if operation & fcntl.LOCK_NB:
        fcntl.flock(number, operation)
        return
    pause = FIRST_PAUSE
    while True:
        try:
            fcntl.flock(number, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            token.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            return
