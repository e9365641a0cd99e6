"""
Pipes, terminals, FIFOs, locks and abandoned calls, each left by a cancel; and a token's descriptor.
"""

import contextlib
import errno
import fcntl
import io
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
from blocked import cancel_while_blocked, descriptors, ended, is_blocked, under
from pages import ROOT, run
from staging import start, until

import fastpool
import fastpool.blocking as blocking
from fastpool import Cancelled, CancelToken, TaskGroup, use_token

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def is_cancelled_while_blocked(fn, *args):
    """Whether a call is left with `Cancelled`, wherever it is blocked."""
    error = cancel_while_blocked(fn, *args, among=None)
    return type(error) is Cancelled and error.reason == "enough"


@pytest.fixture
def pipe():
    """A pipe: its end to read from, its end to write to."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def is_readable(fd, timeout=0):
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))


# --- A token's descriptor -------------------------------------------------------------------------


def test_descriptor_becomes_readable_on_cancel():
    """
    It is the same each time, and stays readable.
    """
    token = CancelToken()
    fd = token.fileno()

    assert token.fileno() == fd
    assert not is_readable(fd)
    token.cancel()
    assert is_readable(fd)
    assert is_readable(token)


def test_descriptor_of_a_set_token_is_readable_at_once():
    """
    Whoever asks after the cancel hears of it too.
    """
    token = CancelToken(timeout=0)

    assert is_readable(token)


def test_descriptor_of_a_descendant_hears_its_ancestors():
    """
    On any depth, and also where tokens are joined.
    """
    root = CancelToken()
    child = root.child().child()
    joined = CancelToken.any(CancelToken(), child)
    fds = [child.fileno(), joined.fileno()]
    root.cancel()

    assert all(is_readable(fd) for fd in fds)


def test_descriptor_of_never_is_never_readable():
    """
    Nothing sets that token.
    """
    fd = CancelToken.NEVER.fileno()
    CancelToken.NEVER.cancel()

    assert not is_readable(fd)


def test_descriptor_wakes_a_poll():
    """
    A thread that waits in `poll` is woken by the cancel.
    """
    token = CancelToken()
    token.fileno()
    thread, outcome = start(lambda: is_readable(token, timeout=30))
    until(lambda: is_blocked(thread.native_id, None))
    token.cancel()
    thread.join(timeout=60)

    assert outcome == [True]


def test_thousand_tokens_have_a_descriptor_each_and_close_it():
    """
    A token that never asks has none; one that does has one, until it is gone.
    """
    before = descriptors()
    tokens = [CancelToken() for _ in range(1000)]
    assert descriptors() == before
    fds = {token.fileno() for token in tokens}

    assert len(fds) == 1000
    assert descriptors() == before + 1000
    for token in tokens:
        token.cancel()
    assert all(is_readable(fd) for fd in fds)
    del token
    tokens.clear()
    assert descriptors() == before


def test_descriptor_is_asked_for_while_it_is_cancelled(hasty):
    """
    Whoever comes first, the descriptor is readable in the end; there is one only.
    """
    for _ in range(500):
        token = CancelToken()
        barrier = threading.Barrier(3)
        fds = []

        def ask(token=token, barrier=barrier, fds=fds):
            barrier.wait()
            fds.append(token.fileno())

        threads = [start(ask)[0], start(ask)[0]]
        barrier.wait()
        token.cancel()
        for thread in threads:
            thread.join()

        assert len(set(fds)) == 1
        assert is_readable(token)


def test_signal_handler_cancels_a_token_with_a_descriptor():
    """
    One write that cannot block: wherever the handler interrupts.
    """
    token = CancelToken()
    before = signal.signal(signal.SIGUSR1, lambda *_: token.cancel())
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert is_readable(token)
    finally:
        signal.signal(signal.SIGUSR1, before)


def in_forked_child(check):
    """Whether something is true in a forked child."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_cancel_in_a_forked_child_is_not_heard_by_the_parent():
    """
    Each process has its own switch, under the same number.
    """
    token = CancelToken()
    fd = token.fileno()

    assert in_forked_child(lambda: token.cancel() and token.fileno() == fd and is_readable(fd))
    assert not is_readable(fd)
    token.cancel()
    assert is_readable(fd)
    assert in_forked_child(lambda: is_readable(fd))


# --- select ---------------------------------------------------------------------------------------


def test_cancel_ends_select(pipe):
    """
    While nothing is ready, and with nothing to wait for.
    """
    assert is_cancelled_while_blocked(blocking.select, [pipe[0]], [], [])
    assert is_cancelled_while_blocked(blocking.select, [pipe[0]], [], [], 60)
    assert is_cancelled_while_blocked(blocking.select, [], [], [])


def test_select_returns_what_select_returns(pipe):
    """
    The objects themselves, in their order, or empty lists.
    """
    reader, writer = pipe
    lists = ([reader], [writer, writer], [])

    assert blocking.select(*lists, 0) == ([], [writer, writer], [])
    assert blocking.select([reader], [], [], 0.01) == ([], [], [])
    os.write(writer, b"x")
    with open(reader, closefd=False) as file:
        assert blocking.select([file], [], [], 5) == ([file], [], [])
    assert blocking.select(iter(lists[0]), (), ()) == select.select([reader], [], [])


def test_select_on_a_set_token_raises(pipe):
    """
    Although something is ready: it stays so.
    """
    os.write(pipe[1], b"x")
    with use_token(CancelToken(timeout=0)), pytest.raises(Cancelled):
        blocking.select([pipe[0]], [], [])

    assert os.read(pipe[0], 1) == b"x"


def test_select_takes_descriptors_of_any_number(pipe):
    """
    The system's own `select` ends at 1023.
    """
    high = fcntl.fcntl(pipe[0], fcntl.F_DUPFD_CLOEXEC, 3000)
    try:
        os.write(pipe[1], b"x")
        assert blocking.select([high], [], []) == ([high], [], [])
    finally:
        os.close(high)


def test_select_refuses_what_is_no_open_file():
    """
    As the standard library does.
    """
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        blocking.select([reader], [], [])
    with pytest.raises(ValueError, match="negative"):
        blocking.select([-1], [], [])
    with pytest.raises(ValueError, match="timeout"):
        blocking.select([], [], [], float("nan"))


def test_select_does_not_report_a_closed_end_as_exceptional(pipe):
    """
    `poll` tells of it unasked; the time runs out as in `select.select`.
    """
    reader, writer = os.pipe()
    os.close(writer)
    try:
        assert blocking.select([], [], [reader], 0.02) == ([], [], [])
        assert blocking.select([reader], [], [reader], 5) == ([reader], [], [])
    finally:
        os.close(reader)


# --- read -----------------------------------------------------------------------------------------


def test_cancel_ends_read_on_a_pipe(pipe):
    """
    Nothing is read then: the next reader has it all.
    """
    assert is_cancelled_while_blocked(blocking.read, pipe[0], 100)
    os.write(pipe[1], b"late")

    assert blocking.read(pipe[0], 100) == b"late"


def test_cancel_ends_read_on_a_terminal():
    """
    On its side that programs use.
    """
    ends = os.openpty()
    try:
        assert is_cancelled_while_blocked(blocking.read, ends[1], 100)
        os.write(ends[0], b"typed\n")
        assert blocking.read(ends[1], 100) == b"typed\n"
    finally:
        for fd in ends:
            os.close(fd)


def test_read_returns_what_read_returns():
    """
    What there is, at most so much, and nothing at the end; also from an object that has a file.
    """
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as file:
        os.write(writer, b"hello")
        assert blocking.read(file, 2) == b"he"
        assert blocking.read(file, 0) == b""
        assert blocking.read(reader, 100) == b"llo"
        os.close(writer)
        assert blocking.read(file, 100) == b""
    with tempfile.TemporaryFile() as file:
        assert blocking.read(file, 10) == b""


def test_read_loses_nothing_to_a_race_with_cancel(pipe, hasty):
    """
    Either the bytes come back, or the next reader finds them.
    """
    reader, writer = pipe
    for number in range(500):
        token = CancelToken()
        byte = bytes([number % 256])

        def call(token=token):
            with use_token(token):
                return blocking.read(reader, 1)

        thread, outcome = start(call)
        threading.Thread(target=token.cancel).start()
        os.write(writer, byte)
        thread.join(timeout=60)
        if type(outcome[0]) is Cancelled:
            outcome = [os.read(reader, 1)]

        assert outcome == [byte]


# --- input ----------------------------------------------------------------------------------------


@pytest.fixture
def stdin(monkeypatch):
    """Standard input, made as Python makes it, of a pipe; gives what is written to."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as file, open(writer, "wb", buffering=0) as end:
        monkeypatch.setattr(sys, "stdin", file)
        yield end


def test_cancel_ends_input(stdin):
    """
    The next one has the whole line.
    """
    assert is_cancelled_while_blocked(blocking.input)
    stdin.write(b"name\n")

    assert blocking.input() == "name"
    assert "readinto" not in vars(sys.stdin.buffer.raw)


def test_answer_in_time_is_taken(stdin):
    """
    As the documentation has it.
    """
    ask = run(ROOT / "docs" / "blocking.md")["ask"]
    stdin.write(b"7\n")

    assert ask() == "7"


def test_cancel_ends_input_in_the_middle_of_a_line(stdin):
    """
    Never is a part of a line taken for the line.
    """
    stdin.write(b"half a")
    assert is_cancelled_while_blocked(blocking.input)


def test_input_shares_standard_input_with_others(stdin, capsys):
    """
    What Python has read ahead is not skipped, and what comes after the line is left there.
    """
    stdin.write("a\nb\nĉ\nd\n\n".encode())

    assert sys.stdin.readline() == "a\n"
    assert blocking.input("? ") == "b"
    assert blocking.input() == "ĉ"
    assert sys.stdin.readline() == "d\n"
    assert blocking.input(2) == ""
    stdin.write(b"rest")
    stdin.close()
    assert blocking.input() == "rest"
    with pytest.raises(EOFError):
        blocking.input()
    assert capsys.readouterr().out == "? 2"


def test_input_without_a_file_reads_as_it_can(monkeypatch):
    """
    A replaced `sys.stdin` is read as it reads.
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))
    assert blocking.input() == "typed"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RuntimeError, match=r"lost sys\.stdin"):
        blocking.input()


def test_input_takes_a_line_of_a_terminal(monkeypatch):
    """
    As the terminal has edited it; its end of file is the end.
    """
    master, slave = os.openpty()
    with open(slave, encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert is_cancelled_while_blocked(blocking.input)
        os.write(master, b"nane\x7f\x7fme\n")
        assert blocking.input() == "name"
        os.write(master, b"\x04")
        with pytest.raises(EOFError):
            blocking.input()
    os.close(master)


# --- FIFOs ----------------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("mode", ["r", "wb"])
def test_cancel_ends_opening_a_fifo(fifo, mode):
    """
    On either side; the FIFO is as it was.
    """
    assert is_cancelled_while_blocked(blocking.open_fifo, fifo, mode)
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.parametrize("mode", ["r", "w"])
def test_cancel_ends_opening_a_fifo_that_is_gone(fifo, mode):
    """
    Its name is not needed to open its other end.
    """
    token = CancelToken()

    def call():
        with use_token(token):
            blocking.open_fifo(fifo, mode)

    thread, outcome = start(call)
    until(lambda: is_blocked(thread.native_id, None))
    fifo.unlink()
    token.cancel()
    thread.join(timeout=60)

    assert type(outcome[0]) is Cancelled


def test_fifo_opens_when_the_other_side_comes(fifo):
    """
    As by `open`, with its arguments.
    """
    thread, outcome = start(lambda: blocking.open_fifo(fifo, encoding="utf-8"))
    until(lambda: is_blocked(thread.native_id, None))
    with blocking.open_fifo(fifo, "wb", 0) as writer:
        thread.join(timeout=60)
        with outcome[0] as reader:
            writer.write("grüße\n".encode())
            assert reader.readline() == "grüße\n"
    outcome.clear()
    with pytest.raises(FileNotFoundError):
        blocking.open_fifo(fifo.with_name("none"))


def test_fifo_is_opened_or_cancelled_and_never_both(fifo, hasty):
    """
    A race of the other side against a cancel: a file, or `Cancelled`, and nothing left open.
    """
    before = descriptors()
    for _ in range(300):
        token = CancelToken()

        def call(token=token):
            with use_token(token), blocking.open_fifo(fifo):
                return "opened"

        thread, outcome = start(call)
        token.cancel()
        thread.join(timeout=60)
        assert outcome[0] == "opened" or type(outcome[0]) is Cancelled
    assert descriptors() == before


# --- flock ----------------------------------------------------------------------------------------


@pytest.fixture
def held_elsewhere(tmp_path):
    """A file that another process has locked, and that process."""
    path = tmp_path / "lock"
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield path, process


def test_cancel_ends_waiting_for_a_lock(held_elsewhere, watched):
    """
    The lock is not taken then, nor later.
    """
    path, process = held_elsewhere
    with open(path) as file, open(path) as other:
        assert is_cancelled_while_blocked(blocking.flock, file, fcntl.LOCK_EX)
        process.communicate()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lock_is_had_when_the_other_lets_go(held_elsewhere):
    """
    And without waiting where the standard library does not wait.
    """
    path, process = held_elsewhere
    with open(path) as file:
        with pytest.raises(BlockingIOError):
            blocking.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        thread, outcome = start(blocking.flock, file.fileno(), fcntl.LOCK_SH)
        process.communicate()
        thread.join(timeout=60)
        assert outcome == [None]
        blocking.flock(file, fcntl.LOCK_UN)


# --- abandon --------------------------------------------------------------------------------------


def test_abandoned_call_is_left_behind_counted_and_reported():
    """
    The caller is out at once; the thread is told of until it has ended.
    """
    release = threading.Event()

    def stuck():
        release.wait(timeout=30)
        raise ValueError("too late for anybody")

    warned = []

    def call():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                blocking.abandon(stuck)
            finally:
                warned.extend(caught)

    assert is_cancelled_while_blocked(call)
    assert "stuck() was left behind" in str(warned[0].message)
    assert [Path(warning.filename).name for warning in warned] == ["test_blocking_files.py"]
    assert [name.rpartition(".")[2] for name in blocking.abandoned()] == ["stuck"]
    release.set()
    until(lambda: not blocking.abandoned())


def test_abandon_returns_and_raises_as_the_call_does():
    """
    In the caller's context, with every argument; what it raises is the very object.
    """
    error = KeyError("x")

    def fails():
        raise error

    with use_token(CancelToken()) as token:
        assert blocking.abandon(fastpool.current_token) is token
    assert blocking.abandon(dict, [("a", 1)], fn=2) == {"a": 1, "fn": 2}
    with pytest.raises(KeyError) as caught:
        blocking.abandon(fails)
    assert caught.value is error
    with pytest.raises(SystemExit):
        blocking.abandon(sys.exit)
    assert blocking.abandoned() == ()


def test_abandon_runs_nothing_on_a_set_token():
    """
    No thread is started for it.
    """
    with use_token(CancelToken(timeout=0)), pytest.raises(Cancelled):
        blocking.abandon(pytest.fail)


def test_warning_that_is_made_an_error_replaces_nothing(unraised):
    """
    It goes to the hook, and the caller has `Cancelled`.
    """
    release = threading.Event()

    def call():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            blocking.abandon(release.wait, 30)

    assert is_cancelled_while_blocked(call)
    release.set()
    until(lambda: not blocking.abandoned())

    assert [type(error) for error in unraised] == [RuntimeWarning]


def test_abandon_is_ended_or_left_and_never_both(hasty):
    """
    A race of the call's end against the cancel: its value, or `Cancelled`; nothing is left.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            token = CancelToken()

            def call(token=token):
                with use_token(token):
                    return blocking.abandon(int, "7")

            thread, outcome = start(call)
            token.cancel()
            thread.join(timeout=60)
            assert outcome[0] == 7 or type(outcome[0]) is Cancelled
    until(lambda: not blocking.abandoned())


# --- In groups, and Ctrl-C ------------------------------------------------------------------------


def test_failure_wakes_a_sibling_that_reads(pipe):
    """
    The token of a task is the one that its calls hear.
    """

    def fails():
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"), TaskGroup(2) as group:
        reader = group.submit(blocking.read, pipe[0], 10)
        group.submit(fails)

    assert reader.cancelled()


PROGRAM = """
import os, sys, signal, fcntl, threading, time
sys.path.insert(0, {root!r})
import fastpool.blocking as blocking
from fastpool import TaskGroup
reader, writer = os.pipe()
os.mkfifo("fifo")
held, lock = open("lock", "w"), open("lock", "w")
fcntl.flock(held, fcntl.LOCK_EX)
try:
    with TaskGroup(2) as group:
        print("ready", flush=True)
        {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "call",
    [
        "blocking.select([reader], [], [])",
        "blocking.read(reader, 1)",
        "blocking.input()",
        "blocking.open_fifo('fifo')",
        "blocking.flock(lock, fcntl.LOCK_EX)",
        "blocking.abandon(time.sleep, 60)",
        "blocking.run(['sleep', '60'])",
        "blocking.run('sleep 60 & sleep 60', shell=True, capture_output=True)",
    ],
)
def test_ctrl_c_ends_the_call_in_a_body(call, tmp_path):
    """
    A real interrupt of a program whose main thread is blocked in a group's body.
    """
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(root=str(ROOT), call=call)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        # Blocked: its main thread has given up the processor, and does not take it again. Only
        # who waits for a lock does, now and then.
        until(lambda: sits(process.pid), within=1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def sits(pid):
    """Whether the main thread of a process is in one and the same sleep for a while."""

    def switches():
        lines = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
        return [line for line in lines if line.startswith(("State", "voluntary"))]

    before = switches()
    time.sleep(0.1)
    return before == switches() and "sleeping" in before[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blocking.select(["x"], [], []), "have a fileno"),
        (lambda: blocking.read("x", 1), "have a fileno"),
        (lambda: blocking.flock("x", 1), "have a fileno"),
        (lambda: blocking.abandon(5), "wants a function"),
        (lambda: blocking.connect(5), r"wants \(host, port\)"),
        (lambda: blocking.connect(("host",)), r"wants \(host, port\)"),
    ],
)
def test_what_cannot_be_waited_for_is_named(call, message):
    """
    With what would do.
    """
    with pytest.raises(TypeError, match=message):
        call()


def test_interrupting_a_file_says_what_to_call(pipe):
    """
    Nothing done to a file object wakes who reads from it.
    """
    with (
        open(pipe[0], closefd=False) as text,
        open(pipe[0], "rb", closefd=False) as buffered,
        open(pipe[0], "rb", 0, closefd=False) as raw,
    ):
        for file in (text, buffered, raw):
            with pytest.raises(TypeError, match=r"use fastpool\.blocking\.read.*, input\(prompt\)"):
                CancelToken().interrupts(file)


def test_set_token_is_heard_before_anything_is_done(tmp_path):
    """
    Also where nothing would block; only a lock is given back all the same.
    """
    token = CancelToken()
    token.cancel()
    with open(tmp_path / "lock", "w") as file, use_token(token):
        with pytest.raises(Cancelled):
            blocking.read(file.fileno(), 0)
        with pytest.raises(Cancelled):
            blocking.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        blocking.flock(file, fcntl.LOCK_UN)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is opened by its name")
def test_cancel_ends_the_opening_of_a_fifo_though_no_descriptor_is_left(tmp_path):
    """
    One is kept for that.
    """
    path = tmp_path / "fifo"
    os.mkfifo(path)
    token = CancelToken()
    thread, outcome = under(token, blocking.open_fifo, path)
    until(lambda: is_blocked(thread.native_id))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = []
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (1 + max(map(int, os.listdir("/proc/self/fd"))), limits[1])
    )
    try:
        with contextlib.suppress(OSError):
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))
        token.cancel()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in used:
            os.close(fd)

    assert type(ended(thread, outcome)) is Cancelled


def test_fifo_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    """
    No cancel could end it, so the message says what could.
    """
    path = tmp_path / "fifo"
    os.mkfifo(path)
    monkeypatch.setattr(os, "access", lambda *args, **options: False)

    with pytest.raises(PermissionError, match=r"use fastpool\.blocking\.abandon\(open, path\)"):
        blocking.open_fifo(path)
