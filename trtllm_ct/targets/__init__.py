"""The table of targets, and the capabilities of the engine releases that they are made for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.errors import Fault, UsageError
from trtllm_ct.plan.target import Capabilities, Target
from trtllm_ct.schemes import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_ENGINE", "DENSE", "ENGINES", "MODELOPT", "REFERENCE", "TARGETS", "TENSORRT_LLM", "target_named"]

_LINEAR = frozenset(
    {
        QuantAlgo.W4A16,
        QuantAlgo.W4A16_AWQ,
        QuantAlgo.W8A16,
        QuantAlgo.FP8,
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        QuantAlgo.FP8_BLOCK_SCALES,
        QuantAlgo.NVFP4,
    }
)
# int4 weight-only and row-wise fp8 experts have no kernel: the first demands activation scales, the second is refused.
_EXPERTS = frozenset(
    {QuantAlgo.W8A16, QuantAlgo.FP8, QuantAlgo.FP8_BLOCK_SCALES, QuantAlgo.NVFP4, QuantAlgo.W4A16_MXFP4}
)
_NEWEST = frozenset({QuantAlgo.MXFP8, QuantAlgo.W4A16_NVFP4})
_FP8_CACHE = frozenset({"FP8"})

ENGINES: Mapping[str, Capabilities] = {
    entry.name: entry
    for entry in (
        Capabilities(
            name="stock-1.0",
            source="TensorRT-LLM late 2025, _torch/modules/linear.py and fused_moe/quantization.py",
            linear=_LINEAR,
            experts=_EXPERTS,
            kv_cache=_FP8_CACHE,
        ),
        Capabilities(
            name="stock-1.2",
            source="TensorRT-LLM early 2026, _torch/modules/linear.py and fused_moe/fused_moe_cutlass.py",
            linear=_LINEAR,
            experts=_EXPERTS,
            kv_cache=_FP8_CACHE,
        ),
        Capabilities(
            name="stock-1.3",
            source="TensorRT-LLM main of September 2026, _torch/modules/linear.py: get_quant_method",
            linear=_LINEAR | _NEWEST,
            experts=_EXPERTS | _NEWEST,
            kv_cache=_FP8_CACHE,
        ),
    )
}
"""Capability sets by name, oldest first. No release has a W4A16_GPTQ Linear."""

DEFAULT_ENGINE = "stock-1.2"
"""The newest stable line."""


def _newer(engine: str) -> tuple[Capabilities, ...]:
    """The sets that come after one."""
    names = list(ENGINES)
    return tuple(ENGINES[later] for later in names[names.index(engine) + 1 :])


def _with_additive_zeros(stock: Capabilities) -> Capabilities:
    """A set with the Linear for asymmetric int4 that this package gives the engine where it has none."""
    return replace(stock, linear=stock.linear | {QuantAlgo.W4A16_GPTQ})


_NOTHING = Capabilities(name="plain", source="plain weights need no capability")
_EVERYTHING = Capabilities(
    name="reference",
    source="trtllm_ct.reference.linear_layouts: LAYOUTS",
    linear=_LINEAR | _NEWEST | {QuantAlgo.W4A16_GPTQ},
    experts=_EXPERTS | _NEWEST,
    kv_cache=_FP8_CACHE,
    kv_cache_alone=True,
)

MODELOPT = Target(
    name="modelopt",
    serves="stock TensorRT-LLM, PyTorch backend, without a plug-in",
    capabilities=ENGINES[DEFAULT_ENGINE],
    newer=_newer(DEFAULT_ENGINE),
)
TENSORRT_LLM = Target(
    name="tensorrt_llm",
    serves="TensorRT-LLM, PyTorch backend, loaded by this package",
    capabilities=_with_additive_zeros(ENGINES[DEFAULT_ENGINE]),
    newer=tuple(map(_with_additive_zeros, _newer(DEFAULT_ENGINE))),
    repeats_kv_scales=True,
)
DENSE = Target(name="dense", serves="anything that reads plain Hugging Face weights", capabilities=_NOTHING)
REFERENCE = Target(name="reference", serves="the CPU reference engine of this package", capabilities=_EVERYTHING)

TARGETS: Mapping[str, Target] = {target.name: target for target in (MODELOPT, TENSORRT_LLM, DENSE, REFERENCE)}


def target_named(name: str, engine: str = DEFAULT_ENGINE, *, additive_zeros: bool = True) -> Target:
    """The entry of `TARGETS`; those for TensorRT-LLM with the capability set `engine` of `ENGINES`.

    `additive_zeros` says whether target `tensorrt_llm` may have a Linear for asymmetric int4 (`W4A16_GPTQ`).
    Raises `UsageError` that lists the names.
    """
    _require("target", name, TARGETS)
    _require("--engine", engine, ENGINES)
    target = TARGETS[name]
    if target not in (MODELOPT, TENSORRT_LLM):
        return target
    sets = (ENGINES[engine], *_newer(engine))
    if target is TENSORRT_LLM and additive_zeros:
        sets = tuple(map(_with_additive_zeros, sets))
    return replace(target, capabilities=sets[0], newer=sets[1:])


def _require(where: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        raise UsageError(Fault(where=where, expected=" or ".join(names), found=repr(name), remedy="Name one of these."))
