"""
Who reports a failure to a token, on a bare ThreadPool and without a group.
"""

import contextvars
import threading
from multiprocessing.pool import ThreadPool

import pytest

from fastpool import (
    Cancelled,
    CancelToken,
    TaskGroup,
    cancellable,
    current_token,
    timeout,
    use_token,
)


class Stop(BaseException):
    """No `Exception`."""


@cancellable
def fails(token, error):
    raise error


@cancellable
def checks(token):
    token.check()


@cancellable
def sleeps(token, asleep):
    asleep.release()
    token.sleep(60)


def outcome(call, *args):
    """
    What a call returns or raises: a worker of a bare pool does not survive a `Cancelled`.
    """
    try:
        return call(*args)
    except BaseException as error:
        return error


def in_thread(call):
    """
    What a call returns or raises in another thread.
    """
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome(call)))
    thread.start()
    thread.join(timeout=60)
    return outcomes[0]


def test_failure_ends_every_job_of_a_bare_pool():
    """
    Jobs that were handed one token stop when the first of them fails.
    """
    token = CancelToken()
    error = ValueError("bad header")
    asleep = threading.Semaphore(0)

    with ThreadPool(4) as pool:
        sleepers = [pool.apply_async(outcome, (sleeps.with_token, token, asleep)) for _ in range(3)]
        for _ in sleepers:
            assert asleep.acquire(timeout=60)
        failed = pool.apply_async(outcome, (fails.with_token, token, error))
        outcomes = [sleeper.get(timeout=60) for sleeper in sleepers]

        assert failed.get(timeout=60) is error
    assert token.reason is error
    for cancelled in outcomes:
        assert type(cancelled) is Cancelled
        assert cancelled.token is token
        assert cancelled.reason is error
        assert cancelled.__cause__ is error


def test_exception_reaches_the_handle_of_a_bare_pool():
    """
    The pool's own `get()` raises the failure, as for any function.
    """
    token = CancelToken()

    with ThreadPool(1) as pool, pytest.raises(ValueError, match="bad header"):
        pool.apply_async(fails.with_token, (token, ValueError("bad header"))).get(timeout=60)

    assert token.cancelled()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
def test_exception_of_any_class_is_reported(kind):
    """
    Whatever leaves the call is recorded with the token, and then sets it.
    """
    token, error = CancelToken(), kind()

    with pytest.raises(kind) as raised:
        fails.with_token(token, error)

    assert raised.value is error
    assert token.reason is error
    with pytest.raises(Cancelled) as cancelled:
        token.check()
    assert cancelled.value.__cause__ is error


def test_reported_exception_leaves_as_it_is():
    """
    Reporting adds neither cause nor context, and the traceback shows the function.
    """
    error = ValueError("bad header")

    with pytest.raises(ValueError, match="bad header") as raised:
        fails.with_token(CancelToken(), error)

    assert error.__cause__ is None
    assert error.__context__ is None
    assert raised.traceback[-1].name == "fails"


def test_exception_keeps_its_own_cause_and_context():
    """
    What the function chained stays chained.
    """

    @cancellable
    def chains(token):
        try:
            raise KeyError("a")
        except KeyError as error:
            raise ValueError("b") from error

    with pytest.raises(ValueError, match="b") as raised:
        chains.with_token(CancelToken())

    assert type(raised.value.__cause__) is KeyError


def test_failure_is_recorded_when_the_token_turns():
    """
    Whoever is woken by the token finds the failure there already.
    """
    token, error = CancelToken(), ValueError("bad header")
    seen = []
    token.on_cancel(lambda: seen.append((token.reason, outcome(token.check).__cause__)))

    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(token, error)

    assert seen == [(error, error)]


def test_call_that_returns_reports_nothing():
    """
    Success leaves the token as it is.
    """
    token = CancelToken()

    checks.with_token(token)

    assert not token.cancelled()


def test_first_failure_stays_the_reason():
    """
    A second failure changes nothing.
    """
    token, first, second = CancelToken(), ValueError("first"), ValueError("second")

    for error in (first, second):
        with pytest.raises(ValueError, match=r"first|second"):
            fails.with_token(token, error)

    assert token.reason is first


def test_direct_call_just_raises():
    """
    A direct call reports to nobody, and its caller may handle the exception.
    """
    token = CancelToken()

    with use_token(token), pytest.raises(ValueError, match="bad header"):
        fails(ValueError("bad header"))

    assert not token.cancelled()


def test_token_that_is_current_by_a_scope_is_not_reported_to():
    """
    Whoever made the token current in this thread may handle what the call raises.
    """
    token = CancelToken()

    with use_token(token), pytest.raises(ValueError, match="bad header"):
        fails.with_token(token, ValueError("bad header"))

    assert not token.cancelled()


def test_token_of_a_timeout_scope_is_not_reported_to():
    """
    The token that a scope made is its own too.
    """
    with timeout(60) as token:
        with pytest.raises(ValueError, match="bad header"):
            fails.with_token(token, ValueError("bad header"))

        assert not token.cancelled()


def test_token_of_a_call_further_up_is_not_reported_to():
    """
    The outer `with_token` brought the token; the inner one only passes it on.
    """

    @cancellable
    def handles(token):
        with pytest.raises(ValueError, match="bad header"):
            fails.with_token(token, ValueError("bad header"))
        return token.cancelled()

    token = CancelToken()

    assert handles.with_token(token) is False
    assert not token.cancelled()


def test_what_passes_through_calls_is_reported_by_the_outermost():
    """
    Unhandled, the same object reaches the call that brought the token.
    """

    @cancellable
    def passes(token, error):
        fails.with_token(token, error)

    token, error = CancelToken(), ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"):
        passes.with_token(token, error)

    assert token.reason is error


def test_outer_token_is_not_reported_to():
    """
    A failure is reported to the token that is named, not to the current one around it.
    """
    outer, token = CancelToken(), CancelToken()

    with use_token(outer), pytest.raises(ValueError, match="bad header"):
        fails.with_token(token, ValueError("bad header"))

    assert token.cancelled()
    assert not outer.cancelled()


def test_scope_between_hides_the_token():
    """
    A token counts as current only while no other stands above it.
    """
    outer, inner = CancelToken(), CancelToken()

    with use_token(outer), use_token(inner), pytest.raises(ValueError, match="bad header"):
        fails.with_token(outer, ValueError("bad header"))

    assert outer.cancelled()
    assert not inner.cancelled()


def test_token_of_an_inherited_context_is_reported_to():
    """
    In a thread that was given the context the token is current, but not of its own making.
    """
    token, error = CancelToken(), ValueError("bad header")

    with use_token(token):
        context = contextvars.copy_context()
        raised = in_thread(lambda: context.run(fails.with_token, token, error))

    assert raised is error
    assert token.reason is error


def test_token_made_current_in_an_inherited_context_is_not_reported_to():
    """
    Once the thread has made it current itself, it is the thread's own.
    """
    token = CancelToken()

    def adopts():
        with use_token(token):
            fails.with_token(token, ValueError("bad header"))

    with use_token(token):
        context = contextvars.copy_context()
        raised = in_thread(lambda: context.run(adopts))

    assert type(raised) is ValueError
    assert not token.cancelled()


def test_context_of_an_ended_scope_is_reported_to_from_a_new_thread():
    """
    A thread that ended does not lend its right to one that comes after it.
    """
    token = CancelToken()
    contexts = []

    def copies():
        with use_token(token):
            contexts.append(contextvars.copy_context())

    in_thread(copies)
    error = ValueError("bad header")
    raised = in_thread(lambda: contexts[0].run(fails.with_token, token, error))

    assert raised is error
    assert token.reason is error


def test_cancelled_of_a_set_token_is_not_recorded():
    """
    Being stopped is no failure: the reason stays what it was, and nothing is its cause.
    """
    token = CancelToken()
    token.cancel("enough")

    with pytest.raises(Cancelled) as raised:
        checks.with_token(token)

    assert raised.value.reason == "enough"
    assert raised.value.__cause__ is None
    assert token.reason == "enough"
    assert outcome(token.check).__cause__ is None


def test_failure_under_a_set_token_leaves_and_changes_nothing():
    """
    An ordinary exception after the cancel still leaves the call; the reason stays.
    """
    token = CancelToken()
    token.cancel("enough")

    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(token, ValueError("bad header"))

    assert token.reason == "enough"


def test_cancelled_of_another_token_is_a_failure():
    """
    A `Cancelled` that leaves a call whose own token is not set is a failure there.
    """
    other, token = CancelToken(), CancelToken()
    other.cancel("theirs")

    @cancellable
    def checks_another(token):
        other.check()

    with pytest.raises(Cancelled) as raised:
        checks_another.with_token(token)

    assert token.reason is raised.value


def test_child_that_fails_tells_no_parent():
    """
    A report goes to the token that is named; its ancestors hear nothing.
    """
    parent = CancelToken()
    child = parent.child()

    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(child, ValueError("bad header"))

    assert child.cancelled()
    assert not parent.cancelled()


def test_failure_reported_to_a_parent_ends_its_children():
    """
    The children of the token that is named have its reason.
    """
    parent, error = CancelToken(), ValueError("bad header")
    child = parent.child()

    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(parent, error)

    assert child.reason is error
    assert outcome(child.check).__cause__ is error


def test_never_is_not_set_by_a_failure():
    """
    The token that can't be cancelled takes no reports.
    """
    with pytest.raises(ValueError, match="bad header"):
        fails.with_token(CancelToken.NEVER, ValueError("bad header"))

    assert not CancelToken.NEVER.cancelled()


def test_failure_is_recorded_before_the_token_is_set():
    """
    A sibling that is woken by the failure never gets its echo recorded in its place.
    """
    # Three jobs of one token. One fails; the others wait for the token by every means there
    # is, and raise an echo of their own as soon as they hear of it. Were the token set before
    # the failure is recorded, an echo could come first and pass for the failure.
    echoes = []

    @cancellable
    def echoes_sleep(token, ready):
        ready.wait(timeout=60)
        try:
            token.sleep(30)
        except Cancelled as cancelled:
            echo = RuntimeError("echo")
            echoes.append(cancelled.reason)
            raise echo from None

    @cancellable
    def echoes_poll(token, ready):
        ready.wait(timeout=60)
        while not token.cancelled():
            pass
        echoes.append(token.reason)
        raise RuntimeError("echo")

    @cancellable
    def fails_once_all_wait(token, ready, error):
        ready.wait(timeout=60)
        raise error

    with ThreadPool(3) as pool:
        for _ in range(1000):
            token, ready, error = CancelToken(), threading.Barrier(3), ValueError("first")
            jobs = [
                pool.apply_async(outcome, (fn.with_token, token, ready, *more))
                for fn, *more in ((echoes_sleep,), (echoes_poll,), (fails_once_all_wait, error))
            ]
            for job in jobs:
                job.get(timeout=60)

            assert token.reason is error
            assert outcome(token.check).__cause__ is error
            assert echoes == [error, error]
            echoes.clear()


def test_token_of_the_task_is_not_reported_to():
    """
    It is current because this thread made it so: its function may handle what a call raises.
    """

    def handles():
        token = current_token()
        with pytest.raises(ValueError, match="bad header"):
            fails.with_token(token, ValueError("bad header"))
        return token.cancelled()

    with TaskGroup(1) as group:
        calls = [group.submit(handles), *group.starmap(handles, [()]).tasks]

    assert [task.result() for task in calls] == [False, False]


def test_context_of_a_scope_that_was_left_brings_its_token():
    """
    The thread that made a token current is free of that once it has left the scope.
    """
    token = CancelToken()
    with use_token(token):
        context = contextvars.copy_context()

    with pytest.raises(ValueError, match="bad header"):
        context.run(fails.with_token, token, ValueError("bad header"))

    assert isinstance(token.reason, ValueError)
