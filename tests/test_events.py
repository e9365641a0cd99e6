"""
What observers are told: everything, once, in order, and at a cost to nobody.
"""

import contextlib
import contextvars
import gc
import signal
import sys
import threading
import warnings
import weakref
from collections import Counter

import pytest
from staging import fail, in_thread, is_asleep, sleeper, start, started_sleeper, until

import fastpool
from fastpool import (
    CancelToken,
    GroupClosedError,
    TaskGroup,
    current_token,
)
from fastpool._ledger import Ledger
from fastpool._run import Run

ENDS = {"task_succeeded", "task_failed", "task_cancelled"}

request = contextvars.ContextVar("request", default=None)


def names(seen, task=None):
    """The names of the events of a task, or of the group, in their order."""
    return [event.name for event in seen if event.task is task]


# --- Exactly once --------------------------------------------------------------------------------


def succeed(group):
    group.map(pow, range(500), [2] * 500)
    for number in range(500):
        group.submit(pow, number, 2)


def fail_in_a_task(group):
    group.map(sleeper.__wrapped__, [group.token] * 3)
    group.submit(fail, ValueError("root"))
    with contextlib.suppress(GroupClosedError, fastpool.Cancelled):
        group.map(pow, range(500), [2] * 500)


def fail_at_once(group):
    group.map(fail, [ValueError("root") for _ in range(100)])


def fail_in_the_body(group):
    started_sleeper(group)
    group.map(sleeper.__wrapped__, [group.token] * 500)
    raise ValueError("root")


def fail_in_an_input(group):
    started_sleeper(group)
    group.map(fail, (fail(ValueError("root")) for _ in range(10)))


def cancel_the_group(group):
    group.map(sleeper.__wrapped__, [group.token] * 500)
    group.cancel()


def cancel_from_a_task(group):
    group.map(sleeper.__wrapped__, [group.token] * 3)
    group.submit(group.cancel)
    with contextlib.suppress(GroupClosedError, fastpool.Cancelled):
        group.map(pow, range(500), [2] * 500)


def cancel_tasks_as_they_run(group):
    batch = group.map(pow, range(500), [2] * 500)
    thread, _ = start(batch.cancel)
    for task in batch.tasks[::-1]:
        task.cancel()
    thread.join(timeout=60)


def cancel_tasks_as_the_block_is_left(group):
    for _ in range(3):
        started_sleeper(group)
    batch = group.map(pow, range(500), [2] * 500)
    for _ in range(2):
        start(lambda: [task.cancel() for task in batch.tasks])
    group.cancel()


def look_at_tasks_as_the_block_is_left(group):
    for _ in range(3):
        started_sleeper(group)
    batch = group.map(pow, range(500), [2] * 500)
    for _ in range(2):
        start(lambda: [task.done() for task in batch.tasks])
    group.cancel()


def submit_as_the_block_is_left(group):
    def produce():
        with contextlib.suppress(GroupClosedError):
            while True:
                group.submit(pow, 2, 3).wait()

    for _ in range(2):
        start(produce)


def help_each_other(group):
    def parent(depth):
        if depth:
            group.submit(parent, depth - 1).result()

    for _ in range(20):
        group.submit(parent, 5)


def time_out(group):
    group.with_options(timeout=0.001).submit(sleeper)


def nest(group):
    def inside():
        seen = []
        with TaskGroup(1, observers=[seen.append]) as inner:
            inner.submit(pow, 2, 3)
            inner.submit(sleeper)
        return seen

    def fails():
        until(lambda: all(task.running() for task in nested))
        raise ValueError("root")

    nested = [group.submit(inside) for _ in range(2)]
    group.submit(fails)


SCENARIOS = [
    succeed,
    fail_in_a_task,
    fail_at_once,
    fail_in_the_body,
    fail_in_an_input,
    cancel_the_group,
    cancel_from_a_task,
    cancel_tasks_as_they_run,
    cancel_tasks_as_the_block_is_left,
    look_at_tasks_as_the_block_is_left,
    submit_as_the_block_is_left,
    help_each_other,
    time_out,
    nest,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_everything_is_told_once(scenario, workers, hasty):
    """
    A task is submitted, then cancelled without a start, or started and ended; the group is
    opened first and closed last.
    """
    arguments = workers(4)
    for _ in range(5):
        seen = []
        with (
            contextlib.suppress(ValueError, TimeoutError),
            TaskGroup(observers=[seen.append], **arguments) as group,
        ):
            scenario(group)
        told = seen.copy()
        lives = {}
        for event in told:
            lives.setdefault(event.task, []).append(event)
        of_group = [event.name for event in lives.pop(None)]
        closed = of_group[-1:]

        assert Counter(of_group) == Counter(
            ["group_opened", "group_closed"] + ["group_cancelled"] * group.token.cancelled()
        )
        assert told[0].name == "group_opened"
        assert (told[-1].name, closed) == ("group_closed", ["group_closed"])
        for task, life in lives.items():
            steps = [event.name for event in life]
            assert steps[0] == "task_submitted"
            assert steps[1:] == ["task_cancelled"] or (
                steps[1] == "task_started" and steps[2] in ENDS and len(steps) == 3
            )
            assert task.done()
            assert task.cancelled() == (steps[-1] == "task_cancelled")
            for event in life[:-1]:
                assert event.duration is event.error is None
            assert (life[-1].duration is None) == (len(steps) == 2)
            assert (life[-1].error is None) == (len(steps) == 2 or steps[2] == "task_succeeded")
        assert len(seen) == len(told), "told after the end"


def test_events_of_a_shared_observer_tell_their_group():
    """
    One observer may watch groups in one another; each event bears its own.
    """
    seen = []

    def inside():
        with TaskGroup(1, observers=[seen.append]) as inner:
            inner.submit(pow, 2, 3)
        return inner

    with TaskGroup(1, observers=[seen.append]) as group:
        inner = group.submit(inside).result()

    assert [event.name for event in seen if event.group is inner] == [
        "group_opened",
        "task_submitted",
        "task_started",
        "task_succeeded",
        "group_closed",
    ]
    assert len([event for event in seen if event.group is group]) == 5


def test_ends_tell_their_duration_and_error():
    """
    The very exception; nothing of the kind before the end.
    """
    seen = []
    root = ValueError("root")

    with pytest.raises(ValueError, match="root"), TaskGroup(1, observers=[seen.append]) as group:
        group.submit(fail, root)

    told = {event.name: event for event in seen}
    assert told["task_failed"].error is root
    assert told["group_closed"].error is root
    assert 0 <= told["task_failed"].duration <= told["group_closed"].duration
    for name in ("group_opened", "task_submitted", "task_started", "group_cancelled"):
        assert told[name].duration is told[name].error is None


def test_event_is_frozen():
    """
    One observer cannot change what the next one sees.
    """
    seen = []
    with TaskGroup(observers=[seen.append]):
        pass

    with pytest.raises(AttributeError):
        seen[0].name = "changed"


def test_task_of_a_worker_that_breaks_is_told_to_have_failed(monkeypatch):
    """
    Out of memory in the books: it had started, and has one end.
    """
    broken = MemoryError("no room for the books")
    once = [broken]
    ended = Ledger.ended

    def breaks(run, *args):
        if once:
            raise once.pop()
        return ended(run, *args)

    monkeypatch.setattr(Ledger, "ended", breaks)
    seen = []
    with pytest.raises(MemoryError), TaskGroup(1, observers=[seen.append]) as group:
        task = group.submit(pow, 2, 3)

    assert names(seen, task) == ["task_submitted", "task_started", "task_failed"]


# --- Order, and who tells ------------------------------------------------------------------------


def test_nothing_is_submitted_before_the_group_is_told_to_be_open():
    """
    Another thread is refused until every observer has heard of it.
    """

    def early(event):
        if event.name == "group_opened":
            refused.append(in_thread(event.group.submit, pow, 2, 3))

    refused = []
    with TaskGroup(observers=[early]) as group:
        assert group.submit(pow, 2, 3).result() == 8

    assert [type(error) for error in refused] == [GroupClosedError]


def test_failure_is_told_before_the_cancel_that_it_brings(hasty):
    """
    Woken siblings and the helper thread leave it to the worker that failed.
    """
    for _ in range(200):
        seen = []

        with (
            pytest.raises(ValueError, match="root"),
            TaskGroup(4, observers=[seen.append]) as group,
        ):
            for _ in range(3):
                started_sleeper(group)
            group.submit(fail, ValueError("root"))

        order = [event.name for event in seen]
        assert order.index("task_failed") < order.index("group_cancelled")


@pytest.mark.parametrize("how", ["cancel", "timeout", "token", "elsewhere"])
def test_cancel_is_told_while_the_body_goes_on(how):
    """
    A helper thread tells, so nobody has to come by first.
    """
    told = threading.Event()
    threads = []

    def listen(event):
        if event.name == "group_cancelled":
            threads.append(threading.current_thread())
            told.set()

    token = CancelToken()
    timeout = 0.001 if how == "timeout" else None
    with (
        contextlib.suppress(TimeoutError, fastpool.Cancelled),
        TaskGroup(1, timeout=timeout, token=token, observers=[listen]) as group,
    ):
        if how == "cancel":
            group.cancel()
        elif how == "token":
            token.cancel()
        elif how == "elsewhere":
            in_thread(group.cancel)
        heard = told.wait(timeout=60)

    assert heard
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_cancel_is_never_told_in_the_frame_of_a_signal_handler():
    """
    The handler may have interrupted an observer that holds a lock.
    """
    told = threading.Event()
    stacks = []

    def listen(event):
        frame = sys._getframe()
        while frame is not None:
            stacks.append((event.name, frame.f_code.co_name))
            frame = frame.f_back
        if event.name == "group_cancelled":
            told.set()

    def handler(number, frame):
        assert group.cancel("by a signal")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with TaskGroup(1, observers=[listen]) as group:
            signal.raise_signal(signal.SIGUSR1)
            heard = told.wait(timeout=60)
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert heard
    assert ("group_cancelled", "handler") not in stacks


def test_group_that_is_entered_cancelled_says_so():
    """
    It is opened first all the same.
    """
    seen = []
    token = CancelToken()
    token.cancel("enough")

    with (
        pytest.raises(fastpool.Cancelled),
        TaskGroup(token=token, observers=[seen.append]),
    ):
        pass

    assert [event.name for event in seen] == ["group_opened", "group_cancelled", "group_closed"]


def test_cancel_of_an_abandoned_group_is_told_though_no_helper_has_come_to_it(monkeypatch):
    """
    The thread that leaves does it then, and once.
    """
    seen, late, release = [], [], threading.Event()
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(TimeoutError),
        TaskGroup(1, timeout=600, grace=0.01, on_stuck="abandon", observers=[seen.append]) as group,
    ):
        until(group.submit(release.wait, 60).running)
        monkeypatch.setattr("fastpool._clock.run_in_helper", late.append)
        group.token._expire()
    monkeypatch.undo()
    for job in late:
        job()
    release.set()

    assert late
    assert names(seen) == ["group_opened", "group_cancelled", "group_closed"]


@pytest.mark.parametrize("first", ["task_cancelled", "group_cancelled"])
def test_leaving_waits_for_observers_in_other_threads(first, watched):
    """
    The group is closed only when nobody is told anything of it any more.
    """
    order = []
    listening = threading.Event()

    def listen(event):
        if event.name == first:
            listening.set()
            until(lambda: is_asleep(threading.main_thread()), within=2)
        order.append(event.name)

    release = threading.Event()
    with TaskGroup(1, observers=[listen]) as group:
        group.submit(release.wait, 60)
        queued = group.submit(pow, 2, 3)
        thread, _ = start(queued.cancel if first == "task_cancelled" else group.cancel)
        listening.wait(timeout=60)
        release.set()
    thread.join(timeout=60)

    assert order[-1] == "group_closed"
    assert order.count(first) == 1 + (first == "task_cancelled" and group.token.cancelled())


def test_cancelled_task_is_told_at_once():
    """
    By the thread that cancels it, while every worker is busy.
    """
    seen = []
    release = threading.Event()
    with TaskGroup(1, observers=[seen.append]) as group:
        group.submit(release.wait, 60)
        queued = group.submit(pow, 2, 3)
        queued.cancel()
        told = names(seen, queued)
        release.set()

    assert told == ["task_submitted", "task_cancelled"]
    assert seen[-1].worker == threading.current_thread().name


def test_cancel_that_comes_as_the_group_has_closed_is_told_by_who_leaves(monkeypatch):
    """
    Or the other thread could come to it only after the group was told to be closed.
    """
    seen = []
    end = Run.end

    def end_late(run):
        in_thread(queued.cancel)
        return end(run)

    monkeypatch.setattr(Run, "end", end_late)
    with TaskGroup(1, observers=[seen.append]) as group:
        started_sleeper(group)
        for _ in range(5):  # a worker still takes one
            queued = group.submit(pow, 2, 3)
        group.cancel()

    told = [event for event in seen if event.task is queued]
    assert [event.name for event in told] == ["task_submitted", "task_cancelled"]
    assert told[-1].worker == threading.current_thread().name


def test_who_told_of_a_cancel_is_gone_after_a_shutdown(thorough_shutdown):
    """
    Also if its thread was not quite done when the block was left.
    """
    fastpool.shutdown()
    before = set(threading.enumerate())
    for _ in range(100):
        with TaskGroup(1, observers=[lambda event: None]) as group:
            group.cancel()
        fastpool.shutdown()

        assert set(threading.enumerate()) <= before


# --- Where they are called -----------------------------------------------------------------------


def test_observer_finds_the_context_of_the_submit():
    """
    And for the group that of its block, in whatever thread it is told.
    """
    seen = []

    def note(event):
        seen.append((event.name, None if event.task is None else event.task.name, request.get()))

    request.set("entry")
    release = threading.Event()
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="root"),
        TaskGroup(2, grace=0.0, observers=[note]) as group,
    ):
        warnings.simplefilter("ignore")
        request.set("good")
        group.submit(pow, 2, 3).wait()
        request.set("mapped")
        group.with_options(name="mapped").map(pow, [2], [3]).wait()
        request.set("stuck")
        stuck = group.with_options(name="stuck").submit(stubborn, seen, release)
        request.set("cancelled")
        cancelled = group.with_options(name="cancelled").submit(sleeper)
        request.set("never")
        group.with_options(name="never").submit(pow, 2, 3).cancel()
        until(lambda: stuck.running() and cancelled.running())
        request.set("left")
        group.with_options(name="left").submit(pow, 2, 3)
        request.set("bad")
        in_thread(contextvars.copy_context().run, group.cancel)
        raise ValueError("root")
    request.set(None)

    by_task = {(name, found) for what, name, found in seen if what.startswith("task_")}
    assert by_task == {
        ("pow", "good"),
        ("mapped[0]", "mapped"),
        ("stuck", "stuck"),
        ("cancelled", "cancelled"),
        ("never", "never"),
        ("left", "left"),
    }
    assert ("task_stuck", "stuck", "stuck") in seen
    assert ("group_opened", None, "entry") in seen
    assert ("group_cancelled", None, "entry") in seen
    assert ("group_closed", None, "bad") in seen


def stubborn(seen, release):
    request.set("of the task's own")
    until(lambda: ("task_stuck", "stuck", "stuck") in seen, within=30)


def test_what_an_observer_sets_reaches_nobody():
    """
    Neither the task, nor the caller, nor the next event.
    """
    found = []

    def meddle(event):
        found.append(request.get())
        request.set(event.name)

    with TaskGroup(1, observers=[meddle]) as group:
        inside = [group.submit(request.get).result(), *group.map(_get, range(3)).results()]

    assert inside == [None] * 4
    assert request.get() is None
    assert set(found) == {None}


def _get(_):
    return request.get()


def test_observer_is_not_cancelled_with_the_group():
    """
    It finds no current token, and may use this library to tell others.
    """
    tokens = []

    with (
        pytest.raises(ValueError, match="root"),
        TaskGroup(1, observers=[lambda event: tokens.append(current_token())]) as group,
    ):
        group.submit(fail, ValueError("root"))
        group.map(pow, range(10), [2] * 10)

    assert set(tokens) == {CancelToken.NEVER}


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_broken_observer_changes_nothing(kind, unraised):
    """
    Each of its errors goes to the hook, and the next observer is told.
    """
    seen = []

    def broken(event):
        raise kind(event.name)

    with TaskGroup(1, observers=[broken, seen.append]) as group:
        value = group.submit(pow, 2, 3).result()

    assert value == 8
    assert [error.args[0] for error in unraised] == [event.name for event in seen]
    assert len(seen) == 5


class Witness:
    """Lives in a context."""


@pytest.mark.parametrize("cancels", [True, False])
def test_context_dies_with_the_group(cancels):
    """
    A worker that waits for its next group keeps nothing of what the last one observed.
    """

    def run():
        with TaskGroup(2, observers=[lambda event: None]) as group:
            group.map(pow, range(10), [2] * 10)
            group.submit(pow, 2, 3).cancel()
            if cancels:
                started_sleeper(group)
                group.cancel()

    def run_with_a_witness():
        witness = Witness()
        request.set(witness)
        run()
        request.set(None)
        return weakref.ref(witness)

    gc.disable()
    try:
        witness = contextvars.Context().run(run_with_a_witness)

        def is_gone():
            # Without a GIL a thread frees what is its own when it wakes: give them something.
            fastpool.map(pow, range(10), [2] * 10, max_workers=2)
            return witness() is None

        until(is_gone)
    finally:
        gc.enable()
