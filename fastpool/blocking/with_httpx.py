"""
httpx, its clients hearing the current token.

Give its transport to your client. Run with httpx 0.28 and httpcore 1.0 on Linux.
"""

# Where httpx is not installed, nothing here has a type.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpcore
import httpx
from httpcore._backends.sync import SyncStream
from httpx._config import DEFAULT_LIMITS

from fastpool import _wakers
from fastpool._callbacks import Interrupts
from fastpool._scope import current_token, sleep
from fastpool.blocking import _sockets
from fastpool.blocking._elsewhere import sit_in
from fastpool.blocking._http import has_something

__all__ = ["HTTPTransport"]

R = TypeVar("R")

NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # httpcore sets it too


class HTTPTransport(httpx.HTTPTransport):
    """
    A transport of httpx by which a client's requests hear the current token.

    Write `httpx.Client(transport=HTTPTransport())`.

    Waiting for a free connection, connecting, the TLS handshake, sending, waiting for the
    headers and reading the body, at once or piece by piece, are interrupted by the token that is
    current in the thread which does it; so are the pauses between retries. Looking up the host's
    name is not.

    A connection that was interrupted is closed, and no request is made again after a cancel.
    Connections that wait in the pool, or serve other threads, are left alone. It speaks
    HTTP/1.1 only: by HTTP/2 requests share a connection, and a cancel would end those of others.

    Args:
        verify: As for `httpx.HTTPTransport`, like all the rest. A client that is given a
            transport leaves all this to it.
        cert: The client's certificate.
        trust_env: Whether the environment may name trusted certificates.
        limits: How many connections, and for how long.
        proxy: The proxy to use; SOCKS proxies were not run.
        uds: The path of a Unix socket to connect to, whatever the URL.
        local_address: The address to connect from.
        retries: How often to try again to connect.
        socket_options: What `setsockopt` is called with before connecting.

    Raises:
        Cancelled: From requests and reads, as soon as the token is set. A response that was
            cut short is never taken for a whole one.

    Threads:
        Safe from any thread, as httpx's.

    Source:
        `httpx.HTTPTransport`. Run with httpx 0.28 and httpcore 1.0 on Linux.
    """

    def __init__(
        self,
        verify: ssl.SSLContext | str | bool = True,
        cert: str | tuple[str, str] | tuple[str, str, str] | None = None,
        trust_env: bool = True,
        *,
        limits: httpx.Limits = DEFAULT_LIMITS,
        proxy: httpx.Proxy | httpx.URL | str | None = None,
        uds: str | None = None,
        local_address: str | None = None,
        retries: int = 0,
        socket_options: Iterable[Any] | None = None,  # Any: as httpx has them, in several forms
    ) -> None:
        super().__init__(
            verify,
            cert,
            trust_env,
            limits=limits,
            proxy=proxy,
            uds=uds,
            local_address=local_address,
            retries=retries,
            socket_options=socket_options,
        )
        self._pool._network_backend = _Backend()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        # Every step is interrupted by itself; this is for who waits for a connection.
        token = current_token()
        wake = functools.partial(_wake, self._pool, request.stream)
        answered: list[httpx.Response] = []
        try:
            with Interrupts(token, wake, slow=True):
                answered.append(super().handle_request(request))
        except BaseException:
            for response in answered:
                response.close()
            _drop_lost(self._pool)
            raise
        return answered[0]


def _wake(pool: Any, stream: object) -> object:  # Any: httpcore's, of several kinds
    """Have the request with that body wait no longer for a connection; it fails then."""
    for waiting in list(pool._requests):
        if waiting.request.stream is stream and waiting.connection is None:
            waiting._connection_acquired.set()
    return _wakers.AGAIN  # it may not have begun to wait


def _drop_lost(pool: Any) -> None:  # Any: see above
    """
    Take out connections that the pool made for a request which was being left by then.

    Nobody would ever open them, and they would count among those in use.
    """
    with pool._optional_thread_lock:
        taken = [waiting.connection for waiting in pool._requests]
        for connection in list(pool._connections):
            if connection not in taken and not (connection.is_idle() or connection.is_closed()):
                pool._connections.remove(connection)
        closing = pool._assign_requests_to_connections()
    pool._close_connections(closing)


class _Backend(httpcore.SyncBackend):
    """Connects under the current token."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,  # Any: see `HTTPTransport`
    ) -> httpcore.NetworkStream:
        source = None if local_address is None else (local_address, 0)
        options = [*(socket_options or ()), NO_DELAY]
        return _stream_of(lambda: _sockets.connect_tcp((host, port), timeout, source, options))

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[Any] | None = None,  # Any: see `HTTPTransport`
    ) -> httpcore.NetworkStream:
        return _stream_of(lambda: _sockets.connect(path, timeout))

    def sleep(self, seconds: float) -> None:
        sleep(seconds)


def _stream_of(connect: Callable[[], socket.socket]) -> httpcore.NetworkStream:
    try:
        return _Stream(SyncStream(connect()))
    except TimeoutError as error:
        raise httpcore.ConnectTimeout(error) from error
    except OSError as error:
        raise httpcore.ConnectError(error) from error


class _Stream(httpcore.NetworkStream):
    """A stream of httpcore's that is read and written under the current token."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream
        self._sock: socket.socket = stream.get_extra_info("socket")

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        cutting = current_token().interrupts(self._sock)
        with cutting:
            if has_something(self._sock):
                return self._stream.read(max_bytes, timeout)
            return sit_in(cutting.interrupt, self._stream.read, max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        cutting = current_token().interrupts(self._sock)
        with cutting:
            sit_in(cutting.interrupt, self._stream.write, buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        made: list[httpcore.NetworkStream] = []

        def start() -> None:
            made.append(self._stream.start_tls(ssl_context, server_hostname, timeout))

        cutting = _sockets.interruptible(self._sock)
        try:
            with cutting:
                sit_in(cutting.interrupt, start)
        except BaseException:
            for stream in [*made, self]:
                stream.close()
            raise
        return _Stream(made[0])

    def get_extra_info(self, info: str) -> Any:  # Any: as httpcore has it
        return self._stream.get_extra_info(info)
