"""
The soak runs trees of groups, and says which promise was broken in which round.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def soak(*arguments, first=""):
    """Run it in a process of its own, after some code that breaks something."""
    program = f"import sys\n{first}\nfrom benchmarks import soak\nsys.exit(soak.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_rounds_are_counted_and_what_is_left_is_shown():
    """
    A few seconds of it on threads, by a seed.
    """
    ended = soak("--minutes", "0.05", "--seed", "one")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.match(r"seed one, threads, shared\n[1-9]\d* rounds, .*\d+ tasks", ended.stdout)


KEEP = """
from fastpool._run import Run
from fastpool._task import Call
kept, let_go, end = {}, Run.let_go, Run.end
def keep(self, task, reason):
    args = task._args if isinstance(task, Call) and not self.over else ()
    if args and getattr(args[0], "kind", None) == "value":
        kept.setdefault(self, []).append((task._fn, args))
    let_go(self, task, reason)
Run.let_go = keep
"""

BREAK = {
    "the last failure leaves": """
from fastpool.policies import FirstFailure
FirstFailure.end = lambda self, failures: failures[-1].exception if failures else None
""",
    "a block is left while a task runs": """
from fastpool._run import Run
Run.at_rest = lambda self: not self.called and len(self.idle) + 1 >= len(self.lanes)
""",
    "a third failure is lost": """
from fastpool._ledger import Ledger
record = Ledger.record
Ledger.record = lambda self, task, error: (
    record(self, task, error) if len(self.failures) < 2 else 0
)
""",
    "a failure stops who waits for a success": """
from fastpool.policies import FirstValue
FirstValue.outcome = lambda self, task, error: error is not None
""",
    "a stream takes a value twice": """
from fastpool._stream import Source
hand_out = Source.hand_out
def twice(self, first, count):
    values = hand_out(self, first, count)
    return values + values[:1]
Source.hand_out = twice
""",
    "idle threads are forgotten": """
from fastpool.backends import threads
threads.Leased.end = lambda self, run: None
""",
    "a task refers to its group when it has ended": """
from fastpool._run import Run
from fastpool import TaskGroup
kept, end = [], Run.end
Run.end = lambda self: (kept.append(self), end(self))[1]
""",
    "a group's deadline is swallowed": """
from fastpool import TaskGroup
ended_by = TaskGroup._ended_by
def swallow(self, *around):
    error = ended_by(self, *around)
    return None if isinstance(error, TimeoutError) else error
TaskGroup._ended_by = swallow
""",
    "a cancel from outside is swallowed": """
from fastpool import Cancelled, TaskGroup
ended_by = TaskGroup._ended_by
def swallow(self, *around):
    error = ended_by(self, *around)
    return None if isinstance(error, Cancelled) else error
TaskGroup._ended_by = swallow
""",
    "what never began runs as its block ends": KEEP
    + """
def run_late(self):
    failures = end(self)
    for fn, args in kept.pop(self, ()):
        if not failures:
            fn(*args)
    return failures
Run.end = run_late
""",
    "what never began begins after its block": KEEP
    + """
import threading, fastpool
timers, shutdown = [], fastpool.shutdown
def begin_late(self):
    failures = end(self)
    for call in kept.pop(self, ()):
        if not failures:
            timers.append(threading.Timer(0.05, *call))
            timers[-1].start()
    return failures
def wait():  # so that nothing is left when that is looked for
    while timers:
        timers.pop().join()
    shutdown()
Run.end, fastpool.shutdown = begin_late, wait
""",
    "a stream repeats its values where all failures are collected": """
import contextlib
from fastpool import _taskgroup
from fastpool.policies import Collector
in_order = _taskgroup.in_order
def twice(source):
    collects = isinstance(source.run.judge, Collector)
    with contextlib.closing(in_order(source)) as values:
        for value in values:
            yield from [value] * (1 + collects)
_taskgroup.in_order = twice
""",
    "handles of a map's tasks are kept": """
from fastpool._items import _Item
kept, init = [], _Item.__init__
def keep(self, *arguments):
    init(self, *arguments)
    kept.append(_Item.__new__(_Item))
_Item.__init__ = keep
""",
    "what is abandoned on processes runs on": """
from fastpool._run import Run
from fastpool.backends._process import WorkerProcess
abandoned, abandon, kill = [], Run.abandon, WorkerProcess.kill
def note(self, why):
    abandoned.append(why)
    return abandon(self, why)
Run.abandon = note
WorkerProcess.kill = lambda self: None if abandoned else kill(self)
""",
    "what is stuck on processes is not killed": """
from fastpool.backends._process import WorkerProcess
WorkerProcess.kill = lambda self: None
""",
    "a failure is lost in the groups of worker processes": """
from fastpool.backends import processes
WORSE = '''
from fastpool._ledger import Ledger
record = Ledger.record
Ledger.record = lambda self, task, error: (
    record(self, task, error) if len(self.failures) < 1 else 0
)
'''
worse = processes.Processes(initializer=exec, initargs=(WORSE, {}))
processes.default = lambda: worse
""",
}


@pytest.mark.parametrize("what", list(BREAK))
def test_broken_promise_is_found_and_its_round_is_named(what):
    """
    Each by the same seed, within a minute.
    """
    pools = "processes" if "processes" in what else "threads,shared"
    ended = soak("--minutes", "1", "--seed", "one", "--pools", pools, first=BREAK[what])

    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(r"^(after )?round \d+ of seed one", ended.stdout, re.MULTILINE)


CUT = """
import threading
from benchmarks import soak
from fastpool import _input, current_token
calls = [soak.Call(number, "stuck") for number in (2, 3, 4)]
block = soak.Block(1, 2, "collect", None, None, "threads", "map", calls, "cancel", False)
soak.tree = lambda chance, pools: block
threading.Timer.start = lambda timer: None  # no cancel from outside
at_work, do, read = threading.Semaphore(0), soak.Round.do, _input.read
def begin(self, call):
    at_work.release()
    do(self, call)
def read_and_cancel(iterator, most):
    if most > 1:
        assert at_work.acquire(timeout=60)
        current_token().cancel(soak.enough(block))
    return read(iterator, most)
soak.Round.do, _input.read = begin, read_and_cancel
"""


def test_what_is_left_behind_of_a_map_that_did_not_return_is_known():
    """
    The group ended in the middle of it, and nobody has a handle of the call at work.
    """
    ended = soak("--minutes", "0.01", first=CUT)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    rounds, abandoned = re.search(r"(\d+) rounds,.* (\d+) abandoned", ended.stdout).groups()
    assert rounds == abandoned != "0"
