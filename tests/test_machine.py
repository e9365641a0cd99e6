"""
When the machine has no more to give: threads, memory, stack, file descriptors.
"""

import os
import subprocess
import sys
import threading

import pytest

from fastpool import TaskGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux has them")


def run_limited(source):
    """Run a program in a fresh interpreter, with what it needs to set limits and look around."""
    prelude = """
import gc, os, resource, sys, threading, time
import fastpool
from fastpool import TaskGroup

def limit_descriptors(more):
    # Those that are free below the highest in use count as well, so use them up.
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more,) * 2)
    used = []
    try:
        while len(used) < highest:
            used.append(os.open("/dev/null", os.O_RDONLY))
            if used[-1] > highest:
                os.close(used.pop())
                break
    except OSError:
        pass
    return used

def limit_threads(most):
    # Each takes a stack of 64 MiB out of what may still be mapped.
    threading.stack_size(64 << 20)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + (most * 64 << 20) + (24 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""
    ended = subprocess.run(
        [sys.executable, "-P", "-W", "always", "-c", prelude + source],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert ended.stderr == ""
    assert ended.returncode == 0
    return ended.stdout.split()


# A pool has three threads of its own besides its workers, and the first is started by a helper.
@pytest.mark.parametrize("most", range(10))
def test_group_goes_on_with_the_threads_that_the_system_has(most):
    """
    With one worker or more everything runs; with none `submit` says so, and nothing is queued.
    """
    ran, threads, after = run_limited(
        f"""
limit_threads({most})
ran, names = [], set()

def work(number):
    names.add(threading.get_ident())
    ran.append(number)
    time.sleep(0.001)

with TaskGroup(8) as group:
    try:
        group.map(work, range(50))
    except (RuntimeError, MemoryError) as error:
        assert not ran, ran
assert group.failures == (), group.failures
fastpool.shutdown()
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(60)  # what a pool that could not start has told to end
print(len(ran), len(names), len(threading.enumerate()) - 1)
"""
    )

    assert (int(ran), int(threads) > 0) in [(50, True), (0, False)]
    assert int(after) == 0


@pytest.mark.parametrize("more", range(6))
def test_group_without_file_descriptors_says_so(more):
    """
    A pool needs four for its own pipes: the error is the system's, and none is left open.
    """
    said, before, after = run_limited(
        f"""
used = limit_descriptors({more})
before = len(os.listdir("/proc/self/fd")) if {more} else 0
with TaskGroup(2) as group:
    try:
        print(sum(group.map(abs, range(4)).results()))
    except OSError as error:
        print(error.errno)
assert group.failures == (), group.failures
fastpool.shutdown()
gc.collect()
after = len(os.listdir("/proc/self/fd")) if {more} else 0
print(before, after)
"""
    )

    assert said in ("6", "24")
    assert before == after


def test_task_that_runs_out_of_memory_fails():
    """
    For real, and with nothing of it kept; the worker goes on.
    """

    def hungry():
        return bytearray(1 << 62)

    with pytest.raises(MemoryError), TaskGroup(1) as group:
        worker = group.submit(threading.current_thread)
        group.submit(hungry)
    with TaskGroup(1) as after:
        assert after.submit(threading.current_thread).result() is worker.result()


@pytest.mark.parametrize("left", range(1, 60, 3))
def test_task_that_fails_near_the_end_of_the_stack_is_recorded(left):
    """
    Its failure leaves the block, however few frames it had left itself; the worker goes on.
    """

    def deeper(depth):
        if depth:
            return deeper(depth - 1)
        raise ValueError("at the bottom")

    with pytest.raises((ValueError, RecursionError)), TaskGroup(1) as group:
        worker = group.submit(threading.current_thread)
        group.submit(deeper, sys.getrecursionlimit() - left)
    with TaskGroup(1) as after:
        assert after.submit(threading.current_thread).result() is worker.result()


def test_task_on_top_of_a_waiting_one_near_the_end_of_the_stack_is_recorded():
    """
    The one worker runs what it waits for down there: what has run is on record as the first
    failure, what has not is cancelled, wherever the stack ends.
    """
    outcomes = []

    def fails(ran):
        ran.append(True)
        raise ValueError("on top")

    def deeper(depth, group, ran, tasks):
        if depth:
            return deeper(depth - 1, group, ran, tasks)
        tasks.append(group.submit(fails, ran))
        return tasks[0].result()

    for left in range(1, 80):
        ran, tasks = [], []
        with pytest.raises((ValueError, RecursionError)) as raised, TaskGroup(1) as group:
            worker = group.submit(threading.current_thread)
            outer = group.submit(deeper, sys.getrecursionlimit() - left, group, ran, tasks)
        with TaskGroup(1) as after:
            assert after.submit(threading.current_thread).result() is worker.result()

        first, *others = [(failure.task, failure.exception) for failure in group.failures]
        assert raised.value is first[1]
        if ran:
            (task,) = tasks
            error = outer.exception()  # that very failure, or there was no room to read it
            assert first == (task, task.exception())
            assert type(first[1]) is ValueError
            assert others == [(outer, error)]
            outcomes.append(f"recorded, and then {type(error).__name__}")
        else:
            assert first == (outer, outer.exception())
            assert others == []
            assert all(task.cancelled() for task in tasks)
            outcomes.append("queued" if tasks else "never submitted")

    assert set(outcomes) == {
        "never submitted",
        "queued",
        "recorded, and then RecursionError",
        "recorded, and then ValueError",
    }


def test_finalizer_may_wait_for_a_task_in_the_middle_of_a_judge():
    """
    The worker that holds the judge's lock runs that task itself, and has its outcome judged.
    """
    answers = []
    outcomes = []

    class Last:
        def __del__(self):
            answers.append(group.submit(abs, -404).result())

    class Judge:
        def start(self):
            return self

        def outcome(self, task, error):
            outcomes.append(task.name)
            if task.name == "first":
                Last()
            return False

        def end(self, failures):
            return None

    with TaskGroup(1, policy=Judge()) as group:
        group.with_options(name="first").submit(abs, 1)

    assert answers == [404]
    assert outcomes == ["first", "abs"]


def test_block_is_left_where_the_stack_is_at_its_end():
    """
    With the error that says so, wherever it comes, and with the limit that there was.
    """
    said = run_limited(
        """
sys.setrecursionlimit(300)  # what it takes grows with the square of that

def walk():
    with TaskGroup(2):
        walk()

for depth in range(8):
    def down(left):
        return down(left - 1) if left else walk()
    try:
        down(depth)
    except RecursionError:
        print("ended")

def leave(group, left):
    return leave(group, left - 1) if left else group.__exit__(None, None, None)

limit = 300
for depth in range(limit - 60, limit):
    group = TaskGroup(2)
    group.__enter__()
    try:
        leave(group, depth)
    except RecursionError:
        if group._entered:
            group.__exit__(None, None, None)
print(sys.getrecursionlimit() == limit, fastpool.dump())
"""
    )

    assert said == ["ended"] * 8 + ["True", "()"]
