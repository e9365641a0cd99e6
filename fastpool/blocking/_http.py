"""HTTP requests that hear the token, from connecting to the end of the body."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import io
import select
import socket
import ssl
import urllib.request
from collections.abc import Generator, Iterable
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from fastpool._scope import current_token
from fastpool.blocking._elsewhere import call_out, sit_in
from fastpool.blocking._shutdown import shut_down
from fastpool.blocking._sockets import DEFAULT, connect, secure

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Connection", "has_something", "urlopen"]

Data: TypeAlias = bytes | bytearray | memoryview | IO[bytes] | Iterable[bytes]


@contextlib.contextmanager
def urlopen(
    url: str | urllib.request.Request,
    data: Data | None = None,
    timeout: float | None = DEFAULT,
    *,
    context: ssl.SSLContext | None = None,
) -> Generator[http.client.HTTPResponse, None, None]:
    """
    Request a URL in a `with` block, and read the response there.

    Connecting, the TLS handshake, sending, waiting for the headers and reading the body are all
    interrupted by the current token; looking up the host's name is not.
    Redirects are followed and proxies used as `urllib.request.urlopen` does it.

    Args:
        url: Where to, `http` or `https`; or a whole `urllib.request.Request`.
        data: What to send as the body of a POST.
        timeout: Longest wait for the server each time that there is something to wait for, in
            seconds. `None` waits without limit; by default it is `socket.getdefaulttimeout()`.
        context: By what to speak TLS, instead of the default context.

    Returns:
        A context manager, which gives the response and closes it at the end.

    Raises:
        Cancelled: As soon as the token is set; on leaving too, whatever the block did, so that
            nothing cut short gets out.
        urllib.error.HTTPError: If the server says that it failed. Its body can be read, and
            reading it hears the token as well.
        urllib.error.URLError: If there is no connection, or the URL is of another kind.
        TimeoutError: If the time is up while headers or body are awaited.

    Source:
        `urllib.request.urlopen`, but for openers that were installed there. Run on Linux.
    """
    opener = _default_opener() if context is None else _opener(context)
    # Every step below is interrupted by itself; this is for the check on leaving.
    with current_token().interrupts(_leave_alone):
        response: _Response = call_out(opener.open, url, data, timeout)
        with response:
            try:
                yield response
            finally:
                response.reader.cut()  # another thread that reads would hold up the closing


def _leave_alone() -> None:
    """Interrupt nothing."""


def _opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    # Not `build_opener`, which adds what can't be interrupted, as FTP.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        _HTTPHandler(),
        _HTTPSHandler(context=context),
    ):
        opener.add_handler(handler)
    return opener


@functools.cache
def _default_opener() -> urllib.request.OpenerDirector:
    return _opener(None)  # once: to read all the trusted certificates takes milliseconds


class _Reader(io.RawIOBase):
    """Reads from a socket, interrupted by the token of whoever reads."""

    def __init__(self, stream: Any) -> None:  # Any: a `SocketIO`, whose socket no stub knows
        self._stream = stream
        self._sock: socket.socket = stream._sock
        self._is_cut = False

    def cut(self) -> None:
        """End what is read from it, by whichever thread."""
        self._is_cut = True
        shut_down(self._sock)

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        count: int | None
        cutting = current_token().interrupts(self.cut)
        with cutting:
            if has_something(self._sock):
                count = call_out(self._stream.readinto, buffer)
            else:
                count = sit_in(cutting.interrupt, self._stream.readinto, buffer)
        if self._is_cut:
            # By another thread, or before: else it would pass for the end of the body.
            raise ConnectionAbortedError(
                errno.ECONNABORTED, "cut by a cancel, or as its block ended"
            )
        return count

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        number: int = self._stream.fileno()
        return number

    def close(self) -> None:
        super().close()
        self._stream.close()


def has_something(sock: socket.socket) -> bool:
    """Whether there is something to read, for all that one can tell without reading it."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    try:
        return bool(select.select([sock], [], [], 0)[0])
    except (OSError, ValueError):  # closed; or its number is above what `select` can tell of
        return False


class _Response(http.client.HTTPResponse):
    """A response that is read so, whoever reads it, and wherever it has got to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: handed on
        super().__init__(*args, **kwargs)
        self.reader = _Reader(self.fp.detach())
        self.fp = io.BufferedReader(self.reader)


class Connection(http.client.HTTPConnection):
    """A connection that is sent to and read from under the current token."""

    response_class = _Response

    def send(self, data: Any) -> None:  # Any: handed on
        if self.sock is None and self.auto_open:
            self.connect()
        cutting = current_token().interrupts(self)
        with cutting:
            if isinstance(data, bytes):
                sit_in(cutting.interrupt, super().send, data)
            else:  # read from what is the user's own
                call_out(super().send, data)


class _HTTPConnection(Connection):
    """One that is made under the current token, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: handed on
        super().__init__(*args, **kwargs)
        self._create_connection = connect


class _HTTPSConnection(_HTTPConnection, http.client.HTTPSConnection):
    """The same by TLS."""

    if TYPE_CHECKING:
        _context: ssl.SSLContext
        _tunnel_host: str | None

    def connect(self) -> None:
        # What the method above ours does, but for the handshake.
        http.client.HTTPConnection.connect(self)
        self.sock = secure(self.sock, self._context, self._tunnel_host or self.host)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    if TYPE_CHECKING:
        _context: ssl.SSLContext | None

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, req, context=self._context)
