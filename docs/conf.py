"""How `make docs` builds the site: Sphinx over the Markdown that is read on any forge as well.

The source folder is the repository's root, so that links between its pages and those in docs/ hold in both places.
"""

from __future__ import annotations

import re
from typing import Any

import flashtile

project = "flashtile"
author = "the flashtile authors"
project_copyright = "the flashtile authors, Apache-2.0"
release = version = flashtile.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md"]
# folders that hold no page are not even listed
exclude_patterns = [".*", "build", "dist", "flashtile*", "tests", "benchmarks", "examples", "compat"]

# headings are linked by the names that forges give them
myst_heading_anchors = 4

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "flashtile"
html_copy_source = False
html_show_sphinx = False


def as_markup(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: stars are stars, and what a call returns may have several names, which become a list."""
    lines[:] = [line.replace("*", r"\*") if "``" not in line else line for line in lines]
    if "Returns:" not in lines:
        return
    start = lines.index("Returns:") + 1
    end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    if not re.match(r"    \w+: ", lines[start]):
        return
    listed = [re.sub(r"^    (\w+): ", r"* **\1**: ", line) if re.match(r"    \w", line) else line[6:] for line in lines[start:end]]
    lines[start - 1 : end] = [".. rubric:: Returns", "", *listed]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_markup, priority=100)
