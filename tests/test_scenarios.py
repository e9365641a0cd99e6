"""
What users of a `ThreadPool` do by hand, row by row of docs/scenarios.md, done with fastpool.
"""

import os
import subprocess
import sys
import threading
import traceback
from multiprocessing.pool import ThreadPool

import far
import pytest
from far import lines, note, seen

import fastpool
from fastpool import (
    CancelToken,
    GroupClosedError,
    TaskCancelledError,
    TaskGroup,
    cancellable,
    checkpoint,
    current_token,
)
from fastpool.backends import Processes


def square(number):
    return number * number


@pytest.fixture
def pool():
    """A pool that the user has."""
    with ThreadPool(4) as pool:
        yield pool
        pool.close()
        pool.join()


def run_program(source, *, code=0):
    """Run a program in an interpreter of its own, to its end."""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=200, check=False
    )

    assert (done.returncode, done.stderr) == (code, "")

    return done.stdout


# --- Waiting ------------------------------------------------------------------------------------


def test_w1_batch_is_waited_for_and_the_group_goes_on():
    """
    Ten tasks are waited for as one batch, and more are submitted after it.
    """
    with TaskGroup() as group:
        first = group.map(square, range(10))
        waited = first.wait(timeout=60)
        second = group.map(square, range(10, 12))

    assert waited
    assert first.results() == [square(number) for number in range(10)]
    assert second.results() == [100, 121]


def test_w2_everything_issued_has_run_when_the_block_is_left():
    """
    Several batches of which no handle is kept have run by the end; then nothing can be issued.
    """
    seen = []
    with TaskGroup(2) as group:
        group.map(seen.append, range(100))
        group.map(seen.append, range(100, 200))

    assert sorted(seen) == list(range(200))
    with pytest.raises(GroupClosedError):
        group.submit(square, 2)


def test_w3_leaving_drops_no_work_and_leaves_none_running():
    """
    What was not waited for is finished inside the block, running or queued.
    """
    release = threading.Event()
    finished = []

    def task(number):
        release.wait(timeout=60)
        finished.append(number)

    with TaskGroup(2) as group:
        group.map(task, range(6))
        release.set()

    assert sorted(finished) == [0, 1, 2, 3, 4, 5]


# --- An event in every task -----------------------------------------------------------------------


@pytest.mark.parametrize("before", [(), ("first",)])
def test_e1_running_tasks_end_at_their_next_check_and_the_pool_goes_on(pool, before):
    """
    `group.cancel()` stops each task at its next turn, and the pool takes new ones at once.
    """
    running = threading.Barrier(5)
    turns = []

    @cancellable
    def loops(token: CancelToken, *arguments):
        running.wait(timeout=60)
        while True:
            token.sleep(0.001)
            turns.append(arguments)

    with TaskGroup(pool=pool) as group:
        tasks = [group.submit(loops, *before, number) for number in range(4)]
        running.wait(timeout=60)
        group.cancel()
    with TaskGroup(pool=pool) as second:
        new = second.submit(square, 3)

    assert all(task.cancelled() for task in tasks)
    assert new.result() == 9


def test_e2_task_stops_in_an_orderly_way_and_is_seen_to_have_stopped():
    """
    A cancelled task runs its clean-up; its handle tells it from one that finished.
    """
    running = threading.Barrier(2)
    cleaned = []

    @cancellable
    def opens(token: CancelToken, name):
        try:
            running.wait(timeout=60)
            token.sleep(60)
        finally:
            cleaned.append(name)

    with TaskGroup() as group:
        finished = group.submit(square, 2)
        finished.wait(timeout=60)
        stopped = group.submit(opens, "file")
        running.wait(timeout=60)
        group.cancel("enough")

    assert cleaned == ["file"]
    assert (stopped.cancelled(), finished.cancelled()) == (True, False)
    with pytest.raises(TaskCancelledError, match="enough"):
        stopped.result()


def test_e3_token_is_had_without_passing_it():
    """
    A function with clean arguments finds its task's token, and so do those it calls.
    """
    running = threading.Barrier(2)
    found = []

    def helper():
        running.wait(timeout=60)
        while True:
            checkpoint()

    def task():
        found.append(current_token())
        helper()

    with TaskGroup() as group:
        stopped = group.submit(task)
        running.wait(timeout=60)
        group.cancel()

    assert stopped.cancelled()
    assert found[0].cancelled()


# --- One fails ------------------------------------------------------------------------------------


def test_f1_one_failure_stops_all_and_is_raised_with_its_own_traceback():
    """
    The task just raises: running ones stop, queued ones never start, the block raises it.
    """
    looping = threading.Barrier(10)
    started = []

    @cancellable
    def task(token: CancelToken, number):
        started.append(number)
        looping.wait(timeout=60)
        for turn in range(4):
            if number == 5 and turn == 2:
                issued.wait(timeout=60)
                raise ValueError("found in the third turn")
            if turn == 3:
                token.sleep(60)

    issued = threading.Event()
    with pytest.raises(ValueError, match="third turn") as raised, TaskGroup(10) as group:
        batch = group.map(task, range(110))
        issued.set()

    assert sorted(started) == list(range(10))
    assert [task.cancelled() for task in batch.tasks].count(True) == 109
    assert traceback.extract_tb(raised.value.__traceback__)[-1].name == "task"


def test_f2_several_arguments_need_no_event_among_them():
    """
    `starmap` takes the arguments alone; the token comes by itself.
    """

    @cancellable
    def power(token: CancelToken, base, exponent):
        token.check()
        return base**exponent

    with TaskGroup() as group:
        powers = group.starmap(power, [(number, 2) for number in range(10)])

    assert powers.results() == [square(number) for number in range(10)]


# --- Processes ------------------------------------------------------------------------------------


def test_p1_task_in_a_process_ends_before_the_program_goes_on(tmp_path):
    """
    The same block, on processes: leaving it waits for what was submitted.
    """
    with TaskGroup(2, pool="processes") as group:
        group.submit(far.return_after, tmp_path / "go")
        group.map(far.noted, [tmp_path / "ran"] * 20, range(20))
        note(tmp_path / "go")

    assert sorted(lines(tmp_path / "ran"), key=int) == [str(number) for number in range(20)]


def test_p2_cancelled_process_task_cleans_up_or_is_killed(tmp_path):
    """
    One that checks runs its clean-up; one that does not stop is killed, and only that one.
    """
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    with TaskGroup(pool=Processes(2, kill_after=2)) as group:
        heeds = group.submit(far.waits, "sleep", begun, ended)
        (kept,) = seen(begun)
        hears_nothing = group.submit(far.stubborn, begun)
        seen(begun, 2)
        group.cancel()

    assert lines(ended) == [kept]
    assert heeds.cancelled()
    assert hears_nothing.cancelled()


def test_p3_there_is_no_order_to_get_wrong():
    """
    A group used outside its block says so; nothing has to be closed before it is joined.
    """
    group = TaskGroup(name="thumbnails")

    with pytest.raises(GroupClosedError, match=r"square\(\) to group 'thumbnails'.*not been ent"):
        group.submit(square, 2)
    with group:
        task = group.submit(square, 2)
    with pytest.raises(GroupClosedError, match=r"square\(\) to group 'thumbnails'.*has ended"):
        group.submit(square, 2)
    with pytest.raises(RuntimeError, match="'thumbnails' has been entered before"):
        group.__enter__()

    assert task.result() == 4


def test_p4_no_process_task_is_cut_off_as_the_program_ends(tmp_path):
    """
    A block that is still open is finished; a group that was never entered says so when used.
    """
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "import far\n"
        "from fastpool import GroupClosedError, TaskGroup\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        TaskGroup(pool='processes').submit(far.square, 3)\n"
        "    except GroupClosedError as error:\n"
        "        print(error)\n"
        "    group = TaskGroup(2, pool='processes')\n"
        "    group.__enter__()\n"
        "    group.map(far.noted, [sys.argv[1]] * 4, range(4))\n"
    )
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([folder, *filter(None, sys.path)])
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "ran")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "cannot submit square() to group" in ended.stdout
    assert "it has not been entered" in ended.stdout
    assert sorted(lines(tmp_path / "ran")) == ["0", "1", "2", "3"]


# --- Shutting down --------------------------------------------------------------------------------


def test_s1_after_shutdown_the_threads_are_gone(thorough_shutdown):
    """
    Idle threads wait for the next group; after `shutdown()` the count is what it was.
    """
    fastpool.shutdown()
    before = threading.active_count()

    with TaskGroup(4, timeout=60) as group:
        group.map(square, range(100))
    kept = threading.active_count()
    fastpool.shutdown()

    assert kept > before
    assert threading.active_count() == before


def test_s2_task_that_does_not_stop_is_named():
    """
    A thread cannot be killed; the task that goes on is named, with its thread, and waited for.
    """
    release = threading.Event()
    running = threading.Barrier(2)

    def stubborn():
        running.wait(timeout=60)
        release.wait(timeout=60)
        return "at last"

    def let_go(event):
        if event.name == "task_stuck":
            release.set()

    with (
        pytest.warns(RuntimeWarning, match=r"task 'stubborn'.*thread 'fastpool-hard-1'") as told,
        TaskGroup(name="hard", grace=0.01, observers=[let_go]) as group,
    ):
        task = group.submit(stubborn)
        running.wait(timeout=60)
        group.cancel()

    assert len(told) >= 1
    assert task.result() == "at last"


def test_s3_nothing_holds_the_program_or_is_cut_off_at_its_end():
    """
    A program that ends after a group, or with one open, ends at once and has done its work.
    """
    printed = run_program(
        "import os, time\n"
        "from fastpool import TaskGroup\n"
        "def task(n):\n"
        "    time.sleep(0.05)\n"
        "    os.write(1, f'done {n}\\n'.encode())\n"
        "with TaskGroup() as group:\n"
        "    group.map(task, range(3))\n"
        "left_open = TaskGroup()\n"
        "left_open.__enter__()\n"
        "left_open.submit(task, 3)\n"
    )

    assert sorted(printed.split("\n")) == ["", "done 0", "done 1", "done 2", "done 3"]


def test_s4_submitting_to_an_ended_group_names_group_and_function():
    """
    The error says what was submitted to what, and why it is refused.
    """
    with TaskGroup(name="squares") as group:
        pass

    with pytest.raises(GroupClosedError) as refused:
        group.submit(square, 2)

    assert "cannot submit square() to group 'squares'" in str(refused.value)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_s5_no_exception_hangs_whatever_its_class(kind):
    """
    What would hang a `ThreadPool` for ever comes out of the block, and out of the handle after.
    """
    error = kind("out of the ordinary")

    def task():
        raise error

    with pytest.raises(kind) as raised, TaskGroup() as group:
        failed = group.submit(task)

    assert raised.value is error
    assert failed.exception() is error


def test_s5_callback_that_raises_hangs_nothing(unraised):
    """
    An observer's and a callback's own errors change no outcome.
    """

    def broken(event):
        raise ValueError("in the observer")

    with TaskGroup(observers=[broken]) as group:
        group.token.on_cancel(lambda: 1 / 0)
        task = group.submit(square, 3)
        task.wait(timeout=60)
        group.cancel()

    assert task.result() == 9
    assert {type(error) for error in unraised} == {ValueError, ZeroDivisionError}
