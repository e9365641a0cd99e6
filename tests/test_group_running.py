"""How a group runs its tasks: where, how many at once, in which context, and on whose pool."""

import contextvars
import functools
import gc
import itertools
import math
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import unittest.mock
import warnings
import weakref
from collections import deque
from contextlib import suppress
from multiprocessing.dummy import DummyProcess
from multiprocessing.pool import Pool, ThreadPool

import pytest
from staging import (
    act_at,
    have_idle_threads_wait,
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
    Batch,
    Cancelled,
    CancelToken,
    FailFast,
    Failure,
    GroupClosedError,
    StuckTaskError,
    Submitter,
    TaskGroup,
    _ledger,
    _submitter,
    cancellable,
    current_token,
    shield,
    use_token,
)
from fastpool._lane import Lane
from fastpool._ledger import Ledger
from fastpool._run import Run
from fastpool.backends import threads

GIL = not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled()
variable = contextvars.ContextVar("variable", default="nothing")


class Crowd:
    """Counts how many threads are inside at once."""

    def __init__(self):
        self.inside = self.peak = 0
        self.lock = threading.Lock()

    def __enter__(self):
        with self.lock:
            self.inside += 1
            self.peak = max(self.peak, self.inside)

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1


def run_script(source):
    """Run a program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def names_of(group):
    """The names of the threads that serve a group now."""
    prefix = f"fastpool-{group.name}-"
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)}


# --- How many at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_as_many_tasks_run_at_once_as_there_are_workers(workers, count):
    """
    All the workers run a task at the same time, and no further task runs beside theirs.
    """
    crowd = Crowd()
    together = threading.Barrier(count)

    def meet():
        with crowd:
            together.wait(timeout=60)

    with TaskGroup(**workers(count)) as group:
        group.starmap(meet, [()] * 4 * count)

    assert crowd.peak == count


@pytest.mark.parametrize(("max_workers", "size", "most"), [(2, 4, 2), (8, 2, 2)])
def test_smaller_of_max_workers_and_pool_bounds_what_runs(make_pool, max_workers, size, most):
    """
    On a pool of yours neither `max_workers` nor the pool's size is ever exceeded.
    """
    crowd = Crowd()
    together = threading.Barrier(most)

    def meet():
        with crowd:
            together.wait(timeout=60)

    with TaskGroup(max_workers, pool=make_pool(size)) as group:
        group.starmap(meet, [()] * 16)

    assert crowd.peak == most


@pytest.mark.parametrize(("cpus", "count"), [(1, 5), (3, 7), (28, 32), (64, 32)])
def test_default_workers_follow_the_cpus(cpus, count, monkeypatch):
    """
    Without a number, four more tasks than there are processors run at once, 32 at the most.
    """
    crowd = Crowd()
    together = threading.Barrier(count)

    def meet():
        with crowd:
            together.wait(timeout=60)

    monkeypatch.setattr("fastpool._taskgroup._CPUS", cpus)
    with TaskGroup() as group:
        group.starmap(meet, [()] * (4 * count))

    assert crowd.peak == count


def test_cpus_are_counted_as_the_system_counts_them():
    """
    Those that the process may use, where Python knows them.
    """
    done = run_script(
        """
import os
os.cpu_count = os.process_cpu_count = lambda: 3
from fastpool import TaskGroup
from fastpool.futures import GroupExecutor

with TaskGroup() as group:
    print(GroupExecutor(group)._max_workers)
"""
    )

    assert (done.stdout.split(), done.stderr) == (["7"], "")


@pytest.mark.parametrize("refused", [0, -1, 1.5, True, "4", math.nan])
@pytest.mark.parametrize("make", [TaskGroup, functools.partial(fastpool.map, abs, [1])])
def test_wrong_number_of_workers_is_refused(make, refused):
    """
    A number of workers that is none raises at once, and the message shows it.
    """
    with pytest.raises((TypeError, ValueError), match="max_workers must be") as caught:
        make(max_workers=refused)

    assert repr(refused) in str(caught.value)


def test_threads_start_as_tasks_need_them():
    """
    A group of 64 workers has as many threads as it has had tasks at once.
    """
    fastpool.shutdown()
    release = threading.Event()
    counts = []

    def hold(started):
        started.set()
        release.wait(timeout=60)

    with TaskGroup(max_workers=64) as group:
        counts.append(len(names_of(group)))
        for _ in range(3):
            started = threading.Event()
            group.submit(hold, started)
            started.wait(timeout=60)
            counts.append(len(names_of(group)))
        release.set()

    assert counts == [0, 1, 2, 3]


# --- Threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pool": "threads"}])
def test_threads_are_named_after_the_group_they_serve(options):
    """
    A thread is called `fastpool-<group>-<n>` while it serves a group, each by its own number.
    """
    together = threading.Barrier(3)

    def name():
        together.wait(timeout=60)
        return threading.current_thread().name

    with TaskGroup(3, name="thumbnails", **options) as group:
        names = group.starmap(name, [()] * 3).results()

    assert len(set(names)) == 3
    for each in names:
        prefix, _, number = each.rpartition("-")
        assert prefix == "fastpool-thumbnails"
        assert number.isdigit()
    assert names_of(group) == set()


def test_group_without_a_name_is_given_one():
    """
    Groups that were given no name have different ones, which their threads bear.
    """
    with TaskGroup() as one, TaskGroup() as other:
        seen = one.submit(lambda: threading.current_thread().name).result()

    assert one.name
    assert one.name != other.name
    assert seen.startswith(f"fastpool-{one.name}-")


# --- Context ------------------------------------------------------------------------------------


def test_task_sees_the_variables_of_its_submit(workers):
    """
    A task runs in the context in which it was submitted, not in that of its start.
    """
    release = threading.Event()

    with TaskGroup(**workers(1)) as group:
        group.submit(release.wait, 60)
        token = variable.set("then")
        task = group.submit(variable.get)
        variable.set("now")
        release.set()
        seen = task.result()
        variable.reset(token)

    assert seen == "then"


def test_variable_set_in_a_task_stays_there(workers):
    """
    What a task does to its context reaches neither the next task of its worker nor the body.
    """

    def leak(value):
        before = variable.get()
        variable.set(value)
        return before, threading.get_ident()

    with TaskGroup(**workers(1)) as group:
        seen = group.map(leak, ["first", "second", "third"]).results()
        seen.append(group.submit(leak, "fourth").result())

    assert [value for value, _ in seen] == ["nothing"] * 4
    assert len({thread for _, thread in seen}) == 1
    assert variable.get() == "nothing"


def test_task_submitted_by_a_task_has_the_context_of_that_task(workers):
    """
    A nested submit copies the context of the task that submits.
    """

    def outer():
        variable.set("outer's")
        return group.submit(variable.get)

    with TaskGroup(**workers(2)) as group:
        inner = group.submit(outer).result()
        beside = group.submit(variable.get)

    assert inner.result() == "outer's"
    assert beside.result() == "nothing"


def test_context_of_a_foreign_thread_reaches_its_tasks(workers):
    """
    What another thread submits runs in a copy of that thread's context.
    """

    def submit():
        variable.set("foreign")
        return group.submit(variable.get).result()

    with TaskGroup(**workers(1)) as group:
        seen = in_thread(submit)

    assert seen == "foreign"


# --- Tokens -------------------------------------------------------------------------------------


def test_each_task_has_a_token_of_its_own(workers):
    """
    The current token differs from task to task, and from the group's.
    """

    @cancellable
    def look(token):
        together.wait(timeout=60)
        return token, current_token(), current_token()

    together = threading.Barrier(2)
    with TaskGroup(**workers(2)) as group:
        looks = group.starmap(look, [(), ()]).results()

    for injected, current, again in looks:
        assert injected is current is again
        assert current is not group.token
    assert looks[0][0] is not looks[1][0]


def test_token_of_a_task_hears_the_groups(workers):
    """
    Cancelling the group sets every task's token, with the group's reason.
    """
    together = threading.Barrier(3)

    def reason():
        token = current_token()
        together.wait(timeout=60)
        token.wait(timeout=60)
        return token.reason

    with TaskGroup(**workers(2)) as group:
        batch = group.starmap(reason, [(), ()])
        together.wait(timeout=60)
        group.cancel("enough")

    assert batch.results() == ["enough", "enough"]


def test_token_of_a_task_tells_nobody(workers):
    """
    A task that sets its own token is cancelled alone.
    """
    together = threading.Barrier(2)

    def stop_myself():
        current_token().cancel("mine")
        together.wait(timeout=60)
        current_token().check()

    def look():
        together.wait(timeout=60)
        return current_token().cancelled()

    with TaskGroup(**workers(2)) as group:
        stopped = group.submit(stop_myself)
        beside = group.submit(look)

    assert stopped.cancelled()
    assert beside.result() is False
    assert not group.token.cancelled()
    assert group.failures == ()


# --- Who may submit -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8])
def test_tasks_submit_a_thousand_tasks(workers, count):
    """
    Leaving waits for the 1 024 tasks that 32 tasks submit to their own group.
    """
    ran = []

    def branch(number):
        for leaf in range(32):
            group.submit(ran.append, (number, leaf))

    with TaskGroup(**workers(count)) as group:
        group.map(branch, range(32))

    assert sorted(ran) == list(itertools.product(range(32), range(32)))


@pytest.mark.parametrize("count", [1, 4])
def test_chain_of_ten_thousand_tasks_needs_no_recursion(workers, count):
    """
    Each task submits the next, as deep as one likes, and leaving waits for the last.
    """
    depths = set()
    last = []

    def link(left):
        depth = 0
        frame = sys._getframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back
        depths.add(depth)
        if left:
            group.submit(link, left - 1)
        else:
            last.append(group.name)

    with TaskGroup(name="chain", **workers(count)) as group:
        group.submit(link, 10_000)

    assert last == ["chain"]
    assert max(depths) - min(depths) < 10


def test_other_threads_submit_while_the_block_is_open(workers):
    """
    What four threads submit at once all runs.
    """
    ran = []
    together = threading.Barrier(4)

    def submit_many(number):
        together.wait(timeout=60)
        for item in range(250):
            group.submit(ran.append, (number, item))

    with TaskGroup(**workers(4)) as group:
        threads = [threading.Thread(target=submit_many, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

    assert sorted(ran) == list(itertools.product(range(4), range(250)))


def test_other_threads_submit_during_the_final_wait(watched, workers):
    """
    A group whose body has ended takes tasks from other threads until it is left.
    """
    leaving = threading.current_thread()
    release = threading.Event()
    late = []

    def submit_late():
        until(lambda: is_asleep(leaving))
        late.append(group.submit(resize, 404))
        release.set()

    thread = threading.Thread(target=submit_late)
    with TaskGroup(**workers(2)) as group:
        group.submit(release.wait, 60)
        thread.start()
    thread.join(timeout=60)

    assert late[0].result(timeout=0) == 404


def test_submit_that_races_with_the_end_runs_or_is_refused(watched, workers):
    """
    At whatever line a submit is when the block ends, its task runs inside the block or is none.
    """
    main = threading.current_thread()

    def race(step):
        reached, left = threading.Event(), threading.Event()
        outcomes, ran = [], []

        def pause():
            # The body ends now: it is left, or waits for what is being submitted.
            reached.set()
            until(lambda: left.is_set() or is_asleep(main))

        def submit():
            sys.settrace(act_at(step, pause))
            try:
                outcomes.append(group.submit(ran.append, 404))
            except GroupClosedError as error:
                outcomes.append(error)
            finally:
                sys.settrace(None)
                passed.append(reached.is_set())
                reached.set()

        passed = []
        thread = threading.Thread(target=submit)
        with TaskGroup(**workers(1)) as group:
            group.submit(resize, 1).result(timeout=60)
            thread.start()
            reached.wait(timeout=60)
        left.set()
        thread.join(timeout=60)
        if isinstance(outcomes[0], GroupClosedError):
            return passed[0], "refused", ran
        return passed[0], outcomes[0].result(timeout=0), ran

    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert len(races) > 5
    assert all(ran == ([] if outcome == "refused" else [404]) for _, outcome, ran in races)
    assert {outcome for _, outcome, _ in races} == {None, "refused"}


def test_worker_leaves_what_comes_after_its_group_has_closed(monkeypatch):
    """
    A worker at rest that has not looked again runs nothing for a submit that is to be refused.
    """
    resting, checked, closed, queued, began, left = (threading.Event() for _ in range(6))
    rested, outcome = [], []
    passed, rest, end, refuse_late = Run.passed, Run.rest, Run.end, Run.refuse_late

    def passes(run, lane):  # 1. the worker has said that it is idle, and is about to look again
        passed(run, lane)
        resting.set()
        queued.wait(timeout=60)

    def rests(run, lane):
        rested.append(rest(run, lane))
        return rested[-1]

    def checks():  # 2. another thread has seen that the group is open
        checked.set()
        closed.wait(timeout=60)
        return contextvars.copy_context()

    def ends(run):  # 3. the block has closed the group
        closed.set()
        thread.join(timeout=60)
        return end(run)

    def refuses(run, tasks, fn):  # 4. the call stands in the queue; the worker looks
        queued.set()
        until(lambda: began.is_set() or any(rested))
        refuse_late(run, tasks, fn)

    def runs_on():
        began.set()
        left.wait(timeout=60)

    def submits():
        try:
            outcome.append(group.submit(runs_on))
        except GroupClosedError as error:
            outcome.append(error)

    thread = threading.Thread(target=submits)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "passed", passes)
        patch.setattr(Run, "rest", rests)
        patch.setattr(Run, "end", ends)
        patch.setattr(Run, "refuse_late", refuses)
        with TaskGroup(1) as group:
            group.submit(resize, 1)
            assert resting.wait(timeout=60)
            patch.setattr(_submitter, "copy_context", checks)
            thread.start()
            assert checked.wait(timeout=60)
    is_running = began.is_set()
    left.set()

    assert not is_running
    assert isinstance(outcome[0], GroupClosedError)


LATE_CALLS = {
    "submit": lambda group, items: group.submit(resize, *items),
    "map": lambda group, items: group.map(resize, list(items)),
    "map over an iterator": lambda group, items: group.map(resize, items),
}


@pytest.mark.parametrize("ends", ["left", "abandoned"])
@pytest.mark.parametrize("call", LATE_CALLS.values(), ids=LATE_CALLS)
def test_call_that_has_just_seen_the_group_open_is_refused(monkeypatch, call, ends):
    """
    The block ends between its look and the queue, with what still runs or without.
    """
    late, looked, left, release = (threading.Event() for _ in range(4))

    def looks():
        if late.is_set():
            looked.set()
            left.wait(timeout=60)
        return contextvars.copy_context()

    def items():
        if call is LATE_CALLS["map over an iterator"]:
            yield 1
        late.set()
        yield 404

    monkeypatch.setattr(_submitter, "copy_context", looks)
    with (
        suppress(StuckTaskError),
        warnings.catch_warnings(action="ignore"),
        TaskGroup(2, grace=0.01, on_stuck="abandon") as group,
    ):
        if ends == "abandoned":
            group.submit(release.wait, 60)
        caller, outcome = start(call, group, items())
        assert looked.wait(timeout=60)
        if ends == "abandoned":
            group.cancel()
    left.set()
    caller.join(timeout=60)
    release.set()

    assert [type(error) for error in outcome] == [GroupClosedError]


def test_submit_that_comes_as_the_group_is_about_to_close_keeps_it_open(monkeypatch):
    """
    Everything is at rest, and the block looks once more.
    """
    at_rest = Run.at_rest
    late = []

    def submits_first(run):
        if run.closing is not None and not late:
            late.append(in_thread(group.submit, resize, 404))
        return at_rest(run)

    monkeypatch.setattr(Run, "at_rest", submits_first)
    with TaskGroup(1) as group:
        pass

    assert late[0].result() == 404


def test_submit_that_comes_just_before_the_group_looks_whether_it_may_close_is_run(
    make_pool, monkeypatch
):
    """
    Everything was at rest, and no thread of the pool is free yet for what has come.
    """
    close, release, late = Run.close, threading.Event(), []

    def submits_first(run):
        if not late:
            pool.apply_async(release.wait, (60,))
            late.append(in_thread(group.submit, resize, 404))
        closed = close(run)
        release.set()
        return closed

    pool = make_pool(1)
    monkeypatch.setattr(Run, "close", submits_first)
    with TaskGroup(pool=pool) as group:
        pass

    assert late[0].result() == 404


# --- A submit that is refused -------------------------------------------------------------------


def what_submit_raises(group):
    try:
        group.submit(resize, 404)
    except BaseException as error:
        return error
    return None


def in_the_body(outer, group):
    group.cancel("enough")
    return what_submit_raises(group)


def in_a_task_of_the_group(outer, group):
    def late():
        group.cancel("enough")
        return what_submit_raises(group)

    task = group.submit(late)
    with shield():
        return task.result(timeout=60)


def in_a_foreign_thread(outer, group):
    group.cancel("enough")
    return in_thread(what_submit_raises, group)


def in_a_foreign_thread_with_the_context(outer, group):
    group.cancel("enough")
    return in_thread(contextvars.copy_context().run, what_submit_raises, group)


def in_a_task_of_a_group_around(outer, group):
    group.cancel("enough")
    task = outer.submit(what_submit_raises, group)
    with shield():
        return task.result(timeout=60)


def in_a_task_of_a_group_inside(outer, group):
    with shield(), TaskGroup() as inner:
        group.cancel("enough")
        return inner.submit(what_submit_raises, group).result(timeout=60)


def in_a_shield(outer, group):
    group.cancel("enough")
    with shield():
        return what_submit_raises(group)


def in_a_shield_in_a_task(outer, group):
    def late():
        group.cancel("enough")
        with shield():
            return what_submit_raises(group)

    task = group.submit(late)
    with shield():
        return task.result(timeout=60)


def under_another_token_that_is_set(outer, group):
    group.cancel("enough")
    other = CancelToken()
    other.cancel("enough")
    with use_token(other):
        return what_submit_raises(group)


@pytest.mark.parametrize(
    ("somewhere", "expected"),
    [
        (in_the_body, Cancelled),
        (in_a_task_of_the_group, Cancelled),
        (in_a_foreign_thread, GroupClosedError),
        (in_a_foreign_thread_with_the_context, Cancelled),
        (in_a_task_of_a_group_around, GroupClosedError),
        (in_a_task_of_a_group_inside, GroupClosedError),
        (in_a_shield, GroupClosedError),
        (in_a_shield_in_a_task, GroupClosedError),
        (under_another_token_that_is_set, Cancelled),
    ],
)
def test_submit_to_a_cancelled_group_depends_on_the_current_token(workers, somewhere, expected):
    """
    It raises `Cancelled` where the current token is set, elsewhere `GroupClosedError`.
    """
    with TaskGroup() as outer, suppress(Cancelled), TaskGroup(**workers(2)) as group:
        error = somewhere(outer, group)

    assert type(error) is expected
    assert error.reason == "enough"
    if expected is GroupClosedError:
        assert isinstance(error, RuntimeError)
        assert "resize" in str(error)
        assert group.name in str(error)


def test_group_closed_error_has_the_failure_as_its_reason(workers):
    """
    Whoever submits to a group that has failed, and is none of it, is told of the failure.
    """
    failure = ValueError("bad header")

    def fails():
        raise failure

    with pytest.raises(ValueError, match="bad header"), TaskGroup(**workers(1)) as group:
        group.submit(fails)
        group.token.wait(timeout=60)
        error = in_thread(what_submit_raises, group)

    assert type(error) is GroupClosedError
    assert error.reason is failure


def test_loop_that_submits_stops_when_a_task_fails(workers):
    """
    A body that goes on submitting after a failure hears `Cancelled`, and the failure leaves.
    """

    def fails():
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup(**workers(2)) as group:
        group.submit(fails)
        for width in itertools.count():
            group.submit(resize, width)


def test_submit_that_meets_a_recorded_failure_sets_the_token_first():
    """
    Between the record of a failure and its token a submit in the body hears `Cancelled`.
    """
    recorded, met = threading.Event(), threading.Event()

    def stop_between(frame, event, argument):
        # The worker stops at the first line at which the failure is there and the token is not
        # set, and goes on once the body has submitted.
        if not recorded.is_set() and group.failures and not group.token.cancelled():
            recorded.set()
            met.wait(timeout=60)
        return stop_between

    def fails():
        trace_this_thread(stop_between)
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup(1) as group:
        group.submit(fails)
        assert recorded.wait(timeout=60)
        error = what_submit_raises(group)
        was_set = group.token.cancelled()
        met.set()
    fastpool.shutdown()

    assert type(error) is Cancelled
    assert was_set


CALLS = {
    "submit": lambda group: group.submit(resize, 404),
    "map": lambda group: group.map(resize, [404]),
    "starmap": lambda group: group.starmap(resize, [(404,)]),
    "with_options": lambda group: group.with_options(timeout=5).submit(resize, 404),
    "map with_options": lambda group: group.with_options(timeout=5).map(resize, [404]),
    "a partial": lambda group: group.submit(functools.partial(resize, 404)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_submit_to_a_group_that_was_never_entered_is_refused(workers, call):
    """
    A group outside its block takes nothing, and the message names group and function.
    """
    group = TaskGroup(name="thumbnails", **workers(1))

    with pytest.raises(GroupClosedError, match=r"resize.*'thumbnails'"):
        call(group)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_submit_to_a_group_that_has_ended_is_refused(workers, call):
    """
    A group that was left takes nothing, and the message names group and function.
    """
    with TaskGroup(name="thumbnails", **workers(1)) as group:
        group.submit(resize, 1)

    with pytest.raises(GroupClosedError, match=r"resize.*'thumbnails'"):
        call(group)


@pytest.mark.parametrize("failed", [False, True])
def test_ended_group_that_was_cancelled_is_closed_to_its_own_tasks_context(failed):
    """
    Once it has ended, a group is closed to everybody, a context with its set token included.
    """
    with suppress(ValueError), TaskGroup() as group:
        context = contextvars.copy_context()
        if failed:
            raise ValueError("bad header")

    error = context.run(what_submit_raises, group)

    assert type(error) is GroupClosedError


# --- Entered once -------------------------------------------------------------------------------


def test_group_is_entered_only_once(workers):
    """
    A group that was left cannot be entered again.
    """
    group = TaskGroup(name="thumbnails", **workers(1))
    with group:
        pass

    with pytest.raises(RuntimeError, match="thumbnails"), group:
        pass


def test_entering_an_open_group_leaves_it_as_it_is(workers):
    """
    Who enters an open group again is refused, and the group goes on.
    """
    with TaskGroup(**workers(1)) as group:
        with pytest.raises(RuntimeError, match="entered"), group:
            pass
        task = group.submit(resize, 404)

    assert task.result() == 404
    assert group.failures == ()


def test_of_two_threads_that_enter_one_group_one_wins():
    """
    At whatever line the first thread is when the second enters, exactly one of them gets in.
    """

    def race(step):
        group = TaskGroup(1)
        tried = [threading.Event(), threading.Event()]
        entered, refused = [], []

        def enter(me):
            try:
                group.__enter__()
            except RuntimeError as error:
                refused.append(error)
            else:
                entered.append(me)
            finally:
                sys.settrace(None)
                tried[me].set()
            if me in entered:
                tried[not me].wait(timeout=60)
                results.append(group.submit(resize, 404).result(timeout=60))
                group.__exit__(None, None, None)

        def let_the_second_enter():
            second.start()
            tried[1].wait(timeout=60)

        def first():
            sys.settrace(act_at(step, let_the_second_enter))
            enter(0)

        results = []
        threads = [threading.Thread(target=first), threading.Thread(target=enter, args=(1,))]
        second = threads[1]
        threads[0].start()
        until(lambda: tried[0].is_set() or tried[1].is_set())
        tried[0].wait(timeout=60)
        reached = second.ident is not None
        if not reached:
            second.start()
        for thread in threads:
            thread.join(timeout=60)
        return reached, len(entered), len(refused), results

    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert len(races) > 3
    assert {tuple(race[1:3]) for race in races} == {(1, 1)}
    assert all(race[3] == [404] for race in races)


# --- The group's token --------------------------------------------------------------------------


def test_group_hears_the_token_current_where_it_is_entered(workers):
    """
    A group is a child of the scope's token around its block.
    """
    token = CancelToken()

    with use_token(token), pytest.raises(Cancelled, match="rain"), TaskGroup(**workers(1)) as group:
        token.cancel("rain")

    assert group.token.reason == "rain"


def test_group_hears_the_group_whose_body_it_is_entered_in(workers):
    """
    A group is a child of the group around it.
    """
    with TaskGroup() as outer, TaskGroup(**workers(1)) as inner:
        outer.cancel("rain")
        reason = inner.token.reason

    assert reason == "rain"


def test_group_hears_the_task_that_enters_it(workers):
    """
    A group is a child of the task around it, and ends with it alone.
    """

    def nest():
        with TaskGroup() as inner:
            entered.set()
            inner.token.wait(timeout=60)
            reasons.append(inner.token.reason)

    entered = threading.Event()
    reasons = []
    with TaskGroup(**workers(1)) as group:
        task = group.submit(nest)
        entered.wait(timeout=60)
        task.cancel("rain")

    assert reasons == ["rain"]
    assert task.cancelled()
    assert not group.token.cancelled()


def test_group_hears_the_token_it_was_given():
    """
    A group is a child of `token=` besides, and its block ends as that is set.
    """
    token = CancelToken()

    with pytest.raises(Cancelled, match="rain"), TaskGroup(token=token) as group:
        token.cancel("rain")

    assert group.token.reason == "rain"


def test_group_does_not_hear_the_token_current_where_it_was_made():
    """
    Only where it is entered counts.
    """
    token = CancelToken()
    with use_token(token):
        group = TaskGroup()

    with group:
        token.cancel("rain")
        deaf = not group.token.cancelled()

    assert deaf


def test_parents_are_linked_and_the_deadline_begins_on_entry():
    """
    A group that has not been entered hears nobody and has no deadline.
    """
    token = CancelToken()
    token.cancel("rain")
    group = TaskGroup(token=token, timeout=60)
    before = group.token.cancelled(), group.token.deadline

    entering = time.monotonic()
    with pytest.raises(Cancelled), group:
        after = group.token.cancelled(), group.token.deadline
        entered = time.monotonic()

    assert before == (False, None)
    assert after[0]
    assert entering + 60 <= after[1] <= entered + 60


def test_group_can_be_cancelled_before_it_is_entered():
    """
    The token exists from the start: what cancels it early keeps every task from starting.
    """
    group = TaskGroup()
    first, second = group.cancel("rain"), group.cancel("snow")

    with group:
        error = what_submit_raises(group)

    assert (first, second) == (True, False)
    assert type(error) is Cancelled
    assert error.reason == "rain"


def test_nothing_turns_the_token_of_a_group_that_has_ended(workers):
    """
    On leaving a group is unlinked from its parents and loses its deadline.
    """

    @cancellable
    def fails(token):
        raise ValueError("bad header")

    around, given = CancelToken(), CancelToken()
    arguments = workers(1)
    for limit in (0.05, 1, 20):  # a busy machine may take longer than the first
        group = TaskGroup(token=given, timeout=limit, **arguments)
        with suppress(TimeoutError), use_token(around), group:
            group.submit(resize, 404)
        if not group.token.cancelled():
            break
    around.cancel()
    given.cancel()
    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(group.token)
    CancelToken(timeout=limit).wait()

    assert (group.token.deadline, group.token.remaining()) == (None, None)
    assert group.cancel() is False
    assert group.token.cancel() is False
    assert not group.token.cancelled()
    assert group.token.reason is None
    assert group.failures == ()


def test_token_of_a_group_that_was_cancelled_stays_set(workers):
    """
    The state never goes back, and cancelling after the end is False.
    """
    with TaskGroup(**workers(1)) as group:
        group.cancel("rain")

    assert group.token.cancelled()
    assert group.token.reason == "rain"
    assert group.cancel("snow") is False
    assert group.token.reason == "rain"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("pool", ["None", "ThreadPool(2)"])
def test_open_group_is_closed_in_a_forked_child(pool):
    """
    The child's copy takes nothing and is left at once; the parent's goes on, and so do new groups.
    """
    done = run_script(
        f"""
import os, signal, sys, threading, warnings
from multiprocessing.pool import Pool, ThreadPool
import fastpool
from fastpool import GroupClosedError, TaskGroup

warnings.simplefilter("ignore", DeprecationWarning)  # that other threads run is the point
pool = {pool}
release, running = threading.Event(), threading.Event()

def hold():
    running.set()
    release.wait(60)
    return "done"

def in_child(group, task, queued):
    signal.alarm(60)
    if fastpool.dump() != ():
        os._exit(6)
    try:
        with group_left(group):
            try:
                group.submit(abs, 1)
            except GroupClosedError as error:
                assert "abs" in str(error) and "parent" in str(error), error
            else:
                os._exit(3)
            raise KeyError("of the body")
    except KeyError:
        pass
    except BaseException:
        os._exit(4)
    else:
        os._exit(7)
    if fastpool.map(abs, [-1, -2]) != [1, 2]:
        os._exit(5)
    os._exit(0)

class group_left:
    def __init__(self, group):
        self.group = group
    def __enter__(self):
        return self.group
    def __exit__(self, *error):
        return self.group.__exit__(*error)

with TaskGroup(1, name="parent's", pool=pool) as group:
    task = group.submit(hold)
    queued = group.submit(abs, -404)
    running.wait(60)
    child = os.fork()
    if not child:
        in_child(group, task, queued)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    release.set()
print(status, task.result(), queued.result())
if pool is not None:
    pool.close()
    pool.join()
"""
    )

    assert (done.stdout.split(), done.stderr) == (["0", "done", "404"], "")


# --- Calls that cannot work ---------------------------------------------------------------------


async def coroutine():
    """What fastpool does not run."""


def generator():
    """What a worker would not run."""
    yield 1


async def async_generator():
    """Neither."""
    yield 1


REFUSED = [
    (resize(404), r"function itself.*404.*submit\(fetch, url\)"),
    (None, "function itself"),
    ("resize", "function itself"),
    (coroutine, r"coroutine.*fastpool\.aio"),
    (functools.partial(coroutine), r"coroutine.*fastpool\.aio"),
    (generator, "generator"),
    (functools.partial(generator), "generator"),
    (async_generator, "generator"),
]


@pytest.mark.parametrize(("fn", "message"), REFUSED)
def test_what_no_worker_can_run_is_refused_by_submit(workers, fn, message):
    """
    A call instead of a function, a coroutine or generator function get a helpful `TypeError`.
    """
    with TaskGroup(**workers(1)) as group:
        with pytest.raises(TypeError, match=message):
            group.submit(fn)
        task = group.submit(resize, 404)

    assert task.result() == 404
    assert group.failures == ()


@pytest.mark.parametrize("fn", [fn for fn, _ in REFUSED])
@pytest.mark.parametrize("submit", ["map", "starmap"])
def test_what_no_worker_can_run_is_refused_by_map(submit, fn):
    """
    Nothing is taken from the input then.
    """
    items = iter([(1,), (2,)])

    with TaskGroup() as group, pytest.raises(TypeError, match="function"):
        getattr(group, submit)(fn, items)

    assert list(items) == [(1,), (2,)]
    assert group.failures == ()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"timeout": math.nan}, ValueError, "timeout"),
        ({"timeout": "5"}, TypeError, "timeout.*'5'"),
        ({"grace": math.nan}, ValueError, "grace"),
        ({"pool": "treads"}, ValueError, "no pool named 'treads'.*threads"),
        ({"pool": 42}, TypeError, "pool.*42"),
        ({"policy": FailFast}, TypeError, r"policy.*FailFast\(\)"),
        ({"policy": 42}, TypeError, "policy.*42"),
        ({"observers": [42]}, TypeError, "observer.*42"),
        ({"observers": print}, TypeError, r"observers.*\[<built-in"),
        ({"token": threading.Event()}, TypeError, "token.*CancelToken"),
        ({"name": 42}, TypeError, "name.*42"),
        ({"workers": 4}, TypeError, "workers"),
    ],
)
@pytest.mark.parametrize("make", [TaskGroup, functools.partial(fastpool.map, abs, [1])])
def test_argument_of_the_wrong_kind_is_refused(make, keywords, error, message):
    """
    A group's arguments are looked at when it is made, and the message says what is wrong.
    """
    with pytest.raises(error, match=message):
        make(**keywords)


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"timeout": math.nan}, ValueError),
        ({"timeout": "5"}, TypeError),
        ({"name": 42}, TypeError),
    ],
)
def test_option_of_the_wrong_kind_is_refused(keywords, error):
    """
    The options of tasks are looked at when they are given.
    """
    [what] = keywords

    with TaskGroup() as group, pytest.raises(error, match=what):
        group.with_options(**keywords)


# --- map ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iterables", "expected"),
    [
        ([[3, 1, 2]], [(3,), (1,), (2,)]),
        ([[1, 2, 3], "ab"], [(1, "a"), (2, "b")]),
        ([range(10**9), range(4)], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ([[1], [2], [3], [4], [5], [6], [7]], [(1, 2, 3, 4, 5, 6, 7)]),
        ([[1, 2], []], []),
        ([[]], []),
    ],
)
@pytest.mark.parametrize("through", ["group", "with_options", "fastpool"])
def test_map_reads_to_the_end_of_the_shortest_iterable(through, iterables, expected):
    """
    One task for each set of items, in their order; none for an empty iterable.
    """

    def collect(*args):
        return args

    if through == "fastpool":
        results = fastpool.map(collect, *iterables)
    else:
        with TaskGroup() as group:
            submitter = group if through == "group" else group.with_options(timeout=60)
            batch = submitter.map(collect, *iterables)
        results = batch.results()

        assert isinstance(batch, Batch)
        assert len(batch) == len(expected)

    assert results == expected


@pytest.mark.parametrize("items", [[], [(1,), (2, 3), [4, 5, 6], ()]])
def test_starmap_spreads_each_item(items):
    """
    Each item holds the arguments of one task, as many as it likes.
    """

    def collect(*args):
        return args

    with TaskGroup() as group:
        batch = group.starmap(collect, iter(items))

    assert batch.results() == [tuple(item) for item in items]


class Proxy:
    """Can be called, and has every attribute there is: a client of some service, say."""

    def __getattr__(self, name):
        return Proxy() if name.islower() else object.__getattribute__(self, name)

    def __call__(self, *args):
        return args


class Nameless:
    """Can be called, but not by name."""

    @property
    def __name__(self):
        raise SystemExit("no name")

    def __call__(self, *args):
        return args


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Proxy, "Proxy"),
        (Nameless, "Nameless"),
        (lambda: functools.partial(functools.partial(Nameless())), "Nameless"),
        (lambda: unittest.mock.Mock(side_effect=lambda *args: args), "Mock"),
        (lambda: unittest.mock.MagicMock(side_effect=lambda *args: args), "MagicMock"),
    ],
)
def test_whatever_can_be_called_is_run(workers, make, name):
    """
    Whatever it says when its name is asked for.
    """
    fn = make()
    with TaskGroup(**workers(1)) as group:
        task = group.submit(fn, 404)
        batch = group.map(fn, [404])

    assert task.name == name
    assert task.result() == (404,)
    assert batch.results() == [(404,)]


def test_function_may_have_any_keyword(workers):
    """
    No keyword is kept from the function.
    """

    def collect(*args, **kwargs):
        return args, kwargs

    keywords = {"fn": 1, "self": 2, "name": 3, "timeout": 4, "token": 5, "args": 6, "kwargs": 7}
    with TaskGroup(**workers(1)) as group:
        task = group.submit(collect, 0, **keywords)

    assert task.result() == ((0,), keywords)


@pytest.mark.parametrize("through", ["group", "with_options", "fastpool"])
def test_map_without_iterables_is_refused(through):
    """
    Nothing to map over is a mistake, as it is for the built-in.
    """
    with TaskGroup() as group, pytest.raises(TypeError, match="iterable"):
        {"group": group, "with_options": group.with_options(), "fastpool": fastpool}[through].map(
            resize
        )

    assert group.failures == ()


@pytest.mark.parametrize("call", ["map", "starmap"])
def test_map_over_what_is_not_iterable_is_refused(call):
    """
    It raises the built-in's `TypeError`, there.
    """
    with (
        suppress(TypeError),
        TaskGroup() as group,
        pytest.raises(TypeError, match="iterable"),
    ):
        getattr(group, call)(resize, 404)


class BadIter:
    """An input that raises before its first item."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        raise self.error


def bad_input(error):
    """An input that raises after two items."""
    yield (1,)
    yield (2,)
    raise error


@pytest.mark.parametrize("item", [404, "ab", b"ab"])
def test_starmap_over_single_arguments_is_refused(item):
    """
    A string is one argument, and not as many as it has letters; the error names `map`.
    """
    with pytest.raises(TypeError, match=r"starmap\(\) wants a tuple.*map\(resize"):  # noqa: SIM117
        with TaskGroup() as group:
            group.starmap(resize, [item])

    assert [failure.task for failure in group.failures] == [None]


@pytest.mark.parametrize("handled", [False, True])
@pytest.mark.parametrize("make", [bad_input, BadIter])
@pytest.mark.parametrize("call", ["map", "starmap", "map with_options"])
def test_input_that_raises_is_a_failure_of_the_group(workers, call, make, handled):
    """
    It is raised there, recorded once and by no task, and cancels, whoever catches it.
    """
    broken = OSError("no such page")

    def produce(group):
        submitter = group.with_options(timeout=60) if "options" in call else group
        getattr(submitter, call.split()[0])(resize, make(broken))

    with pytest.raises(OSError, match="no such page") as left, TaskGroup(**workers(1)) as group:
        if handled:
            with pytest.raises(OSError, match="no such page") as raised:
                produce(group)
            here = raised.value
        else:
            try:
                produce(group)
            except OSError as error:
                here = error
                raise
            finally:
                turned = group.token.reason

    assert left.value is here is broken
    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, broken)]
    assert all(isinstance(failure, Failure) for failure in group.failures)
    assert group.token.reason is broken
    if not handled:
        assert turned is broken


def test_input_that_raises_in_a_task_is_recorded_once(workers):
    """
    The task through which the input's error leaves adds no failure of its own.
    """
    broken = OSError("no such page")

    def produce():
        group.starmap(resize, bad_input(broken))

    with pytest.raises(OSError, match="no such page") as left, TaskGroup(**workers(2)) as group:
        group.submit(produce)

    assert left.value is broken
    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, broken)]


def test_input_of_a_fastpool_map_that_raises_leaves_it():
    """
    The whole block in one line raises what its input raised.
    """
    broken = OSError("no such page")

    with pytest.raises(OSError, match="no such page") as left:
        fastpool.map(resize, bad_input(broken))

    assert left.value is broken


def test_input_may_submit_to_the_group(workers):
    """
    A generator that `map` reads from may use the group itself.
    """
    helpers = []

    def pages():
        for number in range(10):
            helpers.append(group.submit(resize, -number))
            yield helpers[-1].result()

    with TaskGroup(**workers(2)) as group:
        batch = group.map(abs, pages())

    assert batch.results() == list(range(10))
    assert len(helpers) == 10


def test_input_is_read_in_the_calling_thread_and_context(workers):
    """
    What `map` reads runs where `map` was called.
    """
    seen = []

    def pages():
        seen.append((threading.current_thread(), current_token()))
        yield 1

    with TaskGroup(**workers(1)) as group:
        group.map(resize, pages())

    assert seen == [(threading.current_thread(), group.token)]


@pytest.mark.parametrize("state", ["never entered", "cancelled", "failed", "ended"])
@pytest.mark.parametrize("call", ["map", "starmap"])
def test_refused_map_takes_nothing_from_its_input(state, call):
    """
    A group that takes nothing leaves the items where they are.
    """
    items = iter([(1,), (2,)])
    group = TaskGroup(1)

    def fails():
        raise ValueError("bad header")

    if state in ("never entered", "ended"):
        if state == "ended":
            with group:
                pass
        with pytest.raises(GroupClosedError):
            getattr(group, call)(resize, items)
    else:
        with suppress(ValueError), group:
            if state == "failed":
                group.submit(fails)
                group.token.wait(timeout=60)
            else:
                group.cancel()
            with pytest.raises(Cancelled):
                getattr(group, call)(resize, items)

    assert list(items) == [(1,), (2,)]


def test_map_over_an_endless_input_stops_when_a_task_fails(workers):
    """
    A `map` that is still reading hears of the failure at its next item.
    """

    def fails_at_ten(number):
        if number == 10:
            raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup(**workers(2)) as group:
        group.map(fails_at_ten, itertools.count())


# --- with_options -------------------------------------------------------------------------------


def test_options_name_the_tasks(workers):
    """
    A name given by `with_options` is that of its tasks, and of nobody else's.
    """
    with TaskGroup(**workers(1)) as group:
        named = group.with_options(name="front page")
        task = named.submit(resize, 1)
        batch = named.map(resize, [1, 2])
        star = named.starmap(resize, [(1,)])
        plain = group.submit(resize, 2)

    with pytest.raises(TypeError):
        group.with_options("front page")  # or somebody takes it for the timeout
    assert isinstance(named, Submitter)
    assert task.name == "front page"
    assert all(each.name.startswith("front page") for each in [*batch.tasks, *star.tasks])
    assert plain.name == "resize"


@pytest.mark.parametrize("call", ["submit", "map", "starmap"])
def test_timeout_of_a_task_counts_from_its_start(workers, call):
    """
    The time that a task spends in the queue does not count.
    """
    release = threading.Event()
    freed = []

    def hold():
        release.wait(timeout=60)
        freed.append(time.monotonic())

    def deadline(*_):
        return current_token().deadline, time.monotonic()

    with TaskGroup(**workers(1)) as group:
        group.submit(hold)
        limited = group.with_options(timeout=30)
        if call == "submit":
            task = limited.submit(deadline)
        else:
            task = getattr(limited, call)(deadline, [(1,)]).tasks[0]
        release.set()
        when, inside = task.result()

    assert freed[0] + 30 <= when <= inside + 30


def test_timeout_cuts_a_task_short():
    """
    A task that is stopped by its own timeout has failed with `TimeoutError`.
    """

    def slow():
        current_token().sleep(60)

    with pytest.raises(TimeoutError, match="slow") as left, TaskGroup() as group:
        task = group.with_options(timeout=0.02).submit(slow)

    assert task.exception() is left.value
    assert not task.cancelled()
    assert [failure.task for failure in group.failures] == [task]


def test_timeout_that_is_not_needed_changes_nothing():
    """
    A task that returns in time has its value, and nobody else has its deadline.
    """
    with TaskGroup() as group:
        in_time = group.with_options(timeout=60).submit(resize, 404)
        unlimited = group.submit(lambda: current_token().deadline)

    assert in_time.result() == 404
    assert unlimited.result() is None


def test_infinite_timeout_is_none():
    """
    Infinity sets no deadline, for a group as for a task.
    """
    with TaskGroup(timeout=math.inf) as group:
        task = group.with_options(timeout=math.inf).submit(lambda: current_token().deadline)

    assert task.result() is None


# --- fastpool.map -------------------------------------------------------------------------------


def test_fastpool_map_returns_the_values_in_order():
    """
    The values come in the order of the items, however the tasks end.
    """
    second = threading.Event()

    def wait_for_second(number):
        second.set() if number else second.wait(timeout=60)
        return number

    assert fastpool.map(wait_for_second, [0, 1], max_workers=2) == [0, 1]


def test_fastpool_map_takes_the_keywords_of_a_group(make_pool):
    """
    Workers, name, policy, observers, pool and grace are those of the group it makes.
    """

    class Policy:
        def start(self):
            started.append("judge")
            return FailFast().start()

    crowd = Crowd()
    together = threading.Barrier(2)
    started, events = [], []

    def name(_):
        with crowd:
            together.wait(timeout=60)
        return threading.current_thread().name

    names = fastpool.map(
        name,
        range(8),
        max_workers=2,
        name="thumbnails",
        policy=Policy(),
        observers=[events.append],
        grace=1,
        timeout=30,
    )
    elsewhere = fastpool.map(
        lambda _: threading.current_thread(), range(3), pool=(pool := make_pool(1))
    )

    assert crowd.peak == 2
    assert all(name.startswith("fastpool-thumbnails-") for name in names)
    assert started == ["judge"]
    assert [event.name for event in events].count("task_succeeded") == 8
    assert elsewhere == [pool.apply(threading.current_thread)] * 3


def test_fastpool_map_hears_its_timeout_and_its_token():
    """
    It ends as the block would: with `TimeoutError`, with `Cancelled`.
    """
    token = CancelToken()

    def cancel(_):
        token.cancel("rain")
        current_token().sleep(60)

    with pytest.raises(TimeoutError):
        fastpool.map(lambda _: current_token().sleep(60), [1], timeout=0.02)
    with pytest.raises(Cancelled, match="rain"):
        fastpool.map(cancel, [1], token=token)


def test_fastpool_map_names_the_line_that_called_it():
    """
    As where a failed task was submitted.
    """

    def fails(number):
        raise ValueError("root")

    with pytest.raises(ValueError, match="root") as raised:
        fastpool.map(fails, [1])

    line = raised.traceback[0].lineno + 1
    assert f"submitted at {__file__}:{line} " in raised.value.__notes__[0]


def test_fastpool_map_raises_the_first_failure():
    """
    The failure is the object that was raised, and the rest never starts.
    """
    failure = ValueError("bad header")
    ran = []

    def fails_at_two(number):
        ran.append(number)
        if number == 2:
            raise failure

    with pytest.raises(ValueError, match="bad header") as left:
        fastpool.map(fails_at_two, range(100), max_workers=1)

    assert left.value is failure
    assert ran == [0, 1, 2]


# --- A pool of yours ----------------------------------------------------------------------------


def test_pool_of_yours_is_left_open(make_pool):
    """
    A `ThreadPool` serves its owner, a group, another group, and its owner again.
    """
    pool = make_pool(2)

    first = pool.apply(threading.current_thread)
    with TaskGroup(pool=pool) as group:
        batch = group.starmap(threading.current_thread, [()] * 20)
    with suppress(ValueError), TaskGroup(pool=pool) as failing:
        failing.submit(int, "no number")
    again = pool.map(abs, [-1, -2])

    threads = {*batch.results(), first}
    assert len(threads) <= 2
    assert threading.main_thread() not in threads
    assert again == [1, 2]


def test_pool_of_yours_is_free_while_the_queue_is_empty(make_pool):
    """
    An open group without tasks keeps no thread of the pool.
    """
    pool = make_pool(1)

    with TaskGroup(pool=pool) as group:
        group.submit(resize, 404).result()
        theirs = pool.apply_async(resize, (405,)).get(timeout=60)
        ours = group.submit(resize, 406).result()

    assert (theirs, ours) == (405, 406)


@pytest.mark.parametrize("size", [1, 2])
def test_other_users_of_a_pool_get_their_turns(make_pool, size):
    """
    Our queue may be as long as it likes: what others hand to the pool runs soon.
    """
    pool = make_pool(size)
    enough = threading.Event()
    waiting = []

    def work():
        # The queue never gets shorter until the others have had their turns.
        if not enough.is_set():
            group.submit(work)

    with TaskGroup(pool=pool, timeout=60) as group:
        group.starmap(work, [()] * 500)
        for turn in range(5):
            waiting.append(pool.apply_async(resize, (turn,)).get(timeout=60))
        enough.set()

    assert waiting == [0, 1, 2, 3, 4]


def test_order_is_kept_when_others_have_had_their_turn(make_pool):
    """
    Making way for others changes nothing for our tasks: each runs once, in order.
    """
    pool = make_pool(1)
    ran = []

    def work(number):
        ran.append(number)
        time.sleep(0.0005)

    with TaskGroup(pool=pool) as group:
        group.map(work, range(200))
        theirs = [pool.apply_async(resize, (turn,)) for turn in range(20)]

    assert ran == list(range(200))
    assert [each.get(timeout=60) for each in theirs] == list(range(20))


def test_job_that_never_started_keeps_no_group_open(make_pool):
    """
    Leaving waits for tasks, not for the pool to have a thread free.
    """
    pool = make_pool(2)
    occupied, release, second = threading.Event(), threading.Event(), threading.Event()

    def occupy():
        occupied.set()
        release.wait(timeout=60)

    theirs = pool.apply_async(occupy)
    occupied.wait(timeout=60)
    with TaskGroup(pool=pool) as group:
        first = group.submit(second.wait, 60)
        until(first.running)
        # The pool's other thread is taken, so whatever is to run this never gets there.
        other = group.submit(resize, 404)
        second.set()
    still_occupied = not theirs.ready()
    release.set()
    theirs.get(timeout=60)

    assert other.result() == 404
    assert still_occupied
    assert pool.map(abs, [-1, -2]) == [1, 2]


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_group_that_never_got_a_thread_can_be_left(make_pool, how):
    """
    On a pool that others keep busy a group that gives up is left at once, its tasks cancelled.
    """
    pool = make_pool(1)
    occupied, release = threading.Event(), threading.Event()
    ran = []

    def occupy():
        occupied.set()
        release.wait(timeout=60)

    theirs = pool.apply_async(occupy)
    occupied.wait(timeout=60)
    with suppress(ValueError), TaskGroup(pool=pool) as group:
        task = group.submit(ran.append, 1)
        if how == "fail":
            raise ValueError("bad header")
        group.cancel()
    still_occupied = not theirs.ready()
    release.set()
    theirs.get(timeout=60)
    pool.apply(abs, (-1,))

    assert still_occupied
    assert task.cancelled()
    assert ran == []


def test_pool_that_takes_nothing_says_so(make_pool):
    """
    On a pool that was closed every `submit` raises what the pool says, and queues nothing.
    """
    pool = make_pool(1)
    pool.close()
    ran = []

    with TaskGroup(pool=pool) as group:
        for number in range(3):
            with pytest.raises(ValueError, match="not running"):
                group.submit(ran.append, number)

    assert ran == []
    assert group.failures == ()


def test_pool_that_is_closed_under_a_map_says_so(make_pool):
    """
    What was submitted before has run, and what could not be is in the queue no more.
    """
    pool = make_pool(1)
    ran = []

    def items():
        yield 1
        until(lambda: ran and not group._run.lanes)
        pool.close()
        yield 2

    with TaskGroup(pool=pool) as group:
        with pytest.raises(ValueError, match="not running"):
            group.map(ran.append, items())
        queued = len(group._run.queue)

    assert queued == 0
    assert ran == [1]
    assert group.failures == ()


@pytest.mark.parametrize("free", [0, 1])
def test_pool_that_is_closed_under_a_group_holds_nothing_up(make_pool, free):
    """
    The group makes do with the threads it has, or fails; it never hangs.
    """
    pool = make_pool(2)
    occupied, release = threading.Barrier(3 - free), threading.Event()

    def occupy():
        occupied.wait(timeout=60)
        release.wait(timeout=60)

    def run():
        with suppress(ValueError), TaskGroup(pool=pool, timeout=60) as group:
            # Whatever is to run them is queued in the pool behind its owner's, or may begin now.
            batch = group.map(resize, range(10))
            pool.close()
            release.set()
        return group, batch

    for _ in range(2 - free):
        pool.apply_async(occupy)
    occupied.wait(timeout=60)
    group, batch = in_thread(run)

    assert batch.done()
    assert group.failures or batch.results() == list(range(10))


def test_pool_that_is_closed_as_a_place_is_given_back_fails_the_group(make_pool):
    """
    A worker of another group has run one task of it, and nobody is there to run the next.
    """
    pool = make_pool(1)
    submitted = threading.Event()

    def waits():
        submitted.wait(timeout=60)
        return closes.wait()

    with TaskGroup(pool=pool) as around:
        waiter = around.submit(waits)
        until(waiter.running)
        with pytest.raises(ValueError, match="not running"), TaskGroup(pool=pool) as group:
            closes, last = group.submit(pool.close), group.submit(resize, 404)
            submitted.set()
            with shield():
                ended = last.wait(timeout=20)

    assert ended
    assert last.cancelled()
    assert waiter.result() is True


def test_pool_that_is_closed_as_a_group_is_left_holds_nothing_up(make_pool, monkeypatch):
    """
    A submit has counted on a job that the pool was to do, and that is taken back just then.
    """
    pool = make_pool(1)
    occupied, release = threading.Event(), threading.Event()
    recall = Run.recall
    late = []

    def occupy():
        occupied.set()
        release.wait(timeout=60)

    def recalls(run):
        if not late:
            late.append(in_thread(group.submit, resize, 404))
            pool.close()
        return recall(run)

    def run():
        with group:
            group.submit(resize, 1).cancel()
            monkeypatch.setattr(Run, "recall", recalls)

    pool.apply_async(occupy)
    assert occupied.wait(timeout=60)
    group = TaskGroup(pool=pool, max_queued=1)
    error = in_thread(run)
    release.set()

    assert type(error) is ValueError
    assert late[0].cancelled()


def test_place_of_a_job_that_never_started_can_be_used_while_the_block_is_left(
    make_pool, monkeypatch, watched
):
    """
    Leaving takes the job back, and a task that goes on meanwhile submits another.
    """
    pool = make_pool(2)
    main = threading.current_thread()
    occupied, free, go, met = (threading.Event() for _ in range(4))

    def occupy():
        occupied.set()
        free.wait(timeout=60)

    def submits_late():
        until(lambda: is_asleep(main) and not group._run.called)
        free.set()
        group.submit(met.set)
        return met.wait(timeout=20)

    pool.apply_async(occupy)
    assert occupied.wait(timeout=60)
    with TaskGroup(pool=pool) as group:
        until(group.submit(go.wait, 60).running)
        last = group.submit(submits_late)  # another job is to do this, and never gets there
        go.set()
        until(last.running)

    assert last.result() is True


def have_it_make_way(pool, monkeypatch, before):
    """
    Have a job of ours go to the end of the pool's own queue as soon as there is more to do.

    Args:
        before: Called when it is about to, by the thread that does the job.
    """
    making_way = threads.Shared._make_way

    def make_way(backend, run, lane):
        before()
        return making_way(backend, run, lane)

    monkeypatch.setattr(threads, "SLICE", -1.0)
    monkeypatch.setattr(threads.Shared, "_make_way", make_way)


def test_group_that_makes_way_is_not_waited_for(watched, make_pool, monkeypatch):
    """
    What the pool's other users do first holds up no wait for what has ended.
    """
    pool = make_pool(2)
    begun, go, release = threading.Event(), threading.Event(), threading.Event()
    waiting = []

    def first():
        begun.set()
        go.wait(timeout=60)

    def wait_meanwhile():
        if not waiting:
            waiting.append(start(group.wait))
            until(lambda: is_asleep(waiting[0][0]))

    have_it_make_way(pool, monkeypatch, wait_meanwhile)
    with TaskGroup(pool=pool) as group:
        pool.apply_async(release.wait, (60,))
        group.submit(first)
        assert begun.wait(timeout=60)
        second = group.submit(resize, 404)
        pool.apply_async(release.wait, (60,))  # ahead of the job that makes way
        go.set()
        until(lambda: waiting)
        waiter, outcome = waiting[0]
        waiter.join(timeout=20)
        seen = second.done(), list(outcome)
        release.set()

    assert seen == (True, [None])


def test_worker_that_waits_hears_that_its_group_has_made_way(watched, make_pool, monkeypatch):
    """
    It runs the task itself, for which there was no place before; the others may take long.
    """
    pool = make_pool(2)
    go, ended = threading.Event(), threading.Event()
    seats = []

    def waits():
        seats.append(threading.current_thread())
        return second.result()

    have_it_make_way(pool, monkeypatch, lambda: None)
    with TaskGroup(pool=pool) as around, TaskGroup(1, pool=pool) as group:
        first = group.submit(go.wait, 60)
        until(first.running)
        second = group.submit(ended.set)
        around.submit(waits)
        until(lambda: group._run.helpers and is_asleep(seats[0]))
        theirs = pool.apply_async(ended.wait, (20,))  # ahead of the job that makes way
        go.set()

    assert theirs.get(timeout=60) is True


def test_pool_that_is_closed_as_a_group_makes_way_goes_on_with_it(make_pool, monkeypatch):
    """
    The thread that would have made way runs what is left.
    """
    pool = make_pool(1)
    queued = threading.Event()
    ran = []

    have_it_make_way(pool, monkeypatch, pool.close)
    with TaskGroup(pool=pool) as group:
        group.submit(queued.wait, 60)
        group.map(ran.append, range(5))
        queued.set()

    assert ran == [0, 1, 2, 3, 4]


def test_place_that_was_taken_as_its_pool_refused_is_not_used_twice(make_pool, monkeypatch):
    """
    A job makes way, a task that waits runs the next in its place, and the pool takes nothing.
    """
    pool = make_pool(2)
    apply_async = pool.apply_async
    go, asked, taken = threading.Event(), threading.Event(), threading.Event()
    crowd = Crowd()

    def refuse_once(fn, args=()):
        pool.apply_async = apply_async
        asked.set()
        assert taken.wait(timeout=60)
        raise ValueError("Pool not running")

    def have_it_refuse():
        if not taken.is_set():
            pool.apply_async = refuse_once

    def waits():
        assert asked.wait(timeout=60)
        return second.result()

    def run():
        with crowd:
            if not taken.is_set():
                taken.set()
                pool.apply(resize, (1,))  # the other thread has nothing of the group's to do

    have_it_make_way(pool, monkeypatch, have_it_refuse)
    with TaskGroup(pool=pool) as around, TaskGroup(1, pool=pool) as group:
        group.submit(go.wait, 60)
        second = group.submit(run)
        third = group.submit(run)
        around.submit(waits)
        go.set()

    assert third.done()
    assert crowd.peak == 1


def test_worker_that_waits_hears_of_what_only_it_can_run(watched, make_pool):
    """
    Though it waits for a task on another pool, that leaves a group, that has a task come late.
    """
    pool, other = make_pool(2), make_pool(1)
    runs, ended = threading.Event(), threading.Event()
    seats, groups = [], []

    def holds():
        runs.set()
        return ended.wait(timeout=20)

    def leaves():
        seats.append(threading.current_thread())
        with TaskGroup(pool=pool) as inner:
            groups.append(inner)
            return inner.submit(holds)

    def waits():
        seats.append(threading.current_thread())
        assert runs.wait(timeout=60)
        return middle.result()

    with TaskGroup(pool=pool) as outer, TaskGroup(pool=other) as around:
        middle = around.submit(leaves)
        waiting = outer.submit(waits)
        assert runs.wait(timeout=60)
        until(lambda: len(seats) == 2 and all(map(is_asleep, seats)))
        groups[0].submit(ended.set)

    assert waiting.result().result() is True


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("how", ["leave", "results", "iterate", "group.wait"])
def test_groups_nested_three_deep_share_a_pool(make_pool, size, how):
    """
    Tasks that wait for groups of their own never deadlock, on however small a pool.
    """
    pool = make_pool(size)

    def nest(depth):
        if not depth:
            return 1
        with TaskGroup(pool=pool) as inner:
            batch = inner.map(nest, [depth - 1] * 3)
            if how == "results":
                return sum(batch.results())
            if how == "iterate":
                return sum(batch)
            if how == "group.wait":
                inner.wait()
                return sum(task.result(timeout=0) for task in batch.tasks)
        return sum(batch.results())

    with TaskGroup(pool=pool, timeout=60) as group:
        leaves = group.submit(nest, 3).result()

    assert leaves == 27


@pytest.mark.parametrize("size", [1, 2])
def test_more_groups_than_workers_share_a_pool(make_pool, size):
    """
    Groups of six threads, with tasks that wait for tasks, get by on one pool.
    """
    pool = make_pool(size)
    results = []

    def parent(number):
        return sum(group_of[number].map(abs, range(-3, 0)).results())

    def run(number):
        with TaskGroup(pool=pool, timeout=60) as group_of[number]:
            results.extend(group_of[number].map(parent, [number] * 5).results())

    group_of = {}
    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert results == [6] * 30


WAITS = {
    "result": lambda group, fn: group.submit(fn).result(),
    "result in time": lambda group, fn: group.submit(fn).result(timeout=60),
    "get": lambda group, fn: group.submit(fn).get(),
    "exception": lambda group, fn: group.submit(fn).exception(),
    "wait": lambda group, fn: group.submit(fn).wait(),
    "results": lambda group, fn: group.starmap(fn, [(), ()]).results(),
    "wait for a batch": lambda group, fn: group.starmap(fn, [(), ()]).wait(),
    "iterate": lambda group, fn: list(group.starmap(fn, [(), ()])),
    "Batch.as_completed": lambda group, fn: list(group.starmap(fn, [(), ()]).as_completed()),
    "as_completed": lambda group, fn: list(
        fastpool.as_completed([group.submit(fn), group.submit(fn)])
    ),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_task_that_waits_for_a_queued_one_runs_it(workers, wait):
    """
    With one worker the waiter's thread runs what it waits for.
    """
    threads = []

    def child():
        threads.append(threading.current_thread())

    def parent():
        threads.append(threading.current_thread())
        wait(group, child)

    with TaskGroup(timeout=60, **workers(1)) as group:
        group.submit(parent)

    assert len(threads) in (2, 3)
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("looked", [False, True])
def test_task_is_run_once_by_its_worker_or_its_waiter(watched, workers, monkeypatch, looked):
    """
    At whatever line a worker takes a task, one that waits for it then does not run it as well.

    It begins to wait then, or has seen before that nobody had taken the task.
    """
    slot_for = Run.slot_for

    def race(step):
        reached, submitted, looks = (threading.Event() for _ in range(3))
        threads, ran = [], []

        def slot_later(run, lane):
            if not looks.is_set():
                looks.set()
                until(lambda: reached.is_set() or child.done())
            return slot_for(run, lane)

        def look():
            reached.set()
            until(lambda: child.done() or is_asleep(threads[0]))

        def trace():
            until(lambda: threads)
            submitted.wait(timeout=60)
            if looked:
                looks.wait(timeout=60)
            trace_this_thread(act_at(step, look))

        def parent():
            threads.append(threading.current_thread())
            submitted.wait(timeout=60)
            if not looked:
                until(lambda: reached.is_set() or child.done())
            return child.result()

        if looked:
            monkeypatch.setattr(Run, "slot_for", slot_later)

        with TaskGroup(timeout=60, **arguments) as group:
            waiter, tracer = group.submit(parent), group.submit(trace)
            child = group.submit(ran.append, 1)
            submitted.set()
            waiter.wait()
            tracer.wait()
            reached_in_time = reached.is_set()
        if "pool" in arguments:
            pool = arguments["pool"]
            together = threading.Barrier(2)
            pool.map(lambda _: (together.wait(60), sys.settrace(None)), range(2), chunksize=1)
        fastpool.shutdown()
        return reached_in_time, ran

    arguments = workers(2)
    races = list(itertools.takewhile(lambda race: race[0], map(race, range(80))))

    assert len(races) > 5
    assert all(ran == [1] for _, ran in races)


@pytest.mark.parametrize("call", ["submit", "map"])
def test_cancel_meets_a_worker_that_takes_its_task_at_every_line(workers, call):
    """
    What was cancelled before it has begun does not run, or finds its token set.
    """

    def race(step):
        armed = threading.Event()
        tasks, won, ran = [], [], []

        def trace():
            assert armed.wait(timeout=60)
            trace_this_thread(act_at(step, lambda: won.append(tasks[0].cancel("enough"))))

        def run(argument):
            ran.append((list(won), current_token().reason))

        with TaskGroup(**arguments) as group:
            group.submit(trace)
            if call == "submit":
                tasks.append(group.submit(run, 404))
            else:
                tasks.extend(group.map(run, [404]).tasks)
            armed.set()
            tasks[0].wait(timeout=60)
            group.submit(sys.settrace, None)
        return won, ran, tasks[0].cancelled()

    arguments = workers(1)
    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert len(races) > 10
    assert all(len(ran) == (not cancelled) for _, ran, cancelled in races)
    begun = [ran[0] for _, ran, _ in races if ran]
    assert 0 < len(begun) < len(races)
    assert ([True], "enough") in begun
    assert all(reason == "enough" for won, reason in begun if True in won)


@pytest.mark.parametrize("call", ["submit", "map"])
@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_what_a_worker_takes_as_its_block_is_left_without_it_is_named_or_never_runs(workers, call):
    """
    At whatever line it is; and its handle has ended by then, and stays as it is.
    """

    def race(step):
        armed, held, goes_on = (threading.Event() for _ in range(3))
        threads, tasks, ran, before, named = [], [], [], [], ""

        def hold():
            held.set()
            goes_on.wait(timeout=60)

        def trace():
            threads.append(threading.current_thread())
            assert armed.wait(timeout=60)
            trace_this_thread(act_at(step, hold))

        try:
            with TaskGroup(**arguments, grace=0, on_stuck="abandon") as group:
                group.submit(trace)
                if call == "submit":
                    tasks.append(group.submit(ran.append, 404))
                else:
                    tasks.extend(group.map(ran.append, [404]).tasks)
                armed.set()
                until(lambda: held.is_set() or tasks[0].done())
                before = ran.copy()
                group.cancel()
        except StuckTaskError as error:
            named = str(error.__notes__)
        ended = tasks[0].done(), tasks[0].cancelled()
        goes_on.set()
        if "pool" in arguments:
            arguments["pool"].apply(sys.settrace, (None,))
        fastpool.shutdown()
        if "pool" not in arguments:
            threads[0].join(timeout=60)

        assert ended[0]
        assert ended == (tasks[0].done(), tasks[0].cancelled())
        assert before or not ran or "task 'append" in named
        return held.is_set(), ran != before, named

    arguments = workers(1)
    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert len(races) > 10
    assert any(runs for _, runs, _ in races)
    assert any(not runs and not named for _, runs, named in races)


def test_task_run_by_a_waiter_is_on_its_own(workers):
    """
    It has its own token and context, and the waiter has its own again afterwards.
    """

    tasks = []

    def child():
        seen = current_token(), variable.get(), tasks[0].running()
        variable.set("child's")
        return seen

    def parent():
        variable.set("parent's")
        mine = current_token()
        tasks.append(group.submit(child))
        theirs = tasks[0].result()
        return mine, theirs, (current_token(), variable.get())

    with TaskGroup(timeout=60, **workers(1)) as group:
        mine, theirs, after = group.submit(parent).result()

    assert theirs[0] is not mine
    assert theirs[1:] == ("parent's", True)
    assert after == (mine, "parent's")


def test_task_run_by_a_waiter_can_be_cancelled_alone(workers):
    """
    Who runs in the waiter's thread is not who waits.
    """

    def child():
        current_token().cancel("mine")
        current_token().check()

    def parent():
        task = group.submit(child)
        task.wait()
        return task.cancelled(), current_token().cancelled()

    with TaskGroup(timeout=60, **workers(1)) as group:
        seen = group.submit(parent).result()

    assert seen == (True, False)


def test_waiter_of_another_group_keeps_to_the_bound(make_pool):
    """
    A waiter does not run a task of a group that has no worker free.
    """
    pool = make_pool(3)
    crowd = Crowd()
    running, release = threading.Event(), threading.Event()
    ran = threading.Event()

    def hold():
        with crowd:
            running.set()
            release.wait(timeout=60)

    def short():
        with crowd:
            ran.set()

    with TaskGroup(pool=pool) as others, TaskGroup(1, pool=pool) as narrow:
        narrow.submit(hold)
        running.wait(timeout=60)
        queued = narrow.submit(short)
        waiter = others.submit(queued.wait)
        until(waiter.running)
        early = ran.wait(timeout=0.1)
        release.set()

    assert not early
    assert waiter.result() is True
    assert crowd.peak == 1


def test_waiter_that_was_about_to_run_a_task_leaves_it_once_two_have_cancelled_it(monkeypatch):
    """
    The second one takes away what the first has laid down.
    """
    slot_for = Run.slot_for
    tasks, ran = [], []

    def cancelled_first(run, lane):
        told = [run.withdraw(tasks[0], "enough"), run.withdraw(tasks[0], "enough")]
        assert told == [True, False]
        return slot_for(run, lane)

    def parent():
        tasks.append(group.submit(ran.append, 1))
        return tasks[0].wait()

    monkeypatch.setattr(Run, "slot_for", cancelled_first)
    with TaskGroup(1) as group:
        waiter = group.submit(parent)

    assert waiter.result() is True
    assert tasks[0].cancelled()
    assert ran == []


def test_task_of_a_nested_group_waits_for_a_task_beside_its_parent(make_pool):
    """
    On a pool of one, what a nested task waits for runs although its group's worker is busy.
    """
    pool = make_pool(1)

    def leaf():
        return beside.result()

    def parent():
        ready.wait(timeout=60)
        with TaskGroup(pool=pool) as inner:
            return inner.submit(leaf).result()

    ready = threading.Event()
    with TaskGroup(pool=pool, timeout=60) as group:
        task = group.submit(parent)
        beside = group.submit(resize, 404)
        ready.set()

    assert task.result() == 404


def test_slot_that_is_freed_as_it_is_looked_for_is_not_lost(make_pool, monkeypatch):
    """
    The last lane ends after a submit has looked for a slot twice: one of them has another come.
    """
    looked, freed, submitted = (threading.Event() for _ in range(3))

    class Slots(deque):
        """The second look for one sees none, and is slow to say so."""

        misses = 0

        def __delitem__(self, index):
            try:
                super().__delitem__(index)
            except IndexError:
                self.misses += 1
                if self.misses == 2:
                    looked.set()
                    assert freed.wait(timeout=60)
                raise

    free_slot = Run.free_slot

    def frees(run):
        assert looked.wait(timeout=60)
        free_slot(run)
        freed.set()
        assert submitted.wait(timeout=60)

    with TaskGroup(pool=make_pool(1)) as group:
        monkeypatch.setattr(Run, "free_slot", frees)
        group.submit(resize, 1).result()
        until(lambda: not group._run.lanes)  # its lane has found nothing more to do
        group._run._freed = Slots()
        second = group.submit(resize, 2)
        submitted.set()
        done = second.wait(timeout=60)
        group.cancel()

    assert done
    assert second.result() == 2


def test_slots_that_are_freed_as_one_is_looked_for_are_all_used(make_pool):
    """
    Two lanes end after a submit has looked for a slot once.
    """
    freed = []

    class Slots(deque):
        def __delitem__(self, index):
            try:
                super().__delitem__(index)
            except IndexError:
                if not freed:
                    freed.extend([run.free_slot(), run.free_slot()])
                raise

    meeting = threading.Barrier(3)
    with TaskGroup(pool=make_pool(3)) as group:
        run = group._run
        tasks = [group.submit(meeting.wait, 20)]
        until(tasks[0].running)
        assert run.take_slot()
        assert run.take_slot()
        run._freed = Slots()
        tasks += [group.submit(meeting.wait, 20) for _ in range(2)]

    assert sorted(task.result() for task in tasks) == [0, 1, 2]


def test_main_thread_never_runs_a_task(watched, make_pool):
    """
    Neither a wait in the body nor leaving makes a worker of it, even if there is no other.
    """
    pool = make_pool(1)
    occupied, release = threading.Event(), threading.Event()
    ran = []

    def occupy():
        occupied.set()
        release.wait(timeout=60)

    def note():
        ran.append(threading.current_thread())

    main = threading.current_thread()
    pool.apply_async(occupy)
    occupied.wait(timeout=60)
    releaser = threading.Thread(target=lambda: (until(lambda: is_asleep(main)), release.set()))
    with TaskGroup(pool=pool) as group:
        task = group.submit(note)
        in_time = task.wait(timeout=0.05)
        early = list(ran)
        group.starmap(note, [()] * 10)
        releaser.start()
    releaser.join(timeout=60)

    assert in_time is False
    assert early == []
    assert len(ran) == 11
    assert main not in ran


def through_another_pool(pool, depth):
    """A chain of groups, by turns on a pool of one thread and on threads of their own."""
    if depth == 0:
        return 1
    with TaskGroup(1, pool=pool if depth % 2 else None) as group:
        batch = group.map(through_another_pool, [pool] * 2, [depth - 1] * 2)
        return sum(batch.results())


def left_through_another_pool(pool, depth):
    """The same, where the groups are left without a look at their tasks."""
    if depth:
        with TaskGroup(1, pool=pool if depth % 2 else None) as group:
            group.starmap(left_through_another_pool, [(pool, depth - 1)] * 2)
    return 2**depth


def told_through_another_pool(pool, depth):
    """The same, where their tasks are awaited as they end."""
    if depth == 0:
        return 1
    with TaskGroup(1, pool=pool if depth % 2 else None) as group:
        batch = group.map(told_through_another_pool, [pool] * 2, [depth - 1] * 2)
        return sum(value for _, value in batch.as_completed())


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "chain", [through_another_pool, left_through_another_pool, told_through_another_pool]
)
def test_groups_that_take_turns_on_two_pools_never_deadlock(make_pool, chain, depth):
    """
    The one thread of a pool waits for a task elsewhere, which waits for one on that pool.
    """
    pool = make_pool(1)
    with TaskGroup(pool=pool, timeout=30) as group:
        task = group.submit(chain, pool, depth)

    assert task.result() == 2**depth


# --- Circles ------------------------------------------------------------------------------------

CIRCLES = {
    "result": lambda task: task.result(),
    "result in time": lambda task: task.result(timeout=60),
    "exception": lambda task: task.exception(),
    "wait": lambda task: task.wait(),
    "as_completed": lambda task: list(fastpool.as_completed([task])),
}


@pytest.mark.parametrize("wait", CIRCLES.values(), ids=CIRCLES)
def test_task_that_waits_for_itself_is_told(workers, wait):
    """
    A task cannot wait for its own end.
    """

    def myself():
        ready.wait(timeout=60)
        wait(task)

    ready = threading.Event()
    with pytest.raises(RuntimeError, match="myself"), TaskGroup(timeout=60, **workers(1)) as group:
        task = group.submit(myself)
        ready.set()


@pytest.mark.parametrize("wait", CIRCLES.values(), ids=CIRCLES)
@pytest.mark.parametrize("count", [1, 2])
def test_two_tasks_that_wait_for_each_other_are_told(workers, count, wait):
    """
    Who closes the circle hears of it, whether they run beside each other or one on top.
    """

    def ping():
        ready.wait(timeout=60)
        wait(tasks[1])

    def pong():
        ready.wait(timeout=60)
        wait(tasks[0])

    ready = threading.Event()
    with (
        pytest.raises(RuntimeError, match="wait") as left,
        TaskGroup(timeout=60, **workers(count)) as group,
    ):
        tasks = [group.submit(ping), group.submit(pong)]
        ready.set()

    assert "ping" in str(left.value)
    assert "pong" in str(left.value)


def test_circle_is_found_whoever_looks_first(watched, workers):
    """
    At whatever line one task is when the other begins to wait, at least one of them is told.
    """

    def race(step):
        reached = threading.Event()

        def pause():
            # The other one begins to wait for us now, and sleeps, or is told.
            reached.set()
            until(lambda: tasks[1].done() or is_asleep(threads["pong"]))

        def ping():
            threads["ping"] = threading.current_thread()
            ready.wait(timeout=60)
            sys.settrace(act_at(step, pause))
            try:
                tasks[1].result()
            finally:
                sys.settrace(None)

        def pong():
            threads["pong"] = threading.current_thread()
            ready.wait(timeout=60)
            # The line in question may come only after the first one has slept.
            until(lambda: reached.is_set() or is_asleep(threads["ping"]))
            tasks[0].result()

        ready = threading.Event()
        threads = {}
        with (
            pytest.raises(RuntimeError, match="wait"),
            TaskGroup(timeout=60, **arguments) as group,
        ):
            tasks = [group.submit(ping), group.submit(pong)]
            until(lambda: len(threads) == 2)
            ready.set()
        return reached.is_set()

    arguments = workers(2)
    races = list(itertools.takewhile(bool, map(race, itertools.count())))

    assert len(races) > 10


def test_circle_is_found_while_one_looks_whether_to_help(watched, workers):
    """
    As above, where the other one is still queued when the first begins to wait.
    """

    def race(step):
        reached, release = threading.Event(), threading.Event()

        def pause():
            reached.set()
            release.set()
            # The first one has taken it, or is about to; or else it begins to wait now.
            until(lambda: threads and (threads[0] is here() or is_stuck()), within=0.2)

        def is_stuck():
            return tasks[2].done() or is_asleep(threads[0])

        def ping():
            sys.settrace(act_at(step, pause))
            try:
                tasks[2].result()
            finally:
                sys.settrace(None)
                release.set()

        def pong():
            threads.append(threading.current_thread())
            tasks[0].result()

        here = threading.current_thread
        threads = []
        submitted = threading.Event()
        with (
            pytest.raises(RuntimeError, match="wait"),
            TaskGroup(timeout=60, **arguments) as group,
        ):
            tasks = [
                group.submit(lambda: submitted.wait(timeout=60) and ping()),
                group.submit(release.wait, 60),
                group.submit(pong),
            ]
            submitted.set()
        return reached.is_set()

    arguments = workers(2)
    races = list(itertools.takewhile(bool, map(race, itertools.count())))

    assert len(races) > 10


def test_circle_is_found_while_one_helps_out(watched, workers):
    """
    A task that runs another one in place of waiting goes on waiting for the rest.
    """
    ready, helping = threading.Event(), threading.Event()
    threads = []

    def ping():
        ready.wait(timeout=60)
        batch.wait()

    def pong():
        threads.append(threading.current_thread())
        helping.wait(timeout=60)
        first.result()

    def helped():
        helping.set()
        until(lambda: is_asleep(threads[0]) or batch.tasks[0].done())

    with (
        pytest.raises(RuntimeError, match="wait"),
        TaskGroup(timeout=60, **workers(2)) as group,
    ):
        first = group.submit(ping)
        batch = group.starmap(lambda fn: fn(), [(pong,), (helped,)])
        until(lambda: threads)
        ready.set()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_three_tasks_in_a_ring_are_told(workers, count):
    """
    A circle over three tasks is found as one over two is, and two of them are named.
    """

    def north():
        ready.wait(timeout=60)
        tasks[1].result()

    def east():
        ready.wait(timeout=60)
        tasks[2].result()

    def west():
        ready.wait(timeout=60)
        tasks[0].result()

    ready = threading.Event()
    with (
        pytest.raises(RuntimeError, match="wait") as left,
        TaskGroup(timeout=60, **workers(count)) as group,
    ):
        tasks = [group.submit(north), group.submit(east), group.submit(west)]
        ready.set()

    assert sum(name in str(left.value) for name in ("north", "east", "west")) >= 2


def test_waiting_for_the_first_of_several_is_no_circle(watched):
    """
    A task that takes the first of two may be waited for by the other: it goes on without it.
    """
    threads = []
    racing, release = threading.Event(), threading.Event()

    def race():
        threads.append(threading.current_thread())
        racing.wait(timeout=60)
        return next(fastpool.as_completed([slow, quick]))

    def wait_for_the_race():
        until(lambda: threads and is_asleep(threads[0]))
        with suppress(TimeoutError):
            racer.result(timeout=0.01)
        release.set()
        return racer.result()

    with TaskGroup(4, timeout=60) as group:
        racer = group.submit(race)
        slow = group.submit(wait_for_the_race)
        quick = group.submit(release.wait, 60)
        until(quick.running)  # or a waiter would run it, and wait for itself to release it
        racing.set()

    assert slow.result() is racer.result() is quick


def test_circle_of_races_is_told(workers):
    """
    Where each of those of which one would be enough waits for the racer, it would wait for ever.
    """

    def race():
        racing.wait(timeout=60)
        return next(fastpool.as_completed([left, right]))

    def wait_for_the_race():
        racing.wait(timeout=60)
        return racer.result()

    racing = threading.Event()
    with pytest.raises(RuntimeError, match="cannot wait"):  # noqa: SIM117
        with TaskGroup(timeout=60, **workers(3)) as group:
            racer = group.submit(race)
            left, right = group.submit(wait_for_the_race), group.submit(wait_for_the_race)
            racing.set()


def test_look_at_a_task_that_waits_for_the_looker_is_no_circle(workers):
    """
    With a timeout of zero nobody waits.
    """

    def look():
        with suppress(TimeoutError):
            waiter.result(timeout=0)
        return waiter.wait(0), waiter.wait(-1)

    def wait():
        ready.wait(timeout=60)
        return looker.result()

    ready = threading.Event()
    with TaskGroup(timeout=60, **workers(2)) as group:
        looker = group.submit(lambda: ready.wait(timeout=60) and look())
        waiter = group.submit(wait)
        until(waiter.running)
        ready.set()

    assert waiter.result() == (False, False)


def test_task_that_waits_for_its_own_batch_is_told(workers):
    """
    A batch ends no sooner than its tasks.
    """

    def member(number):
        ready.wait(timeout=60)
        return batch.results()

    ready = threading.Event()
    with pytest.raises(RuntimeError, match="member"), TaskGroup(timeout=60, **workers(2)) as group:
        batch = group.map(member, range(3))
        ready.set()


def test_task_that_waits_for_its_own_group_is_told(workers):
    """
    A group does not come to rest while its task waits for that; both are named.
    """

    def impatient():
        group.wait()

    with (
        pytest.raises(RuntimeError, match="impatient") as left,
        TaskGroup(name="thumbnails", timeout=60, **workers(2)) as group,
    ):
        group.submit(impatient)

    assert "thumbnails" in str(left.value)


def test_task_that_leaves_its_own_group_is_told(workers):
    """
    A task that ends its group's block would wait for itself; the group goes on.
    """

    def impatient():
        with pytest.raises(RuntimeError, match="impatient"):
            group.__exit__(None, None, None)
        return group.submit(resize, 404).result()

    with TaskGroup(timeout=60, **workers(2)) as group:
        task = group.submit(impatient)

    assert task.result() == 404


INNER_WAITS = {
    "leave": lambda group, task: None,
    "result": lambda group, task: task.result(),
    "group.wait": lambda group, task: group.wait(),
    "as_completed": lambda group, task: list(fastpool.as_completed([task])),
}
OUTER_WAITS = {
    "result": lambda group, task: task.result(),
    "group.wait": lambda group, task: group.wait(),
    "as_completed": lambda group, task: list(fastpool.as_completed([task])),
}


@pytest.mark.parametrize("inner_wait", INNER_WAITS.values(), ids=INNER_WAITS)
@pytest.mark.parametrize("outer_wait", OUTER_WAITS.values(), ids=OUTER_WAITS)
@pytest.mark.parametrize(
    ("size", "last"), [(None, "leaf"), (None, "branch"), (1, "leaf"), (2, "leaf"), (2, "branch")]
)
def test_circle_through_a_nested_group_is_told(
    watched, make_pool, size, last, inner_wait, outer_wait
):
    """
    A task and the task that waits for its group cannot wait for each other, whoever begins.
    """

    def leaf():
        threads["leaf"] = threading.current_thread()
        if last == "leaf":
            # On top of the other one, if that waits by running us.
            below = threads["branch"]
            until(lambda: below is threading.current_thread() or is_asleep(below))
        outer_wait(outer, task)

    def branch():
        threads["branch"] = threading.current_thread()
        ready.wait(timeout=60)
        with TaskGroup(**arguments) as inner:
            child = inner.submit(leaf)
            if last == "branch":
                until(lambda: child.done() or ("leaf" in threads and is_asleep(threads["leaf"])))
            inner_wait(inner, child)

    arguments = {} if size is None else {"pool": make_pool(size)}
    ready = threading.Event()
    threads = {}
    with (
        pytest.raises(RuntimeError, match="wait") as left,
        TaskGroup(name="outer", timeout=60, **arguments) as outer,
    ):
        task = outer.submit(branch)
        ready.set()

    assert "leaf" in str(left.value)
    assert "branch" in str(left.value) or "outer" in str(left.value)


def test_circle_is_found_through_a_task_that_was_just_taken(monkeypatch, watched, make_pool):
    """
    Who waits for a group waits for what its workers have taken and not yet begun.
    """
    perform = Run.perform
    pool = make_pool(2)
    taken = threading.Event()
    threads = []

    def late(run, task, lane):
        if task.name == "leaf":
            taken.set()
            until(lambda: is_asleep(threads[0]))
        perform(run, task, lane)

    def leaf():
        outer.wait()

    def branch():
        threads.append(threading.current_thread())
        with TaskGroup(pool=pool) as inner:
            inner.submit(leaf)
            taken.wait(timeout=60)
            inner.wait()

    monkeypatch.setattr(Run, "perform", late)

    with (
        pytest.raises(RuntimeError, match=r"cannot wait for task '(leaf|branch)', which"),
        TaskGroup(timeout=60, pool=pool) as outer,
    ):
        outer.submit(branch)


def test_waiter_hears_that_no_other_worker_will_come(monkeypatch, watched):
    """
    One that leaves a task to others runs it after all, once the last place is taken.
    """
    begin = Run.begin
    ready, done = threading.Event(), threading.Event()
    threads = []

    def late(run, lane):
        until(lambda: not threads or is_asleep(threads[0]))
        return begin(run, lane)

    def waits():
        ready.wait(timeout=60)
        return [task.result() for task in fastpool.as_completed(tasks)]

    def first():
        threads.append(threading.current_thread())
        return waits()

    monkeypatch.setattr(Run, "begin", late)

    with TaskGroup(2, timeout=60) as group:
        waiting = group.submit(first)
        until(lambda: threads)
        holding = group.submit(done.wait, 60)  # takes the last place, once the other one sleeps
        tasks = [group.submit(done.set)]
        ready.set()

    assert waiting.result() == [None]
    assert holding.result()


def test_circle_is_found_after_the_waiter_has_run_another(workers):
    """
    A task that ran another while it waited is still itself when it waits again.
    """

    def myself():
        ready.wait(timeout=60)
        group.submit(resize, 404).result()
        task.result()

    ready = threading.Event()
    with pytest.raises(RuntimeError, match="myself"), TaskGroup(timeout=60, **workers(1)) as group:
        task = group.submit(myself)
        ready.set()


def test_waits_that_form_no_circle_are_left_alone(workers):
    """
    Tasks may wait for what others wait for, down to one that waits for nobody.
    """

    def top():
        ready.wait(timeout=60)
        return tasks["left"].result() + tasks["right"].result()

    def side():
        ready.wait(timeout=60)
        return tasks["bottom"].result()

    def bottom():
        ready.wait(timeout=60)
        return 1

    ready = threading.Event()
    with TaskGroup(timeout=60, **workers(2)) as group:
        tasks = {
            "top": group.submit(top),
            "left": group.submit(side),
            "right": group.submit(side),
            "bottom": group.submit(bottom),
        }
        ready.set()

    assert tasks["top"].result() == 2


# --- fastpool's own pools -----------------------------------------------------------------------


def test_groups_use_the_same_threads_one_after_the_other():
    """
    A group is served by the threads of the one before it.
    """

    def meet(together):
        together.wait(timeout=60)
        return threading.get_ident()

    serving = []
    for _ in range(5):
        with TaskGroup(3) as group:
            serving.append(set(group.map(meet, [threading.Barrier(3)] * 3).results()))
    counts = []
    for _ in range(5):
        together = threading.Barrier(3)
        with TaskGroup(3) as group:
            serving.append(set(group.map(meet, [together] * 3).results()))
        counts.append(threading.active_count())

    assert all(threads == serving[0] for threads in serving)
    assert len(serving[0]) == 3
    assert len(set(counts)) == 1


def test_groups_side_by_side_do_not_wait_for_each_other():
    """
    A group whose workers are all busy holds up no other.
    """
    release = threading.Event()

    with TaskGroup(1) as busy:
        busy.starmap(release.wait, [(60,)] * 3)
        with TaskGroup(1) as beside:
            seen = beside.submit(resize, 404).result(timeout=60)
        release.set()

    assert seen == 404


def test_ten_groups_run_at_the_same_time():
    """
    The tasks of ten groups, with one worker each, meet.
    """
    together = threading.Barrier(10)

    def run():
        with TaskGroup(1) as group:
            return group.submit(together.wait, 60).result()

    with ThreadPool(10) as pool:
        places = [pool.apply_async(run) for _ in range(10)]
        met = sorted(place.get(timeout=60) for place in places)
        pool.close()
        pool.join()

    assert met == list(range(10))


@pytest.fixture
def short_idle_time(monkeypatch):
    """Have idle threads wait a twentieth of a second."""
    have_idle_threads_wait(0.05, monkeypatch)


def test_idle_threads_end_by_themselves(short_idle_time):
    """
    A pool that no group uses for its idle time is gone, with all its threads.
    """
    before = set(threading.enumerate())
    together = threading.Barrier(3)
    with TaskGroup(3) as group:
        group.starmap(together.wait, [(60,)] * 3)

    until(lambda: set(threading.enumerate()) <= before)
    with TaskGroup(3) as group:
        again = group.submit(resize, 404)

    assert again.result() == 404


def test_pool_ends_when_no_group_has_used_it_for_so_long(monkeypatch):
    """
    It does not, as long as that is not so, where a thread of it has slept for long enough.
    """
    looks, now = [], 1000.0

    def monotonic():
        looks.append(now)
        return now

    have_idle_threads_wait(1 / 16, monkeypatch)
    monkeypatch.setattr(threads, "time", types.SimpleNamespace(monotonic=monotonic))
    with TaskGroup(1) as group:
        thread = group.submit(threading.current_thread).result()
    until(lambda: len(looks) > 3)
    stays = thread.is_alive()
    now += 1 / 16
    until(lambda: not thread.is_alive())

    assert stays


def test_threads_of_an_open_group_do_not_end(short_idle_time):
    """
    A group that has had nothing to do for longer than the idle time goes on where it was.
    """
    with TaskGroup(1) as group:
        first = group.submit(threading.get_ident).result()
        CancelToken(timeout=0.3).wait(timeout=60)
        second = group.submit(threading.get_ident).result(timeout=60)

    assert first == second


def test_group_that_comes_as_its_threads_end_has_others(short_idle_time):
    """
    At whatever line an idle thread is when the next group begins, that group is served.
    """

    def race(step):
        reached, submitted = threading.Event(), threading.Event()

        def pause():
            reached.set()
            submitted.wait(timeout=60)

        def trace():
            threads.append(threading.current_thread())
            trace_this_thread(act_at(step, pause))

        threads = []
        with TaskGroup(1) as group:
            task = group.submit(trace)
            # It may already stop before the group ends.
            until(lambda: reached.is_set() or task.done())
            submitted.set() if reached.is_set() else None
        before_the_end = submitted.is_set()
        until(lambda: reached.is_set() or not threads[0].is_alive())
        with TaskGroup(1, timeout=60) as group:
            task = group.submit(resize, 404)
            submitted.set()
        return reached.is_set(), before_the_end, task.result()

    races = list(itertools.takewhile(lambda race: race[0], map(race, itertools.count())))

    assert sum(not before_the_end for _, before_the_end, _ in races) > 5
    assert all(value == 404 for _, _, value in races)


def test_groups_in_a_row_need_no_more_threads_than_workers(watched):
    """
    A thread that is on its way to a group that ends meanwhile is there for the next one.
    """
    fastpool.shutdown()
    slow, resumed = threading.Event(), threading.Event()

    def trace(frame, event, argument):
        if slow.is_set() and frame.f_globals.get("__name__", "").startswith("fastpool"):
            resumed.wait(timeout=60)
        return trace

    def make_it_slow():
        second.append(threading.current_thread())
        trace_this_thread(trace)

    second = []
    with TaskGroup(2) as group:
        # The thread that comes to rest last is called first, so the other one is the second.
        release = threading.Event()
        first = group.submit(release.wait, 60)
        until(first.running)
        group.submit(make_it_slow).wait()
        until(lambda: is_asleep(second[0]))
        release.set()
    before = threading.active_count()
    slow.set()
    for _ in range(5):
        with TaskGroup(2) as group:
            release = threading.Event()
            first = group.submit(release.wait, 60)
            until(first.running)
            # This calls the second thread, which does not come before the group has ended.
            other = group.submit(resize, 404)
            release.set()
        assert other.result() == 404
    after = threading.active_count()
    slow.clear()
    resumed.set()

    assert after == before


def test_of_two_pools_that_one_group_leases_at_once_one_goes_back(monkeypatch):
    """
    Two threads submit first; what the slower one has leased serves the next group.
    """
    take_last = threads.take_last
    submitted = []

    def serving():
        return threading.current_thread()

    def take_meanwhile(entries):
        taken = take_last(entries)
        if entries is threads._threads.idle and not submitted:
            submitted.append(None)
            submitted[0] = in_thread(group.submit, serving)
        return taken

    fastpool.shutdown()
    with TaskGroup(1) as group:
        first = group.submit(serving).result()
    monkeypatch.setattr(threads, "take_last", take_meanwhile)
    with TaskGroup(2) as group:
        slower = group.submit(serving)
        with TaskGroup(1) as beside:
            again = beside.submit(serving).result()

    assert first not in {slower.result(), submitted[0].result()}
    assert again is first


def test_shutdown_ends_all_idle_threads(thorough_shutdown):
    """
    After it there are the threads that there were before the first group, and groups go on.
    """
    fastpool.shutdown()
    before = set(threading.enumerate())
    with TaskGroup(3, timeout=60) as one, TaskGroup(2) as other:
        one.map(resize, range(20))
        other.map(resize, range(20))
    during = set(threading.enumerate())
    fastpool.shutdown()
    after = set(threading.enumerate())
    fastpool.shutdown()
    with TaskGroup() as again:
        task = again.submit(resize, 404)

    assert before < during
    assert after <= before
    assert task.result() == 404


def test_threads_of_an_open_group_end_with_it_after_a_shutdown(monkeypatch):
    """
    A shutdown takes nothing from a group that is open; its threads end when it is left.
    """
    have_idle_threads_wait(3600, monkeypatch)
    before = set(threading.enumerate())
    with TaskGroup(2) as group:
        group.submit(resize, 1).result()
        fastpool.shutdown()
        task = group.submit(resize, 404)

    until(lambda: set(threading.enumerate()) <= before)

    assert task.result() == 404


def test_task_may_call_shutdown(workers):
    """
    A task that shuts down does not wait for its own thread.
    """
    with TaskGroup(timeout=60, **workers(1)) as group:
        group.submit(fastpool.shutdown)
        task = group.submit(resize, 404)

    assert task.result() == 404


@pytest.mark.parametrize("shared", [False, True])
def test_thousand_groups_leave_nothing_behind(make_pool, shared):
    """
    Threads, objects and memory stay where they were, group after group.
    """
    arguments = {"pool": make_pool(2)} if shared else {"max_workers": 2}

    def run(count):
        for _ in range(count):
            with TaskGroup(timeout=60, **arguments) as group:
                group.submit(resize, 404)
                group.map(resize, range(3))

    def settle():
        # What a group asked of a pool of yours, and no longer needs, may still be queued there.
        if shared:
            arguments["pool"].map(abs, range(10), chunksize=1)
        gc.collect()

    with TaskGroup(timeout=60, **arguments) as group:
        group.starmap(threading.Barrier(2).wait, [(60,), (10,)])
    run(100)
    settle()
    threads, objects = threading.active_count(), len(gc.get_objects())
    tracemalloc.start()
    try:
        run(1000)

        def is_as_it_was():
            # Without a GIL a thread frees what is its own when it wakes: give them something.
            run(1)
            settle()
            # A single object left by each group would be more than that.
            memory, _ = tracemalloc.get_traced_memory()
            return memory < 200_000 and len(gc.get_objects()) - objects < 800

        until(is_as_it_was)
    finally:
        tracemalloc.stop()

    assert threading.active_count() <= threads


# --- A thread that cannot be started ------------------------------------------------------------


def refuse_threads(monkeypatch, most, error):
    """Have the system start so many threads more, and none after."""
    count = itertools.count()
    start = threading.Thread.start

    def refusing(thread):
        if next(count) >= most:
            raise error
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
@pytest.mark.parametrize("most", range(9))
@pytest.mark.parametrize("count", [1, 8])
def test_group_goes_on_with_the_threads_it_could_start(monkeypatch, count, most, error):
    """
    With one thread or more everything runs; with none `submit` raises what the system said.
    """
    fastpool.shutdown()
    ran = []

    def work(number):
        ran.append(number)
        time.sleep(0.002)

    refused = None
    with TaskGroup(count) as group:
        with monkeypatch.context() as patch:
            refuse_threads(patch, most, error)
            try:
                first = group.submit(work, 0)
            except BaseException as raised:
                refused = raised
            else:
                group.map(work, range(1, 30)).wait()
                first.wait()
        in_vain = list(ran)
        after = group.submit(resize, 404)

    assert after.result() == 404
    assert group.failures == ()
    if refused is None:
        assert most > 0
        assert sorted(in_vain) == list(range(30))
    else:
        assert most < 8
        assert refused is error
        assert ran == []


def test_pool_that_could_not_start_replaces_no_worker_as_it_ends(monkeypatch):
    """
    The handler of a `ThreadPool` that was given up may look at a worker that has just ended.
    """
    fastpool.shutdown()
    maintain = ThreadPool._maintain_pool

    def late(ctx, process, processes, pool, *rest):
        until(lambda: not any(worker.is_alive() for worker in pool), within=0.5)
        maintain(ctx, process, processes, pool, *rest)

    monkeypatch.setattr(Pool, "_maintain_pool", staticmethod(late))

    with TaskGroup(8) as group:
        with monkeypatch.context() as patch:
            refuse_threads(patch, 3, MemoryError())
            with pytest.raises(MemoryError):
                group.submit(resize, 404)
        assert group.submit(resize, 404).result() == 404


def test_thread_is_not_asked_for_where_there_are_none(monkeypatch):
    """
    An interpreter may have no daemon threads, and says something else of that.
    """
    fastpool.shutdown()
    monkeypatch.setattr(fastpool._clock, "_daemon_threads_allowed", lambda: False)

    with TaskGroup(1) as group, pytest.raises(RuntimeError, match="a subinterpreter has none"):
        group.submit(resize, 404)


def test_map_that_gets_no_thread_queues_nothing(monkeypatch):
    """
    The first item raises what the system said, and no other is taken from the input.
    """
    fastpool.shutdown()
    ran = []
    items = iter(range(5))

    with TaskGroup(8) as group:
        with monkeypatch.context() as patch:
            refuse_threads(patch, 0, RuntimeError("can't start new thread"))
            with pytest.raises(RuntimeError, match="can't start new thread"):
                group.map(ran.append, items)
        group.submit(resize, 404)

    assert ran == []
    assert list(items) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "take",
    [
        lambda group, numbers: group.map(abs, numbers).results(),
        lambda group, numbers: [value for _, value in group.map(abs, numbers).as_completed()],
        lambda group, numbers: list(group.imap(abs, numbers)),
        lambda group, numbers: list(group.imap_unordered(abs, numbers)),
    ],
    ids=["map", "as_completed", "imap", "imap_unordered"],
)
def test_task_submits_although_no_other_thread_can_be_started(monkeypatch, take):
    """
    A task's own thread is enough for what it submits.
    """
    fastpool.shutdown()

    def parent():
        refuse_threads(patch, 0, RuntimeError("can't start new thread"))
        return take(group, range(-10, 0))

    with TaskGroup(8) as group, monkeypatch.context() as patch:
        task = group.submit(parent)
        ended = task.wait(timeout=20)
        if not ended:
            group.cancel()

    assert ended
    assert sorted(task.result()) == list(range(1, 11))


def test_task_that_waits_hears_that_no_thread_can_be_started(monkeypatch, watched):
    """
    Another one was about to come, and had the last slot; so it runs itself what it waits for.
    """
    not_started = Run.not_started
    starting, submitted, given_up = (threading.Event() for _ in range(3))
    parents = []

    def refuse(pool, ready):
        starting.set()
        assert submitted.wait(timeout=60)
        raise RuntimeError("can't start new thread")

    def give_up(run, lane):
        not_started(run, lane)
        if not given_up.is_set():
            given_up.set()
            until(lambda: is_asleep(parents[0]))

    def parent():
        parents.append(threading.current_thread())
        assert starting.wait(timeout=60)
        children = [group.submit(abs, -404)]
        submitted.set()
        assert given_up.wait(timeout=60)
        return [child.result() for child in fastpool.as_completed(children)]

    with TaskGroup(2) as group:
        task = group.submit(parent)
        until(task.running)
        with monkeypatch.context() as patch:
            patch.setattr(threads._Pool, "start", refuse)
            patch.setattr(Run, "not_started", give_up)
            group.submit(int)
            ended = task.wait(timeout=20)

    assert ended
    assert task.result() == [404]


def test_task_runs_nothing_itself_once_there_are_threads_again(monkeypatch, watched):
    """
    It takes what comes first, and what it ran could wait for what it does then.
    """
    fastpool.shutdown()
    begin = Run.begin

    def begin_late(run, lane):
        until(lambda: children and (children[0].done() or is_asleep(parents[0])))
        return begin(run, lane)

    def child():
        return threading.current_thread()

    def parent():
        with monkeypatch.context() as patch:
            refuse_threads(patch, 0, RuntimeError("can't start new thread"))
            (alone,) = fastpool.as_completed([group.submit(child)])
        parents.append(threading.current_thread())
        monkeypatch.setattr(Run, "begin", begin_late)
        children.append(group.submit(child))
        (after,) = fastpool.as_completed(children)
        return [one.result() is parents[0] for one in (alone, after)]

    children, parents = [], []
    with TaskGroup(8) as group:
        seen = group.submit(parent).result(timeout=60)

    assert seen == [True, False]


def test_queue_of_tasks_survives_threads_that_cannot_be_started(monkeypatch):
    """
    What is queued when the system says no is run by the threads that there are, to the end.
    """
    fastpool.shutdown()
    release = threading.Event()

    with TaskGroup(8) as group:
        first = group.submit(release.wait, 60)
        until(first.running)
        with monkeypatch.context() as patch:
            refuse_threads(patch, 0, RuntimeError("can't start new thread"))
            batch = group.map(resize, range(100))
            release.set()
            values = batch.results(timeout=60)

    assert values == list(range(100))


def test_thread_that_cannot_be_started_leaves_nothing_behind(monkeypatch):
    """
    A group that makes do with those it has forgets at once what the system said.
    """

    class Refused(RuntimeError):
        pass

    def refuse(thread):
        error = Refused("can't start new thread")
        seen.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    seen = []
    fastpool.shutdown()
    release = threading.Event()
    with TaskGroup(8) as group:
        first = group.submit(release.wait, 60)
        until(first.running)
        gc.collect()
        gc.disable()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                group.submit(resize, 404)
            if not GIL:
                fastpool.shutdown()  # what a thread made is freed there, when it wakes
            alive = [error() for error in seen]
        finally:
            gc.enable()
            release.set()

    assert len(seen) > 0
    assert not any(alive)


def test_no_thread_is_started_for_one_that_was_refused_before(monkeypatch):
    """
    Once the system has threads again, each that starts serves the group.
    """
    fastpool.shutdown()
    release = threading.Event()

    def all_serve():
        workers = [one.name for one in threading.enumerate() if isinstance(one, DummyProcess)]
        return len(workers) > 1 and "fastpool-idle" not in workers

    with TaskGroup(8) as group:
        first = group.submit(release.wait, 60)
        until(first.running)
        with monkeypatch.context() as patch:
            refuse_threads(patch, 0, RuntimeError("can't start new thread"))
            group.submit(resize, 404)
        second = group.submit(release.wait, 60)
        try:
            until(second.running)
            until(all_serve)
        finally:
            release.set()


def test_task_whose_deadline_cannot_be_watched_fails(monkeypatch, workers):
    """
    If the system has no thread for a task's timeout, the task fails with what the system said.
    """
    fastpool.shutdown()

    def run():
        with TaskGroup(**arguments) as group:
            group.submit(resize, 404).wait()
            with monkeypatch.context() as patch:
                refuse_threads(patch, 0, RuntimeError("can't start new thread"))
                tasks.append(group.with_options(timeout=60).submit(resize, 404))
                tasks[0].wait(timeout=60)

    arguments = workers(1)
    tasks = []
    left = in_thread(run)

    assert type(left) is RuntimeError
    assert tasks[0].exception(timeout=0) is left


def test_group_whose_deadline_cannot_be_watched_is_not_entered(monkeypatch):
    """
    If the system has no thread for a group's timeout, entering says so, and leaves nothing open.
    """
    fastpool.shutdown()
    outer = CancelToken()
    group = TaskGroup(1, timeout=60, token=outer)
    ran = []

    with monkeypatch.context() as patch:
        refuse_threads(patch, 0, RuntimeError("can't start new thread"))
        with pytest.raises(RuntimeError, match="can't start new thread"), group:
            ran.append("the body")

    outer.cancel()

    assert ran == []
    assert fastpool.dump() == ()
    assert not group.token.cancelled()
    assert current_token() is CancelToken.NEVER
    with pytest.raises(GroupClosedError):
        group.submit(resize, 404)


def test_callback_of_a_task_that_has_ended_is_waited_for_by_nobody():
    """
    Nothing sets its token any more, so it never runs.
    """
    registered = []

    @cancellable
    def registers(token):
        registered.append(token.on_cancel(lambda: registered.append("ran")))

    with TaskGroup(1) as group:
        group.submit(registers).wait()
        loose = [*group._run.loose]
        group.cancel()

    assert loose == []
    assert len(registered) == 1


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
@pytest.mark.parametrize("where", ["_scope.enter", "_run.Run.open", "_run.copy_context"])
def test_group_whose_entry_fails_midway_is_not_open(where, error, monkeypatch):
    """
    Wherever that is, nothing else fails, nothing of it is left, and the stack grows as before.
    """
    group = TaskGroup(1, observers=[repr])
    limit, limits = sys.getrecursionlimit(), []

    def fails(*arguments, **options):
        entering.undo()
        raise error

    def set_limit(limit, set_it=sys.setrecursionlimit):
        limits.append(limit)
        set_it(limit)

    monkeypatch.setattr(sys, "setrecursionlimit", set_limit)
    with monkeypatch.context() as entering:
        entering.setattr(f"fastpool.{where}", fails)
        with pytest.raises(error) as raised, group:
            pass

    assert all(failure.exception is raised.value for failure in group.failures)
    assert fastpool.dump() == ()
    assert limits == ([limit + 200, limit] if error is RecursionError else [])
    assert sys.getrecursionlimit() == limit


def test_claim_that_is_laid_as_the_group_ends_is_taken_back(monkeypatch):
    """
    A task leads to its group, so a group that has ended leads to no task.
    """
    going_on, laying = threading.Event(), threading.Event()

    def lay_late(ledger, task, lay=Ledger.claim):
        if threading.current_thread() is thread:
            laying.set()
            going_on.wait(60)
        return lay(ledger, task)

    monkeypatch.setattr(Ledger, "claim", lay_late)
    with TaskGroup(1) as group:
        release, started = threading.Event(), threading.Event()
        group.submit(lambda: (started.set(), release.wait(60)))
        assert started.wait(60)
        task = [group.submit(abs, number) for number in range(3)][-1]  # nobody comes to that
        group.cancel()
        thread = threading.Thread(target=task.done)
        thread.start()
        assert laying.wait(60)
        release.set()
    going_on.set()
    thread.join(60)

    assert task.cancelled()
    assert not group._run.claims


def test_claim_that_is_laid_as_the_task_ends_is_taken_back(monkeypatch):
    """
    An open group leads to no task that has ended, though somebody was about to cancel it.
    """
    release = threading.Event()

    def lay_late(ledger, task, lay=Ledger.claim):
        release.set()
        until(lambda: task._state)
        return lay(ledger, task)

    with TaskGroup(1) as group:
        task = group.submit(release.wait, 60)
        until(task.running)
        monkeypatch.setattr(Ledger, "claim", lay_late)
        told = task.cancel()
        claims = [*group._run.claims]

    assert not told
    assert claims == []


def test_of_two_who_cancel_a_task_one_is_told_that_it_has_done_so(monkeypatch):
    """
    The other one comes to it when nothing is left of what has decided it.
    """
    main, release = threading.current_thread(), threading.Event()
    others = []

    def lay_late(ledger, task, lay=Ledger.claim):
        if threading.current_thread() is main and not others:
            others.extend(in_thread(ledger.withdraw, task, "enough") for _ in range(2))
            assert task not in ledger.claims
        return lay(ledger, task)

    with TaskGroup(1) as group:
        until(group.submit(release.wait, 60).running)
        task = group.submit(int)
        monkeypatch.setattr(Ledger, "claim", lay_late)
        told = task.cancel()
        release.set()

    assert [told, *others] == [False, True, False]


def test_task_that_is_being_cancelled_is_done_for_who_asks(monkeypatch):
    """
    It has been decided that it never runs, and not been written down yet.
    """
    main, held, goes_on = threading.current_thread(), threading.Event(), threading.Event()
    never_ran = Ledger.never_ran

    def hold_first(ledger, *arguments):
        if threading.current_thread() is not main:
            held.set()
            assert goes_on.wait(timeout=60)
        never_ran(ledger, *arguments)

    release = threading.Event()
    monkeypatch.setattr(Ledger, "never_ran", hold_first)
    with TaskGroup(1) as group:
        until(group.submit(release.wait, 60).running)
        task = group.submit(int)
        canceller, outcome = start(task.cancel, "enough")
        assert held.wait(timeout=60)
        done = task.done()
        goes_on.set()
        canceller.join(timeout=60)
        release.set()

    assert done
    assert outcome == [True]


def test_task_that_a_helper_is_about_to_run_is_cancelled_as_a_running_one(make_pool, monkeypatch):
    """
    However often: that it runs is decided, though it does not say by whom yet.
    """
    decide, held, goes_on = _ledger._Claim.decide, threading.Event(), threading.Event()
    tasks, ran = [], []

    def decide_and_hold(claim, verdict):
        decided = decide(claim, verdict)
        if isinstance(verdict, Lane):
            held.set()
            assert goes_on.wait(timeout=60)
        return decided

    def parent():
        tasks.append(group.submit(ran.append, 404))
        tasks[0].wait()

    monkeypatch.setattr(_ledger._Claim, "decide", decide_and_hold)
    with TaskGroup(pool=make_pool(1)) as group:
        group.submit(parent)
        assert held.wait(timeout=60)
        told = [tasks[0].cancel() for _ in range(3)]
        done = tasks[0].done()
        goes_on.set()

    assert told == [True, False, False]
    assert not done
    assert ran == [404]
    assert tasks[0].result() is None


def test_handle_that_was_had_before_its_call_ended_keeps_no_function():
    """
    As any other.
    """
    release = threading.Event()

    def waits(number):
        assert release.wait(timeout=60)
        return number

    kept = weakref.ref(waits)
    with TaskGroup(1) as group:
        batch = group.map(waits, [404])
        (task,) = batch.tasks
        release.set()
    del batch, group, waits
    fastpool.shutdown()
    until(lambda: kept() is None)

    assert task.result() == 404


def test_who_begins_to_wait_as_the_last_one_gives_up_is_told():
    """
    A list of those who wait that is empty may be about to get somebody.
    """

    class Waiter:
        def notify(self, task):
            told.append(self)

    class Meanwhile(dict):
        def setdefault(self, task, empty):
            found = super().setdefault(task, empty)
            run.unwatch(task, before)
            return found

    before, after, told = Waiter(), Waiter(), []
    with TaskGroup(1) as group:
        run = group._run
        task = started_sleeper(group)
        run.watch(task, before)
        run.watchers = Meanwhile(run.watchers)
        run.watch(task, after)
        task.cancel()

    assert told == [after]


@pytest.mark.parametrize("observers", [[], [repr]])
def test_task_that_came_too_late_is_not_kept(observers):
    """
    Whoever had just looked whether the group was open is refused, and nothing leads to the task.
    """
    with TaskGroup(1, observers=observers) as group:
        pass
    run = group._run
    run.closed = None  # as it was a moment ago
    with pytest.raises(GroupClosedError):
        group.submit(abs, 2)

    assert not run.queue
    assert not run.claims
