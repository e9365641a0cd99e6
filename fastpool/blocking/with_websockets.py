"""
websockets, its connections hearing the current token.

Use `connect` in place of that of `websockets.sync.client`. Run with websockets 17.4 on Linux.
"""

# Where websockets is not installed, nothing here has a type.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import websockets.sync.client
from websockets.uri import parse_uri

from fastpool._errors import is_a
from fastpool._scope import current_token, use_token
from fastpool._token import CancelToken
from fastpool.blocking import _sockets
from fastpool.blocking._elsewhere import sit_in
from fastpool.blocking._shutdown import drop_websocket
from fastpool.exceptions import Cancelled

__all__ = ["ClientConnection", "connect"]

P = ParamSpec("P")
R = TypeVar("R")

END = object()  # of an iterator

# What leaves a block of `interrupts` as it is, too.
PASSING = (Cancelled, KeyboardInterrupt, SystemExit, GeneratorExit)


class ClientConnection(websockets.sync.client.ClientConnection):
    """
    A connection whose calls hear the current token, as `connect` makes it.

    `recv`, `recv_streaming`, iteration, `send`, `ping`, `pong`, `wait_closed` and `close` are
    interrupted by the token that is current in the thread which calls. The connection is then
    closed, without a closing handshake, for all threads that use it.

    Raises:
        Cancelled: As soon as the token is set. `close` drops the connection first, and does not
            raise it in place of another `Cancelled`, `KeyboardInterrupt`, `SystemExit` or
            `GeneratorExit` that is on its way.

    Source:
        `websockets.sync.client.ClientConnection`. Run with websockets 17.4 on Linux.
    """

    def _call(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        cutting = current_token().interrupts(self)
        with cutting:
            return sit_in(cutting.interrupt, fn, *args, **kwargs)

    # Any, in all of these: handed on, as websockets has it.

    def recv(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().recv, *args, **kwargs)

    def recv_streaming(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        frames = super().recv_streaming(*args, **kwargs)
        while (frame := self._call(next, frames, END)) is not END:
            yield frame

    def send(self, *args: Any, **kwargs: Any) -> None:
        self._call(super().send, *args, **kwargs)

    def ping(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().ping, *args, **kwargs)

    def pong(self, *args: Any, **kwargs: Any) -> None:
        self._call(super().pong, *args, **kwargs)

    def wait_closed(self, *args: Any, **kwargs: Any) -> bool:
        return self._call(super().wait_closed, *args, **kwargs)

    def close(self, *args: Any, **kwargs: Any) -> None:
        leaving = sys.exception()  # what the block is left with that closes the connection
        try:
            self._call(super().close, *args, **kwargs)
        except BaseException as error:
            self._drop()
            if is_a(error, Cancelled) and is_a(leaving, *PASSING):
                return  # it passes as it is
            raise

    def keepalive(self) -> None:
        # In a thread of the connection's own, which may have inherited the token of its maker.
        with use_token(CancelToken.NEVER):
            super().keepalive()

    def _drop(self) -> None:
        """Close it without another word to the server, and wait for its threads."""
        drop_websocket(self)
        # In this order: it joins the other itself, and before Python 3.13 two threads that join
        # a third at once can break its lock.
        if self.keepalive_thread is not None:
            self.keepalive_thread.join()
        self.recv_events_thread.join()


def connect(
    uri: str,
    *,
    sock: socket.socket | None = None,
    open_timeout: float | None = 10,
    **options: Any,  # Any: handed on
) -> ClientConnection:
    """
    Connect to a WebSocket server, unless the current token is set first.

    Connecting, the TLS handshake and the opening handshake are interrupted, and so is what the
    connection is used for later. Looking up the host's name is not. No proxy is used, and no
    redirect is followed.

    Args:
        uri: Where to, `ws` or `wss`.
        sock: A connected socket to use instead of a new one, as `fastpool.blocking.connect`
            makes it: for Unix sockets, or through a proxy.
        open_timeout: Longest wait for all of it, in seconds. `None` waits without limit.
        options: As for `websockets.sync.client.connect`: `ssl`, `subprotocols` and so on.

    Returns:
        The connection, to be closed by `close()` or at the end of a `with` block. Once the
        token is set, both drop it, without waiting for the server.

    Raises:
        Cancelled: As soon as the token is set. No connection is left.
        OSError: If there is no connection, or the time is up, as a `TimeoutError`.
        websockets.exceptions.InvalidHandshake: If the server does not speak WebSocket, or
            answers by a redirect, that is a `ValueError`.

    Source:
        `websockets.sync.client.connect`. Run with websockets 17.4 on Linux.
    """
    target = parse_uri(uri)
    deadline = None if open_timeout is None else time.monotonic() + open_timeout
    if sock is None:
        sock = _sockets.connect((target.host, target.port), open_timeout)
        sock.settimeout(None)
    made: list[ClientConnection] = []

    def make(*args: Any, **kwargs: Any) -> ClientConnection:
        made.append(ClientConnection(*args, **kwargs))
        return made[0]

    def shake_hands() -> None:
        left = None if deadline is None else deadline - time.monotonic()
        websockets.sync.client.connect(
            uri,
            sock=sock,
            open_timeout=left,
            proxy=None,
            create_connection=cast(type[ClientConnection], make),
            legacy=True,
            **options,
        )

    cutting = _sockets.interruptible(sock)
    try:
        with cutting:
            sit_in(cutting.interrupt, shake_hands)
    except BaseException:
        for connection in made:
            connection._drop()
        sock.close()
        raise
    return made[0]
