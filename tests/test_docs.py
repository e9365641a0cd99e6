"""
The Python blocks of the README and of the documentation, run as a reader would run them.
"""

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

    run(page)


def test_readme_opens_with_an_example():
    """
    The README has Python to run, so that its test does not pass for want of it.
    """
    document = Document.parse(str(ROOT / "README.md"), PythonCodeBlockParser())

    assert list(document)
