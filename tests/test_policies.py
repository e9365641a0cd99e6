"""
When a group gives up, what leaves it then, and what its tasks have come to: by policy.
"""

import contextlib
import gc
import threading
import traceback
import weakref

import pytest
from staging import fail, resize, sleeper, started_sleeper, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    FailFast,
    FirstSuccess,
    Judge,
    Policy,
    TaskCancelledError,
    TaskGroup,
    shield,
)

POLICIES = [FailFast(), CollectAll(), FirstSuccess()]


class Recorded:
    """A policy whose judges let another's decide, and note what they are told."""

    def __init__(self, policy):
        self.policy = policy
        self.judges = []

    def start(self):
        self.judges.append(Recorder(self.policy.start()))
        return self.judges[-1]


class Recorder:
    def __init__(self, judge):
        self.judge = judge
        self.told, self.ends = [], []

    def outcome(self, task, error):
        self.told.append((task, error))
        return self.judge.outcome(task, error)

    def end(self, failures):
        self.ends.append((threading.current_thread(), tuple(failures)))
        return self.judge.end(failures)


def left_by(group, body):
    """What leaves a block, or None."""
    try:
        with group:
            body(group)
    except BaseException as error:
        return error


def members(error):
    """What a group of exceptions holds, by identity and in order."""
    return list(map(id, error.exceptions))


def outlasts(go, value):
    """A task that hears no cancel, and returns something when it is told to go on."""
    assert go.wait(timeout=30)
    return value


# --- Values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_policy_is_a_value_that_serves_many_groups_at_once(policy):
    """
    Each has a judge of its own, so one that has ended says nothing about the others.
    """
    assert isinstance(policy, Policy)
    assert isinstance(policy.start(), Judge)
    assert repr(policy) == f"{type(policy).__name__}()"
    go = threading.Event()
    with TaskGroup(policy=policy) as outer:
        late = outer.submit(outlasts, go, "outer")
        ends = [
            left_by(TaskGroup(policy=policy), lambda group: group.submit(fail, ValueError("root")))
            for _ in range(2)
        ]
        with TaskGroup(policy=policy) as good:
            value = good.submit(abs, -1)
        go.set()

    assert [type(error) for error in ends] == [
        ValueError if type(policy) is FailFast else ExceptionGroup
    ] * 2
    assert value.result() == 1
    assert late.result() == "outer"


@pytest.mark.parametrize("wrong", [FailFast, CollectAll, FirstSuccess, Policy, object(), "all"])
def test_what_is_no_policy_is_refused(wrong):
    """
    A class in place of a value, too; the message shows what was given, and the way out.
    """
    with pytest.raises(TypeError, match="policy must be a value with a start") as raised:
        TaskGroup(policy=wrong)
    with pytest.raises(TypeError, match=r"as FailFast\(\)"):
        fastpool.map(abs, [1], policy=wrong)

    assert repr(wrong) in str(raised.value)


class NoEnd:
    def outcome(self, task, error):
        return False


class NoOutcome:
    def end(self, failures):
        return None


class Whole(NoEnd, NoOutcome):
    pass


class OutcomeIsNoMethod(NoOutcome):
    outcome = None


@pytest.mark.parametrize("judge", [NoEnd(), NoOutcome(), OutcomeIsNoMethod(), Whole, None, True])
def test_judge_that_lacks_a_method_keeps_the_group_unentered_and_usable(judge):
    """
    The judge's class is no judge, either. With a good one the same group is entered then.
    """

    class Appoints:
        def start(self):
            return judges.pop()

    judges = [Whole(), judge]
    group = TaskGroup(policy=Appoints())
    with pytest.raises(TypeError, match=r"start\(\) must give a judge, with outcome\(\) and end\("):
        group.__enter__()
    with group:
        task = group.submit(abs, -404)

    assert task.result() == 404


# --- What a judge is told ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_judge_hears_values_and_failures_and_not_the_cancelled(policy):
    """
    And is asked at the end once, on the leaving thread, whatever leaves then.
    """
    recorded = Recorded(policy)
    error = ValueError("root")

    def body(group):
        started_sleeper(group)
        assert started_sleeper(group).cancel()
        bad = group.submit(fail, error)
        with shield():
            bad.wait(timeout=30)
            tasks.append(bad)
        group.cancel()

    tasks = []
    leaving = left_by(TaskGroup(3, policy=recorded), body)

    (judge,) = recorded.judges
    assert judge.told == [(tasks[0], error)]
    ((thread, failures),) = judge.ends
    assert thread is threading.current_thread()
    assert [(failure.task, failure.exception) for failure in failures] == [(tasks[0], error)]
    assert leaving is error or members(leaving) == [id(error)]


def test_judge_is_asked_at_the_end_of_a_group_without_tasks():
    """
    Also where the body has failed, and where nothing has.
    """
    recorded = Recorded(CollectAll())
    error = ValueError("body")

    assert left_by(TaskGroup(policy=recorded), lambda group: None) is None
    left_by(TaskGroup(policy=recorded), lambda group: fail(error))

    assert [[len(failures) for _, failures in judge.ends] for judge in recorded.judges] == [
        [0],
        [1],
    ]
    assert [judge.told for judge in recorded.judges] == [[], []]


@pytest.mark.parametrize("where", ["value", "failure", "end", "both"])
def test_judge_that_raises_ends_the_group_with_that(where):
    """
    It cancels the rest, leaves as the object it is, and is none of the failures.
    """
    first, second = ArithmeticError("of the judge"), ArithmeticError("of its end")

    class Broken:
        def start(self):
            return self

        def outcome(self, task, error):
            if where == "end":
                return True
            raise first

        def end(self, failures):
            if where in ("end", "both"):
                raise second

    def body(group):
        tasks.append(started_sleeper(group))
        group.submit(fail, root) if where == "failure" else group.submit(abs, 1)

    root = ValueError("root")
    tasks = []
    group = TaskGroup(policy=Broken())
    leaving = left_by(group, body)

    assert leaving is (second if where == "end" else first)
    files = [frame.filename for frame in traceback.extract_tb(leaving.__traceback__)]
    assert not any(file.endswith("_ledger.py") for file in files)
    assert leaving.__cause__ is None
    # It was raised while that was handled, as anywhere else.
    assert leaving.__context__ is (root if where == "failure" else None)
    assert tasks[0].cancelled()
    assert [failure.exception for failure in group.failures] == (
        [root] if where == "failure" else []
    )
    assert group.winner is None or where == "end"


@pytest.mark.parametrize("verdict", [404, ValueError, "no", []])
def test_judge_that_ends_with_something_else_is_told_so(verdict):
    """
    What `end` returns is an exception or None.
    """

    class Odd(Whole):
        def start(self):
            return self

        def end(self, failures):
            return verdict

    leaving = left_by(TaskGroup(policy=Odd()), lambda group: None)

    assert type(leaving) is TypeError
    assert f"Odd.end() must return an exception or None, not {verdict!r}" in str(leaving)


# --- CollectAll --------------------------------------------------------------------------------


def test_collect_all_runs_everything_and_raises_all_failures(workers):
    """
    No task's failure cancels; they leave by time, each the object that it was, values stay.
    """
    errors = {number: ValueError(number) for number in range(1, 20, 3)}

    def task(number):
        if number in errors:
            raise errors[number]
        return number

    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(policy=CollectAll(), **workers(2)) as group,
    ):
        batch = group.map(task, range(20))

    assert type(raised.value) is ExceptionGroup
    assert raised.value.exceptions == tuple(failure.exception for failure in group.failures)
    assert sorted(members(raised.value)) == sorted(map(id, errors.values()))
    assert [task.exception() for task in batch.tasks] == [errors.get(n) for n in range(20)]
    assert [n for n in range(20) if n not in errors] == [
        task.result() for task in batch.tasks if task.successful()
    ]
    assert not group.token.cancelled()
    assert group.winner is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("root"), ExceptionGroup),
        (GeneratorExit(), BaseExceptionGroup),
        (Cancelled("by hand"), BaseExceptionGroup),
        (ExceptionGroup("inner", [ValueError("root")]), ExceptionGroup),
        (BaseExceptionGroup("inner", [Cancelled()]), BaseExceptionGroup),
    ],
    ids=repr,
)
def test_one_failure_is_a_group_of_one(error, kind):
    """
    A `BaseExceptionGroup` where it must be. No context or cause is made up.
    """
    leaving = left_by(TaskGroup(policy=CollectAll()), lambda group: group.submit(fail, error))

    assert type(leaving) is kind
    assert members(leaving) == [id(error)]
    assert (leaving.__cause__, leaving.__context__) == (None, None)
    assert (error.__cause__, error.__context__) == (None, None)


def test_members_bear_notes_of_their_own():
    """
    Each says which task it was and where that was submitted, with the frames of its task.
    """
    line = test_members_bear_notes_of_their_own.__code__.co_firstlineno
    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(name="thumbnails", policy=CollectAll()) as group,
    ):
        group.with_options(name="one").submit(fail, ValueError("root"))
        group.map(fail, [OSError("other")])
        group.wait()
        raise KeyError("body")

    notes = {type(error): getattr(error, "__notes__", []) for error in raised.value.exceptions}
    (one,), (other,) = notes[ValueError], notes[OSError]
    assert one.startswith(f"in task 'one', submitted at {__file__}:")
    assert one.endswith(" to group 'thumbnails'")
    assert line < int(one.split(":")[1].split()[0]) < line + 12
    assert other.startswith(f"in task 'fail[0]', submitted at {__file__}:")
    assert notes[KeyError] == []
    assert getattr(raised.value, "__notes__", []) == []
    for error in raised.value.exceptions[:2]:
        assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1] == "fail"


def test_body_s_exception_cancels_and_is_among_them():
    """
    Once, by time.
    """
    root, body = ValueError("root"), KeyError("body")

    def runs(group):
        with shield():
            group.submit(fail, root).wait(timeout=30)
        tasks.append(started_sleeper(group))
        tasks.append(group.submit(resize, 3))
        tasks[-1].cancel()
        raise body

    tasks = []
    group = TaskGroup(2, policy=CollectAll())
    leaving = left_by(group, runs)

    assert members(leaving) == [id(root), id(body)]
    assert [failure.task is None for failure in group.failures] == [False, True]
    assert tasks[0].cancelled()
    assert group.token.reason is body
    assert leaving.__context__ is None


def test_failure_that_the_body_meets_again_is_there_once():
    """
    Raised by `result()` and let go by the body, it is one failure, and cancels the rest.
    """
    root = ValueError("root")

    def runs(group):
        tasks.append(started_sleeper(group))
        group.submit(fail, root).result()

    tasks = []
    group = TaskGroup(policy=CollectAll())
    leaving = left_by(group, runs)

    assert members(leaving) == [id(root)]
    assert tasks[0].cancelled()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["task", "body"])
def test_interrupt_and_exit_cancel_and_leave_first(policy, kind, where):
    """
    Under every policy they leave by themselves, whatever failed or won before.
    """
    error = kind("enough")

    def runs(group):
        with shield():
            if type(policy) is CollectAll:
                group.submit(fail, ValueError("before")).wait(timeout=30)
            tasks.append(started_sleeper(group))
            if where == "task":
                group.submit(fail, error).wait(timeout=30)
                return
        raise error

    tasks = []
    group = TaskGroup(2, policy=policy)
    leaving = left_by(group, runs)

    assert leaving is error
    assert tasks[0].cancelled()
    assert group.failures[-1].exception is error


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_generator_that_is_closed_in_the_block_ends_quietly(policy):
    """
    Its `GeneratorExit` passes as it is, and the tasks are stopped.
    """

    def generates():
        with TaskGroup(policy=policy) as group:
            tasks.append(started_sleeper(group))
            yield 1

    tasks = []
    generator = generates()
    next(generator)
    generator.close()

    assert tasks[0].cancelled()


def test_generator_that_is_closed_with_a_failure_raises_both():
    """
    `close()` raises what leaves the block.
    """

    def generates():
        with TaskGroup(policy=CollectAll()) as group:
            with shield():
                group.submit(fail, ValueError("root")).wait(timeout=30)
            yield 1

    generator = generates()
    next(generator)
    with pytest.raises(BaseExceptionGroup) as raised:
        generator.close()

    assert [type(error) for error in raised.value.exceptions] == [ValueError, GeneratorExit]


@pytest.mark.parametrize("outer", [FailFast(), CollectAll()], ids=repr)
def test_group_of_failures_is_the_failure_of_the_task_around(outer):
    """
    As it left the inner block, with the notes of both on what they belong to.
    """
    errors = [ValueError("one"), OSError("two")]

    def nests():
        with TaskGroup(name="inner", policy=CollectAll()) as group:
            group.map(fail, errors)

    with pytest.raises(ExceptionGroup) as raised, TaskGroup(name="outer", policy=outer) as group:
        task = group.submit(nests)

    inner = task.exception()
    assert sorted(members(inner)) == sorted(map(id, errors))
    if type(outer) is CollectAll:
        assert members(raised.value) == [id(inner)]
    else:
        assert raised.value is inner
    (note,) = inner.__notes__
    assert note.startswith("in task 'nests', submitted at ")
    assert note.endswith("to group 'outer'")
    for error in errors:
        assert [note.endswith("to group 'inner'") for note in error.__notes__] == [True]


@pytest.mark.parametrize("failing", [False, True])
def test_time_that_runs_out_keeps_what_was_finished(failing):
    """
    Values stay readable; the failures leave if there are any, else `TimeoutError`.
    """

    def runs(group):
        with shield():
            tasks.append(group.submit(resize, 404))
            tasks.append(group.submit(fail, root) if failing else group.submit(abs, 1))
            tasks[0].wait(timeout=30)
            tasks[1].wait(timeout=30)
        tasks.append(started_sleeper(group))
        group.token._limit(0.01)  # only now, however slow this machine is

    root = ValueError("root")
    tasks = []
    group = TaskGroup(2, policy=CollectAll(), timeout=600)
    leaving = left_by(group, runs)

    assert tasks[0].result() == 404
    assert tasks[2].cancelled()
    if failing:
        assert members(leaving) == [id(root)]
    else:
        assert type(leaving) is TimeoutError


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("failing", [False, True])
def test_cancel_from_outside_leaves_after_the_failures(policy, failing):
    """
    Rule four for a group where nothing failed: `Cancelled`; rule two before it.
    """
    token = CancelToken()
    root = ValueError("root")

    def runs(group):
        started_sleeper(group)
        if failing:
            with shield():
                group.submit(fail, root).wait(timeout=30)
        token.cancel("from outside")

    leaving = left_by(TaskGroup(2, policy=policy, token=token), runs)

    if not failing:
        assert type(leaving) is Cancelled
        assert leaving.reason == "from outside"
    elif type(policy) is FailFast:
        assert leaving is root
    else:
        assert members(leaving) == [id(root)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_group_that_is_cancelled_by_itself_leaves_quietly(policy):
    """
    Rule five: nothing failed.
    """

    def runs(group):
        tasks.append(started_sleeper(group))
        group.cancel("enough")

    tasks = []

    assert left_by(TaskGroup(policy=policy), runs) is None
    assert tasks[0].cancelled()


def test_task_that_was_cancelled_names_no_failure_of_another(workers):
    """
    Under `CollectAll` a single cancel is no failure, and the group goes on.
    """
    with TaskGroup(policy=CollectAll(), **workers(1)) as group:
        running = started_sleeper(group)
        queued = group.submit(abs, 1)
        assert queued.cancel("not needed")
        assert running.cancel("not needed")
        later = group.submit(abs, -2)

    assert group.failures == ()
    assert later.result() == 2
    with pytest.raises(TaskCancelledError, match="not needed"):
        queued.result()


# --- FirstSuccess ------------------------------------------------------------------------------


def test_first_task_with_a_value_wins_and_cancels_the_rest(workers):
    """
    Failures before it are no matter: the block is left quietly.
    """
    with TaskGroup(policy=FirstSuccess(), **workers(2)) as group:
        with shield():
            bad = group.submit(fail, ValueError("mirror is down"))
            bad.wait(timeout=30)
        running = started_sleeper(group)
        go = threading.Event()
        winner = group.submit(outlasts, go, 404)
        queued = [group.submit(sleeper) for _ in range(3)]
        go.set()

    assert group.winner is winner
    assert winner.result() == 404
    assert running.cancelled()
    assert all(task.cancelled() for task in queued)
    assert [failure.task for failure in group.failures] == [bad]


def test_none_is_a_value_too():
    """
    A task that returns nothing has won.
    """
    with TaskGroup(policy=FirstSuccess()) as group:
        winner = group.submit(resize, None)

    assert group.winner is winner


def test_value_that_comes_with_a_cancel_has_won_or_not():
    """
    For all who ask: there is a winner, or the failures leave.
    """

    class Cancelling(FirstSuccess):
        """As a cancel from another thread between two looks."""

        def start(self):
            judge = super().start()

            class Judge:
                def outcome(self, task, error):
                    enough = judge.outcome(task, error)
                    if error is None:
                        group.token.cancel("enough")
                    return enough

                end = judge.end

            return Judge()

    with contextlib.suppress(ExceptionGroup), TaskGroup(1, policy=Cancelling()) as group:
        group.submit(fail)
        first = group.submit(abs, 1)

    assert group.winner is first


def test_of_two_successes_at_once_one_wins():
    """
    Both are values; the judge is told one at a time, and the first one told wins.
    """
    recorded = Recorded(FirstSuccess())
    for _ in range(50):
        meeting = threading.Barrier(2)

        def returns(number, meeting=meeting):
            meeting.wait(timeout=30)
            return number

        with TaskGroup(2, policy=recorded) as group:
            batch = group.map(returns, range(2))

        told = [task for task, _ in recorded.judges[-1].told]
        assert group.winner is told[0]
        assert batch.results() == [0, 1]


def test_without_a_winner_all_failures_leave():
    """
    As with `CollectAll`, of one too.
    """
    for count in (1, 3):
        with pytest.raises(ExceptionGroup) as raised, TaskGroup(policy=FirstSuccess()) as group:
            group.map(fail, [ValueError(number) for number in range(count)])

        assert group.winner is None
        assert raised.value.exceptions == tuple(failure.exception for failure in group.failures)
        assert len(group.failures) == count
        assert all("in task 'fail[" in error.__notes__[0] for error in raised.value.exceptions)


def test_group_without_tasks_has_no_winner_and_leaves_quietly():
    """
    There is nothing to raise.
    """
    with TaskGroup(policy=FirstSuccess()) as group:
        assert group.winner is None

    assert group.winner is None


@pytest.mark.parametrize("won", [False, True])
def test_body_s_own_exception_leaves_winner_or_not(won):
    """
    As the object it is, not in a group, before the tasks' failures.
    """
    body = KeyError("body")

    def runs(group):
        with shield():
            group.submit(fail, ValueError("root")).wait(timeout=30)
            if won:
                group.submit(abs, -404).wait(timeout=30)
        raise body

    group = TaskGroup(policy=FirstSuccess())

    assert left_by(group, runs) is body
    assert (group.winner is not None) is won


@pytest.mark.parametrize("failing", [False, True])
def test_success_after_the_token_was_set_has_won_nothing(failing):
    """
    It did not end the group; so there is no winner, and what failed leaves.
    """
    go = threading.Event()
    root = ValueError("root")

    def runs(group):
        tasks.append(group.submit(outlasts, go, 404))
        until(tasks[0].running)
        if failing:
            with shield():
                group.submit(fail, root).wait(timeout=30)
        group.cancel("enough")
        go.set()

    tasks = []
    group = TaskGroup(2, policy=FirstSuccess())
    leaving = left_by(group, runs)

    assert group.winner is None
    assert tasks[0].result() == 404
    if failing:
        assert members(leaving) == [id(root)]
    else:
        assert leaving is None


def test_winner_is_known_while_the_block_is_open():
    """
    And the token says that somebody has won.
    """
    with TaskGroup(policy=FirstSuccess()) as group:
        winner = group.submit(abs, -404)
        with shield():
            until(group.token.cancelled)
        before = group.winner

    assert before is group.winner is winner


@pytest.mark.parametrize("policy", [FailFast(), CollectAll()], ids=repr)
def test_other_policies_have_no_winner(policy):
    """
    No success makes them end the group.
    """
    with TaskGroup(policy=policy) as group:
        group.submit(abs, 1)

    assert group.winner is None


def test_one_line_map_takes_a_policy():
    """
    What leaves is what the policy makes of the failures.
    """
    with pytest.raises(ExceptionGroup) as raised:
        fastpool.map(lambda number: 1 // number, [0, 1, 0], policy=CollectAll())

    assert [type(error) for error in raised.value.exceptions] == [ZeroDivisionError] * 2


# --- Policies of one's own ---------------------------------------------------------------------


class ErrorBudget:
    """Gives up after more than so many failures."""

    def __init__(self, most):
        self.most = most

    def start(self):
        return Budget(self.most)


class Budget:
    def __init__(self, left):
        self.left = left

    def outcome(self, task, error):
        self.left -= error is not None
        return self.left < 0

    def end(self, failures):
        if self.left >= 0:
            return None
        return ExceptionGroup("too many failures", [each.exception for each in failures])


class StopWhen:
    """Stops as soon as a value is what was looked for."""

    def __init__(self, found):
        self.found = found

    def start(self):
        return Search(self.found)


class Search:
    def __init__(self, found):
        self.found = found

    def outcome(self, task, error):
        return error is not None or self.found(task.result())

    def end(self, failures):
        return failures[0].exception if failures else None


@pytest.mark.parametrize("failing", [3, 4])
def test_error_budget_ends_the_group_when_it_is_spent(workers, failing):
    """
    So many failures are nothing; one more cancels the rest, and all of them leave.
    """

    def task(number):
        if number < failing:
            raise ValueError(number)
        return number

    batches = []
    group = TaskGroup(policy=ErrorBudget(3), **workers(1))
    leaving = left_by(group, lambda group: batches.append(group.map(task, list(range(50)))))

    (batch,) = batches
    done = [task for task in batch.tasks if not task.cancelled()]
    if failing == 3:
        assert leaving is None
        assert len(done) == 50
    else:
        assert [error.args for error in leaving.exceptions] == [(0,), (1,), (2,), (3,)]
        assert len(done) == 4
    assert len(group.failures) == failing


def test_group_stops_when_a_value_is_what_was_looked_for(workers):
    """
    That task is the winner; no task after it is started.
    """
    ran = []

    def task(number):
        ran.append(number)
        return number

    with TaskGroup(policy=StopWhen(lambda value: value == 3), **workers(1)) as group:
        group.map(task, range(50))

    assert group.winner.result() == 3
    assert ran == [0, 1, 2, 3]


def test_predicate_that_raises_ends_the_group():
    """
    With its own error, and no hang.
    """
    with (
        pytest.raises(ZeroDivisionError),
        TaskGroup(2, policy=StopWhen(lambda value: 1 // value)) as group,
    ):
        asleep = started_sleeper(group)
        group.submit(resize, 0)

    assert asleep.cancelled()
    assert group.failures == ()


# --- Told, and forgotten -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "ends"),
    [
        (FailFast(), "task_failed"),
        (FirstSuccess(), "task_succeeded"),
        (ErrorBudget(0), "task_failed"),
    ],
    ids=["FailFast", "FirstSuccess", "ErrorBudget"],
)
def test_cancel_by_the_policy_is_told_once_after_what_caused_it(policy, ends):
    """
    However many tasks end at that moment.
    """
    seen = []
    meeting = threading.Barrier(4)

    def task(number):
        meeting.wait(timeout=30)
        if ends == "task_failed":
            raise ValueError(number)

    left_by(
        TaskGroup(5, policy=policy, observers=[lambda event: seen.append(event.name)]),
        lambda group: (started_sleeper(group), group.map(task, range(4))),
    )

    assert seen.count("group_cancelled") == 1
    assert seen.index("group_cancelled") > seen.index(ends)
    assert seen[-1] == "group_closed"


def test_collect_all_tells_of_no_cancel():
    """
    There was none.
    """
    seen = []
    left_by(
        TaskGroup(policy=CollectAll(), observers=[lambda event: seen.append(event.name)]),
        lambda group: group.map(fail, [ValueError(), OSError()]),
    )

    assert "group_cancelled" not in seen
    assert seen.count("task_failed") == 2


class Witness:
    """Something that a failed task has in hand."""


def fails_with(witnesses):
    witness = Witness()
    witnesses.append(weakref.ref(witness))
    raise ValueError("root")


@pytest.mark.parametrize(
    "policy", [CollectAll(), FirstSuccess(), ErrorBudget(0)], ids=lambda policy: str(type(policy))
)
def test_locals_of_failed_tasks_die_without_the_collector(policy):
    """
    Once the names for group, tasks and what left the block are gone.
    """

    def run():
        try:
            with TaskGroup(2, policy=policy) as group:
                group.submit(fails_with, witnesses)
                group.map(lambda item: fails_with(witnesses), range(3))
        except ExceptionGroup:
            kept.append(sum(witness() is not None for witness in witnesses))
        finally:
            del group

    witnesses, kept = [], []
    gc.collect()
    gc.disable()
    try:
        run()
        fastpool.shutdown()  # without a GIL, what a parked thread made is freed when it wakes
        alive = [witness() for witness in witnesses if witness() is not None]
    finally:
        gc.enable()

    assert kept == [len(witnesses)]
    assert alive == []
