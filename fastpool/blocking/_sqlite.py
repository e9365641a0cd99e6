"""SQLite: queries in progress, and waiting for a lock on the file."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastpool import _wakers
from fastpool._scope import current_token
from fastpool._unraisable import unraisable
from fastpool.blocking._conditions import slices
from fastpool.exceptions import Cancelled

if TYPE_CHECKING:
    import sqlite3

__all__ = ["execute"]


def execute(
    connection: sqlite3.Connection,
    sql: str,
    # Any: whatever SQLite has an adapter for
    parameters: Sequence[Any] | Mapping[str, Any] = (),
    /,
) -> sqlite3.Cursor:
    """
    `connection.execute(sql, parameters)`, until the current token is set.

    A query in progress is interrupted at once; so it is inside
    `with token.interrupts(connection):`, which fetching rows needs as well. Waiting for another
    connection's lock is what only this function ends, within 0.05 seconds: SQLite does not look
    up while it waits, so it is told to wait for moments only, until the connection's own
    timeout has passed. A commit may wait, too: `execute(connection, "COMMIT")`.

    Args:
        connection: It is usable afterwards, and its timeout is as before. What an interrupted
            statement has written is rolled back, and where it was part of a transaction it may
            have ended that: `connection.in_transaction` tells. SQLite interrupts all that it runs:
            a cursor with rows left as well, until whose end it takes nothing, the timeout
            neither; a `RuntimeWarning` tells then how to set that.
        sql: One statement.
        parameters: Its parameters, as `sqlite3` takes them.

    Returns:
        A cursor. Its rows are computed as they are fetched.

    Raises:
        Cancelled: As soon as the token is set, unless the statement has ended by then: what it
            has done is told, and the next check raises.
        sqlite3.OperationalError: If the database is still locked when the connection's timeout
            has passed; and what else `sqlite3` raises.

    Threads:
        As the connection's. On the main thread, Ctrl-C is heard when the statement has ended,
        as is every signal: run long ones in a task.

    Source:
        https://www.sqlite.org/c3ref/interrupt.html and https://www.sqlite.org/c3ref/busy_timeout.html
    """
    import sqlite3

    before = _busy_timeout(connection)
    deadline = time.monotonic() + before / 1000
    cursor: sqlite3.Cursor | None = None
    try:
        with current_token().interrupts(connection):
            for seconds in slices(None):
                begun = time.monotonic()
                moment = max(0, min(int(seconds * 1000), int((deadline - begun) * 1000)))
                _busy_timeout(connection, moment)
                try:
                    cursor = connection.execute(sql, parameters)
                    break
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                        raise
                    # It does not wait where two would wait for each other.
                    now = time.monotonic()
                    if now - begun < moment / 2000 or now >= deadline or moment == 0:
                        raise
    except Cancelled:
        if cursor is None:
            raise
    finally:
        unharmed = _set_back(connection, cursor, before)
    assert cursor is not None  # `slices` of no timeout never ends
    if not unharmed:
        current_token().check()
        raise sqlite3.OperationalError("interrupted")  # by somebody else
    return cursor


def _set_back(
    connection: sqlite3.Connection, cursor: sqlite3.Cursor | None, milliseconds: int
) -> bool:
    """
    Give a connection its timeout back; whether the cursor has come to no harm.

    As long as a statement is there that was to be interrupted, the connection takes no other: the
    cursor's, which has rows left, or one that somebody else is reading.
    """
    sqlite3 = sys.modules["sqlite3"]
    for last in (False, True):
        try:
            _busy_timeout(connection, milliseconds)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            if cursor is not None:
                cursor.close()
            if last:
                _warn(milliseconds)
        else:
            return not last
    return False


def _warn(milliseconds: int) -> None:
    try:
        warnings.warn(
            "another cursor of the connection was being read, which SQLite interrupts as well; it "
            "has left the timeout at a moment: close that cursor, and execute "
            f"'PRAGMA busy_timeout = {milliseconds}'",
            RuntimeWarning,
            stacklevel=4,
        )
    except Warning as error:  # made an error by a filter: it must not pass for what is raised
        unraisable(error, _warn)


def _busy_timeout(connection: sqlite3.Connection, milliseconds: int | None = None) -> int:
    """How long a connection waits for a lock; set first, if it is given."""
    cursor = connection.cursor()
    cursor.row_factory = None  # the connection's could make anything of the row
    setting = "" if milliseconds is None else f" = {milliseconds}"
    found: int = cursor.execute(f"PRAGMA busy_timeout{setting}").fetchone()[0]
    return found


def _interrupt(connection: sqlite3.Connection) -> object:
    """End the query in progress; again and again, for SQLite forgets it if there is none yet."""
    sqlite3 = sys.modules["sqlite3"]
    try:
        connection.interrupt()
    except sqlite3.ProgrammingError:
        return None  # it was closed
    return _wakers.AGAIN


# Not slow: SQLite takes no lock to interrupt.
_wakers.provide("sqlite3.Connection", _interrupt)
