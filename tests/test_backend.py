"""
The seam where tasks get to workers: a backend of somebody else's, and what threads promise beyond.
"""

import os
import random
import sys
import threading

import pytest

import fastpool
from fastpool import CancelToken, GroupClosedError, TaskGroup
from fastpool._lane import Lane
from fastpool.backends import Backend


class Batches:
    """A backend in the way of a remote one: its lanes take tasks by the batch, and then end."""

    slots = 2
    remote = False

    def __init__(self):
        self.taken = []
        self.ended = 0

    def start_lane(self, run):
        lane = Lane(self)
        run.enlist(lane)
        threading.Thread(target=self.serve, args=(run, lane)).start()

    def serve(self, run, lane):
        if not run.begin(lane):
            return
        lane.serve_here()
        while tasks := run.take(lane, 3):
            self.taken.append(len(tasks))
            for position, task in enumerate(tasks):
                if run.stopping():
                    run.give_back(tasks[position:])
                    break
                run.perform(task, lane)
        run.dismiss(lane)

    def cancel(self, run):
        pass

    def escalate(self, run, level):
        return False

    def end(self, run):
        self.ended += 1

    def abandon(self, run):
        pass


def test_group_runs_on_any_backend():
    """
    Results, the first failure and the end come by the same rules.
    """
    backend = Batches()
    release = threading.Event()

    with TaskGroup(pool=backend) as group:
        group.map(release.wait, [10, 10])
        squares = group.map(pow, range(50), [2] * 50)
        release.set()
    release.clear()
    with pytest.raises(ZeroDivisionError), TaskGroup(pool=backend) as failing:
        failing.map(release.wait, [10, 10])
        batch = failing.map(lambda number: 1 // (number - 3), range(100))
        release.set()

    assert isinstance(backend, Backend)
    assert squares.results() == [number**2 for number in range(50)]
    assert max(backend.taken) == 3
    assert all(task.done() for task in batch.tasks)
    assert any(task.cancelled() for task in batch.tasks)
    assert backend.ended == 2


# --- Storms ---------------------------------------------------------------------------------------


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_storm_of_submits_at_the_end(hasty):
    """
    Threads that submit while the block ends are either served inside it or refused.
    """
    for _ in range(400):
        tasks = []
        go = threading.Barrier(3)

        def feed(group, go=go, tasks=tasks):
            go.wait(timeout=20)
            for _ in range(5):
                try:
                    tasks.append(group.submit(pow, 2, 3))
                except GroupClosedError:
                    return

        with TaskGroup(3) as group:
            threads = [threading.Thread(target=feed, args=(group,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            go.wait(timeout=20)
            group.submit(pow, 2, 3)
        for thread in threads:
            thread.join(timeout=20)

        assert all(task.result(timeout=0) == 8 for task in tasks)


def test_storm_of_failures(hasty):
    """
    Wherever the failing task stands, every handle is done when the block is left.
    """
    chance = random.Random(5)

    def fail():
        raise ValueError("root")

    for number in range(400):
        bad = chance.randrange(20)
        with pytest.raises(ValueError, match="root"), TaskGroup(4) as group:
            tasks = [group.submit(fail if at == bad else int) for at in range(20)]
            if number % 3 == 0:
                for task in tasks:
                    task.wait(timeout=20)

        assert all(task.done() for task in tasks)
        assert len(group.failures) == 1


def test_storm_of_cancels(hasty):
    """
    A task that was cancelled in time never runs; any other has its value.
    """
    for _ in range(400):
        ran = []
        with TaskGroup(3) as group:
            tasks = [group.submit(ran.append, at) for at in range(10)]
            told = [task.cancel() for task in tasks]

        for at, (task, won) in enumerate(zip(tasks, told, strict=True)):
            assert task.cancelled() is (at not in ran)
            assert won or not task.cancelled()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_storm_of_tasks_that_wait_for_their_own(hasty, workers):
    """
    A tree of tasks that wait for tasks of the same group ends on however few workers.
    """

    def grow(group, depth):
        if depth == 0:
            return 1
        left, right = group.submit(grow, group, depth - 1), group.submit(grow, group, depth - 1)
        return left.result() + right.result()

    for _ in range(20):
        with TaskGroup(workers) as group:
            task = group.submit(grow, group, 5)

        assert task.result() == 32


# --- Forks ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_child_of_a_fork_has_a_working_fastpool():
    """
    The parent's open group is closed there and waited for by nobody; new ones work, deadlines too.
    """
    release = threading.Event()
    parent_token = CancelToken(timeout=3600)
    with TaskGroup(2, timeout=3600) as group:
        running = group.submit(release.wait, 30)
        while not running.running():
            pass
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with pytest.raises(GroupClosedError, match="process"):
                    group.submit(pow, 2, 3)
                group.__exit__(None, None, None)
                with TaskGroup(2) as own:
                    task = own.submit(pow, 2, 3)
                assert task.result() == 8
                assert running.cancelled()
                assert CancelToken(timeout=0.01).wait(20)
                assert not parent_token.cancelled()
                fastpool.shutdown()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        release.set()
        after = group.submit(pow, 2, 3)

    assert os.waitstatus_to_exitcode(status) == 0
    assert after.result() == 8
