"""`PlanOptions` are everything that decides a plan beside the checkpoint."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import UsageError
from trtllm_ct.engine.requantization import FORMS
from trtllm_ct.plan.options import PlanArguments, PlanOptions, dense_dtype


def test_functions_take_each_field_but_the_target_as_a_keyword() -> None:
    names = {field.name for field in fields(PlanOptions)}

    assert PlanArguments.__annotations__.keys() == names - {"to"}


def test_options_are_made_from_keywords() -> None:
    options = PlanOptions.of("dense", dtype="float16", strict=True)

    assert options == PlanOptions(to="dense", dtype=DType.F16, strict=True)


@pytest.mark.parametrize("asked", ["all=nvfp4", ["experts=nvfp4", "linears=nvfp4"], {"all": "nvfp4"}])
def test_requantization_is_asked_for_in_words(asked: Any) -> None:
    parsed = PlanOptions.of("modelopt", requantize=asked).requantize

    assert parsed.experts is parsed.linears is FORMS["nvfp4"]
    assert PlanOptions.of("modelopt", requantize=parsed).requantize is parsed
    assert PlanOptions.of("modelopt", requantize=None) == PlanOptions()


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        (None, None),
        ("auto", None),
        ("bfloat16", DType.BF16),
        ("torch.float16", DType.F16),
        (torch.float32, DType.F32),
        (DType.BF16, DType.BF16),
    ],
)
def test_a_dtype_is_a_name_or_a_dtype(asked: Any, dtype: DType | None) -> None:
    assert dense_dtype(asked) == dtype


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "", "bf16"])
def test_a_dtype_that_no_dequantized_module_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"dtype: expected auto or bfloat16 or float16 or float32"):
        PlanOptions.of("dense", dtype=name)


@pytest.mark.parametrize("wrong", [{"to": "gguf"}, {"engine": "0.1"}, {"sm": 61}, {"to": "engine", "untested": True}])
def test_a_target_that_does_not_exist_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PlanOptions(**wrong).target()
