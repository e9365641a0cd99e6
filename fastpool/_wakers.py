"""How an object that a thread is blocked on is interrupted, by its type."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["AGAIN", "Waker", "advice", "find", "provide", "register"]


class Waker(NamedTuple):
    """How to interrupt, and whether doing so may block or take a lock."""

    how: Callable[[Any], object]  # Any: it takes the registered type, which only its owner knows
    slow: bool


AGAIN = object()
"""
Returned by a way of interrupting that could not interrupt anything yet, or cannot know.

It is called again after a pause, on a helper thread, until the block is left.
"""

# Read and written with single, atomic dict operations only, so no lock guards it.
_wakers: dict[type | str, Waker] = {}

# The rooms above that know how other people's types are interrupted. Each is imported when the
# first object of such a type is met, and says so by `provide`.
_ROOMS: dict[str, str] = {
    "http.client.HTTPConnection": "_shutdown",
    "http.client.HTTPResponse": "_shutdown",
    "psycopg.Connection": "_postgres",
    "psycopg.Cursor": "_postgres",
    "socket.socket": "_shutdown",
    "sqlite3.Connection": "_sqlite",
    "subprocess.Popen": "_children",
    "threading.Barrier": "_waits",
    "threading.Condition": "_waits",
    "urllib.response.addinfourl": "_shutdown",
    "urllib3.util.ssltransport.SSLTransport": "_shutdown",
    "websockets.sync.connection.Connection": "_shutdown",
}

_FILE = (
    "fastpool.blocking.read(fd, n), input(prompt) for the keyboard, or interruptible(sock) for a "
    "socket's"
)
_POOLS = "fastpool.blocking.with_urllib3.PoolManager(), which hears the token"
_SESSION = (
    "fastpool.blocking.with_requests.HTTPAdapter() in its session, which then hears the token"
)
_TRANSPORT = (
    "httpx.Client(transport=fastpool.blocking.with_httpx.HTTPTransport()), which hears the token"
)

# What to call instead of interrupting what cannot be woken without harm to others.
_INSTEAD: dict[str, str] = {
    "_io.BufferedReader": _FILE,
    "_io.FileIO": _FILE,
    "_io.TextIOWrapper": _FILE,
    "_queue.SimpleQueue": "fastpool.blocking.get(queue)",
    "_thread.RLock": "fastpool.blocking.acquire(lock)",
    "_thread.lock": "fastpool.blocking.acquire(lock)",
    "concurrent.futures._base.Future": "fastpool.blocking.wait(future)",
    "httpx.Client": _TRANSPORT,
    "httpx.Response": _TRANSPORT,
    "multiprocessing.process.BaseProcess": "fastpool.blocking.wait(process)",
    "multiprocessing.queues.Queue": "fastpool.blocking.get(queue) or put(queue, item)",
    "psycopg_pool.pool.ConnectionPool": "token.interrupts(connection), with one taken from it",
    "queue.Queue": "fastpool.blocking.get(queue) or put(queue, item)",
    "redis.client.PubSub": "a pubsub() of a client by fastpool.blocking.redis_client(client)",
    "redis.client.Redis": "fastpool.blocking.redis_client(client) once; its calls hear it then",
    "redis.connection.AbstractConnection": "fastpool.blocking.redis_client(client)",
    "requests.models.Response": _SESSION,
    "requests.sessions.Session": _SESSION,
    "threading.Event": "fastpool.blocking.wait(event)",
    "threading.Semaphore": "fastpool.blocking.acquire(semaphore)",
    "threading.Thread": "fastpool.blocking.wait(thread)",
    "urllib3.poolmanager.PoolManager": _POOLS,
    "urllib3.response.BaseHTTPResponse": _POOLS,
}


def register(
    kind: type | str, how: Callable[[Any], object], *, slow: bool = False
) -> None:  # Any: see `Waker`
    """
    Say how a thread that is blocked on an object of some type is interrupted.

    Args:
        kind: The type, or the full name of one (`"package.module.Class"`), so that a package
            need not be imported to be known. Subclasses count; the nearest one wins.
        how: Called with the object, at most once for each blocked call.
        slow: True if `how` may block or take a lock; it then runs on a helper thread.

    Raises:
        TypeError: If `kind` is neither a type nor a string, or `how` cannot be called.
    """
    if not isinstance(kind, (type, str)):
        raise TypeError(f"register() wants a type or its full name, not {kind!r}")
    if not callable(how):
        raise TypeError(f"register() wants a function to interrupt {kind!r} with, not {how!r}")
    _wakers[_key(kind)] = Waker(how, slow)


def provide(
    kind: str, how: Callable[[Any], object], *, slow: bool = False
) -> None:  # Any: see `Waker`
    """The same for what we know ourselves: it does not replace what a user has registered."""
    _wakers.setdefault(kind, Waker(how, slow))


def find(thing: object) -> Waker | None:
    """How to interrupt `thing`: what was registered for the nearest of its classes, or None."""
    for kind in type(thing).__mro__:
        name = _name(kind)
        waker = _wakers.get(_key(kind)) or _wakers.get(name)
        if waker is None and name in _ROOMS:
            importlib.import_module(f"fastpool.blocking.{_ROOMS[name]}")
            waker = _wakers.get(name)
        if waker is not None:
            return waker
    return None


def advice(thing: object) -> str | None:
    """What to do instead of interrupting `thing`, if that is known."""
    for name in map(_name, type(thing).__mro__):
        if name.startswith("fastpool.blocking."):
            return "it hears the current token already"
        if name in _INSTEAD:
            return f"use {_INSTEAD[name]}"
    return None


def _key(kind: type | str) -> type | str:
    """What stands for it in a dict: the name, if its metaclass has taken its hash away."""
    return _name(kind) if isinstance(kind, type) and type(kind).__hash__ is None else kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
