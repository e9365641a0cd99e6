"""
`GroupExecutor`: what the standard library promises of an executor, and what the group adds.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Executor, Future
from contextlib import closing

import far
import pytest
from blocked import is_blocked
from staging import (
    act_at,
    in_thread,
    is_asleep,
    sleeper,
    start,
    started_sleeper,
    trace_this_thread,
    until,
)

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    StuckTaskError,
    TaskCancelledError,
    TaskGroup,
    cancellable,
    current_token,
)
from fastpool import futures as futures_module
from fastpool._submitter import Submitter
from fastpool.futures import GroupExecutor

LONG = 30  # seconds; only ends a hang


@pytest.fixture
def group():
    with TaskGroup(4, name="calls") as group:
        yield group


@pytest.fixture
def executor(group):
    return GroupExecutor(group)


@pytest.fixture
def gate():
    """An event that calls wait for; it is set at the end, whatever became of the test."""
    event = threading.Event()
    yield event
    event.set()


def capture(*args, **kwargs):
    return args, kwargs


def raises(error):
    raise error


def passes(gate, value=None):
    """A call that waits at a gate that hears no token."""
    assert gate.wait(LONG)
    return value


class Thing:
    """Something to be referred to weakly."""

    def method(self):
        pass


# --- Calls ----------------------------------------------------------------------------------------


def test_call_brings_its_value(executor):
    """
    A future is the standard library's, and all arguments are the function's.
    """
    future = executor.submit(capture, 1, self=2, fn=3, timeout=4)

    assert isinstance(executor, Executor)
    assert isinstance(future, Future)
    assert future.result(LONG) == ((1,), {"self": 2, "fn": 3, "timeout": 4})


def test_function_is_given_by_position(executor):
    """
    There is no keyword that a function could not have for itself.
    """
    with pytest.raises(TypeError):
        executor.submit(fn=capture)


@pytest.mark.parametrize(
    "error",
    [ValueError(1), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), Cancelled("stray")],
    ids=lambda error: type(error).__name__,
)
def test_failure_stays_with_its_future(error):
    """
    Whatever a call raises is its future's, the object itself, and the group goes on.
    """
    with TaskGroup(2) as group:
        executor = GroupExecutor(group)
        failed = executor.submit(raises, error)
        assert failed.exception(LONG) is error
        with pytest.raises(type(error)) as raised:
            failed.result()
        assert executor.submit(pow, 2, 5).result(LONG) == 32

    assert raised.value is error
    assert "raises" in [entry.name for entry in raised.traceback]
    assert group.failures == ()


def test_only_a_group_is_taken():
    """
    Anything else is named.
    """
    with pytest.raises(TypeError, match=r"GroupExecutor\(\) wants a TaskGroup, not 5"):
        GroupExecutor(5)


def test_libraries_may_ask_for_the_number_of_workers(executor):
    """
    It is the group's, under the name that the standard library's executors have for it.
    """
    assert executor._max_workers == 4


def test_no_more_calls_run_at_once_than_the_group_has_workers(group, executor):
    """
    Four of nine run; the others wait for them.
    """
    running = []
    all_four = threading.Barrier(5)

    def run():
        running.append(None)
        all_four.wait(LONG)
        passes(go_on)

    go_on = threading.Event()
    futures = [executor.submit(run) for _ in range(4)]
    queued = [executor.submit(running.append, None) for _ in range(5)]
    all_four.wait(LONG)
    seen = len(running)
    go_on.set()

    assert seen == 4
    assert not concurrent.futures.wait([*futures, *queued], LONG).not_done


def test_future_tells_how_it_stands(executor, gate):
    """
    Running while the call runs, and not to be cancelled then; done at its end.
    """
    future = executor.submit(passes, gate, "value")
    until(future.running)
    refused = future.cancel()
    before = future.done()
    gate.set()

    assert not refused
    assert not before
    assert future.result(LONG) == "value"
    assert future.done()
    assert not future.running()
    assert not future.cancelled()


def test_waiting_for_a_result_ends_with_its_timeout(executor, gate):
    """
    The call goes on.
    """
    future = executor.submit(passes, gate, "value")

    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.001)
    gate.set()
    assert future.result(LONG) == "value"


def test_pending_future_that_is_cancelled_never_runs():
    """
    Its task is cancelled with it; to cancel it once more changes nothing.
    """
    ran = []
    told = []
    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        release = threading.Event()
        running = executor.submit(passes, release)
        until(running.running)
        pending = executor.submit(ran.append, None)
        pending.add_done_callback(told.append)
        won = [pending.cancel(), pending.cancel()]
        told_at_once = list(told)
        release.set()

    assert won == [True, True]
    assert told_at_once == told == [pending]
    assert ran == []
    assert pending.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        pending.result()


# --- map ------------------------------------------------------------------------------------------


def test_map_gives_values_in_order(executor):
    """
    As the built-in, up to the end of the shortest input; `chunksize` is for processes.
    """
    expected = list(map(pow, range(10), range(12)))

    assert list(executor.map(pow, range(10), range(12))) == expected
    assert list(executor.map(pow, range(10), range(12), chunksize=3)) == expected


def test_map_raises_a_failure_in_its_place(executor):
    """
    The values before it come first.
    """
    values = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])

    assert [next(values), next(values)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError):
        next(values)


def test_map_submits_without_being_read(executor):
    """
    All its calls are made, whoever looks at the values.
    """
    seen = []
    executor.map(seen.append, range(10))
    executor.shutdown()

    assert sorted(seen) == list(range(10))


def test_map_that_times_out_cancels_what_has_not_begun():
    """
    The one that runs goes on.
    """
    release = threading.Event()
    log = []

    def call(name):
        log.append(name)
        passes(release)

    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        first = executor.submit(call, "first")
        until(lambda: log)
        values = executor.map(call, ["second", "third"], timeout=0)
        with closing(values), pytest.raises(TimeoutError):
            next(values)
        release.set()
        first.result(LONG)

    assert log == ["first"]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="came with Python 3.14")
def test_map_reads_no_further_than_its_buffer(executor):
    """
    `buffersize` bounds what has been submitted and not been read.
    """
    read = []

    def numbers():
        for number in itertools.count():
            read.append(number)
            yield number

    values = executor.map(abs, numbers(), buffersize=3)

    assert [next(values) for _ in range(5)] == list(range(5))
    assert len(read) <= 5 + 3
    values.close()


# --- wait and as_completed ------------------------------------------------------------------------


def test_wait_returns_at_the_first_that_is_done(executor, gate):
    """
    Whether it has a value, or was cancelled before it began.
    """
    held = executor.submit(passes, gate)
    value = executor.submit(abs, -1)

    assert concurrent.futures.wait([held, value], LONG, FIRST_COMPLETED) == ({value}, {held})


def test_wait_returns_at_the_first_failure(executor, gate):
    """
    What has a value by then is done, too.
    """
    held = executor.submit(passes, gate)
    value = executor.submit(abs, -1)
    value.result(LONG)
    failed = executor.submit(raises, ValueError())

    done, left = concurrent.futures.wait([held, value, failed], LONG, FIRST_EXCEPTION)

    assert (done, left) == ({value, failed}, {held})


def test_wait_ends_with_its_timeout(executor, gate):
    """
    It says which are done; one that is given twice is there once.
    """
    held = executor.submit(passes, gate)
    value = executor.submit(abs, -1)
    value.result(LONG)

    assert concurrent.futures.wait([held, value, held], timeout=0.001) == ({value}, {held})


def test_wait_misses_no_end(executor, hasty):
    """
    A hundred calls that end together, while somebody begins to wait for all.
    """
    for _ in range(5):
        go = threading.Event()
        futures = {executor.submit(passes, go) for _ in range(100)}
        go.set()

        assert not concurrent.futures.wait(futures, LONG).not_done


def test_as_completed_gives_each_once(executor):
    """
    With a value, failed or cancelled; though given twice.
    """
    hold = threading.Event()
    held = [executor.submit(passes, hold) for _ in range(4)]
    until(lambda: all(future.running() for future in held))
    cancelled = executor.submit(abs, -1)
    cancelled.cancel()
    hold.set()
    futures = [*held, executor.submit(abs, -1), executor.submit(raises, ValueError()), cancelled]

    given = list(concurrent.futures.as_completed(futures * 2, LONG))

    assert len(given) == len(futures)
    assert set(given) == set(futures)


def test_as_completed_ends_with_its_timeout(executor, gate):
    """
    What is done comes first.
    """
    held = executor.submit(passes, gate)
    value = executor.submit(abs, -1)
    value.result(LONG)
    given = []

    with pytest.raises(concurrent.futures.TimeoutError, match=r"1 \(of 2\) futures unfinished"):
        given.extend(concurrent.futures.as_completed([held, value], timeout=0))
    assert given == [] or given == [value]


# --- References -----------------------------------------------------------------------------------


def is_gone(reference):
    gc.collect()  # a free-threaded build counts references late
    return reference() is None


@pytest.mark.parametrize("kept", [True, False], ids=["future kept", "future dropped"])
def test_nothing_refers_to_a_call_that_has_ended(executor, kept):
    """
    The function and its arguments are free, whoever keeps the future.
    """
    thing, argument = Thing(), Thing()
    references = [weakref.ref(thing), weakref.ref(argument)]
    future = executor.submit(functools.partial(capture, thing), argument)
    future.add_done_callback(lambda future: None)
    future.exception(LONG)
    del thing, argument
    if kept:
        future._result = None  # the arguments themselves
    else:
        del future

    until(lambda: all(map(is_gone, references)))


def test_nothing_refers_to_a_call_that_was_cancelled():
    """
    It is free at once, though its executor and its group go on.
    """
    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        release = threading.Event()
        running = executor.submit(passes, release)
        until(running.running)
        thing = Thing()
        reference = weakref.ref(thing)
        pending = executor.submit(thing.method)
        del thing
        pending.cancel()

        until(lambda: is_gone(reference))
        release.set()


def test_values_of_a_map_are_the_readers_alone(executor):
    """
    A value that has been taken, and dropped, is gone.
    """
    for thing in executor.map(lambda _: Thing(), range(10)):
        reference = weakref.ref(thing)
        del thing
        until(lambda reference=reference: is_gone(reference))


def test_failure_is_no_cycle():
    """
    What a failed call had in hand dies with the names for its future and its group.
    """

    def fail():
        thing = Thing()
        seen.append(weakref.ref(thing))
        raise ValueError

    seen = []
    gc.collect()
    gc.disable()
    try:
        with TaskGroup(1) as group:
            future = GroupExecutor(group).submit(fail)
            future.exception(LONG)
        del group, future
        if not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled():
            until(lambda: seen[0]() is None)
    finally:
        gc.enable()


def let_go_by_with(group):
    with GroupExecutor(group) as executor:
        return executor.submit(abs, -1)


def let_go_by_name(group):
    return GroupExecutor(group).submit(abs, -1)


def let_go_while_it_runs(group):
    release = threading.Event()
    executor = GroupExecutor(group)
    future = executor.submit(passes, release)
    executor.shutdown(wait=False)
    release.set()
    return future


@pytest.mark.parametrize("let_go", [let_go_by_with, let_go_by_name, let_go_while_it_runs])
def test_many_executors_leave_nothing_on_their_group(let_go):
    """
    However each is let go of, the group's token has no more to tell than before.
    """
    with TaskGroup(2) as group:
        before = len(group.token._entries)
        for _ in range(100):
            let_go(group).result(LONG)
        gc.collect()

        until(lambda: len(group.token._entries) == before)


# --- Shutting down --------------------------------------------------------------------------------


def test_nothing_is_taken_after_shutdown(group, executor):
    """
    The words are those of the standard library; the group goes on.
    """
    executor.shutdown()

    with pytest.raises(RuntimeError, match=r"^cannot schedule new futures after shutdown$"):
        executor.submit(abs, -1)
    assert group.submit(abs, -1).result() == 1


def test_shutdown_waits_for_its_own_futures_alone(group, executor):
    """
    Other tasks of the group go on.
    """
    other = started_sleeper(group)
    futures = [executor.submit(time.sleep, 0.001) for _ in range(50)]
    executor.shutdown()
    all_done = all(future.done() for future in futures)
    running = other.running()
    other.cancel()

    assert all_done
    assert running


def test_shutdown_need_not_wait(executor, gate):
    """
    What was submitted is done all the same.
    """
    futures = [executor.submit(passes, gate, number) for number in range(9)]
    executor.shutdown(wait=False)
    before = [future.done() for future in futures]
    gate.set()

    assert not any(before)
    assert [future.result(LONG) for future in futures] == list(range(9))


def test_shutdown_may_cancel_what_has_not_begun(executor, gate):
    """
    What runs goes on to its value.
    """
    futures = [executor.submit(passes, gate, number) for number in range(50)]
    until(lambda: sum(future.running() for future in futures) == 4)
    executor.shutdown(wait=False, cancel_futures=True)
    gate.set()
    executor.shutdown()

    assert [future.result() for future in futures[:4]] == [0, 1, 2, 3]
    assert all(future.cancelled() for future in futures[4:])


@pytest.mark.parametrize("pool", [None, "processes"])
def test_call_that_is_cancelled_as_it_is_submitted_never_runs(pool, monkeypatch, tmp_path):
    """
    It is in the queue, and its future is yet to be told which task it is.
    """
    submit, submitted, goes_on = Submitter.submit, threading.Event(), threading.Event()
    begun, release = tmp_path / "begun", tmp_path / "release"

    def submit_late(*arguments):
        task = submit(*arguments)
        submitted.set()
        assert goes_on.wait(LONG)
        return task

    with TaskGroup(1, pool=pool) as group:
        executor = GroupExecutor(group)
        group.submit(far.begin_and_hold, begun, release)
        far.seen(begun)
        monkeypatch.setattr(Submitter, "submit", submit_late)
        thread, futures = start(executor.submit, far.note, tmp_path / "ran")
        assert submitted.wait(LONG)
        executor.shutdown(wait=False, cancel_futures=True)
        goes_on.set()
        thread.join(LONG)
        far.note(release)

    assert futures[0].cancelled()
    assert not (tmp_path / "ran").exists()


def test_shutdown_gives_what_was_submitted_the_time_to_begin(monkeypatch):
    """
    Some calls have begun when the rest is cancelled, as those of the standard library have.
    """
    monkeypatch.setattr(futures_module, "WAKING", 1000 * LONG)
    with TaskGroup(5) as group:
        executor = GroupExecutor(group)
        futures = [executor.submit(time.sleep, 0.1) for _ in range(50)]
        executor.shutdown(cancel_futures=True)

    assert any(not future.cancelled() for future in futures)
    assert sum(future.cancelled() for future in futures) > 20


def test_shutdown_does_not_wait_for_a_worker_that_is_busy(group, executor, monkeypatch):
    """
    Where no worker is on its way, what has not begun is cancelled at once.
    """
    monkeypatch.setattr(time, "sleep", None)
    for _ in range(4):
        started_sleeper(group)
    future = executor.submit(abs, -1)
    executor.shutdown(cancel_futures=True)
    group.cancel()

    assert future.cancelled()


def test_with_statement_waits():
    """
    It shuts the executor down, and leaves the group open.
    """
    with TaskGroup(2) as group:
        with GroupExecutor(group) as executor:
            futures = [executor.submit(abs, -number) for number in range(20)]
        done = [future.done() for future in futures]

        assert all(done)
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(abs, -1)


def is_in_wait(thread):
    """Whether a thread waits for a condition, as it does for futures, or is about to."""
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) == (
        threading.__file__,
        "wait",
    )


def test_submit_that_meets_shutdown_is_refused_or_done(executor):
    """
    At every line of it: no future is left for which `shutdown` waits for ever.
    """
    for step in itertools.count():
        one = GroupExecutor(executor._group)
        shut = []

        def shut_down(one=one, shut=shut):
            shut.append(start(one.shutdown))
            # It has ended, or waits for the future that is being submitted.
            until(lambda: not shut[0][0].is_alive() or is_in_wait(shut[0][0]))

        trace_this_thread(act_at(step, shut_down))
        future = None
        try:
            with contextlib.suppress(RuntimeError):
                future = one.submit(abs, -1)
        finally:
            sys.settrace(None)
        if not shut:
            break
        thread, outcome = shut[0]
        thread.join(LONG)

        assert outcome == [None], f"shutdown() hangs, for a submit in its line {step}"
        assert future is None or future.result(LONG) == 1
    assert step > 10


def test_call_that_shuts_its_own_executor_down_is_told(executor):
    """
    It would wait for itself.
    """
    future = executor.submit(executor.shutdown)

    with pytest.raises(RuntimeError, match="'shutdown' cannot wait for itself"):
        future.result(LONG)


def test_task_that_shuts_down_runs_what_has_no_other_worker():
    """
    The only worker of the group does what it waits for.
    """

    def use():
        with GroupExecutor(group) as executor:
            futures = [executor.submit(abs, -number) for number in range(3)]
        return [future.result(0) for future in futures]

    with TaskGroup(1) as group:
        used = group.submit(use)

    assert used.result() == [0, 1, 2]


def test_shutdown_waits_though_its_caller_is_cancelled(executor, gate):
    """
    It promises that nothing runs any more, whoever was cancelled.
    """
    token = CancelToken()
    token.cancel()
    future = executor.submit(passes, gate)

    def shut_down():
        with fastpool.use_token(token):
            executor.shutdown()

    thread, outcome = start(shut_down)
    until(lambda: executor._calls.closed)
    before = list(outcome)
    gate.set()
    thread.join(LONG)

    assert before == []
    assert outcome == [None]
    assert future.done()


def test_ctrl_c_ends_a_shutdown(watched):
    """
    The first one tells the call, and is raised by the wait that it ended.
    """
    main = threading.main_thread()

    def interrupt():
        until(lambda: is_asleep(main))
        signal.pthread_kill(main.ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), TaskGroup(1) as group, GroupExecutor(group) as executor:
        running = executor.submit(sleeper)
        until(running.running)
        thread, _ = start(interrupt)
    thread.join(LONG)

    assert isinstance(running.exception(0), TaskCancelledError)


# --- When the interpreter ends --------------------------------------------------------------------

PROGRAM = """
import atexit, os, threading, time

@atexit.register  # called after fastpool's own, since registered before it
def last():
    try:
        executor.submit(abs, -1)
    except RuntimeError as error:
        os.write(1, str(error).encode())

from fastpool import TaskGroup
from fastpool.futures import GroupExecutor

over = threading.Event()
atexit.register(over.set)  # called before fastpool's own

def call(number):
    over.wait(30)
    os.write(1, b"%d " % number)

def main():
    global executor
    executor = GroupExecutor(TaskGroup(2, name="calls").__enter__())
    for number in range(9):
        executor.submit(call, number)
    {then}

main()
"""


def run_program(then):
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", PROGRAM.format(then=then)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("pass", "after interpreter shutdown: group 'calls': its with block has ended"),
        ("executor.shutdown(wait=False)", "after shutdown"),
    ],
)
def test_what_is_queued_at_exit_is_done(then, said):
    """
    All of it, whether or not the executor was shut down; what comes later is refused.
    """
    ended = run_program(then)

    *numbers, rest = ended.stdout.split(" ", 9)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(numbers) == [str(number) for number in range(9)]
    assert rest.startswith(f"cannot schedule new futures {said}")


def test_what_was_cancelled_before_the_exit_is_not_done():
    """
    Only what had begun by then.
    """
    ended = run_program("executor.shutdown(wait=False, cancel_futures=True)")

    numbers, _, rest = ended.stdout.partition("cannot")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(numbers.split()) <= 2
    assert rest == " schedule new futures after shutdown"


def test_failure_at_exit_is_silent():
    """
    It stays with its future, which nobody asks.
    """
    ended = run_program("executor.submit(divmod, 1, 0)")

    assert (ended.returncode, ended.stderr) == (0, "")


# --- A group that ends ----------------------------------------------------------------------------


def cancels(group):
    group.cancel("enough")


def fails(group):
    group.submit(raises, ValueError("bad header"))


def leaves(group):
    raise ValueError("bad header")


def hears(group):
    around.cancel("enough")


around = None


@pytest.mark.parametrize("end", [cancels, fails, leaves, hears])
def test_end_of_a_group_reaches_every_future(end):
    """
    Pending ones are cancelled, running ones hear their token; who waits for them is told.
    """
    global around
    around = CancelToken()
    begun = threading.Barrier(3)

    @cancellable
    def run(token):
        begun.wait(LONG)
        token.sleep(LONG)

    try:
        with TaskGroup(3, name="calls", token=around) as group:
            executor = GroupExecutor(group)
            running = [executor.submit(run) for _ in range(2)]
            begun.wait(LONG)
            third = executor.submit(passes, release := threading.Event())
            until(third.running)
            pending = [executor.submit(abs, -1) for _ in range(3)]
            futures = [*running, *pending]
            waits = start(concurrent.futures.wait, futures)
            gives = start(lambda: set(concurrent.futures.as_completed(futures)))
            until(lambda: all(len(future._waiters) == 2 for future in futures))
            group.token.on_cancel(release.set)  # not before: it would make room for the pending
            if end is fails:
                for future in pending:
                    future.cancel()
                release.set()  # makes room for what fails
            end(group)
            group.wait(LONG)
    except (ValueError, Cancelled):
        pass
    for thread, _ in (waits, gives):
        thread.join(LONG)

    assert waits[1][0].not_done == set()
    assert gives[1] == [set(futures)]
    assert all(future.cancelled() for future in pending)
    for future in running:
        error = future.exception(0)
        assert isinstance(error, TaskCancelledError)
        assert error.reason == group.token.reason
        assert "task 'run' of group 'calls' was cancelled" in str(error)
        assert error.__cause__ is (group.failures[0].exception if end in (fails, leaves) else None)


def test_group_that_times_out_reaches_every_future():
    """
    As any other end of a group does.
    """
    with pytest.raises(TimeoutError), TaskGroup(1, timeout=LONG) as group:
        executor = GroupExecutor(group)
        futures = [executor.submit(sleeper) for _ in range(3)]
        group.token._limit(0.01)  # once all are submitted
        concurrent.futures.wait(futures)

    ended = [future.cancelled() or future.exception(0) for future in futures]
    assert all(end is True or isinstance(end, TaskCancelledError) for end in ended)
    assert isinstance(group.token.reason, TimeoutError)


@pytest.mark.parametrize("where", ["in the body", "in another thread", "in a call"])
def test_cancelled_group_refuses_by_a_runtime_error(where):
    """
    Never by `Cancelled`, which no library knows, though the caller's own token is set.
    """

    def refused():
        try:
            executor.submit(abs, -1)
        except RuntimeError as error:
            return str(error)

    def waits_and_submits():
        current_token().wait(LONG)
        return refused()

    with TaskGroup(2, name="calls") as group:
        executor = GroupExecutor(group)
        future = executor.submit(waits_and_submits)
        until(future.running)
        group.cancel("enough")
        if where == "in the body":
            said = refused()
        elif where == "in another thread":
            said = in_thread(refused)
        else:
            said = future.result(LONG)

    assert said == "cannot schedule new futures after group 'calls' was cancelled: enough"


def test_group_that_is_not_open_refuses_by_a_runtime_error():
    """
    Before its block, and after it.
    """
    group = TaskGroup(name="calls")
    executor = GroupExecutor(group)
    with pytest.raises(RuntimeError, match=r"^cannot schedule new futures after .* been entered"):
        executor.submit(abs, -1)
    with group:
        future = executor.submit(abs, -1)

    assert future.result(0) == 1
    with pytest.raises(
        RuntimeError, match=r"^cannot schedule new futures after shutdown: .* ended"
    ):
        executor.submit(abs, -1)
    executor.shutdown()


def test_submit_that_waits_for_room_is_refused_by_a_runtime_error():
    """
    A full queue makes it wait; a cancel ends that.
    """
    with TaskGroup(1, max_queued=1, name="calls") as group:
        executor = GroupExecutor(group)
        until(executor.submit(sleeper).running)
        executor.submit(abs, -1)
        queue = group._run.bounded
        thread, outcome = start(executor.submit, abs, -1)
        until(lambda: queue.waiting)
        group.cancel("enough")
        thread.join(LONG)

    assert type(outcome[0]) is RuntimeError
    assert "cannot schedule new futures after group 'calls' was cancelled" in str(outcome[0])


def test_body_that_waits_for_a_future_hears_of_a_failure():
    """
    The failure leaves the block, and not what the future said.
    """
    error = ValueError("bad header")
    with pytest.raises(ValueError, match="bad header") as raised, TaskGroup(2) as group:
        future = GroupExecutor(group).submit(sleeper)
        until(future.running)
        group.submit(raises, error)
        future.result(LONG)

    assert raised.value is error


def test_futures_are_told_by_the_end_of_the_block():
    """
    A thousand of them, with nobody in the body who waited.
    """
    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        until(executor.submit(sleeper).running)
        pending = [executor.submit(abs, -1) for _ in range(1000)]
        group.cancel()

    assert all(future.cancelled() for future in pending)


def test_cancel_in_a_signal_handler_takes_no_lock_of_a_future():
    """
    A helper thread cancels the futures, and calls what waits for that.
    """
    threads = []
    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        until(executor.submit(sleeper).running)
        pending = executor.submit(abs, -1)
        pending.add_done_callback(lambda future: threads.append(threading.current_thread()))
        before = signal.signal(signal.SIGUSR1, lambda number, frame: group.cancel())
        try:
            with pending._condition:
                signal.raise_signal(signal.SIGUSR1)
                cancelled_in_handler = pending._state != "PENDING"
        finally:
            signal.signal(signal.SIGUSR1, before)
        until(lambda: threads)

    assert not cancelled_in_handler
    assert pending.cancelled()
    assert threads[0] is not threading.current_thread()


def test_abandoned_call_ends_its_future():
    """
    A block that is left without it says so to whoever waits; what it comes to later is nobody's.
    """
    release, ended = threading.Event(), threading.Event()

    def hang():
        release.wait(LONG)
        threading.current_thread().name = "over"
        ended.set()
        return "late"

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0.01, on_stuck="abandon") as group,
    ):
        future = GroupExecutor(group).submit(hang)
        until(future.running)
        thread, outcome = start(future.result)
        group.cancel("enough")
    thread.join(LONG)
    release.set()
    assert ended.wait(LONG)

    assert isinstance(outcome[0], TaskCancelledError)
    assert isinstance(future.exception(0), TaskCancelledError)


def test_call_that_begins_as_its_group_is_cancelled_and_abandoned_ends_its_future(
    gate, monkeypatch
):
    """
    It had begun as the cancel looked, and neither it nor who submitted had said which task it is.
    """
    place, submit, cancel = (
        futures_module.current_place,
        Submitter.submit,
        futures_module._Calls.cancel,
    )
    begins, cancelled, goes_on = (threading.Event() for _ in range(3))

    def find_place():
        begins.set()
        assert goes_on.wait(LONG)
        return place()

    def submit_late(*arguments):
        task = submit(*arguments)
        assert goes_on.wait(LONG)
        return task

    def cancel_and_say(calls):
        cancel(calls)
        cancelled.set()

    monkeypatch.setattr(futures_module, "current_place", find_place)
    monkeypatch.setattr(Submitter, "submit", submit_late)
    monkeypatch.setattr(futures_module._Calls, "cancel", cancel_and_say)
    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0.01, on_stuck="abandon") as group,
    ):
        thread, futures = start(GroupExecutor(group).submit, gate.wait, LONG)
        assert begins.wait(LONG)
        group.cancel("enough")
        assert cancelled.wait(LONG)
        goes_on.set()
        thread.join(LONG)

    with pytest.raises(TaskCancelledError):
        futures[0].result(timeout=20)


# --- fail_fast ------------------------------------------------------------------------------------


def test_failure_is_the_groups_with_fail_fast():
    """
    It leaves the block as the object it is, with the call's name and line in its notes.
    """
    error = ValueError("bad header")
    with (
        pytest.raises(ValueError, match="bad header") as raised,
        TaskGroup(2, name="calls") as group,
    ):
        executor = GroupExecutor(group, fail_fast=True)
        running = executor.submit(sleeper)
        until(running.running)
        failed = executor.submit(raises, error)
        line = sys._getframe().f_lineno - 1
        failed.result(LONG)

    assert raised.value is error
    assert failed.exception(0) is error
    assert [failure.exception for failure in group.failures] == [error]
    assert error.__notes__ == [f"in task 'raises', submitted at {__file__}:{line} to group 'calls'"]
    assert isinstance(running.exception(0), TaskCancelledError)
    assert running.exception(0).__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Cancelled("stray")])
def test_failure_of_any_class_fails_fast(error):
    """
    As that of any task.
    """
    with pytest.raises(type(error)) as raised, TaskGroup(2) as group:
        GroupExecutor(group, fail_fast=True).submit(raises, error)

    assert raised.value is error


def test_group_knows_of_a_failure_before_its_future():
    """
    Who is told by the future finds the failure recorded and the token set.
    """
    seen = []
    with pytest.raises(ValueError, match="bad header"), TaskGroup(1) as group:
        go = threading.Event()

        def fail():
            passes(go)
            raise ValueError("bad header")

        future = GroupExecutor(group, fail_fast=True).submit(fail)
        future.add_done_callback(
            lambda future: seen.append((len(group.failures), group.token.cancelled()))
        )
        go.set()

    assert seen == [(1, True)]


def test_policy_judges_failures_that_fail_fast():
    """
    Under `CollectAll` they cancel nothing, and leave together.
    """
    with pytest.raises(ExceptionGroup) as raised, TaskGroup(2, policy=CollectAll()) as group:
        executor = GroupExecutor(group, fail_fast=True)
        futures = [executor.submit(raises, ValueError(number)) for number in range(3)]
        value = executor.submit(abs, -1)

    assert {id(error) for error in raised.value.exceptions} == {
        id(future.exception(0)) for future in futures
    }
    assert value.result(0) == 1


def test_failure_of_a_map_names_the_line_that_asked_for_it():
    """
    Not one of the standard library's.
    """
    with pytest.raises(ZeroDivisionError) as raised, TaskGroup(1, name="calls") as group:
        executor = GroupExecutor(group, fail_fast=True)
        executor.map(divmod, [1], [0])
        line = sys._getframe().f_lineno - 1

    assert raised.value.__notes__ == [
        f"in task 'divmod', submitted at {__file__}:{line} to group 'calls'"
    ]


# --- What a call is -------------------------------------------------------------------------------


def test_call_is_a_task_of_the_group(group, executor):
    """
    A decorated function has its token; any other finds it, a child of the group's.
    """

    @cancellable
    def takes(token, number):
        return token is current_token(), number

    mine = current_token()

    assert executor.submit(takes, 5).result(LONG) == (True, 5)
    assert executor.submit(current_token).result(LONG) is not CancelToken.NEVER
    assert mine is group.token
    assert takes(5) == (True, 5)


def test_events_tell_of_calls_by_their_names(gate):
    """
    Observers see the function's name, and not that of what brings its value.
    """
    seen = []
    with TaskGroup(1, observers=[seen.append]) as group:
        executor = GroupExecutor(group)
        executor.submit(functools.partial(pow, 2), 5).result(LONG)

    names = {event.task.name for event in seen if event.task is not None}
    assert names == {"pow"}


# --- Callbacks ------------------------------------------------------------------------------------


def test_callback_that_raises_is_logged_and_changes_nothing(executor, caplog):
    """
    As the standard library has it.
    """
    order = []
    future = executor.submit(passes, go := threading.Event())
    future.add_done_callback(lambda future: order.append(1))
    future.add_done_callback(lambda future: 1 / 0)
    future.add_done_callback(lambda future: order.append(2))
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        go.set()
        future.result(LONG)
        executor.shutdown()
        until(lambda: len(order) == 2)

    assert order == [1, 2]
    assert "exception calling callback" in caplog.text


@pytest.mark.parametrize("outcome", ["value", "failure", "cancel"])
def test_callback_that_exits_changes_nothing(outcome, unraised):
    """
    What is no `Exception` goes to `sys.unraisablehook`; the group and the other futures go on.
    """

    def call():
        passes(go)
        if outcome == "failure":
            raise ValueError

    exits = [SystemExit(number) for number in range(3)]
    go = threading.Event()
    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        held = executor.submit(passes, go)
        until(held.running)
        futures = [executor.submit(call) for _ in exits]
        for future, error in zip(futures, exits, strict=True):
            future.add_done_callback(lambda future, error=error: raises(error))
        if outcome == "cancel":
            group.cancel()
        else:
            go.set()
        until(lambda: all(future.done() for future in futures))
        go.set()

    assert sorted(unraised, key=id) == sorted(exits, key=id)
    assert group.failures == ()
    assert [future.cancelled() for future in futures] == [outcome == "cancel"] * 3


def test_callback_may_submit():
    """
    A library goes on from one call to the next in a callback.
    """
    seen = []
    over = threading.Event()

    def go_on(future):
        seen.append(future.result())
        if len(seen) < 20:
            executor.submit(abs, -len(seen)).add_done_callback(go_on)
        else:
            over.set()

    with TaskGroup(1, max_queued=1) as group:
        executor = GroupExecutor(group)
        executor.submit(abs, 0).add_done_callback(go_on)
        assert over.wait(LONG)

    assert seen == list(range(20))


# --- Cancelling what is about to begin ------------------------------------------------------------


def check_cancelled_or_run(future, won, ran):
    """One of both has happened, and whoever asks hears the same."""
    assert not concurrent.futures.wait([future], LONG).not_done
    if won:
        assert future.cancelled()
        assert ran == []
    else:
        assert future.result(0) == "value"
        assert ran == [None]


def run(ran):
    ran.append(None)
    return "value"


def test_cancel_meets_a_worker_at_every_line():
    """
    While a worker takes a call and begins it, somebody cancels its future.
    """
    both = set()
    for step in itertools.count():
        won, ran, queued = [], [], []
        armed = threading.Event()
        with TaskGroup(1) as group:
            executor = GroupExecutor(group)

            def arm(step=step, won=won, armed=armed, queued=queued):
                assert armed.wait(LONG)
                trace_this_thread(act_at(step, lambda: won.append(queued[0].cancel())))

            executor.submit(arm)
            future = executor.submit(run, ran)
            queued.append(future)
            armed.set()
            until(future.done)
            executor.submit(sys.settrace, None).result(LONG)
        if not won:
            break
        both.add(won[0])

        check_cancelled_or_run(future, won[0], ran)
    assert both == {True, False}


def test_worker_meets_a_cancel_at_every_line():
    """
    While somebody cancels a future, a worker takes its call.
    """
    both = set()
    for step in itertools.count():
        ran, acted, release = [], [], threading.Event()
        with TaskGroup(1) as group:
            executor = GroupExecutor(group)
            held = executor.submit(passes, release)
            until(held.running)
            future = executor.submit(run, ran)

            def let_go(acted=acted, release=release, future=future, held=held):
                acted.append(None)
                release.set()
                until(lambda: held.done() and (future.done() or future.running()), within=0.05)

            trace_this_thread(act_at(step, let_go))
            try:
                won = future.cancel()
            finally:
                sys.settrace(None)
            release.set()
            check_cancelled_or_run(future, won, ran)
        both.add(won)
        if not acted:
            break
    assert step > 5
    assert True in both


# --- asyncio --------------------------------------------------------------------------------------


def test_event_loop_runs_calls_in_a_group(executor):
    """
    Values and failures come back as from any executor.
    """

    async def main():
        loop = asyncio.get_running_loop()
        values = await asyncio.gather(
            *(loop.run_in_executor(executor, abs, -number) for number in range(20))
        )
        with pytest.raises(ValueError, match="bad header"):
            await loop.run_in_executor(executor, raises, ValueError("bad header"))
        return values

    assert asyncio.run(main()) == list(range(20))


def test_cancel_of_a_group_reaches_the_event_loop():
    """
    Who awaits a running call gets a `TaskCancelledError`; a pending one, `asyncio`'s own.
    """

    async def main():
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()

        def run():
            loop.call_soon_threadsafe(begun.set)
            fastpool.sleep(LONG)

        running = loop.run_in_executor(executor, run)
        await begun.wait()
        pending = loop.run_in_executor(executor, abs, -1)
        group.cancel("enough")
        return await asyncio.wait_for(
            asyncio.gather(running, pending, return_exceptions=True), LONG
        )

    with TaskGroup(1) as group:
        executor = GroupExecutor(group)
        running, pending = asyncio.run(main())

    assert isinstance(running, TaskCancelledError)
    assert running.reason == "enough"
    assert isinstance(pending, asyncio.CancelledError)


def test_futures_of_a_dropped_group_end():
    """
    Who waits for one is told, though nobody leaves the block.
    """

    def opens():
        group = TaskGroup(1)
        group.__enter__()
        executor = GroupExecutor(group)
        held = executor.submit(fastpool.sleep, LONG)
        until(held.running)
        return held, executor.submit(abs, -1)

    with pytest.warns(ResourceWarning, match="dropped"):
        futures = opens()
        gc.collect()

    for future in futures:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(timeout=LONG)


ASYNC_PROGRAM = """
import asyncio, os
import fastpool
from fastpool import TaskGroup
from fastpool.futures import GroupExecutor

def call():
    os.write(1, b"begun\\n")
    try:
        fastpool.sleep(60)
    except BaseException as error:
        os.write(1, type(error).__name__.encode())
        raise

async def main(executor):
    await asyncio.get_running_loop().run_in_executor(executor, call)

with TaskGroup(2) as group:
    asyncio.run(main(GroupExecutor(group)))
"""


def test_ctrl_c_ends_a_program_whose_event_loop_waits_for_a_call():
    """
    The call hears its token, and the program ends as Ctrl-C ends any other.
    """
    with subprocess.Popen(
        [sys.executable, "-P", "-c", ASYNC_PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        begun = process.stdout.readline()
        # A signal that comes as the main thread is on its way into the system is heard after that.
        until(lambda: is_blocked(process.pid, process=process.pid))
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=50)

    assert begun == b"begun\n"
    assert out == b"Cancelled"
    assert process.returncode == -signal.SIGINT
    assert b"\nKeyboardInterrupt\n" in err
