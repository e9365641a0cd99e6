"""
`max_queued`: no more calls wait than that, who has one more waits itself, and nobody for ever.
"""

import contextvars
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest
from blocked import ended
from interrupted import in_child
from staging import fail, in_thread, is_asleep, sleeper, sleeping, start, started_sleeper, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    GroupClosedError,
    TaskGroup,
    _run,
    current_token,
    shield,
    use_token,
)
from fastpool._bounded import BoundedQueue
from fastpool._gate import Gate
from fastpool._run import Run
from fastpool.backends.threads import Leased


class Held:
    """A task that occupies a worker until it is let go."""

    def __init__(self, group):
        self.started, self.release = threading.Event(), threading.Event()
        self.task = group.submit(self.run)
        assert self.started.wait(timeout=30)

    def run(self):
        self.started.set()
        assert self.release.wait(timeout=30)


def waiting(group):
    """How many calls wait in a group."""
    return {seen.name: seen.queued for seen in fastpool.dump()}[group.name]


def blocked(fn, *args):
    """A new thread that has called something and sleeps in it."""
    thread, outcome = start(fn, *args)
    until(lambda: outcome or is_asleep(thread))
    assert not outcome, outcome
    return thread, outcome


# --- The cap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 10, 100])
@pytest.mark.parametrize("observed", [False, True])
def test_never_more_wait_than_the_cap(workers, cap, observed):
    """
    Ten times as many are submitted by several threads at once, and all of them run.
    """
    seen, ran = [], []

    def task(number):
        seen.append(waiting(group))
        ran.append(number)

    def feed(first):
        for number in range(first, 10 * cap, 4):
            group.submit(task, number)
            seen.append(waiting(group))

    observers = [lambda event: None] if observed else ()
    with TaskGroup(**workers(2), max_queued=cap, observers=observers) as group:
        feeders = [start(feed, first) for first in range(4)]
        for thread, outcome in feeders:
            assert ended(thread, outcome) is None

    assert sorted(ran) == list(range(10 * cap))
    assert max(seen) <= cap


@pytest.mark.parametrize("cap", [1, 10, 100])
def test_cap_is_reached_and_not_exceeded_while_no_worker_is_free(workers, cap, watched):
    """
    So many submits return, and one more in each thread blocks, until one call is taken.
    """
    counts = [[] for _ in range(3)]

    def feed(returned):
        while len(returned) < 10 * cap:
            group.submit(abs, -1)
            returned.append(None)

    with TaskGroup(**workers(1), max_queued=cap) as group:
        held = Held(group)
        feeders = [start(feed, returned) for returned in counts]
        until(lambda: all(is_asleep(thread) for thread, _ in feeders))
        returned, waited = sum(map(len, counts)), waiting(group)
        held.release.set()
        for thread, outcome in feeders:
            assert ended(thread, outcome) is None

    assert (returned, waited) == (cap, cap)
    assert sum(map(len, counts)) == 30 * cap


@pytest.mark.parametrize("submits", ["submit", "with_options", "map", "starmap", "imap"])
def test_submit_blocks_while_the_queue_is_full_and_goes_on_when_one_is_taken(
    workers, watched, submits
):
    """
    However the call is handed over.
    """

    def hand_over():
        if submits == "submit":
            return group.submit(abs, -3).result()
        if submits == "with_options":
            return group.with_options(name="late", timeout=60).submit(abs, x).result()
        if submits == "imap":
            return next(group.imap(abs, [x]))
        batch = group.map(abs, [x]) if submits == "map" else group.starmap(abs, [(x,)])
        return batch.results()[0]

    x = -3
    with TaskGroup(**workers(1), max_queued=2) as group:
        held = Held(group)
        group.map(abs, range(2))
        late = blocked(hand_over)
        held.release.set()
        value = ended(*late)

    assert value == 3


@pytest.mark.parametrize("items", [range(3), [1, 2, 3], "abc", {1: 2, 3: 4, 5: 6}])
@pytest.mark.parametrize("mapped", ["map", "two iterables", "starmap"])
def test_map_of_as_many_as_there_is_room_for_does_not_block(items, mapped):
    """
    It does not wait for room that nothing needs.
    """

    def hand_over():
        if mapped == "map":
            return group.map(repr, items)
        if mapped == "starmap":
            return group.starmap(repr, [(item,) for item in items])
        return group.map(lambda one, other: (one, other), range(9), items)

    with TaskGroup(1, max_queued=3) as group:
        held = Held(group)
        batch = in_thread(hand_over)
        held.release.set()

    assert len(batch.results()) == 3


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "x", float("nan")])
def test_value_that_is_no_number_of_calls_is_refused(value):
    """
    The message names it, and shows what was given.
    """
    kind = ValueError if type(value) is int else TypeError

    with pytest.raises(kind, match=f"max_queued must be .*{value!r}"):
        TaskGroup(max_queued=value)
    with pytest.raises(kind, match=f"max_queued must be .*{value!r}"):
        fastpool.map(abs, [1], max_queued=value)


def test_map_in_one_line_takes_a_cap():
    """
    Its input is read as there is room, and all values come in order.
    """
    ahead, started = [], []

    def items():
        for number in range(50):
            ahead.append(number - len(started))
            yield number

    def task(number):
        started.append(number)
        return number

    assert fastpool.map(task, items(), max_workers=1, max_queued=2) == list(range(50))
    assert max(ahead) <= 3  # one may be in the worker's hand, not begun


# --- What ends the wait ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "failure", "input"])
def test_blocked_submit_wakes_when_the_group_is_cancelled(workers, watched, how):
    """
    In a thread whose own token is not set it is told that the group is closed, and why.
    """
    root = ValueError("root")

    def items():
        raise root
        yield

    def fails():
        go.wait(timeout=30)
        if how != "cancel":
            raise root

    go = threading.Event()
    caught = []
    try:
        with TaskGroup(**workers(2), max_queued=1) as group:
            started_sleeper(group)
            task = group.submit(fails)
            until(task.running)
            group.submit(abs, 1)
            late = blocked(group.submit, abs, 1)
            if how == "cancel":
                group.cancel(root)
            elif how == "failure":
                go.set()
            else:
                with shield(), pytest.raises(ValueError, match="root"):
                    # The queue is full, so it comes from a task, which never waits.
                    run_as_a_task_of(task, lambda: group.map(abs, items()))
            refused = ended(*late)
            go.set()
    except ValueError as error:
        caught.append(error)

    assert type(refused) is GroupClosedError
    assert refused.reason is root
    assert caught == ([] if how == "cancel" else [root])


def run_as_a_task_of(task, fn):
    """Call something where a task is, in its context."""
    contextvars.copy_context().run(lambda: (fastpool._scope.current.set(task), fn()))


def test_blocked_submit_in_the_body_raises_cancelled(watched):
    """
    The group's token is its own there, so a loop that submits stops.
    """
    main = threading.main_thread()

    def cancels():
        until(lambda: main.ident in sleeping)
        group.cancel("enough")

    seen = []
    with TaskGroup(1, max_queued=1) as group:
        started_sleeper(group)
        canceller, outcome = start(cancels)
        try:
            for _ in range(9):
                group.submit(abs, 1)
        except Cancelled as error:
            seen.append(error.reason)
            raise
    ended(canceller, outcome)

    assert seen == ["enough"]


@pytest.mark.parametrize("where", ["thread", "worker"])
def test_blocked_submit_wakes_when_the_callers_own_token_is_set(workers, watched, where):
    """
    In a thread, or in a task of another group; the group goes on.
    """
    token = CancelToken()

    def submits():
        with use_token(token):
            group.submit(abs, 1)

    def submits_as_a_task():
        with TaskGroup(1) as other:
            submitter = other.submit(submits)
        submitter.result()

    with TaskGroup(**workers(1), max_queued=1) as group:
        held = Held(group)
        group.submit(abs, 1)
        thread, outcome = start(submits if where == "thread" else submits_as_a_task)
        until(lambda: group._run.bounded.waiting)
        token.cancel("not that long")
        stopped = ended(thread, outcome)
        held.release.set()
        later = group.submit(abs, -2)

    assert type(stopped) is Cancelled
    assert stopped.reason == "not that long"
    assert later.result() == 2
    assert group.failures == ()


@pytest.mark.parametrize("whose", ["scope", "group"])
def test_blocked_submit_wakes_at_a_deadline(workers, whose):
    """
    A scope's is a `TimeoutError`; by the group's own, the group is closed.
    """

    def submits():
        with fastpool.timeout(0.01 if whose == "scope" else 60):
            while True:
                group.submit(sleeper)

    ends = []
    try:
        with TaskGroup(
            **workers(1), max_queued=1, timeout=0.01 if whose == "group" else None
        ) as group:
            ends.append(in_thread(submits))
            group.cancel()
    except TimeoutError as error:
        ends.append(error)

    if whose == "scope":
        assert [type(end) for end in ends] == [TimeoutError]
    else:
        assert [type(end) for end in ends] == [GroupClosedError, TimeoutError]
        assert type(ends[0].reason) is TimeoutError


def test_cancel_that_comes_with_room_is_heard(workers, watched, monkeypatch):
    """
    A worker that empties a cancelled queue makes room, but not for a call that never runs.
    """
    wait = Gate.wait

    def wait_for_both(gate, timeout=None):
        through = wait(gate, timeout)
        if threading.current_thread() is late[0]:
            cancelled.wait(timeout=30)
        return through

    cancelled = threading.Event()
    with TaskGroup(**workers(1), max_queued=1) as group:
        held = Held(group)
        queued = group.submit(abs, 1)
        late = [None]
        monkeypatch.setattr(Gate, "wait", wait_for_both)
        late = blocked(group.submit, abs, 1)
        held.release.set()
        assert queued.wait(timeout=30)
        group.cancel("enough")
        cancelled.set()
        refused = ended(*late)

    assert type(refused) is GroupClosedError


# --- Who never waits ---------------------------------------------------------------------------


def submits_itself(group):
    return [group.submit(abs, -number) for number in range(10)]


def submits_from_a_group_in_it(group):
    with TaskGroup(1) as inner:
        return inner.submit(submits_itself, group).result()


def submits_from_a_helper_thread(group):
    thread, outcome = None, []
    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: outcome.append(context.run(submits_itself, group)))
    thread.start()
    thread.join(timeout=30)
    return outcome[0]


def maps(group):
    return group.map(abs, range(0, -10, -1)).tasks


def maps_a_generator(group):
    return group.map(abs, (-number for number in range(10))).tasks


def starmaps(group):
    return group.starmap(abs, [(-number,) for number in range(10)]).tasks


def streams(group):
    return list(group.imap(abs, range(0, -10, -1), window=10))


def streams_as_they_come(group):
    return sorted(group.imap_unordered(abs, iter(range(0, -10, -1)), window=10))


@pytest.mark.parametrize(
    "submits",
    [
        submits_itself,
        submits_from_a_group_in_it,
        submits_from_a_helper_thread,
        maps,
        maps_a_generator,
        starmaps,
        streams,
        streams_as_they_come,
    ],
)
def test_task_of_the_group_never_blocks(workers, monkeypatch, submits):
    """
    Nobody else is there to make room: the only worker runs it.
    """
    waits = []
    monkeypatch.setattr(Run, "_wait_for_room", lambda *arguments: waits.append(arguments))
    with TaskGroup(**workers(1), max_queued=1) as group:
        task = group.submit(submits, group)

    assert waits == []
    values = [getattr(left, "result", lambda left=left: left)() for left in task.result()]
    assert values == list(range(10))


def test_what_a_task_took_beyond_the_cap_is_given_back_first(workers, watched):
    """
    Others wait until no more are queued than the cap again.
    """
    begun, go, holding, release = (threading.Event() for _ in range(4))

    def submits_when_told():
        begun.set()
        go.wait(timeout=30)
        submits_itself(group)

    def holds():
        holding.set()
        release.wait(timeout=30)

    with TaskGroup(**workers(1), max_queued=2) as group:
        group.submit(submits_when_told)
        assert begun.wait(timeout=30)
        group.submit(holds)
        group.submit(abs, 1)
        late = blocked(group.submit, abs, 1)
        full = waiting(group)
        go.set()
        assert holding.wait(timeout=30)
        overfull = waiting(group)
        asleep = is_asleep(late[0])
        release.set()
        ended(*late)

    assert (full, overfull) == (2, 11)
    assert asleep


# --- Workers that wait -------------------------------------------------------------------------


def test_worker_of_the_same_pool_makes_room_itself(make_pool):
    """
    On a pool of one thread there is nobody else: in a group inside, and in one beside.
    """
    pool = make_pool(1)
    ran = []

    def feeds(group):
        for number in range(10):
            group.submit(ran.append, number)

    def opens():
        with TaskGroup(pool=pool, max_queued=1) as inner:
            feeds(inner)

    with TaskGroup(pool=pool) as outer:
        outer.submit(opens)
    with TaskGroup(pool=pool) as one, TaskGroup(pool=pool, max_queued=1) as other:
        one.submit(feeds, other).wait(timeout=30)

    assert ran == [*range(10), *range(10)]


def test_worker_that_runs_something_meanwhile_holds_no_wake_up_back(make_pool, watched):
    """
    What it runs may wait for the call of the next one in the line.
    """
    pool = make_pool(2)
    full, begun, happened = (threading.Event() for _ in range(3))

    def waits_for_the_last():
        begun.set()
        return happened.wait(timeout=30)

    def submits():
        full.wait(timeout=30)
        group.submit(abs, 1)

    with TaskGroup(pool=pool) as other, TaskGroup(pool=pool, max_queued=1) as group:
        held = Held(group)
        until(other.submit(submits).running)
        waits = group.submit(waits_for_the_last)
        full.set()  # the other group's worker makes room, and is at that task then
        assert begun.wait(timeout=30)
        group.submit(abs, 1)
        last = blocked(group.submit, happened.set)
        held.release.set()
        ended(*last)

    assert waits.result() is True


def test_worker_that_leaves_the_line_passes_its_wake_up_on(watched, monkeypatch):
    """
    Room comes just before it runs something that waits for the call of the next one in the line.
    """
    sleep_for_room = Run.sleep_for_room
    go, happened = threading.Event(), threading.Event()
    seats, line = [], []

    def room_comes_first(run, queue, gate, lane):
        if lane is not None and not line:
            line.append(blocked(submits))
            assert queued.cancel()
            go.set()
            until(lambda: is_asleep(seats[0]))
        sleep_for_room(run, queue, gate, lane)

    def is_in_the_way():
        seats.append(threading.current_thread())
        go.wait(timeout=30)
        return other.submit(happened.wait, 30).result()

    def submits():
        group.submit(abs, 1)
        happened.set()

    monkeypatch.setattr(Run, "sleep_for_room", room_comes_first)
    with TaskGroup(1, max_queued=1) as group, TaskGroup(1) as other:
        first = group.submit(is_in_the_way)
        until(first.running)
        queued = group.submit(abs, 1)
        other.submit(group.submit, abs, 1)

    assert first.result() is True


def test_worker_that_waits_for_room_hears_of_what_only_it_can_run(watched):
    """
    The task in its way begins to wait for that, and what it runs meanwhile waits for it, too.
    """
    full, go, happened = (threading.Event() for _ in range(3))
    seats, queued = [], []

    def is_in_the_way():
        queued.extend([group.submit(happened.wait, 30), group.submit(abs, 1)])
        full.set()
        go.wait(timeout=30)
        other.submit(happened.set).result()

    def submits():
        seats.append(threading.current_thread())
        return group.submit(abs, -2)

    with TaskGroup(1, max_queued=1) as group, TaskGroup(1) as other:
        group.submit(is_in_the_way)
        assert full.wait(timeout=30)
        late = other.submit(submits)
        until(lambda: seats and is_asleep(seats[0]))
        go.set()

    assert queued[0].result() is True
    assert late.result().result() == 2


@pytest.mark.parametrize("call", ["submit", "map"])
def test_task_that_a_waiter_runs_makes_room(call):
    """
    It waits no more, though no worker has taken it off the queue.
    """
    started, submitted = threading.Event(), threading.Event()

    def child(number):
        started.set()
        return submitted.wait(timeout=30)

    def parent():
        task = group.submit(child, 1) if call == "submit" else group.map(child, [1]).tasks[0]
        return task.result()

    with TaskGroup(1, max_queued=1) as group:
        waits = group.submit(parent)
        assert started.wait(timeout=30)
        group.submit(abs, 1)
        submitted.set()

    assert waits.result() is True


def test_room_that_comes_while_a_worker_looks_what_to_run_is_seen(monkeypatch):
    """
    It stands in no line then, and finds nothing to run, either.
    """

    def finds_nothing(lane, *tasks):
        held.release.set()
        until(lambda: not waiting(group))
        return False

    with TaskGroup(1, max_queued=1) as group, TaskGroup(1) as other:
        held = Held(group)
        group.submit(abs, 1)
        monkeypatch.setattr(_run, "help_along", finds_nothing)
        task = other.submit(group.submit, abs, -3)

    assert task.result().result() == 3


def test_worker_that_makes_room_runs_no_more_than_that_takes(make_pool):
    """
    What is queued behind may wait for what it does next.
    """
    fed = threading.Event()

    def feeds():
        full.wait(timeout=30)
        group.submit(abs, 1)
        fed.set()

    full = threading.Event()
    pool = make_pool(1)
    with TaskGroup(pool=pool) as other, TaskGroup(pool=pool, max_queued=2) as group:
        until(other.submit(feeds).running)
        tasks = [group.submit(abs, -2), group.submit(fed.wait, 20)]
        full.set()

    assert [task.result() for task in tasks] == [2, True]


def test_circle_through_a_task_that_makes_room_is_told(make_pool, watched):
    """
    A worker that waits for room runs a task, which waits for one that waits for the worker's.
    """
    pool = make_pool(2)
    seats = []

    def waits_for_the_worker():
        until(lambda: seats and is_asleep(seats[0]))
        with pytest.raises(RuntimeError, match="cannot wait for task 'submits'"):
            feeder.result()
        return "told"

    def waits_for_the_first():
        seats.append(threading.current_thread())
        return first.result()

    def submits():
        full.wait(timeout=30)
        return group.submit(abs, -2)

    full = threading.Event()
    with (
        TaskGroup(pool=pool, timeout=60) as other,
        TaskGroup(pool=pool, max_queued=1, timeout=60) as group,
    ):
        feeder = other.submit(submits)
        first = group.submit(waits_for_the_worker)
        until(lambda: feeder.running() and first.running())
        second = group.submit(waits_for_the_first)
        full.set()

    assert (first.result(), second.result()) == ("told", "told")
    assert feeder.result().result() == 2


def test_groups_that_feed_each_other_go_on(make_pool):
    """
    On one thread, with queues of one place.
    """
    pool = make_pool(1)
    ran = []

    def there(number):
        if number:
            other.submit(back, number - 1)
            other.submit(back, number - 1)
        ran.append(number)

    def back(number):
        if number:
            group.submit(there, number - 1)
        ran.append(number)

    with (
        TaskGroup(pool=pool, max_queued=1) as group,
        TaskGroup(pool=pool, max_queued=1) as other,
    ):
        first = group.submit(there, 6)
        with shield():
            until(lambda: len(ran) == 1 + 2 + 2 + 4 + 4 + 8 + 8)
        assert first.done()


def test_blocked_submits_to_each_other_go_on():
    """
    Each of two tasks waits for room that only the other's worker can make, which waits as well.
    """
    full = threading.Event()

    def submits_to(group):
        full.wait(timeout=30)
        return group.submit(abs, -1)

    with (
        TaskGroup(1, max_queued=1) as left,
        TaskGroup(1, max_queued=1) as right,
    ):
        one, two = left.submit(submits_to, right), right.submit(submits_to, left)
        until(lambda: one.running() and two.running())
        for group in (left, right):
            group.submit(abs, 1)
        full.set()

    assert one.result().result() == two.result().result() == 1


def test_worker_makes_room_for_what_it_waits_for():
    """
    A task waits for one of another group, which submits to the full queue of the first.
    """

    def feeds():
        return [task.result() for task in [group.submit(abs, -number) for number in range(4)]]

    with TaskGroup(1, max_queued=1) as group, TaskGroup(1) as other:
        task = group.submit(lambda: other.submit(feeds).result())

        assert task.result() == [0, 1, 2, 3]


def streams(name):
    """Take all values of a stream that has a window of four."""

    def take(group, items):
        return sorted(getattr(group, name)(abs, items, window=4))

    return take


@pytest.mark.parametrize(
    "feed",
    [
        pytest.param(lambda group, items: [group.submit(abs, item) for item in items], id="submit"),
        pytest.param(lambda group, items: group.map(abs, items), id="map"),
        pytest.param(streams("imap"), id="imap"),
        pytest.param(streams("imap_unordered"), id="imap_unordered"),
    ],
)
def test_worker_makes_room_in_a_group_whose_worker_it_would_be(make_pool, feed):
    """
    The pool's one thread waits for a task elsewhere, which opens a bounded group on that pool.
    """
    pool = make_pool(1)

    def feeds():
        with TaskGroup(1, pool=pool, max_queued=1) as inner:
            feed(inner, range(9))
        return "fed"

    def waits():
        with TaskGroup(1) as elsewhere:
            return elsewhere.submit(feeds).result()

    with TaskGroup(1, pool=pool) as group:
        assert group.submit(waits).result() == "fed"


def test_dump_says_who_waits_for_room():
    """
    The queue is named, and not the tasks that happen to be in its way; until there was room.
    """
    submitted, seen = threading.Event(), threading.Event()

    def submits():
        task = group.submit(abs, -2)
        submitted.set()
        assert seen.wait(timeout=30)
        return task

    def waits_for():
        (outer,) = fastpool.dump()
        return [task.waits_for for inner in outer.groups for task in inner.tasks]

    with TaskGroup(1, max_queued=1, name="full") as group, TaskGroup(1) as other:
        held = Held(group)
        group.submit(abs, 1)
        task = other.submit(submits)
        until(lambda: waits_for() == [("room in the queue of group 'full'",)])
        held.release.set()
        assert submitted.wait(timeout=30)
        later = waits_for()
        seen.set()

    assert later == [()]
    assert task.result().result() == 2


# --- Wake-ups ----------------------------------------------------------------------------------


def test_no_wake_up_is_lost_between_idle_and_busy(workers):
    """
    512 rounds: two threads submit to idle workers at once, block, and all of it is run.
    """
    rounds = 512
    ran = []
    meeting = threading.Barrier(3)

    def feed():
        for number in range(rounds):
            meeting.wait(timeout=30)
            for _ in range(2):
                group.submit(ran.append, number)
            meeting.wait(timeout=30)

    with TaskGroup(**workers(2), max_queued=1) as group:
        feeders = [start(feed) for _ in range(2)]
        counts = []
        for _ in range(rounds):
            meeting.wait(timeout=30)
            meeting.wait(timeout=30)
            group.wait(timeout=30)
            counts.append(len(ran))
        for thread, outcome in feeders:
            assert ended(thread, outcome) is None

    assert counts == list(range(4, 4 * rounds + 1, 4))


def test_waiter_that_leaves_passes_its_wake_up_on(workers, watched, monkeypatch):
    """
    The first in the line is woken by room, finds its own token set, and the second has the room.
    """
    wait = Gate.wait
    token = CancelToken()
    line = []

    def submits():
        with use_token(token):
            group.submit(abs, 1)

    def wait_and_hear_of_the_cancel(gate, timeout=None):
        through = wait(gate, timeout)
        if line and threading.current_thread() is line[0][0]:
            token.cancel("just as room comes")
        return through

    with TaskGroup(**workers(1), max_queued=1) as group:
        held = Held(group)
        steps = [threading.Event() for _ in range(2)]
        group.submit(steps[0].wait, 30)
        monkeypatch.setattr(Gate, "wait", wait_and_hear_of_the_cancel)
        line.append(blocked(submits))
        line.append(blocked(group.submit, steps[1].wait, 30))
        held.release.set()  # its worker takes the first step's call, and stays there
        first, second = ended(*line[0]), ended(*line[1])
        for step in steps:
            step.set()

    assert type(first) is Cancelled
    assert second.result() is True


def test_stream_that_leaves_the_line_for_a_value_passes_its_wake_up_on(
    workers, watched, monkeypatch
):
    """
    Room comes once it has seen that there is none, and a value.
    """
    release = [threading.Event() for _ in range(3)]
    leaving, leave_line, notify = threading.Event(), Run.leave_line, Run.notify

    def leave_as_room_comes(run, *arguments):
        if not leaving.is_set():
            leaving.set()
            until(lambda: not run.queue)
        leave_line(run, *arguments)

    def notify_and_wait(run, task):
        notify(run, task)
        assert leaving.wait(timeout=60)

    def waits(number):
        assert release[number].wait(timeout=60)

    with TaskGroup(**workers(1), max_queued=1) as group:
        first = blocked(next, group.imap(waits, iter(range(3)), window=5))
        behind = blocked(group.submit, abs, -404)
        monkeypatch.setattr(Run, "leave_line", leave_as_room_comes)
        monkeypatch.setattr(Run, "notify", notify_and_wait)
        release[0].set()
        task = ended(*behind)
        value = ended(*first)
        for event in release:
            event.set()

    assert task.result() == 404
    assert value is None


def test_room_that_two_calls_leave_wakes_two(workers, watched):
    """
    Though both wake-ups may have met the same waiter.
    """
    with TaskGroup(**workers(2), max_queued=2) as group:
        held = [Held(group), Held(group)]
        queued = [group.submit(threading.Event().wait, 0) for _ in range(2)]
        line = [blocked(group.submit, abs, -number) for number in range(2)]
        for task in queued:
            assert task.cancel()
        values = [ended(*late) for late in line]
        for holder in held:
            holder.release.set()

    assert [task.result() for task in values] == [0, 1]


# --- Leaving -----------------------------------------------------------------------------------


def test_leaving_waits_for_a_blocked_submit(workers, watched):
    """
    It was called while the block was open, so its task runs.
    """
    main = threading.current_thread()

    def release():
        until(lambda: is_asleep(main))
        held.release.set()

    with TaskGroup(**workers(1), max_queued=1) as group:
        held = Held(group)
        group.submit(abs, 1)
        late = blocked(group.submit, abs, -404)
        releaser = start(release)
    ended(*releaser)

    assert ended(*late).result() == 404


@pytest.mark.parametrize("observed", [False, True])
def test_block_is_not_left_before_who_has_waited_is_in_the_queue(
    workers, watched, monkeypatch, observed
):
    """
    Everything has come to rest between the room for a call and the call.
    """
    main = threading.current_thread()

    def held_up(queue, entries):
        if threading.current_thread() in threads:
            held.release.set()
            until(lambda: queued.done() and is_asleep(main))
        extend(queue, entries)

    def append(queue, entry):
        held_up(queue, [entry])

    def release():
        until(lambda: is_asleep(main))
        held.release.set()

    extend = BoundedQueue.extend
    monkeypatch.setattr(BoundedQueue, "extend", held_up, raising=False)
    monkeypatch.setattr(BoundedQueue, "append", append, raising=False)
    threads = []
    with TaskGroup(
        **workers(1), max_queued=1, observers=[lambda event: None] if observed else ()
    ) as group:
        held = Held(group)
        queued = group.submit(abs, 1)
        late = blocked(group.submit, abs, -404)
        threads.append(late[0])
        releaser = start(release)
    ended(*releaser)

    assert ended(*late).result() == 404


@pytest.mark.parametrize("where", ["thread", "worker"])
def test_exception_that_ends_a_blocked_submit_leaves_nothing_registered(workers, watched, where):
    """
    Neither in the line, nor with a token, nor with the group, which would wait for it for ever.
    """

    class Witness:
        pass

    def submits():
        witness = Witness()
        witnesses.append(weakref.ref(witness))
        with use_token(token):
            group.submit(id, witness)

    def submits_as_a_task():
        with TaskGroup(1) as other:
            other.submit(submits)

    def listeners():
        return [
            sum(type(entry) is Gate for entry in heard._entries.values())
            for heard in (token, group.token)
        ]

    token = CancelToken()
    witnesses = []
    with TaskGroup(**workers(1), max_queued=1) as group:
        held = Held(group)
        group.submit(abs, 1)
        before = listeners()
        late = start(submits if where == "thread" else submits_as_a_task)
        until(lambda: group._run.bounded.waiting)
        during = listeners()
        token.cancel()
        ended(*late)
        late[1].clear()
        gc.collect()
        after = listeners()
        run = group._run
        left = [run.bounded.waiting, run.calling, run.helpers]
        held.release.set()

    assert during > before
    assert after == before
    assert [len(things) for things in left] == [0, 0, 0]
    assert witnesses[0]() is None


def test_interrupt_of_a_blocked_submit_leaves_nothing_registered(watched):
    """
    Ctrl-C is raised by it, and the block is left.
    """
    main = threading.main_thread()

    def ctrl_c():
        until(lambda: main.ident in sleeping)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised, TaskGroup(1, max_queued=1) as group:
        started_sleeper(group)
        group.submit(abs, 1)
        killer = start(ctrl_c)
        try:
            group.submit(abs, 1)
        finally:
            ended(*killer)
            run = group._run
            left = [len(run.bounded.waiting), len(run.calling)]

    assert left == [0, 0]
    assert [failure.exception for failure in group.failures] == [raised.value]


def blocks_in_submit(group, ready):
    """A body for a child: it is interrupted in a submit that waits for room."""
    with TaskGroup(1, max_queued=1) as inner:
        started_sleeper(inner)
        inner.submit(fastpool.sleep, 60)
        ready()
        inner.submit(fastpool.sleep, 60)


def test_ctrl_c_ends_a_program_that_is_blocked_in_submit():
    """
    By a real signal to a process of its own.
    """
    assert in_child(blocks_in_submit) == "interrupted\n"


@pytest.mark.parametrize("daemon", [False, True])
def test_interpreter_ends_while_a_thread_is_blocked_in_submit(daemon):
    """
    What was queued is done; the blocked call is done, too, or refused, and nothing hangs.
    """
    code = f"""
import os, threading
import fastpool
from fastpool import GroupClosedError, TaskGroup

def work(number):
    go.wait(20)
    os.write(1, b"%d " % number)

def feed():
    try:
        for number in range(5):
            group.submit(work, number)
            if number == 1:
                full.set()
    except GroupClosedError as error:
        assert "exiting" in str(error), error

go, full = threading.Event(), threading.Event()
group = TaskGroup(1, max_queued=1)
group.__enter__()
threading.Thread(target=feed, daemon={daemon}).start()
full.wait(20)
while not group._run.bounded.waiting:
    go.wait(0.001)
threading.Timer(0.05, go.set).start()
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "0 1 2 3 4 ".startswith(ended.stdout)
    assert ended.stdout.startswith("0 1 ")


# --- Inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", ["map", "starmap", "two iterables"])
def test_map_reads_its_input_only_as_there_is_room(workers, watched, mapped):
    """
    Each item is read once there is a place for its call.
    """
    read = []

    def items():
        for number in range(10):
            read.append(number)
            yield (number,) if mapped == "starmap" else number

    def hand_over():
        if mapped == "starmap":
            return group.starmap(abs, items()).results()
        if mapped == "map":
            return group.map(abs, items()).results()
        return group.map(max, items(), [0] * 10).results()

    with TaskGroup(**workers(1), max_queued=3) as group:
        held = Held(group)
        mapping = blocked(hand_over)
        counts = [len(read), waiting(group)]
        held.release.set()
        values = ended(*mapping)

    assert counts == [3, 3]
    assert values == list(range(10))


@pytest.mark.parametrize("items", [list(range(5000)), range(5000), dict.fromkeys(range(5000))])
def test_input_that_is_read_at_once_fits_the_cap_all_the_same(workers, items):
    """
    A list is read in many items at a time, but not in more than there is room for.
    """
    seen = []

    def task(number):
        if not number % 100:
            seen.append(waiting(group))
        return number

    with TaskGroup(**workers(2), max_queued=7) as group:
        values = group.map(task, items).results()

    assert values == list(range(5000))
    assert max(seen) <= 7


@pytest.mark.parametrize("refused", ["before", "while it waits"])
def test_refused_map_takes_nothing_from_its_input(workers, watched, refused):
    """
    Neither from one that is refused at once, nor from one that had to wait for room.
    """
    items = iter([1, 2, 3])
    with TaskGroup(**workers(1), max_queued=1) as group:
        started_sleeper(group)
        group.submit(abs, 1)
        if refused == "before":
            group.cancel("enough")
            error = in_thread(group.map, abs, items)
        else:
            mapping = blocked(group.map, abs, items)
            group.cancel("enough")
            error = ended(*mapping)

    assert type(error) is GroupClosedError
    assert list(items) == [1, 2, 3]


def test_map_that_finds_no_room_as_its_group_ends_takes_nothing_from_its_input(monkeypatch):
    """
    It has just seen the group open, and the block is left while it looks for room.
    """
    looks, left = threading.Event(), threading.Event()

    def finds_none(queue, entry, most=1):
        looks.set()
        assert left.wait(timeout=30)
        return False

    monkeypatch.setattr(BoundedQueue, "take_room", finds_none)
    items = iter([1, 2, 3])
    with TaskGroup(1, max_queued=1) as group:
        mapping = start(group.map, abs, items)
        assert looks.wait(timeout=30)
    left.set()
    error = ended(*mapping)

    assert type(error) is GroupClosedError
    assert list(items) == [1, 2, 3]


# --- Room that comes back ----------------------------------------------------------------------


def test_room_of_a_cancelled_call_is_given_back_once():
    """
    When it is cancelled, and not when a worker comes to it.
    """
    started, release = threading.Event(), threading.Event()

    def hold(number):
        started.set()
        assert release.wait(timeout=30)
        return number

    with TaskGroup(1, max_queued=2) as group:
        held = Held(group)
        batch = group.map(hold, [1, 2])
        assert batch.tasks[0].cancel()
        group.submit(abs, -3)
        held.release.set()
        assert started.wait(timeout=30)  # the worker has passed the first one, and has the second
        producer, _ = start(lambda: [group.submit(abs, -number) for number in range(4)])
        until(lambda: group._run.bounded.waiting)
        queued = len(group._run.queue)
        release.set()
        producer.join(timeout=30)

    assert queued == 2


def test_room_that_goes_as_it_is_counted_counts_no_more():
    """
    What it was taken for is in the queue by then.
    """

    class Promised(dict):
        def get(self, entry, default):
            del self[entry]
            return super().get(entry, default)

    queue = BoundedQueue(2)
    queue.promised = Promised(early=(1, 0))

    assert queue.take_room("late", 5) == 2


def test_stream_keeps_no_room_between_its_values(watched):
    """
    A submit of another thread goes in at once.
    """
    with TaskGroup(1, max_queued=1) as group:
        values = group.imap(abs, (number for number in (-1, -2)), window=1)
        assert next(values) == 1
        submitter, _ = start(group.submit, abs, -3)
        until(lambda: not submitter.is_alive() or is_asleep(submitter))
        went_in = not submitter.is_alive()
        values.close()

    assert went_in


def test_room_that_was_given_back_for_calls_that_had_gone_is_none_once_the_queue_is_empty():
    """
    Cancels may come as workers have just taken the calls off.
    """
    queue = BoundedQueue(1)
    queue.lend_room()
    queue.lend_room()
    assert queue.take_room("early", 2) == 1
    queue.give_room("early")
    with pytest.raises(IndexError):
        queue.popleft()
    assert queue.take_room("first", 2) == 1
    queue.append("first")
    queue.give_room("first")

    assert queue.take_room("second") == 0


@pytest.mark.parametrize(
    "items", [lambda: [1], lambda: iter([1]), lambda: (n for n in [1])], ids=["list", "iter", "gen"]
)
def test_room_that_an_input_did_not_need_is_given_back(workers, watched, items):
    """
    When it has ended, one call more fits, and not two.
    """
    with TaskGroup(**workers(1), max_queued=2) as group:
        for _ in range(3):
            held = Held(group)
            in_thread(group.map, abs, items())
            in_thread(group.submit, abs, 1)
            late = blocked(group.submit, abs, 1)
            full = waiting(group)
            held.release.set()
            ended(*late)
            group.wait(timeout=30)

            assert full == 2


@pytest.mark.parametrize("queued", ["submit", "map", "a generator's", "batch"])
def test_queued_task_that_is_cancelled_makes_room(workers, watched, queued):
    """
    For as many, at once, while the worker is at something else; what is left of them all is run.
    """
    with TaskGroup(**workers(1), max_queued=3) as group:
        for _ in range(3):
            held = Held(group)
            if queued == "submit":
                tasks = [group.submit(abs, -1), group.submit(abs, -1)]
            else:
                batch = group.map(abs, [-1, -1] if queued != "a generator's" else iter([-1, -1]))
                tasks = batch.tasks
            others = [group.submit(abs, -2)]
            late = blocked(group.submit, abs, -2)
            if queued == "batch":
                batch.cancel()
                others.append(in_thread(group.submit, abs, -2))
            else:
                assert tasks[1].cancel()
            others.append(ended(*late))
            late = blocked(group.submit, abs, -2)
            held.release.set()
            others.append(ended(*late))
            group.wait(timeout=30)

            assert [task.cancelled() for task in tasks] == [queued == "batch", True]
            assert [task.result() for task in others] == [2] * len(others)
        held = Held(group)
        group.map(abs, range(3))
        late = blocked(group.submit, abs, -2)
        held.release.set()

    assert ended(*late).result() == 2


def test_queued_task_that_is_cancelled_is_kept_by_nobody():
    """
    No worker comes to it any more: it is out of the queue.
    """
    release = threading.Event()
    with TaskGroup(1, max_queued=10) as group:
        until(group.submit(release.wait, 60).running)
        task = group.submit(abs, -404)
        assert task.cancel()
        gone = weakref.ref(task)
        del task
        gc.collect()
        kept = gone()
        release.set()

    assert kept is None


@pytest.mark.parametrize("call", ["submit", "map"])
def test_running_task_that_is_cancelled_makes_no_room(workers, call):
    """
    It has no place in the queue any more.
    """

    def holds(number):
        begun.set()
        assert release.wait(timeout=30)

    begun, release = threading.Event(), threading.Event()
    token = CancelToken()
    token.cancel()
    with TaskGroup(**workers(1), max_queued=1) as group:
        task = group.submit(holds, 1) if call == "submit" else group.map(holds, [1]).tasks[0]
        assert begun.wait(timeout=30)
        group.submit(abs, 1)
        told = task.cancel()
        with use_token(token), pytest.raises(Cancelled):
            group.submit(abs, 1)  # does not wait on a set token
        release.set()

    assert told is True


def test_task_that_no_thread_can_be_started_for_gives_its_room_back(monkeypatch):
    """
    Each submit is refused by what the system said, and none of them blocks.
    """

    def refuses(*_):
        raise RuntimeError("can't start new thread")

    works = Leased.start_lane
    with TaskGroup(1, max_queued=1) as group:
        monkeypatch.setattr(Leased, "start_lane", refuses)
        errors = [in_thread(group.submit, abs, 1) for _ in range(3)]
        errors += [in_thread(group.map, abs, items) for items in ([1, 2], iter([1, 2]))]
        monkeypatch.setattr(Leased, "start_lane", works)
        tasks = group.map(abs, range(20))

    assert [str(error) for error in errors] == ["can't start new thread"] * 5
    assert tasks.results() == list(range(20))


@pytest.mark.parametrize("bound", [{}, {"max_queued": 2}])
def test_call_that_no_thread_can_be_started_for_is_kept_by_nobody(monkeypatch, bound):
    """
    Its group goes on, and nobody has its handle.
    """

    def refuses(*_):
        raise RuntimeError("can't start new thread")

    with TaskGroup(1, **bound) as group:
        with monkeypatch.context() as patch:
            patch.setattr(Leased, "start_lane", refuses)
            with pytest.raises(RuntimeError):
                group.submit(abs, 1)
        kept = len(group._run.claims)

    assert kept == 0


@pytest.mark.parametrize("bound", [{}, {"max_queued": 2}])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), LookupError()])
def test_call_that_found_the_slot_taken_is_run_though_no_thread_was_started_with_it(
    monkeypatch, bound, error
):
    """
    Another submitter had it; the system, or a signal handler, has ended that.
    """
    starts, has_queued = threading.Event(), threading.Event()
    works, once = Leased.start_lane, [error]

    def refuses_once(*args):
        if not once:
            return works(*args)
        starts.set()
        assert has_queued.wait(60)
        raise once.pop()

    monkeypatch.setattr(Leased, "start_lane", refuses_once)
    with TaskGroup(1, **bound) as group:
        first, refused = start(group.submit, abs, -1)
        assert starts.wait(60)
        task = group.submit(abs, -2)
        has_queued.set()
        first.join(60)
        value = task.result(timeout=60)

    assert refused == [error]
    assert value == 2


def test_group_goes_on_with_fewer_threads(monkeypatch):
    """
    Where the system gives only one, that one serves those who wait.
    """
    works = Leased.start_lane
    lanes = []

    def starts_one(*args):
        if lanes:
            raise RuntimeError("can't start new thread")
        lanes.append(args)
        works(*args)

    monkeypatch.setattr(Leased, "start_lane", starts_one)
    with TaskGroup(4, max_queued=2) as group:
        tasks = [group.submit(abs, -number) for number in range(50)]

    assert [task.result() for task in tasks] == list(range(50))


def test_observers_hear_of_a_call_once_it_has_room(workers, watched):
    """
    One that is blocked is not submitted yet, and one that is refused never is.
    """
    told, seen = [], []
    with TaskGroup(**workers(1), max_queued=1, observers=[told.append]) as group:
        held = Held(group)
        group.submit(abs, 1)
        late = blocked(group.submit, abs, 1)
        before = len(told)
        held.release.set()
        task = ended(*late)

    assert [event.name for event in told[:before]].count("task_submitted") == 2
    assert [event.name for event in told if event.task is task] == [
        "task_submitted",
        "task_started",
        "task_succeeded",
    ]
    with TaskGroup(**workers(1), max_queued=1, observers=[seen.append]) as group:
        started_sleeper(group)
        group.submit(abs, 1)
        late = blocked(group.submit, abs, 1)
        names = [event.name for event in seen]
        group.cancel("enough")
        error = ended(*late)

    assert type(error) is GroupClosedError
    assert names == ["group_opened", "task_submitted", "task_started", "task_submitted"]
    assert [event.name for event in seen].count("task_submitted") == 2
    assert [event.name for event in seen].count("task_cancelled") == 2


def test_failing_task_ends_a_loop_that_submits(workers):
    """
    A producer stops by itself, and the block raises what the task did.
    """
    error = ValueError("root")

    def produce():
        while True:
            group.submit(abs, 1)

    with (
        pytest.raises(ValueError, match="root") as raised,
        TaskGroup(**workers(2), max_queued=3) as group,
    ):
        group.submit(fail, error)
        assert current_token() is group.token
        produce()

    assert raised.value is error
    assert [failure.exception for failure in group.failures] == [error]
