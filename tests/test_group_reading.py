"""How handles are read: tasks, batches, and groups that are waited for."""

import concurrent.futures
import itertools
import math
import sys
import threading
import traceback
import types
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import pytest
from staging import act_at, in_thread, is_asleep, resize, start, trace_this_thread, until

import fastpool
from fastpool import (
    Batch,
    Cancelled,
    CancelToken,
    StuckTaskError,
    Task,
    TaskCancelledError,
    TaskGroup,
    _run,
    cancellable,
    current_token,
    shield,
    use_token,
)
from fastpool._gate import Gate
from fastpool._lane import Lane
from fastpool._ledger import Ledger
from fastpool._run import Run
from fastpool.backends import threads


class Lenient:
    """A policy, and its judge, under which no failure cancels or leaves."""

    def start(self):
        return self

    def outcome(self, task, error):
        return False

    def end(self, failures):
        return None


def fails():
    """A task that fails."""
    raise ValueError("bad header")


# Every way to wait for a batch of tasks or its first one, without limit.
WAITS = {
    "result": lambda group, batch: batch.tasks[0].result(),
    "get": lambda group, batch: batch.tasks[0].get(),
    "exception": lambda group, batch: batch.tasks[0].exception(),
    "wait": lambda group, batch: batch.tasks[0].wait(),
    "result in time": lambda group, batch: batch.tasks[0].result(timeout=60),
    "wait in time": lambda group, batch: batch.tasks[0].wait(timeout=60),
    "Batch.results": lambda group, batch: batch.results(),
    "Batch.wait": lambda group, batch: batch.wait(),
    "iterate": lambda group, batch: list(batch),
    "Batch.as_completed": lambda group, batch: list(batch.as_completed()),
    "group.wait": lambda group, batch: group.wait(),
    "as_completed": lambda group, batch: list(fastpool.as_completed(batch.tasks)),
}
# Those that raise for a task without a value, and what they say for one with 404.
VALUES = {
    "result": 404,
    "get": 404,
    "exception": None,
    "result in time": 404,
    "Batch.results": [404],
    "iterate": [404],
    "Batch.as_completed": [(0, 404)],
}
# The others only tell that it is done.
DONE = {"wait": True, "wait in time": True, "Batch.wait": True, "group.wait": None}


# --- A task that is done ------------------------------------------------------------------------


def test_done_task_answers_whatever_the_tokens_say(workers):
    """
    A value is there for whoever asks, under a set token and in a cancelled group too.
    """
    with TaskGroup(**workers(1)) as group:
        batch = group.map(resize, [404])
        batch.wait()
        group.cancel()
        in_body = [wait(group, batch) for name, wait in WAITS.items() if name in VALUES]
    token = CancelToken()
    token.cancel()
    with use_token(token):
        after = [wait(group, batch) for name, wait in WAITS.items() if name in VALUES]
        at_once = batch.tasks[0].result(timeout=0), batch.tasks[0].exception(timeout=-1)

    assert in_body == after == list(VALUES.values())
    assert at_once == (404, None)


def test_failed_task_answers_whatever_the_tokens_say(workers):
    """
    A failure is raised for whoever asks: the object itself, not the `Cancelled` that it caused.
    """
    failure = ValueError("bad header")

    def fails():
        raise failure

    with pytest.raises(ValueError, match="bad header"), TaskGroup(**workers(1)) as group:
        task = group.submit(fails)
        group.token.wait(timeout=60)
        with pytest.raises(ValueError, match="bad header") as in_body:
            task.result()
        returned = task.exception()
    with pytest.raises(ValueError, match="bad header") as after:
        task.get()

    assert in_body.value is after.value is returned is failure


def test_body_that_waits_for_the_task_that_fails_hears_its_failure(watched):
    """
    The task is done before the token is set, so at no line its waiter can hear `Cancelled`.
    """
    main = threading.current_thread()

    def race(step):
        reached, heard = threading.Event(), []

        def look():
            # The waiter wakes if there is anything to wake for.
            reached.set()
            until(lambda: heard or is_asleep(main))

        def fails():
            until(lambda: is_asleep(main))
            trace_this_thread(act_at(step, look))
            raise ValueError("bad header")

        with suppress(ValueError), TaskGroup(1) as group:
            task = group.submit(fails)
            try:
                task.result()
            except BaseException as error:
                heard.append(type(error))
                raise
        # The trace goes with its thread.
        fastpool.shutdown()
        return reached.is_set(), heard

    races = list(itertools.takewhile(lambda race: race[0], map(race, range(80))))

    assert len(races) > 10
    assert all(heard == [ValueError] for _, heard in races)


def test_failure_is_read_with_the_traceback_of_its_task(workers):
    """
    However often a failure is read, its traceback is what the task left, and grows no longer.
    """

    def deeper():
        raise ValueError("bad header")

    def fails():
        deeper()

    def names(error):
        return [frame.name for frame in traceback.extract_tb(error.__traceback__)]

    def read():
        try:
            task.result()
        except ValueError as error:
            return names(error)

    with suppress(ValueError), TaskGroup(**workers(1)) as group:
        task = group.submit(fails)
    at_first = names(task.exception())
    read_out = [read() for _ in range(5)]
    at_last = names(task.exception())

    assert at_first == at_last == ["fails", "deeper"]
    assert all(frames == read_out[0] for frames in read_out)
    assert read_out[0][-2:] == ["fails", "deeper"]


def test_every_reader_gets_the_same_object(watched, workers):
    """
    Threads that wait for one task get the one value, or the one exception.
    """
    release = threading.Event()
    value, failure = object(), ValueError("bad header")

    def returns():
        release.wait(timeout=60)
        return value

    def fails():
        release.wait(timeout=60)
        raise failure

    with suppress(ValueError), TaskGroup(policy=Lenient(), **workers(2)) as group:
        good, bad = group.submit(returns), group.submit(fails)
        readers = [start(task.result) for task in (good, bad) for _ in range(8)]
        until(lambda: all(is_asleep(thread) for thread, _ in readers))
        release.set()
        for thread, _ in readers:
            thread.join(timeout=60)

    assert [outcome for _, [outcome] in readers] == [value] * 8 + [failure] * 8


def test_value_that_is_an_exception_is_a_value(workers):
    """
    Returning an exception is no failure.
    """
    returned = ValueError("no failure")

    with TaskGroup(**workers(1)) as group:
        batch = group.map(resize, [returned])

    assert batch.tasks[0].result() is returned
    assert batch.tasks[0].exception() is None
    assert batch.results() == [returned]
    assert batch.tasks[0].successful()


# --- How it stands ------------------------------------------------------------------------------


def states(task):
    return task.running(), task.done(), task.cancelled()


def test_task_says_how_it_stands(workers):
    """
    A task is queued, running, then done.
    """
    started, release = threading.Event(), threading.Event()

    def hold():
        started.set()
        release.wait(timeout=60)
        return 404

    with TaskGroup(**workers(1)) as group:
        first, second = group.submit(hold), group.submit(resize, 405)
        started.wait(timeout=60)
        during = states(first), states(second)
        release.set()
        second.wait()
        after = states(first), states(second)

    assert during == ((True, False, False), (False, False, False))
    assert after == ((False, True, False), (False, True, False))


def test_task_is_named_after_its_function(workers):
    """
    A handle bears the name of the function it stands for.
    """
    with TaskGroup(**workers(1)) as group:
        task = group.submit(resize, 404)
        before = task.name
        task.wait()

    assert isinstance(task, Task)
    assert before == task.name == "resize"


def test_task_takes_no_attribute_of_yours():
    """
    It has no dictionary, for there are many of it.
    """
    with TaskGroup(1) as group:
        task = group.submit(resize, 404)
        with pytest.raises(AttributeError):
            task.label = "mine"

    assert not hasattr(task, "__dict__")


def test_task_stands_where_an_async_result_stood(workers):
    """
    `get`, `ready` and `successful` are those of `multiprocessing.pool.AsyncResult`.
    """
    release = threading.Event()

    def hold():
        release.wait(timeout=60)
        return 404

    with TaskGroup(policy=Lenient(), **workers(1)) as group:
        running, failing, stopped = group.submit(hold), group.submit(fails), group.submit(resize, 1)
        stopped.cancel()
        early = running.ready(), failing.ready(), stopped.ready()
        for task in (running, failing):
            with pytest.raises(ValueError, match="not"):
                task.successful()
        with pytest.raises(TimeoutError):
            running.get(timeout=0)
        release.set()
        value = running.get()
        failing.wait()

    assert early == (False, False, True)
    assert value == running.get(timeout=1) == running.get(1) == 404
    assert (running.ready(), failing.ready()) == (True, True)
    assert running.successful() is True
    assert failing.successful() is False
    assert stopped.successful() is False


# --- Timeouts -----------------------------------------------------------------------------------

TIMED = {
    "result": lambda group, batch, timeout: batch.tasks[0].result(timeout=timeout),
    "get": lambda group, batch, timeout: batch.tasks[0].get(timeout),
    "exception": lambda group, batch, timeout: batch.tasks[0].exception(timeout=timeout),
    "wait": lambda group, batch, timeout: batch.tasks[0].wait(timeout=timeout),
    "Batch.results": lambda group, batch, timeout: batch.results(timeout=timeout),
    "Batch.wait": lambda group, batch, timeout: batch.wait(timeout=timeout),
    "group.wait": lambda group, batch, timeout: group.wait(timeout=timeout),
}


@pytest.mark.parametrize("timeout", [0, -1, 0.01])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", TIMED)
def test_wait_that_takes_too_long_leaves_the_task_alone(workers, name, count, timeout):
    """
    A task or batch's `wait` is False then, all others raise `TimeoutError`; the task goes on.
    """
    release = threading.Event()

    def hold(width):
        release.wait(timeout=60)
        return width

    with TaskGroup(**workers(count)) as group:
        group.submit(hold, 403)
        # Running with two workers, queued with one.
        batch = group.map(hold, [404])
        if name in ("wait", "Batch.wait"):
            answer = TIMED[name](group, batch, timeout)
        else:
            with pytest.raises(TimeoutError) as caught:
                TIMED[name](group, batch, timeout)
            answer = caught.type is not TimeoutError
        release.set()
        value = batch.tasks[0].result()

    assert answer is False
    assert value == 404
    assert group.failures == ()


class Span:
    """A number of seconds that has no format of its own."""

    def __float__(self):
        return 0.01


@pytest.mark.parametrize("span", [Span(), Fraction(1, 100), Decimal("0.01"), 0.01])
def test_timeout_may_be_any_number(span):
    """
    Its error says the seconds, whatever kind of number they came as.
    """
    release = threading.Event()
    with TaskGroup(1) as group:
        batch = group.map(release.wait, [60])
        for read in (batch.tasks[0].result, batch.tasks[0].exception, batch.results, group.wait):
            with pytest.raises(TimeoutError, match=r"0\.01 s"):
                read(timeout=span)
        release.set()


def test_cancelled_task_says_so_whatever_the_reason_says():
    """
    A reason whose text cannot be had is named by its class.
    """

    class Reason:
        def __str__(self):
            raise ValueError("no text")

    reason = Reason()
    with TaskGroup() as group:
        group.cancel(reason)
        with shield(), pytest.raises(fastpool.GroupClosedError, match="Reason") as raised:
            group.submit(resize, 404)
        with pytest.raises(Cancelled) as cancelled:
            group.token.check()

    assert raised.value.reason is cancelled.value.reason is reason
    assert str(cancelled.value) == Reason.__qualname__


@pytest.mark.parametrize("timeout", [None, math.inf, 1e18, 10])
@pytest.mark.parametrize("name", TIMED)
def test_wait_may_be_as_long_as_one_likes(watched, name, timeout):
    """
    `None` and infinity are no limit, and no number is too large.
    """
    release = threading.Event()
    main = threading.current_thread()

    def hold(width):
        until(lambda: is_asleep(main))
        release.wait(timeout=60)
        return width

    with TaskGroup(1) as group:
        batch = group.map(hold, [404])
        releaser, _ = start(lambda: (until(lambda: is_asleep(main)), release.set()))
        answer = TIMED[name](group, batch, timeout)
        releaser.join(timeout=60)

    assert answer == {**VALUES, **DONE}[name]


@pytest.mark.parametrize(("timeout", "error"), [(math.nan, ValueError), ("5", TypeError)])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("name", TIMED)
def test_timeout_that_is_no_number_of_seconds_is_refused(name, done, timeout, error):
    """
    NaN is a `ValueError`, whether there is something to wait for or not.
    """
    release = threading.Event()

    with TaskGroup(1) as group:
        batch = group.starmap(release.wait, [(60,)])
        if done:
            release.set()
            batch.wait()
        with pytest.raises(error, match="timeout"):
            TIMED[name](group, batch, timeout)
        release.set()


# --- Waits and tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_wait_listens_to_the_callers_token(watched, workers, wait, early, count):
    """
    Setting the current token of whoever waits ends the wait, and the task goes on.
    """
    main = threading.current_thread()
    release, token = threading.Event(), CancelToken()

    def hold():
        release.wait(timeout=60)
        return 404

    def cancel():
        until(lambda: is_asleep(main))
        token.cancel("rain")

    with TaskGroup(**workers(count)) as group:
        group.submit(hold)
        batch = group.starmap(hold, [()])
        if early:
            token.cancel("rain")
        canceller = None if early else start(cancel)
        with use_token(token), pytest.raises(Cancelled, match="rain") as caught:
            wait(group, batch)
        if canceller:
            canceller[0].join(timeout=60)
        release.set()

    assert caught.value.token is token
    assert batch.results() == [404]
    assert group.failures == ()


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_wait_in_a_task_listens_to_that_task(watched, workers, wait):
    """
    A task that is cancelled while it waits for tasks of another group stops waiting.
    """
    release = threading.Event()

    def waits():
        threads.append(threading.current_thread())
        wait(others, batch)

    threads = []
    with TaskGroup(2) as others, TaskGroup(**workers(1)) as group:
        batch = others.starmap(release.wait, [(60,)])
        until(batch.tasks[0].running)
        waiter = group.submit(waits)
        until(lambda: threads and is_asleep(threads[0]))
        waiter.cancel("rain")
        waiter.wait(timeout=60)
        state = waiter.cancelled(), batch.done(), group.token.cancelled()
        release.set()

    assert state == (True, False, False)
    assert batch.results() == [True]


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_deadline_of_the_caller_ends_the_wait(wait):
    """
    A scope's `timeout` limits every wait inside it.
    """
    release = threading.Event()

    with TaskGroup(1) as group:
        batch = group.starmap(release.wait, [(60,)])
        with pytest.raises(TimeoutError), fastpool.timeout(0.01):
            wait(group, batch)
        release.set()

    assert batch.results() == [True]


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_body_that_waits_hears_of_a_failure_elsewhere(watched, workers, wait):
    """
    The body's wait for a task that would never end is over when another task fails.
    """
    main = threading.current_thread()

    def fails_later():
        until(lambda: is_asleep(main))
        raise ValueError("bad header")

    heard = []
    release = threading.Event()
    with pytest.raises(ValueError, match="bad header"), TaskGroup(**workers(2)) as group:
        batch = group.starmap(release.wait, [(60,)])
        group.submit(fails_later)
        try:
            wait(group, batch)
        except BaseException as error:
            heard.append(type(error))
            raise
        finally:
            release.set()

    assert heard == [Cancelled]


EVENTS = ["the task ends", "the task is cancelled", "the group is cancelled", "the token is set"]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", [name for name in WAITS if "time" not in name])
def test_wait_misses_nothing(watched, name, event):
    """
    At whatever line a wait is when what it waits for happens, it ends.
    """

    def race(step):
        release, token, reached = threading.Event(), CancelToken(), threading.Event()
        happened = threading.Event()

        def happen():
            if event == "the task ends":
                release.set()
                until(batch.done)
            elif event == "the task is cancelled":
                batch.tasks[0].cancel()
            elif event == "the group is cancelled":
                group.cancel()
            else:
                token.cancel()
            if name == "group.wait" and event != "the token is set":
                release.set()
            happened.set()

        def act():
            reached.set()
            happen()

        def read():
            with use_token(token):
                sys.settrace(act_at(step, act))
                try:
                    return WAITS[name](group, batch)
                finally:
                    sys.settrace(None)

        with TaskGroup(1) as group:
            group.submit(release.wait, 60)
            batch = group.map(resize, [404])
            reader, outcome = start(read)
            until(lambda: reached.is_set() or is_asleep(reader))
            if not reached.is_set():
                happen()
            happened.wait(timeout=60)
            reader.join(timeout=60)
            release.set()
        return reached.is_set(), outcome, batch

    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert len(races) > 10
    for _, outcome, batch in races:
        if event == "the task ends":
            expected = {**VALUES, **DONE, "as_completed": list(batch.tasks)}[name]
            assert outcome == [expected]
        elif event == "the token is set":
            assert [type(error) for error in outcome] == [Cancelled]
        elif name in VALUES:
            assert [type(error) for error in outcome] == [TaskCancelledError]
        else:
            assert outcome == [{**DONE, "as_completed": list(batch.tasks)}[name]]


# --- group.wait ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("call", ["submit", "map"])
def test_group_wait_waits_for_what_was_submitted_before(watched, workers, call, count):
    """
    It returns while a task submitted later still runs, and more can be submitted after it.
    """
    first, second = threading.Event(), threading.Event()

    with TaskGroup(**workers(count)) as group:
        if call == "submit":
            early = [group.submit(first.wait, 60), *group.map(resize, range(5)).tasks]
        else:
            early = [*group.map(resize, range(5)).tasks, *group.map(first.wait, [60]).tasks]
            until(early[-1].running)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        late = group.submit(second.wait, 60)
        still_waiting = not outcome
        first.set()
        waiter.join(timeout=60)
        seen = [task.done() for task in early], late.done(), list(outcome)
        second.set()
        group.wait()
        at_last = late.done()
        more = group.submit(resize, 404)

    assert still_waiting
    assert seen == ([True] * 6, False, [None])
    assert at_last
    assert more.result() == 404


@pytest.mark.parametrize(
    ("lane", "why"),
    [
        ("new", "recalled"),
        ("new", "no memory"),
        ("of a pool", "interrupted"),
        ("idle", "recalled"),
        ("idle", "no memory"),
    ],
)
def test_group_wait_that_begins_as_a_worker_is_called_does_not_wait_for_one_that_never_comes(
    watched, monkeypatch, make_pool, lane, why
):
    """
    Others have run all there was by then, so it is called back; or it could not be called, or a
    signal handler raised as it was.
    """
    begin, release, goes_on = Run.begin, threading.Event(), threading.Event()
    enlist = Run.enlist
    late, waiters, ended = [], [], []

    class Called(dict):
        def __setitem__(self, lane, value):
            if not late:
                late.append(lane)
                waiters.append(start(group.wait))
                until(lambda: is_asleep(waiters[0][0]))
                if why == "no memory":
                    raise MemoryError("no room for an entry")
            super().__setitem__(lane, value)

    def begin_late(run, lane):
        if lane in late:
            assert goes_on.wait(timeout=60)
        return begin(run, lane)

    def enlist_and_raise(*arguments):
        enlist(*arguments)
        if why == "interrupted" and late:
            raise TimeoutError("what an alarm's handler raises")

    monkeypatch.setattr(Run, "enlist", enlist_and_raise)
    with TaskGroup(2, pool=make_pool(2) if lane == "of a pool" else None) as group:
        if lane == "idle":
            both = threading.Barrier(2, timeout=60)
            group.map(lambda _: both.wait(), range(2)).wait()
            until(group._run.at_rest)
        running = group.submit(release.wait, 60)
        until(running.running)
        monkeypatch.setattr(Run, "begin", begin_late)
        group._run.called = Called()
        with suppress(MemoryError, TimeoutError):
            group.submit(int)
        release.set()
        if why != "recalled":  # by the end of the block
            waiters[0][0].join(timeout=20)
            ended += waiters[0][1]
    waiter, outcome = waiters[0]
    waiter.join(timeout=20)
    ended += outcome
    goes_on.set()

    assert len(ended) == 1 + (why != "recalled")
    assert not any(ended)


def test_group_wait_that_begins_as_a_worker_is_called_back_leaves_it_out(watched, monkeypatch):
    """
    It has just been taken off those that are called, and is not among those that rest yet.
    """
    begin, release, goes_on = Run.begin, threading.Event(), threading.Event()
    late, waiters = [], []

    class Recalled(dict):
        def __setitem__(self, lane, value):
            waiters.append(start(group.wait))
            until(lambda: waiters[0][1] or is_asleep(waiters[0][0]))
            super().__setitem__(lane, value)

    def begin_late(run, lane):
        if running._lane is not lane:
            late.append(lane)
            assert goes_on.wait(timeout=60)
        return begin(run, lane)

    with TaskGroup(2) as group:
        both = threading.Barrier(2, timeout=60)
        group.map(lambda _: both.wait(), range(2)).wait()
        until(group._run.at_rest)
        running = group.submit(release.wait, 60)
        until(running.running)
        monkeypatch.setattr(Run, "begin", begin_late)
        group._run.recalled = Recalled()
        group.submit(int)
        until(lambda: late)
        release.set()
    waiter, outcome = waiters[0]
    waiter.join(timeout=20)
    ended = list(outcome)
    goes_on.set()

    assert ended == [None]


def test_group_wait_does_not_wait_for_a_worker_that_was_about_to_end(
    watched, make_pool, monkeypatch
):
    """
    It had found nothing more to do as the wait began.
    """
    dismiss, held, goes_on = Run.dismiss, threading.Event(), threading.Event()

    def dismiss_late(run, lane):
        held.set()
        assert goes_on.wait(timeout=60)
        dismiss(run, lane)

    monkeypatch.setattr(Run, "dismiss", dismiss_late)
    with TaskGroup(pool=make_pool(1)) as group:
        group.submit(int)
        assert held.wait(timeout=60)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        goes_on.set()
        waiter.join(timeout=20)
        ended = list(outcome)

    assert ended == [None]


def test_group_wait_does_not_wait_for_a_worker_that_broke_as_it_came_to_rest(watched, monkeypatch):
    """
    It was about to say that it had nothing in hand.
    """
    rest, passed = Run.rest, Run.passed
    held, goes_on = threading.Event(), threading.Event()
    broken = MemoryError("as it rests")

    def rest_late(run, lane):
        held.set()
        assert goes_on.wait(timeout=60)
        monkeypatch.setattr(Run, "passed", breaks)
        return rest(run, lane)

    def breaks(run, lane):
        monkeypatch.setattr(Run, "passed", passed)
        raise broken

    monkeypatch.setattr(Run, "rest", rest_late)
    with pytest.raises(MemoryError) as raised, TaskGroup(1) as group:
        group.submit(int)
        assert held.wait(timeout=60)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        monkeypatch.setattr(Run, "rest", rest)
        goes_on.set()
        waiter.join(timeout=20)
        ended = list(outcome)

    assert raised.value is broken
    assert ended == [None]


def test_group_wait_in_a_worker_does_not_wait_for_one_that_it_stands_in_for(watched, make_pool):
    """
    Another thread calls one just as it begins to wait, and it takes the call back.
    """
    held, entered, ran, inner = threading.Event(), threading.Event(), [], []

    class Called(dict):
        def __setitem__(self, lane, value):
            if not held.is_set():
                held.set()
                until(lambda: is_asleep(inner[1]))
            super().__setitem__(lane, value)

    def worker():
        with TaskGroup(pool=pool) as group:
            group._run.called = Called()
            inner.extend((group, threading.current_thread()))
            entered.set()
            assert held.wait(timeout=60)
            group.wait()
            ran.append("waited")

    def outer():
        with TaskGroup(pool=pool) as group:
            group.submit(worker)

    pool = make_pool(1)
    thread, outcome = start(outer)
    assert entered.wait(timeout=60)
    task = inner[0].submit(ran.append, "task")
    thread.join(timeout=20)
    ended = list(outcome)
    inner[0].cancel()  # or it would hang on

    assert ended == [None]
    assert task.done()
    assert ran == ["task", "waited"]


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
@pytest.mark.parametrize("begins", ["before", "after"])
def test_group_wait_ends_though_the_block_was_left_as_a_worker_came_to_rest(
    watched, monkeypatch, begins
):
    """
    It was at nothing that could be named, and nobody takes it back.
    """
    rest = Run.rest
    held, goes_on, rested, release = (threading.Event() for _ in range(4))
    running, waiters = [], []

    def rest_late(run, lane):
        if not running or held.is_set():
            return rest(run, lane)
        held.set()
        assert goes_on.wait(timeout=60)
        comes = rest(run, lane)
        rested.set()
        return comes

    def wait():
        waiters.append(start(group.wait))
        until(lambda: is_asleep(waiters[0][0]))

    def observe(event):
        if event.name == "task_abandoned" and begins == "after":
            goes_on.set()
            assert rested.wait(timeout=60)
            wait()

    monkeypatch.setattr(Run, "rest", rest_late)
    with (
        pytest.raises(StuckTaskError),
        TaskGroup(2, grace=0, on_stuck="abandon", observers=[observe]) as group,
    ):
        stuck = group.submit(release.wait, 60)
        until(stuck.running)
        running.append(stuck)
        group.submit(int)
        assert held.wait(timeout=60)
        if begins == "before":
            wait()
        group.cancel()
    waiter, outcome = waiters[0]
    waiter.join(timeout=20)
    ended = list(outcome)
    goes_on.set()
    release.set()

    assert ended == [None]


def test_group_wait_that_has_begun_ends_with_the_block(watched, monkeypatch):
    """
    It had noted all workers, and was yet to look which of them rest, as they were let go.
    """
    look, held, goes_on = Run.look_at_queue, threading.Event(), threading.Event()

    def look_late(run):
        if threading.current_thread() in waiters and not held.is_set():
            held.set()
            assert goes_on.wait(timeout=60)
        look(run)

    def wait():
        waiters.append(threading.current_thread())
        group.wait()

    waiters = []
    monkeypatch.setattr(Run, "look_at_queue", look_late)
    with TaskGroup(2) as group:
        group.submit(int).result()
        thread, outcome = start(wait)
        assert held.wait(timeout=60)
    goes_on.set()
    thread.join(timeout=20)

    assert outcome == [None]


def test_group_wait_waits_for_no_worker_that_gets_no_thread(watched, monkeypatch, make_pool):
    """
    It was called as the wait began, and all threads of the pool have something else to do.
    """
    release, freed = threading.Event(), threading.Event()
    waiters = []

    class Called(dict):
        def __setitem__(self, lane, value):
            if not waiters:
                waiters.append(start(group.wait))
                until(lambda: is_asleep(waiters[0][0]))
            super().__setitem__(lane, value)

    monkeypatch.setattr(threads, "SLICE", 300)  # seconds: a worker at work does not make way
    pool = make_pool(2)
    with TaskGroup(2, pool=pool) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        for _ in range(2):
            pool.apply_async(freed.wait, (60,))
        group._run.called = Called()
        group.submit(int)
        release.set()
        waiter, outcome = waiters[0]
        waiter.join(timeout=20)
        ended = list(outcome)
        freed.set()

    assert ended == [None]


def test_group_wait_waits_for_nothing_that_a_worker_begins_with_later(watched):
    """
    It has come in vain, others have run what it was called for, and a wait begins just then.
    """
    release, after, come, goes_on = (threading.Event() for _ in range(4))

    class Called(dict):
        def pop(self, lane, default):
            taken = super().pop(lane, default)
            if not come.is_set():
                come.set()
                assert goes_on.wait(timeout=60)
            return taken

    with TaskGroup(2) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        group._run.called = Called()
        other = group.submit(int)
        assert come.wait(timeout=60)
        release.set()
        until(other.done)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        later = [group.submit(after.wait, 60) for _ in range(2)]
        goes_on.set()
        waiter.join(timeout=20)
        ended = list(outcome)
        after.set()

    assert ended == [None]
    assert [task.result() for task in later] == [True, True]


def test_group_wait_waits_for_nothing_that_a_worker_goes_on_to(monkeypatch):
    """
    It looks what a worker is at, which has just done what was submitted before.
    """
    look, passed, wait_for_all = Lane.task.fget, Run.passed, _run.wait_for_all
    release, later_runs, after, looked = (threading.Event() for _ in range(4))
    waiters = []

    def wait_and_note(*arguments):
        waiters.append(threading.current_thread())
        return wait_for_all(*arguments)

    def look_late(lane):
        if threading.current_thread() in waiters and not looked.is_set():
            looked.set()
            assert later_runs.wait(timeout=60)
        return look(lane)

    def pass_late(run, lane):
        assert not waiters or looked.wait(timeout=60)
        passed(run, lane)

    def run_later():
        later_runs.set()
        return after.wait(timeout=60)

    with TaskGroup(1) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        monkeypatch.setattr(Lane, "task", property(look_late))
        monkeypatch.setattr(Run, "passed", pass_late)
        monkeypatch.setattr(_run, "wait_for_all", wait_and_note)
        waiter, outcome = start(group.wait)
        until(lambda: waiters)
        later = group.submit(run_later)
        release.set()
        waiter.join(timeout=20)
        ended = list(outcome)
        after.set()

    assert ended == [None]
    assert later.result()


def test_group_wait_waits_for_nothing_after_a_cancelled_call(workers, monkeypatch, watched):
    """
    A worker has taken that, and is yet to find that it may not run it, as the wait begins.
    """
    admit = Run.admit
    release, after, held, goes_on = (threading.Event() for _ in range(4))

    def admit_late(run, task, lane):
        held.set()
        assert goes_on.wait(timeout=60)
        return admit(run, task, lane)

    with TaskGroup(**workers(1)) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        assert group.submit(int).cancel()
        monkeypatch.setattr(Run, "admit", admit_late)
        release.set()
        assert held.wait(timeout=60)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        later = group.submit(after.wait, 60)
        goes_on.set()
        waiter.join(timeout=20)
        ended = list(outcome)
        after.set()

    assert ended == [None]
    assert later.result()


def test_group_wait_waits_for_no_call_of_a_map_that_is_read_after_it_has_begun(watched):
    """
    Of a map that goes on, those that had been read are waited for.
    """
    more, release, after, busy = *(threading.Event() for _ in range(3)), threading.Barrier(2)

    def items():
        yield 0
        assert more.wait(timeout=60)
        yield 1

    def call(number):
        return number == 0 or after.wait(timeout=60)

    with TaskGroup(1) as group:
        group.submit(lambda: (busy.wait(timeout=60), release.wait(timeout=60)))
        busy.wait(timeout=60)
        mapper, batches = start(group.map, call, items())
        until(lambda: group._run.queue)
        group.submit(int)  # what comes last is looked at first
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        more.set()
        mapper.join(timeout=60)
        release.set()
        waiter.join(timeout=20)
        ended = list(outcome)
        after.set()

    assert ended == [None]
    assert batches[0].results() == [True, True]


def test_group_wait_has_seen_everything_end(workers):
    """
    Whatever was submitted before it is done after it, again and again.
    """
    counts = []

    with TaskGroup(**workers(3)) as group:
        for turn in range(50):
            batch = group.map(resize, range(turn % 7))
            group.wait()
            counts.append(sum(task.done() for task in batch.tasks))

    assert counts == [turn % 7 for turn in range(50)]


def test_group_wait_misses_no_task_that_is_being_taken(watched):
    """
    At whatever line a worker takes a task, a wait that begins then waits for that task.
    """

    def race(step):
        reached, submitted = threading.Event(), threading.Event()

        def look():
            reached.set()
            until(lambda: outcome or is_asleep(waiter))

        def trace():
            submitted.wait(timeout=60)
            trace_this_thread(act_at(step, look))

        def wait():
            reached.wait(timeout=60)
            group.wait()
            return task.done()

        with TaskGroup(1) as group:
            group.submit(trace)
            task = group.submit(resize, 404)
            waiter, outcome = start(wait)
            submitted.set()
            task.wait()
            # The line in question may come when the worker has nothing to do any more.
            until(lambda: reached.is_set() or len(idle_for(group)) == 1)
            reached_in_time = reached.is_set()
            reached.set()
            waiter.join(timeout=60)
        fastpool.shutdown()
        return reached_in_time, outcome

    def idle_for(group):
        return [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith(f"fastpool-{group.name}-") and is_asleep(thread)
        ]

    races = list(itertools.takewhile(lambda race: race[0], map(race, range(80))))

    assert len(races) > 10
    assert all(outcome == [True] for _, outcome in races)


@pytest.mark.parametrize("where", ["thread", "worker"])
@pytest.mark.parametrize("event", ["time", "token"])
def test_group_wait_that_ends_early_does_so_before_a_task_has_begun(
    make_pool, monkeypatch, where, event
):
    """
    A worker has just taken it off the queue, and has not said so yet.
    """
    take, wait = Run.take, Gate.wait
    taken, release = threading.Event(), threading.Event()
    token = CancelToken()
    seats, spans, now = [], [], [0.0]

    def takes_and_is_held(run, lane, most=1):
        tasks = take(run, lane, most)
        taken.set()
        release.wait(timeout=60)
        return tasks

    def wait_on_this_clock(gate, timeout=None):
        if threading.current_thread() in seats:
            spans.append(timeout)
            now[0] += timeout
        return wait(gate, timeout)

    def waits():
        seats.append(threading.current_thread())
        with use_token(token):
            try:
                group.wait(timeout=0.25 if event == "time" else 60)
            except (Cancelled, TimeoutError) as error:
                return error
            finally:
                seats.clear()

    def waits_as_a_task():
        with TaskGroup(1) as other:
            task = other.submit(waits)
        return task.result()

    with TaskGroup(pool=make_pool(1)) as group:
        monkeypatch.setattr(Run, "take", takes_and_is_held)
        task = group.submit(resize, 404)
        assert taken.wait(timeout=60)
        monkeypatch.setattr(Run, "take", take)
        monkeypatch.setattr(Gate, "wait", wait_on_this_clock)
        monkeypatch.setattr(_run, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
        waiter, outcome = start(waits if where == "thread" else waits_as_a_task)
        if event == "token":
            until(lambda: spans)
            token.cancel("enough")
        waiter.join(timeout=20)
        ended = list(outcome)
        release.set()

    assert [type(error) for error in ended] == [TimeoutError if event == "time" else Cancelled]
    assert spans == [0.25 if event == "time" else 60]
    assert task.result() == 404


@pytest.mark.parametrize("name", ["take", "perform"])
@pytest.mark.parametrize("timeout", [None, 0.1])
def test_worker_that_waits_for_a_group_runs_what_a_task_there_waits_for(
    watched, make_pool, monkeypatch, timeout, name
):
    """
    Though that task was just being taken as the wait began; it waits on, as long as it may.
    """
    works = getattr(Run, name)
    taken, over = threading.Event(), threading.Event()
    seats = []

    def hold():
        taken.set()
        until(lambda: seats and is_asleep(seats[0]))

    def performs_late(run, task, lane):
        if run is group._run and not taken.is_set():
            hold()
        works(run, task, lane)

    def takes_and_is_late(run, lane, *most):
        tasks = works(run, lane, *most)
        if run is group._run and not taken.is_set():
            hold()
        return tasks

    def waits_for_another():
        value = other.submit(resize, 404).result()
        if timeout:
            over.wait(timeout=60)
        return value

    def waits():
        assert taken.wait(timeout=60)
        seats.append(threading.current_thread())
        try:
            return group.wait(timeout)
        except TimeoutError as error:
            return error
        finally:
            over.set()

    monkeypatch.setattr(Run, name, takes_and_is_late if name == "take" else performs_late)
    with TaskGroup(1, timeout=20) as other, TaskGroup(pool=make_pool(1), timeout=20) as group:
        waiter = other.submit(waits)
        task = group.submit(waits_for_another)

    assert type(waiter.result()) is (TimeoutError if timeout else type(None))
    assert task.result() == 404


def test_group_wait_does_not_wait_for_one_who_came_too_late_to_help(watched, monkeypatch):
    """
    It has a place in the group for a moment and runs nothing, and nothing is left of its claim.
    """
    claim = Run.claim
    release = threading.Event()
    waiting, claims = [], []

    def claims_late(run, task):
        if not waiting:
            release.set()  # its own worker runs it meanwhile
            until(lambda: task._state)
            waiting.append(start(group.wait))
            until(lambda: is_asleep(waiting[0][0]))
        return claim(run, task)

    def parent():
        child = group.submit(resize, 404)
        return child.result()

    with TaskGroup(2) as group:
        until(group.submit(release.wait, 60).running)
        monkeypatch.setattr(Run, "claim", claims_late)
        task = group.submit(parent)
        task.wait(timeout=60)
        waiter, outcome = waiting[0]
        waiter.join(timeout=20)
        ended = list(outcome)
        claims.extend(group._run.claims)

    assert task.result() == 404
    assert ended == [None]
    assert claims == []


@pytest.mark.parametrize("where", ["thread", "worker"])
def test_group_wait_leaves_nothing_registered(where):
    """
    Neither with the group nor with the waiter's token, which may both go on for long.
    """
    token = CancelToken()

    def waits():
        with use_token(token):
            group.wait()

    with TaskGroup(1) as group, TaskGroup(1) as other:
        group.submit(resize, 404)
        before = len(token._entries)
        if where == "thread":
            waits()
        else:
            other.submit(waits).result()
        left = [*group._run.fences, *group._run.helpers]
        after = len(token._entries)

    assert left == []
    assert after == before


def test_group_wait_does_not_wait_for_what_tasks_submit_meanwhile(watched, workers):
    """
    What a task submits while the wait is under way came later.
    """
    first, second = threading.Event(), threading.Event()

    def parent():
        first.wait(timeout=60)
        children.append(group.submit(second.wait, 60))

    children = []
    with TaskGroup(**workers(2)) as group:
        group.submit(parent)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        first.set()
        waiter.join(timeout=60)
        seen = list(outcome), children[0].done()
        second.set()

    assert seen == ([None], False)


def test_group_wait_returns_at_once_if_there_is_nothing():
    """
    A group that has no task, or none any more, or has ended, or never began, is not waited for.
    """
    group = TaskGroup()

    group.wait()
    with group:
        group.wait()
        group.wait(timeout=0)
        group.submit(resize, 404).wait()
        group.wait()
    group.wait()
    release = threading.Event()
    with TaskGroup(1) as after:
        until(after.submit(release.wait, 60).running)  # in the same thread
        group.wait(timeout=5)
        release.set()

    assert group.failures == ()


def test_group_wait_of_others_returns_when_the_group_fails(watched, workers):
    """
    A thread outside the group waits for tasks, not for their success.
    """
    release = threading.Event()

    def fails_later():
        release.wait(timeout=60)
        raise ValueError("bad header")

    with suppress(ValueError), TaskGroup(**workers(1)) as group:
        group.submit(fails_later)
        queued = group.submit(resize, 404)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        release.set()
        waiter.join(timeout=60)

    assert outcome == [None]
    assert queued.cancelled()


def test_group_wait_does_not_wait_for_a_task_that_was_cancelled(watched, workers):
    """
    A queued task that is cancelled while somebody waits for the group is done.
    """
    release = threading.Event()

    with TaskGroup(**workers(1)) as group:
        first = group.submit(release.wait, 60)
        queued = group.submit(resize, 404)
        waiter, outcome = start(group.wait)
        until(lambda: is_asleep(waiter))
        queued.cancel()
        release.set()
        waiter.join(timeout=60)

    assert outcome == [None]
    assert first.result() is True
    assert queued.cancelled()


def test_several_threads_wait_for_one_group(watched, workers):
    """
    Each of them returns when everything has ended.
    """
    release = threading.Event()

    with TaskGroup(**workers(2)) as group:
        group.starmap(release.wait, [(60,)] * 5)
        waiters = [start(group.wait) for _ in range(5)]
        for thread, _ in waiters:
            until(lambda thread=thread: is_asleep(thread))
        release.set()
        for thread, _ in waiters:
            thread.join(timeout=60)

    assert [outcome for _, outcome in waiters] == [[None]] * 5


# --- Tasks that were cancelled ------------------------------------------------------------------


def read_twice(task):
    """What `result` and `exception` of a cancelled task raise."""
    errors = []
    for read in (task.result, task.exception, task.get):
        try:
            read()
        except BaseException as error:
            errors.append(error)
    return errors


def test_cancelled_task_raises_a_new_error_each_time(workers):
    """
    It is a `concurrent.futures.CancelledError`, and says why the task was cancelled.
    """
    with TaskGroup(name="thumbnails", **workers(1)) as group:
        release = threading.Event()
        group.submit(release.wait, 60)
        queued = group.submit(resize, 404)
        group.cancel("enough")
        release.set()
    errors = read_twice(queued)

    assert [type(error) for error in errors] == [TaskCancelledError] * 3
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, concurrent.futures.CancelledError)
        assert error.reason == "enough"
        assert error.__cause__ is None
        assert "resize" in str(error)


@pytest.mark.parametrize("kind", ["queued", "running"])
def test_task_cancelled_by_a_failure_names_it_as_the_cause(workers, kind):
    """
    The first failure of the group is reason and cause of what it cancelled.
    """
    failure = ValueError("bad header")
    together = threading.Barrier(3)

    def fails():
        together.wait(timeout=60)
        raise failure

    def sleeps():
        together.wait(timeout=60)
        current_token().sleep(60)

    with suppress(ValueError), TaskGroup(**workers(2)) as group:
        group.submit(fails)
        running, queued = group.submit(sleeps), group.submit(resize, 404)
        together.wait(timeout=60)
    errors = read_twice({"running": running, "queued": queued}[kind])

    assert [type(error) for error in errors] == [TaskCancelledError] * 3
    for error in errors:
        assert error.reason is failure
        assert error.__cause__ is failure


def test_reader_whose_own_token_is_set_hears_cancelled(workers):
    """
    The body of a cancelled group reads `Cancelled` where others read `TaskCancelledError`.
    """
    release = threading.Event()

    with TaskGroup(**workers(1)) as group:
        group.submit(release.wait, 60)
        queued = group.submit(resize, 404)
        group.cancel("enough")
        done = queued.done()
        in_body = read_twice(queued)
        with shield():
            shielded = read_twice(queued)
        elsewhere = in_thread(read_twice, queued)
        release.set()
    token = CancelToken()
    token.cancel("rain")
    with use_token(token):
        after = read_twice(queued)

    assert done
    assert [type(error) for error in in_body] == [Cancelled] * 3
    assert [type(error) for error in shielded] == [TaskCancelledError] * 3
    assert [type(error) for error in elsewhere] == [TaskCancelledError] * 3
    assert [(type(error), error.reason) for error in after] == [(Cancelled, "rain")] * 3


def test_task_cancelled_from_outside_has_that_reason():
    """
    A task that an outer token cancelled says what that token was cancelled for.
    """
    token = CancelToken()

    with suppress(Cancelled), TaskGroup(1, token=token) as group:
        running = group.submit(lambda: current_token().sleep(60))
        queued = group.submit(resize, 404)
        until(running.running)
        token.cancel("rain")
    errors = [*read_twice(running), *read_twice(queued)]

    assert [(type(error), error.reason) for error in errors] == [(TaskCancelledError, "rain")] * 6


@pytest.mark.parametrize("wait", WAITS)
def test_waiter_outside_wakes_when_what_is_queued_never_starts(watched, workers, wait):
    """
    A queued task is done as soon as its group is cancelled, although another one still runs.
    """
    release = threading.Event()

    with TaskGroup(**workers(1)) as group:
        group.submit(release.wait, 60)
        batch = group.map(resize, [404])
        waiter, outcome = start(WAITS[wait], group, batch)
        until(lambda: is_asleep(waiter))
        group.cancel("enough")
        if wait == "group.wait":
            release.set()
        waiter.join(timeout=60)
        release.set()

    if wait in VALUES:
        assert [(type(error), error.reason) for error in outcome] == [
            (TaskCancelledError, "enough")
        ]
    else:
        assert outcome == [{**DONE, "as_completed": list(batch.tasks)}[wait]]


# --- Task.cancel --------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "reason"), [("rain", "rain"), (None, "cancelled")])
def test_cancelling_a_queued_task_ends_it_at_once(workers, given, reason):
    """
    It is done, never runs, and nobody else notices; the one call that did it is True.
    """
    release = threading.Event()
    ran = []

    with TaskGroup(**workers(1)) as group:
        group.submit(release.wait, 60)
        tasks = [group.submit(ran.append, number) for number in range(3)]
        answers = tasks[1].cancel(given), tasks[1].cancel("snow")
        state = states(tasks[1])
        errors = read_twice(tasks[1])
        release.set()

    assert answers == (True, False)
    assert state == (False, True, True)
    assert [(type(error), error.reason) for error in errors] == [(TaskCancelledError, reason)] * 3
    assert all(error.__cause__ is None for error in errors)
    assert ran == [0, 2]
    assert group.failures == ()
    assert not group.token.cancelled()


def test_cancelling_a_running_task_tells_it_alone(workers):
    """
    Its own token is set, it ends at its next check, and that is no failure.
    """
    together = threading.Barrier(3)

    def sleeps():
        together.wait(timeout=60)
        current_token().sleep(60)

    def looks():
        together.wait(timeout=60)
        task.wait()
        return current_token().cancelled()

    with TaskGroup(**workers(2)) as group:
        task = group.submit(sleeps)
        beside = group.submit(looks)
        together.wait(timeout=60)
        answers = task.cancel("rain"), task.cancel("snow")
        task.wait()
        state = states(task)
        after = task.cancel("sun")
        errors = read_twice(task)

    assert answers == (True, False)
    assert after is False
    assert state == (False, True, True)
    assert [(type(error), error.reason) for error in errors] == [(TaskCancelledError, "rain")] * 3
    assert beside.result() is False
    assert group.failures == ()


def test_task_that_swallows_cancelled_has_its_value(workers):
    """
    One that was cancelled and returns nevertheless has succeeded.
    """
    started = threading.Event()

    def stubborn():
        started.set()
        with suppress(Cancelled):
            current_token().sleep(60)
        return 404

    with TaskGroup(**workers(1)) as group:
        task = group.submit(stubborn)
        started.wait(timeout=60)
        cancelled = task.cancel()

    assert cancelled is True
    assert task.result() == 404
    assert task.cancelled() is False
    assert task.successful()


def test_cancelling_a_task_that_is_done_does_nothing(workers):
    """
    It is too late, for a value as for a failure.
    """
    with suppress(ValueError), TaskGroup(policy=Lenient(), **workers(1)) as group:
        good, bad = group.submit(resize, 404), group.submit(fails)
        group.wait()
        during = good.cancel(), bad.cancel()
    after = good.cancel(), bad.cancel()

    assert during == after == (False, False)
    assert good.result() == 404
    assert type(bad.exception()) is ValueError
    assert not good.cancelled()
    assert not bad.cancelled()


def test_task_may_cancel_itself(workers):
    """
    A task that is handed its own handle stops itself.
    """

    def stops():
        ready.wait(timeout=60)
        answers.append(task.cancel("rain"))
        current_token().check()

    ready = threading.Event()
    answers = []
    with TaskGroup(**workers(1)) as group:
        task = group.submit(stops)
        ready.set()

    assert answers == [True]
    assert task.cancelled()
    assert group.failures == ()


def test_task_of_a_cancelled_group_is_cancelled_once(workers):
    """
    What the group's token has cancelled, `Task.cancel` did not.
    """
    release = threading.Event()

    with TaskGroup(**workers(1)) as group:
        running = group.submit(release.wait, 60)
        queued = group.submit(resize, 404)
        until(running.running)
        group.cancel("enough")
        answers = running.cancel("rain"), queued.cancel("rain")
        release.set()
    errors = read_twice(queued)

    assert answers == (False, False)
    assert [error.reason for error in errors] == ["enough"] * 3


@pytest.mark.parametrize("kind", ["queued", "running"])
def test_one_of_many_threads_cancels_a_task(kind):
    """
    Of eight calls at once, one is True.
    """
    counts = []

    for _ in range(20):
        release = threading.Event()
        together = threading.Barrier(8)

        def cancel(task, together=together):
            together.wait(timeout=60)
            return task.cancel()

        with TaskGroup(1) as group:
            running = group.submit(release.wait, 60)
            queued = group.submit(resize, 404)
            until(running.running)
            task = {"running": running, "queued": queued}[kind]
            threads = [start(cancel, task) for _ in range(8)]
            for thread, _ in threads:
                thread.join(timeout=60)
            release.set()
        counts.append(sum(outcome[0] for _, outcome in threads))

    assert counts == [1] * 20


def test_task_is_run_or_cancelled_but_never_both():
    """
    At whatever line a worker is when a task is cancelled, it runs or it does not.
    """

    def race(step):
        ran, answers = [], []
        reached, release = threading.Event(), threading.Event()

        def act():
            reached.set()
            answers.append(task.cancel("rain"))
            states_then.append(task.done())

        def run():
            ran.append(task.name)
            current_token().check()

        def trace():
            release.wait(timeout=60)
            trace_this_thread(act_at(step, act))

        states_then = []
        with TaskGroup(1) as group:
            group.submit(trace)
            task = group.submit(run)
            release.set()
            task.wait()
            end = group.submit(sys.settrace, None)
            end.wait()
        return reached.is_set(), answers, states_then, ran, task

    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    outcomes = set()
    for _, [answer], [done], ran, task in races:
        if answer and done:
            # It was queued, and is over.
            assert (ran, task.cancelled()) == ([], True)
        elif answer:
            # It was taken by its worker, and hears of it at its check, or had no more.
            assert ran == ["run"]
        else:
            assert (ran, task.cancelled()) == (["run"], False)
        outcomes.add((answer, done))
    assert outcomes >= {(True, True), (False, True)}


# --- Batch --------------------------------------------------------------------------------------


def test_batch_has_its_tasks_in_order(workers):
    """
    A batch has a length and tasks, in the order of the items.
    """
    with TaskGroup(**workers(2)) as group:
        batch = group.map(resize, [3, 1, 2])
        empty = group.map(resize, [])
        star = group.starmap(pow, [(2, 3), (3, 2)])

    assert isinstance(batch, Batch)
    assert (len(batch), len(empty), len(star)) == (3, 0, 2)
    assert [task.result() for task in batch.tasks] == [3, 1, 2]
    assert all(isinstance(task, Task) for task in batch.tasks)
    assert batch.results() == [3, 1, 2]
    assert star.results() == [8, 9]
    assert list(empty.tasks) == []


def test_empty_batch_is_done():
    """
    There is nothing to wait for.
    """
    with TaskGroup() as group:
        batch = group.map(resize, [])
        answers = batch.results(timeout=0), batch.wait(timeout=0), batch.done()
        items = list(batch), list(batch.as_completed())

    assert answers == ([], True, True)
    assert items == ([], [])


def test_batch_is_always_true():
    """
    A handle says nothing by its truth: the length of an empty batch is zero all the same.
    """
    with TaskGroup() as group:
        batch = group.map(resize, [])

    assert len(batch) == 0


def test_batch_can_be_waited_for_and_more_submitted(workers):
    """
    A batch is waited for inside the block, and the group goes on.
    """
    with TaskGroup(**workers(2)) as group:
        first = group.map(resize, range(10))
        waited = first.wait(), first.done()
        second = group.map(resize, first.results())

    assert waited == (True, True)
    assert second.results() == list(range(10))


def staged(count):
    """Events that let a batch of tasks end one by one, and the tasks' function."""
    release = [threading.Event() for _ in range(count)]

    def hold(number):
        release[number].wait(timeout=60)
        return number

    return release, hold


def test_batch_yields_results_in_order_as_they_come(watched, workers):
    """
    Iteration hands out each result as soon as it and those before it are there.
    """
    release, hold = staged(3)

    with TaskGroup(**workers(3)) as group:
        batch = group.map(hold, range(3))
        release[1].set()
        batch.tasks[1].wait()
        results = iter(batch)
        waiter, outcome = start(next, results)
        until(lambda: is_asleep(waiter))
        release[0].set()
        waiter.join(timeout=60)
        second = next(results)
        third_done = batch.tasks[2].done()
        release[2].set()
        rest = list(results)
        again = list(batch)

    assert outcome == [0]
    assert second == 1
    assert not third_done
    assert rest == [2]
    assert again == [0, 1, 2]


def test_batch_as_completed_yields_pairs_as_they_come(workers):
    """
    It hands out positions and results in the order in which the tasks end.
    """
    release, hold = staged(3)
    pairs = []

    with TaskGroup(**workers(3)) as group:
        batch = group.map(hold, range(3))
        arriving = batch.as_completed()
        for number in (2, 0, 1):
            release[number].set()
            pairs.append(next(arriving))
        ended = list(arriving)
        again = sorted(batch.as_completed())

    assert pairs == [(2, 2), (0, 0), (1, 1)]
    assert ended == []
    assert again == [(0, 0), (1, 1), (2, 2)]


def test_batch_cancel_stops_its_tasks_alone(workers):
    """
    The tasks of the batch are cancelled, queued and running ones; the group goes on.
    """
    started, release = threading.Event(), threading.Event()
    ran = []

    def sleeps(number):
        started.set()
        current_token().sleep(60)

    with TaskGroup(**workers(2)) as group:
        other = group.submit(release.wait, 60)
        until(other.running)
        batch = group.map(sleeps, range(5))
        started.wait(timeout=60)
        behind = group.submit(ran.append, 1)
        batch.cancel("rain")
        waited = batch.wait(timeout=60)
        behind.wait()
        with pytest.raises(TaskCancelledError) as caught:
            batch.results()
        release.set()

    assert waited is True
    assert batch.done()
    assert all(task.cancelled() for task in batch.tasks)
    assert caught.value.reason == "rain"
    assert ran == [1]
    assert other.result() is True
    assert group.failures == ()


def test_batch_cancel_begins_nothing(workers):
    """
    What is queued is cancelled before what runs, whose worker would begin it.
    """
    started, queued = threading.Event(), []

    def sleeps(number):
        token = current_token()
        token.on_cancel(lambda: queued.extend(not task.done() for task in batch.tasks[1:]))
        started.set()
        token.sleep(60)

    with TaskGroup(**workers(1)) as group:
        batch = group.map(sleeps, range(5))
        started.wait(timeout=60)
        batch.cancel()

    assert queued == [False] * 4


def fail_in_order(group, order, count):
    """A batch whose tasks fail one after the other, in the order given."""
    turns = [threading.Event() for _ in range(count)]

    def fail(number):
        turns[number].wait(timeout=60)
        raise ValueError(f"number {number}")

    batch = group.map(fail, range(count))
    for number in order:
        turns[number].set()
        batch.tasks[number].wait()
    return batch


@pytest.mark.parametrize("read", ["Batch.results", "Batch.as_completed"])
def test_batch_raises_the_first_of_its_failures_in_time(workers, read):
    """
    It is the failure that came first, not that of the first item.
    """
    with TaskGroup(policy=Lenient(), **workers(3)) as group:
        batch = fail_in_order(group, [2, 0, 1], 3)
        with pytest.raises(ValueError, match="number") as during:
            batch.results()
    with pytest.raises(ValueError, match="number") as after:
        batch.results()

    assert str(during.value) == str(after.value) == "number 2"
    assert after.value is batch.tasks[2].exception()


def test_batch_raises_the_first_of_its_own_failures(workers):
    """
    What failed before in the group, but not in the batch, is not its failure.
    """
    with TaskGroup(policy=Lenient(), **workers(3)) as group:
        group.submit(fails).wait()
        batch = fail_in_order(group, [1, 0], 2)

    with pytest.raises(ValueError, match="number 1"):
        batch.results()


@pytest.mark.parametrize("policy", [None, Lenient()])
def test_batch_and_group_agree_on_the_first_failure(policy):
    """
    At whatever line one failing task is when another fails, both name the same failure as first.
    """

    def race(step):
        reached, fail_now = threading.Event(), threading.Event()
        threads = {}

        def act():
            reached.set()
            fail_now.set()
            # The other task fails now, unless we keep it from that.
            until(batch.tasks[0].done, within=0.03)

        def fail(number):
            if number:
                until(lambda: "other" in threads)
                trace_this_thread(act_at(step, act))
            else:
                threads["other"] = threading.current_thread()
                # The other task may be over before it ever comes to the line in question.
                until(lambda: fail_now.is_set() or batch.tasks[1].done())
            raise ValueError(f"number {number}")

        ready = threading.Event()

        def begin(number):
            ready.wait(timeout=60)
            fail(number)

        with suppress(ValueError), TaskGroup(2, policy=policy) as group:
            batch = group.map(begin, range(2))
            ready.set()
        # The trace of the worker thread goes with the thread.
        fastpool.shutdown()
        with pytest.raises(ValueError, match="number") as caught:
            batch.results()
        return reached.is_set(), caught.value is group.failures[0].exception, group.failures

    races = list(itertools.takewhile(lambda race: race[0], map(race, range(60))))

    assert len(races) > 10
    assert all(agree for _, agree, _ in races)
    assert all(len(failures) == 2 for _, _, failures in races)


def test_failure_that_was_reported_before_counts_from_then():
    """
    A failure that a task reports to its group and then raises is as old as the report.
    """

    @cancellable
    def reports(token):
        raise OSError("second")

    def first():
        waiting.wait(timeout=60)
        raise ValueError("first")

    def second():
        token = current_token()
        waiting.set()
        token.wait(timeout=60)
        reports.with_token(group.token)

    waiting = threading.Event()
    with pytest.raises(ValueError, match="first"), TaskGroup(2) as group:
        batch = group.starmap(lambda fn: fn(), [(second,), (first,)])

    assert [type(failure.exception) for failure in group.failures] == [ValueError, OSError]
    with pytest.raises(ValueError, match="first"):
        batch.results()


def test_failure_that_was_reported_counts_from_then_though_others_were_reported_since():
    """
    Nor does it matter that another task has failed meanwhile.
    """
    first, second, third = ValueError("first"), OSError("second"), KeyError("third")
    events = [threading.Event(), threading.Event()]

    @cancellable
    def reports(token, error):
        raise error

    def fail_when_told(number, error):
        events[number].wait(timeout=60)
        raise error

    with suppress(ValueError), TaskGroup(2, policy=Lenient()) as group:
        batch = group.starmap(fail_when_told, [(0, second), (1, first)])
        until(lambda: all(task.running() for task in batch.tasks))
        in_thread(reports.with_token, group.token, first)
        with shield():
            events[0].set()
            batch.tasks[0].wait(60)
        in_thread(reports.with_token, group.token, third)
        events[1].set()

    assert [failure.exception for failure in group.failures] == [first, second, third]
    with pytest.raises(ValueError, match="first"):
        batch.results()


def test_failure_that_a_task_raises_as_it_is_being_reported_has_its_place(monkeypatch):
    """
    It is among the failures of its batch, and the first of them.
    """
    error, noting, noted = ValueError("first"), threading.Event(), threading.Event()

    def record_late(ledger, task, error, record=Ledger.record):
        if task is None:
            noting.set()
            noted.wait(60)
        return record(ledger, task, error)

    @cancellable
    def reports(token):
        raise error

    def fail_first():
        noting.wait(60)
        raise error

    def fail_second():
        noted.wait(60)
        until(batch.tasks[0].done)
        raise OSError("second")

    monkeypatch.setattr(Ledger, "record", record_late)
    with suppress(ValueError), TaskGroup(2, policy=Lenient()) as group:
        batch = group.starmap(lambda fn: fn(), [(fail_first,), (fail_second,)])
        until(lambda: all(task.running() for task in batch.tasks))
        reporter, _ = start(reports.with_token, group.token)
        until(batch.tasks[0].done)
        noted.set()
        reporter.join(60)

    with pytest.raises(ValueError, match="first"):
        batch.results()


@pytest.mark.parametrize("read", ["Batch.results", "iterate", "Batch.as_completed"])
def test_batch_never_raises_a_cancelled_tasks_error_while_one_failed(workers, read):
    """
    What was cancelled by a failure does not hide it.
    """

    def run(number):
        together.wait(timeout=60)
        if number == 1:
            raise ValueError("bad header")
        current_token().sleep(60)

    together = threading.Barrier(3)
    with suppress(ValueError), TaskGroup(**workers(2)) as group:
        batch = group.map(run, range(4))
        together.wait(timeout=60)

    assert [task.cancelled() for task in batch.tasks] == [True, False, True, True]
    with pytest.raises(ValueError, match="bad header") as caught:
        WAITS[read](group, batch)
    assert caught.value is group.failures[0].exception


@pytest.mark.parametrize("read", ["Batch.results", "iterate", "Batch.as_completed"])
def test_reading_a_batch_with_a_cancelled_task_waits_for_the_others(watched, workers, read):
    """
    One that meets a cancelled task waits until all have ended, then raises their first failure.
    """
    release = threading.Event()

    def run(number):
        release.wait(timeout=60)
        raise ValueError("bad header")

    with TaskGroup(policy=Lenient(), **workers(1)) as group:
        group.submit(release.wait, 60)
        batch = group.map(run, range(2))
        batch.tasks[0].cancel()
        reader, outcome = start(WAITS[read], group, batch)
        until(lambda: is_asleep(reader))
        early = list(outcome)
        release.set()
        reader.join(timeout=60)

    assert early == []
    assert outcome == [batch.tasks[1].exception()]


def test_batch_results_waits_for_all_before_it_raises(watched, workers):
    """
    One failure is there, but a task still runs.
    """
    release, hold = staged(1)

    def run(number):
        if number:
            raise ValueError("bad header")
        return hold(number)

    with TaskGroup(policy=Lenient(), **workers(2)) as group:
        batch = group.map(run, range(2))
        batch.tasks[1].wait()
        with pytest.raises(TimeoutError):
            batch.results(timeout=0.01)
        waiter, outcome = start(batch.results)
        until(lambda: is_asleep(waiter))
        early = list(outcome)
        release[0].set()
        waiter.join(timeout=60)

    assert early == []
    assert outcome == [batch.tasks[1].exception()]


@pytest.mark.parametrize("read", ["Batch.results", "iterate", "Batch.as_completed"])
def test_batch_cancelled_by_a_failure_elsewhere_says_so(workers, read):
    """
    With no failure of its own, a batch raises the error of a cancelled task, with its cause.
    """
    release = threading.Event()

    def fails_later():
        release.wait(timeout=60)
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header") as left, TaskGroup(**workers(1)) as group:
        group.submit(fails_later)
        batch = group.map(resize, range(3))
        release.set()

    with pytest.raises(TaskCancelledError) as caught:
        WAITS[read](group, batch)
    assert caught.value.__cause__ is left.value


def test_iteration_that_meets_a_failure_raises_it(workers):
    """
    The results before it come first.
    """
    seen = []

    def run(number):
        if number == 2:
            raise ValueError("bad header")
        return number

    with suppress(ValueError), TaskGroup(**workers(1)) as group:
        batch = group.map(run, range(3))

    with pytest.raises(ValueError, match="bad header"):
        for result in batch:
            seen.append(result)
    assert seen == [0, 1]


# --- as_completed -------------------------------------------------------------------------------


def test_as_completed_yields_tasks_as_they_end(workers):
    """
    Those of several groups come in the order in which they end.
    """
    release, hold = staged(4)
    ended = []

    with TaskGroup(**workers(4)) as one, TaskGroup(4) as other:
        groups = [one, other, one, other]
        tasks = [group.submit(hold, number) for number, group in enumerate(groups)]
        arriving = fastpool.as_completed(tasks)
        for number in (3, 0, 2, 1):
            release[number].set()
            ended.append(next(arriving))
        rest = list(arriving)

    assert ended == [tasks[3], tasks[0], tasks[2], tasks[1]]
    assert rest == []


def test_as_completed_yields_done_ones_first(workers):
    """
    What has ended already comes at once, although an earlier one still runs.
    """
    release, hold = staged(2)

    with TaskGroup(**workers(2)) as group:
        running = group.submit(hold, 0)
        done = [group.submit(resize, number) for number in range(3)]
        for task in done:
            task.wait()
        arriving = fastpool.as_completed([running, *done])
        first = [next(arriving) for _ in range(3)]
        release[0].set()
        last = next(arriving)

    assert set(first) == set(done)
    assert last is running


def test_as_completed_yields_a_task_once(workers):
    """
    Duplicates are one task, as `concurrent.futures` has it.
    """
    release, hold = staged(1)

    with TaskGroup(**workers(1)) as group:
        task = group.submit(hold, 0)
        arriving = fastpool.as_completed(iter([task, task, task]))
        release[0].set()
        ended = list(arriving)
        again = list(fastpool.as_completed([task, task]))

    assert ended == again == [task]


def test_as_completed_of_nothing_is_over():
    """
    There is nothing to wait for.
    """
    assert list(fastpool.as_completed([])) == []


def test_as_completed_yields_what_failed_or_was_cancelled(workers):
    """
    Whatever a task comes to, it has ended, and raises nothing before it is asked.
    """
    release, hold = staged(1)

    with TaskGroup(policy=Lenient(), **workers(1)) as group:
        tasks = [group.submit(hold, 0), group.submit(fails), group.submit(resize, 404)]
        arriving = fastpool.as_completed(tasks)
        tasks[2].cancel()
        first = next(arriving)
        release[0].set()
        rest = list(arriving)

    assert first is tasks[2]
    assert rest == tasks[:2]


def test_as_completed_of_what_is_no_task_is_refused():
    """
    At the call, by what it is.
    """
    with pytest.raises(TypeError, match=r"as_completed\(\) wants tasks, not 404"):
        fastpool.as_completed([404])


def test_as_completed_ends_when_the_group_is_cancelled(watched, workers):
    """
    For a reader outside, what never starts has ended.
    """
    release = threading.Event()

    with TaskGroup(**workers(1)) as group:
        running = group.submit(release.wait, 60)
        until(running.running)
        queued = [group.submit(resize, number) for number in range(3)]
        reader, outcome = start(list, fastpool.as_completed(queued))
        until(lambda: is_asleep(reader))
        group.cancel()
        reader.join(timeout=60)
        release.set()

    assert [set(tasks) for tasks in outcome] == [set(queued)]
    assert running.result() is True


def test_as_completed_can_be_closed(workers):
    """
    Leaving the loop early leaves the tasks alone.
    """
    release, hold = staged(2)

    with TaskGroup(**workers(2)) as group:
        tasks = [group.submit(hold, number) for number in range(2)]
        release[0].set()
        arriving = fastpool.as_completed(tasks)
        first = next(arriving)
        arriving.close()
        release[1].set()

    assert first is tasks[0]
    assert list(arriving) == []
    assert tasks[1].result() == 1


def test_as_completed_in_the_body_hears_the_failure(workers):
    """
    A loop over what would never end is over when a task fails.
    """
    seen = []

    with pytest.raises(ValueError, match="bad header"), TaskGroup(**workers(2)) as group:
        queued = threading.Event()
        failing = group.submit(lambda: queued.wait(timeout=60) and fails())
        tasks = [failing, group.submit(lambda: current_token().sleep(60))]
        queued.set()
        seen.extend(fastpool.as_completed(tasks))

    assert set(seen) <= set(tasks)


# --- After the block ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["it fails", "it is cancelled", "its body fails"])
@pytest.mark.parametrize("wait", WAITS)
def test_reading_after_the_block_never_hangs(workers, wait, how):
    """
    A task that never started is cancelled, and says so to whoever reads it later.
    """
    release = threading.Event()

    def fails_later():
        release.wait(timeout=60)
        if how == "it fails":
            raise ValueError("bad header")

    with suppress(ValueError), TaskGroup(**workers(1)) as group:
        group.submit(fails_later)
        batch = group.map(resize, [404])
        if how == "it is cancelled":
            group.cancel()
        release.set()
        if how == "its body fails":
            raise ValueError("bad header")
    outcome = in_thread(WAITS[wait], group, batch)

    if how == "its body fails" and not batch.tasks[0].cancelled():
        # It was quicker than the body.
        assert batch.results() == [404]
    elif wait in VALUES:
        assert type(outcome) is TaskCancelledError
        assert states(batch.tasks[0]) == (False, True, True)
        assert batch.tasks[0].cancel() is False
    else:
        assert outcome == {**DONE, "as_completed": list(batch.tasks)}[wait]


def test_handles_outlive_their_group(workers):
    """
    A task can be read when nothing else of its group is there.
    """

    def run():
        with TaskGroup(**workers(2)) as group:
            return group.submit(resize, 404), group.map(resize, range(3))

    task, batch = run()

    assert task.result(timeout=0) == 404
    assert batch.results(timeout=0) == [0, 1, 2]
    assert "resize" in repr(task)


def test_handle_says_how_its_task_stands():
    """
    With its name and its group's; and it has no room for more.
    """
    begun, release = threading.Event(), threading.Event()

    def waits():
        begun.set()
        release.wait(timeout=60)

    with suppress(ValueError), TaskGroup(1, name="headers") as group:
        running, queued, gone = (
            group.submit(fn, *args) for fn, *args in ((waits,), (resize, 404), (resize, 405))
        )
        gone.cancel()
        begun.wait(timeout=60)
        seen = [repr(task) for task in (running, queued, gone)]
        release.set()
        group.wait()
        failed = group.submit(fails)
    seen += [repr(task) for task in (queued, failed)]

    assert seen == [
        f"<Task {what}>"
        for what in (
            "'waits' of group 'headers', running",
            "'resize' of group 'headers', queued",
            "'resize' of group 'headers', cancelled",
            "'resize' of group 'headers', succeeded",
            "'fails' of group 'headers', failed",
        )
    ]
    assert not any(hasattr(task, "__dict__") for task in (queued, failed))


def test_group_says_how_it_stands():
    """
    Where it is printed, by its name.
    """
    group = TaskGroup(1, name="headers")
    seen = [repr(group)]
    with group:
        seen.append(repr(group))
        group.cancel()
        seen.append(repr(group))
    seen.append(repr(group))

    assert seen == [
        f"<TaskGroup 'headers', {state}>" for state in ("not entered", "open", "cancelled", "left")
    ]


def test_site_is_the_line_on_which_a_call_begins():
    """
    However many it goes on for.
    """
    with TaskGroup(1) as group:
        line = sys._getframe().f_lineno + 1
        task = group.submit(
            resize,
            404,
        )

    assert task.site == f"{__file__}:{line}"
