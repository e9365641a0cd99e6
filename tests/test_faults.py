"""
Faults of all kinds, and what becomes of them; `docs/reliability.md` names the test of each.

Here are those that no other file has: odd exceptions, clean-ups that fail, what is kept in memory,
forks, imports, clocks, callbacks that misbehave.
"""

import contextlib
import contextvars
import functools
import gc
import itertools
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import types
import weakref

import pytest
from staging import (
    act_at,
    fail,
    in_thread,
    is_asleep,
    resize,
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
    FirstSuccess,
    StuckTaskError,
    TaskGroup,
    cancellable,
    shield,
    timeout,
)

GIL = not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled()


def run_script(source, *, cwd=None):
    """What a program prints in a fresh interpreter."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=cwd,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


class Witness:
    """Something that can be seen to be gone."""


# --- What a task may raise ------------------------------------------------------------------------


class Refused(Exception):
    """Cannot be made again from its `args`, as `pickle` and `copy` would."""

    def __init__(self, code, *, where):
        super().__init__()
        self.code, self.where = code, where


class Slotted(Exception):
    """Takes no attributes of anybody's."""

    __slots__ = ()


@pytest.mark.parametrize(
    "error", [Refused(404, where="here"), Slotted(), StopAsyncIteration()], ids=repr
)
def test_failure_of_an_odd_class_leaves_as_it_is(error):
    """
    The very object leaves, and its handle gives it.
    """
    with pytest.raises(type(error)) as raised, TaskGroup(1) as group:
        task = group.submit(fail, error)

    assert raised.value is error
    assert task.exception() is error


@pytest.mark.parametrize("read", ["results", "iterate", "as_completed"])
def test_task_that_raises_stop_iteration_does_not_end_an_iteration(read):
    """
    Values that are missing would look like values that there are none of.
    """
    error = StopIteration("no more")
    seen = []

    def reads(batch):
        if read == "results":
            seen.extend(batch.results())
        else:
            seen.extend(batch if read == "iterate" else batch.as_completed())

    with pytest.raises(StopIteration) as left, TaskGroup(1) as group:
        batch = group.map(fail, [error])
        with shield():
            batch.wait(timeout=60)
        try:
            reads(batch)
        except (StopIteration, RuntimeError) as met:
            heard = met

    assert left.value is error
    assert heard is error or heard.__cause__ is error
    assert seen == []


def test_one_error_of_two_tasks_is_no_cycle():
    """
    A module's singleton, raised by several tasks at once and again and again, gets no context.
    """
    error = ValueError("a singleton")

    for _ in range(20):
        together = threading.Barrier(2)

        def fails(together=together):
            together.wait(timeout=60)
            raise error

        with pytest.raises(ValueError, match="singleton") as raised, TaskGroup(2) as group:
            group.starmap(fails, [()] * 2)

        assert raised.value is error
        assert len(group.failures) == 2
        assert error.__context__ is error.__cause__ is None


# --- The first failure, order, masking ------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_traceback_of_one_error_grows_as_in_python_alone(nested):
    """
    In group after group it gets the lines of the user's that it went through, and none of ours.
    """
    error = ValueError("one for all")

    def bare():
        raise error

    def grouped():
        with TaskGroup(1) as group:
            group.submit(bare)

    def nests():
        with TaskGroup(1) as group:
            group.submit(grouped)

    def frames():
        return [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]

    def leave_block():
        with pytest.raises(ValueError, match="one for all") as raised:
            (nests if nested else grouped)()
        assert raised.value is error
        return frames()

    own = {leave_block.__code__, nests.__code__, grouped.__code__, bare.__code__}
    first, *_, last_but_one, last = [leave_block() for _ in range(30)]

    added = [code for code in first if code in own]
    assert len(added) == (4 if nested else 3)
    assert len(last) - len(last_but_one) == len(added)
    assert [code for code in last if code in own] == added * 30
    assert len(last) - len(added) * 30 == len(first) - len(added)


def test_traceback_that_somebody_has_kept_stays_as_it_is():
    """
    Whoever has that of an earlier group's handle sees the same in it when the error comes again.
    """
    error = ValueError("one for all")
    kept = []
    for _ in range(3):
        with pytest.raises(ValueError, match="one for all") as raised, TaskGroup(1) as group:
            task = group.submit(fail, error)
        walked = [line for _, line in traceback.walk_tb(raised.value.__traceback__)]
        kept.append((raised.value.__traceback__, walked, task))

    for held, walked, task in kept:
        assert [line for _, line in traceback.walk_tb(held)] == walked
        assert task.exception() is error


def test_of_a_hundred_failures_at_the_same_instant_one_is_first():
    """
    That one leaves, and none is lost.
    """
    together = threading.Barrier(100)

    def fails(number):
        together.wait(timeout=60)
        raise ValueError(number)

    with pytest.raises(ValueError, match=r"\d") as raised, TaskGroup(100) as group:
        group.map(fails, range(100))

    assert raised.value is group.failures[0].exception
    assert sorted(failure.exception.args[0] for failure in group.failures) == list(range(100))


@pytest.mark.parametrize("first", ["body", "task"])
def test_of_the_body_and_a_task_the_first_to_fail_leaves(first):
    """
    The other is recorded, and named in a note.
    """
    errors = {"body": KeyError("body"), "task": ValueError("task")}
    second = "task" if first == "body" else "body"

    @cancellable
    def fails(token, started):
        started.set()
        if first == "body":
            with contextlib.suppress(Cancelled):
                token.sleep(60)
        raise errors["task"]

    with pytest.raises(type(errors[first])) as raised, TaskGroup(1) as group:
        started = threading.Event()
        task = group.submit(fails, started)
        started.wait(timeout=60)
        if first == "task":
            with shield():
                task.wait(timeout=60)
        raise errors["body"] from None

    assert raised.value is errors[first]
    assert [failure.exception for failure in group.failures] == [errors[first], errors[second]]
    assert type(errors[second]).__name__ in raised.value.__notes__[-1]


@pytest.mark.parametrize("who", ["callback", "sibling"])
def test_clean_up_that_fails_masks_nothing(who, unraised):
    """
    The first failure leaves; a callback's error goes to the hook, a sibling's is a failure too.
    """
    root, broken = ValueError("root"), OSError("of the clean-up")
    started = threading.Event()

    @cancellable
    def cleans_up(token):
        started.set()
        try:
            token.sleep(60)
        finally:
            raise broken

    with pytest.raises(ValueError, match="root") as raised, TaskGroup(2) as group:
        if who == "callback":
            group.token.on_cancel(lambda: fail(broken))
        else:
            group.submit(cleans_up)
            started.wait(timeout=60)
        group.submit(fail, root)

    assert raised.value is root
    if who == "callback":
        assert unraised == [broken]
    else:
        assert [failure.exception for failure in group.failures] == [root, broken]
        assert "OSError in task 'cleans_up'" in raised.value.__notes__[-1]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("root"),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        StopIteration(),
        Cancelled("nobody asked for it"),
        BaseExceptionGroup("two", [ValueError(), KeyboardInterrupt()]),
        ExceptionGroup("one", [ValueError()]),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("state", ["empty", "running", "failed", "cancelled"])
def test_what_leaves_the_body_is_never_swallowed(error, state):
    """
    Whatever it is and whatever has become of the group; only an echo of the cancel is one.
    """
    root = OSError("of a task")
    left = None

    try:
        with TaskGroup(1) as group:
            if state == "running":
                started_sleeper(group)
            elif state == "failed":
                task = group.submit(fail, root)
                with shield():
                    task.wait(timeout=60)
            elif state == "cancelled":
                group.cancel()
            raise error
    except BaseException as raised:
        left = raised

    if state == "cancelled" and isinstance(error, Cancelled):
        assert left is None
    elif state == "failed" and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        assert left is root
    else:
        assert left is error


@pytest.mark.parametrize("how", ["from an error", "from None", "while handling"])
def test_chain_of_a_failure_stays_as_the_task_made_it(how):
    """
    Its cause, its context, and whether that is to be shown.
    """
    origin = KeyError("origin")

    def fails():
        try:
            raise origin
        except KeyError:
            if how == "from an error":
                raise ValueError("root") from origin
            if how == "from None":
                raise ValueError("root") from None
            raise ValueError("root")  # noqa: B904 - its context is the point

    with pytest.raises(ValueError, match="root") as raised, TaskGroup(1) as group:
        group.submit(fails)

    error = raised.value
    assert error.__cause__ is (origin if how == "from an error" else None)
    assert error.__context__ is origin
    assert error.__suppress_context__ is (how != "while handling")


def test_inner_group_that_fails_and_is_handled_leaves_the_outer_alone():
    """
    Its failure is the outer one's only if it leaves the task.
    """

    def nests():
        with contextlib.suppress(ValueError), TaskGroup(1) as inner:
            inner.submit(fail, ValueError("inside"))
        return "handled"

    with TaskGroup(1) as outer:
        task = outer.submit(nests)

    assert task.result() == "handled"
    assert outer.failures == ()
    assert not outer.token.cancelled()


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
@pytest.mark.parametrize("what", ["winner", "queued", "withdrawn"])
def test_handle_is_freed_without_the_collector(what):
    """
    Its group knew it until the block was left, with a thread that runs on behind it or without.
    """
    release = threading.Event()
    gc.collect()
    gc.disable()
    try:
        if what == "winner":
            with TaskGroup(1, policy=FirstSuccess()) as group:
                task = group.submit(abs, -404)
            release.set()
        else:
            with (
                pytest.raises(StuckTaskError),
                TaskGroup(1, grace=0, on_stuck="abandon") as group,
            ):
                until(group.submit(release.wait, 60).running)
                task = group.submit(abs, -404)
                if what == "withdrawn":
                    task.cancel()
                group.cancel()
        handle = weakref.ref(task)
        del task, group
        fastpool.shutdown()  # without a GIL, what a parked thread made is freed when it wakes
        freed = handle() is None
    finally:
        release.set()
        gc.enable()

    assert freed


@pytest.mark.parametrize("policy", [None, CollectAll()], ids=repr)
@pytest.mark.parametrize("source", ["task", "input"])
def test_failed_group_is_freed_without_the_collector(policy, source):
    """
    It holds its failures, and they hold nothing that leads back to it.
    """

    def items():
        raise ValueError("root")
        yield

    def run():
        with TaskGroup(2, policy=policy) as group:
            seen.append(weakref.ref(group))
            if source == "task":
                group.submit(fail, ValueError("root"))
            else:
                with contextlib.suppress(ValueError):
                    group.map(abs, items())
            del group  # or this frame, which the failure passes through, would lead to it

    seen = []
    gc.collect()
    gc.disable()
    try:
        with pytest.raises((ValueError, ExceptionGroup)):
            run()
        # Without a GIL, what a parked thread made is freed when it wakes.
        fastpool.shutdown()
        alive = [group() for group in seen if group() is not None]
    finally:
        gc.enable()

    assert alive == []


@pytest.mark.parametrize("read", [fastpool.Task.result, fastpool.Task.exception])
@pytest.mark.parametrize("ends", ["failed", "cancelled"])
def test_what_reading_a_task_raises_is_freed_without_the_collector(read, ends):
    """
    It holds the frames that it passed through, and they do not hold it.
    """

    class Failed(Exception):
        pass

    def fails():
        raise Failed

    def run():
        with contextlib.suppress(Failed), TaskGroup(1) as group:
            if ends == "failed":
                task = group.submit(fails)
            else:
                task = group.submit(fastpool.sleep, 60)
                group.cancel()
            del group
        try:
            error = read(task)
        except BaseException as raised:
            error = raised
        seen.append(weakref.ref(error))
        del task, error

    seen = []
    gc.collect()
    gc.disable()
    try:
        run()
        fastpool.shutdown()
        alive = [error() for error in seen]
    finally:
        gc.enable()

    assert alive == [None]


def test_queue_is_not_freed_before_the_failure_has_left():
    """
    That may take longer than everything else; it goes with the group.
    """

    class Large:
        pass

    def submits(group):
        large = Large()
        seen.append(weakref.ref(large))
        group.submit(id, large)

    seen = []
    with pytest.raises(ValueError, match="root"), TaskGroup(1) as group:
        started_sleeper(group)
        for _ in range(10):
            submits(group)
        raise ValueError("root")

    assert seen[-1]() is not None
    del group
    until(lambda: seen[-1]() is None)


def test_group_that_has_ended_keeps_nothing_of_where_it_was_entered():
    """
    Nor the task that entered it, nor its value.
    """

    class Value:
        pass

    def nests():
        with TaskGroup(1) as inner:
            kept.append(inner)
        return Value()

    kept = []
    with TaskGroup(1) as outer:
        value = weakref.ref(outer.submit(nests).result(timeout=60))
    del outer
    fastpool.shutdown()

    assert value() is None


def test_failures_are_there_at_any_moment():
    """
    Also for a callback that goes on while the group ends.
    """
    begun, seen = threading.Event(), []

    def looks():
        begun.set()
        until(lambda: group._run.over)
        seen.append(group.failures)

    with pytest.raises(ValueError, match="root"), TaskGroup(1) as group:
        group.token.on_cancel(looks)
        start(group.cancel)
        assert begun.wait(timeout=60)
        raise ValueError("root")

    assert seen == [group.failures]
    assert len(group.failures) == 1


@pytest.mark.parametrize("ends", ["with a value", "with a failure"])
@pytest.mark.parametrize("call", ["submit", "map"])
def test_idle_thread_keeps_nothing_of_its_last_task(ends, call):
    """
    Neither the function nor its argument, its value, its error or its context, nor the group.
    """
    variable = contextvars.ContextVar("variable")

    class Failure(Exception):
        pass

    def make(kind):
        made = kind()
        seen.append(weakref.ref(made))
        return made

    def use():
        def work(given):
            if ends == "with a failure":
                raise make(Failure)
            return make(Witness)

        variable.set(make(Witness))
        seen.append(weakref.ref(work))
        with contextlib.suppress(Failure), TaskGroup(1) as group:
            if call == "submit":
                group.submit(work, make(Witness))
            else:
                group.map(work, [make(Witness)])
            seen.append(weakref.ref(group.token))
            del group

    seen = []

    fastpool.shutdown()
    gc.collect()
    gc.disable()
    try:
        contextvars.Context().run(use)
        idle = [one for one in threading.enumerate() if one.name == "fastpool-idle"]
        if not GIL:
            fastpool.shutdown()  # what a thread made is freed there, when it wakes
        # The group may have ended before its thread has come to rest.
        until(lambda: not any(witness() for witness in seen), within=10)
        alive = [witness() for witness in seen if witness() is not None]
    finally:
        gc.enable()

    assert len(idle) == 1
    assert len(seen) == 5
    assert alive == []


@pytest.mark.parametrize("hook", [None, "trace", "profile"])
def test_many_short_tasks_in_one_group_leave_nothing(hook, request):
    """
    Ten thousand of them take no more room than a hundred, in a group that stays open; so it is
    under a debugger or a profiler.
    """
    called = itertools.count()

    def count(frame, event, argument):
        next(called)

    if hook is not None:
        fastpool.shutdown()  # those that run already began without it
        request.addfinalizer(fastpool.shutdown)
        set_hook = getattr(threading, f"set{hook}")
        request.addfinalizer(functools.partial(set_hook, getattr(threading, f"get{hook}")()))
        set_hook(count)

    def run(count):
        for number in range(count):
            group.submit(resize, number)
        group.wait()
        assert group.map(resize, range(count)).results() == list(range(count))

    with TaskGroup(2) as group:
        run(100)
        gc.collect()
        tracemalloc.start()
        try:
            run(100)
            before, _ = tracemalloc.get_traced_memory()
            run(10_000)

            def is_flat():
                run(1)  # without a GIL a thread frees what is its own when it wakes
                gc.collect()
                return tracemalloc.get_traced_memory()[0] - before < 100_000

            until(is_flat)
        finally:
            tracemalloc.stop()
    assert hook is None or next(called) > 10_000


def test_hundred_thousand_queued_tasks_are_cancelled():
    """
    Each of them, by one failure, and none of them starts.
    """
    release = threading.Event()
    ran = []

    def fails():
        release.wait(timeout=60)
        raise ValueError("root")

    with pytest.raises(ValueError, match="root"), TaskGroup(1) as group:
        group.submit(fails)
        tasks = [group.submit(ran.append, number) for number in range(100_000)]
        release.set()

    assert ran == []
    assert all(task.cancelled() for task in tasks)


@pytest.mark.parametrize("way", ["submit", "map"])
def test_failure_goes_through_no_queue(way):
    """
    From it to the end of the block there are as many steps with ten thousand queued as with ten.
    """

    def steps(count):
        lines = itertools.count()
        release = threading.Event()

        def trace(frame, event, argument):
            if not frame.f_globals.get("__name__", "").startswith("fastpool"):
                return None
            if event == "line":
                next(lines)
            return trace

        def fails():
            release.wait(timeout=60)
            raise ValueError("root")

        fastpool.shutdown()  # threads that run already would not be traced
        threading.settrace(trace)
        try:
            with pytest.raises(ValueError, match="root"), TaskGroup(1) as group:
                group.submit(fails)
                if way == "map":
                    tasks = group.map(abs, range(count)).tasks
                else:
                    tasks = [group.submit(abs, number) for number in range(count)]
                trace_this_thread(trace)
                release.set()
        finally:
            sys.settrace(None)
            threading.settrace(None)
        assert tasks[-1].cancelled()
        return next(lines)

    few = steps(10)

    assert few > 100
    assert abs(steps(10_000) - few) < 1000


def test_call_with_wrong_arguments_is_a_failure_of_its_task():
    """
    The function itself says so, in the worker, as it does in Python without us.
    """
    with pytest.raises(TypeError, match="positional argument") as raised, TaskGroup(1) as group:
        task = group.submit(resize, 1, 2, 3)
        task.wait(timeout=60)

    assert raised.value is task.exception()


@pytest.mark.parametrize(
    "what", ["unregister", "close", "wait", "child", "scope", "shield", "group"]
)
def test_what_was_taken_back_leaves_nothing_on_its_token(what):
    """
    Thousands of registrations, waits, children, scopes and groups come and go on one token.
    """
    token = CancelToken()

    def once():
        if what == "unregister":
            assert token.on_cancel(Witness).unregister()
        elif what == "close":
            with token.on_cancel(Witness):
                pass
        elif what == "wait":
            token.wait(1e-6)
        elif what == "child":
            token.child(timeout=3600).on_cancel(Witness)
        elif what == "scope":
            with timeout(3600):
                pass
        elif what == "shield":
            with shield():
                pass
        else:
            with TaskGroup(1):
                pass

    with fastpool.use_token(token):
        for _ in range(200 if what == "group" else 5000):
            once()

    assert len(token._entries) == 0


@pytest.mark.parametrize("call", ["submit", "map"])
def test_open_group_keeps_no_token_of_a_task_that_has_ended(call):
    """
    Not even with callbacks that the task has left on it, since nothing sets it any more.
    """
    tokens = []

    @fastpool.cancellable
    def leaves(token, _):
        token.on_cancel(Witness)
        tokens.append(weakref.ref(token))

    with TaskGroup(1) as group:
        if call == "submit":
            group.submit(leaves, 1)
        else:
            batch = group.map(leaves, [1, 2])
        group.wait()
        group.submit(abs, 1).result()  # the worker has let go of what it ran before
        gc.collect()  # a callback has the context of its registration, in which its token is
        alive = [token() for token in tokens]

        assert len(alive) == (1 if call == "submit" else len(batch))
        assert not any(alive)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("call", ["submit", "map"])
def test_context_that_outlives_its_task_has_the_token_as_it_was(call, cancelled):
    """
    Nothing sets it any more, whether somebody had asked for it before or not.
    """
    started, release = threading.Event(), threading.Event()

    def work(_):
        started.set()
        release.wait(60)
        return contextvars.copy_context()

    with TaskGroup(1) as group:
        if call == "submit":
            task = group.submit(work, 404)
        else:
            (task,) = group.map(work, [404]).tasks
        assert started.wait(60)
        if cancelled:
            assert task.cancel("rain")
        release.set()
        token = task.result(60).run(fastpool.current_token)
        again = token.cancel("snow")
        group.cancel("sun")

    assert not again
    assert token.reason == ("rain" if cancelled else None)


def test_task_that_is_told_again_to_stop_leaves_nothing_on_its_group():
    """
    It has one token, however often somebody asks for that.
    """
    release = threading.Event()

    with TaskGroup(1) as group:
        task = group.submit(release.wait, 60)
        until(task.running)
        told = task.cancel()
        before = len(group.token._entries)
        again = [task.cancel() for _ in range(100)]
        after = len(group.token._entries)
        release.set()

    assert told
    assert not any(again)
    assert after == before


def test_open_group_keeps_nothing_of_waits_that_are_over():
    """
    Neither of those that took too long, nor of one for a task that had ended before.
    """
    release = threading.Event()

    with TaskGroup(1) as group:
        ended = group.submit(abs, -404)
        ended.wait(60)
        task = group.submit(release.wait, 60)
        for _ in range(3):
            assert not task.wait(0.01)
            assert [one.result() for one in fastpool.as_completed([ended])] == [404]
        watchers = group._run.watchers.copy()
        release.set()

    assert not any(watchers.values())
    assert ended not in watchers


def test_values_and_arguments_are_handed_over_and_not_copied():
    """
    A gigabyte costs what a byte does.
    """
    given = bytearray(8)

    with TaskGroup(1) as group:
        task = group.submit(lambda argument: argument, given)
        batch = group.map(lambda argument: argument, [given])

    assert task.result() is given
    assert batch.results()[0] is given


def test_waiter_keeps_its_token(watched):
    """
    It wakes though nobody has a name for the token that it waits on, nor for that one's parent.
    """
    root = CancelToken()

    thread, outcome = start(lambda: root.child().child().wait(60))
    until(lambda: is_asleep(thread))
    gc.collect()
    root.cancel()
    thread.join(timeout=60)

    assert outcome == [True]


# --- Threads and the operating system -------------------------------------------------------------


def test_thread_keeps_what_a_task_leaves_in_a_thread_local():
    """
    Threads are used again, as in any pool; a context variable is each task's own.
    """
    local = threading.local()
    variable = contextvars.ContextVar("variable", default=None)

    def leave():
        seen = getattr(local, "left", None), variable.get()
        local.left = "something"
        variable.set("something")
        return seen

    with TaskGroup(1) as group:
        seen = group.starmap(leave, [(), ()]).results()

    assert seen == [(None, None), ("something", None)]


@pytest.mark.parametrize("hook", ["trace", "profile"])
def test_hooks_of_threading_see_tasks(hook):
    """
    Debuggers, profilers and coverage are told of what runs in our threads.
    """
    seen = []

    def watch(frame, event, argument):
        if event == "call":
            seen.append(frame.f_code.co_name)

    fastpool.shutdown()  # those that run already began without it
    before = getattr(threading, f"get{hook}")()
    getattr(threading, f"set{hook}")(watch)
    try:
        with TaskGroup(1) as group:
            group.submit(resize, 404)
        fastpool.shutdown()
    finally:
        getattr(threading, f"set{hook}")(before)

    assert seen.count("resize") == 1


@pytest.mark.parametrize("end", ["return", "raise ValueError", "sys.exit(3)"])
def test_child_that_a_task_forks_ends_with_the_task(end):
    """
    It runs nothing that is the parent's: no queued task, no end of the block, no exit.
    """
    said = run_script(
        f"""
import atexit, os, signal, sys, warnings
from fastpool import TaskGroup

warnings.simplefilter("ignore", DeprecationWarning)  # that other threads run is the point

def forks():
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        {end}
    return os.waitpid(child, 0)[1]

atexit.register(os.write, 1, b"exit")
with TaskGroup(1) as group:
    task = group.submit(forks)
    group.submit(os.write, 1, b"queued ")
os.write(1, b"left ")
assert task.result() == 0, task.result()
"""
    )

    assert said == "queued left exit"


def test_child_of_multiprocessing_forks_from_a_task():
    """
    It does its work, and nothing of the parent's.
    """
    said = run_script(
        """
import multiprocessing, os, warnings
from fastpool import TaskGroup

warnings.simplefilter("ignore", DeprecationWarning)
fork = multiprocessing.get_context("fork")

def child():
    os.write(1, b"child ")

def forks():
    process = fork.Process(target=child)
    process.start()
    process.join()
    return process.exitcode

with TaskGroup(1) as group:
    task = group.submit(forks)
    group.submit(os.write, 1, b"queued ")
os.write(1, b"left")
assert task.result() == 0
"""
    )

    assert said == "child queued left"


def test_group_is_used_while_a_module_is_imported(tmp_path):
    """
    Its tasks may import others meanwhile.
    """
    (tmp_path / "other.py").write_text("import decimal\nvalue = 404\n")
    (tmp_path / "importing.py").write_text(
        "import importlib\n"
        "from fastpool import TaskGroup\n"
        "with TaskGroup(4) as group:\n"
        "    names = ['other', 'colorsys', 'fastpool.blocking', 'other']\n"
        "    modules = group.map(importlib.import_module, names).results()\n"
    )

    said = run_script("import importing\nprint(importing.modules[0].value)", cwd=tmp_path)

    assert said == "404\n"


def test_group_has_a_thousand_workers():
    """
    All of them at work at once.
    """
    together = threading.Barrier(1000)

    with TaskGroup(1000) as group:
        batch = group.starmap(together.wait, [(60,)] * 1000)

    assert sorted(batch.results()) == list(range(1000))


@pytest.mark.parametrize("now", [0.0, 4e9])
def test_clock_on_the_wall_has_no_say(monkeypatch, now):
    """
    Deadlines pass, and do not pass, by the monotonic clock.
    """
    far = CancelToken(timeout=3600)
    monkeypatch.setattr(time, "time", lambda: now)
    near = CancelToken(timeout=0.02)

    assert near.wait(60)
    assert not far.cancelled()


def test_clock_that_stands_still_keeps_nobody_busy(monkeypatch):
    """
    Who waits for a deadline looks again after that time, and not all the time.
    """
    looks = itertools.count()
    monotonic = time.monotonic
    stopped = monotonic()

    def frozen():
        next(looks)
        return stopped

    fastpool.shutdown()
    token = CancelToken()
    monkeypatch.setattr(time, "monotonic", frozen)
    other = CancelToken(timeout=0.02)
    thread, outcome = start(token.wait, 0.02)
    began = monotonic()
    threading.Event().wait(0.3)
    seen, spent = next(looks), monotonic() - began
    set_early = other.cancelled()
    token.cancel()
    thread.join(timeout=60)
    monkeypatch.undo()

    assert outcome == [True]
    assert not set_early
    assert seen < 20 + 10 * spent / 0.02
    assert other.wait(60)


# --- The life of a group --------------------------------------------------------------------------


def test_group_that_is_not_open_cannot_be_left():
    """
    Neither before it was entered nor a second time; it is as it was.
    """
    group = TaskGroup(1, name="thumbnails")
    with pytest.raises(RuntimeError, match=r"'thumbnails'.*not open"):
        group.__exit__(None, None, None)
    with group:
        task = group.submit(resize, 404)
    with pytest.raises(RuntimeError, match=r"'thumbnails'.*not open"):
        group.__exit__(None, None, None)

    assert task.result() == 404


def test_group_is_left_by_another_thread_than_entered_it():
    """
    It waits there, and raises there.
    """
    root = ValueError("root")
    group = TaskGroup(1)
    contextvars.copy_context().run(group.__enter__)
    task = group.submit(fail, root)

    left = in_thread(group.__exit__, None, None, None)

    assert left is root
    assert task.exception() is root


def test_deadline_that_passes_as_the_block_is_left_leaves_whole_or_not_at_all():
    """
    At whatever line of the end it comes: `TimeoutError` and a set token, or neither.
    """

    def race(step):
        reached, left = [], None

        def expire():
            reached.append(step)
            if group.token._due() is not None:  # as the clock looks before it does
                group.token._expire()

        try:
            with TaskGroup(1, timeout=3600) as group:
                batch = group.map(resize, range(3))
                batch.wait(timeout=60)
                sys.settrace(act_at(step, expire))
        except TimeoutError as error:
            left = error
        finally:
            sys.settrace(None)
        return reached, left, group, batch

    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert len(races) > 30
    assert {left is not None for _, left, _, _ in races} == {True, False}
    for _, left, group, batch in races:
        assert group.token.cancelled() is (left is not None)
        assert group.failures == ()
        assert batch.results() == [0, 1, 2]


@pytest.mark.parametrize("who", ["group", "token around it"])
def test_cancel_that_meets_the_end_of_the_block_is_there_when_it_is_left(who):
    """
    The canceller has won, and is held up before it has said so: the state goes back or forth for
    nobody who looks after the block.
    """
    outer = CancelToken()
    reached, go_on = threading.Event(), threading.Event()
    seen = []

    def hold_up(frame, event, argument):
        if group.token._cause is not None and not group.token.cancelled():
            sys.settrace(None)
            reached.set()
            go_on.wait(timeout=60)
            return None
        return hold_up

    def cancels():
        sys.settrace(hold_up)
        try:
            return (group if who == "group" else outer).cancel("enough")
        finally:
            sys.settrace(None)

    with contextlib.suppress(Cancelled), TaskGroup(1, token=outer) as group:
        canceller, told = start(cancels)
        reached.wait(timeout=60)
    seen.append((group.token.cancelled(), group.token.reason))
    go_on.set()
    canceller.join(timeout=60)
    seen.append((group.token.cancelled(), group.token.reason))

    assert reached.is_set()
    assert told == [True]
    assert seen == [(True, "enough")] * 2


# --- Tokens, callbacks, waits ---------------------------------------------------------------------


def test_callback_that_blocks_holds_up_its_canceller_alone():
    """
    The state is set, sleepers are awake, and a second cancel returns, while it blocks.
    """
    token = CancelToken()
    entered, release = threading.Event(), threading.Event()
    token.on_cancel(lambda: (entered.set(), release.wait(timeout=60)))
    sleeping, heard = start(token.child().wait, 60)

    canceller, told = start(token.cancel, "first")
    entered.wait(timeout=60)
    sleeping.join(timeout=60)
    seen = (token.cancelled(), token.cancel("second"), list(heard), canceller.is_alive())
    release.set()
    canceller.join(timeout=60)

    assert seen == (True, False, [True], True)
    assert told == [True]
    assert token.reason == "first"


@pytest.mark.parametrize("how", ["unregister", "close"])
def test_callback_takes_back_itself_and_others_and_registers_a_new_one(how):
    """
    Itself it cannot any more, the next one it can, and the new one runs at once.
    """
    token = CancelToken()
    seen = []
    later = token.on_cancel(lambda: seen.append("later"))

    def meddles():
        seen.append(getattr(mine, how)())
        seen.append(getattr(later, how)())
        token.on_cancel(lambda: seen.append("new"))
        seen.append("over")

    mine = token.on_cancel(meddles)
    token.cancel()

    assert seen == [*([False, True] if how == "unregister" else [None, None]), "new", "over"]


class Unhashable:
    """A callable that compares by value."""

    def __init__(self, seen):
        self.seen = seen

    def __eq__(self, other):
        return True

    __hash__ = None

    def __call__(self):
        self.seen.append("called")

    def method(self):
        self.seen.append("called")


@pytest.mark.parametrize("kind", ["function", "unhashable", "method", "partial"])
def test_same_callable_may_be_registered_twice(kind):
    """
    Each registration is one of its own, and holds what it calls.
    """
    token = CancelToken()
    seen = []
    callback = {
        "function": lambda: seen.append("called"),
        "unhashable": Unhashable(seen),
        "method": Unhashable(seen).method,
        "partial": functools.partial(seen.append, "called"),
    }[kind]
    registrations = [token.on_cancel(callback) for _ in range(3)]
    del callback

    taken_back = registrations[1].unregister()
    token.cancel()

    assert taken_back
    assert seen == ["called"] * 2


class EarlyLock:
    """A lock that says now and then that the time is up when it is not."""

    def __init__(self, early):
        self.lock, self.early = threading.Lock(), early

    def acquire(self, blocking=True, timeout=-1):
        if blocking and timeout > 0 and next(self.early) % 3:
            return self.lock.acquire(True, min(timeout, 0.001))
        return self.lock.acquire(blocking, timeout)

    def release(self):
        self.lock.release()


@pytest.mark.parametrize("is_set", [False, True])
def test_wait_that_is_woken_early_goes_on(monkeypatch, is_set):
    """
    It answers what the token is, and not before it is set or the time is up.
    """
    early = itertools.count(1)
    lying = types.SimpleNamespace(**vars(threading))
    lying.Lock = lambda: EarlyLock(early)
    monkeypatch.setattr(fastpool._gate, "threading", lying)
    token = CancelToken()

    began = time.monotonic()
    thread, answer = start(token.wait, 60 if is_set else 0.05)
    if is_set:
        until(lambda: next(early) > 5)
        token.cancel()
    thread.join(timeout=60)
    spent = time.monotonic() - began

    assert answer == [is_set]
    assert is_set or spent >= 0.05
    assert next(early) > 3
