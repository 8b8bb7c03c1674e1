"""`stream_delivered` checks that the parts of fused Linears have equal scalars."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from builders import rewrite, write_checkpoint
from on_tensors import stream_delivered

from trtllm_ct.base.errors import CatalogError, PayloadError
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.planner import make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.layouts.stored_array import StoredArray


K_PROJ = "model.layers.0.self_attn.k_proj"


def test_parts_of_a_fused_linear_with_different_scalars_are_refused(tmp_path: Path) -> None:
    """A plan without a probe can't know them; the delivered values show them."""
    built = write_checkpoint(tmp_path, scheme="nvfp4")

    def tripled(stored: dict[str, Tensor]) -> None:
        stored[f"{K_PROJ}.weight_global_scale"] *= 3

    rewrite(built.directory, tripled)
    checkpoint = open_checkpoint(built.directory)
    unprobed = make_plan(checkpoint.config, checkpoint.catalog, checkpoint.model, PlanOptions())

    with pytest.raises(PayloadError) as raised:
        list(stream_delivered(unprobed, checkpoint.catalog))

    assert [fault.where for fault in raised.value.faults] == [f"{K_PROJ}.weight_scale_2"]


def test_a_file_that_shrinks_while_it_is_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a guard, the process would end without a message."""
    made = write_checkpoint(tmp_path, scheme="int8-channel")
    file = made.directory / "model.safetensors"
    read = TensorReader.read

    def shrinking(reader: TensorReader, name: str, *bounds: int) -> StoredArray:
        tensor = read(reader, name, *bounds)
        if file.stat().st_size > 4096:
            os.truncate(file, 4096)
        return tensor

    monkeypatch.setattr(TensorReader, "read", shrinking)

    with pytest.raises(CatalogError) as raised:
        CompressedTensorsWeightLoader().load_weights(made.directory)

    assert raised.value.faults[0].where == "model.safetensors"
