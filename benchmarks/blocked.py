"""Calls that block, and what gets a thread out of each: a token's cancel, or a call by hand."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import importlib
import os
import queue
import select
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from benchmarks.jobs import clock
from benchmarks.measure import ROOT
from fastpool import Cancelled, CancelToken, blocking, current_token, use_token

__all__ = [
    "ENDLESS",
    "OPERATIONS",
    "Missing",
    "Operation",
    "by_hand",
    "by_token",
    "cancelled",
    "from_tests",
    "package",
    "server",
]

BLOCKED = 0.01  # seconds after which a thread surely sits in its call

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"

# What blocks under a token, what blocks by itself, and what wakes the latter.
Operation = tuple[Callable[[], object], Callable[[], object], Callable[[], object]]


class Missing(Exception):
    """Raised when a package or a server is not there; what it is needed for cannot be measured."""


def package(name: str) -> Any:  # Any: a module, of which no more is known
    """A package that need not be installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not measured ({error})") from error


def from_tests(name: str) -> Any:  # Any: as above
    """A module of the tests, which have servers that stall, and start those of databases."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return package(name)


@functools.cache
def server(name: str) -> str:
    """How to connect to a database's server, which runs until this process ends."""
    services = from_tests("services")
    ending = ExitStack()
    try:
        where: str = ending.enter_context(getattr(services, name)())
    except (services.pytest.skip.Exception, services.pytest.fail.Exception) as error:
        raise Missing(f"not measured ({error})") from error
    atexit.register(ending.close)
    return where


@contextlib.contextmanager
def recv() -> Iterator[Operation]:
    here, there = socket.socketpair()

    def under_token() -> None:
        with blocking.interruptible(here):
            here.recv(1)

    with here, there:
        yield under_token, lambda: here.recv(1), lambda: here.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def read() -> Iterator[Operation]:
    (fd, writer), (wake, waker) = os.pipe(), os.pipe()
    try:
        yield (
            lambda: blocking.read(fd, 1),
            lambda: select.select([fd, wake], [], []),
            lambda: os.write(waker, b"x"),
        )
    finally:
        for end in (fd, writer, wake, waker):
            os.close(end)


@contextlib.contextmanager
def get() -> Iterator[Operation]:
    items: queue.Queue[None] = queue.Queue()
    yield lambda: blocking.get(items), items.get, lambda: items.put(None)


@contextlib.contextmanager
def wait() -> Iterator[Operation]:
    event = threading.Event()
    yield lambda: blocking.wait(event), event.wait, event.set


@contextlib.contextmanager
def run() -> Iterator[Operation]:
    command = ["sleep", "60"]
    with subprocess.Popen(command) as child:
        try:
            yield lambda: blocking.run(command), child.wait, child.terminate
        finally:
            child.kill()


@contextlib.contextmanager
def query() -> Iterator[Operation]:
    connection = sqlite3.connect(":memory:", check_same_thread=False)

    def by_itself() -> None:
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute(ENDLESS).fetchone()

    with contextlib.closing(connection):
        yield lambda: blocking.execute(connection, ENDLESS), by_itself, connection.interrupt


@contextlib.contextmanager
def urlopen() -> Iterator[Operation]:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        client = http.client.HTTPConnection(host, port)

        def under_token() -> None:
            with blocking.urlopen(f"http://{host}:{port}"):
                pass

        def by_itself() -> None:
            client.request("GET", "/")
            with contextlib.suppress(http.client.HTTPException):
                client.getresponse()

        with contextlib.closing(client):
            yield under_token, by_itself, lambda: client.sock.shutdown(socket.SHUT_RDWR)


# For each client of HTTP that may be installed: ours and the plain one, as functions that request
# a URL.


def with_urllib3() -> tuple[Callable[[str], object], Callable[[str], object]]:
    package("urllib3")
    import urllib3

    from fastpool.blocking.with_urllib3 import PoolManager

    ours, plain = PoolManager(), urllib3.PoolManager(retries=False)
    return (lambda url: ours.request("GET", url)), (lambda url: plain.request("GET", url))


def with_requests() -> tuple[Callable[[str], object], Callable[[str], object]]:
    package("requests")
    import requests

    from fastpool.blocking.with_requests import HTTPAdapter

    ours, plain = requests.Session(), requests.Session()
    ours.mount("http://", HTTPAdapter())
    ours.trust_env = plain.trust_env = False  # no proxy
    return ours.get, plain.get


def with_httpx() -> tuple[Callable[[str], object], Callable[[str], object]]:
    package("httpx")
    import httpx

    from fastpool.blocking.with_httpx import HTTPTransport

    # No proxy, and no reading of the trusted certificates for each.
    ours = httpx.Client(transport=HTTPTransport(verify=False), timeout=None)
    plain = httpx.Client(transport=httpx.HTTPTransport(verify=False), timeout=None)
    return ours.get, plain.get


@contextlib.contextmanager
def request(
    clients: Callable[[], tuple[Callable[[str], object], Callable[[str], object]]],
) -> Iterator[Operation]:
    ours, plain = clients()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://{}:{}/".format(*silent.getsockname())

        def by_itself() -> None:
            with contextlib.suppress(Exception):  # each library has its own
                plain(url)

        yield lambda: ours(url), by_itself, lambda: silent.accept()[0].close()


@contextlib.contextmanager
def receive() -> Iterator[Operation]:
    package("websockets")
    import websockets.sync.client
    import websockets.sync.server

    from fastpool.blocking.with_websockets import connect

    with websockets.sync.server.serve(lambda each: each.wait_closed(), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri = f"ws://127.0.0.1:{server.socket.getsockname()[1]}/"
        with connect(uri) as ours, websockets.sync.client.connect(uri, proxy=None) as plain:

            def by_itself() -> None:
                with contextlib.suppress(websockets.exceptions.ConnectionClosed):
                    plain.recv()

            yield ours.recv, by_itself, lambda: plain.socket.shutdown(socket.SHUT_RDWR)
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def ask_postgres() -> Iterator[Operation]:
    psycopg = package("psycopg")
    where = server("postgres")
    with psycopg.connect(where) as ours, psycopg.connect(where) as plain:

        def under_token() -> None:
            with current_token().interrupts(ours):
                ours.execute("SELECT pg_sleep(60)")

        def by_itself() -> None:
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                plain.execute("SELECT pg_sleep(60)")

        yield under_token, by_itself, plain.cancel_safe
        ours.rollback()
        plain.rollback()


@contextlib.contextmanager
def ask_redis() -> Iterator[Operation]:
    redis = package("redis")
    path = server("redis")
    plain = redis.UnixDomainSocketConnection(path)

    def by_itself() -> None:
        with contextlib.suppress(redis.ConnectionError):
            plain.send_command("BLPOP", "orders", 0)
            plain.read_response()

    with redis.Redis(unix_socket_path=path) as client:
        blocking.redis_client(client)
        client.ping()
        plain.connect()
        yield (
            lambda: client.blpop("orders"),
            by_itself,
            lambda: plain._sock.shutdown(socket.SHUT_RDWR),
        )
        plain.disconnect()


OPERATIONS: dict[str, Callable[[], AbstractContextManager[Operation]]] = {
    "socket.recv": recv,
    "os.read of a pipe": read,
    "Queue.get": get,
    "Event.wait": wait,
    "subprocess.run": run,
    "sqlite3 query": query,
    "urlopen, headers": urlopen,
    "urllib3": functools.partial(request, with_urllib3),
    "requests": functools.partial(request, with_requests),
    "httpx": functools.partial(request, with_httpx),
    "websockets": receive,
    "psycopg query": ask_postgres,
    "redis-py blpop": ask_redis,
}


def by_token(operation: Callable[[], AbstractContextManager[Operation]]) -> float:
    """Seconds from a token's cancel until the thread is out of the call, with `Cancelled`."""
    return cancelled(operation, BLOCKED)


def cancelled(operation: Callable[[], AbstractContextManager[Operation]], after: float) -> float:
    """The same, once, of a cancel so many seconds after the call began."""
    token = CancelToken()
    with operation() as (under_token, _, _):

        def call() -> None:
            with use_token(token), contextlib.suppress(Cancelled):
                under_token()
                raise AssertionError("it has returned")

        return _time_to_end(call, token.cancel, after)


def by_hand(operation: Callable[[], AbstractContextManager[Operation]]) -> float:
    """Seconds from what wakes the plain call until the thread is out of it."""
    with operation() as (_, by_itself, wake):
        return _time_to_end(by_itself, wake, BLOCKED)


def _time_to_end(call: Callable[[], object], wake: Callable[[], object], after: float) -> float:
    ended: list[float] = []

    def work() -> None:
        call()
        ended.append(clock())

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(after)
    start = clock()
    wake()
    thread.join(5)
    while thread.is_alive():  # it had not got as far as to be woken
        wake()
        thread.join(5)
    return ended[0] - start
