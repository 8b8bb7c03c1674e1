"""What names mean: every spelling of one module has one key."""

from __future__ import annotations

import pytest

from trtllm_ct.verify.source.names import BODIES, Names, is_expert

LLAMA = Names(model_type="llama", native=False, multimodal=False, latent=False)
MIXTRAL = Names(model_type="mixtral", native=False, multimodal=False, latent=False)
NATIVE = Names(model_type="mixtral", native=True, multimodal=True, latent=False)
LATENT = Names(model_type="deepseek_v3", native=False, multimodal=False, latent=True)


@pytest.mark.parametrize("body", BODIES)
def test_the_place_of_the_text_model_means_nothing(body: str):
    assert LLAMA.key(f"{body}layers.3.self_attn.q_proj") == "layers.3.self_attn.q_proj"
    assert LLAMA.key(f"{body}embed_tokens") == "embed_tokens"
    assert LLAMA.key(f"{body}norm") == "norm"


@pytest.mark.parametrize("name", ["lm_head", "language_model.lm_head", "model.language_model.lm_head"])
def test_the_head_has_one_key(name: str):
    assert LLAMA.key(name) == "lm_head"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.block_sparse_moe.experts.12.w3",
        "model.layers.0.block_sparse_moe.experts.12.up_proj",
        "model.layers.0.mlp.experts.12.up_proj.base_layer",
    ],
)
def test_an_expert_has_one_key(name: str):
    assert MIXTRAL.key(name) == "layers.0.mlp.experts.12.up"
    assert is_expert(MIXTRAL.key(name))


@pytest.mark.parametrize(
    ("native", "key"),
    [
        ("tok_embeddings", "embed_tokens"),
        ("output", "lm_head"),
        ("layers.1.attention.wv", "layers.1.self_attn.v_proj"),
        ("layers.1.attention.k_fake_quantizer", "layers.1.self_attn"),
        ("layers.1.ffn_norm", "layers.1.post_attention_layernorm"),
        ("layers.1.feed_forward.w1", "layers.1.mlp.gate_proj"),
        ("layers.1.feed_forward.w2", "layers.1.mlp.down_proj"),
        ("layers.1.feed_forward.w3", "layers.1.mlp.up_proj"),
        ("layers.1.experts.4.w1", "layers.1.mlp.experts.4.gate"),
        ("layers.1.feed_forward.experts.4.w2", "layers.1.mlp.experts.4.down"),
        ("layers.1.gate", "layers.1.mlp.gate"),
        (
            "vision_encoder.transformer.layers.0.attention.wk",
            "other:vision_tower.transformer.layers.0.attention.k_proj",
        ),
        ("vision_language_adapter.w_in", "other:multi_modal_projector.linear_1"),
    ],
)
def test_mistrals_own_names(native: str, key: str):
    assert NATIVE.key(native) == key


@pytest.mark.parametrize("name", ["model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"])
def test_a_tower_is_no_part_of_the_text_model(name: str):
    assert LLAMA.key(name) == "other:visual.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("names", "key", "linear"),
    [
        (LLAMA, "layers.0.self_attn.k_proj", "qkv"),
        (LLAMA, "layers.0.mlp.up_proj", "gate_up"),
        (LLAMA, "layers.0.self_attn.o_proj", None),
        (LLAMA, "layers.0.mlp.down_proj", None),
        (LLAMA, "layers.0.mlp.experts.0.up", None),
        (LLAMA, "other:visual.up_proj", None),
        (LATENT, "layers.0.self_attn.q_proj", None),
        (LATENT, "layers.0.mlp.gate_proj", "gate_up"),
    ],
)
def test_which_modules_an_engine_fuses(names: Names, key: str, linear: str | None):
    fused = names.fused_linear(key)

    assert (fused is None) is (linear is None)


def test_parts_of_one_linear_share_their_scalars():
    q, k, v = (LLAMA.sharing_scalars(f"layers.0.self_attn.{letter}_proj") for letter in "qkv")
    gate, up, down = (MIXTRAL.sharing_scalars(f"layers.0.mlp.experts.7.{name}") for name in ("gate", "up", "down"))

    assert q == k == v != LLAMA.sharing_scalars("layers.1.self_attn.q_proj")
    assert gate == up != down


@pytest.mark.parametrize(
    ("names", "module", "bad"),
    [
        (MIXTRAL, "model.layers.0.block_sparse_moe.experts.0.w1", False),
        (MIXTRAL, "model.layers.0.block_sparse_moe.experts.0.gate_proj", True),
        (LLAMA, "model.layers.0.mlp.experts.0.gate_proj", False),
        (LLAMA, "model.layers.0.mlp.experts.0.w1", True),
        (LLAMA, "model.layers.0.mlp.gate_proj", False),
    ],
)
def test_experts_have_the_names_that_their_class_reads(names: Names, module: str, bad: bool):
    assert (names.misspelled(module) is not None) is bad


def test_modules_are_in_the_order_of_the_model():
    keys = [
        "embed_tokens",
        "layers.0.input_layernorm",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.experts.2.gate",
        "layers.0.mlp.experts.2.down",
        "layers.0.mlp.experts.10.gate",
        "layers.2.self_attn.q_proj",
        "layers.10.self_attn.q_proj",
        "norm",
        "lm_head",
        "other:visual.x",
    ]

    shuffled = [*keys[1::2], *keys[::2]]
    assert sorted(shuffled, key=LLAMA.order) == keys


def test_cache_scales_are_read_for_projections_of_keys_and_values_only() -> None:
    phi3 = Names(model_type="phi3", native=False, multimodal=False, latent=False)
    assert [names.cache_scales_are_read for names in (LLAMA, MIXTRAL, LATENT, phi3)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("local", "siblings", "meaning"),
    [
        ("qscale_weight", ["weight", "qscale_weight"], "weight_scale"),
        ("qscale_act", ["weight", "qscale_act"], "input_scale"),
        # Then both names stay what they are, and one of the tensors is refused.
        ("qscale_weight", ["weight", "weight_scale", "qscale_weight"], "qscale_weight"),
        ("weight_packed", ["weight_packed"], "weight_packed"),
        ("weight_scale_inv", ["weight", "weight_scale_inv"], "weight_scale"),
        ("weight_scale_inv", ["weight", "weight_scale", "weight_scale_inv"], "weight_scale_inv"),
    ],
)
def test_what_the_name_of_a_tensor_means_in_mistrals_own_form(local: str, siblings: list[str], meaning: str):
    assert NATIVE.tensor("layers.1.attention.wv", local, siblings) == meaning


def test_a_layer_is_listed_norms_first_then_attention_then_the_mlp():
    keys = [
        "embed_tokens",
        "layers.0.input_layernorm",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.mlp.shared_expert_gate",
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.down_proj",
        "layers.1.input_layernorm",
    ]

    assert sorted(set(keys), key=LLAMA.order) == keys
