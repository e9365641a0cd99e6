"""
How Sphinx builds the documentation; see the environment `docs` in tox.ini.
"""

import sys
from importlib.metadata import version as installed_version

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

project = "fastpool"
author = "the fastpool authors"
project_copyright = "2026, the fastpool authors"
version = release = installed_version("fastpool")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Docstrings quote names and values in single backticks, as the Markdown pages do.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = ["Threads", "Source"]
# A "Returns" section is prose; the type is in the signature, and a colon does not name one.
napoleon_use_rtype = False

_PACKAGES = {"httpx", "requests", "structlog", "urllib3", "websockets", "wrapt"}

# What is not ours would be found only in inventories on the network, which the build does
# without; of our own, type variables and classes with an underscore have no entry.
# Everything else must resolve.
_not_ours = "|".join(sorted(sys.stdlib_module_names | _PACKAGES))
nitpick_ignore_regex = [
    ("py:.*", rf"({_not_ours})\..+"),
    ("py:.*", r"(fastpool\.([a-z_]+\.)*)?_?[A-Z][0-9]?(\.args|\.kwargs)?"),
    ("py:.*", r"fastpool\.([a-z_]+\.)*_[A-Z]\w*"),
    # What only the library makes is in signatures that nobody calls.
    ("py:.*", r"fastpool\.(blocking\.)?_[a-z]+\.\w+"),
    ("py:.*", r"Callback|Context|FrameType|Lane|Options|R_co|Run|Ts"),
    # Those of other packages, by the names that their signatures have for them.
    ("py:.*", r"_TYPE_[A-Z]+|BaseHTTPS?Connection|Retry|Url"),
    ("py:.*", r"fastpool\.blocking\.with_urllib3\.HTTPS?Connection"),
    # An alias of a tuple is cut at its commas.
    ("py:.*", r"tuple\[.*"),
]

html_theme = "furo"
html_title = "fastpool"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve_as_exported)


def resolve_as_exported(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """
    Find a class that an annotation places in a private module under its public name.
    """
    module, _, name = node["reftarget"].rpartition(".")
    if not module.startswith("fastpool._"):
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], f"fastpool.{name}", node, text
    )
