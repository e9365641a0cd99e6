"""What else blocks, for which there is nothing to wake it by hand; each set up with its ending."""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import http.client
import multiprocessing
import os
import queue
import select
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

from benchmarks.blocked import ENDLESS, Operation, from_tests, package, server
from benchmarks.jobs import nothing
from fastpool import blocking, current_token

__all__ = ["OPERATIONS", "Setup", "alone"]

Call = Callable[[], object]
Setup = Callable[[ExitStack], Call]

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@contextmanager
def alone(setup: Setup) -> Iterator[Operation]:
    """An operation that nothing is compared with."""
    with ExitStack() as ending:
        yield setup(ending), nothing, nothing


def interrupted(what: object, call: Call) -> Call:
    """The call in a block of `interrupts`."""

    def under_token() -> None:
        with current_token().interrupts(what):
            call()

    return under_token


def in_block(sock: socket.socket, call: Call) -> Call:
    def under_token() -> None:
        with blocking.interruptible(sock):
            call()

    return under_token


# --- Sockets and HTTP -----------------------------------------------------------------------------


def pending(family: int, address: object, ending: ExitStack) -> Call:
    """To a listener whose queue is full."""
    listener = ending.enter_context(from_tests("servers").full(family, address))
    return lambda: blocking.connect(listener)


def connect_unix(ending: ExitStack) -> Call:
    folder = ending.enter_context(tempfile.TemporaryDirectory())
    return pending(socket.AF_UNIX, os.path.join(folder, "s"), ending)


def shake_hands(ending: ExitStack) -> Call:
    silent = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
    context = ssl.create_default_context()
    return lambda: blocking.connect(
        silent.getsockname(), ssl_context=context, server_hostname="localhost"
    )


def secured(connection: socket.socket, ending: ExitStack) -> ssl.SSLSocket:
    context: ssl.SSLContext = from_tests("servers").certificate()[0]
    # In two steps, and not of one that has gone already, or it could leave a socket behind.
    connection.recv(1, socket.MSG_PEEK)
    sock = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
    ending.enter_context(sock).do_handshake()
    return sock


def recv_tls(ending: ExitStack) -> Call:
    context = from_tests("servers").certificate()[1]
    here, there = socket.socketpair()
    thread = threading.Thread(target=secured, args=[there, ending])
    thread.start()
    sock = ending.enter_context(context.wrap_socket(here, server_hostname="localhost"))
    thread.join()
    return in_block(sock, lambda: sock.recv(1))


def recv_udp(ending: ExitStack) -> Call:
    sock = ending.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    return in_block(sock, lambda: sock.recvfrom(1))


def asked(ending: ExitStack, answer: bytes) -> http.client.HTTPConnection:
    """A connection whose request has been sent, and answered so far."""
    listener = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = ending.enter_context(closing(http.client.HTTPConnection(*listener.getsockname())))
    client.request("GET", "/")
    ending.enter_context(listener.accept()[0]).sendall(answer)
    return client


def response(ending: ExitStack) -> Call:
    body = asked(ending, HEADERS).getresponse()
    return interrupted(body, body.read)


def headers(ending: ExitStack) -> Call:
    client = asked(ending, b"")
    return interrupted(client, client.getresponse)


def by_tls(ending: ExitStack) -> str:
    """The URL of a server that reads the request and says nothing."""
    servers = from_tests("servers")

    def talk(connection: socket.socket) -> None:
        servers.read_request(secured(connection, ending))

    _, port = ending.enter_context(servers.served(talk))
    return f"https://127.0.0.1:{port}/"


def urlopen_tls(ending: ExitStack) -> Call:
    context, url = from_tests("servers").certificate()[1], by_tls(ending)

    def under_token() -> None:
        with blocking.urlopen(url, context=context):
            pass

    return under_token


def request_tls(name: str, ending: ExitStack) -> Call:
    client = ending.enter_context(getattr(from_tests("clients"), name)())
    return functools.partial(client.get, by_tls(ending))


def connect_websocket(ending: ExitStack) -> Call:
    package("websockets")
    from fastpool.blocking.with_websockets import connect

    silent = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
    uri = "ws://{}:{}/".format(*silent.getsockname())
    return lambda: connect(uri, open_timeout=None)


def websocket(ending: ExitStack, *, ours: bool, secure: bool) -> Call:
    package("websockets")
    import websockets.sync.client
    import websockets.sync.server

    from fastpool.blocking.with_websockets import connect

    contexts = from_tests("servers").certificate() if secure else (None, None)
    if secure:
        contexts[0].num_tickets = 0  # now and then one keeps the opening handshake from its end
    listener = ending.enter_context(
        websockets.sync.server.serve(
            lambda each: each.wait_closed(), "127.0.0.1", 0, ssl=contexts[0]
        )
    )
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    ending.callback(thread.join)
    ending.callback(listener.shutdown)
    uri = "{}://{}:{}/".format("wss" if secure else "ws", *listener.socket.getsockname())
    if ours:
        return ending.enter_context(connect(uri, ssl=contexts[1])).recv
    connection = ending.enter_context(websockets.sync.client.connect(uri, proxy=None))
    return interrupted(connection, connection.recv)


# --- Files and children ---------------------------------------------------------------------------


def pipe(ending: ExitStack) -> int:
    ends = os.pipe()
    for end in ends:
        ending.callback(os.close, end)
    return ends[0]


def select_too(ending: ExitStack) -> Call:
    fd = pipe(ending)

    def under_token() -> None:
        token = current_token()
        select.select([fd, token.fileno()], [], [])
        token.check()

    return under_token


def ask(ending: ExitStack) -> Call:
    before = sys.stdin
    ending.callback(setattr, sys, "stdin", before)
    sys.stdin = open(pipe(ending), closefd=False)  # noqa: SIM115 - the pipe is closed
    return blocking.input


def open_fifo(ending: ExitStack) -> Call:
    path = os.path.join(ending.enter_context(tempfile.TemporaryDirectory()), "fifo")
    os.mkfifo(path)
    return lambda: blocking.open_fifo(path)


def flock(ending: ExitStack) -> Call:
    path = os.path.join(ending.enter_context(tempfile.TemporaryDirectory()), "lock")
    held, wanted = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    for fd in (held, wanted):
        ending.callback(os.close, fd)
    fcntl.flock(held, fcntl.LOCK_EX)
    return lambda: blocking.flock(wanted, fcntl.LOCK_EX)


def child(ending: ExitStack, **options: object) -> subprocess.Popen[bytes]:
    popen = ending.enter_context(subprocess.Popen(["sleep", "60"], process_group=0, **options))
    ending.callback(popen.kill)
    return popen


def wait_for_child(ending: ExitStack) -> Call:
    popen = child(ending)
    return interrupted(popen, popen.wait)


def communicate(ending: ExitStack) -> Call:
    popen = child(ending, stdout=subprocess.PIPE)
    return interrupted(popen, popen.communicate)


def abandon(ending: ExitStack) -> Call:
    ending.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    event = threading.Event()
    ending.callback(event.set)
    return lambda: blocking.abandon(event.wait)


# --- Queues, locks, waits, databases --------------------------------------------------------------


def put(ending: ExitStack) -> Call:
    full: queue.Queue[int] = queue.Queue(1)
    full.put(1)
    return lambda: blocking.put(full, 2)


def get_from_process(ending: ExitStack) -> Call:
    between = multiprocessing.Queue()
    ending.callback(between.join_thread)
    ending.callback(between.close)
    return lambda: blocking.get(between)


def put_to_process(ending: ExitStack) -> Call:
    between = multiprocessing.Queue(1)
    ending.callback(between.join_thread)
    ending.callback(between.close)
    ending.callback(between.get)
    between.put(1)
    return lambda: blocking.put(between, 2)


def acquire(ending: ExitStack) -> Call:
    lock = threading.Lock()
    lock.acquire()
    return lambda: blocking.acquire(lock)


def wait_for_condition(ending: ExitStack) -> Call:
    condition = threading.Condition()

    def under_token() -> None:
        with condition:
            blocking.wait(condition)

    return under_token


def interrupt_condition(ending: ExitStack) -> Call:
    condition = threading.Condition()

    def under_token() -> None:
        with condition, current_token().interrupts(condition):
            condition.wait()

    return under_token


def interrupt_barrier(ending: ExitStack) -> Call:
    barrier = threading.Barrier(2)
    return interrupted(barrier, barrier.wait)


def join(ending: ExitStack) -> Call:
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    ending.callback(thread.join)
    ending.callback(event.set)
    return lambda: blocking.wait(thread)


def interrupt_query(ending: ExitStack) -> Call:
    connection = ending.enter_context(closing(sqlite3.connect(":memory:", check_same_thread=False)))
    return interrupted(connection, lambda: connection.execute(ENDLESS).fetchone())


def lock_database(ending: ExitStack) -> Call:
    file = os.path.join(ending.enter_context(tempfile.TemporaryDirectory()), "data")
    holder, other = (
        ending.enter_context(
            closing(
                sqlite3.connect(file, isolation_level=None, timeout=60, check_same_thread=False)
            )
        )
        for _ in range(2)
    )
    holder.execute("BEGIN IMMEDIATE")
    return lambda: blocking.execute(other, "BEGIN IMMEDIATE")


def notifies(ending: ExitStack) -> Call:
    psycopg = package("psycopg")
    connection = ending.enter_context(psycopg.connect(server("postgres"), autocommit=True))
    connection.execute("LISTEN orders")
    return interrupted(connection, lambda: next(connection.notifies()))


# By the names that docs/blocking.md has for them.
OPERATIONS: dict[str, Setup] = {
    "connect, TCP": functools.partial(pending, socket.AF_INET, ("127.0.0.1", 0)),
    "connect, Unix, full queue": connect_unix,
    "TLS handshake": shake_hands,
    "recv, TLS": recv_tls,
    "recvfrom, UDP": recv_udp,
    "urlopen, headers, TLS": urlopen_tls,
    "interrupts(HTTPResponse)": response,
    "interrupts(HTTPConnection)": headers,
    "urllib3, TLS": functools.partial(request_tls, "Urllib3"),
    "requests, TLS": functools.partial(request_tls, "Requests"),
    "httpx, TLS": functools.partial(request_tls, "Httpx"),
    "websockets, connect": connect_websocket,
    "websockets, recv, TLS": functools.partial(websocket, ours=True, secure=True),
    "interrupts(websocket)": functools.partial(websocket, ours=False, secure=False),
    "select with token.fileno()": select_too,
    "select": lambda ending: functools.partial(blocking.select, [pipe(ending)], [], []),
    "input": ask,
    "open_fifo": open_fifo,
    "flock": flock,
    "interrupts(Popen), wait": wait_for_child,
    "interrupts(Popen), communicate": communicate,
    "abandon": abandon,
    "Queue.put": put,
    "SimpleQueue.get": lambda ending: functools.partial(blocking.get, queue.SimpleQueue()),
    "multiprocessing.Queue.get": get_from_process,
    "multiprocessing.Queue.put": put_to_process,
    "Semaphore.acquire": lambda ending: functools.partial(blocking.acquire, threading.Semaphore(0)),
    "Lock.acquire": acquire,
    "Condition.wait": wait_for_condition,
    "Future": lambda ending: functools.partial(blocking.wait, concurrent.futures.Future()),
    "Thread.join": join,
    "Popen.wait": lambda ending: functools.partial(blocking.wait, child(ending)),
    "interrupts(Condition)": interrupt_condition,
    "interrupts(Barrier)": interrupt_barrier,
    "interrupts(sqlite3)": interrupt_query,
    "sqlite3, locked": lock_database,
    "psycopg, notifies": notifies,
}
