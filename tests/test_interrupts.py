"""
Ctrl-C: who hears it, where it is raised, and what is left behind.
"""

import contextlib
import dis
import gc
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.dummy import DummyProcess

import points
import pytest
from blocked import is_blocked
from staging import (
    act_at,
    fail,
    have_idle_threads_wait,
    in_thread,
    is_asleep,
    look,
    sleeping,
    start,
    until,
)

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    StuckTaskError,
    TaskGroup,
    _clock,
    _guard,
    _waiting,
    _wakers,
    blocking,
    cancellable,
    current_token,
    shield,
    timeout,
    use_token,
)
from fastpool._bounded import BoundedQueue
from fastpool._gate import Gate
from fastpool._run import Run
from fastpool._stream import Source
from fastpool.backends import threads
from fastpool.blocking import _elsewhere


def interrupt():
    """Ctrl-C, here and now."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def signal_is_given_back():
    """Every test leaves Python's own handler."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(autouse=True)
def nothing_is_collected_meanwhile():
    """What is raised in a finalizer goes nowhere, so it would not be met where it is looked for."""
    gc.disable()
    yield
    gc.enable()


# --- Where it is raised ---------------------------------------------------------------------------


def test_interrupt_in_the_body_is_raised_there_and_stops_the_tasks():
    """
    It leaves the block as it was raised, is the body's failure, and every token hears it.
    """
    with pytest.raises(KeyboardInterrupt) as caught, TaskGroup(2) as group:
        sleepers = group.map(fastpool.sleep, [60, 60, 60])
        try:
            interrupt()
        except KeyboardInterrupt as error:
            here = error
            raise

    assert caught.value is here
    assert group.token.reason is here
    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, here)]
    assert all(task.cancelled() for task in sleepers.tasks)


def test_interrupt_that_the_body_handles_ends_the_group_with_nothing():
    """
    Raised in the user's code it is that code's; the group is cancelled all the same.
    """
    with TaskGroup(2) as outer:
        with TaskGroup(2) as inner:
            sleeper = inner.submit(fastpool.sleep, 60)
            with pytest.raises(KeyboardInterrupt):
                interrupt()
        after = True

    assert after
    assert sleeper.cancelled()
    assert (inner.failures, outer.failures) == ((), ())
    assert type(outer.token.reason) is KeyboardInterrupt


@pytest.mark.parametrize(
    "wait",
    [
        lambda group, task: task.result(),
        lambda group, task: task.exception(),
        lambda group, task: task.wait(),
        lambda group, task: group.wait(),
        lambda group, task: group.map(fastpool.sleep, [60]).results(),
        lambda group, task: list(fastpool.as_completed([task])),
        lambda group, task: fastpool.sleep(60),
        lambda group, task: CancelToken().wait(60),
        lambda group, task: CancelToken().sleep(60),
    ],
    ids=[
        "result",
        "exception",
        "wait",
        "group",
        "results",
        "as_completed",
        "sleep",
        "token",
        "own",
    ],
)
def test_interrupt_is_raised_by_the_wait_that_it_ends(wait, watched):
    """
    Whatever that waits for: a task, a group, the current token or another one.
    """
    main = threading.main_thread().ident

    def ctrl_c():
        until(lambda: main in sleeping)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), TaskGroup(2) as group:
        task = group.submit(fastpool.sleep, 60)
        killer = threading.Thread(target=ctrl_c)
        killer.start()
        with pytest.raises(KeyboardInterrupt) as raised:
            wait(group, task)
        killer.join()
        raise raised.value


@pytest.mark.parametrize(
    ("event", "steps"),
    [
        ("group_opened", ["held back"]),
        ("task_submitted", ["body", "held back", "submitted"]),
        ("group_closed", ["body", "submitted", "waited", "held back"]),
    ],
)
def test_interrupt_that_meets_a_line_of_ours_is_held_back(event, steps):
    """
    No line is torn: it is raised by the next wait, or at the end of the block.
    """
    seen = []
    taken = []

    def observer(happened):
        seen.append(happened.name)
        if happened.name == event:
            interrupt()
            taken.append("held back")

    group = TaskGroup(2, observers=[observer])
    with pytest.raises(KeyboardInterrupt), group:
        taken.append("body")
        task = group.submit(abs, 1) if event == "group_closed" else group.submit(fastpool.sleep, 60)
        taken.append("submitted")
        task.result()
        taken.append("waited")

    assert taken == steps
    assert seen[-1] == "group_closed"
    assert [type(failure.exception) for failure in group.failures] == [KeyboardInterrupt]


@pytest.mark.parametrize("sleep", [Gate.wait, lambda gate: gate.wait(60), Gate.sit_out])
def test_sleeping_main_thread_hears_a_signal_that_does_not_wake_it(watched, sleep):
    """
    Nothing wakes it when the signal is given to another thread, as here, or comes when it has
    looked for signals for the last time and does not sleep yet.
    """
    gate = Gate()
    heard = []

    def hear(signum, frame):
        heard.append(signum)
        gate.open()

    def send():
        until(lambda: is_asleep(threading.main_thread()))
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, hear)
    try:
        sender, outcome = start(send)
        sleep(gate)
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert outcome == [None]
    assert heard == [signal.SIGUSR1]


@pytest.mark.parametrize("sleep", [Gate.wait, lambda gate: gate.wait(60), Gate.sit_out])
def test_main_thread_looks_for_signals_ten_times_a_second(sleep):
    """
    It asks for no longer sleep at a time, whatever it waits for; another thread for one long one.
    """

    class Lock:
        """Stands where the gate's own stood, and opens when it has been asked three times."""

        def __init__(self):
            self.spans = []

        def acquire(self, blocking, timeout):
            self.spans.append(timeout)
            return len(self.spans) == 3

    def spans():
        gate = Gate()
        gate._lock = Lock()
        sleep(gate)
        return gate._lock.spans

    assert spans() == [0.1, 0.1, 0.1]
    if sleep is not Gate.sit_out:  # which does not ask in which thread it is
        assert min(in_thread(spans)) > 50


def test_held_interrupt_comes_before_its_echo():
    """
    The next check, or the next submit, raises it, and not the `Cancelled` that it has caused.
    """

    def observer(event):
        if event.name == "task_submitted":
            interrupt()

    def body(act):
        with TaskGroup(2, observers=[observer]) as group:
            group.submit(fastpool.sleep, 60)
            with pytest.raises(KeyboardInterrupt):
                act(group)

    body(lambda group: fastpool.checkpoint())
    body(lambda group: group.submit(fastpool.sleep, 60))
    body(lambda group: fastpool.sleep(0))


def test_interrupt_in_an_input_of_map_is_raised_there():
    """
    The user's own iterable is the user's code, also below a line of ours.
    """

    def items():
        yield 1
        try:
            interrupt()
        except KeyboardInterrupt:
            caught.append(True)
            raise

    caught = []
    with pytest.raises(KeyboardInterrupt), TaskGroup(2) as group:
        group.map(fastpool.sleep, items())

    assert caught
    assert len(group.failures) == 1


def test_interrupt_in_a_decorated_function_that_the_body_calls_is_raised_there():
    """
    Also where it is called with a token, and below a method.
    """

    class Worker:
        @cancellable
        def method(self, token):
            interrupt()

    @cancellable
    def work(token):
        interrupt()

    @cancellable
    def last(number, *, token=None):
        interrupt()

    calls = (
        work,
        Worker().method,
        lambda: last(1),
        lambda: work.with_token(current_token()),
        lambda: work.with_token(CancelToken()),
    )
    for call in calls:
        with TaskGroup(2), pytest.raises(KeyboardInterrupt):
            call()


def test_interrupt_in_a_callback_is_not_lost():
    """
    What a callback raises goes to `sys.unraisablehook`, so an interrupt there is held back.
    """
    with pytest.raises(KeyboardInterrupt), TaskGroup(2) as group:
        group.token.on_cancel(interrupt)
        group.cancel()
        finished = True
        fastpool.sleep(0)

    assert finished


def test_callbacks_run_in_a_helper_and_not_in_the_handler():
    """
    The handler may have interrupted anything; and the block is not left before they have run.
    """
    ran = []
    with pytest.raises(KeyboardInterrupt), TaskGroup(2) as group:
        group.token.on_cancel(lambda: ran.append(threading.current_thread()))
        interrupt()

    assert len(ran) == 1
    assert ran[0] is not threading.main_thread()


def test_callbacks_run_where_no_thread_can_be_started(monkeypatch):
    """
    Then the thread that leaves runs them.
    """

    def refuse(*arguments):
        raise RuntimeError("can't start new thread")

    ran = []
    with pytest.raises(KeyboardInterrupt), TaskGroup(2) as group:
        group.token.on_cancel(lambda: ran.append(threading.current_thread()))
        with monkeypatch.context() as patch:
            patch.setattr("_thread.start_new_thread", refuse)
            interrupt()

    assert ran == [threading.main_thread()]


# --- Who hears it ---------------------------------------------------------------------------------


def test_every_group_of_the_main_thread_hears_it_and_no_other():
    """
    Nested ones, and those that were not opened one in the other; not one of another thread.
    """
    release = threading.Event()
    opened = threading.Event()
    elsewhere = TaskGroup(1)

    def other():
        with elsewhere:
            opened.set()
            release.wait(60)
            return elsewhere.token.cancelled()

    answers = []
    thread = threading.Thread(target=lambda: answers.append(other()))
    thread.start()
    assert opened.wait(60)
    with pytest.raises(KeyboardInterrupt), TaskGroup(1) as outer, TaskGroup(1) as inner:
        interrupt()
    release.set()
    thread.join()

    assert outer.token.reason is inner.token.reason
    assert answers == [False]


def test_interrupt_that_a_task_raises_is_no_ctrl_c():
    """
    It is its own group's failure, and the group around it hears nothing.
    """
    with TaskGroup(1) as outer:
        with pytest.raises(KeyboardInterrupt), TaskGroup(1) as inner:
            inner.submit(fail, KeyboardInterrupt())

        assert inner.token.cancelled()
        assert not outer.token.cancelled()
        assert outer.submit(abs, -404).result() == 404

    assert outer.failures == ()


def test_ctrl_c_after_an_interrupt_that_a_task_raised_is_the_first():
    """
    What runs is waited for, as after one, and not left behind, as after two.
    """

    def interrupts_and_goes_on():
        until(lambda: group.failures)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: len(group.failures) == 2)
        return "done"

    with pytest.raises(KeyboardInterrupt) as raised, TaskGroup(2) as group:
        other = group.submit(interrupts_and_goes_on)
        until(other.running)
        own = KeyboardInterrupt()
        failing = group.submit(fail, own)

    assert raised.value is own
    assert [failure.task for failure in group.failures] == [failing, None]
    assert other.result() == "done"


def test_group_on_another_thread_leaves_signals_alone():
    """
    Signals are the main thread's.
    """

    def look():
        with TaskGroup(1):
            return signal.getsignal(signal.SIGINT)

    assert in_thread(look) is signal.default_int_handler


def test_foreign_handler_is_left_alone():
    """
    What it raises in a wait of ours counts as the body's, and leaving still waits.
    """

    class Stop(Exception):
        pass

    def stop(signum, frame):
        raise Stop

    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(Stop), TaskGroup(2) as group:
            assert signal.getsignal(signal.SIGINT) is stop
            sleeper = group.submit(fastpool.sleep, 60)
            until(sleeper.running)
            interrupt()
        assert signal.getsignal(signal.SIGINT) is stop
    finally:
        signal.signal(signal.SIGINT, before)

    assert sleeper.cancelled()


class Stop(TimeoutError):
    """What a handler of the user's raises."""


def raising_at(point):
    """
    A profiler that raises at so many points from here at which a signal handler can run.

    But where nothing can be done about it: in what lets nothing pass, and at the very entry of an
    `__exit__`.
    """

    def stop():
        raise Stop

    return doing_at(point, stop)


def doing_at(point, act):
    """A profiler that does something there."""
    points = itertools.count()

    def profile(frame, event, argument):
        is_ours = frame.f_globals.get("__name__", "").startswith("fastpool")
        name = frame.f_code.co_name
        if name in ("_forget", "__del__") or (name == "__exit__" and event == "call"):
            return
        if is_ours and event in ("call", "c_return") and next(points) == point:
            act()

    return profile


@pytest.mark.parametrize("options", [{}, {"max_queued": 2}, {"observers": [lambda event: None]}])
@pytest.mark.parametrize("idle", [True, False])
def test_submit_that_a_foreign_handler_ends_anywhere_keeps_no_worker_from_the_next(options, idle):
    """
    A body that goes on after it finds the group as it was: with its one worker.
    """
    for point in itertools.count():
        with TaskGroup(1, **options) as group:
            if idle:
                group.submit(abs, 1)
                until(lambda group=group: group._run.idle)
            sys.setprofile(raising_at(point))
            try:
                group.submit(abs, -1)
            except Stop:
                stopped = True
            else:
                stopped = False
            finally:
                sys.setprofile(None)

            assert group.submit(abs, -2).result(timeout=60) == 2
        if not stopped:
            break

    assert point > 5


@pytest.mark.parametrize("error", [None, LookupError, SystemExit])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "processes"},
        {"timeout": 60, "observers": [lambda event: None]},
        {"policy": CollectAll()},
    ],
)
def test_foreign_handler_that_raises_anywhere_tears_no_group(options, error):
    """
    Nothing of the group is left behind, what was raised leaves, or is in the record; an exit
    leaves before it. And the worker goes on to one next group, not to two.
    """
    warm = TaskGroup(1, pool=options.get("pool"))
    with warm:
        warm.submit(abs, 1)

    def leave(group, profile):
        with group:
            task = group.submit(abs, -1)
            task.wait()
            sys.setprofile(profile)
            if error is not None:
                raise error

    for point in itertools.count():
        group = TaskGroup(1, **options)
        left = None
        try:
            leave(group, raising_at(point))
        except BaseException as raised:
            left = raised
        finally:
            sys.setprofile(None)
        failures = [failure.exception for failure in group.failures]
        stopped = any(isinstance(one, Stop) for one in (left, *failures))

        assert group._run.over
        assert group._run not in fastpool._taskgroup._open_runs
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not any(fastpool._guard._guard.wards.values())
        assert current_token() is CancelToken.NEVER
        with TaskGroup(1) as one, TaskGroup(1) as other:
            lanes = [of.submit(threading.get_ident).result(timeout=60) for of in (one, other)]
        assert len(set(lanes)) == 2
        assert error is not SystemExit or isinstance(left, SystemExit)
        if not stopped:
            break

    assert (left is not None) == (error is not None)
    assert point > 30


def tear(point, step):
    """Take a step, torn at a point; what was raised there, if it came so far."""
    sys.setprofile(raising_at(point))
    try:
        step()
    except Stop as stop:
        return stop
    finally:
        sys.setprofile(None)
    return None


@pytest.mark.parametrize("made", ["new", "parked"])
def test_group_has_as_many_workers_wherever_a_foreign_handler_has_raised(made, workers):
    """
    Neither fewer nor more than it says; so `max_workers=1` runs nothing side by side.
    """
    arguments = workers(1)
    for point in itertools.count():
        if made == "new":
            fastpool.shutdown()
        else:
            with TaskGroup(**arguments) as before:
                before.submit(abs, -1)
        begun, go = [], threading.Event()

        def hold(begun=begun, go=go):
            begun.append(len(begun))
            assert go.wait(60)

        group, torn = TaskGroup(**arguments), None
        with contextlib.suppress(Stop), group:  # it may be held back until the block is left
            torn = tear(point, lambda group=group: group.submit(abs, -1))
            try:
                for _ in range(2):
                    start(group.submit, hold)[0].join(60)
                until(lambda begun=begun: begun)
                lanes, more = len(group._run.lanes), group._run.take_slot()
                threads = len(getattr(group._run.pool, "lanes", "1"))  # a pool of ours has some
            finally:
                go.set()

        assert (lanes, more, threads) == (1, False, 1), point
        if not torn:
            break

    assert point > 10


@pytest.mark.parametrize("idle", [True, False])
def test_helper_that_a_foreign_handler_has_torn_the_call_of_does_the_next_job(idle):
    """
    Also one that was woken twice. The torn job is done once, or never.
    """
    for point in itertools.count():
        fastpool.shutdown()
        done = []
        if idle:
            _clock.run_in_helper(lambda: None)
            until(lambda: _clock._idle_helpers)
        torn = tear(point, lambda done=done: _clock.run_in_helper(lambda: done.append(1)))
        until(lambda: len(_clock._idle_helpers) == len(_clock._helpers))
        again = threading.Event()
        _clock.run_in_helper(again.set)

        assert again.wait(60)
        assert len(done) <= 1
        if not torn:
            break

    assert done
    assert point > 2


def test_one_helper_does_what_is_asked_for_one_by_one():
    """
    So that those which were needed once, for much at a time, come to their end.
    """
    barrier = threading.Barrier(4)
    for _ in range(3):
        _clock.run_in_helper(barrier.wait)
    barrier.wait(60)
    until(lambda: len(_clock._idle_helpers) >= 3)
    threads = []
    for count in range(1, 9):
        _clock.run_in_helper(lambda: threads.append(threading.get_ident()))
        until(lambda count=count: len(threads) == count)
        until(lambda: len(_clock._idle_helpers) == len(_clock._helpers))

    assert len(set(threads)) == 1


def test_late_callback_whose_call_a_foreign_handler_has_torn_is_over(unraised):
    """
    No group waits for it for ever. What came as it was called is told of as its own.
    """
    token = CancelToken()
    token.cancel()
    called = []
    for point in itertools.count():
        torn = tear(point, lambda: token.on_cancel(lambda: called.append(1)))
        in_thread(token._close_callbacks)
        if not torn:
            break

    assert 5 < len(called) <= point + 1
    assert len(unraised) <= 1


class Asked:
    """What is to be interrupted again and again, since nobody knows whether it was met."""

    def __init__(self):
        self.times = 0
        self.goes_on = threading.Event()
        self.at_it = False

    def interrupt(self):
        self.times += 1
        if threading.current_thread().name == "fastpool-helper":
            self.at_it = True
            self.goes_on.wait(60)
            self.at_it = False
        return _wakers.AGAIN


blocking.register(Asked, Asked.interrupt)


def blocked_in(token, asked):
    """
    A thread in a block that a token is to interrupt, what lets it go on there, and the list for
    how often it was interrupted by the end of the block, and whether that still went on.
    """
    inside, goes = threading.Event(), threading.Event()

    def blocks():
        with contextlib.suppress(Cancelled), token.interrupts(asked):
            inside.set()
            goes.wait(60)
        return asked.times, asked.at_it

    thread, outcome = start(blocks)
    assert inside.wait(60)
    return thread, goes, outcome


def test_interruption_that_a_foreign_handler_has_torn_is_over_with_its_block(unraised):
    """
    Nothing of it comes after.
    """
    for point in itertools.count():
        token, asked = CancelToken(), Asked()
        asked.goes_on.set()
        thread, goes, outcome = blocked_in(token, asked)
        torn = tear(point, token.cancel)
        goes.set()
        thread.join(60)
        # What must not come would come in one of them.
        until(lambda: len(_clock._idle_helpers) == len(_clock._helpers))

        assert outcome == [(asked.times, False)]
        if not torn:
            break

    assert point > 30


def test_block_waits_for_an_interruption_that_goes_on_in_a_helper(monkeypatch):
    """
    Though a foreign handler has torn the cancel just as it had handed that over.
    """
    token, asked, handed = CancelToken(), Asked(), []
    hand_over = _clock.run_in_helper

    def torn_once(job):
        hand_over(job)
        if not handed:
            handed.append(job)
            until(lambda: asked.at_it)
            raise Stop

    monkeypatch.setattr(_clock, "run_in_helper", torn_once)
    thread, goes, outcome = blocked_in(token, asked)
    with pytest.raises(Stop):
        token.cancel()
    goes.set()
    until(lambda: outcome or is_blocked(thread.native_id, among=None))
    asked.goes_on.set()
    thread.join(60)

    assert outcome == [(asked.times, False)]


SCOPES = [lambda: use_token(CancelToken()), lambda: timeout(60), lambda: shield(60)]


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("make", SCOPES)
def test_scope_that_a_foreign_handler_has_torn_is_over(make, leaves):
    """
    Whether it is the entry that was torn, or the end: its token is current no more, nor heard of,
    and has no deadline, though what was raised still holds it.
    """
    around = CancelToken()
    with use_token(around):
        for point in itertools.count():
            fastpool.shutdown()  # it is to be started
            scope = make()
            if leaves:
                token = scope.__enter__()
            torn = tear(
                point,
                lambda scope=scope: scope.__exit__(*[None] * 3) if leaves else scope.__enter__(),
            )
            if not torn:
                break

            assert current_token() is around
            assert scope._entered == []
            assert list(around._children()) == []
            if leaves:
                assert token._parents == ()
            assert CancelToken(timeout=0.001).wait(60)  # there is a clock
            fastpool.shutdown()
            assert not _clock._clocks["clock"].turns  # and nothing for it to do
        if not leaves:
            scope.__exit__(*[None] * 3)

    assert point > 3


@pytest.mark.parametrize("make", SCOPES)
def test_scope_entered_twice_that_a_foreign_handler_has_torn_is_left_once(make):
    for point in itertools.count():
        scope = make()
        with scope as token:
            scope.__enter__()
            torn = tear(point, lambda scope=scope: scope.__exit__(*[None] * 3))

            assert current_token() is token
        assert current_token() is CancelToken.NEVER
        if not torn:
            break

    assert point > 3


def test_what_a_foreign_handler_raises_as_a_block_is_left_is_on_record():
    """
    Also where nothing else is left to do. In the judge's `end` it is taken for the judge's.
    """
    others = []
    for point in itertools.count():
        group = TaskGroup(1)
        group.__enter__()
        if not tear(point, lambda group=group: group.__exit__(None, None, None)):
            break
        if [type(failure.exception) for failure in group.failures] != [Stop]:
            others.append(group.failures)

        assert fastpool.dump() == ()

    assert others == [(), ()]
    assert point > 10


def test_end_of_a_scope_that_was_not_entered_takes_off_no_other():
    """
    It is an error, as for any block of Python's.
    """
    scope = use_token(CancelToken())
    with scope as token:
        scope.__exit__(None, None, None)
        with pytest.raises(IndexError):
            scope.__exit__(None, None, None)
        scope.__enter__()

        assert current_token() is token


@pytest.mark.parametrize("leaves", [False, True])
def test_interruption_never_comes_after_a_block_that_a_foreign_handler_has_torn(leaves):
    """
    Whether it is the entry that was torn, or the end.
    """
    for point in itertools.count():
        token, interrupted = CancelToken(), []
        interrupts = token.interrupts(lambda interrupted=interrupted: interrupted.append(1))
        if leaves:
            interrupts.__enter__()
        torn = tear(
            point, lambda i=interrupts: i.__exit__(*[None] * 3) if leaves else i.__enter__()
        )
        if not torn:
            break
        token.cancel()

        assert interrupted == []
        assert interrupts._registrations == []

    assert point > 3


@pytest.mark.filterwarnings("ignore:abs.. was left behind")  # it may run still
def test_handler_that_tears_the_start_of_a_call_is_heard():
    """
    What it raises leaves `abandon`, whether the call's thread runs by then or not.
    """
    for point in itertools.count():
        reached = []
        profile = raising_at(point)

        def noting(frame, event, argument, profile=profile, reached=reached):
            try:
                profile(frame, event, argument)
            except Stop:
                reached.append(1)
                raise

        sys.setprofile(noting)
        try:
            blocking.abandon(abs, -5)
        except Stop:
            reached.pop()
        else:
            break
        finally:
            sys.setprofile(None)

    assert reached == []
    assert point > 10


def test_handler_that_the_user_puts_in_place_meanwhile_stays():
    """
    The group gives back what it took, and nothing else.
    """

    def mine(signum, frame):
        """Nothing."""

    with TaskGroup(1):
        signal.signal(signal.SIGINT, mine)
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    assert after is mine


@pytest.mark.parametrize("leave", ["normally", "failed", "refused", "cancelled"])
def test_signal_is_given_back_on_every_path(leave):
    """
    However the block ends, Ctrl-C is Python's own again.
    """
    try:
        with TaskGroup(1, timeout=-1 if leave == "cancelled" else None) as group:
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            if leave == "refused":
                group.__enter__()
            if leave == "failed":
                raise ValueError("the body")
    except (ValueError, RuntimeError, TimeoutError):
        pass

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_entry_that_fails_gives_the_signal_back(monkeypatch):
    """
    Nothing is kept of a group that could not be opened.
    """

    def refuse(*arguments):
        raise RuntimeError("can't start new thread")

    fastpool.shutdown()
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", refuse)
        with pytest.raises(RuntimeError, match="can't start"), TaskGroup(1, timeout=60):
            pass

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_that_meets_an_entry_that_fails_is_what_leaves(monkeypatch):
    """
    The error of the entry is its cause.
    """

    def refuse(*arguments):
        interrupt()
        raise RuntimeError("can't start new thread")

    fastpool.shutdown()
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", refuse)
        with pytest.raises(KeyboardInterrupt) as caught, TaskGroup(1, timeout=60):
            pass

    assert str(caught.value.__cause__) == "can't start new thread"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_that_is_held_back_on_entry_is_raised_before_the_body():
    """
    Nothing of the body begins.
    """
    begun = []

    def observer(event):
        if event.name == "group_opened":
            interrupt()

    with pytest.raises(KeyboardInterrupt), TaskGroup(1, observers=[observer]):
        begun.append("the body")

    assert begun == []
    assert fastpool.dump() == ()


def test_interrupt_of_a_group_that_is_dropped_is_not_lost():
    """
    Held back in it, it is raised as the next group is entered.
    """

    def observer(event):
        if event.name == "task_submitted":
            interrupt()

    group = TaskGroup(1, observers=[observer])
    group.__enter__()
    group.submit(abs, 1)
    with pytest.warns(ResourceWarning, match="was dropped"):
        del group

    with pytest.raises(KeyboardInterrupt), TaskGroup(1):
        pass


def test_held_interrupt_is_recorded_before_what_the_body_raises_then():
    """
    The failures are in the order of time.
    """
    error = ValueError("bad header")

    def observer(event):
        if event.name == "task_submitted":
            interrupt()

    with pytest.raises(KeyboardInterrupt) as caught, TaskGroup(1, observers=[observer]) as group:
        group.submit(abs, 1)
        raise error

    assert [failure.exception for failure in group.failures] == [caught.value, error]


def test_interrupt_that_meets_the_end_of_the_wait_is_known_to_all(monkeypatch):
    """
    To the judge, and to who observes the end.
    """
    events = []

    class Policy(Collecting):
        def end(self, failures):
            judged.extend(failures)

    def interrupted(run):
        monkeypatch.undo()
        interrupt()
        return run.close()

    judged = []
    monkeypatch.setattr("fastpool._run.Run.close", interrupted)
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        TaskGroup(1, policy=Policy(), observers=[events.append]) as group,
    ):
        group.submit(abs, 1)

    assert [failure.exception for failure in judged] == [caught.value]
    assert [failure.exception for failure in group.failures] == [caught.value]
    assert [event.error for event in events if event.name == "group_closed"] == [caught.value]


@pytest.mark.parametrize("where", ["wait", "before", "judge"])
def test_traceback_of_an_interrupt_shows_nothing_of_how_the_block_is_left(where):
    """
    Of the group's own code it shows the line at which it leaves, and no other.
    """

    class Policy(Collecting):
        def end(self, failures):
            if where == "judge":
                interrupt()

    def observer(event):
        if event.name == "task_submitted" and where == "before":
            interrupt()

    def task():
        if where == "wait":
            until(lambda: group._run.leavers)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with (
        pytest.raises(KeyboardInterrupt) as caught,
        TaskGroup(1, policy=Policy(), observers=[observer]) as group,
    ):
        group.submit(task)

    frames = [frame for frame in caught.traceback if "_taskgroup" in str(frame.path)]
    assert [frame.name for frame in frames] == ["__exit__"]


# --- A second time --------------------------------------------------------------------------------


def test_second_interrupt_leaves_at_once_and_names_what_still_runs():
    """
    Nobody waits for the task any more: its handle is cancelled, and the exception names it.
    """
    release = threading.Event()
    began = threading.Event()
    ended = threading.Event()

    def stubborn():
        began.set()
        release.wait(60)
        ended.set()
        return "late"

    events = []
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        TaskGroup(1) as outer,
        TaskGroup(2, name="jobs", observers=[events.append]) as group,
    ):
        task = group.submit(stubborn)
        batch = group.map(lambda item: stubborn(), [1])
        until(lambda: task.running() and batch.tasks[0].running())
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        interrupt()
    states = [task.cancelled(), batch.tasks[0].cancelled(), outer.token.cancelled()]
    release.set()
    assert ended.wait(60)
    until(lambda: "task_succeeded" in [event.name for event in events])

    assert states == [True, True, True]
    notes = "\n".join(caught.value.__notes__)
    assert "left behind in group 'jobs': task 'stubborn', submitted at " in notes
    assert "in thread 'fastpool-jobs-" in notes
    assert "task_abandoned" in [event.name for event in events]
    for left in (task, batch.tasks[0]):
        with pytest.raises(fastpool.TaskCancelledError, match="second Ctrl-C"):
            left.result()


def test_third_interrupt_is_as_the_second():
    """
    Each is raised in the user's code, what runs is left by name, and the signal is given back.
    """
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt) as caught, TaskGroup(1) as group:
        task = group.submit(release.wait, 60)
        until(task.running)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupt()
        interrupt()
    given_back = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # a fourth one is Python's own
        interrupt()
    release.set()

    assert task.cancelled()
    assert any("left behind in group" in note for note in caught.value.__notes__)
    assert given_back is signal.default_int_handler


def test_second_interrupt_of_a_foreign_handler_leaves_at_once(watched):
    """
    The first one is waited with, though ours is not the handler that raised it.
    """
    release, began, left = (threading.Event() for _ in range(3))
    main = threading.main_thread()
    heard, in_time = [], []

    def stubborn():
        began.set()
        release.wait(60)

    def stop(signum, frame):
        heard.append(signum)
        raise KeyboardInterrupt

    def send():
        for count in (1, 2):
            until(lambda: left.is_set() or is_asleep(main))
            in_time.append(not left.is_set())
            if in_time[-1]:
                signal.pthread_kill(main.ident, signal.SIGINT)
                until(lambda count=count: len(heard) == count)
        until(left.is_set, within=30)
        release.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(KeyboardInterrupt) as caught, TaskGroup(2) as group:
            task = group.submit(stubborn)
            assert began.wait(60)
            sender, _ = start(send)
        left.set()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.join()

    assert in_time == [True, True]
    assert task.cancelled()
    assert any("left behind" in note for note in caught.value.__notes__)


# --- Abandoned ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grace", "said"), [(0.01, "0.01"), (0, "0"), (-2, "0")])
def test_stuck_task_is_abandoned_where_that_is_asked_for(grace, said):
    """
    After the time of grace the block is left without it, and says so if nothing else leaves. Less
    than none is none.
    """
    release = threading.Event()

    def stubborn():
        release.wait(60)

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError, match="group 'jobs' was left") as caught,
        TaskGroup(2, name="jobs", grace=grace, on_stuck="abandon") as group,
    ):
        task = group.submit(stubborn)
        until(task.running)
        group.cancel()
    with pytest.raises(fastpool.TaskCancelledError, match=f"stopped {said} s after the cancel"):
        task.result()
    release.set()

    assert task.cancelled()
    assert "task 'stubborn'" in caught.value.__notes__[0]


def test_abandoned_group_raises_what_it_would_have_raised():
    """
    The failure that cancelled it, with a note of what was left behind.
    """
    release = threading.Event()

    def stubborn():
        release.wait(60)

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(ValueError, match="the body") as caught,
        TaskGroup(2, grace=0.01, on_stuck="abandon") as group,
    ):
        until(group.submit(stubborn).running)
        raise ValueError("the body")
    release.set()

    assert any("left behind" in note for note in caught.value.__notes__)


def test_task_that_has_just_ended_keeps_its_value():
    """
    To abandon it then changes nothing.
    """
    with TaskGroup(1) as group:
        task, batch = group.submit(abs, -1), group.map(abs, [-2])
        group.wait()
        for handle in (task, batch.tasks[0]):
            handle._abandon()

    assert (task.result(), batch.results()) == (1, [2])


class Given:
    """An argument of a task."""


@pytest.mark.parametrize("ends", ["task_succeeded", "task_failed"])
def test_what_an_abandoned_task_comes_to_is_for_observers_alone(ends):
    """
    The policy has judged already, and the record of failures is closed. Its handle keeps nothing.
    """
    release, given = threading.Event(), Given()
    kept = weakref.ref(given)
    events, judged = [], []

    class Judging:
        def start(self):
            return self

        def outcome(self, task, error):
            judged.append(error)
            return False

        def end(self, failures):
            return None

    def stubborn(_):
        release.wait(60)
        if ends == "task_failed":
            raise ValueError("too late")

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError),
        TaskGroup(
            1,
            policy=Judging(),
            grace=0.01,
            on_stuck="abandon",
            observers=[lambda event: events.append(event.name)],
        ) as group,
    ):
        task = group.submit(stubborn, given)
        del given
        until(task.running)
        group.cancel()
    at_once = task.cancelled()
    release.set()
    until(lambda: ends in events)
    until(lambda: kept() is None, within=10)

    assert at_once
    assert judged == []
    assert group.failures == ()
    assert task.cancelled()
    assert kept() is None


def test_pool_of_an_abandoned_task_is_not_used_again(monkeypatch):
    """
    The next group has threads of its own, and the old one ends with its task.
    """
    have_idle_threads_wait(3600, monkeypatch)
    release = threading.Event()
    threads = []

    def stubborn():
        threads.append(threading.current_thread())
        release.wait(60)

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0.01, on_stuck="abandon") as group,
    ):
        until(group.submit(stubborn).running)
        group.cancel()
    with TaskGroup(1) as after:
        other = after.submit(threading.current_thread).result()
    release.set()
    threads[0].join(60)

    assert other is not threads[0]
    assert not threads[0].is_alive()


def test_submit_that_meets_an_abandoned_group_leases_no_threads(monkeypatch):
    """
    It was about to call a worker as the block was left, and there is nothing to serve any more.
    """
    take_slot, release = Run.take_slot, threading.Event()
    taken, goes_on = threading.Event(), threading.Event()

    def take_late(run):
        has_slot = take_slot(run)
        taken.set()
        assert goes_on.wait(60)
        return has_slot

    with (
        pytest.warns(RuntimeWarning, match="still runs"),
        pytest.raises(StuckTaskError),
        TaskGroup(2, grace=0.01, on_stuck="abandon") as group,
    ):
        until(group.submit(release.wait, 60).running)
        monkeypatch.setattr(Run, "take_slot", take_late)
        submitter, submitted = start(group.submit, int)
        assert taken.wait(60)
        group.cancel()
    before = set(threads._live_pools)
    goes_on.set()
    submitter.join(60)
    release.set()

    assert submitted[0].cancelled()
    assert set(threads._live_pools) <= before


def test_on_stuck_is_one_of_two_words():
    """
    Anything else is refused.
    """
    with pytest.raises(ValueError, match="on_stuck must be 'wait' or 'abandon', not 'kill'"):
        TaskGroup(on_stuck="kill")


# --- Other signals --------------------------------------------------------------------------------


def terminate():
    """What a service manager sends, here and now."""
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def sigterm():
    """Another handler for SIGTERM, which must be there again afterwards."""

    def handler(signum, frame):
        raise AssertionError("it was not taken over")

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    after = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert after is handler


def test_group_stops_on_a_signal_that_it_was_told_to_hear(sigterm):
    """
    Its tasks stop, nothing queued starts, and the block is left with the signal's exit code.
    """
    with pytest.raises(SystemExit) as caught, TaskGroup(2) as outer, TaskGroup(1) as group:
        fastpool.cancel_on_signals(group, signal.SIGTERM)
        running, queued = group.map(fastpool.sleep, [60, 60]).tasks
        until(running.running)
        terminate()

    assert caught.value.code == 128 + signal.SIGTERM
    assert running.cancelled()
    assert queued.cancelled()
    assert [failure.exception for failure in outer.failures] == [caught.value]


def test_signal_cancels_those_groups_alone_that_hear_it(sigterm):
    """
    One around it, and one beside it, go on.
    """
    with TaskGroup(1) as outer:
        with pytest.raises(SystemExit), TaskGroup(1) as group:
            fastpool.cancel_on_signals(group, signal.SIGTERM)
            terminate()
        assert not outer.token.cancelled()
        assert outer.submit(abs, -1).result() == 1


def test_handler_of_a_signal_is_restored_when_asked(sigterm):
    """
    By `close()`, or at the end of a `with` block of its own, before the group ends.
    """
    with TaskGroup(1) as group:
        with fastpool.cancel_on_signals(group, signal.SIGTERM):
            assert signal.getsignal(signal.SIGTERM) is not sigterm
        assert signal.getsignal(signal.SIGTERM) is sigterm
        asking = fastpool.cancel_on_signals(group, signal.SIGTERM)
        with TaskGroup(1) as inner:
            fastpool.cancel_on_signals(inner, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is not sigterm
        asking.close()
        assert signal.getsignal(signal.SIGTERM) is sigterm


def test_group_may_be_opened_at_every_line_as_a_signal_is_taken_and_given_back(sigterm):
    """
    By a finalizer, say: the signal is heard while it is taken, and its handler restored.
    """

    def taken(group):
        with fastpool.cancel_on_signals(group, signal.SIGTERM):
            assert signal.getsignal(signal.SIGTERM) is not sigterm
        return fastpool.cancel_on_signals(group, signal.SIGTERM)

    for step in itertools.count():
        met = []

        def opens_one(met=met):
            met.append(True)
            with contextlib.suppress(Cancelled), TaskGroup(1):  # a finalizer's leaves nothing
                pass

        def traced(fn, *args, trace=opens_one, step=step):
            sys.settrace(act_at(step, trace))
            try:
                return fn(*args)
            finally:
                sys.settrace(None)

        with pytest.raises(SystemExit), TaskGroup(1) as group:
            asking = traced(taken, group)
            try:
                terminate()
            finally:
                traced(asking.close)
                assert signal.getsignal(signal.SIGTERM) is sigterm

        if not met:
            break


def test_handler_that_was_not_set_by_python_is_replaced_by_the_default(sigterm):
    """
    `signal.getsignal` says `None` of it, and no Python code can restore it.
    """
    with TaskGroup(1) as group, fastpool.cancel_on_signals(group, signal.SIGTERM):
        _guard._guard.before[signal.SIGTERM] = None
    left = signal.signal(signal.SIGTERM, sigterm)

    assert left is signal.SIG_DFL


def test_ctrl_c_can_be_taken_from_a_foreign_handler():
    """
    For one group, and given back to it.
    """
    foreign = []
    before = signal.signal(signal.SIGINT, lambda *signal: foreign.append(signal))
    mine = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt), TaskGroup(1) as group:
            fastpool.cancel_on_signals(group, signal.SIGINT)
            interrupt()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)

    assert not foreign


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_heard_until_all_who_asked_for_it_have_given_it_back(signum, sigterm):
    """
    A group may ask twice: a library in its body, say, for itself.
    """
    before = signal.getsignal(signum)
    with TaskGroup(1) as group:
        first, second = (fastpool.cancel_on_signals(group, signum) for _ in range(2))
        first.close()
        first.close()
        still = signal.getsignal(signum)
        second.close()
        after = signal.getsignal(signum)

    assert still not in (before, None)
    assert (after is before) == (signum == signal.SIGTERM)  # it hears Ctrl-C by itself
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(
    ("signum", "again"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)]
)
def test_handler_that_calls_the_one_it_found_in_a_block_calls_what_was_before(
    signum, again, sigterm
):
    """
    It was put in place inside, calls ours then, and is still there after the block.
    """

    def foreign(number, frame):
        heard.append(number)
        raise Stop

    def chained(number, frame):
        heard.append("chained")
        found(number, frame)

    heard = []
    before = signal.signal(signum, foreign)
    try:
        with TaskGroup(1) as group:
            fastpool.cancel_on_signals(group, signum)
            found = signal.signal(signum, chained)
        if again:  # it is what is found the next time, and is given back
            with TaskGroup(1) as group, fastpool.cancel_on_signals(group, signum):
                pass
        with pytest.raises(KeyboardInterrupt if again else Stop):
            signal.raise_signal(signum)
    finally:
        signal.signal(signum, before)

    assert heard == ["chained"] if again else ["chained", signum]


def test_handler_that_calls_the_one_it_found_ends_the_program_where_nobody_else_handles():
    """
    As the system does by itself.
    """
    program = """
import signal, fastpool
with fastpool.TaskGroup() as group:
    fastpool.cancel_on_signals(group, signal.SIGTERM)
    found = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *arguments: found(*arguments))
signal.raise_signal(signal.SIGTERM)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60)

    assert ended.returncode == -signal.SIGTERM


def test_group_must_be_open_and_the_signal_one_that_can_be_handled(sigterm):
    """
    The message says what is wrong, and no handler is left behind.
    """
    group = TaskGroup(1, name="jobs")
    with pytest.raises(RuntimeError, match="group 'jobs' is not open; call cancel_on_signals"):
        fastpool.cancel_on_signals(group, signal.SIGTERM)
    with pytest.raises(TypeError, match="wants a group first, not 15"):
        fastpool.cancel_on_signals(15)
    with group:
        with pytest.raises(ValueError, match=r"wants a signal, as signal\.SIGTERM"):
            fastpool.cancel_on_signals(group)
        with pytest.raises(ValueError, match=r"cannot handle signal .*SIGKILL"):
            fastpool.cancel_on_signals(group, signal.SIGTERM, signal.SIGKILL)
        with pytest.raises(ValueError, match="cannot handle signal 1000"):
            fastpool.cancel_on_signals(group, 1000)
        wrong = in_thread(fastpool.cancel_on_signals, group, signal.SIGTERM)

    assert "must be called in the main thread" in str(wrong)


# --- Real signals ---------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, threading, time
import fastpool
from fastpool import TaskGroup, cancellable

@cancellable
def sleeps(token):
    token.sleep(60)

def stubborn():
    print("ready", flush=True)
    time.sleep(60)

def submitting(group):
    print("ready", flush=True)
    while True:
        group.submit(abs, 1)

def mapping(group):
    print("ready", flush=True)
    group.map(abs, iter(int, 1))

def waiting(group):
    task = group.submit(sleeps)
    print("ready", flush=True)
    task.result()

def sleeping(group):
    print("ready", flush=True)
    fastpool.sleep(60)

def computing(group):
    print("ready", flush=True)
    while True:
        pass

def leaving(group):
    group.submit(sleeps)
    print("ready", flush=True)

def twice(group):
    group.token.on_cancel(lambda: print("told", flush=True))
    group.submit(stubborn)

def serving(group):
    fastpool.cancel_on_signals(group, signal.SIGTERM)
    group.submit(sleeps)
    print("ready", flush=True)
    group.wait()

with TaskGroup(2, name="jobs") as group:
    {body}(group)
"""


@pytest.mark.parametrize(
    "body",
    ["submitting", "mapping", "waiting", "sleeping", "computing", "leaving", "twice"],
)
def test_ctrl_c_ends_a_program(body):
    """
    With Python's own traceback, and the exit code of the signal.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        if body == "twice":
            assert child.stdout.readline() == "told\n"
            child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()

    assert child.returncode == -signal.SIGINT
    assert errors.startswith("Traceback")
    assert ("left behind in group 'jobs': task 'stubborn'" in errors) is (body == "twice")
    assert "Exception ignored" not in errors


def test_service_stops_in_good_order_when_it_is_told_to():
    """
    The exit code is that of the signal, and nothing is printed.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.format(body="serving")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()

    assert (child.returncode, errors) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize(
    "fn", [_elsewhere.sit_in, _waiting._sleep_until_done, Run._wait_for_room, Source._wait_for_room]
)
def test_what_is_raised_at_a_jump_backwards_does_not_pass_by_what_cleans_up(fn):
    """
    CPython 3.12 to 3.14 leave the jump at the end of some loops out of the `try` around them.
    """
    code = dis.Bytecode(fn)
    covered = {
        offset for entry in code.exception_entries for offset in range(entry.start, entry.end)
    }
    jumps = [step.offset for step in code if step.opname.startswith("JUMP_BACKWARD")]

    # A loop before the `try`, of which all is outside, has nothing to clean up.
    assert not [at for at in jumps if at not in covered and at > min(covered)]


# --- Room in a bounded queue ----------------------------------------------------------------------


def alarmed(monkeypatch, instead):
    """A real SIGALRM, whose handler raises, as a method of a bounded queue has returned."""

    def stop(signum, frame):
        raise Stop

    method = getattr(BoundedQueue, instead)
    rung = []

    def rings(queue, *args):
        found = method(queue, *args)
        if found and queue.waiting and threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(BoundedQueue, instead, method)
            rung.append(found)
            signal.raise_signal(signal.SIGALRM)
        return found

    monkeypatch.setattr(BoundedQueue, instead, rings)
    before = signal.signal(signal.SIGALRM, stop)
    return rung, lambda: signal.signal(signal.SIGALRM, before)


class Holding:
    """A task that occupies the one worker of a group."""

    def __init__(self, group):
        self.started, self.go = threading.Event(), threading.Event()
        thread, outcome = start(group.submit, self.run)
        assert self.started.wait(60), "no worker came for it"
        thread.join(60)
        assert outcome

    def run(self):
        self.started.set()
        assert self.go.wait(60)


def has_its_room(group, bound):
    """Whether as many calls find room as the bound says; and whether all that wait are run."""
    assert in_thread(lambda: group.submit(abs, -1).result(30)) == 1  # what is queued is run by then
    queue = group._run.bounded
    until(lambda: not queue._lent)  # the worker has found the queue empty
    nothing_taken = not (queue or queue.promised or queue.waiting)
    holding = Holding(group)
    tasks = [in_thread(group.submit, abs, -1) for _ in range(bound)]
    late, outcome = start(group.submit, abs, -1)
    until(lambda: outcome or is_asleep(late))
    holding.go.set()
    late.join(60)
    assert outcome, "nobody has told it of room"
    return nothing_taken and [task.result(60) for task in (*tasks, *outcome)] == [1] * (bound + 1)


def test_alarm_that_ends_a_submit_as_it_gets_its_room_takes_none_along(watched, monkeypatch):
    """
    It has waited in line. A body that handles the alarm finds as much room as before.
    """
    main = threading.main_thread()
    with TaskGroup(1, max_queued=1) as group:
        holding = Holding(group)
        group.submit(abs, -1)
        releases, outcome = start(lambda: (until(lambda: main.ident in sleeping), holding.go.set()))
        rung, restore = alarmed(monkeypatch, "take_room")
        try:
            with pytest.raises(Stop):
                group.submit(abs, -2)
        finally:
            restore()
        releases.join(60)

        assert rung == [1]
        assert outcome
        assert has_its_room(group, 1)


def read_or_not():
    """What is raised while an input is read is the input's, and ends the group."""
    return contextlib.suppress(Stop)


def hand_over_to(name):
    """What hands some calls over to a group, each call by that way of its."""

    def submit(group):
        group.submit(abs, -1)

    def map_(group):
        group.map(abs, [-1, -2, -3])

    def map_of_a_generator(group):
        group.map(abs, (-number for number in range(3)))

    def starmap(group):
        group.starmap(abs, [(-1,), (-2,), (-3,)])

    def imap(group):
        assert list(group.imap(abs, [-1, -2, -3], window=2)) == [1, 2, 3]

    def imap_of_a_generator(group):
        assert list(group.imap(abs, (-number for number in range(3)), window=2)) == [0, 1, 2]

    def imap_unordered(group):
        assert sorted(group.imap_unordered(abs, [-1, -2, -3], window=3)) == [1, 2, 3]

    return locals()[name]


HANDED_OVER = (
    "submit",
    "map_",
    "map_of_a_generator",
    "starmap",
    "imap",
    "imap_of_a_generator",
    "imap_unordered",
)


@pytest.mark.parametrize(("bound", "observers"), [(1, ()), (2, [lambda event: None])])
@pytest.mark.parametrize("name", HANDED_OVER)
def test_room_is_what_it_was_wherever_a_foreign_handler_has_raised(name, bound, observers, watched):
    """
    A body that goes on fills the queue to its bound, and it is emptied.
    """
    hand_over = hand_over_to(name)
    for point in itertools.count():
        with read_or_not(), TaskGroup(1, max_queued=bound, observers=observers) as group:
            torn = tear(point, lambda group=group: hand_over(group))

            assert group.failures or has_its_room(group, bound), point
        if not torn:
            break

    assert point > 10


@pytest.mark.parametrize("name", ["submit", "map_", "imap", "imap_unordered"])
def test_line_for_room_is_what_it_was_wherever_a_foreign_handler_has_raised(name, watched):
    """
    Who waits in it when that happens, before the body and behind it, gets room all the same.
    """
    hand_over = hand_over_to(name)
    for point in itertools.count():
        with read_or_not(), TaskGroup(1, max_queued=1) as group:
            holding = Holding(group)
            group.submit(abs, -1)
            first, outcome = start(group.submit, abs, -1)
            until(lambda first=first: is_asleep(first))
            ended = []

            def release(holding=holding, ended=ended):
                until(lambda: ended or len(group._run.bounded.waiting) > 1)
                holding.go.set()

            releases, released = start(release)
            torn = tear(point, lambda group=group: hand_over(group))
            ended.append(True)
            for thread in (first, releases):
                thread.join(60)

            assert outcome, f"{point}: it waits for ever"
            assert released == [None]
            assert group.failures or has_its_room(group, 1), point
        if not torn:
            break

    assert point > 20


@pytest.mark.parametrize("mapped", [False, True])
def test_room_that_a_cancel_makes_is_told_wherever_a_foreign_handler_has_raised(mapped, watched):
    """
    A call that is out of the queue, or is known never to run, makes room though its cancel is torn.
    """
    for point in itertools.count():
        with TaskGroup(1, max_queued=1) as group:
            holding = Holding(group)
            task = group.map(abs, [-1]).tasks[0] if mapped else group.submit(abs, -1)
            late, outcome = start(group.submit, abs, -2)
            until(lambda late=late: is_asleep(late))
            torn = tear(point, task.cancel)
            queue = group._run.bounded
            if queue._lent if mapped else task not in queue.copy():
                until(lambda outcome=outcome: outcome)
            holding.go.set()
            late.join(60)

            assert outcome, f"{point}: it waits for ever"
            assert has_its_room(group, 1), point
        if not torn:
            break

    assert task.cancelled()
    assert point > 10


def test_cancel_is_told_wherever_a_foreign_handler_has_raised(watched):
    """
    Who waits for the task wakes, by the cancel or by the worker that comes to it.
    """
    for point in itertools.count():
        with TaskGroup(1) as group:
            holding = Holding(group)
            task = group.submit(abs, -1)
            waiter, outcome = start(task.wait)
            until(lambda waiter=waiter: is_asleep(waiter))
            torn = tear(point, task.cancel)
            holding.go.set()
            waiter.join(20)

            assert outcome == [True], point
        if not torn:
            break

    assert task.cancelled()
    assert point > 10


def test_block_is_left_though_a_foreign_handler_has_torn_the_end_of_a_submit(monkeypatch, watched):
    """
    Another thread leaves it, and has waited for the end of that.
    """
    call, close, wake = Run._call, Run.close, Run.wake_leavers
    leaves, refused, raised = (threading.Event() for _ in range(3))

    def call_and_wait(run):
        call(run)
        leaves.set()
        assert refused.wait(60)
        until(lambda: is_asleep(leaver))

    def close_and_note(run):
        closed = close(run)
        if not closed and run.at_rest():
            refused.set()
        return closed

    def raise_once(run):
        if threading.current_thread() is threading.main_thread() and not raised.is_set():
            raised.set()
            raise TimeoutError("what an alarm's handler raises")
        wake(run)

    def leave():
        with TaskGroup(1) as group:
            groups.append(group)
            assert leaves.wait(60)

    groups = []
    leaver, outcome = start(leave)
    until(lambda: groups)
    monkeypatch.setattr(Run, "_call", call_and_wait)
    monkeypatch.setattr(Run, "close", close_and_note)
    monkeypatch.setattr(Run, "wake_leavers", raise_once)
    with pytest.raises(TimeoutError, match="alarm"):
        groups[0].submit(int)
    leaver.join(20)
    left = list(outcome)
    wake(groups[0]._run)

    assert left == [None]


def test_worker_whose_recall_a_foreign_handler_has_torn_is_not_lost(monkeypatch):
    """
    It was called, and taken back as the block is left; it serves the next group.
    """
    begin, passed = Run.begin, Run.passed
    come, goes_on, raised = (threading.Event() for _ in range(3))
    lanes = []

    def begin_late(run, lane):
        lanes.append(lane)
        come.set()
        assert goes_on.wait(60)
        return begin(run, lane)

    def raise_once(run, lane):
        if threading.current_thread() is threading.main_thread() and not raised.is_set():
            raised.set()
            raise TimeoutError("what an alarm's handler raises")
        passed(run, lane)

    monkeypatch.setattr(Run, "begin", begin_late)
    monkeypatch.setattr(Run, "passed", raise_once)
    with pytest.raises(TimeoutError, match="alarm"), TaskGroup(1) as group:
        group.submit(int)
        assert come.wait(60)
        group.cancel()
    goes_on.set()
    pool = lanes[0].pool

    assert set(pool.reserve) == set(pool.lanes)


def test_submit_by_a_handler_takes_no_room_from_the_one_that_it_interrupts(watched):
    """
    Nor does it wait for what that one has taken, which goes on only after it.
    """
    for point in itertools.count():
        calls = itertools.count()
        tasks = []
        with TaskGroup(1, max_queued=1) as group:

            def submits(group=group, calls=calls, tasks=tasks, point=point):
                def profile(frame, event, argument):
                    if group._run.bounded.promised and next(calls) == point:
                        sys.setprofile(None)
                        tasks.append(group.submit(abs, -1))

                sys.setprofile(profile)
                try:
                    tasks.append(group.submit(abs, -2))
                finally:
                    sys.setprofile(None)

            assert in_thread(submits) is None
            assert has_its_room(group, 1), point
        if len(tasks) == 1:
            break

    assert point > 5


@pytest.mark.parametrize("options", [{}, {"max_queued": 1}])
def test_call_whose_submit_a_foreign_handler_has_ended_is_not_waited_for_in_vain(options):
    """
    It is queued, perhaps, and nobody has called a worker for it: who waits for the group does.
    """
    for point in itertools.count():
        with TaskGroup(1, **options) as group:
            torn = tear(point, lambda group=group: group.submit(abs, -1))

            assert in_thread(group.wait, 30) is None
        if not torn:
            break

    assert point > 5


@pytest.mark.parametrize("observers", [(), [lambda event: None]])
@pytest.mark.parametrize("name", HANDED_OVER[1:])
def test_calls_that_a_foreign_handler_kept_from_the_queue_are_not_waited_for(
    name, observers, watched
):
    """
    Though others of the same `map` are queued.
    """
    hand_over = hand_over_to(name)
    for point in itertools.count():
        with read_or_not(), TaskGroup(1, observers=observers) as group:
            holding = Holding(group)
            if name.startswith("imap"):
                holding.go.set()  # it waits for values
            torn = tear(point, lambda group=group: hand_over(group))
            waiter, outcome = start(group.wait, 30)
            if not holding.go.is_set():
                until(lambda waiter=waiter: is_asleep(waiter))
                holding.go.set()
            waiter.join(60)

            assert outcome == [None] or group.failures, point
        if not torn:
            break

    assert point > 10


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("made", ["new", "parked", "idle"])
def test_handler_that_submits_waits_for_no_room_that_its_own_thread_is_about_to_make(made, limit):
    """
    It has interrupted a submit of its thread, which has filled the queue and calls a worker.
    """

    def fill():
        for point in itertools.count():
            if made == "new":
                fastpool.shutdown()
            else:
                with TaskGroup(limit) as before:
                    before.submit(abs, -1)
            with TaskGroup(limit, max_queued=1) as group:
                if made == "idle":
                    group.submit(abs, -1).wait()
                    until(group._run.at_rest)
                told = []

                def submit(told=told, group=group):
                    told.append(group.submit(abs, -2))

                sys.setprofile(doing_at(point, submit))
                try:
                    task = group.submit(abs, -1)
                finally:
                    sys.setprofile(None)

            assert [task.result(), *(of.result() for of in told)] == [1, 2][: 1 + len(told)]
            if not told:
                break
        return point

    assert in_thread(fill) > 10


def test_bound_is_kept_wherever_a_foreign_handler_has_ended_a_map():
    """
    What it kept from the queue takes up no room there, nor does it make any.
    """
    for point in itertools.count():
        with read_or_not(), TaskGroup(1, max_queued=3) as group:
            holding = Holding(group)
            torn = tear(point, lambda group=group: group.map(abs, [-1, -2, -3]))
            producer, _ = start(lambda group=group: [group.submit(abs, -1) for _ in range(9)])
            until(lambda group=group: group.failures or group._run.bounded.waiting)
            queued = len(group._run.queue)
            holding.go.set()
            producer.join(60)

        assert group.failures or queued == 3, point
        if not torn:
            break

    assert point > 10


def test_handler_that_submits_waits_for_no_room_that_its_own_thread_stands_in_line_for():
    """
    It is given to who came first, and that is the call that was interrupted.
    """
    told = []
    before = signal.signal(signal.SIGALRM, lambda *_: told.append(group.submit(abs, -3)))

    def ring():
        until(lambda: group._run.bounded.waiting)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        until(lambda: told)
        holding.go.set()

    try:
        with TaskGroup(1, max_queued=1) as group:
            holding = Holding(group)
            group.submit(abs, -1)
            rings, rung = start(ring)
            task = group.submit(abs, -2)
            rings.join(60)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert rung == [None]
    assert [task.result(), *(of.result() for of in told)] == [2, 3]


# --- At every point -------------------------------------------------------------------------------


def tried(scenario, *options):
    """What `points` says when it tries some points of a scenario."""
    ended = subprocess.run(
        [sys.executable, points.__file__, "--scenario", scenario, *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert re.match(rf"{scenario}: 0 bad of \d\d", ended.stdout), ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came with Python 3.12")
@pytest.mark.parametrize("scenario", points.SCENARIOS)
def test_interrupt_at_any_point_tears_nothing(scenario):
    """
    It is raised; nothing hangs, escapes or leaks. Here at some of the points.
    """
    tried(scenario, "--every", "17")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came with Python 3.12")
@pytest.mark.parametrize("scenario", points.SCENARIOS)
def test_what_a_foreign_handler_raises_at_any_point_tears_nothing(scenario):
    """
    It leaves, and the same holds.
    """
    tried(scenario, "--what", "told", "--every", "23")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came with Python 3.12")
@pytest.mark.parametrize(
    "what",
    [
        "sigint+3",
        "token-cancel",
        "group-cancel",
        "unregister",
        "token-cancel-del",
        "group-cancel-del",
        "unregister-del",
        "submit-del",
        "block-del",
    ],
)
def test_whatever_happens_at_any_point_hangs_nothing(what):
    """
    A second interrupt soon after; a cancel or unregister by a signal handler or a finalizer; a
    finalizer that submits or opens a group.
    """
    tried("nested", "--what", what, "--every", "41")


@pytest.mark.parametrize("scenario", points.SCENARIOS)
def test_interrupt_at_any_moment_tears_nothing(scenario):
    """
    The same from outside, whenever it comes.
    """
    tried(scenario, "--moments", "12")


# --- Further off ----------------------------------------------------------------------------------


class Collecting:
    """A policy under which no failure of a task cancels, and a judge that says what leaves."""

    def start(self):
        return self

    def outcome(self, task, error):
        return False

    def end(self, failures):
        return None


def test_task_that_ends_while_others_are_abandoned_has_its_own_end():
    """
    It is decided task by task: one that was not left behind is done, with its value.
    """
    ends = {name: threading.Event() for name in ("first", "second")}

    def observer(event):
        if event.name == "task_abandoned" and event.task.name == "first":
            ends["second"].set()
            until(lambda: ended or second.done())

    ended = []
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(StuckTaskError),
        TaskGroup(2, grace=0.01, on_stuck="abandon", observers=[observer]) as group,
    ):
        first = group.with_options(name="first").submit(ends["first"].wait, 60)
        second = group.with_options(name="second").submit(ends["second"].wait, 60)
        until(lambda: first.running() and second.running())
        group.cancel()
    ends["first"].set()

    assert first.cancelled()
    assert second.wait(timeout=60)


def test_signals_are_counted_by_group(sigterm):
    """
    A group that heard none of those before is not left at once.
    """
    with TaskGroup(1) as outer:
        with pytest.raises(SystemExit), TaskGroup(1) as inner:
            fastpool.cancel_on_signals(inner, signal.SIGTERM)
            for _ in range(2):
                with pytest.raises(SystemExit):
                    terminate()
            terminate()
        numbers = outer.map(abs, range(5))

    assert numbers.results() == list(range(5))


def test_group_that_cleans_up_after_two_interrupts_does_its_work():
    """
    Opened after them, under a shield, it has heard nothing.
    """
    with pytest.raises(KeyboardInterrupt), TaskGroup(1) as outer:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupt()
        with fastpool.shield(), TaskGroup(2) as cleanup:
            cleaned = cleanup.map(abs, [-1, -2])
        assert cleaned.results() == [1, 2]
        interrupt()

    assert outer.token.cancelled()


@pytest.mark.parametrize("kind", ["sleep", "group"])
def test_held_interrupt_is_not_raised_where_it_would_be_swallowed(kind, unraised):
    """
    A callback that sleeps, or has a group of its own, leaves it to the body.
    """

    def callback():
        interrupt()
        if kind == "sleep":
            CancelToken().sleep(0.001)
        else:
            with TaskGroup(1) as group:
                group.submit(abs, 1)

    with pytest.raises(KeyboardInterrupt), TaskGroup(1) as group:
        token = CancelToken()
        token.on_cancel(callback)
        token.cancel()
        fastpool.checkpoint()

    assert group.token.cancelled()
    assert not any(isinstance(error, KeyboardInterrupt) for error in unraised)


def test_interrupt_in_a_generator_that_is_dropped_reaches_the_group_around():
    """
    What leaves a generator as it is dropped is lost, so the group around raises it.
    """

    gone_on = []

    def pages():
        with TaskGroup(1, observers=[observer]):
            yield 1
        gone_on.append("after its block")

    def observer(event):
        if event.name == "group_closed":
            interrupt()

    with pytest.raises(KeyboardInterrupt), TaskGroup(1) as outer:
        for _ in pages():
            break

    assert gone_on == []
    assert [type(failure.exception) for failure in outer.failures] == [KeyboardInterrupt]


@pytest.mark.parametrize(
    "where",
    [
        "fastpool._taskgroup.Vigil",
        "fastpool._run.Run.tell_cancelled",
        "fastpool._token.CancelToken._seal",
    ],
)
def test_foreign_handler_that_raises_between_our_lines_is_not_lost(where, monkeypatch):
    """
    It counts as the body's: the group is left, and it leaves.
    """

    def stop(signum, frame):
        sys.exit("told to stop")

    def interrupted(*arguments):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    monkeypatch.setattr(where, interrupted)
    try:
        with pytest.raises(SystemExit, match="told to stop"), TaskGroup(1) as group:
            group.submit(abs, 1)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert len(group.failures) == 1
    assert fastpool.dump() == ()


def test_failure_is_not_lost_where_a_handler_raises_between_our_lines(monkeypatch):
    """
    What the group knew before stays: it comes first.
    """
    error = ValueError("bad header")

    def stop(signum, frame):
        raise OSError("told to stop")

    def interrupted(*arguments):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    monkeypatch.setattr("fastpool._run.Run.tell_cancelled", interrupted)
    try:
        with pytest.raises(ValueError, match="bad header") as caught, TaskGroup(1) as group:
            raise error
    finally:
        signal.signal(signal.SIGTERM, before)

    assert caught.value is error
    assert [type(failure.exception) for failure in group.failures] == [ValueError, OSError]


def test_what_a_handler_raises_at_the_last_lines_leaves(monkeypatch):
    """
    Nothing is left that could still be told of it, and the group has ended.
    """

    def interrupted(*arguments):
        monkeypatch.undo()
        raise Stop

    monkeypatch.setattr("fastpool._guard.let_go", interrupted)
    with pytest.raises(Stop), TaskGroup(1) as group:
        group.submit(abs, 1)

    assert group._run.over
    assert fastpool.dump() == ()


def test_block_is_left_where_it_is_interrupted_as_it_is_taken_off_the_list(monkeypatch):
    """
    Before that is done: with no room left on the stack, say. The group is open no more.
    """

    class Full(dict):
        def pop(self, *arguments):
            monkeypatch.undo()
            raise RecursionError

    full = Full(fastpool._taskgroup._open_runs)
    with pytest.raises(RecursionError), TaskGroup(1) as group:
        monkeypatch.setattr("fastpool._taskgroup._open_runs", full)

    assert group._run.over
    assert group._run not in fastpool._taskgroup._open_runs


@pytest.mark.parametrize("kind", [Stop, RecursionError])
def test_block_that_cannot_be_left_is_given_up(kind, monkeypatch):
    """
    What stands in the way leaves in the end, where it does so again and again; the signal is given
    back, and the stack may grow as far as before. With room once, where it was at its end.
    """
    limit = sys.getrecursionlimit()
    limits, errors = [], []

    def stands(*arguments):
        limits.append(sys.getrecursionlimit())
        errors.append(kind())
        raise errors[-1]

    group = TaskGroup(1)
    with monkeypatch.context() as patch:
        patch.setattr("fastpool._taskgroup.TRIES", 3)
        patch.setattr("fastpool._scope.leave", stands)
        with pytest.raises(kind) as caught, group:
            pass
    given_back = signal.getsignal(signal.SIGINT)
    after = sys.getrecursionlimit()
    group.__exit__(None, None, None)

    assert caught.value is errors[-1]
    assert given_back is signal.default_int_handler
    assert after == limit
    more = kind is RecursionError
    assert [now > limit for now in limits] == [False, more, more]
    assert limits[1] == limits[2]


def test_what_a_handler_raises_as_a_thread_is_started_leaves_the_group(monkeypatch):
    """
    It is held back until the thread has started, and the main thread sleeps meanwhile.
    """

    class Stop(Exception):
        pass

    def stop(signum, frame):
        told.set()
        raise Stop

    def main_sleeps():
        seen = look(threading.main_thread().native_id)
        time.sleep(0.002)
        return seen is not None and look(threading.main_thread().native_id) == seen

    def interrupted(thread):
        start(thread)
        if isinstance(thread, DummyProcess):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            told.wait(timeout=60)
            until(main_sleeps)

    fastpool.shutdown()
    told, start = threading.Event(), threading.Thread.start
    before = signal.signal(signal.SIGTERM, stop)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    try:
        with pytest.raises(Stop), TaskGroup(1) as group:
            submitted = group.submit(abs, -404)
            group.wait(timeout=60)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert submitted.done()


def test_what_a_handler_raises_before_a_thread_is_started_leaves_the_submit(monkeypatch):
    """
    Nobody waits for a thread that nobody starts; the next submit starts one.
    """

    class Stop(Exception):
        pass

    def interrupted(thread):
        monkeypatch.undo()
        raise Stop

    fastpool.shutdown()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with TaskGroup(1) as group:
        with pytest.raises(Stop):
            group.submit(abs, -404)
        after = group.submit(abs, -405)

    assert after.result() == 405


def test_wait_of_another_thread_ends_with_an_abandoned_group():
    """
    It does not wait for what was left behind.
    """
    release = threading.Event()
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0.01, on_stuck="abandon") as group,
    ):
        until(group.submit(release.wait, 60).running)
        thread, outcome = start(group.wait)
        until(lambda: group._run.fences)
        group.cancel()
    thread.join(60)
    release.set()

    assert outcome == [None]


def test_wait_that_begins_as_its_group_is_abandoned_ends():
    """
    What was left behind just before the wait was there to be told of it is not waited for.
    """
    begins, gone, release = (threading.Event() for _ in range(3))

    class Fences(dict):
        def __setitem__(self, gate, pending):
            super().__setitem__(gate, pending)
            begins.set()
            gone.wait(60)

    def observer(event):
        if event.name == "task_abandoned":
            gone.set()
            until(lambda: outcome or any(fence.lanes for fence in group._run.fences.values()))

    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0.01, on_stuck="abandon", observers=[observer]) as group,
    ):
        until(group.submit(release.wait, 60).running)
        group._run.fences = Fences()
        thread, outcome = start(group.wait)
        begins.wait(60)
        group.cancel()
    thread.join(60)
    release.set()

    assert outcome == [None]


@pytest.mark.parametrize("where", ["start", "end", "observers", "each"])
def test_interrupt_in_other_code_of_the_user_is_let_through(where):
    """
    A policy, a judge, the iterables that are handed in.
    """
    reached = []

    def reach():
        interrupt()
        reached.append(where)

    class Policy(Collecting):
        def start(self):
            if where == "start":
                reach()
            return self

        def end(self, failures):
            if where == "end":
                reach()

    class Items:
        def __iter__(self):
            reach()
            return iter(())

    with pytest.raises(KeyboardInterrupt), TaskGroup(1):
        if where == "each":
            CancelToken().each(Items())
        else:
            observers = Items() if where == "observers" else ()
            with TaskGroup(1, policy=Policy(), observers=observers):
                pass

    assert not reached


def test_group_of_another_thread_is_not_for_signals(sigterm):
    """
    What is raised would be raised in the main thread, where its body is not.
    """
    with TaskGroup(1) as keeper:
        opened, release = threading.Event(), threading.Event()
        inner = TaskGroup(1, name="elsewhere")

        def serve():
            with inner:
                opened.set()
                release.wait(60)

        keeper.submit(serve)
        assert opened.wait(60)
        with pytest.raises(ValueError, match="group 'elsewhere' was opened in 'fastpool-"):
            fastpool.cancel_on_signals(inner, signal.SIGTERM)
        release.set()


def test_second_signal_leaves_a_group_inside_at_once():
    """
    One that did not ask for it, and what it leaves behind is named where no traceback does it.
    """
    release = threading.Event()

    def stubborn():
        for count in (0, 1):
            until(lambda count=count: len(inner.failures) == count)
            os.kill(os.getpid(), signal.SIGTERM)
        release.wait(60)

    with (
        pytest.warns(RuntimeWarning, match="left behind in group 'inner': task 'stubborn'"),
        pytest.raises(SystemExit) as caught,
        TaskGroup(1) as outer,
    ):
        fastpool.cancel_on_signals(outer, signal.SIGTERM)
        with TaskGroup(1, name="inner") as inner:
            inner.submit(stubborn)
    release.set()

    assert caught.value.code == 128 + signal.SIGTERM
    assert any("left behind in group 'inner'" in note for note in caught.value.__notes__)


def test_second_signal_tells_what_runs_in_a_group_inside():
    """
    Though it is shielded from the one that asked, and its own body has handled both.
    """
    begun, ended = threading.Event(), threading.Event()
    heard = []

    def runs_on():
        begun.set()
        heard.append(current_token().wait(timeout=30))
        ended.set()

    with TaskGroup(1) as outer:
        fastpool.cancel_on_signals(outer, signal.SIGTERM)
        with shield(), pytest.raises(StuckTaskError), TaskGroup(1) as inner:
            inner.submit(runs_on)
            assert begun.wait(timeout=60)
            for _ in range(2):
                with contextlib.suppress(SystemExit):
                    signal.raise_signal(signal.SIGTERM)
        assert ended.wait(timeout=60)

    assert heard == [True]


def printed():
    """What is open now, as it is printed."""
    file = io.StringIO()
    fastpool.print_dump(file)
    return file.getvalue()


def test_what_is_left_behind_is_named_with_what_it_waits_for():
    """
    A task that waits for a group of its own, say.
    """
    begun, release, reported = (threading.Event() for _ in range(3))

    def holds():
        begun.set()
        release.wait(60)

    def waits():
        with TaskGroup(1, name="inner") as inner:
            inner.submit(holds)

    def observer(event):
        if event.name == "task_stuck":
            reported.set()

    def interrupt_again():
        reported.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with (
        pytest.warns(RuntimeWarning, match="A second Ctrl-C leaves the block without it"),
        pytest.raises(KeyboardInterrupt) as caught,
        TaskGroup(1, name="outer", grace=0.01, observers=[observer]) as group,
    ):
        start(interrupt_again)
        group.submit(waits)
        begun.wait(60)
        until(lambda: "group 'inner': leaving" in printed())
        interrupt()
    release.set()

    (note,) = caught.value.__notes__
    assert note.startswith("left behind in group 'outer': task 'waits'")
    assert note.endswith(", waiting for task 'holds' of group 'inner'")


def test_second_interrupt_ends_a_call_that_would_swallow_the_first(unraised):
    """
    An observer that blocks, or a callback, holds nobody for ever.
    """
    seen = []

    def block(event=None):
        if event is None or event.name == "group_opened":
            interrupt()  # held back
            seen.append("once")
            interrupt()
            seen.append("twice")

    with pytest.raises(KeyboardInterrupt), TaskGroup(observers=[block]):
        pass
    with pytest.raises(KeyboardInterrupt), TaskGroup() as group:
        group.token.on_cancel(block)
        group.cancel()
        fastpool.checkpoint()

    assert seen == ["once", "once"]
    assert [type(error) for error in unraised] == [KeyboardInterrupt] * 2


@pytest.mark.parametrize("breaks", [False, True])
def test_interrupt_that_meets_the_judge_at_the_end_is_recorded(breaks):
    """
    It leaves, whatever the judge raised before.
    """

    class Policy(Collecting):
        def outcome(self, task, error):
            if breaks:
                raise ValueError("broken")
            return False

        def end(self, failures):
            interrupt()

    with pytest.raises(KeyboardInterrupt) as caught, TaskGroup(1, policy=Policy()) as group:
        group.submit(abs, 1)

    assert [failure.exception for failure in group.failures] == [caught.value]
