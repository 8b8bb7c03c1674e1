"""What mkdocs runs after it wrote the site: a page that loads anything from elsewhere ends the build with an error.

So does a public name of the package that the page of the Python API does not describe.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE = Path(__file__).resolve().parent.parent / "trtllm_ct" / "__init__.py"

LOADED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")
STYLE = re.compile(r"(?:@import\s*|url\()[\s\"']*((?:https?:)?//[^\s\"')]+)")
HEADING = re.compile(r'(?=<h[2-4][^>]* id=")')
ENTRY = re.compile(r'<h3[^>]* id="trtllm_ct\.(\w+)"[\s\S]*doc-contents[\s\S]*<p>')
"""A name and its own text, which ends at the next heading."""


def on_post_build(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` with all faults of the pages in `site_dir`."""
    site = Path(config["site_dir"])
    faults = [*loaded_from_elsewhere(site), *undescribed((site / "api.html").read_text(encoding="utf-8"))]
    if faults:
        raise ValueError("\n".join(faults))


def loaded_from_elsewhere(site: Path) -> list[str]:
    """Return what pages and styles would fetch from other hosts when they are shown; links are not fetched."""
    patterns = {".html": LOADED, ".css": STYLE}
    files = (path for path in sorted(site.rglob("*")) if path.suffix in patterns)
    return [
        f"{path.relative_to(site)} loads {address}"
        for path in files
        for address in patterns[path.suffix].findall(path.read_text(encoding="utf-8"))
    ]


def undescribed(page: str) -> list[str]:
    """Return the names of `trtllm_ct.__all__` that have no text on the page."""
    described = {found[1] for part in HEADING.split(page) if (found := ENTRY.match(part))}
    return [f"api.html does not describe {name}" for name in public_names() if name not in described]


def public_names() -> list[str]:
    """Return `trtllm_ct.__all__` from the source, as the package is not installed where the site is built."""
    tree = ast.parse(PACKAGE.read_text(encoding="utf-8"))
    stated = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return [name for name in ast.literal_eval(next(stated)) if not name.startswith("__")]
