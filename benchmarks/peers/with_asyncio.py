"""asyncio.TaskGroup with asyncio.to_thread."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from benchmarks.jobs import Failing, clock, nothing

NAME = "asyncio.TaskGroup"


def submit(tasks: int, workers: int) -> float:
    async def main() -> float:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(workers))
        start = clock()
        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(asyncio.to_thread(nothing))
        return (clock() - start) / tasks

    return asyncio.run(main())


def failing(run: Failing) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(run.running))
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(run.fail))
            for _ in range(run.running - 1):
                group.create_task(asyncio.to_thread(run.sleep))
            for _ in range(run.queued):
                group.create_task(asyncio.to_thread(run.short))
            run.start.set()

    try:
        asyncio.run(main())
    except* ValueError:
        run.caught()
