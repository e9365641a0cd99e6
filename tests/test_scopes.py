"""
The current token: whose it is, and the scopes that change it.
"""

import contextvars
import threading

import pytest
from staging import in_thread, start

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    TaskGroup,
    _clock,
    checkpoint,
    current_token,
    shield,
    sleep,
    timeout,
    use_token,
)

# --- Whose it is ----------------------------------------------------------------------------------


def test_outside_everything_the_token_is_never():
    """
    There `checkpoint` and `sleep` are there to be called, and raise nothing.
    """
    assert current_token() is CancelToken.NEVER
    checkpoint()
    sleep(0)


def test_token_of_the_body_is_the_groups_and_of_a_task_its_own():
    """
    In the body the group's, in a task a child of it, and what was before is back afterwards.
    """
    seen = []
    with TaskGroup(2) as group:
        assert current_token() is group.token
        tasks = [group.submit(lambda: seen.append(current_token())) for _ in range(2)]
        group.wait()

    assert current_token() is CancelToken.NEVER
    assert all(task.done() for task in tasks)
    assert len({*seen, group.token}) == 3


def test_scopes_are_left_from_the_inside_out():
    """
    Each gives back the token that was current before it, also when an exception leaves it.
    """
    outer, inner = CancelToken(), CancelToken()
    with use_token(outer) as given:
        assert given is outer
        with pytest.raises(ValueError, match="bad header"), use_token(inner):
            assert current_token() is inner
            raise ValueError("bad header")
        assert current_token() is outer
        with shield() as shielding:
            assert current_token() is shielding
        with timeout(60) as limited:
            assert current_token() is limited
        assert current_token() is outer

    assert current_token() is CancelToken.NEVER


def test_one_scope_may_be_entered_again_and_again():
    """
    Inside itself too.
    """
    token = CancelToken()
    again = use_token(token)
    with again, shield(), again:
        assert current_token() is token
    with again:
        assert current_token() is token

    assert current_token() is CancelToken.NEVER


def test_scope_left_out_of_order_does_not_come_back():
    """
    A generator may leave its scope inside one that was entered later; that one goes back to
    what was before both.
    """
    outer, kept, later = CancelToken(), CancelToken(), CancelToken()

    def items():
        with use_token(kept):
            yield 1
        yield 2

    with use_token(outer):
        iterator = items()
        next(iterator)
        assert current_token() is kept
        with use_token(later), shield() as last:
            next(iterator)
            assert current_token() is last
        assert current_token() is outer

    assert current_token() is CancelToken.NEVER


def test_scope_left_in_another_context_changes_nothing_there():
    """
    A generator that is closed elsewhere leaves the token there alone.
    """
    token, other = CancelToken(), CancelToken()

    def items():
        with use_token(token):
            yield 1

    iterator = items()
    contextvars.copy_context().run(next, iterator)
    with use_token(other):
        iterator.close()
        assert current_token() is other

    assert current_token() is CancelToken.NEVER


def test_scope_entered_twice_and_left_in_another_context_ends_the_later_one():
    """
    The earlier one still hears what was current around it.
    """
    scope, around = timeout(60), CancelToken()
    with use_token(around):
        earlier, later = [contextvars.copy_context().run(scope.__enter__) for _ in range(2)]
    scope.__exit__(None, None, None)
    around.cancel()

    assert earlier.cancelled()
    assert not later.cancelled()
    scope.__exit__(None, None, None)


def test_thread_has_the_token_only_with_the_context():
    """
    One that is started plainly has none; one that runs in a copy of the context has it.
    """
    token = CancelToken()
    with use_token(token):
        empty = in_thread(lambda: contextvars.Context().run(current_token))
        context = contextvars.copy_context()
        given = in_thread(lambda: context.run(current_token))

    assert empty is CancelToken.NEVER
    assert given is token


def test_checkpoint_and_sleep_listen_to_the_current_token():
    """
    Both raise its `Cancelled`, and no other's.
    """
    token = CancelToken()
    token.cancel("enough")
    with use_token(token):
        for listen in (checkpoint, lambda: sleep(60), lambda: sleep(0), lambda: sleep(-1)):
            with pytest.raises(Cancelled) as raised:
                listen()
            assert raised.value.token is token
            assert raised.value.reason == "enough"
    checkpoint()


@pytest.mark.parametrize("wrong", [None, "token", threading.Event(), CancelToken])
def test_what_is_no_token_is_refused(wrong):
    """
    The message says how to write it where there may be none.
    """
    with pytest.raises(TypeError, match=r"use_token\(token or current_token\(\)\)"):
        use_token(wrong)


@pytest.mark.parametrize("make", [lambda: timeout(60), shield, lambda: use_token(CancelToken())])
def test_scope_may_be_shared_by_threads(make):
    """
    Each leaves what it has entered itself, in whatever order they do.
    """
    scope = make()
    order = threading.Barrier(2)

    def first():
        with scope as token:
            order.wait(timeout=60)  # both are in
            inside = current_token() is token
            order.wait(timeout=60)
        after = current_token()
        order.wait(timeout=60)  # the first one has left
        return inside, after

    def second():
        with scope as token:
            order.wait(timeout=60)
            order.wait(timeout=60)
            order.wait(timeout=60)
            inside = current_token() is token
            deadline = token.deadline is not None
        return inside, current_token(), deadline

    threads = [start(first), start(second)]
    for thread, _ in threads:
        thread.join(timeout=60)
    (one,), (two,) = (outcome for _, outcome in threads)

    assert one == (True, CancelToken.NEVER)
    assert two == (True, CancelToken.NEVER, isinstance(scope, timeout))


def test_scope_that_was_left_from_under_another_is_not_left_again():
    """
    Its object has been entered elsewhere since, and is left here.
    """
    scope, other = use_token(CancelToken()), use_token(CancelToken())
    elsewhere = contextvars.Context()
    scope.__enter__()
    with other:
        scope.__exit__(None, None, None)
        elsewhere.run(scope.__enter__)
        scope.__exit__(None, None, None)

    assert elsewhere.run(current_token) is CancelToken.NEVER
    assert current_token() is CancelToken.NEVER


@pytest.mark.parametrize("scope", [timeout, shield, lambda limit: use_token(CancelToken())])
def test_context_that_was_copied_in_a_block_keeps_its_token(scope):
    """
    A thread that was started with it goes on with that, whatever becomes of the block.
    """
    around = CancelToken()
    with use_token(around):
        with scope(60):
            inside, context = current_token(), contextvars.copy_context()
        after = current_token()

    assert after is around
    assert context.run(current_token) is inside is not around


@pytest.mark.parametrize("scope", [timeout, shield, lambda limit: use_token(CancelToken())])
def test_generator_that_is_closed_in_another_thread_leaves_no_scope_behind(scope):
    """
    Where it was begun the token around it is current again.
    """

    def generate():
        with scope(60):
            yield

    token = CancelToken()
    with use_token(token):
        generator = generate()
        next(generator)
        inside = current_token()
        in_thread(generator.close)
        after = current_token()

    assert inside is not token
    assert after is token
    assert current_token() is CancelToken.NEVER


def test_scope_that_is_held_by_a_generator_stays_apart():
    """
    A block beside it leaves its own scope, not the generator's.
    """
    scope = timeout(60)

    def generate():
        with scope:
            yield current_token()

    generator = generate()
    held = next(generator)
    with scope as token:
        inside = current_token() is token
    beside = current_token() is held
    generator.close()

    assert inside
    assert beside
    assert current_token() is CancelToken.NEVER


# --- timeout --------------------------------------------------------------------------------------


def test_expiry_leaves_as_timeout_error():
    """
    A `Cancelled` that leaves because the time was up is a `TimeoutError`, and its cause.
    """
    with pytest.raises(TimeoutError, match=r"0\.01 s") as raised, timeout(0.01) as token:
        sleep(60)

    assert isinstance(raised.value.__cause__, Cancelled)
    assert raised.value.__cause__.token is token


def test_scope_that_expires_raises_nothing_by_itself():
    """
    What does not look does not hear of it; its token says so.
    """
    with timeout(0) as token:
        pass

    assert token.cancelled()
    assert isinstance(token.reason, TimeoutError)


@pytest.mark.parametrize("around", [use_token, None])
def test_expiry_raised_by_a_descendant_counts(around):
    """
    A scope, a child or a task further in that heard of it raises this scope's expiry.
    """
    with pytest.raises(TimeoutError), timeout(0.01) as token:
        child = token.child().child()
        if around is None:
            child.sleep(60)
        with use_token(child), timeout(60):
            sleep(60)


def test_cancel_from_outside_passes_a_scope_as_it_is():
    """
    Only its own expiry is a `TimeoutError`: not the cancel of what is around it, nor its own.
    """
    outer = CancelToken()
    with use_token(outer), pytest.raises(Cancelled) as raised, timeout(60):
        outer.cancel("enough")
        checkpoint()
    assert raised.value.reason == "enough"

    with pytest.raises(Cancelled, match="by hand"), timeout(60) as token:
        token.cancel("by hand")
        checkpoint()

    with pytest.raises(Cancelled, match="stray"), timeout(0):
        raise Cancelled("stray")


def test_inner_scope_that_expires_leaves_the_outer_alone():
    """
    The nearest deadline counts, and ends its own scope only.
    """
    with timeout(60) as outer:
        with pytest.raises(TimeoutError, match=r"0\.01 s"), timeout(0.01) as inner:
            assert inner.deadline < outer.deadline
            sleep(60)
        checkpoint()

    with (
        pytest.raises(TimeoutError, match=r"0\.01 s"),
        timeout(0.01) as outer,
        timeout(60) as inner,
    ):
        assert inner.deadline == outer.deadline
        sleep(60)


def test_scope_that_was_left_expires_no_more():
    """
    Its token has no deadline then, and hears nobody.
    """
    outer = CancelToken()
    with use_token(outer), timeout(60) as token:
        pass
    outer.cancel()

    assert token.deadline is None
    assert not token.cancelled()


@pytest.mark.parametrize("limit", [None, float("inf")])
def test_scope_without_limit_hears_what_is_around_it(limit):
    """
    It is a child like any other.
    """
    outer = CancelToken()
    with use_token(outer), pytest.raises(Cancelled), timeout(limit) as token:
        assert token.deadline is None
        outer.cancel()
        checkpoint()


# --- shield ---------------------------------------------------------------------------------------


def test_shield_keeps_the_cancel_out():
    """
    Clean-up in it sees no cancel; after it the cancel is there again.
    """
    outer = CancelToken()
    outer.cancel("enough")
    with use_token(outer):
        with shield() as token:
            checkpoint()
            sleep(0.001)
            assert not token.cancelled()
        with pytest.raises(Cancelled):
            checkpoint()


def test_shield_is_cut_short_by_its_own_timeout_alone():
    """
    That is a `TimeoutError`, and it does not wait for the cancel around it.
    """
    outer = CancelToken()
    outer.cancel()
    with use_token(outer), pytest.raises(TimeoutError, match=r"0\.01 s"), shield(timeout=0.01):
        sleep(60)


def test_shield_in_a_cancelled_task_lets_its_clean_up_finish():
    """
    A task whose group was cancelled sleeps, waits and submits elsewhere in its `finally`.
    """
    asleep = threading.Event()
    done = []

    def work():
        try:
            asleep.set()
            sleep(60)
        finally:
            with shield():
                sleep(0.001)
                with TaskGroup(1) as inner:
                    done.append(inner.submit(abs, -1).result())

    with TaskGroup(1) as group:
        task = group.submit(work)
        asleep.wait(timeout=60)
        group.cancel()

    assert task.cancelled()
    assert done == [1]


def test_block_whose_deadline_gets_no_thread_leaves_nothing_behind(monkeypatch):
    """
    The system's error is raised, and the token around holds nothing of it.
    """
    fastpool.shutdown()

    def refuse(target, name, note):
        raise RuntimeError("can't start new thread")

    root = CancelToken()
    monkeypatch.setattr(_clock, "start_thread", refuse)
    with use_token(root):
        with pytest.raises(RuntimeError, match="can't start new thread"), timeout(60):
            pass
        assert current_token() is root

    assert not root._entries
