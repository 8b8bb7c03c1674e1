"""mkdocs.yml and docs/api.md name what there is, and docs/check_site.py finds what a site must not have.

`make site` builds the site itself, which needs packages that the suite does not.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import trtllm_ct

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PUBLIC = [name for name in trtllm_ct.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def check_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_site", DOCS / "check_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site(folder: Path, names: list[str], **files: str) -> dict[str, str]:
    """A site whose page of the API describes these names, with other files beside it; the settings that a hook gets."""
    entry = '<h3 id="trtllm_ct.{0}">{0}</h3><div class="doc doc-contents "><p>What {0} does.</p></div>'
    (folder / "api.html").write_text("\n".join(entry.format(name) for name in names), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return {"site_dir": str(folder)}


def test_the_navigation_has_every_page_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)) == sorted(
        page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")
    )


def test_the_page_of_the_api_has_every_public_name_once() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: trtllm_ct\.(\w+)$", page, re.MULTILINE)) == sorted(PUBLIC)


def test_the_names_that_a_site_must_describe_are_the_public_ones(check_site: ModuleType) -> None:
    assert check_site.public_names() == PUBLIC


def test_a_site_may_link_to_other_hosts(check_site: ModuleType, tmp_path: Path) -> None:
    page = '<link rel="stylesheet" href="a.css"><a href="https://example.org/">there</a><script src="a.js"></script>'
    check_site.on_post_build(site(tmp_path, PUBLIC, index_html=page, a_css="a { background: url(a.svg) }"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("index_html", '<link rel="stylesheet" href="https://example.org/a.css">'),
        ("index_html", "<script defer src=//example.org/a.js></script>"),
        ("index_html", '<img alt="a" src="http://example.org/a.png">'),
        ("a_css", "@import 'https://example.org/b.css';"),
        ("a_css", '@font-face { src: url("//example.org/a.woff2") }'),
    ],
)
def test_a_site_may_not_load_from_other_hosts(check_site: ModuleType, tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"(index\.html|a\.css) loads .*//example\.org/"):
        check_site.on_post_build(site(tmp_path, PUBLIC, **{name: text}))


@pytest.mark.parametrize("missing", ["entry", "text"])
def test_a_site_describes_every_public_name(check_site: ModuleType, tmp_path: Path, missing: str) -> None:
    settings = site(tmp_path, PUBLIC if missing == "text" else PUBLIC[1:])
    if missing == "text":
        page = tmp_path / "api.html"
        page.write_text(page.read_text("utf-8").replace(f"<p>What {PUBLIC[0]} does.</p>", ""), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^api.html does not describe {PUBLIC[0]}$"):
        check_site.on_post_build(settings)
