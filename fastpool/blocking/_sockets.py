"""Sockets that hear the token: connecting, TLS, reading and writing."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from fastpool._callbacks import Interrupts
from fastpool._scope import current_token
from fastpool.blocking._elsewhere import call_out, sit_in
from fastpool.blocking._shutdown import shut_down

if TYPE_CHECKING:
    import ssl

__all__ = ["DEFAULT", "connect", "connect_tcp", "interruptible", "secure"]

# Any: what stands there is nothing but an object, and is handed on as a number of seconds.
DEFAULT: Any = vars(socket)["_GLOBAL_DEFAULT_TIMEOUT"]
"""What the standard library has for a timeout that was not given."""

Address: TypeAlias = tuple[str | bytes | None, str | bytes | int | None] | str | bytes
Source: TypeAlias = tuple[str, int]
# Any: as `setsockopt` takes them, which type checkers know in several forms.
Options: TypeAlias = Iterable[tuple[Any, ...]]

SLICE = 0.02  # seconds between two looks at the token; 50 system calls a second


def interruptible(sock: socket.socket) -> Interrupts:
    """
    Have what is done with a socket in a `with` block interrupted by the current token.

    Everything that waits for the socket is: `recv`, `sendall`, `accept`, `connect`, datagrams,
    files that `makefile` made, a TLS handshake also when the block wraps the socket.
    A cancel shuts the socket down, for all threads that use it; close it then.
    Without one it is untouched. A duplicate (`sock.dup()`) is the same to the system: what blocks
    on that is interrupted too, and it is shut down with the socket, unless the block has closed
    that first.

    Args:
        sock: An open socket: TCP, UDP, Unix or TLS, with a timeout or without.

    Returns:
        A context manager, as `CancelToken.interrupts` returns it.

    Raises:
        Cancelled: On entry if the token is set; the socket is then untouched. On leaving if it
            is set, whatever the block did, since a read that was cut short looks like the end
            of the stream; what came out of the block is its `__context__`.
        OSError: If the socket is closed.
        TypeError: If it is no socket.

    Threads:
        The current token is the one where `interruptible` is called.

    Source:
        Run on Linux. `shutdown(2)` wakes who waits there; `close(2)` does not. A `connect` to a
        Unix socket whose queue is full is not woken: use `connect()`.
    """
    if not isinstance(sock, socket.socket):
        raise TypeError(
            f"interruptible() wants a socket, not {sock!r}; "
            "for other things there is token.interrupts()"
        )
    number = sock.fileno()
    if number < 0:
        raise OSError(errno.EBADF, f"interruptible() wants an open socket, not {sock!r}")
    return current_token().interrupts(partial(_cut, sock, number, os.fstat(number)))


def _cut(sock: socket.socket, number: int, seen: os.stat_result) -> None:
    shut_down(sock)
    if sock.fileno() == number:
        return
    # Closed in the block, or wrapped: then the number is the TLS socket's. A number may be given
    # to another file at any time, so what we act on is a duplicate that is known to be the same.
    # The first look is there because closing a duplicate of a file lifts the locks on it.
    with contextlib.suppress(OSError):
        if not os.path.samestat(seen, os.fstat(number)):
            return
        twin = os.dup(number)
        try:
            if os.path.samestat(seen, os.fstat(twin)):
                same = socket.socket(fileno=twin)
                shut_down(same)
                same.detach()
        finally:
            os.close(twin)


@overload
def connect(
    address: Address,
    timeout: float | None = ...,
    source_address: Source | None = ...,
    *,
    ssl_context: ssl.SSLContext,
    server_hostname: str | None = ...,
) -> ssl.SSLSocket: ...
@overload
def connect(
    address: Address,
    timeout: float | None = ...,
    source_address: Source | None = ...,
    *,
    ssl_context: None = ...,
    server_hostname: str | None = ...,
) -> socket.socket: ...
def connect(
    address: Address,
    timeout: float | None = DEFAULT,
    source_address: Source | None = None,
    *,
    ssl_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> socket.socket:
    """
    Connect to an address, unless the current token is set first.

    Looking up a name cannot be interrupted, only what comes after it.
    A Unix socket whose queue is full is tried again and again, every 0.02 seconds.

    Args:
        address: Host and port, or the path of a Unix socket.
        timeout: Longest wait for each address that the host has, in seconds, and the socket's
            timeout afterwards. `None` waits without limit; by default it is
            `socket.getdefaulttimeout()`.
        source_address: Host and port to connect from.
        ssl_context: Speak TLS, by this context; the handshake hears the token too.
        server_hostname: The name that the server's certificate must be for; by default the
            address's host.

    Returns:
        The socket; a TLS socket if a context was given. What is done with it later is
        interrupted in a block of `interruptible`.

    Raises:
        Cancelled: As soon as the token is set. No socket is left.
        OSError: If no address of the host answers: the last one's error. That of a Unix socket
            names its path.
        TimeoutError: If the time is up; this is an `OSError`.
        ssl.SSLError: If the handshake fails; this is an `OSError`.
        TypeError: If that is no address.

    Source:
        `socket.create_connection`. Run on Linux.
    """
    if not isinstance(address, (str, bytes)) and not (
        isinstance(address, (tuple, list)) and len(address) == 2
    ):
        raise TypeError(
            f"connect() wants (host, port), or the path of a Unix socket, not {address!r}"
        )
    if isinstance(address, (str, bytes)):
        sock, host = _connect_unix(address, timeout), None
    else:
        sock, host = connect_tcp(address, timeout, source_address), address[0]
    if ssl_context is None:
        return sock
    name = host.decode("ascii") if isinstance(host, bytes) else host
    return secure(sock, ssl_context, name if server_hostname is None else server_hostname)


def connect_tcp(
    address: tuple[str | bytes | None, str | bytes | int | None],
    timeout: float | None,
    source: Source | None,
    options: Options = (),
) -> socket.socket:
    """
    A socket that is connected to a host.

    Args:
        address: Host and port.
        timeout: As for `connect`.
        source: Host and port to connect from.
        options: What `setsockopt` is called with before connecting.

    Raises:
        Cancelled: As soon as the current token is set. No socket is left.
        OSError: If no address of the host answers: the last one's error.
    """
    host, port = address
    settings = list(options)
    token = current_token()
    token.check()
    try:
        found = call_out(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
    except OSError:
        token.check()
        raise
    failure = OSError(f"connect() found no address for {address!r}")
    try:
        for family, kind, protocol, _, target in found:
            try:
                sock = socket.socket(family, kind, protocol)
                return _connect_to(sock, target, timeout, source, settings)
            except OSError as error:
                failure = error
        raise failure
    finally:
        del failure  # its traceback holds this frame: without the name it is no cycle


def _connect_to(
    sock: socket.socket,
    target: Any,  # Any: each family has addresses of its own
    timeout: float | None,
    source: Source | None,
    options: Options,
) -> socket.socket:
    try:
        for option in options:
            sock.setsockopt(*option)
        if timeout is not DEFAULT:
            sock.settimeout(timeout)
        if source is not None:
            sock.bind(source)
        with interruptible(sock):
            sit_in(partial(shut_down, sock), sock.connect, target)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_unix(path: str | bytes, timeout: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        if timeout is not DEFAULT:
            sock.settimeout(timeout)
        given = sock.gettimeout()
        with interruptible(sock):
            if given == 0:
                sock.connect(path)
            else:
                _wait_for_place(sock, path, given)
        sock.settimeout(given)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = path
            host, _, port = os.fsdecode(path).rpartition(":")
            if isinstance(error, FileNotFoundError) and host and port.isdecimal():
                error.strerror = f"no such Unix socket; for TCP write connect(({host!r}, {port}))"
        raise
    return sock


def _wait_for_place(sock: socket.socket, path: str | bytes, timeout: float | None) -> None:
    # Who waits for a place in a Unix listener's queue is woken by the listener alone, whatever
    # is done to his own socket; and without blocking there is nothing to wait for at all. So it
    # blocks, for a while that the system measures.
    token = current_token()
    deadline = None if timeout is None else time.monotonic() + timeout
    sock.settimeout(None)
    while True:
        token.check()
        left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
        _limit_send(sock, max(left, 1e-6))
        try:
            call_out(sock.connect, path)
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError("timed out") from None
        else:
            if _has_peer(sock):
                _limit_send(sock, 0)
                return


def _has_peer(sock: socket.socket) -> bool:
    """
    Whether it is connected. After a signal Python asks whether it can be written to, which a Unix
    socket says that waits for its place.
    """
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True


def _limit_send(sock: socket.socket, seconds: float) -> None:
    """Have the system end a wait on the socket by an error; zero is no limit."""
    span = struct.pack("ll", 0, int(seconds * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)


def secure(sock: socket.socket, context: ssl.SSLContext, name: str | None) -> ssl.SSLSocket:
    """
    A TLS socket in place of a connected one, which is closed if the handshake fails.

    Args:
        sock: The connected socket.
        context: By what to speak TLS.
        name: Whom the server's certificate must be for.

    Raises:
        Cancelled: As soon as the current token is set.
        OSError: If the handshake fails.
    """
    wrapped: list[ssl.SSLSocket] = []

    def wrap() -> None:
        # Not in two steps: there are contexts that look at the certificate after the handshake,
        # in this very method. (Before Python 3.13 it leaves the closing of what Ctrl-C interrupts
        # to the garbage collector.)
        wrapped.append(context.wrap_socket(sock, server_hostname=name))

    cutting = interruptible(sock)
    try:
        with cutting:
            sit_in(cutting.interrupt, wrap)
    except BaseException:
        for each in wrapped:
            each.close()
        sock.close()
        raise
    return wrapped[0]
