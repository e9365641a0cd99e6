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
}


@pytest.mark.parametrize("what", list(BREAK))
def test_broken_promise_is_found_and_its_round_is_named(what):
    """
    Each by the same seed, within a minute.
    """
    ended = soak("--minutes", "1", "--seed", "one", first=BREAK[what])

    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(r"^(after )?round \d+ of seed one", ended.stdout, re.MULTILINE)
