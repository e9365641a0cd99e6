"""
Ctrl-C ends every blocking call of the main thread, also if the signal does not wake it.
"""

import concurrent.futures
import fcntl
import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack

import pytest
import services
import websockets.sync.server
from blocked import is_blocked
from clients import CLIENTS, answering
from servers import certificate, full, read_request, served
from staging import is_asleep, start, until

from fastpool import TaskGroup, blocking
from fastpool.blocking import _elsewhere, with_websockets

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def closing():
    """Closes what a call needed."""
    with ExitStack() as closing:
        yield closing


def pipe(closing):
    ends = os.pipe()
    for fd in ends:
        closing.callback(os.close, fd)
    return ends


def silent(connection):
    """A server that takes the connection and says nothing."""


def selects(closing, path):
    blocking.select([pipe(closing)[0]], [], [])


def selects_nothing(closing, path):
    blocking.select([], [], [])


def reads(closing, path):
    blocking.read(pipe(closing)[0], 1)


def asks(closing, path):
    reader, _ = pipe(closing)
    closing.callback(setattr, sys, "stdin", sys.stdin)
    sys.stdin = closing.enter_context(os.fdopen(reader, closefd=False))
    blocking.input()


def opens_fifo_to_read(closing, path):
    os.mkfifo(path)
    blocking.open_fifo(path)


def opens_fifo_to_write(closing, path):
    os.mkfifo(path)
    blocking.open_fifo(path, "w")


def locks_file(closing, path):
    held = closing.enter_context(path.open("w"))
    wanted = closing.enter_context(path.open("w"))
    fcntl.flock(held, fcntl.LOCK_EX)
    blocking.flock(wanted, fcntl.LOCK_EX)


def abandons(closing, path):
    released = threading.Event()
    closing.callback(until, lambda: not blocking.abandoned())
    closing.callback(released.set)
    blocking.abandon(released.wait, 50)


def runs(closing, path):
    blocking.run(["sleep", "60"])


def waits_for_event(closing, path):
    blocking.wait(threading.Event())


def waits_for_condition(closing, path):
    condition = threading.Condition()
    with condition:
        blocking.wait(condition)


def waits_for_future(closing, path):
    blocking.wait(concurrent.futures.Future())


def waits_for_thread(closing, path):
    released = threading.Event()
    thread, _ = start(released.wait, 50)
    closing.callback(thread.join)
    closing.callback(released.set)
    blocking.wait(thread)


def waits_for_process(closing, path):
    process = SPAWN.Process(target=time.sleep, args=(50,))
    process.start()
    closing.callback(process.close)
    closing.callback(process.join)
    closing.callback(process.kill)
    blocking.wait(process)


def gets(closing, path):
    blocking.get(queue.Queue())


def gets_from_simple_queue(closing, path):
    blocking.get(queue.SimpleQueue())


def gets_from_another_process(closing, path):
    between = SPAWN.Queue()
    closing.callback(between.join_thread)
    closing.callback(between.close)
    blocking.get(between)


def puts(closing, path):
    busy = queue.Queue(1)
    busy.put(1)
    blocking.put(busy, 2)


def acquires_lock(closing, path):
    lock = threading.Lock()
    lock.acquire()
    blocking.acquire(lock)


def acquires_semaphore(closing, path):
    blocking.acquire(threading.Semaphore(0))


def connects(closing, path):
    blocking.connect(closing.enter_context(full(socket.AF_INET, ("127.0.0.1", 0))))


def connects_to_path(closing, path):
    blocking.connect(closing.enter_context(full(socket.AF_UNIX, os.path.relpath(path))))


def shakes_hands(closing, path):
    address = closing.enter_context(served(silent))
    blocking.connect(address, ssl_context=certificate()[1], server_hostname="localhost")


def awaits_headers(closing, path):
    host, port = closing.enter_context(served(read_request))
    with blocking.urlopen(f"http://{host}:{port}/"):
        pass


def awaits_body(closing, path):
    def talk(connection):
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")

    host, port = closing.enter_context(served(talk))
    with blocking.urlopen(f"http://{host}:{port}/") as response:
        response.read()


def asks_redis(closing, path):
    redis = services.client("redis")
    host, port = closing.enter_context(served(silent))
    blocking.redis_client(redis.Redis(host, port, socket_timeout=None)).ping()


def by_a_client(make, how):
    """The call of an HTTP client."""

    def calls(closing, path):
        with make() as client:
            how(closing, client)

    return pytest.param(calls, id=f"{how.__name__}-{make.name}")


def client_connects(closing, client):
    host, port = closing.enter_context(full(socket.AF_INET, ("127.0.0.1", 0)))
    client.get(f"http://{host}:{port}/")


def client_shakes_hands(closing, client):
    host, port = closing.enter_context(served(silent))
    client.get(f"https://{host}:{port}/")


def client_sends(closing, client):
    host, port = closing.enter_context(served(silent))
    client.post(f"http://{host}:{port}/", bytes(20_000_000))


def client_awaits_headers(closing, client):
    client.get(closing.enter_context(answering(b"HTTP/1.1 2"))[0])


def client_awaits_body(closing, client):
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome"
    client.get(closing.enter_context(answering(said))[0])


def connects_websocket(closing, path):
    host, port = closing.enter_context(served(silent))
    with_websockets.connect(f"ws://{host}:{port}/", open_timeout=None)


def receives_from_websocket(closing, path):
    server = closing.enter_context(websockets.sync.server.serve(hold, "127.0.0.1", 0))
    thread, _ = start(server.serve_forever)
    closing.callback(thread.join)
    closing.callback(server.shutdown)
    with with_websockets.connect(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/") as connection:
        connection.recv()


def hold(connection):
    connection.wait_closed()


CLIENT_CALLS = [
    by_a_client(make, how)
    for how in (
        client_connects,
        client_shakes_hands,
        client_sends,
        client_awaits_headers,
        client_awaits_body,
    )
    for make in CLIENTS
]

CALLS = [
    *CLIENT_CALLS,
    connects_websocket,
    receives_from_websocket,
    selects,
    selects_nothing,
    reads,
    asks,
    opens_fifo_to_read,
    opens_fifo_to_write,
    locks_file,
    abandons,
    runs,
    waits_for_event,
    waits_for_condition,
    waits_for_future,
    waits_for_thread,
    waits_for_process,
    gets,
    gets_from_simple_queue,
    gets_from_another_process,
    puts,
    acquires_lock,
    acquires_semaphore,
    connects,
    connects_to_path,
    shakes_hands,
    awaits_headers,
    awaits_body,
    asks_redis,
]


@pytest.mark.filterwarnings("ignore:.* was left behind by a cancel:RuntimeWarning")
@pytest.mark.parametrize("call", CALLS)
def test_call_hears_a_signal_that_does_not_wake_it(call, closing, tmp_path, monkeypatch):
    """
    The signal is given to another thread; as if it came just before the main thread slept.
    """
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    main = threading.main_thread()
    begun = threading.Event()

    def send():
        begun.wait()
        until(lambda: is_blocked(main.native_id, None) and is_in_fastpool())
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    def is_in_fastpool():
        frame = sys._current_frames()[main.ident]
        while frame is not None and frame.f_code is not call.__code__:
            if frame.f_globals["__name__"].startswith("fastpool"):
                return True
            frame = frame.f_back
        return False

    sender, outcome = start(send)
    with pytest.raises(KeyboardInterrupt), TaskGroup(1):
        begun.set()
        call(closing, tmp_path / "it")
    sender.join()

    assert outcome == [None]


def test_interruption_that_fails_does_not_replace_ctrl_c(watched, unraised):
    """
    It goes to the hook.
    """
    release = threading.Event()

    def interrupt():
        release.set()
        raise PermissionError("may not be written to")

    def send():
        until(lambda: is_asleep(threading.main_thread()))
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread, _ = start(send)
    with pytest.raises(KeyboardInterrupt):
        _elsewhere.sit_in(interrupt, release.wait, 20)
    thread.join(60)

    assert [type(error) for error in unraised] == [PermissionError]
