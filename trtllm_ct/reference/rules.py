"""What the delivered tensors of a Linear must look like, and the comparison that says what differs.

The engine's own loader casts without a word and lets a tensor of one element fill a row of scales; here every dtype and
every length is compared before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.dtypes import DType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from trtllm_ct.errors import FaultCollector
    from trtllm_ct.quant_config import LayerQuantConfig

__all__ = ["WIDE_FLOATS", "LinearCheck", "TensorRule", "describe", "has_dtype", "is_one_element"]

WIDE_FLOATS = tuple(dtype for dtype in DType if dtype.is_wide_float)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One delivered tensor of a Linear.

    `shape` is written in axis letters (N out, K in, g group size), such as `("N/2", "K/g")`; an empty one means a
    single element, with or without an axis.
    """

    name: str
    dtypes: tuple[DType, ...]
    shape: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCheck:
    """Compares the tensors of the module `name` with rules, and gathers in `faults` what differs."""

    name: str
    layer: LayerQuantConfig
    out_features: int
    in_features: int
    faults: FaultCollector

    def check(self, tensors: Mapping[str, Tensor], rules: Iterable[TensorRule]) -> None:
        """Check that all required tensors are there, no other ones, each of its dtype and shape."""
        by_name = {rule.name: rule for rule in rules}
        self._check_missing(by_name, tensors)
        self._check_surplus(by_name, tensors)
        for local, rule in by_name.items():
            if local in tensors:
                self._check_dtype(rule, tensors[local])
                self._check_shape(rule, tensors[local])

    def _check_missing(self, rules: Mapping[str, TensorRule], tensors: Mapping[str, Tensor]) -> None:
        required = [local for local, rule in rules.items() if rule.required]
        missing = [local for local in required if local not in tensors]
        if missing:
            self.faults.add(
                where=self.name,
                expected=f"tensors {', '.join(required)} for {self.layer.quant_algo}",
                found=f"no {', '.join(missing)}",
                remedy="Deliver them, or list the module in exclude_modules if it is not quantized.",
            )

    def _check_surplus(self, rules: Mapping[str, TensorRule], tensors: Mapping[str, Tensor]) -> None:
        for local in sorted(tensors.keys() - rules.keys()):
            self.faults.add(
                where=f"{self.name}.{local}",
                expected=f"only {', '.join(rules)} for {self.layer.quant_algo}",
                found=describe(tensors[local]),
                remedy="The algorithm has no use for this tensor; check which one quant_config names for the module.",
            )

    def _check_dtype(self, rule: TensorRule, tensor: Tensor) -> None:
        if not has_dtype(tensor, rule.dtypes):
            self.faults.add(
                where=f"{self.name}.{rule.name}",
                expected=f"dtype {' or '.join(dtype.torch_name for dtype in rule.dtypes)}",
                found=describe(tensor),
                remedy=f"This is no {rule.name} of {self.layer.quant_algo}; check the module's entry in quant_config.",
            )

    def _check_shape(self, rule: TensorRule, tensor: Tensor) -> None:
        sizes = [self._size_of(axis) for axis in rule.shape]
        if rule.shape and None not in sizes:
            fits, wanted = list(tensor.shape) == sizes, f"shape {sizes}"
        elif rule.shape:
            fits, wanted = False, f"shape [{', '.join(rule.shape)}] in whole numbers"
        else:
            fits, wanted = is_one_element(tensor), "one element"
        if not fits:
            groups = "" if self.layer.group_size is None else f" and group_size {self.layer.group_size}"
            self.faults.add(
                where=f"{self.name}.{rule.name}",
                expected=f"{wanted}, for {self.out_features} outputs, {self.in_features} inputs{groups}",
                found=describe(tensor),
                remedy="Check that config.json and the group_size in quant_config belong to these weights.",
            )

    def _size_of(self, axis: str) -> int | None:
        """Length of an axis such as `N` or `K/g`; None when it is no whole number or group_size is not known."""
        letter, _, divisor = axis.partition("/")
        size = self.out_features if letter == "N" else self.in_features
        parts = self.layer.group_size if divisor == "g" else int(divisor or 1)
        return size // parts if parts and size % parts == 0 else None


def describe(tensor: Tensor) -> str:
    """Dtype and shape for messages, such as `float32 [4, 2]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def has_dtype(tensor: Tensor, dtypes: Iterable[DType]) -> bool:
    """Whether the tensor's dtype is one of `dtypes`."""
    return any(tensor.dtype == dtype.torch_dtype for dtype in dtypes)


def is_one_element(tensor: Tensor) -> bool:
    """Whether the tensor is a scalar, written as [] or as [1]."""
    return tensor.dim() <= 1 and tensor.numel() == 1
