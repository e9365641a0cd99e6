"""fastpool."""

from benchmarks.jobs import Failing, clock, nothing
from fastpool import TaskGroup, sleep
from fastpool.futures import GroupExecutor

NAME = "fastpool"


def submit(tasks: int, workers: int) -> float:
    with TaskGroup(workers) as group:
        start = clock()
        handles = [group.submit(nothing) for _ in range(tasks)]
        for handle in handles:
            handle.result()
        return (clock() - start) / tasks


def map_all(tasks: int, workers: int) -> float:
    with TaskGroup(workers) as group:
        start = clock()
        group.map(nothing, range(tasks)).results()
        return (clock() - start) / tasks


def imap(tasks: int, workers: int, window: int | None = None) -> float:
    with TaskGroup(workers) as group:
        start = clock()
        for _ in group.imap(nothing, range(tasks), window=window):
            pass
        return (clock() - start) / tasks


def imap_unordered(tasks: int, workers: int, window: int | None = None) -> float:
    with TaskGroup(workers) as group:
        start = clock()
        for _ in group.imap_unordered(nothing, range(tasks), window=window):
            pass
        return (clock() - start) / tasks


def bounded(tasks: int, workers: int, most: int) -> float:
    with TaskGroup(workers, max_queued=most) as group:
        start = clock()
        for _ in range(tasks):
            group.submit(nothing)
        group.wait()
        return (clock() - start) / tasks


def futures(tasks: int, workers: int) -> float:
    with TaskGroup(workers) as group:
        executor = GroupExecutor(group)
        start = clock()
        handles = [executor.submit(nothing) for _ in range(tasks)]
        for handle in handles:
            handle.result()
        return (clock() - start) / tasks


def three(rounds: int) -> float:
    start = clock()
    for _ in range(rounds):
        with TaskGroup(3) as group:
            group.submit(nothing)
            group.submit(nothing)
            group.submit(nothing)
    return (clock() - start) / rounds


def there_and_back(rounds: int, workers: int) -> float:
    with TaskGroup(workers) as group:
        start = clock()
        for _ in range(rounds):
            group.submit(nothing).result()
        return (clock() - start) / rounds


def failing(run: Failing) -> None:
    run.sleep_on = sleep
    try:
        with TaskGroup(run.running) as group:
            group.submit(run.fail)
            for _ in range(run.running - 1):
                group.submit(run.sleep)
            group.map(run.short, range(run.queued))
            run.start.set()
    except ValueError:
        run.caught()
