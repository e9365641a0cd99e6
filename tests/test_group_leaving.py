"""
How a group fails, and what leaves its block.
"""

import asyncio
import gc
import itertools
import signal
import threading
import traceback
import weakref
from contextlib import suppress
from contextvars import Context, ContextVar
from multiprocessing.pool import ApplyResult, ThreadPool

import pytest
from staging import fail, in_thread, is_asleep, sleeper, start, started_sleeper, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    FailFast,
    GroupClosedError,
    StuckTaskError,
    TaskCancelledError,
    TaskGroup,
    _ledger,
    _run,
    cancellable,
    current_token,
    shield,
    timeout,
    use_token,
)
from fastpool._gate import Gate
from fastpool._lane import Lane
from fastpool._ledger import Ledger
from fastpool._run import Run
from fastpool.backends import threads
from fastpool.backends.processes import Processes
from fastpool.backends.threads import Leased

# --- The first failure -------------------------------------------------------------------------


def test_echo_of_a_woken_sibling_is_never_the_first_failure():
    """
    A sibling that answers the cancel with an error of its own comes second, a thousand times.
    """
    for _ in range(1000):
        asleep = threading.Event()
        root, echo = ValueError("root"), ValueError("echo")

        @cancellable
        def answers(token, asleep=asleep, echo=echo):
            asleep.set()
            try:
                token.sleep(60)
            except Cancelled:
                raise echo from None

        def fails(asleep=asleep, root=root):
            asleep.wait(timeout=60)
            raise root

        with pytest.raises(ValueError, match="root") as raised, TaskGroup(2) as group:
            group.submit(answers)
            group.submit(fails)

        assert raised.value is root
        assert [failure.exception for failure in group.failures] == [root, echo]


def test_failing_at_the_same_instant_on_all_workers_records_them_all():
    """
    Exactly one is first, and that one leaves; none is lost.
    """
    for _ in range(50):
        barrier = threading.Barrier(9)

        def fails(number, barrier=barrier):
            barrier.wait(timeout=60)
            raise ValueError(number)

        with pytest.raises(ValueError, match=r"\d") as raised, TaskGroup(8) as group:
            batch = group.map(fails, range(8))
            barrier.wait(timeout=60)

        assert raised.value is group.failures[0].exception
        assert sorted(failure.exception.args[0] for failure in group.failures) == list(range(8))
        assert {failure.task for failure in group.failures} == set(batch.tasks)


@pytest.mark.parametrize("count", [2, 100])
def test_of_failures_at_the_same_instant_the_one_recorded_first_leaves(monkeypatch, count):
    """
    Workers come to the record one at a time here, so that it is known which was there first.
    """
    record, turn = Ledger.record, threading.Lock()
    barrier = threading.Barrier(count)
    errors = []

    def in_turn(run, task, error):
        with turn:
            errors.append(error)
            return record(run, task, error)

    def fails():
        barrier.wait(timeout=60)
        raise ValueError

    monkeypatch.setattr(Ledger, "record", in_turn)
    with pytest.raises(ValueError) as raised, TaskGroup(count) as group:  # noqa: PT011
        for _ in range(count):
            group.submit(fails)

    assert raised.value is errors[0]
    assert [failure.exception for failure in group.failures] == errors
    assert len(errors) == count


def test_failure_that_is_recorded_but_not_told_is_the_only_one(monkeypatch):
    """
    Who reads a sibling before the failing worker has come to set the token hears of the cancel.
    """
    recorded, read = threading.Event(), threading.Event()
    cancel_rest = Ledger.cancel_rest

    def held_up(run):
        if not recorded.is_set():
            recorded.set()
            read.wait(timeout=60)
        return cancel_rest(run)

    def reads():
        recorded.wait(timeout=60)
        try:
            queued.result()
        finally:
            read.set()

    monkeypatch.setattr(Ledger, "cancel_rest", held_up)
    with pytest.raises(ValueError, match="root"), TaskGroup(2) as group:
        go = threading.Event()
        failing = group.submit(lambda: go.wait(timeout=60) and fail(ValueError("root")))
        reader = group.submit(reads)
        queued = group.submit(pow, 2, 3)
        with shield():
            until(reader.running)
            go.set()
            read.wait(timeout=60)

    assert [failure.task for failure in group.failures] == [failing]
    assert reader.cancelled()
    assert queued.cancelled()


def test_queued_task_that_a_worker_comes_to_after_a_failure_never_starts(monkeypatch, watched):
    """
    Though its failing sibling has not come to set the token; who waits for it hears of the cancel.
    """
    recorded, heard = threading.Event(), threading.Event()
    main, ran = threading.current_thread(), []
    cancel_rest = Ledger.cancel_rest

    def held_up(run):
        if not recorded.is_set():
            recorded.set()
            heard.wait(timeout=60)
        cancel_rest(run)

    def fails():
        until(lambda: is_asleep(main))
        raise ValueError("root")

    monkeypatch.setattr(Ledger, "cancel_rest", held_up)
    with pytest.raises(ValueError, match="root"), TaskGroup(2) as group:
        failing = group.submit(fails)
        group.submit(recorded.wait, 60)
        queued = group.submit(ran.append, 404)
        try:
            with pytest.raises(Cancelled):
                queued.result()
        finally:
            heard.set()

    assert ran == []
    assert queued.cancelled()
    assert [failure.task for failure in group.failures] == [failing]


def test_task_that_failed_is_done_before_its_group_is_cancelled(monkeypatch):
    """
    Also where somebody else meets the failure first, and cancels the group.
    """
    recorded, met, main = threading.Event(), threading.Event(), threading.current_thread()

    def end_late(run, task, *args, ended=Ledger.ended):
        if threading.current_thread() is not main and not recorded.is_set():
            recorded.set()
            met.wait(60)
        ended(run, task, *args)

    monkeypatch.setattr(Ledger, "ended", end_late)
    with pytest.raises(ValueError, match="root"), TaskGroup(1) as group, shield():
        release = threading.Event()
        failing = group.submit(lambda: release.wait(60) and fail(ValueError("root")))
        queued = group.submit(abs, 404)
        release.set()
        assert recorded.wait(60)
        seen = queued.done(), group.token.cancelled(), failing.done()
        met.set()

    assert seen == (True, True, True)
    assert str(failing.exception()) == "root"


class Strict:
    """A policy of the user's own, by which the first failure is enough."""

    def start(self):
        return self

    def outcome(self, task, error):
        return error is not None

    def end(self, failures):
        return failures[0].exception


def test_worker_takes_nothing_any_more_once_a_policy_has_had_enough(monkeypatch, watched):
    """
    Though the failing one has not come to set the token.
    """
    recorded = threading.Event()
    other, ran = [], []
    cancel_rest = Ledger.cancel_rest

    def held_up(run):
        if not recorded.is_set():
            recorded.set()
            until(lambda: ran or is_asleep(other[0]))
        cancel_rest(run)

    def beside():
        other.append(threading.current_thread())
        recorded.wait(timeout=60)

    def fails():
        until(lambda: other)
        raise ValueError("root")

    monkeypatch.setattr(Ledger, "cancel_rest", held_up)
    with pytest.raises(ValueError, match="root"), TaskGroup(2, policy=Strict()) as group:
        group.submit(fails)
        group.submit(beside)
        queued = group.submit(ran.append, 404)

    assert ran == []
    assert queued.cancelled()


@pytest.mark.parametrize(
    ("broken", "error"), [("ended", None), ("failed", ValueError("root")), ("admit", None)]
)
def test_worker_that_breaks_fails_its_task(monkeypatch, workers, broken, error):
    """
    Out of memory in the library itself, say: the group fails with that, and nothing hangs.
    """
    once = [MemoryError("no room for the books")]
    works = getattr(Ledger, broken)

    def breaks(run, *args):
        if once:
            raise once.pop()
        return works(run, *args)

    def run():
        with TaskGroup(observers=[seen.append], **arguments) as group:
            tasks.append(group.submit(fail if error else repr, error))

    arguments = workers(1)
    seen, tasks = [], []
    monkeypatch.setattr(Ledger, broken, breaks)
    with pytest.raises(MemoryError):
        run()

    assert tasks[0].done()
    assert not tasks[0].running()


@pytest.mark.parametrize("cancelled", [False, True])
def test_worker_that_breaks_stops_the_others_and_wakes_who_waits(monkeypatch, watched, cancelled):
    """
    Also who waits for its task in a group that was cancelled before.
    """
    once, release = [MemoryError("no room for the books")], threading.Event()
    fails = Ledger.failed

    def breaks(run, task, *args):
        if task is broken and once:
            raise once.pop()
        return fails(run, task, *args)

    def stubborn():
        release.wait(60)
        raise ValueError("root")

    monkeypatch.setattr(Ledger, "failed", breaks)
    with pytest.raises(MemoryError), TaskGroup(2) as group:
        asleep = started_sleeper(group)
        broken = group.submit(stubborn)
        until(broken.running)
        if cancelled:
            group.cancel()
        waiter, outcome = start(broken.wait)
        until(lambda: is_asleep(waiter))
        release.set()
        waiter.join(20)
        asleep.wait(20)

    assert outcome == [True]
    assert asleep.cancelled()


def test_worker_that_breaks_in_a_cancelled_group_wakes_who_waits_for_it(
    workers, watched, monkeypatch
):
    """
    Who leaves, and who waits for the whole group: neither hears of a cancel any more.
    """
    errors, main = [MemoryError("no room for the books")], threading.current_thread()
    failed, waiting = Ledger.failed, []

    def breaks(run, *arguments):
        if errors:
            raise errors.pop()
        failed(run, *arguments)

    def stubborn():
        waiting.append(start(group.wait))
        until(lambda: is_asleep(waiting[0][0]) and is_asleep(main))
        raise ValueError("root")

    monkeypatch.setattr(Ledger, "failed", breaks)
    with pytest.raises(MemoryError), TaskGroup(**workers(1)) as group:
        until(group.submit(stubborn).running)
        group.cancel()
    waiter, outcome = waiting[0]
    waiter.join(timeout=20)

    assert not errors
    assert outcome == [None]


def test_worker_that_breaks_as_it_comes_to_rest_wakes_who_waits_for_it(watched, monkeypatch):
    """
    As above; and it had passed everything that somebody waited for when it ended its task.
    """
    errors, groups, waiting = [MemoryError("no room for the books")], [], []
    rest, passed = Run.rest, Run.passed

    def rests(run, lane):
        if not waiting:
            waiting.append(start(groups[0].wait))
            until(lambda: is_asleep(waiting[0][0]) and is_asleep(leaver))
        return rest(run, lane)

    def breaks(run, lane):
        if errors and lane in run.idle:
            raise errors.pop()
        passed(run, lane)

    def leaves():  # not the main thread, which looks by itself now and then
        with TaskGroup(1, grace=600) as group:  # seconds: until then nothing else has it look
            groups.append(group)
            group.submit(int).wait()
            group.cancel()

    monkeypatch.setattr(Run, "rest", rests)
    monkeypatch.setattr(Run, "passed", breaks)
    leaver, left = start(leaves)
    leaver.join(timeout=20)
    waiter, outcome = waiting[0]
    waiter.join(timeout=20)

    assert not errors
    assert [type(left[0]), outcome] == [MemoryError, [None]]


@pytest.fixture
def breaks_once(monkeypatch):
    """
    Has a function of the library's fail, the first time that another thread calls it than the
    one that has arranged it, or that it itself does.
    """

    def arrange(holder, name, *, after=False, itself=False):
        works = getattr(holder, name)
        errors = [MemoryError("no room for the books")]
        me = threading.current_thread()

        def breaks(*args, **kwargs):
            fails = errors and (threading.current_thread() is me) == itself
            if fails and not after:
                raise errors.pop()
            value = works(*args, **kwargs)
            if fails and errors:
                raise errors.pop()
            return value

        monkeypatch.setattr(holder, name, breaks)
        return errors

    return arrange


def runs_at_once(count, arguments):
    """Whether a group has so many workers."""
    both = threading.Barrier(count, timeout=60)
    with TaskGroup(**arguments) as group:
        batch = group.map(lambda _: both.wait(), range(count))
    return sorted(batch.results()) == list(range(count))


BREAKING = [  # what a worker comes to, from when it is called until it rests or ends
    (Lane, "serve_here", False),
    (Run, "begin", False),
    (Run, "begin", True),
    (_run, "handle", False),
    (Ledger, "admit", False),
    (Ledger, "admit", True),
    (Run, "perform", False),
    (threads, "serve_stretch", False),
    (Ledger, "ended", True),
    (Ledger, "notify", False),
    (Gate, "notify", False),
    (Run, "rest", False),
    (Run, "passed", False),
    (Run, "wake_leavers", False),
    (Run, "dismiss", False),
    (Run, "give_back_slot", False),
    (Run, "give_back_slot", True),
]


@pytest.mark.parametrize("how", ["submit", "map", "fail"])
@pytest.mark.parametrize(("holder", "name", "after"), BREAKING)
def test_worker_that_breaks_anywhere_holds_up_nobody(
    holder, name, after, how, workers, breaks_once
):
    """
    The block is left, every handle ends, who waits is woken, the next group has all its workers.
    """
    arguments = workers(2)
    go = threading.Event()
    tasks, waiters = [], []

    def run():
        with TaskGroup(**arguments) as group:
            if how == "map":
                tasks.extend(group.map(go.wait, [60, 60, 60]).tasks)
            else:
                tasks.append(group.submit(go.wait, 60))
            waiters.extend(start(task.wait)[0] for task in tasks)
            until(lambda: all(task in group._run.watchers or task.done() for task in tasks))
            try:
                if how != "map":
                    tasks.append(group.submit(int, "x" if how == "fail" else "1"))
            finally:
                go.set()

    errors = breaks_once(holder, name, after=after)
    allowed = {"submit": MemoryError, "map": MemoryError, "fail": (MemoryError, ValueError)}
    with suppress(allowed[how]):
        in_time(run)

    assert all(task.done() and not task.running() for task in tasks)
    for waiter in waiters:
        waiter.join(timeout=60)
        assert not waiter.is_alive()
    errors.clear()
    assert runs_at_once(2, arguments)


def in_time(fn):
    """Call something in a thread of its own, which is left to itself if it hangs."""
    thread, outcome = start(fn)
    thread.join(timeout=60)
    assert not thread.is_alive(), "it hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]


@pytest.mark.parametrize("held", ["before it is called", "when it is called"])
def test_worker_that_breaks_at_rest_may_be_called_just_then(held, monkeypatch):
    """
    A submitter takes it off the idle ones as it breaks: the block is left, the task is cancelled.
    """
    broken, resumes, taken = threading.Event(), threading.Event(), threading.Event()
    passed, take, failed = Run.passed, _run.take_last, Run.lane_failed
    main = threading.current_thread()
    errors = [MemoryError("no room for the books")]

    def breaks(run, lane):
        if errors and lane in run.idle:
            error = errors.pop()
            resumes.set()
            assert taken.wait(timeout=60)
            raise error
        passed(run, lane)

    def takes(lanes):
        lane = take(lanes)
        mine = lane is not None and threading.current_thread() is main
        if mine and held == "before it is called" and not taken.is_set():
            taken.set()
            assert broken.wait(timeout=60)
        return lane

    def notes(run, lane, error):
        failed(run, lane, error)
        broken.set()

    monkeypatch.setattr(Run, "passed", breaks)
    monkeypatch.setattr(_run, "take_last", takes)
    monkeypatch.setattr(Run, "lane_failed", notes)
    with pytest.raises(MemoryError), TaskGroup(1) as group:
        first = group.submit(int)
        assert resumes.wait(timeout=60)
        second = group.submit(int)
        taken.set()

    assert first.result() == 0
    assert second.cancelled()
    assert runs_at_once(1, {"max_workers": 1})


def test_failure_of_a_task_is_its_own_though_its_worker_breaks_as_it_ends_it(breaks_once):
    """
    It is on record by then, behind another one, so it leaves with that, and the handle has it.
    """
    tasks = []

    def run():
        with TaskGroup(1, policy=CollectAll()) as group:
            group.submit(fail, LookupError()).wait()
            breaks_once(Ledger, "ended")
            tasks.append(group.submit(int, "x"))

    with pytest.raises(ExceptionGroup) as raised:
        in_time(run)

    _, error = raised.value.exceptions
    assert type(error) is ValueError
    assert tasks[0].exception() is error


@pytest.mark.parametrize("holder", [Ledger, Gate])
def test_who_waits_is_told_though_the_worker_breaks_as_it_tells(holder, watched, breaks_once):
    """
    In a group whose token is set already, so that no cancel wakes it, and while the body goes on.
    """
    release = threading.Event()
    with pytest.raises(MemoryError), TaskGroup(1) as group:
        task = group.submit(release.wait, 60)
        until(task.running)
        group.cancel()
        waiter, outcome = start(task.wait)
        until(lambda: is_asleep(waiter))
        breaks_once(holder, "notify")
        release.set()
        waiter.join(timeout=20)
        told = list(outcome)

    assert told == [True]
    assert task.result() is True


def test_worker_that_finds_work_as_the_block_is_left_is_not_lost(monkeypatch, watched):
    """
    It has come to rest and seen a task that another one does, and goes on as the group would end.
    """
    end, rest = Leased.end, Run.rest
    first, second, looked, again, ending, left = (threading.Event() for _ in range(6))
    lanes, leavers = [], []

    class Idle(dict):
        def __setitem__(self, lane, value):
            if not lanes:
                lanes.append(lane)
                group.submit(int)
            super().__setitem__(lane, value)

        def pop(self, lane, default):
            if not looked.is_set():
                looked.set()
                until(lambda: ending.is_set() or (leavers and is_asleep(leavers[0])))
            return super().pop(lane, default)

    def rest_again(run, lane):
        if looked.is_set() and lane is lanes[0]:
            again.set()
            assert not ending.is_set() or left.wait(timeout=60)
        return rest(run, lane)

    def end_late(backend, run):
        ending.set()
        assert again.wait(timeout=60)
        end(backend, run)

    def leave():
        with group:
            running = [group.submit(event.wait, 60) for event in (first, second)]
            until(lambda: all(task.running() for task in running))
            first.set()
            assert looked.wait(timeout=60)
            second.set()
            until(lambda: group._run.idle.keys() == group._run.lanes.keys())
            leavers.append(threading.current_thread())

    group = TaskGroup(2)
    group._run.idle = Idle()
    monkeypatch.setattr(Run, "rest", rest_again)
    monkeypatch.setattr(Leased, "end", end_late)
    outcome = in_thread(leave)
    left.set()
    pool = lanes[0].pool

    assert outcome is None
    assert set(pool.reserve) == set(pool.lanes)


def test_failures_that_are_recorded_at_once_have_an_order():
    """
    The first of them is what leaves, what cancels, and the cause of what it has cancelled.
    """

    class Together(list):
        def append(self, failure):
            super().append(failure)
            both.wait()

    both, go = threading.Barrier(2, timeout=60), threading.Event()
    with pytest.raises(ValueError, match="root") as raised, TaskGroup(2) as group:
        group._run.failures = Together()
        tasks = [group.submit(fail_after, go, ValueError("root")) for _ in range(2)]
        queued = group.submit(int)
        until(lambda: all(task.running() for task in tasks))
        go.set()
    first, second = sorted(tasks, key=lambda task: task._value[2])

    assert [first._value[2], second._value[2]] == [0, 1]
    assert first.exception() is raised.value
    assert second.exception() is not raised.value
    assert group.token.reason is raised.value
    assert queued._error().__cause__ is raised.value


def fail_after(go, error):
    assert go.wait(60)
    raise error


def test_failure_that_another_thread_makes_final_is_the_first(monkeypatch):
    """
    Its worker has recorded it, and come no further; the next one to fail finds it there.
    """
    record, recorded, goes_on = Ledger.record, threading.Event(), threading.Event()

    def record_and_hold(run, task, error):
        order = record(run, task, error)
        if task is not None and not recorded.is_set():
            recorded.set()
            assert goes_on.wait(timeout=60)
        return order

    def fail_second():
        assert recorded.wait(timeout=60)
        raise LookupError

    monkeypatch.setattr(Ledger, "record", record_and_hold)
    with pytest.raises(ValueError, match="root") as raised, TaskGroup(2) as group, shield():
        second = group.submit(fail_second)
        first = group.submit(fail, ValueError("root"))
        second.wait()
        outcome = first.exception(), first._value[2]
        goes_on.set()

    assert outcome == (raised.value, 0)


def test_worker_that_breaks_before_it_begins_a_task_fails_that(workers, breaks_once):
    """
    It has taken it off the queue; there is no memory for the call that would run it.
    """
    errors = breaks_once(Run, "perform")
    with pytest.raises(MemoryError) as raised, TaskGroup(**workers(1)) as group:
        group._run.disturbed = True
        task = group.submit(int)

    assert not errors
    assert task.exception() is raised.value


def test_worker_that_has_broken_keeps_no_task(breaks_once):
    """
    It goes on with other groups.
    """
    errors = breaks_once(Ledger, "failed")
    with pytest.raises(MemoryError), TaskGroup(1) as group:
        task = group.submit(fail, ValueError("root"))
    kept = weakref.ref(group._run), weakref.ref(task)
    del group, task
    gc.collect()  # the frame in which it has failed is in a cycle with the error
    assert runs_at_once(1, {"max_workers": 1})

    assert not errors
    assert [ref() for ref in kept] == [None, None]


def test_worker_that_breaks_cancels_by_what_broke_it(breaks_once):
    """
    Under any policy, and whatever has failed before.
    """
    groups = []

    def run():
        with TaskGroup(1, policy=CollectAll()) as group:
            groups.append(group)
            group.submit(fail, ValueError("earlier")).wait()
            errors.extend(breaks_once(Run, "perform"))
            group.submit(int)

    errors = []
    with pytest.raises(ExceptionGroup):
        in_time(run)

    assert groups[0].token.reason is errors[0]


def test_task_of_a_worker_that_breaks_before_it_starts_is_told_as_ended_once(breaks_once):
    """
    As failed, and in the context that it was submitted in.
    """
    told = []
    breaks_once(Run, "perform")
    with pytest.raises(MemoryError), TaskGroup(1, observers=[told.append]) as group:
        task = group.submit(int)

    names = [event.name for event in told if event.task is task]
    assert names == ["task_submitted", "task_failed"]


def test_call_is_run_though_there_is_no_memory_to_call_a_worker_with(monkeypatch):
    """
    At the first try; the one there is is idle.
    """
    take, errors = _run.take_last, [MemoryError("no room for an iterator")]

    def breaks_once(lanes):
        if errors:
            raise errors.pop()
        return take(lanes)

    with TaskGroup(1) as group:
        group.submit(abs, -1).wait()
        until(group._run.at_rest)
        monkeypatch.setattr(_run, "take_last", breaks_once)
        value = group.submit(abs, -2).result(timeout=60)

    assert not errors
    assert value == 2


class NoRoomFirst(dict):
    """Has no memory for what is put in first."""

    def __init__(self):
        super().__init__()
        self.errors = [MemoryError("no room for another")]

    def __setitem__(self, key, value):
        if self.errors:
            raise self.errors.pop()
        super().__setitem__(key, value)


@pytest.mark.parametrize("idle", [False, True])
def test_worker_that_there_is_no_memory_to_call_may_be_called_again(idle):
    """
    One that is idle is called at the next look; where there is none, the submit says so.
    """
    with TaskGroup(1) as group:
        if idle:
            group.submit(abs, -1).wait()
            until(group._run.at_rest)
        group._run.called = NoRoomFirst()
        if not idle:
            with pytest.raises(MemoryError):
                group.submit(abs, -2)
        value = group.submit(abs, -2).result(timeout=60)

    assert value == 2


def test_worker_that_breaks_as_it_is_called_comes(monkeypatch):
    """
    It has been woken by then, and is woken no second time.
    """
    wait, errors, threads = Gate.wait, [], []

    def breaks(gate, timeout=None):
        through = wait(gate, timeout)
        if errors and threading.current_thread() in threads:
            raise errors.pop()
        return through

    def run():
        with TaskGroup(1) as group:
            threads.append(group.submit(threading.current_thread).result())
            until(group._run.at_rest)
            errors.append(MemoryError("no room for a float"))
            group.submit(abs, -2)

    monkeypatch.setattr(Gate, "wait", breaks)
    with pytest.raises(MemoryError):
        in_time(run)

    assert not errors


def test_job_that_comes_late_leaves_the_worker_at_work(make_pool):
    """
    Another job serves the group in its place; if that breaks, the block is left all the same.
    """
    go = threading.Event()
    with TaskGroup(pool=make_pool(1)) as group:
        task = group.submit(go.wait, 60)
        until(task.running)
        (lane,) = group._run.lanes
        begins = group._run.begin(lane)
        at_work = lane.at_work
        go.set()

    assert (begins, at_work) == (False, True)


@pytest.mark.parametrize("running", [0, 1])
def test_thread_whose_pool_cannot_take_its_job_is_not_counted_on(running, monkeypatch):
    """
    `submit` says so if there is no other, and neither this group nor the next waits for it.
    """
    fastpool.shutdown()
    makes, calls = ApplyResult.__init__, itertools.count()
    go = threading.Event()

    def breaks(result, *args, **kwargs):
        if next(calls) == running:
            raise MemoryError("no room for a result")
        makes(result, *args, **kwargs)

    def run():
        with TaskGroup(2) as group:
            others = [group.submit(go.wait, 60) for _ in range(running)]
            if others:
                task = group.submit(int)
                go.set()
                assert task.result(timeout=60) == 0
            else:
                with pytest.raises(MemoryError):
                    group.submit(int)

    monkeypatch.setattr(ApplyResult, "__init__", breaks)
    in_time(run)

    assert next(calls) > running
    assert runs_at_once(2, {"max_workers": 2})


@pytest.mark.parametrize("full", [False, True])
def test_worker_of_a_pool_that_cannot_make_way_goes_on(full, make_pool, monkeypatch):
    """
    There is no memory for the job that would come later, or for telling of it.
    """
    pool = make_pool(1)
    monkeypatch.setattr(threads, "SLICE", -1.0)
    errors = [MemoryError("no room for a job")]
    worker = []

    def breaks(*args):
        if errors and threading.current_thread() in worker:
            raise errors.pop()
        return works(*args)

    holder, name = (threads, "tell_helpers") if full else (pool, "apply_async")
    works = getattr(holder, name)
    monkeypatch.setattr(holder, name, breaks)

    def run():
        with TaskGroup(pool=pool) as group:
            group.submit(lambda: worker.append(threading.current_thread()))
            batch = group.map(abs, range(20))
        assert batch.results() == list(range(20))

    in_time(run)

    assert not errors


@pytest.mark.parametrize(
    ("holder", "name", "leaves"),
    [
        (Ledger, "succeeded", False),
        (Ledger, "succeeded", True),
        (Run, "perform", False),
        (Run, "perform", True),
        (Run, "_leave_queue", False),
    ],
)
def test_task_of_a_worker_that_breaks_while_it_helps_out_is_not_lost(
    make_pool, breaks_once, holder, name, leaves
):
    """
    The one worker runs what it waits for, and has no memory for that, or for its outcome.
    """
    pool = make_pool(1)
    tasks = []

    def nests():
        with TaskGroup(pool=pool) as inner:
            tasks.append(inner.submit(int))
            breaks_once(holder, name, itself=True)
            if not leaves:
                tasks[0].result()

    with pytest.raises(MemoryError) as raised:
        in_time(lambda: fastpool.map(lambda _: nests(), [None], pool=pool))

    assert tasks[0].exception() is raised.value
    assert runs_at_once(1, {"pool": pool})


def test_who_waits_is_told_though_a_helper_breaks_as_it_tells(make_pool, breaks_once, watched):
    """
    The worker is another group's, so its failure ends no wait for the task that it has run.
    """
    pool = make_pool(1)
    waiting = []

    def helps():
        task = group.submit(int)
        waiting.append(start(task.result))  # not the main thread, which looks by itself
        until(lambda: is_asleep(waiting[0][0]))
        breaks_once(Ledger, "notify", itself=True)
        task.result()

    with TaskGroup(pool=pool) as group:
        with pytest.raises(MemoryError), TaskGroup(pool=pool) as other:
            other.submit(helps)
        waiter, outcome = waiting[0]
        waiter.join(timeout=20)
        told = list(outcome)

    assert told == [0]


@pytest.mark.parametrize(("holder", "name"), [(_run, "handle"), (Ledger, "admit")])
def test_call_that_a_helper_has_no_memory_to_take_fails_its_group(
    make_pool, breaks_once, holder, name
):
    """
    And not that of the helper; who waits for the call is told.
    """
    pool = make_pool(1)
    tasks = []

    def feeds():
        tasks.append(group.submit(int))
        breaks_once(holder, name, itself=True)
        with suppress(MemoryError):
            group.submit(int)  # there is room when it has run the other

    with pytest.raises(MemoryError), TaskGroup(pool=pool, max_queued=1) as group:
        group._run.disturbed = name == "admit"
        with shield():
            with TaskGroup(pool=pool) as other:
                other.submit(feeds)
            told = tasks[0].wait(timeout=20)

    assert told
    assert tasks[0].cancelled()
    assert runs_at_once(1, {"pool": pool})


def test_no_queued_task_starts_after_the_first_failure():
    """
    Eight run, a thousand wait; one fails, and none of the thousand starts.
    """
    running = threading.Barrier(8)
    started = []

    @cancellable
    def task(token, number):
        started.append(number)
        running.wait(timeout=60)
        if number == 3:
            queued.wait(timeout=60)
            raise ValueError("number 3")
        token.sleep(60)

    queued = threading.Event()
    with pytest.raises(ValueError, match="number 3"), TaskGroup(8) as group:
        batch = group.map(task, range(1008))
        queued.set()

    assert sorted(started) == list(range(8))
    assert sum(task.cancelled() for task in batch.tasks) == 1007


def test_failure_is_told_in_order(watched):
    """
    Recorded, task done, token set, waiters woken, callbacks run.
    """
    seen = []
    failing = threading.Event()

    def fails():
        failing.wait(timeout=60)
        raise ValueError("root")

    def waits(task):
        task.wait(timeout=60)
        seen.append(("waiter", len(group.failures), task.done(), group.token.cancelled()))

    with pytest.raises(ValueError, match="root"), TaskGroup(2) as group:
        group.token.on_cancel(
            lambda: seen.append(("callback", len(group.failures), task.done(), True))
        )
        task = group.submit(fails)
        waiter = threading.Thread(target=waits, args=(task,))
        waiter.start()
        until(lambda: is_asleep(waiter))
        failing.set()
    waiter.join(timeout=60)

    assert sorted(seen) == [("callback", 1, True, True), ("waiter", 1, True, True)]


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(1),
        asyncio.CancelledError(),
        MemoryError(),
        RecursionError(),
        ExceptionGroup("two", [ValueError(1), ValueError(2)]),
        Cancelled("nobody asked for it"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failure_of_any_class_leaves_as_it_is(error):
    """
    The very object leaves, its handle gives it, and the same thread serves the next group.
    """
    with pytest.raises(type(error)) as raised, TaskGroup(1) as group:
        worker = group.submit(threading.current_thread)
        task = group.submit(fail, error)
    with TaskGroup(1) as after:
        goes_on = after.submit(threading.current_thread)

    assert raised.value is error
    assert task.exception() is error
    assert not task.cancelled()
    assert goes_on.result() is worker.result()  # not its number, which a new one may be given


class Hostile(Exception):
    def hostile(self, *arguments):
        raise AssertionError("the library has called a method of somebody's exception")

    __str__ = __repr__ = __eq__ = __bool__ = __hash__ = hostile


class ReadOnly(Exception):
    """Takes no notes, and hides what the interpreter writes."""

    @property
    def refuse(self):
        raise AssertionError("the library has read this")

    __notes__ = __context__ = __traceback__ = __cause__ = refuse


class Unreadable(Exception):
    """Whatever is read of it raises."""

    def __getattribute__(self, name):
        raise AssertionError("the library has read this")


class Immutable(Exception):
    """Whatever is written to it raises, and not even an `Exception`."""

    def __setattr__(self, name, value):
        raise SystemExit("the library has written this")


class Impostor(Exception):
    """Does not say of what class it is."""

    @property
    def __class__(self):
        raise AssertionError("the library has asked the exception for its class")


@pytest.mark.parametrize("kind", [Hostile, ReadOnly, Unreadable, Immutable, Impostor])
def test_hostile_exception_leaves_as_it_is(kind, workers):
    """
    No method of the exception is called, and what it does not take does not hide it.
    """
    error = kind()
    caught = None

    try:
        with TaskGroup(**workers(2)) as group:
            task = group.submit(fail, error)
            group.submit(fail, kind())
    except BaseException as left:
        caught = left

    assert caught is group.failures[0].exception
    assert task.done()


def test_returned_exception_is_a_value():
    """
    Only what is raised is a failure.
    """
    error = ValueError("a value")

    with TaskGroup() as group:
        task = group.submit(lambda: error)

    assert task.result() is error
    assert task.exception() is None


def test_deep_recursion_in_a_task_is_recorded():
    """
    A task that overflows the stack fails, and its worker goes on.
    """

    def deeper():
        return deeper()

    with pytest.raises(RecursionError), TaskGroup(1) as group:
        group.submit(deeper)


# --- What the exception carries ----------------------------------------------------------------


def test_traceback_shows_the_task_and_nothing_of_ours_in_it():
    """
    Between the block and the task's own frames there is nothing of the library's.
    """

    def inner():
        raise ValueError("deep")

    @cancellable
    def outer(token):
        inner()

    with pytest.raises(ValueError, match="deep") as raised, TaskGroup() as group:
        group.submit(outer)

    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-2:] == ["outer", "inner"]
    assert "call" not in names
    assert "perform" not in names
    assert raised.value.__context__ is raised.value.__cause__ is None


def test_block_adds_no_context_where_something_is_being_handled():
    """
    Neither what the body raised nor what is handled around the block becomes its context.
    """
    original = KeyError("the task's own")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="root") as raised, TaskGroup() as group:
            group.submit(fail, ValueError("root")).wait()
            raise RuntimeError("of the body") from None

    def chained():
        raise ValueError("with a cause") from original

    with pytest.raises(ValueError, match="with a cause") as caused, TaskGroup() as other:
        other.submit(chained)

    assert raised.value.__context__ is None
    assert caused.value.__cause__ is original
    assert len(group.failures) == 2


def test_notes_name_task_place_and_other_failures():
    """
    The failure says which task, where it was submitted, and what else failed; so does each
    group around it.
    """
    barrier = threading.Barrier(2)

    def fails(kind):
        barrier.wait(timeout=60)
        raise kind("secret")

    def nests():
        with TaskGroup(name="inner") as inner:
            inner.submit(fails, ValueError)
            inner.submit(fails, KeyError)

    with pytest.raises((ValueError, KeyError)) as raised, TaskGroup(name="outer") as group:
        group.submit(nests)

    notes = "\n".join(raised.value.__notes__)
    other = "KeyError" if raised.type is ValueError else "ValueError"
    assert notes.count(f"{__file__}:") == 3
    assert "task 'fails'" in notes
    assert f"also in group 'inner': {other} in task 'fails'" in notes
    assert notes.splitlines()[-1].startswith("in task 'nests'")
    assert "secret" not in notes


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, ""), (6, "1"), (8, "3")])
def test_note_names_five_other_failures_and_counts_the_rest(count, more):
    """
    Of a thousand no reader would read the names.
    """
    barrier = threading.Barrier(count + 1)

    def fails():
        barrier.wait(timeout=60)
        raise ValueError("root")

    with pytest.raises(ValueError, match="root") as raised, TaskGroup(count + 1) as group:
        group.starmap(fails, [()] * (count + 1))

    note = raised.value.__notes__[-1]
    assert note.count("ValueError in task 'fails[") == min(count, 5)
    assert note.rpartition("; and ")[2 if more else 1] == (f"{more} more" if more else "")


def test_notes_are_taken_back_where_a_block_has_none_of_its_own():
    """
    What left a task of one group first, and the body of another then, bears no note of the first.
    """
    error = ValueError("root")
    with pytest.raises(ValueError, match="root"), TaskGroup() as group:
        group.submit(fail, error)
    assert error.__notes__
    with pytest.raises(ValueError, match="root"), TaskGroup():
        raise error

    assert not hasattr(error, "__notes__")


def test_notes_that_are_no_list_are_left_alone():
    """
    Where `add_note` would refuse, the group adds none.
    """
    error = ValueError("root")
    error.__notes__ = ("mine",)
    with pytest.raises(ValueError, match="root") as raised, TaskGroup() as group:
        group.submit(fail, error)

    assert raised.value.__notes__ == ("mine",)


def test_exception_of_the_body_keeps_its_context():
    """
    Also where that is the very failure which leaves the block in its place.
    """
    body = KeyError("body")
    with pytest.raises(ValueError, match="root") as raised, TaskGroup() as group:
        task = group.submit(fail, ValueError("root"))
        with shield():
            task.wait(timeout=60)
        try:
            task.result()
        except ValueError:
            raise body  # noqa: B904 - its context is the point

    assert [failure.exception for failure in group.failures] == [raised.value, body]
    assert body.__context__ is raised.value
    assert raised.value.__context__ is None


def test_notes_of_an_earlier_group_are_replaced():
    """
    One exception object, raised in group after group, has the notes of the last one.
    """
    error = ValueError("a singleton")
    error.add_note("somebody else's")

    for number in range(3):
        with pytest.raises(ValueError, match="singleton"), TaskGroup(name=f"n{number}") as group:
            group.submit(fail, error)

    assert len(error.__notes__) == 2
    assert error.__notes__[0] == "somebody else's"
    assert "'n2'" in error.__notes__[1]


def test_reading_a_failure_again_does_not_lengthen_its_traceback():
    """
    The same object each time, with the traceback that the task left.
    """
    lengths = []
    with pytest.raises(ValueError, match="root"), TaskGroup() as group:
        task = group.submit(fail, ValueError("root"))
    for _ in range(3):
        try:
            task.result()
        except ValueError as error:
            lengths.append(len(traceback.extract_tb(error.__traceback__)))
        lengths.append(len(traceback.extract_tb(task.exception().__traceback__)) + 2)

    assert len(set(lengths)) == 1


# --- The body ----------------------------------------------------------------------------------


def test_exception_of_the_body_cancels_and_leaves():
    """
    It is recorded, without a task, and what runs is stopped.
    """
    error = ValueError("of the body")

    with pytest.raises(ValueError, match="of the body") as raised, TaskGroup() as group:
        task = started_sleeper(group)
        raise error

    assert raised.value is error
    assert task.cancelled()
    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, error)]
    assert group.token.reason is error


def test_failure_seen_again_by_the_body_is_recorded_once():
    """
    What `result()` raised into the body is the task's failure, not one more.
    """
    error = ValueError("root")

    def fails():
        gate.wait(timeout=60)
        raise error

    gate = threading.Event()
    with pytest.raises(ValueError, match="root"), TaskGroup() as group:
        task = group.submit(fails)
        with shield():
            gate.set()
            task.result()

    assert [failure.task for failure in group.failures] == [task]


def test_failed_group_stays_failed_though_the_body_caught_it():
    """
    Handling the object that `result()` raised does not undo the failure.
    """
    error = ValueError("root")

    with (
        pytest.raises(ValueError, match="root") as raised,
        TaskGroup() as group,
        shield(),
        pytest.raises(ValueError, match="root"),
    ):
        group.submit(fail, error).result()

    assert raised.value is error


def test_cancelled_of_a_set_token_is_no_failure_of_the_body():
    """
    A checkpoint in a cancelled group ends the body quietly.
    """
    with TaskGroup() as group:
        group.cancel("enough")
        current_token().check()

    assert group.failures == ()


def test_cancelled_that_nothing_asked_for_is_a_failure_of_the_body():
    """
    Raised by hand while the group's token is not set, it leaves as any exception does.
    """
    error = Cancelled("by hand")

    with pytest.raises(Cancelled) as raised, TaskGroup() as group:
        raise error

    assert raised.value is error
    assert group.failures[0].exception is error


# --- What leaves: the rules, and each pair of them ---------------------------------------------


def turn(how, group, token):
    """Set the group's token in some way (a deadline as the clock does), and wait until it is."""
    if how == "deadline":
        group.token._expire()
    elif how == "outside":
        token.cancel("outside")
    else:
        group.cancel("inside")
    assert group.token.wait(timeout=60)


@pytest.mark.parametrize("first", ["deadline", "outside", "inside"])
@pytest.mark.parametrize("second", ["deadline", "outside", "inside"])
def test_of_timeout_outside_and_cancel_the_one_that_turned_the_token_counts(first, second):
    """
    Rules three to five: what came later changes nothing.
    """
    token = CancelToken()
    group = TaskGroup(timeout=60 if first == "deadline" else None, token=token)
    left = None

    try:
        with group:
            task = started_sleeper(group)
            turn(first, group, token)
            if second != "deadline":
                turn(second, group, token)
    except BaseException as error:
        left = error

    expected = {"deadline": TimeoutError, "outside": Cancelled, "inside": type(None)}
    assert type(left) is expected[first]
    assert task.cancelled()
    assert group.failures == ()


@pytest.mark.parametrize("how", ["deadline", "outside", "inside"])
def test_failure_leaves_before_what_turned_the_token(how):
    """
    Rule two: a task that fails while it is being stopped is heard, whoever stopped it.
    """
    token = CancelToken()
    started = threading.Event()

    @cancellable(param="own")
    def fails_in_clean_up(own):
        started.set()
        try:
            own.sleep(60)
        except Cancelled:
            raise ValueError("in the clean-up") from None

    with (
        pytest.raises(ValueError, match="in the clean-up"),
        TaskGroup(timeout=60 if how == "deadline" else None, token=token) as group,
    ):
        group.submit(fails_in_clean_up)
        started.wait(timeout=60)
        turn(how, group, token)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["body", "task"])
def test_interrupt_and_exit_leave_before_an_earlier_failure(kind, where):
    """
    Rule one: they come before the first failure in time, from the body as from a task.
    """
    started = threading.Event()
    stop = kind("stop")

    @cancellable
    def answers(token):
        started.set()
        try:
            token.sleep(60)
        except Cancelled:
            raise stop from None

    with pytest.raises(kind) as raised, TaskGroup() as group:
        if where == "task":
            group.submit(answers)
            started.wait(timeout=60)
        failed = group.submit(fail, ValueError("earlier"))
        with shield():
            failed.wait(timeout=60)
        if where == "body":
            raise stop

    assert raised.value is stop
    assert isinstance(group.failures[0].exception, ValueError)


def test_group_may_be_cancelled_from_inside_a_task_and_ends_quietly():
    """
    Rule five: nothing leaves.
    """
    with TaskGroup() as group:
        other = started_sleeper(group)
        task = group.submit(lambda: group.cancel("found it"))

    assert task.result() is True
    assert other.cancelled()
    assert group.token.reason == "found it"


def test_block_cancelled_by_the_token_around_it_raises_cancelled():
    """
    Rule four: so that the outer block ends too, quietly if it was cancelled itself.
    """
    left = []
    with TaskGroup() as outer:
        try:
            with TaskGroup() as inner:
                started_sleeper(inner)
                outer.cancel("all of it")
        except Cancelled as error:
            left.append(error)
            raise

    assert left[0].reason == "all of it"
    assert outer.failures == ()


def test_cancelled_of_the_body_is_the_one_that_leaves():
    """
    It says where the body was.
    """
    outer, error = CancelToken(), None
    with pytest.raises(Cancelled) as raised, TaskGroup(token=outer):
        outer.cancel()
        try:
            fastpool.checkpoint()
        except Cancelled as cancelled:
            error = cancelled
            raise

    assert raised.value is error


def test_note_says_where_a_failure_was_that_no_task_had():
    """
    It stands beside the first one.
    """
    with pytest.raises(ValueError, match="root") as raised, TaskGroup(name="pages") as group:
        task = group.submit(fail, ValueError("root"))
        with shield():
            task.wait(timeout=60)
        raise KeyError("body")

    assert raised.value.__notes__[-1] == (
        "also in group 'pages': KeyError in the body, an input or a call from outside"
    )


def test_block_ended_by_its_token_fails_the_task_around_it():
    """
    Its `Cancelled` leaves a task whose own token is not set, and is a failure there.
    """
    token = CancelToken()

    def nests():
        with TaskGroup(token=token) as inner:
            started_sleeper(inner)
            token.cancel("only the inner one")

    with pytest.raises(Cancelled) as raised, TaskGroup() as outer:
        task = outer.submit(nests)

    assert raised.value.reason == "only the inner one"
    assert [failure.task for failure in outer.failures] == [task]


@pytest.mark.parametrize(("outer", "inner"), [(0.05, 30), (30, 0.05)])
def test_earlier_deadline_ends_its_own_block(outer, inner):
    """
    Of two nested groups with deadlines, the one whose time is up raises `TimeoutError`.
    """
    with (
        pytest.raises(TimeoutError) as raised,
        TaskGroup(timeout=outer, name="outer"),
        TaskGroup(timeout=inner, name="inner") as group,
    ):
        group.submit(sleeper)

    assert f"'{'outer' if outer < inner else 'inner'}'" in str(raised.value)


@pytest.mark.parametrize("span", [0, -1, -1e18])
def test_group_without_time_is_cancelled_from_the_start(span):
    """
    A timeout of zero or less refuses the first submit and raises `TimeoutError`.
    """
    ran = []
    with pytest.raises(TimeoutError) as raised, TaskGroup(timeout=span) as group:
        group.submit(ran.append, "begun")

    assert ran == []
    assert group.failures == ()
    assert isinstance(raised.value.__cause__, Cancelled)


def test_scope_around_a_group_turns_its_end_into_a_timeout():
    """
    `timeout()` hears the `Cancelled` of a group inside it as its own.
    """
    with pytest.raises(TimeoutError, match=r"0\.05 s"), timeout(0.05), TaskGroup() as group:
        group.submit(sleeper)


# --- Single tasks --------------------------------------------------------------------------------


def test_task_cut_short_by_its_own_timeout_has_failed():
    """
    It fails with `TimeoutError`, and the group with it.
    """
    with pytest.raises(TimeoutError, match="'slow' timed out") as raised, TaskGroup() as group:
        task = group.with_options(name="slow", timeout=0.05).submit(sleeper)

    assert task.exception() is raised.value
    assert not task.cancelled()


def test_cancelling_one_task_is_no_failure():
    """
    The task alone stops, and knows why.
    """
    with TaskGroup() as group:
        task = started_sleeper(group)
        told = [task.cancel("not needed"), task.cancel("again")]
        task.wait(timeout=60)
        other = group.submit(pow, 2, 3)

    assert told == [True, False]
    assert task.cancelled()
    assert other.result() == 8
    with pytest.raises(TaskCancelledError) as raised:
        task.result()
    assert (raised.value.reason, raised.value.__cause__) == ("not needed", None)


def test_task_that_swallows_the_cancel_has_its_value():
    """
    What it returns counts, though it was told to stop.
    """
    started = threading.Event()

    @cancellable
    def swallows(token):
        started.set()
        try:
            token.sleep(60)
        except Cancelled:
            return "enough for now"

    with TaskGroup() as group:
        task = group.submit(swallows)
        started.wait(timeout=60)
        group.cancel()

    assert task.result() == "enough for now"


# --- Leaving -------------------------------------------------------------------------------------


def test_callback_that_is_running_is_waited_for():
    """
    Another thread is in the middle of a callback of the group's token: the block is not left.
    """
    entered, release = threading.Event(), threading.Event()
    order = []

    def slow():
        entered.set()
        release.wait(timeout=60)
        order.append("callback")

    with TaskGroup() as group:
        group.token.on_cancel(slow)
        canceller = threading.Thread(target=group.cancel)
        canceller.start()
        entered.wait(timeout=60)
        threading.Thread(target=release.set).start()
    order.append("left")
    canceller.join(timeout=60)

    assert order == ["callback", "left"]


def test_callback_of_a_task_token_does_not_outlive_the_block(watched):
    """
    The same for a callback that a task left behind on its own token.
    """
    entered, release = threading.Event(), threading.Event()
    order = []

    def slow():
        entered.set()
        release.wait(timeout=60)
        order.append("callback")

    @cancellable
    def registers(token, ready):
        token.on_cancel(slow)
        ready.set()
        token.sleep(60)

    def releases(leaving):
        until(lambda: order or is_asleep(leaving))
        release.set()

    with TaskGroup() as group:
        ready = threading.Event()
        task = group.submit(registers, ready)
        ready.wait(timeout=60)
        canceller = threading.Thread(target=group.cancel)
        canceller.start()
        entered.wait(timeout=60)
        until(task.done)
        releaser = threading.Thread(target=releases, args=[threading.current_thread()])
        releaser.start()
    order.append("left")
    canceller.join(timeout=60)
    releaser.join(timeout=60)

    assert order == ["callback", "left"]
    assert group._run.loose == []


def test_callbacks_never_run_after_the_block():
    """
    The token of a group that has ended is set by nobody any more.
    """
    ran = []
    parent = CancelToken()
    with TaskGroup(token=parent) as group:
        group.token.on_cancel(lambda: ran.append(1))
    parent.cancel()

    assert group.cancel() is False
    assert group.token.cancel() is False
    assert not group.token.cancelled()
    assert ran == []


def test_nothing_that_interrupts_the_wait_ends_it():
    """
    What a signal handler raises while leaving counts as the body's, and leaving still waits.
    """
    started, release = threading.Event(), threading.Event()
    finished = []

    class Alarm(Exception):
        pass

    def handler(number, frame):
        release.set()
        raise Alarm

    def stubborn():
        started.set()
        release.wait(timeout=60)
        finished.append("finished")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(Alarm), TaskGroup() as group:
            group.submit(stubborn)
            started.wait(timeout=60)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert finished == ["finished"]
    assert [failure.task for failure in group.failures] == [None]


# --- Policies and observers ----------------------------------------------------------------------


class Tolerant:
    """A policy of the user's: gives up after so many failures; a judge of its own kind."""

    def __init__(self, most):
        self.most = most
        self.ended = []

    def start(self):
        return Tolerance(self)


class Tolerance:
    def __init__(self, policy):
        self.policy = policy
        self.told = []
        self.inside = 0

    def outcome(self, task, error):
        self.inside += 1
        assert self.inside == 1, "two at a time"
        self.told.append((task.name, error))
        self.inside -= 1
        return sum(error is not None for _, error in self.told) > self.policy.most

    def end(self, failures):
        self.policy.ended.append((len(self.told), len(failures), threading.current_thread()))
        return


def test_judge_hears_every_value_and_failure_and_decides():
    """
    The group goes on until the judge has had enough; `end` has the last word.
    """
    policy = Tolerant(most=100)

    def task(number):
        if number % 2:
            raise ValueError(number)
        return number

    with TaskGroup(8, policy=policy) as group:
        batch = group.map(task, range(200))
    with TaskGroup(8, policy=policy) as second:
        second.map(task, range(10))

    assert len(group.failures) == 100
    assert sum(task.exception() is None for task in batch.tasks) == 100
    assert policy.ended == [
        (200, 100, threading.current_thread()),
        (10, 5, threading.current_thread()),
    ]


def test_judge_that_ends_the_group_on_a_value_names_the_winner():
    """
    `group.winner` is the task whose success was enough; the others are stopped quietly.
    """

    class First:
        def start(self):
            return self

        def outcome(self, task, error):
            return error is None

        def end(self, failures):
            return None

    with TaskGroup(policy=First()) as group:
        other = started_sleeper(group)
        winner = group.submit(pow, 2, 3)

    assert group.winner is winner
    assert other.cancelled()


def test_judge_sees_the_value_it_is_told_of():
    """
    The task is done by then, so its value and its error can be read without a wait.
    """
    seen = []

    class Reader:
        def start(self):
            return self

        def outcome(self, task, error):
            seen.append((task.done(), task.exception() is error, error or task.result()))
            return False

        def end(self, failures):
            return None

    error = ValueError("root")
    with TaskGroup(1, policy=Reader()) as group:
        group.submit(pow, 2, 3)
        group.submit(fail, error)

    assert seen == [(True, True, 8), (True, True, error)]


@pytest.mark.parametrize("start", [lambda: None, lambda: fail(ValueError("no judge today"))])
def test_policy_without_a_judge_keeps_the_group_closed(start):
    """
    The block is not entered, with an error that says why, and may be entered later.
    """

    class Policy:
        def start(self):
            return judge() if ready else start()

    ready, judge = [], FailFast().start
    group = TaskGroup(policy=Policy())
    with pytest.raises((TypeError, ValueError), match="judge"):
        group.__enter__()

    assert repr(group) == f"<TaskGroup {group.name!r}, not entered>"
    ready.append(True)
    with group:
        task = group.submit(pow, 2, 3)
    assert task.result() == 8


@pytest.mark.parametrize("where", ["outcome", "end"])
def test_judge_that_raises_ends_the_group_with_that(where):
    """
    Its error leaves in place of the failures, and is none of them.
    """
    broken = ArithmeticError("of the judge")

    class Broken:
        def start(self):
            return self

        def outcome(self, task, error):
            if where == "outcome":
                raise broken
            return error is not None

        def end(self, failures):
            if where == "end":
                raise broken
            return failures[0].exception if failures else None

    with pytest.raises(ArithmeticError) as raised, TaskGroup(policy=Broken()) as group:
        if where == "outcome":
            started_sleeper(group)
            group.submit(pow, 2, 3)
        else:
            group.submit(fail, ValueError("root"))

    assert raised.value is broken
    assert all(failure.exception is not broken for failure in group.failures)


def test_interrupt_cancels_under_every_policy():
    """
    A judge that would go on is not asked about `KeyboardInterrupt`.
    """
    with pytest.raises(KeyboardInterrupt), TaskGroup(policy=Tolerant(most=100)) as group:
        other = started_sleeper(group)
        group.submit(fail, KeyboardInterrupt())

    assert other.cancelled()


def test_fail_fast_is_a_value_that_serves_many_groups():
    """
    The default, given by name.
    """
    policy = FailFast()

    for _ in range(2):
        with pytest.raises(ValueError, match="root"), TaskGroup(policy=policy) as group:
            group.submit(fail, ValueError("root"))


def test_observer_sees_everything_once_and_in_order():
    """
    Events are handed to any callable; a task's own come in their order.
    """
    seen = []
    with pytest.raises(ValueError, match="root"), TaskGroup(1, observers=[seen.append]) as group:
        good = group.submit(pow, 2, 3)
        good.wait(timeout=60)
        running = started_sleeper(group)
        never = [group.submit(pow, 2, 3) for _ in range(3)]
        raise ValueError("root")

    def of(task):
        return [event.name for event in seen if event.task is task]

    assert of(good) == ["task_submitted", "task_started", "task_succeeded"]
    assert of(running) == ["task_submitted", "task_started", "task_cancelled"]
    assert [of(task) for task in never] == [["task_submitted", "task_cancelled"]] * 3
    assert sorted(of(None)) == ["group_cancelled", "group_closed", "group_opened"]
    assert (seen[0].name, seen[-1].name) == ("group_opened", "group_closed")
    assert all(event.group is group for event in seen)
    assert all(event.duration >= 0 for event in seen if event.name == "task_succeeded")
    assert [event.time for event in seen] == sorted(event.time for event in seen)
    with pytest.raises(AttributeError):
        seen[0].name = "changed"


def test_observers_lose_nothing_of_a_thousand_tasks():
    """
    Each task is submitted, started and succeeds.
    """
    seen = []

    with TaskGroup(8, observers=[seen.append]) as group:
        group.map(pow, range(1000), [2] * 1000)

    names = [event.name for event in seen]
    assert [names.count(f"task_{what}") for what in ("submitted", "started", "succeeded")] == [
        1000
    ] * 3


# --- Memory --------------------------------------------------------------------------------------


class Witness:
    """Lives in a failed task's locals."""


def fail_with_a_local(witnesses):
    witness = Witness()
    witnesses.append(weakref.ref(witness))
    raise ValueError("root")


@cancellable
def fail_under_a_token(token, witnesses):
    witness = Witness()
    witnesses.append(weakref.ref(witness))
    with timeout(60) as scope:
        assert not scope.cancelled()
        raise ValueError("root")


def run_plainly(witnesses):
    with TaskGroup() as group:
        group.submit(fail_with_a_local, witnesses)


def run_decorated(witnesses):
    with TaskGroup() as group:
        group.submit(fail_under_a_token, witnesses)


def run_a_queue(witnesses):
    with TaskGroup(1) as group:
        group.submit(fail_under_a_token, witnesses)
        group.map(sleeper.__wrapped__, [current_token()] * 1000)


def run_and_read(witnesses):
    with TaskGroup() as group:
        task = group.submit(fail_under_a_token, witnesses)
        with shield():
            task.wait(timeout=60)
            task.exception()
            task.result()


def run_in_one_line(witnesses):
    fastpool.map(lambda number: fail_with_a_local(witnesses), range(100))


def run_after_a_nested_group(witnesses):
    def outer():
        with TaskGroup() as inner:
            task = inner.submit(pow, 2, 3)
            task.result()
        del task
        assert inner.name
        fail_with_a_local(witnesses)

    with TaskGroup() as group:
        group.submit(outer)


def run_an_input(witnesses):
    def items():
        yield 1
        fail_with_a_local(witnesses)

    with TaskGroup() as group:
        group.map(abs, items())


def run_an_input_in_one_line(witnesses):
    def items():
        yield 1
        fail_with_a_local(witnesses)

    fastpool.map(abs, items())


def run_a_wait_that_takes_too_long(witnesses):
    with TaskGroup() as group:
        task = group.submit(sleeper)

        def run_impatiently():
            witness = Witness()
            witnesses.append(weakref.ref(witness))
            with pytest.raises(TimeoutError):
                group.wait(timeout=0)
            run_to_a_value_error(task.result, timeout=0)

        run_impatiently()


def run_a_submit_to_another(witnesses):
    with TaskGroup() as ended:
        pass

    def run_submits():
        witness = Witness()
        witnesses.append(weakref.ref(witness))
        run_to_a_value_error(ended.submit, pow, 2, 3)

    with TaskGroup() as group:
        group.submit(run_submits)


def run_a_circle(witnesses):
    ready = threading.Event()
    handles = []

    def run_into_itself():
        witness = Witness()
        witnesses.append(weakref.ref(witness))
        ready.wait(timeout=60)
        run_to_a_value_error(handles.pop().result)

    with TaskGroup() as group:
        handles.append(group.submit(run_into_itself))
        ready.set()


def run_to_a_value_error(fn, *args, **kwargs):
    """Turn what a call raises into a `ValueError`, whose context it is."""
    try:
        fn(*args, **kwargs)
    except Exception as error:
        raise ValueError("root") from error


def run_a_broken_judge(witnesses):
    class Broken:
        def start(self):
            return self

        def outcome(self, task, error):
            return False

        def end(self, failures):
            fail_with_a_local(witnesses)

    with TaskGroup(policy=Broken()):
        pass


def run_a_judge_that_collects(witnesses):
    class Collecting:
        def start(self):
            return self

        def outcome(self, task, error):
            return False

        def end(self, failures):
            return ValueError("several", [failure.exception for failure in failures])

    with TaskGroup(policy=Collecting()) as group:
        group.map(lambda item: fail_with_a_local(witnesses), range(3))
        group.submit(fail_with_a_local, witnesses)


def run_a_second_failure_of_the_body(witnesses):
    def items():
        witness = Witness()
        witnesses.append(weakref.ref(witness))
        yield 1
        reading.set()
        failed.wait(timeout=60)
        raise OSError("no more")

    def run_fails():
        reading.wait(timeout=60)
        raise ValueError("root")

    reading, failed = threading.Event(), threading.Event()
    with TaskGroup() as group, shield():
        group.token.on_cancel(failed.set)
        group.submit(run_fails)
        group.map(abs, items())


def run_under_a_token(witnesses):
    @cancellable
    def run_forgetting_it(token):
        del token
        fail_with_a_local(witnesses)

    run_forgetting_it.with_token(CancelToken())


@pytest.mark.parametrize(
    "run",
    [
        run_plainly,
        run_decorated,
        run_a_queue,
        run_and_read,
        run_in_one_line,
        run_after_a_nested_group,
        run_an_input,
        run_an_input_in_one_line,
        run_a_wait_that_takes_too_long,
        run_a_submit_to_another,
        run_a_circle,
        run_a_broken_judge,
        run_a_judge_that_collects,
        run_a_second_failure_of_the_body,
        run_under_a_token,
    ],
)
def test_locals_of_a_failed_task_die_without_the_collector(run):
    """
    Once the names for group, tasks and error are gone, nothing of ours is a cycle.
    """
    witnesses = []
    gc.collect()
    gc.disable()
    try:
        try:
            run(witnesses)
        except ValueError as error:
            clear_frames(error)
        fastpool.shutdown()  # without a GIL, what a parked thread made is freed when it wakes
        alive = [witness() for witness in witnesses if witness() is not None]
    finally:
        gc.enable()

    assert len(witnesses) >= 1
    assert alive == []


def test_token_of_a_failed_task_does_not_hear_of_that_failure(monkeypatch):
    """
    Though a submit meets it just as the task is done: its locals would hold what they died of.
    """
    witnesses, met = [], []

    def submit_late():
        with suppress(GroupClosedError):
            group.submit(abs, 404)

    def close_late(ledger, task, close=Ledger.close_token):
        if not met:
            met.append(threading.Thread(target=submit_late))
            met[0].start()
            met[0].join(60)
            assert group.token.cancelled()
        close(ledger, task)

    monkeypatch.setattr(Ledger, "close_token", close_late)
    gc.collect()
    gc.disable()
    try:
        try:
            with TaskGroup(1) as group:
                group.submit(fail_under_a_token, witnesses)
        except ValueError as error:
            clear_frames(error)
        group = None
        fastpool.shutdown()
        alive = [witness() for witness in witnesses if witness() is not None]
    finally:
        gc.enable()

    assert met
    assert len(witnesses) == 1
    assert alive == []


def clear_frames(error):
    """Drop the names that the caller's own frames have for group and tasks."""
    walked = error.__traceback__
    while walked is not None:
        if walked.tb_frame.f_code.co_name.startswith("run_"):
            walked.tb_frame.clear()
        walked = walked.tb_next
    if error.__cause__ is not None:
        clear_frames(error.__cause__)


@pytest.fixture
def without_collector():
    """Nothing is freed but by the last name for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("observers", [(), (repr,)])
@pytest.mark.parametrize("following", ["submit", "map"])
@pytest.mark.usefixtures("without_collector")
def test_arguments_and_results_are_freed_with_the_handle(following, observers):
    """
    A task that is done keeps its value; once the handle is gone, so is everything.
    """
    given, named, returned = Witness(), Witness(), Witness()
    watched = [weakref.ref(given), weakref.ref(named), weakref.ref(returned)]
    go, release = threading.Event(), threading.Event()

    def work(argument, value, *, option):
        go.wait(timeout=60)
        return value

    watched.insert(0, weakref.ref(work))
    with TaskGroup(1, observers=observers) as group:
        task = group.submit(work, given, returned, option=named)
        # Its thread goes on to something else at once. Both threads run meanwhile: a free-threaded
        # build leaves some objects to the thread that made them.
        if following == "submit":
            group.submit(until, release.is_set)
        else:
            group.map(until, [release.is_set])
        go.set()
        task.wait(timeout=60)
        del work, given, named, returned
        until(lambda: sum(witness() is not None for witness in watched) == 1, within=10)
        kept = [witness() is not None for witness in watched]
        del task
        until(lambda: not any(witness() for witness in watched), within=10)
        gone = [witness() is None for witness in watched]
        release.set()

    assert kept == [False, False, False, True]
    assert gone == [True, True, True, True]


@pytest.mark.parametrize("hears", [False, True])
@pytest.mark.parametrize("call", ["submit", "map"])
def test_task_that_was_told_to_stop_is_freed_with_the_handle(call, hears):
    """
    Whether it ignores that or not: the group goes on, and keeps nothing of it.
    """
    started, release = threading.Event(), threading.Event()

    def work(_):
        started.set()
        release.wait(timeout=60)
        if hears:
            current_token().check()
        return Witness()

    with TaskGroup(1) as group:
        if call == "submit":
            task = group.submit(work, 404)
        else:
            (task,) = group.map(work, [404]).tasks
        assert started.wait(timeout=60)
        told = task.cancel()
        release.set()
        group.wait()
        watched = [weakref.ref(task)]
        if not hears:
            watched.append(weakref.ref(task.result(timeout=60)))
        stopped = task.cancelled()
        del task
        # Without a GIL the thread that made an object frees it, when it next has something to do.
        until(lambda: group.submit(int).result() or not any(one() for one in watched), within=10)
        alive = [one() for one in watched if one() is not None]

    assert told
    assert stopped is hears
    assert alive == []


@pytest.mark.parametrize("call", ["submit", "map"])
@pytest.mark.usefixtures("without_collector")
def test_task_that_is_cancelled_in_the_queue_keeps_nothing_and_is_freed_with_the_handle(call):
    """
    Neither its arguments nor its context, once a worker has come to its place; the group goes on.
    """
    variable = ContextVar("variable")
    release = threading.Event()
    watched = []

    def witness():
        made = Witness()
        watched.append(weakref.ref(made))
        return made

    def work(value, *, option):
        """It never runs."""

    def submit():
        variable.set(witness())
        if call == "submit":
            return group.submit(work, witness(), option=witness())
        return group.map(work, iter([witness()])).tasks[0]

    def gone(things):
        # Without a GIL the thread that made an object frees it, when it next has something to do.
        until(lambda: group.submit(int).result() or not any(one() for one in things), within=10)
        return not any(one() for one in things)

    with TaskGroup(1) as group:
        group.submit(release.wait, 60)
        task = Context().run(submit)
        told = task.cancel()
        release.set()
        group.wait()
        done = task.cancelled(), gone(watched)
        handle = weakref.ref(task)
        del task
        freed = gone([handle])

    assert told
    assert done == (True, True)
    assert freed
    assert len(watched) == (3 if call == "submit" else 2)


def test_group_that_has_ended_leads_to_no_task_that_never_ran():
    """
    One was cancelled, another was waited for, and no worker has come to them.
    """
    release = threading.Event()
    with TaskGroup(1) as group:
        until(group.submit(release.wait, 60).running)
        cancelled, waited = group.submit(int), group.submit(int)
        assert cancelled.cancel()
        assert not waited.wait(timeout=0.001)
        group.cancel()
        release.set()

    assert not group._run.claims
    assert not group._run.watchers


@pytest.mark.usefixtures("without_collector")
def test_group_whose_task_ran_another_as_it_waited_is_freed():
    """
    Its thread keeps nothing of it.
    """

    def parent(group):
        return group.submit(int).result()

    with TaskGroup(1) as group:
        group.submit(parent, group)
    run = weakref.ref(group._run)
    del group
    fastpool.shutdown()  # without a GIL, what a parked thread made is freed when it wakes

    assert run() is None


@pytest.mark.usefixtures("without_collector")
def test_group_that_was_abandoned_is_freed_once_its_task_has_ended():
    """
    Its threads keep nothing of it: neither that task's, nor one that was idle.
    """
    release = threading.Event()
    threads = []

    def stubborn():
        threads.append(threading.current_thread())
        release.wait(60)

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError),
        TaskGroup(2, grace=0.01, on_stuck="abandon") as group,
    ):
        until(group.submit(stubborn).running)
        threads.append(group.submit(threading.current_thread).result())
        group.cancel()
    run = weakref.ref(group._run)
    del group
    release.set()
    while threads:
        threads.pop().join(60)

    assert run() is None


@pytest.mark.usefixtures("without_collector")
@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
@pytest.mark.parametrize("way", ["submit", "map"])
def test_thread_that_is_left_behind_keeps_nothing_of_what_was_cancelled(way):
    """
    It has the group for as long as it runs, but what was queued there no worker comes to.
    """
    release = threading.Event()
    with pytest.raises(StuckTaskError), TaskGroup(1, grace=0.01, on_stuck="abandon") as group:
        until(group.submit(release.wait, 60).running)
        task = group.submit(id, 404) if way == "submit" else group.map(id, [404]).tasks[0]
        assert task.cancel()
        handle = weakref.ref(task)
        del task
        group.cancel()
    alive = handle()
    release.set()

    assert alive is None


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_who_waits_for_what_a_helper_is_about_to_run_is_told_as_the_block_is_left(
    make_pool, monkeypatch
):
    """
    It has been decided that the waiting worker runs it, and not been said that it does.
    """
    decide, held, goes_on = _ledger._Claim.decide, threading.Event(), threading.Event()
    tasks, ran, waiters = [], [], []

    def decide_and_hold(claim, verdict):
        decided = decide(claim, verdict)
        if isinstance(verdict, Lane) and verdict.below is not None:
            held.set()
            assert goes_on.wait(timeout=60)
        return decided

    def parent():
        tasks.append(group.submit(ran.append, 404))
        tasks[0].wait()

    pool = make_pool(1)
    monkeypatch.setattr(_ledger._Claim, "decide", decide_and_hold)
    with (
        pytest.raises(StuckTaskError),
        TaskGroup(pool=pool, grace=0, on_stuck="abandon") as group,
    ):
        group.submit(parent)
        assert held.wait(timeout=60)
        waiters.append(start(tasks[0].wait))
        until(lambda: tasks[0] in group._run.watchers)
        group.cancel()
    waiter, outcome = waiters[0]
    waiter.join(timeout=20)
    told = list(outcome)
    goes_on.set()
    pool.apply(int)

    assert told == [True]
    assert tasks[0].cancelled()
    assert ran == []


POOLS = {
    "workers": (lambda: ThreadPool(1), lambda pool: pool.apply(int)),
    "processes": (lambda: Processes(1), lambda pool: until(lambda: not pool._serving)),
}


@pytest.fixture(params=POOLS)
def taken_late(request, monkeypatch):
    """
    A pool, and a call that is taken from the queue of a group of it, and no further: an event
    when it is, and what lets the worker go on and waits until it has left the group.
    """
    make, leave = POOLS[request.param]
    take, held, goes_on = Run.take_places, threading.Event(), threading.Event()

    def take_late(run, lane, most=1):
        places = take(run, lane, most)
        if places:
            held.set()
            assert goes_on.wait(timeout=60)
        return places

    def go_on():
        goes_on.set()
        leave(pool)

    pool = make()
    with TaskGroup(pool=pool) as group:
        group.submit(int)  # the worker is ready
    monkeypatch.setattr(Run, "take_places", take_late)
    yield pool, held, go_on
    go_on()
    if request.param == "workers":
        pool.close()
        pool.join()


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_who_takes_values_of_what_a_worker_is_about_to_run_is_told_as_the_block_is_left(
    watched, taken_late
):
    """
    It never runs, and whoever takes them is in another thread, whose own token is not set.
    """
    pool, held, _ = taken_late
    with TaskGroup(pool=pool, grace=0, on_stuck="abandon") as group:
        thread, outcome = start(lambda: list(group.imap_unordered(abs, [-404])))
        assert held.wait(timeout=60)
        until(lambda: is_asleep(thread))
        group.cancel("enough")
    thread.join(timeout=20)

    assert list(map(type, outcome)) == [TaskCancelledError]


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_what_a_worker_lets_go_as_the_block_is_left_is_not_said_to_run(taken_late, monkeypatch):
    """
    Just before it is asked what it is at; and it is told to have ended once.
    """
    pool, held, go_on = taken_late
    cancel, told = CancelToken.cancel, []

    def cancel_late(token, reason=None):
        won = cancel(token, reason)
        if token is group.token and group._run.abandoned is not None:
            go_on()
        return won

    monkeypatch.setattr(CancelToken, "cancel", cancel_late)
    with TaskGroup(
        pool=pool, grace=0, on_stuck="abandon", observers=[lambda event: told.append(event.name)]
    ) as group:
        task = group.submit(abs, -1)
        assert held.wait(timeout=60)
        group.cancel("enough")

    assert task.cancelled()
    assert told == [
        "group_opened",
        "task_submitted",
        "group_cancelled",
        "task_cancelled",
        "group_closed",
    ]


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_what_a_thread_lets_go_as_the_block_is_left_is_not_said_to_run(monkeypatch):
    """
    The same in a thread of the group's own, which stays on.
    """
    admit, cancel, rest = Ledger.admit, CancelToken.cancel, Run.rest
    held, goes_on, rested = (threading.Event() for _ in range(3))

    def admit_late(run, task, lane):
        admitted = admit(run, task, lane)
        held.set()
        assert goes_on.wait(timeout=60)
        return admitted

    def cancel_late(token, reason=None):
        won = cancel(token, reason)
        if token is group.token and group._run.abandoned is not None:
            goes_on.set()
            assert rested.wait(timeout=60)
        return won

    def note(run, lane):
        rests = rest(run, lane)
        if run.abandoned is not None:
            rested.set()
        return rests

    monkeypatch.setattr(Ledger, "admit", admit_late)
    monkeypatch.setattr(CancelToken, "cancel", cancel_late)
    monkeypatch.setattr(Run, "rest", note)
    with TaskGroup(1, grace=0, on_stuck="abandon") as group:
        task = group.with_options(timeout=60).submit(abs, -1)
        assert held.wait(timeout=60)
        group.cancel("enough")

    assert task.cancelled()


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_task_that_is_about_to_begin_as_its_block_is_left_is_told_to_have_ended_once(monkeypatch):
    """
    It is left behind, and so is not told as cancelled as well.
    """
    started, held, goes_on, told = Ledger.started, threading.Event(), threading.Event(), []

    def start_late(run, task, lane):
        held.set()
        assert goes_on.wait(timeout=60)
        started(run, task, lane)

    monkeypatch.setattr(Ledger, "started", start_late)
    with (
        pytest.raises(StuckTaskError),
        TaskGroup(
            1, grace=0, on_stuck="abandon", observers=[lambda event: told.append(event.name)]
        ) as group,
    ):
        group.submit(abs, -1)
        assert held.wait(timeout=60)
        group.cancel()
        until(lambda: "group_cancelled" in told)  # in a helper
    seen = list(told)
    goes_on.set()

    assert seen == [
        "group_opened",
        "task_submitted",
        "group_cancelled",
        "task_abandoned",
        "group_closed",
    ]


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_what_is_told_of_an_abandoned_task_is_told_in_its_context():
    """
    And whoever submits afterwards hears how its group was left.
    """
    release, variable, seen = threading.Event(), ContextVar("request"), []

    def observe(event):
        if event.name == "task_abandoned":
            seen.append(variable.get())

    with (
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0, on_stuck="abandon", observers=[observe]) as group,
    ):
        variable.set("of the task")
        until(group.submit(release.wait, 60).running)
        variable.set("of the block")
        group.cancel()
    release.set()

    assert seen == ["of the task"]
    with pytest.raises(GroupClosedError, match="its with block was left while tasks still ran"):
        group.submit(abs, -1)


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
@pytest.mark.parametrize("named", [{}, {"value": 404}])
def test_handle_of_what_was_left_behind_stays_cancelled(named):
    """
    Whatever its task comes to.
    """
    goes_on, threads = threading.Event(), []

    def hold(value=0):
        threads.append(threading.current_thread())
        goes_on.wait(timeout=60)
        return value

    with pytest.raises(StuckTaskError), TaskGroup(1, grace=0, on_stuck="abandon") as group:
        task = group.submit(hold, **named)
        until(lambda: threads)
        group.cancel()
    before = task.cancelled()
    goes_on.set()
    threads[0].join(timeout=60)

    assert not threads[0].is_alive()
    assert [before, task.cancelled()] == [True, True]


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_abandoned_group_is_told_as_closed_after_its_cancel(watched):
    """
    That is told by a helper, which is still at it as the block is left.
    """
    release, told = threading.Event(), []

    def observe(event):
        if event.name == "group_cancelled":
            until(lambda: "task_abandoned" in told)
            until(lambda: "group_closed" in told or is_asleep(threading.main_thread()))
        told.append(event.name)

    with (
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0, on_stuck="abandon", observers=[observe]) as group,
    ):
        until(group.submit(release.wait, 60).running)
        group.cancel()
    until(lambda: "group_cancelled" in told)
    seen = told[-3:]
    release.set()

    assert seen == ["task_abandoned", "group_cancelled", "group_closed"]


def test_who_waits_for_the_token_of_a_group_is_not_woken_by_a_good_end(monkeypatch):
    """
    A wait that nothing ends says that the token is not set.
    """
    opened, opens = [], Gate.open

    def note(gate):
        opened.append(gate)
        opens(gate)

    monkeypatch.setattr(Gate, "open", note)
    with TaskGroup(1) as group:
        thread, outcome = start(group.token.wait)
        until(group.token._sleepers)
        group.submit(int)
    (gate,) = group.token._sleepers()
    woken = gate in opened
    gate.open()
    thread.join(timeout=60)

    assert not woken
    assert outcome == [False]


def test_group_refuses_clearly_after_it_failed():
    """
    From outside, a submit to a cancelled group says why; from inside it is `Cancelled`.
    """
    outside, ran, seen = [], [], []
    with pytest.raises(ValueError, match="root"), TaskGroup(observers=[seen.append]) as group:
        with shield():
            group.submit(fail, ValueError("root")).wait(timeout=60)
            with pytest.raises(GroupClosedError, match="it was cancelled") as refused:
                group.submit(ran.append, "outside")
            outside.append(refused.value.reason)
        with use_token(group.token), pytest.raises(Cancelled):
            group.submit(ran.append, "inside")
        queued = list(group._run.queue)

    assert isinstance(outside[0], ValueError)
    assert queued == []
    assert ran == []
    assert [event.name for event in seen].count("task_submitted") == 1
