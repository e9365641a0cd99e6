"""
The Python blocks of the README and of the documentation, run as a reader would run them.
"""

import builtins
import dis
import types

import pytest
from pages import ROOT, run
from sybil import Document
from sybil.parsers.myst import PythonCodeBlockParser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_snippets_run(page, tmp_path, monkeypatch):
    """
    The blocks of a page run one after the other, in one namespace, in an empty folder.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # or a thread would outlive the page

    run(page)


def test_readme_opens_with_an_example():
    """
    The README has Python to run, so that its test does not pass for want of it.
    """
    document = Document.parse(str(ROOT / "README.md"), PythonCodeBlockParser())

    assert list(document)


def global_names(code):
    """The names that functions in the code look up when they run."""
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            for step in dis.get_instructions(const):
                if step.opname == "LOAD_GLOBAL":
                    yield step.argval
            yield from global_names(const)


def test_snippets_about_blocking_calls_stand_alone(tmp_path, monkeypatch):
    """
    Each has all of its imports, so it can be copied without the ones before.
    """
    monkeypatch.chdir(tmp_path)
    document = Document.parse(str(ROOT / "docs" / "blocking.md"), PythonCodeBlockParser())

    for example in document:
        namespace = {"__name__": "snippet"}
        code = compile(example.parsed, f"blocking.md, line {example.line}", "exec")
        exec(code, namespace)

        assert {*global_names(code)} <= {*namespace, *vars(builtins)}
