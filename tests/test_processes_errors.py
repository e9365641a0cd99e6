"""
What goes wrong on one side of a worker's pipes, and concerns one task, and no other.
"""

import contextlib
import gc
import os
import resource
import select
import signal
import threading
import weakref
from collections import deque
from multiprocessing.connection import Connection, Pipe
from types import SimpleNamespace

import far
import pytest
from blocked import is_blocked, rests
from staging import fail, start, stop, until

from fastpool import (
    CollectAll,
    StuckTaskError,
    TaskCancelledError,
    TaskGroup,
    WorkerDiedError,
    shield,
)
from fastpool._lane import Lane
from fastpool._ledger import Ledger, _Claim
from fastpool._run import Run
from fastpool.backends import _process, _wire, processes
from fastpool.backends._process import WorkerProcess
from fastpool.backends.processes import Processes
from fastpool.futures import GroupExecutor

MONTH = 2_678_400  # seconds
ALL = [*range(20)]


@pytest.fixture
def one():
    """A backend with one worker, so that there are batches."""
    return Processes(1)


def echoes(backend):
    """What a group gets after another, which must be its own."""
    with TaskGroup(pool=backend) as group:
        return group.map(far.echo, ALL).results()


@contextlib.contextmanager
def no_more_descriptors():
    """All that the process may have are in use."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = []
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1 + highest, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in used:
            os.close(fd)


# --- What users' code says and raises -------------------------------------------------------------


def test_limit_of_a_month_is_waited_for(tmp_path):
    """
    The system's own calls take no more than 24 days at once.
    """
    backend = Processes(1, kill_after=MONTH)
    with TaskGroup(pool=backend) as group:
        quick = group.with_options(timeout=MONTH).submit(far.square, 3)
        quick.wait()
        slow = group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release", 404)
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        group.cancel()
        until(lambda: is_blocked(lane.of_thread.native_id))
        done = slow.done()
        far.note(tmp_path / "release")

    assert quick.result() == 9
    assert not done
    assert slow.result() == 404
    assert echoes(backend) == ALL


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ((far.raise_mutely,), "'raise_mutely' raised far.RefusesMutely: , which cannot.*: Mute\\b"),
        ((far.make, far.RefusesMutely), "'make' returned a RefusesMutely, which cannot.*: Mute\\b"),
        ((far.echo, far.RefusesMutely()), "arguments of task 'echo' cannot be sent.*: Mute\\b"),
    ],
)
def test_error_that_says_nothing_fails_its_task_alone(one, bad, says, tmp_path):
    """
    Whichever side meets it as it pickles something.
    """
    with pytest.raises(ExceptionGroup) as raised, TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(far.return_after, tmp_path / "go")
        before = group.map(far.echo, ALL)
        failing = group.submit(*bad)
        behind = [group.submit(far.square, number) for number in ALL]
        far.note(tmp_path / "go")

    (error,) = raised.value.exceptions
    assert failing.exception() is error
    assert type(error) is TypeError
    with pytest.raises(TypeError, match=says):
        raise error
    assert before.results() == ALL
    assert [task.result() for task in behind] == [number**2 for number in ALL]
    assert echoes(one) == ALL


def test_reason_that_cannot_even_say_why_it_cannot_be_sent(one, tmp_path):
    """
    The task hears that it is cancelled, and what comes after is not mixed up.
    """
    with TaskGroup(pool=one) as group:
        held = group.submit(far.notes_reason, tmp_path / "begun", tmp_path / "ended")
        far.seen(tmp_path / "begun")
        group.cancel(far.RefusesMutely())

    assert held.done()
    assert far.lines(tmp_path / "ended") == ["far.RefusesMutely: "]
    assert echoes(one) == ALL


def test_exception_that_takes_no_attribute_takes_our_note(one, tmp_path):
    """
    And no other task has anything of it.
    """
    with pytest.raises(ExceptionGroup), TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(far.return_after, tmp_path / "go")
        before = group.map(far.echo, ALL)
        failing = group.submit(far.raise_and_take_no_note)
        behind = group.map(far.echo, ALL)
        far.note(tmp_path / "go")

    error = failing.exception()
    assert type(error) is far.TakesNoAttribute
    assert "raise_and_take_no_note" in error.__notes__[0]
    assert before.results() + behind.results() == ALL * 2


def test_nothing_is_sent_for_what_is_cancelled_as_it_is_unreadable(one, tmp_path, monkeypatch):
    """
    A message without a task is one that nobody answers for.
    """
    sent = []
    ask = processes._Lane._ask

    def note(lane, *arguments):
        sent.append(len(lane._batch))
        return ask(lane, *arguments)

    monkeypatch.setattr(processes._Lane, "_ask", note)
    with TaskGroup(pool=one) as group:
        bad = group.submit(
            far.echo, far.HoldsUpWhoReadsIt(tmp_path / "begun", tmp_path / "release")
        )
        far.seen(tmp_path / "begun")
        bad.cancel()
        far.note(tmp_path / "release")

    assert bad.cancelled()
    assert sent == [1]
    assert echoes(one) == ALL


# --- What goes wrong in this process --------------------------------------------------------------


@pytest.mark.parametrize("step", ["_encode", "_receive"])
def test_error_of_ours_ends_the_worker_that_it_was_about(one, step, monkeypatch, tmp_path):
    """
    Its next answer would be taken for that of another task. What it had begun is lost, and says
    so; what it had not is run by another.
    """
    lost = MemoryError("no room")
    calls = []
    real = getattr(processes._Lane, step)

    def fail_once(lane, *arguments, **options):
        if len(lane._batch) > 8:
            calls.append([*lane._batch])
            if len(calls) == 1:
                if step == "_receive":
                    far.seen(tmp_path / "held")
                raise lost
        return real(lane, *arguments, **options)

    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    with pytest.raises(ExceptionGroup), TaskGroup(pool=one, policy=CollectAll()) as group:
        worker = group.submit(far.process).result()
        monkeypatch.setattr(processes._Lane, step, fail_once)
        group.submit(far.return_after, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        first = group.submit(far.noted, tmp_path / "ran", 0)
        held = group.submit(far.begin_and_hold, tmp_path / "held", tmp_path / "never")
        behind = [group.submit(far.noted, tmp_path / "ran", number) for number in range(1, 200)]
        far.note(tmp_path / "go")
        if step == "_receive":
            with shield():
                held.wait()
        else:
            far.note(tmp_path / "never")
    with TaskGroup(pool=one) as group:
        another = group.submit(far.process).result()

    if step == "_receive":
        assert [type(task.exception()) for task in (first, held)] == [WorkerDiedError] * 2
        assert held.exception().__cause__ is lost
        assert "what task 'begin_and_hold' came to in worker process" in str(held.exception())
    else:
        assert first.exception() is lost
    assert [task.result() for task in behind] == [*range(1, 200)]
    assert sorted(map(int, far.lines(tmp_path / "ran"))) == [*range(step == "_encode", 200)]
    assert another != worker
    assert echoes(one) == ALL


def test_error_as_a_worker_starts_ends_it(one, monkeypatch):
    """
    Its greeting would be taken for an answer.
    """
    real = processes._Lane._await
    started = []

    def fail_once(lane, run, worker, *arguments, **options):
        started.append(worker)
        if len(started) == 1:
            raise MemoryError("no room")
        return real(lane, run, worker, *arguments, **options)

    monkeypatch.setattr(processes._Lane, "_await", fail_once)
    with pytest.raises(MemoryError), TaskGroup(pool=one) as group:
        group.submit(far.square, 3)

    assert started[0].process.exitcode == -signal.SIGKILL
    assert echoes(one) == ALL


def test_long_value_comes_though_no_descriptor_is_left(one, tmp_path):
    """
    Nothing is opened for it.
    """
    with TaskGroup(pool=one) as group:
        value = group.submit(
            far.begin_and_hold, tmp_path / "begun", tmp_path / "go", bytes(1_000_000)
        )
        far.seen(tmp_path / "begun")
        with (tmp_path / "go").open("a") as file, no_more_descriptors():
            file.write("go\n")
            file.flush()
            value.wait()

    assert value.result() == bytes(1_000_000)


def test_message_that_is_not_read_is_given_up_though_no_descriptor_is_left(tmp_path):
    """
    Its pipe is shut, for which none is needed.
    """
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        worker = group.submit(far.leaves_child, tmp_path / "release").result()
        os.kill(worker, signal.SIGSTOP)
        sent = group.submit(len, bytes(10_000_000))
        (lane,) = group._run.lanes
        until(lambda: is_blocked(lane.of_thread.native_id))
        with no_more_descriptors(), shield():
            group.cancel()
            came = sent.wait(timeout=60)
        far.note(tmp_path / "release")

    assert came
    assert sent.cancelled()


# --- What goes wrong in the worker ----------------------------------------------------------------


def test_what_is_short_goes_in_one_piece(monkeypatch):
    """
    So that whoever receives it waits for no second one, from a worker that may have stopped.
    """
    pieces = []
    send = Connection._send

    def note(end, piece, *arguments):
        pieces.append(len(piece))
        return send(end, piece, *arguments)

    monkeypatch.setattr(Connection, "_send", note)
    near, there = Pipe()
    with near, there:
        near.send_bytes(bytes(_wire.SHORT))

    assert len(pieces) == 1


def test_worker_that_stops_at_its_answer_is_killed_for_its_late_task(monkeypatch):
    """
    What a task came to has a while to come home, and no more.
    """
    monkeypatch.setattr(processes, "HOMEWARD", 0.2)
    with (
        pytest.raises(TimeoutError, match="'stop_at_the_answer' timed out"),
        TaskGroup(pool=Processes(1, kill_after=0.1)) as group,
    ):
        stopped = group.with_options(timeout=0.1).submit(far.stop_at_the_answer, 9)
        came = stopped.wait(timeout=60)
        if not came:
            group._run.backend.abandon(group._run)

    assert came


@pytest.mark.parametrize("way", ["stops", "sends on"])
def test_answer_of_a_cancelled_group_has_a_while_to_come(way, monkeypatch):
    """
    Its task is over, and has a value. A worker that stops all the same is killed in the end.
    """
    homeward = 0.2 if way == "stops" else 300
    monkeypatch.setattr(processes, "HOMEWARD", homeward)
    receive = Connection.recv_bytes
    acts = []

    def received(end, *arguments):
        if acts and threading.current_thread().name == "fastpool-helper":
            acts.pop()()
        return receive(end, *arguments)

    def cancel():
        if way == "stops":
            os.kill(worker, signal.SIGSTOP)
        group.cancel()
        until(lambda: is_blocked(lane.of_thread.native_id))

    monkeypatch.setattr(Connection, "recv_bytes", received)
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        worker = group.submit(far.process).result()
        (lane,) = group._run.lanes
        acts.append(
            (lambda: (os.kill(worker, signal.SIGSTOP), cancel())) if way == "stops" else cancel
        )
        large = group.submit(bytes, 10_000_000)

    assert not acts
    assert large.cancelled() if way == "stops" else large.result() == bytes(10_000_000)


def test_nothing_runs_twice_that_a_worker_runs_without_its_pipes(one, monkeypatch, tmp_path):
    """
    Which it may until it is ended: where it is, is looked at after that.
    """
    ran = tmp_path / "ran"
    how_it_ended = _process.WorkerProcess.how_it_ended

    def late(worker):
        far.note(tmp_path / "seen")
        far.seen(ran, 5)
        return how_it_ended(worker)

    monkeypatch.setattr(_process.WorkerProcess, "how_it_ended", late)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: what comes after is in its batch
    monkeypatch.setattr(processes, "HELD", 300)
    with pytest.raises(ExceptionGroup), TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(far.return_after, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        group.submit(far.hang_up)
        group.submit(far.return_after, tmp_path / "seen")
        for number in range(200):
            group.submit(far.noted, ran, number)
        far.note(tmp_path / "go")

    assert sorted(map(int, far.lines(ran))) == [*range(200)]


def test_late_answer_to_a_report_is_not_that_to_the_next(monkeypatch):
    """
    And a worker that answers none is not asked for ever: its pipes would be full.
    """
    worker = Processes(1).start_worker()
    assert worker.calls.poll(100)
    stop(worker.process.pid)
    monkeypatch.setattr(_process, "ANSWER", 0.001)
    told = [worker.stack() for _ in range(10)]
    asked = len(worker._unanswered)
    monkeypatch.setattr(_process, "ANSWER", 100)
    os.kill(worker.process.pid, signal.SIGCONT)
    until(lambda: worker.stack() or not worker._unanswered)
    last = worker.stack()
    left = [*worker._unanswered]
    worker.close()

    assert told == [""] * 10
    assert asked == _process.UNANSWERED
    assert last.startswith("  File ")
    assert left == []


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_batch_that_is_taken_as_its_block_is_left_without_it_never_runs(monkeypatch):
    """
    Nobody has named it. Its handles have ended by then.
    """
    take_places, held, goes_on = Run.take_places, threading.Event(), threading.Event()
    sent, threads, backend = [], [], Processes(1)
    with TaskGroup(pool=backend) as group:
        group.submit(abs, 1)  # its worker is ready

    def take_late(run, lane, most):
        places = take_places(run, lane, most)
        if places:
            threads.append(threading.current_thread())
            held.set()
            assert goes_on.wait(timeout=60)
        return places

    monkeypatch.setattr(Run, "take_places", take_late)
    monkeypatch.setattr(processes._Lane, "_take_home", lambda *_: sent.append(1))
    with TaskGroup(pool=backend, grace=0, on_stuck="abandon") as group:
        batch = group.map(abs, [1, 2])
        assert held.wait(timeout=60)
        group.cancel("enough")
    cancelled = [task.cancelled() for task in batch.tasks]
    goes_on.set()
    threads[0].join(timeout=60)

    assert cancelled == [True, True]
    assert sent == []


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_future_of_a_call_that_was_taken_as_its_block_is_left_without_it_ends(monkeypatch):
    """
    Nobody comes to it any more, and nobody has withdrawn it.
    """
    take_places, held, goes_on = Run.take_places, threading.Event(), threading.Event()

    def take_late(run, lane, most):
        places = take_places(run, lane, most)
        if places:
            held.set()
            assert goes_on.wait(timeout=60)
        return places

    with TaskGroup(pool=Processes(1), grace=0, on_stuck="abandon") as group:
        group.submit(abs, 1).result()  # its worker is ready
        monkeypatch.setattr(Run, "take_places", take_late)
        future = GroupExecutor(group).submit(abs, -404)
        assert held.wait(timeout=60)
        group.cancel("enough")
    error = future.exception(timeout=20)
    goes_on.set()

    assert isinstance(error, TaskCancelledError)


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
def test_worker_that_comes_as_its_block_is_left_without_it_keeps_nothing_of_the_group(monkeypatch):
    """
    The number by which the workers know a group goes with it.
    """
    number_of, held, goes_on = Processes.number_of, threading.Event(), threading.Event()
    threads, backend = [], Processes(1)

    def number_late(backend, run):
        threads.append(threading.current_thread())
        held.set()
        assert goes_on.wait(timeout=60)
        return number_of(backend, run)

    monkeypatch.setattr(Processes, "number_of", number_late)
    with TaskGroup(pool=backend, grace=0, on_stuck="abandon") as group:
        task = group.submit(abs, -1)
        assert held.wait(timeout=60)
        group.cancel()
    goes_on.set()
    threads[0].join(timeout=60)

    assert task.cancelled()
    assert backend._numbers == {}


@pytest.mark.filterwarnings("ignore:task .* still runs:RuntimeWarning")
@pytest.mark.parametrize("looks", ["before", "after"])
def test_value_that_came_as_its_block_was_left_without_it_changes_nothing(monkeypatch, looks):
    """
    The handle says that it was left behind, and goes on to say so, whenever it is made.
    """
    came, held, goes_on, over = Ledger.all_succeeded, *(threading.Event() for _ in range(3))

    def come_late(*arguments):
        held.set()
        assert goes_on.wait(timeout=60)
        came(*arguments)
        over.set()

    monkeypatch.setattr(Ledger, "all_succeeded", come_late)
    with (
        pytest.raises(StuckTaskError),
        TaskGroup(pool=Processes(1), grace=0, on_stuck="abandon") as group,
    ):
        batch = group.map(abs, [-404])
        assert held.wait(timeout=60)
        group.cancel()
    seen = [task.cancelled() for task in batch.tasks] if looks == "before" else [True]
    goes_on.set()
    assert over.wait(timeout=60)
    seen += [task.cancelled() for task in batch.tasks]

    assert seen == [True, True]


# --- How the lane waits ---------------------------------------------------------------------------


def test_lane_sleeps_while_a_call_goes_on_before_one_that_was_cancelled(monkeypatch, tmp_path):
    """
    Though it is killed at once for what does not stop.
    """
    comes_to_rest = rests(monkeypatch, processes)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        group.submit(far.return_after, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        ahead = group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release", 404)
        behind = [group.submit(abs, number) for number in range(200)]
        far.note(tmp_path / "go")
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        behind[0].cancel()
        until(lambda: lane._due)
        until(comes_to_rest)
        far.note(tmp_path / "release")

    assert ahead.result() == 404
    assert behind[0].cancelled()


def test_lane_sleeps_while_its_worker_reads_what_it_may_not_run(monkeypatch, tmp_path):
    """
    It has no time at all, from when it begins.
    """
    comes_to_rest = rests(monkeypatch, processes)
    monkeypatch.setattr(processes, "HELD", 300)  # seconds until it is looked at again
    with (
        contextlib.suppress(TimeoutError),
        TaskGroup(pool=Processes(1, kill_after=0)) as group,
    ):
        slow = far.ReadSlowly(tmp_path / "reads", tmp_path / "has read")
        task = group.with_options(timeout=0).submit(far.echo, slow)
        far.seen(tmp_path / "reads")
        until(comes_to_rest, within=10)
        assert comes_to_rest()
        far.note(tmp_path / "has read")

    assert task.done()


def test_what_was_taken_back_is_no_reason_to_kill(tmp_path):
    """
    It runs elsewhere, or nowhere.
    """
    with TaskGroup(pool=Processes(1, kill_after=300)) as group:
        group.submit(far.return_after, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        behind = [group.submit(abs, number) for number in range(200)]
        far.note(tmp_path / "go")
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        until(lambda: len(lane._batch) == 1)
        with_its_own = len(lane._due)
        behind[0].cancel()
        until(lambda: is_blocked(lane.of_thread.native_id))
        due = len(lane._due)
        far.note(tmp_path / "release")

    assert (with_its_own, due) == (0, 0)


def test_reason_of_a_cancel_is_kept_by_no_lane(tmp_path):
    """
    Though the task was with it as its worker started.
    """

    class Reason:
        """To be kept, or not."""

    backend = Processes(1, initializer=far.return_after, initargs=(tmp_path / "go",))
    reason = Reason()
    kept = weakref.ref(reason)
    with TaskGroup(pool=backend) as group:
        task = group.submit(abs, 1)
        until(lambda: group._run.lanes)
        (lane,) = group._run.lanes
        until(lambda: lane._batch)
        task.cancel(reason)
        far.note(tmp_path / "go")
    task = group = reason = None
    gc.collect()

    assert kept() is None


def test_lane_waits_for_nothing_where_all_has_come_home():
    """
    Word of a call that takes its time may come as late as that.
    """
    lane = processes._Lane(None, 1, Processes(1))
    lane._limit_last(1.0)

    assert not lane._due


@pytest.mark.parametrize("is_over", [False, True])
def test_late_call_is_found_behind_one_that_has_time(is_over):
    """
    What it came to, if it is over, has a while to come home.
    """
    lane = processes._Lane(None, 1, Processes(1))
    lane._due = {5: (MONTH, 1.0), 6: (1.0, 1.0)}
    far = SimpleNamespace(shared=SimpleNamespace(at=6, over=is_over))
    late = [lane._is_overdue(far, now) for now in (2.0, 2.5)]

    assert late == [not is_over, False]


@pytest.fixture
def in_one_batch(monkeypatch, tmp_path):
    """Has a group of one worker take calls as one batch, with others behind; returns the tasks."""
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: batches grow, whatever they take

    def arrange(group, *calls, before=lambda tasks: None):
        group.submit(far.return_after, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        tasks = [group.submit(*call) for call in calls]
        group.map(abs, range(200))
        before(tasks)
        far.note(tmp_path / "go")
        return tasks

    return arrange


def test_call_with_nothing_before_it_is_killed_as_soon_as_the_others_are_taken_back(
    monkeypatch, in_one_batch
):
    """
    There is nothing that would have to come home first, and the worker says nothing any more.
    """
    monkeypatch.setattr(processes, "HOMEWARD", 300)  # seconds
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        stopped, other = in_one_batch(group, (signal.raise_signal, signal.SIGSTOP), (abs, 1))
        until(lambda: group._run.lanes)
        (lane,) = group._run.lanes
        until(lambda: len(lane._batch) == 1 and lane.task is stopped)
        stopped.cancel()
        came = stopped.wait(timeout=60)
        if not came:
            os.kill(lane._far.process.pid, signal.SIGCONT)

    assert came
    assert stopped.cancelled()
    assert other.result() == 1


def test_call_with_something_before_it_is_killed_once_that_has_come_home(
    monkeypatch, in_one_batch, tmp_path
):
    """
    Though it should have stopped before.
    """
    monkeypatch.setattr(processes, "HELD", 2)  # seconds: it is cancelled before others go home
    hold = far.begin_and_hold, tmp_path / "begun", tmp_path / "release"
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        quick, held = in_one_batch(group, (abs, -1), hold)
        far.seen(tmp_path / "begun")
        held.cancel()

    assert held.cancelled()
    assert quick.result() == 1


def test_lane_knows_where_its_worker_is_in_a_message_that_was_sent_again(
    monkeypatch, in_one_batch, tmp_path
):
    """
    Each call by itself, since one of them cannot be read.
    """
    monkeypatch.setattr(processes, "HELD", 300)  # seconds: nothing is taken back
    with (
        pytest.raises(ExceptionGroup),
        TaskGroup(pool=Processes(1), policy=CollectAll()) as group,
    ):
        held, _ = in_one_batch(
            group,
            (far.begin_and_hold, tmp_path / "begun", tmp_path / "release"),
            (far.echo, far.Unloadable()),
        )
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        at = lane.task
        far.note(tmp_path / "release")

    assert at is held


def test_nothing_is_taken_back_of_what_is_just_being_sent(one, monkeypatch, in_one_batch):
    """
    A long message goes by a helper, and may take its time.
    """
    in_helper, given, ways = processes._Lane._in_helper, [], []

    def in_helper_with_no_time(*arguments):
        ways.append(arguments)
        monkeypatch.setattr(processes, "HELD", 0)
        try:
            return in_helper(*arguments)
        finally:
            monkeypatch.setattr(processes, "HELD", 300)

    monkeypatch.setattr(processes, "HELD", 300)  # seconds
    monkeypatch.setattr(processes._Lane, "_in_helper", in_helper_with_no_time)
    monkeypatch.setattr(Run, "give_back", lambda run, tasks: given.extend(tasks))
    with TaskGroup(pool=one) as group:
        tasks = in_one_batch(group, *[(len, bytes([fill]) * 50_000) for fill in range(4)])

    assert ways
    assert given == []
    assert [task.result() for task in tasks] == [50_000] * 4


def test_lane_looks_no_later_than_it_is_to_kill(monkeypatch, tmp_path):
    """
    It sleeps until then, and not a second.
    """
    spans = []

    class Poll:
        def __init__(self):
            self.poller = select.poll()
            self.register, self.unregister = self.poller.register, self.poller.unregister

        def poll(self, span):
            spans.append(span)
            return self.poller.poll(span)

    monkeypatch.setattr(processes, "select", SimpleNamespace(**{**vars(select), "poll": Poll}))
    with TaskGroup(pool=Processes(1, kill_after=100)) as group:
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        far.seen(tmp_path / "begun")
        group.cancel()
        until(lambda: any(0 < span <= 100_000 for span in spans))  # milliseconds
        far.note(tmp_path / "release")


# --- What goes wrong in the lane ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holder", "name", "after"),
    [
        (Lane, "serve_here", False),
        (Run, "begin", False),
        (Processes, "number_of", False),
        (Run, "take_places", False),
        (Run, "admit", False),
        (Run, "admit", True),
        (processes._Lane, "_ship", False),
        (processes._Lane, "_ship", "with several"),
        (processes._Lane, "_take_home", True),
        (Run, "give_back", False),
        (Run, "give_back", True),
        (Run, "rest", False),
        (Run, "passed", False),
        (Run, "wake_leavers", False),
        (WorkerProcess, "rest", False),
    ],
)
@pytest.mark.parametrize("back", [False, True])
def test_lane_that_breaks_anywhere_holds_up_nobody(one, monkeypatch, holder, name, after, back):
    """
    No memory in the thread that talks to a worker: the block is left, every handle ends, who
    waits is woken, and the next group runs in the same thread.
    """
    works = getattr(holder, name)
    errors, threads = [MemoryError("no room for the books")], []
    lanes = []

    def breaks(*args, **kwargs):
        thread = threading.current_thread()
        mine = errors and thread.name.startswith("fastpool-group")
        if mine and after == "with several":
            mine = len(args[0]._batch) > 1
        elif mine and after:
            works(*args, **kwargs)
        if mine:
            lanes.append(thread)
            raise errors.pop()
        return works(*args, **kwargs)

    class Laid(dict):
        """There is a claim for every task."""

        def get(self, task):
            return self.setdefault(task, _Claim())

    def run():
        with TaskGroup(pool=one) as group:
            if name == "admit":
                group._run.disturbed, group._run.claims = True, Laid()
            tasks.extend(group.map(far.echo, ALL).tasks)
            threads.extend(start(task.wait)[0] for task in tasks)
            if back:  # what it has taken and not begun as a task sets the token
                tasks.append(group.submit(fail, ValueError("back")))
                tasks.extend(group.map(far.echo, ALL).tasks)
                threads.extend(start(task.wait)[0] for task in tasks[len(ALL) :])
            for thread in threads:
                thread.join(timeout=60)  # no wait is ended by the end of the block alone
                told.append(not thread.is_alive())

    tasks, told = [], []
    monkeypatch.setattr(holder, name, breaks)
    thread, outcome = start(run)
    for waits in (thread, *threads):
        waits.join(timeout=60)
        assert not waits.is_alive()

    assert outcome[0] is None or isinstance(outcome[0], (MemoryError, ValueError, WorkerDiedError))
    assert all(task.done() and not task.running() for task in tasks)
    assert told or outcome[0]  # the submit may have raised what broke
    assert all(told)
    errors.clear()
    with TaskGroup(pool=one) as group:
        assert group.map(far.echo, ALL).results() == ALL
        (lane,) = group._run.lanes
    assert not lanes or lane.of_thread in lanes


def test_lane_that_breaks_once_its_tasks_have_ended_fails_the_group(tmp_path):
    """
    They keep what they have come to.
    """
    errors = [MemoryError("no room for a tuple")]

    def breaks(task):
        if errors:
            raise errors.pop()

    with pytest.raises(MemoryError), TaskGroup(pool=Processes(1)) as group:
        task = group.submit(far.return_after, tmp_path / "go", 404)
        group._run.watch(task, SimpleNamespace(notify=breaks))
        far.note(tmp_path / "go")
        until(lambda: not errors)

    assert task.result() == 404


def test_value_that_there_is_no_memory_for_is_lost_with_its_worker(monkeypatch):
    """
    The task has run, so it is not run again.
    """
    errors = [MemoryError("no room for a value")]

    def breaks(*_):
        raise errors.pop()

    monkeypatch.setattr(Ledger, "all_succeeded", breaks)
    with (
        pytest.raises(WorkerDiedError, match=r"what task 'abs' came to in .* is lost") as raised,
        TaskGroup(pool=Processes(1)) as group,
    ):
        group.submit(abs, -404)

    assert type(raised.value.__cause__) is MemoryError


def test_values_behind_one_that_there_is_no_memory_for_are_lost_with_their_worker(
    monkeypatch, in_one_batch
):
    """
    Each of them, and none that was entered before.
    """
    errors = [MemoryError("no room for a tuple")]

    def breaks(task):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(processes, "HELD", 300)  # seconds: they come home together
    with pytest.raises(WorkerDiedError, match="is lost"), TaskGroup(pool=Processes(1)) as group:
        tasks = in_one_batch(
            group,
            *[(abs, number) for number in range(4)],
            before=lambda tasks: group._run.watch(tasks[0], SimpleNamespace(notify=breaks)),
        )

    assert not errors
    assert tasks[0].result() == 0
    assert [type(task.exception()) for task in tasks[1:]] == [WorkerDiedError] * 3


def test_calls_that_there_is_no_memory_to_take_back_end_with_their_group(monkeypatch, tmp_path):
    """
    None is lost; and the lane has another worker for the next group.
    """
    give_back, errors = Run.give_back, [MemoryError("no room for a loop")]

    def breaks(*arguments):
        if errors:
            raise errors.pop()
        give_back(*arguments)

    def run():
        with TaskGroup(pool=backend) as group:
            group.submit(far.return_after, tmp_path / "go")
            group.map(abs, range(8))  # in one batch, and then in one of 64:
            held = group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
            tasks.extend((held, *(group.submit(abs, number) for number in range(10))))
            far.note(tmp_path / "go")
            for task in tasks:
                with shield():
                    task.wait()

    backend, tasks = Processes(1), []
    monkeypatch.setattr(processes, "HELD", 0)  # all that is behind a call is taken back at once
    monkeypatch.setattr(Run, "give_back", breaks)
    thread, outcome = start(run)
    thread.join(timeout=60)

    assert isinstance(outcome[0], (MemoryError, WorkerDiedError))
    assert not errors
    assert all(task.done() for task in tasks)
    assert echoes(backend) == ALL


def test_calls_that_there_is_no_memory_to_take_back_run_no_second_time(monkeypatch, tmp_path):
    """
    Another worker has taken one of them by then, and runs it.
    """
    errors = [MemoryError("no room for a block")]

    class Queue(deque):
        def appendleft(self, task):
            if errors and task is tasks[1]:
                far.note(tmp_path / "go on")  # the other worker is free, and takes the third
                far.seen(tmp_path / "third")
                lanes.append(tasks[0]._lane)
                raise errors.pop()
            super().appendleft(task)

    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: batches grow, whatever they take
    tasks, lanes = [], []
    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(pool=Processes(2), policy=CollectAll()) as group,
    ):
        group._run.queue = Queue()
        group.submit(far.begin_and_hold, tmp_path / "other", tmp_path / "go on")
        far.seen(tmp_path / "other")
        group.submit(far.return_after, tmp_path / "go")
        group.map(abs, range(8))
        tasks.append(group.submit(far.begin_and_hold, tmp_path / "first", tmp_path / "never"))
        tasks.append(group.submit(abs, -1))
        tasks.append(group.submit(far.begin_and_hold, tmp_path / "third", tmp_path / "end", 404))
        behind = group.map(abs, range(400)).tasks
        far.note(tmp_path / "go")
        far.seen(tmp_path / "third")
        until(lambda: lanes and not lanes[0]._batch and all(task.done() for task in behind))
        ended = tasks[2].done()
        far.note(tmp_path / "end")

    assert MemoryError in map(type, raised.value.exceptions)
    assert tasks[1].cancelled()
    assert not ended
    assert tasks[2].result() == 404
    assert len(far.lines(tmp_path / "third")) == 1


def test_calls_of_a_dead_worker_run_no_second_time_though_there_is_no_memory_to_tell(
    monkeypatch, in_one_batch, tmp_path
):
    """
    It had begun some, and their values have not come home.
    """
    errors = [MemoryError("no room for a tuple")]

    def breaks(task):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(processes, "HELD", 300)  # seconds: nothing goes home before
    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(pool=Processes(1), policy=CollectAll()) as group,
    ):
        *begun, _ = in_one_batch(
            group,
            *[(far.noted, tmp_path / f"{number}", number) for number in range(3)],
            (signal.raise_signal, signal.SIGKILL),
            before=lambda tasks: group._run.watch(tasks[-1], SimpleNamespace(notify=breaks)),
        )

    assert MemoryError in map(type, raised.value.exceptions)
    assert all(task.done() for task in begun)
    assert [len(far.lines(tmp_path / f"{number}")) for number in range(3)] == [1, 1, 1]


def test_who_waits_is_told_though_the_lane_breaks_as_it_tells(monkeypatch, tmp_path):
    """
    In a group whose token is set already, so that no cancel wakes it; by the end of the block.
    """
    notify, errors = Ledger.notify, [MemoryError("no room for a tuple")]

    def breaks(run, task):
        if errors and task is held:
            raise errors.pop()
        notify(run, task)

    with TaskGroup(pool=Processes(1)) as group:
        held = group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release", 404)
        far.seen(tmp_path / "begun")
        group.cancel()
        waiter, outcome = start(held.result)
        until(lambda: group._run.watchers)
        monkeypatch.setattr(Ledger, "notify", breaks)
        far.note(tmp_path / "release")
    waiter.join(timeout=60)

    assert outcome == [404]
    assert not errors
