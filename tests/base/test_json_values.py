"""Texts of allowed size that a parser would expand to gigabytes are refused before they are parsed."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint

from trtllm_ct.base.errors import CheckpointError
from trtllm_ct.base.json_values import is_finite_number, require_few_values
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("text", "values"), [(b"{}", 1), (b'{"a": [1, 2, 3]}', 4), (b"[[], {}]", 4)])
def test_values_are_counted(text: bytes, values: int) -> None:
    require_few_values(text, values)
    with pytest.raises(ValueError, match=f"{values} values, where at most {values - 1}"):
        require_few_values(text, values - 1)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("value", ["[]", "{}", "0", "[[[[]]]]"])
def test_a_file_of_too_many_values_is_refused(tmp_path: Path, file: str, value: str) -> None:
    directory = write_checkpoint(tmp_path, scheme="int8-channel").directory
    path = directory / file
    before = json.dumps(json.loads(path.read_bytes()) if path.exists() else {"weight_map": {}})
    bomb = ",".join([value] * (4_100_000 // value.count("[") if "[" in value else 4_100_000))
    path.write_text(f'{before[:-1]}, "more": [{bomb}]}}')

    with pytest.raises(CheckpointError, match=r"values, where at most|lists and objects, where"):
        open_checkpoint(directory)


def test_a_header_of_too_many_lists_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, scheme="int8-channel").directory
    header = b'{"a": [' + b",".join([b"[]"] * 200_000) + b"]}"
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    with pytest.raises(CheckpointError, match="lists and objects, where 0 tensors have at most"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("value", "is_number"),
    [
        *[(number, True) for number in (0, -3, 0.5, 1e308, 2**1023, -(2**1023))],
        *[(other, False) for other in (10**400, -(10**400), math.inf, -math.inf, math.nan, True, None, "1", [1])],
    ],
)
def test_a_finite_number_is_one_that_a_float_holds(value: object, is_number: bool) -> None:
    assert is_finite_number(value) is is_number
