"""`page_of`: a body in the template, with the style and the script of the page. Nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from trtllm_ct.base.version import __version__
from trtllm_ct.cli.page.markup import text
from trtllm_ct.cli.page.written import PAGE_START

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["page_of"]


def page_of(title: str, body: str, details: Sequence[object]) -> str:
    """Return a page with this title and body; `details` are what the script shows of a cell of a map, by its number.

    The policy of the page allows this script alone, and no request, so that a name in a checkpoint can start neither.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # In a script element, only `</` could end it.
    data = json.dumps(details, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_asset("page.html")).substitute(
        start=PAGE_START,
        title=text(title),
        style=_asset("page.css"),
        script=script,
        digest=digest,
        body=body,
        details=data,
        version=text(__version__),
    )


def _asset(name: str) -> str:
    return (resources.files("trtllm_ct") / "cli" / "page" / "assets" / name).read_text(encoding="utf-8")
