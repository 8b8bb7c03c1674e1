"""Scalars of one fused Linear in a converted directory: equal in all parts, whatever the weights are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from builders import rewrite, write_checkpoint

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ATTENTION = "model.layers.0.self_attn"


def test_a_part_with_another_scalar_is_a_fault_though_its_weight_is_the_same(tmp_path: Path) -> None:
    """The scalar is doubled and the group scales are halved: each value stays what it is, and the engine asserts."""
    built = write_checkpoint(tmp_path / "in", scheme="nvfp4")
    convert_checkpoint(built.directory, tmp_path / "out")
    assert verify_checkpoint(built.directory, tmp_path / "out").good

    def halved(stored: dict[str, Tensor]) -> None:
        scale = stored[f"{ATTENTION}.k_proj.weight_scale"]
        stored[f"{ATTENTION}.k_proj.weight_scale"] = (scale.float() / 2).to(scale.dtype)
        assert torch.equal(stored[f"{ATTENTION}.k_proj.weight_scale"].float() * 2, scale.float())
        stored[f"{ATTENTION}.k_proj.weight_scale_2"] *= 2

    rewrite(tmp_path / "out", halved)
    report = verify_checkpoint(built.directory, tmp_path / "out")

    assert [fault.where for fault in report.faults] == [f"{ATTENTION}.k_proj.weight_scale_2"]
    assert f"as {ATTENTION}.q_proj has it" in report.faults[0].expected


def test_a_part_has_the_input_scale_of_another_part_of_its_linear(tmp_path: Path) -> None:
    """Inputs of q, k and v are one tensor: the engine asserts that their scales are equal."""
    built = write_checkpoint(tmp_path / "in", scheme="nvfp4")

    def doubled(stored: dict[str, Tensor]) -> None:
        stored[f"{ATTENTION}.k_proj.input_global_scale"] *= 2

    rewrite(built.directory, doubled)
    convert_checkpoint(built.directory, tmp_path / "out")
    report = verify_checkpoint(built.directory, tmp_path / "out")
    assert report.good

    def other(stored: dict[str, Tensor]) -> None:
        stored[f"{ATTENTION}.k_proj.input_scale"] /= 2  # Its own scale, without the other parts.

    rewrite(tmp_path / "out", other)
    assert not verify_checkpoint(built.directory, tmp_path / "out").good
