"""
Stop every running task from the main thread, in an orderly way, and go on (E1, E2, E3).

By hand: an `Event`, given to each task, looked at in every turn, set after two seconds.
Here the decorator brings the token, and the same pool takes new tasks afterwards.
"""

import sys
import time
from multiprocessing.pool import ThreadPool

from fastpool import CancelToken, TaskGroup, cancellable, checkpoint


@cancellable
def task(token: CancelToken, number: int) -> None:
    """Works until it is told to stop, and puts its things away then."""
    try:
        while True:
            token.sleep(0.1)
    finally:
        print(f"task {number} has put its things away\n", end="")  # at once, newline and all


def task_with_clean_arguments(number: int) -> None:
    """Needs no token among its arguments: it looks at the current one."""
    try:
        while True:
            checkpoint()
            time.sleep(0.01)  # a little work
    finally:
        print(f"task {number} has put its things away\n", end="")  # at once, newline and all


def main(seconds: float) -> None:
    """Run ten tasks for a while, stop them all, and use the pool again."""
    with ThreadPool(10) as pool:
        with TaskGroup(pool=pool, name="endless") as group:
            tasks = [group.submit(task, number) for number in range(5)]
            tasks += [group.submit(task_with_clean_arguments, number) for number in range(5, 10)]
            time.sleep(seconds)
            print("stopping all tasks")
            group.cancel("we have seen enough")
        print(f"{sum(task.cancelled() for task in tasks)} tasks were stopped")

        with TaskGroup(pool=pool) as group:
            answer = group.submit(pow, 2, 10)
        print(f"the same pool goes on: {answer.result()}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
