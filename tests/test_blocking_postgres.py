"""
psycopg on a real server: whatever it waits for hears the token, and its connection lives on.
"""

import os
import random
import signal
import sys
import threading

import pytest
import services
from blocked import ended, is_blocked
from interrupted import in_child
from pages import ROOT, run
from staging import start, until

from fastpool import Cancelled, CancelToken, TaskGroup, current_token
from fastpool.blocking import _postgres

psycopg = services.client("psycopg", " with libpq; on Debian, install the package libpq5")

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

WHERE = "FASTPOOL_TESTS_POSTGRES"


@pytest.fixture(scope="module")
def watcher(postgres):
    """A connection that asks the server about others."""
    with psycopg.connect(postgres, autocommit=True) as watcher:
        yield watcher


@pytest.fixture(scope="module", autouse=True)
def tables(watcher, postgres):
    """One that is free, and one that somebody has locked."""
    names = ("free", "locked")
    for name in names:
        watcher.execute(f"CREATE TABLE {name} (x int)")
    with psycopg.connect(postgres) as other:
        other.execute("LOCK TABLE locked")
        yield
    for name in names:
        watcher.execute(f"DROP TABLE {name}")


@pytest.fixture
def connection(postgres):
    with psycopg.connect(postgres) as connection:
        yield connection
        connection.rollback()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Give the server all the time to end a query: a busy machine may need it."""
    monkeypatch.setattr(_postgres, "PATIENCE", 50)


@pytest.fixture
def hasty_about_it(monkeypatch):
    """Give the server less time to end a query."""
    monkeypatch.setattr(_postgres, "PATIENCE", 0.3)


def waits_for(watcher, connection):
    """What the server says that it waits for, in a query of the connection."""
    return watcher.execute(
        "SELECT wait_event FROM pg_stat_activity WHERE pid = %s AND state = 'active'",
        [connection.info.backend_pid],
    ).fetchone()


def interrupted(connection, call, what=None):
    """A thread that makes a call in a block that is interrupted, the outcome, and the token."""
    token = CancelToken()

    def block():
        with token.interrupts(what or connection):
            return call(connection)

    return *start(block), token


# --- What is interrupted --------------------------------------------------------------------------


def sleeps(connection):
    return connection.execute("SELECT pg_sleep(50)").fetchone()


def sleeps_in_autocommit(connection):
    connection.set_autocommit(True)
    return sleeps(connection)


def fetches(connection):
    with connection.cursor("named") as cursor:
        cursor.execute("SELECT pg_sleep(n) FROM generate_series(0, 50, 50) n")
        return cursor.fetchall()


def streams(connection):
    return list(connection.cursor().stream("SELECT pg_sleep(n) FROM generate_series(0, 50, 50) n"))


def sends_many(connection):
    with connection.pipeline():
        connection.cursor().executemany("SELECT pg_sleep(%s)", [(0,), (50,)])


def copies_out(connection):
    with connection.cursor().copy("COPY (SELECT pg_sleep(50)) TO STDOUT") as copy:
        return list(copy)


def copies_in(connection):
    with connection.cursor().copy("COPY locked FROM STDIN") as copy:
        copy.write_row([1])


def reads_locked(connection):
    return connection.execute("SELECT * FROM locked").fetchall()


def locks(connection):
    connection.execute("LOCK TABLE locked")


def sleeps_in_transaction(connection):
    with connection.transaction():
        return sleeps(connection)


@pytest.mark.parametrize(
    ("call", "event"),
    [
        (sleeps, "PgSleep"),
        (sleeps_in_autocommit, "PgSleep"),
        (sleeps_in_transaction, "PgSleep"),
        (fetches, "PgSleep"),
        (streams, "PgSleep"),
        (sends_many, "PgSleep"),
        (copies_out, "PgSleep"),
        (copies_in, "relation"),
        (reads_locked, "relation"),
        (locks, "relation"),
    ],
)
def test_cancel_ends_the_query_and_the_connection_is_usable(call, event, connection, watcher):
    """
    The server cancels it; a transaction waits for its roll-back.
    """
    thread, outcome, token = interrupted(connection, call)
    until(lambda: waits_for(watcher, connection) == (event,))
    token.cancel("enough")
    error = ended(thread, outcome)

    assert type(error) is Cancelled
    assert error.reason == "enough"
    assert type(error.__context__) is psycopg.errors.QueryCanceled
    connection.rollback()
    assert connection.execute("SELECT 7").fetchone() == (7,)


def test_cursor_stands_for_its_connection(connection, watcher):
    """
    What it does is interrupted.
    """
    cursor = connection.cursor()
    thread, outcome, token = interrupted(
        connection, lambda _: cursor.execute("SELECT pg_sleep(50)"), cursor
    )
    until(lambda: waits_for(watcher, connection) == ("PgSleep",))
    token.cancel()

    assert type(ended(thread, outcome)) is Cancelled
    connection.rollback()
    assert cursor.execute("SELECT 7").fetchone() == (7,)


def test_cancel_ends_a_query_that_computes(connection, watcher):
    """
    The server looks up while it does.
    """
    thread, outcome, token = interrupted(
        connection,
        lambda connection: connection.execute("SELECT count(*) FROM generate_series(1, 1e12)"),
    )
    until(lambda: waits_for(watcher, connection) is not None)
    token.cancel()

    assert type(ended(thread, outcome)) is Cancelled
    connection.rollback()
    assert connection.execute("SELECT 7").fetchone() == (7,)


def test_cancel_ends_the_wait_for_notifications_and_the_connection(postgres):
    """
    The server has nothing to cancel there, so the connection is cut.
    """
    connection = psycopg.connect(postgres, autocommit=True)
    connection.execute("LISTEN news")
    thread, outcome, token = interrupted(connection, lambda it: list(it.notifies()))
    until(lambda: connection.lock.locked() and is_blocked(thread.native_id, None))
    token.cancel()
    error = ended(thread, outcome)

    assert type(error) is Cancelled
    assert type(error.__context__) is psycopg.OperationalError
    assert connection.closed


def test_failure_of_a_sibling_ends_the_query(connection, watcher):
    """
    A task needs nothing but the block.
    """

    def asks():
        with current_token().interrupts(connection):
            return sleeps(connection)

    def fails():
        until(lambda: waits_for(watcher, connection) == ("PgSleep",))
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup() as group:
        asked = group.submit(asks)
        group.submit(fails)

    assert asked.cancelled()
    connection.rollback()
    assert connection.execute("SELECT 7").fetchone() == (7,)


# --- What the documentation shows -----------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    return run(ROOT / "docs" / "blocking.md")


def test_transaction_around_the_block_is_rolled_back(page, connection, postgres, watcher):
    """
    As the documentation has it.
    """
    watcher.execute("CREATE TABLE orders AS SELECT 7")
    try:
        assert page["report"](connection) == (1,)
        connection.commit()

        with psycopg.connect(postgres) as other:
            other.execute("LOCK TABLE orders")
            token = CancelToken()
            thread, outcome = start(page["report"].with_token, token, connection)
            until(lambda: waits_for(watcher, connection) == ("relation",))
            token.cancel()
            assert type(ended(thread, outcome)) is Cancelled
            status = connection.info.transaction_status

        assert status == psycopg.pq.TransactionStatus.IDLE
    finally:
        watcher.execute("DROP TABLE orders")


def test_wait_for_a_connection_of_a_pool_is_left(page, postgres):
    """
    As the documentation has it.
    """
    pooling = services.client("psycopg_pool")
    token = CancelToken()
    with pooling.ConnectionPool(postgres, min_size=1, max_size=1) as pool:
        taken = page["taken_from"].with_token(token, pool)
        thread, outcome = start(page["taken_from"].with_token, token, pool)
        until(lambda: pool.get_stats()["requests_waiting"])
        token.cancel()

        assert type(ended(thread, outcome)) is Cancelled
        assert taken.execute("SELECT 7").fetchone() == (7,)
        pool.putconn(taken)


# --- What is not ----------------------------------------------------------------------------------


def test_set_token_runs_no_query(connection):
    """
    `Cancelled` on entry.
    """
    token = CancelToken()
    token.cancel()

    with pytest.raises(Cancelled), token.interrupts(connection):
        connection.execute("INSERT INTO free VALUES (1)")

    assert connection.execute("SELECT * FROM free").fetchall() == []


def test_cancel_that_comes_before_the_query_ends_it_too(connection):
    """
    A request that meets no query is lost, so it is made again.
    """
    token = CancelToken()

    def call():
        with token.interrupts(connection):
            token.cancel()
            until(lambda: any("helper" in thread.name for thread in threading.enumerate()))
            return sleeps(connection)

    assert type(ended(*start(call))) is Cancelled
    connection.rollback()
    assert connection.execute("SELECT 7").fetchone() == (7,)


def test_block_that_waits_for_nothing_keeps_its_connection(connection, hasty_about_it):
    """
    A transaction that is open there goes on.
    """
    token = CancelToken()
    connection.execute("INSERT INTO free VALUES (1)")
    with pytest.raises(Cancelled), token.interrupts(connection):
        token.cancel()
        threading.Event().wait(2 * _postgres.PATIENCE)

    assert connection.execute("SELECT * FROM free").fetchall() == [(1,)]


@pytest.mark.usefixtures("hasty")
def test_no_cancel_ever_hits_the_next_query(connection):
    """
    Cancels against leaving, in many rounds: before, in and after the query.
    """
    chance = random.Random(7)
    meeting = threading.Barrier(2, timeout=60)
    tokens = [CancelToken() for _ in range(400)]
    came = {"cancelled": 0, "query cancelled": 0, "done": 0}

    def cancels():
        for token in tokens:
            meeting.wait()
            for _ in range(chance.randrange(30_000)):
                pass
            token.cancel()

    other, outcome = start(cancels)
    for number, token in enumerate(tokens):
        meeting.wait()
        try:
            with token.interrupts(connection):
                connection.execute("SELECT pg_sleep(%s)", [chance.choice([0, 0.002, 0.006])])
            came["done"] += 1
        except Cancelled as error:
            hit = type(error.__context__) is psycopg.errors.QueryCanceled
            came["query cancelled" if hit else "cancelled"] += 1
        connection.rollback()  # nor this
        assert connection.execute("SELECT %s", [number]).fetchone() == (number,)

    assert ended(other, outcome) is None
    assert all(came.values()), came


def test_connection_that_is_closed_in_its_block_is_no_trouble(postgres, unraised):
    """
    There is nothing left to interrupt.
    """
    token = CancelToken()
    connection = psycopg.connect(postgres)
    with pytest.raises(Cancelled), token.interrupts(connection):
        connection.close()
        token.cancel()

    assert unraised == []


def test_asynchronous_connection_is_refused():
    """
    It is for the event loop to interrupt.
    """
    with pytest.raises(TypeError, match="AsyncConnection"):
        CancelToken().interrupts(object.__new__(psycopg.AsyncConnection))


def test_pool_of_connections_says_what_to_interrupt():
    """
    Which of them is in a query, only its user knows.
    """
    pool = services.client("psycopg_pool").ConnectionPool(open=False)

    with pytest.raises(TypeError, match=r"use token\.interrupts\(connection\), with one"):
        CancelToken().interrupts(pool)


# --- A server that does not answer ----------------------------------------------------------------


def is_running(function):
    """Whether any thread is in a call of a function."""
    frames = list(sys._current_frames().values())
    while frames:
        frame = frames.pop()
        if frame.f_code is function.__code__:
            return True
        frames += filter(None, [frame.f_back])
    return False


def parent(process):
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(") ")[2].split()[1])


@pytest.mark.parametrize("who", ["backend", "server"])
def test_server_that_is_stopped_is_left(who, postgres, watcher, hasty_about_it, unraised):
    """
    The connection is cut when the server has had its time to end the query.
    """
    connection = psycopg.connect(postgres)
    thread, outcome, token = interrupted(connection, sleeps)
    until(lambda: waits_for(watcher, connection) == ("PgSleep",))
    backend = connection.info.backend_pid
    stopped = backend if who == "backend" else parent(backend)
    os.kill(stopped, signal.SIGSTOP)
    try:
        token.cancel()
        error = ended(thread, outcome)
    finally:
        os.kill(stopped, signal.SIGCONT)

    assert type(error) is Cancelled
    assert type(error.__context__) is psycopg.OperationalError
    assert connection.closed
    assert unraised == []
    until(lambda: waits_for(watcher, connection) is None)


def test_request_that_may_come_late_takes_the_connection_along(postgres, watcher, hasty_about_it):
    """
    It could hit the next query, so there is none.
    """
    connection = psycopg.connect(postgres)
    watcher.execute("SELECT pg_advisory_lock(1)")
    thread, outcome, token = interrupted(
        connection, lambda it: it.execute("SELECT pg_advisory_lock(1)")
    )
    until(lambda: waits_for(watcher, connection) == ("advisory",))
    server = parent(connection.info.backend_pid)
    os.kill(server, signal.SIGSTOP)  # which takes requests, and is not what runs queries
    try:
        token.cancel()
        until(lambda: is_running(_postgres._asked))
        watcher.execute("SELECT pg_advisory_unlock(1)")
        error = ended(thread, outcome)
    finally:
        os.kill(server, signal.SIGCONT)

    assert type(error) is Cancelled
    assert error.__context__ is None
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    assert connection.closed


def test_server_that_takes_no_request_is_left_at_once(postgres, watcher, monkeypatch):
    """
    As one that is gone: nobody listens where the connection once was made.
    """
    monkeypatch.setattr(_postgres, "PATIENCE", 3600)
    connection = psycopg.connect(postgres)
    thread, outcome, token = interrupted(connection, sleeps)
    until(lambda: waits_for(watcher, connection) == ("PgSleep",))
    path = os.path.join(connection.info.host, f".s.PGSQL.{connection.info.port}")
    os.rename(path, path + ".away")
    try:
        token.cancel()
        error = ended(thread, outcome)
    finally:
        os.rename(path + ".away", path)

    assert type(error) is Cancelled
    assert type(error.__context__) is psycopg.OperationalError
    assert connection.closed


# --- Ctrl-C ---------------------------------------------------------------------------------------


def asks_in_main_thread(group, ready):
    _postgres.PATIENCE = 50  # as `patient` has it; this is a process of its own
    with psycopg.connect(os.environ[WHERE]) as connection:
        group.submit(says_when_it_waits, connection, ready)
        try:
            with current_token().interrupts(connection):
                sleeps(connection)
        finally:
            connection.rollback()
            print(*connection.execute("SELECT 'usable'").fetchone())


def says_when_it_waits(connection, ready):
    with psycopg.connect(os.environ[WHERE], autocommit=True) as watcher:
        until(lambda: waits_for(watcher, connection) == ("PgSleep",))
    ready()


def test_ctrl_c_ends_the_query_of_the_main_thread(postgres, monkeypatch):
    """
    `KeyboardInterrupt`, and the connection is usable.
    """
    monkeypatch.setenv(WHERE, postgres)

    assert in_child(asks_in_main_thread) == "usable\ninterrupted\n"


def test_ctrl_c_ends_the_query_of_a_task(postgres, monkeypatch):
    """
    By way of the group's token.
    """
    monkeypatch.setenv(WHERE, postgres)

    assert in_child(asks_in_task) == "usable\ninterrupted\n"


def asks_in_task(group, ready):
    def task():
        asks_in_main_thread(group, ready)

    group.submit(task).result()
