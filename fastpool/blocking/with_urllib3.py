"""
urllib3, its requests hearing the current token.

Use `PoolManager` in place of urllib3's own. Run with urllib3 2.8 on Linux.
"""

# Where urllib3 is not installed, nothing here has a type.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import contextlib
import copy
import queue
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection as _HTTPConnection
from urllib3.connection import HTTPSConnection as _HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    EmptyPoolError,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
)

from fastpool._scope import current_token, sleep, use_token
from fastpool.blocking import _http, _queues
from fastpool.blocking._elsewhere import sit_in
from fastpool.blocking._sockets import connect_tcp, interruptible
from fastpool.exceptions import Cancelled

__all__ = [
    "HTTPConnectionPool",
    "HTTPSConnectionPool",
    "PoolManager",
    "ProxyManager",
    "use_our_pools",
]


# --- Connections ----------------------------------------------------------------------------------


class HTTPConnection(_http.Connection, _HTTPConnection):
    """A connection that is made, sent to and read from under the current token."""

    def _new_conn(self) -> socket.socket:
        return _open(self)


class HTTPSConnection(_http.Connection, _HTTPSConnection):
    """The same by TLS."""

    _shaking_hands: contextlib.ExitStack

    def connect(self) -> None:
        # All of it in one go, since the handshake is urllib3's own. The token inside is for
        # Ctrl-C, which ends what a helper does for the main thread.
        token = current_token().child()
        with use_token(token), contextlib.ExitStack() as self._shaking_hands:
            sit_in(token.cancel, super().connect)

    def _new_conn(self) -> socket.socket:
        sock = _open(self)
        try:
            self._shaking_hands.enter_context(interruptible(sock))
        except BaseException:  # the connection has not got it yet
            sock.close()
            raise
        return sock


def _open(connection: _HTTPConnection) -> socket.socket:
    """What `_new_conn` of urllib3 does."""
    host = connection._dns_host.strip("[]")
    timeout = urllib3.Timeout.resolve_default_timeout(connection.timeout)
    try:
        host.encode("idna")
    except UnicodeError:
        raise LocationParseError(f"{host!r}, label empty or too long") from None
    try:
        sock = connect_tcp(
            (host, connection.port),
            timeout,
            connection.source_address,
            connection.socket_options or (),
        )
    except socket.gaierror as error:
        raise NameResolutionError(connection.host, connection, error) from error
    except TimeoutError as error:
        message = f"Connection to {host} timed out. (connect timeout={timeout})"
        raise ConnectTimeoutError(connection, message) from error
    except OSError as error:
        message = f"Failed to establish a new connection: {error}"
        raise NewConnectionError(connection, message) from error
    sys.audit("http.client.connect", connection, connection.host, connection.port)
    return sock


# --- Retries --------------------------------------------------------------------------------------


def _sleep_for_retry(self: urllib3.Retry, response: Any) -> bool:  # Any: handed on
    seconds = self.get_retry_after(response)
    if seconds:
        sleep(seconds)
    return bool(seconds)


def _sleep_backoff(self: urllib3.Retry) -> None:
    seconds = self.get_backoff_time()
    if seconds > 0:
        sleep(seconds)


_SLEEPING: dict[str, Callable[..., object]] = {
    "sleep_for_retry": _sleep_for_retry,
    "_sleep_backoff": _sleep_backoff,
}

_kinds: dict[type, type[urllib3.Retry]] = {}  # ours, by the user's


def _waking(kind: type[urllib3.Retry]) -> type[urllib3.Retry]:
    """The same kind of retries, but that it sleeps on the token, save where it has its own way."""
    ours = {
        name: sleeping
        for name, sleeping in _SLEEPING.items()
        if getattr(kind, name) is getattr(urllib3.Retry, name)
    }
    return type(kind.__name__, (kind,), {"__module__": __name__, "_waking": True, **ours})


def _hearing(retries: urllib3.Retry) -> urllib3.Retry:
    if hasattr(retries, "_waking"):
        return retries
    mine = copy.copy(retries)
    kind = type(retries)
    mine.__class__ = _kinds.get(kind) or _kinds.setdefault(kind, _waking(kind))
    return mine


# --- Pools ----------------------------------------------------------------------------------------


class _Connections(queue.LifoQueue[Any]):  # Any: connections, and None for one to be made
    """Those of a pool that nobody uses; waiting for one hears the token."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not block:
            return super().get(block=False)
        try:
            return _queues.get(self, timeout)
        except Cancelled:
            # In urllib3's own words: after anything else it would put back what it has not got.
            raise queue.Empty from None


class _Pool(urllib3.HTTPConnectionPool):
    QueueCls = _Connections

    # Any: handed on, as urllib3 has it
    def urlopen(  # type: ignore[override, unused-ignore] # some of its keywords are in `options`
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        retries: urllib3.Retry | bool | int | None = None,
        redirect: bool = True,
        *args: Any,
        **options: Any,
    ) -> Any:
        current_token().check()
        if not isinstance(retries, urllib3.Retry):
            retries = urllib3.Retry.from_int(retries, redirect=redirect, default=self.retries)
        retries = _hearing(retries)
        try:
            return super().urlopen(method, url, body, headers, retries, redirect, *args, **options)
        except EmptyPoolError:
            current_token().check()
            raise


class HTTPConnectionPool(_Pool):
    """
    A `urllib3.HTTPConnectionPool` whose requests hear the current token, as a `PoolManager`'s do.
    """

    # urllib3's own classes do not match its protocols either
    ConnectionCls = HTTPConnection  # pyright: ignore[reportAssignmentType]


class HTTPSConnectionPool(_Pool, urllib3.HTTPSConnectionPool):
    """
    A `urllib3.HTTPSConnectionPool` whose requests hear the current token, as a `PoolManager`'s do.
    """

    ConnectionCls = HTTPSConnection  # pyright: ignore[reportAssignmentType]


_POOLS: dict[str, type[urllib3.HTTPConnectionPool]] = {
    "http": HTTPConnectionPool,
    "https": HTTPSConnectionPool,
}


def use_our_pools(manager: urllib3.PoolManager) -> None:
    """Have a manager that has made no pool yet make ours."""
    manager.pool_classes_by_scheme = _POOLS


class PoolManager(urllib3.PoolManager):
    """
    A `urllib3.PoolManager` whose requests hear the current token.

    Waiting for a free connection, connecting, the TLS handshake, sending, waiting for the
    headers and reading the body, at once or piece by piece, are interrupted by the token that is
    current in the thread which does it; so are the pauses between retries, unless your subclass
    of `Retry` sleeps in its own way. Looking up the host's name is not.

    A connection that was interrupted is closed, and no request is made again after a cancel.
    Connections that wait in the pool, or serve other threads, are left alone. It speaks HTTP/1.1.

    Args:
        num_pools: As for `urllib3.PoolManager`, like all the rest.

    Raises:
        Cancelled: From requests and reads, as soon as the token is set. A response that was
            cut short is never taken for a whole one.

    Threads:
        Safe from any thread, as urllib3's.

    Source:
        `urllib3.PoolManager`. Run with urllib3 2.8 on Linux.
    """

    def _new_pool(self, *args: Any, **kwargs: Any) -> urllib3.HTTPConnectionPool:  # Any: handed on
        use_our_pools(self)
        return super()._new_pool(*args, **kwargs)


class ProxyManager(urllib3.ProxyManager):
    """
    A `urllib3.ProxyManager` whose requests hear the current token, as a `PoolManager`'s do.

    Args:
        proxy_url: As for `urllib3.ProxyManager`, like all the rest. Not a SOCKS proxy.
    """

    def _new_pool(self, *args: Any, **kwargs: Any) -> urllib3.HTTPConnectionPool:  # Any: handed on
        use_our_pools(self)
        return super()._new_pool(*args, **kwargs)
