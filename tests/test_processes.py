"""
What is particular to processes: what crosses, who dies, and what is left behind.

What holds on every backend is in test_contract.py.
"""

import contextlib
import functools
import gc
import itertools
import multiprocessing
import operator
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from contextvars import Context, ContextVar
from multiprocessing import forkserver
from types import SimpleNamespace

import far
import pytest
import storm
from blocked import descriptors, is_blocked
from far import VARIABLE, lines, note, seen
from staging import act_at, in_thread, nothing_is_left, start, until

import fastpool
from fastpool import (
    CancelToken,
    CollectAll,
    StuckTaskError,
    TaskGroup,
    WorkerDiedError,
    backends,
)
from fastpool.backends import _process, processes
from fastpool.backends._process import WorkerProcess
from fastpool.backends.processes import Processes


@pytest.fixture(autouse=True, scope="module")
def no_thread_is_left():
    """Workers are kept from test to test, since to start one takes long, and end with the file."""
    yield from nothing_is_left()


@pytest.fixture(scope="module")
def one():
    """A backend with one worker."""
    return Processes(1)


@pytest.fixture(scope="module")
def two():
    """A backend with two workers."""
    return Processes(2)


@pytest.fixture
def no_cloudpickle(monkeypatch):
    """As where it is not installed."""
    monkeypatch.setitem(sys.modules, "cloudpickle", None)


class Unsent:
    """Cannot be pickled."""

    def __init__(self, text):
        self.text = text
        self.lock = threading.Lock()

    def __repr__(self):
        return self.text


def alive(process):
    """Whether a process runs, and is not only waiting to be reaped."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def batched(group, folder, submit):
    """Have what `submit` submits given to the one worker several at a time."""
    hold, go = folder / "hold", folder / "go"
    group.submit(far.begin_and_hold, hold, go)
    seen(hold)
    group.map(far.square, range(64))  # they take no time, so more and more are given at once
    submitted = submit()
    group.map(far.square, range(64))
    note(go)
    return submitted


# --- The backend ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_are_started_either_way(method, begun):
    """
    Values come home, and so does a failure.
    """
    backend = Processes(1, start_method=method)
    with TaskGroup(pool=backend) as group:
        values = group.map(far.square, range(100))
        where = group.submit(far.process)
    with pytest.raises(ValueError, match="no 1"), TaskGroup(pool=backend) as group:
        group.submit(far.fail_at, 1, 1)

    assert values.results() == [number**2 for number in range(100)]
    assert where.result() != os.getpid()


def test_backend_is_found_where_the_others_are():
    """
    Under `fastpool.backends`, whose other names are unknown.
    """
    assert backends.Processes is Processes
    assert isinstance(Processes(1), backends.Backend)
    with pytest.raises(AttributeError, match="Treads"):
        backends.Treads  # noqa: B018 # to look it up is what is tried


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"workers": 0}, ValueError, "between 1 and 10000, not 0"),
        ({"workers": -1}, ValueError, "between 1 and 10000, not -1"),
        ({"workers": 10_001}, ValueError, "between 1 and 10000, not 10001"),
        ({"workers": True}, TypeError, "whole number, not True"),
        ({"workers": 2.0}, TypeError, r"whole number, not 2\.0"),
        ({"workers": "2"}, TypeError, "whole number, not '2'"),
        ({"start_method": "fork"}, ValueError, "forkserver or spawn, not 'fork'; fork copies"),
        ({"start_method": "thread"}, ValueError, "forkserver or spawn, not 'thread'"),
        ({"initializer": "start"}, TypeError, "initializer must be a function, not 'start'"),
        ({"initializer": int, "initargs": (threading.Lock(),)}, TypeError, "initargs.*lock"),
        ({"kill_after": float("nan")}, ValueError, "kill_after"),
        ({"kill_after": "3"}, TypeError, "kill_after"),
        ({"context_vars": [ContextVar("local")]}, ValueError, "'local'.*is not a module's"),
        ({"context_vars": ["VARIABLE"]}, TypeError, "must be context variables, not 'VARIABLE'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, kind, says):
    """
    At once, showing the value.
    """
    with pytest.raises(kind, match=says):
        Processes(**arguments)


def test_ten_thousand_workers_are_not_too_many():
    """
    There are as many as tasks need them.
    """
    assert Processes(10_000).slots == 10_000


def test_initializer_that_cannot_be_sent_is_refused(no_cloudpickle):
    """
    At once, and by name.
    """
    with pytest.raises(TypeError, match="<lambda>"):
        Processes(1, initializer=lambda: None)


@pytest.mark.parametrize("error", [ConnectionResetError("it has gone"), EOFError("it has gone")])
@pytest.mark.parametrize("returns", [True, False])
def test_server_that_dies_is_waited_for_until_it_can_be_replaced(returns, error, monkeypatch):
    """
    For some seconds, by one that does not import the main script; what it says then leaves.
    """
    slept = []

    class Started:
        """Stands for a worker."""

        def __init__(self, context, start):
            if not returns or sum(slept) < 2:
                raise error

    server = forkserver._forkserver
    monkeypatch.setattr(server, "_preload_modules", ["__main__"])
    monkeypatch.setattr(_process, "WorkerProcess", Started)
    monkeypatch.setattr(_process, "time", SimpleNamespace(sleep=slept.append))
    backend = Processes(1, start_method="forkserver")
    if returns:
        assert isinstance(backend.start_worker(), Started)
    else:
        with pytest.raises(type(error), match="it has gone"):
            backend.start_worker()

    assert 2 <= sum(slept) < 10
    assert server._preload_modules == [_process.SERVER]


@pytest.mark.parametrize(
    ("listed", "preloads"), [(["__main__"], True), ([_process.SERVER], True), (["json"], False)]
)
def test_server_imports_us_unless_the_program_has_a_list_of_its_own(monkeypatch, listed, preloads):
    """
    So that a worker does not begin with that.
    """
    lists = []
    context = SimpleNamespace(set_forkserver_preload=lists.append)
    monkeypatch.setattr(forkserver._forkserver, "_preload_modules", listed)
    told = _process._preload(context)

    assert told == preloads
    assert lists == ([["__main__", _process.SERVER]] if listed == ["__main__"] else [])


def test_answer_to_an_earlier_question_leaves_the_later_ones_unanswered():
    """
    A worker that is slow to report is asked no more, once there are many of them.
    """
    control = SimpleNamespace(recv_bytes=lambda: pickle.dumps((1, "where")))
    asked = SimpleNamespace(control=control, _unanswered=deque([1, 2]))
    answer = WorkerProcess._hear_where(asked)

    assert answer == (1, "where")
    assert [*asked._unanswered] == [2]


def test_workers_serve_one_group_after_another(two):
    """
    They are kept, so a group finds those of the one before.
    """
    workers = []
    for _ in range(3):
        with TaskGroup(pool=two) as group:
            batch = group.map(far.process, range(40))
        workers.append(set(batch.results()))

    assert len(set.union(*workers)) <= 2


def test_cancel_reaches_workers_that_have_just_rested(tmp_path):
    """
    Whatever a worker is told as it comes to rest, it hears of the next cancel.
    """
    backend = Processes(4, kill_after=1)
    cleaned = []
    for number in range(40):
        begun, ended = tmp_path / f"begun-{number}", tmp_path / f"ended-{number}"
        with TaskGroup(pool=backend) as group:
            for task in [group.submit(far.square, 3) for _ in range(4)]:
                task.result()
            for _ in range(4):
                group.submit(far.waits, "sleep", begun, ended)
            seen(begun, 4)
            group.cancel()
        cleaned.append(len(lines(ended)))

    assert cleaned == [4] * 40


@pytest.mark.parametrize("what", ["value", "argument", "function"])
def test_idle_worker_keeps_nothing_alive(one, what, begun):
    """
    What it was given and what it returned is dropped there, and its functions with the group.
    """
    with TaskGroup(pool=one) as group:
        worker = str(group.submit(far.process).result())
        if what == "value":
            group.submit(far.Traced, begun)
        elif what == "argument":
            group.submit(far.worker_of, far.Traced(begun))
        else:
            group.submit(far.Traced(begun).method)
        group.wait()
        if what != "function":
            until(lambda: worker in lines(begun))
            dropped = worker in lines(begun)
    until(lambda: worker in lines(begun))

    assert what == "function" or dropped
    assert worker in lines(begun)
    assert alive(worker)


def test_worker_does_not_collect_the_methods_that_it_was_sent(one, begun):
    """
    Each access makes another one, with an object of its own over there.
    """
    with TaskGroup(pool=one) as group:
        for _ in range(1_000):
            worker = group.submit(far.Traced(begun).method).result()
        dropped = lines(begun).count(str(worker))

    assert dropped > 500


def test_backend_serves_two_groups_at_once(one, begun, release):
    """
    The one does not wait for the other.
    """
    with TaskGroup(pool=one) as first:
        held = first.submit(far.begin_and_hold, begun, release, "first")
        seen(begun)
        with TaskGroup(pool=one) as second:
            other = second.submit(far.echo, "second")
        note(release)

    assert (held.result(), other.result()) == ("first", "second")


def test_initializer_runs_once_in_each_worker(begun):
    """
    Before the first task, with its arguments; not again for the next group.
    """
    backend = Processes(2, initializer=far.start_with, initargs=(begun, "licence", 7))
    workers = set()
    for _ in range(2):
        with TaskGroup(pool=backend) as group:
            workers.update(group.map(far.process, range(50)).results())

    noted = Counter(lines(begun))
    assert set(noted) >= {f"{worker} ('licence', 7)" for worker in workers}
    assert set(noted.values()) == {1}


def test_initializer_that_raises_is_what_leaves():
    """
    One error, with its traceback there; nothing starts worker after worker.
    """
    backend = Processes(2, initializer=far.start_badly, initargs=("no licence",))
    with pytest.raises(LookupError, match="no licence") as raised, TaskGroup(pool=backend) as group:
        batch = group.map(far.square, range(100))

    assert any("in start_badly" in note for note in raised.value.__notes__)
    assert not any(task.exception() is None for task in batch.tasks if not task.cancelled())


def test_initializer_that_ends_the_process_is_what_leaves():
    """
    The error says how it ended, after a few tries.
    """
    backend = Processes(1, initializer=far.die_at_start)
    with pytest.raises(WorkerDiedError, match="exit code 5"), TaskGroup(pool=backend) as group:
        group.submit(far.square, 3)


def test_initializer_that_does_not_end_is_killed_with_its_worker(begun, monkeypatch):
    """
    A cancel does not wait for it longer than for a task, and no other one is started.
    """
    started = []
    start_worker = Processes.start_worker
    monkeypatch.setattr(
        Processes,
        "start_worker",
        lambda backend: started.append(backend) or start_worker(backend),
    )
    backend = Processes(1, initializer=far.stubborn, initargs=(begun,), kill_after=0.05)
    with TaskGroup(pool=backend) as group:
        task = group.submit(far.square, 3)
        (worker,) = seen(begun)
        group.cancel()

    assert task.cancelled()
    assert started == [backend]
    until(lambda: not alive(worker))
    assert not alive(worker)


# --- What crosses ---------------------------------------------------------------------------------


def test_huge_arguments_and_values_cross_both_ways_at_once(two):
    """
    Neither side waits for the other to read.
    """
    data = bytes(100_000_000)
    with TaskGroup(pool=two) as group:
        tasks = [group.submit(far.both_ways, data) for _ in range(2)]
        correct = [task.result() == (len(data), data) for task in tasks]

    assert correct == [True, True]


@pytest.mark.parametrize(
    ("fn", "arguments", "says", "cause"),
    [
        (
            far.echo,
            lambda number: (threading.Lock() if number == 30 else number,),
            r"the arguments of task 'echo\[30\]' cannot be sent to a worker process: .*lock",
            TypeError,
        ),
        (
            far.echo,
            lambda number: (far.UnloadableThere() if number == 30 else number,),
            r"the arguments of task 'echo\[30\]' cannot be read in its worker process: .*refuses",
            pickle.UnpicklingError,
        ),
        (
            far.lock_or,
            lambda number: (number, 30),
            r"task 'lock_or\[30\]' returned a lock, which cannot be sent back .*pickle",
            type(None),
        ),
        (
            far.unloadable_or,
            lambda number: (number, 30),
            r"task 'unloadable_or\[30\]' returned .*refuses to be read",
            type(None),
        ),
    ],
)
def test_what_cannot_cross_fails_its_task_and_no_other(one, fn, arguments, says, cause, tmp_path):
    """
    The error says which it is, and why, with the error that it led to where it was read or written
    here; the others of the batch have their values.
    """
    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(pool=one, policy=CollectAll()) as group,
    ):
        batch = batched(
            group,
            tmp_path,
            lambda: group.starmap(fn, [arguments(number) for number in range(60)]),
        )

    (error,) = raised.value.exceptions
    assert type(error) is TypeError
    assert type(error.__cause__) is cause
    assert re.search(says, str(error))
    assert batch.tasks[30].exception() is error
    assert [task.result() for at, task in enumerate(batch.tasks) if at != 30] == [
        number for number in range(60) if number != 30
    ]


@pytest.mark.parametrize("bad", [threading.Lock(), far.UnloadableThere()])
def test_function_is_known_though_its_first_call_could_not_cross(one, bad):
    """
    It had come along with that, and so comes again.
    """
    with pytest.raises(ExceptionGroup), TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(far.echo, bad).wait()
        after = group.submit(far.echo, 1)

    assert after.result() == 1


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (far.CallableUnloadable(), "the function of task 'CallableUnloadable' cannot be read"),
        (lambda value: value, r"<lambda>\(\) cannot be sent.*pip install fastpool\[processes\]"),
        (threading.Lock().__enter__, r"__enter__\(\) cannot be sent to a worker process"),
    ],
)
def test_function_that_cannot_cross_fails_its_tasks_and_no_other(
    one, fn, says, no_cloudpickle, tmp_path
):
    """
    Whatever else is on its way with it.
    """

    def submit():
        return [group.submit(fn if at in (5, 9) else far.echo, at) for at in range(20)]

    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(pool=one, policy=CollectAll()) as group,
    ):
        tasks = batched(group, tmp_path, submit)

    assert [type(error) for error in raised.value.exceptions] == [TypeError, TypeError]
    assert all(re.search(says, str(error)) for error in raised.value.exceptions)
    assert [at for at, task in enumerate(tasks) if task.exception()] == [5, 9]
    assert [task.result() for task in tasks if not task.exception()] == [
        at for at in range(20) if at not in (5, 9)
    ]


def test_lambdas_and_closures_cross_by_value(one):
    """
    With cloudpickle, which is asked where pickle fails.
    """
    pytest.importorskip("cloudpickle")
    base = 10

    def local(number):
        return base + number

    @fastpool.cancellable
    def decorated(token, number):
        token.check()
        return base * number

    with TaskGroup(pool=one) as group:
        by_lambda = group.map(lambda number: number + 1, range(3))
        by_closure = group.map(local, range(3))
        by_decorated = group.map(decorated, range(3))

    assert by_lambda.results() == [1, 2, 3]
    assert by_closure.results() == [10, 11, 12]
    assert by_decorated.results() == [0, 10, 20]


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (far.fails_in_two_arguments, r"raised far\.TwoArguments: 7: seven.*missing 1 required"),
        (far.fails_with_lock, r"raised far\.HoldsLock: the disk is full.*cannot pickle .*lock"),
        (far.fails_to_be_read, r"raised far\.ReadThereOnly: where it was.*LookupError: not here"),
    ],
)
def test_exception_that_cannot_cross_is_told_by_class_and_text(one, fn, says):
    """
    The error has them, why it could not come itself, and its traceback there.
    """
    with pytest.raises(TypeError, match=says) as raised, TaskGroup(pool=one) as group:
        group.submit(fn)
    with TaskGroup(pool=one) as group:
        after = group.submit(far.square, 3)

    assert f"task {fn.__name__!r}" in str(raised.value)
    assert any(f"in {fn.__name__}\n" in note for note in raised.value.__notes__)
    assert after.result() == 9


def test_exception_that_says_nothing_comes_home_all_the_same(one):
    """
    Its own code raises where its text and its traceback are asked for.
    """
    with pytest.raises(far.SaysNothing), TaskGroup(pool=one) as group:
        group.submit(far.fails_to_say_anything)
    with TaskGroup(pool=one) as group:
        after = group.submit(far.square, 3)

    assert after.result() == 9


@pytest.mark.parametrize(
    ("reason", "heard"),
    [
        ("rain", "rain"),
        (far.TwoArguments(7, "seven"), "far.TwoArguments: 7: seven"),
        (far.HoldsLock("the disk is full"), "far.HoldsLock: the disk is full"),
        (Unsent("a lock"), "Unsent: a lock"),
        ("rain " * 4000, re.compile(r"str: '?(rain ){9,}")),
    ],
)
def test_reason_that_cannot_cross_is_told_by_class_and_text(one, reason, heard, begun, ended):
    """
    As it is, if it can be sent and is short; else in words.
    """
    with TaskGroup(pool=one) as group:
        group.submit(far.notes_reason, begun, ended)
        seen(begun)
        group.cancel(reason)

    (said,) = seen(ended)
    assert heard.match(said) if isinstance(heard, re.Pattern) else said == heard
    assert len(said) < 16_384


def test_failure_has_the_traceback_of_its_process(one):
    """
    As a note, with the exceptions that led to it.
    """
    with pytest.raises(far.Chained) as raised, TaskGroup(pool=one) as group:
        group.submit(far.fails_with_notes)

    (traceback,) = [note for note in raised.value.__notes__ if "Traceback" in note]
    assert re.search(r"worker process \d+", traceback)
    assert "in fails_with_notes" in traceback
    assert f"fastpool{os.sep}backends" not in traceback
    assert "KeyError: 'where it began'" in traceback


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda group: group, "cannot submit to the group that it runs in"),
        (lambda group: group.submit(int), r"task 'int' cannot be pickled.*result\(\)"),
        (lambda group: CancelToken(), r"CancelToken cannot be pickled.*current_token\(\)"),
        (lambda group: group.token.child(), r"CancelToken cannot be pickled.*current_token\(\)"),
    ],
)
def test_what_belongs_to_this_process_is_refused_with_advice(one, make, says):
    """
    A group, a handle, a token that is not the group's.
    """
    with pytest.raises(TypeError, match=says), TaskGroup(pool=one) as group:
        group.submit(far.echo, make(group))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_tokens_are_pickled_in_messages_only(protocol):
    """
    A group's own token, too.
    """
    with TaskGroup() as group, pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(group.token, protocol)


def test_no_token_can_be_pickled_by_who_observes():
    """
    In the thread that has just written a message.
    """
    refused = []

    def observe(event):
        try:
            pickle.dumps(event.group.token)
        except TypeError:
            refused.append(event.name)

    with TaskGroup(pool=Processes(1), observers=[observe]) as group:
        group.submit(far.square, 3)

    assert "task_succeeded" in refused


def test_function_is_sent_once(one):
    """
    However often it is called.
    """
    sent = []

    class Noted:
        def __call__(self, number):
            """It is another function over there."""

        def __reduce__(self):
            sent.append(self)
            return functools.partial, (far.square,)

    with TaskGroup(pool=one) as group:
        values = [group.submit(noted, 3).result() for noted in [Noted()] * 10]

    assert values == [9] * 10
    assert len(sent) == 1


def test_variables_that_are_named_go_along():
    """
    With what they are set to where the task is submitted; unset ones stay unset.
    """
    backend = Processes(1, context_vars=[VARIABLE, far.UNSET])
    with TaskGroup(pool=backend) as group:
        before = group.submit(far.read_variables)
        reset = VARIABLE.set("here")
        single = group.submit(far.read_variables)
        batch = group.map(operator.call, [far.read_variables] * 3)
        VARIABLE.reset(reset)
        after = group.submit(far.read_variables)

    assert before.result() == after.result() == ("nothing", "unset")
    assert single.result() == ("here", "unset")
    assert batch.results() == [("here", "unset")] * 3


def test_variable_whose_value_cannot_be_sent_fails_the_task():
    """
    By name, as an argument does.
    """
    backend = Processes(1, context_vars=[VARIABLE])
    reset = VARIABLE.set(threading.Lock())
    try:
        with pytest.raises(TypeError, match=r"'echo'.*lock"), TaskGroup(pool=backend) as group:
            group.submit(far.echo, 1)
    finally:
        VARIABLE.reset(reset)


# --- Workers that die -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("SIGKILL", "killed by SIGKILL"),
        ("SIGTERM", "killed by SIGTERM"),
        ("40", "killed by signal 40"),  # which has no name
        ("segfault", "killed by SIGSEGV"),
        ("SIGHUP", "killed by SIGHUP"),  # the lowest
        ("exit 3", "exit code 3"),
        ("exit 0", "exit code 0"),
    ],
)
def test_death_of_a_worker_fails_the_task_that_it_ran(two, way, how, begun, ended):
    """
    The error names task and cause; siblings clean up, and the next group is served.
    """
    says = rf"worker process \d+ died while task 'die_by' ran: {how}"
    with pytest.raises(WorkerDiedError, match=says), TaskGroup(pool=two) as group:
        sibling = group.submit(far.waits, "sleep", begun, ended)
        seen(begun)
        task = group.submit(far.die_by, way)
    with TaskGroup(pool=two) as group:
        after = group.map(far.square, range(10))

    assert type(task.exception()) is WorkerDiedError
    assert sibling.cancelled()
    assert len(lines(ended)) == 1
    assert after.results() == [number**2 for number in range(10)]


def test_death_of_an_idle_worker_is_no_failure(one):
    """
    Another takes its place, in a later group and in one that is open.
    """
    for _ in range(2):
        with TaskGroup(pool=one) as group:
            for _ in range(2):
                worker = group.submit(far.process).result()
                os.kill(worker, signal.SIGKILL)
        with TaskGroup(pool=one) as group:
            after = group.submit(far.process).result()

        assert after != worker


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_program_that_a_task_starts_has_its_ctrl_c(method):
    """
    As that of a thread would, though the worker itself hears none.
    """
    with TaskGroup(pool=Processes(1, start_method=method)) as group:
        blocked, ignored = group.submit(far.interrupts_of_a_program).result()

    assert not blocked
    assert not ignored


def test_task_that_computes_lets_the_thread_in_that_brings_a_cancel():
    """
    Five times as often as threads take turns otherwise.
    """
    with TaskGroup(pool=Processes(1)) as group:
        interval = group.submit(sys.getswitchinterval).result()

    assert interval == pytest.approx(0.001)


def test_death_of_an_idle_worker_is_seen_before_anything_is_sent(release):
    """
    A child of it holds its pipes, and would have the sender of much wait for a reader.
    """
    backend = Processes(1)
    with TaskGroup(pool=backend) as group:
        worker = group.submit(far.leaves_child, release).result()
        os.kill(worker, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{worker}"))  # all its threads have ended, too
        sent = group.submit(len, bytes(10_000_000))
        arrived = sent.wait(timeout=60)
        note(release)

    assert arrived
    assert sent.result() == 10_000_000


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_death_is_seen_though_a_child_of_the_worker_lives_on(method, release):
    """
    It has all that the worker had open, and so the end of that does not tell.
    """
    with (
        pytest.raises(WorkerDiedError, match="killed by SIGKILL"),
        TaskGroup(pool=Processes(1, start_method=method)) as group,
    ):
        group.submit(far.leaves_child, release)
        task = group.submit(far.die_by, "SIGKILL")
        seen_at_once = task.wait(timeout=60)
        note(release)

    assert seen_at_once


def test_answer_that_came_before_the_end_is_taken_though_the_end_alone_was_seen(one, monkeypatch):
    """
    The system looks at one descriptor after the other, and both may come in between.
    """
    workers = []
    await_ = processes._Lane._await

    class Poll:
        """Sees nothing before the answer is there, and then the end alone."""

        def __init__(self):
            self._fds = []

        def register(self, fd, events):
            self._fds.append(fd)

        def poll(self, milliseconds):
            calls, end, _ = self._fds
            multiprocessing.connection.wait([calls], 100)
            workers[-1].kill()
            multiprocessing.connection.wait([end], 100)
            return [(end, select.POLLIN)]

    def noted(lane, run, worker, number, bell, *, shipped=True):
        workers.append(worker)
        return await_(lane, run, worker, number, bell, shipped=shipped)

    with TaskGroup(pool=one) as group:
        before = group.submit(far.process).result()
        group.wait()
        monkeypatch.setattr(processes, "select", SimpleNamespace(poll=Poll, POLLIN=select.POLLIN))
        monkeypatch.setattr(processes._Lane, "_await", noted)
        last = group.submit(far.process)

    assert last.result() == before


def test_worker_that_says_nothing_more_and_lives_on_is_killed(begun, monkeypatch):
    """
    The error says so.
    """
    monkeypatch.setattr(_process, "FAREWELL", 0.1)
    with (
        pytest.raises(WorkerDiedError, match="'closes_all' ran: it does not answer"),
        TaskGroup(pool=Processes(1)) as group,
    ):
        group.submit(far.closes_all, begun)
    (worker,) = lines(begun)

    assert not alive(worker)


def test_call_that_kills_who_reads_it_is_tried_three_times(begun):
    """
    Nothing starts worker after worker.
    """
    backend = Processes(1, initializer=far.note, initargs=(begun,))
    with (
        pytest.raises(WorkerDiedError, match="died before it began a task: killed by SIGKILL"),
        TaskGroup(pool=backend) as group,
    ):
        group.submit(far.echo, far.DeadlyThere())

    assert len(lines(begun)) == 3


def test_death_of_a_starting_worker_is_no_failure(begun, release):
    """
    It has begun no task, so another takes its place.
    """
    backend = Processes(1, initializer=far.begin_and_hold, initargs=(begun, release))
    with TaskGroup(pool=backend) as group:
        task = group.submit(far.square, 3)
        (worker,) = seen(begun)
        os.kill(int(worker), signal.SIGKILL)
        note(release)

    assert task.result() == 9
    assert len(lines(begun)) == 2


def test_death_in_the_middle_of_a_value_fails_the_task_and_runs_it_no_more(one, begun):
    """
    It has run, and what it came to is lost.
    """
    with (
        pytest.raises(WorkerDiedError, match=r"'killed_as_it_writes' .*SIGKILL"),
        TaskGroup(pool=one) as group,
    ):
        group.submit(far.killed_as_it_writes, begun, 200_000_000)
    with TaskGroup(pool=one) as group:
        after = group.submit(far.square, 3)

    assert len(lines(begun)) == 1
    assert after.result() == 9


def test_death_in_the_middle_of_a_batch_runs_nothing_twice(one, begun, tmp_path):
    """
    What had begun has its value or fails; what had not is run by a new worker.
    """

    def submit():
        before = [group.submit(far.noted, begun, number) for number in range(20)]
        dies = group.submit(far.die_by, "SIGKILL")
        after = [group.submit(far.noted, begun, number) for number in range(20, 40)]
        return before, dies, after

    with pytest.raises(ExceptionGroup), TaskGroup(pool=one, policy=CollectAll()) as group:
        before, dies, after = batched(group, tmp_path, submit)

    assert Counter(lines(begun)) == {str(number): 1 for number in range(40)}
    assert "'die_by' ran" in str(dies.exception())
    assert {type(task.exception()) for task in before} <= {type(None), WorkerDiedError}
    assert [task.result() for task in after] == list(range(20, 40))


def test_death_under_collect_all_ends_one_task(two, tmp_path):
    """
    The group goes on with a new worker.
    """
    with pytest.raises(ExceptionGroup) as raised, TaskGroup(pool=two, policy=CollectAll()) as group:
        batch = group.map(operator.call, [far.process] * 20)
        dying = [group.submit(far.die_by, "SIGKILL") for _ in range(3)]
        for task in dying:
            task.wait()
        after = group.map(operator.call, [far.process] * 20)

    failed = [task for task in [*batch.tasks, *dying, *after.tasks] if task.exception()]
    assert all(type(error) is WorkerDiedError for error in raised.value.exceptions)
    assert set(failed) >= set(dying)
    assert set(failed) & set(after.tasks) == set()
    assert len(after.results()) == 20


def test_storm_of_kills_hangs_nothing(tmp_path):
    """
    Whatever the workers are at, every task has its value or a worker that died.
    """
    came = storm.play(30, tmp_path)

    assert came["value"]
    assert came["death"]


# --- Workers that do not stop ---------------------------------------------------------------------


def test_worker_that_does_not_stop_is_killed_and_no_other(begun, ended):
    """
    Its task is cancelled; the sibling's worker cleans up, and serves on.
    """
    backend = Processes(2, kill_after=2)
    with TaskGroup(pool=backend) as group:
        heeds = group.submit(far.waits, "sleep", begun, ended)
        (kept,) = seen(begun)
        stuck = group.submit(far.stubborn, begun)
        killed = seen(begun, 2)[1]
        group.cancel("enough")
    with TaskGroup(pool=backend) as group:
        where = {str(worker) for worker in group.map(far.process, range(50)).results()}

    assert heeds.cancelled()
    assert stuck.cancelled()
    assert lines(ended) == [kept]
    assert not alive(killed)
    assert alive(kept)
    assert killed not in where


def test_failure_is_what_leaves_where_a_worker_had_to_be_killed(begun):
    """
    That it was killed by us is no failure.
    """
    backend = Processes(2, kill_after=0.05)
    with pytest.raises(ValueError, match="root"), TaskGroup(pool=backend) as group:
        stuck = group.submit(far.stubborn, begun)
        group.submit(far.fail_after, begun, ValueError("root"))

    assert stuck.cancelled()
    assert len(group.failures) == 1


def test_task_that_lets_no_thread_run_is_killed(begun):
    """
    Its worker reads no order any more, and no order waits for that, however long its reason.
    """
    backend = Processes(2, kill_after=0.05)
    with pytest.raises(ValueError, match="xxx"), TaskGroup(pool=backend) as group:
        stuck = group.submit(far.holds_the_lock, begun)
        group.submit(far.fail_after, begun, ValueError("x" * 3_000_000))

    assert stuck.cancelled()


@pytest.mark.parametrize("fn", [far.stubborn, far.holds_the_lock])
def test_cancelled_task_that_does_not_stop_is_killed_alone(fn, begun, release):
    """
    Cancelled by itself, it ends as one of a cancelled group does; its group goes on.
    """
    with TaskGroup(pool=Processes(2, kill_after=0.3)) as group:
        sibling = group.submit(far.return_after, release, "done")
        stuck = group.submit(fn, begun)
        (worker,) = seen(begun)
        stuck.cancel("not wanted")
        stopped = stuck.wait(timeout=100)
        after = group.submit(far.process)
        where = after.result(timeout=100)
        note(release)

    assert stopped
    assert stuck.cancelled()
    assert sibling.result() == "done"
    assert group.failures == ()
    assert str(where) != worker
    assert not alive(worker)


@pytest.mark.parametrize("way", ["group", "task"])
def test_worker_after_one_that_was_killed_is_judged_for_itself(way, begun):
    """
    It is not killed for what its forerunner did, and its own death is one.
    """
    backend = Processes(1, kill_after=0.05)
    with TaskGroup(pool=backend) as group:
        stuck = group.submit(far.stubborn, begun)
        seen(begun)
        (group if way == "group" else stuck).cancel()
    with (
        pytest.raises(WorkerDiedError, match="'die_by' ran: killed by SIGTERM"),
        TaskGroup(pool=backend) as group,
    ):
        after = group.submit(far.square, 3).result(timeout=60)
        group.submit(far.die_by, "SIGTERM")

    assert stuck.cancelled()
    assert after == 9


def test_task_that_is_killed_alone_is_told_of_once(begun):
    """
    That it has started, and that it was cancelled.
    """
    events = []
    backend = Processes(1, kill_after=0.05)
    with TaskGroup(pool=backend, observers=[events.append]) as group:
        stuck = group.submit(far.stubborn, begun)
        seen(begun)
        stuck.cancel()

    told = [event.name for event in events if event.task is stuck]
    assert told == ["task_submitted", "task_started", "task_cancelled"]


def test_backend_kills_what_is_at_work_for_a_group_if_it_is_told_to(begun):
    """
    And not for a soft interrupt, which it has none of.
    """
    backend = Processes(1, kill_after=None)
    with TaskGroup(pool=backend) as group:
        stuck = group.submit(far.stubborn, begun)
        (worker,) = seen(begun)
        group.cancel()
        softly = backend.escalate(group._run, 1)
        lived = alive(worker)
        killed = backend.escalate(group._run, 2)

    assert (softly, lived, killed) == (False, True, True)
    assert stuck.cancelled()
    assert not alive(worker)


@pytest.fixture
def idle():
    """A worker process of nobody's."""
    worker = Processes(1).start_worker()
    assert worker.calls.poll(100)
    yield worker
    worker.close()


def test_how_a_worker_ended_is_known_though_the_system_is_a_moment_late(monkeypatch):
    """
    Its descriptors are closed before it can be waited for.
    """
    waitpid = os.waitpid

    def late(process, options):
        return (0, 0) if options & os.WNOHANG else waitpid(process, options)

    worker = Processes(1, start_method="spawn").start_worker()
    assert worker.calls.poll(100)
    worker.kill()
    monkeypatch.setattr(os, "waitpid", late)
    told = worker.how_it_ended()
    worker.close()

    assert told == "killed by SIGKILL"


def test_all_who_ask_where_a_worker_is_at_once_are_told(idle):
    """
    Each gets a whole answer, and not what another one was to have.
    """
    asking = [start(lambda: [idle.stack() for _ in range(50)]) for _ in range(4)]
    for thread, _ in asking:
        thread.join(timeout=100)

    told = [told for _, (outcome,) in asking for told in outcome]
    assert len(told) == 200
    assert all(text.startswith("  File ") for text in told)


def test_worker_is_not_taken_away_from_who_asks_where_it_is(idle):
    """
    Its descriptor may be another file's as soon as it is closed.
    """
    asks, comes = threading.Event(), threading.Event()
    met = []

    class Lock:
        """Says when the one that closes it is about to wait."""

        acquire, release = idle._asking.acquire, idle._asking.release

        def __enter__(self):
            comes.set()
            return self.acquire()

        def __exit__(self, *_):
            self.release()

    def poll(seconds):
        asks.set()
        comes.wait(100)
        met.append(control.closed)
        return control.poll(seconds)

    def close():
        comes.set()
        control.close()

    control = idle.control
    idle._asking = Lock()
    idle.control = SimpleNamespace(
        poll=poll,
        close=close,
        fileno=control.fileno,
        send_bytes=control.send_bytes,
        recv_bytes=control.recv_bytes,
    )
    asker, _ = start(idle.stack)
    asks.wait(100)
    closer, _ = start(idle.close)
    for thread in (asker, closer):
        thread.join(timeout=100)

    assert met == [False]
    assert control.closed


def test_how_a_worker_ended_is_known_though_another_starts_just_then(idle, monkeypatch):
    """
    The standard library looks at all its children then, and only the first look is told.
    """
    read = forkserver.read_signed
    reading = []

    def read_when_two_are_here(descriptor):
        if descriptor == idle.process.sentinel:
            reading.append(threading.get_ident())
            until(lambda: len(reading) > 1 or (starter and at(starter[0]) == "start_worker"))
        return read(descriptor)

    def at(thread):
        frame = sys._current_frames().get(thread.ident)
        return frame and frame.f_code.co_name

    starter = []
    idle.kill()
    multiprocessing.connection.wait([idle.process.sentinel], 100)
    monkeypatch.setattr(forkserver, "read_signed", read_when_two_are_here)
    asker, told = start(idle.how_it_ended)
    until(lambda: reading)
    starter[:] = start(lambda: Processes(1).start_worker().close())
    for thread in (asker, starter[0]):
        thread.join(timeout=100)

    assert told == ["killed by SIGKILL"]


def test_signal_handler_may_ask_in_the_middle_of_asking(idle, monkeypatch):
    """
    Whatever line the one below it was at, that goes on after it.
    """
    monkeypatch.setattr(_process, "ANSWER", 0.2)  # seconds: a handler is told nothing by then

    def ask_at(step):
        told = []
        sys.settrace(act_at(step, lambda: told.append(idle.stack())))
        try:
            return idle.stack(), told
        finally:
            sys.settrace(None)

    for step in itertools.count():
        outer, inner = in_thread(ask_at, step)
        if not inner:
            break
        assert outer.startswith("  File ")

    assert step > 10


def test_nothing_stands_behind_a_call_whose_worker_is_killed(begun, monkeypatch):
    """
    It is taken back before, and what stands before it comes home: neither dies with it.
    """
    behind = []
    is_overdue = processes._Lane._is_overdue

    def noted(lane, worker, now):
        overdue = is_overdue(lane, worker, now)
        if overdue:
            behind.append(len(lane._batch) - 1)
        return overdue

    monkeypatch.setattr(processes, "HELD", 0.5)  # seconds; the time to kill would come before
    monkeypatch.setattr(processes._Lane, "_is_overdue", noted)
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        before = group.map(abs, range(1000))  # so quick that they travel together
        stuck = group.submit(far.stubborn, begun)
        after = group.map(abs, range(1000))
        seen(begun)
        stuck.cancel()

    assert stuck.cancelled()
    assert before.results() == after.results() == [*range(1000)]
    assert behind == [0]


@pytest.mark.parametrize("fn", [far.stubborn, far.holds_the_lock])
@pytest.mark.parametrize("way", ["submit", "map", "among others"])
def test_task_that_does_not_heed_its_timeout_is_killed(fn, way, begun, ended):
    """
    It fails as if it had; its sibling cleans up.
    """
    with (
        pytest.raises(TimeoutError, match=r"timed out after 0\.1 s") as raised,
        TaskGroup(pool=Processes(2, kill_after=0.3)) as group,
    ):
        sibling = group.submit(far.waits, "sleep", ended.with_suffix(".begun"), ended)
        seen(ended.with_suffix(".begun"))
        options = group.with_options(timeout=0.1)
        if way == "among others":
            group.map(abs, range(1000))  # so quick that they travel together
        if way != "map":
            late = options.submit(fn, begun)
        else:
            (late,) = options.map(fn, [begun]).tasks
        if way == "among others":
            group.map(abs, range(1000))
    (worker,) = lines(begun)

    assert late.exception() is raised.value
    assert isinstance(raised.value.__cause__, WorkerDiedError)
    assert sibling.cancelled()
    assert len(lines(ended)) == 1
    assert not alive(worker)


@pytest.mark.parametrize("way", ["submit", "map"])
def test_task_heeds_its_timeout_in_its_worker(way, begun, ended):
    """
    Nobody has to kill it.
    """
    with (
        pytest.raises(TimeoutError, match=r"timed out after 0\.1 s"),
        TaskGroup(pool=Processes(1, kill_after=None)) as group,
    ):
        options = group.with_options(timeout=0.1)
        if way == "submit":
            options.submit(far.waits, "sleep", begun, ended)
        else:
            options.map(functools.partial(far.waits, "sleep", begun), [ended])

    assert len(lines(ended)) == 1


def test_arguments_that_cannot_be_sent_are_an_error_with_its_cause():
    """
    Where it was raised tells what could not be pickled.
    """
    with (
        pytest.raises(TypeError, match="cannot be sent") as raised,
        TaskGroup(pool=Processes(1)) as group,
    ):
        group.submit(far.echo, threading.Lock())

    assert isinstance(raised.value.__cause__, TypeError)


def test_task_that_is_long_in_beginning_is_killed_all_the_same(begun, release, monkeypatch):
    """
    What it may take is counted anew, if its worker still reads its arguments by then.
    """
    is_overdue = processes._Lane._is_overdue

    def noted(lane, worker, now):
        passed = any(now >= due for due, _ in lane._due.values())
        overdue = is_overdue(lane, worker, now)
        if passed:
            note(release)
        return overdue

    monkeypatch.setattr(processes._Lane, "_is_overdue", noted)
    with (
        pytest.raises(TimeoutError, match=r"timed out after 0\.1 s"),
        TaskGroup(pool=Processes(1, kill_after=0.1)) as group,
    ):
        options = group.with_options(timeout=0.1)
        late = options.submit(far.stubborn, far.ReadAfter(release, begun))
        killed = late.wait(timeout=60)

    assert killed


@pytest.mark.parametrize("kill_after", [None, float("inf"), 3_000])
def test_nothing_is_killed_before_its_time(kill_after, begun, release):
    """
    A task that ends in the end has its value, and its worker goes on.
    """

    def let_go(event):
        if event.name == "task_stuck":
            note(release)

    backend = Processes(1, kill_after=kill_after)
    with (
        pytest.warns(RuntimeWarning, match="'begin_and_hold'") as told,
        TaskGroup(pool=backend, grace=0.01, observers=[let_go]) as group,
    ):
        task = group.submit(far.begin_and_hold, begun, release, "at last")
        (worker,) = seen(begun)
        group.cancel()
    with TaskGroup(pool=backend) as group:
        after = group.submit(far.process)

    report = str(told[0].message)
    assert task.result() == "at last"
    assert str(after.result()) == worker
    assert f"worker process {worker}" in report
    assert "in begin_and_hold" in report
    assert "in seen" in report


def test_worker_hears_on_whatever_it_was_asked_about(begun, release, ended):
    """
    A report on code whose source cannot be had leaves it as it was.
    """

    def let_go(event):
        if event.name == "task_stuck":
            note(release)

    backend = Processes(1, kill_after=20)
    with (
        pytest.warns(RuntimeWarning, match="in hidden") as told,
        TaskGroup(pool=backend, grace=0.01, observers=[let_go]) as group,
    ):
        group.submit(far.begin_and_hold_hidden, begun, release)
        (worker,) = seen(begun)
        group.cancel()
    with TaskGroup(pool=backend) as group:
        group.submit(far.waits, "sleep", begun, ended)
        seen(begun, 2)
        group.cancel()

    assert "in begin_and_hold" in str(told[0].message)
    assert lines(ended) == [worker]


def test_worker_that_is_not_ready_is_reported_with_what_it_is_at(begun, release):
    """
    For the task that waits for it, which is told to have been cancelled then.
    """
    events = []

    def observe(event):
        events.append((event.name, event.worker))
        if event.name == "task_stuck":
            note(release)

    backend = Processes(1, initializer=far.begin_and_hold, initargs=(begun, release))
    with (
        pytest.warns(RuntimeWarning, match="'square'") as told,
        TaskGroup(pool=backend, grace=0.01, observers=[observe]) as group,
    ):
        task = group.submit(far.square, 3)
        (worker,) = seen(begun)
        group.cancel()

    report = str(told[0].message)
    assert task.cancelled()
    assert f"still runs in worker process {worker}, " in report
    assert "in begin_and_hold" in report
    assert ("task_stuck", f"worker process {worker}") in events
    assert [name for name, _ in events].count("task_cancelled") == 1


def test_group_may_be_asked_for_before_its_lane_has_begun(monkeypatch):
    """
    Whoever waits for it, or wants to know what it is at, finds nothing at work.
    """
    come, go = threading.Event(), threading.Event()
    number_of = Processes.number_of

    def late(backend, run):
        come.set()
        go.wait(60)
        return number_of(backend, run)

    monkeypatch.setattr(Processes, "number_of", late)
    with TaskGroup(pool=Processes(1)) as group:
        task = group.submit(far.square, 3)
        come.wait(60)
        running = [(lane.worker, lane.where, lane.task) for lane in group._run.lanes]
        with pytest.raises(TimeoutError):
            group.wait(timeout=0)
        go.set()

    name = f"fastpool-{group.name}-1"
    assert running == [(name, f"thread {name!r}", None)]
    assert task.result() == 9


def test_thread_sleeps_while_a_cancelled_task_goes_on(begun, release):
    """
    What has woken it to pass the cancel on is over then.
    """
    with TaskGroup(pool=Processes(1, kill_after=None), name="asleep", grace=None) as group:
        group.submit(far.begin_and_hold, begun, release)
        seen(begun)
        group.cancel()
        (thread,) = (one for one in threading.enumerate() if one.name == "fastpool-asleep-1")
        until(lambda: is_blocked(thread.native_id))
        note(release)


def test_task_that_stopped_late_is_not_what_the_next_one_is_killed_for(
    begun, release, ended, monkeypatch
):
    """
    Though the worker has not come to that yet when the time of the one before it is up.
    """
    ahead = [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(processes, "time", clock)
    with TaskGroup(pool=Processes(1, kill_after=300)) as group:
        worker = group.submit(far.process).result()
        late = group.submit(far.swallows, begun)
        seen(begun)
        late.cancel()
        late.wait()
        ahead[0] = 600  # seconds
        following = group.submit(far.process, far.ReadAfter(release, "read", ended))
        seen(ended)
        note(release)

    assert late.result() == "went on"
    assert following.result() == worker


def test_cancel_of_a_task_whose_worker_is_not_ready_is_no_other_tasks(begun, release):
    """
    The one that comes after it runs.
    """
    backend = Processes(1, initializer=far.begin_and_hold, initargs=(begun, release))
    with TaskGroup(pool=backend, name="early") as group:
        first = group.submit(far.square, 2)
        second = group.submit(far.square, 3)
        seen(begun)
        won = first.cancel()
        (thread,) = (one for one in threading.enumerate() if one.name == "fastpool-early-1")
        until(lambda: is_blocked(thread.native_id))
        note(release)

    assert won
    assert first.cancelled()
    assert second.result() == 9


def test_task_whose_group_is_cancelled_as_it_is_written_is_not_sent(one, begun, monkeypatch):
    """
    By an argument of it, say.
    """
    sent = []
    ask = processes._Lane._ask
    monkeypatch.setattr(
        processes._Lane, "_ask", lambda lane, *of: sent.append(lane) or ask(lane, *of)
    )

    class Cancels:
        def __reduce__(self):
            group.cancel()
            return str, (begun,)

    with TaskGroup(pool=one) as group:
        task = group.submit(far.note, Cancels())

    assert task.cancelled()
    assert sent == []


def test_worker_that_used_processes_itself_ends_by_itself(tmp_path, monkeypatch):
    """
    It waits for none of its own that are idle.
    """
    monkeypatch.setattr(_process, "FAREWELL", 8)  # idle workers end after ten seconds
    with TaskGroup(pool=Processes(1)) as group:
        group.submit(far.nest, tmp_path / "ended")
    fastpool.shutdown()

    assert (tmp_path / "ended").exists()


def test_abandoned_worker_is_killed(begun):
    """
    The block is left without the task, and nothing of it runs on.
    """
    with (
        warnings.catch_warnings(),
        pytest.raises(StuckTaskError),
        TaskGroup(pool=Processes(1), grace=0.01, on_stuck="abandon") as group,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        stuck = group.submit(far.stubborn, begun)
        (worker,) = seen(begun)
        group.cancel()

    assert stuck.cancelled()
    until(lambda: not alive(worker))
    assert not alive(worker)


# --- Ends -----------------------------------------------------------------------------------------


def test_shutdown_leaves_no_process_thread_or_descriptor(begun):
    """
    Whatever became of the workers.
    """

    def use():
        backend = Processes(2)
        with TaskGroup(pool=backend) as group:
            workers = set(group.map(far.process, range(50)).results())
        with pytest.raises(WorkerDiedError), TaskGroup(pool=backend) as group:
            group.submit(far.die_by, "SIGKILL")
        with TaskGroup(pool=backend) as group:
            workers |= set(group.map(far.process, range(50)).results())
        fastpool.shutdown()
        return workers

    use()  # what the standard library keeps for good is there then
    gc.collect()  # the queues of an ended pool are a cycle
    before, threads = descriptors(), threading.active_count()
    workers = use()
    gc.collect()

    assert not any(alive(worker) for worker in workers)
    assert not multiprocessing.active_children()
    until(lambda: threading.active_count() <= threads)
    assert descriptors() <= before


@pytest.fixture
def no_more_processes(monkeypatch):
    """Has the system refuse to start one, until it is called; their server is there by then."""
    Processes(1).start_worker().close()

    def fails(process):
        raise OSError("there is no room for more")

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", fails)
        yield patch.undo


@pytest.mark.parametrize(
    "way", ["dies idle", "dies", "does not stop", "fails to start", "dies at its start"]
)
def test_lane_whose_worker_has_gone_keeps_nothing_of_it_open(way, no_more_processes, begun):
    """
    It waits for the next group without one.
    """
    settings = {
        "fails to start": {"initializer": far.start_badly, "initargs": ("no licence",)},
        "dies at its start": {"initializer": far.die_at_start},
    }
    backend = Processes(1, kill_after=0.05, **settings.get(way, {}))
    with pytest.raises(OSError, match="no room"), TaskGroup(pool=backend) as group:
        group.submit(far.square, 3)
    fastpool.shutdown()  # nothing that goes meanwhile is to make up for what stays
    gc.collect()
    before = descriptors()
    no_more_processes()
    with contextlib.suppress(LookupError, WorkerDiedError), TaskGroup(pool=backend) as group:
        if way == "dies idle":
            for _ in range(2):
                worker = group.submit(far.process).result()
                os.kill(worker, signal.SIGKILL)
                until(lambda number=worker: not alive(number))
        if way == "does not stop":
            stuck = group.submit(far.stubborn, begun)
            seen(begun)
            stuck.cancel()
        else:
            group.submit(far.die_by, "SIGKILL")
    (lane,) = (lane for pool in backend._crew.idle for lane in pool.reserve)

    assert lane._far is None
    until(lambda: gc.collect() >= 0 and descriptors() <= before)  # its thread may be on its way


def test_worker_that_is_closed_ends_by_itself(idle):
    """
    It runs what is to run as a process exits.
    """
    idle.close()

    assert idle.process.exitcode == 0


def test_worker_that_cannot_be_started_leaves_nothing_open(no_more_processes):
    """
    Also while the error is kept.
    """
    backend = Processes(1)
    kept = []
    for _ in range(2):  # the first one gets memory to share, which is there for good
        before = descriptors()
        with pytest.raises(OSError, match="no room") as raised:
            backend.start_worker()
        kept.append(raised.value)

    assert all(error.__traceback__ for error in kept)
    assert descriptors() == before


def test_group_that_has_ended_is_kept_by_nobody(begun):
    """
    Nor what it was given, and what came of that; the worker and its thread wait for the next one.
    """

    class Owner:
        def __call__(self):
            """It is another function over there."""

        def __reduce__(self):
            return functools.partial, (far.square, 3)

    backend = Processes(1)
    with TaskGroup(pool=backend) as group:
        owner = Owner()
        group.submit(owner)
        task = group.submit(far.echo, far.Methods(7))
    kept = [weakref.ref(one) for one in (group._run, owner, task.result())]
    del group, owner, task

    until(lambda: not any(reference() for reference in kept))


def test_handle_of_a_task_that_is_done_keeps_its_value_alone(one):
    """
    Neither its function, nor its arguments, nor the context that it was submitted in.
    """

    class Owner:
        def __call__(self):
            """It is another function over there."""

        def __reduce__(self):
            return functools.partial, (far.square, 3)

    def submit():
        given, named, owner, inherited = far.Methods(7), far.Methods(8), Owner(), Owner()
        variable.set(inherited)
        tasks.extend([group.submit(far.echo, given), group.submit(far.echo, value=named)])
        tasks.append(group.submit(owner))
        kept.extend(map(weakref.ref, (given, named, owner, inherited)))

    variable = ContextVar("variable")
    tasks, kept = [], []
    with TaskGroup(pool=one) as group:
        Context().run(submit)
    until(lambda: not any(reference() for reference in kept), within=10)
    alive = [reference() for reference in kept if reference() is not None]
    values = [task.result() for task in tasks]
    names = [task.name for task in tasks]

    assert alive == []
    assert [values[0].value, values[1].value, values[2]] == [7, 8, 9]
    assert names == ["echo", "echo", "Owner"]


@pytest.mark.parametrize("call", ["submit", "map"])
def test_task_that_swallows_its_cancel_is_freed_with_the_handle(one, call, begun):
    """
    The group goes on, and keeps nothing of it.
    """
    with TaskGroup(pool=one) as group:
        if call == "submit":
            task = group.submit(far.swallows, begun)
        else:
            (task,) = group.map(far.swallows, [begun]).tasks
        seen(begun)
        told = task.cancel()
        value = task.result()
        handle = weakref.ref(task)
        del task
        until(lambda: handle() is None, within=10)
        alive = handle()

    assert told
    assert value == "went on"
    assert alive is None


def test_thread_at_rest_has_nothing_open_to_be_woken_by(begun, release):
    """
    However often it was at work.
    """

    def bells():
        files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(file) and "eventfd" in os.readlink(file) for file in files)

    with TaskGroup(pool=Processes(1)) as group:
        before = bells()
        for _ in range(20):
            group.submit(far.square, 3).result()
            group.wait()
        until(lambda: bells() <= before)


def test_worker_whose_task_left_a_thread_is_ended(begun):
    """
    The thread would hold the process; nobody waits for it.
    """
    with TaskGroup(pool=Processes(1)) as group:
        worker = group.submit(far.process).result()
        group.submit(far.leaves_thread, begun)
    fastpool.shutdown()

    assert not alive(worker)


# --- Programs of their own ------------------------------------------------------------------------

BEGINNING = """
import os, signal, sys, threading, time
import far
import fastpool
from fastpool import CancelToken, TaskGroup, cancellable
from fastpool.backends import Processes

signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@pytest.fixture
def start_program(tmp_path):
    """Starts a program as a file, leading a process group of its own; ends what is left of it."""
    started = []

    def start(source, *arguments):
        script = tmp_path / "program.py"
        script.write_text(BEGINNING + source)
        folder = os.path.dirname(os.path.abspath(__file__))
        path = os.pathsep.join([folder, *filter(None, sys.path)])
        program = subprocess.Popen(
            [sys.executable, "-W", "error", str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        started.append(program)
        return program

    yield start

    for program in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def to_end(program):
    """What a program printed, and what it said of errors."""
    printed, errors = program.communicate(timeout=300)
    return printed, errors


def test_functions_of_the_main_script_are_found_by_name(start_program, no_cloudpickle):
    """
    Decorated or not, and methods.
    """
    program = start_program(
        """
@cancellable
def decorated(token: CancelToken, number):
    token.check()
    return number + 1

def plain(number):
    return number + 2

class Owner:
    @cancellable
    def method(self, token: CancelToken, number):
        token.check()
        return number + 3

if __name__ == "__main__":
    with TaskGroup(2, pool="processes") as group:
        tasks = [group.submit(fn, 10) for fn in (decorated, plain, Owner().method)]
    print([task.result() for task in tasks])
"""
    )

    assert to_end(program) == ("[11, 12, 13]\n", "")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_script_without_a_guard_gets_one_clear_error(start_program, method):
    """
    It says what to write, and starts nothing again and again.
    """
    program = start_program(
        f"""
with TaskGroup(pool=Processes(2, start_method={method!r})) as group:
    group.map(far.square, range(10))
"""
    )
    printed, errors = to_end(program)

    assert program.returncode == 1
    assert printed == ""
    assert errors.count("Traceback") == 1
    assert errors.count('if __name__ == "__main__":') == 1


@pytest.mark.parametrize("whole_group", [True, False])
def test_one_ctrl_c_stops_workers_in_order(start_program, whole_group, begun, ended):
    """
    Sent to the program alone or, as by a terminal, to its workers too: they clean up.
    """
    program = start_program(
        """
if __name__ == "__main__":
    try:
        with TaskGroup(2, pool="processes") as group:
            for _ in range(2):
                group.submit(far.waits, "sleep", *sys.argv[1:])
            group.map(far.square, range(100))
    except KeyboardInterrupt:
        print("interrupted")
""",
        begun,
        ended,
    )
    seen(begun, 2)
    if whole_group:
        os.killpg(program.pid, signal.SIGINT)
    else:
        program.send_signal(signal.SIGINT)

    assert to_end(program) == ("interrupted\n", "")
    assert sorted(lines(ended)) == sorted(lines(begun))


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_ctrl_c_as_workers_start_is_the_parents(start_program, method, begun, release):
    """
    They import the main script, and say nothing of it.
    """
    program = start_program(
        f"""
if __name__ != "__main__":
    far.note({str(begun)!r})
    far.seen({str(release)!r})
else:
    try:
        with TaskGroup(pool=Processes(2, start_method={method!r})) as group:
            group.map(far.square, range(100))
    except KeyboardInterrupt:
        print("interrupted")
"""
    )
    seen(begun)
    os.killpg(program.pid, signal.SIGINT)
    note(release)

    assert to_end(program) == ("interrupted\n", "")


def test_ctrl_c_as_the_server_of_workers_starts_is_the_parents(
    start_program, tmp_path, begun, release
):
    """
    Also where a program says itself what that imports, and us among it.
    """
    (tmp_path / "held.py").write_text(
        f"import far\nfar.note({str(begun)!r})\nfar.seen({str(release)!r})\n"
    )
    program = start_program(
        f"""
if __name__ == "__main__":
    import multiprocessing
    os.environ["PYTHONPATH"] += os.pathsep + {str(tmp_path)!r}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["held", "fastpool.backends._server"])
    try:
        with TaskGroup(pool=Processes(1, start_method="forkserver")) as group:
            group.map(far.square, range(100))
    except KeyboardInterrupt:
        print("interrupted")
"""
    )
    seen(begun)
    os.killpg(program.pid, signal.SIGINT)
    note(release)

    assert to_end(program) == ("interrupted\n", "")


def test_second_ctrl_c_kills_the_worker_that_does_not_stop(start_program, begun):
    """
    The block is left at once, and nothing of it runs on.
    """
    program = start_program(
        """
if __name__ == "__main__":
    told = threading.Event()
    def second():
        told.wait()
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=second, daemon=True).start()
    try:
        with TaskGroup(1, pool="processes", name="jobs") as group:
            group.token.on_cancel(told.set)
            group.submit(far.stubborn, *sys.argv[1:])
    except KeyboardInterrupt as error:
        print("".join(error.__notes__))
""",
        begun,
    )
    (worker,) = seen(begun)
    program.send_signal(signal.SIGINT)
    printed, errors = to_end(program)

    assert "left behind in group 'jobs': task 'stubborn', submitted at " in printed
    assert f"worker process {worker}" in printed
    assert errors == ""
    until(lambda: not alive(worker))
    assert not alive(worker)


@pytest.mark.parametrize(
    ("method", "fn"), [("forkserver", "waits"), ("forkserver", "stubborn"), ("spawn", "waits")]
)
def test_no_worker_survives_its_parent(start_program, method, fn, begun, ended):
    """
    Killed while its workers run; a task that can still hear it cleans up.
    """
    arguments = ["sleep", begun, ended] if fn == "waits" else [begun]
    program = start_program(
        f"""
if __name__ == "__main__":
    with TaskGroup(pool=Processes(2, start_method={method!r})) as group:
        for _ in range(2):
            group.submit(far.{fn}, *sys.argv[1:])
        threading.Event().wait()
""",
        *arguments,
    )
    workers = seen(begun, 2)
    program.kill()
    program.wait()
    until(lambda: not any(map(alive, workers)))

    assert not any(map(alive, workers))
    if fn == "waits":
        assert sorted(lines(ended)) == sorted(workers)


@pytest.mark.parametrize("state", ["idle", "in a group", "asleep"])
def test_no_idle_or_sleeping_worker_survives_its_parent(start_program, state, begun):
    """
    Between two groups, between two tasks of one, and in a call that nothing interrupts.
    """
    program = start_program(
        """
if __name__ == "__main__":
    path, state = sys.argv[1:]
    backend = Processes(1)
    with TaskGroup(pool=backend) as group:
        worker = group.submit(far.process).result()
        if state == "asleep":
            group.submit(time.sleep, 600)
        if state != "idle":
            far.note(path, worker)
            threading.Event().wait()
    far.note(path, worker)
    threading.Event().wait()
""",
        begun,
        state,
    )
    (worker,) = seen(begun)
    program.kill()
    program.wait()
    until(lambda: not alive(worker))

    assert not alive(worker)


def test_worker_that_hears_no_more_ends(start_program, begun):
    """
    It says why. Nobody could stop what it runs, and it would survive its parent.
    """
    program = start_program(
        """
if __name__ == "__main__":
    try:
        with TaskGroup(pool=Processes(1, kill_after=None)) as group:
            group.submit(far.hears_no_more, sys.argv[1])
            far.seen(sys.argv[1])
            group.cancel()
    except fastpool.WorkerDiedError as error:
        print(error)
""",
        begun,
    )
    printed, errors = to_end(program)

    assert printed.endswith("died while task 'hears_no_more' ran: exit code 1\n")
    assert errors.startswith("fastpool: a worker process ends\nTraceback ")
    assert errors.endswith("\nMemoryError: no room\n")


def test_group_open_at_exit_is_finished(start_program, begun):
    """
    What was submitted is done, and nothing is left of the workers.
    """
    program = start_program(
        """
if __name__ == "__main__":
    group = TaskGroup(2, pool="processes")
    group.__enter__()
    for number in range(20):
        group.submit(far.noted, sys.argv[1], number)
""",
        begun,
    )

    assert to_end(program) == ("", "")
    assert program.returncode == 0
    assert sorted(lines(begun), key=int) == [str(number) for number in range(20)]


def test_forked_child_leaves_the_group_to_its_parent(start_program, begun, release):
    """
    It waits for nothing and may have workers of its own; the parent's go on, and see it end.
    """
    program = start_program(
        """
if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
    group = TaskGroup(2, pool="processes")
    with group:
        held = group.submit(far.begin_and_hold, *sys.argv[1:], "the parent's")
        far.seen(sys.argv[1])
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            far.note(sys.argv[2])
    if child:
        print(held.result(), flush=True)
    else:
        with TaskGroup(1, pool="processes") as own:
            own_task = own.submit(far.square, 3)
        print(held.cancelled(), own_task.result(), flush=True)
        fastpool.shutdown()
        os._exit(0)
""",
        begun,
        release,
    )

    assert to_end(program) == ("True 9\nthe parent's\n", "")


def test_forked_child_ends_as_a_process_that_never_had_a_worker(start_program, begun, release):
    """
    It has none of their pipes, and waits for none of them, however it ends.
    """
    program = start_program(
        """
def pipes():
    files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    names = [os.readlink(file) for file in files if os.path.lexists(file)]
    return sum("socket" in name or "pidfd" in name for name in names)

if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    with TaskGroup(1, pool="processes") as group:
        task = group.submit(far.begin_and_hold, *sys.argv[1:], "the parent's")
        far.seen(sys.argv[1])
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            far.note(sys.argv[2])
    print(task.result() if child else pipes())
""",
        begun,
        release,
    )

    assert to_end(program) == ("0\nthe parent's\n", "")


def test_observer_may_fork(start_program):
    """
    In the thread that has the worker; the child ends there, and the worker serves the parent.
    """
    program = start_program(
        """
if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    children = []
    def fork(event):
        if event.name == "task_succeeded":
            children.append(os.fork())
    backend = Processes(1)
    with TaskGroup(pool=backend, observers=[fork]) as group:
        first = group.submit(far.process)
    assert os.waitpid(children[0], 0)[1] == 0
    with TaskGroup(pool=backend) as group:
        second = group.submit(far.process)
    print(first.result() == second.result())
"""
    )

    assert to_end(program) == ("True\n", "")


def test_processes_that_a_program_starts_for_itself_hear_ctrl_c(start_program):
    """
    Though they come from the server that ours come from, and it takes no notice.
    """
    program = start_program(
        """
def main(pipe):
    pipe.send(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    pipe.send("fastpool.backends._worker" in sys.modules)

if __name__ == "__main__":
    import multiprocessing
    with TaskGroup(1, pool="processes") as group:
        group.submit(far.square, 3)
    context = multiprocessing.get_context("forkserver")
    near, away = context.Pipe()
    process = context.Process(target=main, args=(away,))
    process.start()
    print(near.recv(), near.recv())
    process.join()
"""
    )

    assert to_end(program) == ("False True\n", "")


def test_forked_child_holds_no_worker_of_a_parent_that_is_killed(start_program, begun, release):
    """
    The workers see that their parent has gone, whatever else has come from it.
    """
    program = start_program(
        """
if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    with TaskGroup(1, pool="processes") as group:
        group.submit(far.stubborn, sys.argv[1])
        far.seen(sys.argv[1])
        if os.fork() == 0:
            far.seen(sys.argv[2])
            os._exit(0)
        far.note(sys.argv[1], os.getpid())
        threading.Event().wait()
""",
        begun,
        release,
    )
    worker, _ = seen(begun, 2)
    program.kill()
    program.wait()
    until(lambda: not alive(worker))
    note(release)

    assert not alive(worker)
