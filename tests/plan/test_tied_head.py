"""A stored head is delivered unless it equals the table that config.json ties it to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import SCHEMES, rewrite_config, tiny_config, write_checkpoint
from on_tensors import on_tensors
from safetensors.torch import load_file
from stored_schemes import Writer

from trtllm_ct import convert_checkpoint, open_checkpoint, plan_checkpoint, verify_checkpoint
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.planner import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

round_once = on_tensors(rounding_layout.round_once)

TABLE, HEAD = "model.embed_tokens", "lm_head"
Stored = dict[str, torch.Tensor]


def quantized(seed: int, scheme: str = "int8-channel") -> tuple[Stored, Tensor]:
    """Local tensors of a quantized weight [96, 64] and its exact values."""
    return Writer(torch.bfloat16, torch.Generator().manual_seed(seed)).store(SCHEMES[scheme], (96, 64))


def put(stored: Stored, module: str, tensors: Stored) -> None:
    stored.pop(f"{module}.weight", None)
    stored.update({f"{module}.{local}": tensor.clone() for local, tensor in tensors.items()})


def other_values(stored: Stored) -> None:
    stored[f"{HEAD}.weight"] = stored[f"{TABLE}.weight"] * 2


def another_last_element(stored: Stored) -> None:
    stored[f"{HEAD}.weight"] = stored[f"{TABLE}.weight"].clone()
    stored[f"{HEAD}.weight"][-1, -1] += 1


def another_dtype(stored: Stored) -> None:
    stored[f"{HEAD}.weight"] = stored[f"{TABLE}.weight"].float()


def other_codes(stored: Stored) -> None:
    put(stored, TABLE, quantized(1)[0])
    put(stored, HEAD, quantized(2)[0])


def another_scheme(stored: Stored) -> None:
    put(stored, TABLE, quantized(1)[0])
    put(stored, HEAD, quantized(1, "int4-g32")[0])


def only_the_head_quantized(stored: Stored) -> None:
    put(stored, HEAD, quantized(2)[0])


DIFFERENT: list[Callable[[Stored], None]] = [
    *(other_values, another_last_element, another_dtype, other_codes, only_the_head_quantized),
]


def write(directory: Path, edit: Callable[[Stored], None], **config: Any) -> Any:
    return write_checkpoint(
        directory, config=tiny_config(**({"tied": True} | config)), scheme="int8-channel", edit=edit
    )


@pytest.mark.parametrize("edit", DIFFERENT)
def test_a_head_that_differs_is_delivered_and_the_flag_is_written_false(
    tmp_path: Path, edit: Callable[[Stored], None]
) -> None:
    built = write(tmp_path / "source", edit)

    for target in ("modelopt", "dense"):
        out = tmp_path / target
        report = convert_checkpoint(tmp_path / "source", out, to=target)

        (warning,) = [text for text in report.plan.warnings if text.startswith(HEAD)]
        assert "differs from model.embed_tokens, though config.json ties them" in warning
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        delivered = load_file(out / "model.safetensors")
        if f"{HEAD}.weight_scale" not in built.stored:
            assert torch.equal(delivered[f"{HEAD}.weight"], built.stored[f"{HEAD}.weight"])
        else:
            exact = quantized(2)[1]
            assert torch.equal(delivered[f"{HEAD}.weight"], round_once(exact, torch.bfloat16))
        assert verify_checkpoint(tmp_path / "source", out).good


def test_a_head_in_another_scheme_is_delivered(tmp_path: Path) -> None:
    """Each by the group that targets it."""
    write(tmp_path, another_scheme)
    rewrite_config(tmp_path, lambda config: _add_group(config, "int4-g32", HEAD))
    rewrite_config(tmp_path, lambda config: _add_group(config, "int8-channel", TABLE))

    plan = plan_checkpoint(tmp_path)

    assert plan.module(HEAD).stored_scheme.startswith("pack-quantized: int4")
    assert plan.module(TABLE).stored_scheme != plan.module(HEAD).stored_scheme
    assert not plan.tied


@pytest.mark.parametrize("target", ["modelopt", "dense"])
@pytest.mark.parametrize("scheme", [None, "int8-channel"])
def test_a_head_that_equals_the_table_is_left_out(tmp_path: Path, scheme: str | None, target: str) -> None:
    def copy(stored: Stored) -> None:
        for module in (TABLE, HEAD):
            put(stored, module, quantized(1, scheme)[0] if scheme else {"weight": torch.ones(96, 64).bfloat16()})

    write(tmp_path / "source", copy)

    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", to=target)

    assert not [name for name in report.plan.delivered_specs if name.startswith(HEAD)]
    assert not [warning for warning in report.plan.warnings if HEAD in warning]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert verify_checkpoint(tmp_path / "source", tmp_path / "out").good


@pytest.mark.parametrize("target", ["modelopt", "dense"])
@pytest.mark.parametrize("scheme", [None, "int8-channel", "int4-g32"])
def test_a_head_without_a_table_is_the_table(tmp_path: Path, scheme: str | None, target: str) -> None:
    """Quantized by the group that targets Linears, since the head is one."""

    def move(stored: Stored) -> None:
        plain = {"weight": stored.pop(f"{TABLE}.weight")}
        put(stored, HEAD, quantized(1, scheme)[0] if scheme else plain)

    built = write(tmp_path / "source", move)
    if scheme == "int4-g32":
        rewrite_config(tmp_path / "source", lambda config: _add_group(config, scheme, HEAD))

    convert_checkpoint(tmp_path / "source", tmp_path / "out", to=target)

    delivered = load_file(tmp_path / "out" / "model.safetensors")
    exact = quantized(1, scheme)[1] if scheme else built.stored[f"{HEAD}.weight"].double()
    assert torch.equal(delivered[f"{TABLE}.weight"], round_once(exact, torch.bfloat16))
    assert f"{HEAD}.weight" not in delivered
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert verify_checkpoint(tmp_path / "source", tmp_path / "out").good


def test_without_a_probe_the_head_is_delivered(tmp_path: Path) -> None:
    """Such a plan holds for all values."""
    write(tmp_path, lambda stored: stored.update({f"{HEAD}.weight": stored[f"{TABLE}.weight"].clone()}))
    checkpoint = open_checkpoint(tmp_path)

    plan = make_plan(checkpoint.config, checkpoint.catalog, checkpoint.model, PlanOptions())

    assert f"{HEAD}.weight" in plan.delivered_specs
    assert [warning for warning in plan.warnings if "may differ" in warning]


def test_both_levels_of_the_delivered_config_say_the_same(tmp_path: Path) -> None:
    """The class of Qwen2.5-VL ties when either level says so, others read the top level only."""
    write(tmp_path / "source", other_values)
    rewrite_config(tmp_path / "source", _wrap)

    convert_checkpoint(tmp_path / "source", tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


@pytest.mark.reference
def test_the_reference_engine_computes_with_a_head_that_differs(tmp_path: Path) -> None:
    from trtllm_ct.reference import load_model

    write(tmp_path / "source", other_values)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", to="dense")

    for directory in (tmp_path / "source", tmp_path / "out"):
        state = load_model(directory, dtype=torch.float32).state_dict()
        assert torch.equal(state[f"{HEAD}.weight"], state[f"{TABLE}.weight"] * 2)


def _add_group(config: dict[str, Any], scheme: str, target: str) -> None:
    block = config["quantization_config"]
    block["config_groups"][target] = SCHEMES[scheme].group | {"targets": [target]}
    block["ignore"] = []


def _wrap(config: dict[str, Any]) -> None:
    text = {key: config.pop(key) for key in list(config) if key not in {"quantization_config", "dtype"}}
    config |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
