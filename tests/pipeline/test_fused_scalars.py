"""The parts of a fused Linear have equal scalars, or the conversion stops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stated_model import stated_model
from tiny_models import tiny_config

from trtllm_ct.base.errors import PayloadError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig
from trtllm_ct.pipeline.fused_scalars import FusedScalars


def part(name: str, algo: QuantAlgo | None = QuantAlgo.NVFP4, fused_linear: str | None = "attn.qkv_proj") -> Any:
    return SimpleNamespace(
        name=name, fused_linear=fused_linear, layer=LayerQuantConfig(quant_algo=algo) if algo else None
    )


def scalars(name: str, scale: float, input_scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{name}.weight_scale_2": torch.tensor(scale), f"{name}.input_scale": torch.tensor(input_scale)}


def test_equal_scalars_pass() -> None:
    checker = FusedScalars()
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj"):
        checker.check(part(name), scalars(name, 0.25))


@pytest.mark.parametrize(("scale", "input_scale", "where"), [(0.5, 1.0, "weight_scale_2"), (0.25, 2.0, "input_scale")])
def test_a_part_that_differs_is_refused_by_name(scale: float, input_scale: float, where: str) -> None:
    checker = FusedScalars()
    checker.check(part("attn.q_proj"), scalars("attn.q_proj", 0.25))
    with pytest.raises(PayloadError, match=rf"attn.k_proj.{where}: expected .* as attn.q_proj has it.*--to dense"):
        checker.check(part("attn.k_proj"), scalars("attn.k_proj", scale, input_scale))


@pytest.mark.parametrize("module", [part("a", None), part("a", QuantAlgo.FP8), part("a", fused_linear=None)])
def test_other_modules_may_differ(module: Any) -> None:
    """FP8 scales are requantized to the largest by the engine; plain and single modules have nothing to share."""
    checker = FusedScalars()
    checker.check(part("b"), scalars("b", 0.25))
    checker.check(module, scalars("a", 0.5))


def test_layers_are_independent() -> None:
    checker = FusedScalars()
    checker.check(part("0.q_proj", fused_linear="0.qkv_proj"), scalars("0.q_proj", 0.25))
    checker.check(part("1.q_proj", fused_linear="1.qkv_proj"), scalars("1.q_proj", 0.5))


def test_gate_and_up_of_one_expert_share_and_down_does_not() -> None:
    config = tiny_config("Qwen3MoeForCausalLM", layers=1)
    experts = [site for site in stated_model(config).sites() if site.expert]
    shares = {site.module.rpartition("experts.")[2]: site.shares for site in experts}

    assert shares["0.gate_proj"] == shares["0.up_proj"] != shares["1.gate_proj"]
    assert shares["0.down_proj"] is None


def test_zero_is_compared_like_any_other_scalar() -> None:
    """A plan gives a part that saw no data the scalar of the other part. Without a plan the engine would assert."""
    checker = FusedScalars()
    checker.check(part("e.gate_proj", fused_linear="e.gate_up"), scalars("e.gate_proj", 0.25))
    with pytest.raises(PayloadError, match=r"e\.up_proj\.weight_scale_2: expected 0\.25"):
        checker.check(part("e.up_proj", fused_linear="e.gate_up"), scalars("e.up_proj", 0.0))


def test_two_experts_parts_that_saw_no_data_agree() -> None:
    checker = FusedScalars()
    for name in ("e.gate_proj", "e.up_proj"):
        checker.check(part(name, fused_linear="e.gate_up"), scalars(name, 0.0))
