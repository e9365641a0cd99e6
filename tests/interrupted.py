"""
What becomes of a program whose group's body is interrupted by a real Ctrl-C.
"""

import os
import signal
import subprocess
import sys

from staging import until


def in_child(body, *, asleep=True):
    """
    What a new process prints at its end that runs a body in a group, and gets a SIGINT when the
    body has said that it is ready, or sleeps after that.

    Args:
        body: A function of a test file, called with the group and with what says it is ready.
    """
    code = f"""
import signal
from {body.__module__} import {body.__name__} as body
from fastpool import TaskGroup
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with TaskGroup(2) as group:
        body(group, lambda: print("ready", flush=True))
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([folder, *filter(None, sys.path)])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            until(lambda: not asleep or state_of(child.pid) == "S")
            child.send_signal(signal.SIGINT)
            return child.communicate(timeout=60)[0]
        finally:
            child.kill()


def state_of(process):
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(") ")[2][0]
