"""
`map` keeps its calls in lists and makes a handle only when somebody asks: nobody can tell.
"""

import contextvars
import gc
import itertools
import sys
import threading
import tracemalloc
import weakref
from contextlib import suppress

from staging import act_at, in_thread, resize, until

from fastpool import TaskGroup, checkpoint, current_token
from fastpool._items import Items
from fastpool._task import PLAIN

variable = contextvars.ContextVar("variable", default="nothing")


def test_everybody_has_the_same_handle(workers):
    """
    A task of a batch is one object, whoever was the first to ask for it.
    """

    def fails(number):
        if number == 3:
            raise ValueError("bad header")

    with suppress(ValueError), TaskGroup(**workers(2)) as group:
        group.map(fails, range(3))
        batch = group.map(fails, range(5))

    assert group.failures[0].task is batch.tasks[3]
    assert batch.tasks is batch.tasks
    assert [task.name for task in batch.tasks] == [f"fails[{number}]" for number in range(5)]


def test_all_who_ask_at_once_get_the_same_handle(hasty):
    """
    Also where the one that was known before is dropped meanwhile.
    """

    def ask():
        for index in range(1000):
            together.wait(timeout=60)
            seen.append(items.task(index))
            together.wait(timeout=60)

    with TaskGroup() as group:
        batch = group.map(resize, range(1000))
    items = batch._items
    together = threading.Barrier(3)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    counts = []
    for index in range(1000):
        seen = []
        dropped = items.task(index)
        together.wait(timeout=60)
        del dropped
        together.wait(timeout=60)
        counts.append(len(set(seen)))
    for thread in threads:
        thread.join(timeout=60)

    assert counts == [1] * 1000


def test_handle_that_was_dropped_is_made_again(workers):
    """
    What the task has come to is kept without it.
    """
    release = threading.Event()

    def waits(number):
        release.wait(timeout=60)
        return number**2

    with TaskGroup(**workers(1)) as group:
        items = group.map(waits, range(3))._items
        running = items.task(0)
        until(running.running)
        before = weakref.ref(items.task(2))
        gc.collect()
        gone = before() is None
        assert items.task(1).cancel("enough")
        release.set()
        group.wait(timeout=60)
        states = [(items.task(index).done(), items.task(index).cancelled()) for index in range(3)]

    assert gone
    assert states == [(True, False), (True, True), (True, False)]
    assert items.task(2).result() == 4


def test_asking_again_and_again_keeps_nothing():
    """
    A handle that is made only to be asked, and dropped, leaves no trail.
    """
    release = threading.Event()
    with TaskGroup(1, observers=[lambda event: None]) as group:
        batch = group.map(lambda number: release.wait(timeout=60), range(3))
        asked = [batch.done() for _ in range(2000)]
        handles = batch._items.handles
        trail = 0
        known = handles
        while 0 in known:
            trail += 1
            known = known[0].next
        release.set()

    assert not any(asked)
    assert len(handles) <= 3
    assert trail <= 2


def test_each_call_has_the_context_in_which_its_item_was_read(workers):
    """
    An input that sets a context variable hands it to the call of that item.
    """

    def inputs():
        for number in range(6):
            variable.set(number // 2)
            yield number
        variable.set("afterwards")

    with TaskGroup(**workers(2)) as group:
        seen = group.map(lambda number: variable.get(), inputs()).results()

    assert seen == [0, 0, 1, 1, 2, 2]
    assert variable.get() == "afterwards"


def test_contexts_are_told_apart_by_identity(workers):
    """
    A value that equals the one before is another one all the same.
    """

    class Same:
        def __eq__(self, other):
            raise AssertionError("nobody's code is called to compare")

        __hash__ = None

    def inputs():
        for value in values:
            variable.set(value)
            yield value

    values = [[], [], Same(), Same()]
    with TaskGroup(**workers(1)) as group:
        seen = group.map(lambda value: variable.get() is value, inputs()).results()

    assert seen == [True] * 4


def test_calls_do_not_see_what_others_set(workers):
    """
    Each has its own copy of the context, also where they run one after another.
    """

    def sets(number):
        before = variable.get()
        variable.set(number)
        return before

    variable.set("body")
    with TaskGroup(**workers(1)) as group:
        seen = group.map(sets, range(100)).results()

    assert seen == ["body"] * 100


def test_token_is_the_calls_own_wherever_its_context_goes(workers):
    """
    A thread that is given the context of a call finds the token of that call.
    """

    def compare(number):
        context = contextvars.copy_context()
        inside = in_thread(context.run, current_token)
        return inside is current_token(), inside is group.token, number

    with TaskGroup(**workers(1)) as group:
        seen = group.map(compare, range(3)).results()

    assert seen == [(True, False, number) for number in range(3)]


def test_call_that_is_cancelled_alone_is_told(workers):
    """
    `Task.cancel` reaches the running call, and no other of the same map.
    """
    started = threading.Semaphore(0)

    def sleeps(number):
        started.release()
        current_token().sleep(60 if number == 1 else 0)
        checkpoint()
        return number

    with TaskGroup(**workers(2)) as group:
        batch = group.map(sleeps, range(4))
        for _ in range(2):
            started.acquire(timeout=60)
        batch.tasks[1].cancel("enough")

    assert [task.cancelled() for task in batch.tasks] == [False, True, False, False]
    assert [batch.tasks[index].result() for index in (0, 2, 3)] == [0, 2, 3]


def test_function_is_freed_with_its_last_call(workers):
    """
    A function that refers to its own batch does not keep the values for the collector.
    """

    class Witness:
        pass

    def run():
        def work(number):
            return (batches, number)

        batches = []
        freed = weakref.ref(work)
        with TaskGroup(**workers(1)) as group:
            batches.append(group.map(work, range(10)))
            group.wait(timeout=60)
        del work, group
        return freed, batches

    gc.collect()
    gc.disable()
    try:
        freed, _batches = run()
        until(lambda: freed() is None, within=30)
        gone = freed() is None
    finally:
        gc.enable()

    assert gone


def test_group_can_be_waited_for_at_any_moment_of_a_map():
    """
    At whatever line `map` is, another thread sees whole calls only.
    """

    def race(step):
        reached = []

        def look():
            reached.append(in_thread(wait))

        def wait():
            with suppress(TimeoutError):
                group.wait(timeout=0)

        release = threading.Event()
        with TaskGroup(1) as group:
            group.submit(release.wait, 60)
            sys.settrace(act_at(step, look))
            try:
                batch = group.map(resize, range(5))
            finally:
                sys.settrace(None)
                release.set()
        assert batch.results() == list(range(5))
        return reached

    races = list(itertools.takewhile(bool, map(race, itertools.count())))

    assert len(races) > 50
    assert all(seen == [None] for seen in races)


def test_queued_call_takes_little_room():
    """
    Each waits in less than a hundred bytes, measured with a hundred thousand.
    """
    release = threading.Event()
    count = 100_000
    with suppress(ValueError), TaskGroup(1) as group:
        group.submit(release.wait, 60)
        numbers = range(count)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        batch = group.map(resize, numbers)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        release.set()

    assert len(batch) == count
    assert (after - before) / count < 100
    assert batch.results() == list(numbers)


def test_results_are_read_without_a_handle():
    """
    Waiting for a batch and reading it makes no more handles than it sleeps for.
    """
    with TaskGroup() as group:
        batch = group.map(resize, range(10_000))
        assert batch.wait(timeout=60)
        values = batch.results()
        by_iteration = list(batch)
        handles = len(batch._items.handles)

    assert values == by_iteration == list(range(10_000))
    assert handles < 1000


def test_list_that_was_given_can_be_changed_afterwards(workers):
    """
    What `map` has read is its own.
    """
    numbers = list(range(50))

    with TaskGroup(**workers(1)) as group:
        batch = group.map(resize, numbers)
        numbers.clear()

    assert batch.results() == list(range(50))


def test_values_that_were_read_are_the_callers():
    """
    A list that `results` gave can be changed, and the batch read again.
    """
    with TaskGroup() as group:
        batch = group.map(resize, range(3))
    batch.results().clear()

    assert batch.results() == [0, 1, 2]


def test_unknown_handle_of_an_ended_call_is_none():
    """
    Where nobody has a handle none is made.
    """
    with TaskGroup() as group:
        items = group.map(resize, range(3))._items

    assert items.known(1) is None
    task = items.task(1)
    assert items.known(1) is task
    del task
    gc.collect()
    assert items.known(1) is None
    assert isinstance(items, Items)
    assert items.options is PLAIN


def test_context_of_a_cancelled_call_goes_on_saying_so():
    """
    Also when nobody had its handle any more.
    """
    contexts = {}
    tokens = {}

    def work(number):
        contexts[number] = contextvars.copy_context()
        tokens[number] = current_token()
        tokens[number].wait(60)

    with TaskGroup(1) as group:
        batch = group.map(work, range(1))
        until(lambda: 0 in tokens)
        batch.tasks[0].cancel("enough")
        batch.wait()
        del batch

    assert contexts[0].run(current_token) is tokens[0]


def test_items_of_starmap_that_run_code_of_their_own_are_read_one_by_one():
    """
    What an item does to the context is seen by its own call, whatever holds the items.
    """

    class Pair:
        def __init__(self, number):
            self.number = number

        def __iter__(self):
            variable.set(self.number)
            yield self.number

    with TaskGroup(2) as group:
        for kind in (list, tuple, iter):
            seen = group.starmap(lambda number: (number, variable.get()), kind(map(Pair, range(4))))
            assert seen.results() == [(number, number) for number in range(4)]
