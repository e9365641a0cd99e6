"""
Redis by redis-py: connecting, sending, and waiting for an answer or a message.

Run with redis 8.1.0, by TCP, TLS and Unix sockets, on Linux.
"""

from __future__ import annotations

import inspect
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from fastpool import _scope
from fastpool._scope import current_token
from fastpool._token import CancelToken
from fastpool.blocking._elsewhere import call_out, sit_in
from fastpool.blocking._shutdown import shut_down
from fastpool.blocking._sockets import connect, interruptible

__all__ = ["redis_client"]

C = TypeVar("C")
P = ParamSpec("P")
R = TypeVar("R")


def redis_client(client: C) -> C:
    """
    Have all that a redis-py client waits for interrupted by the current token of who calls.

    Connecting, sending and waiting for the answer are, in commands, pipelines, transactions and
    `pubsub()`, and so is the pause before a retry; after a cancel nothing is retried. The
    connection that the call has used is closed, and no other; the client opens a new one when it
    wants one. Whether the server has carried out a command whose answer was not awaited is not
    known: an item may have been popped, and is lost then.

    Args:
        client: A `redis.Redis` that takes its connections from a pool. It is changed, and so is
            every client of the same pool; a connection that the pool has idle is closed.

    Returns:
        The same client.

    Raises:
        TypeError: If it has no such pool, or a connection of its own (`single_connection_client`).

    Threads:
        To be called before the client is used; then any, as the client.

    Source:
        Run with redis 8.1.0 on Linux. Looking up the server's name hears nothing, and neither
        does waiting for a place in a `BlockingConnectionPool`.
    """
    pool: Any = getattr(client, "connection_pool", None)  # Any: its type is not imported here
    kind: Any = getattr(pool, "connection_class", None)
    send = getattr(kind, "send_packed_command", None)
    if send is None or inspect.iscoroutinefunction(send):
        raise TypeError(f"redis_client() wants a redis.Redis, not {client!r}")
    if getattr(client, "connection", None) is not None:
        raise TypeError(
            "redis_client() wants a client that takes its connections from a pool; "
            "leave out single_connection_client"
        )
    if not issubclass(kind, _Hearing):
        module = {"__module__": kind.__module__}
        pool.connection_class = type(kind.__name__, (_Hearing, kind), module)
        pool.disconnect(inuse_connections=False)
        pool.reset()
    return client


if TYPE_CHECKING:

    class _Connection:
        """What we use of `redis.connection.AbstractConnection` and its kinds."""

        host: str
        port: int
        path: str
        retry: Any  # Any: here and below, what is redis-py's own
        socket_connect_timeout: float | None
        socket_timeout: float | None
        _sock: socket.socket | None

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def _connect(self) -> socket.socket: ...
        def _wrap_socket_with_ssl(self, sock: socket.socket) -> socket.socket: ...
        def can_read(self, timeout: float | None = 0) -> bool: ...
        def disconnect(self) -> None: ...
        def read_response(self, *args: Any, **kwargs: Any) -> Any: ...
        def send_command(self, *args: Any, **kwargs: Any) -> None: ...
        def send_packed_command(self, *args: Any, **kwargs: Any) -> None: ...

else:
    _Connection = object


class _Hearing(_Connection):
    """A connection that is made, sent to and read from under the current token."""

    # The retries are redis-py's, above these methods, and retry what is an `Exception`.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retry._backoff = _Backoff(self.retry._backoff)  # it is a copy, for this connection

    def can_read(self, timeout: float | None = 0) -> bool:
        # Without a timeout it only looks, as the pool does for every command.
        call = call_out if timeout == 0 else self._hear
        return call(super().can_read, timeout)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        return self._hear(super().read_response, *args, **kwargs)

    def send_command(self, *args: Any, **kwargs: Any) -> None:
        if args == ("UNWATCH",) and current_token().cancelled():
            # So a pipeline that watches is left. It gives its connection back to the pool if this
            # succeeds, or fails by an error of redis-py's.
            self.disconnect()
            raise sys.modules["redis"].ConnectionError("closed, since the token is set")
        super().send_command(*args, **kwargs)

    def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        self._hear(super().send_packed_command, *args, **kwargs)

    def _hear(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        token = current_token()
        if token is CancelToken.NEVER:
            return call_out(fn, *args, **kwargs)
        try:
            with token.interrupts(self._cut):
                return sit_in(self._cut, fn, *args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                # Part of a command was sent, or of an answer read, or of a greeting exchanged:
                # whoever has it from the pool next must not meet the rest.
                self.disconnect()
            raise

    def _cut(self) -> None:
        sock = self._sock  # it may be closed, and opened again, meanwhile
        if sock is not None:
            shut_down(sock)

    def _connect(self) -> socket.socket:
        if current_token() is CancelToken.NEVER:
            return call_out(super()._connect)
        if hasattr(self, "path"):
            sock = connect(self.path, self.socket_connect_timeout)
        else:
            sock = connect((self.host, self.port), self.socket_connect_timeout)
            self._keep_alive(sock)
        sock.settimeout(self.socket_timeout)
        return self._secured(sock) if hasattr(self, "_wrap_socket_with_ssl") else sock

    def _keep_alive(self, sock: socket.socket) -> None:
        """What the method of redis-py sets before it connects."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if vars(self)["socket_keepalive"]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in vars(self)["socket_keepalive_options"].items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def _secured(self, sock: socket.socket) -> socket.socket:
        wrapped: list[socket.socket] = []
        cutting = interruptible(sock)
        try:
            with cutting:
                sit_in(cutting.interrupt, lambda: wrapped.append(self._wrap_socket_with_ssl(sock)))
        except BaseException:
            for each in (*wrapped, sock):
                each.close()
            raise
        return wrapped[0]


class _Backoff:
    """A `redis.backoff.AbstractBackoff` that sleeps itself, on the current token."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def reset(self) -> None:
        self._wrapped.reset()

    def compute(self, failures: int) -> float:
        """Seconds that are still to be slept: none."""
        _scope.sleep(self._wrapped.compute(failures))
        return 0.0
