"""Malformed files end to end: each refused by name, with words that help, and nothing left behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from damages import INDEX, WEIGHTS, Case, assert_refused, assert_told, file, header, in_order, index
from safetensors.torch import save_file

from trtllm_ct.base.errors import CatalogError, ConfigError, DetectionError

if TYPE_CHECKING:
    from pathlib import Path

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARDED = {"shards": 2}
DAMAGED_FILE = "incomplete or damaged: download it again"
SAVE_AGAIN = "save the checkpoint again with the safetensors library"


def move(entries: dict[str, Any], by: int) -> None:
    """Shift the payload of the last tensor."""
    last = max((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    entries[last]["data_offsets"] = [offset + by for offset in entries[last]["data_offsets"]]


def name_twice(content: bytes) -> bytes:
    """A header whose first key stands there again."""
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(text)["model.norm.weight"]).encode()
    text = text[:-1] + b', "model.norm.weight": ' + entry + b"}"
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")


def second_file(directory: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, directory / "extra.safetensors")


CASES: dict[str, Case] = {
    "truncated file": Case(
        damage=file(lambda content: content[:-10]),
        error=CatalogError,
        where=WEIGHTS,
        expected="bytes of payload",
        found="a truncated file",
        remedy=DAMAGED_FILE,
    ),
    "truncated header": Case(
        damage=file(lambda content: content[:100]),
        error=CatalogError,
        where=WEIGHTS,
        expected="a header of",
        found="100 bytes in the whole file",
        remedy=DAMAGED_FILE,
    ),
    "LFS pointer": Case(
        damage=file(lambda content: POINTER),
        error=CatalogError,
        where=WEIGHTS,
        expected="the content of the file",
        found="a Git LFS pointer to it",
        remedy="this is an LFS pointer, run git lfs pull",
    ),
    "LFS pointer instead of config.json": Case(
        damage=file(lambda content: POINTER, "config.json"),
        error=ConfigError,
        where="config.json",
        expected="readable JSON",
        found="Expecting value",
        remedy="run git lfs pull",
    ),
    "oversized header": Case(
        damage=file(lambda content: (2**40).to_bytes(8, "little") + content[8:]),
        error=CatalogError,
        where=WEIGHTS,
        expected="a safetensors header of at most 100000000 bytes",
        found=f"a header length of {2**40} bytes",
        remedy="This is no safetensors file",
    ),
    "overlapping offsets": Case(
        damage=header(lambda entries: move(entries, -8)),
        error=CatalogError,
        where=f"{WEIGHTS}: ",
        expected="its data to begin at",
        found="inside",
        remedy=SAVE_AGAIN,
    ),
    "out-of-range offsets": Case(
        damage=in_order(header(lambda entries: move(entries, 4096)), file(lambda content: content + bytes(100))),
        error=CatalogError,
        where=f"{WEIGHTS}: ",
        expected="its data to begin at",
        found="a hole of 4096 bytes",
        remedy=SAVE_AGAIN,
    ),
    "size that is not shape times dtype": Case(
        damage=header(lambda entries: entries["model.norm.weight"].update(shape=[65])),
        error=CatalogError,
        where=f"{WEIGHTS}: model.norm.weight",
        expected="130 bytes for bfloat16 [65]",
        found="128 bytes in data_offsets",
        remedy=SAVE_AGAIN,
    ),
    "dtype that nobody knows": Case(
        damage=header(lambda entries: entries["model.norm.weight"].update(dtype="C64")),
        error=CatalogError,
        where=f"{WEIGHTS}: model.norm.weight",
        expected="one of the dtypes BOOL, U8",
        found='"C64"',
        remedy="Save the tensor in one of the expected dtypes",
    ),
    "name twice in one file": Case(
        damage=file(name_twice),
        error=CatalogError,
        where=WEIGHTS,
        expected="each name once",
        found="more than once: model.norm.weight",
        remedy=SAVE_AGAIN,
    ),
    "name in two files": Case(
        damage=second_file,
        error=CatalogError,
        where=f"extra.safetensors and {WEIGHTS}",
        expected="each tensor in one file",
        found="1 in both: model.norm.weight",
        remedy="only their source can tell which is meant",
    ),
    "missing shard": Case(
        options=SHARDED,
        damage=lambda directory: (directory / SECOND).unlink(),
        error=CatalogError,
        where=SECOND,
        expected=f"the file, which {INDEX} names for",
        found="no such file",
        remedy="The download is incomplete",
    ),
    "missing shard, no index": Case(
        options=SHARDED,
        damage=lambda directory: [(directory / name).unlink() for name in (INDEX, FIRST)],
        error=CatalogError,
        where="model-*-of-00002.safetensors",
        expected="2 shards",
        found="no number 1",
        remedy="The download is incomplete",
    ),
    "shard outside the directory": Case(
        options=SHARDED,
        damage=index(lambda weight_map: weight_map.update({"lm_head.weight": "../model.safetensors"})),
        error=CatalogError,
        where=INDEX,
        expected="paths inside the checkpoint directory",
        found="'../model.safetensors'",
        remedy="such a path may be meant to harm you",
    ),
    "index entry that no file has": Case(
        options=SHARDED,
        damage=index(lambda weight_map: weight_map.update({"model.lost.weight": FIRST})),
        error=CatalogError,
        where=FIRST,
        expected=f"the tensors that {INDEX} lists",
        found="1 of them in no file: model.lost.weight",
        remedy="download all of them again from one revision",
    ),
    "pickle only": Case(
        damage=pickle_only,
        error=CatalogError,
        where="source",
        expected="safetensors files",
        found="pickle files only: pytorch_model.bin",
        remedy="Pickle runs code of the file's author",
    ),
    "no weights": Case(
        damage=lambda directory: (directory / WEIGHTS).unlink(),
        error=CatalogError,
        where="source",
        expected="safetensors files",
        found="no weights among config.json",
        remedy="the download is incomplete",
    ),
    "no config.json": Case(
        damage=lambda directory: (directory / "config.json").unlink(),
        error=DetectionError,
        where="source",
        expected="a directory with config.json or params.json",
        found="neither of them",
        remedy="Give the directory of a whole checkpoint",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_by_name_and_nothing_is_left_behind(case: Case, tmp_path: Path) -> None:
    assert_refused(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_command_line_says_the_same_and_exits_with_1(case: Case, tmp_path: Path) -> None:
    assert_told(case, tmp_path)
