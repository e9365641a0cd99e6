"""
A program that ends while a group is open.
"""

import os
import subprocess
import sys

import pytest


def run_script(source):
    """Run a program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_thread_that_goes_on_submitting_does_not_hold_the_program():
    """
    What it submitted before is done, and then it is refused.
    """
    ended = run_script(
        """
import atexit, os, threading

@atexit.register  # called after fastpool's own, since registered before it
def late():
    try:
        group.submit(os.write, 1, b"late")
    except GroupClosedError as error:
        os.write(1, str(error).encode())

from fastpool import GroupClosedError, TaskGroup

begun = threading.Event()
group = TaskGroup(2, name="feed")

def produce():
    with group:
        while True:
            try:
                group.submit(os.write, 1, b"fed ").wait()
            except GroupClosedError:
                return
            begun.set()

threading.Thread(target=produce, daemon=True).start()
begun.wait(60)
"""
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("fed ")
    assert ended.stdout.endswith("cannot submit write() to group 'feed': its with block has ended")


def test_task_of_an_open_group_may_submit_while_the_program_ends():
    """
    Nothing of an open group is cut off: what its tasks submit is done as well.
    """
    ended = run_script(
        """
import atexit, os, threading
from fastpool import TaskGroup

over = threading.Event()
atexit.register(over.set)  # called before fastpool's own, since registered after it

def parent():
    over.wait(60)
    group.submit(os.write, 1, b"child")

group = TaskGroup(2)
group.__enter__()
group.submit(parent)
"""
    )

    assert (ended.stdout, ended.stderr) == ("child", "")


def test_group_that_is_open_takes_nothing_from_others_while_the_program_ends():
    """
    Or it might never end.
    """
    ended = run_script(
        """
import atexit, os, threading
from fastpool import GroupClosedError, TaskGroup

over, refused = threading.Event(), threading.Event()
atexit.register(over.set)  # called before fastpool's own, since registered after it

def produce():
    over.wait(60)
    while not refused.is_set():
        try:
            group.submit(abs, 1).wait()
        except GroupClosedError as error:
            os.write(1, str(error).encode())
            refused.set()

group = TaskGroup(2, name="feed")
group.__enter__()
group.submit(refused.wait, 60)
threading.Thread(target=produce, daemon=True).start()
"""
    )

    assert ended.stderr == ""
    assert ended.stdout == "cannot submit abs() to group 'feed': the interpreter is exiting"


def test_error_of_a_block_that_is_left_after_the_programs_end_is_not_swallowed():
    """
    The group has been finished by then, but the body's own error is its thread's.
    """
    ended = run_script(
        """
import atexit, os, threading

@atexit.register  # called after fastpool's own, since registered before it
def late():
    over.set()
    thread.join(60)

from fastpool import TaskGroup

begun, over = threading.Event(), threading.Event()

def leave():
    try:
        with TaskGroup(1):
            begun.set()
            over.wait(60)
            raise ValueError("mine")
    except ValueError as error:
        os.write(1, str(error).encode())

thread = threading.Thread(target=leave, daemon=True)
thread.start()
begun.wait(60)
"""
    )

    assert (ended.stdout, ended.stderr) == ("mine", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_handler_raises_as_a_forked_child_leaves_its_parents_group_leaves():
    """
    Also at the last lines. Nobody is told there that the group has ended.
    """
    ended = run_script(
        """
import os
from fastpool import TaskGroup, _guard

let_go = _guard.let_go

def interrupted(run):
    _guard.let_go = let_go
    raise LookupError("told to stop")

events = []
try:
    with TaskGroup(1, observers=[lambda event: events.append(event.name)]):
        child = os.fork()
        if child == 0:
            _guard.let_go = interrupted
except LookupError as error:
    os.write(1, f"{error} {events}".encode())
    os._exit(0)
os.waitpid(child, 0)
"""
    )

    assert (ended.stdout, ended.stderr) == ("told to stop ['group_opened']", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_leaves_its_parents_groups_in_any_order():
    """
    The inner one is none of its own, so it does not cancel that, nor warn of it.
    """
    ended = run_script(
        """
import os
from fastpool import TaskGroup

with TaskGroup(1) as outer, TaskGroup(1) as inner:
    child = os.fork()
    if child == 0:
        outer.__exit__(None, None, None)
        os.write(1, str(inner.token.cancelled()).encode())
        os._exit(0)
    os.waitpid(child, 0)
"""
    )

    assert (ended.stdout, ended.stderr) == ("False", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_leaves_a_group_that_was_dropped_to_its_parent():
    """
    It is the parent that tells of its end.
    """
    ended = run_script(
        """
import os, warnings
import fastpool
from fastpool import TaskGroup

warnings.simplefilter("ignore")
parent = os.getpid()

def tell(event):
    where = "parent" if os.getpid() == parent else "child"
    os.write(1, f"{event.name} in the {where}, ".encode())

group = TaskGroup(1, observers=[tell])
group.__enter__()
del group
child = os.fork()
if not child:
    fastpool.map(abs, [-1])
    fastpool.shutdown()
    os._exit(0)
os.waitpid(child, 0)
fastpool.shutdown()
"""
    )

    assert ended.stderr == ""
    assert ended.stdout == (
        "group_opened in the parent, group_cancelled in the parent, group_closed in the parent, "
    )


def test_interrupt_that_is_held_back_while_the_program_ends_is_told():
    """
    Nothing can be given it any more.
    """
    ended = run_script(
        """
import signal
from fastpool import TaskGroup

def tell(event):
    if event.name == "group_closed":
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
group = TaskGroup(observers=[tell])
group.__enter__()
"""
    )

    assert "the interpreter's exit" in ended.stderr
    assert ended.stderr.endswith("KeyboardInterrupt: \n")


def test_group_that_is_open_at_the_end_is_closed_like_any_other():
    """
    Its judge is asked, its observers are told, and its failure goes to standard error.
    """
    ended = run_script(
        """
import os
from fastpool import TaskGroup

class Policy:
    def start(self):
        return self
    def outcome(self, task, error):
        return False
    def end(self, failures):
        os.write(1, f"{len(failures)} failure\\n".encode())
        return failures[0].exception

def fail():
    raise ValueError("too late")

def tell(event):
    os.write(1, event.name.encode() + b" ")

group = TaskGroup(policy=Policy(), observers=[tell])
group.__enter__()
group.submit(fail)
"""
    )

    assert ended.stdout == (
        "group_opened task_submitted task_started task_failed 1 failure\ngroup_closed "
    )
    assert "ValueError: too late" in ended.stderr
    assert "still open at exit; in task 'fail', submitted at " in ended.stderr


@pytest.mark.parametrize("on_stuck", ["wait", "abandon"])
def test_task_that_does_not_stop_is_reported_while_the_program_ends(on_stuck):
    """
    It was cancelled and goes on: it is waited for, or left by name where that was asked for.
    """
    ended = run_script(
        f"""
import threading, warnings
from fastpool import TaskGroup

warnings.simplefilter("default")
over = threading.Event()

def stubborn():
    begun.set()
    over.wait({60 if on_stuck == "wait" else ""})

def tell(event):
    print(event.name, flush=True)
    if event.name == "task_stuck" and {on_stuck == "wait"}:
        over.set()

begun = threading.Event()
group = TaskGroup(1, name="last", grace=0.01, on_stuck={on_stuck!r}, observers=[tell])
group.__enter__()
group.submit(stubborn)
begun.wait(60)
group.cancel()
"""
    )

    *_, first, second, last = ended.stdout.split()
    assert "task 'stubborn' of group 'last' still runs in thread 'fastpool-last-1'" in ended.stderr
    assert last == "group_closed"
    if on_stuck == "wait":
        assert {first, second} == {"task_stuck", "task_succeeded"}
        assert "StuckTaskError" not in ended.stderr
    else:
        assert [first, second] == ["task_stuck", "task_abandoned"]
        assert "StuckTaskError: group 'last' was left while tasks still ran" in ended.stderr


def test_daemon_thread_enters_no_group_any_more():
    """
    Its tasks would be cut off.
    """
    ended = run_script(
        """
import atexit, threading

@atexit.register  # called after fastpool's own, since registered before it
def late():
    go.set()
    feed.join(60)

def enter():
    go.wait(60)
    try:
        with fastpool.TaskGroup(1, name="jobs") as group:
            print("entered")
    except RuntimeError as error:
        print(error)

import fastpool
go = threading.Event()
feed = threading.Thread(target=enter, name="feed", daemon=True)
feed.start()
"""
    )

    assert ended.stdout == (
        "cannot enter group 'jobs' in 'feed': the interpreter is exiting, and would cut off "
        "what a daemon thread is at\n"
    )
    assert ended.stderr == ""


def test_group_that_a_daemon_thread_is_about_to_enter_is_ended():
    """
    As the exit finds it: the thread is cut off there, and the group has no tasks.
    """
    ended = run_script(
        """
import threading
import fastpool
from fastpool._run import Run

def open_late(run, *args, **options):
    opening.set()
    threading.Event().wait()

def enter():
    with fastpool.TaskGroup(1):
        pass

opening = threading.Event()
Run.open = open_late
threading.Thread(target=enter, daemon=True).start()
opening.wait(60)
"""
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_handles_of_a_parents_group_answer_in_a_forked_child():
    """
    They are cancelled there, with that reason, and nothing of the parent's is run.
    """
    ended = run_script(
        """
import os, warnings
import fastpool
from fastpool import TaskCancelledError, TaskGroup

warnings.simplefilter("ignore")  # newer versions warn of a fork with threads
with TaskGroup(1) as idle, TaskGroup(1) as group:
    idle.submit(abs, 1).result()
    group.token.on_cancel(lambda: os.write(1, b"told"))
    sleeper = group.submit(fastpool.sleep, 60)
    batch = group.map(abs, [1, 2])
    while not sleeper.running():
        pass
    child = os.fork()
    if not child:
        for task in (sleeper, *batch.tasks):
            try:
                task.result()
            except TaskCancelledError as error:
                assert "the process that this one was forked from" in str(error)
            assert task.done() and task.cancelled() and not task.cancel()
            assert task.wait(1) and repr(task)
        assert group.failures == ()
        os.write(1, b"fine")
        os._exit(0)
    os.waitpid(child, 0)
    sleeper.cancel()
"""
    )

    assert (ended.stdout, ended.stderr) == ("fine", "")


def test_group_that_was_dropped_open_is_not_cut_off():
    """
    Its tasks were told to stop, and the program ends when the one that runs has ended.
    """
    ended = run_script(
        """
import atexit, os, sys, threading, time, warnings
from fastpool import TaskGroup

warnings.simplefilter("ignore")
running = threading.Event()

def main_thread_waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    return frame.f_globals["__name__"] == "fastpool._gate"

def work():
    running.set()
    over.wait(60)
    while not main_thread_waits():  # for this task: else it is cut off in here
        time.sleep(0.001)
    os.write(1, b"done")

over = threading.Event()
atexit.register(over.set)  # called before fastpool's own, since registered after it

def enter():
    group = TaskGroup(1)
    group.__enter__()
    group.submit(work)
    group.submit(os.write, 1, b"never")
    running.wait(60)

enter()
"""
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done", "")


def test_ctrl_c_while_threads_are_started_hangs_nothing():
    """
    An interrupt that arrives as the main thread starts a thread leaves no pool half made.
    """
    ended = run_script(
        """
import signal, threading, time
import fastpool
from fastpool import TaskGroup, sleep

start, hits = threading.Thread.start, []

def interrupted_start(thread):
    start(thread)
    if not hits:
        hits.append(threading.current_thread())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread.start = interrupted_start
fastpool.shutdown()
for delay in range(200):
    hits.clear()
    try:
        with TaskGroup(4) as group:
            for _ in range(4):
                group.submit(sleep, 60)
            time.sleep(60)
    except KeyboardInterrupt:
        pass
    else:
        raise SystemExit("the interrupt was lost")
    fastpool.shutdown()
deadline = time.monotonic() + 20
while threading.active_count() > 1 and time.monotonic() < deadline:
    fastpool.shutdown()  # a helper may not have been idle yet
print(len(hits), threading.active_count())
"""
    )

    assert (ended.stdout, ended.stderr) == ("1 1\n", "")


AT_THE_END = {
    "right after a group": (
        """
with TaskGroup(2) as group:
    print(group.map(abs, [1, -2]).results())
""",
        "[1, 2]",
    ),
    "inside a group": (
        """
with TaskGroup(2) as group:
    group.submit(fastpool.sleep, 60)
    sys.exit("left")
""",
        None,
    ),
    "in a daemon thread's group": (
        """
begun, over = threading.Event(), threading.Event()
def serve():
    with TaskGroup(2) as group:
        group.submit(over.wait, 60)
        group.submit(print, "ran")
        begun.set()
threading.Thread(target=serve, daemon=True).start()
begun.wait(60)
atexit.register(over.set)
""",
        "ran",
    ),
    "in another thread's group": (
        """
def serve():
    with TaskGroup(2) as group:
        main.join(60)
        group.submit(print, "ran")
main = threading.main_thread()
threading.Thread(target=serve).start()
""",
        "ran",
    ),
    "in another thread's group that has a worker": (
        """
def serve():
    with TaskGroup(1) as group:
        group.submit(warm.set)
        main.join(60)
        group.submit(print, "ran")
warm, main = threading.Event(), threading.main_thread()
threading.Thread(target=serve).start()
warm.wait(60)
""",
        "ran",
    ),
    "with an atexit callback that uses a warm pool": (
        """
fastpool.map(abs, [1])
@atexit.register
def last():
    print(fastpool.map(abs, [1, -2]))
""",
        "[1, 2]",
    ),
    "with a finalizer that uses a group": (
        """
class Last:
    def __del__(self, TaskGroup=TaskGroup, print=print, abs=abs):
        try:
            with TaskGroup(2) as group:
                group.submit(abs, 1)
        except RuntimeError as error:
            print(error)
builtins.last = Last()
""",
        "can't start a thread: the interpreter is exiting",
    ),
    "with a finalizer that sets a deadline": (
        """
class Last:
    def __del__(self, CancelToken=fastpool.CancelToken, print=print):
        try:
            CancelToken(timeout=60)
        except RuntimeError as error:
            print(error)
builtins.last = Last()
""",
        "can't start a thread: the interpreter is exiting",
    ),
    "with a finalizer that cancels": (
        """
class Last:
    def __del__(self, token=fastpool.CancelToken(), print=print):
        token.on_cancel(lambda: print("told"))
        print(token.cancel(), token.wait(1))
builtins.last = Last()
""",
        "told\nTrue True",
    ),
    "with a finalizer that submits to an open group": (
        """
group = TaskGroup(2, name="open")
class Last:
    def __del__(self, submit=group.submit, print=print, abs=abs):
        try:
            submit(abs, 1)
        except RuntimeError as error:
            print(error)
group.__enter__()
builtins.last = Last()
""",
        "cannot submit abs() to group 'open': its with block has ended",
    ),
    "with a task left behind": (
        """
import warnings
warnings.simplefilter("ignore")
try:
    with TaskGroup(2, grace=0.01, on_stuck="abandon") as group:
        task = group.submit(time.sleep, 60)
        while not task.running():
            time.sleep(0.001)
        group.cancel()
except fastpool.StuckTaskError as error:
    print(type(error).__name__)
""",
        "StuckTaskError",
    ),
}


@pytest.mark.parametrize("case", AT_THE_END)
def test_program_ends(case):
    """
    It does not hang, prints no traceback of ours, and cuts no task off in silence.
    """
    if case == "in another thread's group" and (3, 12) <= sys.version_info < (3, 12, 2):
        pytest.skip("Python 3.12.0 and 3.12.1 start no thread once the main thread has ended")
    source, said = AT_THE_END[case]
    ended = run_script(
        f"import atexit, builtins, sys, threading, time, fastpool\n"
        f"from fastpool import TaskGroup\n{source}"
    )

    if said is None:
        assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "left\n")
    else:
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{said}\n", "")


def test_fork_in_a_task_leaves_the_child_a_working_fastpool():
    """
    It has a group of its own, and Ctrl-C is Python's again; the parent's task goes on.
    """
    ended = run_script(
        """
import os, signal, warnings
from fastpool import TaskGroup, map

warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, to be sure

def forks():
    child = os.fork()
    if child == 0:
        try:
            assert map(abs, [1, -2]) == [1, 2]
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                os.write(1, b"child ")
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]

with TaskGroup(2) as group:
    task = group.submit(forks)
    group.wait()
    os.write(1, b"parent %d" % task.result())
"""
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "child parent 0", "")


@pytest.mark.skipif(
    sys.version_info < (3, 13), reason="the interpreters of older versions are not for use"
)
def test_subinterpreter_is_told_that_it_has_no_threads():
    """
    A token works there; a group's tasks would need daemon threads.
    """
    inside = """
import fastpool

token = fastpool.CancelToken()
assert token.cancel() and token.cancelled()
try:
    with fastpool.TaskGroup(2) as group:
        group.submit(abs, 1)
except RuntimeError as error:
    print(error, flush=True)
"""
    ended = run_script(
        f"""
import sys
import _interpreters

inner = _interpreters.create()
_interpreters.exec(inner, f"import sys; sys.path[:] = {{sys.path}}")
error = _interpreters.exec(inner, {inside!r})
assert error is None, error
_interpreters.destroy(inner)
"""
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (
        "can't start a thread: fastpool needs daemon threads, and a subinterpreter has none; "
        "use it in the main interpreter\n"
    )


def test_group_in_an_abandoned_task_does_not_hold_the_program():
    """
    Its tasks are left behind with it. One that was opened later is finished as any other.
    """
    ended = run_script(
        """
import time, warnings
import fastpool
from fastpool import TaskGroup

warnings.simplefilter("ignore")

def outer():
    with TaskGroup(1) as inner:
        inner.submit(time.sleep, 600)

def inner_runs():
    tasks = [task for group in fastpool.dump() for task in group.tasks]
    return any(inner.tasks for task in tasks for inner in task.groups)

try:
    with TaskGroup(1, grace=0.1, on_stuck="abandon") as group:
        task = group.submit(outer)
        while not inner_runs():
            time.sleep(0.001)
        group.cancel()
except fastpool.StuckTaskError:
    print("left", end="")

last = TaskGroup(1, observers=[lambda event: print(";", event.name, end="")])
last.__enter__()
"""
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "left; group_opened; group_closed"


def test_child_that_a_task_forks_has_its_signals_back():
    """
    SIGTERM ends it, though a group of the parent's hears that signal.
    """
    ended = run_script(
        """
import os, signal, time, warnings
import fastpool
from fastpool import TaskGroup

warnings.simplefilter("ignore", DeprecationWarning)

def forks():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with TaskGroup(1) as group:
    fastpool.cancel_on_signals(group, signal.SIGTERM)
    print(group.submit(forks).result(), end="")
"""
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "-15", "")


def test_threads_leave_no_semaphore_behind_in_a_process_that_is_killed():
    """
    They have none that others could find by a name, whatever way processes are started.
    """
    ended = run_script(
        """
import multiprocessing
from multiprocessing import resource_tracker
multiprocessing.set_start_method("spawn")
kinds = []
resource_tracker.register = lambda name, kind: kinds.append(kind)

import fastpool
with fastpool.TaskGroup() as group:
    group.submit(abs, -1)
print(kinds)
"""
    )

    assert (ended.stdout, ended.stderr) == ("[]\n", "")
