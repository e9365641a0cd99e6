"""Child processes: run, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import select
import signal
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from typing import IO, Any

from fastpool import _clock, _wakers
from fastpool._closing import Closing
from fastpool._scope import current_token
from fastpool._token import CancelToken
from fastpool.blocking._polling import poll

__all__ = ["GRACE", "run", "wait"]

GRACE = 2.0  # seconds between SIGTERM and SIGKILL; less than a group's own grace, or it would warn

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)  # bytes that a ready pipe takes without blocking
_CHUNK = 65536  # bytes: all that a pipe of Linux holds
_GROUP = 4  # PIDFD_SIGNAL_PROCESS_GROUP, of Linux 6.9 and newer
_FIRST_PAUSE = 0.001  # seconds between two looks at who is left in a group
_LONGEST_PAUSE = 0.05


def run(
    command: Path | Sequence[Path],
    *,
    input: object = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    grace: float = GRACE,
    **options: Any,  # as `subprocess.Popen` takes them
) -> subprocess.CompletedProcess[Any]:  # Any: bytes or text, as the options say
    """
    Run a command and wait for it, as `subprocess.run` does.

    The command gets a process group of its own, unless `options` give it a session or a group.
    Ctrl-C at the terminal does not reach it there; it ends by the way of the token, as by any
    cancel: the whole group gets SIGTERM, and SIGKILL when `grace` is over, or all have ended. What
    the command has started is ended with it, and what has left the group is not waited for, even
    if it holds the pipes. A group of its own is in the terminal's background, where one that
    reads from the terminal is stopped: give such a command `stdin=subprocess.DEVNULL`.

    For a session of its own write `start_new_session=True`: `preexec_fn=os.setsid` fails in who
    leads a group. The command `setsid` forks there, so that a cancel does not reach what it runs,
    and without `--wait` the call does not wait for that either.

    Args:
        command: The program and its arguments, where `subprocess.run` has `args`; the others are
            its as well.
        input: Bytes or text for its standard input.
        capture_output: Whether to keep what it prints.
        timeout: Seconds that it may take. When they are over the group is killed, without grace.
        check: Whether an exit code other than 0 is an error.
        grace: Seconds that the group has to end after SIGTERM; 0 kills it at once.
        options: All that `subprocess.Popen` takes.

    Returns:
        The exit code, and the output if it was asked for.

    Raises:
        Cancelled: As soon as the current token is set and the group has ended.
        subprocess.CalledProcessError: If `check` is true and the exit code is not 0.
        subprocess.TimeoutExpired: If the time is up.
        OSError: If the command cannot be started.

    Threads:
        Safe from any thread. Nothing polls: the end of the process is a descriptor (a pidfd) where
        the system has that, elsewhere a thread waits for it.
    """
    token = current_token()
    token.check()
    span = _clock.seconds(timeout)
    patience = _clock.seconds(grace, "grace")
    if input is not None:
        if options.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used")
        options["stdin"] = subprocess.PIPE
    if capture_output:
        if options.get("stdout") is not None or options.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output")
        options["stdout"] = options["stderr"] = subprocess.PIPE
    if options.get("process_group") is None and not options.get("start_new_session"):
        options["process_group"] = 0
    popen = subprocess.Popen(command, **options)
    try:
        child = _Child(popen)
    except BaseException:  # no descriptor is left for us, say
        with popen:
            popen.kill()
        raise
    with child:
        try:
            child.connect(input)
            if not child.carry_on(token, span):
                patience = 0.0
                assert timeout is not None
                raise subprocess.TimeoutExpired(popen.args, timeout, *child.partial())
        except BaseException:
            obeys = True
            try:
                obeys = child.stop(patience)
            finally:
                if obeys:
                    popen.wait()  # killed by now, whatever came
            raise
    code = popen.wait()
    done = subprocess.CompletedProcess(popen.args, code, *child.output())
    if check:
        done.check_returncode()
    return done


def wait(popen: subprocess.Popen[Any], timeout: float | None) -> bool:
    """Whether a process ends in time, unless the current token is set first; it is reaped then."""
    if popen.poll() is None:
        with _Child(popen) as child:
            if not child.carry_on(current_token(), timeout):
                return False
        popen.wait()
    return True


def _interrupt(popen: subprocess.Popen[Any]) -> None:
    """What `CancelToken.interrupts` does to a process that somebody else waits for."""
    if popen.returncode is not None:
        return
    try:
        child = _Child(popen)
    except OSError:  # no descriptor is left: it is looked at, then
        popen.terminate()
        try:
            popen.wait(GRACE)
        except subprocess.TimeoutExpired:
            popen.kill()
        return
    with child:
        child.stop(GRACE)


_wakers.provide("subprocess.Popen", _interrupt, slow=True)


class _Watch:
    """
    What stands for a pidfd: a pipe that a thread closes when the process ends.

    One for each process, however often it is waited for.
    """

    def __init__(self) -> None:
        self.end, self._alive = os.pipe()
        self.pid = os.getpid()  # a thread does not come along to a forked child
        weakref.finalize(self, os.close, self.end).atexit = False

    def wait(self, popen: subprocess.Popen[Any]) -> None:
        try:
            if hasattr(os, "waitid"):
                # Not reaped, so that its number stays taken for as long as we signal it.
                os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
            else:
                popen.wait()
        except OSError:  # somebody else has reaped it
            return
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Nobody looks any more."""
        # A child that another thread has forked meanwhile holds this end as well, so it is said,
        # too; and never read, since many may be waiting.
        with contextlib.suppress(OSError):
            os.write(self._alive, b"!")
        os.close(self._alive)


_watches: weakref.WeakKeyDictionary[subprocess.Popen[Any], _Watch] = weakref.WeakKeyDictionary()


def _watch(popen: subprocess.Popen[Any]) -> _Watch:
    """The one of a process; its thread is started with it."""
    watch = _watches.get(popen)
    if watch is None or watch.pid != os.getpid():
        watch, started = _Watch(), list[threading.Thread]()
        try:
            waits = functools.partial(watch.wait, popen)
            _clock.start_thread(waits, "fastpool-child", started.append)
        except BaseException:
            if not started:
                watch.give_up()
            raise
        _watches[popen] = watch  # of two that two threads have made at once, either
    return watch


class _Child(Closing):
    """
    A process of ours: what goes in and comes out, its end, and signals that meet nobody else.
    """

    def __init__(self, popen: subprocess.Popen[Any]) -> None:
        self._popen = popen
        self._pidfd = -1
        self._watch: _Watch | None = None
        self._files: dict[int, IO[Any]] = {}  # the pipes that are open, by their descriptors
        self._rest = memoryview(b"")  # of the input
        self._read: tuple[list[bytes] | None, list[bytes] | None] = (None, None)
        self._ended = False
        try:
            self._end = self._pidfd = os.pidfd_open(popen.pid)
        except (AttributeError, OSError):  # there is none here, or a sandbox forbids it
            self._watch = _watch(popen)
            self._end = self._watch.end

    def close(self) -> None:
        for fd in list(self._files):
            self._close(fd)
        if self._watch is None:
            os.close(self._end)

    # --- Pipes --------------------------------------------------------------------------------

    def connect(self, data: Any) -> None:  # Any: bytes-like, or text
        """Take its pipes over."""
        stdin, stdout, stderr = self._popen.stdin, self._popen.stdout, self._popen.stderr
        self._read = (None if stdout is None else [], None if stderr is None else [])
        self._files = {file.fileno(): file for file in (stdin, stdout, stderr) if file is not None}
        if stdin is not None:
            if isinstance(stdin, io.TextIOWrapper) and data:
                data = data.encode(stdin.encoding, stdin.errors)
            self._rest = memoryview(data or b"").cast("B")
            if not self._rest:
                self._close(stdin.fileno())

    def carry_on(self, token: CancelToken, timeout: float | None) -> bool:
        """
        Move what goes in and out, until the process has ended and all pipes have.

        Returns:
            True; or False if the time ran out first.
        """
        deadline = _deadline(timeout)
        while self._files or not self._ended:
            if not self._step(token, _left(deadline)):
                return False
        return True

    def _step(self, token: CancelToken | None, timeout: float | None) -> bool:
        """Wait until there is something to do, and do it; False if the time ran out first."""
        stdin = self._popen.stdin
        wanted = {
            fd: select.POLLOUT if file is stdin else select.POLLIN
            for fd, file in self._files.items()
        }
        if not self._ended:
            wanted[self._end] = select.POLLIN
        ready = poll(token, wanted, timeout)
        for fd in ready:
            if fd == self._end:
                self._ended = True
            elif self._files[fd] is stdin:
                self._write(fd)
            else:
                self._take(fd)
        return bool(ready)

    def _write(self, fd: int) -> None:
        try:
            self._rest = self._rest[os.write(fd, self._rest[:_PIPE_BUF]) :]
        except BrokenPipeError:
            self._rest = self._rest[:0]  # nobody reads it any more
        if not self._rest:
            self._close(fd)

    def _take(self, fd: int) -> None:
        chunk = os.read(fd, _CHUNK)
        if not chunk:
            self._close(fd)
            return
        chunks = self._read[0 if self._files[fd] is self._popen.stdout else 1]
        assert chunks is not None
        chunks.append(chunk)

    def _close(self, fd: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._files.pop(fd).close()

    def partial(self) -> tuple[bytes | None, ...]:
        """What has come so far, as `subprocess.TimeoutExpired` has it."""
        return tuple(b"".join(chunks) if chunks else None for chunks in self._read)

    def output(self) -> tuple[str | bytes | None, ...]:
        """All that has come from its output and its error output, as it was asked for."""
        return tuple(
            None if chunks is None else _decoded(b"".join(chunks), file)
            for chunks, file in zip(
                self._read, (self._popen.stdout, self._popen.stderr), strict=True
            )
        )

    # --- Signals ------------------------------------------------------------------------------

    def stop(self, grace: float | None) -> bool:
        """
        End it and its group: SIGTERM, some seconds of grace, SIGKILL. It is left to be reaped.

        A second Ctrl-C leaves out what is left of the grace.
        What comes out is read on meanwhile, or a full pipe could keep it from ending.

        Returns:
            True; or False if it has not ended, since the system forbids it.
        """
        try:
            if grace is None or grace > 0:
                self._signal(signal.SIGTERM)
                self._signal(signal.SIGCONT)  # one that was stopped hears nothing else
                self._give(_deadline(grace))
        finally:
            obeys = self._signal(signal.SIGKILL)
        if not obeys:
            warnings.warn(
                f"command {self._popen.args!r} goes on as process {self._popen.pid}: it has become "
                "another user's, and may not be ended",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        while not self._ended:
            self._step(None, None)
        return True

    def _give(self, deadline: float | None) -> None:
        """Wait until all of its group have ended, or time is up."""
        while not self._ended:
            if not self._step(None, _left(deadline)):
                return
        # Of the others nobody tells us. They are looked at, and only after it has ended itself.
        pause = _FIRST_PAUSE
        while self._is_ours() and _is_peopled(self._popen.pid):
            left = _left(deadline)
            if left is not None and left <= 0:
                return
            self._step(None, pause if left is None else min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _signal(self, signum: int) -> bool:
        """
        Signal its group if it has one of its own, else itself; nobody once it has been reaped.

        As long as it has not been, its number cannot be given to another.

        Returns:
            False if the system forbids it.
        """
        if self._is_ours():
            try:
                if self._pidfd < 0 or not self._signal_by_pidfd(signum):
                    pid = self._popen.pid
                    (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signum)
            except ProcessLookupError:
                return True
            except PermissionError:
                return False
        return True

    def _signal_by_pidfd(self, signum: int) -> bool:
        """The same by what is this process for ever, even if a thread reaps it just now."""
        try:
            signal.pidfd_send_signal(self._pidfd, signum, None, _GROUP)
        except ProcessLookupError:  # it leads no group
            signal.pidfd_send_signal(self._pidfd, signum)
        except PermissionError:
            raise
        except OSError:  # the system is too old
            return False
        return True

    def _is_ours(self) -> bool:
        """Whether it is there, if only to be reaped."""
        if self._popen.returncode is not None:
            return False
        if hasattr(os, "waitid"):
            try:
                os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
        return True


def _is_peopled(group: int) -> bool:
    """Whether a process group has a process that has not ended; False where nobody tells."""
    try:
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return False
    for pid in pids:
        try:
            if os.getpgid(int(pid)) == group:  # asked first, for it costs next to nothing
                with open(f"/proc/{pid}/stat", "rb") as file:
                    if file.read().rpartition(b")")[2].split()[0] not in b"ZX":
                        return True
        except OSError:  # it has just ended
            continue
    return False


def _decoded(data: bytes, file: IO[Any] | None) -> str | bytes:
    if not isinstance(file, io.TextIOWrapper):
        return data
    text = data.decode(file.encoding, file.errors or "strict")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
