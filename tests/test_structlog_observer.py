"""
The log: what structlog writes of a group, when it does, and what never gets into it.
"""

import contextlib
import json
import logging
import subprocess
import sys
import threading
import types
import warnings

import pytest
import structlog
from staging import fail, sleeper, until
from structlog.contextvars import bind_contextvars, merge_contextvars

from fastpool import TaskGroup
from fastpool._text import plain
from fastpool.structlog_observer import StructlogObserver


def into(lines):
    """Processors that put each line, with its level and what the context has, into a list."""

    def keep(logger, method, line):
        lines.append({"level": method, **line})
        raise structlog.DropEvent

    return [merge_contextvars, keep]


@pytest.fixture
def lines():
    """What is logged, with structlog configured."""
    found = []
    structlog.configure(processors=into(found))
    return found


def run_script(source):
    """Run a program in a fresh interpreter."""
    ended = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


# --- When ----------------------------------------------------------------------------------------


def test_structlog_is_not_imported():
    """
    Neither by the package, nor by this module, nor by a group.
    """
    ended = run_script(
        """
import sys
import fastpool, fastpool.structlog_observer
with fastpool.TaskGroup() as group:
    group.submit(pow, 2, 3)
print("structlog" in sys.modules)
"""
    )

    assert ended.stdout == "False\n"


def test_nothing_is_logged_unless_structlog_is_configured():
    """
    Imported alone, it would print to standard output, which may be a program's data.
    """
    ended = run_script(
        """
import structlog
from fastpool import TaskGroup
with TaskGroup() as group:
    group.submit(pow, 2, 3)
"""
    )

    assert (ended.stdout, ended.stderr) == ("", "")


def test_configured_structlog_logs_every_group():
    """
    By itself: a program changes nothing but its configuration.
    """
    ended = run_script(
        """
import structlog
from fastpool import TaskGroup
structlog.configure(processors=[structlog.processors.JSONRenderer()])
with TaskGroup(1, name="powers") as group:
    group.submit(pow, 2, 3)
"""
    )

    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["event"] for line in lines] == [
        "fastpool.group_opened",
        "fastpool.task_submitted",
        "fastpool.task_started",
        "fastpool.task_succeeded",
        "fastpool.group_closed",
    ]
    assert {line["group"] for line in lines} == {"powers"}


@pytest.mark.parametrize("half", [types.ModuleType("structlog"), None])
def test_structlog_that_is_only_being_imported_is_not_in_use(monkeypatch, lines, half):
    """
    Another thread has begun to import it, or the import has been blocked.
    """
    monkeypatch.setitem(sys.modules, "structlog", half)

    with TaskGroup() as group:
        assert group.submit(pow, 2, 3).result() == 8

    assert lines == []


def test_group_logs_as_was_configured_when_it_was_entered(lines):
    """
    Configuring, and taking it back, counts from the next group on.
    """
    structlog.reset_defaults()
    with TaskGroup(name="first"):
        structlog.configure(processors=into(lines))
    with TaskGroup(name="second"):
        structlog.reset_defaults()
    with TaskGroup(name="third"):
        pass

    assert [line["group"] for line in lines] == ["second", "second"]


def test_logger_is_bound_once_for_each_group():
    """
    Tasks do not pay for making a logger.
    """
    made = []

    def make(*args):
        made.append(args)
        return structlog.PrintLogger()

    structlog.configure(processors=into([]), logger_factory=make)
    for _ in range(3):
        with TaskGroup() as group:
            group.map(pow, range(10), [2] * 10)

    assert made == [("fastpool",)] * 3


# --- What ----------------------------------------------------------------------------------------


def test_lines_of_a_task_that_succeeds(lines):
    """
    Names of the group, the task and the thread; a duration at an end; nothing else.
    """
    with TaskGroup(1, name="powers") as group:
        group.submit(pow, 2, 3)
    durations = [line.pop("duration_s", None) for line in lines]

    here, there = threading.current_thread().name, "fastpool-powers-1"
    assert lines == [
        {"event": f"fastpool.{name}", "level": level, "group": "powers", **more}
        for name, level, more in (
            ("group_opened", "info", {"worker": here}),
            ("task_submitted", "debug", {"task": "pow", "worker": here}),
            ("task_started", "debug", {"task": "pow", "worker": there}),
            ("task_succeeded", "debug", {"task": "pow", "worker": there}),
            ("group_closed", "info", {"worker": here}),
        )
    ]
    assert durations[:3] == [None] * 3
    assert all(type(duration) is float and duration >= 0 for duration in durations[3:])


def test_failure_is_a_warning_and_names_the_class_alone(lines):
    """
    Neither the text of an error nor an argument is logged.
    """

    class BadHeader(ValueError):
        pass

    secret = "hunter2"
    with pytest.raises(BadHeader), TaskGroup(1, name="fetch") as group:
        group.submit(fail, BadHeader(secret))

    told = {line["event"]: line for line in lines}
    for name in ("fastpool.task_failed", "fastpool.group_closed"):
        assert told[name]["level"] == "warning"
        assert told[name]["error"] == BadHeader.__qualname__
    assert told["fastpool.group_cancelled"]["level"] == "info"
    assert secret not in repr(lines)


def test_failure_of_the_body_is_a_warning(lines):
    """
    No task tells of it.
    """
    with pytest.raises(ValueError, match="root"), TaskGroup():
        raise ValueError("root")

    assert [(line["event"], line["level"], line.get("error")) for line in lines] == [
        ("fastpool.group_opened", "info", None),
        ("fastpool.group_cancelled", "info", None),
        ("fastpool.group_closed", "warning", "ValueError"),
    ]


def test_cancelled_and_stuck_tasks_have_lines(lines):
    """
    To be cancelled is no warning; to be stuck is one.
    """
    started = threading.Event()

    def stubborn():
        until(lambda: "fastpool.task_stuck" in [line["event"] for line in lines], within=30)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with TaskGroup(2, grace=0.0) as group:
            group.submit(sleeper, started)
            stuck = group.submit(stubborn)
            group.submit(pow, 2, 3)
            started.wait(timeout=60)
            until(stuck.running)
            group.cancel()

    told = {(line["event"], line.get("task")): line for line in lines}
    assert told["fastpool.task_stuck", "stubborn"]["level"] == "warning"
    assert told["fastpool.task_cancelled", "sleeper"]["error"] == "Cancelled"
    assert told["fastpool.task_cancelled", "sleeper"]["level"] == "debug"
    assert "error" not in told["fastpool.task_cancelled", "pow"]
    assert told["fastpool.group_closed", None]["level"] == "info"


def test_group_that_ends_with_the_one_around_it_is_no_warning(lines):
    """
    The failure that ended both is one already.
    """

    def inside():
        with TaskGroup(name="inner") as inner:
            inner.submit(sleeper, started)

    started = threading.Event()
    with pytest.raises(ValueError, match="root"), TaskGroup(2, name="outer") as group:
        group.submit(inside)
        started.wait(timeout=60)
        raise ValueError("root")

    closed = {line["group"]: line for line in lines if line["event"] == "fastpool.group_closed"}
    assert (closed["inner"]["level"], closed["inner"]["error"]) == ("info", "Cancelled")
    assert (closed["outer"]["level"], closed["outer"]["error"]) == ("warning", "ValueError")


def test_names_are_stripped_of_control_characters(lines):
    """
    A name cannot forge a line, nor colour a terminal; the thread's has the group's in it.
    """
    with TaskGroup(1, name="a\nb\x1b[31m") as group:
        group.with_options(name="c\r\x9bd\u2028e").submit(pow, 2, 3)

    started = next(line for line in lines if line["event"] == "fastpool.task_started")
    assert started["group"] == "ab[31m"
    assert started["task"] == "cde"
    assert started["worker"] == "fastpool-ab[31m-1"


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("resize[3]", "resize[3]"),
        ("größe 大きさ 👩\u200d🔧\u00a0x", "größe 大きさ 👩\u200d🔧\u00a0x"),
        ("a\x00b\tc\x7fd\x85e\u2029f", "abcdef"),
        ("user\u202egpj.exe\u2066", "usergpj.exe"),
        ("caf\udce9", "caf"),
        ("", ""),
    ],
)
def test_plain_name(name, stripped):
    """
    Only what would break a line, turn it round, or not be encoded is taken out.
    """
    assert plain(name) == stripped
    plain(name).encode()


# --- The context ---------------------------------------------------------------------------------


def test_lines_bear_what_was_bound_where_the_task_was_submitted(lines):
    """
    In every line of the task, whatever thread it comes from, and of no other.
    """
    started, release = threading.Event(), threading.Event()

    def fails():
        release.wait(timeout=60)
        raise ValueError("root")

    def binds():
        bind_contextvars(request="of the task's own")
        return structlog.contextvars.get_contextvars()["request"]

    bind_contextvars(request="entry")
    with pytest.raises(ValueError, match="root"), TaskGroup(2) as group:
        bind_contextvars(request="good")
        assert group.submit(binds).result() == "of the task's own"
        bind_contextvars(request="mapped")
        group.map(abs, [1, 2]).wait()
        bind_contextvars(request="cut short")
        group.submit(sleeper, started)
        started.wait(timeout=60)
        bind_contextvars(request="bad")
        failing = group.submit(fails)
        until(failing.running)
        bind_contextvars(request="never")
        group.submit(pow, 2, 3).cancel()
        release.set()

    found = {}
    for line in lines:
        found.setdefault((line.get("task"), line["request"]), []).append(line["event"])
    submitted, began = "fastpool.task_submitted", "fastpool.task_started"
    assert found.pop((None, "entry")) == ["fastpool.group_opened", "fastpool.group_cancelled"]
    assert found.pop((None, "never")) == ["fastpool.group_closed"]
    assert found == {
        ("binds", "good"): [submitted, began, "fastpool.task_succeeded"],
        ("abs[0]", "mapped"): [submitted, began, "fastpool.task_succeeded"],
        ("abs[1]", "mapped"): [submitted, began, "fastpool.task_succeeded"],
        ("sleeper", "cut short"): [submitted, began, "fastpool.task_cancelled"],
        ("pow", "never"): [submitted, "fastpool.task_cancelled"],
        ("fails", "bad"): [submitted, began, "fastpool.task_failed"],
    }


# --- Handed in -----------------------------------------------------------------------------------


def logger_into(lines):
    return structlog.wrap_logger(structlog.PrintLogger(), processors=into(lines))


def test_observer_that_is_handed_in_logs_by_its_own_logger(lines):
    """
    Instead of the one that a group has by itself, and without that.
    """
    own = []

    with TaskGroup(observers=[StructlogObserver(logger_into(own))]) as group:
        group.submit(pow, 2, 3)
    structlog.reset_defaults()
    with TaskGroup(observers=[StructlogObserver(logger_into(own))]) as group:
        group.submit(pow, 2, 3)

    assert lines == []
    assert len(own) == 10


def test_observer_that_is_handed_in_serves_many_groups():
    """
    Each line bears the group's name, also where something else calls the observer.
    """
    own = []
    observer = StructlogObserver(logger_into(own).bind(app="shop"))

    def inside():
        with TaskGroup(name="inner", observers=[lambda event: observer(event)]):
            pass

    with TaskGroup(name="outer", observers=[observer]) as group:
        group.submit(inside)

    opened = [line for line in own if line["event"] == "fastpool.group_opened"]
    assert [(line["group"], line["app"]) for line in opened] == [
        ("outer", "shop"),
        ("inner", "shop"),
    ]
    assert len(own) == 7


def test_structlog_may_be_configured_after_the_observer_was_made():
    """
    A module may have one before the program has configured anything.
    """
    own = []
    observer = StructlogObserver(structlog.get_logger())
    structlog.configure(processors=into(own))

    with TaskGroup(observers=[observer]):
        pass

    assert len(own) == 2


@pytest.mark.parametrize("logger", [None, 42, "fastpool", StructlogObserver])
def test_what_is_no_logger_is_refused(logger):
    """
    The message says what to write.
    """
    with pytest.raises(TypeError, match=r"write StructlogObserver\(structlog.get_logger\(\)\)"):
        StructlogObserver(logger)


# --- Whatever the configuration ------------------------------------------------------------------


def test_level_decides_which_lines_are_written():
    """
    At the level of most programs a group that fares well has two.
    """
    found = []
    structlog.configure(
        processors=into(found), wrapper_class=structlog.make_filtering_bound_logger("info")
    )

    with TaskGroup() as group:
        group.submit(pow, 2, 3)

    assert [line["event"] for line in found] == ["fastpool.group_opened", "fastpool.group_closed"]


def test_lines_go_through_the_standard_library(caplog):
    """
    To the logger `fastpool`.
    """
    caplog.set_level(logging.INFO)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )

    with TaskGroup(name="powers") as group:
        group.submit(pow, 2, 3)

    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("fastpool", "INFO", "fastpool.group_opened"),
        ("fastpool", "INFO", "fastpool.group_closed"),
    ]
    assert {record.group for record in caplog.records} == {"powers"}


def test_lines_can_be_captured():
    """
    As the tests of an application do.
    """
    with structlog.testing.capture_logs() as captured, TaskGroup() as group:
        group.submit(pow, 2, 3)

    assert [line["event"] for line in captured][-2:] == [
        "fastpool.task_succeeded",
        "fastpool.group_closed",
    ]


def test_logger_of_any_kind_will_do():
    """
    One that takes every attribute for a level, behind a wrapper that knows none.
    """
    factory = structlog.testing.CapturingLoggerFactory()
    structlog.configure(processors=[], wrapper_class=structlog.BoundLogger, logger_factory=factory)

    with TaskGroup():
        pass

    assert [call.method_name for call in factory.logger.calls] == ["info", "info"]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_broken_processor_changes_nothing(kind, unraised):
    """
    Its errors go to the hook; the group has its values, and its failures.
    """

    def broken(logger, method, line):
        raise kind(line["event"])

    structlog.configure(processors=[broken])
    with TaskGroup() as group:
        assert group.submit(pow, 2, 3).result() == 8
    told = len(unraised)
    with pytest.raises(ZeroDivisionError), TaskGroup() as group:
        group.submit(divmod, 1, 0)

    assert told == 5
    assert {type(error) for error in unraised} == {kind}


def test_broken_configuration_changes_nothing(unraised):
    """
    No logger can be made: the group goes on without, and the other observers with it.
    """

    def broken(*args):
        raise ValueError("no such file")

    seen = []
    structlog.configure(logger_factory=broken)
    with TaskGroup(observers=[seen.append]) as group:
        assert group.submit(pow, 2, 3).result() == 8

    assert [str(error) for error in unraised] == ["no such file"]
    assert len(seen) == 5


def test_log_is_written_beside_other_observers(lines):
    """
    They see the same events.
    """
    seen = []
    with contextlib.suppress(ValueError), TaskGroup(observers=[seen.append]) as group:
        group.map(fail, [ValueError("root")] * 5)

    assert sorted(line["event"] for line in lines) == sorted(
        f"fastpool.{event.name}" for event in seen
    )
