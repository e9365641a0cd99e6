"""The system call that a thread sits in, and what to call instead."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from fastpool._stack import called, is_ours, module_of

__all__ = ["Look", "Seat", "cure", "look", "settle"]

# By `os.uname().machine`: the calls that Python code waits in, by their numbers.
_NUMBERS = {
    "x86_64": {
        0: "read", 1: "write", 2: "open", 7: "poll", 23: "select", 42: "connect", 43: "accept",
        44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 61: "wait4", 72: "fcntl",
        73: "flock", 202: "futex", 230: "clock_nanosleep", 232: "epoll_wait", 247: "waitid",
        257: "openat", 270: "pselect6", 271: "ppoll", 281: "epoll_pwait", 288: "accept4",
    },
    "aarch64": {
        22: "epoll_pwait", 25: "fcntl", 32: "flock", 56: "openat", 63: "read", 64: "write",
        72: "pselect6", 73: "ppoll", 95: "waitid", 98: "futex", 115: "clock_nanosleep",
        202: "accept", 203: "connect", 206: "sendto", 207: "recvfrom", 211: "sendmsg",
        212: "recvmsg", 242: "accept4", 260: "wait4",
    },
}  # fmt: skip

# Those whose first argument is a file descriptor.
_ON_FD = frozenset({
    "accept", "accept4", "connect", "fcntl", "flock", "read", "recvfrom", "recvmsg", "sendmsg",
    "sendto", "write",
})  # fmt: skip
_POLLOUT = 4

_SLEEP = "fastpool.sleep(seconds)"
_CURES = {
    "accept": "fastpool.blocking.interruptible(sock)",
    "accept4": "fastpool.blocking.interruptible(sock)",
    "clock_nanosleep": _SLEEP,
    "connect": "fastpool.blocking.connect(address)",
    "epoll_pwait": "fastpool.blocking.select(...)",
    "epoll_wait": "fastpool.blocking.select(...)",
    "flock": "fastpool.blocking.flock(fd, operation)",
    "poll": "fastpool.blocking.select(...)",
    "ppoll": "fastpool.blocking.select(...)",
    "pselect6": "fastpool.blocking.select(...)",
    "recvfrom": "fastpool.blocking.interruptible(sock)",
    "recvmsg": "fastpool.blocking.interruptible(sock)",
    "select": "fastpool.blocking.select(...)",
    "sendmsg": "fastpool.blocking.interruptible(sock)",
    "sendto": "fastpool.blocking.interruptible(sock)",
    "wait4": "fastpool.blocking.run(command)",
    "waitid": "fastpool.blocking.run(command)",
}
_ANY = "fastpool.blocking.abandon(fn, *args)"
_CHILD = (
    "fastpool.blocking.run(command), or token.interrupts(popen) with process_group=0 in its Popen"
)
# What waits in a function of other people's, by its module and name.
_FUNCTIONS = {
    ("multiprocessing.process", "join"): "fastpool.blocking.wait(process)",
    ("psycopg.connection", "connect"): f"{_ANY}, or give it a connect_timeout",
    ("subprocess", "__exit__"): _CHILD,
    ("subprocess", "call"): _CURES["wait4"],
    ("subprocess", "communicate"): _CHILD,
    ("subprocess", "run"): _CURES["wait4"],
    ("subprocess", "wait"): "fastpool.blocking.wait(popen), or token.interrupts(popen) to end it",
}
# The same by packages or modules, whatever they wait in.
_HTTPX = "httpx.Client(transport=fastpool.blocking.with_httpx.HTTPTransport())"
_LIBRARIES = {
    "http.client": "fastpool.blocking.urlopen(url), or token.interrupts(response)",
    "httpcore": _HTTPX,
    "httpx": _HTTPX,
    "psycopg": "token.interrupts(connection)",
    "psycopg_pool": "getconn(timeout=0.05), in a loop with token.check()",
    "redis": "fastpool.blocking.redis_client(client), once",
    "requests": "fastpool.blocking.with_requests.HTTPAdapter(), mounted on the session",
    "urllib.request": "fastpool.blocking.urlopen(url)",
    "urllib3": "fastpool.blocking.with_urllib3.PoolManager()",
    "websockets": "fastpool.blocking.with_websockets.connect(uri), or token.interrupts(connection)",
}
_LOOK_UPS = frozenset({"getaddrinfo", "gethostbyaddr", "gethostbyname", "gethostbyname_ex"})
_OF_SQLITE = frozenset(
    {"commit", "execute", "executemany", "executescript", "fetchall", "fetchmany", "fetchone"}
)
_WAIT = "fastpool.blocking.wait(thing)"
_LOCKS = {
    "get": "fastpool.blocking.get(queue)",
    "put": "fastpool.blocking.put(queue, item)",
    "acquire": "fastpool.blocking.acquire(lock)",
    "__enter__": "fastpool.blocking.acquire(lock)",
    "wait": _WAIT,
    "wait_for": _WAIT,
    "join": _WAIT,
    "result": _WAIT,
}
# The standard library's own code that waits on a lock for who called it.
_QUEUES = frozenset({"queue", "multiprocessing.queues"})
_WAITERS = frozenset({"threading", "concurrent.futures._base", "multiprocessing.pool"})


class Look(NamedTuple):
    """What the system said of a thread at one moment."""

    number: int | None  # of the system call; None: it is in none
    args: tuple[int, ...]
    switches: int  # how often it has given up the processor so far


class Seat(NamedTuple):
    """Where a thread sits."""

    call: str | None  # the system call; None: in none, it computes
    fd: int | None = None
    file: str = ""  # what the descriptor is, or what is opened
    ready_to: str = ""  # where it polls one descriptor: "read" or "write"


def look(thread_id: int | None) -> Look | None:
    """
    What the system says of a thread now; None where it says nothing, or does not want to.

    Args:
        thread_id: The number that the system knows it by, `threading.Thread.native_id`.

    Source:
        `proc_pid_syscall(5)`; containers and hardened systems may forbid reading it.
    """
    if not sys.platform.startswith("linux"):
        return None
    folder = f"/proc/self/task/{thread_id}"
    try:
        with open(f"{folder}/syscall", encoding="ascii") as file:
            number, *args = file.read().split()
        with open(f"{folder}/status", encoding="utf-8", errors="replace") as file:
            status = dict(line.split(":", 1) for line in file if ":" in line)
        switches = int(status.get("voluntary_ctxt_switches", 0))
        if number in ("running", "-1"):
            return Look(None, (), switches)
        return Look(int(number), tuple(int(arg, 16) for arg in args[:6]), switches)
    except (OSError, ValueError):
        return None


def settle(first: Look | None, second: Look | None) -> Seat | None:
    """
    Where a thread sits that was looked at twice, some hundredths of a second apart.

    A thread that computes is seen to wait for a lock, too: the interpreter's. But that wait is
    over soon, and the next one is another.
    """
    if first is None or second is None:
        return None
    names = _NUMBERS.get(os.uname().machine, {}) if sys.maxsize > 2**32 else {}
    for seen in (second, first):
        if seen.number is None:
            continue
        name = names.get(seen.number, f"number {seen.number}")
        if name != "futex":
            return _seat(name, seen.args)
        if first[:2] == second[:2] and first.switches == second.switches:
            return Seat(name)
    return Seat(None)


def _seat(name: str, args: tuple[int, ...]) -> Seat:
    if name in _ON_FD:
        return Seat(name, args[0], _kind(args[0]))
    if name in ("open", "openat"):
        return Seat(name, None, os.fsdecode(_string(args[name == "openat"])))
    if name in ("poll", "ppoll") and args[1] == 1:
        # A Python socket with a timeout polls before it reads.
        polled = _memory(args[0], 8)
        if len(polled) == 8:
            fd, events, _ = struct.unpack("ihh", polled)
            return Seat(name, fd, _kind(fd), "write" if events & _POLLOUT else "read")
    if name in ("select", "pselect6") and args[0] == 0:
        return Seat(name, None, "no file at all")
    if name in ("wait4", "waitid"):
        pid = args[0] if name == "wait4" else args[1]
        return Seat(name, None, f"child process {pid}" if 0 < pid < 2**31 else "a child process")
    return Seat(name)


def _string(address: int) -> bytes:
    """A path in our own memory, up to its end."""
    found = b""
    # Page by page: there may be none behind the one that it ends in.
    while len(found) < 4096 and b"\0" not in found:
        start = address + len(found)
        piece = _memory(start, 4096 - start % 4096)
        if not piece:
            break
        found += piece
    return found.partition(b"\0")[0]


def _memory(address: int, size: int) -> bytes:
    """Our own memory, which may be gone by now: then nothing."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, address)
    except (OSError, OverflowError):
        return b""


def _kind(fd: int) -> str:
    """What a descriptor is, in words."""
    try:
        # No more than its name: to ask for a file's kind would hang like the call that hangs.
        name = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
    if name.startswith("socket:"):
        return "a socket"
    if name.startswith("pipe:"):
        return "a pipe"
    if name.startswith(("/dev/pts/", "/dev/tty")):
        return f"the terminal {name}"
    return name


def cure(seat: Seat, frames: Sequence[FrameType]) -> str:
    """
    What to call instead, by name; empty if there is nothing to say.

    Args:
        seat: Where the thread sits.
        frames: The task's, the innermost last.
    """
    inner = frames[-1] if frames else None
    if inner is not None and is_ours(inner):
        return ""
    call = "" if inner is None else called(inner)
    if call in _OF_SQLITE and seat.call != "futex" and "sqlite3" in sys.modules:
        # All of it is in C, so the name of the call is what there is to see.
        if seat.call == "clock_nanosleep":  # until another connection gives its lock back
            return "fastpool.blocking.execute(connection, sql), if it is SQLite's"
        return "token.interrupts(connection), if it is SQLite's"
    if seat.call is None:
        return ""
    if call in _LOOK_UPS:
        return _ANY
    known = _cure_for_function(frames) or _cure_for_library(seat, frames)
    if known:
        return known
    if seat.call == "futex":
        return _cure_for_lock(frames)
    if seat.call in ("poll", "ppoll") and seat.file == "a socket":
        if call in ("poll", "select"):
            return _CURES["poll"]
        return _CURES["connect" if call == "connect" else "recvfrom"]
    if seat.call in ("select", "pselect6") and seat.file:
        return _SLEEP
    if seat.call in ("open", "openat"):
        return "fastpool.blocking.open_fifo(path), if it is a FIFO"
    if seat.call == "read":
        return _cure_for_read(seat.file, call)
    if seat.call == "write" and seat.file == "a socket":
        return _CURES["sendto"]
    return _CURES.get(seat.call, _ANY)


def _cure_for_function(frames: Sequence[FrameType]) -> str:
    for frame in frames:
        cure = _FUNCTIONS.get((module_of(frame), frame.f_code.co_name))
        if cure is not None:
            return cure
    return _CURES["wait4"] if any(module_of(frame) == "subprocess" for frame in frames) else ""


def _cure_for_library(seat: Seat, frames: Sequence[FrameType]) -> str:
    """
    What the library needs that waits. Of those that call each other, it is the outermost: what
    the user calls.
    """
    cure = ""
    for frame in reversed(frames):
        module = module_of(frame)
        package = module.partition(".")[0]
        known = _LIBRARIES.get(module) or _LIBRARIES.get(package)
        if known is not None:
            cure = known
        elif cure or package not in sys.stdlib_module_names:
            break  # who calls the library; or what it has called, which waits by itself
    if any(module_of(frame).startswith("fastpool.blocking.") for frame in frames):
        return ""  # it has that already
    if cure == _LIBRARIES["redis"] and seat.call == "futex":
        return f"{_ANY}, or give its connection pool a timeout"
    return cure


def _cure_for_read(file: str, call: str) -> str:
    if file == "a socket":
        return _CURES["recvfrom"]
    if call == "input":
        return "fastpool.blocking.input(prompt)"
    return "fastpool.blocking.read(fd, n)"


def _cure_for_lock(frames: Sequence[FrameType]) -> str:
    """A lock is behind a queue, an event, a thread's end: told by who waits on it."""
    name = ""
    for frame in reversed(frames):
        module = module_of(frame)
        if module in _QUEUES:
            name = frame.f_code.co_name
        elif module in _WAITERS:
            name = "acquire" if frame.f_code.co_name in ("acquire", "__enter__") else "wait"
        else:
            name = name or called(frame)
            break
    return _LOCKS.get(name, "fastpool.blocking.get, put, acquire or wait, by what it waits for")
