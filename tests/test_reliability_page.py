"""
The page on reliability: the tests that it names are there.
"""

import ast
import os
import re
import subprocess
import sys

import pytest
from mutants import MUTANTS
from pages import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)


def names_in(file):
    """The names of its tests, in classes too."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    found = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
    return {name for name in found if name.startswith("test_")}


def models():
    """The names of the models that threads meet in, and are run in many orders."""
    tree = ast.parse((ROOT / "tests" / "test_interleavings.py").read_text())
    return {
        each.name
        for each in ast.walk(tree)
        if isinstance(each, ast.FunctionDef)
        for decorator in each.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", None) == "model"
    }


def test_catalogue_has_each_of_its_faults():
    """
    Ninety-two, numbered from one.
    """
    assert [int(number) for number, *_ in ROWS] == list(range(1, 93))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_fault_has_its_tests_or_a_reason(row):
    """
    Each test, or model, is named with its file; a line without one says that it is not tested,
    and why.
    """
    _, fault, does, shown = row
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", shown)

    assert fault.strip()
    assert does.strip()
    assert named or shown.startswith(("Not tested: ", "The whole suite, "))
    for file, name in named:
        if file == "test_interleavings.py" and not name.startswith("test_"):
            assert name in models(), f"there is no model {name}"
        else:
            assert name in names_in(file), f"{file} has no {name}"


def test_table_of_models_has_them_all():
    """
    Each that there is, and no other.
    """
    _, _, table = PAGE.partition("| what meets | models |")
    table, _, _ = table.partition("\n\n")

    named = re.findall(r"`(\w+_\w+)`", table)
    assert sorted(named) == sorted(models())


def test_page_counts_the_faults_that_models_find():
    """
    All, those that are found in every run, and the rare ones.
    """
    (said,) = re.findall(
        r"(\d+) small faults, .* (\d+) within the same 400 orders and (\d+) rare ones", PAGE
    )
    rare = [mutant.rare for mutant in MUTANTS]

    assert tuple(map(int, said)) == (len(rare), rare.count(False), rare.count(True))


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
@pytest.mark.parametrize(
    ("pythons", "names", "code", "said"),
    [
        ("py311 py312", ["mutants", "py312"], 1, ""),
        ("py311 py312", ["mutants", "py310"], 2, "there is no py310; choose from: py311 py312 mut"),
        ("py311 py312", ["mutant"], 2, "there is no mutant; choose from: py311 py312 mutants"),
        ("py311 py312", ["py311 py312"], 2, "; choose from: py311 py312 mutants"),
        ("py311 py312", [""], 2, "; choose from: py311 py312 mutants"),
        ("", [], 2, "there is no Python to run it on"),
    ],
)
def test_deep_checks_refuse_what_there_is_not(tmp_path, pythons, names, code, said):
    """
    They would run nothing, and pass. The Pythons here cannot be installed, which is found next.
    """
    lines = "".join(f"{name}\\t/bin/false\\n" for name in pythons.split())
    fake = tmp_path / "python3"
    fake.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    fake.chmod(0o755)

    ended = subprocess.run(
        ["bash", ROOT / ".ci" / "deep", *names],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == code
    assert said in ended.stderr
    assert "Passed" not in ended.stdout


def test_tests_that_the_page_names_are_there():
    """
    Those of its other tables as well, and the files.
    """
    files = {path.name: names_in(path.name) for path in (ROOT / "tests").glob("test_*.py")}
    every = set().union(*files.values())

    assert set(re.findall(r"\btest_\w+\.py\b", PAGE)) <= set(files)
    assert set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE)) <= every
