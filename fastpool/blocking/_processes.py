"""Waiting for the processes and the queues of `multiprocessing`, by their descriptors."""

from __future__ import annotations

import queue as queues
import select
import time
from multiprocessing.process import BaseProcess
from typing import Any

from fastpool._scope import current_token
from fastpool.blocking._conditions import FIRST_SLICE, LONGEST_SLICE, deadline_of
from fastpool.blocking._polling import poll

__all__ = ["get", "wait"]


def get(queue: Any, timeout: float | None) -> Any:  # Any: no stub knows its `_reader`
    """An item of a queue, unless the current token is set first; `queue.Empty` if time is up."""
    deadline = deadline_of(timeout)
    token = current_token()
    token.check()
    pause = FIRST_SLICE
    while True:
        try:
            return queue.get(False)
        except queues.Empty:
            token.check()
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise queues.Empty
        if queue._reader.poll():
            # Another reader is at it, and has the lock of the pipe until the item is through.
            token.sleep(pause)
            pause = min(2 * pause, LONGEST_SLICE)
        else:
            poll(token, {queue._reader.fileno(): select.POLLIN}, left)


def wait(process: BaseProcess, timeout: float | None) -> bool:
    """Whether a process ends in time, unless the current token is set first."""
    deadline = deadline_of(timeout)
    token = current_token()
    pause = FIRST_SLICE
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = poll(token, {process.sentinel: select.POLLIN}, left)
        process.join(0)
        if not process.is_alive():
            return True
        if not ready:
            return False
        # It has closed its files, and is about to end.
        token.sleep(pause if left is None else min(pause, left))
        pause = min(2 * pause, LONGEST_SLICE)
