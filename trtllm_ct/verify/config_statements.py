"""config.json of a converted directory against that of the source: every key must say what the source says.

An engine builds its model from this file; a wrong number gives no error. A conversion may leave out the quantization,
name the dtype, state a tie, and add other spellings of what the source says. The tables here list all of that, and are
written apart from the code that makes the file. Any other key that is changed, removed or added is a fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.verify.rotary import ROTARY_KEYS, says_the_same
from trtllm_ct.verify.source.decoders import is_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.verify.matching import DirectoryMatch

__all__ = ["TIE", "check_config"]

TIE = "tie_word_embeddings"
_QUANTIZATION = frozenset({"quantization_config", "compression_config"})
_DTYPES = frozenset({"dtype", "torch_dtype"})
_TEXT = "text_config"
# Keys that mean the same: releases of transformers, and the classes of TensorRT-LLM, read one or the other.
# Sources: transformers 5.23 `attribute_map` in `models/*/configuration_*.py`; TensorRT-LLM
# `_torch/models/modeling_{mixtral,qwen_moe,deepseekv3,gemma3,nemotron_h}.py`.
_SAME_MEANING = (
    frozenset({"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}),
    frozenset({"num_experts_per_tok", "num_experts_per_token", "moe_topk"}),
    frozenset({"hidden_act", "hidden_activation"}),
    frozenset({"rms_norm_eps", "layer_norm_epsilon"}),
)
# The kinds of layers of Nemotron-H, as one character each or by name: transformers 5.23
# `models/nemotron_h/configuration_nemotron_h.py`.
_PATTERN, _KINDS = "hybrid_override_pattern", "layers_block_type"
_KIND_OF: Mapping[str, str] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def check_config(
    match: DirectoryMatch, source: Mapping[str, Any], found: Mapping[str, Any], out: Path, faults: FaultCollector
) -> None:
    """Add a fault for each key of config.json that doesn't say what the source says.

    `source` and `found` are the config.json of both directories, and `out` is the converted one. Ties are checked with
    the tensors (`statements.py`).
    """
    if not (out / "config.json").is_file():
        _add(faults, out, "", "the configuration of the model", "no such file")
        return
    dtypes = _dtypes(match, source)
    for key, expected, value in _differences(source, found, dtypes, ""):
        _add(faults, out, key, expected, _shown(value))


def _differences(
    source: Mapping[str, Any], found: Mapping[str, Any], dtypes: frozenset[str] | None, path: str
) -> Iterator[tuple[str, str, Any]]:
    """Yield the path of each key that differs, with what was expected and what was found."""
    for key in dict.fromkeys((*source, *found)):
        name, value = f"{path}{key}", found.get(key)
        if key in _QUANTIZATION:
            if key in found:
                yield name, "no such key, since the source's quantization is not that of these weights", value
        elif key in _DTYPES:
            if dtypes is not None and key in found and value not in dtypes:
                yield name, f"{' or '.join(sorted(dtypes))}, as the weights have it", value
            elif key in source and key not in found:
                yield name, f"a dtype, {_shown(source[key])} in the source", "no such key"
        elif key == _TEXT and isinstance(source.get(key), Mapping) and isinstance(value, Mapping):
            yield from _differences(source[key], value, dtypes, f"{name}.")
        elif key == TIE and key in found:
            continue
        elif key in source and key not in found:
            if source[key] is not None:
                yield name, f"{_shown(source[key])}, as the source says", "no such key"
        elif key in source and _same(source[key], value):
            continue
        elif not _is_other_spelling(key, value, source):
            said = f"{_shown(source[key])}, as the source says" if key in source else "no such key, as in the source"
            yield name, said, value


def _is_other_spelling(key: str, value: Any, source: Mapping[str, Any]) -> bool:
    """Whether a key that is new, or has another value than in the source, says what other keys of the source say."""
    if key in ROTARY_KEYS:
        return says_the_same(key, value, source)
    if source.get(key) is not None:
        return False
    for keys in _SAME_MEANING:
        if key in keys:
            return any(_same(source[other], value) for other in keys if source.get(other) is not None)
    if key == _PATTERN:
        return _kinds(value) is not None and _kinds(value) == _kinds(source.get(_KINDS))
    if key == _KINDS:
        return _kinds(value) is not None and _kinds(value) == _kinds(source.get(_PATTERN))
    return False


def _kinds(layers: Any) -> list[str] | None:
    """Return the names of the kinds of layers; None for a value that is no list of them."""
    if isinstance(layers, str):
        return [_KIND_OF.get(letter, letter) for letter in layers]
    return list(map(str, layers)) if isinstance(layers, list) else None


def _dtypes(match: DirectoryMatch, source: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the dtypes that config.json may name; None if it may name any.

    A conversion may give the dequantized weights another dtype than that of the source. Without quantization the whole
    model then has it. Float16 always is the dtype of the whole model.
    """
    text = source.get(_TEXT)
    levels = (text, source) if isinstance(text, Mapping) else (source,)
    name = next((level[key] for level in levels for key in sorted(_DTYPES) if level.get(key)), "bfloat16")
    stated = str(name).removeprefix("torch.")
    plain, dequantized = _plain_dtypes(match)
    if match.quant_config.quant_algo is None:
        if not any(is_quantized(module.tensors) for module in match.source.by_key.values()):
            return None
        if dequantized:
            return frozenset(dtype.torch_name for dtype in dequantized)
    if {after for _, after in plain} != {DType.F16}:
        return frozenset({stated})
    cast = any(before is not DType.F16 for before, _ in plain)
    return frozenset({DType.F16.torch_name} if cast else {DType.F16.torch_name, stated})


def _plain_dtypes(match: DirectoryMatch) -> tuple[frozenset[tuple[DType, DType]], frozenset[DType]]:
    """Return the dtypes of plain weights, in the source and in the converted directory, and those of dequantized ones.

    Only floats of 16 bits and more count.
    """
    plain, dequantized = set(), set()
    for key, module in match.delivered.by_key.items():
        source, weight = match.source.by_key.get(key), module.tensors.get("weight")
        if source is None or weight is None or not weight.dtype.is_wide_float:
            continue
        if is_quantized(source.tensors):
            dequantized.add(weight.dtype)
        elif "weight" in source.tensors:
            plain.add((source.tensors["weight"].dtype, weight.dtype))
    return frozenset(plain), frozenset(dequantized)


def _same(first: Any, second: Any) -> bool:
    """Whether two JSON values are the same; 1, 1.0 and true are not, and NaN is."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def _shown(value: Any) -> str:
    """Return the beginning of a value's JSON form; a message is passed on as it is."""
    text = value if value == "no such key" else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _add(faults: FaultCollector, out: Path, key: str, expected: str, found: str) -> None:
    faults.add(
        where=f"{out}/config.json" + f": {key}" * bool(key),
        expected=expected,
        found=found,
        remedy="Convert again; an engine would build another model than that of the source.",
    )
