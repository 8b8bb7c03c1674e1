"""The table of targets, with the capabilities that each declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.errors import Fault, UsageError
from trtllm_ct.plan.target import Target
from trtllm_ct.schemes import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DENSE", "MODELOPT", "REFERENCE", "TARGETS", "target_named"]

# What the Linears of stock TensorRT-LLM 1.0 to 1.2 load (`_torch/modules/linear.py: get_quant_method`); no release
# of these has a W4A16_GPTQ method.
_STOCK_ALGOS = frozenset(
    {
        QuantAlgo.W4A16,
        QuantAlgo.W4A16_AWQ,
        QuantAlgo.W8A16,
        QuantAlgo.FP8,
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
    }
)

MODELOPT = Target(
    name="modelopt",
    serves="stock TensorRT-LLM, PyTorch backend, without a plug-in",
    algos=_STOCK_ALGOS,
    kv_cache_algos=frozenset({"FP8"}),
)
DENSE = Target(name="dense", serves="anything that reads plain Hugging Face weights")
REFERENCE = Target(
    name="reference",
    serves="the CPU reference engine of this package",
    algos=_STOCK_ALGOS | {QuantAlgo.W4A16_GPTQ},
    kv_cache_algos=frozenset({"FP8"}),
)

TARGETS: Mapping[str, Target] = {target.name: target for target in (MODELOPT, DENSE, REFERENCE)}


def target_named(name: str) -> Target:
    """The entry of `TARGETS`; raises `UsageError` that lists the names."""
    if name in TARGETS:
        return TARGETS[name]
    raise UsageError(
        Fault(where="target", expected=" or ".join(TARGETS), found=repr(name), remedy="Name one of these with --to.")
    )
