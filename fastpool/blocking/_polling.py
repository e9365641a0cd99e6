"""Waiting for file descriptors, and for a token with them."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Mapping

from fastpool import _gate, _marks
from fastpool._descriptor import Descriptor
from fastpool._token import CancelToken

__all__ = ["IN", "OUT", "poll"]

# As the kernel's `select` reads them: an end or an error leaves nothing to wait for.
IN = select.POLLIN | select.POLLHUP | select.POLLERR
OUT = select.POLLOUT | select.POLLERR

DAY = 86400.0  # seconds; a longer sleep is cut in pieces, for `poll` counts in milliseconds


def poll(
    token: CancelToken | None, wanted: Mapping[int, int], timeout: float | None = None
) -> dict[int, int]:
    """
    Wait until one of some descriptors is ready.

    Args:
        token: Ends the wait; `None`: nothing but a second Ctrl-C does.
        wanted: The descriptors, and for each the events to wait for, as `select.poll` has them.
        timeout: Longest wait, in seconds; `None` waits without limit, zero or less only looks.

    Returns:
        Those that are ready, each with its events; empty if the time ran out first.

    Raises:
        Cancelled: If the token is set, even if something is ready too, which stays as it is.
        KeyboardInterrupt: If Ctrl-C comes while the main thread waits, or has come already and
            was held back.
        OSError: If one of the descriptors is closed.
    """
    heard = CancelToken.NEVER if token is None else token
    heard.check()
    deadline = None if timeout is None else time.monotonic() + timeout
    in_main_thread = threading.get_ident() == threading.main_thread().ident
    longest = _gate.SLICE if in_main_thread else DAY
    sleep = _sit_out if token is None else _sleep
    poller = select.poll()
    for fd, events in wanted.items():
        poller.register(fd, events)
    # One for this call alone: the token's own would stay open for as long as the token lives.
    wake = None if heard is CancelToken.NEVER else Descriptor()
    key = None
    try:
        if wake is not None:
            key = heard._add_sleeper(wake)
            poller.register(wake.fileno(), select.POLLIN)
        while True:
            heard.check()
            left = longest if deadline is None else min(deadline - time.monotonic(), longest)
            ready = {fd: events for fd, events in sleep(poller, left) if fd in wanted}
            heard.check()
            if any(events & select.POLLNVAL for events in ready.values()):
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if ready or (deadline is not None and time.monotonic() >= deadline):
                return ready
    finally:
        if key is not None:
            heard._remove(key)
        del wake  # a traceback may keep this frame: it is not to keep the descriptor open


@_marks.calls_out
def _sleep(poller: select.poll, seconds: float) -> list[tuple[int, int]]:
    if _marks.held:
        _marks.raise_held()
    return poller.poll(max(0.0, seconds) * 1000)


@_marks.sits_out
def _sit_out(poller: select.poll, seconds: float) -> list[tuple[int, int]]:
    return poller.poll(max(0.0, seconds) * 1000)
