"""multiprocessing.pool.ThreadPool."""

from multiprocessing.pool import ThreadPool

from benchmarks.jobs import Failing, clock, nothing

NAME = "ThreadPool"


def submit(tasks: int, workers: int) -> float:
    with ThreadPool(workers) as pool:
        start = clock()
        results = [pool.apply_async(nothing) for _ in range(tasks)]
        for result in results:
            result.get()
        return (clock() - start) / tasks


def map_all(tasks: int, workers: int) -> float:
    with ThreadPool(workers) as pool:
        start = clock()
        pool.map_async(nothing, range(tasks), chunksize=1).get()
        return (clock() - start) / tasks


def imap(tasks: int, workers: int) -> float:
    """It has no window: it reads its input to the end."""
    with ThreadPool(workers) as pool:
        start = clock()
        for _ in pool.imap(nothing, range(tasks)):
            pass
        return (clock() - start) / tasks


def imap_unordered(tasks: int, workers: int) -> float:
    with ThreadPool(workers) as pool:
        start = clock()
        for _ in pool.imap_unordered(nothing, range(tasks)):
            pass
        return (clock() - start) / tasks


def three(rounds: int) -> float:
    start = clock()
    for _ in range(rounds):
        with ThreadPool(3) as pool:
            results = [pool.apply_async(nothing) for _ in range(3)]
            for result in results:
                result.get()
    return (clock() - start) / rounds


def there_and_back(rounds: int, workers: int) -> float:
    with ThreadPool(workers) as pool:
        start = clock()
        for _ in range(rounds):
            pool.apply_async(nothing).get()
        return (clock() - start) / rounds


def failing(run: Failing) -> None:
    try:
        with ThreadPool(run.running) as pool:
            first = pool.apply_async(run.fail)
            for _ in range(run.running - 1):
                pool.apply_async(run.sleep)
            for _ in range(run.queued):
                pool.apply_async(run.short)
            run.start.set()
            first.get()
    except ValueError:
        run.caught()
