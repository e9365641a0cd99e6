"""
WebSockets hear the token: connecting, the handshakes, receiving, sending, closing.
"""

import contextlib
import socket
import threading
import time

import pytest
import websockets.sync.client
import websockets.sync.server
from blocked import FOR_FILES, canceller, ended, is_blocked, under
from interrupted import in_child
from servers import certificate, full, read_request, served
from staging import until
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.http11 import Request
from websockets.server import ServerProtocol

from fastpool import Cancelled, CancelToken, TaskGroup, blocking, current_token, use_token
from fastpool.blocking.with_websockets import connect

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

plain_and_tls = pytest.mark.parametrize("secure", [False, True], ids=["", "tls"])


@pytest.fixture(autouse=True)
def no_ticket(monkeypatch):
    """
    By TLS 1.3 a server sends tickets after the handshake. If one comes at the wrong time, the
    thread with which websockets reads blocks in reading what it is not, and holds the connection's
    lock, so that its own client times out: one connection in two hundred, also without us.
    """
    monkeypatch.setattr(certificate()[0], "num_tickets", 0)


@contextlib.contextmanager
def serving(handle, *, secure=False):
    """A real server, and the URI and options to connect to it with."""
    context = certificate()[0] if secure else None
    with websockets.sync.server.serve(handle, "127.0.0.1", 0, ssl=context) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.socket.getsockname()[1]
        try:
            options = {"ssl": certificate()[1]} if secure else {}
            yield f"ws{'s' * secure}://127.0.0.1:{port}/", options
        finally:
            server.shutdown()
            thread.join()


def echo(connection):
    for message in connection:
        connection.send(message)


def keep(connection):
    """Say nothing, until the client has gone."""
    connection.wait_closed()


def cancel_once(ready, fn, *args, among=None):
    """As in the tests of HTTP clients: when the thread is blocked, and as far as `ready()`."""
    token = CancelToken()
    thread, outcome = under(token, fn, *args)
    until(lambda: outcome or (ready() and is_blocked(thread.native_id, among)))
    assert not outcome, outcome
    token.cancel("enough")
    return ended(thread, outcome)


def receive(connection):
    connection.recv()


def receive_with_timeout(connection):
    connection.recv(timeout=50)


def receive_streaming(connection):
    list(connection.recv_streaming())


def iterate(connection):
    list(connection)


def send(connection):
    while True:
        connection.send(bytes(1_000_000))


def send_fragments(connection):
    connection.send(bytes(1_000_000) for _ in range(1000))


def wait_closed(connection):
    connection.wait_closed()


CALLS = [
    receive,
    receive_with_timeout,
    receive_streaming,
    iterate,
    send,
    send_fragments,
    wait_closed,
]


class Mute:
    """
    A server that shakes hands, and neither reads nor says another word.

    Attributes:
        shaken: Whether it has shaken hands.
    """

    def __init__(self, *, then=b"", secure=False):
        self.shaken = threading.Event()
        self._then = then
        self._secure = secure

    def talk(self, connection):
        if self._secure:
            connection = certificate()[0].wrap_socket(connection, server_side=True)
            self._kept = connection
        protocol = ServerProtocol()
        protocol.receive_data(read_request(connection))
        request = protocol.events_received()[0]
        assert isinstance(request, Request)
        protocol.send_response(protocol.accept(request))
        connection.sendall(b"".join(protocol.data_to_send()) + self._then)
        self.shaken.set()

    @contextlib.contextmanager
    def running(self):
        with served(self.talk) as (host, port):
            try:
                yield f"ws{'s' * self._secure}://{host}:{port}/"
            finally:
                if self._secure:
                    self._kept.close()


@plain_and_tls
@pytest.mark.parametrize("call", CALLS)
def test_stalled_call_is_left_at_a_cancel(call, secure):
    """
    The connection is closed, without the server's help, and its threads have ended.
    """
    begun = threading.Event()

    def work():
        options = {"ssl": certificate()[1]} if secure else {}
        with connect(uri, **options) as connection:
            opened.append(connection)
            begun.set()
            call(connection)

    opened = []
    mute = Mute(secure=secure)
    with mute.running() as uri:
        outcome = cancel_once(begun.is_set, work)

        assert type(outcome) is Cancelled
        assert outcome.reason == "enough"
        with pytest.raises(ConnectionClosed):
            opened[0].send("more")


@pytest.mark.parametrize("call", [receive, receive_with_timeout, iterate, send, send_fragments])
def test_interrupts_knows_connections_of_websockets(call):
    """
    By the name of their type; the connection is closed when the block is left.
    """
    begun = threading.Event()

    def work():
        with websockets.sync.client.connect(uri, proxy=None) as connection:
            begun.set()
            with current_token().interrupts(connection):
                call(connection)

    with Mute().running() as uri:
        outcome = cancel_once(begun.is_set, work)

    assert type(outcome) is Cancelled


@plain_and_tls
def test_stalled_closing_is_left_at_a_cancel(secure):
    """
    The server does not answer the closing handshake.
    """
    begun = threading.Event()

    def work():
        options = {"ssl": certificate()[1]} if secure else {}
        with connect(uri, close_timeout=None, **options):
            begun.set()

    with Mute(secure=secure).running() as uri:
        outcome = cancel_once(begun.is_set, work)

    assert type(outcome) is Cancelled


def test_stalled_closing_with_messages_that_nobody_took_is_left_at_a_cancel():
    """
    The connection's own thread waits then for somebody to take them.
    """
    begun = threading.Event()
    message = b"\x82\x04some"

    def work():
        with connect(uri, close_timeout=None, max_queue=(2, 1)) as connection:
            until(lambda: connection.recv_messages.paused)
            begun.set()

    with Mute(then=message * 100_000).running() as uri:
        outcome = cancel_once(begun.is_set, work)

    assert type(outcome) is Cancelled


def test_stalled_connecting_is_left_at_a_cancel():
    """
    The listener's queue is full, so the connection stays pending.
    """
    with full(socket.AF_INET, ("127.0.0.1", 0)) as (host, port):
        outcome = cancel_once(lambda: True, connect, f"ws://{host}:{port}/", among=FOR_FILES)

    assert type(outcome) is Cancelled


def test_stalled_tls_handshake_is_left_at_a_cancel():
    """
    The server takes the connection, and never answers the client's hello.
    """
    said = []
    with served(lambda connection: said.append(connection.recv(10))) as (host, port):
        uri = f"wss://{host}:{port}/"
        outcome = cancel_once(lambda: said, connect, uri, among=FOR_FILES)

    assert type(outcome) is Cancelled


@plain_and_tls
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 101 Switch"], ids=["nothing", "status"])
def test_stalled_opening_handshake_is_left_at_a_cancel(said, secure):
    """
    Nothing is left of the connection.
    """
    asked = []

    def talk(connection):
        if secure:
            connection = certificate()[0].wrap_socket(connection, server_side=True)
            ending.enter_context(connection)
        asked.append(read_request(connection))
        connection.sendall(said)

    with contextlib.ExitStack() as ending, served(talk) as (host, port):
        options = {"ssl": certificate()[1]} if secure else {}
        uri = f"ws{'s' * secure}://{host}:{port}/"
        outcome = cancel_once(lambda: asked, lambda: connect(uri, open_timeout=None, **options))

    assert type(outcome) is Cancelled
    assert len(asked) == 1


def test_set_token_connects_to_nothing():
    """
    `Cancelled` before the server hears of it.
    """
    asked = []
    timed_out = use_token(CancelToken(timeout=0))
    with served(asked.append) as (host, port), timed_out, pytest.raises(Cancelled):
        connect(f"ws://{host}:{port}/")

    assert not asked


# --- Without a cancel -----------------------------------------------------------------------------


@plain_and_tls
def test_messages_come_and_go(secure):
    """
    Under a token that nobody sets, a connection is as websockets has it.
    """
    with serving(echo, secure=secure) as (uri, options), use_token(CancelToken()):
        with connect(uri, **options) as connection:
            connection.send("one")
            connection.send([b"tw", b"o"])
            assert connection.recv() == "one"
            assert b"".join(connection.recv_streaming()) == b"two"
            assert connection.ping().wait(timeout=60)
            connection.pong()
            with pytest.raises(TimeoutError):
                connection.recv(timeout=0.01)
        assert connection.close_code == 1000


def test_given_socket_is_used():
    """
    One to a Unix socket, or through a proxy.
    """
    with serving(echo) as (uri, _), use_token(CancelToken()):
        host, port = uri.removeprefix("ws://").rstrip("/").split(":")
        sock = blocking.connect((host, int(port)))
        with connect("ws://localhost/", sock=sock) as connection:
            connection.send("hi")
            assert connection.recv() == "hi"


def test_failing_connection_raises_as_in_websockets():
    """
    Nobody there, no WebSocket, no time.
    """

    def refuse(connection):
        read_request(connection)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        connect(f"ws://127.0.0.1:{port}/")
    with served(refuse) as (host, port), pytest.raises(InvalidHandshake):
        connect(f"ws://{host}:{port}/")
    with served(read_request) as (host, port), pytest.raises(TimeoutError):
        connect(f"ws://{host}:{port}/", open_timeout=0.05)


def test_connection_outlives_the_token_it_was_made_under():
    """
    A token has a hold on it for as long as a call under it takes; also in its own threads.
    """
    token = CancelToken()
    with serving(echo) as (uri, _):
        with use_token(token):
            connection = connect(uri, ping_interval=0.01)
        token.cancel()
        with connection:
            asked = time.monotonic()
            until(lambda: connection.latency or time.monotonic() > asked + 20)
            connection.send("hi")
            assert connection.recv() == "hi"


def test_cancel_about_the_end_of_a_call_hits_nobody_else(hasty):
    """
    Either that call raises, and the connection is closed, or the next one is as usual.
    """
    # No pings: the connection's thread for them joins the one that reads, as `close` does, and
    # before Python 3.13 two threads that join a third at once can break its lock.
    meeting = threading.Barrier(2, timeout=50)
    tokens = [CancelToken() for _ in range(200)]
    other = canceller(tokens, meeting)
    with serving(echo) as (uri, _), contextlib.ExitStack() as ending:
        connection = ending.enter_context(connect(uri, ping_interval=None))
        other.start()
        for token in tokens:
            meeting.wait()
            try:
                with use_token(token):
                    connection.send("hi")
                    assert connection.recv() == "hi"
            except Cancelled:
                connection.close()
                connection = ending.enter_context(connect(uri, ping_interval=None))
            meeting.wait()
            connection.send("again")
            assert connection.recv(timeout=20) in ("hi", "again")
            ending.pop_all().close()
            connection = ending.enter_context(connect(uri, ping_interval=None))
        other.join()


# --- Groups and Ctrl-C ----------------------------------------------------------------------------


def test_failure_of_a_sibling_ends_a_call():
    """
    The group raises the failure, and the task that waited for a message is cancelled.
    """
    begun = threading.Event()

    def work():
        with connect(uri) as connection:
            begun.set()
            connection.recv()

    def fail():
        begun.wait()
        raise ValueError("bad header")

    failing = pytest.raises(ValueError, match="bad header")
    with serving(keep) as (uri, _), failing, TaskGroup(2) as group:
        task = group.submit(work)
        group.submit(fail)

    assert task.cancelled()


def receives_in_the_body(group, ready):
    with Mute().running() as uri, connect(uri) as connection:
        ready()
        connection.recv()


def shakes_hands_in_the_body(group, ready):
    def talk(connection):
        read_request(connection)
        ready()

    with served(talk) as (host, port):
        connect(f"ws://{host}:{port}/", open_timeout=None)


@pytest.mark.parametrize("body", [receives_in_the_body, shakes_hands_in_the_body])
def test_interrupt_ends_a_call_in_the_body(body):
    """
    In a program of its own, which ends as programs do.
    """
    assert in_child(body) == "interrupted\n"
