"""
Check many records, and give up when too many of them are bad: a policy of one's own.

    python examples/error_budget.py                   a thousand records, of which six are bad
    python examples/error_budget.py --budget 3        stops at the fourth
    python examples/error_budget.py FILE              the lines of a file, each `{"amount": 5}`

Records are read as there is room in the queue, so the input may be of any length.

The exit code is 0 if all records are good, 1 if some are bad, 2 if there were more than the budget
allows, or the file cannot be read, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpool import CancelToken, Failure, Task, TaskGroup, cancellable


class BadRecord(Exception):
    """A record is not as it should be."""


class BudgetExceeded(Exception):
    """More records are bad than may be."""


class ErrorBudget:
    """A policy: so many tasks may fail, and the next one that does cancels the rest."""

    def __init__(self, most: int) -> None:
        self.left = self.most = most

    def start(self) -> ErrorBudget:
        """The judge of one group, with a count of its own."""
        return ErrorBudget(self.most)

    def outcome(self, task: Task[Any], error: BaseException | None) -> bool:
        """One outcome at a time is told, so counting needs no lock."""
        self.left -= error is not None
        return self.left < 0

    def end(self, failures: Sequence[Failure]) -> BaseException | None:
        """What leaves the block: what the body raised, or that it was too much."""
        others = [failure.exception for failure in failures if failure.task is None]
        too_much = BudgetExceeded(f"more than {self.most} records are bad")
        return others[0] if others else too_much if self.left < 0 else None


def some_records() -> Iterator[str]:
    """Records to try it with."""
    for number in range(1, 1001):
        yield json.dumps({"amount": number}) if number % 150 else "rubbish"


@cancellable
def check(token: CancelToken, number: int, line: str, amounts: list[float]) -> None:
    """Check one record, and take note of its amount."""
    token.sleep(0.005)  # stands for what takes its time: a look into a database, say
    try:
        amount = json.loads(line)["amount"]
        amounts.append(float(amount))
    except (ValueError, TypeError, KeyError) as error:
        raise BadRecord(f"record {number} is bad: {line.strip()!r}") from error


def check_all(lines: Iterable[str], budget: int) -> int:
    """Check every record; return the exit code."""
    amounts: list[float] = []
    group = TaskGroup(8, name="records", max_queued=100, policy=ErrorBudget(budget))
    try:
        with group:
            for number, line in enumerate(lines, start=1):
                group.submit(check, number, line, amounts)
    except BudgetExceeded as error:
        say(f"gave up: {error}")
        return 2
    finally:
        # Of the ones that were bad at the same time there may be more than it takes.
        for failure in group.failures:
            if isinstance(failure.exception, BadRecord):
                say(str(failure.exception))
        print(f"{len(amounts)} records are good, {sum(amounts):g} in all", flush=True)
    return 1 if group.failures else 0


def say(message: str) -> None:
    """Tell the user, beside the output."""
    print(f"error_budget: {message}", file=sys.stderr)


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a record in each line")
    parser.add_argument("--budget", type=int, default=10, metavar="N", help="so many may be bad")
    options = parser.parse_args()
    if options.budget < 0:
        parser.error(f"--budget must be 0 or more, not {options.budget}")
    try:
        if options.file is None:
            return check_all(some_records(), options.budget)
        with options.file.open(encoding="utf-8") as lines:
            return check_all(lines, options.budget)
    except (OSError, UnicodeDecodeError) as error:
        say(f"cannot read {str(options.file)!r}: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
