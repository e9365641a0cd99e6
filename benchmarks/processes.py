"""
Pools of processes: the same jobs for all, each through its own way of submitting a call.

Workers and parent tell each other the time by files: the clock is the machine's.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastpool
from benchmarks.jobs import clock, nothing
from fastpool import TaskGroup
from fastpool.backends import Processes

Submit = Callable[..., Any]
Pool = Callable[[int], AbstractContextManager[Submit]]

NAP = 0.5  # seconds a sleeper takes where nothing can wake it
PATIENCE = 1.5  # seconds after which a pool that says nothing hangs
QUEUED = 200


# --- The contestants ------------------------------------------------------------------------------


@contextmanager
def ours(workers: int, kept: dict[int, Processes] = {}) -> Iterator[Submit]:  # noqa: B006 - warm
    backend = kept.setdefault(workers, Processes(workers))
    with TaskGroup(pool=backend) as group:
        yield group.submit


@contextmanager
def executor(workers: int) -> Iterator[Submit]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield pool.submit


@contextmanager
def pool(workers: int) -> Iterator[Submit]:
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        yield lambda fn, *args: pool.apply_async(fn, args)


@contextmanager
def loky(workers: int) -> Iterator[Submit]:
    with importlib.import_module("loky").ProcessPoolExecutor(workers) as pool:
        yield pool.submit


@contextmanager
def pebble(workers: int) -> Iterator[Submit]:
    context = multiprocessing.get_context("forkserver")
    with importlib.import_module("pebble").ProcessPool(workers, context=context) as pool:
        yield lambda fn, *args: pool.schedule(fn, args=args)


@contextmanager
def mpire(workers: int) -> Iterator[Submit]:
    with importlib.import_module("mpire").WorkerPool(workers, start_method="forkserver") as pool:
        yield lambda fn, *args: pool.apply_async(fn, args)


STANDARD: dict[str, Pool] = {
    "fastpool": ours,
    "ProcessPoolExecutor": executor,
    "multiprocessing.Pool": pool,
}
OTHERS: dict[str, Pool] = {"loky": loky, "pebble": pebble, "mpire": mpire}


def result(handle: Any) -> Any:
    """What a call came to, by whatever name; nothing is waited for without end."""
    return (handle.result if hasattr(handle, "result") else handle.get)(timeout=PATIENCE)


# --- What runs in the workers ---------------------------------------------------------------------


def work(seconds: float) -> None:
    """Compute for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def note(folder: str, name: str) -> None:
    """Write down what time it is."""
    path = Path(folder, name)
    path.with_suffix(".part").write_text(repr(clock()))
    path.with_suffix(".part").rename(path)


def sleeper(folder: str, number: int, by_token: bool) -> None:
    note(folder, f"asleep-{number}")
    try:
        (fastpool.sleep if by_token else time.sleep)(NAP)
    finally:
        note(folder, f"finally-{number}")


def end_badly(folder: str, sleepers: int, deadly: bool) -> None:
    """Fail, or die, once the others sleep."""
    while len(list(Path(folder).glob("asleep-[0-9]*"))) < sleepers:
        time.sleep(0.001)
    note(folder, "failed")
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the failure")


def short(folder: str, number: int) -> None:
    if Path(folder, "failed").exists():
        note(folder, f"late-{number}")


# --- The jobs -------------------------------------------------------------------------------------


def each(pool: Pool, tasks: int, workers: int, fn: Callable[..., object], *args: object) -> float:
    """Seconds for each of so many calls, submitted one by one."""
    with pool(workers) as submit:
        for handle in [submit(fn, *args) for _ in range(workers)]:
            result(handle)  # its workers are there
        start = clock()
        handles = [submit(fn, *args) for _ in range(tasks)]
        for handle in handles:
            result(handle)
        return (clock() - start) / tasks


@dataclass
class Ending:
    """
    How a failure, or a death, went.

    Attributes:
        delay: Seconds from it to the caller's `except`, the block left; infinite if it hangs.
        late: Queued tasks that started after it.
        cleaned: Siblings that had run their `finally` by then.
        recovered: Seconds from the `except` to the next result, of a new pool where it takes one.
    """

    delay: float
    late: int
    cleaned: int
    recovered: float


def ending(pool: Pool, workers: int, *, deadly: bool) -> Ending:
    """One task of several fails, or dies, while the others sleep and more are queued."""
    with tempfile.TemporaryDirectory() as folder:
        caught = math.inf
        try:
            with pool(workers) as submit:
                for handle in [submit(nothing) for _ in range(workers)]:
                    result(handle)
                first = submit(end_badly, folder, workers - 1, deadly)
                for number in range(workers - 1):
                    submit(sleeper, folder, number, pool is ours)
                for number in range(QUEUED):
                    submit(short, folder, number)
                result(first)
        except Exception as error:  # each has its own for a death
            if not isinstance(error, TimeoutError | multiprocessing.TimeoutError):
                caught = clock()
        failed = float(Path(folder, "failed").read_text())
        cleaned = sum(
            float(path.read_text()) <= caught for path in Path(folder).glob("finally-[0-9]*")
        )
        late = len(list(Path(folder).glob("late-[0-9]*")))
        again = clock()
        with pool(workers) as submit:
            result(submit(nothing))
            recovered = clock() - again
    return Ending(caught - failed, late, cleaned, recovered)
