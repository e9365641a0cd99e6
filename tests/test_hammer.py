"""
Races by brute force: threads that take turns as often as they can meet at the same token or group.

They are bounded by rounds, and a limit of time only ends a hang. On a build with the GIL most
windows cannot open here, and on one without it they do.
"""

import contextlib
import threading

import pytest
from staging import resize, start

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    GroupClosedError,
    TaskCancelledError,
    TaskGroup,
)

pytestmark = pytest.mark.usefixtures("hasty")

ROUNDS = 1000


def hammer(rounds, *acts):
    """Call each act in a thread of its own with round after round, all of them at the same time."""
    together = threading.Barrier(len(acts))

    def run(act):
        try:
            for each in rounds:
                together.wait(timeout=60)
                act(each)
        except BaseException:
            together.abort()  # or the others would wait for this one
            raise

    running = [start(run, act) for act in acts]
    for thread, _ in running:
        thread.join(timeout=300)
    assert [outcome for _, outcome in running] == [[None]] * len(acts)


class Round:
    """One token, and what threads have made of it."""

    def __init__(self):
        self.token = CancelToken()
        self.ran = []
        self.told = []
        self.made = None
        self.registration = self.token.on_cancel(self.note)

    def note(self):
        self.ran.append(threading.get_ident())


def cancel(each):
    """Whoever wins finds every descendant set that was there."""
    won = each.token.cancel("first")
    each.told.append(won)
    if won and isinstance(each.made, CancelToken):
        assert each.made.cancelled()


def cancel_otherwise(each):
    """With another reason."""
    each.told.append(each.token.cancel("second"))


# --- Tokens ---------------------------------------------------------------------------------------


def test_one_of_two_cancels_wins_and_every_waiter_wakes():
    """
    Its reason stands; who waits or sleeps hears of it.
    """

    def wait(each):
        assert each.token.wait(60)
        assert each.token.reason in ("first", "second")

    def sleep(each):
        with pytest.raises(Cancelled):
            each.token.child().sleep(60)

    rounds = [Round() for _ in range(ROUNDS)]
    hammer(rounds, cancel, cancel_otherwise, wait, sleep)

    for each in rounds:
        assert sorted(each.told) == [False, True]
        assert len(each.ran) == 1


@pytest.mark.parametrize("how", ["unregister", "close"])
def test_callback_registered_against_a_cancel_runs_once(how):
    """
    A new one in either thread; one that is taken back runs, or never does.
    """

    def register(each):
        each.late = []
        each.made = each.token.on_cancel(lambda: each.late.append(threading.get_ident()))
        each.registered_in = threading.get_ident()

    def cancel_here(each):
        each.cancelled_in = threading.get_ident()
        cancel(each)

    def take_back(each):
        each.won = getattr(each.registration, how)()
        each.by_then = len(each.ran)

    rounds = [Round() for _ in range(ROUNDS)]
    hammer(rounds, cancel_here, register, take_back)

    for each in rounds:
        assert each.told == [True]
        assert len(each.late) == 1
        assert each.late[0] in (each.cancelled_in, each.registered_in)
        if how == "unregister":
            assert each.won is (each.ran == [])
        else:
            assert each.by_then == len(each.ran) <= 1


@pytest.mark.parametrize("how", ["child", "any", "grandchild"])
def test_child_made_against_a_cancel_is_set(how):
    """
    By the one who made it, or by the one who cancelled, and for the same reason.
    """
    other = CancelToken()

    def make(each):
        if how == "any":
            each.made = CancelToken.any(other, each.token)
        else:
            each.made = each.token.child() if how == "child" else each.token.child().child()
        each.heard = []
        each.kept = each.made.on_cancel(lambda: each.heard.append(1))

    rounds = [Round() for _ in range(ROUNDS)]
    hammer(rounds, cancel, make)

    for each in rounds:
        assert each.made.reason == "first"
        assert each.heard == [1]
    assert not other.cancelled()


@pytest.mark.parametrize("what", ["scope", "group"])
def test_scope_that_is_left_against_a_cancel_leaves_nothing(what):
    """
    The parent forgets it; a group's token stays what it was when the block was left.
    """

    def leave(each):
        with fastpool.use_token(each.token):
            if what == "scope":
                with fastpool.timeout(3600):
                    return
            with contextlib.suppress(Cancelled), TaskGroup(1) as group:
                each.made = group
            each.heard = group.token.cancelled()

    def cancel_alone(each):
        each.told.append(each.token.cancel("first"))

    rounds = [Round() for _ in range(ROUNDS)]
    hammer(rounds, cancel_alone, leave)

    for each in rounds:
        assert each.told == [True]
        assert len(each.ran) == 1
        assert len(each.token._entries) == 1  # why it was set
        assert what == "scope" or each.made.token.cancelled() is each.heard


# --- Groups ---------------------------------------------------------------------------------------


def against_the_body(count, act, body):
    """Open group after group; in each a thread acts on it while the body goes on."""
    together = threading.Barrier(2)
    groups = []

    def run():
        for _ in range(count):
            together.wait(timeout=60)
            act(groups[-1])

    thread, outcome = start(run)
    try:
        for _ in range(count):
            with TaskGroup(2) as group:
                groups.append(group)
                body(group, lambda: together.wait(timeout=60))
    except BaseException:
        together.abort()
        raise
    finally:
        thread.join(timeout=300)
    assert outcome == [None]


@pytest.mark.parametrize("call", ["submit", "map", "imap", "imap_unordered"])
def test_submit_against_the_end_is_done_or_refused(call):
    """
    What was taken has all its values; what was not is an error, and nothing is lost between.
    """
    taken, refused = [], []

    def act(group):
        try:
            if call == "submit":
                taken.append(group.submit(resize, 404))
            elif call == "map":
                taken.append(group.map(resize, range(3)))
            else:
                taken.append(list(getattr(group, call)(resize, range(3))))
        except GroupClosedError as error:
            refused.append(error)

    def body(group, together):
        group.submit(resize, 1)
        together()

    against_the_body(ROUNDS // 2, act, body)

    assert len(taken) + len(refused) == ROUNDS // 2
    for each in taken:
        if call == "submit":
            assert each.result(timeout=0) == 404
        elif call == "map":
            assert each.results(timeout=0) == [0, 1, 2]
        else:
            assert sorted(each) == [0, 1, 2]


@pytest.mark.parametrize("call", ["map", "imap", "imap_unordered"])
def test_values_under_a_cancel_are_true_or_missing(call):
    """
    Each task has its own value or was cancelled, and the block is left quietly.
    """
    read = []

    def act(group):
        group.cancel("enough")

    def body(group, together):
        together()
        seen = []
        read.append((group.map(resize, range(20)) if call == "map" else None, seen))
        if call == "map":
            seen.extend(read[-1][0].results())
        else:
            values = getattr(group, call)(resize, iter(range(20)))
            for value in values:
                seen.append(value)

    against_the_body(ROUNDS // 2, act, body)

    for batch, seen in read:
        if call == "imap":
            assert seen == list(range(len(seen)))
        else:
            assert set(seen) <= set(range(20))
            assert len(set(seen)) == len(seen)
        for number, task in enumerate(batch.tasks if batch else ()):
            assert task.done()
            if task.cancelled():
                with pytest.raises(TaskCancelledError, match="enough"):
                    task.result()
            else:
                assert task.result() == number


def test_batch_that_is_cancelled_runs_or_is_cancelled():
    """
    Task by task, and the group goes on.
    """
    batches = []

    def act(group):
        batches[-1][0].cancel("enough")

    def body(group, together):
        ran = []
        batches.append((group.map(ran.append, range(20)), ran))
        together()

    against_the_body(ROUNDS // 2, act, body)

    for batch, ran in batches:
        assert len(set(ran)) == len(ran)
        assert [task.cancelled() for task in batch.tasks] == [n not in ran for n in range(20)]


@pytest.mark.parametrize("call", ["submit", "map"])
def test_first_of_many_failures_is_one_of_them(call):
    """
    It leaves, each worker has had one at the most, and what did not fail was cancelled.
    """
    for _ in range(ROUNDS // 2):
        errors = [ValueError(number) for number in range(20)]

        def fails(number, errors=errors):
            raise errors[number]

        tasks = []
        with pytest.raises(ValueError, match=r"\d+") as left, TaskGroup(4) as group:
            if call == "map":
                tasks = group.map(fails, range(20)).tasks
            for number in range(20 if call == "submit" else 0):
                tasks.append(group.submit(fails, number))

        assert left.value is group.failures[0].exception
        assert 1 <= len(group.failures) <= 4
        recorded = {failure.task: failure.exception for failure in group.failures}
        for number, task in enumerate(tasks):
            assert task.done()
            assert task.cancelled() is (task not in recorded)
            assert task.cancelled() or task.exception() is recorded[task] is errors[number]


def test_all_of_many_failures_are_collected():
    """
    None is lost and none is there twice.
    """
    for _ in range(ROUNDS // 10):

        def fails(number):
            raise ValueError(number)

        with pytest.raises(ExceptionGroup) as left, TaskGroup(4, policy=CollectAll()) as group:
            group.map(fails, range(20))

        assert sorted(error.args[0] for error in left.value.exceptions) == list(range(20))
