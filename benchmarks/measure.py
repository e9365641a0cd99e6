"""Interleaved rounds and their medians, and whether the machine was quiet enough for them."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.jobs import clock

ROOT = Path(__file__).parent.parent

SETTLE = 0.05  # seconds in which the threads of the contestant before come to their end
BUSY = 1.5  # times as long as the quickest that a fixed piece of work takes in the middle


class Calibration:
    """How long a fixed piece of work takes now and then, and so how quiet the machine is."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def sample(self) -> None:
        start = clock()
        for _ in range(100_000):
            pass
        self.samples.append(clock() - start)

    def spread(self) -> float:
        """The median, in units of the shortest."""
        return statistics.median(self.samples) / min(self.samples) if self.samples else 1.0

    def doubt(self) -> str | None:
        """Why the figures should not be trusted, if they should not."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        cpus = os.cpu_count() or 1
        if self.spread() > BUSY:
            return f"the same work took {self.spread():.1f} times as long as it can"
        if load > cpus:
            return f"the load average is {load:.1f} on {cpus} processors"
        return None


calibration = Calibration()


def medians(
    contestants: Mapping[str, Callable[[], float]], rounds: int, settle: float = SETTLE
) -> dict[str, float]:
    """
    The median of what each of several contestants measures, in rounds that all take part in.
    """
    gc.collect()
    gc.freeze()  # or all would pay for what the peers have imported
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        calibration.sample()
        for name, measure in contestants.items():
            gc.collect()
            time.sleep(settle)
            measured[name].append(measure())
    return {name: statistics.median(values) for name, values in measured.items()}


def in_process(code: str) -> str:
    """What a new interpreter prints."""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ended.stdout
