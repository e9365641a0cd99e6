"""
How a test knows that a thread is blocked, and sets its token then.
"""

import os
import select
import sys
import threading
import time
from types import SimpleNamespace

from staging import look, start, until

from fastpool import CancelToken, _syscalls, use_token

# The system calls in which a thread waits for a file, a socket or another process; and not for
# the interpreter or one of its locks.
FOR_FILES = {
    number
    for number, name in _syscalls._NUMBERS[os.uname().machine].items()
    if name in {"accept", "accept4", "connect", "open", "openat", "poll", "ppoll", "read"}
    or name in {"epoll_pwait", "epoll_wait"}
    or name in {"recvfrom", "recvmsg", "sendmsg", "sendto", "wait4", "waitid", "write"}
}


def descriptors():
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def is_blocked(number, among=FOR_FILES, process="self"):
    """Whether the thread with that native number sleeps in one of those calls, and goes on to."""
    seen = look(number, process)
    if seen is None or (among is not None and int(seen[0].split()[0]) not in among):
        return False
    time.sleep(0.005)
    return look(number, process) == seen


def rests(monkeypatch, module):
    """What says whether no thread of a module's goes on polling: one that spins always does."""
    began = []

    class Poll:
        def __init__(self):
            poll = select.poll()
            self.register, self.unregister, self._poll = poll.register, poll.unregister, poll.poll

        def poll(self, *arguments):
            began.append(None)
            return self._poll(*arguments)

    def at_rest():
        before = len(began)
        time.sleep(0.05)  # seconds
        return len(began) == before

    names = {"poll": Poll, "POLLIN": select.POLLIN, "POLLOUT": select.POLLOUT}
    monkeypatch.setattr(module, "select", SimpleNamespace(**names))
    return at_rest


def is_inside(thread, fn):
    """Whether a thread has come into a function."""
    frame = sys._current_frames().get(thread.ident)
    while frame is not None and frame.f_code is not fn.__code__:
        frame = frame.f_back
    return frame is not None


def under(token, fn, *args):
    """A thread that calls a function under a token, and the list for what comes of it."""

    def call():
        with use_token(token):
            return fn(*args)

    return start(call)


def ended(thread, outcome):
    """What came of it."""
    thread.join(timeout=60)
    assert outcome, "it hangs"
    return outcome[0]


def cancel_while_blocked(fn, *args, among=FOR_FILES, ready=lambda: True):
    """
    Call a function in a thread under a token, and cancel that once the thread is blocked.

    Args:
        among: In which system calls; `None`: in any.
        ready: Whether what is to come before has come: a server may be late.

    Returns:
        What the function returned or raised.
    """
    token = CancelToken()
    thread, outcome = under(token, fn, *args)
    until(
        lambda: (
            outcome or (ready() and is_inside(thread, fn) and is_blocked(thread.native_id, among))
        )
    )
    assert not outcome, outcome
    token.cancel("enough")
    return ended(thread, outcome)


def canceller(tokens, meeting):
    """A thread that cancels one token between two meetings, each a little later than the last."""

    def cancels():
        for number, token in enumerate(tokens):
            meeting.wait()
            for _ in range(number * 40):
                pass
            token.cancel()
            meeting.wait()

    return threading.Thread(target=cancels)
