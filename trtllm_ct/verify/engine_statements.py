"""What config.json of an engine-build checkpoint says, against the source: sizes, embedding, and how codes are read.

An engine is built from these numbers; a wrong one gives no error. They are read here from the source's config.json by
the keys that it has, apart from what wrote the directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.verify.engine_rope import rope_of_engine, rope_of_source

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.base.errors import FaultCollector

__all__ = ["compare_statements"]

# The key of config.json of an engine, and the key of the source that has the same value.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "head_size": "head_dim",
}
_FIXED = {"position_embedding_type": "rope_gpt_neox", "logits_dtype": "float32"}
_ACTIVATIONS = {"silu": {"silu", "swiglu"}}
_QUANTIZATION = frozenset(
    {"quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "exclude_modules"}
    | {"smoothquant_val", "clamp_val", "use_meta_recipe"}
)
_PLAIN_INT8 = "W8A16"
_MIXED = "MIXED_PRECISION"


def compare_statements(source: Mapping[str, Any], engine: Mapping[str, Any], out: Path, faults: FaultCollector) -> None:
    """Add a fault for each statement that contradicts the source, and for each file that is none of the directory.

    `source` and `engine` are the config.json of both; `out` is the directory.
    """
    expected: dict[str, Any] = {key: source[name] for key, name in _SAME.items() if source.get(name) is not None}
    expected |= _FIXED | {"architecture": (source.get("architectures") or [None])[0]}
    quantization = engine["quantization"]
    if quantization["quant_algo"] == _PLAIN_INT8:
        expected["disable_weight_only_quant_plugin"] = True
    for key, value in expected.items():
        _compare(out, key, value, engine.get(key), faults)
    for key in _SAME.keys() - expected.keys():
        _require_number(out, key, engine.get(key), faults)
    _compare(out, "moe", _experts(source), engine.get("moe"), faults)
    rope, built = rope_of_source(source), rope_of_engine(engine)
    _compare(out, "rotary_base", rope.pop("base"), built.pop("base"), faults)
    for key, value in rope.items() if rope["kind"] == built["kind"] else [("kind", rope["kind"])]:
        _compare(out, f"rotary_scaling.{key}", value, built.get(key), faults)
    activation = str(source.get("hidden_act") or "silu")
    if engine.get("hidden_act") not in _ACTIVATIONS.get(activation, {activation}):
        _compare(out, "hidden_act", activation, engine.get("hidden_act"), faults)
    for key in quantization.keys() - _QUANTIZATION:
        _compare(out, f"quantization.{key}", "no such key", quantization[key], faults)
    _refuse_other_files(out, engine, mixed=quantization["quant_algo"] == _MIXED, faults=faults)


def _experts(source: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the block of routed experts that an engine must have; probabilities of the chosen ones add up to 1."""
    if source.get("num_local_experts") is None and "Mixtral" not in (source.get("architectures") or [""])[0]:
        return None
    experts, chosen = source.get("num_local_experts") or 8, source.get("num_experts_per_tok") or 2
    return {"num_experts": experts, "top_k": chosen, "normalization_mode": 1}


def _require_number(out: Path, key: str, found: object, faults: FaultCollector) -> None:
    """Add a fault for a key that the source leaves to its class, and whose value is no number."""
    if not isinstance(found, int | float) or isinstance(found, bool):
        faults.add(
            where=f"{out}: config.json: {key}",
            expected="a number: engines have other defaults than the class of the source",
            found=str(found),
            remedy="Convert again into an empty directory.",
        )


def _compare(out: Path, key: str, expected: object, found: object, faults: FaultCollector) -> None:
    if expected != found:
        faults.add(
            where=f"{out}: config.json: {key}",
            expected=f"{expected}, as the source says",
            found=str(found),
            remedy="Convert again into an empty directory.",
        )


def _refuse_other_files(out: Path, engine: Mapping[str, Any], *, mixed: bool, faults: FaultCollector) -> None:
    """Add a fault for each visible file that a directory of so many ranks doesn't have."""
    names = {"config.json"} | ({"quant_cfg.json"} if mixed else set())
    names |= {f"rank{rank}.safetensors" for rank in range(int(engine["mapping"]["world_size"]))}
    for path in sorted(out.iterdir()):
        if path.name not in names and not path.name.startswith("."):
            faults.add(
                where=str(path),
                expected="only config.json and a file for each rank",
                found="another file, which may be of another conversion",
                remedy="Delete it, or convert again into an empty directory.",
            )
