"""
Getting from queues and putting into them: what ends it, and that nothing is lost.
"""

import asyncio
import gc
import multiprocessing
import queue as queues
import random
import sys
import threading
import time
from collections import deque

import pytest
from blocked import cancel_while_blocked, descriptors, ended, under
from interrupted import in_child
from staging import start, until

import fastpool.blocking
from fastpool import Cancelled, CancelToken, use_token

blocking = fastpool.blocking
pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")
KINDS = [queues.Queue, queues.LifoQueue, queues.PriorityQueue]


def full(kind=queues.Queue):
    queue = kind(1)
    queue.put(0)
    return queue


# --- Waking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cancel_wakes_who_gets_and_who_puts(kind):
    """
    The caller sees `Cancelled` with the reason, and the queue is as it was.
    """
    for queue, waiters, call, left in (
        (empty := kind(), empty.not_empty, lambda: blocking.get(empty), 0),
        (busy := full(kind), busy.not_full, lambda: blocking.put(busy, 1), 1),
    ):
        token = CancelToken()
        thread, outcome = under(token, call)
        until(lambda waiters=waiters: waiters._waiters)
        token.cancel("enough")
        error = ended(thread, outcome)

        assert type(error) is Cancelled
        assert error.reason == "enough"
        assert queue.qsize() == left
        assert not waiters._waiters


@pytest.mark.parametrize("kind", KINDS)
def test_item_and_room_wake_as_they_do_without_a_token(kind):
    """
    A waiting get returns what is put; a waiting put returns when there is room.
    """
    empty, busy = kind(), full(kind)
    getter = start(blocking.get, empty)
    putter = start(blocking.put, busy, 5)
    until(lambda: empty.not_empty._waiters and busy.not_full._waiters)
    empty.put(7)
    busy.get()

    assert ended(*getter) == 7
    assert ended(*putter) is None
    assert busy.get_nowait() == 5


def test_get_that_a_handler_ends_as_it_begins_to_wait_takes_no_notification_along(monkeypatch):
    """
    What is put next wakes the one who waits.
    """

    class Waiters(deque):
        def append(self, waiter):
            super().append(waiter)
            if threading.current_thread() is threading.main_thread():
                raise TimeoutError("what an alarm's handler raises")

    queue = queues.Queue()
    queue.not_empty._waiters = waiters = Waiters()
    with pytest.raises(TimeoutError, match="alarm"):
        blocking.get(queue)
    left = list(waiters)
    thread, outcome = start(blocking.get, queue)
    until(lambda: waiters)
    queue.put(404)
    thread.join(timeout=20)

    assert left == []
    assert outcome == [404]


def test_set_token_takes_and_puts_nothing():
    """
    `Cancelled` on entry, also where the call would not have blocked.
    """
    queue, simple = queues.Queue(), queues.SimpleQueue()
    queue.put(1)
    simple.put(1)
    token = CancelToken()
    token.cancel()

    with use_token(token):
        for each in (queue, simple):
            with pytest.raises(Cancelled):
                blocking.get(each)
            with pytest.raises(Cancelled):
                blocking.put(each, 2)

    assert (queue.qsize(), simple.qsize()) == (1, 1)


def test_time_that_is_up_is_told_as_the_queue_tells_it():
    """
    `Empty` and `Full`; zero only looks.
    """
    for timeout in (0, -1, 0.01):
        for queue in (queues.Queue(), queues.SimpleQueue()):
            with pytest.raises(queues.Empty):
                blocking.get(queue, timeout)
        with pytest.raises(queues.Full):
            blocking.put(full(), 1, timeout)
    with pytest.raises(ValueError, match="nan"):
        blocking.get(queues.Queue(), float("nan"))

    assert blocking.get(full(), 0) == 0


@pytest.mark.skipif(sys.version_info < (3, 13), reason="queues cannot be shut down")
def test_shut_down_queue_says_so():
    """
    Whether it is shut down before the call or during it.
    """
    empty, busy = queues.Queue(), full()
    getter, putter = start(blocking.get, empty), start(blocking.put, busy, 1)
    until(lambda: empty.not_empty._waiters and busy.not_full._waiters)
    empty.shutdown()
    busy.shutdown()

    assert type(ended(*getter)) is queues.ShutDown
    assert type(ended(*putter)) is queues.ShutDown
    with pytest.raises(queues.ShutDown):
        blocking.get(empty)


def test_queue_that_nothing_can_wake_is_looked_at_again():
    """
    `SimpleQueue`: an item comes at once, and a cancel is heard.
    """
    queue = queues.SimpleQueue()
    token = CancelToken()
    thread, outcome = under(token, blocking.get, queue)
    blocking.put(queue, 3)
    assert ended(thread, outcome) == 3

    assert type(cancel_while_blocked(blocking.get, queue, among=None)) is Cancelled
    queue.put(4)
    assert queue.get_nowait() == 4


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="a timed get ends in time there")
def test_simple_queue_is_never_waited_for_by_its_own_timeout():
    """
    It would wait without end, if another thread were faster as the time runs out.
    """
    calls = []

    class Noted(queues.SimpleQueue):
        def get(self, block=True, timeout=None):
            calls.append((block, timeout))
            return super().get(block, timeout)

    with pytest.raises(queues.Empty):
        blocking.get(Noted(), 0.01)

    assert set(calls) == {(False, None)}


def test_queues_between_processes_hear_the_token():
    """
    Getting from an empty one and putting into a full one; items come through.
    """
    queue = multiprocessing.get_context("spawn").Queue(1)
    gc.collect()  # or what earlier tests left is closed as we count
    before = descriptors()
    try:
        for call in (lambda: blocking.get(queue), lambda: [blocking.put(queue, 9) for _ in "12"]):
            token = CancelToken()
            thread, outcome = under(token, call)
            until(lambda: descriptors() > before or queue.full())
            token.cancel()
            assert type(ended(thread, outcome)) is Cancelled

        assert blocking.get(queue, timeout=60) == 9
        with pytest.raises(queues.Empty):
            blocking.get(queue, timeout=0.01)
        assert descriptors() == before
    finally:
        queue.close()
        queue.join_thread()


def test_queue_of_a_manager_hears_the_token():
    """
    Getting from an empty one and putting into a full one; nothing is taken, and items come through.
    """
    with multiprocessing.get_context("spawn").Manager() as manager:
        queue = manager.Queue(1)
        assert type(cancel_while_blocked(blocking.get, queue)) is Cancelled
        with pytest.raises(queues.Empty):
            blocking.get(queue, timeout=0.01)
        waiting = start(blocking.get, queue)
        blocking.put(queue, 1)
        assert ended(*waiting) == 1

        blocking.put(queue, 2)
        assert type(cancel_while_blocked(blocking.put, queue, 3)) is Cancelled
        with pytest.raises(queues.Full):
            blocking.put(queue, 3, timeout=0.01)
        waiting = start(blocking.put, queue, 4)
        assert [blocking.get(queue), blocking.get(queue, timeout=10)] == [2, 4]
        assert ended(*waiting) is None


@pytest.mark.parametrize(
    "wrong",
    [None, {}, asyncio.Queue(), multiprocessing.get_context("spawn").SimpleQueue()],
    ids=["None", "dict", "asyncio", "SimpleQueue of multiprocessing"],
)
def test_what_is_no_queue_is_refused(wrong):
    """
    By both calls, and the message says what is wanted.
    """
    with pytest.raises(TypeError, match=r"get\(\) wants a queue"):
        blocking.get(wrong)
    with pytest.raises(TypeError, match=r"put\(\) wants a queue"):
        blocking.put(wrong, 1)


def test_interrupting_a_queue_says_what_to_call():
    """
    To wake a plain `get` would do nothing: it goes on waiting for an item.
    """
    between = multiprocessing.get_context("spawn").Queue()
    between.close()
    for queue in (queues.PriorityQueue(), queues.SimpleQueue(), between):
        with pytest.raises(TypeError, match=r"use fastpool\.blocking\.get\(queue\)"):
            CancelToken().interrupts(queue)


# --- Nothing is lost ------------------------------------------------------------------------------


def test_put_that_meets_a_thread_which_leaves_goes_to_the_next():
    """
    Two wait; the first is cancelled, and held at the queue's lock while an item is put.
    """
    queue = queues.Queue()
    token = CancelToken()
    first = under(token, blocking.get, queue)
    until(lambda: len(queue.not_empty._waiters) == 1)
    second = start(queue.get)  # a plain one
    until(lambda: len(queue.not_empty._waiters) == 2)

    with queue.mutex:
        token.cancel()
        # The first can't go on before it has the lock; it stands before the second still.
        assert len(queue.not_empty._waiters) == 2
        queue._put("item")
        queue.not_empty.notify()

    assert type(ended(*first)) is Cancelled
    assert ended(*second) == "item"


def test_item_that_came_before_the_cancel_is_returned():
    """
    The thread was told of it, so nobody else would look for it.
    """
    queue = queues.Queue()
    token = CancelToken()
    getter = under(token, blocking.get, queue)
    until(lambda: queue.not_empty._waiters)

    with queue.mutex:
        queue._put("item")
        queue.not_empty.notify()
        token.cancel()

    assert ended(*getter) == "item"


def test_finalizer_that_cancels_may_hold_the_lock_of_the_queue():
    """
    Cancelling takes no lock, so it can come in the middle of this very thread's own put.
    """
    queue = queues.Queue()
    token = CancelToken()
    getter = under(token, blocking.get, queue)
    until(lambda: queue.not_empty._waiters)

    class Dropped:
        def __del__(self):
            token.cancel()

    with queue.mutex:
        Dropped()

    assert type(ended(*getter)) is Cancelled


@pytest.mark.parametrize("kind", [*KINDS, queues.SimpleQueue])
def test_every_item_is_got_once_whoever_is_cancelled(kind, hasty):
    """
    Producers and consumers, ours and plain ones, are cancelled again and again.
    """
    queue = kind() if kind is queues.SimpleQueue else kind(3)
    tokens = [CancelToken() for _ in range(6)]
    over = CancelToken()
    done, got, ours = [], [], []

    def produces(number):
        made = 0
        while not over.cancelled():
            try:
                with use_token(tokens[number]):
                    blocking.put(queue, (number, made))
                done.append((number, made))
                made += 1
                until(lambda: queue.qsize() < 100)
            except Cancelled:
                tokens[number] = CancelToken()

    def consumes(number):
        while not over.cancelled():
            try:
                with use_token(tokens[number]):
                    got.append(blocking.get(queue))
                ours.append(number)
            except Cancelled:
                tokens[number] = CancelToken()

    def consumes_plainly():
        while (item := queue.get()) != (9, "last"):
            got.append(item)

    threads = [start(produces, n) for n in range(3)] + [start(consumes, n) for n in range(3, 6)]
    plain = start(consumes_plainly)
    chance = random.Random(7)
    stop = time.monotonic() + 1.0
    while time.monotonic() < stop or not ours:
        tokens[chance.randrange(6)].cancel()
        time.sleep(0.0005)
    over.cancel()
    for thread, _ in threads:
        while thread.is_alive():
            for token in list(tokens):
                token.cancel()
            thread.join(timeout=0.01)
    ended_at = time.monotonic() + 60
    while plain[0].is_alive() and time.monotonic() < ended_at:
        try:
            queue.put((9, "last"), block=False)
            plain[0].join(timeout=60)
        except queues.Full:
            time.sleep(0.001)
    while not queue.empty():
        got.append(queue.get())

    assert [outcome for thread, outcome in threads] == [[None]] * 6
    assert not plain[0].is_alive()
    assert ours
    assert sorted(item for item in got if item[0] != 9) == sorted(done)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def gets(group, ready):
    ready()
    blocking.get(queues.Queue())


def gets_from_simple_queue(group, ready):
    ready()
    blocking.get(queues.SimpleQueue())


def puts(group, ready):
    ready()
    blocking.put(full(), 1)


def acquires_semaphore(group, ready):
    ready()
    blocking.acquire(threading.Semaphore(0))


def acquires_lock(group, ready):
    lock = threading.Lock()
    lock.acquire()
    ready()
    blocking.acquire(lock)


def waits_for_event(group, ready):
    ready()
    blocking.wait(threading.Event())


def puts_while_tasks_get(group, ready):
    queue = queues.Queue(2)

    def consumes():
        while True:
            blocking.get(queue)

    for _ in range(2):
        group.submit(consumes)
    for _ in range(100):
        blocking.put(queue, 1)
    ready()
    while True:
        blocking.put(queue, 1)


@pytest.mark.parametrize(
    "body",
    [gets, gets_from_simple_queue, puts, acquires_semaphore, acquires_lock, waits_for_event],
)
def test_interrupt_ends_the_call_on_the_main_thread(body):
    """
    A real SIGINT, while the body of a group sleeps in it.
    """
    assert in_child(body) == "interrupted\n"


def test_interrupt_in_a_put_deadlocks_nothing():
    """
    The main thread holds the queue's lock again and again, for which the tasks wait.
    """
    for _ in range(3):
        assert in_child(puts_while_tasks_get, asleep=False) == "interrupted\n"
