"""
Child processes: run as `subprocess.run` does, and ended by a cancel with all that they started.
"""

import contextlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from blocked import descriptors, is_blocked
from staging import start, until

import fastpool.blocking as blocking
from fastpool import Cancelled, CancelToken, TaskGroup, _marks, use_token
from fastpool.blocking import _children

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def children():
    """The processes that this one has started and not reaped."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


@pytest.fixture(autouse=True)
def no_child_is_left(tracker):
    """What the library starts it reaps as well."""
    before = children()
    yield

    assert children() <= before


@pytest.fixture(params=["pidfd", "thread"])
def way(request, monkeypatch):
    """How the end of a process is learned: by a pidfd, or by a thread where there is none."""
    if request.param == "thread":
        monkeypatch.delattr(os, "pidfd_open")


def is_running(pid):
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def cancelled_once_ready(script, path, **options):
    """
    Run a script of the shell on a token, cancel that once it has written its process numbers.

    Its time of grace is an hour if nothing else is said: who waits for that hangs.

    Returns:
        Those numbers, and how long it took from the cancel until the call was out.
    """
    token = CancelToken()

    def call():
        with use_token(token):
            return blocking.run(["sh", "-c", script, "sh", str(path)], **{"grace": 3600, **options})

    thread, outcome = start(call)
    until(lambda: outcome or (path.exists() and path.read_text().endswith("ready\n")))
    assert not outcome, outcome
    begun = time.monotonic()
    token.cancel()
    thread.join(timeout=60)
    took = time.monotonic() - begun

    assert [type(error) for error in outcome] == [Cancelled]
    return [int(pid) for pid in path.read_text().split()[:-1]], took


# --- As subprocess.run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["true"], {}),
        (["sh", "-c", "echo out; echo err >&2; exit 3"], {"capture_output": True}),
        (["sh", "-c", "printf 'a\\r\\nb\\r'"], {"stdout": subprocess.PIPE, "text": True}),
        (["sh", "-c", "kill -9 $$"], {"capture_output": True}),
        (["cat"], {"input": b"x" * 1_000_000, "capture_output": True}),
        (["cat"], {"input": "grüße", "capture_output": True, "encoding": "latin-1"}),
        (["cat"], {"input": b"", "stdout": subprocess.PIPE}),
        (["cat"], {"stdin": subprocess.PIPE, "capture_output": True}),
        (["true"], {"input": b"x" * 1_000_000}),
        ("echo $HOME; pwd", {"shell": True, "cwd": "/", "env": {"HOME": "h"}, "stdout": -1}),
        (["sh", "-c", "echo both; echo too >&2"], {"stdout": -1, "stderr": subprocess.STDOUT}),
    ],
)
def test_run_gives_what_subprocess_gives(command, options, way):
    """
    The same exit code and output, of the same type.
    """
    expected = subprocess.run(command, **options)
    done = blocking.run(command, **options)

    assert type(done) is subprocess.CompletedProcess
    assert vars(done) == vars(expected)


def test_run_raises_what_subprocess_raises(monkeypatch):
    """
    For what fails, what takes too long, and what cannot be meant.
    """
    with pytest.raises(subprocess.CalledProcessError) as failed:
        blocking.run(["sh", "-c", "echo out; exit 3"], check=True, capture_output=True)
    assert (failed.value.returncode, failed.value.output) == (3, b"out\n")
    poll, looks = _children.poll, itertools.count()

    def patient_at_first(token, wanted, timeout):  # until the output is there
        return poll(token, wanted, timeout if next(looks) else None)

    with monkeypatch.context() as patch, pytest.raises(subprocess.TimeoutExpired) as expired:
        patch.setattr(_children, "poll", patient_at_first)
        blocking.run(["sh", "-c", "echo out; sleep 60"], timeout=0.3, stdout=subprocess.PIPE)
    assert (expired.value.timeout, expired.value.output) == (0.3, b"out\n")
    with pytest.raises(FileNotFoundError):
        blocking.run(["/nowhere/to/be/found"])
    with pytest.raises(ValueError, match="may not both be used"):
        blocking.run(["cat"], input=b"", stdin=subprocess.PIPE)
    with pytest.raises(ValueError, match="capture_output"):
        blocking.run(["cat"], stdout=subprocess.PIPE, capture_output=True)
    with use_token(CancelToken(timeout=0)), pytest.raises(Cancelled):
        blocking.run(["/nowhere/to/be/found"])


# --- Cancelled ------------------------------------------------------------------------------------


def test_cancel_ends_a_command_and_its_children(tmp_path, way):
    """
    The whole group is gone when the call is out.
    """
    script = "sleep 60 & echo $$ $! ready > $1; wait"
    pids, _ = cancelled_once_ready(script, tmp_path / "pids", capture_output=True)

    until(lambda: not any(map(is_running, pids)))  # killed, but one may be about to go


def test_command_that_ignores_sigterm_is_killed_after_its_grace(tmp_path, way):
    """
    So are its children.
    """
    script = "trap '' TERM; sleep 60 & echo $$ $! ready > $1; wait; wait"
    pids, took = cancelled_once_ready(script, tmp_path / "pids", grace=0.3)

    assert took >= 0.3
    until(lambda: not any(map(is_running, pids)))  # killed, but one may be about to go


def test_grandchild_has_its_grace_after_the_command_has_ended(tmp_path):
    """
    What cleans up on SIGTERM is not cut short because the shell above it is faster.
    """
    script = (
        'sh -c \'trap "sleep 0.2; echo > $1.clean; exit" TERM; echo $$ ready > $1;'
        "while :; do sleep 0.01; done' sh $1 & wait"
    )
    cancelled_once_ready(script, tmp_path / "pids")

    assert (tmp_path / "pids.clean").exists()


def test_grandchild_that_left_the_group_does_not_hold_the_call(tmp_path):
    """
    It lives on, and the pipe that it holds is not waited for.
    """
    script = "setsid sh -c 'echo $$ ready > $1; exec sleep 60' sh $1 & sleep 60"
    pids, _ = cancelled_once_ready(script, tmp_path / "pids", capture_output=True)
    try:
        assert is_running(pids[0])
    finally:
        os.kill(pids[0], signal.SIGKILL)


def test_command_that_fills_the_pipe_as_it_ends_is_read(tmp_path):
    """
    Or it would sit in its last words until it is killed.
    """
    script = (
        "trap 'head -c 1000000 /dev/zero; echo > $1.clean; exit' TERM; echo $$ ready > $1;"
        "while :; do sleep 0.01; done"
    )
    cancelled_once_ready(script, tmp_path / "pids", capture_output=True)

    assert (tmp_path / "pids.clean").exists()


def test_command_in_a_session_of_its_own_is_ended_with_its_children(tmp_path, way):
    """
    Its session is a group as well.
    """
    script = "sleep 60 & echo $$ $! ready > $1; wait"
    pids, _ = cancelled_once_ready(script, tmp_path / "pids", start_new_session=True)

    assert len(pids) == 2
    until(lambda: not any(map(is_running, pids)))


def test_leader_of_its_group_has_no_session_by_preexec_fn():
    """
    The system forbids it; nothing is left running.
    """
    with pytest.raises(subprocess.SubprocessError, match="preexec_fn"):
        blocking.run(["sleep", "60"], preexec_fn=os.setsid)

    asked = "import os; print(os.getsid(0) == os.getpid())"
    ended = blocking.run([sys.executable, "-c", asked], start_new_session=True, capture_output=True)
    assert ended.stdout == b"True\n"


def test_process_in_the_group_of_others_is_signalled_alone(tmp_path):
    """
    Ours, say: nobody else in it is hurt.
    """
    script = "echo $$ ready > $1; exec sleep 60"
    pids, _ = cancelled_once_ready(script, tmp_path / "pids", process_group=os.getpgid(0))

    assert not is_running(pids[0])


def test_failure_ends_a_sibling_that_runs_a_command():
    """
    The token of a task is the one that its commands hear.
    """

    def fails():
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup(2) as group:
        task = group.submit(blocking.run, ["sleep", "60"])
        group.submit(fails)

    assert task.cancelled()


def test_natural_end_and_cancel_are_told_apart(monkeypatch):
    """
    A race of both: all of the output, or `Cancelled`; never a signal to what has been reaped.
    """
    signalled = []
    send = signal.pidfd_send_signal

    def record(pidfd, signum, info=None, flags=0):
        about = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        signalled.append(int(about.partition("Pid:")[2].split()[0]))  # -1 once it has been reaped
        return send(pidfd, signum, info, flags)

    monkeypatch.setattr(signal, "pidfd_send_signal", record)
    seen = set()
    times = [0.001]
    for number in range(1000):
        token = CancelToken()
        timer = threading.Timer(statistics.median(times) * (0.5 + number % 10 / 10), token.cancel)
        timer.start()
        begun = time.monotonic()
        with use_token(token):
            try:
                done = blocking.run(["echo", "all of it"], stdout=subprocess.PIPE)
                times = [*times[-20:], time.monotonic() - begun]
                assert (done.returncode, done.stdout) == (0, b"all of it\n")
                seen.add("ended")
            except Cancelled:
                seen.add("cancelled")
        timer.cancel()
        timer.join()

    assert seen == {"ended", "cancelled"}
    assert -1 not in signalled


# --- interrupts(popen) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait", [lambda p: p.wait(), lambda p: p.communicate(), lambda p: list(p.stdout)]
)
def test_popen_is_interrupted(wait, tmp_path, way):
    """
    With its group, also where a grandchild holds the pipe.
    """
    token = CancelToken()
    path = tmp_path / "pids"
    with subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $$ $! ready > $1; wait", "sh", path],
        stdout=subprocess.PIPE,
        process_group=0,
    ) as popen:
        entered = threading.Event()

        def call():
            with token.interrupts(popen):
                entered.set()
                return wait(popen)

        thread, outcome = start(call)
        entered.wait(timeout=60)
        until(lambda: path.exists() and path.read_text().endswith("ready\n"))
        token.cancel()
        thread.join(timeout=60)

    assert [type(error) for error in outcome] == [Cancelled]
    until(lambda: not any(map(is_running, map(int, path.read_text().split()[:-1]))))


def test_popen_without_a_group_is_interrupted_alone():
    """
    Its group is ours.
    """
    token = CancelToken()
    sleeps = subprocess.Popen(["sleep", "60"])
    with sleeps as popen, pytest.raises(Cancelled), token.interrupts(popen):
        threading.Timer(0.05, token.cancel).start()
        popen.wait()

    assert popen.returncode == -signal.SIGTERM


@pytest.mark.parametrize("by", ["popen", "somebody else"])
def test_popen_that_has_been_reaped_is_never_signalled(by, monkeypatch):
    """
    Its number may be another's by then.
    """
    for where, name in [(os, "kill"), (os, "killpg"), (signal, "pidfd_send_signal")]:
        monkeypatch.setattr(where, name, lambda *args: pytest.fail("signalled"))
    popen = subprocess.Popen(["true"], process_group=0)
    if by == "popen":
        popen.wait()
    else:
        os.waitpid(popen.pid, 0)
    _children._interrupt(popen)
    token = CancelToken()
    with pytest.raises(Cancelled), token.interrupts(popen):
        token.cancel()
    popen.wait()


def test_older_kernels_are_signalled_by_number(tmp_path, monkeypatch):
    """
    Where a pidfd cannot signal a group, its number does, as long as it is not reaped.
    """

    def refuse(*args):
        raise OSError(22, "invalid argument")

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    script = "sleep 60 & echo $$ $! ready > $1; wait"
    pids, _ = cancelled_once_ready(script, tmp_path / "pids")

    until(lambda: not any(map(is_running, pids)))  # killed, but one may be about to go


def test_child_is_not_left_running_if_it_cannot_be_watched(monkeypatch):
    """
    Out of descriptors, say: it is killed and reaped.
    """

    def refuse(*args):
        raise OSError(24, "too many open files")

    monkeypatch.setattr(_children, "_watch", refuse)
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(OSError, match="too many open files"):
        blocking.run(["sleep", "60"])


def test_child_is_not_left_running_if_there_is_no_thread_to_watch_it(monkeypatch):
    """
    It would be waited for before what it prints is read, and nothing be heard meanwhile.
    """

    def refuse(*arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.delattr(os, "pidfd_open")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            blocking.run(["head", "-c", "1000000", "/dev/zero"], capture_output=True)


def test_process_is_watched_once_however_often_it_is_waited_for(way):
    """
    Where there is no pidfd that takes a thread and a pipe, until it ends.
    """
    process = subprocess.Popen(["sleep", "60"])
    before = threading.active_count(), descriptors()
    waited = [blocking.wait(process, 0.001) for _ in range(20)]
    after = threading.active_count(), descriptors()
    process.kill()

    assert waited == [False] * 20
    assert blocking.wait(process, 60)
    assert after <= (before[0] + 1, before[1] + 2)


def test_end_of_a_process_is_seen_though_another_thread_has_forked(way):
    """
    That child holds whatever is open here, and may live for long.
    """
    reader, writer = os.pipe()
    process = subprocess.Popen(["sleep", "60"])
    waiter, outcome = start(blocking.wait, process)
    until(lambda: is_blocked(waiter.native_id, among=None))
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    process.kill()
    waiter.join(timeout=20)
    seen = list(outcome)
    os.close(writer)
    os.close(reader)
    os.waitpid(child, 0)
    waiter.join(timeout=60)

    assert seen == [True]


@pytest.mark.parametrize("obeys", [True, False])
def test_cancel_ends_a_process_though_no_descriptor_is_left(obeys, monkeypatch):
    """
    It is told by its number, and waited for by looking.
    """

    def refuse(*arguments):
        raise OSError(24, "too many open files")

    script = "echo ready; exec sleep 60" if obeys else "trap '' TERM; echo ready; sleep 60"
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    monkeypatch.setattr(_children, "GRACE", 0.01)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(os, "pipe", refuse)
    token = CancelToken()
    with pytest.raises(Cancelled), token.interrupts(process):
        token.cancel()
        process.wait(60)
    process.stdout.close()

    assert process.returncode == (-signal.SIGTERM if obeys else -signal.SIGKILL)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interrupted_run(script, path, act):
    """Run a script in the body of a group in the main thread, while another thread acts."""
    thread, outcome = start(act)
    with pytest.raises(KeyboardInterrupt), TaskGroup(1):
        blocking.run(["sh", "-c", script, "sh", str(path)], grace=50)
    thread.join(timeout=60)

    assert outcome == [None]
    assert not is_running(int(path.read_text().split()[0]))


def is_ready(path):
    return path.exists() and path.read_text().endswith("ready\n")


def test_second_interrupt_cuts_the_grace_short(tmp_path):
    """
    The first asks the command to end, which it does not; it is killed then, and reaped.
    """
    path, asked = tmp_path / "pids", tmp_path / "pids.asked"
    script = "trap 'echo > $1.asked' TERM; echo $$ ready > $1; while :; do sleep 0.01; done"

    def act():
        until(lambda: is_ready(path))
        signal.raise_signal(signal.SIGINT)
        until(asked.exists)
        signal.raise_signal(signal.SIGINT)

    interrupted_run(script, path, act)


def test_first_interrupt_leaves_a_command_that_is_ending_its_grace(tmp_path):
    """
    It had been cancelled before; the interrupt is raised when it has ended in its own way.
    """
    path, asked = tmp_path / "pids", tmp_path / "pids.asked"
    script = (
        "trap 'echo > $1.asked; while [ ! -e $1.go ]; do sleep 0.01; done; echo > $1.clean; exit'"
        " TERM; echo $$ ready > $1; while :; do sleep 0.01; done"
    )
    token = CancelToken()

    def act():
        until(lambda: is_ready(path))
        token.cancel()
        until(asked.exists)
        signal.raise_signal(signal.SIGINT)
        until(lambda: _marks.held)
        (tmp_path / "pids.go").touch()

    with use_token(token):
        interrupted_run(script, path, act)

    assert (tmp_path / "pids.clean").exists()


def test_stopped_command_ends_in_good_order(tmp_path):
    """
    It is told to go on, or it would not hear that it is to end.
    """
    script = (
        'trap "echo ended > $1.ended; exit" TERM; echo $$ > $1; '
        "(until grep -q 'State:.*stopped' /proc/$$/status; do sleep 0.01; done; "
        "echo ready >> $1) & kill -STOP $$; sleep 60"
    )
    path = tmp_path / "pids"
    cancelled_once_ready(script, path)

    assert (tmp_path / "pids.ended").read_text() == "ended\n"


def test_command_that_may_not_be_ended_is_named(monkeypatch, way):
    """
    One that has become another user's, say; nobody waits for it.
    """

    def refuse(*args):
        raise PermissionError("Operation not permitted")

    started, warned = [], []
    token = CancelToken()

    class Noted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "pidfd_send_signal", refuse)
        patch.setattr(os, "killpg", refuse)

        def call():
            # Here, since a free-threaded build shows each thread's warnings to itself.
            with use_token(token), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    blocking.run(["sleep", "60"])
                finally:
                    warned.extend(str(warning.message) for warning in caught)

        thread, outcome = start(call)
        until(lambda: started)
        token.cancel()
        thread.join(60)
    started[0].kill()
    started[0].wait()

    assert [type(error) for error in outcome] == [Cancelled]
    assert len(warned) == 1
    assert re.search(r"goes on as process \d+: it has become another", warned[0])
