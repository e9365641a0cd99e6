"""
Requests by urllib3, requests and httpx hear the token, wherever the server stalls.
"""

import http.server
import logging
import os
import socket
import threading
from contextlib import contextmanager
from select import select

import httpx
import pytest
import requests
import urllib3
from blocked import FOR_FILES, canceller, ended, is_blocked, under
from clients import CLIENTS, WHOLE, Httpx, Requests, Urllib3, answering
from httpcore._sync import connection_pool
from interrupted import in_child
from servers import certificate, full, read_request, refusing, served
from staging import start, until

from fastpool import Cancelled, CancelToken, TaskGroup, shield, timeout, use_token
from fastpool.blocking import _sockets
from fastpool.blocking.with_httpx import HTTPTransport
from fastpool.blocking.with_requests import HTTPAdapter
from fastpool.blocking.with_urllib3 import PoolManager, ProxyManager

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 3600\r\n\r\n"

STALLS = {
    "before the headers": b"",
    "headers": b"HTTP/1.1 200 OK\r\nContent-Le",
    "before the body": HEADERS,
    "body": HEADERS + b"some",
    "endless": ENDLESS + b"some",
    "chunk": CHUNKED + b"4\r\nsome\r\n",
    "in a chunk": CHUNKED + b"8\r\nsome",
}

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

each_client = pytest.mark.parametrize("make", CLIENTS, ids=lambda make: make.name)
plain_and_tls = pytest.mark.parametrize("secure", [False, True], ids=["", "tls"])


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """pytest would keep what is logged, with the errors in it, and their connections."""
    monkeypatch.setattr(logging.getLogger("urllib3.connectionpool"), "disabled", True)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Whatever proxy the machine uses, a test uses none."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def cancel_once(ready, fn, *args, among=FOR_FILES):
    """
    Call a function in a thread under a token, and cancel that once the thread is blocked, and has
    come as far as `ready()` says.

    Returns:
        What the function returned or raised.
    """
    token = CancelToken()
    thread, outcome = under(token, fn, *args)
    until(lambda: outcome or (ready() and is_blocked(thread.native_id, among)))
    assert not outcome, outcome
    token.cancel("enough")
    return ended(thread, outcome)


def session_of(adapter):
    session = requests.Session()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def read_streamed(client, url):
    with client.stream(url) as pieces:
        return b"".join(pieces)


# --- Where a server stalls ------------------------------------------------------------------------


@each_client
@plain_and_tls
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("said", STALLS.values(), ids=STALLS.keys())
def test_stalled_answer_is_left_at_a_cancel(make, secure, stream, said):
    """
    Nothing cut short gets out, nothing is asked again, and the client works on.
    """
    with answering(said, secure=secure) as (url, asked), make() as client:
        read = (lambda: read_streamed(client, url)) if stream else (lambda: client.get(url))
        outcome = cancel_once(lambda: asked, read)

        assert type(outcome) is Cancelled
        assert outcome.reason == "enough"
        assert len(asked) == 1
        assert client.get(url) == b"whole"
        assert len(asked) == 2


@each_client
def test_stalled_connecting_is_left_at_a_cancel(make):
    """
    The listener's queue is full, so the connection stays pending.
    """
    with full(socket.AF_INET, ("127.0.0.1", 0)) as (host, port), make() as client:
        outcome = cancel_once(lambda: True, client.get, f"http://{host}:{port}/")

    assert type(outcome) is Cancelled


@each_client
def test_stalled_handshake_is_left_at_a_cancel(make):
    """
    The server takes the connection, and never answers the client's hello.
    """
    said = []
    hearing = served(lambda connection: said.append(connection.recv(10)))
    with hearing as (host, port), make() as client:
        outcome = cancel_once(lambda: said, client.get, f"https://{host}:{port}/")

        assert type(outcome) is Cancelled
        assert len(said) == 1


@each_client
@plain_and_tls
@pytest.mark.parametrize("pieces", [1, 20])
def test_stalled_sending_is_left_at_a_cancel(make, secure, pieces):
    """
    A server that does not read lets nobody finish sending.
    """
    begun = []

    def talk(connection):
        if secure:
            connection = certificate()[0].wrap_socket(connection, server_side=True)
            kept.append(connection)
        begun.append(connection.recv(10))

    kept = []
    piece = bytes(20_000_000 // pieces)
    with served(talk) as (host, port), make() as client:
        data = piece if pieces == 1 else (piece for _ in range(pieces))
        url = f"http{'s' * secure}://{host}:{port}/"
        outcome = cancel_once(lambda: begun, client.post, url, data)

        assert type(outcome) is Cancelled
        assert len(begun) == 1
    for connection in kept:
        connection.close()


@each_client
def test_stalled_answer_after_a_redirect_is_left_at_a_cancel(make):
    """
    The connection that the redirect leads to hears the token as the first did.
    """
    with answering(HEADERS + b"some") as (there, asked_there):
        moved = f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {there}\r\n\r\n".encode()
        with answering(moved) as (here, asked_here), make() as client:
            outcome = cancel_once(lambda: asked_there, client.get, here)

            assert type(outcome) is Cancelled
            assert (len(asked_here), len(asked_there)) == (1, 1)


@each_client
def test_stalled_body_of_a_redirect_is_left_at_a_cancel(make):
    """
    The clients read it to its end before they go on.
    """
    moved = b"HTTP/1.1 302 Found\r\nContent-Length: 9\r\nLocation: /there\r\n\r\nsome"
    with answering(moved) as (url, asked), make() as client:
        outcome = cancel_once(lambda: asked, client.get, url)

        assert type(outcome) is Cancelled
        assert len(asked) == 1


@each_client
@pytest.mark.parametrize("said", [b"", HEADERS + b"some"], ids=["headers", "body"])
def test_stalled_answer_on_a_kept_connection_is_left_at_a_cancel(make, said):
    """
    One that has served a request before hears the token of the next.
    """
    asked = []

    def talk(connection):
        for answer in (WHOLE.replace(b"close", b"keep-alive"), said):
            asked.append(read_request(connection))
            connection.sendall(answer)

    with served(talk) as (host, port), make() as client:
        url = f"http://{host}:{port}/"
        assert client.get(url) == b"whole"
        outcome = cancel_once(lambda: len(asked) == 2, client.get, url)

    assert type(outcome) is Cancelled
    assert len(asked) == 2


@each_client
def test_answer_that_stalls_in_a_shield_is_not_left(make):
    """
    What must not be cancelled hears nothing.
    """
    going_on = threading.Event()
    asked = []

    def talk(connection):
        asked.append(read_request(connection))
        going_on.wait(timeout=50)
        connection.sendall(WHOLE)

    def shielded():
        with shield():
            return client.get(f"http://{host}:{port}/")

    with served(talk) as (host, port), make() as client:
        token = CancelToken()
        thread, outcome = under(token, shielded)
        until(lambda: asked and is_blocked(thread.native_id))
        token.cancel()
        going_on.set()

        assert ended(thread, outcome) == b"whole"


@each_client
@pytest.mark.parametrize("stage", ["handshake", "answer"])
def test_request_cut_short_by_a_timeout_raises_it(make, stage):
    """
    The scope's `TimeoutError`, and not the library's.
    """
    silent = served(lambda connection: connection.recv(10))
    with silent as (host, port), make() as client:
        url = f"http{'s' * (stage == 'handshake')}://{host}:{port}/"
        with pytest.raises(TimeoutError), timeout(0.05):
            client.get(url)


@each_client
def test_set_token_requests_nothing(make):
    """
    No connection is made.
    """
    with answering() as (url, asked), make() as client, use_token(CancelToken(timeout=0)):
        with pytest.raises(Cancelled):
            client.get(url)

        assert not asked


@each_client
@plain_and_tls
def test_cancel_right_after_connecting_leaves_no_socket(make, secure, monkeypatch):
    """
    One that nobody has been given yet is closed, and not left to the garbage collector.
    """

    def connects(*args, **options):
        made.append(real(*args, **options))
        token.cancel()
        return made[-1]

    real = _sockets._connect_to
    made, errors = [], []
    token = CancelToken()
    monkeypatch.setattr(_sockets, "_connect_to", connects)
    with answering(secure=secure) as (url, asked), make() as client:
        with use_token(token), pytest.raises(Cancelled) as error:
            client.get(url)
        errors.append(error)  # and its traceback

        assert [sock.fileno() for sock in made] == [-1]
        assert not asked


# --- Pools and retries ----------------------------------------------------------------------------


@each_client
def test_waiting_for_a_connection_is_left_at_a_cancel(make):
    """
    The pool's only one is another's; when that gives it back, the pool has it, and no more.
    """
    with answering(HEADERS + b"s") as (url, asked), make(single=True) as client:
        with client.stream(url) as pieces:
            assert next(iter(pieces)) == b"s"
            for _ in range(3):
                outcome = cancel_once(lambda: True, client.get, url, among=None)
                assert type(outcome) is Cancelled
            assert len(asked) == 1
        for _ in range(3):
            assert client.get(url) == b"whole"
        with client.stream(url):
            assert type(cancel_once(lambda: True, client.get, url, among=None)) is Cancelled


def test_connection_that_comes_as_its_request_is_left_is_not_lost(monkeypatch):
    """
    httpx makes one for a request that waits; step by step: that is woken by its cancel, the
    connection in use ends, and the other is made before the request is off the list.
    """

    def wait(self, timeout=None):
        try:
            return real(self, timeout)
        except AssertionError:
            first.close()
            assert self.connection is not None
            raise

    real = connection_pool.PoolRequest.wait_for_connection
    monkeypatch.setattr(connection_pool.PoolRequest, "wait_for_connection", wait)
    with answering(HEADERS + b"s") as (url, _), Httpx(single=True) as client:
        first = client.own.send(client.own.build_request("GET", url), stream=True)
        outcome = cancel_once(lambda: True, client.get, url, among=None)

        assert type(outcome) is Cancelled
        assert ended(*start(client.get, url)) == b"whole"


@pytest.mark.parametrize("make", [Urllib3, Requests], ids=lambda make: make.name)
@pytest.mark.parametrize(
    ("answers", "retries"),
    [
        ([BUSY], urllib3.Retry(5, status_forcelist=[503])),
        ([None] * 2, urllib3.Retry(5, backoff_factor=3600)),
    ],
    ids=["retry-after", "backoff"],
)
def test_pause_before_a_retry_is_left_at_a_cancel(make, answers, retries):
    """
    And the request is not made again.
    """
    with answering(*answers) as (url, asked), make(retries=retries) as client:
        outcome = cancel_once(lambda: len(asked) == len(answers), client.get, url, among=None)

        assert type(outcome) is Cancelled
        assert len(asked) == len(answers)
        assert client.get(url) == b"whole"


def test_pause_before_a_retry_of_httpx_is_left_at_a_cancel():
    """
    It tries again to connect, after pauses that grow.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Httpx(retries=100) as client:
        outcome = cancel_once(lambda: True, client.get, f"http://127.0.0.1:{port}/", among=None)

    assert type(outcome) is Cancelled


def test_retry_that_sleeps_in_its_own_way_keeps_it():
    """
    A subclass of a user's is what it was, but for the pauses it does not make itself.
    """

    class Own(urllib3.Retry):
        def sleep_for_retry(self, response):
            slept.append(type(self))
            return True

    slept = []
    retries = Own(5, status_forcelist=[503])
    with answering(BUSY) as (url, _), Urllib3(retries=retries) as client:
        assert client.get(url) == b"whole"

    assert len(slept) == 1
    assert issubclass(slept[0], Own)
    assert type(retries) is Own


@pytest.mark.parametrize("make", [Urllib3, Requests], ids=lambda make: make.name)
def test_failing_request_is_still_made_again(make):
    """
    Retries do what they are for, where nothing was cancelled.
    """
    with answering(None, None) as (url, asked), make() as client, use_token(CancelToken()):
        assert client.get(url) == b"whole"
        assert len(asked) == 3


def test_failing_request_raises_as_its_library_does():
    """
    Nobody there, nobody trusted, no time, a body that is too short.
    """
    short = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nsho"

    def close(connection):
        with connection:
            read_request(connection)
            connection.sendall(short)

    with (
        use_token(CancelToken()),
        served(close) as (host, port),
        answering(*[b""] * 3) as (slow, _),
        refusing() as (_, port_of_nobody),
    ):
        nobody = f"http://127.0.0.1:{port_of_nobody}/"
        ending = f"http://{host}:{port}/"
        with PoolManager(retries=False) as ours:
            with pytest.raises(urllib3.exceptions.NewConnectionError, match="refused"):
                ours.request("GET", nobody)
            with pytest.raises(urllib3.exceptions.ReadTimeoutError):
                ours.request("GET", slow, timeout=urllib3.Timeout(connect=50, read=0.05))
            with pytest.raises(urllib3.exceptions.ProtocolError):
                ours.request("GET", ending)
            with pytest.raises(urllib3.exceptions.NameResolutionError):
                ours.request("GET", "http://nowhere.invalid/")
        with session_of(HTTPAdapter()) as session:
            with pytest.raises(requests.ConnectionError, match="refused"):
                session.get(nobody)
            with pytest.raises(requests.Timeout):
                session.get(slow, timeout=(50, 0.05))
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                session.get(ending)
        with httpx.Client(transport=HTTPTransport(), timeout=None) as client:
            with pytest.raises(httpx.ConnectError, match="refused"):
                client.get(nobody)
            with pytest.raises(httpx.ReadTimeout):
                client.get(slow, timeout=httpx.Timeout(50, read=0.05))
            with pytest.raises(httpx.RemoteProtocolError):
                client.get(ending)
    with full(socket.AF_INET, ("127.0.0.1", 0)) as (host, port):
        url = f"http://{host}:{port}/"
        with PoolManager() as ours, pytest.raises(urllib3.exceptions.ConnectTimeoutError):
            ours.request("GET", url, timeout=0.05, retries=False)
        with session_of(HTTPAdapter()) as session, pytest.raises(requests.ConnectTimeout):
            session.get(url, timeout=0.05)
        httpx_client = httpx.Client(transport=HTTPTransport())
        with httpx_client as client, pytest.raises(httpx.ConnectTimeout):
            client.get(url, timeout=0.05)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda url: PoolManager(retries=False).request("GET", url), urllib3.exceptions.SSLError),
        (lambda url: session_of(HTTPAdapter()).get(url), requests.exceptions.SSLError),
        (
            lambda url: httpx.Client(transport=HTTPTransport(), timeout=None).get(url),
            httpx.ConnectError,
        ),
    ],
    ids=["urllib3", "requests", "httpx"],
)
def test_certificate_that_nobody_trusts_is_refused(ask, error):
    """
    A handshake that fails raises what the library makes of it.
    """
    with answering(secure=True) as (url, asked), use_token(CancelToken()):
        with pytest.raises(error, match="CERTIFICATE"):
            ask(url)

        assert not asked


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request on a connection that is kept."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"whole")

    def log_message(self, *args):
        """Say nothing."""


@contextmanager
def keeping():
    """The URL of a server that keeps connections, and how many it was asked for."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = False
        made = 0

        def get_request(self):
            self.made += 1
            return super().get_request()

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", lambda: server.made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@each_client
def test_cancel_about_the_end_of_a_call_hits_nobody_else(make, hasty):
    """
    Either that call raises, or it has what it asked for; the next one always has.
    """
    came = {"whole": 0, "cancelled": 0}
    meeting = threading.Barrier(2, timeout=50)
    tokens = [CancelToken() for _ in range(300)]
    other = canceller(tokens, meeting)
    with keeping() as (url, made), make(single=True) as client:
        other.start()
        for token in tokens:
            meeting.wait()
            try:
                with use_token(token):
                    assert client.get(url) == b"whole"
                came["whole"] += 1
            except Cancelled:
                came["cancelled"] += 1
            assert client.get(url) == b"whole"
            meeting.wait()
            assert client.get(url) == b"whole"
        other.join()
        connections = made()

    assert sum(came.values()) == len(tokens)
    assert connections <= 1 + came["cancelled"]


@each_client
def test_connection_that_is_kept_outlives_the_token_it_was_made_under(make):
    """
    A token has a hold on it for as long as a call under it takes, and no longer.
    """
    token = CancelToken()
    with keeping() as (url, made), make(single=True) as client:
        with use_token(token):
            assert client.get(url) == b"whole"
        token.cancel()
        assert client.get(url) == b"whole"
        assert made() == 1


@each_client
def test_streamed_answer_hears_the_token_of_who_reads(make):
    """
    Each read acts on the token that is current there.
    """
    asked, reading = CancelToken(), CancelToken()
    with answering(HEADERS + b"so") as (url, _), make() as client:

        def read():
            with client.stream(url) as pieces:
                pieces = iter(pieces)
                with use_token(reading):
                    asked.cancel()
                    seen.append(next(pieces))
                    seen.append(next(pieces))
                    next(pieces)

        seen = []
        thread, outcome = under(asked, read)
        until(lambda: outcome or (len(seen) == 2 and is_blocked(thread.native_id)))
        assert not outcome, outcome
        reading.cancel("enough")

        assert type(ended(thread, outcome)) is Cancelled
        assert outcome[0].reason == "enough"


# --- Proxies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["urllib3", "requests", "httpx"])
@pytest.mark.parametrize("target", ["http", "https"])
def test_stalled_proxy_is_left_at_a_cancel(client, target):
    """
    One that does not answer, nor the request for a tunnel.
    """
    url = f"{target}://example.invalid/"
    with answering(b"HTTP/1.1 200 Connec") as (proxy, asked):

        def ask():
            if client == "urllib3":
                with ProxyManager(proxy) as ours:
                    return ours.request("GET", url)
            if client == "requests":
                with requests.Session() as session:
                    session.mount(f"{target}://", HTTPAdapter())
                    return session.get(url, proxies={target: proxy})
            with httpx.Client(transport=HTTPTransport(proxy=proxy), timeout=None) as ours:
                return ours.get(url)

        outcome = cancel_once(lambda: asked, ask)

        assert type(outcome) is Cancelled
        assert len(asked) == 1


@contextmanager
def tunnelling(target):
    """The URL of a proxy that speaks TLS, and hands on what it is sent to the target."""

    def talk(connection):
        outer = certificate()[0].wrap_socket(connection, server_side=True)
        with outer, socket.create_connection(target) as inner:
            read_request(outer)
            outer.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            while True:
                for source in [outer] if outer.pending() else select([outer, inner], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    (inner if source is outer else outer).sendall(data)

    with served(talk) as (host, port):
        yield f"https://{host}:{port}/"


@pytest.mark.parametrize("client", ["urllib3", "httpx"])
@pytest.mark.parametrize("said", [None, b"", HEADERS + b"some"], ids=["tls", "headers", "body"])
def test_stalled_answer_by_tls_within_tls_is_left_at_a_cancel(client, said):
    """
    A proxy that is spoken to by TLS, and a server behind it.
    """
    trusted = certificate()[1]

    def ask():
        if client == "urllib3":
            with ProxyManager(proxy, ssl_context=trusted, proxy_ssl_context=trusted) as ours:
                return ours.request("GET", url)
        through = httpx.Proxy(proxy, ssl_context=trusted)
        with httpx.Client(transport=HTTPTransport(trusted, proxy=through), timeout=None) as ours:
            return ours.get(url)

    def talk(connection):
        if said is None:
            asked.append(connection.recv(10))
            return
        connection = certificate()[0].wrap_socket(connection, server_side=True)
        kept.append(connection)
        asked.append(read_request(connection))
        connection.sendall(said)

    asked, kept = [], []
    with served(talk) as target, tunnelling(target) as proxy:
        url = f"https://{target[0]}:{target[1]}/"
        outcome = cancel_once(lambda: asked, ask)
    for connection in kept:
        connection.close()

    assert type(outcome) is Cancelled
    assert len(asked) == 1


# --- Groups and Ctrl-C ----------------------------------------------------------------------------


@each_client
@pytest.mark.parametrize("said", [b"", HEADERS + b"some"], ids=["headers", "body"])
def test_failure_of_a_sibling_ends_a_request(make, said):
    """
    The group raises the failure, and the task that waited for the server is cancelled.
    """

    def fail():
        until(lambda: asked)
        raise ValueError("bad header")

    with answering(said) as (url, asked), make() as client:
        with pytest.raises(ValueError, match="bad header"), TaskGroup(2) as group:
            task = group.submit(client.get, url)
            group.submit(fail)

        assert task.cancelled()
        assert client.get(url) == b"whole"


def asks_by_urllib3(group, ready):
    ask_in_the_body(Urllib3, ready)


def asks_by_requests(group, ready):
    ask_in_the_body(Requests, ready)


def asks_by_httpx(group, ready):
    ask_in_the_body(Httpx, ready)


def ask_in_the_body(make, ready):
    def talk(connection):
        read_request(connection)
        connection.sendall(HEADERS + b"some")
        ready()

    with served(talk) as (host, port), make() as client:
        client.get(f"http://{host}:{port}/")


@pytest.mark.parametrize("body", [asks_by_urllib3, asks_by_requests, asks_by_httpx])
def test_interrupt_ends_a_request_in_the_body(body):
    """
    In a program of its own, which ends as programs do.
    """
    assert in_child(body) == "interrupted\n"


def test_other_peoples_clients_are_told_of_ours():
    """
    Their connections are shared, so nothing of theirs can be interrupted.
    """
    own = [urllib3.PoolManager(), requests.Session(), requests.Response()]
    with httpx.Client() as client:
        for what in [*own, client, httpx.Response(200), urllib3.HTTPResponse()]:
            with pytest.raises(
                TypeError, match=r"use .*fastpool\.blocking\.with_.* hears? the token"
            ):
                CancelToken().interrupts(what)


def test_clients_of_ours_need_no_interrupts():
    """
    Nobody is told to use what is in use.
    """
    for what in [PoolManager(), HTTPAdapter(), HTTPTransport(verify=False)]:
        with pytest.raises(TypeError, match="; it hears the current token already"):
            CancelToken().interrupts(what)
