"""For tests of modes: arguments of the field's schemes, and weights that are stored by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trtllm_ct.base.schemes import Element, NumberType, QuantArgs, QuantScheme, Strategy
from trtllm_ct.engine.holdings import Weight

SHAPE = (256, 512)


def ints(bits: int, group_size: int | None = None, strategy: Strategy | None = None, **more: Any) -> QuantArgs:
    strategy = strategy or (Strategy.GROUP if group_size else Strategy.CHANNEL)
    return QuantArgs(num_bits=bits, strategy=strategy, group_size=group_size, **more)


def floats(bits: int, strategy: Strategy = Strategy.TENSOR, group_size: int | None = None, **more: Any) -> QuantArgs:
    return QuantArgs(num_bits=bits, type=NumberType.FLOAT, strategy=strategy, group_size=group_size, **more)


def blocks(rows: int = 128, columns: int = 128) -> QuantArgs:
    return floats(8, Strategy.BLOCK, block_structure=(rows, columns))


FP8_TENSOR, FP8_CHANNEL = floats(8), floats(8, Strategy.CHANNEL)
FP8_STATIC, FP8_TOKEN = floats(8), floats(8, Strategy.TOKEN, dynamic=True)
FP8_GROUP = floats(8, Strategy.GROUP, 128, dynamic=True)
INT8_TOKEN, INT8_STATIC = ints(8, None, Strategy.TOKEN, dynamic=True), ints(8, None, Strategy.TENSOR)
NVFP4 = floats(4, Strategy.TENSOR_GROUP, 16, scale_dtype="float8_e4m3fn")
NVFP4_INPUT = replace(NVFP4, dynamic="local")
MXFP4, MXFP6, MXFP8 = (floats(bits, Strategy.GROUP, 32, scale_dtype="uint8") for bits in (4, 6, 8))
MXFP4_INPUT, MXFP8_INPUT = replace(MXFP4, dynamic=True), replace(MXFP8, dynamic=True)

_FLOATS = {4: Element.E2M1, 6: Element.E2M3, 8: Element.E4M3}


def weight(args: QuantArgs, inputs: QuantArgs | None = None, **more: Any) -> Weight:
    """A stored weight of `SHAPE`; scales are of the kind that the format of these arguments has."""
    float_codes = args.type is NumberType.FLOAT
    return Weight(
        scheme=QuantScheme(weights=args, input_activations=inputs),
        element=_FLOATS[args.num_bits] if float_codes else Element.INT,
        two_level=float_codes and args.group_size == 16,
        exponent_scale=float_codes and args.group_size == 32,
        **({"shape": SHAPE} | more),
    )
