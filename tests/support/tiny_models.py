"""Tiny models of every family: their config.json, and which modules of which sizes they have.

Written down from transformers 5.23 `models/*/modeling_*.py` and the files that its models are saved as; nothing here
uses the tables of the package under test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "MistralForCausalLM": {"model_type": "mistral"},
    "Qwen2ForCausalLM": {"model_type": "qwen2"},
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
    "GraniteForCausalLM": {"model_type": "granite"},
    "Gemma2ForCausalLM": {"model_type": "gemma2"},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text"},
    "Phi3ForCausalLM": {"model_type": "phi3", "pad_token_id": 0},
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64, **_EXPERTS},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", **_EXPERTS},
    "DeepseekV2ForCausalLM": {"model_type": "deepseek_v2", **_LATENT},
    "DeepseekV3ForCausalLM": {"model_type": "deepseek_v3", **_LATENT},
}
"""What a family's config.json has beside the sizes of `tiny_config`, by architecture; None leaves a key out."""

Linear = tuple[str, tuple[int, int], bool]
"""Name, (N, K) and whether there is a bias."""

_ROUTERS = frozenset({"gate", "shared_expert_gate"})


def tiny_config(
    architecture: str = "LlamaForCausalLM",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    vocabulary: int = 96,
    dtype: str = "bfloat16",
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A config.json as transformers 5 writes it; `more` are further keys, None among them leaves a key out."""
    config = {
        "architectures": [architecture],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        "dtype": dtype,
        "transformers_version": "5.23.0",
    }
    config |= FAMILIES.get(architecture, FAMILIES["LlamaForCausalLM"]) | more
    return {key: value for key, value in config.items() if value is not None}


def linears(config: Mapping[str, Any]) -> Iterator[Linear]:
    """Every Linear in the order of the model, routers and the head included; routed experts one by one."""
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _latent_attention(config, prefix) if "kv_lora_rank" in config else _attention(config, prefix)
        yield from _experts(config, prefix) if _has_experts(config, layer) else _mlp(config, f"{prefix}.mlp")
    if not config["tie_word_embeddings"]:
        yield "lm_head", (config["vocab_size"], config["hidden_size"]), False


def norms(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Name and size of every norm."""
    kind, hidden = config["model_type"], config["hidden_size"]
    sandwich = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if kind.startswith("gemma") else ()
    heads = ("q_norm", "k_norm") if kind.startswith("qwen3") or kind == "gemma3_text" else ()
    latent = {f"{name}_a_layernorm": f"{name}_lora_rank" for name in ("q", "kv") if config.get(f"{name}_lora_rank")}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", *sandwich):
            yield f"{prefix}.{name}", hidden
        for name in heads:
            yield f"{prefix}.self_attn.{name}", config["head_dim"]
        for name, size in latent.items():
            yield f"{prefix}.self_attn.{name}", config[size]
    yield "model.norm", hidden


def score_corrections(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The routers' biases of DeepSeek-V3, float32 in its files."""
    if config["model_type"] == "deepseek_v3":
        for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
            yield f"model.layers.{layer}.mlp.gate.e_score_correction_bias", config["n_routed_experts"]


def never_quantized(module: str) -> bool:
    """Whether every writer leaves a Linear plain unless it is told otherwise: heads and routers."""
    return module == "lm_head" or module.rpartition(".")[2] in _ROUTERS


def _attention(config: Mapping[str, Any], prefix: str) -> Iterator[Linear]:
    kind, hidden = config["model_type"], config["hidden_size"]
    heads, kv_heads = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    bias = bool(config.get("attention_bias"))
    if kind == "phi3":
        yield f"{prefix}.self_attn.qkv_proj", (heads + 2 * kv_heads, hidden), False
    else:
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield (
                f"{prefix}.self_attn.{name}_proj",
                (rows, hidden),
                bias or kind in {"qwen2", "qwen2_moe", "qwen2_vl_text"},
            )
    yield f"{prefix}.self_attn.o_proj", (hidden, heads), bias


def _latent_attention(config: Mapping[str, Any], prefix: str) -> Iterator[Linear]:
    """Queries and keys with and without rotary positions, from vectors of a low rank."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    bias = bool(config.get("attention_bias"))
    if config.get("q_lora_rank"):
        yield f"{prefix}.self_attn.q_a_proj", (config["q_lora_rank"], hidden), bias
        yield f"{prefix}.self_attn.q_b_proj", (heads * (nope + rope), config["q_lora_rank"]), False
    else:
        yield f"{prefix}.self_attn.q_proj", (heads * (nope + rope), hidden), False
    yield f"{prefix}.self_attn.kv_a_proj_with_mqa", (rank + rope, hidden), bias
    yield f"{prefix}.self_attn.kv_b_proj", (heads * (nope + value), rank), False
    yield f"{prefix}.self_attn.o_proj", (hidden, heads * value), bias


def _mlp(config: Mapping[str, Any], prefix: str, inner: int | None = None) -> Iterator[Linear]:
    hidden, inner = config["hidden_size"], inner or config["intermediate_size"]
    bias = bool(config.get("mlp_bias"))
    if config["model_type"] == "phi3":
        yield f"{prefix}.gate_up_proj", (2 * inner, hidden), False
    else:
        yield f"{prefix}.gate_proj", (inner, hidden), bias
        yield f"{prefix}.up_proj", (inner, hidden), bias
    yield f"{prefix}.down_proj", (hidden, inner), bias


def _has_experts(config: Mapping[str, Any], layer: int) -> bool:
    count = {"num_local_experts", "num_experts", "n_routed_experts"} & config.keys()
    listed = layer in config.get("mlp_only_layers", ()) or (layer + 1) % config.get("decoder_sparse_step", 1) != 0
    return bool(count) and layer >= config.get("first_k_dense_replace", 0) and not listed


def _experts(config: Mapping[str, Any], prefix: str) -> Iterator[Linear]:
    """The router, the experts that every token takes, and the routed ones."""
    kind, hidden = config["model_type"], config["hidden_size"]
    prefix += ".block_sparse_moe" if kind == "mixtral" else ".mlp"
    inner = config["intermediate_size"] if kind == "mixtral" else config["moe_intermediate_size"]
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    count = next(config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config)
    yield f"{prefix}.gate", (count, hidden), False
    if kind == "qwen2_moe":
        yield from _mlp(config, f"{prefix}.shared_expert", config["shared_expert_intermediate_size"])
        yield f"{prefix}.shared_expert_gate", (1, hidden), False
    elif "n_shared_experts" in config:
        yield from _mlp(config, f"{prefix}.shared_experts", inner * config["n_shared_experts"])
    for expert in range(count):
        for name, shape in ((gate, (inner, hidden)), (up, (inner, hidden)), (down, (hidden, inner))):
            yield f"{prefix}.experts.{expert}.{name}", shape, False
