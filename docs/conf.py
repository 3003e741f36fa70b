"""The documentation site: `make docs` builds it into build/site, and a warning is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref

ROOT = Path(__file__).resolve().parents[1]
(version,) = re.findall(
    r"^__version__ = \"(.+)\"", (ROOT / "usp" / "_version.py").read_text(), re.M
)

project, language = "usp", "en"
extensions = ["myst_parser", "sphinx.ext.napoleon", "autoapi.extension"]
exclude_patterns = ["conf.py"]

html_theme = "furo"  # loads nothing from elsewhere
html_title = f"usp {version}"
html_use_index = html_domain_indices = html_copy_source = html_show_sourcelink = (
    html_show_copyright
) = False

html_static_path, html_css_files = ["static"], ["site.css"]

myst_heading_anchors = 4  # links to headings as on GitHub
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "returns_style")]

# The API is read and never run: astroid needs no torch.
autoapi_dirs = [str(ROOT / "usp")]
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
autoapi_ignore = [
    f"*/usp/{room}/*" for room in ("bench", "cli", "demo", "kernels", "machine", "ops")
]
# of modules that are no page; check_site.py looks whether every public name was found
suppress_warnings = ["autoapi.python_import_resolution"]
autoapi_options = ["members", "show-inheritance", "imported-members"]

PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


def repository_links(app: Any, doctree: Any) -> None:
    """Links that are right in the repository: to a file that is included here, and to no page."""
    for node in list(doctree.findall(pending_xref)):
        if node.get("reftype") != "myst" or node.get("refdomain") == "doc":
            continue
        for folder in (ROOT, ROOT / "docs"):
            file = (folder / node["reftarget"]).resolve()
            if not (file.is_relative_to(ROOT) and file.exists()):
                continue
            page = PAGES.get(file.relative_to(ROOT).as_posix())
            if page is None:
                node.replace_self(node.children)
            else:
                node.update_all_atts({"refdomain": "doc", "reftarget": page}, replace=True)
                node["reftargetid"] = None
            break


def unnamed_pages(app: Any, docname: str, source: list[str]) -> None:
    """A page that no list in index.md names stands under More."""
    if docname == "index":
        named = {"index", *re.findall(r"^([\w/]+)$", source[0], re.MULTILINE)}
        rest = "\n".join(sorted(app.project.docnames - named))
        if rest:
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: More\n\n{rest}\n```\n"


def setup(app: Any) -> None:
    app.connect("source-read", unnamed_pages)
    app.connect("doctree-read", repository_links)
