"""Rules for the dtypes and shapes of the delivered tensors of a Linear, and the check that reports every violation.

The engine's own loader casts silently and broadcasts a tensor of one element to a row of scales. Here every dtype and
every shape is compared before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import Tensor

    from trtllm_ct.engine.quant_config import LayerQuantConfig

__all__ = [
    "WIDE_FLOATS",
    "Header",
    "LinearCheck",
    "TensorRule",
    "check_aliases",
    "describe",
    "has_dtype",
    "is_one_element",
]

WIDE_FLOATS = tuple(dtype for dtype in DType if dtype.is_wide_float)


class Header(Protocol):
    """What rules look at: the dtype and shape of a tensor of torch, or of one in a file."""

    @property
    def dtype(self) -> DType | torch.dtype:
        """The dtype."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """The rule for one delivered tensor of a Linear.

    `dtypes` are the accepted dtypes. `shape` is written in axis letters (N output features, K input features, g group
    size), such as `("N/2", "K/g")`. A division by `//` rounds up. An empty shape means a single element, of shape [] or
    [1]. `or_shape` is an alternative shape that the engine also accepts. `alias` is a second name under which the
    engine reads the tensor; both names may be delivered if they hold the same values.
    """

    name: str
    dtypes: tuple[DType, ...]
    shape: tuple[str, ...]
    or_shape: tuple[str, ...] | None = None
    alias: str | None = None
    required: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the tensor may have: `name` first, then `alias`."""
        return (self.name,) if self.alias is None else (self.name, self.alias)

    def name_among(self, tensors: Mapping[str, Header]) -> str | None:
        """The name under which the tensor occurs in the tensors of a module; None if it does not occur."""
        return next((name for name in self.names if name in tensors), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCheck:
    """Compares the headers of the tensors of module `name` with rules, and adds every violation to `faults`."""

    name: str
    layer: LayerQuantConfig
    out_features: int
    in_features: int
    faults: FaultCollector

    def check(self, tensors: Mapping[str, Header], rules: Sequence[TensorRule]) -> None:
        """Check that all required tensors exist, that there are no unknown ones, and every dtype and shape."""
        self._check_missing(rules, tensors)
        self._check_surplus(rules, tensors)
        for rule in rules:
            for name in (name for name in rule.names if name in tensors):
                self._check_dtype(rule, name, tensors[name])
                self._check_shape(rule, name, tensors[name])

    def _check_missing(self, rules: Sequence[TensorRule], tensors: Mapping[str, Header]) -> None:
        required = [rule for rule in rules if rule.required]
        missing = [rule.name for rule in required if rule.name_among(tensors) is None]
        if missing:
            self.faults.add(
                where=self.name,
                expected=f"tensors {', '.join(rule.name for rule in required)} for {self.layer.quant_algo}",
                found=f"no {', '.join(missing)}",
                remedy="Deliver them, or list the module in exclude_modules if it is not quantized.",
            )

    def _check_surplus(self, rules: Sequence[TensorRule], tensors: Mapping[str, Header]) -> None:
        known = [name for rule in rules for name in rule.names]
        for local in sorted(tensors.keys() - set(known)):
            self.faults.add(
                where=f"{self.name}.{local}",
                expected=f"only {', '.join(known)} for {self.layer.quant_algo}",
                found=describe(tensors[local]),
                remedy="The algorithm has no use for this tensor; check which one quant_config names for the module.",
            )

    def _check_dtype(self, rule: TensorRule, name: str, tensor: Header) -> None:
        if not has_dtype(tensor, rule.dtypes):
            self.faults.add(
                where=f"{self.name}.{name}",
                expected=f"dtype {' or '.join(dtype.torch_name for dtype in rule.dtypes)}",
                found=describe(tensor),
                remedy=f"This is no {rule.name} of {self.layer.quant_algo}; check the module's entry in quant_config.",
            )

    def _check_shape(self, rule: TensorRule, name: str, tensor: Header) -> None:
        shapes = [rule.shape] if rule.or_shape is None else [rule.shape, rule.or_shape]
        if any(self._fits(tensor, shape) for shape in shapes):
            return
        groups = "" if self.layer.group_size is None else f" and group_size {self.layer.group_size}"
        self.faults.add(
            where=f"{self.name}.{name}",
            expected=f"{' or '.join(self._in_words(shape) for shape in shapes)}, "
            f"for {self.out_features} outputs, {self.in_features} inputs{groups}",
            found=describe(tensor),
            remedy="Check that config.json and the group_size in quant_config belong to these weights.",
        )

    def _fits(self, tensor: Header, shape: tuple[str, ...]) -> bool:
        return list(tensor.shape) == [self._size_of(axis) for axis in shape] if shape else is_one_element(tensor)

    def _in_words(self, shape: tuple[str, ...]) -> str:
        if not shape:
            return "one element"
        sizes = [self._size_of(axis) for axis in shape]
        return f"shape [{', '.join(shape)}] in whole numbers" if None in sizes else f"shape {sizes}"

    def _size_of(self, axis: str) -> int | None:
        """The length of an axis such as `1`, `N`, `K/g` or `N//128`.

        None if a `/` division leaves a remainder, or if the axis needs a group size that is not known.
        """
        if axis.isdecimal():
            return int(axis)
        letter, _, divisor = axis.partition("/")
        size = self.out_features if letter == "N" else self.in_features
        divisor_value = self.layer.group_size if divisor == "g" else int(divisor.removeprefix("/") or 1)
        if not divisor_value:
            return None
        quotient, remainder = divmod(size, divisor_value)
        if remainder and not divisor.startswith("/"):
            return None
        return quotient + bool(remainder)


def check_aliases(tensors: Mapping[str, Tensor], rules: Iterable[TensorRule], module: str) -> None:
    """Raise `PlanError` if a tensor is delivered under both of its names with different values."""
    faults = FaultCollector()
    for names in (rule.names for rule in rules if rule.alias is not None and tensors.keys() >= set(rule.names)):
        first, second = (tensors[name] for name in names)
        if first.dtype != second.dtype or not first.flatten().equal(second.flatten()):
            faults.add(
                where=f"{module}.{names[1]}",
                expected=f"the values of {names[0]}, of which it is another name",
                found="other values",
                remedy="Deliver the scale once, or the same one under both names.",
            )
    faults.raise_if_any(PlanError)


def describe(tensor: Header) -> str:
    """The dtype and shape of a tensor for messages, such as `float32 [4, 2]`."""
    return f"{_dtype_name(tensor)} {list(tensor.shape)}"


def has_dtype(tensor: Header, dtypes: Iterable[DType]) -> bool:
    """Whether the tensor's dtype is one of `dtypes`."""
    return _dtype_name(tensor) in {dtype.torch_name for dtype in dtypes}


def is_one_element(tensor: Header) -> bool:
    """Whether the tensor has exactly one element and the shape [] or [1]."""
    return len(tensor.shape) <= 1 and prod(tensor.shape) == 1


def _dtype_name(tensor: Header) -> str:
    """The name of the dtype in torch, which is not imported for it."""
    dtype = tensor.dtype
    return dtype.torch_name if isinstance(dtype, DType) else str(dtype).removeprefix("torch.")
