"""
PostgreSQL by psycopg 3: queries, waits for locks, copying, and waiting for notifications.

Run with psycopg 3.3.9, the package and its binary, with libpq 15 and 18, on Linux.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from contextvars import ContextVar
from typing import Any

from fastpool import _clock, _wakers
from fastpool.blocking._elsewhere import Call

__all__ = ["PATIENCE", "REPEAT"]

PATIENCE = 2.0  # seconds for the server to end a query; less than a group's grace, or it would warn
REPEAT = 0.1  # seconds between two requests; time enough for the roll-back after the first

_ACTIVE = 1  # PQTRANS_ACTIVE: a command is in progress

# Since when a block waits for the server, and when its last request was sent. Each try at a block
# is made in one and the same context, which is nobody else's.
_requests: ContextVar[tuple[float, float]] = ContextVar("fastpool: requests to cancel")


def _interrupt(connection: Any) -> object:  # Any: its type is not imported here
    """
    Have the server cancel what the connection does; cut the connection if nothing comes of it.

    A request that overtakes its query is lost, so it is made again until the block is left. And
    no request ends what is not a query: waiting for notifications.
    """
    if connection.closed:
        return None
    if getattr(connection, "_notifies_backlog", connection) is None:  # `notifies()` has taken it
        _cut(connection)
        return None
    if not connection.lock.locked():
        return _wakers.AGAIN  # nobody waits for the server
    now = time.monotonic()
    since, last = _requests.get((now, now - REPEAT))
    patience = since + PATIENCE - now
    if connection.pgconn.transaction_status == _ACTIVE and now - last >= REPEAT and patience > 0:
        last = now
        if not _asked(connection, patience):
            patience = 0
    if patience <= 0:
        _cut(connection)
        return None
    _requests.set((since, last))
    return _wakers.AGAIN


def _asked(connection: Any, seconds: float) -> bool:  # Any: see above
    """
    Whether the server has taken a request to cancel, and done what there was to do with it.

    If not, it may still do so, at any time.
    """

    def ask() -> None:
        if hasattr(connection, "cancel_safe"):  # from psycopg 3.2 on
            connection.cancel_safe(timeout=seconds)
        else:
            connection.cancel()

    # A libpq before 17 knows no timeout here, so that another thread waits for its answer.
    call = Call(ask)
    _clock.run_in_helper(call.run)
    call.gate.wait(seconds)
    if not call.ended():
        return False
    try:
        call.unwrap()
    except sys.modules["psycopg"].Error:  # out of reach, out of time, or a prepared transaction
        return False
    return True


def _cut(connection: Any) -> None:  # Any: see above
    """Have whoever waits for the server on this connection find that it is lost."""
    # It may be closed, or lost already.
    with contextlib.suppress(sys.modules["psycopg"].Error, OSError):
        number = connection.fileno()
        twin = socket.socket(fileno=os.dup(number))
        try:
            # Still the connection's, so it was when the duplicate was made.
            if connection.fileno() == number:
                twin.shutdown(socket.SHUT_RDWR)
        finally:
            twin.close()


def _interrupt_cursor(cursor: Any) -> object:  # Any: see above
    return _interrupt(cursor.connection)


# Slow: it talks to the server.
_wakers.provide("psycopg.Connection", _interrupt, slow=True)
_wakers.provide("psycopg.Cursor", _interrupt_cursor, slow=True)
