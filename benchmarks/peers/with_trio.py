"""trio's nursery with trio.to_thread."""

import trio

from benchmarks.jobs import Failing, clock, nothing

NAME = "trio"


def submit(tasks: int, workers: int) -> float:
    async def main() -> float:
        limiter = trio.CapacityLimiter(workers)

        async def one() -> None:
            await trio.to_thread.run_sync(nothing, limiter=limiter)

        start = clock()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(one)
        return (clock() - start) / tasks

    return trio.run(main)


def failing(run: Failing) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(run.running)

        async def one(fn: object) -> None:
            await trio.to_thread.run_sync(fn, limiter=limiter)  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, run.fail)
            for _ in range(run.running - 1):
                nursery.start_soon(one, run.sleep)
            for _ in range(run.queued):
                nursery.start_soon(one, run.short)
            run.start.set()

    try:
        trio.run(main)
    except* ValueError:
        run.caught()
