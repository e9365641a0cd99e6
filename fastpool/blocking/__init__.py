"""
Blocking calls that hear the token: each waits on the current one, and ends when it is set.

Each is shaped as the call it stands for, and raises `Cancelled` as soon as the token is set.
"""

import importlib
from typing import TYPE_CHECKING

from fastpool._scope import sleep as sleep
from fastpool._wakers import register as register

if TYPE_CHECKING:
    from fastpool.blocking._abandon import abandon as abandon
    from fastpool.blocking._abandon import abandoned as abandoned
    from fastpool.blocking._children import run as run
    from fastpool.blocking._files import flock as flock
    from fastpool.blocking._files import open_fifo as open_fifo
    from fastpool.blocking._files import read as read
    from fastpool.blocking._files import select as select
    from fastpool.blocking._http import urlopen as urlopen
    from fastpool.blocking._queues import get as get
    from fastpool.blocking._queues import put as put
    from fastpool.blocking._redis import redis_client as redis_client
    from fastpool.blocking._sockets import connect as connect
    from fastpool.blocking._sockets import interruptible as interruptible
    from fastpool.blocking._sqlite import execute as execute
    from fastpool.blocking._terminal import input as input
    from fastpool.blocking._waits import acquire as acquire
    from fastpool.blocking._waits import wait as wait
else:
    _HOMES = {
        "abandon": "_abandon",
        "abandoned": "_abandon",
        "acquire": "_waits",
        "connect": "_sockets",
        "execute": "_sqlite",
        "flock": "_files",
        "get": "_queues",
        "input": "_terminal",
        "interruptible": "_sockets",
        "open_fifo": "_files",
        "put": "_queues",
        "read": "_files",
        "redis_client": "_redis",
        "run": "_children",
        "select": "_files",
        "urlopen": "_http",
        "wait": "_waits",
    }
    __all__ = ["register", "sleep", *_HOMES]

    def __getattr__(name):
        # A module is imported with the first of its names that somebody asks for: all of them
        # together bring half of the standard library along.
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *__all__})
