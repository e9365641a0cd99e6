"""
Threads that meet in the library, in every order that the explorer finds.
"""

import functools
import pickle
import sys
import threading
import time

import pytest

if sys.version_info < (3, 12):
    pytest.skip("the explorer needs sys.monitoring of Python 3.12", allow_module_level=True)

from fake_processes import Machine, here
from interleave import (
    SCHEDULES,
    SEED,
    Failed,
    Workers,
    attempt,
    exhaust,
    explore,
    pass_time,
    together,
)
from mutants import MUTANTS, applied
from token_programs import generate, run

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    GroupClosedError,
    TaskCancelledError,
    TaskGroup,
    WorkerDiedError,
    cancellable,
    current_token,
)
from fastpool._items import Items, Stretch
from fastpool._lane import Lane
from fastpool._task import Options
from fastpool.backends.processes import HELD

MODELS = {}
EXHAUSTED = {}  # the smallest, of which all orders can be tried


def model(*outcomes, models=MODELS, within=("",)):
    """A model, and the outcomes that it may have; each is to be seen."""

    def note(fn):
        fn.within = within
        models[fn.__name__] = (fn, set(outcomes))
        return fn

    return note


# --- Tokens ---------------------------------------------------------------------------------------


@model("heard")
def cancel_against_wait():
    """Who waits or sleeps on a token, or one further down, hears of it at once."""
    token = CancelToken()
    below = token.child().child()

    won, waited, slept = together(
        lambda: token.cancel("done"), token.wait, lambda: attempt(below.sleep, 60)
    )

    assert won is True
    assert waited is True
    assert isinstance(slept, Cancelled)
    assert slept.reason == "done"
    assert time.monotonic() == 0, "it slept on"
    return "heard"


@model("the first", "the second")
def cancel_against_cancel():
    """One of two cancels wins, and both find the token set, with the winner's reason."""
    token = CancelToken()
    child = token.child()
    ran = []
    token.on_cancel(lambda: ran.append("callback"))

    def cancels(reason):
        won = token.cancel(reason)
        return won, token.reason, child.reason if won else None, len(ran) if won else None

    results = together(lambda: cancels("the first"), lambda: cancels("the second"))

    winner = token.reason
    assert sorted(won for won, *_ in results) == [False, True]
    assert all(reason == winner for _, reason, *_ in results)
    assert [rest for won, _, *rest in results if won] == [[winner, 1]]
    assert ran == ["callback"]
    return winner


@model("in the canceller", "in the registering thread")
def cancel_against_register():
    """A callback that is registered while the token is being set runs once, in one of the two."""
    token = CancelToken()
    ran = []
    earlier = token.on_cancel(lambda: ran.append(("earlier", where())))

    def cancels():
        token.cancel()
        return where(), list(ran)

    def registers():
        registration = token.on_cancel(lambda: ran.append(("late", where())))
        return where(), registration

    (canceller, by_then), (_, late) = together(cancels, registers)

    assert ("earlier", canceller) in by_then
    assert sorted(name for name, _ in ran) == ["earlier", "late"]
    assert (earlier.unregister(), late.unregister()) == (False, False)
    return "in the canceller" if ("late", canceller) in ran else "in the registering thread"


@model("it runs", "it never runs")
def cancel_against_unregister():
    """A callback is taken back and never runs, or it runs, and nobody has taken it back."""
    token = CancelToken()
    ran = []
    registration = token.on_cancel(lambda: ran.append(1))

    def takes_back():
        taken = registration.unregister()
        return taken, list(ran)

    won, one, other = together(token.cancel, takes_back, takes_back)

    assert won is True
    assert [one[0], other[0]].count(True) == (0 if ran else 1)
    assert ran in ([], [1])
    return "it runs" if ran else "it never runs"


@model("it ran before", "it never runs")
def cancel_against_close():
    """After `close()` the callback is not running, and never will be."""
    token, elsewhere = CancelToken(), CancelToken()
    steps = []

    def callback():
        steps.append("begins")
        for _ in range(20):
            elsewhere.cancelled()
        steps.append("ends")

    registration = token.on_cancel(callback)

    def closes():
        registration.close()
        return list(steps)

    _, by_then = together(token.cancel, closes)

    assert by_then == steps
    assert steps in ([], ["begins", "ends"])
    return "it ran before" if steps else "it never runs"


@model("set before", "set later")
def cancel_against_child():
    """A child that is made while its parent is being set is set with it, never before it."""
    token = CancelToken()

    def cancels():
        return token.cancel("done")

    def makes():
        child = token.child()
        early = child.cancelled()
        assert not early or token.cancelled()
        grandchild = child.child()
        assert not grandchild.cancelled() or child.cancelled()
        return child, grandchild, early

    won, (child, grandchild, early) = together(cancels, makes)

    assert won is True
    assert (child.reason, grandchild.reason) == ("done", "done")
    return "set before" if early else "set later"


@model("the child's own", "the parent's")
def cancel_of_parent_against_child():
    """A child is set once, by itself or with its parent, and tells its parent nothing."""
    token = CancelToken()
    child = token.child()
    grandchild = child.child()
    ran = []
    grandchild.on_cancel(lambda: ran.append(1))

    def cancels_child():
        won = child.cancel("the child's own")
        return won, grandchild.reason

    def cancels():
        return token.cancel("the parent's"), grandchild.cancelled()

    (won, reached), (own, below) = together(cancels, cancels_child)

    assert won is True
    assert reached, "the cancel returned before all were set"
    assert token.reason == "the parent's"
    assert child.reason == ("the child's own" if own else "the parent's")
    assert grandchild.reason == child.reason
    assert not own or below == "the child's own"
    assert ran == [1]
    return child.reason


@model("it runs", "it never runs")
def cancel_against_forgetting():
    """A token that is dropped with its registration is never heard of again, nor is it missed."""
    token = CancelToken()
    ran = []

    def forgets():
        late = token.cancelled()
        child = token.child()
        registration = child.on_cancel(lambda: ran.append(1))
        assert registration is not None
        del child, registration
        return late, list(ran)

    won, (late, by_then) = together(token.cancel, forgets)

    assert won is True
    assert len(ran) < 2
    assert by_then == [1] or not late, "it was set before, and the callback did not run at once"
    assert not token._children()
    return "it runs" if ran else "it never runs"


@model("woken", models=EXHAUSTED)
def one_cancels_one_waits():
    """Who waits is woken."""
    token = CancelToken()

    assert together(token.cancel, token.wait) == [True, True]
    return "woken"


@model("the first", "the second", models=EXHAUSTED)
def two_cancel():
    """One of them wins, and both find the token set by that one."""
    token = CancelToken()

    def cancels(reason):
        won = token.cancel(reason)
        return won, token.reason

    (first, one), (second, other) = together(
        lambda: cancels("the first"), lambda: cancels("the second")
    )

    assert [first, second].count(True) == 1
    assert one == other == ("the first" if first else "the second")
    return one


@model("called by one", models=EXHAUSTED)
def one_cancels_one_registers():
    """The callback runs once."""
    token = CancelToken()
    ran = []

    _, registration = together(token.cancel, lambda: token.on_cancel(lambda: ran.append(1)))

    assert ran == [1]
    assert registration.unregister() is False
    return "called by one"


@model("it runs", "it never runs", models=EXHAUSTED)
def one_cancels_one_takes_back():
    """The callback runs, or has been taken back."""
    token = CancelToken()
    ran = []
    registration = token.on_cancel(lambda: ran.append(1))

    _, taken = together(token.cancel, registration.unregister)

    assert ran == ([] if taken else [1])
    return "it never runs" if taken else "it runs"


@model("set", models=EXHAUSTED)
def one_cancels_one_makes_a_child():
    """The child is set."""
    token = CancelToken()

    def makes():
        child = token.child()
        assert not child.cancelled() or token.cancelled(), "it is set before its parent"
        return child

    _, child = together(token.cancel, makes)

    assert child.cancelled()
    return "set"


# --- Groups ---------------------------------------------------------------------------------------


@model("all results", "timed out")
def deadline_against_last_task():
    """A deadline that passes as the last task ends: all is done, or the group has timed out."""
    ran = []

    def body():
        with TaskGroup(1, name="timed", timeout=5) as group:
            tokens.append(group.token)
            tasks.extend(group.submit(notes, ran, number) for number in range(2))

    tasks, tokens = [], []
    left, _ = together(lambda: attempt(body), lambda: pass_time(5))
    is_set = tokens[0].cancelled()
    pass_time(10)

    assert tokens[0].cancelled() is is_set, "it was set after the end"
    by_then = list(ran)
    values = [attempt(task.result) for task in tasks]
    assert ran == by_then
    assert [value for value in values if not isinstance(value, TaskCancelledError)] == ran
    if left is None:
        assert values == [0, 1]
        assert not is_set
        return "all results"
    assert isinstance(left, TimeoutError) or (isinstance(left, Cancelled) and len(tasks) < 2), left
    assert is_set
    assert isinstance(tokens[0].reason, TimeoutError)
    return "timed out"


@model("all refused", "some refused", "none refused")
def submit_against_exit():
    """What is submitted as the block is left runs before it has been left, or is refused."""
    return submits_against_exit(4)


@model("all refused", "some refused", "none refused")
def submit_against_exit_of_bounded():
    """So it is where the queue has a bound: what finds no room waits for it, or is refused."""
    return submits_against_exit(2, max_queued=1)


def submits_against_exit(count, **settings):
    ran, groups = [], []
    entered = threading.Event()

    def body():
        with TaskGroup(1, **settings) as group:
            groups.append(group)
            entered.set()
        return list(ran)

    def submits():
        entered.wait()
        tasks = [attempt(groups[0].submit, notes, ran, number) for number in range(count)]
        return [attempt(task.result) for task in tasks if not isinstance(task, GroupClosedError)]

    by_then, values = together(body, submits)

    assert by_then == ran == values
    assert values == list(range(len(values)))
    return {0: "all refused", count: "none refused"}.get(len(values), "some refused")


@model("recorded", "too late", within=("_run", "_ledger", "_taskgroup"))
def report_against_exit():
    """A call that brought a group's token raises its own failure, though the group ends by then."""
    groups = []
    entered = threading.Event()
    error = ValueError("late")

    @cancellable
    def brings(token):
        raise error

    def body():
        with TaskGroup(1) as group:
            groups.append(group)
            entered.set()

    def reports():
        entered.wait()
        return attempt(brings.with_token, groups[0].token)

    left, reported = together(lambda: attempt(body), reports)

    assert reported is error
    assert left in (None, error)
    assert [failure.exception for failure in groups[0].failures] == [error] * (left is error)
    return "too late" if left is None else "recorded"


@model("the first", "the second")
def two_failures_at_once():
    """The first failure in time leaves the block; it is recorded and done when the token is set."""
    errors = [ValueError("the first"), ValueError("the second")]
    ran = []
    entered = threading.Event()
    groups = []
    tasks = []

    def body():
        with TaskGroup(2) as group:
            groups.append(group)
            entered.set()
            for error in errors:
                tasks.append(group.submit(fails, error))
            tasks.append(group.submit(notes, ran, "late"))

    def watches():
        entered.wait()
        token = groups[0].token
        token.wait()
        failure = groups[0].failures[0]
        assert failure.exception is token.reason
        assert failure.task.exception(0) is failure.exception
        assert all(groups[0].failures[0] is failure for _ in range(20))
        return failure

    left, failure = together(lambda: attempt(body), watches)

    (group,) = groups
    first = failure.exception
    if isinstance(left, Cancelled):
        raise AssertionError("the echo left, and not the failure")
    assert left is first
    assert group.failures[0] == failure
    for task, error in zip(tasks, errors, strict=False):
        outcome = attempt(task.exception)
        assert outcome is error or isinstance(outcome, TaskCancelledError)
        assert (outcome is error) == (task in [one.task for one in group.failures])
    for task in tasks[2:]:
        assert task.cancelled() is not bool(ran)
    return str(first)


@model("done")
def nested_groups_on_one_worker():
    """Tasks that open groups on the one worker that they run on get their results."""
    ran = []

    def nests(number):
        with TaskGroup(pool=pool.group_pool) as inner:
            return inner.submit(notes, ran, number).result()

    with Workers(1) as pool, TaskGroup(pool=pool.group_pool) as group:
        batch = group.map(nests, [1, 2])

    assert batch.results() == [1, 2]
    assert sorted(ran) == [1, 2]
    return "done"


@model("one pool", "two pools")
def lease_against_lease():
    """A pool of threads serves one group at a time, and comes back whole."""
    pools = {}

    def names():
        thread = threading.current_thread()
        pools[id(thread)] = thread
        before = thread.name
        CancelToken.NEVER.cancelled()
        return before, thread.name

    def runs(name):
        for _ in range(2):
            with TaskGroup(1, name=name) as group:
                task = group.submit(names)
            assert task.result() == (f"fastpool-{name}-1",) * 2

    together(lambda: runs("one"), lambda: runs("two"))

    assert len(pools) < 3
    return "one pool" if len(pools) == 1 else "two pools"


@model("the same thread", "a new thread")
def lease_against_end_of_idle_pool():
    """A group that leases a pool just as that has been idle for long enough gets a thread."""

    def thread():
        return threading.current_thread()

    def runs():
        with TaskGroup(1) as group:
            return group.submit(thread).result()

    before = runs()
    after, _ = together(runs, lambda: pass_time(11))

    return "the same thread" if after is before else "a new thread"


@model("done")
def parking_against_submit():
    """A thread that finds nothing to do and parks misses nothing that is submitted then."""
    ran = []

    with TaskGroup(1) as group:

        def submits(name):
            for number in range(3):
                value = (name, number)
                assert group.submit(notes, ran, value).result() == value

        together(lambda: submits("one"), lambda: submits("two"))

    assert len(ran) == len(set(ran)) == 6
    return "done"


@model(2)
def closing_of_imap_against_a_result():
    """An iterator that is closed takes and begins nothing more, and its group goes on."""
    taken, ran, told = [], [], {}

    def numbers():
        for number in range(9):
            taken.append(number)
            yield number

    def note(number):
        ran.append(number)
        told[number] = current_token().cancelled()
        return number

    with TaskGroup(2) as group:
        values = group.imap(note, numbers(), window=2)
        assert next(values) == 0
        values.close()
        by_then, begun = list(taken), list(ran)
        assert group.submit(int, "7").result() == 7

    assert taken == by_then
    assert len(taken) <= 2
    assert len(ran) == len(set(ran))
    assert all(told[number] for number in ran if number not in begun)
    assert set(ran) <= set(taken)
    assert list(values) == []
    assert group.failures == ()
    return len(taken)


@model("done")
def arrivals_against_sleep():
    """Who takes values as they come sleeps through none."""
    with TaskGroup(2) as group:
        values = list(group.imap_unordered(abs, [-1, -2, -3], window=2))

    assert sorted(values) == [1, 2, 3]
    return "done"


@model("refused at once", "refused", "waited for room")
def cancel_against_full_queue():
    """A submit that waits for room hears a cancel of its group, though no task has ended."""
    tasks, ran = [], []
    refused = threading.Event()

    def stays(number):
        ran.append(number)
        refused.wait()

    def submits():
        for number in range(3):
            task = attempt(group.submit, stays, number)
            if isinstance(task, GroupClosedError):
                refused.set()
                return task
            tasks.append(task)
        raise AssertionError("there was no room for three")

    with TaskGroup(1, max_queued=1) as group:
        error, won = together(submits, lambda: group.cancel("enough"))

    assert won is True
    assert error.reason == "enough"
    assert [task.cancelled() for task in tasks] == [
        number not in ran for number in range(len(tasks))
    ]
    assert len(ran) < 2
    return ("refused at once", "refused", "waited for room")[len(tasks)]


@model("done")
def room_against_producers():
    """Who waits for room in the queue gets it."""
    ran = []

    with TaskGroup(1, max_queued=1) as group:

        def submits(name):
            for number in range(2):
                group.submit(notes, ran, (name, number))

        together(lambda: submits("one"), lambda: submits("two"))

    assert len(ran) == len(set(ran)) == 4
    return "done"


@model("done")
def producers_against_bound():
    """As many wait in the queue as it has room for, no more and no fewer while others submit."""
    most, count = 2, 3
    begun, submitted = [], []

    def waits(value):
        begun.append(value)
        fastpool.sleep(1)  # till nobody can go on: each submit has returned, or waits for room
        missing = 2 * count - len(begun)
        assert len(submitted) - len(begun) == min(most, missing), "the bound is another one"

    with TaskGroup(1, max_queued=most) as group:

        def submits(name):
            for number in range(count):
                group.submit(waits, (name, number))
                submitted.append((name, number))

        together(lambda: submits("one"), lambda: submits("two"))

    assert sorted(begun) == sorted(submitted)
    return "done"


@model("done")
def producers_in_line():
    """Who has waited longest for room is the first to get some."""
    ran = []

    with TaskGroup(1, max_queued=1) as group:
        group.submit(fastpool.sleep, 10)  # and what comes next fills the queue

        def submits(number):
            fastpool.sleep(number)  # till all who came before wait
            group.submit(notes, ran, number)

        together(*[functools.partial(submits, number) for number in (1, 2, 3, 4)])

    assert ran == [1, 2, 3, 4]
    return "done"


@model("never ran", "told as it ran", "too late")
def cancel_of_task_against_its_start():
    """A task that is cancelled as it begins never runs, or is told, or was done before."""
    ran = []

    def asks():
        ran.append(1)
        return current_token().reason

    with TaskGroup(1) as group:
        task = group.submit(asks)
        (won,) = together(lambda: task.cancel("enough"))
        again = task.cancel("again")
        outcome = attempt(task.result)

    assert again is False
    assert task.cancelled() is isinstance(outcome, TaskCancelledError)
    if task.cancelled():
        assert won
        assert ran == []
        assert outcome.reason == "enough"
        return "never ran"
    assert ran == [1]
    assert outcome is None or (won and outcome == "enough")
    return "told as it ran" if won else "too late"


@model("both", "the waiter ran it", "the other worker ran it")
def waiter_against_worker():
    """A task is run once, by the worker that waits for it or by the one that takes it."""
    ran = []

    def inner():
        ran.append(where())
        return len(ran)

    def outer():
        return where(), [group.submit(inner).result() for _ in range(6)]

    with Workers(2) as pool, TaskGroup(pool=pool.group_pool) as group:
        waiter, values = group.submit(outer).result()

    assert values == [1, 2, 3, 4, 5, 6]
    assert len(ran) == 6
    if len(set(ran)) > 1:
        return "both"
    return "the waiter ran it" if ran[0] == waiter else "the other worker ran it"


@model("abandoned")
def abandoning_against_map():
    """Calls that are added as a block is left without those that run change nothing of these."""
    with TaskGroup(1) as group:
        items = Items(group._run, notes, Options(), notes.__code__, 0)
        stretch = Stretch(items, notes, unpack=False)
        stretch.add(["runs"], None)
        items.states[0] = Lane(None)
        together(lambda: items.abandon(0), lambda: stretch.add(["one", "two"], None))

        assert items.task(0).cancelled()
        assert [items.task(index).done() for index in range(1, len(items))] == [False, False]
    return "abandoned"


@model("done")
def wait_against_leaving():
    """Who follows a chain of waits meets blocks that are being left, and rooms that are found."""
    ran = []

    def waits(bounded):
        with TaskGroup(1) as inner:
            inner.submit(notes, ran, "inner")
        for number in range(3):
            bounded.submit(notes, ran, number)
        return "first"

    with TaskGroup(1, max_queued=1) as bounded, TaskGroup(2) as group:
        first = group.submit(waits, bounded)
        second = group.submit(first.result)

    assert (first.result(), second.result()) == ("first", "first")
    assert sorted(ran, key=str) == [0, 1, 2, "inner"]
    return "done"


@model("done")
def deadline_against_end_of_idle_clock():
    """A deadline that comes just as the clock ends, which had none for long, passes in time."""
    first = CancelToken(timeout=1)
    first.wait()

    late, _ = together(lambda: CancelToken(timeout=5), lambda: pass_time(11))
    set_in_time = late.wait()

    assert set_in_time
    assert isinstance(late.reason, TimeoutError)
    assert time.monotonic() >= late.deadline
    return "done"


@model("done")
def deadlines_that_start_the_clock():
    """Deadlines that come at once, where there is no clock, pass in time, and later ones too."""
    tokens = together(*[lambda: CancelToken(timeout=5)] * 2)
    assert all(token.wait() for token in tokens)
    pass_time(11)
    tokens.append(CancelToken(timeout=5))

    assert all(token.wait() for token in tokens)
    assert {type(token.reason) for token in tokens} == {TimeoutError}
    assert time.monotonic() >= max(token.deadline for token in tokens)
    return "done"


@model("done")
def callback_against_end_of_idle_helper():
    """A deadline's callback that comes just as the idle helper ends is called once."""
    ran = []
    called = threading.Event()

    def callback():
        ran.append(1)
        called.set()

    tokens = [CancelToken(timeout=after) for after in (1, 11.5)]
    registrations = [token.on_cancel(callback) for token in tokens]
    called.wait()
    called.clear()

    together(called.wait, lambda: pass_time(10.5))

    assert ran == [1, 1]
    assert [one.unregister() for one in registrations] == [False, False]
    return "done"


@model("waited")
def waiting_for_group_against_end_of_tasks():
    """`wait()` of a group returns when what was submitted before it has ended, and not before."""
    ran = []

    with TaskGroup(2) as group:
        batch = group.map(lambda number: notes(ran, number), range(3))
        group.wait()

        assert sorted(ran) == [0, 1, 2]
        assert batch.done()
        assert batch.results() == [0, 1, 2]
    return "waited"


# --- Processes ------------------------------------------------------------------------------------

FAR = ("backends/processes", "backends/_worker", "_ledger")
COUNT = 5  # tasks of which the second and the third are shipped together, the others alone


@model("nothing is lost", "one is lost", within=FAR)
def death_of_worker_against_its_answer():
    """A value that has come whole stays, what ran is lost, what had not begun runs elsewhere."""
    lost = dies_at(1)

    assert len(lost) < 2 or lost == [1, 2]
    return "one is lost" if lost else "nothing is lost"


@model("nothing is lost", "the last is lost", "both are lost", within=FAR)
def death_of_worker_against_half_a_batch():
    """What a batch has brought home before its end stays, wherever its worker dies then."""
    lost = dies_at(2)

    assert 1 not in lost or lost == [1, 2]
    if len(lost) > 1:
        return "both are lost"
    return "the last is lost" if lost else "nothing is lost"


def dies_at(number):
    """The tasks that are lost if their worker dies at this one, or after it."""
    ran = []
    begun, ends = threading.Event(), threading.Event()

    def far(at):
        ran.append((at, here()))
        if at == number:
            begun.set()
            ends.wait()
        return at

    def body():
        with TaskGroup(pool=machine, policy=CollectAll()) as group:
            groups.append((group, group.map(machine.task(far), range(COUNT))))
            begun.wait()
            pass_time(HELD)  # what is before a task that takes so long comes home
            ends.set()
            machine.started[0].die()

    groups = []
    with Machine(1) as machine:
        left = attempt(body)

    ((group, batch),) = groups
    first, last = machine.started[0], machine.started[-1]
    assert len(machine.started) < 3
    begun_only = len(first.begun) - [process for _, process in ran].count(first)
    lost = []
    for at, task in enumerate(batch.tasks):
        runs = [process for known, process in ran if known == at]
        outcome = attempt(task.result)
        if at in home(first):
            assert (outcome, runs) == (at, [first])
        elif runs == [first] or outcome != at:
            assert isinstance(outcome, WorkerDiedError)
            assert repr(task.name) in str(outcome)
            assert runs == [first] or begun_only, "it had not begun"
            lost.append(at)
        else:
            assert runs == [last]
    assert len(group.failures) == len(lost)
    assert {failure.task for failure in group.failures} == {batch.tasks[at] for at in lost}
    assert (left is None) is not bool(lost)
    return lost


def home(process):
    """The values that a process has sent whole."""
    values = set()
    for word, *rest in map(pickle.loads, process.sent):
        if word == "so far":
            values.update(pickle.loads(outcome)[1] for outcome in rest[0])
        elif word in ("values", "stopped"):
            values.update(rest[1])
    return values


@model("told as it ran", "too late", "killed", within=FAR)
def cancel_of_task_against_its_answer():
    """A task in a worker is told alone, and if it does not stop is killed alone."""
    ran = []
    begun, ends = threading.Event(), threading.Event()

    def far(at):
        ran.append(at)
        if at == 1:
            begun.set()
            ends.wait()
        here().check()
        return at, current_token().reason

    with Machine(1, kill_after=1) as machine, TaskGroup(pool=machine) as group:
        batch = group.map(machine.task(far), range(COUNT))
        task = batch.tasks[1]
        begun.wait()
        won = task.cancel("enough")
        pass_time(1)
        ends.set()

    outcome = attempt(task.result)
    assert won is True
    assert task.cancel("again") is False
    assert sorted(ran) == list(range(COUNT))
    assert [batch.tasks[at].result() for at in range(COUNT) if at != 1] == [
        (at, None) for at in range(COUNT) if at != 1
    ]
    if isinstance(outcome, TaskCancelledError):
        assert outcome.reason == "enough"
        assert len(machine.started) == 2
        return "killed"
    assert outcome in ((1, "enough"), (1, None))
    return "told as it ran" if outcome[1] else "too late"


@model("never ran", within=FAR)
def cancel_of_task_against_the_one_before_it():
    """A task that its worker has, and has not begun when it is cancelled, never begins."""
    ran = []
    begun, ends = threading.Event(), threading.Event()

    def far(at):
        ran.append(at)
        if at == 1:
            begun.set()
            ends.wait()
        return at

    with Machine(1) as machine, TaskGroup(pool=machine) as group:
        batch = group.map(machine.task(far), range(COUNT))
        begun.wait()
        task = batch.tasks[2]
        won = task.cancel("enough")
        ends.set()

    assert won
    assert task.cancelled()
    assert sorted(ran) == [at for at in range(COUNT) if at != 2]
    return "never ran"


def notes(ran, value):
    """A task that says that it ran."""
    ran.append(value)
    return value


def fails(error):
    """A task that fails."""
    raise error


@cancellable
def sleeps(token, ran, value):
    """A task that says that it ran, and sleeps."""
    ran.append(value)
    token.sleep(60)


def where():
    """A name for the calling thread."""
    return fastpool._scope.this_thread()


# --- Exploring ------------------------------------------------------------------------------------

PROGRAMS = 20
ROUNDS = SCHEDULES // 10
FOUND_BY_PROGRAMS = {
    "two cancels win",
    "a callback that was taken back runs",
    "a child is linked after the look",
    "a cancel stumbles over a child that goes",
}


FOUND_BY_LINES = {  # and by which of the smallest models
    "a sleeper looks before it can be found": "one_cancels_one_waits",
    "two cancels win": "two_cancel",
    "the cancel that lost returns before the token is set": "two_cancel",
    "the state is seen before the reason": "two_cancel",
    "a callback is registered after the look": "one_cancels_one_registers",
    "two threads claim a callback": "one_cancels_one_takes_back",
    "a callback that was taken back runs": "one_cancels_one_takes_back",
    "a child is linked after the look": "one_cancels_one_makes_a_child",
    "a child is seen set before its parent": "one_cancels_one_makes_a_child",
    "a cancel stumbles over a child that goes": "one_cancels_one_makes_a_child",
}


@pytest.mark.parametrize("name", MODELS)
def test_model_holds_in_every_order_that_is_tried(name):
    """
    What the contract says of how threads meet is so, and each allowed outcome comes about.
    """
    fn, outcomes = MODELS[name]
    seen = explore(fn)

    assert set(seen) == outcomes


@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if SCHEDULES >= 4000 or not mutant.rare],
    ids=lambda mutant: mutant.name,
)
def test_model_finds_mutant(mutant):
    """
    A model fails, in as many orders, with a fault in the library that it is there to find.
    """
    fn, _ = MODELS[mutant.model]

    with applied(mutant), pytest.raises(Failed):
        explore(fn)


@pytest.mark.parametrize("name", EXHAUSTED)
def test_smallest_model_holds_in_every_order(name):
    """
    What two threads do with one token is right wherever either stops, twice in all.
    """
    fn, outcomes = EXHAUSTED[name]
    seen = exhaust(fn)

    assert set(seen) == outcomes


@pytest.mark.parametrize("name", FOUND_BY_LINES)
def test_smallest_model_finds_mutant(name):
    """
    With a fault in the token, one of the orders of its lines fails.
    """
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    fn, _ = EXHAUSTED[FOUND_BY_LINES[name]]

    with applied(mutant), pytest.raises(Failed):
        exhaust(fn)


@pytest.mark.parametrize("number", range(PROGRAMS))
def test_what_comes_of_a_program_is_allowed(number):
    """
    What a few threads do to a few tokens at once is what they might have done in turns, a step of
    the contract at a time.
    """
    program, ends = generate(PROGRAMS, SEED)[number]

    def explained():
        end = run(program)
        assert end in ends, f"{end} of {program}"
        return end

    assert len(explore(explained, schedules=ROUNDS)) > 1


@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.name in FOUND_BY_PROGRAMS],
    ids=lambda mutant: mutant.name,
)
def test_program_finds_mutant(mutant):
    """
    With a fault in the token, something comes of one of the programs that is not allowed.
    """

    def explained(program, ends):
        assert run(program) in ends

    with applied(mutant), pytest.raises(Failed):
        for program, ends in generate(PROGRAMS, SEED):
            explore(functools.partial(explained, program, ends), schedules=ROUNDS)


def test_every_model_has_a_mutant():
    """
    A model that nothing is known to break would be decoration.
    """
    assert {mutant.model for mutant in MUTANTS if not mutant.rare} == set(MODELS)
    assert set(FOUND_BY_LINES.values()) == set(EXHAUSTED)


def test_mutants_that_are_named_are_there():
    """
    Under that name, and once: what is found by lines or by programs does not get less unseen.
    """
    names = [mutant.name for mutant in MUTANTS]

    assert len(names) == len(set(names))
    assert set(names) >= FOUND_BY_PROGRAMS | set(FOUND_BY_LINES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_can_be_made(mutant):
    """
    Also those that are tried by hand alone.
    """
    with applied(mutant):
        pass
