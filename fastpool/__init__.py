"""
Blocking calls in threads, run as a group that fails fast.

`cancellable` gives a task function a cancel token; `TaskGroup` runs the calls on a
`multiprocessing.pool.ThreadPool`; the first exception stops everything else.
"""

from fastpool import blocking as blocking
from fastpool._batch import Batch, as_completed
from fastpool._callbacks import Registration
from fastpool._cancellable import Cancellable, cancellable
from fastpool._dump import OpenGroup, RunningTask, dump, dump_on_signal, print_dump
from fastpool._guard import cancel_on_signals
from fastpool._scope import checkpoint, current_token, shield, sleep, timeout, use_token
from fastpool._submitter import Submitter
from fastpool._task import Failure, Task
from fastpool._taskgroup import TaskGroup, map, shutdown
from fastpool._token import CancelToken
from fastpool._version import __version__
from fastpool.events import Event, Observer
from fastpool.exceptions import (
    Cancelled,
    GroupClosedError,
    StuckTaskError,
    TaskCancelledError,
    WorkerDiedError,
)
from fastpool.policies import CollectAll, FailFast, FirstSuccess, Judge, Policy

__all__ = [
    "Batch",
    "CancelToken",
    "Cancellable",
    "Cancelled",
    "CollectAll",
    "Event",
    "FailFast",
    "Failure",
    "FirstSuccess",
    "GroupClosedError",
    "Judge",
    "Observer",
    "OpenGroup",
    "Policy",
    "Registration",
    "RunningTask",
    "StuckTaskError",
    "Submitter",
    "Task",
    "TaskCancelledError",
    "TaskGroup",
    "WorkerDiedError",
    "__version__",
    "as_completed",
    "cancel_on_signals",
    "cancellable",
    "checkpoint",
    "current_token",
    "dump",
    "dump_on_signal",
    "map",
    "print_dump",
    "shield",
    "shutdown",
    "sleep",
    "timeout",
    "use_token",
]
