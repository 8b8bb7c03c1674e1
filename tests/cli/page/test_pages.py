"""Pages as text: what is on them, in which order, how large they are, and that nothing in a name becomes markup."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape as html_text
from html.parser import HTMLParser
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite, tiny_config, write_checkpoint
from command_line import run_cli
from hybrid_shape import HybridShape

from trtllm_ct.cli.page.pages import inspection_page
from trtllm_ct.cli.page.written import PAGE_START
from trtllm_ct.pipeline.inspection import Inspection, inspect_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

MIXED = {"q_proj": "mxfp4a16", "o_proj": "fp8-block", "gate_proj": "int4-g128", "down_proj": "int8-g32"}
SIZES: dict[str, Any] = {"hidden": 512, "intermediate": 1024, "heads": 8, "kv_heads": 4, "layers": 3}


class Page(HTMLParser):
    """The texts of a page, its headings, its values by key, and the elements that are open at its end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.values: dict[str, int] = {}
        self.headings: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self._heading = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "data" and found.get("data-key"):
            self.values[found["data-key"] or ""] = int(found["value"] or "")
        self._heading = tag in {"h1", "h2"}
        if self._heading:
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._heading = self._heading and tag not in {"h1", "h2"}

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._heading:
            self.headings[-1] += data


def value_of(document: Any, key: str) -> Any:
    """The value in a document at a path such as `parts.0.modules`."""
    for part in key.split("."):
        document = document[int(part) if part.isdecimal() else part]
    return document


def leaves(document: Any, key: str) -> set[str]:
    """The paths of all numbers below a key of a document."""
    if isinstance(document, dict):
        return {leaf for name, value in document.items() for leaf in leaves(value, f"{key}.{name}")}
    if isinstance(document, list):
        return {leaf for at, value in enumerate(document) for leaf in leaves(value, f"{key}.{at}")}
    return {key} if isinstance(document, int) else set()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    return write_checkpoint(directory, config=tiny_config("Qwen3MoeForCausalLM", **SIZES), scheme=MIXED).directory


def test_numbers_are_those_of_the_document(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    document = run_cli("inspect", source, "--elsewhere", "--html", file, "--json").document

    page = Page(file.read_text(encoding="utf-8"))

    assert {key: value_of(document, key) for key in page.values} == page.values
    shown = {leaf for key in ("parts", "gpus", "elsewhere") for leaf in leaves(document[key], key)}
    # The SM, the sizes and the number of all modules are words of the row, or the same for all rows.
    aside = re.compile(r".*\.(tensor|gpu|sm|sms\.\d+|quantized)")
    assert {leaf for leaf in shown if not aside.fullmatch(leaf)} <= page.values.keys() | negative_rooms(document)
    assert {"stored_bytes", "delivered_bytes"} <= page.values.keys()


def negative_rooms(document: dict[str, Any]) -> set[str]:
    """Where weights don't fit, there are no tokens."""
    return {
        f"gpus.{at}.rooms.{index}.tokens"
        for at, row in enumerate(document["gpus"])
        for index, room in enumerate(row["rooms"])
        if (room["left"] or 0) < 0
    }


def test_the_verdict_comes_first_then_deviations_then_the_map(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    document = run_cli("inspect", source, "--elsewhere", "--html", file, "--json").document

    page = Page(file.read_text(encoding="utf-8"))

    assert page.headings == [
        f"{source} is {document['detection']['description']}",
        *("What to know first", "Modes of all modules", "Where the bytes are", "Per GPU", "Elsewhere", "Schemes"),
        "About this report",
    ]
    assert page.text.index(document["verdict"]) < page.text.index("What to know first")
    for scheme in document["schemes"]:
        assert scheme["mode"] != "dequantized" or scheme["reason"] in page.text
    for warning in (*document["warnings"], *(entry["note"] for entry in document["deviations"])):
        assert warning in page.text


def test_the_page_of_a_conversion(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    document = run_cli("convert", source, tmp_path / "out", "--html", file, "--json").document

    page = Page(file.read_text(encoding="utf-8"))

    assert document["verdict"] in page.text
    assert {key: value_of(document, key) for key in page.values} == page.values
    assert leaves(document["parts"], "parts") <= page.values.keys()
    assert {"What to know first", "Modes of all modules", "Per GPU", "Files"} <= set(page.headings)
    assert {f"gpus.{at}.weights" for at in range(4)} <= page.values.keys()
    assert document["gpus"] == run_cli("inspect", source, "--json").document["gpus"]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_page_of_a_verification(source: Path, tmp_path: Path, damaged: bool) -> None:
    file, out = tmp_path / "report.html", tmp_path / "out"
    run_cli("convert", source, out)
    if damaged:
        rewrite(out, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].view(torch.int16).add_(1))
    done = run_cli("verify", source, out, "--html", file, "--json")

    html = file.read_text(encoding="utf-8")
    page = Page(html)

    assert done.code == damaged
    assert ("It holds the weights of the source" in page.text) is not damaged
    assert html.count('aria-label="wrong"') == damaged
    assert len(re.findall(r"<td [^>]*data-k=", html)) == len(
        {
            re.sub(r"experts\.\d+", "experts", check["name"])
            for check in done.document["checks"]
            if ".layers." in check["name"]
        }
    )
    for fault in done.document["faults"]:
        assert fault["where"] in page.text
        assert fault["remedy"] in page.text


def test_a_verification_of_a_source_alone(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    run_cli("verify", source, "--html", file)

    assert "It is sound" in Page(file.read_text(encoding="utf-8")).text


LAYER = "model.layers.1.self_attn"


def change(tensors: dict[str, torch.Tensor]) -> None:
    """One module far away, one a little, one not comparable, one missing and one that the other lacks."""
    tensors[f"{LAYER}.q_proj.weight"][0] *= 3
    row = tensors[f"{LAYER}.o_proj.weight"][0]
    row[row.abs().argmin()] += row.abs().max() / 512
    tensors[f"{LAYER}.q_norm.weight"] = tensors[f"{LAYER}.q_norm.weight"][:-1].clone()
    del tensors[f"{LAYER}.k_norm.weight"]
    tensors[f"{LAYER}.other.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize("headers", [False, True])
def test_the_page_of_a_comparison(tmp_path: Path, *, headers: bool) -> None:
    file, directories = tmp_path / "report.html", [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        write_checkpoint(directory, config=tiny_config("Qwen3ForCausalLM", **SIZES), scheme="dense")
    rewrite(directories[1], change)

    done = run_cli("compare", *directories, "--html", file, "--json", *(["--headers"] if headers else []))

    html = file.read_text(encoding="utf-8")
    page = Page(html)
    assert done.code == 0
    assert done.document["verdict"] in page.text
    assert {key: value_of(done.document, key) for key in page.values} == page.values
    assert page.headings == [" and ".join(map(str, directories)), "Difference of each module", "Schemes"]
    cells = Counter(re.findall(r'<td class=e\d data-k="[^"]*" aria-label="([^"]*)"', html))
    assert sum(cells.values()) == len([module for module in done.document["modules"] if ".layers." in module["name"]])
    assert cells["in the first directory only"] == cells["in the second directory only"] == 1
    values = {"differs by more": 1, "differs by at most": 1, "the same values": 3 * 11 - 4, "can't be": 1}
    for start, count in ({"stored alike": 3 * 11 - 1} if headers else values).items():
        assert sum(number for label, number in cells.items() if html_text(label).startswith(start)) == count


def test_a_comparison_of_a_conversion_names_modes_of_both(source: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "report.html", tmp_path / "out"
    run_cli("convert", source, out)

    document = run_cli("compare", source, out, "--html", file, "--json").document

    text = Page(file.read_text(encoding="utf-8")).text
    for module in document["modules"]:
        assert module["first"] in text
        assert module["second"] in text


def test_problems_are_on_the_page(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", edit=lambda stored: stored.pop("model.norm.weight"))
    file = tmp_path / "report.html"

    done = run_cli("inspect", tmp_path / "in", "--html", file)

    page = Page(file.read_text(encoding="utf-8"))
    assert done.code == 1
    assert "model.norm.weight" in page.text
    assert page.headings[1:] == ["What to know first"]


def test_60_layers_of_128_experts_are_less_than_a_megabyte(tmp_path: Path) -> None:
    HybridShape().write(tmp_path)
    found = inspect_checkpoint(tmp_path, "dense")
    assert found.plan is not None
    assert len(found.plan.modules) > 60 * 128 * 3
    document = Inspection.to_dict(replace(found, checkpoint=None))

    html = inspection_page(found, document)

    assert len(html.encode()) < 1_000_000
    # Every module is in a cell, or in the table of those that are in no layer.
    cells = sum(int(count) for data in re.findall(r'data-k="([^"]*)"', html) for count in re.findall(r":(\d+)", data))
    assert cells == sum(".layers." in module.name for module in found.plan.modules)


def test_experts_of_several_modes_are_stripes_of_one_cell(tmp_path: Path) -> None:
    """As wide as their shares: an engine reads all experts of a layer in one mode, so that three are dequantized."""
    scheme = {f"model.layers.1.mlp.experts.{expert}.up_proj": "int8-channel" for expert in (0, 1, 2)}
    write_checkpoint(tmp_path / "in", config=tiny_config("Qwen3MoeForCausalLM", **SIZES), scheme=scheme)
    file = tmp_path / "report.html"
    run_cli("inspect", tmp_path / "in", "--html", file)

    html = file.read_text(encoding="utf-8")

    (cell,) = re.findall(r"<td style=[^>]*>.*?</td>", html)
    assert 'aria-label="3 dequantized, 1 plain"' in cell
    assert "var(--dq) 0% 75%,var(--pl) 75% 100%" in cell
    assert "<span>!·</span>" in cell
    assert [count for _, count in re.findall(r"(\d+):(\d+)", cell.split("data-k=")[1])] == ["3", "1"]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\n\x1b[31m'\""


def test_names_of_strangers_are_text(source: Path) -> None:
    found = inspect_checkpoint(source)
    assert found.plan is not None
    modules = [
        replace(module, name=module.name.replace("norm", HOSTILE), reason=module.reason and HOSTILE, note=HOSTILE)
        for module in found.plan.modules
    ]
    hostile = replace(found, plan=replace(found.plan, modules=tuple(modules)), noted=(HOSTILE,), checkpoint=None)

    html = inspection_page(hostile, hostile.to_dict())

    page = Page(html)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert "\x1b" not in html
    details = json.loads(html.split("id=details>")[1].split("</script>")[0])
    assert ["computed otherwise", HOSTILE] in [entry for entries in details for entry in entries]


def test_nothing_is_fetched(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    run_cli("inspect", source, "--html", file)

    html = file.read_text(encoding="utf-8")

    assert "default-src 'none'" in html
    assert set(re.findall(r"""(?:src|href)=["']?([^"' >]*)""", html)) == {"data:,", "#main"}
    assert "url(" not in html
    assert "@import" not in html


class TestFile:
    @pytest.mark.parametrize("command", ["inspect", "convert", "verify", "compare"])
    @pytest.mark.parametrize("name", ["nowhere/report.html", "folder"])
    def test_a_place_that_can_not_hold_it_is_wrong_usage(
        self, source: Path, tmp_path: Path, command: str, name: str
    ) -> None:
        """Before anything is done."""
        (tmp_path / "folder").mkdir()
        arguments = {"convert": [tmp_path / "out"], "compare": [source]}.get(command, [])

        done = run_cli(command, source, *arguments, "--html", tmp_path / name)

        assert (done.code, done.out) == (2, "")
        assert "--html" in done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]

    @pytest.mark.parametrize("command", ["inspect", "convert", "verify", "compare"])
    @pytest.mark.parametrize("content", ["", "weights", "<!doctype html>\n<html>a page of somebody else</html>"])
    def test_no_other_file_is_replaced(self, source: Path, tmp_path: Path, command: str, content: str) -> None:
        """Before anything is done."""
        file = tmp_path / "report.html"
        file.write_text(content)
        arguments = {"convert": [tmp_path / "out"], "compare": [source]}.get(command, [])

        done = run_cli(command, source, *arguments, "--html", file)

        assert (done.code, done.out) == (2, "")
        assert "an earlier page of trtllm-ct" in done.err_words
        assert file.read_text() == content
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize(
        ("command", "place"),
        [
            *[(command, "in/report.html") for command in ("inspect", "convert", "verify", "compare")],
            *[(command, "out/report.html") for command in ("convert", "verify", "compare")],
            ("inspect", "link/report.html"),
            ("convert", "new/../in/sub/report.html"),
        ],
    )
    def test_no_page_is_put_into_a_directory_of_the_command(
        self, source: Path, tmp_path: Path, command: str, place: str
    ) -> None:
        """Not in place of an earlier page either: no command leaves one there."""
        copytree(source, tmp_path / "in")
        (tmp_path / "link").symlink_to("in")
        for folder in ("new", "in/sub", "out"):
            (tmp_path / folder).mkdir()
        (tmp_path / place).write_text(PAGE_START)
        out = [] if command == "inspect" else [tmp_path / "out"]

        done = run_cli(command, tmp_path / "in", *out, "--html", tmp_path / place)

        assert (done.code, done.out) == (2, "")
        assert "apart from the directories" in done.err_words
        assert (tmp_path / place).read_text() == PAGE_START

    @pytest.mark.parametrize("out", ["out", "out/put"])
    def test_no_page_takes_the_place_of_the_output(self, source: Path, tmp_path: Path, out: str) -> None:
        done = run_cli("convert", source, tmp_path / out, "--html", tmp_path / "out")

        assert (done.code, list(tmp_path.iterdir())) == (2, [])

    def test_an_older_page_is_replaced_and_named_on_stderr(self, source: Path, tmp_path: Path) -> None:
        file = tmp_path / "report.html"
        file.write_text(PAGE_START + "old")

        done = run_cli("inspect", source, "--html", file)

        assert file.read_text().startswith("<!doctype html>")
        assert "old" not in file.read_text().splitlines()
        assert run_cli("inspect", source, "--html", file).code == 0
        assert done.err.strip() == f"Report: {file}"
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    def test_an_older_page_stays_if_the_new_one_can_not_be_written(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "report.html"
        file.write_text(PAGE_START + "old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", fail)

        done = run_cli("inspect", source, "--html", file)

        assert done.code == 1
        assert "No space left on device" in done.err
        assert file.read_text() == PAGE_START + "old"
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
