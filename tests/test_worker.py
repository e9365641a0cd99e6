"""
What a worker does with each message: one in this process, at real pipes.
"""

import contextvars
import functools
import linecache
import os
import pickle
import threading
import traceback
from contextlib import suppress
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
from blocked import is_blocked
from staging import hidden, start, until

from fastpool import Cancelled, current_token
from fastpool._scope import is_own
from fastpool._token import messages
from fastpool.backends._wire import dump_reason, load_reason
from fastpool.backends._worker import Worker

WHY = dump_reason("why")
done = []  # what calls have left here
kept = []  # contexts, tokens and registrations of calls


class Near:
    """
    The parent's side of a worker.

    Attributes:
        worker: The worker itself.
        shared: What both see.
    """

    def __init__(self):
        self._calls, calls = Pipe()
        self._control, control = Pipe()
        self.shared = SimpleNamespace(at=-1, ordered=False, recalled=False, over=False)
        self.worker = Worker(calls, control, self.shared)
        self._ends = [self._calls, calls, self._control, control]

    def close(self):
        """Leave no descriptor."""
        for end in self._ends:
            end.close()

    def give(self, *calls, run=1, first=0, functions=None):
        """Have the worker run calls, each the key of a function and its arguments."""
        functions = {} if functions is None else functions
        self.worker._answer(pickle.dumps(("run", run, first, None, 60, functions, None, [*calls])))

    def heard(self):
        """What the worker has sent."""
        assert self._calls.poll(60)
        return pickle.loads(self._calls.recv_bytes())

    def silent(self):
        """Whether the worker has sent nothing."""
        return not self._calls.poll()

    def run_alike(self, fn, number=1, first=0):
        """What comes of as many calls of one function, which is all that there is to say."""
        message = "run", 1, first, None, 60, {0: pickle.dumps(fn)}, 0, [()] * number
        self.worker._answer(pickle.dumps(message))
        return self.heard()

    def run(self, *fns, **options):
        """What comes of functions without arguments."""
        functions = {key: pickle.dumps(fn) for key, fn in enumerate(fns)}
        self.give(*((key, ()) for key in functions), functions=functions, **options)
        return self.heard()


@pytest.fixture
def near():
    """A worker, which has been told nothing yet."""
    done.clear()
    kept.clear()
    near = Near()
    yield near
    kept.clear()
    near.close()


def note():
    """Leave a trace."""
    done.append("ran")


def keep_context():
    """Have no token, but a context that has one."""
    kept.append(contextvars.copy_context())


def ask_and_keep_context():
    """Have a token, and a context that has it."""
    current_token()
    keep_context()


def token_of(context):
    """What the context of a call finds, and whether it is this thread's own there."""
    return context.run(current_token), context.run(lambda: is_own(current_token()))


def look_at_the_one_before():
    """At a call that has just ended."""
    token, own = token_of(kept[0])
    done.append((token.cancel(), own))


def look_at_my_own():
    """As a decorated function does."""
    done.append(is_own(current_token()))


def return_lock():
    """What cannot be sent."""
    return threading.Lock()


def fail():
    """Raise."""
    raise LookupError("no")


@pytest.mark.parametrize("run", [Near.run, Near.run_alike])
def test_call_of_a_group_that_was_cancelled_does_not_begin(near, run):
    """
    Though it is the first that has come.
    """
    near.worker._cancel(1, WHY, failed=False)
    word, _, values, outcome = run(near, note)

    assert (word, values, outcome, done) == ("stopped", [], ("cancelled", None), [])


def test_call_that_was_cancelled_itself_does_not_begin(near):
    """
    The one before it runs, and no word is taken for the worker's own by then.
    """
    near.worker._cancel_task(1, WHY)
    word, _, values, outcome = near.run(note, note)

    assert (word, values, outcome, done) == ("stopped", [None], ("cancelled", None), ["ran"])


@pytest.mark.parametrize("number", [0, 1])
def test_call_among_some_alike_that_was_cancelled_does_not_begin(near, number):
    """
    Those before it run.
    """
    near.worker._cancel_task(number, WHY)
    word, _, values, outcome = near.run_alike(note, 3)

    assert (word, values, outcome) == ("stopped", [None] * number, ("cancelled", None))
    assert done == ["ran"] * number


def test_worker_that_is_told_of_orders_waits_for_them(near):
    """
    Until it is told that this was all, by a word that came since.
    """
    near.worker._told.set()
    near.shared.ordered = True
    thread, outcome = start(functools.partial(near.run, note))
    until(lambda: is_blocked(thread.native_id, among=None))
    began_early = bool(done)
    near.worker._cancel_task(0, WHY)
    near.worker._told.set()
    thread.join(60)
    first, (word, _, values, what) = outcome[0], near.heard()

    assert first == ("ordered",)
    assert not near.shared.ordered
    assert not began_early
    assert (word, values, what, done) == ("stopped", [], ("cancelled", None), [])


def test_failure_that_cancels_a_group_is_the_cause_of_what_its_tasks_raise(near):
    """
    And an error that somebody cancels with is but the reason.
    """
    causes = []
    for run, failed in enumerate([True, False]):
        near.worker._cancel(run, dump_reason(LookupError("no")), failed=failed)
        with pytest.raises(Cancelled) as cancelled:
            near.worker._token_of(run).check()
        causes.append(type(cancelled.value.__cause__))
        assert type(cancelled.value.reason) is LookupError

    def cancelled_itself():
        near.worker._cancel_task(0, dump_reason(LookupError("no")))
        try:
            current_token().check()
        except Cancelled as error:
            causes.append(type(error.__cause__))

    near.worker._functions[0] = cancelled_itself
    near.give((0, ()), run=2)

    assert causes == [LookupError, type(None), type(None)]


def test_group_that_a_task_cancels_is_cancelled_here_at_once(near):
    """
    And the parent is told, the first time.
    """
    token = near.worker._token_of(1)

    assert [token.cancel("why"), token.cancel("again")] == [True, False]
    word, run, failed, reason = near.heard()
    assert (word, run, failed, load_reason(reason)) == ("set", 1, False, "why")
    assert near.silent()


def test_word_of_a_cancel_waits_for_no_answer_and_goes_ahead_of_the_next(near):
    """
    Another thread sends one, which may take it long; who cancels goes on.
    """
    near.worker._answering.acquire()
    canceller, outcome = start(functools.partial(near.worker._token_of(1).cancel, "why"))
    canceller.join(20)
    went_on = list(outcome)
    near.worker._answering.release()
    near.worker._send(pickle.dumps(("the next", 0)))

    assert went_on == [True]
    assert [near.heard()[0] for _ in range(2)] == ["set", "the next"]


def test_word_of_a_cancel_in_the_middle_of_an_answer_goes_after_it(near):
    """
    Nobody else would send it before the next one.
    """
    calls = near.worker._calls

    def send_and_cancel(message):
        calls.send_bytes(message)
        near.worker._token_of(1).cancel("why")

    near.worker._calls = SimpleNamespace(send_bytes=send_and_cancel)
    near.worker._send(pickle.dumps(("an answer", 0)))

    assert [near.heard()[0] for _ in range(2)] == ["an answer", "set"]


def test_what_comes_late_is_forgotten(near):
    """
    What is said of a group, with the next one; of a call, with those that come after it.
    """
    near.worker._cancel(1, WHY, failed=False)
    near.worker._cancel_task(4, WHY)
    near.worker._cancel_task(5, WHY)
    near.run(note, run=2, first=5)

    assert list(near.worker._tokens) == [2]
    assert list(near.worker._cancelled) == [5]


def test_function_may_take_the_place_of_another(near):
    """
    Of one that could not be read, and the other way round.
    """
    words = []
    for function in (b"nonsense", pickle.dumps(abs), b"nonsense", pickle.dumps(abs)):
        near.give((0, (-1,)), functions={0: function})
        word, _, values, *_ = near.heard()
        words.append((word, values))

    assert words == [("stopped", []), ("values", [1])] * 2


def test_function_is_called_as_it_was_read_last(near):
    """
    Also where all calls have the same one; one that cannot be read is not.
    """
    for function, said in ((pickle.dumps(abs), "values"), (b"nonsense", "stopped")):
        message = ("run", 1, 0, None, 60, {0: function}, 0, [(-1,)])
        near.worker._answer(pickle.dumps(message))

        assert near.heard()[0] == said


def test_tokens_are_read_in_messages_alone(near):
    """
    Nothing that a task reads by itself finds one.
    """
    near.run(note)

    assert messages.reading is None


def test_values_that_cannot_be_sent_do_not_hide_the_failure_behind_them(near):
    """
    Each comes by itself then.
    """
    word, _, outcomes = near.run(return_lock, fail)

    assert word == "each"
    assert [pickle.loads(outcome)[0] for outcome in outcomes] == ["unsent", "error"]


@pytest.mark.parametrize("when", ["in the same message", "after it", "after many alike"])
def test_context_of_a_call_that_is_over_has_a_token_that_is_over(near, when):
    """
    Though nobody asked for it before.
    """
    if when == "in the same message":
        near.run(keep_context, look_at_the_one_before)
    else:
        (near.run if when == "after it" else near.run_alike)(keep_context)
        look_at_the_one_before()

    assert done == [(False, False)]


def test_token_of_a_call_is_over_with_it(near):
    """
    Also among many alike, which mostly have none.
    """
    near.run_alike(ask_and_keep_context)
    look_at_the_one_before()

    assert done == [(False, False)]


def test_arguments_go_as_their_calls_have_ended(near):
    """
    Though what is kept of the batch is there until the next one.
    """
    near.run(note, note)

    assert near.worker._batch.calls == []


def test_call_has_a_token_of_its_own(near):
    """
    Its thread has made it current.
    """
    near.run(look_at_my_own)

    assert done == [True]


def test_call_ends_when_no_callback_of_its_token_runs_any_more(near):
    """
    Nothing of it comes after.
    """
    goes = threading.Event()

    def callback():
        goes.wait(60)
        done.append("callback")

    def register():
        token = current_token()
        kept.append(token.on_cancel(callback))
        canceller, _ = start(functools.partial(near.worker._cancel_task, 0, WHY))
        canceller.join(60)

    near.worker._functions[0] = register
    thread, _ = start(functools.partial(near.give, (0, ())))
    until(lambda: not near.silent() or is_blocked(thread.native_id, among=None))
    early = not near.silent()
    goes.set()
    thread.join(60)

    assert not early
    assert done == ["callback"]
    assert near.heard()[0] == "values"


def test_word_of_a_call_may_come_when_nothing_runs(near):
    """
    Before the first message, and after the last.
    """
    near.worker._cancel_task(0, WHY)
    near.run(note, first=1)
    near.worker._answer(pickle.dumps(("rest",)))
    near.worker._cancel_task(1, WHY)

    assert done == ["ran"]


def test_child_of_a_fork_says_nothing_and_waits_for_nobody(near):
    """
    Not for the lock either that another thread had as it was forked; nor is the parent misled.
    """

    def speak():
        near.worker._shared.at = 404
        with suppress(OSError):  # it has no pipe
            near.worker._send(b"its answer")
        return near.worker._token_of(1).cancel("why")

    near.worker._answering.acquire()
    near.worker.disown()
    thread, outcome = start(speak)
    thread.join(20)

    assert outcome == [True]
    assert near.shared.at == -1
    for end in (near._calls, near._control):
        with pytest.raises(EOFError):
            end.recv_bytes()


def test_where_the_worker_is_begins_with_its_task(near):
    """
    And is all there is, where it runs none.
    """

    def look():
        thread, outcome = start(near.worker._where)
        thread.join(60)
        done.extend(outcome)

    outermost = traceback.format_stack()[0].partition("\n")[0]  # what comes then may have no source
    look()
    near.worker._functions[0] = look
    near.give((0, ()))
    outside, inside = done

    assert outside.startswith(outermost)
    assert "in look\n" in inside.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    ("known", "error", "told"),
    [(False, SystemExit, True), (True, ValueError, True), (True, SystemExit, False)],
)
def test_where_the_worker_is_can_be_asked_whatever_it_runs(near, monkeypatch, known, error, told):
    """
    Code whose source cannot be had is told without it; at worst nothing is.
    """
    monkeypatch.setattr(linecache, "cache", {})

    def look():
        thread, outcome = start(near.worker._where)
        thread.join(60)
        done.extend(outcome)

    near.worker._functions[0] = functools.partial(hidden(error(), known=known), look)
    near.give((0, ()))
    (where,) = done

    assert where.startswith('  File "hidden.py", line 2, in hidden\n  File ' if told else "")
    assert bool(where) == told


@pytest.mark.parametrize("read", [True, False])
def test_worker_ends_with_its_parent_though_nothing_can_be_cancelled(near, monkeypatch, read):
    """
    It says why, unless that could take for ever, as where nobody reads it.
    """
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(near.worker, "_cancel", lambda *_, **__: 1 // 0)
    near.worker._token_of(1)
    near._control.close()
    there, here = os.pipe()
    os.set_blocking(here, False)
    while not read:
        try:
            os.write(here, b" ")
        except BlockingIOError:
            break
    os.set_blocking(here, True)
    kept = os.dup(2)
    os.dup2(here, 2)
    try:
        thread, _ = start(near.worker.hear)
        thread.join(60)
        hangs = thread.is_alive()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(here)
        with open(there, "rb") as file:
            said = file.read()

    assert not hangs
    assert ends == [1]
    assert (b"\nZeroDivisionError: " in said) == read
