"""
SQLite: a query in progress and a wait for a lock hear the token, and the connection lives on.
"""

import sqlite3
import threading
import warnings

import pytest
from blocked import cancel_while_blocked, ended, under
from staging import start, until

import fastpool.blocking
from fastpool import Cancelled, CancelToken, current_token, use_token

blocking = fastpool.blocking
pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")
ENDLESS = (
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT seen(x + 1) FROM n) SELECT max(x) FROM n"
)


@pytest.fixture
def connect(tmp_path):
    """Makes connections to one and the same file, and closes them."""
    made = []

    def connects(**settings):
        settings = {"isolation_level": None, "check_same_thread": False, **settings}
        made.append(sqlite3.connect(tmp_path / "data.db", **settings))
        return made[-1]

    yield connects
    for connection in made:
        connection.close()


def with_endless_query(connection):
    """How many rows it has come to."""
    rows = []
    connection.create_function("seen", 1, lambda x: rows.append(x) or x)
    return rows


def fetch_interruptible(connection):
    with current_token().interrupts(connection):
        return connection.execute(ENDLESS).fetchone()


def test_cancel_is_heard_though_another_cursor_is_being_read(connect):
    """
    SQLite interrupts that as well, and takes nothing until it is at its end: the user is told.
    """
    connection = connect(timeout=7)
    rows = with_endless_query(connection)
    other = connection.execute("SELECT 1 UNION ALL SELECT 2")
    other.fetchone()
    token, told = CancelToken(), []

    def execute():
        with warnings.catch_warnings(record=True) as seen:  # of this thread, on some builds
            warnings.simplefilter("always")
            try:
                blocking.execute(connection, ENDLESS)
            finally:
                told.extend(seen)

    thread, outcome = under(token, execute)
    until(lambda: len(rows) > 100)
    token.cancel("enough")
    error = ended(thread, outcome)
    (advice,) = [str(one.message) for one in told if one.category is RuntimeWarning]
    other.close()
    connection.execute(advice.partition("execute '")[2].rstrip("'"))

    assert type(error) is Cancelled
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (7000,)


def test_cancel_that_meets_rows_that_are_not_read_yet_is_heard(connect):
    """
    They would never come; the timeout of the connection is as before.
    """
    token = CancelToken()

    class Cancels(sqlite3.Connection):
        def execute(self, *arguments):
            cursor = super().execute(*arguments)
            token.cancel("enough")
            return cursor

    connection = connect(timeout=7, factory=Cancels)
    with use_token(token), pytest.raises(Cancelled):
        blocking.execute(connection, "SELECT 1 UNION ALL SELECT 2")

    assert connection.execute("PRAGMA busy_timeout").fetchone() == (7000,)


@pytest.mark.parametrize(
    "call", [fetch_interruptible, lambda connection: blocking.execute(connection, ENDLESS)]
)
def test_cancel_ends_the_query_and_the_connection_is_usable(connect, call):
    """
    The error of the interrupted query is the context of the `Cancelled`.
    """
    connection = connect()
    rows = with_endless_query(connection)
    token = CancelToken()
    thread, outcome = under(token, call, connection)
    until(lambda: len(rows) > 100)
    token.cancel("enough")
    error = ended(thread, outcome)

    assert type(error) is Cancelled
    assert type(error.__context__) is sqlite3.OperationalError
    assert connection.execute("SELECT 7").fetchone() == (7,)
    assert blocking.execute(connection, "SELECT ?", [8]).fetchone() == (8,)


def test_cancel_that_comes_before_the_query_ends_it_too(connect):
    """
    SQLite forgets an interruption that met no query.
    """
    connection = connect()
    with_endless_query(connection)
    token = CancelToken()

    def call():
        with token.interrupts(connection):
            token.cancel()
            until(lambda: any("helper" in thread.name for thread in threading.enumerate()))
            return connection.execute(ENDLESS).fetchone()

    assert type(ended(*start(call))) is Cancelled


def test_cancel_ends_the_wait_for_a_lock(connect):
    """
    The connection's own timeout is as before, and so is the database.
    """
    writer, waiter = connect(), connect(timeout=3600)
    writer.execute("CREATE TABLE t (x)")
    writer.execute("BEGIN IMMEDIATE")
    insert = "INSERT INTO t VALUES (1)"

    assert type(cancel_while_blocked(blocking.execute, waiter, insert, among=None)) is Cancelled
    assert waiter.execute("PRAGMA busy_timeout").fetchone() == (3600_000,)
    writer.execute("COMMIT")
    assert waiter.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_lock_that_is_released_is_taken(connect):
    """
    Also where the rows of the connection are something of its own.
    """
    writer, waiter = connect(), connect(timeout=3600)
    waiter.row_factory = lambda cursor, row: {"row": row}
    writer.execute("CREATE TABLE t (x)")
    writer.execute("BEGIN IMMEDIATE")
    begun = threading.Event()

    def call():
        begun.set()
        blocking.execute(waiter, "INSERT INTO t VALUES (?)", [1])

    waiting = start(call)
    assert begun.wait(timeout=60)
    writer.execute("COMMIT")

    assert ended(*waiting) is None
    assert writer.execute("SELECT x FROM t").fetchall() == [(1,)]


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_lock_that_stays_is_told_when_the_connection_has_waited(connect, timeout):
    """
    As SQLite itself tells it; other errors pass at once.
    """
    writer, waiter = connect(), connect(timeout=timeout)
    writer.execute("BEGIN IMMEDIATE")

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        blocking.execute(waiter, "BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        blocking.execute(waiter, "SELECT * FROM nowhere")


def test_two_that_would_wait_for_each_other_are_told_at_once(connect):
    """
    SQLite does not wait there, so trying again would be in vain.
    """
    reader, writer = connect(timeout=3600), connect(timeout=0)
    writer.execute("CREATE TABLE t (x)")
    writer.execute("INSERT INTO t VALUES (1)")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM t").fetchall()
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("INSERT INTO t VALUES (2)")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        writer.execute("COMMIT")  # it has the file's pending lock now, and waits for the reader

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        blocking.execute(reader, "INSERT INTO t VALUES (3)")
    reader.execute("ROLLBACK")


def test_set_token_runs_no_statement(connect):
    """
    `Cancelled` on entry.
    """
    connection = connect()
    token = CancelToken()
    token.cancel()

    with use_token(token), pytest.raises(Cancelled):
        blocking.execute(connection, "CREATE TABLE t (x)")

    assert connection.execute("SELECT * FROM sqlite_master").fetchall() == []


def test_connection_that_is_closed_in_its_block_is_no_trouble(connect, unraised):
    """
    There is nothing left to interrupt.
    """
    connection = connect()
    token = CancelToken()
    with pytest.raises(Cancelled), token.interrupts(connection):
        connection.close()
        token.cancel()

    assert unraised == []


def test_statement_that_ended_before_the_token_was_heard_is_told():
    """
    What it has done is done, and whoever thinks it was not would do it twice.
    """
    token = CancelToken()

    class Late(sqlite3.Connection):
        def execute(self, *args):
            cursor = super().execute(*args)
            token.cancel()
            return cursor

    connection = sqlite3.connect(":memory:", factory=Late, isolation_level=None)
    with use_token(token):
        cursor = blocking.execute(connection, "CREATE TABLE done (x)")
        with pytest.raises(Cancelled):
            blocking.execute(connection, "CREATE TABLE more (x)")

    assert isinstance(cursor, sqlite3.Cursor)
    assert connection.cursor().execute("SELECT name FROM sqlite_schema").fetchall() == [("done",)]
    connection.close()
