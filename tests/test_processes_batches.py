"""
Calls that go to a worker process many at a time, and what one of them may do to the others.
"""

import contextlib
import contextvars
import os
import select
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import far
import pytest
from blocked import ended, is_blocked, rests
from staging import start, until

from fastpool import (
    CollectAll,
    TaskGroup,
    WorkerDiedError,
    cancellable,
    current_token,
    shield,
    sleep,
)
from fastpool._run import Run
from fastpool.backends import _process, processes
from fastpool.backends._wire import dump_reason
from fastpool.backends.processes import Processes

MANY = 100


class Unsendable:
    """A function that cannot be pickled, by value neither."""

    __name__ = "unsendable"

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self):
        """Never runs."""


class Heavy:
    """An argument that takes much room, and notes that it was read."""

    def __init__(self, path):
        self.path, self.data = path, bytes(100_000)

    def __setstate__(self, state):
        with open(state["path"], "a") as file:
            file.write("x")


class Deadly:
    """A value that kills the process that pickles it."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for(path):
    """Hold the worker, so that what comes after is queued."""
    while not path.exists():
        time.sleep(0.01)


def ignore(value):
    """Nothing comes home but that it was called."""


def leave_deadly(path):
    """Leave a trace of having run, and a value to die of."""
    with path.open("a") as file:
        file.write("x")
    return Deadly()


def note_and_sleep(path):
    """Say that it has begun, and sleep on the token."""
    path.touch()
    sleep(60)


def mark_or_hold(path, index):
    """The tenth sleeps, the others do not."""
    if index == 10:
        note_and_sleep(path)
    return index


leaked = []  # in the worker: the context of the call before, and its token


def token_of_the_call_before(index):
    """Whether the context of an earlier call still finds that call's token, and it is ended."""
    mine = current_token()
    kept = True
    if leaked:
        context, token = leaked.pop()
        found = context.run(current_token)
        kept = found is token and token is not mine and not token.cancel()
    leaked.append((contextvars.copy_context(), mine))
    return kept


@cancellable
def nested(token, index):
    """What a call finds its token by, all the same one."""
    return current_token() is token


@pytest.fixture
def one():
    """A backend with one worker, so that there are batches."""
    return Processes(1)


@pytest.mark.parametrize("bad", ["argument", "function"])
def test_call_that_cannot_be_sent_fails_alone(one, tmp_path, bad):
    """
    Whatever stands before it and behind it runs, and the error is its own.
    """
    with pytest.raises(ExceptionGroup) as failed, TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(wait_for, tmp_path / "go")
        before = [group.submit(abs, -number) for number in range(MANY)]
        if bad == "argument":
            wrong = group.submit(abs, threading.Lock())
        else:
            wrong = group.submit(Unsendable())
        behind = [group.submit(abs, -number) for number in range(MANY)]
        (tmp_path / "go").touch()

    (error,) = failed.value.exceptions
    assert isinstance(error, TypeError)
    assert ("'abs'" if bad == "argument" else "unsendable()") in str(error)
    assert wrong.exception() is error
    for tasks in (before, behind):
        assert [task.result(timeout=0) for task in tasks] == list(range(MANY))


def test_items_of_a_map_that_cannot_be_sent_fail_alone(one, tmp_path):
    """
    As with calls that were submitted one by one.
    """
    values = [*range(MANY), threading.Lock(), *range(MANY)]
    with pytest.raises(ExceptionGroup) as failed, TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(wait_for, tmp_path / "go")
        batch = group.map(abs, values)
        (tmp_path / "go").touch()

    assert len(failed.value.exceptions) == 1
    assert [index for index, task in enumerate(batch.tasks) if task.exception()] == [MANY]
    assert [task.result() for task in batch.tasks if not task.exception()] == [*range(MANY)] * 2


def test_task_does_not_run_again_whose_worker_dies_as_it_sends_the_value(one, tmp_path):
    """
    It has run, so its failure is the worker's death.
    """
    with pytest.raises(WorkerDiedError, match="SIGKILL"), TaskGroup(pool=one) as group:
        group.submit(leave_deadly, tmp_path / "runs")

    assert (tmp_path / "runs").read_text() == "x"


def test_calls_one_by_one_and_by_map_take_turns(one, tmp_path):
    """
    Each result is that of its own call, whatever stands next to it in the queue.
    """
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        alone, batches, named = [], [], []
        for number in range(MANY):
            alone.append(group.submit(pow, 2, number))
            batches.append(group.map(pow, range(3), [number] * 3))
            named.append(group.with_options(name="named").submit(int, "11", base=number % 9 + 2))
        (tmp_path / "go").touch()

    for number in range(MANY):
        assert alone[number].result() == 2**number
        assert batches[number].results() == [base**number for base in range(3)]
        assert named[number].result() == number % 9 + 3


def test_item_of_a_map_is_cancelled_alone_where_it_runs(one, tmp_path):
    """
    The worker that sleeps in it goes on with the others.
    """
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        batch = group.starmap(mark_or_hold, [(tmp_path / "asleep", n) for n in range(MANY)])
        (tmp_path / "go").touch()
        wait_for(tmp_path / "asleep")
        cancelled = batch.tasks[10].cancel("enough")

    assert cancelled
    assert [n for n, task in enumerate(batch.tasks) if task.cancelled()] == [10]
    assert [task.result() for task in batch.tasks if not task.cancelled()] == [
        number for number in range(MANY) if number != 10
    ]


@pytest.mark.parametrize("way", ["sleeps", "lets no thread run"])
def test_call_that_takes_its_time_holds_up_no_other(tmp_path, way):
    """
    What stands behind it in its batch goes to another worker, what stands before it comes home.
    """
    backend = Processes(2, kill_after=0.5)
    with TaskGroup(pool=backend) as group:
        for _ in range(2):
            group.submit(wait_for, tmp_path / "go")
        before = group.map(abs, range(MANY))
        if way == "sleeps":
            slow = group.submit(wait_for, tmp_path / "never")
        else:
            slow = group.submit(far.holds_the_lock, tmp_path / "begun")
        behind = group.map(abs, range(MANY))
        (tmp_path / "go").touch()
        came = behind.results(timeout=100)
        if way == "sleeps":
            came += before.results(timeout=100)
        done = slow.done()
        group.cancel()

    assert came == [*range(MANY)] * (2 if way == "sleeps" else 1)
    assert not done


def test_call_may_wait_for_one_that_was_behind_it(tmp_path):
    """
    As on threads, where there is a worker for each; time and again.
    """
    backend = Processes(2)
    for number in range(3):
        go, met = tmp_path / f"go-{number}", tmp_path / f"met-{number}"
        with TaskGroup(pool=backend) as group:
            for _ in range(2):
                group.submit(wait_for, go)
            group.map(abs, range(MANY))
            waiting = group.submit(wait_for, met)
            meeting = group.submit(met.touch)
            group.map(abs, range(MANY))
            go.touch()
            assert waiting.wait(timeout=60)

        assert meeting.done()


def test_values_that_came_home_early_are_those_of_their_calls(one, tmp_path):
    """
    Also where some of them cannot come, and the call that took its time fails.
    """
    with pytest.raises(ExceptionGroup), TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(wait_for, tmp_path / "go")
        tasks = [
            group.submit(*call)
            for number in range(MANY)
            for call in ((pow, number, 2), (far.lock_or, number, 50))
        ]
        slow = group.submit(far.fail_after, tmp_path / "release", KeyError("late"))
        tasks += [group.submit(pow, number, 3) for number in range(2 * MANY)]
        (tmp_path / "go").touch()
        early = [task.exception(timeout=100) for task in tasks[: 2 * MANY]]
        far.note(tmp_path / "release")

    assert [at for at, error in enumerate(early) if error] == [101]
    assert isinstance(slow.exception(), KeyError)
    assert [task.result() for task in tasks[: 2 * MANY : 2]] == [n**2 for n in range(MANY)]
    assert [task.result() for task in tasks[1 : 2 * MANY : 2] if not task.exception()] == [
        number for number in range(MANY) if number != 50
    ]
    assert [task.result() for task in tasks[2 * MANY :]] == [n**3 for n in range(2 * MANY)]


def test_waiting_for_the_group_waits_for_what_is_given_back(tmp_path, monkeypatch):
    """
    It was submitted before, whoever has it meanwhile.
    """
    with monkeypatch.context() as patch, TaskGroup(pool=Processes(2)) as group:
        patch.setattr(processes, "HELD", 300)  # what is behind a call stays where it is for now
        for _ in range(2):
            group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(2 * MANY))
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        held = group.submit(far.begin_and_hold, tmp_path / "then", tmp_path / "at last")
        last = group.map(abs, range(MANY))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        thread, outcome = start(lambda: group.wait() or held.done())
        until(lambda: is_blocked(thread.native_id, among=None))
        patch.undo()
        far.note(tmp_path / "release")
        far.seen(tmp_path / "then")
        last.wait()
        until(lambda: outcome or is_blocked(thread.native_id, among=None))
        far.note(tmp_path / "at last")
        done = ended(thread, outcome)

    assert done


def test_waiting_for_the_group_waits_for_nothing_that_came_later(tmp_path):
    """
    Its worker goes on with that at once.
    """
    held = [(tmp_path / f"begun-{number}", tmp_path / f"release-{number}") for number in range(2)]
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        group.submit(far.begin_and_hold, *held[0])
        far.seen(held[0][0])
        thread, outcome = start(group.wait)
        until(lambda: is_blocked(thread.native_id, among=None))
        later = group.submit(far.begin_and_hold, *held[1])
        far.note(held[0][1])
        came = ended(thread, outcome)
        done = later.done()
        far.note(held[1][1])

    assert came is None
    assert not done


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="without a GIL the task cannot keep the values before it from coming home",
)
@pytest.mark.parametrize("way", ["cancelled", "late"])
def test_nothing_before_a_call_whose_worker_is_killed_runs_again(way, tmp_path, monkeypatch):
    """
    It has run, and its value is lost where the worker can send nothing any more.
    """
    ahead = [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)
    ran = tmp_path / "ran"
    with (
        pytest.raises(ExceptionGroup) as raised,
        TaskGroup(pool=Processes(1, kill_after=0.3), policy=CollectAll()) as group,
    ):
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(MANY))
        before = [group.submit(far.noted, ran, number) for number in range(MANY)]
        options = group.with_options(timeout=0.1 if way == "late" else None)
        stuck = options.submit(far.holds_the_lock, tmp_path / "begun")
        behind = group.map(abs, range(MANY))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        (lane,) = (one for one in threading.enumerate() if group.name in one.name)
        until(lambda: is_blocked(lane.native_id))  # it has looked at the clock as it is
        ahead[0] = 1000  # seconds, in which nothing has come
        (stuck if way == "cancelled" else behind.tasks[0]).cancel()  # the lane looks then

    lost = [task for task in before if task.exception()]
    assert far.lines(ran) == [*map(str, range(MANY))]
    assert lost
    assert {type(task.exception()) for task in lost} == {WorkerDiedError}
    assert stuck.cancelled() if way == "cancelled" else type(stuck.exception()) is TimeoutError
    assert len(raised.value.exceptions) == len(lost) + (way == "late")


def test_lane_goes_on_with_what_comes_as_it_comes_to_rest(one, monkeypatch):
    """
    Nobody else is called for that.
    """
    late = []
    take = Run.take_places

    def submit_when_empty(run, lane, most):
        taken = take(run, lane, most)
        if not taken and not late:
            late.append(group.submit(abs, -7))
        return taken

    monkeypatch.setattr(Run, "take_places", submit_when_empty)
    with TaskGroup(pool=one) as group:
        group.submit(abs, -3)
        until(lambda: late)
        came = late[0].wait(timeout=60)

    assert came
    assert late[0].result() == 7


@pytest.fixture
def shipped(monkeypatch):
    """How many tasks each batch has, in order."""
    sizes = []
    ship = processes._Lane._ship

    def noted(lane, run, number, batch, bell):
        sizes.append(len(batch))
        return ship(lane, run, number, batch, bell)

    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: however slow the machine is
    monkeypatch.setattr(processes, "HELD", 300)
    monkeypatch.setattr(processes._Lane, "_ship", noted)
    return sizes


def test_quick_calls_travel_together(one, shipped):
    """
    More and more at once, and so on far fewer ways than there are calls.
    """
    with TaskGroup(pool=one) as group:
        batch = group.map(abs, range(10_000))

    assert batch.results() == [*range(10_000)]
    assert sum(shipped) == 10_000
    assert len(shipped) < 100


def test_large_arguments_go_one_by_one(one, tmp_path):
    """
    A worker has not read many that it may not come to, nor taken the room for them.
    """
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(MANY))
        group.map(ignore, [Heavy(tmp_path / "before") for _ in range(MANY)])
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        group.map(ignore, [Heavy(tmp_path / "behind") for _ in range(MANY)])
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        early = (tmp_path / "behind").exists()
        far.note(tmp_path / "release")

    assert (tmp_path / "before").exists()
    assert not early


def test_large_arguments_go_one_by_one_after_a_batch_that_was_cut_short(tmp_path, monkeypatch):
    """
    Which has come far, but with too much.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    with (
        contextlib.suppress(ExceptionGroup),
        TaskGroup(pool=Processes(1), policy=CollectAll()) as group,
    ):
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        group.map(ignore, [Heavy(tmp_path / "before") for _ in range(10)])
        group.submit(far.fail, ValueError("no"))
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        group.map(ignore, [Heavy(tmp_path / "behind") for _ in range(200)])
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        behind = (tmp_path / "behind").read_text()
        far.note(tmp_path / "release")

    assert len(behind) == 64 - 10 - 2  # all of them were read once


@pytest.mark.parametrize("way", ["map", "submit"])
def test_every_call_has_a_token_of_its_own(one, tmp_path, way):
    """
    Who keeps the context of a call finds its token there, which nothing sets any more.
    """
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        if way == "map":
            found = group.map(token_of_the_call_before, range(MANY)).tasks
        else:
            found = [group.submit(token_of_the_call_before, number) for number in range(MANY)]
        injected = group.map(nested, range(MANY))
        (tmp_path / "go").touch()

    assert all(task.result() for task in found)
    assert all(injected.results())


def test_decorated_function_that_goes_by_value_keeps_its_token(one):
    """
    Local ones, and those that they lead to: by value, by name, and themselves.
    """
    pytest.importorskip("cloudpickle")

    @cancellable
    def inner(token, value):
        return current_token() is token, value

    @cancellable(param="event")
    def outer(value, *, event=None):
        if value == 0:
            return [current_token() is event]
        return [event is not None, inner(value), nested(value), *outer(value - 1)]

    with TaskGroup(pool=one) as group:
        found = group.submit(outer, 1)

    assert found.result() == [True, (True, 1), True, True]


def test_forked_child_of_a_task_ends_with_it_and_says_nothing(one, tmp_path, monkeypatch):
    """
    It would bring home what others are taken to have returned, and run what comes after again.
    Nor does it drop what that was called with, which runs code of theirs in the fork.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: what comes after is in its batch
    ran, dropped = tmp_path / "ran", tmp_path / "dropped"
    with TaskGroup(pool=one) as group:
        worker = group.submit(os.getpid).result()
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(1608))  # in batches that grow, and then in one with:
        child = group.submit(far.forks)
        group.map(ignore, [far.NotesItsEnd(dropped) for _ in range(9)])
        behind = group.map(far.noted, [ran] * MANY, range(MANY))
        (tmp_path / "go").touch()
        values = behind.results()
        _, status = group.submit(os.waitpid, child.result(), 0).result()
    with TaskGroup(pool=one) as group:
        after = group.map(abs, range(MANY)).results()

    assert status == 0
    assert values == [*range(MANY)]
    assert far.lines(ran) == [*map(str, range(MANY))]
    assert set(far.lines(dropped)) <= {str(worker), str(os.getpid())}
    assert after == [*range(MANY)]


def test_worker_is_killed_for_a_late_call_though_one_before_has_forked(tmp_path, monkeypatch):
    """
    The child's end is not taken for the worker's.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: what comes after is in its batch
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        group.submit(far.forks)
        child = group.submit(os.wait)
        late = group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        group.map(abs, range(200))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        late.cancel()

    assert late.cancelled()
    assert child.result()[1] == 0


def test_forked_child_of_an_argument_ends_and_says_nothing(one, tmp_path):
    """
    One that is forked as that is read.
    """
    ran = tmp_path / "ran"
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        tasks = [group.submit(far.noted, ran, far.ForksAsItIsRead()) for _ in range(2)]
        (tmp_path / "go").touch()
        children = [task.result() for task in tasks]
        ends = [group.submit(os.waitpid, child, 0).result() for child in children]

    assert [status for _, status in ends] == [0, 0]
    assert len(far.lines(ran)) == 2


def test_forked_child_of_an_initializer_ends_and_says_nothing(capfd):
    """
    The worker itself goes on.
    """
    with TaskGroup(pool=Processes(1, start_method="spawn", initializer=far.forks)) as group:
        _, status = group.submit(os.wait).result()

    assert status == 0
    assert capfd.readouterr().err == ""


def lane_of(group):
    """The one thread that serves a group."""
    (lane,) = (one for one in threading.enumerate() if group.name in one.name)
    return lane


@pytest.mark.parametrize("way", ["killed", "cancelled"])
def test_message_that_is_not_read_holds_up_nobody(way, tmp_path):
    """
    Though the pipe takes no more of it, and a child of the worker's keeps that open.
    """
    with TaskGroup(pool=Processes(1, kill_after=0)) as group:
        worker = group.submit(far.leaves_child, tmp_path / "release").result()
        os.kill(worker, signal.SIGSTOP)
        sent = group.submit(len, bytes(10_000_000))
        until(lambda: is_blocked(lane_of(group).native_id))
        if way == "killed":
            os.kill(worker, signal.SIGKILL)
        else:
            group.cancel()
        with shield():
            came = sent.wait(timeout=60)
        far.note(tmp_path / "release")
        if not came:
            os.kill(worker, signal.SIGCONT)

    assert came
    assert sent.cancelled() if way == "cancelled" else sent.result() == 10_000_000


def at_the_long_answer(monkeypatch, act):
    """Have something happen, once, just before a helper receives a long answer."""
    receive = Connection.recv_bytes
    acts = [act]

    def received(end, *arguments):
        if acts and threading.current_thread().name == "fastpool-helper":
            acts.pop()()
        return receive(end, *arguments)

    monkeypatch.setattr(Connection, "recv_bytes", received)
    return acts


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_answer_that_is_cut_short_holds_up_nobody(way, monkeypatch, tmp_path):
    """
    Whether the worker has died, and a child of it keeps its pipe open, or does not go on.
    """
    with contextlib.suppress(WorkerDiedError), TaskGroup(pool=Processes(1, kill_after=0)) as group:
        worker = group.submit(far.leaves_child, tmp_path / "release").result()
        acts = at_the_long_answer(monkeypatch, lambda: os.kill(worker, way))
        sent = group.submit(bytes, 10_000_000)
        until(lambda: not acts)
        if way == signal.SIGSTOP:
            group.cancel()
        with shield():
            came = sent.wait(timeout=60)
        far.note(tmp_path / "release")
        if not came:
            os.kill(worker, signal.SIGCONT)

    assert came
    assert sent.cancelled() or type(sent.exception()) is WorkerDiedError


def test_answer_that_has_come_whole_counts_though_its_worker_has_died(monkeypatch):
    """
    And the helper that receives it has yet to begin when that is seen.
    """
    hung_up = []
    hang_up = _process.WorkerProcess.hang_up
    monkeypatch.setattr(
        _process.WorkerProcess, "hang_up", lambda worker: hung_up.append(hang_up(worker)) or None
    )

    def die():
        until(lambda: is_blocked(worker, process=worker))  # all is sent: it waits for more
        os.kill(worker, signal.SIGKILL)
        until(lambda: hung_up)

    with TaskGroup(pool=Processes(1)) as group:
        worker = group.submit(far.process).result()
        at_the_long_answer(monkeypatch, die)
        sent = group.submit(bytes, 100_000)  # which the pipe takes at once

    assert hung_up
    assert sent.result() == bytes(100_000)


def test_values_that_are_on_their_way_are_not_lost_to_a_task_that_was_late(monkeypatch, tmp_path):
    """
    It is over, so its worker is not killed for it any more.
    """
    ahead = [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    monkeypatch.setattr(processes, "HOMEWARD", 300)
    with TaskGroup(pool=Processes(1, kill_after=300)) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        large = group.submit(bytes, 10_000_000)
        late = group.submit(far.waits, "sleep", tmp_path / "begun", tmp_path / "ended")
        group.map(abs, range(200))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes

        def be_late():
            assert lane._due
            ahead[0] = 10_000  # seconds
            lane._bell.open()
            until(lambda: [span for _, span in lane._due.values()] == [None])

        acts = at_the_long_answer(monkeypatch, be_late)
        late.cancel()

    assert not acts
    assert late.cancelled()
    assert large.result() == bytes(10_000_000)


def test_values_that_are_on_their_way_are_not_cut_off_for_a_task_that_is_late(
    monkeypatch, tmp_path
):
    """
    Its worker is killed once they have had time to come.
    """
    ahead = [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 1000)  # ...until it is taken back
    monkeypatch.setattr(processes, "HOMEWARD", 1000)
    with TaskGroup(pool=Processes(1, kill_after=1500)) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        large = group.submit(bytes, 10_000_000)
        late = group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        group.map(abs, range(200))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        thread = lane_of(group)

        def let_pass(span):
            ahead[0] += span
            lane._bell.open()
            until(lambda: not select.select([lane._bell], [], [], 0)[0])
            until(lambda: is_blocked(thread.native_id))

        acts = at_the_long_answer(monkeypatch, lambda: let_pass(500))
        late.cancel()
        until(lambda: lane._due)
        let_pass(1100)
        until(lambda: not acts)

    assert late.cancelled()
    assert large.result() == bytes(10_000_000)


def test_lane_sleeps_while_much_is_received(monkeypatch):
    """
    Also with something that it has yet to tell its worker, which hears it no more then.
    """
    comes_to_rest = rests(monkeypatch, processes)
    with TaskGroup(pool=Processes(1)) as group:
        group.submit(abs, 1).result()

        def have_more_to_tell():
            (lane,) = group._run.lanes
            lane._untold.append((lane._first, dump_reason("too late")))
            lane._bell.open()
            until(comes_to_rest)

        at_the_long_answer(monkeypatch, have_more_to_tell)
        sent = group.submit(bytes, 10_000_000)

    assert sent.result() == bytes(10_000_000)


def test_worker_that_asks_is_told_of_all(monkeypatch, tmp_path):
    """
    Though its pipe takes no more when it does.
    """
    monkeypatch.setattr(processes, "HELD", 300)  # seconds: nothing is taken back
    ran, times = tmp_path / "ran", []

    def hears(_):
        (lane,) = group._run.lanes
        if lane._asked:
            times.append(1)
        return len(times) > 1

    with TaskGroup(pool=Processes(1)) as group:
        monkeypatch.setattr(_process.WorkerProcess, "hears", hears)
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(MANY))
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        task = group.submit(far.noted, ran, 1)
        group.map(abs, range(MANY))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        task.cancel()
        far.note(tmp_path / "release")

    assert task.cancelled()
    assert not ran.exists()


def test_worker_that_was_told_more_than_it_could_read_is_told_the_rest(monkeypatch, tmp_path):
    """
    As soon as it reads again.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    ran = tmp_path / "ran"
    with TaskGroup(pool=Processes(1, kill_after=None)) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(1608))  # in batches that grow, and then in one with:
        group.submit(far.computes, tmp_path / "begun")
        behind = [group.submit(far.noted, ran, number) for number in range(500)]
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        for task in behind:
            task.cancel("x" * 12_000)
        came = behind[-1].wait(timeout=60)
        if not came:
            os.kill(int(far.lines(tmp_path / "begun")[0]), signal.SIGKILL)

    assert came
    assert not ran.exists()


def test_worker_that_hears_nothing_is_killed_however_much_it_was_told(monkeypatch, tmp_path):
    """
    More than its pipe takes.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 1)  # ...nor is taken back before all are cancelled
    with TaskGroup(pool=Processes(1, kill_after=0.1)) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(1608))  # in batches that grow, and then in one with:
        stuck = group.submit(far.holds_the_lock, tmp_path / "begun")
        behind = [group.submit(abs, number) for number in range(2000)]
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        for task in behind:
            task.cancel()
        stuck.cancel()
        came = stuck.wait(timeout=60)
        if not came:
            os.kill(int(far.lines(tmp_path / "begun")[0]), signal.SIGKILL)

    assert came


def test_who_waits_for_what_a_cancelled_group_takes_back_hears_of_it(tmp_path):
    """
    Also who began to wait when it was cancelled already.
    """
    begun, release = tmp_path / "begun", tmp_path / "release"
    backend = Processes(1, initializer=far.begin_and_hold, initargs=(begun, release))
    with TaskGroup(pool=backend) as group:
        task = group.submit(abs, -1)
        far.seen(begun)
        group.cancel()
        thread, outcome = start(task.wait)
        until(lambda: is_blocked(thread.native_id, among=None))
        far.note(release)
        thread.join(timeout=60)
        heard = list(outcome)

    assert heard == [True]
    assert task.cancelled()


# --- What a batch is made of ----------------------------------------------------------------------


def seconds_left(_):
    """What the call's own token says."""
    return current_token().remaining()


@pytest.mark.parametrize("way", ["map", "submit"])
def test_timeout_of_a_call_goes_along(one, way):
    """
    Also where many calls of one function do.
    """
    with TaskGroup(pool=one) as group:
        limited = group.with_options(timeout=300)  # seconds
        if way == "map":
            left = limited.map(seconds_left, range(MANY)).results()
        else:
            left = [
                task.result() for task in [limited.submit(seconds_left, 0) for _ in range(MANY)]
            ]

    assert all(seconds is not None and 0 < seconds <= 300 for seconds in left)


def test_batches_shrink_to_what_is_to_go_at_once(one, shipped):
    """
    By what the last one came to: 64 of 4 KiB are four times as much.
    """
    with TaskGroup(pool=one) as group:
        group.map(len, [bytes(4096) for _ in range(400)])

    assert shipped[:4] == [1, 8, 64, 15]
    assert sum(shipped) == 400


def test_calls_whose_values_are_large_go_one_by_one(one, shipped):
    """
    What comes home counts, too.
    """
    with TaskGroup(pool=one) as group:
        group.map(bytes, [100_000] * 50)

    assert shipped == [1] * 50


def test_second_of_two_calls_is_not_held_up_by_the_first(tmp_path, monkeypatch):
    """
    However short the batch is.
    """
    backend = Processes(2)
    take = Run.take_places
    taken = []

    def take_two(run, lane, most):
        places = take(run, lane, 2 if run.queue else most)
        taken.append(len(places))
        return places

    monkeypatch.setattr(Run, "take_places", take_two)
    with TaskGroup(pool=backend) as group:
        first = group.submit(wait_for, tmp_path / "met")
        second = group.submit((tmp_path / "met").touch)
        came = first.wait(timeout=60)
        if not came:
            (tmp_path / "met").touch()

    assert came
    assert second.done()


def batched(monkeypatch, at, first=5, count=4):
    """A lane that has so many tasks, and whose worker is at the one with that number."""
    lane = processes._Lane(None, 1, Processes(1))
    lane._batch = [SimpleNamespace(_state=0, number=number) for number in range(count)]
    lane._first = first
    if at is not None:
        lane._far = SimpleNamespace(shared=SimpleNamespace(at=at))
    monkeypatch.setattr(processes, "handle", lambda at: at)
    return lane


@pytest.mark.parametrize(
    ("at", "number"), [(None, 0), (-1, 0), (4, 0), (5, 0), (6, 1), (7, 2), (8, 3), (9, 3), (99, 3)]
)
def test_lane_is_at_the_task_that_its_worker_is_at(at, number, monkeypatch):
    """
    At the first before it has begun, and at the last when all are over.
    """
    assert batched(monkeypatch, at).task.number == number


@pytest.mark.parametrize(("timeout", "span"), [(0.25, 1.75), (0, 1.5), (-9, 1.5), (None, None)])
def test_last_call_of_a_batch_has_its_timeout_and_then_a_while(timeout, span, monkeypatch):
    """
    A timeout of less than nothing is over at once, and no sooner.
    """
    lane = batched(monkeypatch, 8)
    lane._batch[-1]._options = SimpleNamespace(timeout=timeout)
    lane._limit_last(1.5)

    assert [given for _, given in lane._due.values()] == ([] if span is None else [span])
    assert [*lane._due] == ([] if span is None else [8])


@pytest.mark.parametrize("way", ["is sent", "is read"])
def test_time_of_a_call_does_not_begin_before_it_does(way, tmp_path, monkeypatch):
    """
    However long it takes until the worker has it, and has read it.
    """
    ahead, looks = [0], []

    def look():
        looks.append(threading.get_ident())
        return time.monotonic() + ahead[0]

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=look))
    send = Connection.send_bytes
    acts = []

    def comes_to_rest():
        before = len(looks)
        time.sleep(0.05)  # seconds: one that never rests looks a thousand times
        return len(looks) == before

    def let_pass(span):
        ahead[0] += span
        lane._bell.open()
        until(lambda: not select.select([lane._bell], [], [], 0)[0])
        until(comes_to_rest)

    def send_late(end, *arguments):
        if acts and threading.current_thread().name == "fastpool-helper":
            acts.pop()()
        return send(end, *arguments)

    monkeypatch.setattr(Connection, "send_bytes", send_late)
    with TaskGroup(pool=Processes(1, kill_after=300)) as group:
        group.submit(abs, 1).wait()
        until(lambda: group._run.idle)
        (lane,) = group._run.idle
        paths = [tmp_path / name for name in ("begun", "release")]
        if way == "is sent":
            acts.append(lambda: let_pass(500))
            large = bytes(1_000_000)
            task = group.with_options(timeout=300).submit(far.begin_and_hold, *paths, large)
        else:
            slow = far.ReadSlowly(tmp_path / "reads", tmp_path / "has read")
            task = group.with_options(timeout=300).submit(far.begin_and_hold, *paths, slow)
            far.seen(tmp_path / "reads")
            let_pass(700)
            far.note(tmp_path / "has read")
        far.seen(paths[0])
        let_pass(500)
        far.note(paths[1])

    assert not acts
    assert task.exception() is None


def test_batch_whose_worker_cannot_be_replaced_fails_one_by_one(one, monkeypatch, tmp_path):
    """
    Each of its tasks says why, and none is forgotten.
    """
    ready = processes._Lane._ready_worker

    def refuse(lane, *arguments):
        if len(lane._batch) > 8 or far.lines(tmp_path / "refused"):
            far.note(tmp_path / "refused")
            raise OSError("there is no room for more")
        return ready(lane, *arguments)

    monkeypatch.setattr(processes._Lane, "_ready_worker", refuse)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)
    with pytest.raises(ExceptionGroup) as raised, TaskGroup(pool=one, policy=CollectAll()) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        tasks = [group.submit(abs, number) for number in range(200)]
        (tmp_path / "go").touch()

    assert {type(task.exception()) for task in tasks} == {OSError}
    assert len(raised.value.exceptions) == 200


def test_who_waits_for_what_is_not_sent_any_more_hears_of_it(one, monkeypatch, tmp_path):
    """
    The group is cancelled as the message is made.
    """
    encode = processes._Lane._encode

    def cancel(lane, *arguments, **options):
        message = encode(lane, *arguments, **options)
        if len(lane._batch) > 8:
            until(lambda: is_blocked(thread.native_id, among=None))
            group.cancel()
        return message

    monkeypatch.setattr(processes._Lane, "_encode", cancel)
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        tasks = [group.submit(abs, number) for number in range(200)]
        thread, outcome = start(tasks[9].wait)
        (tmp_path / "go").touch()
        with shield():
            came = ended(thread, outcome)

    assert came is True
    assert all(task.cancelled() for task in tasks)


@pytest.fixture
def told(monkeypatch):
    """What lanes tell their workers."""
    words = []
    tell = _process.WorkerProcess.tell

    def noted(worker, word, *rest):
        words.append(word)
        tell(worker, word, *rest)

    monkeypatch.setattr(_process.WorkerProcess, "tell", noted)
    return words


def test_worker_that_asks_is_told_once_that_this_was_all(one, told, monkeypatch, tmp_path):
    """
    And one that has not asked, never: it could take that for the answer to its next question.
    """
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    paths = [tmp_path / name for name in ("begun", "release", "then", "at last")]
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        group.submit(far.begin_and_hold, *paths[:2])
        cancelled = group.submit(far.noted, tmp_path / "ran", 1)
        group.submit(abs, 1)
        group.submit(far.begin_and_hold, *paths[2:])
        group.map(abs, range(200))
        (tmp_path / "go").touch()
        far.seen(paths[0])
        (lane,) = group._run.lanes

        def look():
            lane._bell.open()
            until(lambda: not select.select([lane._bell], [], [], 0)[0])
            until(lambda: is_blocked(lane.of_thread.native_id))

        cancelled.cancel()
        look()
        before = [*told]
        far.note(paths[1])
        cancelled.wait()
        look()
        far.note(paths[3])

    assert before == ["cancel task"]
    assert told.count("all told") == 1


def test_what_holds_up_a_batch_is_taken_back_once(one, told, monkeypatch, tmp_path):
    """
    Its worker is asked for what it has so far, and not again and again.
    """
    ahead = [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(processes, "time", clock)
    times = []
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        quick = group.submit(far.square, 3)
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        group.map(abs, range(200))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        quick.wait()
        (lane,) = group._run.lanes
        for _ in range(2):
            ahead[0] += 1000  # seconds
            lane._bell.open()
            until(lambda: not select.select([lane._bell], [], [], 0)[0])
            until(lambda: is_blocked(lane.of_thread.native_id))
            times.append(told.count("so far"))
        far.note(tmp_path / "release")

    assert times == [1, 1]


def test_call_is_cancelled_behind_what_came_home_early(one, tmp_path):
    """
    It has the number that it had.
    """
    with TaskGroup(pool=one) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        before = [group.submit(far.square, number) for number in range(9)]
        slow = group.submit(far.waits, "sleep", tmp_path / "begun", tmp_path / "ended")
        group.map(abs, range(200))
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        values = [task.result() for task in before]
        (lane,) = group._run.lanes
        until(lambda: len(lane._batch) == 1)
        slow.cancel()
        came = slow.wait(timeout=60)
        if not came:
            group.cancel()

    assert values == [number**2 for number in range(9)]
    assert came
    assert len(far.lines(tmp_path / "ended")) == 1


def test_nothing_that_was_said_of_a_batch_concerns_the_next(monkeypatch, tmp_path):
    """
    Neither when the worker would be killed for one of its calls, nor what it is yet to be told.
    """
    with TaskGroup(pool=Processes(1, kill_after=300)) as group:
        cancelled = group.submit(far.waits, "sleep", tmp_path / "begun", tmp_path / "ended")
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        cancelled.cancel()
        until(lambda: lane._due)
        lane._untold.append((lane._first, dump_reason("too late")))
        monkeypatch.setattr(_process.WorkerProcess, "hears", lambda _: False)
        cancelled.wait()
        group.submit(far.begin_and_hold, tmp_path / "then", tmp_path / "release")
        far.seen(tmp_path / "then")
        left = [*lane._due, *lane._untold]
        far.note(tmp_path / "release")

    assert left == []


def test_lane_sleeps_when_it_has_told_all(monkeypatch, tmp_path):
    """
    Though its worker could not take it at once.
    """
    comes_to_rest = rests(monkeypatch, processes)
    full = [True]
    hears = _process.WorkerProcess.hears
    monkeypatch.setattr(_process.WorkerProcess, "hears", lambda worker: not full and hears(worker))
    monkeypatch.setattr(processes, "SLICE", 300)  # seconds: nothing comes home by itself
    monkeypatch.setattr(processes, "HELD", 300)  # ...nor is taken back
    with TaskGroup(pool=Processes(1, kill_after=None)) as group:
        group.submit(wait_for, tmp_path / "go")
        group.map(abs, range(8))  # in one batch, and then in one of 64:
        group.submit(far.begin_and_hold, tmp_path / "begun", tmp_path / "release")
        behind = [group.submit(abs, number) for number in range(200)]
        (tmp_path / "go").touch()
        far.seen(tmp_path / "begun")
        (lane,) = group._run.lanes
        behind[0].cancel()
        until(lambda: lane._untold)
        full.clear()
        until(lambda: not lane._untold)
        until(comes_to_rest)
        far.note(tmp_path / "release")

    assert behind[0].cancelled()


def test_failure_that_cancels_a_group_is_the_cause_in_its_workers(tmp_path):
    """
    And a reason that somebody gave is none.
    """
    for way in ("fails", "is cancelled"):
        with contextlib.suppress(LookupError), TaskGroup(pool=Processes(2)) as group:
            group.submit(far.notes_cause, tmp_path / f"{way} begun", tmp_path / way)
            far.seen(tmp_path / f"{way} begun")
            if way == "fails":
                group.submit(far.fail, LookupError("no"))
            else:
                group.cancel(LookupError("no"))

    assert far.lines(tmp_path / "fails") == ["LookupError"]
    assert far.lines(tmp_path / "is cancelled") == ["NoneType"]
