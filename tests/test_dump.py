"""
The tree of open groups, as `dump` gives it and as it is printed.
"""

import dataclasses
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

import pytest
from staging import act_at, in_thread, start, until

import fastpool
from fastpool import TaskGroup, dump, dump_on_signal, print_dump, timeout


@pytest.fixture
def latch():
    """What tasks of a test wait for; opened at its end, whatever happens."""
    opened = threading.Event()
    yield opened
    opened.set()


def line_after(what):
    """The number of the line of this file that has some text in it."""
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if what in line)


def printed():
    file = io.StringIO()
    print_dump(file)
    return file.getvalue()


def wait_for(latch, begun=None):
    if begun is not None:
        begun.release()
    latch.wait(60)  # the line that a dump shows


# --- What is in it --------------------------------------------------------------------------------


def test_without_a_group_there_is_nothing():
    """
    And it says so.
    """
    assert dump() == ()
    assert printed() == "no group is open\n"


def test_group_is_told_with_what_runs_and_what_waits(latch):
    """
    Where it was entered and by whom, where its body is, what is queued, where each task is.
    """
    begun = threading.Semaphore(0)
    entering = time.monotonic()
    with TaskGroup(2, name="nightly") as group:
        site = sys._getframe().f_lineno - 1
        group.map(wait_for, [latch] * 5, [begun] * 5)
        for _ in range(2):
            assert begun.acquire(timeout=60)
        (seen,) = dump()
        here = sys._getframe().f_lineno - 1
        looked = time.monotonic()
        latch.set()

    function = "test_group_is_told_with_what_runs_and_what_waits"
    assert (seen.name, seen.state, seen.cancelled, seen.parent) == ("nightly", "open", None, None)
    assert seen.thread == threading.current_thread().name
    assert seen.site == f"{__file__}:{site}"
    assert seen.line == f"{__file__}:{here} in {function}"
    assert 0 <= seen.elapsed <= looked - entering
    assert (seen.queued, seen.failures, seen.groups) == (3, 0, ())
    assert sorted(task.name for task in seen.tasks) == ["wait_for[0]", "wait_for[1]"]
    assert sorted(task.thread for task in seen.tasks) == [
        "fastpool-nightly-1",
        "fastpool-nightly-2",
    ]
    where = f"{__file__}:{line_after('# the line that a dump shows')} in wait_for"
    assert [task.line for task in seen.tasks] == [where, where]  # not in `threading`
    assert [task.waits_for + task.groups for task in seen.tasks] == [(), ()]
    assert dump() == ()


def test_group_that_is_left_and_cancelled_says_so(latch):
    """
    With the reason; of an exception only its class, since its text may be secret.
    """
    begun = threading.Semaphore(0)
    seen = []

    def fails():
        begun.acquire(timeout=60)
        raise ValueError("a secret")

    def look(event):
        if event.name == "task_stuck":
            seen.extend(dump())
            seen.append(printed())
            latch.set()

    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match="secret"),
        TaskGroup(2, grace=0.01, observers=[look]) as group,
    ):
        group.submit(wait_for, latch, begun)
        group.submit(fails)

    assert (seen[0].state, seen[0].cancelled, seen[0].failures) == ("leaving", "ValueError", 1)
    assert "leaving, cancelled (ValueError)" in seen[1]
    assert "1 running, 1 failed" in seen[1]
    assert "secret" not in seen[1]


def test_groups_stand_below_what_opened_them(latch):
    """
    A task, or the body of a group; a scope in between is neither.
    """
    begun = threading.Semaphore(0)

    def opens():
        with timeout(60), TaskGroup(1, name="in a task") as inner:
            inner.submit(wait_for, latch, begun)
            with timeout(60), TaskGroup(1, name="in its body") as innermost:
                innermost.submit(wait_for, latch, begun)

    with TaskGroup(2, name="outer") as outer:
        outer.submit(opens)
        with timeout(60), TaskGroup(1, name="in the body") as body:
            body.submit(wait_for, latch, begun)
            for _ in range(3):
                assert begun.acquire(timeout=60)
            (seen,) = dump()
            text = printed()
            latch.set()

    assert seen.name == "outer"
    (in_body,) = seen.groups
    assert (in_body.name, in_body.parent) == ("in the body", "group 'outer'")
    (task,) = seen.tasks
    (in_task,) = task.groups
    assert (in_task.name, in_task.parent) == ("in a task", "task 'opens' of group 'outer'")
    assert in_task.thread == task.thread
    (innermost,) = in_task.groups
    assert (innermost.name, innermost.parent) == ("in its body", "group 'in a task'")
    indents = {
        name: len(line) - len(line.lstrip())
        for line in text.split("\n")
        for name in re.findall("^ *group '(.*?)'", line)
    }
    assert indents == {"outer": 0, "in a task": 4, "in its body": 6, "in the body": 2}


def test_what_a_task_waits_for_is_told(latch):
    """
    By name; a group that a task leaves stands for its tasks.
    """
    begun = threading.Semaphore(0)

    def waits(task):
        return task.result()

    with TaskGroup(2, name="pairs") as group:
        first = group.submit(wait_for, latch, begun)
        assert begun.acquire(timeout=60)
        group.submit(waits, first)
        until(lambda: any(task.waits_for for task in dump()[0].tasks))
        (seen,) = dump()
        text = printed()
        latch.set()

    told = {task.name: task.waits_for for task in seen.tasks}
    assert told == {"wait_for": (), "waits": ("task 'wait_for' of group 'pairs'",)}
    assert "    waits for task 'wait_for' of group 'pairs'\n" in text


def test_task_that_runs_another_one_meanwhile_has_its_own_line(latch):
    """
    A worker that waits runs what it waits for: two tasks on one thread, each where it is.
    """
    begun = threading.Semaphore(0)

    def outer(group):
        return group.submit(wait_for, latch, begun).result()  # the line of the one that waits

    with TaskGroup(1) as group:
        group.submit(outer, group)
        assert begun.acquire(timeout=60)
        (seen,) = dump()
        latch.set()

    lines = {task.name: task.line for task in seen.tasks}
    assert lines["outer"].endswith(
        f":{line_after('# the line of the one that waits')} in "
        "test_task_that_runs_another_one_meanwhile_has_its_own_line.<locals>.outer"
    )
    assert lines["wait_for"].endswith(" in wait_for")
    assert len({task.thread for task in seen.tasks}) == 1


def test_time_counts_from_the_first_dump_that_saw_the_task(latch, monkeypatch):
    """
    Nobody notes when a task starts; of another task in the same thread it counts anew.
    """
    now = [1000.0]
    begun = threading.Semaphore(0)
    latches = [threading.Event(), latch]
    with TaskGroup(1) as group:
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        group.map(wait_for, latches, [begun] * 2)
        assert begun.acquire(timeout=60)
        seen = [dump()[0].tasks[0].elapsed]
        now[0] += 5
        seen.append(dump()[0].tasks[0].elapsed)
        text = printed()
        latches[0].set()
        assert begun.acquire(timeout=60)
        seen.append(dump()[0].tasks[0].elapsed)
        monkeypatch.undo()
        latch.set()

    assert seen == [0, 5, 0]
    assert "'wait_for[0]' in thread 'fastpool-" in text
    assert "', at least 5.0 s\n" in text


def test_time_counts_from_the_start_where_somebody_observes(latch):
    """
    Then it is noted anyway.
    """
    started = []
    begun = threading.Semaphore(0)

    def note(event):
        if event.name == "task_started":
            started.append(event.time)

    with TaskGroup(1, observers=[note]) as group:
        submitting = time.monotonic()
        group.submit(wait_for, latch, begun)
        assert begun.acquire(timeout=60)
        before = time.monotonic()
        elapsed = dump()[0].tasks[0].elapsed
        after = time.monotonic()
        latch.set()

    assert before - started[0] <= elapsed <= after - submitting


def test_dump_is_had_inside_a_task():
    """
    The task that asks is in it, where it asks.
    """
    with TaskGroup(1, name="asking") as group:
        (seen,) = group.submit(dump).result()

    assert [(task.name, task.line) for task in seen.tasks] == [("dump", None)]


def test_dropped_group_is_told_as_long_as_its_tasks_run(latch):
    """
    And no longer than until the next one is entered.
    """
    begun = threading.Semaphore(0)
    group = TaskGroup(1, name="lost")
    group.__enter__()
    task = group.submit(wait_for, latch, begun)
    assert begun.acquire(timeout=60)
    with pytest.warns(ResourceWarning):
        del group

    (seen,) = dump()
    latch.set()
    assert task.wait(timeout=60)
    until(lambda: not any("lost" in thread.name for thread in threading.enumerate()))
    with TaskGroup(1, name="next"):
        names = [group.name for group in dump()]

    assert (seen.name, seen.state, len(seen.tasks)) == ("lost", "dropped", 1)
    assert names == ["next"]


def test_names_cannot_steer_the_terminal(latch):
    """
    Control characters are in the names, and not in what is printed.
    """
    begun = threading.Semaphore(0)
    with TaskGroup(1, name="\x1b[31mred") as group:
        group.with_options(name="\u202eback\r").submit(wait_for, latch, begun)
        assert begun.acquire(timeout=60)
        group.cancel("\x1b[2J")
        (seen,) = dump()
        text = printed()
        latch.set()

    assert (seen.name, seen.tasks[0].name) == ("\x1b[31mred", "\u202eback\r")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "red" in text
    assert "back" in text


def test_dump_cannot_be_changed():
    """
    It is what was seen.
    """
    with TaskGroup(1):
        (seen,) = dump()

    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.name = "another"


def test_dump_is_printed_to_standard_error(capsys):
    """
    Where no file is named.
    """
    print_dump()

    out, err = capsys.readouterr()
    assert (out, err) == ("", "no group is open\n")


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="without a GIL a parked thread keeps what it was the last to have, dump or no dump",
)
def test_dump_keeps_nothing_alive():
    """
    Not a task, nor what it was given, nor the frames that were looked at; without the collector.
    """

    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing)
    gc.collect()
    gc.disable()
    try:
        with TaskGroup(1) as group:
            task = group.submit(lambda thing: dump(), thing)
            task.result()
        handle = weakref.ref(task)
        del thing, task, group

        # Its worker may be about to let go of it.
        until(lambda: alive() is None and handle() is None)
    finally:
        gc.enable()


# --- At any time ----------------------------------------------------------------------------------


def test_dump_is_had_while_tasks_start_and_end(hasty):
    """
    Whatever the groups do meanwhile; what is said of each is possible.
    """
    stop = threading.Event()

    def inner(number):
        with TaskGroup(2, name=f"inner {number}") as group:
            group.map(pow, range(5), range(5))
            return group.submit(pow, number, 2).result()

    def works(name):
        over = False
        while not over:
            over = stop.is_set()  # looked at first, so that each has a round in any case
            with TaskGroup(2, name=name) as group:
                group.map(inner, range(3))
                group.submit(inner, 4)
        return over

    workers = [start(works, f"outer {number}") for number in range(3)]
    try:
        for _ in range(300):
            for group in dump():
                # Its parent has ended since the look began, or it has none.
                assert group.name.startswith("outer") or group.parent is not None
                assert 0 <= group.queued <= 8
                assert len(group.tasks) <= 3
                for task in group.tasks:
                    assert task.name.startswith(("inner", "pow"))
                    assert all(below.name.startswith("inner") for below in task.groups)
    finally:
        stop.set()
        for thread, _ in workers:
            thread.join(timeout=60)

    assert [outcome for _, outcome in workers] == [[True]] * 3


def test_dump_is_had_at_every_line_of_ours():
    """
    As a signal handler has it: in the middle of whatever the thread was at.
    """

    def use():
        with TaskGroup(2) as group:
            tasks = [group.submit(pow, 2, number) for number in range(3)]
            batch = group.map(pow, [2, 2], [3, 4])
            batch.wait()
            values = [task.result() for task in tasks]
        return values, batch.results()

    for step in itertools.count():
        seen = []

        def run(seen=seen, step=step):
            sys.settrace(act_at(step, lambda: seen.append(dump())))
            try:
                return use()
            finally:
                sys.settrace(None)

        assert in_thread(run) == ([1, 2, 4], [8, 16])
        if not seen:
            break

    assert step > 50


# --- On a signal ----------------------------------------------------------------------------------


def run_signalled(source, *, enough):
    """
    Run a program that is sent SIGUSR1 over and over, until it has printed so many dumps.

    It says "ready" on its standard output, then "done" once its input has ended.
    """
    program = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = []

    def read():
        for line in program.stderr:
            errors.append(line)

    with program:
        reader, _ = start(read)
        try:
            assert program.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 40
            while sum("group 'busy': open" in line for line in errors) < enough:
                assert time.monotonic() < deadline, "it prints no more"
                assert program.poll() is None, errors[-20:]
                program.send_signal(signal.SIGUSR1)
                time.sleep(0.0005)
            program.stdin.close()
            assert program.stdout.readline() == "done\n"
            reader.join(timeout=60)
        finally:
            program.kill()
    return program.returncode, errors


SIGNALLED = """
import signal, sys, threading
import fastpool
from fastpool import TaskGroup

ended = threading.Event()

def watch():
    sys.stdin.read()
    ended.set()

threading.Thread(target=watch, daemon=True).start()
with fastpool.dump_on_signal(signal.SIGUSR1), TaskGroup(2, name="busy") as group:
    print("ready", flush=True)
    while not ended.is_set():
        {work}
print("done", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
@pytest.mark.parametrize(
    "work",
    [
        "print('in the middle of a line', file=sys.stderr, flush=True)",
        "group.submit(pow, 2, 3)",
        "group.submit(pow, 2, 3).result()",
        "group.map(pow, [2] * 9, [3] * 9).wait()",
        "threading.Thread(target=int).start()",
        "exec('with TaskGroup(2) as inner: inner.submit(pow, 2, 3)')",
        "ended.wait(0.01)",
    ],
)
def test_dump_on_a_signal_comes_out_whatever_it_interrupts(work):
    """
    Printing, submitting, waiting, starting threads, entering and leaving groups.
    """
    code, errors = run_signalled(SIGNALLED.format(work=work), enough=100)

    assert code == 0
    # A line that was being printed may have been cut in two by a dump, and ends after it.
    dumps = re.findall(r"group 'busy': open, [0-9.]+ s, \d+ queued, \d+ running\n", "".join(errors))
    assert len(dumps) >= 100
    assert not any("Traceback" in line or "Error" in line for line in errors), errors[-20:]


@pytest.fixture
def keep_handler():
    """The test's own handler, to be found again."""
    before = signal.signal(signal.SIGUSR1, mine)
    yield
    signal.signal(signal.SIGUSR1, before)


def mine(signum, frame):
    """A handler of the user's."""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
def test_dump_goes_to_the_second_descriptor(keep_handler, capfd):
    """
    Even where `sys.stderr` is another file.
    """
    with dump_on_signal(signal.SIGUSR1), TaskGroup(1, name="nightly"):
        signal.raise_signal(signal.SIGUSR1)

    assert capfd.readouterr().err.startswith("group 'nightly': open")
    assert signal.getsignal(signal.SIGUSR1) is mine


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
def test_signal_is_given_back_once_and_in_any_order(keep_handler):
    """
    Only by whom it was taken over last: a later handler stays.
    """
    first = dump_on_signal(signal.SIGUSR1)
    second = dump_on_signal(signal.SIGUSR1)
    taken = signal.getsignal(signal.SIGUSR1)
    first.close()
    after_first = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, mine)
    second.close()
    second.close()

    assert after_first is taken
    assert signal.getsignal(signal.SIGUSR1) is mine


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
def test_other_thread_is_told_that_it_cannot(keep_handler):
    """
    Python handles signals in the main thread alone.
    """
    error = in_thread(dump_on_signal, signal.SIGUSR1)
    taken = dump_on_signal(signal.SIGUSR1)
    closing = in_thread(taken.close)
    taken.close()

    assert type(error) is ValueError
    assert "dump_on_signal() must be called in the main thread, not in 'Thread-" in str(error)
    assert type(closing) is ValueError
    assert signal.getsignal(signal.SIGUSR1) is mine


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")
def test_nobody_who_reads_is_no_error_of_the_program(keep_handler, monkeypatch, unraised):
    """
    Nothing is raised where the signal happened to come.
    """

    def refuse(fd, data):
        raise BrokenPipeError

    with dump_on_signal(signal.SIGUSR1):
        monkeypatch.setattr(os, "write", refuse)
        signal.raise_signal(signal.SIGUSR1)

    assert [type(error) for error in unraised] == [BrokenPipeError]


def test_names_are_public():
    """
    All of them are `fastpool`'s own.
    """
    for name in ("OpenGroup", "RunningTask", "dump", "dump_on_signal", "print_dump"):
        assert name in fastpool.__all__


def test_group_of_map_is_named_with_the_line_that_called_it():
    """
    It has no with block of the caller's.
    """
    found = []
    fastpool.map(lambda item: found.extend(dump()), [1])

    assert found[0].site == f"{__file__}:{sys._getframe().f_lineno - 2}"
