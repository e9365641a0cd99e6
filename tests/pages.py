"""
The pages of the documentation, run as a reader would run them.
"""

from pathlib import Path

from sybil import Document
from sybil.parsers.myst import DocTestDirectiveParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parent.parent


def run(page):
    """Run the blocks of a page one after the other; gives the namespace that they leave."""
    document = Document.parse(
        str(page), PythonCodeBlockParser(), DocTestDirectiveParser(), SkipParser()
    )
    for example in document:
        example.evaluate()
    return document.namespace
