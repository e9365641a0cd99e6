"""How a socket is interrupted, and what reads from one."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from typing import Any

from fastpool import _wakers

__all__ = ["drop_websocket", "shut_down"]

_AT_ONCE = struct.pack("ll", 0, 1)  # one microsecond, as a `struct timeval`


def shut_down(sock: socket.socket) -> None:
    """
    Have every thread that is blocked on a socket come back, and every later call return at once.

    Reads find the end of the stream, or an empty datagram; writes, `accept` and `connect` an
    `OSError`. The socket is of no use any more, except to be closed.

    Args:
        sock: A socket of any kind. Nothing happens to one that is closed.
    """
    # Always the plain socket's methods: TLS's own would talk to the peer, or take its state away
    # from under the thread that reads.
    plain = socket.socket
    sock = _innermost(sock)
    with contextlib.suppress(OSError):  # an unconnected datagram socket says ENOTCONN, and wakes
        # With a timeout Python waits by `poll` and reads without blocking; a datagram socket, or
        # a Unix listener, that is shut down is then readable without end and has nothing to
        # read. A read that may block sees that nothing can come, and returns.
        plain.setblocking(sock, True)
        if sys.platform == "linux":
            # A `connect` that begins only now does not look at what is shut down, and would
            # wait for its answer; so it waits no longer than this.
            plain.setsockopt(sock, socket.SOL_SOCKET, socket.SO_SNDTIMEO, _AT_ONCE)
        plain.shutdown(sock, socket.SHUT_RDWR)


def _innermost(sock: Any) -> socket.socket:  # Any: what stands where a socket does
    """The socket inside what speaks TLS within TLS, as urllib3 and websockets have it."""
    while not isinstance(sock, socket.socket):
        sock = sock.ssl_socket if hasattr(sock, "ssl_socket") else sock.socket
    return sock


def _shut_down_connection(connection: Any) -> None:  # Any: its type is not imported here
    """The same for an `http.client.HTTPConnection`; nothing happens to one without a socket."""
    sock = connection.sock
    if sock is not None:
        shut_down(sock)


def _shut_down_stream(stream: Any) -> None:  # Any: files of many kinds, one in the other
    """The same for what reads from a socket: a response, or a file that `makefile` made."""
    while stream is not None and not isinstance(stream, socket.socket):
        inner = [name for name in ("fp", "raw", "_sock") if hasattr(stream, name)]
        stream = getattr(stream, inner[0]) if inner else None  # None once it is closed
    if stream is not None:
        shut_down(stream)


def drop_websocket(connection: Any) -> None:  # Any: its type is not imported here
    """
    The same for a connection of `websockets.sync`, which has a thread that reads.

    That thread finds the end of the stream, closes the connection and wakes all who wait; but
    not while it waits itself, for somebody to take the messages that have come.
    """
    shut_down(connection.socket)
    messages = connection.recv_messages
    with messages.mutex:
        messages.high = None  # it waits no more
        if messages.paused:
            messages.paused = False
            messages.resume()


_wakers.provide("socket.socket", shut_down)  # TLS's is a subclass
_wakers.provide("urllib3.util.ssltransport.SSLTransport", shut_down)
_wakers.provide("websockets.sync.connection.Connection", drop_websocket, slow=True)
_wakers.provide("http.client.HTTPConnection", _shut_down_connection)
_wakers.provide("http.client.HTTPResponse", _shut_down_stream)
_wakers.provide("urllib.response.addinfourl", _shut_down_stream)
