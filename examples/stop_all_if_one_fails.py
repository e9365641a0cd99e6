"""
Stop all tasks as soon as one of them fails (F1, F2).

By hand, the task that fails catches its own error, sets an event and returns; the others find
the event set at their next turn, and the main thread hears nothing of the error. Here the task
just raises. The others stop at once, also in the middle of a pause, those that wait for a thread
never start, and the exception leaves the block. The exit status is 1, since the job is not done.
"""

import argparse
import sys
import zlib

from fastpool import CancelToken, TaskGroup, cancellable

started: list[int] = []


@cancellable
def compress(token: CancelToken, number: int, level: int, pause: float) -> int:
    started.append(number)
    size = turn = 0
    try:
        for turn in token.each(range(1, 5)):
            size += len(zlib.compress(bytes(100_000), level))
            if number == 5 and turn == 3:
                raise OSError("no space left on the disk")
            token.sleep(pause)
    finally:
        sys.stdout.write(f"task {number} ended in turn {turn}\n")
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--pause", type=float, default=0.5, help="seconds in every turn")
    pause = parser.parse_args().pause

    try:
        with TaskGroup(max_workers=8, name="compression") as group:
            batch = group.starmap(compress, [(number, 9, pause) for number in range(10)])
    except OSError as error:
        print("the first failure:", error)
        print(*error.__notes__, sep="\n")
        print("stopped:", [number for number, task in enumerate(batch.tasks) if task.cancelled()])
        print("of these never started:", sorted(set(range(10)) - set(started)))
        return 1
    print(f"compressed to {sum(batch)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
