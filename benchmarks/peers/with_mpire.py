"""mpire.WorkerPool on threads."""

from mpire import WorkerPool

from benchmarks.jobs import Failing, clock, nothing

NAME = "mpire"


def submit(tasks: int, workers: int) -> float:
    with WorkerPool(workers, start_method="threading") as pool:
        pool.map(nothing, range(workers))  # its workers start with the first map
        start = clock()
        results = [pool.apply_async(nothing) for _ in range(tasks)]
        for result in results:
            result.get()
        return (clock() - start) / tasks


def map_all(tasks: int, workers: int) -> float:
    with WorkerPool(workers, start_method="threading") as pool:
        start = clock()
        pool.map(nothing, range(tasks))
        return (clock() - start) / tasks


def failing(run: Failing) -> None:
    calls = [run.fail, *[run.sleep] * (run.running - 1), *[run.short] * run.queued]

    def one(number: int) -> None:  # it pickles what it hands to its threads
        calls[number]()

    run.start.set()
    try:
        with WorkerPool(run.running, start_method="threading") as pool:
            pool.map(one, range(len(calls)), chunk_size=1)
    except ValueError:
        run.caught()
