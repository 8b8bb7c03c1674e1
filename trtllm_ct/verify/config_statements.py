"""config.json of a converted directory against that of the source: every key must say what the source says.

An engine builds its model from this file; a wrong number gives no error. A conversion may leave out the quantization,
name the dtype, state a tie, and add other spellings of what the source says. The tables here list all of that, and are
written apart from the code that makes the file. Any other key that is changed, removed or added is a fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.verify.other_spellings import is_other_spelling, same_json
from trtllm_ct.verify.source.decoders import is_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.verify.matching import DirectoryMatch

__all__ = ["TIE", "check_config"]

TIE = "tie_word_embeddings"
_ABSENT = object()
_QUANTIZATION = frozenset({"quantization_config", "compression_config"})
_DTYPES = frozenset({"dtype", "torch_dtype"})
_TEXT = "text_config"
_PART = "_config"
# Classes whose text model is at the top level in releases of transformers before 4.56, and for TensorRT-LLM 1.0
# (`modeling_qwen2vl.py: Qwen2VLModelBase`): the keys of `text_config` may be there too.
_FLAT = frozenset({"qwen2_vl", "qwen2_5_vl"})


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
    """Yield the path of each key that differs, with what was expected and what was found.

    `dtypes` are those that the text model may have; None for any, and the empty set where only the source decides.
    """
    for key in dict.fromkeys((*source, *found)):
        inner, value = source.get(key), found.get(key, _ABSENT)
        if key.endswith(_PART) and key not in _QUANTIZATION and isinstance(inner, Mapping) and isinstance(value, dict):
            yield from _differences(inner, value, dtypes if key == _TEXT else frozenset(), f"{path}{key}.")
        elif (expected := _expected(key, value, source, dtypes)) is not None:
            yield f"{path}{key}", expected, value


def _expected(key: str, value: Any, source: Mapping[str, Any], dtypes: frozenset[str] | None) -> str | None:
    """Return what a key should be, in words, if its value doesn't say what the source says; None if it does."""
    is_text = dtypes is None or bool(dtypes)
    if key in _QUANTIZATION:
        return None if value is _ABSENT else "no such key: these weights have another quantization, or none"
    said = f"{_shown(source[key])}, as the source says" if key in source else "no such key, as in the source"
    if value is _ABSENT:
        return said if source[key] is not None else None
    if key == TIE and is_text:
        return None
    if key in _DTYPES and is_text:
        fits = dtypes is None or (isinstance(value, str) and value in dtypes)
        return None if fits else f"{' or '.join(sorted(dtypes or ()))}, as the weights have it"
    levels = _with_text(source) if source.get(key) is None else source
    if key in levels and same_json(levels[key], value):
        return None
    return None if is_other_spelling(key, value, levels) else said


def _with_text(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration, with the keys of its text model if the class may have them at the top level."""
    text = source.get(_TEXT)
    flat = source.get("model_type") in _FLAT and isinstance(text, Mapping)
    return {**text, **source} if flat and isinstance(text, Mapping) else source


def _dtypes(match: DirectoryMatch, source: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the dtypes that config.json may name; None if it may name any.

    A conversion may give the dequantized weights another dtype than that of the source. Without quantization the whole
    model then has it. Float16 always is the dtype of the whole model. A model may compute in bfloat16 whatever its
    source says: `--dtype` asks for it, some classes and kernels know nothing else, and none computes in float32.
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
            # A directory without modes may be one whose modules had to be dequantized: the model then keeps its dtype.
            kept = set() if DType.F16 in dequantized else {stated}
            return frozenset({dtype.torch_name for dtype in dequantized} | kept)
    bfloat16 = DType.BF16.torch_name
    if {after for _, after in plain} != {DType.F16}:
        return frozenset({bfloat16 if stated == DType.F32.torch_name else stated, bfloat16})
    cast = any(before is not DType.F16 for before, _ in plain)
    return frozenset({DType.F16.torch_name} if cast else {DType.F16.torch_name, stated, bfloat16})


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


def _shown(value: Any) -> str:
    """Return the beginning of a value's JSON form."""
    text = "no such key" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _add(faults: FaultCollector, out: Path, key: str, expected: str, found: str) -> None:
    faults.add(
        where=f"{out}/config.json" + f": {key}" * bool(key),
        expected=expected,
        found=found,
        remedy="Convert again; an engine would build another model than that of the source.",
    )
