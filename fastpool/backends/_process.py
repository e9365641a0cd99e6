"""One worker process, as it is seen from here: started, told, asked, ended."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.process
import operator
import os
import pickle
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any

from fastpool._errors import in_words
from fastpool.backends import _worker
from fastpool.backends._wire import PROTOCOL, Shared, dump_function
from fastpool.exceptions import WorkerDiedError

__all__ = ["WorkerProcess", "context_for", "dump_start", "refuse_in_import", "start_worker"]

ANSWER = 1.0  # seconds that a worker has to say where it is
UNANSWERED = 3  # times that it may have been asked in vain: its pipe takes so many answers
FAREWELL = 2.0  # seconds that a worker has to end by itself
PATIENCE = 300  # hundredths of a second in which the server of forked processes is replaced
SERVER = "fastpool.backends._server"  # what the server of forked processes imports
UNGUARDED = 86  # with what a worker exits whose main script starts a group as it is imported

# Guards the start of processes: one at a time, so that none inherits another's pipes. And the
# reading of how one has ended, which can be done once, and which each start does for all.
_starting = threading.Lock()

_forked: list[None] = []  # not empty in a forked child


def context_for(name: str | None) -> Any:
    """Where processes are started by that method, or by the best one there is."""
    known = multiprocessing.get_all_start_methods()
    methods = [method for method in ("forkserver", "spawn") if method in known]
    if name is None:
        name = methods[0]
    if name not in methods:
        why = "; fork copies locks that other threads hold" if name == "fork" else ""
        raise ValueError(f"start_method must be {' or '.join(methods)}, not {name!r}{why}")
    return multiprocessing.get_context(name)


def dump_start(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> bytes:
    """What a worker calls before its first task, as it is sent."""
    try:
        function = None if initializer is None else dump_function(initializer)
        return pickle.dumps((function, initargs), PROTOCOL)
    except Exception as error:
        raise TypeError(f"the initializer or initargs cannot be sent: {in_words(error)}") from error


def start_worker(context: Any, start: bytes) -> WorkerProcess:
    """A new worker, which will say when it is ready."""
    # The server of a forked child's parent is no child of its own, and so not usable.
    if _forked:
        context = multiprocessing.get_context("spawn")
    with _starting:
        if context.get_start_method() == "spawn":
            with _ctrl_c_blocked():
                return WorkerProcess(context, start)
        with _ctrl_c_blocked() if _preload(context) else contextlib.nullcontext():
            for _ in range(PATIENCE):
                try:
                    return WorkerProcess(context, start)
                except (ConnectionError, EOFError):
                    # The server dies, perhaps as it imports a main script that is not guarded.
                    # The next one does without that, and its worker says what is wrong.
                    context.set_forkserver_preload([SERVER])
                    time.sleep(0.01)  # it is not replaced before it has quite ended
            return WorkerProcess(context, start)


def _preload(context: Any) -> bool:
    """
    Have the server import us, once, and not each worker.

    Returns:
        Whether it does: not if the program has its own list.
    """
    server: Any = forkserver._forkserver  # nothing public tells
    listed: list[str] = server._preload_modules
    if listed == ["__main__"]:
        context.set_forkserver_preload(["__main__", SERVER])
    return SERVER in listed or listed == ["__main__"]


@contextlib.contextmanager
def _ctrl_c_blocked() -> Generator[None, None, None]:
    """
    Start processes that do not hear Ctrl-C before they are ready for it.

    A terminal sends it to them, too, and one that is still importing would say so, with a
    traceback. They have this from the thread that starts them, which is a lane's.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which unblocks the signal when it starts something
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def refuse_in_import() -> None:
    """Exit, in a worker that is still importing a main script which is not guarded."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)


class _Name(str):
    """
    A worker's name, to read which has Ctrl-C ignored.

    It is the first thing that a new process reads, before it imports the main script; nothing of
    ours can be found there yet. Without it a Ctrl-C would be a traceback of the worker's.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, ((str(self), _Ignored()), 0)


class _Ignored:
    """Read from its pickle, it is done."""

    def __reduce__(self) -> tuple[Any, ...]:
        return signal.signal, (signal.SIGINT, signal.SIG_IGN)


class WorkerProcess:
    """One worker process, as its lane sees it. While that serves, its thread alone writes here."""

    def __init__(self, context: Any, start: bytes) -> None:
        self.calls, calls = context.Pipe()
        self.control, control = context.Pipe()
        self.shared = context.RawValue(Shared, -1)
        # The functions that it has, by `id`; it forgets them with the group, and so do we.
        self.known: dict[int, tuple[object, int]] = {}
        # Guards the writing to `control`: the lane's thread gives orders, and who reports a task
        # that does not stop. Held for one short write.
        self._telling = threading.Lock()
        # Guards the reading from it, by who reports, and its end. Held until the worker has
        # answered. Who reports may be a signal handler, above one that holds it: none waits for
        # ever, and it takes the other lock with this one held.
        self._asking = threading.Lock()
        self._questions = itertools.count(1)
        self._unanswered: deque[int] = deque()  # with `_asking` held
        self.process = context.Process(
            target=_worker.main,
            args=(calls, control, self.shared, start),
            name=_Name("fastpool-worker"),
        )
        try:
            self.process.start()
        except BaseException:
            self.calls.close()
            self.control.close()
            raise
        finally:
            calls.close()
            control.close()
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(self.process.pid)

    _pidfd: int | None = None

    @property
    def name(self) -> str:
        return f"worker process {self.process.pid}"

    def never_came(self) -> BaseException:
        """Why it has died before it was ready."""
        if self.exit_code(FAREWELL) == UNGUARDED:
            return RuntimeError(
                "a worker process imports the main script, and that starts a group of its own; put"
                ' what the script does under: if __name__ == "__main__":'
            )
        return WorkerDiedError(f"{self.name} died as it started: {self.how_it_ended()}")

    def has_ended(self) -> bool:
        return bool(connection.wait([self.sentinel], 0))

    def exit_code(self, within: float | None) -> int | None:
        """As that of a `Process`; nothing if it has not ended within so many seconds."""
        # Its children may keep what the standard library looks at from saying so.
        if not connection.wait([self.sentinel], within):
            return None
        with _starting:
            code: int | None = self.process.exitcode
            self.process.join(FAREWELL)  # it may be told a moment later, and is forgotten there
            return self.process.exitcode if code is None else code

    def how_it_ended(self) -> str:
        """By exit code or signal, once it has."""
        code = self.exit_code(FAREWELL)
        if code is None:
            return "it does not answer"
        if code >= 0:
            return f"exit code {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable once the process has ended."""
        return self.process.sentinel if self._pidfd is None else self._pidfd

    def tell(self, *order: object) -> None:
        """Give an order to the thread that hears; a worker that is gone needs none."""
        with self._telling, contextlib.suppress(OSError):
            self.control.send_bytes(pickle.dumps(order, PROTOCOL))

    def hears(self) -> bool:
        """Whether an order can be given without waiting until the worker reads those before it."""
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLOUT)
        return bool(poll.poll(0))

    def hang_up(self) -> None:
        """Have who sends or receives by the pipe of the calls fail."""
        with contextlib.suppress(OSError):
            end = socket.socket(fileno=self.calls.fileno())  # no other one: there may be none left
            try:
                end.shutdown(socket.SHUT_RDWR)
            finally:
                end.detach()

    def rest(self, word: bytes) -> None:
        """Have it forget what is over: the batch before, or the group."""
        with contextlib.suppress(OSError):
            self.calls.send_bytes(word)

    def stack(self) -> str:
        """The stack of what it runs, as text; empty if it does not answer, or another asks."""
        if not self._asking.acquire(timeout=ANSWER):
            return ""
        try:
            with contextlib.suppress(EOFError, OSError):
                return self._ask_where()
            return ""
        finally:
            self._asking.release()

    def _ask_where(self) -> str:
        while self.control.poll(0):
            self._hear_where()  # of reports that were made without it
        if len(self._unanswered) >= UNANSWERED or not self.hears():
            return ""
        question = next(self._questions)
        self.tell("where", question)
        self._unanswered.append(question)
        deadline = time.monotonic() + ANSWER
        while self.control.poll(max(0.0, deadline - time.monotonic())):
            answered, text = self._hear_where()
            if answered == question:
                return text
        return ""

    def _hear_where(self) -> tuple[int, str]:
        answer: tuple[int, str] = pickle.loads(self.control.recv_bytes())
        while self._unanswered and self._unanswered[0] <= answer[0]:
            self._unanswered.popleft()
        return answer

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is None:
                self.process.kill()
            else:  # its number may be another's by now
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Have it end, and wait for that."""
        self.calls.close()
        if self.exit_code(FAREWELL) is None:
            self.kill()
            self.exit_code(None)
        with self._asking:
            self.control.close()
        self._close_pidfd()

    def disown(self) -> None:
        """In a forked child: the worker is the parent's."""
        self.calls.close()
        self.control.close()
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        number, self._pidfd = self._pidfd, None
        if number is not None:
            os.close(number)


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()
    _forked.append(None)
    # Or the exit would join them. One may be just about to start, and not known to its lane.
    children: set[Any] = vars(multiprocessing.process)["_children"]
    children -= {child for child in children if isinstance(child.name, _Name)}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
