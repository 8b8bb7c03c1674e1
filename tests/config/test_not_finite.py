"""Numbers that are not finite: refused where they are used, copied and named elsewhere."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint

from trtllm_ct import convert_checkpoint, verify_checkpoint
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.config.model_values import check_model_values
from trtllm_ct.config.not_finite import keys_not_finite

if TYPE_CHECKING:
    from pathlib import Path

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf, "1e999": math.inf}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("text", NOT_FINITE)
@pytest.mark.parametrize("key", ["final_logit_softcapping", "audio_config.scale", "unknown.list"])
def test_a_number_that_is_not_finite_is_copied_and_named(tmp_path: Path, key: str, text: str) -> None:
    directory = write_checkpoint(tmp_path / "source").directory
    config = json.loads((directory / "config.json").read_text())
    block, _, inner = key.partition(".")
    config[block] = {inner: [1.0, "NUMBER"] if inner == "list" else "NUMBER"} if inner else "NUMBER"
    (directory / "config.json").write_text(json.dumps(config).replace('"NUMBER"', text))

    report = convert_checkpoint(directory, tmp_path / "out")

    assert any(f"config.json: {key}: not a finite number" in warning for warning in report.warnings)
    written = json.loads((tmp_path / "out" / "config.json").read_text())[block]
    number = written if not inner else written[inner][1] if inner == "list" else written[inner]
    assert number == NOT_FINITE[text] or (math.isnan(number) and text == "NaN")
    verify_checkpoint(directory, tmp_path / "out")


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]])
def test_the_infinite_end_of_a_time_step_is_not_named(limit: list[Any]) -> None:
    assert keys_not_finite({"time_step_limit": limit, "text_config": {"time_step_limit": limit}}) == ()


@pytest.mark.parametrize("number", [math.nan, math.inf, {"__float__": "NaN"}, {"__float__": "Infinity"}], ids=str)
@pytest.mark.parametrize("part", [None, "text_config", "audio_config"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("block", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", YARN)
def test_a_rotary_embedding_has_finite_numbers(
    key: str, block: str, labelled: bool, part: str | None, number: object
) -> None:
    rope: dict[str, Any] = YARN | {key: number}
    rope = {"full_attention": rope, "sliding_attention": YARN} if labelled else rope
    config = {block: rope}
    faults = FaultCollector()

    check_model_values({part: config} if part else config, faults)

    assert len(faults.faults) == 1
