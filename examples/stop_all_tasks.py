"""
Safely stop all running tasks after two seconds, then use the same pool again (E1, E2, E3).

By hand, an event goes into every task as its first argument, is looked at in every turn of every
loop, and is set by the main thread. Here the decorator hands each task a token and the group sets
it; the functions that a task calls find the token by themselves.
"""

import argparse
import itertools
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import fastpool
from fastpool import CancelToken, TaskGroup, cancellable


@cancellable
def work(token: CancelToken, number: int, folder: Path) -> int:
    path = folder / f"{number}.log"
    say(f"task {number} runs")
    try:
        with path.open("w") as log:  # closed, however the task ends
            for turn in token.each(range(5) if number < 3 else itertools.count()):
                print("turn", turn, file=log)
                rest()
    finally:
        say(f"task {number} has closed its log")
    return path.stat().st_size


def rest() -> None:
    fastpool.sleep(0.05)  # on the token of the task that calls, which was not passed


def say(text: str) -> None:
    sys.stdout.write(text + "\n")  # in one piece, unlike what print() does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="until the tasks are stopped")
    seconds = parser.parse_args().seconds

    with ThreadPool(10) as pool, TemporaryDirectory() as name:
        with TaskGroup(pool=pool) as group:
            batch = group.starmap(work, [(number, Path(name)) for number in range(10)])
            fastpool.sleep(seconds)
            say("stopping all tasks")
            group.cancel()
        stopped = [number for number, task in enumerate(batch.tasks) if task.cancelled()]
        say(f"stopped: {stopped}; finished: {len(batch) - len(stopped)}")

        with TaskGroup(pool=pool) as group:
            task = group.submit(work, 0, Path(name))
        say(f"the same pool has run one more task, which wrote {task.result()} bytes")


if __name__ == "__main__":
    main()
