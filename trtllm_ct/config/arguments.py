"""JSON of one `QuantizationArgs` -> `QuantArgs`: defaults, aliases and what can't be meant.

Defaults and combination rules are those of compressed-tensors 0.20 quantization/quant_args.py. We differ where the
library is too strict for older files (`actorder: group`, which 0.19 removed; unknown keys) and where it accepts what no
format can store (integer widths above 8 bits, group size 0, words and numbers for booleans).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trtllm_ct.base.schemes import ActOrder, NumberType, QuantArgs, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtllm_ct.config.json_object import JsonObject

__all__ = ["ARGUMENT_KEYS", "read_activation_args", "read_quant_args", "read_weight_args"]

ARGUMENT_KEYS = (
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
)
_SILENT_KEYS = ("observer", "observer_kwargs")

_WIDTHS = {NumberType.INT: range(1, 9), NumberType.FLOAT: (4, 6, 8)}
_ACT_ORDERS = {
    "group": ActOrder.GROUP,
    "dynamic": ActOrder.GROUP,
    "weight": ActOrder.WEIGHT,
    "static": ActOrder.WEIGHT,
}
_GROUPED = (Strategy.GROUP, Strategy.TENSOR_GROUP)
_WEIGHTS = (Strategy.TENSOR, Strategy.CHANNEL, Strategy.GROUP, Strategy.BLOCK, Strategy.TENSOR_GROUP)
_ACTIVATIONS = (Strategy.TOKEN, Strategy.TENSOR, Strategy.GROUP, Strategy.TENSOR_GROUP, Strategy.ATTN_HEAD)
_DYNAMIC = (Strategy.TOKEN, Strategy.TENSOR, Strategy.TENSOR_GROUP, Strategy.GROUP)
_ZERO_POINT_DTYPE = {NumberType.INT: "int8", NumberType.FLOAT: "float8_e4m3fn"}


def read_weight_args(source: JsonObject | None) -> QuantArgs | None:
    """Read the arguments of stored weights; None when there are none or a fault was recorded."""
    args = read_quant_args(source) if source else None
    if source is None or args is None:
        return None
    if args.strategy not in _WEIGHTS:
        source.fault("strategy", expected=f"one of {', '.join(_WEIGHTS)} for weights")
    elif args.dynamic is not False:
        source.fault("dynamic", expected="false for weights, whose scales are stored")
    return args


def read_activation_args(source: JsonObject | None) -> QuantArgs | None:
    """Read the arguments of activations or of the KV cache; None when there are none or a fault was recorded."""
    args = read_quant_args(source) if source else None
    if source is None or args is None:
        return None
    if args.strategy not in _ACTIVATIONS:
        source.fault("strategy", expected=f"one of {', '.join(_ACTIVATIONS)} for activations")
    if args.actorder is not None:
        source.fault("actorder", expected="null for activations, which have no columns to reorder")
    return args


def read_quant_args(source: JsonObject) -> QuantArgs | None:
    """Read arguments as the library's `QuantizationArgs` does; None when a fault was recorded."""
    faults_before = source.findings.fault_count
    number = source.choice("type", NumberType, NumberType.INT) or NumberType.INT
    symmetric = source.boolean("symmetric", default=True)
    group_size = _group_size(source)
    args = QuantArgs(
        num_bits=_num_bits(source, number),
        type=number,
        symmetric=symmetric,
        strategy=source.choice("strategy", Strategy, None) or _implied_strategy(group_size),
        group_size=None if group_size == -1 else group_size,
        block_structure=_block_structure(source),
        dynamic=_dynamic(source),
        actorder=_actorder(source),
        scale_dtype=source.dtype("scale_dtype"),
        zp_dtype=_zp_dtype(source, number, symmetric=symmetric),
    )
    source.warn_unknown(ARGUMENT_KEYS, _SILENT_KEYS)
    if source.findings.fault_count == faults_before:
        _check_combination(source, args)
    return args if source.findings.fault_count == faults_before else None


def _num_bits(source: JsonObject, number: NumberType) -> int:
    bits = source.integer("num_bits", 8)
    widths = _WIDTHS[number]
    if bits not in widths:
        allowed = "1 to 8" if isinstance(widths, range) else "4, 6 or 8"
        source.fault("num_bits", expected=f"{allowed} bits for type {number}")
    return bits or 0


def _group_size(source: JsonObject) -> int | None:
    size = source.integer("group_size", None)
    if size is not None and size != -1 and size < 1:
        source.fault("group_size", expected="null, -1 (one group per channel) or a positive number")
    return size


def _implied_strategy(group_size: int | None) -> Strategy:
    if group_size is None:
        return Strategy.TENSOR
    return Strategy.CHANNEL if group_size == -1 else Strategy.GROUP


def _block_structure(source: JsonObject) -> tuple[int, int] | None:
    """Rows and columns of a block: a list since 0.11, before that a string such as "128x128"."""
    value = source.raw.get("block_structure")
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(size) for size in value.lower().split("x") if size.strip().isdecimal()]
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    source.fault("block_structure", expected="two positive integers: [rows, columns]")
    return None


def _dynamic(source: JsonObject) -> bool | Literal["local"]:
    value = source.raw.get("dynamic", False)
    if isinstance(value, str) and value.lower() == "local":
        return "local"
    if isinstance(value, bool):
        return value
    source.fault("dynamic", expected='true, false or "local"')
    return False


def _actorder(source: JsonObject) -> ActOrder | None:
    value = source.raw.get("actorder")
    if value is None or value is False:
        return None
    if value is True:
        return ActOrder.GROUP
    order = _ACT_ORDERS.get(value.lower()) if isinstance(value, str) else None
    if order is None:
        source.fault("actorder", expected=f"null, true, false or one of {', '.join(_ACT_ORDERS)}")
    return order


def _zp_dtype(source: JsonObject, number: NumberType, *, symmetric: bool) -> str | None:
    """The dtype of zero points as stored; none exist for symmetric arguments, whatever they declare."""
    declared = source.dtype("zp_dtype")
    return None if symmetric else declared or _ZERO_POINT_DTYPE[number]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """Two fields that can't be meant together; `key` is the one to look at."""

    key: str
    broken: Callable[[QuantArgs], bool]
    expected: str


_RULES = (
    _Rule(
        key="group_size",
        broken=lambda args: args.strategy in _GROUPED and args.group_size is None,
        expected="a positive group size for a group strategy",
    ),
    _Rule(
        key="group_size",
        broken=lambda args: args.strategy not in _GROUPED and args.group_size is not None,
        expected="null unless the strategy is group or tensor_group",
    ),
    _Rule(
        key="block_structure",
        broken=lambda args: (args.strategy is Strategy.BLOCK) != (args.block_structure is not None),
        expected="[rows, columns] with strategy block, null with any other",
    ),
    _Rule(
        key="dynamic",
        broken=lambda args: args.strategy is Strategy.TOKEN and args.dynamic is False,
        expected="true, because scales per token can't be stored",
    ),
    _Rule(
        key="strategy",
        broken=lambda args: args.dynamic is not False and args.strategy not in _DYNAMIC,
        expected=f"one of {', '.join(_DYNAMIC)} for dynamic quantization",
    ),
    _Rule(
        key="dynamic",
        broken=lambda args: args.dynamic == "local" and args.strategy is not Strategy.TENSOR_GROUP,
        expected='"local" with strategy tensor_group only',
    ),
)


def _check_combination(source: JsonObject, args: QuantArgs) -> None:
    for rule in _RULES:
        if rule.broken(args):
            source.fault(
                rule.key,
                expected=rule.expected,
                remedy=f"The fields together read as {args.label()}, which no release defines; correct the config.",
            )
