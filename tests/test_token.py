"""
The token: polling, waiting, callbacks, deadlines, children.
"""

import asyncio
import contextlib
import copy
import datetime
import functools
import gc
import heapq
import itertools
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from decimal import Decimal

import pytest
from blocked import is_blocked
from staging import act_at, have_idle_threads_wait, start, until

import fastpool
from fastpool import Cancelled, CancelToken, TaskCancelledError, TaskGroup, _clock, _token, _wakers


def in_thread(fn):
    thread = threading.Thread(target=fn)
    thread.start()
    return thread


# --- Setting --------------------------------------------------------------------------------------


def test_token_turns_once_and_says_why():
    """
    The first cancel wins; state and reason stay.
    """
    token = CancelToken()

    before = (token.cancelled(), token.reason)
    told = [token.cancel("first"), token.cancel("second"), token.cancel()]

    assert before == (False, None)
    assert told == [True, False, False]
    assert (token.cancelled(), token.reason) == (True, "first")


def test_cancel_without_a_reason_has_one():
    """
    The reason is never None once the token is set.
    """
    token = CancelToken()
    token.cancel()

    assert token.reason == "cancelled"


def test_one_of_eight_cancellers_wins():
    """
    Eight threads cancel with different reasons: one is told so, and its reason stands.
    """
    for _ in range(200):
        token = CancelToken()
        barrier = threading.Barrier(8)
        told = {}

        def cancel(reason, token=token, barrier=barrier, told=told):
            barrier.wait(timeout=60)
            told[reason] = token.cancel(reason)
            assert token.cancelled()

        threads = [in_thread(lambda number=number: cancel(number)) for number in range(8)]
        for thread in threads:
            thread.join(timeout=60)

        assert [reason for reason, won in told.items() if won] == [token.reason]


def test_check_raises_anew_each_time():
    """
    Each check raises an object of its own, which passes `except Exception`.
    """
    token = CancelToken()
    token.cancel("enough")
    raised = []
    for _ in range(2):
        try:
            token.check()
        except Exception:
            raise AssertionError("caught as an error") from None
        except BaseException as error:
            raised.append(error)

    assert raised[0] is not raised[1]
    assert all(error.token is token and error.reason == "enough" for error in raised)


def test_failure_that_was_reported_is_the_cause():
    """
    A token that was set by a failure says so in what its checks raise.
    """
    token = CancelToken()
    failure = ValueError("root")

    @fastpool.cancellable
    def fails(token):
        raise failure

    with pytest.raises(ValueError, match="root"):
        fails.with_token(token)
    with pytest.raises(Cancelled) as raised:
        token.child().check()

    assert token.reason is failure
    assert raised.value.__cause__ is failure


def test_timeout_is_given_by_its_name():
    """
    What stands in its place could be anything: a reason, a parent.
    """
    for make in (CancelToken, CancelToken().child):
        assert make(timeout=60).remaining() > 0
        with pytest.raises(TypeError):
            make(60)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (None, "cancelled: 'cancelled'"),
        ("enough", "cancelled: 'enough'"),
        (ValueError("secret"), "cancelled: ValueError"),
    ],
)
def test_token_shows_why_it_was_set(reason, shown):
    """
    Words as they are, anything else by its class, since its text may be a secret.
    """
    token = CancelToken()
    before = repr(token)
    token.cancel(reason)

    assert before == f"<CancelToken {id(token):#x}>"
    assert repr(token) == f"<CancelToken {id(token):#x}, {shown}>"


def test_token_stands_where_an_event_stood():
    """
    `is_set`, `set` and `wait` are an Event's; a token is true.
    """
    token = CancelToken()

    assert (token.is_set(), bool(token)) == (False, True)
    assert token.wait(0) is False
    token.set()
    assert token.is_set()
    assert token.wait(60) is True


def test_never_is_never_set():
    """
    It can't be cancelled; callbacks are accepted and forgotten; its children can be set.
    """
    ran = []
    registration = CancelToken.NEVER.on_cancel(lambda: ran.append(1))

    assert CancelToken.NEVER.cancel() is False
    assert not CancelToken.NEVER.cancelled()
    assert registration.unregister() is True
    assert CancelToken.NEVER.child().cancel() is True
    assert ran == []


# --- Waiting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 50])
@pytest.mark.parametrize("wait", ["wait", "sleep", "each"])
def test_waiter_wakes_when_an_ancestor_is_set(depth, wait):
    """
    However deep the waiter's token lies, and whatever it waits by.
    """
    root = token = CancelToken()
    for _ in range(depth):
        token = token.child()
    asleep = threading.Event()
    seen = []

    def endless():
        while True:
            asleep.set()
            token.wait(60)
            yield 1

    def waits():
        asleep.set()
        try:
            if wait == "wait":
                seen.append(token.wait(60))
            elif wait == "sleep":
                token.sleep(60)
            else:
                for _ in token.each(endless()):
                    pass
        except Cancelled as error:
            seen.append(error.reason)

    thread = in_thread(waits)
    asleep.wait(timeout=60)
    root.cancel("enough")
    thread.join(timeout=60)

    assert seen == [True if wait == "wait" else "enough"]


def test_each_takes_nothing_once_the_token_is_set():
    """
    The item that was not asked for stays where it is.
    """
    token = CancelToken()
    items = iter([1, 2, 3])
    taken = []

    with pytest.raises(Cancelled):
        for item in token.each(items):
            taken.append(item)
            if item == 2:
                token.cancel()

    assert taken == [1, 2]
    assert list(items) == [3]
    with pytest.raises(TypeError):
        token.each(404)


@pytest.mark.parametrize("seconds", [0, -1, -math.inf])
def test_sleeping_for_nothing_is_a_check(seconds):
    """
    It returns at once, or raises at once.
    """
    token = CancelToken()

    token.sleep(seconds)
    token.cancel()
    with pytest.raises(Cancelled):
        token.sleep(seconds)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (math.nan, ValueError),
        ("5", TypeError),
        (True, TypeError),
        (datetime.timedelta(seconds=5), TypeError),
        (1j, TypeError),
    ],
)
def test_what_is_no_number_of_seconds_is_refused(timeout, error):
    """
    Everywhere, and the message shows it.
    """
    uses = (
        lambda: CancelToken(timeout=timeout),
        lambda: CancelToken().child(timeout=timeout),
        lambda: CancelToken().wait(timeout),
        lambda: CancelToken().sleep(timeout),
        lambda: fastpool.timeout(timeout),
        lambda: fastpool.shield(timeout),
    )
    for use in uses:
        with pytest.raises(error, match="seconds"):
            use()


def test_sleep_without_end_is_refused():
    """
    It is asked for with infinity; `None` is a number that was forgotten.
    """
    token = CancelToken()
    token.cancel()  # or it would never end

    for sleep in (token.sleep, fastpool.sleep):
        with pytest.raises(TypeError, match="seconds must be a number of seconds, not None"):
            sleep(None)


# --- Deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1, -math.inf, -(10**400)])
def test_token_without_time_is_born_set(timeout):
    """
    Its reason is a `TimeoutError`.
    """
    token = CancelToken(timeout=timeout)

    assert isinstance(token.reason, TimeoutError)
    assert token.remaining() == 0


@pytest.mark.parametrize("timeout", [None, math.inf, 1e18, Decimal(10**6), 10**6, 10**400])
def test_token_with_all_the_time_is_not_set(timeout):
    """
    Infinity is none; what is beyond any clock is as good.
    """
    token = CancelToken(timeout=timeout)

    assert token.wait(0.01) is False
    assert (token.deadline is None) is (timeout in (None, math.inf, 10**400))


def test_deadline_passes_though_nobody_looks():
    """
    A callback and a sleeper hear of it, in threads of their own.
    """
    token = CancelToken()
    called = threading.Event()
    threads = []
    token.on_cancel(lambda: (threads.append(threading.current_thread()), called.set()))
    token._limit(0.05)  # not before: it could pass before anybody listens

    assert token.child().wait(60)
    assert called.wait(timeout=60)
    assert isinstance(token.reason, TimeoutError)
    assert threads[0] is not threading.current_thread()


def test_thousand_deadlines_need_no_thousand_threads():
    """
    All pass, whatever the order they were made in.
    """
    fastpool.shutdown()
    before = threading.active_count()

    tokens = [CancelToken(timeout=0.2 - number / 10_000) for number in range(1000)]
    threads = threading.active_count() - before

    assert all(token.wait(60) for token in tokens)
    assert threads <= 2


def test_slow_callback_holds_up_no_other_deadline():
    """
    It blocks until another deadline's callback has run.
    """
    second = threading.Event()
    first = threading.Event()
    slow = CancelToken()
    slow.on_cancel(lambda: (second.wait(timeout=60), first.set()))
    slow._limit(0.01)  # not before, or it could run here
    assert slow.wait(60)

    quick = CancelToken(timeout=0.01)
    quick.on_cancel(second.set)

    assert first.wait(timeout=60)


def test_deadline_that_was_refused_is_forgotten(monkeypatch):
    """
    There was no thread to watch it, and its token was never made.
    """

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    fastpool.shutdown()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            CancelToken(timeout=3600)

    assert not _clock._clocks["clock"].pending()


def test_callbacks_run_though_there_is_no_memory_for_a_helper(monkeypatch):
    """
    Late is better than never: where the deadline is noticed.
    """

    def refuse(helper):
        raise MemoryError

    fastpool.shutdown()
    ran = threading.Event()
    token = CancelToken(timeout=0.01)
    token.on_cancel(ran.set)
    monkeypatch.setattr(_clock._Helper, "__init__", refuse)

    assert ran.wait(20)


def test_deadline_that_cannot_be_kept_stops_no_other(monkeypatch, unraised):
    """
    An error on the way, as when memory is short, goes to `sys.unraisablehook`; it is tried again.
    """
    expire = CancelToken._expire
    due = itertools.count()

    def failing(token):
        if next(due) == 0:
            raise MemoryError
        expire(token)

    monkeypatch.setattr(CancelToken, "_expire", failing)
    first, second = CancelToken(timeout=0.01), CancelToken(timeout=0.05)

    assert second.wait(60)
    assert [type(error) for error in unraised] == [MemoryError]
    assert first.wait(20)


def test_nearest_deadline_of_all_ancestors_counts():
    """
    `deadline` and `remaining` look up the tree.
    """
    near, far = CancelToken(timeout=50), CancelToken(timeout=500)
    token = CancelToken.any(near.child(), far).child(timeout=5000)

    assert token.deadline == near.deadline
    assert 0 < token.remaining() <= 50
    assert CancelToken.any(near, CancelToken.NEVER).deadline == near.deadline


def test_earlier_deadline_wakes_the_clock():
    """
    One that is added while the clock sleeps until a later one is kept.
    """
    late = CancelToken(timeout=600)
    soon = CancelToken(timeout=0.02)

    assert soon.wait(60)
    assert not late.cancelled()


def test_shutdown_leaves_no_thread_and_keeps_deadlines(thorough_shutdown):
    """
    Idle threads of ours are gone; a deadline that is still to come is kept.
    """
    token = CancelToken(timeout=0.3)
    fastpool.shutdown()

    assert token.wait(60)
    fastpool.shutdown()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastpool")]


def test_deadline_of_a_token_that_is_set_keeps_no_thread(thorough_shutdown):
    """
    Nothing is left for the clock to do.
    """
    token = CancelToken(timeout=3600)
    token.cancel()
    fastpool.shutdown()

    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("fastpool")])
    assert token.remaining() > 60


class Starter:
    """Stands where `_clock.start_thread` stood: some get no thread, or one that begins late."""

    def __init__(self, monkeypatch, *, refuses=lambda: False):
        fastpool.shutdown()
        self.refuses = refuses
        self.refused = threading.Event()
        self.goes = threading.Event()
        self.goes.set()
        self.started = 0
        self._start_thread = _clock.start_thread
        monkeypatch.setattr(_clock, "start_thread", self._start)

    def _start(self, target, *args):
        if self.refuses():
            self.refused.set()
            self.goes.wait(60)
            raise RuntimeError("can't start new thread")
        self.started += 1
        self._start_thread(lambda: (self.goes.wait(60), target()), *args)


def test_deadline_is_kept_though_another_gets_no_thread_for_its_own(monkeypatch):
    """
    It comes just as that other one finds that there is none, which then goes with its thread.
    """
    poor = []

    def be_refused():
        poor.append(threading.current_thread())
        return CancelToken(timeout=0.01)

    starter = Starter(monkeypatch, refuses=lambda: threading.current_thread() in poor)
    starter.goes.clear()
    thread, first = start(be_refused)
    assert starter.refused.wait(60)
    other, second = start(lambda: CancelToken(timeout=0.01))
    other.join(60)
    starter.goes.set()
    thread.join(60)

    assert second[0].wait(60)
    assert first[0].wait(60)


def test_deadline_that_gets_no_thread_is_an_error_and_the_next_one_is_kept(monkeypatch):
    """
    As soon as there are threads again.
    """
    refused = [True, True]
    starter = Starter(monkeypatch, refuses=lambda: refused and refused.pop())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            CancelToken(timeout=3600)

    assert CancelToken(timeout=0.01).wait(60)
    assert starter.started == 1


def test_deadlines_that_come_one_after_the_other_need_one_thread(monkeypatch):
    """
    Though it is slow to begin.
    """
    starter = Starter(monkeypatch)
    starter.goes.clear()
    tokens = [CancelToken(timeout=0.01) for _ in range(3)]
    starter.goes.set()

    assert all(token.wait(60) for token in tokens)
    assert starter.started == 1


def test_shutdown_ends_a_clock_that_has_yet_to_begin(thorough_shutdown, monkeypatch):
    """
    If there is nothing for it to do any more.
    """
    starter = Starter(monkeypatch)
    starter.goes.clear()
    CancelToken(timeout=3600).cancel()
    thread, _ = start(fastpool.shutdown)
    until(lambda: is_blocked(thread.native_id, among=None))
    starter.goes.set()
    thread.join(60)

    assert not [t for t in threading.enumerate() if t.name.startswith("fastpool")]


def come_at(step, monkeypatch):
    """What a deadline comes to, if anything, that comes as the clock is at a line, its last one."""
    last, outcome = [], []

    def come():
        last.append(True)
        thread, made = start(lambda: CancelToken(timeout=0.005))
        thread.join(60)
        outcome.extend(made)

    with monkeypatch.context() as patch:
        Starter(patch, refuses=lambda: last)
        threading.settrace(act_at(step, come))
        try:
            assert CancelToken(timeout=0.001).wait(60)
        finally:
            threading.settrace(None)
        until(lambda: outcome or not [t for t in threading.enumerate() if "clock" in t.name])
        return [made if isinstance(made, Exception) else made.wait(20) for made in outcome]


def test_deadline_that_comes_as_the_clock_ends_is_kept(monkeypatch):
    """
    Or is an error: there is no thread for another clock. It comes at every line.
    """
    have_idle_threads_wait(0.001, monkeypatch)
    came = [*itertools.takewhile(bool, (come_at(step, monkeypatch) for step in itertools.count()))]

    assert len(came) > 20
    assert {repr(made) for (made,) in came} == {
        "True",
        """RuntimeError("can't start new thread")""",
    }


def test_deadline_that_is_taken_back_takes_no_other_along(monkeypatch):
    """
    Who brought it, and was ended by a signal handler, does that just as the clock takes it.
    """
    push, others = heapq.heappush, []

    def push_and_take_back(heap, entry):
        push(heap, entry)
        if not others:
            others.append(CancelToken(timeout=0.01))
            _clock._clocks["clock"].arrivals.remove(entry)

    monkeypatch.setattr(_clock.heapq, "heappush", push_and_take_back)
    first = CancelToken(timeout=0.01)
    assert first.wait(60)

    assert others[0].wait(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_deadline_is_kept_in_a_child_that_is_forked_at_any_line_of_the_clock():
    """
    On its way into the thread, and as it passes, too.
    """
    ends = []

    def forks(token):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            os._exit(not token.wait(20))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def fork_at(step):
        fastpool.shutdown()
        lines = itertools.count()
        made = []

        def trace(frame, event, argument):
            if frame.f_code.co_filename != _clock.__file__:
                return None
            if event == "line" and next(lines) == step:
                until(lambda: made)
                thread, outcome = start(forks, *made)
                thread.join(60)
                ends.extend(outcome)
            return trace

        threading.settrace(trace)
        try:
            token = CancelToken(timeout=0.001)
            made.append(token)
        finally:
            threading.settrace(None)
        assert token.wait(60)
        fastpool.shutdown()
        return next(lines) > step

    steps = sum(itertools.takewhile(bool, map(fork_at, itertools.count())))

    assert steps > 20
    assert ends == [0] * steps


@pytest.mark.parametrize("name", ["heappush", "heapify"])
def test_clock_goes_on_after_an_error(monkeypatch, unraised, name):
    """
    As when memory is short: it is told, and tried again; nobody waits for the clock meanwhile.
    """
    fastpool.shutdown()
    failing = getattr(heapq, name)
    short = [True]

    def fail(*args):
        if short:
            raise MemoryError
        return failing(*args)

    monkeypatch.setattr(heapq, name, fail)
    token = CancelToken(timeout=0.01)
    late = CancelToken(timeout=3600)
    thread, _ = start(fastpool.shutdown)
    thread.join(60)
    waits = thread.is_alive()
    until(lambda: unraised)
    short.clear()

    assert not waits
    assert token.wait(60)
    assert not late.cancelled()
    assert {type(error) for error in unraised} == {MemoryError}


def test_clock_that_shuts_down_waits_not_for_itself(monkeypatch):
    """
    What runs in its thread, a finalizer say, may do so.
    """
    expire = CancelToken._expire

    def shut_down(token):
        fastpool.shutdown()
        expire(token)

    monkeypatch.setattr(CancelToken, "_expire", shut_down)

    assert CancelToken(timeout=0.01).wait(60)


# --- Children -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CancelToken, CancelToken().child])
def test_timeout_of_a_token_is_named(make):
    """
    A number alone could be anything.
    """
    with pytest.raises(TypeError, match="positional argument"):
        make(60)


def test_token_that_there_is_no_thread_for_has_no_deadline(monkeypatch):
    """
    Or it would tell of one that never comes.
    """

    def refuses(*_):
        raise RuntimeError("can't start new thread")

    token = CancelToken()
    monkeypatch.setattr(_clock, "add_deadline", refuses)
    with pytest.raises(RuntimeError, match="new thread"):
        token._limit(60)

    assert token.remaining() is None


def test_child_hears_every_ancestor_and_tells_none():
    """
    Set alone, it leaves its parents as they were; a diamond is heard once.
    """
    root = CancelToken()
    left, right = root.child(), root.child()
    bottom = CancelToken.any(left, right)
    ran = []
    bottom.on_cancel(lambda: ran.append(1))

    left.child().cancel("alone")
    root.cancel("root")

    assert (left.reason, right.reason, bottom.reason) == ("root",) * 3
    assert ran == [1]
    assert root.child().reason == "root"


def test_diamonds_below_diamonds_are_gone_through_once():
    """
    There are a million million ways down, and as many up to the deadline.
    """
    root = bottom = CancelToken(timeout=3600)
    for _ in range(40):
        bottom = CancelToken.any(bottom.child(), bottom.child())

    assert bottom.deadline == root.deadline
    root.cancel("root")
    assert bottom.reason == "root"


def test_child_of_an_ended_token_and_it_hold_nothing_of_each_other():
    """
    Nothing comes from there any more.
    """
    group = TaskGroup(1)
    with group:
        pass
    ended = weakref.ref(group.token)
    with fastpool.use_token(group.token), fastpool.timeout(60) as limited:
        kept = [group.token.child(), CancelToken.any(group.token), limited]
    children = [weakref.ref(token) for token in kept]
    token = group.token
    del kept[0], limited, group
    kept.clear()

    assert [child() for child in children] == [None] * 3
    kept = [token.child(), CancelToken.any(token)]
    del token
    assert ended() is None
    assert not any(token.cancelled() for token in kept)


def test_any_of_nothing_never_turns_and_of_something_else_is_refused():
    """
    Nobody sets it.
    """
    assert CancelToken.any().wait(0.01) is False
    with pytest.raises(TypeError, match="tokens"):
        CancelToken.any(threading.Event())


def test_parent_holds_nothing_of_its_children():
    """
    Ten thousand forgotten children are gone, without the collector.
    """
    parent = CancelToken()
    gc.disable()
    try:
        children = [weakref.ref(parent.child(timeout=600)) for _ in range(10_000)]
        alive = sum(child() is not None for child in children)
    finally:
        gc.enable()

    assert alive == 0
    assert len(parent._entries) == 0


def test_chain_of_ten_thousand_is_set_and_dies():
    """
    Nothing recurses on the way down, nor at the end.
    """
    root = token = CancelToken()
    for _ in range(10_000):
        token = token.child()
    last = token
    root.cancel("from the top")
    reason = last.reason
    del token, last, root

    assert reason == "from the top"


@pytest.mark.parametrize("who", ["thread", "handler"])
def test_cancel_returns_once_every_descendant_is_set(who):
    """
    Also those of a child that somebody else has turned and not yet come past.
    """
    parent = CancelToken()
    child = parent.child()
    grandchild = child.child()
    seen = []
    parent.on_cancel(lambda: seen.append(("callback", grandchild.cancelled())))
    there, go_on = threading.Event(), threading.Event()

    def at_spread(frame, event, argument):
        # The child is set now, its own descendants are not.
        if frame.f_code.co_name == "_spread":
            sys.settrace(None)
            if who == "handler":
                cancel_parent()
            there.set()
            go_on.wait(timeout=60)

    def cancel_parent():
        seen.append(parent.cancel("parent"))
        seen.append((child.reason, grandchild.cancelled(), grandchild.reason))

    def cancel_child():
        sys.settrace(at_spread)
        child.cancel("child")

    thread = in_thread(cancel_child)
    there.wait(timeout=60)
    if who == "thread":
        cancel_parent()
    go_on.set()
    thread.join(timeout=60)

    assert seen == [("callback", True), True, ("child", True, "child")]


# --- Callbacks ------------------------------------------------------------------------------------


def test_callbacks_run_last_registered_first_after_all_states_have_turned():
    """
    Over the whole tree, each once, in the thread that cancels.
    """
    root = CancelToken()
    child = root.child()
    seen = []

    def callback(name):
        return lambda: seen.append((name, root.cancelled(), child.cancelled()))

    for number, token in enumerate([root, child, root, child]):
        token.on_cancel(callback(number))
    root.cancel()

    assert seen == [(number, True, True) for number in (3, 2, 1, 0)]


def test_callback_that_raises_stops_no_other(unraised):
    """
    Its error goes to `sys.unraisablehook`, whatever its class.
    """
    token = CancelToken()
    ran = []
    errors = [ValueError("broken"), SystemExit(1)]

    def broken(error):
        raise error

    token.on_cancel(lambda: ran.append("first"))
    for error in errors:
        token.on_cancel(lambda error=error: broken(error))

    assert token.cancel() is True
    assert ran == ["first"]
    assert sorted(map(id, unraised)) == sorted(map(id, errors))


def test_registering_on_a_set_token_runs_at_once():
    """
    In the registering thread; there is nothing left to take back.
    """
    token = CancelToken()
    token.cancel()
    ran = []

    registration = token.on_cancel(lambda: ran.append(threading.current_thread()))

    assert ran == [threading.current_thread()]
    assert registration.unregister() is False


def test_what_is_no_function_cannot_be_registered():
    """
    Nor is it kept until the token is set.
    """
    token = CancelToken()

    with pytest.raises(TypeError, match=r"on_cancel\(\) wants a function, not 404"):
        token.on_cancel(404)
    assert token.cancel() is True


def test_callback_runs_in_the_context_of_its_registration():
    """
    The current token inside it is the one that was current then.
    """
    outer, token = CancelToken(), CancelToken()
    seen = []
    with fastpool.use_token(outer):
        token.on_cancel(lambda: seen.append(fastpool.current_token()))

    token.cancel()

    assert seen == [outer]


def test_unregister_against_run_is_exactly_one_of_both():
    """
    Ten thousand rounds: a callback that was taken back never runs, any other does.
    """
    start, done = threading.Barrier(2), threading.Barrier(2)
    rounds = 10_000
    tokens = [CancelToken() for _ in range(rounds)]

    def cancels():
        for token in tokens:
            start.wait(timeout=60)
            token.cancel()
            done.wait(timeout=60)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = in_thread(cancels)
    try:
        for token in tokens:
            ran = []
            registration = token.on_cancel(lambda ran=ran: ran.append(1))
            start.wait(timeout=60)
            won = registration.unregister()
            done.wait(timeout=60)
            assert won is (ran == [])
    finally:
        sys.setswitchinterval(switch)
        thread.join(timeout=60)


def test_close_waits_for_a_running_callback():
    """
    After it the callback is not running; from inside a callback it does not wait.
    """
    token = CancelToken()
    entered, release = threading.Event(), threading.Event()
    order = []

    def slow():
        entered.set()
        release.wait(timeout=60)
        registration.close()
        order.append("ran")

    registration = token.on_cancel(slow)
    thread = in_thread(token.cancel)
    entered.wait(timeout=60)
    other = in_thread(release.set)
    registration.close()
    order.append("closed")
    thread.join(timeout=60)
    other.join(timeout=60)

    assert order == ["ran", "closed"]


def test_callbacks_may_take_each_other_back():
    """
    Two that close each other from inside, in two threads, do not wait for ever.
    """
    tokens = [CancelToken(), CancelToken()]
    inside = threading.Barrier(2)
    registrations = []

    def closes(number):
        inside.wait(timeout=60)
        registrations[1 - number].close()

    registrations.extend(
        token.on_cancel(lambda number=number: closes(number)) for number, token in enumerate(tokens)
    )
    threads = [in_thread(token.cancel) for token in tokens]
    for thread in threads:
        thread.join(timeout=60)

    assert not any(thread.is_alive() for thread in threads)


def test_callback_in_the_middle_of_another_ones_end_harms_none():
    """
    At whatever line a signal handler runs a callback of its own: all of the others run.
    """

    def interrupted_at(step):
        ran = []
        token = CancelToken()
        registrations = [token.on_cancel(functools.partial(ran.append, n)) for n in range(2)]

        def handler():
            other = CancelToken()
            other.on_cancel(functools.partial(ran.append, "handler"))
            other.cancel()

        sys.settrace(act_at(step, handler))
        try:
            token.cancel()
        finally:
            sys.settrace(None)
        for registration in registrations:
            registration.close()
        return ran

    races = list(
        itertools.takewhile(lambda ran: "handler" in ran, map(interrupted_at, itertools.count()))
    )

    assert len(races) > 30
    assert all(sorted(map(str, ran)) == ["0", "1", "handler"] for ran in races)
    assert all(ran.index(1) < ran.index(0) for ran in races)


def test_interrupted_callback_is_over_for_who_waits_for_it(unraised):
    """
    Ctrl-C at whatever line of the cancel leaves nobody waiting for a callback, which was called;
    or it came as that was about to begin, and is told of as its own.
    """

    def interrupted_at(step):
        reached, called = [], []
        token = CancelToken()
        registration = token.on_cancel(lambda: called.append(step))
        unraised.clear()

        def interrupt():
            reached.append(step)
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            sys.settrace(act_at(step, interrupt))
            try:
                token.cancel()
            finally:
                sys.settrace(None)
        closing = in_thread(registration.close)
        until(lambda: not closing.is_alive() or is_blocked(closing.native_id, None))
        closing.join(timeout=0.1)
        hangs = closing.is_alive()
        if hangs:
            registration._entry.finish(token)
            closing.join(timeout=60)
        if unraised:
            called.append("as its own")
        return reached, called, hangs, token.cancelled()

    races = list(itertools.takewhile(lambda race: race[0], map(interrupted_at, itertools.count())))

    assert len(races) > 30
    assert [step for [step], _, hangs, _ in races if hangs] == []
    # A line that follows this one without a call is reached by this test, but by no handler.
    assert len([step for [step], called, _, turned in races if turned != (len(called) == 1)]) <= 1


def test_handler_that_closes_a_running_callback_does_not_wait():
    """
    It interrupted the very thread that it would wait for.
    """

    def closed_at(step):
        reached = []
        token = CancelToken()
        registration = token.on_cancel(lambda: None)

        def close():
            reached.append(step)
            registration.close()

        sys.settrace(act_at(step, close))
        try:
            token.cancel()
        finally:
            sys.settrace(None)
        return reached

    races = list(itertools.takewhile(bool, map(closed_at, itertools.count())))

    assert len(races) > 30


def test_handler_that_closes_what_its_thread_takes_back_does_not_wait():
    """
    A finalizer may come there as well, and close the registration that it owns.
    """

    def closed_at(step):
        reached = []
        registration = CancelToken().on_cancel(lambda: None)

        def close():
            reached.append(step)
            registration.close()

        def unregister():
            sys.settrace(act_at(step, close))
            try:
                registration.unregister()
            finally:
                sys.settrace(None)

        thread, ended = start(unregister)
        thread.join(timeout=20)
        return reached, ended

    races = list(itertools.takewhile(lambda race: race[0], map(closed_at, itertools.count())))

    assert len(races) > 5
    assert [reached for reached, ended in races if ended != [None]] == []


def test_registration_holds_its_token_until_it_has_run():
    """
    Dropped together, the callback never runs; kept, it does, and lets go.
    """
    parent = CancelToken()
    ran = []
    kept = parent.child().on_cancel(lambda: ran.append("kept"))
    parent.child().on_cancel(lambda: ran.append("dropped"))
    token = weakref.ref(kept._token)

    parent.cancel()

    assert ran == ["kept"]
    assert token() is None


def test_registration_is_taken_back_at_the_end_of_its_with_block():
    """
    Its `with` form closes it.
    """
    token = CancelToken()
    ran = []
    with token.on_cancel(lambda: ran.append(1)) as registration:
        pass
    token.cancel()

    assert ran == []
    assert registration.unregister() is False


# --- Interrupting ---------------------------------------------------------------------------------


def test_interruption_wakes_the_call_and_cancelled_comes_out():
    """
    Also where the call returned normally: what it returned is no success.
    """
    token = CancelToken()
    woken, blocked = threading.Event(), threading.Event()

    def cancels():
        blocked.wait(timeout=60)
        token.cancel("enough")

    thread = in_thread(cancels)
    with pytest.raises(Cancelled) as raised, token.interrupts(woken.set):
        blocked.set()
        woken.wait(timeout=60)
    thread.join(timeout=60)

    assert woken.is_set()
    assert raised.value.reason == "enough"
    assert raised.value.__context__ is None


def test_error_of_the_interrupted_call_is_the_context():
    """
    What came out is kept beside the `Cancelled`.
    """
    token = CancelToken()
    broken = OSError("shut down")

    with pytest.raises(Cancelled) as raised, token.interrupts(lambda: None):
        token.cancel()
        raise broken

    assert raised.value.__context__ is broken
    assert "shut down" in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("kind", [Cancelled, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exit_passes_the_interruption_as_it_is(kind):
    """
    These are not replaced.
    """
    token = CancelToken()
    leaving = kind()

    with pytest.raises(kind) as raised, token.interrupts(lambda: None):
        token.cancel()
        raise leaving

    assert raised.value is leaving


def test_interruption_runs_where_the_cancel_does():
    """
    A callback of yours that is quick needs no helper; one that may block is registered as slow.
    """
    token, ran, inside = CancelToken(), [], threading.Event()

    def blocks():
        with token.interrupts(lambda: ran.append(threading.get_ident())):
            inside.set()
            until(lambda: ran)

    thread, outcome = start(blocks)
    assert inside.wait(60)
    token.cancel()
    thread.join(60)

    assert ran == [threading.get_ident()]
    assert type(outcome[0]) is Cancelled


def test_set_token_does_not_let_the_call_begin():
    """
    `Cancelled` on entry, and the interruption is not made; also when it is set in the moment
    between the look and the registration.
    """
    token = CancelToken()
    ran = []
    token.cancel()
    with pytest.raises(Cancelled), token.interrupts(lambda: ran.append(1)):
        ran.append("body")

    late = CancelToken()

    class Late(CancelToken):
        __slots__ = ()

        def check(self):
            super().check()
            late.cancel()

    racing = Late()
    racing._link(late)
    with pytest.raises(Cancelled), racing.interrupts(lambda: ran.append("interruption")):
        ran.append("body")

    assert "body" not in ran


def test_interruption_that_is_entered_twice_is_over_after_both():
    """
    The object of the `with` statement can be used inside its own block.
    """
    ran = []
    token = CancelToken()
    interrupts = token.interrupts(lambda: ran.append("late"))

    with interrupts, interrupts:
        pass
    token.cancel()

    assert ran == []


def test_interruption_never_comes_after_the_block():
    """
    Left in time, it is never made; and what cannot be interrupted is refused by name.
    """
    token = CancelToken()
    ran = []
    with token.interrupts(lambda: ran.append(1)):
        pass
    token.cancel()

    assert ran == []
    with pytest.raises(TypeError, match=r"builtins\.int; register a way .*'builtins\.int', how\)"):
        token.interrupts(404)


class Pipe:
    """Something that a thread blocks on."""

    def __init__(self):
        self.broken = threading.Event()
        self.woken_by = []


class NamedPipe(Pipe):
    """One that is interrupted as its base class is."""


class OddPipe(Pipe):
    """One that is interrupted in its own way."""


@pytest.fixture
def registry(monkeypatch):
    """The ways of interrupting, as they were before when the test is over."""
    monkeypatch.setattr(_wakers, "_wakers", dict(_wakers._wakers))
    return _wakers.register


def wake(pipe):
    pipe.woken_by.append(threading.current_thread())
    pipe.broken.set()


@pytest.mark.parametrize("key", [Pipe, f"{__name__}.Pipe"], ids=["type", "name"])
@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_object_is_interrupted_as_its_type_was_registered(registry, key, slow):
    """
    By the nearest of its classes, in the canceller's thread, or in a helper thread if slow.
    """
    registry(key, wake, slow=slow)
    registry(OddPipe, lambda pipe: pipe.broken.set())
    for kind, wakers in ((Pipe, 1), (NamedPipe, 1), (OddPipe, 0)):
        token = CancelToken()
        pipe, blocked = kind(), threading.Event()

        def cancels(token=token, blocked=blocked):
            blocked.wait(timeout=60)
            token.cancel("enough")

        thread = in_thread(cancels)
        with pytest.raises(Cancelled), token.interrupts(pipe):
            blocked.set()
            pipe.broken.wait(timeout=60)
        thread.join(timeout=60)

        assert pipe.broken.is_set()
        assert len(pipe.woken_by) == wakers
        assert all((waker is thread) is not slow for waker in pipe.woken_by)


def test_slow_interruption_is_over_when_the_block_is(registry):
    """
    Leaving waits for one that is under way in its helper thread, and cancelling does not.
    """
    begun, release = threading.Event(), threading.Event()
    order = []

    def slowly(pipe):
        begun.set()
        release.wait(timeout=60)
        order.append("interrupted")

    registry(Pipe, slowly, slow=True)
    token = CancelToken()
    with pytest.raises(Cancelled), token.interrupts(Pipe()):
        token.cancel()
        begun.wait(timeout=60)
        other = in_thread(release.set)
    order.append("left")
    other.join(timeout=60)

    assert order == ["interrupted", "left"]


def test_type_without_a_hash_is_known_as_any_other(registry):
    """
    Its metaclass compares its classes in its own way.
    """

    class Comparing(type):
        def __eq__(cls, other):
            return NotImplemented

    class Odd(metaclass=Comparing):
        pass

    seen = []
    token = CancelToken()
    with pytest.raises(TypeError, match="does not know how to interrupt"):
        token.interrupts(Odd())
    registry(Odd, seen.append)
    odd = Odd()
    with pytest.raises(Cancelled), token.interrupts(odd):
        token.cancel()

    assert seen == [odd]


@pytest.mark.parametrize("wrong", [(404, wake), (Pipe, "wake"), (None, wake)])
def test_registering_what_cannot_be_is_refused(registry, wrong):
    """
    A type or its name, and a function.
    """
    with pytest.raises(TypeError, match=r"register\(\) wants a"):
        registry(*wrong)


# --- Elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy])
def test_token_refuses_to_be_copied(act):
    """
    The message says where the token comes from elsewhere.
    """
    with pytest.raises(TypeError, match="current_token"):
        act(CancelToken())


def test_message_that_is_read_elsewhere_has_no_token(monkeypatch):
    """
    A group's message to its workers is for them alone.
    """
    token = CancelToken()
    monkeypatch.setattr(_token.messages, "writing", (token, 1))
    message = pickle.dumps(token)

    with pytest.raises(TypeError, match="by the worker process alone that it was sent to"):
        pickle.loads(message)


@pytest.mark.parametrize("kind", [Cancelled, TaskCancelledError])
def test_cancelled_travels_without_its_token(kind):
    """
    It pickles with its reason, and can be made by hand.
    """
    error = kind(reason="enough")
    if kind is Cancelled:
        error.token = CancelToken()

    back = pickle.loads(pickle.dumps(error))

    assert type(back) is kind
    assert back.reason == "enough"
    assert getattr(back, "token", None) is None
    assert kind(reason=None).reason is None


def test_signal_handler_may_cancel_at_any_moment():
    """
    Whatever of the token's it interrupts: waiting, registering, making children.
    """
    token = None
    before = signal.signal(signal.SIGALRM, lambda number, frame: token.cancel("by signal"))
    try:
        for number in range(150):
            token = CancelToken()
            signal.setitimer(signal.ITIMER_REAL, 0.0003 + number * 1e-6)
            limit = time.monotonic() + 20
            while not token.wait(0.0001):
                token.on_cancel(lambda: None).close()
                token.child().wait(0.0001)
                assert time.monotonic() < limit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert token.reason == "by signal"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_error_of_a_clean_up_after_an_interrupt_is_not_replaced(kind):
    """
    A `Cancelled` in its place would pass for an echo, and the interrupt would be lost.
    """
    token = CancelToken()
    broken = BrokenPipeError("the clean-up's")
    with pytest.raises(BrokenPipeError) as caught, token.interrupts(lambda: None):
        try:
            token.cancel()
            raise kind
        finally:
            raise broken

    assert caught.value is broken
    assert type(broken.__context__) is kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_a_group_of_exceptions_is_not_replaced(kind):
    """
    Nor is an error of the clean-up after such a group.
    """
    group = BaseExceptionGroup("both", [BaseExceptionGroup("one", [kind()]), OSError("cut")])
    token = CancelToken()
    with pytest.raises(BaseExceptionGroup) as caught, token.interrupts(lambda: None):
        token.cancel()
        raise group
    assert caught.value is group

    token = CancelToken()
    with pytest.raises(BrokenPipeError), token.interrupts(lambda: None):
        try:
            token.cancel()
            raise group
        finally:
            raise BrokenPipeError("the clean-up's")


@pytest.mark.parametrize(
    "error",
    [asyncio.CancelledError(), BaseExceptionGroup("both", [asyncio.CancelledError(), OSError()])],
    ids=["CancelledError", "group"],
)
def test_what_an_interruption_may_have_caused_is_the_context_of_the_cancelled(error):
    """
    A loop that is run in the block is interrupted by cancelling its task.
    """
    token = CancelToken()
    with pytest.raises(Cancelled) as caught, token.interrupts(lambda: None):
        token.cancel()
        raise error

    assert caught.value.__context__ is error
