"""
Waiting for locks, events, conditions, futures, threads and processes: what ends it.
"""

import asyncio
import concurrent.futures
import gc
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
import rounds
from blocked import cancel_while_blocked, descriptors, ended, under
from interrupted import in_child
from staging import start, until

import fastpool.blocking
from fastpool import Cancelled, CancelToken, TaskGroup, use_token

blocking = fastpool.blocking
pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")
ROUNDS = int(os.environ.get("FASTPOOL_ROUNDS", "1500"))


def held(lock):
    """The lock, held by a thread that has ended or, if it has an owner, waits for `release`."""
    release = threading.Event()
    taken = threading.Event()

    def hold():
        with lock:
            taken.set()
            release.wait(timeout=60)

    thread, _ = start(hold)
    assert taken.wait(timeout=60)
    return release, thread


def cancelled_in(call, asleep):
    """What comes of a call whose token is set when it is known to be asleep."""
    token = CancelToken()
    thread, outcome = under(token, call)
    until(asleep)
    token.cancel("enough")
    return ended(thread, outcome)


# --- Locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [threading.Semaphore, threading.BoundedSemaphore])
def test_cancel_wakes_who_waits_for_a_semaphore(kind):
    """
    Nothing was acquired; a release wakes as it does without a token.
    """
    semaphore = kind(1)
    semaphore.acquire()
    waiters = semaphore._cond._waiters

    error = cancelled_in(lambda: blocking.acquire(semaphore), lambda: waiters)
    assert type(error) is Cancelled
    assert semaphore._value == 0

    waiting = start(blocking.acquire, semaphore)
    until(lambda: waiters)
    semaphore.release()
    assert ended(*waiting) is True
    assert blocking.acquire(semaphore, 0) is False
    assert blocking.acquire(semaphore, 0.01) is False


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        threading.RLock,
        threading.Condition,
        multiprocessing.get_context("spawn").Lock,
    ],
    ids=["Lock", "RLock", "Condition", "Lock of multiprocessing"],
)
def test_cancel_is_heard_while_a_lock_is_held(make):
    """
    Nothing was acquired; a lock that becomes free is acquired by the thread that asked.
    """
    lock = make()
    release, holder = held(lock)

    error = cancel_while_blocked(blocking.acquire, lock, among=None)
    assert type(error) is Cancelled
    assert error.reason == "enough"
    assert blocking.acquire(lock, 0) is False
    assert blocking.acquire(lock, 0.01) is False

    def acquires_and_releases():
        got = blocking.acquire(lock)
        lock.release()
        return got

    waiting = start(acquires_and_releases)
    release.set()
    holder.join(timeout=60)
    assert ended(*waiting) is True
    assert blocking.acquire(lock) is True
    lock.release()


def test_release_that_meets_a_thread_which_leaves_goes_to_the_next():
    """
    Two wait for a semaphore; the first is cancelled, and held at its lock during the release.
    """
    semaphore = threading.Semaphore(0)
    token = CancelToken()
    first = under(token, blocking.acquire, semaphore)
    until(lambda: len(semaphore._cond._waiters) == 1)
    second = start(semaphore.acquire)
    until(lambda: len(semaphore._cond._waiters) == 2)

    with semaphore._cond:
        token.cancel()
        semaphore._value += 1
        semaphore._cond.notify()

    assert type(ended(*first)) is Cancelled
    assert ended(*second) is True


class LockOfAFile:
    """As that of the package filelock; others have a pause as their second parameter."""

    def acquire(self, timeout=None, poll_interval=0.05, *, blocking=None):
        raise AssertionError("it has been called")


class LockByDelay:
    """As that of the package fasteners."""

    def acquire(self, blocking=True, delay=0.01, max_delay=0.1, timeout=None):
        raise AssertionError("it has been called")


class LockWithoutTimeout:
    def acquire(self):
        raise AssertionError("it has been called")


@pytest.mark.parametrize("make", [LockOfAFile, LockByDelay, LockWithoutTimeout])
def test_lock_that_takes_something_else_is_refused(make):
    """
    Its parameters would be taken for others; the message names it, and the way out.
    """
    with pytest.raises(TypeError, match=rf"{make.__name__} .*blocking\.sleep"):
        blocking.acquire(make())


def test_lock_of_others_that_takes_the_same_is_acquired():
    """
    By whatever name it has the first of the two, or as it comes.
    """

    class Wrapping:
        def __init__(self):
            self.lock = threading.Lock()

        def acquire(self, *args):
            return self.lock.acquire(*args)

    class Named(Wrapping):
        def acquire(self, block=True, timeout=-1):
            return self.lock.acquire(block, timeout)

    for lock in (Wrapping(), Named()):
        assert blocking.acquire(lock) is True
        assert blocking.acquire(lock, 0.01) is False


def test_timeout_below_zero_only_looks():
    """
    Also where the own call of a lock would wait without limit, at -1.
    """
    lock = threading.Lock()
    lock.acquire()
    condition = threading.Condition()
    release = threading.Event()
    thread, _ = start(release.wait)
    try:
        for waits in (
            lambda: blocking.acquire(lock, timeout=-1),
            lambda: blocking.acquire(threading.Semaphore(0), timeout=-1),
            lambda: blocking.wait(threading.Event(), timeout=-1),
            lambda: blocking.wait(concurrent.futures.Future(), timeout=-1),
            lambda: blocking.wait(thread, timeout=-1),
        ):
            assert waits() is False
        with condition:
            assert blocking.wait(condition, timeout=-1) is False
    finally:
        release.set()
        thread.join()
    lock.release()

    assert blocking.acquire(lock, timeout=-1) is True


@pytest.mark.parametrize("wrong", [None, asyncio.Lock(), 404])
def test_what_is_no_lock_is_refused(wrong):
    """
    A lock of asyncio's, too.
    """
    with pytest.raises(TypeError, match=r"acquire\(\) wants a lock"):
        blocking.acquire(wrong)


# --- Events, conditions, futures ------------------------------------------------------------------


def test_cancel_wakes_who_waits_for_an_event_and_nobody_else():
    """
    The event stays as it is, and a plain waiter asleep.
    """
    event = threading.Event()
    plain = start(event.wait)
    until(lambda: event._cond._waiters)

    error = cancelled_in(lambda: blocking.wait(event), lambda: len(event._cond._waiters) == 2)

    assert type(error) is Cancelled
    assert error.reason == "enough"
    assert not event.is_set()
    assert len(event._cond._waiters) == 1
    assert blocking.wait(event, 0.01) is False
    event.set()
    assert ended(*plain) is True
    assert blocking.wait(event) is True


def test_event_that_is_set_and_cleared_has_happened():
    """
    As `Event.wait` has it.
    """
    event = threading.Event()
    waiting = start(blocking.wait, event)
    until(lambda: event._cond._waiters)
    with event._cond:  # nobody gets in between
        event._cond.notify_all()

    assert ended(*waiting) is True


@pytest.mark.parametrize("make", [threading.RLock, threading.Lock])
def test_condition_is_held_again_whatever_comes_out(make):
    """
    On a notification, a cancel, and when the time is up; also a lock that was taken twice.
    """
    condition = threading.Condition(make())
    owned = []

    def waits(timeout=None):
        with condition:
            if make is threading.RLock:
                condition.acquire()
            try:
                return blocking.wait(condition, timeout)
            finally:
                owned.append(condition._is_owned())
                if make is threading.RLock:
                    condition.release()

    error = cancelled_in(waits, lambda: condition._waiters)
    assert type(error) is Cancelled
    assert waits(0.01) is False

    waiting = start(waits)
    until(lambda: condition._waiters)
    with condition:
        condition.notify()
    assert ended(*waiting) is True
    assert owned == [True] * 3
    assert blocking.acquire(condition, 0) is True
    condition.release()
    with pytest.raises(RuntimeError, match="not held"):
        blocking.wait(condition)


def test_notification_goes_to_who_stays():
    """
    The first of two waiters has been cancelled, so the second is notified; one that was
    notified before the cancel returns.
    """
    condition = threading.Condition()

    def waits():
        with condition:
            return blocking.wait(condition)

    token = CancelToken()
    first = under(token, waits)
    until(lambda: len(condition._waiters) == 1)
    second = start(waits)
    until(lambda: len(condition._waiters) == 2)
    with condition:
        token.cancel()
        condition.notify()
    assert type(ended(*first)) is Cancelled
    assert ended(*second) is True

    token = CancelToken()
    first = under(token, waits)
    until(lambda: condition._waiters)
    with condition:
        condition.notify()
        token.cancel()
    assert ended(*first) is True


def test_cancel_wakes_who_waits_for_a_future():
    """
    Done, failed and cancelled are all done; nothing is left on the future.
    """
    future = concurrent.futures.Future()
    waiters = future._condition._waiters

    assert type(cancelled_in(lambda: blocking.wait(future), lambda: waiters)) is Cancelled
    assert blocking.wait(future, 0.01) is False
    assert not waiters
    waiting = start(blocking.wait, future)
    until(lambda: waiters)
    future.set_exception(ValueError("bad header"))
    assert ended(*waiting) is True
    future = concurrent.futures.Future()
    future.cancel()
    assert blocking.wait(future) is True


# --- Threads and processes ------------------------------------------------------------------------


def test_cancel_is_heard_while_a_thread_runs():
    """
    The thread goes on; its end is seen.
    """
    release = threading.Event()
    runner, _ = start(release.wait)

    assert type(cancel_while_blocked(blocking.wait, runner, among=None)) is Cancelled
    assert blocking.wait(runner, 0.01) is False
    release.set()
    assert blocking.wait(runner) is True
    with pytest.raises(RuntimeError):
        blocking.wait(threading.current_thread(), 1)


def test_cancel_wakes_who_waits_for_a_process():
    """
    The process goes on; its end is seen, and no descriptor is left.
    """
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    gc.collect()  # or what earlier tests left is closed as we count
    before = descriptors()

    def asleep():
        return descriptors() > before

    try:
        assert type(cancelled_in(lambda: blocking.wait(process), asleep)) is Cancelled
        assert process.is_alive()
        assert blocking.wait(process, 0.01) is False
    finally:
        process.kill()
    assert blocking.wait(process) is True
    assert blocking.wait(process, 0) is True
    assert descriptors() <= before
    process.close()


def test_cancel_wakes_who_waits_for_a_command():
    """
    The same for a child of `subprocess`, which is reaped when its end is seen.
    """
    with subprocess.Popen(["sleep", "60"]) as child:
        before = descriptors()

        def asleep():
            return descriptors() > before

        assert type(cancelled_in(lambda: blocking.wait(child), asleep)) is Cancelled
        assert child.poll() is None
        assert blocking.wait(child, 0.01) is False
        child.kill()
        assert blocking.wait(child) is True
        assert child.returncode == -signal.SIGKILL
        assert blocking.wait(child, 0) is True


@pytest.mark.parametrize("wrong", [None, asyncio.Event(), threading.Barrier(2), 404])
def test_what_cannot_be_waited_for_is_refused(wrong):
    """
    The message says what can.
    """
    with pytest.raises(TypeError, match=r"wait\(\) wants an event"):
        blocking.wait(wrong)


def test_set_token_lets_no_wait_begin():
    """
    `Cancelled` on entry, also for what has happened already.
    """
    event = threading.Event()
    event.set()
    token = CancelToken()
    token.cancel()

    with use_token(token), pytest.raises(Cancelled):
        blocking.wait(event)
    with use_token(token), pytest.raises(Cancelled):
        blocking.acquire(threading.Lock())


# --- interrupts -----------------------------------------------------------------------------------


def test_condition_is_interrupted_also_if_the_wait_begins_after_the_cancel():
    """
    It is notified again and again, until the block is left, which is not before the lock is free.
    """
    condition = threading.Condition()
    token = CancelToken()

    with condition, pytest.raises(Cancelled), token.interrupts(condition):
        token.cancel()
        until(lambda: any("helper" in thread.name for thread in threading.enumerate()))
        assert condition.wait(timeout=60)


def test_block_that_holds_its_condition_can_be_left():
    """
    Leaving waits for the interruption, and that for the lock which the block holds.
    """
    condition = threading.Condition()
    token = CancelToken()

    with condition, pytest.raises(Cancelled), token.interrupts(condition):
        token.cancel()


def test_barrier_is_broken():
    """
    Nobody can wait for those who leave.
    """
    barrier = threading.Barrier(3)
    token = CancelToken()
    plain = start(barrier.wait)

    def waits():
        with token.interrupts(barrier):
            barrier.wait()

    thread, outcome = start(waits)
    until(lambda: barrier.n_waiting == 2)
    token.cancel()

    assert type(ended(thread, outcome)) is Cancelled
    assert type(ended(*plain)) is threading.BrokenBarrierError


@pytest.mark.parametrize(
    "thing",
    [threading.Lock(), threading.RLock(), threading.Semaphore(), threading.Event(),
     concurrent.futures.Future(), threading.Thread()],
    ids=lambda thing: type(thing).__name__,
)  # fmt: skip
def test_interrupting_what_nothing_wakes_says_what_to_call(thing):
    """
    To set an event, say, would be a wrong success for others.
    """
    with pytest.raises(TypeError, match=r"use fastpool\.blocking\.(wait|acquire)"):
        CancelToken().interrupts(thing)


def test_cancel_against_entering_and_leaving(hasty):
    """
    Never a late interruption, never two, never a wrong success.
    """
    assert sum(rounds.play(ROUNDS).values()) == ROUNDS


def holds_what_tasks_wait_for(group, ready):
    condition = threading.Condition()

    def waits():
        with condition:
            blocking.wait(condition)

    def is_interrupted():
        with condition, fastpool.current_token().interrupts(condition):
            condition.wait()

    group.submit(waits)
    group.submit(is_interrupted)
    until(lambda: len(condition._waiters) == 2)
    with condition:
        ready()
        while True:
            pass


def test_interrupt_in_a_held_condition_deadlocks_nothing():
    """
    The main thread holds what tasks wait for, in both ways.
    """
    assert in_child(holds_what_tasks_wait_for, asleep=False) == "interrupted\n"


def test_failure_of_a_sibling_ends_every_wait():
    """
    The whole of it: tasks in each call, and the first failure leaves the group.
    """
    event, semaphore = threading.Event(), threading.Semaphore(0)

    def fails():
        until(lambda: event._cond._waiters and semaphore._cond._waiters)
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup(3) as group:
        waiting = group.submit(blocking.wait, event)
        acquiring = group.submit(blocking.acquire, semaphore)
        group.submit(fails)

    assert waiting.cancelled()
    assert acquiring.cancelled()


def test_task_waits_by_itself():
    """
    The message says so.
    """
    with TaskGroup(1) as group:
        task = group.submit(abs, -1)
        with pytest.raises(TypeError, match=r"its own wait\(\) hears the token"):
            blocking.wait(task)
