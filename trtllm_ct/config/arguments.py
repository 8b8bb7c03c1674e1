"""Read the JSON of one `QuantizationArgs` as `QuantArgs`: fill in defaults, resolve aliases, refuse invalid values.

Defaults and combination rules are those of compressed-tensors 0.20 quantization/quant_args.py. This reader differs in
two ways. It is more lenient where the library is too strict for older files (`actorder: group`, which 0.19 removed;
unknown keys). It is stricter where the library accepts what no format can store (integer widths above 8 bits, group
size 0, strings and numbers as booleans).
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
_IGNORED_KEYS = ("observer", "observer_kwargs")

_WIDTHS = {NumberType.INT: range(1, 9), NumberType.FLOAT: (4, 6, 8)}
_ACT_ORDERS = {
    "group": ActOrder.GROUP,
    "dynamic": ActOrder.GROUP,
    "weight": ActOrder.WEIGHT,
    "static": ActOrder.WEIGHT,
}
_GROUP_STRATEGIES = (Strategy.GROUP, Strategy.TENSOR_GROUP)
_WEIGHT_STRATEGIES = (Strategy.TENSOR, Strategy.CHANNEL, Strategy.GROUP, Strategy.BLOCK, Strategy.TENSOR_GROUP)
_ACTIVATION_STRATEGIES = (Strategy.TOKEN, Strategy.TENSOR, Strategy.GROUP, Strategy.TENSOR_GROUP, Strategy.ATTN_HEAD)
_DYNAMIC_STRATEGIES = (Strategy.TOKEN, Strategy.TENSOR, Strategy.TENSOR_GROUP, Strategy.GROUP)
_ZERO_POINT_DTYPE = {NumberType.INT: "int8", NumberType.FLOAT: "float8_e4m3fn"}


def read_weight_args(source: JsonObject | None) -> QuantArgs | None:
    """Read the arguments of stored weights; None when `source` is None or a fault was recorded in reading them."""
    args = read_quant_args(source) if source else None
    if source is None or args is None:
        return None
    if args.strategy not in _WEIGHT_STRATEGIES:
        source.fault("strategy", expected=f"one of {', '.join(_WEIGHT_STRATEGIES)} for weights")
    elif args.dynamic is not False:
        source.fault("dynamic", expected="false for weights, whose scales are stored")
    return args


def read_activation_args(source: JsonObject | None) -> QuantArgs | None:
    """Read the arguments of activations or of the KV cache; None when `source` is None or reading recorded a fault."""
    args = read_quant_args(source) if source else None
    if source is None or args is None:
        return None
    if args.strategy not in _ACTIVATION_STRATEGIES:
        source.fault("strategy", expected=f"one of {', '.join(_ACTIVATION_STRATEGIES)} for activations")
    if args.actorder is not None:
        source.fault("actorder", expected="null for activations, which have no columns to reorder")
    return args


def read_quant_args(source: JsonObject) -> QuantArgs | None:
    """Read arguments as the library's `QuantizationArgs` does; returns None when a fault was recorded."""
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
    source.warn_unknown(ARGUMENT_KEYS, _IGNORED_KEYS)
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
    """The strategy that the library assumes when the config names none."""
    if group_size is None:
        return Strategy.TENSOR
    return Strategy.CHANNEL if group_size == -1 else Strategy.GROUP


def _block_structure(source: JsonObject) -> tuple[int, int] | None:
    """Read the rows and columns of a block.

    The value is a list since compressed-tensors 0.11, and before that a string such as "128x128".
    """
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
    """The dtype of the stored zero points. Symmetric arguments have none, whatever dtype they declare."""
    declared = source.dtype("zp_dtype")
    return None if symmetric else declared or _ZERO_POINT_DTYPE[number]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A check of one combination of fields; `key` names the field to which the fault is attached."""

    key: str
    broken: Callable[[QuantArgs], bool]
    expected: str


_RULES = (
    _Rule(
        key="group_size",
        broken=lambda args: args.strategy in _GROUP_STRATEGIES and args.group_size is None,
        expected="a positive group size for a group strategy",
    ),
    _Rule(
        key="group_size",
        broken=lambda args: args.strategy not in _GROUP_STRATEGIES and args.group_size is not None,
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
        broken=lambda args: args.dynamic is not False and args.strategy not in _DYNAMIC_STRATEGIES,
        expected=f"one of {', '.join(_DYNAMIC_STRATEGIES)} for dynamic quantization",
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
