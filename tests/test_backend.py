"""
The seam where tasks get to workers: a backend of somebody else's, and what threads promise beyond.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.pool import Pool

import pytest
from staging import in_thread, is_asleep, start, until

import fastpool
from fastpool import (
    CancelToken,
    GroupClosedError,
    StuckTaskError,
    TaskCancelledError,
    TaskGroup,
    current_token,
)
from fastpool._lane import Lane
from fastpool._ledger import Ledger, _Claim
from fastpool._run import Run
from fastpool.backends import Backend, threads
from fastpool.backends.threads import Crew, Leased, Shared, _GrowingPool


class Batches:
    """A backend in the way of a remote one: its lanes take tasks by the batch, and then end."""

    slots = 2
    remote = False

    def __init__(self):
        self.taken = []
        self.ended = 0

    def start_lane(self, run, enlist):
        lane = Lane(self)
        enlist(lane)
        threading.Thread(target=self.serve, args=(run, lane)).start()

    def serve(self, run, lane):
        if not run.begin(lane):
            return
        lane.serve_here()
        while tasks := run.take(lane, 3):
            self.taken.append(len(tasks))
            for position, task in enumerate(tasks):
                if run.stopping():
                    run.give_back(tasks[position:], lane)
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

    def fails_at_three(number):
        release.wait(timeout=60)
        if number > 3:  # or the other lane could be through with them all before that one fails
            current_token().wait(timeout=60)
        return 1 // (number - 3)

    with TaskGroup(pool=backend) as group:
        group.map(release.wait, [10, 10])
        squares = group.map(pow, range(50), [2] * 50)
        release.set()
    release.clear()
    with pytest.raises(ZeroDivisionError), TaskGroup(pool=backend) as failing:
        batch = failing.map(fails_at_three, range(100))
        release.set()

    assert isinstance(backend, Backend)
    assert squares.results() == [number**2 for number in range(50)]
    assert max(backend.taken) == 3
    assert all(task.done() for task in batch.tasks)
    assert any(task.cancelled() for task in batch.tasks)
    assert backend.ended == 2


def test_what_a_lane_gives_back_is_run_by_another_one():
    """
    It is called for that: this one may be busy for long.
    """

    class GivesBack(Batches):
        def serve(self, run, lane):
            me = threading.current_thread()
            came.append(me)
            assert queued.wait(timeout=60)
            if run.begin(lane):
                tasks = run.take(lane, 2)
                if len(tasks) > 1:
                    for other in set(came) - {me}:
                        other.join(timeout=60)
                    run.give_back(tasks[1:], lane)
                if tasks:
                    run.perform(tasks[0], lane)
                run.dismiss(lane)

    both, came, queued = threading.Barrier(2, timeout=60), [], threading.Event()
    with TaskGroup(pool=GivesBack()) as group:
        batch = group.map(lambda number: (both.wait(), number)[1], range(2))
        queued.set()
        ended = batch.tasks[1].wait(timeout=20)  # who leaves would look by itself

    assert ended
    assert batch.results() == [0, 1]


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_task_that_is_left_behind_on_any_backend_is_named():
    """
    The lane says by itself what it is at.
    """
    release = threading.Event()
    with (
        pytest.raises(StuckTaskError) as raised,
        TaskGroup(pool=Batches(), grace=0, on_stuck="abandon") as group,
    ):
        task = group.submit(release.wait, 60)
        until(task.running)
        group.cancel()
    release.set()

    assert "task 'wait'" in raised.value.__notes__[0]


@pytest.mark.parametrize("taken_again", [False, True])
def test_cancel_meets_a_lane_that_gives_its_task_back(taken_again, monkeypatch):
    """
    It never runs, or runs as it was submitted and hears the cancel, where it was taken again.
    """
    held, told, goes_on = {}, [], {}

    def hold_at(owner, name, before):
        step = getattr(owner, name)
        held[name], goes_on[name] = threading.Event(), threading.Event()

        def held_there(*arguments):
            outcome = None if before else step(*arguments)
            if threading.current_thread().name == "canceller":
                held[name].set()
                assert goes_on[name].wait(timeout=60)
            return step(*arguments) if before else outcome

        monkeypatch.setattr(owner, name, held_there)

    hold_at(Ledger, "claim", before=False)
    hold_at(_Claim, "decide", before=True)

    class GivesBack(Batches):
        slots = 1

        def serve(self, run, lane):
            run.begin(lane)
            lane.serve_here()
            tasks = run.take(lane)
            canceller = threading.Thread(
                target=lambda: told.append(tasks[0].cancel("enough")), name="canceller"
            )
            canceller.start()
            assert held["claim"].wait(timeout=60)
            run.give_back(tasks, lane)
            goes_on["claim"].set()
            assert held["decide"].wait(timeout=60)
            if not taken_again:
                goes_on["decide"].set()
                canceller.join(timeout=60)
            again = run.take(lane)
            goes_on["decide"].set()
            canceller.join(timeout=60)
            for task in again:
                run.perform(task, lane)
            run.dismiss(lane)

    with TaskGroup(pool=GivesBack()) as group:
        task = group.submit(lambda *given: (given, current_token().reason), 1, 2)

    assert told == [True]
    if taken_again:
        assert task.result() == ((1, 2), "enough")
    else:
        assert task.cancelled()


@pytest.mark.parametrize("begins", ["after it has looked", "before it is told"])
def test_group_wait_waits_for_what_a_lane_gives_back(begins):
    """
    It was in the hand of that lane alone, which had yet to say so, as the wait began.
    """
    queued, held, goes_on, passes, again = (threading.Event() for _ in range(5))

    class Watched(Lane):
        def in_hand(self):
            if threading.current_thread() in waiters:
                looks.append(None)
                if len(looks) == 2 and begins == "before it is told":
                    goes_on.set()
                    assert passes.wait(timeout=60)
            return super().in_hand()

    class GivesBack(Batches):
        slots = 1

        def start_lane(self, run, enlist):
            lane = Watched(self)
            enlist(lane)
            threading.Thread(target=self.serve, args=(run, lane)).start()

        def serve(self, run, lane):
            assert queued.wait(timeout=60)
            run.begin(lane)
            lane.serve_here()
            first, second = run.take(lane, 2)
            held.set()
            assert goes_on.wait(timeout=60)
            run.give_back([second], lane)
            run.perform(first, lane)
            passes.set()
            until(lambda: all(fence.complete for fence in list(run.fences.values())))
            run.passed(lane)
            assert again.wait(timeout=60)
            while tasks := run.take(lane):
                run.perform(tasks[0], lane)
            run.dismiss(lane)

    def wait():
        waiters.append(threading.current_thread())
        group.wait()
        return [task.done() for task in tasks]

    waiters, looks = [], []
    with TaskGroup(pool=GivesBack()) as group:
        batch = group.map(abs, [-1, -2])
        queued.set()
        tasks = batch.tasks
        assert held.wait(timeout=60)
        waiter, outcome = start(wait)
        until(lambda: len(looks) >= 2)
        goes_on.set()
        until(lambda: outcome or tasks[1] in group._run.watchers)
        again.set()
        waiter.join(timeout=60)

    assert outcome == [[True, True]]


def test_task_that_is_given_back_again_and_again_runs():
    """
    By whichever lane, though it was cancelled in the hand of the first, which tells its token.
    """

    class Hesitant(Batches):
        def serve(self, run, lane):
            if not run.begin(lane):
                return
            lane.serve_here()
            while tasks := run.take(lane):
                self.taken.append(lane)
                if len(self.taken) < 3:
                    tasks[0].cancel()
                    run.give_back(tasks, lane)
                    break
                run.perform(tasks[0], lane)
            run.dismiss(lane)

    backend = Hesitant()
    with TaskGroup(1, pool=backend) as group:
        task = group.submit(abs, -3)

    assert task.result() == 3
    assert len(set(backend.taken)) == 3


def test_lane_that_took_a_cancelled_task_is_not_done_with_the_others(watched, monkeypatch):
    """
    It takes three at once; who waits for the group sleeps until it has run what it may.
    """
    admit, release, held = Run.admit, threading.Event(), threading.Event()
    waiters, seen = [], []

    class Slow(Batches):
        slots = 1

    def admit_late(run, task, lane):
        if task is cancelled:
            held.set()
            until(lambda: waiters and is_asleep(waiters[0][0]))
        return admit(run, task, lane)

    def look():
        waiter, outcome = waiters[0]
        until(lambda: outcome or is_asleep(waiter))
        seen.extend(outcome)

    with TaskGroup(pool=Slow()) as group:
        group.submit(release.wait, 60)
        until(group._run.in_hand)
        group.submit(look)
        cancelled = group.submit(int)
        cancelled.cancel()
        monkeypatch.setattr(Run, "admit", admit_late)
        release.set()
        assert held.wait(timeout=60)
        waiters.append(start(group.wait))
        waiters[0][0].join(timeout=60)

    assert seen == []
    assert waiters[0][1] == [None]


def test_pool_is_idle_from_when_its_group_has_ended():
    """
    Its ten seconds begin then.
    """
    fastpool.shutdown()
    with TaskGroup(1) as group:
        group.submit(abs, 1)
        before = time.monotonic()
    (pool,) = threads._threads.idle

    assert before <= pool.idle_since <= time.monotonic()


def test_pool_that_was_abandoned_as_its_group_ended_is_given_to_nobody():
    """
    And one that is given back twice, once.
    """
    fastpool.shutdown()
    with TaskGroup(1) as group:
        group.submit(abs, 1)
        leased = group._run.backend
    leased.end(group._run)
    again = dict(threads._threads.idle)

    class Abandoned(dict):
        """Somebody takes the pool between the look and the end."""

        def get(self, key):
            return next(iter(again))

    leased._leases = Abandoned()
    threads._threads.idle.clear()
    leased.end(group._run)
    idle = dict(threads._threads.idle)
    threads._threads.idle.update(again)

    assert len(again) == 1
    assert idle == {}


def test_processes_are_imported_when_asked_for():
    """
    `import fastpool` does without what starts processes; the name is there all the same.
    """
    code = (
        "import sys, fastpool.backends as backends; before = {*sys.modules};"
        "print(backends.Processes.__name__, 'Processes' in dir(backends),"
        "backends.Processes.remote,"
        "sorted(name for name in {*sys.modules} - before if name.startswith('fastpool.')))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )

    assert ended.stdout.startswith("Processes True True ")
    assert "fastpool.backends.processes" in ended.stdout
    with pytest.raises(AttributeError, match="no attribute 'Proceses'"):
        fastpool.backends.Proceses  # noqa: B018 - it is looked up


@pytest.mark.parametrize("pool", ["None", "ThreadPool(1)"])
def test_call_of_an_executor_on_threads_is_known_to_run(pool):
    """
    No process stands between: whoever asks for it meanwhile is told.
    """
    code = f"""
from multiprocessing.pool import ThreadPool
from threading import Event
from fastpool import TaskGroup
from fastpool.futures import GroupExecutor

begun, release = Event(), Event()
with TaskGroup(1, pool={pool}) as group:
    executor = GroupExecutor(group)
    future = executor.submit(lambda: (begun.set(), release.wait(60)))
    begun.wait(60)
    print(future.running(), end="")
    release.set()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )

    assert ended.stdout == "True"


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("pool", ["own", "shared"])
def test_backend_of_threads_says_that_it_stops_nothing(make_pool, pool, level):
    """
    Neither softly nor hard: a thread goes on until it ends.
    """
    with TaskGroup(1) as group:
        backend = Leased(1) if pool == "own" else Shared(make_pool(1))
        stopped = backend.escalate(group._run, level)

    assert stopped is False


# --- Storms ---------------------------------------------------------------------------------------


def test_storm_of_submits_at_the_end(hasty):
    """
    Threads that submit while the block ends are either served inside it or refused.
    """
    for _ in range(400):
        tasks = []
        go = threading.Barrier(3)

        def feed(group, go=go, tasks=tasks):
            go.wait(timeout=60)
            for _ in range(5):
                try:
                    tasks.append(group.submit(pow, 2, 3))
                except GroupClosedError:
                    return

        with TaskGroup(3) as group:
            threads = [threading.Thread(target=feed, args=(group,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            go.wait(timeout=60)
            group.submit(pow, 2, 3)
        for thread in threads:
            thread.join(timeout=60)

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
            tasks = []
            for at in range(20):  # it may fail before all are queued
                tasks.append(group.submit(fail if at == bad else int))
            if number % 3 == 0:
                for task in tasks:
                    task.wait(timeout=60)

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


@pytest.mark.parametrize("act", ["cancel", "wait"])
def test_storm_of_threads_around_one_task(hasty, act):
    """
    Of several that cancel it one is told that it did; of several that wait each is woken.
    """
    for _ in range(300):
        release, together = threading.Event(), threading.Barrier(4)
        told = []

        def meet(task, together=together, told=told):
            together.wait(timeout=60)
            told.append(task.cancel() if act == "cancel" else task.wait(timeout=60))

        with TaskGroup(1) as group:
            first = group.submit(release.wait, 60)
            queued = group.submit(pow, 2, 3)
            threads = [
                threading.Thread(target=meet, args=(queued if act == "cancel" else first,))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            together.wait(timeout=60)
            release.set()
            for thread in threads:
                thread.join(timeout=60)

        if act == "wait":
            assert told == [True] * 3
        else:
            # One that has started is told by its token, and may have its value all the same.
            assert sum(told) == 1 if queued.cancelled() else sum(told) <= 1


def test_storm_of_waits_for_a_group_on_a_pool_of_yours(hasty, make_pool):
    """
    A wait returns though the threads that it waits for leave the group at that moment.
    """
    with TaskGroup(pool=make_pool(2)) as group:
        for _ in range(500):
            group.submit(pow, 2, 3)
            group.wait(timeout=60)


def test_storm_of_shutdowns(hasty):
    """
    Each of several threads that shut down at once is answered.
    """
    far = CancelToken(timeout=3600)
    for _ in range(200):
        together = threading.Barrier(3)

        def shut(together=together):
            together.wait(timeout=60)
            CancelToken(timeout=0.0001)
            fastpool.shutdown()

        threads = [threading.Thread(target=shut, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

        assert not any(thread.is_alive() for thread in threads)
    assert far.deadline is not None


def test_task_that_its_waiter_ran_stays_what_it_is():
    """
    A failure that comes later does not make a cancelled one of it.
    """
    handles = []

    def parent():
        handles.append(group.submit(pow, 2, 3))
        assert handles[0].result() == 8
        raise ValueError("root")

    with pytest.raises(ValueError, match="root"), TaskGroup(1) as group:
        group.submit(parent)

    assert handles[0].result() == 8
    assert not handles[0].cancelled()


def test_submit_that_comes_as_an_observed_group_ends_is_waited_for(watched):
    """
    An observer is still being told of it in another thread: only then is the group closed.
    """
    late = threading.Event()
    seen = []

    def observe(event):
        if event.name == "task_submitted" and threading.current_thread() is thread:
            late.set()  # past its checks, and not yet in the queue
            until(lambda: is_asleep(threading.main_thread()), within=1)
        seen.append(event)

    def submit():
        tasks.append(group.submit(pow, 2, 3))

    def fail():
        release.wait(timeout=60)
        raise ValueError("root")

    tasks = []
    release = threading.Event()
    thread = threading.Thread(target=submit)
    with pytest.raises(ValueError, match="root"), TaskGroup(1, observers=[observe]) as group:
        group.submit(fail)
        thread.start()
        late.wait(timeout=60)
        release.set()
    thread.join(timeout=60)

    assert tasks[0].cancelled()
    assert [event.name for event in seen if event.task is tasks[0]] == [
        "task_submitted",
        "task_cancelled",
    ]
    assert seen[-1].name == "group_closed"


def test_helper_that_comes_as_the_group_ends_begins_nothing(make_pool, monkeypatch):
    """
    A worker has seen a queued task that it could run, and the block is left before it does.
    """
    inside, ended, release = (threading.Event() for _ in range(3))
    ran = []
    slot_for = Run.slot_for

    def slowly(run, lane):
        if run.name == "inner":
            inside.set()
            ended.wait(timeout=60)
        return slot_for(run, lane)

    def fail():
        started.wait(timeout=60)
        release.wait(timeout=60)
        raise ValueError("root")

    def read(task):
        with pytest.raises(TaskCancelledError):
            task.result()

    monkeypatch.setattr(Run, "slot_for", slowly)
    started = threading.Barrier(2)
    pool = make_pool(3)
    with TaskGroup(pool=pool) as outer:
        with (
            pytest.raises(ValueError, match="root"),
            TaskGroup(1, pool=pool, name="inner") as inner,
        ):
            inner.submit(fail)
            started.wait(timeout=60)
            queued = inner.submit(ran.append, 1)
            reader = outer.submit(read, queued)
            inside.wait(timeout=60)
            release.set()
        ended.set()
        reader.result(timeout=60)

    assert ran == []
    assert queued.cancelled()


def test_pool_that_is_closed_as_the_interpreter_terminates_it_ends(monkeypatch):
    """
    Although a thread of it goes on, which was left behind.
    """
    release, closing, terminating = (threading.Event() for _ in range(3))
    looked = threading.Semaphore(0)
    pool = _GrowingPool()
    pool.apply_async(release.wait, (20,))
    put = pool._change_notifier.put
    wait_for_updates = Pool._wait_for_updates

    def note_and_wait(*arguments, **options):
        looked.release()
        wait_for_updates(*arguments, **options)

    def wake_handler(item):
        """It is woken, looks at what it has been told, and goes to sleep again if that says so."""
        put(item)
        looked.acquire(timeout=1)

    def close_first(item):
        # 1: It is told to terminate, and before it is woken, told to close.
        pool._change_notifier.put = terminate_first
        closer.start()
        closing.wait(timeout=60)
        wake_handler(item)
        pool._change_notifier.put = put
        terminating.set()

    def terminate_first(item):
        # 2: So it is told to close as it wakes, for either of them.
        closing.set()
        terminating.wait(timeout=60)
        wake_handler(item)

    monkeypatch.setattr(Pool, "_wait_for_updates", staticmethod(note_and_wait))
    pool._change_notifier.put = close_first
    closer = threading.Thread(target=pool.close)
    outcome = in_thread(pool._terminate)
    closer.join(timeout=60)
    release.set()

    assert outcome is None


def test_thread_that_is_started_as_its_pool_is_closed_ends_with_it(monkeypatch):
    """
    Who submits may come to that just as the group is left without a task that goes on.
    """
    release, looked = threading.Event(), threading.Semaphore(0)
    wait_for_updates = Pool._wait_for_updates

    def note_and_wait(*arguments, **options):
        looked.release()
        wait_for_updates(*arguments, **options)

    monkeypatch.setattr(Pool, "_wait_for_updates", staticmethod(note_and_wait))
    pool = _GrowingPool()
    pool.apply_async(release.wait, (60,))
    looked.acquire(timeout=60)
    pool.close()
    looked.acquire(timeout=1)  # what looks after its threads has heard of that, and goes on
    pool.grow()
    release.set()
    outcome = in_thread(pool.join)

    assert outcome is None


def test_thread_whose_lane_there_is_no_memory_to_note_serves_the_next_call():
    """
    It has started by then, and nobody is served by it yet.
    """

    class Called(dict):
        def __setitem__(self, lane, value):
            raise MemoryError

    fastpool.shutdown()
    with TaskGroup(1) as group:
        called, group._run.called = group._run.called, Called()
        with pytest.raises(MemoryError):
            group.submit(int)
        group._run.called = called
        group.submit(int).wait()
        pool = group._run.pool

    assert set(pool.reserve) == set(pool.lanes)
    assert len(pool.lanes) == 1


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
        running = group.submit(release.wait, 60)
        while not running.running():
            pass
        with TaskGroup(1) as inner:  # whose thread is idle then, and stays with the parent
            inner.submit(pow, 2, 3)
        child = os.fork()
        if child == 0:
            code = 1
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            try:
                with pytest.raises(GroupClosedError, match="process"):
                    group.submit(pow, 2, 3)
                group.__exit__(None, None, None)
                with TaskGroup(2) as own:
                    task = own.submit(pow, 2, 3)
                assert task.result() == 8
                assert running.cancelled()
                assert CancelToken(timeout=0.01).wait(60)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_child_that_a_task_forks_ends_with_the_task():
    """
    Its one thread does not wait for more, as it would in the parent.
    """

    def forks():
        child = os.fork()
        if child == 0:
            return None
        try:
            until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status)

    with TaskGroup(1) as group:
        task = group.submit(forks)

    assert task.result() == 0


def test_finalizer_may_submit_as_the_first_thread_of_its_group_is_started(monkeypatch):
    """
    Both calls run, at once, and no pool is left that nobody has closed.
    """
    fastpool.shutdown()
    begin, both = _GrowingPool.__init__, threading.Barrier(2, timeout=60)
    begun = []
    made = []

    class Submits:
        def __del__(self):
            made.append(group.submit(both.wait))

    def begin_and_submit(pool):
        begun.append(pool)
        if len(begun) == 1:
            Submits()
        begin(pool)

    monkeypatch.setattr(_GrowingPool, "__init__", begin_and_submit)
    with TaskGroup(2) as group:
        made.append(group.submit(both.wait))
    fastpool.shutdown()

    assert sorted(task.result() for task in made) == [0, 1]
    assert [pool._state for pool in begun] == ["CLOSE", "CLOSE"]


def test_helper_that_is_about_to_start_is_ended_by_shutdown(monkeypatch):
    """
    It does what it was started for, and does not stay.
    """
    begins = threading.Event()
    start_thread = fastpool._clock.start_thread
    done = []

    def slowly(target, name, note):
        def run():
            begins.wait(60)
            target()

        start_thread(run, name, note)

    fastpool.shutdown()
    monkeypatch.setattr(fastpool._clock, "start_thread", slowly)
    fastpool._clock.run_in_helper(lambda: done.append(True))
    (helper,) = fastpool._clock._helpers
    fastpool.shutdown()
    begins.set()
    helper.thread.join(60)

    assert not helper.thread.is_alive()
    assert done == [True]


def test_shutdown_does_not_stumble_over_a_backend_that_is_made_meanwhile(monkeypatch):
    """
    Backends of processes have pools of their own, and are looked for one after another.
    """

    class Meanwhile(weakref.ref):
        """To look at one has another one made."""

        def __call__(self):
            made.append(Crew(threads.serve))
            return super().__call__()

    made = []
    crews = [Crew(threads.serve) for _ in range(3)]
    monkeypatch.setattr(threads, "_crews", weakref.WeakKeyDictionary())
    threads._crews.data = {Meanwhile(crew): None for crew in crews}

    fastpool.shutdown()

    assert len(made) >= len(crews)
