"""
Something happens at every point at which CPython can run a signal handler or a finalizer.

    python tests/points.py --what sigint --scenario submit [--every 10] [--only 17]

Each point is tried in a forked child of its own, which runs a scenario and looks at what is left.
A point is a function's entry, the return of a C function or a jump backwards, in fastpool,
`threading` or `multiprocessing.pool` (`sys.monitoring`, so Python 3.12 or newer). With `--moments`
a real SIGINT comes from outside instead, at so many moments spread over the scenario.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from multiprocessing import pool as stdlib_pool

import fastpool
from fastpool import CancelToken, TaskGroup, cancellable, current_token
from fastpool._gate import Gate

HANG = 60.0  # seconds after which a child is taken to hang
OURS = (os.path.dirname(fastpool.__file__),)
TARGETS = (*OURS, threading.__file__, stdlib_pool.__file__)

running: list[int] = []  # by thread
pools: list[stdlib_pool.ThreadPool] = []  # one of a user's own, in the scenario that has one
ready = threading.Event()


# --- Tasks ----------------------------------------------------------------------------------------


@cancellable
def sleeps(token: CancelToken, seconds: float = 0.02) -> None:
    running.append(threading.get_ident())
    try:
        ready.set()
        token.sleep(seconds)
    finally:
        running.pop()


def quick(item: int = 0) -> int:
    if threading.get_ident() == threading.main_thread().ident:
        return item  # there it may be torn
    running.append(threading.get_ident())
    try:
        return item
    finally:
        running.pop()


def asleep() -> bool:
    """Whether a task sleeps in one of our waits."""
    frames = sys._current_frames()
    return any(frames[one].f_code is Gate.wait.__code__ for one in list(running) if one in frames)


def inputs():
    yield from range(4)


@cancellable
def doubles(token: CancelToken, item: int) -> int:
    token.check()
    return quick(item) * 2


# --- Scenarios: what the main thread does ---------------------------------------------------------


def submit(group: TaskGroup) -> None:
    for item in range(3):
        group.submit(quick, item)
    group.submit(sleeps)


def map_(group: TaskGroup) -> None:
    group.map(quick, range(5))
    group.map(quick, inputs())
    group.starmap(quick, [(1,), (2,)])


def wait(group: TaskGroup) -> None:
    group.submit(sleeps)
    group.wait()


def result(group: TaskGroup) -> None:
    task = group.submit(sleeps)
    task.wait(0.001)
    task.result()
    task.exception()


def results(group: TaskGroup) -> None:
    batch = group.map(sleeps, [0.01, 0.02])
    batch.results()
    list(batch.as_completed())


def as_completed(group: TaskGroup) -> None:
    tasks = [group.submit(sleeps, seconds) for seconds in (0.02, 0.01)]
    for task in fastpool.as_completed(tasks):
        task.result()


def scopes(group: TaskGroup) -> None:
    with fastpool.timeout(5), fastpool.use_token(current_token()):
        group.submit(quick)
        fastpool.sleep(0.001)
        with fastpool.shield():
            fastpool.checkpoint()


def callbacks(group: TaskGroup) -> None:
    with group.token.on_cancel(quick):
        group.submit(quick)
    with group.token.interrupts(quick):
        group.submit(quick)
    group.token.child(timeout=30).wait(0.001)


def nested(group: TaskGroup) -> None:
    group.submit(quick)
    with TaskGroup(2) as inner:
        inner.submit(sleeps)
    group.submit(sleeps)


def direct(group: TaskGroup) -> None:
    group.submit(sleeps)
    doubles(1)
    doubles.with_token(group.token, 2)
    doubles.with_token(CancelToken(), 3)


def deadline(group: TaskGroup) -> None:
    with TaskGroup(1, timeout=60) as inner:
        inner.with_options(timeout=60).submit(sleeps)


def cancelling(group: TaskGroup) -> None:
    group.submit(sleeps, 60)
    while not (group.token.cancelled() or asleep()):
        time.sleep(0.001)
    with fastpool.shield():
        group.cancel("enough")
        group.wait()


def asking(group: TaskGroup) -> None:
    with fastpool.cancel_on_signals(group, signal.SIGTERM):
        group.submit(quick)
    fastpool.cancel_on_signals(group, signal.SIGTERM, signal.SIGINT)
    group.submit(sleeps)


def shared(group: TaskGroup) -> None:
    with TaskGroup(pool=pools[0]) as inner:
        inner.map(sleeps, [0.01, 0.01, 0.01])
        inner.submit(quick).result()


def bounded(group: TaskGroup) -> None:
    with TaskGroup(1, max_queued=1) as inner, as_before(inner):
        inner.submit(sleeps)
        for item in range(3):
            inner.submit(quick, item)
        inner.map(quick, range(3))
        inner.map(quick, inputs())


def imap(group: TaskGroup) -> None:
    list(group.imap(quick, range(4), window=2))
    with TaskGroup(1, max_queued=1) as inner, as_before(inner):
        inner.submit(sleeps)
        list(inner.imap(quick, range(4), window=3))
        list(inner.imap_unordered(doubles, inputs(), window=2))


@contextlib.contextmanager
def as_before(group: TaskGroup):
    """What a handler has raised in here is handled first: there is as much room as there was."""
    try:
        yield
    except Told:
        with contextlib.suppress(fastpool.Cancelled):  # the input was torn, which ends the group
            group.map(quick, range(3)).results()
        raise


def body(group: TaskGroup) -> None:
    group.submit(sleeps, 0.05)
    for _ in range(50):
        quick()


SCENARIOS = {
    fn.__name__.strip("_"): fn
    for fn in (
        submit,
        map_,
        wait,
        result,
        results,
        as_completed,
        scopes,
        callbacks,
        nested,
        direct,
        deadline,
        cancelling,
        asking,
        shared,
        bounded,
        imap,
        body,
    )
}


# --- Points ---------------------------------------------------------------------------------------


class Points:
    """Counts points, and does something at one of them."""

    def __init__(
        self,
        at: int | None,
        act,
        targets,
        *,
        everywhere: bool,
        again: int | None = None,
        beyond: tuple[str, ...] = (),
    ) -> None:
        self.at = at
        self.again = again  # so many points later it happens once more
        self.act = act
        # The functions out of which Python lets nothing pass. Nor do we get to do anything if it
        # is the very entry of an `__exit__` that is torn.
        self.beyond = beyond
        self.targets = targets
        self.everywhere = everywhere  # in all threads, or in the main one
        self.count = 0
        self.place = ""
        self.acting = False

    def start(self) -> None:
        monitoring = sys.monitoring
        events = monitoring.events
        self.tool = monitoring.DEBUGGER_ID
        monitoring.use_tool_id(self.tool, "points")
        monitoring.register_callback(self.tool, events.PY_START, self.on_start)
        monitoring.register_callback(self.tool, events.CALL, self.on_call)
        monitoring.register_callback(self.tool, events.C_RETURN, self.on_return)
        monitoring.register_callback(self.tool, events.JUMP, self.on_jump)
        monitoring.set_events(self.tool, events.PY_START | events.CALL | events.JUMP)

    def stop(self) -> None:
        sys.monitoring.set_events(self.tool, 0)

    def on_start(self, code, offset):
        if self.beyond and code.co_name == "__exit__":
            return sys.monitoring.DISABLE
        return self.point(code, offset)

    def on_call(self, code, offset, called, first):
        return None if code.co_filename.startswith(self.targets) else sys.monitoring.DISABLE

    def on_return(self, code, offset, called, first):
        if code.co_filename.startswith(self.targets):
            self.point(code, offset)

    def on_jump(self, code, offset, to):
        if to < offset:
            return self.point(code, offset)
        return None

    def point(self, code, offset):
        if not code.co_filename.startswith(self.targets) or code.co_name in self.beyond:
            return sys.monitoring.DISABLE
        if self.acting or not (
            self.everywhere or threading.get_ident() == threading.main_thread().ident
        ):
            return None
        self.count += 1
        if self.count == self.at or (self.at and self.again and self.count == self.at + self.again):
            line = next((n for start, end, n in code.co_lines() if start <= offset < end), None)
            self.place = f"{os.path.basename(code.co_filename)}:{line} in {code.co_qualname}"
            self.acting = True
            try:
                self.act()
            finally:
                self.acting = False
        return None


class Told(TimeoutError):
    """What a signal handler of somebody else's raises; that of SIGALRM, say."""


# --- One try --------------------------------------------------------------------------------------


class Try:
    """What a child does: a scenario with something happening at one point, then a look around."""

    def __init__(self, what: str, scenario: str, at: int | None) -> None:
        self.what = what.partition("+")[0]
        if scenario == "shared":
            pools.append(stdlib_pool.ThreadPool(2))
        self.scenario = SCENARIOS[scenario]
        self.token = CancelToken()
        self.registration = self.token.on_cancel(quick)
        self.group = TaskGroup(2, name="tried", token=self.token)
        what, _, again = what.partition("+")
        self.twice = bool(again)
        act = getattr(self, what.removesuffix("-del").replace("-", "_"))
        if what.endswith("-del"):
            acting = act
            act = lambda: _Finalizer(acting)  # noqa: E731
        elif what != "sigint":
            signal.signal(signal.SIGUSR1, lambda *_: acting_in_handler())
            acting_in_handler = act
            act = lambda: signal.raise_signal(signal.SIGUSR1)  # noqa: E731
        self.points = Points(
            at,
            act,
            OURS if what in ("submit-del", "block-del", "told") else TARGETS,
            everywhere=what.endswith("-del"),
            again=int(again) if again else None,
            beyond=("_forget", "__del__") if what == "told" else (),
        )

    def sigint(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def told(self) -> None:
        raise Told

    def token_cancel(self) -> None:
        self.token.cancel()

    def group_cancel(self) -> None:
        self.group.cancel()

    def submit(self) -> None:
        with contextlib.suppress(fastpool.GroupClosedError, fastpool.Cancelled):
            self.group.submit(quick)

    def block(self) -> None:
        with contextlib.suppress(fastpool.Cancelled), TaskGroup(1) as group:
            group.submit(quick)

    def unregister(self) -> None:
        self.registration.unregister()

    def run(self) -> str:
        """What went wrong; nothing, if nothing did."""
        raised: BaseException | None = None
        escaped = 0
        try:
            self.points.start()
            try:
                with self.group as group:
                    self.scenario(group)
            finally:
                self.points.stop()
                escaped = len(running)
        except BaseException as error:
            raised = error
        return self.judge(raised, escaped)

    def judge(self, raised: BaseException | None, escaped: int) -> str:
        if escaped and not self.twice:  # the second time, nobody waits
            return f"escaped: {escaped} still running"
        asked = {"sigint": KeyboardInterrupt, "told": Told}.get(self.what)
        if asked is not None:
            reached = self.points.at is None or self.points.count >= self.points.at
            if reached and self.points.at is not None and raised is None:
                return "lost"
            if raised is not None and type(raised) is not asked:
                return "replaced: " + "".join(traceback.format_exception(raised))
        elif raised is not None and not isinstance(
            raised, (fastpool.Cancelled, fastpool.TaskCancelledError, fastpool.GroupClosedError)
        ):
            return "wrong: " + "".join(traceback.format_exception(raised))
        return look_around()


class _Finalizer:
    def __init__(self, act) -> None:
        self.act = act

    def __del__(self) -> None:
        self.act()


def look_around() -> str:
    """What is not as it was before."""
    from fastpool import _guard, _marks, _taskgroup

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return f"handler left: {signal.getsignal(signal.SIGINT)}"

    def left() -> bool:
        guard = _guard._guard
        wards = any(guard.wards.values())
        return bool(wards or guard.heard or _marks.held or _taskgroup._open_runs)

    until = time.monotonic() + 30
    while left() and time.monotonic() < until:  # a finalizer in another thread may be at it still
        time.sleep(0.001)
    if left():
        return "state left"
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return "handler of SIGTERM left"
    if current_token() is not CancelToken.NEVER:
        return "token left"
    for pool in pools:
        if pool.map(quick, [1, 2]) != [1, 2]:
            return "pool broken"
        pool.close()
        pool.join()
    with TaskGroup(2) as group:
        if group.map(doubles, range(4)).results() != [0, 2, 4, 6]:
            return "broken: wrong results"
    with contextlib.suppress(ValueError), TaskGroup(2) as group:
        group.submit(int, "no number")
        group.submit(sleeps, 60)
    fastpool.shutdown()
    until = time.monotonic() + 8  # less than idle threads wait: those would be a leak
    while len(threading.enumerate()) > 1 and time.monotonic() < until:
        time.sleep(0.001)
    if len(threading.enumerate()) > 1:
        return f"leak: {threading.enumerate()}"
    return ""


def in_child(fn, meanwhile=None) -> tuple[str, str]:
    """What a function returns in a forked child, and how it ended: "", "hang" or a crash."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Otherwise the pools' semaphores have names, and a child that just ends leaves them.
            multiprocessing.set_start_method("fork", force=True)
            text = fn()
        except BaseException:
            text = "crash: " + traceback.format_exc()
        os.write(writer, text.encode()[-60_000:])
        os._exit(0)
    os.close(writer)
    if meanwhile is not None:
        meanwhile(child)
    text = b""
    until = time.monotonic() + HANG
    ended = ""
    while True:
        if not select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
            ended = "hang"
            os.kill(child, signal.SIGKILL)
            break
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        text += chunk
    os.close(reader)
    os.waitpid(child, 0)
    return text.decode(), ended


def try_moment(scenario: str, after: float) -> str:
    """What goes wrong when a real SIGINT comes so many seconds after the scenario has begun."""
    reader, writer = os.pipe()

    def trying() -> str:
        attempt = Try("sigint", scenario, None)
        raised, escaped = None, 0
        try:
            os.write(writer, b"go")
            try:
                with attempt.group as group:
                    attempt.scenario(group)
            finally:
                escaped = len(running)
            # It comes after the end, and is Python's own then. One that comes between Python's last
            # look and a sleep does not end that.
            for _ in range(600):
                time.sleep(0.1)
            return "never heard"
        except BaseException as error:
            raised = error
        attempt.points.at = 0
        return attempt.judge(raised, escaped)

    def killer(child: int) -> None:
        os.read(reader, 2)
        time.sleep(after)
        os.kill(child, signal.SIGINT)

    trouble, ended = in_child(trying, killer)
    os.close(reader)
    os.close(writer)
    return ended or trouble


def try_moments(scenario: str, moments: int) -> tuple[int, list[str]]:
    """How many moments were tried, and what went wrong at which."""
    bad = []
    for moment in range(moments):
        after = 0.06 * moment / moments  # seconds; the longest scenario takes about that
        trouble = try_moment(scenario, after)
        if trouble:
            bad.append(f"sigint in {scenario} after {after * 1e3:.2f} ms: {trouble}")
    return moments, bad


def count_points(what: str, scenario: str) -> int:
    def counting() -> str:
        attempt = Try(what, scenario, None)
        trouble = attempt.run()
        return trouble or str(attempt.points.count)

    text, ended = in_child(counting)
    if ended or not text.isdecimal():
        raise RuntimeError(f"{scenario} fails by itself: {ended} {text}")
    return int(text)


def try_point(what: str, scenario: str, at: int) -> tuple[str, str]:
    """What went wrong at a point, nothing if nothing did, and where that is."""

    def trying() -> str:
        attempt = Try(what, scenario, at)
        trouble = attempt.run()
        return f"{attempt.points.place}\n{trouble}"

    text, ended = in_child(trying)
    place, _, trouble = text.partition("\n")
    return ended or trouble, place


def try_all(what: str, scenario: str, every: int = 1, first: int = 1) -> tuple[int, list[str]]:
    """How many points were tried, and what went wrong at which."""
    bad = []
    tried = 0
    # Threads come when they come, so a run may have a few points more.
    for at in range(first, int(count_points(what, scenario) * 1.05) + 1, every):
        trouble, place = try_point(what, scenario, at)
        tried += 1
        if trouble:
            bad.append(f"{what} in {scenario} at {at}, {place}: {trouble}")
    return tried, bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--what",
        default="sigint",
        help="sigint; sigint+5: again five points later; told: an exception that somebody else's"
        " signal handler raises, in our own code only; token-cancel, group-cancel or unregister,"
        " from a signal handler, with -del from a finalizer; submit-del and block-del in our own"
        " code only, since threading has locks that no finalizer may meet",
    )
    parser.add_argument("--scenario", choices=[*SCENARIOS, "all"], default="all")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", type=int)
    parser.add_argument("--moments", type=int)
    options = parser.parse_args()
    worst = Counter()
    for scenario in SCENARIOS if options.scenario == "all" else [options.scenario]:
        if options.only:
            print(*try_point(options.what, scenario, options.only), sep="\n")
            continue
        start = time.monotonic()
        if options.moments:
            tried, bad = try_moments(scenario, options.moments)
        else:
            tried, bad = try_all(options.what, scenario, options.every)
        worst.update(bad=len(bad), tried=tried)
        print(
            f"{scenario}: {len(bad)} bad of {tried}, {time.monotonic() - start:.0f} s", flush=True
        )
        for line in bad[:20]:
            print("   ", line, flush=True)
    print(dict(worst))
    return bool(worst["bad"])


if __name__ == "__main__":
    sys.exit(main())
