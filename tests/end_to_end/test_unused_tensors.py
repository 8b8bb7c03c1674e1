"""A tensor that a target does not use is no reason to refuse that target, whatever it holds."""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint
from safetensors.torch import load_file

from trtllm_ct import convert_checkpoint, verify_checkpoint
from trtllm_ct.base.errors import CheckpointError, PayloadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

Stored = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.1.mlp.experts"
MIXTURE = tiny_config("Qwen3MoeForCausalLM")


def setting(name: str, value: float | None) -> Callable[[Stored], None]:
    """Return an edit that fills a tensor, or removes it for None."""

    def edit(stored: Stored) -> None:
        if value is None:
            del stored[name]
        else:
            stored[name] = torch.full_like(stored[name], value)

    return edit


@pytest.mark.parametrize("value", [nan, inf, -1.0, 0.0, None])
@pytest.mark.parametrize(("scheme", "local"), [("nvfp4", "input_global_scale"), ("fp8-tensor-static", "input_scale")])
def test_scales_of_inputs_do_not_matter_to_plain_weights(
    tmp_path: Path, scheme: str, local: str, value: float | None
) -> None:
    """`dense` leaves them out, and `verify` agrees with what was delivered; engines need them."""
    source = write_checkpoint(tmp_path / "source", scheme=scheme, edit=setting(f"{Q}.{local}", value)).directory

    convert_checkpoint(source, tmp_path / "dense", to="dense")

    assert verify_checkpoint(source, tmp_path / "dense").faults == ()
    for target in ("modelopt", "engine"):
        with pytest.raises(CheckpointError, match=local) as raised:
            convert_checkpoint(source, tmp_path / target, to=target)
        assert all("--to dense" in fault.remedy for fault in raised.value.faults)


@pytest.mark.parametrize("target", ["modelopt", "engine"])
@pytest.mark.parametrize(
    ("local", "numbers"),
    [
        ("k_scale", [nan]),
        ("v_scale", [0.0]),
        ("k_scale", [1.0, 1.0, 1.0]),
        ("v_scale", []),
        ("q_proj.input_scale", [1.0, 1.0, 1.0]),
    ],
    ids=str,
)
def test_the_remedy_for_a_scale_that_plain_weights_do_without_offers_them(
    tmp_path: Path, local: str, numbers: list[float], target: str
) -> None:
    """`numbers` is empty for a scale that is missing."""
    name = f"model.layers.0.self_attn.{local}"

    def edit(stored: Stored) -> None:
        del stored[name]
        if numbers:
            stored[name] = torch.tensor(numbers)

    source = write_checkpoint(tmp_path / "source", scheme="fp8-tensor-static", kv=True, edit=edit).directory

    with pytest.raises(CheckpointError, match=local) as raised:
        convert_checkpoint(source, tmp_path / "out", to=target)
    assert all("--to dense" in fault.remedy for fault in raised.value.faults)

    convert_checkpoint(source, tmp_path / "dense", to="dense")
    assert verify_checkpoint(source, tmp_path / "dense").faults == ()


def test_no_scale_of_the_cache_at_all_is_such_a_case_too(tmp_path: Path) -> None:
    def edit(stored: Stored) -> None:
        for name in [name for name in stored if name.endswith(("k_scale", "v_scale"))]:
            del stored[name]

    write_checkpoint(tmp_path / "source", scheme="fp8-tensor-static", kv=True, edit=edit)

    for target in ("modelopt", "engine"):
        with pytest.raises(CheckpointError, match="kv_cache_scheme") as raised:
            convert_checkpoint(tmp_path / "source", tmp_path / target, to=target)
        assert all("--to dense" in fault.remedy for fault in raised.value.faults)
    convert_checkpoint(tmp_path / "source", tmp_path / "dense", to="dense")


@pytest.mark.parametrize("value", [nan, inf, None])
def test_a_mode_with_16_bit_activations_reads_no_scale_of_its_inputs(tmp_path: Path, value: float | None) -> None:
    """Static int8 activations become 16-bit ones in W8A16."""
    source = write_checkpoint(
        tmp_path / "source", scheme="w8a8-static", edit=setting(f"{Q}.input_scale", value)
    ).directory

    for target in ("modelopt", "dense"):
        convert_checkpoint(source, tmp_path / target, to=target)
        assert verify_checkpoint(source, tmp_path / target).faults == ()


@pytest.mark.parametrize("target", ["modelopt", "dense"])
@pytest.mark.parametrize("unreached", [0.0, inf])
@pytest.mark.parametrize("projections", [["down_proj"], ["gate_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_the_input_scale_of_an_expert_that_saw_no_tokens(
    tmp_path: Path, projections: list[str], unreached: float, target: str
) -> None:
    """Infinity counts as 0 does: the multiplier is 0, or that of the other part of gate and up."""
    names = [f"{EXPERTS}.3.{projection}.input_global_scale" for projection in projections]

    def edit(stored: dict[str, Tensor]) -> None:
        for name in names:
            stored[name] = torch.full_like(stored[name], unreached)

    built = write_checkpoint(tmp_path / "source", config=MIXTURE, scheme="nvfp4", edit=edit)

    convert_checkpoint(built.directory, tmp_path / "out", to=target)

    assert verify_checkpoint(built.directory, tmp_path / "out").faults == ()
    delivered = load_file(tmp_path / "out" / "model.safetensors")
    if target == "modelopt":
        up = built.stored[f"{EXPERTS}.3.up_proj.input_global_scale"]
        expected = 1 / up.float() if projections == ["gate_proj"] else torch.zeros(())
        assert torch.equal(delivered[f"{EXPERTS}.3.{projections[0]}.input_scale"], expected.reshape(()))
        assert bool(delivered[f"{EXPERTS}.3.{projections[0]}.input_scale"].isfinite())


@pytest.mark.parametrize("target", ["modelopt", "dense"])
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize(("scheme", "local"), [("int4-g32", "weight_scale"), ("nvfp4", "weight_global_scale")])
def test_scales_of_weights_are_refused_at_every_target(
    tmp_path: Path, scheme: str, local: str, value: float, target: str
) -> None:
    name = f"{EXPERTS}.2.gate_proj.{local}"
    write_checkpoint(tmp_path / "source", config=MIXTURE, scheme=scheme, edit=setting(name, value))

    with pytest.raises(PayloadError, match=local):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", to=target)
