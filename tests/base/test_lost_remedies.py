"""What to do about lost tensors depends on whether a file can be missing."""

from __future__ import annotations

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.lost_remedies import FETCH, FETCH_OR_OTHER_MODEL, lost_or_damaged, say_nothing_is_missing
from trtllm_ct.base.schemes import TensorSpec


def test_only_remedies_for_lost_tensors_change() -> None:
    faults = FaultCollector()
    for remedy in (f"It is wrong. {FETCH}; or do without.", FETCH_OR_OTHER_MODEL, "Quantize again."):
        faults.add(where="x", expected="a tensor", found="none", remedy=remedy)

    say_nothing_is_missing(faults)

    first, second, other = (fault.remedy for fault in faults.faults)
    assert first.startswith("It is wrong. No file is missing, so the checkpoint was saved without it")
    assert first.endswith("; or do without.")
    assert second.startswith("No file is missing")
    assert second.endswith("take it from where the weights were published.")
    assert "etch" not in first + second
    assert other == "Quantize again."


def test_a_tensor_of_another_shape_is_not_lost() -> None:
    assert lost_or_damaged(None) == FETCH
    assert lost_or_damaged(TensorSpec(DType.F32, (2,))) == "Download the checkpoint again"
