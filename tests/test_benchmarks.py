"""
The benchmarks print what they measure, and say what is missed; figures are not looked at here.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import services

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT))
from benchmarks import __main__ as table  # noqa: E402 - the folder is no package of ours
from benchmarks import blocked, operations, rows  # noqa: E402
from benchmarks.curves import slope  # noqa: E402
from benchmarks.rows import QUICK, ROWS, Result  # noqa: E402

sys.path.remove(str(ROOT))


@pytest.mark.parametrize("row", ["failure", "memory", "check", "observers", "processes"])
def test_one_row_is_measured_and_written(row, tmp_path):
    """
    The table has it, and the file has it with the very figures.
    """
    file = tmp_path / "figures.json"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", row, "--json", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert file.exists(), ended.stderr
    results = [Result(**figures) for figures in json.loads(file.read_text())["results"]]

    assert results
    assert all(table.line(result) in ended.stdout for result in results)
    assert {result.row for result in results} == {row}
    assert all(result.ours > 0 or result.unit == "tasks" for result in results)


@pytest.mark.parametrize(
    "name",
    [name for name in operations.OPERATIONS if "psycopg" not in name],  # whose server stays
)
@pytest.mark.usefixtures("no_descriptor_is_left")
def test_blocked_operation_is_left_at_a_cancel(name):
    """
    Each ends within seconds, and what it has needed is put away.
    """
    operation = functools.partial(operations.alone, operations.OPERATIONS[name])

    # Late enough for the handshakes, of which Python before 3.13 leaves sockets unclosed.
    shakes_hands = sys.version_info < (3, 13) and "TLS" in name
    try:
        seconds = blocked.cancelled(operation, 5 if shakes_hands else 0.3)
    except blocked.Missing as error:
        services.missing(error)

    assert 0 < seconds < 30


@pytest.mark.parametrize(
    ("row", "module"), [("blocking", blocked), ("leaving", operations)], ids=["blocking", "leaving"]
)
def test_missing_server_is_said_and_is_no_failure(row, module, monkeypatch, capsys):
    """
    The other operations of the row are measured.
    """

    def absent(*_):
        raise blocked.Missing("not measured (there is no server)")

    there = blocked.get if row == "blocking" else operations.put
    monkeypatch.setattr(module, "OPERATIONS", {"absent": absent, "there": there})
    monkeypatch.setattr(rows, "WAKINGS", 1)

    assert [result.row for result in ROWS[row](QUICK)] == [row]
    assert "absent: not measured (there is no server)" in capsys.readouterr().err


def test_server_that_cannot_be_started_is_missing(monkeypatch):
    """
    For the reason that the tests have, which skip then.
    """
    monkeypatch.setattr(blocked.from_tests("services"), "program", lambda name: None)

    with pytest.raises(blocked.Missing, match="there is no Redis server"):
        blocked.server("redis")


def test_unknown_row_is_refused():
    """
    The message names those there are.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "speed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert ended.returncode == 2
    assert all(row in ended.stderr for row in ROWS)


@pytest.mark.parametrize(
    ("ratio", "met", "possible"), [(4.0, True, True), (3.9, False, True), (1.9, False, False)]
)
def test_miss_is_marked_and_half_a_target_cannot_be_noise(ratio, met, possible):
    """
    The table marks what is missed; the quick form fails only below half the target.
    """
    result = Result("submit", "ThreadPool", 2.0, 2.0 * ratio, "us", ratio, 4.0)

    assert result.met is met
    assert ("missed" in table.line(result)) is not met
    assert table.possible(result) is possible


def test_quick_form_fails_on_what_noise_cannot_explain(monkeypatch, capsys):
    """
    Its exit code says so, and the row and the ratio are named.
    """
    bad = Result("submit", "ThreadPool", 2.0, 2.0, "us", 1.0, 4.0)
    monkeypatch.setattr(table, "ROWS", {"submit": lambda size: [bad] if size is QUICK else []})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick"])
    code = table.main()
    said = capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks"])

    assert code == 1
    assert "submit against ThreadPool: 1.00" in said
    assert table.main() == 0


def test_quick_form_measures_again_before_it_fails(monkeypatch, capsys):
    """
    What a busy machine did once is no failure; the figures that count are the last ones.
    """
    bad = Result("submit", "ThreadPool", 2.0, 2.0, "us", 1.0, 4.0)
    good = Result("submit", "ThreadPool", 2.0, 9.0, "us", 4.5, 4.0)
    figures = iter([bad, bad, good])
    monkeypatch.setattr(table, "ROWS", {"submit": lambda size: [next(figures)]})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick"])
    code = table.main()
    said = capsys.readouterr().out

    assert code == 0
    assert said.count("measured again") == 2
    assert table.line(good) in said
    assert table.line(bad) not in said


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slope_is_the_power(power):
    """
    What grows with the square has the slope 2, with logarithmic axes.
    """
    assert slope({n: 3.0 * n**power for n in (1, 10, 1000)}) == pytest.approx(power)
