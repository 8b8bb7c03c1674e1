"""Preset schemes: the meaning of a bare scheme name such as W4A16.

Writers expand presets to full arguments, so a bare name in a file was written by hand. The table is that of
compressed-tensors 0.20 quantization/quant_scheme.py. Two names had another meaning in earlier releases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import NumberType, QuantArgs, QuantScheme, Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PRESETS", "FormerMeaning", "former_meaning", "parse_release", "preset_scheme"]


def _int(bits: int, *, symmetric: bool = True) -> QuantArgs:
    return QuantArgs(
        num_bits=bits,
        strategy=Strategy.GROUP,
        group_size=128,
        symmetric=symmetric,
        zp_dtype=None if symmetric else "int8",
    )


def _int_token(bits: int) -> QuantArgs:
    return QuantArgs(num_bits=bits, strategy=Strategy.TOKEN, dynamic=True)


def _mx(bits: int, *, dynamic: bool = False) -> QuantArgs:
    return QuantArgs(
        num_bits=bits,
        type=NumberType.FLOAT,
        strategy=Strategy.GROUP,
        group_size=32,
        scale_dtype="uint8",
        dynamic=dynamic,
    )


_INT8_TENSOR = QuantArgs(num_bits=8)
_INT8_CHANNEL = QuantArgs(num_bits=8, strategy=Strategy.CHANNEL)
_FP8_TENSOR = QuantArgs(num_bits=8, type=NumberType.FLOAT)
_FP8_CHANNEL = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.CHANNEL)
_FP8_TOKEN = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.TOKEN, dynamic=True)
_FP8_BLOCK = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.BLOCK, block_structure=(128, 128))
_FP8_GROUP = QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=128, dynamic=True)
_NVFP4 = QuantArgs(
    num_bits=4,
    type=NumberType.FLOAT,
    strategy=Strategy.TENSOR_GROUP,
    group_size=16,
    scale_dtype="float8_e4m3fn",
)
_NVFP4_LOCAL = QuantArgs(
    num_bits=4,
    type=NumberType.FLOAT,
    strategy=Strategy.TENSOR_GROUP,
    group_size=16,
    scale_dtype="float8_e4m3fn",
    dynamic="local",
)


def _scheme(weights: QuantArgs, inputs: QuantArgs | None = None) -> QuantScheme:
    return QuantScheme(weights=weights, input_activations=inputs)


_INT_PRESETS: Mapping[str, QuantScheme] = {
    **{f"W{bits}A16": _scheme(_int(bits)) for bits in range(2, 9)},
    **{f"W{bits}A8": _scheme(_int(bits), _int_token(8)) for bits in range(2, 8)},
    **{f"W{bits}A4": _scheme(_int(bits), _int_token(4)) for bits in range(2, 5)},
    "W4A16_ASYM": _scheme(_int(4, symmetric=False)),
    "W4AFP8": _scheme(_int(4), _FP8_TOKEN),
    "W8A8": _scheme(_INT8_CHANNEL, _int_token(8)),
    "INT8": _scheme(_INT8_CHANNEL, _int_token(8)),
}

_FLOAT_PRESETS: Mapping[str, QuantScheme] = {
    "FP8": _scheme(_FP8_TENSOR, _FP8_TENSOR),
    "FP8_DYNAMIC": _scheme(_FP8_CHANNEL, _FP8_TOKEN),
    "FP8_BLOCK": _scheme(_FP8_BLOCK, _FP8_GROUP),
    "NVFP4A16": _scheme(_NVFP4),
    "NVFP4": _scheme(_NVFP4, _NVFP4_LOCAL),
    "MXFP4A16": _scheme(_mx(4)),
    "MXFP4": _scheme(_mx(4), _mx(4, dynamic=True)),
    "MXFP4XFP8": _scheme(_mx(4), _FP8_GROUP),
    "MXFP6A16": _scheme(_mx(6)),
    "MXFP6A8": _scheme(_mx(6), _mx(8, dynamic=True)),
    "MXFP8A16": _scheme(_mx(8)),
    "MXFP8": _scheme(_mx(8), _mx(8, dynamic=True)),
}

PRESETS: Mapping[str, QuantScheme] = {"UNQUANTIZED": QuantScheme(), **_INT_PRESETS, **_FLOAT_PRESETS}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormerMeaning:
    """The meaning of a preset in releases before `until`."""

    until: tuple[int, int]
    scheme: QuantScheme


_FORMER_MEANINGS: Mapping[str, FormerMeaning] = {
    "W8A16": FormerMeaning(until=(0, 18), scheme=_scheme(_INT8_CHANNEL)),
    "W8A8": FormerMeaning(until=(0, 5), scheme=_scheme(_INT8_TENSOR, _INT8_TENSOR)),
}


def preset_scheme(name: str, release: tuple[int, int] | None) -> QuantScheme | None:
    """Return the scheme that writers of a release meant by a preset name, in any case; None for an unknown name.

    For an unknown release, the newest meaning is returned; `former_meaning` says whether there is another one.
    """
    former = former_meaning(name)
    if former and release and release < former.until:
        return former.scheme
    return PRESETS.get(name.upper())


def former_meaning(name: str) -> FormerMeaning | None:
    """Return the earlier meaning of a preset name; None when its meaning never changed."""
    return _FORMER_MEANINGS.get(name.upper())


def parse_release(version: str | None) -> tuple[int, int] | None:
    """Return major and minor number of a version such as `0.14.0.1` or `0.12.3.a20251114`.

    Returns None when the version is None or has no such numbers.
    """
    numbers = re.match(r"v?(\d+)\.(\d+)", version or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else None
