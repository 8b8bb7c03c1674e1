"""Layers and experts of one kind are alike: one that is not has lost a tensor, or has one of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from trtllm_ct.plan.models.alike_layers import suspects_of
from trtllm_ct.plan.models.layer_kinds import layer_kinds

if TYPE_CHECKING:
    from collections.abc import Hashable

    from trtllm_ct.plan.models.plain_tensors import PlainTensors

FULL = {
    "self_attn.q_proj.weight": (64, 32),
    "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32),
    "self_attn.o_proj.weight": (32, 64),
}
LINEAR = {"linear_attn.in_proj_qkvz.weight": (96, 32), "linear_attn.out_proj.weight": (32, 64)}
MLP = {"mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48), "input_layernorm.weight": (32,)}


def plain(layers: int, prefix: str = "model.layers.") -> PlainTensors:
    return {f"{prefix}{layer}.{name}": shape for layer in range(layers) for name, shape in {**FULL, **MLP}.items()}


def hybrid(layers: int, every: int = 4) -> PlainTensors:
    """Full attention in every fourth layer, linear attention in the others."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in {**(FULL if layer % every == every - 1 else LINEAR), **MLP}.items()
    }


def experts(layers: int, count: int) -> PlainTensors:
    return {
        f"model.layers.{layer}.mlp.experts.{number}.{name}.weight": shape
        for layer in range(layers)
        for number in range(count)
        for name, shape in (("gate_proj", (24, 32)), ("up_proj", (24, 32)), ("down_proj", (32, 24)))
    }


def same(layers: int) -> tuple[Hashable, ...]:
    return layer_kinds({}, layers)


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.7.self_attn.k_proj.weight",
        "model.layers.4.linear_attn.out_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.15.input_layernorm.weight",
    ],
)
def test_a_tensor_that_only_one_layer_of_its_kind_lacks_is_lost(lost: str) -> None:
    kind = plain(16) if lost.endswith("3.self_attn.o_proj.weight") else hybrid(16)
    del kind[lost]

    assert suspects_of(kind, "model.", same(16)).lost == (lost,)


def test_the_kinds_in_config_tell_layers_apart() -> None:
    """Without them, a layer that has lost its whole attention could be of either kind."""
    kinds = layer_kinds({"layer_types": ["full" if layer % 4 == 3 else "linear" for layer in range(16)]}, 16)
    tensors = {name: shape for name, shape in hybrid(16).items() if not name.startswith("model.layers.7.self_attn")}

    lost = suspects_of(tensors, "model.", kinds).lost

    assert {name.rpartition(".layers.7.")[2] for name in lost} == FULL.keys()


@pytest.mark.parametrize("prefix", ["model.layers.", "language_model.model.layers.", "transformer.h.", "x.blocks."])
def test_a_tensor_of_another_size_is_named_with_the_size_of_the_others(prefix: str) -> None:
    tensors = plain(6, prefix)
    tensors[f"{prefix}4.mlp.down_proj.weight"] = (32, 47)

    suspects = suspects_of(tensors, prefix.removesuffix("layers.").removesuffix("h.").removesuffix("blocks."), same(6))

    assert suspects.misshapen == {f"{prefix}4.mlp.down_proj.weight": (32, 48)}
    assert not suspects.lost


def test_an_expert_that_is_lost_or_of_another_size_is_named() -> None:
    tensors = experts(2, 8)
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"] = (23, 32)
    del tensors["model.layers.0.mlp.experts.2.down_proj.weight"]

    suspects = suspects_of(tensors, "model.", same(2))

    assert suspects.lost == ("model.layers.0.mlp.experts.2.down_proj.weight",)
    assert suspects.misshapen == {"model.layers.1.mlp.experts.5.up_proj.weight": (24, 32)}


def test_the_last_expert_of_a_layer_is_missed_too() -> None:
    tensors = {name: shape for name, shape in experts(5, 8).items() if "layers.2.mlp.experts.7." not in name}

    lost = suspects_of(tensors, "model.", same(5)).lost

    assert {name.rpartition(".experts.")[2] for name in lost} == {f"7.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_layers_that_config_counts_and_no_file_has_are_lost() -> None:
    tensors = {name: shape for name, shape in plain(6).items() if ".layers.2." not in name}

    assert suspects_of(tensors, "model.", same(8)).lost_layers == ("model.layers.2", "model.layers.6", "model.layers.7")


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_most_layers_may_be_lost(kept: int) -> None:
    lost = suspects_of(plain(kept), "model.", same(9)).lost_layers

    assert lost == tuple(f"model.layers.{layer}" for layer in range(kept, 9))


@pytest.mark.parametrize(
    "config",
    [
        {"_name_or_path": "zai-org/X"},
        {"hidden_act": "gelu_tanh"},
        {"eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
        {"keys_to_ignore": ["a", "b", "c", "d", "e", "f", "g", "h", "i"]},
        {"architectures": [0, 4]},
    ],
)
def test_a_value_that_is_as_long_as_the_layers_are_many_makes_no_kinds(config: dict[str, object]) -> None:
    tensors = plain(9)
    del tensors["model.layers.4.self_attn.o_proj.weight"]

    assert layer_kinds(config, 9) == layer_kinds({}, 9)
    assert suspects_of(tensors, "model.", layer_kinds(config, 9)).lost == ("model.layers.4.self_attn.o_proj.weight",)


def test_a_text_with_a_letter_for_each_layer_tells_their_kinds() -> None:
    assert layer_kinds({"hybrid_override_pattern": "M*M-"}, 4) == (("'M'",), ("'*'",), ("'M'",), ("'-'",))


def test_layers_after_the_last_one_are_drafts_only_if_they_have_tensors_of_their_own() -> None:
    tensors = plain(6)
    tensors["model.layers.5.eh_proj.weight"] = (32, 64)

    assert suspects_of(tensors, "model.", same(4)).surplus_layers == ("model.layers.4",)


def test_a_body_that_is_not_the_part_that_config_counts_has_lost_no_layer() -> None:
    tensors = {**plain(4, "vision.layers."), **plain(6, "text.layers.")}

    assert suspects_of(tensors, "vision.", same(6)).lost_layers == ()


def test_without_a_number_in_config_no_layer_is_missed() -> None:
    tensors = {name: shape for name, shape in plain(6).items() if ".layers.2." not in name}

    assert suspects_of(tensors, "model.", ()).lost_layers == ()


SHARED_KV = {
    name: shape
    for name, shape in plain(6).items()
    if ".layers.5." not in name or name.rpartition(".")[0][-6:] not in ("k_proj", "v_proj")
}


@pytest.mark.parametrize(
    ("tensors", "config", "layers"),
    [
        pytest.param(hybrid(16), {}, 16, id="hybrid"),
        pytest.param(hybrid(5, every=5), {}, 5, id="one layer of full attention"),
        pytest.param(SHARED_KV, {"num_kv_shared_layers": 1}, 6, id="one layer that shares keys and values"),
        pytest.param(SHARED_KV, {"attention_layers": [1, 1, 1, 1, 1, 0]}, 6, id="a list with an entry for each layer"),
        pytest.param(SHARED_KV, {"mlp_only_layers": [5]}, 6, id="a list of layers"),
        pytest.param({**plain(6), **{f"model.layers.2.{name}": (128, 128) for name in FULL}}, {}, 6, id="larger heads"),
        pytest.param(
            {**plain(6), **{f"model.layers.{layer}.gate.previous": (1,) for layer in range(1, 6)}},
            {},
            6,
            id="a parameter for what the layer before gives",
        ),
        pytest.param(
            {**plain(2, "model.L.layers."), **plain(2, "model.H.layers.")},
            {},
            16,
            id="two stacks that are run in turns",
        ),
        pytest.param({**plain(4, "vision.layers."), **plain(6, "model.layers.")}, {}, 6, id="a tower of fewer layers"),
        pytest.param({**plain(6), "model.layers.0.bias.weight": (3,)}, {}, 6, id="more in the first layer"),
        pytest.param(
            {f"model.layers.{layer}.mlp.up_proj.weight": (8 + layer, 8) for layer in range(6)}, {}, 6, id="all unlike"
        ),
    ],
)
def test_layers_that_differ_for_a_reason_are_no_faults(
    tensors: PlainTensors, config: dict[str, object], layers: int
) -> None:
    body = "model.L." if "model.L.layers.0.input_layernorm.weight" in tensors else "model."
    suspects = suspects_of(tensors, body, layer_kinds(config, layers))

    assert (suspects.lost, suspects.misshapen, suspects.lost_layers, suspects.surplus_layers) == ((), {}, (), ())


def test_blocks_of_several_stages_are_compared_within_their_stage() -> None:
    tensors: PlainTensors = {
        f"vision.layers.{stage}.blocks.{block}.attn.qkv.weight": (3 * 8 * 2**stage, 8 * 2**stage)
        for stage, depth in enumerate((18, 18, 18, 2))
        for block in range(depth)
    }

    suspects = suspects_of(tensors, "model.", ())

    assert (suspects.lost, suspects.misshapen) == ((), {})
