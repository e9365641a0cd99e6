"""
Groups that are not left as they should be: dropped, or left after the one around them.
"""

import contextlib
import contextvars
import functools
import gc
import itertools
import sys
import threading
import warnings
import weakref

import pytest
from staging import act_at, in_thread, until

import fastpool
from fastpool import CancelToken, TaskGroup, _scope, cancellable, current_token
from fastpool._taskgroup import _open_runs


@cancellable
def sleeps(token, begun=None):
    if begun is not None:
        begun.set()
    token.sleep(60)


def names_of(told):
    return [str(warning.message) for warning in told]


# --- Dropped --------------------------------------------------------------------------------------


def test_dropped_group_is_named_with_the_line_where_it_was_entered():
    """
    Its tasks are told to stop, what is queued never starts, its threads end.
    """
    begun = threading.Event()
    group = TaskGroup(1, name="lost")

    with pytest.warns(ResourceWarning) as told:
        group.__enter__()
        line = sys._getframe().f_lineno - 1
        token = group.token
        running, queued = group.submit(sleeps, begun), group.submit(pow, 2, 3)
        assert begun.wait(timeout=60)
        del group

    assert names_of(told) == [
        f"group 'lost', entered at {__file__}:{line}, was dropped without leaving its with block; "
        "cancelled"
    ]
    assert (told[0].filename, told[0].lineno) == (__file__, line)
    assert token.reason == "it was dropped without leaving its block"
    for task in (running, queued):
        assert task.wait(timeout=60)
        assert task.cancelled()
    until(lambda: not any("lost" in thread.name for thread in threading.enumerate()))


def test_group_that_a_stack_entered_is_named_with_the_line_of_the_stack():
    """
    Not with a line of `contextlib`, which tells nobody anything.
    """
    stack = contextlib.ExitStack()

    with pytest.warns(ResourceWarning) as told:
        stack.enter_context(TaskGroup(1, name="lost"))
        line = sys._getframe().f_lineno - 1
        stack.pop_all()

    assert f"entered at {__file__}:{line}," in names_of(told)[0]


def test_code_that_goes_on_is_in_the_body_no_more():
    """
    The token that is current is the one from before, and another group can be used.
    """
    outer = CancelToken()

    with fastpool.use_token(outer):
        before = _scope.current.get()
        group = TaskGroup(1)
        group.__enter__()
        context = contextvars.copy_context()
        with pytest.warns(ResourceWarning):
            del group

        assert _scope.current.get() is before  # or one after the other would be kept
        assert current_token() is outer
        assert context.run(current_token) is outer
        with TaskGroup(1) as group:
            assert group.submit(pow, 2, 3).result() == 8
        assert current_token() is outer
    assert not outer.cancelled()


def test_dropped_group_leaves_nothing_behind():
    """
    The next one to be entered ends it; the token around it keeps nothing of it.
    """
    outer = CancelToken()
    with fastpool.use_token(outer):
        group = TaskGroup(1)
        group.__enter__()
    before = len(outer._entries)
    run = weakref.ref(group._run)
    group.submit(pow, 2, 3).wait()
    with pytest.warns(ResourceWarning):
        del group
    after = len(outer._entries)

    with TaskGroup(1):
        pass

    assert after == len(outer._entries) == before - 1
    assert run() not in _open_runs


def test_several_that_were_dropped_are_each_ended_once():
    """
    Also where ending one of them ends another; and one that has just come to rest.
    """
    closed = []
    release = threading.Event()

    def opened(name):
        group = TaskGroup(1, observers=[functools.partial(observer, name)])
        return group.__enter__()

    def observer(name, event):
        if event.name != "group_closed":
            return
        closed.append(name)
        if name == "first":
            with TaskGroup(1):
                pass  # it has ended the second
            release.set()
            until(lambda: run.come_to_rest(None))

    groups = [opened(name) for name in ("first", "second", "third")]
    run = groups[2]._run
    groups[2].submit(release.wait, 60)
    until(lambda: run.in_hand())
    with pytest.warns(ResourceWarning):
        while groups:
            del groups[0]
    before = closed.copy()

    with TaskGroup(1):
        pass

    assert before == []
    assert closed == ["first", "second", "third"]


def test_failure_of_a_dropped_group_is_not_lost(unraised):
    """
    Nobody can be given it, so it goes to the hook.
    """
    error = ValueError("bad header")

    def fails():
        raise error

    group = TaskGroup(1)
    group.__enter__()
    group.submit(fails).wait()
    with pytest.warns(ResourceWarning):
        del group

    fastpool.shutdown()

    assert unraised == [error]


def test_warning_made_an_error_goes_to_the_hook(unraised):
    """
    The group is cancelled all the same.
    """
    group = TaskGroup(1)
    group.__enter__()
    token = group.token

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del group

    assert [type(error) for error in unraised] == [ResourceWarning]
    assert token.cancelled()


def test_observers_hear_of_the_end_from_the_next_one():
    """
    Not in the finalizer, where no code of theirs should run.
    """
    events = []
    group = TaskGroup(1, observers=[lambda event: events.append(event.name)])
    group.__enter__()
    with pytest.warns(ResourceWarning):
        del group
    in_finalizer = events.copy()

    with TaskGroup(1):
        pass

    assert in_finalizer == ["group_opened"]
    assert events == ["group_opened", "group_cancelled", "group_closed"]


def test_quick_callbacks_run_at_once_and_slow_ones_in_a_helper_thread():
    """
    The finalizer may run where their locks are held; and others wait for what they do.
    """

    class Slow:
        """Interrupted by what may block."""

    threads = {}
    fastpool._wakers.register(
        Slow, lambda slow: threads.setdefault("slow", threading.get_ident()), slow=True
    )
    try:
        group = TaskGroup(1)
        group.__enter__()
        token = group.token
        registration = token.on_cancel(lambda: threads.setdefault("quick", threading.get_ident()))
        interrupts = token.interrupts(Slow())
        interrupts.__enter__()
        with pytest.warns(ResourceWarning):
            del group
        at_once = threads.get("quick")
        until(lambda: "slow" in threads)
        with pytest.raises(fastpool.Cancelled):
            interrupts.__exit__(None, None, None)
    finally:
        del fastpool._wakers._wakers[Slow]

    assert at_once == threading.get_ident() != threads["slow"]
    assert not registration.unregister()


def test_group_dropped_in_a_task_ends_with_its_threads():
    """
    In whatever thread that is.
    """

    def drops():
        inner = TaskGroup(1, name="lost")
        inner.__enter__()
        inner.submit(sleeps)
        del inner
        return current_token()

    with pytest.warns(ResourceWarning, match="'lost'"), TaskGroup(1) as group:
        token = group.submit(drops).result(timeout=60)

    assert token is not None
    until(lambda: not any("lost" in thread.name for thread in threading.enumerate()))


def test_group_that_is_collected_with_its_cycle_is_reported():
    """
    Whenever that comes.
    """
    cycle = [TaskGroup(1, name="lost")]
    cycle[0].__enter__()
    cycle.append(cycle)
    del cycle

    with pytest.warns(ResourceWarning, match="'lost'"):
        gc.collect()


@pytest.mark.parametrize("user", ["group", "dump", "shutdown", "cancel"])
def test_group_may_be_dropped_at_every_line_of_ours(user):
    """
    A finalizer runs in the middle of anything, and nothing hangs or is lost.
    """
    # At each line of the library's in turn, as a thread uses another group, a group with a task
    # that runs and one that is queued is dropped in that very thread.
    values = {
        "group": lambda: [task.result() for task in use()],
        "dump": lambda: len(fastpool.dump()),
        "shutdown": fastpool.shutdown,
        "cancel": lambda: CancelToken().child().cancel(),
    }

    def use():
        with TaskGroup(2) as group:
            tasks = [group.submit(pow, 2, number) for number in range(3)]
            group.map(pow, [2, 2], [3, 4]).wait()
        return tasks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in itertools.count():
            held, dropped = [], []

            def prepare(held=held):
                begun = threading.Event()
                group = TaskGroup(1)
                contextvars.copy_context().run(group.__enter__)  # else it is around the other one
                tasks = [group.submit(sleeps, begun), group.submit(pow, 2, 3)]
                assert begun.wait(timeout=60)
                held.append(group)
                return tasks

            def run(held=held, dropped=dropped, prepare=prepare, step=step):
                tasks = prepare()
                sys.settrace(act_at(step, lambda: dropped.append(held.pop() and None)))
                try:
                    value = values[user]()
                finally:
                    sys.settrace(None)
                held.clear()
                return value, [task.wait(timeout=60) for task in tasks]

            value, ended = in_thread(run)

            assert ended == [True, True]
            if user == "group":
                assert value == [1, 2, 4]
            if not dropped:
                break
    fastpool.shutdown()
    assert step > 5


# --- Out of order ---------------------------------------------------------------------------------


def test_group_left_after_the_one_around_it_is_named():
    """
    As the outer one is left, the inner one is cancelled; leaving it later says nothing more.
    """
    outer, inner = TaskGroup(1, name="outer"), TaskGroup(1, name="inner")
    outer.__enter__()
    inner.__enter__()
    task = inner.submit(sleeps)

    with pytest.warns(ResourceWarning) as told:
        outer.__exit__(None, None, None)
    until(lambda: not any("inner" in thread.name for thread in threading.enumerate()))
    leased = dict(inner._run.backend._leases)
    inner.__exit__(None, None, None)

    assert len(told) == 1
    assert "group 'inner', entered at" in names_of(told)[0]
    assert "is still open as group 'outer' around it is left; cancelled" in names_of(told)[0]
    assert inner.token.reason == "group 'outer' around it was left first"
    assert leased == {}
    assert task.cancelled()
    assert current_token() is CancelToken.NEVER


def test_group_of_a_generator_that_ends_late_is_named():
    """
    A generator that is put away unfinished keeps its block open.
    """

    def squares():
        with TaskGroup(1, name="lazy") as group:
            for number in range(10):
                yield group.submit(pow, number, 2).result()

    numbers = squares()
    with pytest.warns(ResourceWarning, match="'lazy'.*'outer'"), TaskGroup(1, name="outer"):
        assert next(numbers) == 0
    numbers.close()

    assert current_token() is CancelToken.NEVER


def test_each_of_several_is_named_from_the_inside():
    """
    A scope in between is none.
    """
    groups = [TaskGroup(1, name=name) for name in ("outer", "middle", "inner")]
    groups[0].__enter__()
    groups[1].__enter__()
    with fastpool.timeout(60):
        groups[2].__enter__()

        with pytest.warns(ResourceWarning) as told:
            groups[0].__exit__(None, None, None)
        groups[2].__exit__(None, None, None)
        groups[1].__exit__(None, None, None)

    assert [message.split(",")[0] for message in names_of(told)] == [
        "group 'inner'",
        "group 'middle'",
    ]


def test_warning_made_an_error_does_not_keep_the_block_from_being_left(unraised):
    """
    It goes to the hook.
    """
    outer, inner = TaskGroup(1), TaskGroup(1)
    outer.__enter__()
    inner.__enter__()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)

    assert [type(error) for error in unraised] == [ResourceWarning]


def test_group_left_in_another_thread_is_no_disorder():
    """
    What is open there says nothing of it.
    """
    group = TaskGroup(1)
    contextvars.copy_context().run(group.__enter__)

    def leave():
        with TaskGroup(1) as other:
            group.__exit__(None, None, None)
            return other.submit(pow, 2, 3).result()

    value = in_thread(leave)
    with TaskGroup(1) as other:
        again = other.submit(pow, 2, 3).result()

    assert value == again == 8


def test_warning_that_cannot_be_shown_does_not_keep_the_block_from_being_left(
    monkeypatch, unraised
):
    """
    Standard error is closed, say. It goes to the hook.
    """

    def broken(*args, **kwargs):
        raise ValueError("I/O operation on closed file")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", broken)
        with TaskGroup(1, name="outer"):
            inner = TaskGroup(1, name="inner")
            inner.__enter__()

    assert [str(error) for error in unraised] == ["I/O operation on closed file"]
    inner.__exit__(None, None, None)
