"""Conversions of every scheme and of experts: correct ones pass, and damage to any tensor of a mode is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from builders import SCHEMES, rewrite, tiny_config, write_checkpoint
from fused_experts import fuse_experts
from tiny_models import FAMILIES
from torch import Tensor

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.verify import VerificationReport, verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.experts.1.up_proj"
SMALL = tiny_config(hidden=128, kv_heads=4, intermediate=128, layers=1, vocabulary=32)
MIXTURE = tiny_config("Qwen3MoeForCausalLM", hidden=128, moe_intermediate_size=128, layers=1, vocabulary=32)

Change = Callable[[dict[str, Tensor]], object]


def converted(
    tmp_path: Path, to: str = "modelopt", *, sm: int | None = None, **checkpoint: object
) -> tuple[Path, Path]:
    source = write_checkpoint(tmp_path / "source", **({"config": SMALL} | checkpoint)).directory
    convert_checkpoint(source, tmp_path / "out", to=to, engine="stock-1.3", sm=sm)
    return source, tmp_path / "out"


def damaged(pair: tuple[Path, Path], change: Change) -> VerificationReport:
    source, out = pair
    rewrite(out, change)
    return verify_checkpoint(source, out)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "int4-g256"])
@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_every_scheme_is_converted_faithfully(tmp_path: Path, scheme: str, to: str) -> None:
    source, out = converted(tmp_path, to, scheme=scheme)

    report = verify_checkpoint(source, out)

    assert report.faults == ()
    assert {f"{Q}.weight", "lm_head.weight"} <= {check.name for check in report.checks}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["nvfp4", "fp8-tensor-static"])
def test_every_family_is_converted_faithfully(tmp_path: Path, family: str, scheme: str) -> None:
    source, out = converted(tmp_path, config=tiny_config(family), scheme=scheme, kv=True)

    report = verify_checkpoint(source, out)

    assert report.faults == ()
    assert {check.kind for check in report.checks} >= {"native", "plain"}


@pytest.mark.parametrize("scheme", ["fp8-block", "nvfp4", "mxfp4a16", "mxfp8", "w8a8", "int4-g32", "fp8-channel-token"])
@pytest.mark.parametrize("edit", [None, fuse_experts], ids=["apart", "fused"])
def test_experts_are_converted_faithfully(tmp_path: Path, scheme: str, edit: Change | None) -> None:
    source, out = converted(tmp_path, config=MIXTURE, scheme=scheme, edit=edit)

    assert verify_checkpoint(source, out).faults == ()


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("scheme", ["fp8-block", "int4-g32", "int8-channel"])
def test_scales_may_have_the_name_that_deepseek_gives_them(tmp_path: Path, scheme: str, to: str) -> None:
    def rename(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith(".weight_scale")]:
            stored[f"{name}_inv"] = stored.pop(name)

    source, out = converted(tmp_path, to, scheme=scheme, edit=rename)

    assert verify_checkpoint(source, out).faults == ()


def flip(name: str, bit: int = 0x10) -> Change:
    """Flip `bit` in the last byte of a tensor."""

    def change(stored: dict[str, Tensor]) -> None:
        stored[name].reshape(-1).view(torch.uint8)[-1] ^= bit

    return change


def double(name: str) -> Change:
    return lambda stored: stored.update({name: stored[name] * 2})


@pytest.mark.parametrize(
    ("scheme", "change"),
    [
        ("nvfp4", flip(f"{Q}.weight")),
        ("nvfp4", flip(f"{Q}.weight", 0x01)),
        ("nvfp4", flip(f"{Q}.weight_scale")),
        ("nvfp4", flip(f"{Q}.weight_scale", 0x01)),
        ("nvfp4", double(f"{Q}.weight_scale_2")),
        ("nvfp4", double(f"{Q}.input_scale")),
        ("nvfp4a16", double(f"{Q}.weight_scale_2")),
        ("mxfp8", flip(f"{Q}.weight")),
        ("mxfp8", flip(f"{Q}.weight", 0x01)),
        ("mxfp8", flip(f"{Q}.weight_scale", 0x01)),
        ("fp8-block", double(f"{Q}.weight_scale")),
        ("w8a8", flip(f"{Q}.weight")),
        ("w8a8", flip(f"{Q}.weight", 0x01)),
        ("w8a8", double(f"{Q}.weight_scale")),
        ("w4afp8", flip(f"{Q}.weight")),
    ],
)
def test_damage_is_found_where_it_is(tmp_path: Path, scheme: str, change: Change) -> None:
    report = damaged(converted(tmp_path, scheme=scheme), change)

    assert report.faults
    assert all(fault.where.startswith(Q) for fault in report.faults)


@pytest.mark.parametrize(
    ("scheme", "lost"),
    [
        ("nvfp4", "weight_scale_2"),
        ("nvfp4", "input_scale"),
        ("nvfp4", "weight_scale"),
        ("fp8-block", "weight_scale"),
        ("mxfp8", "weight_scale"),
    ],
)
def test_a_lost_tensor_is_named(tmp_path: Path, scheme: str, lost: str) -> None:
    report = damaged(converted(tmp_path, scheme=scheme), lambda stored: stored.pop(f"{Q}.{lost}"))

    assert all(fault.where.startswith(Q) for fault in report.faults)
    assert any(lost in f"{fault.where} {fault.expected} {fault.found}" for fault in report.faults)


@pytest.mark.parametrize("scheme", ["fp8-block", "mxfp4a16", "mxfp8"])
def test_both_names_of_an_experts_scale_must_agree(tmp_path: Path, scheme: str) -> None:
    pair = converted(tmp_path, config=MIXTURE, scheme=scheme, sm=90 if scheme == "mxfp4a16" else None)

    report = damaged(pair, flip(f"{UP}.weight_scale_inv", 0x01))

    assert [fault.where for fault in report.faults] == [f"{UP}.weight_scale_inv"]
    assert report.faults[0].expected == "the same values as weight_scale"


@pytest.mark.parametrize("scheme", ["fp8-block", "mxfp4a16"])
def test_the_second_name_of_an_experts_scale_is_required(tmp_path: Path, scheme: str) -> None:
    """An engine that reads the second name would otherwise compute with an uninitialised scale."""
    report = damaged(
        converted(tmp_path, config=MIXTURE, scheme=scheme, sm=90 if scheme == "mxfp4a16" else None),
        lambda stored: stored.pop(f"{UP}.weight_scale_inv"),
    )

    assert [fault.where for fault in report.faults] == [f"{UP}.weight_scale_inv"]


def test_an_expert_without_calibration_data_is_zero_and_counted(tmp_path: Path) -> None:
    """Some writers store a divisor of 0; the multiplier is then 0, and no infinity reaches the other experts."""

    def set_zero(stored: dict[str, Tensor]) -> None:
        for local in ("weight_global_scale", "input_global_scale"):
            stored[f"{UP}.{local}"] = torch.zeros(1)

    source, out = converted(tmp_path, config=MIXTURE, scheme="nvfp4", edit=set_zero)

    report = verify_checkpoint(source, out)

    assert report.faults == ()
    assert report.zero_scales == 128 * 8
