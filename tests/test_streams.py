"""
`imap` and `imap_unordered`: the calls of an input that is read as their values are taken.
"""

import contextvars
import gc
import inspect
import itertools
import operator
import random
import sys
import threading
import tracemalloc
import weakref
from collections import deque
from contextlib import closing, suppress

import pytest
from interrupted import in_child
from staging import in_thread, is_asleep, resize, start, started_sleeper, until

import fastpool
from fastpool import (
    Cancelled,
    CancelToken,
    CollectAll,
    FirstSuccess,
    GroupClosedError,
    StuckTaskError,
    TaskCancelledError,
    TaskGroup,
    cancellable,
    current_token,
    shield,
    use_token,
)
from fastpool._gate import Gate
from fastpool._run import Run

LIMIT = 30  # seconds, after which a test hangs
GIL = getattr(sys, "_is_gil_enabled", lambda: True)()

variable = contextvars.ContextVar("variable", default="nothing")


@pytest.fixture(params=["imap", "imap_unordered"])
def stream(request):
    """Either function, called with a group and its arguments."""
    return lambda group, *args, **kwargs: getattr(group, request.param)(*args, **kwargs)


class Numbers:
    """
    An input of numbers, which notes how many were taken, in which threads, and its end.

    Args:
        most: How many there are; `None`: without end.
        enough: With how many of them taken it says so.
    """

    def __init__(self, most=None, enough=None):
        self.most = most
        self.enough = enough
        self.are_enough = threading.Event()
        self.taken = 0
        self.readers = set()
        self.closed = False

    def __iter__(self):
        try:
            while self.taken != self.most:
                self.readers.add(threading.get_ident())
                self.taken += 1
                if self.taken == self.enough:
                    self.are_enough.set()
                yield self.taken - 1
        finally:
            self.closed = True


class Calls:
    """
    Calls that note how they go: some return, the others sleep until they are told.

    Args:
        quick: How many return.
        company: How many others the first one waits for to be asleep before it does.
    """

    def __init__(self, quick=1, company=0):
        self.quick = quick
        self.company = company
        self.begun = []
        self.told = []
        self.asleep = threading.Semaphore(0)

    def call(self, number):
        self.begun.append(number)
        if number == 0 < self.quick:
            for _ in range(self.company):
                assert self.asleep.acquire(timeout=LIMIT)
        if number < self.quick:
            return number
        self.asleep.release()
        try:
            current_token().sleep(60)
        except Cancelled:
            self.told.append(number)
            raise


class Payload:
    """Something that can be seen to go."""

    def __init__(self, number=None):
        self.number = number


def gates(count):
    """Events, and a function that waits for the one of its number and returns that."""
    events = [threading.Event() for _ in range(count)]

    def wait(number):
        assert events[number].wait(LIMIT)
        return number

    return events, wait


def drain(values):
    """What an iterator gives until it ends, and what it raises then; None if nothing."""
    taken = []
    try:
        taken.extend(value for value in iter(lambda: next(values, drain), drain))
    except BaseException as error:
        return taken, error
    return taken, None


def joined(thread, outcome):
    """What a thread of `start` has left."""
    thread.join(LIMIT)
    assert outcome, "it hangs"
    return outcome[0]


# --- What is read, and when ---------------------------------------------------------------------

INPUTS = {
    "range": range,
    "list": lambda count: list(range(count)),
    "tuple": lambda count: tuple(range(count)),
    "deque": lambda count: deque(range(count)),
    "dict": lambda count: dict.fromkeys(range(count)),
    "iterator": lambda count: iter(range(count)),
    "generator": lambda count: (number for number in range(count)),
    "object": Numbers,
}


@pytest.mark.parametrize("window", [1, 2, 5, 1000, None])
@pytest.mark.parametrize("kind", ["generator", "list", "range", "object"])
def test_never_more_than_the_window_is_taken_ahead(stream, kind, window):
    """
    Neither while values are taken nor while nobody takes any; without a window it is twice the
    workers.
    """
    most = 6 if window is None else window
    taken = []
    ahead = []

    with TaskGroup(3) as group:
        values = stream(group, taken.append, INPUTS[kind](3 * most + 20), window=window)
        for handed, _ in enumerate(values, 1):
            if handed % most == 1 or most == 1:
                group.wait()  # whatever is submitted has begun
            ahead.append(len(taken) - handed)

    assert len(ahead) == len(taken) == 3 * most + 20
    assert max(ahead) <= most


@pytest.mark.parametrize("window", [1, 2, 5, 1000, None])
def test_input_is_not_taken_ahead_of_the_window(stream, window):
    """
    Counted in the input, after every value that was handed out.
    """
    most = 6 if window is None else window
    numbers = Numbers()

    with TaskGroup(3) as group:
        values = stream(group, resize, numbers, window=window)
        before = numbers.taken
        ahead = []
        for handed in range(1, 2 * most + 20):
            next(values)
            ahead.append(numbers.taken - handed)
        taken = numbers.taken
        group.wait()
        idle = numbers.taken
        values.close()

    assert before == 0
    assert 0 <= min(ahead) <= max(ahead) <= most
    assert taken == idle == numbers.taken


def test_workers_are_kept_busy(stream, workers):
    """
    As many items as the window has room for are at work while the first value is waited for.
    """
    together = threading.Barrier(4)

    with TaskGroup(**workers(4)) as group:
        values = stream(group, lambda number: together.wait(LIMIT), range(40), window=4)
        places = list(values)

    assert sorted(places) == sorted([0, 1, 2, 3] * 10)


@pytest.mark.parametrize("kind", INPUTS)
def test_every_item_has_its_value(stream, workers, kind):
    """
    Whatever holds the items, and however many chunks of calls they make.
    """
    with TaskGroup(**workers(3)) as group:
        values = list(stream(group, lambda number: number * 2, INPUTS[kind](700)))
        none = list(stream(group, resize, INPUTS[kind](0)))

    assert sorted(values) == list(range(0, 1400, 2))
    assert none == []


def test_imap_hands_out_values_in_the_order_of_the_items(workers):
    """
    The first to end waits for those before it.
    """
    release, wait = gates(4)
    ended = []

    def last_first(number):
        wait(number)
        ended.append(number)
        if number:
            release[number - 1].set()
        return number

    with TaskGroup(**workers(4)) as group:
        release[3].set()
        values = list(group.imap(last_first, range(4), window=4))

    assert ended == [3, 2, 1, 0]
    assert values == [0, 1, 2, 3]


def test_imap_hands_out_a_value_as_soon_as_those_before_it_are_there(workers):
    """
    Those after it may still run.
    """
    release, wait = gates(3)
    seen = []

    with TaskGroup(**workers(3)) as group:
        values = group.imap(wait, range(3), window=3)
        for event in release:
            event.set()
            seen.append(next(values))
        rest = list(values)

    assert seen == [0, 1, 2]
    assert rest == []


def test_imap_unordered_hands_out_values_as_they_come(workers):
    """
    Whatever still runs before them.
    """
    release, wait = gates(5)
    seen = []

    with TaskGroup(**workers(5)) as group:
        values = group.imap_unordered(wait, range(5), window=5)
        for number in (3, 1, 4, 0, 2):
            release[number].set()
            seen.append(next(values))
        rest = list(values)

    assert seen == [3, 1, 4, 0, 2]
    assert rest == []


def test_slow_call_holds_up_no_other_of_imap_unordered(workers):
    """
    More values than many chunks have come past the one that is waited for.
    """
    release = threading.Event()

    def first_is_slow(number):
        if number == 0:
            release.wait(LIMIT)
        return number

    with TaskGroup(**workers(3)) as group:
        values = group.imap_unordered(first_is_slow, range(2000), window=4)
        early = list(itertools.islice(values, 1999))
        release.set()
        late = list(values)

    assert sorted(early) == list(range(1, 2000))
    assert late == [0]


def test_twice_as_many_as_workers_are_taken_ahead(stream):
    """
    Where no window is given, while the first value is waited for.
    """
    numbers = Numbers(enough=6)

    with TaskGroup(3) as group:
        values = stream(group, lambda number: numbers.are_enough.wait(LIMIT), numbers)
        were_enough = next(values)
        values.close()

    assert were_enough


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_call_names_the_line_where_its_stream_was_made(name):
    """
    As where a failed task was submitted.
    """

    def fails(number):
        raise ValueError("root")

    with pytest.raises(ValueError, match="root") as raised, TaskGroup(1) as group:
        line = sys._getframe().f_lineno + 1
        values = getattr(group, name)(fails, [1])
        next(values)

    assert f"submitted at {__file__}:{line} " in raised.value.__notes__[0]


def test_input_is_read_by_the_thread_that_takes_values(stream, workers):
    """
    Nothing is read before the first value is asked for, and then wherever it is.
    """
    numbers = Numbers(50)

    with TaskGroup(**workers(2)) as group:
        values = stream(group, resize, numbers, window=3)
        before = numbers.taken
        next(values)
        here = numbers.readers.copy()
        thread, outcome = start(lambda: (threading.get_ident(), len(list(values))))
        there, count = joined(thread, outcome)

    assert before == 0
    assert here == {threading.get_ident()}
    assert numbers.readers == {threading.get_ident(), there}
    assert count == 49


@pytest.mark.parametrize("kind", ["generator", "list"])
def test_task_has_the_context_in_which_its_item_was_read(stream, workers, kind):
    """
    What the consumer sets between two items is seen by those that are read then.
    """

    def consume():
        seen = []
        with TaskGroup(**workers(2)) as group:
            values = stream(group, lambda number: variable.get(), INPUTS[kind](6), window=1)
            for number, value in enumerate(values):
                seen.append(value)
                variable.set(number)
        return seen

    assert contextvars.copy_context().run(consume) == ["nothing", 0, 1, 2, 3, 4]


def test_task_has_what_the_input_sets(stream, workers):
    """
    An input that sets a context variable sets it for its items, and for the consumer.
    """

    def inputs():
        for number in range(600):
            variable.set(number)
            yield number

    def sets(number):
        seen = variable.get()
        variable.set("a task")
        return seen == number

    def consume():
        with TaskGroup(**workers(2)) as group:
            return list(stream(group, sets, inputs(), window=4)), variable.get()

    assert contextvars.copy_context().run(consume) == ([True] * 600, 599)


def test_input_has_the_token_of_the_consumer_and_each_task_its_own(stream, workers):
    """
    A task's token is a child of the group's.
    """
    tokens = []

    def inputs():
        for _ in range(3):
            tokens.append(current_token())
            yield None

    with TaskGroup(**workers(2)) as group:
        theirs = list(stream(group, lambda _: current_token(), inputs()))

    assert tokens == [group.token] * 3
    assert len({*theirs, group.token}) == 4


@pytest.mark.parametrize("bound", [None, 5])
def test_function_that_wants_the_token_gets_it(stream, workers, bound):
    """
    A decorated function or method is called as `map` would call it.
    """

    class Store:
        @cancellable
        def load(self, token, number):
            return token is current_token(), number

    with TaskGroup(max_queued=bound, **workers(2)) as group:
        values = sorted(stream(group, Store().load, range(300)))

    assert values == [(True, number) for number in range(300)]


# --- What is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("observers", [(), (lambda event: None,)], ids=["alone", "observed"])
def test_value_that_was_handed_out_is_the_consumers_alone(stream, workers, observers, window):
    """
    Once it is dropped there it is gone, whether it was waited for or there already.
    """

    def gone():
        # Without a GIL the thread that made an object frees it, when it next has something to do.
        group.submit(resize, 1).result()
        return reference() is None

    kept = []
    with TaskGroup(observers=observers, **workers(1)) as group:
        values = stream(group, Payload, itertools.count(), window=window)
        for number in range(30):
            value = next(values)
            reference = weakref.ref(value)
            del value
            until(gone, within=5)
            kept.append(reference() is not None)
            if kept[-1]:
                break
            if number % 3:
                group.wait()  # so that the next ones are there
        values.close()

    assert not any(kept)


def test_value_that_was_handed_out_is_gone_while_its_worker_goes_on(stream, workers):
    """
    The worker that made it does not hold it through its next call.
    """
    begun, release = threading.Event(), threading.Event()

    def work(number):
        if number == 0:
            until(lambda: group._run.queue)  # the next one is there when this ends
        else:
            begun.set()
            until(release.is_set)  # awake: without a GIL the thread that made it frees it
        return Payload()

    with TaskGroup(**workers(1)) as group:
        values = stream(group, work, range(2), window=2)
        value = next(values)
        reference = weakref.ref(value)
        del value
        assert begun.wait(LIMIT)
        until(lambda: reference() is None, within=5)
        kept = reference() is not None
        release.set()
        assert len(list(values)) == 1

    assert not kept


def test_argument_is_not_kept(stream, workers):
    """
    It is gone when its call has ended.
    """
    references = []

    def inputs():
        while True:
            payload = Payload()
            references.append(weakref.ref(payload))
            yield payload
            del payload

    with TaskGroup(**workers(2)) as group:
        values = stream(group, lambda payload: None, inputs(), window=5)
        for _ in range(20):
            next(values)
        group.wait()
        # The input has the last one.
        until(lambda: not any(reference() for reference in references[:-1]), within=10)
        left = [reference() for reference in references[:-1]]
        values.close()

    assert len(left) >= 19
    assert not any(left)


@pytest.mark.parametrize("observers", [(), (lambda event: None,)], ids=["alone", "observed"])
def test_context_of_a_reading_is_not_kept(stream, workers, observers):
    """
    What the input has set for a call is gone when that has ended, whoever looks on.
    """
    references = []

    def inputs():
        for number in itertools.count():
            payload = Payload()
            references.append(weakref.ref(payload))
            variable.set(payload)
            del payload
            yield number

    def gone():
        # Without a GIL the thread that made an object frees it, when it next has something to do.
        group.map(resize, range(4)).results()
        return not any(reference() for reference in references[:-1])

    def consume():
        values = stream(group, lambda number: type(variable.get()), inputs(), window=5)
        kinds = {next(values) for _ in range(20)}
        group.wait()
        until(gone, within=10)  # but the last one, which the consumer's own context has
        left = [reference() for reference in references[:-1]]
        values.close()
        return kinds, left

    with TaskGroup(observers=observers, **workers(2)) as group:
        kinds, left = in_thread(consume)

    assert kinds == {Payload}
    assert len(left) >= 19
    assert not any(left)


@pytest.mark.parametrize(
    ("name", "slow"), [("imap", False), ("imap_unordered", False), ("imap_unordered", True)]
)
def test_endless_input_takes_constant_memory(workers, name, slow):
    """
    Ten times as many items take no more, also while one slow call holds the first place.
    """
    release = threading.Event()
    alive = weakref.WeakSet()

    def work(payload):
        if slow and payload.number == 0:
            release.wait(LIMIT)
        value = Payload()
        alive.add(value)
        return value

    def inputs():
        for number in itertools.count():
            payload = Payload(number)
            alive.add(payload)
            yield payload
            del payload

    def take(count):
        for _ in itertools.islice(values, count):
            pass
        until(lambda: len(alive) < 30, within=10)
        gc.collect()
        return len(alive), tracemalloc.get_traced_memory()[0]

    with TaskGroup(**workers(2)) as group:
        values = getattr(group, name)(work, inputs(), window=4)
        tracemalloc.start()
        take(600)
        few, before = take(100)
        many, after = take(3000)
        tracemalloc.stop()
        release.set()
        values.close()

    assert max(few, many) < 30
    # Without a GIL the threads free what they made when they next have something to do.
    assert after - before < (100_000 if GIL else 400_000)


def test_stream_that_has_ended_keeps_nothing(stream, workers):
    """
    Neither the input nor the function is held by a group that goes on.
    """

    class Input(Numbers):
        pass

    def consume(group, most):
        def double(number):
            return number * 2

        numbers = Input(10)
        for _ in itertools.islice(stream(group, double, numbers, window=3), most):
            pass
        return weakref.ref(numbers), weakref.ref(double)

    gc.collect()
    gc.disable()
    try:
        with TaskGroup(**workers(2)) as group:
            references = [*consume(group, 100), *consume(group, 3)]
            group.wait()
            until(lambda: not any(reference() for reference in references), within=5)
            left = [reference() for reference in references]
    finally:
        gc.enable()

    assert left == [None] * 4


# --- What is refused ----------------------------------------------------------------------------


def test_group_that_is_not_entered_refuses(stream):
    """
    At the call, and nothing is taken.
    """
    numbers = iter(range(3))
    group = TaskGroup(name="feed")

    with pytest.raises(GroupClosedError, match=r"cannot submit resize\(\) to group 'feed'.*enter"):
        stream(group, resize, numbers)
    assert list(numbers) == [0, 1, 2]


def test_group_that_has_ended_refuses(stream):
    """
    At the call, and nothing is taken.
    """
    numbers = iter(range(3))
    with TaskGroup(name="feed") as group:
        pass

    with pytest.raises(GroupClosedError, match=r"cannot submit resize\(\) to group 'feed'.*ended"):
        stream(group, resize, numbers)
    assert list(numbers) == [0, 1, 2]


def test_cancelled_group_refuses(stream, workers):
    """
    At the call, with `Cancelled` where the current token is set, elsewhere with the reason.
    """
    numbers = iter(range(3))

    with TaskGroup(**workers(1)) as group:
        group.cancel("rain")
        with pytest.raises(Cancelled, match="rain"):
            stream(group, resize, numbers)
        with pytest.raises(GroupClosedError, match="rain") as shielded, shield():
            stream(group, resize, numbers)
        elsewhere = in_thread(stream, group, resize, numbers)

    assert shielded.value.reason == "rain"
    assert type(elsewhere) is GroupClosedError
    assert list(numbers) == [0, 1, 2]


@pytest.mark.parametrize(
    ("window", "kind", "message"),
    [
        (0, ValueError, "window must be 1 or more, not 0"),
        (-1, ValueError, "window must be 1 or more, not -1"),
        (True, TypeError, "window must be a whole number, not True"),
        (1.5, TypeError, "window must be a whole number, not 1.5"),
        ("x", TypeError, "window must be a whole number, not 'x'"),
    ],
)
def test_window_is_a_number_of_items(stream, window, kind, message):
    """
    Another is refused at the call, nothing is lost, and the group goes on.
    """
    numbers = iter(range(3))

    with TaskGroup(1) as group:
        with pytest.raises(kind, match=message):
            stream(group, resize, numbers, window=window)
        values = list(stream(group, resize, numbers))

    assert values == [0, 1, 2]


async def coroutine(number):
    """No function for a thread."""


async def async_generator(number):
    """No function for a thread."""
    yield number


def generator(number):
    """No function for a thread."""
    yield number


@pytest.mark.parametrize("fn", [coroutine, async_generator, generator, 404, None])
def test_what_a_worker_cannot_run_is_refused(stream, fn):
    """
    At the call, by its name or its value, and nothing is taken.
    """
    numbers = iter(range(3))
    name = getattr(fn, "__name__", repr(fn))

    with TaskGroup(1) as group, pytest.raises(TypeError, match=name):
        stream(group, fn, numbers)
    assert list(numbers) == [0, 1, 2]


@pytest.mark.parametrize("items", [404, None, resize])
def test_what_is_not_iterable_is_refused(stream, items):
    """
    At the call; the group goes on.
    """
    with TaskGroup(1) as group:
        with pytest.raises(TypeError, match=r"imap.*\(\) wants an iterable, not"):
            stream(group, resize, items)
        values = list(stream(group, resize, [1]))

    assert values == [1]
    assert group.failures == ()


def test_input_may_be_read_by_index(stream):
    """
    As the built-in `map` has it.
    """

    class Sequence:
        def __getitem__(self, index):
            return "abc"[index]

    with TaskGroup(1) as group:
        assert sorted(stream(group, str.upper, Sequence())) == ["A", "B", "C"]


# --- Leaving early ------------------------------------------------------------------------------


class Stop(Exception):
    """Raised in the body of a loop."""


def breaks(values, ready):
    for _ in values():
        ready()
        break


def raises(values, ready):
    with suppress(Stop):
        for _ in values():
            ready()
            raise Stop


def returns(values, ready):
    for _ in values():
        ready()
        return


def closes(values, ready):
    kept = values()
    next(kept)
    ready()
    kept.close()
    assert list(kept) == []


def drops(values, ready):
    kept = values()
    next(kept)
    ready()
    del kept


def closes_twice(values, ready):
    with closing(values()) as kept:
        next(kept)
        ready()
        kept.close()


@pytest.mark.parametrize("where", ["body", "group in a task"])
@pytest.mark.parametrize("leave", [breaks, raises, returns, closes, drops, closes_twice])
def test_leaving_early_stops_the_tasks_and_closes_the_input(stream, workers, leave, where):
    """
    Nothing more is read or started, what runs is told, and the group goes on.
    """
    calls = Calls(company=2)
    numbers = Numbers()

    def ready():
        states.append((numbers.taken, numbers.closed))

    def consume():
        with TaskGroup(3) if where != "body" else TaskGroup(**workers(3)) as group:
            leave(lambda: stream(group, calls.call, numbers, window=6), ready)
            states.append((numbers.taken, numbers.closed))
            group.wait()
            after = group.submit(resize, 404).result()
            again = list(stream(group, resize, range(3), window=2))
            return after, sorted(again), group.failures

    states = []
    if where == "body":
        outcome = consume()
    else:
        with TaskGroup(**workers(1)) as outer:
            outcome = outer.submit(consume).result()

    assert outcome == (404, [0, 1, 2], ())
    assert states == [(states[0][0], False), (states[0][0], True)]
    assert numbers.taken == states[0][0]
    assert 3 <= len(calls.begun) <= 4  # of six
    assert sorted(calls.told) == sorted(calls.begun)[1:]


@pytest.mark.parametrize("leave", [breaks, raises, closes, drops])
def test_task_leaves_a_stream_of_its_own_group_early(stream, workers, leave):
    """
    The only worker runs the first call itself, and none of the others ever.
    """
    calls = Calls()
    numbers = Numbers()

    def consume():
        leave(lambda: stream(group, calls.call, numbers, window=4), lambda: None)
        return group.submit(resize, 404).result(), numbers.closed

    with TaskGroup(**workers(1)) as group:
        outcome = group.submit(consume).result()

    assert outcome == (404, True)
    assert numbers.taken <= 5
    assert calls.begun == [0]


def test_generator_that_was_given_is_closed(stream, workers):
    """
    Its clean-up runs as the loop is left, although the caller has a name for it.
    """
    done = []

    def inputs():
        try:
            yield from range(100)
        finally:
            done.append(threading.get_ident())

    given = inputs()
    with TaskGroup(**workers(2)) as group:
        for _ in stream(group, resize, given, window=3):
            break
        at_once = done.copy()

    assert at_once == done == [threading.get_ident()]
    assert list(given) == []


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
@pytest.mark.parametrize("leave", ["close", "drop"])
def test_generator_of_a_stream_that_was_never_begun_is_closed(stream, leave, begun):
    """
    The stream has it from the call on, whether or not a value was taken.
    """
    numbers = Numbers(100)
    given = iter(numbers)
    if begun:
        next(given)

    with TaskGroup(1) as group:
        values = stream(group, resize, given)
        if leave == "close":
            values.close()
        del values
        after = group.submit(resize, 404).result()

    assert inspect.getgeneratorstate(given) == inspect.GEN_CLOSED
    assert (numbers.taken, numbers.closed) == (int(begun), begun)
    assert after == 404


def test_refused_stream_leaves_its_input_alone(stream):
    """
    It was never taken.
    """
    numbers = Numbers(3)
    given = iter(numbers)

    with TaskGroup(1) as group:
        group.cancel()
        with pytest.raises(Cancelled):
            stream(group, resize, given)

    assert list(given) == [0, 1, 2]


def test_file_that_was_given_is_left_open(stream, tmp_path):
    """
    It is its owner's, and can be read on.
    """
    path = tmp_path / "lines"
    path.write_text("one\ntwo\nthree\n")

    with path.open() as file, TaskGroup(1) as group:
        first = next(stream(group, str.strip, file, window=1))
        rest = list(file)

    assert first == "one"
    assert rest == ["two\n", "three\n"]


def test_iterator_of_the_callers_can_be_read_on(stream):
    """
    What was not taken is there, whatever kind it is.
    """
    given = iter(range(10))

    with TaskGroup(1) as group:
        for _ in stream(group, resize, given, window=1):
            break

    assert list(given) == list(range(1, 10))


def test_stream_that_was_never_begun_takes_nothing(stream):
    """
    Neither by being made, nor by being closed or dropped.
    """
    numbers = Numbers()

    with TaskGroup(1) as group:
        stream(group, resize, numbers).close()
        stream(group, resize, numbers)

    assert numbers.taken == 0


def test_stream_is_over_when_its_values_are_taken(stream):
    """
    Asked again it goes on saying so.
    """
    with TaskGroup(1) as group:
        values = stream(group, resize, range(3))
        taken = sorted(values)
        again = [next(values, "over"), next(values, "over")]
        values.close()

    assert taken == [0, 1, 2]
    assert again == ["over", "over"]


def test_error_of_an_input_that_is_closed_is_raised_by_close(stream, workers):
    """
    What its clean-up raises is not lost.
    """

    def inputs():
        try:
            yield from itertools.count()
        finally:
            raise Stop("clean-up")

    calls = Calls(company=1)
    with TaskGroup(**workers(2)) as group:
        values = stream(group, calls.call, inputs(), window=3)
        next(values)
        with pytest.raises(Stop, match="clean-up"):
            values.close()
        group.wait()

    assert 1 <= len(calls.told) <= 2
    assert sorted(calls.told) == sorted(calls.begun)[1:]


@pytest.mark.parametrize("how", ["dropped", "collected"])
def test_stream_that_goes_in_another_thread_is_closed_there(stream, workers, how):
    """
    By that thread, or by the collector in it.
    """
    calls = Calls(company=2)
    done = []

    def inputs():
        try:
            yield from itertools.count()
        finally:
            done.append(threading.get_ident())

    def let_go():
        held.clear()
        gc.collect()
        return threading.get_ident()

    gc.disable()
    try:
        with TaskGroup(**workers(3)) as group:
            held = [stream(group, calls.call, inputs(), window=6)]
            next(held[0])
            if how == "collected":
                cycle = [*held]
                cycle.append(cycle)
                del cycle
            there = in_thread(let_go)
            until(lambda: done)
            group.wait()
            after = group.submit(resize, 404).result()
    finally:
        gc.enable()

    # Without a GIL what was dropped elsewhere is freed by the thread that made it.
    assert done in ([there], [threading.get_ident()] if how == "dropped" else [])
    assert 3 <= len(calls.begun) <= 4  # of six
    assert sorted(calls.told) == sorted(calls.begun)[1:]
    assert after == 404


def test_loop_that_is_left_leaves_other_tasks_alone(stream, workers):
    """
    Only its own are cancelled, not another stream's, nor what was submitted by itself.
    """
    release, wait = gates(4)

    with TaskGroup(**workers(3)) as group:
        single = group.submit(wait, 3)
        until(single.running)
        other = stream(group, resize, range(30), window=5)
        begun = next(other)
        for _ in stream(group, resize, itertools.count(), window=3):
            break
        rest = list(other)
        release[3].set()

    assert single.result() == 3
    assert sorted([begun, *rest]) == list(range(30))


# --- In a task ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generator", "list"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_task_takes_values_of_its_own_group(stream, workers, count, kind):
    """
    Also the only worker does, which makes the calls itself.
    """

    def consume():
        return sum(stream(group, resize, INPUTS[kind](300), window=3))

    with TaskGroup(**workers(count)) as group:
        tasks = [group.submit(consume) for _ in range(count)]

    assert [task.result() for task in tasks] == [sum(range(300))] * count


@pytest.mark.parametrize("bound", [None, 1])
def test_groups_in_groups_take_values_on_a_pool_of_one_thread(stream, make_pool, bound):
    """
    Each call takes the values of a group further in.
    """
    pool = make_pool(1)

    def consume(depth):
        if depth == 0:
            return 1
        with TaskGroup(pool=pool, max_queued=bound) as group:
            return sum(stream(group, consume, [depth - 1] * 3, window=2))

    with TaskGroup(pool=pool) as group:
        assert group.submit(consume, 4).result() == 3**4


def test_task_takes_values_while_its_group_is_left(stream, workers):
    """
    What is submitted then is waited for as well.
    """

    def consume():
        until(lambda: group._run.leavers)
        return sum(stream(group, resize, iter(range(100)), window=3))

    with TaskGroup(**workers(2)) as group:
        task = group.submit(consume)

    assert task.result() == sum(range(100))


@pytest.mark.parametrize("count", [1, 2])
def test_call_that_waits_for_the_task_that_takes_its_value_is_told(stream, workers, count):
    """
    Neither would ever go on; the error names both.
    """

    def consumes():
        ready.wait(LIMIT)
        return list(stream(group, lambda _: task.result(), [1], window=1))

    ready = threading.Event()
    with (
        pytest.raises(RuntimeError, match=r"task .* cannot wait for task .*consumes|lambda"),
        TaskGroup(timeout=LIMIT, **workers(count)) as group,
    ):
        task = group.submit(consumes)
        ready.set()


def test_iterator_can_be_handed_to_a_worker_and_back(stream):
    """
    The only worker that takes values makes the calls, wherever the iterator has been before.
    """
    with TaskGroup(1) as group:
        values = stream(group, resize, iter(range(100)), window=3)
        taken = list(itertools.islice(values, 10))
        group.wait()
        taken += group.submit(lambda: list(itertools.islice(values, 10))).result()
        taken += values

    assert sorted(taken) == list(range(100))


def test_as_completed_can_be_handed_to_a_worker_and_back():
    """
    The only worker that takes tasks runs what is queued.
    """
    with TaskGroup(1) as group:
        tasks = [group.submit(resize, number) for number in range(3)]
        later = []
        ended = fastpool.as_completed(itertools.chain(tasks))

        def consume():
            later.extend(group.submit(resize, number) for number in range(3))
            everything = fastpool.as_completed([*tasks, *later])
            seen.append(everything)
            return [next(ended), next(ended)], list(itertools.islice(everything, 4))

        seen = []
        first = next(ended)
        group.wait()
        pair, four = group.submit(consume).result()
        rest = list(seen[0])

    assert {first, *pair} == set(tasks)
    assert {*four, *rest} == {*tasks, *later}


def test_as_completed_hears_of_a_failure_and_of_what_that_cancels_at_once(monkeypatch):
    """
    Both wake it together, in a thread that does not hear the group's token by itself.
    """
    wait, consumers = Gate.wait, []
    held, goes_on = threading.Event(), threading.Event()

    def wait_late(gate, timeout=None):
        if threading.current_thread() in consumers and not held.is_set():
            held.set()
            assert goes_on.wait(LIMIT)
        return wait(gate, timeout)

    def fails():
        assert held.wait(LIMIT)
        raise ValueError("bad header")

    def consume(tasks):
        consumers.append(threading.current_thread())
        return list(fastpool.as_completed(tasks))

    monkeypatch.setattr(Gate, "wait", wait_late)
    with pytest.raises(ValueError, match="bad header"), TaskGroup(1) as group:
        tasks = [group.submit(fails), *(group.submit(resize, 404) for _ in range(2))]
        consumer, outcome = start(consume, tasks)
        until(lambda: held.is_set() and group.token.cancelled())
        goes_on.set()
        consumer.join(20)
        seen = list(outcome)

    assert seen == [tasks]


def test_as_completed_of_two_groups_is_no_deadlock(make_pool):
    """
    What the first has queued stands behind a task that waits for what the second has.
    """
    seen, pool = threading.Event(), make_pool(1)

    def consume():
        behind, ahead = other.submit(resize, 1), shared.submit(resize, 2)
        ended = fastpool.as_completed([behind, ahead])
        first = next(ended)
        seen.set()
        return first is ahead and list(ended) == [behind]

    with TaskGroup(1) as other:
        running = other.submit(seen.wait, LIMIT)
        until(running.running)
        with TaskGroup(pool=pool) as group, TaskGroup(pool=pool) as shared:
            task = group.submit(consume)
            ended = task.wait(timeout=20)
            seen.set()

    assert ended
    assert task.result()


def test_as_completed_handed_to_the_only_worker_is_no_deadlock():
    """
    Begun in the body, it waits in the task for what nobody else can run.
    """
    release = threading.Event()

    def consume():
        queued.wait(LIMIT)
        return list(ended)

    with TaskGroup(1) as group:
        done = group.submit(resize, 1)
        group.wait()
        queued = threading.Event()
        task = group.submit(consume)
        others = [group.submit(resize, number) for number in range(3)]
        ended = fastpool.as_completed([done, *others])
        first = next(ended)
        queued.set()
        rest = task.result()
        release.set()

    assert first is done
    assert set(rest) == set(others)


# --- An input that raises -----------------------------------------------------------------------


class Crash(BaseException):
    """No `Exception`."""


@pytest.mark.parametrize("policy", [None, CollectAll(), FirstSuccess()])
@pytest.mark.parametrize("kind", [ValueError, Crash])
@pytest.mark.parametrize("where", ["begin", "first", "later"])
def test_input_that_raises_is_the_groups_failure(stream, workers, where, kind, policy):
    """
    It is raised there, recorded once, of no task, and cancels the rest under every policy.
    """
    error = kind("bad header")
    calls = Calls(quick=0)

    class Items:
        def __iter__(self):
            if where == "begin":
                raise error
            return self.items()

        def items(self):
            if where == "later":
                yield 0
                calls.asleep.acquire(timeout=LIMIT)
            raise error

    def consume():
        with TaskGroup(policy=policy, **workers(2)) as group:
            groups.append(group)
            sleepers.append(started_sleeper(group))
            try:
                list(stream(group, calls.call, Items(), window=5))
            except kind as raised:
                seen.append((raised, group.token.cancelled()))
                raise

    groups, sleepers, seen = [], [], []
    with pytest.raises((kind, BaseExceptionGroup)) as left:
        consume()

    assert seen == [(error, True)]
    assert [(failure.task, failure.exception) for failure in groups[0].failures] == [(None, error)]
    assert sleepers[0].cancelled()
    assert calls.told == calls.begun == ([0] if where == "later" else [])
    if isinstance(policy, CollectAll):
        assert left.value.exceptions == (error,)
    else:
        assert left.value is error


def test_input_of_a_built_in_kind_that_raises_is_a_failure(stream):
    """
    A dictionary that changes while it is read, say.
    """
    numbers = dict.fromkeys(range(10))

    with pytest.raises(RuntimeError, match="changed size") as left, TaskGroup(1) as group:
        for number in stream(group, resize, numbers, window=2):
            numbers[number + 100] = None

    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, left.value)]


def test_input_that_raises_in_a_task_is_one_failure(stream, workers):
    """
    The task fails with it, and it is not counted again.
    """

    def inputs():
        yield 0
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header") as left, TaskGroup(**workers(2)) as group:
        task = group.submit(lambda: list(stream(group, resize, inputs())))

    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, left.value)]
    assert task.exception() is left.value


def test_input_that_raises_in_another_thread_fails_the_group(stream, workers):
    """
    It is raised there, and leaves the block.
    """

    def inputs():
        yield 0
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header") as left, TaskGroup(**workers(2)) as group:
        there = in_thread(lambda: list(stream(group, resize, inputs())))

    assert there is left.value
    assert len(group.failures) == 1


def test_input_that_raises_stop_iteration_as_it_is_begun_has_not_ended(stream):
    """
    No value is missing from an end that looks like any other.
    """

    class Items:
        def __iter__(self):
            raise StopIteration("no")

    with pytest.raises(StopIteration, match="no"), TaskGroup(1) as group:
        taken, raised = drain(stream(group, resize, Items()))

    assert taken == []
    assert type(raised) is RuntimeError
    assert len(group.failures) == 1


def test_input_that_raises_after_the_group_was_cancelled_is_over(stream, workers):
    """
    What is handed over as the group is cancelled is never begun.
    """
    calls = Calls(quick=0)

    def inputs():
        yield 0
        calls.asleep.acquire(timeout=LIMIT)
        group.cancel("rain")
        yield 1

    with TaskGroup(**workers(2)) as group, pytest.raises(Cancelled, match="rain"):
        list(stream(group, calls.call, inputs(), window=5))

    assert calls.begun == calls.told == [0]
    assert group.failures == ()


@pytest.mark.parametrize("how", ["cancel", "failure"])
def test_input_that_blocks_on_the_token_does_not_stop_a_cancel(stream, workers, how):
    """
    It hears the token as the consumer does, and is no failure.
    """
    blocked = threading.Event()
    done = []

    def inputs():
        try:
            yield 0
            blocked.set()
            fastpool.sleep(60)
        finally:
            done.append(True)

    def ends(number):
        blocked.wait(LIMIT)
        if how == "failure":
            raise ValueError("bad header")
        group.cancel("rain")

    with suppress(ValueError), TaskGroup(**workers(2)) as group:
        with pytest.raises(Cancelled) as heard:
            list(stream(group, ends, inputs(), window=5))
        raise heard.value

    assert [type(failure.exception) for failure in group.failures] == [ValueError] * (
        how == "failure"
    )
    assert done == [True]


def test_interrupt_in_an_input_is_a_failure_of_no_task(stream, workers):
    """
    As in the body.
    """

    def inputs():
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as left, TaskGroup(**workers(2)) as group:
        list(stream(group, resize, inputs(), window=2))

    assert [(failure.task, failure.exception) for failure in group.failures] == [(None, left.value)]


# --- A task that fails --------------------------------------------------------------------------


def in_the_body(values):
    return drain(values)


def in_a_shield(values):
    with shield():
        return drain(values)


def in_another_thread(values):
    thread, outcome = start(drain, values)
    return joined(thread, outcome)


WHERE = [in_the_body, in_a_shield, in_another_thread]


@pytest.mark.parametrize("where", WHERE)
def test_failed_call_raises_what_it_raised_in_its_place(stream, workers, where):
    """
    The object itself, wherever the values are taken; it names where the stream was made.
    """
    error = ValueError("bad header")

    def fails(number):
        if number == 3:
            raise error
        return number

    with pytest.raises(ValueError, match="bad header") as left, TaskGroup(**workers(1)) as group:
        values = stream(group, fails, iter(range(10)), window=1)
        taken, raised = where(values)
        over = next(values, "over")

    assert left.value is raised is error
    assert taken == [0, 1, 2]
    assert over == "over"
    assert [failure.task.name for failure in group.failures] == ["fails[3]"]
    assert any("fails[3]" in note and f"{__file__}:" in note for note in error.__notes__)


@pytest.mark.parametrize("where", WHERE)
def test_cancelled_call_does_not_hide_the_failure_of_another(stream, workers, where):
    """
    Where the consumer is not cancelled itself it waits for all, and hears of the failure.
    """
    together = threading.Barrier(2)
    error = ValueError("bad header")

    def second_fails(number):
        together.wait(LIMIT)
        if number == 1:
            raise error
        current_token().sleep(60)

    with suppress(ValueError), TaskGroup(**workers(2)) as group:
        values = stream(group, second_fails, range(2), window=2)
        taken, raised = where(values)

    assert taken == []
    if where is in_the_body and type(raised) is Cancelled:
        assert raised.__cause__ is error
    else:
        assert raised is error
    assert [failure.exception for failure in group.failures] == [error]


@pytest.mark.parametrize("where", WHERE)
def test_failure_elsewhere_ends_the_stream(stream, workers, where):
    """
    With `Cancelled` in the body; whose token is not set gets an error that names the failure.
    """
    error = ValueError("bad header")
    asleep = threading.Barrier(3)

    def sleeps(number):
        asleep.wait(LIMIT)
        current_token().sleep(60)

    def fails():
        asleep.wait(LIMIT)
        raise error

    with suppress(ValueError), TaskGroup(**workers(3)) as group:
        group.submit(fails)
        taken, raised = where(stream(group, sleeps, itertools.count(), window=2))

    assert taken == []
    assert type(raised) is (Cancelled if where is in_the_body else TaskCancelledError)
    assert raised.__cause__ is error
    assert [failure.exception for failure in group.failures] == [error]


@pytest.mark.parametrize("where", WHERE)
def test_values_that_were_there_before_the_failure_are_handed_out(stream, workers, where):
    """
    Then the failure is raised, and no end that looks like any other.
    """
    error = ValueError("bad header")
    numbers = Numbers(10, enough=4)

    def fourth_fails(number):
        numbers.are_enough.wait(LIMIT)
        if number == 3:
            raise error
        return number

    with suppress(ValueError), TaskGroup(**workers(1)) as group:
        values = stream(group, fourth_fails, numbers, window=4)
        first = next(values)
        until(group.token.cancelled)
        rest, raised = where(values)

    assert [first, *rest] == [0, 1, 2]
    assert raised is error


@pytest.mark.parametrize("kind", ["generator", "list"])
def test_failed_call_ends_a_stream_under_a_tolerant_policy(stream, workers, kind):
    """
    It is raised in its place, the stream's other tasks are cancelled, and the group goes on.
    """
    error = ValueError("bad header")
    heard = []
    asleep = threading.Event()

    def third_fails(number):
        if number == 2:
            assert asleep.wait(LIMIT)
            raise error
        if number > 2:
            asleep.set()
            try:
                current_token().sleep(60)
            except Cancelled:
                heard.append(number)
                raise
        return number

    items = INPUTS[kind](50)
    with (
        pytest.raises(ExceptionGroup) as left,
        TaskGroup(policy=CollectAll(), **workers(3)) as group,
    ):
        sleeper = started_sleeper(group)
        values = stream(group, third_fails, items, window=4)
        taken, raised = drain(values)
        over = next(values, "over")
        cancelled = group.token.cancelled()
        sleeper.cancel()
        group.wait()
        after = sorted(stream(group, resize, range(300)))

    assert sorted(taken) == [0, 1]
    assert raised is error
    assert over == "over"
    assert sorted(heard) in ([3], [3, 4])
    assert not cancelled
    assert after == list(range(300))
    assert left.value.exceptions == (error,)


def test_first_success_ends_a_stream(workers):
    """
    The winner's value is handed out, and the others are told.
    """
    calls = Calls(quick=0)

    def second_wins(number):
        if number != 1:
            return calls.call(number)
        calls.asleep.acquire(timeout=LIMIT)
        return number

    seen = []
    with TaskGroup(policy=FirstSuccess(), **workers(2)) as group:
        for value in group.imap_unordered(second_wins, itertools.count(), window=2):
            seen.append(value)

    assert seen == [1]
    assert group.winner.result() == 1
    assert group.winner.name == "second_wins[1]"
    assert calls.told == [0]


def test_call_that_raises_stop_iteration_ends_nothing_silently(stream, workers):
    """
    A generator cannot raise it, so the consumer hears of it as Python has it; it leaves the block.
    """
    error = StopIteration("bad header")

    def fails(number):
        raise error

    with pytest.raises(StopIteration) as left, TaskGroup(**workers(1)) as group:
        _, raised = drain(stream(group, fails, [1]))

    assert left.value is error
    assert type(raised) is RuntimeError
    assert raised.__cause__ is error


@pytest.mark.parametrize("policy", [None, CollectAll()])
def test_one_call_that_is_cancelled_ends_the_stream(stream, workers, policy):
    """
    Whoever has its handle may do that; it is no failure, and no end that looks like any other.
    """

    def observer(event):
        if event.name == "task_started" and event.task.name == "resize[2]":
            event.task.cancel("enough")

    @cancellable
    def checks(token, number):
        token.check()
        return number

    checks.__name__ = "resize"
    with TaskGroup(policy=policy, observers=[observer], **workers(1)) as group:
        taken, raised = drain(stream(group, checks, iter(range(10)), window=1))
        after = group.submit(resize, 404).result()

    assert taken == [0, 1]
    assert type(raised) is TaskCancelledError
    assert raised.reason == "enough"
    assert after == 404
    assert group.failures == ()


# --- A group that ends --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Numbers, range])
@pytest.mark.parametrize("how", ["left", "cancelled"])
def test_suspended_stream_of_a_group_that_ended_says_so(stream, workers, how, kind):
    """
    What is ready is handed out, and then it is refused; it never looks like its end.
    """
    numbers = Numbers(100, enough=5)

    def waits(number):
        if kind is Numbers:
            numbers.are_enough.wait(LIMIT)
        return number

    with TaskGroup(name="feed", **workers(2)) as group:
        values = stream(group, waits, numbers if kind is Numbers else range(100), window=5)
        taken = [next(values)]
        group.wait()
        if how == "cancelled":
            group.cancel("rain")
            rest, raised = in_another_thread(values)
    if how == "left":
        rest, raised = drain(values)

    assert sorted([*taken, *rest]) == list(range(len(taken) + len(rest)))
    assert len(rest) == 4
    assert type(raised) is GroupClosedError
    assert "rain" in str(raised) if how == "cancelled" else "ended" in str(raised)


def test_suspended_stream_of_a_cancelled_group_hears_so_in_its_body(stream, workers):
    """
    What is ready is handed out, and then it raises `Cancelled`.
    """
    with TaskGroup(**workers(2)) as group:
        values = stream(group, resize, itertools.count(), window=5)
        first = next(values)
        group.wait()
        group.cancel("rain")
        rest, raised = drain(values)

    assert sorted([first, *rest]) == list(range(1 + len(rest)))
    assert type(raised) is Cancelled
    assert raised.reason == "rain"


def test_stream_whose_calls_never_started_says_so(stream, workers):
    """
    They were cancelled with their group.
    """
    numbers = Numbers(10, enough=4)
    release = threading.Event()

    def waits(number):
        numbers.are_enough.wait(LIMIT)
        if number:
            release.wait(LIMIT)
        return number

    with TaskGroup(**workers(1)) as group:
        values = stream(group, waits, numbers, window=4)
        first = next(values)
        group.cancel("rain")
        release.set()
    rest, raised = drain(values)

    assert [first, *rest] in ([0], [0, 1])
    assert type(raised) is TaskCancelledError
    assert raised.reason == "rain"


def test_waiting_consumer_wakes_as_the_group_is_cancelled(stream, workers, watched):
    """
    In another thread, whose token is not set, it hears what became of the calls.
    """
    calls = Calls(quick=0)

    with TaskGroup(**workers(1)) as group:
        consumer, outcome = start(drain, stream(group, calls.call, itertools.count(), window=3))
        assert calls.asleep.acquire(timeout=LIMIT)
        until(lambda: is_asleep(consumer))
        group.cancel("rain")
        taken, raised = joined(consumer, outcome)

    assert taken == []
    assert type(raised) is TaskCancelledError
    assert calls.told == calls.begun == [0]


def test_consumers_own_token_ends_its_wait(stream, workers, watched):
    """
    The stream's tasks are told, its input is closed, and the group goes on.
    """
    calls = Calls(quick=0)
    numbers = Numbers()
    token = CancelToken()

    def consume():
        with use_token(token):
            return drain(stream(group, calls.call, numbers, window=3))

    with TaskGroup(**workers(2)) as group:
        consumer, outcome = start(consume)
        for _ in range(2):
            calls.asleep.acquire(timeout=LIMIT)
        until(lambda: is_asleep(consumer))
        token.cancel("enough")
        taken, raised = joined(consumer, outcome)
        group.wait()
        after = group.submit(resize, 404).result()

    assert taken == []
    assert type(raised) is Cancelled
    assert raised.reason == "enough"
    assert sorted(calls.told) == sorted(calls.begun) == [0, 1]
    assert numbers.closed
    assert after == 404


def test_deadline_of_the_group_ends_the_stream(stream, workers):
    """
    The loop hears of it, and the block raises what a deadline does.
    """
    calls = Calls(quick=3)
    heard = []

    with (
        pytest.raises(TimeoutError, match="timed out"),
        TaskGroup(timeout=0.05, **workers(1)) as group,
    ):
        try:
            for _ in stream(group, calls.call, itertools.count(), window=2):
                pass
        except Cancelled as error:
            heard.append(type(error.reason))
            raise

    assert heard == [TimeoutError]


def test_waiting_consumer_wakes_as_its_group_is_abandoned(stream, watched):
    """
    It does not wait for what was left behind.
    """
    begun, release = threading.Event(), threading.Event()

    def stuck(number):
        begun.set()
        release.wait(LIMIT)

    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(StuckTaskError),
        TaskGroup(1, grace=0.01, on_stuck="abandon") as group,
    ):
        consumer, outcome = start(drain, stream(group, stuck, [0]))
        assert begun.wait(LIMIT)
        until(lambda: is_asleep(consumer))
        group.cancel("rain")
    taken, raised = joined(consumer, outcome)
    waits = release.is_set()
    release.set()

    assert not waits
    assert taken == []
    assert type(raised) is TaskCancelledError


# --- Who else looks -----------------------------------------------------------------------------


def test_observers_are_told_of_every_call(stream, workers):
    """
    By a handle that goes on answering after its value was handed out.
    """
    events = []

    def fetch(number):
        return number * 2

    with TaskGroup(observers=[events.append], **workers(2)) as group:
        values = sorted(stream(group, fetch, iter(range(600)), window=5))

    named = {}
    for event in events:
        if event.task is not None:
            named.setdefault(event.task.name, []).append(event.name)
    ended = [event.task for event in events if event.name == "task_succeeded"]
    assert values == list(range(0, 1200, 2))
    assert set(named) == {f"fetch[{number}]" for number in range(600)}
    assert all(
        names == ["task_submitted", "task_started", "task_succeeded"] for names in named.values()
    )
    assert {task.name: task.result() for task in ended} == {
        f"fetch[{number}]": number * 2 for number in range(600)
    }


def test_observers_are_told_of_what_a_closed_stream_cancelled(stream, workers):
    """
    Each call that was submitted ends once.
    """
    events = []
    calls = Calls(company=2)

    with TaskGroup(observers=[events.append], **workers(3)) as group:
        values = stream(group, calls.call, itertools.count(), window=6)
        next(values)
        values.close()

    def names(what):
        return sorted(event.task.name for event in events if event.name == what)

    submitted = names("task_submitted")
    assert submitted == [f"call[{number}]" for number in range(len(submitted))]
    assert len(submitted) >= 3
    assert names("task_started") == submitted[: len(calls.begun)]
    assert names("task_succeeded") == ["call[0]"]
    assert names("task_cancelled") == submitted[1:]
    assert "group_cancelled" not in {event.name for event in events}


def test_calls_are_counted_on(stream, workers):
    """
    The name of a task has the number of its item, however many there were before.
    """

    def fetch(number):
        if number == 300:
            raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header") as left, TaskGroup(**workers(2)) as group:
        for _ in stream(group, fetch, itertools.count(), window=5):
            pass

    assert [failure.task.name for failure in group.failures] == ["fetch[300]"]
    assert "fetch[300]" in left.value.__notes__[0]


# --- Several at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [None, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_two_streams_of_one_group_are_taken_in_turns(stream, workers, count, bound):
    """
    Neither waits for the other.
    """
    with TaskGroup(max_queued=bound, **workers(count)) as group:
        left = stream(group, resize, iter(range(300)), window=3)
        right = stream(group, operator.neg, range(300), window=7)
        pairs = list(zip(left, right, strict=True))

    assert sorted(one for one, _ in pairs) == list(range(300))
    assert sorted(other for _, other in pairs) == list(range(-299, 1))


@pytest.mark.parametrize("where", ["body", "task"])
@pytest.mark.parametrize("bound", [None, 1, 10])
@pytest.mark.parametrize("count", [1, 3])
def test_stream_is_the_input_of_another(stream, workers, count, bound, where):
    """
    Each value of the one becomes a call of the other, in the same group.
    """

    def consume():
        inner = stream(group, operator.neg, iter(range(100)), window=4)
        return sorted(stream(group, operator.neg, inner, window=3))

    with TaskGroup(max_queued=bound, **workers(count)) as group:
        values = consume() if where == "body" else group.submit(consume).result()

    assert values == list(range(100))


def test_leaving_a_stream_closes_the_one_it_reads(stream, workers):
    """
    And that one its own input.
    """
    numbers = Numbers()
    calls = Calls(quick=3)

    with TaskGroup(**workers(5)) as group:
        inner = stream(group, calls.call, numbers, window=4)  # one worker is left for the other
        for value in stream(group, resize, inner, window=1):
            if value == 2:
                break
        closed, taken = numbers.closed, numbers.taken
        group.wait()

    assert closed
    assert numbers.taken == taken
    assert sorted(calls.told) == sorted(calls.begun)[3:]


def test_failure_further_in_comes_out_of_the_stream_that_reads_it(stream, workers):
    """
    As the object that it is, recorded for its task alone.
    """
    error = ValueError("bad header")

    def fails(number):
        if number == 5:
            raise error
        return number

    with suppress(ValueError), TaskGroup(**workers(1)) as group:
        inner = stream(group, fails, iter(range(10)), window=1)
        taken, raised = drain(stream(group, resize, inner, window=1))

    assert taken == [0, 1, 2, 3, 4]
    assert raised is error
    assert [(failure.task.name, failure.exception) for failure in group.failures] == [
        ("fails[5]", error)
    ]


# --- A bounded queue ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generator", "range"])
@pytest.mark.parametrize("bound", [1, 2, 10])
def test_stream_reads_only_as_there_is_room(stream, workers, watched, bound, kind):
    """
    While the workers are at something else no more calls than the bound are queued.
    """
    release, wait = gates(1)
    submitted = []

    def observer(event):
        if event.name == "task_submitted" and event.task.name.startswith("resize"):
            submitted.append(event.task)

    with TaskGroup(max_queued=bound, observers=[observer], **workers(1)) as group:
        until(group.submit(wait, 0).running)
        values = stream(group, resize, INPUTS[kind](50), window=20)
        consumer, outcome = start(drain, values)
        until(lambda: is_asleep(consumer))
        queued = len(submitted)
        release[0].set()
        taken, raised = joined(consumer, outcome)

    assert queued == bound
    assert sorted(taken) == list(range(50))
    assert raised is None


def test_input_is_not_read_while_the_queue_is_full(stream, workers, watched):
    """
    Not even its first item.
    """
    release, wait = gates(1)
    numbers = Numbers(20)

    with TaskGroup(max_queued=2, **workers(1)) as group:
        until(group.submit(wait, 0).running)
        others = [group.submit(resize, number) for number in range(2)]
        consumer, outcome = start(drain, stream(group, resize, numbers, window=5))
        until(lambda: is_asleep(consumer))
        taken_early = numbers.taken
        release[0].set()
        taken, raised = joined(consumer, outcome)

    assert taken_early == 0
    assert sorted(taken) == list(range(20))
    assert raised is None
    assert [task.result() for task in others] == [0, 1]


def test_full_queue_does_not_hold_up_the_next_value(stream, workers, watched):
    """
    Who waits for room is told of a value as well.
    """
    release, wait = gates(2)

    with TaskGroup(max_queued=1, **workers(1)) as group:
        values = stream(group, wait, iter(range(2)), window=5)
        consumer, outcome = start(next, values)
        until(lambda: is_asleep(consumer))
        others = []
        submitter, _ = start(lambda: others.append(group.submit(resize, 404)))
        until(lambda: others or is_asleep(submitter))
        release[0].set()
        first = joined(consumer, outcome)
        release[1].set()
        submitter.join(LIMIT)
        rest = list(values)

    assert [first, *rest] == [0, 1]
    assert others[0].result() == 404


class FullAtSecond:
    """
    An input of two, the second of which finds the queue full that the first one found empty.

    Args:
        group: Has one worker, and room for one.
        ready: Waits before the queue is filled.
    """

    def __init__(self, group, ready=lambda: None):
        self.group = group
        self.ready = ready
        self.release = threading.Event()
        self.full = self.closed = False

    def __iter__(self):
        try:
            variable.set("first")
            yield 0
            self.ready()
            until(self.group.submit(self.release.wait, LIMIT).running)
            self.group.submit(resize, 404)
            variable.set("second")
            self.full = True
            yield 1
        finally:
            self.closed = True


def test_item_that_waits_for_room_holds_up_no_value(stream, workers):
    """
    It is kept, with the context that it was read in, and its call submitted when there is room.
    """

    def consume():
        values = stream(group, lambda number: (number, variable.get()), items, window=5)
        first = next(values)
        variable.set("body")
        items.release.set()
        return [first, *values]

    with TaskGroup(max_queued=1, **workers(1)) as group:
        items = FullAtSecond(group)
        consumer, outcome = start(consume)
        try:
            taken = joined(consumer, outcome)
        finally:
            items.release.set()

    assert taken == [(0, "first"), (1, "second")]
    assert items.closed


def test_cancel_while_an_item_waits_for_room_closes_the_input(stream, watched):
    """
    The stream ends as the group does, though nobody makes room.
    """
    begun = threading.Event()

    def call(number):
        begun.set()
        fastpool.sleep(60)

    with TaskGroup(2, max_queued=1) as group:
        items = FullAtSecond(group, lambda: begun.wait(LIMIT))
        consumer, outcome = start(drain, stream(group, call, items, window=5))
        until(lambda: items.full and is_asleep(consumer))
        group.cancel("rain")
        taken, raised = joined(consumer, outcome)
        items.release.set()

    assert taken == []
    assert type(raised) is TaskCancelledError
    assert raised.reason == "rain"
    assert items.closed


def test_group_that_ends_as_a_stream_is_to_wait_for_room_says_so(stream, monkeypatch):
    """
    There is nothing to wait for then; the values that were there come first.
    """
    release, wait = gates(2)
    looked, ended = threading.Event(), threading.Event()
    room = Run.room

    def look(run, fn, entry, most=1, *, waits=True):
        found = room(run, fn, entry, most, waits=waits)
        if not (found or looked.is_set()):
            looked.set()
            assert ended.wait(LIMIT)
        return found

    with TaskGroup(1, max_queued=1) as group:
        until(group.submit(wait, 0).running)
        values = stream(group, wait, [1, 1, 1], window=3)
        monkeypatch.setattr(Run, "room", look)
        consumer, outcome = start(drain, values)
        assert looked.wait(LIMIT)
        for event in release:
            event.set()
    ended.set()
    taken, raised = joined(consumer, outcome)

    assert taken == [1]
    assert type(raised) is GroupClosedError


@pytest.mark.parametrize("reader", ["imap", "imap_unordered", "submit"])
def test_what_a_reader_runs_as_it_waits_for_room_holds_up_no_other(reader, watched):
    """
    Room that comes meanwhile is for the next in line, for whom that call may wait.
    """
    begun, go, helps, release, submitted = (threading.Event() for _ in range(5))
    helped = []

    def call(number):
        if number == 0:
            assert go.wait(LIMIT)
            helped[0].result()
        elif number == 1:
            begun.set()
            assert release.wait(LIMIT)
        return number

    def consume():
        if reader == "submit":
            return sorted(task.result() for task in [group.submit(call, n) for n in range(4)])
        return sorted(getattr(group, reader)(call, range(4), window=4))

    def waits_for_the_submitter():
        helps.set()
        return submitted.wait(LIMIT)

    def submit():
        group.submit(resize, 404)
        submitted.set()

    with TaskGroup(2, max_queued=1) as group, TaskGroup(1) as others:
        consumer = others.submit(consume)
        # Calls 0 and 1 are running, 2 is queued, and 3 finds no room.
        assert begun.wait(LIMIT)
        until(lambda: len(group._run.queue) == 1)
        # The reader is the only worker there is for what call 0 waits for.
        helped.append(others.submit(waits_for_the_submitter))
        go.set()
        assert helps.wait(LIMIT)
        submitter, _ = start(submit)
        until(lambda: is_asleep(submitter))
        release.set()  # a worker takes call 2

    submitter.join(LIMIT)

    assert helped[0].result() is True
    assert consumer.result() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["generator", "range"])
@pytest.mark.parametrize("where", ["body", "group in a task"])
@pytest.mark.parametrize("bound", [1, 2])
def test_bounded_queue_does_not_keep_workers_idle(stream, workers, bound, where, kind):
    """
    There is room again as soon as a worker takes a call, and the next one is read then.
    """
    together = threading.Barrier(4)

    def consume():
        with TaskGroup(4, max_queued=bound) as group:
            values = stream(group, lambda _: together.wait(LIMIT), INPUTS[kind](40), window=8)
            return sorted(values)

    if where == "body":
        places = consume()
    else:
        with TaskGroup(**workers(1)) as outer:
            places = outer.submit(consume).result()

    assert places == sorted([0, 1, 2, 3] * 10)


@pytest.mark.parametrize("bound", [1, 10])
@pytest.mark.parametrize("count", [1, 3])
def test_task_takes_values_through_a_full_queue(stream, workers, count, bound):
    """
    What a task submits to its own group never waits for room.
    """

    def consume():
        return sum(stream(group, resize, iter(range(200)), window=5))

    with TaskGroup(max_queued=bound, **workers(count)) as group:
        tasks = [group.submit(consume) for _ in range(3)]

    assert [task.result() for task in tasks] == [sum(range(200))] * 3


@pytest.mark.parametrize("read", ["imap", "imap_unordered", "map"])
def test_input_may_submit_to_the_group_it_is_read_for(workers, read):
    """
    The reader keeps no room while it reads.
    """
    tasks = []

    def inputs():
        for number in range(50):
            tasks.append(group.submit(resize, number))
            yield number

    with TaskGroup(1, max_queued=1) as group:
        values = list(getattr(group, read)(operator.neg, inputs()))

    assert sorted(values) == list(range(-49, 1))
    assert [task.result() for task in tasks] == list(range(50))


@pytest.mark.parametrize("outer", ["imap", "imap_unordered", "map"])
def test_stream_is_read_through_a_full_queue(stream, outer):
    """
    By another one, or by a map, of the same group.
    """
    with TaskGroup(1, max_queued=1) as group:
        inner = stream(group, resize, range(100), window=2)
        values = sorted(getattr(group, outer)(resize, inner))

    assert values == list(range(100))


def test_wait_for_room_ends_as_the_group_is_cancelled(stream, workers, watched):
    """
    A stream that has read nothing yet is refused.
    """
    release, wait = gates(1)
    numbers = Numbers()

    with TaskGroup(max_queued=1, **workers(1)) as group:
        until(group.submit(wait, 0).running)
        group.submit(resize, 404)
        consumer, outcome = start(drain, stream(group, resize, numbers))
        until(lambda: is_asleep(consumer))
        group.cancel("rain")
        taken, raised = joined(consumer, outcome)
        release[0].set()

    assert taken == []
    assert type(raised) is GroupClosedError
    assert numbers.taken == 0


# --- Ctrl-C -------------------------------------------------------------------------------------


def announced(ready):
    """Numbers, of which the first says that it is read, and the last that no more are."""
    try:
        ready()
        yield from itertools.count()
    finally:
        print("closed", flush=True)


def waits_in_order(group, ready):
    for _ in group.imap(lambda _: fastpool.sleep(60), announced(ready)):
        raise AssertionError("nothing is to come")


def waits_for_any(group, ready):
    for _ in group.imap_unordered(lambda _: fastpool.sleep(60), announced(ready)):
        raise AssertionError("nothing is to come")


def goes_round(group, ready):
    for _ in group.imap(abs, announced(ready)):
        pass


def goes_round_unordered(group, ready):
    for _ in group.imap_unordered(abs, announced(ready)):
        pass


@pytest.mark.parametrize("body", [waits_in_order, waits_for_any])
def test_ctrl_c_ends_the_wait_for_a_value(body):
    """
    It is raised there, the input is closed and the tasks are told.
    """
    assert in_child(body) == "closed\ninterrupted\n"


@pytest.mark.parametrize("body", [goes_round, goes_round_unordered])
def test_ctrl_c_ends_a_loop_that_never_waits_long(body):
    """
    Wherever in the stream it comes.
    """
    assert in_child(body, asleep=False) == "closed\ninterrupted\n"


# --- Many of them -------------------------------------------------------------------------------


def test_no_wake_up_is_lost(stream, workers, hasty):
    """
    The consumer falls asleep and is woken for every value.
    """
    with TaskGroup(**workers(2)) as group:
        values = list(stream(group, resize, iter(range(1500)), window=1))

    assert values == list(range(1500))


@pytest.mark.parametrize("seed", range(4))
def test_streams_of_all_kinds_lose_nothing(workers, hasty, seed):
    """
    Slow calls and quick ones, windows and bounds, consumers in the body and in tasks.
    """
    chance = random.Random(seed)

    def work(number):
        if number % 97 == 0:
            fastpool.sleep(0.001)
        return number

    def consume(name, count, window, most):
        items = iter(range(count)) if count % 2 else range(count)
        values = itertools.islice(getattr(group, name)(work, items, window=window), most)
        taken = list(values)
        assert len(set(taken)) == len(taken) == min(count, most)
        if name == "imap":
            assert taken == list(range(len(taken)))
        return len(taken) if most < count else sum(taken)

    def plan():
        count = chance.randrange(200, 700)
        most = count if chance.random() < 0.7 else chance.randrange(count)
        name = chance.choice(["imap", "imap_unordered"])
        return name, count, chance.choice([1, 2, 7, 300]), most

    bound = chance.choice([None, 1, 10])
    with TaskGroup(max_queued=bound, **workers(chance.choice([1, 2, 4]))) as group:
        plans = [plan() for _ in range(6)]
        tasks = [group.submit(consume, *each) for each in plans[2:]]
        here = [consume(*each) for each in plans[:2]]
        taken = here + [task.result() for task in tasks]

    assert taken == [most if most < count else sum(range(count)) for _, count, _, most in plans]


# --- The cancel of who reads ----------------------------------------------------------------------


@pytest.mark.parametrize("call", ["imap", "imap_unordered", "map"])
def test_cancel_of_the_task_that_reads_is_no_failure(call):
    """
    Its `Cancelled` comes through the input, and is its own all the same.
    """
    reads, release = threading.Event(), threading.Event()

    def items():
        yield 1
        reads.set()
        fastpool.sleep(3600)

    with TaskGroup(3) as group:
        other = group.submit(release.wait, LIMIT)
        consumer = group.submit(lambda: list(getattr(group, call)(abs, items())))
        assert reads.wait(timeout=LIMIT)
        consumer.cancel("enough")
        consumer.wait(timeout=LIMIT)
        release.set()

    assert consumer.cancelled()
    assert other.result() is True
    assert group.failures == ()


def test_scope_that_expires_as_the_input_blocks_is_no_failure(stream):
    """
    It is a `TimeoutError` of the consumer's, who may handle it; the group goes on.
    """

    def items():
        yield 1
        current_token()._expire()

        fastpool.checkpoint()

    with TaskGroup(1) as group:
        with pytest.raises(TimeoutError), fastpool.timeout(3600):
            list(stream(group, abs, items()))
        after = group.submit(abs, -1)

    assert after.result() == 1
    assert group.failures == ()


def test_interrupted_submit_of_a_stream_leaves_as_it_is(stream, monkeypatch):
    """
    What a signal handler raises there cancels what has been read, and closes the input.
    """
    closed, started = threading.Event(), threading.Event()

    def items():
        try:
            yield from range(10)
        finally:
            closed.set()

    def sleeps(number):
        started.set()
        current_token().sleep(3600)

    def interrupted(*args):
        assert started.wait(timeout=LIMIT)
        raise InterruptedError("by a handler")

    with TaskGroup(1) as group:
        submit_one = Run.submit_one
        calls = iter([submit_one, submit_one, interrupted])
        monkeypatch.setattr(Run, "submit_one", lambda *args: next(calls)(*args))
        with pytest.raises(InterruptedError, match="by a handler"):
            list(stream(group, sleeps, items(), window=3))

    assert closed.is_set()
    assert group.failures == ()
