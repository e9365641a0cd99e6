"""
Processes for models: threads of the explorer's, which run what a worker process runs.

Their pipes are real. Whoever waits at one waits for the explorer, and a message goes in two parts,
so that a process may die between them. What a dead one still does, nobody sees: it ends where it
would send, receive, run a task, or say in shared memory what it is at.
"""

import contextlib
import os
import pickle
import select
import threading
import types
from multiprocessing.connection import Connection, Pipe
from unittest import mock

import interleave

from fastpool._descriptor import Descriptor
from fastpool.backends import _process, _worker, processes

MESSAGE = 4  # bytes of its length, before each


class Machine(processes.Processes):
    """
    A backend whose processes are threads, for a model, which makes one for itself.

    Attributes:
        started: All there were, in order.
    """

    def __init__(self, workers, **settings):
        super().__init__(workers, **settings)
        self._context = self
        self.started = []
        self._tasks = []

    def __enter__(self):
        poll = types.SimpleNamespace(poll=_Poll, POLLIN=select.POLLIN)
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(processes, "select", poll))
        self._patches.enter_context(mock.patch.object(processes, "Descriptor", _Bell))
        return self

    def __exit__(self, *raised):
        self._patches.close()

    def task(self, fn):
        """A function as it can be sent; it arrives as the very same."""
        task = _Itself(len(self._tasks), fn)
        self._tasks.append(task)
        return task

    def start_worker(self):
        return _Far(self, self._start)

    def Pipe(self):
        return [_End(end) for end in Pipe()]

    def RawValue(self, kind, value):
        return kind(value)

    def Process(self, target, args, name):
        process = Process(-len(self.started) - 1, self._tasks, *args)
        self.started.append(process)
        return process


class _Far(_process.WorkerProcess):
    """One of these, asked for its end itself, since that is no real one's."""

    def has_ended(self):
        return self.process.dead

    def hears(self):
        return True

    def exit_code(self, within):
        self.process.join(within)
        return self.process.exitcode


class Process:
    """
    One process, as the one that starts it sees it, and as the model does.

    Attributes:
        sent: The messages that it has sent whole.
        begun: The numbers of the calls that it has said to be at.
    """

    exitcode = None

    def __init__(self, pid, tasks, calls, control, shared, start):
        self.pid = pid  # which no real one has
        self.tasks = tasks
        self.sent = []
        self.begun = set()
        self.dead = False
        self._ends = calls, control
        self._shared = shared
        self._life, self._lives = Pipe(duplex=False)
        self._over = threading.Event()

    @property
    def sentinel(self):
        return self._life.fileno()

    def start(self):
        self._ends = [_End(end, self) for end in self._ends]
        calls, control = self._ends
        self._worker = _worker.Worker(calls, control, _Shared(self, self._shared))
        for fn in (self._main, self._worker._take_orders):  # `hear` would end us all
            interleave.spawn(self._inside(fn))

    def _inside(self, fn):
        def run():
            _own.process = self
            fn()

        return run

    def _main(self):
        self._ends[0].send_bytes(pickle.dumps(("hello", self.pid)))
        self._worker.serve()
        self.die(0)

    def die(self, code=-9):
        """End, at once; what it has sent by now can be received."""
        if self.dead:
            return
        self.dead = True
        self._worker._told.set()
        for end in self._ends:
            end.close()
            _tell()
        self.exitcode = code
        self._lives.close()
        _tell()
        self._over.set()

    kill = die

    def join(self, timeout=None):
        if self._over.wait(timeout):
            self._life.close()

    def check(self):
        """Go on only if it lives."""
        if self.dead:
            raise interleave.Gone


def here():
    """The process that runs the calling task."""
    return _own.process


class _Itself:
    """What `Machine.task` makes of a function."""

    def __init__(self, number, fn):
        self._number = number
        self._fn = fn
        self.__name__ = fn.__name__

    def __call__(self, *args):
        here().check()
        return self._fn(*args)

    def __reduce__(self):
        return _find, (self._number,)


def _find(number):
    return here().tasks[number]


class _Shared:
    """The shared memory, as the process has it."""

    def __init__(self, process, shared):
        vars(self).update(_process=process, _shared=shared)

    def __getattr__(self, name):
        return getattr(self._shared, name)

    def __setattr__(self, name, value):
        self._process.check()
        setattr(self._shared, name, value)
        if name == "at":
            self._process.begun.add(value)


class _End(Connection):
    """An end of a pipe; a process has a copy of its own."""

    def __init__(self, end, process=None):
        super().__init__(os.dup(end.fileno()))
        self._process = process
        if process is None:
            end.close()

    def _send(self, data):
        length, message = data[:MESSAGE], data[MESSAGE:]
        for part in (length, message):
            self._check()
            super()._send(part)
            if part is message and self._process is not None:
                self._process.sent.append(message)
            _tell()
            interleave.pause()

    def _poll(self, timeout):
        return bool(wait(lambda: self._is_gone() or _readable(self._handle), timeout))

    def _recv(self, size):
        return super()._recv(size, self._read_some)

    def _read_some(self, fd, size):
        self._poll(None)
        self._check()
        data = os.read(fd, size)
        if not data and self._process is not None:
            raise interleave.Gone
        return data

    def _check_closed(self):
        self._check()
        super()._check_closed()

    def _is_gone(self):
        return self._process is not None and self._process.dead

    def _check(self):
        if self._is_gone():
            raise interleave.Gone


class _Poll:
    """Stands where `select.poll` stood."""

    def __init__(self):
        self._fds = []

    def register(self, fd, events):
        self._fds.append(fd)

    def poll(self, milliseconds):
        seconds = None if milliseconds is None else milliseconds / 1000
        return [(fd, select.POLLIN) for fd in wait(lambda: _readable(*self._fds), seconds)]


def _readable(*fds):
    """Those of some descriptors that can be read now, if only to their end."""
    return select.select(fds, (), (), 0)[0]


class _Bell(Descriptor):
    def open(self):
        super().open()
        _tell()


def wait(ready, seconds=None):
    """What a function returns, once that is true or so much time has passed."""
    event = threading.Event()
    _waiting[event] = ready
    try:
        found = ready()
        if not found:
            event.wait(seconds)
            found = ready()
    finally:
        del _waiting[event]
    return found


def _tell():
    """Something can be read now, perhaps."""
    for event, ready in list(_waiting.items()):
        if ready():
            event.set()


_own = threading.local()
_waiting = {}
