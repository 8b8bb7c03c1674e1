"""Which tensors a module of an engine has in the file of a rank, with dtype and shape.

A tensor with more rows than that would be loaded by no engine, or with rows that come from nowhere. Written from the
description of the format, as `engine_ranks.py`. Source: TensorRT-LLM `quantization/layers.py` and
`parameter.py: Parameter` (138f96d4), which compares shapes exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trtllm_ct.verify.engine_ranks import EngineRanks, Located

__all__ = ["SCALAR", "wanted_tensors"]

SCALAR = TensorSpec(DType.F32, (1,))
_ROUTER = "mlp.router"
_NORMS = ("input_layernorm", "post_layernorm")
_PER_TOKEN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"

Specs = dict[str, TensorSpec]


class _Linear(NamedTuple):
    """A quantized Linear on one rank: its sizes, the size of its groups, and the model's dtype."""

    rows: int
    columns: int
    group: int
    dtype: DType
    divides_columns: bool


def _awq(linear: _Linear) -> Specs:
    return {
        "weight": TensorSpec(DType.I8, (linear.rows // 2, linear.columns)),
        "weights_scaling_factor": TensorSpec(DType.F32, (linear.rows, linear.columns // linear.group)),
    }


def _in_kernel_order(linear: _Linear, bits: int) -> Specs:
    return {
        "weight": TensorSpec(linear.dtype, (linear.columns, linear.rows * bits // linear.dtype.bits)),
        "weights_scaling_factor": TensorSpec(linear.dtype, (linear.columns // linear.group, linear.rows)),
    }


def _per_token(linear: _Linear) -> Specs:
    smoother = {"smoother": TensorSpec(DType.F32, (1, linear.columns))} if linear.divides_columns else {}
    return {
        "weight": TensorSpec(DType.I8, (linear.rows, linear.columns)),
        "per_channel_scale": TensorSpec(DType.F32, (1, linear.rows)),
        **smoother,
    }


_FORMS: Mapping[str, Callable[[_Linear], Specs]] = {
    "W4A16_AWQ": _awq,
    "W4A16_GPTQ": lambda linear: _in_kernel_order(linear, 4),
    "W8A16_GPTQ": lambda linear: _in_kernel_order(linear, 8),
    "W8A16": lambda linear: {
        "weight": TensorSpec(DType.I8, (linear.columns, linear.rows)),
        "per_channel_scale": TensorSpec(linear.dtype, (linear.rows,)),
    },
    "FP8": lambda linear: {
        "weight": TensorSpec(DType.F8_E4M3, (linear.rows, linear.columns)),
        "weights_scaling_factor": SCALAR,
        "activation_scaling_factor": SCALAR,
    },
    "FP8_PER_CHANNEL_PER_TOKEN": lambda linear: {
        "weight": TensorSpec(DType.F8_E4M3, (linear.rows, linear.columns)),
        "per_channel_scale": TensorSpec(DType.F32, (linear.rows,)),
    },
    "W8A8_SQ_PER_CHANNEL": lambda linear: {
        "weight": TensorSpec(DType.I8, (linear.rows, linear.columns)),
        "weights_scaling_factor": TensorSpec(DType.F32, (linear.rows,)),
        "activation_scaling_factor": SCALAR,
        "prequant_scaling_factor": TensorSpec(linear.dtype, (linear.columns,)),
    },
    _PER_TOKEN: _per_token,
    "NVFP4": lambda linear: {
        "weight": TensorSpec(DType.U8, (linear.rows, linear.columns // 2)),
        "weights_scaling_factor": TensorSpec(DType.F8_E4M3, (linear.rows, linear.columns // 16)),
        "weights_scaling_factor_2": SCALAR,
        "activation_scaling_factor": SCALAR,
    },
}
"""The tensors of a Linear by algorithm; flags of the configuration and biases add more."""


def wanted_tensors(ranks: EngineRanks, part: Located, columns: int | None, *, bias: bool) -> Specs:
    """Return dtype and shape of each tensor of the engine's module that `part` is in, by local name.

    `columns` are those of the rank, None for a norm. `bias` says that the source has one. Experts have a leading axis.
    """
    algo, dtype = ranks.algo(part.name), ranks.dtype
    specs: Specs = {"bias": TensorSpec(dtype, (part.total,))} if bias else {}
    if columns is None:
        specs["weight"] = TensorSpec(dtype, (part.total,))
        per_token = ranks.quantization["quant_algo"] == _PER_TOKEN and part.name.endswith(_NORMS)
        return specs | ({"scale_to_int": TensorSpec(dtype, (1,))} if per_token else {})
    if algo is None:
        experts = ranks.config.get("moe") or {"num_experts": 0}
        stacked = (int(experts["num_experts"]),) if part.expert is not None else ()
        plain = DType.F32 if part.name.endswith(_ROUTER) else dtype
        return specs | {"weight": TensorSpec(plain, (*stacked, part.total, columns))}
    block = ranks.block(part.name)
    group = int(block["group_size"])
    linear = _Linear(part.total, columns, group, dtype, divides_columns=part.columns)
    specs |= _FORMS[algo](linear)
    if algo == "W4A16_AWQ" and block["pre_quant_scale"]:
        specs["prequant_scaling_factor"] = TensorSpec(dtype, (columns,))
    if algo in {"W4A16_AWQ", "W4A16_GPTQ", "W8A16_GPTQ"} and block["has_zero_point"]:
        specs["zero"] = TensorSpec(dtype, (columns // group, part.total))
    return specs
