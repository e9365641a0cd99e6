"""
One contract, every backend: what a group promises holds wherever its tasks run.

A test for each promise, run on every one of them.
"""

import functools
import operator
import os
import threading
from collections import Counter

import far
import pytest
import structlog
from far import WAYS, Chained, Methods, lines, note, seen
from staging import nothing_is_left, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    FirstSuccess,
    GroupClosedError,
    TaskCancelledError,
    TaskGroup,
    current_token,
    use_token,
)

BACKENDS = ["threads", "processes"]


@pytest.fixture(autouse=True, scope="module")
def no_thread_is_left():
    """Workers are kept from test to test, since to start one takes long, and end with the file."""
    yield from nothing_is_left()


@pytest.fixture(params=BACKENDS)
def pool(request):
    """Where the tasks run."""
    return request.param


# --- Running --------------------------------------------------------------------------------------


def test_each_way_to_submit_gives_the_values_of_the_calls(pool):
    """
    Arguments arrive by position and by name, and the values come in the order submitted.
    """
    with TaskGroup(2, pool=pool) as group:
        one = group.submit(far.add, 1, 2, third=3)
        starred = group.starmap(far.add, [(1,), (2, 3)])
        several = group.map(far.add, [1, 2], (3, 4))
        named = group.with_options(name="sum").submit(far.add, 4)
        named_batch = group.with_options(name="sums").map(far.add, [1])

    assert one.result() == 6
    assert starred.results() == [1, 5]
    assert list(several) == [4, 6]
    assert (named.name, named.result()) == ("sum", 4)
    assert named_batch.tasks[0].name == "sums[0]"


def test_batch_of_thousands_has_its_values_in_order(pool):
    """
    None is lost, none comes twice, whatever is shipped at once.
    """
    with TaskGroup(2, pool=pool) as group:
        batch = group.map(far.square, range(5_000))
        singles = [group.submit(far.square, number) for number in range(2_000)]
        completed = dict(group.map(far.square, range(500)).as_completed())

    assert batch.results() == [number**2 for number in range(5_000)]
    assert [task.result() for task in singles] == [number**2 for number in range(2_000)]
    assert completed == {number: number**2 for number in range(500)}


def test_each_task_runs_once(pool, begun):
    """
    Tasks of all lengths, one after another.
    """
    with TaskGroup(2, pool=pool) as group:
        group.map(far.noted, [begun] * 300, range(300))

    assert Counter(lines(begun)) == {str(number): 1 for number in range(300)}


def test_no_more_run_at_once_than_there_may(pool, begun, release):
    """
    Of three tasks two begin, and the third one when there is room.
    """
    with TaskGroup(2, pool=pool) as group:
        tasks = [group.submit(far.begin_and_hold, begun, release) for _ in range(3)]
        seen(begun, 2)
        running = [task.running() for task in tasks]
        before = len(lines(begun))
        note(release)

    assert (before, len(lines(begun))) == (2, 3)
    assert running == [True, True, False]


def test_leaving_waits_for_everything(pool, begun, ended):
    """
    Handles kept or not; waiting in the block is possible, and more can be submitted after it.
    """
    with TaskGroup(2, pool=pool, timeout=300) as group:
        first = group.map(far.square, range(10))
        waited = first.wait(timeout=300)
        group.wait(timeout=300)
        group.submit(far.seen, begun)
        group.map(far.noted, [ended] * 20, range(20))
        note(begun)

    assert waited
    assert len(lines(ended)) == 20
    with pytest.raises(GroupClosedError, match=r"square\(\)"):
        group.submit(far.square, 2)


def test_tasks_are_waited_for_as_they_come(pool, release):
    """
    What has ended first is given first; a wait that is too short says so, and the task goes on.
    """
    with TaskGroup(2, pool=pool) as group:
        slow = group.submit(far.return_after, release, "slow")
        quick = group.submit(far.echo, "quick")
        arriving = fastpool.as_completed([slow, quick])
        first = next(arriving)
        with pytest.raises(TimeoutError):
            slow.result(timeout=0)
        early = slow.wait(timeout=0)
        note(release)
        rest = list(arriving)

    assert first is quick
    assert not early
    assert rest == [slow]
    assert slow.get() == "slow"


def test_one_line_is_a_whole_group(pool):
    """
    `fastpool.map` takes where to run as a group does.
    """
    assert fastpool.map(far.add, range(100), range(100), pool=pool, max_workers=2) == list(
        range(0, 200, 2)
    )


def test_streams_take_their_input_as_they_go(pool):
    """
    `imap` has taken no more than what it has handed out and its window; closing it ends there.
    """
    taken = []
    endless = (taken.append(number) or number for number in iter(lambda: len(taken), -1))
    with TaskGroup(2, pool=pool) as group:
        stream = group.imap(far.square, endless, window=3)
        first = [next(stream) for _ in range(20)]
        read = len(taken)
        stream.close()
        after = group.submit(far.square, 5)
        unordered = sorted(group.imap_unordered(far.square, range(50), window=4))

    assert first == [number**2 for number in range(20)]
    assert read <= 23
    assert len(taken) == read
    assert after.result() == 25
    assert unordered == [number**2 for number in range(50)]


def test_bounded_queue_holds_up_who_submits(pool, begun, release):
    """
    With `max_queued` a `map` reads its input only as there is room.
    """
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    with TaskGroup(1, pool=pool, max_queued=2) as group:
        group.submit(far.begin_and_hold, begun, release)
        seen(begun)
        feeding = threading.Thread(target=lambda: batches.append(group.map(far.square, items())))
        batches = []
        feeding.start()
        until(lambda: len(taken) >= 2)
        read = len(taken)
        note(release)
        feeding.join(timeout=300)

    assert read <= 3
    assert batches[0].results() == [number**2 for number in range(50)]


def test_decorated_functions_have_their_token_wherever_it_stands(pool):
    """
    Functions, methods of every kind, objects that can be called, and partial ones.
    """
    owner = Methods("value")
    with TaskGroup(2, pool=pool) as group:
        plain = group.submit(far.has_a_token, 1)
        by_name = group.submit(far.has_a_token, value=1)
        partial = group.submit(functools.partial(far.has_a_token, 2))
        bound = group.submit(owner.bound, 3)
        static = group.submit(Methods.static, 4)
        of_class = group.submit(Methods.of_class, 5)
        called = group.submit(owner, 6)

    assert plain.result() == by_name.result() == (True, True, 1)
    assert partial.result() == (True, True, 2)
    assert bound.result() == (True, "value", 3)
    assert static.result() == (True, 4)
    assert of_class.result() == (True, "Methods", 5)
    assert called.result() == (True, "value", 6)


def test_what_a_task_changes_in_its_context_stays_there(pool):
    """
    Each task has a context of its own.
    """
    with TaskGroup(1, pool=pool) as group:
        changed = group.submit(far.change_variable)
        after = group.submit(far.read_variables)

    assert changed.result() == "changed in a task"
    assert after.result() == ("nothing", "unset")


def test_log_context_goes_along(pool):
    """
    What structlog's context has where a task is submitted, it has in the task; not after it.
    """
    with TaskGroup(1, pool=pool) as group:
        with structlog.contextvars.bound_contextvars(request="7f", user=None):
            one = group.submit(far.read_log_context)
            batch = group.map(operator.call, [far.read_log_context] * 3)
        bare = group.submit(far.read_log_context)

    assert one.result() == {"request": "7f", "user": None}
    assert batch.results() == [{"request": "7f", "user": None}] * 3
    assert bare.result() == {}


def test_check_is_the_same_everywhere(pool):
    """
    A token is one of the process that it is in: a look at it costs what it costs on threads.
    """
    with TaskGroup(1, pool=pool) as group:
        checks = group.submit(far.method_of_a_check)

    names = ["CancelToken.check", "CancelToken.cancelled"]
    assert checks.result() == [f"fastpool._token.{name}" for name in names]


# --- Cancelling -----------------------------------------------------------------------------------


def test_cancelling_a_running_task_stops_it_alone(pool, begun, ended, release):
    """
    Its clean-up runs, its handle says why, its sibling goes on, and that is no failure.
    """
    with TaskGroup(2, pool=pool) as group:
        sibling = group.submit(far.return_after, release, "done")
        task = group.submit(far.waits, "sleep", begun, ended)
        seen(begun)
        won = task.cancel("not wanted")
        again = task.cancel()
        task.wait()
        with pytest.raises(TaskCancelledError) as raised:
            task.result()
        note(release)

    assert (won, again) == (True, False)
    assert task.cancelled()
    assert raised.value.reason == "not wanted"
    assert len(lines(ended)) == 1
    assert sibling.result() == "done"
    assert group.failures == ()


def test_cancelling_a_queued_task_keeps_it_from_running(pool, begun, release, tmp_path):
    """
    It is done at once, before there is a worker for it.
    """
    ran = tmp_path / "ran"
    with TaskGroup(1, pool=pool) as group:
        group.submit(far.begin_and_hold, begun, release)
        seen(begun)
        queued = [group.submit(far.noted, ran, number) for number in range(20)]
        won = queued[7].cancel()
        done = queued[7].done()
        note(release)

    assert won
    assert done
    assert queued[7].cancelled()
    assert lines(ran) == [str(number) for number in range(20) if number != 7]


def test_cancelled_task_does_not_run_though_it_was_on_its_way(pool, begun, release, tmp_path):
    """
    Whatever a worker has at once: what it has not begun by then it does not begin.
    """
    ran = tmp_path / "ran"
    hold, go = tmp_path / "hold", tmp_path / "go"
    with TaskGroup(1, pool=pool) as group:
        group.submit(far.begin_and_hold, hold, go)
        seen(hold)
        # Many that take no time, so that several are given to the worker at once.
        group.map(far.square, range(64))
        group.submit(far.begin_and_hold, begun, release)
        tasks = [group.submit(far.noted, ran, number) for number in range(200)]
        note(go)
        seen(begun)
        won = [task.cancel() for task in tasks[:40:2]]
        note(release)

    assert all(won)
    assert all(task.cancelled() for task in tasks[:40:2])
    assert lines(ran) == [str(number) for number in range(200) if number > 39 or number % 2]


def test_cancelling_the_group_stops_what_runs_and_starts_nothing(pool, begun, ended, tmp_path):
    """
    The block ends with nothing raised; the pool under it serves the next group.
    """
    ran = tmp_path / "ran"
    with TaskGroup(2, pool=pool) as group:
        running = [group.submit(far.waits, "sleep", begun, ended) for _ in range(2)]
        queued = group.map(far.noted, [ran] * 100, range(100))
        seen(begun, 2)
        won = group.cancel("enough")
    with TaskGroup(2, pool=pool) as following:
        after = following.submit(far.square, 3)

    assert won
    assert all(task.cancelled() for task in [*running, *queued.tasks])
    assert len(lines(ended)) == 2
    assert lines(ran) == []
    assert after.result() == 9


def test_task_that_swallows_the_cancel_has_its_value(pool, begun):
    """
    It has stopped in its own way.
    """
    with TaskGroup(1, pool=pool) as group:
        task = group.submit(far.swallows, begun)
        seen(begun)
        group.cancel()

    assert task.result() == "went on"


def test_deadline_of_the_group_stops_all(pool, begun, ended):
    """
    The block raises `TimeoutError`, once every task has cleaned up.
    """
    tasks = []
    group = TaskGroup(2, pool=pool, timeout=0.3, name="hasty")
    with pytest.raises(TimeoutError, match=r"group 'hasty' timed out after 0\.3 s"), group:
        tasks.append(group.submit(far.waits, "sleep", begun, ended))
        tasks.append(group.submit(far.waits, "sleep", begun, ended))

    assert all(task.cancelled() for task in tasks)
    assert len(lines(ended)) == len(lines(begun))


def test_tasks_know_the_deadline_of_their_group(pool):
    """
    The token says how much time is left, wherever it is.
    """
    with TaskGroup(1, pool=pool, timeout=3_000) as group:
        due = group.token.deadline
        seen_there, left, current = group.submit(far.asks_the_time).result()
    with TaskGroup(1, pool=pool) as endless:
        without = endless.submit(far.asks_the_time)

    assert seen_there == pytest.approx(due, abs=60)
    assert 0 < current <= left <= 3_000
    assert without.result() == (None, None, None)


@pytest.mark.parametrize("span", [0.05, 0])
@pytest.mark.parametrize("way", ["submit", "map"])
def test_own_timeout_cuts_short_one_task(pool, way, span, ended, begun):
    """
    It fails with `TimeoutError`, having cleaned up; that is the group's failure.
    """
    with (
        pytest.raises(TimeoutError, match=rf"task 'slow.*' timed out after {span} s") as raised,
        TaskGroup(2, pool=pool) as group,
    ):
        options = group.with_options(name="slow", timeout=span)
        if way == "submit":
            task = options.submit(far.waits, "sleep", begun, ended)
        else:
            (task,) = options.map(far.waits, ["sleep"], [begun], [ended]).tasks

    assert len(lines(ended)) == 1
    assert type(task.exception()) is TimeoutError
    assert isinstance(raised.value.__cause__, Cancelled)
    assert group.failures[0].task is task


def test_token_from_outside_ends_the_group(pool, begun, ended):
    """
    By the token around it or by `token=`: the tasks stop, and `Cancelled` leaves.
    """
    around, beside = CancelToken(), CancelToken()
    for token, keywords in ((around, {}), (beside, {"token": beside})):
        with (
            use_token(around),
            pytest.raises(Cancelled) as raised,
            TaskGroup(1, pool=pool, **keywords) as group,
        ):
            if keywords:
                group.submit(far.waits, "sleep", begun, ended)
                seen(begun, 2)
            else:
                group.submit(far.waits, "sleep", begun, ended)
                seen(begun)
            token.cancel("from outside")
        around = CancelToken()

        assert raised.value.reason == "from outside"

    assert len(lines(ended)) == 2


def test_group_inside_a_task_is_cancelled_with_it(pool, begun, ended):
    """
    A group of threads in a task stops when the task is cancelled.
    """
    with TaskGroup(1, pool=pool) as group:
        task = group.submit(far.waits, "group", begun, ended)
        seen(begun)
        task.cancel()

    assert task.cancelled()
    assert len(lines(ended)) == 1


def test_tasks_see_why_they_were_cancelled(pool, begun, ended):
    """
    The reason of the token is what was given, or the failure.
    """
    with TaskGroup(1, pool=pool) as group:
        group.submit(far.tells_reason, begun, ended)
        seen(begun)
        group.cancel("enough")
    with pytest.raises(ValueError, match="bad header"), TaskGroup(2, pool=pool) as group:
        group.submit(far.tells_reason, begun, ended)
        group.submit(far.fail_after, begun, ValueError("bad header"), 2)

    assert lines(ended) == ["str: enough", "ValueError: bad header"]


def test_callbacks_run_where_the_task_is(pool, begun, tmp_path):
    """
    Each once, the last one registered first.
    """
    called = tmp_path / "called"
    with TaskGroup(1, pool=pool) as group:
        group.submit(far.calls_back, begun, called)
        seen(begun)
        group.cancel()

    assert lines(called) == ["second", "first"]


def test_clean_up_under_a_shield_is_not_cut_short(pool, begun, ended):
    """
    A sleep in it goes on to its end.
    """
    with TaskGroup(1, pool=pool) as group:
        group.submit(far.cleans_up, begun, ended)
        seen(begun)
        group.cancel()

    assert lines(ended) == ["cleaned up"]


def test_scope_with_a_timeout_ends_by_itself(pool):
    """
    The task that is around it goes on.
    """
    with TaskGroup(1, pool=pool) as group:
        task = group.submit(far.limits_itself)

    assert task.result() is False


@pytest.mark.parametrize("partial", [False, True], ids=["by itself", "in a partial"])
def test_token_of_the_group_may_be_an_argument(pool, begun, partial):
    """
    For functions that take a token by hand.
    """
    with TaskGroup(1, pool=pool) as group:
        if partial:
            task = group.submit(functools.partial(far.given, group.token), begun)
        else:
            task = group.submit(far.given, group.token, begun)
        seen(begun)
        group.cancel()

    assert task.cancelled()


@pytest.mark.parametrize("reason", ["found", ValueError("found")])
def test_task_that_sets_the_token_of_its_group_stops_all(pool, reason, begun, ended):
    """
    As with an `Event` that was handed to all of them; who has set it has its value. Whatever the
    reason is, it is no failure.
    """
    with TaskGroup(2, pool=pool) as group:
        sleeping = group.submit(far.waits, "sleep", begun, ended)
        seen(begun)
        setting = group.submit(far.sets, group.token, reason)
        until(group.token.cancelled)

    assert setting.result() == "returned"
    assert sleeping.cancelled()
    assert repr(group.token.reason) == repr(reason)
    assert len(lines(ended)) == 1


# --- Failing --------------------------------------------------------------------------------------


def test_failure_of_a_call_that_has_the_token_of_the_group_leaves(pool, begun, ended):
    """
    Though the task that made the call goes on after it.
    """
    with pytest.raises(ValueError, match="root") as raised, TaskGroup(2, pool=pool) as group:
        sleeping = group.submit(far.waits, "sleep", begun, ended)
        seen(begun)
        catching = group.submit(far.catches, group.token, ValueError("root"))

    assert sleeping.cancelled()
    assert catching.result() == "caught"
    assert group.failures[0].exception is raised.value


def test_token_that_is_set_after_its_group_ends_nothing(pool, begun, release, tmp_path):
    """
    By a thread that a task has left, where another group has its tasks by then.
    """
    hold, go = tmp_path / "hold", tmp_path / "go"
    with TaskGroup(1, pool=pool) as group:
        group.submit(far.sets_later, group.token, release, begun)
    with TaskGroup(1, pool=pool) as following:
        held = following.submit(far.begin_and_hold, hold, go, "held")
        seen(hold)
        note(release)
        seen(begun)
        note(go)

    assert held.result() == "held"
    assert not following.token.cancelled()


@pytest.mark.parametrize("way", WAYS)
def test_failure_stops_siblings_however_they_wait(pool, way, begun, ended, release, tmp_path):
    """
    Their clean-up has run before the block is left; what is queued never starts.
    """
    ran = tmp_path / "ran"
    with pytest.raises(ValueError, match="root"), TaskGroup(3, pool=pool) as group:
        siblings = [group.submit(far.waits, way, begun, ended) for _ in range(2)]
        group.submit(far.fail_after, release, ValueError("root"))
        queued = group.map(far.noted, [ran] * 200, range(200))
        seen(begun, 2)
        note(release)

    assert all(task.cancelled() for task in [*siblings, *queued.tasks])
    assert len(lines(ended)) == 2
    assert lines(ran) == []


def test_first_failure_leaves_with_what_it_was_and_where(pool):
    """
    Class, arguments and notes are those of the task's exception; the notes name task and site.
    """
    with pytest.raises(Chained) as raised, TaskGroup(2, pool=pool, name="headers") as group:
        task = group.submit(far.fails_with_notes)

    error = raised.value
    notes = error.__notes__
    assert error == Chained("bad header", 7)
    assert notes[0] == "look into the log"
    assert notes[-1] == f"in task 'fails_with_notes', submitted at {task.site} to group 'headers'"
    assert task.site.startswith(f"{__file__}:")
    assert task.exception() is error is task.exception()
    assert group.failures[0].exception is error


def test_failure_in_a_group_further_in_names_both(pool):
    """
    Each group adds its line.
    """
    with (
        pytest.raises(ValueError, match="further in") as raised,
        TaskGroup(1, pool=pool, name="outer") as group,
    ):
        group.submit(far.fails_in_a_nested_group)

    named = [note for note in raised.value.__notes__ if note.startswith("in task")]
    assert [note.rpartition(" to group ")[2] for note in named] == ["'inner'", "'outer'"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
def test_failure_of_any_class_leaves(pool, kind):
    """
    No class hangs the group or ends a worker; the next group goes on.
    """
    with pytest.raises(kind) as raised, TaskGroup(1, pool=pool) as group:
        group.submit(far.fail, kind("out of the ordinary"))
    with TaskGroup(1, pool=pool) as group:
        after = group.submit(far.square, 3)

    assert type(raised.value) is kind
    assert raised.value.args == ("out of the ordinary",)
    assert after.result() == 9


def test_cancelled_that_nothing_asked_for_is_a_failure(pool):
    """
    It leaves the block as any other.
    """
    with pytest.raises(Cancelled) as raised, TaskGroup(1, pool=pool) as group:
        task = group.submit(far.fail, Cancelled("by hand"))

    assert raised.value.reason == "by hand"
    assert not task.cancelled()


def test_failure_in_the_middle_of_a_batch_is_that_of_its_task(pool, tmp_path):
    """
    What came before it has its values; what comes after never starts.
    """
    with pytest.raises(ValueError, match="no 300"), TaskGroup(1, pool=pool) as group:
        group.submit(far.return_after, tmp_path / "all")  # so that none runs before all are there
        batch = group.map(far.fail_at, [300] * 1_000, range(1_000))
        note(tmp_path / "all")

    ends = ["cancelled" if task.cancelled() else "ended" for task in batch.tasks]
    assert [task.result() for task in batch.tasks[:300]] == list(range(300))
    assert ends == ["ended"] * 301 + ["cancelled"] * 699
    with pytest.raises(ValueError, match="no 300"):
        batch.results()


def test_what_leaves_the_body_stops_the_tasks(pool, begun, ended):
    """
    The body's exception leaves once they have cleaned up.
    """
    error = KeyError("body")
    with pytest.raises(KeyError) as raised, TaskGroup(1, pool=pool) as group:
        task = group.submit(far.waits, "sleep", begun, ended)
        seen(begun)
        raise error

    assert raised.value is error
    assert task.cancelled()
    assert len(lines(ended)) == 1


def test_handle_of_a_cancelled_task_names_the_failure(pool, begun, ended):
    """
    `TaskCancelledError` with the first failure as its cause.
    """
    with pytest.raises(ValueError, match="root") as raised, TaskGroup(2, pool=pool) as group:
        task = group.submit(far.waits, "sleep", begun, ended)
        group.submit(far.fail_after, begun, ValueError("root"))
    with pytest.raises(TaskCancelledError) as asked:
        task.result()

    assert asked.value.__cause__ is raised.value
    assert asked.value.reason is raised.value


# --- Policies -------------------------------------------------------------------------------------


def test_collecting_all_lets_the_others_go_on(pool):
    """
    Every failure leaves together; every result stays readable.
    """
    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(2, pool=pool, policy=CollectAll()) as group,
    ):
        batch = group.map(far.fail_at, [5] * 300, range(300))
        group.submit(far.fail, KeyError("second"))

    assert sorted(type(error).__name__ for error in raised.value.exceptions) == [
        "KeyError",
        "ValueError",
    ]
    assert [task.result() for task in batch.tasks if not task.exception()] == [
        number for number in range(300) if number != 5
    ]


def test_first_success_ends_the_rest(pool, begun, ended):
    """
    The first value is the winner's, whatever failed before it.
    """
    with TaskGroup(3, pool=pool, policy=FirstSuccess()) as group:
        loser = group.submit(far.waits, "sleep", begun, ended)
        failing = group.submit(far.fail, ValueError("no matter"))
        failing.wait()
        winner = group.submit(far.return_after, begun, "first")

    assert group.winner is winner
    assert loser.cancelled()
    assert len(lines(ended)) == 1


def test_judge_of_yours_is_told_every_outcome(pool):
    """
    Every value and failure once, one at a time; and it says what leaves.
    """

    class Counting:
        def __init__(self):
            self.told = []

        def start(self):
            return self

        def outcome(self, task, error):
            self.told.append((task.name, type(error)))
            return False

        def end(self, failures):
            return LookupError(f"{len(failures)} of {len(self.told)}")

    judge = Counting()
    with (
        pytest.raises(LookupError, match="1 of 50"),
        TaskGroup(2, pool=pool, policy=judge) as group,
    ):
        group.map(far.fail_at, [7] * 50, range(50))

    assert sorted(judge.told) == sorted(
        (f"fail_at[{number}]", ValueError if number == 7 else type(None)) for number in range(50)
    )


# --- Telling --------------------------------------------------------------------------------------


def test_observers_are_told_of_each_task_once_and_in_order(pool):
    """
    Submitted, started, ended; the group's own events around them all.
    """
    events = []
    with TaskGroup(2, pool=pool, observers=[events.append]) as group:
        batch = group.map(far.square, range(50))

    names = [event.name for event in events]
    assert (names[0], names[-1]) == ("group_opened", "group_closed")
    for task in batch.tasks:
        told = [event for event in events if event.task is task]
        assert [event.name for event in told] == [
            "task_submitted",
            "task_started",
            "task_succeeded",
        ]
        assert [event.time for event in told] == sorted(event.time for event in told)
    ends = [event for event in events if event.name == "task_succeeded"]
    assert all(event.worker and event.duration >= 0 for event in ends)


def test_observers_are_told_of_a_failure_and_what_it_stopped(pool, begun, ended, release):
    """
    The failure, then that the group is cancelled; each task has one end.
    """
    events = []
    with (
        pytest.raises(ValueError, match="root"),
        TaskGroup(2, pool=pool, observers=[events.append]) as group,
    ):
        sleeping = group.submit(far.waits, "sleep", begun, ended)
        failing = group.submit(far.fail_after, release, ValueError("root"))
        queued = group.map(far.square, range(20))
        seen(begun)
        note(release)

    told = {
        task: [event.name for event in events if event.task is task]
        for task in (sleeping, failing, *queued.tasks)
    }
    names = [event.name for event in events]
    assert told[failing] == ["task_submitted", "task_started", "task_failed"]
    assert told[sleeping] == ["task_submitted", "task_started", "task_cancelled"]
    assert all(told[task] == ["task_submitted", "task_cancelled"] for task in queued.tasks)
    assert names.count("group_cancelled") == 1
    assert names.index("group_cancelled") > names.index("task_failed")
    assert names[-1] == "group_closed"


# --- Groups ---------------------------------------------------------------------------------------


def test_executor_hands_its_calls_to_the_group(pool):
    """
    `GroupExecutor` gives values and errors by futures; an error of one is not the group's.
    """
    from fastpool.futures import GroupExecutor

    with TaskGroup(2, pool=pool) as group:
        executor = GroupExecutor(group)
        values = list(executor.map(far.square, range(20)))
        failed = executor.submit(far.fail, ValueError("no matter"))
        error = failed.exception(timeout=300)
        task = executor.submit(far.add, 1, third=2)

    assert values == [number**2 for number in range(20)]
    assert (type(error), error.args) == (ValueError, ("no matter",))
    assert task.result() == 3


def test_groups_may_be_open_in_several_threads(pool):
    """
    Each has its own values, and one that fails stops no other.
    """
    outcomes = {}

    def run(number):
        try:
            outcomes[number] = fastpool.map(
                far.fail_at, [13 * number] * 30, range(30), pool=pool, max_workers=1
            )
        except ValueError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)

    assert {number: type(outcome) for number, outcome in outcomes.items()} == {
        0: ValueError,
        1: ValueError,
        2: ValueError,
        3: list,
    }
    assert outcomes[3] == list(range(30))


def test_current_token_of_the_body_hears_a_failure(pool):
    """
    A body that waits on it is woken.
    """
    with pytest.raises(ValueError, match="root"), TaskGroup(1, pool=pool) as group:
        group.submit(far.fail, ValueError("root"))
        woken = current_token().wait(300)
        assert woken
        raise RuntimeError("not the first failure") from None


def test_tasks_run_where_they_are_said_to(pool):
    """
    Threads are of this process, workers are not.
    """
    with TaskGroup(1, pool=pool) as group:
        where = group.submit(far.process)

    assert (where.result() == os.getpid()) is (pool == "threads")
