"""How weights are stored by every scheme: arguments of the configuration, and random tensors with what they are worth.

`Writer.store` gives the tensors of one Linear as compressed-tensors 0.20 writes them, and the exact value of every
element. The arithmetic is numpy and tables of numbers; it shares no code with the package under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import oracles
import torch
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Shape = tuple[int, int]

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
_E2M3 = torch.tensor([k / 8 for k in range(16)] + [k / 4 for k in range(8, 16)] + [k / 2 for k in range(8, 16)])
_SMALL_FLOATS = {4: _E2M1, 6: _E2M3.double()}
_LARGEST = {4: 6.0, 6: 7.5, 8: 448.0}
# One for all modules: writers link those of q/k/v and of gate/up, which an engine joins.
WEIGHT_GLOBAL_SCALE, INPUT_GLOBAL_SCALE = 2000.0, 700.0


def int_weights(
    bits: int = 4, strategy: str = "group", group_size: int | None = 32, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """Arguments of integer weights; `group_size` counts for strategy group only."""
    size = group_size if strategy == "group" else None
    return _arguments("int", bits, strategy) | {"symmetric": symmetric, "group_size": size} | more


def int8_inputs(strategy: str = "token", **more: Any) -> dict[str, Any]:
    """Arguments of int8 activations: dynamic per token, or static per tensor."""
    return _arguments("int", 8, strategy) | {"dynamic": strategy == "token"} | more


def fp8_weights(strategy: str = "tensor", **more: Any) -> dict[str, Any]:
    """Arguments of fp8 weights."""
    return _arguments("float", 8, strategy) | more


def fp8_inputs(strategy: str = "tensor", **more: Any) -> dict[str, Any]:
    """Arguments of fp8 activations: static per tensor, or dynamic per token or group."""
    return _arguments("float", 8, strategy) | {"dynamic": strategy != "tensor"} | more


def nvfp4(**more: Any) -> dict[str, Any]:
    """Arguments of fp4 with scales of two levels, for weights; activations are `dynamic="local"`."""
    return _arguments("float", 4, "tensor_group") | {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"} | more


def mx(bits: int, **more: Any) -> dict[str, Any]:
    """Arguments of MX floats, for weights; activations are `dynamic=True`."""
    return _arguments("float", bits, "group") | {"group_size": 32, "scale_dtype": "torch.uint8"} | more


def _arguments(number: str, bits: int, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def config_group(
    weights: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None = None,
    *,
    targets: Sequence[str] = ("Linear",),
    **more: Any,
) -> dict[str, Any]:
    """One entry of `config_groups`."""
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        **more,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the Linears of one config group are stored."""

    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    format: str = "pack-quantized"

    @property
    def group(self) -> dict[str, Any]:
        return config_group(self.weights, self.inputs, format=self.format)


_BLOCK = fp8_weights("block", block_structure=[128, 128])
_FP8_GROUP = fp8_inputs("group", group_size=128)
SCHEMES: dict[str, Scheme] = {
    **{f"int4-g{size}": Scheme(weights=int_weights(4, group_size=size)) for size in (16, 32, 64, 128, 256)},
    **{
        f"int4-g{size}-asym": Scheme(weights=int_weights(4, group_size=size, symmetric=False)) for size in (32, 64, 128)
    },
    "int4-channel": Scheme(weights=int_weights(4, "channel")),
    "int4-channel-asym": Scheme(weights=int_weights(4, "channel", symmetric=False)),
    "int4-tensor": Scheme(weights=int_weights(4, "tensor")),
    "int4-plain-g64": Scheme(weights=int_weights(4, group_size=64), format="int-quantized"),
    "int4-g64-actorder": Scheme(weights=int_weights(4, group_size=64, actorder="group")),
    "int3-g64": Scheme(weights=int_weights(3, group_size=64)),
    "int2-channel": Scheme(weights=int_weights(2, "channel")),
    "int6-channel": Scheme(weights=int_weights(6, "channel")),
    "w4afp8": Scheme(weights=int_weights(4, group_size=64), inputs=fp8_inputs("token")),
    "int4-g128-fp8-static": Scheme(weights=int_weights(4, group_size=128), inputs=fp8_inputs("tensor")),
    "w4a8": Scheme(weights=int_weights(4, "channel"), inputs=int8_inputs(), format="int-quantized"),
    "int8-channel": Scheme(weights=int_weights(8, "channel")),
    "int8-channel-asym": Scheme(weights=int_weights(8, "channel", symmetric=False)),
    "int8-g32": Scheme(weights=int_weights(8, group_size=32)),
    "int8-g64": Scheme(weights=int_weights(8, group_size=64)),
    "int8-plain-tensor": Scheme(weights=int_weights(8, "tensor"), format="int-quantized"),
    "int8-plain-channel": Scheme(weights=int_weights(8, "channel"), format="int-quantized"),
    "int8-plain-channel-asym": Scheme(weights=int_weights(8, "channel", symmetric=False), format="int-quantized"),
    "int8-plain-g32": Scheme(weights=int_weights(8, group_size=32), format="int-quantized"),
    "w8a8": Scheme(weights=int_weights(8, "channel"), inputs=int8_inputs(), format="int-quantized"),
    "w8a8-static": Scheme(weights=int_weights(8, "tensor"), inputs=int8_inputs("tensor"), format="int-quantized"),
    "w8a8-static-asym": Scheme(
        weights=int_weights(8, "channel"), inputs=int8_inputs("tensor", symmetric=False), format="int-quantized"
    ),
    "fp8-tensor-static": Scheme(weights=fp8_weights("tensor"), inputs=fp8_inputs("tensor"), format="float-quantized"),
    "fp8-tensor-naive": Scheme(weights=fp8_weights("tensor"), inputs=fp8_inputs("tensor"), format="naive-quantized"),
    "fp8-tensor-token": Scheme(weights=fp8_weights("tensor"), inputs=fp8_inputs("token"), format="float-quantized"),
    "fp8-channel-token": Scheme(weights=fp8_weights("channel"), inputs=fp8_inputs("token"), format="float-quantized"),
    "fp8-channel-static": Scheme(weights=fp8_weights("channel"), inputs=fp8_inputs("tensor"), format="float-quantized"),
    "fp8-weight-only": Scheme(weights=fp8_weights("channel"), format="naive-quantized"),
    "fp8-block": Scheme(weights=_BLOCK, inputs=_FP8_GROUP, format="float-quantized"),
    "nvfp4": Scheme(weights=nvfp4(), inputs=nvfp4(dynamic="local"), format="nvfp4-pack-quantized"),
    "nvfp4a16": Scheme(weights=nvfp4(), format="nvfp4-pack-quantized"),
    "mxfp4": Scheme(weights=mx(4), inputs=mx(4, dynamic=True), format="mxfp4-pack-quantized"),
    "mxfp4a16": Scheme(weights=mx(4), format="mxfp4-pack-quantized"),
    "mxfp6a8": Scheme(weights=mx(6), inputs=mx(8, dynamic=True), format="mxfp6-pack-quantized"),
    "mxfp8": Scheme(weights=mx(8), inputs=mx(8, dynamic=True), format="mxfp8-quantized"),
    "mxfp8a16": Scheme(weights=mx(8), format="mxfp8-quantized"),
}


@dataclass(frozen=True, slots=True)
class Writer:
    """Random weights as a scheme stores them; scales have `scale_dtype` where the scheme leaves it open."""

    scale_dtype: torch.dtype
    generator: torch.Generator

    def store(self, scheme: Scheme, shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of one Linear by local name, and the exact value of its weight."""
        args = scheme.weights
        if args["type"] == "float" and args["group_size"] is not None:
            tensors, exact = self._small_floats(args, shape)
        else:
            tensors, exact = self._coded(scheme, shape)
        return tensors | self._inputs(scheme.inputs), exact

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def scales(self, *shape: int, size: float) -> Tensor:
        return (size * (0.5 + torch.rand(shape, generator=self.generator))).to(self.scale_dtype)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int8)

    def _coded(self, scheme: Scheme, shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
        """Integers and fp8: codes times scales."""
        args = scheme.weights
        float8 = args["type"] == "float"
        top = 448 if float8 else 2 ** (args["num_bits"] - 1) - 1
        # Codes spread over three standard deviations, weights like those of a fresh Linear.
        scale = self.scales(*_scale_shape(args, shape), size=3 / max(top, 1) / sqrt(shape[1]))
        zero_point = None if args["symmetric"] else self._integers(-top - 1, top, *scale.shape)
        spread = (self.normal(*shape) * max(top, 1) / 3).clamp(-top - (not float8), top)
        codes = spread.to(torch.float8_e4m3fn) if float8 else spread.round().to(torch.int8)
        if float8:
            tensors = {"weight": codes, "weight_scale": scale}
        else:
            tensors = _integer_tensors(scheme, codes, scale, zero_point)
        index = None
        if args["actorder"] == "group":
            index = torch.arange(shape[1]) // args["group_size"]
            index = index[torch.randperm(shape[1], generator=self.generator)].to(torch.int32)
            tensors["weight_g_idx"] = index
        return tensors, exact_values(codes, scale, zero_point, block=args["block_structure"], group_index=index)

    def _small_floats(self, args: Mapping[str, Any], shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
        """NVFP4 and MX: each group scaled so that its largest weight takes the largest code."""
        bits, size = args["num_bits"], args["group_size"]
        grouped = (self.normal(*shape) / sqrt(shape[1])).double().reshape(shape[0], -1, size)
        ideal = grouped.abs().amax(dim=2, keepdim=True) / _LARGEST[bits]
        if size == 16:
            scale = (ideal * WEIGHT_GLOBAL_SCALE).to(torch.float8_e4m3fn)
            step = scale.double() / WEIGHT_GLOBAL_SCALE
        else:
            scale = (ideal.log2().ceil() + 127).to(torch.uint8)
            step = torch.exp2(scale.double() - 127)
        values, fields = _nearest(grouped / step, bits)
        exact = values * scale.double() / WEIGHT_GLOBAL_SCALE if size == 16 else values * step
        tensors = {"weight_scale": scale.reshape(shape[0], -1)}
        if bits == 8:
            tensors["weight"] = fields.reshape(shape).view(torch.float8_e4m3fn)
        else:
            tensors["weight_packed"] = _bit_stream(fields.reshape(shape), bits)
        if size == 16:
            tensors["weight_global_scale"] = torch.tensor([WEIGHT_GLOBAL_SCALE])
        return tensors, exact.reshape(shape)

    def _inputs(self, inputs: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """What static activations store."""
        if inputs is None:
            return {}
        if inputs["group_size"] == 16:
            return {"input_global_scale": torch.tensor([INPUT_GLOBAL_SCALE])}
        if inputs["dynamic"]:
            return {}
        zero_point = {} if inputs["symmetric"] else {"input_zero_point": self._integers(-8, 7, 1)}
        return {"input_scale": self.scales(1, size=0.02), **zero_point}


def exact_values(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    block: Sequence[int] | None = None,
    group_index: Tensor | None = None,
) -> Tensor:
    """(code - zero point) * scale of every element in float64, which holds such products exactly.

    `scale` is [1] or [N, G] with G groups of equal size, or one for each block; `zero_point` has its shape.
    """
    rows, columns = codes.shape
    grid = scale.reshape(-1, scale.shape[-1])
    height = block[0] if block else max(1, rows // grid.shape[0])
    width = block[1] if block else columns // grid.shape[1]
    row = np.minimum(np.arange(rows) // height, grid.shape[0] - 1)
    column = np.arange(columns) // width if group_index is None else group_index.numpy()
    zeros = torch.zeros_like(grid) if zero_point is None else zero_point.reshape(grid.shape)
    place = np.ix_(row, column)
    return torch.from_numpy((codes.double().numpy() - zeros.double().numpy()[place]) * grid.double().numpy()[place])


def _scale_shape(args: Mapping[str, Any], shape: Shape) -> tuple[int, ...]:
    rows, columns = shape
    if args["strategy"] == "tensor":
        return (1,)
    if args["strategy"] == "block":
        height, width = args["block_structure"]
        return -(-rows // height), -(-columns // width)
    groups, rest = divmod(columns, args["group_size"] or columns)
    if rest or not groups:
        raise ValueError(f"groups of {args['group_size']} don't divide {columns} columns")
    return rows, groups


def _integer_tensors(scheme: Scheme, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
    """Integer codes as `int-quantized` or `pack-quantized` stores them."""
    if scheme.format == "int-quantized":
        plain = {"weight": codes, "weight_scale": scale}
        return plain if zero_point is None else plain | {"weight_zero_point": zero_point}
    bits = scheme.weights["num_bits"]
    tensors = {
        "weight_packed": oracles.pack(codes.long().numpy(), _words(bits, axis=1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:
        packed = zero_point if scale.dim() == 1 else oracles.pack(zero_point.long().numpy(), _words(bits, axis=0))
        tensors["weight_zero_point"] = packed
    return tensors


def _words(bits: int, *, axis: int) -> Packing:
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True)


def _nearest(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest numbers of a small float, and their bit patterns as bytes."""
    if bits == 8:
        codes = values.clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.double(), codes.view(torch.uint8)
    numbers = _SMALL_FLOATS[bits]
    index = torch.bucketize(values.abs(), (numbers[1:] + numbers[:-1]) / 2)
    negative = (values < 0) & (index > 0)
    return torch.where(negative, -numbers[index], numbers[index]), (index + negative * len(numbers)).to(torch.uint8)


def _bit_stream(fields: Tensor, bits: int) -> Tensor:
    """Bit patterns of a row one behind the other, lowest bits first, in bytes."""
    stream = (fields.numpy()[:, :, None] >> np.arange(bits) & 1).reshape(len(fields), -1).astype(np.uint8)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little"))
