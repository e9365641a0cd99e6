"""
Blocking calls that hear the token: each waits on the current one, and ends when it is set.

Each is shaped as the call it stands for.
"""

from fastpool._scope import sleep
from fastpool._wakers import register
from fastpool.blocking._http import urlopen
from fastpool.blocking._sockets import connect, interruptible

__all__ = ["connect", "interruptible", "register", "sleep", "urlopen"]
