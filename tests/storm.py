"""
Workers that are killed at random moments, as many rounds as wanted.

    python tests/storm.py --rounds 1000
"""

import argparse
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from far import lines, note

import fastpool
from fastpool import CollectAll, TaskGroup, WorkerDiedError
from fastpool.backends.processes import Processes

SIZES = (10, 1_000, 100_000, 3_000_000)  # bytes that come home
TASKS = 16


def work(path, number, size, seconds):
    """Say that it has begun, take some time, and return so many bytes."""
    note(path, number)
    time.sleep(seconds)
    return bytes(size)


def kill(chance, moments):
    """Kill some worker at each of these moments, whatever it is at."""
    for moment in moments:
        time.sleep(moment)
        workers = multiprocessing.active_children()
        if workers:
            with suppress(ProcessLookupError, TypeError):  # it has ended, or is just being made
                os.kill(chance.choice(workers).pid, signal.SIGKILL)


def play(rounds, folder, seed=1):
    """
    How many tasks had their values, how many had a worker die, and how many were cancelled.

    In every third round tasks sleep besides, and the group is cancelled; nothing else ends them.

    Raises at a task that began twice, at a value that is not its own, and at any error but that
    of a worker's death.
    """
    chance = random.Random(seed)
    backend = Processes(2, kill_after=None)
    came = Counter()
    for number in range(rounds):
        path = folder / str(number)
        sizes = [chance.choice(SIZES) for _ in range(TASKS)]
        # Some of them fall into the time in which a worker starts in another's place.
        moments = [chance.choice((0, 0.002, 0.02, 0.1)) * chance.random() for _ in range(3)]
        killer = threading.Thread(target=kill, args=(chance, moments))
        killer.start()
        tasks = []
        with suppress(ExceptionGroup), TaskGroup(pool=backend, policy=CollectAll()) as group:
            for at, size in enumerate(sizes):
                seconds = chance.choice((0, 0.001, 0.01))
                tasks.append(group.submit(work, path, at, size, seconds))
            if number % 3 == 0:
                for _ in range(2):
                    group.submit(fastpool.sleep, 3600)
                killer.join()
                group.cancel()
        killer.join()
        for task, size in zip(tasks, sizes, strict=True):
            if task.cancelled():
                came["cancel"] += 1
                continue
            error = task.exception(timeout=0)
            if error is None and len(task.result()) != size:
                raise AssertionError(f"round {number}: a value that is not its own")
            if error is not None and type(error) is not WorkerDiedError:
                raise AssertionError(f"round {number}: {error!r}") from error
            came["value" if error is None else "death"] += 1
        if len(begun := lines(path)) != len(set(begun)):
            raise AssertionError(f"round {number}: tasks began twice: {Counter(begun)}")
        with suppress(FileNotFoundError):
            path.unlink()
    return came


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    faulthandler.dump_traceback_later(60 + 3 * options.rounds, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        came = play(options.rounds, Path(folder), options.seed)
    print(dict(came))
    assert all(came[what] for what in ("value", "death", "cancel")), "one of these never came"
    fastpool.shutdown()
    assert not multiprocessing.active_children()
    return 0


if __name__ == "__main__":
    sys.exit(main())
