"""What every contestant runs, and how a failing run is watched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]
clock: Clock = time.perf_counter


def nothing(*arguments: object) -> None:
    """The task that costs nothing by itself."""


@dataclass
class Failing:
    """
    Eight tasks of which one fails while the others sleep, and a queue behind them.

    The contestant runs `fail` once and `sleep` seven times, then `short` for what is queued, and
    calls `caught` first thing in its `except`.
    """

    queued: int
    running: int = 8
    nap: float = 1.0  # seconds a sleeper takes where nothing can wake it
    sleep_on: Callable[[float], object] = time.sleep
    failed_at: float = 0.0
    caught_at: float = 0.0
    late: int = 0  # queued tasks that have started after the failure
    asleep: list[int] = field(default_factory=list)
    still_running: int = 0
    start: threading.Event = field(default_factory=threading.Event)

    def sleep(self, *arguments: object) -> None:
        self.asleep.append(1)
        try:
            self.sleep_on(self.nap)
        finally:
            self.asleep.pop()

    def fail(self, *arguments: object) -> None:
        self.start.wait(60)
        while len(self.asleep) < self.running - 1:
            time.sleep(0.001)
        self.failed_at = clock()
        raise ValueError("the failure")

    def short(self, *arguments: object) -> None:
        if self.failed_at:
            self.late += 1

    def caught(self) -> None:
        self.caught_at = clock()
        self.still_running = len(self.asleep)

    @property
    def delay(self) -> float:
        """Seconds from the failure to the `except`."""
        return self.caught_at - self.failed_at
