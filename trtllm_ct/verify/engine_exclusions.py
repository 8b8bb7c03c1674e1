"""Which modules of an engine `exclude_modules` leaves plain, by both of its readers.

The quantization pass compares the names of all modules with the patterns by `fnmatchcase`, and an empty list counts as
none (TensorRT-LLM `quantization/quantize.py: quantize_layers`, read on 2026-11-29). The loader takes exact names and a
trailing asterisk only (`models/modeling_utils.py: QuantConfig._get_quant_cfg`), and for W8A16 it compares the names of
tensors (`models/convert_utils.py: weight_only_quantize_dict`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["exclusion_problems", "is_excluded"]

_ALWAYS = ("lm_head", "transformer.vocab_embedding")
_LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
_WHOLE = ("", ".attention", ".mlp", ".input_layernorm", ".post_layernorm")
_BY_TENSOR = "W8A16"


def is_excluded(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether the quantization pass leaves a module as it is; nothing of a layer is in its own list."""
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def exclusion_problems(patterns: Sequence[str] | None, algo: str | None, count: int) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with `exclude_modules` of an engine with `count` layers in a stage, as (found, expected).

    Which Linears are plain is shown by their tensors. Everything else that the list decides is here: the head, the
    embedding and routers must be in it, no other module may, and both readers must agree about each Linear.
    """
    if patterns is None:
        return
    if algo is None or not patterns:
        yield str(patterns), "null, since it names no Linear"
        return
    layers = [f"transformer.layers.{layer}" for layer in range(count)]
    for name in (*_ALWAYS, *(f"{layer}.mlp.router" for layer in layers)):
        if not is_excluded(name, patterns):
            yield str(patterns), f"{name} in it: the list replaces that of the engine"
    for name in ("transformer.ln_f", *(layer + part for layer in layers for part in _WHOLE)):
        if is_excluded(name, patterns):
            yield str(patterns), f"{name} not in it: only Linears are plain"
    for name in (f"{layer}.{linear}" for layer in layers for linear in _LINEARS):
        by_pass = is_excluded(name, patterns)
        by_loader = any(
            name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])) for pattern in patterns
        )
        if by_pass is not by_loader:
            yield str(patterns), f"the name {name} or one asterisk at its end: the loader knows no other pattern"
        elif by_pass and algo == _BY_TENSOR and not is_excluded(f"{name}.weight", patterns):
            yield str(patterns), f"{name}*: the loader compares the list with names of tensors too"
