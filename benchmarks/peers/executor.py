"""concurrent.futures.ThreadPoolExecutor."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

from benchmarks.jobs import Failing, clock, nothing

NAME = "ThreadPoolExecutor"


def submit(tasks: int, workers: int) -> float:
    with ThreadPoolExecutor(workers) as executor:
        start = clock()
        futures = [executor.submit(nothing) for _ in range(tasks)]
        for future in futures:
            future.result()
        return (clock() - start) / tasks


def map_all(tasks: int, workers: int) -> float:
    with ThreadPoolExecutor(workers) as executor:
        start = clock()
        list(executor.map(nothing, range(tasks)))
        return (clock() - start) / tasks


def imap(tasks: int, workers: int, window: int) -> float:
    """With a window where it can have one, from Python 3.14 on; else it reads to the end."""
    options = {"buffersize": window} if sys.version_info >= (3, 14) else {}
    with ThreadPoolExecutor(workers) as executor:
        start = clock()
        for _ in executor.map(nothing, range(tasks), **options):
            pass
        return (clock() - start) / tasks


def bounded(tasks: int, workers: int, most: int) -> float:
    """With a semaphore, as one writes it."""
    room = threading.BoundedSemaphore(workers + most)
    with ThreadPoolExecutor(workers) as executor:
        start = clock()
        futures = []
        for _ in range(tasks):
            room.acquire()
            future = executor.submit(nothing)
            future.add_done_callback(lambda _: room.release())
            futures.append(future)
        wait(futures)
        return (clock() - start) / tasks


futures = submit


def three(rounds: int) -> float:
    start = clock()
    for _ in range(rounds):
        with ThreadPoolExecutor(3) as executor:
            executor.submit(nothing)
            executor.submit(nothing)
            executor.submit(nothing)
    return (clock() - start) / rounds


def there_and_back(rounds: int, workers: int) -> float:
    with ThreadPoolExecutor(workers) as executor:
        start = clock()
        for _ in range(rounds):
            executor.submit(nothing).result()
        return (clock() - start) / rounds


def failing(run: Failing) -> None:
    try:
        with ThreadPoolExecutor(run.running) as executor:
            first = executor.submit(run.fail)
            for _ in range(run.running - 1):
                executor.submit(run.sleep)
            for _ in range(run.queued):
                executor.submit(run.short)
            run.start.set()
            first.result()
    except ValueError:
        run.caught()
