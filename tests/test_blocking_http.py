"""
HTTP requests hear the token, wherever the server stalls; else they are as the standard library's.
"""

import http.client
import http.server
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest
from blocked import cancel_while_blocked, ended, is_blocked, under
from servers import certificate, full, read_request, refusing, served
from staging import start, until

from fastpool import Cancelled, CancelToken, TaskGroup, blocking, current_token, use_token
from fastpool.blocking import _http

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 1000\r\n\r\n"


pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Whatever proxy the machine uses, a test uses none."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield
    _http._default_opener.cache_clear()


@contextmanager
def stall(said, *, secure=False, asked=lambda: None):
    """The address of a server that reads a request, calls that, says so much, and no more."""

    def talk(connection):
        if secure:
            connection = certificate()[0].wrap_socket(connection, server_side=True)
            ending.enter_context(connection)
        read_request(connection)
        asked()
        connection.sendall(said)

    with ExitStack() as ending, served(talk) as address:
        yield address


def url_of(address, *, secure=False):
    return f"http{'s' * secure}://{address[0]}:{address[1]}/"


# --- Where a server stalls ------------------------------------------------------------------------


def read_all(url, **options):
    with blocking.urlopen(url, **options) as response:
        return response.read()


def read_lines(url, **options):
    with blocking.urlopen(url, **options) as response:
        return list(response)


def read_into(url, **options):
    with blocking.urlopen(url, **options) as response:
        while response.readinto(bytearray(100)):
            pass


@pytest.mark.parametrize("timeout", [{}, {"timeout": 50}], ids=["", "timeout"])
@pytest.mark.parametrize("secure", [False, True], ids=["", "tls"])
@pytest.mark.parametrize(
    ("read", "said"),
    [
        (read_all, b""),
        (read_all, b"HTTP/1.1 2"),
        (read_all, b"HTTP/1.1 200 OK\r\nContent-Le"),
        (read_all, HEADERS),
        (read_all, HEADERS + b"some"),
        (read_all, ENDLESS + b"some"),
        (read_all, CHUNKED + b"4\r\nsome\r\n"),
        (read_all, CHUNKED + b"8\r\nsome"),
        (read_lines, ENDLESS + b"one\ntw"),
        (read_into, HEADERS + b"some"),
    ],
    ids=[
        "before the headers",
        "status",
        "headers",
        "before the body",
        "body",
        "endless",
        "chunk",
        "in a chunk",
        "line",
        "into",
    ],
)
def test_stalled_answer_is_left_at_a_cancel(read, said, secure, timeout):
    """
    What has come so far is never taken for the whole.
    """
    context = {"context": certificate()[1]} if secure else {}
    with stall(said, secure=secure) as address:
        url = url_of(address, secure=secure)
        outcome = cancel_while_blocked(lambda: read(url, **context, **timeout))

    assert type(outcome) is Cancelled
    assert outcome.reason == "enough"


def test_stalled_connecting_is_left_at_a_cancel():
    """
    The listener's queue is full, so the connection stays pending.
    """
    with full(socket.AF_INET, ("127.0.0.1", 0)) as address:
        assert type(cancel_while_blocked(lambda: read_all(url_of(address)))) is Cancelled


def test_stalled_handshake_is_left_at_a_cancel():
    """
    The server takes the connection, and never answers the client's hello.
    """
    with served(lambda connection: connection.recv(10)) as address:
        url = url_of(address, secure=True)
        outcome = cancel_while_blocked(lambda: read_all(url, context=certificate()[1]))

    assert type(outcome) is Cancelled


@pytest.mark.parametrize("data", [bytes(20_000_000), [bytes(1_000_000)] * 20])
def test_stalled_sending_is_left_at_a_cancel(data):
    """
    A server that does not read lets nobody finish sending.
    """
    with served(lambda connection: None) as address:
        outcome = cancel_while_blocked(lambda: read_all(url_of(address), data=data))

    assert type(outcome) is Cancelled


def test_stalled_answer_after_a_redirect_is_left_at_a_cancel():
    """
    The connection that the redirect leads to hears the token as the first did.
    """

    def redirect(connection):
        read_request(connection)
        connection.sendall(
            b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n"
            % url_of(there).encode()
        )

    with stall(HEADERS + b"some") as there, served(redirect) as address:
        assert type(cancel_while_blocked(lambda: read_all(url_of(address)))) is Cancelled


def test_stalled_proxy_is_left_at_a_cancel():
    """
    One that does not answer the request for a tunnel.
    """
    with stall(b"HTTP/1.1 200 Connec") as (host, port):
        request = urllib.request.Request("https://example.invalid/")
        request.set_proxy(f"{host}:{port}", "https")

        assert type(cancel_while_blocked(lambda: read_all(request))) is Cancelled


def test_stalled_body_of_an_error_is_left_at_a_cancel():
    """
    An `HTTPError` leaves the block with its response, and that hears the token of who reads it.
    """

    def read():
        try:
            read_all(url_of(address))
        except urllib.error.HTTPError as error:
            with error:
                failed.append(error.code)
                error.read()

    failed = []
    with stall(MISSING + b"some") as address:
        assert type(cancel_while_blocked(read, ready=lambda: failed)) is Cancelled
    assert failed == [404]


def test_response_is_closed_with_its_block():
    """
    There is nothing to be read any more.
    """
    with stall(HEADERS + b"some") as address:
        with blocking.urlopen(url_of(address)) as response:
            pass

        assert response.closed


ENDS = pytest.mark.parametrize("said", [HEADERS + b"some", ENDLESS + b"some"], ids=["len", "end"])


@ENDS
def test_block_that_is_left_ends_what_another_thread_reads(said):
    """
    A thread without the token; to it the connection is broken, and the body not at its end.
    """
    token = CancelToken()
    readers = []

    def block():
        with blocking.urlopen(url_of(address)) as response:
            readers.append(start(response.read))
            blocking.wait(readers[0][0])

    with stall(said) as address:
        thread, outcome = under(token, block)
        until(lambda: outcome or (readers and is_blocked(readers[0][0].native_id)))
        token.cancel()

        assert type(ended(thread, outcome)) is Cancelled
        assert type(ended(*readers[0])) is ConnectionAbortedError
    assert not token._callbacks()


@ENDS
def test_answer_that_another_token_has_cut_is_not_taken_for_a_whole_one(said):
    """
    A thread that has one of its own reads in the block; whoever reads on is told.
    """
    outer, inner = CancelToken(), CancelToken()
    asking = stall(said)
    with asking as address, use_token(outer), blocking.urlopen(url_of(address)) as response:
        reader = under(inner, response.read)
        until(lambda: is_blocked(reader[0].native_id))
        inner.cancel()

        assert type(ended(*reader)) is Cancelled
        with pytest.raises(ConnectionAbortedError):
            response.read()
    assert not outer.cancelled()
    assert not outer._callbacks()
    assert not inner._callbacks()


def test_cancel_in_the_block_is_raised_on_leaving():
    """
    Also when the whole body is there, and when the block handles what its read raised.
    """
    token = CancelToken()
    with stall(HEADERS + bytes(1000)) as address, use_token(token):
        opening = blocking.urlopen(url_of(address))
        with pytest.raises(Cancelled), opening as response:
            body = response.read()
            token.cancel()

    assert len(body) == 1000


def test_set_token_requests_nothing():
    """
    No connection is made.
    """
    asked = []
    with served(asked.append) as address, use_token(CancelToken(timeout=0)):
        url = url_of(address)
        with pytest.raises(Cancelled):
            read_all(url)

    assert not asked


# --- As the standard library's --------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    def do_GET(self):
        size = int(self.headers.get("Content-Length", 0))
        body = f"{self.command} {self.path} {self.rfile.read(size)!r}".encode()
        status = {"/missing": 404, "/moved": 302}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/there")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        """Say nothing."""


@contextmanager
def running(*, secure=False):
    """The address of a server that answers."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    if secure:
        server.socket = certificate()[0].wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield url_of(server.server_address, secure=secure)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("secure", [False, True], ids=["", "tls"])
@pytest.mark.parametrize("path", ["", "moved", "a?b=c"])
@pytest.mark.parametrize("data", [None, b"data", [b"da", b"ta"]])
def test_answer_is_that_of_the_standard_library(secure, path, data):
    """
    Redirects are followed, and data is sent.
    """

    def ask(opening):
        with opening as response:
            return response.status, response.url, response.read()

    if isinstance(data, list):
        data = {"data": data, "headers": {"Content-Length": "4"}}
    else:
        data = {"data": data}
    options = {"context": certificate()[1]} if secure else {}
    with running(secure=secure) as url, use_token(CancelToken()):
        mine = ask(blocking.urlopen(urllib.request.Request(url + path, **data), **options))
        theirs = ask(urllib.request.urlopen(urllib.request.Request(url + path, **data), **options))

    assert mine == theirs


def test_error_of_the_server_is_raised_with_its_body():
    """
    The body can be read after the block.
    """
    with running() as url:
        with pytest.raises(urllib.error.HTTPError) as caught, blocking.urlopen(url + "missing"):
            raise AssertionError("entered")
        with caught.value as error:
            assert (error.code, error.read()) == (404, b"GET /missing b''")


def test_failing_request_raises_as_in_the_standard_library():
    """
    Nobody there, nobody trusted, no time, no such kind of URL.
    """
    with refusing() as nobody, pytest.raises(urllib.error.URLError, match="refused"):
        read_all(url_of(nobody))
    with running(secure=True) as url, pytest.raises(urllib.error.URLError, match="CERTIFICATE"):
        read_all(url)
    with stall(b"") as address, pytest.raises(TimeoutError):
        read_all(url_of(address), timeout=0.05)
    with full(socket.AF_INET, ("127.0.0.1", 0)) as address:
        url = url_of(address)
        with pytest.raises(urllib.error.URLError, match="timed out"):
            read_all(url, timeout=0.05)
    for url in ("ftp://127.0.0.1/", "file:///etc/hostname"):
        with pytest.raises(urllib.error.URLError, match="unknown url type"):
            read_all(url)


def test_body_that_is_too_short_is_told():
    """
    A server that closes early is no cancel.
    """

    def talk(connection):
        with connection:
            read_request(connection)
            connection.sendall(HEADERS + b"some")

    with served(talk) as address, pytest.raises(http.client.IncompleteRead):
        read_all(url_of(address))


def test_proxy_of_the_environment_is_used(monkeypatch):
    """
    As the standard library does it.
    """
    with running() as url:
        monkeypatch.setenv("http_proxy", url)

        assert read_all("http://example.invalid/x") == b"GET http://example.invalid/x b''"


# --- Other people's connections and responses -----------------------------------------------------


def of_a_response(address):
    response = urllib.request.urlopen(url_of(address))
    with response, current_token().interrupts(response):
        return response.read()


def of_an_error(address):
    try:
        urllib.request.urlopen(url_of(address))
    except urllib.error.HTTPError as error:
        with error, current_token().interrupts(error):
            return error.read()


def of_a_connection(address):
    connection = http.client.HTTPConnection(*address)
    try:
        connection.connect()
        with current_token().interrupts(connection):
            connection.request("GET", "/")
            return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("read", "said"),
    [(of_a_response, HEADERS), (of_an_error, MISSING), (of_a_connection, b""),
     (of_a_connection, HEADERS)],
    ids=["response", "error", "connection", "kept"],
)  # fmt: skip
def test_interrupts_knows_the_standard_librarys(read, said):
    """
    Responses, errors and connections lead to their socket.
    """
    with stall(said) as address:
        outcome = cancel_while_blocked(lambda: read(address))

    assert type(outcome) is Cancelled


def test_cancel_of_what_has_no_socket_raises_nothing(unraised):
    """
    A response that was read, a connection that was not made.
    """
    with running() as url, urllib.request.urlopen(url) as response:
        response.read()
        for what in (response, http.client.HTTPConnection("localhost")):
            token = CancelToken()
            with pytest.raises(Cancelled), token.interrupts(what):
                token.cancel()

    assert not unraised


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", HEADERS + b"some"], ids=["headers", "body"])
def test_interrupt_ends_a_request_in_the_body(said):
    """
    It is raised there and then, and no connection is left behind.
    """
    asked = threading.Event()

    def ctrl_c():
        until(lambda: asked.is_set() and is_blocked(os.getpid(), None))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ctrl_c)
    stalling = stall(said, asked=asked.set)
    with stalling as address, pytest.raises(KeyboardInterrupt), TaskGroup(1):
        thread.start()
        read_all(url_of(address))
    thread.join()
