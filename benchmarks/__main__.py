"""
Print how fastpool compares with the standard library's pools, in one run on one machine.

Each row is the median of interleaved rounds; a ratio says how many times longer the peer takes
for the same job. Quote ratios, not times: machines differ, and this one may be busy.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

from fastpool import TaskGroup

TASKS = 10_000
WORKERS = 8
ROUNDS = 5


def nothing(*arguments: object) -> None:
    """The task that costs nothing by itself."""


def fastpool_submit() -> Iterator[None]:
    with TaskGroup(WORKERS) as group:
        yield
        tasks = [group.submit(nothing) for _ in range(TASKS)]
        for task in tasks:
            task.result()
        yield


def executor_submit() -> Iterator[None]:
    with ThreadPoolExecutor(WORKERS) as executor:
        yield
        futures = [executor.submit(nothing) for _ in range(TASKS)]
        for future in futures:
            future.result()
        yield


def pool_apply_async() -> Iterator[None]:
    with ThreadPool(WORKERS) as pool:
        yield
        results = [pool.apply_async(nothing) for _ in range(TASKS)]
        for result in results:
            result.get()
        yield


def fastpool_three() -> Iterator[None]:
    yield
    for _ in range(50):
        with TaskGroup() as group:
            for _ in range(3):
                group.submit(nothing)
    yield


def executor_three() -> Iterator[None]:
    yield
    for _ in range(50):
        with ThreadPoolExecutor() as executor:
            for _ in range(3):
                executor.submit(nothing)
    yield


def pool_three() -> Iterator[None]:
    yield
    for _ in range(50):
        with ThreadPool(3) as pool:
            for result in [pool.apply_async(nothing) for _ in range(3)]:
                result.get()
    yield


ROWS: list[tuple[str, Callable[[], Iterator[None]], list[Callable[[], Iterator[None]]]]] = [
    ("submit, then result", fastpool_submit, [executor_submit, pool_apply_async]),
    ("group of three, warm", fastpool_three, [executor_three, pool_three]),
]


def seconds(job: Callable[[], Iterator[None]]) -> float:
    """How long a job takes from its first `yield` to its second."""
    steps = job()
    next(steps)
    start = time.perf_counter()
    next(steps)
    taken = time.perf_counter() - start
    for _ in steps:
        pass
    return taken


def main() -> None:
    """Run the rows and print the table."""
    print(f"Python {sys.version.split()[0]}, medians of {ROUNDS} interleaved rounds")
    for name, ours, peers in ROWS:
        taken: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for job in (ours, *peers):
                taken.setdefault(job.__name__, []).append(seconds(job))
        mine = statistics.median(taken[ours.__name__])
        for peer in peers:
            ratio = statistics.median(taken[peer.__name__]) / mine
            print(f"{name:24} {ratio:6.1f} x faster than {peer.__name__}")


if __name__ == "__main__":
    main()
