"""anyio.create_task_group with anyio.to_thread."""

import anyio
import anyio.to_thread

from benchmarks.jobs import Failing, clock, nothing

NAME = "anyio"


def submit(tasks: int, workers: int) -> float:
    async def main() -> float:
        limiter = anyio.CapacityLimiter(workers)

        async def one() -> None:
            await anyio.to_thread.run_sync(nothing, limiter=limiter)

        start = clock()
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(one)
        return (clock() - start) / tasks

    return anyio.run(main)


def failing(run: Failing) -> None:
    async def main() -> None:
        limiter = anyio.CapacityLimiter(run.running)

        async def one(fn: object) -> None:
            await anyio.to_thread.run_sync(fn, limiter=limiter)  # type: ignore[arg-type]

        async with anyio.create_task_group() as group:
            group.start_soon(one, run.fail)
            for _ in range(run.running - 1):
                group.start_soon(one, run.sleep)
            for _ in range(run.queued):
                group.start_soon(one, run.short)
            run.start.set()

    try:
        anyio.run(main)
    except* ValueError:
        run.caught()
