"""
Shut down, and count the threads that are left (S1, S4, P3).

By hand: `close()`, then `join()`, in this order; `apply_async` after that raises
`ValueError: Pool not running`. Here leaving the block is the join, and cannot be forgotten.
"""

import threading

import fastpool
from fastpool import GroupClosedError, TaskGroup


def main() -> None:
    """Run a group, use it in vain after its end, and end the threads that are kept warm."""
    print(f"threads before: {threading.active_count()}")
    with TaskGroup(4, name="squares") as group:
        squares = group.map(pow, range(10), [2] * 10)
        unfinished = TaskGroup(name="never-entered")
    print(f"squares: {squares.results()}")

    for ended in (group, unfinished):
        try:
            ended.submit(pow, 11, 2)
        except GroupClosedError as error:
            print(f"refused: {error}")

    # Idle threads wait for the next group, for ten seconds, or until this:
    fastpool.shutdown()
    print(f"threads after: {threading.active_count()}")


if __name__ == "__main__":
    main()
