"""
What a task that does not stop is reported with: where it sits, and what to call instead.
"""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import itertools
import linecache
import mmap
import multiprocessing
import os
import platform
import queue
import re
import select
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
import urllib.request
import warnings

import pytest
import services
from staging import hidden, look, until

import fastpool._stuck
import fastpool._syscalls
from fastpool import TaskGroup, cancellable, shield
from fastpool._stuck import Vigil
from fastpool._syscalls import Look, Seat, cure, settle

LINUX = pytest.mark.skipif(
    not os.access("/proc/self/syscall", os.R_OK), reason="the system does not tell"
)
FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine())


def is_blocked(thread, *, on_lock):
    """Whether a thread sits in a system call, and goes on sitting there."""
    seen = look(thread)
    if seen is None or (seen[0].split()[0] == FUTEX) is not on_lock:
        return False
    time.sleep(0.02)  # four times as long as a wait for the interpreter's lock takes
    return look(thread) == seen


def report(call, release, *, ready):
    """The first report on a task that sits in a call; `ready` tells of its thread that it does."""
    threads = []

    def let_go(event):
        if event.name == "task_stuck" and threads:
            threads.clear()
            release()

    def stuck():
        threads.append(threading.get_native_id())
        call()

    with (
        pytest.warns(RuntimeWarning) as told,
        TaskGroup(1, name="hard", grace=0.01, observers=[let_go]) as group,
    ):
        group.submit(stuck)
        until(lambda: threads and ready(threads[0]))
        group.cancel()

    return str(told[0].message)


def in_call(thread):
    return is_blocked(thread, on_lock=False)


def on_lock(thread):
    return is_blocked(thread, on_lock=True)


# --- Files and sockets ----------------------------------------------------------------------------


@pytest.fixture
def pair():
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@LINUX
def test_read_of_a_socket_is_named(pair):
    """
    The report has the call, the descriptor, the stack and the cure.
    """
    here, there = pair

    said = report(lambda: here.recv(10), lambda: there.send(b"x"), ready=in_call)

    first, *more = said.split("\n")
    assert re.match(
        r"task 'stuck' of group 'hard' still runs in thread 'fastpool-hard-1', \d+\.\d s after",
        first,
    )
    assert f"it was submitted at {__file__}:" in first
    assert more[0] == "  Its Python stack, innermost call last:"
    assert [line.rpartition(", in ")[2] for line in more if "File" in line] == ["stuck", "<lambda>"]
    assert "    call()" in said
    assert more[-2:] == [
        f"  It sits in the system call recvfrom on file descriptor {here.fileno()}, a socket.",
        "  To have a cancel wake it, use fastpool.blocking.interruptible(sock).",
    ]


@LINUX
def test_read_of_a_socket_with_a_timeout_is_told_from_a_poll(pair):
    """
    Such a socket polls before it reads; the report says which one, and for what.
    """
    here, there = pair
    here.settimeout(30)

    said = report(lambda: here.recv(10), lambda: there.send(b"x"), ready=in_call)

    assert f"poll on file descriptor {here.fileno()}, a socket, until it is ready to read." in said
    assert "use fastpool.blocking.interruptible(sock)." in said


@LINUX
def test_write_to_a_full_socket_is_told_from_a_connect(pair):
    """
    Both wait until the socket can be written to; the line that calls tells which it is.
    """
    here, there = pair
    here.settimeout(30)
    size = 1 << 24

    def drain():
        left = size
        while left:
            left -= len(there.recv(1 << 20))

    said = report(lambda: here.sendall(bytes(size)), drain, ready=in_call)

    assert "a socket, until it is ready to write." in said
    assert "use fastpool.blocking.interruptible(sock)." in said


@LINUX
def test_connect_is_named(tmp_path):
    """
    To a server that is too busy to accept.
    """
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as other:
        server.bind(str(tmp_path / "server"))
        server.listen(0)
        other.connect(str(tmp_path / "server"))
        with socket.socket(socket.AF_UNIX) as client:
            said = report(
                lambda: client.connect(str(tmp_path / "server")),
                lambda: server.accept()[0].close(),
                ready=in_call,
            )

    assert "system call connect on file descriptor" in said
    assert "use fastpool.blocking.connect(address)." in said


@LINUX
def test_accept_is_named(tmp_path):
    """
    Of a server that nobody calls.
    """
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "server"))
        server.listen()
        said = report(
            lambda: server.accept()[0].close(),
            lambda: client.connect(str(tmp_path / "server")),
            ready=in_call,
        )

    assert "system call accept4 on file descriptor" in said
    assert "use fastpool.blocking.interruptible(sock)." in said


@LINUX
def test_read_of_a_pipe_is_named(pipe):
    """
    With the descriptor.
    """
    read, write = pipe

    said = report(lambda: os.read(read, 1), lambda: os.write(write, b"x"), ready=in_call)

    assert f"system call read on file descriptor {read}, a pipe." in said
    assert "use fastpool.blocking.read(fd, n)." in said


@LINUX
def test_read_of_a_terminal_is_named():
    """
    With its name.
    """
    keyboard, screen = os.openpty()
    try:
        said = report(lambda: os.read(screen, 1), lambda: os.write(keyboard, b"x\n"), ready=in_call)
    finally:
        os.close(keyboard)
        os.close(screen)

    assert f"file descriptor {screen}, the terminal /dev/pts/" in said
    assert "use fastpool.blocking.read(fd, n)." in said


@LINUX
@pytest.mark.parametrize("way", ["select", "poll", "epoll"])
def test_select_is_named(pipe, way):
    """
    In each of its forms.
    """
    read, write = pipe

    def selects():
        if way == "select":
            select.select([read], [], [])
            return
        poll = getattr(select, way)()
        poll.register(read, select.POLLIN)
        poll.poll()
        getattr(poll, "close", int)()

    said = report(selects, lambda: os.write(write, b"x"), ready=in_call)

    assert "It sits in the system call " in said
    assert "use fastpool.blocking.select(...)." in said


@LINUX
@pytest.mark.parametrize("pages", [1, 2])
def test_path_is_read_to_its_end(tmp_path, pages):
    """
    Be it that it goes on in the next page, or that there is none behind it.
    """
    number = {"x86_64": 257, "aarch64": 56}.get(platform.machine())
    if number is None:
        pytest.skip(f"nobody has told the number of openat on {platform.machine()}")
    path, page = b"/tmp/pipe\0", mmap.PAGESIZE
    with open(tmp_path / "memory", "w+b") as file:
        file.truncate(2 * page)
        with mmap.mmap(file.fileno(), 2 * page) as memory:
            start = page - len(path) if pages == 1 else page - 4
            memory[start : start + len(path)] = path
            file.truncate(pages * page)  # what is mapped behind the end cannot be read
            first = ctypes.c_char.from_buffer(memory)
            looked = Look(number, (0, ctypes.addressof(first) + start, 0, 0, 0, 0), 7)
            seat = settle(looked, looked)
            del first

    assert seat == Seat("openat", None, "/tmp/pipe")


@LINUX
def test_opening_a_fifo_is_named(tmp_path):
    """
    With its path.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    said = report(lambda: open(fifo).close(), lambda: open(fifo, "w").close(), ready=in_call)

    assert f"system call openat, on {fifo}." in said
    assert "use fastpool.blocking.open_fifo(path), if it is a FIFO." in said


@LINUX
def test_file_lock_is_named(tmp_path):
    """
    With the file.
    """
    path = tmp_path / "lock"
    with open(path, "w") as held, open(path) as wanted:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = report(
            lambda: fcntl.flock(wanted, fcntl.LOCK_EX),
            lambda: fcntl.flock(held, fcntl.LOCK_UN),
            ready=in_call,
        )

        number = wanted.fileno()

    assert f"system call flock on file descriptor {number}, {path}." in said
    assert "use fastpool.blocking.flock(fd, operation)." in said


@LINUX
@pytest.mark.parametrize(
    ("way", "cure"),
    [
        (
            subprocess.Popen.wait,
            "fastpool.blocking.wait(popen), or token.interrupts(popen) to end it",
        ),
        (
            subprocess.Popen.communicate,
            "fastpool.blocking.run(command), or token.interrupts(popen) with process_group=0 in "
            "its Popen",
        ),
    ],
)
def test_wait_for_a_child_is_named(way, cure):
    """
    Whatever the system call is that `subprocess` makes of it.
    """
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as child:
        said = report(lambda: way(child), child.kill, ready=in_call)

    assert said.endswith(f"use {cure}.")
    if way is subprocess.Popen.wait:
        assert f", for child process {child.pid}." in said


@LINUX
def test_command_that_is_run_is_named(tmp_path):
    """
    Its name is all that is known of it: the call is replaced as a whole.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    said = report(
        lambda: subprocess.run(["cat", fifo], check=True, stdout=subprocess.DEVNULL),
        lambda: open(fifo, "w").close(),
        ready=in_call,
    )

    assert said.endswith("use fastpool.blocking.run(command).")


@LINUX
def test_wait_for_a_process_is_named():
    """
    One of `multiprocessing`, which waits as for any child.
    """
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=[60])
    process.start()

    said = report(process.join, process.kill, ready=in_call)
    process.close()

    assert said.endswith("use fastpool.blocking.wait(process).")


@LINUX
@pytest.mark.parametrize("way", [lambda: time.sleep(1), lambda: select.select([], [], [], 1)])
def test_sleep_is_named(way):
    """
    In both of its forms.
    """
    released = []

    def sleeps():
        while not released:  # a busy machine may take longer for its report than one of them
            way()

    said = report(sleeps, lambda: released.append(1), ready=in_call)

    assert "It sits in the system call " in said
    assert "use fastpool.sleep(seconds)." in said


# --- Libraries ------------------------------------------------------------------------------------


@pytest.fixture
def silent():
    """A server that answers nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def by_urllib(address):
    return lambda: urllib.request.urlopen(f"http://{address}")


def by_urllib3(address):
    pools = services.client("urllib3").PoolManager(retries=False)
    return lambda: pools.request("GET", f"http://{address}")


def by_requests(address):
    session = services.client("requests").Session()
    session.trust_env = False
    return lambda: session.get(f"http://{address}")


def by_httpx(address):
    client = services.client("httpx").Client(trust_env=False, timeout=None)
    return lambda: client.get(f"http://{address}")


def by_websockets(address):
    connect = services.client("websockets.sync.client").connect
    # Its warning is of what is done with the connection, and there is none.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lambda: connect(f"ws://{address}", proxy=None)


def by_redis(address):
    redis = services.client("redis")
    host, port = address.split(":")
    return redis.Redis(host, int(port), retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0)).ping


def by_psycopg(address):
    host, port = address.split(":")
    return lambda: services.client("psycopg").connect(host=host, port=port)


@LINUX
@pytest.mark.parametrize(
    ("library", "cure"),
    [
        (by_urllib, "fastpool.blocking.urlopen(url)"),
        (by_urllib3, "fastpool.blocking.with_urllib3.PoolManager()"),
        (by_requests, "fastpool.blocking.with_requests.HTTPAdapter(), mounted on the session"),
        (by_httpx, "httpx.Client(transport=fastpool.blocking.with_httpx.HTTPTransport())"),
        (by_websockets, "fastpool.blocking.with_websockets.connect(uri), or token.interrupts("),
        (by_redis, "fastpool.blocking.redis_client(client), once"),
        (by_psycopg, "fastpool.blocking.abandon(fn, *args), or give it a connect_timeout"),
    ],
)
def test_cure_is_for_the_library_that_waits(silent, library, cure):
    """
    Its socket is out of the user's reach, whatever call it sits in.
    """
    call = library("{}:{}".format(*silent.getsockname()))

    def asks():
        with contextlib.suppress(Exception):  # each has its own for a server that is gone
            call()

    def hang_up():
        with silent.accept()[0]:
            silent.close()

    blocked = on_lock if library is by_websockets else in_call
    said = report(asks, hang_up, ready=blocked)

    assert f"To have a cancel wake it, use {cure}" in said


@LINUX
def test_cure_for_a_query_is_for_psycopg(postgres):
    """
    The query is cancelled, and the connection lives on.
    """
    psycopg = services.client("psycopg")
    with psycopg.connect(postgres) as connection:

        def asks():
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                connection.execute("SELECT pg_sleep(60)")

        said = report(asks, connection.cancel_safe, ready=in_call)

    assert said.endswith("use token.interrupts(connection).")


@LINUX
def test_cure_for_a_wait_for_a_connection_is_for_its_pool(postgres):
    """
    Nothing wakes that wait: it is to be short.
    """
    services.client("psycopg")
    pool = services.client("psycopg_pool").ConnectionPool(postgres, min_size=1, open=True)
    with pool:
        taken = pool.getconn()

        def asks():
            pool.putconn(pool.getconn())

        said = report(asks, lambda: pool.putconn(taken), ready=on_lock)

    assert said.endswith("use getconn(timeout=0.05), in a loop with token.check().")


@LINUX
def test_cure_for_a_query_of_sqlite_is_no_check():
    """
    It computes, but there is no loop of the user's.
    """
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    begun = []
    with contextlib.closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        connection.create_function("begin", 0, lambda: begun.append(True))

        def asks():
            connection.execute("SELECT begin()")
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute(endless)

        said = report(asks, connection.interrupt, ready=lambda thread: begun and in_code(thread))

    assert "It sits in no system call" in said
    assert said.endswith("use token.interrupts(connection), if it is SQLite's.")


def in_code(thread):
    return not is_blocked(thread, on_lock=True)


@LINUX
def test_cure_for_a_lock_of_sqlite_is_no_sleep(tmp_path):
    """
    It sleeps until another connection gives the lock back.
    """
    file = tmp_path / "data"
    with (
        contextlib.closing(sqlite3.connect(file, isolation_level=None)) as holder,
        contextlib.closing(
            sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)
        ) as connection,
    ):
        holder.execute("BEGIN IMMEDIATE")
        # Its sleeps grow to a tenth of a second.
        said = report(
            lambda: connection.execute("BEGIN IMMEDIATE"),
            lambda: holder.execute("ROLLBACK"),
            ready=in_call,
        )

    assert said.endswith("use fastpool.blocking.execute(connection, sql), if it is SQLite's.")


@LINUX
def test_look_up_of_a_host_is_told_from_a_read(pair):
    """
    Both read from a socket, but the resolver's cannot be interrupted.
    """
    here, there = pair
    getaddrinfo = here.recv

    said = report(lambda: getaddrinfo(10), lambda: there.send(b"x"), ready=in_call)

    assert said.endswith("use fastpool.blocking.abandon(fn, *args).")


def frames_of(*modules):
    """The frames of functions in modules of these names that call each other."""

    def call():
        return sys._getframe(1)

    for module in reversed(modules):
        names = {"__name__": module, "call": call}
        exec("def function(): return call()", names)
        call = names["function"]
    frames = [call()]
    while len(frames) < len(modules):
        frames.append(frames[-1].f_back)
    return frames[::-1]


@pytest.mark.parametrize(
    ("modules", "instead"),
    [
        (["mine", "requests.sessions", "urllib3.poolmanager", "socket"], "with_requests"),
        (["mine", "urllib3.poolmanager", "http.client", "ssl"], "with_urllib3"),
        (["requests.sessions", "mine", "redis.client"], "redis_client"),
        (["requests.sessions", "mine"], "interruptible"),
        (["mine", "http.server", "socket"], "interruptible"),
        (
            ["mine", "requests.sessions", "fastpool.blocking.with_requests", "socket"],
            "interruptible",
        ),
    ],
)
def test_cure_is_for_the_library_that_the_user_calls(modules, instead):
    """
    Not for one inside of it, nor for one that has called code of the user's, nor that has ours.
    """
    assert instead in cure(Seat("recvfrom", 7, "a socket"), frames_of(*modules))


def test_place_in_a_pool_of_redis_is_told_from_a_read():
    """
    Its queue is its own, and hears no token.
    """
    found = cure(Seat("futex"), frames_of("redis.connection", "queue", "threading"))

    assert found.endswith("or give its connection pool a timeout")


# --- Locks and what is made of them ---------------------------------------------------------------


def on_queue():
    waited = queue.Queue()
    return waited.get, lambda: waited.put(1)


def on_simple_queue():
    waited = queue.SimpleQueue()
    return lambda: waited.get(), lambda: waited.put(1)


def on_full_queue():
    waited = queue.Queue(1)
    waited.put(1)
    return lambda: waited.put(2), waited.get


def on_a_lock():
    lock = threading.Lock()
    lock.acquire()
    return lambda: lock.acquire(), lock.release


def on_a_with_block():
    lock = threading.Lock()
    lock.acquire()

    def enters():
        with lock:
            pass

    return enters, lock.release


def on_a_semaphore():
    semaphore = threading.Semaphore(0)
    return semaphore.acquire, semaphore.release


def on_an_event():
    event = threading.Event()
    return event.wait, event.set


def on_a_condition():
    condition = threading.Condition()

    def waits():
        with condition:
            condition.wait()

    def notifies():
        with condition:
            condition.notify()

    return waits, notifies


def on_a_thread():
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    return thread.join, event.set


def on_a_future():
    future = concurrent.futures.Future()
    return future.result, lambda: future.set_result(1)


@LINUX
@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (on_queue, "get(queue)"),
        (on_simple_queue, "get(queue)"),
        (on_full_queue, "put(queue, item)"),
        (on_a_lock, "acquire(lock)"),
        (on_a_with_block, "acquire(lock)"),
        (on_a_semaphore, "acquire(lock)"),
        (on_an_event, "wait(thing)"),
        (on_a_condition, "wait(thing)"),
        (on_a_thread, "wait(thing)"),
        (on_a_future, "wait(thing)"),
    ],
)
def test_wait_for_a_lock_is_told_by_what_is_made_of_it(make, instead):
    """
    To the system all of them are one call; the stack tells them apart.
    """
    call, release = make()

    said = report(call, release, ready=on_lock)

    assert "It sits in the system call futex." in said
    assert said.endswith(f"use fastpool.blocking.{instead}.")


@LINUX
def test_wait_for_a_lock_in_unknown_code_names_what_there_is():
    """
    Where no source is to be had, nothing is made up.
    """
    lock = threading.Lock()
    lock.acquire()
    names = {"lock": lock}
    exec(compile("def unknown():\n    lock.acquire()\n", "<nowhere>", "exec"), names)

    said = report(names["unknown"], lock.release, ready=on_lock)

    assert said.endswith("use fastpool.blocking.get, put, acquire or wait, by what it waits for.")


# --- What is in no call, or in one of ours --------------------------------------------------------


@LINUX
def test_busy_loop_is_told_from_a_wait():
    """
    It waits for the interpreter's lock most of the time, and is told to check its token.
    """
    turns, stopped = [], []

    def spins():
        while not stopped:
            turns.append(1)
            del turns[2:]

    said = report(spins, lambda: stopped.append(1), ready=lambda thread: turns)

    assert "It sits in no system call: it computes, in Python or in what that line calls." in said
    assert said.endswith("call token.check() in its loop.")


@LINUX
def test_wait_under_a_shield_is_told_from_a_wait_of_others():
    """
    A call of ours that goes on has no better one to be named.
    """
    tokens = []

    def sleeps():
        with shield() as token:
            tokens.append(token)
            token.wait(60)

    said = report(sleeps, lambda: tokens[0].cancel(), ready=on_lock)

    assert "It waits in a call of fastpool's, on a token that is not set; see shield()." in said
    assert "system call" not in said


@LINUX
def test_task_that_waits_for_a_stuck_one_names_it():
    """
    The outer one leaves a group whose task does not stop; that is where to look.
    """
    release = threading.Event()

    def leaves():
        with TaskGroup(1, name="inner", grace=60) as group:
            group.with_options(name="deaf").submit(release.wait)

    def is_left(thread):
        (hard,) = fastpool.dump()
        inner = [group for task in hard.tasks for group in task.groups if group.tasks]
        return inner and inner[0].state == "leaving" and on_lock(thread)

    said = report(leaves, release.set, ready=is_left)

    assert said.endswith("It waits for task 'deaf' of group 'inner'.")
    assert [line for line in said.split("\n") if "in leaves" in line]


# --- How it reads ---------------------------------------------------------------------------------


@pytest.fixture
def stubborn():
    """A task that goes on until it is reported, and what is said of it."""

    def run(fn=None, name=None, spoil=None):
        release, started = threading.Event(), threading.Event()

        def deaf():
            started.set()
            release.wait(timeout=60)

        def let_go(event):
            if event.name == "task_stuck":
                release.set()

        with (
            pytest.warns(RuntimeWarning) as told,
            TaskGroup(1, name="hard", grace=0.01, observers=[let_go]) as group,
        ):
            group.with_options(name=name).submit(deaf if fn is None else fn(deaf))
            started.wait(timeout=60)
            group.cancel()
        return str(told[0].message)

    return run


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError, ProcessLookupError])
def test_system_that_tells_nothing_leaves_its_lines_out(stubborn, monkeypatch, error):
    """
    Containers may forbid to look; the stack is shown all the same.
    """

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(fastpool._syscalls, "open", refuse, raising=False)

    said = stubborn()

    assert "Its Python stack" in said
    assert "in deaf" in said
    assert "It sits" not in said


def test_system_without_proc_is_not_asked(stubborn, monkeypatch):
    """
    Only Linux has the file.
    """
    monkeypatch.setattr(fastpool._syscalls.sys, "platform", "darwin")

    said = stubborn()

    assert "in deaf" in said
    assert "It sits" not in said


def test_report_that_cannot_be_made_leaves_its_first_line(stubborn, monkeypatch, unraised):
    """
    Whatever is wrong with it, the task is named, and the block is left.
    """
    monkeypatch.setattr(fastpool._stuck, "own_frames", lambda *args, **kwargs: 1 // 0)

    said = stubborn()

    assert said.startswith("task 'deaf' of group 'hard' still runs")
    assert "\n" not in said
    assert [type(error) for error in unraised] == [ZeroDivisionError]


def test_code_without_a_source_is_shown_without_it(stubborn, monkeypatch, unraised):
    """
    Whatever the loader of its module raises.
    """
    monkeypatch.setattr(linecache, "cache", {})

    said = stubborn(lambda deaf: functools.partial(hidden(known=True), deaf), name="deaf")

    assert re.search(r'File "hidden.py", line 2, in hidden\n +File .*, in deaf\n', said)
    assert unraised == []


def test_names_cannot_steer_the_terminal(stubborn):
    """
    Control characters stay out of what is printed.
    """
    said = stubborn(name="\x1b[31mred\u202e")

    assert "\x1b" not in said
    assert "\u202e" not in said


def test_deep_stack_is_cut_at_its_outer_end(stubborn):
    """
    The innermost calls tell where it sits.
    """

    def deepen(deaf):
        def dig(depth, low=None):
            return dig_again(depth) if depth else deaf()

        def dig_again(depth):
            return dig(depth - 1)

        return lambda: dig(50)

    said = stubborn(deepen)

    assert "calls further out" in said
    assert "in deaf" in said
    assert said.count('File "') <= fastpool._stack.LIMIT


def test_frames_of_ours_are_left_out(stubborn):
    """
    A decorated function's stack begins with the function.
    """

    def decorate(deaf):
        @cancellable
        def told(token):
            deaf()

        return told

    said = stubborn(decorate)

    stack = [line for line in said.split("\n") if 'File "' in line]
    assert stack[0].endswith(", in told")
    assert stack[1].endswith(", in deaf")
    assert "fastpool/_" not in "".join(stack)


def test_stuck_task_is_reported_again_and_again(unraised):
    """
    With the warning made an error the block still waits.
    """
    release = threading.Event()
    events = []

    def stubborn():
        release.wait(timeout=60)

    def count(event):
        if event.name == "task_stuck":
            events.append(event)
            if len(events) == 2:
                release.set()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TaskGroup(1, grace=0.01, observers=[count]) as group:
            task = group.submit(stubborn)
            while not task.running():
                pass
            group.cancel()

    assert [event.task for event in events] == [task, task]
    assert [type(error) for error in unraised] == [RuntimeWarning] * 2
    assert task.result() is None


@pytest.mark.parametrize(
    ("grace", "spans"), [(5.0, [5, 10, 20, 40, 80]), (0.01, [0.01, 1, 2, 4, 8])]
)
def test_stuck_task_is_reported_at_growing_intervals(monkeypatch, grace, spans):
    """
    First after the time of grace, then after twice as long each time, and a second at the least.
    """
    release = threading.Event()
    patience = Vigil.patience
    asked, reported = [], []
    now = None

    def hurry(vigil):
        # The time it would wait for has passed already.
        nonlocal now
        span = patience(vigil)
        assert span is not None
        asked.append(span)
        now += span
        return 0

    def note(event):
        if event.name == "task_stuck":
            reported.append(now - group.token._cause.at)
            if len(reported) == len(spans):
                release.set()

    clock = types.SimpleNamespace(monotonic=lambda: now)
    with pytest.warns(RuntimeWarning), TaskGroup(1, grace=grace, observers=[note]) as group:
        task = group.submit(release.wait, 60)
        until(task.running)
        group.cancel()
        now = group.token._cause.at
        monkeypatch.setattr(fastpool._stuck, "time", clock)
        monkeypatch.setattr(Vigil, "patience", hurry)

    assert asked[: len(spans)] == pytest.approx(spans)
    assert reported == pytest.approx(list(itertools.accumulate(spans)))


# --- What the system says, word by word -----------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "number", "name"),
    [("x86_64", 45, "recvfrom"), ("aarch64", 207, "recvfrom"), ("riscv64", 207, "number 207")],
)
def test_calls_are_named_by_the_machine(monkeypatch, machine, number, name):
    """
    Each has numbers of its own; of one that is not known the number is said.
    """
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": machine}))
    looked = Look(number, (10**6, 0, 0, 0, 0, 0), 7)

    seat = settle(looked, looked)

    assert seat.call == name


@pytest.mark.parametrize(
    ("second", "call"),
    [
        (Look(202, (1, 137), 7), "futex"),
        (Look(202, (1, 137), 8), None),
        (Look(202, (2, 137), 7), None),
        (Look(None, (), 7), None),
        (Look(230, (1, 1), 8), "clock_nanosleep"),
    ],
)
def test_lock_counts_as_waited_for_only_if_the_thread_has_not_moved(monkeypatch, second, call):
    """
    The wait for the interpreter's lock looks alike, and is over soon.
    """
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": "x86_64"}))

    assert settle(Look(202, (1, 137), 7), second) == Seat(call)


def test_thread_that_has_ended_is_not_looked_at():
    """
    There is nothing to be said of it.
    """
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()

    # `join` returns a little before the system's thread has gone.
    until(lambda: fastpool._syscalls.look(thread.native_id) is None)
    assert settle(None, Look(None, (), 0)) is None


def test_report_that_reads_like_an_earlier_one_is_shown_too(monkeypatch):
    """
    Python shows a warning once for each text and line, unless it is told otherwise.
    """
    monkeypatch.setattr(fastpool._stuck, "_headline", lambda *args: "task 'wait' still runs")
    monkeypatch.setattr(fastpool._stuck, "_details", lambda stuck: [""] * len(stuck))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            release = threading.Event()
            let_go = [lambda event, release=release: event.name == "task_stuck" and release.set()]
            with TaskGroup(1, name="same", grace=0.01, observers=let_go) as group:
                task = group.submit(release.wait, 60)
                until(task.running)
                group.cancel()

    assert [str(warning.message) for warning in told] == ["task 'wait' still runs"] * 2
    assert {warning.filename for warning in told} == {__file__}
