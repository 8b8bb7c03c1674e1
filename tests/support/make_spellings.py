"""Write what one release of transformers calls the keys of config.json to `spellings.json`, beside those of others.

    python tests/support/make_spellings.py

It is run once in an environment of each release that the table shall have; other releases' parts are kept. For each
class it stores a configuration whose values are not the defaults, as this release writes it (`document`), the names
that the class takes (`parameters`), and what it reads from the document beside what stands there (`values`).
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "config" / "spellings.json"

MODEL_TYPES = (
    "afmoe", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "exaone4", "gemma2",
    "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4_moe", "glm_moe_dsa", "gpt_oss", "granite",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl", "kimi_k25", "laguna", "llama", "llama4", "llama4_text", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "minimax_m2", "ministral3", "mistral", "mistral3", "mixtral",
    "mllama", "nemotron", "nemotron_h", "olmo3", "phi3", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_moe",
    "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "starcoder2", "step3p5",
)  # fmt: skip
"""The classes with rows, the text models of wrappers, and others that have parameters by kind of layer."""

# Their older keys are made from lists of kinds of layers.
_LISTED = frozenset({"deepseek_v4", "nemotron_h"})
_MOST = 4

SECTIONS = {"mrope_section": [24, 20, 20]}
SCALING = {"rope_type": "linear", "factor": 8.0}
# Kept as they are: other keys would have to fit to them.
_KEPT = frozenset({"num_hidden_layers", "partial_rotary_factor", "model_type", "vision_config", "num_labels"})


def values_of(config: Any) -> dict[str, Any]:
    """Return what a typed configuration means: its sizes and flags, and its rotary embedding as `rope_of` gives it."""
    generic = _generic()
    values = {name: v for name, v in _attributes(config).items() if name not in generic and _is_plain(name, v)}
    text = getattr(config, "text_config", None)
    inner = {"text_config": values_of(text)} if hasattr(text, "to_dict") else {}
    return values | inner | {"rope": rope_of(config)}


def rope_of(config: Any) -> dict[str, Any] | None:
    """Return theta, the theta of sliding layers, the rotated part and the scaling, whatever their spelling is."""
    block = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in block.values()):
        full, sliding = block.get("full_attention"), block.get("sliding_attention") or {}
        if full is None:
            return dict(block)
        return _rope(full, sliding.get("rope_theta"))
    if block:
        return _rope(block, None)
    if getattr(config, "rope_theta", None) is None:
        return None
    partial = getattr(config, "partial_rotary_factor", None)
    older = {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": config.rope_theta}
    return _rope(older | ({"partial_rotary_factor": partial} if partial else {}), _attributes(config).get("local"))


def _rope(block: dict[str, Any], local: float | None) -> dict[str, Any]:
    apart = ("rope_theta", "partial_rotary_factor", "type")
    scaling = {key: value for key, value in block.items() if key not in apart and value != "default"}
    return {
        "theta": block.get("rope_theta"),
        "local": local,
        "partial": block.get("partial_rotary_factor") or 1.0,
        "scaling": scaling,
    }


def _attributes(config: Any) -> dict[str, Any]:
    """Return the attributes of a typed configuration by every name that its class has for them."""
    names = {*inspect.signature(type(config).__init__).parameters, *type(config).attribute_map, *vars(config)}
    found = {}
    for name in names | {"hybrid_override_pattern"}:
        try:
            found[name] = getattr(config, name)
        except Exception:  # noqa: BLE001 (classes raise errors of their own for values that layers differ in)
            continue
    return found | {"local": found.get("rope_local_base_freq")}


def _is_plain(name: str, value: Any) -> bool:
    if name.startswith(("_", "rope_", "partial_rotary")) or name in {"model_type", "local"}:
        return False
    return isinstance(value, bool | int | float | str) or (isinstance(value, list) and bool(value))


def _generic() -> set[str]:
    """Return the keys that every configuration of this release has."""
    from transformers import PretrainedConfig

    return PretrainedConfig().to_dict().keys() - {"model_type"}


def document_of(config_class: Any) -> dict[str, Any]:
    """Return a configuration with values that are not the defaults, as this release writes it."""
    stored = plain(config_class().to_dict())
    written = config_class.from_dict(_changed(stored)).to_dict()
    document = _without(plain(written), {*_generic(), "vision_config"})
    return document if document["model_type"] in _LISTED else _short(document)


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "text_config" and isinstance(value, dict):
            changed[key] = _changed(value)
        elif key in _KEPT or key.startswith("_") or isinstance(value, bool):
            changed[key] = value
        elif isinstance(value, int) and value > 0 and not key.endswith("token_id"):
            changed[key] = 2 * value
        elif isinstance(value, float):
            changed[key] = value / 2
        else:
            changed[key] = value
    return changed | _rotary(changed)


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Return a rotary embedding of which neither theta nor scaling is the default, in the spelling of the release."""
    more = SECTIONS if "_vl" in config["model_type"] else SCALING
    if config["model_type"] == "phi3":
        more = {}
    block = copy.deepcopy(config.get("rope_parameters"))
    if not isinstance(block, dict):
        return {"rope_scaling": {"rope_type": "default", **more}} if more and "rope_scaling" in config else {}
    for part in [value for value in block.values() if isinstance(value, dict)] or [block]:
        part["rope_theta"] = 2 * part.get("rope_theta", 10000.0)
    scaled = block.get("full_attention", block)
    if isinstance(scaled, dict) and scaled.get("rope_type", "default") == "default" and "main" not in block:
        scaled |= more
    return {"rope_parameters": block}


def _without(config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in keys}
    return {key: _without(value, keys) if key == "text_config" else value for key, value in kept.items()}


def _short(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without long lists, which classes fill in themselves."""
    kept = {key: value for key, value in config.items() if not isinstance(value, list) or len(value) <= _MOST}
    return {key: _short(value) if key == "text_config" else value for key, value in kept.items()}


def beside(values: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Return the values that do not stand in the document under the same name."""
    kept = {name: value for name, value in values.items() if document.get(name) != value and not _is_long(value)}
    if "text_config" in values:
        kept["text_config"] = beside(values["text_config"], document["text_config"])
    return kept


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(value) > _MOST


def main() -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    classes = {}
    for model_type in (name for name in MODEL_TYPES if name in CONFIG_MAPPING_NAMES):
        config_class = CONFIG_MAPPING[model_type]
        document = document_of(config_class)
        classes[model_type] = {
            "parameters": sorted(set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}),
            "document": document,
            "values": beside(plain(values_of(config_class.from_dict(copy.deepcopy(document)))), document),
        }
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[transformers.__version__] = classes
    lines = [f"{json.dumps(release)}: {_lines(part)}" for release, part in table.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _lines(classes: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in classes.items()) + "\n}"


if __name__ == "__main__":
    main()
