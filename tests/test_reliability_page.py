"""
The page on reliability: the tests that it names are there.
"""

import ast
import re

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


def test_tests_that_the_page_names_are_there():
    """
    Those of its other tables as well, and the files.
    """
    files = {path.name: names_in(path.name) for path in (ROOT / "tests").glob("test_*.py")}
    every = set().union(*files.values())

    assert set(re.findall(r"\btest_\w+\.py\b", PAGE)) <= set(files)
    assert set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE)) <= every
