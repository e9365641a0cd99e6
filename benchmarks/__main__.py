"""Print the table: every row's figure beside its target."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict

from benchmarks import soak
from benchmarks.jobs import clock
from benchmarks.measure import calibration
from benchmarks.rows import FULL, QUICK, ROWS, Result

HOPELESS = 0.5  # of a target: what noise cannot explain...
TRIES = 3  # ...that many times in a row


def main() -> int:
    """Measure, print, and say whether what must hold holds."""
    if sys.argv[1:2] == ["soak"]:
        return soak.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare fastpool with its peers, in one run on this machine.",
    )
    parser.add_argument("--only", metavar="ROW", choices=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="less of everything, the standard library only; exit code 1 if a ratio is at less "
        f"than half its target, {TRIES} times in a row",
    )
    options = parser.parse_args()
    size = QUICK if options.quick else FULL

    start = clock()
    print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}")
    print("A ratio says how many times better fastpool is than the peer in the same run.\n")
    print(f"{'row':15} {'fastpool':>10} {'peer':>10}  unit   ratio  target  peer")
    results: list[Result] = []
    for name, row in ROWS.items():
        if options.only in (None, name):
            figures = row(size)
            tries = 1
            while options.quick and tries < TRIES and not all(map(possible, figures)):
                print(f"{name}: measured again, at less than half its target", flush=True)
                figures = row(size)
                tries += 1
            for result in figures:
                results.append(result)
                print(line(result), flush=True)
    doubt = calibration.doubt()
    print(f"\n{clock() - start:.0f} s, medians of {size.rounds} interleaved rounds")
    print(f"Not to be trusted: {doubt}." if doubt else "The machine was quiet.")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "python": platform.python_version(),
                    "machine": platform.machine(),
                    "doubt": doubt,
                    "results": [asdict(result) for result in results],
                },
                file,
                indent=1,
            )
    if options.quick:
        bad = [result for result in results if not possible(result)]
        for result in bad:
            print(f"{result.row} against {result.peer}: {result.ratio:.2f}", file=sys.stderr)
        return bool(bad)
    return 0


def line(result: Result) -> str:
    ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
    target = "" if result.target is None else f"{result.target:.2f}"
    theirs = "" if result.theirs is None else f"{result.theirs:.2f}"
    miss = "" if result.met else "  <- missed"
    return (
        f"{result.row:15} {result.ours:10.2f} {theirs:>10}  {result.unit:6}"
        f" {ratio:>5} {target:>7}  {result.peer}{miss}"
    )


def possible(result: Result) -> bool:
    """Whether noise may explain the figure, where it misses its target."""
    if result.target is None or result.ratio is None:
        return True
    return result.ratio >= result.target * HOPELESS


if __name__ == "__main__":
    sys.exit(main())
