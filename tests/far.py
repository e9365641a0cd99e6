"""
What the tests' tasks do, where a worker process can import it. They tell of it by files.
"""

import contextlib
import contextvars
import ctypes
import functools
import multiprocessing.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

from staging import hidden, look, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    TaskGroup,
    _syscalls,
    blocking,
    cancellable,
    checkpoint,
    current_token,
    shield,
    timeout,
)
from fastpool.backends._worker import Worker

VARIABLE = contextvars.ContextVar("VARIABLE", default="nothing")
UNSET = contextvars.ContextVar("UNSET")


# --- Files ----------------------------------------------------------------------------------------


def note(path, line=""):
    """Add a line to a file, all at once."""
    with open(path, "a") as file:
        file.write(f"{line}\n")


def lines(path):
    """What was noted so far."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def seen(path, count=1):
    """Wait until so many lines have been noted."""
    until(lambda: len(lines(path)) >= count)
    return lines(path)


# --- Tasks that end -------------------------------------------------------------------------------


def square(number):
    return number * number


def add(first, second=0, *, third=0):
    return first + second + third


def process(*_):
    return os.getpid()


def echo(value):
    return value


def nest(path):
    """Use processes in this one, and have it noted when this one ends by itself."""
    multiprocessing.util.Finalize(None, note, (path,), exitpriority=-1)
    with TaskGroup(1, pool="processes") as group:
        group.submit(abs, -404)


def noted(path, value):
    """Say that it has begun, and return."""
    note(path, value)
    return value


def fail(error):
    raise error


def fail_after(path, error, count=1):
    """Fail once so many lines have been noted."""
    seen(path, count)
    raise error


def fail_at(bad, number):
    if number == bad:
        raise ValueError(f"no {number}")
    return number


def return_after(path, value=None):
    seen(path)
    return value


def begin_and_hold(begun, release, value=None):
    """Take no notice of any token."""
    note(begun, os.getpid())
    seen(release)
    return value


def large(size, begun=None):
    if begun is not None:
        note(begun, os.getpid())
    return bytes(size)


def both_ways(data):
    return len(data), data


@cancellable
def notes_reason(token: CancelToken, begun, ended):
    """Note why it was cancelled."""
    note(begun, os.getpid())
    token.wait(300)
    note(ended, token.reason)


# --- Tasks that wait ------------------------------------------------------------------------------


def _sleep(token):
    token.sleep(300)


def _wait(token):
    token.wait(300)
    token.check()


def _spin(token):
    while True:
        token.check()


def _each(token):
    for _ in token.each(iter(int, 1)):
        pass


def _checkpoint(token):
    while True:
        checkpoint()


def _current(token):
    fastpool.sleep(300)


def _blocking(token):
    blocking.sleep(300)


def _recv(token):
    near, away = socket.socketpair()
    with near, away, token.interrupts(near):
        near.recv(1)


def _callback(token):
    called = threading.Event()
    with token.interrupts(called.set):
        called.wait(300)


def _select(token):
    near, away = socket.socketpair()
    with near, away:
        blocking.select([near], [], [])


def _group(token):
    with TaskGroup(2) as group:
        group.submit(_bare_sleep)


def _bare_sleep():
    fastpool.sleep(300)


WAYS = {
    name[1:]: wait
    for name, wait in list(globals().items())
    if name in {"_sleep", "_wait", "_spin", "_each", "_checkpoint", "_current", "_blocking"}
    or name in {"_recv", "_callback", "_select", "_group"}
}


@cancellable
def waits(token: CancelToken, way, begun, ended):
    """Wait in one way or another, and note that clean-up runs."""
    note(begun, os.getpid())
    try:
        WAYS[way](token)
    finally:
        note(ended, os.getpid())


@cancellable
def swallows(token: CancelToken, begun):
    note(begun)
    with contextlib.suppress(Cancelled):
        token.sleep(300)
    return "went on"


@cancellable
def tells_reason(token: CancelToken, begun, ended):
    note(begun)
    try:
        token.sleep(300)
    finally:
        note(ended, f"{type(token.reason).__name__}: {token.reason}")


@cancellable
def notes_cause(token: CancelToken, begun, path):
    """Note what kind of failure it was cancelled by."""
    note(begun)
    try:
        token.sleep(300)
    except Cancelled as error:
        note(path, type(error.__cause__).__name__)
        raise


@cancellable
def calls_back(token: CancelToken, begun, called):
    token.on_cancel(functools.partial(note, called, "first"))
    token.on_cancel(functools.partial(note, called, "second"))
    note(begun)
    token.sleep(300)


@cancellable
def cleans_up(token: CancelToken, begun, ended):
    """Clean up under a shield, in which a sleep goes on to its end."""
    note(begun)
    try:
        token.sleep(300)
    finally:
        with shield():
            fastpool.sleep(0.001)
            note(ended, "cleaned up")


@cancellable
def limits_itself(token: CancelToken):
    """A scope of its own ends, and the task goes on."""
    try:
        with timeout(0.01):
            token.check()
            fastpool.sleep(300)
    except TimeoutError:
        return token.cancelled()


@cancellable
def asks_the_time(token: CancelToken):
    return token.deadline, token.remaining(), current_token().remaining()


def given(token, begun):
    """As `waits`, for a function that is not decorated, and given a token by hand."""
    note(begun)
    token.sleep(300)


def sets(token, reason):
    """Set a token as one sets an `Event`, and return."""
    token.set(reason)
    return "returned"


def sets_later(token, release, told):
    """Leave a thread that sets a token some time, and says so."""

    def run():
        seen(release)
        token.set("late")
        note(told)

    threading.Thread(target=run, daemon=True).start()


def catches(token, error):
    """Have a call fail that has a token, and go on."""
    try:
        _fails.with_token(token, error)
    except type(error):
        return "caught"


@cancellable
def _fails(token: CancelToken, error):
    raise error


@cancellable
def method_of_a_check(token: CancelToken):
    """What a check is: the name of the function behind it, where it is defined, and of a poll."""
    return [f"{fn.__module__}.{fn.__qualname__}" for fn in (token.check, token.cancelled)]


@cancellable
def has_a_token(token: CancelToken, value):
    return isinstance(token, CancelToken), token is current_token(), value


class Methods:
    """Has the token injected in every place."""

    def __init__(self, value):
        self.value = value

    @cancellable
    def bound(self, token: CancelToken, more):
        return isinstance(token, CancelToken), self.value, more

    @cancellable
    @staticmethod
    def static(token: CancelToken, more):
        return isinstance(token, CancelToken), more

    @cancellable
    @classmethod
    def of_class(cls, token: CancelToken, more):
        return isinstance(token, CancelToken), cls.__name__, more

    @cancellable
    def __call__(self, token: CancelToken, more):
        return isinstance(token, CancelToken), self.value, more


# --- Contexts -------------------------------------------------------------------------------------


def read_variables():
    return VARIABLE.get(), UNSET.get("unset")


def read_log_context():
    import structlog

    return structlog.contextvars.get_contextvars()


def change_variable():
    VARIABLE.set("changed in a task")
    return VARIABLE.get()


# --- Pickles --------------------------------------------------------------------------------------


class TwoArguments(Exception):
    """Cannot be read from its pickle, as happens to many."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


class HoldsLock(Exception):
    """Cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class ReadThereOnly(Exception):
    """Can be read from its pickle in the process that it comes from, and in no other."""

    def __reduce__(self):
        return _read_there_only, (os.getpid(),)


def _read_there_only(process):
    if process != os.getpid():
        raise LookupError("not here")
    return ReadThereOnly("where it was")


class SaysNothing(SyntaxError):
    """Neither its text nor its traceback can be had."""

    @property
    def filename(self):
        raise LookupError("no file")

    def __str__(self):
        raise LookupError("no text")


class Chained(Exception):
    """Can be compared."""

    def __eq__(self, other):
        return type(other) is Chained and other.args == self.args

    __hash__ = Exception.__hash__


def fails_in_two_arguments():
    raise TwoArguments(7, "seven")


def fails_to_be_read():
    raise ReadThereOnly("where it was")


def fails_to_say_anything():
    raise SaysNothing


def fails_with_lock():
    raise HoldsLock("the disk is full")


def fails_with_notes():
    try:
        raise KeyError("where it began")
    except KeyError as error:
        wrong = Chained("bad header", 7)
        wrong.add_note("look into the log")
        raise wrong from error


def fails_in_a_nested_group():
    with TaskGroup(name="inner") as group:
        group.submit(fail, ValueError("further in"))


def refuse_to_load():
    raise pickle.UnpicklingError("it refuses to be read")


class Unloadable:
    """Is pickled, and cannot be read again."""

    def __reduce__(self):
        return refuse_to_load, ()


class UnloadableThere:
    """Is pickled, and cannot be read in any process but that which made it."""

    def __init__(self):
        self.process = os.getpid()

    def __setstate__(self, state):
        if state["process"] != os.getpid():
            refuse_to_load()


class Mute(Exception):
    """Says nothing: its own text fails."""

    def __str__(self):
        raise LookupError("no text")


class RefusesMutely(Exception):
    """Cannot be pickled, for a reason that says nothing."""

    def __reduce__(self):
        raise Mute


class TakesNoAttribute(Exception):
    """As a frozen dataclass."""

    def __setattr__(self, name, value):
        raise AttributeError(f"cannot assign to field {name!r}")


class HoldsUpWhoReadsIt:
    """Takes its time to be read, and then cannot be."""

    def __init__(self, begun, release):
        self.paths = begun, release

    def __reduce__(self):
        return read_slowly, self.paths


class ReadSlowly:
    """Takes its time to be read."""

    def __init__(self, begun, release):
        self.paths = begun, release

    def __reduce__(self):
        return begin_and_hold, self.paths


def read_slowly(begun, release):
    begin_and_hold(begun, release)
    refuse_to_load()


def raise_mutely():
    raise RefusesMutely


def raise_and_take_no_note():
    raise TakesNoAttribute("no")


def make(kind):
    return kind()


def lock_or(number, bad):
    return threading.Lock() if number == bad else number


def unloadable_or(number, bad):
    return Unloadable() if number == bad else number


# --- Ends -----------------------------------------------------------------------------------------


def die_by(way):
    """End this process, one way or another."""
    if way.startswith("exit "):
        os._exit(int(way.removeprefix("exit ")))
    if way == "segfault":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # no report of it by `faulthandler`
        ctypes.string_at(0)
    if way == "SIGHUP":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored in what `nohup` runs
    os.kill(os.getpid(), int(way) if way.isdigit() else getattr(signal, way))
    while True:
        time.sleep(1)


def worker_of_this_process():
    """The worker that runs what calls this."""
    frame = sys._getframe()
    while not isinstance(frame.f_locals.get("self"), Worker):
        frame = frame.f_back
    return frame.f_locals["self"]


def stop_at_the_answer(size):
    """Return something, and stop for good just before it is sent."""
    worker = worker_of_this_process()
    send = worker._send_now

    def stop(answer):
        os.kill(os.getpid(), signal.SIGSTOP)
        send(answer)

    worker._send_now = stop
    return bytes(size)


def hang_up():
    """As a task does that closes what is not its own."""
    worker_of_this_process()._calls.close()


def die_once(path):
    """End this process the first time, and never again."""
    note(path)
    if len(lines(path)) == 1:
        die_by("SIGKILL")
    return "lived"


def stubborn(begun):
    """Hear nothing."""
    note(begun, os.getpid())
    while True:
        time.sleep(0.01)


def begin_and_hold_hidden(begun, release):
    """The same as `begin_and_hold`, called by code whose source cannot be had."""
    hidden()(begin_and_hold, begun, release)


def hears_no_more(begun):
    """Have the thread break that hears what the parent says, as soon as it says anything."""

    def break_off(*_):
        raise MemoryError("no room")

    worker_of_this_process()._follow = break_off
    stubborn(begun)


def holds_the_lock(begun):
    """Hear nothing, and let no other thread run: one call of C code, without end."""
    note(begun, os.getpid())
    sum(iter(int, 1))


def start_with(path, *args):
    note(path, f"{os.getpid()} {args}")


def start_badly(text):
    raise LookupError(text)


def die_at_start():
    os._exit(5)


def interrupts_of_a_program():
    """Whether a program that is started here has Ctrl-C blocked, and whether it has it ignored."""
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, check=True).stdout
    masks = dict(line.split(b":") for line in status.splitlines())
    return [bool(int(masks[name], 16) >> signal.SIGINT - 1 & 1) for name in (b"SigBlk", b"SigIgn")]


def forks():
    """Return twice: the number of the child, and in the child nothing."""
    return os.fork() or None


def forks_while_callbacks_run(begun):
    """How a child ends that is forked when the token is set, and one of its callbacks runs."""
    running, release = threading.Event(), threading.Event()
    token = current_token()
    token.on_cancel(release.is_set)  # called when the other one has ended
    token.on_cancel(lambda: (running.set(), release.wait(60)))
    note(begun)
    running.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        return None
    status = os.waitpid(child, 0)[1]
    release.set()
    return status


class ForksAsItIsRead:
    """What is read is the number of the child, and in the child nothing."""

    def __reduce__(self):
        return forks, ()


class NotesItsEnd:
    """Notes in which process it was dropped."""

    def __init__(self, path):
        self.path = path

    def __del__(self):
        note(self.path, os.getpid())


def computes(begun):
    """Let no other thread run for a while, which is one call of C code."""
    note(begun, os.getpid())
    return sum(range(30_000_000))


def leaves_child(release):
    """Leave a child that has open all that this process has, as a library in C may."""
    if ctypes.PyDLL(None).fork() == 0:
        until(lambda: lines(release), within=300)
        os._exit(0)
    return os.getpid()


def closes_all(begun):
    """Say nothing any more, and live on."""
    note(begun, os.getpid())
    os.closerange(3, 1_000)
    while True:
        time.sleep(1)


def leaves_thread(begun):
    """Leave a thread running, which is no daemon."""
    threading.Thread(target=time.sleep, args=(300,)).start()
    note(begun)


class Traced:
    """Notes the process in which it is dropped."""

    def __init__(self, path):
        self.path = path

    def __del__(self):
        with contextlib.suppress(AttributeError):  # it is being read, and has no path yet
            note(self.path, os.getpid())

    def method(self):
        return os.getpid()


def worker_of(traced):
    """As `process`, for one that has it as an argument."""
    return os.getpid()


class DeadlyThere:
    """Kills the process that reads it."""

    def __reduce__(self):
        return die_by, ("SIGKILL",)


class ReadAfter:
    """A value, to who reads it; that takes until something is noted in a file."""

    def __init__(self, release, value, begun=os.devnull):
        self.arguments = begun, release, value

    def __reduce__(self):
        return begin_and_hold, self.arguments


class CallableUnloadable(UnloadableThere):
    """A function, to whoever can read it."""

    def __call__(self, value):
        return value


def killed_as_it_writes(begun, size):
    """Return what takes long to write, and be killed in the middle of that."""
    note(begun)
    main = threading.main_thread().native_id
    write = next(
        number for number, name in _syscalls._NUMBERS[os.uname().machine].items() if name == "write"
    )

    def watch():
        while (seen := look(main)) is None or int(seen[0].split()[0]) != write:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return bytes(size)
