"""
What is explained of small faults that no test minds is true of the source as it is.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib

import mutation
import pytest

EXPLAINED = tomllib.loads(mutation.SURVIVORS.read_text())
NAMES = [name for reason in EXPLAINED.values() for name in reason["survivors"]]
NAME = re.compile(r"(?P<module>\S+) (?P<place>[\w.]+): (?P<before>.+?)  ->  .*")


def plain(text):
    """The code of a text, on one line."""
    return " ".join(line.partition("  # ")[0].strip() for line in text.splitlines())


def test_each_is_explained_once():
    """
    With the reason why.
    """
    assert len(set(NAMES)) == len(NAMES)
    assert all(reason["why"] for reason in EXPLAINED.values())


@pytest.mark.parametrize("module", mutation.MODULES)
def test_what_they_change_is_there(module):
    """
    In the function that they name; another one may need another reason.
    """
    source = mutation.source(module)
    lines = source.splitlines()
    places = {}
    for line, (place, _) in mutation.places_of(source).items():
        places.setdefault(place, []).append(line)

    for name in NAMES:
        found = NAME.fullmatch(name)
        assert found, name
        if found["module"] == module:
            place = places.get(found["place"])
            assert place, name
            text = plain("\n".join(lines[line - 1] for line in sorted(place)))
            assert found["before"] in text, name


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came with Python 3.12")
def test_record_knows_the_lines_of_each_test_here_and_in_worker_processes(tmp_path):
    """
    Also of one that is over in less than a step of the system's clock.
    """
    tests = [
        "tests/test_worker.py::test_call_has_a_token_of_its_own",
        "tests/test_worker.py::test_tokens_are_read_in_messages_alone",
        "tests/test_processes.py::test_task_that_computes_lets_the_thread_in_that_brings_a_cancel",
    ]
    outside = {name: of for name, of in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, mutation.__file__, "record", tmp_path / "record", *tests]
    subprocess.run(command, env=outside, check=True, capture_output=True, timeout=300)
    lines = json.loads((tmp_path / "record").read_text())["lines"]

    assert sorted(lines) == sorted(tests)
    for test in tests:
        assert len(lines[test]["backends/_worker.py"]) > 20


def test_mutant_is_judged_by_the_tests_that_run_its_statement():
    """
    The quickest first, and none that is too slow, with one case of each before all of them; or by
    those of the function, if none runs it.
    """
    source = textwrap.dedent("""
        def f(x):
            if x:
                return (
                    1
                )
            return 2
    """)
    place, lines = mutation.places_of(source)[5]
    mutant = mutation.Mutant("m f: 1  ->  2", "m.py", lines, source)
    tests = {
        "test_a.py::slow": (2.0, {"m.py": {4}}),
        "test_a.py::quick": (0.1, {"m.py": {3, 4}}),
        "test_b.py::other": (0.2, {"m.py": {3, 7}}),
        "test_b.py::endless": (mutation.SLOW + 1, {"m.py": {4}}),
        "test_c.py::of[one]": (3.0, {"m.py": {4}}),
        "test_c.py::of[other]": (4.0, {"m.py": {4}}),
    }
    without = {name: (took, {"m.py": {3}}) for name, (took, _) in tests.items()}

    assert place == "f"
    assert mutation.tests_of(mutant, tests, 1)[0] == ["test_a.py::quick"]
    each, most = mutation.tests_of(mutant, tests, 1)[2:]
    assert each == ["test_a.py::quick", "test_a.py::slow", "test_c.py::of[one]"]
    assert most == [*each, "test_c.py::of[other]"]
    assert len(mutation.tests_of(mutant, without, 1)[-1]) == 5


def test_mutant_of_what_a_class_says_is_judged_by_the_tests_of_its_functions():
    """
    The statement itself is run as the module is imported, by whichever test comes first.
    """
    source = textwrap.dedent("""
        class Node:
            if True:
                slots = ()

            def f(self):
                return 1
    """)
    place, lines = mutation.places_of(source)[4]
    mutant = mutation.Mutant("m Node: ()  ->  None", "m.py", lines, source)
    tests = {
        "test_a.py::imports": (0.1, {"m.py": {2, 3, 4, 6}}),
        "test_a.py::calls": (0.2, {"m.py": {7}}),
        "test_b.py::other": (0.2, {"m.py": {9}}),
    }

    assert place == "Node"
    assert mutation.tests_of(mutant, tests, 1)[-1] == ["test_a.py::imports", "test_a.py::calls"]


def test_program_is_the_same_however_it_is_written():
    """
    So what changes nothing is no mutant.
    """
    assert mutation.program("x = 1 + y  # so") == mutation.program("\nx = (1 + y)")
    assert mutation.program("x = 1 + y") != mutation.program("x = 1 - y")
    assert mutation.program("x = ") is None
