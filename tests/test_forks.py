"""
A process that is forked while other threads are in the middle of something: they do not come along.
"""

import _thread
import inspect
import multiprocessing
import os
import resource
import select
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import far
import pytest
from staging import is_asleep, start, until

from fastpool import (
    Cancelled,
    CancelToken,
    FailFast,
    GroupClosedError,
    TaskCancelledError,
    TaskGroup,
    _clock,
    _descriptor,
    _guard,
    _taskgroup,
    _token,
    as_completed,
    blocking,
    use_token,
)
from fastpool._callbacks import Callback, Interrupts, Registration
from fastpool._run import Run
from fastpool.backends import Processes, _process, processes, threads
from fastpool.futures import GroupExecutor

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]

PARENTS = "the process that this one was forked from"


def in_child(check, *args, before=lambda: None):
    """What a function says in a forked child, as text; a hang there says nothing."""
    reader, writer = os.pipe()
    before()
    child = os.fork()
    if child == 0:
        said = b""
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            said = str(check(*args)).encode()
        except BaseException:
            said = traceback.format_exc().encode()
        finally:
            os.write(writer, said)
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0, "it hangs"
    return text


def leave(group, *tasks):
    """What can be said of an open group of the parent's, and of its tasks, once it was left."""
    with pytest.raises(GroupClosedError, match=PARENTS):
        group.submit(abs, -404)
    for task in tasks:
        with pytest.raises(TaskCancelledError, match=PARENTS):
            task.result()
    group.__exit__(None, None, None)
    assert all(task.cancelled() and not task.running() for task in tasks)
    return "left"


@pytest.fixture
def release():
    """What threads are held by, until the test lets them go, or ends."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def hold_at(release):
    """Has the first of the threads started from now stop before a line of some function."""

    def hold(fn, text):
        lines, first = inspect.getsourcelines(fn)
        (at,) = (number for number, line in enumerate(lines, first) if line.strip() == text)
        held = threading.Event()

        def trace(frame, event, argument):
            if frame.f_code is not fn.__code__:
                return None
            if event == "line" and frame.f_lineno == at and not held.is_set():
                held.set()
                release.wait(60)
            return trace

        threading.settrace(trace)
        return held

    yield hold
    threading.settrace(None)


def left_in_the_middle_of_a_submit(group, reached, release):
    """What a child says that leaves a group in which another thread submits; and what that has."""
    producer, submitted = start(group.submit, abs, -2)
    assert reached.wait(60)
    said = in_child(leave, group)
    release.set()
    producer.join(60)
    return said, submitted


# --- Others submit --------------------------------------------------------------------------------


def test_child_leaves_a_group_in_which_another_thread_waits_for_room(release):
    """
    Nobody comes to fill that room there; the parent's goes on.
    """
    with TaskGroup(1, max_queued=1) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        queued = group.submit(abs, -1)
        producer, submitted = start(group.submit, abs, -2)
        until(lambda: group._run.bounded.waiting)
        said = in_child(leave, group, running, queued)
        release.set()
        producer.join(60)

    assert said == "left"
    assert submitted[0].result() == 2


def test_child_leaves_a_group_that_another_thread_tells_of_a_task(release):
    """
    That observer does not return there.
    """
    telling = threading.Event()

    def tell(event):
        if event.name == "task_submitted":
            telling.set()
            release.wait(60)

    with TaskGroup(1, observers=[tell]) as group:
        said, submitted = left_in_the_middle_of_a_submit(group, telling, release)

    assert said == "left"
    assert submitted[0].result() == 2


def test_child_leaves_a_group_in_which_another_thread_starts_a_worker(release, monkeypatch):
    """
    Which never begins there.
    """
    starting = threading.Event()
    start_lane = threads.Leased.start_lane

    def slowly(*args):
        starting.set()
        release.wait(60)
        start_lane(*args)

    monkeypatch.setattr(threads.Leased, "start_lane", slowly)
    with TaskGroup(1) as group:
        said, submitted = left_in_the_middle_of_a_submit(group, starting, release)

    assert said == "left"
    assert submitted[0].result() == 2


@pytest.mark.parametrize("bound", [None, 1])
def test_observer_that_forks_as_it_is_told_of_a_submit(bound):
    """
    In the child the submit comes to its end, and the group is left; in the parent both go on.
    """
    reader, writer = os.pipe()
    forked = []

    def fork(event):
        if event.name == "task_submitted":
            forked.append(os.fork())
            if not forked[0]:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(30)

    with TaskGroup(1, observers=[fork], max_queued=bound) as group:
        try:
            task = group.submit(abs, -2)
            if not forked[0]:
                os.write(writer, leave(group, task).encode())
        finally:
            if not forked[0]:
                os._exit(0)
    os.close(writer)
    os.waitpid(forked[0], 0)
    with open(reader) as said:
        assert said.read() == "left"
    assert task.result() == 2


# --- Others run tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "before"),
    [
        (threads.serve, "entry._taken = True"),
        (threads.serve, "entry._lane = lane"),
        (threads.serve, "lane.at = entry"),
        (threads.serve_stretch, "taken[index] = True"),
        (threads.serve_stretch, "states[index] = lane"),
        (threads.serve_stretch, "lane.at = place = (index, stretch)  # as in `serve`"),
        (Run.take_places, "at._taken = True"),
        (Run.take_places, "at._lane = lane"),
        (Run.take_places, "at[1].items.note(at[0], lane)"),
    ],
)
def test_task_that_a_worker_was_about_to_run_is_cancelled_in_a_child(
    fn, before, hold_at, release, make_pool
):
    """
    However far it has come with that, and whether or not it has said so.
    """
    held = hold_at(fn, before)
    pool = {"pool": make_pool(1)} if fn is Run.take_places else {"max_workers": 1}
    with TaskGroup(**pool) as group:
        if "at[" in before or fn is threads.serve_stretch:
            (task,) = group.map(abs, [-2]).tasks
        else:
            task = group.submit(abs, -2)
        assert held.wait(60)
        said = in_child(leave, group, task)
        release.set()

    assert said == "left"
    assert task.result() == 2


def test_tasks_that_a_worker_process_has_are_cancelled_in_a_child(tmp_path, monkeypatch):
    """
    All of those that it was sent at once.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: what comes after is sent at once
    monkeypatch.setattr(processes, "HELD", 300)  # ...and none of it is taken back
    with TaskGroup(pool=Processes(1)) as group:
        before = group.submit(wait_for, tmp_path / "first")
        batch = group.map(wait_for, [tmp_path / "others"] * 100)
        (tmp_path / "first").touch()
        until(before.done)
        until(lambda: len(group._run.in_hand()) and len(next(iter(group._run.lanes)).in_hand()) > 1)
        said = in_child(lambda: (batch.wait(), batch.done(), leave(group, *batch.tasks)))
        (tmp_path / "others").touch()

    assert said == "(True, True, 'left')"
    assert batch.results() == [None] * 100


def wait_for(path):
    """A call that lasts until there is a file."""
    until(path.exists)


def test_child_that_a_task_forks_ends_though_another_worker_has_the_judge(release):
    """
    That one is not there to give it free.
    """
    judging = threading.Event()

    class Slow(FailFast):
        def start(self):
            return Judge()

    class Judge:
        def outcome(self, task, error):
            if task.name == "abs":
                judging.set()
                release.wait(60)
            return False

        def end(self, failures):
            return None

    def forks():
        assert judging.wait(60)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            return None
        status = os.waitpid(child, 0)[1]
        release.set()
        return status

    with TaskGroup(2, policy=Slow()) as group:
        task = group.submit(forks)
        group.submit(abs, -1)

    assert task.result() == 0


# --- This thread waits ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["as_completed", "batch", "imap", "imap_unordered"])
def test_iterator_that_was_begun_ends_in_a_child(kind, release):
    """
    It does not wait for what nobody brings there.
    """

    def hold(index):
        if index:
            release.wait(60)
        return index

    with TaskGroup(2) as group:
        if kind == "as_completed":
            values = as_completed([group.submit(hold, index) for index in range(3)])
        elif kind == "batch":
            values = group.map(hold, range(3)).as_completed()
        else:
            values = getattr(group, kind)(hold, range(3), window=3)
        next(values)
        said = in_child(rest_of, values)
        release.set()
        rest = list(values)

    assert said == ("2" if kind == "as_completed" else "cancelled")
    assert len(rest) == 2


def rest_of(values):
    """How many there still are, if they do not say that they were cancelled."""
    try:
        return len(list(values))
    except TaskCancelledError:
        return "cancelled"


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("waits", ["result", "wait", "as_completed", "leave"])
def test_wait_in_which_a_signal_handler_forks_ends_in_the_child(waits, cancelled, watched):
    """
    It is a thread of the parent's that was to end it.
    """
    release = threading.Event()

    def hold(group):
        if cancelled:
            group.cancel()
        meet_fork(release)
        return "held"

    def wait():
        with TaskGroup(1) as group:
            task = group.submit(hold, group)
            if waits != "leave":
                with use_token(CancelToken.NEVER):
                    if waits == "wait":
                        group.wait()
                    elif waits == "as_completed":
                        assert list(as_completed([task])) == [task]
                    outcome_of(task)
        return outcome_of(task)

    assert said_on_both_sides(wait, release) == ("held", "cancelled")


def test_wait_for_a_worker_in_which_a_signal_handler_forks_ends_in_the_child(watched, monkeypatch):
    """
    Its task has ended, and it was yet to say that it is through with it.
    """
    release, passed, tasks = threading.Event(), Run.passed, []

    def hold(group):
        until(lambda: group._run.fences)
        return "held"

    def pass_late(run, lane):
        if tasks[0].done() and not release.is_set():
            meet_fork(release)
        passed(run, lane)

    def wait():
        with TaskGroup(1) as group:
            tasks.append(group.submit(hold, group))
            until(tasks[0].running)
            with use_token(CancelToken.NEVER), monkeypatch.context() as patch:
                patch.setattr(Run, "passed", pass_late)
                group.wait()
        return outcome_of(tasks[0])

    assert said_on_both_sides(wait, release) == ("held", "held")


@pytest.mark.parametrize("what", ["submit", "close"])
def test_handler_that_forks_while_a_helper_is_at_work_ends_in_the_child(what, watched, monkeypatch):
    """
    It starts a thread for a submit, or runs a callback that is taken back: in the parent alone.
    """
    release, running = threading.Event(), threading.Event()
    start_thread, parent = threads._Pool._start, os.getpid()

    def start_late(*arguments):
        meet_fork(release)
        start_thread(*arguments)

    def submit():
        monkeypatch.setattr(threads._Pool, "_start", start_late)
        with TaskGroup(1) as group:
            task = group.submit(str, "held")
        return outcome_of(task)

    def callback():
        running.set()
        meet_fork(release)

    def close():
        token = CancelToken()
        registration = token._register(Callback(callback, slow=True))
        token.cancel()
        assert running.wait(60)
        registration.close()
        return "held" if os.getpid() == parent else "cancelled"

    play = submit if what == "submit" else close
    assert said_on_both_sides(play, release) == ("held", "cancelled")


@pytest.mark.parametrize("call", ["abandon", "connect"])
def test_call_in_which_a_signal_handler_forks_ends_in_the_child(call, watched):
    """
    A thread of the parent's makes it, which has its value, or its connection, to itself.
    """
    release = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.create_default_context()

    def hold():
        meet_fork(release)
        return "held"

    def hang_up():
        connection, _ = listener.accept()
        hold()
        connection.close()

    def play():
        try:
            if call == "abandon":
                return blocking.abandon(hold)
            blocking.connect(listener.getsockname(), ssl_context=context)
        except RuntimeError as error:
            return str(error)
        except OSError:  # an end in the middle of the handshake
            return "held"

    if call == "connect":
        start(hang_up)
    with listener:
        here, there = said_on_both_sides(play, release)

    assert here == "held"
    assert there == f"this call is made by a thread of {PARENTS}"


def meet_fork(release):
    """Have the main thread's handler fork as that sleeps; the parent goes on."""
    until(lambda: is_asleep(threading.main_thread()))
    signal.raise_signal(signal.SIGUSR1)
    assert release.wait(60)


def said_on_both_sides(play, release):
    """What a function returns here, and in the child that a handler forks in the middle of it."""
    reader, writer = os.pipe()
    forked, said = [], "hung"

    def fork(signum, frame):
        # In the midst of a profiler, perhaps: nothing of the child's would be seen by others.
        forked.append(sys.call_tracing(os.fork, ()))
        if forked[0]:
            release.set()
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)

    before = signal.signal(signal.SIGUSR1, fork)
    try:
        said = play()
    finally:
        signal.signal(signal.SIGUSR1, before)
        if forked == [0]:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(forked[0], 0)
    with open(reader) as heard:
        return said, heard.read()


def outcome_of(task):
    """What a task comes to, in a word."""
    try:
        return task.result()
    except TaskCancelledError:
        return "cancelled"


# --- What is left to other threads ----------------------------------------------------------------


def test_child_does_not_wait_for_a_group_of_its_parents(release):
    """
    Whatever its threads had in hand.
    """
    with TaskGroup(1) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        with use_token(CancelToken.NEVER):
            said = in_child(group.wait)
        release.set()

    assert said == "None"


def test_child_leaves_an_executor_of_a_parents_group(release):
    """
    Its futures are never told what they come to there, as the standard library's are not.
    """
    with TaskGroup(1) as group, GroupExecutor(group) as executor:
        futures = [executor.submit(release.wait, 60), executor.submit(abs, -2)]
        until(futures[0].running)
        said = in_child(lambda: executor.__exit__(None, None, None) or leave(group))
        release.set()

    assert said == "left"
    assert futures[1].result() == 2


def test_child_leaves_a_block_at_the_end_of_its_stack_though_another_thread_did_so(monkeypatch):
    """
    That thread had the lock for it as the child was forked.
    """
    monkeypatch.setattr(_taskgroup, "_locks", {"stretch": threading.Lock()})
    with _taskgroup._locks["stretch"]:
        said = in_child(_taskgroup._limit_by, 0)

    assert said == "None"


def test_callbacks_that_are_about_to_run_as_a_handler_forks_are_the_parents(monkeypatch):
    """
    It returns in the child as well, in the middle of the cancel.
    """
    run_callbacks, forked, ran = _token.run_callbacks, [], []
    reader, writer = os.pipe()

    def fork_and_run(pending):
        forked.append(os.fork())
        run_callbacks(pending)

    monkeypatch.setattr(_token, "run_callbacks", fork_and_run)
    token = CancelToken()
    token.on_cancel(lambda: ran.append("ran"))
    try:
        token.cancel()
    finally:
        if forked == [0]:
            os.write(writer, str((token.cancelled(), ran)).encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(forked[0], 0)

    with open(reader) as heard:
        assert heard.read() == "(True, [])"
    assert ran == ["ran"]


def test_callbacks_that_no_thread_could_be_found_for_are_the_parents(monkeypatch):
    """
    Ctrl-C has left them for later, and the body forks.
    """

    def refuse(*arguments):
        raise RuntimeError("can't start new thread")

    def work():
        with TaskGroup(1) as group:
            group.submit(abs, -2).wait()
        return ran

    ran = []
    with pytest.raises(KeyboardInterrupt), TaskGroup(1) as group:
        group.submit(abs, -1).wait()
        group.token.on_cancel(lambda: ran.append("ran"))
        try:
            with monkeypatch.context() as patch:
                patch.setattr(_thread, "start_new_thread", refuse)
                signal.raise_signal(signal.SIGINT)
        finally:
            with use_token(CancelToken.NEVER):
                said = in_child(work)

    assert said == "[]"
    assert ran == ["ran"]


def test_callbacks_behind_one_that_forks_are_the_parents():
    """
    It returns in the child as well; they are run once.
    """
    token = CancelToken()
    reader, writer = os.pipe()
    ran, forked = [], []

    def fork():
        ran.append("fork")
        forked.append(os.fork())

    token.on_cancel(lambda: ran.append("older"))
    token.on_cancel(fork)
    token.on_cancel(lambda: ran.append("newer"))
    try:
        token.cancel()
        if not forked[0]:
            os.write(writer, " ".join(ran).encode())
    finally:
        if forked == [0]:
            os._exit(0)
    os.close(writer)
    os.waitpid(forked[0], 0)
    with open(reader) as said:
        in_child = said.read().split()

    assert len(ran) == 3
    assert in_child == ran[:2]
    assert in_child[1] == "fork"


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("fork_in_block", [False, True])
def test_child_does_not_wait_for_a_callback_that_another_thread_runs(slow, fork_in_block, release):
    """
    That does not go on there; whether whoever set the token runs it, or a helper.
    """
    running = threading.Event()
    token = CancelToken()

    def callback():
        running.set()
        release.wait(60)

    def leaves_block():
        with pytest.raises(Cancelled):
            block.__exit__(None, None, None)
        return "left"

    if fork_in_block:
        block = Interrupts(token, callback, slow)
        block.__enter__()
        check = leaves_block
    else:
        check = token._register(Callback(callback, slow=slow)).close
    thread, _ = start(token.cancel)
    assert running.wait(60)
    said = in_child(check)
    release.set()
    thread.join(60)

    assert said == ("left" if fork_in_block else "None")
    if fork_in_block:
        leaves_block()


def test_child_does_not_wait_for_a_callback_that_another_thread_takes_back(hold_at, release):
    """
    It was about to say so.
    """
    held = hold_at(Registration.unregister, "entry.finish(token)")
    registration = CancelToken().on_cancel(print)
    thread, taken_back = start(registration.unregister)
    assert held.wait(60)
    said = in_child(lambda: (registration.close(), registration.unregister()))
    release.set()
    thread.join(60)

    assert said == "(None, False)"
    assert taken_back == [True]


def test_child_joins_the_callbacks_that_run_in_itself():
    """
    As its parent does; no matter that their token is older.
    """
    token = CancelToken()
    running, registration = threading.Event(), token.on_cancel(lambda: running.set() or hold())
    held, closed = threading.Event(), []

    def hold():
        held.wait(60)
        closed.append("after")

    def closes():
        start(token.cancel)
        assert running.wait(20)
        thread, _ = start(lambda: (registration.close(), closed.append("closed")))
        until(lambda: registration._entry._waiters)
        held.set()
        thread.join(20)
        return closed

    assert in_child(closes) == "['after', 'closed']"
    registration.close()


def test_child_that_a_far_task_forks_ends_though_callbacks_of_its_token_run(tmp_path):
    """
    Neither the one that a helper of the worker process is at, nor the one that comes after it.
    """
    with TaskGroup(pool=Processes(1)) as group:
        task = group.submit(far.forks_while_callbacks_run, tmp_path / "begun")
        far.seen(tmp_path / "begun")
        group.cancel()

    assert task.result() == 0


def test_child_has_no_worker_process_that_another_thread_starts(release, monkeypatch):
    """
    It would be joined as the child ends, which only its parent can do.
    """
    started = threading.Event()

    class Slow(_process.WorkerProcess):
        def __init__(self, *args):
            super().__init__(*args)
            started.set()
            release.wait(60)

    monkeypatch.setattr(_process, "WorkerProcess", Slow)
    with TaskGroup(pool=Processes(1)) as group:
        task = group.submit(abs, -2)
        assert started.wait(60)
        assert len(multiprocessing.active_children()) == 1
        said = in_child(lambda: (leave(group, task), multiprocessing.active_children()))
        release.set()

    assert said == "('left', [])"
    assert task.result() == 2


# --- Others set tokens ----------------------------------------------------------------------------


class HeldAsItIsSet(CancelToken):
    """A token that stops who sets it, in the process that made it, in the middle of that."""

    __slots__ = ("after", "held", "process", "release")

    def __init__(self, release, *, after):
        super().__init__()
        self.release = release
        self.after = after  # whether it says already why it was set
        self.process = os.getpid()
        self.held = threading.Event()

    def _claim(self, cause):
        if self.after:
            super()._claim(cause)
        elif self._cause is None:
            self._entries.setdefault(_token._CAUSE, cause)
        if os.getpid() == self.process and not self.held.is_set():
            self.held.set()
            self.release.wait(60)
        return super()._claim(cause)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("whose", ["its own", "its first child's"])
def test_token_that_is_being_set_is_set_in_a_child_with_its_descendants(after, whose, release):
    """
    Who waits for one of those there, or sets it, hears what its ancestor was set for.
    """
    if whose == "its own":
        token = half = HeldAsItIsSet(release, after=after)
    else:
        token, half = CancelToken(), HeldAsItIsSet(release, after=after)
        half._link(token)
    last = token.child().child()
    told = []
    last.on_cancel(lambda: told.append("told"))
    thread, _ = start(token.cancel, "rain")
    assert half.held.wait(60)
    tokens = token, half, last
    said = in_child(lambda: [(each.wait(20), each.reason, each.cancel()) for each in tokens] + told)
    release.set()
    thread.join(60)

    assert said == str([(True, "rain", False)] * 3)
    assert told == ["told"]


class Due:
    """Something with a deadline that has passed, which stops the parent's thread that looks."""

    def __init__(self, release, *, as_it_expires):
        self.release = release
        self.process = os.getpid()
        self.as_it_expires = as_it_expires
        self.held, self.expired = threading.Event(), threading.Event()
        self.when = time.monotonic()

    def hold(self):
        if os.getpid() == self.process:
            self.held.set()
            self.release.wait(60)

    def _due(self):
        if not self.as_it_expires:
            self.hold()
        return self.when

    def _expire(self):
        self.hold()
        self.expired.set()


@pytest.mark.parametrize("as_it_expires", [False, True])
def test_deadline_that_the_clock_looks_at_expires_in_a_child(as_it_expires, release):
    """
    It was due, and nothing of that had been done yet.
    """
    target = Due(release, as_it_expires=as_it_expires)
    _clock.add_deadline(target.when, target)
    assert target.held.wait(60)
    said = in_child(lambda: target.expired.wait(20))
    release.set()

    assert said == "True"
    assert target.expired.wait(60)


# --- What the system refuses ----------------------------------------------------------------------


@pytest.fixture(params=["eventfd", "pipe"])
def made_of(request, monkeypatch):
    """What a descriptor is, on this system and on others."""
    # Those that other tests left are eventfds, which a child would try to renew as pipes.
    monkeypatch.setattr(_descriptor, "_descriptors", {})
    if request.param == "pipe":
        monkeypatch.setattr(_descriptor, "sys", SimpleNamespace(platform="", byteorder="big"))


@pytest.fixture
def take_all():
    """Takes all descriptors that the system has for us."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []

    def take():
        last = max(map(int, os.listdir("/dev/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 8, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(0))

    yield take
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for fd in taken:
        os.close(fd)


def is_readable(fd):
    """Whether a descriptor is ready now."""
    return bool(select.select([fd], [], [], 0)[0])


@pytest.mark.usefixtures("made_of")
def test_child_that_has_no_descriptor_free_has_a_switch_of_its_own(take_all, release):
    """
    The number of the one that it takes the place of will do; and it leaves its parent's group.
    """
    token = CancelToken()
    fd = token.fileno()

    def cancels():
        token.cancel()
        return leave(group, running), token.fileno() == fd and is_readable(fd)

    with TaskGroup(1) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        said = in_child(cancels, before=take_all)
        release.set()

    assert said == "('left', True)"
    assert not is_readable(fd)


def test_child_that_is_given_no_descriptor_says_so_where_it_is_asked_for(monkeypatch):
    """
    Its cancels wake nobody in the parent, and work.
    """
    tokens = CancelToken(), CancelToken()
    fds = [token.fileno() for token in tokens]

    def cancels():
        for token in tokens:
            assert token.cancel()
            with pytest.raises(OSError, match="Too many open files"):
                token.fileno()
        return [token.cancelled() for token in tokens]

    def refuse():
        raise OSError("there is none")

    monkeypatch.setattr(_descriptor, "_make_descriptors", refuse)
    said = in_child(cancels)

    assert said == "[True, True]"
    assert not any(map(is_readable, fds))


@pytest.mark.parametrize("module", [_clock, _descriptor, _guard, threads])
def test_child_leaves_its_parents_groups_whatever_fails_as_it_is_forked(
    module, monkeypatch, unraised
):
    """
    That is told to the hook for what nobody can be given.
    """

    def fail():
        raise MemoryError

    monkeypatch.setattr(module, "after_fork", fail)
    with TaskGroup(1) as outer, TaskGroup(1) as group:
        said = in_child(lambda: (leave(group), leave(outer), *map(type, unraised)))

    assert said == "('left', 'left', <class 'MemoryError'>)"
