"""`stream_delivered` checks that the parts of fused Linears have equal scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import rewrite, write_checkpoint

from trtllm_ct.base.errors import PayloadError
from trtllm_ct.engine.target import MODELOPT
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.planner import make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

K_PROJ = "model.layers.0.self_attn.k_proj"


def test_parts_of_a_fused_linear_with_different_scalars_are_refused(tmp_path: Path) -> None:
    """A plan without a probe can't know them; the delivered values show them."""
    built = write_checkpoint(tmp_path, scheme="nvfp4")

    def tripled(stored: dict[str, Tensor]) -> None:
        stored[f"{K_PROJ}.weight_global_scale"] *= 3

    rewrite(built.directory, tripled)
    checkpoint = open_checkpoint(built.directory)
    unprobed = make_plan(checkpoint.config, checkpoint.catalog, checkpoint.model, MODELOPT)

    with pytest.raises(PayloadError) as raised:
        list(stream_delivered(unprobed, checkpoint.catalog))

    assert [fault.where for fault in raised.value.faults] == [f"{K_PROJ}.weight_scale_2"]
