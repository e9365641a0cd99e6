"""
Stop every task as soon as one fails, and learn why (F1, F2).

By hand: the failing task catches its own error and sets an `Event` that every task carries
along; the main thread never hears of the error. Here the task just raises.
"""

from fastpool import CancelToken, Task, TaskGroup, cancellable


@cancellable
def task(token: CancelToken, number: int, turns: int) -> str:
    """Loops a few times; number 5 fails in its third turn."""
    for turn in range(turns):
        token.sleep(0.05)
        if number == 5 and turn == 2:
            raise ValueError(f"task {number} found something wrong in turn {turn}")
    token.sleep(60)  # long work, which nobody has to wait for
    return f"task {number} is done"


def main() -> None:
    """Issue ten tasks with two arguments each, and report what became of them."""
    group = TaskGroup(10, name="ten-tasks")
    tasks: list[Task[str]] = []
    try:
        with group:
            tasks.extend(group.starmap(task, [(number, 4) for number in range(10)]).tasks)
    except ValueError as error:
        print(f"the block raised: {error}")
    stopped = [one.name for one in tasks if one.cancelled()]
    print(f"stopped with it: {', '.join(stopped)}")
    print(f"failures: {len(group.failures)}, the first by {group.failures[0].task}")


if __name__ == "__main__":
    main()
