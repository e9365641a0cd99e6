"""
How a test brings threads into the order that it is about: it waits for what they have come to,
looks whether they sleep, and acts at a given line of the library's.
"""

import contextvars
import itertools
import linecache
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import fastpool
from fastpool import cancellable


def resize(width):
    """A task that a message can name."""
    return width


def fail(error):
    """A task that fails."""
    raise error


@cancellable
def sleeper(token, started=None):
    """A task that sleeps until it is told to stop, and may say that it has begun."""
    if started is not None:
        started.set()
    token.sleep(60)


def started_sleeper(group):
    """A task that is known to be asleep on its token, or about to be."""
    started = threading.Event()
    task = group.submit(sleeper, started)
    assert started.wait(timeout=10)
    return task


class Secretive:
    """Loads modules whose source nobody is to see."""

    def __init__(self, error):
        self._error = error

    def get_source(self, name):
        raise self._error


def hidden(error=None, *, known=False):
    """
    A function that calls what it is given, the source of which nobody gets to see.

    Args:
        error: What the loader of its module raises; `None`: `ValueError`.
        known: Whether `linecache` has been told of that loader.
    """
    loader = Secretive(error or ValueError("no source"))
    module = {"__name__": "hidden", "__loader__": loader}
    text = "def hidden(call, *args):\n    return call(*args)\n"
    exec(compile(text, "hidden.py", "exec"), module)
    if known:
        assert linecache.lazycache("hidden.py", module)
    return module["hidden"]


def until(condition, *, within=None):
    """Wait for what nothing signals; if it may not come about, no longer than so many seconds."""
    deadline = time.monotonic() + (within or 30)
    while not condition():
        if time.monotonic() > deadline:
            assert within, "it never came about"
            return
        time.sleep(0.001)


def have_idle_threads_wait(seconds, monkeypatch):
    """So long, instead of the ten seconds that they do."""
    fastpool.shutdown()
    patient = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("fastpool") and hasattr(module, "IDLE")
    ]
    assert patient
    for module in patient:
        assert module.IDLE == 10
        monkeypatch.setattr(module, "IDLE", seconds)


sleeping = {}  # a mark for each thread that waits in a call of the library's, while it does


def note_sleep(frame, event, argument):
    """A profile function that notes when its thread begins to wait, and when it goes on."""
    thread = threading.get_ident()
    sleeping.pop(thread, None)
    if event == "c_call" and argument.__name__ == "acquire":
        while frame is not None and frame.f_globals["__name__"] == "threading":
            frame = frame.f_back
        if frame is not None and frame.f_globals["__name__"].startswith("fastpool"):
            sleeping[thread] = object()


def is_asleep(thread):
    """Whether a thread waits in a call of the library's, and goes on waiting."""
    mark, seen = sleeping.get(thread.ident), look(thread.native_id)
    time.sleep(0.002)
    return (
        mark is not None
        and sleeping.get(thread.ident) is mark
        and seen is not None
        and look(thread.native_id) == seen
    )


TELLS = os.access("/proc/self/syscall", os.R_OK)  # whether the system says where a thread is


def look(number, process="self"):
    """
    What the system says of a thread that sleeps: its call, and how often it has gone to sleep.

    Args:
        number: The thread's native number.
        process: The number of its process, if it is another one's.

    Returns:
        None if it does not sleep: on a busy machine it may wait for a processor for long.
    """
    if not TELLS:
        return ()
    try:
        with open(f"/proc/{process}/task/{number}/syscall") as file:
            call = file.read()
        with open(f"/proc/{process}/task/{number}/status") as file:
            said = [line for line in file if line.startswith(("State", "voluntary"))]
    except OSError:  # it has ended
        return None
    return (call, said) if "sleeping" in said[0] and "running" not in call else None


def stop(process):
    """Have a process stop, by its number, with all its threads."""
    os.kill(process, signal.SIGSTOP)
    threads = Path(f"/proc/{process}/task")
    until(lambda: all("State:\tT" in (one / "status").read_text() for one in threads.glob("*")))


def act_at(step, act):
    """A trace function that calls `act` once, at so many lines of the library's from here."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if not frame.f_globals.get("__name__", "").startswith("fastpool"):
            return None
        if event == "line" and next(lines) == step:
            act()
        return trace

    return trace


def trace_this_thread(trace):
    """Trace the calling thread from here, in the functions that it is in as well."""
    frame = sys._getframe(1)
    while frame is not None:
        frame.f_trace = trace
        frame = frame.f_back
    sys.settrace(trace)


def start(fn, *args):
    """A new thread, and the list in which it leaves what the function returns or raises."""
    outcome = []

    def run():
        try:
            outcome.append(fn(*args))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    contextvars.Context().run(thread.start)  # a free-threaded build would hand it ours
    return thread, outcome


def in_thread(fn, *args):
    """What a function returns in a new thread, or the error it raises there."""
    thread, outcome = start(fn, *args)
    thread.join(timeout=60)
    assert outcome, "it hangs"
    return outcome[0]


def nothing_is_left():
    """What a fixture does for a file that keeps its workers from test to test."""
    before = set(threading.enumerate())
    yield

    def ended():
        fastpool.shutdown()
        return set(threading.enumerate()) <= before

    until(ended)

    assert set(threading.enumerate()) <= before
    assert not multiprocessing.active_children()
