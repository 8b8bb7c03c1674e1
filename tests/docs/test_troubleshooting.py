"""docs/troubleshooting.md shows what the commands print: each case is a checkpoint or a machine with something wrong.

With TRTLLM_CT_WRITE_DOCS set (`make docs`) the page is written anew instead of compared.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import rewrite, rewrite_config, write_checkpoint
from command_line import run_cli

import trtllm_ct
from trtllm_ct.checkpoint import file_calls

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
WRITE = "TRTLLM_CT_WRITE_DOCS"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2685800\n"
O_PROJ = "model.layers.1.self_attn.o_proj"

Damage = Callable[[Path], object]
"""Spoils the working folder, in which `DIR` is a good checkpoint."""


def config(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: rewrite_config(folder / "DIR", change)


def weights_of_config(**changes: object) -> Damage:
    return config(lambda entry: entry["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: rewrite(folder / "DIR", change)


def another(change: Damage | None = None, **options: Any) -> Damage:
    """A random checkpoint in place of the bundled one, spoilt or not."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder / "DIR")
        write_checkpoint(folder / "DIR", **options)
        if change is not None:
            change(folder)

    return make


def cut_short(folder: Path) -> None:
    path = folder / "DIR" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100_000])


def pickled(folder: Path) -> None:
    (folder / "DIR" / "model.safetensors").rename(folder / "DIR" / "pytorch_model.bin")


def converted_and_changed(folder: Path) -> None:
    run_cli("convert", folder / "DIR", folder / "OUT", "--to", "modelopt")
    rewrite(folder / "OUT", lambda found: found[f"{O_PROJ}.weight_scale"][17, 1].mul_(2))


def runs_full(_descriptor: int, data: memoryview, offset: int) -> int:
    """Write the header of a file, and nothing more."""
    if offset:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return len(data)


def thesis(folder: Path) -> None:
    (folder / ".OUT.partial").mkdir()
    (folder / ".OUT.partial" / "thesis.tex").write_text("years", encoding="utf-8")


CASES: Mapping[str, Damage] = {
    "A name instead of a directory": lambda _: None,
    "Another quantization method": config(lambda entry: entry.update(quantization_config={"quant_method": "gptq"})),
    "A name that was never read": lambda _: None,
    "An architecture that is not supported": config(lambda entry: entry.update(architectures=["FalconForCausalLM"])),
    "A value that means nothing": weights_of_config(strategy="rows"),
    "Git LFS pointers": lambda folder: (folder / "DIR" / "model.safetensors").write_text(POINTER, encoding="utf-8"),
    "A missing shard": another(lambda folder: next((folder / "DIR").glob("*-00002-of-*")).unlink(), shards=3),
    "A file that is cut short": cut_short,
    "Pickle files": pickled,
    "A group_size that does not fit": weights_of_config(group_size=64),
    "A tensor that is missing": tensors(lambda found: found.pop(f"{O_PROJ}.weight_scale")),
    "Tensors of another scheme": weights_of_config(type="float"),
    "A module that would be dequantized, with --strict": another(scheme="int4-g32"),
    "A KV-cache scale that is missing": another(
        tensors(lambda found: found.pop("model.layers.1.self_attn.v_scale")), scheme="fp8-tensor-static", kv=True
    ),
    "A scale that is no number": tensors(lambda found: found[f"{O_PROJ}.weight_scale"][17, 1].fill_(torch.nan)),
    "A value beyond float16": tensors(lambda found: found["model.norm.weight"][3].fill_(70000)),
    "A weight that differs": converted_and_changed,
    "A disk that runs full": lambda _: None,
    "OUT exists": lambda folder: (folder / "OUT").mkdir(),
    "A folder of yours has the name of the working directory": thesis,
    "No room on the disk": lambda _: None,
    "MissingDependencyError": lambda _: None,
}


def section(title: str) -> re.Match[str]:
    """The block below a heading: its command, and the output as documented."""
    pattern = rf"(?ms)^### {re.escape(title)}\n\n```text\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```$"
    found = re.search(pattern, PAGE.read_text(encoding="utf-8"))
    assert found is not None, f"no example below {title!r}"
    return found


@pytest.mark.parametrize("title", CASES)
def test_messages_are_those_of_the_page(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(trtllm_ct.__file__).parent / "cli" / "demo_data", tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    CASES[title](tmp_path)
    if title == "A disk that runs full":
        monkeypatch.setattr(file_calls, "free_bytes", lambda _: 10**8)
        monkeypatch.setattr(file_calls, "write_at", runs_full)
    if title == "No room on the disk":
        monkeypatch.setattr(file_calls, "free_bytes", lambda _: 10**6)
    if title == "MissingDependencyError":
        monkeypatch.setitem(sys.modules, "transformers", None)
    documented = section(title)

    done = run_cli(*shlex.split(documented["command"])[1:])

    printed = (done.out + done.err).replace(str(tmp_path), "/models")
    printed = "".join(line.rstrip() + "\n" for line in printed.splitlines())
    if os.environ.get(WRITE):
        content = documented.string
        begin, end = documented.span("output")
        PAGE.write_text(content[:begin] + printed + content[end:], encoding="utf-8")
    else:
        assert done.code != 0
        assert documented["output"] == printed


def test_every_example_of_the_page_is_run() -> None:
    titles = re.findall(r"(?m)^### (.+)\n\n```text\n\$ trtllm-ct", PAGE.read_text(encoding="utf-8"))
    assert titles == list(CASES)
