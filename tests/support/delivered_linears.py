"""Random delivered tensors of a Linear in every algorithm, and a slow decoder that computes the weight they encode."""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig

__all__ = ["decode_slowly", "random_linear"]

GROUP = 4
LAYERS = {
    QuantAlgo.W4A16: LayerQuantConfig(quant_algo=QuantAlgo.W4A16),
    QuantAlgo.W4A16_AWQ: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=GROUP),
    QuantAlgo.W4A16_GPTQ: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_GPTQ, group_size=GROUP, has_zero_point=True),
    QuantAlgo.W4A8_AWQ: LayerQuantConfig(quant_algo=QuantAlgo.W4A8_AWQ, group_size=GROUP),
    QuantAlgo.W8A16: LayerQuantConfig(quant_algo=QuantAlgo.W8A16),
    QuantAlgo.FP8: LayerQuantConfig(quant_algo=QuantAlgo.FP8),
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: LayerQuantConfig(quant_algo=QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN),
    QuantAlgo.FP8_BLOCK_SCALES: LayerQuantConfig(quant_algo=QuantAlgo.FP8_BLOCK_SCALES),
    QuantAlgo.NVFP4: LayerQuantConfig(quant_algo=QuantAlgo.NVFP4, group_size=16),
    QuantAlgo.W4A16_NVFP4: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_NVFP4, group_size=16),
    QuantAlgo.MXFP8: LayerQuantConfig(quant_algo=QuantAlgo.MXFP8, group_size=32),
    QuantAlgo.W4A16_MXFP4: LayerQuantConfig(quant_algo=QuantAlgo.W4A16_MXFP4),
    QuantAlgo.W4A8_MXFP4_MXFP8: LayerQuantConfig(quant_algo=QuantAlgo.W4A8_MXFP4_MXFP8),
}
# The number of columns that share a scale; in FP8_BLOCK_SCALES, 128 rows share it too.
GROUPS = {
    QuantAlgo.W4A16_AWQ: GROUP,
    QuantAlgo.W4A16_GPTQ: GROUP,
    QuantAlgo.W4A8_AWQ: GROUP,
    QuantAlgo.FP8_BLOCK_SCALES: 128,
    QuantAlgo.NVFP4: 16,
    QuantAlgo.W4A16_NVFP4: 16,
    QuantAlgo.MXFP8: 32,
    QuantAlgo.W4A16_MXFP4: 32,
    QuantAlgo.W4A8_MXFP4_MXFP8: 32,
}
ROW_PAIRS = {QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ, QuantAlgo.W4A8_AWQ}
COLUMN_PAIRS = {QuantAlgo.NVFP4, QuantAlgo.W4A16_NVFP4, QuantAlgo.W4A16_MXFP4, QuantAlgo.W4A8_MXFP4_MXFP8}


def random_linear(
    algo: QuantAlgo, rows: int, columns: int, seed: int = 0
) -> tuple[LayerQuantConfig, dict[str, Tensor]]:
    """Return a layer config and random delivered tensors of a Linear [N, K], with arbitrary scales."""
    generator = torch.Generator().manual_seed(seed)

    def scale(*shape: int) -> Tensor:
        return 0.01 + 0.1 * torch.rand(shape, generator=generator)

    def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=generator)

    groups = (rows, columns // GROUPS.get(algo, columns))
    packed = integers(0, 256, torch.uint8, rows // 2, columns)
    fp8 = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    fp4 = integers(0, 256, torch.uint8, rows, columns // 2)
    halves = integers(1, 5, torch.int8, columns).to(torch.bfloat16) / 2
    nvfp4 = {"weight_scale": (40 * scale(*groups)).to(torch.float8_e4m3fn), "weight_scale_2": scale()}
    tensors = {
        QuantAlgo.W4A16: lambda: {"weight": packed, "weight_scale": scale(rows)},
        QuantAlgo.W4A16_AWQ: lambda: {
            "weight": packed,
            "weight_scale": scale(*groups),
            "pre_quant_scale": halves,
        },
        QuantAlgo.W4A16_GPTQ: lambda: {
            "weight": packed,
            "weight_scale": scale(*groups),
            "weight_zero": scale(*groups) - 0.05,
        },
        QuantAlgo.W4A8_AWQ: lambda: {
            "weight": packed,
            "weight_scale": scale(*groups),
            "weight_scale_2": scale(),
            "input_scale": scale(),
            "pre_quant_scale": halves,
        },
        QuantAlgo.W8A16: lambda: {
            "weight": integers(-128, 128, torch.int8, rows, columns),
            "weight_scale": scale(rows) / 16,
        },
        QuantAlgo.FP8: lambda: {"weight": fp8, "weight_scale": scale(), "input_scale": scale()},
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: lambda: {"weight": fp8, "weight_scale": scale(rows)},
        QuantAlgo.FP8_BLOCK_SCALES: lambda: {
            "weight": fp8,
            "weight_scale": scale(-(-rows // 128), -(-columns // 128)),
        },
        QuantAlgo.NVFP4: lambda: {"weight": fp4, **nvfp4, "input_scale": scale() / 100},
        QuantAlgo.W4A16_NVFP4: lambda: {"weight": fp4, **nvfp4},
        QuantAlgo.MXFP8: lambda: {"weight": fp8, "weight_scale": integers(120, 130, torch.uint8, *groups)},
        QuantAlgo.W4A16_MXFP4: lambda: {"weight": fp4, "weight_scale": integers(120, 130, torch.uint8, *groups)},
        QuantAlgo.W4A8_MXFP4_MXFP8: lambda: {
            "weight": fp4,
            "weight_scale": integers(120, 130, torch.uint8, *groups),
        },
    }[algo]()
    return LAYERS[algo], tensors


def decode_slowly(algo: QuantAlgo, tensors: dict[str, Tensor]) -> Tensor:
    """Return the weight in float64, decoded element by element from its layout."""
    rows, columns = tensors["weight"].shape
    rows, columns = rows * (2 if algo in ROW_PAIRS else 1), columns * (2 if algo in COLUMN_PAIRS else 1)
    values = [[_element(algo, tensors, row, column) for column in range(columns)] for row in range(rows)]
    return torch.tensor(values, dtype=torch.float64)


def _element(algo: QuantAlgo, tensors: dict[str, Tensor], row: int, column: int) -> float:
    zero = float(tensors["weight_zero"][row, column // GROUP]) if "weight_zero" in tensors else 0.0
    return _code(algo, tensors["weight"], row, column) * _scale(algo, tensors, row, column) + zero


def _code(algo: QuantAlgo, weight: Tensor, row: int, column: int) -> float:
    """The value of one code, decoded from its bits."""
    if algo in ROW_PAIRS:
        byte = int(weight.view(torch.uint8)[row // 2, column])
        nibble = byte % 16 if row % 2 == 0 else byte // 16
        return float(nibble - 16 if nibble > 7 else nibble)
    if algo in COLUMN_PAIRS:
        byte = int(weight[row, column // 2])
        nibble = byte % 16 if column % 2 == 0 else byte // 16
        sign, exponent, mantissa = nibble // 8, nibble // 2 % 4, nibble % 2
        magnitude = 0.5 * mantissa if exponent == 0 else (1 + 0.5 * mantissa) * 2 ** (exponent - 1)
        return -magnitude if sign else magnitude
    return float(weight[row, column])


def _scale(algo: QuantAlgo, tensors: dict[str, Tensor], row: int, column: int) -> float:
    """The scale that the code at this position is multiplied with."""
    scale = tensors["weight_scale"]
    if algo is QuantAlgo.FP8:
        return float(scale)
    if scale.dim() == 1:
        return float(scale[row])
    entry = float(scale[row // 128 if algo is QuantAlgo.FP8_BLOCK_SCALES else row, column // GROUPS[algo]])
    if scale.dtype == torch.uint8:
        return 2.0 ** (entry - 127)
    # The scales of W4A8_AWQ are divided by it first.
    return entry * (1.0 if algo is QuantAlgo.W4A8_AWQ else float(tensors.get("weight_scale_2", 1.0)))
