"""
What the server of forked processes imports ahead of them, and nobody else.

It is started with Ctrl-C blocked, which it would die of while it imports, with a traceback. From
here on it takes no notice; and what it forks for others than us is to hear it as ever.
"""

from __future__ import annotations

import signal

from fastpool.backends import _worker

__all__ = ["_worker"]

if hasattr(signal, "pthread_sigmask"):
    _before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what came meanwhile is dropped
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, _before)
