"""Pages in a real browser: nothing on the console, no request, keys, pointer, colours, print and names for readers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from browser import Browser
from builders import rewrite, tiny_config, write_checkpoint
from command_line import run_cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.browser

KINDS = ("inspect", "convert", "verify", "fault", "compare")
SCHEMES = {"q_proj": "mxfp4a16", "o_proj": "fp8-block", "gate_proj": "int4-g128", "down_proj": "int8-g32"}
# One expert is plain beside dequantized ones: their cell is striped.
SCHEMES["model.layers.1.mlp.experts.0.gate_proj"] = "dense"

# Texts whose colour differs too little from what is behind them: WCAG 2.2, success criterion 1.4.3.
LOW_CONTRAST = """(() => {
  const light = (channel) => (channel /= 255) <= 0.03928 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = numbers(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || getComputedStyle(node).backgroundImage !== "none") continue;
    const style = getComputedStyle(node);
    const [one, other] = [luminance(numbers(style.color)), luminance(behind(node))].sort((a, b) => b - a);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < (large ? 3 : 4.5)) found.push(`${node.tagName}.${node.className} ${node.textContent}: ${ratio}`);
  }
  return [...new Set(found)];
})()"""
FOCUSED = "(() => { const c = document.activeElement; return [c.parentElement.rowIndex, c.cellIndex]; })()"
PANEL = "(() => { const p = document.getElementById('detail'); return p.hidden ? '' : p.innerText; })()"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A page of each kind with the document of the same run."""
    work = tmp_path_factory.mktemp("pages")
    sizes: dict[str, Any] = {"hidden": 512, "intermediate": 1024, "heads": 8, "kv_heads": 4, "layers": 3}
    # The first layer has no experts, so that layers differ.
    config = tiny_config("Qwen3MoeForCausalLM", **sizes, mlp_only_layers=[0])
    source = write_checkpoint(work / "in", config=config, scheme=SCHEMES).directory
    out = work / "out"

    def run(kind: str, *arguments: object) -> tuple[Path, dict[str, Any]]:
        file = work / f"{kind}.html"
        return file, run_cli(*arguments, "--html", file, "--json").document

    made = {
        "inspect": run("inspect", "inspect", source, "--elsewhere", "--to", "reference"),
        "convert": run("convert", "convert", source, out),
        "verify": run("verify", "verify", source, out),
        "compare": run("compare", "compare", source, out),
    }
    rewrite(out, lambda tensors: tensors["model.layers.1.self_attn.k_norm.weight"].neg_())
    made["fault"] = run("fault", "verify", source, out)
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_on_the_console_and_nothing_is_requested(
    browser: Browser, pages: dict[str, Any], kind: str, scheme: str
) -> None:
    page = pages[kind][0]

    browser.open(page, scheme=scheme)
    browser.run("document.querySelector('td[data-k]').focus()")

    assert browser.messages == []
    assert browser.requests == [page.as_uri()]
    assert browser.run("document.title")


def test_the_console_and_requests_are_watched(browser: Browser, tmp_path: Path) -> None:
    """A page that does all of this is noticed."""
    page = tmp_path / "page.html"
    page.write_text("<script>console.log('said'); fetch('http://127.0.0.1:9/'); undefined.x;</script><img src=x.png>")

    browser.open(page)

    assert any("said" in message for message in browser.messages)
    assert any("TypeError" in message for message in browser.messages)
    assert "http://127.0.0.1:9/" in browser.requests


def test_a_script_of_a_stranger_does_not_run(browser: Browser, pages: dict[str, Any], tmp_path: Path) -> None:
    """Even if a text were not escaped, the policy of the page would stop it, and any request."""
    page = tmp_path / "page.html"
    stranger = (
        "<script>document.title='stolen'</script><img src='http://127.0.0.1:9/' onerror=\"document.title='stolen'\">"
    )
    page.write_text(pages["inspect"][0].read_text(encoding="utf-8").replace("<h1>", f"{stranger}<h1>"))

    browser.open(page)

    assert browser.run("document.title") != "stolen"
    assert any("Content Security Policy" in message for message in browser.messages)


@pytest.mark.parametrize("kind", ["inspect", "convert", "compare"])
def test_shown_numbers_are_those_of_the_document(browser: Browser, pages: dict[str, Any], kind: str) -> None:
    page, document = pages[kind]
    browser.open(page)

    values = browser.run(
        "[...document.querySelectorAll('data[data-key]')].map((d) => [d.dataset.key, Number(d.value)])"
    )

    assert len(values) > (1 if kind == "compare" else 10)
    for key, value in values:
        found: Any = document
        for part in key.split("."):
            found = found[int(part) if part.isdecimal() else part]
        assert found == value, key


def test_keys_move_in_a_map_and_show_what_is_known(browser: Browser, pages: dict[str, Any]) -> None:
    page, document = pages["inspect"]
    browser.open(page)
    first = browser.run("(() => { const c = document.querySelector('td[data-k]'); c.focus(); return c.cellIndex; })()")
    rows = browser.run("document.querySelector('table.map').tBodies[0].rows.length")

    assert browser.run(FOCUSED) == [1, first]
    for key, place in (("ArrowRight", [1, first + 1]), ("ArrowDown", [2, first + 1]), ("ArrowLeft", [2, first])):
        browser.press(key)
        assert browser.run(FOCUSED) == place
    browser.press("ArrowLeft")
    assert browser.run(FOCUSED) == [2, first], "the first column is the end"
    for _ in range(rows + 1):
        browser.press("ArrowDown")
    assert browser.run(FOCUSED) == [rows, first]
    browser.press("End")
    row, column = browser.run(FOCUSED)
    header = browser.run(f"document.querySelector('table.map').tHead.rows[0].cells[{column}].innerText")
    shown = browser.run(PANEL)
    name = f"model.layers.{row - 1}.{header}"
    assert shown.startswith(name)
    modes = {module["name"]: module for module in document["modules"]}
    module = modes[name.replace("*", "0")]
    assert module["mode"] in shown
    assert f"{module['stored_bytes']:,} on disk" in shown
    browser.press("Home")
    assert browser.run(FOCUSED) == [row, first]


def test_layers_without_a_module_are_skipped(browser: Browser, pages: dict[str, Any]) -> None:
    """The first layer is dense, the others have experts."""
    browser.open(pages["inspect"][0])
    browser.run("[...document.querySelectorAll('table.map tbody tr:nth-child(2) td[data-k]')].at(-1).focus()")
    before = browser.run(FOCUSED)

    browser.press("ArrowUp")

    assert browser.run(FOCUSED) == before
    assert browser.run("document.querySelectorAll('td.no').length") > 0


def test_one_stop_of_the_tab_key_is_enough_for_a_map(browser: Browser, pages: dict[str, Any]) -> None:
    browser.open(pages["inspect"][0])

    assert browser.run("document.querySelectorAll('table.map td[tabindex=\"0\"]').length") == 1
    for _ in range(3):
        browser.press("Tab")
        if browser.run("document.activeElement.matches('td[data-k]')"):
            break
    assert browser.run("document.activeElement.matches('td[data-k]')")
    browser.press("ArrowRight")
    assert browser.run("document.querySelectorAll('table.map td[tabindex=\"0\"]').length") == 1


def test_the_pointer_shows_the_same_as_the_focus(browser: Browser, pages: dict[str, Any]) -> None:
    browser.open(pages["inspect"][0])
    assert browser.run(PANEL) == ""
    x, y = browser.run(
        "(() => { const c = document.querySelectorAll('td[data-k]')[3]; c.scrollIntoView({block: 'center'});"
        "const r = c.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )

    browser.point(x, y)
    pointed = browser.run(PANEL)
    browser.point(1, 1)
    assert browser.run(PANEL) == ""
    browser.run("document.querySelectorAll('td[data-k]')[3].focus()")

    assert pointed == browser.run(PANEL)
    assert pointed


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_texts_can_be_read_in_light_and_dark(
    browser: Browser, pages: dict[str, Any], kind: str, scheme: str
) -> None:
    browser.open(pages[kind][0], scheme=scheme)
    browser.run("document.querySelector('td[data-k]').focus()")

    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128) is (scheme == "light")
    assert browser.run(LOW_CONTRAST) == []
    assert bool(browser.run("document.querySelectorAll('td[style]').length")) is (kind in {"inspect", "convert"})


@pytest.mark.parametrize("kind", KINDS)
def test_paper_is_white_and_has_no_panel(browser: Browser, pages: dict[str, Any], kind: str) -> None:
    browser.open(pages[kind][0], scheme="dark", media="print", width=794)
    browser.run("document.querySelector('td[data-k]').focus()")

    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.getElementById('detail')).display") == "none"
    assert browser.run(LOW_CONTRAST) == []
    assert browser.run("document.documentElement.scrollWidth") <= 794, "a sheet does not scroll"
    assert browser.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_no_page_is_wider_than_the_window(browser: Browser, pages: dict[str, Any], kind: str, width: int) -> None:
    """Wide tables scroll by themselves."""
    browser.open(pages[kind][0], width=width)

    assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("kind", KINDS)
def test_screen_readers_get_names_of_sections_tables_and_cells(
    browser: Browser, pages: dict[str, Any], kind: str
) -> None:
    browser.open(pages[kind][0])

    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in browser.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]

    for role in ("heading", "region", "table", "grid", "gridcell", "rowheader", "columnheader"):
        names = [name for found, name in nodes if found == role]
        assert names, role
        assert all(names) or role == "gridcell", role
    named = browser.run("[...document.querySelectorAll('td[data-k]')].every((cell) => cell.ariaLabel)")
    assert named
    assert browser.run("document.documentElement.lang") == "en"
