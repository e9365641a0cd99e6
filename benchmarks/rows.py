"""The rows of the table: what is measured, against whom, and what it should come to."""

from __future__ import annotations

import contextvars
import functools
import importlib
import os
import random
import statistics
import sys
import threading
import timeit
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType

from benchmarks import blocked, operations, processes
from benchmarks.jobs import Failing, clock, nothing
from benchmarks.measure import in_process, medians
from fastpool import CancelToken, TaskGroup, cancellable, current_token

PEERS = [
    "ours",
    "executor",
    "threadpool",
    "with_asyncio",
    "with_anyio",
    "with_trio",
    "with_joblib",
    "with_mpire",
]
STANDARD = ["ours", "executor", "threadpool"]

WORKERS = 8
WAKINGS = 10  # of a blocked thread, in what is a round for others

# Without a GIL the standard pools are quicker and ours no longer has the queue for itself.
FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()


@dataclass(frozen=True)
class Size:
    """How much is done of everything."""

    rounds: int
    tasks: int
    slow_tasks: int  # for contestants that take a tenth of a millisecond for each
    groups: int
    queued: tuple[int, ...]
    processes: int


FULL = Size(9, 20_000, 1_000, 200, (100_000, 1_000_000), 15)
QUICK = Size(5, 5_000, 200, 50, (100_000,), 5)


@dataclass(frozen=True)
class Result:
    """
    One line of the table.

    Attributes:
        row: The name of the row.
        peer: Who or what ours is compared with.
        ours: Our figure.
        theirs: The peer's; None where there is nothing to compare.
        unit: Of both.
        ratio: How many times better ours is; None without a target and a peer.
        target: What the ratio should be at least.
    """

    row: str
    peer: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None = None
    target: float | None = None

    @property
    def met(self) -> bool:
        """Whether the target is reached; also where there is none."""
        return self.target is None or self.ratio is None or self.ratio >= self.target


def contestants(size: Size) -> list[ModuleType]:
    """Those that are installed; for the quick form the standard library's."""
    found = []
    for name in STANDARD if size is QUICK else PEERS:
        try:
            found.append(importlib.import_module(f"benchmarks.peers.{name}"))
        except ModuleNotFoundError as error:
            print(f"{name.removeprefix('with_')} is not installed ({error.name})", file=sys.stderr)
    return found


def against(row: str, job: str, size: Size, targets: dict[str, float]) -> list[Result]:
    """
    One job, done by everybody who can.

    In two heats, with fastpool in both: the threads and the memory that event loops and process
    managers leave behind slow down whoever comes next, and most who is quickest.
    """
    able = [peer for peer in contestants(size) if hasattr(peer, job)]
    results = []
    for names in (STANDARD, PEERS[len(STANDARD) :]):
        heat = {
            peer.NAME: functools.partial(
                getattr(peer, job), size.tasks if name in STANDARD else size.slow_tasks, WORKERS
            )
            for peer in able
            if (name := peer.__name__.rpartition(".")[2]) in ("ours", *names)
        }
        if len(heat) > 1:
            results += compared(row, medians(heat, size.rounds), targets, "us", 1e6)
    return results


def compared(
    row: str, taken: dict[str, float], targets: dict[str, float], unit: str, scale: float
) -> list[Result]:
    ours = taken.pop("fastpool")
    return [
        Result(
            row,
            peer,
            ours * scale,
            theirs * scale,
            unit,
            theirs / ours if ours else None,
            targets.get(peer),
        )
        for peer, theirs in taken.items()
    ]


# --- The rows -------------------------------------------------------------------------------------


def submit(size: Size) -> list[Result]:
    """No-op tasks: `submit` in a loop, then `result`."""
    targets = {"ThreadPoolExecutor": 5.0, "ThreadPool": 4.0}
    if FREE_THREADED:
        targets = {"ThreadPoolExecutor": 3.0, "ThreadPool": 2.0}
    return against("submit", "submit", size, targets)


def map_(size: Size) -> list[Result]:
    """No-op tasks: `map`, all the results."""
    results = against("map", "map_all", size, {"ThreadPool": 2.0})
    from benchmarks.peers import ours

    taken = medians(
        {
            "fastpool": lambda: ours.map_all(size.tasks, WORKERS),
            "our own submit": lambda: ours.submit(size.tasks, WORKERS),
        },
        size.rounds,
    )
    return results + compared("map", taken, {"our own submit": 3.0}, "us", 1e6)


def streams(size: Size) -> list[Result]:
    """No-op tasks: `imap` and `imap_unordered`, with a wide window and the default one."""
    from benchmarks.peers import executor, ours, threadpool

    workers, narrow, wide = WORKERS, 2 * WORKERS, 1000
    results: list[Result] = []
    for job in ("imap", "imap_unordered"):
        able: dict[str, Callable[[], float]] = {
            "fastpool": functools.partial(getattr(ours, job), size.tasks, workers, wide),
            "ThreadPool": functools.partial(getattr(threadpool, job), size.tasks, workers),
        }
        if job == "imap":
            able["ThreadPoolExecutor"] = functools.partial(
                executor.imap, size.slow_tasks, workers, wide
            )
        targets = {"ThreadPool": 1.5 if FREE_THREADED else 3.0, "ThreadPoolExecutor": 3.0}
        results += compared(job, medians(able, size.rounds), targets, "us", 1e6)
    able = {
        "fastpool": functools.partial(ours.imap, size.tasks, workers, narrow),
        f"ThreadPoolExecutor, {narrow}": functools.partial(
            executor.imap, size.slow_tasks, workers, narrow
        ),
    }
    return results + compared("imap", medians(able, size.rounds), {}, "us", 1e6)


def bounded(size: Size) -> list[Result]:
    """No-op tasks of which a hundred may wait, against an executor with a semaphore."""
    from benchmarks.peers import executor, ours

    able = {
        "fastpool": lambda: ours.bounded(size.tasks, WORKERS, 100),
        "ThreadPoolExecutor": lambda: executor.bounded(size.slow_tasks, WORKERS, 100),
    }
    return compared("max_queued", medians(able, size.rounds), {}, "us", 1e6)


def futures(size: Size) -> list[Result]:
    """No-op tasks through a `GroupExecutor`, against the standard library's."""
    able = {
        peer.NAME: functools.partial(peer.futures, size.tasks, WORKERS)
        for peer in contestants(size)
        if hasattr(peer, "futures")
    }
    return compared("futures", medians(able, size.rounds), {}, "us", 1e6)


def three(size: Size) -> list[Result]:
    """A group of three no-op tasks, from enter to exit, warm, against pools that are fresh."""
    able = {
        peer.NAME: functools.partial(peer.three, size.groups)
        for peer in contestants(size)
        if hasattr(peer, "three")
    }
    targets = {"ThreadPoolExecutor": 2.0, "ThreadPool": 20.0}
    return compared("three", medians(able, size.rounds), targets, "us", 1e6)


def first(size: Size) -> list[Result]:
    """The first group of a process: three tasks, what it imports not counted."""
    code = "from benchmarks.peers import {0}; print({0}.three(1))"
    able = {
        name: functools.partial(lambda peer: float(in_process(code.format(peer))), peer)
        for name, peer in {"fastpool": "ours", "ThreadPool": "threadpool"}.items()
    }
    return compared("first", medians(able, size.processes), {"ThreadPool": 1.0}, "us", 1e6)


def there_and_back(size: Size) -> list[Result]:
    """One task there and back in an open group: `submit(...).result()`."""
    able = {
        peer.NAME: functools.partial(peer.there_and_back, size.slow_tasks, WORKERS)
        for peer in contestants(size)
        if hasattr(peer, "there_and_back")
    }
    targets = {"ThreadPoolExecutor": 1.0}
    return compared("there and back", medians(able, size.rounds), targets, "us", 1e6)


def failure(size: Size) -> list[Result]:
    """From the failure to the caller's `except`: eight run, asleep on the token, others wait."""
    from benchmarks.peers import ours

    def delay(queued: int) -> float:
        run = Failing(queued, nap=60.0)
        ours.failing(run)
        return run.delay

    def measure(queued: int) -> Callable[[], float]:
        return lambda: delay(queued)

    taken = medians({f"{queued} queued": measure(queued) for queued in size.queued}, 5)
    results = [
        Result("failure", name, seconds * 1e3, 5.0, "ms", 5e-3 / seconds, 1.0)
        for name, seconds in taken.items()
    ]
    if len(taken) == 2:
        few, many = taken.values()
        results.append(
            Result("failure", "ten times as many", many * 1e3, few * 1e3, "ms", few / many, 0.5)
        )
    return results


def stopping(size: Size) -> list[Result]:
    """The same of everybody, 500 tasks queued, a sleeper takes a second where nothing wakes it."""
    results = []
    figures = {}
    for peer in contestants(size):
        run = Failing(500)
        peer.failing(run)
        figures[peer.NAME] = run
    ours = figures.pop("fastpool")
    for name, run in figures.items():
        results += [
            Result("until except", name, ours.delay * 1e3, run.delay * 1e3, "ms"),
            Result("late starts", name, ours.late, run.late, "tasks"),
            Result("still running", name, ours.still_running, run.still_running, "tasks"),
        ]
    return results


def memory(size: Size) -> list[Result]:
    """What a queued task takes."""
    release = threading.Event()
    count = 10_000

    def traced(queue: Callable[[], object]) -> float:
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        kept = queue()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del kept
        return (after - before) / count

    with TaskGroup(1) as group, ThreadPoolExecutor(1) as executor:
        group.submit(release.wait)
        executor.submit(release.wait)
        theirs = traced(lambda: [executor.submit(nothing) for _ in range(count)])
        submitted = traced(lambda: [group.submit(nothing) for _ in range(count)])
        mapped = traced(lambda: group.map(nothing, range(count)))
        release.set()
    return [
        Result("memory", "ThreadPoolExecutor", submitted, theirs, "B", theirs / submitted, 5.0),
        Result("memory", "ours, by map", mapped, theirs, "B", theirs / mapped),
    ]


def nanoseconds(call: Callable[[], object], size: Size) -> Callable[[], float]:
    number = size.tasks
    return lambda: timeit.timeit(call, number=number) / number


def check(size: Size) -> list[Result]:
    """`token.check()` in a task, against `Event.is_set()`."""

    def in_task() -> list[Result]:
        token, event = current_token(), threading.Event()
        able = {
            "fastpool": nanoseconds(token.check, size),
            "Event.is_set": nanoseconds(event.is_set, size),
        }
        return compared("check", medians(able, size.rounds), {"Event.is_set": 0.5}, "ns", 1e9)

    with TaskGroup(1) as group:
        return group.submit(in_task).result()


def register(size: Size) -> list[Result]:
    """Registering a callback and taking it back, against adding one to a future."""
    token = CancelToken()
    able = {
        "fastpool": nanoseconds(lambda: token.on_cancel(nothing).unregister(), size),
        "Future.add_done_callback": nanoseconds(lambda: Future().add_done_callback(nothing), size),
    }
    return compared("register", medians(able, size.rounds), {}, "ns", 1e9)


def direct_call(size: Size) -> list[Result]:
    """A direct call of a decorated function, against a bare closure around it."""

    def work(token: CancelToken) -> None:
        """Nothing."""

    def closure(fn: Callable[..., object]) -> Callable[..., object]:
        variable = contextvars.ContextVar("token", default=CancelToken.NEVER)

        @functools.wraps(fn)
        def call(*args: object, **kwargs: object) -> object:
            return fn(variable.get(), *args, **kwargs)

        return call

    able = {
        "fastpool": nanoseconds(cancellable(work), size),
        "closure": nanoseconds(closure(work), size),
    }
    return compared("direct call", medians(able, size.rounds), {"closure": 1 / 3}, "ns", 1e9)


def importing(size: Size) -> list[Result]:
    """`import fastpool`, against `import concurrent.futures.thread, wrapt`."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    able = {
        name: functools.partial(lambda module: float(in_process(code.format(module))), module)
        for name, module in {
            "fastpool": "fastpool",
            "wrapt and ThreadPool": "wrapt, multiprocessing.pool",
        }.items()
    }
    results = compared("import", medians(able, size.processes), {}, "ms", 1e3)
    unwanted = ["asyncio", "structlog", "rich", "numpy"]
    listed = in_process(
        f"import wrapt, sys; before = {{*sys.modules}}; import fastpool;"
        f"print(len({{*{unwanted}}} & ({{*sys.modules}} - before)))"
    )
    return [*results, Result("import", "heavy packages", float(listed), 0.0, "modules")]


def parts(size: Size) -> list[Result]:
    """What a submitted task pays for, each thing by itself."""
    variable = contextvars.ContextVar[object]("variable")

    def site() -> tuple[object, int]:
        caller = sys._getframe(1)
        return caller.f_code, caller.f_lasti

    def in_context() -> None:
        contextvars.copy_context().run(variable.set, object())

    def own_token() -> list[Result]:
        # Of a task each: its token is made when it is first asked for.
        def ask(_: int) -> float:
            start = clock()
            current_token()
            return clock() - start

        with TaskGroup(1) as inner:
            seconds = inner.map(ask, range(size.tasks)).results()
        return [
            Result("parts", "its token, asked for", statistics.median(seconds) * 1e9, None, "ns")
        ]

    release = threading.Event()
    with TaskGroup(1) as group:
        group.submit(release.wait)
        able = {
            "a call of nothing": nanoseconds(nothing, size),
            "the submit, with its handle": nanoseconds(lambda: group.submit(nothing), size),
            "of that, the place": nanoseconds(site, size),
            "a context of its own": nanoseconds(in_context, size),
        }
        taken = medians(able, size.rounds)
        group.cancel()
        release.set()
    figures = [Result("parts", name, taken[name] * 1e9, None, "ns") for name in able]
    return figures + own_token()


def observers(size: Size) -> list[Result]:
    """What a no-op task costs, by `submit` and `map`, with those who watch."""
    import structlog

    null = open(os.devnull, "w")  # noqa: SIM115 - closed below
    info, debug = (structlog.make_filtering_bound_logger(level) for level in ("info", "debug"))

    def logged(wrapper: type) -> Callable[[], None]:
        return lambda: structlog.configure(
            wrapper_class=wrapper,
            processors=[structlog.processors.JSONRenderer()],
            logger_factory=structlog.PrintLoggerFactory(null),
        )

    watched: dict[str, tuple[Callable[[], None], list[Callable[..., object]], int]] = {
        "nobody": (structlog.reset_defaults, [], size.tasks),
        "a function": (structlog.reset_defaults, [nothing], size.slow_tasks),
        "structlog, from info": (logged(info), [], size.slow_tasks),
        "structlog, all": (logged(debug), [], size.slow_tasks),
    }

    def cost(name: str, job: str) -> float:
        configure, watchers, tasks = watched[name]
        configure()
        try:
            with TaskGroup(WORKERS, observers=watchers) as group:
                start = clock()
                if job == "map":
                    group.map(nothing, range(tasks)).results()
                else:
                    for handle in [group.submit(nothing) for _ in range(tasks)]:
                        handle.result()
                return (clock() - start) / tasks
        finally:
            structlog.reset_defaults()

    able = {
        f"{job}, {name}": functools.partial(cost, name, job)
        for job in ("submit", "map")
        for name in watched
    }
    with null:
        taken = medians(able, size.rounds)
    return [Result("observers", name, taken[name] * 1e6, None, "us") for name in able]


def blocking(size: Size) -> list[Result]:
    """From the cancel until a blocked thread is out of its call, against waking it by hand."""
    results = []
    for name, operation in blocked.OPERATIONS.items():
        able = {
            "fastpool": functools.partial(blocked.by_token, operation),
            name: functools.partial(blocked.by_hand, operation),
        }
        try:
            # In turns, one call each: a burst of load would else meet only one of the two.
            taken = medians(able, WAKINGS * size.rounds, settle=0.0)
            # What ours does beyond that is to look for the registrations, and to raise.
            results += compared("blocking", taken, {name: 1 / 5}, "us", 1e6)
        except blocked.Missing as error:
            print(f"{name}: {error}", file=sys.stderr)
    return results


def leaving(size: Size) -> list[Result]:
    """The same of calls that nothing wakes by hand."""

    def once(setup: operations.Setup) -> float:
        # Late enough for what looks more and more rarely, and at any moment between two looks.
        after = random.uniform(0.15, 0.2)
        return blocked.cancelled(functools.partial(operations.alone, setup), after)

    results = []
    for name, setup in operations.OPERATIONS.items():
        try:
            seconds = medians({name: functools.partial(once, setup)}, 2 * size.rounds)[name]
        except blocked.Missing as error:
            print(f"{name}: {error}", file=sys.stderr)
        else:
            results.append(Result("leaving", name, seconds * 1e6, None, "us"))
    return results


def on_processes(size: Size) -> list[Result]:
    """Processes: no-op tasks and ones of a millisecond; a failure; the death of a worker."""
    found = processes.STANDARD.copy()
    for name in () if size is QUICK else processes.OTHERS:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            print(f"{name} is not installed", file=sys.stderr)
        else:
            found[name] = processes.OTHERS[name]
    targets = {"ProcessPoolExecutor": 30.0, "multiprocessing.Pool": 10.0}
    results: list[Result] = []

    def add(what: str, found: dict[str, float], unit: str, wanted: dict[str, float]) -> None:
        scale = {"us": 1e6, "ms": 1e3}.get(unit, 1.0)
        for result in compared("processes", found, wanted, unit, scale):
            # Counts are beside each other, not divided.
            ratio = None if scale == 1.0 else result.ratio
            results.append(replace(result, peer=f"{what}, {result.peer}", ratio=ratio))

    for what, job, wanted in (
        ("no-op", (nothing,), targets),
        ("1 ms", (processes.work, 0.001), {}),
    ):
        able = {
            name: functools.partial(
                processes.each,
                pool,
                size.tasks if what == "no-op" and name == "fastpool" else size.slow_tasks,
                2,
                *job,
            )
            for name, pool in found.items()
        }
        add(what, medians(able, size.rounds), "us", wanted)
    for what, deadly, limit in (("failure", False, 5e-3), ("death", True, 10e-3)):
        middle: dict[str, dict[str, float]] = {}
        for name, pool in found.items():
            # What waits for a pool that hangs, or for sleepers, takes seconds each time.
            rounds = 1 if size is QUICK and name != "fastpool" else size.rounds
            endings = [processes.ending(pool, 4, deadly=deadly) for _ in range(rounds)]
            for field in ("delay", "late", "cleaned", "recovered"):
                middle.setdefault(field, {})[name] = statistics.median(
                    getattr(one, field) for one in endings
                )
        add(what, {**middle["delay"], "limit": limit}, "ms", {"limit": 1.0})
        add(f"{what}: late starts", middle["late"], "tasks", {})
        add(f"{what}: finally run", middle["cleaned"], "of 3", {})
        add(f"{what}: next result", middle["recovered"], "ms", {})
    return results


ROWS: dict[str, Callable[[Size], list[Result]]] = {
    "submit": submit,
    "map": map_,
    "streams": streams,
    "max-queued": bounded,
    "futures": futures,
    "three": three,
    "first": first,
    "there-and-back": there_and_back,
    "failure": failure,
    "stopping": stopping,
    "memory": memory,
    "check": check,
    "register": register,
    "blocking": blocking,
    "leaving": leaving,
    "direct-call": direct_call,
    "import": importing,
    "parts": parts,
    "observers": observers,
    "processes": on_processes,
}
