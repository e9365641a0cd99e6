"""
What every test file may ask for.
"""

import gc
import signal
import sys
import threading
import traceback
from contextlib import ExitStack
from multiprocessing import resource_tracker
from multiprocessing.pool import ThreadPool

import pytest
import services
import structlog
from blocked import descriptors
from staging import note_sleep, sleeping, until

import fastpool
from fastpool import CancelToken

# A shell that was told to run us in the background has us, and our children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """No test leaves a worker behind."""
    before = threads()
    yield

    def ended():
        # Each time: a helper may have been just about to start, by a thread that nobody sees if
        # a signal handler asked for it, and would be idle for a while.
        fastpool.shutdown()
        return threads() <= before

    until(ended, within=60)

    left = threads() - before
    assert not left, [(thread, stack_of(thread)) for thread in left]


def threads():
    """
    The threads that are alive.

    But for those that `threading` has not started, and that are listed for good from the moment
    when something asks for their name; the test runner has some, where finalizers may run.
    """
    return {one for one in threading.enumerate() if not isinstance(one, threading._DummyThread)}


def stack_of(thread):
    """Where a thread is, as text."""
    frame = sys._current_frames().get(thread.ident)
    return "" if frame is None else "".join(traceback.format_stack(frame))


@pytest.fixture(autouse=True)
def no_configuration_is_left():
    """structlog is for each test as it is for a program that begins."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    # It keeps a variable for each name that was ever bound, and from then on fastpool sends them
    # to worker processes with each call.
    structlog.contextvars._CONTEXT_VARS.clear()


@pytest.fixture(scope="session")
def tracker():
    """
    A process of the standard library's, and a pipe to it, which are there for good.

    From Python 3.14 on the first `ThreadPool` starts it, for the lock of a queue that it has.
    """
    resource_tracker.ensure_running()


@pytest.fixture
def no_descriptor_is_left(tracker):
    """The test closes what it opens, and so does the library."""

    def count():
        fastpool.shutdown()
        gc.collect()  # the queues of an ended pool are a cycle
        return descriptors()

    CancelToken.NEVER.fileno()  # is there for good, once somebody has asked for it
    before = count()
    yield
    until(lambda: count() <= before)


@pytest.fixture(scope="session")
def postgres():
    """What to connect to a PostgreSQL server with."""
    with services.postgres() as connection:
        yield connection


@pytest.fixture(scope="session")
def redis_socket():
    """The path of a Redis server's socket."""
    with services.redis() as path:
        yield path


@pytest.fixture
def thorough_shutdown(monkeypatch):
    """`shutdown()` waits until helpers at work have ended, which a busy machine may hold up."""
    monkeypatch.setattr(fastpool._clock, "MOMENT", 30)


@pytest.fixture
def make_pool():
    """Makes pools as users have them, and ends them after the test."""
    with ExitStack() as ending:

        def make(size):
            pool = ThreadPool(size)
            ending.callback(pool.join)
            ending.callback(pool.close)
            return pool

        yield make


@pytest.fixture(params=["own", "shared"])
def workers(request, make_pool):
    """The arguments of a group with so many workers: on fastpool's threads, on a user's pool."""
    if request.param == "own":
        return lambda count: {"max_workers": count}
    return lambda count: {"pool": make_pool(count)}


@pytest.fixture
def watched():
    """Have it noted when threads wait in the library: this one, and those that start from now."""
    fastpool.shutdown()
    threading.setprofile(note_sleep)
    sys.setprofile(note_sleep)
    yield
    sys.setprofile(None)
    threading.setprofile(None)
    sleeping.clear()


@pytest.fixture
def unraised(monkeypatch):
    """What went to `sys.unraisablehook`."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda broken: seen.append(broken.exc_value))
    return seen


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def begun(tmp_path):
    """The file in which tasks of another process note that they have begun."""
    return tmp_path / "begun"


@pytest.fixture
def ended(tmp_path):
    """The file in which tasks note that their clean-up runs."""
    return tmp_path / "ended"


@pytest.fixture
def release(tmp_path):
    """The file for which tasks wait that are to end."""
    return tmp_path / "release"
