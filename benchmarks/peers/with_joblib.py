"""joblib.Parallel on threads."""

from joblib import Parallel, delayed

from benchmarks.jobs import Failing, clock, nothing

NAME = "joblib"


def submit(tasks: int, workers: int) -> float:
    with Parallel(n_jobs=workers, backend="threading", batch_size=1) as parallel:
        start = clock()
        parallel(delayed(nothing)() for _ in range(tasks))
        return (clock() - start) / tasks


def map_all(tasks: int, workers: int) -> float:
    with Parallel(n_jobs=workers, backend="threading") as parallel:
        start = clock()
        parallel(delayed(nothing)(number) for number in range(tasks))
        return (clock() - start) / tasks


def failing(run: Failing) -> None:
    run.start.set()
    calls = [run.fail, *[run.sleep] * (run.running - 1), *[run.short] * run.queued]
    try:
        Parallel(n_jobs=run.running, backend="threading", batch_size=1)(
            delayed(call)() for call in calls
        )
    except ValueError:
        run.caught()
