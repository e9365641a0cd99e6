"""
When the machine has no more to give: threads, memory, stack, file descriptors.
"""

import os
import subprocess
import sys
import threading

import pytest

from fastpool import TaskGroup

GIL = not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled()

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


@pytest.mark.parametrize("how", ["submit", "map", "fail", "nest"])
@pytest.mark.parametrize("pool", ["None", "ThreadPool(2)"])
def test_any_one_allocation_of_a_worker_may_fail(pool, how):
    """
    For real: the block is left, every handle ends, and the next group has all its workers.
    """
    pytest.importorskip("_testcapi", reason="this Python has nothing to make allocations fail")
    if not GIL:
        pytest.skip("any thread could meet it, those of a pool's own too, which loses a job then")
    if how == "fail" and (3, 12) <= sys.version_info < (3, 14):
        pytest.skip("this Python itself crashes if there is no memory for a generator")
    said = run_limited(
        f"""
import faulthandler, _testcapi
from multiprocessing.pool import ThreadPool
from fastpool import _taskgroup
from fastpool._ledger import Ledger
from fastpool.backends import threads

faulthandler.dump_traceback_later(150, exit=True)
sys.unraisablehook = id  # what a finalizer has no memory for is told there
asleep = threading.Event()
failure = ValueError("of the task")

class Gate(_taskgroup.Gate):
    # Who leaves the block has all the memory there is; it is the workers that have not.
    __slots__ = ()

    def wait(self, timeout=None):
        if timeout is None or timeout > 1:
            asleep.set()
        try:
            return super().wait(timeout)
        finally:
            _testcapi.remove_mem_hooks()

_taskgroup.Gate = Gate
job = threads.Shared._job

def our_job(*args):
    try:
        job(*args)
    finally:
        _testcapi.remove_mem_hooks()  # a `ThreadPool` that has none for a result is lost

threads.Shared._job = our_job
failed = Ledger.failed

def our_failed(*args):
    if args[-1] is failure:  # only now: CPython has faults where it cannot raise
        _testcapi.set_nomemory(step, step + 1)
    failed(*args)

Ledger.failed = our_failed

def task(item):
    asleep.wait(60)
    if {how!r} == "fail":
        raise failure
    _testcapi.set_nomemory(step, step + 1)

def nest(group):
    group.submit(task, 1).result()

pool = {pool}
outcomes = set()
for step in range(60):
    asleep.clear()
    if pool is not None:
        pool.apply(int)  # its own threads are through with the jobs before
    tasks = []
    try:
        with TaskGroup(1, pool=pool) as group:
            if {how!r} == "map":
                tasks.extend(group.map(task, [1]).tasks)
            elif {how!r} == "nest":
                tasks.append(group.submit(nest, group))
            else:
                tasks.append(group.submit(task, 1))
    except (MemoryError, ValueError) as error:
        outcomes.add(type(error).__name__)
    else:
        outcomes.add("quiet")
    _testcapi.remove_mem_hooks()
    assert all(task.done() and not task.running() for task in tasks), (step, tasks)
    together = threading.Barrier(2, timeout=60)
    with TaskGroup(2, pool=pool) as group:
        batch = group.map(lambda _: together.wait(), range(2))
    assert sorted(batch.results()) == [0, 1], step
print("MemoryError" in outcomes)
if pool is not None:
    pool.close()
    pool.join()
"""
    )

    assert said == ["True"]


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
gc.disable()  # no finalizer that it would call there has room to run
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
