"""
Sockets hear the token: connecting, reading, writing, listening; TCP, UDP, Unix and TLS.
"""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from blocked import cancel_while_blocked, ended, is_blocked, under
from servers import certificate, full, refusing, served
from staging import start, until

import fastpool
from fastpool import Cancelled, CancelToken, TaskGroup, blocking, current_token, use_token

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.fixture
def path(tmp_path):
    """Where a Unix socket may be; its path must be short."""
    there = os.path.relpath(tmp_path / "s")
    return there if len(there) < 100 else str(tmp_path / "s")


def silent(connection):
    """A server that takes the connection and says nothing."""


def pair(family, kind):
    """Two sockets that are connected to each other."""
    if family == socket.AF_UNIX:
        return socket.socketpair(family, kind)
    if kind == socket.SOCK_DGRAM:
        a, b = socket.socket(type=kind), socket.socket(type=kind)
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return a, b
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        return a, listener.accept()[0]


def secured():
    """Two TLS sockets that are connected to each other."""
    server, client = certificate()
    a, b = pair(socket.AF_INET, socket.SOCK_STREAM)
    accepted = []
    thread = threading.Thread(
        target=lambda: accepted.append(server.wrap_socket(b, server_side=True))
    )
    thread.start()
    a = client.wrap_socket(a, server_hostname="localhost")
    thread.join()
    return a, accepted[0]


KINDS = {
    "tcp": lambda: pair(socket.AF_INET, socket.SOCK_STREAM),
    "udp": lambda: pair(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: pair(socket.AF_UNIX, socket.SOCK_STREAM),
    "unix datagrams": lambda: pair(socket.AF_UNIX, socket.SOCK_DGRAM),
    "unix packets": lambda: pair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "tls": secured,
}
COVERS = {
    "interrupts": lambda sock: current_token().interrupts(sock),
    "interruptible": blocking.interruptible,
}


def fill(sock):
    """Send until nobody reads any more, and go on."""
    while True:
        sock.send(bytes(1000))


# --- Reading and writing --------------------------------------------------------------------------


@pytest.mark.parametrize("cover", COVERS.values(), ids=COVERS.keys())
@pytest.mark.parametrize("timeout", [None, 50], ids=["", "timeout"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocked_read_is_left_at_a_cancel(kind, timeout, cover):
    """
    Also with a timeout, where Python waits by poll; the socket is then shut down.
    """

    def read():
        with cover(mine):
            seen.append(mine.recv(10))

    seen = []
    mine, other = KINDS[kind]()
    with mine, other:
        mine.settimeout(timeout)
        outcome = cancel_while_blocked(read)

        assert type(outcome) is Cancelled
        assert outcome.reason == "enough"
        # What looks like success makes the check on leaving necessary; since Python 3.13 TLS
        # raises an error instead.
        assert seen == [b""] or (kind == "tls" and isinstance(outcome.__context__, OSError))
        assert kind == "tls" or mine.recv(10) == b""  # at once


@pytest.mark.parametrize("timeout", [None, 50], ids=["", "timeout"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tls"])
def test_blocked_read_of_a_duplicate_is_left_at_a_cancel(kind, timeout):
    """
    To the system it is the same socket; TLS has no duplicate.
    """

    def read():
        with blocking.interruptible(mine):
            twin.recv(10)

    mine, other = KINDS[kind]()
    with mine, other, mine.dup() as twin:
        twin.settimeout(timeout)
        assert type(cancel_while_blocked(read)) is Cancelled
        assert twin.recv(10) == b""


@pytest.mark.parametrize("timeout", [None, 50], ids=["", "timeout"])
@pytest.mark.parametrize("kind", ["tcp", "unix", "unix datagrams", "unix packets", "tls"])
def test_blocked_write_is_left_at_a_cancel(kind, timeout):
    """
    What came out of the write is the context of the `Cancelled`.
    """

    def write():
        with blocking.interruptible(mine):
            fill(mine)

    mine, other = KINDS[kind]()
    with mine, other:
        mine.settimeout(timeout)
        outcome = cancel_while_blocked(write)

    assert type(outcome) is Cancelled
    assert isinstance(outcome.__context__, OSError)


@pytest.mark.parametrize("timeout", [None, 50], ids=["", "timeout"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_blocked_accept_is_left_at_a_cancel(family, timeout, path):
    """
    A listening socket is interrupted as any other, with a timeout and without.
    """

    def accept():
        with blocking.interruptible(listener):
            listener.accept()

    with socket.socket(family) as listener:
        listener.bind(path if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(timeout)
        outcome = cancel_while_blocked(accept)

    assert type(outcome) is Cancelled
    assert isinstance(outcome.__context__, OSError)


def test_blocked_read_of_a_file_that_makefile_made_is_left_at_a_cancel():
    """
    The last line, which the peer has not finished, does not come out.
    """

    def read():
        with blocking.interruptible(mine), mine.makefile() as lines:
            return list(lines)

    mine, other = KINDS["tcp"]()
    with mine, other:
        other.sendall(b"one\ntw")

        assert type(cancel_while_blocked(read)) is Cancelled


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cancel_a_socket_is_untouched(kind):
    """
    It goes on as before, also when the token is set after the block.
    """
    mine, other = KINDS[kind]()
    token = CancelToken()
    with mine, other:
        if kind == "udp":
            mine.connect(other.getsockname())
            other.connect(mine.getsockname())
        mine.settimeout(5)
        other.sendall(b"a")
        with use_token(token), blocking.interruptible(mine):
            first = mine.recv(1)
        token.cancel()
        other.sendall(b"b")

        assert (first, mine.recv(1), mine.gettimeout()) == (b"a", b"b", 5)


def test_set_token_lets_nobody_in_and_touches_nothing():
    """
    The block is not entered, and the socket goes on for others.
    """
    mine, other = KINDS["tcp"]()
    token = CancelToken(timeout=0)
    with mine, other:
        with use_token(token), pytest.raises(Cancelled), blocking.interruptible(mine):
            raise AssertionError("entered")
        other.sendall(b"a")

        assert mine.recv(1) == b"a"


def test_cancel_of_a_socket_closed_in_the_block_meets_no_other_file():
    """
    Its number may be another's by then: another socket's, which must not be shut down.
    """
    token = CancelToken()
    mine, other = KINDS["unix"]()
    with other, use_token(token), contextlib.ExitStack() as ending:
        with pytest.raises(Cancelled), blocking.interruptible(mine):
            number = mine.fileno()
            mine.close()
            a, b = map(ending.enter_context, KINDS["unix"]())
            token.cancel()
        b.sendall(b"a")

        assert number in (a.fileno(), b.fileno())
        assert a.recv(1) == b"a"


def test_what_is_no_open_socket_is_refused():
    """
    A closed one as an `OSError`, anything else as a `TypeError` that says what to use.
    """
    with socket.socket() as closed:
        pass

    with pytest.raises(OSError, match="wants an open socket"):
        blocking.interruptible(closed)
    with pytest.raises(TypeError, match=r"not 5; .* token\.interrupts"):
        blocking.interruptible(5)


def test_cancel_of_a_closed_socket_raises_nothing(unraised):
    """
    A block that closes its socket is left with `Cancelled`, and there is no noise.
    """
    token = CancelToken()
    for cover in COVERS.values():
        child = token.child()
        sock = socket.socket()
        with use_token(child), pytest.raises(Cancelled), cover(sock):
            sock.close()
            child.cancel()

    assert not unraised


def test_socket_is_known_without_being_imported_for():
    """
    `import fastpool` brings no module of a blocking call, and `interrupts` knows sockets.
    """
    script = """
import socket, sys, threading
import fastpool
a, b = socket.socketpair()
token = fastpool.CancelToken()
brought = {name for name in sys.modules if name.startswith("fastpool.blocking.")}
assert not brought | {"http.client", "urllib.request"} & set(sys.modules), brought
try:
    with token.interrupts(a):
        threading.Thread(target=token.cancel).start()
        a.recv(1)
except fastpool.Cancelled:
    print("cancelled")
assert "fastpool.blocking._sockets" not in sys.modules
assert fastpool.blocking.sleep is fastpool.sleep
assert not hasattr(fastpool.blocking, "nothing")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )

    assert (done.returncode, done.stdout) == (0, "cancelled\n"), done.stderr


@pytest.mark.parametrize("kind", ["socket.socket", "'socket.socket'"], ids=["type", "name"])
def test_users_way_is_not_replaced_by_ours(kind):
    """
    Whether ours has been looked up by then or not.
    """
    script = f"""
import socket
from fastpool import Cancelled, CancelToken, blocking
seen = []
blocking.register({kind}, seen.append)
blocking.connect  # brings ours
a, b = socket.socketpair()
token = CancelToken()
try:
    with a, b, token.interrupts(a):
        token.cancel()
except Cancelled:
    print(seen == [a])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )

    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# --- Connecting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 50], ids=["", "timeout"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_pending_connect_is_left_at_a_cancel(family, timeout, path):
    """
    The listener's queue is full, so the connection stays pending.
    """
    with full(family, path if family == socket.AF_UNIX else ("127.0.0.1", 0)) as address:
        outcome = cancel_while_blocked(lambda: blocking.connect(address, timeout))

    assert type(outcome) is Cancelled


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_connect_that_begins_after_the_shutdown_does_not_wait(kind, path):
    """
    A cancel between the entry and the call is heard, though `connect` looks at no shutdown.
    """
    family, where = {
        "tcp": (socket.AF_INET, ("127.0.0.1", 0)),
        "unix": (socket.AF_UNIX, path),
    }[kind]
    token = CancelToken()
    with contextlib.ExitStack() as ending:
        address = ending.enter_context(full(family, where))
        sock = ending.enter_context(socket.socket(family))
        ending.enter_context(use_token(token))
        with pytest.raises(Cancelled) as caught, blocking.interruptible(sock):
            token.cancel()
            sock.connect(address)

    assert isinstance(caught.value.__context__, OSError)


@pytest.mark.parametrize("secure", [False, True], ids=["", "tls"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_connect_gives_a_socket_as_the_standard_library_does(family, secure, path):
    """
    It has the timeout that was given, and the default one if none was.
    """
    server, client = certificate()

    def echo(connection):
        if secure:
            connection = server.wrap_socket(connection, server_side=True)
        with connection:
            connection.sendall(connection.recv(10))

    def listener():
        if family == socket.AF_INET:
            return socket.create_server(("127.0.0.1", 0))
        return socket.create_server(path, family=family)

    tls = {"ssl_context": client, "server_hostname": "localhost"} if secure else {}
    with served(echo, listener()) as address:
        for timeout in ({}, {"timeout": 50}, {"timeout": None}):
            with blocking.connect(address, **timeout, **tls) as sock:
                sock.sendall(b"hello")

                assert sock.recv(10) == b"hello"
                assert sock.gettimeout() == timeout.get("timeout")
                assert isinstance(sock, ssl.SSLSocket) == secure


def test_connect_takes_the_servers_name_from_the_address():
    """
    A certificate for somebody else is refused, and the socket closed.
    """
    server, client = certificate()

    def talk(connection):
        server.wrap_socket(connection, server_side=True).close()

    with served(talk) as (_, port):
        blocking.connect(("localhost", port), ssl_context=client).close()
        with pytest.raises(ssl.SSLCertVerificationError):
            blocking.connect(("localhost", port), ssl_context=client, server_hostname="example.org")


def test_connect_comes_from_the_source_address():
    """
    As `socket.create_connection` does it.
    """
    with served(silent) as address:
        sock = blocking.connect(address, source_address=("127.0.0.9", 0))
        name = sock.getsockname()
        sock.close()

    assert name[0] == "127.0.0.9"


def test_failing_connect_leaves_no_socket(path):
    """
    Refused, out of time, not to be looked up, or of a set token.
    """
    with full(socket.AF_INET, ("127.0.0.1", 0)) as tcp, full(socket.AF_UNIX, path) as unix:
        for address in (tcp, unix):
            with pytest.raises(TimeoutError):
                blocking.connect(address, 0.05)
            with pytest.raises(BlockingIOError):
                blocking.connect(address, 0)
            with pytest.raises(Cancelled), use_token(CancelToken(timeout=0)):
                blocking.connect(address)

    with refusing() as nobody:
        with pytest.raises(ConnectionRefusedError):
            blocking.connect(nobody)
        with pytest.raises(ValueError, match="Timeout"):
            blocking.connect(nobody, -1)
    with pytest.raises(FileNotFoundError):
        blocking.connect(path + "x")
    with pytest.raises(socket.gaierror):
        blocking.connect(("127.0.0.1", "no such service"))


def test_path_of_no_socket_is_named(path):
    """
    One that is written as a host and its port is told how these are.
    """
    with pytest.raises(FileNotFoundError, match=re.escape(f"No such file or directory: {path!r}")):
        blocking.connect(path)
    for address in ("example.org:80", b"example.org:80"):
        with pytest.raises(FileNotFoundError) as told:
            blocking.connect(address)

        assert str(told.value) == (
            "[Errno 2] no such Unix socket; for TCP write connect(('example.org', 80)): "
            f"{address!r}"
        )


def test_connect_to_a_unix_socket_goes_on_when_there_is_room(path):
    """
    It waits for its place in the listener's queue, however many looks at the token that takes.
    """

    def connect():
        with blocking.connect(path, 50) as sock:
            return sock.gettimeout()

    with contextlib.ExitStack() as ending:
        listener = ending.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        ending.enter_context(blocking.connect(path))
        thread, outcome = start(connect)
        until(lambda: is_blocked(thread.native_id))
        ending.enter_context(listener.accept()[0])
        thread.join(timeout=60)

    assert outcome == [50]


# --- TLS ------------------------------------------------------------------------------------------


def in_connect(address, client):
    return blocking.connect(address, ssl_context=client, server_hostname="localhost")


def in_the_block(address, client):
    sock = socket.create_connection(address)
    with blocking.interruptible(sock), sock:
        client.wrap_socket(sock, server_hostname="localhost").close()


def of_a_wrapped_one(address, client):
    sock = socket.create_connection(address)
    wrapped = client.wrap_socket(sock, server_hostname="localhost", do_handshake_on_connect=False)
    with wrapped, current_token().interrupts(wrapped):
        wrapped.do_handshake()


@pytest.mark.parametrize("shake", [in_connect, in_the_block, of_a_wrapped_one])
@pytest.mark.parametrize("part", [0, 20], ids=["silent", "torn"])
def test_blocked_handshake_is_left_at_a_cancel(shake, part):
    """
    The server has read the client's hello, and says nothing, or the beginning of a record.
    """

    def talk(connection):
        connection.recv(65536)
        connection.sendall(b"\x16\x03\x03\x00\x7a"[:part] + bytes(max(0, part - 5)))
        heard.set()

    heard = threading.Event()
    _, client = certificate()
    with served(talk) as address:
        outcome = cancel_while_blocked(lambda: shake(address, client), ready=heard.is_set)

    assert type(outcome) is Cancelled
    assert heard.is_set()


def test_handshake_in_the_block_goes_on_without_a_cancel():
    """
    The wrapped socket works, in the block and after it.
    """
    server, client = certificate()

    def talk(connection):
        with server.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.sendall(b"ab")

    with served(talk) as address, use_token(CancelToken()):
        sock = socket.create_connection(address)
        with blocking.interruptible(sock):
            wrapped = client.wrap_socket(sock, server_hostname="localhost")
            first = wrapped.recv(1)
        with wrapped:
            assert (first, wrapped.recv(1)) == (b"a", b"b")


# --- Races ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_cancel_at_any_moment_is_no_wrong_success_and_never_late(kind, hasty):
    """
    Thousands of cancels meet the entry of a block, its read, the end of the read, its exit.

    Whoever leaves the block without `Cancelled` has the byte that was sent, and the socket is
    good for the next one, whatever the canceller does meanwhile.
    """
    rounds = 300 if kind == "tls" else 3000
    tokens = [CancelToken() for _ in range(rounds)]
    ready, done = threading.Barrier(2), threading.Barrier(2)
    # In turns of a loop, of the canceller's, or below zero of the reader's, whose start the other
    # may miss by far: it seeks the moment at which either may come first.
    delay = 0

    def cancel():
        for number, token in enumerate(tokens):
            ready.wait(60)
            for _ in range(max(0, delay) + number % 40 * 5):
                pass
            token.cancel()
            done.wait(60)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    mine, other = KINDS[kind]()
    counts = {"cancelled": 0, "done": 0}
    for token in tokens:
        other.sendall(b"a")
        ready.wait(60)
        for _ in range(-delay):
            pass
        try:
            with use_token(token), blocking.interruptible(mine):
                got = mine.recv(1)
        except Cancelled:
            counts["cancelled"] += 1
            done.wait(60)
            delay += 40 + abs(delay) // 8
            mine.close()
            other.close()
            mine, other = KINDS[kind]()
        else:
            counts["done"] += 1
            assert got == b"a"
            other.sendall(b"b")
            assert mine.recv(1) == b"b"
            done.wait(60)
            delay -= 40 + abs(delay) // 8
            other.sendall(b"c")
            assert mine.recv(1) == b"c"
    mine.close()
    other.close()
    canceller.join()

    assert min(counts.values()) > 10, counts


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupt_once_blocked():
    """
    A thread that sends Ctrl-C to this process once the main thread is blocked, and what is to be
    set before it is.
    """
    begins = threading.Event()

    def ctrl_c():
        begins.wait(60)
        until(lambda: is_blocked(os.getpid(), None))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ctrl_c)
    thread.start()
    return thread, begins


@pytest.mark.parametrize("kind", ["tcp", "udp", "tls"])
def test_interrupt_ends_a_read_in_the_body(kind):
    """
    It is raised there and then, out of the very call.
    """
    mine, other = KINDS[kind]()
    thread, begins = interrupt_once_blocked()
    with mine, other, pytest.raises(KeyboardInterrupt), TaskGroup(1):
        begins.set()
        with blocking.interruptible(mine):
            mine.recv(1)
    thread.join()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_interrupt_ends_a_connect_in_the_body(family, path):
    """
    No socket is left behind.
    """
    queue = full(family, path if family == socket.AF_UNIX else ("127.0.0.1", 0))
    thread, begins = interrupt_once_blocked()
    with queue as address, pytest.raises(KeyboardInterrupt), TaskGroup(1):
        begins.set()
        blocking.connect(address)
    thread.join()


@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_interrupt_ends_a_handshake_in_the_body():
    """
    No socket is left behind; before Python 3.13 it closes with the traceback, and a warning.
    """
    _, client = certificate()
    thread, begins = interrupt_once_blocked()
    with served(silent) as address, pytest.raises(KeyboardInterrupt), TaskGroup(1):
        begins.set()
        in_connect(address, client)
    thread.join()


def test_failure_of_a_sibling_ends_a_read():
    """
    A task in `recv` leaves it as soon as another one has failed.
    """

    def reads():
        native.append(threading.get_native_id())
        with blocking.interruptible(mine):
            return mine.recv(1)

    def fails():
        until(lambda: native and is_blocked(native[0]))
        raise ValueError("bad header")

    native = []
    mine, other = KINDS["tcp"]()
    with mine, other, pytest.raises(ValueError, match="bad header"), TaskGroup(2) as group:
        reader = group.submit(reads)
        group.submit(fails)

    assert reader.cancelled()
    assert fastpool.current_token() is CancelToken.NEVER


def test_signal_does_not_make_a_unix_socket_pass_for_connected(tmp_path):
    """
    Python takes it for that, while it waits for its place in the listener's queue.
    """
    path = str(tmp_path / "full")
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
    try:
        with contextlib.ExitStack() as closing:
            listener = closing.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(0)
            first = closing.enter_context(socket.socket(socket.AF_UNIX))
            first.connect(path)  # takes the only place

            def disturb():
                while len(heard) < 20:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
                    time.sleep(0.002)
                closing.enter_context(listener.accept()[0])

            thread, outcome = start(disturb)
            sock = closing.enter_context(blocking.connect(path))
            thread.join(60)

            assert sock.getpeername() == path
            assert outcome == [None]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_lookup_that_fails_does_not_hide_the_cancel(monkeypatch):
    """
    It would pass for a failure of the connection's.
    """
    token = CancelToken()

    def fail(*args):
        token.cancel()
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with use_token(token), pytest.raises(Cancelled):
        blocking.connect(("nowhere.invalid", 80))


@contextlib.contextmanager
def unanswered(monkeypatch):
    """A name server, whether it was asked, and what has it answer; nobody is to connect then."""
    asked, released = threading.Event(), threading.Event()

    def look_up(*args):
        asked.set()
        released.wait(timeout=50)
        return found

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        found = socket.getaddrinfo(*listener.getsockname(), 0, socket.SOCK_STREAM)
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        yield asked, released
        released.set()
        until(lambda: not blocking.abandoned())

        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.filterwarnings("ignore:connect.* was left behind by a cancel:RuntimeWarning")
def test_connect_that_waits_for_a_name_can_be_abandoned(monkeypatch):
    """
    It is counted until the name server answers, and makes no connection then.
    """

    def connects():
        return blocking.abandon(blocking.connect, ("nowhere.invalid", 80))

    with unanswered(monkeypatch) as (asked, _):
        outcome = cancel_while_blocked(connects, among=None, ready=asked.is_set)
        assert type(outcome) is Cancelled
        assert blocking.abandoned() == ("connect",)


def test_cancel_during_the_look_up_of_a_name_is_heard_after_it(monkeypatch):
    """
    No connection is made.
    """
    token = CancelToken()
    with unanswered(monkeypatch) as (asked, answer):
        thread, outcome = under(token, blocking.connect, ("nowhere.invalid", 80))
        until(lambda: asked.is_set() and is_blocked(thread.native_id, None))
        token.cancel()
        assert not outcome
        answer.set()

        assert type(ended(thread, outcome)) is Cancelled
