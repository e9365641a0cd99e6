"""How costs grow: `python -m benchmarks.curves`, with `--svg FILE` for the picture."""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import threading
from collections.abc import Callable

from benchmarks.jobs import clock, nothing
from benchmarks.measure import calibration, medians
from fastpool import TaskGroup

STEEPEST = 1.1  # the log-log slope of what grows in proportion, with some room for noise


def groups(count: int) -> float:
    """Groups of three tasks, one after another."""
    start = clock()
    for _ in range(count):
        with TaskGroup(3) as group:
            group.submit(nothing)
            group.submit(nothing)
            group.submit(nothing)
    return clock() - start


def workers(count: int) -> float:
    """As many tasks at once as there are workers, the threads being warm."""
    for _ in range(2):  # the first time starts the threads
        start = clock()
        meeting = threading.Barrier(count)
        with TaskGroup(count) as group:
            for _ in range(count):
                group.submit(meeting.wait)
        taken = clock() - start
    return taken


def submitted(count: int) -> float:
    """Tasks by `submit`, to their results."""
    start = clock()
    with TaskGroup(8) as group:
        tasks = [group.submit(nothing) for _ in range(count)]
        for task in tasks:
            task.result()
    return clock() - start


def mapped(count: int) -> float:
    """Tasks by `map`, to their results."""
    start = clock()
    with TaskGroup(8) as group:
        group.map(nothing, range(count)).results()
    return clock() - start


def nested(depth: int) -> float:
    """Groups within tasks of groups, so deep."""

    def nest(left: int) -> None:
        with TaskGroup(2) as group:
            group.submit(nothing)
            if left > 1:
                group.submit(nest, left - 1)

    start = clock()
    nest(depth)
    return clock() - start


def submitters(count: int) -> float:
    """Threads that submit a thousand tasks each, to one group."""

    def submit() -> None:
        for _ in range(1000):
            group.submit(nothing)

    threads = [threading.Thread(target=submit) for _ in range(count)]
    start = clock()
    with TaskGroup(8) as group:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return clock() - start


# What is counted, the job, and how many: the counts that are run, and the rounds of each.
CURVES: dict[str, tuple[Callable[[int], float], list[int], int]] = {
    "groups": (groups, [1, 10, 100, 1000], 9),
    "workers": (workers, [4, 64, 512], 7),
    "tasks by submit": (submitted, [10, 10_000, 1_000_000], 3),
    "tasks by map": (mapped, [10, 10_000, 1_000_000], 3),
    "depth of nesting": (nested, [1, 4, 16], 15),
    "submitting threads": (submitters, [1, 2, 4, 8], 9),
}


def slope(points: dict[int, float]) -> float:
    """Of the straight line through the points, drawn with logarithmic axes."""
    across, up = [[math.log(x) for x in xs] for xs in (points.keys(), points.values())]
    return statistics.linear_regression(across, up).slope


def draw(curves: dict[str, dict[int, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastpool"  # the same picture for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=True):
        axis.loglog(list(points), [seconds * 1e3 for seconds in points.values()], "o-")
        axis.set_title(f"{name}: slope {slope(points):.2f}")
        axis.set_xlabel(name)
        axis.set_ylabel("milliseconds")
        axis.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Measure, print, and say whether everything grows in proportion at most."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("--svg", metavar="FILE", help="draw the curves (needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    options = parser.parse_args()

    curves: dict[str, dict[int, float]] = {}
    for name, (job, counts, rounds) in CURVES.items():
        job(counts[0])  # warm
        able = {str(count): functools.partial(job, count) for count in counts}
        taken = medians(able, rounds)
        curves[name] = points = {int(count): seconds for count, seconds in taken.items()}
        steep = "" if slope(points) <= STEEPEST else "  <- too steep"
        figures = ", ".join(f"{count}: {seconds * 1e3:.2f} ms" for count, seconds in points.items())
        print(f"{name:20} slope {slope(points):.2f}{steep}   {figures}", flush=True)
    doubt = calibration.doubt()
    print(f"Not to be trusted: {doubt}." if doubt else "The machine was quiet.")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"doubt": doubt, "seconds": curves}, file, indent=1)
    if options.svg:
        draw(curves, options.svg)
    return any(slope(points) > STEEPEST for points in curves.values())


if __name__ == "__main__":
    sys.exit(main())
